"""Figures of heads: relevance by layer, by rank and by position, and what circuits share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from circuitlens.circuit import Circuit
from circuitlens.circuits.effects import HeadEffects
from circuitlens.errors import InputError
from circuitlens.nodes import Head
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.view.theme import LEGEND_BELOW, Look, Mode, colour_bar, figure, look, plain
from circuitlens.view.tokens import short_tokens, token_axis, visible

__all__ = ["head_bars", "head_heatmap", "head_positions", "overlap_matrix"]

# What tick labels and titles take above and below a plot, in pixels.
_FRAME = 120


def head_heatmap(
    scores: HeadScores,
    circuit: Circuit | None = None,
    title: str = "",
    *,
    mode: Mode = "light",
) -> go.Figure:
    """Draw the relevance of every head, layers downwards, the circuit outlined.

    The scale is centred on zero; hovering shows score, 95 % interval and rank. If the circuit was
    found level by level, the number in an outlined cell is the level of that head.

    Args:
        scores: relevance in logits.
        circuit: of the same model.
        title: of the figure.
        mode: ``"light"`` or ``"dark"``.

    Raises:
        InputError: if the circuit is of a model of another size.
    """
    colours = look(mode)
    mean = scores.mean.numpy()
    low, high = scores.bounds().numpy()
    n_layers, n_heads = mean.shape
    _check_size(scores, circuit)
    rank = np.empty((n_layers, n_heads), dtype=int)
    for place, head in enumerate(scores.ranking(), start=1):
        rank[head.layer, head.index] = place
    inside = np.full((n_layers, n_heads), "", dtype=object)
    level = inside.copy()
    levels = circuit.levels if circuit is not None else {}
    several = len(set(levels.values())) > 1
    for head in circuit or ():
        inside[head.layer, head.index] = "<br>in the circuit"
        if head in levels:
            inside[head.layer, head.index] += f", level {levels[head]}"
        if several:
            level[head.layer, head.index] = str(levels.get(head, ""))
    names = np.array(
        [[_name(Head(la, h), circuit) for h in range(n_heads)] for la in range(n_layers)]
    )
    limit = float(np.abs(mean).max()) or 1.0
    fig = figure(
        title,
        mode=mode,
        # Below some height plotly puts the colour bar on the axis.
        height=max(280, min(900, 150 + max(22, min(46, 700 // n_layers)) * n_layers))
        + (30 if title else 0),
    )
    fig.add_heatmap(
        z=mean,
        zmin=-limit,
        zmax=limit,
        colorscale=colours.diverging,
        xgap=1,
        ygap=1,
        text=level,
        # Cells of 32 heads are eight pixels wide in a paper's column.
        texttemplate="%{text}" if several else None,
        textfont={"size": 8 if n_heads > 20 else 10},
        customdata=np.stack([names, low, high, rank, inside], axis=-1, dtype=object),
        hovertemplate=(
            "<b>%{customdata[0]}</b>%{customdata[4]}<br>relevance %{z:.4f}"
            + (
                ""
                if scores.whole
                else "<br>95 % interval %{customdata[1]:.4f} to %{customdata[2]:.4f}"
            )
            + f"<br>rank %{{customdata[3]}} of {n_layers * n_heads}<extra></extra>"
        ),
        colorbar=colour_bar(f"relevance ({scores.unit})"),
    )
    for head in circuit or ():
        fig.add_shape(
            type="rect",
            x0=head.index - 0.5,
            x1=head.index + 0.5,
            y0=head.layer - 0.5,
            y1=head.layer + 0.5,
            line={"color": colours.ink, "width": 2 if n_heads <= 20 else 1.5},
        )
    fig.update_xaxes(
        zeroline=False,
        title="head",
        dtick=math.ceil(n_heads / 16),
        range=[-0.6, n_heads - 0.4],
        showgrid=False,
    )
    fig.update_yaxes(
        zeroline=False,
        title="layer",
        dtick=math.ceil(n_layers / 16),
        range=[n_layers - 0.4, -0.6],
        showgrid=False,
    )
    return fig


def head_bars(
    scores: HeadScores,
    n: int = 20,
    circuit: Circuit | None = None,
    title: str = "",
    *,
    effects: HeadEffects | None = None,
    mode: Mode = "light",
) -> go.Figure:
    """Draw the heads with the largest relevance of either sign as bars, the largest on top.

    Whiskers are 95 % bootstrap intervals. With a circuit, the bars of other heads are hollow.
    Diamonds are what ablating the head does to the margin: relevance is an attribution, and where
    the two differ, ablation is right about the head.

    Args:
        scores: relevance in logits.
        n: how many heads; all, if the model has fewer.
        circuit: of the same model.
        title: of the figure.
        effects: of some of the heads (:func:`circuitlens.head_effects`).
        mode: ``"light"`` or ``"dark"``.

    Raises:
        InputError: if ``n`` is not positive or the circuit is of a model of another size.
    """
    _check_count(n)
    _check_size(scores, circuit)
    colours = look(mode)
    mean = scores.mean
    ranking = scores.ranking()
    ranks = {head: rank for rank, head in enumerate(ranking, start=1)}
    chosen = sorted(ranking, key=lambda h: -abs(float(mean[h.layer, h.index])))[:n]
    values = np.array([float(mean[h.layer, h.index]) for h in chosen])
    bounds = scores.bounds()
    low, high = np.array([bounds[:, h.layer, h.index].numpy() for h in chosen]).T
    inside = [circuit is None or h in circuit for h in chosen]
    negative, positive = colours.diverging[0][1], colours.diverging[-1][1]
    signs = [positive if value >= 0 else negative for value in values]
    fig = figure(title, mode=mode, height=_FRAME + 30 + 19 * len(chosen))
    fig.add_bar(
        x=values,
        y=[_name(head, circuit) for head in chosen],
        orientation="h",
        marker={
            "color": [s if i else colours.paper for s, i in zip(signs, inside, strict=True)],
            "line": {"color": signs, "width": 1.5},
        },
        error_x=None
        if scores.whole
        else {
            "type": "data",
            "symmetric": False,
            "array": high - values,
            "arrayminus": values - low,
            "color": colours.ink,
            "thickness": 1,
            "width": 3,
        },
        customdata=[
            [low[k], high[k], ranks[head], "<br>in the circuit" if circuit and inside[k] else ""]
            for k, head in enumerate(chosen)
        ],
        hovertemplate=(
            "<b>%{y}</b>%{customdata[3]}<br>relevance %{x:.4f}"
            + (
                ""
                if scores.whole
                else "<br>95 % interval %{customdata[0]:.4f} to %{customdata[1]:.4f}"
            )
            + f"<br>rank %{{customdata[2]}} of {len(ranking)}<extra></extra>"
        ),
        showlegend=False,
    )
    for name, fill in (("in the circuit", colours.quiet), ("other heads", colours.paper)):
        # Entries of their own, because bars take their colours from their signs.
        if circuit is not None:
            marker = {"color": fill, "line": {"color": colours.quiet, "width": 1.5}}
            fig.add_bar(x=[None], y=[None], name=name, marker=marker)
    if effects is not None:
        _add_effects(fig, effects, chosen, colours, circuit)
    spread = "" if scores.whole else ", 95 % interval"
    fig.update_xaxes(title=f"relevance ({scores.unit}){spread}", nticks=6, zeroline=True)
    fig.update_yaxes(
        type="category",
        title={"text": f"{len(chosen)} of {len(ranking)} heads", "standoff": 8},
        autorange="reversed",
        showgrid=False,
    )
    fig.update_layout(bargap=0.25, barmode="overlay", legend=LEGEND_BELOW)
    return fig


def _name(head: Head, circuit: Circuit | None) -> str:
    return str(head) if circuit is None else plain(circuit.label(head))


def _add_effects(
    fig: go.Figure,
    effects: HeadEffects,
    shown: Sequence[Head],
    colours: Look,
    circuit: Circuit | None,
) -> None:
    """Mark the ablation effect of the heads that are shown."""
    found = [
        (_name(head, circuit), effect) for head in shown if (effect := effects.of(head)) is not None
    ]
    values = [effect[0] for _, effect in found]
    fig.add_scatter(
        x=values,
        y=[name for name, _ in found],
        mode="markers",
        name="ablation effect",
        marker={"symbol": "diamond", "size": 8, "color": colours.ink},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [high - mean for _, (mean, _, high) in found],
            "arrayminus": [mean - low for _, (mean, low, _) in found],
            "thickness": 1,
            "width": 3,
        },
        customdata=[effect[1:] for _, effect in found],
        hovertemplate=(
            "<b>%{y}</b><br>the margin loses %{x:.4f} when it is ablated<br>"
            "95 % interval %{customdata[0]:.4f} to %{customdata[1]:.4f}<extra></extra>"
        ),
    )


def head_positions(
    scores: HeadScores,
    n: int = 12,
    tokens: Sequence[str] | None = None,
    example: str | None = None,
    last: int | None = None,
    title: str = "",
    *,
    mode: Mode = "light",
) -> go.Figure:
    """Draw at which positions the strongest heads act.

    Rows are the heads whose relevance is largest, of either sign, at any one position shown; the
    largest is on top. Columns are positions, counted from the end of the prompt: −1 is the last
    token.

    Args:
        scores: made with ``by_position=True``; relevance in logits.
        n: how many heads; all, if the model has fewer.
        tokens: of one prompt, written below the columns; the last of them is the last position.
        example: id of the example to draw. By default relevance is the mean over examples, where
            prompts that do not reach a position count as zero.
        last: draw only this many positions, the last ones. By default as many as there are tokens,
            or all.
        title: of the figure.
        mode: ``"light"`` or ``"dark"``.

    Raises:
        InputError: if the scores are not by position, there is no such example, ``n`` or ``last``
            is not positive, or there are more tokens than positions.
    """
    _check_count(n)
    if scores.by_position is None:
        raise InputError(
            "These scores are summed over positions: call cl.relevance with by_position=True."
        )
    if example is not None and example not in scores.example_ids:
        raise InputError(f"There is no example {example!r} among those of these scores.")
    if last is not None and last < 1:
        raise InputError(f"A figure shows at least one position, but last is {last}.")
    width = scores.by_position.shape[1]
    if tokens is not None and not 0 < len(tokens) <= width:
        raise InputError(
            f"{len(tokens)} tokens were given, but these scores have {width} positions: pass the "
            "tokens of one prompt that was scored."
        )
    colours = look(mode)
    if example is None:
        values = scores.by_position.double().mean(0)
    else:
        values = scores.by_position[scores.example_ids.index(example)].double()
    shown = min(last or width, len(tokens) if tokens is not None else width)
    by_head = values[-shown:].flatten(1).T.numpy()
    order = np.argsort(-np.abs(by_head).max(1), kind="stable")[:n]
    heads = [Head(int(i) // scores.n_heads, int(i) % scores.n_heads) for i in order]
    places = range(-shown, 0)
    words = [f"position {p}" for p in places]
    if tokens is not None:
        of = zip(map(plain, visible(tokens)[-shown:]), words, strict=True)
        words = [f"“{token}”, {word}" for token, word in of]
    limit = float(np.abs(by_head).max()) or 1.0
    fig = figure(title, mode=mode, height=_FRAME + 60 + 19 * len(heads))
    fig.add_heatmap(
        z=by_head[order],
        x=[str(p) for p in places],
        y=[str(head) for head in heads],
        zmin=-limit,
        zmax=limit,
        colorscale=colours.diverging,
        xgap=1 if shown <= 60 else 0,
        ygap=1,
        customdata=[words] * len(heads),
        hovertemplate="<b>%{y}</b> at %{customdata}<br>relevance %{z:.4f}<extra></extra>",
        colorbar=colour_bar(f"relevance ({scores.unit})"),
    )
    fig.update_yaxes(
        type="category",
        title={"text": f"{len(heads)} of {by_head.shape[0]} heads", "standoff": 8},
        autorange="reversed",
        showgrid=False,
    )
    if tokens is None:
        fig.update_xaxes(type="category", title="position from the end", showgrid=False)
    else:
        labels = dict(zip(map(str, places), short_tokens(tokens)[-shown:], strict=True))
        fig.update_xaxes(token_axis(labels), tickangle=-90)
    return fig


def overlap_matrix(
    circuits: Mapping[str, Circuit],
    measure: str = "jaccard",
    title: str = "",
    *,
    mode: Mode = "light",
) -> go.Figure:
    """Draw how much circuits share, in percent, with the numbers in the cells.

    Args:
        circuits: by name, such as the language that each was found in; all of one model.
        measure: ``"jaccard"``, heads in both over heads in either, or ``"share"``, heads in both
            over heads of the circuit of the row.
        title: of the figure.
        mode: ``"light"`` or ``"dark"``.

    Raises:
        InputError: for another measure, no circuits, or circuits of models of different sizes.
    """
    if measure not in ("jaccard", "share"):
        raise InputError(f"The measure must be 'jaccard' or 'share', but is {measure!r}.")
    if not circuits:
        raise InputError("There are no circuits to compare: pass at least one.")
    colours = look(mode)
    names, several = [plain(name) for name in circuits], list(circuits.values())

    def percent(row: Circuit, column: Circuit) -> float:
        if measure == "jaccard":
            return 100 * row.overlap(column)
        return 100 * len(row & column) / len(row) if len(row) else math.nan

    fig = figure(title, mode=mode, height=_FRAME + 90 + 26 * len(names))
    fig.add_heatmap(
        z=[[percent(row, column) for column in several] for row in several],
        x=names,
        y=names,
        zmin=0,
        zmax=100,
        colorscale=colours.sequential,
        xgap=1,
        ygap=1,
        texttemplate="%{z:.0f}",
        customdata=[
            [[len(row & column), len(row), len(column)] for column in several] for row in several
        ],
        hovertemplate=(
            "%{y} (%{customdata[1]} heads) and %{x} (%{customdata[2]})"
            "<br>%{customdata[0]} heads in both, %{z:.1f} %<extra></extra>"
        ),
        colorbar=colour_bar(
            "heads in both, % of those in either"
            if measure == "jaccard"
            else "heads in both, % of those of the row"
        ),
    )
    fig.update_xaxes(type="category", showgrid=False)
    fig.update_yaxes(type="category", showgrid=False, autorange="reversed")
    return fig


def _check_size(scores: HeadScores, circuit: Circuit | None) -> None:
    if circuit is None:
        return
    if (circuit.n_layers, circuit.n_heads) != (scores.n_layers, scores.n_heads):
        raise InputError(
            f"The circuit is of a {circuit.n_layers} × {circuit.n_heads} model, but the scores are "
            f"of a {scores.n_layers} × {scores.n_heads} one."
        )


def _interval(scores: HeadScores, column: int) -> str:
    """A line of a hover text, with its bounds in two columns of the custom data."""
    if scores.whole:
        return ""
    bounds = (f"%{{customdata[{k}]:.4f}}" for k in (column, column + 1))
    return f"<br>95 % interval {' to '.join(bounds)}"


def _check_count(n: int) -> None:
    if n < 1:
        raise InputError(f"A figure shows at least one head, but n is {n}.")
