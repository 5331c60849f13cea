"""The fake vendors themselves: what is right passes, whole and streamed, and 20 planted errors each are refused."""

from __future__ import annotations

import copy
import http.client
import json
from typing import Any

import pytest
from vendors import KEY, Anthropic, Chat, Gemini, Ollama, Reply, Request, Responses, Vendor, digest

PNG = "iVBORw0KGgo="
GONE: Any = object()  #: stands for a field that is taken out
NAMES = ("chat", "local", "responses", "anthropic", "gemini", "ollama")


def vendor(name: str, *script: Any) -> Vendor:
    made: Vendor = {
        "chat": Chat, "local": Chat, "responses": Responses, "anthropic": Anthropic, "gemini": Gemini, "ollama": Ollama,
    }[name](*script, **({"local": True} if name == "local" else {}), models=("m-1", "gpt-6-sol", "claude-opus-5-5", "plain"))  # type: ignore[operator]
    return made


PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
CHAT_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": PARAMETERS}}
CHAT_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Oslo"}'}}
CHAT = {
    "model": "m-1",
    "messages": [
        {"role": "system", "content": "s"}, {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [CHAT_CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "cold"},
    ],
    "tools": [CHAT_TOOL], "tool_choice": "auto", "temperature": 0.5,
}  # fmt: skip
FLAT_TOOL = {"type": "function", "name": "f", "parameters": PARAMETERS, "strict": False}
FLAT_CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
FLAT_RESULT = {"type": "function_call_output", "call_id": "c1", "output": "cold"}
ASKS = {"role": "user", "content": [{"type": "input_text", "text": "q"}]}
RESPONSES = {"model": "m-1", "store": False, "input": [ASKS, FLAT_CALL, FLAT_RESULT], "tools": [FLAT_TOOL],
             "tool_choice": {"type": "function", "name": "f"}}  # fmt: skip
USE = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"city": "Oslo"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "cold"}
HELLO = {"role": "user", "content": [{"type": "text", "text": "q"}]}
ANTHROPIC_TOOL = {"name": "f", "description": "d", "input_schema": PARAMETERS}
ANTHROPIC = {
    "model": "m-1", "max_tokens": 64, "system": "s", "temperature": 1, "tools": [ANTHROPIC_TOOL],
    "messages": [HELLO, {"role": "assistant", "content": [USE]},
                 {"role": "user", "content": [RESULT, {"type": "text", "text": "and now?"}]}],
}  # fmt: skip
GEMINI_CALL = {"functionCall": {"name": "f", "args": {"city": "Oslo"}}, "thoughtSignature": "skip_thought_signature_validator"}
GEMINI_RESULT = {"functionResponse": {"name": "f", "response": {"output": "cold"}}}
GEMINI_TOOL = {"functionDeclarations": [{"name": "f", "parametersJsonSchema": PARAMETERS}]}
SAYS = {"role": "user", "parts": [{"text": "q"}]}
GEMINI = {
    "contents": [SAYS, {"role": "model", "parts": [GEMINI_CALL]}, {"role": "user", "parts": [GEMINI_RESULT]}],
    "systemInstruction": {"parts": [{"text": "s"}]}, "tools": [GEMINI_TOOL],
    "generationConfig": {"temperature": 1, "maxOutputTokens": 9},
}  # fmt: skip
OLLAMA_CALL = {"id": "c1", "function": {"name": "f", "arguments": {"city": "Oslo"}}}
OLLAMA_RESULT = {"role": "tool", "tool_name": "f", "tool_call_id": "c1", "content": "cold"}
OLLAMA = {
    "model": "m-1", "tools": [CHAT_TOOL], "options": {"temperature": 0.5, "num_predict": 9}, "truncate": False,
    "messages": [{"role": "user", "content": "q", "images": [PNG]},
                 {"role": "assistant", "content": "", "tool_calls": [OLLAMA_CALL]}, OLLAMA_RESULT],
}  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    "chat": CHAT, "local": CHAT, "responses": RESPONSES, "anthropic": ANTHROPIC, "gemini": GEMINI, "ollama": OLLAMA,
}  # fmt: skip
PATHS = {"responses": "/v1/responses", "anthropic": "/v1/messages", "gemini": "/v1beta/models/m-1:generateContent",
         "ollama": "/api/chat"}  # fmt: skip
CONTENT = {"Content-Type": "application/json"}
HEADERS = {
    "anthropic": {**CONTENT, "x-api-key": KEY, "anthropic-version": "2023-06-01"},
    "gemini": {**CONTENT, "x-goog-api-key": KEY},
}  # fmt: skip


def post(server: Vendor, name: str, body: Any, headers: Any = None, path: str = "") -> tuple[int, str, str]:
    """Status, content type and text of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    sent = {**HEADERS.get(name, {**CONTENT, "Authorization": f"Bearer {KEY}"}), **(headers or {})}
    try:
        connection.request("POST", path or PATHS.get(name, "/v1/chat/completions"), json.dumps(body),
                           {key: value for key, value in sent.items() if value is not GONE})  # fmt: skip
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_right_passes(name: str) -> None:
    """Whole and streamed, with text, thinking and a tool call in the answer."""
    reply = Reply("some text", [("f", {"city": "Bergen"})], thinking="a thought")
    with vendor(name, reply, reply) as server:
        status, kind, text = post(server, name, {**GOOD[name], **({"stream": False} if name == "ollama" else {})})
        assert (status, kind) == (200, "application/json")
        assert all(piece in text for piece in ("some ", "text", "a thought", "Bergen"))
        streamed = {**GOOD[name], **({} if name == "gemini" else {"stream": True})}
        path = "/v1beta/models/m-1:streamGenerateContent?alt=sse" if name == "gemini" else ""
        status, kind, text = post(server, name, streamed, path=path)
        assert status == 200
        assert kind == ("application/x-ndjson" if name == "ollama" else "text/event-stream")
        assert all(piece in text for piece in ("some ", "a th", "Ber" if name != "chat" else "Be"))
        assert server.bodies[1] == streamed
        assert not server.refusals


def but(body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The body with fields replaced, added or taken out."""
    changed = {**copy.deepcopy(body), **changes}
    return {key: value for key, value in changed.items() if value is not GONE}


def said(body: dict[str, Any], at: int, key: str = "messages", **changes: Any) -> dict[str, Any]:
    """The body with one message changed."""
    items = list(body[key])
    items[at] = but(items[at], **changes)
    return {**body, key: items}


def cut(body: dict[str, Any], at: int, key: str = "messages") -> dict[str, Any]:
    """The body without one message."""
    items = list(body[key])
    del items[at]
    return {**body, key: items}


def config(**changes: Any) -> dict[str, Any]:
    return {"generationConfig": changes}


UNSIGNED = {"functionCall": GEMINI_CALL["functionCall"]}
THOUGHT = {"type": "thinking", "thinking": "t", "signature": digest("somebody else")}
FORCED = {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["g"]}}

#: vendor, the error, its body or headers, and what the refusal must speak of
PLANTED: list[tuple[str, str, Any, str]] = [
    ("chat", "no model", but(CHAT, model=GONE), "'model'"),
    ("chat", "no messages", but(CHAT, messages=GONE), "'messages'"),
    ("chat", "empty messages", but(CHAT, messages=[]), "empty array"),
    ("chat", "unknown model", but(CHAT, model="x"), "does not exist"),
    ("chat", "wrong key", {"Authorization": "Bearer no"}, "Incorrect API key"),
    ("chat", "no content type", {"Content-Type": "text/plain"}, "content type"),
    ("chat", "unknown field", but(CHAT, top_k=3), "top_k"),
    ("chat", "carried key", said(CHAT, 2, copilot_router={}), "copilot_router"),
    ("chat", "reasoning sent back", said(CHAT, 2, reasoning_content="t"), "reasoning_content"),
    ("chat", "old token limit", but(CHAT, max_tokens=5), "max_completion_tokens"),
    ("chat", "unanswered call", cut(CHAT, 3), "did not have response messages: c1"),
    ("chat", "user before the result", but(CHAT, messages=[*CHAT["messages"][:3], CHAT["messages"][1]]), "did not have"),
    ("chat", "orphaned result", cut(CHAT, 2), "preceding message"),
    ("chat", "another call's result", said(CHAT, 3, tool_call_id="c2"), "preceding message"),
    ("chat", "arguments an object", said(CHAT, 2, tool_calls=[but(CHAT_CALL, function={"name": "f", "arguments": {}})]),
     "arguments"),
    ("chat", "empty id", said(CHAT, 2, tool_calls=[but(CHAT_CALL, id="")]), "id"),
    ("chat", "overlong id", said(CHAT, 2, tool_calls=[but(CHAT_CALL, id="c" * 41)]), "id"),
    ("chat", "call without type", said(CHAT, 2, tool_calls=[but(CHAT_CALL, type=GONE)]), "type"),
    ("chat", "null content without calls", said(CHAT, 2, tool_calls=GONE), "content"),
    ("chat", "choice without tools", but(CHAT, tools=GONE), "tool_choice"),
    ("chat", "choice of an unknown tool", but(CHAT, tool_choice={"type": "function", "function": {"name": "g"}}), "choice"),
    ("chat", "two tools of one name", but(CHAT, tools=[CHAT_TOOL, CHAT_TOOL]), "unique"),
    ("chat", "stream options without stream", but(CHAT, stream_options={"include_usage": True}), "stream_options"),
    ("chat", "temperature out of range", but(CHAT, temperature=2.5), "temperature"),
    ("chat", "five stops", but(CHAT, stop=list("abcde")), "stop"),
    ("chat", "json mode without the word", but(CHAT, response_format={"type": "json_object"}), "'json'"),
    ("chat", "schema without name", but(CHAT, response_format={"type": "json_schema", "json_schema": {"schema": {}}}), "name"),
    ("chat", "image that is no URL", said(CHAT, 1, content=[{"type": "image_url", "image_url": {"url": PNG}}]), "image_url"),
    ("chat", "tools of a reasoner", but(CHAT, model="gpt-6-sol"), "set reasoning_effort to 'none'"),
    ("local", "developer", said(CHAT, 0, role="developer"), "role"),
    ("local", "list of parts", said(CHAT, 0, content=[{"type": "text", "text": "s"}]), "content"),
    ("local", "new token limit", but(CHAT, max_completion_tokens=5), "max_completion_tokens"),
    ("responses", "no input", but(RESPONSES, input=GONE), "'input'"),
    ("responses", "empty input", but(RESPONSES, input=[]), "'input'"),
    ("responses", "no model", but(RESPONSES, model=GONE), "'model'"),
    ("responses", "wrong key", {"Authorization": "Bearer no"}, "Incorrect API key"),
    ("responses", "messages", but(RESPONSES, messages=[]), "messages"),
    ("responses", "tools nested", but(RESPONSES, tools=[CHAT_TOOL]), "tools[0]"),
    ("responses", "strict missing", but(RESPONSES, tools=[but(FLAT_TOOL, strict=GONE)]), "strict"),
    ("responses", "parameters missing", but(RESPONSES, tools=[but(FLAT_TOOL, parameters=GONE)]), "parameters"),
    ("responses", "choice nested", but(RESPONSES, tool_choice={"type": "function", "function": {"name": "f"}}), "tool_choice"),
    ("responses", "choice of an unknown tool", but(RESPONSES, tool_choice={"type": "function", "name": "g"}), "choice"),
    ("responses", "choice without tools", but(RESPONSES, tools=GONE), "tool_choice"),
    ("responses", "no output", cut(RESPONSES, 2, "input"), "No tool output"),
    ("responses", "no call", cut(RESPONSES, 1, "input"), "No tool call"),
    ("responses", "output before its call", but(RESPONSES, input=[ASKS, FLAT_RESULT, FLAT_CALL]), "No tool call"),
    ("responses", "one id twice", but(RESPONSES, input=[ASKS, FLAT_CALL, FLAT_CALL, FLAT_RESULT]), "unique"),
    ("responses", "id for call_id", said(RESPONSES, 1, "input", call_id=GONE, id="c1"), "call_id"),
    ("responses", "output an object", said(RESPONSES, 2, "input", output={}), "output"),
    ("responses", "chat's part", said(RESPONSES, 0, "input", content=[{"type": "text", "text": "q"}]), "content"),
    ("responses", "the assistant's part as input", said(RESPONSES, 0, "input", role="assistant"), "content"),
    ("responses", "foreign reasoning", but(RESPONSES, input=[ASKS, {
        "type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "x"}, FLAT_CALL, FLAT_RESULT]), "encrypted"),
    ("responses", "stop", but(RESPONSES, stop=["a"]), "stop"),
    ("responses", "chat's token limit", but(RESPONSES, max_completion_tokens=99), "max_completion_tokens"),
    ("responses", "chat's format", but(RESPONSES, response_format={"type": "text"}), "response_format"),
    ("anthropic", "no max_tokens", but(ANTHROPIC, max_tokens=GONE), "max_tokens: Field required"),
    ("anthropic", "no key", {"x-api-key": GONE}, "invalid x-api-key"),
    ("anthropic", "no version", {"anthropic-version": GONE}, "anthropic-version"),
    ("anthropic", "unknown model", but(ANTHROPIC, model="x"), "model: x"),
    ("anthropic", "unknown field", but(ANTHROPIC, seed=5), "seed: Extra inputs"),
    ("anthropic", "carried key", said(ANTHROPIC, 1, copilot_router={}), "copilot_router: Extra inputs"),
    ("anthropic", "temperature above one", but(ANTHROPIC, temperature=1.5), "temperature"),
    ("anthropic", "temperature in the new version", {"anthropic-version": "2026-10-21"}, "temperature: Extra inputs"),
    ("anthropic", "temperature for a model without", but(ANTHROPIC, model="claude-opus-5-5"), "temperature: Extra inputs"),
    ("anthropic", "empty system", but(ANTHROPIC, system=""), "non-whitespace"),
    ("anthropic", "system among the messages", said(ANTHROPIC, 0, role="system"), "role"),
    ("anthropic", "two user turns in a row", but(ANTHROPIC, messages=[HELLO, *ANTHROPIC["messages"]]), "alternate"),
    ("anthropic", "assistant first", cut(ANTHROPIC, 0), "begin with"),
    ("anthropic", "prefill", but(ANTHROPIC, messages=[HELLO, {"role": "assistant", "content": "So"}]), "prefill"),
    ("anthropic", "blank text", said(ANTHROPIC, 0, content=[{"type": "text", "text": " \n"}]), "non-whitespace"),
    ("anthropic", "empty content", said(ANTHROPIC, 0, content=[]), "empty"),
    ("anthropic", "text before the result", said(ANTHROPIC, 2, content=[{"type": "text", "text": "x"}, RESULT]), "before any"),
    ("anthropic", "no result", said(ANTHROPIC, 2, content="never mind"), "without `tool_result`"),
    ("anthropic", "orphaned result", but(ANTHROPIC, messages=[{"role": "user", "content": [RESULT]}]),
     "unexpected `tool_use_id`"),
    ("anthropic", "foreign id", said(ANTHROPIC, 1, content=[but(USE, id="functions.f:0")]), "id"),
    ("anthropic", "arguments as text", said(ANTHROPIC, 1, content=[but(USE, input="{}")]), "input"),
    ("anthropic", "no tools declared", but(ANTHROPIC, tools=GONE), "must define tools"),
    ("anthropic", "schema without type", but(ANTHROPIC, tools=[but(ANTHROPIC_TOOL, input_schema={})]), "input_schema.type"),
    ("anthropic", "forced for a model that is not", but(ANTHROPIC, model="claude-opus-5-5", temperature=GONE,
                                                      tool_choice={"type": "any"}), "tool_choice"),
    ("anthropic", "forced while thinking", but(ANTHROPIC, thinking={"type": "adaptive"}, tool_choice={"type": "any"}),
     "forces"),
    ("anthropic", "signature of another", said(ANTHROPIC, 1, content=[THOUGHT, USE]), "Invalid `signature`"),
    ("anthropic", "image/jpg", said(ANTHROPIC, 0, content=[{"type": "image", "source": {
        "type": "base64", "media_type": "image/jpg", "data": PNG}}]), "media_type"),
    ("anthropic", "a data URL for an image", said(ANTHROPIC, 0, content=[{"type": "image", "source": {
        "type": "base64", "media_type": "image/png", "data": f"data:image/png;base64,{PNG}"}}]), "base64"),
    ("gemini", "no key", {"x-goog-api-key": GONE}, "API key not valid"),
    ("gemini", "no contents", but(GEMINI, contents=[]), "contents"),
    ("gemini", "unknown field", but(GEMINI, model="m-1"), "Unknown name"),
    ("gemini", "sampling at the top", but(GEMINI, temperature=1), "Unknown name"),
    ("gemini", "system role", said(GEMINI, 0, "contents", role="system"), "role"),
    ("gemini", "assistant role", said(GEMINI, 1, "contents", role="assistant"), "role"),
    ("gemini", "two user turns in a row", but(GEMINI, contents=[SAYS, *GEMINI["contents"]]), "alternate"),
    ("gemini", "model last", cut(GEMINI, 2, "contents"), "last turn"),
    ("gemini", "call first", cut(GEMINI, 0, "contents"), "alternate"),
    ("gemini", "no parts", said(GEMINI, 0, "contents", parts=[]), "parts"),
    ("gemini", "two things in a part", said(GEMINI, 0, "contents", parts=[{"text": "a", **GEMINI_RESULT}]), "oneof"),
    ("gemini", "one response too few", said(GEMINI, 1, "contents", parts=[GEMINI_CALL, UNSIGNED]), "equal to the number"),
    ("gemini", "one response too many", said(GEMINI, 2, "contents", parts=[GEMINI_RESULT] * 2), "equal to the number"),
    ("gemini", "response without name", said(GEMINI, 2, "contents", parts=[{"functionResponse": {"response": {}}}]), "name"),
    ("gemini", "response of text", said(GEMINI, 2, "contents", parts=[{
        "functionResponse": {"name": "f", "response": "cold"}}]), "response"),
    ("gemini", "response of another function", said(GEMINI, 2, "contents", parts=[{
        "functionResponse": {"name": "g", "response": {}}}]), "name, id and order"),
    ("gemini", "arguments as text", said(GEMINI, 1, "contents", parts=[{"functionCall": {"name": "f", "args": "{}"}}]),
     "args"),
    ("gemini", "no signature", said(GEMINI, 1, "contents", parts=[UNSIGNED]), "missing a thought_signature"),
    ("gemini", "signature of another", said(GEMINI, 1, "contents", parts=[{**UNSIGNED, "thoughtSignature": "x"}]),
     "not valid"),
    ("gemini", "an id it never gave", said(GEMINI, 1, "contents", parts=[
        {**GEMINI_CALL, "functionCall": {"id": "x", "name": "f", "args": {}}}]), "equal|one of this model's"),
    ("gemini", "empty schema", but(GEMINI, tools=[{"functionDeclarations": [{
        "name": "f", "parametersJsonSchema": {"type": "object", "properties": {}}}]}]), "non-empty"),
    ("gemini", "a name that begins with a digit", but(GEMINI, tools=[{"functionDeclarations": [{"name": "1f"}]}]), "name"),
    ("gemini", "allowed but not declared", but(GEMINI, toolConfig=FORCED), "not declared"),
    ("gemini", "six stops", but(GEMINI, **config(stopSequences=list("abcdef"))), "stop sequences"),
    ("gemini", "schema without its type", but(GEMINI, **config(responseJsonSchema={})), "responseMimeType"),
    ("gemini", "two kinds of thinking", but(GEMINI, **config(thinkingConfig={"thinkingBudget": 0, "thinkingLevel": "LOW"})),
     "only set one"),
    ("gemini", "image by URL", said(GEMINI, 0, "contents", parts=[{"fileData": {"fileUri": "http://h/x.png"}}]),
     "Unknown name"),
    ("ollama", "no model", but(OLLAMA, model=GONE), "model is required"),
    ("ollama", "empty model", but(OLLAMA, model=""), "model"),
    ("ollama", "unknown model", but(OLLAMA, model="x"), "model 'x' not found"),
    ("ollama", "sampling at the top", but(OLLAMA, temperature=0.5), "unknown field"),
    ("ollama", "token limit at the top", but(OLLAMA, max_tokens=5), "unknown field"),
    ("ollama", "tool_choice", but(OLLAMA, tool_choice="auto"), "unknown field"),
    ("ollama", "response_format", but(OLLAMA, response_format={"type": "json_object"}), "unknown field"),
    ("ollama", "carried key", said(OLLAMA, 1, copilot_router={}), "unknown field"),
    ("ollama", "type of a call", said(OLLAMA, 1, tool_calls=[{**OLLAMA_CALL, "type": "function"}]), "unknown field"),
    ("ollama", "arguments as text", said(OLLAMA, 1, tool_calls=[{"function": {"name": "f", "arguments": "{}"}}]), "unmarshal"),
    ("ollama", "null content", said(OLLAMA, 1, content=None), "unmarshal"),
    ("ollama", "list of parts", said(OLLAMA, 0, content=[{"type": "text", "text": "q"}]), "unmarshal"),
    ("ollama", "developer", said(OLLAMA, 0, role="developer"), "role"),
    ("ollama", "a data URL for an image", said(OLLAMA, 0, images=[f"data:image/png;base64,{PNG}"]), "base64"),
    ("ollama", "an image by URL", said(OLLAMA, 0, images=["http://h/x.png"]), "base64"),
    ("ollama", "result without name", said(OLLAMA, 2, tool_name=GONE), "tool_name is required"),
    ("ollama", "orphaned result", cut(OLLAMA, 1), "without its tool call"),
    ("ollama", "no result", cut(OLLAMA, 2), "without its result"),
    ("ollama", "stop as text", but(OLLAMA, options={"stop": "END"}), "stop"),
    ("ollama", "format by OpenAI's name", but(OLLAMA, format="json_object"), "format"),
    ("ollama", "effort it does not know", but(OLLAMA, think="xhigh"), "think"),
    ("ollama", "thinking of a model without", but(OLLAMA, model="plain", think=True), "does not support thinking"),
    ("ollama", "tools of a model without", but(OLLAMA, model="plain"), "does not support tools"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "error", "planted", "speaks_of"), PLANTED, ids=[f"{row[0]}: {row[1]}" for row in PLANTED])
def test_a_planted_error_is_refused(name: str, error: str, planted: Any, speaks_of: str) -> None:
    """For its own reason, in the vendor's own form."""
    with vendor(name) as server:
        headers = {"model", "contents", "messages", "input"}.isdisjoint(planted)
        status, _, text = post(server, name, GOOD[name], planted) if headers else post(server, name, planted)
        assert 400 <= status < 500, error
        told = json.loads(text)["error"]
        message = told if name == "ollama" else told["message"]
        assert any(part in message for part in speaks_of.split("|")), message
        expected = {"chat": "code", "local": "code", "responses": "code", "anthropic": "type", "gemini": "status"}
        assert name == "ollama" or expected[name] in told


def test_twenty_errors_or_more_are_planted_for_each() -> None:
    """Local servers share those of Chat Completions."""
    for name in NAMES:
        assert sum(row[0] in (name, "chat" if name == "local" else name) for row in PLANTED) >= 20


def test_what_was_issued_comes_back_only_unchanged() -> None:
    """Anthropic's thinking, Gemini's signatures and ids, OpenAI's reasoning items: for the same model, in the same place."""
    reply = Reply(calls=[("f", {})], thinking="t")
    with vendor("anthropic") as server:
        assert isinstance(server, Anthropic)
        first = Request("", {}, {**ANTHROPIC, "messages": [HELLO]})
        blocks = server.whole(reply, first)["content"]
        result = {"role": "user", "content": [but(RESULT, tool_use_id=blocks[1]["id"])]}
        again = {**ANTHROPIC, "messages": [HELLO, {"role": "assistant", "content": blocks}, result]}
        assert post(server, "anthropic", again)[0] == 200
        for changed in (
            said(again, 1, content=blocks[1:]), said(again, 1, content=[{**blocks[0], "thinking": "T"}, blocks[1]]),
            {**again, "system": "another"}, {**again, "model": "gpt-6-sol"},
        ):  # fmt: skip
            assert post(server, "anthropic", changed)[0] == 400
    with vendor("gemini") as server:
        assert isinstance(server, Gemini)
        (part,) = server.parts(Reply(calls=[("f", {})]), "m-1")
        call_id = part["functionCall"]["id"]
        result = {"role": "user", "parts": [{"functionResponse": {"id": call_id, "name": "f", "response": {}}}]}
        again = {**GEMINI, "contents": [SAYS, {"role": "model", "parts": [part]}, result]}
        assert post(server, "gemini", again)[0] == 200
        assert post(server, "gemini", again, path="/v1beta/models/plain:generateContent")[0] == 400
        assert post(server, "gemini", said(again, 1, "contents", parts=[{**part, "thoughtSignature": "x"}]))[0] == 400
    with vendor("responses") as server:
        assert isinstance(server, Responses)
        items = server.output(reply, {"model": "m-1", "include": ["reasoning.encrypted_content"]})
        again = {**RESPONSES, "input": [ASKS, *items, but(FLAT_RESULT, call_id=items[1]["call_id"])]}
        assert post(server, "responses", again)[0] == 200
        assert post(server, "responses", {**again, "model": "gpt-6-sol"})[0] == 400
        assert post(server, "responses", cut(again, 1, "input"))[0] == 400
