"""A server that misbehaves on purpose: raw sockets on loopback, one fault per model name, a log.

``ROWS`` is the table: a row names a fault, serves it as a function of one Exchange, and says what
is expected of it. What goes over the wire comes from a Dialect: one row serves every format.
"""

from __future__ import annotations

import gzip
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, NamedTuple

from support.dialects import (Answer, Anthropic, Chat, Dialect, Gemini, Ollama, Responses, chunk)
from support.server import Peer, Request, parsed, sse

from copilot_router import (AuthenticationError, BadRequest, ContentFiltered, EmptyResponse,
    InvalidResponse, Overloaded, ProviderTimeout, ProviderUnavailable, QuotaExceeded, RateLimited,
    ServerError)

#: Seconds that a fault may hang, drip or gush at the most: longer than any client here waits.
PATIENCE = 30.0


def chunked(*pieces: bytes) -> bytes:
    """A whole body in the chunked transfer coding."""
    return b"".join(map(chunk, pieces)) + b"0\r\n\r\n"


def descriptors() -> int:
    """Open file descriptors of this process, 0 where nobody knows."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


# -- refusals
def says(message: str, **fields: Any) -> dict[str, Any]:
    """The body of a refusal in OpenAI's form."""
    return {"error": {"message": message, **fields}}


#: A refusal's kind -> its status, and what each format calls it.
STATUSES = {"rate_limited": 429, "server_error": 500, "overloaded": 503}
WORDS = {"chat": "requests server_error unavailable_error",
    "responses": "requests server_error unavailable_error",
    "anthropic": "rate_limit_error api_error overloaded_error",
    "gemini": "RESOURCE_EXHAUSTED INTERNAL UNAVAILABLE"}
BUSY = "server busy, please try again. maximum pending requests exceeded"


def refusal(dialect: Dialect, kind: str) -> dict[str, Any]:
    """The body of a refusal of this kind."""
    told = f"this is {kind}"
    if dialect.name == "ollama":
        return {"error": BUSY if kind == "overloaded" else told}
    word = dict(zip(STATUSES, WORDS[dialect.name].split(), strict=True))[kind]
    if dialect.name == "gemini":
        return says(told, code=STATUSES[kind], status=word)
    if dialect.name == "anthropic":
        return {"type": "error", **says(told, type=word)}
    return says(told, type=word, code=None)


#: The formats that faults come in.
DIALECTS: tuple[type[Dialect], ...] = (Chat, Responses, Anthropic, Gemini, Ollama)


# -- one request and what may be done to it
class Entry(NamedTuple):
    """One attempt, as the server saw it."""
    time: float
    fault: str
    prompt: str
    connection: int


def answer_to(prompt: str) -> str:
    """The complete answer to a prompt: a part of it, or another's, can be told."""
    return f"This is the whole answer to {prompt}, from its first word to its last."


class Exchange:
    """One request, and the means to answer it well or badly. Most methods return it, for chains.

    The connection is closed at the end of a fault unless ``keep`` is set.
    """
    def __init__(self, server: FaultServer, connection: socket.socket, request: Request) -> None:
        self.server, self.connection, self.dialect = server, connection, server.dialect
        self.asked = request.body
        self.key = request.headers.get("authorization", "").removeprefix("Bearer ")
        last = request.body[self.dialect.turns][-1]
        content = last.get("content", last.get("parts"))
        self.prompt = content if isinstance(content, str) else content[-1]["text"]
        in_path = request.path.rpartition("/")[2].partition(":")[0]
        self.model = request.body.get("model") or in_path
        self.stream = self.dialect.streams(request.path, request.body)
        self.number = 0  #: which request for this fault this is, from 1
        self.keep = False
        self.keep_alive = self.dialect.keep_alive if self.stream else b"\n"
        self.until = time.monotonic() + PATIENCE
        text = answer_to(self.prompt)
        self.texts = [text[at : at + 9] for at in range(0, len(text), 9)]
        self.whole = self.document(text)
        self.stream_kind = self.dialect.stream_kind
        if self.stream:
            self.kind = self.stream_kind
            self.opening = self.dialect.idle  #: no text yet
            self.part = self.told(self.texts[:4])  #: some text, and no end
            self.complete = b"".join(self.events(self.texts))  #: all but the end marker
            self.body = self.complete + self.dialect.marker
        else:
            self.kind = "application/json"
            self.opening = b"{"
            self.complete = self.body = self.whole
            self.part = self.whole[: len(self.whole) * 2 // 3]

    def events(self, texts: list[str]) -> list[bytes]:
        """What comes before these texts, the texts, and what follows without the end marker."""
        found = self.dialect.events(Answer(tuple(texts)))
        first = next(at for at, event in enumerate(found) if texts[0].encode() in event)
        last = first + len(texts)
        rest = b"".join(found[last:]).removesuffix(self.dialect.marker)
        return [b"".join(found[:first]), b"".join(found[first:last]), rest]

    def document(self, text: str) -> bytes:
        """The same answer in one JSON document."""
        return json.dumps(self.dialect.body(Answer((text,)))).encode()

    def told(self, texts: list[str]) -> bytes:
        """The beginning of a stream, as far as these texts."""
        return b"".join(self.events(texts)[:2])

    def counted(self, last: int) -> bytes:
        """A beginning of so many tokens."""
        return self.told([f"{number} " for number in range(last)]) if self.stream else self.part

    def more(self, text: str) -> bytes:
        """One more event with text, after ``part``."""
        return self.events([text])[1] if self.stream else b" " * len(text)

    def error(self, kind: str) -> bytes:
        """An error where an answer should be: an event, or a document."""
        body = refusal(self.dialect, kind)
        framed = self.stream and self.dialect.name != "ollama"
        return sse(body) if framed else json.dumps(body).encode() + b"\n"

    def send(self, data: bytes) -> Exchange:
        self.connection.sendall(data)
        return self

    def head(self, *headers: str, status: str = "200 OK", kind: str | None = None) -> Exchange:
        """Status line and headers, with the content type of a healthy answer."""
        lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind or self.kind}", *headers, "", ""]
        return self.send("\r\n".join(lines).encode("latin-1"))

    def until_closed(self, data: bytes, **told: Any) -> Exchange:
        """A body whose end is the connection's."""
        return self.head("Connection: close", **told).send(data)

    def chunks(self, *pieces: bytes) -> Exchange:
        """The head and the beginning of a chunked body."""
        self.head("Transfer-Encoding: chunked")
        return self.send(b"".join(map(chunk, pieces)))

    def reply(self, status: str, body: bytes, *headers: str,
            kind: str = "application/json") -> Exchange:
        """A whole answer with its length, well-formed as HTTP goes."""
        self.head(f"Content-Length: {len(body)}", *headers, status=status, kind=kind).send(body)
        self.keep = True
        return self

    def say(self, status: int, body: Any, *headers: str) -> Exchange:
        """A whole answer in JSON."""
        return self.reply(f"{status} So", json.dumps(body).encode(), *headers)

    def ok(self, body: bytes | None = None, kind: str | None = None) -> Exchange:
        """A healthy answer, chunk by chunk if a stream is wanted; or this body in its place."""
        body = self.body if body is None else body
        if not self.stream:
            return self.reply("200 OK", body, kind=kind or self.kind)
        self.head("Transfer-Encoding: chunked", kind=kind)
        self.send(chunked(*(piece + b"\n\n" for piece in body.split(b"\n\n") if piece)))
        self.keep = True
        return self

    def refuse(self, kind: str, *headers: str) -> Exchange:
        """A refusal in the dialect's own words."""
        return self.say(STATUSES[kind], refusal(self.dialect, kind), *headers)

    def pause(self, seconds: float) -> Exchange:
        self.server.stopping.wait(seconds)
        return self

    def hang(self) -> Exchange:
        """Say nothing, until the client goes away."""
        self.connection.settimeout(PATIENCE)
        self.connection.recv(1)
        return self

    def drip(self, data: bytes) -> Exchange:
        """A byte at a time."""
        self.server.drip(self.connection, data)
        return self

    def gush(self, data: bytes, gap: float = 0.02) -> Exchange:
        """The same again and again."""
        self.send(data)
        while not self.server.stopping.wait(gap) and time.monotonic() < self.until:
            self.send(data)
        return self

    def reset(self) -> Exchange:
        """Close with RST and not with FIN."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        return self


class FaultServer(Peer):
    """Serves the fault that the model's name says; ``pick(model)`` may choose another one."""
    def __init__(self, dialect: Dialect | None = None,
            pick: Callable[[str], str] | None = None) -> None:
        self.dialect = dialect or Chat()
        self.log: list[Entry] = []
        self._pick = pick
        self._seen: dict[str, int] = {}
        self._numbering = threading.Lock()
        super().__init__(FaultServer._exchange)

    def count(self, name: str) -> int:
        """How many requests were for this fault."""
        return sum(entry.fault == name for entry in self.log)

    def _exchange(self, connection: socket.socket, request: bytes) -> bool:
        now = time.monotonic()
        self.requests.clear()  # the log is enough, and takes less room
        asked = parsed(request)
        if not asked.body or self.dialect.path not in asked.path:
            stolen = b'{"choices": [{"message": {"content": "from elsewhere"}}], "data": []}'
            top = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
            connection.sendall(top % len(stolen) + stolen)
            return True
        x = Exchange(self, connection, asked)
        row = BY_NAME[self._pick(x.model) if self._pick else x.model]
        with self._numbering:
            x.number = self._seen[row.name] = self._seen.get(row.name, 0) + 1
            self.log.append(Entry(now, row.name, x.prompt, connection.getpeername()[1]))
        row.serve(x)
        return x.keep


# -- the table
class ANSWER:
    """Expected of a row: the complete answer of the tier itself."""


#: What ``requests.post(..., timeout=1).json()["choices"][0]["message"]["content"]`` makes of it.
HELD = "held long past its timeout"
WRONG = "took something for the answer that is not"
RAW = "failed with KeyError, TypeError, JSONDecodeError or the like: nothing about the cause"
HONEST = "failed with an exception that names the trouble"
RIGHT = "got the answer"
FOOLED = (HELD, WRONG, RAW)


@dataclass
class Row:
    """One fault, and all that is expected of it."""
    name: str
    expect: type
    naive: str
    #: Requests to the tier that is ill, and its breaker afterwards: a state, and failures if
    #: closed, seconds until somebody is let through if open ("long": 14 to 600).
    seen: str
    serve: Callable[[Exchange], Any]
    only: type[Dialect] | None = None  #: the wire format, for faults of its content
    within: float = 1.0  #: seconds that the call may take at most with a healthy second tier
    calls: int = 1
    timeout: float | None = None  #: of the tier
    options: dict[str, Any] = field(default_factory=dict)
    told: Callable[[str], str] = str  #: what becomes of the text
    alone: type | None = None  #: expected with no other tier and little time, if something else
    after: bool = False  #: a stream has shown text before the fault strikes

    @property
    def requests(self) -> int:
        return int(self.seen.split(" ")[0])

    @property
    def breaker(self) -> str:
        return self.seen.partition(" ")[2]


ROWS: list[Row] = []
ONE, TWO, FINE, NEUTRAL = "1 closed 1", "2 closed 2", "1 closed 0", "1 closed 0"


def row(name: str, expect: type, naive: str, seen: str, serve: Callable[[Exchange], Any],
        **more: Any) -> None:
    ROWS.append(Row(name, expect, naive, seen, serve, **more))


def answers(name: str, naive: str, serve: Callable[[Exchange], Any], seen: str = FINE, **more: Any):
    row(name, ANSWER, naive, seen, serve, **more)


def late(name: str, naive: str, serve: Callable[[Exchange], Any], **more: Any) -> None:
    row(name, ProviderTimeout, naive, ONE, serve, **more)


def broken(name: str, naive: str, serve: Callable[[Exchange], Any], **more: Any) -> None:
    row(name, InvalidResponse, naive, more.pop("seen", ONE), serve, **more)


def closed(name: str, naive: str, serve: Callable[[Exchange], Any]) -> None:
    row(name, ServerError, naive, TWO, serve)


CLOSE = "Connection: close"
OK = b"HTTP/1.1 200 OK\r\n"


def a_second_answer(x: Exchange) -> None:
    """A good answer, and in the same breath another one that nobody asked for."""
    other = x.document("the answer to something else")
    head = "HTTP/1.1 200 OK\r\nContent-Type: {}\r\nContent-Length: {}\r\n\r\n"
    x.send(b"".join(head.format(x.kind, len(body)).encode() + body for body in (x.body, other)))
    x.keep = True


def closed_while_idle(x: Exchange) -> None:
    x.ok().keep = False


def stream_by_the_book(x: Exchange) -> None:
    """A byte order mark, CRLF, no space after colons, data in several lines, comments, U+2028."""
    body = x.body
    if x.stream:
        body = body.replace(b"\n\n", b"\r\n\r\n", 2).replace(b'"choices"', b'\ndata: "choices"')
        body = b"\xef\xbb\xbf" + body.replace(b"data: [DONE]", b"data:[DONE]")
        body = body.replace(b"data: {", b": \xe2\x80\xa8\ndata:{")
        body = body.replace(b"answer", "ans\u2028er".encode())
    x.ok(body)


def without_prefill(x: Exchange) -> None:
    """Answers, but never goes on with an answer that somebody else began."""
    if x.asked["messages"][-1]["role"] == "assistant":
        x.say(400, {"error": {"message": "No prefill.", "type": "invalid_request_error"}})
    else:
        x.ok()


def refuses_a_hint(x: Exchange) -> None:
    """Refuses temperature by name, and answers without it."""
    message = "Unsupported value: 'temperature' does not support 0.2 with this model."
    body = {"error": {"message": message, "param": "temperature", "code": "unsupported_value"}}
    x.say(400, body) if x.number == 1 else x.ok()


def echoes(x: Exchange) -> None:
    """Repeats the key and the prompt wherever there is room."""
    echo = f"{x.key} {x.prompt}"
    error = {"message": f"You sent {echo}", "type": echo, "code": echo, "param": echo}
    body = json.dumps({"error": error}).encode()
    x.reply("400 Bad", body, f"X-Echo: {echo}", kind=f"application/json; of={x.key}")


def strange_but_complete(x: Exchange) -> None:
    """Types that are wrong where it does not matter: the answer counts."""
    message = {"content": answer_to(x.prompt), "refusal": 0, "reasoning": [1]}
    choice = {"message": message, "finish_reason": "eos", "index": "x"}
    odd = {"choices": [choice], "usage": "many", "model": 5, "error": None, "id": None}
    x.reply("200 OK", json.dumps(odd).encode(), kind="text/plain")


def without_reason(x: Exchange, told: bool) -> None:
    """A stream that ends with its end marker alone; ``told``: the reason stands there as null."""
    body = x.told(x.texts) + x.dialect.marker
    x.ok(body if told else body.replace(b', "finish_reason": null', b"") if x.stream else x.body)


BOMB = gzip.compress(b" " * 40_000_000)
GZIP = "Content-Encoding: gzip"

# No fault at all, or none that matters.
answers("healthy", RIGHT, lambda x: x.ok())
answers("healthy_without_end_marker", RIGHT, lambda x: x.ok(x.complete))
answers("healthy_without_finish_reason", RIGHT, lambda x: without_reason(x, False), only=Chat)
answers("healthy_until_closed", RIGHT, lambda x: x.until_closed(x.body))
answers("healthy_http_1_0", RIGHT, lambda x: x.send(
    f"HTTP/1.0 200\r\nContent-Type: {x.kind}\r\n\r\n".encode() + x.body))
answers("healthy_after_keep_alives", RIGHT, lambda x: x.ok(x.keep_alive * 3 + x.body))
answers("healthy_then_silence", HONEST, lambda x: x.chunks(x.complete).hang())
answers("healthy_then_closed", HONEST, lambda x: x.chunks(x.body))
answers("healthy_then_reset", HONEST, lambda x: x.chunks(x.complete).pause(0.05).reset())
answers("continue_first", RIGHT, lambda x: x.send(b"HTTP/1.1 100 Continue\r\n\r\n").ok())
answers("early_hints_first", RAW, lambda x: x.send(
    b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n").pause(0.1).ok(),
    "2 closed 0", calls=2)
answers("invalid_utf8", WRONG, lambda x: x.ok(x.body.replace(b"answer", b"ans\xffer")),
        told=lambda text: text.replace("answer", "ans\ufffder"))
answers("compressed", RIGHT, lambda x: x.reply("200 OK", gzip.compress(x.body), GZIP, kind=x.kind))

# Time.
late("endless_status_line", HELD, lambda x: x.send(b"HTTP/1.1 200 ").gush(b"O"))
late("dripped_status_line", HELD, lambda x: x.drip(OK + b"Connection: close\r\n\r\n" + x.body))
late("dripped_headers", HELD, lambda x: x.send(OK).drip(b"X-Header: value\r\n" * 90))
late("dripped_body", HELD, lambda x: x.head(CLOSE).drip(x.body))
late("dripped_chunk_size", HELD, lambda x: x.chunks().send(b"5;").gush(b"x"))
row("dripped_refusal", ServerError, HELD, TWO, lambda x: x.head(
    "Content-Length: 10000", status="500 Oops", kind="application/json").drip(b" " * 10000),
    within=6.0)
late("keep_alives_for_ever", HELD, lambda x: x.head(CLOSE).gush(x.keep_alive))
late("blank_lines_for_ever", HELD, lambda x: x.head(CLOSE).gush(b"\r\n"))
late("keep_alives_in_the_middle", HELD, lambda x: x.until_closed(x.part).gush(x.keep_alive),
     after=True)
late("nothing_but_a_beginning", HELD, lambda x: x.head(CLOSE).gush(x.opening if x.stream else b" "))
late("silence", HONEST, lambda x: x.hang())
late("silence_after_headers", HONEST, lambda x: x.head(CLOSE).hang())
late("silence_after_the_beginning", HONEST, lambda x: x.until_closed(x.opening).hang())
late("stall", HONEST, lambda x: x.chunks(x.part).hang(), after=True)
late("late_first_token", HONEST, lambda x: x.head(CLOSE).pause(20).send(x.body))
late("stall_after_20_tokens", HONEST, lambda x: x.until_closed(x.counted(20)).hang(), after=True)
late("long_content_length", HONEST, lambda x: x.head(
    f"Content-Length: {2 * len(x.body)}").send(x.part).hang(), after=True)
late("slow_tokens", HELD, lambda x: x.until_closed(x.part).gush(
    x.more("more "), 0.05), timeout=0.5, after=True)
late("endless_interim_answers", HELD, lambda x: x.gush(b"HTTP/1.1 100 Continue\r\n\r\n"))
late("endless_early_hints", RAW, lambda x: x.gush(b"HTTP/1.1 103 Early Hints\r\n\r\n"))

# Connections that break.
HALF_A_HEADER = OK + b"Content-Type: text/event-str"
closed("reset_before_headers", HONEST, lambda x: x.reset())
closed("closed_before_headers", HONEST, lambda x: None)
broken("closed_in_the_status_line", HONEST, lambda x: x.send(b"HTTP/1.1 2"))
broken("closed_in_the_headers", RAW, lambda x: x.send(HALF_A_HEADER))
closed("reset_in_the_headers", HONEST, lambda x: x.send(HALF_A_HEADER).pause(0.05).reset())
broken("closed_after_headers", RAW, lambda x: x.head(CLOSE))
broken("cut_chunked", HONEST, lambda x: x.chunks().send(b"%x\r\n" % (2 * len(x.body)) + x.part),
       after=True)
broken("cut_between_chunks", HONEST, lambda x: x.chunks(x.part), after=True)
broken("cut_until_closed", RAW, lambda x: x.until_closed(x.part), after=True)
broken("cut_after_40_tokens", RAW, lambda x: x.until_closed(x.counted(40)), after=True)
broken("cut_before_the_reason", RAW, lambda x: without_reason(x, True), only=Chat, after=True)
broken("short_content_length", HONEST, lambda x: x.head(
    f"Content-Length: {len(x.body)}").send(x.part), after=True)
broken("content_length_too_short", RAW, lambda x: x.head(
    f"Content-Length: {len(x.part)}", CLOSE).send(x.body), after=True)
broken("ended_too_early", RAW, lambda x: x.chunks(x.part).send(b"0\r\n\r\n"), after=True)
broken("cut_in_a_character", RAW, lambda x: x.until_closed(
    x.part + b'data: {"choices": [{"delta": {"content": "\xc3'), after=True)
broken("reset_in_the_body", HONEST, lambda x: x.chunks(x.part).pause(0.05).reset(), after=True)
answers("closed_while_idle", RIGHT, closed_while_idle, "2 closed 0", calls=2)
answers("dropped_on_reuse", RIGHT, lambda x: x.number == 2 or x.ok(), "3 closed 0", calls=2)
answers("a_second_answer", RIGHT, a_second_answer, "2 closed 0", calls=2)
IDLE = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
answers("given_up_while_idle", RIGHT, lambda x: x.ok().send(IDLE), "2 closed 0", calls=2)
answers("given_up_on_reuse", RIGHT, lambda x: x.send(IDLE) if x.number == 2 else x.ok(),
        "3 closed 0", calls=2)

# Garbled HTTP, redirects.
broken("not_http", HONEST, lambda x: x.send(b"SSH-2.0-OpenSSH_9.6\r\n"))
broken("html_without_headers", HONEST, lambda x: x.send(b"<html>Welcome to the hotel</html>"))
broken("huge_header", HONEST, lambda x: x.head("X-Huge: " + "x" * 100_000).send(x.body))
broken("too_many_headers", HONEST, lambda x: x.head(*["X-A: y"] * 500, CLOSE).send(x.body))
broken("bad_chunk_size", HONEST, lambda x: x.chunks().send(b"not a number\r\n" + x.part))
broken("switching_protocols", RAW, lambda x: x.send(
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n").hang(), seen=TWO, calls=2)
broken("no_content", RAW, lambda x: x.send(b"HTTP/1.1 204 No Content\r\n\r\n"))
broken("empty_body", RAW, lambda x: x.reply("200 OK", b""))
answers("strange_content_length", RIGHT,
    lambda x: x.head("Content-Length: \xb2", CLOSE).send(x.body))
broken("enormous_content_length", RAW, lambda x: x.head(
    "Content-Length: " + "9" * 6000, CLOSE).send(x.part), after=True)
broken("redirect_302", WRONG, lambda x: x.reply(
    "302 Found", b"", f"Location: http://127.0.0.1:{x.server.port}/elsewhere"))
broken("redirect_307", WRONG, lambda x: x.reply("307 Temporary", b"", "Location: /elsewhere"))
broken("redirect_without_location", RAW, lambda x: x.reply("308 Permanent", b"<html>moved</html>"))

# Memory.
broken("endless_body", HELD, lambda x: x.head(CLOSE).gush((x.keep_alive * 65536)[:65536], 0.01))
broken("endless_line", HELD, lambda x: x.until_closed(x.part).gush(b"x" * 65536, 0.01), after=True)
broken("endless_text", HELD, lambda x: x.until_closed(x.part).gush(
    x.more("again and again " * 4000), 0.01), after=True)
broken("endless_refusal", HELD, lambda x: x.head(CLOSE, status="500 Oops").gush(b" " * 65536, 0.01))
broken("gzip_bomb", RAW, lambda x: x.reply("200 OK", BOMB, GZIP, kind=x.kind))

# Garbled bodies.
broken("invalid_gzip", HONEST, lambda x: x.reply("200 OK", x.body, GZIP, kind=x.kind))
broken("cut_gzip", RAW, lambda x: x.reply(
    "200 OK", gzip.compress(x.body)[: -len(x.body) // 6], GZIP, kind=x.kind))
broken("unknown_coding", RIGHT, lambda x: x.reply(
    "200 OK", x.body, "Content-Encoding: br", kind=x.kind))
broken("html", RAW, lambda x: x.reply("200 OK", b"<!doctype html>Sign in", kind="text/html"))
broken("html_as_stream", RAW, lambda x: x.reply(
    "200 OK", b"<!doctype html>\n\n<title>Sign in</title>", kind=x.kind))
broken("json_as_stream", RAW, lambda x: x.reply("200 OK", x.whole[:-9], kind=x.stream_kind))
broken("wrong_content_type", RAW, lambda x: x.reply(
    "200 OK", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), kind="image/png"))
broken("invalid_json", RAW,
    lambda x: x.reply("200 OK", b'{"choices": [{"message": {"content": "Th'))
broken("deep_json", RAW, lambda x: x.reply("200 OK", b"[" * 200_000))
broken("garbled_event", RAW, lambda x: x.ok(
    x.part + x.more("half")[:-9] + b"\n\n" + x.body[len(x.part) :]
    if x.stream else x.body[:-7]), after=True)

# Refusals, in the dialect's words.
answers("server_error_once", RAW, lambda x: x.refuse("server_error") if x.number == 1 else x.ok(),
        "2 closed 0")
answers("reset_once", HONEST, lambda x: x.reset() if x.number == 1 else x.ok(), "2 closed 0")
answers("rate_limited_once", RAW, lambda x: x.refuse(
    "rate_limited", "Retry-After: 0.05") if x.number == 1 else x.ok(), "2 closed 0")
answers("rate_limited_for_two_seconds", RAW, lambda x: x.refuse(
    "rate_limited", "Retry-After: 2") if x.number == 1 else x.ok(),
    "2 closed 0", within=3.0, alone=RateLimited)
row("error_in_a_stream", Overloaded, RAW, TWO, lambda x: x.ok(
    (x.part if x.stream else b"") + x.error("overloaded")), after=True)
row("error_instead_of_a_stream", Overloaded, RAW, TWO, lambda x: x.ok(x.error("overloaded")))

#: Name -> header of a rate limit, and the seconds of the park. 15 is the recovery timeout. Forms of
#: hints stand in test_failures.
HINTS = {"seconds": ("Retry-After: 30", 30), "absent": ("X-Nothing: 1", 15),
         "huge": ("Retry-After: 99999999", 3600)}
for _name, (_header, _seconds) in HINTS.items():
    row(f"hint_{_name}", RateLimited, RAW, f"1 open {_seconds}",
        lambda x, header=_header: x.refuse("rate_limited", header))
row("hint_past_date", RateLimited, RAW, "2 open 0", lambda x: x.refuse(
    "rate_limited", "Retry-After: Thu, 01 Jan 1970 00:00:00 GMT"))
row("hint_date", RateLimited, RAW, "1 open 30", lambda x: x.refuse(
    "rate_limited", f"Retry-After: {formatdate(time.time() + 30.5, usegmt=True)}"))

#: Pages of gateways, without any JSON: class, status and reason -> requests and breaker.
PAGES: dict[type, dict[str, str]] = {ProviderUnavailable: {"404 Not Found": ONE, "410 Gone": ONE},
    ProviderTimeout: {"408 Request Timeout": ONE},
    ServerError: dict.fromkeys(("409 Conflict", "425 Too Early", "500 Internal Server Error",
        "502 Bad Gateway", "503 Service Unavailable", "504 Gateway Timeout", "520 Unknown"), TWO),
    BadRequest: {"413 Too Large": NEUTRAL},
    Overloaded: {"529 Site Is Overloaded": TWO}, InvalidResponse: {"600 What": ONE},
    AuthenticationError: {"401 Unauthorized": "1 open long"},
    RateLimited: {"429 Too Many Requests": "1 open 15"},
    QuotaExceeded: {"402 Payment Required": "1 open long"}}
for _class, _pages in PAGES.items():
    for _status, _seen in _pages.items():
        row(f"page_{_status[:3]}", _class, RAW, _seen, lambda x, status=_status: x.reply(
            status, f"<h1>{status}</h1>".encode(), kind="text/html"))
row("page_403_of_a_firewall", AuthenticationError, RAW, "1 closed", lambda x: x.reply(
    "403 Forbidden", b"<h1>Sorry, you have been blocked</h1>", kind="text/html"))


# -- Chat Completions only
#: One refusal of the request itself. Bodies as vendors write them stand in test_failures.
row("bad_request", BadRequest, RAW, NEUTRAL, lambda x: x.say(400, says(
    "Invalid 'messages'", type="invalid_request_error", code=None)), only=Chat)


def _choice(message: Any, finish: Any = "stop") -> dict[str, Any]:
    return {"choices": [{"message": message, "finish_reason": finish}]}


def _calls(*calls: Any) -> dict[str, Any]:
    return _choice({"content": None, "tool_calls": calls[0] if len(calls) == 1 else list(calls)})


#: Whole answers that are none: class -> what a client of one line makes of it -> name -> body.
NONE: dict[type, dict[str, dict[str, Any]]] = {EmptyResponse: {
        WRONG: {"empty_text": _choice({"content": ""}), "no_text": _choice({"content": None}),
            "blank_text": _choice({"content": " \n\t "}),
            "content_is_an_empty_list": _choice({"content": []})}, RAW: {"body_is_a_list": []}},
    InvalidResponse: {WRONG: {"content_is_a_number": _choice({"content": 42}),
            "content_is_true": _choice({"content": True}),
            "finish_is_a_number": _choice({"content": "hello"}, 7),
            "calls_are_text": _calls("f()"), "calls_are_numbers": _calls(1, 2),
            "call_without_a_name": _calls([{"id": "a", "function": {"arguments": "{}"}}]),
            "arguments_are_a_list": _calls([{"function": {"name": "f", "arguments": [1]}}])},
        RAW: {"no_message": _choice(None), "message_is_text": _choice("hello"),
            "message_is_a_list": _choice(["hello"]), "no_choices": {"choices": []},
            "choices_absent": {"id": "x", "object": "chat.completion", "model": "m"},
            "choices_null": {"choices": None}, "choices_text": {"choices": "hello"},
            "choices_object": {"choices": {"0": {"message": {"content": "hello"}}}},
            "choices_of_null": {"choices": [None]}, "choices_of_text": {"choices": ["hello"]},
            "choice_is_empty": {"choices": [{}]}, "body_is_text": "hello", "body_is_a_number": 1,
            "body_is_null": None, "body_is_empty": {}}}}
for _class, _columns in NONE.items():
    for _naive, _bodies in _columns.items():
        for _name, _body in _bodies.items():
            row(_name, _class, _naive, ONE, lambda x, body=_body: x.say(200, body), only=Chat)
row("cut_by_length", EmptyResponse, WRONG, NEUTRAL,
    lambda x: x.say(200, _choice({"content": ""}, "length")), only=Chat)
for _name, _body in (("filtered", _choice({"content": None}, "content_filter")),
                     ("refused", _choice({"content": None, "refusal": "I cannot."}))):
    row(_name, ContentFiltered, WRONG, NEUTRAL, lambda x, body=_body: x.say(200, body), only=Chat)


def _between(odd: bytes) -> Callable[[Exchange], Any]:
    """A stream with this event in its middle."""
    return lambda x: x.ok(x.part + odd + x.body[len(x.part) :] if x.stream else x.part)


#: Events in the middle of a stream that make it none: name -> event.
WRONG_EVENTS: dict[str, bytes] = {"event_is_text": b'data: "hello"\n\n',
    "event_is_a_list": b'data: ["hello"]\n\n', "event_choices_text": b'data: {"choices": "x"}\n\n',
    "event_choice_null": b'data: {"choices": [null]}\n\n',
    "event_delta_text": b'data: {"choices": [{"delta": "x"}]}\n\n',
    "event_content_number": b'data: {"choices": [{"delta": {"content": 5}}]}\n\n',
    "event_cut_json": b'data: {"choices": [{"delta": {"content": "whole ans\n\n',
    "event_error_text": b'data: {"error": "broken pipe"}\n\n',
    "event_error_list": b'data: [{"error": {"message": "x"}}]\n\n',
    "event_finish_error": b'data: {"choices": [{"delta": {}, "finish_reason": "error"}]}\n\n',
    "event_finish_abort": b'data: {"choices": [{"delta": {}, "finish_reason": "abort"}]}\n\n',
    "event_is_deep": b"data: " + b"[" * 100_000 + b"\n\n"}
for _name, _event in WRONG_EVENTS.items():
    broken(_name, RAW, _between(_event), only=Chat, after=True)
row("event_named_error", ServerError, RAW, TWO,
    _between(b'event: error\ndata: {"message": "gone", "code": 500}\n\n'), only=Chat, after=True)
row("event_old_error", ServerError, RAW, TWO, _between(
    b'error:{"code": 500, "message": "slot gone", "type": "server_error"}\n\n'),
    only=Chat, after=True)
row("echoes_the_request", BadRequest, RAW, NEUTRAL, echoes, only=Chat)
broken("echoes_the_request_in_headers", RAW, lambda x: x.reply(
    "200 OK", b"no JSON", f"X-Request-Id: {x.prompt}", kind=x.key), only=Chat)
broken("echoes_the_key_as_coding", RIGHT, lambda x: x.reply(
    "200 OK", x.body, f"Content-Encoding: {x.key}"), only=Chat)
answers("strange_but_complete", RIGHT, strange_but_complete, only=Chat)
answers("stream_by_the_book", RIGHT, stream_by_the_book, only=Chat,
        told=lambda text: text.replace("answer", "ans\u2028er"))
answers("healthy_without_prefill", RIGHT, without_prefill, only=Chat)
answers("refuses_a_hint", RAW, refuses_a_hint, "2 closed 0", options={"temperature": 0.2},
    only=Chat)

BY_NAME = {row.name: row for row in ROWS}
