"""Figures of faithfulness: what circuits of growing size keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuitlens.circuit import Circuit
from circuitlens.curve import FaithfulnessCurve
from circuitlens.errors import InputError
from circuitlens.view.theme import PALETTE, Mode, figure, look

__all__ = ["faithfulness_curve"]


def faithfulness_curve(
    curves: FaithfulnessCurve | Sequence[FaithfulnessCurve],
    circuit: Circuit | None = None,
    title: str = "",
    scale: str = "linear",
    *,
    mode: Mode = "light",
) -> go.Figure:
    """Draw margin and accuracy kept by circuits of growing size, beside random circuits.

    Thin dotted lines are the model without those heads. The band spans the random circuits of the
    first curve; for a single curve a dashed line is the median of the layer-matched ones.

    Args:
        curves: one, or several of the same model and examples under different methods.
        circuit: marks its size.
        title: of the figure.
        scale: of the axis of heads; ``"log"`` spreads small circuits out and has no place for the
            empty one.

    Raises:
        InputError: for another scale.
    """
    if scale not in ("linear", "log"):
        raise InputError(f"The scale is 'linear' or 'log', but is {scale!r}.")
    colours = look(mode)
    several = [curves] if isinstance(curves, FaithfulnessCurve) else list(curves)
    first = several[0]
    start = 1 if scale == "log" else 0
    fig = make_subplots(
        1, 2, subplot_titles=("share of the margin kept, f", "accuracy"), horizontal_spacing=0.12
    )
    fig.update_layout(figure(title, mode=mode, height=420).layout)
    # Left, where the mode bar does not come over them.
    for n, heading in enumerate(fig.layout.annotations, start=1):
        heading.update(x=0, xref=f"x{n if n > 1 else ''} domain", xanchor="left", font={"size": 13})
    for column, (metric, without) in enumerate(
        (("faithfulness", "completeness"), ("accuracy", "without_accuracy")), start=1
    ):
        place: dict[str, Any] = {"row": 1, "col": column, "showlegend": column == 1}
        if len(random := getattr(first, f"random_{metric}")):
            _band(fig, first, random, start, colours.band, place | {"legendrank": 4})
        if len(several) == 1 and len(random):
            draws = getattr(first, f"layer_matched_{metric}")
            name = f"random, matched layer by layer, median of {len(draws)}"
            style = {"color": colours.quiet, "dash": "dash", "width": 1.5}
            median = np.median(draws, axis=0)
            _line(fig, first, median, start, name, style, place | {"legendrank": 3})
        for n, curve in enumerate(several):
            colour = PALETTE[n % len(PALETTE)]
            name, style = "the model without them", {"color": colour, "dash": "dot", "width": 1}
            # Once in the legend: the colours are those of the thick lines.
            once = {"showlegend": column == 1 and n == 0, "legendrank": 2}
            _line(fig, curve, getattr(curve, without), start, name, style, place | once)
            name, style = f"top heads ({curve.method})", {"color": colour, "width": 2.5}
            line = place | {"mode": "lines+markers", "legendrank": 1}
            _line(fig, curve, getattr(curve, metric), start, name, style, line)
        if circuit is not None:
            style = {"color": colours.ink, "width": 1}
            fig.add_vline(x=len(circuit), line=style, row=1, col=column)
    if circuit is not None:
        fig.add_annotation(
            x=math.log10(max(1, len(circuit))) if scale == "log" else len(circuit),
            y=1.0,
            yref="y domain",
            xref="x",
            text="circuit",
            showarrow=False,
            xanchor="left",
            xshift=4,
            font={"size": 11},
        )
    ticks = _spread(first.sizes[start:], scale)
    fig.update_xaxes(
        title=f"heads kept, of {first.n_heads}",
        type=scale,
        tickvals=ticks,
        ticktext=[f"{n}<br>{_percent(n / first.n_heads)} %" for n in ticks],
        tickangle=0,
    )
    below = {"yref": "container", "y": 0, "yanchor": "bottom", "x": 0}
    fig.update_layout(legend={"orientation": "h", **below}, margin={"b": 110})
    return fig


def _percent(share: float) -> str:
    """Percents in as few digits as a tick has room for: 0.1, 0.5, 8.3, 21."""
    percent = 100 * share
    return f"{float(f'{percent:.2g}' if percent >= 1 else f'{percent:.1g}'):g}"


def _spread(sizes: Sequence[int], scale: str) -> list[int]:
    """Sizes that can be written below an axis without touching: the ends, then large ones first."""
    place = np.log(sizes) if scale == "log" else np.array(sizes, dtype=float)
    gap = 0.09 * (place[-1] - place[0])
    chosen = [0, len(sizes) - 1]
    for i in range(len(sizes) - 2, 0, -1):
        if np.abs(place[chosen] - place[i]).min() >= gap:
            chosen.append(i)
    return sorted({sizes[i] for i in chosen})


def _line(
    fig: go.Figure,
    curve: FaithfulnessCurve,
    values: np.ndarray,
    start: int,
    name: str,
    style: dict[str, Any],
    place: dict[str, Any],
) -> None:
    fig.add_scatter(
        x=curve.sizes[start:],
        y=values[start:],
        name=name,
        legendgroup=name,
        line=style,
        customdata=100 * curve.shares[start:],
        hovertemplate=f"%{{x}} heads (%{{customdata:.3g}} %): %{{y:.3f}}<extra>{name}</extra>",
        **{"mode": "lines", **place},
    )


def _band(
    fig: go.Figure,
    curve: FaithfulnessCurve,
    draws: np.ndarray,
    start: int,
    colour: str,
    place: dict[str, Any],
) -> None:
    sizes = list(curve.sizes[start:])
    fig.add_scatter(
        x=sizes + sizes[::-1],
        y=[*draws.max(0)[start:], *draws.min(0)[start:][::-1]],
        fill="toself",
        fillcolor=colour,
        mode="lines",
        line={"width": 0},
        hoverinfo="skip",
        name=f"random heads, least to largest of {len(draws)}",
        legendgroup="random",
        **place,
    )
