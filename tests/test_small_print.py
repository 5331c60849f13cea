"""Details that no scenario needs and somebody will rely on: found by breaking the module one line at a time."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import socket
import sqlite3
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import responses
from clocks import FakeClock
from faults import Peer, chunked, event, peer
from stores import Wrapped

import copilot_router
from copilot_router import (
    AllProvidersFailed,
    AnthropicProvider,
    Attempt,
    AuthenticationError,
    BadRequest,
    BreakerRecord,
    CircuitBreaker,
    CircuitOpen,
    ConfigError,
    ContentFiltered,
    ContextLengthExceeded,
    DeadlineExceeded,
    EmptyResponse,
    EscalationFailed,
    FailoverChain,
    GeminiProvider,
    InvalidResponse,
    LLMProvider,
    LLMResponse,
    LMStudioProvider,
    MemoryStore,
    ModelNotFound,
    OllamaProvider,
    OpenAIProvider,
    Overloaded,
    ProviderError,
    ProviderTier,
    ProviderTimeout,
    ProviderUnavailable,
    QuotaExceeded,
    RateLimited,
    RedisStore,
    RouterError,
    ScriptedProvider,
    ServerError,
    SQLiteStore,
    StreamInterrupted,
    ToolCall,
    UnsupportedRequest,
    Usage,
    _Progress,
    _whole_characters,
    main,
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


FAILURE, NEUTRAL, PARK, LONG = "failure", "neutral", "park", "park long"
POLICY = {
    ProviderError: ("next", FAILURE), ProviderUnavailable: ("next", FAILURE), ServerError: ("again", FAILURE),
    Overloaded: ("again", FAILURE), ProviderTimeout: ("next", FAILURE), InvalidResponse: ("next", FAILURE),
    EmptyResponse: ("next", FAILURE), RateLimited: ("next", PARK), QuotaExceeded: ("next", LONG),
    AuthenticationError: ("next", LONG), ModelNotFound: ("next", NEUTRAL), ContextLengthExceeded: ("next", NEUTRAL),
    UnsupportedRequest: ("next", NEUTRAL), BadRequest: ("next", NEUTRAL), ContentFiltered: ("raise", NEUTRAL),
}  # fmt: skip


@pytest.mark.parametrize("kind", POLICY)
def test_the_policy_stands_in_the_class(kind: type[ProviderError]) -> None:
    """A subclass of a custom provider inherits these two words, and may read them."""
    assert (kind.then, kind.breaker) == POLICY[kind]


VENDORS = [(OpenAIProvider, "openai"), (LMStudioProvider, "lmstudio"), (OllamaProvider, "ollama"),
           (AnthropicProvider, "anthropic"), (GeminiProvider, "gemini")]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), VENDORS)
def test_an_error_names_its_vendor(mocked: Any, kind: Any, name: str) -> None:
    """Where no chain has put its tier's name there; with the vendor's hint when to come back."""
    mocked.post(re.compile("http://h/.*"), status=429, json={"error": {"message": "slow"}}, headers={"Retry-After": "7"})
    with pytest.raises(RateLimited) as caught:
        kind(KEY, "http://h").chat("hi", model="m")
    assert (caught.value.provider, caught.value.model, caught.value.retry_after) == (name, "m", 7)


def test_what_nobody_filled_in_is_empty() -> None:
    """A custom provider fills in what it knows."""
    assert StreamInterrupted().partial == ""
    empty = LLMResponse()
    assert (empty.content, empty.model, empty.provider, empty.finish_reason) == (None, "", "", "stop")
    assert (empty.tool_calls, empty.attempts, empty.usage) == ([], (), Usage(0, 0, 0, 0, 0))


# -- defaults


@pytest.mark.parametrize("kind", [OpenAIProvider, AnthropicProvider, GeminiProvider, LMStudioProvider, OllamaProvider])
def test_the_limits_of_a_provider(kind: type[LLMProvider]) -> None:
    """As documented: local servers may have to load a model first."""
    made: Any = kind(KEY)  # type: ignore[call-arg]
    local = kind in (LMStudioProvider, OllamaProvider)
    assert (made.first_token_timeout, made.stall_timeout, made.connect_timeout) == (60.0 if local else 12.0, 20.0, 5.0)
    assert (made.max_response_bytes, made.stream_upstream) == (32 * 1024 * 1024, True)


def test_the_limits_of_a_chain() -> None:
    """As documented."""
    chain = FailoverChain([ProviderTier("a", ScriptedProvider([]))])
    tier = chain.tiers[0]
    assert (chain.timeout, chain.wait, chain.max_retry_after) == (300.0, 0.0, 2.0)
    assert (tier.role, tier.timeout, tier.retries) == ("primary", None, 1)
    assert tier.supports_tools and tier.supports_images
    assert (tier.breaker.failure_threshold, tier.breaker.recovery_timeout) == (3, 15.0)


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
    shares_local_errors = False
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


def test_others_good_news_closes_no_breaker_that_is_open_for_itself(clock: FakeClock) -> None:
    """This machine cannot connect; that another one's trial went well says nothing about that."""
    store = SharedMemory()
    mine = CircuitBreaker(1, 100, store=store, name="b", clock=clock)
    other = CircuitBreaker(1, 5, store=store, name="b", clock=clock)
    mine.admit()._settle_by(ProviderUnavailable("refused"))
    assert (mine.state, other.state) == ("open", "closed")
    other.admit().failure()
    clock.advance(5)
    other.admit().success()
    clock.advance(2)
    assert (mine.state, other.state) == ("open", "closed")


def test_a_trial_that_is_given_back_is_no_new_opening(clock: FakeClock) -> None:
    """This machine could not even connect: the others count one opening, and the next trial is theirs at once."""
    store = SharedMemory(clock=clock)
    mine, other = (CircuitBreaker(1, store=store, name="b", clock=clock) for _ in range(2))
    other.admit().failure()
    clock.advance(15)
    mine.admit()._settle_by(ProviderUnavailable("refused"))
    record = store.load("b")[0]
    assert record is not None
    assert (record.state, record.opened) == ("open", 1)
    other.admit().success()


def test_a_store_that_goes_is_a_warning_and_one_that_returns_is_none(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Once each, at the level that an operator filters by."""
    caplog.set_level(logging.INFO, "copilot_router")
    store = Wrapped(SharedMemory())
    breaker = CircuitBreaker(store=store, name="b", clock=clock)
    store.error = OSError()
    for _ in range(2):
        breaker.admit().failure()
    store.error = None
    clock.advance(100)
    for _ in range(2):
        breaker.admit().neutral()
    told = [(record.levelname, record.getMessage()[:19]) for record in caplog.records if "store" in record.getMessage()]
    assert told == [("WARNING", "b: the store is dow"), ("INFO", "b: the store is bac")]


def test_a_file_of_another_version_says_so(tmp_path: Path) -> None:
    """Which one it is, and which one could be read."""
    path = tmp_path / "b.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(sqlite3.DatabaseError, match="is of version 7, this is version 1"):
        SQLiteStore(path).load("b")


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


def test_a_wait_for_a_tier_is_in_the_log(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    """A cron job that seems to hang says what it waits for, and how long."""
    caplog.set_level(logging.INFO, "copilot_router")
    tier = ProviderTier("a", ScriptedProvider([RateLimited(retry_after=30), "x"]))
    chain = FailoverChain([tier], clock=clock, sleep=clock.sleep)
    assert chain.chat("hi", wait=60).text == "x"
    assert "all tiers failed: waiting 30.0 s" in caplog.messages


def test_a_custom_provider_sees_plain_messages() -> None:
    """What an answer's message keeps for its own provider is left out for one that could not know it."""
    provider = ScriptedProvider(["x"])
    kept = {"role": "assistant", "content": "yes", "copilot_router": {"provider": "anthropic", "blocks": []}}
    user = {"role": "user", "content": "hi"}
    FailoverChain([ProviderTier("a", provider)]).chat([user, kept, user])
    assert provider.calls[0]["messages"] == [user, {"role": "assistant", "content": "yes"}, user]


def test_without_any_time_every_tier_is_named() -> None:
    """None is asked, and all are in the record, in order."""
    chain = FailoverChain([ProviderTier(name, ScriptedProvider([])) for name in "abc"])
    with pytest.raises(DeadlineExceeded) as caught:
        chain.chat("hi", timeout=0)
    assert [attempt.tier for attempt in caught.value.attempts] == ["a", "b", "c"]


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


# -- what people read


def test_a_refusal_says_why(clock: FakeClock) -> None:
    """The reason that was given, or what happened, in brackets; a store's record may have none."""
    breaker = CircuitBreaker(1, name="b", clock=clock)
    breaker.admit().failure()
    assert breaker.snapshot().reason == "failed"
    with pytest.raises(CircuitOpen) as caught:
        breaker.admit()
    assert str(caught.value) == "b is open (failed)"
    parked = CircuitBreaker(name="p", clock=clock)
    parked.admit().park(5)
    assert parked.snapshot().reason == "parked"
    breaker.open(reason="maintenance")
    with pytest.raises(CircuitOpen) as caught:
        breaker.admit()
    assert str(caught.value) == "b is open until reset (maintenance)"
    store = MemoryStore()
    store.swap("c", None, BreakerRecord(state="open", deadline=math.inf, generation=1))
    with pytest.raises(CircuitOpen) as caught:
        CircuitBreaker(name="c", store=store, clock=clock).admit()
    assert str(caught.value) == "c is open until reset"


def test_a_reason_is_clipped_where_all_tiers_share_a_line() -> None:
    """explain() gives each step its error's first 80 characters."""
    error = ServerError("x" * 200)
    tier = ProviderTier("a", ScriptedProvider([error]), retries=0)
    with pytest.raises(AllProvidersFailed) as caught:
        FailoverChain([tier]).chat("hi")
    assert f"a: ServerError: {'x' * 67} " in caught.value.explain()


def test_a_tool_call_shows_no_arguments() -> None:
    """They are as private as an answer: neither form is in the repr."""
    call = ToolCall("1", "f", {"city": "Ulm"}, '{"city": "Ulm"}')
    assert repr(call) == "ToolCall(id='1', name='f')"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_progress_line_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread ends with the call, and what it wrote is cleared, in place."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = _Progress()
    with progress:
        assert progress._thread.is_alive()
        ending = threading.Thread(target=progress.stop, daemon=True)
        ending.start()
        ending.join(5)
        ended = not ending.is_alive()
        progress._over.set()
        progress._shown = True
    assert ended
    assert terminal.getvalue() == "\r\033[K"


def test_a_missing_key_is_warned_of_where_the_provider_is_built() -> None:
    """The warning points at the user's own line, and not into the module."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        AnthropicProvider()
    assert [warning.filename for warning in caught] == [__file__]


def test_a_warning_on_the_command_line_is_one_plain_line(mocked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Without file, line number and class."""
    answer = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}
    mocked.post("https://api.openai.com/v1/chat/completions", json=answer)
    assert main(["chat", "--provider", "openai", "--model", "m", "hi"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("copilot-router: ") and "OPENAI_API_KEY" in line


@pytest.mark.parametrize("more", [[], ["--no-stream"]])
def test_the_progress_line_ends_before_the_answer_begins(
    mocked: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    """Its thread writes to the same terminal."""
    shown: list[str] = []
    monkeypatch.setattr(_Progress, "stop", lambda self: shown.append(capsys.readouterr().out))
    mocked.post("http://h/v1/chat/completions", json={"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]})
    assert main(["chat", "--provider", "openai", "--base-url", "http://h/v1", "--model", "m", *more, "hi"]) == 0
    assert shown == ["", "x\n"]


# -- wire formats


@pytest.mark.parametrize("pair", ["\ud800\udc00", "\udbff\udfff", "\ud83d\ude00"])
def test_the_first_half_of_a_character_is_kept_for_the_second(pair: str) -> None:
    """From the first pair of surrogates to the last."""
    assert _whole_characters("x" + pair[0]) == ("x", pair[0])
    assert _whole_characters(pair) == (pair.encode("utf-16", "surrogatepass").decode("utf-16"), "")


def test_gemini_is_told_where_to_stop(mocked: Any) -> None:
    """stop is stopSequences, and absent without one."""
    answer = {"candidates": [{"content": {"parts": [{"text": "x"}]}, "finishReason": "STOP"}]}
    mocked.post(re.compile("http://h/.*"), json=answer)
    client = GeminiProvider(KEY, "http://h", stream_upstream=False)
    client.chat("hi", model="m", stop=["END"])
    client.chat("hi", model="m", seed=1)
    first, second = (json.loads(call.request.body)["generationConfig"] for call in mocked.calls)
    assert first["stopSequences"] == ["END"]
    assert second == {"seed": 1}


def test_ollamas_own_id_of_a_call_is_kept(mocked: Any) -> None:
    """Where it gives one; else one is made."""
    calls = [{"id": "call_of_its_own", "function": {"name": "f", "arguments": {}}}, {"function": {"name": "g"}}]
    mocked.post(re.compile("http://h/.*"), json={"model": "m", "message": {"tool_calls": calls}, "done": True})
    response = OllamaProvider(base_url="http://h", stream_upstream=False).chat("hi", model="m")
    assert response.tool_calls[0].id == "call_of_its_own"
    assert response.tool_calls[1].id not in ("", "call_of_its_own")


def test_anthropic_is_told_of_a_turn_without_text(mocked: Any) -> None:
    """It refuses an empty one, and a blank one."""
    answer = {"type": "message", "role": "assistant", "content": [{"type": "text", "text": "x"}], "stop_reason": "end_turn"}
    mocked.post("http://h/v1/messages", json=answer)
    turns = [{"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", " "), ("user", ""))]
    AnthropicProvider(KEY, "http://h").chat(turns, model="m")
    asked = json.loads(mocked.calls[0].request.body)["messages"]
    assert [(turn["role"], turn["content"]) for turn in asked[1:]] == [
        ("assistant", [{"type": "text", "text": "(empty)"}]),
        ("user", [{"type": "text", "text": "Continue."}]),
    ]


CALLED = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
        {"id": "call_2", "type": "function", "function": {"name": "f", "arguments": '{"a": 2}'}},
        {"id": "call_3", "type": "function", "function": {"name": "f", "arguments": ""}},
    ]},
    *({"role": "tool", "tool_call_id": f"call_{number}", "content": "done"} for number in (1, 2, 3)),
]  # fmt: skip


def test_arguments_of_earlier_calls_for_the_responses_api(mocked: Any) -> None:
    """As text, whether they came as text, as an object, or not at all."""
    message = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "x"}]}
    mocked.post("http://h/v1/responses", json={"status": "completed", "output": [message]})
    OpenAIProvider(KEY, "http://h", api="responses").chat(CALLED, model="m")
    asked = json.loads(mocked.calls[0].request.body)["input"]
    assert [item["arguments"] for item in asked if item.get("type") == "function_call"] == ['{"a": 1}', '{"a": 2}', "{}"]


def test_arguments_of_earlier_calls_for_anthropic(mocked: Any) -> None:
    """As an object."""
    answer = {"type": "message", "role": "assistant", "content": [{"type": "text", "text": "x"}], "stop_reason": "end_turn"}
    mocked.post("http://h/v1/messages", json=answer)
    AnthropicProvider(KEY, "http://h").chat(CALLED, model="m")
    asked = json.loads(mocked.calls[0].request.body)["messages"][1]["content"]
    assert [block["input"] for block in asked if block["type"] == "tool_use"] == [{"a": 1}, {"a": 2}, {}]


def test_a_proxy_that_fails_is_named(mocked: Any) -> None:
    """The server behind it may be well."""
    mocked.post("http://h/v1/chat/completions", body=requests.exceptions.ProxyError("x"))
    with pytest.raises(ProviderUnavailable, match="the proxy failed"):
        OpenAIProvider(KEY, "http://h").chat("hi", model="m")


def test_a_custom_tool_of_openais_is_a_tool_call(mocked: Any) -> None:
    """Its input is text, and stays readable as what the model wrote."""
    call = {"id": "call_1", "type": "custom", "custom": {"name": "f", "input": "SELECT 1"}}
    body = {"choices": [{"message": {"tool_calls": [call]}, "finish_reason": "tool_calls"}]}
    mocked.post("http://h/v1/chat/completions", json=body)
    (asked,) = OpenAIProvider(KEY, "http://h").chat("hi", model="m").tool_calls
    assert (asked.id, asked.name, asked.arguments, asked.raw_arguments) == ("call_1", "f", None, "SELECT 1")


def test_a_hint_that_only_the_message_names_is_dropped(mocked: Any) -> None:
    """``reasoning_effort`` in words, without a param: one resend without it."""
    mocked.post("http://h/v1/chat/completions", status=400, json={"error": {"message": "reasoning_effort is not supported"}})
    mocked.post("http://h/v1/chat/completions", json={"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]})
    assert OpenAIProvider(KEY, "http://h").chat("hi", model="m", reasoning_effort="high").text == "x"
    assert [("reasoning_effort" in json.loads(call.request.body)) for call in mocked.calls] == [True, False]


def test_what_a_broken_answer_had_used_and_whose_it_was(mocked: Any) -> None:
    """Tokens are paid for even if the stream breaks after it has said how many; the error names model and vendor."""
    usage = {"prompt_tokens": 11, "completion_tokens": 7}
    event = f"data: {json.dumps({'choices': [{'delta': {'content': 'x'}}], 'usage': usage})}\n\n"
    told = {"x-request-id": "req_1"}
    mocked.post("http://h/v1/chat/completions", body=event, content_type="text/event-stream", headers=told)
    with pytest.raises(InvalidResponse, match="truncated") as caught:
        OpenAIProvider(KEY, "http://h").chat("hi", model="m")
    assert caught.value.usage == Usage(11, 7)
    assert (caught.value.model, caught.value.provider, caught.value.status) == ("m", "openai", 200)
    assert caught.value.request_id == "req_1"


@pytest.mark.parametrize("status", [300, 399])
def test_an_answer_under_a_redirects_status_is_none(mocked: Any, status: int) -> None:
    """Whatever the body says."""
    body = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}
    mocked.post("http://h/v1/chat/completions", status=status, json=body)
    with pytest.raises(InvalidResponse, match="a redirect, which is not followed"):
        OpenAIProvider(KEY, "http://h").chat("hi", model="m")


def test_the_deadline_holds_in_a_session_of_the_users() -> None:
    """Its sockets are not ours, but between two reads the time is looked at."""

    def drip(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for _ in range(100):
            connection.sendall(event("and on "))
            if server.stopping.wait(0.05):
                break
        return False

    with peer(drip) as server, requests.Session() as session:
        start = time.monotonic()
        with pytest.raises(ProviderTimeout):
            OpenAIProvider(KEY, server.url, session=session).chat("hi", model="m", timeout=0.3)
        assert time.monotonic() - start < 2


@pytest.mark.quiet
def test_a_listener_hears_every_event_however_little_is_logged() -> None:
    kinds: list[str] = []
    tier = ProviderTier("a", ScriptedProvider(["hi"]), ["m"])
    FailoverChain([tier], on_event=lambda event: kinds.append(event.kind)).chat("q")
    assert kinds == ["attempt", "done"]


@pytest.mark.quiet
@pytest.mark.parametrize("streaming", [False, True])
def test_only_an_answer_that_took_more_than_one_attempt_is_worth_a_line(
    caplog: pytest.LogCaptureFixture, streaming: bool
) -> None:
    caplog.set_level(logging.INFO, "copilot_router")
    FailoverChain([ProviderTier("a", ScriptedProvider(["hi"]), ["m"])]).chat("q")
    assert not [record for record in caplog.records if record.levelno >= logging.INFO]
    tiers = [ProviderTier("a", ScriptedProvider([ServerError("no")]), ["m"], retries=0),
             ProviderTier("b", ScriptedProvider(["hi"]), ["m"])]  # fmt: skip
    chain = FailoverChain(tiers)
    assert ("".join(chain.stream("q")) if streaming else chain.chat("q").text) == "hi"
    assert "answered: a: ServerError: no" in caplog.text


def test_a_refusal_keeps_its_request_id() -> None:
    refused = LLMResponse(None, finish_reason="content_filter", request_id="r-1", model="m")
    chain = FailoverChain([ProviderTier("a", ScriptedProvider([refused]), ["m"])])
    with pytest.raises(ContentFiltered) as caught:
        chain.chat("q")
    assert (caught.value.request_id, caught.value.model) == ("r-1", "m")


def test_a_ping_has_five_seconds() -> None:
    given: list[float] = []

    class Pinged(ScriptedProvider):
        def ping(self, timeout: float = 0.0) -> None:
            given.append(timeout)

    FailoverChain([ProviderTier("a", Pinged([]), ["m"])]).check()
    assert given == [5.0]


def test_a_retry_comes_after_a_tenth_to_three_tenths_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float]] = []
    monkeypatch.setattr("copilot_router._drawn", lambda low, high: drawn.append((low, high)) or 0.0)
    FailoverChain([ProviderTier("a", ScriptedProvider([ServerError("no"), "hi"]), ["m"])]).chat("q")
    assert drawn == [(0.1, 0.3)]


@pytest.mark.parametrize(
    ("url", "role"),
    [("https://api.openai.com/v1", "developer"), ("https://x.openai.azure.com/openai/v1", "developer"),
     ("https://api.openai.com:443/v1", "developer"), ("https://xazure.com/v1", "system"),
     ("https://api.openai.com.evil.test/v1", "system")],
)  # fmt: skip
def test_only_openai_and_azure_know_developers(mocked: Any, url: str, role: str) -> None:
    mocked.post(f"{url}/chat/completions", json={"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]})
    OpenAIProvider(KEY, url).chat([{"role": "developer", "content": "x"}], model="m")
    assert json.loads(mocked.calls[0].request.body)["messages"][0]["role"] == role


def test_lm_studio_needs_no_model(mocked: Any) -> None:
    url = "http://localhost:1234/v1"
    mocked.post(f"{url}/chat/completions", json={"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]})
    assert LMStudioProvider().chat("q").text == "x"


def test_nothing_is_kept_of_an_answer_that_is_over() -> None:
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
                           + event("x") + event(finish="stop") + b"data: [DONE]\n\n")  # fmt: skip
        return False

    before = set(copilot_router._Answer._under_way)
    with peer(serve) as server:
        provider = OpenAIProvider(KEY, server.url)
        assert provider.chat("q", model="m", timeout=5).text == "x"
        assert copilot_router._Answer._under_way == before
        sessions = [provider._session]
        provider.close()
        assert provider._session is None and sessions[0] is not None
        own = requests.Session()
        lent = OpenAIProvider(KEY, server.url, session=own)
        lent.close()
        assert lent._session is own
        own.close()


@pytest.mark.parametrize("kind", ["response.completed", "response.incomplete"])
def test_a_response_may_end_in_several_ways(kind: str) -> None:
    decoder = copilot_router._ResponsesDecoder(copilot_router._Call([], None, "m", {}))
    item = {"type": "message", "content": [{"type": "output_text", "text": "x"}]}
    body = {"type": kind, "response": {"status": kind.partition(".")[2], "output": [item]}}
    assert decoder.feed("", json.dumps(body).encode()) == "x"
    assert decoder.ended and decoder.response().finish_reason == ("stop" if kind.endswith("completed") else "length")


@pytest.mark.parametrize(("kind", "error"), [("cancelled", InvalidResponse), ("failed", copilot_router._InBandError)])
def test_a_response_may_fail_in_several_ways(kind: str, error: type[Exception]) -> None:
    decoder = copilot_router._ResponsesDecoder(copilot_router._Call([], None, "m", {}))
    with pytest.raises(error):
        decoder.feed("", json.dumps({"type": f"response.{kind}", "response": {"status": kind, "output": []}}).encode())


FUNCTION = {"type": "function", "function": {"name": "f"}}


def test_a_function_without_parameters_takes_an_object_without_any() -> None:
    nothing = {"type": "object", "properties": {}}
    call = copilot_router._Call([{"role": "user", "content": "q"}], [FUNCTION], "m", {})
    body = copilot_router._responses_body(call, False)
    assert body["tools"] == [{"type": "function", "parameters": nothing, "strict": False, "name": "f"}]
    assert copilot_router._anthropic_tools(call, [], {"f": "f"})["tools"] == [{"name": "f", "input_schema": nothing}]


def test_a_file_of_the_responses_api_has_a_name() -> None:
    part = {"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA"}}
    call = copilot_router._Call([{"role": "user", "content": [part]}], None, "m", {})
    (item,) = copilot_router._responses_body(call, False)["input"]
    assert item["content"] == [
        {"type": "input_file", "filename": "file", "file_data": "data:application/pdf;base64,AAAA"}
    ]


def test_gemini_learns_which_call_has_no_result() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [
        {"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}} for name in ("f", "g")
    ]}  # fmt: skip
    history = [{"role": "user", "content": "q"}, called, {"role": "tool", "tool_call_id": "f", "content": "fine"},
               {"role": "user", "content": "go on"}]  # fmt: skip
    call = copilot_router._Call(copilot_router._repaired(history), None, "m", {})
    body = copilot_router._gemini_body(call, {"f": "f", "g": "g"})
    answers = [part["functionResponse"]["response"] for turn in body["contents"] for part in turn["parts"]
               if "functionResponse" in part]  # fmt: skip
    assert answers == [{"output": "fine"}, {"error": copilot_router._NO_RESULT}]


def test_what_a_server_repeats_is_three_stars() -> None:
    masked = copilot_router._masked
    assert masked("bad: my secret", [], ["my secret"]) == "bad: ***"
    assert masked("bad: my secret and my", [], ["my secret", "secret and"]) == "bad: my *** my"
    assert masked("key sk-12345678 is off", ["sk-12345678"], []) == "key *** is off"


def test_a_breaker_without_a_name_is_called_circuit(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "copilot_router")

    def listener(*_: object) -> None:
        raise ValueError

    breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=1, clock=clock, on_change=listener)
    with pytest.raises(ServerError):
        breaker.call(lambda: (_ for _ in ()).throw(ServerError("no")))
    clock.advance(2)
    breaker.call(lambda: None)
    lines = [record.getMessage() for record in caplog.records if "listener" not in record.getMessage()]
    assert [line.partition(":")[0] for line in lines] == ["circuit"] * 3
    assert "circuit: a listener failed" in caplog.messages


VENDORS_FINISHES = [
    ("Chat", "length", "length"), ("Chat", "content_filter", "content_filter"), ("Chat", "sensitive", "content_filter"),
    ("Chat", "stop", "stop"), ("Chat", "eos", "stop"),
    ("Anthropic", "max_tokens", "length"), ("Anthropic", "model_context_window_exceeded", "length"),
    ("Anthropic", "pause_turn", "length"), ("Anthropic", "refusal", "content_filter"), ("Anthropic", "end_turn", "stop"),
    ("Responses", "max_output_tokens", "length"), ("Responses", "content_filter", "content_filter"),
    ("Ollama", "length", "length"), ("Ollama", "stop", "stop"),
]  # fmt: skip


@pytest.mark.parametrize(("vendor", "theirs", "ours"), VENDORS_FINISHES)
def test_finish_reasons_by_vendor(vendor: str, theirs: str, ours: str) -> None:
    """The model's own name stands in for one that the answer does not say."""
    call = copilot_router._Call([], None, "asked", {})
    decoder = {"Chat": copilot_router._ChatDecoder, "Responses": copilot_router._ResponsesDecoder,
               "Ollama": copilot_router._OllamaDecoder,
               "Anthropic": lambda call: copilot_router._AnthropicDecoder(call, {})}[vendor](call)  # fmt: skip
    text = [{"type": "text", "text": "x"}]
    decoder.feed_whole({
        "Chat": {"choices": [{"message": {"content": "x"}, "finish_reason": theirs}]},
        "Anthropic": {"type": "message", "content": text, "stop_reason": theirs},
        "Responses": {"status": "incomplete", "incomplete_details": {"reason": theirs},
                      "output": [{"type": "message", "content": [{"type": "output_text", "text": "x"}]}]},
        "Ollama": {"message": {"content": "x"}, "done": True, "done_reason": theirs},
    }[vendor])  # fmt: skip
    answer = decoder.response()
    assert (answer.finish_reason, answer.text, answer.model) == (ours, "x", "asked")


@pytest.mark.parametrize(
    "header", ["x-request-id", "request-id", "apim-request-id", "x-ms-request-id", "x-generation-id"]
)
def test_a_request_id_under_each_of_its_names(mocked: Any, header: str) -> None:
    answer = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}
    mocked.post("http://h/v1/chat/completions", json=answer, headers={header: "r-1"})
    assert OpenAIProvider(KEY, "http://h/v1").chat("q", model="m").request_id == "r-1"


def test_an_empty_answer_has_cost_its_tokens() -> None:
    empty = LLMResponse(None, usage=Usage(5, 7), model="m")
    chain = FailoverChain([ProviderTier("a", ScriptedProvider([empty]), ["m"], retries=0)])
    with pytest.raises(EmptyResponse) as caught:
        copilot_router._checked_answer(empty)
    assert caught.value.usage == Usage(5, 7)
    with pytest.raises(RouterError) as failed:
        chain.chat("q")
    assert failed.value.attempts[0].usage == Usage(5, 7)


def test_a_tier_without_models_is_passed_over_without_one(clock: FakeClock) -> None:
    tiers = [ProviderTier("a", ScriptedProvider([])), ProviderTier("b", ScriptedProvider(["x", "y"]))]
    chain = FailoverChain(tiers, clock=clock)
    chain.tiers[0].breaker.open(60, "off")
    assert chain.chat("q").attempts[0].model == ""
    assert chain.chat("q", model="m").attempts[0].model == "m"


@pytest.mark.parametrize(
    ("key", "good"), [("caf\xe9", True), ("\xff", True), ("\u0100", False), ("a\x7f", False), ("a\x1fb", False)]
)
def test_which_letters_a_key_may_have(key: str, good: bool) -> None:
    if good:
        OpenAIProvider(key, "http://h/v1").close()
    else:
        with pytest.raises(ConfigError):
            OpenAIProvider(key, "http://h/v1")


def test_a_page_instead_of_json_names_the_model(mocked: Any) -> None:
    mocked.post("http://h/v1/chat/completions", status=302, headers={"Location": "http://elsewhere/"})
    with pytest.raises(InvalidResponse) as caught:
        OpenAIProvider(KEY, "http://h/v1").chat("q", model="m")
    assert (caught.value.model, caught.value.status, caught.value.provider) == ("m", 302, "openai")


@pytest.mark.parametrize(("status", "seconds"), [(429, 7.0), (503, 7.0), (529, 7.0), (500, None), (504, None)])
def test_who_may_say_when_a_limit_ends(mocked: Any, status: int, seconds: float | None) -> None:
    limits = {"x-ratelimit-reset-requests": "7s"}
    mocked.post("http://h/v1/chat/completions", status=status, json={"error": {"message": "no"}}, headers=limits)
    with pytest.raises(ProviderError) as caught:
        OpenAIProvider(KEY, "http://h/v1").chat("q", model="m")
    assert caught.value.retry_after == seconds


def test_a_breaker_without_a_failure_settles_once(clock: FakeClock) -> None:
    """A success that another call's failure overtook still resets the count of failures."""
    breaker = CircuitBreaker(failure_threshold=3, clock=clock)

    def overtaken() -> str:
        with pytest.raises(ServerError):
            breaker.call(lambda: (_ for _ in ()).throw(ServerError("no")))
        assert breaker.snapshot().failures == 1
        return "x"

    assert breaker.call(overtaken) == "x"
    assert breaker.snapshot().failures == 0


def test_the_record_of_a_failure_without_a_model_names_none() -> None:
    tiers = [ProviderTier("a", ScriptedProvider([BadRequest("no")]))]
    with pytest.raises(BadRequest) as caught:
        FailoverChain(tiers).chat("q")
    assert caught.value.attempts[0].model == ""


def test_several_texts_are_lines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert copilot_router._joined(parts, "nobody") == "a\nb"


def test_what_is_no_http_answer_is_called_so() -> None:
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
        return False

    with peer(serve) as server, pytest.raises(InvalidResponse) as caught:
        OpenAIProvider(KEY, server.url).chat("q", model="m", timeout=5)
    assert str(caught.value) == "not an HTTP answer"


def test_a_stream_knows_its_time() -> None:
    """The provider of a stream is told how long it has, as that of a whole answer is."""
    given: list[Any] = []

    class Timed(ScriptedProvider):
        def stream(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> Any:
            given.append(kwargs.get("timeout"))
            return super().stream(messages, tools, model, **kwargs)

    chain = FailoverChain([ProviderTier("a", Timed(["x"]), ["m"], timeout=7.0)])
    assert "".join(chain.stream("q")) == "x"
    assert given == [7.0]


def test_a_wait_belongs_to_no_tier(clock: FakeClock) -> None:
    events: list[Any] = []
    tier = ProviderTier("a", ScriptedProvider([RateLimited(retry_after=30), "x"]))
    chain = FailoverChain([tier], clock=clock, sleep=clock.sleep, on_event=events.append)
    assert chain.chat("q", wait=60).text == "x"
    assert [(event.tier, event.model) for event in events if event.kind == "wait"] == [("", "")]


def test_answers_are_asked_for_as_they_are(mocked: Any) -> None:
    """Not compressed, and without following anybody elsewhere; a query of the base URL stands behind the path."""
    answer = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}
    mocked.post("http://h/v1/chat/completions?api-version=1", json=answer)
    assert OpenAIProvider(KEY, "http://h/v1?api-version=1").chat("q", model="m").text == "x"
    assert mocked.calls[0].request.headers["Accept-Encoding"] == "identity"
    assert mocked.calls[0].request.url == "http://h/v1/chat/completions?api-version=1"


def test_a_query_joins_the_one_that_a_path_has(mocked: Any) -> None:
    answer = {"candidates": [{"content": {"parts": [{"text": "x"}]}, "finishReason": "STOP"}]}
    mocked.post(re.compile("http://h/.*"), json=answer)
    assert GeminiProvider(KEY, "http://h/v1beta?k=1").chat("q", model="m").text == "x"
    assert mocked.calls[0].request.url == "http://h/v1beta/models/m:streamGenerateContent?alt=sse&k=1"


def test_an_at_sign_in_a_path_is_no_password(mocked: Any) -> None:
    answer = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}
    mocked.post("http://h/a@b/v1/chat/completions", json=answer)
    provider = OpenAIProvider(KEY, "http://h/a@b/v1")
    assert provider.chat("q", model="m").text == "x"
    assert mocked.calls[0].request.headers["Authorization"] == f"Bearer {KEY}"


# -- defaults and texts, read where they stand


def test_what_a_record_begins_with() -> None:
    """A store of one's own, and a provider of one's own, build these and fill in what they know."""
    assert tuple(BreakerRecord()) == ("closed", 0, 0, 0, 0.0, 0.0, 0, 0, 0, "")
    assert tuple(Attempt("t", "m", "ok")) == ("t", "m", "ok", None, None, 0.0, Usage())
    assert (LLMResponse().latency, LLMResponse().cost, LLMResponse().request_id) == (0.0, None, None)
    assert (CircuitBreaker().trial_timeout, CircuitBreaker().max_recovery_timeout) == (120.0, 15.0)


def test_the_limits_of_the_stores(tmp_path: Path) -> None:
    redis, sqlite = RedisStore("redis://127.0.0.1:1/0"), SQLiteStore(tmp_path / "b")
    assert (redis.shared_counts, redis.shares_local_errors, redis.refresh) == (False, False, 1.0)
    assert redis._client.connection_pool.connection_kwargs["socket_timeout"] == 0.1
    assert (sqlite.shared_counts, sqlite.shares_local_errors, sqlite.refresh, sqlite.timeout) == (True, True, 0.25, 0.1)


def test_a_repr_shows_no_text() -> None:
    answer = LLMResponse("T1", reasoning="T2", escalation="T3", raw={"a": "T4"}, carry={"b": "T5"}, model="m")
    assert not re.search("T[1-5]", repr(answer))
    assert "model='m'" in repr(answer)


def test_the_library_is_silent_where_nobody_listens() -> None:
    """One handler that does nothing, under the name that the README gives: else logging prints warnings by itself."""
    assert logging.NullHandler in map(type, logging.getLogger("copilot_router").handlers)


def test_each_step_of_explain() -> None:
    steps = (
        Attempt("a", "m", "skipped", "CircuitOpen: off"), Attempt("b", "m", "escalated", "gave up", latency=0.5),
        Attempt("c", "m", "failed", "ServerError: no", latency=0.25), Attempt("d", "m", "ok", latency=1.0),
    )  # fmt: skip
    told = LLMResponse("x", attempts=steps, cost=0.5).explain()
    assert told == ("a: skipped (CircuitOpen: off) -> b: escalated (gave up) 500 ms -> c: ServerError: no 250 ms"
                    " -> d: ok 1000 ms $0.5000")  # fmt: skip


def test_reasons_of_what_is_done_by_hand(clock: FakeClock) -> None:
    breaker = CircuitBreaker(clock=clock)
    breaker.open()
    assert breaker.snapshot().reason == "opened by hand"
    breaker.reset()
    assert breaker.snapshot().reason == "reset"


def test_of_two_that_park_the_longer_holds(clock: FakeClock) -> None:
    """And with it its reason: the same length changes nothing."""
    breaker = CircuitBreaker(clock=clock)
    first, second, third, last = (breaker.admit() for _ in range(4))
    first.park(10, "first")
    second.park(10, "second")
    assert (breaker.snapshot().reason, breaker.retry_after) == ("first", 10)
    third.park(20)
    assert (breaker.snapshot().reason, breaker.retry_after) == ("parked", 20)
    last.park()
    assert breaker.retry_after == 20


def test_a_forked_sqlite_store_has_a_lock_of_its_own(tmp_path: Path) -> None:
    """A thread of the parent may have held the old one: nobody in the child will ever give it back."""
    store = SQLiteStore(tmp_path / "b", timeout=0.01)
    holder = threading.Thread(target=store._lock.acquire)
    holder.start()
    holder.join(5)
    with pytest.raises(TimeoutError):
        store.load("b")
    store._renew_after_fork()
    assert store.load("b")[0] is None
    store.close()


# -- messages


def test_one_part_that_is_no_dict_is_enough() -> None:
    with pytest.raises(BadRequest, match=r"messages\[0\] \(user\) has a part that is no dict"):
        copilot_router._checked_messages([{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}])


def test_an_empty_answer_keeps_its_request_id() -> None:
    with pytest.raises(EmptyResponse) as caught:
        copilot_router._checked_answer(LLMResponse(None, request_id="r-1", model="m", finish_reason="length"))
    assert (caught.value.request_id, caught.value.model, caught.value.code) == ("r-1", "m", "length")


def test_the_instruction_joins_the_first_system_message() -> None:
    """Of either name, text or parts; what stands before and behind stays."""
    user, other = {"role": "user", "content": "q"}, {"role": "system", "content": "z"}
    for role in ("system", "developer"):
        told = copilot_router._instructed([user, {"role": role, "content": "a"}, other, user], "I")
        assert told == [user, {"role": role, "content": "a\n\nI"}, other, user]
        part = {"type": "text", "text": "a"}
        told = copilot_router._instructed([user, {"role": role, "content": [part]}, other, user], "I")
        assert told == [user, {"role": role, "content": [part, {"type": "text", "text": "I"}]}, other, user]
    assert copilot_router._instructed([user], "I") == [{"role": "system", "content": "I"}, user]


@pytest.mark.parametrize("kind", ["image_url", "image", "input_image"])
def test_what_counts_as_an_image(kind: str) -> None:
    text, image = {"type": "text", "text": "a"}, {"type": kind, "image_url": "data:image/png;base64,AAAA"}
    assert copilot_router._has_images([{"role": "user", "content": "q"}, {"role": "user", "content": [text, image]}])
    assert not copilot_router._has_images([{"role": "user", "content": [text]}, {"role": "user", "content": kind}])


def test_a_custom_provider_is_spared_a_carry_that_stands_alone() -> None:
    provider = ScriptedProvider(["x"])
    kept = {"role": "assistant", "content": "yes", "copilot_router": {"blocks": []}}
    FailoverChain([ProviderTier("a", provider)]).chat([kept])
    assert provider.calls[0]["messages"] == [{"role": "assistant", "content": "yes"}]


# -- transport


def test_the_first_token_and_those_after_it_have_their_own_names() -> None:
    limits = copilot_router._Limits(9, 9, 0, 0, (0, 0))
    first = limits.expired()
    limits.progress()
    later = limits.expired()
    assert first is not None and later is not None
    assert (first.code, str(first)[:15]) == ("first_token_timeout", "no first token ")
    assert (later.code, str(later)[:16]) == ("stall_timeout", "no further data ")


def test_a_kept_connection_takes_the_limits_of_the_new_request() -> None:
    """The first request's would let the second one wait for ever."""

    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        if len(server.requests) > 1:
            server.stopping.wait(10)
            return False
        return answered(connection)

    with peer(serve) as server, one_tier(server.url, first_token_timeout=8) as chain:
        assert chain.chat("q", timeout=60).text == "x"
        start = time.monotonic()
        with pytest.raises(RouterError):
            chain.chat("q", timeout=0.2)
        assert time.monotonic() - start < 2
        assert server.connections == 1


def answered(connection: socket.socket, header: str = "X-More: yes") -> bool:
    """A whole answer, and the connection stays open."""
    body = '{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}'
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{header}\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall((head + body).encode())
    return True


def one_tier(url: str, **settings: Any) -> FailoverChain:
    return FailoverChain([ProviderTier("a", OpenAIProvider(KEY, url, **settings), ["m"], retries=0)])


@pytest.mark.parametrize(
    ("sent", "message"), [(b"1" * 70_000, "garbled HTTP"), (b"x\r\n", "garbled HTTP"), (b"5\r\nab", "truncated")]
)
def test_a_chunked_body_that_is_none(sent: bytes, message: str) -> None:
    with pytest.raises(InvalidResponse, match=message):
        list(copilot_router._unchunked(io.BytesIO(sent).read1))


def test_trailers_without_end() -> None:
    read = iter([b"1\r\nx\r\n0\r\n", b"a: b\r\n" * 11_000, b""])
    with pytest.raises(InvalidResponse, match="garbled HTTP"):
        list(copilot_router._unchunked(lambda: next(read)))


def test_codings_of_a_body(mocked: Any) -> None:
    """identity says nothing; a damaged one is called so."""
    body = json.dumps({"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}).encode()
    mocked.post("http://h/v1/chat/completions", body=body, headers={"Content-Encoding": "identity"})
    mocked.post("http://h/v1/chat/completions", body=b"\x1f\x8bdamaged", headers={"Content-Encoding": "gzip"})
    provider = OpenAIProvider(KEY, "http://h/v1")
    assert provider.chat("q", model="m").text == "x"
    with pytest.raises(InvalidResponse, match="the compressed body is damaged"):
        provider.chat("q", model="m")


TROUBLE = [
    *((name, ProviderUnavailable, "the name cannot be resolved") for name in ("NameResolutionError", "gaierror")),
    *((name, ProviderUnavailable, "TLS failed")
      for name in ("SSLError", "SSLCertVerificationError", "SSLZeroReturnError", "SSLEOFError")),
    ("ProxyError", ProviderUnavailable, "the proxy failed"), ("ConnectionRefusedError", ProviderUnavailable, "refused"),
    ("NewConnectionError", ProviderUnavailable, "cannot connect"),
    *((name, ServerError, "closed before the answer")
      for name in ("RemoteDisconnected", "ConnectionResetError", "BrokenPipeError", "ConnectionAbortedError", "IncompleteRead",
                   "InvalidChunkLength", "ProtocolError", "ChunkedEncodingError")),
    *((name, InvalidResponse, "not an HTTP answer") for name in ("BadStatusLine", "LineTooLong", "UnknownProtocol")),
    *((name, InvalidResponse, "garbled HTTP")
      for name in ("HTTPException", "HeaderParsingError", "InvalidHeader", "DecodeError", "ContentDecodingError")),
    *((name, ProviderUnavailable, "the URL is not valid")
      for name in ("InvalidURL", "LocationParseError", "MissingSchema", "InvalidSchema")),
    *((name, ProviderUnavailable, "connect timeout") for name in ("ConnectTimeoutError", "ConnectTimeout")),
    *((name, ProviderTimeout, "timed out") for name in ("ReadTimeoutError", "ReadTimeout", "TimeoutError")),
    ("OddError", ProviderUnavailable, "connecting failed: OddError"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "message"), TROUBLE)
def test_what_trouble_on_the_way_is_called(name: str, kind: type[ProviderError], message: str) -> None:
    """By the name of the exception, wherever it stands among the causes."""
    bases = (TimeoutError,) if name == "TimeoutError" else (Exception,)
    inner = type(name, bases, {})("secret")
    outer = ValueError(inner)
    for error in (inner, outer) if name != "OddError" else (inner,):
        found = copilot_router._transport_error(error, copilot_router._Limits(9, 9, 9, 9, (9, 9)), "connecting")
        assert type(found) is kind
        assert str(found).startswith(message)


@pytest.mark.parametrize("name", ["ConnectionResetError", "IncompleteRead", "ProtocolError", "RemoteDisconnected"])
def test_what_breaks_in_the_answer_is_truncated(name: str) -> None:
    limits = copilot_router._Limits(9, 9, 9, 9, (9, 9))
    found = copilot_router._transport_error(type(name, (Exception,), {})(), limits, "the answer")
    assert (type(found), str(found)) == (InvalidResponse, "truncated: the connection broke")


# -- what errors say


def test_facts_of_a_gateways_error() -> None:
    facts = copilot_router._error_facts
    assert facts({"metadata": {"limit_source": "Weight_Exceeds_Budget"}}).codes == ("weight_exceeds_budget",)
    assert facts({"metadata": {"flagged_input": "x"}}).codes == ("content_filter",)
    assert facts({"metadata": {"reasons": ["x"]}}).codes == ("content_filter",)
    assert facts({"status_code": "999999999"}).number == 999_999_999
    assert facts({"status_code": "1000000000"}).number is None
    assert facts({"code": True, "status_code": 418}).number == 418


@pytest.mark.parametrize(("waits", "kind"), [({}, ServerError), ({"Retry-After": "5"}, Overloaded)])
def test_a_503_that_says_when_is_overloaded(mocked: Any, waits: dict[str, str], kind: type) -> None:
    """Whatever generic type it gives."""
    body = {"error": {"type": "server_error", "message": "x"}}
    mocked.post("http://h/v1/chat/completions", status=503, json=body, headers=waits)
    with pytest.raises(ServerError) as caught:
        OpenAIProvider(KEY, "http://h").chat("hi", model="m")
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("try again in 6m0s", 360), ("try again in 120ms", 0.12), ("retry after 20 seconds", 20), ("retry after 20", 20),
     ("try again in 2 minutes", 120), ("try again in 1 hour", 3600), ("try again in 2 hrs", 7200),
     ("Try again in 2 days", 172_800),
     ("try again in 1 day", 86_400), ("try again in 500 milliseconds", 0.5), ("try again in 5 ms", 0.005),
     ("try again in 1.5s", 1.5), ("try again later", None), ("try again in a while", None)],
)  # fmt: skip
def test_a_hint_in_words(text: str, seconds: float | None) -> None:
    found = copilot_router._in_words(text)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_other_forms_of_a_hint() -> None:
    assert copilot_router._duration("7") == 7
    assert copilot_router._duration(" 1h2m3s. ") == 3723
    assert copilot_router._duration("soon") is None
    assert copilot_router._seconds("0.5") == 0.5
    assert [copilot_router._seconds(text) for text in ("nan", "inf", "-1", "")] == [None] * 4
    assert copilot_router._until("2000-01-01T00:00:00Z") == 0.0
    assert copilot_router._until("1 January") is None


def test_secrets_of_four_letters_are_hidden() -> None:
    assert copilot_router._masked("key abcd is off", ["abcd"], []) == "key *** is off"
    assert copilot_router._masked("key abc is off", ["abc"], []) == "key abc is off"


# -- learning from refusals

HINT_VALUES = {"temperature": 0.5, "top_p": 0.5, "seed": 1, "presence_penalty": 0.5, "frequency_penalty": 0.5,
               "reasoning_effort": "low", "parallel_tool_calls": True, "user": "u"}  # fmt: skip


@pytest.mark.parametrize(
    ("hint", "theirs"),
    [*((name, name) for name in HINT_VALUES), ("top_p", "topP"), ("presence_penalty", "presencePenalty"),
     ("frequency_penalty", "frequencyPenalty"), ("reasoning_effort", "reasoning.effort"),
     ("reasoning_effort", "output_config"),
     ("reasoning_effort", "output_config.effort"), ("reasoning_effort", "effort"), ("reasoning_effort", "thinking.type"),
     ("reasoning_effort", "think"), ("parallel_tool_calls", "disable_parallel_tool_use"), ("user", "metadata"),
     ("user", "metadata.user_id"), ("user", "safety_identifier")],
)  # fmt: skip
def test_each_hint_is_dropped_when_it_is_refused(mocked: Any, hint: str, theirs: str) -> None:
    """Under any of the names that vendors give it; the others stay."""
    url = "http://h/v1/chat/completions"
    mocked.post(url, status=400, json={"error": {"message": f"Unsupported value: '{theirs}'"}})
    mocked.post(url, json={"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]})
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert OpenAIProvider(KEY, "http://h").chat("q", tools, model="m", **HINT_VALUES).text == "x"
    first, second = (json.loads(call.request.body) for call in mocked.calls)
    assert first.keys() - second.keys() == {hint}
    assert {name: first[name] for name in HINT_VALUES} == HINT_VALUES


def test_one_corrected_resend_and_no_more(mocked: Any) -> None:
    url = "http://h/v1/chat/completions"
    for hint in ("seed", "user"):
        mocked.post(url, status=400, json={"error": {"message": f"Unsupported parameter: '{hint}'"}})
    with pytest.raises(BadRequest, match="user"):
        OpenAIProvider(KEY, "http://h").chat("q", model="m", **HINT_VALUES)
    assert len(mocked.calls) == 2


@pytest.mark.parametrize(
    "message",
    ["Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
     "'max_tokens' is not supported, please use 'max_completion_tokens'"],
)  # fmt: skip
def test_a_limit_changes_its_name(mocked: Any, message: str) -> None:
    """What stands behind "use" is the cure, not the complaint."""
    url = "http://h/v1/chat/completions"
    mocked.post(url, status=400, json={"error": {"message": message}})
    mocked.post(url, json={"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]})
    provider = OpenAIProvider(KEY, "http://h")
    assert provider.chat("q", model="m", max_tokens=5).text == "x"
    assert json.loads(mocked.calls[1].request.body)["max_completion_tokens"] == 5


# -- HTTP providers


def test_a_ping_is_checked_and_follows_nobody(mocked: Any) -> None:
    provider = OpenAIProvider(KEY, "http://h")
    with pytest.raises(ConfigError, match="timeout=-1"):
        provider.ping(-1)
    mocked.get("http://h/v1/models", status=300, json={"data": []})
    with pytest.raises(InvalidResponse, match="a redirect"):
        provider.ping()


def test_closing_closes_idle_connections() -> None:
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        return answered(connection)

    with peer(serve) as server, one_tier(server.url) as chain:
        assert chain.chat("q").text == "x"
        session = chain.tiers[0].provider._session  # type: ignore[attr-defined]
        pools = session.get_adapter(server.url).poolmanager.pools
        assert len(pools) == 1
        chain.close()
        assert len(pools) == 0


def test_closing_a_chain_closes_every_provider() -> None:
    closed: list[str] = []

    class Closing(ScriptedProvider):
        def close(self) -> None:
            closed.append("a")

    FailoverChain([ProviderTier(name, Closing([])) for name in "ab"]).close()
    assert closed == ["a", "a"]


def test_a_session_of_the_users_follows_no_redirect_and_waits_no_longer_than_told() -> None:
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        if b"/silent/" in request:
            server.stopping.wait(10)
        else:
            connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n")
        return False

    with peer(serve) as server, requests.Session() as session:
        with pytest.raises(InvalidResponse, match="a redirect"):
            OpenAIProvider(KEY, server.url, session=session).chat("q", model="m", timeout=5)
        assert len(server.requests) == 1
        start = time.monotonic()
        with pytest.raises(ProviderTimeout):
            OpenAIProvider(KEY, f"{server.url}/silent", session=session, first_token_timeout=0.2).chat("q", model="m")
        assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("header", "shown"),
    [("text/html; charset=utf-8", "(text/html)"), ("", "(of an odd type)"), (f"text/{KEY}", "(of an odd type)"),
     (None, "(no content type)")],
)  # fmt: skip
def test_what_is_no_json_says_what_it_was(header: str | None, shown: str) -> None:
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        line = b"" if header is None else b"Content-Type: " + header.encode() + b"\r\n"
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + line + b"Content-Length: 4\r\n\r\n<ok>")
        return False

    with peer(serve) as server, pytest.raises(InvalidResponse) as caught:
        OpenAIProvider(KEY, server.url).chat("q", model="m", timeout=5)
    assert shown in str(caught.value)


def test_nobodys_model_is_no_name(mocked: Any) -> None:
    """LM Studio need not be told a model, and may not say one."""
    mocked.post("http://h/v1/chat/completions", json={"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]})
    mocked.post("http://h/v1/chat/completions", status=302)
    provider = LMStudioProvider(base_url="http://h")
    assert provider.chat("q").model == ""
    with pytest.raises(InvalidResponse) as caught:
        provider.chat("q")
    assert caught.value.model == ""


def test_an_end_of_a_base_url_that_was_copied_along(mocked: Any) -> None:
    for url in ("http://h/v1X/chat/completions", "http://h/v1X/chat/completions/", "http://h/v1X/"):
        assert OpenAIProvider(KEY, url).base_url == "http://h/v1X"


# -- wire formats, field by field


def decoded(decoder: Any, *bodies: Any) -> str:
    return "".join(decoder.feed("", json.dumps(body).encode()) for body in bodies)


@pytest.fixture
def asked() -> Any:
    return copilot_router._Call([{"role": "user", "content": "q"}], None, "m", {})


def test_usage_may_come_in_a_chunk_without_choices(asked: Any) -> None:
    decoder = copilot_router._ChatDecoder(asked)
    assert decoded(decoder, {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}) == ""
    assert decoder.usage == Usage(3, 4)
    with pytest.raises(InvalidResponse, match="no choices"):
        decoded(decoder, {"model": "m"})


def test_errors_inside_of_a_200(asked: Any) -> None:
    decoder = copilot_router._ChatDecoder(asked)
    with pytest.raises(copilot_router._InBandError) as caught:
        decoded(decoder, {"choices": [{"delta": {}, "finish_reason": "error"}]})
    assert caught.value.body == {"error": {"message": "the model reported an error"}}
    with pytest.raises(copilot_router._InBandError):
        decoded(decoder, {"object": "error", "message": "no"})


def test_id_and_name_of_a_call_may_come_late(asked: Any) -> None:
    decoder = copilot_router._ChatDecoder(asked)
    pieces = [{"index": 0, "function": {"arguments": '{"a"'}}, {"index": 0, "id": "c1", "function": {"arguments": ": 1}"}},
              {"index": 0, "function": {"name": "f"}}]  # fmt: skip
    decoded(decoder, *({"choices": [{"delta": {"tool_calls": [piece]}}]} for piece in pieces))
    decoded(decoder, {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]})
    (call,) = decoder.response().tool_calls
    assert (call.id, call.name, call.arguments) == ("c1", "f", {"a": 1})


def test_without_tools_nothing_is_said_of_them(asked: Any) -> None:
    call = asked._replace(options={"tool_choice": "auto", "parallel_tool_calls": True, "seed": 1})
    body = copilot_router._chat_body(call, False, False)
    assert body == {"model": "m", "messages": [{"role": "user", "content": "q"}], "seed": 1}


def test_the_name_of_a_speaker_is_sent(asked: Any) -> None:
    message = {"role": "user", "content": "q", "name": "ann"}
    assert copilot_router._chat_body(asked._replace(messages=[message]), False, False)["messages"] == [message]


def test_anthropics_signs_of_life_and_its_end(asked: Any) -> None:
    decoder = copilot_router._AnthropicDecoder(asked, {})
    decoded(decoder, {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
    assert decoder.alive
    assert not decoder.ended
    decoded(decoder, {"type": "message_stop"})
    assert decoder.ended


def test_what_anthropic_wants_back(asked: Any) -> None:
    """Thinking of either kind, calls and texts, but no blank text, which it would refuse."""
    blocks = [{"type": "redacted_thinking", "data": "x"}, {"type": "thinking", "thinking": "t", "signature": "s"},
              {"type": "text", "text": ""}, {"type": "text"}, {"type": "text", "text": " "}, {"type": "text", "text": "yes"},
              {"type": "odd", "text": "no"}, {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}]  # fmt: skip
    decoder = copilot_router._AnthropicDecoder(asked, {})
    decoder.feed_whole({"type": "message", "content": blocks, "stop_reason": "tool_use"})
    carry = decoder.response().carry
    assert carry is not None
    assert carry["blocks"] == [blocks[0], blocks[1], blocks[5], blocks[7]]


def test_each_field_of_anthropics_request(asked: Any) -> None:
    call = asked._replace(options={"temperature": 1.5, "top_p": 0.5, "user": "u", "stop": ["a", " "], "max_tokens": 7,
                                   "response_format": {"type": "json_object"}})  # fmt: skip
    assert copilot_router._anthropic_body(call, True, {}) == {
        "model": "m", "max_tokens": 7, "system": "Answer with one JSON object and nothing else.", "stream": True,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}], "temperature": 1, "top_p": 0.5,
        "stop_sequences": ["a"], "metadata": {"user_id": "u"},
    }  # fmt: skip
    text = copilot_router._anthropic_body(asked._replace(options={"response_format": {"type": "text"}}), False, {})
    assert "system" not in text
    assert text["max_tokens"] == 8192


@pytest.mark.parametrize(
    "reason",
    ["SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT",
     "IMAGE_RECITATION", "MODEL_ARMOR", "ESCALATION", "PUP_LIMITED_DISABLED", "MAX_TOKENS", "CONTINUATION"],
)  # fmt: skip
def test_geminis_refusals_and_cuts(asked: Any, reason: str) -> None:
    decoder = copilot_router._GeminiDecoder(asked, {})
    decoder.feed_whole({"candidates": [{"content": {"parts": [{"text": "x"}]}, "finishReason": reason}]})
    assert decoder.response().finish_reason == ("length" if reason in ("MAX_TOKENS", "CONTINUATION") else "content_filter")


@pytest.mark.parametrize(
    "reason",
    ["MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "MALFORMED_RESPONSE", "TOO_MANY_TOOL_CALLS", "OTHER", "NO_IMAGE",
     "IMAGE_OTHER", "MISSING_THOUGHT_SIGNATURE"],
)  # fmt: skip
def test_geminis_failures(asked: Any, reason: str) -> None:
    decoder = copilot_router._GeminiDecoder(asked, {})
    with pytest.raises(InvalidResponse) as caught:
        decoder.feed_whole({"candidates": [{"content": {"parts": [{"text": "x"}]}, "finishReason": reason}]})
    assert caught.value.code == reason.lower()


@pytest.mark.parametrize("key", ["type", "title", "description", "required", "$schema", "$id", "$defs", "definitions"])
def test_a_schema_for_gemini_that_allows_nothing(key: str) -> None:
    """Whatever else it says: it is left out, since it would be refused."""
    declare = copilot_router._gemini_function
    assert declare({"name": "f", "parameters": {key: "x", "properties": {}}}, {"f": "f"}) == {"name": "f"}
    full = {key: "x", "properties": {"a": {"type": "string"}}}
    assert declare({"name": "f", "parameters": full}, {"f": "f"}) == {"name": "f", "parametersJsonSchema": full}


def test_each_option_for_ollama_and_gemini(asked: Any) -> None:
    call = asked._replace(options={"temperature": 0.1, "top_p": 0.2, "seed": 3, "presence_penalty": 0.4,
                                   "frequency_penalty": 0.5, "max_tokens": 6, "stop": "s"})  # fmt: skip
    assert copilot_router._ollama_body(call, False)["options"] == {
        "temperature": 0.1, "top_p": 0.2, "seed": 3, "presence_penalty": 0.4, "frequency_penalty": 0.5, "num_predict": 6,
        "stop": ["s"],
    }  # fmt: skip
    assert copilot_router._gemini_config(call) == {
        "temperature": 0.1, "topP": 0.2, "seed": 3, "presencePenalty": 0.4, "frequencyPenalty": 0.5, "maxOutputTokens": 6,
        "stopSequences": ["s"],
    }  # fmt: skip


@pytest.mark.parametrize("at", range(1, 8))
def test_a_think_block_is_recognised_wherever_it_is_cut(at: int) -> None:
    splitter = copilot_router._ThinkSplitter()
    assert splitter.feed("<think>"[:at]) + splitter.feed("<think>"[at:] + "hm</think>\nyes") == "yes"
    assert "".join(splitter.thought) == "hm"


def test_a_script_answers_as_the_model_that_was_asked() -> None:
    provider = ScriptedProvider(["x", "y"])
    assert provider.chat("q", model="m").model == "m"
    assert provider.chat("q").model == ""


# -- the chain


def test_time_of_the_reader_is_not_the_tiers(clock: FakeClock) -> None:
    """A tier whose own limit is over fails; one whose reader took the time does not."""

    class Slow(ScriptedProvider):
        def __init__(self, own: float) -> None:
            super().__init__([])
            self.own = own

        def stream(self, *_: Any, **__: Any) -> Any:
            yield "a"
            clock.advance(self.own)
            raise ProviderTimeout("late", code="attempt_timeout")

    for own, reader, failures in ((10.5, 0, 1), (10.5, 30, 1), (4, 30, 0)):
        tier = ProviderTier("t", Slow(own), ["m"], timeout=10)
        chain = FailoverChain([tier], clock=clock, sleep=clock.sleep)
        stream = chain.stream("q", timeout=1000)
        assert next(stream) == "a"
        clock.advance(reader)
        with pytest.raises(StreamInterrupted):
            next(stream)
        assert tier.breaker.snapshot().failures == failures


def test_latency_is_the_time_between(clock: FakeClock) -> None:
    def answer(*_: Any, **__: Any) -> str:
        clock.advance(3)
        return "x"

    response = FailoverChain([ProviderTier("a", ScriptedProvider([answer]))], clock=clock).chat("q")
    assert (response.attempts[0].latency, response.latency) == (3, 3)
    assert response.attempts[0].model == ""


def test_a_servers_wish_that_is_just_short_enough_parks_nothing(clock: FakeClock) -> None:
    for seconds, state in ((2.0, "closed"), (2.5, "open")):
        tier = ProviderTier("a", ScriptedProvider([ServerError("no", retry_after=seconds)]), retries=0)
        with pytest.raises(AllProvidersFailed):
            FailoverChain([tier], clock=clock, sleep=clock.sleep).chat("q")
        assert tier.breaker.state == state


def test_a_nested_chains_failure_counts_outside() -> None:
    inner = FailoverChain([ProviderTier("in", ScriptedProvider([ServerError("no")]), retries=0)])
    outer = FailoverChain([ProviderTier("out", inner, retries=0)])
    with pytest.raises(AllProvidersFailed):
        outer.chat("q")
    (health,) = outer.health()
    assert (health.calls, health.failures) == (1, 1)
    assert health.last_error is not None and health.last_error.startswith("AllProvidersFailed")


def test_a_rung_that_some_tier_serves_is_enough() -> None:
    """Restricted to tiers that serve only the upper one, the weaker model still learns how to give up."""
    weak, strong = ScriptedProvider(["x"]), ScriptedProvider(["y"])
    tiers = [ProviderTier("a", weak, ["weak"]), ProviderTier("b", ScriptedProvider([]), ["mid"]),
             ProviderTier("c", strong, ["top"])]  # fmt: skip
    FailoverChain(tiers, escalation_model=["mid", "top"]).chat("q", tiers=["a", "c"])
    assert "[ESCALATE]" in weak.calls[0]["messages"][0]["content"]


def test_after_the_stronger_one_come_the_others_in_order() -> None:
    tiers = [
        ProviderTier("a", ScriptedProvider(["[ESCALATE] hard"]), ["weak"]),
        ProviderTier("b", ScriptedProvider(["b"]), ["other"]),
        ProviderTier("c", ScriptedProvider([BadRequest("no")]), ["top"]),
    ]
    response = FailoverChain(tiers, escalation_model="top").chat("q")
    outcomes = [(attempt.tier, attempt.outcome) for attempt in response.attempts]
    assert outcomes == [("a", "escalated"), ("c", "failed"), ("b", "ok")]
    assert (response.attempts[0].error, response.escalation) == ("gave up", "hard")


def test_a_wait_that_would_end_with_the_deadline_is_none(clock: FakeClock) -> None:
    tier = ProviderTier("a", ScriptedProvider([RateLimited(retry_after=30)]))
    with pytest.raises(AllProvidersFailed):
        FailoverChain([tier], clock=clock, sleep=clock.sleep).chat("q", wait=60, timeout=30)
    assert clock.slept == []


def test_of_two_tiers_one_unable_and_one_open_nothing_is_unsupported() -> None:
    tiers = [ProviderTier("a", ScriptedProvider([]), supports_tools=False), ProviderTier("b", ScriptedProvider([]))]
    chain = FailoverChain(tiers)
    tiers[1].breaker.open(60)
    with pytest.raises(AllProvidersFailed):
        chain.chat("q", [FUNCTION])
    chain = FailoverChain([tiers[0]])
    with pytest.raises(UnsupportedRequest, match="a takes no tools"):
        chain.chat("q", [FUNCTION])


def test_events_without_a_model_say_none(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "copilot_router")
    events: list[Any] = []
    tier = ProviderTier("a", ScriptedProvider([ProviderUnavailable("no")]))
    chain = FailoverChain([tier], clock=clock, on_event=events.append, failure_threshold=1)
    with pytest.raises(AllProvidersFailed):
        chain.chat("q")
    assert {event.kind: event.model for event in events} == {"attempt": "", "breaker": "", "done": ""}
    assert "a attempt  {'timeout': 300.0}" in caplog.messages


def test_a_ping_of_a_chain_hears_a_task_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks no other tier then: the task's time is up."""
    limit = type("SoftTimeLimitExceeded", (Exception,), {})
    monkeypatch.setitem(sys.modules, "billiard.exceptions", SimpleNamespace(SoftTimeLimitExceeded=limit))
    pinged: list[str] = []

    class Pinged(ScriptedProvider):
        def ping(self, timeout: float = 0.0) -> None:
            pinged.append("x")
            raise limit

    with pytest.raises(limit):
        FailoverChain([ProviderTier(name, Pinged([])) for name in "ab"]).ping()
    assert pinged == ["x"]


def test_what_the_environment_does_not_name_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "copilot_router")
    FailoverChain.from_env({"OPENAI_API_KEY": KEY, "OPENAI_MODEL": "m", "OLLAMA_HOST": "h"})
    assert caplog.messages == [
        "from_env: ollama with no model: OLLAMA_MODEL is not set", "from_env: openai with m",
        "from_env: not set: LMSTUDIO_BASE_URL, GOOGLE_API_KEY or GEMINI_API_KEY, ANTHROPIC_API_KEY or ANTHROPIC_BASE_URL",
    ]  # fmt: skip


@pytest.mark.parametrize(("wrong", "right"), [("stor", "store"), ("chian", "chain"), ("teir", "tier")])
def test_a_section_that_is_misspelt(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown section '{wrong}'. Did you mean '{right}'"):
        FailoverChain.from_config({wrong: {}})


# -- once more: limits, tables and boundaries


def test_a_connection_that_was_closed_is_no_kept_one() -> None:
    """A request that fails on a new connection is not sent again, however often others were kept before."""

    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        if len(server.requests) == 1:
            answered(connection, "Connection: close")
        return False

    with peer(serve) as server, one_tier(server.url) as chain:
        assert chain.chat("q").text == "x"
        with pytest.raises(RouterError):
            chain.chat("q")
        assert len(server.requests) == 2


def test_a_ping_gives_its_connection_back() -> None:
    with peer(lambda server, connection, request: answered(connection)) as server, one_tier(server.url) as chain:
        for _ in range(3):
            chain.tiers[0].provider.ping()
        assert (server.connections, len(server.requests)) == (1, 3)


def test_how_long_connecting_may_take_has_its_own_code() -> None:
    over = copilot_router._Limits(9, 0, 9, 9, (9, 9))
    for error in (TimeoutError(), type("ConnectTimeoutError", (Exception,), {})()):
        found = copilot_router._transport_error(error, over, "connecting")
        assert (type(found), str(found), found.code) == (ProviderUnavailable, "connect timeout", "connect_timeout")
    found = copilot_router._transport_error(TimeoutError(), over, "the answer")
    assert (type(found), found.code) == (ProviderTimeout, "attempt_timeout")


def test_the_end_of_a_complete_answer_has_two_seconds_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """However it drips."""
    now = iter([5.0, 6.0, 7.0])
    monkeypatch.setattr(copilot_router, "time", SimpleNamespace(monotonic=lambda: next(now)))
    limits = SimpleNamespace(since=0.0, silence=20.0)
    answer: Any = SimpleNamespace(limits=limits, chunks=lambda: iter([b"data: 1\n\n"] * 3))
    decoder: Any = SimpleNamespace(complete=True)
    batches = list(copilot_router._HTTPProvider._event_batches(answer, copilot_router._SSE(), decoder))
    assert batches == [[("", b"1")]] * 3 + [[]]
    assert (limits.since, limits.silence) == (5.0, 2.0)


def test_a_forked_provider_has_a_lock_of_its_own() -> None:
    provider = OpenAIProvider(KEY, "http://h")
    assert provider._lock.acquire(blocking=False)
    provider._renew_after_fork()
    assert provider._lock.acquire(blocking=False)


def test_headers_of_a_request(mocked: Any) -> None:
    mocked.post("http://h/v1/chat/completions", json={"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]})
    OpenAIProvider(KEY, "http://h", headers={"X-Team": "blue"}).chat("q", model="m")
    request = mocked.calls[0].request
    assert dict(request.headers) == {
        "Content-Type": "application/json", "Accept": "application/json, text/event-stream", "Accept-Encoding": "identity",
        "User-Agent": f"copilot-router/{copilot_router.__version__}", "Authorization": f"Bearer {KEY}", "X-Team": "blue",
        "Content-Length": str(len(request.body)),
    }  # fmt: skip


def test_what_requests_does_for_each_call_is_done_once(mocked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mocked.post("http://h/v1/chat/completions", json={"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]})
    monkeypatch.setattr(requests.Session, "prepare_request", lambda *_: pytest.fail("prepared again"))
    provider = OpenAIProvider(KEY, "http://h")
    assert [provider.chat("q", model="m").text for _ in range(2)] == ["x", "x"]


def test_which_texts_may_be_echoed() -> None:
    """Names, ids and images are none: their letters may stand in any message."""
    message = {
        "role": "ROLE", "content": [{"type": "TYPE", "text": "one", "data": "DATA", "url": "URL"}], "name": "NAME",
        "tool_call_id": "ID", "tool_calls": [{"id": "ID", "function": {"name": "NAME", "arguments": "two"}}],
    }  # fmt: skip
    assert list(copilot_router._texts_of([message, ("three",), 4])) == ["one", "two", "three"]


def test_of_two_echoes_the_longer_is_hidden_first() -> None:
    assert copilot_router._masked("no: abcd bcde!", [], ["bcde", "abcd bcde"]) == "no: ***!"
    assert copilot_router._masked("no: abcd!", [], ["abcd", "other"]) == "no: ***!"


def test_extra_fields_lie_on_top(asked: Any) -> None:
    merged = copilot_router._merged
    assert merged({"a": {"b": 1, "c": 1}, "d": 1}, {"a": {"b": 2}, "d": {"e": 2}}) == {"a": {"b": 2, "c": 1}, "d": {"e": 2}}
    assert merged({"a": {"b": 1}}, {"a": 2}) == {"a": 2}
    call = asked._replace(options={"extra_body": {"a": 2}})
    assert call.finished({"a": 1, "b": 1}) == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("auto", ("auto", None)), ("none", ("none", None)), ("required", ("required", None)),
     ({"type": "function", "function": {"name": "f"}}, ("named", "f")), ({"type": "function", "name": "f"}, ("named", "f"))],
)  # fmt: skip
def test_forms_of_tool_choice(asked: Any, choice: Any, expected: Any) -> None:
    assert copilot_router._choice(asked._replace(options={"tool_choice": choice})) == expected
    assert copilot_router._choice(asked) == ("auto", None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_json_does_not_know(value: float) -> None:
    with pytest.raises(BadRequest, match=r"the request cannot be written as JSON: NaN, infinity or a cycle$"):
        copilot_router._dumped({"temperature": value})


def test_each_field_of_a_responses_request(asked: Any) -> None:
    call = asked._replace(tools=[FUNCTION], options={
        "parallel_tool_calls": False, "temperature": 0.1, "top_p": 0.2, "user": "u", "max_tokens": 5,
        "reasoning_effort": "low", "tool_choice": "required", "response_format": {"type": "json_object"},
    })  # fmt: skip
    assert copilot_router._responses_body(call, True) == {
        "model": "m", "store": False, "include": ["reasoning.encrypted_content"], "parallel_tool_calls": False,
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "q"}]}], "temperature": 0.1, "top_p": 0.2,
        "tools": [{"type": "function", "parameters": {"type": "object", "properties": {}}, "strict": False, "name": "f"}],
        "tool_choice": "required", "user": "u", "max_output_tokens": 5, "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"format": {"type": "json_object"}}, "stream": True,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["response.output_item.added", "response.reasoning_summary_text.delta"])
def test_signs_of_life_of_the_responses_api(asked: Any, kind: str) -> None:
    decoder = copilot_router._ResponsesDecoder(asked)
    assert decoded(decoder, {"type": "response.created"}) == ""
    assert not decoder.alive
    assert decoded(decoder, {"type": kind}) == ""
    assert decoder.alive


def test_anthropic_is_told_not_to_think(asked: Any) -> None:
    body = copilot_router._anthropic_body(asked._replace(options={"reasoning_effort": "none"}), False, {})
    assert body["thinking"] == {"type": "disabled"}


def test_geminis_unspecified_end_is_none(asked: Any) -> None:
    decoder = copilot_router._GeminiDecoder(asked, {})
    candidate = {"content": {"parts": [{"text": "x"}]}, "finishReason": "FINISH_REASON_UNSPECIFIED"}
    assert decoded(decoder, {"candidates": [candidate]}) == "x"
    assert not decoder.complete


@pytest.mark.parametrize(("effort", "level"), [("none", "LOW"), ("max", "XHIGH"), ("high", "HIGH"), ("minimal", "MINIMAL")])
def test_efforts_for_gemini(asked: Any, effort: str, level: str) -> None:
    config = copilot_router._gemini_config(asked._replace(options={"reasoning_effort": effort}))
    assert config == {"thinkingConfig": {"thinkingLevel": level, "includeThoughts": True}}


@pytest.mark.parametrize("price", [(1,), (1, 2, 3, 4, 5), 1, "12"])
def test_a_price_is_two_to_four_numbers(price: Any) -> None:
    with pytest.raises(ConfigError, match=r"prices=.*give \(prompt, completion"):
        ProviderTier("a", ScriptedProvider([]), prices=price)
    with pytest.raises(ConfigError, match=r"prices\['m'\]=.*give \(prompt, completion"):
        ProviderTier("a", ScriptedProvider([]), prices={"m": price})


def test_a_ping_of_a_chain_has_five_seconds_in_all() -> None:
    given: list[float] = []

    class Pinged(ScriptedProvider):
        def ping(self, timeout: float = 0.0) -> None:
            given.append(timeout)

    FailoverChain([ProviderTier("a", Pinged([]))]).ping()
    assert 4.5 < given[0] <= 5.0


def test_a_retry_that_would_come_at_the_deadline_is_none(clock: FakeClock) -> None:
    provider = ScriptedProvider([RateLimited(retry_after=1), "x"])
    chain = FailoverChain([ProviderTier("a", provider)], clock=clock, sleep=clock.sleep)
    with pytest.raises(RouterError):
        chain.chat("q", timeout=1)
    assert (clock.slept, len(provider.calls)) == ([], 1)


def test_each_refusal_gives_the_reason_of_its_own_time() -> None:
    events: list[Any] = []
    chain = FailoverChain([ProviderTier("a", ScriptedProvider([]))], on_event=events.append)
    told = []
    for reason in ("one", "two"):
        chain.tiers[0].breaker.open(60, reason)
        for _ in range(2):
            with pytest.raises(AllProvidersFailed) as caught:
                chain.chat("q")
            told.append(caught.value.attempts[0].error)
    assert told == [f"CircuitOpen: a is open ({reason})" for reason in ("one", "one", "two", "two")]
    assert [event.data["reason"] for event in events if event.kind == "skip"] == told


def test_a_nested_chain_that_used_nothing_costs_nothing() -> None:
    inner = FailoverChain([ProviderTier("in", ScriptedProvider([ServerError("no")]), retries=0)])
    answer = LLMResponse("x", usage=Usage(1_000_000, 0), model="m")
    tiers = [ProviderTier("out", inner, retries=0), ProviderTier("b", ScriptedProvider([answer]), ["m"], prices=(2, 3))]
    assert FailoverChain(tiers).chat("q").cost == 2


def test_params_for_a_provider_of_ones_own_are_its_business() -> None:
    provider = ScriptedProvider(["x"])
    chain = FailoverChain.from_config({"tier": [{"name": "a", "provider": provider, "params": {"odd": 1}}]})
    assert chain.chat("q").text == "x"
    assert provider.calls[0]["kwargs"]["odd"] == 1


def test_failures_that_are_counted_apart(clock: FakeClock) -> None:
    """A closed record's count is somebody else's; an open one's is told."""
    store = Wrapped(SharedMemory(clock=clock))
    store.shared_counts = False
    breaker = CircuitBreaker(store=store, name="b", clock=clock)
    assert store.swap("b", None, BreakerRecord(generation=5, failures=2))
    assert (breaker.state, breaker.snapshot().failures) == ("closed", 0)
    opened = BreakerRecord("open", 6, 6, failures=3, deadline=clock() + 50, span=50)
    assert store.swap("b", 5, opened)
    clock.advance(2)
    assert (breaker.state, breaker.snapshot().failures) == ("open", 3)


# -- states and orders


def test_a_tier_whose_trial_is_due_counts_as_ready(clock: FakeClock) -> None:
    breaker = CircuitBreaker(clock=clock)
    assert breaker._would_admit()
    breaker.open(5)
    assert not breaker._would_admit()
    clock.advance(5)
    assert breaker._would_admit()


def test_what_others_write_takes_no_failures_that_are_counted_apart(clock: FakeClock) -> None:
    """As long as the state is the one in which they were counted."""
    store = Wrapped(SharedMemory(clock=clock))
    store.shared_counts = False
    breaker = CircuitBreaker(store=store, name="b", clock=clock)
    assert store.swap("b", None, BreakerRecord(generation=5, era=3))
    for _ in range(2):
        breaker.admit().failure()
    assert store.swap("b", 5, BreakerRecord(generation=6, era=3))
    clock.advance(2)
    assert (breaker.state, breaker.snapshot().failures) == ("closed", 2)
    breaker.admit().failure()
    assert breaker.state == "open"


def test_a_redis_store_asks_once_and_lets_go() -> None:
    """A server that does not answer gets one connection for each operation: nothing is tried again."""
    with peer(lambda server, connection, request: False) as server:
        store = RedisStore(f"redis://127.0.0.1:{server.port}/0")
        with pytest.raises(Exception, match="Timeout reading"):
            store.load("b")
        assert server.connections == 1
        closed: list[bool] = []
        store._client = SimpleNamespace(connection_pool=SimpleNamespace(disconnect=lambda: closed.append(True)))
        store.close()
        assert closed == [True]


def test_chunks_count_and_a_length_beside_them_does_not() -> None:
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        head += b"Transfer-Encoding: chunked\r\nContent-Length: 9999\r\n\r\n"
        connection.sendall(head + chunked(event("x"), event(finish="stop")))
        return False

    with peer(serve) as server:
        assert OpenAIProvider(KEY, server.url).chat("q", model="m", timeout=5).text == "x"


def test_a_coding_that_nobody_knows(mocked: Any) -> None:
    mocked.post("http://h/v1/chat/completions", body=b"x", headers={"Content-Encoding": "br"})
    with pytest.raises(InvalidResponse, match="unknown Content-Encoding 'br'"):
        OpenAIProvider(KEY, "http://h/v1").chat("q", model="m")


def test_a_response_may_leave_its_output_to_the_events(asked: Any) -> None:
    item = {"type": "message", "content": [{"type": "output_text", "text": "x"}]}
    decoder = copilot_router._ResponsesDecoder(asked)
    decoded(decoder, {"type": "response.output_item.done", "item": item},
            {"type": "response.completed", "response": {"status": "completed"}})  # fmt: skip
    assert decoder.response().text == "x"
    with pytest.raises(copilot_router._InBandError) as caught:
        copilot_router._ResponsesDecoder(asked).feed_whole({})
    assert caught.value.body == {"error": {"message": "the response failed"}}


def test_a_chat_method_that_takes_no_tools_is_refused_at_once() -> None:
    class Odd:
        def chat(self, messages: Any, model: Any = None, timeout: float = 1.0) -> None: ...

    with pytest.raises(ConfigError, match=r"tier 'a': chat\(\) of Odd cannot be called"):
        ProviderTier("a", Odd())  # type: ignore[arg-type]


def test_a_retry_after_of_two_seconds_is_waited_out(clock: FakeClock) -> None:
    tier = ProviderTier("a", ScriptedProvider([RateLimited(retry_after=2.0), "x"]))
    assert FailoverChain([tier], clock=clock, sleep=clock.sleep).chat("q").text == "x"
    assert clock.slept == [2.0]


def test_an_answer_that_accept_refuses_has_not_given_up() -> None:
    tiers = [ProviderTier("a", ScriptedProvider(["weak"] * 2), ["small"]),
             ProviderTier("b", ScriptedProvider(["strong"] * 2), ["big"])]  # fmt: skip
    picky = FailoverChain(tiers, escalation_model="big", accept=lambda response: response.text == "strong")
    response = picky.chat("q")
    assert (response.text, response.escalation) == ("strong", "refused by accept")
    assert response.attempts[0].error == "refused by accept"
    never = FailoverChain(tiers, escalation_model="big", accept=lambda response: False)
    with pytest.raises(EscalationFailed) as caught:
        never.chat("q")
    assert caught.value.response is not None and caught.value.response.text == "strong"


def test_who_stands_on_the_ladder_goes_up_from_there() -> None:
    """By its name there, which may be an alias."""
    for models in (["mid", "top"], {"mid": "vendor/mid", "top": "vendor/top"}):
        provider = ScriptedProvider(["[ESCALATE] hard", "done"])
        chain = FailoverChain([ProviderTier("a", provider, models)], escalation_model=["mid", "top"])
        assert chain.chat("q", model="mid").text == "done"
        assert [call["model"] for call in provider.calls] == list(chain.tiers[0].models.values())


def test_an_escalation_has_more_patience() -> None:
    """Five times as much, even while a later tier is ready."""
    given: list[float] = []

    class Strong(OpenAIProvider):
        def chat(self, *_: Any, **kwargs: Any) -> LLMResponse:
            given.append(kwargs["first_token_timeout"])
            return LLMResponse("x")

    tiers = [ProviderTier("a", ScriptedProvider(["[ESCALATE]"]), ["small"]),
             ProviderTier("b", Strong(KEY, "http://h", first_token_timeout=1), ["big"]),
             ProviderTier("c", ScriptedProvider([]), ["other"])]  # fmt: skip
    chain = FailoverChain(tiers, escalation_model="big")
    assert chain.chat("q").text == "x"
    assert chain.chat("q", tiers=["b", "c"]).text == "x"
    assert given == [5, 1]


@pytest.mark.parametrize(
    ("environ", "tiers"),
    [
        ({"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "http://h/v1", "OPENAI_MODEL": "m"},
         [{"name": "openai", "models": ["m"],
           "provider": {"type": "openai", "api_key_env": "OPENAI_API_KEY", "base_url": "http://h/v1"}}]),
        ({"LMSTUDIO_BASE_URL": "http://l/v1"},
         [{"name": "lmstudio", "models": [], "provider": {"type": "lmstudio", "base_url": "http://l/v1"}}]),
        ({"LMSTUDIO_BASE_URL": "http://l/v1", "OPENAI_API_KEY": "k", "OPENAI_MODEL": "m"},
         [{"name": "lmstudio", "models": [], "provider": {"type": "lmstudio", "base_url": "http://l/v1"}},
          {"name": "openai", "models": ["m"], "provider": {"type": "openai", "api_key_env": "OPENAI_API_KEY"}}]),
        ({"OLLAMA_HOST": "h:1", "OLLAMA_MODEL": "o"},
         [{"name": "ollama", "models": ["o"], "provider": {"type": "ollama", "base_url": "h:1"}}]),
        ({"ANTHROPIC_BASE_URL": "http://u:p@h", "ANTHROPIC_MODEL": "a"},
         [{"name": "anthropic", "models": ["a"], "provider": {"type": "anthropic", "base_url_env": "ANTHROPIC_BASE_URL"}}]),
        ({"GEMINI_API_KEY": "k", "GEMINI_MODEL": "g"},
         [{"name": "gemini", "models": ["g"], "provider": {"type": "gemini", "api_key_env": "GEMINI_API_KEY"}}]),
        ({}, [{"name": "lmstudio", "models": [], "provider": {"type": "lmstudio", "base_url": "http://localhost:1234"}}]),
        ({"OPENAI_API_KEY": "k"},
         [{"name": "lmstudio", "models": [], "provider": {"type": "lmstudio", "base_url": "http://localhost:1234"}}]),
    ],
)  # fmt: skip
def test_what_init_switches_on(environ: dict[str, str], tiers: list[Any]) -> None:
    """What the environment has an address or key and a model for; LM Studio if there is nothing else."""
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    written = tomllib.loads(copilot_router._config_text("c.toml", environ))
    assert written["tier"] == tiers
    assert written["chain"] == {"timeout": 60.0, "failure_threshold": 3, "recovery_timeout": 15.0}


@pytest.mark.parametrize(
    ("module", "name"),
    [("billiard.exceptions", "SoftTimeLimitExceeded"), ("celery.exceptions", "SoftTimeLimitExceeded"),
     ("rq.timeouts", "BaseTimeoutException")],
)  # fmt: skip
def test_the_limits_of_task_queues_by_their_names(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    limit = type(name, (Exception,), {})
    assert not copilot_router._is_task_limit(limit())
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: limit}))
    assert copilot_router._is_task_limit(limit())
    assert not copilot_router._is_task_limit(ValueError())


def test_a_sqlite_store_lets_go_of_what_failed(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "b")
    store.load("b")
    first = store._connection
    with pytest.raises(sqlite3.OperationalError):
        store._run("no statement")
    assert store._connection is None
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        first.execute("SELECT 1")
    assert store.load("b")[0] is None
    store.close()


def test_a_place_is_waited_for_until_the_deadline(clock: FakeClock) -> None:
    """Where no later tier is ready; else not at all."""
    got: list[Any] = []
    for later in ([], [ProviderTier("b", ScriptedProvider([]))]):
        tier = ProviderTier("a", ScriptedProvider(["x"]), max_concurrency=1)
        tier._slots = SimpleNamespace(get=lambda block, timeout: got.append((block, timeout)), put=got.append)
        assert FailoverChain([tier, *later], clock=clock).chat("q", timeout=0.5).text == "x"
    assert got == [(True, 0.5), None, (False, 0.5), None]


def test_an_empty_body_is_called_so(mocked: Any) -> None:
    mocked.post("http://h/v1/chat/completions", body=b" \n")
    with pytest.raises(InvalidResponse, match="an empty body"):
        OpenAIProvider(KEY, "http://h/v1").chat("q", model="m")


def test_a_schema_for_gemini(asked: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    config = copilot_router._gemini_config(asked._replace(options={"response_format": wanted}))
    assert config == {"responseMimeType": "application/json", "responseJsonSchema": schema}


@pytest.mark.parametrize("name", ["accept", "on_event"])
def test_what_is_called_must_be_callable(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=5: give a function, or None"):
        FailoverChain([ProviderTier("a", ScriptedProvider([]))], **{name: 5})  # type: ignore[arg-type]


def test_a_tier_that_is_passed_over_keeps_its_model() -> None:
    tiers = [ProviderTier("a", ScriptedProvider([]), ["m"], supports_tools=False), ProviderTier("b", ScriptedProvider(["x"]))]
    response = FailoverChain(tiers).chat("q", [FUNCTION])
    assert response.attempts[0][:4] == ("a", "m", "skipped", "UnsupportedRequest: a takes no tools")


def test_a_setting_of_the_chain_beside_it() -> None:
    with pytest.raises(ConfigError, match=r"^unknown section 'timeout'\. It belongs under \[chain\]\. Known: chain, tier"):
        FailoverChain.from_config({"timeout": 5, "tier": [{"name": "a", "provider": ScriptedProvider([])}]})


def test_status_says_whose_state_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    alone = ProviderTier("a", ScriptedProvider([]))
    FailoverChain([alone])
    copilot_router._say_whose([alone])
    shared = ProviderTier("b", ScriptedProvider([]))
    store = Wrapped(SharedMemory())
    FailoverChain([shared], store=store)
    copilot_router._say_whose([shared])
    store.error = OSError()
    assert shared.breaker.state == "closed"
    copilot_router._say_whose([shared])
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", [
        "copilot-router: a: no [store] is configured: other processes' breakers are out of reach",
        "copilot-router: b: the store does not answer: other processes' breakers are out of reach",
    ])  # fmt: skip


# -- found by a reader


def test_threads_that_learn_the_same_at_once_all_answer() -> None:
    """Each was refused with the field that another one has just learned to leave out: each sends once more."""
    meet = threading.Barrier(4)

    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        if b"temperature" not in request:
            return answered(connection)
        meet.wait(10)
        body = b'{"error": {"message": "Unsupported parameter: temperature"}}'
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        return True

    with peer(serve) as server, one_tier(server.url) as chain:
        texts: list[str] = []
        threads = [threading.Thread(target=lambda: texts.append(chain.chat("q", temperature=0.5).text)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert texts == ["x"] * 4


@pytest.mark.parametrize(
    ("message", "quota", "kind"),
    [("You exceeded your current quota.", "GenerateRequestsPerMinutePerProjectPerModel-FreeTier", RateLimited),
     ("You exceeded your current quota.", "GenerateRequestsPerDayPerProjectPerModel-FreeTier", QuotaExceeded),
     ("You exceeded your current quota. limit: 0", "GenerateRequestsPerMinutePerProjectPerModel", QuotaExceeded)],
)  # fmt: skip
@pytest.mark.parametrize("delay", ["6s", "0s"])
def test_geminis_quota_of_a_minute_is_a_rate_limit(mocked: Any, message: str, quota: str, kind: type, delay: str) -> None:
    """It says "quota" of each of its limits; one that ends by itself within seconds is none."""
    details = [{"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": quota}]},
               {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}]  # fmt: skip
    body = {"error": {"code": 429, "message": message, "status": "RESOURCE_EXHAUSTED", "details": details}}
    mocked.post(re.compile("http://h/.*"), status=429, json=body)
    with pytest.raises(RateLimited) as caught:
        GeminiProvider(KEY, "http://h").chat("q", model="m")
    assert type(caught.value) is kind
    assert caught.value.retry_after == float(delay[0])


def test_calls_without_index_and_id_are_told_apart(asked: Any) -> None:
    """As llama.cpp writes them in whole JSON; a second name begins a second call."""
    calls = [{"id": "", "function": {"name": name, "arguments": json.dumps({"at": at})}}
             for at, name in enumerate(("f", "g", "g"))]  # fmt: skip
    whole = copilot_router._ChatDecoder(asked)
    whole.feed_whole({"choices": [{"message": {"tool_calls": calls}, "finish_reason": "tool_calls"}]})
    streamed = copilot_router._ChatDecoder(asked)
    decoded(streamed, *({"choices": [{"delta": {"tool_calls": [call]}}]} for call in calls))
    decoded(streamed, {"choices": [{"delta": {"tool_calls": [{"id": "c", "function": {"name": "h", "arguments": "{"}}]}}]},
            {"choices": [{"delta": {"tool_calls": [{"id": "c", "function": {"name": "h", "arguments": "}"}}]}}]},
            {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]})  # fmt: skip
    expected = [("f", {"at": 0}), ("g", {"at": 1}), ("g", {"at": 2})]
    assert [(call.name, call.arguments) for call in whole.response().tool_calls] == expected
    assert [(call.name, call.arguments) for call in streamed.response().tool_calls] == [*expected, ("h", {})]


def test_brackets_without_end(mocked: Any) -> None:
    """At no depth is it more than an answer that is none."""
    provider = OpenAIProvider(KEY, "http://h")
    for depth in range(200, 1400, 25):
        for status in (200, 500):
            mocked.post("http://h/v1/chat/completions", status=status, body="[" * depth + "]" * depth)
            with pytest.raises(ProviderError):
                provider.chat("q", model="m")
            mocked.post("http://h/v1/chat/completions", status=status, body='{"error":' * depth + "1" + "}" * depth)
            with pytest.raises(ProviderError):
                provider.chat("q", model="m")


def test_a_number_of_tokens_that_nobody_can_have_used(asked: Any) -> None:
    """It must not cost the answer."""
    assert copilot_router._count(2**53 - 1) == 2**53 - 1
    assert [copilot_router._count(value) for value in (2**53, 10**400, True, -1, 0, 1.5, "3", None)] == [0] * 8


def test_a_session_of_the_users_has_all_limits() -> None:
    """Patience for the first token too, and none at all where there is no limit."""

    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        server.stopping.wait(0.3)
        return answered(connection)

    with peer(serve) as server, requests.Session() as session:
        for limit, first in ((0.1, 5), (math.inf, math.inf)):
            limits = {"stall_timeout": limit, "first_token_timeout": first, "connect_timeout": first}
            provider = OpenAIProvider(KEY, server.url, session=session, **limits)
            assert provider.chat("q", model="m").text == "x"


def test_a_limit_whose_explanation_never_comes_is_still_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The headers have said it; the body has two seconds (here less)."""
    monkeypatch.setattr(copilot_router, "_TAIL_TIMEOUT", 0.1)

    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(b"HTTP/1.1 429 Slow\r\nRetry-After: 60\r\nContent-Length: 99\r\n\r\n{")
        server.stopping.wait(10)
        return False

    with peer(serve) as server:
        start = time.monotonic()
        with pytest.raises(RateLimited) as caught:
            OpenAIProvider(KEY, server.url).chat("q", model="m")
        assert time.monotonic() - start < 3
        assert caught.value.retry_after == 60


@pytest.mark.parametrize("odd", ['{"type": "ping"}', "oops", '{"choices": 5}', "[]"])
def test_what_follows_a_whole_answer_cannot_spoil_it(mocked: Any, odd: str) -> None:
    usage = '{"choices": [], "usage": {"prompt_tokens": 3}}'
    body = event("x") + event(finish="stop") + f"data: {odd}\n\ndata: {usage}\n\ndata: [DONE]\n\n".encode()
    mocked.post("http://h/v1/chat/completions", body=body, content_type="Text/Event-Stream")
    response = OpenAIProvider(KEY, "http://h").chat("q", model="m")
    assert (response.text, response.usage.prompt_tokens) == ("x", 3)


@pytest.mark.parametrize(("status", "state"), [(404, "closed"), (405, "closed"), (500, "open")])
def test_a_server_without_a_list_of_models_is_not_ill(mocked: Any, status: int, state: str) -> None:
    """The health says what the ping found; the breaker only counts what concerns answers."""
    mocked.get("http://h/v1/models", status=status, json={"error": {"message": "no"}})
    with one_tier("http://h") as chain:
        for _ in range(3):
            (health,) = chain.check()
        assert (health.breaker.state, health.last_error is None) == (state, False)


@pytest.mark.parametrize("indent", [None, 2])
def test_an_error_in_a_stream_may_have_several_lines(mocked: Any, indent: int | None) -> None:
    body = json.dumps({"error": {"code": 429, "message": "slow", "status": "RESOURCE_EXHAUSTED"}}, indent=indent)
    for end in ("", "\n", "\n\n"):
        mocked.post(re.compile("http://h/.*"), body=body + end, content_type="text/event-stream")
        with pytest.raises(RateLimited, match="slow"):
            GeminiProvider(KEY, "http://h").chat("q", model="m")


def test_json_wanted_by_the_tier_is_wanted() -> None:
    """No instruction to answer with something else, as where the call wants it."""
    for params, options, told in (
        ({"response_format": {"type": "json_object"}}, {}, False), ({}, {"response_format": {"type": "json_object"}}, False),
        ({"response_format": {"type": "json_object"}}, {"response_format": {"type": "text"}}, True), ({}, {}, True),
    ):  # fmt: skip
        provider = ScriptedProvider(["{}"])
        tiers = [ProviderTier("a", provider, ["m"], params=params), ProviderTier("b", ScriptedProvider([]), ["s"])]
        FailoverChain(tiers, escalation_model="s").chat("q", **options)
        assert (len(provider.calls[0]["messages"]) == 2) is told


@pytest.mark.parametrize(
    "url", ["user:hunter2@host/v1", "htp://user:hunter2@host", "user:hun/ter2@host", "host/v1?key=hunter2"]
)
def test_an_address_that_is_refused_shows_no_password(url: str) -> None:
    with pytest.raises(ConfigError, match=r"base_url\)='(\*\*\*@)?host(/v1)?': give a URL"):
        OpenAIProvider(KEY, url)


def test_our_own_headers_are_no_secrets(mocked: Any) -> None:
    told = "Content-Type must be application/json, not identity; X-Team blue-team"
    mocked.post("http://h/v1/chat/completions", status=415, json={"error": {"message": told}})
    with pytest.raises(BadRequest) as caught:
        OpenAIProvider(KEY, "http://h", headers={"X-Team": "blue-team"}).chat("q", model="m")
    assert str(caught.value) == "Content-Type must be application/json, not identity; X-Team ***"


def test_what_a_think_block_could_begin_with_comes_once(asked: Any) -> None:
    decoder = copilot_router._ResponsesDecoder(asked)
    item = {"type": "message", "content": [{"type": "output_text", "text": "<"}]}
    decoded(decoder, {"type": "response.output_text.delta", "delta": "<"},
            {"type": "response.completed", "response": {"status": "completed", "output": [item]}})  # fmt: skip
    assert decoder.response().text == "<"


def test_one_choice_of_several_is_taken(asked: Any) -> None:
    decoder = copilot_router._ChatDecoder(asked)
    pieces = [(0, "A1 "), (1, "B1 "), (0, "A2 "), (None, "A3"), (1, "B2")]
    texts = decoded(decoder, *({"choices": [{"index": at, "delta": {"content": text}}]} for at, text in pieces),
                    {"choices": [{"index": 1, "delta": {}, "finish_reason": "length"}]},
                    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})  # fmt: skip
    assert texts == "A1 A2 A3"
    assert decoder.response().finish_reason == "stop"


def test_an_exception_of_its_reader_is_not_the_streams(clock: FakeClock) -> None:
    """A generator's own exception is, also when it answers one that was thrown in."""
    breaker = CircuitBreaker(1, clock=clock)

    @breaker
    def stream(own: bool) -> Any:
        try:
            yield 1
        except ValueError:
            if own:
                raise ServerError("no") from None
            raise

    for own, raised, state in ((False, ValueError, "closed"), (True, ServerError, "open")):
        running = stream(own)
        assert next(running) == 1
        with pytest.raises(raised):
            running.throw(ValueError("mine"))
        assert breaker.state == state


def test_a_price_may_stand_under_an_alias() -> None:
    answer = LLMResponse("x", usage=Usage(1_000_000, 0))
    prices = {"fast": (2, 3), "other": (5, 5)}
    tier = ProviderTier("a", ScriptedProvider([answer]), {"fast": "vendor-1"}, prices=prices)
    assert FailoverChain([tier]).chat("q").cost == 2
    both = ProviderTier("a", ScriptedProvider([answer]), {"fast": "vendor-1"}, prices={"vendor-1": (7, 3), "fast": (2, 3)})
    assert FailoverChain([both]).chat("q").cost == 7


# -- what the last mutants got past


def test_a_cause_decides_only_for_a_broken_stream() -> None:
    limited, broken = RateLimited(retry_after=5), StreamInterrupted()
    limited.__cause__ = ValueError()
    broken.__cause__ = limited
    assert copilot_router._verdict(limited) == copilot_router._verdict(broken) == ("park", 5)
    hints = [copilot_router._verdict(RateLimited(retry_after=seconds))[1] for seconds in (0.5, -1, 9999, None)]
    assert hints == [0.5, 0, 3600, None]


def test_a_success_is_no_recovery(clock: FakeClock) -> None:
    """It resets what was counted, and the next opening is as long as the first."""
    breaker = CircuitBreaker(2, 5, max_recovery_timeout=100, clock=clock)
    breaker.admit().failure()
    assert breaker.call(lambda: 1) == 1
    assert (breaker.snapshot().failures, breaker.snapshot().reason) == (0, "")
    for _ in range(2):
        breaker.admit().failure()
    assert breaker.retry_after == 5


def test_a_trial_at_the_moment_of_a_fork_is_the_parents(clock: FakeClock) -> None:
    """The child may make its own at once; it is no new opening."""
    breaker = CircuitBreaker(1, 5, clock=clock)
    breaker.admit().failure()
    clock.advance(5)
    assert breaker.admit().is_trial
    breaker._renew_after_fork()
    assert (breaker.state, breaker.snapshot().opened) == ("open", 1)
    assert breaker.admit().is_trial


def test_what_a_store_of_ones_own_need_not_say(clock: FakeClock) -> None:
    class Store:
        def load(self, name: str) -> Any:
            return None, 0.0

        def swap(self, *_: Any) -> bool:
            return True

    view = CircuitBreaker(name="b", store=Store(), clock=clock)._shared
    assert view is not None
    assert (view._refresh, view._shared_counts, view.shares_local_errors) == (1.0, False, False)
    assert MemoryStore.refresh == 0.0


def test_a_store_has_a_limit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"SQLiteStore\(timeout\)=inf: give a finite number"):
        SQLiteStore(tmp_path / "b", timeout=math.inf)
    store = SQLiteStore(tmp_path / "b")
    store.load("b")
    parents = store._connection
    store._renew_after_fork()
    assert (store._connection, store._inherited) == (None, [parents])
    parents.close()


def test_the_time_of_redis() -> None:
    class Pipeline:
        def hget(self, *_: Any) -> Any:
            return self

        def time(self) -> Any:
            return self

        def execute(self) -> Any:
            return None, (10, 500_000)

    store = RedisStore("redis://127.0.0.1:1/0")
    store._client = SimpleNamespace(pipeline=lambda transaction: Pipeline())
    assert store.load("b") == (None, 10.5)


def test_limits_of_one_request() -> None:
    limits = copilot_router._Limits(9, 5, 1, 2, (3, 4))
    assert 4 < limits.connect_left() <= 5
    assert 0 < limits.left() <= 1
    assert (limits.silence, limits.suspicious) == (1, 3)
    limits.progress()
    assert (limits.silence, limits.suspicious) == (2, 4)
    assert 1 < limits.left() <= 2
    provider = OpenAIProvider(KEY, "http://h")
    assert 4 < provider._limits({"first_token_timeout": 60}, time.monotonic() + 5).left() <= 5


def test_a_stream_that_was_given_up_takes_its_connection_along() -> None:
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        if len(server.requests) > 1:
            return answered(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 9999\r\n\r\n" + event("x"))
        server.stopping.wait(10)
        return False

    with peer(serve) as server, one_tier(server.url) as chain:
        with chain.stream("q") as stream:
            assert next(stream) == "x"
        assert chain.chat("q").text == "x"
        assert server.connections == 2


def test_one_byte_too_few_is_truncated() -> None:
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 3\r\n\r\n{}")
        return False

    with peer(serve) as server, pytest.raises(InvalidResponse, match="truncated: 2 of 3 bytes"):
        OpenAIProvider(KEY, server.url).chat("q", model="m", timeout=5)


def test_chunked_json_beside_a_length() -> None:
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        body = b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}'
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Transfer-Encoding: chunked\r\nContent-Length: 9999\r\n\r\n" + chunked(body))
        return False

    with peer(serve) as server:
        assert OpenAIProvider(KEY, server.url).chat("q", model="m", timeout=5).text == "x"


@pytest.mark.parametrize("code", ["tool_use_failed", "json_validate_failed"])
def test_a_models_own_failure_is_no_bad_request(code: str) -> None:
    assert copilot_router._class_of(copilot_router._ErrorFacts(codes=(code,)), 400, "m", False) is InvalidResponse


def test_more_facts_of_errors() -> None:
    facts = copilot_router._error_facts
    assert facts({"error_description": "x"}).message == "x"
    assert facts({"detail": [{"msg": "a"}, {"msg": "b"}, {}]}).message == "a; b; "
    assert (facts({"param": "user"}).param, facts({"param": 5}).param) == ("user", "")
    assert facts({"error": {"error": [{"message": "deep"}]}}).message == "deep"
    assert facts([]) == facts(None) == facts({"error": True}) == copilot_router._ErrorFacts()


@pytest.mark.parametrize("what", ["requests", "tokens", "input-tokens", "output-tokens"])
def test_which_limit_is_used_up(what: str) -> None:
    headers = {f"x-ratelimit-reset-{what}": "7s", f"x-ratelimit-remaining-{what}": "0", "x-ratelimit-reset-other": "9s"}
    assert copilot_router._retry_hint(headers, copilot_router._ErrorFacts(), True) == 7
    assert copilot_router._retry_hint(headers, copilot_router._ErrorFacts(), False) is None
    headers[f"x-ratelimit-remaining-{what}"] = "1"
    assert copilot_router._retry_hint(headers, copilot_router._ErrorFacts(), True) is None


def test_forms_of_numbers_and_texts(asked: Any) -> None:
    assert copilot_router._in_words("try again in 2 m") == 120
    assert copilot_router._in_words("try again in 1 h") == 3600
    assert copilot_router._duration("about 5s") is None
    assert copilot_router._json(b"\xef\xbb\xbf {}\r\n", "x") == {}
    with pytest.raises(InvalidResponse):
        copilot_router._json("X{}", "x")
    assert copilot_router._safe("a.b", r"[^a-z]", 64) == "a_b_1eef715d"
    assert copilot_router._sendable(" a b ", "x") == "a b"
    assert copilot_router._chat_usage({"prompt_cache_hit_tokens": 5}) == Usage(0, 0, 5)


def test_pieces_of_answers(asked: Any) -> None:
    gemini = copilot_router._GeminiDecoder(asked, {})
    part = {"candidates": [{"content": {"parts": [{"text": "x"}]}}]}
    assert decoded(gemini, [part, part]) == "xx"
    called = {"candidates": [{"content": {"parts": [{"functionCall": {"id": "c", "name": "f"}}]}, "finishReason": "STOP"}]}
    decoded(gemini, called)
    assert gemini.response().tool_calls[0].id == "c"
    chat = copilot_router._ChatDecoder(asked)
    assert decoded(chat, {"choices": [{"delta": None, "finish_reason": "stop"}]}) == ""
    history = copilot_router._repaired([{"role": "user", "content": "q"}, CALLED[1], *CALLED[2:]])
    later = copilot_router._ChatDecoder(asked._replace(messages=history))
    later.feed_whole({"choices": [{"message": {"tool_calls": [{"function": {"name": "f"}}]}, "finish_reason": "tool_calls"}]})
    assert later.response().tool_calls[0].id == "call_3"


def test_keep_alives_are_no_progress(asked: Any) -> None:
    """What generates is; a comment, or an event without anything in it, is not."""
    steps: list[str] = []
    limits = SimpleNamespace(silence=1.0, progress=lambda: steps.append("progress"))
    idle = b'data: {"choices": [{"delta": {}}]}\n\n'
    answer: Any = SimpleNamespace(limits=limits, chunks=lambda: iter([b": ping\n\n", idle, event("x"), b": ping\n\n", idle]))
    decoder = copilot_router._ChatDecoder(asked)
    read = OpenAIProvider(KEY, "http://h")._read_events(answer, copilot_router._SSE(), decoder, True)
    assert list(read) == ["x"]
    assert steps == ["progress"]


def test_a_failure_without_a_model_names_none(mocked: Any) -> None:
    mocked.post("http://h/v1/chat/completions", status=500, json={"error": {"message": "no"}})
    with pytest.raises(ServerError) as caught:
        LMStudioProvider(base_url="http://h").chat("q")
    assert caught.value.model == ""


def test_an_unknown_limit_has_another_name(mocked: Any) -> None:
    """Also where the error does not say which."""
    url = "http://h/v1/chat/completions"
    mocked.post(url, status=400, json={"error": {"message": "Unsupported parameter: 'max_tokens'"}})
    mocked.post(url, json={"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]})
    assert OpenAIProvider(KEY, "http://h").chat("q", model="m", max_tokens=5).text == "x"
    assert "max_completion_tokens" in json.loads(mocked.calls[1].request.body)


@pytest.mark.parametrize(("effort", "think"), [("none", False), ("minimal", "low"), ("xhigh", "max"), ("high", "high")])
def test_efforts_for_ollama(asked: Any, effort: str, think: Any) -> None:
    assert copilot_router._ollama_body(asked._replace(options={"reasoning_effort": effort}), False)["think"] == think


def test_the_longest_name_for_gemini(asked: Any) -> None:
    tools = [{"type": "function", "function": {"name": "a" * length}} for length in (64, 65)]
    body = GeminiProvider(KEY)._prepare(asked._replace(tools=tools), True)[1]
    names = [item["name"] for item in body["tools"][0]["functionDeclarations"]]
    assert names[0] == "a" * 64
    assert len(names[1]) == 64


def test_the_health_of_a_tier(clock: FakeClock) -> None:
    closed: list[bool] = []

    class Provider(ScriptedProvider):
        def close(self) -> None:
            closed.append(True)

        def chat(self, *_: Any, **__: Any) -> LLMResponse:
            clock.advance(3)
            return LLMResponse("x")

    with FailoverChain([ProviderTier("a", Provider([]), ["m"])], clock=clock) as chain:
        assert chain.chat("q").model == "m"
        (health,) = chain.health()
    assert (health.calls, health.failures, health.last_error, health.last_latency) == (1, 0, None, 3)
    assert closed == [True]


def test_a_trial_that_time_was_too_short_for_is_handed_on(clock: FakeClock) -> None:
    tier = ProviderTier("a", ScriptedProvider([]), max_concurrency=1)
    chain = FailoverChain([tier], clock=clock, failure_threshold=1, recovery_timeout=5)
    tier.breaker.admit().failure()
    clock.advance(5)
    tier._slots = SimpleNamespace(get=lambda block, timeout: clock.advance(100), put=lambda _: None)
    with pytest.raises(DeadlineExceeded, match="no time left to ask it"):
        chain.chat("q", timeout=7)
    assert tier.breaker.state == "open"


def test_an_emergency_tier_is_always_ready() -> None:
    """The tier before it has no more patience than with any other behind it."""
    given: list[float] = []

    class First(OpenAIProvider):
        def chat(self, *_: Any, **kwargs: Any) -> LLMResponse:
            given.append(kwargs["first_token_timeout"])
            return LLMResponse("x")

    tiers = [ProviderTier("a", First(KEY, "http://h", first_token_timeout=1), ["m"]),
             ProviderTier("b", ScriptedProvider([]), role="emergency")]  # fmt: skip
    chain = FailoverChain(tiers)
    tiers[1].breaker.open(60)
    assert chain.chat("q").text == "x"
    assert given == [1]


def test_our_own_time_is_not_the_tiers_fault(clock: FakeClock) -> None:
    """Also where a provider says what its client raised."""

    def late(*_: Any, **__: Any) -> str:
        clock.advance(10)
        raise ProviderTimeout("late", code="attempt_timeout") from TimeoutError()

    tier = ProviderTier("a", ScriptedProvider([late]))
    with pytest.raises(DeadlineExceeded):
        FailoverChain([tier], clock=clock).chat("q", timeout=10)
    assert tier.breaker.snapshot().failures == 0


def test_tokens_that_a_nested_chain_used_without_a_price() -> None:
    used = ServerError("no")
    used.usage = Usage(5, 5)
    inner = FailoverChain([ProviderTier(name, ScriptedProvider([error]), retries=0)
                           for name, error in (("in", used), ("too", ServerError("no")))])  # fmt: skip
    tiers = [ProviderTier("out", inner, retries=0), ProviderTier("b", ScriptedProvider(["x"]), ["m"], prices=(2, 3))]
    response = FailoverChain(tiers).chat("q")
    assert (response.cost, response.total_usage) == (None, Usage(5, 5))
    assert tiers[0]._health().last_latency < 60  # type: ignore[operator]


def test_a_wait_may_take_all_that_is_allowed(clock: FakeClock) -> None:
    tier = ProviderTier("a", ScriptedProvider([RateLimited(retry_after=30), "x"]))
    assert FailoverChain([tier], clock=clock, sleep=clock.sleep).chat("q", wait=30).text == "x"
    assert clock.slept == [30]


def test_options_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert copilot_router._parser().parse_args(["check"]).timeout == 5.0
    with pytest.raises(SystemExit) as caught:
        main(["chat", "--provider", "nobody", "q"])
    assert caught.value.code == 2
    assert "invalid choice: 'nobody'" in capsys.readouterr().err


def test_a_tier_without_a_model_is_skipped_without_one() -> None:
    tiers = [ProviderTier("a", ScriptedProvider([]), supports_tools=False), ProviderTier("b", ScriptedProvider(["x"]))]
    assert FailoverChain(tiers).chat("q", [FUNCTION]).attempts[0].model == ""


# -- and the last of them


def test_words_that_policies_and_messages_are_made_of(clock: FakeClock) -> None:
    assert (StreamInterrupted.then, StreamInterrupted.breaker) == ("raise", "failure")
    assert copilot_router._near("zzz", ["a"]) == ""
    assert copilot_router._arguments_text(ToolCall("1", "f", {"a": 1}, "raw")) == "raw"
    assert copilot_router._arguments_text(ToolCall("1", "f")) == ""
    assert copilot_router._after_marker("[ESCALATE]: X", "[ESCALATE]") == "X"
    breaker = CircuitBreaker(1, 5, name="b", clock=clock)
    breaker.admit().failure("down")
    clock.advance(5)
    assert breaker.admit().is_trial
    with pytest.raises(CircuitOpen) as caught:
        breaker.admit()
    assert str(caught.value) == "b is trying again with one call (down)"


def test_a_trial_that_is_handed_on_keeps_its_patience() -> None:
    """How often a lease ran out counts until somebody has a verdict."""
    old = BreakerRecord("half_open", takeovers=3)
    assert copilot_router._opened(old, 0, 0, 1, "", opened=False).takeovers == 3
    assert copilot_router._opened(old, 0, 0, 1, "").takeovers == 0
    assert (MemoryStore.shared_counts, MemoryStore.shares_local_errors) == (True, True)


def test_a_refusal_and_an_empty_answer_say_whose_they_are() -> None:
    for finish, kind, message in (("content_filter", ContentFiltered, "refused by a safety system"),
                                  ("stop", EmptyResponse, "neither text nor tool call"),
                                  ("length", EmptyResponse, "cut by the token limit before any text")):  # fmt: skip
        with pytest.raises(kind) as caught:
            copilot_router._checked_answer(LLMResponse(" ", model="m", finish_reason=finish))
        assert (str(caught.value), caught.value.model) == (message, "m")


def test_silence_beyond_the_providers_own_limit_is_the_servers() -> None:
    """Also where it was given more patience, and the time of the call ended first."""
    for own, code in ((0, "first_token_timeout"), (10, "attempt_timeout")):
        late = copilot_router._Limits(0, 9, 10, 10, (own, own)).expired()
        assert late is not None
        assert late.code == code
    assert copilot_router._Limits(99, 9, 99, 99, (0, 0)).expired() is None  # there is time left


def test_each_address_has_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Socket:
        def __init__(self, *_: Any) -> None: ...

        def settimeout(self, seconds: float) -> None:
            told.append(round(seconds, 1))

        def setsockopt(self, *option: Any) -> None:
            told.append(option)

        def connect(self, address: Any) -> None:
            raise TimeoutError

        def close(self) -> None:
            told.append("closed")

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", "one"), (0, 0, 0, "", "two")])
    monkeypatch.setattr(socket, "socket", Socket)
    connection = SimpleNamespace(_dns_host="h", port=80, socket_options=[(6, 1, 1)])
    with pytest.raises(Exception, match="connect timeout") as caught:
        copilot_router._connect(connection, copilot_router._Limits(60, 8, 9, 9, (9, 9)))
    assert type(caught.value).__name__ == "ConnectTimeoutError"
    assert told == [4.0, (6, 1, 1), "closed", 8.0, (6, 1, 1), "closed"]


def test_the_largest_answer(mocked: Any) -> None:
    body = json.dumps({"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}).encode()
    compressed = zlib.compressobj(wbits=31)
    packed = compressed.compress(body) + compressed.flush()
    mocked.post("http://h/v1/chat/completions", body=body)
    assert OpenAIProvider(KEY, "http://h", max_response_bytes=len(body)).chat("q", model="m").text == "x"
    with pytest.raises(InvalidResponse, match=f"larger than max_response_bytes={len(body) - 1}"):
        OpenAIProvider(KEY, "http://h", max_response_bytes=len(body) - 1).chat("q", model="m")
    mocked.post("http://p/v1/chat/completions", body=packed, headers={"Content-Encoding": "X-GZip"})
    assert OpenAIProvider(KEY, "http://p").chat("q", model="m").text == "x"


def test_a_field_of_an_event_needs_no_space() -> None:
    assert copilot_router._SSE().feed(b"event:error\ndata:x\n\n") == [("error", b"x")]
    assert copilot_router._SSE().feed(b"event: error\ndata: x\n\n") == [("error", b"x")]


def test_what_a_filter_says_where() -> None:
    """Its words count under the statuses that such a refusal has; a code counts anywhere."""
    told = copilot_router._ErrorFacts("flagged as unsafe")
    for status in (200, 400, 403, 422):
        assert copilot_router._class_of(told, status, None, False) is ContentFiltered
    assert copilot_router._class_of(told, 500, None, False) is ServerError
    facts = copilot_router._error_facts({"innererror": {"code": "ResponsibleAIPolicyViolation"}})
    assert facts.codes == ("responsibleaipolicyviolation",)
    assert copilot_router._class_of(facts, 500, None, False) is ContentFiltered
    for status in (404, 410):
        assert copilot_router._class_of(copilot_router._ErrorFacts("this model is gone"), status, "m", False) is ModelNotFound
        assert copilot_router._class_of(copilot_router._ErrorFacts("gone"), status, "m", False) is ProviderUnavailable


def test_odd_forms_of_what_is_known(asked: Any) -> None:
    headers = {"x-ratelimit-reset-requests": "7s", "x-ratelimit-remaining-requests": " "}
    assert copilot_router._retry_hint(headers, copilot_router._ErrorFacts(), True) == 7
    assert copilot_router._masked("bad sk-abcdefgh!", [], []) == "bad ***!"
    orphan = {"role": "tool", "tool_call_id": "c", "content": "fine"}
    assert copilot_router._repaired([orphan]) == [{"role": "user", "content": "Result of a tool call: fine"}]
    call = asked._replace(messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "q"}])
    system, turns = copilot_router._conversation(call, "x")
    assert (system, [(turn.role, turn.parts) for turn in turns]) == ("s", [("user", [("text", "", "q")])])


def test_a_ping_ends_in_its_time() -> None:
    with peer(lambda server, connection, request: bool(server.stopping.wait(10))) as server:
        start = time.monotonic()
        with pytest.raises(ProviderTimeout):
            OpenAIProvider(KEY, server.url).ping(0.2)
        assert time.monotonic() - start < 2


def test_whose_answer_is_none_has_no_model(mocked: Any) -> None:
    mocked.post("http://h/v1/chat/completions", body="oops")
    with pytest.raises(InvalidResponse) as caught:
        LMStudioProvider(base_url="http://h").chat("q")
    assert caught.value.model == ""


def test_a_resend_says_what_it_changed(mocked: Any) -> None:
    url = "http://h/v1/chat/completions"
    told: list[Any] = []
    for message in ("Unsupported parameter: 'max_tokens'", "Unsupported parameter: 'seed'"):
        mocked.post(url, status=400, json={"error": {"message": message}})
        mocked.post(url, json={"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]})
        OpenAIProvider(KEY, "http://h").chat("q", model="m", max_tokens=5, seed=1, on_resend=told.append)
    assert told == [{"field": "token_limit", "change": "replace"}, {"field": "seed", "change": "drop"}]


@pytest.mark.parametrize(
    ("prompt", "told"), [(False, None), (True, "reply with [ESCALATE]"), ("or {marker}", "or [ESCALATE]")]
)
def test_what_weaker_models_are_told(prompt: bool | str, told: str | None) -> None:
    for kind in ("text", "json_object", "json_schema"):
        provider = ScriptedProvider(["x"])
        tiers = [ProviderTier("a", provider, ["m"]), ProviderTier("b", ScriptedProvider([]), ["s"])]
        FailoverChain(tiers, escalation_model="s", escalation_prompt=prompt).chat("q", response_format={"type": kind})
        first = provider.calls[0]["messages"][0]
        if told is None or kind != "text":
            assert first == {"role": "user", "content": "q"}
        else:
            assert first["role"] == "system"
            assert told in first["content"]


def test_of_two_tiers_one_open_and_one_that_cannot_take_it() -> None:
    """What was asked decides: the error itself, since waiting would not help."""
    events: list[Any] = []
    tiers = [ProviderTier("a", ScriptedProvider([])), ProviderTier("b", ScriptedProvider([BadRequest("no")]))]
    chain = FailoverChain(tiers, on_event=events.append)
    tiers[0].breaker.open(60)
    with pytest.raises(BadRequest) as caught:
        chain.chat("q")
    assert caught.value.model == ""
    assert [(event.tier, event.model) for event in events if event.kind == "done"] == [("", "")]


def test_when_to_come_back_to_a_tier_that_is_still_closed() -> None:
    tier = ProviderTier("a", ScriptedProvider([ServerError("no", retry_after=1.5)]), retries=0)
    with pytest.raises(AllProvidersFailed) as caught:
        FailoverChain([tier]).chat("q")
    assert caught.value.retry_after == 1.5


def test_a_listener_that_fails_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    FailoverChain([ProviderTier("a", ScriptedProvider(["x"]))], on_event=lambda event: 1 / 0).chat("q")
    assert "on_event failed" in caplog.messages


def test_the_command_line_asks_only_the_tiers_that_it_is_told(mocked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"OPENAI_API_KEY": KEY, "OPENAI_MODEL": "m", "OLLAMA_HOST": "http://h", "OLLAMA_MODEL": "m"}.items():
        monkeypatch.setenv(name, value)
    answer = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}
    mocked.post("https://api.openai.com/v1/chat/completions", json=answer)
    assert main(["chat", "--tiers", "openai", "q"]) == 0
    assert len(mocked.calls) == 1


def test_a_server_in_trouble_says_nothing_of_keys() -> None:
    told = copilot_router._ErrorFacts("invalid api key")
    kinds = [copilot_router._class_of(told, status, None, False) for status in (400, 499, 500, 503)]
    assert kinds == [AuthenticationError, AuthenticationError, ServerError, ServerError]


def test_a_key_in_redis() -> None:
    assert RedisStore("redis://127.0.0.1:1/0")._key("a:b") == "copilot_router:a%3Ab"
    assert RedisStore("redis://127.0.0.1:1/0", "my app")._key("a") == "my%20app:a"


def test_a_message_with_nothing_in_it_is_no_turn(asked: Any) -> None:
    call = asked._replace(messages=[{"role": role, "content": text} for role, text in
                                    (("user", "q"), ("assistant", ""), ("user", "r"))])  # fmt: skip
    assert [turn.parts for turn in copilot_router._conversation(call, "x")[1]] == [[("text", "", "q"), ("text", "", "r")]]


def test_a_strict_tool_for_anthropic(asked: Any) -> None:
    function = {"name": "f", "description": "d", "strict": True, "parameters": {"type": "object"}}
    call = asked._replace(tools=[{"type": "function", "function": function}])
    assert copilot_router._anthropic_tools(call, [], {"f": "f"})["tools"] == [
        {"name": "f", "input_schema": {"type": "object"}, "description": "d", "strict": True}
    ]
