"""Draws what a chain did, from its events: a row for each tier, a bar for each request.

    events = []
    chain = FailoverChain(tiers, on_event=events.append)
    ...                                          # calls, one after the other
    timeline.draw(events, "timeline.svg")        # needs matplotlib

The colour behind the bars shows each tier's breaker.
``python examples/demo.py --svg docs/timeline.svg`` draws a run against servers on this machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams.update(
    {
        "svg.hashsalt": "copilot_router",
        "svg.fonttype": "none",
        "font.size": 10,
        "font.family": "DejaVu Sans",
    }
)
from matplotlib import pyplot as plt  # noqa: E402 - the backend comes first
from matplotlib.patches import Patch  # noqa: E402

from copilot_router import Event  # noqa: E402

CALLER = "chain.chat()"
FONTS = "'DejaVu Sans', Verdana, sans-serif"  #: Verdana is as wide as DejaVu Sans
COLOUR = {"ok": "#2a9d5c", "failed": "#d1343e", "gave up": "#8e44ad"}
GROUND = {"open": "#f9d5d3", "half_open": "#fdeeb5"}
LABEL = {"ok": "answered", "failed": "failed", "gave up": "gave up: escalated"}


class Bar(NamedTuple):
    tier: str
    start: float
    end: float
    kind: str  #: ok, failed or gave up


def bars(events: Sequence[Event]) -> list[Bar]:
    """The requests, and as tier CALLER the calls that they were for."""
    found: list[Bar] = []
    request: Event | None = None
    call: Event | None = None
    for event in events:
        if event.kind in ("attempt", "skip", "retry"):
            call = call or event
        if request and event.kind in (
            "retry",
            "failover",
            "escalation",
            "wait",
            "skip",
            "attempt",
            "done",
        ):
            good = event.kind == "done" and event.data["outcome"] == "ok"
            kind = "ok" if good else "gave up" if event.kind == "escalation" else "failed"
            found.append(Bar(request.tier, request.time, event.time, kind))
            request = None
        if event.kind == "attempt":
            request = event
        if event.kind == "done" and call:
            found.append(
                Bar(
                    CALLER,
                    call.time,
                    event.time,
                    "ok" if event.data["outcome"] == "ok" else "failed",
                )
            )
            call = None
    return found


def draw(events: Sequence[Event], path: str, note: str = "") -> None:
    """Write the picture as SVG. ``note`` stands beside the unit of the time axis."""
    zero, end = events[0].time, events[-1].time
    tiers = list(dict.fromkeys(event.tier for event in events if event.tier))
    row = {name: len(tiers) - at for at, name in enumerate([*tiers, CALLER])}
    figure, axes = plt.subplots(figsize=(10, 1.3 + 0.72 * len(row)))
    for tier in tiers:  # the colour of a breaker's state, from each change to the next
        changes = [
            event
            for event in events
            if event.kind == "breaker" and event.tier == tier and "new" in event.data
        ]
        for change, after in zip(
            changes, [*(event.time for event in changes[1:]), end], strict=False
        ):
            state, left = change.data["new"], change.time - zero
            if state in GROUND:
                axes.broken_barh(
                    [(left, after - change.time)], (row[tier] - 0.46, 0.92), color=GROUND[state]
                )
            if change.data["old"] == "closed":
                why = change.data["reason"].partition(":")[0]
                axes.text(
                    left + 0.03, row[tier] + 0.27, f"breaker opens: {why}", va="center", fontsize=9
                )
            elif state == "closed":
                axes.text(left + 0.03, row[tier] + 0.27, "closed again", va="center", fontsize=9)
    drawn = bars(events)
    for bar in drawn:
        width = max(bar.end - bar.start, 0.012)  # a refusal takes no time but must be seen
        axes.broken_barh(
            [(bar.start - zero, width)], (row[bar.tier] - 0.3, 0.4), color=COLOUR[bar.kind]
        )
    requests = [bar for bar in drawn if bar.tier != CALLER]
    for before, then in itertools.pairwise(requests):  # a failure, and who was asked next
        if before.kind != "ok":
            axes.annotate(
                "",
                (then.start - zero, row[then.tier] + 0.12),
                (before.end - zero, row[before.tier] - 0.3),
                arrowprops={"arrowstyle": "->", "color": COLOUR[before.kind], "linewidth": 1.2},
            )
    axes.set_yticks([at - 0.1 for at in row.values()], list(row))
    axes.set_ylim(-0.5, len(tiers) + 0.6)
    axes.set_xlim(-0.05, end - zero + 0.05)
    axes.set_xlabel(f"seconds ({note})" if note else "seconds")
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    kinds = [Patch(color=colour, label=LABEL[kind]) for kind, colour in COLOUR.items()]
    states = [
        Patch(color=GROUND["open"], label="breaker open: not asked"),
        Patch(color=GROUND["half_open"], label="half open: one trial"),
    ]
    figure.legend(handles=[*kinds, *states], loc="lower center", ncols=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    unchanging = {"Date": None, "Creator": None}
    figure.savefig(path, format="svg", metadata=unchanging, facecolor="white")  # pages may be dark
    plt.close(figure)
    drawn_text = Path(path).read_text(encoding="utf-8")
    Path(path).write_text(drawn_text.replace("'DejaVu Sans'", FONTS), encoding="utf-8")
