"""Stores for tests, a real Redis among them, and what any store has to do: ``StoreContract``, also for one of your own."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from copilot_router import BreakerRecord, MemoryStore, RedisStore, SQLiteStore

KINDS = ("memory", "sqlite", "redis")


class RedisServer:
    """A Redis of Debian's on a port of its own, that can be stopped, started, paused and resumed."""

    def __init__(self) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            pytest.skip("redis-server is not installed")
        pytest.importorskip("redis")
        self.binary = binary
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        command = [self.binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(7) == b"+PONG\r\n":
                    return
            time.sleep(0.01)
        raise RuntimeError("redis-server did not start")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def send(self, command: str) -> None:
        with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
            connection.sendall(command.encode() + b"\r\n")
            connection.recv(100)


_servers: list[RedisServer] = []


def shared_redis() -> RedisServer:
    """One server for all tests that leave it as it is."""
    if not _servers:
        _servers.append(RedisServer())
    return _servers[0]


def stop_shared_redis() -> None:
    while _servers:
        _servers.pop().stop()


def maker(kind: str, folder: Path, stack: contextlib.ExitStack) -> Callable[..., Any]:
    """A function that makes stores over the same records, as several processes would; closed with the stack."""
    memory = MemoryStore()

    def make(**settings: Any) -> Any:
        settings = {"refresh": 0.0, "timeout": 2.0, **settings}
        if kind == "memory":
            return memory
        if kind == "sqlite":
            store: Any = SQLiteStore(folder / "breakers.db", **settings)
        else:
            store = RedisStore(shared_redis().url, str(folder), **{"shared_counts": True, **settings})
        stack.callback(store.close)
        return store

    return make


class StoreContract:
    """What a store promises. Subclass it, with a fixture ``store``: a function that makes stores over one set of records."""

    def test_an_unknown_name_has_no_record_but_a_time(self, store: Callable[..., Any]) -> None:
        """And the time goes on."""
        record, then = store().load("nobody")
        assert record is None
        assert store().load("nobody")[1] >= then

    def test_a_record_comes_back_as_it_was(self, store: Callable[..., Any]) -> None:
        """Every field, also an endless deadline and a reason in any script, in another store object too."""
        record = BreakerRecord("open", 7, 6, 3, math.inf, math.inf, 2, 1, 5, "RateLimited: tränk 日本 '\";--")
        assert store().swap("a", None, record) is True
        assert store().load("a")[0] == record

    def test_a_write_needs_the_expected_generation(self, store: Callable[..., Any]) -> None:
        """None expects no record; an older or a newer number changes nothing."""
        first, second = BreakerRecord(generation=5), BreakerRecord("open", 9)
        assert store().swap("b", 5, first) is False
        assert store().load("b")[0] is None
        assert store().swap("b", None, first) is True
        for wrong in (None, 4, 6):
            assert store().swap("b", wrong, second) is False
        assert store().load("b")[0] == first
        assert store().swap("b", 5, second) is True
        assert store().load("b")[0] == second

    @pytest.mark.parametrize("name", ["a:b", "a b", "ü", "x'; DROP TABLE breakers; --", "n" * 10_000, "a\nb", "a\0b", "%3A"])
    def test_118_names_are_told_apart(self, store: Callable[..., Any], name: str) -> None:
        """Odd, long and hostile ones."""
        assert store().swap(name, None, BreakerRecord(generation=1)) is True
        assert store().load(name)[0] == BreakerRecord(generation=1)
        assert store().load(name + "x")[0] is None
        assert store().load(name[:-1])[0] is None

    def test_of_many_writers_one_wins(self, store: Callable[..., Any]) -> None:
        """Sixteen threads at a barrier, twenty rounds: each round one compare-and-set gets through."""
        barrier = threading.Barrier(16)
        won: list[int] = []
        stores = [store() for _ in range(4)]

        def write(at: int) -> None:
            for step in range(20):
                barrier.wait(20)
                if stores[at % 4].swap("race", step or None, BreakerRecord(generation=step + 1, reason=str(at))):
                    won.append(step)

        threads = [threading.Thread(target=write, args=(at,)) for at in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(won) == list(range(20))


def environment() -> dict[str, str]:
    """For a child process that imports the module and these helpers."""
    here = Path(__file__).parent
    paths = [str(here.parent), str(here)] if not os.environ.get("COPILOT_ROUTER_INSTALLED") else [str(here)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
