"""A Chat Completions server on this machine that plays a script, for tests of the recipes."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = {"prompt_tokens": 20, "completion_tokens": 15, "total_tokens": 35}


@dataclass
class Answer:
    """An answer of the model. Each piece of text is an event of a stream."""

    texts: Sequence[str] = ("ok",)
    thoughts: Sequence[str] = ()
    calls: Sequence[tuple[str, dict[str, Any]]] = ()  #: name and arguments
    finish: str = "stop"
    broken: bool = False  #: the connection is closed instead of the end
    gate: threading.Semaphore | None = None  #: acquired before each text and before the end


@dataclass
class Refusal:
    """A status with an error body."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "no"


class Endless:
    """Text without end. ``gone`` is released when the client hangs up."""

    def __init__(self) -> None:
        self.gone = threading.Semaphore(0)


BROKEN = Refusal(500)
BUSY = Refusal(429, {"Retry-After": "30"})


class ChatServer(ThreadingHTTPServer):
    """Each request takes the next item of ``script``, or "ok" where it is empty.

    An item may be a function of the body that returns one. ``bodies`` are the requests.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script: deque[Any] = deque()
        self.bodies: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __exit__(self, *args: Any) -> None:
        self.shutdown()
        self._thread.join()
        super().__exit__(*args)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ChatServer

    def log_message(self, *_: Any) -> None:
        """The tests' output is for the tests."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        item = self.server.script.popleft() if self.server.script else Answer()
        item = item(body) if callable(item) else item
        try:
            if isinstance(item, Refusal):
                self._json({"error": {"message": item.message}}, item.status, item.headers)
            elif isinstance(item, Endless):
                self._endless(item)
            elif body.get("stream"):
                self._stream(item)
            else:
                self._whole(item)
        except OSError:  # the client has hung up
            self.close_connection = True

    def _json(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        length = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        for name, value in {**length, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _calls(self, item: Answer) -> dict[str, Any]:
        functions = [{"name": name, "arguments": json.dumps(given)} for name, given in item.calls]
        calls = [
            {"index": at, "id": f"call_{at}", "type": "function", "function": function}
            for at, function in enumerate(functions)
        ]
        return {"tool_calls": calls} if calls else {}

    def _whole(self, item: Answer) -> None:
        message = {"role": "assistant", "content": "".join(item.texts), **self._calls(item)}
        choice = {"index": 0, "message": message, "finish_reason": self._finish(item)}
        self._json({"id": "1", "model": "gpt-6-luna", "choices": [choice], "usage": USAGE})

    @staticmethod
    def _finish(item: Answer) -> str:
        return "tool_calls" if item.calls else item.finish

    def _event(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        event = {"id": "1", "model": "gpt-6-luna", "choices": [choice], **more}
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _begin(self) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()

    def _stream(self, item: Answer) -> None:
        def wait() -> None:
            assert item.gate is None or item.gate.acquire(timeout=20)

        self._begin()
        for thought in item.thoughts:
            self._event({"reasoning_content": thought})
        for text in item.texts:
            wait()
            self._event({"content": text})
        wait()
        if not item.broken:
            self._event(self._calls(item), self._finish(item), usage=USAGE)
            self.wfile.write(b"data: [DONE]\n\n")

    def _endless(self, item: Endless) -> None:
        self._begin()
        self.connection.settimeout(0.01)
        try:
            while True:
                self._event({"content": "more "})
                try:
                    if not self.connection.recv(1):
                        break
                except TimeoutError:
                    continue
        finally:
            item.gone.release()
