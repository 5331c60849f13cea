"""Self-escalation: who is told of the marker, who is asked, and what the caller sees."""

from __future__ import annotations

from typing import Any

import pytest
from support.fakes import Limits, calls, error_of, outcomes, scripted, tier

from copilot_router import (AllProvidersFailed, BadRequest, EscalationFailed, FailoverChain,
    ProviderTier, ProviderUnavailable)

MARKED = "[ESCALATE] too hard"


def ladder(*tiers: ProviderTier, top: object = "strong", **settings: object) -> FailoverChain:
    return FailoverChain(tiers, escalation_model=top, **settings)


def told(chain: FailoverChain, name: str) -> bool:
    """Whether the last request to this tier spoke of the marker."""
    return "[ESCALATE]" in str([one["content"] for one in calls(chain, name)[-1]["messages"]])


def asked(chain: FailoverChain, **options: object) -> list[str]:
    return [one.tier for one in chain.chat("hi", **options).attempts]


# What is a marker, and what only looks like one, stands in test_streams.
@pytest.mark.parametrize("text", [MARKED, "**[escalate]:** too hard", "`[ESCALATE]`\ntoo hard"])
def test_a_marker_is_shown_to_nobody_and_its_reason_is_kept(text):
    response = ladder(tier("weak", text), tier("strong", "answer")).chat("hi")
    found = response.text, response.provider, response.escalation
    assert found == ("answer", "strong", "too hard")
    assert outcomes(response.attempts) == ["weak:escalated", "strong:ok"]


def test_a_rung_that_nobody_here_serves_is_passed_over_and_never_forced_on_a_local_server():
    tiers = tier("weak", MARKED), tier("mid", "m"), tier("strong", "answer")
    chain = ladder(*tiers, top=["mid", "strong"])
    assert chain.chat("hi", tiers=["weak", "strong"]).text == "answer"
    assert chain.chat("hi", tiers=["weak", "mid"]).text == "m" and not told(chain, "mid")
    any_model = tier("local", MARKED, models=[])
    chain = ladder(any_model, tiers[2])
    error_of(EscalationFailed, chain.chat, "hi", tiers=["local"])
    assert len(any_model.provider.calls) == 1 and not told(chain, "local")


def test_only_models_below_the_top_are_told_on_a_copy():
    chain = ladder(tier("weak", MARKED), tier("strong", "x"))
    user, parts = {"role": "user", "content": "hi"}, [{"type": "text", "text": "be kind"}]
    system, developer = {"role": "system", "content": "x"}, {"role": "developer", "content": parts}
    for first in ([], [system], [developer]):
        before = repr(first)
        chain.chat([*first, user])
        assert told(chain, "weak") and not told(chain, "strong") and repr(first) == before
    assert calls(chain, "weak")[-1]["messages"][0]["content"][-1]["type"] == "text"
    chain.chat("hi", response_format={"type": "json_object"})
    assert not told(chain, "weak")


def test_the_instruction_may_be_replaced_or_left_out():
    """Without an escalation model there is no marker."""
    chain = FailoverChain([tier("weak", MARKED)])
    assert chain.chat("hi").text == MARKED and not told(chain, "weak")
    tiers = [tier("weak", "fine"), tier("strong", "x")]
    silent = ladder(*tiers, escalation_prompt=False)
    silent.chat("hi")
    assert not told(silent, "weak")
    custom = ladder(*tiers, escalation_prompt="say {marker} if lost", escalation_marker="[UP]")
    custom.chat("hi")
    assert calls(custom, "weak")[-1]["messages"][0]["content"] == "say [UP] if lost"


def test_a_ladder_is_climbed_rung_by_rung():
    tiers = tier("weak", MARKED), tier("mid", "[ESCALATE] still too hard"), tier("top", "x")
    chain = ladder(*tiers, top=["mid", "top"])
    response = chain.chat("hi")
    assert outcomes(response.attempts) == ["weak:escalated", "mid:escalated", "top:ok"]
    assert response.escalation == "still too hard" and told(chain, "mid")
    assert asked(chain, model="mid") == ["mid", "top"]
    for models in (["mid", "top"], {"mid": "vendor/mid", "top": "vendor/top"}):
        provider = scripted("[ESCALATE] hard", "done")
        chain = ladder(ProviderTier("a", provider, models), top=["mid", "top"])
        assert chain.chat("q", model="mid").text == "done"
        assert [call["model"] for call in provider.calls] == list(chain.tiers[0].models.values())


def test_after_the_stronger_one_come_the_others_in_order():
    """Those that failed before are not asked again."""
    down = ProviderUnavailable
    chain = ladder(tier("before", down), tier("weak", MARKED), tier("strong", down),
                   tier("after", "fine"))
    assert asked(chain) == ["before", "weak", "strong", "after"]
    chain = ladder(tier("a", MARKED), tier("b", "b"), tier("strong", BadRequest("no")))
    response = chain.chat("q")
    assert outcomes(response.attempts) == ["a:escalated", "strong:failed", "b:ok"]
    assert response.escalation == "too hard"
    rungs = tier("mid", BadRequest), tier("b", MARKED, models=["other"]), tier("top", "x")
    assert asked(ladder(tier("a", MARKED), *rungs, top=["mid", "top"])) == ["a", "mid", "b", "top"]


def test_a_tier_that_takes_any_model_serves_a_rung_only_if_nobody_lists_it():
    for models, options in ((["small", "big"], {}), ([], {"model": "small"})):
        chain = ladder(tier("a", MARKED, "x", models=models), top="big")
        found = [attempt.model for attempt in chain.chat("hi", **options).attempts]
        assert found == ["small", "big"]
    error_of(EscalationFailed, ladder(tier("any", MARKED, models=[]), top="m").chat, "q", model="m")


@pytest.mark.parametrize(("weak", "strong", "options", "text"), [
    (MARKED, ProviderUnavailable, {}, "too hard"), ("[ESCALATE]", ProviderUnavailable, {}, ""),
    (MARKED, "[ESCALATE] me neither", {}, "me neither"), (MARKED, "x", {"tiers": ["weak"]},
        "too hard"), (MARKED, "[ESCALATE] top", {"model": "strong"}, "top")])
def test_when_the_stronger_side_fails_the_last_answer_is_attached(weak, strong, options, text):
    """EscalationFailed, which is an AllProvidersFailed; its response has no marker."""
    chain = ladder(tier("weak", weak), tier("strong", strong))
    failed = error_of(EscalationFailed, chain.chat, "hi", **options)
    assert isinstance(failed, AllProvidersFailed) and failed.response.text == text
    assert text or (failed.response.content, failed.response.escalation) == (None, None)
    assert failed.retry_after == (1.0 if strong is ProviderUnavailable else None)
    assert "ESCALATE" not in str(failed) and failed.attempts
    assert not options.get("tiers") or not told(chain, "weak")


def test_accept_sends_a_bad_answer_on():
    """Without an escalation model to the next tier, with one to it; the breaker sees a success."""
    accept = lambda response: response.text == "good"  # noqa: E731
    tiers = [tier("a", "bad"), tier("b", "good")]
    events: list[Any] = []
    settings = {"accept": accept, "on_event": events.append}
    for chain, step in ((FailoverChain(tiers, **settings), "failover"),
            (ladder(tiers[0], tier("x", "bad"), tiers[1], top="b", **settings), "escalation")):
        response = chain.chat("hi")
        assert (step, {"to": "b"}) in [(event.kind, event.data) for event in events]
        found = [(one.tier, one.outcome, one.error) for one in response.attempts]
        assert found == [("a", "escalated", "refused by accept"), ("b", "ok", None)]
        assert (response.text, response.escalation) == ("good", "refused by accept")
    assert tiers[0].breaker.snapshot().failures == 0
    two = [tier("a", "bad"), tier("b", "also bad")]
    settings = {"accept": accept, "wait": 100}
    for chain, why in ((FailoverChain(two, **settings), "^accept refused every answer: a: "),
            (ladder(*two, top="b", **settings), "^no stronger answer: a: refused by accept; b: ")):
        for ask in (chain.chat, chain.stream):  # the last one that was refused is attached
            assert error_of(EscalationFailed, ask, "q", match=why).response.text == "also bad"
    broken = FailoverChain(two, accept=lambda response: 1 / 0)
    error_of(ZeroDivisionError, broken.chat, "hi")  # what it raises is raised


def test_an_escalation_has_five_times_the_silence_limits():
    strong = Limits(first_token_timeout=1)
    chain = ladder(tier("a", MARKED), ProviderTier("b", strong, ["big"]), tier("c", "x"), top="big")
    chain.chat("q")
    chain.chat("q", tiers=["b", "c"])
    assert [first for first, _ in strong.seen] == [5, 1]
