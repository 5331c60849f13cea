"""What a chain adds to a stream, as ratios to the same provider's own ``stream()``: ``python
benchmarks/stream.py``.

The delay to the first visible delta, and the cost of each further one, in turns within one run;
medians of the rounds' ratios.
Exit status 1 if a target is missed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

from measure import MESSAGES, Rounds, computed, duration, take_turns, timed
from server import server

import copilot_router
from copilot_router import (
    CircuitBreaker,
    FailoverChain,
    LLMProvider,
    LLMResponse,
    OpenAIProvider,
    ProviderTier,
)

EVENTS = 500
Open = Callable[[], Iterator[str]]


class Instant(LLMProvider):
    """Streams words without doing anything for them."""

    def __init__(self, deltas: int) -> None:
        self.deltas = deltas
        self.response = LLMResponse("word " * deltas, model="m")

    def chat(
        self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any
    ) -> LLMResponse:
        return self.response

    def stream(
        self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any
    ) -> Generator[str, None, LLMResponse]:
        for _ in range(self.deltas):
            yield "word "
        return self.response


def drained(stream: Iterator[str]) -> None:
    for _ in stream:
        pass


def to_the_first(opened: Open, number: int = 10) -> Callable[[], float]:
    """Seconds from the call to its first delta; the rest is read outside of the time, so that the
    connection is kept."""

    def measure() -> float:
        total = 0.0
        for _ in range(number):
            start = time.perf_counter()
            stream = opened()
            next(stream)
            total += time.perf_counter() - start
            drained(stream)
        return total / number

    return measure


def each(found: Rounds) -> Rounds:
    """The same for one delta."""
    return Rounds(
        {name: [seconds / EVENTS for seconds in times] for name, times in found.times.items()}
    )


def chain_of(provider: LLMProvider, open_tiers: int = 0, **settings: Any) -> FailoverChain:
    """The provider behind so many tiers that are open."""
    down = [
        ProviderTier(f"down-{at}", provider, ["m"], breaker=CircuitBreaker())
        for at in range(open_tiers)
    ]
    for tier in down:
        tier.breaker.open(1e6, "ServerError: down")
    return FailoverChain(
        [*down, ProviderTier("up", provider, ["m"]), ProviderTier("top", provider, ["big"])],
        **settings,
    )


def over_http(rounds: int) -> Iterator[tuple[str, Rounds, float]]:
    with server() as local:
        short = OpenAIProvider("key", local.url(5))
        own: Open = lambda: short.stream(MESSAGES, model="m", timeout=60)  # noqa: E731
        for name, chain, target in (
            ("first delta, one tier", chain_of(short), 1.25),
            ("first delta, behind five open tiers", chain_of(short, 5), 1.3),
            ("first delta, with a ladder", chain_of(short, escalation_model="big"), 1.3),
        ):
            ours: Open = lambda chain=chain: chain.stream(MESSAGES, timeout=60)  # type: ignore[misc] # noqa: E731
            yield (
                name,
                take_turns({"ours": to_the_first(ours), "provider": to_the_first(own)}, rounds),
                target,
            )

        long = OpenAIProvider("key", local.url(EVENTS))
        chain = chain_of(long)
        contenders = {
            "ours": timed(lambda: drained(chain.stream(MESSAGES, timeout=60)), 2),
            "provider": timed(lambda: drained(long.stream(MESSAGES, model="m", timeout=60)), 2),
        }
        yield "each delta, HTTP", each(take_turns(contenders, rounds)), 1.1


def without_network(rounds: int) -> Iterator[tuple[str, Rounds, float]]:
    """A delta that costs nothing to make: all that is left is the chain's own work, against a bare
    generator's."""
    provider = Instant(EVENTS)
    chain = chain_of(provider)
    contenders = {
        "ours": computed(lambda: drained(chain.stream(MESSAGES))),
        "provider": computed(lambda: drained(provider.stream(MESSAGES))),
    }
    yield "each delta, no network", each(take_turns(contenders, rounds)), 15.0


def main() -> int:
    """Print the table; 0 if every target is met."""
    start = time.perf_counter()
    print(
        f"copilot_router {copilot_router.__version__}, Python {sys.version.split()[0]}; medians, ratios of paired rounds\n"
    )
    print(
        f"{'figure':<36}{'chain':>9}{'provider':>10}{'added':>9}{'ratio':>7}{'target':>9}  verdict"
    )
    missed = 0
    for figures in (over_http(100), without_network(100)):
        for name, found, target in figures:
            ours, own, ratio = (
                found.median("ours"),
                found.median("provider"),
                found.ratio("ours", "provider"),
            )
            missed += ratio > target
            print(
                f"{name:<36}{duration(ours):>9}{duration(own):>10}{duration(max(ours - own, 1e-9)):>9}{ratio:>7.2f}"
                f"{f'<= {target:g}':>9}  {'ok' if ratio <= target else 'MISSED'}",
                flush=True,
            )
    print(
        f"\n{'all targets met' if not missed else f'{missed} missed'}, in {time.perf_counter() - start:.0f} s"
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
