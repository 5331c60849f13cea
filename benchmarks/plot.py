"""Draws time per call beside other libraries as an SVG. The same figures give the same file.

``make bench WRITE=1`` draws it after a measurement. ``python benchmarks/plot.py`` draws it again
from RESULTS.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import matplotlib
from measure import duration

matplotlib.use("svg")
from matplotlib import pyplot

HERE = os.path.dirname(os.path.abspath(__file__))
PICTURE = os.path.join(os.path.dirname(HERE), "docs", "benchmarks.svg")
OURS, OTHERS = "#0969da", "#9aa4b0"
#: Seconds and their names on the axis. All panels have this axis, so bars can be compared.
TICKS = {
    1e-6: "1 µs",
    1e-5: "10 µs",
    1e-4: "100 µs",
    1e-3: "1 ms",
    1e-2: "10 ms",
    1e-1: "100 ms",
    1.0: "1 s",
}
#: Panels, and the headings of their tables in RESULTS.md. All but the first are calls over HTTP.
TABLES = {
    "in the process": "Chain: a provider in the process that answers at once, one more in reserve",
    "whole JSON": "HTTP, whole JSON",
    "a stream of 1 event": "HTTP, a stream of 1 event",
    "a stream of 50 events": "HTTP, a stream of 50 events",
    "a stream of 500 events": "HTTP, a stream of 500 events",
}
SHOWN = {
    title: f"An answer {title}, no network"
    if title == "in the process"
    else f"{title[0].upper()}{title[1:]}, over HTTP"
    for title in TABLES
}
#: Text stays text. Verdana is as wide as DejaVu Sans, with which the layout was measured.
FONTS = "'DejaVu Sans', Verdana, sans-serif"
NOTE = (
    "Median time per call; shorter is better.\n"
    "The axis is logarithmic: each line is ten\n"
    "times the one before.\n\n"
    "Blue: copilot_router with all features on.\n"
    "Grey: other libraries with their defaults.\n"
    "All took turns in one run on one machine."
)


def draw(figures: Mapping[str, Mapping[str, float]], path: str) -> None:
    """One panel for each kind of call, one bar for each library."""
    settings = {"svg.hashsalt": "copilot_router", "svg.fonttype": "none", "font.size": 9.0}
    with matplotlib.rc_context(settings):
        figure, grid = pyplot.subplots(
            -(-(len(figures) + 1) // 2), 2, figsize=(10, 6), layout="constrained"
        )
        panels = list(grid.flat)
        for panel, (title, times) in zip(panels, figures.items(), strict=False):
            names = sorted(times, key=lambda name: times[name], reverse=True)
            colours = [OURS if name == "copilot_router" else OTHERS for name in names]
            bars = panel.barh(
                names, [times[name] for name in names], left=0, color=colours, zorder=2
            )
            panel.bar_label(bars, [duration(times[name]) for name in names], padding=4)
            panel.set_xscale("log")
            panel.set_xlim(1e-6, 6.0)  # room for the label of the longest bar
            panel.set_xticks(list(TICKS), list(TICKS.values()), fontsize=8)
            panel.minorticks_off()
            panel.grid(axis="x", color="#dddddd", linewidth=0.8, zorder=0)
            panel.set_title(SHOWN.get(title, title), loc="left", fontweight="bold", fontsize=10)
            panel.spines[["top", "right", "left"]].set_visible(False)
            panel.tick_params(left=False)
        panels[len(figures)].text(0.0, 0.9, NOTE, va="top", fontsize=9.5, linespacing=1.5)
        for panel in panels[len(figures) :]:
            panel.axis("off")
        figure.get_layout_engine().set(h_pad=0.1, hspace=0.04)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        figure.savefig(
            path, metadata={"Date": None}, facecolor="white"
        )  # a background of its own: pages may be dark
        pyplot.close(figure)
    with open(path, encoding="utf-8") as file:
        text = file.read()
    with open(path, "w", encoding="utf-8") as file:
        file.write(text.replace("'DejaVu Sans'", FONTS))


def seconds(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}[unit]


def measured(results: str) -> dict[str, dict[str, float]]:
    """The medians that RESULTS.md holds."""
    found: dict[str, dict[str, float]] = {}
    for title, heading in TABLES.items():
        table = results.split(f"**{heading}**")[1].lstrip().split("\n\n")[0]
        rows = re.findall(r"(?m)^\| ([^|]+) \| ([\d.]+ \w+) \|", table)
        found[title] = {name: seconds(median) for name, median in rows}
    return found


if __name__ == "__main__":
    with open(os.path.join(HERE, "RESULTS.md"), encoding="utf-8") as file:
        draw(measured(file.read()), PICTURE)
