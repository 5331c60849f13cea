"""Sixteen bad days of a provider, a healthy second tier, and no setting touched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import pytest
from clocks import FakeClock
from faults import Chat, FaultServer, answer_to, fault_server

from copilot_router import ContentFiltered, FailoverChain, LLMResponse, OpenAIProvider, ProviderTier

pytestmark = pytest.mark.quiet
KEY = "sk-test-defaults-key-1357924680"
PROMPT = "the secret question of a bad day"


class Day(NamedTuple):
    """What happens to the first tier, and what the caller is to see of it."""

    fault: str
    answers: str  #: the tier
    within: float  #: seconds
    requests: int  #: at the first tier
    second: str = "healthy"


#: Quick ones, each in a test of its own.
DAYS = {
    "429 for ever": Day("hint_seconds", "second", 1, 1),
    "429 for ever, without a hint": Day("hint_absent", "second", 1, 1),
    "500 once": Day("server_error_once", "first", 2, 2),
    "503 for ever": Day("overloaded_503", "second", 2, 2),
    "reset before the headers": Day("reset_before_headers", "second", 2, 2),
    "cut after 40 of 60 tokens": Day("cut_after_40_tokens", "second", 1, 1),
    "one malformed event": Day("garbled_event", "second", 1, 1),
    "no end marker": Day("healthy_without_end_marker", "first", 1, 1),
    "context length exceeded": Day("context_length", "second", 1, 1),
    "cut, and the second tier refuses a prefill": Day("cut_until_closed", "second", 1, 1, "healthy_without_prefill"),
}
#: Those that take their time, all at once.
SLOW_DAYS = {
    "429 with Retry-After: 2, once": Day("rate_limited_for_two_seconds", "first", 4, 2),
    "silence": Day("silence", "second", 15, 1),
    "headers, and the first token after 20 s": Day("late_first_token", "second", 15, 1),
    "stall after 20 tokens": Day("stall_after_20_tokens", "second", 22, 1),
}


@contextmanager
def two_tiers(
    first: str, second: str = "healthy", pick: Callable[[str], str] | None = None, clock: FakeClock | None = None
) -> Iterator[tuple[FaultServer, FaultServer, FailoverChain]]:
    """Two servers and a chain that was given nothing but their addresses."""
    with fault_server(Chat("model-1", 100, 10), pick) as ill, fault_server(Chat("model-2", 20, 2)) as well:
        tiers = [
            ProviderTier("first", OpenAIProvider(KEY, ill.url), [first]),
            ProviderTier("second", OpenAIProvider(KEY, well.url), [second]),
        ]
        with FailoverChain(tiers, clock=clock, sleep=clock.sleep) if clock else FailoverChain(tiers) as chain:
            yield ill, well, chain


def live_through(day: Day) -> tuple[LLMResponse, float, int]:
    """The answer, how long it took, and how often the first tier was asked."""
    with two_tiers(day.fault, day.second) as (ill, _, chain):
        start = time.monotonic()
        response = chain.chat(PROMPT)
        return response, time.monotonic() - start, ill.count(day.fault)


def check(day: Day, response: LLMResponse, taken: float, requests: int) -> None:
    """All of the answer, in time, by whom it should be, told as what it is."""
    assert response.text == answer_to(PROMPT)
    assert response.provider == day.answers
    assert taken < day.within
    assert requests == day.requests
    first = day.answers == "first"
    assert response.model == ("model-1" if first else "model-2")
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == ((100, 10) if first else (20, 2))
    assert [attempt.outcome for attempt in response.attempts].count("ok") == 1


@pytest.mark.parametrize("name", DAYS)
def test_a_bad_day(name: str) -> None:
    """The caller gets the complete answer, and soon."""
    check(DAYS[name], *live_through(DAYS[name]))


def test_slow_days() -> None:
    """Silence, a late first token, a stall and a short rate limit, in real time and with the real limits."""
    with ThreadPoolExecutor(len(SLOW_DAYS)) as pool:
        seen = dict(zip(SLOW_DAYS, pool.map(live_through, SLOW_DAYS.values()), strict=True))
    for name, (response, taken, requests) in seen.items():
        check(SLOW_DAYS[name], response, taken, requests)
    assert seen["429 with Retry-After: 2, once"][1] >= 2


def test_a_content_policy_violation_is_a_clean_error() -> None:
    """Nobody else is asked, and the error says what it was."""
    with two_tiers("policy") as (ill, well, chain):
        with pytest.raises(ContentFiltered) as refused:
            chain.chat(PROMPT)
        assert (ill.count("policy"), len(well.log)) == (1, 0)
        assert refused.value.status == 400
        assert refused.value.code == "content_policy_violation"


@pytest.mark.parametrize("kind", ["page_503", "reset_before_headers", "hint_absent", "cut_until_closed", "no_content"])
def test_an_outage_of_a_minute(kind: str) -> None:
    """A request every four seconds: all are answered, the first tier is hardly asked, and soon used again."""
    clock = FakeClock()
    begin, end = clock.now + 20, clock.now + 80
    asked: list[float] = []

    def pick(model: str) -> str:
        if not begin <= clock.now < end:
            return "healthy"
        asked.append(clock.now)
        return kind

    with two_tiers("healthy", pick=pick, clock=clock) as (_, _, chain):
        answers: list[tuple[float, LLMResponse]] = []
        while clock.now < end + 60:
            response = chain.chat(PROMPT)
            assert response.text == answer_to(PROMPT)
            assert response.model == {"first": "model-1", "second": "model-2"}[response.provider]
            answers.append((clock.now, response))
            clock.advance(4)
    during = [response.provider for at, response in answers if begin <= at < end]
    assert set(during) == {"second"}
    assert len(asked) <= 3 + 60 / 15
    assert min(at for at, response in answers if at >= end and response.provider == "first") <= end + 30
    assert all(response.provider == "first" for at, response in answers if at < begin or at > end + 30)


def test_a_503_with_accounting() -> None:
    """Usage, model and cost are those of the tier that answered; the failed attempts stand in the record, at no cost."""
    with two_tiers("page_503") as (_, _, chain):
        for tier in chain.tiers:
            tier.prices = {"model-1": (1000.0, 1000.0), "model-2": (1.0, 10.0)}
        response = chain.chat(PROMPT)
    assert response.model == "model-2"
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (20, 2)
    assert response.total_usage == response.usage
    assert response.cost == pytest.approx(20e-6 + 20e-6)
    assert [(attempt.tier, attempt.outcome, attempt.status) for attempt in response.attempts] == [
        ("first", "failed", 503), ("first", "failed", 503), ("second", "ok", None),
    ]  # fmt: skip
    assert [attempt.usage.total_tokens for attempt in response.attempts] == [0, 0, 22]
