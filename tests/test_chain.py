"""The chain: who is asked, in which order, with what, and what the caller is told."""

from __future__ import annotations

import copy
import gc
import json
import logging
import math
import pickle
import re
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from typing import Any

import pytest
import requests
from requests.adapters import BaseAdapter
from support.fakes import (
    HEAD,
    IMAGE,
    KEY,
    PROMPT,
    TOOL,
    Custom,
    Held,
    Limits,
    VirtualClock,
    Watched,
    answering,
    calls,
    chain_of,
    event,
    failures,
    in_threads,
    in_time,
    outcomes,
    refusal,
    scripted,
    serve,
    silent_after,
    tier,
    whole,
)
from urllib3 import HTTPResponse

import copilot_router
from copilot_router import (
    AllProvidersFailed,
    AnthropicProvider,
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
    GeminiProvider,
    InvalidResponse,
    LLMProvider,
    LLMResponse,
    MemoryStore,
    OllamaProvider,
    OpenAIProvider,
    Overloaded,
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
)

LOGGER = "copilot_router"
MILLION = Usage(1_000_000, 0)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


def about(seconds: float) -> Any:
    """The time for which a breaker that a chain made stays open: up to a quarter longer."""
    return pytest.approx(seconds * 1.125, rel=0.1112)


def both_ways(chain: FailoverChain, *args: Any, **options: Any) -> list[Callable[[], Any]]:
    """The same call as a whole answer and as a stream that is read to its end."""
    return [lambda: chain.chat(*args, **options), lambda: list(chain.stream(*args, **options))]


# -- order and models


def test_any_object_with_chat_is_a_provider() -> None:
    class Local:
        def chat(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> Any:
            return LLMResponse(f"{model} says hello")

    tiers = [ProviderTier("local", Local(), ["llama-3"]), ProviderTier("cloud", Local(), ["gpt"])]
    chain = FailoverChain(tiers)  # type: ignore[arg-type]
    assert chain.chat([{"role": "user", "content": "hi"}], model="gpt").content == "gpt says hello"
    assert list(chain.stream("hi")) == ["llama-3 says hello"]
    chain.check()
    chain.ping()
    chain.close()


def test_tiers_are_asked_by_role_then_as_listed(clock: VirtualClock) -> None:
    down = ProviderUnavailable
    emergency, secondary = tier("e", "x", role="emergency"), tier("s", down, role="secondary")
    chain = chain_of(clock, emergency, secondary, tier("p1", down), tier("p2", down))
    assert [one.name for one in chain.tiers] == ["p1", "p2", "s", "e"]
    response = chain.chat("hi")
    assert response.provider == "e"
    assert outcomes(response.attempts) == ["p1:failed", "p2:failed", "s:failed", "e:ok"]


@pytest.mark.parametrize(
    ("model", "asked"),
    [
        (None, [("a", "a1"), ("any", None), ("b", "b-9"), ("e", "smart")]),
        ("smart", [("b", "b-9"), ("a", "a1"), ("any", "smart"), ("e", "smart")]),
        ("b-9", [("b", "b-9"), ("a", "a1"), ("any", "b-9"), ("e", "smart")]),
        ("a2", [("a", "a2"), ("any", "a2"), ("b", "b-9"), ("e", "smart")]),
        ("new", [("a", "a1"), ("any", "new"), ("b", "b-9"), ("e", "smart")]),
    ],
)
def test_a_named_model_moves_its_tiers_forward(clock: VirtualClock, model: Any, asked: Any) -> None:
    """But never an emergency tier. The other tiers follow with their own default."""
    down = ProviderUnavailable
    chain = chain_of(
        clock,
        tier("a", down, models=["a1", "a2"]),
        tier("any", down, models=[]),
        tier("b", down, models={"smart": "b-9"}),
        tier("e", down, models=["smart"], role="emergency"),
    )
    with pytest.raises(AllProvidersFailed) as failed:
        chain.chat("hi", model=model)
    assert [(one.tier, one.model or None) for one in failed.value.attempts] == asked
    assert [calls(chain, name)[0]["model"] for name, _ in asked] == [sent for _, sent in asked]


def test_an_unknown_model_names_the_near_misses_and_the_known_ones(clock: VirtualClock) -> None:
    chain = chain_of(clock, tier("a", "x", models=["gpt-6-luna", "haiku"]), tier("b", "x"))
    with pytest.raises(UnknownModel, match="Did you mean 'gpt-6-luna'"):
        chain.chat("hi", model="gpt6-luna")
    with pytest.raises(UnknownModel) as unknown:
        chain.stream("hi", model="zzz")
    assert all(name in str(unknown.value) for name in ("gpt-6-luna", "haiku", "b"))
    many = [f"model-{number:02}" for number in range(30)]
    with pytest.raises(UnknownModel) as unknown:
        chain_of(clock, tier("a", "x", models=many)).chat("hi", model="zzz")
    assert sum(name in str(unknown.value) for name in many) == 10
    with pytest.raises(ConfigError, match="model=''"):
        chain.chat("hi", model="")
    assert not calls(chain, "a")


def test_tiers_restricts_strictly(clock: VirtualClock) -> None:
    chain = chain_of(clock, tier("local", ServerError), tier("cloud", "x"))
    with pytest.raises(AllProvidersFailed):
        chain.chat("hi", tiers=["local"])
    with pytest.raises(UnknownModel):
        chain.chat("hi", tiers=["local"], model="cloud")
    assert not calls(chain, "cloud")
    with pytest.raises(ConfigError, match=r"'clod'.*Did you mean 'cloud'"):
        chain.chat("hi", tiers=["clod"])
    for wrong in ("local", []):
        with pytest.raises(ConfigError, match="give a list of names"):
            chain.chat("hi", tiers=wrong)


def test_a_tier_that_cannot_serve_the_request_is_skipped(clock: VirtualClock) -> None:
    blind, toolless = tier("blind", "a", supports_images=False), tier("b", "b", supports_tools=False)
    chain = chain_of(clock, blind, toolless)
    response = chain.chat(IMAGE)
    assert outcomes(response.attempts) == ["blind:skipped", "b:ok"]
    skipped = response.attempts[0]
    assert (skipped.model, skipped.latency) == ("blind", 0.0)
    assert (skipped.error or "").startswith("UnsupportedRequest")
    assert chain.chat("hi").provider == "blind"
    assert chain.chat("hi", [TOOL]).provider == "blind"
    with pytest.raises(UnsupportedRequest) as unable:
        chain.chat(IMAGE, [TOOL])
    assert "blind takes no images" in str(unable.value)
    assert "b takes no tools" in str(unable.value)
    chain.tiers[0].breaker.open(60)  # one is open and the other one is unable: time may help
    with pytest.raises(AllProvidersFailed):
        chain.chat("hi", [TOOL])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:,x"}},
        {"type": "input_image", "image_url": "data:,x"},
        {"type": "image", "source": {}},
    ],
    ids=lambda part: part["type"],
)
def test_each_kind_of_image_part_counts_as_an_image(clock: VirtualClock, part: Any) -> None:
    chain = chain_of(clock, tier("blind", "a", supports_images=False), tier("b", "b"))
    text = {"type": "text", "text": "look"}
    assert chain.chat([{"role": "user", "content": [text, part]}]).provider == "b"
    assert chain.chat([{"role": "user", "content": [text]}]).provider == "blind"


# -- once more on the same tier


@pytest.mark.parametrize(("retries", "requests"), [(0, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("kind", [ServerError, Overloaded])
def test_a_server_error_is_tried_again_after_a_short_pause(
    clock: VirtualClock, kind: type, retries: int, requests: int
) -> None:
    chain = chain_of(clock, tier("a", kind, retries=retries), tier("b", "x"))
    chain.chat("hi")
    assert len(calls(chain, "a")) == failures(chain) + 3 * (not failures(chain)) == requests or (
        chain.tiers[0].breaker.is_open and requests == 3
    )
    assert len(clock.slept) == requests - 1
    assert all(0.1 <= pause <= 0.3 for pause in clock.slept)


def test_there_is_no_retry_once_the_breaker_is_open(clock: VirtualClock) -> None:
    chain = chain_of(clock, tier("a", ServerError, retries=5), tier("b", "x"))
    chain.chat("hi")
    assert (len(calls(chain, "a")), len(clock.slept)) == (3, 2)
    assert chain.chat("hi").attempts[0].outcome == "skipped"


def test_a_tier_that_another_thread_opens_during_the_pause_is_passed_over() -> None:
    tiers = [tier("a", ServerError), tier("b", "x")]
    chain = FailoverChain(tiers, sleep=lambda seconds: tiers[0].breaker.open())
    assert outcomes(chain.chat("hi").attempts) == ["a:failed", "a:skipped", "b:ok"]


def test_retry_after_of_a_server_error_replaces_the_pause_or_parks(clock: VirtualClock) -> None:
    errors = ServerError("x", retry_after=1.5), ServerError("x", retry_after=40)
    chain = chain_of(clock, tier("a", *errors), tier("b", "x"))
    chain.chat("hi")
    assert clock.slept == [1.5]
    assert chain.tiers[0].breaker.retry_after == 40
    for seconds, state in ((2.0, "closed"), (2.5, "open")):
        chain = chain_of(clock, tier("a", ServerError("x", retry_after=seconds), retries=0))
        with pytest.raises(AllProvidersFailed) as failed:
            chain.chat("hi")
        assert (chain.tiers[0].breaker.state, failed.value.retry_after) == (state, seconds)


def test_a_short_retry_after_of_a_rate_limit_is_waited_out_once(clock: VirtualClock) -> None:
    """It is neutral the first time, and the second 429 parks the tier."""
    limited = RateLimited("x", retry_after=2.0)
    chain = chain_of(clock, tier("a", limited, "fine", limited, limited), tier("b", "x"))
    assert chain.chat("hi").provider == "a"
    assert clock.slept == [2.0]
    assert chain.tiers[0].breaker.is_closed
    assert outcomes(chain.chat("hi").attempts) == ["a:failed", "a:failed", "b:ok"]
    assert chain.tiers[0].breaker.retry_after == 2.0


@pytest.mark.parametrize("error", [RateLimited, ServerError])
@pytest.mark.parametrize("timeout", [1.0, 2.0])
def test_a_pause_that_does_not_end_before_the_deadline_is_not_begun(
    clock: VirtualClock, error: Any, timeout: float
) -> None:
    chain = chain_of(clock, tier("a", error("x", retry_after=2)), tier("b", "x"))
    assert chain.chat("hi", timeout=timeout).provider == "b"
    assert not clock.slept


# -- parks


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (RateLimited("x", retry_after=30), 30),
        (RateLimited("x", retry_after=9999), 3600),
        (RateLimited("x"), about(15)),
        (QuotaExceeded("x", retry_after=100), 100),
        (QuotaExceeded("x", retry_after=1), about(15)),
        (QuotaExceeded("x"), about(15)),
        (AuthenticationError("x"), about(15)),
    ],
)
def test_a_parked_tier_is_asked_once_and_rests(
    clock: VirtualClock, error: ProviderError, seconds: Any
) -> None:
    chain = chain_of(clock, tier("a", error), tier("b", "x"))
    for call in (*both_ways(chain, "hi"), *both_ways(chain, "hi")):
        call()
    assert len(calls(chain, "a")) == 1
    assert not clock.slept
    assert chain.tiers[0].breaker.retry_after == seconds


@pytest.mark.parametrize("kind", [AuthenticationError, QuotaExceeded])
def test_long_parks_grow_from_the_recovery_timeout_to_ten_minutes(
    clock: VirtualClock, kind: type[ProviderError]
) -> None:
    """Four times as long with each further one in a row; an answer begins anew."""
    breaker = CircuitBreaker(clock=clock)
    answers = [kind("x")] * 5 + ["fine", kind("x")]
    chain = chain_of(clock, tier("a", *answers, breaker=breaker), tier("b", "x"))
    seen = []
    for _ in range(7):
        chain.chat("hi")
        seen.append(breaker.retry_after)
        clock.advance(seen[-1] or 0)
    assert seen == [15, 60, 240, 600, 600, None, 15]


def test_long_parks_begin_with_the_chains_recovery_timeout(clock: VirtualClock) -> None:
    chain = chain_of(clock, tier("a", AuthenticationError), tier("b", "x"), recovery_timeout=2)
    chain.chat("hi")
    assert chain.tiers[0].breaker.retry_after == about(2)


def test_breakers_of_a_chain_without_a_store_do_not_open_in_step(clock: VirtualClock) -> None:
    """Their open time is up to a quarter longer; with a store or by hand it is exact."""

    def opened(**settings: Any) -> float | None:
        chain = chain_of(clock, tier("a", ProviderUnavailable), failure_threshold=1, **settings)
        with pytest.raises(AllProvidersFailed):
            chain.chat("hi")
        return chain.tiers[0].breaker.retry_after

    times = {opened() for _ in range(50)}
    assert len(times) > 10
    assert all(seconds == about(15) for seconds in times)
    assert opened(store=MemoryStore()) == pytest.approx(15, abs=0.1)


def test_all_parked_fails_at_once_with_the_earliest_return(clock: VirtualClock) -> None:
    first, second = RateLimited("x", retry_after=30), RateLimited("x", retry_after=20)
    chain = chain_of(clock, tier("a", first), tier("b", second))
    for call in (*both_ways(chain, "hi"), *both_ways(chain, "hi")):
        with pytest.raises(AllProvidersFailed) as failed:
            call()
        assert failed.value.retry_after == 20
    assert [type(error) for error in failed.value.errors] == [CircuitOpen, CircuitOpen]
    assert failed.value.errors[0].retry_after == 30  # type: ignore[attr-defined]
    assert failed.value.__cause__ is failed.value.errors[0]
    assert outcomes(failed.value.attempts) == ["a:skipped", "b:skipped"]


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (AuthenticationError("x"), None),
        (QuotaExceeded("x"), None),
        (QuotaExceeded("x", retry_after=100), 100),
        (RateLimited("x"), about(15)),
    ],
)
def test_a_long_park_gives_no_hint_unless_the_server_named_one(
    clock: VirtualClock, error: ProviderError, hint: Any
) -> None:
    """Waiting does not help against a wrong key: neither the caller is told to, nor ``wait`` does."""
    chain = chain_of(clock, tier("a", error))
    for _ in range(2):
        with pytest.raises(AllProvidersFailed) as failed:
            chain.chat("hi", wait=0 if hint else 60)
        assert failed.value.retry_after == hint
    assert not clock.slept
    chain = chain_of(clock, tier("a", error), tier("b", RateLimited("x", retry_after=7)))
    with pytest.raises(AllProvidersFailed) as failed:
        chain.chat("hi")
    assert failed.value.retry_after == 7


# -- what is raised, and what passes


@pytest.mark.parametrize("kind", [BadRequest, ContextLengthExceeded, UnsupportedRequest])
def test_a_neutral_class_that_holds_for_all_is_raised_itself(
    clock: VirtualClock, kind: type[ProviderError]
) -> None:
    chain = chain_of(clock, tier("a", kind("x")), tier("b", kind("y")))
    for call in both_ways(chain, "hi", wait=100):
        with pytest.raises(kind) as raised:
            call()
        assert outcomes(raised.value.attempts) == ["a:failed", "b:failed"]
    assert failures(chain, 0) == failures(chain, 1) == 0
    chain.tiers[0].breaker.open(60)  # what was asked decides
    with pytest.raises(kind):
        chain.chat("hi")


def test_mixed_failures_name_every_tier(clock: VirtualClock) -> None:
    chain = chain_of(clock, tier("a", BadRequest("odd")), tier("b", ProviderUnavailable("refused")))
    with pytest.raises(AllProvidersFailed) as failed:
        chain.chat("hi")
    assert re.search("a: BadRequest: odd.*b: ProviderUnavailable: refused", str(failed.value))
    assert [type(error) for error in failed.value.errors] == [BadRequest, ProviderUnavailable]
    assert all(error.__traceback__ is None for error in failed.value.errors)
    assert failed.value.retry_after == 1.0


def test_repeated_failures_of_a_tier_are_said_once_with_their_number(clock: VirtualClock) -> None:
    same = tier("a", ServerError("boom"), retries=4)
    chain = chain_of(clock, same, tier("b", ProviderUnavailable("refused")), failure_threshold=99)
    with pytest.raises(AllProvidersFailed) as failed:
        chain.chat("hi")
    assert str(failed.value).count("boom") == 1
    assert re.search(r"a: .*boom.*\b5\b.*b: ", str(failed.value))
    assert len(failed.value.attempts) == 6
    different = tier("a", ServerError("one"), ServerError("two"))
    with pytest.raises(AllProvidersFailed, match="one.*two"):
        chain_of(clock, different).chat("hi")


def test_on_error_takes_the_nearest_class(clock: VirtualClock) -> None:
    """Its rule holds for a foreign exception and for a rate limit too."""
    policy = {ProviderError: "raise", ServerError: "next", KeyError: "raise"}
    items = ServerError, BadRequest, KeyError, ValueError, RateLimited("x", retry_after=1)
    chain = chain_of(clock, tier("a", *items, retries=3), tier("b", "x"), on_error=policy)
    assert chain.chat("hi").provider == "b"
    for kind in (BadRequest, KeyError):
        with pytest.raises(kind):
            chain.chat("hi")
    assert chain.chat("hi").provider == "b"
    with pytest.raises(RateLimited):
        chain.chat("hi")
    assert chain.tiers[0].breaker.retry_after == 1
    assert not clock.slept
    chain = chain_of(clock, tier("a", ServerError, "x"), on_error={BadRequest: "raise"})
    assert outcomes(chain.chat("hi").attempts) == ["a:failed", "a:ok"]


def test_a_refusal_by_a_safety_system_is_raised_at_once(clock: VirtualClock) -> None:
    tiers = tier("a", ContentFiltered("no")), tier("b", "x", role="emergency")
    for call in both_ways(chain_of(clock, *tiers), "hi"):
        with pytest.raises(ContentFiltered) as raised:
            call()
        assert outcomes(raised.value.attempts) == ["a:failed"]
    assert chain_of(clock, *tiers, on_error={ContentFiltered: "next"}).chat("hi").provider == "b"


@pytest.mark.parametrize(
    "kind",
    [AssertionError, MemoryError, RecursionError, KeyboardInterrupt, GeneratorExit, ConfigError],
)
def test_what_is_not_the_providers_fault_passes_through(
    clock: VirtualClock, kind: type[BaseException]
) -> None:
    """It is neutral, the next tier is not asked, and a trial is handed on at once."""
    chain = chain_of(clock, tier("a", kind, kind, "fine", max_concurrency=1), tier("b", "x"))
    chain.tiers[0].breaker.open(5)
    clock.advance(5)
    for call in both_ways(chain, "hi"):
        with pytest.raises(kind):
            call()
    assert not calls(chain, "b")
    assert failures(chain) == 0
    assert chain.chat("hi").provider == "a"
    assert chain.tiers[0].breaker.is_closed


@pytest.mark.parametrize(
    ("module", "name"),
    [("billiard.exceptions", "SoftTimeLimitExceeded"), ("rq.timeouts", "JobTimeoutException")],
)
def test_the_limits_of_task_queues_pass_through_everywhere(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    """Providers, pings, listeners and stores may all be interrupted by one."""
    limit = type(name, (Exception,), {})
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{name: limit}))

    def over(*_: object, **__: object) -> None:
        raise limit

    class Store(MemoryStore):
        load = over  # type: ignore[assignment]

    class Pinged(ScriptedProvider):
        ping = over  # type: ignore[assignment]

    pinged = FailoverChain([ProviderTier(one, Pinged(["x"])) for one in "ab"])
    for step in (
        lambda: FailoverChain([tier("a", limit), tier("b", "x")]).chat("hi"),
        lambda: FailoverChain([tier("a", limit), tier("b", "x")]).stream("hi"),
        lambda: FailoverChain([tier("a", "x")], on_event=over).chat("hi"),
        lambda: CircuitBreaker(on_change=over).open(),
        lambda: CircuitBreaker(name="x", store=Store()).admit(),
        pinged.check,
        pinged.ping,
    ):
        with pytest.raises(limit):
            step()


def test_any_other_exception_fails_over_and_its_text_is_not_repeated(clock: VirtualClock) -> None:
    chain = chain_of(clock, tier("a", ValueError(PROMPT)), tier("b", ProviderUnavailable))
    with pytest.raises(AllProvidersFailed) as failed:
        chain.chat("hi")
    assert failed.value.attempts[0].error == "ValueError"
    assert PROMPT not in str(failed.value)
    assert failures(chain) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_a_foreign_exception_is_logged_with_its_place_once(
    caplog: pytest.LogCaptureFixture, streaming: bool
) -> None:
    """As a warning, since it is probably a mistake in the provider; once for each line."""

    def faulty(again: bool = False, **_: Any) -> None:
        if again:
            raise KeyError("something private")
        raise ValueError("something private")

    def ask(**options: Any) -> None:
        chain = FailoverChain([ProviderTier("mine", Custom(faulty)), tier("b", "x")])
        assert (list(chain.stream("hi", **options)) if streaming else chain.chat("hi", **options))

    def warned() -> list[str]:
        told = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
        return [text for text in told if "test_chain.py" in text]

    ask()
    ask()
    ask(again=True)
    ask()
    kinds = [kind for text in warned() for kind in ("ValueError", "KeyError") if kind in text]
    assert kinds == ["ValueError", "KeyError"]
    assert all(re.search(r"test_chain\.py\D+\d+", text) for text in warned())
    assert "private" not in caplog.text


def test_a_router_error_of_a_provider_is_no_mistake_of_its_code(
    caplog: pytest.LogCaptureFixture,
) -> None:
    FailoverChain([tier("a", BadRequest("x"), ServerError("y")), tier("b", "x")]).chat("hi")
    assert not [one for one in caplog.records if one.levelno == logging.WARNING]


@pytest.mark.parametrize("answer", [None, "text", {"content": "x"}])
def test_a_provider_that_returns_something_else_is_a_config_error(
    clock: VirtualClock, answer: object
) -> None:
    chain = chain_of(clock, ProviderTier("w", Custom(lambda **_: answer)))
    with pytest.raises(ConfigError, match="tier 'w': Custom returned .*LLMResponse"):
        chain.chat("hi")


ASKED = [{"role": "user", "content": "hi"}]
CALLED = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
RESULTS = [
    *ASKED,
    {"role": "assistant", "content": None, "tool_calls": [CALLED]},
    {"role": "tool", "tool_call_id": "1", "content": "done"},
]


@pytest.mark.parametrize(
    ("messages", "response", "kind", "counted"),
    [
        (ASKED, LLMResponse(""), EmptyResponse, 1),
        (ASKED, LLMResponse(" \n"), EmptyResponse, 1),
        (ASKED, LLMResponse(finish_reason="length"), EmptyResponse, 0),
        (RESULTS, LLMResponse(""), EmptyResponse, 0),
        (RESULTS, LLMResponse(None), EmptyResponse, 0),
        ([*RESULTS, *ASKED], LLMResponse(""), EmptyResponse, 1),
        (ASKED, LLMResponse(finish_reason="content_filter"), ContentFiltered, 0),
    ],
)
@pytest.mark.parametrize("way", [0, 1], ids=["chat", "stream"])
def test_an_empty_answer_is_no_answer_of_any_provider(
    clock: VirtualClock, messages: Any, response: LLMResponse, kind: type, counted: int, way: int
) -> None:
    """One that was cut by its length, or that follows tool results, says nothing of the tier."""
    response.request_id = "r-1"
    chain = chain_of(clock, tier("a", response))
    with pytest.raises(RouterError) as raised:
        both_ways(chain, messages)[way]()
    error: Any = raised.value
    error = error.errors[0] if isinstance(error, AllProvidersFailed) else error
    assert isinstance(error, kind)
    assert error.request_id == "r-1"
    assert failures(chain) == counted
    if kind is EmptyResponse:
        assert chain_of(clock, tier("a", response), tier("b", "x")).chat(messages).provider == "b"


# -- reading a built-in provider's answer


class Body:
    """The body of an answer whose reading fails."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.closed = False

    def read(self, *_: Any) -> bytes:
        raise self.error

    def close(self) -> None:
        self.closed = True


class Failing(BaseAdapter):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def send(self, request: Any, **_: Any) -> Any:  # type: ignore[override]
        answer = requests.Response()
        answer.status_code, answer.url, answer.request = 200, request.url, request
        answer.headers["Content-Type"] = "text/event-stream"
        answer.raw = HTTPResponse(Body(self.error), dict(answer.headers), 200, preload_content=False)
        return answer

    def close(self) -> None:
        pass


@pytest.mark.parametrize("error", [MemoryError(), RecursionError()], ids=lambda one: repr(one)[:6])
@pytest.mark.parametrize("kind", [OpenAIProvider, AnthropicProvider, GeminiProvider, OllamaProvider])
@pytest.mark.parametrize("streaming", [False, True])
def test_too_little_memory_while_an_answer_is_read_fails_over(
    error: Exception, kind: Any, streaming: bool
) -> None:
    """The answer is at fault there, as far as anybody can tell; a custom provider's own is not."""
    session = requests.Session()
    session.mount("http://", Failing(error))
    given = {} if kind is OllamaProvider else {"api_key": KEY}
    provider = kind(base_url="http://127.0.0.1:9", session=session, **given)
    chain = FailoverChain([ProviderTier("a", provider, ["m"], retries=0), tier("b", "x")])
    if streaming:
        assert list(chain.stream("hi")) == ["x"]
    else:
        response = chain.chat("hi")
        assert response.provider == "b"
        assert (response.attempts[0].error or "").startswith("InvalidResponse")
    assert failures(chain) == 1


def test_an_answer_nested_too_deeply_fails_over() -> None:
    deep = b"[" * 100_000
    with serve(answering(HEAD + b"data: " + deep + b"\n\n", whole("x"))) as server:
        chain = FailoverChain([server.tier("a"), server.tier("b")])
        assert chain.chat("hi").provider == "b"
        assert failures(chain) == 1


# -- emergency and waiting


def test_emergency_is_asked_even_while_open_unless_forced(clock: VirtualClock) -> None:
    chain = chain_of(clock, tier("a", ProviderUnavailable), tier("e", "x", role="emergency"))
    chain.tiers[1].breaker.open(100)
    assert chain.chat("hi").provider == "e"
    assert chain.tiers[1].breaker.is_open
    chain.tiers[1].breaker.open()
    with pytest.raises(AllProvidersFailed, match="e is open until reset"):
        chain.chat("hi")


def test_wait_sleeps_until_a_tier_is_ready(clock: VirtualClock) -> None:
    """The time is bounded in all, and added to the default deadline."""
    limited = RateLimited("x", retry_after=50)
    assert chain_of(clock, tier("a", limited, "x"), timeout=10).chat("hi", wait=50).text == "x"
    assert clock.slept == [50]
    chain = chain_of(clock, tier("a", limited), wait=120)
    with pytest.raises(AllProvidersFailed) as failed:
        chain.chat("hi")
    assert clock.slept == [50, 50, 50]
    assert outcomes(failed.value.attempts) == ["a:failed"] * 3


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (RateLimited("x", retry_after=50), {"wait": 49}),
        (RateLimited("x", retry_after=50), {"wait": 100, "timeout": 20}),
        (RateLimited("x", retry_after=50), {"wait": 100, "timeout": 50}),
        (BadRequest("x"), {"wait": 100}),
        (AuthenticationError("x"), {"wait": 100}),
    ],
)
def test_a_wait_that_does_not_fit_or_help_is_not_begun(
    clock: VirtualClock, error: Exception, options: Any
) -> None:
    chain = chain_of(clock, tier("a", error))
    with pytest.raises(RouterError):
        chain.chat("hi", **options)
    chain.tiers[0].breaker.open()
    with pytest.raises(AllProvidersFailed) as failed:
        chain.chat("hi", wait=100)
    assert failed.value.retry_after is None
    assert not clock.slept


@pytest.mark.parametrize(
    "error",
    [
        RateLimited("x", retry_after=0),
        RateLimited("x", retry_after=0.001),
        Overloaded("x", retry_after=0),
        ServerError("x"),
        ProviderUnavailable("x"),
    ],
    ids=lambda one: f"{type(one).__name__} {one.retry_after}",
)
@pytest.mark.parametrize("way", [0, 1], ids=["chat", "stream"])
@pytest.mark.parametrize("recovery", [0.01, 15])
def test_naps_grow_and_have_a_floor(
    clock: VirtualClock, error: Any, way: int, recovery: float
) -> None:
    """Whoever may wait does not hammer a server that says ``Retry-After: 0`` or a past date."""
    naps: list[float] = []

    def listen(event: Event) -> None:
        if event.kind == "wait":
            naps.append(event.data["seconds"])

    one = tier("a", error)
    chain = chain_of(clock, one, on_event=listen, recovery_timeout=recovery)
    with pytest.raises(AllProvidersFailed):
        both_ways(chain, "hi", wait=30, timeout=60)[way]()
    assert 2 <= len(naps) <= 20
    assert len(calls(chain, "a")) <= 41
    assert naps[0] >= 0.1
    assert max(naps) > naps[0] or naps[0] >= 5
    assert sum(naps) <= 30.001


def test_a_wait_is_told_of_and_belongs_to_no_tier(
    clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[Event] = []
    chain = chain_of(clock, tier("a", RateLimited("x", retry_after=30), "x"), on_event=events.append)
    assert chain.chat("hi", wait=60).text == "x"
    waits = [(one.tier, one.model) for one in events if one.kind == "wait"]
    assert waits == [("", "")]
    told = [one for one in caplog.records if "waiting" in one.getMessage()]
    assert [one.levelno for one in told] == [logging.INFO]
    assert "30" in told[0].getMessage()


# -- the deadline


def slow(clock: VirtualClock, seconds: float, error: Exception, given: Any = None) -> Custom:
    """A provider that takes its time, by the clock, and then fails."""

    def late(**options: Any) -> None:
        if given is not None:
            given.append(options["timeout"])
        clock.advance(seconds)
        raise error

    return Custom(late)


def test_the_deadline_covers_all_tiers(clock: VirtualClock) -> None:
    """What is left shrinks, a tier's own timeout is an upper limit, who was not asked is named."""
    given: list[float] = []
    one, two = (slow(clock, took, ProviderTimeout("slow"), given) for took in (4, 7))
    tiers = ProviderTier("a", one), ProviderTier("b", two, timeout=100), tier("c", "x")
    with pytest.raises(DeadlineExceeded) as late:
        chain_of(clock, *tiers).chat("hi", timeout=10)
    assert isinstance(late.value, TimeoutError)
    assert given == [10, 6]
    assert outcomes(late.value.attempts) == ["a:failed", "b:failed", "c:skipped"]
    assert len(late.value.errors) == 3
    chain = chain_of(clock, tier("a", "x", timeout=3))
    chain.chat("hi")
    list(chain.stream("hi"))
    assert [call["kwargs"] for call in calls(chain, "a")] == [{"timeout": 3}] * 2


def test_without_any_time_nobody_is_asked_and_all_are_named(clock: VirtualClock) -> None:
    chain = chain_of(clock, *(tier(name, "x") for name in "abc"))
    for call in both_ways(chain, "hi", timeout=0):
        with pytest.raises(DeadlineExceeded) as late:
            call()
        assert outcomes(late.value.attempts) == ["a:skipped", "b:skipped", "c:skipped"]
    assert not calls(chain, "a")


def test_a_tier_is_not_asked_when_the_breakers_store_took_the_time(clock: VirtualClock) -> None:
    class Slow(MemoryStore):
        def load(self, name: str) -> Any:
            clock.advance(2.0)
            return super().load(name)

    breaker = CircuitBreaker(store=Slow(), name="a", clock=clock)
    chain = chain_of(clock, tier("a", "x", breaker=breaker), tier("b", "x"))
    with pytest.raises(DeadlineExceeded) as late:
        chain.chat("hi", timeout=1)
    assert outcomes(late.value.attempts) == ["a:skipped", "b:skipped"]
    assert not calls(chain, "a")
    assert breaker.is_closed


@pytest.mark.parametrize(
    ("limit", "before", "code", "counted"),
    [
        (10, 0, None, 1),
        (10, 0, "attempt_timeout", 1),
        (5, 0, "attempt_timeout", 1),
        (4.9, 0, "attempt_timeout", 0),
        (10, 6, "attempt_timeout", 0),
        (3, 0, "first_token_timeout", 1),
        (3, 0, "stall_timeout", 1),
    ],
)
def test_an_attempt_ended_by_the_deadline_counts_from_five_seconds_on(
    clock: VirtualClock, limit: float, before: float, code: Any, counted: int
) -> None:
    """``before``: what an earlier tier took of the limit. A silence that reached its limit counts."""

    def late(timeout: float, **_: Any) -> None:
        clock.advance(timeout)
        raise ProviderTimeout("x", code=code)

    first = ProviderTier("a", slow(clock, before, ProviderUnavailable("x")))
    chain = chain_of(clock, first, ProviderTier("b", Custom(late)), tier("c", "x"))
    with pytest.raises(DeadlineExceeded):
        chain.chat("hi", timeout=limit)
    assert failures(chain, 1) == counted


def test_a_tier_that_trickles_does_not_take_every_call_down(clock: VirtualClock) -> None:
    def trickle(timeout: float, **_: Any) -> None:
        clock.advance(timeout)
        raise ProviderTimeout("x", code="attempt_timeout")

    chain = chain_of(clock, ProviderTier("a", Custom(trickle)), tier("b", "x"))
    for call in (*both_ways(chain, "hi", timeout=10), both_ways(chain, "hi", timeout=10)[0]):
        with pytest.raises(DeadlineExceeded):
            call()
    assert chain.chat("hi", timeout=10).provider == "b"


def test_the_deadline_in_a_second_round_names_each_tier_once(clock: VirtualClock) -> None:
    chain = chain_of(
        clock, ProviderTier("a", slow(clock, 5, ProviderUnavailable("x"))), tier("b", ServerError)
    )
    with pytest.raises(DeadlineExceeded) as late:
        chain.chat("hi", timeout=10, wait=4)
    assert outcomes(late.value.attempts).count("a:failed") == 2
    assert "b:skipped" not in outcomes(late.value.attempts)


def test_a_deadline_reached_while_waiting_was_allowed_says_both_numbers(clock: VirtualClock) -> None:
    chain = chain_of(clock, ProviderTier("a", slow(clock, 17, ProviderUnavailable("x"))))
    with pytest.raises(DeadlineExceeded) as late:
        chain.chat("hi", timeout=17, wait=43)
    assert "17" in str(late.value)
    assert "43" in str(late.value)


# -- silence


def silence(clock: VirtualClock, *answers: LLMResponse, **settings: Any) -> Any:
    provider = Limits(*answers)
    first = ProviderTier("a", provider, ["m", "other"])
    return chain_of(clock, first, tier("b", "x"), **settings), provider


def test_silence_limits_are_five_times_as_long_where_patience_is_due(clock: VirtualClock) -> None:
    """They never take more than half of the time that is left while a later tier is ready."""
    chain, provider = silence(clock)
    emergency = chain_of(clock, ProviderTier("a", provider, ["m"]), tier("e", "x", role="emergency"))
    emergency.tiers[1].breaker.open(100)
    for patient, options in (
        ((12, 20), {}),
        ((12, 15), {"timeout": 30}),
        ((60, 100), {"model": "m"}),
        ((60, 100), {"reasoning_effort": "high"}),
        ((60, 100), {"tiers": ["a"]}),
        ((5, 20), {"first_token_timeout": 5}),
        ((12, 3), {"stall_timeout": 3}),
    ):
        for call in both_ways(chain, "hi", **options):
            call()
            assert provider.seen.pop() == patient
    emergency.chat("hi")
    assert provider.seen.pop() == (12, 20)  # an emergency tier is always ready
    chain.tiers[1].breaker.open(100)
    chain.chat("hi")
    assert provider.seen.pop() == (60, 100)
    clock.advance(100)
    chain.chat("hi")
    assert provider.seen.pop() == (12, 20)  # the other tier's trial is due


@pytest.mark.parametrize(
    ("thinking", "learned"),
    [
        (LLMResponse("x", usage=Usage(5, 60, reasoning_tokens=50)), True),
        (LLMResponse("x", reasoning="hm"), True),
        (LLMResponse("x", usage=Usage(5, 60)), False),
    ],
    ids=["tokens", "text", "none"],
)
@pytest.mark.parametrize("way", [0, 1], ids=["chat", "stream"])
def test_a_model_that_thinks_gets_five_times_the_silence(
    clock: VirtualClock, thinking: LLMResponse, learned: bool, way: int
) -> None:
    """It is learned from its answers, for this model alone."""
    chain, provider = silence(clock, thinking)
    for _ in range(3):
        both_ways(chain, "hi")[way]()
    later = (60, 100) if learned else (12, 20)
    assert provider.seen == [(12, 20), later, later]
    other = chain_of(clock, ProviderTier("a", provider, ["other"]), tier("b", "x"))
    other.chat("hi")
    assert provider.seen[-1] == (12, 20)


def test_a_model_that_thought_may_be_silent_for_longer() -> None:
    """Over a real socket: longer than the limit, less than five times as long."""
    usage = {"completion_tokens": 60, "completion_tokens_details": {"reasoning_tokens": 50}}
    counted = b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"

    def answer(handler: Any, body: Any) -> bool:
        handler.wfile.write(HEAD)
        handler.server.stopping.wait(0.6 if len(handler.server.bodies) > 1 else 0)
        handler.wfile.write(event("yes") + event(finish="stop") + counted)
        return False

    with serve(answer) as server:
        thinker = server.tier("thinker", first_token_timeout=0.25)
        chain = FailoverChain([thinker, tier("other", "x")])
        assert [chain.chat("hi", timeout=20).provider for _ in range(2)] == ["thinker"] * 2


# -- options


def test_params_lie_under_the_calls_own_options(clock: VirtualClock) -> None:
    chain = chain_of(clock, tier("a", "x", params={"temperature": 0.2, "seed": 1, "odd": 3}))
    for call in both_ways(chain, "hi", temperature=None, top_p=0.5):
        call()
        sent = calls(chain, "a")[-1]["kwargs"]
        assert sent == {"seed": 1, "top_p": 0.5, "odd": 3, "timeout": 300.0}


@pytest.mark.parametrize("own", ["messages", "tools", "model", "timeout"])
def test_params_do_not_take_the_chains_own_arguments(own: str) -> None:
    with pytest.raises(ConfigError, match=f"params\\['{own}'\\]"):
        tier("a", "x", params={own: 1})


def test_system_is_put_in_front_and_nothing_given_is_modified(clock: VirtualClock) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    tools = [TOOL]
    answer = LLMResponse("[ESCALATE] no")
    before = copy.deepcopy((messages, tools, answer))
    chain = chain_of(clock, tier("a", answer), tier("b", "x"), escalation_model="b")
    response = chain.chat(messages, tools, system="be brief")
    assert (messages, tools, answer) == before
    assert response is not answer
    assert calls(chain, "b")[0]["messages"] == [{"role": "system", "content": "be brief"}, *messages]
    list(chain_of(clock, tier("a", "x")).stream("hi", system="be brief"))


def test_a_custom_provider_sees_plain_messages() -> None:
    """What ``response.message`` keeps for its own vendor is left out for all others."""
    with serve(answering(HEAD + event("x", reasoning_content="hm") + event(finish="stop"))) as server:
        kept = FailoverChain([server.tier()]).chat("hi").message
    provider = scripted("x")
    FailoverChain([ProviderTier("a", provider)]).chat([*ASKED, kept, *ASKED])
    seen = provider.calls[0]["messages"]
    assert seen == [*ASKED, {"role": "assistant", "content": "x"}, *ASKED]


def http_tier(name: str = "a") -> ProviderTier:
    """An HTTP tier that is never reached: its options are refused before anything is sent."""
    return ProviderTier(name, OpenAIProvider(KEY, "http://127.0.0.1:9/v1"), ["m"])


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("temprature", "temperature"),
        ("max_token", "max_tokens"),
        ("first_token_timout", "first_token_timeout"),
        ("stall_timeouts", "stall_timeout"),
        ("timout", "timeout"),
    ],
)
def test_an_unknown_option_is_a_type_error_with_the_nearest_name(wrong: str, right: str) -> None:
    chain = FailoverChain([http_tier(), tier("b", "x")])
    for call in both_ways(chain, "hi", **{wrong: 1}):
        with pytest.raises(TypeError, match=f"{wrong}.*'?{right}\\b") as unknown:
            call()
        assert type(unknown.value).__name__ == "TypeError"
    assert not calls(chain, "b")
    assert failures(chain) == 0


@pytest.mark.parametrize("name", ["first_token_timeout", "stall_timeout"])
def test_a_limit_that_is_no_number_is_a_config_error(name: str) -> None:
    chain = FailoverChain([http_tier()])
    for call in both_ways(chain, "hi", **{name: "5"}):
        with pytest.raises(ConfigError, match=name):
            call()
    assert failures(chain) == 0


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
def test_bad_messages_are_refused_before_anybody_is_asked(
    clock: VirtualClock, messages: Any, message: str
) -> None:
    chain = chain_of(clock, tier("a", "x"))
    for call in (chain.chat, chain.stream):
        with pytest.raises(BadRequest, match=message):
            call(messages)
    assert not calls(chain, "a")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FailoverChain([]), "tiers is empty"),
        (lambda: FailoverChain("abc"), "give a list of ProviderTier"),
        (lambda: FailoverChain([scripted("x")]), r"tiers\[0\] is a ScriptedProvider"),
        (lambda: FailoverChain([tier("a", "x"), tier("a", "x")]), "'a' is taken"),
        (lambda: FailoverChain([tier("a")], timeout=-1), "timeout=-1"),
        (lambda: FailoverChain([tier("a")], wait=math.nan), "wait=nan"),
        (lambda: FailoverChain([tier("a")], timeout="5"), "timeout='5'"),
        (lambda: FailoverChain([tier("apple")], escalation_model="aple"), "Did you mean 'apple'"),
        (lambda: FailoverChain([tier("a")], escalation_model=5), "escalation_model=5"),
        (lambda: FailoverChain([tier("a")], escalation_marker=" "), "escalation_marker"),
        (lambda: FailoverChain([tier("a")], escalation_marker="**"), "escalation_marker"),
        (lambda: FailoverChain([tier("a")], escalation_prompt=5), "escalation_prompt=5"),
        (lambda: FailoverChain([tier("a")], accept="x"), "accept='x'"),
        (lambda: FailoverChain([tier("a")], on_event=5), "on_event=5"),
        (lambda: FailoverChain([tier("a")], on_error={"x": "next"}), "no exception class"),
        (lambda: FailoverChain([tier("a")], on_error={KeyError: "again"}), "'next' or 'raise'"),
        (lambda: FailoverChain([tier("a")], on_error=[KeyError]), "on_error"),
        (lambda: ProviderTier("", scripted("x")), "give the tier a name"),
        (lambda: tier("a", "x", role="primry"), "Did you mean 'primary'"),
        (lambda: tier("a", "x", models="gpt"), "models='gpt': give a list"),
        (lambda: tier("a", "x", models=["x", ""]), "every model is a non-empty str"),
        (lambda: tier("a", "x", retries=1.5), "retries=1.5"),
        (lambda: tier("a", "x", timeout=-1), "timeout=-1"),
        (lambda: tier("a", "x", max_concurrency=0), "max_concurrency=0"),
        (lambda: tier("a", "x", prices=(1,)), "prices"),
        (lambda: tier("a", "x", prices=(1, 2, 3, 4, 5)), "prices"),
        (lambda: tier("a", "x", prices={"m": (1, -2)}), "-2"),
        (lambda: tier("a", "x", prices={"m": "12"}), r"prices\['m'\]"),
        (lambda: tier("a", "x", params=[1]), "params is a list"),
        (lambda: tier("a", "x", breaker="on"), "breaker is a str"),
        (lambda: ProviderTier("a", ScriptedProvider), "provider is ScriptedProvider"),
        (lambda: ProviderTier("a", object()), "give an object with a chat"),
        (lambda: FailoverChain([tier("a")]).check(-1), "timeout=-1"),
    ],
)
def test_bad_settings_are_refused_at_once(build: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        build()
    assert isinstance(refused.value, ValueError)


def test_a_chat_that_cannot_take_the_arguments_is_refused_when_the_tier_is_built() -> None:
    class Old:
        def chat(self, prompt: str) -> str:
            return prompt

    class Toolless:
        def chat(self, messages: Any, model: Any = None, timeout: float = 1.0) -> None: ...

    class Odd:  # a built-in without a signature is taken as it is
        chat = staticmethod(min)

    for kind in (Old, Toolless):
        with pytest.raises(ConfigError, match=rf"tier 'a': chat\(\) of {kind.__name__} cannot"):
            ProviderTier("a", kind())  # type: ignore[arg-type]
    assert ProviderTier("a", Odd()).name == "a"  # type: ignore[arg-type]
