"""Figures of what heads do: a card for one head, and the margin that every layer has reached."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuitlens.circuit import Circuit
from circuitlens.circuits.lens import MarginByLayer
from circuitlens.circuits.looking import HeadRoles
from circuitlens.nodes import Head
from circuitlens.view.theme import LEGEND_BELOW, PALETTE, Mode, figure, look, plain
from circuitlens.view.tokens import visible

__all__ = ["head_card", "margin_lens"]


def head_card(
    roles: HeadRoles,
    head: Head | str,
    circuit: Circuit | None = None,
    *,
    mode: Mode = "light",
) -> go.Figure:
    """Draw what one head does: where it looks, which tokens it reads, and which labels it raises.

    Top: mean attention to places (the first token, the token before, itself, earlier copies) and to
    one occurrence of the tokens that get most of it from the decision. Below: what the logit of
    each label loses when the head is ablated, relative to the mean of all labels, by the class of
    the example.

    Args:
        roles: of :func:`circuitlens.head_roles`.
        head: one of its heads.
        circuit: gives the head's name, if it has one.
        mode: of colours.

    Raises:
        InputError: if the head was not looked at.
    """
    role, colours = roles.of(head), look(mode)
    name = str(role.head) if circuit is None else circuit.label(role.head)
    places = {
        "first token": role.first,
        "token before": role.previous,
        "itself": role.itself,
        "earlier copies": role.copies,
    }
    names, shares = [t for t, _ in role.looked_at], [share for _, share in role.looked_at]
    fig = make_subplots(
        2,
        2,
        specs=[[{}, {}], [{"colspan": 2}, None]],
        subplot_titles=("attention to places", "attention to tokens", "labels raised, in logits"),
        vertical_spacing=0.2,
        horizontal_spacing=0.2,
        row_heights=[0.5, 0.5],
    )
    golds = list(role.raises)
    labels = list(dict.fromkeys(label for row in role.raises.values() for label in row))
    title = f"{plain(name)}, {roles.n_examples} examples"
    fig.update_layout(figure(title, mode=mode, height=330 + 28 * len(golds)).layout)
    for heading in fig.layout.annotations:
        heading.update(font={"size": 13})
    bars = {"orientation": "h", "marker": {"color": PALETTE[0]}, "showlegend": False}
    share = "%{y}: %{x:.0%}<extra></extra>"
    fig.add_bar(x=[*places.values()], y=[*places], hovertemplate=share, row=1, col=1, **bars)
    fig.add_bar(
        x=shares,
        y=[plain(token) for token in visible(names)],
        hovertemplate=share,
        row=1,
        col=2,
        **bars,
    )
    values = np.array([[role.raises[g].get(label, np.nan) for label in labels] for g in golds])
    limit = float(np.nanmax(np.abs(values))) or 1.0
    fig.add_heatmap(
        z=values,
        x=[plain(label) for label in labels],
        y=[f"on {plain(gold)}" for gold in golds],
        zmin=-limit,
        zmax=limit,
        colorscale=colours.diverging,
        text=[[f"{value:+.2f}".replace("-", "−") for value in row] for row in values],
        texttemplate="%{text}",
        hovertemplate="%{y} examples, %{x}: %{z:+.3f} logits<extra></extra>",
        showscale=False,
        xgap=1,
        ygap=1,
        row=2,
        col=1,
    )
    for column in (1, 2):
        fig.update_xaxes(tickformat=".0%", rangemode="tozero", nticks=4, row=1, col=column)
        fig.update_yaxes(autorange="reversed", type="category", showgrid=False, row=1, col=column)
    fig.update_xaxes(type="category", showgrid=False, row=2)
    fig.update_yaxes(autorange="reversed", type="category", showgrid=False, row=2)
    fig.update_layout(margin={"l": 110, "r": 20, "t": 80, "b": 40})
    return fig


def margin_lens(
    found: MarginByLayer, title: str = "", *, by_label: bool = True, mode: Mode = "light"
) -> go.Figure:
    """Draw the task margin after every layer, as if the model ended there, and the accuracy.

    Args:
        found: of :func:`circuitlens.margin_by_layer`.
        title: of the figure.
        by_label: a thin line for the examples of each label too.
        mode: of colours.
    """
    colours, frame = look(mode), found.to_frame()
    stages = frame["stage"].tolist()
    fig = make_subplots(
        2,
        1,
        shared_xaxes=True,
        vertical_spacing=0.12,
        row_heights=[0.65, 0.35],
        subplot_titles=("margin, in logits", "accuracy"),
    )
    fig.update_layout(figure(title, mode=mode, height=480).layout)
    for n, heading in enumerate(fig.layout.annotations, start=1):
        heading.update(x=0, xref=f"x{n if n > 1 else ''} domain", xanchor="left", font={"size": 13})
    fig.add_scatter(
        x=[*stages, *stages[::-1]],
        y=[*frame["high"], *frame["low"][::-1]],
        fill="toself",
        mode="lines",
        fillcolor=colours.band,
        line={"width": 0},
        hoverinfo="skip",
        name="95 % interval",
        row=1,
        col=1,
    )
    line = {"mode": "lines+markers", "line": {"color": PALETTE[0], "width": 2.5}}
    here = "%{x}: %{y:.3f}<extra>%{fullData.name}</extra>"
    fig.add_scatter(
        x=stages, y=frame["margin"], name="all examples", hovertemplate=here, row=1, col=1, **line
    )
    labels = list(dict.fromkeys(found.labels)) if by_label else []
    for n, label in enumerate(labels):
        fig.add_scatter(
            x=stages,
            y=frame[f"margin {label}"],
            mode="lines",
            name=plain(label),
            line={"color": PALETTE[1 + n % (len(PALETTE) - 1)], "width": 1, "dash": "dot"},
            hovertemplate=here,
            row=1,
            col=1,
        )
    fig.add_scatter(
        x=stages,
        y=frame["accuracy"],
        name="accuracy",
        showlegend=False,
        hovertemplate=here,
        row=2,
        col=1,
        **line,
    )
    fig.update_xaxes(type="category", showgrid=False, nticks=13)
    fig.update_xaxes(title="behind", row=2)
    fig.update_yaxes(tickformat=".0%", range=[-0.03, 1.03], row=2)
    fig.update_layout(legend=LEGEND_BELOW, margin={"t": 70 if title else 40, "b": 110})
    return fig
