"""The server of the benchmarks, in a process of its own: it sends prepared bytes, so that the
client is what is measured.

The first part of the path says what it does: ``/50/v1/chat/completions`` answers with 50 events, or
with one JSON answer of
the same text if no stream is asked for; ``/error/…`` with status 500, ``/limited/…`` with 429 and
Retry-After 30, and
``/silent/…`` not at all. What follows a dash there (``/error-2/…``) only keeps counts apart. GET
tells the counts.
"""

from __future__ import annotations

import functools
import http.client
import json
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_counts: Counter[str] = Counter()


def text_of(events: int) -> str:
    """What the answer of that many events says."""
    return "".join(f"word{at} " for at in range(events))


def _http(status: str, kind: str, body: bytes, *headers: str) -> bytes:
    lines = (
        f"HTTP/1.1 {status}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        *headers,
        "",
        "",
    )
    return "\r\n".join(lines).encode() + body


def _failed(status: str, kind: str, *headers: str) -> bytes:
    return _http(
        status,
        "application/json",
        json.dumps({"error": {"message": "no", "type": kind}}).encode(),
        *headers,
    )


_FAILURES = {
    "error": _failed("500 Internal Server Error", "server_error"),
    "limited": _failed("429 Too Many Requests", "rate_limit_error", "Retry-After: 30"),
}


def _answer(
    kind: str, events: int, part: str, message: dict[str, str], finish: str | None
) -> bytes:
    choice = {"index": 0, part: message, "logprobs": None, "finish_reason": finish}
    body: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": kind,
        "created": 1,
        "model": "m",
        "choices": [choice],
    }
    if finish:
        body["usage"] = {
            "prompt_tokens": 9,
            "completion_tokens": events,
            "total_tokens": 9 + events,
        }
    return json.dumps(body).encode()


@functools.cache
def prepared(events: int, streaming: bool) -> bytes:
    """The whole HTTP answer. Each event is in a chunk of its own, as servers send them."""
    if not streaming:
        message = {"role": "assistant", "content": text_of(events)}
        return _http(
            "200 OK",
            "application/json",
            _answer("chat.completion", events, "message", message, "stop"),
        )
    items = []
    for at in range(events):
        delta = {"role": "assistant"} if at == 0 else {}
        delta["content"] = f"word{at} "
        finish = "stop" if at == events - 1 else None
        items.append(
            b"data: " + _answer("chat.completion.chunk", events, "delta", delta, finish) + b"\n\n"
        )
    items.append(b"data: [DONE]\n\n")
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(item), item) for item in items) + b"0\r\n\r\n"
    return (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        + chunks
    )


def _read_request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        (
            int(line[15:])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        ),
        0,
    )
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def _talk(connection: socket.socket) -> None:
    known = False
    with connection:
        while request := _read_request(connection):
            verb, path = request.split(None, 2)[:2]
            if verb == b"GET":
                connection.sendall(
                    _http("200 OK", "application/json", json.dumps(_counts).encode())
                )
                continue
            if not known:
                known = True
                _counts["connections"] += 1
            name = path.split(b"/")[1].decode()
            _counts[name] += 1
            kind = name.partition("-")[0]
            if kind in _FAILURES:
                connection.sendall(_FAILURES[kind])
            elif kind != "silent":
                streaming = b'"stream": true' in request or b'"stream":true' in request
                connection.sendall(prepared(int(kind), streaming))


def _talk_while_it_lasts(connection: socket.socket) -> None:
    try:
        _talk(connection)
    except OSError:
        pass  # the client has gone


def _serve() -> None:
    """Prints its port; stops when its standard input closes."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_talk_while_it_lasts, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()


class Server:
    """The server as the measuring process sees it."""

    def __init__(self, port: int) -> None:
        self.port = port

    def url(self, kind: str | int) -> str:
        """The base URL of an API that behaves in a certain way."""
        return f"http://127.0.0.1:{self.port}/{kind}/v1"

    def counts(self) -> Counter[str]:
        """Connections that have carried a request, and requests by the first part of their path."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/")
            return Counter(json.loads(connection.getresponse().read()))
        finally:
            connection.close()


@contextmanager
def server() -> Iterator[Server]:
    """A server in a process of its own."""
    command = [sys.executable, __file__]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        try:
            yield Server(int(process.stdout.readline()))
        finally:
            process.stdin.close()


if __name__ == "__main__":
    _serve()
