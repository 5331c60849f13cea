"""Chat Completions with its compatible servers, the Responses API, and LM Studio."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from support.fakes import error_of
from support.server import (STOP, TOOLS, USER, Server, delta,
    message, piece, read, reply, sent, stream, talking)
from support.vendors import KEY, Chat, Reply, faked

from copilot_router import (BadRequest, ContentFiltered, EmptyResponse, FailoverChain,
    InvalidResponse, LLMResponse, ModelNotFound, OpenAIProvider, Overloaded, ProviderTier,
    ProviderUnavailable, RateLimited, ServerError, Thought, UnsupportedRequest, Usage)

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "cold"}


def both(finish: str, **fields: Any) -> list[bytes]:
    return [stream(delta(**fields), delta(finish), done=True), reply(message(finish, **fields))]


# -- when an answer of Chat Completions is complete
@pytest.mark.parametrize("theirs", ["stop", "function_call", "tool_calls", "length"])
def test_finish_reasons_of_tool_calls(theirs: str) -> None:
    expected = "length" if theirs == "length" else "tool_calls"
    for wire in (stream(piece("{}", "f", index=0, id="a"), delta(theirs)),
                 reply(message(theirs, content=None, tool_calls=[CALL]))):
        assert read("chat", wire).finish_reason == expected


def test_a_finish_reason_that_is_the_type_of_an_error_is_that_error() -> None:
    for word, kind in (("overloaded_error", Overloaded), ("rate_limit_error", RateLimited)):
        assert isinstance(read("chat", stream(delta(content="x"), delta(word), done=True)), kind)


@pytest.mark.parametrize("word", ["end_turn", "error", "network_error", "abort"])
def test_the_native_reason_behind_a_gateway_may_say_that_the_answer_failed(word: str) -> None:
    """Any other word may stand beside a stop."""
    choice = {"index": 0, "finish_reason": "stop", "native_finish_reason": word}
    for wire in (stream(delta(content="x"), {"choices": [{**choice, "delta": {}}]}, done=True),
                 reply({"choices": [{**choice, "message": {"content": "x"}}]})):
        found = read("chat", wire)
        kinds = LLMResponse if word == "end_turn" else (InvalidResponse, ServerError)
        assert isinstance(found, kinds)


BARE = {"choices": [{"index": 0, "delta": {"content": "x"}}]}


def x_with(finish: str | None) -> dict[str, Any]:
    return delta(finish, content="x")


@pytest.mark.parametrize(("events", "done", "complete"), [([BARE, BARE], True, True),
    ([x_with(""), x_with("")], True, True), ([BARE, x_with("")], True, True),
    ([BARE, BARE], False, False), ([x_with(""), x_with("")], False, False),
    ([x_with(None), x_with(None)], True, False), ([x_with("null")] * 2, False, False),
    ([x_with(None), BARE], True, False), ([x_with(""), x_with(None)], True, False),
    ([x_with(""), x_with(""), STOP], False, True), ([x_with("null")] * 2 + [STOP], True, True),
    ([x_with(None), x_with(None), delta("")], True, False)])
def test_an_end_marker_completes_only_what_knows_no_finish_reasons(
        events: Any, done: bool, complete: bool) -> None:
    """Where the field was there as null, the answer was cut on its way."""
    found = read("chat", stream(*events, done=done))
    assert isinstance(found, LLMResponse) == complete
    assert (found.text, found.finish_reason) == ("xx", "stop") if complete else type(
        found) is InvalidResponse


def test_usage_comes_behind_the_finish_reason_and_nulls_take_nothing_back() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14,
             "prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens_details": None}
    nulls = dict.fromkeys(usage)
    inside = {**nulls, "prompt_tokens_details": {"cached_tokens": None, "audio_tokens": 0}}
    for later in ([], [{"choices": [], "usage": None}], [{"choices": [], "usage": nulls}],
                  [{"choices": [], "usage": {}}], [{"usage": usage}], [{"usage": inside}]):
        wire = stream({**delta(content="x"), "model": "m-1"}, STOP, {"choices": [], "usage": usage},
                      *later, done=True)
        response = read("chat", wire)
        assert (response.usage, response.model) == (Usage(9, 5, 4), "m-1")
    counts = {"usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    for last in ({**STOP, "x_groq": counts}, {"choices": [STOP["choices"][0] | counts]}):  # Kimi
        assert read("chat", stream(delta(content="x"), last)).usage == Usage(3, 2)


@pytest.mark.parametrize(("usage", "expected"), [({"prompt_tokens": 468, "completion_tokens": 77,
    "total_tokens": 1127, "prompt_tokens_details": {"cached_tokens": 467},
    "completion_tokens_details": {"reasoning_tokens": 582}}, Usage(468, 659, 467, 0, 582)),
    ({"prompt_tokens": 35, "completion_tokens": 12, "total_tokens": 109}, Usage(35, 74)),
    ({"prompt_tokens": 30, "completion_tokens": 20, "total_tokens": 120, "cached_tokens": 64,
        "cache_creation_input_tokens": 6}, Usage(100, 20, 64, 6)),  # Portkey, of Anthropic
    ({"prompt_tokens": 9, "completion_tokens": 70, "total_tokens": 79,
        "completion_tokens_details": {"reasoning_tokens": 64}}, Usage(9, 70, 0, 0, 64)),
    *(({"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16, "reasoning_tokens": more},
        Usage(9, 7 + 70 * (more > 7), 0, 0, more)) for more in (6, 70)),  # SGLang, Perplexity
    *(({"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": total, "prompt_tokens_details":
        {"audio_tokens": 4}}, Usage(9 + 4 * (total == 20), 7)) for total in (3, 20, None)),
    ({"prompt_tokens": 9, "cached_tokens": 4}, Usage(9, 0, 4)),
    *(({"prompt_tokens": 9, name: 5}, Usage(9, 0, 5)) for name in ("prompt_cache_hit_tokens",
        "num_cached_tokens", "cache_read_input_tokens")),
    ({"prompt_tokens": "9", "completion_tokens": -1, "total_tokens": 10**400}, Usage()),
    ({"prompt_tokens": 2**53, "completion_tokens": True}, Usage()), ([], Usage()), ("x", Usage()),
    (5, Usage())])
def test_usage_of_compatible_servers(usage: Any, expected: Usage) -> None:
    """What the total leaves unexplained belongs to the completion; nonsense counts as nothing."""
    for wire in (stream({**delta("stop", content="x"), "usage": usage}),
                 reply({**message(content="x"), "usage": usage})):
        assert read("chat", wire).usage == expected


# -- forms of its answers
@pytest.mark.parametrize("fields", [{"reasoning_content": "hm"}, {"reasoning": "hm"},
    {"reasoning_text": "hm"}, {"reasoning_details": [{"type": "reasoning.text", "text": "hm"}, 5]},
    {"reasoning_details": [{"summary": "hm"}]}, {"content": "<think>hm</think>"},
    {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]},
    {"content": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}]},
    {"content": "<think>hm</think>", "reasoning_content": "hm"},  # MiniMax
    {"content": "<thought>hm</thought>", "extra_content": {"google": {"thought": True}}},
    {"content": [{"type": "reasoning", "text": "hm"}]}, {"reasoning_content": {"text": "hm"}}])
def test_reasoning_is_read_and_shown_under_all_its_names(fields: dict[str, Any]) -> None:
    wire = stream(delta(**fields), delta(content="fine"), STOP)
    parts, text = fields.get("content", ""), {"type": "text", "text": "fine"}
    parts = [*parts, text] if isinstance(parts, list) else parts + "fine"
    for one in (wire, reply(message(**{**fields, "content": parts}))):
        response = read("chat", one)
        assert (response.text, response.reasoning) == ("fine", "hm")
    with talking("chat", wire) as (provider, _):
        chain = FailoverChain([ProviderTier("a", provider, ["m"])])
        came = list(chain.stream("q", thoughts=True, timeout=10))
    assert [(type(one), str(one)) for one in came] == [(Thought, "hm"), (str, "fine")]


def test_content_may_be_parts_an_object_or_a_legacy_text() -> None:
    parts = [{"type": "text", "text": "a"}, 3, {"text": "b"}, "c"]
    response = read("chat", reply(message(content=parts)))
    assert (response.text, response.raw) == ("abc", message(content=parts))
    numbered = {**delta(content="x"), "code": 500, "status": "error"}  # which fails nothing
    assert read("chat", stream(numbered, STOP)).text == "x"
    old = {"choices": [{"text": "old", "finish_reason": "stop"}]}
    assert read("chat", reply(old)).text == "old"
    made = read("chat", reply(message(content={"city": "Oslo"})))
    assert json.loads(made.text) == {"city": "Oslo"}


@pytest.mark.parametrize("events", [[("Hello", "")], [("Hel", "Hel"), ("Hello", "lo")],
    [("Hel", "Hel"), ("Hello", "lo"), ("Hello", "")], [("Hel", ""), ("Hello", "lo"), ("", "")]])
def test_a_message_counts_beside_an_empty_delta_only(events: list[tuple[str, str]]) -> None:
    """Perplexity sends both. Whatever comes in which of them, the answer is never doubled."""
    choices: list[Any] = [{"message": {"content": a}, "delta": {"role": "assistant", "content": b}}
                          for a, b in events]
    assert read("chat", stream(*({"choices": [one]} for one in choices), STOP)).text == "Hello"
    whole = {"choices": [choices[0] | {"finish_reason": "stop"}]}
    assert read("chat", reply(whole)).text == events[0][0]


def test_refusals_and_filtered_choices_without_a_message_are_filtered() -> None:
    wires = [*both("stop", content=None, refusal="I cannot."), *both("content_filter", content=""),
             reply({"choices": [{"index": 0, "finish_reason": "content_filter"}]}),
             reply({"choices": [{"index": 0, "finish_reason": "content_filter", "message": None}]}),
             stream({"choices": [{"index": 0, "finish_reason": "content_filter"}]}, done=True)]
    for wire in wires:
        assert type(read("chat", wire)) is ContentFiltered
    for wire in both("stop", content="fine", refusal=""):
        assert read("chat", wire).text == "fine"


def test_several_choices_never_run_into_one_text() -> None:
    def choices(part: str, *texts: Any, finish: Any = None) -> dict[str, Any]:
        return {"choices": [{"index": at, part: {"content": text}, "finish_reason": finish}
                            for text, at in texts]}
    events = [choices("delta", ("A1 ", 0), ("B1 ", 1)), choices("delta", ("B2", 1), ("A2", 0))]
    assert read("chat", stream(*events, choices("delta", ("", 1), ("", 0), finish="stop"))).text \
        == "A1 A2"
    apart = [choices("delta", one) for one in (("B1 ", 1), ("A1 ", 0), ("A2", 0), ("B2", 1))]
    assert read("chat", stream(*apart, STOP, done=True)).text == "A1 A2"
    whole = {**choices("message", ("A", 0), ("B", 1), finish="stop"), "model": "m-1"}
    assert (read("chat", reply(whole)).text, read("chat", reply(whole)).model) == ("A", "m-1")
    other = choices("delta", ("", 1), finish="stop")
    assert isinstance(read("chat", stream(*apart, other, done=True)), InvalidResponse)
    parts = choices("message", ("A", None), ("", None), finish="tool_calls")  # Copilot
    parts["choices"][1]["message"] = {"tool_calls": [CALL]}
    found = read("chat", reply(parts))
    assert (found.text, len(found.tool_calls), found.finish_reason) == ("A", 1, "tool_calls")


@pytest.mark.parametrize("name", [{"function_call": {"name": "", "arguments": ""}},
    {"function_call": None}, {"tool_calls": None}, {"tool_calls": []}])
def test_an_empty_call_is_no_call(name: dict[str, Any]) -> None:
    for wire in both("stop", content="four", refusal="", **name):
        response = read("chat", wire)
        assert (response.text, response.tool_calls) == ("four", [])


def test_calls_of_whole_json_without_ids_are_told_apart() -> None:
    calls = [{"id": "", "function": {"name": name, "arguments": json.dumps({"at": at})},
        "custom": {"name": "", "input": ""}} for at, name in enumerate("fg")]
    calls += [{"id": "", "custom": {"name": "g", "input": '{"at": 2}'}}]
    response = read("chat", reply(message("tool_calls", content=None, tool_calls=calls)))
    assert [(one.name, one.arguments) for one in response.tool_calls] == [
        ("f", {"at": 0}), ("g", {"at": 1}), ("g", {"at": 2})]
    assert len({one.id for one in response.tool_calls} - {""}) == 3


@pytest.mark.parametrize("chunk", [{"choices": "x"}, {"choices": [5]}, {"choices": [{"delta": 5}]},
    delta(content=5), delta(tool_calls=5), delta(tool_calls=[5]),
    delta(tool_calls=[{"function": 5}]), piece(5, "f"),
    {"choices": [{"delta": {}, "finish_reason": 5}]}])
def test_wrong_types_are_an_invalid_response(chunk: Any) -> None:
    whole = json.loads(json.dumps(chunk).replace("delta", "message"))
    for wire in (stream(delta(content="x"), chunk, STOP), reply(whole)):
        assert isinstance(read("chat", wire), InvalidResponse)


def test_what_follows_a_whole_answer_cannot_spoil_it() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 3}}
    for odd in (b"data: oops it broke\n\n", b'data: {"choices": 5}\n\n', b"data: []\n\n"):
        wire = stream(delta(content="x"), STOP, odd, usage, done=True)
        response = read("chat", wire)
        assert (response.text, response.usage.prompt_tokens) == ("x", 3)


# -- requests of Chat Completions
def test_a_body_in_full() -> None:
    """A server's own kind of tool is sent as it is."""
    options = {"temperature": 0, "tool_choice": "auto", "extra_body": {"top_k": 3}}
    tools = [{"type": "web_search", "filters": {"allowed": ["x"]}}, *TOOLS]
    assert sent("chat", tools=tools, **options) == {
        "model": "m", "messages": [USER], "tools": tools, "temperature": 0, "tool_choice": "auto",
        "stream": True, "stream_options": {"include_usage": True}, "top_k": 3}
    bare = sent("chat", settings={"stream_upstream": False}, tool_choice="auto", seed=1,
                parallel_tool_calls=True)
    assert not bare.pop("stream", False) and bare == {"model": "m", "messages": [USER], "seed": 1}
    extra = {"stream_options": {"b": {"c": 1}, "include_usage": False}, "temperature": 2}
    nested = sent("chat", extra_body=extra, temperature=1)
    assert (nested["stream_options"], nested["temperature"]) == (extra["stream_options"], 2)


def test_openai_gets_developers_parts_and_its_own_token_limit_and_others_do_not() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = [{"role": "developer", "content": "s"},
             {"role": "user", "content": parts, "name": "ann"}]
    with faked("auto") as (vendor, provider):
        marked = {"role": "user", "content": [{**part, "cache_control": {}} for part in parts]}
        provider.chat([*asked, {**marked, "cache_control": {}}], model="m-1", max_tokens=9)
        assert vendor.bodies[0]["messages"] == [*asked, {"role": "user", "content": parts}]
        assert vendor.bodies[0]["max_completion_tokens"] == 9
    for kind in ("chat", "lmstudio"):
        body = sent(kind, asked, max_completion_tokens=9)
        assert body["messages"] == [{"role": "system", "content": "s"},
                                    {"role": "user", "content": "a\nb", "name": "ann"}]
        assert (body["max_tokens"], "max_completion_tokens" in body) == (9, False)


@pytest.mark.parametrize(("given", "expected"), [(
    {"content": None, "refusal": None, "annotations": [], "tool_calls": [CALL]},
    {"content": None, "tool_calls": [CALL]}), (
        {"tool_calls": [{**CALL, "function": {"name": "f", "arguments": {"a": 1}}}]},
        {"content": None, "tool_calls": [CALL]}), (
            {"content": "x", "tool_calls": [CALL], "reasoning": "r", "copilot_router": {}},
            {"content": "x", "tool_calls": [CALL]})])
def test_assistant_messages_are_sent_in_the_form_of_a_request(given: Any, expected: Any) -> None:
    messages = sent("chat", [USER, {"role": "assistant", **given}, RESULT], TOOLS)["messages"]
    assert messages[1:] == [{"role": "assistant", **expected}, RESULT]


@pytest.mark.parametrize(("message_", "field", "found"), [
    ("Unsupported parameter: 'max_tokens' is not supported with this model. Use "
     "'max_completion_tokens' instead.", "max_completion_tokens", [False, True, True]),
    ("Unsupported parameter: 'max_tokens'", "max_completion_tokens", [False, True, True]),
    ("unknown field stream_options", "stream_options", [True, False, False]),
    ({"detail": [{"loc": ["body", "stream_options", "include_usage"], "msg": "not permitted"}]},
        "stream_options", [True, False, False])])
def test_wrong_names_of_the_token_limit_and_unknown_stream_options_are_corrected_and_remembered(
        message_: Any, field: str, found: list[bool]) -> None:
    refusal = reply({"error": {"message": message_}}, 400)
    with talking("chat", refusal, *both("stop", content="x")) as (provider, server):
        for _ in range(2):
            assert provider.chat("q", model="m", max_tokens=9, timeout=5).text == "x"
    assert [field in body for body in server.bodies] == found


@pytest.mark.parametrize(("name", "roles", "status", "told"), [
    ("chat", ["system", "user"], 400, "user and assistant roles should be alternating"),
    ("chat", ["user"], 500, "Jinja Exception: conversation roles must alternate"),
    ("responses", ["system", "user"], 400, "no support of successive user or assistant messages"),
    ("responses", ["user"], 400, "Developer instruction is not enabled for models/gemma-3-27b-it")])
def test_messages_are_merged_where_the_template_of_a_model_is_strict(name: str, roles: Any,
        status: int, told: str) -> None:
    """As those of Qwen, Mistral, Gemma on llama.cpp, vLLM, LM Studio; Perplexity and DeepSeek."""
    turns, answer = "messages", message(content="x")
    if name == "responses":
        turns, answer = "input", finished(text_item("x"))["response"]
    def serve(server: Server, connection: Any, request: bytes) -> bool:
        fine = [*roles, "assistant", "user"] == [x["role"] for x in server.bodies[-1][turns]]
        connection.sendall(reply(answer) if fine else reply({"error": told}, status))
        return True
    said: list[Any] = [{"role": role, "content": role} for role in
        ("system", "user", "user", "assistant", "developer", "assistant", "user")]
    said[2]["content"] = [{"type": "text", "text": "more"}]
    with talking(name, serve) as (provider, server):
        assert [provider.chat(said, model="m").text for _ in range(2)] == ["x"] * 2
        assert len(server.requests) == 5 - len(roles)
        first = json.dumps(server.bodies[-1][turns][0]["content"])
    assert "system" in first and "developer" in first and ("more" in first) == (roles == ["user"])


def test_a_strict_template_that_is_greeted_first_gets_a_turn_of_the_user_in_front() -> None:
    """Calls of tools and their results stay as they are."""
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    said = [{"role": "assistant", "content": "Hi."}, USER, {"role": "assistant", "content": "So."},
            calls, RESULT, calls, RESULT]
    refusal = reply({"error": "roles must alternate user/assistant"}, 400)
    with talking("chat", refusal, reply(message(content="x"))) as (provider, server):
        provider.chat(said, TOOLS, "m")
    assert [one["role"] for one in server.bodies[1]["messages"]] == [
        "user", "assistant", "user", "assistant", "tool", "assistant", "tool"]
    called = server.bodies[1]["messages"][3]
    assert (called["content"], len(called["tool_calls"])) == ("So.", 1)


@pytest.mark.parametrize("kind", ["openai", "responses"])
@pytest.mark.parametrize("name", ["files.read", "a/b", "x" * 70])
def test_names_of_tools_that_openai_refuses_are_sent_otherwise(kind: str, name: str) -> None:
    """In the whole history; the answer has the caller's name. Other servers get it unchanged."""
    own = {"name": name, "cache_control": {"type": "ephemeral"}}
    calls = [{"id": "c1", "function": {"name": name, "arguments": {"a": 1}}}]
    history = [USER, {"role": "assistant", "tool_calls": calls}, RESULT]
    def answer(body: Any) -> Reply:
        return Reply(calls=[(body["tools"][0].get("function", body["tools"][0])["name"], {})])
    choice = {"type": "function", "function": {"name": name}}
    with faked(kind, answer) as (vendor, provider):
        found = provider.chat(history, [{"function": own}], "m-1", tool_choice=choice)
    assert [call.name for call in found.tool_calls] == [name]
    tool, asked, called = re.findall(r'"name": "([^"]*)"', json.dumps(vendor.bodies[0]))
    assert tool == asked == called != name and len(tool) <= 64
    body = sent("chat", history, [{"function": own}], tool_choice=choice)
    assert body["tools"][0] == {"type": "function", "function": own}
    assert body["tool_choice"] == choice


def test_pictures_of_tools_follow_their_results_in_chat_completions() -> None:
    """OpenAI refuses them inside of a result; the Responses API takes them there."""
    picture = {"type": "image_url", "image_url": {"url": "https://h/p.png"}}
    text, told = ({"type": "text", "text": one} for one in ("shot", "Result of a tool call:"))
    two = {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "c2"}]}
    first = {**RESULT, "content": [text, picture]}
    second = {"role": "tool", "tool_call_id": "c2", "content": [picture]}
    turns = sent("chat", [USER, two, first, second, USER], TOOLS)["messages"]
    assert [one["content"] for one in turns[2:]] == [
        "shot", "It follows in the next message.", [told, picture, told, picture], "q"]
    assert [one["role"] for one in turns[2:]] == ["tool", "tool", "user", "user"]
    file = {"type": "file", "file": {"file_data": "data:application/pdf;base64,QQ=="}}
    ends = sent("chat", [USER, two, {**first, "content": [file]}, {**second, "content": []}], TOOLS)
    assert [one["content"] for one in ends["messages"][3:]] == ["", [told, file]]
    output = sent("responses", [USER, two, first], TOOLS)["input"][3]["output"]
    assert [part["type"] for part in output] == ["input_text", "input_image"]


@pytest.mark.parametrize(("told", "options"), [
    ("'messages' must contain the word 'json' in some form, to use 'response_format'",
     {"response_format": {"type": "json_object"}}),
    ("Invalid schema for function 'f': In context=(), object schema missing properties", {}),
    ("Invalid schema for function 'f': schema must be a JSON Schema of 'type: \"object\"', got "
     "'type: \"None\"'", {})])
@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_what_openai_insists_on_is_sent_once_it_has_said_so(told: str, options: Any,
        kind: str) -> None:
    def serve(server: Server, connection: Any, request: bytes) -> bool:
        body = json.dumps(server.bodies[-1])
        said = "JSON" in body or "json_object" not in body
        right = said if options else '"properties": {}' in body
        answer = finished(text_item("x"))["response"] if kind == "responses" else message(
            content="x")
        connection.sendall(reply(answer) if right else refusal)
        return True
    refusal = reply({"error": {"message": told}}, 400)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    with talking(kind, serve) as (provider, server):
        for prompt in ("q", "q", "as JSON"):
            assert provider.chat(prompt, tools, "m", **options).text == "x"
        assert len(server.requests) == 4
        if options:
            provider.chat("q", tools, "m", response_format={"type": "text"})
    assert "Answer with one JSON object" not in json.dumps(server.bodies[3:])
    with talking(kind, refusal) as (provider, server):
        for count in (1, 2):  # nothing to correct: it is not sent again
            error_of(BadRequest, provider.chat, "JSON", TOOLS, "m", **options)
            assert len(server.requests) == count


def test_json_mode_becomes_a_schema_where_a_server_takes_only_schemas() -> None:
    """LM Studio is one. A schema of the caller's own stays as it is."""
    refusal = reply({"error": "'response_format.type' must be 'json_schema' or 'text'"}, 400)
    own = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}}
    with talking("chat", refusal, reply(message(content="{}"))) as (provider, server):
        for form in ({"type": "json_object"}, {"type": "json_object"}, own):
            assert provider.chat("q", model="m", response_format=form, timeout=5).text == "{}"
    first, *more, last = (body["response_format"] for body in server.bodies)
    assert first == {"type": "json_object"} and last == own
    assert [form["json_schema"]["schema"] for form in more] == [{"type": "object"}] * 2


@pytest.mark.parametrize("text", [
    "Tool call id was {id} but must be a-z, A-Z, 0-9, with a length of 9.",
    'MistralException - {{"message": "Tool call id was {id} but must be a-z, A-Z, 0-9, with a '
    'length of 9.", "type": "invalid_function_call"}}'])
@pytest.mark.parametrize("ids", [["call_Ab3dEf6hIj9kLm2n", "call_Ab3dEf6hIj9kLm2o"],
                                 ["toolu_0123abcd", "abcdefgh1"], ["call_0", "call_1"]])
def test_tool_ids_of_nine_characters_are_made_where_a_server_asks_for_them(ids: list[str],
        text: str) -> None:
    """One corrected request, remembered; ids stay paired and distinct in the whole history."""
    def serve(server: Server, connection: Any, request: bytes) -> bool:
        found = [one for message in server.requests[-1].body["messages"]
                 for one in (*(call["id"] for call in message.get("tool_calls") or ()),
                             *([message["tool_call_id"]] if "tool_call_id" in message else ()))]
        bad = [one for one in found if not (len(one) == 9 and one.isalnum())]
        error = {"object": "error", "message": bad and text.format(id=bad[0]), "code": "3280"}
        connection.sendall(reply(error, 400) if bad else both("stop", content="x")[0])
        return True
    calls = [{**CALL, "id": one} for one in ids]
    history = [USER, {"role": "assistant", "content": None, "tool_calls": calls},
               *({**RESULT, "tool_call_id": one} for one in ids)]
    with talking("chat", serve) as (provider, server):
        chain = FailoverChain([ProviderTier("a", provider, ["m"])])
        for _ in range(2):
            assert chain.chat(history, TOOLS, timeout=5).text == "x"
        assert len(server.requests) == 3 and "replace" in chain.health()[0].learned["m"].values()
        _, asked, *results = server.bodies[2]["messages"]
    made = [call["id"] for call in asked["tool_calls"]]
    assert all(one in made for one in ids if len(one) == 9)
    assert (made, len(set(made))) == ([one["tool_call_id"] for one in results], 2)


CARRIED: list[dict[str, Any]] = [
    {"tool_calls": [{"index": 0, **CALL, "extra_content": {"google": {"thought_signature": "S"}}}]},
    {"tool_calls": [{**CALL, "extra_content": {"google": {"thought_signature": "S"}}}]},
    {"tool_calls": [{**CALL, "provider_specific_fields": {"thought_signature": "S"}}]},  # LiteLLM
    *({**fields, "tool_calls": [{"index": 0, **CALL}]} for fields in (
        {"reasoning_details": [{"type": "reasoning.encrypted", "data": "S", "id": "c1"}]},
        {"reasoning_opaque": "S"}, {"reasoning_content": "First S"}, {"reasoning": "First S"},
        {"reasoning_content": "S", "reasoning_details": [{"type": "reasoning.text", "text": "S"}]},
    ))]


@pytest.mark.parametrize("fields", CARRIED, ids=lambda fields: next(iter(fields)))
@pytest.mark.parametrize("streaming", [True, False])
def test_opaque_fields_go_back_to_the_same_server_and_model_only(fields: dict[str, Any],
        streaming: bool) -> None:
    wire = both("tool_calls", content=None, **fields)[not streaming]
    with talking("chat", wire) as (provider, server), talking("chat", wire) as (other, stranger):
        found = json.loads(json.dumps(provider.chat([USER], TOOLS, "m", timeout=5).message))
        for one, model in ((provider, "m"), (provider, "n"), (other, "m")):
            one.chat([USER, found, RESULT], TOOLS, model, timeout=5)
    own, foreign = server.bodies[1]["messages"][1], server.bodies[2]["messages"][1]
    for name, value in fields.items():
        if name == "tool_calls":
            assert own[name] == [{k: v for k, v in call.items() if k != "index"} for call in value]
        else:
            assert own[name] == value
    for one in (foreign, stranger.bodies[0]["messages"][1]):
        assert one == {"role": "assistant", "content": None, "tool_calls": [CALL]}


def test_pieces_of_reasoning_details_go_back_as_whole_items() -> None:
    """They belong together by type, index and id."""
    def item(kind: str, index: Any, **fields: Any) -> dict[str, Any]:
        return {"type": f"reasoning.{kind}", "index": index, **fields}
    come = [item("text", 0, text="First "), item("text", 0, text="this.", signature=None),
            item("text", 0, text=None, signature="S"), item("summary", 1, summary="a"),
            item("summary", 1, summary="b"), item("text", None, text="x"),
            item("text", None, text="y"), item("text", 2, text="z"), item("text", 2, text=5)]
    events = [delta(content="", reasoning_details=[one]) for one in come]
    again = message("tool_calls", content="", reasoning_details=come[:2])  # MiniMax, in the end
    wire = stream(*events, delta(tool_calls=[{"index": 0, **CALL}]), again, again)
    with talking("chat", wire) as (provider, server):
        found = provider.chat([USER], TOOLS, "m", timeout=5)
        provider.chat([USER, found.message, RESULT], TOOLS, "m", timeout=5)
    assert found.reasoning == "First this.abxyz"
    assert server.bodies[1]["messages"][1]["reasoning_details"] == [
        item("text", 0, text="First this.", signature="S"), item("summary", 1, summary="ab"),
        *come[5:]]


def test_thinking_blocks_of_litellm_go_back_whole() -> None:
    def block(**fields: Any) -> Any:
        return delta(thinking_blocks=[{"type": "thinking", **fields}])
    events = [block(thinking="First "), block(thinking="this."), block(thinking="", signature="S"),
              delta(thinking_blocks=[{"type": "redacted_thinking", "data": "D"}]),
              block(thinking="Then."), block(signature="T"), delta("tool_calls", tool_calls=[CALL])]
    with talking("chat", stream(*events)) as (provider, server):
        found = provider.chat([USER], TOOLS, "m", timeout=5)
        provider.chat([USER, found.message, RESULT], TOOLS, "m", timeout=5)
    assert found.reasoning == "First this.Then."
    assert server.bodies[1]["messages"][1]["thinking_blocks"] == [
        {"type": "thinking", "thinking": "First this.", "signature": "S"},
        {"type": "redacted_thinking", "data": "D"},
        {"type": "thinking", "thinking": "Then.", "signature": "T"}]


def test_thinking_goes_back_with_ids_that_a_server_repeats_in_each_turn() -> None:
    turn = {**message(tool_calls=[{**CALL, "id": "f:0", "extra_content": {"sig": "S"}}]),
            "model": "m"}
    turn["choices"][0]["message"]["reasoning_content"] = "hm"
    history: list[Any] = [USER]
    with talking("chat", reply(turn)) as (provider, server):
        for _ in range(3):
            found = provider.chat(history, TOOLS, "m", timeout=5)
            history += [found.message, {**RESULT, "tool_call_id": found.tool_calls[0].id}]
    turns = server.bodies[2]["messages"][1::2]
    assert [one["reasoning_content"] for one in turns] == ["hm", "hm"]
    assert [one["tool_calls"][0]["extra_content"] for one in turns] == [{"sig": "S"}] * 2
    assert len({one["tool_calls"][0]["id"] for one in turns}) == 2


def test_arguments_that_a_model_wrote_wrongly_go_back_as_an_object() -> None:
    """Servers such as llama.cpp and vLLM would refuse the conversation from then on."""
    nan = '{"a": NaN}'
    for wrong, right in ((nan, {"_raw": nan}), ('{"a": "b"c"}', {"_raw": '{"a": "b"c"}'}),
                         ('{"a":', {"_raw": '{"a":'}), ('{"a": "b\nc"}', {"a": "b\nc"}),
                         ("", {}), ("null", {})):
        call = {**CALL, "function": {"name": "f", "arguments": wrong}}
        turn = {"role": "assistant", "content": None, "tool_calls": [call]}
        for name in ("chat", "responses"):
            body = sent(name, [USER, turn, RESULT], TOOLS)
            items = [*body.get("messages", ()), *body.get("input", ())]
            (text,) = [found.get("arguments") or found["tool_calls"][0]["function"]["arguments"]
                       for found in items if "arguments" in found or "tool_calls" in found]
            assert json.loads(text) == right


GROQ = "'messages.1' : property 'reasoning' is unsupported"
SEALED = "The encrypted content gAAA could not be verified."
NO_INCLUDE = "Encrypted content is not supported with this model."
UNEXPECTED = "Unexpected role 'user' after role 'tool'"
NULL = ("7 validation errors:\n  {'type': 'string_type', 'loc': ('body', 'messages', 'content'), "
        "'msg': 'Input should be a valid string', 'input': None}")  # llama-cpp-python
LOCATED = "1 validation error:\n  {{'loc': {}, 'msg': \"Input should be 'none' or 'low'\"}}"  # vLLM
MISSING = "thinking is enabled but reasoning_content is missing in assistant tool call message at 1"


@pytest.mark.parametrize(("name", "told", "left", "has"), [
    ("chat", {"message": GROQ}, "reasoning", None), ("chat", {"message": MISSING}, None, '": " "'),
    ("chat", {"message": UNEXPECTED, "code": "3230"}, None, "Noted."),
    ("chat", {"message": "messages: reasoning_effort not supported"}, "reasoning_effort", None),
    ("chat", {"message": NULL, "type": "internal_server_error"}, None, '"content": ""'),
    *(("chat", {"message": LOCATED.format(place), **more}, "reasoning_effort", None)
        for place, more in (("('body', 'reasoning_effort')", {"type": "internal_server_error"}),
                            ("'body.reasoning_effort'", {"param": "body.reasoning_effort"}))),
    ("responses", {"message": SEALED}, "SEALED", None), *(("responses", one, "include", None)
        for one in ({"message": NO_INCLUDE}, {"message": "no", "param": "include"}))])
def test_what_a_server_refuses_of_a_conversation_is_corrected(
        name: str, told: Any, left: str | None, has: str | None) -> None:
    carry = {"for": "", "text": None, "ids": ["c"], "reasoning": "hm", "items": ["SEALED"]}
    turn = {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "c"}]}
    history = [USER, {**turn, "copilot_router": carry}, {**RESULT, "tool_call_id": "c"}, USER]
    item = {"type": "message", "content": [{"type": "output_text", "text": "ok"}]}
    good = {**message(content="ok"), "status": "completed", "output": [item]}
    if name == "responses":
        del good["choices"]
    status = 500 if "type" in told else 400
    with talking(name, reply({"error": told}, status), *[reply(good)] * 2) as (provider, server):
        carry["for"] = f"openai {provider.base_url} m"
        for _ in range(2):
            found = provider.chat(history, TOOLS, "m", timeout=5, reasoning_effort="low")
            assert found.text == "ok"
    first, second, third = (json.dumps(body) for body in server.bodies)
    assert left is None or (f'"{left}"' in first and f'"{left}"' not in second)
    assert has is None or (has not in first and has in second)
    assert second == third


def test_deepseek_gets_its_reasoning_back_on_every_turn_and_openai_none() -> None:
    said = Reply(calls=[("f", {})], thinking="a thought")
    with Chat(said, thinking=True) as vendor, faked("auto") as (fake, official):
        provider = OpenAIProvider(KEY, vendor.url)
        found = provider.chat([USER], TOOLS, "m-1").message
        history = [USER, found, {**RESULT, "tool_call_id": found["tool_calls"][0]["id"]}]
        assert provider.chat(history, TOOLS, "m-1").text == "ok"
        assert vendor.bodies[1]["messages"][1]["reasoning_content"] == "a thought"
        bare = {"role": "assistant", "content": None, "tool_calls": found["tool_calls"]}
        foreign = [USER, bare, history[2]]
        assert provider.chat(foreign, TOOLS, "m-1").text == "ok"
        assert official.chat(history, TOOLS, "m-1").text == "ok"
        assert fake.bodies[0]["messages"][1] == bare
        provider.close()


def test_lm_studio_names_the_model_that_answered_and_needs_none() -> None:
    """An overflow that comes as an empty answer with status 200 is no answer."""
    none = {"error": {"message": "No models loaded. Please load a model in the developer page."}}
    for status in (404, 400):
        assert isinstance(read("lmstudio", reply(none, status)), ModelNotFound)
    assert isinstance(read("lmstudio", reply(message(content=""))), EmptyResponse)
    assert read("lmstudio", reply({**message(content="x"), "model": "loaded"})).model == "loaded"


# -- the Responses API
def event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": f"response.{kind}", **fields}


def finished(*output: Any, status: str = "completed", **fields: Any) -> dict[str, Any]:
    return event(status, response={"status": status, "output": list(output), **fields})


def text_item(text: str) -> dict[str, Any]:
    return {"type": "message", "id": "msg", "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": text, "annotations": []}]}


def call_item(arguments: str, call_id: str = "c1", **fields: Any) -> dict[str, Any]:
    return {"type": "function_call", "id": f"fc_{call_id}", "call_id": call_id, "name": "f",
            "arguments": arguments, "status": "completed", **fields}


PART = event("output_text.delta", item_id="msg", output_index=0, content_index=0, delta="Hello, ")
WHOLE_TEXT = event("output_text.done", item_id="msg", output_index=0, content_index=0,
                   text="Hello, world")
ITEM = event("output_item.done", output_index=0, item=text_item("Hello, world"))
FINAL = finished(text_item("Hello, world"))


@pytest.mark.parametrize("events", [[FINAL], [PART, FINAL], [WHOLE_TEXT, FINAL],
    [PART, WHOLE_TEXT, finished()], [ITEM, finished()], [PART, ITEM, finished()],
    [PART, WHOLE_TEXT, ITEM, FINAL], [PART, {**PART, "delta": "world"}, finished(output=None)],
    [PART, {**WHOLE_TEXT, "delta": None}, finished()]])
def test_responses_text_may_come_in_any_of_its_events(events: Any) -> None:
    """As deltas, their rest, when it is done, or in the final object: never twice."""
    thought = {"type": "reasoning", "id": "r", "summary": [{"text": "hm"}]}
    begun = event("output_item.done", output_index=7, item=thought)
    ended = {**events[-1], "response": {**events[-1]["response"]}}
    ended["response"]["output"] = [*(ended["response"]["output"] or ()), thought]
    response = read("responses", stream(begun, *events[:-1], ended))
    assert (response.text, response.finish_reason) == ("Hello, world", "stop")
    assert response.reasoning == "hm"


def test_an_answer_that_begins_anew_is_only_the_second_one() -> None:
    """A proxy has asked again, in the middle of it. Its reader must not get both."""
    events = [event("created", response={"status": "in_progress", "output": []}), PART] * 2
    with talking("responses", stream(*events, FINAL)) as (provider, _):
        assert provider.chat("q", model="m").text == "Hello, world"
        deltas = provider.stream("q", model="m")
        assert next(deltas) == "Hello, "
        error_of(InvalidResponse, next, deltas)


ADDED = event("output_item.added", output_index=0, item=call_item("", status="in_progress"))
GROWS = event("function_call_arguments.delta", item_id="fc_c1", output_index=0, delta='{"a": ')
DONE = event("function_call_arguments.done", output_index=0, arguments='{"a": 1}')
FIRST = event("output_item.done", output_index=0, item=call_item('{"a": 1}'))
SECOND = event("output_item.done", output_index=1, item=call_item('{"a": 2}', "c2"))


@pytest.mark.parametrize("events", [[PART, finished(text_item("Good bye"))],
    [PART, {**WHOLE_TEXT, "text": "Good bye"}, finished()], [PART], [PART, WHOLE_TEXT, ITEM],
    [PART, event("output_text.done", text="Hel"), finished()],
    [ADDED, DONE, finished(call_item('{"a": 2}'))], [ADDED, GROWS, finished(call_item("{}"))]])
def test_responses_that_contradict_themselves_or_end_early_are_invalid(events: Any) -> None:
    assert isinstance(read("responses", stream(*events)), InvalidResponse)


@pytest.mark.parametrize("events", [[finished(call_item('{"a": 1}'))],
    [ADDED, GROWS, {**GROWS, "delta": "1}"}, DONE, finished()], [ADDED, DONE, finished()],
    [ADDED, GROWS, DONE, finished()],
    [ADDED, FIRST, finished()], [ADDED, GROWS, DONE, FIRST, finished(call_item('{"a": 1}'))],
    [ADDED, GROWS, finished(call_item('{"a": 1}'))]])
def test_responses_arguments_may_come_in_any_of_their_events(events: Any) -> None:
    (call,) = read("responses", stream(*events), tools=TOOLS).tool_calls
    assert (call.id, call.name, call.arguments) == ("c1", "f", {"a": 1})


ONE, TWO, THREE, FIVE = ("c1", {"a": 1}), ("c2", {"a": 2}), ("c3", {"a": 1}), ("c5", {"a": 1})
LIKE = call_item('{"a": 1}', "c3")


@pytest.mark.parametrize(("streamed", "output", "calls"), [
    ([ADDED, GROWS], [LIKE], [ONE]), ([ADDED, FIRST], [LIKE | {"arguments": '{"a":1}'}], [ONE]),
    ([FIRST, SECOND], [call_item('{"a": 2}', "c4"), LIKE], [ONE, TWO]),
    ([ADDED, DONE], [call_item("{}")], [ONE]), ([FIRST], [call_item('{"a": 2}', "c2")], [ONE, TWO]),
    ([FIRST], [FIRST["item"], LIKE], [ONE, THREE]), ([FIRST], [LIKE | {"name": "g"}], [ONE, THREE]),
    ([FIRST], [LIKE | {"call_id": "c4"}, LIKE], [ONE, THREE]),
    ([FIRST], [LIKE | {"call_id": "c4"}, LIKE | {"call_id": "c5"}, LIKE], [ONE, FIVE, THREE])])
def test_calls_keep_streamed_ids_and_arguments(streamed: Any, output: Any, calls: Any) -> None:
    """vLLM and LM Studio change them in the end. A call that is really another one is added."""
    wire = stream(*streamed, finished(*output, {"type": "compaction", "id": "r"}))
    with talking("responses", wire) as (provider, server):
        found = provider.chat([USER], TOOLS, "m", timeout=5)
        provider.chat([USER, found.message], TOOLS, "m", timeout=5)
    assert "compaction" in json.dumps(server.bodies[1])  # it stands for all before it
    assert [(call.id, call.arguments) for call in found.tool_calls] == calls
    assert [(item["call_id"], json.loads(item["arguments"])) for item in server.bodies[1]["input"]
            if "arguments" in item] == calls


def test_responses_calls_under_one_id_get_ids_of_their_own() -> None:
    """And an empty call beside them is none."""
    items = [call_item("{}"), {**call_item('{"a": 1}'), "id": "fc_2"}, call_item("", name="")]
    for wire in (reply(finished(*items)["response"]), stream(finished(*items))):
        calls = read("responses", wire, tools=TOOLS).tool_calls
        assert [call.arguments for call in calls] == [{}, {"a": 1}]
        assert len({call.id for call in calls}) == 2


def test_responses_status_and_reasons() -> None:
    text = text_item("x")
    for status, reason, ours in (("completed", None, "stop"), ("incomplete", "max_output_tokens",
                                 "length"), ("incomplete", "content_filter", "content_filter")):
        done = finished(text, status=status, incomplete_details={"reason": reason},
                        usage={"output_tokens": 9})
        for wire in (stream(done), reply(done["response"])):
            assert read("responses", wire).finish_reason == ours
            cut = read("responses", wire, max_tokens=9).finish_reason  # llama.cpp does not say so
            assert cut == ("length" if ours == "stop" else ours)
    failed = {"error": {"code": "server_error", "message": "x"}}
    for wire in (stream(finished(status="failed", **failed)), stream({"type": "error", **failed}),
            stream(b'data: {"type": "error", "code": "server_error"}\n\n'),
                 reply({"status": "failed", "output": [], **failed})):
        assert isinstance(read("responses", wire), ServerError)
    refusal = {"type": "message", "content": [{"type": "refusal", "refusal": "no"}]}
    assert isinstance(read("responses", stream(finished(refusal))), ContentFiltered)
    for body in ({"status": "queued", "output": [text]}, {"status": "completed", "output": "x"},
                 {"status": "completed", "output": [None]}, {"error": None}, {"status": "cancelled",
                  "output": [text]}, {"output": [{"type": "message", "content": "x"}]}):
        assert isinstance(read("responses", reply(body)), InvalidResponse), body


def test_responses_body_in_full() -> None:
    with faked("responses") as (vendor, provider):
        provider.chat("q", TOOLS, "m-1", temperature=0.1, top_p=0.2, user="u", max_tokens=50,
                      parallel_tool_calls=False, reasoning_effort="low", tool_choice="required",
                      response_format={"type": "json_object"})
    tool = {"type": "function", **TOOLS[0]["function"], "strict": False}
    assert vendor.bodies == [{"model": "m-1", "store": False,
        "include": ["reasoning.encrypted_content"], "stream": True,
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "q"}]}],
        "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False, "user": "u",
        "temperature": 0.1, "top_p": 0.2, "max_output_tokens": 50,
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"format": {"type": "json_object"}}}]
    seen = {"type": "image_url", "image_url": {"url": "u", "detail": "low"}}
    said = {"role": "assistant", "content": [{"type": "text", "text": part} for part in "ab"]}
    asked, result = {"role": "user", "content": ""}, {**RESULT, "content": [seen]}
    turns = [asked, {**said, "tool_calls": [CALL]}, result]
    first, second, _, last = sent("responses", turns)["input"]
    assert (first, second) == (asked, {"type": "message", "role": "assistant", "content": "a\nb"})
    assert last["output"] == [{"type": "input_image", "image_url": "u", "detail": "low"}]
    named = {"type": "function", "function": {"name": "f"}}
    assert sent("responses", tools=TOOLS, tool_choice=named)["tool_choice"] == {
        "type": "function", "name": "f"}


def test_auto_moves_models_to_the_responses_api_and_remembers() -> None:
    """No model is listed: its own error moves it, and another model stays."""
    models = ("gpt-6-sol", "gpt-6-astra", "m")
    with faked("auto", models=models) as (vendor, provider):
        for model in ("gpt-6-sol", "gpt-6-astra", "gpt-6-astra", "m"):
            assert provider.chat("q", TOOLS, model).text == "ok"
        assert [request.path.rsplit("/", 1)[1] for request in vendor.requests] == [
            "completions", "responses", "completions", "responses", "responses", "completions"]
    with faked("openai", models=models) as (vendor, provider):
        assert provider.chat("q", TOOLS, "gpt-6-sol", reasoning_effort="low").text == "ok"
        assert [body["reasoning_effort"] for body in vendor.bodies] == ["low", "none"]
        error_of(UnsupportedRequest, provider.chat, "q", TOOLS, "gpt-6-astra")


@pytest.mark.parametrize("status", [400, 404])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("text", [
    "This model is only supported in v1/responses and not in v1/chat/completions.",
    "This is not a chat model and thus not supported in the v1/chat/completions endpoint. Did you "
    "mean to use v1/responses?", "model m is not accessible via the /chat/completions endpoint"])
def test_auto_moves_whenever_the_server_says_so(status: int, tools: Any, text: str) -> None:
    refusal = reply({"error": {"message": text, "type": "invalid_request_error"}}, status)
    with faked("auto", refusal) as (vendor, provider):
        for _ in range(2):
            assert provider.chat("q", tools, "m-1").text == "ok"
        assert [request.path.rsplit("/", 1)[1] for request in vendor.requests] == [
            "completions", "responses", "responses"]


def test_a_path_that_is_not_there_moves_nothing() -> None:
    missing = reply({"error": {"message": "Not Found"}}, 404)
    with talking("chat", missing, api="auto") as (provider, server):
        error_of(ProviderUnavailable, provider.chat, "q", TOOLS, "m", timeout=5)
        assert len(server.requests) == 1
    with faked("auto", reply({"error": {"message": "bad"}}, 400)) as (vendor, provider):
        error_of(BadRequest, provider.chat, "q", TOOLS, "m-1")
        assert len(vendor.requests) == 1
