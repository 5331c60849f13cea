"""Breakers that share their state: in memory, in a SQLite file, in Redis, and in a store of the user's own.

The numbers are those of the scenario list that the breaker was designed against.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import random
import sqlite3
import stat
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clocks import FakeClock
from store_contract import Handles, StoreContract
from stores import KINDS, RedisServer, Watcher, Wrapped, done, have_redis, python, spare_port

import copilot_router
from copilot_router import (
    AuthenticationError,
    BadRequest,
    BreakerRecord,
    CircuitBreaker,
    CircuitOpen,
    ConfigError,
    Event,
    FailoverChain,
    MemoryStore,
    ProviderTier,
    ProviderUnavailable,
    RateLimited,
    RedisStore,
    ScriptedProvider,
    ServerError,
    SQLiteStore,
    Ticket,
    _after_fork,
)

#: Seconds that a store in trouble may add to a call.
ADDED = 0.25
DOWN = ConnectionError("the store's host is on fire")


class TestMemory(StoreContract):
    """In this process."""

    @pytest.fixture
    def handles(self, make_store: Callable[..., Any]) -> Handles:
        return lambda: make_store("memory")


class TestSQLite(StoreContract):
    """In a file."""

    @pytest.fixture
    def handles(self, make_store: Callable[..., Any]) -> Handles:
        return lambda: make_store("sqlite", timeout=5.0)


class TestRedis(StoreContract):
    """In a server, counting together."""

    @pytest.fixture
    def handles(self, make_store: Callable[..., Any]) -> Handles:
        return lambda: make_store("redis", timeout=5.0, shared_counts=True)


class Folder:
    """A store as a user may write one: a file for each name, two methods, nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, name: str) -> Path:
        return self.folder / str(abs(hash(name)))

    def load(self, name: str) -> tuple[BreakerRecord | None, float]:
        try:
            return BreakerRecord(**json.loads(self._path(name).read_text())), time.time()
        except FileNotFoundError:
            return None, time.time()

    def swap(self, name: str, expected_generation: int | None, record: BreakerRecord) -> bool:
        with _folder_lock:
            present = self.load(name)[0]
            if (None if present is None else present.generation) != expected_generation:
                return False
            new = self._path(name).with_suffix(f".{threading.get_ident()}")
            new.write_text(json.dumps(record._asdict()))
            new.replace(self._path(name))
            return True


_folder_lock = threading.Lock()


class TestUsersOwn(StoreContract):
    """By a user, without the optional attributes."""

    @pytest.fixture
    def handles(self, tmp_path: Path) -> Handles:
        return lambda: Folder(tmp_path)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def shared(clock: FakeClock) -> Wrapped:
    """A store in the clock's time that can be broken."""
    store = Wrapped(MemoryStore(clock))
    store.refresh = 1.0
    return store


def breaker_on(store: Any, clock: Callable[[], float], **settings: Any) -> CircuitBreaker:
    return CircuitBreaker(**{"name": "x", "clock": clock, "store": store, **settings})


def trip(breaker: CircuitBreaker, times: int = 3) -> None:
    for _ in range(times):
        breaker.admit().failure("down")


def chain_on(store: Any, events: list[Any], *tiers: ProviderTier, **settings: Any) -> FailoverChain:
    def note(event: Event) -> None:
        if event.kind == "breaker":
            events.append(event.data.get("store", event.data.get("new")))

    made = tiers or (ProviderTier("x", ScriptedProvider(["fine"], repeat=True)),)
    return FailoverChain(made, store=store, on_event=note, **settings)


def added_by(call: Callable[[], Any]) -> float:
    start = time.monotonic()
    call()
    return time.monotonic() - start


# -- settings


def test_a_store_needs_its_methods_and_a_name() -> None:
    """Said when it is built, with what to do."""
    with pytest.raises(ConfigError, match="needs a name"):
        CircuitBreaker(store=MemoryStore())
    with pytest.raises(ConfigError, match=r"store is a dict, without load\(\)"):
        CircuitBreaker(name="x", store={})
    for path in ("", None, 3):
        with pytest.raises(ConfigError, match="path of a file"):
            SQLiteStore(path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="timeout"):
        SQLiteStore("x", timeout=-1)
    with pytest.raises(ConfigError, match="refresh"):
        SQLiteStore("x", refresh=math.nan)


def test_redis_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL of another kind, with its password, is not repeated; without PyPI's redis the message says what to install."""
    have_redis()
    with pytest.raises(ConfigError, match="RedisStore of a str") as refused:
        RedisStore("http://:sk-test-redis-key@localhost")
    assert "sk-test" not in str(refused.value)
    with pytest.raises(ConfigError, match="RedisStore of a int"):
        RedisStore(3)
    with pytest.raises(ConfigError, match="timeout"):
        RedisStore("redis://localhost", timeout=math.inf)
    monkeypatch.setitem(__import__("sys").modules, "redis", None)
    with pytest.raises(ConfigError, match="pip install"):
        RedisStore("redis://localhost")


def test_a_client_of_the_users_own_is_not_changed(redis_url: str) -> None:
    """Its address and database are used; its patience is not: 5 s would be too long to wait for a store."""
    import redis

    client = redis.Redis.from_url(redis_url, socket_timeout=5)
    store = RedisStore(client, "own")
    assert store.swap("x", None, BreakerRecord(generation=1))
    assert client.hget("own:x", "generation") == b"1"
    assert client.connection_pool.connection_kwargs["socket_timeout"] == 5
    assert 0 < client.pttl("own:x") <= 86_400_000
    store.swap("x", 1, BreakerRecord("open", 2, 2, deadline=math.inf, span=math.inf))
    assert client.pttl("own:x") > 364 * 86_400_000
    store.close()
    assert store.load("x")[0] is not None
    store.close()
    client.close()


def test_118_two_namespaces(make_store: Callable[..., Any]) -> None:
    """118: one name, two states; and no namespace can reach into another by a colon."""
    for space, name in (("a", "b:c"), ("a:b", "c"), ("a", "b"), ("", "a:b")):
        store = make_store("redis", namespace=space)
        assert store.load(name)[0] is None
        assert store.swap(name, None, BreakerRecord(reason=space))
        assert store.load(name)[0] == BreakerRecord(reason=space)


# -- a store that is down


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_105_down_at_construction(kind: str, tmp_path: Path) -> None:
    """105: building works, every call works, the breaker works; one event."""
    events: list[Any] = []
    if kind == "redis":
        have_redis()
        store: Any = RedisStore(f"redis://127.0.0.1:{spare_port()}/0")
    else:
        store = SQLiteStore(tmp_path / "no" / "such" / "folder" / "file")
    tier = ProviderTier("x", ScriptedProvider([ServerError] * 3 + ["fine"]), retries=0)
    chain = chain_on(store, events, tier, ProviderTier("y", ScriptedProvider(["other"], repeat=True)), recovery_timeout=0.0)
    took = [added_by(lambda: chain.chat("hi")) for _ in range(3)]
    assert max(took) < ADDED
    assert chain.tiers[0].breaker.is_open
    assert chain.chat("hi").text == "fine"
    assert chain.tiers[0].breaker.is_closed
    assert [event for event in events if "store" in event] == [event for event in events if "going on alone" in event]
    assert len([event for event in events if "store" in event]) == 2  # one for each tier
    store.close()


@pytest.mark.parametrize("state", ["closed", "open", "half_open"])
def test_106_down_later(state: str, clock: FakeClock, shared: Wrapped) -> None:
    """106, 108: the verdict follows the last known state; what happens alone is there for all when the store is back."""
    changes: list[Any] = []
    breaker, other = breaker_on(shared, clock, on_change=lambda *c: changes.append(c[1:3])), breaker_on(shared, clock)
    assert breaker.is_closed
    trial: Ticket | None = None
    if state != "closed":
        trip(breaker)
        if state == "half_open":
            clock.advance(15)
            trial = breaker.admit()
    shared.error = DOWN
    clock.advance(2)
    assert breaker.state == state
    if trial is not None:
        with pytest.raises(CircuitOpen):
            breaker.admit()
        trial.failure("still down")
    elif state == "closed":
        trip(breaker, 2)
        assert breaker.is_closed
        trip(breaker, 1)
    assert breaker.is_open
    left = breaker.retry_after
    clock.advance(2)
    with pytest.raises(CircuitOpen):
        breaker.admit()
    shared.error = None
    clock.advance(3)
    assert breaker.is_open
    assert other.is_open
    assert left is not None
    assert breaker.retry_after == other.retry_after == pytest.approx(left - 5)
    assert changes.count(("closed", "open")) == 1
    assert breaker.snapshot().opened == other.snapshot().opened


def test_106_a_trial_alone(clock: FakeClock, shared: Wrapped) -> None:
    """106: after the last known deadline each process has its own trial; the first one's success closes for all."""
    breaker, other = breaker_on(shared, clock), breaker_on(shared, clock)
    trip(breaker)
    assert other.is_open
    shared.error = DOWN
    clock.advance(15)
    mine, theirs = breaker.admit(), other.admit()
    assert mine.is_trial
    assert theirs.is_trial
    mine.success()
    assert breaker.is_closed
    assert other.is_half_open
    shared.error = None
    clock.advance(60)
    assert breaker.is_closed
    assert other.is_closed


def test_108_the_newer_record_is_taken_over(clock: FakeClock, shared: Wrapped) -> None:
    """108: closed by the others while this one was cut off: closed here, too; one event at each edge."""
    events: list[Any] = []
    other = breaker_on(shared.store, clock)
    chain = chain_on(shared, events, clock=clock)
    trip(chain.tiers[0].breaker)
    assert other.is_open
    shared.error = DOWN
    clock.advance(2)
    for _ in range(5):
        assert chain.tiers[0].breaker.is_open
        clock.advance(2.6)
    other.admit().success()
    shared.error = None
    clock.advance(60)
    assert chain.tiers[0].breaker.is_closed
    assert events == ["open", "the store is down (ConnectionError): going on alone", "closed", "the store is back"]


def test_109_flapping(clock: FakeClock, shared: Wrapped) -> None:
    """109: the pauses grow to a minute, drawn at random, and start over after a success; no event is repeated."""
    events: list[Any] = []
    chain = chain_on(shared, events, clock=clock)
    shared.error = DOWN

    def tries(seconds: float) -> list[float]:
        at = []
        for _ in range(int(seconds * 20)):
            before = shared.loads
            assert chain.tiers[0].breaker.is_closed
            if shared.loads > before:
                at.append(clock.now)
            clock.advance(0.05)
        return at

    at = tries(400)
    pauses = [later - one for one, later in itertools.pairwise(at)]
    for pause, most in zip(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60, 60, 60], strict=False):
        assert most / 2 - 0.1 <= pause <= most + 0.1
    assert len(pauses) >= 7
    assert len({round(pause, 3) for pause in pauses}) > 5
    assert events == ["the store is down (ConnectionError): going on alone"]
    shared.error = None
    tries(61)
    assert events[1:] == ["the store is back"]
    shared.error = DOWN
    first, second = tries(2.2)[:2]
    assert second - first <= 1.1
    assert events[2:] == events[:1]


def test_109_one_breaker_finds_out_for_all(clock: FakeClock, shared: Wrapped) -> None:
    """Five tiers on one hung store: one operation is waited for in a call, not five."""
    events: list[Any] = []
    tiers = [ProviderTier(f"t{at}", ScriptedProvider([ServerError], repeat=True), retries=0) for at in range(4)]
    last = ProviderTier("last", ScriptedProvider(["fine"], repeat=True))
    chain = chain_on(shared, events, *tiers, last, clock=clock, sleep=clock.sleep)
    shared.error = TimeoutError()
    chain.chat("hi")
    chain.health()
    assert shared.loads + shared.swaps == 1
    assert events == ["the store is down (TimeoutError): going on alone"] * 5
    shared.error = None
    clock.advance(60)
    chain.health()
    assert shared.loads == 6
    assert events[5:] == ["the store is back"] * 5


def test_109_stores_and_clocks_that_cannot_be_keys(clock: FakeClock) -> None:
    """A user's store may define equality, or have slots: each breaker finds out for itself then."""

    class Slots:
        __slots__ = ("loads",)

        def load(self, name: str) -> tuple[BreakerRecord | None, float]:
            self.loads += 1
            raise DOWN

        def swap(self, name: str, expected_generation: int | None, record: BreakerRecord) -> bool:
            raise AssertionError

    store = Slots()
    store.loads = 0
    for _ in range(2):
        breaker = breaker_on(store, clock)
        trip(breaker)
        assert breaker.is_open
    assert store.loads == 2


# -- one machine's own trouble


@pytest.mark.parametrize("error", [ProviderUnavailable("refused"), AuthenticationError("wrong key")])
def test_116_local_trouble_stays_local(error: Exception, clock: FakeClock, make_store: Callable[..., Any]) -> None:
    """116: on Redis, one process that cannot connect, or has a wrong key, opens its own breaker only."""
    store = Wrapped(make_store("redis", timeout=5.0), clock)
    healthy, broken = breaker_on(store, clock), breaker_on(store, clock)
    for _ in range(3):
        if broken.is_closed:
            broken.admit()._settle_by(error)
    assert broken.is_open
    clock.advance(2)
    assert broken.is_open
    assert healthy.is_closed
    assert store.swaps == 0
    clock.advance(600)
    broken.admit().success()
    assert broken.is_closed
    assert store.load("x")[0] is None


def test_116_a_shared_trial_is_handed_back(clock: FakeClock, make_store: Callable[..., Any]) -> None:
    """116: the trial of a machine that cannot connect says nothing about the provider: the next one's is due at once."""
    store = Wrapped(make_store("redis", timeout=5.0), clock)
    healthy, broken = breaker_on(store, clock), breaker_on(store, clock)
    trip(healthy)
    clock.advance(1)
    assert broken.is_open
    clock.advance(14)
    trial = broken.admit()
    clock.advance(1)
    with pytest.raises(CircuitOpen):
        healthy.admit()
    trial._settle_by(ProviderUnavailable("refused"))
    assert broken.retry_after == 15
    clock.advance(1)
    assert healthy.retry_after == 0
    healthy.admit().success()
    assert healthy.is_closed


def test_116_the_trial_of_another_is_not_handed_back(clock: FakeClock, make_store: Callable[..., Any]) -> None:
    """116: a late 401 of an older call parks this breaker, and leaves the trial that another process holds alone."""
    store = Wrapped(make_store("redis", timeout=5.0), clock)
    healthy, broken = breaker_on(store, clock), breaker_on(store, clock)
    late = broken.admit()
    trip(healthy)
    clock.advance(15)
    trial = healthy.admit()
    assert broken.is_half_open
    late._settle_by(AuthenticationError("wrong key"))
    clock.advance(1)
    assert healthy.is_half_open
    with pytest.raises(CircuitOpen):
        breaker_on(store, clock).admit()
    trial.success()
    assert healthy.is_closed


def test_116_counts_stay_local(clock: FakeClock, make_store: Callable[..., Any]) -> None:
    """Redis without shared counts: a count is neither written, nor published after an outage, nor taken over."""
    store = Wrapped(make_store("redis", timeout=5.0), clock)
    one, other = breaker_on(store, clock), breaker_on(store, clock)
    trip(one)
    clock.advance(15)
    one.admit().success()
    trip(one, 2)
    store.error = DOWN
    clock.advance(2)
    trip(other, 2)
    other.admit().success()
    trip(other, 1)
    store.error = None
    clock.advance(60)
    assert (one.state, other.state) == ("closed", "closed")
    assert (one.snapshot().failures, other.snapshot().failures) == (2, 0)
    assert store.load("x")[0]._replace(generation=0, era=0, opened=0) == BreakerRecord(reason="recovered")


# -- records that are lost


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("state", ["closed", "open", "half_open"])
def test_103_the_record_is_lost(
    kind: str, state: str, clock: FakeClock, make_store: Callable[..., Any], tmp_path: Path, redis_url: str
) -> None:
    """103: a newcomer finds nothing and starts closed; who knows better says so; no generation is used twice."""
    namespace = f"lost-{state}"
    settings = {"namespace": namespace, "shared_counts": True} if kind == "redis" else {}
    store = Wrapped(make_store(kind, timeout=5.0, **settings), clock)
    breaker = breaker_on(store, clock)
    trip(breaker, 2 if state == "closed" else 3)
    trial = None
    if state == "half_open":
        clock.advance(15)
        trial = breaker.admit()
    before = store.load("x")[0].generation
    if kind == "redis":
        store.store._client.delete(f"{namespace}:x")
    else:
        for path in tmp_path.glob("breakers.sqlite*"):
            path.unlink()
    newcomer = breaker_on(store, clock)
    assert newcomer.is_closed
    clock.advance(1)
    assert breaker.state == state
    if state == "closed":
        trip(breaker, 1)
        assert breaker.is_open
    clock.advance(1)
    assert newcomer.state == ("open" if state == "closed" else state)
    assert store.load("x")[0].generation >= before
    if trial is not None:
        trial.success()
        clock.advance(1)
        assert newcomer.is_closed


def test_103_lost_and_made_anew_by_another(clock: FakeClock, shared: Wrapped) -> None:
    """103: the old trial's ticket does not match the new record, whose generation is higher than any before."""
    breaker = breaker_on(shared, clock)
    trip(breaker)
    clock.advance(15)
    trial = breaker.admit()
    before = breaker.snapshot().generation
    shared.store._records.clear()
    newcomer = breaker_on(shared, clock)
    trip(newcomer, 1)
    clock.advance(1)
    assert breaker.is_closed
    assert breaker.snapshot().generation > before
    trial.failure()
    assert (breaker.state, breaker.snapshot().failures, breaker.snapshot().stale) == ("closed", 1, 1)


# -- locks


def test_120_a_blocked_store_blocks_one_thread(shared: Wrapped) -> None:
    """120: while one thread waits for the store, the others get their verdicts from what is known."""
    breaker = breaker_on(shared, time.monotonic)
    shared.refresh = 0.0
    assert breaker.is_closed
    shared.entered.clear()
    shared.hold = threading.Event()
    breaker._shared._next_read = -math.inf  # type: ignore[union-attr]
    waiting = threading.Thread(target=lambda: breaker.admit().neutral())
    waiting.start()
    assert shared.entered.wait(10)
    assert added_by(lambda: [breaker.call(int) for _ in range(100)]) < ADDED
    took = added_by(lambda: breaker.admit().failure("down"))
    assert 0.1 < took < ADDED + 0.1
    assert breaker.snapshot().failures == 1
    shared.hold.set()
    waiting.join(10)
    assert breaker.is_closed
    assert breaker.snapshot().failures == 1
    assert shared.store.load("x")[0].failures == 1  # saved by whoever looked next


def test_120_nothing_of_a_user_runs_under_a_lock(clock: FakeClock, shared: Wrapped) -> None:
    """71, 120: while the store works, the breaker's lock is free; while an event is told, the store's view is, too."""
    breaker = breaker_on(shared, clock)
    seen: list[bool] = []

    def free(lock: Any) -> bool:
        def probe() -> None:
            taken = lock.acquire(blocking=False)
            seen.append(taken)
            if taken:
                lock.release()

        thread = threading.Thread(target=probe)
        thread.start()
        thread.join(10)
        return seen[-1]

    shared.before = lambda name: seen.append(free(breaker._lock))
    trip(breaker)
    watcher = Watcher(breaker, lambda what: seen.append(free(breaker._shared._lock)))  # type: ignore[union-attr]
    shared.before = None
    shared.error = DOWN
    clock.advance(2)
    assert breaker.is_open
    shared.error = None
    clock.advance(60)
    assert breaker.is_open
    assert len(seen) >= 12
    assert all(seen)
    assert watcher.told


def test_an_interrupt_in_a_store_comes_through(clock: FakeClock, shared: Wrapped) -> None:
    """KeyboardInterrupt while the store works: raised, no lock kept, and the breaker works on."""

    def interrupt(name: str) -> None:
        shared.before = None
        raise KeyboardInterrupt

    breaker = breaker_on(shared, clock)
    shared.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        breaker.admit()
    ticket = breaker.admit()
    shared.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        ticket.failure()
    trip(breaker)
    assert breaker.is_open


# -- overtaken


def test_a_change_that_others_keep_overtaking(clock: FakeClock, shared: Wrapped) -> None:
    """It is tried again twenty times at most, then kept here and saved at the next look."""
    breaker = breaker_on(shared, clock)
    real = shared.store.swap
    shared.store.swap = lambda *_: False
    breaker.open(50, "by me")
    assert breaker.is_open
    assert shared.swaps == copilot_router._STORE_TRIES
    shared.store.swap = real
    clock.advance(2)
    assert breaker_on(shared, clock).is_closed
    assert breaker.is_open
    assert breaker_on(shared, clock).retry_after == 48


def test_a_slow_store_is_not_asked_for_long(clock: FakeClock, shared: Wrapped) -> None:
    """However often others are quicker: after the budget the change is kept for later."""
    breaker = breaker_on(shared, clock)
    shared.store.swap = lambda *_: False
    shared.before = lambda name: threading.Event().wait(0.06)
    assert added_by(lambda: breaker.open(50)) < 0.2 + 0.06 * 3 + 0.1
    assert breaker.is_open
    assert shared.swaps <= 4


def test_a_refused_change_is_not_kept(clock: FakeClock, shared: Wrapped) -> None:
    """A trial that somebody else took first: refused, and nothing to save."""
    one, other = breaker_on(shared, clock), breaker_on(shared, clock)
    trip(one)
    assert other.is_open
    clock.advance(15)
    assert other.is_open  # looked a moment ago
    one.admit()
    with pytest.raises(CircuitOpen):
        other.admit()
    assert other.snapshot().rejected == 1
    assert not other._shared._unsaved  # type: ignore[union-attr]


@pytest.mark.parametrize("when", ["load", "swap"])
def test_a_finalizer_settles_in_the_middle_of_an_operation(when: str, clock: FakeClock, shared: Wrapped) -> None:
    """In the same thread, while the store works: neither change is lost."""
    breaker = breaker_on(shared, clock, failure_threshold=5)
    trip(breaker, 1)
    dropped = breaker.admit()

    def finalize(name: str) -> None:
        if name == when:
            shared.before = None
            dropped.failure("dropped")

    ticket = breaker.admit()
    shared.before = finalize
    if when == "load":
        clock.advance(2)
    ticket.failure("down")
    assert breaker.is_closed
    clock.advance(2)
    assert breaker.is_closed
    assert breaker.snapshot().failures == 3
    assert shared.store.load("x")[0].failures == 3


def test_opened_while_another_thread_is_saving(shared: Wrapped) -> None:
    """The store is slow; meanwhile another thread opens the breaker: neither of the two changes undoes the other."""
    breaker = breaker_on(shared, time.monotonic)
    breaker.admit().failure("first")

    def meanwhile(name: str) -> None:
        if name == "swap":
            shared.before = None
            other = threading.Thread(target=breaker.open, args=(50, "meanwhile"))
            other.start()
            other.join(10)

    shared.before = meanwhile
    breaker.admit().failure("second")
    assert breaker.is_open
    assert breaker_on(shared, time.monotonic).is_open
    assert shared.store.load("x")[0].reason == "meanwhile"


@pytest.mark.parametrize("at", [1, 2])
def test_a_change_that_a_finalizer_overtakes(at: int, clock: FakeClock, shared: Wrapped) -> None:
    """While the store is down, too, it starts again."""
    shared.error = DOWN
    breaker = breaker_on(shared, clock)
    seen: list[int] = []

    def step(old: BreakerRecord) -> BreakerRecord:
        seen.append(old.failures)
        if len(seen) == at:
            breaker.admit().failure("dropped")
        return old._replace(failures=old.failures + 1)

    breaker._swap(step)
    assert breaker.snapshot().failures == 2
    assert seen[-1] == 1


@pytest.mark.parametrize("at", range(1, 8))
def test_a_finalizer_settles_while_a_record_is_taken_over(at: int, clock: FakeClock, shared: Wrapped) -> None:
    """At any reading of the clock on the way: the other's open state is neither lost nor undone."""
    calls = itertools.count(-10**6)

    def ticking() -> float:
        if next(calls) == at:
            dropped.failure("dropped")
        return clock()

    breaker, other = breaker_on(shared, ticking), breaker_on(shared, clock)
    dropped = breaker.admit()
    trip(other)
    clock.advance(2)
    calls = itertools.count(1)
    assert breaker.retry_after in (13, None)
    clock.advance(2)
    assert breaker.is_open
    assert other.is_open


def test_a_breaker_that_is_alone_stays_open(clock: FakeClock, make_store: Callable[..., Any]) -> None:
    """Its own trouble is no one else's: their closing does not close it, their opening is taken over."""
    store = Wrapped(make_store("redis", timeout=5.0), clock)
    broken, other = breaker_on(store, clock), breaker_on(store, clock)
    broken.admit()._settle_by(AuthenticationError("wrong key"))
    other.reset()
    clock.advance(2)
    assert broken.retry_after == 598
    assert other.is_closed
    trip(other)
    clock.advance(2)
    assert broken.is_open
    assert other.is_open


def test_a_trial_is_handed_back_only_while_it_is_ones_own(clock: FakeClock, make_store: Callable[..., Any]) -> None:
    """116: its lease is over, and another has taken over: the late local trouble changes nothing for the others."""
    store = Wrapped(make_store("redis", timeout=5.0), clock)
    healthy, broken = breaker_on(store, clock), breaker_on(store, clock)
    trip(broken)
    clock.advance(15)
    trial = broken.admit()
    clock.advance(120)
    successor = healthy.admit()
    trial._settle_by(ProviderUnavailable("refused"))
    clock.advance(1)
    assert healthy.is_half_open
    successor.success()
    clock.advance(1)
    assert breaker_on(store, clock).is_closed


def test_two_breakers_find_out_at_once(clock: FakeClock, shared: Wrapped) -> None:
    """The pause grows by one step, not by one for each."""
    one, other = breaker_on(shared, clock, name="one"), breaker_on(shared, clock, name="other")

    def meanwhile(name: str) -> None:
        shared.before = None
        assert other.is_closed

    shared.before, shared.error = meanwhile, DOWN
    assert one.is_closed
    assert shared.loads == 2
    shared.error = None
    clock.advance(1)
    assert one.is_closed
    assert other.is_closed
    assert shared.loads == 4


def test_check_makes_the_trial_due_for_all(clock: FakeClock, shared: Wrapped) -> None:
    """A good ping in one process, as by cron: the next call in any is the trial; it closes nothing, nor what is by hand."""
    chain, other = chain_on(shared, [], clock=clock), breaker_on(shared, clock)
    trip(other)
    clock.advance(2)
    assert chain.check()[0].breaker.retry_after == 0
    clock.advance(2)
    assert (other.state, other.retry_after) == ("open", 0)
    other.open()
    clock.advance(2)
    assert chain.check()[0].breaker.retry_after is None


def test_saved_after_an_outage_over_what_others_did(clock: FakeClock, shared: Wrapped) -> None:
    """Cut off, one breaker only counts while another opens: the open state stays, and is taken over."""
    cut_off, other = Wrapped(shared.store), breaker_on(shared, clock)
    cut_off.refresh = 1.0
    breaker = breaker_on(cut_off, clock)
    trip(other, 1)
    assert breaker.snapshot().failures in (0, 1)
    cut_off.error = DOWN
    clock.advance(2)
    trip(breaker, 1)
    trip(other, 2)
    cut_off.error = None
    clock.advance(5)
    assert breaker.is_open
    assert other.is_open


def test_both_changed_it_and_the_other_was_earlier(clock: FakeClock, shared: Wrapped) -> None:
    """Opened alone at the same generation as another's count: the open state is published over it."""
    cut_off, other = Wrapped(shared.store), breaker_on(shared, clock)
    cut_off.refresh = 1.0
    breaker = breaker_on(cut_off, clock)
    trip(other, 1)
    clock.advance(2)
    assert breaker.is_closed
    cut_off.error = DOWN
    clock.advance(2)
    trip(breaker, 2)
    trip(other, 1)
    assert breaker.is_open
    cut_off.error = None
    clock.advance(5)
    assert breaker.is_open
    clock.advance(2)
    assert other.is_open
    assert other.retry_after == breaker.retry_after


@pytest.mark.parametrize("settings", [(True, True), (True, False), (False, True), (False, False)])
def test_108_after_any_outages_all_agree(settings: tuple[bool, bool]) -> None:
    """Three processes, any steps, each cut off and back at any time: in the end one state, generations only ever growing."""
    steps = ["admit"] * 3 + ["settle"] * 5 + ["cut off", "back", "back", "wait", "wait long", "open", "reset"]
    errors = [None, ServerError("x"), ServerError("x"), BadRequest("x"), RateLimited("x"), ProviderUnavailable("x")]
    for seed in range(150):
        draw, clock = random.Random(seed), FakeClock()
        base = MemoryStore(clock)
        stores = [Wrapped(base) for _ in range(3)]
        for store in stores:
            store.refresh, (store.shared_counts, store.shares_local_errors) = 1.0, settings
        breakers = [breaker_on(store, clock, failure_threshold=2, trial_timeout=40) for store in stores]
        tickets: list[Ticket] = []
        generation = -1
        for _ in range(60):
            at = draw.randrange(3)
            step = draw.choice(steps)
            if step == "admit":
                try:
                    tickets.append(breakers[at].admit())
                except CircuitOpen:
                    pass
            elif step == "settle" and tickets:
                tickets.pop(draw.randrange(len(tickets)))._settle_by(draw.choice(errors))
            elif step in ("cut off", "back"):
                stores[at].error = DOWN if step == "cut off" else None
            elif step.startswith("wait"):
                clock.advance(draw.choice([0.3, 1.1, 5.0] if step == "wait" else [15.0, 41.0, 70.0]))
            elif step == "open":
                breakers[at].open(draw.choice([None, 5.0, 20.0]))
            elif step == "reset" and draw.random() < 0.3:
                breakers[at].reset()
            record = base.load("x")[0]
            if record is not None:
                assert record.generation >= generation, seed
                generation = record.generation
        for pause in (61.0, 1.1, 1.1, 1.1, 1.1):
            clock.advance(pause)
            for store, breaker in zip(stores, breakers, strict=True):
                store.error = None
                assert breaker.state
        together = {breaker.state for breaker in breakers if not breaker._shared._alone}  # type: ignore[union-attr]
        assert len(together) <= 1, seed
        record = base.load("x")[0]
        if record is not None and together:
            assert together == {record.state}, seed


# -- fork


def test_a_child_looks_at_the_store_again(clock: FakeClock, shared: Wrapped) -> None:
    """The child's side of a fork, in this process: new locks, a fresh look, and the trial stays its parent's."""
    breaker = breaker_on(shared, clock)
    trip(breaker)
    clock.advance(15)
    breaker.admit()
    old, loads = breaker._shared._lock, shared.loads  # type: ignore[union-attr]
    _after_fork()
    assert breaker._shared._lock is not old  # type: ignore[union-attr]
    assert breaker.is_half_open
    assert shared.loads == loads + 1
    with pytest.raises(CircuitOpen):
        breaker.admit()
    clock.advance(120)
    assert breaker.admit().is_trial


FORK = """
import os, sys
from copilot_router import CircuitBreaker, RedisStore, SQLiteStore
kind, where = sys.argv[1:]
store = SQLiteStore(where, timeout=5) if kind == "sqlite" else RedisStore(where, "fork", shared_counts=True, timeout=5)
store.refresh = 0
breaker = CircuitBreaker(4, name="x", store=store)
breaker.admit().failure()  # the connection is open
children = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        breaker.admit().failure("in a child")
        os._exit(0 if breaker.snapshot().failures >= 2 else 1)
    children.append(child)
assert all(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 for child in children)
assert breaker.is_open, breaker.snapshot()
breaker.reset()
assert store.load("x")[0].state == "closed"
child = os.fork()  # and one that ends as programs do, with what it inherited
if child:
    assert os.waitpid(child, 0)[1] == 0
    breaker.admit().failure()
    assert store.load("x")[0].failures == 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_113_fork_with_an_open_connection(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """113: children use connections of their own, count together with their parent, and the file stays whole."""
    path = tmp_path / "forked.sqlite"
    done(python(FORK, kind, path if kind == "sqlite" else request.getfixturevalue("redis_url")))
    if kind == "sqlite":
        connection = sqlite3.connect(path)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()


STORM = """
import os, select, sys, threading
from copilot_router import CircuitBreaker, SQLiteStore
store = SQLiteStore(sys.argv[1], timeout=5, refresh=0)
breaker = CircuitBreaker(10**9, name="x", store=store)
stop = threading.Event()
def work():
    while not stop.is_set():
        breaker.admit().failure()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
hung = 0
for _ in range(40):
    answers, answer = os.pipe()
    child = os.fork()
    if child == 0:
        breaker.admit().failure()
        os.write(answer, b"d")
        os._exit(0)
    os.close(answer)
    hung += not select.select([answers], [], [], 10)[0]
    if hung:
        os.kill(child, 9)
    os.waitpid(child, 0)
    os.close(answers)
    if hung:
        break
stop.set()
for thread in threads:
    thread.join()
print("hung" if hung else "fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_89_forked_while_other_threads_are_inside_sqlite(tmp_path: Path) -> None:
    """89, 113: SQLite's own locks are free in every child: one in five would wait for ever without care."""
    assert done(python(STORM, tmp_path / "file"), timeout=120) == "fine\n"


def test_a_fork_waits_for_the_store_to_be_at_rest(tmp_path: Path) -> None:
    """The parent's side of a fork, in this process: held before, free after; a store made in between does not matter."""
    store = SQLiteStore(tmp_path / "file")
    taken: list[bool] = []

    def probe() -> None:
        taken.append(store._lock.acquire(blocking=False))
        if taken[-1]:
            store._lock.release()

    def elsewhere() -> None:
        thread = threading.Thread(target=probe)
        thread.start()
        thread.join(10)

    copilot_router._before_fork()
    elsewhere()
    between = SQLiteStore(tmp_path / "other")
    copilot_router._after_fork_in_parent()
    elsewhere()
    assert taken == [False, True]
    assert between.load("x")[0] is None
    between.close()


# -- SQLite


def test_a_dropped_store_closes_its_file(tmp_path: Path) -> None:
    """Nothing is left to complain about, which Python 3.13 would do; nor by one that was never built."""
    store = SQLiteStore(tmp_path / "file")
    store.load("x")
    connection = store._connection
    del store
    gc.collect()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")
    SQLiteStore.__new__(SQLiteStore)
    gc.collect()


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The wall clock of the module, moved by hand."""
    wall = FakeClock(1.7e9)
    clocks = types.SimpleNamespace(time=wall, monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr(copilot_router, "time", clocks)
    return wall


def test_111_the_wall_clock_is_set(wall: FakeClock, clock: FakeClock, make_store: Callable[..., Any]) -> None:
    """111: back by an hour: nobody waits longer than the open time; forward: only who did not know it tries early."""
    store = make_store("sqlite", timeout=5.0)
    breaker = breaker_on(store, clock)
    trip(breaker)
    wall.now -= 3600
    newcomer = breaker_on(store, clock)
    assert newcomer.retry_after == 15
    assert breaker.retry_after == 15
    clock.advance(15)
    wall.now += 15
    newcomer.admit().failure()
    clock.advance(1)
    wall.now += 1 + 3600
    assert newcomer.retry_after == 14
    assert breaker.retry_after == 0


def test_110_the_clocks_of_two_machines(make_store: Callable[..., Any], wall: FakeClock) -> None:
    """110: ninety seconds apart: with Redis the open time is the same for both, by the server's clock."""
    here, there = FakeClock(100.0), FakeClock(190.0)
    store = make_store("redis", timeout=5.0)
    one, other = breaker_on(store, here), breaker_on(store, there)
    trip(one)
    wall.advance(90)
    assert other.retry_after is not None
    assert 14 < other.retry_after <= 15
    there.advance(14)
    with pytest.raises(CircuitOpen):
        other.admit()
    there.advance(1)
    assert other.admit().is_trial
    here.advance(1)
    assert one.is_half_open


HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.readline()
connection.execute("COMMIT")
"""


def test_112_another_process_holds_the_writers_lock(tmp_path: Path) -> None:
    """112: the call goes on with the local state after the budget, once, and saves it when the lock is free."""
    events: list[Any] = []
    store = SQLiteStore(tmp_path / "file")
    clock = FakeClock()
    chain = chain_on(store, events, clock=clock)
    breaker = chain.tiers[0].breaker
    trip(breaker, 1)
    holder = python(HOLD, tmp_path / "file")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    took = [added_by(breaker.admit().failure) for _ in range(2)]
    assert 0.09 < took[0] < ADDED
    assert took[1] < 0.09
    assert breaker.is_open
    assert holder.stdin is not None
    holder.stdin.write("\n")
    holder.stdin.flush()
    done(holder)
    clock.advance(5)
    assert breaker.is_open
    assert store.load("x")[0].state == "open"  # type: ignore[union-attr]
    assert events == ["the store is down (OperationalError): going on alone", "open", "the store is back"]
    store.close()


def spoil_with_a_folder(path: Path) -> None:
    path.mkdir()


def spoil_with_garbage(path: Path) -> None:
    path.write_bytes(b"this is no database" * 100)


def spoil_with_another_version(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 2")
    connection.close()


def spoil_with_another_table(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE breakers (something TEXT)")
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()


def spoil_a_record(path: Path, text: str = "{}") -> None:
    store = SQLiteStore(path, timeout=5.0)
    store.swap("x", None, BreakerRecord())
    store._run("UPDATE breakers SET record = ?", text)
    store.close()


def spoil_the_permission(path: Path) -> None:
    spoil_a_record(path, json.dumps(BreakerRecord()._asdict()))
    path.chmod(stat.S_IRUSR)
    path.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_with_a_folder, spoil_with_garbage, spoil_with_another_version, spoil_with_another_table, spoil_a_record,
        spoil_the_permission,
    ],
)  # fmt: skip
def test_114_files_that_are_none(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    """114: a folder, garbage, another schema, a damaged record, read-only: one event, and it works alone."""
    folder = tmp_path / "folder"
    folder.mkdir()
    spoil(folder / "file")
    events: list[Any] = []
    store = SQLiteStore(folder / "file")
    tier = ProviderTier("x", ScriptedProvider([ServerError], repeat=True), retries=0)
    chain = chain_on(store, events, tier, ProviderTier("y", ScriptedProvider(["fine"], repeat=True), breaker=CircuitBreaker()))
    try:
        for _ in range(5):
            assert added_by(lambda: chain.chat("hi")) < ADDED
        assert chain.tiers[0].breaker.is_open
        told = [event for event in events if "store" in event and "alone" in event]
        if spoil is spoil_the_permission and os.geteuid() == 0:
            assert told == []  # nothing is read-only for root
        else:
            assert 1 <= len(told) <= 2
        assert "the store is back" not in events
    finally:
        folder.chmod(stat.S_IRWXU)
        store.close()


def test_114_a_file_that_cannot_be_written(clock: FakeClock, make_store: Callable[..., Any]) -> None:
    """114: a full disk, a read-only file: reading works and writing does not; one event, and no more of them later."""
    events: list[Any] = []
    store = Wrapped(make_store("sqlite", timeout=5.0), clock)
    chain = chain_on(store, events, clock=clock)
    breaker = chain.tiers[0].breaker
    store.error_of_swap = sqlite3.OperationalError("database or disk is full")
    trip(breaker, 3)
    for _ in range(50):
        clock.advance(7)
        assert breaker.state == "open"
    assert events == ["the store is down (OperationalError): going on alone", "open"]
    store.error_of_swap = None
    clock.advance(60)
    assert breaker.is_open
    assert events[2:] == ["the store is back"]
    assert store.load("x")[0].state == "open"


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "{}", "not json", '{"state": "closed"}',
        json.dumps({**BreakerRecord()._asdict(), "generation": "1"}),
        json.dumps({**BreakerRecord()._asdict(), "generation": True}).replace("true", "1.5"),
        json.dumps({**BreakerRecord()._asdict(), "deadline": math.nan}),
        json.dumps({**BreakerRecord()._asdict(), "state": "ajar"}),
    ],
)  # fmt: skip
def test_114_records_that_are_none(text: str) -> None:
    """A record is read whole and right, or not at all; an unknown field of a newer version is nothing bad."""
    with pytest.raises((ValueError, TypeError, KeyError)):
        copilot_router._record_of(text)
    newer = json.dumps({**BreakerRecord()._asdict(), "deadline": 3, "colour": "blue"})
    assert copilot_router._record_of(newer) == BreakerRecord(deadline=3)


def test_a_record_that_only_one_breaker_cannot_read(clock: FakeClock, make_store: Callable[..., Any]) -> None:
    """It goes on alone; the breaker next to it does not."""
    store = Wrapped(make_store("sqlite", timeout=5.0), clock)
    bad, good = breaker_on(store, clock, name="bad"), breaker_on(store, clock, name="good")
    store.store.swap("bad", None, BreakerRecord())
    store.store._run("UPDATE breakers SET record = '[]'")
    told: list[str] = []
    watchers = [Watcher(bad, told.append), Watcher(good, told.append)]
    trip(bad)
    trip(good)
    assert bad.is_open
    assert good.is_open
    assert store.load("good")[0].state == "open"
    assert [what.split("(")[1][:9] for what in told] == ["TypeError"], watchers


def test_a_busy_handle_is_not_waited_for(tmp_path: Path) -> None:
    """Another thread of this process is in the file: a timeout after the budget."""
    store = SQLiteStore(tmp_path / "file", timeout=0.05)
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with store._lock:
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    with pytest.raises(TimeoutError):
        store.load("x")
    leave.set()
    thread.join(10)
    assert store.load("x")[0] is None
    assert repr(store) == f"<SQLiteStore {tmp_path / 'file'}>"
    store.close()
    store.close()


MAKE = """
import os, sys
from copilot_router import BreakerRecord, SQLiteStore
for turn in range(5):
    start, go = os.pipe()
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            os.close(go)
            store = SQLiteStore(f"{sys.argv[1]} {turn}", timeout=5.0)
            os.read(start, 1)
            os._exit(100 + store.swap("x", None, BreakerRecord()))
        children.append(child)
    os.close(go)
    ended = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert ended == [100] * 5 + [101], ended
    os.close(start)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_the_file_is_made_by_all_at_once(tmp_path: Path) -> None:
    """Six processes at the same moment, several times: none is told that the file is locked, one was first."""
    done(python(MAKE, tmp_path / "file"))


@pytest.mark.parametrize("message", ["database is locked", "disk I/O error"])
def test_making_the_file_is_tried_again_for_a_while(message: str, tmp_path: Path) -> None:
    """Only while it is locked, and no longer than the budget."""
    store = SQLiteStore(tmp_path / "file", timeout=0.05)
    asked: list[str] = []

    class Connection:
        def execute(self, statement: str) -> None:
            asked.append(statement)
            raise sqlite3.OperationalError(message)

    start = time.monotonic()
    with pytest.raises(sqlite3.OperationalError):
        store._make(Connection())
    assert time.monotonic() - start < 5
    assert (len(asked) > 1) is ("locked" in message)


# -- Redis


def tiers_on(store: Any, events: list[Any]) -> FailoverChain:
    tiers = [ProviderTier(f"t{at}", ScriptedProvider([ServerError], repeat=True), retries=0) for at in range(3)]
    last = ProviderTier("last", ScriptedProvider(["fine"], repeat=True))
    return chain_on(store, events, *tiers, last, failure_threshold=1000)


def test_107_a_hung_server(redis_server: RedisServer) -> None:
    """107: SIGSTOP: the budget once for a whole call over four tiers, then nothing until the next try."""
    events: list[Any] = []
    store = RedisStore(redis_server.url, refresh=0.0)
    chain = tiers_on(store, events)
    chain.chat("hi")
    assert not events
    redis_server.pause()
    took = [added_by(lambda: chain.chat("hi")) for _ in range(6)]
    assert 0.09 < took[0] < ADDED
    assert max(took[1:]) < 0.09
    assert events == ["the store is down (TimeoutError): going on alone"] * 4
    fresh = chain_on(RedisStore(redis_server.url), [])
    assert added_by(lambda: fresh.chat("hi")) < ADDED  # connecting works, and nobody answers
    redis_server.resume()
    store.close()


def test_119_a_server_that_restarts(redis_server: RedisServer, clock: FakeClock) -> None:
    """119, 108: the script cache and the records are gone: the open state is there again, and one trial for all."""
    store = RedisStore(redis_server.url, timeout=5.0)
    wrapped = Wrapped(store, clock)
    one, other = breaker_on(wrapped, clock), breaker_on(wrapped, clock)
    told: list[str] = []
    watcher = Watcher(one, told.append)
    trip(one)
    clock.advance(1)
    assert other.is_open
    redis_server.stop()
    clock.advance(1)
    assert one.is_open
    assert other.is_open
    redis_server.start()
    clock.advance(3)
    assert one.is_open
    assert told == ["the store is down (ConnectionError): going on alone", "the store is back"], watcher
    newcomer = breaker_on(wrapped, clock)
    assert newcomer.is_open
    clock.advance(10)
    assert newcomer.admit().is_trial
    clock.advance(1)
    for breaker in (one, other):
        with pytest.raises(CircuitOpen):
            breaker.admit()
    store.close()


def test_115_commands_of_a_healthy_breaker(redis_server: RedisServer) -> None:
    """115: by the server's own count: one read per refresh interval, no write, however many calls."""
    clock = FakeClock()
    store = RedisStore(redis_server.url)
    breaker = breaker_on(store, clock)
    for _ in range(1000):
        breaker.call(int)
        clock.advance(0.01)
    import redis

    client = redis.Redis.from_url(redis_server.url)
    counted = {name: entry["calls"] for name, entry in client.info("commandstats").items()}
    client.close()
    store.close()
    assert 9 <= counted["cmdstat_hget"] == counted["cmdstat_time"] <= 11
    assert not {"cmdstat_eval", "cmdstat_hset", "cmdstat_set"} & set(counted)
