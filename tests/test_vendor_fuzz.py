"""Every vendor's decoder and classifier, fed with damaged answers.

Each case is made from a number, which a failure names. COPILOT_ROUTER_FUZZ sets how many cases each test runs.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import pytest
from dialects import DIALECTS, Answer, Dialect

from copilot_router import InvalidResponse, LLMResponse, ProviderError, Usage, _Limits

KEY = "sk-test-contract-key-1234567890"
CASES = range(int(os.environ.get("COPILOT_ROUTER_FUZZ", "150")))
Random = random.Random

#: Values that no field should hold, and some that look as if it could.
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 10**30, 0.5, -1e308, "", " ", "x", "stop", "error", "SAFETY", "1", "\ud800", "\u2028",
    "<think>", [], [None], [[]], ["x"], {}, {"": None}, {"type": 3}, [{}], [{"type": None}], {"error": {}}, {"message": "x"},
    "{", "[DONE]",
)  # fmt: skip
WORDS = ("alpha ", "beta", "γάμμα ", "\n", "世界", "\U0001f600", "<", "think>", "{\"a\":", "\u2028", "data: ", "</think>")


class Body:
    """An answer whose bytes are given: what the reader asks of an HTTP answer, without HTTP."""

    def __init__(self, kind: str, pieces: Iterable[bytes], status: int = 200, headers: dict[str, str] | None = None,
                 breaks: bool = False) -> None:  # fmt: skip
        self.status = status
        self.headers = {"Content-Type": kind, **(headers or {})}
        self.limits = _Limits(math.inf, math.inf, math.inf, math.inf, (math.inf, math.inf))
        self._pieces = pieces
        self._breaks = breaks

    def chunks(self) -> Iterator[bytes]:
        yield from self._pieces
        if self._breaks:
            raise InvalidResponse("truncated: the connection broke")

    def body(self) -> bytes:
        return b"".join(self.chunks())

    def finish(self) -> None:
        pass


@pytest.fixture(params=DIALECTS, ids=repr)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    found: Dialect = request.param
    return found


@cache
def provider(dialect: Dialect) -> Any:
    return dialect.make("http://127.0.0.1:9/v1", KEY)


def read(dialect: Dialect, body: Body) -> tuple[str, LLMResponse]:
    """The deltas joined, and the response, read by the provider itself."""
    client = provider(dialect)
    call = client._checked_call("hi", None, "m", {})
    stream = client._read(body, call, client._prepare(call, True)[2], True)
    deltas = []
    while True:
        try:
            deltas.append(next(stream))
        except StopIteration as end:
            return "".join(deltas), end.value


def outcome(dialect: Dialect, pieces: Iterable[bytes], kind: str | None = None, breaks: bool = False) -> Any:
    """What comes of a body: all that a response says, or the class of the error. Anything but a ProviderError escapes."""
    try:
        deltas, response = read(dialect, Body(kind or dialect.stream_kind, pieces, breaks=breaks))
    except ProviderError as error:
        return type(error)
    sound(deltas, response)
    return response


def sound(deltas: str, response: LLMResponse) -> None:
    """A response keeps its own promises, whatever it was made of."""
    assert response.content is None or (isinstance(response.content, str) and response.content)
    assert deltas == (response.content or "")
    assert response.text.strip() or response.tool_calls
    assert response.reasoning is None or isinstance(response.reasoning, str)
    assert response.finish_reason in ("stop", "length", "tool_calls", "content_filter")
    assert isinstance(response.model, str)
    for count in (getattr(response.usage, name) for name in Usage.__dataclass_fields__):
        assert type(count) is int
        assert count >= 0
    for call in response.tool_calls:
        assert isinstance(call.name, str)
        assert call.name
        assert isinstance(call.id, str)
        assert call.id
        assert call.arguments is None or isinstance(call.arguments, dict)
        assert isinstance(call.raw_arguments, str)
    json.dumps(response.message)
    assert pickle.loads(pickle.dumps(response)) == response


def an_answer(rng: Random) -> Answer:
    def words(most: int) -> tuple[str, ...]:
        return tuple(rng.choice(WORDS) for _ in range(rng.randrange(most)))

    def arguments() -> dict[str, Any]:
        return {"a": rng.choice(ODD), "b": "".join(words(4))} if rng.random() < 0.8 else {}

    calls = tuple((rng.choice(("f", "get_weather")), arguments()) for _ in range(rng.randrange(3)))
    counts = [rng.randrange(300) for _ in range(5)]
    usage = Usage(counts[0] + counts[2] + counts[3], counts[1] + counts[4], *counts[2:])
    finish = rng.choice(("stop", "stop", "length", "content_filter"))
    text = words(6)
    text += ("</think>", "end") if "".join(text).lstrip().startswith("<think>") else ("end",)
    return Answer(text, words(4), calls, "tool_calls" if calls and finish == "stop" else finish, usage)


def decoded(event: bytes) -> tuple[bytes, Any, bytes]:
    """An event as what stands before its JSON, the JSON (None: it is not JSON), and what stands after it."""
    start, end = event.find(b"{"), event.rfind(b"}") + 1
    try:
        return event[:start], json.loads(event[start:end]), event[end:]
    except ValueError:
        return event, None, b""


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a JSON value that can be written to."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    for key, item in items:
        yield value, key
        yield from places(item)


def damage(rng: Random, value: Any) -> Any:
    """JSON with one to three places changed: a value replaced, removed, doubled, or moved to another place."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        found = list(places(value))
        if not found:
            return rng.choice(ODD)
        where, key = rng.choice(found)
        kind = rng.randrange(6)
        if kind == 0:
            del where[key]
        elif kind == 1 and isinstance(where, list):
            where.insert(rng.randint(0, len(where)), where[key])
        elif kind == 2:
            other, name = rng.choice(found)
            if name in other if isinstance(other, dict) else name < len(other):
                where[key] = json.loads(json.dumps(other[name]))
        else:
            where[key] = json.loads(json.dumps(rng.choice(ODD)))
    return value


def damaged(rng: Random, events: list[bytes]) -> list[bytes]:
    """A stream with something wrong: in the JSON, in the bytes, or in the order of its events."""
    events = list(events)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(events)) if events else 0
        kind = rng.randrange(8)
        if not events:
            return [b""]
        if kind < 4:
            before, body, after = decoded(events[at])
            events[at] = before + (json.dumps(damage(rng, body)).encode() if body is not None else b"") + after
        elif kind == 4:
            raw = bytearray(events[at])
            for _ in range(rng.randint(1, 4)):
                raw[rng.randrange(len(raw))] = rng.choice(b"\x00\n\r\"{}[]:,\xff\x80 a0")
            events[at] = bytes(raw)
        elif kind == 5:
            del events[at]
        elif kind == 6:
            events.insert(rng.randint(0, len(events)), events[at])
        else:
            rng.shuffle(events)
    return events


def cut_up(rng: Random, data: bytes) -> list[bytes]:
    """The same bytes in other pieces."""
    if rng.random() < 0.2:
        return [data[at : at + 1] for at in range(len(data))]
    cuts = sorted(rng.randint(0, len(data)) for _ in range(rng.randint(1, 12)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def noise(dialect: Dialect, rng: Random) -> bytes:
    """A keep-alive, or an event that nobody knows yet."""
    if dialect.name == "ollama":
        return rng.choice([b"\n", b"  \n", b"\r\n"])
    kinds = [b": keep-alive\n\n", b":\n", b"\n", b"retry: 10\n\n", b"id: 7\n\n", b"event: ping\n\n", b": PROCESSING\r\n\r\n"]
    if dialect.name in ("responses", "anthropic"):
        kinds.append(b'event: response.new\ndata: {"type": "response.new", "delta": "no", "index": 0}\n\n')
    return rng.choice(kinds)


def enriched(rng: Random, value: Any) -> Any:
    """JSON with fields that nobody knows, everywhere but in what a tool is called with."""
    if isinstance(value, list):
        return [enriched(rng, item) for item in value]
    if not isinstance(value, dict):
        return value
    own = {name: item if name in ("args", "input", "arguments") else enriched(rng, item) for name, item in value.items()}
    new = {f"x_{rng.randrange(99)}": json.loads(json.dumps(rng.choice(ODD))) for _ in range(rng.randrange(3))}
    return {**new, **own} if rng.random() < 0.5 else {**own, **new}


def every_case(dialect: Dialect, check: Callable[[Random, Answer, list[bytes]], None]) -> None:
    for case in CASES:
        rng = Random(f"{dialect.name} {case}")
        answer = an_answer(rng)
        try:
            check(rng, answer, dialect.events(answer))
        except Exception as error:
            raise AssertionError(f"case {case} of {dialect.name}") from error


def test_a_sound_stream_says_what_was_meant(dialect: Dialect) -> None:
    """Text, reasoning and calls of random answers come out as they went in, in any pieces: the cases are no junk."""

    def check(rng: Random, answer: Answer, events: list[bytes]) -> None:
        response = outcome(dialect, cut_up(rng, b"".join(events)))
        whole = outcome(dialect, [json.dumps(dialect.body(answer)).encode()], "application/json")
        for found in (response, whole):
            assert [(call.name, call.arguments) for call in found.tool_calls] == list(answer.calls)
            if not answer.whole.lstrip().startswith("<"):
                assert (found.content, found.reasoning) == (answer.whole, "".join(answer.reasoning).strip() or None)
        assert (response.content, response.reasoning, response.finish_reason, response.usage) == (
            whole.content, whole.reasoning, whole.finish_reason, whole.usage,
        )  # fmt: skip

    every_case(dialect, check)


def test_every_piece_is_a_sign_of_life(dialect: Dialect) -> None:
    """Each piece of thinking, of text and of a call's arguments puts the stall limit off; what carries nothing does not."""
    answer = Answer(("some ", "some "), ("so ",) * 4, (("weather", {"city": "x" * 60}),), "tool_calls", cuts=12)
    seen: list[tuple[bytes, bool]] = []

    def pieces() -> Iterator[bytes]:
        for piece in (dialect.idle, *dialect.events(answer)):
            body.limits.since = -1.0
            yield piece
            seen.append((piece, body.limits.since != -1.0))

    body = Body(dialect.stream_kind, pieces())
    read(dialect, body)
    assert seen[0] == (dialect.idle, False)
    marks = (b"so ", b"some ", b"xxx")
    carrying = [(piece, alive) for piece, alive in seen if any(mark in piece for mark in marks) and b".done" not in piece]
    assert len(carrying) >= 7
    assert not [piece for piece, alive in carrying if not alive]


def test_a_damaged_stream_raises_provider_errors_only(dialect: Dialect) -> None:
    """Nothing else comes out, and what is an answer all the same is a sound one; in other pieces it is the same."""

    def check(rng: Random, answer: Answer, events: list[bytes]) -> None:
        data = b"".join(damaged(rng, events))
        assert outcome(dialect, [data]) == outcome(dialect, cut_up(rng, data))

    every_case(dialect, check)


def test_a_damaged_body_raises_provider_errors_only(dialect: Dialect) -> None:
    """The same for whole JSON, damaged in its values and in its bytes."""

    def check(rng: Random, answer: Answer, events: list[bytes]) -> None:
        body = dialect.body(answer)
        outcome(dialect, [json.dumps(damage(rng, body)).encode()], "application/json")
        raw = bytearray(json.dumps(body).encode())
        raw[rng.randrange(len(raw))] = rng.randrange(256)
        outcome(dialect, [bytes(raw)], "application/json")
        assert outcome(dialect, [json.dumps(body).encode()[: -rng.randint(1, 30)]], "application/json") is InvalidResponse

    every_case(dialect, check)


def test_unknown_fields_and_keep_alives_change_nothing(dialect: Dialect) -> None:
    """Servers add fields and send signs of life: the answer is the same."""

    def check(rng: Random, answer: Answer, events: list[bytes]) -> None:
        padded = []
        for event in events:
            padded += [noise(dialect, rng) for _ in range(rng.randrange(3))]
            before, body, after = decoded(event)
            padded.append(event if body is None else before + json.dumps(enriched(rng, body)).encode() + after)
        plain, rich = (outcome(dialect, cut_up(rng, b"".join(each))) for each in (events, padded))
        for name in ("content", "reasoning", "tool_calls", "finish_reason", "usage", "model", "request_id"):
            assert getattr(plain, name) == getattr(rich, name)

    every_case(dialect, check)


def the_end(dialect: Dialect, events: list[bytes]) -> int:
    """How many bytes of a stream it takes until its finish reason has come in full."""
    signs = {"anthropic": b'"type": "message_delta"', "gemini": b'"finishReason"', "ollama": b'"done": true',
             "responses": b'"type": "response.completed"'}  # fmt: skip
    sign = signs.get(dialect.name)
    total = 0
    for event in events:
        ends = sign in event if sign else b'"finish_reason": "' in event
        if ends or b'"type": "response.incomplete"' in event:
            return total + event.rindex(b"}") + 1
        total += len(event)
    raise AssertionError("a stream without an end")


def test_a_truncated_stream_is_never_an_answer(dialect: Dialect) -> None:
    """Cut anywhere before the finish reason, by a clean end or a broken connection: InvalidResponse, at every byte."""

    def check(rng: Random, answer: Answer, events: list[bytes]) -> None:
        data = b"".join(events)
        end = the_end(dialect, events)
        full = outcome(dialect, [data])
        for place in {0, 1, end - 1, *(rng.randrange(end) for _ in range(3))}:
            assert outcome(dialect, cut_up(rng, data[:place]), breaks=rng.random() < 0.5) is InvalidResponse
        late = outcome(dialect, [data[: rng.randint(end, len(data))]])
        if late is not InvalidResponse:
            assert (late.content, late.tool_calls, late.finish_reason) == (full.content, full.tool_calls, full.finish_reason)

    every_case(dialect, check)


def test_damaged_failures_are_classified(dialect: Dialect) -> None:
    """Any body at any status, with any hint to wait: a ProviderError that shows no key and asks for a finite time."""
    hints = ("7", "-1", "nan", "inf", "1e9", "", "x", "Wed, 21 Oct 2026 07:28:00 GMT", "2026-10-21T07:28:00Z", "6m", "9" * 400)
    names = ("Retry-After", "retry-after-ms", "x-ratelimit-reset-tokens", "anthropic-ratelimit-requests-reset")
    client = provider(dialect)
    call = client._checked_call("hi", None, "m", {})

    def check(rng: Random, answer: Answer, events: list[bytes]) -> None:
        body = rng.choice(list(dialect.failures.values()))[2]
        data = json.dumps(damage(rng, body) if rng.random() < 0.9 else rng.choice(ODD)).encode()
        if rng.random() < 0.2:
            page = b"<html>" + KEY.encode()
            data = rng.choice([b"", page, b"\xff\xfe", KEY.encode(), b"[" * 100_000, data[: len(data) // 2]])
        kind = rng.choice(["application/json", "text/plain", "text/html", ""])
        headers = {rng.choice(names): rng.choice(hints) for _ in range(rng.randrange(3))}
        status = rng.choice([300, 307, 400, 401, 402, 403, 404, 408, 413, 422, 429, 498, 500, 502, 503, 529, 599])
        error, _ = client._failure(Body(kind, [], status, headers), data, call)
        assert isinstance(error, ProviderError)
        assert error.retry_after is None or 0 <= error.retry_after < math.inf
        assert KEY not in f"{error!r} {error} {error.args} {error.code}"
        assert str(error)
        assert type(pickle.loads(pickle.dumps(error))) is type(error)

    every_case(dialect, check)
