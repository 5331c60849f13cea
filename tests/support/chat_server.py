"""A Chat Completions server on this machine that plays a script, for tests of the recipes."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from support.server import HEAD, Server, delta, message, parsed, reply, sse

USAGE = {"prompt_tokens": 20, "completion_tokens": 15, "total_tokens": 35}
TOLD = {"id": "1", "model": "gpt-6-luna", "usage": USAGE}


@dataclass
class Answer:
    """An answer of the model. Each piece of text is an event of a stream."""
    texts: Sequence[str] = ("ok",)
    thoughts: Sequence[str] = ()
    calls: Sequence[tuple[str, dict[str, Any]]] = ()  #: name and arguments
    finish: str = "stop"
    broken: bool = False  #: the connection is closed instead of the end
    gate: threading.Semaphore | None = None  #: acquired before each text and before the end

    def wait(self) -> None:
        assert self.gate is None or self.gate.acquire(timeout=20)


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


BROKEN, BUSY = Refusal(500), Refusal(429, {"Retry-After": "30"})


class ChatServer(Server):
    """Each request takes the next item of ``script``, or "ok" where it is empty."""
    def __init__(self) -> None:
        self.script: deque[Any] = deque()
        super().__init__(self._told)
        self.url += "/v1"

    def _told(self, _: Server, connection: Any, request: bytes) -> bool:
        item = self.script.popleft() if self.script else Answer()
        if isinstance(item, Refusal):
            error = {"error": {"message": item.message}}
            connection.sendall(reply(error, item.status, **item.headers))
            return True
        if isinstance(item, Endless):
            self._endless(item, connection)
            return False
        calls = [{"index": at, "id": f"call_{at}", "type": "function",
                  "function": {"name": name, "arguments": json.dumps(given)}}
                 for at, (name, given) in enumerate(item.calls)]
        more = {"tool_calls": calls} if calls else {}
        finish = "tool_calls" if calls else item.finish
        if not parsed(request).body.get("stream"):
            whole = message(finish, content="".join(item.texts), **more)
            connection.sendall(reply({**whole, **TOLD}))
            return True
        connection.sendall(HEAD + sse(*(delta(reasoning_content=one) for one in item.thoughts)))
        for text in item.texts:
            item.wait()
            connection.sendall(sse(delta(content=text)))
        item.wait()
        if not item.broken:
            connection.sendall(sse({**delta(finish, **more), **TOLD}, done=True))
        return False

    @staticmethod
    def _endless(item: Endless, connection: Any) -> None:
        connection.sendall(HEAD)
        connection.settimeout(0.01)
        try:
            while True:
                connection.sendall(sse(delta(content="more ")))
                try:
                    if not connection.recv(1):
                        break
                except TimeoutError:
                    continue
        finally:
            item.gone.release()
