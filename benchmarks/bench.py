"""The library measured beside its peers: ``make bench``, or ``make bench ONLY=http`` for one
section.

    python benchmarks/bench.py [SECTION ...] [--effort 1.0] [--write]

Contenders take turns in one run (measure.py says how). A table gives for each the median, the
minimum, and how many times
ours it takes; below stand the targets, each a ratio, with its verdict. ``--write`` makes
benchmarks/RESULTS.md and
docs/benchmarks.svg of the run. Exit status 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import circuitbreaker
import pybreaker
import stream
from measure import (
    MESSAGES,
    Instant,
    Refused,
    Rounds,
    answer,
    by_hand,
    computed,
    duration,
    each_open_tier,
    fresh_python,
    in_threads,
    instant_chain,
    raise_and_catch,
    refuse,
    take_turns,
    timed,
)
from peers import BARE, CONTENDERS, HAND, OURS, Call, our_failover
from server import Server, server, text_of

import copilot_router
from copilot_router import (
    CircuitBreaker,
    FailoverChain,
    LLMProvider,
    LLMResponse,
    MemoryStore,
    OpenAIProvider,
    ProviderTier,
    RedisStore,
    SQLiteStore,
)

HERE = os.path.dirname(os.path.abspath(__file__))
THREADS = 16


class Table(NamedTuple):
    """Rows of text, as they are printed and written."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()


class Verdict(NamedTuple):
    """One target, and what came of it."""

    section: str
    figure: str
    found: str
    target: str
    met: bool
    note: str = ""


class Report:
    """What a run has found, printed as it is found."""

    def __init__(self, effort: float) -> None:
        self.effort = effort
        self.section = ""
        self.tables: list[tuple[str, Table]] = []
        self.verdicts: list[Verdict] = []
        self.drawn: dict[str, dict[str, float]] = {}  #: for the plot: seconds per call

    def rounds(self, number: int) -> int:
        return max(2, round(number * self.effort))

    def table(
        self, title: str, head: tuple[str, ...], rows: list[tuple[str, ...]], *notes: str
    ) -> None:
        table = Table(title, head, rows, notes)
        self.tables.append((self.section, table))
        widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
        print(f"\n{title}")
        for row in [head, *rows]:
            cells = [
                cell.rjust(width) if at else cell.ljust(width)
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            print("  " + "  ".join(cells).rstrip())
        for note in notes:
            print(f"  {note}")
        sys.stdout.flush()

    def compared(self, title: str, found: Rounds, *notes: str, to: str = OURS) -> None:
        """A table of contenders that took turns, each beside one of them."""
        rows = []
        for name in found.times:
            ratio = f"{found.ratio(name, to):.3g}"
            rows.append((name, duration(found.median(name)), duration(found.minimum(name)), ratio))
        self.table(title, ("", "median", "minimum", f"x {to}"), rows, *notes)

    def judge(
        self, figure: str, ratio: float, most: float, note: str = "", least: float | None = None
    ) -> None:
        """Whether a ratio is at most so much, or at least."""
        met, target = (
            (ratio <= most, f"<= {most:g}") if least is None else (ratio >= least, f">= {least:g}")
        )
        self.verdict(figure, f"{ratio:.3g}", target, met, note)

    def verdict(self, figure: str, found: str, target: str, met: bool, note: str = "") -> None:
        verdict = Verdict(self.section, figure, found, target, met, note)
        self.verdicts.append(verdict)
        print(
            f"  -> {figure}: {found} (target {target}) {'ok' if met else 'MISSED'}{'; ' + note if note else ''}",
            flush=True,
        )


# ---- import


def import_section(report: Report) -> None:
    """Time, memory and modules of imports."""
    with fresh_python() as seconds:
        programs = {
            "python -c pass": "pass",
            "import dataclasses": "import dataclasses",
            "import of its standard library": f"import {_STANDARD}",
            OURS: "import copilot_router",
        }
        found = take_turns(
            {name: seconds(program) for name, program in programs.items()}, report.rounds(25)
        )
    report.compared("Import of the module, in an empty environment", found, to="python -c pass")
    alone = found.ratio("import dataclasses", "python -c pass")
    standard = found.ratio("import of its standard library", "python -c pass")
    note = f"`import dataclasses` alone is {alone:.2f} x, all it imports of the standard library {standard:.2f} x"
    report.judge(
        "import of the module / python -c pass", found.ratio(OURS, "python -c pass"), 2.6, note
    )

    built = "copilot_router; copilot_router.OpenAIProvider('key', 'http://127.0.0.1:9')"
    modules = {OURS: built, **{each.name: each.module for each in CONTENDERS if each.name != OURS}}
    costs: dict[str, tuple[str, str]] = {}

    def fresh(name: str, module: str) -> Callable[[], float]:
        path = os.path.dirname(copilot_router.__file__)
        program = f"import sys; sys.path.insert(0, {path!r}); import {module}"
        environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
        told = subprocess.run(
            [sys.executable, "-c", program + _TELL],
            check=True,
            env=environ,
            capture_output=True,
            text=True,
        )
        modules_loaded, kilobytes = told.stdout.split()
        costs[name] = (
            modules_loaded,
            f"{int(kilobytes) / 1024:.0f} MB" if int(kilobytes) else "not known",
        )
        return timed(
            lambda: subprocess.run(
                [sys.executable, "-c", program], check=True, env=environ, capture_output=True
            ),
            1,
        )

    found = take_turns(
        {name: fresh(name, module) for name, module in modules.items()}, report.rounds(8)
    )
    rows = [
        (
            name,
            duration(found.median(name)),
            duration(found.minimum(name)),
            f"{found.ratio(name, OURS):.3g}",
            *reversed(costs[name]),
        )
        for name in modules
    ]
    report.table(
        "A program that imports the library and stops; ours builds a provider too",
        ("", "median", "minimum", f"x {OURS}", "memory", "modules"),
        rows,
        "Memory: the most that the process held. tenacity + pybreaker has no HTTP of its own.",
    )
    report.judge("import and a provider built / import requests", found.ratio(OURS, BARE), 1.1)


_STANDARD = (
    "contextlib, functools, inspect, itertools, json, logging, math, os, re, sys, threading, time, weakref, zlib, abc, "
    "collections, dataclasses, types, typing"
)
_TELL = """
import re, sys
count = len(sys.modules)
try: found = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
except OSError: found = 0
print(count, found)
"""

# ---- breaker


def breaker_section(report: Report) -> None:
    """Breakers alone: closed, open, with threads."""

    def ours() -> Callable[..., Any]:
        return CircuitBreaker().call

    def pys() -> Callable[..., Any]:
        return pybreaker.CircuitBreaker().call

    def circuits() -> Callable[..., Any]:
        return circuitbreaker.CircuitBreaker().call

    makers = {OURS: ours, "pybreaker": pys, "circuitbreaker": circuits}
    closed: dict[str, Callable[[], float]] = {
        "a bare call": computed("answer()", names={"answer": answer})
    }
    closed |= {
        name: computed("call(answer)", names={"call": make(), "answer": answer})
        for name, make in makers.items()
    }
    found = take_turns(closed, report.rounds(60))
    report.compared(
        "Breaker, closed: a call of a function that does nothing", found, to="a bare call"
    )
    report.judge("breaker closed / a bare call", found.ratio(OURS, "a bare call"), 10.0)

    def opened(call: Callable[..., Any]) -> Callable[[], float]:
        while True:
            try:
                call(refuse)
            except Refused:
                continue
            except Exception as refusal:
                names = {"call": call, "answer": answer, "Refusal": type(refusal)}
                return computed("try:\n    call(answer)\nexcept Refusal:\n    pass", names=names)

    # circuitbreaker's call() alone never refuses: only its decorator looks at the state
    callers = {
        **{name: make() for name, make in makers.items()},
        "circuitbreaker": _decorated_circuit(),
    }
    found = take_turns(
        {
            "raise and catch": raise_and_catch(),
            **{name: opened(call) for name, call in callers.items()},
        },
        report.rounds(60),
    )
    report.compared(
        "Breaker, open: a call that is refused, and the exception caught",
        found,
        to="raise and catch",
    )
    report.judge("breaker open / raise and catch", found.ratio(OURS, "raise and catch"), 6.0)

    def many(make: Callable[[], Callable[..., Any]], threads: int) -> Callable[[], float]:
        call = make()
        return in_threads([lambda: call(answer)] * threads, 32_000 // threads)

    contenders = {
        f"{name}, {n}": many(make, n) for name, make in makers.items() for n in (1, THREADS)
    }
    found = take_turns(contenders, report.rounds(20))
    rows = [
        (
            name,
            *(duration(found.median(f"{name}, {n}")) for n in (1, THREADS)),
            f"{found.ratio(f'{name}, 1', f'{name}, {THREADS}'):.2f}",
        )
        for name in makers
    ]
    report.table(
        "Breaker, closed, shared by threads: time per call of all together",
        ("", "1 thread", f"{THREADS} threads", "throughput"),
        rows,
    )
    report.judge(
        f"breaker, throughput of {THREADS} threads / of 1",
        found.ratio(f"{OURS}, 1", f"{OURS}, {THREADS}"),
        0,
        least=0.9,
    )

    def sleeping(make: Callable[[], Callable[..., Any]]) -> Callable[[], float]:
        call = make()
        once = in_threads([lambda: call(time.sleep, 0.01)] * THREADS, 1)
        return lambda: once() * THREADS

    found = take_turns({name: sleeping(make) for name, make in makers.items()}, report.rounds(8))
    rows = [
        (name, duration(found.median(name)), f"{found.median(name) / 0.01:.3g}") for name in makers
    ]
    report.table(
        f"Breaker, serialisation: {THREADS} threads call a function of 10 ms at once",
        ("", "until all are done", "x 10 ms"),
        rows,
        "pybreaker holds its lock while it calls.",
    )


def _decorated_circuit() -> Callable[..., Any]:
    guarded = circuitbreaker.CircuitBreaker()(lambda function: function())
    return lambda function: guarded(function)


# ---- chain


def chain_section(report: Report) -> None:
    """A call without a network."""
    contenders = {each.name: computed(each.instant()) for each in CONTENDERS if each.instant}
    found = take_turns(contenders, report.rounds(40))
    report.compared(
        "Chain: a provider in the process that answers at once, one more in reserve",
        found,
        "tenacity + pybreaker has no deadline, no record of attempts and no events. LiteLLM counts tokens and logs each call.",
        "pydantic-ai runs an event loop for each call. LangChain and pydantic-ai have no breaker.",
    )
    report.drawn["in the process"] = {name: found.median(name) for name in found.times}
    report.judge("chain, one healthy tier / tenacity + pybreaker", found.ratio(OURS, HAND), 0.45)

    rows = []
    for count in (1, 10, 100):
        chat, theirs = instant_chain(count).chat, _opened_by_hand(count)
        found = take_turns(
            {
                OURS: computed(lambda chat=chat: chat(MESSAGES)),
                HAND: computed(lambda theirs=theirs: theirs(MESSAGES)),
            },
            report.rounds(20),
        )
        rows.append(
            (
                f"{count} open",
                *(duration(found.median(name)) for name in (OURS, HAND)),
                f"{found.ratio(HAND, OURS):.3g}",
            )
        )
    report.table(
        "Chain: open tiers before the one that answers",
        ("", OURS, HAND, f"x {OURS}"),
        rows,
        "The others have no breaker in a call's way: LiteLLM keeps a list of deployments that cool down.",
    )
    found = take_turns(
        {OURS: each_open_tier(), "try and except": raise_and_catch()}, report.rounds(60)
    )
    report.judge("chain, each open tier / try and except", found.ratio(OURS, "try and except"), 2.5)


def _opened_by_hand(count: int) -> Callable[[Any], Any]:
    def fails(*_: Any, **__: Any) -> Any:
        raise Refused

    chat = by_hand([*[fails] * count, Instant().chat])
    for _ in range(3):
        chat(MESSAGES)
    return chat


# ---- HTTP


def http_section(report: Report) -> None:
    """Over HTTP on loopback: whole JSON, and streams of 1, 50 and 500 events."""
    talkers = [each for each in CONTENDERS if each.whole and each.stream]
    note = "The others ask for a stream and put its text together; ours does that inside chat()."
    with server() as local:
        for events, rounds in ((0, 50), (1, 50), (50, 40), (500, 15)):
            url = local.url(events or 50)
            calls = {
                each.name: (each.stream(url) if events else each.whole(url)) for each in talkers
            }  # type: ignore[misc]
            for name, call in calls.items():
                got = call()
                assert got == text_of(events or 50), f"{name} did not read all of it"
            what = (
                "whole JSON"
                if not events
                else f"a stream of {events} event{'s' if events > 1 else ''}"
            )
            number = 20 if events < 50 else 5 if events == 50 else 1
            found = take_turns(
                {name: timed(call, number) for name, call in calls.items()}, report.rounds(rounds)
            )
            report.compared(f"HTTP, {what}", found, *([note] if events else []))
            report.drawn[what] = {name: found.median(name) for name in found.times}
            target = {0: 0.85, 1: 0.95, 50: 0.95, 500: 1.0}[events]
            # the two that are to be compared closely take turns with nobody between them
            pair = {name: timed(calls[name], number) for name in (OURS, BARE)}
            close = take_turns(pair, report.rounds(100 if events < 500 else 50))
            report.judge(f"HTTP, {what} / bare requests", close.ratio(OURS, BARE), target)
            pair = {
                name: timed(calls[name], number * 2, timer=time.process_time)
                for name in (OURS, BARE)
            }
            close = take_turns(pair, report.rounds(50))
            report.judge(f"HTTP, {what}, CPU time / bare requests", close.ratio(OURS, BARE), target)
        _http_cpu(report, local)
        _http_connections(report, local)
        _http_threads(report, local)


def _http_cpu(report: Report, local: Server) -> None:
    url = local.url(50)
    contenders = {
        each.name: timed(each.stream(url), 5, timer=time.process_time)
        for each in CONTENDERS
        if each.stream
    }
    found = take_turns(contenders, report.rounds(15))
    report.compared("HTTP, a stream of 50 events: time of the processor", found)


def _http_connections(report: Report, local: Server) -> None:
    rows = []
    ours = {}
    for kind in ("whole", "stream"):
        for each in CONTENDERS:
            if not (each.whole and each.stream):
                continue
            call = (each.whole if kind == "whole" else each.stream)(local.url(50))
            call()
            before = local.counts()["connections"]
            for _ in range(20):
                call()
            made = local.counts()["connections"] - before
            rows.append((each.name, kind, str(made)))
            if each.name == OURS:
                ours[kind] = made
    report.table("HTTP: new connections in 20 calls", ("", "answer", "connections"), rows)
    report.verdict(
        "HTTP, new connections in 20 calls", str(sum(ours.values())), "0", not sum(ours.values())
    )


def _http_threads(report: Report, local: Server) -> None:
    url = local.url(50)
    calls: dict[str, list[Call]] = {}
    for each in CONTENDERS:
        if each.stream:
            shared = each.stream(url)
            calls[each.name] = [
                each.stream(url) if each.name == BARE else shared for _ in range(THREADS)
            ]
    del calls["pydantic-ai Fallback"]
    contenders = {
        name: in_threads(each, 2 if name == "LiteLLM Router" else 5) for name, each in calls.items()
    }
    found = take_turns(contenders, report.rounds(6))
    report.compared(
        f"HTTP, a stream of 50 events, {THREADS} threads: time per call of all together",
        found,
        "requests: a session for each thread; the others are shared by all.",
        "Not pydantic-ai: its client belongs to the event loop of the thread that used it first.",
    )
    close = take_turns(
        {name: in_threads(calls[name], 10) for name in (OURS, BARE)}, report.rounds(20)
    )
    report.judge(
        f"HTTP, throughput of {THREADS} threads / bare requests",
        close.ratio(BARE, OURS),
        0,
        least=1.15,
    )


# ---- streams


def stream_section(report: Report) -> None:
    """What a chain adds to a provider's own stream: to the first delta, and to each further one."""
    rows = []
    for figures in (stream.over_http(report.rounds(60)), stream.without_network(report.rounds(60))):
        for name, found, target in figures:
            ratio = found.ratio("ours", "provider")
            rows.append(
                (
                    name,
                    duration(found.median("ours")),
                    duration(found.median("provider")),
                    f"{ratio:.3g}",
                )
            )
            report.judge(
                f"{name} / the provider's own stream",
                ratio,
                1.05 if name == "each delta, HTTP" else target,
            )
    report.table(
        "Streams: a chain, and its provider's own stream()",
        ("", "chain", "provider", "ratio"),
        rows,
    )


# ---- outage

CALLS = 30
PATIENCE = 10.0
OUTAGES = {
    "refused": "nothing listens there",
    "error": "status 500 to each request",
    "silent": "takes the request and says nothing; 0.3 s are allowed for it",
    "limited": "status 429, Retry-After: 30",
}


def outage_section(report: Report) -> None:
    """The first provider fails, the second works: 30 calls."""
    contenders = [each for each in CONTENDERS if each.failover]
    limited: Verdict
    with server() as local, _closed_port() as closed:
        for kind, what in OUTAGES.items():
            rows = []
            for at, each in enumerate(contenders):
                first = (
                    f"http://127.0.0.1:{closed}/v1"
                    if kind == "refused"
                    else local.url(f"{kind}-{at}")
                )
                made = _outage(each.name, first, local.url(1))
                asked = made["connects"] if kind == "refused" else local.counts()[f"{kind}-{at}"]
                done = len(made["times"])
                total, p99 = (
                    (duration(sum(made["times"])), duration(_p99(made["times"])))
                    if done == CALLS
                    else (f"over {PATIENCE:g} s", "-")
                )
                healthy = f"{sum(made['times']) / made['healthy']:.3g}" if done == CALLS else "-"
                rows.append((each.name, f"{done} of {CALLS}", total, healthy, str(asked), p99))
                if each.name == OURS and kind == "limited":
                    waits = done < CALLS or max(made["times"]) > 1.0
                    limited = Verdict(
                        "",
                        "outage, 429 with Retry-After 30",
                        f"{asked} attempt, {'waits' if waits else 'no wait'}",
                        "1 attempt, no wait",
                        asked == 1 and not waits,
                    )
            report.table(
                f"Outage, {kind}: {what}",
                ("", "answered", "total", "x healthy", "attempts at it", "p99"),
                rows,
                f"Each in a process of its own, one after the other, stopped after {PATIENCE:g} s.",
                f"Healthy: {CALLS} of its own calls to the second provider alone. All have their own defaults for retries.",
            )
        report.verdict(*limited[1:])
        _refused_outage(report, local, closed)


def _p99(times: list[float]) -> float:
    return sorted(times)[min(len(times) - 1, round(0.99 * len(times)))]


@contextmanager
def _closed_port() -> Iterator[int]:
    """A port that is taken and where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def _outage(name: str, first: str, second: str) -> dict[str, Any]:
    """The calls that a contender gets done in time, from a process of its own."""
    command = [sys.executable, __file__, "--outage", name, first, second]
    found: dict[str, Any] = {"times": [], "connects": 0, "healthy": 0.0}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        found["healthy"] = float(process.stdout.readline())
        stop = threading.Timer(PATIENCE, process.kill)
        stop.start()
        for line in process.stdout:
            seconds, connects = line.split()
            found["times"].append(float(seconds))
            found["connects"] = int(connects)
        stop.cancel()
    return found


def _outage_process(name: str, first: str, second: str) -> None:
    """Prints the seconds of healthy calls; then, call by call, its seconds and the connections
    tried to the first so far."""
    failover = next(each.failover for each in CONTENDERS if each.name == name)
    assert failover
    healthy = failover(second, second, 0.3)
    for _ in range(20):
        healthy()  # warm
    print(sum(timed(healthy, 1)() for _ in range(CALLS)), flush=True)
    tried = 0
    port = int(first.split(":")[2].split("/")[0])
    original = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        nonlocal tried
        tried += isinstance(address, tuple) and address[1] == port
        original(self, address)

    socket.socket.connect = connect  # type: ignore[method-assign]
    call = failover(first, second, 0.3)
    for _ in range(CALLS):
        start = time.perf_counter()
        assert call() == text_of(1)
        print(time.perf_counter() - start, tried, flush=True)
    os._exit(0)  # a library's own threads are of no interest


def _refused_outage(report: Report, local: Server, closed: int) -> None:
    """Ours once more, closely: the outage against healthy calls at the second plus three attempts
    at the first."""
    first, second = f"http://127.0.0.1:{closed}/v1", local.url(1)
    broken = our_failover(first, second, 0.3)
    healthy = FailoverChain([ProviderTier("second", OpenAIProvider("key", second), ["m"])])
    dead = OpenAIProvider("key", first)

    def outage() -> float:
        broken.reset()
        start = time.perf_counter()
        for _ in range(CALLS):
            broken.chat(MESSAGES)
        return time.perf_counter() - start

    def least() -> float:
        start = time.perf_counter()
        for _ in range(CALLS):
            healthy.chat(MESSAGES)
        for _ in range(3):
            try:
                dead.chat(MESSAGES, model="m", timeout=60)
            except copilot_router.ProviderUnavailable:
                pass
        return time.perf_counter() - start

    found = take_turns({"the outage": outage, "the least": least}, report.rounds(40))
    report.compared(
        f"Outage, refused: {CALLS} calls against {CALLS} healthy ones plus three attempts",
        found,
        to="the least",
    )
    report.judge(
        "outage, refused / healthy calls plus three attempts",
        found.ratio("the outage", "the least"),
        1.1,
    )


# ---- stores


class Counting:
    """A store that counts what is asked of it."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.refresh = store.refresh
        self.shared_counts = getattr(store, "shared_counts", False)
        self.loads = self.swaps = 0

    def load(self, name: str) -> Any:
        self.loads += 1
        return self._store.load(name)

    def swap(self, *arguments: Any) -> Any:
        self.swaps += 1
        return self._store.swap(*arguments)


def stores_section(report: Report) -> None:
    """Healthy calls with breakers that are shared."""
    with tempfile.TemporaryDirectory() as folder, _redis() as url:
        stores: dict[str, Any] = {
            "no store": None,
            "MemoryStore": MemoryStore(),
            "SQLiteStore": SQLiteStore(os.path.join(folder, "b.db")),
        }
        if url:
            stores["RedisStore"] = RedisStore(url, "bench")
        calls: dict[str, Call] = {}
        rows = []
        for name, store in stores.items():
            counting = Counting(store) if name in ("SQLiteStore", "RedisStore") else None
            chain = FailoverChain([ProviderTier("up", Instant(), ["m"])], store=counting or store)
            calls[name] = lambda chain=chain: chain.chat(MESSAGES)
            if counting:
                chain.chat(MESSAGES)
                counting.loads = counting.swaps = 0
                made, start = 0, time.monotonic()
                while time.monotonic() < start + 1.0:
                    chain.chat(MESSAGES)
                    made += 1
                most = 1 + int(1.0 / counting.refresh)
                rows.append(
                    (
                        name,
                        str(made),
                        str(counting.loads),
                        str(counting.swaps),
                        f"{counting.refresh:g} s",
                    )
                )
                report.verdict(
                    f"{name}, reads and writes in a second of healthy calls",
                    f"{counting.loads} and {counting.swaps}",
                    f"<= {most} and 0",
                    counting.loads <= most and not counting.swaps,
                )
        found = take_turns(
            {name: timed(call, turn=0.3) for name, call in calls.items()}, report.rounds(10)
        )
        report.compared(
            "Stores: a healthy call without a network",
            found,
            "Each turn is longer than what a read serves for.",
            to="MemoryStore",
        )
        report.table(
            "Stores: what a second of healthy calls asks of them",
            ("", "calls", "reads", "writes", "a read serves"),
            rows,
        )
        for name in ("SQLiteStore", "RedisStore"):
            if name in stores:
                report.judge(
                    f"{name}, a healthy call / MemoryStore", found.ratio(name, "MemoryStore"), 1.5
                )
            else:
                report.verdict(
                    f"{name}, a healthy call / MemoryStore",
                    "not measured",
                    "<= 1.5",
                    True,
                    "no redis-server on this machine",
                )


@contextmanager
def _redis() -> Iterator[str]:
    """The URL of a server of our own, "" if there is none to be had."""
    program = shutil.which("redis-server")
    if not program:
        yield ""
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        program,
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "no",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(100):
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.05)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()


# ---- growth and threads


def growth_section(report: Report) -> None:
    """Memory, threads and file descriptors between 10,000 and 100,000 calls."""
    first, last = 10_000, max(20_000, round(100_000 * report.effort))
    rows = []
    for where in ("in the process, a tier open", "over HTTP, 1 event"):
        told = subprocess.run(
            [sys.executable, __file__, "--growth", where, str(first), str(last)],
            check=True,
            capture_output=True,
            text=True,
        )
        before, after = json.loads(told.stdout)
        each = (after["bytes"] - before["bytes"]) / (last - first)
        rows.append(
            (
                where,
                f"{after['bytes'] - before['bytes']:+,d}",
                f"{each:.2f}",
                f"{before['threads']} -> {after['threads']}",
                f"{before['files']} -> {after['files']}",
            )
        )
        same = before["threads"] == after["threads"] and before["files"] == after["files"]
        report.verdict(
            f"growth {where}",
            f"{each:.1f} bytes per call",
            "0, threads and files constant",
            round(each) <= 0 and same,
        )
    report.table(
        f"Growth between {first:,d} and {last:,d} calls",
        ("", "bytes", "per call", "threads", "open files"),
        rows,
        "In the process: what Python has allocated (tracemalloc). Over HTTP: what the process holds in memory.",
    )

    class Slow(LLMProvider):
        def chat(
            self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any
        ) -> LLMResponse:
            time.sleep(0.01)
            return Instant.response

    slow, many, each_calls = Slow(), 64, 10
    chain = FailoverChain([ProviderTier("slow", slow, ["m"])])
    bare, ours = (
        in_threads([call] * many, each_calls)
        for call in (lambda: slow.chat(MESSAGES), lambda: chain.chat(MESSAGES))
    )
    scale = many * each_calls
    found = take_turns(
        {"the threads alone": lambda: bare() * scale, OURS: lambda: ours() * scale},
        report.rounds(30),
    )
    ideal = each_calls * 0.01
    rows = [
        (
            name,
            duration(found.median(name)),
            duration(found.minimum(name)),
            f"{found.median(name) / ideal:.3f}",
        )
        for name in found.times
    ]
    report.table(
        f"{many} threads, {each_calls} calls each to a provider that takes 10 ms",
        ("", "median", "minimum", "x the ideal"),
        rows,
    )
    alone = found.median("the threads alone") / ideal
    report.judge(
        f"{many} threads x 10 ms / the ideal",
        found.median(OURS) / ideal,
        1.05,
        f"the threads alone: {alone:.3f}",
    )


def _growth_process(where: str, first: int, last: int) -> None:
    if where.startswith("in the process"):
        tracemalloc.start()
        call = instant_chain(1).chat
        _grow(call, first, last)
        return
    with server() as local:
        _grow(
            FailoverChain([ProviderTier("http", OpenAIProvider("key", local.url(1)), ["m"])]).chat,
            first,
            last,
        )


def _grow(call: Callable[..., Any], first: int, last: int) -> None:
    import gc

    def state() -> dict[str, int]:
        gc.collect()
        used = tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else _resident()
        return {
            "bytes": used,
            "threads": threading.active_count(),
            "files": len(os.listdir("/dev/fd")),
        }

    seen = []
    for count in (first, last - first):
        for _ in range(count):
            call(MESSAGES)
        seen.append(state())
    print(json.dumps(seen))


def _resident() -> int:
    try:
        with open("/proc/self/statm") as pages:
            return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


# ---- the run

SECTIONS: Mapping[str, Callable[[Report], None]] = {
    "import": import_section,
    "breaker": breaker_section,
    "chain": chain_section,
    "http": http_section,
    "stream": stream_section,
    "outage": outage_section,
    "stores": stores_section,
    "growth": growth_section,
}


def machine() -> list[str]:
    """What was measured on what, without the names of anything private."""
    packages = dict.fromkeys(
        ("circuitbreaker", "redis", *(name for each in CONTENDERS for name in each.packages))
    )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(packages))
    return [
        f"{datetime.date.today():%Y-%m-%d}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{platform.python_implementation()} {platform.python_version()}",
        f"copilot_router {copilot_router.__version__}; {versions}",
    ]


_LEGEND = """\
Contenders took turns in one run, so the ratios mean something and the times do not: on another machine they are others.
A ratio is the median of the rounds' ratios. It moves by 5 % from run to run, with many threads by more. Where nothing waits
for anything it is taken of the time of the processor, else of the clock.
"""


def written(report: Report) -> str:
    """The report as a page."""
    missed = sum(not verdict.met for verdict in report.verdicts)
    lines = [
        "# Measured beside its peers",
        "",
        "Written by `make bench WRITE=1`; do not edit.",
        "",
        *(f"- {line}" for line in machine()),
        f"- effort {report.effort:g}: so many times the usual rounds and calls",
        "",
    ]
    lines += [
        _LEGEND,
        "![Time per call against the peers](../docs/benchmarks.svg)",
        "",
        "## Targets",
        "",
    ]
    lines += [f"{len(report.verdicts) - missed} of {len(report.verdicts)} met.", ""]
    lines += ["| figure | found | target | | shown by |", "|---|---|---|---|---|"]
    for verdict in report.verdicts:
        note = f"<br>{verdict.note}" if verdict.note else ""
        met = "ok" if verdict.met else "**missed**"
        command = f"`make bench ONLY={verdict.section}`"
        lines.append(
            f"| {verdict.figure}{note} | {verdict.found} | {verdict.target} | {met} | {command} |"
        )
    section = ""
    for name, table in report.tables:
        if name != section:
            section = name
            lines += ["", f"## {name}", "", f"`make bench ONLY={name}`"]
        lines += [
            "",
            f"**{table.title}**",
            "",
            "| " + " | ".join(table.head) + " |",
            "|---" + "|---:" * (len(table.head) - 1) + "|",
        ]
        lines += ["| " + " | ".join(row) + " |" for row in table.rows]
        lines += ["", *table.notes] if table.notes else []
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="copilot_router measured beside its peers")
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; none: all"
    )
    parser.add_argument(
        "--effort",
        type=float,
        default=1.0,
        help="how many rounds, as a multiple of the usual number",
    )
    parser.add_argument(
        "--write", action="store_true", help="make benchmarks/RESULTS.md and docs/benchmarks.svg"
    )
    options = parser.parse_args()
    for name in options.sections:
        if name not in SECTIONS:
            parser.error(f"no section is called {name!r}: {', '.join(SECTIONS)}")
    if options.write and options.sections:
        parser.error("--write wants all sections")
    start = time.perf_counter()
    print("\n".join(machine()))
    report = Report(options.effort)
    for name in options.sections or SECTIONS:
        report.section = name
        print(f"\n==== {name}")
        SECTIONS[name](report)
    missed = [verdict for verdict in report.verdicts if not verdict.met]
    print("\n==== targets\n")
    for verdict in report.verdicts:
        print(
            f"{'ok' if verdict.met else 'MISSED':<8}{verdict.figure:<66}{verdict.found:>22}  {verdict.target}"
        )
        if verdict.note:
            print(f"{'':<8}  {verdict.note}")
    took = time.perf_counter() - start
    print(
        f"\n{len(report.verdicts) - len(missed)} of {len(report.verdicts)} targets met, in {took / 60:.1f} min"
    )
    if options.write:
        from plot import draw

        with open(os.path.join(HERE, "RESULTS.md"), "w", encoding="utf-8") as page:
            page.write(written(report))
        draw(report.drawn, os.path.join(os.path.dirname(HERE), "docs", "benchmarks.svg"))
    return 1 if missed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--outage"]:
        _outage_process(*sys.argv[2:])
    elif sys.argv[1:2] == ["--growth"]:
        _growth_process(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        sys.exit(main())
