"""The chain: who is asked, in which order, with what, and what the caller is told."""

from __future__ import annotations

import copy
import gc
import json
import logging
import pickle
import re
import socket
import sys
import threading
import types
from typing import Any

import pytest
from clocks import FakeClock
from stores import Wrapped

from copilot_router import (
    AllProvidersFailed,
    Attempt,
    AuthenticationError,
    BadRequest,
    CircuitBreaker,
    CircuitOpen,
    ConfigError,
    ContentFiltered,
    ContextLengthExceeded,
    DeadlineExceeded,
    EmptyResponse,
    EscalationFailed,
    Event,
    FailoverChain,
    InvalidResponse,
    LLMProvider,
    LLMResponse,
    MemoryStore,
    OpenAIProvider,
    ProviderError,
    ProviderTier,
    ProviderTimeout,
    ProviderUnavailable,
    QuotaExceeded,
    RateLimited,
    RouterError,
    ScriptedProvider,
    ServerError,
    ToolCall,
    UnknownModel,
    UnsupportedRequest,
    Usage,
    _place,
)

PROMPT = "the secret prompt of this test suite"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def scripted(*items: Any, repeat: bool = True) -> ScriptedProvider:
    return ScriptedProvider(items, repeat=repeat)


def tier(name: str, *items: Any, models: Any = None, **settings: Any) -> ProviderTier:
    return ProviderTier(name, scripted(*items), [f"{name}-model"] if models is None else models, **settings)


def chain_of(clock: FakeClock, *tiers: ProviderTier, **settings: Any) -> FailoverChain:
    return FailoverChain(tiers, clock=clock, sleep=clock.sleep, **settings)


def calls(chain: FailoverChain, name: str) -> list[dict[str, Any]]:
    provider = next(tier.provider for tier in chain.tiers if tier.name == name)
    assert isinstance(provider, ScriptedProvider)
    return provider.calls


def outcomes(attempts: tuple[Attempt, ...]) -> list[str]:
    return [f"{attempt.tier}:{attempt.outcome}" for attempt in attempts]


# -- order and models


def test_the_original_quick_start_runs() -> None:
    """Two providers that implement only chat(); the named model's tier answers."""

    class Local:
        def chat(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> LLMResponse:
            return LLMResponse(content=f"{model} says hello")

    chain = FailoverChain(
        tiers=[
            ProviderTier(name="local", provider=Local(), models=["llama-3"]),  # type: ignore[arg-type]
            ProviderTier(name="cloud", provider=Local(), models=["gpt-4o"]),  # type: ignore[arg-type]
        ]
    )
    assert chain.chat(messages=[{"role": "user", "content": "hi"}], model="llama-3").content == "llama-3 says hello"
    chain.check()
    chain.close()


@pytest.mark.parametrize("others", [0, 1])
def test_a_slow_store_may_take_the_time_that_was_left(clock: FakeClock, others: int) -> None:
    """The deadline passes while the breaker asks its store: nobody is asked with less than no time left."""
    slow = Wrapped(MemoryStore())
    slow.before = lambda operation: clock.advance(2.0)
    breaker = CircuitBreaker(store=slow, name="a", clock=clock)
    chain = chain_of(clock, tier("a", "never", breaker=breaker), *[tier("b", "never")] * others)
    with pytest.raises(DeadlineExceeded, match="a: CircuitOpen: no time left to ask it") as caught:
        chain.chat(PROMPT, timeout=1)
    assert outcomes(caught.value.attempts) == ["a:skipped", "b:skipped"][: others + 1]
    assert not calls(chain, "a")
    assert breaker.is_closed


def test_tiers_are_asked_by_role_then_as_listed(clock: FakeClock) -> None:
    """Primary, secondary, emergency; chain.tiers is in that order."""
    down = ProviderUnavailable
    chain = chain_of(
        clock,
        tier("e", "last", role="emergency"),
        tier("s", down, role="secondary"),
        tier("p1", down),
        tier("p2", down),
    )
    assert [one.name for one in chain.tiers] == ["p1", "p2", "s", "e"]
    response = chain.chat("hi")
    assert response.provider == "e"
    assert outcomes(response.attempts) == ["p1:failed", "p2:failed", "s:failed", "e:ok"]
    assert repr(chain) == "<FailoverChain p1 -> p2 -> s -> e>"
    assert "p1" in repr(chain.tiers[0])


def test_a_named_model_moves_its_tiers_forward(clock: FakeClock) -> None:
    """Tiers that list it go first, but for emergency ones; the others follow with their default; aliases are resolved."""
    down = ProviderUnavailable
    chain = chain_of(
        clock,
        tier("a", down, models=["a1", "a2"]),
        tier("any", down, models=[]),
        tier("b", down, models={"smart": "b-9"}),
        tier("e", down, models=["smart"], role="emergency"),
    )
    with pytest.raises(AllProvidersFailed) as failed:
        chain.chat("hi", model="smart")
    assert [(a.tier, a.model) for a in failed.value.attempts] == [
        ("b", "b-9"), ("a", "a1"), ("any", "smart"), ("e", "smart"),
    ]  # fmt: skip
    chain.reset()
    with pytest.raises(AllProvidersFailed) as failed:
        chain.chat("hi", model="b-9")
    assert failed.value.attempts[0][:2] == ("b", "b-9")
    assert calls(chain, "any")[0]["model"] == "smart"


def test_an_unknown_model_names_the_near_misses(clock: FakeClock) -> None:
    """Before anybody is asked; a wrong type is a ConfigError."""
    chain = chain_of(clock, tier("a", "x", models=["gpt-6-luna"]))
    with pytest.raises(UnknownModel, match="Did you mean 'gpt-6-luna'"):
        chain.chat("hi", model="gpt6-luna")
    with pytest.raises(ConfigError, match="model=''"):
        chain.chat("hi", model="")
    assert not calls(chain, "a")


def test_tiers_restricts_strictly(clock: FakeClock) -> None:
    """Nobody else is asked, however it ends."""
    chain = chain_of(clock, tier("local", ServerError), tier("cloud", "x"))
    with pytest.raises(AllProvidersFailed):
        chain.chat("hi", tiers=["local"])
    assert not calls(chain, "cloud")
    with pytest.raises(ConfigError, match=r"'clod'.*Did you mean 'cloud'"):
        chain.chat("hi", tiers=["clod"])
    for wrong in ("local", []):
        with pytest.raises(ConfigError, match="give a list of names"):
            chain.chat("hi", tiers=wrong)
    with pytest.raises(UnknownModel):
        chain.chat("hi", tiers=["local"], model="cloud-model")


def test_a_tier_that_cannot_is_skipped(clock: FakeClock) -> None:
    """Tools and images; if nobody can, UnsupportedRequest says who lacks what."""
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]
    chain = chain_of(clock, tier("blind", "a", supports_images=False), tier("all", "b", supports_tools=False))
    assert outcomes(chain.chat(image).attempts) == ["blind:skipped", "all:ok"]
    assert chain.chat("hi").provider == "blind"
    tool = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(UnsupportedRequest, match=r"blind takes no images; all takes no tools"):
        chain.chat(image, [tool])


# -- retries, rate limits, parking


def test_a_server_error_is_tried_again_after_a_short_pause(clock: FakeClock) -> None:
    """Once by default; every request is counted by itself."""
    chain = chain_of(clock, tier("a", ServerError, "fine"))
    assert outcomes(chain.chat("hi").attempts) == ["a:failed", "a:ok"]
    assert 0.1 <= clock.slept[0] <= 0.3


@pytest.mark.parametrize(("retries", "requests"), [(0, 1), (1, 2), (2, 3)])
def test_retries_are_bounded(clock: FakeClock, retries: int, requests: int) -> None:
    """Then the next tier."""
    chain = chain_of(clock, tier("a", ServerError, retries=retries), tier("b", "x"))
    chain.chat("hi")
    assert len(calls(chain, "a")) == requests


def test_no_pause_once_the_breaker_is_open(clock: FakeClock) -> None:
    """The third failure opens it, and the call goes on at once."""
    chain = chain_of(clock, tier("a", ServerError, retries=5), tier("b", "x"))
    chain.chat("hi")
    assert len(calls(chain, "a")) == 3
    assert len(clock.slept) == 2
    assert chain.chat("hi").attempts[0].outcome == "skipped"


def test_a_retry_after_replaces_the_pause(clock: FakeClock) -> None:
    """A short one is waited for; a longer one than max_retry_after parks."""
    chain = chain_of(clock, tier("a", ServerError("x", retry_after=1.5), ServerError("x", retry_after=40)), tier("b", "x"))
    chain.chat("hi")
    assert clock.slept == [1.5]
    assert chain.tiers[0].breaker.retry_after == 40


def test_a_short_retry_after_is_waited_out_once(clock: FakeClock) -> None:
    """Neutral the first time; the second 429 parks."""
    limited = RateLimited("x", retry_after=1)
    chain = chain_of(clock, tier("a", limited, "fine", limited, limited), tier("b", "x"))
    assert chain.chat("hi").provider == "a"
    assert clock.slept == [1]
    assert chain.tiers[0].breaker.is_closed
    assert outcomes(chain.chat("hi").attempts) == ["a:failed", "a:failed", "b:ok"]
    assert chain.tiers[0].breaker.retry_after == 1


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (RateLimited("x", retry_after=30), 30),
        (RateLimited("x"), 15),
        (RateLimited("x", retry_after=9999), 3600),
        (QuotaExceeded("x", retry_after=1), 600),
        (AuthenticationError("x"), 600),
    ],
)
def test_parking(clock: FakeClock, error: ProviderError, seconds: float) -> None:
    """One request, no wait, and the tier rests for as long as it was told."""
    chain = chain_of(clock, tier("a", error), tier("b", "x"))
    for _ in range(3):
        assert chain.chat("hi").provider == "b"
    assert len(calls(chain, "a")) == 1
    assert not clock.slept
    assert chain.tiers[0].breaker.retry_after == seconds


def test_a_pause_that_does_not_fit_the_deadline_is_not_begun(clock: FakeClock) -> None:
    """Neither for a 429 nor for a 500."""
    for error in (RateLimited("x", retry_after=2), ServerError("x", retry_after=2)):
        chain = chain_of(clock, tier("a", error), tier("b", "x"))
        assert chain.chat("hi", timeout=1).provider == "b"
    assert not clock.slept


def test_all_parked_fails_at_once_with_the_earliest_return(clock: FakeClock) -> None:
    """Nobody is asked; retry_after is the smaller one; the errors are CircuitOpen."""
    chain = chain_of(clock, tier("a", RateLimited("x", retry_after=30)), tier("b", RateLimited("x", retry_after=20)))
    for _ in range(2):
        with pytest.raises(AllProvidersFailed) as failed:
            chain.chat("hi")
    assert failed.value.retry_after == 20
    assert [type(error) for error in failed.value.errors] == [CircuitOpen, CircuitOpen]
    assert failed.value.errors[0].retry_after == 30  # type: ignore[attr-defined]
    skips = [f"{name}: skipped (CircuitOpen: {name} is open (RateLimited: x))" for name in "ab"]
    assert failed.value.explain() == " -> ".join(skips)
    assert failed.value.__cause__ is failed.value.errors[0]


# -- what passes, what is raised


@pytest.mark.parametrize("kind", [BadRequest, ContextLengthExceeded])
def test_the_same_neutral_class_of_all_is_raised_itself(clock: FakeClock, kind: type[ProviderError]) -> None:
    """It holds for everybody; breakers stay closed."""
    chain = chain_of(clock, tier("a", kind("x")), tier("b", kind("y")))
    with pytest.raises(kind) as raised:
        chain.chat("hi", wait=100)
    assert len(raised.value.attempts) == 2
    assert raised.value.provider == "a"
    assert all(one.breaker.snapshot().failures == 0 for one in chain.tiers)


def test_mixed_failures_name_every_tier(clock: FakeClock) -> None:
    """With its class and message, and all the exceptions without their frames."""
    chain = chain_of(clock, tier("a", BadRequest("too odd")), tier("b", ProviderUnavailable("refused")))
    with pytest.raises(AllProvidersFailed, match=r"a: BadRequest: too odd; b: ProviderUnavailable: refused") as failed:
        chain.chat("hi")
    assert [type(error) for error in failed.value.errors] == [BadRequest, ProviderUnavailable]
    assert all(error.__traceback__ is None for error in failed.value.errors)
    assert failed.value.retry_after == 1.0


def test_a_refusal_by_a_safety_system_is_raised_at_once(clock: FakeClock) -> None:
    """No other tier is asked, not even the emergency one; on_error may change that."""
    tiers = (tier("a", ContentFiltered("no")), tier("b", "x", role="emergency"))
    with pytest.raises(ContentFiltered) as raised:
        chain_of(clock, *tiers).chat("hi")
    assert outcomes(raised.value.attempts) == ["a:failed"]
    assert chain_of(clock, *tiers, on_error={ContentFiltered: "next"}).chat("hi").provider == "b"


def test_on_error_takes_the_nearest_class(clock: FakeClock) -> None:
    """A subclass's own entry beats its base's; foreign exceptions may be named, too."""
    policy = {ProviderError: "raise", ServerError: "next", KeyError: "raise"}
    chain = chain_of(clock, tier("a", ServerError, BadRequest, KeyError, retries=3), tier("b", "x"), on_error=policy)
    assert chain.chat("hi").provider == "b"
    assert not clock.slept
    with pytest.raises(BadRequest):
        chain.chat("hi")
    with pytest.raises(KeyError):
        chain.chat("hi")
    for wrong, message in (({"x": "next"}, "no exception class"), ({KeyError: "again"}, "give 'next' or 'raise'")):
        with pytest.raises(ConfigError, match=message):
            chain_of(clock, tier("a", "x"), on_error=wrong)


@pytest.mark.parametrize("kind", [AssertionError, MemoryError, RecursionError, KeyboardInterrupt, GeneratorExit, ConfigError])
def test_what_is_not_the_providers_passes_straight_through(clock: FakeClock, kind: type[BaseException]) -> None:
    """Neutral for the breaker, and the second tier is not asked."""
    chain = chain_of(clock, tier("a", kind), tier("b", "x"))
    with pytest.raises(kind):
        chain.chat("hi")
    assert not calls(chain, "b")
    assert chain.tiers[0].breaker.snapshot().failures == 0


def test_task_limits_pass_through(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery's soft time limit is found in sys.modules, without importing anything."""

    class SoftTimeLimitExceeded(Exception):
        pass

    module = types.ModuleType("billiard.exceptions")
    module.SoftTimeLimitExceeded = SoftTimeLimitExceeded  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "billiard.exceptions", module)
    with pytest.raises(SoftTimeLimitExceeded):
        chain_of(clock, tier("a", SoftTimeLimitExceeded), tier("b", "x")).chat("hi")


def test_a_task_limit_ends_listeners_stores_and_pings_too(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised wherever the task happens to be: nothing that catches other people's errors may swallow it."""

    class SoftTimeLimitExceeded(Exception):
        pass

    def limit(*_: object) -> None:
        raise SoftTimeLimitExceeded

    class Store(MemoryStore):
        load = limit  # type: ignore[assignment]

    class Pinged(ScriptedProvider):
        ping = limit  # type: ignore[assignment]

    module = types.ModuleType("billiard.exceptions")
    module.SoftTimeLimitExceeded = SoftTimeLimitExceeded  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "billiard.exceptions", module)
    for step in (
        lambda: FailoverChain([tier("a", "x")], on_event=limit).chat("hi"),
        lambda: CircuitBreaker(on_change=limit).open(),
        lambda: CircuitBreaker(name="x", store=Store()).admit(),
        lambda: FailoverChain([ProviderTier("a", Pinged(["x"]))]).check(),
        lambda: FailoverChain([ProviderTier("a", Pinged(["x"]))]).ping(),
    ):
        with pytest.raises(SoftTimeLimitExceeded):
            step()


def test_any_other_exception_fails_over_and_its_text_is_not_repeated(clock: FakeClock) -> None:
    """A foreign exception's text could hold anything."""
    chain = chain_of(clock, tier("a", ValueError(PROMPT)), tier("b", ProviderUnavailable))
    with pytest.raises(AllProvidersFailed) as failed:
        chain.chat("hi")
    assert failed.value.attempts[0].error == "ValueError"
    assert PROMPT not in str(failed.value)
    assert chain.tiers[0].breaker.snapshot().failures == 1


@pytest.mark.parametrize("answer", [None, "text", {"content": "x"}])
def test_a_provider_that_returns_something_else_is_a_config_error(clock: FakeClock, answer: object) -> None:
    """Naming the tier, the class and the cure."""

    class Wrong(LLMProvider):
        def chat(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> Any:
            return answer

    with pytest.raises(ConfigError, match=r"tier 'w': Wrong returned \w+: return an LLMResponse"):
        chain_of(clock, ProviderTier("w", Wrong())).chat("hi")


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        (LLMResponse(content=""), EmptyResponse),
        (LLMResponse(content=" \n"), EmptyResponse),
        (LLMResponse(finish_reason="length"), EmptyResponse),
        (LLMResponse(finish_reason="content_filter"), ContentFiltered),
    ],
)
def test_an_empty_answer_is_no_answer_of_any_provider(clock: FakeClock, response: LLMResponse, kind: type) -> None:
    """White space is nothing; a filtered one is a refusal; one that was cut by length is neutral."""
    chain = chain_of(clock, tier("a", response))
    with pytest.raises((kind, AllProvidersFailed)) as raised:
        chain.chat("hi")
    error = raised.value if kind is ContentFiltered else raised.value.errors[0]  # type: ignore[union-attr]
    assert isinstance(error, kind)
    cut = response.finish_reason in ("length", "content_filter")
    assert chain.tiers[0].breaker.snapshot().failures == (0 if cut else 1)


# -- emergency, wait, deadline


def test_emergency_is_asked_even_while_open_unless_forced(clock: FakeClock) -> None:
    """Its verdict then decides nothing; ordered open by hand, it is skipped."""
    chain = chain_of(clock, tier("a", ProviderUnavailable), tier("e", "x", role="emergency"))
    chain.tiers[1].breaker.open(100)
    assert chain.chat("hi").provider == "e"
    assert chain.tiers[1].breaker.is_open
    chain.tiers[1].breaker.open()
    with pytest.raises(AllProvidersFailed, match="e is open until reset"):
        chain.chat("hi")


def test_waiting_for_a_tier(clock: FakeClock) -> None:
    """A one-tier script sleeps until the tier is ready; the total is bounded and added to the default deadline."""
    chain = chain_of(clock, tier("a", RateLimited("x", retry_after=50), "fine"), timeout=10)
    assert chain.chat("hi", wait=60).text == "fine"
    assert clock.slept == [50]
    chain = chain_of(clock, tier("a", RateLimited("x", retry_after=50)), wait=120)
    with pytest.raises(AllProvidersFailed) as failed:
        chain.chat("hi")
    assert clock.slept == [50, 50, 50]
    assert outcomes(failed.value.attempts) == ["a:failed"] * 3


def test_waiting_for_a_closed_tier_grows(clock: FakeClock) -> None:
    """A tier that failed just now is not hammered."""
    chain = chain_of(clock, tier("a", ProviderUnavailable, ProviderUnavailable, "fine"))
    assert chain.chat("hi", wait=30).text == "fine"
    assert clock.slept == [1, 2]


def test_a_wait_that_does_not_fit_is_not_begun(clock: FakeClock) -> None:
    """Neither beyond the deadline nor for what waiting will not mend."""
    chain = chain_of(clock, tier("a", RateLimited("x", retry_after=50)))
    with pytest.raises(AllProvidersFailed):
        chain.chat("hi", wait=100, timeout=20)
    chain = chain_of(clock, tier("a", "x"))
    chain.tiers[0].breaker.open()
    with pytest.raises(AllProvidersFailed) as failed:
        chain.chat("hi", wait=100)
    assert failed.value.retry_after is None
    assert not clock.slept


class Slow(LLMProvider):
    """Takes its time, by the clock, and then fails."""

    def __init__(self, clock: FakeClock, seconds: float, error: Exception) -> None:
        self.clock, self.seconds, self.error = clock, seconds, error
        self.timeouts: list[float] = []

    def chat(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> LLMResponse:
        self.timeouts.append(kwargs["timeout"])
        self.clock.advance(self.seconds)
        raise self.error


def test_the_deadline_covers_all_tiers(clock: FakeClock) -> None:
    """What is left shrinks; a tier's own timeout is smaller; who was not asked is named."""
    one, two = Slow(clock, 4, ProviderTimeout("slow")), Slow(clock, 7, ProviderTimeout("slow"))
    chain = chain_of(clock, ProviderTier("a", one), ProviderTier("b", two, timeout=100), tier("c", "x"))
    with pytest.raises(DeadlineExceeded, match="c: CircuitOpen: no time left") as late:
        chain.chat("hi", timeout=10)
    assert isinstance(late.value, TimeoutError)
    assert (one.timeouts, two.timeouts) == ([10], [6])
    assert [a.tier for a in late.value.attempts] == ["a", "b", "c"]
    assert len(late.value.errors) == 3


@pytest.mark.parametrize(("code", "failures"),
    [(None, 0), ("attempt_timeout", 0), ("first_token_timeout", 1), ("stall_timeout", 1)])
def test_our_own_deadline_is_not_the_providers_fault(clock: FakeClock, code: str | None, failures: int) -> None:
    """Neutral, unless its silence had reached its own limit."""
    chain = chain_of(clock, ProviderTier("a", Slow(clock, 10, ProviderTimeout("x", code=code))))
    with pytest.raises(DeadlineExceeded):
        chain.chat("hi", timeout=10)
    assert chain.tiers[0].breaker.snapshot().failures == failures


def test_no_time_at_all(clock: FakeClock) -> None:
    """timeout=0 asks nobody; a tier's own timeout is passed on."""
    chain = chain_of(clock, tier("a", "x", timeout=3))
    with pytest.raises(DeadlineExceeded):
        chain.chat("hi", timeout=0)
    assert not calls(chain, "a")
    chain.chat("hi")
    assert calls(chain, "a")[0]["kwargs"] == {"timeout": 3}


class Recorder(OpenAIProvider):
    """An HTTP provider that only notes the limits it is given."""

    def __init__(self) -> None:
        super().__init__("k" * 20, "http://127.0.0.1:9", first_token_timeout=12, stall_timeout=20)
        self.limits: list[tuple[float, float]] = []

    def chat(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> LLMResponse:
        self.limits.append((kwargs["first_token_timeout"], kwargs["stall_timeout"]))
        return LLMResponse(content="fine")


def test_silence_limits(clock: FakeClock) -> None:
    """As they are while a later tier is ready, never more than half of the time left; else five times as long."""
    provider = Recorder()
    chain = chain_of(clock, ProviderTier("a", provider, ["m"]), tier("b", "x"))
    chain.chat("hi", timeout=300)
    chain.chat("hi", timeout=30)
    chain.chat("hi", timeout=300, model="m")
    chain.chat("hi", timeout=300, reasoning_effort="high")
    chain.tiers[1].breaker.open(1000)
    chain.chat("hi", timeout=300)
    chain.chat("hi", timeout=300, first_token_timeout=1)
    assert provider.limits == [(12, 20), (12, 15), (60, 100), (60, 100), (60, 100), (5, 100)]


# -- concurrency, health


def test_a_full_tier_is_skipped_while_another_is_ready_else_waited_for() -> None:
    """max_concurrency=1: the second caller goes elsewhere; alone, it waits its turn."""
    inside, leave = threading.Event(), threading.Event()

    def hold(*_: Any, **__: Any) -> str:
        inside.set()
        leave.wait(10)
        return "slow"

    busy = ProviderTier("a", ScriptedProvider([hold, "fast", "fast"]), max_concurrency=1)
    both, alone = FailoverChain([busy, tier("b", "x")]), FailoverChain([busy])
    answers: list[str] = []
    first = threading.Thread(target=lambda: answers.append(alone.chat("hi").text))
    first.start()
    inside.wait(10)
    response = both.chat("hi")
    assert outcomes(response.attempts) == ["a:skipped", "b:ok"]
    assert "busy" in str(response.attempts[0].error)
    with pytest.raises(AllProvidersFailed):
        alone.chat("hi", timeout=0.05)
    second = threading.Thread(target=lambda: answers.append(alone.chat("hi").text))
    second.start()
    leave.set()
    first.join(10)
    second.join(10)
    assert sorted(answers) == ["fast", "slow"]


class Held(ScriptedProvider):
    """Each call says that it has begun, and waits until it may go on."""

    def __init__(self, *script: Any) -> None:
        super().__init__(script, repeat=True)
        self.begun, self.go_on = threading.Semaphore(0), threading.Event()
        self._counting = threading.Lock()
        self.under_way = self.most = 0

    def chat(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> LLMResponse:
        with self._counting:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        self.begun.release()
        assert self.go_on.wait(30)
        with self._counting:
            self.under_way -= 1
        return super().chat(messages, tools, model, **kwargs)


def in_threads(count: int, work: Any) -> list[threading.Thread]:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_no_more_than_max_concurrency_at_once() -> None:
    """Sixteen callers of a last tier with three places: never more than three inside, and all are answered."""
    provider, answers = Held("x"), []
    chain = FailoverChain([ProviderTier("a", provider, max_concurrency=3)])
    threads = in_threads(16, lambda: answers.append(chain.chat("hi").text))
    for _ in range(3):
        assert provider.begun.acquire(timeout=10)
    assert not provider.begun.acquire(timeout=0.05)
    provider.go_on.set()
    for thread in threads:
        thread.join(10)
    assert answers == ["x"] * 16
    assert provider.most == 3


@pytest.mark.parametrize("error", [ServerError, BadRequest, KeyboardInterrupt])
def test_a_place_is_given_back_however_a_request_ends(clock: FakeClock, error: type[BaseException]) -> None:
    """Failed, refused, interrupted: the next call finds it free."""
    chain = chain_of(clock, ProviderTier("a", scripted(error, "fine", repeat=False), max_concurrency=1, retries=0))
    with pytest.raises((RouterError, KeyboardInterrupt)):
        chain.chat("hi")
    assert chain.chat("hi").text == "fine"


def full(*others: ProviderTier, **settings: Any) -> tuple[FailoverChain, Held, list[threading.Thread]]:
    """A chain whose first tier has one place, which is taken."""
    provider = Held("slow")
    chain = FailoverChain([ProviderTier("a", provider, max_concurrency=1), *others], **settings)
    threads = in_threads(1, lambda: chain.chat("hi", tiers=["a"]))
    assert provider.begun.acquire(timeout=10)
    return chain, provider, threads


@pytest.mark.parametrize("why", ["open", "takes no tools"])
def test_a_full_tier_is_waited_for_if_no_later_one_can_serve(why: str) -> None:
    """A later tier whose breaker is open, or that cannot take the request, is none to go to."""
    chain, provider, threads = full(tier("b", "x", supports_tools=why == "open"))
    if why == "open":
        chain.tiers[1].breaker.open()
    tools = [{"type": "function", "function": {"name": "f"}}]
    answers: list[LLMResponse] = []
    threads += in_threads(1, lambda: answers.append(chain.chat("hi", tools)))
    assert not provider.begun.acquire(timeout=0.05)
    provider.go_on.set()
    for thread in threads:
        thread.join(10)
    assert [answer.provider for answer in answers] == ["a"]


def test_a_full_tier_is_skipped_for_an_emergency(clock: FakeClock) -> None:
    """The last resort is always ready, unlike a tier that is full: its breaker learns nothing from being full."""
    chain, provider, threads = full(tier("e", "last", role="emergency"))
    chain.tiers[1].breaker.open(1000)
    assert outcomes(chain.chat("hi").attempts) == ["a:skipped", "e:ok"]
    assert chain.tiers[0].breaker.snapshot()[:3] == ("closed", 0, 0)
    provider.go_on.set()
    threads[0].join(10)


def test_two_full_tiers_and_the_last_is_waited_for() -> None:
    """Busy, busy: the first is skipped, the second's next place is this caller's."""
    last = Held("last")
    chain, provider, threads = full(ProviderTier("b", last, max_concurrency=1))
    threads += in_threads(1, lambda: chain.chat("hi", tiers=["b"]))
    assert last.begun.acquire(timeout=10)
    answers: list[LLMResponse] = []
    threads += in_threads(1, lambda: answers.append(chain.chat("hi")))
    assert not last.begun.acquire(timeout=0.05)
    last.go_on.set()
    assert last.begun.acquire(timeout=10)
    provider.go_on.set()
    for thread in threads:
        thread.join(10)
    assert [outcomes(answer.attempts) for answer in answers] == [["a:skipped", "b:ok"]]


def test_a_trial_that_finds_its_tier_full_is_handed_on() -> None:
    """The trial is not spent by a caller who could not even ask."""
    chain, provider, threads = full(tier("b", "x"))
    breaker = chain.tiers[0].breaker
    breaker.open(0)
    assert chain.chat("hi").provider == "b"
    assert (breaker.state, breaker.retry_after) == ("open", 0)
    provider.go_on.set()
    threads[0].join(10)
    assert chain.chat("hi").provider == "a"
    assert breaker.is_closed


class Line:
    """A tier's places, and who asked for one of them."""

    def __init__(self, tier: ProviderTier) -> None:
        self.places, self.came = tier._slots, threading.Semaphore(0)
        self.put = self.places.put
        tier._slots = self

    def get(self, block: bool, timeout: float) -> None:
        self.came.release()
        self.places.get(block, timeout)

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self.came.acquire(timeout=10)


def test_who_waited_for_a_tier_that_broke_meanwhile_does_not_ask_it() -> None:
    """Ten callers in line for one place: after the threshold of failures the rest are refused without a request."""
    provider = Held(ServerError)
    chain = FailoverChain([ProviderTier("a", provider, max_concurrency=1, retries=0)], failure_threshold=2)
    errors: list[AllProvidersFailed] = []

    def ask() -> None:
        with pytest.raises(AllProvidersFailed) as failed:
            chain.chat("hi")
        errors.append(failed.value)

    line = Line(chain.tiers[0])
    threads = in_threads(10, ask)
    line.wait_for(10)
    provider.go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(provider.calls) == 2
    assert sum("CircuitOpen" in str(error.attempts[0].error) for error in errors) == 8


@pytest.mark.parametrize("role", ["primary", "emergency"])
def test_who_waited_for_a_tier_that_recovered_meanwhile_asks_it(role: str) -> None:
    """Opened and reset while one waited: the request is counted in the present era, by a new ticket."""
    provider = Held("x")
    chain = FailoverChain([ProviderTier("a", provider, max_concurrency=1, role=role)])
    answers: list[str] = []
    line = Line(chain.tiers[0])
    threads = in_threads(2, lambda: answers.append(chain.chat("hi").text))
    line.wait_for(2)
    chain.reset()
    provider.go_on.set()
    for thread in threads:
        thread.join(10)
    assert answers == ["x", "x"]
    assert chain.tiers[0].breaker.snapshot().stale == 1  # the one that was under way


def test_health_and_check(clock: FakeClock) -> None:
    """A failed ping counts; a good one makes an open breaker's trial due, and closes nothing."""

    class Pinged(ScriptedProvider):
        error: Exception | None = None

        def ping(self, timeout: float = 5.0) -> None:
            if self.error is not None:
                raise self.error

    provider = Pinged([ServerError, "x"])
    chain = chain_of(clock, ProviderTier("a", provider, ["m"], retries=0), tier("b", "x"))
    chain.chat("hi")
    health = chain.health()[0]
    assert (health.name, health.role, health.models, health.calls, health.failures) == ("a", "primary", ("m",), 1, 1)
    assert (health.last_error, health.last_latency, health.breaker.failures) == ("ServerError", 0.0, 1)
    assert chain.check()[0].breaker.failures == 1
    provider.error = ProviderUnavailable("refused")
    assert chain.check()[0].last_error == "ProviderUnavailable: refused"
    assert chain.check()[0].breaker.state == "open"
    deadline = chain.tiers[0].breaker.retry_after
    assert chain.check()[0].breaker.retry_after == deadline
    provider.error = None
    assert chain.check()[0].breaker[:4] == ("open", 1, 3, 0)
    assert chain.check()[0].last_error is None
    chain.ping()
    assert chain.chat("hi").provider == "a"
    provider.error = ServerError("x")
    chain.ping()
    with pytest.raises(ServerError):
        FailoverChain([chain.tiers[0]]).ping()
    with pytest.raises(ConfigError):
        chain.check(-1)


def test_a_ping_does_not_touch_an_open_by_hand(clock: FakeClock) -> None:
    """Only reset() ends it; the context manager closes providers and leaves the chain usable."""
    with chain_of(clock, tier("a", "x")) as chain:
        chain.tiers[0].breaker.open()
        chain.check()
        assert chain.tiers[0].breaker.retry_after is None
        chain.reset()
    assert chain.chat("hi").text == "x"


# -- the record: attempts, usage, cost, events, logs


def test_cost_and_usage_tell_the_truth(clock: FakeClock) -> None:
    """Summed over attempts, failed ones too; cached tokens have their own price; no price is None, never 0."""
    failed = InvalidResponse("cut")
    failed.usage = Usage(100, 10)
    answer = LLMResponse("x", usage=Usage(1000, 500, 400, 100), model="b-2026")
    prices = {"b-2026": (1.0, 2.0, 0.5)}
    chain = chain_of(clock, tier("a", failed, prices=(10, 20)), tier("b", answer, prices=prices))
    response = chain.chat("hi")
    expected = (100 * 10 + 10 * 20 + 500 * 1 + 400 * 0.5 + 100 * 1 + 500 * 2) / 1e6
    assert response.cost == pytest.approx(expected)
    assert response.usage == Usage(1000, 500, 400, 100)
    assert response.total_usage == Usage(1100, 510, 400, 100)
    assert response.total_usage.total_tokens == 1610
    assert response.explain() == "a: InvalidResponse: cut 0 ms -> b: ok 0 ms $0.0030"
    assert chain_of(clock, tier("a", failed), tier("b", answer, prices=prices)).chat("hi").cost is None
    assert chain_of(clock, tier("b", answer, prices={"other": (1, 2)})).chat("hi").cost is None
    assert chain_of(clock, tier("b", "x", prices=(1, 2))).chat("hi").cost == 0
    free = chain_of(clock, tier("a", ServerError, retries=0), tier("b", answer, prices=(1, 1))).chat("hi")
    assert free.cost is not None


def test_events_tell_every_step(clock: FakeClock) -> None:
    """By kind and order, with plain data; what the callback raises is dropped."""
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        raise RuntimeError("listener")

    tiers = (tier("a", ServerError, ServerError, RateLimited("x", retry_after=9)),
        tier("b", "one", ServerError, ServerError, "two"))
    chain = chain_of(clock, *tiers, on_event=listen)
    chain.chat(PROMPT)
    assert [event.kind for event in events] == ["attempt", "retry", "attempt", "failover", "attempt", "done"]
    assert events[-1].data["outcome"] == "ok"
    assert events[0].time == 1000.0
    events.clear()
    chain.chat(PROMPT, wait=60)
    assert [event.kind for event in events][:3] == ["attempt", "breaker", "failover"]
    assert "wait" in [event.kind for event in events]
    json.dumps([event._asdict() for event in events])
    chain.reset()
    events.clear()
    chain.tiers[0].breaker.open()
    chain.tiers[1].breaker.open()
    with pytest.raises(AllProvidersFailed):
        chain.chat(PROMPT)
    assert [event.kind for event in events] == ["breaker", "breaker", "skip", "skip", "done"]
    assert events[-1].data["outcome"] == "AllProvidersFailed"


def test_log_levels_and_no_secret_anywhere(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    """Attempts DEBUG, failover and recovery INFO, opened and failed WARNING; no prompt, no answer."""
    caplog.set_level(logging.DEBUG, "copilot_router")
    answer = "the secret answer of this test suite"
    chain = chain_of(clock, tier("a", ServerError, ServerError, ServerError, "x"), tier("b", answer))
    chain.chat(PROMPT)
    chain.chat(PROMPT)
    clock.advance(15)
    chain.chat(PROMPT)
    chain.tiers[0].breaker.open()
    with pytest.raises(AllProvidersFailed):
        chain.chat(PROMPT, tiers=["a"])
    levels = {(record.levelname, record.getMessage().split()[0]) for record in caplog.records}
    text = caplog.text
    assert ("WARNING", "call") in levels
    assert "a: open (ServerError)" in text
    assert "a: closed (recovered)" in text
    assert "a failover" in text
    assert "a attempt" in text
    assert PROMPT not in text
    assert answer not in text
    assert answer not in repr(chain.chat(PROMPT))


def test_nothing_given_is_modified(clock: FakeClock) -> None:
    """Messages, tools, params and the provider's own response object."""
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    answer = LLMResponse("[ESCALATE] no")
    before = copy.deepcopy((messages, tools, answer))
    chain = chain_of(clock, tier("a", answer), tier("b", "x"), escalation_model="b-model")
    response = chain.chat(messages, tools)
    assert (messages, tools, answer) == before
    assert response is not answer


def test_params_lie_under_the_calls_own_options(clock: FakeClock) -> None:
    """A None in the call removes one; options go to the provider as they are."""
    chain = chain_of(clock, tier("a", "x", params={"temperature": 0.2, "seed": 1}))
    chain.chat("hi", temperature=None, top_p=0.5)
    assert calls(chain, "a")[0]["kwargs"] == {"seed": 1, "top_p": 0.5, "timeout": 300.0}


def test_system_is_put_in_front(clock: FakeClock) -> None:
    """A str is one user message."""
    chain = chain_of(clock, tier("a", "x"))
    chain.chat("hi", system="be brief")
    assert calls(chain, "a")[0]["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]


# -- nesting


def test_a_chain_is_a_tier(clock: FakeClock) -> None:
    """Its attempts join the record, on success and on failure; costs add up; its failure counts."""
    paid = LLMResponse("x", usage=Usage(10**6, 0))
    inner = chain_of(clock, tier("x", ProviderUnavailable), tier("y", paid, prices=(3, 0)))
    outer = chain_of(clock, ProviderTier("in", inner), tier("b", "x"))
    response = outer.chat("hi")
    assert outcomes(response.attempts) == ["in/x:failed", "in/y:ok"]
    assert (response.provider, response.cost, response.total_usage) == ("in/y", 3.0, Usage(10**6, 0))
    for one in inner.tiers:
        one.breaker.open()
    response = outer.chat("hi")
    assert outcomes(response.attempts) == ["in/x:skipped", "in/y:skipped", "b:ok"]
    assert outer.tiers[0].breaker.snapshot().failures == 1
    assert list(inner.stream("hi", tiers=["y"])) if inner.reset() else True


def test_a_chain_streams_at_least_its_whole_answer(clock: FakeClock) -> None:
    """The default of every provider: the content as one delta."""
    chain = chain_of(clock, tier("a", "whole", LLMResponse(tool_calls=[ToolCall("1", "f", {})])))
    assert list(chain.stream("hi")) == ["whole"]
    assert list(chain.stream("hi")) == []


# -- bad input


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FailoverChain([]), "tiers is empty"),
        (lambda: FailoverChain("abc"), "give a list of ProviderTier"),
        (lambda: FailoverChain([scripted("x")]), r"tiers\[0\] is a ScriptedProvider"),
        (lambda: FailoverChain([tier("a", "x"), tier("a", "x")]), "'a' is taken"),
        (lambda: FailoverChain([tier("a", "x")], timeout=-1), "timeout=-1"),
        (lambda: FailoverChain([tier("a", "x")], wait=float("nan")), "wait=nan"),
        (lambda: FailoverChain([tier("a", "x")], timeout="5"), "timeout='5'"),
        (lambda: FailoverChain([tier("a", "x")], escalation_model="a-modle"), "Did you mean 'a-model'"),
        (lambda: FailoverChain([tier("a", "x")], escalation_marker=" "), "escalation_marker"),
        (lambda: ProviderTier("", scripted("x")), "give the tier a name"),
        (lambda: tier("a", "x", role="primry"), "Did you mean 'primary'"),
        (lambda: tier("a", "x", models="gpt"), r"models='gpt': give a list"),
        (lambda: tier("a", "x", models=["x", ""]), "every model is a non-empty str"),
        (lambda: tier("a", "x", retries=1.5), "retries=1.5"),
        (lambda: tier("a", "x", max_concurrency=0), "max_concurrency=0"),
        (lambda: tier("a", "x", prices=(1,)), "prices"),
        (lambda: tier("a", "x", prices={"m": (1, -2)}), "-2"),
        (lambda: tier("a", "x", breaker="on"), "breaker is a str"),
        (lambda: ProviderTier("a", ScriptedProvider), "provider is ScriptedProvider: give an object"),
        (lambda: ProviderTier("a", object()), "give an object with a chat"),
        (lambda: ScriptedProvider("text"), "script is a str"),
    ],
)
def test_bad_settings_are_refused_at_once(build: Any, message: str) -> None:
    """A ConfigError, which is a ValueError, naming the value and the cure."""
    with pytest.raises(ConfigError, match=message):
        build()


def test_a_chat_with_the_wrong_arguments_is_refused() -> None:
    """When the tier is built, not at the first outage."""

    class Old:
        def chat(self, prompt: str) -> str:
            return prompt

    with pytest.raises(ConfigError, match=r"chat\(\) of Old cannot be called .* write def chat"):
        ProviderTier("a", Old())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        (None, "messages is a NoneType"),
        ({"role": "user"}, "messages is a dict"),
        (["hi"], r"messages\[0\] is a str"),
        ([{"content": "hi"}], r"messages\[0\] has the role 'NoneType'"),
        ([{"role": "User", "content": "hi"}], "has the role 'User'"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": 5}], "content of type int"),
        ([{"role": "user", "content": ["hi"]}], "part that is no dict"),
    ],
)
def test_bad_messages_are_refused_before_anybody_is_asked(clock: FakeClock, messages: Any, message: str) -> None:
    """BadRequest, naming the place and never the text."""
    chain = chain_of(clock, tier("a", "x"))
    with pytest.raises(BadRequest, match=message):
        chain.chat(messages)
    assert not calls(chain, "a")


def test_scripts(clock: FakeClock) -> None:
    """All kinds of items; past the end a ConfigError, or from the start again."""
    called: list[Any] = []

    def answer(messages: Any, **kwargs: Any) -> str:
        called.append((messages, kwargs))
        return "called"

    provider = ScriptedProvider(["text", LLMResponse("made"), ["a", "b"], ServerError("x"), ServerError, answer, 5])
    assert provider.chat("q").text == "text"
    assert list(provider.stream("q")) == ["made"]
    assert provider.chat("q").text == "ab"
    for _ in range(2):
        with pytest.raises(ServerError):
            provider.chat("q")
    assert provider.chat("q", model="m", seed=1).text == "called"
    assert called == [("q", {"tools": None, "model": "m", "seed": 1})]
    with pytest.raises(ConfigError, match="script holds a int"):
        provider.chat("q")
    with pytest.raises(ConfigError, match="script of 7 items is over"):
        provider.chat("q")
    assert provider.calls[5] == {"messages": "q", "tools": None, "model": "m", "kwargs": {"seed": 1}}
    broken = ScriptedProvider([["par", ServerError("cut")], LLMResponse(tool_calls=[ToolCall("1", "f", {})])]).stream("q")
    assert next(broken) == "par"
    with pytest.raises(ServerError):
        next(broken)
    with pytest.raises(ConfigError):
        ScriptedProvider([], repeat=True).chat("q")


# -- data


def test_a_response_as_data() -> None:
    """message, to_dict, pickle and repr."""
    call = ToolCall("1", "f", {"a": 1})
    response = LLMResponse("secret text", [call, ToolCall("2", "g", None, "[1")], usage=Usage(1, 2),
        attempts=(Attempt("t", "m", "ok"),))
    assert response.message == {
        "role": "assistant",
        "content": "secret text",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
            {"id": "2", "type": "function", "function": {"name": "g", "arguments": "[1"}},
        ],
    }
    assert LLMResponse("x").message == {"role": "assistant", "content": "x"}
    plain = json.loads(json.dumps(response.to_dict()))
    assert plain["usage"]["prompt_tokens"] == 1
    assert plain["attempts"][0]["tier"] == "t"
    assert pickle.loads(pickle.dumps(response)) == response
    assert "secret" not in repr(response)
    assert response.has_tool_calls
    assert (LLMResponse().text, LLMResponse(usage=Usage(3)).total_usage) == ("", Usage(3))
    with pytest.raises(TypeError):
        Usage(1) + 1  # type: ignore[operator]


def test_explain_is_one_ascii_line() -> None:
    """Whatever the names are."""
    response = LLMResponse("x", attempts=(Attempt("Zür\nich", "m", "ok", latency=0.4124),), cost=0.00031)
    assert response.explain() == r"Z\xfcr ich: ok 412 ms $0.0003"


def test_errors_pickle() -> None:
    """With all their attributes; chains and breakers do not."""
    error = RateLimited("x", provider="p", model="m", status=429, code="c", retry_after=3.0, request_id="r")
    twin = pickle.loads(pickle.dumps(error))
    assert (str(twin), vars(twin)) == (str(error), vars(error))
    with pytest.raises(AllProvidersFailed) as failed:
        FailoverChain([tier("a", ProviderUnavailable("refused"))]).chat("hi")
    twin = pickle.loads(pickle.dumps(failed.value))
    assert (twin.retry_after, twin.attempts) == (failed.value.retry_after, failed.value.attempts)
    with pytest.raises(TypeError, match="cannot be copied"):
        pickle.dumps(FailoverChain([tier("a", "x")]))


def test_a_given_breaker_is_used_and_may_be_shared(clock: FakeClock) -> None:
    """A tier's own breaker wins; two chains with one tier share it; both hear of its changes."""
    breaker = CircuitBreaker(1, clock=clock, name="mine")
    shared = ProviderTier("a", scripted(ProviderUnavailable), breaker=breaker)
    heard: list[str] = []
    chains = [chain_of(clock, shared, tier(name, "x"), on_event=lambda event: heard.append(event.kind)) for name in "bc"]
    chains[0].chat("hi")
    assert chains[1].chat("hi").attempts[0].outcome == "skipped"
    assert heard.count("breaker") == 2
    assert re.search("mine is open", str(chains[1].chat("hi").attempts[0].error))


def test_a_tier_that_opens_during_the_pause_is_passed_over(clock: FakeClock) -> None:
    """Another thread saw it fail meanwhile."""
    chain = FailoverChain(
        [tier("a", ServerError), tier("b", "x")], clock=clock, sleep=lambda seconds: chain.tiers[0].breaker.open()
    )
    assert outcomes(chain.chat("hi").attempts) == ["a:failed", "a:skipped", "b:ok"]


def test_on_error_leaves_other_classes_alone(clock: FakeClock) -> None:
    """What it does not name goes by its own class."""
    chain = chain_of(clock, tier("a", KeyError, ServerError, "fine"), tier("b", "x"), on_error={BadRequest: "raise"})
    assert chain.chat("hi").provider == "b"
    assert outcomes(chain.chat("hi").attempts) == ["a:failed", "a:ok"]


def test_images_are_looked_for_once(clock: FakeClock) -> None:
    """Two tiers that take none; a text only is for everybody."""
    chain = chain_of(clock, tier("a", "x", supports_images=False), tier("b", "x", supports_images=False))
    with pytest.raises(UnsupportedRequest):
        chain.chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}])


def test_the_deadline_in_a_second_round_names_each_tier_once(clock: FakeClock) -> None:
    """Who failed before and was not asked again is not noted twice."""
    slow = Slow(clock, 5, ProviderUnavailable("refused"))
    chain = chain_of(clock, ProviderTier("a", slow), tier("b", ProviderUnavailable))
    with pytest.raises(DeadlineExceeded) as late:
        chain.chat("hi", timeout=10, wait=3)
    assert outcomes(late.value.attempts) == ["a:failed", "b:failed", "a:failed"]


def test_a_chat_without_a_signature_is_taken_as_it_is() -> None:
    """Some built-ins have none to look at."""

    class Odd:
        chat = staticmethod(min)

    assert ProviderTier("a", Odd()).name == "a"  # type: ignore[arg-type]


def test_a_tool_call_is_no_marker(clock: FakeClock) -> None:
    """An answer without text, with an escalation model."""
    answer = LLMResponse(tool_calls=[ToolCall("1", "f", {})])
    assert chain_of(clock, tier("a", answer), tier("b", "x"), escalation_model="b-model").chat("hi").has_tool_calls


# -- small print


def test_a_nested_chain_that_does_not_serve_a_model_is_passed_over(clock: FakeClock) -> None:
    """Its UnknownModel is its own view: the next tier is asked."""
    inner = FailoverChain([ProviderTier("i", ScriptedProvider(["inner"]), ["small"])])
    first, last = tier("a", ServerError, ServerError, models=["big"]), tier("c", "last", models=["c"])
    response = chain_of(clock, first, ProviderTier("nested", inner), last).chat("hi", model="big")
    assert response.text == "last"
    assert "ModelNotFound" in str(response.attempts[-2].error)


@pytest.mark.parametrize("rule", ["next", "raise"])
def test_on_error_rules_a_rate_limit_too(clock: FakeClock, rule: str) -> None:
    """It is not waited out: the tier is parked, and the next one asked or the error raised."""
    chain = chain_of(clock, tier("a", RateLimited("x", retry_after=1), "a"), tier("b", "b"), on_error={RateLimited: rule})
    if rule == "next":
        assert chain.chat("hi").text == "b"
    else:
        with pytest.raises(RateLimited):
            chain.chat("hi")
    assert clock.slept == []
    assert chain.tiers[0].breaker.retry_after == 1


def test_ping_needs_no_ping_of_a_provider() -> None:
    """A provider may be any object with chat(); the time is for all tiers together."""

    class Duck:
        def chat(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> LLMResponse:
            return LLMResponse("quack")

    FailoverChain([ProviderTier("duck", Duck())]).ping()  # type: ignore[arg-type]
    given: list[float] = []

    class Dead(ScriptedProvider):
        def ping(self, timeout: float = 5.0) -> None:
            given.append(timeout)
            raise ProviderUnavailable("dead")

    with pytest.raises(ProviderUnavailable):
        FailoverChain([ProviderTier("a", Dead([])), ProviderTier("b", Dead([]))]).ping(3.0)
    assert 0 < given[1] < given[0] <= 3.0


def test_chains_over_the_same_tiers_are_not_kept_alive() -> None:
    """A chain per request is a waste, but no leak; the chain that is left hears of its breakers."""
    shared = tier("a", ServerError)
    for _ in range(20):
        FailoverChain([shared])
    gc.collect()
    assert len(shared.breaker._watchers) == 0
    events: list[Event] = []
    chain = FailoverChain([shared], on_event=events.append)
    shared.breaker.open()
    assert [(event.kind, event.tier, event.data["new"]) for event in events] == [("breaker", "a", "open")]
    assert chain.tiers == (shared,)


def test_a_failure_with_a_foreign_exception_survives_pickling(clock: FakeClock) -> None:
    """Queues move errors between processes: what cannot be pickled is replaced by its name."""

    class Local(Exception):
        def __init__(self, one: str, two: str) -> None:
            super().__init__(one)

    with pytest.raises(AllProvidersFailed) as failed:
        chain_of(clock, tier("a", Local("x", "y")), tier("b", ServerError("down"), ServerError("down"))).chat("hi")
    copied = pickle.loads(pickle.dumps(failed.value))
    assert (type(copied), str(copied), copied.attempts) == (AllProvidersFailed, str(failed.value), failed.value.attempts)
    assert [type(error) for error in copied.errors] == [ProviderError, ServerError, ServerError]


def test_where_a_foreign_exception_arose_is_logged(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    """At DEBUG: its class, file and line, not its text; one without a traceback by its class alone."""

    class Faulty(LLMProvider):
        def chat(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> LLMResponse:
            raise KeyError("something private")

    with caplog.at_level(logging.DEBUG, "copilot_router"), pytest.raises(AllProvidersFailed):
        chain_of(clock, ProviderTier("mine", Faulty())).chat("hi")
    assert re.search(r"mine: KeyError in .*test_chain\.py, line \d+", caplog.text)
    assert "private" not in caplog.text
    assert _place(KeyError("x")) == "KeyError"


def test_an_answer_that_nobody_gets_is_not_logged_as_answered(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    """The weak answers gave up, and the call failed."""
    chain = chain_of(clock, tier("a", ProviderUnavailable), tier("b", "[ESCALATE] no"),
                     tier("c", ProviderUnavailable, models=["c"]), escalation_model="c")  # fmt: skip
    with caplog.at_level(logging.INFO, "copilot_router"), pytest.raises(EscalationFailed):
        chain.chat("hi")
    assert "answered" not in caplog.text


@pytest.mark.parametrize("name", ["first_token_timeout", "stall_timeout"])
def test_a_limit_that_is_no_number_opens_no_breaker(name: str) -> None:
    """The caller's own mistake is told at once."""
    provider = OpenAIProvider("test-key", "http://127.0.0.1:9/v1")
    chain = FailoverChain([ProviderTier("a", provider, ["m"])])
    for call in (chain.chat, lambda *args, **kwargs: provider.chat(*args, model="m", **kwargs)):
        with pytest.raises(ConfigError, match=name):
            call("hi", **{name: "5"})
    assert chain.tiers[0].breaker.snapshot().failures == 0


@pytest.mark.quiet
def test_all_of_it_without_anybody_watching(clock: FakeClock) -> None:
    """No event, no log: the same answers by the shorter way. A failover, a skip, a retry, a stream, a request over HTTP."""
    logging.getLogger("copilot_router").setLevel(logging.CRITICAL)
    try:
        chain = chain_of(clock, tier("a", ProviderUnavailable), tier("b", ServerError, "b", "stream"))
        assert chain.chat("hi").text == "b"
        chain.tiers[0].breaker.open()
        with chain.stream("hi") as stream:
            assert list(stream) == ["stream"]
        assert [attempt.outcome for attempt in stream.response.attempts] == ["skipped", "ok"]
        assert list(chain_of(clock, tier("c", "one")).stream("hi")) == ["one"]
        real = FailoverChain([ProviderTier("http", OpenAIProvider("test-key", closed_address()), ["m"])])
        with real, pytest.raises(AllProvidersFailed):
            real.chat("hi", timeout=5)
    finally:
        logging.getLogger("copilot_router").setLevel(logging.NOTSET)


def closed_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


@pytest.mark.parametrize("name", ["accept", "on_event"])
def test_a_callback_that_is_none_is_refused(name: str) -> None:
    """When the chain is built, not at the first answer."""
    with pytest.raises(ConfigError, match=f"{name}='text'"):
        FailoverChain([tier("a")], **{name: "text"})  # type: ignore[arg-type]


def test_an_interruption_while_waiting_for_a_place_gives_the_trial_back(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the queue of a full tier."""

    class Full:
        def get(self, *_: object) -> None:
            raise KeyboardInterrupt

    chain = chain_of(clock, tier("a", "x", max_concurrency=1))
    breaker = chain.tiers[0].breaker
    breaker.open(1)
    clock.advance(1)
    monkeypatch.setattr(chain.tiers[0], "_slots", Full())
    with pytest.raises(KeyboardInterrupt):
        chain.chat("hi")
    assert breaker.admit().is_trial


def test_a_stream_of_an_answer_without_text_has_no_delta() -> None:
    """A custom provider with chat() alone, which wants a tool called."""

    class Calls(LLMProvider):
        def chat(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> LLMResponse:
            return LLMResponse(tool_calls=[ToolCall("1", "f", {})])

    with FailoverChain([ProviderTier("a", Calls())]).stream("hi") as stream:
        assert list(stream) == []
    assert stream.response.has_tool_calls


@pytest.mark.parametrize("own", ["messages", "tools", "model", "timeout"])
def test_params_do_not_take_the_chains_own_arguments(own: str) -> None:
    """When the tier is built, not as a TypeError of its provider at each call."""
    with pytest.raises(ConfigError, match=f"params\\['{own}'\\]"):
        tier("a", "x", params={own: 1})
