"""generateContent and streamGenerateContent of Gemini."""

from __future__ import annotations

from typing import Any

import pytest
from support.server import (CITY, TOOLS, USER, candidate, read, reply, sent, stream, talking)

from copilot_router import (ContentFiltered, EmptyResponse, FailoverChain,
    InvalidResponse, ProviderTier, ScriptedProvider, Usage)

SKIP = "skip_thought_signature_validator"
TEXT = {"text": "x"}
FAILED = ["MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "MALFORMED_RESPONSE", "NO_IMAGE",
          "TOO_MANY_TOOL_CALLS", "OTHER", "IMAGE_OTHER", "MISSING_THOUGHT_SIGNATURE"]


@pytest.mark.parametrize("theirs", FAILED)
def test_failures_of_the_model_are_invalid_responses_with_their_code(theirs: str) -> None:
    for wire in (reply(candidate(TEXT, finish=theirs)), stream(candidate(finish=theirs))):
        error = read("gemini", wire)
        assert type(error) is InvalidResponse and error.code == theirs.lower()
    with talking("gemini", wire) as (provider, server):
        chain = FailoverChain([ProviderTier("a", provider, ["m"]),
                               ProviderTier("b", ScriptedProvider(["b"]))])
        assert chain.chat("q", timeout=5).provider == "b"
        assert (len(server.requests), chain.tiers[0].breaker.snapshot().failures) == (1, 1)


def test_blocked_prompts_and_answers_are_filtered_unless_there_is_text() -> None:
    for body in (
            {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 3}},
            {"candidates": [{"finishReason": "SAFETY"}]},
            {"candidates": [{"finishReason": "RECITATION", "content": {}}]},
            {"candidates": [{"finishReason": "PROHIBITED_CONTENT", "content": {"role": "model"}}]}):
        for wire in (reply(body), stream(body)):
            assert type(read("gemini", wire)) is ContentFiltered
    shown = stream(candidate(TEXT, finish=None), {"candidates": [{"finishReason": "SAFETY"}]})
    response = read("gemini", shown)
    assert (response.text, response.finish_reason) == ("x", "content_filter")
    assert type(read("gemini", reply({"candidates": [{"finishReason": "STOP"}]}))) is EmptyResponse


def test_thoughts_are_counted_apart_and_nulls_take_no_count_back() -> None:
    usage = {"promptTokenCount": 10, "candidatesTokenCount": 5, "thoughtsTokenCount": 7,
             "cachedContentTokenCount": 4, "toolUsePromptTokenCount": 2}
    body = candidate({"text": "plan", "thought": True}, {"text": "Hi"}, usageMetadata=usage)
    for wire in (reply(body), stream(body)):
        response = read("gemini", wire)
        assert response.usage == Usage(12, 12, 4, 0, 7)
        assert (response.text, response.reasoning) == ("Hi", "plan")
    counted = candidate(TEXT, finish=None, usageMetadata={"promptTokenCount": 3,
                                                          "candidatesTokenCount": 4})
    nulls = {"promptTokenCount": None, "candidatesTokenCount": None}
    for last in ({}, {"usageMetadata": None}, {"usageMetadata": nulls}, {"usageMetadata": {}}):
        assert read("gemini", stream(counted, candidate(**last))).usage == Usage(3, 4)


def test_several_candidates_never_run_into_one_text() -> None:
    events = [candidate({"text": "A1 "}, finish=None),
              candidate({"text": "B1 "}, finish=None, at=1),
              candidate({"text": "B2"}, at=1), candidate({"text": "A2"})]
    both = {"candidates": [candidate({"text": one}, at=at)["candidates"][0]
                           for one, at in (("B", 1), ("A", 0))]}
    assert read("gemini", stream(*events)).text == "A1 A2"
    assert read("gemini", stream(events[1], events[0], *events[2:])).text == "A1 A2"
    assert read("gemini", reply(both)).text == read("gemini", stream(both)).text == "A"
    assert isinstance(read("gemini", stream(*events[:3])), InvalidResponse)


def test_odd_parts_go_back_only_and_function_calls_need_no_arguments() -> None:
    """Results of code and of Google's own tools have no signature; an empty part is left out."""
    parts = [{"functionCall": {"name": "f"}}, {"codeExecutionResult": {"output": "1"}},
             {"thoughtSignature": "s"}]
    wire = reply(candidate({}, *parts, {"text": ""}))
    with talking("gemini", wire) as (provider, server):
        response = provider.chat("q", TOOLS, "m", timeout=5)
        provider.chat([USER, response.message], TOOLS, "m", timeout=5)
    assert server.bodies[1]["contents"][1]["parts"] == parts
    assert [call.arguments for call in response.tool_calls] == [{}]
    assert response.finish_reason == "tool_calls"
    cut = read("gemini", reply(candidate(parts[0], finish="MAX_TOKENS")), tools=TOOLS)
    assert cut.finish_reason == "length"


@pytest.mark.parametrize("body", [{"candidates": "x"}, {"candidates": ["x"]},
    {"candidates": [{"content": {"parts": "x"}}]}, candidate({"functionCall": "x"}),
    candidate({"text": 5}), candidate("x"), candidate(finish=5),
    *([candidate(TEXT, finish=None), candidate(TEXT, finish=none)]
        for none in (None, "", "FINISH_REASON_UNSPECIFIED"))])
def test_answers_of_the_wrong_shape_or_without_an_end_are_invalid(body: Any) -> None:
    for wire in (reply(body), stream(*body) if isinstance(body, list) else stream(body)):
        assert isinstance(read("gemini", wire), InvalidResponse)


def test_model_names_addresses_and_the_response_id() -> None:
    wire = reply(candidate(TEXT, modelVersion="m-7", responseId="r-1"))
    with talking("gemini", wire) as (provider, server):
        for model in ("m", "models/m"):
            response = provider.chat("q", model=model, timeout=5)
            assert (response.model, response.request_id) == ("m-7", "r-1")
        assert {one.path for one in server.requests} == {
            "/v1beta/models/m:streamGenerateContent?alt=sse"}
    with talking("gemini", wire, stream_upstream=False) as (provider, server):
        provider.chat("q", model="m", timeout=5)
        assert server.requests[0].path == "/v1beta/models/m:generateContent"


def test_function_responses_have_name_object_and_the_order_of_their_calls() -> None:
    calls = [{"id": one, "type": "function", "function": {"name": "f", "arguments": "{}"}}
             for one in "ab"]
    history = [USER, {"role": "assistant", "content": None, "tool_calls": calls},
               {"role": "tool", "tool_call_id": "b", "content": '{"temp": 3}'},
               {"role": "tool", "tool_call_id": "a", "content": "cold"}]
    assert sent("gemini", history, TOOLS)["contents"][1:] == [{"role": "model",
        "parts": [{"functionCall": {"name": "f", "args": {}}, "thoughtSignature": SKIP},
            {"functionCall": {"name": "f", "args": {}}}]}, {"role": "user", "parts": [
            {"functionResponse": {"name": "f", "response": {"output": "cold"}}},
            {"functionResponse": {"name": "f", "response": {"temp": 3}}}]}]
    lost = sent("gemini", history[:2], TOOLS)["contents"][2]["parts"]
    assert all("no result" in part["functionResponse"]["response"]["error"] for part in lost)


@pytest.mark.parametrize("extra", ["type", "title", "description", "required", "$schema", "$defs"])
def test_schemas_without_arguments_are_left_out(extra: str) -> None:
    """Gemini would refuse them. They stay if arguments stand behind a reference or are free."""
    empty = {extra: "x", "properties": {}}
    kept = [{**empty, "properties": {"a": {}}}, {**empty, "anyOf": [CITY]},
        {**empty, "additionalProperties": {"type": "string"}}, {extra: "x", "$ref": "#/$defs/X"}]
    tools = [{"type": "function",
              "function": {"name": f"f{at}", "description": "d", "parameters": one}}
             for at, one in enumerate([empty, {}, None, {extra: "x"}, *kept])]
    (declared,) = sent("gemini", tools=tools)["tools"]
    told = {(one["name"][0], one["description"]) for one in declared["functionDeclarations"]}
    assert told == {("f", "d")}
    assert [one.get("parametersJsonSchema") for one in declared["functionDeclarations"]] == [
        None, None, None, None, *kept]


def test_each_option_has_its_field() -> None:
    config = sent("gemini", temperature=0.1, top_p=0.2, seed=3, presence_penalty=0.4, max_tokens=6,
        frequency_penalty=0.5, stop="s", user="u", parallel_tool_calls=False,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": CITY}})
    assert config["generationConfig"] == {"temperature": 0.1, "topP": 0.2, "seed": 3,
        "presencePenalty": 0.4, "frequencyPenalty": 0.5, "maxOutputTokens": 6,
        "stopSequences": ["s"], "responseMimeType": "application/json", "responseJsonSchema": CITY}
    json_mode = sent("gemini", response_format={"type": "json_object"})["generationConfig"]
    assert json_mode == {"responseMimeType": "application/json"}
    systems = [{"role": role, "content": role} for role in ("system", "developer")]
    told = sent("gemini", [*systems, USER])["systemInstruction"]
    assert told == {"parts": [{"text": "system\n\ndeveloper"}]}
    for effort, level in (("none", "LOW"), ("minimal", "MINIMAL"), ("high", "HIGH"),
                          ("max", "XHIGH")):
        thinking = sent("gemini", reasoning_effort=effort)["generationConfig"]["thinkingConfig"]
        assert thinking == {"thinkingLevel": level, "includeThoughts": True}
    named = {"type": "function", "function": {"name": "f"}}
    for choice, mode in (("auto", {"mode": "AUTO"}), ("none", {"mode": "NONE"}),
            ("required", {"mode": "ANY"}), (named, {"mode": "ANY", "allowedFunctionNames": ["f"]})):
        body = sent("gemini", tools=TOOLS, tool_choice=choice)
        assert body["toolConfig"] == {"functionCallingConfig": mode}


def test_a_history_that_ends_with_the_assistant_gets_a_user_turn() -> None:
    history = [USER, {"role": "assistant", "content": "So"}]
    assert sent("gemini", history)["contents"][-1] == {
        "role": "user", "parts": [{"text": "Continue."}]}
    assert sent("anthropic", history)["messages"][-1]["content"] == [
        {"type": "text", "text": "Continue."}]
