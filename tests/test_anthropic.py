"""The Messages API of Anthropic."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.fakes import error_of
from support.server import (CITY, TOOLS, USER, block, drained, grows, outcome, read, reply, sent,
    started, stops, stream, talking)
from support.vendors import Reply, faked

from copilot_router import (FailoverChain, InvalidResponse, ProviderTier, ScriptedProvider,
    UnsupportedRequest, Usage)

CLAUDES = ("claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5", "claude-haiku-4-5")
END = {"type": "message_stop"}
TEXT = [block(0, type="text", text=""), grows(0, "text_delta", text="x")]


def whole(reason: str | None, *content: Any, **usage: Any) -> bytes:
    return reply({"type": "message", "role": "assistant", "content": list(content),
                  "stop_reason": reason, "usage": usage})


def met(*script: Any) -> Any:
    return faked("anthropic", *script, models=("m-1", *CLAUDES))


def test_content_is_a_list_of_blocks_and_unknown_ones_are_passed_over() -> None:
    """A whole answer may leave out its type; a proxy may number two calls alike."""
    empty = {"type": "tool_use", "id": "s", "name": "f", "input": {}}
    use, closed = {**empty, "id": "t", "input": {"city": "Oslo"}}, {
        "type": "content_block_stop", "index": 4}
    content = [{"type": "thinking", "thinking": "hm", "signature": "s"},
               {"type": "server_tool_use", "id": "x"}, {"type": "text", "text": "one "},
               {"type": "text", "text": "two"}, empty, use]
    events = [started(), block(0, type="thinking", thinking="", signature=""),
        grows(0, "thinking_delta", thinking="hm"), grows(0, "signature_delta", signature="s"),
        block(1, type="server_tool_use", id="x"), grows(1, "input_json_delta", partial_json="{}"),
        block(2, type="text", text=""), grows(2, "text_delta", text="one "),
        grows(2, "citations_delta", citation={}), grows(2, "text_delta", text="two"), block(
            4, **empty), closed, block(4, **use), closed, {"type": "news"}, stops("tool_use"), END]
    untyped = reply({"content": content, "stop_reason": "tool_use"})
    for wire in (whole("tool_use", *content), untyped, stream(*events)):
        response = read("anthropic", wire, tools=TOOLS)
        assert (response.text, response.reasoning) == ("one two", "hm")
        assert response.finish_reason == "tool_calls"
        assert [call.arguments for call in response.tool_calls] == [{}, {"city": "Oslo"}]


def test_a_second_message_start_begins_again_or_breaks_the_answer() -> None:
    """As long as there is no text it costs nothing; behind text the answer would be two in one."""
    again = stream(started(input_tokens=3), started(input_tokens=3), *TEXT, stops("end_turn"), END)
    assert read("anthropic", again).text == "x"
    thought = [block(0, type="thinking", thinking=""), grows(0, "thinking_delta", thinking="hm")]
    hidden = stream(started(), *thought, started(), *TEXT, stops("end_turn"), END)
    assert (read("anthropic", hidden).text, read("anthropic", hidden).reasoning) == ("x", None)
    broken = stream(started(), *TEXT, started(), *TEXT, stops("end_turn"), END)
    for wire, options in ((broken, {}), (hidden, {"thoughts": True})):
        with talking("anthropic", wire) as (provider, _), pytest.raises(InvalidResponse):
            list(provider.stream("q", model="m", timeout=10, **options))


def test_usage_counts_the_cache_apart_and_later_counts_replace() -> None:
    counts = {"input_tokens": 10, "cache_creation_input_tokens": 100,
              "cache_read_input_tokens": 1000, "output_tokens": 7}
    nulls = {**counts, "cache_creation_input_tokens": None, "cache_read_input_tokens": None}
    text = {"type": "text", "text": "x"}
    assert read("anthropic", whole("end_turn", text, **counts)).usage == Usage(1110, 7, 1000, 100)
    assert read("anthropic", whole("end_turn", text, **nulls)).usage == Usage(10, 7)
    begun = started(input_tokens=10, output_tokens=1)
    for last, written in (({"output_tokens": 9}, 9), ({"input_tokens": 10, "output_tokens": 9}, 9),
                          ({"input_tokens": None, "output_tokens": 9}, 9),
                          ({"input_tokens": None, "output_tokens": None}, 5)):
        wire = stream(begun, *TEXT, stops(None, output_tokens=5), stops("end_turn", **last), END)
        assert read("anthropic", wire).usage == Usage(10, written)


@pytest.mark.parametrize("body", [{"content": "x", "stop_reason": "end_turn"},
    {"content": ["x"], "stop_reason": "end_turn"}, [block(0)], [started()],
    [grows(0, "text_delta", text="x"), stops("end_turn"), END],
    [{"type": "content_block_start", "index": 0}, stops("end_turn")],
    [block(0, type="text"), {"type": "content_block_delta", "index": 0, "delta": 5}],
    [*TEXT, {"type": "message_delta", "delta": {"stop_reason": 5}}],
    [started(), grows(0, "input_json_delta", partial_json="{}"), stops("tool_use"), END],
    [started(), *TEXT, {"type": "content_block_stop", "index": 0}, END],
    *([started(), *TEXT, *end] for end in ([], [END], [stops(None), END], [stops("")])),
    [*TEXT, {"type": "content_block_stop", "index": 0}]])
def test_answers_of_the_wrong_shape_or_without_an_end_are_invalid(body: Any) -> None:
    wire = stream(*body) if isinstance(body, list) else reply(body)
    assert isinstance(read("anthropic", wire), InvalidResponse)


def test_sampling_parameters_that_a_model_refuses_are_dropped() -> None:
    with met() as (vendor, provider):
        for model in ("claude-opus-5-5", "claude-opus-5-5", "claude-haiku-4-5"):
            assert provider.chat("q", model=model, temperature=0.2).text == "ok"
        assert ["temperature" in body for body in vendor.bodies] == [True, False, False, True]
        assert vendor.requests[0].headers["anthropic-version"] == "2023-06-01"
    headers = {"anthropic-version": "2026-10-21"}  # the caller's own wins
    with talking("anthropic", whole("end_turn", TEXT[1]), headers=headers) as (provider, server):
        outcome(provider)
        assert server.requests[0].headers["anthropic-version"] == "2026-10-21"


@pytest.mark.parametrize(("told", "most"), [("max_tokens: 8192 > 4096, which is the most", 4096),
    ("max_completion_tokens=8192 cannot be greater than max_model_len=512", 256)])  # vLLM
def test_our_own_limit_gives_way_to_what_a_model_allows(told: str, most: int) -> None:
    refusal = reply({"error": {"message": told}}, 400)
    with talking("anthropic", refusal, whole("end_turn", {"type": "text", "text": "x"})) as found:
        for limit in (None, None, 0):
            assert found[0].chat("q", model="m", max_tokens=limit).text == "x"
        assert [body["max_tokens"] for body in found[1].bodies] == [8192, most, most, 0]


ALL_BOUNDS = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
    "minLength", "maxLength", "pattern", "minItems", "maxItems", "uniqueItems"]
BOUNDS = {"type": "integer", "minimum": 1, "maximum": 9, "description": "a number"}
OPEN = {"$defs": {"X": {"properties": {}}}, "type": "object", "properties": {
    "minimum": BOUNDS, "all": dict.fromkeys(ALL_BOUNDS, 1),
    "many": {"type": "array", "items": BOUNDS, "minItems": 2},
    "either": {"oneOf": [{"type": "object"}, {"$ref": "#/$defs/X"}, True]},
    "both": {"anyOf": [{"type": ["object", "null"]}], "oneOf": [{"minLength": 1,
                                                                 "description": None}]}}}
TOLD = {"type": "integer", "description": "a number (minimum: 1, maximum: 9)"}
CLOSED = {"$defs": {"X": {"properties": {}, "additionalProperties": False}}, "type": "object",
    "additionalProperties": False, "properties": {"minimum": TOLD,
        "all": {"description": f"({', '.join(f'{name}: 1' for name in ALL_BOUNDS)})"},
        "many": {"type": "array", "items": TOLD, "description": "(minItems: 2)"},
        "either": {"anyOf": [{"type": "object", "additionalProperties": False},
                             {"$ref": "#/$defs/X"}, True]},
        "both": {"anyOf": [{"type": ["object", "null"], "additionalProperties": False}],
                 "oneOf": [{"description": "(minLength: 1)"}]}}}


@pytest.mark.parametrize("told", [
    "output_config.format.schema: For 'object' type, 'additionalProperties' must be set to false",
    "output_format.schema: For 'integer' type, properties maximum, minimum are not supported"])
def test_a_schema_that_structured_outputs_refuse_is_closed_and_bounds_become_words(
        told: str) -> None:
    """Once the server has said so; the caller's own stays as it was."""
    refusal = reply({"error": {"type": "invalid_request_error", "message": told}}, 400)
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": OPEN}}
    before = json.dumps(form)
    with talking("anthropic", refusal, whole("end_turn", {"type": "text", "text": "{}"})) as found:
        for _ in range(2):
            assert found[0].chat("q", model="m", response_format=form).text == "{}"
        asked = [body["output_config"]["format"]["schema"] for body in found[1].bodies]
    assert asked == [OPEN, CLOSED, CLOSED] and json.dumps(form) == before


def test_a_model_does_not_think_where_a_tool_is_forced() -> None:
    for choice, thinks in (("auto", True), ("required", False), ("none", True)):
        with talking("anthropic", whole("end_turn", {"type": "text", "text": "x"})) as found:
            drained(found[0].stream("q", TOOLS, "m", thoughts=True, tool_choice=choice))
            assert ("thinking" in found[1].bodies[0]) == thinks


def test_citations_and_summaries_of_a_stream_go_back() -> None:
    cited = [{"url": "a"}, {"url": "b"}]
    wire = stream(started(), block(0, type="compaction", content=None),
        grows(0, "compaction_delta", content="so "), grows(0, "compaction_delta", content="far"),
        block(1, type="text", text="", citations=[]), grows(1, "text_delta", text="x"),
        *(grows(1, "citations_delta", citation=one) for one in cited),
        block(2, type="text", text=""), grows(2, "citations_delta", citation=cited[0]),
        grows(2, "text_delta", text="y"), stops("end_turn"), END)
    with talking("anthropic", wire) as (provider, server):
        for upon in ([USER], [USER, provider.chat("q", model="m").message, USER]):
            assert provider.chat(upon, model="m").text == "xy"
    assert server.bodies[-1]["messages"][1]["content"] == [
        {"type": "compaction", "content": "so far"},
        {"type": "text", "text": "x", "citations": cited},
        {"type": "text", "text": "y", "citations": cited[:1]}]


def test_a_mark_for_the_cache_stands_on_a_result_and_not_inside_of_it() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    text = {"type": "text", "text": "42"}
    for marked in ({"content": "42", **mark}, {"content": [{**text, **mark}]}):
        said = [USER, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c", **marked}]
        assert sent("anthropic", said, TOOLS)["messages"][2]["content"] == [
            {"type": "tool_result", "tool_use_id": "c", "content": [text], **mark}]


THINKS = {"type": "thinking", "thinking": "t", "signature": "s"}


def test_an_id_that_a_server_gave_out_stays_on_both_sides_and_only_ids_are_renamed() -> None:
    """Compatible servers give ids that Anthropic would refuse, or the same one in each turn."""
    for given in ("functions.f:0", "f"):
        used = {"type": "tool_use", "id": given, "name": "f", "input": {"id": given}}
        with talking("anthropic", whole("tool_use", THINKS, used)) as (provider, server):
            turn = [provider.chat("q", TOOLS, "m").message,
                    {"role": "tool", "tool_call_id": given, "content": "42"}]
            provider.chat([USER, *turn, *turn], TOOLS, "m")
        turns = server.bodies[-1]["messages"]
        ids = [turns[at]["content"][-1].get("id", turns[at]["content"][0].get("tool_use_id"))
               for at in (1, 2, 3, 4)]
        assert (ids[0], ids[2]) == (given, f"{given}_1") and ids[1::2] == ids[::2]
        assert turns[3]["content"][-1] == {**used, "id": ids[2]}


def test_what_cannot_be_sent_is_refused_and_numbers_beyond_json_are_a_text() -> None:
    error_of(UnsupportedRequest, sent, "anthropic", stop="\n")
    error_of(UnsupportedRequest, sent, "anthropic", tools=[{"type": "x", "function": {}}])
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1e999}'}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    used = sent("anthropic", [USER, turn], TOOLS)["messages"][1]["content"][0]
    assert used["input"] == {"_raw": '{"a": 1e999}'}


def test_a_forced_tool_choice_is_never_weakened() -> None:
    with met(Reply(calls=[("f", {})])) as (vendor, provider):
        with pytest.raises(UnsupportedRequest):
            provider.chat("q", TOOLS, "claude-sonnet-5-5", tool_choice="required")
        assert provider.chat("q", TOOLS, "claude-haiku-5-5", tool_choice="required").tool_calls
        assert vendor.bodies[1]["tool_choice"] == {"type": "any"}
        chain = FailoverChain([ProviderTier("a", provider, ["claude-sonnet-5-5"]),
                               ProviderTier("b", ScriptedProvider(["b"]))])
        assert chain.chat("q", TOOLS, tool_choice="required").provider == "b"


def test_tool_results_stand_together_and_first() -> None:
    """A lost one is made up as an error, one without its call becomes text."""
    calls = [{"id": one, "type": "function", "function": {"name": "f", "arguments": "{}"}}
             for one in "abc"]
    results = [{"role": "tool", "tool_call_id": one, "content": text}
               for one, text in (("b", "two"), ("a", " "), ("z", "lost"))]
    with met() as (vendor, provider):
        provider.chat([USER, {"role": "assistant", "content": None, "tool_calls": calls}, *results,
                       {"role": "user", "content": "and now?"}], TOOLS, "m-1")
        assert not vendor.refusals
        last = vendor.bodies[0]["messages"][2]["content"]
    assert [(one["type"], one.get("tool_use_id"), one.get("is_error")) for one in last] == [
        ("tool_result", "a", None), ("tool_result", "b", None), ("tool_result", "c", True),
        ("text", None, None), ("text", None, None)]
    assert "lost" in last[3]["text"] and last[4]["text"] == "and now?"


def test_tool_ids_are_made_valid_alike_on_both_sides_and_stay_distinct() -> None:
    ids = ["functions.Bash:0", "functions.Bash 0", "", "call_x__thought__c2ln+bmF0/dXJl", "fine-1"]
    calls = [{"id": one, "type": "function", "function": {"name": "f", "arguments": "{}"}}
             for one in ids]
    results = [{"role": "tool", "tool_call_id": one, "content": f"result {at}"}
               for at, one in enumerate(ids)]
    messages = sent("anthropic", [USER, {"role": "assistant", "tool_calls": calls}, *results],
                    TOOLS)["messages"]
    made = [one["id"] for one in messages[1]["content"]]
    assert [one["tool_use_id"] for one in messages[2]["content"]] == made
    assert (len(set(made)), made[-1]) == (len(ids), "fine-1")
    assert [one["content"][0]["text"] for one in messages[2]["content"]] == [
        f"result {at}" for at in range(5)]


@pytest.mark.parametrize("upstream", [True, False])
def test_thinking_goes_back_to_its_model_byte_for_byte_without_blank_texts(upstream: bool) -> None:
    with met(Reply("\n\n", [("f", {"city": "Oslo"})], "a thought")) as (vendor, provider):
        provider.stream_upstream = upstream
        response = provider.chat([USER], TOOLS, "m-1")
        history = [USER, json.loads(json.dumps(response.message)),
                   {"role": "tool", "tool_call_id": response.tool_calls[0].id, "content": "cold"}]
        assert provider.chat(history, TOOLS, "m-1").text == "ok"
        thought, use = vendor.bodies[1]["messages"][1]["content"]
        assert thought == {"type": "thinking", "thinking": "a thought",
                           "signature": vendor.signature(vendor.bodies[0], 1, "a thought")}
        assert use["input"] == {"city": "Oslo"}
        assert provider.chat(history, TOOLS, "claude-opus-5-5").text == "ok"
        assert "a thought" not in json.dumps(vendor.bodies[2])


@pytest.mark.parametrize("first", [{"type": "redacted_thinking", "data": "x"},
    {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "Oslo"}}])
def test_redacted_thinking_and_the_servers_own_tools_go_back_too(first: Any) -> None:
    blocks = [first, {"type": "tool_use", "id": "t", "name": "f", "input": {"city": "Oslo"}}]
    with talking("anthropic", whole("tool_use", *blocks), whole("end_turn")) as (provider, server):
        message = provider.chat([USER], TOOLS, "m", timeout=5).message
        outcome(provider, [USER, message, {"role": "tool", "tool_call_id": "t", "content": "c"}],
                TOOLS)
    assert server.bodies[1]["messages"][1]["content"] == blocks


def test_each_option_has_its_field() -> None:
    body = sent("anthropic", [{"role": "system", "content": "be brief"}, USER], temperature=1.5,
        top_p=0.5, user="u", stop=["a", " "], max_tokens=7, response_format={"type": "json_object"})
    assert body.pop("system").startswith("be brief\n\nAnswer with one JSON")
    assert body == {"model": "m", "max_tokens": 7, "stream": True, "temperature": 1, "top_p": 0.5,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}],
        "stop_sequences": ["a"], "metadata": {"user_id": "u"}}
    assert "system" not in sent("anthropic", response_format={"type": "text"})
    assert sent("anthropic")["max_tokens"] > 1000
    assert sent("anthropic", [USER], [{"function": {"name": "f"}}])["tools"][0]["name"] == "f"
    blank = sent("anthropic", [{"role": "user", "content": " "}])["messages"][0]["content"]
    assert blank == [{"type": "text", "text": "Continue."}]
    assert sent("anthropic", reasoning_effort="none")["thinking"] == {"type": "disabled"}
    for effort, sends in (("minimal", "low"), ("high", "high")):
        assert sent("anthropic", reasoning_effort=effort)["output_config"] == {"effort": sends}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY}}
    wanted = sent("anthropic", response_format=schema)["output_config"]["format"]
    assert wanted == {"type": "json_schema", "schema": CITY}


@pytest.mark.parametrize(("choice", "theirs"), [("auto", None), ("none", {"type": "none"}),
    ("required", {"type": "any"}), ({"type": "tool", "name": "f"}, {"type": "tool", "name": "f"}),
    ({"type": "function", "function": {"name": "f"}}, {"type": "tool", "name": "f"})])
def test_tool_choice_and_parallel_calls(choice: Any, theirs: Any) -> None:
    assert sent("anthropic", tools=TOOLS, tool_choice=choice).get("tool_choice") == theirs
    on, off = (sent("anthropic", tools=TOOLS, tool_choice=choice, parallel_tool_calls=yes)
               for yes in (True, False))
    assert on.get("tool_choice") == theirs
    more = {} if choice == "none" else {"disable_parallel_tool_use": True}
    assert off["tool_choice"] == {"type": "auto", **(theirs or {}), **more}


@pytest.mark.parametrize("schema", [{"properties": {"a": {"type": "string"}}},
    {"properties": {}, "required": []}, {}, None, {"$schema": "x"},
    {"anyOf": [CITY], "type": "object"}])
def test_schemas_get_the_type_that_anthropic_wants(schema: Any) -> None:
    function = {"name": "f", "description": "d", "strict": True, "parameters": schema}
    (tool,) = sent("anthropic", tools=[{"type": "function", "function": function}])["tools"]
    assert tool["input_schema"] == {"properties": {}, **(schema or {}), "type": "object"} or (
        tool["input_schema"] == {**(schema or {}), "type": "object"})
    assert (tool["name"], tool["description"], tool["strict"]) == ("f", "d", True)


def test_cache_control_of_tools_and_messages_stays_on_its_block() -> None:
    mark = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    system = [{"type": "text", "text": "s", **mark}, {"type": "text", "text": "t"}]
    history = [{"role": "system", "content": system},
               {"role": "user", "content": [{"type": "text", "text": "a", **mark},
                                            {"type": "text", "text": "b"}]},
               {"role": "user", "content": "whole", **mark}]
    body = sent("anthropic", history, [{**TOOLS[0], **mark}])
    assert body["system"] == system
    assert body["messages"][0]["content"] == [*history[1]["content"],
                                              {"type": "text", "text": "whole", **mark}]
    assert body["tools"][0]["cache_control"] == mark["cache_control"]


def test_images_become_blocks_with_a_known_media_type() -> None:
    for url, source in (("http://h/x.png", {"type": "url", "url": "http://h/x.png"}),
            ("DATA:IMAGE/JPG;base64,QQ==",
                {"type": "base64", "media_type": "image/jpeg", "data": "QQ=="}),
            ("data:image/webp;charset=utf-8;base64,Q Q\n==",
                {"type": "base64", "media_type": "image/webp", "data": "QQ=="}),
            ("data:image/gif;base64,-_8=",
                {"type": "base64", "media_type": "image/gif", "data": "+/8="})):
        for part in ({"type": "image_url", "image_url": {"url": url}},
                     {"type": "image_url", "image_url": url}):
            content = sent("anthropic", [{"role": "user", "content": [part]}])["messages"][0]
            assert content["content"] == [{"type": "image", "source": source}]
