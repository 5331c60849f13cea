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
from support.fakes import VirtualClock

from copilot_router import (
    AllProvidersFailed,
    AnthropicProvider,
    AuthenticationError,
    ContextLengthExceeded,
    DeadlineExceeded,
    FailoverChain,
    LLMProvider,
    LLMResponse,
    LMStudioProvider,
    OpenAIProvider,
    ProviderTier,
    ScriptedProvider,
    StreamInterrupted,
)

ROOT = Path(__file__).resolve().parent.parent.parent
KEY = "sk-test-of-a-real-server-1234567890"
MODEL = "smollm2"
CONTEXT = 1024  #: tokens
QUESTION = "What is 2 + 2?"
STORY = "Tell me a story."
TOO_LONG = "word " * (3 * CONTEXT)
#: The same answer each time, whatever the server did before.
EXACT: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "extra_body": {"cache_prompt": False}}
#: The model must not stop by itself.
ENDLESS: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}
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

    def idle(self) -> int:
        """Wait until it has nothing to do; returns the most tokens that its answer was seen to have until then."""
        most, until = 0, time.monotonic() + PATIENCE
        while any(slot["is_processing"] for slot in self.get("/slots")):
            most = max(most, self.decoded())
            assert time.monotonic() < until, "the server works on"
        return most

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
    print(f"\nserver of {found['package']}: {found['version']}")
    print(f"weights {Path(found['weights']).name}, sha256 {found['sha256']}")
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


@pytest.fixture(scope="session")
def plain(server: Server) -> dict[str, Any]:
    """The server's own whole answer to the question, asked without the module under test."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 40, "temperature": 0, "cache_prompt": False}
    answer: dict[str, Any] = server.get("/v1/chat/completions", body)
    return answer


def same(answer: LLMResponse, plain: dict[str, Any]) -> None:
    """The text and the token counts are those of the server's own answer."""
    assert answer.text == plain["choices"][0]["message"]["content"] != ""
    assert answer.finish_reason == plain["choices"][0]["finish_reason"]
    assert answer.usage.prompt_tokens == plain["usage"]["prompt_tokens"] > 0
    assert answer.usage.completion_tokens == plain["usage"]["completion_tokens"] > 0


def counts(answer: LLMResponse) -> str:
    return f"prompt tokens {answer.usage.prompt_tokens}, completion tokens {answer.usage.completion_tokens}"


# -- answers


def test_an_answer_through_the_chain(server: Server, plain: dict[str, Any], tell: Tell) -> None:
    """The model's text, and the very token counts that the server reports when it is asked without this library."""
    with FailoverChain([tier(server)]) as chain:
        answer = chain.chat(QUESTION, **EXACT)
    tell(f"answer: {answer.text!r}, {answer.explain()}")
    tell(f"{counts(answer)}; asked without this library: {plain['usage']}")
    same(answer, plain)
    assert (answer.provider, answer.model) == ("local", MODEL)


def test_a_whole_json_answer(server: Server, tell: Tell) -> None:
    """Without streaming inside, cut by max_tokens: exactly so many tokens, and the finish reason says so."""
    provider = OpenAIProvider(KEY, server.url, stream_upstream=False)
    with FailoverChain([ProviderTier("whole", provider, [MODEL])]) as chain:
        answer = chain.chat(STORY, max_tokens=12, **ENDLESS)
    tell(counts(answer))
    assert answer.raw is not None
    assert answer.usage.prompt_tokens == answer.raw["usage"]["prompt_tokens"] > 0
    assert (answer.finish_reason, answer.usage.completion_tokens) == ("length", 12)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda url: OpenAIProvider(KEY, url, api="responses"), id="Responses"),
        pytest.param(lambda url: AnthropicProvider(KEY, url), id="Messages"),
        pytest.param(lambda url: AnthropicProvider(KEY, url, stream_upstream=False), id="whole Messages"),
    ],
)
def test_other_wire_formats(server: Server, plain: dict[str, Any], make: Callable[[str], LLMProvider], tell: Tell) -> None:
    """The server speaks these too: the same answer, the same counts, the same error for a prompt that is too long."""
    with FailoverChain([ProviderTier("other", make(server.url), [MODEL])]) as chain:
        answer = chain.chat(QUESTION, **EXACT)
        with pytest.raises(ContextLengthExceeded):
            chain.chat(TOO_LONG, max_tokens=8)
    tell(f"answer: {answer.text!r}, {counts(answer)}")
    same(answer, plain)


def test_an_answer_of_a_given_shape(server: Server, tell: Tell) -> None:
    """A JSON schema reaches the server, which makes the model keep to it."""
    age = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"], "additionalProperties": False}
    shape = {"type": "json_schema", "json_schema": {"name": "person", "schema": age}}
    with FailoverChain([tier(server)]) as chain:
        answer = chain.chat("A person, as JSON", response_format=shape, max_tokens=80, temperature=0)
    tell(f"answer: {answer.text!r}")
    found = json.loads(answer.text)
    assert list(found) == ["age"]
    assert isinstance(found["age"], int)


def test_a_stream_of_the_chain(server: Server, plain: dict[str, Any], tell: Tell) -> None:
    """Deltas come one by one, and are together the answer."""
    start = time.monotonic()
    with FailoverChain([tier(server)]) as chain, chain.stream(QUESTION, **EXACT) as stream:
        first = time.monotonic() - start
        deltas = list(stream)
        answer = stream.response
    last = time.monotonic() - start
    tell(f"{len(deltas)} deltas, the first after {first:.3f} s, the last after {last:.3f} s; {counts(answer)}")
    assert len(deltas) > 3
    assert "".join(deltas) == answer.text
    same(answer, plain)
    assert answer.provider == "local"


def test_a_stream_that_is_closed_early(server: Server, tell: Tell) -> None:
    """The server notices and stops generating; the tier is as healthy as before."""
    with FailoverChain([tier(server)]) as chain:
        with chain.stream(STORY, max_tokens=900, **ENDLESS) as stream:
            deltas = [next(stream) for _ in range(5)]
        start = time.monotonic()
        seen = server.idle()
        tell(f"closed after {len(deltas)} deltas: {time.monotonic() - start:.3f} s later the server was idle")
        assert seen < 800
        (health,) = chain.health()
        assert (health.failures, health.breaker.state, health.breaker.failures) == (0, "closed", 0)
        assert chain.chat(QUESTION, **EXACT).text


def test_a_deadline_ends_an_answer(server: Server, tell: Tell) -> None:
    """The caller gets its error in time, and the server is not left working for nobody."""
    with FailoverChain([tier(server)]) as chain:
        chain.chat(QUESTION, **EXACT)
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded) as caught:
            chain.chat(STORY, timeout=1.0, max_tokens=900, **ENDLESS)
        spent = time.monotonic() - start
        seen = server.idle()
    tell(f"timeout 1.0: over after {spent:.3f} s, {caught.value.explain()}; last seen of the server: {seen} tokens")
    assert spent < 1.0 * 1.05 + 0.1
    assert seen < 800


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
            answer = chain.chat(STORY, max_tokens=400, **ENDLESS)
        killer.join(PATIENCE)
    assert killed, "the server was never seen at work"
    (tokens, pid), attempts = killed[0], answer.attempts
    tell(f"killed pid {pid} after {tokens} tokens of its answer; {answer.explain()}")
    tell(counts(answer))
    assert [(attempt.tier, attempt.outcome) for attempt in attempts] == [("local", "failed"), ("spare", "ok")]
    assert attempts[0].error == "InvalidResponse: truncated: the connection broke"
    assert (answer.provider, answer.finish_reason, answer.usage.completion_tokens) == ("spare", "length", 400)


def test_kill_9_during_a_stream(server: Server, found: dict[str, str], tmp_path: Path, tell: Tell) -> None:
    """After text was handed out nothing is spliced: StreamInterrupted with what was there, one failure of the tier."""
    with running(found, tmp_path / "log") as victim, FailoverChain([tier(victim), tier(server, "spare")]) as chain:
        deltas: list[str] = []
        with chain.stream(STORY, max_tokens=900, **ENDLESS) as stream:
            deltas += [next(stream) for _ in range(5)]
            pid = victim.kill()
            with pytest.raises(StreamInterrupted) as caught:
                deltas += stream
        error = caught.value
        tell(f"killed pid {pid} after 5 deltas; {len(deltas)} had arrived: {error}")
        assert error.partial == "".join(deltas) == stream.text
        assert [(attempt.tier, attempt.outcome) for attempt in error.attempts] == [("local", "failed")]
        assert chain.tiers[0].breaker.snapshot().failures == 1
        assert chain.chat(QUESTION, **EXACT).provider == "spare"


def test_restart_of_a_killed_server(found: dict[str, str], tmp_path: Path, tell: Tell) -> None:
    """The breaker opens while the server is gone; when it is back and the time is over, the chain returns to it."""
    clock = VirtualClock()
    spare = ScriptedProvider(["from the spare"], repeat=True)
    with (
        running(found, tmp_path / "log") as server,
        FailoverChain([tier(server), ProviderTier("spare", spare)], clock=clock, sleep=clock.sleep) as chain,
    ):
        local = chain.tiers[0].breaker
        first = chain.chat(QUESTION, **EXACT)
        assert first.provider == "local"
        old = server.kill()
        while_down = [chain.chat(QUESTION, **EXACT) for _ in range(4)]
        tell(f"killed pid {old}: " + "; ".join(answer.explain() for answer in while_down))
        assert {answer.provider for answer in while_down} == {"spare"}
        assert local.is_open
        assert while_down[-1].attempts[0].outcome == "skipped"
        server.start()
        assert server.pid != old
        assert chain.chat(QUESTION, **EXACT).provider == "spare"  # not due yet
        clock.advance(18.75)
        back = chain.chat(QUESTION, **EXACT)
        tell(f"restarted as pid {server.pid}: {back.explain()}")
        assert (back.provider, back.text) == ("local", first.text)
        assert local.is_closed
        assert chain.chat(QUESTION, **EXACT).provider == "local"


def test_a_prompt_that_is_too_long(server: Server, tell: Tell) -> None:
    """ContextLengthExceeded, neutral to the breaker; a tier with more room answers instead."""
    with FailoverChain([tier(server)]) as chain:
        with pytest.raises(ContextLengthExceeded) as caught:
            chain.chat(TOO_LONG)
        error = caught.value
        tell(f"status {error.status}, code {error.code}: {error}")
        assert (error.provider, error.status) == ("local", 400)
        assert [attempt.outcome for attempt in error.attempts] == ["failed"]
        assert chain.tiers[0].breaker.snapshot().failures == 0
        assert chain.chat(QUESTION, **EXACT).text
    with FailoverChain([tier(server), ProviderTier("roomy", ScriptedProvider(["from the roomy one"]))]) as chain:
        answer = chain.chat(TOO_LONG)
    tell(answer.explain())
    assert answer.text == "from the roomy one"


def test_an_answer_that_fills_the_context(server: Server, tell: Tell) -> None:
    """It is an answer, cut: finish reason "length", prompt and answer together as long as the context."""
    with FailoverChain([tier(server)]) as chain:
        answer = chain.chat("word " * 900, **ENDLESS)
    tell(counts(answer))
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
    clock = VirtualClock()
    with FailoverChain([tier(server, key=wrong)], clock=clock, sleep=clock.sleep) as chain:
        with pytest.raises(AllProvidersFailed) as failed:
            chain.chat(QUESTION)
        assert [type(error) for error in failed.value.errors] == [AuthenticationError]
        assert chain.tiers[0].breaker.retry_after <= 18.75
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
