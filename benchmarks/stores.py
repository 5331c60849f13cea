"""What a healthy call costs on each store, as ratios to the same call without one: ``make
bench-stores``, under a minute.

Measured in turn, round after round, in one process; what counts is the median of the rounds' ratios
and differences. A healthy
call writes nothing and reads at most once per refresh interval, so there are two prices: of the
calls in between, and of the
one that reads. Starts a redis-server of its own on loopback. Exit status 1 if a target is missed.
"""

from __future__ import annotations

import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import copilot_router
from copilot_router import (
    CircuitBreaker,
    FailoverChain,
    LLMResponse,
    MemoryStore,
    ProviderTier,
    RedisStore,
    SQLiteStore,
)

MESSAGES = [{"role": "user", "content": "Say hello."}]
ROUNDS = 60
CALLS = 300


class Figure(NamedTuple):
    """One line of the table: medians over all rounds, times in seconds."""

    name: str
    ours: float
    yardstick: float
    ratio: float
    added: float


@contextmanager
def redis_server() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    server = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
    try:
        for _ in range(500):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.01)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.kill()
        server.wait()


class Instant(copilot_router.LLMProvider):
    """Answers at once, so that the chain is what is measured."""

    def chat(
        self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any
    ) -> LLMResponse:
        return LLMResponse(content="hello")


def chat_of(store: Any) -> Callable[[], Any]:
    chain = FailoverChain([ProviderTier("one", Instant(), ["m"])], store=store)
    return lambda: chain.chat(MESSAGES)


def call_of(store: Any) -> Callable[[], Any]:
    breaker = CircuitBreaker(name="one", store=store)
    return lambda: breaker.call(int)


def compare(made: dict[str, Callable[[], Any]], against: str, calls: int) -> Iterator[Figure]:
    """Every one in turn, round after round."""
    timers = {name: timeit.Timer(work) for name, work in made.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for timer in timers.values():
        timer.timeit(calls)
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            times[name].append(timer.timeit(calls) / calls)
    yardstick = times[against]
    for name, ours in times.items():
        yield Figure(
            name,
            statistics.median(ours),
            statistics.median(yardstick),
            statistics.median(one / other for one, other in zip(ours, yardstick, strict=True)),
            statistics.median(one - other for one, other in zip(ours, yardstick, strict=True)),
        )


def show(
    title: str, figures: Iterator[Figure], micro: dict[str, float], most: float | None = None
) -> int:
    """Print a table; how many targets were missed. ``micro``: microseconds that a store may add;
    ``most``: the ratio."""
    missed = 0
    print(f"\n{title:<34}{'time':>11}{'ratio':>9}{'added':>12}{'target':>13}  verdict")
    for figure in figures:
        target, good = "", True
        if figure.name in micro:
            target, good = f"<= {micro[figure.name]:g} us", figure.added * 1e6 <= micro[figure.name]
        elif most is not None:
            target, good = f"<= {most:g} times", figure.ratio <= most
        missed += not good
        print(f"{figure.name:<34}{figure.ours * 1e6:>8.2f} us{figure.ratio:>9.2f}{figure.added * 1e6:>9.2f} us{target:>13}"
              f"  {('ok' if good else 'MISSED') if target else ''}", flush=True)  # fmt: skip
    return missed


def main() -> int:
    """Print the tables; 0 if every target is met."""
    if shutil.which("redis-server") is None:
        print("redis-server is not installed", file=sys.stderr)
        return 2
    print(
        f"copilot_router {copilot_router.__version__}, Python {sys.version.split()[0]}; medians of {ROUNDS} rounds in turn"
    )
    with tempfile.TemporaryDirectory() as folder, redis_server() as url:
        import redis

        file = Path(folder) / "breakers.sqlite"
        client = redis.Redis.from_url(url)
        stores: dict[str, Any] = {
            "no store": None, "memory": MemoryStore(), "SQLite": SQLiteStore(file), "Redis": RedisStore(url),
            "SQLite, reading each time": SQLiteStore(file, refresh=0.0),
            "Redis, reading each time": RedisStore(url, refresh=0.0),
        }  # fmt: skip
        for name in ("SQLite", "Redis"):  # as after an outage: there is a record to read
            CircuitBreaker(name="one", store=stores[name]).reset()
        calls = {name: call_of(store) for name, store in stores.items()}
        chats = {name: chat_of(store) for name, store in stores.items() if "each" not in name}
        micro = {"SQLite": 30.0, "SQLite, reading each time": 30.0, "Redis": 30.0}
        missed = show("breaker.call", compare(calls, "no store", CALLS), micro)
        missed += show("chain.chat", compare(chats, "no store", CALLS), micro)
        reads = {
            "a bare PING": client.ping,
            "Redis, reading each time": calls["Redis, reading each time"],
        }
        missed += show(
            "one read against one round trip", compare(reads, "a bare PING", CALLS), {}, 2.5
        )
        client.close()
        for store in stores.values():
            if hasattr(store, "close"):
                store.close()
    print(f"\n{'all targets met' if not missed else f'{missed} missed'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
