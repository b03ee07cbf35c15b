"""One look for all figures: colours, fonts, margins."""

from __future__ import annotations

import plotly.graph_objects as go

__all__ = ["BAND", "DIVERGING", "INK", "PALETTE", "SUPPORT", "figure"]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SUPPORT = PALETTE[0]
BAND = "rgba(120,120,120,0.22)"
INK = "#1f2933"
# Blue supports, red opposes, white is nothing; safe for red-green blindness.
DIVERGING = [
    [0.0, "#b2182b"],
    [0.25, "#f4a582"],
    [0.5, "#f7f7f7"],
    [0.75, "#92c5de"],
    [1.0, "#2166ac"],
]


def figure(title: str = "", *, width: int | None = None, height: int = 380) -> go.Figure:
    """Make an empty figure in the house style."""
    return go.Figure(
        layout=go.Layout(
            title={"text": title, "x": 0.0, "xref": "paper", "font": {"size": 15}},
            template="plotly_white",
            font={"family": "Helvetica, Arial, sans-serif", "size": 12, "color": INK},
            colorway=PALETTE,
            margin={"l": 60, "r": 20, "t": 50 if title else 20, "b": 50},
            width=width,
            height=height,
            hoverlabel={"align": "left"},
        )
    )
