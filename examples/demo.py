"""A bad day of your providers, in under ten seconds: ``make demo``.

Small HTTP servers on this machine misbehave in nine ways; the real provider classes talk to them
over real sockets. No key and no network are needed. Each step prints one line and checks itself:
the exit status is 0 only if everything happened as it says, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from copilot_router import (
    AllProvidersFailed,
    CircuitBreaker,
    DeadlineExceeded,
    Event,
    FailoverChain,
    OpenAIProvider,
    ProviderTier,
)

COLOUR = sys.stdout.isatty() and "NO_COLOR" not in os.environ


class Server(ThreadingHTTPServer):
    """A Chat Completions server with a mood. It remembers which models it was asked for."""

    daemon_threads = True

    def __init__(self, mood: str = "healthy", text: str = "Hello!") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mood = mood
        self.text = text
        self.asked: list[str] = []
        self.pause = 0.0  # seconds before each word
        self.retry_after = "30"
        self.gate = threading.Event()
        self.over = threading.Event()
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def stop(self) -> None:
        self.over.set()
        self.gate.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body.get("model", ""))
        try:
            getattr(self, self.server.mood)(body)
        except OSError:
            self.close_connection = True  # the client has had enough

    def healthy(self, body: dict[str, Any]) -> None:
        self.stream(*(word + " " for word in self.server.text.split()))

    def held(self, body: dict[str, Any]) -> None:
        self.server.gate.wait(5)
        self.healthy(body)

    def weak(self, body: dict[str, Any]) -> None:
        self.stream("[ESC", "ALATE] this needs ", "a proof")

    def busy(self, body: dict[str, Any]) -> None:
        self.json(
            429,
            {"error": {"message": "slow down, please"}},
            {"Retry-After": self.server.retry_after},
        )

    def broken(self, body: dict[str, Any]) -> None:
        self.json(500, {"error": {"message": "out of order"}})

    def dripping(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        while not self.server.over.wait(0.05):
            self.wfile.write(self.event({"content": "drip "}))

    def json(
        self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    @staticmethod
    def event(delta: dict[str, str], finish: str | None = None) -> bytes:
        return (
            b"data: "
            + json.dumps({"choices": [{"delta": delta, "finish_reason": finish}]}).encode()
            + b"\n\n"
        )

    def stream(self, *pieces: str) -> None:
        events = [
            *(self.event({"content": piece}) for piece in pieces),
            self.event({}, "stop") + b"data: [DONE]\n\n",
        ]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(sum(map(len, events))))
        self.end_headers()
        for event in events:
            self.server.over.wait(self.server.pause)
            self.wfile.write(event)


class StepFailed(Exception):
    """Something did not happen as told."""


def check(true: bool, expected: str, seen: object) -> None:
    if not true:
        raise StepFailed(f"expected {expected}, saw {seen}")


@contextmanager
def servers(*made: Server) -> Iterator[None]:
    try:
        yield
    finally:
        for server in made:
            server.stop()


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


def tier(name: str, url: str, model: str = "", **settings: Any) -> ProviderTier:
    return ProviderTier(name, OpenAIProvider("demo-key", url), [model or name], **settings)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.monotonic()
    return call(), time.monotonic() - start


def healthy_answer() -> str:
    local = Server(text="Hello from the local model.")
    with (
        servers(local),
        FailoverChain([tier("local", local.url), tier("cloud", closed_port())]) as chain,
    ):
        response = chain.chat("Say hello.", timeout=5)
        check(response.text.strip() == local.text, "the local answer", response.text)
        return response.explain()


def next_tier_answers() -> str:
    cloud = Server(text="Hello from the cloud.")
    with (
        servers(cloud),
        FailoverChain([tier("local", closed_port()), tier("cloud", cloud.url)]) as chain,
    ):
        try:
            response = chain.chat("Say hello.", timeout=5)
        except AllProvidersFailed as error:
            raise StepFailed(f"expected an answer of the second tier, saw {error}") from None
        check(response.provider == "cloud", "an answer of the second tier", response.provider)
        check(
            "refused" in str(response.attempts[0].error),
            "that the first refused",
            response.attempts[0],
        )
        return response.explain()


def breaker_opens() -> str:
    local, cloud = Server("broken"), Server()
    with (
        servers(local, cloud),
        FailoverChain([tier("local", local.url, retries=0), tier("cloud", cloud.url)]) as chain,
    ):
        for _ in range(3):
            chain.chat("hi", timeout=5)
        check(
            chain.tiers[0].breaker.is_open,
            "an open breaker after three failures",
            chain.tiers[0].breaker.state,
        )
        response, took = timed(lambda: chain.chat("hi", timeout=5))
        check(
            len(local.asked) == 3,
            "no fourth request to the broken tier",
            f"{len(local.asked)} requests",
        )
        check(response.attempts[0].outcome == "skipped", "a skip", response.attempts[0].outcome)
        return f"3 requests, then skipped: the fourth call took {took * 1000:.0f} ms"


def rate_limit_parks() -> str:
    local, cloud = Server("busy"), Server()
    with (
        servers(local, cloud),
        FailoverChain([tier("local", local.url), tier("cloud", cloud.url)]) as chain,
    ):
        _, took = timed(lambda: [chain.chat("hi", timeout=5) for _ in range(3)])
        parked = chain.tiers[0].breaker.retry_after or 0
        check(
            len(local.asked) == 1 and took < 2,
            "one request and no waiting",
            f"{len(local.asked)} in {took:.1f} s",
        )
        check(25 < parked <= 30, "parked for the 30 s of Retry-After", f"{parked:.0f} s")
        return (
            f"429 with Retry-After 30: asked once, parked for {parked:.0f} s, "
            f"3 calls answered in {took * 1000:.0f} ms"
        )


def dripping_is_cut() -> str:
    local = Server("dripping")
    with servers(local), FailoverChain([tier("local", local.url)]) as chain:
        guard = threading.Timer(3, local.stop)  # ends the step if the deadline does not hold
        guard.start()
        start = time.monotonic()
        try:
            chain.chat("hi", timeout=0.6)
        except DeadlineExceeded:
            took = time.monotonic() - start
        except AllProvidersFailed as error:
            raise StepFailed(f"expected DeadlineExceeded, saw {error}") from None
        else:
            raise StepFailed("expected DeadlineExceeded, saw an answer")
        finally:
            guard.cancel()
        check(took < 0.6 * 1.05 + 0.1, "an end at 0.6 s", f"{took:.2f} s")
        return f"a token every 50 ms, without end: cut after {took:.2f} s of 0.60 s"


def recovery_by_one_trial() -> str:
    now = [0.0]
    local, cloud = Server("broken"), Server()
    chain = FailoverChain(
        [tier("local", local.url, retries=0), tier("cloud", cloud.url)], clock=lambda: now[0]
    )
    with servers(local, cloud), chain:
        for _ in range(3):
            chain.chat("hi")
        local.mood, local.asked = "held", []
        now[0] += 20  # longer than a breaker stays open: 15 to 18.75 s
        answers: list[str] = []
        threads = [
            threading.Thread(target=lambda: answers.append(chain.chat("hi").provider))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 3
        while len(answers) < 7 and time.monotonic() < until:
            threads[0].join(0.01)  # seven go on at once; the eighth is inside the trial
        tried = len(local.asked)
        local.gate.set()
        for thread in threads:
            thread.join(5)
        check(tried == 1, "exactly one trial for 8 callers", f"{tried} requests")
        check(
            chain.tiers[0].breaker.is_closed,
            "a closed breaker after the trial",
            chain.tiers[0].breaker.state,
        )
        check(chain.chat("hi").provider == "local", "the first tier back in use", "another")
        return "8 callers at once: one tries, 7 are answered elsewhere; the tier is back"


def escalation() -> str:
    weak, strong = Server("weak"), Server(text="Here is the proof.")
    tiers = [tier("cheap", weak.url), tier("powerful", strong.url)]
    with servers(weak, strong), FailoverChain(tiers, escalation_model="powerful") as chain:
        response = chain.chat("Prove it.", timeout=5)
        check("ESCALATE" not in response.text, "no marker in the answer", response.text)
        check(response.text.strip() == strong.text, "the stronger model's answer", response.text)
        check(
            response.escalation == "this needs a proof",
            "the reason of the weaker model",
            response.escalation,
        )
        return f"{response.explain()} ({response.escalation})"


def marker_is_never_shown() -> str:
    weak = Server("weak")
    tiers = [tier("cheap", weak.url), tier("powerful", closed_port())]
    with servers(weak), FailoverChain(tiers, escalation_model="powerful") as chain:
        try:
            shown = chain.chat("Prove it.", timeout=5).text
        except AllProvidersFailed as error:
            weak = getattr(error, "response", None)
            shown = f"{error}{weak and weak.text}"
        check("ESCALATE" not in shown, "no marker even when nobody stronger answers", shown)
        return "the stronger model is down: an error with the weak answer, without the marker"


def everything_down() -> str:
    busy = Server("busy")
    with (
        servers(busy),
        FailoverChain([tier("local", closed_port()), tier("cloud", busy.url)]) as chain,
    ):
        try:
            chain.chat("hi", timeout=5)
        except AllProvidersFailed as error:
            text = str(error)
            check("local" in text and "cloud" in text, "every tier named", text)
            check(error.retry_after is not None, "a hint when to come back", error.retry_after)
            return f"{text} [retry_after {error.retry_after:.0f} s]"
        raise StepFailed("expected AllProvidersFailed, saw an answer")


SHORTENED = (
    "shortened: breakers open for 2 s here, not 15 s, and the server that is busy asks for 1 s"
)


def a_day_in_events() -> list[Event]:
    """The events of calls in a row while the servers behind them have their moods."""
    local, cheap, strong = Server(), Server(text="Hello from afar."), Server(text="A proof.")
    moods = {
        3: (local, "broken"),
        9: (cheap, "busy"),
        10: (cheap, "healthy"),
        12: (local, "healthy"),
        20: (local, "weak"),
        21: (local, "healthy"),
    }
    events: list[Event] = []
    tiers = [
        tier("local", local.url, retries=0, breaker=CircuitBreaker(recovery_timeout=2.0)),
        tier("cheap", cheap.url),
        tier("strong", strong.url),
    ]
    settings: dict[str, Any] = {
        "escalation_model": "strong",
        "max_retry_after": 0.5,
        "on_event": events.append,
    }
    with servers(local, cheap, strong), FailoverChain(tiers, **settings) as chain:
        for server in (local, cheap, strong):
            server.pause, server.retry_after = 0.03, "1"
        for call in range(23):
            if call in moods:
                server, server.mood = moods[call]
            chain.chat("hi", timeout=5)
            local.over.wait(0.05)
    return events


def draw(path: str) -> int:
    try:
        import timeline
    except ImportError as error:
        print(
            f"--svg needs matplotlib ({error}). "
            f"To get it: {sys.executable} -m pip install matplotlib",
            file=sys.stderr,
        )
        return 1
    timeline.draw(a_day_in_events(), path, SHORTENED)
    print(f"{path} is drawn")
    return 0


STEPS: list[tuple[str, Callable[[], str]]] = [
    ("healthy", healthy_answer),
    ("refused", next_tier_answers),
    ("breaker", breaker_opens),
    ("rate limit", rate_limit_parks),
    ("deadline", dripping_is_cut),
    ("recovery", recovery_by_one_trial),
    ("escalation", escalation),
    ("marker", marker_is_never_shown),
    ("all down", everything_down),
]


def main(arguments: list[str] | None = None) -> int:
    """Run all steps; 0 if everything happened as they say."""
    parser = argparse.ArgumentParser(
        prog="demo.py",
        description=__doc__.replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--svg", metavar="FILE", help="draw another such run as a picture instead; needs matplotlib"
    )
    chosen = parser.parse_args(arguments)
    if chosen.svg:
        return draw(chosen.svg)
    start = time.monotonic()
    for name, step in STEPS:
        try:
            line, good = step(), True
        except StepFailed as failure:
            line, good = str(failure), False
        except Exception as error:
            line, good = f"unexpected {type(error).__name__}: {error}", False
        mark = "ok" if good else "FAILED"
        if COLOUR:
            mark = f"\033[{32 if good else 31}m{mark}\033[0m"
        print(f"{name:<12} {mark}  {line}", flush=True)
        if not good:
            return 1
    print(f"everything happened as it says, in {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
