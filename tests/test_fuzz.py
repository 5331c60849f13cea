"""Whatever bytes come: an answer is the whole answer, or a ProviderError says why there is none.

COPILOT_ROUTER_FUZZ is the number of cases of each test for each wire format (60 by default). A case
is made from its number, which a failure names.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import requests
from support.dialects import Answer, Dialect
from support.server import Canned, drained

from copilot_router import InvalidResponse, LLMResponse, ProviderError, Usage

KEY = "sk-test-fuzz-key-2468013579"
PROMPT = "the secret question of the fuzzing test"
Random = random.Random

ODD: tuple[Any, ...] = (None, True, False, 0, -1, 10**30, 0.5, -1e308, "", " ", "x", "stop",
    "error", "SAFETY", "\ud800", "\u2028", "<think>", "</think>", [], [None], [[]], ["x"], {},
    {"": None}, [{}], {"error": {}}, {"message": "x"}, "{", "[DONE]", KEY, PROMPT, f"Bearer {KEY}",
    "try again in 5m", "9" * 30)
WORDS = ("alpha ", "beta", "γάμμα ", "\n", "世界", "\U0001f600", "<", "think>", '{"a":', "\u2028",
         "data: ", "</think>")
JUNK = (b"", b"\xff", b"\r", b"\n", b"\n\n", b"\x00", b'"', b"}", b"{", b"]", b"data:", b": x\n",
        b"event: error\n", b"error:", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"[" * 3000, b"9" * 5000,
        b"data: [DONE]\n\n", b"\\ud800", b"NaN", b"null")


@functools.cache
def provider(dialect: Dialect) -> tuple[Any, Canned]:
    session, canned = requests.Session(), Canned()
    session.mount("http://", canned)
    return dialect.make("http://127.0.0.1:9", KEY, session=session), canned


def outcome(dialect: Dialect, pieces: list[bytes], status: int = 200, **headers: str) -> Any:
    """The response, or the class of the error; any other exception escapes."""
    client, canned = provider(dialect)
    canned.pieces, canned.status = pieces, status
    canned.headers = {"Content-Type": dialect.stream_kind,
                      **{name.replace("_", "-"): value for name, value in headers.items()}}
    try:
        deltas, response = drained(client.stream(PROMPT, model="m", timeout=60))
    except ProviderError as error:
        for shown in (str(error), repr(error)):
            assert len(shown) < 700 and KEY not in shown
            assert PROMPT not in shown
            shown.encode()
        assert error.retry_after is None or 0 <= error.retry_after < math.inf
        assert type(pickle.loads(pickle.dumps(error))) is type(error)
        return type(error)
    sound("".join(deltas), response)
    return response


def sound(deltas: str, response: LLMResponse) -> None:
    """A response keeps its promises, whatever it was made of."""
    assert deltas == (response.content or "")
    assert response.text.strip() or response.tool_calls
    assert response.reasoning is None or isinstance(response.reasoning, str)
    assert isinstance(response.finish_reason, str)
    assert response.finish_reason not in ("", "null", "error", "abort", "cancelled", "timeout")
    assert isinstance(response.model, str)
    for name in Usage.__dataclass_fields__:
        count = getattr(response.usage, name)
        assert type(count) is int and count >= 0
    for call in response.tool_calls:
        assert isinstance(call.name, str) and call.name
        assert isinstance(call.id, str) and call.id
        assert call.arguments is None or isinstance(call.arguments, dict)
        assert isinstance(call.raw_arguments, str)
    assert len({call.id for call in response.tool_calls}) == len(response.tool_calls)
    json.dumps([response.message, response.to_dict()], allow_nan=False)
    calls = [(call.id, call.name, call.arguments) for call in response.tool_calls]
    shown = [response.content, response.reasoning, response.model, calls]
    json.dumps(shown, allow_nan=False, ensure_ascii=False).encode()
    assert pickle.loads(pickle.dumps(response)) == response


def an_answer(rng: Random) -> Answer:
    def words(most: int) -> tuple[str, ...]:
        return tuple(rng.choice(WORDS) for _ in range(rng.randrange(most)))
    calls = tuple((rng.choice(("f", "get_weather")), {"a": rng.choice(WORDS), "b": [rng.random()]}
                   if rng.random() < 0.8 else {}) for _ in range(rng.randrange(3)))
    counts = [rng.randrange(1, 300) for _ in range(5)]
    usage = Usage(counts[0] + counts[2] + counts[3], counts[1] + counts[4], *counts[2:])
    finish = rng.choice(("stop", "stop", "length", "content_filter"))
    finish = "tool_calls" if calls and finish == "stop" else finish
    if calls and finish != "tool_calls":  # an empty last call may have been cut
        calls = (*calls[:-1], (calls[-1][0], {"a": "x"}))
    text = ("Answer: ", *words(6), "end")
    return Answer(text, words(4), calls, finish, usage)


def every_case(dialect: Dialect, check: Callable[[Random, Answer, list[bytes]], None]) -> None:
    for case in range(int(os.environ.get("COPILOT_ROUTER_FUZZ", "60"))):
        rng = Random(f"{dialect.name} {case}")
        answer = an_answer(rng)
        try:
            check(rng, answer, dialect.events(answer))
        except Exception as error:
            raise AssertionError(f"case {case} of {dialect.name}") from error


def decoded(event: bytes) -> tuple[bytes, Any, bytes]:
    """An event as what stands before its JSON, the JSON or None, and what stands after it."""
    start, end = event.find(b"{"), event.rfind(b"}") + 1
    try:
        return event[:start], json.loads(event[start:end]), event[end:]
    except ValueError:
        return event, None, b""


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, (dict, list)):
            yield from places(item)


def damage(rng: Random, value: Any) -> Any:
    """One to three places changed: a value replaced, removed, doubled, or copied from elsewhere."""
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
        else:
            other, name = rng.choice(found)
            there = name in other if isinstance(other, dict) else name < len(other)
            new = other[name] if kind == 2 and there else rng.choice(ODD)
            where[key] = json.loads(json.dumps(new))
    return value


def overwritten(rng: Random, data: bytes) -> bytes:
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(data))
        data = data[:at] + rng.choice(JUNK) + data[at + rng.randrange(4):]
    return data


def damaged(rng: Random, events: list[bytes]) -> list[bytes]:
    """A stream with something wrong in its JSON, in its bytes, or in the order of its events."""
    events = list(events)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(events)) if events else 0
        kind = rng.randrange(8)
        if not events:
            return [b""]
        if kind < 4:
            before, body, after = decoded(events[at])
            changed = json.dumps(damage(rng, body)).encode() if body is not None else b""
            events[at] = before + changed + after
        elif kind == 4:
            events[at] = overwritten(rng, events[at])
        elif kind == 5:
            del events[at]
        elif kind == 6:
            events.insert(rng.randint(0, len(events)), events[at])
        else:
            rng.shuffle(events)
    return events


def cut_up(rng: Random, data: bytes) -> list[bytes]:
    if rng.random() < 0.2:
        return [data[at : at + 1] for at in range(len(data))]
    cuts = sorted(rng.randint(0, len(data)) for _ in range(rng.randint(1, 12)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def test_a_sound_stream_says_what_was_meant_in_any_pieces(dialect: Dialect) -> None:
    """So does whole JSON, and so do lines that end in CRLF."""
    def check(rng: Random, answer: Answer, events: list[bytes]) -> None:
        data = b"".join(events)
        whole = outcome(dialect, [json.dumps(dialect.body(answer)).encode()],
                        Content_Type="application/json")
        for wire in (data, data.replace(b"\n", b"\r\n") if b"\r" not in data else data):
            found = outcome(dialect, cut_up(rng, wire))
            for name in ("content", "reasoning", "finish_reason", "usage"):
                assert getattr(found, name) == getattr(whole, name)
        for one in (found, whole):
            assert one.content == answer.whole
            assert (one.reasoning or "") == "".join(answer.reasoning).strip()
            assert [(call.name, call.arguments) for call in one.tool_calls] == list(answer.calls)
    every_case(dialect, check)


def test_a_damaged_stream_is_the_same_in_any_pieces(dialect: Dialect) -> None:
    def check(rng: Random, answer: Answer, events: list[bytes]) -> None:
        data = b"".join(damaged(rng, events))
        assert outcome(dialect, [data]) == outcome(dialect, cut_up(rng, data))
    every_case(dialect, check)


def test_a_damaged_body_raises_provider_errors_only(dialect: Dialect) -> None:
    """One that is cut is never an answer."""
    def check(rng: Random, answer: Answer, events: list[bytes]) -> None:
        body = dialect.body(answer)
        data = json.dumps(body).encode()
        for wire in (json.dumps(damage(rng, body)).encode(), overwritten(rng, data)):
            outcome(dialect, [wire], Content_Type="application/json")
        cut = outcome(dialect, [data[: -rng.randint(1, 30)]], Content_Type="application/json")
        assert cut is InvalidResponse
    every_case(dialect, check)


def the_end(dialect: Dialect, events: list[bytes]) -> int:
    """How many bytes of a stream it takes until its finish reason has come in full."""
    at = next(at for at, event in enumerate(events) if dialect.ends in event)
    return sum(map(len, events[:at])) + events[at].rindex(b"}") + 1


def test_a_stream_that_is_cut_before_its_finish_reason_is_never_an_answer(dialect: Dialect) -> None:
    """Cut behind it, it is all of the answer or none."""
    def check(rng: Random, answer: Answer, events: list[bytes]) -> None:
        data, end = b"".join(events), the_end(dialect, events)
        full = outcome(dialect, [data])
        for place in {0, 1, end - 1, *(rng.randrange(end) for _ in range(4))}:
            assert outcome(dialect, cut_up(rng, data[:place])) is InvalidResponse
        late = outcome(dialect, [data[: rng.randint(end, len(data))]])
        if late is not InvalidResponse:
            for name in ("content", "tool_calls", "finish_reason"):
                assert getattr(late, name) == getattr(full, name)
    every_case(dialect, check)


STATUSES = (200, 300, 304, 307, 400, 401, 402, 403, 404, 408, 409, 413, 422, 425, 429, 498, 499,
            500, 502, 503, 504, 529, 599)
NAMES = ("Retry-After", "retry-after-ms", "x-ratelimit-reset-tokens", "x-request-id",
         "x-ratelimit-remaining-tokens", "anthropic-ratelimit-requests-reset")
HINTS = ("0", "5", "-5", "nan", "inf", "1e400", "5 s", "", "\xb2", "1h2m3s", "9" * 400 + "s", "GMT",
         "Thu, 01 Jan 99999 00:00:00 GMT", "Thu, 31 Feb 2030 00:00:00 GMT", "2030-02-31T00:00:00Z",
         "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+14:00", KEY)


def test_a_refusal_in_any_form_is_a_provider_error(dialect: Dialect) -> None:
    def check(rng: Random, answer: Answer, events: list[bytes]) -> None:
        _, _, body, _, _ = rng.choice(list(dialect.failures.values()))
        data = json.dumps(damage(rng, body) if rng.random() < 0.8 else rng.choice(ODD)).encode()
        data = overwritten(rng, data) if rng.random() < 0.3 else data
        headers = {name: rng.choice(HINTS) for name in rng.sample(NAMES, rng.randrange(3))}
        status = rng.choice(STATUSES)
        found = outcome(dialect, [data], status, **headers)
        assert isinstance(found, type) or status == 200
    every_case(dialect, check)
