"""Tests of your own program under pytest, without network, keys or waiting.

    pytest examples/test_your_app.py

``ScriptedProvider`` plays the providers and a clock that the test moves plays the time.
"""

from __future__ import annotations

import pytest

from copilot_router import (
    AllProvidersFailed,
    FailoverChain,
    ProviderTier,
    RateLimited,
    ScriptedProvider,
    ServerError,
)


def label(chain: FailoverChain, ticket: str) -> str:
    """The application: a support ticket gets a label, or goes to a person."""
    try:
        return (
            chain.chat(ticket, system="Answer with one word: billing, bug or other.")
            .text.strip()
            .lower()
        )
    except AllProvidersFailed:
        return "a person"


def chain_of(local: ScriptedProvider, cloud: ScriptedProvider, **settings: object) -> FailoverChain:
    tiers = [
        ProviderTier("local", local, retries=0),
        ProviderTier("cloud", cloud, ["gpt-6-luna"], retries=0),
    ]
    return FailoverChain(tiers, **settings)  # type: ignore[arg-type]


def test_a_ticket_gets_its_label() -> None:
    """The answer is used, and the instruction was sent."""
    local = ScriptedProvider(["Billing\n"])
    assert label(chain_of(local, ScriptedProvider([])), "I was charged twice") == "billing"
    assert local.calls[0]["messages"][0]["role"] == "system"


def test_the_cloud_answers_when_the_local_server_is_down() -> None:
    """A failure that the user does not see."""
    assert (
        label(
            chain_of(ScriptedProvider([ServerError("down")]), ScriptedProvider(["bug"])),
            "It crashes",
        )
        == "bug"
    )


@pytest.mark.parametrize("failure", [ServerError("down"), RateLimited("slow down", retry_after=30)])
def test_a_person_is_asked_when_nobody_answers(failure: Exception) -> None:
    """No error page, whatever the providers do; ``repeat`` plays the same failure for ever."""
    down = ScriptedProvider([failure], repeat=True)
    assert label(chain_of(down, down), "Hello?") == "a person"


def test_the_local_server_is_used_again_after_its_outage() -> None:
    """Three failures open its breaker. Twenty seconds later, one call tries it."""
    now = [0.0]
    local = ScriptedProvider([ServerError("down")] * 3 + ["bug"])
    chain = chain_of(local, ScriptedProvider(["other"], repeat=True), clock=lambda: now[0])
    assert [label(chain, "?") for _ in range(4)] == ["other"] * 4
    assert len(local.calls) == 3
    now[0] += 20  # a breaker stays open for 15 to 18.75 s
    assert label(chain, "?") == "bug"
