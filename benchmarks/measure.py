"""How the benchmarks measure, and what they compare with.

Absolute times say more about the machine than about the code. So contenders take turns, round after
round in one run, and
what counts is the median of the rounds' ratios. Each has the same time in a round, so that what
else the machine does hits
all alike; and where nothing waits for anything, the time of the processor is taken instead of the
clock's.
"""

from __future__ import annotations

import functools
import json
import os
import py_compile
import random
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
import timeit
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pybreaker
import requests
import tenacity

import copilot_router
from copilot_router import (
    AllProvidersFailed,
    CircuitBreaker,
    FailoverChain,
    LLMProvider,
    LLMResponse,
    ProviderTier,
    ServerError,
)

MESSAGES = [{"role": "user", "content": "Say hello."}]

# ---- taking turns


class Rounds:
    """What contenders that took turns needed: seconds for one operation, in every round."""

    def __init__(self, times: Mapping[str, Sequence[float]]) -> None:
        self.times = times

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def minimum(self, name: str) -> float:
        return min(self.times[name])

    def ratio(self, name: str, other: str) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(
            mine / theirs for mine, theirs in zip(self.times[name], self.times[other], strict=True)
        )

    def best_ratio(self, name: str, other: str) -> float:
        """The ratio of the minimums."""
        return self.minimum(name) / self.minimum(other)


def take_turns(contenders: Mapping[str, Callable[[], float]], rounds: int) -> Rounds:
    """Each callable returns seconds for one operation. The order is drawn anew for every round."""
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        contenders[name]()  # warm: caches, connections, bytecode
    chance = random.Random(rounds)
    for _ in range(rounds):
        for name in chance.sample(names, len(names)):
            _settle()
            times[name].append(contenders[name]())
    return Rounds(times)


def _settle() -> None:
    """Wait, at most a second, until what the one before left to its threads is done: some log
    there, or count tokens."""
    for _ in range(100):
        before = time.process_time()
        time.sleep(0.01)
        if time.process_time() - before < 0.0005:
            return


def timed(
    statement: str | Callable[[], Any], number: int = 0, names: Mapping[str, Any] | None = None, *,
    turn: float = 0.005, timer: Callable[[], float] = time.perf_counter,
) -> Callable[[], float]:  # fmt: skip
    """Seconds for one run of a statement, from ``number`` runs, or from as many as fill a turn of
    so many seconds."""
    prepared = timeit.Timer(statement, timer=timer, globals=dict(names or {}))

    def measure() -> float:
        nonlocal number
        if not number:
            prepared.timeit(1)
            several = 1
            while (took := prepared.timeit(several)) < turn / 4:
                several *= 2
            number = max(1, round(several * turn / took))
        return prepared.timeit(number) / number

    return measure


#: The same in the time of the processor.
computed = functools.partial(timed, timer=time.process_time)


def in_threads(calls: Sequence[Callable[[], Any]], number: int) -> Callable[[], float]:
    """Seconds for one call, of all together, when each of the calls is made ``number`` times in a
    thread of its own."""

    def measure() -> float:
        barrier = threading.Barrier(len(calls) + 1)

        done: list[bool] = []

        def work(call: Callable[[], Any]) -> None:
            barrier.wait()
            for _ in range(number):
                call()
            done.append(True)

        threads = [threading.Thread(target=work, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        barrier.wait()
        start = time.perf_counter()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - start
        assert len(done) == len(calls), "a call failed in its thread"
        return took / (number * len(calls))

    return measure


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


# ---- import


@contextmanager
def fresh_python() -> Iterator[Callable[[str], Callable[[], float]]]:
    """Turns a program into the seconds that a fresh interpreter needs for it, with only the module
    beside it.

    The interpreter runs in an empty virtual environment: what another one has installed may start
    things of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        venv.create(os.path.join(folder, "empty"), symlinks=os.name != "nt")
        python = os.path.join(folder, "empty", "Scripts" if os.name == "nt" else "bin", "python")
        copy = shutil.copy(copilot_router.__file__, folder)
        py_compile.compile(copy, doraise=True)  # as after the first import on any machine

        def seconds(program: str) -> Callable[[], float]:
            command = [
                python,
                "-I",
                "-c",
                program.replace("import copilot_router", _BESIDE.format(folder=folder)),
            ]
            return timed(lambda: subprocess.run(command, check=True), 2)

        yield seconds


_BESIDE = "import sys; sys.path.insert(0, {folder!r}); import copilot_router"

# ---- without a network


class Refused(Exception):
    """The yardstick's error."""


def refuse() -> int:
    raise Refused("no")


def answer() -> int:
    return 1


def raise_and_catch() -> Callable[[], float]:
    return computed(
        "try:\n    refuse()\nexcept Refused:\n    pass",
        names={"refuse": refuse, "Refused": Refused},
    )


class Instant(LLMProvider):
    """Answers without doing anything, so that only the chain's own work is seen."""

    response = LLMResponse(content="Hello!", model="m")

    def chat(
        self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any
    ) -> LLMResponse:
        return self.response


def instant_chain(open_tiers: int = 0) -> FailoverChain:
    """So many tiers whose breakers are open, one that answers, and one more that is never asked."""
    tiers = [
        ProviderTier(f"down-{at}", Instant(), ["m"], breaker=CircuitBreaker())
        for at in range(open_tiers)
    ]
    for tier in tiers:
        tier.breaker.open(1e6, "ServerError: down")
    return FailoverChain(
        [*tiers, ProviderTier("up", Instant(), ["m"]), ProviderTier("spare", Instant(), ["m"])]
    )


def each_open_tier() -> Callable[[], float]:
    """What each tier that is open adds to a call: a tenth of the difference between eleven of them
    and one."""
    one, eleven = (
        computed("chat(messages)", names={"chat": instant_chain(n).chat, "messages": MESSAGES})
        for n in (1, 11)
    )
    return lambda: max((eleven() - one()) / 10, 1e-9)


def by_hand(
    providers: Sequence[Callable[..., Any]], retry_on: type[Exception] = ServerError
) -> Callable[..., Any]:
    """What one writes with tenacity and pybreaker: a list of providers, each with a breaker, each
    tried twice."""
    backends = [
        (provider, pybreaker.CircuitBreaker(fail_max=3, reset_timeout=15)) for provider in providers
    ]
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(2),
        wait=tenacity.wait_random(0.1, 0.3),
        retry=tenacity.retry_if_exception_type(retry_on),
        reraise=True,
    )

    def chat(messages: Any) -> Any:
        errors = []
        for provider, breaker in backends:
            try:
                return retrying(
                    breaker.call, provider, messages, tools=None, model="m", timeout=300.0
                )
            except Exception as error:
                errors.append(error)
        raise AllProvidersFailed(str(errors))

    return chat


# ---- requests, and nothing else: no limits, no checks, no record


def bare_stream(session: requests.Session, url: str) -> str:
    """A streamed answer, read to its end."""
    body = {
        "model": "m",
        "messages": MESSAGES,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    pieces = []
    with session.post(
        f"{url}/chat/completions", json=body, headers=_KEY, stream=True, timeout=300
    ) as response:
        for line in response.iter_lines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                pieces.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
    return "".join(pieces)


def bare_whole(session: requests.Session, url: str) -> str:
    """A whole JSON answer."""
    response = session.post(
        f"{url}/chat/completions",
        json={"model": "m", "messages": MESSAGES},
        headers=_KEY,
        timeout=300,
    )
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


_KEY = {"Authorization": "Bearer key"}
