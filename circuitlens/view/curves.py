"""Figures of faithfulness: what circuits of growing size keep, and what each head is needed for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuitlens.circuit import Circuit
from circuitlens.circuits.curve import FaithfulnessCurve
from circuitlens.circuits.measure_minimality import Minimality
from circuitlens.errors import InputError
from circuitlens.view.theme import LEGEND_BELOW, PALETTE, Mode, figure, look, plain

__all__ = ["faithfulness_curve", "minimality_bars"]


def faithfulness_curve(
    curves: FaithfulnessCurve | Sequence[FaithfulnessCurve],
    circuit: Circuit | None = None,
    title: str = "",
    scale: str = "linear",
    *,
    mode: Mode = "light",
) -> go.Figure:
    """Draw margin and accuracy kept by circuits of growing size, alongside random circuits.

    Thin dotted lines are the model without those heads. The band spans the random circuits of the
    first curve; for a single curve a dashed line is the median of the layer-matched ones.

    Args:
        curves: one, or several of the same model and examples under different methods.
        circuit: marks its size.
        title: of the figure.
        scale: of the axis of heads; ``"log"`` spreads small circuits out and has no place for the
            empty one.

    Raises:
        InputError: for another scale, or without any curve.
    """
    if scale not in ("linear", "log"):
        raise InputError(f"The scale must be 'linear' or 'log', but is {scale!r}.")
    colours = look(mode)
    several = [curves] if isinstance(curves, FaithfulnessCurve) else list(curves)
    if not several:
        raise InputError("There is no curve to draw: give at least one.")
    first = several[0]
    start = 1 if scale == "log" else 0
    # One above the other: side by side, neither would have room in a paper's column.
    fig = make_subplots(
        2,
        1,
        subplot_titles=("share of the margin kept, f", "accuracy"),
        shared_xaxes=True,
        vertical_spacing=0.12,
    )
    fig.update_layout(figure(title, mode=mode, height=640).layout)
    # Left, where the mode bar does not come over them.
    for n, heading in enumerate(fig.layout.annotations, start=1):
        heading.update(x=0, xref=f"x{n if n > 1 else ''} domain", xanchor="left", font={"size": 13})
    for row, (metric, without) in enumerate(
        (("faithfulness", "completeness"), ("accuracy", "without_accuracy")), start=1
    ):
        place: dict[str, Any] = {"row": row, "col": 1, "showlegend": row == 1}
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
            once = {"showlegend": row == 1 and n == 0, "legendrank": 2}
            _line(fig, curve, getattr(curve, without), start, name, style, place | once)
            name, style = (
                f"top {_named(curve)} ({plain(curve.method)})",
                {"color": colour, "width": 2.5},
            )
            line = place | {"mode": "lines+markers", "legendrank": 1}
            _line(fig, curve, getattr(curve, metric), start, name, style, line)
        if circuit is not None:
            style = {"color": colours.ink, "width": 1}
            fig.add_vline(x=len(circuit), line=style, row=row, col=1)
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
    if np.isnan(first.faithfulness).all():
        fig.add_annotation(
            x=0.5,
            xref="x domain",
            y=0.5,
            yref="y domain",
            text="f has no meaning here:<br>the model is no better<br>with its heads than without",
            showarrow=False,
        )
    sizes = first.sizes[start:]
    labels = [f"{n}<br>{_percent(n / first.n_heads)} %" for n in sizes]
    shown = _spread(sizes, scale, labels)
    fig.update_xaxes(
        type=scale,
        tickvals=[sizes[k] for k in shown],
        ticktext=[labels[k] for k in shown],
        tickfont={"size": 10},
        tickangle=0,
    )
    fig.update_xaxes(title=f"{_named(first)} kept, of {first.n_heads:,}", row=2)
    top = 70 if title else 40
    fig.update_layout(legend=LEGEND_BELOW, margin={"t": top, "b": 110})
    return fig


def minimality_bars(result: Minimality, title: str = "", *, mode: Mode = "light") -> go.Figure:
    """Draw what the circuit loses without each of its heads, the largest loss on top.

    Whiskers are 95 % bootstrap intervals over examples. The bars of heads whose interval reaches
    zero are hollow: the circuit may do as well without them.

    Args:
        result: losses of f, the normalised margin, as :func:`circuitlens.minimality` returns them.
        title: of the figure.
        mode: ``"light"`` or ``"dark"``.

    Raises:
        InputError: if f, or its intervals, have no meaning; the message explains why.
    """
    if result.caveat:
        raise InputError(result.caveat)
    colours = look(mode)
    frame = result.to_frame()
    negative, positive = colours.diverging[0][1], colours.diverging[-1][1]
    signs = np.where(frame["loss"] >= 0, positive, negative)
    needed = (frame["low"] > 0) | (frame["high"] < 0)
    fig = figure(title, mode=mode, height=min(1400, 160 + 19 * len(frame)))
    fig.add_bar(
        x=frame["loss"],
        y=frame["head"],
        orientation="h",
        marker={
            "color": np.where(needed, signs, colours.paper),
            "line": {"color": signs, "width": 1.5},
        },
        error_x={
            "type": "data",
            "symmetric": False,
            "array": frame["high"] - frame["loss"],
            "arrayminus": frame["loss"] - frame["low"],
            "color": colours.ink,
            "thickness": 1,
            "width": 3,
        },
        customdata=frame[["low", "high"]],
        hovertemplate=(
            "<b>%{y}</b><br>f loses %{x:.4f}"
            "<br>95 % interval %{customdata[0]:.4f} to %{customdata[1]:.4f}<extra></extra>"
        ),
        showlegend=False,
    )
    for name, fill in (("interval apart from 0", colours.quiet), ("reaches 0", colours.paper)):
        # Entries of their own, because bars take their colours from their signs.
        marker = {"color": fill, "line": {"color": colours.quiet, "width": 1.5}}
        fig.add_bar(x=[None], y=[None], name=name, marker=marker)
    fig.update_xaxes(
        title=f"loss of f without the head (f = {result.faithfulness:.2f})", nticks=6, zeroline=True
    )
    fig.update_yaxes(type="category", autorange="reversed", showgrid=False)
    fig.update_layout(bargap=0.25, barmode="overlay", legend=LEGEND_BELOW)
    return fig


def _percent(share: float) -> str:
    """Percents in as few digits as a tick has room for: 0.1, 0.5, 8.3, 21."""
    percent = 100 * share
    return f"{float(f'{percent:.2g}' if percent >= 1 else f'{percent:.1g}'):g}"


def _spread(sizes: Sequence[int], scale: str, labels: Sequence[str]) -> list[int]:
    """Indices of labels that can stand below an axis without touching: the ends, then large sizes.

    Both lines of a label are about as long as its second. A character of it takes 2.7 % of an axis
    in a paper's column.
    """
    place = np.log(sizes) if scale == "log" else np.array(sizes, dtype=float)
    share = (place - place[0]) / ((place[-1] - place[0]) or 1.0)
    length = np.array([len(label.split("<br>")[-1]) for label in labels])
    chosen = [0, len(sizes) - 1]
    for i in range(len(sizes) - 2, 0, -1):
        room = 0.027 * (length[chosen] + length[i]) / 2
        if (np.abs(share[chosen] - share[i]) >= room).all():
            chosen.append(i)
    return sorted(set(chosen))


def _named(curve: FaithfulnessCurve) -> str:
    """What the nodes of a curve are called."""
    others = {"heads+mlps": "heads and MLPs", "heads@positions": "heads at positions"}
    return others.get(curve.nodes, curve.nodes)


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
        hovertemplate=f"%{{x}} {_named(curve)} (%{{customdata:.3g}} %): %{{y:.3f}}"
        f"<extra>{name}</extra>",
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
        name=f"random {_named(curve)}, least to largest of {len(draws)}",
        legendgroup="random",
        **place,
    )
