"""Fake vendors on loopback that enforce the vendors' own rules, so that no encoder passes by luck.

Each answers a violation with its vendor's own status and error body, and a legal request with the
next item of its script (a ``Reply``, the bytes of an answer, or a function of the body that returns
one), streamed where the request asks for a stream. Tool ids and signatures that it has
given out it takes back only unchanged.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import requests
from requests.adapters import HTTPAdapter
from support import dialects
from support.dialects import Answer
from support.server import Request, Server, parsed, reply

from copilot_router import (AnthropicProvider, GeminiProvider, OllamaProvider, OpenAIProvider,
    Usage)

KEY = "sk-test-vendors-key-1234567890"


@dataclass
class Reply:
    """What the model says; each vendor puts it into its own form."""
    text: str = ""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    thinking: str = ""


@dataclass(eq=False)
class Refused(Exception):
    """A broken rule: the status and the body to answer."""
    status: int
    body: Any


def halves(text: str) -> list[str]:
    middle = (len(text) + 1) // 2
    return [piece for piece in (text[:middle], text[middle:]) if piece]


def digest(*things: Any) -> str:
    text = json.dumps(things, sort_keys=True)
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


class Own:
    """Answers with the vendor's own ids and signatures, in the name of the model that was asked."""
    def __init__(self, vendor: Vendor, request: Request) -> None:
        in_path = request.path.partition("/models/")[2].partition(":")[0]
        self.vendor, self.request = vendor, request
        self.model = in_path or request.body.get("model", "m-1")
        self._ids: list[str] = []

    def ids(self, answer: Answer) -> list[str]:
        while len(self._ids) < len(answer.calls):
            self._ids.append(self.vendor.new_id())
        return self._ids


# -- shapes of a body: a dict for an object ("name!" is required), a list for a list, a frozenset
# of values, a pattern, types, or a function
Check = Callable[["Vendor", Any, str], None]
NUMBER = (int, float)


def either(*specs: Any) -> Check:
    """One of several shapes; the complaint is of the last."""
    def check(vendor: Vendor, value: Any, where: str) -> None:
        for spec in specs[:-1]:
            with suppress(Refused):
                return vendor.match(value, spec, where)
        return vendor.match(value, specs[-1], where)
    return check


def tagged(key: str, shapes: dict[str, Any]) -> Check:
    """An object whose shape depends on one of its values."""
    def check(vendor: Vendor, value: Any, where: str) -> None:
        if not isinstance(value, dict) or value.get(key) not in shapes:
            vendor.wrong(where, f"an object with {key} one of {', '.join(shapes)}")
        vendor.match(value, {f"{key}!": str, **shapes[value[key]]}, where)
    return check


def between(least: float, most: float, kinds: Any = NUMBER) -> Check:
    def check(vendor: Vendor, value: Any, where: str) -> None:
        vendor.match(value, kinds, where)
        if not least <= value <= most:
            vendor.wrong(where, f"between {least} and {most}")
    return check


def encoded(vendor: Vendor, value: Any, where: str) -> None:
    """Base64, neither empty nor with a ``data:`` prefix."""
    try:
        if base64.b64decode(value, validate=True):
            return
    except (binascii.Error, TypeError, ValueError):
        pass
    vendor.wrong(where, "base64")


def address(vendor: Vendor, value: Any, where: str) -> None:
    """A web address, or a data URL of an image."""
    vendor.match(value, str, where)
    if value.startswith("data:"):
        head, _, data = value.partition(";base64,")
        if not re.fullmatch(r"data:(image/(png|jpeg|gif|webp)|application/pdf|text/plain)", head):
            vendor.wrong(where, "a data URL of png, jpeg, gif or webp")
        encoded(vendor, data, where)
    elif not re.fullmatch(r"https?://\S+", value):
        vendor.wrong(where, "a URL")


def written(vendor: Vendor, value: Any, where: str) -> None:
    vendor.match(value, str, where)
    if not value.strip():
        vendor.fail(f"{where}: text content blocks must contain non-whitespace text")


def schema(vendor: Vendor, value: Any, where: str) -> None:
    vendor.match(value, dict, where)
    if value.get("type") != "object":
        vendor.wrong(f"{where}.type", "'object'")


TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class Vendor(Server):
    """A fake of one vendor. ``url`` is the base URL for a provider."""
    base = ""
    prefix = ""  #: of the ids it issues
    answers_of: ClassVar[Any]  #: the format of its answers

    def __init__(self, *script: Any, models: tuple[str, ...] = ("m-1", "m-2")) -> None:
        self.script, self.models = deque(script), models
        self.refusals: list[Refused] = []
        self.issued: dict[str, Any] = {}
        super().__init__(self._told)
        self.root = self.url
        self.url += self.base

    def new_id(self) -> str:
        self._count = getattr(self, "_count", 0) + 1
        return f"{self.prefix}{self.port}_{self._count}"

    # -- the rules' vocabulary
    def error(self, message: str, status: int, **more: Any) -> Any:
        raise NotImplementedError

    def fail(self, message: str, status: int = 400, **more: Any) -> NoReturn:
        raise Refused(status, self.error(message, status, **more))

    def forbid(self, broken: Any, message: str, status: int = 400, **more: Any) -> None:
        if broken:
            self.fail(message, status, **more)

    def unknown(self, where: str) -> NoReturn:
        self.fail(f"Unknown parameter: '{where}'.")

    def wrong(self, where: str, wanted: str) -> NoReturn:
        self.fail(f"Invalid value for '{where}': expected {wanted}.")

    def match(self, value: Any, spec: Any, where: str = "") -> None:
        good = True
        if isinstance(spec, dict):
            self._match_object(value, spec, where)
        elif isinstance(spec, list):
            good = isinstance(value, list)
            for at, item in enumerate(value if good else ()):
                self.match(item, spec[0], f"{where}[{at}]")
        elif isinstance(spec, frozenset):
            good = isinstance(value, (str, bool)) and value in spec
        elif isinstance(spec, re.Pattern):
            good = isinstance(value, str) and bool(spec.fullmatch(value))
        elif isinstance(spec, (type, tuple)):
            kinds = spec if isinstance(spec, tuple) else (spec,)
            good = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
        else:
            spec(self, value, where)
        if not good:
            self.wrong(where, str(spec))

    def _match_object(self, value: Any, spec: dict[str, Any], where: str) -> None:
        if not isinstance(value, dict):
            self.wrong(where or "the body", "an object")
        inside = f"{where}." if where else ""
        for name in spec:
            if name.endswith("!") and name[:-1] not in value:
                self.fail(f"Missing required parameter: '{inside}{name[:-1]}'.")
        names = {name.rstrip("!"): inner for name, inner in spec.items()}
        for name, item in value.items():
            if name not in names:
                self.unknown(inside + name)
            self.match(item, names[name], inside + name)

    def unique(self, names: list[str], where: str) -> None:
        self.forbid(len(set(names)) != len(names), f"{where}: names and ids must be unique")

    # -- a vendor's own part
    def check(self, request: Request) -> None:
        raise NotImplementedError

    def streams(self, request: Request) -> bool:
        return bool(request.body.get("stream"))

    def own(self, request: Request) -> Any:
        return self.answers_of(self, request)

    # -- serving
    def answer(self, request: Request) -> bytes:
        try:
            self.check(request)
        except Refused as refused:
            self.refusals.append(refused)
            return reply(refused.body, refused.status)
        item = self.script.popleft() if self.script else Reply("ok")
        item = item(request.body) if callable(item) else item
        if isinstance(item, bytes):
            return item
        finish = "tool_calls" if item.calls else "stop"
        answer = Answer(tuple(halves(item.text)), tuple(halves(item.thinking)), tuple(item.calls),
                        finish, Usage(20, 15, 4, 0, 6))
        own = self.own(request)
        if not self.streams(request):
            return reply(own.body(answer))
        return reply(b"".join(own.events(answer)), kind=own.stream_kind)

    def _told(self, _: Server, connection: Any, request: bytes) -> bool:
        connection.sendall(self.answer(parsed(request)))
        return True


class _Detour(HTTPAdapter):
    """Every address leads to the fake whose ``root`` this is."""
    root = ""

    def send(self, request: Any, *args: Any, **settings: Any) -> Any:
        request.url = self.root + "/" + request.url.split("/", 3)[3]
        return super().send(request, *args, **settings)


# ==== OpenAI Chat Completions
EFFORTS = frozenset({"none", "minimal", "low", "medium", "high", "xhigh", "max"})
UNANSWERED = "An assistant message with 'tool_calls' must be followed by tool messages."
CHAT_CALL = {"id!": re.compile(r".{1,40}", re.DOTALL), "type!": frozenset({"function"}),
             "function!": {"name!": TOOL_NAME, "arguments!": str}}


class Chat(Vendor):
    """Chat Completions. ``thinking``: reasoning_content has to come back, as at DeepSeek."""
    base = "/v1"
    prefix = "call_"
    answers_of = type("ChatAnswers", (Own, dialects.Chat), {})

    def __init__(self, *script: Any, thinking: bool = False, **settings: Any) -> None:
        super().__init__(*script, **settings)
        self.needs_reasoning = thinking

    def error(self, message: str, status: int, code: Any = None, param: Any = None,
              **_: Any) -> Any:
        return {"error": {"message": message, "type": "invalid_request_error", "param": param,
                          "code": code}}

    def check_access(self, request: Request, path: str) -> Any:
        self.forbid(request.path != path, f"Invalid URL (POST {request.path})", 404)
        if request.headers.get("authorization") != f"Bearer {KEY}":
            self.fail("Incorrect API key provided", 401, code="invalid_api_key")
        known = request.body.get("model", "m-1") in self.models
        self.forbid(not known, "The model `x` does not exist or you do not have access to it.", 404)
        return request.body

    def chat_shape(self) -> dict[str, Any]:
        content = either(str, [tagged("type", {"text": {"text!": str}})])
        parts = tagged("type", {"text": {"text!": str}, "image_url": {
                "image_url!": {"url!": address, "detail": frozenset({"auto", "low", "high"})}},
            "file": {"file!": {"filename!": str, "file_data!": str}}, "input_audio": {
                "input_audio!": {"data!": encoded, "format!": frozenset({"wav", "mp3"})}}})
        said = {"name": str, "content!": content}
        roles: dict[str, Any] = {"system": said, "developer": said,
            "user": {"name": str, "content!": either(str, [parts])},
            "assistant": {"name": str, "content": either(content, type(None)),
                "tool_calls": [CHAT_CALL]}, "tool": {"tool_call_id!": str, "content!": content}}
        if self.needs_reasoning:
            roles["assistant"]["reasoning_content"] = str
        named = {"type!": frozenset({"function"}), "function!": {"name!": TOOL_NAME}}
        json_schema = {"name!": TOOL_NAME, "schema!": dict, "strict": bool, "description": str}
        return {"model!": str, "messages!": [tagged("role", roles)],
            "tools": [{"type!": frozenset({"function"}),
                "function!": {"name!": TOOL_NAME, "description": str, "parameters": dict,
                    "strict": bool}}],
            "tool_choice": either(frozenset({"none", "auto", "required"}), named),
            "parallel_tool_calls": bool, "temperature": between(0, 2), "top_p": between(0, 1),
            "seed": int, "presence_penalty": between(-2, 2),
            "frequency_penalty": between(-2, 2), "user": str, "stop": either(str, [str]),
            "reasoning_effort": EFFORTS, "stream": bool, "stream_options": {"include_usage": bool},
            "response_format": tagged("type",
                {"text": {}, "json_object": {}, "json_schema": {"json_schema!": json_schema}}),
            "max_completion_tokens": between(1, 10**6, int)}

    def check(self, request: Request) -> None:
        body = self.check_access(request, "/v1/chat/completions")
        self.match(body, self.chat_shape())
        self.forbid(not body["messages"], "Invalid 'messages': empty array.")
        self.check_messages(body["messages"])
        self.check_tools(body, [tool["function"]["name"] for tool in body.get("tools", ())])
        self.check_tools_of_reasoners(body)
        if body.get("stream_options") and not body.get("stream"):
            self.fail("The 'stream_options' is for streams only")
        if isinstance(body.get("stop"), list) and not 0 < len(body["stop"]) <= 4:
            self.wrong("stop", "one to four texts")
        format_ = body.get("response_format", {}).get("type")
        if format_ == "json_object" and "json" not in str(body["messages"]).lower():
            self.fail("'messages' must contain the word 'json' in some form.")

    def check_tools(self, body: Any, names: list[str]) -> None:
        self.unique(names, "tools")
        self.forbid(body.get("tools") == [], "[] is too short - 'tools'")
        for name in ("tool_choice", "parallel_tool_calls"):
            self.forbid(name in body and not names, f"'{name}' is only allowed with 'tools'.")
        choice = body.get("tool_choice")
        if isinstance(choice, dict) and choice.get("function", choice)["name"] not in names:
            self.fail("Tool choice 'function' not found in 'tools' parameter.", param="tool_choice")

    def check_tools_of_reasoners(self, body: Any) -> None:
        model, effort = body["model"], body.get("reasoning_effort")
        text = (f"Function tools with reasoning_effort are not supported for {model} in "
                "/v1/chat/completions. To use function tools, use /v1/responses")
        if "tools" in body and model == "gpt-6-astra":
            self.fail(text + ".", param="reasoning_effort")
        if "tools" in body and model == "gpt-6-sol" and effort != "none":
            self.fail(text + " or set reasoning_effort to 'none'.", param="reasoning_effort")

    def check_messages(self, messages: list[Any]) -> None:
        open_ids: list[str] = []
        seen: list[str] = []
        for at, message in enumerate(messages):
            if message["role"] == "tool":
                self.forbid(message["tool_call_id"] not in open_ids, "a result without its call")
                open_ids.remove(message["tool_call_id"])
                continue
            self.forbid(open_ids, UNANSWERED)
            calls = message.get("tool_calls")
            if calls == [] or (message["role"] == "assistant" and message.get("content") is None
                               and not calls):
                self.wrong(f"messages[{at}].content", "a text where there are no tool calls")
            open_ids = [call["id"] for call in calls or ()]
            seen += open_ids
            thinks = self.needs_reasoning and message["role"] == "assistant"
            if thinks and not message.get("reasoning_content"):
                self.fail("The reasoning_content in the thinking mode must be passed back.")
        self.forbid(open_ids, UNANSWERED)
        self.unique(seen, "messages.tool_calls.id")


# ==== OpenAI Responses
class Responses(Chat):
    """The Responses API, and behind it Chat Completions as any OpenAI account has them."""
    def shape(self) -> dict[str, Any]:
        said = [tagged("type", {"input_text": {"text!": str},
            "input_image": {"image_url!": address, "detail!": frozenset({"auto", "low", "high"})},
            "input_file": {"filename!": str, "file_data!": str}})]
        spoken = [tagged("type", {"output_text": {"text!": str, "annotations": list}})]
        call_id = re.compile(r".{1,64}", re.DOTALL)
        plain = {"content!": either(str, said), "type": frozenset({"message"})}
        own = {"content!": either(str, spoken), "type": frozenset({"message"}), "id": str,
               "status": str}
        message = tagged("role", {"user": plain, "system": plain, "developer": plain,
                                  "assistant": own})
        item = tagged("type", {"function_call": {"call_id!": call_id, "name!": TOOL_NAME,
            "arguments!": str, "id": str, "status": str},
            "function_call_output": {"call_id!": call_id, "output!": either(str, said)},
            "reasoning": {"id!": str, "summary!": list, "encrypted_content!": str}})
        def items(vendor: Vendor, value: Any, where: str) -> None:
            own = isinstance(value, dict) and value.get("type", "message") != "message"
            vendor.match(value, item if own else message, where)
        named = {"type!": frozenset({"function"}), "name!": TOOL_NAME}
        return {"model!": str, "input!": either(str, [items]), "instructions": str, "store": bool,
            "include": [str], "tools": [{"type!": frozenset({"function"}), "name!": TOOL_NAME,
                "description": str, "parameters!": schema, "strict!": bool}],
            "tool_choice": either(frozenset({"none", "auto", "required"}), named),
            "parallel_tool_calls": bool, "max_output_tokens": between(16, 10**6, int),
            "temperature": between(0, 2), "top_p": between(0, 1), "user": str,
            "reasoning": {"effort": EFFORTS, "summary": frozenset({"auto"})}, "stream": bool,
            "text": {"format!": tagged("type", {"text": {}, "json_object": {},
                "json_schema": {"name!": TOOL_NAME, "schema!": dict, "strict": bool,
                    "description": str}})}}

    def check(self, request: Request) -> None:
        if request.path.endswith("/chat/completions"):
            return super().check(request)
        body = self.check_access(request, "/v1/responses")
        self.match(body, self.shape())
        self.check_tools(body, [tool["name"] for tool in body.get("tools", ())])
        self.forbid(body["input"] in ([], ""), "Missing required parameter: 'input'.")
        if isinstance(body["input"], list):
            self.check_items(body["input"], body["model"])
        return None

    def check_items(self, items: list[Any], model: str) -> None:
        answered = {item["call_id"] for item in items if item.get("type") == "function_call_output"}
        called: list[str] = []
        for at, item in enumerate(items):
            kind = item.get("type", "message")
            if kind == "function_call":
                called.append(item["call_id"])
                self.forbid(item["call_id"] not in answered, "No output for a function call")
                own = self.issued.get(item["call_id"])
                lone = own and own[0] == model and own[1] not in items[:at]
                self.forbid(lone, "a function_call without its reasoning")
            elif kind == "function_call_output":
                self.forbid(item["call_id"] not in called, "an output without its function call")
            elif kind == "reasoning":
                sealed = digest(model, item["id"], item["summary"], self.port)
                self.forbid(item["encrypted_content"] != sealed, "not sealed here")
                follower = items[at + 1].get("type") if at + 1 < len(items) else None
                self.forbid(follower not in ("function_call", "message"), "reasoning alone")
        self.unique(called, "input.call_id")

    def own(self, request: Request) -> Any:
        chat = request.path.endswith("/chat/completions")
        return (self.answers_of if chat else ResponsesAnswers)(self, request)


class ResponsesAnswers(Own, dialects.Responses):
    def items(self, answer: Answer) -> list[dict[str, Any]]:
        """Reasoning is sealed for its model, and each call has to come back behind it."""
        items = super().items(answer)
        if answer.reasoning:
            own = items[0]
            own["id"] = f"rs_{id(answer)}"
            sealed = (self.model, own["id"], own["summary"], self.vendor.port)
            own["encrypted_content"] = digest(*sealed)
            self.vendor.issued.update((one, (self.model, own)) for one in self.ids(answer))
        return items


# ==== Anthropic Messages
PLAIN_ID = re.compile(r"[a-zA-Z0-9_-]+")
#: Models of the vendor's table that take no sampling parameters; no forced tools.
NO_SAMPLING = ("claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5")
NO_FORCE = ("claude-opus-5-5", "claude-sonnet-5-5")


class AnthropicAnswers(Own, dialects.Anthropic):
    def blocks(self, answer: Answer) -> list[dict[str, Any]]:
        """Thinking is signed, and has to come back with the calls behind it."""
        blocks, body = super().blocks(answer), self.request.body
        if answer.reasoning:
            at = len(body["messages"])
            blocks[0]["signature"] = self.vendor.signature(body, at, blocks[0]["thinking"])
            kept = [one for one in blocks if one["type"] != "text" or one["text"].strip()]
            self.vendor.issued.update((one, (self.model, kept)) for one in self.ids(answer))
        return blocks


class Anthropic(Vendor):
    """The Messages API. Signatures are bound to the model and to all that stands before them."""
    base = "/v1"
    prefix = "toolu_"
    answers_of = AnthropicAnswers

    def error(self, message: str, status: int, **_: Any) -> Any:
        kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
        return {"type": "error", "error": {"type": kinds[status], "message": message}}

    def unknown(self, where: str) -> NoReturn:
        self.fail(f"{where}: Extra inputs are not permitted")

    def shape(self) -> dict[str, Any]:
        text = {"text!": written, "citations": type(None)}
        base64_source = {"media_type!": frozenset({"image/png", "image/jpeg", "image/gif",
                                                   "image/webp"}), "data!": encoded}
        web = {"url!": re.compile(r"https?://\S+")}
        image = {"source!": tagged("type", {"base64": base64_source, "url": web})}
        pdf = {"source!": tagged("type", {
            "base64": {"media_type!": frozenset({"application/pdf"}), "data!": encoded},
            "text": {"media_type!": frozenset({"text/plain"}), "data!": written}, "url": web})}
        shown = [tagged("type", {"text": text, "image": image})]
        result = {"tool_use_id!": PLAIN_ID, "content": either(str, shown), "is_error": bool}
        name = re.compile(r"[a-zA-Z0-9_-]{1,128}")
        user = [tagged("type", {"text": text, "image": image, "document": pdf,
                                "tool_result": result})]
        assistant = [tagged("type", {
            "text": text, "tool_use": {"id!": PLAIN_ID, "name!": name, "input!": dict},
            "thinking": {"thinking!": str, "signature!": str}, "redacted_thinking": {"data!": str},
        })]
        parallel = {"disable_parallel_tool_use": bool}
        return {"model!": str, "max_tokens!": between(1, 128000, int),
            "system": either(written, [tagged("type", {"text": text})]),
            "messages!": [tagged("role", {"user": {"content!": either(written, user)},
                "assistant": {"content!": either(written, assistant)}})],
            "tools": [{"name!": name, "description": str, "input_schema!": schema, "strict": bool}],
            "tool_choice": tagged("type", {"auto": parallel, "any": parallel,
                "tool": {"name!": name, **parallel}, "none": {}}), "temperature": between(0, 1),
            "top_p": between(0, 1), "top_k": int, "stop_sequences": [written], "stream": bool,
            "metadata": {"user_id": str}, "thinking": tagged("type",
                {"adaptive": {"display": str}, "disabled": {},
                    "enabled": {"budget_tokens!": between(1024, 128000, int)}}),
            "output_config": {"effort": frozenset({"low", "medium", "high", "xhigh", "max"}),
                "format": tagged("type", {"json_schema": {"schema!": dict}})}}

    def check(self, request: Request) -> None:
        body, version = request.body, request.headers.get("anthropic-version")
        self.forbid(request.path != "/v1/messages", "Not found", 404)
        self.forbid(request.headers.get("x-api-key") != KEY, "invalid x-api-key", 401)
        self.forbid(version != "2023-06-01", "anthropic-version: unknown version")
        model = body.get("model")
        for name in ("temperature", "top_p", "top_k"):
            if name in body and model in NO_SAMPLING:
                self.unknown(name)
        self.match(body, self.shape())
        self.forbid(model not in self.models, f"model: {model}", 404)
        if body.get("thinking", {}).get("type") == "disabled" and model in NO_FORCE:
            self.fail('"thinking.type.disabled" is not supported for this model')
        self.check_tools(body, model)
        self.check_messages(body)

    def check_tools(self, body: Any, model: Any) -> None:
        names = [tool["name"] for tool in body.get("tools", ())]
        self.unique(names, "tools")
        used = any(block["type"] in ("tool_use", "tool_result") for message in body["messages"]
                   if isinstance(message["content"], list) for block in message["content"])
        if used and not names:
            self.fail("Requests which include `tool_use` or `tool_result` blocks must define tools")
        choice = body.get("tool_choice", {"type": "auto"})
        self.forbid("tool_choice" in body and not names, "tool_choice: only with tools")
        self.forbid(choice.get("name", "") not in ["", *names], "tool_choice: Tool not found")
        if choice["type"] in ("any", "tool"):
            if model in NO_FORCE:
                self.fail(f"tool_choice.type: '{choice['type']}' is not supported for this model")
            if body.get("thinking", {}).get("type") in ("enabled", "adaptive"):
                self.fail("Thinking may not be enabled when tool_choice forces tool use.")

    def check_messages(self, body: Any) -> None:
        messages = body["messages"]
        self.forbid(not messages, "messages: at least one message is required")
        open_ids: list[str] = []
        seen: list[str] = []
        for at, message in enumerate(messages):
            where, content = f"messages.{at}", message["content"]
            self.forbid(message["role"] != ("user", "assistant")[at % 2], "roles must alternate")
            blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
            self.forbid(not blocks, f"{where}: content must not be empty")
            self.check_results(blocks, open_ids, where)
            open_ids = [block["id"] for block in blocks if block["type"] == "tool_use"]
            seen += open_ids
            if message["role"] == "assistant":
                self.check_thinking(blocks, body, at)
        self.unique(seen, "messages.tool_use.id")
        self.forbid(messages[-1]["role"] == "assistant", "no prefill by the assistant")

    def check_results(self, blocks: list[Any], open_ids: list[str], where: str) -> None:
        results = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
        self.forbid(sorted(results) != sorted(open_ids), f"{where}: `tool_use` and `tool_result`")
        first = {block["type"] for block in blocks[: len(results)]}
        self.forbid(first - {"tool_result"}, f"{where}: `tool_result` blocks have to come first")

    def signature(self, body: Any, at: int, thought: str) -> str:
        return digest("anthropic", self.port, body["model"], thought, body.get("system"),
                      body.get("tools"), body["messages"][:at])

    def check_thinking(self, blocks: list[Any], body: Any, at: int) -> None:
        for block in blocks:
            if block["type"] == "thinking" and block["signature"] != self.signature(body, at,
                block["thinking"]):
                self.fail(f"messages.{at}.content.0: Invalid `signature` in `thinking` block.")
            self.forbid(block["type"] == "redacted_thinking", f"messages.{at}: Invalid `data`")
            own = self.issued.get(block.get("id", ""))
            changed = own and own[0] == body["model"] and own[1] != blocks
            self.forbid(changed, f"messages.{at}.content.0: thinking blocks cannot be modified")


# ==== Gemini generateContent
SKIP_SIGNATURE = "skip_thought_signature_validator"


class GeminiAnswers(Own, dialects.Gemini):
    def called(self, answer: Answer) -> list[dict[str, Any]]:
        parts = super().called(answer)
        for at, (part, one) in enumerate(zip(parts, self.ids(answer), strict=True)):
            if at == 0:
                del part["thoughtSignature"]
                part["thoughtSignature"] = digest("gemini", self.vendor.port, self.model, part)
            self.vendor.issued[one] = (self.model, part)
        return parts


class Gemini(Vendor):
    """generateContent. Signatures are bound to the model and to their part."""
    base = "/v1beta"
    prefix = "g"
    answers_of = GeminiAnswers

    def error(self, message: str, status: int, **_: Any) -> Any:
        states = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND"}
        return {"error": {"code": status, "message": message, "status": states[status]}}

    def streams(self, request: Request) -> bool:
        return ":streamGenerateContent" in request.path

    def shape(self) -> dict[str, Any]:
        name = re.compile(r"[a-zA-Z_][a-zA-Z0-9_.:-]{0,63}")
        media = re.compile(r"(image/(png|jpe?g|webp|hei[cf])|audio/\w+|application/pdf|text/plain)")
        blob = {"mimeType!": media, "data!": encoded}
        part = {"text": str, "thought": bool, "thoughtSignature": str, "inlineData": blob,
            "functionCall": {"id": str, "name!": name, "args": dict},
            "functionResponse": {"id": str, "name!": name, "response!": dict}}
        modes = frozenset({"AUTO", "ANY", "NONE"})
        return {"contents!": [{"role!": frozenset({"user", "model"}), "parts!": [part]}],
            "systemInstruction": {"parts!": [{"text!": written}], "role": str},
            "tools": [{"functionDeclarations!": [{"name!": name, "description": written,
                "parameters": dict, "parametersJsonSchema": dict}]}], "toolConfig": {
                "functionCallingConfig": {"mode!": modes, "allowedFunctionNames": [name]}},
            "generationConfig": {"temperature": between(0, 2), "topP": between(0, 1), "topK": int,
                "candidateCount": int, "maxOutputTokens": between(1, 10**6, int),
                "stopSequences": [str], "seed": int, "presencePenalty": between(-2, 2),
                "frequencyPenalty": between(-2, 2),
                "responseMimeType": frozenset({"text/plain", "application/json"}),
                "responseJsonSchema": dict, "thinkingConfig": {"includeThoughts": bool,
                    "thinkingBudget": int,
                    "thinkingLevel": frozenset({"MINIMAL", "LOW", "MEDIUM", "HIGH", "XHIGH"})}},
            "safetySettings": list, "cachedContent": str}

    def check(self, request: Request) -> None:
        self.forbid(request.headers.get("x-goog-api-key") != KEY, "API key not valid.")
        methods = "(generateContent|streamGenerateContent)"
        found = re.fullmatch(rf"/v1beta/models/([^/:]+):{methods}(\?alt=sse)?", request.path)
        self.forbid(not found or found[1] not in self.models, "models/x is not found", 404)
        body = request.body
        self.match(body, self.shape())
        self.check_contents(body["contents"], found[1])
        self.check_tools(body)
        config = body.get("generationConfig", {})
        plain = config.get("responseMimeType") != "application/json"
        self.forbid("responseJsonSchema" in config and plain, "responseJsonSchema for plain text")
        self.forbid(len(config.get("stopSequences", ())) > 5, "more than 5 stop sequences")
        both = {"thinkingBudget", "thinkingLevel"} <= config.get("thinkingConfig", {}).keys()
        self.forbid(both, "You can only set one of thinking_budget and thinking_level.")

    def check_tools(self, body: Any) -> None:
        declared = [function for tool in body.get("tools", ())
                    for function in tool["functionDeclarations"]]
        self.unique([function["name"] for function in declared], "tools")
        for function in declared:
            self.forbid({"parameters", "parametersJsonSchema"} <= function.keys(), "two schemas")
            given = function.get("parameters", function.get("parametersJsonSchema"))
            if given is not None and not given.get("properties") and not given.keys() & {
                    "$ref", "anyOf", "additionalProperties"}:
                self.fail("* function_declarations.parameters.properties: should be non-empty")
        config = body.get("toolConfig", {}).get("functionCallingConfig", {})
        self.forbid(config and not declared, "Function calling config without declarations.")
        allowed = config.get("allowedFunctionNames", [])
        self.forbid(allowed and config["mode"] != "ANY", "allowed_function_names without ANY")
        names = {function["name"] for function in declared}
        self.forbid(set(allowed) - names, "allowed_function_names holds an undeclared name")

    def check_contents(self, contents: list[Any], model: str) -> None:
        self.forbid(not contents, "* GenerateContentRequest.contents: contents is not specified")
        open_calls: list[Any] = []
        for at, content in enumerate(contents):
            where, parts = f"contents[{at}]", content["parts"]
            self.forbid(content["role"] != ("user", "model")[at % 2], "turns have to alternate")
            self.forbid(not parts, f"* GenerateContentRequest.{where}.parts: must not be empty")
            for part in parts:
                data = part.keys() & {"text", "inlineData", "functionCall", "functionResponse"}
                self.forbid(len(data) != 1, f"* {where}.parts: oneof field 'data' must be one")
                other = {"user": "functionCall", "model": "functionResponse"}[content["role"]]
                self.forbid(other in part, f"{where}: a part of the other role")
            responses = [part["functionResponse"] for part in parts if "functionResponse" in part]
            pairs = [[(one["name"], one.get("id")) for one in those]
                     for those in (responses, open_calls)]
            self.forbid(pairs[0] != pairs[1], "function response parts are not those of the calls")
            open_calls = [part["functionCall"] for part in parts if "functionCall" in part]
            if content["role"] == "model":
                self.check_signatures(parts, model)
        self.forbid(contents[-1]["role"] != "user", "the last turn has to be the user's")

    def check_signatures(self, parts: list[Any], model: str) -> None:
        first = next((part for part in parts if "functionCall" in part), None)
        self.forbid("thoughtSignature" not in (first or "thoughtSignature"), "no thought_signature")
        for part in parts:
            own = part.get("functionCall", {}).get("id")
            self.forbid(own and self.issued.get(own) != (model, part), "a foreign or changed part")
            signature = part.get("thoughtSignature", SKIP_SIGNATURE)
            bare = {name: value for name, value in part.items() if name != "thoughtSignature"}
            if signature not in (SKIP_SIGNATURE, digest("gemini", self.port, model, bare)):
                self.fail("Thought signature is not valid.")


# ==== Ollama
class Ollama(Vendor):
    """The native /api/chat. What the real server ignores in silence is refused here."""
    prefix = "call_o"
    answers_of = type("OllamaAnswers", (Own, dialects.Ollama), {})

    def error(self, message: str, status: int, **_: Any) -> Any:
        return {"error": message}

    def streams(self, request: Request) -> bool:
        return bool(request.body.get("stream", True))

    def shape(self) -> dict[str, Any]:
        call = {"id": str, "function!": {"name!": str, "arguments!": dict, "index": int}}
        numbers = dict.fromkeys(("temperature", "top_p", "min_p", "presence_penalty",
                                 "frequency_penalty", "repeat_penalty"), NUMBER)
        return {"model!": re.compile(r".+"), "messages": [tagged("role",
            {"system": {"content!": str}, "user": {"content!": str, "images": [encoded]},
                "assistant": {"content!": str, "thinking": str, "images": [encoded],
                    "tool_calls": [call]}, "tool": {"content!": str, "tool_name!": str,
                        "tool_call_id": str, "images": [encoded]}})], "stream": bool,
            "truncate": bool, "shift": bool, "format": either(frozenset({"json"}), schema),
            "keep_alive": either(str, NUMBER),
            "think": frozenset({True, False, "low", "medium", "high", "max"}),
            "tools": [{"type!": frozenset({"function"}),
                "function!": {"name!": str, "description": str, "parameters": schema,
                    "strict": bool}}], "options": {**numbers, "num_predict": int, "num_ctx": int,
                        "seed": int, "top_k": int, "stop": [str]}}

    def check(self, request: Request) -> None:
        body = request.body
        self.forbid(request.path != "/api/chat", "404 page not found", 404)
        self.match(body, self.shape())
        self.forbid(body["model"] not in self.models, f"model '{body['model']}' not found", 404)
        open_calls: list[tuple[str, str | None]] = []
        seen: list[str] = []
        for message in body.get("messages", ()):
            if message["role"] == "tool":
                key = (message["tool_name"], message.get("tool_call_id"))
                self.forbid(key not in open_calls, "tool result without its tool call")
                open_calls.remove(key)
                continue
            self.forbid(open_calls, "tool call without its result")
            open_calls = [(call["function"]["name"], call.get("id"))
                          for call in message.get("tool_calls", ())]
            seen += [call_id for _, call_id in open_calls if call_id is not None]
        self.forbid(open_calls, "tool call without its result")
        self.unique(seen, "messages.tool_calls.id")


# ==== all of them
KINDS: dict[str, tuple[type[Vendor], Any]] = {"anthropic": (Anthropic, AnthropicProvider),
    "gemini": (Gemini, GeminiProvider), "ollama": (Ollama, OllamaProvider)}
MODELS = ("m-1", "m-2")


@contextmanager
def faked(name: str, *script: Any, models: tuple[str, ...] = MODELS,
        **settings: Any) -> Iterator[tuple[Any, Any]]:
    """A vendor that enforces its rules, and a provider for it; OpenAI under its own address: with
    Chat Completions, "responses" alone, or "auto"."""
    if name not in KINDS:
        api = "chat" if name == "openai" else name
        with Responses(*script, models=models) as vendor, requests.Session() as session:
            session.trust_env = False
            session.mount("https://", adapter := _Detour())
            adapter.root = vendor.root
            yield vendor, OpenAIProvider(KEY, session=session, **{"api": api, **settings})
        return
    fake, made = KINDS[name]
    with fake(*script, models=models) as vendor:
        provider = made(KEY, vendor.url, **settings)
        yield vendor, provider
        provider.close()
