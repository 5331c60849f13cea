"""Sixteen threads against a server that picks a fault at random, with a healthy second tier.

A few hundred calls by default; ``make stress`` makes 10,000 (COPILOT_ROUTER_STRESS=10000) and prints the figures.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections import Counter

import pytest
from support.faults import FAULTS, answer_to, descriptors, fault_server

from copilot_router import FailoverChain, OpenAIProvider, ProviderTier

pytestmark = pytest.mark.quiet
KEY = "sk-test-stress-key-9081726354"
PROMPT = "the secret question with the nonce "
CALLS = int(os.environ.get("COPILOT_ROUTER_STRESS", "400"))
FULL = CALLS >= 10_000
THREADS = 16
DEADLINE = 5.0
#: Faults of every kind.
NAMES = """healthy_until_closed closed_while_idle a_second_answer early_hints_first
    page_500 hint_absent bad_request reset_before_headers cut_chunked cut_until_closed
    short_content_length garbled_event empty_text error_in_a_stream redirect_307
    silence stall keep_alives_for_ever dripped_body"""
KINDS = NAMES.split()  #: half of the requests fare well in any case: breakers have to close again, too


def test_ten_thousand_calls() -> None:
    """Every answer complete and its own prompt's, none late, and not a thread or a descriptor left."""
    assert set(KINDS) <= set(FAULTS)
    gc.collect()
    threads, files = threading.active_count(), descriptors()
    wrong: list[str] = []
    times: list[float] = []
    answered: Counter[str] = Counter()
    start = time.monotonic()
    with fault_server(pick=lambda model: random.choice((random.choice(KINDS), "healthy"))) as ill, fault_server() as well:
        tiers = [
            ProviderTier("ill", OpenAIProvider(KEY, ill.url, first_token_timeout=0.05, stall_timeout=0.05), ["any"]),
            ProviderTier("well", OpenAIProvider(KEY, well.url), ["healthy"]),
        ]
        chain = FailoverChain(
            tiers,
            timeout=DEADLINE,
            failure_threshold=60,
            recovery_timeout=0.001,
            sleep=lambda seconds: time.sleep(seconds / 20),
        )

        def ask(who: int) -> None:
            barrier.wait(10)
            for turn in range(who, CALLS, THREADS):
                prompt = f"{PROMPT}{turn:x}/{random.random()}"
                begin = time.monotonic()
                try:
                    response = chain.chat(prompt)
                except Exception as error:
                    wrong.append(f"{turn}: {type(error).__name__}")
                    continue
                times.append(time.monotonic() - begin)
                answered[response.provider] += 1
                if response.text != answer_to(prompt):
                    wrong.append(f"{turn}: another text by {response.provider}")

        barrier = threading.Barrier(THREADS)
        workers = [threading.Thread(target=ask, args=(who,)) for who in range(THREADS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        chain.close()
        opened = chain.tiers[0].breaker.snapshot().opened
        seen = Counter(entry.fault for entry in ill.log)
    taken = time.monotonic() - start
    gc.collect()
    print(f"\n{len(times)} answers to {CALLS} calls from {THREADS} threads in {taken:.0f} s, slowest {max(times):.2f} s; "
          f"{sum(seen.values())} requests reached the faulty server, {min(seen.values())} to {max(seen.values())} for each of "
          f"{len(seen)} faults; its breaker opened {opened} times; answered by {dict(answered)}; descriptors {files} before, "
          f"{descriptors()} after; threads {threads} before, {threading.active_count()} after")  # fmt: skip
    assert not wrong
    assert len(times) == CALLS
    assert max(times) < DEADLINE * 1.05 + 0.1
    assert descriptors() <= files
    assert threading.active_count() <= threads
    assert answered["ill"] and answered["well"] and opened
    if FULL:
        assert sum(seen.values()) >= 3000
        assert set(seen) == {"healthy", *KINDS}
        assert min(seen.values()) >= 100
