"""A server that misbehaves on purpose: raw sockets on loopback, one fault per model name, a log of all attempts with times.

A fault is a function of one Exchange, registered by its name. It closes the connection at its end unless it sets ``keep``:

    @fault
    def cut_chunked(x: Exchange) -> None:
        x.head("Transfer-Encoding: chunked")
        x.chunk(x.part)

What goes over the wire in between (``x.body``, ``x.part``, ``x.texts``, ``x.keep_alive``) comes from a Dialect, so that the
same fault serves every wire format. A fault of one vendor's own content names its dialect: ``@fault(only=Chat)``.
"""

from __future__ import annotations

import gzip
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from typing import Any, ClassVar, NamedTuple

from copilot_router import AnthropicProvider, GeminiProvider, LLMProvider, OllamaProvider, OpenAIProvider

#: Seconds that a fault may hang, drip or gush at the most: longer than any client here waits.
PATIENCE = 30.0


def chunked(*pieces: bytes) -> bytes:
    """A whole body in the chunked transfer coding."""
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def descriptors() -> int:
    """Open file descriptors of this process, 0 where nobody knows."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


# -- a raw server


class Peer:
    """A raw server on loopback: ``serve(connection, request)`` answers; it counts connections and keeps requests."""

    def __init__(self, serve: Callable[[Any, socket.socket, bytes], bool]) -> None:
        self.serve = serve
        self.connections = 0
        self.requests: list[bytes] = []
        self.stopping = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._threads = {threading.Thread(target=self._accept)}
        for thread in self._threads:
            thread.start()
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if self.stopping.is_set():
                connection.close()
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            self._open.add(connection)
            thread = threading.Thread(target=self._talk, args=(connection,))
            thread.start()
            self._threads.add(thread)  # afterwards: stop() cannot join what has not begun

    def _talk(self, connection: socket.socket) -> None:
        try:
            while (request := self._request(connection)) and not self.stopping.is_set():
                self.requests.append(request)
                if not self.serve(self, connection, request):
                    return
        except OSError:
            return
        finally:
            self._open.discard(connection)
            connection.close()
            self._threads.discard(threading.current_thread())

    @staticmethod
    def _request(connection: socket.socket) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            piece = connection.recv(65536)
            if not piece:
                return b""
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
        while len(body) < length:
            piece = connection.recv(65536)
            if not piece:
                return b""
            body += piece
        return head + b"\r\n\r\n" + body

    def drip(self, connection: socket.socket, data: bytes, gap: float = 0.02) -> None:
        """One byte at a time."""
        for at in range(len(data)):
            connection.sendall(data[at : at + 1])
            if self.stopping.wait(gap):
                return

    def stop(self) -> None:
        """Hang up on everybody; returns when all threads have ended."""
        self.stopping.set()
        with socket.socket() as waker:
            waker.connect_ex(("127.0.0.1", self.port))
        self._listener.close()
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in list(self._threads):
            thread.join(5)


@contextmanager
def peer(serve: Callable[[Any, socket.socket, bytes], bool]) -> Iterator[Peer]:
    """A Peer for the time of a with block."""
    server = Peer(serve)
    try:
        yield server
    finally:
        server.stop()


# -- wire formats


def event(text: str | None = None, finish: str | None = None) -> bytes:
    """One event of a Chat Completions stream."""
    delta = {"content": text} if text else {}
    return b"data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": finish}]}).encode() + b"\n\n"


class Dialect:
    """How a vendor says what every healthy answer says, as plain objects. Pure; one subclass a wire format."""

    name: str
    path: str  #: found in the path of the requests that faults are for; any other gets a healthy list of models
    stream_type = "text/event-stream"
    keep_alive = b": keep-alive\n\n"  #: what a stream may say without saying anything
    end = b""  #: the end marker
    ends_twice = False  #: whether the end marker alone completes an answer, too
    #: A refusal's kind -> its status and the vendor's name for it.
    refusals: ClassVar[dict[str, tuple[int, str]]]

    def __init__(self, model: str = "a-model", prompt_tokens: int = 11, completion_tokens: int = 7) -> None:
        self.model = model  #: as the server reports it
        self.tokens = (prompt_tokens, completion_tokens)

    def client(self, key: str, url: str, **settings: Any) -> LLMProvider:
        """The provider that speaks it."""
        raise NotImplementedError

    def asked(self, path: str, body: dict[str, Any]) -> tuple[str, str, bool]:
        """Model, text of the last message, and whether a stream is wanted."""
        return body["model"], body["messages"][-1]["content"], bool(body.get("stream"))

    def opening(self) -> list[dict[str, Any]]:
        """What opens a stream, without any sign of generation."""
        return []

    def texts(self, texts: list[str]) -> list[dict[str, Any]]:
        """Events with these pieces of text, the last of them one piece; always the first content of an answer."""
        raise NotImplementedError

    def texts_end(self, texts: list[str]) -> list[dict[str, Any]]:
        """What follows when that content is over."""
        return []

    def call(self, at: int, name: str, arguments: str) -> list[dict[str, Any]]:
        """Events of one tool call, the at-th piece of content."""
        raise NotImplementedError

    def closing(self, called: bool = False) -> list[dict[str, Any]]:
        """What makes the answer complete, before the end marker."""
        raise NotImplementedError

    def document(self, text: str) -> dict[str, Any]:
        """The same answer in one JSON document."""
        raise NotImplementedError

    def refusal(self, kind: str) -> dict[str, Any]:
        """The body of a refusal: bad_request, unauthorized, rate_limited, server_error, overloaded."""
        return {"error": {"message": f"this is {kind}", "type": self.refusals[kind][1], "code": None}}

    def frame(self, item: Any) -> bytes:
        """One event as it is sent."""
        return b"data: " + json.dumps(item).encode() + b"\n\n"

    def frames(self, items: list[dict[str, Any]]) -> bytes:
        return b"".join(map(self.frame, items))


class Chat(Dialect):
    """Chat Completions."""

    name = "chat"
    path = "/chat/completions"
    end = b"data: [DONE]\n\n"
    ends_twice = True
    refusals: ClassVar = {
        "bad_request": (400, "invalid_request_error"), "unauthorized": (401, "authentication_error"),
        "rate_limited": (429, "requests"), "server_error": (500, "server_error"), "overloaded": (503, "unavailable_error"),
    }  # fmt: skip

    def client(self, key: str, url: str, **settings: Any) -> LLMProvider:
        return OpenAIProvider(key, url, api="chat", **settings)

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {"model": self.model, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    @property
    def _usage(self) -> dict[str, Any]:
        return {"prompt_tokens": self.tokens[0], "completion_tokens": self.tokens[1]}

    def opening(self) -> list[dict[str, Any]]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def texts(self, texts: list[str]) -> list[dict[str, Any]]:
        return [self._chunk({"content": text}) for text in texts]

    def call(self, at: int, name: str, arguments: str) -> list[dict[str, Any]]:
        head = {"index": at, "id": f"id-{at}", "type": "function", "function": {"name": name, "arguments": ""}}
        pieces = [arguments[at : at + 5] for at in range(0, len(arguments), 5)]
        rest = [{"index": at, "function": {"arguments": piece}} for piece in pieces]
        return [self._chunk({"tool_calls": [piece]}) for piece in (head, *rest)]

    def closing(self, called: bool = False) -> list[dict[str, Any]]:
        return [self._chunk({}, "tool_calls" if called else "stop"), {"choices": [], "usage": self._usage}]

    def document(self, text: str) -> dict[str, Any]:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return {"model": self.model, "choices": [choice], "usage": self._usage}


class Responses(Dialect):
    """OpenAI's Responses API."""

    name = "responses"
    path = "/responses"
    refusals = Chat.refusals

    def client(self, key: str, url: str, **settings: Any) -> LLMProvider:
        return OpenAIProvider(key, url, api="responses", **settings)

    def asked(self, path: str, body: dict[str, Any]) -> tuple[str, str, bool]:
        content = body["input"][-1]["content"]
        return body["model"], content if isinstance(content, str) else content[-1]["text"], bool(body.get("stream"))

    def opening(self) -> list[dict[str, Any]]:
        return [{"type": "response.created", "response": {"status": "in_progress"}}]

    def texts(self, texts: list[str]) -> list[dict[str, Any]]:
        return [{"type": "response.output_text.delta", "output_index": 0, "delta": text} for text in texts]

    def texts_end(self, texts: list[str]) -> list[dict[str, Any]]:
        item = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "".join(texts)}]}
        return [{"type": "response.output_item.done", "output_index": 0, "item": item}]

    def call(self, at: int, name: str, arguments: str) -> list[dict[str, Any]]:
        item = {"type": "function_call", "call_id": f"id-{at}", "name": name, "arguments": arguments}
        return [
            {"type": "response.function_call_arguments.delta", "output_index": at, "delta": arguments},
            {"type": "response.output_item.done", "output_index": at, "item": item},
        ]

    def _response(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"input_tokens": self.tokens[0], "output_tokens": self.tokens[1]}
        return {"object": "response", "status": "completed", "model": self.model, "output": items, "usage": usage}

    def closing(self, called: bool = False) -> list[dict[str, Any]]:
        return [{"type": "response.completed", "response": self._response([])}]

    def document(self, text: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": text}
        return self._response([{"type": "message", "role": "assistant", "content": [part]}])


class Anthropic(Dialect):
    """Anthropic's Messages."""

    name = "anthropic"
    path = "/messages"
    keep_alive = b'event: ping\ndata: {"type": "ping"}\n\n'
    end = b'event: message_stop\ndata: {"type": "message_stop"}\n\n'
    ends_twice = True
    refusals: ClassVar = {
        "bad_request": (400, "invalid_request_error"), "unauthorized": (401, "authentication_error"),
        "rate_limited": (429, "rate_limit_error"), "server_error": (500, "api_error"), "overloaded": (529, "overloaded_error"),
    }  # fmt: skip

    def client(self, key: str, url: str, **settings: Any) -> LLMProvider:
        return AnthropicProvider(key, url, **settings)

    def asked(self, path: str, body: dict[str, Any]) -> tuple[str, str, bool]:
        content = body["messages"][-1]["content"]
        return body["model"], content if isinstance(content, str) else content[-1]["text"], bool(body.get("stream"))

    def opening(self) -> list[dict[str, Any]]:
        message = {"type": "message", "role": "assistant", "model": self.model, "content": [],
                   "usage": {"input_tokens": self.tokens[0], "output_tokens": 1}}  # fmt: skip
        return [{"type": "message_start", "message": message}, {"type": "ping"}]

    def _block(self, at: int, block: dict[str, Any], deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
        grown = [{"type": "content_block_delta", "index": at, "delta": delta} for delta in deltas]
        opened = {"type": "content_block_start", "index": at, "content_block": block}
        return [opened, *grown]

    def texts(self, texts: list[str]) -> list[dict[str, Any]]:
        return self._block(0, {"type": "text", "text": ""}, [{"type": "text_delta", "text": text} for text in texts])

    def texts_end(self, texts: list[str]) -> list[dict[str, Any]]:
        return [{"type": "content_block_stop", "index": 0}]

    def call(self, at: int, name: str, arguments: str) -> list[dict[str, Any]]:
        pieces = [arguments[at : at + 5] for at in range(0, len(arguments), 5)]
        block = {"type": "tool_use", "id": f"id-{at}", "name": name, "input": {}}
        deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
        return [*self._block(at, block, deltas), {"type": "content_block_stop", "index": at}]

    def closing(self, called: bool = False) -> list[dict[str, Any]]:
        delta = {"stop_reason": "tool_use" if called else "end_turn", "stop_sequence": None}
        return [{"type": "message_delta", "delta": delta, "usage": {"output_tokens": self.tokens[1]}}]

    def document(self, text: str) -> dict[str, Any]:
        usage = {"input_tokens": self.tokens[0], "output_tokens": self.tokens[1]}
        return {"type": "message", "role": "assistant", "model": self.model, "content": [{"type": "text", "text": text}],
                "stop_reason": "end_turn", "usage": usage}  # fmt: skip

    def refusal(self, kind: str) -> dict[str, Any]:
        return {"type": "error", "error": {"type": self.refusals[kind][1], "message": f"this is {kind}"}}

    def frame(self, item: Any) -> bytes:
        name = item.get("type", "error") if isinstance(item, dict) else "message"
        return f"event: {name}\ndata: {json.dumps(item)}\n\n".encode()


class Gemini(Dialect):
    """Google's generateContent."""

    name = "gemini"
    path = "enerateContent"
    refusals: ClassVar = {
        "bad_request": (400, "INVALID_ARGUMENT"), "unauthorized": (401, "UNAUTHENTICATED"),
        "rate_limited": (429, "RESOURCE_EXHAUSTED"), "server_error": (500, "INTERNAL"), "overloaded": (503, "UNAVAILABLE"),
    }  # fmt: skip

    def client(self, key: str, url: str, **settings: Any) -> LLMProvider:
        return GeminiProvider(key, url, **settings)

    def asked(self, path: str, body: dict[str, Any]) -> tuple[str, str, bool]:
        model = path.rpartition("/")[2].partition(":")[0]
        return model, body["contents"][-1]["parts"][-1]["text"], "streamGenerateContent" in path

    def _part(self, part: dict[str, Any], **fields: Any) -> dict[str, Any]:
        candidate = {"content": {"role": "model", "parts": [part]}, "index": 0, **fields}
        return {"candidates": [candidate], "modelVersion": self.model}

    @property
    def _usage(self) -> dict[str, Any]:
        return {"promptTokenCount": self.tokens[0], "candidatesTokenCount": self.tokens[1]}

    def opening(self) -> list[dict[str, Any]]:
        return [{"modelVersion": self.model, "responseId": "a-response"}]

    def texts(self, texts: list[str]) -> list[dict[str, Any]]:
        return [self._part({"text": text}) for text in texts]

    def call(self, at: int, name: str, arguments: str) -> list[dict[str, Any]]:
        return [self._part({"functionCall": {"id": f"id-{at}", "name": name, "args": json.loads(arguments)}})]

    def closing(self, called: bool = False) -> list[dict[str, Any]]:
        return [{**self._part({"text": ""}, finishReason="STOP"), "usageMetadata": self._usage}]

    def document(self, text: str) -> dict[str, Any]:
        return {**self._part({"text": text}, finishReason="STOP"), "usageMetadata": self._usage}

    def refusal(self, kind: str) -> dict[str, Any]:
        status, name = self.refusals[kind]
        return {"error": {"code": status, "message": f"this is {kind}", "status": name}}


class Ollama(Dialect):
    """Ollama's own: a JSON document a line."""

    name = "ollama"
    path = "/api/chat"
    stream_type = "application/x-ndjson"
    keep_alive = b"\n"
    refusals: ClassVar = {
        "bad_request": (400, ""), "unauthorized": (401, ""), "rate_limited": (429, ""), "server_error": (500, ""),
        "overloaded": (503, ""),
    }  # fmt: skip

    def client(self, key: str, url: str, **settings: Any) -> LLMProvider:
        return OllamaProvider(key, url, **settings)

    def asked(self, path: str, body: dict[str, Any]) -> tuple[str, str, bool]:
        return body["model"], body["messages"][-1]["content"], body.get("stream", True)

    def _line(self, message: dict[str, Any], **fields: Any) -> dict[str, Any]:
        return {"model": self.model, "message": {"role": "assistant", **message}, "done": False, **fields}

    def texts(self, texts: list[str]) -> list[dict[str, Any]]:
        return [self._line({"content": text}) for text in texts]

    def call(self, at: int, name: str, arguments: str) -> list[dict[str, Any]]:
        function = {"name": name, "arguments": json.loads(arguments)}
        return [self._line({"content": "", "tool_calls": [{"id": f"id-{at}", "function": function}]})]

    @property
    def _done(self) -> dict[str, Any]:
        return {"done": True, "done_reason": "stop", "prompt_eval_count": self.tokens[0], "eval_count": self.tokens[1]}

    def closing(self, called: bool = False) -> list[dict[str, Any]]:
        return [self._line({"content": ""}, **self._done)]

    def document(self, text: str) -> dict[str, Any]:
        return self._line({"content": text}, **self._done)

    def refusal(self, kind: str) -> dict[str, Any]:
        text = {"overloaded": "server busy, please try again. maximum pending requests exceeded"}.get(kind, f"this is {kind}")
        return {"error": text}

    def frame(self, item: Any) -> bytes:
        return json.dumps(item).encode() + b"\n"


DIALECTS: tuple[type[Dialect], ...] = (Chat, Responses, Anthropic, Gemini, Ollama)


# -- one request and what may be done to it


class Entry(NamedTuple):
    """One attempt, as the server saw it."""

    time: float
    fault: str
    prompt: str
    connection: int


def answer_to(prompt: str) -> str:
    """The complete answer to a prompt: whoever has less, or another's, can be told."""
    return f"This is the whole answer to {prompt}, from its first word to its last."


class Exchange:
    """One request, and the means to answer it well or badly."""

    def __init__(
        self, server: FaultServer, connection: socket.socket, prompt: str, stream: bool, asked: dict[str, Any], key: str
    ) -> None:
        dialect = server.dialect
        self.asked = asked  #: the body of the request
        self.server = server
        self.key = key  #: what the client authenticated itself with
        self.connection = connection
        self.dialect = dialect
        self.prompt = prompt
        self.stream = stream  #: whether the client wants one
        self.number = 0  #: which request for this fault this is, from 1
        self.keep = False  #: whether the connection stays open afterwards
        self.keep_alive = dialect.keep_alive if stream else b"\n"
        self.until = time.monotonic() + PATIENCE
        text = answer_to(prompt)
        self.texts = [text[at : at + 9] for at in range(0, len(text), 9)]
        self.whole = json.dumps(dialect.document(text)).encode()
        if stream:
            self.kind = dialect.stream_type
            self.opening = dialect.frames(dialect.opening())  #: no text yet
            self.part = self.told(self.texts[:4])  #: some text, and no end
            rest = [*dialect.texts_end(self.texts), *dialect.closing()]
            self.complete = self.told(self.texts) + dialect.frames(rest)  #: all but the end marker
            self.body = self.complete + dialect.end
        else:
            self.kind = "application/json"
            self.opening = b"{"
            self.complete = self.body = self.whole
            self.part = self.whole[: len(self.whole) * 2 // 3]

    def told(self, texts: list[str]) -> bytes:
        """The beginning of a stream, as far as these texts."""
        return self.opening + self.dialect.frames(self.dialect.texts(texts))

    def more(self, text: str) -> bytes:
        """One more event with text, after ``part``."""
        return self.dialect.frame(self.dialect.texts([text])[-1])

    def error(self, kind: str) -> bytes:
        """An error where an answer should be: an event, or a document."""
        body = self.dialect.refusal(kind)
        return self.dialect.frame(body) if self.stream else json.dumps(body).encode()

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def head(self, *headers: str, status: str = "200 OK", kind: str | None = None) -> None:
        """Status line and headers, with the content type of a healthy answer."""
        lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind or self.kind}", *headers, "", ""]
        self.send("\r\n".join(lines).encode("latin-1"))

    def chunk(self, data: bytes) -> None:
        self.send(b"%x\r\n%s\r\n" % (len(data), data))

    def end(self) -> None:
        """The last chunk: the connection may serve the next request."""
        self.send(b"0\r\n\r\n")
        self.keep = True

    def reply(self, status: str, body: bytes, *headers: str, kind: str = "application/json") -> None:
        """A whole answer with its length, well-formed as HTTP goes."""
        self.head(f"Content-Length: {len(body)}", *headers, status=status, kind=kind)
        self.send(body)
        self.keep = True

    def ok(self, body: bytes | None = None, *headers: str) -> None:
        """A healthy answer, chunk by chunk if a stream is wanted; or this body in its place."""
        body = self.body if body is None else body
        if not self.stream:
            return self.reply("200 OK", body, *headers)
        self.head("Transfer-Encoding: chunked", *headers)
        self.send(chunked(*(piece + b"\n\n" for piece in body.split(b"\n\n") if piece)))
        self.keep = True

    def refuse(self, kind: str, *headers: str) -> None:
        """A refusal in the dialect's own words."""
        body = json.dumps(self.dialect.refusal(kind)).encode()
        self.reply(f"{self.dialect.refusals[kind][0]} No", body, *headers)

    def wait(self, seconds: float) -> bool:
        """Wait; False when it is time to give up."""
        return not self.server.stopping.wait(seconds) and time.monotonic() < self.until

    def hang(self) -> None:
        """Say nothing, until the client goes away."""
        self.connection.settimeout(PATIENCE)
        self.connection.recv(1)

    def drip(self, data: bytes, gap: float = 0.02) -> None:
        """A byte at a time."""
        for at in range(len(data)):
            self.send(data[at : at + 1])
            if not self.wait(gap):
                return

    def gush(self, data: bytes, gap: float = 0.0) -> None:
        """The same again and again."""
        self.send(data)
        while self.wait(gap):
            self.send(data)

    def reset(self) -> None:
        """Close with RST and not with FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


class Fault(NamedTuple):
    """A registered fault."""

    name: str
    serve: Callable[[Exchange], Any]
    only: type[Dialect] | None


FAULTS: dict[str, Fault] = {}


def fault(serve: Any = None, *, name: str = "", only: type[Dialect] | None = None) -> Any:
    """Register a function of one Exchange under its own name or the one given."""
    if serve is None:
        return lambda given: fault(given, name=name, only=only)
    known = Fault(name or serve.__name__, serve, only)
    assert known.name not in FAULTS, f"two faults are called {known.name}"
    FAULTS[known.name] = known
    return serve


class FaultServer(Peer):
    """Serves the fault that the model's name says; ``pick(model)`` may choose another one instead."""

    def __init__(self, dialect: Dialect | None = None, pick: Callable[[str], str] | None = None) -> None:
        self.dialect = dialect or Chat()
        self.log: list[Entry] = []
        self._pick = pick
        self._seen: dict[str, int] = {}
        self._numbering = threading.Lock()
        super().__init__(FaultServer._exchange)

    def count(self, name: str) -> int:
        """How many requests were for this fault."""
        return sum(entry.fault == name for entry in self.log)

    @staticmethod
    def _key_in(head: bytes) -> str:
        for line in head.decode("latin-1").split("\r\n"):
            name, _, value = line.partition(":")
            if name.lower() in ("authorization", "api-key", "x-api-key", "x-goog-api-key"):
                return value.strip().removeprefix("Bearer ")
        return ""

    def _exchange(self, connection: socket.socket, request: bytes) -> bool:
        now = time.monotonic()
        self.requests.clear()  # the log is enough, and takes less room
        head, _, body = request.partition(b"\r\n\r\n")
        method, path, _ = head.decode("latin-1").split(" ", 2)
        if method != "POST" or self.dialect.path not in path:
            stolen = b'{"choices": [{"message": {"content": "from somewhere else"}}], "data": []}'
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(stolen) + stolen)
            return True
        asked = json.loads(body)
        model, prompt, stream = self.dialect.asked(path, asked)
        known = FAULTS[self._pick(model) if self._pick else model]
        exchange = Exchange(self, connection, prompt, stream, asked, self._key_in(head))
        with self._numbering:
            exchange.number = self._seen[known.name] = self._seen.get(known.name, 0) + 1
            self.log.append(Entry(now, known.name, prompt, connection.getpeername()[1]))
        known.serve(exchange)
        return exchange.keep


@contextmanager
def fault_server(dialect: Dialect | None = None, pick: Callable[[str], str] | None = None) -> Iterator[FaultServer]:
    """A FaultServer for the time of a with block."""
    server = FaultServer(dialect, pick)
    try:
        yield server
    finally:
        server.stop()


# -- no fault at all


@fault
def healthy(x: Exchange) -> None:
    """A good answer."""
    x.ok()


@fault
def healthy_without_end_marker(x: Exchange) -> None:
    """Complete, but nothing says so after the finish reason."""
    x.ok(x.complete)


@fault(only=Chat)
def healthy_without_finish_reason(x: Exchange) -> None:
    """An end marker is as good as a finish reason."""
    x.ok(x.told(x.texts) + x.dialect.end if x.stream else x.body)


@fault
def healthy_until_closed(x: Exchange) -> None:
    """Its end is the connection's."""
    x.head("Connection: close")
    x.send(x.body)


@fault
def healthy_http_1_0(x: Exchange) -> None:
    """An old server, without a reason phrase."""
    x.send(f"HTTP/1.0 200\r\nContent-Type: {x.kind}\r\n\r\n".encode() + x.body)


@fault
def healthy_after_keep_alives(x: Exchange) -> None:
    """Signs of life before and in between."""
    x.ok(x.keep_alive * 3 + x.body)


@fault
def healthy_then_silence(x: Exchange) -> None:
    """The answer is complete, but its body never ends."""
    x.head("Transfer-Encoding: chunked")
    x.chunk(x.complete)
    x.hang()


@fault
def healthy_then_reset(x: Exchange) -> None:
    """The answer is complete, but the connection breaks before its body ends."""
    x.head("Transfer-Encoding: chunked")
    x.chunk(x.complete)
    x.wait(0.05)
    x.reset()


@fault
def continue_first(x: Exchange) -> None:
    """100 Continue, which nobody asked for, then a good answer."""
    x.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    x.ok()


@fault
def early_hints_first(x: Exchange) -> None:
    """103 Early Hints, a little later a good answer."""
    x.send(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n")
    x.wait(0.1)
    x.ok()


@fault
def invalid_utf8(x: Exchange) -> None:
    """A byte that is no UTF-8 in the middle of the text."""
    x.ok(x.body.replace(b"answer", b"ans\xffer"))


@fault
def compressed(x: Exchange) -> None:
    """gzip, though nobody asked for it."""
    x.reply("200 OK", gzip.compress(x.body), "Content-Encoding: gzip", kind=x.kind)


# -- time


@fault
def endless_status_line(x: Exchange) -> None:
    """A reason phrase that goes on and on, a byte at a time."""
    x.send(b"HTTP/1.1 200 ")
    x.gush(b"O", 0.02)


@fault
def dripped_status_line(x: Exchange) -> None:
    """A good answer, but a byte at a time from the very first."""
    x.drip(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + x.body)


@fault
def dripped_headers(x: Exchange) -> None:
    """Headers that take a long time."""
    x.send(b"HTTP/1.1 200 OK\r\n")
    for number in range(90):
        x.drip(b"X-Header-%d: value\r\n" % number)


@fault
def dripped_body(x: Exchange) -> None:
    """A good answer, a byte at a time."""
    x.head("Connection: close")
    x.drip(x.body)


@fault
def dripped_chunk_size(x: Exchange) -> None:
    """The line that tells a chunk's size never ends."""
    x.head("Transfer-Encoding: chunked")
    x.send(b"5;")
    x.gush(b"x", 0.02)


@fault
def dripped_refusal(x: Exchange) -> None:
    """An error whose body drips."""
    x.head("Content-Length: 10000", status="500 Oops", kind="application/json")
    x.drip(b" " * 10000)


@fault
def keep_alives_for_ever(x: Exchange) -> None:
    """Signs of life, and never an answer."""
    x.head("Connection: close")
    x.gush(x.keep_alive, 0.02)


@fault
def blank_lines_for_ever(x: Exchange) -> None:
    """The same with blank lines."""
    x.head("Connection: close")
    x.gush(b"\r\n", 0.02)


@fault
def keep_alives_in_the_middle(x: Exchange) -> None:
    """Text, then only signs of life."""
    x.head("Connection: close")
    x.send(x.part)
    x.gush(x.keep_alive, 0.02)


@fault
def nothing_but_a_beginning(x: Exchange) -> None:
    """Opening events again and again, without any text."""
    x.head("Connection: close")
    x.gush(x.opening if x.stream else b" ", 0.02)


@fault
def silence(x: Exchange) -> None:
    """Nothing at all."""
    x.hang()


@fault
def silence_after_headers(x: Exchange) -> None:
    """Headers, then nothing."""
    x.head("Connection: close")
    x.hang()


@fault
def silence_after_the_beginning(x: Exchange) -> None:
    """The opening events, then nothing."""
    x.head("Connection: close")
    x.send(x.opening)
    x.hang()


@fault
def stall(x: Exchange) -> None:
    """Some text, then nothing."""
    x.head("Transfer-Encoding: chunked")
    x.chunk(x.part)
    x.hang()


@fault
def late_first_token(x: Exchange) -> None:
    """Headers at once, and the answer after twenty seconds."""
    x.head("Connection: close")
    if x.wait(20):
        x.send(x.body)


@fault
def stall_after_20_tokens(x: Exchange) -> None:
    """An answer of sixty that stops."""
    x.head("Connection: close")
    x.send(x.told([f"{number} " for number in range(20)]) if x.stream else x.part)
    x.hang()


@fault
def long_content_length(x: Exchange) -> None:
    """The connection stays open, but half of what was promised does not come."""
    x.head(f"Content-Length: {2 * len(x.body)}")
    x.send(x.part)
    x.hang()


@fault
def slow_tokens(x: Exchange) -> None:
    """Text all the time, but too slowly for any deadline."""
    x.head("Connection: close")
    x.send(x.part)
    x.gush(x.more("more ") if x.stream else b" ", 0.05)


@fault
def endless_interim_answers(x: Exchange) -> None:
    """100 Continue for ever."""
    x.gush(b"HTTP/1.1 100 Continue\r\n\r\n", 0.02)


@fault
def endless_early_hints(x: Exchange) -> None:
    """103 for ever."""
    x.gush(b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.02)


# -- broken connections


@fault
def reset_before_headers(x: Exchange) -> None:
    x.reset()


@fault
def closed_before_headers(x: Exchange) -> None:
    """As quiet as it is."""


@fault
def closed_in_the_status_line(x: Exchange) -> None:
    x.send(b"HTTP/1.1 2")


@fault
def closed_in_the_headers(x: Exchange) -> None:
    x.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-str")


@fault
def reset_in_the_headers(x: Exchange) -> None:
    x.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-str")
    x.wait(0.05)
    x.reset()


@fault
def closed_after_headers(x: Exchange) -> None:
    x.head("Connection: close")


@fault
def cut_chunked(x: Exchange) -> None:
    """A chunk that promises more than comes."""
    x.head("Transfer-Encoding: chunked")
    x.send(b"%x\r\n" % (2 * len(x.body)) + x.part)


@fault
def cut_between_chunks(x: Exchange) -> None:
    x.head("Transfer-Encoding: chunked")
    x.chunk(x.part)


@fault
def cut_until_closed(x: Exchange) -> None:
    """No exception in the world tells this from a good end."""
    x.head("Connection: close")
    x.send(x.part)


@fault
def cut_after_40_tokens(x: Exchange) -> None:
    """An answer of sixty that ends."""
    x.head("Connection: close")
    x.send(x.told([f"{number} " for number in range(40)]) if x.stream else x.part)


@fault
def short_content_length(x: Exchange) -> None:
    """The server stops in the middle of what it promised."""
    x.head(f"Content-Length: {len(x.body)}")
    x.send(x.part)


@fault
def content_length_too_short(x: Exchange) -> None:
    """The server promises less than it sends."""
    x.head(f"Content-Length: {len(x.part)}", "Connection: close")
    x.send(x.body)


@fault
def ended_too_early(x: Exchange) -> None:
    """A proper end of the body, but not of the answer."""
    x.head("Transfer-Encoding: chunked")
    x.chunk(x.part)
    x.end()


@fault
def cut_in_a_character(x: Exchange) -> None:
    """Inside an event, inside a character."""
    x.head("Connection: close")
    x.send(x.part + b'data: {"choices": [{"delta": {"content": "\xc3')


@fault
def reset_in_the_body(x: Exchange) -> None:
    x.head("Transfer-Encoding: chunked")
    x.chunk(x.part)
    x.wait(0.05)
    x.reset()


@fault
def closed_while_idle(x: Exchange) -> None:
    """A good answer on a connection that is then closed without a word."""
    x.ok()
    x.keep = False


@fault
def dropped_on_reuse(x: Exchange) -> None:
    """Every second request, which comes on a kept connection, is met with a closed door."""
    if x.number != 2:
        x.ok()


@fault
def a_second_answer(x: Exchange) -> None:
    """A good answer, and in the same breath another one that nobody asked for."""
    other = json.dumps(x.dialect.document("the answer to something else")).encode()
    head = "HTTP/1.1 200 OK\r\nContent-Type: {}\r\nContent-Length: {}\r\n\r\n"
    x.send(b"".join(head.format(kind, len(body)).encode() + body for kind, body in ((x.kind, x.body), (x.kind, other))))
    x.keep = True


# -- garbled HTTP


@fault
def not_http(x: Exchange) -> None:
    x.send(b"SSH-2.0-OpenSSH_9.6\r\n")


@fault
def html_without_headers(x: Exchange) -> None:
    x.send(b"<html><body>Welcome to the hotel's network</body></html>")


@fault
def huge_header(x: Exchange) -> None:
    x.head("X-Huge: " + "x" * 100_000)
    x.send(x.body)


@fault
def too_many_headers(x: Exchange) -> None:
    x.head(*(f"X-{number}: y" for number in range(500)), "Connection: close")
    x.send(x.body)


@fault
def bad_chunk_size(x: Exchange) -> None:
    x.head("Transfer-Encoding: chunked")
    x.send(b"not a number\r\n" + x.part)


@fault
def switching_protocols(x: Exchange) -> None:
    x.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n")
    x.hang()


@fault
def no_content(x: Exchange) -> None:
    x.send(b"HTTP/1.1 204 No Content\r\n\r\n")
    x.keep = True


@fault
def empty_body(x: Exchange) -> None:
    x.reply("200 OK", b"")


@fault
def strange_content_length(x: Exchange) -> None:
    """A superscript two, which is a digit to some and a number to none."""
    x.head("Content-Length: \xb2", "Connection: close")
    x.send(x.body)


@fault
def enormous_content_length(x: Exchange) -> None:
    """More digits than anybody converts."""
    x.head("Content-Length: " + "9" * 6000, "Connection: close")
    x.send(x.part)


# -- redirects


@fault
def redirect_302(x: Exchange) -> None:
    x.reply("302 Found", b"", f"Location: http://127.0.0.1:{x.server.port}/elsewhere")


@fault
def redirect_307(x: Exchange) -> None:
    x.reply("307 Temporary Redirect", b"", "Location: /elsewhere")


@fault
def redirect_without_location(x: Exchange) -> None:
    x.reply("308 Permanent Redirect", b"<html>moved</html>", kind="text/html")


# -- memory


@fault
def endless_body(x: Exchange) -> None:
    """White space for ever, as fast as the client takes it."""
    x.head("Connection: close")
    x.gush((x.keep_alive * 65536)[:65536], 0.01)


@fault
def endless_line(x: Exchange) -> None:
    x.head("Connection: close")
    x.send(x.part)
    x.gush(b"x" * 65536, 0.01)


@fault
def endless_text(x: Exchange) -> None:
    """A model that never stops."""
    x.head("Connection: close")
    x.send(x.part)
    x.gush(x.more("again and again " * 4000) if x.stream else b" " * 65536, 0.01)


@fault
def endless_refusal(x: Exchange) -> None:
    """An error body without end."""
    x.head("Connection: close", status="500 Oops")
    x.gush(b" " * 65536, 0.01)


BOMB = gzip.compress(b" " * 40_000_000)


@fault
def gzip_bomb(x: Exchange) -> None:
    x.reply("200 OK", BOMB, "Content-Encoding: gzip", kind=x.kind)


# -- garbled bodies


@fault
def invalid_gzip(x: Exchange) -> None:
    x.reply("200 OK", x.body, "Content-Encoding: gzip", kind=x.kind)


@fault
def cut_gzip(x: Exchange) -> None:
    """The body has the length that it says, but the compressed data stop half-way."""
    data = gzip.compress(x.body)
    x.reply("200 OK", data[: len(data) // 2], "Content-Encoding: gzip", kind=x.kind)


@fault
def unknown_coding(x: Exchange) -> None:
    x.reply("200 OK", x.body, "Content-Encoding: br", kind=x.kind)


@fault
def html(x: Exchange) -> None:
    """A login page in place of an answer."""
    x.reply("200 OK", b"<!doctype html><title>Sign in</title>", kind="text/html; charset=utf-8")


@fault
def html_as_stream(x: Exchange) -> None:
    """The same under the content type of an answer."""
    x.reply("200 OK", b"<!doctype html>\n\n<title>Sign in</title>", kind=x.kind)


@fault
def json_as_stream(x: Exchange) -> None:
    """A whole answer, cut, that calls itself a stream."""
    x.reply("200 OK", x.whole[:-9], kind=x.dialect.stream_type)


@fault
def wrong_content_type(x: Exchange) -> None:
    """An image, it says."""
    x.reply("200 OK", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), kind="image/png")


@fault
def invalid_json(x: Exchange) -> None:
    x.reply("200 OK", b'{"choices": [{"message": {"content": "This is the whole', kind="application/json")


@fault
def deep_json(x: Exchange) -> None:
    """Nested more deeply than any parser likes."""
    x.reply("200 OK", b"[" * 200_000)


@fault
def garbled_event(x: Exchange) -> None:
    """One event in the middle that cannot be read: it may have held text."""
    half = x.more("half")[:-9] + x.dialect.frame({})[-1:] * 2
    x.ok(x.part + half + x.body[len(x.part) :] if x.stream else x.body[:-7])


# -- refusals, in the dialect's words


@fault
def server_error_once(x: Exchange) -> None:
    x.refuse("server_error") if x.number == 1 else x.ok()


@fault
def reset_once(x: Exchange) -> None:
    x.reset() if x.number == 1 else x.ok()


@fault
def rate_limited_once(x: Exchange) -> None:
    """With a short hint: it pays to wait."""
    x.refuse("rate_limited", "Retry-After: 0.05") if x.number == 1 else x.ok()


@fault
def rate_limited_for_two_seconds(x: Exchange) -> None:
    """As much as anybody waits for."""
    x.refuse("rate_limited", "Retry-After: 2") if x.number == 1 else x.ok()


@fault
def error_in_a_stream(x: Exchange) -> None:
    """At status 200, after some text."""
    x.ok(x.part + x.error("overloaded") if x.stream else x.error("overloaded"))


@fault
def error_instead_of_a_stream(x: Exchange) -> None:
    """At status 200, as the first thing."""
    x.ok(x.error("overloaded"))


#: Name -> a kind of refusal and its headers: the retry hints that a header can give.
HINTS = {
    "hint_seconds": "Retry-After: 30",
    "hint_float": "Retry-After: 30.4",
    "hint_milliseconds": "retry-after-ms: 30000",
    "hint_milliseconds_first": "Retry-After: 99\r\nretry-after-ms: 30000",
    "hint_hours": "Retry-After: 86400",
    "hint_nonsense": "Retry-After: soon",
    "hint_negative": "Retry-After: -30",
    "hint_nan": "Retry-After: nan",
    "hint_infinite": "Retry-After: inf",
    "hint_huge": "Retry-After: 1e308",
    "hint_past_date": "Retry-After: Thu, 01 Jan 1970 00:00:00 GMT",
    "hint_impossible_date": "Retry-After: Thu, 99 Foo 1970 99:00:00 GMT",
    "hint_reset_duration": "x-ratelimit-remaining-tokens: 0\r\nx-ratelimit-reset-tokens: 1m30s",
    "hint_absent": "X-Nothing: 1",
}
for _name, _header in HINTS.items():
    fault(lambda x, header=_header: x.refuse("rate_limited", header), name=_name)


@fault
def hint_date(x: Exchange) -> None:
    x.refuse("rate_limited", f"Retry-After: {formatdate(time.time() + 30.5, usegmt=True)}")


#: Pages of gateways: name -> status and reason.
PAGES = {
    "page_404": "404 Not Found", "page_408": "408 Request Timeout", "page_409": "409 Conflict", "page_413": "413 Too Large",
    "page_425": "425 Too Early", "page_500": "500 Internal Server Error", "page_502": "502 Bad Gateway",
    "page_503": "503 Service Unavailable", "page_504": "504 Gateway Timeout", "page_520": "520 Unknown Error",
    "page_529": "529 Site Is Overloaded", "page_600": "600 What", "page_401": "401 Unauthorized", "page_403": "403 Forbidden",
    "page_429": "429 Too Many Requests", "page_402": "402 Payment Required", "page_410": "410 Gone",
}  # fmt: skip
for _name, _status in PAGES.items():
    fault(lambda x, status=_status: x.reply(status, b"<h1>" + status.encode() + b"</h1>", kind="text/html"), name=_name)


# -- Chat Completions only

#: Refusals as they are found in the wild: name -> status and body.
REFUSALS: dict[str, tuple[int, Any]] = {
    "bad_request": (400, {"error": {"message": "Invalid 'messages'", "type": "invalid_request_error", "code": None}}),
    "error_is_text": (400, {"error": "n_predict is wrong"}),
    "error_is_a_list": (400, [{"error": {"code": 400, "message": "wrong", "status": "INVALID_ARGUMENT"}}]),
    "error_is_a_number": (500, {"error": 7}),
    "error_is_null": (500, {"error": None}),
    "detail_list": (422, {"detail": [{"loc": ["body", "x"], "msg": "field required", "type": "missing"}]}),
    "top_level_error": (400, {"object": "error", "message": "bad", "type": "BadRequestError", "code": 40001}),
    "invalid_key": (401, {"error": {"message": "Incorrect API key provided: sk-te***7890.", "code": "invalid_api_key"}}),
    "country": (403, {"error": {"message": "no", "code": "unsupported_country_region_territory"}}),
    "no_model": (404, {"error": {"message": "The model `no_model` does not exist.", "code": "model_not_found"}}),
    "no_model_vllm": (404, {"object": "error", "message": "The model `x` does not exist.", "type": "NotFoundError"}),
    "no_model_loaded": (404, {"error": {"message": "No models loaded. Please load a model.", "code": None}}),
    "wrong_path": (200, {"error": "Unexpected endpoint or method. (POST /chat/completions)"}),
    "context_length": (400, {"error": {"message": "too long", "code": "context_length_exceeded"}}),
    "context_length_vllm": (400, {"message": "This model's maximum context length is 5 tokens. However, you requested 9"}),
    "context_length_500": (500, {"error": {"message": "exceeds the available context size", "type": "server_error"}}),
    "context_length_200": (200, {"error": "Trying to keep the first 9 tokens when context the overflows."}),
    "too_large_for_the_limit": (429, {"error": {"message": "Request too large for gpt on tokens per min", "type": "tokens"}}),
    "no_quota": (429, {"error": {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": "x"}}),
    "spend_limit": (429, {"error": {"message": "x", "type": "insufficient_quota", "code": "project_spend_limit_exceeded"}}),
    "no_balance": (402, {"error": {"message": "Insufficient Balance"}}),
    "hint_in_the_body": (429, {"error": {"message": "Please try again in 20s.", "code": "rate_limit_exceeded"}}),
    "policy": (400, {"error": {"message": "no", "code": "content_policy_violation"}}),
    "policy_azure": (400, {"error": {"message": "filtered", "code": "content_filter", "innererror": {"code": "x"}}}),
    "moderation": (403, {"error": {"code": 403, "message": "flagged", "metadata": {"reasons": ["violence"]}}}),
    "no_tools": (400, {"error": {"message": "this model does not support tools"}}),
    "failed_tool_call": (400, {"error": {"message": "Failed to call a function.", "code": "tool_use_failed"}}),
    "loading": (503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}),
    "overloaded_503": (503, {"error": {"message": "The engine is currently overloaded", "type": "server_error"}}),
    "capacity": (498, {"error": {"message": "x", "code": "capacity_exceeded"}}),
    "server_error": (500, {"error": {"message": "The server had an error", "type": "server_error", "code": None}}),
    "nothing_said": (500, {}),
    "code_superscript": (500, {"error": {"message": "x", "code": "\xb2", "status_code": "\xb2"}}),
    "message_to_search_for_ever": (400, {"error": {"message": "n_keep " * 30_000}}),
    "message_is_an_object": (400, {"error": {"message": {"a": ["b"]}, "code": {"c": 1}, "type": [], "param": 4}}),
    "error_200": (200, {"error": {"code": 502, "message": "upstream broke"}}),
    "error_200_text": (200, {"error": "something broke"}),
    "error_200_list": (200, [{"error": {"code": 429, "message": "slower, please"}}]),
    "error_200_choice": (200, {"choices": [{"error": {"code": 503, "message": "gone"}, "finish_reason": "error"}]}),
    "error_200_reason": (200, {"choices": [{"message": {"role": "assistant", "content": "hal"}, "finish_reason": "error"}]}),
}  # fmt: skip
for _name, (_number, _body) in REFUSALS.items():
    fault(lambda x, status=_number, body=_body: x.reply(f"{status} So", json.dumps(body).encode()), name=_name, only=Chat)


def _choice(message: Any, finish: Any = "stop", **fields: Any) -> dict[str, Any]:
    return {"choices": [{"message": message, "finish_reason": finish}], **fields}


#: Whole answers that are none: name -> body.
WRONG: dict[str, Any] = {
    "empty_text": _choice({"content": ""}),
    "no_text": _choice({"content": None}),
    "blank_text": _choice({"content": " \n\t "}),
    "no_message": _choice(None),
    "message_is_text": _choice("hello"),
    "message_is_a_list": _choice(["hello"]),
    "content_is_a_number": _choice({"content": 42}),
    "content_is_an_object": _choice({"content": {"text": "hello"}}),
    "content_is_true": _choice({"content": True}),
    "content_is_an_empty_list": _choice({"content": []}),
    "finish_is_a_number": _choice({"content": "hello"}, 7),
    "calls_are_text": _choice({"content": None, "tool_calls": "f()"}),
    "calls_are_numbers": _choice({"content": None, "tool_calls": [1, 2]}),
    "call_without_a_name": _choice({"content": None, "tool_calls": [{"id": "a", "function": {"arguments": "{}"}}]}),
    "arguments_are_a_list": _choice({"content": None, "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}),
    "no_choices": {"choices": []},
    "choices_absent": {"id": "x", "object": "chat.completion", "model": "m"},
    "choices_null": {"choices": None},
    "choices_text": {"choices": "hello"},
    "choices_object": {"choices": {"0": {"message": {"content": "hello"}}}},
    "choices_of_null": {"choices": [None]},
    "choices_of_text": {"choices": ["hello"]},
    "choice_is_empty": {"choices": [{}]},
    "body_is_a_list": [],
    "body_is_text": "hello",
    "body_is_a_number": 1,
    "body_is_null": None,
    "body_is_empty": {},
    "cut_by_length": _choice({"content": ""}, "length"),
    "filtered": _choice({"content": None}, "content_filter"),
    "refused": _choice({"content": None, "refusal": "I cannot help with that."}),
}  # fmt: skip
for _name, _body in WRONG.items():
    fault(lambda x, body=_body: x.reply("200 OK", json.dumps(body).encode()), name=_name, only=Chat)

#: Events in the middle of a stream that make it none: name -> event.
WRONG_EVENTS: dict[str, bytes] = {
    "event_is_text": b'data: "hello"\n\n',
    "event_is_a_number": b"data: 7\n\n",
    "event_is_null": b"data: null\n\n",
    "event_is_a_list": b"data: [1]\n\n",
    "event_is_an_empty_list": b"data: []\n\n",
    "event_without_choices": b'data: {"id": "x"}\n\n',
    "event_choices_text": b'data: {"choices": "x"}\n\n',
    "event_choice_null": b'data: {"choices": [null]}\n\n',
    "event_delta_text": b'data: {"choices": [{"delta": "x"}]}\n\n',
    "event_content_number": b'data: {"choices": [{"delta": {"content": 5}}]}\n\n',
    "event_cut_json": b'data: {"choices": [{"delta": {"content": "whole ans\n\n',
    "event_named_error": b'event: error\ndata: {"message": "gone", "code": 500}\n\n',
    "event_old_error": b'error: {"code": 500, "message": "slot gone", "type": "server_error"}\n\n',
    "event_error_text": b'data: {"error": "broken pipe"}\n\n',
    "event_error_list": b'data: [{"error": {"message": "x"}}]\n\n',
    "event_finish_error": b'data: {"choices": [{"delta": {}, "finish_reason": "error"}]}\n\n',
}
for _name, _event in WRONG_EVENTS.items():
    fault(lambda x, odd=_event: x.ok(x.part + odd + x.body[len(x.part) :] if x.stream else x.part), name=_name, only=Chat)


@fault(only=Chat)
def echoes_the_request(x: Exchange) -> None:
    """Repeats the key and the prompt wherever there is room."""
    echo = f"{x.key} {x.prompt}"
    error = {"message": f"You sent {echo}", "type": echo, "code": echo, "param": echo}
    x.reply("400 Bad Request", json.dumps({"error": error}).encode(), f"X-Echo: {echo}", kind=f"application/json; of={x.key}")


@fault(only=Chat)
def echoes_the_request_in_headers(x: Exchange) -> None:
    """The same where a content type and a coding should stand."""
    x.reply("200 OK", b"no JSON", f"X-Request-Id: {x.prompt}", kind=x.key)


@fault(only=Chat)
def echoes_the_key_as_coding(x: Exchange) -> None:
    x.reply("200 OK", x.body, f"Content-Encoding: {x.key}")


@fault(only=Chat)
def strange_but_complete(x: Exchange) -> None:
    """Types that are wrong where it does not matter: the answer counts."""
    odd = {"choices": [{"message": {"content": answer_to(x.prompt), "refusal": 0, "reasoning": [1]}, "finish_reason": "eos",
           "index": "x"}], "usage": "many", "model": 5, "error": None, "id": None}  # fmt: skip
    x.reply("200 OK", json.dumps(odd).encode(), kind="text/plain")


@fault(only=Chat)
def stream_by_the_book(x: Exchange) -> None:
    """A byte order mark, CR and CRLF, no space after the colon, data in several lines, comments, U+2028 in the text."""
    body = x.body
    if x.stream:
        body = b"\xef\xbb\xbf" + body.replace(b"\n\n", b"\r\n\r\n", 2).replace(b'"choices"', b'\ndata: "choices"')
        body = body.replace(b"data: [DONE]\n\n", b"data:[DONE]\r\r").replace(b"data: {", b": \xe2\x80\xa8\ndata:{")
        body = body.replace(b"answer", "ans\u2028er".encode())
    x.ok(body)


@fault(only=Chat)
def healthy_without_prefill(x: Exchange) -> None:
    """Answers, but never goes on with somebody else's answer."""
    if x.asked["messages"][-1]["role"] == "assistant":
        body = {"error": {"message": "No assistant message prefill here.", "type": "invalid_request_error"}}
        return x.reply("400 Bad Request", json.dumps(body).encode())
    x.ok()


@fault(only=Chat)
def refuses_a_hint(x: Exchange) -> None:
    """Refuses temperature by name, and answers without it."""
    if x.number == 1:
        message = "Unsupported value: 'temperature' does not support 0.2 with this model."
        body = {"error": {"message": message, "param": "temperature", "code": "unsupported_value"}}
        return x.reply("400 Bad Request", json.dumps(body).encode())
    x.ok()
