"""Forty traps of the vendors' wire formats, by number, each through a real provider against a server that sets it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from test_transport import HEAD, Peer, peer
from vendors import KEY, Anthropic, Chat, Gemini, Ollama, Raw, Reply, Responses, Vendor, detour, named_events, sse, stream

from copilot_router import (
    _SSE,
    AnthropicProvider,
    AuthenticationError,
    BadRequest,
    ContentFiltered,
    ContextLengthExceeded,
    EmptyResponse,
    FailoverChain,
    GeminiProvider,
    InvalidResponse,
    LLMProvider,
    LMStudioProvider,
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
    ScriptedProvider,
    ServerError,
    StreamInterrupted,
    UnsupportedRequest,
    Usage,
)

TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}]  # fmt: skip
USER = {"role": "user", "content": "q"}
KINDS: dict[type[Vendor], Any] = {
    Chat: OpenAIProvider, Responses: OpenAIProvider, Anthropic: AnthropicProvider, Gemini: GeminiProvider,
    Ollama: OllamaProvider,
}  # fmt: skip


def called(*calls: tuple[str, str], text: str | None = None) -> dict[str, Any]:
    """An assistant's message with calls of f: ids and arguments."""
    made = [{"id": one, "type": "function", "function": {"name": "f", "arguments": text}} for one, text in calls]
    return {"role": "assistant", "content": text, "tool_calls": made}


def result(call_id: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


@contextmanager
def met(
    kind: type[Vendor], *script: Any, provider: Any = None, fake: dict[str, Any] | None = None, **settings: Any
) -> Iterator[tuple[Any, Any]]:
    """A fake vendor and a provider that speaks to it."""
    with kind(*script, **(fake or {})) as server:
        made = (provider or KINDS[kind])(KEY, server.url, **settings)
        try:
            yield server, made
        finally:
            made.close()


@contextmanager
def openai(*script: Any, fake: dict[str, Any] | None = None, **settings: Any) -> Iterator[tuple[Any, Any]]:
    """OpenAI's own address, which leads to a fake that also has the Responses API."""
    with Responses(*script, **(fake or {})) as server, detour(server) as session:
        yield server, OpenAIProvider(KEY, session=session, **settings)


def chain_of(*providers: LLMProvider, model: str = "m-1", **settings: Any) -> FailoverChain:
    """One tier for each, named a, b, …"""
    return FailoverChain([ProviderTier(name, one, [model]) for name, one in zip("abc", providers, strict=False)], **settings)


def failure(provider: Any, messages: Any = "q", model: str = "m-1", **options: Any) -> ProviderError:
    """The error of a call."""
    with pytest.raises(ProviderError) as raised:
        provider.chat(messages, model=model, **options)
    return raised.value


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    """A chunk of Chat Completions."""
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def piece(arguments: Any = None, name: str | None = None, **fields: Any) -> dict[str, Any]:
    """A chunk with a piece of a tool call."""
    return delta(tool_calls=[{**fields, "function": {**({} if name is None else {"name": name}), "arguments": arguments}}])


STOP = delta("stop")


def message_stream(*events: dict[str, Any]) -> Raw:
    """A scripted stream of Anthropic's events."""
    return Raw(named_events(list(events)), kind="text/event-stream")


def started(**usage: int) -> dict[str, Any]:
    return {"type": "message_start", "message": {"model": "m-1", "content": [], "usage": usage}}


def block(at: int, **fields: Any) -> dict[str, Any]:
    return {"type": "content_block_start", "index": at, "content_block": fields}


def grows(at: int, kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": at, "delta": {"type": kind, **fields}}


def stops(reason: str | None, **usage: int | None) -> dict[str, Any]:
    return {"type": "message_delta", "delta": {"stop_reason": reason}, "usage": usage}


END = {"type": "message_stop"}


def candidate(*parts: Any, finish: str | None = "STOP", **fields: Any) -> dict[str, Any]:
    """An answer of Gemini's."""
    return {"candidates": [{"content": {"role": "model", "parts": list(parts)}, "finishReason": finish}], **fields}


def lines(*items: Any) -> Raw:
    """A scripted stream of Ollama's."""
    return Raw("".join(json.dumps(item) + "\n" for item in items).encode(), kind="application/x-ndjson")


CLAUDES = {"models": ("claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5", "claude-haiku-4-5")}


def test_trap_01_sampling_parameters_that_a_model_refuses() -> None:
    """Dropped after the provider's own 400 and remembered, instead of listed; a model that takes them keeps them."""
    with met(Anthropic, fake=CLAUDES) as (server, provider):
        assert provider.chat("q", model="claude-opus-5-5", temperature=0.2).text == "ok"
        provider.chat("q", model="claude-opus-5-5", temperature=0.2)
        assert ["temperature" in body for body in server.bodies] == [True, False, False]
        provider.chat("q", model="claude-haiku-4-5", temperature=0.2)
        assert server.bodies[3]["temperature"] == 0.2
        assert server.requests[3].headers["anthropic-version"] == "2023-06-01"
        assert len(server.requests) == 4


def test_trap_02_a_forced_tool_choice_that_a_model_refuses() -> None:
    """UnsupportedRequest by the provider's own error, and the next tier; never weakened to auto, no model is listed."""
    with met(Anthropic, Reply(calls=[("f", {})]), fake=CLAUDES) as (server, provider):
        error = failure(provider, model="claude-sonnet-5-5", tools=TOOLS, tool_choice="required")
        assert isinstance(error, UnsupportedRequest)
        assert len(server.requests) == 1
        response = provider.chat("q", TOOLS, "claude-haiku-5-5", tool_choice="required")
        assert server.bodies[1]["tool_choice"] == {"type": "any"}
        assert response.has_tool_calls
        chain = chain_of(provider, ScriptedProvider(["from b"]), model="claude-sonnet-5-5")
        assert chain.chat("q", TOOLS, tool_choice="required").provider == "b"


def test_trap_03_a_history_that_ends_with_the_assistant() -> None:
    """A user's turn "Continue." follows, at Anthropic and at Gemini."""
    history = [USER, {"role": "assistant", "content": "So"}]
    with met(Anthropic) as (server, provider):
        provider.chat(history, model="m-1")
        assert server.bodies[0]["messages"][-1] == {"role": "user", "content": [{"type": "text", "text": "Continue."}]}
    with met(Gemini) as (server, provider):
        provider.chat(history, model="m-1")
        assert server.bodies[0]["contents"][-1] == {"role": "user", "parts": [{"text": "Continue."}]}


def test_trap_04_tool_results_stand_together_and_first() -> None:
    """One user turn [result, result, text]; a lost result is made up as an error; an orphaned one becomes text."""
    history = [USER, called(("a", "{}"), ("b", "{}"), ("c", "{}")), result("b", "two"), result("a", " "), result("z", "lost"),
               {"role": "user", "content": "and now?"}]  # fmt: skip
    with met(Anthropic) as (server, provider):
        provider.chat(history, TOOLS, "m-1")
        _, _, last = server.bodies[0]["messages"]
        kinds = [(one["type"], one.get("tool_use_id"), one.get("is_error")) for one in last["content"]]
        assert kinds[:3] == [("tool_result", "a", None), ("tool_result", "b", None), ("tool_result", "c", True)]
        assert [one["content"] for one in last["content"][:2]] == ["(empty)", [{"type": "text", "text": "two"}]]
        assert [one["text"] for one in last["content"][3:]] == ["Result of a tool call: lost", "and now?"]
        provider.chat([USER, called(("a", "{}"))], TOOLS, "m-1")
        assert server.bodies[1]["messages"][2]["content"][0]["is_error"] is True
        assert not server.refusals


def test_trap_05_tool_ids_of_other_vendors() -> None:
    """Made valid alike on both sides; ids that differ only in bad characters stay distinct; so do names."""
    ids = ["functions.Bash:0", "functions.Bash 0", "", "call_x__thought__c2ln+bmF0/dXJl", "fine-1"]
    history = [USER, called(*((one, "{}") for one in ids)), *(result(one, one or "empty") for one in ids)]
    with met(Anthropic) as (server, provider):
        provider.chat(history, TOOLS, "m-1")
        _, says, answers = server.bodies[0]["messages"]
        sent = [one["id"] for one in says["content"]]
        assert [one["tool_use_id"] for one in answers["content"]] == sent
        assert len(set(sent)) == len(ids)
        assert sent[-1] == "fine-1"
        assert [one["content"][0]["text"] for one in answers["content"]] == [one or "empty" for one in ids]
    assert [call["id"] for call in history[1]["tool_calls"]] == ids


def test_trap_06_thinking_is_bound_to_its_model() -> None:
    """Another model sees none of it; the same model gets it back byte for byte, or the server would refuse."""
    reply = Reply("let me see", [("f", {"city": "Oslo"})], thinking="a thought")
    with met(Anthropic, reply) as (server, provider):
        response = provider.chat([USER], TOOLS, "m-1")
        history = [USER, json.loads(json.dumps(response.message)), result(response.tool_calls[0].id, "cold")]
        assert provider.chat(history, TOOLS, "m-1").text == "ok"
        thought, text, use = server.bodies[1]["messages"][1]["content"]
        assert thought == {
            "type": "thinking", "thinking": "a thought", "signature": server.signature(server.bodies[0], 1, "a thought"),
        }  # fmt: skip
        assert (text["text"], use["input"]) == ("let me see", {"city": "Oslo"})
        assert provider.chat(history, TOOLS, "m-2").text == "ok"
        assert [one["type"] for one in server.bodies[2]["messages"][1]["content"]] == ["text", "tool_use"]
        assert "a thought" not in json.dumps(server.bodies[2])
        assert "copilot_router" not in json.dumps(server.bodies)


def test_trap_07_content_is_a_list_of_blocks() -> None:
    """[thinking, text, text, tool_use] in full, unknown blocks passed over; [] is an empty answer, or a refusal."""
    content = [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "server_tool_use", "id": "x"},
               {"type": "text", "text": "one "}, {"type": "text", "text": "two"},
               {"type": "tool_use", "id": "t", "name": "f", "input": {"city": "Oslo"}}]  # fmt: skip
    whole = {"model": "m-1", "content": content, "stop_reason": "tool_use", "usage": {}}
    events = [started(), block(0, type="thinking", thinking="", signature=""), grows(0, "thinking_delta", thinking="hm"),
              grows(0, "signature_delta", signature="s"), block(1, type="text", text=""), grows(1, "text_delta", text="one "),
              block(2, type="text", text=""), grows(2, "citations_delta", citation={}), grows(2, "text_delta", text="two"),
              block(3, type="tool_use", id="t", name="f", input={"city": "Oslo"}), {"type": "news"},
              stops("tool_use"), END]  # fmt: skip
    empty = [Raw({**whole, "content": [], "stop_reason": reason}) for reason in ("end_turn", "refusal")]
    with met(Anthropic, Raw(whole), message_stream(*events), *empty) as (_, provider):
        for _ in range(2):
            response = provider.chat("q", TOOLS, "m-1")
            assert (response.text, response.reasoning, response.finish_reason) == ("one two", "hm", "tool_calls")
            assert [call.arguments for call in response.tool_calls] == [{"city": "Oslo"}]
        assert isinstance(failure(provider), EmptyResponse)
        assert isinstance(failure(provider), ContentFiltered)


def test_trap_08_anthropic_counts_the_cache_apart() -> None:
    """input_tokens leaves the cache out: 10 + 100 written + 1000 read are a prompt of 1110; null counts as nothing."""
    usage = {"input_tokens": 10, "cache_creation_input_tokens": 100, "cache_read_input_tokens": 1000, "output_tokens": 7}
    content = [{"type": "text", "text": "x"}]
    raws = [Raw({"content": content, "stop_reason": "end_turn", "usage": given})
            for given in (usage, {**usage, "cache_creation_input_tokens": None, "cache_read_input_tokens": None})]  # fmt: skip
    with met(Anthropic, *raws) as (_, provider):
        assert provider.chat("q", model="m-1").usage == Usage(1110, 7, 1000, 100)
        assert provider.chat("q", model="m-1").usage == Usage(10, 7)


def test_trap_09_usage_in_message_delta_is_cumulative() -> None:
    """5, then 9: that is 9; the counts of the prompt may be repeated, or null."""
    for again in (10, None):
        events = [started(input_tokens=10, output_tokens=1), block(0, type="text", text="x"), stops(None, output_tokens=5),
                  stops("end_turn", input_tokens=again, output_tokens=9), END]  # fmt: skip
        with met(Anthropic, message_stream(*events)) as (_, provider):
            assert provider.chat("q", model="m-1").usage == Usage(10, 9)


def test_trap_10_an_error_event_inside_a_stream() -> None:
    """overloaded_error is Overloaded, although the status is 200; a reader who has text is told that it broke."""
    oops = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}, "request_id": "req_2"}
    raw = message_stream(started(), block(0, type="text", text=""), grows(0, "text_delta", text="some text"), oops)
    with met(Anthropic, raw, raw, raw) as (server, provider):
        assert isinstance(failure(provider), Overloaded)
        chain = chain_of(provider, ScriptedProvider(["never"]))
        with pytest.raises(StreamInterrupted) as broken:
            list(chain.stream("q"))
        assert (broken.value.partial, type(broken.value.__cause__)) == ("some text", Overloaded)
        assert len(server.requests) == 2


def test_trap_11_models_that_need_the_responses_api_for_tools() -> None:
    """The provider's own error moves such a model to Responses, remembered; api="chat" sets the effort to none if it was
    given, and else says that it cannot. No model is listed, so the first request teaches."""
    models = {"models": ("gpt-6-sol", "gpt-6-astra", "gpt-5.4")}
    with openai(fake=models) as (server, provider):
        for model in ("gpt-6-sol", "gpt-6-astra", "gpt-6-astra", "gpt-5.4"):
            assert provider.chat("q", TOOLS, model).text == "ok"
        assert provider.chat("q", None, "gpt-6-astra").text == "ok"
        assert [request.path.rsplit("/", 1)[1] for request in server.requests] == [
            "completions", "responses", "completions", "responses", "responses", "completions", "completions",
        ]  # fmt: skip
    with openai(fake=models, api="chat") as (server, provider):
        assert provider.chat("q", TOOLS, "gpt-6-sol", reasoning_effort="low").text == "ok"
        assert [body["reasoning_effort"] for body in server.bodies] == ["low", "none"]
        assert isinstance(failure(provider, model="gpt-6-astra", tools=TOOLS), UnsupportedRequest)


def test_trap_12_the_name_of_the_token_limit() -> None:
    """max_completion_tokens at OpenAI, max_tokens elsewhere, renamed once by a 400 that names it."""
    with openai(fake={"models": ("gpt-6-luna",)}) as (server, provider):
        provider.chat("q", model="gpt-6-luna", max_tokens=9)
        assert (server.bodies[0]["max_completion_tokens"], "max_tokens" in server.bodies[0]) == (9, False)
    for kind in (OpenAIProvider, LMStudioProvider):
        with met(Chat, provider=kind, fake={"local": True}) as (server, provider):
            provider.chat("q", model="m-1", max_completion_tokens=9)
            assert (server.bodies[0]["max_tokens"], len(server.requests)) == (9, 1)
    with met(Chat) as (server, provider):
        for _ in range(2):
            provider.chat("q", model="m-1", max_tokens=9)
        assert ["max_completion_tokens" in body for body in server.bodies] == [False, True, True]


QUOTA: list[tuple[type[Vendor], int, Any]] = [
    (Chat, 429, {"error": {"message": "x", "type": "insufficient_quota", "code": code}})
    for code in ("credit_balance_exhausted", "organization_spend_limit_exceeded", "organization_usage_limit_exceeded",
                 "insufficient_quota", "billing_hard_limit_reached")
] + [
    (Chat, 402, {"error": {"message": "Insufficient Balance"}}),
    (Anthropic, 429, {"type": "error", "error": {"type": "rate_limit_error", "message": "x",
                                                 "details": {"error_code": "enforced_spend_limit_reached"}}}),
    (Anthropic, 402, {"type": "error", "error": {"type": "billing_error", "message": "x"}}),
    (Anthropic, 400, {"type": "error", "error": {
        "type": "invalid_request_error", "message": "Your credit balance is too low to access the Anthropic API"}}),
    (Gemini, 429, {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "quota", "details": [
        {"@type": "QuotaFailure", "violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]},
        {"@type": "RetryInfo", "retryDelay": "1s"}]}}),
    (Gemini, 429, {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "Your prepayment credits are depleted"}}),
    (Gemini, 429, {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED",
                             "message": "Quota exceeded for metric: requests, limit: 0, model: m-1"}}),
    (Gemini, 402, {"error": {"code": 402, "status": "RESOURCE_EXHAUSTED", "message": "x"}}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "status", "body"), QUOTA)
def test_trap_13_a_429_that_no_waiting_mends(kind: type[Vendor], status: int, body: Any) -> None:
    """Exactly one request; the tier is parked for long, and the next one answers."""
    with met(kind, Raw(body, status, headers={"Retry-After": "1"} if status == 429 else {})) as (server, provider):
        chain = chain_of(provider, ScriptedProvider(["from b"]))
        response = chain.chat("q")
        assert response.provider == "b"
        assert (response.attempts[0].error or "").startswith("QuotaExceeded")
        assert len(server.requests) == 1
        assert (chain.tiers[0].breaker.retry_after or 0) > 500


def test_trap_14_type_and_code_of_all_kinds() -> None:
    """A code beside insufficient_quota, a number for a code, null, nothing."""
    table: list[tuple[int, Any, type[ProviderError]]] = [
        (429, {"type": "insufficient_quota", "code": "project_spend_limit_exceeded"}, QuotaExceeded),
        (429, {"type": "insufficient_quota", "code": None}, QuotaExceeded),
        (400, {"message": "bad", "type": "BadRequestError", "param": None, "code": 400}, BadRequest),
        (400, {"message": "This model's maximum context length is 8 tokens.", "code": 400}, ContextLengthExceeded),
        (429, {"message": "slow", "type": "requests", "code": "rate_limit_exceeded"}, RateLimited),
        (429, {"message": "slow", "type": "tokens", "code": None}, RateLimited),
        (429, {}, RateLimited),
    ]
    with met(Chat, *(Raw({"error": error}, status) for status, error, _ in table)) as (_, provider):
        for _, error, kind in table:
            assert type(failure(provider)) is kind, error


HINTS: list[tuple[type[Vendor], dict[str, str], Any, float | None]] = [
    (Chat, {"retry-after-ms": "1500", "retry-after": "2"}, {}, 1.5),
    (Chat, {"retry-after": "2"}, {}, 2), (Chat, {"retry-after": "0.25"}, {}, 0.25), (Chat, {"retry-after": "500"}, {}, 500),
    (Chat, {"retry-after": "-5"}, {}, None), (Chat, {"retry-after": "nan"}, {}, None),
    (Chat, {"retry-after": "inf"}, {}, None),
    (Chat, {"x-ratelimit-reset-requests": "6m0s", "x-ratelimit-remaining-requests": "0"}, {}, 360),
    (Chat, {"x-ratelimit-reset-tokens": "120ms", "x-ratelimit-remaining-tokens": "0"}, {}, 0.12),
    (Gemini, {}, {"details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "26s"}]}, 26),
    (Gemini, {}, {"details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "1.5s"}]}, 1.5),
]  # fmt: skip


def test_trap_15_the_wait_hint_in_all_its_forms() -> None:
    """Milliseconds, seconds, dates, Gemini's retryDelay, durations; one that is too long means the next tier."""
    for kind in (Chat, Gemini):
        rows = [row[1:] for row in HINTS if row[0] is kind]
        raws = [Raw({"error": {"message": "slow", "code": 429, **more}}, 429, headers=headers) for headers, more, _ in rows]
        with met(kind, *raws) as (_, provider):
            for headers, _, seconds in rows:
                error = failure(provider)
                assert type(error) is RateLimited
                assert error.retry_after == (None if seconds is None else pytest.approx(seconds)), headers
    soon = time.time() + 60
    dates = [
        {"retry-after": formatdate(soon, usegmt=True)},
        {"anthropic-ratelimit-requests-remaining": "0",
         "anthropic-ratelimit-requests-reset": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(soon))},
    ]  # fmt: skip
    limited = {"type": "error", "error": {"type": "rate_limit_error", "message": "slow"}}
    with met(Anthropic, *(Raw(limited, 429, headers=headers) for headers in dates)) as (_, provider):
        for _ in dates:
            assert 50 < (failure(provider).retry_after or 0) <= 60
    slept: list[float] = []
    with met(Chat, Raw({"error": {"message": "slow"}}, 429, headers={"Retry-After": "500"})) as (server, provider):
        chain = chain_of(provider, ScriptedProvider(["from b"]), sleep=slept.append)
        assert chain.chat("q").provider == "b"
        assert (len(server.requests), slept) == (1, [])
        assert 490 < (chain.tiers[0].breaker.retry_after or 0) <= 500


def test_trap_16_errors_inside_a_200() -> None:
    """OpenRouter's, LM Studio's bare string, Responses that failed, a list: each is the error that it says."""
    failed = {"status": "failed", "error": {"code": "rate_limit_exceeded", "message": "x"}, "output": []}
    table: list[tuple[Raw, type[ProviderError]]] = [
        (Raw({"error": {"code": 502, "message": "upstream", "metadata": {"provider_name": "p"}}}), ServerError),
        (Raw({"choices": [{"error": {"code": 429, "message": "x"}, "finish_reason": "error"}]}), RateLimited),
        (Raw({"choices": [{"message": {"content": "x"}, "finish_reason": "error"}]}), InvalidResponse),
        (stream(delta(content="x"), {"error": {"code": 502, "message": "x"}, "choices": [{"finish_reason": "error"}]}),
         ServerError),
        (Raw({"error": "Unexpected endpoint or method. (POST /chat/completions)"}), ProviderUnavailable),
        (Raw([{"error": {"message": "x", "code": 503, "status": "UNAVAILABLE"}}]), Overloaded),
        (Raw({"object": "error", "message": "maximum context length", "code": 400}), ContextLengthExceeded),
        (Raw({"id": "x"}), InvalidResponse),
    ]  # fmt: skip
    with met(Chat, *(raw for raw, _ in table)) as (_, provider):
        for raw, kind in table:
            assert type(failure(provider)) is kind, raw.body
    event = {"type": "response.failed", "response": failed}
    with met(Responses, Raw(failed), stream(event), stream({"type": "error", "code": "server_error", "message": "x"}),
             api="responses") as (_, provider):  # fmt: skip
        assert [type(failure(provider)) for _ in range(3)] == [RateLimited, RateLimited, ServerError]


CUT: list[tuple[type[Vendor], Raw, dict[str, Any]]] = [
    (Chat, stream(delta(content="half")), {}),
    (Responses, stream({"type": "response.output_text.delta", "delta": "half"}), {"api": "responses"}),
    (Anthropic, message_stream(started(), block(0, type="text", text="half")), {}),
    (Gemini, stream(candidate({"text": "half"}, finish=None)), {}),
    (Ollama, lines({"message": {"content": "half"}, "done": False}), {}),
    (Ollama, lines({"message": {"content": "half"}, "done": True, "done_reason": ""}), {}),
]


@pytest.mark.parametrize(("kind", "raw", "settings"), CUT)
def test_trap_17_a_stream_that_just_ends(kind: type[Vendor], raw: Raw, settings: dict[str, Any]) -> None:
    """Neither end marker nor finish reason, and the connection is closed without any exception: truncated, no answer."""
    with met(kind, raw, **settings) as (_, provider):
        error = failure(provider)
        assert type(error) is InvalidResponse
        assert "truncated" in str(error)


def test_trap_18_usage_comes_after_the_finish_reason() -> None:
    """In a chunk without choices."""
    usage = {"prompt_tokens": 9, "completion_tokens": 5}
    with met(Chat, stream(delta(content="x"), STOP, {"choices": [], "usage": usage}, done=True)) as (_, provider):
        assert provider.chat("q", model="m-1").usage == Usage(9, 5)


def test_trap_19_tool_calls_in_pieces_of_all_kinds() -> None:
    """Index missing or always 0, a whole call at once, the name repeated, no arguments."""
    table: list[tuple[list[Any], list[Any]]] = [
        ([piece('{"a"', "f", id="x"), piece(": 1}")], [("x", "f", {"a": 1})]),
        ([piece("{}", "f", index=0, id="x"), piece('{"a": 2}', "g", index=0, id="y")], [("x", "f", {}), ("y", "g", {"a": 2})]),
        ([piece('{"a": 1}', "f", index=0, id="x")], [("x", "f", {"a": 1})]),
        ([piece('{"a"', "f", index=0, id="x"), piece(": 1}", "f", index=0), piece("", "", index=0)], [("x", "f", {"a": 1})]),
        ([piece("", "f", index=0, id="x"), piece(None, None, index=0)], [("x", "f", {})]),
    ]
    with met(Chat, *(stream(*chunks, STOP, done=True) for chunks, _ in table)) as (_, provider):
        for _, calls in table:
            response = provider.chat("q", model="m-1")
            assert [(call.id, call.name, call.arguments) for call in response.tool_calls] == calls


def test_trap_20_arguments_that_are_no_object() -> None:
    """Never an exception; the raw text is kept, and travels on as an object where a vendor wants one."""
    table: list[tuple[Any, dict[str, Any] | None]] = [
        ("{broken", None), ("", {}), ("null", None), ({"a": 1}, {"a": 1}), ("[1]", None),
    ]  # fmt: skip
    raws = [stream(piece(given, "f", index=0, id="x"), STOP, done=True) for given, _ in table]
    with met(Chat, *raws) as (_, provider), met(Anthropic) as (server, other), met(Ollama) as (_, third):
        for given, arguments in table:
            response = provider.chat("q", model="m-1")
            (call,) = response.tool_calls
            assert (call.arguments, call.raw_arguments) == (arguments, json.dumps(given) if isinstance(given, dict) else given)
            history = [USER, response.message, result("x", "r")]
            assert other.chat(history, TOOLS, "m-1").text == third.chat(history, TOOLS, "m-1").text == "ok"
            sent = server.bodies[-1]["messages"][1]["content"][0]["input"]
            assert sent == ({"_raw": given} if arguments is None else arguments)


def test_trap_21_stop_although_tools_are_called() -> None:
    """Becomes tool_calls, at Gemini and Ollama too; length stays length, since the last call may be cut."""
    part = {"functionCall": {"name": "f", "args": {}}}
    call = {"function": {"name": "f", "arguments": {}}}
    table: list[tuple[type[Vendor], Raw, str]] = [
        (Chat, stream(piece("{}", "f", index=0, id="x"), STOP), "tool_calls"),
        (Chat, stream(piece("{}", "f", index=0, id="x"), delta("length")), "length"),
        (Gemini, Raw(candidate(part)), "tool_calls"), (Gemini, Raw(candidate(part, finish="MAX_TOKENS")), "length"),
        (Ollama, lines({"message": {"tool_calls": [call]}}, {"done": True, "done_reason": "stop"}), "tool_calls"),
        (Ollama, lines({"message": {"tool_calls": [call]}}, {"done": True, "done_reason": "length"}), "length"),
    ]
    for kind, raw, finish in table:
        with met(kind, raw) as (_, provider):
            response = provider.chat("q", model="m-1")
            assert (response.finish_reason, response.tool_calls[0].arguments) == (finish, {})


def test_trap_22_gemini_blocks_prompts_and_answers() -> None:
    """No candidates, a candidate without content, content without parts: refused; with some text before, that is shown."""
    table: list[Any] = [
        {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 3}},
        {"candidates": [{"finishReason": "SAFETY"}]}, {"candidates": [{"finishReason": "RECITATION", "content": {}}]},
        {"candidates": [{"finishReason": "PROHIBITED_CONTENT", "content": {"role": "model"}}]},
    ]
    raws = [*map(Raw, table), *map(stream, table)]
    shown = stream(candidate({"text": "some"}, finish=None), {"candidates": [{"finishReason": "SAFETY"}]})
    with met(Gemini, *raws, shown) as (_, provider):
        for _ in raws:
            assert type(failure(provider)) is ContentFiltered
        response = provider.chat("q", model="m-1")
        assert (response.text, response.finish_reason) == ("some", "content_filter")


def test_trap_23_function_responses_of_gemini() -> None:
    """The name found by the id, an object for an answer, as many as calls and in their order, in one user turn."""
    history = [USER, called(("a", "{}"), ("b", "{}")), result("b", '{"temp": 3}'), result("a", "cold")]
    with met(Gemini) as (server, provider):
        provider.chat(history, TOOLS, "m-1")
        last = server.bodies[0]["contents"][2]
        assert last == {"role": "user", "parts": [
            {"functionResponse": {"name": "f", "response": {"output": "cold"}}},
            {"functionResponse": {"name": "f", "response": {"temp": 3}}},
        ]}  # fmt: skip


def test_trap_24_thought_signatures() -> None:
    """Back on the same part; a foreign history gets the value that Google's documentation says, on each step's first call."""
    with met(Gemini, Reply("hm", [("f", {"city": "Oslo"}), ("f", {"city": "Rome"})], thinking="t")) as (server, provider):
        response = provider.chat([USER], TOOLS, "m-1")
        answers = [result(call.id, "cold") for call in response.tool_calls]
        history = [USER, json.loads(json.dumps(response.message)), *answers]
        assert provider.chat(history, TOOLS, "m-1").text == "ok"
        parts = server.bodies[1]["contents"][1]["parts"]
        assert [part for part in parts if "functionCall" in part] == [part for _, part in server.issued.values()]
        assert "thought" not in json.dumps(parts).replace("thoughtSignature", "")
        own = [part["functionResponse"]["id"] for part in server.bodies[1]["contents"][2]["parts"]]
        assert own == list(server.issued)
        assert provider.chat(history, TOOLS, "m-2").text == "ok"
        signed = [part.get("thoughtSignature") for part in server.bodies[2]["contents"][1]["parts"] if "functionCall" in part]
        assert signed == ["skip_thought_signature_validator", None]


def test_trap_25_geminis_bad_key() -> None:
    """400 INVALID_ARGUMENT, alone or in a list: AuthenticationError all the same."""
    expired = [{"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "API key expired. Please renew the API key."}}]
    with met(Gemini, Raw(expired, 400)) as (server, provider):
        assert type(failure(provider)) is AuthenticationError
        assert type(failure(GeminiProvider("wrong-key", server.url))) is AuthenticationError


def test_trap_26_gemini_counts_thoughts_apart() -> None:
    """5 + 7 make a completion of 12, 7 of it reasoning; parts that are thoughts are no content."""
    usage = {"promptTokenCount": 10, "candidatesTokenCount": 5, "thoughtsTokenCount": 7, "cachedContentTokenCount": 4,
             "toolUsePromptTokenCount": 2}  # fmt: skip
    body = candidate({"text": "plan", "thought": True}, {"text": "Hi"}, usageMetadata=usage)
    with met(Gemini, Raw(body), stream(body)) as (_, provider):
        for _ in range(2):
            response = provider.chat("q", model="m-1")
            assert response.usage == Usage(12, 12, 4, 0, 7)
            assert (response.text, response.reasoning) == ("Hi", "plan")


def test_trap_27_gemini_streams_events_only_on_request() -> None:
    """The address ends with ?alt=sse; there is no [DONE]; a server that sends an array instead is understood."""
    array = [candidate({"text": "o"}, finish=None), candidate({"text": "k"})]
    with met(Gemini, Reply("some text"), Raw(array)) as (server, provider):
        assert provider.chat("q", model="models/m-1").text == "some text"
        assert server.requests[0].path == "/v1beta/models/m-1:streamGenerateContent?alt=sse"
        assert provider.chat("q", model="m-1").text == "ok"
        provider.stream_upstream = False
        provider.chat("q", model="m-1")
        assert server.requests[2].path == "/v1beta/models/m-1:generateContent"


def test_trap_28_ollamas_own_form() -> None:
    """The body in full: stream said, options nested, objects for arguments, bare images, text for content, no tool_choice."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    history = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, image, {"type": "text", "text": "b"}]},
        called(("x", '{"city": "Oslo"}')), result("x", "cold"),
    ]  # fmt: skip
    options = {"temperature": 0.5, "max_tokens": 9, "stop": "END", "seed": 3, "tool_choice": "auto", "user": "u"}
    with met(Ollama, stream_upstream=False) as (server, provider):
        assert provider.chat(history, TOOLS, "m-1", response_format={"type": "json_object"}, **options).text == "ok"
        assert server.bodies[0] == {
            "model": "m-1", "stream": False, "truncate": False, "shift": False, "tools": TOOLS, "format": "json",
            "options": {"temperature": 0.5, "num_predict": 9, "stop": ["END"], "seed": 3},
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "a\nb", "images": ["iVBORw0KGgo="]},
                {"role": "assistant", "content": "", "tool_calls": [
                    {"id": "x", "function": {"name": "f", "arguments": {"city": "Oslo"}}}]},
                {"role": "tool", "content": "cold", "tool_name": "f", "tool_call_id": "x"},
            ],
        }  # fmt: skip
        provider.chat("q", TOOLS, "m-1", tool_choice="none")
        assert "tools" not in server.bodies[1]
        for choice in ("required", {"type": "function", "function": {"name": "f"}}):
            assert isinstance(failure(provider, tools=TOOLS, tool_choice=choice), UnsupportedRequest)
        assert len(server.requests) == 2


def test_trap_29_ollama_forgets_and_loads_in_silence() -> None:
    """Neither: truncate is false, an empty conversation is refused here, and a "load" answer is no answer."""
    with met(Ollama, lines({"message": {"content": ""}, "done": True, "done_reason": "load"})) as (server, provider):
        with pytest.raises(BadRequest, match="empty"):
            provider.chat([], model="m-1")
        assert not server.requests
        assert isinstance(failure(provider), EmptyResponse)
        assert (server.bodies[0]["truncate"], server.bodies[0]["shift"]) == (False, False)
        too_long = "the prompt is longer than the context length currently available to the model"
        server.script.append(Raw({"error": too_long}, 400))
        assert type(failure(provider)) is ContextLengthExceeded


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("", "http://localhost:11434"), ("0.0.0.0", "http://127.0.0.1:11434"), ("0.0.0.0:99", "http://127.0.0.1:99"),
        ("host", "http://host:11434"), ("host:99", "http://host:99"), ("http://h", "http://h"), ("https://h", "https://h"),
        ("http://h:99/", "http://h:99"), (":56789", "http://127.0.0.1:56789"), ("[::1]", "http://[::1]:11434"),
        ("[::]:99", "http://[::1]:99"), ("h/path", "http://h:11434/path"), ("  h  ", "http://h:11434"),
        ("::1", "http://[::1]:11434"), ("::", "http://[::1]:11434"), ("h:", "http://h:11434"), ('"h:99"', "http://h:99"),
        ("https://ollama.com", "https://ollama.com"),
    ],
)  # fmt: skip
def test_trap_30_ollama_host(host: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's own variable, in all its forms: no port with a scheme is the scheme's, else 11434."""
    monkeypatch.setenv("OLLAMA_HOST", host)
    assert OllamaProvider().base_url == url


def test_trap_31_lm_studio() -> None:
    """Loading is awaited; "No models loaded" is known by its text at any status; the model that answered is named; an
    overflow that comes as an empty 200 is no answer."""
    assert LMStudioProvider("").first_token_timeout == 60
    assert LMStudioProvider("").connect_timeout == 5
    none = {"error": {"message": "No models loaded. Please load a model in the developer page.", "param": "model"}}
    other = {"model": "what-is-loaded", "choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}
    empty = {"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}
    overflow = {"error": "Trying to keep the first 4000 tokens when context the overflows."}
    raws = [Raw(none, 404), Raw(none, 400), Raw({"error": "Model is unloaded."}, 400), Raw(overflow, 400), Raw(other),
            Raw(empty)]  # fmt: skip
    with met(Chat, *raws, provider=LMStudioProvider, fake={"local": True}) as (_, provider):
        assert [type(failure(provider)) for _ in range(4)] == [ModelNotFound] * 3 + [ContextLengthExceeded]
        assert provider.chat("q", model="m-1").model == "what-is-loaded"
        assert type(failure(provider)) is EmptyResponse


def test_trap_32_llama_cpp() -> None:
    """503 while loading is asked again on the same tier; an unknown route or model is not; an old build's bare error line."""
    loading = Raw({"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}, 503)
    slept: list[float] = []
    with met(Chat, loading, Reply("loaded"), fake={"local": True}) as (server, provider):
        response = chain_of(provider, ScriptedProvider(["never"]), sleep=slept.append).chat("q")
        assert (response.text, response.provider, len(server.requests), len(slept)) == ("loaded", "a", 2, 1)
    old = Raw(sse(delta(content="x")) + b'error: {"code": 500, "message": "it broke", "type": "server_error"}\n\n',
              kind="text/event-stream")  # fmt: skip
    missing = Raw({"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}, 404)
    gone = Raw({"error": {"code": 404, "message": "model not found", "type": "not_found_error"}}, 404)
    with met(Chat, old, missing, gone, fake={"local": True}) as (_, provider):
        assert [type(failure(provider)) for _ in range(3)] == [ServerError, ProviderUnavailable, ModelNotFound]


THOUGHTS: list[tuple[type[Vendor], Raw]] = [
    *((Chat, stream(delta(**fields), delta(content="fine"), STOP)) for fields in (
        {"reasoning_content": "hm"}, {"reasoning": "hm"}, {"reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
        {"content": "<think>hm</think>\n"})),
    (Chat, Raw({"choices": [{"message": {"reasoning": "hm", "content": "fine"}, "finish_reason": "stop"}]})),
    (Anthropic, message_stream(started(), block(0, type="thinking", thinking=""), grows(0, "thinking_delta", thinking="hm"),
                               block(1, type="text", text="fine"), stops("end_turn"), END)),
    (Gemini, stream(candidate({"text": "hm", "thought": True}, finish=None), candidate({"text": "fine"}))),
    (Ollama, lines({"message": {"content": "", "thinking": "hm"}}, {"message": {"content": "fine"}, "done": True})),
    (Ollama, lines({"message": {"content": "<think>hm</think>"}}, {"message": {"content": "fine"}, "done": True})),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "raw"), THOUGHTS)
def test_trap_33_reasoning_under_all_its_names(kind: type[Vendor], raw: Raw) -> None:
    """Each lands in .reasoning, none in the content, nor among the deltas."""
    with met(kind, raw, raw) as (_, provider):
        response = provider.chat("q", model="m-1")
        assert (response.text, response.reasoning) == ("fine", "hm")
        assert "".join(provider.stream("q", model="m-1")) == "fine"


def test_trap_34_deepseek_wants_its_reasoning_back_and_openai_none() -> None:
    """Two bodies of the same conversation."""
    reply = Reply(calls=[("f", {})], thinking="a thought")
    with (
        met(Chat, reply, fake={"local": True, "thinking": True}) as (server, provider),
        openai(fake={"models": ("gpt-5.4",)}) as (official, other),
    ):
        response = provider.chat([USER], TOOLS, "m-1")
        history = [USER, response.message, result(response.tool_calls[0].id, "cold")]
        assert provider.chat(history, TOOLS, "m-1").text == "ok"
        assert server.bodies[1]["messages"][1] == {
            "role": "assistant", "content": None, "tool_calls": response.message["tool_calls"],
            "reasoning_content": "a thought",
        }  # fmt: skip
        assert other.chat(history, TOOLS, "gpt-5.4").text == "ok"
        assert official.bodies[0]["messages"][1] == {
            "role": "assistant", "content": None, "tool_calls": response.message["tool_calls"],
        }  # fmt: skip


def test_trap_35_what_requests_does_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """UTF-8 without a charset, U+2028 inside a line, a netrc, a redirect that would take the key along, and a read timeout
    that is no deadline."""
    text = "café\u2028naïve\u2029\x85"
    with met(Chat, Raw(b"data: " + json.dumps(delta(content=text), ensure_ascii=False).encode() + b"\n\n" + sse(STOP),
                       kind="text/event-stream")) as (_, provider):  # fmt: skip
        assert provider.chat("q", model="m-1").text == text
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with met(Chat) as (server, provider):
        assert provider.chat("q", model="m-1").text == "ok"
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    with Anthropic() as target, met(Anthropic) as (server, provider):
        server.script.append(Raw({}, 307, headers={"Location": f"http://localhost:{target.port}/v1/messages"}))
        assert type(failure(provider)) is InvalidResponse
        assert not target.requests

    def keeps_alive(server: Peer, connection: socket.socket, request: bytes) -> bool:
        connection.sendall(HEAD + b"\r\n")
        server.drip(connection, b": keep-alive\n\n" * 500)
        return False

    with peer(keeps_alive) as silent:
        provider = OpenAIProvider(KEY, silent.url)
        begun = time.monotonic()
        with pytest.raises(ProviderTimeout):
            provider.chat("q", timeout=0.3)
        assert time.monotonic() - begun < 0.3 * 1.05 + 0.1
        provider.close()


@pytest.mark.parametrize(
    ("data", "events"),
    [
        (b": ping\n\ndata: 1\n\n", [("", b"1")]), (b"event: ping\ndata: 1\n\n", [("ping", b"1")]),
        (b"data:1\n\n", [("", b"1")]),
        (b"data: 1\r\n\r\ndata: 2\r\n\r\n", [("", b"1"), ("", b"2")]), (b"data: 1\r\rdata: 2\r\r", [("", b"1"), ("", b"2")]),
        (b"data: {\ndata: }\n\n", [("", b"{\n}")]), (b"\xef\xbb\xbfdata: 1\n\n", [("", b"1")]), (b"data: 1", [("", b"1")]),
        (b"id: 3\nretry: 5\ndata: 1\n\n", [("", b"1")]), (b"event: a\n\ndata: 1\n\n", [("", b"1")]),
        ("data: \u2028\n\n".encode(), [("", "\u2028".encode())]),
    ],
)  # fmt: skip
def test_trap_36_server_sent_events(data: bytes, events: list[Any]) -> None:
    """Comments, names, no space, CRLF, several lines of data, a BOM; whole and byte by byte."""
    for pieces in ([data], [data[at : at + 1] for at in range(len(data))]):
        if pieces[0] == data or not data.startswith(b"\xef"):
            parser = _SSE()
            assert [event for one in pieces for event in parser.feed(one)] + parser.close() == events


def test_trap_37_local_templates() -> None:
    """developer is system, and parts of text are one text, for a server of one's own; OpenAI gets them as they are."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    history = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]
    for kind in (LMStudioProvider, OpenAIProvider):
        with met(Chat, provider=kind, fake={"local": True}) as (server, provider):
            assert provider.chat(history).text == "ok"
            assert server.bodies[0]["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "a\nb"}]
    with openai(fake={"models": ("gpt-5.4",)}) as (server, provider):
        assert provider.chat(history, model="gpt-5.4").text == "ok"
        assert server.bodies[0]["messages"] == history


def test_trap_38_failures_of_the_model_itself() -> None:
    """Groq's tool_use_failed and Gemini's MALFORMED_FUNCTION_CALL are InvalidResponse: the next tier is asked at once (and
    not the same one again), and the breaker counts them."""
    failed = Raw({"error": {"message": "Failed to call a function.", "type": "invalid_request_error",
                            "code": "tool_use_failed", "failed_generation": "<function=f>"}}, 400)  # fmt: skip
    malformed = stream({"candidates": [{"finishReason": "MALFORMED_FUNCTION_CALL"}]})
    table: list[tuple[type[Vendor], Raw]] = [(Chat, failed), (Gemini, malformed)]
    for kind, raw in table:
        with met(kind, raw) as (server, provider):
            chain = chain_of(provider, ScriptedProvider(["from b"]))
            response = chain.chat("q", TOOLS)
            assert response.provider == "b"
            assert (response.attempts[0].error or "").startswith("InvalidResponse")
            assert (len(server.requests), chain.tiers[0].breaker.snapshot().failures) == (1, 1)


@pytest.mark.parametrize(
    ("status", "body", "kind", "kept"),
    [
        (502, b"<html><body>Bad Gateway</body></html>", "text/html", "without JSON"), (413, b"<html>", "text/html", "without"),
        (500, {"error": {"message": "it broke"}}, "application/json", "it broke"),
        (500, {"error": "it broke"}, "application/json", "it broke"),
        (422, {"detail": [{"loc": ["body"], "msg": "field required"}]}, "application/json", "field required"),
        (400, {"detail": "it broke"}, "application/json", "it broke"), (500, {"message": "it broke"}, "", "it broke"),
        (400, {"object": "error", "message": "it broke", "code": 400}, "application/json", "it broke"),
        (500, [{"error": {"message": "it broke"}}], "application/json", "it broke"),
        (500, b"it broke", "text/plain", "it broke"), (500, b"", "text/plain", "status 500"), (500, {}, "", "status 500"),
    ],
)  # fmt: skip
def test_trap_39_error_bodies_of_all_shapes(status: int, body: Any, kind: str, kept: str) -> None:
    """A message for all of them, never an empty one; the class by the status where nothing says more."""
    with met(Chat, Raw(body, status, kind)) as (_, provider):
        error = failure(provider)
        assert kept in str(error)
        assert type(error) is (ServerError if status >= 500 else BadRequest)


@pytest.mark.parametrize(("kind", "raw", "settings"), CUT[:-1])
def test_trap_40_nothing_is_retried_once_text_was_handed_out(kind: type[Vendor], raw: Raw, settings: dict[str, Any]) -> None:
    """The break surfaces with the text so far; one request was made, and no other tier is asked."""
    other = ScriptedProvider(["never"])
    with met(kind, raw, **settings) as (server, provider):
        stream = chain_of(provider, other).stream("q")
        taken = []
        with pytest.raises(StreamInterrupted) as broken:
            for text in stream:
                taken.append(text)
        assert ("".join(taken), broken.value.partial) == ("half", "half")
        assert (len(server.requests), other.calls) == (1, [])


def test_every_trap_has_its_test() -> None:
    """Forty numbers, each with a test of its own."""
    numbers = sorted({int(name[10:12]) for name in globals() if name.startswith("test_trap_")})
    assert numbers == list(range(1, 41))
