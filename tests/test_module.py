"""The module as a whole: loaded anew, around a fork, and with parts of its surroundings missing."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import requests
from support.server import Canned, Server, message, reply
from support.stores import FakeClock, PlainStore, Wrapped, error_of, fail

import copilot_router

KEY = "sk-test-module-key-1234567890"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """``load()``: the module under another name; ``load.fork(side)`` calls its hooks of a fork."""
    hooks: list[dict[str, Any]] = []
    monkeypatch.setattr(os, "register_at_fork", lambda **more: hooks.append(more), raising=False)
    def fresh() -> Any:
        spec: Any = importlib.util.spec_from_file_location("loaded_anew", copilot_router.__file__)
        made = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, made)
        spec.loader.exec_module(made)
        return made
    def fork(side: str) -> None:
        for when in ("before", side):
            for hook in hooks:
                hook.get(when, int)()
    fresh.fork = fork  # type: ignore[attr-defined]
    return fresh


def test_what_was_made_before_a_fork_works_in_parent_and_child(load: Any, tmp_path: Any) -> None:
    module, clock = load(), FakeClock()
    sqlite, plain = module.SQLiteStore(tmp_path / "file"), PlainStore()
    alone, untouched = module.CircuitBreaker(clock=clock), module.CircuitBreaker()
    provider = module.ScriptedProvider([["x", "y"], "fine"])
    chain = module.FailoverChain([module.ProviderTier("a", provider, max_concurrency=1)])
    held = chain.stream("hi")  # has the only place
    shared = [module.CircuitBreaker(name=str(at), clock=clock, store=store)
              for at, store in enumerate([sqlite, module.MemoryStore(), plain])]
    trials = []
    for breaker in (alone, *shared):
        fail(breaker)
        clock.advance(15)
        trials.append(breaker.admit())
        assert trials[-1].is_trial
    load.fork("after_in_parent")
    assert all(breaker.is_half_open for breaker in (alone, *shared))
    load.fork("after_in_child")
    opened, mine = alone.snapshot().opened, alone.admit()
    trials[0].failure()  # it is the parent's, whose outage the child's own trial goes on with
    assert mine.is_trial and alone.is_half_open and alone.snapshot().opened == opened
    mine.success()
    assert alone.is_closed
    assert chain.chat("hi", timeout=1).text == "fine" and list(held) == ["x", "y"]
    assert untouched.is_closed
    for breaker in shared:
        error_of(module.CircuitOpen, breaker.admit)
        breaker.reset()
        assert breaker.is_closed
    shared[2].open()
    module.CircuitBreaker(name="2", clock=clock, store=plain).reset()  # of another process
    assert shared[2].is_open
    load.fork("after_in_child")
    assert shared[2].is_closed  # the child does not go by what its parent has read
    down = Wrapped(plain)
    unknown = module.CircuitBreaker(1, name="3", clock=clock, store=down)
    down.error = ConnectionError("down")
    unknown.admit().failure()
    down.error = None
    clock.advance(5)
    load.fork("after_in_child")
    assert unknown.is_open  # nor forgets what no store knows


def test_a_forked_child_opens_a_session_of_its_own(load: Any) -> None:
    """A user's session stays, without connections: it could read an answer that is its parent's."""
    module = load()
    with Server(reply(message(content="fine"))) as server, requests.Session() as session:
        session.headers["X-Mine"] = "yes"
        session.mount("own://", Canned())
        providers = [module.OpenAIProvider(KEY, server.url, session=one) for one in (None, session)]
        for side, connections in (("after_in_parent", 2), ("after_in_child", 4)):
            load.fork(side)
            for provider in providers * 2:
                assert provider.chat("q", model="m", timeout=5).text == "fine"
            assert server.connections == connections
        assert ["x-mine" in one.headers for one in server.requests] == [False, True] * 4
        for provider in providers:
            provider.close()


def test_a_system_without_fork(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "register_at_fork")
    assert load().ScriptedProvider(["fine"]).chat("hi").text == "fine"


def test_without_requests_or_with_an_old_one_only_http_providers_are_missing(load: Any,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that lacks what the limits build on is named."""
    module = load()
    monkeypatch.delattr("urllib3.connectionpool.ConnectionPool.QueueCls")
    error_of(module.ConfigError, module.OpenAIProvider, KEY, match="QueueCls: install requests")
    monkeypatch.setitem(sys.modules, "requests", None)
    error_of(ImportError, module.OpenAIProvider, KEY, match="pip install requests")
    assert module.ScriptedProvider(["fine"]).chat("hi").text == "fine"
