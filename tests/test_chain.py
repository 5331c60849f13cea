"""The chain: who is asked, in which order, with what, and what the caller is told."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import logging
import math
import pickle
import re
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import requests
from support.fakes import (IMAGE, KEY, PROMPT, TOOL, ChatServer, Custom, Held, Limits, VirtualClock,
    Watched, calls, chain_of, chat_of, error_of, event, failures, in_threads, outcomes, scripted,
    stream_of, tier, whole)
from support.leaks import LeakWatch
from support.server import HEAD, Canned, reply, waits
from support.stores import Interrupted, at_each_line, in_a_thread, seconds_of

from copilot_router import (AllProvidersFailed, AnthropicProvider, Attempt, AuthenticationError,
    BadRequest, CircuitBreaker, CircuitOpen, ConfigError, ContentFiltered, ContextLengthExceeded,
    DeadlineExceeded, EmptyResponse, Event, FailoverChain, GeminiProvider, InvalidResponse,
    LLMResponse, MemoryStore, OllamaProvider, OpenAIProvider, Overloaded, ProviderError,
    ProviderTier, ProviderTimeout, ProviderUnavailable, QuotaExceeded, RateLimited, RouterError,
    ScriptedProvider, ServerError, ToolCall, UnknownModel, UnsupportedRequest, Usage)

LOGGER = "copilot_router"
MILLION = Usage(1_000_000, 0)


def about(seconds: float) -> Any:
    """The time for which a breaker that a chain made stays open: up to a quarter longer."""
    return pytest.approx(seconds * 1.125, rel=0.1112)


ASKED = [{"role": "user", "content": "hi"}]
CALLED = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
RESULTS = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [CALLED]},
    {"role": "tool", "tool_call_id": "1", "content": "done"}]


def both_ways(chain: FailoverChain, *args: Any, **options: Any) -> list[Callable[[], Any]]:
    """The same call as a whole answer and as a stream that is read to its end."""
    def streamed():
        with chain.stream(*args, **options) as stream:
            assert list(stream) == [stream.response.text] * bool(stream.response.text)
        return stream.response
    return [lambda: chain.chat(*args, **options), streamed]


# -- order and models
@pytest.mark.parametrize(("model", "asked"), [
    (None, "a=a1 any=None b=b-9 s=s1 e=smart"), ("smart", "b=b-9 a=a1 any=smart s=s1 e=smart"),
    ("b-9", "b=b-9 a=a1 any=b-9 s=s1 e=smart"), ("a2", "a=a2 any=a2 b=b-9 s=s1 e=smart"),
    ("s1", "s=s1 a=a1 any=s1 b=b-9 e=smart"), ("new", "a=a1 any=new b=b-9 s=s1 e=smart")])
def test_tiers_are_asked_by_role_and_a_named_model_moves_its_tiers_forward(clock, model, asked):
    models = {"e": ["smart"], "s": ["s1"], "a": ["a1", "a2"], "any": [], "b": {"smart": "b-9"}}
    chain = chain_of(clock, *(tier(name, ProviderUnavailable, models=models[name], role=role)
        for name, role in zip(models, ["emergency", "secondary", *["primary"] * 3], strict=True)))
    attempts = error_of(AllProvidersFailed, chain.chat, "hi", model=model).attempts
    assert " ".join(f"{one.tier}={one.model or None}" for one in attempts) == asked
    sent = [f"{one.tier}={calls(chain, one.tier)[0]['model']}" for one in attempts]
    assert " ".join(sent) == asked


def test_an_unknown_model_names_the_near_misses_and_the_known_ones(clock):
    chain = chain_of(clock, tier("a", "x", models=["gpt-6-luna", "haiku"]), tier("b", "x"))
    error_of(UnknownModel, chain.chat, "hi", model="gpt6-luna", match="Did you mean 'gpt-6-luna'")
    unknown = error_of(UnknownModel, chain.stream, "hi", model="zzz")
    assert all(name in str(unknown) for name in ("gpt-6-luna", "haiku", "b"))
    many = [f"model-{number:02}" for number in range(30)]
    with pytest.raises(UnknownModel) as unknown:
        chain_of(clock, tier("a", "x", models=many)).chat("hi", model="zzz")
    assert sum(name in str(unknown) for name in many) == 10
    error_of(ConfigError, chain.chat, "hi", model="", match="model=''")
    assert not calls(chain, "a")


def test_tiers_restricts_strictly(clock):
    chain = chain_of(clock, tier("local", ServerError), tier("cloud", "x"))
    error_of(AllProvidersFailed, chain.chat, "hi", tiers=["local"])
    error_of(UnknownModel, chain.chat, "hi", tiers=["local"], model="cloud", match="Known: local$")
    assert not calls(chain, "cloud")
    error_of(ConfigError, chain.chat, "hi", tiers=["clod"], match=r"'clod'.*Did you mean 'cloud'")
    for wrong in ("local", [], 5, [5]):
        error_of(ConfigError, chain.chat, "hi", tiers=wrong, match="give a list|no tier is")


def test_a_tier_that_cannot_serve_the_request_is_skipped(clock):
    tiers = tier("blind", "a", supports_images=False), tier("b", "b", supports_tools=False)
    chain = chain_of(clock, *tiers)
    response = chain.chat(IMAGE)
    assert outcomes(response.attempts) == ["blind:skipped", "b:ok"]
    skipped = response.attempts[0]
    assert (skipped.model, skipped.latency) == ("blind", 0.0)
    assert (skipped.error or "").startswith("UnsupportedRequest")
    assert chain.chat("hi").provider == "blind" and chain.chat("hi", [TOOL]).provider == "blind"
    unable = error_of(UnsupportedRequest, chain.chat, IMAGE, [TOOL])
    assert "blind takes no images" in str(unable) and "b takes no tools" in str(unable)
    for part in ({"type": "input_image", "image_url": "data:,x"}, {"type": "image", "source": {}}):
        content = [{"type": "text", "text": "look"}, part]
        assert chain.chat([{"role": "user", "content": content}]).provider == "b"
        assert chain.chat([{"role": "user", "content": content[:1]}]).provider == "blind"
    chain.tiers[0].breaker.open(60)  # one is open and the other one is unable: time may help
    error_of(AllProvidersFailed, chain.chat, "hi", [TOOL])


# -- once more on the same tier
@pytest.mark.parametrize(("retries", "requests"), [(0, 1), (1, 2), (2, 3), (5, 3)])
@pytest.mark.parametrize("kind", [ServerError, Overloaded])
def test_a_server_error_is_tried_again_until_the_breaker_opens(clock, kind, retries, requests):
    chain = chain_of(clock, tier("a", kind, retries=retries), tier("b", "x"))
    chain.chat("hi")
    assert len(calls(chain, "a")) == failures(chain) == requests
    assert len(clock.slept) == requests - 1 and all(0.1 <= pause <= 0.3 for pause in clock.slept)
    assert (chain.chat("hi").attempts[0].outcome == "skipped") == (requests == 3)


def test_a_tier_that_another_thread_opens_during_the_pause_is_passed_over():
    tiers = [tier("a", ServerError), tier("b", "x")]
    chain = FailoverChain(tiers, sleep=lambda seconds: tiers[0].breaker.open())
    assert outcomes(chain.chat("hi").attempts) == ["a:failed", "a:skipped", "b:ok"]


def test_retry_after_of_a_server_error_replaces_the_pause_or_parks(clock):
    errors = ServerError("x", retry_after=1.5), ServerError("x", retry_after=40)
    chain = chain_of(clock, tier("a", *errors), tier("b", "x"))
    chain.chat("hi")
    assert clock.slept == [1.5] and chain.tiers[0].breaker.retry_after == 40
    for seconds, state in ((2.0, "closed"), (2.5, "open")):
        chain = chain_of(clock, tier("a", ServerError("x", retry_after=seconds), retries=0))
        failed = error_of(AllProvidersFailed, chain.chat, "hi")
        assert (chain.tiers[0].breaker.state, failed.retry_after) == (state, seconds)


def test_a_short_retry_after_of_a_rate_limit_is_waited_out_once(clock):
    """It is neutral the first time, and the second 429 parks the tier."""
    limited = RateLimited("x", retry_after=2.0)
    chain = chain_of(clock, tier("a", limited, "fine", limited, limited), tier("b", "x"))
    assert chain.chat("hi").provider == "a" and clock.slept == [2.0]
    assert chain.tiers[0].breaker.is_closed
    assert outcomes(chain.chat("hi").attempts) == ["a:failed", "a:failed", "b:ok"]
    assert chain.tiers[0].breaker.retry_after == 2.0


@pytest.mark.parametrize("error", [RateLimited, ServerError])
@pytest.mark.parametrize("timeout", [1.0, 2.0])
def test_a_pause_that_does_not_end_before_the_deadline_is_not_begun(clock, error, timeout):
    chain = chain_of(clock, tier("a", error("x", retry_after=2)), tier("b", "x"))
    assert chain.chat("hi", timeout=timeout).provider == "b" and not clock.slept


# -- parks
@pytest.mark.parametrize(("error", "seconds"), [
    (RateLimited("x", retry_after=30), 30), (RateLimited("x", retry_after=9999), 3600),
    (RateLimited("x"), about(15)), (QuotaExceeded("x", retry_after=100), 100),
    (QuotaExceeded("x", retry_after=1), about(60)), (QuotaExceeded("x"), about(60)),
    (AuthenticationError("x"), about(15))])
def test_a_parked_tier_is_asked_once_and_rests(clock, error, seconds):
    chain = chain_of(clock, tier("a", error), tier("b", "x"))
    for call in (*both_ways(chain, "hi"), *both_ways(chain, "hi")):
        call()
    assert len(calls(chain, "a")) == 1 and not clock.slept
    assert chain.tiers[0].breaker.retry_after == seconds


def test_breakers_of_a_chain_without_a_store_do_not_open_in_step(clock):
    """Their open time, also of long parks, is up to a quarter longer; with a store it is exact."""
    def opened(error=ProviderUnavailable, **settings):
        chain = chain_of(clock, tier("a", error), failure_threshold=1, **settings)
        error_of(AllProvidersFailed, chain.chat, "hi")
        return chain.tiers[0].breaker.retry_after
    times = {opened() for _ in range(50)}
    assert len(times) > 10 and all(seconds == about(15) for seconds in times)
    assert opened(store=MemoryStore()) == pytest.approx(15, abs=0.1)
    assert opened(AuthenticationError, recovery_timeout=2) == about(2)


def test_all_parked_fails_at_once_with_the_earliest_return(clock):
    first, second = RateLimited("x", retry_after=30), RateLimited("x", retry_after=20)
    chain = chain_of(clock, tier("a", first), tier("b", second))
    for call in (*both_ways(chain, "hi"), *both_ways(chain, "hi")):
        failed = error_of(AllProvidersFailed, call)
        assert failed.retry_after == 20
    assert [type(error) for error in failed.errors] == [CircuitOpen, CircuitOpen]
    assert failed.errors[0].retry_after == 30 and failed.__cause__ is failed.errors[0]
    assert outcomes(failed.attempts) == ["a:skipped", "b:skipped"]


@pytest.mark.parametrize(("error", "hint"), [
    (AuthenticationError("x"), None), (QuotaExceeded("x"), None),
    (QuotaExceeded("x", retry_after=100), 100), (RateLimited("x"), about(15))])
def test_a_long_park_gives_no_hint_unless_the_server_named_one(clock, error, hint):
    """Waiting does not help against a wrong key: nobody is told to, and ``wait`` does not."""
    chain = chain_of(clock, tier("a", error))
    for _ in range(2):
        failed = error_of(AllProvidersFailed, chain.chat, "hi", wait=60 if hint is None else 0)
        assert failed.retry_after == hint
    assert not clock.slept
    chain = chain_of(clock, tier("a", error), tier("b", RateLimited("x", retry_after=7)))
    assert error_of(AllProvidersFailed, chain.chat, "hi").retry_after == 7


# -- what is raised, and what passes
@pytest.mark.parametrize("kind", [BadRequest, ContextLengthExceeded, UnsupportedRequest])
def test_a_neutral_class_that_holds_for_all_is_raised_itself(clock, kind):
    chain = chain_of(clock, tier("a", kind("x")), tier("b", kind("y")))
    for call in both_ways(chain, "hi", wait=100):
        assert outcomes(error_of(kind, call).attempts) == ["a:failed", "b:failed"]
    assert failures(chain, 0) == failures(chain, 1) == 0
    chain.tiers[0].breaker.open(60)  # what was asked decides
    error_of(kind, chain.chat, "hi")


def test_mixed_failures_name_every_tier(clock):
    """Failures of one tier that are the same are said once, with their number."""
    chain = chain_of(clock, tier("a", BadRequest("odd")), tier("b", ProviderUnavailable("refused")))
    failed = error_of(AllProvidersFailed, chain.chat, "hi")
    assert re.search("a: BadRequest: odd.*b: ProviderUnavailable: refused", str(failed))
    assert [type(error) for error in failed.errors] == [BadRequest, ProviderUnavailable]
    assert all(error.__traceback__ is None for error in failed.errors) and failed.retry_after == 1.0
    same = tier("a", ServerError("boom"), retries=4)
    chain = chain_of(clock, same, tier("b", ProviderUnavailable("refused")), failure_threshold=99)
    failed = error_of(AllProvidersFailed, chain.chat, "hi")
    assert str(failed).count("boom") == 1 and re.search(r"a: .*boom.*\b5\b.*b: ", str(failed))
    assert len(failed.attempts) == 6
    different = chain_of(clock, tier("a", ServerError("one"), ServerError("two")))
    error_of(AllProvidersFailed, different.chat, "hi", match=r"one.*two")


def test_on_error_takes_the_nearest_class(clock):
    policy = {ProviderError: "raise", ServerError: "next", KeyError: "raise"}
    items = ServerError, BadRequest, KeyError, ValueError, RateLimited("x", retry_after=1)
    chain = chain_of(
        clock, tier("a", *items, retries=3), tier("b", "x"), on_error=policy, failure_threshold=99)
    assert chain.chat("hi").provider == "b"
    for kind in (BadRequest, KeyError):
        error_of(kind, chain.chat, "hi")
    assert chain.chat("hi").provider == "b"
    error_of(RateLimited, chain.chat, "hi")
    assert chain.tiers[0].breaker.retry_after == 1 and not clock.slept
    chain = chain_of(clock, tier("a", ServerError, "x"), on_error={BadRequest: "raise"})
    assert outcomes(chain.chat("hi").attempts) == ["a:failed", "a:ok"]


def test_a_refusal_by_a_safety_system_is_raised_at_once(clock):
    tiers = tier("a", ContentFiltered("no")), tier("b", "x", role="emergency")
    for call in both_ways(chain_of(clock, *tiers), "hi"):
        assert outcomes(error_of(ContentFiltered, call).attempts) == ["a:failed"]
    assert chain_of(clock, *tiers, on_error={ContentFiltered: "next"}).chat("hi").provider == "b"


@pytest.mark.parametrize("kind", [
    AssertionError, MemoryError, RecursionError, KeyboardInterrupt, GeneratorExit, ConfigError])
def test_what_is_not_the_providers_fault_passes_through(clock, kind):
    chain = chain_of(clock, tier("a", kind, kind, "fine", max_concurrency=1), tier("b", "x"))
    chain.tiers[0].breaker.open(5)
    clock.advance(5)
    for call in both_ways(chain, "hi"):
        error_of(kind, call)
    assert not calls(chain, "b") and failures(chain) == 0 and chain.chat("hi").provider == "a"
    assert chain.tiers[0].breaker.is_closed


@pytest.mark.parametrize(("module", "name"), [
    ("billiard.exceptions", "SoftTimeLimitExceeded"), ("rq.timeouts", "BaseTimeoutException")])
def test_the_limits_of_task_queues_pass_through_everywhere(monkeypatch, module, name):
    """Providers, pings, listeners and stores may all be interrupted by one."""
    limit = type(name, (Exception,), {})
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{name: limit}))
    def over(*_, **__):
        raise limit
    store, pinged, open_still = MemoryStore(), Pinged(["x"]), types.SimpleNamespace(chat=over)
    open_still.stream = lambda *_, **__: types.SimpleNamespace(close=over)
    store.load, pinged.error = over, limit()
    for step in (*both_ways(FailoverChain([tier("a", limit), tier("b", "x")]), "hi"),
        lambda: list(FailoverChain([ProviderTier("a", open_still)]).stream("hi")),
        lambda: FailoverChain([tier("a", "x")], on_event=over).chat("hi"),
        lambda: CircuitBreaker(on_change=over).open(),
        lambda: CircuitBreaker(name="x", store=store).admit(),
        *(getattr(FailoverChain([ProviderTier("a", pinged)]), name) for name in ("check", "ping"))):
        error_of(limit, step)


def test_a_foreign_exception_fails_over_and_is_logged_with_its_place_once(caplog):
    def faulty(again=False, **_):
        if again:
            raise KeyError("something private")
        raise ValueError("something private")
    tiers = ProviderTier("mine", Custom(faulty)), tier("b", ServerError, "x")
    chain = FailoverChain(tiers, failure_threshold=9)
    for call in (*both_ways(chain, "hi"), *both_ways(chain, "hi", again=True)):
        assert call().attempts[0].error in ("ValueError", "KeyError")
    told = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    places = [text for text in told if re.search(r"test_chain\.py\D+\d+", text)]
    assert re.findall("ValueError|KeyError", " ".join(places)) == ["ValueError", "KeyError"]
    assert "private" not in caplog.text
    errors = error_of(AllProvidersFailed, chain.chat, "hi", tiers=["mine"]).errors
    assert traceback.extract_tb(errors[0].__traceback__)[-1].name == "faulty"  # it may be debugged


@pytest.mark.parametrize("answer", [None, "text", {"content": "x"}])
def test_a_provider_that_returns_something_else_is_a_config_error(clock, answer):
    chain = chain_of(clock, ProviderTier("w", Custom(lambda **_: answer)))
    for call in both_ways(chain, "hi"):
        error_of(ConfigError, call, match=r"tier 'w': Custom returned .*LLMResponse")
    given = types.SimpleNamespace(chat=chain.chat, stream=lambda *_, **__: iter([5]))
    chain = chain_of(clock, ProviderTier("w", given))
    error_of(ConfigError, chain.stream, "hi", match=r"tier 'w': a stream gave a int: yield str")


@pytest.mark.parametrize(("messages", "response", "kind", "counted"), [
    (ASKED, LLMResponse(""), EmptyResponse, 1), (ASKED, LLMResponse(" \n"), EmptyResponse, 1),
    (ASKED, LLMResponse(finish_reason="length"), EmptyResponse, 0),
    (RESULTS, LLMResponse(""), EmptyResponse, 0), (RESULTS, LLMResponse(None), EmptyResponse, 0),
    ([*RESULTS, *ASKED], LLMResponse(""), EmptyResponse, 1),
    (ASKED, LLMResponse(finish_reason="content_filter"), ContentFiltered, 0)])
@pytest.mark.parametrize("way", [0, 1], ids=["chat", "stream"])
def test_an_empty_answer_is_no_answer(clock, messages, response, kind, counted, way):
    """One that was cut by its length, or that follows tool results, says nothing of the tier."""
    response.request_id = "r-1"
    chain = chain_of(clock, tier("a", response))
    error: Any = error_of(RouterError, both_ways(chain, messages)[way])
    error = error.errors[0] if counted else error  # a neutral one is raised itself
    assert isinstance(error, kind) and error.request_id == "r-1" and failures(chain) == counted
    if kind is EmptyResponse:
        assert chain_of(clock, tier("a", response), tier("b", "x")).chat(messages).provider == "b"


# -- reading a built-in provider's answer
@pytest.mark.parametrize("error", [MemoryError(), RecursionError()], ids=lambda one: repr(one)[:6])
@pytest.mark.parametrize("kind", [
    OpenAIProvider, AnthropicProvider, GeminiProvider, OllamaProvider])
@pytest.mark.parametrize("way", [0, 1], ids=["chat", "stream"])
def test_too_little_memory_while_an_answer_is_read_fails_over(error, kind, way):
    session = requests.Session()
    session.mount("http://", canned := Canned())
    canned.pieces = [error]
    given = {} if kind is OllamaProvider else {"api_key": KEY}
    provider = kind(base_url="http://127.0.0.1:9", session=session, **given)
    chain = FailoverChain([ProviderTier("a", provider, ["m"], retries=0), tier("b", "x")])
    both_ways(chain, "hi")[way]()
    assert failures(chain) == 1 and len(calls(chain, "b")) == 1
    assert (chain.health()[0].last_error or "").startswith("InvalidResponse")


# -- emergency and waiting
def test_emergency_is_asked_even_while_open_unless_forced(clock):
    chain = chain_of(clock, tier("a", ProviderUnavailable), tier("e", "x", role="emergency"))
    chain.tiers[1].breaker.open(100)
    assert chain.chat("hi").provider == "e" and chain.tiers[1].breaker.is_open
    chain.tiers[1].breaker.open()
    error_of(AllProvidersFailed, chain.chat, "hi", match="e is open until reset")


def test_wait_sleeps_until_a_tier_is_ready(clock):
    limited = RateLimited("x", retry_after=50)
    assert chain_of(clock, tier("a", limited, "x"), timeout=10).chat("hi", wait=50).text == "x"
    assert clock.slept == [50]
    chain = chain_of(clock, tier("a", limited), wait=120)
    failed = error_of(AllProvidersFailed, chain.chat, "hi")
    assert clock.slept == [50, 50, 50] and outcomes(failed.attempts) == ["a:failed"] * 3
    clock.slept.clear()
    failing = chain_of(clock, tier("a", ProviderUnavailable), failure_threshold=99)
    error_of(AllProvidersFailed, failing.chat, "hi", wait=30)
    assert clock.slept == [1, 2, 4, 8, 8]


@pytest.mark.parametrize(("error", "options"), [(RateLimited("x", retry_after=50), {"wait": 49}),
    (RateLimited("x", retry_after=50), {"wait": 100, "timeout": 20}),
    (RateLimited("x", retry_after=50), {"wait": 100, "timeout": 50}),
    (BadRequest("x"), {"wait": 100}), (AuthenticationError("x"), {"wait": 100})])
def test_a_wait_that_does_not_fit_or_help_is_not_begun(clock, error, options):
    chain = chain_of(clock, tier("a", error))
    error_of(RouterError, chain.chat, "hi", **options)
    chain.tiers[0].breaker.open()
    failed = error_of(AllProvidersFailed, chain.chat, "hi", wait=100)
    assert failed.retry_after is None and not clock.slept


@pytest.mark.parametrize("error", [
    RateLimited("x", retry_after=0), RateLimited("x", retry_after=0.001),
    Overloaded("x", retry_after=0), ServerError("x"), ProviderUnavailable("x")])
@pytest.mark.parametrize("way", [0, 1], ids=["chat", "stream"])
@pytest.mark.parametrize("recovery", [0.01, 15])
def test_naps_grow_and_have_a_floor(clock, error, way, recovery):
    naps: list[float] = []
    def listen(event):
        if event.kind == "wait":
            naps.append(event.data["seconds"])
    one = tier("a", error)
    chain = chain_of(clock, one, on_event=listen, recovery_timeout=recovery)
    error_of(AllProvidersFailed, both_ways(chain, "hi", wait=30, timeout=60)[way])
    assert 2 <= len(naps) <= 20 and len(calls(chain, "a")) <= 41 and naps[0] >= 0.1
    assert max(naps) > naps[0] or naps[0] >= 5
    assert sum(naps) <= 30.001


def test_a_tier_that_cannot_help_makes_no_nap_longer(clock):
    for other in (tier("a", "x", supports_tools=False), tier("a", ContextLengthExceeded)):
        breaker = CircuitBreaker(1, 15, clock=clock)
        chain = chain_of(clock, other, tier("b", ServerError, retries=0, breaker=breaker))
        error_of(AllProvidersFailed, chain.chat, "hi", tools=[TOOL], wait=70)
        assert clock.slept == [15] * 4
        clock.slept.clear()


# -- the deadline
def slow(clock: VirtualClock, seconds: Any, error: Exception, given: Any = None) -> Custom:
    """A provider that takes its time (None: all of it), by the clock, and then fails."""
    def late(timeout, **_):
        if given is not None:
            given.append(timeout)
        clock.advance(timeout if seconds is None else seconds)
        raise error
    return Custom(late)


def test_the_deadline_covers_all_tiers(clock):
    """What is left shrinks, a tier's own timeout is an upper limit, who was not asked is named."""
    given: list[float] = []
    one, two = (slow(clock, took, ProviderTimeout("slow"), given) for took in (4, 7))
    tiers = ProviderTier("a", one), ProviderTier("b", two, timeout=100), tier("c", "x")
    late = error_of(DeadlineExceeded, chain_of(clock, *tiers).chat, "hi", timeout=10)
    assert isinstance(late, TimeoutError) and given == [10, 6]
    assert outcomes(late.attempts) == ["a:failed", "b:failed", "c:skipped"]
    assert len(late.errors) == 3
    chain = chain_of(clock, tier("a", "x", timeout=3))
    for call in both_ways(chain, "hi"):
        call()
    assert [call["kwargs"] for call in calls(chain, "a")] == [{"timeout": 3}] * 2


def test_without_any_time_nobody_is_asked_and_all_are_named(clock):
    chain = chain_of(clock, *(tier(name, "x") for name in "abc"))
    for call in both_ways(chain, "hi", timeout=0):
        late = outcomes(error_of(DeadlineExceeded, call).attempts)
        assert late == ["a:skipped", "b:skipped", "c:skipped"]
    assert not calls(chain, "a")


def test_a_tier_is_not_asked_when_the_breakers_store_took_the_time(clock):
    store = MemoryStore()
    load, store.load = store.load, lambda name: (clock.advance(2.0), load(name))[1]
    breaker = CircuitBreaker(store=store, name="a", clock=clock)
    chain = chain_of(clock, tier("a", "x", breaker=breaker), tier("b", "x"))
    late = error_of(DeadlineExceeded, chain.chat, "hi", timeout=1)
    assert outcomes(late.attempts) == ["a:skipped", "b:skipped"] and not calls(chain, "a")
    assert breaker.is_closed


@pytest.mark.parametrize(("limit", "before", "code", "counted"), [
    (10, 0, None, 1), (10, 0, "attempt_timeout", 1), (5, 0, "attempt_timeout", 1),
    (4.9, 0, "attempt_timeout", 0), (10, 6, "attempt_timeout", 0), (3, 0, "first_token_timeout", 1),
    (3, 0, "stall_timeout", 1), (4.9, 0, TimeoutError("x"), 0), (5, 0, TimeoutError("x"), 1)])
def test_an_attempt_ended_by_the_deadline_counts_from_five_seconds_on(clock, limit, before, code,
        counted):
    """``before``: what an earlier tier took. A silence that reached its limit counts."""
    first = ProviderTier("a", slow(clock, before, ProviderUnavailable("x")))
    error = code if isinstance(code, Exception) else ProviderTimeout("x", code=code)
    second = ProviderTier("b", slow(clock, None, error))
    chain = chain_of(clock, first, second, tier("c", "x"))
    error_of(DeadlineExceeded, chain.chat, "hi", timeout=limit)
    assert failures(chain, 1) == counted


def test_a_deadline_reached_in_a_second_round(clock):
    first = ProviderTier("a", slow(clock, 5, ProviderUnavailable("x")))
    chain = chain_of(clock, first, tier("b", ServerError))
    late = error_of(DeadlineExceeded, chain.chat, "hi", timeout=10, wait=4)
    assert outcomes(late.attempts).count("a:failed") == 2
    assert "b:skipped" not in outcomes(late.attempts)
    chain = chain_of(clock, ProviderTier("a", slow(clock, 17, ProviderUnavailable("x"))))
    late = error_of(DeadlineExceeded, chain.chat, "hi", timeout=17, wait=43)
    assert "17" in str(late) and "43" in str(late)


# -- silence
def test_silence_limits_are_five_times_as_long_where_patience_is_due(clock):
    """They never take more than half of the time that is left while a later tier is ready."""
    provider = Limits()
    first = ProviderTier("a", provider, ["m", "other"])
    chain = chain_of(clock, first, tier("b", "x"))
    emergency = chain_of(clock, first, tier("e", "x", role="emergency"))
    def patience(chain=chain, **options):
        for call in both_ways(chain, "hi", **options):
            call()
        assert provider.seen[-2] == provider.seen[-1]
        return provider.seen[-1]
    for patient, options in (
            ((12, 20), {}), ((12, 15), {"timeout": 30}), ((60, 100), {"model": "m"}),
            ((60, 100), {"reasoning_effort": "high"}), ((60, 100), {"tiers": ["a"]}),
            ((5, 20), {"first_token_timeout": 5}), ((12, 3), {"stall_timeout": 3})):
        assert patience(**options) == patient
    emergency.tiers[1].breaker.open(100)
    assert patience(emergency) == (12, 20)  # an emergency tier is ready, unless forced
    emergency.tiers[1].breaker.open()
    assert patience(emergency) == (60, 100)
    chain.tiers[1].breaker.open(100)
    assert patience() == (60, 100)
    clock.advance(100)
    assert patience() == (12, 20)  # the other tier's trial is due


@pytest.mark.parametrize(("thinking", "learned"), [
    (LLMResponse("x", usage=Usage(5, 60, reasoning_tokens=50)), True),
    (LLMResponse("x", reasoning="hm"), True), (LLMResponse("x", usage=Usage(5, 60)), False)])
@pytest.mark.parametrize("way", [0, 1], ids=["chat", "stream"])
def test_a_model_that_thinks_gets_five_times_the_silence(clock, thinking, learned, way):
    provider = Limits(thinking)
    chain = chain_of(clock, ProviderTier("a", provider, ["m"]), tier("b", "x"))
    for _ in range(3):
        both_ways(chain, "hi")[way]()
    later = (60, 100) if learned else (12, 20)
    assert provider.seen == [(12, 20), later, later]


# -- options
def test_params_lie_under_the_calls_own_options(clock):
    chain = chain_of(clock, tier("a", "x", params={"temperature": 0.2, "seed": 1, "odd": 3}))
    for call in both_ways(chain, "hi", temperature=None, top_p=0.5):
        call()
        sent = calls(chain, "a")[-1]["kwargs"]
        assert sent == {"seed": 1, "top_p": 0.5, "odd": 3, "timeout": 300.0}


def test_system_is_put_in_front_and_nothing_given_is_modified(clock):
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    tools, answer = [TOOL], LLMResponse("[ESCALATE] no")
    before = copy.deepcopy((messages, tools, answer))
    chain = chain_of(clock, tier("a", answer), tier("b", "x"), escalation_model="b")
    response = chain.chat(messages, tools, system="be brief")
    assert (messages, tools, answer) == before and response is not answer
    list(chain.stream(messages, tools, system="be brief"))
    system = {"role": "system", "content": "be brief"}
    asked = [(call["messages"], call["tools"]) for call in calls(chain, "b")]
    assert asked == [([system, *messages], tools)] * 2
    inner = chain_of(clock, tier("i", "x"))  # a chain takes one from its tier
    chain_of(clock, ProviderTier("in", inner, params={"system": "be brief"})).chat("hi")
    assert calls(inner, "i")[0]["messages"][0] == system


def test_a_custom_provider_sees_plain_messages():
    answer = HEAD + event("x", reasoning_content="hm") + event(finish="stop")
    with ChatServer(answer) as server:
        kept = FailoverChain([server.tier()]).chat("hi").message
        client = OpenAIProvider(KEY, server.url)  # in a wrapper of the user's
        counted = type("Counted", (), {"__getattr__": lambda _, name: getattr(client, name)})()
        FailoverChain([ProviderTier("a", counted, ["m"])]).chat([*ASKED, kept, *ASKED])
        assert server.bodies[1]["messages"][1]["reasoning_content"] == "hm"
    provider = scripted("x")
    for given in (provider, types.SimpleNamespace(chat=provider.chat)):
        FailoverChain([ProviderTier("a", given)]).chat([*ASKED, kept, *ASKED])
        plain = {"role": "assistant", "content": "x"}
        assert provider.calls.pop()["messages"] == [*ASKED, plain, *ASKED]


@pytest.mark.parametrize(("options", "kind", "match"), [
    ({"temprature": 1}, TypeError, r"temprature.*\btemperature\b"),
    ({"max_token": 1}, TypeError, r"max_token.*\bmax_tokens\b"),
    ({"first_token_timout": 1}, TypeError, r"first_token_timout.*\bfirst_token_timeout\b"),
    ({"stall_timeouts": 1}, TypeError, r"stall_timeouts.*\bstall_timeout\b"),
    ({"timout": 1}, TypeError, r"timout.*\btimeout\b"),
    ({"first_token_timeout": "5"}, ConfigError, "first_token_timeout"),
    ({"timeout": -1}, ConfigError, "timeout=-1"),
    ({"stall_timeout": "5"}, ConfigError, "stall_timeout")])
def test_a_bad_option_is_refused_before_anybody_is_asked(options, kind, match):
    provider = OpenAIProvider(KEY, "http://127.0.0.1:9/v1")
    chain = FailoverChain([ProviderTier("a", provider, ["m"]), tier("b", "x")])
    for call in both_ways(chain, "hi", **options):
        error = error_of(kind, call, match=match)
        assert type(error).__name__ == kind.__name__
        assert type(pickle.loads(pickle.dumps(error))) is kind
    assert not calls(chain, "b") and failures(chain) == 0


@pytest.mark.parametrize(("messages", "message"), [
    ([], "messages is empty"), (None, "messages is a NoneType"),
    ({"role": "user"}, "messages is a dict"), (["hi"], r"messages\[0\] is a str"),
    ([{"content": "hi"}], r"messages\[0\] has the role 'NoneType'"),
    ([{"role": "User", "content": "hi"}], "has the role 'User'"),
    ([{"role": "user"}], "no content"), ([{"role": "user", "content": 5}], "content of type int"),
    ([{"role": "user", "content": ["hi"]}], "part that is no dict")])
def test_bad_messages_are_refused_before_anybody_is_asked(clock, messages, message):
    chain = chain_of(clock, tier("a", "x"))
    for call in (chain.chat, chain.stream):
        error_of(BadRequest, call, messages, match=message)
    error_of(BadRequest, chain.chat, "hi", system={"text": "brief"}, match="content of type dict")
    assert not calls(chain, "a")


async def unawaited(_: Any) -> bool:
    return False


@pytest.mark.parametrize(("settings", "message"), [
    ({"timeout": -1}, "timeout=-1"), ({"wait": math.nan}, "wait=nan"),
    ({"timeout": "5"}, "timeout='5'"), ({"escalation_model": "aple"}, "Did you mean 'apple'"),
    ({"escalation_model": 5}, "escalation_model=5"), ({"escalation_marker": " "}, "_marker"),
    ({"escalation_marker": "**"}, "_marker"), ({"escalation_prompt": 5}, "escalation_prompt=5"),
    ({"accept": "x"}, "accept='x'"), ({"on_event": 5}, "on_event=5"), ({"clock": 5}, "clock=5"),
    ({"accept": unawaited}, "async"),
    ({"sleep": None}, "sleep=None"), ({"escalation_model": [5]}, "escalation_model=.5.: give"),
    ({"on_error": {"x": "next"}}, "no exception class"), ({"on_error": [KeyError]}, "on_error"),
    ({"on_error": {KeyError: "again"}}, "'next' or 'raise'")])
def test_bad_settings_of_a_chain_are_refused_at_once(settings, message):
    told = error_of(ConfigError, FailoverChain, [tier("apple", "x")], match=message, **settings)
    assert str(told).startswith(next(iter(settings)))


@pytest.mark.parametrize(("settings", "message"), [
    ({"role": "primry"}, "Did you mean 'primary'"), ({"models": "gpt"}, "models='gpt': give a"),
    ({"role": None}, "role=None"),
    ({"models": ["x", ""]}, "every model is a non-empty str"), ({"retries": 1.5}, "retries=1.5"),
    ({"timeout": -1}, "timeout=-1"), ({"retries": -1}, "retries=-1"),
    *(({"max_concurrency": value}, "max_concurrency=") for value in (0, 1.5, True)),
    ({"prices": (1,)}, "prices"), ({"prices": (1, 2, 3, 4, 5)}, "prices"),
    ({"prices": {"m": (1, -2)}}, "-2"), ({"prices": {"m": "12"}}, r"prices\['m'\]"),
    ({"params": [1]}, "params is a list"), ({"breaker": "on"}, "breaker is a str"),
    *(({"params": {own: 1}}, own) for own in ("messages", "tools", "model", "timeout"))])
def test_bad_settings_of_a_tier_are_refused_at_once(settings, message):
    told = error_of(ConfigError, tier, "a", "x", match=message, **settings)
    assert str(told).startswith(f"tier 'a': {next(iter(settings))}")


@pytest.mark.parametrize(("build", "message"), [(lambda: FailoverChain([]), "tiers is empty"),
    (lambda: FailoverChain("abc"), "give a list of ProviderTier"),
    (lambda: FailoverChain([scripted("x")]), r"tiers\[0\] is a ScriptedProvider"),
    (lambda: FailoverChain([tier("a", "x"), tier("a", "x")]), "'a' is taken"),
    (lambda: FailoverChain([tier("a")]).check(-1), "timeout=-1"),
    (lambda: tier("", "x"), "give the tier a name"),
    (lambda: ProviderTier("a", ScriptedProvider), "provider is ScriptedProvider"),
    (lambda: ProviderTier("a", object()), "give an object with a chat")])
def test_what_is_no_tier_is_refused_at_once(build, message):
    assert isinstance(error_of(ConfigError, build, match=message), ValueError)


def test_a_chat_that_cannot_take_the_arguments_is_refused_when_the_tier_is_built():
    def old(self, prompt): ...
    def toolless(self, messages, model=None, timeout=1.0): ...
    for chat in (old, toolless):
        kind = type("Kind", (), {"chat": chat})
        match = r"tier 'a': chat\(\) of Kind cannot"
        error_of(ConfigError, ProviderTier, "a", kind(), match=match)
    streams = type("Kind", (), {"chat": lambda self, messages, **_: None, "stream": old})
    error_of(ConfigError, ProviderTier, "a", streams(), match=r"stream\(\) of Kind cannot")
    odd = type("Odd", (), {"chat": staticmethod(min)})  # without a signature it is taken as it is
    assert ProviderTier("a", odd()).name == "a"


def test_any_object_with_chat_is_a_provider_and_may_lack_arguments_for_options():
    """A hint is left out, as at any vendor; without another option the answer would be wrong."""
    class Plain:
        def chat(self, messages, tools=None, model=None, timeout=1.0, stop=None):
            return LLMResponse(f"{model} stop={stop}")
    with FailoverChain([ProviderTier("a", Plain(), ["m"]), tier("b", "fine")]) as chain:
        for call in both_ways(chain, "hi", temperature=0.5, stop="x", max_tokens=None):
            assert call().text == "m stop=x"
        chain.check()
        chain.ping()
    assert outcomes(chain.chat("hi", max_tokens=5).attempts) == ["a:skipped", "b:ok"]
    for call in both_ways(chain, "hi", tiers=["a"], max_tokens=5):
        error_of(UnsupportedRequest, call, match="^a takes no max_tokens$")
    assert failures(chain) == 0
    match = "unexpected keyword argument 'seed'"
    error_of(ConfigError, ProviderTier, "a", Plain(), match=match, params={"seed": 1})
    class Uneven(Plain):
        def stream(self, messages, tools=None, model=None, timeout=1.0, user=None):
            yield f"user={user}"
            return LLMResponse("x")
    chain = FailoverChain([ProviderTier("a", Uneven())])
    assert chain.chat("hi", user="u").text == "None stop=None"  # only what both have a name for
    assert "".join(chain.stream("hi", user="u")) == "user=None"


# -- max_concurrency
def released(provider: Held, threads: list[threading.Thread]) -> None:
    """All calls that the provider held back are over."""
    provider.go_on.set()
    for thread in threads:
        thread.join(10)


def full(*others: ProviderTier) -> tuple[FailoverChain, Held, list[threading.Thread]]:
    """A chain whose first tier has one place, which is taken."""
    provider = Held("slow")
    chain = FailoverChain([ProviderTier("a", provider, max_concurrency=1), *others])
    threads = in_threads(1, lambda: chain.chat("hi", tiers=["a"]))
    assert provider.begun.acquire(timeout=10)
    return chain, provider, threads


def test_no_more_than_max_concurrency_at_once():
    provider, answers = Held("x"), []
    chain = FailoverChain([ProviderTier("a", provider, max_concurrency=3)])
    threads = in_threads(16, lambda: answers.append(chain.chat("hi").text))
    for _ in range(3):
        assert provider.begun.acquire(timeout=10)
    assert not provider.begun.acquire(timeout=0.05)
    released(provider, threads)
    assert answers == ["x"] * 16 and provider.most == 3


@pytest.mark.parametrize("role", ["secondary", "emergency"])
def test_a_full_tier_is_skipped_while_a_later_one_is_ready(role):
    chain, provider, threads = full(tier("b", "x", role=role))
    if role == "emergency":
        chain.tiers[1].breaker.open(1000)
    breaker = chain.tiers[0].breaker
    breaker.open(0)
    response = chain.chat("hi")
    assert outcomes(response.attempts) == ["a:skipped", "b:ok"]
    assert "busy" in str(response.attempts[0].error)
    assert (breaker.state, breaker.retry_after) == ("open", 0)
    released(provider, threads)
    assert chain.chat("hi").provider == "a" and breaker.is_closed


@pytest.mark.parametrize("why", ["open", "takes no tools", "is full", "none"])
def test_a_full_tier_is_waited_for_if_no_later_one_can_serve(why):
    last = ProviderTier("b", Held("x"), max_concurrency=1, supports_tools=why != "takes no tools")
    chain, provider, threads = full(*[last] * (why != "none"))
    waited = provider
    if why == "open":
        chain.tiers[1].breaker.open()
    if why == "is full":  # then the last one is waited for
        threads += in_threads(1, lambda: chain.chat("hi", tiers=["b"]))
        waited = last.provider
        assert waited.begun.acquire(timeout=10)
    answers: list[LLMResponse] = []
    threads += in_threads(1, lambda: answers.append(chain.chat("hi", [TOOL])))
    assert not waited.begun.acquire(timeout=0.05)
    waited.go_on.set()
    assert waited.begun.acquire(timeout=10)
    released(provider, threads)
    assert [answer.provider for answer in answers] == ["b" if why == "is full" else "a"]


@pytest.mark.parametrize("first", ["a", "b"])
def test_the_first_free_place_of_full_tiers_is_taken_when_all_others_have_failed(first):
    last = ProviderTier("b", Held("x"), max_concurrency=1)
    chain, provider, threads = full(last, tier("c", BadRequest))
    more = in_threads(1, lambda: chain.chat("hi", tiers=["b"]))
    assert last.provider.begun.acquire(timeout=10)
    answers: list[LLMResponse] = []
    asking = in_threads(1, lambda: answers.append(chain.chat("hi", timeout=60)))
    held = {"a": provider, "b": last.provider}
    assert not held[first].begun.acquire(timeout=0.05)
    released(held[first], asking)
    assert answers[0].provider == first
    assert outcomes(answers[0].attempts) == ["a:skipped", "b:skipped", "c:failed", f"{first}:ok"]
    for one in held.values():
        one.go_on.set()
    released(provider, [*threads, *more])


def test_a_wait_for_a_full_tier_ends_at_the_deadline():
    chain, provider, threads = full()
    moments = itertools.chain([0.0] * 9, itertools.repeat(301.0))
    late = FailoverChain(chain.tiers, clock=lambda: next(moments))  # by its own clock
    for call in (*both_ways(chain, "hi", timeout=0.1), lambda: late.chat("hi")):
        assert seconds_of(lambda call=call: error_of(DeadlineExceeded, call), 0.05) < 2
    released(provider, threads)


def test_who_waited_for_a_tier_that_broke_meanwhile_does_not_ask_it():
    provider, errors = Held(ServerError), []
    one = ProviderTier("a", provider, max_concurrency=1, retries=0)
    chain = FailoverChain([one], failure_threshold=1)
    threads = in_threads(10, lambda: errors.append(error_of(AllProvidersFailed, chain.chat, "hi")))
    assert provider.begun.acquire(timeout=10)
    assert not provider.begun.acquire(timeout=0.05)  # the others stand in line by now
    released(provider, threads)
    assert len(provider.calls) == 1
    assert sum("CircuitOpen" in str(error.attempts[0].error) for error in errors) == 9


@pytest.mark.parametrize("role", ["primary", "emergency"])
def test_who_waited_for_a_tier_that_was_reset_meanwhile_asks_it(role):
    provider, answers = Held("x"), []
    chain = FailoverChain([ProviderTier("a", provider, max_concurrency=1, role=role)])
    threads = in_threads(2, lambda: answers.append(chain.chat("hi").text))
    assert provider.begun.acquire(timeout=10) and not provider.begun.acquire(timeout=0.05)
    chain.reset()
    released(provider, threads)
    assert answers == ["x", "x"]
    assert chain.tiers[0].breaker.snapshot().stale == 1  # the call that was under way


# -- interruptions
def ask(chain: FailoverChain, way: str) -> None:
    if way == "chat":
        chat_of(chain, "hi", timeout=5)
    else:
        with stream_of(chain, "hi", timeout=5) as stream:
            list(stream) if way == "stream" else next(stream)


@pytest.mark.quiet
@pytest.mark.parametrize("way", ["chat", "stream", "given up"])
@pytest.mark.parametrize("points", ["line", "call c_return"])
def test_an_interruption_at_any_point_takes_nothing_along(monkeypatch, way, points):
    """Afterwards each place is free, the next call works, and no breaker is open or held."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # raised by a finalizer
    def made():
        last = ProviderTier("a", Watched("x", "y"), ["a"], max_concurrency=1)
        return FailoverChain([tier("down", ProviderUnavailable, max_concurrency=1), last],
                             failure_threshold=9)
    def interrupt(chain):
        raise Interrupted
    lost: list[str] = []
    def sweep():
        for point, chain in at_each_line(made, lambda one: ask(one, way), interrupt, points):
            gc.collect(0)
            try:
                with stream_of(chain, "hi", timeout=1) as stream:
                    fine = list(stream) == ["x", "y"]
                states = [one.breaker.state for one in chain.health()]
                found = fine, states, stream.response.attempts[0].outcome
            except RouterError as error:
                found = error
            if found != (True, ["closed", "closed"], "failed"):
                lost.append(f"{point}: {found}")
    assert in_a_thread(sweep, 120) and lost == []


# -- secrets in the frames of errors
def shown_by_frames(error: BaseException) -> list[str]:
    """Where a secret is shown by a frame of a traceback, also of causes, or by the error itself."""
    watch = LeakWatch()
    watch.look_at_error(error, "a call", frames=True)
    return watch.found


def hung_up_on(server: ChatServer, connection: Any, request: bytes) -> bool:
    signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
    server.stopping.wait(10)
    return False


CUT = HEAD + event("the secret answer")
BAD = [{"role": "user", "content": PROMPT}, {"role": "nobody"}]
LEAVING: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "cut": (CUT, PROMPT, {}), "refused": (reply({"error": {"message": PROMPT}}, 400), PROMPT, {}),
    "late": (waits(b""), PROMPT, {"timeout": 0.1}),
    "late after text": (waits(event("the secret answer")), PROMPT, {"timeout": 0.1}),
    "bad messages": (CUT, BAD, {}), "unknown option": (CUT, PROMPT, {"temprature": 1}),
    "bad option": (CUT, PROMPT, {"stall_timeout": "x"}),
    "unknown model": (CUT, PROMPT, {"model": "zzz"}),
    "interrupted": (hung_up_on, PROMPT, {"timeout": 5})}


@pytest.mark.quiet
@pytest.mark.parametrize("case", LEAVING)
@pytest.mark.parametrize("way", [0, 1], ids=["chat", "stream"])
def test_no_frame_of_an_error_holds_prompt_answer_or_key(case, way):
    answer, messages, options = LEAVING[case]
    def interrupt(*_):
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with ChatServer(answer) as server:
            tiers = server.tier("a"), tier("b", ServerError, retries=0)
            chain = FailoverChain(tiers[: 1 if case == "interrupted" else 2])
            kinds = RouterError, TypeError, KeyboardInterrupt
            left = error_of(kinds, both_ways(chain, messages, **options)[way])
            assert shown_by_frames(left) == []
    finally:
        signal.signal(signal.SIGUSR1, before)
    for kind in (KeyboardInterrupt, AssertionError, ConfigError, ContentFiltered):
        chain = FailoverChain([tier("a", kind("x"))])
        left = error_of(kind, both_ways(chain, PROMPT, system=PROMPT)[way])
        assert shown_by_frames(left) == []
    left = error_of(BadRequest, OpenAIProvider(KEY, "http://127.0.0.1:9").chat, BAD, model="m")
    assert shown_by_frames(left) == []


def test_a_trial_that_an_interrupt_ends_early_is_given_back(clock):
    """In a listener, while it waits for its place, and while its failure is noted."""
    def interrupt(*_):
        raise KeyboardInterrupt
    events = {"event": "half_open"}
    def on_event(event):
        if event.data.get("new") == events["event"]:
            interrupt()
    for place in ("listener", "place", "failed", "good verdict"):
        store = MemoryStore(clock)
        script = ["fine"] if place == "good verdict" else [ServerError, "fine"]
        one = tier("a", *script, max_concurrency=1, retries=0)
        chain = chain_of(clock, one, on_event=on_event if place == "listener" else None,
            store=store)
        one.breaker.open(1)
        clock.advance(2)
        if place == "place":
            one._slots.take = interrupt
        elif place == "failed":
            one._note = interrupt
        elif place == "good verdict":
            def swap(name, expected, record, real=store.swap):
                return interrupt() if record.state == "closed" else real(name, expected, record)
            store.swap = swap
        error_of(KeyboardInterrupt, chain.chat, "q")
        assert one.breaker.state == "open" and (one.breaker.retry_after == 0 or place == "failed")


def test_usage_of_a_custom_provider_is_a_usage(clock):
    chat = chain_of(clock, tier("a", LLMResponse("x", usage={}))).chat
    error_of(ConfigError, chat, "hi", match="usage is a dict")
    odd: Any = Usage(3, None)  # type: ignore[arg-type]  # as some clients give it
    broken = ServerError("x")
    broken.usage = odd
    tiers = [tier("a", broken, retries=0), tier("b", LLMResponse("x", usage=odd), prices=(1, 1))]
    assert FailoverChain(tiers).chat("hi").total_usage == Usage(3)
    broken.usage = Usage(5)
    chain = FailoverChain([tier("a", broken, retries=0), tiers[1]], failure_threshold=9)
    for _ in range(3):  # one object, raised again and again
        assert chain.chat("hi").total_usage == Usage(8)
    for content in (["x"], b"x", 5):
        chat = chain_of(clock, tier("a", LLMResponse(content))).chat  # type: ignore[arg-type]
        error_of(ConfigError, chat, "hi", match="give a Usage, and a str")


def test_a_mock_may_be_a_provider(clock):
    provider = MagicMock(**{"chat.return_value": LLMResponse("x")})
    chain = chain_of(clock, ProviderTier("a", provider), ProviderTier("b", provider))
    assert chain.chat("hi").text == "x" and "thoughts" not in provider.chat.call_args.kwargs


# -- health
def test_health_snapshots_and_events_are_plain_data(clock):
    events: list[Event] = []
    tiers = tier("a", ServerError, retries=0), tier("b", "x")
    chain = chain_of(clock, *tiers, on_event=events.append)
    chain.chat("hi")
    health = chain.health()[0]
    seen = health.name, health.role, health.models, health.calls, health.failures, health.learned
    assert seen == ("a", "primary", ("a",), 1, 1, {})
    assert (health.last_error, health.last_latency) == ("ServerError", 0.0)
    plain = json.loads(json.dumps([one.to_dict() for one in chain.health()]))
    assert (plain[0]["name"], plain[0]["failures"], plain[0]["learned"]) == ("a", 1, {})
    assert plain[0]["models"] == chain.health()[0].to_dict()["models"] == ["a"]
    assert (plain[0]["breaker"]["state"], health.breaker.failures) == ("closed", 1)
    snapshot = chain.tiers[0].breaker.snapshot()
    assert json.loads(json.dumps(snapshot.to_dict())) == plain[0]["breaker"]
    kinds = [json.loads(json.dumps(one.to_dict()))["kind"] for one in events]
    assert kinds == ["attempt", "failover", "attempt", "done"]


class Pinged(ScriptedProvider):
    """Its ping raises ``error``, and notes the time it was given."""

    error: Exception | None = None

    def ping(self, timeout: float = 0.0) -> None:
        self.given = [*getattr(self, "given", []), timeout]
        if self.error is not None:
            raise self.error


def test_a_failed_ping_counts_and_a_good_one_makes_the_trial_due(clock):
    provider = Pinged([ServerError, "x"], repeat=True)
    first = ProviderTier("a", provider, retries=0, breaker=CircuitBreaker(clock=clock))
    chain = chain_of(clock, first, tier("b", "x"))
    chain.chat("hi")
    assert chain.check()[0].breaker.failures == 1  # a good one does not reset the count
    provider.error = ProviderUnavailable("refused")
    assert chain.check()[0].last_error == "ProviderUnavailable: refused"
    assert chain.check()[0].breaker.state == "open" and chain.check()[0].breaker.retry_after == 15
    provider.error = None
    found = chain.check()[0]
    assert (found.breaker.state, found.breaker.retry_after, found.last_error) == ("open", 0, None)
    assert chain.chat("hi").provider == "a" and provider.given == [5.0] * 5
    first.breaker.open()
    chain.check(1.0)
    assert first.breaker.retry_after is None  # open by hand: only reset() ends it
    chain.reset()
    assert chain.chat("hi").provider == "b"


def test_ping_of_a_chain_has_one_time_for_all():
    dead, alive = Pinged(["x"]), Pinged(["x"])
    dead.error = ServerError("dead")
    FailoverChain([ProviderTier("a", dead), ProviderTier("b", alive)]).ping()
    assert 0 < alive.given[0] <= dead.given[0] <= 5.0
    error_of(ServerError, FailoverChain([ProviderTier("a", dead)]).ping, 0.0)
    assert dead.given[-1] == 0.0


def test_closing_closes_every_provider_and_the_chain_stays_usable():
    closed: list[str] = []
    tiers = tier("a", "x"), tier("b", "x")
    for one in tiers:
        one.provider.close = lambda name=one.name: closed.append(name)
    with FailoverChain(tiers) as chain:
        pass
    assert closed == ["a", "b"] and chain.chat("hi").text == "x"


def test_a_given_breaker_is_used_and_may_be_shared(clock):
    shared = tier("a", ProviderUnavailable, breaker=CircuitBreaker(1, clock=clock, name="mine"))
    heard: list[Event] = []
    one, other = (chain_of(clock, shared, tier(at, "x"), on_event=heard.append) for at in "bc")
    one.chat("hi")
    skipped = other.chat("hi").attempts[0]
    assert skipped.outcome == "skipped" and "mine is open" in str(skipped.error)
    assert [event.kind for event in heard].count("breaker") == 2


# -- usage and cost
def test_cost_and_usage_are_summed_over_all_attempts(clock):
    failed = InvalidResponse("cut")
    failed.usage = Usage(100, 10)
    answer = LLMResponse("x", usage=Usage(1000, 500, 400, 100), model="b-2026")
    prices = {"b-2026": (1.0, 2.0, 0.5)}
    chain = chain_of(clock, tier("a", failed, prices=(10, 20)), tier("b", answer, prices=prices))
    response = chain.chat("hi")
    assert response.cost == pytest.approx((1000 + 200 + 500 + 200 + 100 + 1000) / 1e6)
    assert response.usage == Usage(1000, 500, 400, 100)
    assert response.total_usage == Usage(1100, 510, 400, 100)
    assert response.total_usage.total_tokens == 1610
    written = chain_of(clock, tier("b", answer, prices=(1, 2, 0.5, 3)))
    assert written.chat("hi").cost == pytest.approx((500 + 200 + 300 + 1000) / 1e6)


UNKNOWN = LLMResponse("x")
KNOWN = LLMResponse("x", usage=MILLION, model="v-1")
USED = ServerError("x")
USED.usage = MILLION


@pytest.mark.parametrize(("tiers", "cost"), [
    ([("a", KNOWN, (2, 3))], 2), ([("a", KNOWN, {"v-1": (4, 3)})], 4),
    ([("a", KNOWN, {"fast": (5, 3)})], 5), ([("a", KNOWN, {"vendor": (6, 3), "fast": (2, 3)})], 6),
    ([("a", KNOWN, {"other": (1, 2)})], None), ([("a", KNOWN, None)], None),
    ([("a", UNKNOWN, (2, 3))], None), ([("a", UNKNOWN, None)], None),
    ([("a", ServerError("no"), None), ("b", KNOWN, (2, 3))], 2),
    ([("a", USED, (1, 1)), ("b", KNOWN, (2, 3))], 3),
    ([("a", USED, None), ("b", KNOWN, (2, 3))], None),
    ([("a", USED, (1, 1)), ("b", UNKNOWN, (2, 3))], None),
    ([("a", ProviderUnavailable, (1, 1)), ("b", LLMResponse("x", usage=Usage(1)), (0, 0))], 0)])
@pytest.mark.parametrize("way", [0, 1], ids=["chat", "stream"])
def test_a_cost_is_none_where_tokens_or_prices_are_unknown(clock, tiers, cost, way):
    chain = chain_of(clock, *(tier(name, item, models={"fast": "vendor"}, prices=prices, retries=0)
        for name, item, prices in tiers))
    assert both_ways(chain, "hi")[way]().cost == cost


# -- chains in chains
def test_a_nested_chain_is_one_attempt_of_the_outer_one(clock):
    paid = LLMResponse("x", usage=MILLION)
    failing = tier("x", USED, retries=0, prices=(1, 1), breaker=CircuitBreaker(9))
    inner = chain_of(clock, failing, tier("y", paid, prices=(3, 0)))
    outer = chain_of(clock, ProviderTier("in", inner), tier("b", paid, prices=(5, 0)))
    for call in both_ways(outer, "hi"):
        response = call()
        assert outcomes(response.attempts) == ["in:ok"]
        assert (response.provider, response.cost) == ("in", 4.0)
        assert response.total_usage == response.attempts[0].usage == MILLION + MILLION


def test_the_failure_of_a_nested_chain_keeps_its_attempts_and_its_cost(clock):
    def nested(*tiers):
        inner = ProviderTier("in", chain_of(clock, *tiers), retries=0)
        return chain_of(clock, inner, tier("b", KNOWN, prices=(5, 0)))
    y = tier("y", ServerError, retries=0)
    outer = nested(tier("x", USED, retries=0, prices=(1, 1)), y)
    response = outer.chat("hi")
    assert outcomes(response.attempts) == ["in:failed", "b:ok"]
    assert (response.cost, response.attempts[0].usage) == (6.0, MILLION) and failures(outer) == 1
    assert (outer.health()[0].last_error or "").startswith("AllProvidersFailed")
    failed = error_of(AllProvidersFailed, outer.chat, "hi", tiers=["in"])
    assert outcomes(failed.attempts) == ["in:failed"]
    assert outcomes(failed.errors[0].attempts) == ["x:failed", "y:failed"]
    assert nested(tier("x", USED, retries=0)).chat("hi").cost is None
    assert nested(y).chat("hi").cost == 5


def test_a_nested_chain_that_does_not_serve_a_model_is_passed_over(clock):
    inner = FailoverChain([tier("i", "inner", models=["small"])])
    tiers = tier("a", BadRequest, models=["big"]), ProviderTier("nested", inner), tier("c", "last")
    response = chain_of(clock, *tiers).chat("hi", model="big")
    assert outcomes(response.attempts) == ["a:failed", "nested:failed", "c:ok"]
    assert "ModelNotFound" in str(response.attempts[1].error)


@pytest.mark.parametrize("refuse", [lambda: tier("i", ContextLengthExceeded, UnsupportedRequest),
    lambda: tier("i", "x")])
def test_what_a_nested_chain_cannot_do_for_one_request_takes_it_from_no_other(clock, refuse):
    inner = chain_of(clock, refuse(), tier("j", BadRequest, ServerError), accept=lambda _: False)
    outer = chain_of(clock, ProviderTier("in", inner))
    for _ in range(4):
        error_of(AllProvidersFailed, outer.chat, "hi")
    assert outer.tiers[0].breaker.is_closed


def test_nobody_waits_for_a_nested_chain_that_waiting_does_not_help(clock):
    for error, seconds in ((AuthenticationError, None), (RateLimited(retry_after=60), 60)):
        outer = chain_of(clock, ProviderTier("in", chain_of(clock, tier("i", error))), wait=9)
        for _ in range(4):  # it says so itself: the outer breaker stays closed
            assert error_of(AllProvidersFailed, outer.chat, "hi").retry_after == seconds
            assert not clock.slept and outer.tiers[0].breaker.is_closed
    inner = chain_of(clock, tier("i", ServerError, RateLimited(retry_after=60)), recovery_timeout=5)
    outer = chain_of(clock, ProviderTier("in", inner), failure_threshold=1, recovery_timeout=5)
    inner.tiers[0].retries = 0
    for seconds in (pytest.approx(5, abs=2), 60):  # the trial of the outer breaker is handed on
        assert error_of(AllProvidersFailed, outer.chat, "hi").retry_after == seconds
        clock.advance(20)


def test_a_silent_tier_of_a_nested_chain_leaves_time_for_a_later_tier_of_the_outer_one(clock):
    for later, limits in ((True, (1.0, 1.0)), (False, (60.0, 100.0))):
        provider = Limits()
        inner = chain_of(clock, ProviderTier("i", provider, ["m"]), timeout=3, wait=1)
        tiers = [ProviderTier("in", inner), tier("b", "x")][: 1 + later]
        for call in both_ways(chain_of(clock, *tiers), "hi", timeout=2):
            call()
            assert provider.seen.pop() == limits
        held = chain_of(clock, ProviderTier("i", Held("x"), max_concurrency=1))
        held.tiers[0]._slots = types.SimpleNamespace(take=lambda: None, qsize=lambda: 0)
        both = chain_of(clock, ProviderTier("in", held), tier("b", "x"))
        assert both.chat("hi").provider == "b"  # nor does it wait for a place
    watched = Custom(lambda **options: LLMResponse(str(options["timeout"])))
    inner = chain_of(clock, ProviderTier("i", watched), timeout=3, wait=1)
    assert chain_of(clock, ProviderTier("in", inner)).chat("hi", timeout=9).text == "4.0"


def odd(**fields):
    """An error whose class does not call __init__ of ours, with these attributes."""
    return type("Odd", (ServerError,), {"__init__": lambda self: None, **fields})()


@pytest.mark.parametrize("error", [odd(), odd(usage={"prompt_tokens": 4}), odd(then="retry"),
    odd(breaker=None), *(odd(attempts=value) for value in (3, ["x"], ("x",))),
    *(odd(retry_after=value) for value in ("5", -4, math.nan, 1e9)),
    odd(__str__=lambda self: self.why), type("X", (AllProvidersFailed,), {"errors": None})()])
def test_an_odd_error_of_a_custom_provider_fails_over(clock, error):
    chain = chain_of(clock, tier("a", error, retries=1), tier("b", "fine"), failure_threshold=1)
    for _ in range(3):
        assert chain.chat("hi").text == "fine"
        clock.advance(20)
    assert len(calls(chain, "a")) <= 6
    if "retry_after" in vars(type(error)):
        alone = chain_of(clock, tier("a", error), wait=3700)
        assert (error_of(AllProvidersFailed, alone.chat, "hi").retry_after or 0) <= 3600


def test_a_provider_may_change_its_list_of_messages(clock):
    first = types.SimpleNamespace(chat=lambda messages, **_: messages.clear() or 1 / 0)
    chain = chain_of(clock, ProviderTier("a", first), tier("b", "x"))
    assert chain.chat("hi", tiers=(name for name in "ab")).text == "x"
    assert calls(chain, "b")[0]["messages"] == ASKED


def test_the_limit_of_a_call_wins_over_that_of_its_tier_under_either_name(clock):
    chain = chain_of(clock, tier("a", "x", params={"max_completion_tokens": 100, "seed": 1}))
    for given, sent in (({"max_tokens": 5}, {"max_tokens": 5}), ({"max_tokens": None}, {}),
            ({"max_completion_tokens": 7}, {"max_completion_tokens": 7}),
            ({}, {"max_completion_tokens": 100})):
        chain.chat("hi", **given)
        found = {**calls(chain, "a")[-1]["kwargs"], "timeout": 0}
        assert found == {**sent, "seed": 1, "timeout": 0}


# -- events, the log, explain()
def test_events_tell_every_step_and_may_fail(clock, caplog):
    events: list[Event] = []
    def listen(event):
        events.append(event)
        raise RuntimeError("listener")
    def kinds():
        return [event.kind for event in events]
    first = tier("a", ServerError, ServerError, RateLimited("x", retry_after=9))
    second = tier("b", LLMResponse("one", usage=Usage(3, 4)), ServerError, ServerError, "two")
    chain = chain_of(clock, first, second, on_event=listen)
    chain.chat(PROMPT)
    assert kinds() == ["attempt", "retry", "attempt", "failover", "attempt", "done"]
    assert events[3].data["to"] == "b" and events[0].time == 1000.0
    done = events[-1].data
    assert (done["outcome"], done["prompt_tokens"], done["completion_tokens"]) == ("ok", 3, 4)
    assert "on_event failed" in caplog.messages
    events.clear()
    caplog.set_level(logging.INFO, LOGGER)
    chain.chat(PROMPT, wait=60)
    assert kinds()[:3] == ["attempt", "breaker", "failover"]
    waits = [(one.tier, one.model, one.data["seconds"]) for one in events if one.kind == "wait"]
    assert waits == [("", "", 1)]  # it belongs to no tier
    told = [one for one in caplog.records if "waiting 1.0" in one.getMessage()]
    assert [one.levelno for one in told] == [logging.INFO]
    chain.reset()
    events.clear()
    for one in chain.tiers:
        one.breaker.open()
    error_of(AllProvidersFailed, chain.chat, PROMPT)
    assert kinds() == ["breaker", "breaker", "skip", "skip", "done"]
    assert (events[-1].tier, events[-1].data["outcome"]) == ("", "AllProvidersFailed")


def test_the_event_failover_names_who_is_asked_next(clock):
    events: list[Event] = []
    tiers = tier("a", ProviderUnavailable), tier("b", "x"), tier("c", "x", supports_tools=False)
    chain = chain_of(clock, *tiers, tier("d", "x"), on_event=events.append)
    chain.tiers[1].breaker.open(60)
    assert chain.chat("hi", [TOOL]).provider == "d"
    told = [(event.tier, event.data["to"]) for event in events if event.kind == "failover"]
    assert told in ([("a", "d")], [("a", "b")])


def test_levels_of_the_log(clock, caplog):
    """Attempts DEBUG, failover and recovery INFO, an opened breaker and a failed call WARNING."""
    caplog.set_level(logging.DEBUG, LOGGER)
    chain = chain_of(clock, tier("a", ServerError, ServerError, ServerError, "x"), tier("b", "x"))
    chain.chat(PROMPT)
    chain.chat(PROMPT)
    clock.advance(20)
    chain.chat(PROMPT)
    chain.tiers[0].breaker.open()
    error_of(AllProvidersFailed, chain.chat, PROMPT, tiers=["a"])
    def levels(*words):
        told = ((one.levelno, one.getMessage()) for one in caplog.records)
        return {level for level, text in told if all(word in text for word in words)}
    assert levels("a", "attempt") == {logging.DEBUG} and levels("a", "failover") == {logging.INFO}
    assert levels("a: open (ServerError)") == {logging.WARNING}
    assert levels("a", "closed (recovered)") == {logging.INFO}
    assert levels("a: half_open") == {logging.DEBUG} and logging.WARNING in levels("call failed")
    assert logging.NullHandler in map(type, logging.getLogger(LOGGER).handlers)


@pytest.mark.quiet
@pytest.mark.parametrize("way", [0, 1], ids=["chat", "stream"])
def test_only_an_answer_after_other_attempts_is_worth_a_line(caplog, way):
    caplog.set_level(logging.INFO, LOGGER)
    both_ways(FailoverChain([tier("a", "hi")]), "hi")[way]()
    assert caplog.messages == []
    both_ways(FailoverChain([tier("a", ServerError("no"), retries=0), tier("b", "x")]), "hi")[way]()
    assert "answered: a: ServerError: no" in caplog.text


@pytest.mark.quiet
def test_the_same_answers_come_without_anybody_watching(clock):
    logging.getLogger(LOGGER).setLevel(logging.CRITICAL)
    try:
        chain = chain_of(clock, tier("a", ProviderUnavailable), tier("b", ServerError, "b", "c"))
        assert chain.chat("hi").text == "b"
        chain.tiers[0].breaker.open()
        assert outcomes(both_ways(chain, "hi")[1]().attempts) == ["a:skipped", "b:ok"]
        with ChatServer(whole("x")) as server:
            assert FailoverChain([server.tier()]).chat("hi").text == "x"
    finally:
        logging.getLogger(LOGGER).setLevel(logging.NOTSET)


def test_each_step_of_explain():
    steps = (Attempt("a", "m", "skipped", "CircuitOpen: off"),
        Attempt("b", "m", "escalated", "gave up", latency=0.5, usage=Usage(1, 1)),
        Attempt("c", "m", "failed", "ServerError: no", latency=0.25),
        Attempt("d", "m", "ok", latency=1.0, usage=Usage(1, 1)))
    for cost, shown in ((0.0, "$0.00"), (1.0, "$1.00"), (12.346, "$12.35"), (0.00003, "$0.00003")):
        assert LLMResponse("x", attempts=steps, cost=cost).explain().endswith(f" {shown}")
    told = LLMResponse("x", attempts=steps, cost=0.5).explain().split(" -> ")
    shown = ["a skipped off", "b gave up 500 ms", "c no 250 ms", "d ok $0.5"]
    for step, words in zip(told, shown, strict=True):
        assert all(word in step for word in words.split()), step
    long = FailoverChain([tier("a", ServerError("x" * 200), retries=0)])
    assert 40 < error_of(AllProvidersFailed, long.chat, "hi").explain().count("x") < 100


HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202e\u2066 Z\xfcr\r\nich \x9b\x00"


def test_explain_and_the_log_are_printable_ascii(clock, caplog):
    caplog.set_level(logging.DEBUG, LOGGER)
    with ChatServer(reply({"error": {"message": HOSTILE}}, 400)) as server:
        tiers = [server.tier("a"), tier(f"b{HOSTILE}", ServerError(HOSTILE)), tier("c", "x")]
        chain = FailoverChain(tiers, sleep=lambda _: None)
        response, names = chain.chat("hi"), [one.name for one in tiers[:2]]
        failed = error_of(AllProvidersFailed, chain.chat, "hi", tiers=names, wait=0)
        tiers[1].breaker.open(5, HOSTILE)
        list(chain.stream("hi"))
    for text in (response.explain(), failed.explain(), *caplog.messages):
        assert re.compile(r"[ -~]*").fullmatch(text), ascii(text)
    assert "owned" in failed.explain()
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", str(failed))


# -- data
def test_a_response_as_data():
    tool_calls = [ToolCall("1", "f", {"a": 1}), ToolCall("2", "g", None, "[1")]
    attempts = (Attempt("t", "m", "ok"),)
    response = LLMResponse("T1 text", tool_calls, usage=Usage(1, 2), attempts=attempts)
    functions = [{"name": "f", "arguments": '{"a": 1}'}, {"name": "g", "arguments": "[1"}]
    sent = [{"id": str(at), "type": "function", "function": one} for at, one in
            enumerate(functions, 1)]
    assert response.message == {"role": "assistant", "content": "T1 text", "tool_calls": sent}
    assert LLMResponse("x").message == {"role": "assistant", "content": "x"}
    plain = json.loads(json.dumps(response.to_dict()))
    assert (plain["usage"]["prompt_tokens"], plain["attempts"][0]["tier"]) == (1, "t")
    assert pickle.loads(pickle.dumps(response)) == response and response.has_tool_calls
    assert tuple(attempts[0]) == ("t", "m", "ok", None, None, 0.0, Usage())
    empty = LLMResponse()
    assert (empty.text, empty.latency, empty.cost, empty.request_id) == ("", 0.0, None, None)
    assert empty.finish_reason == "stop" and LLMResponse(usage=Usage(3)).total_usage == Usage(3)
    assert Usage(1, 2, 3, 4, 5) + Usage(1, 1, 1, 1, 1) == Usage(2, 3, 4, 5, 6)
    error_of(TypeError, lambda: Usage(1) + 1)


def test_a_repr_shows_no_text(clock):
    answer = LLMResponse("T1", [ToolCall("1", "f", {"T2": 1}, "T3")], reasoning="T4", model="m")
    answer.escalation, answer.raw, answer.carry = "T5", {"a": "T6"}, {"a": "T6"}
    chain = chain_of(clock, tier("a", answer))
    assert not re.search("T[1-6]", f"{answer!r} {chain.chat('T7')!r} {chain!r} {chain.tiers!r}")
    assert "model='m'" in repr(answer) and "a" in repr(chain)


def test_a_script_may_hold_all_kinds_of_items():
    def answer(messages, **kwargs):
        called.append((messages, kwargs))
        return "called"
    called: list[Any] = []
    items = ["text", LLMResponse("made"), ["a", "b"], ServerError("x"), ServerError, answer, 5]
    provider = ScriptedProvider(items)
    assert provider.chat("q", model="m").model == "m" and list(provider.stream("q")) == ["made"]
    plain = provider.chat("q")
    assert (plain.text, plain.model) == ("ab", "")
    for _ in range(2):
        error_of(ServerError, provider.chat, "q")
    assert provider.chat("q", model="m", seed=1).text == "called"
    assert called == [("q", {"tools": None, "model": "m", "seed": 1})]
    for message in ("script holds a", "script of 7 items is over"):
        error_of(ConfigError, provider.chat, "q", match=message)
    assert provider.calls[5] == {
        "messages": "q", "tools": None, "model": "m", "kwargs": {"seed": 1}}
    broken = ScriptedProvider([["par", ServerError("cut")]]).stream("q")
    assert next(broken) == "par"
    error_of(ServerError, next, broken)
    for wrong in (lambda: ScriptedProvider("text"), lambda: scripted().chat("q")):
        error_of(ConfigError, wrong)


def test_chains_over_the_same_tier_are_not_kept_alive():
    shared = tier("a", "x")
    heard: list[str] = []
    for _ in range(5):
        FailoverChain([shared], on_event=lambda event: heard.append("gone"))
    gc.collect()
    chain = FailoverChain([shared], on_event=lambda event: heard.append(event.kind))
    shared.breaker.open()
    assert heard == ["breaker"] and chain.tiers == (shared,)
