"""Clocks, providers and a loopback server for the tests of chains and streams."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from support.server import HEAD, Server, delta, sse

from copilot_router import (Attempt, FailoverChain, LLMProvider, LLMResponse, OpenAIProvider,
    ProviderTier, ScriptedProvider)

PROMPT = "the secret prompt of this test suite"
KEY = "sk-test-chain-key-1234567890"
PARTS = ["the ", "secret ", "answer"]
TOOL = {"type": "function", "function": {"name": "f"}}
#: As they are outside of tests: the suite looks at all that these return, which takes long.
chat_of, stream_of = FailoverChain.chat, FailoverChain.stream
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]


def running() -> float:
    """Seconds, without those in which a busy machine (Linux) kept this thread from running."""
    told = Path("/proc/thread-self/schedstat")
    return time.monotonic() - (int(told.read_text().split()[1]) / 1e9 if told.exists() else 0)


class VirtualClock:
    """``clock()`` is the time; ``sleep`` moves it and is recorded in ``slept``."""
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


# -- chains
def scripted(*items: Any, repeat: bool = True) -> ScriptedProvider:
    return ScriptedProvider(items, repeat=repeat)


def tier(name: str, *items: Any, models: Any = None, **settings: Any) -> ProviderTier:
    """A tier whose provider gives the items one after the other, again and again."""
    return ProviderTier(name, scripted(*items), [name] if models is None else models, **settings)


def chain_of(clock: VirtualClock, *tiers: ProviderTier, **settings: Any) -> FailoverChain:
    return FailoverChain(tiers, clock=clock, sleep=clock.sleep, **settings)


def calls(chain: FailoverChain, name: str) -> list[dict[str, Any]]:
    return next(one.provider.calls for one in chain.tiers if one.name == name)


def failures(chain: FailoverChain, at: int = 0) -> int:
    return chain.tiers[at].breaker.snapshot().failures


def outcomes(attempts: tuple[Attempt, ...]) -> list[str]:
    return [f"{attempt.tier}:{attempt.outcome}" for attempt in attempts]


# -- providers
class Custom(LLMProvider):
    """Answers with what ``function(**options)`` returns or raises."""
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def chat(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> Any:
        return self.function(**kwargs)


class Watched(LLMProvider):
    """Streams ``deltas``: an exception among them is raised, a function is called. It counts its
    streams and the deltas that it has taken."""
    def __init__(self, *deltas: Any, response: LLMResponse | None = None) -> None:
        self.deltas, self.response = deltas, response
        self.opened = self.closed = self.taken = 0

    def chat(self, messages: Any, tools: Any = None, model: Any = None, **_: Any) -> LLMResponse:
        text = "".join(item for item in self.deltas if isinstance(item, str))
        return self.response or LLMResponse(text)

    def stream(self, messages: Any, tools: Any = None, model: Any = None,
            **kwargs: Any) -> Generator[str, None, LLMResponse]:
        self.opened += 1
        self.taken = 0
        try:
            for delta in self.deltas:
                self.taken += 1
                if callable(delta):
                    delta()
                elif isinstance(delta, BaseException):
                    raise delta
                else:
                    yield delta
            return self.chat(messages)
        finally:
            self.closed += 1


class Held(ScriptedProvider):
    """Each call says that it has begun, and waits until it may go on."""
    def __init__(self, *script: Any) -> None:
        super().__init__(script, repeat=True)
        self.begun, self.go_on = threading.Semaphore(0), threading.Event()
        self.counting = threading.Lock()
        self.under_way = self.most = 0

    def chat(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> Any:
        with self.counting:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        self.begun.release()
        assert self.go_on.wait(30)
        with self.counting:
            self.under_way -= 1
        return super().chat(messages, tools, model, **kwargs)


class Limits(OpenAIProvider):
    """An HTTP provider that sends nothing, and notes the silence limits that it is given."""
    def __init__(self, *answers: LLMResponse, **settings: Any) -> None:
        super().__init__(KEY, "http://127.0.0.1:9", **settings)
        self.answers = list(answers)
        self.seen: list[tuple[float, float]] = []

    def chat(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> Any:
        self.seen.append((kwargs["first_token_timeout"], kwargs["stall_timeout"]))
        return self.answers.pop(0) if self.answers else LLMResponse("fine")

    def stream(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> Any:
        response = self.chat(messages, tools, model, **kwargs)
        yield response.text
        return response


def error_of(kind: Any, work: Any, *args: Any, match: Any = None, **options: Any) -> Any:
    """The error of this kind that the call must raise."""
    with pytest.raises(kind, match=match) as caught:
        work(*args, **options)
    return caught.value


def in_threads(count: int, work: Callable[[], Any]) -> list[threading.Thread]:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


# -- a server
class ChatServer(Server):
    """A server of Chat Completions, as one tier of a chain or several."""
    def tier(self, name: str = "http", **limits: Any) -> ProviderTier:
        return ProviderTier(name, OpenAIProvider(KEY, self.url, **limits), ["m"], retries=0)


def event(text: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    """One event of a Chat Completions stream; other fields go into the delta."""
    fields = {**({} if text is None else {"content": text}), **more}
    return sse({"model": "m-1", **delta(finish, **fields)})


def whole(*texts: str) -> bytes:
    """A complete streamed answer, until the connection closes."""
    return HEAD + b"".join(map(event, texts)) + event(finish="stop") + sse(done=True)
