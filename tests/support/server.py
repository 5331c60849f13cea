"""A loopback HTTP server whose answers a test gives, and providers that talk to it."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from requests.adapters import BaseAdapter, HTTPAdapter
from urllib3 import HTTPResponse
from urllib3._collections import HTTPHeaderDict

from copilot_router import (AnthropicProvider, GeminiProvider, LLMResponse, LMStudioProvider,
    OllamaProvider, OpenAIProvider, ProviderError)

KEY = "sk-test-server-key-1234567890"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": CITY}}]
USER = {"role": "user", "content": "q"}
#: Writes to the connection; true keeps it open for the next request.
Serve = Callable[[Any, socket.socket, bytes], bool]


class Request(NamedTuple):
    """What came in."""
    path: str
    headers: dict[str, str]  #: names in lower case
    body: Any  #: the JSON; {} without a body


def parsed(request: bytes) -> Request:
    top, _, body = request.partition(b"\r\n\r\n")
    first, *lines = top.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    return Request(first.split(" ")[1], headers, json.loads(body) if body else {})


class Peer:
    """A raw server on loopback: ``serve(server, connection, request)`` answers each request."""
    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self.connections = 0
        self.requests: list[Any] = []  #: the bytes of each
        self.stopping = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._threads = {threading.Thread(target=self._accept)}
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

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

    def note(self, request: bytes) -> None:
        self.requests.append(request)

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
            while (request := received(connection)) and not self.stopping.is_set():
                self.note(request)
                if not self._serve(self, connection, request):
                    return
        except OSError:
            pass  # the client is gone
        finally:
            self._open.discard(connection)
            connection.close()
            self._threads.discard(threading.current_thread())

    def drip(self, connection: socket.socket, data: bytes, gap: float = 0.02) -> None:
        """One byte at a time."""
        for at in range(len(data)):
            connection.sendall(data[at : at + 1])
            if self.stopping.wait(gap):
                return


class Dripping(Peer):
    """Sends these bytes or pieces one by one to whoever connects, with pauses, and stays silent."""
    def __init__(self, pieces: bytes | list[bytes]) -> None:
        self.pieces = [bytes([one]) if isinstance(one, int) else one for one in pieces]
        super().__init__(lambda *_: False)

    def _talk(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            for piece in self.pieces:
                connection.sendall(piece)
                self.stopping.wait(0.03)
            self.stopping.wait(30)
        self._threads.discard(threading.current_thread())


def received(connection: socket.socket) -> bytes:
    """One request in full; nothing when the client has gone."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (piece := connection.recv(65536)):
            return b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    named = (line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    length = next((int(line[15:]) for line in named), 0)
    while len(body) < length:
        if not (piece := connection.recv(65536)):
            return b""
        body += piece
    return head + b"\r\n\r\n" + body


class Server(Peer):
    """Each request takes the next answer, and the last one stays. ``requests`` are parsed.

    An answer is the bytes of a whole HTTP answer, or a function that writes to the connection.
    """
    def __init__(self, *answers: bytes | Serve) -> None:
        self.answers = list(answers)
        super().__init__(Server._next)
        self.url = self.url.removesuffix("/v1")

    @property
    def bodies(self) -> list[Any]:
        return [request.body for request in self.requests]

    def note(self, request: bytes) -> None:
        self.requests.append(parsed(request))

    def _next(self, connection: socket.socket, request: bytes) -> bool:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if not isinstance(answer, bytes):
            return answer(self, connection, request)
        connection.sendall(answer)
        head = answer.partition(b"\r\n\r\n")[0].lower()
        return b"\ncontent-length:" in head or b"\ntransfer-encoding:" in head


# -- answers
#: Of a stream that ends when the connection is closed.
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def reply(body: Any, status: int = 200, kind: str = "application/json", **headers: str) -> bytes:
    """A whole HTTP answer: JSON, or bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(data)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def sse(*events: Any, done: bool = False) -> bytes:
    """Server-sent events; bytes stay as they are. An event with a type bears it as its name."""
    found = b""
    for event in events:
        if isinstance(event, bytes):
            found += event
            continue
        if isinstance(event, dict) and isinstance(event.get("type"), str):
            found += f"event: {event['type']}\n".encode()
        found += b"data: " + json.dumps(event).encode() + b"\n\n"
    return found + b"data: [DONE]\n\n" * done


def stream(*events: Any, done: bool = False, kind: str = "text/event-stream") -> bytes:
    return reply(sse(*events, done=done), kind=kind)


def lines(*items: Any, kind: str = "application/x-ndjson") -> bytes:
    data = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in items]
    return reply(b"\n".join(data) + b"\n", kind=kind)


def waits(data: bytes, kind: str = "text/event-stream") -> Serve:
    """An answer that begins like this and then says nothing until the test ends."""
    def serve(server: Server, connection: socket.socket, request: bytes) -> bool:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + (b"%x\r\n%s\r\n" % (len(data), data) if data else b""))
        server.stopping.wait(5)
        return False
    return serve


class Canned(BaseAdapter):
    """Answers in the process: a session that has it mounted needs no server.

    Each piece of the answer is one read, so that a test decides where the bytes are cut; an
    exception is raised.
    """
    def __init__(self) -> None:
        super().__init__()
        self.status, self.headers = 200, {"Content-Type": "text/event-stream"}
        self.pieces: list[Any] = []

    def send(self, request: Any, *args: Any, **settings: Any) -> Any:
        raw = HTTPResponse(_Pieces(self.pieces), HTTPHeaderDict(self.headers), self.status,
            preload_content=False)
        return HTTPAdapter().build_response(request, raw)

    def close(self) -> None:
        pass


class _Pieces(io.RawIOBase):
    def __init__(self, pieces: list[Any]) -> None:
        self._pieces = [piece for piece in pieces if piece]

    def readable(self) -> bool:
        return True

    def read1(self, size: int = -1) -> bytes:
        if not self._pieces:
            return b""
        piece = self._pieces.pop(0)
        if isinstance(piece, BaseException):
            raise piece
        if 0 <= size < len(piece):
            self._pieces.insert(0, piece[size:])
        return piece[:size] if size >= 0 else piece

    read = read1


# -- providers
MAKERS: dict[str, Callable[..., Any]] = {
    "chat": lambda *args, **more: OpenAIProvider(*args, **{"api": "chat", **more}),
    "responses": lambda *args, **more: OpenAIProvider(*args, api="responses", **more),
    "lmstudio": LMStudioProvider, "anthropic": AnthropicProvider, "gemini": GeminiProvider,
    "ollama": OllamaProvider}


@contextmanager
def talking(kind: str, *answers: bytes | Serve, **settings: Any) -> Iterator[tuple[Any, Server]]:
    with Server(*answers) as server:
        provider = MAKERS[kind](KEY, server.url, **settings)
        try:
            yield provider, server
        finally:
            provider.close()


def drained(stream: Any) -> tuple[list[str], Any]:
    deltas = []
    while True:
        try:
            deltas.append(next(stream))
        except StopIteration as end:
            return deltas, end.value


def outcome(provider: Any, messages: Any = "q", tools: Any = None, **options: Any) -> Any:
    """The response or the error of chat(); stream() has to give the same."""
    options = {"model": "m", "timeout": 10, **options}
    results: list[Any] = []
    for streamed in (False, True):
        try:
            if not streamed:
                results.append(provider.chat(messages, tools, **options))
                continue
            deltas, response = drained(provider.stream(messages, tools, **options))
            assert "".join(deltas) == response.text
            results.append(response)
        except ProviderError as error:
            results.append(error)
    said, told = results
    if isinstance(said, LLMResponse) and isinstance(told, LLMResponse):
        assert said == told
    else:
        assert type(said) is type(told), (said, told)
    return said


def read(kind: str, answer: bytes | Serve, messages: Any = "q", tools: Any = None,
        **more: Any) -> Any:
    """What a provider makes of one answer: the response or the error, of chat() and of stream()."""
    names = ("first_token_timeout", "stall_timeout", "max_response_bytes", "stream_upstream", "api")
    settings = {name: more.pop(name) for name in names if name in more}
    with talking(kind, answer, **settings) as (provider, _):
        return outcome(provider, messages, tools, **more)


def sent(kind: str, messages: Any = "q", tools: Any = None, settings: Any = None,
        **options: Any) -> Any:
    """The body that a provider sends. The answer to it says nothing."""
    with talking(kind, reply({}), **(settings or {})) as (provider, server):
        try:
            provider.chat(messages, tools, **{"model": "m", "timeout": 10, **options})
        except ProviderError:
            if not server.requests:
                raise
        return server.requests[0].body


# -- what tests write by hand: Chat Completions
def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def message(finish: str | None = "stop", **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"role": "assistant", **fields},
                         "finish_reason": finish}]}


def piece(arguments: Any = None, name: str | None = None, **fields: Any) -> dict[str, Any]:
    """A chunk with a piece of a tool call."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments))
                if value is not None}
    return delta(tool_calls=[{**fields, "function": function}])


STOP = delta("stop")


# -- Anthropic and Gemini
def started(reason: Any = None, **usage: Any) -> dict[str, Any]:
    return {"type": "message_start",
            "message": {"model": "m", "content": [], "stop_reason": reason, "usage": usage}}


def block(at: int, **fields: Any) -> dict[str, Any]:
    return {"type": "content_block_start", "index": at, "content_block": fields}


def grows(at: int, kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": at, "delta": {"type": kind, **fields}}


def stops(reason: str | None, **usage: Any) -> dict[str, Any]:
    return {"type": "message_delta", "delta": {"stop_reason": reason}, "usage": usage}


def candidate(*parts: Any, finish: Any = "STOP", at: int = 0, **fields: Any) -> dict[str, Any]:
    end = {"finishReason": finish} if finish else {}
    found = {"index": at, "content": {"role": "model", "parts": list(parts)}, **end}
    return {"candidates": [found], **fields}
