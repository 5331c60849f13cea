"""For tests of breakers and stores: a clock, a Redis server, stores that can be broken, what every
store must do, code that is stopped at each of its lines, other processes, an app for gunicorn.

The contract works for a store of your own as well::

    class TestMine(StoreContract):
        @pytest.fixture
        def handles(self):
            return lambda: MyStore(...)  # each call: a handle as another process would have
"""

from __future__ import annotations

import dis
import itertools
import json
import linecache
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from support.fakes import VirtualClock as FakeClock, error_of, in_threads, running

import copilot_router
from copilot_router import (AuthenticationError, BreakerRecord, CircuitBreaker, CircuitOpen,
    FailoverChain, LLMProvider, LLMResponse, MemoryStore, ProviderTier, ProviderUnavailable,
    RedisStore, ServerError, SQLiteStore, Ticket)

TESTS = Path(__file__).resolve().parent.parent
REDIS = shutil.which("redis-server")
try:
    import redis
except ImportError:
    redis = None
needs_redis = pytest.mark.skipif(
    REDIS is None or redis is None, reason="redis-server, or PyPI's redis, is not installed")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
#: Parameters of a test that runs on each kind of store.
SHARED_KINDS = ["sqlite", pytest.param("redis", marks=needs_redis)]
KINDS = ["memory", *SHARED_KINDS]
_numbers = itertools.count()


def end(ticket: Ticket, error: BaseException | None) -> None:
    """Leave the ticket's block by this error, or well."""
    try:
        with ticket:
            if error is not None:
                raise error
    except BaseException as caught:
        if caught is not error:
            raise


def seconds_of(work: Callable[[], Any], least: float = 0.0) -> float:
    start, begun = running(), time.monotonic()
    work()
    assert time.monotonic() - begun >= least
    return running() - start


# -- a Redis server
def spare_port() -> int:
    """None of those that the system gives to any connection: it is still free when it is used."""
    while True:
        port = 16_384 + int.from_bytes(os.urandom(2), "big") // 4
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class RedisServer:
    """A redis-server on loopback that saves nothing; tests stop, pause and empty it."""
    def __init__(self) -> None:
        self.port = spare_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        options = f"--port {self.port} --bind 127.0.0.1 --appendonly no --save".split()
        self._process: Any = subprocess.Popen(
            [str(REDIS), *options, ""], stdout=subprocess.DEVNULL)
        until = time.monotonic() + 30
        while True:
            try:
                return self.flush()
            except redis.ConnectionError:
                assert time.monotonic() < until, "redis-server does not start"
                time.sleep(0.01)

    def flush(self) -> None:
        with redis.Redis.from_url(self.url) as client:
            assert client.flushall()

    def pause(self) -> None:
        """It keeps its connections, takes new ones, and says nothing."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(30)


@pytest.fixture
def redis_server():
    """A server of this test alone."""
    server = RedisServer()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_url():
    """One server for all tests that do not harm it; each takes its own namespace."""
    server = RedisServer()
    yield server.url
    server.stop()


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def make_store(tmp_path, request):
    """``make_store(kind)``: a handle on this test's store; Redis shares counts as the others do."""
    made: list[Any] = []
    memory = MemoryStore()
    namespace = f"test-{os.getpid()}-{next(_numbers)}"
    url = None if needs_redis.args[0] else request.getfixturevalue("redis_url")
    def make(kind, **settings):
        if kind == "memory":
            return memory
        settings = {"timeout": 5.0, **settings}
        if kind == "sqlite":
            made.append(SQLiteStore(tmp_path / "breakers.sqlite", **settings))
        else:
            settings = {"namespace": namespace, "shared_counts": True, **settings}
            made.append(RedisStore(url, **settings))
        return made[-1]
    yield make
    for store in made:
        store.close()


class PlainStore:
    """A store as a user may write one: two methods, and no hash."""
    __hash__ = None

    def __init__(self) -> None:
        self.records: dict[str, BreakerRecord] = {}
        self.lock = threading.Lock()

    def load(self, name: str) -> tuple[BreakerRecord | None, float]:
        return self.records.get(name), time.monotonic()

    def swap(self, name: str, expected_generation: int | None, record: BreakerRecord) -> bool:
        with self.lock:
            if same := getattr(self.records.get(name), "generation", None) == expected_generation:
                self.records[name] = record
            return same


class Wrapped:
    """A store around a store: counts what it is asked, and fails or waits when it is told to."""
    def __init__(self, store: Any, clock: Callable[[], float] | None=None, **more: Any) -> None:
        self.store, self.clock = store, clock  #: a clock is its time, if not the store's
        for name in ("refresh", "shared_counts", "shares_local_errors"):
            if hasattr(store, name) or name in more:
                setattr(self, name, more.get(name, getattr(store, name, None)))
        self.loads = self.swaps = 0
        self.error: Exception | None = None  #: raised by every operation
        self.error_of_swap: Exception | None = None
        self.before: Callable[[str], None] | None = None  #: called with the operation's name

    def _work(self, name: str) -> None:
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


#: What a word of a story means; see ``Stage``.
VERDICTS = {"S": "success", "F": "failure", "N": "neutral", "P": "park"}
LOCAL = {"U": ProviderUnavailable("refused"), "K": AuthenticationError("wrong key")}


class Stage:
    """Plays stories about breakers, which ``new(who)`` makes; "who" is what precedes the colon.

    F, S, N, P (failure, success, neutral, park; U and K: by an error of this machine): the verdict
    on the newest ticket that is held, else on a new one; in small letters: on the oldest one.
    hold: admit and keep the ticket; trial: the same, and it is a trial. A number: seconds that
    pass. down, back: the store of this breaker, or of all. Others: what it does or must be now.
    """
    def __init__(self, clock: FakeClock, new: Callable[[str], CircuitBreaker]) -> None:
        self.clock, self.new = clock, new
        self.cast: dict[str, CircuitBreaker] = {}
        self.held: dict[str, list[Ticket]] = {}
        self.stores: dict[str, Any] = {}

    def play(self, story: str) -> None:
        for at, word in enumerate(story.split()):
            who, _, what = word.rpartition(":")
            name, _, value = what.partition("=")
            where = f"word {at}: {word}"
            if what in ("down", "back"):
                for store in [self.stores[who]] if who else self.stores.values():
                    store.error = ConnectionError("on fire") if what == "down" else None
            elif name[0].isdigit():
                self.clock.advance(float(what))
            else:
                if who not in self.cast:
                    self.cast[who], self.held[who] = self.new(who), []
                self.step(self.cast[who], self.held[who], name, value, where)

    def step(self, breaker: Any, held: list[Ticket], name: str, value: str, where: str) -> None:
        if name in ("left", "failures", "opened", "stale"):
            wanted = None if value == "None" else pytest.approx(float(value))
            found = breaker.retry_after if name == "left" else getattr(breaker.snapshot(), name)
            assert found == wanted, where
        elif name.upper() in "SFNPUK":
            ticket = held.pop(0 if name.islower() else -1) if held else breaker.admit()
            if name.upper() in LOCAL:
                end(ticket, LOCAL[name.upper()])
            else:
                getattr(ticket, VERDICTS[name.upper()])(*([float(value)] if value else []))
        elif name in ("hold", "trial"):
            held.append(breaker.admit())
            assert held[-1].is_trial == (name == "trial"), where
        elif name == "refused":
            for ask in (lambda: breaker.call(int), breaker.admit):
                assert error_of(CircuitOpen, ask).retry_after == breaker.retry_after, where
        elif name == "reset":
            breaker.reset()
        elif name == "open!" or value:
            breaker.open(float(value) if value else None)
        else:
            assert breaker.state == name, where
            flags = (breaker.is_closed, breaker.is_open, breaker.is_half_open)
            assert flags == tuple(name == one for one in ("closed", "open", "half_open")), where


# -- what every store must do
ODD_NAMES = ["a", "a ", "A", "a:b", "a/b", "a%3Ab", "{a}", "*", "'; DROP TABLE breakers; --",
    "\r\nFLUSHALL\r\n", "naïve", "nai\u0308ve", "中文🙂", "x" * 10_000, "x" * 10_001, "\x00",
    "breakers", "0", "None"]
REASON = "ServerError: “quoted” 'and' \\ \n 🙂"
RECORDS = [BreakerRecord(), BreakerRecord(generation=7, era=3, failures=2),
    BreakerRecord("open", 2**53, 2**53, 3, 1795580430.392527, 15.25, 4, 0, 9, REASON),
    BreakerRecord("open", 5, 5, 0, math.inf, math.inf, 0, 0, 1, "opened by hand"),
    BreakerRecord("half_open", 6, 6, 3, 12.5, 120.0, 1, 2, 1, "x" * 300)]


def fail(breaker: CircuitBreaker, times: int = 3) -> None:
    for _ in range(times):
        breaker.admit().failure("down")


class StoreContract:
    """The tests; a subclass defines the fixture ``handles``."""
    @pytest.fixture
    def process(self, handles, clock):
        """A breaker as another process would have it, in the clock's time."""
        def make(name="x", **settings):
            store = Wrapped(handles(), clock, shared_counts=True, shares_local_errors=True)
            return CircuitBreaker(name=name, clock=clock, store=store, **settings)
        return make

    def test_an_unknown_name_has_no_record_and_time_goes_on(self, handles):
        record, now = handles().load("unknown")
        again, later = handles().load("unknown")
        assert (record, again) == (None, None) and math.isfinite(now) and now <= later

    @pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.state)
    def test_a_record_comes_back_as_it_was(self, handles, record):
        assert handles().swap("x", None, record) is True
        found = handles().load("x")[0]
        assert found == record
        assert [type(value) for value in found] == [type(value) for value in record]

    def test_only_the_expected_generation_is_replaced(self, handles):
        one, two = handles(), handles()
        first, second = BreakerRecord(generation=10), BreakerRecord(generation=20)
        assert one.swap("x", 10, first) is False and one.load("x")[0] is None
        assert one.swap("x", None, first) is True and two.swap("x", None, second) is False
        assert two.swap("x", 9, second) is False and one.load("x")[0] == first
        assert two.swap("x", 10, second) is True and one.swap("x", 10, first) is False
        assert one.load("x")[0] == second

    def test_each_name_has_its_own_record(self, handles, process):
        store = handles()
        for at, name in enumerate(ODD_NAMES, 1):
            assert store.swap(name, None, BreakerRecord(generation=at, reason=name[:9]))
        for at, name in enumerate(ODD_NAMES, 1):
            assert store.load(name)[0] == BreakerRecord(generation=at, reason=name[:9])
        for name in ODD_NAMES[::2]:
            process(name).open()
        opened = [process(name).is_open for name in ODD_NAMES]
        assert opened == [at % 2 == 0 for at in range(len(ODD_NAMES))]

    def test_of_many_threads_one_writes_each_generation(self, handles):
        won: list[int] = []
        barrier = threading.Barrier(8)
        def work():
            store, mine = handles(), 0
            barrier.wait(30)
            while mine < 20:
                record = store.load("x")[0]
                at = record and record.generation
                try:
                    if store.swap("x", at, BreakerRecord(generation=(at or 0) + 1)):
                        won.append((at or 0) + 1)
                        mine += 1
                except Exception as error:  # it may be too busy, as long as it wrote nothing
                    assert "locked" in str(error) or isinstance(error, TimeoutError)
        for thread in in_threads(8, work):
            thread.join(60)
        assert sorted(won) == list(range(1, 161))

    def test_failures_are_counted_together(self, process):
        for count in range(1, 6):
            breaker = process(failure_threshold=5)  # a new process forgets nothing
            breaker.admit().failure()
            assert breaker.snapshot().failures == count
        error_of(CircuitOpen, process(failure_threshold=5).admit)

    def test_one_trial_for_all(self, process, clock):
        """After its lease another process takes over, and the late verdict changes nothing."""
        Stage(clock, lambda who: process(trial_timeout=40)).play("""
            a:F a:F a:F 1 a:open b:open c:open d:open b:left=14 14 a:trial b:refused c:refused
            d:refused 39.5 a:refused b:refused c:refused d:refused 0.5 d:trial c:refused a:refused
            1 a:S a:half_open b:half_open c:half_open d:half_open
            d:F 1 a:open b:open c:open d:open 15 c:trial c:S 1 a:closed b:closed c:closed d:closed
        """)

    def test_a_healthy_call_writes_nothing(self, handles, clock):
        """A thousand good calls in ten seconds: at most one read in each refresh interval."""
        store = Wrapped(handles(), clock)
        breaker = CircuitBreaker(name="x", clock=clock, store=store)
        for _ in range(1000):
            breaker.call(int)
            breaker.admit().success()
            clock.advance(0.01)
        refresh = getattr(store, "refresh", 1.0)
        assert store.swaps == 0 and (not refresh or 1 <= store.loads <= 10 / refresh + 1)


# -- code that is stopped at each of its lines
def traced(work: Callable[[], Any], visit: Callable[[Any], None], event: str = "line") -> None:
    """Run ``work``; ``visit(point)`` is called before each line of the module, and may raise.

    With ``event="call"`` it is called where each function begins, and with ``"call c_return"``
    also where a call of a C function has ended.

    Two kinds of lines are left out, since the interpreter never handles a signal there: the way
    out of a ``with`` block, and a line in ``finally`` that only releases a lock.
    """
    before, install = sys.gettrace(), sys.settrace if event == "line" else sys.setprofile
    def on(frame, what, _):
        if frame.f_code.co_filename != copilot_router.__file__:
            return None
        if what in event.split():
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            leaving = line.startswith("with ") and name.startswith("LOAD_CONST")
            if not leaving and not line.endswith(".release()"):
                caller = frame.f_back.f_lineno if frame.f_back else 0
                visit((frame.f_code.co_name, frame.f_lineno, caller))
        return on
    install(on)
    try:
        work()
    finally:
        sys.setprofile(None)
        sys.settrace(before)


def at_each_line(make: Callable[[], Any], work: Any, act: Any, event: str = "line",
        callers: bool = True) -> Iterator[tuple[Any, Any]]:
    """For each line that ``work(make())`` passes: run it anew, and ``act`` once at that line.

    With ``callers``, a line counts once for each line that it is called from.

    Yields the line and the object, after ``work`` has ended or was ended by what ``act`` raised.
    """
    points: dict[Any, None] = {}
    first = make()
    traced(lambda: work(first), lambda at: points.setdefault(at[: 2 + callers]), event)
    assert len(points) > 10
    for point in points:
        subject, done = make(), []
        def visit(at, point=point, subject=subject, done=done):
            if at[: 2 + callers] == point and not done:
                done.append(at)
                act(subject)
        with suppress(Interrupted):
            traced(lambda subject=subject: work(subject), visit, event)
        yield point, subject


class Interrupted(BaseException):
    """Stands for what a signal handler raises."""


def in_a_thread(work: Callable[[], Any], seconds: float = 10) -> bool:
    """Whether another thread gets this done in time; what it raises is raised here."""
    raised: list[BaseException] = []
    def run():
        try:
            work()
        except BaseException as error:
            raised.append(error)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    for error in raised:
        raise error
    return not thread.is_alive()


# -- other processes
def environment(**more: str) -> dict[str, str]:
    """The variables of a process that imports this module and the tests' own."""
    path = [str(Path(copilot_router.__file__).parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **more}


def python(program: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process that runs a program with this module; it reads and writes lines."""
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    words = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    return subprocess.Popen(words, env=environment(), text=True, **pipes)


def done(process: subprocess.Popen[str], timeout: float = 60) -> str:
    """What it printed; it must have ended well."""
    try:
        out, error = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, error
    return out


# -- gunicorn
class Switched(LLMProvider):
    """It repeats the prompt; where its folder has a file "failing", it fails and notes when."""
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def chat(self, messages: Any, tools: Any = None, model: Any = None, **_: Any) -> LLMResponse:
        if (self.folder / "failing").exists():
            with (self.folder / "failed").open("a") as file:
                file.write(f"{time.monotonic()}\n")
            raise ServerError("out of order")
        return LLMResponse(messages[-1]["content"])


def wsgi_app() -> Any:
    """What gunicorn loads before it forks. It is asked once, so that the store is connected."""
    kind, where, folder = os.environ["TEST_APP"].splitlines()
    store: Any = SQLiteStore(where) if kind == "sqlite" else RedisStore(where, "gunicorn")
    providers = {"primary": Switched(Path(folder)), "secondary": Switched(Path(folder, "other"))}
    tiers = [ProviderTier(name, provider, retries=0) for name, provider in providers.items()]
    recovery = float(os.environ["TEST_RECOVERY"])
    chain = FailoverChain(tiers, store=store, timeout=30.0, recovery_timeout=recovery)
    tiers[0].breaker.admit().failure()
    chain.chat("before the fork")
    def app(environ, start_response):
        response = chain.chat(environ["PATH_INFO"].strip("/"))
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps([response.text, response.provider, os.getpid()]).encode()]
    return app
