"""Every fault of the fault server through ``chat()``: what comes out, when, after how many requests, and the breaker after."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any


import pytest
import requests
from support.faults import DIALECTS, FAULTS, Dialect, FaultServer, answer_to, descriptors, fault_server

from copilot_router import (
    AllProvidersFailed,
    AuthenticationError,
    BadRequest,
    ContentFiltered,
    ContextLengthExceeded,
    DeadlineExceeded,
    EmptyResponse,
    FailoverChain,
    InvalidResponse,
    ModelNotFound,
    OpenAIProvider,
    Overloaded,
    ProviderError,
    ProviderTier,
    ProviderTimeout,
    ProviderUnavailable,
    QuotaExceeded,
    RateLimited,
    RouterError,
    ServerError,
    UnsupportedRequest,
)

KEY = "sk-test-faults-key-5678901234"
PROMPT = "the secret question about "
#: Seconds that a call may take although its first tier is ill: the longest silence, a pause, and a slow machine's own time.
SOON = 1.0
#: Seconds for a call that nobody can answer.
DEADLINE = 0.6
#: The silence limits of the tier that is ill, and its memory limit.
LIMITS: dict[str, Any] = {"first_token_timeout": 0.3, "stall_timeout": 0.3, "max_response_bytes": 300_000}


class ANSWER:
    """Expected of a row: the complete answer of the tier itself."""


#: What ``requests.post(..., timeout=1).json()["choices"][0]["message"]["content"]`` makes of a fault.
HELD = "held long past its timeout"
WRONG = "took something for the answer that is not"
RAW = "failed with KeyError, TypeError, JSONDecodeError or the like, which says nothing about the cause"
HONEST = "failed with an exception that names the trouble"
RIGHT = "got the answer"
FOOLED = (HELD, WRONG, RAW)


@dataclass
class Row:
    """One fault, and all that is expected of it."""

    fault: str
    expect: type
    naive: str
    requests: int = 1  #: at the tier that is ill
    breaker: str = "closed 1"  #: afterwards: state and failures, or seconds until it lets somebody through
    within: float = SOON  #: seconds that the call takes at the most with a healthy second tier
    calls: int = 1
    timeout: float | None = None  #: of the tier
    options: dict[str, Any] = field(default_factory=dict)
    told: Callable[[str], str] = str  #: what becomes of the text
    alone: type | None = None  #: expected when nobody else can be asked and time is short, if that is something else


ROWS = [
    Row("healthy", ANSWER, RIGHT, 1, "closed 0"),
    Row("healthy_without_end_marker", ANSWER, RIGHT, 1, "closed 0"),
    Row("healthy_without_finish_reason", ANSWER, RIGHT, 1, "closed 0"),
    Row("healthy_until_closed", ANSWER, RIGHT, 1, "closed 0"),
    Row("healthy_http_1_0", ANSWER, RIGHT, 1, "closed 0"),
    Row("healthy_after_keep_alives", ANSWER, RIGHT, 1, "closed 0"),
    Row("healthy_then_silence", ANSWER, HONEST, 1, "closed 0"),
    Row("healthy_then_reset", ANSWER, HONEST, 1, "closed 0"),
    Row("continue_first", ANSWER, RIGHT, 1, "closed 0"),
    Row("early_hints_first", ANSWER, RAW, 2, "closed 0", calls=2),
    Row("invalid_utf8", ANSWER, WRONG, 1, "closed 0", told=lambda text: text.replace("answer", "ans\ufffder")),
    Row("compressed", ANSWER, RIGHT, 1, "closed 0"),
    Row("endless_status_line", ProviderTimeout, HELD),
    Row("dripped_status_line", ProviderTimeout, HELD),
    Row("dripped_headers", ProviderTimeout, HELD),
    Row("dripped_body", ProviderTimeout, HELD),
    Row("dripped_chunk_size", ProviderTimeout, HELD),
    Row("dripped_refusal", ServerError, HELD, 2, "closed 2", within=6.0),
    Row("keep_alives_for_ever", ProviderTimeout, HELD),
    Row("blank_lines_for_ever", ProviderTimeout, HELD),
    Row("keep_alives_in_the_middle", ProviderTimeout, HELD),
    Row("nothing_but_a_beginning", ProviderTimeout, HELD),
    Row("silence", ProviderTimeout, HONEST),
    Row("silence_after_headers", ProviderTimeout, HONEST),
    Row("silence_after_the_beginning", ProviderTimeout, HONEST),
    Row("stall", ProviderTimeout, HONEST),
    Row("late_first_token", ProviderTimeout, HONEST),
    Row("stall_after_20_tokens", ProviderTimeout, HONEST),
    Row("long_content_length", ProviderTimeout, HONEST),
    Row("slow_tokens", ProviderTimeout, HELD, timeout=0.5),
    Row("endless_interim_answers", ProviderTimeout, HELD),
    Row("endless_early_hints", ProviderTimeout, RAW),
    Row("reset_before_headers", ServerError, HONEST, 2, "closed 2"),
    Row("closed_before_headers", ServerError, HONEST, 2, "closed 2"),
    Row("closed_in_the_status_line", InvalidResponse, HONEST),
    Row("closed_in_the_headers", InvalidResponse, RAW),
    Row("reset_in_the_headers", ServerError, HONEST, 2, "closed 2"),
    Row("closed_after_headers", InvalidResponse, RAW),
    Row("cut_chunked", InvalidResponse, HONEST),
    Row("cut_between_chunks", InvalidResponse, HONEST),
    Row("cut_until_closed", InvalidResponse, RAW),
    Row("cut_after_40_tokens", InvalidResponse, RAW),
    Row("short_content_length", InvalidResponse, HONEST),
    Row("content_length_too_short", InvalidResponse, RAW),
    Row("ended_too_early", InvalidResponse, RAW),
    Row("cut_in_a_character", InvalidResponse, RAW),
    Row("reset_in_the_body", InvalidResponse, HONEST),
    Row("closed_while_idle", ANSWER, RIGHT, 2, "closed 0", calls=2),
    Row("dropped_on_reuse", ANSWER, RIGHT, 3, "closed 0", calls=2),
    Row("a_second_answer", ANSWER, RIGHT, 2, "closed 0", calls=2),
    Row("not_http", InvalidResponse, HONEST),
    Row("html_without_headers", InvalidResponse, HONEST),
    Row("huge_header", InvalidResponse, HONEST),
    Row("too_many_headers", InvalidResponse, HONEST),
    Row("bad_chunk_size", InvalidResponse, HONEST),
    Row("switching_protocols", InvalidResponse, RAW, 2, "closed 2", calls=2),
    Row("no_content", InvalidResponse, RAW),
    Row("empty_body", InvalidResponse, RAW),
    Row("strange_content_length", ANSWER, RIGHT, 1, "closed 0"),
    Row("enormous_content_length", InvalidResponse, RAW),
    Row("redirect_302", InvalidResponse, WRONG),
    Row("redirect_307", InvalidResponse, WRONG),
    Row("redirect_without_location", InvalidResponse, RAW),
    Row("endless_body", InvalidResponse, HELD),
    Row("endless_line", InvalidResponse, HELD),
    Row("endless_text", InvalidResponse, HELD),
    Row("endless_refusal", InvalidResponse, HELD),
    Row("gzip_bomb", InvalidResponse, RAW),
    Row("invalid_gzip", InvalidResponse, HONEST),
    Row("cut_gzip", InvalidResponse, RAW),
    Row("unknown_coding", InvalidResponse, RIGHT),
    Row("html", InvalidResponse, RAW),
    Row("html_as_stream", InvalidResponse, RAW),
    Row("json_as_stream", InvalidResponse, RAW),
    Row("wrong_content_type", InvalidResponse, RAW),
    Row("invalid_json", InvalidResponse, RAW),
    Row("deep_json", InvalidResponse, RAW),
    Row("garbled_event", InvalidResponse, RAW),
    Row("server_error_once", ANSWER, RAW, 2, "closed 0"),
    Row("reset_once", ANSWER, HONEST, 2, "closed 0"),
    Row("rate_limited_once", ANSWER, RAW, 2, "closed 0"),
    Row("rate_limited_for_two_seconds", ANSWER, RAW, 2, "closed 0", within=3.0, alone=RateLimited),
    Row("error_in_a_stream", Overloaded, RAW, 2, "closed 2"),
    Row("error_instead_of_a_stream", Overloaded, RAW, 2, "closed 2"),
    Row("hint_seconds", RateLimited, RAW, 1, "open 30"),
    Row("hint_float", RateLimited, RAW, 1, "open 30"),
    Row("hint_milliseconds", RateLimited, RAW, 1, "open 30"),
    Row("hint_milliseconds_first", RateLimited, RAW, 1, "open 30"),
    Row("hint_hours", RateLimited, RAW, 1, "open 3600"),
    Row("hint_nonsense", RateLimited, RAW, 1, "open 15"),
    Row("hint_negative", RateLimited, RAW, 1, "open 15"),
    Row("hint_nan", RateLimited, RAW, 1, "open 15"),
    Row("hint_infinite", RateLimited, RAW, 1, "open 15"),
    Row("hint_huge", RateLimited, RAW, 1, "open 3600"),
    Row("hint_past_date", RateLimited, RAW, 2, "open 0"),
    Row("hint_impossible_date", RateLimited, RAW, 1, "open 15"),
    Row("hint_reset_duration", RateLimited, RAW, 1, "open 90"),
    Row("hint_absent", RateLimited, RAW, 1, "open 15"),
    Row("hint_date", RateLimited, RAW, 1, "open 30"),
    Row("page_404", ProviderUnavailable, RAW),
    Row("page_408", ProviderTimeout, RAW),
    Row("page_409", ServerError, RAW, 2, "closed 2"),
    Row("page_413", BadRequest, RAW, 1, "closed 0"),
    Row("page_425", ServerError, RAW, 2, "closed 2"),
    Row("page_500", ServerError, RAW, 2, "closed 2"),
    Row("page_502", ServerError, RAW, 2, "closed 2"),
    Row("page_503", ServerError, RAW, 2, "closed 2"),
    Row("page_504", ServerError, RAW, 2, "closed 2"),
    Row("page_520", ServerError, RAW, 2, "closed 2"),
    Row("page_529", Overloaded, RAW, 2, "closed 2"),
    Row("page_600", InvalidResponse, RAW),
    Row("page_401", AuthenticationError, RAW, 1, "open 600"),
    Row("page_403", AuthenticationError, RAW, 1, "open 600"),
    Row("page_429", RateLimited, RAW, 1, "open 15"),
    Row("page_402", QuotaExceeded, RAW, 1, "open 600"),
    Row("page_410", ProviderUnavailable, RAW),
    Row("bad_request", BadRequest, RAW, 1, "closed 0"),
    Row("error_is_text", BadRequest, RAW, 1, "closed 0"),
    Row("error_is_a_list", BadRequest, RAW, 1, "closed 0"),
    Row("error_is_a_number", ServerError, RAW, 2, "closed 2"),
    Row("error_is_null", ServerError, RAW, 2, "closed 2"),
    Row("detail_list", BadRequest, RAW, 1, "closed 0"),
    Row("top_level_error", BadRequest, RAW, 1, "closed 0"),
    Row("invalid_key", AuthenticationError, RAW, 1, "open 600"),
    Row("country", AuthenticationError, RAW, 1, "open 600"),
    Row("no_model", ModelNotFound, RAW, 1, "closed 0"),
    Row("no_model_vllm", ModelNotFound, RAW, 1, "closed 0"),
    Row("no_model_loaded", ModelNotFound, RAW, 1, "closed 0"),
    Row("wrong_path", ProviderUnavailable, RAW),
    Row("context_length", ContextLengthExceeded, RAW, 1, "closed 0"),
    Row("context_length_vllm", ContextLengthExceeded, RAW, 1, "closed 0"),
    Row("context_length_500", ContextLengthExceeded, RAW, 1, "closed 0"),
    Row("context_length_200", ContextLengthExceeded, RAW, 1, "closed 0"),
    Row("too_large_for_the_limit", ContextLengthExceeded, RAW, 1, "closed 0"),
    Row("no_quota", QuotaExceeded, RAW, 1, "open 600"),
    Row("spend_limit", QuotaExceeded, RAW, 1, "open 600"),
    Row("no_balance", QuotaExceeded, RAW, 1, "open 600"),
    Row("hint_in_the_body", RateLimited, RAW, 1, "open 20"),
    Row("policy", ContentFiltered, RAW, 1, "closed 0"),
    Row("policy_azure", ContentFiltered, RAW, 1, "closed 0"),
    Row("moderation", ContentFiltered, RAW, 1, "closed 0"),
    Row("no_tools", UnsupportedRequest, RAW, 1, "closed 0"),
    Row("failed_tool_call", InvalidResponse, RAW),
    Row("loading", Overloaded, RAW, 2, "closed 2"),
    Row("overloaded_503", Overloaded, RAW, 2, "closed 2"),
    Row("capacity", Overloaded, RAW, 2, "closed 2"),
    Row("server_error", ServerError, RAW, 2, "closed 2"),
    Row("nothing_said", ServerError, RAW, 2, "closed 2"),
    Row("code_superscript", ServerError, RAW, 2, "closed 2"),
    Row("message_to_search_for_ever", BadRequest, RAW, 1, "closed 0"),
    Row("message_is_an_object", BadRequest, RAW, 1, "closed 0"),
    Row("error_200", ServerError, RAW, 2, "closed 2"),
    Row("error_200_text", InvalidResponse, RAW),
    Row("error_200_list", RateLimited, RAW, 1, "open 15"),
    Row("error_200_choice", ServerError, RAW, 2, "closed 2"),
    Row("error_200_reason", InvalidResponse, WRONG),
    Row("empty_text", EmptyResponse, WRONG),
    Row("no_text", EmptyResponse, WRONG),
    Row("blank_text", EmptyResponse, WRONG),
    Row("no_message", InvalidResponse, RAW),
    Row("message_is_text", InvalidResponse, RAW),
    Row("message_is_a_list", InvalidResponse, RAW),
    Row("content_is_a_number", InvalidResponse, WRONG),
    Row("content_is_an_object", InvalidResponse, WRONG),
    Row("content_is_true", InvalidResponse, WRONG),
    Row("content_is_an_empty_list", EmptyResponse, WRONG),
    Row("finish_is_a_number", InvalidResponse, WRONG),
    Row("calls_are_text", InvalidResponse, WRONG),
    Row("calls_are_numbers", InvalidResponse, WRONG),
    Row("call_without_a_name", InvalidResponse, WRONG),
    Row("arguments_are_a_list", InvalidResponse, WRONG),
    Row("no_choices", InvalidResponse, RAW),
    Row("choices_absent", InvalidResponse, RAW),
    Row("choices_null", InvalidResponse, RAW),
    Row("choices_text", InvalidResponse, RAW),
    Row("choices_object", InvalidResponse, RAW),
    Row("choices_of_null", InvalidResponse, RAW),
    Row("choices_of_text", InvalidResponse, RAW),
    Row("choice_is_empty", InvalidResponse, RAW),
    Row("body_is_a_list", EmptyResponse, RAW),
    Row("body_is_text", InvalidResponse, RAW),
    Row("body_is_a_number", InvalidResponse, RAW),
    Row("body_is_null", InvalidResponse, RAW),
    Row("body_is_empty", InvalidResponse, RAW),
    Row("cut_by_length", EmptyResponse, WRONG, 1, "closed 0"),
    Row("filtered", ContentFiltered, WRONG, 1, "closed 0"),
    Row("refused", ContentFiltered, WRONG, 1, "closed 0"),
    Row("event_is_text", InvalidResponse, RAW),
    Row("event_is_a_number", InvalidResponse, RAW),
    Row("event_is_null", InvalidResponse, RAW),
    Row("event_is_a_list", InvalidResponse, RAW),
    Row("event_is_an_empty_list", ANSWER, RAW, 1, "closed 0"),
    Row("event_without_choices", InvalidResponse, RAW),
    Row("event_choices_text", InvalidResponse, RAW),
    Row("event_choice_null", InvalidResponse, RAW),
    Row("event_delta_text", InvalidResponse, RAW),
    Row("event_content_number", InvalidResponse, RAW),
    Row("event_cut_json", InvalidResponse, RAW),
    Row("event_named_error", ServerError, RAW, 2, "closed 2"),
    Row("event_old_error", ServerError, RAW, 2, "closed 2"),
    Row("event_error_text", InvalidResponse, RAW),
    Row("event_error_list", InvalidResponse, RAW),
    Row("event_finish_error", InvalidResponse, RAW),
    Row("echoes_the_request", BadRequest, RAW, 1, "closed 0"),
    Row("echoes_the_request_in_headers", InvalidResponse, RAW),
    Row("echoes_the_key_as_coding", InvalidResponse, RIGHT),
    Row("strange_but_complete", ANSWER, RIGHT, 1, "closed 0"),
    Row("stream_by_the_book", ANSWER, RIGHT, 1, "closed 0", told=lambda text: text.replace("answer", "ans\u2028er")),
    Row("healthy_without_prefill", ANSWER, RIGHT, 1, "closed 0"),
    Row("refuses_a_hint", ANSWER, RAW, 2, "closed 0", options={"temperature": 0.2}),
]
BY_NAME = {row.fault: row for row in ROWS}
each_fault = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.fault)


def tier(name: str, server: FaultServer, model: str, **settings: Any) -> ProviderTier:
    timeout = settings.pop("timeout", None)
    return ProviderTier(name, OpenAIProvider(KEY, server.url, **settings), [model], timeout=timeout)


def alone(server: FaultServer, row: Row) -> FailoverChain:
    """A chain of this one tier, which does not pause before it asks again."""
    return FailoverChain([tier("ill", server, row.fault, **LIMITS)], timeout=DEADLINE, sleep=lambda seconds: None)


def stands(chain: FailoverChain, expected: str) -> bool:
    """Whether the breaker of the ill tier is as the row says; seconds are rounded, and a date has no fractions."""
    state, _, number = expected.partition(" ")
    seen = chain.tiers[0].breaker.snapshot()
    near = seen.failures == int(number) if state == "closed" else abs((seen.retry_after or 0.0) - int(number)) <= 1
    return seen.state == state and near


def test_the_table_is_complete() -> None:
    """One row for every fault that there is; enough of them, and enough that fool a client of one line."""
    assert set(BY_NAME) == set(FAULTS)
    assert len(BY_NAME) == len(ROWS) >= 45
    assert sum(row.naive in FOOLED for row in ROWS) >= 40


@each_fault
def test_a_healthy_second_tier_answers(row: Row) -> None:
    """Soon, in full, from whoever can; the attempts and the breaker are as the table says."""
    with fault_server() as ill, fault_server() as well:
        tiers = [tier("ill", ill, row.fault, timeout=row.timeout, **LIMITS), tier("well", well, "healthy")]
        with FailoverChain(tiers) as chain:
            for call in range(row.calls):
                prompt = f"{PROMPT}{row.fault} {call}"
                start = time.monotonic()
                if row.expect is ContentFiltered:
                    with pytest.raises(ContentFiltered) as refused:
                        chain.chat(prompt, timeout=5, **row.options)
                    attempts = refused.value.attempts
                else:
                    response = chain.chat(prompt, timeout=5, **row.options)
                    attempts = response.attempts
                    assert response.provider == ("ill" if row.expect is ANSWER else "well")
                    assert response.text == row.told(answer_to(prompt))
                assert time.monotonic() - start < row.within
                failed = [attempt.error or "" for attempt in attempts if attempt.outcome == "failed"]
                if row.expect is ANSWER:
                    assert attempts[-1].outcome == "ok"
                else:
                    assert {text.partition(":")[0] for text in failed} == {row.expect.__name__}
            assert ill.count(row.fault) == row.requests
            assert [entry.prompt for entry in ill.log] == sorted(entry.prompt for entry in ill.log)
            assert stands(chain, row.breaker)


@each_fault
def test_alone_it_fails_in_time(row: Row) -> None:
    """With nobody else to ask: the error's class as the table says, never later than the deadline allows."""
    prompt = f"{PROMPT}{row.fault}"
    expected: Any = row.alone or row.expect
    with fault_server() as ill, alone(ill, row) as chain:
        start = time.monotonic()
        try:
            response = chain.chat(prompt, **row.options)
        except RouterError as error:
            taken = time.monotonic() - start
            failure: Any = error
        else:
            taken = time.monotonic() - start
            failure = None
            assert response.text == row.told(answer_to(prompt))
        assert taken < DEADLINE * 1.05 + 0.1
        assert (failure is None) == (expected is ANSWER)
        if isinstance(failure, AllProvidersFailed):
            assert {type(error) for error in failure.errors} == {expected}
            assert failure.__cause__ is failure.errors[0]
            assert isinstance(failure, DeadlineExceeded) == (taken >= DEADLINE)
        elif failure is not None:
            assert type(failure) is expected
            assert expected.breaker == "neutral"
        if failure is not None:
            assert issubclass(expected, ProviderError)
            assert failure.attempts[0].tier == "ill"
            assert prompt not in f"{failure} {failure!r} {failure.attempts}"
            assert KEY not in f"{failure} {failure!r} {failure.attempts}"


@pytest.mark.parametrize("dialect", DIALECTS[1:], ids=lambda dialect: dialect.name)
def test_every_wire_format_is_as_safe(dialect: type[Dialect]) -> None:
    """What HTTP does to Chat Completions it does to all: the same outcome for every fault that is not the format's own."""
    rows = [row for row in ROWS if FAULTS[row.fault].only is None]

    def run(row: Row) -> str:
        with fault_server(dialect()) as ill, fault_server(dialect()) as well:
            tiers = [
                ProviderTier("ill", dialect().client(KEY, ill.url, **LIMITS), [row.fault], timeout=row.timeout),
                ProviderTier("well", dialect().client(KEY, well.url), ["healthy"]),
            ]
            with FailoverChain(tiers) as chain:
                for call in range(row.calls):
                    prompt = f"{PROMPT}{row.fault} {call}"
                    start = time.monotonic()
                    response = chain.chat(prompt, timeout=5)
                    taken = time.monotonic() - start
                    text = row.told(answer_to(prompt)) if response.provider == "ill" else answer_to(prompt)
                    assert response.text == text, row.fault
                assert taken < row.within + 1, row.fault  # four at a time
                assert response.provider == ("ill" if row.expect is ANSWER else "well"), row.fault
                if row.expect is not ANSWER:
                    classes = {(attempt.error or "").partition(":")[0] for attempt in response.attempts[:-1]}
                    assert classes == {row.expect.__name__}, row.fault
                assert ill.count(row.fault) == row.requests, row.fault
                assert stands(chain, row.breaker), row.fault
        return row.fault

    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(run, rows))) > 90


def test_a_gzip_bomb_is_stopped_by_the_clock_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty kilobytes of compressed blank lines are much work; the deadline is looked at in between."""
    monkeypatch.setattr("support.faults.BOMB", gzip.compress(b"\n" * 40_000_000))
    with fault_server() as ill:
        chain = FailoverChain([ProviderTier("ill", OpenAIProvider(KEY, ill.url), ["gzip_bomb"])], timeout=0.3)
        start = time.monotonic()
        with chain, pytest.raises(RouterError):
            chain.chat(PROMPT)
        assert time.monotonic() - start < 0.3 * 1.05 + 0.1


def naive(server: FaultServer, model: str) -> str:
    """The client of one line, and what it made of the fault."""
    question = {"model": model, "messages": [{"role": "user", "content": PROMPT}]}
    try:
        content = requests.post(
            server.url + "/chat/completions", json=question, timeout=1
        ).json()["choices"][0]["message"]["content"]
    except requests.exceptions.JSONDecodeError:
        return RAW
    except requests.exceptions.RequestException:
        return HONEST
    except Exception:
        return RAW
    return RIGHT if content == answer_to(PROMPT) else WRONG


def test_what_the_faults_do_to_a_client_of_one_line() -> None:
    """The column says so, and here it is tried: all faults at once, one thread each."""
    server = FaultServer()
    with ThreadPoolExecutor(len(ROWS)) as pool:
        try:
            futures = {row.fault: pool.submit(naive, server, row.fault) for row in ROWS}
            wait(futures.values(), timeout=4)
            seen = {name: future.result() if future.done() else HELD for name, future in futures.items()}
        finally:
            server.stop()
    assert seen == {row.fault: row.naive for row in ROWS}


def test_nothing_is_left_of_them() -> None:
    """After every fault that breaks or abandons a connection: no descriptor and no thread more than before."""
    names = [name for name, row in BY_NAME.items() if row.expect in (InvalidResponse, ServerError)]
    with fault_server() as ill:
        provider = OpenAIProvider(KEY, ill.url, **LIMITS)
        chain = FailoverChain([ProviderTier("ill", provider, names, retries=0)], failure_threshold=10_000)
        for name in names[:3]:
            with pytest.raises(RouterError):
                chain.chat(PROMPT, model=name)
        before, threads = descriptors(), threading.active_count()
        for name in names:
            with pytest.raises(RouterError):
                chain.chat(PROMPT, model=name, timeout=5)
        chain.close()
        deadline = time.monotonic() + 5
        while (descriptors() > before or threading.active_count() > threads) and time.monotonic() < deadline:
            threading.Event().wait(0.01)  # the server's own ends
        assert descriptors() <= before
        assert threading.active_count() <= threads
