"""Details that no scenario needs and somebody will rely on: found by breaking the module one line at a time."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import responses
from clocks import FakeClock
from stores import Wrapped

import copilot_router
from copilot_router import (
    AllProvidersFailed,
    AnthropicProvider,
    CircuitBreaker,
    ConfigError,
    DeadlineExceeded,
    FailoverChain,
    MemoryStore,
    OpenAIProvider,
    ProviderTier,
    QuotaExceeded,
    RateLimited,
    ScriptedProvider,
    ServerError,
    SQLiteStore,
)

KEY = "sk-test-print-key-5647382910"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def mocked() -> Any:
    with responses.RequestsMock() as mock:
        yield mock


# -- errors


@pytest.mark.parametrize(
    ("headers", "expected", "seconds"),
    [({}, QuotaExceeded, None), ({"Retry-After": "30"}, RateLimited, 30), ({"retry-after-ms": "30000"}, RateLimited, 30)],
)
def test_a_402_that_says_when_is_a_rate_limit(
    mocked: Any, headers: dict[str, str], expected: type, seconds: float | None
) -> None:
    """Whichever of the two headers says it."""
    mocked.post("http://h/v1/chat/completions", status=402, json={"error": {"message": "x"}}, headers=headers)
    with pytest.raises(RateLimited) as caught:
        OpenAIProvider(KEY, "http://h").chat("hi", model="m")
    assert type(caught.value) is expected
    assert caught.value.retry_after == seconds


# -- Anthropic


@pytest.mark.parametrize(
    ("options", "output"),
    [
        ({}, None),
        ({"reasoning_effort": "none"}, None),
        ({"reasoning_effort": "minimal"}, {"effort": "low"}),
        ({"reasoning_effort": "high"}, {"effort": "high"}),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}},
         {"format": {"type": "json_schema", "schema": {"type": "object"}}}),
    ],
)  # fmt: skip
def test_anthropics_output_config(mocked: Any, options: dict[str, Any], output: Any) -> None:
    """Effort and schema share one field, which is absent when there is neither."""
    answer = {"type": "message", "role": "assistant", "content": [{"type": "text", "text": "{}"}], "stop_reason": "end_turn",
              "model": "m", "usage": {"input_tokens": 1, "output_tokens": 1}}  # fmt: skip
    mocked.post("http://h/v1/messages", json=answer)
    AnthropicProvider(KEY, "http://h").chat("hi", model="m", **options)
    assert json.loads(mocked.calls[0].request.body).get("output_config") == output


# -- breakers and stores


def test_a_failure_is_written_without_another_look(clock: FakeClock) -> None:
    """While what was read still serves, a failure costs the store one write and no read."""
    store = Wrapped(SharedMemory())
    breaker = CircuitBreaker(store=store, name="b", clock=clock)
    breaker.admit().failure()
    before = store.loads, store.swaps
    breaker.admit().failure()
    assert (store.loads, store.swaps) == (before[0], before[1] + 1)


class SharedMemory(MemoryStore):
    """Failures are counted together, and a read serves for a second."""

    shared_counts = True
    refresh = 1.0


def test_a_race_that_is_lost_again_and_again_takes_bounded_time(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> None:
    """Somebody else is always quicker, and the store slow: after two tenths of a second the breaker goes on alone."""
    store = Wrapped(SharedMemory())
    monkeypatch.setattr(copilot_router, "time", SimpleNamespace(monotonic=clock, time=clock, sleep=clock.sleep))
    breaker = CircuitBreaker(1, store=store, name="b", clock=clock)
    breaker.admit().success()
    tries = []

    def lose(*_: Any) -> bool:
        clock.advance(0.06)
        tries.append(clock())
        return False

    monkeypatch.setattr(store, "swap", lose)
    breaker.open(50)
    assert 2 <= len(tries) <= 5
    assert breaker.is_open


def test_the_version_of_a_file_is_one(tmp_path: Path) -> None:
    """Files that other versions of this module have written are read by it."""
    path = tmp_path / "b.sqlite"
    breaker = CircuitBreaker(1, store=SQLiteStore(path), name="b")
    breaker.admit().failure()
    breaker._shared._store.close()  # type: ignore[union-attr]
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    connection.close()


# -- the chain


@pytest.mark.parametrize("error", [ConfigError, KeyboardInterrupt, AssertionError])
def test_what_passes_through_a_trial_hands_it_on(clock: FakeClock, error: type[BaseException]) -> None:
    """At once, while its traceback is still held: the next call is the trial."""
    provider = ScriptedProvider([ServerError, error, "well again"])
    tier = ProviderTier("a", provider, ["m"], retries=0)
    chain = FailoverChain([tier], failure_threshold=1, recovery_timeout=5, clock=clock, sleep=clock.sleep)
    with pytest.raises(AllProvidersFailed):
        chain.chat("hi")
    clock.advance(5)
    with pytest.raises(error) as held:
        chain.chat("hi")
    assert held.value.__traceback__ is not None
    assert chain.tiers[0].breaker.snapshot().state != "half_open"
    assert chain.chat("hi").text == "well again"


def test_a_wait_for_a_full_tier_ends_at_the_deadline() -> None:
    """And not when the tier's place becomes free."""
    inside, leave = threading.Event(), threading.Event()

    def hold(*_: Any, **__: Any) -> str:
        inside.set()
        leave.wait(5)
        return "slow"

    chain = FailoverChain([ProviderTier("a", ScriptedProvider([hold]), max_concurrency=1)])
    holder = threading.Thread(target=lambda: chain.chat("hi"))
    holder.start()
    assert inside.wait(10)
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        chain.chat("hi", timeout=0.2)
    taken = time.monotonic() - start
    leave.set()
    holder.join(10)
    assert 0.2 <= taken < 2
