"""The circuit as a graph: which heads move the task margin, and which heads move those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from circuitlens.circuit import Circuit
from circuitlens.errors import InputError
from circuitlens.nodes import Head
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.view.theme import LEGEND_BELOW, Look, Mode, figure, look

__all__ = ["circuit_graph"]

# Columns of whole names, such as a23.h13, that fit side by side into a paper's column.
_NAMED_COLUMNS = 5
_WIDEST = 5.0
_Place = tuple[float, float]


def circuit_graph(
    circuit: Circuit,
    scores: HeadScores | None = None,
    title: str = "",
    *,
    max_edges: int = 60,
    mode: Mode = "light",
) -> go.Figure:
    """Draw a circuit as a graph that is read from left to right.

    With levels (:func:`circuitlens.discover`), columns are levels: the task margin at the right
    end, next to it the heads that move it, then those that move these. Lines are edge scores: width
    is their size, blue is positive (the source moves the target further from its mean), red
    negative. Thin grey lines join level 1 to the margin; with ``scores`` their width and colour are
    the relevance of the heads, on a separate scale (logits; edges are in units of z). Without
    levels, columns are layers and there are no lines.

    Args:
        circuit: at least one head.
        scores: relevance of the same model's heads, for lines to the margin and for hovering.
        title: of the figure.
        max_edges: draw only this many edges, the strongest; a line below says so.
        mode: ``"light"`` or ``"dark"``.

    Raises:
        InputError: if the circuit is empty or of a model of another size than the scores, or
            ``max_edges`` is negative.
    """
    if not len(circuit):
        raise InputError("The circuit has no heads to draw: choose a larger one.")
    if max_edges < 0:
        raise InputError(f"max_edges cannot be negative, but is {max_edges}.")
    if scores and (scores.n_layers, scores.n_heads) != (circuit.n_layers, circuit.n_heads):
        raise InputError(
            f"The circuit is of a {circuit.n_layers} × {circuit.n_heads} model, but the scores are "
            f"of a {scores.n_layers} × {scores.n_heads} one."
        )
    colours = look(mode)
    columns = _columns(circuit)
    places = _places(columns, spread=bool(circuit.levels))
    n_rows = max(map(len, columns.values()))
    fig = figure(title, mode=mode, height=max(260, 130 + 24 * n_rows))
    within = [(pair, score) for pair, score in circuit.edges.items() if set(pair) <= places.keys()]
    edges = sorted(within, key=lambda edge: -abs(edge[1]))
    if circuit.levels:
        # Weak ones first, so that strong ones lie on top.
        _to_margin(fig, circuit, scores, places, colours)
        _edges(fig, edges[:max_edges][::-1], places, colours)
    _nodes(fig, circuit, scores, places, colours, named=len(columns) <= _NAMED_COLUMNS)
    fig.update_xaxes(
        tickvals=[*columns, *([0] if circuit.levels else [])],
        ticktext=_headings(circuit, columns),
        tickangle=0,
        title=_note(circuit, columns, len(edges), max_edges),
        range=[min(columns) - 0.5, (0 if circuit.levels else max(columns)) + 0.5],
        showgrid=False,
        zeroline=False,
    )
    fig.update_yaxes(visible=False, range=[-0.04, 1.04])
    fig.update_layout(legend=LEGEND_BELOW, hovermode="closest", margin={"b": 60})
    return fig


def _columns(circuit: Circuit) -> dict[int, list[Head]]:
    """Heads of every column, by its place on the axis: minus the level, or number of the layer.

    Layers without a head of the circuit take no room.
    """
    if circuit.levels:
        # A head that was added by hand to a circuit with levels has none: left of all others.
        last = max(circuit.levels.values()) + 1
        keys = {head: -circuit.levels.get(head, last) for head in circuit}
        return {key: [h for h in circuit if keys[h] == key] for key in sorted(set(keys.values()))}
    layers = sorted({head.layer for head in circuit})
    return {k: [h for h in circuit if h.layer == layer] for k, layer in enumerate(layers)}


def _headings(circuit: Circuit, columns: Mapping[int, Sequence[Head]]) -> list[str]:
    if not circuit.levels:
        # Of many layers every second or third number has room.
        step = 1 + len(columns) // 16
        layers = [heads[0].layer for heads in columns.values()]
        return [str(layer) if n % step == 0 else "" for n, layer in enumerate(layers)]
    levels = [circuit.levels.get(heads[0]) for heads in columns.values()]
    return [*("no level" if n is None else f"level {n}" for n in levels), "task margin"]


def _note(circuit: Circuit, columns: Mapping[int, object], n_edges: int, max_edges: int) -> str:
    """What the title of the axis says: what columns are, or whether edges were left out."""
    if not circuit.levels:
        return "layer" + ("; numbers in the plot are heads" * (len(columns) > _NAMED_COLUMNS))
    if n_edges > max_edges:
        return f"the {max_edges} strongest of {n_edges} edges"
    return f"{n_edges} edge{'s' * (n_edges != 1)}"


def _places(columns: Mapping[int, Sequence[Head]], spread: bool) -> dict[Head, _Place]:
    """Spread the heads of a level over the height, early layers at the bottom; pile up layers."""
    most = max(map(len, columns.values()))
    return {
        head: (float(column), (k + 0.5) / (len(heads) if spread else most))
        for column, heads in columns.items()
        for k, head in enumerate(heads)
    }


def _curve(start: _Place, end: _Place) -> tuple[np.ndarray, np.ndarray]:
    """Points of a smooth line; within a column it bulges to the left."""
    t = np.linspace(0, 1, 17)
    (x0, y0), (x1, y1) = start, end
    if x0 == x1:
        return x0 - 0.32 * np.sin(np.pi * t), y0 + (y1 - y0) * t
    return x0 + (x1 - x0) * t, y0 + (y1 - y0) * (3 * t**2 - 2 * t**3)


def _line(
    fig: go.Figure,
    start: _Place,
    end: _Place,
    width: float,
    colour: str,
    hover: str,
    **entry: object,
) -> None:
    x, y = _curve(start, end)
    fig.add_scatter(
        x=x,
        y=y,
        mode="lines",
        line={"width": width, "color": colour},
        opacity=0.75,
        text=hover,
        hoverinfo="text",
        **{"showlegend": False, **entry},
    )


def _edges(
    fig: go.Figure,
    edges: Sequence[tuple[tuple[Head, Head], float]],
    places: Mapping[Head, _Place],
    colours: Look,
) -> None:
    largest = max((abs(score) for _, score in edges), default=0.0) or 1.0
    for (source, target), score in edges:
        name, colour = _sign(score, colours)
        _line(
            fig,
            places[source],
            places[target],
            max(0.4, _WIDEST * abs(score) / largest),
            colour,
            f"{source} → {target}<br>edge score {score:.4f}",
            name=name,
            meta=[str(source), str(target), score],
        )
    for value in (1.0, -1.0):
        # Entries of their own: each line has another width.
        name, colour = _sign(value, colours)
        if any(np.sign(score) == value for _, score in edges):
            line = {"width": 3, "color": colour}
            fig.add_scatter(x=[None], y=[None], mode="lines", line=line, name=name)


def _sign(score: float, colours: Look) -> tuple[str, str]:
    if score < 0:
        return "negative edge", colours.diverging[0][1]
    return "positive edge", colours.diverging[-1][1]


def _to_margin(
    fig: go.Figure,
    circuit: Circuit,
    scores: HeadScores | None,
    places: Mapping[Head, _Place],
    colours: Look,
) -> None:
    first = [head for head in circuit if circuit.levels.get(head) == 1]
    values = {h: float(scores.mean[h.layer, h.index]) for h in first} if scores else {}
    largest = max(map(abs, values.values()), default=0.0) or 1.0
    for head in first:
        colour, width, hover = colours.quiet, 1.0, f"{head} → task margin"
        if head in values:
            colour = _sign(values[head], colours)[1]
            width = max(0.4, _WIDEST * abs(values[head]) / largest)
            hover += f"<br>relevance {values[head]:.4f} logits"
        _line(fig, places[head], (0.0, 0.5), width, colour, hover, meta=[str(head), "task margin"])


def _nodes(
    fig: go.Figure,
    circuit: Circuit,
    scores: HeadScores | None,
    places: Mapping[Head, _Place],
    colours: Look,
    named: bool,
) -> None:
    """Labels are annotations, which hide the lines behind them; points below carry the hover."""
    details = []
    for head in places:
        lines = [f"<b>{head}</b>"]
        if head in circuit.levels:
            lines.append(f"level {circuit.levels[head]}")
        if scores is not None:
            lines.append(f"relevance {float(scores.mean[head.layer, head.index]):.4f} logits")
        into = [e for (_, target), e in circuit.edges.items() if target == head]
        out = [e for (source, _), e in circuit.edges.items() if source == head]
        if circuit.levels:
            lines.append(f"{len(into)} edges in, {len(out)} out, sum of those out {sum(out):.4f}")
        details.append("<br>".join(lines))
    fig.add_scatter(
        x=[x for x, _ in places.values()],
        y=[y for _, y in places.values()],
        mode="markers",
        marker={"size": 20, "color": colours.paper, "symbol": "square", "opacity": 0},
        text=[str(head) for head in places],
        customdata=details,
        hovertemplate="%{customdata}<extra></extra>",
        name="heads",
        showlegend=False,
    )
    box = {"showarrow": False, "bgcolor": colours.paper, "borderpad": 2, "borderwidth": 1}
    for head, (x, y) in places.items():
        text = str(head) if named else str(head.index)
        border = colours.quiet if named else colours.paper
        fig.add_annotation(x=x, y=y, text=text, bordercolor=border, **box)
    if circuit.levels:
        fig.add_annotation(x=0, y=0.5, text="margin", bordercolor=colours.ink, **box)
