"""Figures of single heads: their relevance by layer."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from circuitlens.circuit import Circuit
from circuitlens.errors import InputError
from circuitlens.scores import HeadScores
from circuitlens.view.theme import Mode, figure, look

__all__ = ["head_heatmap"]


def head_heatmap(
    scores: HeadScores,
    circuit: Circuit | None = None,
    title: str = "",
    *,
    mode: Mode = "light",
) -> go.Figure:
    """Draw the relevance of every head, layers downwards, the circuit outlined.

    The scale is centred on zero; hovering shows score, 95 % interval and rank.
    """
    colours = look(mode)
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
    fig = figure(
        title, mode=mode, height=min(900, 130 + max(22, min(46, 700 // n_layers)) * n_layers)
    )
    fig.add_heatmap(
        z=mean,
        zmin=-limit,
        zmax=limit,
        colorscale=colours.diverging,
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
            line={"color": colours.ink, "width": 2},
        )
    fig.update_xaxes(title="head", dtick=max(1, n_heads // 16), range=[-0.6, n_heads - 0.4])
    fig.update_yaxes(
        title="layer", dtick=max(1, n_layers // 16), range=[n_layers - 0.4, -0.6], showgrid=False
    )
    return fig
