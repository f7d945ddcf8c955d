"""How the plots look: one style for paper and page, colours that the colour-blind can tell apart, files that repeat.

The page shows the same SVG in the reader's light or dark colours: every colour is replaced by a CSS variable.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

# Okabe and Ito's colours without yellow and black, which vanish on white or black
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f6bb3"]
MARKERS = ["o", "s", "D", "^", "v", "P", "X"]
LINES = ["-", "--", "-.", ":"]
INK = "#1f2328"
MUTED = "#656d77"
GRID = "#e1e4e9"
WIDTH = 5.0
"""Inches; two plots fit side by side on a laptop and one on a phone."""

CSS_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    **{c: f"--series-{i}" for i, c in enumerate(COLOURS)},
}

RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same everywhere
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a task's name is no formula
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.minor.size": 2,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",  # text stays text: searchable, and in the page's font
}


@contextmanager
def plot_style(name: str) -> Iterator[None]:
    """The style for the plot called `name`; the same plot gets the same ids in its SVG each time."""
    with mpl.rc_context({**RC, "svg.hashsalt": name}):
        yield


def series_style(index: int) -> tuple[str, str, str]:
    """(colour, marker, line) of the run at this place, the same in every plot."""
    return (
        COLOURS[index % len(COLOURS)],
        MARKERS[index % len(MARKERS)],
        LINES[index // len(COLOURS) % len(LINES)],
    )


def save(figure: Figure, directory: Path, name: str) -> None:
    """`name`.svg and `name`.png, on white, without a date."""
    figure.savefig(directory / f"{name}.svg", facecolor="white", metadata={"Date": None, "Creator": None})
    figure.savefig(directory / f"{name}.png", facecolor="white", dpi=200, metadata={"Software": None})


def svg_for_page(figure: Figure, name: str, description: str) -> str:
    """The figure as an <svg> element for HTML: transparent, scaling, coloured by CSS variables, ids its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'font: (?:\d+ )?([\d.]+)px [^;"]*', r"font-size: \1px", svg)
    svg = re.sub(
        r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 xmlns:xlink="http://www.w3.org/1999/xlink" role="img">', svg
    )
    return svg.replace(">", f"><title>{description}</title>", 1).strip()
