"""Self-escalation: what is a marker, who is told, who is asked, and what the caller sees."""

from __future__ import annotations

from typing import Any

import pytest
from support.fakes import Limits, scripted, tier

from copilot_router import (
    AllProvidersFailed,
    BadRequest,
    EscalationFailed,
    FailoverChain,
    LLMResponse,
    ProviderTier,
    ProviderUnavailable,
    ScriptedProvider,
    Usage,
)

MARKED = "[ESCALATE] too hard"


def told(chain: FailoverChain, name: str, call: int = -1) -> bool:
    provider = next(tier.provider for tier in chain.tiers if tier.name == name)
    assert isinstance(provider, ScriptedProvider)
    return any(
        "[ESCALATE]" in str(message["content"]) for message in provider.calls[call]["messages"]
    )


@pytest.mark.parametrize(
    "text",
    [
        "[ESCALATE] why", "[escalate] why", "  \n[ESCALATE] why", "**[ESCALATE]** why",
        "`[ESCALATE]` why", '"[ESCALATE] why"',
        "> [ESCALATE] why", "```\n[ESCALATE] why\n```", "```text\n[ESCALATE] why",
        "# [Escalate]: why", "\u201c[ESCALATE] why",
        "<think>hm</think>\n[ESCALATE] why", "~~[ESCALATE]~~ why", "__[ESCALATE]__ why",
        "'[ESCALATE]' why",
    ],
)  # fmt: skip
def test_a_marker_in_any_dress_escalates(text: str) -> None:
    """It is shown to nobody; the reason is kept."""
    chain = FailoverChain(
        [tier("weak", text), tier("strong", "the answer")], escalation_model="strong"
    )
    response = chain.chat("hi")
    assert (response.text, response.provider, response.escalation) == (
        "the answer",
        "strong",
        "why",
    )
    assert [attempt.outcome for attempt in response.attempts] == ["escalated", "ok"]


@pytest.mark.parametrize(
    "text",
    ["I would [ESCALATE]", "[ESCALATE", "ESCALATE", "(ESCALATE)", "[ESCALATED]", "[ ESCALATE ]",
    "a [ESCALATE]",
        "1. [ESCALATE]",
     "[NOTE] [ESCALATE]", "text\n[ESCALATE]", "[escalate please]", "{[ESCALATE]}",
     "<think>[ESCALATE]</think> fine"],
)  # fmt: skip
def test_look_alikes_are_answers(text: str) -> None:
    """A marker elsewhere means nothing; the text comes out unchanged."""
    chain = FailoverChain([tier("weak", text), tier("strong", "x")], escalation_model="strong")
    assert chain.chat("hi").text == text


def test_without_an_escalation_model_there_is_no_marker() -> None:
    """Nobody was told of it."""
    chain = FailoverChain([tier("weak", MARKED)])
    assert chain.chat("hi").text == MARKED
    assert not told(chain, "weak")


def test_only_models_below_the_top_are_told_on_a_copy() -> None:
    """Appended to the first system message, or put in front; list content gets a part."""
    chain = FailoverChain([tier("weak", MARKED), tier("strong", "x")], escalation_model="strong")
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    chain.chat(messages)
    assert told(chain, "weak")
    assert not told(chain, "strong")
    assert messages[0] == {"role": "system", "content": "be kind"}
    chain.chat(
        [{"role": "developer", "content": [{"type": "text", "text": "be kind"}]}, messages[1]]
    )
    assert told(chain, "weak")
    chain.chat("hi")
    assert told(chain, "weak")
    chain.chat("hi", response_format={"type": "json_object"})
    assert not told(chain, "weak")


def test_the_instruction_may_be_replaced_or_left_out() -> None:
    """False: none; a str: that one."""
    tiers = [tier("weak", "fine"), tier("strong", "x")]
    silent = FailoverChain(tiers, escalation_model="strong", escalation_prompt=False)
    silent.chat("hi")
    assert not told(silent, "weak")
    custom = FailoverChain(
        tiers,
        escalation_model="strong",
        escalation_prompt="say {marker} if lost",
        escalation_marker="[UP]",
    )
    custom.chat("hi")
    provider: Any = custom.tiers[0].provider
    assert provider.calls[-1]["messages"][0]["content"] == "say [UP] if lost"


def test_a_ladder_is_climbed_rung_by_rung() -> None:
    """Weakest first; a named rung starts above itself."""
    chain = FailoverChain(
        [tier("weak", MARKED), tier("mid", "[ESCALATE] still too hard"), tier("top", "x")],
        escalation_model=["mid", "top"],
    )
    response = chain.chat("hi")
    assert [(attempt.tier, attempt.outcome) for attempt in response.attempts] == [
        ("weak", "escalated"), ("mid", "escalated"), ("top", "ok"),
    ]  # fmt: skip
    assert response.escalation == "still too hard"
    assert told(chain, "mid")
    assert [attempt.tier for attempt in chain.chat("hi", model="mid").attempts] == ["mid", "top"]


def test_the_tiers_after_the_one_that_gave_up_come_next() -> None:
    """When the stronger model cannot be reached, a later tier may still answer."""
    chain = FailoverChain(
        [
            tier("before", ProviderUnavailable),
            tier("weak", MARKED),
            tier("strong", ProviderUnavailable),
            tier("after", "fine"),
        ],
        escalation_model="strong",
    )
    assert [attempt.tier for attempt in chain.chat("hi").attempts] == [
        "before",
        "weak",
        "strong",
        "after",
    ]


def test_a_tier_that_takes_any_model_serves_a_rung_only_if_nobody_lists_it() -> None:
    """One tier with both models escalates to itself."""
    both = FailoverChain([tier("a", MARKED, "x", models=["small", "big"])], escalation_model="big")
    assert [attempt.model for attempt in both.chat("hi").attempts] == ["small", "big"]
    anything = FailoverChain([tier("any", MARKED, "x", models=[])], escalation_model="big")
    assert [attempt.model for attempt in anything.chat("hi", model="small").attempts] == [
        "small",
        "big",
    ]
    with pytest.raises(EscalationFailed):
        FailoverChain([tier("any", MARKED, models=[])], escalation_model="big").chat(
            "hi", model="big"
        )


@pytest.mark.parametrize(
    ("strong", "options"),
    [
        (ProviderUnavailable, {}),
        ("[ESCALATE] me neither", {}),
        ("x", {"tiers": ["weak"]}),
        ("[ESCALATE] top itself", {"model": "strong"}),
    ],
    ids=["down", "gives up too", "nowhere to go", "top itself"],
)
def test_when_the_stronger_side_fails_the_weak_answer_is_attached(
    strong: Any, options: dict[str, Any]
) -> None:
    """EscalationFailed, which is an AllProvidersFailed; its response has no marker."""
    chain = FailoverChain([tier("weak", MARKED), tier("strong", strong)], escalation_model="strong")
    with pytest.raises(EscalationFailed) as failed:
        chain.chat("hi", **options)
    assert isinstance(failed.value, AllProvidersFailed)
    assert failed.value.response is not None
    assert "ESCALATE" not in failed.value.response.text
    assert failed.value.response.text
    assert "ESCALATE" not in str(failed.value)
    assert failed.value.attempts
    if options.get("tiers"):
        assert not told(chain, "weak")


def test_a_marker_without_a_reason() -> None:
    """The reason says so, and the attached answer is empty."""
    chain = FailoverChain(
        [tier("weak", "[ESCALATE]"), tier("strong", ProviderUnavailable)], escalation_model="strong"
    )
    with pytest.raises(EscalationFailed) as failed:
        chain.chat("hi")
    assert failed.value.response is not None
    assert (failed.value.response.content, failed.value.response.escalation) == (None, None)


def test_accept_sends_a_bad_answer_on() -> None:
    """Without an escalation model to the next tier, with one to it; the breaker sees a success."""

    def accept(response: LLMResponse) -> bool:
        return response.text == "good"

    tiers = [tier("a", "bad"), tier("b", "good")]
    response = FailoverChain(tiers, accept=accept).chat("hi")
    assert [(attempt.outcome, attempt.error) for attempt in response.attempts] == [
        ("escalated", "refused by accept"), ("ok", None),
    ]  # fmt: skip
    response = FailoverChain(
        [tier("a", "bad"), tier("x", "bad"), tier("b", "good")], accept=accept, escalation_model="b"
    ).chat("hi")
    assert [attempt.tier for attempt in response.attempts] == ["a", "b"]
    assert tiers[0].breaker.snapshot().failures == 0
    with pytest.raises(EscalationFailed) as failed:
        FailoverChain([tier("a", "bad"), tier("b", "also bad")], accept=accept, wait=100).chat("hi")
    assert failed.value.response is not None
    assert failed.value.response.text == "also bad"
    assert "accept" in str(failed.value)


def test_an_answer_that_accept_refuses_has_not_given_up() -> None:
    """The last one that was refused is attached, and the error says who refused."""
    tiers = [tier("a", "weak"), tier("big", "strong")]
    picky = FailoverChain(tiers, escalation_model="big", accept=lambda one: one.text == "strong")
    response = picky.chat("q")
    assert (response.text, response.escalation) == ("strong", "refused by accept")
    assert response.attempts[0].error == "refused by accept"
    never = FailoverChain(tiers, escalation_model="big", accept=lambda one: False)
    for ask in (never.chat, never.stream):
        with pytest.raises(EscalationFailed, match="accept") as caught:
            ask("q")
        assert caught.value.response is not None
        assert caught.value.response.text == "strong"


def test_who_stands_on_the_ladder_goes_up_from_there() -> None:
    """By its name there, which may be an alias."""
    for models in (["mid", "top"], {"mid": "vendor/mid", "top": "vendor/top"}):
        provider = scripted("[ESCALATE] hard", "done")
        chain = FailoverChain(
            [ProviderTier("a", provider, models)], escalation_model=["mid", "top"]
        )
        assert chain.chat("q", model="mid").text == "done"
        assert [call["model"] for call in provider.calls] == list(chain.tiers[0].models.values())


def test_an_escalation_has_five_times_the_silence_limits() -> None:
    strong = Limits(first_token_timeout=1)
    tiers = [tier("a", "[ESCALATE]"), ProviderTier("b", strong, ["big"]), tier("c", "x")]
    chain = FailoverChain(tiers, escalation_model="big")
    chain.chat("q")
    chain.chat("q", tiers=["b", "c"])
    assert [first for first, _ in strong.seen] == [5, 1]


def test_after_the_stronger_one_come_the_others_in_order() -> None:
    tiers = [tier("a", "[ESCALATE] hard"), tier("b", "b"), tier("top", BadRequest("no"))]
    response = FailoverChain(tiers, escalation_model="top").chat("q")
    assert [(one.tier, one.outcome) for one in response.attempts] == [
        ("a", "escalated"), ("top", "failed"), ("b", "ok"),
    ]  # fmt: skip
    assert response.escalation == "hard"


def test_what_accept_raises_is_raised() -> None:
    """It is the caller's own code."""

    def accept(response: LLMResponse) -> bool:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        FailoverChain([tier("a", "x"), tier("b", "x")], accept=accept).chat("hi")


def test_costs_of_both_sides_add_up() -> None:
    """The weak answer was paid for, too."""
    weak = LLMResponse(MARKED, usage=Usage(10**6, 0))
    strong = LLMResponse("x", usage=Usage(10**6, 0))
    chain = FailoverChain(
        [tier("weak", weak, prices=(1, 1)), tier("strong", strong, prices=(5, 5))],
        escalation_model="strong",
    )
    assert chain.chat("hi").cost == 6.0
