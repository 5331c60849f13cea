"""Whatever bytes come: only ProviderErrors go out, and an answer is the whole answer, however it was cut into pieces.

A small number of examples by default; ``make fuzz`` tries more than 50,000 (COPILOT_ROUTER_FUZZ=2500).
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import os
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from faults import DIALECTS, Dialect
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from requests.structures import CaseInsensitiveDict

from copilot_router import LLMResponse, ProviderError, _Limits

KEY = "sk-test-fuzz-key-2468013579"
PROMPT = "the secret question of the fuzzing test"

#: Examples of each test for each wire format.
EXAMPLES = int(os.environ.get("COPILOT_ROUTER_FUZZ", "60"))
settings.register_profile("small", max_examples=EXAMPLES, derandomize=True, database=None)
settings.register_profile("full", max_examples=EXAMPLES, print_blob=True)
fuzz = settings(
    settings.get_profile("small" if EXAMPLES <= 60 else "full"),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
every_dialect = pytest.mark.parametrize("dialect", [kind() for kind in DIALECTS], ids=lambda dialect: dialect.name)
tried = 0  #: answers read so far


@pytest.fixture(scope="module", autouse=True)
def _figures() -> Iterator[None]:
    """Says how much was tried, for ``pytest -s``."""
    yield
    print(f"\n{tried} bodies and streams were read")


# -- the one place that knows the module's inside


class Canned:
    """An HTTP answer without HTTP: these chunks, then the end."""

    def __init__(self, chunks: list[bytes], kind: str, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self.headers = CaseInsensitiveDict({"Content-Type": kind, **headers})
        self.limits = _Limits(60.0, 60.0, 60.0, 60.0, (60.0, 60.0))
        self._chunks = chunks

    def chunks(self) -> Iterator[bytes]:
        yield from self._chunks

    def body(self) -> bytes:
        return b"".join(self._chunks)

    def finish(self) -> None:
        pass


@functools.cache
def client(dialect: Dialect) -> Any:
    return dialect.client(KEY, "http://127.0.0.1:9/v1")


def read(
    dialect: Dialect, chunks: list[bytes], kind: str = "", status: int = 200, headers: dict[str, str] | None = None
) -> tuple[str, LLMResponse]:
    """The text that was streamed and the answer; raises what the provider would raise."""
    global tried
    tried += 1
    provider = client(dialect)
    call = provider._checked_call(PROMPT, None, "m", {})
    decoder = provider._prepare(call, True)[2]
    answer = Canned(chunks, kind or dialect.stream_type, status, headers or {})
    if not 200 <= status < 300:
        raise provider._failure(answer, answer.body(), call)[0]
    events = provider._read(answer, call, decoder, True)
    deltas: list[str] = []
    while True:
        try:
            deltas.append(next(events))
        except StopIteration as end:
            return "".join(deltas), end.value


# -- what is made of it


def outcome(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """The answer or the error as plain data, checked for what holds for all of them."""
    try:
        told, response = read(*args, **kwargs)
    except ProviderError as error:
        for shown in (str(error), repr(error)):
            assert len(shown) < 700
            assert KEY not in shown
            assert PROMPT not in shown
        assert error.retry_after is None or 0 <= error.retry_after < math.inf
        assert type(pickle.loads(pickle.dumps(error))) is type(error)
        return type(error).__name__, str(error), error.status, error.code, error.retry_after
    assert response.content is None or (isinstance(response.content, str) and response.content.startswith(told))
    assert response.tool_calls or response.text.strip()
    assert response.finish_reason in ("stop", "length", "tool_calls", "content_filter")
    assert all(isinstance(call.name, str) and call.name and isinstance(call.id, str) for call in response.tool_calls)
    assert all(call.arguments is None or isinstance(call.arguments, dict) for call in response.tool_calls)
    assert all(isinstance(number, int) and number >= 0 for number in vars(response.usage).values())
    assert isinstance(response.model, str)
    json.dumps(response.to_dict())
    json.dumps(response.message)
    return ("ok", response.content, [(call.name, call.arguments, call.raw_arguments) for call in response.tool_calls],
            response.finish_reason, response.usage, response.model, response.reasoning)  # fmt: skip


class Story(NamedTuple):
    """A healthy answer."""

    texts: list[str]
    calls: list[tuple[str, dict[str, Any]]]

    def items(self, dialect: Dialect) -> list[Any]:
        """As events."""
        called = [item for at, (name, arguments) in enumerate(self.calls)
                  for item in dialect.call(at + 1, name, json.dumps(arguments))]  # fmt: skip
        told = [*dialect.texts(self.texts), *dialect.texts_end(self.texts)]
        return [*dialect.opening(), *told, *called, *dialect.closing(bool(called))]

    def stream(self, dialect: Dialect) -> bytes:
        return dialect.frames(self.items(dialect)) + dialect.end


scalars = st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5)
arguments = st.dictionaries(st.text(max_size=5), scalars, max_size=3)
stories = st.builds(
    Story,
    st.lists(st.text(min_size=1, max_size=8), max_size=5).map(lambda texts: ["Answer:", *texts]),
    st.lists(st.tuples(st.sampled_from(["look", "buy"]), arguments), max_size=2),
)
cuts = st.lists(st.integers(0, 5000), max_size=12)


def pieces(data: bytes, at: list[int]) -> list[bytes]:
    """The data, cut at these places."""
    edges = sorted({place % (len(data) + 1) for place in at} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


# -- what is healthy stays the same


@every_dialect
@fuzz
@given(story=stories, at=cuts)
def test_an_answer_is_the_same_for_every_chunking(dialect: Dialect, story: Story, at: list[int]) -> None:
    """The text and the calls that were sent, and the same bytes one by one."""
    data = story.stream(dialect)
    whole = outcome(dialect, [data])
    assert whole[:4] == ("ok", "".join(story.texts), whole[2], "tool_calls" if story.calls else "stop")
    assert [call[:2] for call in whole[2]] == story.calls
    assert outcome(dialect, pieces(data, at)) == whole
    assert outcome(dialect, [bytes([byte]) for byte in data]) == whole
    windows = data.replace(b"\n", b"\r\n")
    assert outcome(dialect, pieces(windows, at)) == whole


def with_unknown_fields(value: Any, junk: Any) -> Any:
    """A field that nobody knows, in every object that is not the model's own."""
    if isinstance(value, list):
        return [with_unknown_fields(item, junk) for item in value]
    if not isinstance(value, dict):
        return value
    known = {name: item if name in ("args", "arguments") else with_unknown_fields(item, junk) for name, item in value.items()}
    return {"x_new_in_2031": junk, **known, "x-later": junk}


@every_dialect
@fuzz
@given(story=stories, junk=st.recursive(scalars, lambda inner: st.lists(inner, max_size=2), max_leaves=4), at=cuts)
def test_unknown_fields_and_keep_alives_change_nothing(dialect: Dialect, story: Story, junk: Any, at: list[int]) -> None:
    """Vendors add fields, and gateways keep-alives, as they please."""
    items = story.items(dialect)
    more = [dialect.frame(with_unknown_fields(item, junk)) for item in items]
    for place in at:
        more.insert(place % (len(more) + 1), dialect.keep_alive)
    plain = outcome(dialect, [story.stream(dialect)])
    assert outcome(dialect, [*more, dialect.end]) == plain


@every_dialect
@fuzz
@given(story=stories, at=st.integers(0, 10_000), as_document=st.booleans())
def test_a_truncated_answer_is_no_answer(dialect: Dialect, story: Story, at: int, as_document: bool) -> None:
    """Cut anywhere: an error, or, when only what comes after the finish reason is missing, all of the answer."""
    if as_document:
        data = json.dumps(dialect.document("".join(story.texts))).encode()
        assert outcome(dialect, [data], "application/json")[:2] == ("ok", "".join(story.texts))
        assert outcome(dialect, [data[: at % len(data)]], "application/json")[0] != "ok"
        return
    data = story.stream(dialect)
    whole = outcome(dialect, [data])
    cut = outcome(dialect, [data[: at % len(data)]])
    assert cut[0] == "InvalidResponse" or cut[:4] == whole[:4]
    end = len(dialect.frames(dialect.closing(bool(story.calls))) + dialect.end)
    if at % len(data) <= len(data) - end:
        assert cut[0] == "InvalidResponse"


# -- what is not healthy is an error, or an answer, but nothing else

WORDS = """error stop tool_calls content_filter refusal [DONE] message_stop overloaded_error insufficient_quota UNAVAILABLE
    STOP SAFETY completed failed incomplete 429 26s 1e999 <think> </think> text thinking tool_use input_json_delta
    response.output_text.delta response.completed context_length_exceeded rate_limit_exceeded n_keep"""
FIELDS = """error message code type status param detail details metadata innererror choices delta content tool_calls function
    arguments name id index finish_reason usage model reason retryDelay violations quotaId text role refusal reasoning
    candidates parts object done done_reason output response item summary content_block stop_reason input thinking
    functionCall args finishReason usageMetadata promptFeedback thought thoughtSignature incomplete_details"""
words = [*WORDS.split(), "\u00b2", "\ud83d", "\u2028", "9" * 30, KEY, PROMPT, f"Bearer {KEY}", "try again in 5m"]
fields = FIELDS.split()
leaves = (
    st.none() | st.booleans() | st.integers(-3, 600) | st.sampled_from([10**30, -1, 0.5, 1e308, math.nan, "", " "])
    | st.sampled_from(words) | st.text(max_size=6)
)  # fmt: skip
junk_values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(fields), inner, max_size=4),
    max_leaves=8,
)
edits = st.lists(
    st.tuples(st.sampled_from(["replace", "remove", "repeat", "swap", "insert"]), st.integers(0, 10_000), junk_values),
    min_size=1, max_size=3,
)  # fmt: skip
bytes_edits = st.lists(
    st.tuples(st.integers(0, 10_000), st.integers(0, 3), st.sampled_from([
        b"", b"\xff", b"\r", b"\n", b"\n\n", b"\x00", b'"', b"}", b"{", b"]", b"data:", b"event: error\n", b"error:", b": x\n",
        b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"[" * 3000, b"9" * 5000, b"data: [DONE]\n\n", b"\\ud800", b"NaN", b"null",
    ])),
    max_size=3,
)  # fmt: skip


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything inside."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*above, key)
        yield from places(item, (*above, key))


def edited(value: Any, changes: list[tuple[str, int, Any]]) -> Any:
    """A copy in which something was replaced, removed, repeated, moved or put in."""
    value = copy.deepcopy(value)
    for how, number, junk in changes:
        paths = list(places(value))
        if not paths:
            break
        *above, key = paths[number % len(paths)]
        parent = functools.reduce(lambda inner, step: inner[step], above, value)
        if how == "replace":
            parent[key] = junk
        elif how == "remove":
            del parent[key]
        elif isinstance(parent, list) and how == "repeat":
            parent.insert(key, copy.deepcopy(parent[key]))
        elif isinstance(parent, list) and how == "swap":
            parent[key], parent[0] = parent[0], parent[key]
        elif isinstance(parent, list):
            parent.insert(key, junk)
        else:
            parent[fields[number % len(fields)]] = junk
    return value


def overwritten(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    """The bytes with some others put in, or in place of some."""
    for place, gone, new in changes:
        at = place % (len(data) + 1)
        data = data[:at] + new + data[at + gone :]
    return data


@every_dialect
@fuzz
@given(story=stories, changes=edits, more=bytes_edits, at=cuts)
def test_a_mutated_stream(
    dialect: Dialect, story: Story, changes: list[tuple[str, int, Any]], more: list[tuple[int, int, bytes]], at: list[int]
) -> None:
    """Events with wrong types, lost, doubled, in another order, and bytes that do not belong there."""
    data = dialect.frames(edited(story.items(dialect), changes)) + dialect.end
    data = overwritten(data, more)
    assert outcome(dialect, pieces(data, at)) == outcome(dialect, [data])


@every_dialect
@fuzz
@given(text=st.text(max_size=8), changes=edits, more=bytes_edits, at=cuts)
def test_a_mutated_document(
    dialect: Dialect, text: str, changes: list[tuple[str, int, Any]], more: list[tuple[int, int, bytes]], at: list[int]
) -> None:
    """The same for whole JSON answers."""
    data = json.dumps(edited([dialect.document("Answer: " + text)], changes)[:1]).encode()
    data = overwritten(data[1:-1], more)
    assert outcome(dialect, pieces(data, at), "application/json") == outcome(dialect, [data], "application/json")


KINDS = ["application/json", "text/plain", "text/html", "text/event-stream", "application/x-ndjson"]


@every_dialect
@fuzz
@given(
    body=junk_values | st.fixed_dictionaries({"error": junk_values}) | st.binary(max_size=20),
    status=st.sampled_from([200, 300, 301, 304, 307, 400, 401, 402, 403, 404, 405, 408, 409, 410, 413, 422, 425, 429, 498, 499,
                            500, 501, 502, 503, 504, 520, 529, 600, 999]),
    kind=st.sampled_from([*KINDS, "", KEY]),
    headers=st.dictionaries(
        st.sampled_from(["Retry-After", "retry-after-ms", "x-ratelimit-reset-tokens", "x-ratelimit-remaining-tokens",
                         "anthropic-ratelimit-requests-reset", "x-request-id", "x-should-retry"]),
        st.sampled_from(["0", "5", "-5", "nan", "inf", "1e400", "5 s", "", "\xb2", "1h2m3s", "9" * 400 + "s", "GMT",
                         "Thu, 01 Jan 99999 00:00:00 GMT", "Thu, 31 Feb 2030 00:00:00 GMT", "2030-02-31T00:00:00Z",
                         "9999-12-31T23:59:59-23:59", "2031-01-01T00:00:00", "0001-01-01T00:00:00+14:00"])
        | st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=12),
        max_size=3,
    ),
)  # fmt: skip
def test_a_refusal_in_any_form(dialect: Dialect, body: Any, status: int, kind: str, headers: dict[str, str]) -> None:
    """Any status, any body, any header: an error of a class that is known, with a hint that makes sense."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    seen = outcome(dialect, [data], kind, status, headers)
    assert seen[0] != "ok" or status == 200
    assert seen[0] == "ok" or seen[2] is None or seen[2] == status


ODD: list[Any] = [
    None, True, 0, -1, 7, 10**30, 0.5, "", " ", "x", "error", KEY, [], [1], ["x"], [None], [[]], [{}], {}, {"a": 1},
]  # fmt: skip


@every_dialect
def test_every_single_change(dialect: Dialect) -> None:
    """Each part of a stream and of a document replaced by everything odd, removed, doubled: errors, answers, no accident."""
    seen: set[str] = set()
    items = Story(["Answer:", " yes"], [("look", {"at": 1})]).items(dialect)
    document = [dialect.document("Answer: yes")]
    for value, whole in ((items, False), (document, True)):
        for number in range(len(list(places(value)))):
            changes = [("replace", number, odd) for odd in ODD] + [(how, number, None) for how in ("remove", "repeat")]
            for change in changes:
                changed = edited(value, [change])
                data = json.dumps(changed[0] if changed else []).encode() if whole else dialect.frames(changed) + dialect.end
                seen.add(outcome(dialect, [data], "application/json" if whole else "")[0])
    assert {"ok", "InvalidResponse"} <= seen
