"""What is sent, held against the vendors' own packages: their request types, and the bodies that their clients send.

Needs the packages of the extra ``sdk``: ``make sdk``. Every conversation is told twice, once to a provider and once to the
vendor's client in its own terms by the writers below, which share no code with the router; both talk to a server on
loopback. The two bodies must be equal after ``normalised``, which says each difference that is allowed and why.
"""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

anthropic = pytest.importorskip("anthropic")
ollama = pytest.importorskip("ollama")
openai = pytest.importorskip("openai")
genai = pytest.importorskip("google.genai")

import ollama._types as ollama_types
import typing_extensions
from anthropic.types.message_create_params import (
    MessageCreateParamsNonStreaming,
    MessageCreateParamsStreaming,
)
from google.genai import types as gemini_types
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as responses_params
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from support.dialects import Answer, Anthropic, Chat, Dialect, Gemini, Ollama, Responses
from support.server import Peer

KEY = "sk-test-contract-key-1234567890"
Body = dict[str, Any]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def parsed(request: bytes) -> tuple[str, dict[str, str], Body]:
    """Path, headers (lower-case names) and JSON body of a request."""
    top, _, body = request.partition(b"\r\n\r\n")
    first, *lines = top.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    return first.split(" ")[1], headers, json.loads(body) if body else {}


def answers(dialect: Dialect, make: Callable[[Body], Answer]) -> Callable[..., bool]:
    """A server that answers, streamed or whole as it was asked."""

    def serve(server: Any, connection: Any, request: bytes) -> bool:
        path, _, body = parsed(request)
        answer, streamed = make(body), dialect.streams(path, body)
        kind = dialect.stream_kind if streamed else "application/json"
        data = b"".join(dialect.events(answer)) if streamed else json.dumps(dialect.body(answer)).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        return True

    return serve

# -- conversations -----------------------------------------------------------------------------------------------------

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(range(200, 255))).decode()  # holds + and /
JPEG = base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(range(40))).decode()
CITY: Body = {"type": "object", "properties": {"city": {"type": "string", "description": "Where"},
              "unit": {"type": "string", "enum": ["C", "F"]}}, "required": ["city"]}  # fmt: skip
NESTED: Body = {"type": "object", "properties": {"days": {"type": "array", "items": {"type": "object", "properties": {
    "at": {"type": "string"}, "n": {"type": "integer", "minimum": 0}}}}}, "additionalProperties": False}  # fmt: skip


def tool(name: str, schema: Body | None = CITY, **more: Any) -> Body:
    parameters = {} if schema is None else {"parameters": schema}
    return {"type": "function", "function": {"name": name, "description": f"Knows the {name}.", **parameters, **more}}


def image(data: str, media: str = "image/png") -> Body:
    return {"type": "image_url", "image_url": {"url": f"data:{media};base64,{data}"}}


def text(words: str) -> Body:
    return {"type": "text", "text": words}


def system(words: str) -> Body:
    return {"role": "system", "content": words}


def user(content: Any) -> Body:
    return {"role": "user", "content": content}


def assistant(content: str | None, *calls: tuple[str, str, Body]) -> Body:
    made = [{"id": call_id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for call_id, name, arguments in calls]  # fmt: skip
    return {"role": "assistant", "content": content, **({"tool_calls": made} if made else {})}


def result(call_id: str, words: str) -> Body:
    return {"role": "tool", "tool_call_id": call_id, "content": words}


HI = [user("How is the weather?")]
WEATHER, TIME = tool("weather"), tool("time")
LOOP = [*HI, assistant(None, ("call_1", "weather", {"city": "Oslo"})), result("call_1", "4 degrees")]
TWO = [*HI, assistant("Both.", ("call_1", "weather", {"city": "Oslo"}), ("call_2", "time", {"city": "Rømø"})),
       result("call_1", "4 degrees"), result("call_2", "noon")]  # fmt: skip
SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {
    "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}}}

#: name -> messages, tools, options
CONVERSATIONS: dict[str, tuple[list[Body], list[Body], Body]] = {
    "one word": ([user("hi")], [], {}),
    "a system text": ([system("Be brief."), user("hi")], [], {}),
    "two system texts": ([system("Be brief."), system("Be kind."), user("hi")], [], {}),
    "several turns": ([user("hi"), assistant("Hello."), user("And?"), assistant("Well."), user("So?")], [], {}),
    "several turns with a system text": ([system("s"), user("hi"), assistant("Hello."), user("And?")], [], {}),
    "other scripts": ([user("Grüße, 世界 \u2028 \U0001f600 \"quoted\"\\ \x07")], [], {}),
    "a long text": ([user("word " * 5000)], [], {}),
    "text in a part": ([user([text("How is it?")])], [], {}),
    "an image": ([user([text("What is it?"), image(PNG)])], [], {}),
    "an image first": ([user([image(JPEG, "image/jpeg"), text("What is it?")])], [], {}),
    "two images": ([user([text("Compare."), image(PNG), image(JPEG, "image/jpeg")])], [], {}),
    "an image in an earlier turn": ([user([text("What?"), image(PNG)]), assistant("A cat."), user("Sure?")], [], {}),
    "a remote image": ([user([text("What?"), {"type": "image_url", "image_url": {
        "url": "https://images.invalid/cat.png"}}])], [], {}),
    "a tool": (HI, [WEATHER], {}),
    "two tools": (HI, [WEATHER, TIME], {}),
    "a tool with a nested schema": (HI, [tool("plan", NESTED)], {}),
    "a strict tool": (HI, [tool("plan", NESTED, strict=True)], {}),
    "tool choice auto": (HI, [WEATHER], {"tool_choice": "auto"}),
    "tool choice none": (HI, [WEATHER], {"tool_choice": "none"}),
    "tool choice required": (HI, [WEATHER, TIME], {"tool_choice": "required"}),
    "tool choice by name": (HI, [WEATHER, TIME], {"tool_choice": {"type": "function", "function": {"name": "time"}}}),
    "one tool at a time": (HI, [WEATHER, TIME], {"parallel_tool_calls": False}),
    "a tool's result": (LOOP, [WEATHER], {}),
    "a tool's result with a system text": ([system("s"), *LOOP], [WEATHER], {}),
    "two results": (TWO, [WEATHER, TIME], {}),
    "two results and a question": ([*TWO, user("So?")], [WEATHER, TIME], {}),
    "after the result": ([*LOOP, assistant("4 degrees."), user("Thanks. And there?")], [WEATHER], {}),
    "two rounds of tools": ([*LOOP, assistant(None, ("call_2", "weather", {"city": "Rome"})), result("call_2", "20")],
                            [WEATHER], {}),
    "a call without arguments": ([*HI, assistant(None, ("call_1", "time", {})), result("call_1", "noon")], [TIME], {}),
    "deep arguments": ([*HI, assistant(None, ("call_1", "plan", {"days": [{"at": "é", "n": 1}, {"x": [None, 1.5, True]}]})),
                        result("call_1", "done")], [tool("plan", NESTED)], {}),
    "a result that is JSON": ([*LOOP[:-1], result("call_1", '{"degrees": 4, "sky": ["clear"]}')], [WEATHER], {}),
    "a token limit": (HI, [], {"max_tokens": 77}),
    "sampling": (HI, [], {"temperature": 0.5, "top_p": 0.9}),
    "a stop word": (HI, [], {"stop": ["END", "FIN"]}),
    "a seed and penalties": (HI, [], {"seed": 7, "presence_penalty": 0.5, "frequency_penalty": 0.25}),
    "a schema": (HI, [], {"response_format": SCHEMA}),
    "a JSON object": ([user("Answer in JSON.")], [], {"response_format": {"type": "json_object"}}),
    "low effort": (HI, [], {"reasoning_effort": "low"}),
    "high effort": (HI, [], {"reasoning_effort": "high"}),
    "a user": (HI, [], {"user": "somebody"}),
    "nearly everything": ([system("s"), user([text("What?"), image(PNG)]), *TWO[1:], user("So?")], [WEATHER, TIME], {
        "max_tokens": 500, "tool_choice": "auto", "parallel_tool_calls": False, "reasoning_effort": "medium",
        "response_format": SCHEMA, "user": "somebody"}),
}  # fmt: skip


# -- the vendors' clients, used as their documentation uses them ---------------------------------------------------------


def pieces(content: Any) -> Iterator[tuple[str, str, str]]:
    """("text", "", text), ("data", media type, base64) or ("url", "", address) for each part."""
    for part in [text(content)] if isinstance(content, str) else content or []:
        if part["type"] == "text":
            yield "text", "", part["text"]
        elif part["image_url"]["url"].startswith("data:"):
            media, _, data = part["image_url"]["url"].removeprefix("data:").partition(";base64,")
            yield "data", media, data
        else:
            yield "url", "", part["image_url"]["url"]


def calls_of(message: Body) -> list[tuple[str, str, Body]]:
    return [(call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
            for call in message.get("tool_calls", ())]  # fmt: skip


def names_of(messages: list[Body]) -> dict[str, str]:
    return {call_id: name for message in messages for call_id, name, _ in calls_of(message)}


def ask_chat(url: str, messages: list[Body], tools: list[Body], options: Body, streaming: bool) -> None:
    options = dict(options)
    if "max_tokens" in options:
        options["max_completion_tokens"] = options.pop("max_tokens")
    if tools:
        options["tools"] = tools
    if streaming:
        options |= {"stream": True, "stream_options": {"include_usage": True}}
    with openai.OpenAI(api_key=KEY, base_url=url + "/v1", max_retries=0) as client:
        answer = client.chat.completions.create(model="m", messages=messages, **options)
        assert list(answer) if streaming else answer.choices[0].message.content == "Hello, world"


def ask_responses(url: str, messages: list[Body], tools: list[Body], options: Body, streaming: bool) -> None:
    items: list[Any] = []
    for message in messages:
        if message["role"] == "tool":
            items.append({"type": "function_call_output", "call_id": message["tool_call_id"], "output": message["content"]})
            continue
        if message["role"] == "assistant":
            items += [{"role": "assistant", "content": message["content"]}] if message["content"] else []
        elif isinstance(message["content"], str):
            items.append({"role": message["role"], "content": message["content"]})
        else:
            content = []
            for kind, media, data in pieces(message["content"]):
                address = f"data:{media};base64,{data}" if kind == "data" else data
                shown = {"type": "input_image", "image_url": address, "detail": "auto"}
                content.append({"type": "input_text", "text": data} if kind == "text" else shown)
            items.append({"role": message["role"], "content": content})
        items += [{"type": "function_call", "call_id": call_id, "name": name, "arguments": json.dumps(arguments)}
                  for call_id, name, arguments in calls_of(message)]  # fmt: skip
    asked: Body = {name: options[name] for name in ("temperature", "top_p", "user", "parallel_tool_calls") if name in options}
    if tools:
        asked["tools"] = [{"strict": False, **one["function"], "type": "function"} for one in tools]
    if "tool_choice" in options:
        choice = options["tool_choice"]
        asked["tool_choice"] = choice if isinstance(choice, str) else {"type": "function", "name": choice["function"]["name"]}
    if "max_tokens" in options:
        asked["max_output_tokens"] = options["max_tokens"]
    if "reasoning_effort" in options:
        asked["reasoning"] = {"effort": options["reasoning_effort"], "summary": "auto"}
    if "response_format" in options:
        form = options["response_format"]
        asked["text"] = {"format": {"type": form["type"], **form.get("json_schema", {})}}
    if streaming:
        asked["stream"] = True
    with openai.OpenAI(api_key=KEY, base_url=url + "/v1", max_retries=0) as client:
        answer = client.responses.create(
            model="m", input=items, store=False, include=["reasoning.encrypted_content"], **asked
        )
        assert list(answer) if streaming else answer.output_text == "Hello, world"


def ask_anthropic(url: str, messages: list[Body], tools: list[Body], options: Body, streaming: bool) -> None:
    told: list[str] = []
    turns: list[Body] = []
    for message in messages:
        role = "user" if message["role"] == "tool" else message["role"]
        if role == "system":
            told.append(message["content"])
            continue
        blocks: list[Body] = []
        if message["role"] == "tool":
            blocks.append({"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": message["content"]})
        else:
            for kind, media, data in pieces(message["content"]):
                source = {"type": "url", "url": data}
                if kind == "data":
                    source = {"type": "base64", "media_type": media, "data": data}
                blocks.append({"type": "text", "text": data} if kind == "text" else {"type": "image", "source": source})
        blocks += [{"type": "tool_use", "id": call_id, "name": name, "input": arguments}
                   for call_id, name, arguments in calls_of(message)]  # fmt: skip
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    for turn in turns:
        if len(turn["content"]) == 1 and turn["content"][0]["type"] == "text":
            turn["content"] = turn["content"][0]["text"]
    asked: Body = {"max_tokens": options.get("max_tokens", 8192)}
    if told:
        asked["system"] = "\n\n".join(told)
    if tools:
        asked["tools"] = []
        for one in tools:
            made = {**one["function"], "input_schema": one["function"].get("parameters", {"type": "object", "properties": {}})}
            made.pop("parameters", None)
            asked["tools"].append(made)
    choice = options.get("tool_choice", "auto")
    if choice != "auto" or "parallel_tool_calls" in options:
        name = None if isinstance(choice, str) else choice["function"]["name"]
        asked["tool_choice"] = {"type": {"required": "any"}.get(choice, choice)} if name is None else {
            "type": "tool", "name": name}  # fmt: skip
        if "parallel_tool_calls" in options:
            asked["tool_choice"]["disable_parallel_tool_use"] = not options["parallel_tool_calls"]
    if "stop" in options:
        asked["stop_sequences"] = options["stop"]
    if "user" in options:
        asked["metadata"] = {"user_id": options["user"]}
    output: Body = {}
    if "response_format" in options:
        output["format"] = {"type": "json_schema", "schema": options["response_format"]["json_schema"]["schema"]}
    if "reasoning_effort" in options:
        output["effort"] = options["reasoning_effort"]
    if output:
        asked["output_config"] = output
    sampling = {name: options[name] for name in ("temperature", "top_p") if name in options}
    if sampling:  # the version of 2023 still knows them; the client of today does not
        asked |= {"extra_body": sampling, "extra_headers": {"anthropic-version": "2023-06-01"}}
    if streaming:
        asked["stream"] = True
    with anthropic.Anthropic(api_key=KEY, base_url=url, max_retries=0) as client:
        answer = client.messages.create(model="m", messages=turns, **asked)
        assert list(answer) if streaming else answer.content[0].text == "Hello, world"


def ask_gemini(url: str, messages: list[Body], tools: list[Body], options: Body, streaming: bool) -> None:
    t = gemini_types
    told: list[str] = []
    turns: list[Any] = []
    names = names_of(messages)
    for message in messages:
        role = {"assistant": "model"}.get(message["role"], "user")
        if message["role"] == "system":
            told.append(message["content"])
            continue
        if message["role"] == "tool":
            is_object = message["content"].startswith("{")
            response = json.loads(message["content"]) if is_object else {"output": message["content"]}
            parts = [t.Part.from_function_response(name=names[message["tool_call_id"]], response=response)]
        else:
            parts = [
                t.Part.from_text(text=data) if kind == "text"
                else t.Part.from_bytes(data=base64.b64decode(data), mime_type=media)
                for kind, media, data in pieces(message["content"])
            ]  # fmt: skip
        parts += [t.Part.from_function_call(name=name, args=arguments) for _, name, arguments in calls_of(message)]
        if turns and turns[-1].role == role:
            turns[-1].parts += parts
        else:
            turns.append(t.Content(role=role, parts=parts))
    asked: Body = {name: options[name] for name in ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty")
                   if name in options}  # fmt: skip
    if told:
        asked["system_instruction"] = "\n\n".join(told)
    if tools:
        declared = [t.FunctionDeclaration(name=f["name"], description=f["description"],
                                          parameters_json_schema=f.get("parameters"))
                    for f in (one["function"] for one in tools)]  # fmt: skip
        asked["tools"] = [t.Tool(function_declarations=declared)]
    if "tool_choice" in options:
        choice = options["tool_choice"]
        mode = {"auto": "AUTO", "none": "NONE", "required": "ANY"}.get(choice, "ANY") if isinstance(choice, str) else "ANY"
        only = None if isinstance(choice, str) else [choice["function"]["name"]]
        config = t.FunctionCallingConfig(mode=mode, allowed_function_names=only)
        asked["tool_config"] = t.ToolConfig(function_calling_config=config)
    if "max_tokens" in options:
        asked["max_output_tokens"] = options["max_tokens"]
    if "stop" in options:
        asked["stop_sequences"] = options["stop"]
    if "response_format" in options:
        asked["response_mime_type"] = "application/json"
        if "json_schema" in options["response_format"]:
            asked["response_json_schema"] = options["response_format"]["json_schema"]["schema"]
    if "reasoning_effort" in options:
        level = options["reasoning_effort"].upper()
        asked["thinking_config"] = t.ThinkingConfig(thinking_level=level, include_thoughts=True)
    asked["automatic_function_calling"] = t.AutomaticFunctionCallingConfig(disable=True)
    client = genai.Client(api_key=KEY, http_options=t.HttpOptions(base_url=url, api_version="v1beta"))
    try:
        if streaming:
            assert list(client.models.generate_content_stream(
                model="m", contents=turns, config=t.GenerateContentConfig(**asked)))  # fmt: skip
        else:
            answer = client.models.generate_content(model="m", contents=turns, config=t.GenerateContentConfig(**asked))
            assert answer.text == "Hello, world"
    finally:
        client.close()


def ask_ollama(url: str, messages: list[Body], tools: list[Body], options: Body, streaming: bool) -> None:
    names = names_of(messages)
    told: list[Body] = []
    for message in messages:
        found = list(pieces(message["content"]))
        one: Body = {"role": message["role"], "content": "\n".join(data for kind, _, data in found if kind == "text")}
        if images := [base64.b64decode(data) for kind, _, data in found if kind == "data"]:
            one["images"] = images
        if message["role"] == "tool":
            one["tool_name"] = names[message["tool_call_id"]]
        if calls := calls_of(message):
            one["tool_calls"] = [{"function": {"name": name, "arguments": arguments}} for _, name, arguments in calls]
        told.append(one)
    asked: Body = {}
    own = {name: options[name] for name in ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "stop")
           if name in options}  # fmt: skip
    if "max_tokens" in options:
        own["num_predict"] = options["max_tokens"]
    if own:
        asked["options"] = own
    if tools and options.get("tool_choice") != "none":  # the only way to say none
        asked["tools"] = tools
    if "response_format" in options:
        form = options["response_format"]
        asked["format"] = form["json_schema"]["schema"] if "json_schema" in form else "json"
    if "reasoning_effort" in options:
        asked["think"] = options["reasoning_effort"]
    client = ollama.Client(host=url)
    try:
        answer = client.chat(model="m", messages=told, stream=streaming, **asked)
        assert list(answer) if streaming else answer.message.content == "Hello, world"
    finally:
        client._client.close()


# -- the differences that are allowed -----------------------------------------------------------------------------------


def everywhere(value: Any, change: Callable[[Body], Body]) -> Any:
    """JSON with every object in it changed, the inner ones first."""
    if isinstance(value, list):
        return [everywhere(item, change) for item in value]
    if isinstance(value, dict):
        return change({name: everywhere(item, change) for name, item in value.items()})
    return value


def normal_chat(body: Body) -> Body:
    """None: the client passes messages and tools on as they are, and so must we. Arguments are compared as JSON."""

    def change(one: Body) -> Body:
        return {**one, "arguments": json.loads(one["arguments"])} if isinstance(one.get("arguments"), str) else one

    return everywhere(body, change)


def normal_responses(body: Body) -> Body:
    """The API documents a text as short for one ``input_text`` part. Arguments are compared as JSON."""

    def change(one: Body) -> Body:
        if isinstance(one.get("arguments"), str):
            one = {**one, "arguments": json.loads(one["arguments"])}
        if one.get("role") in ("user", "system") and isinstance(one.get("content"), str):
            one = {**one, "content": [{"type": "input_text", "text": one["content"]}]}
        return one

    return everywhere(body, change)


def normal_anthropic(body: Body) -> Body:
    """The API documents a text as short for one text block, in a message and in a tool's result."""

    def change(one: Body) -> Body:
        if ("role" in one or one.get("type") == "tool_result") and isinstance(one["content"], str):
            one = {**one, "content": [{"type": "text", "text": one["content"]}]}
        return one

    return everywhere(body, change)


def normal_gemini(body: Body) -> Body:
    """Names in either case and either base64 alphabet are the same to protobuf. The client gives the system instruction a
    role, which means nothing there, and sends an empty configuration. The first call of a turn that another model made
    carries Google's documented stand-in for a signature, which the client leaves to its user."""

    def change(one: Body) -> Body:
        one = {"".join([name.split("_")[0], *(word.capitalize() for word in name.split("_")[1:])]): item
               for name, item in one.items()}  # fmt: skip
        if "mimeType" in one and "data" in one:
            one["data"] = base64.urlsafe_b64decode(one["data"].replace("+", "-").replace("/", "_"))
        if one.get("thoughtSignature") == "skip_thought_signature_validator":
            assert "functionCall" in one
            del one["thoughtSignature"]
        return one

    body = everywhere(body, change)
    body.get("systemInstruction", {}).pop("role", None)
    return {name: value for name, value in body.items() if (name, value) != ("generationConfig", {})}


def normal_ollama(body: Body) -> Body:
    """The server knows ``truncate``, ``shift`` and the ids of calls, the client's types do not yet: the first two keep it
    from dropping the beginning of a conversation without a word, the ids tell several results apart. The types also lose
    ``strict`` and ``additionalProperties`` of a tool, and the empty text that the server's templates want. The client
    sends an empty list of tools."""
    body = copy.deepcopy(body)
    if "truncate" in body:
        assert (body.pop("truncate"), body.pop("shift")) == (False, False)
    for message in body["messages"]:
        message.pop("tool_call_id", None)
        if message.get("content") == "":
            del message["content"]
        for call in message.get("tool_calls", ()):
            call.pop("id", None)
    if body.get("tools") == []:
        del body["tools"]
    for one in body.get("tools", ()):
        one["function"].pop("strict", None)
        one["function"].get("parameters", {}).pop("additionalProperties", None)
    return body


# -- the vendors' request types, with nothing extra allowed ---------------------------------------------------------------


def forbid_extra(kind: Any, seen: set[int]) -> None:
    """Makes pydantic refuse unknown fields in a TypedDict and in all that it is made of, also an answer's own blocks, which
    may be sent back."""
    if id(kind) in seen:
        return
    seen.add(id(kind))
    if typing_extensions.is_typeddict(kind):
        kind.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
        for hint in typing_extensions.get_type_hints(kind, include_extras=True).values():
            forbid_extra(hint, seen)
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        for field in kind.model_fields.values():
            forbid_extra(field.annotation, seen)
        kind.model_config["extra"] = "forbid"
        kind.model_rebuild(force=True)
    for argument in typing_extensions.get_args(kind):
        forbid_extra(argument, seen)


@cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    forbid_extra(kind, set())
    return TypeAdapter(kind)


def exhaust(value: Any) -> None:
    """pydantic checks the items of an Iterable when they are taken."""
    for item in value.values() if isinstance(value, dict) else () if isinstance(value, (str, bytes)) else value:
        if hasattr(item, "__iter__"):
            exhaust(item)


def valid_chat(body: Body) -> None:
    streaming, plain = chat_params.CompletionCreateParamsStreaming, chat_params.CompletionCreateParamsNonStreaming
    exhaust(adapter(streaming if body.get("stream") else plain).validate_python(body))


def valid_responses(body: Body) -> None:
    streaming, plain = responses_params.ResponseCreateParamsStreaming, responses_params.ResponseCreateParamsNonStreaming
    exhaust(adapter(streaming if body.get("stream") else plain).validate_python(body))


def valid_anthropic(body: Body) -> None:
    """Without temperature and top_p: the version of 2023 has them, and today's types are those of a later one."""
    body = {name: item for name, item in body.items() if name not in ("temperature", "top_p")}
    kind = MessageCreateParamsStreaming if body.get("stream") else MessageCreateParamsNonStreaming
    exhaust(adapter(kind).validate_python(body))


def valid_gemini(body: Body) -> None:
    """The body as a whole has no type of its own in the package; its parts have, and they forbid unknown fields themselves."""
    t = gemini_types
    kinds = {"contents": list[t.Content], "systemInstruction": t.Content, "tools": list[t.Tool], "toolConfig": t.ToolConfig,
             "generationConfig": t.GenerationConfig}  # fmt: skip
    for name, value in body.items():
        if name not in kinds:
            raise KeyError(name)
        TypeAdapter(kinds[name]).validate_json(json.dumps(value))


def valid_ollama(body: Body) -> None:
    """The package's types drop what they do not know instead of refusing it: nothing may be lost on the way through."""
    body = normal_ollama(body)
    messages = [
        ollama_types.Message(**{**message, "images": [ollama_types.Image(value=each) for each in message.get("images", ())]})
        for message in body["messages"]
    ]
    for message in messages:
        message.images = message.images or None
    kept = ollama_types.ChatRequest(**{**body, "messages": messages})
    told = json.loads(kept.model_dump_json(exclude_none=True))
    ollama_types.Options(**body.get("options", {}))
    unknown = set(body.get("options", {})) - set(ollama_types.Options.model_fields)
    if told != body or unknown:
        raise KeyError(sorted(unknown) or "a field was lost")


class Vendor:
    def __init__(self, dialect: Dialect, ask: Callable[..., None], normal: Callable[[Body], Body],
                 valid: Callable[[Body], None], *without: str) -> None:  # fmt: skip
        self.dialect, self.ask, self.normalised, self.validate = dialect, ask, normal, valid
        self.without = without  #: conversations that this vendor cannot be told, or not by these means

    def sent(self, told: tuple[list[Body], list[Body], Body], streaming: bool) -> Body:
        """What the provider sends."""
        messages, tools, options = copy.deepcopy(told)
        with Peer(answers(self.dialect, lambda _: Answer())) as server:
            client = self.dialect.make(f"http://127.0.0.1:{server.port}", KEY, stream_upstream=streaming)
            client._at_openai = True  # or a server on this machine is spoken to as a local model's
            try:
                assert client.chat(messages, tools=tools or None, model="m", timeout=10, **options).text == "Hello, world"
            finally:
                client.close()
            (request,) = server.requests
        return parsed(request)[2]

    def sent_by_its_client(self, told: tuple[list[Body], list[Body], Body], streaming: bool) -> Body:
        with Peer(answers(self.dialect, lambda _: Answer())) as server:
            self.ask(f"http://127.0.0.1:{server.port}", *copy.deepcopy(told), streaming)
            (request,) = server.requests
        return parsed(request)[2]

    def __repr__(self) -> str:
        return self.dialect.name


VENDORS = (
    Vendor(Chat(), ask_chat, normal_chat, valid_chat),
    # stop words are refused: the Responses API has none; it has neither seed nor penalties, which are hints
    Vendor(Responses(), ask_responses, normal_responses, valid_responses, "a stop word"),
    # a JSON object without a schema is asked for in words, which are nobody's standard
    Vendor(Anthropic(), ask_anthropic, normal_anthropic, valid_anthropic, "a JSON object"),
    # neither fetches images
    Vendor(Gemini(), ask_gemini, normal_gemini, valid_gemini, "a remote image"),
    # no forced tool calls
    Vendor(Ollama(), ask_ollama, normal_ollama, valid_ollama, "a remote image", "tool choice required", "tool choice by name"),
)
CASES = [pytest.param(vendor, name, id=f"{vendor}-{name}") for vendor in VENDORS for name in CONVERSATIONS
         if name not in vendor.without]  # fmt: skip


@pytest.mark.parametrize("streaming", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize(("vendor", "name"), CASES)
def test_the_body_is_what_the_vendors_client_sends(vendor: Vendor, name: str, streaming: bool) -> None:
    """Equal in meaning, down to the last field."""
    ours, theirs = (send(CONVERSATIONS[name], streaming) for send in (vendor.sent, vendor.sent_by_its_client))
    assert vendor.normalised(ours) == vendor.normalised(theirs)


@pytest.mark.parametrize(("vendor", "name"), CASES)
def test_the_body_is_of_the_vendors_own_type(vendor: Vendor, name: str) -> None:
    """It validates with unknown fields forbidden, streamed and whole."""
    for streaming in (True, False):
        vendor.validate(vendor.sent(CONVERSATIONS[name], streaming))


# -- a tool loop with thinking in it, as each client's documentation writes it -------------------------------------------

THOUGHT = Answer(text=("Look.",), reasoning=("Two ", "cities."), finish="tool_calls",
                 calls=(("weather", {"city": "Oslo"}), ("weather", {"city": "Rømø"})))  # fmt: skip
RESULTS = ("4 degrees", "5 degrees")


def loop_chat(url: str) -> None:
    with openai.OpenAI(api_key=KEY, base_url=url + "/v1", max_retries=0) as client:
        messages: list[Any] = list(HI)
        message = client.chat.completions.create(model="m", messages=messages, tools=[WEATHER]).choices[0].message
        messages.append(message)
        messages += [result(call.id, words) for call, words in zip(message.tool_calls, RESULTS, strict=True)]
        client.chat.completions.create(model="m", messages=messages, tools=[WEATHER])


def loop_responses(url: str) -> None:
    asked: Body = {"model": "m", "store": False, "include": ["reasoning.encrypted_content"],
                   "tools": [{"type": "function", **WEATHER["function"], "strict": False}]}  # fmt: skip
    with openai.OpenAI(api_key=KEY, base_url=url + "/v1", max_retries=0) as client:
        items: list[Any] = list(HI)
        output = client.responses.create(input=items, **asked).output
        items += output
        calls = [item for item in output if item.type == "function_call"]
        items += [{"type": "function_call_output", "call_id": call.call_id, "output": words}
                  for call, words in zip(calls, RESULTS, strict=True)]  # fmt: skip
        client.responses.create(input=items, **asked)


def loop_anthropic(url: str) -> None:
    function = WEATHER["function"]
    made = {"name": function["name"], "description": function["description"], "input_schema": function["parameters"]}
    asked: Body = {"model": "m", "max_tokens": 8192, "tools": [made]}
    with anthropic.Anthropic(api_key=KEY, base_url=url, max_retries=0) as client:
        messages: list[Any] = list(HI)
        content = client.messages.create(messages=messages, **asked).content
        messages.append({"role": "assistant", "content": content})
        calls = [block for block in content if block.type == "tool_use"]
        messages.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": words}
                                                     for call, words in zip(calls, RESULTS, strict=True)]})  # fmt: skip
        client.messages.create(messages=messages, **asked)


def loop_gemini(url: str) -> None:
    t = gemini_types
    function = WEATHER["function"]
    declared = t.FunctionDeclaration(name=function["name"], description=function["description"],
                                     parameters_json_schema=function["parameters"])  # fmt: skip
    config = t.GenerateContentConfig(tools=[t.Tool(function_declarations=[declared])],
                                     automatic_function_calling=t.AutomaticFunctionCallingConfig(disable=True))  # fmt: skip
    client = genai.Client(api_key=KEY, http_options=t.HttpOptions(base_url=url, api_version="v1beta"))
    try:
        turns: list[Any] = [t.Content(role="user", parts=[t.Part.from_text(text=HI[0]["content"])])]
        content = client.models.generate_content(model="m", contents=turns, config=config).candidates[0].content
        calls = [part.function_call for part in content.parts if part.function_call]
        answered = [t.Part(function_response=t.FunctionResponse(id=call.id, name=call.name, response={"output": words}))
                    for call, words in zip(calls, RESULTS, strict=True)]  # fmt: skip
        turns += [content, t.Content(role="user", parts=answered)]
        client.models.generate_content(model="m", contents=turns, config=config)
    finally:
        client.close()


def loop_ollama(url: str) -> None:
    client = ollama.Client(host=url)
    try:
        messages: list[Any] = list(HI)
        message = client.chat(model="m", messages=messages, tools=[WEATHER]).message
        messages.append(message)
        messages += [{"role": "tool", "content": words, "tool_name": call.function.name}
                     for call, words in zip(message.tool_calls, RESULTS, strict=True)]  # fmt: skip
        client.chat(model="m", messages=messages, tools=[WEATHER])
    finally:
        client._client.close()


def without_thoughts(body: Body) -> Body:
    """The clients send back what nobody needs: null fields, Gemini's summaries of thoughts, Ollama's thinking. The
    signatures, and Anthropic's and OpenAI's own blocks, are what counts."""

    def change(one: Body) -> Body:
        if one.get("type") != "thinking":
            one = {name: item for name, item in one.items() if item is not None and name != "thinking"}
        if isinstance(one.get("parts"), list):
            one["parts"] = [part for part in one["parts"] if not part.get("thought")]
        return one

    return everywhere(body, change)


LOOPS = dict(zip(VENDORS, (loop_chat, loop_responses, loop_anthropic, loop_gemini, loop_ollama), strict=True))


@pytest.mark.parametrize("streaming", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("vendor", VENDORS, ids=repr)
def test_a_tool_loop_carries_back_what_the_vendors_client_does(vendor: Vendor, streaming: bool) -> None:
    """Thinking, signatures and calls of the first answer stand in the second request as in the client's own loop."""
    answer = replace(THOUGHT, reasoning=()) if vendor.dialect.name == "chat" else THOUGHT
    script = iter([answer, Answer(), answer, Answer()])
    with Peer(answers(vendor.dialect, lambda _: next(script))) as server:
        client = vendor.dialect.make(f"http://127.0.0.1:{server.port}", KEY, stream_upstream=streaming)
        client._at_openai = True
        first = client.chat(HI, tools=[WEATHER], model="m", timeout=10)
        results = [result(call.id, words) for call, words in zip(first.tool_calls, RESULTS, strict=True)]
        client.chat([*HI, first.message, *results], tools=[WEATHER], model="m", timeout=10)
        client.close()
        LOOPS[vendor](f"http://127.0.0.1:{server.port}")
        ours, theirs = (parsed(request)[2] for request in server.requests[1::2])
    vendor.validate(ours)
    for name in ("stream", "stream_options"):
        ours.pop(name, None), theirs.pop(name, None)
    ours, theirs = (without_thoughts(vendor.normalised(body)) for body in (ours, theirs))
    assert ours == theirs
    if vendor.dialect.name in ("responses", "anthropic", "gemini"):
        seal = "c2VhbGVk" if vendor.dialect.name == "responses" else "c2lnbmVk"
        assert json.dumps(ours).count(seal) == 1


#: Below these names anything may stand.
FREE = ("input_schema", "parameters", "parametersJsonSchema", "schema", "responseJsonSchema", "args", "arguments", "input",
        "response")


def objects(value: Any) -> Iterator[Body]:
    """Every object that has a type, from the outside in."""
    if isinstance(value, dict):
        yield value
        for name, item in value.items():
            is_schema = name == "format" and "properties" in item  # Ollama's
            if (name not in FREE and not is_schema) or (name == "input" and isinstance(item, list)):
                yield from objects(item)
    elif isinstance(value, list):
        for item in value:
            yield from objects(item)


@pytest.mark.parametrize("vendor", VENDORS, ids=repr)
def test_the_types_refuse_a_field_too_many(vendor: Vendor) -> None:
    """An unknown field, planted in every object of a rich body in turn, is refused each time: the checks above can fail."""
    body = vendor.sent(CONVERSATIONS["nearly everything"], True)
    vendor.validate(body)
    total = len(list(objects(body)))
    assert total > 10
    for at in range(total):
        planted = copy.deepcopy(body)
        list(objects(planted))[at]["x_unknown"] = 1
        with pytest.raises((ValidationError, KeyError)):
            vendor.validate(planted)


@pytest.mark.parametrize("vendor", VENDORS, ids=repr)
def test_the_comparison_notices_a_difference(vendor: Vendor) -> None:
    """A body that differs in any one value, or lacks any one field, is not equal: nothing is normalised away by mistake."""
    body = vendor.sent(CONVERSATIONS["nearly everything"], True)
    for at, one in enumerate(objects(body)):
        for name in one:
            if name in ("truncate", "shift", "id", "tool_call_id") and vendor.dialect.name == "ollama":
                continue  # allowed to differ, see there
            changed = copy.deepcopy(body)
            del list(objects(changed))[at][name]
            try:
                same = vendor.normalised(changed) == vendor.normalised(body)
            except (KeyError, AssertionError):
                same = False
            assert not same or name == "thoughtSignature", name
