"""Breakers that share their state in a store, and what they do when the store is in trouble."""

from __future__ import annotations

import functools
import gc
import http.client
import importlib
import itertools
import json
import math
import os
import random
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import stores
from support.fakes import in_threads, running
from support.faults import descriptors
from support.server import Dripping
from support.stores import (KINDS, SHARED_KINDS, FakeClock, Interrupted, PlainStore, Stage,
    StoreContract, Wrapped, at_each_line, done, end, error_of, fail, in_a_thread, needs_fork,
    needs_redis, python, seconds_of, spare_port)

from copilot_router import (BadRequest, BreakerRecord, CircuitBreaker, CircuitOpen, ConfigError,
    FailoverChain, MemoryStore, ProviderTier, ProviderUnavailable, RateLimited, RedisStore,
    ScriptedProvider, ServerError, SQLiteStore, Ticket)

#: Seconds that a store in trouble may add to a call.
ADDED = 0.25
DOWN = ConnectionError("the store's host is on fire")
#: ``make processes`` plays longer.
ROUNDS = int(os.environ.get("COPILOT_ROUTER_ROUNDS", "20"))
REQUESTS = int(os.environ.get("COPILOT_ROUTER_REQUESTS", "200"))


# -- the contract
class TestStores(StoreContract):
    @pytest.fixture(params=["memory", "sqlite", pytest.param("redis", marks=needs_redis), "own"])
    def handles(self, request, make_store):
        own = PlainStore()
        return lambda: own if request.param == "own" else make_store(request.param)


# -- what the tests are made of
@pytest.fixture
def shared(clock):
    """A store in the clock's time that can be broken; a read serves for a second."""
    return Wrapped(MemoryStore(clock), refresh=1.0)


def breaker_on(store: Any, clock: Callable[[], float], **settings: Any) -> CircuitBreaker:
    return CircuitBreaker(**{"name": "x", "clock": clock, "store": store, **settings})


def scripted(name: str, answer: Any = "fine", **settings: Any) -> ProviderTier:
    return ProviderTier(name, ScriptedProvider([answer], repeat=True), retries=0, **settings)


def chain_on(store: Any, events: list[Any], *tiers: Any, **settings: Any) -> FailoverChain:
    """A chain that notes what is told of breakers: the new state, or "down" or "back"."""
    def note(event):
        if event.kind == "breaker":
            told = event.data.get("store", "")
            states = [word for word in ("down", "back") if word in told]
            events.append(*(states or [event.data.get("new")]))
    made = tiers or [scripted("x")]
    return FailoverChain(made, store=store, on_event=note, **settings)


# -- settings
def test_a_store_needs_its_methods_and_its_breaker_a_name(tmp_path):
    for match, make in [("name", lambda: CircuitBreaker(store=MemoryStore())),
        (r"dict.*load", lambda: CircuitBreaker(name="x", store={})),
        ("path", lambda: SQLiteStore("")), ("path", lambda: SQLiteStore(None)),
        ("path", lambda: SQLiteStore(3)), ("timeout", lambda: SQLiteStore("x", timeout=-1)),
        ("timeout", lambda: SQLiteStore("x", timeout=math.inf)),
        (r"^SQLiteStore\(refresh", lambda: SQLiteStore("x", refresh=math.nan))]:
        error_of(ConfigError, make, match=match)
    assert str(tmp_path) in repr(SQLiteStore(tmp_path / "file"))


def test_settings_of_redis(monkeypatch):
    """A URL that is refused is not repeated, since it may hold a password."""
    pytest.importorskip("redis")
    refused = error_of(ConfigError, RedisStore, "http://:sk-test-redis-key@localhost")
    assert "sk-test" not in str(refused)
    for client in (3, importlib.import_module("redis.asyncio").Redis()):
        error_of(ConfigError, RedisStore, client)
    error_of(ConfigError, RedisStore, "redis://localhost", 5, match="namespace")
    error_of(ConfigError, RedisStore, "redis://localhost", timeout=math.inf, match="timeout")
    monkeypatch.setitem(sys.modules, "redis", None)
    error_of(ConfigError, RedisStore, "redis://localhost", match="pip install")


@needs_redis
def test_a_client_of_the_user_is_not_changed(redis_url):
    """Its address is used; its patience of 5 s is too long for a store. Keys expire one day."""
    import redis
    with redis.Redis.from_url(redis_url, socket_timeout=5) as client:
        store = RedisStore(client, "own")
        assert store.swap("x", None, BreakerRecord(generation=1))
        (key,) = client.keys("own*")
        assert client.connection_pool.connection_kwargs["socket_timeout"] == 5
        day = 86_400_000
        assert 0 < client.pttl(key) <= day
        store.swap("x", 1, BreakerRecord("open", 2, 2, deadline=1e9, span=3600.0))
        assert day < client.pttl(key) <= day + 3_600_000
        store.swap("x", 2, BreakerRecord("open", 3, 3, deadline=math.inf, span=math.inf))
        assert client.pttl(key) > 100 * day
        store.close()
        assert store.load("x")[0] is not None
        store.close()


def test_what_each_store_shares(tmp_path):
    """SQLite and memory: everything. Redis: no counts unless asked, and no local trouble."""
    pytest.importorskip("redis")
    redis, asked = (RedisStore("redis://localhost", shared_counts=yes) for yes in (False, True))
    stores = MemoryStore(), SQLiteStore(tmp_path / "x"), redis, asked
    shared = [(store.shared_counts, store.shares_local_errors) for store in stores]
    assert shared == [(True, True), (True, True), (False, False), (True, False)]


def test_a_failure_costs_one_write_and_no_read(clock, shared):
    breaker = breaker_on(shared, clock)
    fail(breaker, 1)
    before = shared.loads, shared.swaps
    fail(breaker, 1)
    assert (shared.loads, shared.swaps) == (before[0], before[1] + 1)


@needs_redis
def test_namespaces_are_kept_apart(make_store):
    for space, name in (("a", "b:c"), ("a:b", "c"), ("a", "b"), ("", "a:b")):
        store = make_store("redis", namespace=space)
        assert store.load(name)[0] is None and store.swap(name, None, BreakerRecord(reason=space))
        assert store.load(name)[0] == BreakerRecord(reason=space)


# -- a store that is down
#: What two breakers and their stores do, and whether all is shared or, as on Redis, each counts for
#: itself. What the words mean stands at ``Stage``.
STORIES: dict[str, tuple[bool, str]] = {
    "what happens while it is down is there for all when it is back": (True, """
        a:closed b:closed down 2 a:closed a:F a:F a:closed a:F a:open a:left=15 2 a:refused
        back 3 a:open b:open a:left=10 b:left=10 a:opened=1 b:opened=1"""),
    "the last known state holds": (True, """
        a:F a:F a:F down 2 a:open a:left=13 2 a:refused
        back 3 a:open b:open a:left=8 b:left=8 a:opened=1 b:opened=1"""),
    "a trial may end while it is down": (True, """
        a:F a:F a:F 15 a:trial down 2 a:half_open a:refused a:F a:open a:left=15 2 a:refused
        back 3 a:open b:open a:left=10 b:left=10 a:opened=2 b:opened=2"""),
    "an open state wins over one failure": (True, """
        b:F 2 a:closed a:down 2 a:F b:F b:F b:open a:back 2 a:open 2 a:open b:open
        a:left=11 b:left=11"""), "an open state wins over one failure of the others": (True, """
        b:F 2 a:closed a:down 2 a:F a:F a:open b:F a:back 2 a:open 2 a:open b:open
        a:left=11 b:left=11"""), "an open state wins over a newer closed one": (True, """
        b:F b:S 2 a:closed a:down 2 a:open! a:reset a:reset a:reset a:reset a:reset a:reset a:reset
        b:F b:F b:F b:open a:back 2 a:open 2 a:open b:open"""), "both sides may open it": (True, """
        b:F 2 a:closed a:down 2 a:F a:F a:open b:F b:F b:open a:back 2 a:open 2 a:open b:open
        a:left=11 b:left=11"""),
    "a provider that is unavailable here opens only the local one": (False, """
        a:U a:U a:U 2 a:open b:closed b:reset 2 a:open b:closed b:F b:F b:F 2 a:open b:open
        600 a:S 2 a:closed b:closed"""),
    "a key that is wrong here opens only the local one": (False, """
        a:K 2 a:open b:closed b:reset 2 a:open b:closed b:F b:F b:F 2 a:open b:open
        600 a:S 2 a:closed b:closed"""),
    "a shared trial that fails locally is handed back": (False, """
        b:F b:F b:F 15 a:trial 1 b:refused a:U a:left=15 1 b:left=0 b:opened=1 b:S b:closed"""),
    "a trial that another holds is not handed back": (False, """
        a:hold b:F b:F b:F 15 a:trial 120 b:trial a:k 1 b:half_open c:refused
        a:u 1 b:half_open d:refused b:S 1 e:closed"""),
    "a trial that cannot be given back is taken over after its lease": (False, """
        a:F a:F a:F 15 a:trial down a:U a:open back 120 b:trial 1 a:half_open b:S b:closed"""),
    "local trouble on top of a shared outage changes nothing": (False, """
        a:hold b:F b:F b:F 1 a:open a:k 14 b:trial a:refused"""),
    "trouble of this machine outlasts a shorter outage of all": (False, """
        a:K b:P=5 1 a:left=14 4 b:S b:P=60 1 a:left=59"""),
    "a store that is back ends no outage that was found alone": (True, """
        a:closed b:closed down a:F a:F a:F 16 a:S b:F b:F b:F back 3 a:closed b:open
        1 a:open b:left=11"""),
    "separate counts are neither published nor lost": (False, """
        b:closed a:F a:F a:F 15 a:S a:F a:F down 2 b:F b:F b:S b:F back 60
        a:closed b:closed a:failures=2 b:failures=0""")}


def staged(clock: FakeClock, base: Any, everything: bool = True) -> Stage:
    """Each breaker has a handle of its own on the store; a read serves for a second."""
    def new(who):
        settings = {"shared_counts": everything, "shares_local_errors": everything}
        stage.stores[who] = Wrapped(base, clock, refresh=1.0, **settings)
        return breaker_on(stage.stores[who], clock)
    stage = Stage(clock, new)
    return stage


@pytest.mark.parametrize("story", STORIES)
def test_breakers_on_one_store_step_by_step(clock, story):
    everything, words = STORIES[story]
    staged(clock, MemoryStore(clock), everything).play(words)


def test_separate_counts_and_local_trouble_are_not_written(clock):
    store = MemoryStore(clock)
    stage = staged(clock, store, False)
    stage.play("a:U a:U a:U b:closed b:K")
    assert store.load("x")[0] is None
    stage.play("c:F c:F c:F 15 c:S c:F c:F")
    record = store.load("x")[0]
    assert record.failures == 0
    store.swap("x", record.generation, record._replace(generation=record.generation + 1))
    stage.play("2 c:closed c:failures=2 c:F c:open")


def test_the_newer_record_is_taken_over_after_an_outage(clock, shared, caplog):
    caplog.set_level("INFO", "copilot_router")
    events: list[Any] = []
    other, chain = breaker_on(shared.store, clock), chain_on(shared, events, clock=clock)
    breaker = chain.tiers[0].breaker
    fail(breaker)
    shared.error = DOWN
    clock.advance(2)
    for _ in range(5):
        assert breaker.is_open
        clock.advance(2.6)
    other.admit().success()
    shared.error = None
    clock.advance(60)
    assert breaker.is_closed and events == ["open", "down", "closed", "back"]
    told = "x: the store is down (ConnectionError): going on alone", "x: the store is back"
    lines = [record for record in caplog.records if record.getMessage() in told]
    assert [record.levelname for record in lines] == ["WARNING", "INFO"]


def test_pauses_between_tries_grow_to_a_minute_and_are_drawn(clock, shared):
    events: list[Any] = []
    chain = chain_on(shared, events, clock=clock)
    shared.error = DOWN
    def tries(seconds):
        at = []
        for _ in range(int(seconds * 20)):
            before = shared.loads
            assert chain.tiers[0].breaker.is_closed
            if shared.loads > before:
                at.append(clock.now)
            clock.advance(0.05)
        return at
    pauses = [later - one for one, later in itertools.pairwise(tries(400))]
    for pause, most in zip(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60, 60, 60], strict=False):
        assert most / 2 - 0.1 <= pause <= most + 0.1
    assert len({round(pause, 3) for pause in pauses}) > 5 and events == ["down"]
    shared.error = None
    tries(61)
    shared.error = DOWN
    first, second = tries(2.2)[:2]  # after a success they start over
    assert second - first <= 1.1 and events == ["down", "back", "down"]


# -- a store that returns nonsense
RECORD = BreakerRecord()
NONSENSE: list[Any] = [
    None, {}, {"state": "open"}, "record", 7, (), (None,), (RECORD, 1.0, 2.0), [RECORD], iter(()),
    (RECORD, None), (RECORD, "now"), (RECORD, math.nan), (RECORD, math.inf), (None, {}),
    ({}, 1.0), ("closed", 1.0), (RECORD._asdict(), 1.0), (tuple(RECORD), 1.0), (RECORD[:3], 1.0),
    *((RECORD._replace(**{field: value}), 1.0) for field, value in [
        ("state", "ajar"), ("state", None), ("state", []), ("generation", "1"),
        ("generation", None), ("era", 1.5), ("failures", "many"), ("deadline", "soon"),
        ("deadline", math.nan), ("deadline", None), ("span", {}), ("trips", None),
        ("takeovers", ""), ("opened", []), ("reason", None), ("reason", 3)])]


@pytest.mark.parametrize("answer", NONSENSE, ids=lambda answer: f"{answer!r:.60}")
def test_a_load_that_returns_nonsense_counts_as_down(answer, clock):
    store = Wrapped(MemoryStore(clock))
    store.load = lambda name: answer
    events: list[Any] = []
    tier = ProviderTier("x", ScriptedProvider([*[ServerError] * 3, "fine"]), retries=0)
    chain = chain_on(store, events, tier, scripted("y"), clock=clock)
    assert [chain.chat("hi").provider for _ in range(4)] == ["y"] * 4 and tier.breaker.is_open
    assert chain.health()[0].breaker.state == "open" and sorted(events) == ["down", "down", "open"]
    clock.advance(15)
    assert chain.chat("hi").provider == "x" and tier.breaker.is_closed
    del store.load
    clock.advance(60)
    assert tier.breaker.is_closed and sorted(events[-1:]) == ["back"]


@pytest.mark.parametrize("answer", [None, 0, {}, "yes", (True, 1), [False], math.nan])
def test_a_swap_that_returns_nonsense_fails_no_call(answer, clock):
    store = Wrapped(MemoryStore(clock))
    store.swap = lambda *_: answer
    events: list[Any] = []
    chain = chain_on(store, events, scripted("x", ServerError), scripted("y"), clock=clock)
    assert [chain.chat("hi").provider for _ in range(5)] == ["y"] * 5
    assert chain.tiers[0].breaker.is_open and ("down" in events) == (answer != 0)
    chain.reset()
    assert chain.tiers[0].breaker.is_closed


# -- records that are lost
@pytest.mark.parametrize("story", ["a:F a:F lost b:closed 1 a:closed a:F a:open 1 b:open",
    "a:F a:F a:F lost b:closed 1 a:open 1 b:open",
    "a:F a:F a:F 15 a:trial lost b:closed 1 a:half_open 1 b:half_open"])
def test_a_lost_record_is_told_again(clock, story):
    """A newcomer starts closed, until a breaker that knows better looks at the store."""
    store = PlainStore()
    stage = staged(clock, store, True)
    before, after = story.split("lost")
    stage.play(before)
    generation = store.records.pop("x").generation
    stage.play(after)
    assert store.records["x"].generation >= generation  # none is used twice


# -- at the same time
def blocked(store: Wrapped) -> tuple[threading.Event, threading.Event]:
    """The next operation sets the first of these events, and waits for the second."""
    entered, hold = threading.Event(), threading.Event()
    def block(name):
        store.before = None
        entered.set()
        assert hold.wait(10)
    store.before = block
    return entered, hold


def test_a_blocked_store_blocks_one_thread():
    store = Wrapped(MemoryStore())
    breaker = breaker_on(store, time.monotonic)
    entered, hold = blocked(store)
    (waiting,) = in_threads(1, lambda: breaker.admit().neutral())
    assert entered.wait(10) and seconds_of(lambda: [breaker.call(int) for _ in range(100)]) < ADDED
    assert seconds_of(lambda: breaker.admit().failure("down")) < ADDED + 0.1
    assert breaker.snapshot().failures == 1
    hold.set()
    waiting.join(10)
    assert breaker.is_closed
    assert store.store.load("x")[0].failures == breaker.snapshot().failures == 1


def test_while_a_store_hangs_another_caller_gets_the_trial(clock, shared, monkeypatch):
    breaker = breaker_on(shared, clock)
    fail(breaker)
    clock.advance(15)
    entered, hold = blocked(shared)
    (waiting,) = in_threads(1, lambda: breaker.state)
    assert entered.wait(10)
    error_of(CircuitOpen, breaker.admit)
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + 1)
    trial = breaker.admit()
    error_of(CircuitOpen, breaker.admit)
    hold.set()
    waiting.join(10)
    trial.success()
    assert breaker.is_closed and breaker_on(shared, clock).is_closed


@pytest.mark.parametrize("where", ["_change_alone", "_set"])
def test_a_thread_that_saw_the_store_busy_may_go_on_late(where):
    """It stops in its own change, and goes on at any point of the change it had seen."""
    def make():
        store, made = Wrapped(MemoryStore()), SimpleNamespace(threads=[])
        made.stopped, made.go = threading.Event(), threading.Event()
        breaker = made.breaker = breaker_on(store, FakeClock(), failure_threshold=10)
        made.tickets = [breaker.admit(), breaker.admit()]
        def stop(at):
            if at[0] == where:
                made.stopped.set()
                made.go.wait(10)
        def hold(name):
            store.before = None
            late = lambda: stores.traced(made.tickets[1].failure, stop, "call")  # noqa: E731
            made.threads = in_threads(1, late)
            assert made.stopped.wait(10)
            raise DOWN
        store.before = hold
        return made
    def go_on(made):
        made.go.set()
        for thread in made.threads:
            thread.join(10)
    def work(made):
        made.tickets[0].failure()
        go_on(made)
    for point, made in at_each_line(make, work, go_on, event="call"):
        assert made.breaker.snapshot().failures == 2, point


def test_user_code_runs_without_a_lock(clock, shared):
    """While the store works, and while a change is told, another thread may use the breaker."""
    free: list[bool] = []
    def probe(*_):
        store, shared.before = shared.before, None
        free.append(in_a_thread(lambda: (breaker.snapshot(), breaker.state, breaker.retry_after)))
        shared.before = store
    tier = scripted("x", breaker=breaker_on(shared, clock, on_change=probe))
    FailoverChain([tier], on_event=probe, clock=clock)
    breaker = tier.breaker
    shared.before = probe
    fail(breaker)
    shared.error = DOWN
    clock.advance(2)
    assert breaker.is_open
    shared.error = None
    clock.advance(60)
    assert breaker.is_open and len(free) >= 5 and all(free)


@pytest.mark.parametrize("pause", [0, 0.04], ids=["quick", "slow"])
def test_a_change_that_others_keep_overtaking_is_saved_later(clock, shared, pause):
    breaker = breaker_on(shared, clock)
    shared.before = lambda name: threading.Event().wait(pause)
    real, shared.store.swap = shared.store.swap, lambda *_: False
    assert seconds_of(lambda: breaker.open(50)) < 0.2 + 0.04 * 3 + 0.1 and breaker.is_open
    assert 2 <= shared.swaps <= (4 if pause else 100)
    shared.store.swap = real
    clock.advance(2)
    assert breaker.is_open and breaker_on(shared, clock).retry_after == 48
    clock.advance(48)
    def overtake(name):  # by the only trial, until the time of the other is up
        if name == "swap":
            shared.before = None
            assert breaker.admit().is_trial and not threading.Event().wait(0.3)
    shared.before = overtake
    error_of(CircuitOpen, breaker_on(shared, clock).admit)


@pytest.mark.parametrize("when", ["load", "swap"])
def test_a_verdict_by_a_finalizer_inside_an_operation_is_not_lost(clock, shared, when):
    breaker = breaker_on(shared, clock, failure_threshold=5)
    fail(breaker, 1)
    dropped, ticket = breaker.admit(), breaker.admit()
    def finalize(name):
        if name == when:
            shared.before = None
            dropped.failure("dropped")
    shared.before = finalize
    clock.advance(2 if when == "load" else 0)
    ticket.failure("down")
    for _ in range(2):
        clock.advance(2)
        assert breaker.is_closed
    assert shared.load("x")[0].failures == breaker.snapshot().failures == 3


def test_a_good_ping_makes_the_trial_due_for_all(clock, shared):
    chain, other = chain_on(shared, [], clock=clock), breaker_on(shared, clock)
    fail(other)
    clock.advance(2)
    assert chain.check()[0].breaker.retry_after == 0
    clock.advance(2)
    assert (other.state, other.retry_after) == ("open", 0)
    other.open()
    clock.advance(2)
    assert chain.check()[0].breaker.retry_after is None


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("local", [True, False])
def test_after_any_outages_all_agree(counts, local):
    """Three processes, any steps, each cut off and back at any time; generations only grow."""
    words = "admit admit settle settle settle settle off back back wait long open reset"
    errors = [None, ServerError("x"), ServerError("x"), BadRequest("x"), RateLimited("x")]
    errors += [ProviderUnavailable("x")] if local else []
    for seed in range(60):
        draw, clock = random.Random(seed), FakeClock()
        base, generation = MemoryStore(clock), -1
        settings = {"refresh": 1.0, "shared_counts": counts, "shares_local_errors": local}
        stores = [Wrapped(base, **settings) for _ in range(3)]
        breakers = [
            breaker_on(store, clock, failure_threshold=2, trial_timeout=40) for store in stores]
        tickets: list[Ticket] = []
        for _ in range(60):
            at, step = draw.randrange(3), draw.choice(words.split())
            if step == "admit":
                with suppress(CircuitOpen):
                    tickets.append(breakers[at].admit())
            elif step == "settle" and tickets:
                end(tickets.pop(draw.randrange(len(tickets))), draw.choice(errors))
            elif step in ("off", "back"):
                stores[at].error = DOWN if step == "off" else None
            elif step in ("wait", "long"):
                clock.advance(draw.choice([0.3, 1.1, 5.0] if step == "wait" else [15.0, 41, 70]))
            elif step == "open":
                breakers[at].open(draw.choice([None, 5.0, 20.0]))
            elif step == "reset" and draw.random() < 0.3:
                breakers[at].reset()
            record = base.load("x")[0]
            if record is not None:
                assert record.generation >= generation, seed
                generation = record.generation
        for store in stores:
            store.error = None
        for pause in (61.0, 1.1, 1.1, 1.1, 1.1):
            clock.advance(pause)
            states = {breaker.state for breaker in breakers}
        record = base.load("x")[0]
        assert len(states) == 1, seed
        assert record is None or states == {record.state}, seed


# -- interrupted
# Between opening and closing a file Python itself closes it, and from 3.13 on warns that it did.
@pytest.mark.filterwarnings(r"ignore:Exception ignored in. <sqlite3\.Connection")
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_at_each_line_leaves_no_lock(kind, make_store):
    """Afterwards another thread can use breaker and store at once, and what it does is saved."""
    store = make_store(kind, refresh=0, timeout=1.0)
    numbers, changes = itertools.count(), []
    def make():
        note = lambda *change: changes.append(change)  # noqa: E731
        name = f"breaker {next(numbers)}"
        return CircuitBreaker(2, 0.0, name=name, store=store, on_change=note)
    def work(breaker):
        fail(breaker, 2)  # opens
        breaker.call(int)  # the trial
        end(breaker.admit(), ServerError("down"))
        breaker.call(int)
        breaker.open()
        with suppress(CircuitOpen):
            breaker.admit()
        breaker.reset()
    def interrupt(breaker):
        raise Interrupted
    def use(breaker):
        saved = lambda: store.load(breaker.name)[0] or BreakerRecord()  # noqa: E731
        assert breaker.state  # an interrupted verdict may take effect only now
        assert breaker.state == saved().state
        breaker.reset()
        changes.clear()
        fail(breaker, 2)
        assert breaker.state == saved().state == "open"
        assert changes == [(breaker.name, "closed", "open", "down")]
        breaker.reset()
        breaker.call(int)
        assert (saved().state, saved().failures) == (breaker.state, 0) == ("closed", 0)
    for point, breaker in at_each_line(make, work, interrupt):  # the first that is stuck ends it
        assert in_a_thread(lambda breaker=breaker: use(breaker)), point


def test_two_breakers_that_find_out_at_once_wait_one_pause(clock, shared):
    one, other = breaker_on(shared, clock), breaker_on(shared, clock, name="other")
    def meanwhile(name):
        shared.before = None
        assert other.is_closed
    shared.before, shared.error = meanwhile, DOWN
    assert one.is_closed
    shared.error = None
    clock.advance(1)
    assert one.is_closed and other.is_closed and shared.loads == 4


# -- SQLite
def test_a_python_without_sqlite_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sqlite3", None)
    with pytest.raises(OSError, match="built without sqlite3"):
        SQLiteStore(tmp_path / "file").load("x")


def test_sqlite_keeps_nothing_open_between_operations(tmp_path):
    """After success, refusal and failure, in any thread, and without close()."""
    store = SQLiteStore(tmp_path / "file", timeout=5.0)
    gc.collect()  # what other tests have left
    before = descriptors()
    assert in_a_thread(lambda: store.load("x")) and store.swap("x", None, BreakerRecord())
    assert not store.swap("x", None, BreakerRecord())
    breaker = breaker_on(store, time.monotonic)
    fail(breaker)
    assert descriptors() == before
    (tmp_path / "file").write_bytes(b"no database" * 100)
    error_of(sqlite3.DatabaseError, store.load, "x")
    assert descriptors() == before


def test_a_sqlite_file_may_be_deleted_and_replaced(tmp_path, clock):
    store, other = SQLiteStore(tmp_path / "a", timeout=5.0), SQLiteStore(tmp_path / "b")
    assert store.swap("x", None, BreakerRecord(reason="old"))
    assert other.swap("x", None, BreakerRecord(reason="new"))
    other.close()
    for path in tmp_path.glob("a*"):
        path.unlink()
    assert store.load("x")[0] is None and store.swap("x", None, BreakerRecord(reason="again"))
    for path in tmp_path.glob("a*"):
        path.unlink()
    (tmp_path / "b").replace(tmp_path / "a")
    assert store.load("x")[0].reason == "new"


@pytest.mark.parametrize("name", ["file:x", "file:x?mode=memory", "a?b=c#d", "naïve 中文", "%41"])
def test_the_path_of_a_sqlite_store_is_a_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with closing(SQLiteStore(name)) as store:
        assert store.swap("x", None, BreakerRecord())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert SQLiteStore(tmp_path / name).load("x")[0] == BreakerRecord()


def test_a_new_name_is_told_from_an_old_one_in_a_turkish_locale(make_store, monkeypatch):
    class Turkish(sqlite3.Connection):  # Python 3.12 knows no "I" as a capital "i"
        def execute(self, sql, *values):
            cursor = super().execute(sql, *values)
            return SimpleNamespace(rowcount=-1, fetchall=list) if "I" in sql.split()[0] else cursor
    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Turkish))
    store = make_store("sqlite")
    assert [store.swap("x", None, BreakerRecord()) for _ in range(2)] == [True, False]


def test_a_wall_clock_that_is_set_makes_nobody_wait_longer(clock, make_store, monkeypatch):
    """Back by an hour: no longer than the open time; forward: only who did not know it is early."""
    wall = FakeClock(time.time())
    monkeypatch.setattr(time, "time", wall)
    store = make_store("sqlite")
    breaker = breaker_on(store, clock)
    fail(breaker)
    wall.now -= 3600
    newcomer = breaker_on(store, clock)
    assert newcomer.retry_after == breaker.retry_after == 15
    clock.advance(15)
    wall.now += 15
    newcomer.admit().failure()
    clock.advance(1)
    wall.now += 1 + 3600
    assert newcomer.retry_after == 14 and breaker.retry_after == 0


@needs_redis
def test_with_redis_the_servers_clock_counts(make_store):
    here, there = FakeClock(100.0), FakeClock(190.0)
    store = make_store("redis", shared_counts=False)
    one, other = breaker_on(store, here), breaker_on(store, there)
    fail(one)
    assert 14 < (other.retry_after or 0) <= 15
    there.advance(14)
    error_of(CircuitOpen, other.admit)
    there.advance(1)
    here.advance(1)
    assert other.admit().is_trial and one.is_half_open


def test_another_connection_holds_the_writers_lock(tmp_path, clock):
    events: list[Any] = []
    store = SQLiteStore(tmp_path / "file")
    chain = chain_on(store, events, clock=clock)
    breaker = chain.tiers[0].breaker
    fail(breaker, 1)
    with closing(sqlite3.connect(tmp_path / "file", isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        took = [seconds_of(breaker.admit().failure, least) for least in (0.09, 0)]
        others = [breaker_on(SQLiteStore(tmp_path / "file"), clock, name=one) for one in "abcdef"]
        for thread in in_threads(6, lambda: took.append(seconds_of(others.pop().admit))):
            thread.join(10)
        holder.execute("COMMIT")
    assert took[0] < ADDED and took[1] < 0.09 and breaker.is_open
    assert len(took) == 8 and max(took) < ADDED + 0.1  # no thread waits for the patience of another
    clock.advance(5)
    assert breaker.is_open and store.load("x")[0].state == "open"
    assert events == ["down", "open", "back"]
    store.close()


def test_a_record_of_a_clock_that_was_ahead_is_due_after_its_own_time(tmp_path, clock):
    store = SQLiteStore(tmp_path / "file")
    store.swap("x", None, BreakerRecord("open", 1, 1, 3, time.time() + 3600, 5.0))
    for _ in range(2):
        assert 0 < (breaker_on(store, clock).retry_after or 0) <= 5
        record = store.load("x")[0]
        assert record.generation == 2 and record.deadline - time.time() <= 5


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_waits_for_a_thread_inside_sqlite(tmp_path, monkeypatch):
    """Else the child would inherit a lock of SQLite that nobody gives back."""
    store, connect = SQLiteStore(tmp_path / "file"), sqlite3.connect
    inside, leaves = threading.Event(), threading.Event()
    def slowly(*a, **k):
        inside.set()
        leaves.wait(0.3)
        leaves.set()
        return connect(*a, **k)
    monkeypatch.setattr(sqlite3, "connect", slowly)
    (thread,) = in_threads(1, lambda: store.load("x"))
    assert inside.wait(10)
    if (child := os.fork()) == 0:
        os._exit(0)
    assert leaves.is_set() and os.waitpid(child, 0)[1] == 0
    thread.join(10)


def sql(path: Path, *statements: str) -> Any:
    with closing(sqlite3.connect(path)) as connection:
        found = [connection.execute(statement).fetchone() for statement in statements]
        connection.commit()
    return found[-1]


def read_only(path: Path) -> None:
    with closing(SQLiteStore(path, timeout=5.0)) as store:
        store.swap("x", None, BreakerRecord())
    path.chmod(stat.S_IRUSR)
    path.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)


SPOIL: dict[str, Callable[[Path], Any]] = {
    "no such folder": lambda path: path.parent.rmdir(), "a folder": Path.mkdir,
    "garbage": lambda path: path.write_bytes(b"this is no database" * 100),
    "another table": lambda path: sql(path, "CREATE TABLE breakers (something TEXT)"),
    "read-only": read_only}


@pytest.mark.parametrize("how", SPOIL)
def test_a_sqlite_file_that_cannot_be_used_fails_no_call(how, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    SPOIL[how](folder / "file")
    events: list[Any] = []
    store, other = SQLiteStore(folder / "file"), scripted("y", breaker=CircuitBreaker())
    chain = chain_on(store, events, scripted("x", ServerError), other)
    try:
        assert max(seconds_of(lambda: chain.chat("hi")) for _ in range(5)) < ADDED
        assert chain.tiers[0].breaker.is_open
        root = how == "read-only" and os.geteuid() == 0  # nothing is read-only for root
        assert set(events) == ({"open"} if root else {"down", "open"}) and len(events) <= 3
    finally:
        if folder.exists():
            folder.chmod(stat.S_IRWXU)
        store.close()


def test_a_store_that_can_be_read_and_not_written(clock, make_store):
    events: list[Any] = []
    store = Wrapped(make_store("sqlite"), clock)
    chain = chain_on(store, events, clock=clock)
    breaker = chain.tiers[0].breaker
    store.error_of_swap = sqlite3.OperationalError("database or disk is full")
    fail(breaker)
    for _ in range(50):
        clock.advance(7)
        assert breaker.state == "open"
    assert events == ["down", "open"]
    store.error_of_swap = None
    clock.advance(60)
    assert breaker.is_open and events[2:] == ["back"]
    written = store.load("x")[0]
    clock.advance(2)
    assert breaker.is_open and store.load("x")[0] == written and written.state == "open"


PLAIN = BreakerRecord(deadline=3.0)._asdict()
GARBAGE = ["", "null", "[]", "{}", "not json", '{"state": "closed"}',
    json.dumps({**PLAIN, "generation": "1"}), json.dumps({**PLAIN, "generation": 1.5}),
    json.dumps({**PLAIN, "deadline": math.nan}), json.dumps({**PLAIN, "state": "ajar"})]


@pytest.mark.parametrize("text", GARBAGE, ids=lambda text: text[:40])
def test_a_damaged_record_is_read_whole_or_not_at_all(clock, make_store, tmp_path, text):
    """Its breaker goes on alone, and the breaker next to it does not."""
    store = make_store("sqlite")
    store.swap("bad", None, BreakerRecord())
    file = tmp_path / "breakers.sqlite"
    sql(file, f"UPDATE breakers SET record = '{text}'")
    error_of((ValueError, TypeError, LookupError, RecursionError), store.load, "bad")
    events: list[Any] = []
    chain = chain_on(Wrapped(store, clock), events, scripted("bad"), scripted("good"), clock=clock)
    for tier in chain.tiers:
        fail(tier.breaker)
        assert tier.breaker.is_open
    assert sorted(events) == ["down", "open", "open"] and store.load("good")[0].state == "open"
    newer = json.dumps({**PLAIN, "colour": "blue"})  # a field of a newer version does no harm
    sql(file, f"UPDATE breakers SET record = '{newer}' WHERE name = 'bad'")
    assert store.load("bad")[0] == BreakerRecord(deadline=3)
    sql(file, "UPDATE breakers SET record = json_remove(record, '$.parks', '$.heals')")
    assert store.load("bad")[0] == BreakerRecord(deadline=3)  # as version 0.1 wrote it


# -- Redis
@needs_redis
def test_a_hung_server_costs_the_budget_once(redis_server):
    """Each thread that calls then, for a whole call over four tiers; later calls nothing."""
    events: list[Any] = []
    store = RedisStore(redis_server.url, refresh=0.0)
    tiers = [scripted(f"t{at}", ServerError) for at in range(3)]
    chain = chain_on(store, events, *tiers, scripted("last"), failure_threshold=1000)
    chain.chat("hi")
    assert not events
    redis_server.pause()
    took: list[float] = []
    ask = lambda: took.append(seconds_of(lambda: chain.chat("hi")))  # noqa: E731
    seconds_of(lambda: [thread.join(10) for thread in in_threads(4, ask)], 0.09)
    assert len(took) == 4 and max(took) < ADDED and sorted(events) == ["down"] * 4
    assert max(seconds_of(lambda: chain.chat("hi")) for _ in range(5)) < 0.09
    fresh = chain_on(RedisStore(redis_server.url), [])
    assert seconds_of(lambda: fresh.chat("hi")) < ADDED  # it connects, and nobody answers
    redis_server.resume()
    store.close()


@needs_redis
def test_an_interrupt_leaves_no_answer_to_the_next_question(redis_url, monkeypatch):
    import redis
    store = RedisStore(redis_url, "interrupted")
    store.swap("a", None, RECORD)
    def interrupted(*_, **__):
        raise Interrupted
    for ask in (lambda: store.load("a"), lambda: store.swap("a", 0, RECORD)):
        with monkeypatch.context() as patch:
            patch.setattr(redis.connection.Connection, "read_response", interrupted)
            error_of(Interrupted, ask)
        assert store.load("b")[0] is None
    store.close()


DRIPS: dict[str, bytes | list[bytes]] = {
    "bytes of a bulk": b"$60\r\n" + b"x" * 60, "bytes of a length": b"$" + b"0" * 60,
    "whole replies": [b"+OK\r\n"] * 60, "errors": [b"-ERR no\r\n"] * 60,
    "bytes of an error": b"-ERR " + b"x" * 60,
    "no Redis at all": b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"}


@pytest.mark.parametrize("what", DRIPS)
@pytest.mark.parametrize("operation", [
    lambda store: store.load("x"), lambda store: store.swap("x", None, RECORD)])
def test_one_operation_of_redis_ends_within_its_timeout_in_all(what, operation):
    """Also where the server keeps every single read shorter than the timeout."""
    pytest.importorskip("redis")
    with Dripping(DRIPS[what]) as server, closing(
            RedisStore(f"redis://127.0.0.1:{server.port}/0", timeout=0.1)) as store:
        start = running()
        with suppress(Exception):
            operation(store)
        assert running() - start < ADDED
        chain = chain_on(store, [])
        assert seconds_of(lambda: chain.chat("hi", timeout=1)) < 2 * ADDED


@needs_redis
def test_a_server_that_restarts_is_told_the_open_state(redis_server, clock):
    """Records and scripts are gone; there is still one trial for all."""
    store = RedisStore(redis_server.url, timeout=5.0)
    stage = staged(clock, store)
    stage.play("a:F a:F a:F 1 b:open")
    redis_server.stop()
    stage.play("1 a:open b:open")
    redis_server.start()
    stage.play("3 a:open c:open 10 c:trial 1 a:refused b:refused")
    store.close()


# -- processes
STORE = """
import os, sys, threading
from copilot_router import BreakerRecord, CircuitBreaker, CircuitOpen, RedisStore, SQLiteStore
kind, where, *more = sys.argv[1:]
def new():
    if kind == "sqlite":
        return SQLiteStore(where, timeout=60, refresh=0)
    return RedisStore(where, "processes", timeout=60, refresh=0, shared_counts=True)
store = new()
def children(count, work):
    "What each of them returned, when all may begin at one moment."
    (go, start), (ready, here) = os.pipe(), os.pipe()
    pids = []
    for at in range(count):
        pid = os.fork()
        if pid == 0:
            os.close(start)
            os.write(here, b"x")
            os.read(go, 1)  # until the parent closes its end
            os._exit(work(at))
        pids.append(pid)
    for _ in pids:
        os.read(ready, 1)
    for end in (go, start, ready, here):
        os.close(end)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
"""


@pytest.fixture(params=SHARED_KINDS)
def where(request, tmp_path):
    if request.param == "sqlite":
        return "sqlite", str(tmp_path / "breakers.sqlite")
    return "redis", request.getfixturevalue("redis_server").url


#: Eight processes at one moment, with the parent's handle on the store or one of their own.
RACE = """
for turn in range(int(more[0])):
    breaker = CircuitBreaker(1, 0.0, name=f"round {turn}", store=store)
    breaker.admit().failure()  # open, and due at once
    def ask(at):
        mine = CircuitBreaker(1, 0.0, name=breaker.name, store=new()) if turn % 2 else breaker
        try:
            return 1 + (not mine.admit().is_trial)
        except CircuitOpen:
            return 0
    print(*sorted(children(8, ask)))
"""

MAKE = """
for turn in range(5):
    where = f"{sys.argv[2]} {turn}"
    assert sorted(children(6, lambda at: new().swap("x", None, BreakerRecord()))) == [0] * 5 + [1]
"""

STORM = """
import signal
breaker = CircuitBreaker(10**9, name="x", store=store)
stop = threading.Event()
def work():
    while not stop.is_set():
        breaker.admit().failure()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
def fail(at):
    signal.alarm(10)
    breaker.admit().failure()
    return 0
ended = [children(1, fail)[0] for _ in range(25)]
stop.set()
for thread in threads:
    thread.join()
assert ended == [0] * 25, ended
"""


@needs_fork
def test_one_process_of_eight_has_the_trial(where):
    rounds = done(python(STORE + RACE, *where, ROUNDS), timeout=60 + 2 * ROUNDS).splitlines()
    assert rounds == ["0 0 0 0 0 0 0 1"] * ROUNDS


@needs_fork
def test_a_sqlite_file_is_made_by_many_processes_at_once(tmp_path):
    done(python(STORE + MAKE, "sqlite", tmp_path / "file"))


@needs_fork
def test_a_fork_while_other_threads_are_inside_sqlite(tmp_path):
    done(python(STORE + STORM, "sqlite", tmp_path / "file"), timeout=120)
    assert sql(tmp_path / "file", "PRAGMA integrity_check") == ("ok",)


# -- gunicorn
WORKERS, THREADS, RECOVERY = 2, 8, 0.8


@contextmanager
def gunicorn(**variables: str) -> Iterator[Callable[[str], list[Any]]]:
    """A function that asks a running gunicorn: for text, provider and process."""
    config, port = pytest.importorskip("gunicorn.config"), spare_port()
    words = f"-m gunicorn --preload --workers {WORKERS} --threads {THREADS} --log-level error "
    words += f"--bind 127.0.0.1:{port} support.stores:wsgi_app() "
    words += "--no-control-socket" if hasattr(config, "ControlSocketDisable") else ""
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = stores.environment(TEST_RECOVERY=str(RECOVERY), **variables)
    server = subprocess.Popen([sys.executable, *words.split()], env=environment, **pipes)
    def ask(prompt):
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            connection.request("GET", f"/{prompt}")
            with connection.getresponse() as response:  # closed also if it breaks off
                return json.load(response)
    try:
        until, up = time.monotonic() + 60, None
        while not up:
            assert server.poll() is None and time.monotonic() < until
            with suppress(OSError):
                up = ask("up")
        yield ask
    finally:
        server.terminate()
        out = server.communicate(timeout=60)[0]
    assert "Traceback" not in out, out


@needs_fork
@pytest.mark.quiet
def test_the_workers_of_gunicorn_share_one_breaker(where, tmp_path):
    """The primary fails: it sees the threshold, then one attempt in each recovery time for both
    workers together. It works again: both go back to it. Each answer is the caller's own."""
    def load(ask, seconds):
        """Who answered, and in which processes."""
        until, count, found, wrong = time.monotonic() + seconds, itertools.count(), set(), []
        def work():
            while (at := next(count)) < REQUESTS // 3 or time.monotonic() < until:
                text, provider, process = ask(f"nonce-{at}")
                found.add((provider, process)) if text == f"nonce-{at}" else wrong.append(at)
        for caller in in_threads(WORKERS * THREADS, work):
            caller.join(300)
        assert not wrong
        return [{one[at] for one in found} for at in (0, 1)]
    with gunicorn(TEST_APP="\n".join([*where, str(tmp_path)])) as ask:
        assert load(ask, 0.2)[0] == {"primary"}
        (tmp_path / "failing").touch()
        start = time.monotonic()
        providers, processes = load(ask, 3 * RECOVERY)
        assert providers == {"secondary"} and len(processes) == WORKERS
        seconds = time.monotonic() - start
        (tmp_path / "failing").unlink()
        for _ in range(10):  # the worker that lost the trial reads the store once a second
            providers, processes = load(ask, 0.5)
            if providers == {"primary"}:
                break
        assert providers == {"primary"} and len(processes) == WORKERS
    dead = sorted(map(float, (tmp_path / "failed").read_text().split()))
    first = [at for at in dead if at < dead[0] + RECOVERY * 0.9]
    later = [first[0], *dead[len(first) :]]
    assert 3 <= len(first) <= 3 + 2 * WORKERS * THREADS
    assert 2 <= len(later) <= seconds / RECOVERY + 2
    assert all(two - one >= RECOVERY * 0.9 for one, two in itertools.pairwise(later))
