"""Streams: they fail over until the first delta, never end in silence after it, and give back all they hold."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pickle
import random
import socket
import subprocess
import sys
import threading
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from clocks import FakeClock
from faults import Chat, Peer, descriptors, peer
from test_chain import calls, chain_of, outcomes, tier

import copilot_router
from copilot_router import (
    AllProvidersFailed,
    AuthenticationError,
    BadRequest,
    ChatStream,
    ConfigError,
    ContentFiltered,
    DeadlineExceeded,
    Event,
    FailoverChain,
    InvalidResponse,
    LLMProvider,
    LLMResponse,
    ModelNotFound,
    OpenAIProvider,
    Overloaded,
    ProviderTier,
    ProviderTimeout,
    ProviderUnavailable,
    QuotaExceeded,
    RateLimited,
    RouterError,
    ScriptedProvider,
    ServerError,
    StreamInterrupted,
    ToolCall,
    Usage,
)

PROMPT = "the secret prompt of a stream"
PARTS = ["the ", "secret ", "answer"]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


class Watched(LLMProvider):
    """Streams ``deltas`` (exceptions are raised, callables called) and knows how many of its streams are open."""

    def __init__(self, *deltas: Any, response: LLMResponse | None = None) -> None:
        self.deltas = deltas
        self.response = response or LLMResponse("".join(item for item in deltas if isinstance(item, str)))
        self.opened = self.closed = 0

    def chat(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> LLMResponse:
        return self.response

    def stream(
        self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any
    ) -> Generator[str, None, LLMResponse]:
        self.opened += 1
        try:
            for delta in self.deltas:
                if callable(delta):
                    delta()
                elif isinstance(delta, BaseException):
                    raise delta
                else:
                    yield delta
            return self.response
        finally:
            self.closed += 1


def watched(clock: FakeClock, *deltas: Any, response: LLMResponse | None = None, **settings: Any) -> FailoverChain:
    """A chain of one tier, ``a``, with a Watched provider."""
    return chain_of(clock, ProviderTier("a", Watched(*deltas, response=response), ["a-model"], **settings))


def provider_of(chain: FailoverChain) -> Watched:
    provider = chain.tiers[0].provider
    assert isinstance(provider, Watched)
    return provider


def read(stream: ChatStream) -> tuple[list[str], StreamInterrupted]:
    """The deltas of a stream that breaks, and its error."""
    seen = []
    with pytest.raises(StreamInterrupted) as broken:
        for delta in stream:
            seen.append(delta)
    return seen, broken.value


# -- until the first delta


@pytest.mark.parametrize(
    "error",
    [ProviderUnavailable("x"), ServerError("x"), Overloaded("x"), ProviderTimeout("x"), InvalidResponse("x"), RateLimited("x"),
     QuotaExceeded("x"), AuthenticationError("x"), ModelNotFound("x"), BadRequest("x"), KeyError("x")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
@pytest.mark.parametrize("before", [[], [""], [" ", "\n"]], ids=["at once", "after nothing", "after blanks"])
def test_until_the_first_delta_it_fails_over_like_chat(clock: FakeClock, error: Exception, before: list[str]) -> None:
    """The same tiers, attempts and breakers as a whole answer; blank text is no delta."""

    def made() -> FailoverChain:
        return chain_of(clock, tier("a", [*before, error]), tier("b", PARTS))

    streaming, whole = made(), made()
    stream = streaming.stream(PROMPT)
    response = whole.chat(PROMPT)
    assert list(stream) == PARTS
    assert outcomes(stream.response.attempts) == outcomes(response.attempts)
    assert [one.error for one in stream.response.attempts] == [one.error for one in response.attempts]
    assert streaming.health()[0].breaker == whole.health()[0].breaker
    assert clock.slept == [pytest.approx(0.2, abs=0.1)] * 2 * (len(response.attempts) - 2)


def test_a_server_error_is_tried_again_and_a_short_retry_after_waited_out(clock: FakeClock) -> None:
    """On the same tier, before anything is shown."""
    chain = chain_of(clock, tier("a", ServerError("x"), PARTS, RateLimited("x", retry_after=1.5), PARTS))
    for _ in range(2):
        stream = chain.stream(PROMPT)
        assert list(stream) == PARTS
        assert outcomes(stream.response.attempts) == ["a:failed", "a:ok"]
    assert clock.slept[1] == 1.5


@pytest.mark.parametrize(
    ("items", "kind"),
    [
        ([ProviderUnavailable("x")], AllProvidersFailed), ([BadRequest("x")], BadRequest),
        ([ContentFiltered("x")], ContentFiltered), ([""], AllProvidersFailed), ([[" ", "\n"]], AllProvidersFailed),
        ([ConfigError("x")], ConfigError),
        ([KeyboardInterrupt()], KeyboardInterrupt),
    ],
)  # fmt: skip
def test_what_chat_would_raise_is_raised_by_stream_itself(clock: FakeClock, items: list[Any], kind: type) -> None:
    """Before a view has sent its status; with the attempts."""
    chain = chain_of(clock, tier("a", *items))
    with pytest.raises(kind) as failed:
        chain.stream(PROMPT)
    if isinstance(failed.value, RouterError) and kind is not ConfigError:
        assert outcomes(failed.value.attempts) == ["a:failed"]


def test_wrong_arguments_are_raised_by_stream_itself(clock: FakeClock) -> None:
    """Nobody is asked."""
    chain = chain_of(clock, tier("a", "x"))
    with pytest.raises(BadRequest):
        chain.stream([])
    with pytest.raises(ConfigError):
        chain.stream("hi", timeout=-1)
    with pytest.raises(ConfigError):
        chain.stream("hi", tiers=["b"])
    assert not calls(chain, "a")


def test_all_parked_says_when_to_come_back(clock: FakeClock) -> None:
    """A view can answer 503 with Retry-After."""
    chain = chain_of(clock, tier("a", RateLimited("x", retry_after=30)), tier("b", RateLimited("x", retry_after=20)))
    for _ in range(2):
        with pytest.raises(AllProvidersFailed) as failed:
            chain.stream(PROMPT)
        assert failed.value.retry_after == 20


def test_the_deadline_holds_before_the_first_delta(clock: FakeClock) -> None:
    """DeadlineExceeded, and the tiers that were not asked are named."""
    chain = chain_of(
        clock, ProviderTier("a", Watched(lambda: clock.advance(10), ServerError("x")), ["m"]), tier("b", PARTS)
    )
    with pytest.raises(DeadlineExceeded, match="b: CircuitOpen: no time left") as late:
        chain.stream(PROMPT, timeout=5)
    assert outcomes(late.value.attempts) == ["a:failed", "b:skipped"]


def test_a_tier_waits_for_its_turn_like_in_chat(clock: FakeClock) -> None:
    """``wait`` sleeps for a tier that failed; ``tiers`` and ``model`` choose; ``system`` is put in front."""
    chain = chain_of(clock, tier("a", ProviderUnavailable, PARTS), tier("b", PARTS, models=["b1", "b2"]))
    assert list(chain.stream(PROMPT, tiers=["a"], wait=5)) == PARTS
    assert clock.slept == [1.0]
    stream = chain.stream(PROMPT, model="b2", system="be kind", temperature=0.5)
    assert list(stream) == PARTS
    assert (stream.response.provider, stream.response.model) == ("b", "b2")
    assert calls(chain, "b")[0]["messages"][0] == {"role": "system", "content": "be kind"}
    assert calls(chain, "b")[0]["kwargs"]["temperature"] == 0.5


def test_a_break_while_the_marker_is_still_possible_shows_nothing(clock: FakeClock) -> None:
    """What was held back is thrown away, and the next tier answers whole."""
    chain = chain_of(clock, tier("a", ["[ESC", InvalidResponse("cut")]), tier("b", PARTS), escalation_model="b-model")
    stream = chain.stream(PROMPT)
    assert list(stream) == PARTS
    assert outcomes(stream.response.attempts) == ["a:failed", "b:ok"]


def test_an_answer_without_text_ends_at_once(clock: FakeClock) -> None:
    """Tool calls alone: no delta, and the response is there after the first step."""
    called = LLMResponse(tool_calls=[ToolCall("1", "f", {"x": 1})], finish_reason="tool_calls", usage=Usage(3, 4))
    stream = watched(clock, response=called).stream(PROMPT)
    assert list(stream) == []
    assert stream.text == ""
    assert stream.response.tool_calls == called.tool_calls
    assert stream.response.usage == Usage(3, 4)


# -- after it


@pytest.mark.parametrize(
    ("error", "breaker"),
    [
        (ServerError("x"), "closed 1"), (InvalidResponse("x"), "closed 1"),
        (ProviderTimeout("x", code="stall_timeout"), "closed 1"), (KeyError("x"), "closed 1"), (OSError("x"), "closed 1"),
        (BadRequest("x"), "closed 0"), (ContentFiltered("x"), "closed 0"),
        (RateLimited("x", retry_after=30), "open 30"), (RateLimited("x"), "open 15"), (AuthenticationError("x"), "open 600"),
        (QuotaExceeded("x"), "open 600"), (Overloaded("x", retry_after=20), "open 20"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)  # fmt: skip
def test_a_break_raises_with_what_had_arrived(clock: FakeClock, error: Exception, breaker: str) -> None:
    """StreamInterrupted with text, attempts and cause; the breaker takes the cause's verdict; nobody else is asked."""
    chain = chain_of(clock, tier("a", [*PARTS, error]), tier("b", "a splice"))
    stream = chain.stream(PROMPT)
    seen, broken = read(stream)
    assert seen == PARTS
    assert broken.partial == stream.text == "".join(PARTS)
    assert broken.__cause__ is error
    assert outcomes(broken.attempts) == ["a:failed"]
    assert (broken.attempts[0].error or "").startswith(type(error).__name__)
    assert (broken.provider, broken.model) == ("a", "a-model")
    for name in ("status", "code", "retry_after", "request_id"):
        assert getattr(broken, name) == getattr(error, name, None)
    assert not calls(chain, "b")
    seen_now = chain.tiers[0].breaker.snapshot()
    number = seen_now.failures if seen_now.state == "closed" else seen_now.retry_after
    assert f"{seen_now.state} {number:g}" == breaker
    with pytest.raises(RouterError, match="not exhausted"):
        _ = stream.response
    assert next(stream, "over") == "over"  # as any generator that has raised


def test_three_broken_streams_open_the_breaker(clock: FakeClock) -> None:
    """A deadlier fault than a refusal; the fourth call goes elsewhere at once."""
    chain = chain_of(clock, tier("a", [*PARTS, InvalidResponse("truncated")]), tier("b", PARTS))
    for _ in range(3):
        read(chain.stream(PROMPT))
    stream = chain.stream(PROMPT)
    assert outcomes(stream.response.attempts if list(stream) else ()) == ["a:skipped", "b:ok"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), AssertionError("x"), ConfigError("x"), GeneratorExit()])
def test_what_is_not_the_providers_passes_through_unchanged(clock: FakeClock, error: BaseException) -> None:
    """Also in the middle of a stream; neutral, not even a success, and everything is given back."""
    chain = watched(clock, "a", error, max_concurrency=1)
    chain.tiers[0].breaker.admit().failure()
    stream = chain.stream(PROMPT)
    assert next(stream) == "a"
    with pytest.raises(type(error)) as raised:
        next(stream)
    assert raised.value is error
    assert chain.tiers[0].breaker.snapshot().failures == 1
    assert provider_of(chain).closed == 1
    assert chain.stream(PROMPT, timeout=0.1).close() is None


def test_an_interruption_shows_no_text_and_pickles(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    """The partial answer is an attribute, and in nothing that is printed or logged."""
    caplog.set_level(logging.DEBUG, "copilot_router")
    events: list[Event] = []
    chain = chain_of(clock, tier("a", [*PARTS, InvalidResponse("cut")]), on_event=events.append)
    _, broken = read(chain.stream(PROMPT))
    copied = pickle.loads(pickle.dumps(broken))
    assert copied.partial == broken.partial == "".join(PARTS)
    assert copied.attempts == broken.attempts
    shown = f"{broken} {broken!r} {broken.args} {broken.attempts} {caplog.text} {events}"
    assert "secret" not in shown
    assert "a broke off: InvalidResponse: cut" in str(broken)


def test_a_custom_stream_that_returns_no_response_is_told_so(clock: FakeClock) -> None:
    """Never a silent end: the programmer forgot the return."""
    stream = chain_of(clock, tier("a", PARTS)).stream(PROMPT)
    assert list(stream) == PARTS
    provider = ScriptedProvider(["x"], repeat=True)
    provider.stream = lambda *args, **kwargs: (part for part in PARTS)  # type: ignore[method-assign, assignment, misc]
    forgot = chain_of(clock, ProviderTier("a", provider)).stream(PROMPT)
    assert [next(forgot) for _ in PARTS] == PARTS
    with pytest.raises(ConfigError, match="return an LLMResponse"):
        next(forgot)


# -- trials


def half_open(clock: FakeClock, *deltas: Any, **settings: Any) -> FailoverChain:
    """A chain of one tier whose next call is the trial."""
    chain = watched(clock, *deltas, **settings)
    chain.tiers[0].breaker.open(5)
    clock.advance(5)
    return chain


def test_a_trial_is_over_at_its_first_delta(clock: FakeClock) -> None:
    """A slow reader does not hold it: others are let in while it reads."""
    chain = half_open(clock, *PARTS)
    slow = chain.stream(PROMPT)
    assert chain.tiers[0].breaker.is_closed
    assert list(chain.stream(PROMPT)) == PARTS
    assert list(slow) == PARTS


def test_blank_text_is_no_proof(clock: FakeClock) -> None:
    """While nothing can be shown yet, the trial is still under way: the next caller is refused."""
    states: list[str] = []
    chain = half_open(clock, " ", lambda: states.append(chain.tiers[0].breaker.state), "text")
    assert list(chain.stream(PROMPT)) == [" text"]
    assert states == ["half_open"]


@pytest.mark.parametrize(("threshold", "after"), [(3, "closed 1"), (1, "open 1")])
def test_a_fault_after_the_trials_first_delta_counts_once(clock: FakeClock, threshold: int, after: str) -> None:
    """Like that of any other call."""
    chain = chain_of(clock, ProviderTier("a", Watched("x", ServerError("y"))), failure_threshold=threshold)
    chain.tiers[0].breaker.open(5)
    clock.advance(5)
    read(chain.stream(PROMPT))
    snapshot = chain.tiers[0].breaker.snapshot()
    assert f"{snapshot.state} {snapshot.failures}" == after


def test_a_trial_that_fails_before_its_first_delta_opens_again(clock: FakeClock) -> None:
    """Blank or held-back text does not save it."""
    chain = half_open(clock, " ", InvalidResponse("x"))
    with pytest.raises(AllProvidersFailed):
        chain.stream(PROMPT)
    assert chain.tiers[0].breaker.is_open


def test_a_failure_of_an_older_generation_changes_nothing(clock: FakeClock) -> None:
    """The breaker was opened and recovered while the stream was read."""
    chain = watched(clock, "x", InvalidResponse("y"))
    old = chain.stream(PROMPT)
    chain.tiers[0].breaker.open(5)
    clock.advance(5)
    fresh = chain.stream(PROMPT)
    read(old)
    assert chain.tiers[0].breaker.snapshot().failures == 0
    read(fresh)
    assert chain.tiers[0].breaker.snapshot().failures == 1


def test_a_streams_success_resets_the_count(clock: FakeClock) -> None:
    """At its end, and when it is closed after a delta; not when none was taken."""
    chain = chain_of(clock, tier("a", ProviderUnavailable, PARTS))
    breaker = chain.tiers[0].breaker

    def after(end: Callable[[ChatStream], Any]) -> int:
        with pytest.raises(AllProvidersFailed):
            chain.stream(PROMPT)
        assert breaker.snapshot().failures
        end(chain.stream(PROMPT))
        return breaker.snapshot().failures

    assert after(ChatStream.close) == 1
    assert after(list) == 0
    assert after(lambda stream: (next(stream), stream.close())) == 0


# -- escalation


def test_an_escalation_goes_on_with_the_stronger_models_deltas(clock: FakeClock) -> None:
    """One by one; the weaker one's text is nowhere, its reason, attempt and cost are."""
    weak = Watched("[ESC", "ALATE] too", " hard", response=LLMResponse("[ESCALATE] too hard", usage=Usage(10**6, 0)))
    strong = Watched(*PARTS, response=LLMResponse("".join(PARTS), usage=Usage(0, 10**6)))
    tiers = [ProviderTier("weak", weak, ["small"], prices=(1, 1)), ProviderTier("strong", strong, ["big"], prices=(2, 8))]
    chain = chain_of(clock, *tiers, escalation_model="big")
    stream = chain.stream(PROMPT)
    assert strong.closed == 0
    assert list(stream) == PARTS
    response = stream.response
    assert outcomes(response.attempts) == ["weak:escalated", "strong:ok"]
    assert (response.escalation, response.provider, response.cost) == ("too hard", "strong", 9.0)
    assert weak.closed == 1


def test_accept_sees_the_whole_answer_first(clock: FakeClock) -> None:
    """So its stream is one delta; a refused one goes on to the next tier."""
    seen: list[str] = []

    def accept(response: LLMResponse) -> bool:
        seen.append(response.text)
        return response.provider == "" and response.text.startswith("the")

    chain = chain_of(clock, tier("a", ["bad ", "one"]), tier("b", PARTS), accept=accept)
    stream = chain.stream(PROMPT)
    assert seen == ["bad one", "".join(PARTS)]
    assert list(stream) == ["".join(PARTS)]
    assert outcomes(stream.response.attempts) == ["a:escalated", "b:ok"]


# -- what a stream is


def test_the_response_is_complete_in_the_end(clock: FakeClock) -> None:
    """Tool calls, usage, attempts, cost, latency; an error before; the same as ``chat()`` returns."""
    answer = LLMResponse(
        "".join(PARTS), [ToolCall("1", "f", {"x": 1})], "tool_calls", Usage(1000, 2000), "model-9",
        reasoning="hm", request_id="r",
    )
    down = ProviderTier("down", ScriptedProvider([ProviderUnavailable("x")], repeat=True))
    up = ProviderTier("up", Watched(PARTS[0], lambda: clock.advance(2), *PARTS[1:], response=answer), prices=(1.0, 2.0))
    chain = chain_of(clock, down, up)
    stream = chain.stream(PROMPT)
    texts = []
    for _ in PARTS:
        with pytest.raises(RouterError, match=r"not exhausted: read it to its end before asking for \.response"):
            _ = stream.response
        next(stream)
        texts.append(stream.text)
        clock.advance(1)
    assert texts == ["the ", "the secret ", "the secret answer"]
    with pytest.raises(StopIteration) as end:
        next(stream)
    response = stream.response
    assert end.value.value is response
    assert response is not answer
    for name in ("content", "tool_calls", "finish_reason", "usage", "model", "reasoning", "request_id"):
        assert getattr(response, name) == getattr(answer, name)
    assert outcomes(response.attempts) == ["down:failed", "up:ok"]
    assert (response.provider, response.cost, response.latency) == ("up", 0.005, 5.0)
    assert response.attempts[1].latency == 5.0
    assert stream.text == response.text == "the secret answer"
    assert next(stream, None) is None
    assert stream.response is response
    health = chain.health()[1]
    assert (health.calls, health.failures, health.last_error, health.last_latency) == (1, 0, None, 5.0)


def test_it_is_a_generator(clock: FakeClock) -> None:
    """An iterator and a context manager that ``yield from`` understands; it shows no text of its own."""
    chain = chain_of(clock, tier("a", PARTS))
    returned: list[LLMResponse] = []

    def relay() -> Iterator[str]:
        returned.append((yield from chain.stream(PROMPT)))

    assert list(relay()) == PARTS
    assert returned[0].text == "".join(PARTS)
    with chain.stream(PROMPT) as stream:
        assert iter(stream) is stream
        assert isinstance(stream, Generator)
        assert stream.send(None) == PARTS[0]
        assert repr(stream) == "<ChatStream 1 deltas so far>"
    assert next(stream, "over") == "over"
    whole = chain.stream(PROMPT)
    assert list(whole) == PARTS
    assert repr(whole) == "<ChatStream exhausted>"


def test_a_provider_without_stream_gives_one_delta(clock: FakeClock) -> None:
    """An object with ``chat()`` is enough."""

    class Plain:
        def chat(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> LLMResponse:
            return LLMResponse(f"{model} heard {messages[0]['content']}", usage=Usage(1, 2))

    stream = chain_of(clock, ProviderTier("a", Plain(), ["m"])).stream("this")  # type: ignore[arg-type]
    assert list(stream) == ["m heard this"]
    assert stream.response.usage == Usage(1, 2)


# -- ending early


def close(stream: ChatStream) -> None:
    stream.close()
    stream.close()


def leave(stream: ChatStream) -> None:
    with stream:
        pass


def leave_by_error(stream: ChatStream) -> None:
    with contextlib.suppress(LookupError), stream:
        raise LookupError


def hang_up(stream: ChatStream) -> None:
    with pytest.raises(GeneratorExit):
        stream.throw(GeneratorExit)


def fail_while_reading(stream: ChatStream) -> None:
    with pytest.raises(LookupError):
        stream.throw(LookupError("mine"))


def forget(stream: ChatStream) -> None:
    del stream


def forget_in_a_cycle(stream: ChatStream) -> None:
    cycle: list[Any] = [stream]
    cycle.append(cycle)


ENDINGS = [close, leave, leave_by_error, hang_up, fail_while_reading, forget, forget_in_a_cycle]


@pytest.mark.parametrize("end", ENDINGS, ids=lambda end: end.__name__)
@pytest.mark.parametrize("taken", [0, 1, 2])
@pytest.mark.parametrize("trial", [False, True], ids=["closed", "trial"])
def test_ending_early_is_no_failure(clock: FakeClock, end: Callable[[ChatStream], None], taken: int, trial: bool) -> None:
    """However it ends, and however much was read: provider closed, place given back, breaker closed, nothing counted."""
    make = half_open if trial else watched
    chain = make(clock, *PARTS, max_concurrency=1)
    one = [chain.stream(PROMPT)]
    for _ in range(taken):
        next(one[0])
    assert (provider_of(chain).opened, provider_of(chain).closed) == (1, 0)
    end(one.pop())
    gc.collect()
    assert provider_of(chain).closed == 1
    snapshot = chain.tiers[0].breaker.snapshot()
    assert (snapshot.state, snapshot.failures) == ("closed", 0)
    with chain.stream(PROMPT, timeout=1) as again:
        assert list(again) == PARTS


def test_closing_what_is_over_changes_nothing(clock: FakeClock) -> None:
    """After the end, and after a break."""
    chain = watched(clock, *PARTS)
    stream = chain.stream(PROMPT)
    assert list(stream) == PARTS
    stream.close()
    assert stream.response.text == "".join(PARTS)
    broken = watched(clock, "x", InvalidResponse("y")).stream(PROMPT)
    read(broken)
    broken.close()
    assert broken.text == "x"


def test_a_provider_that_fails_while_it_is_closed_keeps_nobodys_place(clock: FakeClock) -> None:
    """Its error is its reader's, and the tier serves on."""

    class Stubborn(Watched):
        def stream(
            self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any
        ) -> Generator[str, None, LLMResponse]:
            try:
                yield from PARTS
                return self.response
            finally:
                raise OSError("cannot close")

    chain = chain_of(clock, ProviderTier("a", Stubborn(), max_concurrency=1))
    for _ in range(2):
        stream = chain.stream(PROMPT, timeout=0.1)
        with pytest.raises(OSError, match="cannot close"):
            stream.close()


# -- max_concurrency


@pytest.mark.parametrize("end", [list, close, forget, read], ids=lambda end: end.__name__)
def test_a_stream_holds_its_place_until_it_ends(clock: FakeClock, end: Callable[[ChatStream], Any]) -> None:
    """As long as it is open others go to the next tier; afterwards they do not."""
    deltas = [*PARTS, InvalidResponse("x")] if end is read else PARTS
    chain = chain_of(
        clock, ProviderTier("a", Watched(*deltas), max_concurrency=1), tier("b", "elsewhere"), failure_threshold=99
    )
    for _ in range(3):
        held = [chain.stream(PROMPT)]
        assert list(chain.stream(PROMPT)) == ["elsewhere"]
        end(held.pop())


def test_a_waiting_call_gets_the_place_of_a_stream_that_ends() -> None:
    """From another thread, when there is nobody else to ask."""
    waits = threading.Event()
    provider = Watched(*PARTS)
    chain = FailoverChain([ProviderTier("a", provider, max_concurrency=1)], clock=lambda: waits.set() or time.monotonic())
    first = chain.stream(PROMPT)
    waits.clear()
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(lambda: list(chain.stream(PROMPT, timeout=10)))
        assert waits.wait(5)
        assert list(first) == PARTS
        assert second.result(5) == PARTS


@pytest.mark.quiet
def test_a_stream_lost_at_any_moment_blocks_nobody() -> None:
    """The garbage collector may finalize it between any two steps of another call, in the same thread."""
    plain = FailoverChain.chat.__wrapped__  # type: ignore[attr-defined]  # without the steps of the suite's own watch
    gc.collect()
    gc.freeze()
    gc.disable()
    finished = []

    def run(moment: int) -> int:
        chain = FailoverChain([ProviderTier("a", Watched(*PARTS), ["m"], max_concurrency=1)])
        forget_in_a_cycle(chain.stream(PROMPT))
        steps = 0

        def step(*_: Any) -> None:
            nonlocal steps
            steps += 1
            if steps == moment:
                gc.collect()

        sys.setprofile(step)
        try:
            with contextlib.suppress(AllProvidersFailed):
                plain(chain, PROMPT, timeout=0.005)
        finally:
            sys.setprofile(None)
        gc.collect()
        assert plain(chain, PROMPT, timeout=5).text == "".join(PARTS)
        return steps

    def work() -> None:
        moment = 1
        while run(moment) >= moment:
            moment += 1
        finished.append(moment)

    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
        thread.join(30)
        assert finished
        assert finished[0] > 50
    finally:
        gc.enable()
        gc.unfreeze()


# -- time


@pytest.mark.parametrize(("pause", "late"), [(9.9, False), (10.0, True), (5000.0, True)])
def test_the_callers_own_time_counts_towards_the_deadline(clock: FakeClock, pause: float, late: bool) -> None:
    """Who stops reading for longer gets StreamInterrupted at the next step, with what had arrived; nobody is blamed."""
    chain = watched(clock, *PARTS, max_concurrency=1)
    stream = chain.stream(PROMPT, timeout=10)
    assert next(stream) == PARTS[0]
    clock.advance(pause)
    if not late:
        assert list(stream) == PARTS[1:]
        return
    _, broken = read(stream)
    assert broken.partial == PARTS[0]
    assert isinstance(broken.__cause__, ProviderTimeout)
    assert broken.code == "attempt_timeout"
    assert "the deadline of the call passed" in str(broken)
    assert outcomes(broken.attempts) == ["a:failed"]
    assert chain.tiers[0].breaker.snapshot().failures == 0
    assert provider_of(chain).closed == 1
    assert list(chain.stream(PROMPT, timeout=1)) == PARTS


def test_time_before_the_first_step_counts_too(clock: FakeClock) -> None:
    """The first delta was in hand, and is handed out; the next step is late."""
    stream = watched(clock, *PARTS).stream(PROMPT, timeout=10)
    clock.advance(20)
    seen, broken = read(stream)
    assert seen == [broken.partial] == [PARTS[0]]


def test_a_deadline_that_the_provider_notices_is_nobodys_fault(clock: FakeClock) -> None:
    """Unless its silence had reached a limit of its own."""
    for code, failures in (("attempt_timeout", 0), ("stall_timeout", 1)):
        chain = watched(clock, "x", lambda: clock.advance(10), ProviderTimeout("late", code=code))
        _, broken = read(chain.stream(PROMPT, timeout=10))
        assert broken.code == code
        assert chain.tiers[0].breaker.snapshot().failures == failures


@pytest.mark.parametrize(("reader", "provider", "failures"), [(0.0, 5.0, 1), (3.0, 1.0, 0), (3.0, 5.0, 1)])
def test_a_slow_reader_is_no_slow_provider(clock: FakeClock, reader: float, provider: float, failures: int) -> None:
    """When the time of an attempt is over, it is the tier's failure only if the tier itself took that long."""
    late = ProviderTimeout("late", code="attempt_timeout")
    chain = watched(clock, "x", lambda: clock.advance(provider), late, timeout=5.0)
    stream = chain.stream(PROMPT, timeout=100)
    clock.advance(reader)
    next(stream)
    clock.advance(reader)
    _, broken = read(stream)
    assert broken.__cause__ is late
    assert chain.tiers[0].breaker.snapshot().failures == failures


# -- chains in chains


def nested(clock: FakeClock, *deltas: Any, **settings: Any) -> FailoverChain:
    """A chain whose first tier is a chain, and whose second answers "b"."""
    inner = chain_of(clock, ProviderTier("x", Watched(*deltas), ["m"]))
    return chain_of(clock, ProviderTier("in", inner, ["m"]), tier("b", "b"), **settings)


def test_a_nested_chain_streams_delta_by_delta(clock: FakeClock) -> None:
    """Its attempts join the record."""
    moments: list[float] = []
    chain = nested(clock, "x", lambda: moments.append(clock.now), "y")
    stream = chain.stream(PROMPT)
    assert next(stream) == "x"
    assert not moments
    assert list(stream) == ["y"]
    assert outcomes(stream.response.attempts) == ["in/x:ok"]
    assert stream.response.provider == "in/x"


def test_a_nested_chain_that_fails_before_its_first_delta(clock: FakeClock) -> None:
    """The outer chain goes on, and its record says all."""
    stream = nested(clock, ProviderUnavailable("x")).stream(PROMPT)
    assert list(stream) == ["b"]
    assert outcomes(stream.response.attempts) == ["in/x:failed", "b:ok"]


@pytest.mark.parametrize(("error", "tier"), [(InvalidResponse("cut"), "in/x"), (KeyError("cut"), "in")])
def test_what_a_nested_chain_showed_only_to_its_chain_is_no_interruption(
    clock: FakeClock, error: Exception, tier: str
) -> None:
    """The outer chain had held it back as a possible marker: the next tier answers, and the record names the failure."""
    chain = nested(clock, "[ESC", error, escalation_model="b-model")
    stream = chain.stream(PROMPT)
    assert list(stream) == ["b"]
    assert outcomes(stream.response.attempts) == [f"{tier}:failed", "b:ok"]
    assert [one.breaker.snapshot().failures for one in chain.tiers] == [1, 0]


def test_a_break_in_a_nested_chain_reaches_the_reader(clock: FakeClock) -> None:
    """With all that was shown, the attempts of both, and the cause; both breakers take its verdict."""
    for error, verdicts in ((InvalidResponse("cut"), [1, 1]), (BadRequest("x"), [0, 0])):
        chain = nested(clock, "x", "y", error)
        _, broken = read(chain.stream(PROMPT))
        assert broken.partial == "xy"
        assert broken.__cause__ is not None
        assert broken.__cause__.__cause__ is error
        assert outcomes(broken.attempts) == ["in/x:failed"]
        inner = chain.tiers[0].provider
        assert isinstance(inner, FailoverChain)
        assert [one.tiers[0].breaker.snapshot().failures for one in (chain, inner)] == verdicts


def test_the_deadline_in_a_nested_chain_is_nobodys_fault(clock: FakeClock) -> None:
    """Neither the inner tier's nor the inner chain's."""
    late = ProviderTimeout("late", code="attempt_timeout")
    chain = nested(clock, "x", lambda: clock.advance(10), late)
    read(chain.stream(PROMPT, timeout=10))
    inner = chain.tiers[0].provider
    assert isinstance(inner, FailoverChain)
    assert [one.tiers[0].breaker.snapshot().failures for one in (chain, inner)] == [0, 0]


def test_closing_closes_nested_streams(clock: FakeClock) -> None:
    """Down to the provider."""
    chain = nested(clock, *PARTS)
    inner = chain.tiers[0].provider
    assert isinstance(inner, FailoverChain)
    with chain.stream(PROMPT) as stream:
        next(stream)
    assert provider_of(inner).closed == 1


# -- events and logs


def test_the_events_of_a_stream(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    """Attempt, failover, attempt, and done at its end; no text in any of them, nor in the log."""
    caplog.set_level(logging.DEBUG, "copilot_router")
    events: list[Event] = []
    chain = chain_of(clock, tier("a", ProviderUnavailable("x")), tier("b", PARTS), on_event=events.append)
    stream = chain.stream(PROMPT)
    assert [(event.kind, event.tier) for event in events] == [("attempt", "a"), ("failover", "a"), ("attempt", "b")]
    clock.advance(3)
    assert list(stream) == PARTS
    assert [event.kind for event in events[3:]] == ["done"]
    assert events[-1].tier == "b"
    assert (events[-1].data["outcome"], events[-1].data["latency"], events[-1].data["attempts"]) == ("ok", 3.0, 2)
    assert "answered: a: ProviderUnavailable: x 0 ms -> b: ok 3000 ms" in caplog.text
    assert "secret" not in f"{events} {caplog.text}"


def test_the_events_of_a_stream_that_breaks(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    """The breaker opens before done says how the call ended; the log warns of both."""
    events: list[Event] = []
    chain = chain_of(clock, tier("a", ["x", InvalidResponse("cut")]), on_event=events.append, failure_threshold=1)
    stream = chain.stream(PROMPT)
    clock.advance(3)
    read(stream)
    assert [event.kind for event in events] == ["attempt", "breaker", "done"]
    assert events[1].data == {"old": "closed", "new": "open", "reason": "InvalidResponse: cut"}
    assert events[2].data == {"outcome": "StreamInterrupted", "latency": 3.0}
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any(message.startswith("call failed: a: InvalidResponse: cut") for message in warned)
    assert len(warned) == 2


def test_the_events_of_an_escalation_in_a_stream(clock: FakeClock) -> None:
    """As for a whole answer."""
    events: list[Event] = []
    chain = chain_of(
        clock, tier("weak", ["[ESC", "ALATE] no"]), tier("b", PARTS), escalation_model="b-model", on_event=events.append
    )
    list(chain.stream(PROMPT))
    assert [event.kind for event in events] == ["attempt", "escalation", "attempt", "done"]


# -- over real sockets


WIRE = Chat()
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def text_event(text: str) -> bytes:
    return WIRE.frames(WIRE.texts([text]))


OPENING = WIRE.frames(WIRE.opening())
CLOSING = WIRE.frames(WIRE.closing()) + WIRE.end


class Gated:
    """A server whose answers are texts that come one by one, each when it is allowed; it knows who has hung up."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts
        self.gate = threading.Semaphore(0)
        self.gone = threading.Semaphore(0)
        self.broken = False  #: ends the connection instead of the next text

    @staticmethod
    def head(connection: socket.socket) -> None:
        connection.sendall(STREAM + b"Connection: close\r\n\r\n" + OPENING)

    def serve(self, server: Peer, connection: socket.socket, request: bytes) -> bool:
        self.head(connection)
        for text in self.texts:
            self.gate.acquire(timeout=10)
            if self.broken:
                return False
            connection.sendall(text_event(text))
        self.gate.acquire(timeout=10)
        if server.stopping.is_set() or self.broken:
            return False
        connection.sendall(CLOSING)
        return False

    def watch(self, server: Peer, connection: socket.socket, request: bytes) -> bool:
        """Two texts, then nothing until the client goes."""
        self.head(connection)
        connection.sendall(text_event("one") + text_event("two"))
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
        if not server.stopping.is_set():
            self.gone.release()
        return False

    def allow(self, count: int = 1) -> None:
        self.gate.release(count)


WORDS = [f"word{at} " for at in range(12)]


def talk(server: Peer, connection: socket.socket, request: bytes) -> bool:
    """Twelve words, each in an event of its own, then the end; the connection is kept."""
    events = [OPENING, *map(text_event, WORDS), CLOSING]
    body = [b"%x\r\n%s\r\n" % (len(event), event) for event in events]
    connection.sendall(STREAM + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(body[:5]))
    connection.sendall(b"".join(body[5:]) + b"0\r\n\r\n")
    return True


def http_chain(server: Peer, clock: Callable[[], float] = time.monotonic, **limits: Any) -> FailoverChain:
    return FailoverChain([ProviderTier("http", OpenAIProvider("key", server.url, **limits), ["m"])], clock=clock)


def test_deltas_arrive_as_they_are_sent() -> None:
    """Each before the next one exists, and none is lost when the stream is read in another thread than it was opened in."""
    gated = Gated("a", "b", "c")
    with peer(gated.serve) as server, http_chain(server) as chain, ThreadPoolExecutor(1) as other:
        gated.allow()
        stream = chain.stream(PROMPT)
        assert stream.text == ""
        for text in "abc":
            assert other.submit(next, stream).result(5) == text
            gated.allow()
        assert other.submit(lambda: list(stream)).result(5) == []
        assert stream.response.usage == Usage(11, 7)
        assert stream.response.model == "a-model"


def test_a_connection_that_breaks_in_the_middle() -> None:
    """Partial text, InvalidResponse as the cause, one failure counted."""
    gated = Gated("a", "b", "c")
    with peer(gated.serve) as server, http_chain(server) as chain:
        gated.allow(2)
        stream = chain.stream(PROMPT)
        assert [next(stream), next(stream)] == ["a", "b"]
        gated.broken = True
        gated.allow()
        _, broken = read(stream)
        assert broken.partial == "ab"
        assert isinstance(broken.__cause__, InvalidResponse)
        assert chain.tiers[0].breaker.snapshot().failures == 1


def test_the_callers_time_is_never_a_stall_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than every silence limit, after each delta: all of it arrives, and the breaker has seen a success."""
    shift = 0.0
    shifted = types.SimpleNamespace(monotonic=lambda: time.monotonic() + shift, time=time.time, sleep=time.sleep)
    monkeypatch.setattr(copilot_router, "time", shifted)
    gated = Gated("a", "b", "c")
    with peer(gated.serve) as server, http_chain(server) as chain:
        gated.allow()
        stream = chain.stream(PROMPT, timeout=float("inf"))
        seen = []
        for _ in range(3):
            seen.append(next(stream))
            shift += 1e5
            gated.allow()
        assert next(stream, "over") == "over"
        assert seen == ["a", "b", "c"]
        assert stream.response.text == "abc"
        assert chain.tiers[0].breaker.snapshot().failures == 0


def test_the_servers_silence_after_a_delta_is_a_stall() -> None:
    """Of the provider: it counts."""
    gated = Gated("a", "b")
    with peer(gated.serve) as server, http_chain(server, stall_timeout=0.05) as chain:
        gated.allow()
        _, broken = read(chain.stream(PROMPT))
        assert broken.code == "stall_timeout"
        assert broken.partial == "a"
        assert chain.tiers[0].breaker.snapshot().failures == 1
        gated.allow(5)


def test_the_deadline_holds_while_waiting_for_a_delta() -> None:
    """To the contract's precision, and it is nobody's fault."""
    for _ in range(3):  # a busy machine may be late, but not each time
        gated = Gated("a", "b")
        with peer(gated.serve) as server, http_chain(server) as chain:
            gated.allow()
            start = time.monotonic()
            _, broken = read(chain.stream(PROMPT, timeout=0.4))
            taken = time.monotonic() - start
            gated.allow(5)
            assert broken.partial == "a"
            assert broken.code == "attempt_timeout"
            assert chain.tiers[0].breaker.snapshot().failures == 0
        if taken < 0.4 * 1.05 + 0.1:
            break
    assert 0.39 < taken < 0.4 * 1.05 + 0.1


@pytest.mark.parametrize("end", ENDINGS, ids=lambda end: end.__name__)
@pytest.mark.parametrize("taken", [0, 1])
def test_ending_early_closes_the_connection(end: Callable[[ChatStream], None], taken: int) -> None:
    """The server sees it at once; no descriptor stays open, no ResourceWarning is given."""
    gated = Gated()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with peer(gated.watch) as server, http_chain(server) as chain:
            before = descriptors()
            one = [chain.stream(PROMPT)]
            assert descriptors() > before
            for _ in range(taken):
                next(one[0])
            end(one.pop())
            gc.collect()
            assert gated.gone.acquire(timeout=5)
            settle(before)
    assert [str(one.message) for one in warned] == []


def test_a_kept_connection_is_closed_before_its_socket_complains() -> None:
    """The socket is older than the stream that is lost in a cycle with it: it must not be finalized first."""
    with warnings.catch_warnings(record=True) as warned, peer(talk) as server, http_chain(server) as chain:
        warnings.simplefilter("always")
        assert list(chain.stream(PROMPT)) == WORDS
        forget_in_a_cycle(chain.stream(PROMPT))
        gc.collect()
        assert server.connections == 1
    assert [str(one.message) for one in warned] == []


def settle(before: int, threads: int | None = None) -> None:
    """The server's own ends take a moment: then no more descriptors or threads than before."""
    until = time.monotonic() + 5
    while time.monotonic() < until and (
        descriptors() > before or (threads is not None and threading.active_count() > threads)
    ):
        threading.Event().wait(0.01)
    assert descriptors() <= before
    assert threads is None or threading.active_count() <= threads


AT_EXIT = """
import sys, threading
from copilot_router import FailoverChain, OpenAIProvider, ProviderTier
chain = FailoverChain([ProviderTier("http", OpenAIProvider("key", sys.argv[1]), ["m"], max_concurrency=9)])
if len(sys.argv) > 2:
    assert len(list(chain.stream("hi"))) == 12
never_read = chain.stream("hi")
half_read = chain.stream("hi")
assert next(half_read) in ("one", "word0 ")
cycle = [chain.stream("hi")]
cycle.append(cycle)
class Holder: pass
holder = Holder()
holder.myself, holder.stream = holder, chain.stream("hi")
del holder
def work():
    local.stream = chain.stream("hi")
    next(local.stream)
local = threading.local()
thread = threading.Thread(target=work)
thread.start()
thread.join()
def reader():
    for delta in chain.stream("hi"):
        yield delta
reading = reader()
next(reading)
print("end of the program")
"""


@pytest.mark.parametrize("kept", [False, True])
def test_nothing_is_said_at_interpreter_exit(kept: bool) -> None:
    """Streams left in globals, cycles, thread locals and generators: the program ends at once and in silence."""
    gated = Gated()
    with peer(talk if kept else gated.watch) as server:
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-W", "error", "-c", AT_EXIT, server.url, *["kept"] * kept],
            env={**os.environ, "PYTHONPATH": str(Path(copilot_router.__file__).parent)},
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, "end of the program\n", "")
        assert kept or all(gated.gone.acquire(timeout=5) for _ in range(6))


# -- a thousand that are abandoned


def test_a_thousand_abandoned_streams_leave_nothing_behind() -> None:
    """At random points, from 16 threads, half of them while half-open, half read in another thread than they were opened in.

    Afterwards: descriptors and threads as before, no breaker opened, no trial stuck, all places free, no ResourceWarning.
    """
    seen: Counter[tuple[str, str]] = Counter()

    def on_event(event: Event) -> None:
        if event.kind == "breaker":
            seen[event.data["new"], event.data["reason"]] += 1

    endings = [list, close, leave, hang_up, forget, forget_in_a_cycle]
    with warnings.catch_warnings(record=True) as warned, peer(talk) as server:
        warnings.simplefilter("always")
        idle = descriptors()
        provider = OpenAIProvider("key", server.url, connect_timeout=30)
        busy = FailoverChain([ProviderTier("busy", provider, ["m"], max_concurrency=4)], on_event=on_event)

        def made() -> FailoverChain:
            last = ProviderTier("last", provider, ["m"], role="emergency")
            return FailoverChain([ProviderTier("ill", provider, ["m"]), last], on_event=on_event)

        shared, own = made(), [made() for _ in range(16)]
        assert "".join(busy.stream(PROMPT)) == "".join(shared.stream(PROMPT)) == "".join(WORDS)
        busy.close()
        settle(idle)
        before, threads = descriptors(), threading.active_count()
        others: list[ChatStream] = []

        def work(seed: int) -> int:
            chance = random.Random(seed)
            for number in range(64):
                chain = (busy, shared, busy, own[seed])[number % 4]
                if chain is not busy:
                    chain.tiers[0].breaker.open(0, reason="by the test")
                one = [chain.stream(PROMPT, timeout=60)]
                if chance.random() < 0.5:
                    others.append(one.pop())
                    one = [others.pop(0)]  # the oldest one, seldom our own
                for _ in range(chance.randrange(14)):
                    if next(one[0], None) is None:
                        break
                end = chance.choice(endings)
                end(one.pop())
                if end is forget_in_a_cycle:
                    gc.collect()  # until then it keeps its place, and everybody may be waiting for that
            return 64

        gc.collect()
        gc.freeze()
        with ThreadPoolExecutor(16) as pool:
            assert sum(pool.map(work, range(16))) >= 1000
        gc.unfreeze()
        assert not others
        gc.collect()
        busy.close()
        settle(before, threads)

        assert seen["closed", "recovered"] >= 16 * 16
        assert {reason for new, reason in seen if new == "open"} == {"by the test"}
        for chain in (busy, shared, *own):
            stream = chain.stream(PROMPT)
            assert "".join(stream) == "".join(WORDS)
            assert stream.response.provider == chain.tiers[0].name
            assert (chain.tiers[0].breaker.state, chain.tiers[0].breaker.snapshot().failures) == ("closed", 0)
        streams = [busy.stream(PROMPT) for _ in range(4)]
        with pytest.raises(AllProvidersFailed, match="busy is busy"):
            busy.stream(PROMPT, timeout=0.01)
        assert ["".join(stream) for stream in streams] == ["".join(WORDS)] * 4
        busy.close()
    assert [str(one.message) for one in warned] == []
