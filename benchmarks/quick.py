"""How fast the library is, as ratios to what one would do without it: ``make bench-quick``, under a minute.

Absolute times say more about the machine than about the code. So every figure is measured in turn with its yardstick, round
after round, and what counts is the median of the rounds' ratios. The HTTP server is a process of its own that sends
prepared bytes, so that the client is what is measured. Exit status 1 if a target is missed.
"""

from __future__ import annotations

import json
import os
import py_compile
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import timeit
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pybreaker
import requests
import tenacity

import copilot_router
from copilot_router import (
    AllProvidersFailed,
    CircuitBreaker,
    CircuitOpen,
    FailoverChain,
    LLMProvider,
    LLMResponse,
    OpenAIProvider,
    ProviderTier,
    ServerError,
)

MESSAGES = [{"role": "user", "content": "Say hello."}]
EVENTS = 50


class Figure(NamedTuple):
    """One line of the table: medians over all rounds, times in seconds."""

    name: str
    ours: float
    yardstick: float
    ratio: float
    target: float
    against: str


def compare(
    name: str, ours: Callable[[], float], yardstick: Callable[[], float], target: float, against: str, rounds: int
) -> Figure:
    """Measure both in turn. Each callable returns seconds for one operation; who goes first alternates."""
    ours(), yardstick()  # warm: caches, connections, bytecode
    pairs = []
    for turn in range(rounds):
        if turn % 2:
            second = yardstick()
            first = ours()
        else:
            first = ours()
            second = yardstick()
        pairs.append((first, second))
    ratios = [first / second for first, second in pairs]
    medians = (statistics.median(values) for values in zip(*pairs, strict=True))
    return Figure(name, *medians, statistics.median(ratios), target, against)


def timed(statement: str, number: int, names: dict[str, Any]) -> Callable[[], float]:
    """Seconds for one run of a statement, from ``number`` runs."""
    timer = timeit.Timer(statement, globals=names)
    return lambda: timer.timeit(number) / number


# ---- import


def import_cost() -> Figure:
    """A fresh interpreter that imports the module, against one that does nothing.

    Both run in an empty virtual environment: what this one, or the machine, has installed may start things of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        venv.create(os.path.join(folder, "empty"), symlinks=os.name != "nt")
        python = os.path.join(folder, "empty", "Scripts" if os.name == "nt" else "bin", "python")
        copy = shutil.copy(copilot_router.__file__, folder)
        py_compile.compile(copy, doraise=True)  # as after the first import on any machine

        def run(program: str) -> Callable[[], float]:
            command = [python, "-I", "-c", program]
            return lambda: timeit.timeit(lambda: subprocess.run(command, check=True), number=2) / 2

        with_import = run(f"import sys; sys.path.insert(0, {folder!r}); import copilot_router")
        return compare("import", with_import, run("pass"), 2.6, "python -c pass", rounds=30)


# ---- circuit breaker


class Refused(Exception):
    """The yardstick's error."""


def refuse() -> int:
    raise Refused("no")


def answer() -> int:
    return 1


RAISE_AND_CATCH = "try:\n    refuse()\nexcept Refused:\n    pass"
YARDSTICK = {"refuse": refuse, "Refused": Refused}


def breaker_closed() -> Figure:
    names = {"call": CircuitBreaker().call, "answer": answer}
    guarded, bare = timed("call(answer)", 20_000, names), timed("answer()", 20_000, names)
    return compare("breaker, closed", guarded, bare, 10.0, "a bare call", rounds=100)


def breaker_open() -> Figure:
    breaker = CircuitBreaker()
    breaker.open(1e6)
    names = {"call": breaker.call, "answer": answer, "CircuitOpen": CircuitOpen}
    guarded = timed("try:\n    call(answer)\nexcept CircuitOpen:\n    pass", 10_000, names)
    bare = timed(RAISE_AND_CATCH, 10_000, YARDSTICK)
    return compare("breaker, open", guarded, bare, 6.0, "raise and catch", rounds=100)


# ---- chain, without a network


class Instant(LLMProvider):
    """Answers without doing anything, so that only the chain's own work is seen."""

    response = LLMResponse(content="Hello!", model="m")

    def chat(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> LLMResponse:
        return self.response


def by_hand() -> Callable[[Any], LLMResponse]:
    """What one writes with tenacity and pybreaker: a list of providers, each with a breaker, each tried twice."""
    backends = [(Instant(), pybreaker.CircuitBreaker(fail_max=3, reset_timeout=15)) for _ in range(2)]
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(2),
        wait=tenacity.wait_random(0.1, 0.3),
        retry=tenacity.retry_if_exception_type(ServerError),
        reraise=True,
    )

    def chat(messages: Any) -> LLMResponse:
        errors = []
        for provider, breaker in backends:
            try:
                return retrying(breaker.call, provider.chat, messages, tools=None, model="m", timeout=300.0)
            except Exception as error:
                errors.append(error)
        raise AllProvidersFailed(str(errors))

    return chat


def healthy_tier() -> Figure:
    chain = FailoverChain([ProviderTier("first", Instant(), ["m"]), ProviderTier("second", Instant(), ["m"])])
    names = {"chat": chain.chat, "by_hand": by_hand(), "messages": MESSAGES}
    ours, theirs = timed("chat(messages)", 2_000, names), timed("by_hand(messages)", 2_000, names)
    return compare("chain, a healthy tier", ours, theirs, 0.45, "tenacity + pybreaker", rounds=60)


def open_tier() -> Figure:
    """What each tier that is open adds to a call: the difference between eleven of them and one."""

    def chain(count: int) -> Callable[[], float]:
        tiers = [ProviderTier(f"down-{at}", Instant(), ["m"], breaker=CircuitBreaker()) for at in range(count)]
        for tier in tiers:
            tier.breaker.open(1e6, "ServerError: down")
        made = FailoverChain([*tiers, ProviderTier("up", Instant(), ["m"])])
        return timed("chat(messages)", 1_000, {"chat": made.chat, "messages": MESSAGES})

    one, eleven = chain(1), chain(11)
    bare = timed(RAISE_AND_CATCH, 10_000, YARDSTICK)
    return compare("chain, each open tier", lambda: (eleven() - one()) / 10, bare, 2.5, "try and except", rounds=60)


# ---- chain, over HTTP


def prepared_answers() -> tuple[bytes, bytes]:
    """A stream of 50 events, each in a chunk of its own as servers send them, and a whole JSON answer."""

    def event(delta: dict[str, str], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        body = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
        return b"data: " + json.dumps(body).encode() + b"\n\n"

    events = [event({"role": "assistant", "content": ""}), *(event({"content": f"word{at} "}) for at in range(EVENTS - 3))]
    events += [event({}, "stop"), b"data: [DONE]\n\n"]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(item), item) for item in events) + b"0\r\n\r\n"
    stream = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    message = {"role": "assistant", "content": "word " * EVENTS}
    usage = {"prompt_tokens": 9, "completion_tokens": EVENTS, "total_tokens": 9 + EVENTS}
    whole = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "usage": usage,
             "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]}  # fmt: skip
    body = json.dumps(whole).encode()
    return stream, b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def serve() -> None:
    """The server's process: prints its port; stops when its standard input closes. GET answers the connections so far."""
    stream, whole = prepared_answers()
    listener = socket.create_server(("127.0.0.1", 0))
    count = 0

    def talk(connection: socket.socket) -> None:
        with connection:
            while request := read_request(connection):
                if request.startswith(b"GET"):
                    text = b"%d" % count
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
                else:
                    connection.sendall(stream if b'"stream": true' in request or b'"stream":true' in request else whole)

    def accept() -> None:
        nonlocal count
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            count += 1
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()


def read_request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


@contextmanager
def server() -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.stdin.close()


def bare_stream(session: requests.Session, url: str) -> str:
    """The same stream, read with requests and nothing else: no limits, no checks, no record."""
    body = {"model": "m", "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}
    pieces = []
    with session.post(url, json=body, headers={"Authorization": "Bearer key"}, stream=True, timeout=300) as response:
        for line in response.iter_lines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                pieces.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
    return "".join(pieces)


def bare_whole(session: requests.Session, url: str) -> str:
    body = {"model": "m", "messages": MESSAGES}
    response = session.post(url, json=body, headers={"Authorization": "Bearer key"}, timeout=300)
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def over_http() -> Iterator[Figure]:
    with server() as url, requests.Session() as session:
        path = f"{url}/chat/completions"
        for name, target, streaming, bare in (
            (f"HTTP, {EVENTS} events", 1.0, True, bare_stream),
            ("HTTP, whole JSON", 0.9, False, bare_whole),
        ):
            provider = OpenAIProvider("key", url, stream_upstream=streaming)
            with FailoverChain([ProviderTier("http", provider, ["m"])]) as chain:
                assert chain.chat(MESSAGES).text == bare(session, path)  # both really read all of it
                names = {"chat": chain.chat, "bare": bare, "messages": MESSAGES, "session": session, "path": path}
                ours, theirs = timed("chat(messages)", 20, names), timed("bare(session, path)", 20, names)
                yield compare(name, ours, theirs, target, "bare requests", rounds=100)


def new_connections(calls: int = 20) -> int:
    """How many connections the server sees in that many calls, after the first."""
    with server() as url, FailoverChain([ProviderTier("http", OpenAIProvider("key", url), ["m"])]) as chain:
        chain.chat(MESSAGES)
        before = int(requests.get(f"{url}/count", timeout=5).text)
        for _ in range(calls):
            chain.chat(MESSAGES)
        return int(requests.get(f"{url}/count", timeout=5).text) - before - 1  # less this question's own


# ---- the table


def figures() -> Iterator[Figure]:
    yield import_cost()
    yield breaker_closed()
    yield breaker_open()
    yield healthy_tier()
    yield open_tier()
    yield from over_http()


def seconds(value: float) -> str:
    for unit, size in (("s ", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def main() -> int:
    """Print the table; 0 if every target is met."""
    start = timeit.default_timer()
    print(f"copilot_router {copilot_router.__version__}, Python {sys.version.split()[0]}; medians, ratios of paired rounds\n")
    print(f"{'figure':<24}{'ours':>9}{'yardstick':>12}  {'':<22}{'ratio':>7}{'target':>9}  verdict")
    missed = 0
    for figure in figures():
        good = figure.ratio <= figure.target
        missed += not good
        print(
            f"{figure.name:<24}{seconds(figure.ours):>9}{seconds(figure.yardstick):>12}  {figure.against:<22}"
            f"{figure.ratio:>7.2f}{f'<= {figure.target:g}':>9}  {'ok' if good else 'MISSED'}",
            flush=True,
        )
    connections = new_connections()
    missed += connections != 0
    print(f"{'HTTP, new connections':<24}{connections:>9}{'':>12}  {'in 20 calls':<22}{'':>7}{'0':>9}  "
          f"{'MISSED' if connections else 'ok'}")  # fmt: skip
    print(f"\n{'all targets met' if not missed else f'{missed} missed'}, in {timeit.default_timer() - start:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serve()
    else:
        sys.exit(main())
