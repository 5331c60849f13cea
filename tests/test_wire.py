"""What all wire formats share, shown through each provider against a server on loopback."""

from __future__ import annotations

import base64
import copy
import gzip
import itertools
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from enum import Enum
from types import MappingProxyType
from typing import Any

import pytest
import requests
from support.dialects import (DIALECTS, Answer, Dialect, answers, chunk, head, streamed, texts_in)
from support.fakes import TOOL, error_of, running
from support.server import (KEY, STOP, USER, Canned, Server, block, candidate, delta, drained,
    grows, message, piece, read, reply, sent, sse, started, stops, stream, talking, waits)
from support.vendors import MODELS, Anthropic, Gemini, Reply, faked

import copilot_router
from copilot_router import (AllProvidersFailed, AuthenticationError, BadRequest,
    ConfigError, ContentFiltered, EmptyResponse, FailoverChain, InvalidResponse, LLMResponse,
    OpenAIProvider, ProviderError, ProviderTier, ProviderTimeout, ServerError,
    UnsupportedRequest, Usage)

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[dict[str, Any]] = [{"type": "function",
    "function": {"name": name, "description": f"Says the {name}.", "parameters": CITY}}
    for name in ("weather", "time")]
CALLS = (("weather", {"city": "Oslo", "days": [1, 2.5, None]}), ("time", {"city": "Rømø"}),
         ("weather", {"city": "東京"}))
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(range(60))).decode()


@pytest.fixture(params=[True, False], ids=["streamed", "whole"])
def streaming(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@contextmanager
def served(dialect: Dialect, *script: Any, **settings: Any) -> Iterator[tuple[Server, Any]]:
    """A server that gives an ``Answer`` in the vendor's format, and a provider that talks to it."""
    made = [answers(dialect, lambda _, one=one: one) if isinstance(one, Answer) else one
            for one in script]
    with talking(dialect.name, *made, **settings) as (provider, server):
        yield server, provider


def said(dialect: Dialect, *script: Any, tools: Any = None, **settings: Any) -> LLMResponse:
    with served(dialect, *script, **settings) as (_, provider):
        response: LLMResponse = provider.chat("hi", tools, "m", timeout=10)
        return response


def chain_of(*providers: Any, **settings: Any) -> FailoverChain:
    tiers = [ProviderTier(name, one, ["m", "n"], retries=0)
             for name, one in zip("abc", providers, strict=False)]
    return FailoverChain(tiers, **settings)


def called(response: LLMResponse) -> list[tuple[str, Any]]:
    return [(call.name, call.arguments) for call in response.tool_calls]


def until(dialect: Dialect, answer: Answer, mark: bytes) -> tuple[list[bytes], list[bytes]]:
    """The events of an answer before the one that holds the mark, and from there on."""
    events = dialect.events(answer)
    at = next(at for at, event in enumerate(events) if mark in event)
    return events[:at], events[at:]


# -- answers
def test_an_answer_has_text_model_finish_reason_and_usage(dialect: Dialect,
        streaming: bool) -> None:
    with served(dialect, Answer(), stream_upstream=streaming) as (server, provider):
        response = provider.chat("hi", model="m", timeout=5)
        path, _, body = server.requests[0]
    assert (response.content, response.model, response.finish_reason) == (
        "Hello, world", dialect.model, "stop")
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (9, 4)
    assert (response.tool_calls, response.reasoning) == ([], None)
    assert (response.raw is None) == streaming
    assert response.message == {"role": "assistant", "content": "Hello, world"}
    assert dialect.streams(path, body) == streaming


def test_stream_yields_the_deltas_of_the_server_and_returns_what_chat_does(
        dialect: Dialect) -> None:
    answer = Answer(text=("One ", "två ", "三 ", "\u2028four\U0001f600"), reasoning=("Hm. ", "So."))
    with served(dialect, answer) as (_, provider):
        deltas, response = drained(provider.stream("hi", model="m", timeout=5))
        assert (tuple(deltas), response) == (answer.text, provider.chat("hi", model="m", timeout=5))


def test_deltas_arrive_while_the_server_still_writes(dialect: Dialect) -> None:
    taken = threading.Event()
    before, after = until(dialect, Answer(text=("first", "second")), b"second")
    def serve(server: Server, connection: Any, request: bytes) -> bool:
        connection.sendall(head(dialect) + b"".join(map(chunk, before)))
        if taken.wait(5):
            connection.sendall(b"".join(map(chunk, after)) + b"0\r\n\r\n")
        return True
    with served(dialect, serve) as (_, provider):
        deltas = provider.stream("hi", model="m", timeout=10)
        assert next(deltas) == "first"
        taken.set()
        assert drained(deltas)[0] == ["second"]


def test_a_leading_think_block_is_reasoning(dialect: Dialect, streaming: bool) -> None:
    """Also where its tags are cut in the middle; a later one is text."""
    pieces = ("<thi", "nk>Let me th", "ink.</th", "ink>\n", "\nHello,", " <think>world")
    with served(dialect, Answer(text=pieces), stream_upstream=streaming) as (_, provider):
        deltas, response = drained(provider.stream("hi", model="m", timeout=5))
    assert (response.reasoning, response.content) == ("Let me think.", "Hello, <think>world")
    assert "".join(deltas) == response.content


@pytest.mark.parametrize("answer", [Answer(text=()), Answer(text=(" \n", " ")),
    Answer(text=(), reasoning=("Hm.",)), Answer(text=(), finish="length"),
    Answer(text=(), finish="content_filter")])
def test_an_answer_without_text_and_calls_is_empty(dialect: Dialect, streaming: bool,
        answer: Answer) -> None:
    filtered = answer.finish == "content_filter" and dialect.name != "ollama"
    raised = error_of(ProviderError, said, dialect, answer, stream_upstream=streaming)
    assert type(raised) is (ContentFiltered if filtered else EmptyResponse)
    assert raised.usage == Usage(9, 4)


def test_several_tool_calls_come_with_text_and_reasoning(dialect: Dialect, streaming: bool) -> None:
    answer = Answer(("Let me ", "look."), ("Two ", "tools."), CALLS, "tool_calls")
    response = said(dialect, answer, tools=TOOLS, stream_upstream=streaming)
    assert called(response) == list(CALLS)
    assert len({call.id for call in response.tool_calls} - {""}) == 3
    assert [json.loads(call.raw_arguments) for call in response.tool_calls] == [
        arguments for _, arguments in CALLS]
    assert (response.content, response.reasoning, response.finish_reason) == (
        "Let me look.", "Two tools.", "tool_calls")


def test_an_answer_without_thoughts_has_nothing_to_carry(dialect: Dialect, streaming: bool) -> None:
    """Only Gemini seals its calls, too."""
    answer = Answer(calls=CALLS[:1], finish="tool_calls")
    message = said(dialect, answer, tools=TOOLS, stream_upstream=streaming).message
    assert ("copilot_router" in message) == (dialect.name == "gemini")


def test_usage_is_counted_in_one_arithmetic(dialect: Dialect, streaming: bool) -> None:
    """The prompt includes the cached and written tokens, the completion the reasoning."""
    written = 100 * dialect.counts_written
    usage = said(dialect, Answer(usage=Usage(1000, 200, 400, written, 50)),
                 stream_upstream=streaming).usage
    assert usage == Usage(
        1000, 200, 400 * dialect.counts_cached, written, 50 * dialect.counts_reasoning)


@pytest.mark.parametrize(
    ("dialect", "name"), [(d, name) for d in DIALECTS for name in d.failures], ids=str)
def test_failures_have_their_class(dialect: Dialect, name: str) -> None:
    """Class, status, model, id and retry_after, and one request; also as a server-sent event."""
    status, headers, body, kind, wait = dialect.failures[name]
    event = b"event: error\ndata: " + json.dumps(body).encode() + b"\n\n"
    for wire in (body, event)[: 1 if dialect.name == "ollama" else 2]:
        answer = reply(wire, status, X_Request_Id="r-8", **headers)
        with served(dialect, answer) as (server, provider):
            error = error_of(ProviderError, provider.chat, "hi", model="m", timeout=5)
            assert len(server.requests) == 1
        assert (type(error), error.status, error.model) == (kind, status, "m")
        assert (error.retry_after, error.request_id) == (wait, "r-8")
        vendor = "openai" if dialect.name in ("chat", "responses") else dialect.name
        assert error.provider == vendor


STOPS = """stop tool_calls tool_call tool_use function_call end_turn stop_sequence eos eos_token
    completed complete end"""
LENGTHS = """length max_tokens MAX_TOKENS model_length max_output_tokens max_length CONTINUATION
    pause_turn model_context_window_exceeded"""
FILTERED = """SAFETY RECITATION LANGUAGE BLOCKLIST PROHIBITED_CONTENT SPII IMAGE_SAFETY ESCALATION
    IMAGE_PROHIBITED_CONTENT IMAGE_RECITATION MODEL_ARMOR PUP_LIMITED_DISABLED"""
BROKEN = """error abort aborted cancelled timeout network_error deadline_exceeded failed interrupted
    incomplete server_error upstream_error disconnected internal_error internal_server_error
    insufficient_system_resource user_cancel error_limit error_toxic"""
#: What a vendor's word for the end of an answer becomes; None: the answer failed.
FINISH: list[tuple[int, str | None, str]] = [
    (0, "stop", STOPS), (0, "length", LENGTHS), (0, "OTHER", "OTHER"),
    (0, "content_filter", FILTERED + " content_filter content_filter:RECITATION content_filtered"
        " sensitive refusal guardrail_intervened"), (0, None, BROKEN + " MALFORMED_RESPONSE"
        " canceled connection_error function_call_filter:MALFORMED_FUNCTION_CALL NO_IMAGE"
        " UNEXPECTED_TOOL_CALL TOO_MANY_TOOL_CALLS IMAGE_OTHER MISSING_THOUGHT_SIGNATURE"),
    (3, "stop", "end_turn stop_sequence"), (3, "content_filter", "refusal"), (3, None, BROKEN),
    (3, "length", "max_tokens model_context_window_exceeded pause_turn"), (4, "stop", "STOP"),
    (4, "length", "MAX_TOKENS CONTINUATION"), (4, "content_filter", FILTERED), (5, "stop", "stop"),
    (5, "length", "length"), (5, None, BROKEN),
    *((at, word, word) for at in (0, 3, 4, 5) for word in ("eos_of_2031", "NEWS"))]


@pytest.mark.parametrize(("at", "ours", "words"), FINISH)
def test_finish_reasons(at: int, ours: str | None, words: str) -> None:
    """A word that nobody knows stays as it came; some say that the answer was cut or failed."""
    dialect = DIALECTS[at]
    key = re.compile(rb'("finish_?reason"|"stop_reason"|"done_reason"): "\w+"', re.IGNORECASE)
    for word in words.split():
        whole = json.dumps(dialect.body(Answer())).encode()
        for wire in (b"".join(dialect.events(Answer())), whole):
            found = read(dialect.name, reply(key.sub(rb'\1: "%s"' % word.encode(), wire)))
            if ours is None:
                assert isinstance(found, (InvalidResponse, ServerError))
            else:
                assert found.finish_reason == ours


# -- answers that are none
def test_an_error_inside_a_stream_has_its_class(dialect: Dialect) -> None:
    before, _ = until(dialect, Answer(text=("par", "tial")), b"tial")
    wire, kind = dialect.broken
    with served(dialect, streamed(dialect, [*before, wire])) as (server, provider):
        error_of(kind, provider.chat, "hi", model="m", timeout=5)
        deltas = provider.stream("hi", model="m", timeout=5)
        assert next(deltas) == "par"
        error_of(kind, next, deltas)
        assert len(server.requests) == 2


def test_a_page_with_status_200_is_no_answer(dialect: Dialect) -> None:
    for kind in ("text/html", dialect.stream_kind, "application/json"):
        with pytest.raises(InvalidResponse, match=r"truncated|^the answer .* is not JSON"):
            said(dialect, reply(b"<html>Log in</html>", kind=kind))
    with pytest.raises(InvalidResponse, match=r"^an event is not JSON"):
        said(dialect, reply(b"data: <html>Log in</html>\n\n"))


def test_a_whole_answer_waits_two_seconds_for_the_end_of_its_body() -> None:
    with talking("chat", waits(sse(delta(content="whole"), STOP))) as (provider, _):
        start = time.monotonic()
        assert provider.chat("q", model="m", timeout=30).text == "whole"
        assert 1.9 < time.monotonic() - start < 3


def test_text_behind_the_end_of_the_answer_does_not_count(dialect: Dialect) -> None:
    """A proxy that plays the answer twice does not double it; nor does it add calls."""
    events = dialect.events(Answer())
    again = dialect.events(Answer(text=("again",), calls=CALLS[:1], finish="tool_calls"))
    marked = [event for event in again if b"again" in event or b"weather" in event]
    at = next(at for at, event in enumerate(events) if dialect.ends in event) + 1
    response = said(dialect, streamed(dialect, [*events[:at], *marked, *events[at:]]))
    assert (response.content, response.tool_calls) == ("Hello, world", [])


@pytest.mark.parametrize(("events", "text"),
    [(["One ", "two, ", "three."], "One two, three."), (["One."] * 2, "One.")])
def test_a_finish_reason_in_every_event_ends_the_answer_with_the_last_one(
        events: Any, text: str) -> None:
    """Of old Gemini, and of a gateway. A whole answer that comes twice is still one."""
    assert read("gemini", stream(*(candidate({"text": one}) for one in events))).text == text
    assert read("chat", stream(*(delta("stop", content=one) for one in events))).text == text
    behind = [delta("stop", content="One."), delta(content="One")]  # a proxy plays it again
    assert read("chat", stream(*behind)).text == "One."


@pytest.mark.parametrize("kind", ["chat", "gemini"])
def test_an_answer_that_ends_in_every_event_is_not_whole_if_it_breaks(kind: str) -> None:
    """And it loses nothing: blanks, repetitions, thoughts."""
    def says(text: str) -> Any:
        return delta("stop", content=text) if kind == "chat" else candidate({"text": text})
    begun, half = [says("The dose is 5"), says("00 mg")], sse(says(", twice a day"))[:40]
    garbled = [*begun, b'data: {"choices":[{"index":0,"del\n\n', says(" a day")]
    for broken in (stream(*begun, says("!"))[:-1], stream(*garbled),
                   stream(*begun, half), stream(*begun, b'data: "text"\n\n'),
                   stream(*begun, {"candidates": 5, "choices": [5]}), waits(sse(*begun)),
                   stream(*begun, {"code": 500, "message": "no"}),
                   *([stream(*begun, delta(content=" a day"))] if kind == "chat" else [])):
        found = read(kind, broken, stall_timeout=0.2)
        assert isinstance(found, (InvalidResponse, ProviderTimeout, ServerError))
    for again in ([says(""), says("")], [says("Hi")] * 2):  # nothing new has come
        assert read(kind, waits(sse(says("Hi"), *again)), stall_timeout=0.2).text == "Hi"
    for pieces in (["Dear Bob,", "\n\n", "hello", " ", "there"], ["ha", "ha", "!"]):
        assert read(kind, stream(*map(says, pieces))).text == "".join(pieces)
    thoughts = (delta("stop", reasoning_content=one) for one in ("Let me ", "think."))
    assert read("chat", stream(*thoughts, delta("stop", content="x"))).reasoning == "Let me think."
    call = piece("", "f", index=0, id="a")
    call["choices"][0]["finish_reason"] = "tool_calls"
    cut = piece('{"a": 1}', index=0)
    for more, arguments in ((cut, None), (delta(content=""), {}), (call, {})):
        found = read("chat", stream(call, more, done=True)).tool_calls
        assert [one.arguments for one in found] == [arguments]


def test_what_follows_an_early_finish_reason_counts_if_another_one_ends_it() -> None:
    """A gateway puts an event with one behind every piece. A repetition does not count."""
    one, two = delta(content="One "), delta(content="two.")
    stop, calls = delta("stop"), delta("tool_calls")
    half = delta(content="tw"), stop, delta(content="o."), stop
    for events in ([one, stop, two, stop], [one, stop, *half], [stop, one, two, stop],
                   [one, two, stop, one, two, stop],
                   [one, two, stop, delta("stop", content="One two.")],
                   [one, two, stop, message(content="One two."), stop]):
        assert read("chat", stream(*events)).text == "One two."
    assert read("chat", stream(one, delta("length"), two, stop)).finish_reason == "length"
    for other in ([two], [delta(content="Other "), delta(content="words.")]):  # asked once more
        assert read("chat", stream(one, two, stop, *other, stop)).text == "One two."
    first, more, last = (delta(tool_calls=[{"index": at, "function": fields}]) for at, fields in (
        (0, {"name": "f", "arguments": ""}), (0, {"arguments": '{"a": 1}'}),
        (1, {"name": "g", "arguments": "{}"})))
    for pieces, names in (([first, stop, more, stop], ["f"]), ([first, more, calls] * 2, ["f"]),
                          ([first, more, calls, last, calls], ["f", "g"])):
        found = read("chat", stream(*pieces)).tool_calls
        assert [call.name for call in found] == names and found[0].arguments == {"a": 1}
    call = candidate({"functionCall": {"name": "f", "args": {"a": 1}}})
    found = read("gemini", stream(candidate({"text": "Let me"}), call)).tool_calls
    assert [one.name for one in found] == ["f"]


def test_events_without_a_blank_line_between_them_are_read() -> None:
    """Of GLM and Kimi while they call tools. TGI sends a call that is no list."""
    events = delta(content="a"), delta(tool_calls={"index": 0, "function": {
        "name": "f", "arguments": "{}"}}), delta("tool_calls")
    lines = b"".join(b"data: " + json.dumps(one).encode() + b"\n" for one in events)
    found = read("chat", reply(lines + b"\ndata: [DONE]\n\n", kind="text/event-stream"))
    assert (found.text, found.tool_calls[0].name) == ("a", "f")
    assert isinstance(read("chat", reply(lines[:-9] + b"\n\n", kind="text/event-stream")),
                      InvalidResponse)


def test_a_whole_message_behind_its_deltas_is_not_added_to_them() -> None:
    begun = [delta(content="<think>Hm.</think>One "), delta(content="two")]
    for text in ("One two.", "<think>Hm.</think>One two"):
        answer = read("chat", stream(*begun, message(content=text)))
        assert answer.text == text.removeprefix("<think>Hm.</think>")
    assert isinstance(read("chat", stream(*begun, message(content="Three"))), InvalidResponse)


# -- what a body is
NOTHING = ["data:", "data: null", 'data: ""', "event: ping\ndata: ", "data: ping", "event: error",
           "data: {}", "data: []", 'data: {"id": "x"}',
           'data: {"type": "ping"}', 'data: {"object": "billing", "cost": {"usd": 0.1}}',
           'data: {"choices": null}', 'data: {"id": "gen-1", "provider": "x", "candidates": null}']
IN_LINES = ["null", '""', "{}", '{"type": "ping"}', "ping"]


def frames_of(dialect: Dialect) -> list[bytes]:
    if dialect.name == "ollama":
        return [frame.encode() + b"\n" for frame in IN_LINES]
    return [frame.encode() + b"\n\n" for frame in NOTHING]


def test_frames_that_hold_nothing_are_passed_over_anywhere(dialect: Dialect) -> None:
    """Heartbeats, gateway metadata and billing, before, in and behind the answer."""
    events, wrong = dialect.events(Answer()), {}
    for frame in frames_of(dialect):
        for at in range(len(events) + 1):
            wire = streamed(dialect, [*events[:at], frame, *events[at:]])
            try:
                found = said(dialect, wire).content
            except ProviderError as error:
                found = f"{type(error).__name__}: {error}"
            if found != "Hello, world":
                wrong[frame] = (at, found)
    assert not wrong


def test_frames_that_hold_nothing_are_no_answer(dialect: Dialect) -> None:
    for frame in frames_of(dialect):
        error_of(InvalidResponse, said, dialect, streamed(dialect, [frame] * 3))


@pytest.mark.parametrize("frame", ["some words of text", '{"a": 1',
    '{"choices": [{"index": 0, "delta": {"content": "lo',
    '{"type": "content_block_delta", "index": 0, "delta": {"text": "lo'])
def test_a_frame_that_may_have_held_text_makes_the_answer_invalid(dialect: Dialect,
        frame: str) -> None:
    before, after = until(dialect, Answer(), b"world")
    wire = frame.encode() + b"\n" if dialect.name == "ollama" else b"data: %s\n\n" % frame.encode()
    error_of(InvalidResponse, said, dialect, streamed(dialect, [*before, wire, *after]))


@pytest.mark.parametrize("label", ["text/event-stream", "application/x-ndjson", "application/json",
    "text/plain", "application/json; charset=utf-8", "text/html", "application/octet-stream"])
def test_a_body_is_read_by_its_first_bytes_and_not_by_its_label(dialect: Dialect,
        label: str) -> None:
    answer = Answer(calls=CALLS[:1], finish="tool_calls")
    body = json.dumps(dialect.body(answer)).encode()
    wires = [b"".join(dialect.events(answer)), body, b"\r\n\n  " + body, b"\xef\xbb\xbf" + body,
             json.dumps(dialect.body(answer), indent=2).encode()]
    if dialect.name != "ollama":
        wires += [b": comment\n\n" + wires[0], b"\n" + wires[0], b"data: " + body + b"\n\n",
                  b"data: " + body + b"\n\ndata: [DONE]\n\n"]
    for at, wire in enumerate(wires):
        response = said(dialect, reply(wire, kind=label), tools=TOOLS, stream_upstream=at % 2 == 1)
        assert (response.content, called(response)) == ("Hello, world", list(CALLS[:1])), wire


def test_events_in_lines_may_follow_a_line_that_is_none() -> None:
    lines = [json.dumps(one) for one in ({"id": "r"}, delta(content="a"), delta(content="b"), STOP)]
    assert read("chat", reply("\n".join(lines).encode())).text == "ab"
    cut = "\n".join(lines[1:2])
    for wire in (cut, *("\n".join([*lines[:2], odd, *lines[2:]]) for odd in (
            "{", "oops", '{"a": 1} {}'))):
        assert isinstance(read("chat", reply(wire.encode())), InvalidResponse)


def test_an_answer_of_too_many_values_is_not_read() -> None:
    text = json.dumps(message(content="x"))[:-1]
    for many, kind in ((180_000, LLMResponse), (200_000, InvalidResponse)):
        values = "{}," * many if kind is InvalidResponse else " " * 3 * many
        found = read("chat", reply(f'{text}, "more": [{values}{{}}]}}'.encode()))
        assert type(found) is kind and getattr(found, "code", "too_large") == "too_large"
    event = json.dumps({**delta("stop", content="x"), "more": [{}] * 200_000})
    assert getattr(read("chat", stream(json.loads(event))), "code", None) == "too_large"


def test_what_cannot_be_parsed_in_the_time_left_is_not_begun() -> None:
    """Nothing can interrupt a parser. Numbers take the most time for each byte."""
    event = json.dumps({**delta("stop", content="x"), "more": [0.12345678901234567] * 800_000})
    for wire in (reply(event.encode()), reply(f"data: {event}\n\n".encode())):
        with talking("chat", wire) as (provider, _):
            start = running()
            error_of(ProviderTimeout, provider.chat, "q", model="m", timeout=0.2)
            assert running() - start < 0.3


@pytest.mark.quiet
@pytest.mark.parametrize(("body", "looks"), [  # as often as 9000 / 256, and as there are lines
    (json.dumps(message(content=[{"text": "x"}] * 9000)).encode(), 35), (b"{}\n" * 60, 60)])
def test_time_may_be_over_at_any_look_at_the_clock(monkeypatch: pytest.MonkeyPatch, body: bytes,
        looks: int) -> None:
    """Reading a large answer, or one of many lines, looks at it from time to time."""
    canned, real = Canned(), time.monotonic
    canned.pieces = [body]
    with requests.Session() as session:
        session.mount("http://", canned)
        provider = OpenAIProvider(KEY, "http://h", session=session)
        for jump in itertools.count(1):
            count = itertools.count()
            with monkeypatch.context() as patch:
                patch.setattr(time, "monotonic", lambda n=count, at=jump: real() + 99 * (
                    next(n) >= at))
                try:
                    found: Any = provider.chat("q", model="m", timeout=50)
                except ProviderError as error:
                    found = error
            if not isinstance(found, ProviderTimeout):
                break
    assert jump > looks and isinstance(found, LLMResponse if looks == 35 else InvalidResponse)
    assert isinstance(read("chat", reply(b"{}\n1\n1\n")), InvalidResponse)


@pytest.mark.parametrize("end", [[], [STOP]], ids=["cut", "whole"])
def test_a_list_of_the_events_of_a_stream_needs_a_finish_reason(end: list[Any]) -> None:
    gemini = [candidate({"text": "x"}, finish="STOP" if end else None)] * 2
    for kind, events in (("chat", [delta(content="Hello "), delta(content="wor"), *end]),
                         ("gemini", gemini)):  # whose server answers so without ?alt=sse
        found = read(kind, reply(events))
        assert isinstance(found, LLMResponse if end else InvalidResponse)


def test_an_object_between_events_is_read_as_one() -> None:
    for line, kind in ((b'{"type": "ping"}\n', LLMResponse), (b'{"error": "x"}\n', ProviderError)):
        body = sse(delta(content="Hello ")) + line + sse(STOP)
        assert isinstance(read("chat", reply(body, kind="text/event-stream")), kind)


@pytest.mark.parametrize("said", [b"timeout", b"it closed", b'"late"', b'{"message": "late"}'])
@pytest.mark.parametrize("end", [sse(STOP), b"data: [DONE]\n\n"])
def test_an_error_event_is_an_error_whatever_it_says(said: bytes, end: bytes) -> None:
    body = sse(delta(content="Hello ")) + b"event:error\ndata:" + said + b"\n\n" + end
    assert isinstance(read("chat", reply(body, kind="text/event-stream")), ProviderError)


def test_pieces_of_a_call_without_an_index_go_to_the_call_that_they_name() -> None:
    pieces = [piece("", "weather", id="x"), piece("", "time", id="y"),
              piece('{"city": 1}', id="x"), piece('{"zone": 2}', id="y")]
    response = read("chat", reply(sse(*pieces, STOP), kind="text/event-stream"))
    assert [call.arguments for call in response.tool_calls] == [{"city": 1}, {"zone": 2}]


def test_arguments_that_come_before_their_call_are_kept() -> None:
    pieces = [{"type": "response.function_call_arguments.delta", "output_index": 0, "delta": part}
              for part in ('{"city"', ': "Bern"}')]
    item = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"city": "Bern"}'}
    done = {"type": "response.output_item.done", "output_index": 0, "item": item}
    for output in ([], [item]):
        end = {"type": "response.completed", "response": {"status": "completed", "output": output}}
        response = read("responses", stream(*pieces, done, end))
        assert [call.arguments for call in response.tool_calls] == [{"city": "Bern"}]


def test_raw_control_characters_in_json_strings_are_read(dialect: Dialect) -> None:
    answer = Answer(text=("a\tb", "\x01c"))
    for wire in (b"".join(dialect.events(answer)), json.dumps(dialect.body(answer)).encode()):
        raw = wire.replace(b"a\\tb", b"a\tb").replace(b"\\u0001", b"\x01")
        assert raw != wire
        kind = dialect.stream_kind if raw.startswith((b"data", b"event")) else "application/json"
        assert said(dialect, reply(raw, kind=kind)).content == "a\tb\x01c"


def test_a_gzip_body_of_several_members_is_whole(dialect: Dialect) -> None:
    wire = b"".join(dialect.events(Answer()))
    members = [gzip.compress(wire[:70]), gzip.compress(wire[70:])]
    packed = reply(b"".join(members), kind=dialect.stream_kind, Content_Encoding="gzip")
    assert said(dialect, packed).content == "Hello, world"
    cut = b"".join(members)[: len(members[0]) + 15]
    with pytest.raises(InvalidResponse):
        said(dialect, reply(cut, kind=dialect.stream_kind, Content_Encoding="gzip"))


TRICKY = ("\ufeffdata: one\n\n: comment\n\ndata:no space\r\n\r\ndata: two\ndata: lines\n\n"
    "event: named\ndata: \u2028 in \u2029 data\n\nid: 7\nretry: 5\n\ndata\n\ndata: last").encode()


def test_server_sent_events_are_the_same_however_the_bytes_are_cut() -> None:
    """BOM, comments, no space, CRLF, data in several lines, U+2028, no blank line at the end."""
    marks = [b"one", b"no space", b"two\ndata: lines", "\u2028 in \u2029 data".encode(), b"last"]
    wire = TRICKY
    for mark in marks:
        text = mark.replace(b"data: ", b"").decode().replace("\n", "")
        event = json.dumps(delta(content=text), ensure_ascii=False).encode()
        start, end = event.split(b'"delta"')
        wire = wire.replace(mark, start + b"\ndata: " * (b"\n" in mark) + b'"delta"' + end)
    wire += b"\n\n" + sse(STOP)
    canned = Canned()
    with requests.Session() as session:
        session.mount("http://", canned)
        provider = OpenAIProvider(KEY, "http://h", session=session)
        cuts = [[wire[:at], wire[at:]] for at in range(len(wire))]
        for canned.pieces in [*cuts, [wire[at : at + 1] for at in range(len(wire))]]:
            text = provider.chat("q", model="m", timeout=10).text
            assert text == "oneno spacetwolines\u2028 in \u2029 datalast"


def test_one_event_of_a_stream_is_no_whole_answer(dialect: Dialect) -> None:
    """A gateway may take the frames off, and break off behind the first line."""
    for answer in (Answer(), Answer(text=(), calls=(("f", {}),), finish="tool_calls")):
        for event in dialect.events(answer):
            text = event.partition(b"data: ")[2] or event
            found = read(dialect.name, reply(text, kind="application/json"), tools=TOOLS)
            ends = b'"response.completed"' in text
            # Gemini's events have the form of a whole answer
            assert isinstance(found, ProviderError) or ends or dialect.name == "gemini", text


@pytest.mark.parametrize("dialect", [d for d in DIALECTS if d.name != "responses"], ids=repr)
def test_an_emoji_cut_in_half_between_two_deltas_is_one_emoji(dialect: Dialect) -> None:
    """A half without its other half is U+FFFD, so that every answer can be printed and stored."""
    halves = ("a\ud83d", "\ude00b", "\ude00 c", "d\ud83d")
    response = said(dialect, Answer(text=halves, reasoning=("\ud83d", "\ude00")))
    assert (response.content, response.reasoning) == ("a\U0001f600b\ufffd cd\ufffd", "\U0001f600")


def test_half_characters_in_calls_and_errors_can_be_written(dialect: Dialect) -> None:
    half = "x\ud83d"
    answer = Answer(calls=((half, {"city": half, half: [half]}),), finish="tool_calls")
    for wire in (streamed(dialect, dialect.events(answer)), reply(dialect.body(answer)),
                 reply(json.dumps(dialect.body(answer)).replace("ud83d", "uD83D").encode())):
        response = said(dialect, wire, tools=TOOLS)
        for value in (response.to_dict(), response.message, response.tool_calls[0].arguments):
            json.dumps(value, ensure_ascii=False).encode()
    for status in (200, 400, 429, 500):
        error = {"message": half, "code": half, "type": half}
        answer = reply({"error": error}, status, X_Request_Id="r")
        raised = error_of(ProviderError, said, dialect, answer)
        f"{raised} {raised!r} {raised.code}".encode()


# -- signs of life
ALIVE: list[tuple[str, Any]] = [*(("chat", delta(**fields))
    for fields in ({"content": "x"}, {"reasoning": "x"}, {"reasoning_content": "x"},
        {"reasoning_text": "x"},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "x"}]}]},
        {"content": "", "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]},
        {"content": "", "reasoning_details": [{"type": "reasoning.text", "text": "x"}]},
        {"reasoning_opaque": "x"}, {"tool_calls": [{"index": 0, "function": {"name": "f"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]})),
    ("responses", {"type": "response.output_item.added", "output_index": 0,
        "item": {"type": "reasoning", "id": "r", "summary": []}}),
    ("responses", {"type": "response.reasoning_summary_text.delta", "delta": "x"}),
    ("responses", {"type": "response.reasoning_text.delta", "delta": "x"}),
    ("responses", {"type": "response.web_search_call.searching", "output_index": 0}),
    ("responses", {"type": "response.code_interpreter_call_code.delta", "delta": "x"}),
    ("responses", {"type": "response.function_call_arguments.delta", "output_index": 0,
        "delta": "{"}),
    ("anthropic", block(0, type="thinking", thinking="")),
    ("anthropic", block(0, type="redacted_thinking", data="x")),
    *(("gemini", {"candidates": [{"content": {"parts": [part]}}]})
        for part in ({"text": "x", "thought": True}, {"text": "", "thoughtSignature": "x"},
            {"functionCall": {"name": "f"}})),
    ("ollama", {"message": {"role": "assistant", "content": "", "thinking": "x"}}),
    ("ollama", {"message": {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}})]


def alive_after(kind: str, frame: bytes, patience: float) -> bool:
    """Whether the silence after this frame counts as a stall, or as a first token not yet come."""
    limits = {"first_token_timeout": patience, "stall_timeout": 0.05}
    label = "application/x-ndjson" if kind == "ollama" else "text/event-stream"
    with (talking(kind, waits(frame, label), **limits) as (provider, _),
            pytest.raises(ProviderTimeout) as raised):
        provider.chat("q", model="m", timeout=10)
    assert raised.value.code in ("first_token_timeout", "stall_timeout")
    return raised.value.code == "stall_timeout"


@pytest.mark.parametrize(("kind", "frame"), ALIVE)
def test_every_form_of_thinking_and_calling_is_a_sign_of_life(kind: str, frame: Any) -> None:
    wire = json.dumps(frame).encode() + b"\n" if kind == "ollama" else sse(frame)
    assert alive_after(kind, wire, 2)


def test_headers_roles_and_keep_alives_are_no_sign_of_life(dialect: Dialect) -> None:
    assert not alive_after(dialect.name, dialect.idle + frames_of(dialect)[0], 0.4)


# -- thoughts
def test_a_chain_streams_thoughts_where_they_are_asked_for(dialect: Dialect) -> None:
    answer = Answer(text=("4", "2"), reasoning=("Let me ", "think."))
    with served(dialect, answer) as (server, provider):
        chain = chain_of(provider)
        with chain.stream("hi", thoughts=True, timeout=10) as deltas:
            came = list(deltas)
            assert deltas.text == "42"
        assert [type(one) for one in came] == [copilot_router.Thought] * 2 + [str] * 2
        assert [str(one) for one in came] == ["Let me ", "think.", "4", "2"]
        assert deltas.response.reasoning == "Let me think."
        asked = {"responses": '"summary": "auto"', "gemini": '"includeThoughts": true'}
        assert asked.get(dialect.name, "") in json.dumps(server.bodies[0])
        assert list(chain.stream("hi", timeout=10)) == ["4", "2"]


@pytest.mark.parametrize(("pieces", "text", "thought"),
    [(["They want JSON.", "\n</think>\n\n", '{"a": 1}'], '{"a": 1}', "They want JSON."),
        (["hm</thi", "nk>42"], "42", "hm"),
        (["no thoughts <think>here</think>"], "no thoughts <think>here</think>", None),
        (["a <think>b", "</think> c"], "a <think>b</think> c", None),
        (["<thinking>x"], "<thinking>x", None), ([" <th"], " <th", None),
        (["<think>a</think>b</think>c"], "b</think>c", "a"), (["</think>x"], "x", None)])
def test_a_closing_think_tag_ends_the_thinking_that_no_tag_opened(pieces: list[str], text: str,
        thought: str | None) -> None:
    """A tag that opened later belongs to the text."""
    wires = [stream(*(delta(content=one) for one in pieces), STOP),
             reply(message(content="".join(pieces)))]
    for wire in wires:
        with talking("chat", wire) as (provider, _):
            response = provider.chat("q", model="m", timeout=10)
        assert (response.content, response.reasoning or None) == (text, thought)


# -- tool calls
NEEDY = {"type": "function", "function": {"name": "f", "parameters": CITY}}
LONG = {"type": "function", "function": {"name": "look_up", "parameters": CITY}}
END = delta("tool_calls")


A, B = {"index": 0, "id": "a"}, {"index": 1, "id": "b"}
CALL_F, CALL_UP = [("a", "f", {"x": 1})], [("a", "look_up", {"x": 1})]


@pytest.mark.parametrize(("pieces", "calls"), [
    ([piece("", "f", **A), piece('{"x"', index=0), piece(": 1}", index=0)], CALL_F),
    ([piece('{"x": 1}', "f", **A)], CALL_F), ([piece({"x": 1}, "f", **A)], CALL_F),
    ([piece('{"x"', "f", id="a"), piece(": 1}")], CALL_F),
    ([piece('{"x"', "f", **A), piece(": 1}", "f", index=0), piece("", "", index=0)], CALL_F),
    ([piece('{"x"', index=0), piece(": 1}", **A), piece(None, "f", index=0)], CALL_F),
    ([piece('{"x"', "f", **A), piece(": 1}", index=0, id="b")], CALL_F),
    ([piece("{}", "f", **A), piece('{"x": 1}', "g", index=0, id="b")],
        [("a", "f", {}), ("b", "g", {"x": 1})]),
    ([piece("{}", "f", **A), piece("{}", "f", **B)], [("a", "f", {}), ("b", "f", {})]),
    ([piece('{"x": ', "f", **A), piece('{"y": ', "g", **B), piece("1}", index=0),
        piece("2}", index=1)], [*CALL_F, ("b", "g", {"y": 2})]),
    ([piece("", "look", **A), piece('{"x": 1}', "_up", index=0)], CALL_UP),
    ([piece("", "look_up", **A), piece('{"x": 1}', "look_up", **A)], CALL_UP),
    ([delta(function_call={"name": "f", "arguments": '{"x": 1}'})], [(None, "f", {"x": 1})]),
    ([piece("{}", "f", **A), delta(content="", function_call={"name": "", "arguments": ""})],
        [("a", "f", {})]), ([piece("{}", "f", **A), piece("{}", "g", index=1, id="a")],
        [("a", "f", {}), (None, "g", {})])])
def test_tool_calls_are_put_together_from_their_pieces(pieces: list[Any], calls: Any) -> None:
    response = read("chat", stream(*pieces, END, done=True), tools=[TOOL, LONG])
    found = [(call.id, call.name, call.arguments) for call in response.tool_calls]
    assert [one[1:] for one in found] == [one[1:] for one in calls]
    assert all(mine in (wanted, wanted or mine) for (mine, *_), (wanted, *_)
               in zip(found, calls, strict=True))
    assert len({call.id for call in response.tool_calls} - {""}) == len(calls)
    assert response.finish_reason == "tool_calls"


@pytest.mark.parametrize("pieces", [[piece("{}", index=0)], [piece("{}", "", index=0, id="a")]])
def test_a_call_with_arguments_and_without_a_name_is_no_answer(pieces: list[Any]) -> None:
    assert isinstance(read("chat", stream(*pieces, END)), InvalidResponse)


@pytest.mark.parametrize(("pieces", "arguments"), [([""], {}), ([" "], {}), (["[1]"], None),
    (['{"a', ""], None), (['{"a": 1}'], {"a": 1}), (["{}", '{"a":', "1}"], {"a": 1}),
    (['{"a":1}', '{"a":1}'], {"a": 1}), (['{"a":1}', '{"b":2}'], None), (['{"a":1}', "x"], None),
    (["{", '{"a":1}', '{"b":2}'], None),
    (['{"a":1}{"a"', ":1}"], {"a": 1}), ([json.dumps('{"a":1}')], {"a": 1}),
    ([json.dumps("text")], None), (['{"a": NaN}'], None),
    (['{"a": -Infinity}'], None), (["5"], None), (["true"], None)])
def test_arguments_are_read_where_they_are_unambiguous(pieces: Any, arguments: Any) -> None:
    """Sent twice, encoded twice, behind an empty object; otherwise None, and the text is kept."""
    first, *more = pieces
    wire = stream(piece(first, "f", index=0, id="a"), *(piece(one, index=0) for one in more), END)
    (call,) = read("chat", wire, tools=[TOOL]).tool_calls
    assert call.arguments == arguments
    assert arguments is not None or call.raw_arguments == "".join(pieces)


@pytest.mark.parametrize(
    ("tools", "arguments"), [([TOOL], {}), ([NEEDY], None), (None, {}), ([LONG], {})])
def test_null_arguments_are_empty_unless_the_tool_requires_some(tools: Any, arguments: Any) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "null"}}
    item = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "null"}
    for kind, wire in (("chat", stream(piece("null", "f", index=0, id="a"), END)),
            ("chat", reply(message("tool_calls", content=None, tool_calls=[call]))),
            ("responses", reply({"status": "completed", "output": [item]}))):
        assert read(kind, wire, tools=tools).tool_calls[0].arguments == arguments


@pytest.mark.parametrize("frame", [{"detail": "late"}, {"errors": ["late"]},
    {"type": "error", "message": "late"}, {"code": 500, "message": "late"}, {"status": "error"},
    {"status_code": 503}, {"choices": None, "base_resp": {"status_code": 1000, "status_msg": "x"}},
    {"error": {"message": "x"}}, {"error": ["x"]}, {"object": "error", "message": "x"},
    {"choices": [{"error": {"code": 502}}]}])
def test_an_error_of_any_form_behind_text_is_an_error(frame: Any) -> None:
    """Also where no end follows it."""
    for end in ([STOP], []):
        wire = stream(delta(content="half an "), frame, *end, done=True)
        assert isinstance(read("chat", wire), (InvalidResponse, ServerError))


def test_many_small_calls_and_items_are_read_in_linear_time_and_memory() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    many = message("tool_calls", tool_calls=[{**call, "id": f"{at}"} for at in range(9000)])
    start = running()
    assert len(read("chat", reply(many)).tool_calls) == 9000
    pieces = [piece("", "f", id=f"{at}", index=0) for at in range(2000)]
    begun = piece('{"x": "' + "y" * 500_000, "f", id="a", index=0)
    read("chat", stream(begun, *pieces, STOP), tools=TOOLS)
    assert running() - start < 5
    items = {"choices": [{"index": 0, "delta": {"reasoning_details": [{"x": 1}] * 2000}}]}
    found = read("chat", stream(*[items] * 10, STOP), max_response_bytes=1_000_000)
    assert getattr(found, "code", None) == "too_large"


ITEM = {"type": "function_call", "name": "f"}


def completed(*output: Any) -> dict[str, Any]:
    return {"type": "response.completed", "response": {"status": "completed", "output": output}}


@pytest.mark.parametrize("text", ["", '{"city": "Os'])
def test_arguments_whose_end_was_not_seen_are_none_whatever_ended_the_answer(text: str) -> None:
    begun = block(0, type="tool_use", id="a", name="f", input={})
    grown = grows(0, "input_json_delta", partial_json=text)
    item = {**ITEM, "status": "incomplete", "call_id": "a", "arguments": text}
    cut = {"type": "response.incomplete", "response": {"status": "incomplete", "output": [item]}}
    wires = [("chat", [delta(content="x"), piece(text, "f", index=0, id="a"), delta(why)])
             for why in ("length", "filter", "limit")]
    wires += [("anthropic", [started(), begun, *[grown] * times, stops(why)])
              for why in ("max_tokens", "tool_use", "refusal") for times in (0, 1)]
    added, done = ({"type": f"response.output_item.{step}", "output_index": 0, "item": item}
                   for step in ("added", "done"))
    wires += [("responses", events) for events in ([cut], [added, completed()],
                                                   [added, done, completed()])]
    for kind, events in wires:
        found = read(kind, stream(*events))
        assert [call.arguments for call in found.tool_calls] == [None], events
        was_cut = "length" in str(events) or "max_tokens" in str(events)
        assert (found.finish_reason == "length") == (was_cut or events == [cut])


def test_calls_without_an_index_or_under_one_that_is_taken_stay_apart() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    both = [{**call, "id": name} for name in "ab"]
    begun = [block(0, type="tool_use", id=name, name="f", input={"x": 1}) for name in "ab"]
    closed = {"type": "content_block_stop", "index": 0}
    items = [{**ITEM, "call_id": name, "arguments": '{"x": 1}'} for name in "ab"]
    ended = [{"type": "response.output_item.done", "item": item} for item in items]
    wires = [("chat", [delta(tool_calls=both), STOP]),
        ("chat", [*(piece(call["function"]["arguments"], "f", index=at, id=name)
                    for at, name in enumerate("ab")), message("stop", tool_calls=both)]),
        ("anthropic", [{"type": "message_start", "message": {}}, begun[0], closed, begun[1], closed,
                       {"type": "message_delta", "delta": {"stop_reason": "tool_use"}}]),
        ("responses", [*ended, completed()]), ("responses", [*ended, completed(*items)]),
        ("responses", [*({**one, "output_index": 0} for one in ended), completed()])]
    for kind, events in wires:
        found = read(kind, stream(*events)).tool_calls
        assert [(one.id, one.arguments) for one in found] == [(name, {"x": 1}) for name in "ab"]


def test_responses_text_under_shifted_indexes_comes_once() -> None:
    items = [{"type": "reasoning"},
             {"type": "message", "content": [{"type": "output_text", "text": "Hello"}]}]
    done = {"type": "response.output_item.done", "output_index": 1, "item": items[1]}
    for at, number in ((0, 0), (1, 3), (None, None)):
        first = {"type": "response.output_text.delta", "output_index": at, "content_index": number}
        for events in ([], [done]):
            events = [{**first, "delta": "Hello"}, *events, completed(*items)]
            assert read("responses", stream(*events)).text == "Hello"


# -- requests
PORTABLE: dict[str, Any] = {"max_tokens": 77, "temperature": 0.5, "top_p": 0.75, "seed": 3,
    "user": "somebody", "reasoning_effort": "low", "parallel_tool_calls": False,
    "tool_choice": "auto", "presence_penalty": 0.1, "frequency_penalty": 0.1,
    "extra_body": {"x_own": {"a": 1}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": CITY}}}


def test_extra_body_is_merged_over_the_body(dialect: Dialect) -> None:
    body = sent(dialect.name, extra_body={"x_own": {"deep": [1]}, "model": "other"})
    assert (body["x_own"], body["model"]) == ({"deep": [1]}, "other")


def test_both_names_of_the_token_limit_mean_the_same(dialect: Dialect) -> None:
    body = sent(dialect.name, max_tokens=77)
    assert body == sent(dialect.name, max_completion_tokens=77) and "77" in json.dumps(body)


@pytest.mark.parametrize(("option", "nearest"), [("temprature", "temperature"),
    ("tool_choise", "tool_choice"), ("stall_timout", "stall_timeout")])
def test_an_unknown_option_is_a_type_error_that_names_the_nearest(dialect: Dialect, option: str,
        nearest: str) -> None:
    with served(dialect, Answer()) as (server, provider):
        match = rf"{option}.*{nearest}"
        error_of(TypeError, provider.chat, "hi", model="m", match=match, **{option: 1})
        assert not server.requests


def test_a_model_is_needed_unless_the_server_is_a_compatible_one(dialect: Dialect) -> None:
    with served(dialect, Answer()) as (server, provider):
        if dialect.needs_model:
            error_of(ConfigError, provider.chat, "hi", match="model", timeout=5)
            assert not server.requests
        else:
            assert provider.chat("hi", timeout=5).content == "Hello, world"
            assert "model" not in server.bodies[0]


def test_the_key_goes_into_one_header_only(dialect: Dialect) -> None:
    """It may come from a function, which is asked for each request, and may fail."""
    keys = iter(["sk-test-first-key", "sk-test-second-key"])
    places = {"anthropic": ("x-api-key", KEY), "gemini": ("x-goog-api-key", KEY)}
    with served(dialect, Answer()) as (server, provider):
        by_function = dialect.make(server.url, lambda: next(keys))
        for one in (provider, dialect.make(server.url, ""), by_function, by_function):
            one.chat("hi", model="m", timeout=5)
            one.close()
        error_of(AuthenticationError, by_function.chat, "hi", model="m", timeout=5)
    (path, headers, body), without, *asked = server.requests
    (carrying,) = [name for name, value in headers.items() if KEY in value]
    place = places.get(dialect.name, ("authorization", f"Bearer {KEY}"))
    assert KEY not in path + json.dumps(body) and (carrying, headers[carrying]) == place
    assert carrying not in without.headers
    assert [one.headers[carrying].rpartition("sk-test-")[2] for one in asked] == [
        "first-key", "second-key"]


def with_call(**fields: Any) -> list[dict[str, Any]]:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}, **fields}
    return [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]


CYCLE: dict[str, Any] = {}
CYCLE["again"] = CYCLE
UNWRITABLE: list[dict[str, Any]] = [
    {"messages": with_call(function={"name": "f", "arguments": {"price": Decimal("1.5")}})},
    {"messages": with_call(function={"name": "f", "arguments": {"a": {1, 2}}})},
    {"messages": with_call(function={"name": "f", "arguments": {"a": CYCLE}})},
    {"messages": with_call(function={"name": "f", "arguments": {"a": float("nan")}})},
    {"messages": with_call(id="c\ud83d")},
    {"messages": with_call(function={"name": "f\ud83d", "arguments": "{}"})},
    {"messages": "q", "temperature": float("nan")},
    {"messages": "half \ud83d"}, {"messages": [{"role": "user", "content": b"bytes"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}]},
    {"messages": "q", "tools": [{"type": "function", "function": {
        "name": "f", "description": "\udc00", "parameters": CITY}}]},
    {"messages": "q", "tools": [{"type": "function", "function": {
        "name": "f", "parameters": {"type": "object", "properties": {"a": {"enum": {1}}}}}}]},
    *({"messages": "q", "extra_body": {"x": value}} for value in (
        float("nan"), float("inf"), Decimal(1), {1}, b"x", CYCLE, "\ud83d"))]


@pytest.mark.parametrize("asked", UNWRITABLE, ids=range(len(UNWRITABLE)))
def test_what_cannot_be_written_is_a_bad_request_and_not_sent(dialect: Dialect, asked: Any) -> None:
    """It is the caller's fault, so that the breaker learns nothing from it."""
    if dialect.name == "gemini" and asked is UNWRITABLE[4]:
        pytest.skip("Gemini is sent no ids")
    with served(dialect, Answer()) as (server, provider):
        chain = chain_of(provider, failure_threshold=1)
        error_of(BadRequest, chain.chat, timeout=5, **asked)
        assert not server.requests and chain.tiers[0].breaker.is_closed


MALFORMED: list[tuple[dict[str, Any], str]] = [({"messages": []}, "empty"),
    ({"messages": [{"role": "assistant", "tool_calls": "f"}]}, "tool_calls is a str"),
    ({"messages": [{"role": "nobody", "content": "x"}]}, "nobody"), ({"tools": "weather"}, "tools"),
    ({"tools": TOOL}, "tools"), ({"tools": [5]}, r"tools\[0\]"),
    ({"tools": [TOOL, {"type": "function"}]}, r"tools\[1\]"),
    ({"tool_choice": "always"}, "tool_choice"), ({"tool_choice": {}}, "tool_choice"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format"), ({"stop": 5}, "stop"),
    ({"response_format": {"type": "json_schema"}}, "response_format"), ({"stop": ["a", 5]}, "stop"),
    ({"extra_body": "x"}, "extra_body"), ({"messages": with_call(id=5)}, r"messages\[1\]"),
    ({"messages": with_call(function={})}, "tool_calls"),
    ({"messages": with_call(function={"name": "f", "arguments": 5})}, "tool_calls"),
    ({"messages": [{**with_call()[1], "role": "user", "content": "x"}]}, r"messages\[0\]")]


#: A compatible server may know other forms of these.
FREE = {"tool_choice", "response_format", "stop"}


@pytest.mark.parametrize(("kind", "asked", "named"),
    [(kind, *row) for kind in ("chat", "anthropic", "gemini", "ollama") for row in MALFORMED
        if kind != "chat" or not row[0].keys() & FREE])
def test_a_malformed_request_is_refused_before_it_is_sent(kind: str, asked: Any,
        named: str) -> None:
    asked = {"messages": "q", **({} if "tools" in asked else {"tools": [TOOL]}), **asked}
    with talking(kind, reply({})) as (provider, server):
        for ask in (chain_of(provider).chat, provider.chat):
            error_of(BadRequest, ask, match=named, model="m", timeout=5, **asked)
        assert not server.requests


@pytest.mark.parametrize("empty", [{"content": ""}, {"content": None}, {"content": []},
                                   {"content": "", "tool_calls": []}])
def test_empty_assistant_turns_are_left_out(dialect: Dialect, empty: Any) -> None:
    again = {"role": "user", "content": "again"}
    text = json.dumps(sent(dialect.name, [USER, {"role": "assistant", **empty}, again]))
    assert "assistant" not in text
    assert '"model"' not in text or dialect.name != "gemini"
    assert "again" in text


@pytest.mark.parametrize("media", ["image/png", "image/jpeg"])
def test_an_image_as_data_url_arrives_with_its_bytes(dialect: Dialect, media: str) -> None:
    url = f"data:{media};base64,{PNG}"
    content = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    texts = list(texts_in(sent(dialect.name, [{"role": "user", "content": content}])))
    assert "What?" in texts and [text.rpartition(",")[2] for text in texts if PNG in text] == [PNG]
    assert dialect.name == "ollama" or any(media in text for text in texts)


def test_an_image_by_address_is_sent_or_unsupported(dialect: Dialect) -> None:
    url = "https://images.invalid/cat.png"
    ask = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    if dialect.remote_images:
        assert url in texts_in(sent(dialect.name, ask))
    else:
        with pytest.raises(UnsupportedRequest):  # and nothing is sent
            sent(dialect.name, ask)


def test_cache_control_goes_to_anthropic_and_compatible_servers_only(dialect: Dialect) -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    marked = [{"type": "text", "text": "long", **mark}, {"type": "text", "text": "And?"}]
    bodies = [json.dumps(sent(dialect.name, messages, tools)) for messages, tools in (
        ([{"role": "user", "content": "whole", **mark}], None),
        ([{"role": "system", "content": marked[:1]}, USER], None),
        ([{"role": "user", "content": marked}], None), ("q", [{**TOOLS[0], **mark}]))]
    carried = dialect.name in ("chat", "lmstudio", "anthropic")
    assert ["cache_control" in body for body in bodies] == [carried] * 4
    assert all(text in "".join(bodies) for text in ("long", "And?"))


def test_ping_lists_models_and_generates_nothing(dialect: Dialect) -> None:
    with served(dialect, reply(dialect.models)) as (server, provider):
        assert provider.ping(timeout=5) is None
        assert [request.path for request in server.requests] == [dialect.ping_path]
    with served(dialect, reply(b"<html>", kind="text/html")) as (_, provider):
        error_of(InvalidResponse, provider.ping, timeout=5)


# -- corrections that are learned from a refusal
def refusing(dialect: Dialect, field: str, body: Any, status: int = 400) -> Any:
    def serve(server: Server, connection: Any, request: bytes) -> bool:
        if f'"{field}":'.encode() in request:
            connection.sendall(reply(body, status))
            return True
        return answers(dialect, lambda _: Answer())(server, connection, request)
    return serve


def test_a_refused_hint_is_dropped_once_and_remembered_per_model(dialect: Dialect) -> None:
    """Within the same attempt, told as an event, shown by health(), ended by reset()."""
    option, value, body = dialect.refused
    events: list[Any] = []
    with served(dialect, refusing(dialect, dialect.hint, body)) as (server, provider):
        chain = chain_of(provider, on_event=events.append)
        response = chain.chat("hi", timeout=5, **{option: value})
        assert (len(response.attempts), len(server.requests)) == (1, 2)
        told = [(one.kind, one.data.get("field")) for one in events]
        assert told == [("attempt", None), ("resend", option), ("done", None)]
        chain.chat("hi", timeout=5, **{option: value})
        assert len(server.requests) == 3
        chain.chat("hi", model="n", timeout=5, **{option: value})
        assert len(server.requests) == 5
        assert chain.health()[0].learned == {"m": {option: "drop"}, "n": {option: "drop"}}
        chain.reset()
        assert chain.health()[0].learned == {}
        chain.chat("hi", timeout=5, **{option: value})
        assert len(server.requests) == 7


@pytest.mark.parametrize("told", [
    {"message": "Unsupported value: temperature does not support 1.7", "code": "unsupported_value"},
    {"message": "temperature must be 1 or less: not allowed"},
    {"message": "invalid temperature: only values between 0 and 1 are allowed"}])
def test_a_value_that_is_refused_takes_the_field_from_no_other_value(told: Any) -> None:
    """One caller's mistake must not change the requests of all others."""
    def serve(server: Server, connection: Any, request: bytes) -> bool:
        bad = server.bodies[-1].get("temperature") == 1.7
        connection.sendall(reply({"error": told}, 400) if bad else reply(message(content="x")))
        return True
    with talking("chat", serve) as (provider, server):
        for value in (1.7, 1.7, 0.5):
            provider.chat("q", model="m", temperature=value)
    assert [body.get("temperature") for body in server.bodies] == [1.7, None, None, 0.5]


def test_fields_that_are_refused_one_after_the_other_are_all_corrected() -> None:
    """Each once, all remembered; none of them if the request is refused for another reason."""
    options: dict[str, Any] = {"model": "m", "timeout": 5, "temperature": 1, "top_p": 1, "seed": 1}
    def serve(server: Server, connection: Any, request: bytes) -> bool:
        bad = [one for one in ("stream", *[*options][2:]) if one in server.bodies[-1]]
        told = {"message": "no", "param": bad[0], "code": "unsupported_value"} if bad else "wrong"
        wrong = bad or server.bodies[-1].get("stop")
        server.stopping.wait(0 if wrong else 0.4)  # a whole answer has no first token
        connection.sendall(reply({"error": told}, 400) if wrong else reply(message(content="x")))
        return True
    with talking("chat", serve, first_token_timeout=0.1) as (provider, server):
        error_of(BadRequest, provider.chat, "q", stop="x", **options)
        assert len(server.requests) == 5
        for count in (10, 11):
            assert provider.chat("q", **options).text == "x" and len(server.requests) == count
        assert list(provider.stream("q", **options)) == ["x"]
        assert "stream_options" not in server.bodies[-1]


def test_a_correction_that_did_not_help_is_forgotten(dialect: Dialect) -> None:
    option, value, body = dialect.refused
    other = {"error": {"message": "something else is wrong", "type": "invalid_request_error"}}
    for second in (body, other):
        script = [reply(body, 400), reply(second, 400), Answer()]
        with served(dialect, *script) as (server, provider):
            chain = chain_of(provider)
            with pytest.raises((ProviderError, AllProvidersFailed)):
                chain.chat("hi", timeout=5, **{option: value})
            assert (len(server.requests), chain.health()[0].learned) == (2, {})
            chain.chat("hi", timeout=5, **{option: value})
            assert f'"{dialect.hint}"' in json.dumps(server.bodies[2])


HINTS = {"temperature": 0.5, "top_p": 0.5, "seed": 1, "presence_penalty": 0.5, "user": "u",
         "frequency_penalty": 0.5, "reasoning_effort": "low", "parallel_tool_calls": True}
REFUSALS: list[tuple[int, Any, str]] = [*((400, f"Unsupported value: '{theirs}'", hint)
    for hint, names in {"temperature": "temperature", "top_p": "top_p topP", "seed": "seed",
        "presence_penalty": "presence_penalty presencePenalty",
        "frequency_penalty": "frequency_penalty frequencyPenalty",
        "reasoning_effort": "reasoning_effort reasoning.effort output_config.effort think",
        "parallel_tool_calls": "parallel_tool_calls disable_parallel_tool_use",
        "user": "user metadata.user_id safety_identifier"}.items() for theirs in names.split()),
    (400, "temperature: Extra inputs are not permitted", "temperature"),
    (400, "`temperature` is deprecated for this model.", "temperature"),
    *((400, f"invalid temperature: only {n} is allowed for m", "temperature") for n in (1, 0.6)),
    (400, 'Unknown name "topP" at generation_config', "top_p"),
    (400, "Unrecognized request argument supplied: seed", "seed"),
    *((422, [{"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs"}], name)
        for name in ("seed", "parallel_tool_calls")),
    (422, [{"loc": ["body", name], "msg": "Extra inputs"} for name in ("seed", "user")], "seed"),
    (400, "`temperature` and `top_p` cannot both be specified for this model. Use one.", "top_p"),
    (400, "`temperature` may only be set to 1 when thinking is enabled.", "temperature"),
    *((400, f"seed is not supported {at}", "seed") for at in ("in a stream", "if stream is true")),
    *((400, f"{told}: ['user', 'seed']", "seed")  # transformers, LiteLLM
        for told in ("Unused fields in the request", "m doesn't support parameters")),
    (400, "Penalty is not enabled for models/m", "frequency_penalty"),  # Gemini
    *((400, text, "reasoning_effort") for text in ("m does not support parameter reasoningEffort.",
        "`reasoning_effort` must be one of `none` or `default`", "This only works in thinking mode",
        "'loc': ('body', 'reasoning_effort'), 'msg': \"Input should be 'low' or 'high'\""))]


@pytest.mark.parametrize(("status", "said_by_server", "hint"), REFUSALS)
def test_each_hint_is_dropped_under_all_its_names(status: int, said_by_server: Any,
        hint: str) -> None:
    bodies = [{"error": {"message": said_by_server}}]
    if isinstance(said_by_server, list):
        bodies = [{"detail": said_by_server}, {"message": {"detail": said_by_server}}]
    for body in bodies:
        with talking("chat", reply(body, status), reply(message(content="x"))) as (client, server):
            assert client.chat("q", TOOLS, "m", timeout=5, **HINTS).text == "x"
        first, second = server.bodies
        assert first.keys() - second.keys() == {hint}


@pytest.mark.parametrize(("text", "status", "options"),
    [("temperature must be below 2", 400, HINTS), ("tools are not supported", 400, {}),
        ("messages: at least one is required", 400, HINTS), ("seed is wrong somehow", 500, HINTS),
        ("Unsupported value: 'temperature'", 400, {}),
        ("Unsupported value: 'temperature'", 401, HINTS),
        ("temperature and top_p are not supported", 400, HINTS),
        ("max_tokens is not allowed to be that large", 400, {"max_tokens": 10**9}),
        ("content: Input should be a valid string", 400, {"messages": [
            {"role": "user", "content": ""}, {**with_call()[1], "content": "x"}]}),
        *((text, status, {}) for status in (429, 500, 403) for text in ("near 'length of 9'",
            "see v1/responses for it", "reasoning_content was not passed back"))])
def test_other_errors_are_not_answered_by_a_second_request(text: str, status: int,
        options: Any) -> None:
    """And nothing is learned from them."""
    asked = {"messages": "q", "tools": TOOLS, "timeout": 5, **options}
    with talking("chat", reply({"error": {"message": text}}, status)) as (provider, server):
        chain = chain_of(provider)
        error_of((AllProvidersFailed, ProviderError), chain.chat, **asked)
        assert len(server.requests) == 1 and not any(chain.health()[0].learned.values())


@pytest.mark.parametrize("text", ["unsupported temperature", "/v1/responses",
    "temperature: Extra inputs are not permitted",
    "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."])
@pytest.mark.parametrize("place", ["text", "address", "tool", "user", "history"])
def test_what_a_server_repeats_of_the_request_teaches_nothing(place: str, text: str) -> None:
    """One user's prompt must not change what is sent for the others. A real refusal teaches."""
    url = "https://x.invalid/" + text.replace(" ", "%20").replace("'", "") + ".png"
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": CITY}}
    history = [USER, {"role": "assistant", "content": text}, USER]
    asked: dict[str, Any] = {"text": {"messages": text}, "address": {"messages": image},
        "user": {"user": text}, "tool": {"tools": [tool]}, "history": {"messages": history}}[place]
    echo = url if place == "address" else text
    error = {"error": {"message": f"cannot process: {echo}", "code": "invalid_value"}}
    real = {"error": {"message": "Unsupported value: 'temperature'"}}
    plain = {"messages": "q", "tools": TOOLS, "max_tokens": 50, "temperature": 0.0, "timeout": 5}
    fine = reply(message(content="x"))
    script = [fine, reply(error, 400), fine, reply(real, 400), fine]
    with talking("chat", *script, api="auto") as (provider, server):
        chain = chain_of(provider)
        chain.chat(**plain)
        error_of(BadRequest, chain.chat, **{**plain, **asked})
        chain.chat(**plain)
        assert chain.health()[0].learned == {}
        before, _, after = server.requests
        assert (before.path, before.body) == (after.path, after.body)
        assert chain.chat(**{**plain, **asked}).text == "x"
        assert chain.health()[0].learned == {"m": {"temperature": "drop"}}


@pytest.mark.parametrize(("status", "kept"), [(429, True), (503, True), (500, False), (403, False),
                                              (422, False)])
def test_a_correction_is_kept_only_if_it_may_have_helped(status: int, kept: bool) -> None:
    """A server that has no time just then says nothing about the corrected request."""
    refusal = reply({"error": {"message": "Unsupported value: 'temperature'"}}, 400)
    last = reply({"error": {"message": "no"}}, status)
    with talking("chat", refusal, last) as (provider, server):
        chain = chain_of(provider)
        error_of((AllProvidersFailed, ProviderError), chain.chat, "q", temperature=0.5, timeout=5)
        assert chain.health()[0].learned.get("m", {}) == ({"temperature": "drop"} if kept else {})
        assert ["temperature" in body for body in server.bodies][:2] == [True, False]


@pytest.mark.parametrize(("number", "options"), [(at, effort) for at in (1, 3, 4, 5)
                                                 for effort in ({}, {"reasoning_effort": "high"})])
def test_a_model_that_shows_no_thoughts_is_asked_without_them(number: int, options: Any) -> None:
    dialect = DIALECTS[number]
    told = "generating reasoning summaries" if number == 1 else "thinking"
    refusal = reply({"error": {"message": f"{told} is not supported by this model"}}, 400)
    with served(dialect, refusal, Answer()) as (server, provider):
        chain = chain_of(provider)
        for _ in range(2):
            stream = chain.stream("q", thoughts=True, timeout=5, **options)
            assert "".join(stream) == "Hello, world"
        assert chain.health()[0].learned == {"m": {"thoughts": "drop"}}
        first, *others = server.bodies
        assert first != others[0] == others[1]


# -- histories
VENDORS = ("openai", "responses", "anthropic", "gemini", "ollama")
SYSTEM = {"role": "system", "content": "be brief"}
#: Whether the thinking goes back to the same vendor and model. OpenAI's own servers want none.
RETURNS = {"openai": False, "responses": True, "anthropic": True, "gemini": False, "ollama": True}
DOWN = reply({"error": {"message": "down", "type": "server_error"}}, 500)
RESULTS = ["weather in Oslo", "time in Oslo", "weather in Rome", "time in Rome", "weather in Bern"]


def turns(*names: str) -> list[Reply]:
    """Four turns of a tool loop, each with a thought that names its author."""
    called = [[("weather", {"city": "Oslo"}), ("time", {"city": "Oslo"})],
              [("weather", {"city": "Rome"})],
              [("time", {"city": "Rome"}), ("weather", {"city": "Bern"})], []]
    texts = ["", "and next", "then", "all done"]
    return [Reply(text, calls, thinking=f"thought {n} of {name}")
            for n, (text, calls, name) in enumerate(zip(texts, called, names, strict=True))]


def looped(chain: FailoverChain, streaming: bool) -> list[LLMResponse]:
    """The answers of a tool loop whose conversation goes through JSON at every turn."""
    history: list[dict[str, Any]] = [SYSTEM, USER]
    responses: list[LLMResponse] = []
    for _ in range(4):
        if streaming:
            deltas = chain.stream(history, TOOLS, timeout=20)
            assert "".join(deltas) == deltas.response.text
            responses.append(deltas.response)
        else:
            responses.append(chain.chat(history, TOOLS, timeout=20))
        history.append(json.loads(json.dumps(responses[-1].message)))
        history += [{"role": "tool", "tool_call_id": call.id,
                     "content": f"{call.name} in {call.arguments['city']}"}
                    for call in responses[-1].tool_calls if call.arguments]
    assert [one.text for one in responses] == ["", "and next", "then", "all done"]
    assert [one.finish_reason for one in responses] == ["tool_calls"] * 3 + ["stop"]
    return responses


def secrets(vendor: Any) -> list[str]:
    found = [issued[1] for issued in vendor.issued.values()]
    if isinstance(vendor, Gemini):
        return [part["thoughtSignature"] for part in found if "thoughtSignature" in part]
    if isinstance(vendor, Anthropic):
        return [blocks[0]["signature"] for blocks in found]
    return [item["encrypted_content"] for item in found]


@pytest.mark.parametrize(("one", "two"), list(itertools.permutations(VENDORS, 2)))
def test_a_tool_loop_may_change_the_vendor_at_every_turn(one: str, two: str) -> None:
    """Nothing foreign is sent, and each gets its own back unchanged, or it would refuse."""
    a, b, c, d = turns(one, two, one, two)
    streaming = one < two
    with faked(one, a, DOWN, c, DOWN, stream_upstream=streaming) as (first, provider), \
            faked(two, b, d, stream_upstream=streaming) as (second, other):
        chain = FailoverChain([ProviderTier("a", provider, ["m-1"], retries=0),
                               ProviderTier("b", other, ["m-1"], retries=0)])
        responses = looped(chain, streaming)
        assert [response.provider for response in responses] == ["a", "b", "a", "b"]
        assert not first.refusals + second.refusals
        for mine, theirs, name, foreign in ((first, second, one, two), (second, first, two, one)):
            text = json.dumps(mine.bodies)
            assert "copilot_router" not in text and f"of {foreign}" not in text
            assert not any(secret in text for secret in secrets(theirs))
            last = json.dumps(mine.bodies[-1])
            assert (f"of {name}" in last) == RETURNS[name]
            places = [last.index(result) for result in RESULTS]
            assert places == sorted(places)


@pytest.mark.parametrize("name", VENDORS)
def test_a_tool_loop_may_change_the_model_at_every_turn(name: str) -> None:
    a, b, c, d = turns("m-1", "m-2", "m-1", "m-2")
    with faked(name, a, DOWN, b, c, DOWN, d) as (vendor, provider):
        chain = FailoverChain([ProviderTier(one, provider, [one], retries=0) for one in MODELS])
        assert [one.provider for one in looped(chain, True)] == [*MODELS, *MODELS]
        assert not vendor.refusals
        for request in vendor.requests:
            model = request.body.get("model") or request.path.split("/models/")[1].split(":")[0]
            (other,) = {*MODELS} - {model}
            assert f"of {other}" not in json.dumps(request.body)
        assert ("of m-1" in json.dumps(vendor.bodies[3])) == RETURNS[name]


@pytest.mark.parametrize("name", ["responses", "anthropic", "gemini"])
def test_what_a_message_carries_goes_back_only_as_it_was(name: str) -> None:
    """Not with an edited text or another id, and not to another server."""
    first = Reply("text", [("time", {"city": "Oslo"})], "a thought")
    with faked(name, first) as (vendor, provider):
        message = provider.chat([USER], TOOLS, "m-1").message
        assert message["copilot_router"]
        (call,) = message["tool_calls"]
        answer = {"role": "tool", "tool_call_id": call["id"], "content": "cold"}
        assert provider.chat([USER, message, answer], TOOLS, "m-1").text == "ok"
        assert all(secret in json.dumps(vendor.bodies[1]) for secret in secrets(vendor))
        edited = {**message, "content": "other text"}
        renamed = {**message, "tool_calls": [{**call, "id": "mine"}]}
        histories = [[USER, edited, answer], [USER, renamed, {**answer, "tool_call_id": "mine"}]]
        if name != "responses":  # both fakes stand behind OpenAI's one address
            histories.append([USER, message, answer])
        with faked(name) as (stranger, other):
            for history in histories:
                assert other.chat(history, TOOLS, "m-1").text == "ok"
                text = json.dumps(stranger.bodies)
                assert not any(secret in text for secret in ["a thought", *secrets(vendor)])


@pytest.mark.parametrize("name", VENDORS)
def test_every_vendor_takes_a_conversation_with_everything_in_it(name: str) -> None:
    """Strange ids, empty contents, lost and foreign results, an assistant first and last."""
    image = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,iVBORw0KGgo="}}
    given = [("functions.x:0", ""), ("", "null"), ("same", '{"city": "Oslo"}'), ("same", "{broken"),
             ("functions.x 0", "{}"), ("long" * 20, "{}")]
    calls = [{"id": one, "type": "function", "function": {"name": "weather", "arguments": text}}
             for one, text in given]
    history = [{"role": "assistant", "content": "hello"}, SYSTEM,
        {"role": "developer", "content": [{"type": "text", "text": "d"}]},
        {"role": "user", "content": [{"type": "text", "text": "look"}, image]},
        {"role": "user", "content": ""}, USER,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "same", "content": [{"type": "text", "text": "first"}]},
        {"role": "tool", "tool_call_id": "", "content": ""},
        {"role": "tool", "tool_call_id": "stranger", "content": "lost"},
        {"role": "tool", "tool_call_id": "other", "content": [{"type": "text", "text": "astray"}]},
        {"role": "tool", "tool_call_id": "long" * 20, "content": "long one"},
        {"role": "user", "content": " \n"}, {"role": "assistant", "content": None},
        {"role": "assistant", "content": "so"}]
    before = copy.deepcopy((history, TOOLS))
    with faked(name) as (vendor, provider):
        assert provider.chat(history, TOOLS, "m-1").text == "ok"
        assert provider.chat(history, None, "m-1").text == "ok" and not vendor.refusals
    assert (history, TOOLS) == before
    text = json.dumps(vendor.bodies[0])
    for one in ("hello", "be brief", "look", "iVBORw0KGgo=", "first", "no result", "lost", "astray",
                "so"):
        assert one in text


CHOICES = ["auto", "none", "required", {"type": "function", "function": {"name": "time"}}]
FORMATS = [{"type": "text"}, {"type": "json_object"},
           {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY}}]


@pytest.mark.parametrize("name", VENDORS)
def test_every_option_is_accepted_by_the_vendor_or_refused_here(name: str) -> None:
    forms = {"stop": ["END", ["a", "b"]], "max_completion_tokens": [50], "tool_choice": CHOICES,
             "response_format": FORMATS, "reasoning_effort": ["none", "minimal", "xhigh", "max"]}
    varied: list[dict[str, Any]] = [{option: form} for option in forms for form in forms[option]]
    varied.append({one: PORTABLE[one] for one in PORTABLE if one not in (*forms, "extra_body")})
    varied.append({"tool_choice": "none", "parallel_tool_calls": False})
    unable, before = [], copy.deepcopy(varied)
    with faked(name) as (vendor, provider):
        for options in varied:
            try:
                assert provider.chat("in json", TOOLS, "m-1", **options).text == "ok"
            except UnsupportedRequest:
                unable += list(options)
        assert len(vendor.requests) == len(varied) - len(unable) and not vendor.refusals
    assert varied == before
    assert unable == {"ollama": ["tool_choice"] * 2, "responses": ["stop"] * 2}.get(name, [])


class Word(str, Enum):
    JSON, LOW = "json_object", "low"


@pytest.mark.parametrize("name", ["chat", *(name for name in VENDORS if name != "openai")])
def test_what_stands_for_a_plain_value_is_sent_as_it(name: str) -> None:
    """Members of an Enum, mappings, a stop of nothing, a refusal, data that is not base64."""
    function = {"name": "f", "parameters": MappingProxyType(CITY)}
    odd = [MappingProxyType({"type": "function", "function": MappingProxyType(function)})]
    picture = {"type": "image_url", "image_url": {"url": "data:image/png,%89PNG"}}
    refused = {"role": "assistant", "content": None, "refusal": "never"}
    said, form = [USER, refused, {"role": "user", "content": [picture]}], {"type": "json_object"}
    settings = {"response_format": {"type": Word.JSON}, "reasoning_effort": Word.LOW, "stop": []}
    body = sent(name, said, odd, **settings)
    assert body == sent(name, said, [NEEDY], response_format=form, reasoning_effort="low")
    text = json.dumps(body)
    assert "never" in text and ("iVBORw==" in text or "%89PNG" in text)


def test_files_keep_their_names_and_may_be_given_by_an_address() -> None:
    """OpenAI tells the kind of a file by the end of its name."""
    def content(kind: str, **file: Any) -> Any:
        said = [{"role": "user", "content": [{"type": "file", "file": file}]}]
        body = sent(kind, said)
        return (body.get("messages") or body["input"])[0]["content"][0]
    for file, name in (({"filename": "a.csv"}, "a.csv"), ({"filename": "a"}, "a.pdf"),
                       ({}, "file.pdf")):
        found = content("responses", file_data="data:application/pdf;base64,QQ==", **file)
        assert (found["type"], found["filename"]) == ("input_file", name)
    address = "https://h/a.pdf"
    found = content("responses", file_data=address)
    assert found == {"type": "input_file", "file_url": address}
    source = {"type": "url", "url": address}
    assert content("anthropic", file_data=address) == {"type": "document", "source": source}


@pytest.mark.parametrize("between", [USER, {"role": "system", "content": "Be quick."},
                                     {"role": "assistant", "content": "One moment."}])
def test_a_result_that_comes_late_belongs_to_its_call(between: Any) -> None:
    """A person may write while the tool runs."""
    said = [*with_call(), between, {"role": "tool", "tool_call_id": "a", "content": "42"}]
    turns = sent("chat", said, TOOLS)["messages"]
    assert [one["role"] for one in turns] == ["user", "assistant", "tool", between["role"]]
    assert turns[2]["content"] == "42"


PDF, PLAIN, ZIP = (
    {"type": "file", "file": {"filename": "f", "file_data": f"data:{media};base64,QQ=="}}
    for media in ("application/pdf", "text/plain", "application/zip"))
PHOTO = {"type": "image_url", "image_url": {"url": "data:image/svg+xml;base64,QQ=="}}
SOUND = {"type": "input_audio", "input_audio": {"data": "QQ==", "format": "wav"}}
CUSTOM = {"type": "custom", "custom": {"name": "x"}}


@pytest.mark.parametrize(("name", "part", "able"),
    [*((name, CUSTOM, False) for name in VENDORS if name != "openai"),
        ("anthropic", ZIP, False), ("anthropic", PHOTO, False),
        *((name, part, name != "ollama") for name in VENDORS for part in (PDF, PLAIN)),
        *((name, SOUND, name == "openai") for name in VENDORS)])
def test_what_a_vendor_cannot_express_is_unsupported_and_not_sent(name: str, part: Any,
        able: bool) -> None:
    content = [{"type": "text", "text": "q"}, *([] if part is CUSTOM else [part])]
    messages, tools = [{"role": "user", "content": content}], [part] * (part is CUSTOM) or None
    with faked(name) as (vendor, provider):
        if able:
            assert provider.chat(messages, tools, "m-1").text == "ok"
        else:
            told = "Responses API" if name == "responses" else name
            error_of(UnsupportedRequest, provider.chat, messages, tools, "m-1", match=f"(?i){told}")
        assert (len(vendor.requests), vendor.refusals) == (able, [])


@pytest.mark.parametrize(("role", "part", "error", "told"), [
    ("user", {"type": "image_url", "image_url": {"url": ""}}, BadRequest, "no URL"),
    ("user", {"type": "image_url"}, BadRequest, "no URL"),
    ("user", {"type": "file", "file": {"file_id": "f"}}, UnsupportedRequest, "by its id"),
    ("user", {"type": "file", "file": {"file_data": "JVBERi0="}}, BadRequest, "no URL"),
    ("system", {"type": "image_url", "image_url": "data:image/png;base64,QQ=="},
        UnsupportedRequest, "only text")])
@pytest.mark.parametrize("name", ["anthropic", "gemini"])
def test_parts_without_an_address_or_in_the_wrong_place_are_not_sent(name: str, role: str,
        part: Any, error: Any, told: str) -> None:
    with faked(name) as (vendor, provider):
        with pytest.raises(error, match=told):
            provider.chat([{"role": role, "content": [part]}, USER], model="m-1")
        assert not vendor.requests


@pytest.mark.parametrize("name", ["anthropic", "gemini"])
def test_tool_names_are_made_valid_and_back(name: str) -> None:
    """Dots for Anthropic, a leading digit and too many letters for Gemini."""
    names = ["1st.tool", "a" * 64, "a" * 80 + "b", "a" * 80 + "c", "1st tool"]
    tools = [{"type": "function", "function": {"name": one, "parameters": CITY}} for one in names]
    def answer(body: Any) -> Reply:
        declared = body["tools"][0].get("functionDeclarations", body["tools"])
        return Reply(calls=[(one["name"], {"city": "x"}) for one in declared])
    choice = {"type": "function", "function": {"name": "1st.tool"}}
    with faked(name, answer) as (vendor, provider):
        response = provider.chat([USER], tools, "m-1", tool_choice=choice)
        assert [call.name for call in response.tool_calls] == names
        results = [{"role": "tool", "tool_call_id": call.id, "content": "x"}
                   for call in response.tool_calls]
        assert provider.chat([USER, response.message, *results], tools, "m-1").text == "ok"
        assert not vendor.refusals
