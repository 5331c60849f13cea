"""Streams fail over until the first delta, never end in silence, and give back all they hold."""

from __future__ import annotations

import contextlib
import gc
import itertools
import pickle
import threading
import time
import traceback
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fakes import (PARTS, PROMPT, ChatServer, Custom, VirtualClock, Watched, calls,
    chain_of, chat_of, error_of, event, failures, outcomes, scripted, stream_of, tier, whole)
from support.server import HEAD

import copilot_router
from copilot_router import (AllProvidersFailed, AuthenticationError, BadRequest, ChatStream,
    ConfigError, ContentFiltered, DeadlineExceeded, EscalationFailed, Event, FailoverChain,
    InvalidResponse, LLMResponse, ModelNotFound, Overloaded, ProviderTier, ProviderTimeout,
    ProviderUnavailable, QuotaExceeded, RateLimited, RouterError, ServerError, StreamInterrupted,
    Thought, ToolCall, Usage)


def watched(clock: VirtualClock, *deltas: Any, response: Any = None, **given: Any) -> FailoverChain:
    """A chain of one tier, ``a``, with a Watched provider."""
    return chain_of(clock, ProviderTier("a", Watched(*deltas, response=response), ["a"], **given))


def read(stream: ChatStream) -> tuple[list[str], StreamInterrupted]:
    """The deltas of a stream that breaks, and its error."""
    seen: list[str] = []
    error = error_of(StreamInterrupted, seen.extend, stream)
    assert error.provider == error.attempts[-1].tier
    return seen, error


# -- until the first delta
ERRORS = [ProviderUnavailable("x"), ServerError("x"), Overloaded("x"), ProviderTimeout("x"),
    InvalidResponse("x"), RateLimited("x", retry_after=30), QuotaExceeded("x", retry_after=90),
    ModelNotFound("x"), BadRequest("x"), KeyError("x")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("before", [[], [""], [" ", "\n"]], ids=["at once", "nothing", "blanks"])
def test_until_the_first_delta_a_stream_fails_over_like_chat(clock, error, before):
    one, other = (chain_of(clock, tier("a", [*before, error]), tier("b", PARTS)) for _ in "12")
    stream, response = one.stream(PROMPT), other.chat(PROMPT)
    assert list(stream) == PARTS
    told = [[(at.tier, at.outcome, at.error) for at in each.attempts] for each in
            (stream.response, response)]
    assert told[0] == told[1] and one.health()[0].breaker == other.health()[0].breaker


def test_an_answer_without_text_has_no_delta(clock):
    wanted = LLMResponse(tool_calls=[ToolCall("1", "f", {"x": 1})], usage=Usage(3, 4))
    for provider in (Watched(response=wanted), Custom(lambda **_: wanted)):
        stream = chain_of(clock, ProviderTier("a", provider)).stream(PROMPT)
        assert list(stream) == [] and (stream.text, stream.response.usage) == ("", Usage(3, 4))
        assert stream.response.tool_calls == wanted.tool_calls
        chain_of(clock, ProviderTier("a", provider)).stream(PROMPT).close()


# -- after it
@pytest.mark.parametrize(("error", "state", "number"), [
    (ServerError("x"), "closed", 1), (InvalidResponse("x"), "closed", 1),
    (ProviderTimeout("x", code="stall_timeout"), "closed", 1), (KeyError("x"), "closed", 1),
    (BadRequest("x"), "closed", 0), (ContentFiltered("x"), "closed", 0),
    (RateLimited("x", retry_after=1), "open", 1), (Overloaded("x", retry_after=20), "open", 20),
    (AuthenticationError("x"), "open", 15), (QuotaExceeded("x"), "open", 60)])
@pytest.mark.parametrize("raised", [False, True])
def test_a_break_raises_with_what_had_arrived(clock, error, state, number, raised):
    breaker = copilot_router.CircuitBreaker(clock=clock)
    chain = chain_of(clock, tier("a", [*PARTS, error], breaker=breaker), tier("b", "a splice"),
                     on_error={type(error): "raise"} if raised else None)
    stream = chain.stream(PROMPT)
    seen, broken = read(stream)
    assert (seen, broken.model) == (PARTS, "a") and broken.partial == stream.text == "".join(PARTS)
    assert broken.__cause__ is error and outcomes(broken.attempts) == ["a:failed"]
    assert (broken.attempts[0].error or "").startswith(type(error).__name__)
    for name in ("status", "code", "retry_after", "request_id"):
        assert getattr(broken, name) == getattr(error, name, None)
    assert not calls(chain, "b")
    now = breaker.snapshot()
    assert (now.state, now.failures if state == "closed" else now.retry_after) == (state, number)
    error_of(RouterError, lambda: stream.response, match="not exhausted")
    assert next(stream, "over") == "over"
    copied = pickle.loads(pickle.dumps(broken))
    assert (copied.partial, copied.attempts) == (broken.partial, broken.attempts)
    assert "secret" not in f"{broken} {broken!r} {broken.args} {broken.attempts}"


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MemoryError(), AssertionError("x"), ConfigError("x")])
def test_what_is_not_the_providers_fault_passes_through_a_stream(clock, error):
    chain = watched(clock, "a", error, max_concurrency=1)
    chain.tiers[0].breaker.admit().failure()
    stream = chain.stream(PROMPT)
    assert next(stream) == "a"
    raised = error_of(type(error), next, stream)
    assert raised is error and failures(chain) == 1 and chain.tiers[0].provider.closed == 1
    chain.stream(PROMPT, timeout=0.1).close()


@pytest.mark.parametrize("returned", [None, "secret answer"])
@pytest.mark.parametrize("parts", [[], PARTS])
def test_a_custom_stream_that_returns_no_response_is_told_so(returned, parts):
    def stream(*_, **__):
        yield from parts
        return returned
    provider, seen = scripted("x"), []
    provider.stream = stream
    def read_it():
        seen.extend(FailoverChain([ProviderTier("a", provider)]).stream("hi"))
    match = f"returned {type(returned).__name__}.*return an LLMResponse"
    error = error_of(ConfigError, read_it, match=match)
    assert seen == parts and "secret" not in "".join(traceback.format_exception(error))


# -- trials
def half_open(clock: VirtualClock, *deltas: Any, **given: Any) -> FailoverChain:
    """A chain of one tier whose next call is the trial."""
    chain = watched(clock, *deltas, **given)
    chain.tiers[0].breaker.open(5)
    clock.advance(5)
    return chain


def test_a_trial_is_over_at_its_first_delta(clock):
    """A slow reader does not hold it; blank text is no proof; a later fault counts once."""
    states: list[str] = []
    chain = half_open(clock, " ", lambda: states.append(chain.tiers[0].breaker.state), *PARTS)
    slow = chain.stream(PROMPT)
    assert states == ["half_open"] and chain.tiers[0].breaker.is_closed
    assert "".join(chain.stream(PROMPT)) == "".join(slow) == " " + "".join(PARTS)
    chain = half_open(clock, "x", ServerError("y"))
    read(chain.stream(PROMPT))
    assert (chain.tiers[0].breaker.state, failures(chain)) == ("closed", 1)
    chain = half_open(clock, " ", InvalidResponse("x"))
    error_of(AllProvidersFailed, chain.stream, PROMPT)
    assert chain.tiers[0].breaker.is_open


def test_a_streams_success_resets_the_count_of_failures(clock):
    """At its end, and when it is closed after a delta; not when none was taken."""
    chain = chain_of(clock, tier("a", ProviderUnavailable, PARTS))
    def after(end):
        error_of(AllProvidersFailed, chain.stream, PROMPT)
        end(chain.stream(PROMPT))
        return failures(chain)
    assert after(ChatStream.close) == 1 and after(list) == 0
    assert after(lambda stream: (next(stream), stream.close())) == 0
    assert chain.health()[0].calls == 6  # those that were closed, too


# -- what a stream is
def test_the_response_is_complete_in_the_end(clock):
    answer = LLMResponse(
        "".join(PARTS), [ToolCall("1", "f", {"x": 1})], "tool_calls", Usage(1000, 2000), "model-9",
        reasoning="hm", request_id="r")
    up = Watched(PARTS[0], lambda: clock.advance(2), *PARTS[1:], response=answer)
    tiers = tier("down", ProviderUnavailable("x")), ProviderTier("up", up, prices=(1.0, 2.0))
    stream = chain_of(clock, *tiers).stream(PROMPT)
    texts = []
    for _ in PARTS:
        error_of(RouterError, lambda: stream.response, match="not exhausted")
        next(stream)
        texts.append(stream.text)
        clock.advance(1)
    assert texts == list(itertools.accumulate(PARTS))
    end, response = error_of(StopIteration, next, stream), stream.response
    assert end.value is response and response is not answer and next(stream, None) is None
    for name in ("content", "tool_calls", "finish_reason", "usage", "model", "reasoning"):
        assert getattr(response, name) == getattr(answer, name)
    assert outcomes(response.attempts) == ["down:failed", "up:ok"]
    assert (response.provider, response.cost, response.latency) == ("up", 0.005, 5.0)


def test_a_stream_is_a_generator(clock):
    chain = chain_of(clock, tier("a", PARTS))
    returned: list[LLMResponse] = []
    def relay():
        returned.append((yield from chain.stream(PROMPT)))
    assert list(relay()) == PARTS and returned[0].text == "".join(PARTS)
    with chain.stream(PROMPT) as stream:
        assert iter(stream) is stream and isinstance(stream, Generator)
        assert stream.send(None) == PARTS[0] and "secret" not in repr(stream)
    assert next(stream, "over") == "over"


def test_a_stream_object_may_give_none_and_fail_to_close(caplog):
    kind = type("Stream", (), {"__next__": lambda self: self.next(), "close": lambda self: 1 / 0})
    end = StopIteration(LLMResponse("a"))
    for items, found in (([ServerError("x")], "from b"), (["a", None, end], "a"),
            (["part", ServerError("x")], StreamInterrupted)):
        one, stream = Watched(), kind()
        stream.next = mock.Mock(side_effect=items)
        one.stream = lambda *_, stream=stream, **__: stream
        first = ProviderTier("a", one, retries=0)
        came = FailoverChain([first, tier("b", "from b")]).stream("hi")
        assert read(came)[1].partial == "part" if found is StreamInterrupted else [*came] == [found]
    assert "a: closing its stream raised ZeroDivisionError in " in caplog.text
    stream.next, stream.close = iter(["x"]).__next__, mock.Mock()
    FailoverChain([first]).stream("hi").close()
    assert stream.close.called


# -- ending early
def test_what_a_reader_throws_into_a_stream_says_nothing_about_the_tier():
    chain = FailoverChain([tier("a", [Thought("hm"), "x"]), tier("b", "y")], failure_threshold=1)
    for taken in (1, 2):
        stream = chain.stream("hi", thoughts=True)
        assert len([next(stream) for _ in range(taken)]) == taken
        error_of(ValueError, stream.throw, ValueError("mine"))
    assert chain.tiers[0].breaker.is_closed and not calls(chain, "b")


def leave_by_error(stream: ChatStream) -> None:
    with contextlib.suppress(LookupError), stream:
        raise LookupError


def hang_up(stream: ChatStream) -> None:
    error_of(GeneratorExit, stream.throw, GeneratorExit)


def forget(stream: ChatStream) -> None:
    del stream


def forget_in_a_cycle(stream: ChatStream) -> None:
    cycle: list[Any] = [stream]
    cycle.append(cycle)


ENDINGS = [ChatStream.close, leave_by_error, hang_up, forget, forget_in_a_cycle]


@pytest.mark.parametrize("end", ENDINGS, ids=lambda end: end.__name__)
@pytest.mark.parametrize("taken", [0, 1, 2])
@pytest.mark.parametrize("make", [watched, half_open])
def test_ending_early_is_no_failure(clock, end, taken, make):
    chain = make(clock, *PARTS, max_concurrency=1)
    one = [chain.stream(PROMPT)]
    for _ in range(taken):
        next(one[0])
    end(one.pop())
    gc.collect()
    assert (chain.tiers[0].provider.opened, chain.tiers[0].provider.closed) == (1, 1)
    assert (chain.tiers[0].breaker.state, failures(chain)) == ("closed", 0)
    with chain.stream(PROMPT, timeout=1) as again:
        assert list(again) == PARTS


def test_a_stream_holds_its_place_until_it_is_closed(clock):
    """A provider may need some time for that."""
    class Slow(Custom):
        def stream(self, messages, *_, **__):
            try:
                yield "a"
                yield "b"
            finally:
                error_of(AllProvidersFailed, chain.chat, PROMPT, timeout=0.01, match="busy|time")
                closed.append(True)
    closed: list[bool] = []
    chain = FailoverChain([ProviderTier("a", Slow(str), max_concurrency=1)])
    with chain.stream(PROMPT) as stream:
        assert next(stream) == "a"
    assert closed and next(chain.stream(PROMPT, timeout=1)) == "a"


@pytest.mark.parametrize("end", ENDINGS, ids=lambda end: end.__name__)
def test_ending_early_closes_the_connection(end):
    gone = threading.Event()
    def answer(server, connection, request):
        connection.sendall(HEAD + event("one") + event("two"))
        with contextlib.suppress(OSError):
            assert connection.recv(1) == b""
        gone.set()
        return False
    with warnings.catch_warnings(record=True) as warned, ChatServer(answer) as server:
        warnings.simplefilter("always")
        one = [FailoverChain([server.tier()]).stream(PROMPT)]
        next(one[0])
        end(one.pop())
        gc.collect()
        assert gone.wait(5)
    assert [str(each.message) for each in warned] == []


# -- time
@pytest.mark.parametrize(("pause", "late"), [(9.9, False), (10.0, True), (5000.0, True)])
def test_the_callers_own_time_counts_towards_the_deadline(clock, pause, late):
    chain = watched(clock, *PARTS, max_concurrency=1)
    stream = chain.stream(PROMPT, timeout=10)
    assert next(stream) == PARTS[0]
    clock.advance(pause)
    if not late:
        assert list(stream) == PARTS[1:]
        return
    _, broken = read(stream)
    assert broken.partial == PARTS[0] and isinstance(broken.__cause__, DeadlineExceeded)
    stream = chain.stream(PROMPT, timeout=10)
    clock.advance(pause)  # before the first delta is taken
    read(stream)
    assert failures(chain) == 0 and chain.tiers[0].provider.closed == 2
    assert list(chain.stream(PROMPT, timeout=1)) == PARTS


@pytest.mark.parametrize(("timeout", "code", "cause", "counted"), [
    (10, "attempt_timeout", DeadlineExceeded, 1), (3, "attempt_timeout", DeadlineExceeded, 0),
    (30, "stall_timeout", ProviderTimeout, 1), (30, "attempt_timeout", ProviderTimeout, 1),
    (10, None, DeadlineExceeded, 1)])
def test_the_cause_says_whose_limit_ended_a_stream(clock, timeout, code, cause, counted):
    late = ProviderTimeout("late", code=code)
    strong = watched(clock, "x", lambda: clock.advance(min(timeout, 20)), late, timeout=20)
    weak = tier("w", "[ESCALATE]")
    for chain in (chain_of(clock, weak, *strong.tiers, escalation_model="a"), strong):
        _, broken = read(chain.stream(PROMPT, timeout=timeout))
        assert type(broken.__cause__) is cause and broken.partial == "x"
    assert failures(strong) == 2 * counted


@pytest.mark.parametrize(("reader", "provider", "counted"), [
    (0, 5, 1), (3, 1, 0), (3, 5, 1), (0.1, 4.8, 1)])
def test_a_slow_reader_is_no_slow_provider(clock, reader, provider, counted):
    late = ProviderTimeout("late", code="attempt_timeout")
    chain = watched(clock, "x", lambda: clock.advance(provider), late, timeout=5.0)
    stream = chain.stream(PROMPT, timeout=100)
    clock.advance(reader)
    next(stream)
    clock.advance(reader)
    read(stream)
    assert failures(chain) == counted


# -- thoughts
def thinking(*events: bytes) -> bytes:
    return HEAD + event(reasoning_content="hm, ") + event(reasoning_content="so") + b"".join(events)


def test_thoughts_are_deltas_of_their_own_class_before_which_a_tier_may_fail_over():
    """They are no part of the text, and nobody gets them who did not ask."""
    good, cut = thinking(event("yes"), event(finish="stop")), thinking(event("yes"))
    cases = {"a": ([good], "yes"), "b": ([thinking(), whole("well")], "well")}
    for by, (answers, text) in cases.items():
        with ChatServer(*answers) as server:
            chain = FailoverChain([server.tier("a"), server.tier("b")])
            stream = chain.stream(PROMPT, thoughts=True)
            came = list(stream)
        found = [(str(one), type(one) is copilot_router.Thought) for one in came]
        assert found == [("hm, ", True), ("so", True), (text, False)]
        assert stream.text == stream.response.text == text and stream.response.provider == by
        assert stream.response.reasoning == ("hm, so" if by == "a" else None)
    with ChatServer(good, good, cut) as server:
        chain = FailoverChain([server.tier(), tier("b", "a splice")])
        for options in ({}, {"thoughts": False}):
            assert list(chain.stream(PROMPT, **options)) == ["yes"]
        seen, broken = read(chain.stream(PROMPT, thoughts=True))
    assert seen == ["hm, ", "so", "yes"] and broken.partial == "yes"


def test_thoughts_of_a_custom_provider_do_not_count_as_the_answer(clock):
    """Its stream may hold nothing else, and they may come between the text."""
    thought, answer = copilot_router.Thought("hm"), LLMResponse("yes")
    mixed = chain_of(clock, tier("a", [thought, "y", thought, "es"]))
    assert list(mixed.stream(PROMPT)) == ["y", "es"]
    for thoughts, shown in ((True, [thought]), (False, [])):
        stream = watched(clock, thought, response=answer).stream(PROMPT, thoughts=thoughts)
        assert list(stream) == [*shown, "yes"] and stream.text == stream.response.text == "yes"
    weak = ProviderTier("a", Watched(thought, response=LLMResponse("[ESCALATE] hard")), ["a"])
    chain = chain_of(clock, weak, tier("b", [thought, "no"]), escalation_model="b")
    assert list(chain.stream(PROMPT, thoughts=True)) == [thought, thought, "no"]


def test_a_call_that_fails_after_a_thought_has_its_record_and_its_event(clock):
    events: list[Event] = []
    for ending, more, outcome in (([ContentFiltered("no")], {}, "failed"),
            ([], {"escalation_model": "m"}, "escalated")):
        provider = Watched(Thought("hm"), *ending, response=LLMResponse("[ESCALATE] hard"))
        chain = chain_of(clock, ProviderTier("a", provider, ["m"]), on_event=events.append, **more)
        error = error_of(RouterError, list, chain.stream(PROMPT, thoughts=True))
        assert [at.outcome for at in error.attempts] == [outcome]
        assert events[-1].kind == "done" and events[-1].data["outcome"] == type(error).__name__


# -- chains in chains
def nested(clock: VirtualClock, *deltas: Any, **given: Any) -> FailoverChain:
    """A chain whose first tier is a chain, and whose second answers "b"."""
    inner = chain_of(clock, ProviderTier("x", Watched(*deltas), ["m"]))
    return chain_of(clock, ProviderTier("in", inner, ["m"]), tier("b", "b"), **given)


def test_a_nested_chain_streams_delta_by_delta(clock):
    moments: list[float] = []
    chain = nested(clock, "x", lambda: moments.append(clock.now), "y")
    stream = chain.stream(PROMPT)
    assert next(stream) == "x" and not moments and list(stream) == ["y"]
    assert outcomes(stream.response.attempts) == ["in:ok"]


@pytest.mark.parametrize("error", [InvalidResponse("cut"), KeyError("cut")])
@pytest.mark.parametrize("deltas", [[], ["[ESC"]], ids=["before all text", "while it is held back"])
def test_a_nested_chain_that_fails_before_the_reader_saw_anything(clock, error, deltas):
    chain = nested(clock, *deltas, error, escalation_model="b")
    stream = chain.stream(PROMPT)
    assert list(stream) == ["b"] and outcomes(stream.response.attempts) == ["in:failed", "b:ok"]
    assert [failures(chain, at) for at in (0, 1)] == [1, 0]


def test_all_that_a_nested_chain_used_before_it_broke_is_counted(clock):
    first, last = ServerError("no"), InvalidResponse("cut")
    first.usage, last.usage = Usage(5, 1), Usage(1, 1)
    tiers = [tier("m", first, retries=0), tier("n", ["[ESC", last], models=["m"])]
    chain = chain_of(clock, ProviderTier("in", chain_of(clock, *tiers), ["m"]), tier("b", "b"),
        escalation_model="b")
    assert chain.chat("q").attempts[0].usage == Usage(6, 2)
    stream = chain.stream("q")
    assert list(stream) == ["b"] and stream.response.attempts[0].usage == Usage(6, 2)


@pytest.mark.parametrize(("error", "counted"), [(InvalidResponse("cut"), 1), (BadRequest("x"), 0)])
def test_a_break_in_a_nested_chain_reaches_the_reader(clock, error, counted):
    chain = nested(clock, "x", "y", error)
    _, broken = read(chain.stream(PROMPT))
    assert broken.partial == "xy" and outcomes(broken.attempts) == ["in:failed"]
    cause: Any = broken.__cause__
    assert cause is error or cause.__cause__ is error
    inner: Any = chain.tiers[0].provider
    assert [failures(one) for one in (chain, inner)] == [counted, counted]


# -- the marker is held back
STRONG = ["from ", "the ", "stronger"]
WEAK = Watched()
CHAIN = FailoverChain(
    [ProviderTier("weak", WEAK, ["weak"]), tier("strong", STRONG)], escalation_model="strong")
DRESSED = ["[ESCALATE] because", " \n[escalate] because", "**[ESCALATE]** because",
    "`[ESCALATE]` because", '"[ESCALATE] because"', "> [ESCALATE] because", "```text\n[ESCALATE]",
    "```3d\n[ESCALATE]", "# [Escalate]: because", "\u201c[ESCALATE]\u201d because",
    "<think>hm</think>\n[ESCALATE]", "~~[ESCALATE]~~ because", "__[ESCALATE]__", "'[ESCALATE]'",
    "<think>\n</think><think></think>[ESCALATE]", "<think></think>[ESCALATE]"]
#: What only looks like the marker, and the part of it after which that is certain.
LOOK_ALIKES = [("I would [ESCALATE]", "I"), ("[ESCALATION] is near", "[ESCALATI"),
    ("[ESCALATE this", "[ESCALATE "), ("(ESCALATE)", "("), ("[ESCALATED] it was", "[ESCALATED"),
    ("[ ESCALATE ] no", "[ "), ("1. [ESCALATE]", "1"), ("[[ESCALATE]]", "[["),
    ("**bold** [ESCALATE]", "**b"), ("```python\nprint()\n```", "```python\np"),
    ("```c++\n[ESCALATE]", "```c+"), ("<thinking>[ESCALATE]", "<thinki"),
    ("<think>[ESCALATE]</think> fine", "<think>[ESCALATE]</think> f"), ("<b>[ESCALATE]</b>", "<b"),
    ("\u00bb[\u0415SCALATE] Cyrillic", "\u00bb[\u0415")]


def shown(deltas: Sequence[str]) -> list[str]:
    """What the reader of a stream sees."""
    WEAK.deltas = tuple(deltas)
    return list(stream_of(CHAIN, "hi"))


def is_marked(text: str) -> bool:
    """Whether ``chat()`` escalates this answer, which it else gives unchanged."""
    WEAK.deltas = (text,)
    response = chat_of(CHAIN, "hi")
    assert response.text == ("".join(STRONG) if response.provider == "strong" else text)
    return response.provider == "strong"


def cut(text: str, places: Iterable[int]) -> list[str]:
    ends = [0, *places, len(text)]
    return [text[start:end] for start, end in itertools.pairwise(ends)]


def every_split(text: str, most: int) -> Iterator[list[str]]:
    for count in range(most + 1):
        for places in itertools.combinations(range(1, len(text)), count):
            yield cut(text, places)


@pytest.mark.quiet
@pytest.mark.parametrize("text", DRESSED)
def test_no_cut_of_the_marker_is_ever_visible(text):
    splits = [list(text), *every_split(text, 2)]
    assert {tuple(shown(split)) for split in splits} == {tuple(STRONG)} and is_marked(text)


@pytest.mark.quiet
@pytest.mark.parametrize(("text", "certain"), LOOK_ALIKES)
def test_a_look_alike_is_exact_and_held_back_no_longer_than_needed(text, certain):
    assert all("".join(shown(split)) == text for split in every_split(text, 2))
    assert not is_marked(text) and not is_marked(f"{certain}[ESCALATE]")
    WEAK.deltas = tuple(text)
    running = stream_of(CHAIN, "hi")
    assert WEAK.taken == len(certain) and [*running] == [certain, *text[len(certain) :]]


FRAGMENTS = st.sampled_from(["[ESCALATE]", "[ESC", "ALATE]", "<think>", "</think>", "<thi", "nk>",
    "```", "3d", "text", "\n", " ", "*", "_", '"', "\u201c", ">", "#", "[", "]", "because",
    "\u0130", "\u2028", "\x00", "\U0001f600"])


@pytest.mark.quiet
@settings(max_examples=300, deadline=None)
@given(st.data(), st.lists(st.one_of(FRAGMENTS, st.text(max_size=3)), max_size=12))
def test_a_stream_escalates_what_a_chat_escalates(data, parts):
    text = "".join(parts) + "."
    places = data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=12))
    marked = is_marked(text)
    assert "".join(shown(cut(text, sorted(places)))) == ("".join(STRONG) if marked else text)


@pytest.mark.quiet
def test_a_long_think_block_is_held_back_and_no_longer():
    block = ["<think>", *(f"thought {number} > " for number in range(50)), "</think>"]
    WEAK.deltas = (*block, "Hello", " you")
    running = stream_of(CHAIN, "hi")
    assert WEAK.taken == len(block) + 1 and list(running) == ["".join(block) + "Hello", " you"]
    assert shown([*block, "[ESC", "ALATE] because"]) == STRONG


@pytest.mark.quiet
def test_a_megabyte_before_a_possible_marker_takes_linear_time():
    start = time.monotonic()
    for piece in ("* ", "> ", "<think> </think>", "\u201c\n"):
        assert "".join(shown([piece] * 20_000 + ["x"])).endswith("x")
    assert time.monotonic() - start < 20


def test_without_a_ladder_nothing_but_blank_text_is_held_back():
    WEAK.deltas = (" ", "\n", "[", "ESCALATE", "] because")
    chain = FailoverChain([ProviderTier("weak", WEAK, ["weak"])])
    assert list(chain.stream("hi")) == [" \n[", "ESCALATE", "] because"]
    for text in ("[ESC", "```", "> [ESCALATE", "<thi"):  # a text that ends undecided is the answer
        assert "".join(shown(list(text))) == text


def test_an_escalation_goes_on_with_the_stronger_models_deltas(clock):
    gave_up = LLMResponse("[ESCALATE] too hard", usage=Usage(10**6, 0))
    weak = Watched("[ESC", "ALATE] too", " hard", response=gave_up)
    strong = Watched(*PARTS, response=LLMResponse("".join(PARTS), usage=Usage(0, 10**6)))
    tiers = (ProviderTier("weak", weak, prices=(1, 1)),
        ProviderTier("b", strong, ["big"], prices=(2, 8)))
    events: list[Event] = []
    stream = chain_of(clock, *tiers, escalation_model="big", on_event=events.append).stream(PROMPT)
    assert list(stream) == PARTS
    response = stream.response
    assert outcomes(response.attempts) == ["weak:escalated", "b:ok"]
    assert (response.escalation, response.provider, response.cost) == ("too hard", "b", 9.0)
    assert weak.closed == 1
    assert [one.kind for one in events] == ["attempt", "escalation", "attempt", "done"]
    alone = chain_of(clock, tier("weak", list("`[ESCALATE]` because")), tier("big", ServerError),
                     escalation_model="big")
    failed = error_of(EscalationFailed, alone.stream, "hi")
    assert failed.response is not None and failed.response.text == "because"


def test_accept_sees_the_whole_answer_before_the_reader_sees_any(clock):
    seen: list[str] = []
    def accept(response):
        seen.append(response.text)
        return response.text.startswith("the")
    tiers = tier("a", ["bad ", "one"]), tier("b", PARTS)
    stream = chain_of(clock, *tiers, accept=accept).stream(PROMPT)
    assert seen == ["bad one", "".join(PARTS)] and list(stream) == ["".join(PARTS)]
    assert outcomes(stream.response.attempts) == ["a:escalated", "b:ok"]
