"""Figures of transfers: what was learned, what was kept."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from circuitlens.adapt import TransferResult
from circuitlens.view.theme import PALETTE, Mode, figure, look

__all__ = ["transfer_tradeoff"]


def transfer_tradeoff(
    results: Sequence[TransferResult], title: str = "", *, mode: Mode = "light"
) -> go.Figure:
    """Draw target gain against source change, one point a strategy, in accuracy points.

    Up is learned, left is forgotten; results without a source task are left out.
    """
    colours = look(mode)
    targets = list(dict.fromkeys(r.target_language for r in results))
    strategies = list(dict.fromkeys(r.strategy for r in results))
    # Room for both legends, one below the other, at 20 pixels a line.
    plot = max(230, 20 * (len(strategies) + (len(targets) if len(targets) > 1 else 0) + 3))
    fig = figure(title, mode=mode, height=plot + 130)
    symbols = ("circle", "diamond", "square", "triangle-up", "cross", "x")
    for target in targets if len(targets) > 1 else ():
        # Legend entries for the symbols; the points themselves are listed by strategy.
        fig.add_scatter(
            x=[None],
            y=[None],
            mode="markers",
            name=target,
            legend="legend2",
            marker={
                "size": 10,
                "color": colours.quiet,
                "symbol": symbols[targets.index(target) % 6],
            },
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
    fig.add_hline(y=0, line={"color": colours.quiet, "width": 1, "dash": "dot"})
    fig.add_vline(x=0, line={"color": colours.quiet, "width": 1, "dash": "dot"})
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
