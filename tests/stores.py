"""Stores for tests: a Redis server of one's own, stores that are counted, broken and held up, and other processes."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import copilot_router
from copilot_router import BreakerRecord, CircuitBreaker, MemoryStore, RedisStore, SQLiteStore

REDIS = shutil.which("redis-server")
TESTS = Path(__file__).resolve().parent
_numbers = itertools.count()


def have_redis() -> None:
    """Skip the test where Redis, or PyPI's redis, is not installed."""
    pytest.importorskip("redis")
    if REDIS is None:
        pytest.skip("redis-server is not installed")


def spare_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """A redis-server on loopback that keeps nothing; to be stopped, paused and emptied at will."""

    def __init__(self) -> None:
        self.port = spare_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen([str(REDIS), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 30
        while True:
            try:
                assert self.ask("PING") == b"+PONG"
                return
            except OSError:
                assert time.monotonic() < until, "redis-server does not start"
                time.sleep(0.01)

    def ask(self, *words: str) -> bytes:
        """The first line of its answer to a command."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(f"*{len(words)}\r\n".encode() + b"".join(f"${len(w)}\r\n{w}\r\n".encode() for w in words))
            return connection.makefile("rb").readline().strip()

    def flush(self) -> None:
        assert self.ask("FLUSHALL") == b"+OK"

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def pause(self) -> None:
        """It keeps its connections, takes new ones, and says nothing."""
        self._signal(signal.SIGSTOP)
        assert self._process is not None
        os.waitpid(self._process.pid, os.WUNTRACED)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
        self._process = None


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A server of this test's own."""
    have_redis()
    server = RedisServer()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """One server for all tests that do it no harm; each takes a namespace of its own."""
    have_redis()
    server = RedisServer()
    yield server.url
    server.stop()


KINDS = ("memory", "sqlite", "redis")


@pytest.fixture
def make_store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """``make_store(kind, **settings)``: a handle on this test's own store of that kind, as another process would have."""
    made: list[Any] = []
    memory = MemoryStore()
    namespace = f"test-{os.getpid()}-{next(_numbers)}"

    def make(kind: str, **settings: Any) -> Any:
        if kind == "memory":
            return memory
        if kind == "sqlite":
            made.append(SQLiteStore(tmp_path / "breakers.sqlite", **settings))
        else:
            url = request.getfixturevalue("redis_url")
            made.append(RedisStore(url, settings.pop("namespace", namespace), **settings))
        return made[-1]

    yield make
    for store in made:
        store.close()


class Wrapped:
    """A store around a store: counts what it is asked, and can be told to fail, to wait, or which time it is."""

    def __init__(self, store: Any, clock: Callable[[], float] | None = None) -> None:
        self.store = store
        self.clock = clock  #: its time, if not its own
        for name in ("refresh", "shared_counts", "shares_local_errors"):
            if hasattr(store, name):
                setattr(self, name, getattr(store, name))
        self.loads = 0
        self.swaps = 0
        self.error: Exception | None = None  #: raised by every operation
        self.error_of_swap: Exception | None = None
        self.hold: threading.Event | None = None  #: waited for in every operation
        self.entered = threading.Event()
        self.before: Callable[[str], None] | None = None  #: called with the operation's name

    def _work(self, name: str) -> None:
        self.entered.set()
        if self.hold is not None:
            assert self.hold.wait(30)
        if self.before is not None:
            self.before(name)
        if self.error is not None:
            raise self.error

    def load(self, name: str) -> tuple[BreakerRecord | None, float]:
        self.loads += 1
        self._work("load")
        record, now = self.store.load(name)
        return record, now if self.clock is None else self.clock()

    def swap(self, name: str, expected_generation: int | None, record: BreakerRecord) -> bool:
        self.swaps += 1
        self._work("swap")
        if self.error_of_swap is not None:
            raise self.error_of_swap
        return bool(self.store.swap(name, expected_generation, record))


def python(program: str, *arguments: object, **settings: Any) -> subprocess.Popen[str]:
    """Another process that runs a program with this module, its lines at hand."""
    path = os.pathsep.join((str(Path(copilot_router.__file__).parent), str(TESTS), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings,
    )  # fmt: skip


def done(process: subprocess.Popen[str], timeout: float = 60) -> str:
    """What it printed; it must have ended well."""
    try:
        out, error = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, error
    return out


class Watcher:
    """Stands for a chain: hears what a breaker says of its store."""

    def __init__(self, breaker: CircuitBreaker, told: Callable[[str], object]) -> None:
        self.told = told
        breaker._watchers.add(self)  # type: ignore[arg-type]

    def _breaker_told(self, breaker: CircuitBreaker, data: dict[str, Any]) -> None:
        if "store" in data:
            self.told(data["store"])
