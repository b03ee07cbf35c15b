"""Figures of single results: a result goes in, a plotly ``Figure`` comes out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuitlens.adapt import TransferResult
from circuitlens.circuit import Circuit
from circuitlens.curve import FaithfulnessCurve
from circuitlens.errors import InputError
from circuitlens.scores import HeadScores
from circuitlens.view.theme import BAND, DIVERGING, INK, PALETTE, SUPPORT, figure

__all__ = ["faithfulness_curve", "head_heatmap", "transfer_tradeoff"]


def head_heatmap(scores: HeadScores, circuit: Circuit | None = None, title: str = "") -> go.Figure:
    """Draw the relevance of every head, layers downwards, the circuit outlined.

    The scale is centred on zero; hovering shows score, 95 % interval and rank.
    """
    mean = scores.mean.numpy()
    low, high = scores.interval().numpy()
    n_layers, n_heads = mean.shape
    rank = np.empty((n_layers, n_heads), dtype=int)
    for place, head in enumerate(scores.ranking(), start=1):
        rank[head.layer, head.index] = place
    inside = np.full((n_layers, n_heads), "")
    if circuit is not None:
        if (circuit.n_layers, circuit.n_heads) != (n_layers, n_heads):
            raise InputError(
                f"The circuit is of a {circuit.n_layers} × {circuit.n_heads} model, but the "
                f"scores are of a {n_layers} × {n_heads} one."
            )
        inside = inside.astype(object)
        for head in circuit:
            inside[head.layer, head.index] = "<br>in the circuit"
    names = np.array([[f"a{la}.h{h}" for h in range(n_heads)] for la in range(n_layers)])
    limit = float(np.abs(mean).max()) or 1.0
    fig = figure(title, height=min(900, 130 + max(22, min(46, 700 // n_layers)) * n_layers))
    fig.add_heatmap(
        z=mean,
        zmin=-limit,
        zmax=limit,
        colorscale=DIVERGING,
        xgap=1,
        ygap=1,
        customdata=np.stack([names, low, high, rank, inside], axis=-1, dtype=object),
        hovertemplate=(
            "<b>%{customdata[0]}</b>%{customdata[4]}<br>relevance %{z:.4f}"
            "<br>95 % interval %{customdata[1]:.4f} to %{customdata[2]:.4f}"
            f"<br>rank %{{customdata[3]}} of {n_layers * n_heads}<extra></extra>"
        ),
        colorbar={"title": {"text": "relevance<br>(logits)"}, "thickness": 12},
    )
    for head in circuit or ():
        fig.add_shape(
            type="rect",
            x0=head.index - 0.5,
            x1=head.index + 0.5,
            y0=head.layer - 0.5,
            y1=head.layer + 0.5,
            line={"color": INK, "width": 2},
        )
    fig.update_xaxes(title="head", dtick=max(1, n_heads // 16), range=[-0.6, n_heads - 0.4])
    fig.update_yaxes(
        title="layer", dtick=max(1, n_layers // 16), range=[n_layers - 0.4, -0.6], showgrid=False
    )
    return fig


def faithfulness_curve(
    curves: FaithfulnessCurve | Sequence[FaithfulnessCurve],
    circuit: Circuit | None = None,
    title: str = "",
    scale: str = "linear",
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
    several = [curves] if isinstance(curves, FaithfulnessCurve) else list(curves)
    first = several[0]
    start = 1 if scale == "log" else 0
    fig = make_subplots(
        1, 2, subplot_titles=("share of the margin kept, f", "accuracy"), horizontal_spacing=0.12
    )
    fig.update_layout(figure(title, height=420).layout)
    # Left, where the mode bar does not come over them.
    for n, heading in enumerate(fig.layout.annotations, start=1):
        heading.update(x=0, xref=f"x{n if n > 1 else ''} domain", xanchor="left", font={"size": 13})
    for column, (metric, without) in enumerate(
        (("faithfulness", "completeness"), ("accuracy", "without_accuracy")), start=1
    ):
        place: dict[str, Any] = {"row": 1, "col": column, "showlegend": column == 1}
        if len(random := getattr(first, f"random_{metric}")):
            _band(fig, first, random, start, place | {"legendrank": 4})
        if len(several) == 1 and len(random):
            draws = getattr(first, f"layer_matched_{metric}")
            name = f"random, matched layer by layer, median of {len(draws)}"
            style = {"color": "#777", "dash": "dash", "width": 1.5}
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
            style = {"color": INK, "width": 1}
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
    fig: go.Figure, curve: FaithfulnessCurve, draws: np.ndarray, start: int, place: dict[str, Any]
) -> None:
    sizes = list(curve.sizes[start:])
    fig.add_scatter(
        x=sizes + sizes[::-1],
        y=[*draws.max(0)[start:], *draws.min(0)[start:][::-1]],
        fill="toself",
        fillcolor=BAND,
        mode="lines",
        line={"width": 0},
        hoverinfo="skip",
        name=f"random heads, least to largest of {len(draws)}",
        legendgroup="random",
        **place,
    )


def transfer_tradeoff(results: Sequence[TransferResult], title: str = "") -> go.Figure:
    """Draw target gain against source change, one point a strategy, in accuracy points.

    Up is learned, left is forgotten; results without a source task are left out.
    """
    targets = list(dict.fromkeys(r.target_language for r in results))
    strategies = list(dict.fromkeys(r.strategy for r in results))
    # Room for both legends, one below the other, at 20 pixels a line.
    plot = max(230, 20 * (len(strategies) + (len(targets) if len(targets) > 1 else 0) + 3))
    fig = figure(title, height=plot + 130)
    symbols = ("circle", "diamond", "square", "triangle-up", "cross", "x")
    for target in targets if len(targets) > 1 else ():
        # Legend entries for the symbols; the points themselves are listed by strategy.
        fig.add_scatter(
            x=[None],
            y=[None],
            mode="markers",
            name=target,
            legend="legend2",
            marker={"size": 10, "color": "#777", "symbol": symbols[targets.index(target) % 6]},
        )
    for n, strategy in enumerate(strategies):
        chosen = [r for r in results if r.strategy == strategy and r.source_change is not None]
        fig.add_scatter(
            x=[100 * (r.source_change or 0.0) for r in chosen],
            y=[100 * r.target_gain for r in chosen],
            mode="markers",
            name=strategy,
            marker={
                "size": 12,
                "color": PALETTE[n % len(PALETTE)],
                "symbol": [symbols[targets.index(r.target_language) % 6] for r in chosen],
                "line": {"color": "white", "width": 1},
            },
            customdata=[[r.target_language, f"{r.n_trainable:,}"] for r in chosen],
            hovertemplate=(
                "%{customdata[0]}: target %{y:+.1f}, source %{x:+.1f} points"
                "<br>%{customdata[1]} trained<extra>" + strategy + "</extra>"
            ),
        )
    fig.add_hline(y=0, line={"color": SUPPORT, "width": 1, "dash": "dot"})
    fig.add_vline(x=0, line={"color": SUPPORT, "width": 1, "dash": "dot"})
    fig.update_xaxes(title="source accuracy, change in points")
    fig.update_yaxes(title="target accuracy, gain in points")
    fig.update_layout(
        legend={"title": {"text": "strategy"}, "y": 1.0},
        legend2={
            "title": {"text": "target"},
            "y": 1 - 20 * (len(strategies) + 2) / plot,
            "x": 1.02,
        },
    )
    return fig
