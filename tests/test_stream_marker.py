"""The escalation marker in a stream: however it is cut, nobody sees it, and what only looks like it is not held up."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copilot_router import (
    EscalationFailed,
    FailoverChain,
    LLMProvider,
    LLMResponse,
    ProviderTier,
    ProviderUnavailable,
    ScriptedProvider,
)

pytestmark = pytest.mark.quiet

#: As they are outside of tests: the suite looks at all that these return, which takes too long for so many calls.
stream, chat = FailoverChain.stream, FailoverChain.chat

MARKER = "[ESCALATE]"
STRONG = ["from ", "the ", "stronger"]

#: The marker as models write it.
DRESSED = [
    "[ESCALATE] because", "[escalate] because", " \n[ESCALATE] because", "**[ESCALATE]** because", "`[ESCALATE]` because",
    '"[ESCALATE] because"', "> [ESCALATE] because", "```\n[ESCALATE]\n```", "```text\n[ESCALATE]", "```3d\n[ESCALATE]",
    "# [Escalate]: because", "\u201c[ESCALATE]\u201d because", "<think>hm</think>\n[ESCALATE]", "~~[ESCALATE]~~ because",
    "__[ESCALATE]__ because", "'[ESCALATE]' because", "<think>\n</think><think></think>[ESCALATE]", "[ESCALATE]",
]  # fmt: skip

#: What only looks like it, and the part of it after which that is certain.
LOOK_ALIKES = [
    ("I would [ESCALATE]", "I"),
    ("[ESCALATION] is near", "[ESCALATI"),
    ("[ESCALATE this", "[ESCALATE "),
    ("ESCALATE] now", "E"),
    ("(ESCALATE)", "("),
    ("[ESCALATED] it was", "[ESCALATED"),
    ("[ ESCALATE ] no", "[ "),
    ("a [ESCALATE]", "a"),
    ("1. [ESCALATE]", "1"),
    ("[NOTE] [ESCALATE]", "[N"),
    ("text\n[ESCALATE]", "t"),
    ("{[ESCALATE]}", "{"),
    ("[[ESCALATE]]", "[["),
    ("**bold** [ESCALATE]", "**b"),
    ("> \u201cEscalate\u201d they said", "> \u201cE"),
    ("```python\nprint()\n```", "```python\np"),
    ("```c++\n[ESCALATE]", "```c+"),
    ("<thinking>[ESCALATE]", "<thinki"),
    ("<think>[ESCALATE]</think> fine", "<think>[ESCALATE]</think> f"),
    ("<THINK>no</THINK>[ESCALATE]", "<T"),
    ("<b>[ESCALATE]</b>", "<b"),
    ("\u00bb[\u0415SCALATE] with a Cyrillic letter", "\u00bb[\u0415"),
]


class Feeding(LLMProvider):
    """Streams ``deltas``, and counts how many were asked for."""

    deltas: Sequence[str] = ()
    taken = 0

    def chat(self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any) -> LLMResponse:
        return LLMResponse("".join(self.deltas))

    def stream(
        self, messages: Any, tools: Any = None, model: Any = None, **kwargs: Any
    ) -> Generator[str, None, LLMResponse]:
        self.taken = 0
        for delta in self.deltas:
            self.taken += 1
            yield delta
        return LLMResponse("".join(self.deltas))


WEAK = Feeding()
CHAIN = FailoverChain(
    [ProviderTier("weak", WEAK, ["weak"]), ProviderTier("strong", ScriptedProvider([STRONG], repeat=True), ["strong"])],
    escalation_model="strong",
)
ONLY_WEAK = FailoverChain(
    [
        ProviderTier("weak", WEAK, ["weak"]),
        ProviderTier("strong", ScriptedProvider([ProviderUnavailable], repeat=True), ["strong"]),
    ],
    escalation_model="strong",
)


def shown(deltas: Sequence[str]) -> list[str]:
    """What the reader of a stream sees."""
    WEAK.deltas = deltas
    return list(stream(CHAIN, "hi"))


@functools.cache
def is_marked(text: str) -> bool:
    """Whether ``chat()`` escalates this answer."""
    WEAK.deltas = [text]
    return chat(CHAIN, "hi").provider == "strong"


def cut(text: str, places: Iterable[int]) -> list[str]:
    ends = [0, *places, len(text)]
    return [text[start:end] for start, end in itertools.pairwise(ends)]


def every_split(text: str, most: int | None = None) -> Iterator[list[str]]:
    """The text cut at every subset of its places, or at every one of at most so many."""
    inside = range(1, len(text))
    for count in range(len(text) if most is None else most + 1):
        for places in itertools.combinations(inside, count):
            yield cut(text, places)


def test_no_split_of_the_marker_is_ever_visible() -> None:
    """All ways to cut the marker and the character after it, the reason whole or a character at a time.

    Only the stronger model's deltas are seen, one by one.
    """
    splits = [[*split, *rest] for split in every_split("[ESCALATE] b") for rest in (["ecause"], "ecause")]
    splits += [[*split[:-1], split[-1] + "ecause"] for split in every_split("[ESCALATE] b")]
    assert len(splits) == 3 * 2**11
    assert {tuple(shown(split)) for split in splits} == {tuple(STRONG)}


@pytest.mark.parametrize("text", DRESSED)
def test_no_dress_makes_it_visible(text: str) -> None:
    """Every way to cut the decorated forms at up to three places, and a character at a time."""
    seen = {tuple(shown(split)) for split in every_split(text, 3)}
    seen.add(tuple(shown(list(text))))
    assert seen == {tuple(STRONG)}


@pytest.mark.parametrize("text", [*DRESSED, *(text for text, _ in LOOK_ALIKES)])
def test_every_split_of_a_short_marker(text: str) -> None:
    """The same forms and look-alikes with a marker of three characters, cut at every subset of their first eleven places."""
    text = text.replace("ESCALATE", "E").replace("Escalate", "E").replace("escalate", "e").replace("because", "x")
    chain = FailoverChain(CHAIN.tiers, escalation_model="strong", escalation_marker="[E]", escalation_prompt=False)
    WEAK.deltas = [text]
    marked = chain.chat("hi").provider == "strong"
    for places in itertools.chain.from_iterable(
        itertools.combinations(range(1, min(12, len(text))), count) for count in range(12)
    ):
        WEAK.deltas = cut(text, places)
        seen = list(stream(chain, "hi"))
        assert seen == STRONG if marked else "".join(seen) == text


@pytest.mark.parametrize(("text", "certain"), LOOK_ALIKES)
def test_a_look_alike_is_exact_and_early(text: str, certain: str) -> None:
    """Whole and unchanged for every cut at up to three places; held back no longer than it can still be the marker."""
    for split in every_split(text, 3 if len(text) < 30 else 2):
        assert "".join(shown(split)) == text
    WEAK.deltas = list(text)
    running = CHAIN.stream("hi")
    assert WEAK.taken == len(certain)
    assert next(running) == certain
    assert [*running] == list(text[len(certain) :])


def test_the_table_of_look_alikes_says_when_it_is_certain() -> None:
    """Just before, there is a way to go on that ``chat()`` would escalate; there is none afterwards."""
    beginnings = (MARKER, f"\n{MARKER}", f"<think></think>{MARKER}", f"`\n{MARKER}")
    rests = {whole[at:] for whole in beginnings for at in range(len(whole))}
    assert len(LOOK_ALIKES) >= 20
    for text, certain in LOOK_ALIKES:
        assert text.startswith(certain)
        assert any(is_marked(certain[:-1] + rest) for rest in rests), text
        assert not any(is_marked(certain + rest) for rest in rests), text


FRAGMENTS = st.sampled_from(
    [MARKER, "[escalate]", "[ESC", "ALATE]", "<think>", "</think>", "<thi", "nk>", "```", "`", "3d", "text", "\n", " ", "*",
     "_", '"', "'", "\u201c", "\u201d", ">", "~", "#", "[", "]", "a", "because", "\u0130", "\u2028", "\x00", "\U0001f600"]
)  # fmt: skip
TEXTS = st.lists(st.one_of(FRAGMENTS, st.text(max_size=3)), max_size=12)


@settings(max_examples=600, deadline=None)
@given(st.data(), TEXTS)
def test_a_stream_escalates_what_a_chat_escalates(data: st.DataObject, parts: list[str]) -> None:
    """Any text, cut anywhere: the stream says what ``chat()`` says, and shows all of it or nothing."""
    text = "".join(parts) + "."
    places = data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=12))
    deltas = cut(text, sorted(places))
    assert "".join(shown(deltas)) == ("".join(STRONG) if is_marked(text) else text)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_nothing_is_held_back_once_it_is_certain(parts: list[str]) -> None:
    """Any text, a character at a time: at every moment at which it is held back, it could still go on as the marker."""
    text = "".join(parts) + "."
    if is_marked(text):
        return
    WEAK.deltas = list(text)
    stream(CHAIN, "hi").close()
    held = text[: WEAK.taken - 1]
    rests = [MARKER, f"</think>{MARKER}", f"\n{MARKER}", *(f"<think></think>{MARKER}"[at:] for at in range(26))]
    assert not held.strip() or any(is_marked(held + rest) for rest in rests)


def test_a_long_think_block_is_held_back_and_no_longer() -> None:
    """The first word after it is shown, however long the block was, with the block that belongs to the answer."""
    block = ["<think>", *(f"thought {number} > " for number in range(50)), *("and so on" for _ in range(50)), "</think>"]
    WEAK.deltas = [*block, "Hello", " you"]
    running = CHAIN.stream("hi")
    assert WEAK.taken == len(block) + 1
    assert list(running) == ["".join(block) + "Hello", " you"]
    assert shown([*block, MARKER[:4], MARKER[4:], " because"]) == STRONG


def test_without_a_ladder_nothing_is_held_back() -> None:
    """Nobody was told of a marker: only blank text waits for what follows, since an answer of nothing else is none."""
    chain = FailoverChain([ProviderTier("weak", WEAK, ["weak"])])
    WEAK.deltas = [" ", "\n", "[", "ESCALATE", "] because"]
    assert list(chain.stream("hi")) == [" \n[", "ESCALATE", "] because"]


def test_a_text_that_ends_undecided_is_the_answer() -> None:
    """The beginning of a marker and nothing more comes out as it is."""
    for text in ("[ESC", "```", "**", "```text", "> [ESCALATE", "<thi"):
        assert "".join(shown(list(text))) == text


def test_a_marker_with_nowhere_to_go_raises_before_anything_is_seen() -> None:
    """EscalationFailed comes from ``stream()`` itself, with the reason and without the marker."""
    for split in (["[ESC", "ALATE] because"], ["[ESCALATE] because"], list("`[ESCALATE]` because")):
        WEAK.deltas = split
        with pytest.raises(EscalationFailed) as failed:
            ONLY_WEAK.stream("hi")
        ONLY_WEAK.reset()
        assert failed.value.response is not None
        assert failed.value.response.text == "because"
        assert [attempt.outcome for attempt in failed.value.attempts] == ["escalated", "failed"]
