"""Reading failures: each fault of the fault server, and what statuses, bodies and headers mean."""

from __future__ import annotations

import json
import logging
import random
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
import responses
from support.fakes import error_of, running
from support.faults import (ANSWER, BY_NAME, DIALECTS, FOOLED, ROWS,
    Chat, Dialect, FaultServer, Row, answer_to, descriptors, says)
from support.server import Peer, Server, reply, sse

from copilot_router import (AllProvidersFailed, AnthropicProvider, AuthenticationError, BadRequest,
    ContentFiltered, ContextLengthExceeded, DeadlineExceeded, FailoverChain, GeminiProvider,
    InvalidResponse, ModelNotFound, OllamaProvider, OpenAIProvider, Overloaded, ProviderError,
    ProviderTier, ProviderTimeout, ProviderUnavailable, QuotaExceeded, RateLimited, RouterError,
    ScriptedProvider, ServerError, StreamInterrupted, UnsupportedRequest, Usage)

KEY = "sk-test-faults-key-5678901234"
PROMPT = "the secret question about "
#: Seconds for a call that nobody can answer.
DEADLINE = 0.6
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def limits(row: Row) -> dict[str, Any]:
    """Short limits of silence only where silence is the fault: a busy machine is slow, too."""
    short: dict[str, Any] = {"max_response_bytes": 300_000}
    slow = row.expect is ProviderTimeout or row.name == "dripped_refusal"
    short["first_token_timeout"] = 0.3 if slow and not row.after else 5.0
    short["stall_timeout"] = 0.3 if slow or row.name == "healthy_then_silence" else 5.0
    return short


def tier(name: str, server: FaultServer, model: str, row: Row, **settings: Any) -> ProviderTier:
    client = server.dialect.client(KEY, server.url, **settings)
    return ProviderTier(name, client, [model], timeout=row.timeout if name == "ill" else None)


def pair(ill: FaultServer, well: FaultServer, row: Row) -> FailoverChain:
    """The tier that is ill and one that is not; the chain does not pause long before a retry."""
    tiers = [tier("ill", ill, row.name, row, **limits(row)), tier("well", well, "healthy", row)]
    return FailoverChain(tiers, sleep=lambda seconds: time.sleep(min(seconds, 0.02)))


def stands(chain: FailoverChain, expected: str) -> bool:
    """Whether the first breaker is as the row says; dates have no fractions of seconds."""
    state, _, number = expected.partition(" ")
    seen = chain.tiers[0].breaker.snapshot()
    if state == "closed":
        return seen.state == state and (not number or seen.failures == int(number))
    wide = {"long": (14, 600), "15": (14, 20)}  # a chain draws the time of its own breakers
    low, high = wide.get(number) or (int(number) - 1, int(number) + 1)
    return seen.state == state and low <= (seen.retry_after or 0.0) <= high


def failures(attempts: Any) -> set[str]:
    return {(one.error or "").partition(":")[0] for one in attempts if one.outcome == "failed"}


def fits(names: set[str], row: Row) -> bool:
    """Whether these failures are the row's; an answer of the wrong form may also count as empty."""
    also = {"EmptyResponse"} if row.expect is InvalidResponse else set()
    return bool(names) and names <= {row.expect.__name__} | also


def hidden(error: RouterError) -> bool:
    shown = f"{error} {error!r} {error.attempts}"
    return PROMPT not in shown and KEY not in shown


def check_count(ill: FaultServer, row: Row, wanted: int) -> None:
    """A 408 for an idle connection may come just after the next request was sent: one more then."""
    late = row.name == "given_up_while_idle"
    assert ill.count(row.name) in (wanted, wanted + late), row.name


def check_chat(row: Row, dialect: Dialect, slack: float = 0.0) -> None:
    """All calls of a row: what comes out, how soon, after how many requests, and the breaker."""
    with FaultServer(dialect) as ill, FaultServer(dialect) as well, pair(ill, well, row) as chain:
        for call in range(row.calls):
            prompt, start = f"{PROMPT}{row.name} {call}", running()
            if row.expect is ContentFiltered:
                refused = error_of(ContentFiltered, chain.chat, prompt, timeout=5, **row.options)
                attempts = refused.attempts
            else:
                response = chain.chat(prompt, timeout=5, **row.options)
                attempts = response.attempts
                own = response.provider == "ill"
                assert own == (row.expect is ANSWER), (row.name, attempts)
                assert response.text == (row.told if own else str)(answer_to(prompt)), row.name
            assert running() - start < row.within + slack, row.name
            if row.expect is ANSWER:
                assert attempts[-1].outcome == "ok"
            else:
                assert fits(failures(attempts), row), (row.name, attempts)
        check_count(ill, row, row.requests)
        assert stands(chain, row.breaker), (row.name, chain.tiers[0].breaker.snapshot())


def read(chain: FailoverChain, prompt: str, row: Row) -> str:
    """Read one stream, check what holds of each, and say who gave the answer."""
    seen: list[str] = []
    stream = chain.stream(prompt, timeout=5, **row.options)
    try:
        seen += stream
    except StreamInterrupted as error:
        assert "".join(seen) == error.partial == stream.text != ""
        assert type(error.__cause__) is row.expect
        assert [(one.tier, one.outcome) for one in error.attempts] == [("ill", "failed")]
        assert hidden(error)
        return "nobody"
    own = stream.response.provider == "ill"
    text = (row.told if own else str)(answer_to(prompt))
    assert "".join(seen) == stream.text == stream.response.text == text
    if not own:
        assert fits(failures(stream.response.attempts), row)
    return stream.response.provider


def check_stream(row: Row, dialect: Dialect, slack: float = 0.0) -> None:
    """Before the first delta a stream fails over as chat() does; after it the reader is told."""
    side = "ill" if row.expect is ANSWER else "nobody" if row.after else "well"
    with FaultServer(dialect) as ill, FaultServer(dialect) as well, pair(ill, well, row) as chain:
        for call in range(row.calls):
            start = running()
            if row.expect is ContentFiltered:
                error_of(ContentFiltered, chain.stream, PROMPT, timeout=5)
            else:
                assert read(chain, f"{PROMPT}{row.name} {call}", row) == side, row.name
            assert running() - start < row.within + slack, row.name
        check_count(ill, row, 1 if row.after else row.requests)
        assert stands(chain, "closed 1" if row.after else row.breaker), row.name
        assert not (row.after and well.log), row.name


def test_the_table_of_faults_is_wide() -> None:
    assert len(BY_NAME) == len(ROWS) >= 160 and sum(row.naive in FOOLED for row in ROWS) >= 115
    assert sum(row.after for row in ROWS) >= 30


both_ways = pytest.mark.parametrize("check", [check_chat, check_stream], ids=["chat", "stream"])


@each_row
@both_ways
def test_a_healthy_second_tier_answers_or_the_reader_is_told(row: Row, check: Any) -> None:
    check(row, Chat())


@pytest.mark.parametrize("dialect", DIALECTS[1:], ids=lambda dialect: dialect.name)
@both_ways
def test_every_wire_format_is_as_safe(dialect: type[Dialect], check: Any) -> None:
    """Each fault that is not of Chat Completions' own content; how much text is in half of the
    compressed bytes differs from format to format."""
    rows = [row for row in ROWS if row.only is None
        and (check is check_chat or row.name != "cut_gzip")]
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(lambda row: check(row, dialect(), slack=2.0), rows))) > 95


@each_row
def test_alone_a_tier_fails_in_time(row: Row) -> None:
    """With no other tier to ask: the error's class, never later than the deadline allows."""
    prompt = f"{PROMPT}{row.name}"
    expected: Any = row.alone or row.expect
    short = {**limits(row), "first_token_timeout": 0.3, "stall_timeout": 0.3}
    with FaultServer() as ill:
        chain = FailoverChain([tier("ill", ill, row.name, row, **short)], timeout=DEADLINE,
            sleep=lambda seconds: None)
        start, begun, failure = running(), time.monotonic(), None
        try:
            assert chain.chat(prompt, **row.options).text == row.told(answer_to(prompt))
        except RouterError as error:
            failure = error
        ran, taken = running() - start, time.monotonic() - begun
        chain.close()
    assert ran < DEADLINE * 1.05 + 0.1 and (failure is None) == (expected is ANSWER)
    if isinstance(failure, AllProvidersFailed):
        assert all(isinstance(error, expected) for error in failure.errors)
        assert failure.__cause__ is failure.errors[0]
        assert isinstance(failure, DeadlineExceeded) == (taken >= DEADLINE)
    elif failure is not None:
        assert type(failure) is expected and row.breaker in ("closed 0", "closed")
    if failure is not None:
        assert issubclass(expected, ProviderError) and failure.attempts[0].tier == "ill"
        assert hidden(failure)


def test_nothing_is_left_of_broken_connections() -> None:
    """After faults that break or abandon one: no descriptor and no thread more than before."""
    names = [row.name for row in ROWS if row.expect in (InvalidResponse, ServerError)]
    with FaultServer() as ill:
        provider = Chat().client(KEY, ill.url, max_response_bytes=300_000, stall_timeout=0.3)
        chain = FailoverChain([ProviderTier("ill", provider, names, retries=0)],
            failure_threshold=10_000)
        for name in names[:3]:
            error_of(RouterError, chain.chat, PROMPT, model=name)
        before, threads = descriptors(), threading.active_count()
        for name in names:
            error_of(RouterError, chain.chat, PROMPT, model=name, timeout=5)
            if BY_NAME[name].after:
                next(chain.stream(PROMPT, model=name, timeout=5))
        chain.close()
        until = time.monotonic() + 5
        while descriptors() > before or threading.active_count() > threads:
            assert time.monotonic() < until
            threading.Event().wait(0.01)  # for the server's own ends


# -- what statuses, codes and words mean
BASE = "https://server.test"
OVERDUE = "Access denied, please make sure your account is in good standing."
SPENT = "Your team has either used all available credits or reached its monthly spending limit."
SUSPENDED = (
    "Your account <ak> is suspended due to insufficient balance, please recharge your account")
RAW_JSON = json.dumps(says(SUSPENDED, type="exceeded_current_quota_error"))
THROUGH = {"message": "Provider returned error", "code": 400}
ARREARS = "Account me-1 is suspended, possibly due to reaching the monthly spending limit."
EDGE = {"error_code": 1027, "cloudflare_error": True, "retry_after": 30}  # Cloudflare's own
#: Vendors' bodies as public reports and error pages show them: class -> status and body.
MEANINGS: dict[type, list[tuple[int, Any]]] = {QuotaExceeded: [
        (429, says("No deployments available - crossed budget: Exceeded budget for deployment")),
        (429, says('{"quotaId": "GenerateRequestsPerDayPerModel"}. Please retry in 37.2s.')),
        (400, says("You have reached your specified API usage limits. You will regain access on "
                   "2026-12-01 at 00:00 UTC.", type="invalid_request_error")),  # Anthropic
        (400, says(OVERDUE, code="Arrearage", type="Arrearage")),  # DashScope, and its own API:
        (400, {"code": "Arrearage", "message": OVERDUE}),
        (429, says("Insufficient balance or no resource package.")),  # z.ai
        (429, says("[1310][Weekly/Monthly Limit Exhausted.]", type="rate_limit_error")),
        (429, says("[1113][Please recharge.][2026]", type="rate_limit_error", code="1113")),
        (429, {"code": "Some resource has been exhausted", "error": SPENT}),  # xAI
        (403, {"code": "permission-denied", "error": SPENT}),
        (429, says("x", type="exceeded_current_quota_error")),  # Moonshot
        (429, {"error": {**THROUGH, "code": 429, "metadata": {"raw": RAW_JSON}}}),  # OpenRouter
        (200, {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}),
        (403, {"code": "INSUFFICIENT_BALANCE", "message": "Insufficient account balance"}),
        (402, says("This request requires more credits, or fewer max_tokens.", code=402)),
        (429, says("Usage limit reached for 5 hour. It will reset at 2026-09-09", code="1308")),
        (429, says("x", type="usage_limit_reached", resets_in_seconds=602705)),  # Codex
        (403, says("You've reached your usage limit for this billing cycle. Your quota will be "
                   "refreshed in the next cycle.", type="permission_error")),  # Kimi
        (429, {"error": "you (x) have reached your weekly usage limit, please wait or upgrade"}),
        (429, says("You have exceeded the monthly usage quota.")),  # Ark
        *((400, says("x", code=code)) for code in ("spend_limit_reached", "InvalidSubscription")),
        *((429, {"errors": [{"code": 4006, "message": words}]}) for words in ("used up your daily "
            "free allocation of 10,000 neurons", "Too many tokens per day, please wait")),
        (429, {"message": "a Trial key, which is limited to 1000 API calls / month"}),  # Cohere
        (403, {"code": "The caller does not have permission to execute the specified operation",
               "error": "Your newly created team doesn't have any credits yet."}),  # xAI
        (403, {"statusCode": 403, "message": "Out of call volume quota. Quota will be replenished "
               "in 01:05:23."}),  # Azure's gateway
        (200, {"base_resp": {"status_code": 2056, "status_msg": "usage limit exceeded"}}),
        (412, says(ARREARS, code="PRECONDITION_FAILED")),  # Fireworks
        (429, says("x", type="insufficient_quota")),
        (429, says("x", type="tokens", code="project_spend_limit_exceeded")),
        (403, says("", code="insufficient_user_quota")), (400, says("", type="budget_exceeded"))],
    ContextLengthExceeded: [
        (400, says("<400> InternalError.Algo.InvalidParameter: Range of input length should be "
                   "[1, 983616]", code="invalid_parameter_error")),  # DashScope
        (400, says("Invalid request: Your request exceeded model token limit: 8192")),  # Moonshot
        (400, says("Input length 203743 exceeds the maximum length 202752")),  # GLM at Ark
        (400, says("Prompt exceeds max length", code="1261")),  # GLM
        (400, {"message": "Input is too long for requested model."}),  # Bedrock
        (400, {"code": "Client specified an invalid argument", "error": "This model's maximum "
               "prompt length is 131072 but the request contains 136973 tokens."}),  # xAI
        (400, says("prompt token count of 138898 exceeds the limit of 64000",
                   code="model_max_prompt_tokens_exceeded")),  # Copilot
        (413, says("Request body too large for gpt-4o model. Max size: 8000 tokens.",
                   code="tokens_limit_reached")),  # GitHub Models
        (413, says("Request body too large for gpt-4o model.")),  # GitHub Models behind a proxy
        (422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= "
               "65537. Given: 79993 `inputs` tokens and 1024 `max_new_tokens`"}),  # TGI
        (422, {"error": "Input validation error: `inputs` must have less than 2048 tokens."}),
        (200, {"error": "Trying to keep 9 when context the overflows."}),  # LM Studio
        (400, {"error": "cannot truncate prompt with n_keep (9) >= n_ctx (8)"}),  # LM Studio, too
        (500, says("exceeds the context size", type="server_error")),
        (400, says("no", type="context_exceeded")),
        (400, says("The input token count (2845475) exceeds the maximum number of tokens allowed")),
        (429, says("Request too large for gpt-4o in organization org-z on tokens per min (TPM): "
                   "Limit 30000, Requested 132819.", type="tokens", code="rate_limit_exceeded")),
        (400, {"error": {**THROUGH, "metadata": {"raw": json.dumps(says(
            "This model's maximum context length is 8192 tokens"))}}}),
        (200, says("x", value={"error_message": "maximum context length is 4096"})),  # Vercel
        (400, says("[input_value='x', input_type=str] prompt is too long", code="invalid_prompt"))],
    ModelNotFound: [(400, says("deepseek-chat is not a valid model ID", code=400)),  # OpenRouter
        (400, says("Model Not Exist", type="invalid_request_error")),  # DeepSeek
        (400, {"object": "error", "message": "Invalid model: m", "type": "invalid_model"}),
        (400, says("/chat/completions: Invalid model name passed in model=m")),  # LiteLLM, twice
        (403, says("key not allowed to access model", type="key_model_access_denied")),
        (404, says("The model 'm' does not exist or you do not have access to it.")),
        (404, says("model: m", type="not_found_error")),  # Anthropic
        (404, {"detail": "Function '1': Not found for account '2'"}),  # NVIDIA
        (404, says("no", code="model_not_found")), (404, {"object": "error", "message":
            "The model `x` does not exist.", "type": "NotFoundError"}),  # vLLM
        (410, says("The model m has been retired.")), (400, {"error": "Model unloaded."}),
        (403, {"error": "this model requires a subscription"}), (404, {"error_msg": "no model"}),
        (403, says("x", code="model_permission_blocked_org")),  # Groq, then MiniMax
        (500, says("your current token plan not support model, M2 (2061)", type="api_error")),
        (422, {"detail": ["Invalid model: m", 5]}), (429, says("no GLM", code="1311"))],  # z.ai
    UnsupportedRequest: [
        (400, says("Failed to deserialize the JSON body into the target type: messages[7]: unknown "
                   "variant `image_url`, expected `text` at line 1", code="invalid_request_error")),
        (400, {"message": "The model m does not support image modality"}),  # Bedrock
        (400, says("this model does not support tools")),
        (400, says("m is not a multimodal model")),  # vLLM, as the next one
        (400, says('tool_choice="required" requires --tool-call-parser to be set')),
        (400, {"message": "This model doesn't support the image field for user messages."}),
        (400, {"errors": [{"code": "model_no_support_for_function", "message": "no"}]}),  # watsonx
        (400, {"message": "no", "details": {"error_code": "unsupported_parameter"}}),
        (500, says("tools param requires --jinja flag", type="server_error")),  # llama.cpp
        (500, {"error": "this model is missing data required for image input"}),  # Ollama
        *((404, says(f"No endpoints {what}", code=404)) for what in (  # OpenRouter
            "found that support image input", "found that can do it", "available matching it")),
        (400, {"error": {**THROUGH, "metadata": {"raw": "X does not support image input"}}})],
    AuthenticationError: [
        (401, says("x", type="api_error")), (401, says("x", type="server_error")), (401, {}),
        (403, says("no permission", type="permission_error")), (403, {**EDGE, "error_code": 1008}),
        (403, says("no", code="unsupported_country_region_territory")),
        (400, says("x", status="UNAUTHENTICATED")), (400, says("x", type="no_db_connection")),
        (400, says("x", code="organization_restricted")),  # Groq
        (400, says("API key not valid.", code=400, status="INVALID_ARGUMENT",
                   details=[{"reason": "API_KEY_INVALID"}]))],  # Gemini
    RateLimited: [(429, {"message": "Too many tokens, please wait before trying again."}),
        (429, says("on tokens per day (TPD): Limit 100. Please try again in 14m37.8s.")),  # Groq
        (200, says("litellm.RateLimitError: no", type="api_error")),  # LiteLLM
        (200, [says("slower, please", code=429)]),
        (429, says("You exceeded your current quota. limit: 10\nPlease retry in 1.2s.")),  # Gemini
        (429, says("x", type="api_error")), (429, says("x", type="server_error")), (429, EDGE),
        (429, {"error": {**THROUGH, "code": 429, "metadata": {"raw": "glm is temporarily "
               "rate-limited upstream"}}}),
        *((200, {"base_resp": {"status_code": at, "status_msg": "no"}}) for at in (1002, 1039)),
        (429, says("Rate limit reached for gpt in organization o on tokens per min (TPM)",
                   type="tokens", code="rate_limit_exceeded"))], BadRequest: [
        (400, {"error": "n_predict is wrong"}), (400, [says("wrong", code=400)]),
        (422, {"detail": [{"loc": ["body", "x"], "msg": "field required"}]}),
        (400, {"object": "error", "message": "bad", "code": 40001}),
        (400, {"error": {"message": {"a": ["b"]}, "code": {"c": 1}, "type": [], "param": 4}}),
        (500, says("Jinja Exception: no tools", type="server_error")),  # llama.cpp
        (400, says("x", type="api_error")), (422, says("x", type="server_error")), (413, {}),
        (415, says("Unsupported media type", type="internal_error")),
        (400, {"message": "The maximum tokens you requested exceeds the model limit of 32768"}),
        (400, says("Invalid Responses API request", code="invalid_prompt")),  # OpenRouter
        (400, says("x", code=400, metadata={"error_type": "invalid_prompt"})),  # OpenRouter
        (400, says("names are case-sensitive; blocked due to size, contains guardrails, security")),
        (424, says("the moderation service is down")), (400, says("Invalid URL (image_url)"))],
    ProviderTimeout: [(408, says("x", type="api_error")), (500, says("litellm.Timeout: no"))],
    InvalidResponse: [(200, '{"choices": [{}]} {"choices": [{}]}'),
        (400, says("Failed to call a function.", code="tool_use_failed")),
        (200, {"error": "something broke"}), (300, says("x", code="insufficient_quota")),
        (300, {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]})],
    ServerError: [(500, {"error": 7}), (500, {"error": None}), (200, says("no", code=502)),
        (500, says("x", code="\xb2", status_code="\xb2")),
        *((200, {"base_resp": {"status_code": at}}) for at in (1000, 1024, 1033)),  # MiniMax
        (200, {"choices": [{"error": {"code": 503, "message": "x"}, "finish_reason": "error"}]}),
        (400, {"error": 'Failed to load model "m". Error: Operation canceled.'}),  # LM Studio
        (500, says("finish_reason: error. Chunk(moderation=None)")),  # LiteLLM
        (400, {"error": "The model has crashed without additional information. (Exit code: 1)"}),
        (409, says("x", type="api_error")), (500, says("invalid api key")), (500, {}), (599, {}),
        (500, says("the moderation service is down")), (200, says("x", status_code=500)),
        (424, {"error": "Request failed during generation: Server error"}),  # TGI
        (400, {"detail": "Function id '1': DEGRADED function cannot be invoked"})],  # NVIDIA
    Overloaded: [(529, says("x", type="overloaded_error")), (503, says("Loading model", code=503)),
        (503, says("server busy, maximum pending requests exceeded")),
        (503, {"error": "Model a/b is currently loading", "estimated_time": 20.0}),  # Hugging Face
        (503, says("The engine is currently overloaded", type="server_error")),
        (498, says("x", code="capacity_exceeded")),  # Groq
        (200, says("x", type="overloaded_error"))],
    ContentFiltered: [(403, says("flagged", metadata={"reasons": ["violence"]})),
        (403, says("no", metadata={"error_type": "refusal"})),  # OpenRouter
        (451, says("blocked", type="censorship_blocked")),  # StepFun
        (400, says("Invalid prompt: not for safety reasons.", code="invalid_prompt")),  # OpenAI
        (403, {"error": "Content violates usage guidelines. API key ID: k", "code": "no"}),  # xAI
        (400, says("no", code="content_policy_violation")),
        (400, says("x", code="content_filter", innererror={"code": "x"})),  # Azure
        (400, says("x", code="sensitive_words_detected")),  # new-api, then LiteLLM and Ark
        *((400, says(text)) for text in ("Content blocked: us_ssn pattern detected",
            "the input text includes sensitive content that violates x", "new_sensitive (1026)",
            "Request blocked: prompt injection patterns detected",
            "litellm.ContentPolicyViolationError: no", "Violated jailbreak threshold",
            "Blocked by Pillar Security Guardrail")),
        (400, {"error": {"message": {"error": "Violated guardrail policy"}}}),
        (400, says("Request failed because the input text may contain sensitive information.")),
        (424, {"error": [{"code": 2016, "message": "Prompt blocked due to security rules"}]}),
        (446, says("The guardrail checks defined in the config failed."))],  # Portkey
    ProviderUnavailable: [(200, {"error": "Unexpected endpoint or method. (POST /chat)"}),
        (404, says("Not Found")), (410, says("gone")), (404, {}), (407, {})]}
CASES = [(kind, status, body) for kind, bodies in MEANINGS.items() for status, body in bodies]


def refused(status: int = 200, body: Any = None, told: dict[str, str] | None = None, *,
        vendor: Any = OpenAIProvider, messages: Any = "hi", **settings: Any) -> ProviderError:
    """The error that a provider of one vendor raises for this answer."""
    with responses.RequestsMock() as mock:
        data = body if isinstance(body, (str, bytes)) else json.dumps(body)
        mock.post(re.compile(".*"), status=status, body=data, headers=told)
        client = vendor(settings.pop("api_key", KEY), settings.pop("base_url", BASE), **settings)
        caught = error_of(ProviderError, client.chat, messages, model="m")
    return caught


@pytest.mark.parametrize(("kind", "status", "body"), CASES)
def test_what_bodies_mean(kind: type, status: int, body: Any) -> None:
    error = refused(status, body)
    assert type(error) is kind
    assert (error.status, error.provider, error.model) == (status, "openai", "m")


@pytest.mark.parametrize(("kind", "body"), [(kind, body) for kind, _, body in CASES
        if kind in (QuotaExceeded, ContextLengthExceeded, Overloaded)
        and isinstance(body.get("error"), dict) and "metadata" not in body["error"]
        and "Loading" not in str(body)])
def test_the_same_words_mean_the_same_inside_an_answer(kind: type, body: Any) -> None:
    assert type(refused(200, body)) is kind
    assert type(refused(200, f"data: {json.dumps(body)}\n\n")) is kind
    begun = "data: " + json.dumps({"choices": [{"delta": {"role": "assistant"}}]}) + "\n\n"
    assert type(refused(200, begun + json.dumps(body, indent=1) + "\n")) is kind


@pytest.mark.parametrize("vendor", [AnthropicProvider, GeminiProvider, OllamaProvider])
@pytest.mark.parametrize("kind", [QuotaExceeded, ContextLengthExceeded, AuthenticationError])
def test_the_shared_words_hold_for_each_vendor(vendor: Any, kind: type) -> None:
    for status, body in MEANINGS[kind]:
        assert type(refused(status, body, vendor=vendor)) is kind, body


@pytest.mark.parametrize(("vendor", "message"), [
    (AnthropicProvider, "Your credit balance is too low to access the Anthropic API."),
    (OpenAIProvider, "AnthropicException - Your credit balance is too low to access the API"),
    (AnthropicProvider, "This organization has been disabled."),
    (OpenAIProvider, "Incorrect API key provided: xa***12."),  # xAI
    (GeminiProvider, "User location is not supported for the API use.")])
def test_an_account_that_is_refused_with_400_parks_its_tier(vendor: Any, message: str) -> None:
    assert refused(400, says(message, type="x"), vendor=vendor).breaker == "park long"


def test_the_reason_of_the_provider_behind_a_gateway_is_shown() -> None:
    for raw in ("the tulip is rate-limited", json.dumps(says("the tulip is limited")), {"a": 1}, 5):
        error = refused(429, {"error": {**THROUGH, "metadata": {"raw": raw}}})
        assert isinstance(error, RateLimited) and ("tulip" in str(error)) == ("tulip" in str(raw))


@pytest.mark.parametrize(("status", "body", "waits", "kind"), [
    (402, says("x"), {}, QuotaExceeded), (402, says("x"), {"Retry-After": "30"}, RateLimited),
    (402, says("x"), {"retry-after-ms": "30000"}, RateLimited),
    (503, says("x", type="server_error"), {}, ServerError),
    (503, says("x", type="server_error"), {"Retry-After": "5"}, Overloaded)])
def test_a_hint_when_to_come_back_changes_the_class(status: int, body: Any, waits: dict[str, str],
        kind: type) -> None:
    assert type(refused(status, body, waits)) is kind


@pytest.mark.parametrize(("message", "quota", "kind"), [
    ("You exceeded your current quota.", "GenerateRequestsPerMinutePerProject", RateLimited),
    ("You exceeded your current quota.", "GenerateRequestsPerDayPerProject", QuotaExceeded),
    ("Quota exceeded. limit: 0", "GenerateRequestsPerMinutePerProject", QuotaExceeded)])
@pytest.mark.parametrize("delay", ["6s", "0s"])
def test_geminis_quota_of_a_minute_is_a_rate_limit(message: str, quota: str, kind: type,
        delay: str) -> None:
    types = "type.googleapis.com/google.rpc."
    details = [{"@type": types + "QuotaFailure", "violations": [{"quotaId": quota}]},
        {"@type": types + "RetryInfo", "retryDelay": delay}]
    body = says(message, code=429, status="RESOURCE_EXHAUSTED", details=details)
    error = refused(429, body, vendor=GeminiProvider)
    assert (type(error), error.retry_after) == (kind, float(delay[0]))


# -- what must not park a tier for everybody
def asked(status: int, body: Any, messages: Any) -> int:
    """How many of three calls reach a tier that answers so."""
    with responses.RequestsMock() as mock:
        data = body if isinstance(body, str) else json.dumps(body)
        mock.post(re.compile(".*"), status=status, body=data)
        spare = ProviderTier("b", ScriptedProvider(["fine"], repeat=True))
        tier = ProviderTier("a", OpenAIProvider(KEY, BASE), ["m"], retries=0)
        chain = FailoverChain([tier, spare], failure_threshold=100)
        for _ in range(3):
            chain.chat(messages, timeout=5)
        sent = len(mock.calls)
        error = error_of(RouterError, FailoverChain([tier]).chat, messages)
        assert not isinstance(error, (AuthenticationError, QuotaExceeded))
        return sent


@pytest.mark.parametrize(("status", "body", "prompt"), [
    (403, "<html><h1>Attention Required!</h1> You have been blocked</html>", "hi"), (403, "", "hi"),
    (403, "Request blocked by rule 942100", "select * from users"),
    (400, says("cannot parse: why is it an incorrect api key"), "why is it an incorrect api key?"),
    (400, says("bad token near insufficient balance"), "explain insufficient balance"),
    (400, says("Invalid prompt: YOU EXCEEDED YOUR CURRENT QUOTA!"),
        "You exceeded your current quota"),
    (422, {"detail": [{"msg": "no: invalid api key"}]}, "he said: invalid api key"),
    (500, says("crashed on: the server is overloaded"), "the server is overloaded"),
    (403, says("sentence not liked: insufficient balance"), "insufficient balance"),
    (403, {"message": "Forbidden"}, "drop table"), (403, says("Access denied by a policy"), "hi"),
    (400, says("Invalid value for 'name': 'overloaded'"), "what is an 'overloaded' operator?"),
    (422, says("odd: server busy"), "is the server busy or at capacity?"),
    *((200, says(told), "hi") for told in ("error near 'limit: 0'", "near 'out of credits'"))])
def test_one_request_that_is_disliked_parks_nobody(status: int, body: Any, prompt: str) -> None:
    """Neither the page of a firewall nor words that the server repeats of the request."""
    assert asked(status, body, prompt) == 3


@pytest.mark.parametrize(("status", "body"), [
    (401, "no"), (402, ""), (403, says("Your API key has no permission for this model")),
    (403, says("x", type="permission_error")), (429, says("Insufficient balance")),
    (429, says("slow", type="requests")), (400, says(OVERDUE, code="Arrearage")),
    (412, says(ARREARS)), (403, {"Message": "Bearer Token has expired"})])  # Fireworks, Bedrock
def test_a_key_without_money_or_permission_parks(status: int, body: Any) -> None:
    assert asked(status, body, "hi") == 1


def test_words_of_the_request_are_taken_out_before_the_message_is_read() -> None:
    prompt = "what does it mean: model overloaded, context length, tools not supported?"
    for kind, status in ((ServerError, 500), (BadRequest, 400), (RateLimited, 429)):
        assert type(refused(status, says(f"cannot read '{prompt}'"), messages=prompt)) is kind
    rows = "\n".join(f"row,{at}" for at in range(1000))
    assert str(refused(400, says("no: row,7"), messages=rows)) == "no: ***"
    for letters, shown in (("ghijklmnopqrstuv", "***"), ("ghijklmnopqrstu", "ghijklmnopqrstu")):
        told = refused(400, says(f"no: {letters}!"), messages="abcdefghijklmnopqrstuvwxyz")
        assert str(told) == f"no: {shown}!"  # sixteen characters in a row are an echo


@pytest.mark.parametrize("told", [
    "Failed to parse input at pos 12: <tool_call>%s", "syntax error; last read: '\"%s'",
    "error parsing tool call: raw='%s', err=unexpected end of JSON input",
    "Failed to parse tool call.\nModel Output:  <|start|>%s", "x input_value='%s', input_type=str",
    'unexpected tokens remaining in message header: Some("%s")',
    'GroqException - {"error":{"code":"tool_use_failed","failed_generation":"%s"}}'])
def test_what_a_message_quotes_of_the_model_decides_nothing_and_is_not_shown(told: str) -> None:
    for words in ("moderation", "incorrect api key", "context length", "busy, try again in 9s"):
        for status, kind in ((200, InvalidResponse), (400, BadRequest), (500, ServerError)):
            error = refused(status, says(told % words))
            assert (type(error), error.retry_after) == (kind, None)
            assert words not in str(error) and str(error)[:8] == told[:8]


def test_a_failure_may_be_plain_text() -> None:
    for kind, words in ((Overloaded, "Server busy"), (ContextLengthExceeded, "prompt is too long")):
        for label in ("text/plain; charset=utf-8", "application/json"):
            error = refused(503 if kind is Overloaded else 400, words, {"Content-Type": label})
            assert (type(error), str(error)) == (kind, words)
    for body in ("<p>Server busy</p>", '{"message": "Server busy'):
        assert "busy" not in str(refused(503, body, {"Content-Type": "text/plain"}))


def test_a_server_may_say_itself_what_a_very_large_request_says_too() -> None:
    prompt = "please explain insufficient balance to me " * 4000
    echo = "in: please explain insufficient balance to me"
    for words, kind in ((echo, BadRequest), (f"{echo}. Insufficient balance!", QuotaExceeded)):
        error = refused(400, says(words), messages=prompt)
        assert (type(error), str(error)) == (kind, "status 400 without a message to show")


# -- how long to wait
def in_epoch(seconds: float, scale: float = 1.0) -> str:
    return f"{(time.time() + seconds) * scale:.0f}"


LIMIT = {"x-ratelimit-reset-requests": "7s"}
FIELDS: list[Any] = [{"resets_in_seconds": 30}, {"retry_after": "30"}, EDGE, {"metadata": {
    "headers": {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": 30}}}, {"estimated_time": 30}]
HINTS: list[tuple[int, dict[str, str], Any, float | None]] = [
    *((429, {}, says("no", **fields), 30.0) for fields in FIELDS),
    *((status, {"Retry-After": "7"}, "", 7.0) for status in (429, 500, 503, 529, 408)),
    *((status, LIMIT, "", 7.0) for status in (429, 503, 529)),
    *((status, LIMIT, "", None) for status in (400, 401, 500, 504)),
    *((429, {f"x-ratelimit-reset-{what}": "7s", f"x-ratelimit-remaining-{what}": left}, "", seconds)
      for what in ("requests", "tokens", "input-tokens", "output-tokens")
      for left, seconds in (("0", 7.0), ("1", None))),
    (429, {"retry-after-ms": "0", "retry-after": "1"}, "", 1.0),
    (429, {"retry-after-ms": "2500", "retry-after": "2"}, "", 2.5),
    (429, {"llm_provider-retry-after": "37"}, "", 37.0), (429, {}, time.strftime(
        "Limit resets at: %Y-%m-%d %H:%M:%S UTC", time.gmtime(time.time() + 40_000)), 40_000.0),
    (429, {}, time.strftime("used, resets at %Y-%m-%dT%H:%M:%S+08:00 (2056)",  # MiniMax
        time.gmtime(time.time() + 40_000 + 8 * 3600)), 40_000.0),
    (429, {"retry-after-ms": "250"}, "", 0.25), (429, {"Retry-After": "30.4"}, "", 30.4),
    (429, {"Retry-After": "30, 60"}, "", 60.0), (429, {"Retry-After": "7,7"}, "", 7.0),
    (429, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": in_epoch(4e4, 1000)}, "", 40_000.0),
    (429, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": in_epoch(4e4)}, "", 40_000.0),
    (429, {"anthropic-ratelimit-requests-reset": "2000-01-01T00:00:00Z"}, "", 0.0),
    (429, {"x-ratelimit-reset-tokens": " 1h2m3s. "}, "", 3723.0),
    (429, {"x-ratelimit-reset-tokens": "120ms", "x-ratelimit-reset-requests": "1s"}, "", 1.0),
    (429, {"x-ratelimit-reset-tokens": "soon"}, "", None),
    *((429, {"Retry-After": odd}, "", None) for odd in (
        "nan", "inf", "-1", "", "1 January", "soon", "Thu, 99 Foo 1970 99:00:00 GMT")),
    *((429, {}, text, seconds) for text, seconds in (
        ("Please wait 42342 seconds before retrying.", 42342.0), ("try again in 6m0s", 360.0),
        ("try again in 120ms", 0.12), ("retry after 20 seconds", 20.0), ("retry after 20", 20.0),
        ("try again in 2 minutes", 120.0), ("try again in 1 hour", 3600.0),
        ("Try again in 2 days", 172_800.0), ("try again after 1 seconds", 1.0),
        ("try again in 500 milliseconds", 0.5), ("try again in 5 ms", 0.005),
        ("try again later", None), ("try again in a while", None)))]


@pytest.mark.parametrize(("status", "headers", "words", "seconds"), HINTS)
def test_how_long_to_wait(status: int, headers: dict[str, str], words: Any,
        seconds: float | None) -> None:
    """Headers first, then the body; the headers of limits only at 429, 503 and 529."""
    body = words if isinstance(words, dict) else says(words or "no")
    found = refused(status, body, headers).retry_after
    close = 0.1 if seconds == 40_000 else 1e-6  # it was written down at import
    assert found == (None if seconds is None else pytest.approx(seconds, rel=close))


@pytest.mark.parametrize("form", ["%Y-%m-%dT%H:%M:%S", "%d %b %Y %H:%M:%S",
    "%d %b %Y %H:%M:%S -0000"])
def test_a_date_without_a_zone_is_not_in_the_zone_of_this_machine(form: str, monkeypatch: Any
        ) -> None:
    told = {"Retry-After": time.strftime(form, time.gmtime(time.time() + 60))}
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TZ", "EST5")
        time.tzset()
        assert refused(429, says("no"), told).retry_after == pytest.approx(60, abs=5)
    time.tzset()


def test_a_limit_whose_explanation_never_comes_is_still_a_limit() -> None:
    with Server(b"HTTP/1.1 429 Slow\r\nRetry-After: 60\r\nContent-Length: 99\r\n\r\n{") as server:
        start = time.monotonic()
        client = OpenAIProvider(KEY, server.url, stall_timeout=0.2)
        assert error_of(RateLimited, client.chat, "q", model="m").retry_after == 60
        assert time.monotonic() - start < 3


# -- request ids
@pytest.mark.parametrize("header", ["x-request-id", "request-id", "apim-request-id",
    "x-ms-request-id", "x-generation-id", "mistral-correlation-id", "x-ds-trace-id",
    "x-kong-request-id", "inference-id", "x-amzn-requestid", "x-debug-trace-id"])
def test_the_id_of_a_request_under_each_vendors_header(header: str) -> None:
    error = refused(500, says("no", code="own_code", type="t"), {header: "r-1"})
    assert (error.request_id, error.code) == ("r-1", "own_code")
    with responses.RequestsMock() as mock:
        answer = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}
        mock.post(f"{BASE}/v1/chat/completions", json=answer, headers={header: "r-2"})
        assert OpenAIProvider(KEY, BASE).chat("q", model="m").request_id == "r-2"


def test_a_broken_stream_keeps_its_request_id_and_what_it_had_used() -> None:
    usage = {"prompt_tokens": 11, "completion_tokens": 7}
    chunk = {"choices": [{"delta": {"content": "x"}}], "usage": usage}
    error = refused(200, f"data: {json.dumps(chunk)}\n\n", {"x-request-id": "req_1"})
    assert isinstance(error, InvalidResponse)
    assert (error.status, error.request_id, error.usage) == (200, "req_1", Usage(11, 7))


# -- secrets
SECRET = "tulip-Violet-9081726354"


@pytest.mark.parametrize(("settings", "shown"), [
    ({"api_key": SECRET}, SECRET), ({"api_key": SECRET}, SECRET.upper()),
    ({"api_key": lambda: SECRET}, SECRET), ({"headers": {"X-Gateway": SECRET}}, SECRET),
    ({"headers": {"Cookie": f"session={SECRET}"}}, SECRET.lower()),
    ({"headers": {"Proxy-Authorization": f"Bearer {SECRET}"}}, SECRET),
    ({"base_url": f"https://me:{SECRET}@server.test"}, SECRET),
    ({"base_url": f"https://server.test/v1?key={SECRET}"}, SECRET),
    ({"base_url": f"https://server.test/v1?sig={SECRET}&v=1"}, SECRET.upper()),
    ({"base_url": f"https://server.test/v1?code={SECRET}"}, SECRET)])
def test_no_secret_of_the_settings_is_shown(settings: dict[str, Any], shown: str) -> None:
    body = says(f"no: {shown}", code=shown, type=shown, param=shown)
    error = refused(400, body, {"X-Request-Id": shown}, **settings)
    assert SECRET.lower() not in f"{error} {error!r} {vars(error)}".lower()
    assert "no: ***" in str(error)
    whole = OpenAIProvider(settings.pop("api_key", KEY), settings.pop("base_url", BASE), **settings)
    assert SECRET.lower() not in f"{whole!r} {whole.base_url}".lower()


def test_a_key_is_hidden_in_all_its_forms_before_anything_else_is_taken_out_or_cut() -> None:
    """As JSON and URLs write it, too."""
    for written in ("ab/cd+ef/0123", r"ab\/cd+ef\/0123", "ab%2Fcd%2Bef%2f0123"):
        assert str(refused(400, says(f"no: {written}!"), api_key="ab/cd+ef/0123")) == "no: ***!"
    key = "acme-violet-9f8e7d6c5b4a3210-end"
    for told, prompt in ((f"no: {key}", "violet"), (f"{key} " * 60 + key, "q")):
        messages = [{"role": "user", "content": prompt}]
        error = refused(400, says(told), messages=messages, api_key=key)
        assert not re.search("acme|9f8e7d6c5b4a", str(error))


@pytest.mark.parametrize("change", [str, str.upper, str.title, lambda text: text[5:-3]])
@pytest.mark.parametrize("status", [200, 400, 500])
def test_no_text_of_the_request_is_shown(status: int, change: Callable[[str], str]) -> None:
    prompt = "data: the violet garden behind the old house"  # which is no data URL
    messages = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
    error = refused(status, says(f"no: {change(prompt)}!"), messages=messages)
    assert "garden behind" not in str(error).lower() and "***" in str(error)
    secret = 'key\nhunter2\n"seven7" \u00e9l\u00e9phant'  # quoted once more, as JSON or Python does
    error = refused(status, says(f"{json.dumps(secret)} {secret!r}"), messages=secret)
    assert not re.search("hunter2|seven7|phant", str(error))
    error = refused(status, says(f"\u0130: {prompt}"), messages=messages)  # lower() makes it longer
    assert str(error) == "\u0130: ***"


@pytest.mark.parametrize("fields", [{"content": "%s"}, {"reasoning": "%s"},
    {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": "%s"}}]}])
def test_no_text_of_the_answer_is_shown_by_an_error_inside_it(fields: Any) -> None:
    text = "the amber answer of this model"
    chunk = json.dumps({"choices": [{"delta": fields}]}).replace("%s", text)
    broken = json.dumps(says(f"stopped after: {text}"))
    error = refused(200, f"data: {chunk}\n\ndata: {broken}\n\n")
    assert "amber" not in f"{error} {error!r} {vars(error)}"
    error = refused(200, f"data: {json.dumps(says(f'no: {SECRET}'))}\n\n", api_key=SECRET)
    assert "no: ***" in str(error) and (error.__context__, error.__cause__) == (None, None)


def test_no_secret_of_a_session_of_the_users_own_is_shown() -> None:
    answer = reply(says(f"no: {SECRET}, of the address"), 400, X_Request_Id=SECRET)
    session = requests.Session()
    session.params = {"key": "of the address"}
    for auth in (("me", SECRET), lambda request: request.headers.update(A=SECRET) or request,
                 requests.auth.HTTPDigestAuth("me", SECRET)):
        session.auth, session.headers["X-Mine"] = auth, f"Bearer {SECRET}"
        with Server(answer) as server, pytest.raises(ProviderError) as caught:
            OpenAIProvider(KEY, server.url, session=session).chat("hi", model="m")
        assert SECRET not in f"{caught.value} {vars(caught.value)}"
        assert str(caught.value) == "no: ***, ***"


def test_a_server_that_calls_its_model_by_a_key_names_it_nowhere() -> None:
    for name, shown in ((SECRET, "m"), ("a\nb", "m"), ("C:\\My Models\\x.gguf", None)):
        body = {"model": name, "choices": [{"message": {"content": "x"}, "finish_reason": name}]}
        with responses.RequestsMock() as mock:
            mock.post(re.compile(".*"), json=body)
            answer = OpenAIProvider(SECRET, BASE).chat("hi", model="m")
        assert (answer.model, answer.finish_reason) == (shown or name, "unknown")


@pytest.mark.quiet
def test_lines_of_urllib3_show_no_key_and_no_echo(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    odd = f"HTTP/1.1 500 Oops\r\n{SECRET} without colon\r\nX: y\r\n\r\n".encode()
    with Peer(lambda _, connection, request: connection.sendall(odd)) as server:  # and hangs up
        with pytest.raises(ProviderError):
            OpenAIProvider(SECRET, f"{server.url}?key={SECRET}").chat("hi", model="m")
        assert SECRET not in caplog.text and "POST /v1/chat/completions" in caplog.text
        requests.get(f"{server.url}?mine=1", timeout=5)
    assert "?mine=1" in caplog.text  # a request of the user's own is logged as ever


def test_a_message_shows_no_control_characters_and_is_clipped() -> None:
    error = refused(400, says("a\x1b[31m\u202eb\r\n\x00c" + " x" * 5000))
    assert str(error).isprintable() and len(str(error)) < 400


# -- searching is bounded
SIZE = 64 * 1024
PIECES = """1 . 9m 1h2m a- model( ((( [ { \u00e9 sk- key- bearer n_keep tool_choice image
    response_format json_schema max_tokens try-again-in wait-for retry-after temperature"""
HOSTILE = [piece * (SIZE // len(piece)) for piece in (
    *PIECES.split(), " ", "model ", "the model x ", "n_keep ", "tool choice ", "try again in ",
    "1 ms ", "unsupported parameter: ", "'temperature' ", "current length is 1 while ",
    "wait for 1 ")]


@pytest.mark.parametrize("place", ["message", "code", "header", "delay", "page", "event", "id"])
def test_no_text_of_a_server_takes_long_to_search(place: str) -> None:
    limits = ("x-ratelimit-reset-requests", "x-ratelimit-reset-tokens", "x-ratelimit-reset")
    named = {"header": (*limits, "retry-after"), "id": ("x-request-id",)}.get(place, ())
    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        text = HOSTILE[int(request.rpartition(b"hostile ")[2].partition(b'"')[0])]
        one = text.encode("ascii", "replace").decode().strip()[: 65_000 // max(1, len(named))]
        body = {"message": says(text), "page": text.encode(), "event": sse(says(text)),
            "code": says("no", code=text, type=text, param=text, status=text),
            "delay": says("no", details=[{"retryDelay": text, "reason": text}])}
        status, headers = 200 if place == "event" else 429, dict.fromkeys(named, one)
        connection.sendall(reply(body.get(place, says("no")), status, **headers))
        return True
    with Peer(serve) as server:
        client = OpenAIProvider(KEY, server.url)
        for number in range(len(HOSTILE)):
            start = running()
            with pytest.raises(ProviderError):
                client.chat(f"hostile {number}", model="m", temperature=0.5, timeout=5)
            assert running() - start < 0.5, (place, HOSTILE[number][:30])
        client.close()


def test_a_large_prompt_does_not_make_failures_slow() -> None:
    """Echoes are looked for in bounded time: 8 MiB of prompt, and a message of prompt-like text."""
    words = [f"word{number} " for number in range(1000)]
    prompt = "".join(random.Random(1).choices(words, k=1_000_000))
    message = "no: " + prompt[4_000_000:4_001_000]
    with responses.RequestsMock() as mock:
        mock.post(f"{BASE}/v1/chat/completions", status=400, json=says(message))
        mock.post(f"{BASE}/v1/chat/completions", status=400, json=says("x"))
        client, taken = OpenAIProvider(KEY, BASE), []
        for _ in range(2):
            start = running()
            caught = error_of(BadRequest, client.chat, prompt, model="m")
            taken.append(running() - start)
            assert prompt[4_000_100:4_000_140] not in str(caught)
    assert taken[0] < taken[1] + 1.0
