"""How fast the library is, as ratios to what one would do without it: ``make bench-quick``, under a
minute.

The whole comparison, with other libraries, is ``make bench``. Exit status 1 if a target is missed.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import requests
from measure import (
    MESSAGES,
    Instant,
    answer,
    bare_stream,
    bare_whole,
    by_hand,
    computed,
    duration,
    each_open_tier,
    fresh_python,
    instant_chain,
    raise_and_catch,
    take_turns,
    timed,
)
from server import server

import copilot_router
from copilot_router import CircuitBreaker, CircuitOpen, FailoverChain, OpenAIProvider, ProviderTier

EVENTS, MANY = 50, 500


class Figure(NamedTuple):
    """One line of the table: medians over all rounds, times in seconds."""

    name: str
    ours: float
    yardstick: float
    ratio: float
    target: float
    against: str


def compare(
    name: str,
    ours: Callable[[], float],
    yardstick: Callable[[], float],
    target: float,
    against: str,
    rounds: int,
) -> Figure:
    found = take_turns({"ours": ours, "yardstick": yardstick}, rounds)
    return Figure(
        name,
        found.median("ours"),
        found.median("yardstick"),
        found.ratio("ours", "yardstick"),
        target,
        against,
    )


def import_cost() -> Figure:
    """A fresh interpreter that imports the module, against one that does nothing."""
    with fresh_python() as seconds:
        return compare(
            "import",
            seconds("import copilot_router"),
            seconds("pass"),
            math.inf,
            "python -c pass",
            rounds=30,
        )


def breaker_closed() -> Figure:
    names = {"call": CircuitBreaker().call, "answer": answer}
    guarded, bare = computed("call(answer)", names=names), computed("answer()", names=names)
    return compare("breaker, closed", guarded, bare, 10.0, "a bare call", rounds=100)


def breaker_open() -> Figure:
    breaker = CircuitBreaker()
    breaker.open(1e6)
    names = {"call": breaker.call, "answer": answer, "CircuitOpen": CircuitOpen}
    guarded = computed("try:\n    call(answer)\nexcept CircuitOpen:\n    pass", names=names)
    return compare("breaker, open", guarded, raise_and_catch(), 6.0, "raise and catch", rounds=100)


def healthy_tier() -> Figure:
    names = {
        "chat": instant_chain().chat,
        "by_hand": by_hand([Instant().chat] * 2),
        "messages": MESSAGES,
    }
    ours, theirs = (
        computed("chat(messages)", names=names),
        computed("by_hand(messages)", names=names),
    )
    return compare("chain, a healthy tier", ours, theirs, 0.55, "tenacity + pybreaker", rounds=60)


def open_tier() -> Figure:
    return compare(
        "chain, each open tier",
        each_open_tier(),
        raise_and_catch(),
        3.5,
        "try and except",
        rounds=60,
    )


def over_http() -> Iterator[Figure]:
    with server() as local, requests.Session() as session:
        for events, target, streaming, bare in (
            (EVENTS, 0.85, True, bare_stream),
            (MANY, 1.0, True, bare_stream),
            (0, 0.85, False, bare_whole),
        ):
            name = f"HTTP, {events} events" if events else "HTTP, whole JSON"
            url = local.url(events or EVENTS)
            provider = OpenAIProvider("key", url, stream_upstream=streaming)
            with FailoverChain([ProviderTier("http", provider, ["m"])]) as chain:
                assert chain.chat(MESSAGES).text == bare(session, url)  # both really read all of it
                names = {
                    "chat": chain.chat,
                    "bare": bare,
                    "messages": MESSAGES,
                    "session": session,
                    "url": url,
                }
                calls, rounds = (4, 60) if events == MANY else (20, 100)
                ours, theirs = (
                    timed("chat(messages)", calls, names),
                    timed("bare(session, url)", calls, names),
                )
                yield compare(name, ours, theirs, target, "bare requests", rounds)


def new_connections(calls: int = 20) -> int:
    """How many connections the server sees in that many calls, after the first."""
    with server() as local:
        provider = OpenAIProvider("key", local.url(EVENTS))
        with FailoverChain([ProviderTier("http", provider, ["m"])]) as chain:
            chain.chat(MESSAGES)
            before = local.counts()["connections"]
            for _ in range(calls):
                chain.chat(MESSAGES)
            return local.counts()["connections"] - before


def figures() -> Iterator[Figure]:
    yield import_cost()
    yield breaker_closed()
    yield breaker_open()
    yield healthy_tier()
    yield open_tier()
    yield from over_http()


def main() -> int:
    """Print the table; 0 if every target is met."""
    start = time.perf_counter()
    print(
        f"copilot_router {copilot_router.__version__}, Python {sys.version.split()[0]}; medians, ratios of paired rounds\n"
    )
    print(f"{'figure':<24}{'ours':>9}{'yardstick':>12}  {'':<22}{'ratio':>7}{'target':>9}  verdict")
    missed = 0
    for figure in figures():
        good = figure.ratio <= figure.target
        missed += not good
        verdict = "" if figure.target == math.inf else "ok" if good else "MISSED"
        target = "" if figure.target == math.inf else f"<= {figure.target:g}"
        print(
            f"{figure.name:<24}{duration(figure.ours):>9}{duration(figure.yardstick):>12}  {figure.against:<22}"
            f"{figure.ratio:>7.2f}{target:>9}  {verdict}",
            flush=True,
        )
    connections = new_connections()
    missed += connections != 0
    print(f"{'HTTP, new connections':<24}{connections:>9}{'':>12}  {'in 20 calls':<22}{'':>7}{'0':>9}  "
          f"{'MISSED' if connections else 'ok'}")  # fmt: skip
    print(
        f"\n{'all targets met' if not missed else f'{missed} missed'}, in {time.perf_counter() - start:.0f} s"
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
