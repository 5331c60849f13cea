"""The six wire formats as a server writes them: answers, failures and lists of models."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from support.server import KEY, MAKERS, parsed, reply, sse

from copilot_router import (AuthenticationError, ContextLengthExceeded, InvalidResponse,
    ModelNotFound, Overloaded, RateLimited, ServerError, Usage)

#: name, argument object
Called = tuple[str, dict[str, Any]]
#: status, headers, body, class, retry_after
Failure = tuple[int, dict[str, str], Any, type, float | None]


@dataclass(frozen=True)
class Answer:
    """What the model says, whatever the format. ``usage`` is in the router's own arithmetic."""
    text: tuple[str, ...] = ("Hello, ", "world")
    reasoning: tuple[str, ...] = ()
    calls: tuple[Called, ...] = ()
    finish: str = "stop"  # stop | length | tool_calls | content_filter
    usage: Usage = field(default_factory=lambda: Usage(9, 4))
    cuts: ClassVar[int] = 2  #: pieces of a call's arguments, where the format streams them

    @property
    def whole(self) -> str:
        return "".join(self.text)


def cut(text: str, pieces: int) -> list[str]:
    """The text in so many pieces; the first ones may be empty."""
    places = [len(text) * at // pieces for at in range(pieces + 1)]
    return [text[start:end] for start, end in itertools.pairwise(places)]


def event(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields})


class Dialect:
    """One wire format and the provider that speaks it."""
    name: ClassVar[str]
    stream_kind: ClassVar[str] = "text/event-stream"
    model = "m-2026"  #: the name that the server reports
    counts_cached = counts_written = counts_reasoning = True
    remote_images = needs_model = True
    #: Failures that have a status of their own, by what they mean.
    failures: ClassVar[dict[str, Failure]]

    def ids(self, answer: Answer) -> list[str]:
        return [f"call_{at}" for at in range(len(answer.calls))]

    def called_as(self, answer: Answer) -> Any:
        """The calls with their ids."""
        return zip(self.ids(answer), answer.calls, strict=True)

    def make(self, url: str, key: Any = KEY, **settings: Any) -> Any:
        return MAKERS[self.name](key, url, **settings)

    def client(self, key: str, url: str, **settings: Any) -> Any:
        return self.make(url, key, **settings)

    def body(self, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def events(self, answer: Answer) -> list[bytes]:
        raise NotImplementedError

    path: ClassVar[str]  #: in the path of its requests
    turns = "messages"  #: where the conversation stands in a body
    #: Events before the first token, which are no sign of it.
    idle: ClassVar[bytes]
    keep_alive = b": keep-alive\n\n"  #: what a stream may say without saying anything
    marker = b""  #: of the end of a stream
    ends: ClassVar[bytes] = b'"finish_reason": "'  #: in the event that has the finish reason
    #: An error in a stream that has begun, and the class that it amounts to.
    broken: ClassVar[tuple[bytes, type]]
    models: ClassVar[Any] = {"object": "list", "data": [{"id": "m", "object": "model"}]}
    ping_path: ClassVar[str] = "/v1/models"

    #: A hint, its value, and the 400 of a model that refuses it.
    refused: ClassVar[tuple[str, Any, Any]] = ("temperature", 0.5, {"error": {
        "message": "Unsupported value: 'temperature' does not support 0.5 with this model.",
        "type": "invalid_request_error", "param": "temperature", "code": "unsupported_value"}})
    #: The name in a request of what the hint becomes.
    hint: ClassVar[str] = "temperature"

    def streams(self, path: str, body: dict[str, Any]) -> bool:
        return bool(body.get("stream", False))

    def __repr__(self) -> str:
        return self.name


def openai_failures() -> dict[str, Failure]:
    def error(message: str, type_: str, code: str | None = None) -> Any:
        return {"error": {"message": message, "type": type_, "param": None, "code": code}}
    invalid, long = "invalid_request_error", "Your input exceeds the context window of this model."
    key, limit = "Incorrect API key provided.", "Rate limit reached"
    limited = error(limit, "requests", "rate_limit_exceeded")
    too_long = error(long, invalid, "context_length_exceeded")
    return {"401": (401, {}, error(key, invalid, "invalid_api_key"), AuthenticationError, None),
        "429 with a hint": (429, {"Retry-After": "7"}, limited, RateLimited, 7.0),
        "500": (500, {}, error("The server had an error", "server_error"), ServerError, None),
        "context length": (400, {}, too_long, ContextLengthExceeded, None)}


class Chat(Dialect):
    name = "chat"
    path, marker = "/chat/completions", b"data: [DONE]\n\n"
    failures = openai_failures()
    idle = b": keep-alive\n\n" + sse({"choices": [{"index": 0,
                                                   "delta": {"role": "assistant", "content": ""}}]})
    broken = sse({"error": {"message": "Try later", "type": "server_error",
                            "code": "server_is_overloaded"}}), Overloaded
    reasoning_key = "reasoning_content"
    needs_model = False

    def calls(self, answer: Answer, indexed: bool) -> list[dict[str, Any]]:
        return [{**({"index": at} if indexed else {}), "id": one, "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)}}
            for at, (one, (name, arguments)) in enumerate(self.called_as(answer))]

    def usage(self, usage: Usage) -> dict[str, Any]:
        return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens,
                "cache_write_tokens": usage.cache_write_tokens},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens}}

    def body(self, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.whole or None,
                                   "refusal": None}
        if answer.reasoning:
            message[self.reasoning_key] = "".join(answer.reasoning)
        if answer.calls:
            message["tool_calls"] = self.calls(answer, indexed=False)
        choice = {"index": 0, "message": message, "finish_reason": answer.finish, "logprobs": None}
        return {"id": "c1", "object": "chat.completion", "created": 1, "model": self.model,
                "choices": [choice], "usage": self.usage(answer.usage)}

    def events(self, answer: Answer) -> list[bytes]:
        def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            return sse({"id": "c1", "object": "chat.completion.chunk", "model": self.model,
                        "choices": [choice], "usage": None})
        found = [chunk({"role": "assistant", "content": ""})]
        found += [chunk({self.reasoning_key: piece}) for piece in answer.reasoning]
        found += [chunk({"content": piece}) for piece in answer.text]
        for call in self.calls(answer, indexed=True):
            found.append(chunk({"tool_calls": [{**call, "function": {**call["function"],
                                                    "arguments": ""}}]}))
            found += [chunk({"tool_calls": [{"index": call["index"],
                                             "function": {"arguments": piece}}]})
                      for piece in cut(call["function"]["arguments"], answer.cuts)]
        found.append(chunk({}, answer.finish))
        found.append(sse({"id": "c1", "model": self.model, "choices": [],
                          "usage": self.usage(answer.usage)}))
        return [*found, sse(done=True)]


class LMStudio(Chat):
    name = "lmstudio"
    reasoning_key = "reasoning"
    none = "No models loaded. Please load a model in the developer page or use 'lms load'."
    full = "Trying to keep the first 9000 tokens when context the overflows. However, the model is "
    failures: ClassVar[dict[str, Failure]] = {**openai_failures(),
        "404 model": (404, {}, {"error": {"message": none, "type": "invalid_request_error",
            "param": "model", "code": None}}, ModelNotFound, None),
        "context length": (400, {}, {"error": full + "loaded with context length of only 4096"},
            ContextLengthExceeded, None)}


class Responses(Dialect):
    name = "responses"
    path, turns = "/responses", "input"
    ends = b'"incomplete_details"'
    failures = openai_failures()
    idle = sse({"type": "response.created", "response": {"id": "resp_1", "status": "in_progress"}})
    broken = sse({"type": "response.failed", "response": {"id": "resp_1", "status": "failed",
        "output": [], "error": {"code": "rate_limit_exceeded", "message": "x"}}}), RateLimited
    needs_model = False

    def items(self, answer: Answer) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = []
        if answer.reasoning:
            summary = [{"type": "summary_text", "text": "".join(answer.reasoning)}]
            items.append({"type": "reasoning", "id": "rs_1", "summary": summary,
                          "encrypted_content": "c2VhbGVk"})
        if answer.text:
            content = [{"type": "output_text", "text": answer.whole, "annotations": []}]
            items.append({"type": "message", "id": "msg_1", "role": "assistant",
                          "status": "completed", "content": content})
        items += [{"type": "function_call", "id": f"fc_{one}", "call_id": one, "name": name,
            "status": "completed", "arguments": json.dumps(arguments)}
            for one, (name, arguments) in self.called_as(answer)]
        return items

    def body(self, answer: Answer) -> dict[str, Any]:
        reason = {"length": "max_output_tokens",
                  "content_filter": "content_filter"}.get(answer.finish)
        usage = answer.usage
        return {"id": "resp_1", "object": "response", "model": self.model, "error": None,
            "output": self.items(answer), "status": "incomplete" if reason else "completed",
            "incomplete_details": {"reason": reason} if reason else None,
            "usage": {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens,
                    "cache_write_tokens": usage.cache_write_tokens},
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens}}

    def events(self, answer: Answer) -> list[bytes]:
        found = [event("response.created", response={"id": "resp_1", "status": "in_progress"})]
        for at, item in enumerate(self.items(answer)):
            hollow = {**item, "status": "in_progress"}
            where = {"output_index": at, "item_id": item["id"]}
            hollow |= {key: type(item[key])() for key in ("summary", "content", "arguments")
                       if key in item}
            found.append(event("response.output_item.added", output_index=at, item=hollow))
            if item["type"] == "reasoning":
                found += [event("response.reasoning_summary_text.delta", **where, delta=piece)
                          for piece in answer.reasoning]
            elif item["type"] == "message":
                part = {"type": "output_text", "text": ""}
                found.append(event("response.content_part.added", **where, part=part))
                found += [event("response.output_text.delta", **where, content_index=0, delta=piece)
                          for piece in answer.text]
                found.append(event("response.output_text.done", **where, content_index=0,
                                   text=answer.whole))
            else:
                found += [event("response.function_call_arguments.delta", **where, delta=piece)
                          for piece in cut(item["arguments"], answer.cuts)]
            found.append(event("response.output_item.done", output_index=at, item=item))
        body = self.body(answer)
        return [*found, event(f"response.{body['status']}", response=body)]


class Anthropic(Dialect):
    name = "anthropic"
    path = "/messages"
    keep_alive, marker = sse({"type": "ping"}), sse({"type": "message_stop"})
    ends = b'"type": "message_delta"'
    broken = sse({"type": "error", "error": {"type": "overloaded_error", "message": "Try later"},
                  "request_id": "r"}), Overloaded
    models: ClassVar[Any] = {"data": [{"type": "model", "id": "m"}], "has_more": False}
    ping_path = "/v1/models?limit=1"
    idle = sse({"type": "message_start",
        "message": {"id": "msg_1", "model": "m", "content": [], "usage": {}}}, {"type": "ping"})

    @staticmethod
    def error(status: int, kind: type, type_: str, message: str, wait: float | None = None,
              **headers: str) -> Failure:
        body = {"type": "error", "error": {"type": type_, "message": message}, "request_id": "r"}
        return status, headers, body, kind, wait

    failures: ClassVar[dict[str, Failure]] = {
        "401": error(401, AuthenticationError, "authentication_error", "invalid x-api-key"),
        "429 with a hint": error(429, RateLimited, "rate_limit_error", "Too many", 7.0,
            **{"retry-after": "7"}),
        "500": error(500, ServerError, "api_error", "Internal server error"),
        "context length": error(400, ContextLengthExceeded, "invalid_request_error",
            "prompt is too long: 210000 tokens > 200000 maximum")}

    refused: ClassVar[tuple[str, Any, Any]] = ("temperature", 0.5, {"type": "error", "error": {
        "type": "invalid_request_error", "message": "temperature: Extra inputs are not permitted"}})

    stops: ClassVar[dict[str, str]] = {"stop": "end_turn", "length": "max_tokens",
        "tool_calls": "tool_use", "content_filter": "refusal"}

    def blocks(self, answer: Answer) -> list[dict[str, Any]]:
        blocks: list[dict[str, Any]] = []
        if answer.reasoning:
            blocks.append({"type": "thinking", "thinking": "".join(answer.reasoning),
                           "signature": "c2lnbmVk"})
        if answer.text:
            blocks.append({"type": "text", "text": answer.whole})
        blocks += [{"type": "tool_use", "id": one, "name": name, "input": arguments}
            for one, (name, arguments) in self.called_as(answer)]
        return blocks

    @staticmethod
    def inputs(usage: Usage) -> dict[str, Any]:
        cached = usage.cached_tokens + usage.cache_write_tokens
        return {"input_tokens": usage.prompt_tokens - cached,
                "cache_read_input_tokens": usage.cached_tokens,
                "cache_creation_input_tokens": usage.cache_write_tokens}

    @staticmethod
    def outputs(usage: Usage) -> dict[str, Any]:
        return {"output_tokens": usage.completion_tokens,
                "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens}}

    def body(self, answer: Answer) -> dict[str, Any]:
        return {"id": "msg_1", "type": "message", "role": "assistant", "model": self.model,
                "content": self.blocks(answer),
                "stop_reason": self.stops[answer.finish], "stop_sequence": None,
                "usage": {**self.inputs(answer.usage), **self.outputs(answer.usage)}}

    def events(self, answer: Answer) -> list[bytes]:
        start = {"id": "msg_1", "type": "message", "role": "assistant", "model": self.model,
                 "content": [], "stop_reason": None,
                 "usage": {**self.inputs(answer.usage), "output_tokens": 1}}
        found = [event("message_start", message=start)]
        for at, block in enumerate(self.blocks(answer)):
            deltas: list[dict[str, Any]]
            if block["type"] == "thinking":
                hollow = {"type": "thinking", "thinking": "", "signature": ""}
                deltas = [{"type": "thinking_delta", "thinking": piece}
                          for piece in answer.reasoning]
                deltas.append({"type": "signature_delta", "signature": block["signature"]})
            elif block["type"] == "text":
                hollow = {"type": "text", "text": ""}
                deltas = [{"type": "text_delta", "text": piece} for piece in answer.text]
            else:
                hollow = {**block, "input": {}}
                pieces = cut(json.dumps(block["input"]), answer.cuts) if block["input"] else [""]
                deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
            found.append(event("content_block_start", index=at, content_block=hollow))
            found += [event("ping")] * (at == 0)
            found += [event("content_block_delta", index=at, delta=delta) for delta in deltas]
            found.append(event("content_block_stop", index=at))
        delta = {"stop_reason": self.stops[answer.finish], "stop_sequence": None}
        found.append(event("message_delta", delta=delta, usage=self.outputs(answer.usage)))
        return [*found, event("message_stop")]


class Gemini(Dialect):
    name = "gemini"
    path, turns = "enerateContent", "contents"
    ends = b'"finishReason"'
    counts_written = False
    remote_images = False
    idle = sse({"candidates": [{"content": {"role": "model", "parts": [{"text": ""}]}}],
                "modelVersion": "m-2026"})
    broken = sse({"error": {"code": 503, "message": "The model is overloaded.",
                            "status": "UNAVAILABLE"}}), Overloaded
    models: ClassVar[Any] = {"models": [{"name": "models/m"}]}
    ping_path = "/v1beta/models?pageSize=1"

    @staticmethod
    def error(status: int, kind: type, name: str, message: str, wait: float | None = None,
              *details: Any) -> Failure:
        error = {"code": status, "message": message, "status": name,
                 **({"details": list(details)} if details else {})}
        return status, {}, {"error": error}, kind, wait

    failures: ClassVar[dict[str, Failure]] = {"401": error(401, AuthenticationError,
        "UNAUTHENTICATED", "Request had invalid authentication credentials."),
        "429 with a hint": error(429, RateLimited, "RESOURCE_EXHAUSTED", "Resource exhausted", 7.0,
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7s"}),
        "500": error(500, ServerError, "INTERNAL", "An internal error has occurred."),
        "context length": error(400, ContextLengthExceeded, "INVALID_ARGUMENT",
            "The input token count (1200000) exceeds the "
            "maximum number of tokens allowed (1048576).")}

    refused: ClassVar[tuple[str, Any, Any]] = ("frequency_penalty", 0.5, {"error": {
        "code": 400, "status": "INVALID_ARGUMENT",
        "message": "Invalid JSON payload received. Unknown name "
        '"frequencyPenalty" at \'generation_config\': Cannot find field.'}})
    hint = "frequencyPenalty"

    stops: ClassVar[dict[str, str]] = {"stop": "STOP", "length": "MAX_TOKENS", "tool_calls": "STOP",
        "content_filter": "SAFETY"}

    def chunk(self, parts: list[Any], usage: Usage, finish: str | None = None) -> dict[str, Any]:
        written = usage.completion_tokens - usage.reasoning_tokens
        counts = {"promptTokenCount": usage.prompt_tokens, "candidatesTokenCount": written,
            "thoughtsTokenCount": usage.reasoning_tokens,
            "cachedContentTokenCount": usage.cached_tokens, "totalTokenCount": usage.total_tokens}
        candidate = {"index": 0, "content": {"role": "model", "parts": parts},
                     **({"finishReason": finish} if finish else {})}
        return {"candidates": [candidate], "usageMetadata": counts, "modelVersion": self.model,
                "responseId": "r1"}

    def called(self, answer: Answer) -> list[dict[str, Any]]:
        return [{"functionCall": {"id": one, "name": name,
            **({"args": arguments} if arguments else {})},
            **({"thoughtSignature": "c2lnbmVk"} if at == 0 else {})}
            for at, (one, (name, arguments)) in enumerate(self.called_as(answer))]

    def body(self, answer: Answer) -> dict[str, Any]:
        parts: list[dict[str, Any]] = [{"text": "".join(answer.reasoning),
                                        "thought": True}] if answer.reasoning else []
        parts += [{"text": answer.whole}] if answer.text else []
        return self.chunk([*parts, *self.called(answer)], answer.usage, self.stops[answer.finish])

    def events(self, answer: Answer) -> list[bytes]:
        parts: list[dict[str, Any]] = [{"text": piece, "thought": True}
                                       for piece in answer.reasoning]
        parts += [{"text": piece} for piece in answer.text] + self.called(answer)
        start = Usage(answer.usage.prompt_tokens, 1)
        found = [sse(self.chunk([part], start)) for part in parts]
        found.append(sse(self.chunk([{"text": ""}], answer.usage, self.stops[answer.finish])))
        return [event.replace(b"\n\n", b"\r\n\r\n") for event in found]

    def streams(self, path: str, body: dict[str, Any]) -> bool:
        return path.endswith(":streamGenerateContent?alt=sse")


class Ollama(Dialect):
    name = "ollama"
    path, keep_alive = "/api/chat", b"\n"
    ends = b'"done": true'
    stream_kind = "application/x-ndjson"
    counts_cached = counts_written = counts_reasoning = False
    remote_images = False
    idle = b'{"model": "m-2026", "message": {"role": "assistant", "content": ""}, "done": false}\n'
    broken = b'{"error": "an error was encountered while running the model"}\n', InvalidResponse
    models: ClassVar[Any] = {"models": [{"name": "m:latest", "model": "m:latest"}]}
    ping_path = "/api/tags"

    failures: ClassVar[dict[str, Failure]] = {
        "401": (401, {}, {"error": "unauthorized"}, AuthenticationError, None),
        "429 with a hint": (429, {"Retry-After": "7"}, {"error": "too many requests"}, RateLimited,
            7.0),
        "500": (500, {}, {"error": "model runner has unexpectedly stopped"}, ServerError, None)}

    refused: ClassVar[tuple[str, Any, Any]] = ("reasoning_effort", "high",
                                               {"error": '"m" does not support thinking'})
    hint = "think"

    def end(self, answer: Answer) -> dict[str, Any]:
        return {"done": True, "done_reason": "length" if answer.finish == "length" else "stop",
                "prompt_eval_count": answer.usage.prompt_tokens,
                "eval_count": answer.usage.completion_tokens}

    def message(self, content: str = "", **fields: Any) -> dict[str, Any]:
        return {"model": self.model, "created_at": "2026-11-01T10:00:00.123456789Z",
                "message": {"role": "assistant", "content": content, **fields}, "done": False}

    def called(self, answer: Answer) -> dict[str, Any]:
        calls = [{"id": one, "function": {"index": at, "name": name, "arguments": arguments}}
            for at, (one, (name, arguments)) in enumerate(self.called_as(answer))]
        return {"tool_calls": calls} if calls else {}

    def body(self, answer: Answer) -> dict[str, Any]:
        thinking = {"thinking": "".join(answer.reasoning)} if answer.reasoning else {}
        return {**self.message(answer.whole, **thinking, **self.called(answer)), **self.end(answer)}

    def events(self, answer: Answer) -> list[bytes]:
        found = [self.message(thinking=piece) for piece in answer.reasoning]
        found += [self.message(piece) for piece in answer.text]
        found += [self.message(**self.called(answer))] if answer.calls else []
        found.append({**self.message(), **self.end(answer)})
        return [json.dumps(line).encode() + b"\n" for line in found]


DIALECTS: tuple[Dialect, ...] = (Chat(), Responses(), LMStudio(), Anthropic(), Gemini(), Ollama())


@pytest.fixture(params=DIALECTS, ids=repr)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    return request.param


# -- HTTP
def head(dialect: Dialect) -> bytes:
    kind = f"Content-Type: {dialect.stream_kind}"
    return f"HTTP/1.1 200 OK\r\n{kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def streamed(dialect: Dialect, events: list[bytes]) -> bytes:
    return head(dialect) + b"".join(map(chunk, events)) + b"0\r\n\r\n"


def answers(dialect: Dialect, make: Callable[[dict[str, Any]], Answer]) -> Callable[..., bool]:
    def serve(server: Any, connection: Any, request: bytes) -> bool:
        path, _, body = parsed(request)
        answer = make(body)
        if dialect.streams(path, body):
            connection.sendall(streamed(dialect, dialect.events(answer)))
        else:
            connection.sendall(reply(dialect.body(answer)))
        return True
    return serve


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a body, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
