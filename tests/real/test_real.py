"""A real model behind a real server: llama.cpp and SmolLM2 on loopback, through the real providers and the chain.

``make real`` builds what this needs and says in COPILOT_ROUTER_REAL where it is.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from clocks import FakeClock

from copilot_router import (
    AllProvidersFailed,
    AuthenticationError,
    ContextLengthExceeded,
    FailoverChain,
    LMStudioProvider,
    OpenAIProvider,
    ProviderTier,
    ScriptedProvider,
)

ROOT = Path(__file__).resolve().parent.parent.parent
KEY = "sk-test-of-a-real-server-1234567890"
MODEL = "smollm2"
CONTEXT = 1024  #: tokens
QUESTION = "What is the capital of France?"
PATIENCE = 120.0  #: seconds for anything that a loaded machine may take long for

# -- the server


class Server:
    """A llama.cpp server process on a port of its own; it can be killed and started again on the same port."""

    def __init__(self, found: dict[str, str], log: Path) -> None:
        self.found = found
        self.log = log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Start it and wait until the model is loaded; a server that ends instead is an error with its own last words."""
        options = ["--host", "127.0.0.1", "--port", self.port, "--api-key", KEY, "--alias", MODEL, "--slots"]
        sizes = ["--ctx-size", CONTEXT, "--parallel", 1, "--threads", 2]
        command = [self.found["server"], "--model", self.found["weights"], *options, *sizes]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
        with open(self.log, "ab") as output:
            self.process = subprocess.Popen(
                list(map(str, command)), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environ
            )
        until = time.monotonic() + PATIENCE
        while not self._healthy():
            try:
                self.process.wait(0.1)
            except subprocess.TimeoutExpired:
                if time.monotonic() < until:
                    continue
            self.stop()
            words = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(f"the server did not get ready:\n{words}")

    def _healthy(self) -> bool:
        try:
            self.get("/health")
        except OSError:  # refused, or 503 while the model is being loaded
            return False
        return True

    def get(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the server says, asked without the module under test."""
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=PATIENCE) as answer:
            return json.load(answer)

    def decoded(self) -> int:
        """Tokens of the answer that it is busy with."""
        (slot,) = self.get("/slots")
        if not slot["is_processing"]:
            return 0
        tokens = slot["next_token"]
        return int((tokens[0] if isinstance(tokens, list) else tokens)["n_decoded"])

    def kill(self) -> int:
        """As ``kill -9`` does; returns the pid."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)
        assert self.process.wait(10) == -signal.SIGKILL
        return self.process.pid

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


@contextmanager
def running(found: dict[str, str], log: Path) -> Iterator[Server]:
    server = Server(found, log)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def found() -> dict[str, str]:
    """Where the server and the weights are."""
    manifest = os.environ.get("COPILOT_ROUTER_REAL")
    if not manifest:
        pytest.fail("COPILOT_ROUTER_REAL is not set: run `make real`, which builds the server and sets it")
    found: dict[str, str] = json.loads(Path(manifest).read_text(encoding="utf-8"))
    print(f"\nserver {found['version']}\nweights {Path(found['weights']).name}, sha256 {found['sha256']}")
    return found


@pytest.fixture(scope="session")
def server(found: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that lives through all tests; who kills one starts one of their own."""
    with running(found, tmp_path_factory.mktemp("server") / "log") as server:
        yield server


Tell = Callable[[str], None]


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Iterator[Tell]:
    """Collects what a case saw; printed with its time, whatever became of it."""
    start = time.monotonic()
    facts: list[str] = []
    yield facts.append
    name = request.node.name.removeprefix("test_").replace("_", " ")
    print(f"\n{name} ({time.monotonic() - start:.1f} s)" + "".join(f"\n    {fact}" for fact in facts))


def tier(server: Server, name: str = "local", key: str = KEY) -> ProviderTier:
    return ProviderTier(name, LMStudioProvider(key, server.url), [MODEL])


# -- answers


def test_an_answer_through_the_chain(server: Server, tell: Tell) -> None:
    """The model's text, and the very token counts that the server reports when it is asked without this library."""
    with FailoverChain([tier(server)]) as chain:
        answer = chain.chat(QUESTION, max_tokens=40, temperature=0, seed=1)
    tell(f"answer: {answer.text!r}, {answer.explain()}")
    tell(f"prompt tokens {answer.usage.prompt_tokens}, completion tokens {answer.usage.completion_tokens}")
    assert "Paris" in answer.text
    assert (answer.provider, answer.model, answer.finish_reason) == ("local", MODEL, "stop")
    question = [{"role": "user", "content": QUESTION}]
    plain = server.get("/v1/chat/completions", {"messages": question, "max_tokens": 40, "temperature": 0, "seed": 1})
    assert answer.text == plain["choices"][0]["message"]["content"]
    assert answer.usage.prompt_tokens == plain["usage"]["prompt_tokens"] > 0
    assert answer.usage.completion_tokens == plain["usage"]["completion_tokens"] > 0


def test_a_whole_json_answer(server: Server, tell: Tell) -> None:
    """Without streaming inside, cut by max_tokens: exactly so many tokens, and the finish reason says so."""
    provider = OpenAIProvider(KEY, server.url, stream_upstream=False)
    with FailoverChain([ProviderTier("whole", provider, [MODEL])]) as chain:
        answer = chain.chat("Tell me a long story about a dragon.", max_tokens=12, temperature=0)
    tell(f"prompt tokens {answer.usage.prompt_tokens}, completion tokens {answer.usage.completion_tokens}")
    assert answer.raw is not None
    assert answer.usage.prompt_tokens == answer.raw["usage"]["prompt_tokens"] > 0
    assert (answer.finish_reason, answer.usage.completion_tokens) == ("length", 12)


def test_a_provider_streams(server: Server, tell: Tell) -> None:
    """Deltas come one by one, and are together the response."""
    provider = OpenAIProvider(KEY, server.url)
    stream = provider.stream(QUESTION, model=MODEL, max_tokens=40, temperature=0)
    deltas, start, first = [], time.monotonic(), 0.0
    try:
        while True:
            deltas.append(next(stream))
            first = first or time.monotonic() - start
    except StopIteration as end:
        response = end.value
    finally:
        provider.close()
    tell(f"{len(deltas)} deltas, the first after {first:.2f} s, the last after {time.monotonic() - start:.2f} s")
    assert len(deltas) > 3
    assert "".join(deltas) == response.text
    assert "Paris" in response.text


@pytest.mark.skipif("stream" not in vars(FailoverChain), reason="this chain hands out whole answers only")
def test_the_chain_streams(server: Server, tell: Tell) -> None:
    """The same through the chain, which names the tier."""
    with FailoverChain([tier(server)]) as chain, chain.stream(QUESTION, max_tokens=40, temperature=0) as stream:
        deltas = list(stream)
        response = stream.response
    tell(f"{len(deltas)} deltas, {response.explain()}")
    assert len(deltas) > 3
    assert "".join(deltas) == response.text
    assert "Paris" in response.text
    assert response.provider == "local"
    assert response.usage.completion_tokens >= len(deltas)


def test_the_command_line(server: Server, tell: Tell) -> None:
    """A real prompt from a shell: the answer alone on stdout."""
    command = [sys.executable, "-m", "copilot_router", "chat", "--provider", "lmstudio", "--base-url", server.url, "--json"]
    environ = {**os.environ, "LM_API_TOKEN": KEY}
    done = subprocess.run(
        [*command, QUESTION], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    tell(f"answer: {answer['content']!r}")
    assert answer["content"].strip()
    assert answer["usage"]["completion_tokens"] > 0
    assert done.stderr == ""


# -- failures


def test_kill_9_during_an_answer(server: Server, found: dict[str, str], tmp_path: Path, tell: Tell) -> None:
    """The next tier, another server, delivers the whole answer, and the record says what happened."""
    killed: list[tuple[int, int]] = []
    with running(found, tmp_path / "log") as victim:

        def kill_when_busy() -> None:
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until:
                if (tokens := victim.decoded()) >= 8:
                    killed.append((tokens, victim.kill()))
                    return

        killer = threading.Thread(target=kill_when_busy)
        killer.start()
        with FailoverChain([tier(victim), tier(server, "spare")]) as chain:
            answer = chain.chat("Tell me a story.", max_tokens=400, temperature=0, extra_body={"ignore_eos": True})
        killer.join(PATIENCE)
    assert killed, "the server was never seen at work"
    (tokens, pid), attempts = killed[0], answer.attempts
    tell(f"killed pid {pid} after {tokens} tokens of its answer; {answer.explain()}")
    tell(f"prompt tokens {answer.usage.prompt_tokens}, completion tokens {answer.usage.completion_tokens}")
    assert [(attempt.tier, attempt.outcome) for attempt in attempts] == [("local", "failed"), ("spare", "ok")]
    assert attempts[0].error == "InvalidResponse: truncated: the connection broke"
    assert (answer.provider, answer.finish_reason, answer.usage.completion_tokens) == ("spare", "length", 400)


def test_restart_of_a_killed_server(found: dict[str, str], tmp_path: Path, tell: Tell) -> None:
    """The breaker opens while the server is gone; when it is back and the time is over, the chain returns to it."""
    clock = FakeClock()
    spare = ScriptedProvider(["from the spare"], repeat=True)
    with (
        running(found, tmp_path / "log") as server,
        FailoverChain([tier(server), ProviderTier("spare", spare)], clock=clock, sleep=clock.sleep) as chain,
    ):
        ask: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
        local = chain.tiers[0].breaker
        first = chain.chat(QUESTION, **ask)
        assert first.provider == "local"
        old = server.kill()
        while_down = [chain.chat(QUESTION, **ask) for _ in range(4)]
        tell(f"killed pid {old}: " + "; ".join(answer.explain() for answer in while_down))
        assert {answer.provider for answer in while_down} == {"spare"}
        assert local.is_open
        assert while_down[-1].attempts[0].outcome == "skipped"
        server.start()
        assert server.pid != old
        assert chain.chat(QUESTION, **ask).provider == "spare"  # not due yet
        clock.advance(15.0)
        back = chain.chat(QUESTION, **ask)
        tell(f"restarted as pid {server.pid}: {back.explain()}")
        assert (back.provider, back.text) == ("local", first.text)
        assert local.is_closed
        assert chain.chat(QUESTION, **ask).provider == "local"


def test_a_prompt_that_is_too_long(server: Server, tell: Tell) -> None:
    """ContextLengthExceeded, neutral to the breaker; a tier with more room answers instead."""
    prompt = "word " * (3 * CONTEXT)
    with FailoverChain([tier(server)]) as chain:
        with pytest.raises(ContextLengthExceeded) as caught:
            chain.chat(prompt)
        error = caught.value
        tell(f"status {error.status}, code {error.code}: {error}")
        assert (error.provider, error.status) == ("local", 400)
        assert [attempt.outcome for attempt in error.attempts] == ["failed"]
        assert chain.tiers[0].breaker.snapshot().failures == 0
        assert chain.chat(QUESTION, max_tokens=8).text
    with FailoverChain([tier(server), ProviderTier("roomy", ScriptedProvider(["from the roomy one"]))]) as chain:
        answer = chain.chat(prompt)
    tell(answer.explain())
    assert answer.text == "from the roomy one"


def test_an_answer_that_fills_the_context(server: Server, tell: Tell) -> None:
    """It is an answer, cut: finish reason "length", prompt and answer together as long as the context."""
    with FailoverChain([tier(server)]) as chain:
        answer = chain.chat("word " * 900, temperature=0, extra_body={"ignore_eos": True})
    tell(f"prompt tokens {answer.usage.prompt_tokens}, completion tokens {answer.usage.completion_tokens}")
    assert answer.finish_reason == "length"
    assert CONTEXT - 2 <= answer.usage.total_tokens <= CONTEXT


def test_a_wrong_key(server: Server, tell: Tell) -> None:
    """AuthenticationError from the provider; the chain parks the tier for long and never shows the key."""
    wrong = "sk-wrong-key-0987654321"
    provider = OpenAIProvider(wrong, server.url)
    try:
        with pytest.raises(AuthenticationError) as caught:
            provider.chat(QUESTION, model=MODEL)
    finally:
        provider.close()
    tell(f"status {caught.value.status}: {caught.value}")
    assert caught.value.status == 401
    clock = FakeClock()
    with FailoverChain([tier(server, key=wrong)], clock=clock, sleep=clock.sleep) as chain:
        with pytest.raises(AllProvidersFailed) as failed:
            chain.chat(QUESTION)
        assert [type(error) for error in failed.value.errors] == [AuthenticationError]
        assert chain.tiers[0].breaker.retry_after == 600.0
    tell(failed.value.explain())
    assert wrong not in repr(caught.value) + str(failed.value) + repr(failed.value)


def test_check_of_a_server_up_and_down(found: dict[str, str], tmp_path: Path, tell: Tell) -> None:
    """The health probe sees a living server and a dead one."""
    with running(found, tmp_path / "log") as server, FailoverChain([tier(server)]) as chain:
        (up,) = chain.check()
        server.kill()
        (down,) = chain.check()
    tell(f"up: {up.last_error or 'ok'}, down: {down.last_error}")
    assert up.last_error is None
    assert str(down.last_error).startswith("ProviderUnavailable")
