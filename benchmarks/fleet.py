"""2,000 processes and a provider that is down for two minutes, in virtual time: make bench-fleet.

Each process has a breaker of its own, as a chain without a store makes it, and makes five calls a
second. What reaches the provider is counted in tenths of a second: the mean of half a second and of
several runs, so that chance does not count as a crowd. Processes that notice an outage together
must
not come back together: the exit status is 1 if, from the second round of trials on, more than four
times the requests of an even spread come at once.
"""

from __future__ import annotations

import heapq
import inspect
import random
import sys
from collections import Counter

from copilot_router import CircuitBreaker, CircuitOpen

PROCESSES = 2000
CALLS = 5  #: a second, of each process
DOWN = 120.0
RUNS = 5
THRESHOLD, RECOVERY = 3, 15.0
#: What a chain without a store gives its breakers.
JITTER = 0.25
#: How many times the even rate a tenth of a second may have.
MOST = 4.0


class Clock:
    """The time of the simulation, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def simulated(seed: int, settings: dict[str, float]) -> Counter[int]:
    """Requests that reach the provider while it is down, by tenths of a second."""
    chance, clock = random.Random(seed), Clock()
    random.seed(seed)  # the breakers draw their open times from here
    breakers = [
        CircuitBreaker(THRESHOLD, RECOVERY, clock=clock, **settings) for _ in range(PROCESSES)
    ]
    due = [(chance.uniform(0, 1 / CALLS), number) for number in range(PROCESSES)]
    heapq.heapify(due)
    seen: Counter[int] = Counter()
    while due[0][0] < DOWN:
        clock.now, number = heapq.heappop(due)
        try:
            breakers[number].admit().failure("down")
            seen[int(clock.now * 10)] += 1
        except CircuitOpen:
            pass
        heapq.heappush(due, (clock.now + chance.expovariate(CALLS), number))
    return seen


def main() -> int:
    """Print each round of trials; 0 if no tenth of a second is too full."""
    settings: dict[str, float] = {"jitter": JITTER}
    if "jitter" not in inspect.signature(CircuitBreaker).parameters:
        print("this version's breakers have no jitter")
        settings = {}
    total: Counter[int] = Counter()
    for seed in range(RUNS):
        total += simulated(seed, settings)
    seen = {tenth: number / RUNS for tenth, number in total.items()}
    even = PROCESSES / RECOVERY / 10
    print(f"{PROCESSES} processes, {CALLS} calls a second each, down for {DOWN:.0f} s;")
    print(
        f"{sum(seen.values()):.0f} requests, {even:.1f} in a tenth of a second if evenly spread\n"
    )
    print(f"{'round':<10}{'seconds':<14}{'requests':>9}{'most at once':>14}{'of even':>9}")
    worst, start, rounds = 0.0, 0.0, 0
    while start < DOWN - 1:
        end = min(DOWN, start + (RECOVERY * (1 + JITTER / 2) if rounds else 2.0))
        tenths = range(int(start * 10), int(end * 10))
        most = max(sum(seen.get(at + more, 0.0) for more in range(5)) / 5 for at in tenths)
        if rounds > 1:
            worst = max(worst, most / even)
        name = f"trial {rounds}" if rounds else "notice"
        number = sum(seen.get(at, 0.0) for at in tenths)
        span = f"{start:.0f} to {end:.0f}"
        print(f"{name:<10}{span:<14}{number:>9.0f}{most:>14.1f}{most / even:>9.1f}")
        start, rounds = end, rounds + 1
    print(f"\nfrom the second trial on at most {worst:.1f} times the even rate; target {MOST:g}:"
          f" {'ok' if worst <= MOST else 'MISSED'}")  # fmt: skip
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main())
