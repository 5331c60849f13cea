"""The Chat Completions wire format and the reading of failures: pure functions, no sockets."""

from __future__ import annotations

import json
import time
from email.utils import formatdate
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copilot_router import (
    _SSE,
    AuthenticationError,
    BadRequest,
    ContentFiltered,
    ContextLengthExceeded,
    EmptyResponse,
    InvalidResponse,
    LLMResponse,
    ModelNotFound,
    Overloaded,
    ProviderError,
    ProviderTimeout,
    ProviderUnavailable,
    QuotaExceeded,
    RateLimited,
    ServerError,
    UnsupportedRequest,
    Usage,
    _Answer,
    _Call,
    _chat_body,
    _chat_message,
    _ChatDecoder,
    _class_of,
    _correction,
    _duration,
    _error_facts,
    _GeminiDecoder,
    _InBandError,
    _json,
    _Limits,
    _masked,
    _retry_hint,
    _texts_of,
    _ThinkSplitter,
)

# -- server-sent events

TRICKY = (
    "\ufeffdata: one\n\n: comment\n\ndata:no space\r\n\r\ndata: two\rdata: lines\r\r"
    "event: named\ndata: \u2028 in \u2029 data\n\nid: 7\nretry: 5\n\ndata\n\nerror: {\"old\": 1}\ndata: last"
).encode()
EVENTS = [
    ("", b"one"),
    ("", b"no space"),
    ("", b"two\nlines"),
    ("named", "\u2028 in \u2029 data".encode()),
    ("error", b' {"old": 1}'),
    ("", b"last"),
]


def parsed(*chunks: bytes) -> list[tuple[str, bytes]]:
    parser = _SSE()
    return [event for chunk in chunks for event in parser.feed(chunk)] + parser.close()


def test_events_by_the_book() -> None:
    """CR, LF, CRLF, BOM, comments, multi-line data, no space, U+2028 inside, no last blank line."""
    assert parsed(TRICKY) == EVENTS


@pytest.mark.parametrize("at", range(3, len(TRICKY)))
def test_events_are_the_same_however_they_are_split(at: int) -> None:
    """Every split in two; and byte by byte."""
    assert parsed(TRICKY[:at], TRICKY[at:]) == EVENTS
    assert parsed(*(TRICKY[n : n + 1] for n in range(3, len(TRICKY)))) == EVENTS


def test_a_huge_line_is_not_quadratic() -> None:
    """Thirty megabytes in small pieces take about a second, not minutes."""
    start = time.monotonic()
    parser = _SSE()
    for _ in range(2000):
        assert not parser.feed(b"x" * 16384)
    assert time.monotonic() - start < 5


# -- a leading think block


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>hm, well</think>\n\nThe answer", "hm, well", "The answer"),
        ("  <think></think>x", "", "x"),
        ("no thoughts <think>here</think>", "", "no thoughts <think>here</think>"),
        ("<thinking>x", "", "<thinking>x"),
        ("<think>never ends", "never ends", ""),
        (" <th", "", " <th"),
    ],
)
def test_a_leading_think_block_is_reasoning(text: str, thought: str, answer: str) -> None:
    """Whole, and for every split into two and into single characters."""
    for pieces in [[text], list(text), *[[text[:at], text[at:]] for at in range(1, len(text))]]:
        splitter = _ThinkSplitter()
        shown = "".join(splitter.feed(piece) for piece in pieces) + splitter.close()
        assert (shown.lstrip() if thought else shown, "".join(splitter.thought)) == (answer, thought)


# -- the decoder


ASKED = _Call([{"role": "user", "content": "x"}], None, "asked", {})


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
PARSED = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def new_decoder() -> _ChatDecoder:
    return _ChatDecoder(ASKED)



def decoded(*chunks: dict[str, Any], whole: bool = False) -> LLMResponse:
    decoder = new_decoder()
    for chunk in chunks:
        if whole:
            decoder.feed_whole(chunk)
        else:
            decoder.feed("", json.dumps(chunk).encode())
    return decoder.response()


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def call(arguments: Any = None, name: str | None = None, **fields: Any) -> dict[str, Any]:
    function = {key: value for key, value in {"name": name, "arguments": arguments}.items() if value is not None}
    return delta(tool_calls=[{**fields, "function": function}])


STOP = delta("stop")


def test_18_usage_after_the_finish_reason() -> None:
    """The usage chunk has no choices; the model is the one that the server reports."""
    usage = {"prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": None}
    response = decoded({**delta(content="Hi"), "model": "m-1"}, STOP, {"choices": [], "usage": usage}, {"usage": usage})
    assert (response.text, response.usage, response.model) == ("Hi", Usage(9, 5, 4), "m-1")
    assert decoded(delta(content="x"), STOP).model == "asked"


@pytest.mark.parametrize(
    "chunks",
    [
        [call("", "f", index=0, id="a"), call('{"x"', index=0), call(": 1}", index=0)],
        [call('{"x": 1}', "f", index=0, id="a")],
        [call('{"x": 1}', "f", id="a")],
        [call('{"x"', "f", id="a"), call(": 1}")],
        [call('{"x"', "f", index=0, id="a"), call(": 1}", "f", index=0), call("", "", index=0)],
        [call({"x": 1}, "f", index=0, id="a")],
        [delta(function_call={"name": "f", "arguments": '{"x": 1}'})],
    ],
    ids=["pieces", "at once", "no index", "no index in pieces", "name repeated", "an object", "legacy"],
)
def test_19_tool_calls_in_all_their_forms(chunks: list[dict[str, Any]]) -> None:
    """One call with its arguments; "stop" becomes tool_calls."""
    response = decoded(*chunks, STOP)
    assert [(one.name, one.arguments) for one in response.tool_calls] == [("f", {"x": 1})]
    assert response.finish_reason == "tool_calls"


def test_19_two_calls_under_one_index_are_told_apart_by_their_ids() -> None:
    """A new id starts a new call; a missing one is made up."""
    response = decoded(call("{}", "f", index=0, id="a"), call("{}", "g", index=0, id="b"), call("{}", "h", index=1), STOP)
    assert [(one.id, one.name) for one in response.tool_calls] == [("a", "f"), ("b", "g"), ("call_2", "h")]


@pytest.mark.parametrize(
    ("text", "arguments"), [("", {}), (" ", {}), ("null", None), ("[1]", None), ('{"a', None), ('{"a": 1}', {"a": 1})]
)
def test_20_arguments_never_raise(text: str, arguments: dict[str, Any] | None) -> None:
    """None when the model's JSON is no object; the raw text is kept."""
    (one,) = decoded(call(text, "f", index=0, id="a"), STOP).tool_calls
    assert (one.arguments, one.raw_arguments) == (arguments, text)


@pytest.mark.parametrize(
    ("reason", "tools", "finish"),
    [("stop", False, "stop"), ("stop", True, "tool_calls"), ("length", True, "length"), ("tool_calls", False, "stop"),
     ("content_filter", False, "content_filter"), ("whatever", False, "stop"), ("function_call", True, "tool_calls")],
)  # fmt: skip
def test_21_finish_reasons(reason: str, tools: bool, finish: str) -> None:
    """Length stays length; an unknown one is stop if there is content."""
    chunks = [delta(content="x"), *([call("{}", "f", index=0, id="a")] if tools else []), delta(reason)]
    assert decoded(*chunks).finish_reason == finish


@pytest.mark.parametrize(
    "fields",
    [{"reasoning_content": "hm"}, {"reasoning": "hm"}, {"reasoning_details": [{"text": "hm"}, 5]},
     {"reasoning_details": [{"summary": "hm"}]}, {"content": "<think>hm</think>"}],
)  # fmt: skip
def test_33_reasoning_under_all_its_names(fields: dict[str, Any]) -> None:
    """Each lands in .reasoning, none in the content."""
    response = decoded(delta(**fields), delta(content="fine"), STOP)
    assert (response.text, response.reasoning) == ("fine", "hm")


def test_a_whole_answer_through_the_same_code() -> None:
    """Content as text or parts, a refusal, the raw JSON kept."""
    body = {"choices": [{"message": {"content": [{"type": "text", "text": "a"}, 3, {"text": "b"}]}}]}
    response = decoded(body, whole=True)
    assert (response.text, response.raw, response.finish_reason) == ("ab", body, "stop")
    assert decoded({"choices": [{"text": "legacy"}]}, whole=True).text == "legacy"
    with pytest.raises(ContentFiltered):
        decoded({"choices": [{"message": {"content": None, "refusal": "no"}, "finish_reason": "stop"}]}, whole=True)


@pytest.mark.parametrize(
    "chunk",
    [
        [], "x", 5, None, {}, {"choices": None}, {"choices": "x"}, {"choices": {}}, {"choices": [None]}, {"choices": ["x"]},
        {"choices": [{"delta": 5}]}, {"choices": [{"delta": {"content": 5}}]}, {"choices": [{"delta": {"tool_calls": 5}}]},
        {"choices": [{"delta": {"tool_calls": [5]}}]}, {"choices": [{"delta": {"tool_calls": [{"function": 5}]}}]},
        {"choices": [{"delta": {"tool_calls": [{"function": {"name": "f", "arguments": 5}}]}}]},
        {"choices": [{"delta": {}, "finish_reason": 5}]},
    ],
)  # fmt: skip
def test_wrong_types_anywhere_are_an_invalid_response(chunk: Any) -> None:
    """In a chunk and in a whole answer."""
    with pytest.raises(InvalidResponse):
        decoded(chunk, STOP)
    with pytest.raises(InvalidResponse):
        decoded(json.loads(json.dumps(chunk).replace("delta", "message")), whole=True)


@pytest.mark.parametrize(
    "chunk",
    [{"error": "x"}, {"error": {"message": "x"}}, {"error": ["x"]}, {"object": "error", "message": "x"},
     {"choices": [{"error": {"code": 502}}]}, delta("error")],
)  # fmt: skip
def test_16_errors_inside_a_200(chunk: dict[str, Any]) -> None:
    """Wherever they stand; an event named error, too."""
    with pytest.raises(_InBandError):
        decoded(delta(content="x"), chunk)
    for data in (b'{"message": "x"}', b'{"error": "x"}'):
        with pytest.raises(_InBandError):
            new_decoder().feed("error", data)


def test_17_no_finish_reason_is_no_answer() -> None:
    """Unless the end marker has come; nameless calls and empty answers are none either."""
    with pytest.raises(InvalidResponse, match="truncated"):
        decoded(delta(content="x"))
    decoder = new_decoder()
    decoder.feed("", b"[DONE]")
    with pytest.raises(EmptyResponse):
        decoder.response()
    with pytest.raises(InvalidResponse, match="no name"):
        decoded(call("{}", index=0), STOP)
    with pytest.raises(EmptyResponse):
        decoded(STOP)
    with pytest.raises(InvalidResponse, match="no choices"):
        decoded({"choices": []}, whole=True)
    with pytest.raises(InvalidResponse, match="not JSON"):
        new_decoder().feed("", b"{nope")


@pytest.mark.parametrize("usage", ["x", 5, [], {"prompt_tokens": "9"}, {"prompt_tokens": -1, "completion_tokens": True}])
def test_senseless_usage_does_not_cost_the_answer(usage: Any) -> None:
    """It counts as nothing."""
    assert decoded({**delta(content="x"), "usage": usage}, STOP).usage == Usage()


# -- the encoder


def test_12_the_token_limit_has_the_name_the_server_knows() -> None:
    """max_completion_tokens at OpenAI, max_tokens elsewhere, whichever was given."""
    for given_name in ("max_tokens", "max_completion_tokens"):
        request = _Call([{"role": "user", "content": "x"}], None, "m", {given_name: 5})
        assert _chat_body(request, False, True)["max_completion_tokens"] == 5
        assert _chat_body(request, False, False)["max_tokens"] == 5


def test_a_body_in_full() -> None:
    """Options as given, choices of tools only with tools, extra_body last, streaming with usage."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    options = {"temperature": 0, "tool_choice": "auto", "extra_body": {"top_k": 3, "stream": True}}
    body = _chat_body(_Call([{"role": "user", "content": "x"}], tools, "m", options), True, True)
    assert body == {
        "model": "m", "messages": [{"role": "user", "content": "x"}], "tools": tools, "temperature": 0, "tool_choice": "auto",
        "stream": True, "stream_options": {"include_usage": True}, "top_k": 3,
    }  # fmt: skip
    assert "tool_choice" not in _chat_body(_Call([], None, None, options), False, True)
    assert options == {"temperature": 0, "tool_choice": "auto", "extra_body": {"top_k": 3, "stream": True}}


@pytest.mark.parametrize(
    ("message", "local", "openai"),
    [
        ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}, {"role": "developer", "content": "x"}),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "a\nb"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ),
        ({"role": "assistant", "content": None, "refusal": None, "reasoning": "x"}, {"role": "assistant", "content": ""},
            None),
        ({"role": "assistant", "tool_calls": [CALL]}, {"role": "assistant", "tool_calls": [CALL], "content": None}, None),
        ({"role": "assistant", "tool_calls": [PARSED]}, {"role": "assistant", "tool_calls": [CALL], "content": None}, None),
        ({"role": "assistant", "tool_calls": [], "content": "x"}, {"role": "assistant", "content": "x"}, None),
        ({"role": "user", "content": [{"type": "image_url"}]}, {"role": "user", "content": [{"type": "image_url"}]}, None),
    ],
)
def test_37_messages_as_local_templates_take_them(message: Any, local: Any, openai: Any) -> None:
    """Roles and parts; keys that only ever belong to an answer are not sent."""
    assert _chat_message(ASKED, message, False) == local
    assert _chat_message(ASKED, message, True) == (openai or local)


# -- what an error says

NO_JSON: Any = None


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, {"error": {"message": "bad", "type": "invalid_request_error", "code": None}}, BadRequest),
        (400, {"error": {"message": "x", "code": "context_length_exceeded"}}, ContextLengthExceeded),
        (400, {"error": {"message": "This model's maximum context length is 8 tokens", "code": 400}}, ContextLengthExceeded),
        (500, {"error": {"message": "the request exceeds the available context size"}}, ContextLengthExceeded),
        (400, {"error": {"code": "content_filter", "message": "x", "innererror": {"code": "ResponsibleAIPolicyViolation"}}},
            ContentFiltered),
        (403, {"error": {"code": 403, "message": "x", "metadata": {"reasons": ["violence"]}}}, ContentFiltered),
        (401, {"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}, AuthenticationError),
        (400, [{"error": {"message": "API key not valid. Please pass", "status": "INVALID_ARGUMENT"}}], AuthenticationError),
        (404, {"error": {"message": "The model `m` does not exist", "code": "model_not_found"}}, ModelNotFound),
        (404, {"error": {"message": "nothing called my-model", "type": "x"}}, ModelNotFound),
        (404, {"error": {"message": "File Not Found", "type": "not_found_error"}}, ProviderUnavailable),
        (404, {"error": {"message": "No models loaded. Please load a model", "type": "invalid_request_error"}}, ModelNotFound),
        (404, {"error": {"code": "DeploymentNotFound", "message": "x"}}, ModelNotFound),
        (429, {"error": {"message": "x", "type": "insufficient_quota", "code": "project_spend_limit_exceeded"}},
            QuotaExceeded),
        (429, {"error": {"message": "You exceeded your current quota", "type": "insufficient_quota"}}, QuotaExceeded),
        (429, {"error": {"message": "Request too large for m on tokens per min (TPM)", "code": "rate_limit_exceeded"}},
            RateLimited),
        (429, {"error": {"message": "Request too large for m on tokens per min (TPM)"}}, ContextLengthExceeded),
        (429, {"error": {"message": "slow", "code": "slow_down"}}, Overloaded),
        (402, {"error": {"message": "credits"}}, QuotaExceeded),
        (503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}, Overloaded),
        (503, {"error": {"message": "x"}}, ServerError),
        (400, {"error": {"message": "Failed", "code": "tool_use_failed", "failed_generation": "secret"}}, InvalidResponse),
        (400, {"error": {"message": "x does not support tools"}}, UnsupportedRequest),
        (200, {"error": "Unexpected endpoint or method. (POST /x)"}, ProviderUnavailable),
        (200, {"error": {"code": 502, "message": "upstream"}}, ServerError),
        (200, {"error": {"message": "bad", "type": "invalid_request_error"}}, BadRequest),
        (200, {"error": {"message": "", "code": 429}}, RateLimited),
        (200, {"error": {"type": "overloaded_error"}}, Overloaded),
        (200, {"error": {"message": "hm"}}, InvalidResponse),
        (400, {"object": "error", "message": "x", "code": 400}, BadRequest),
        (422, {"detail": [{"msg": "field required"}, 5]}, BadRequest),
        (500, {"error": {"type": "server_error", "message": "x"}}, ServerError),
        (504, {"error": {"type": "timeout_error", "message": "x"}}, ProviderTimeout),
        (401, NO_JSON, AuthenticationError), (402, NO_JSON, QuotaExceeded), (403, NO_JSON, AuthenticationError),
        (404, NO_JSON, ProviderUnavailable), (408, NO_JSON, ProviderTimeout), (409, NO_JSON, ServerError),
        (410, NO_JSON, ProviderUnavailable), (413, NO_JSON, BadRequest), (418, NO_JSON, BadRequest),
            (425, NO_JSON, ServerError),
        (429, NO_JSON, RateLimited), (498, NO_JSON, Overloaded), (500, NO_JSON, ServerError), (502, NO_JSON, ServerError),
        (529, NO_JSON, Overloaded), (302, NO_JSON, InvalidResponse), (500, [], ServerError), (500, "text", ServerError),
    ],
)  # fmt: skip
def test_classification(status: int, body: Any, kind: type[ProviderError]) -> None:
    """Code, phrase, type, number, status: in this order."""
    assert _class_of(_error_facts(body), status, "my-model", False) is kind


NAMES_OF_ERRORS: list[tuple[type[ProviderError], str]] = [
    (ContextLengthExceeded, "context_length_exceeded exceed_context_size_error"),
    (QuotaExceeded, """insufficient_quota credit_balance_exhausted organization_spend_limit_exceeded billing_error
        project_spend_limit_exceeded organization_usage_limit_exceeded billing_hard_limit_reached enforced_spend_limit_reached
        contract_spend_limit_reached insufficient_balance payment_required weight_exceeds_budget"""),
    (RateLimited, "in_flight_budget_exhausted ramp_limit_exceeded rate_limit_exceeded rate_limit_error tokens requests"),
    (AuthenticationError, """invalid_api_key unsupported_country_region_territory API_KEY_INVALID authentication_error
        permission_error UNAUTHENTICATED PERMISSION_DENIED"""),
    (ModelNotFound, "model_not_found DeploymentNotFound not_found_error NotFoundError NOT_FOUND"),
    (ContentFiltered, """content_filter content_policy_violation invalid_prompt cyber_policy ResponsibleAIPolicyViolation"""),
    (Overloaded, """slow_down server_is_overloaded overloaded_error capacity_exceeded unavailable_error
        service_unavailable_error UNAVAILABLE"""),
    (InvalidResponse, "tool_use_failed json_validate_failed unheard_of"),
    (UnsupportedRequest, "unsupported_parameter unsupported_value not_supported_error"),
    (BadRequest, "string_above_max_length invalid_request_error BadRequestError INVALID_ARGUMENT"),
    (ProviderTimeout, "timeout_error timeout request_timeout"),
    (ServerError, "server_error api_error internal_error internal_server_error INTERNAL"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES_OF_ERRORS for name in names.split()])
def test_the_vendors_names_of_errors(kind: type[ProviderError], name: str) -> None:
    """In an answer of status 200, where nothing but the name tells; whether it stands as a code or as a type."""
    for field in ("code", "type"):
        assert _class_of(_error_facts({"error": {field: name, "message": ""}}), 200, None, False) is kind


@pytest.mark.parametrize("number", [429, 503, 529])
def test_a_number_says_more_than_a_server_error(number: int) -> None:
    for name in ("server_error", "api_error", "internal_error", "internal_server_error", "INTERNAL"):
        expected = {429: RateLimited, 503: ServerError, 529: Overloaded}[number]
        assert _class_of(_error_facts({"error": {"type": name, "message": ""}}), number, None, False) is expected
        assert _class_of(_error_facts({"error": {"type": name, "message": "", "code": 500}}), 200, None, False) is ServerError


PHRASES_OF_ERRORS: list[tuple[type[ProviderError], str]] = [
    (ContextLengthExceeded, """exceeds the context length|beyond the context window|maximum context is 8|the context size|
        prompt is too long: 9 tokens|it is longer than the model takes|context the overflows|n_keep 9 >= n_ctx 8|
        would exceed context limit|the input tokens exceed it|the input token count (9)|request too large for m|
        current length is 9 while limit is 8"""),
    (QuotaExceeded, """your credit balance is too low|you exceeded your current quota|insufficient balance|
        prepaid credits are depleted|quota, limit: 0|a spend limit"""),
    (AuthenticationError, """incorrect API key|invalid API key|API key not valid|API key expired|invalid x-api-key|
        user location is not supported"""),
    (ModelNotFound, """no model loaded|no models loaded|model is unloaded|model m not found|model m does not exist|
        model m has been retired|model m has been deprecated|model m is no longer available|unknown model m|model: m"""),
    (ContentFiltered, """content management policy|content filtering policy|violating our usage policy|flagged as unsafe|
        moderation says no"""),
    (ProviderUnavailable, "unexpected endpoint|invalid URL (POST /x)"),
    (Overloaded, "loading model|currently overloaded|server busy|maximum pending requests"),
    (UnsupportedRequest, """m does not support tools|m does not support images|it does not support vision|
        does not support thinking|does not support chat|image input is off|requires --enable-auto-tool-choice|
        tools are not supported|a tool is not supported|image is not supported|response_format is not supported|
        json_schema is not supported|tool_choice has no support|toolchoice is not permitted|tool_choice allowed: auto|
        tool_choice forces a call"""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "phrase"), [(kind, phrase.strip()) for kind, phrases in PHRASES_OF_ERRORS for phrase in phrases.split("|")]
)
def test_the_vendors_phrases_of_errors(kind: type[ProviderError], phrase: str) -> None:
    for message in (phrase, phrase.upper()):
        assert _class_of(_error_facts({"error": {"message": message}}), 400, None, False) is kind


@pytest.mark.parametrize(("status", "kind"), [(499, AuthenticationError), (500, ServerError), (501, ServerError)])
def test_a_servers_own_trouble_with_keys_is_not_ours(status: int, kind: type[ProviderError]) -> None:
    assert _class_of(_error_facts({"error": {"message": "invalid api key"}}), status, None, False) is kind


FINISHES = {
    "length": "MAX_TOKENS CONTINUATION",
    "content_filter": """SAFETY RECITATION LANGUAGE BLOCKLIST PROHIBITED_CONTENT SPII IMAGE_SAFETY IMAGE_PROHIBITED_CONTENT
        IMAGE_RECITATION MODEL_ARMOR ESCALATION PUP_LIMITED_DISABLED""",
    "stop": "STOP SOMETHING_NEW",
    "": """MALFORMED_FUNCTION_CALL UNEXPECTED_TOOL_CALL MALFORMED_RESPONSE TOO_MANY_TOOL_CALLS OTHER NO_IMAGE IMAGE_OTHER
        MISSING_THOUGHT_SIGNATURE""",
}


@pytest.mark.parametrize(("ours", "theirs"), [(ours, theirs) for ours, names in FINISHES.items() for theirs in names.split()])
def test_geminis_finish_reasons(ours: str, theirs: str) -> None:
    """Those without one of ours are the model's own failures."""
    decoder = _GeminiDecoder(ASKED, {})
    body = {"candidates": [{"content": {"parts": [{"text": "x"}]}, "finishReason": theirs}]}
    if ours:
        decoder.feed_whole(body)
        assert decoder.response().finish_reason == ours
    else:
        with pytest.raises(InvalidResponse) as caught:
            decoder.feed_whole(body)
        assert caught.value.code == theirs.lower()


def test_a_signature_is_a_sign_of_life() -> None:
    decoder = _GeminiDecoder(ASKED, {})
    assert decoder.feed("", b'{"candidates": [{"content": {"parts": [{"thoughtSignature": "x"}]}}]}') == ""
    assert decoder.alive


def test_a_retry_hint_turns_money_into_time() -> None:
    """402 with Retry-After is a rate limit; 503 with one is overload."""
    assert _class_of(_error_facts({"error": {"message": "x"}}), 402, None, True) is RateLimited
    assert _class_of(_error_facts({"error": {"code": "payment_required"}}), 402, None, True) is RateLimited
    assert _class_of(_error_facts(None), 503, None, True) is Overloaded


@pytest.mark.parametrize(
    ("headers", "message", "seconds"),
    [
        ({"retry-after-ms": "1500"}, "", 1.5), ({"retry-after": "30"}, "", 30), ({"retry-after": "0.5"}, "", 0.5),
        ({"retry-after": "0"}, "", 0), ({"retry-after": "-1"}, "", None), ({"retry-after": "nan"}, "", None),
        ({"retry-after": "inf"}, "", None), ({"retry-after": "soon"}, "", None), ({"retry-after": "36000"}, "", 36000),
        ({"retry-after": "never GMT"}, "", None), ({"retry-after": formatdate(0, usegmt=True)}, "", 0),
        ({}, "Please try again in 6m0s.", 360), ({}, "try again in 1.5s", 1.5), ({}, "retry after 20 seconds", 20),
        ({"x-ratelimit-reset-requests": "120ms", "x-ratelimit-reset-tokens": "1m2s"}, "", 62),
        ({"x-ratelimit-reset-requests": "9s", "x-ratelimit-remaining-requests": "5"}, "", None),
        ({}, "", None),
    ],
)  # fmt: skip
def test_15_retry_hints_in_all_forms(headers: dict[str, str], message: str, seconds: float | None) -> None:
    """Nonsense, negative and infinite ones are none."""
    assert _retry_hint(headers, _error_facts(message), True) == (None if seconds is None else pytest.approx(seconds))


def test_a_retry_date_is_a_distance() -> None:
    """An HTTP date in the future."""
    hint = _retry_hint({"retry-after": formatdate(time.time() + 60, usegmt=True)}, _error_facts(""), True)
    assert hint is not None
    assert 55 < hint <= 60
    assert (_duration("1h2m3s"), _duration("x")) == (3723, None)


def test_messages_of_servers_are_masked_and_clipped() -> None:
    """Keys, what looks like one, and what the message repeats of the request."""
    prompt = "please summarise the merger of Initech and Hooli"
    texts = list(_texts_of([{"role": "user", "content": [{"type": "text", "text": prompt}]},
        {"role": "user", "content": "Bond"}, 5]))
    message = f"bad input '{prompt[:30]}' by Bond, key sk-abcdef123456 and my-own-key, Bearer abc, {'y' * 50}"
    masked = _masked(message, ("my-own-key", "x"), texts)
    for secret in (prompt[:16], "Bond", "sk-abcdef", "my-own-key", "abc,", "y" * 40):
        assert secret not in masked
    assert masked.startswith("bad input '***'")
    assert len(_masked("a b " * 500, (), ())) == 300


@pytest.mark.parametrize(
    ("message", "param", "options", "fix"),
    [
        ("Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
         "max_tokens", {"max_tokens": 5}, ("token_limit", "max_completion_tokens")),
        ("Unrecognized request argument supplied: max_completion_tokens", "", {"max_completion_tokens": 5},
         ("token_limit", "max_tokens")),
        ("Unsupported value: 'temperature' does not support 0.2 with this model.", "temperature", {"temperature": 0.2},
         ("temperature", None)),
        ("temperature: Extra inputs are not permitted", "", {"temperature": 0.2, "top_p": 1}, ("temperature", None)),
        ("`temperature` is deprecated for this model.", "", {"temperature": 0.2}, ("temperature", None)),
        ('Unknown name "topP" at generation_config', "", {"top_p": 1}, ("top_p", None)),
        ("\"thinking.type.disabled\" is not supported for this model", "", {"reasoning_effort": "none"},
         ("reasoning_effort", None)),
        ("Function tools with reasoning_effort are not supported. Set reasoning_effort to 'none'.", "reasoning_effort",
         {"reasoning_effort": "high"}, ("reasoning_effort", "none")),
        ("unknown field stream_options", "", {}, ("stream_options", None)),
        ("temperature and top_p are not supported", "", {"temperature": 1, "top_p": 1}, None),
        ("temperature and top_p are not supported", "top_p", {"temperature": 1, "top_p": 1}, ("top_p", None)),
        ("tools are not supported", "tools", {}, None),
        ("temperature is not supported", "temperature", {}, None),
        ("temperature must be below 2", "temperature", {"temperature": 3}, None),
        ("max_tokens is not allowed to be that large", "max_tokens", {"max_tokens": 10**9}, None),
    ],
)  # fmt: skip
def test_one_field_can_be_corrected(message: str, param: str, options: Any, fix: Any) -> None:
    """A hint is dropped, a limit renamed, an effort replaced; anything else is not touched."""
    facts = _error_facts({"error": {"message": message, "param": param}})
    call = _Call([], None, "m", options)
    assert _correction(facts, 400, call, None) == fix
    assert _correction(facts, 500, call, None) is None
    assert _correction(facts, 400, call, ("api", "responses")) == ("api", "responses")


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("Try again in 20s", 20), ("try again in 2 minutes", 120), ("Please retry after 1 hour.", 3600),
        ("retry in 500 ms", 0.5),
        ("retry in 250 milliseconds", 0.25), ("try again in 1 day", 86400), ("try again in 20 seconds", 20),
        ("try again in 6m0s.", 360), ("try again in 20. Thank you", 20), ("try again in 1.5 hrs", 5400),
        ("try again later", None),
    ],
)  # fmt: skip
def test_a_hint_in_words_has_its_unit(said: str, seconds: float | None) -> None:
    """A number without one is seconds."""
    assert _retry_hint({}, _error_facts(said), False) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (503, "The moderation service is unavailable", ServerError), (409, "flagged as duplicate", ServerError),
        (429, "rate limit for omni-moderation-latest reached", RateLimited), (403, "moderation", ContentFiltered),
        (400, "Output blocked by content filtering policy", ContentFiltered), (200, "flagged as violence", ContentFiltered),
    ],
)  # fmt: skip
def test_a_word_about_safety_is_not_yet_a_refusal(status: int, message: str, kind: type[ProviderError]) -> None:
    """Only a status at which a request can be refused makes it one: else nobody would be asked instead."""
    assert _class_of(_error_facts({"error": {"message": message}}), status, None, False) is kind


def test_an_empty_piece_between_cr_and_lf_changes_nothing() -> None:
    """A decompressor may yield one."""
    parser = _SSE()
    found = [event for piece in (b"event: x\r", b"", b"\ndata: 1\r\n\r\n") for event in parser.feed(piece)]
    assert found == [("x", b"1")]


def test_groq_streams_its_usage_apart() -> None:
    """In x_groq of the last chunk."""
    last = {**STOP, "x_groq": {"usage": {"prompt_tokens": 3, "completion_tokens": 2}}}
    assert decoded(delta(content="x"), last).usage == Usage(3, 2)


def test_the_interpreters_own_trouble_while_reading_is_no_transport_error() -> None:
    """MemoryError stays what it is."""

    class Raw:
        def read1(self, *_: object, **__: object) -> bytes:
            raise MemoryError

    response = SimpleNamespace(status_code=200, headers={}, raw=Raw())
    with pytest.raises(MemoryError):
        _Answer(response, _Limits(5, 5, 5, 5, (5, 5)), 100).body()


def test_an_emoji_cut_in_half_is_one_emoji() -> None:
    """Two deltas that hold a surrogate each; a lone one, wherever it stands, is U+FFFD and can be printed."""
    decoder = new_decoder()
    texts = ("a\ud83d", "\ude00b", "\ude00 c", "d\ud83d")
    pieces = [decoder.feed("", json.dumps(delta(content=text)).encode()) for text in texts]
    decoder.feed("", json.dumps({**STOP}).encode())
    assert pieces == ["a", "\U0001f600b", "\ufffd c", "d"]
    assert decoder.response().content == "a\U0001f600b\ufffd cd\ufffd"
    thought = decoded(delta(reasoning="\ud83d"), delta(reasoning="\ude00", content="x"), STOP)
    assert thought.reasoning == "\U0001f600"


# -- nothing but ProviderErrors

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["choices", "delta", "message", "content", "tool_calls", "function", "name", "arguments", "error",
                         "finish_reason", "usage", "code", "type", "index", "id", "detail", "details", "metadata"]),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=1000, deadline=None)
@given(st.lists(JSON, max_size=4), st.booleans(), st.integers(200, 599))
def test_whatever_comes_only_provider_errors_go_out(chunks: list[Any], whole: bool, status: int) -> None:
    """The decoder and the classifier, fed with anything."""
    for chunk in chunks:
        kind = _class_of(_error_facts(chunk), status, "m", whole)
        assert issubclass(kind, ProviderError)
    try:
        assert isinstance(decoded(*chunks, whole=whole), LLMResponse)
    except (ProviderError, _InBandError):
        pass


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_whatever_bytes_come(data: bytes) -> None:
    """As server-sent events and as JSON."""
    for name, event in parsed(data):
        try:
            assert isinstance(new_decoder().feed(name, event), str)
        except (ProviderError, _InBandError):
            pass
    try:
        found = _json(data, "x")
    except InvalidResponse:
        pass
    else:
        assert json.dumps(json.loads(data.decode("utf-8-sig", "replace"))) == json.dumps(found)


def test_odd_but_complete_chunks() -> None:
    """A choice without delta, and a text that only began like a think block."""
    assert decoded(delta(content=" <th"), {"choices": [{"finish_reason": "stop"}]}).text == " <th"
