"""The plot of time per call against the peers, as an SVG that is the same for the same figures."""

from __future__ import annotations

import os
from collections.abc import Mapping

import matplotlib
from measure import duration

matplotlib.use("svg")
from matplotlib import pyplot

OURS, OTHERS = "#0969da", "#9aa4b0"  # both read well on white and on black


def draw(figures: Mapping[str, Mapping[str, float]], path: str) -> None:
    """One panel for each kind of call, one bar for each contender; the scale is logarithmic."""
    settings = {"svg.hashsalt": "copilot_router", "svg.fonttype": "path", "font.size": 9.0}
    with matplotlib.rc_context(settings):
        figure, panels = pyplot.subplots(
            len(figures), 1, figsize=(8, 1.75 * len(figures)), layout="constrained", squeeze=False
        )
        for panel, (title, times) in zip(panels[:, 0], figures.items(), strict=True):
            names = sorted(times, key=lambda name: times[name], reverse=True)
            colours = [OURS if name == "copilot_router" else OTHERS for name in names]
            bars = panel.barh(names, [times[name] for name in names], color=colours)
            panel.bar_label(bars, [f" {duration(times[name])}" for name in names])
            panel.set_xscale("log")
            panel.set_xlim(min(times.values()) / 2, max(times.values()) * 2.5)
            panel.set_title(title, loc="left", fontweight="bold", fontsize=10)
            panel.spines[["top", "right", "bottom"]].set_visible(False)
            panel.tick_params(bottom=False, labelbottom=False, left=False)
            panel.minorticks_off()
        figure.suptitle("Time per call (median, logarithmic scale; shorter is better)", fontsize=11)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
        pyplot.close(figure)
