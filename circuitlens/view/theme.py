"""One look for all figures: colours, fonts, margins, light and dark."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any, Literal

import plotly.graph_objects as go
import plotly.io as pio

from circuitlens.errors import InputError

__all__ = [
    "LEGEND_BELOW",
    "PALETTE",
    "TEMPLATES",
    "Look",
    "Mode",
    "colour_bar",
    "figure",
    "look",
    "plain",
]

Mode = Literal["light", "dark"]

# Okabe and Ito's palette, which colour-blind readers can tell apart; without its black, which no
# dark page shows, and its yellow, which no light one does.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D46")

# A legend beside the plot would leave a paper's column nothing to draw in.
LEGEND_BELOW: dict[str, Any] = {
    "orientation": "h",
    "yref": "container",
    "y": 0,
    "yanchor": "bottom",
    "x": 0,
    "xanchor": "left",
}


@dataclass(frozen=True)
class Look:
    """Colours of a mode.

    Attributes:
        ink: text, outlines of circuits.
        quiet: what stands in the background, such as lines of controls.
        grid: of the axes.
        paper: behind everything; also what "no effect" looks like in a diverging scale.
        band: filling of intervals and of random circuits.
        diverging: negative (red) over zero (paper) to positive (blue); safe for red-green
            blindness.
        sequential: from nothing (paper) to much (blue).
    """

    ink: str
    quiet: str
    grid: str
    paper: str
    band: str
    diverging: tuple[tuple[float, str], ...]
    sequential: tuple[tuple[float, str], ...]


_LOOKS: dict[str, Look] = {
    "light": Look(
        ink="#1f2933",
        quiet="#6b7280",
        grid="#e5e7eb",
        paper="#ffffff",
        band="rgba(120,120,120,0.22)",
        diverging=(
            (0.0, "#b2182b"),
            (0.25, "#f4a582"),
            (0.5, "#f7f7f7"),
            (0.75, "#92c5de"),
            (1.0, "#2166ac"),
        ),
        sequential=((0.0, "#f7f7f7"), (0.5, "#92c5de"), (1.0, "#2166ac")),
    ),
    "dark": Look(
        ink="#e5e7eb",
        quiet="#9ca3af",
        grid="#374151",
        paper="#111827",
        band="rgba(160,160,160,0.25)",
        diverging=(
            (0.0, "#f4745f"),
            (0.25, "#9c4136"),
            (0.5, "#1f2937"),
            (0.75, "#33648f"),
            (1.0, "#6bb3f0"),
        ),
        sequential=((0.0, "#1f2937"), (0.5, "#33648f"), (1.0, "#6bb3f0")),
    ),
}


def look(mode: Mode) -> Look:
    """Colours of ``"light"`` or ``"dark"``.

    Raises:
        InputError: for another mode.
    """
    if mode not in _LOOKS:
        raise InputError(f"The mode of a figure must be 'light' or 'dark', but is {mode!r}.")
    return _LOOKS[mode]


def figure(
    title: str = "", *, mode: Mode = "light", width: int | None = None, height: int = 380
) -> go.Figure:
    """Make an empty figure in the house style; titles and legends stand to the left."""
    look(mode)
    return go.Figure(
        layout=go.Layout(
            title={"text": title, "x": 0.0, "xref": "paper", "font": {"size": 15}},
            template=TEMPLATES[mode],
            margin={"l": 60, "r": 20, "t": 50 if title else 20, "b": 50},
            width=width,
            height=height,
            hoverlabel={"align": "left"},
        )
    )


def _template(colours: Look) -> go.layout.Template:
    axis = {
        "gridcolor": colours.grid,
        "linecolor": colours.grid,
        "zerolinecolor": colours.grid,
        "automargin": True,
    }
    return go.layout.Template(
        layout={
            "xaxis": axis,
            "yaxis": axis,
            "font": {
                "family": "Helvetica, Arial, sans-serif",
                "size": 12,
                "color": colours.ink,
            },
            "paper_bgcolor": colours.paper,
            "plot_bgcolor": colours.paper,
            "colorway": PALETTE,
        }
    )


# For your own figures: fig.update_layout(template="circuitlens_dark").
TEMPLATES = {"light": "circuitlens", "dark": "circuitlens_dark"}
for _mode, _name in TEMPLATES.items():
    pio.templates[_name] = _template(_LOOKS[_mode])


def plain(text: object) -> str:
    """Write ``text`` so that plotly shows it as it is.

    Plotly renders a subset of HTML, and what stands between dollars as mathematics.
    """
    return html.escape(str(text), quote=False).replace("$", "&#36;")


def colour_bar(title: str) -> dict[str, Any]:
    """Describe a colour bar that lies below the plot and is as wide."""
    return {
        "title": {"text": title, "side": "bottom"},
        "orientation": "h",
        "thickness": 10,
        "x": 0.5,
        "yref": "container",
        "y": 0,
        "yanchor": "bottom",
        "ypad": 4,
        "nticks": 5,
    }
