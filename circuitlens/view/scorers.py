"""Figures of scorers: how far they agree with exact ablation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from scipy.stats import spearmanr

from circuitlens.circuits.scorer_comparison import ScorerComparison
from circuitlens.errors import InputError
from circuitlens.nodes import Head
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.view.theme import PALETTE, Mode, colour_bar, figure, look, plain

__all__ = ["scorer_agreement"]

# Three lines above a panel, in pixels.
_TITLE = 46


def scorer_agreement(
    scores: Sequence[HeadScores] | Mapping[str, HeadScores] | ScorerComparison,
    reference: str = "ablation",
    title: str = "",
    *,
    columns: int = 3,
    mode: Mode = "light",
) -> go.Figure:
    """Draw the scores of several scorers side by side, and each against a reference.

    Colours are shares of each scorer's own largest relevance of either sign, which is above
    its panel, because scorers differ in scale and some score in ranks. Below every scorer but the
    reference, a point is a head: its mean relevance by the reference to the right and by the
    scorer upwards, with Spearman's rank correlation over heads.

    Args:
        scores: of one model on the same examples, or a mapping from names to them; by default
            they are named by their method. Those of a :func:`circuitlens.compare_scorers` will do.
        reference: name of the scores that the others are compared with; exact ablation.
        title: of the figure.
        columns: panels side by side, at most.
        mode: ``"light"`` or ``"dark"``.

    Raises:
        InputError: if there are fewer than two scores, two of one name, none of the reference, or
            some of a model of another size; if the model has one head only; or if ``columns`` is
            not positive.
    """
    named = _named(scores, reference)
    if columns < 1:
        raise InputError(f"A grid has at least one column, but columns is {columns}.")
    colours = look(mode)
    exact = named[reference].mean.numpy()
    n_layers, n_heads = exact.shape
    order = [reference, *(name for name in named if name != reference)]
    bands = math.ceil(len(order) / columns)
    # Bands of nearly the same number of panels: four are two by two, not three and one.
    columns = math.ceil(len(order) / bands)
    tall = max(150, min(330, 14 * n_layers))
    # Every band is a row of heat maps with a row of point clouds below.
    room = 92
    heights = [tall, 150] * bands
    whole = sum(heights) + room * (len(heights) - 1)
    fig = make_subplots(
        2 * bands,
        columns,
        specs=_specs(len(order), bands, columns),
        row_heights=heights,
        vertical_spacing=room / whole,
        horizontal_spacing=0.2 / columns,
        subplot_titles=_titles(order, named, reference, bands, columns),
    )
    # Room for the titles of the uppermost panels, inside the plot: margins shrink in print.
    share = whole / (whole + _TITLE)
    for axis in fig.select_yaxes():
        axis.domain = [share * end for end in axis.domain]
    for heading in fig.layout.annotations:
        heading.y *= share
    fig.update_layout(figure(title, mode=mode, height=whole + _TITLE + 160).layout)
    fig.update_layout(showlegend=False)
    fig.update_annotations(font_size=11)
    heads = [[str(Head(la, h)) for h in range(n_heads)] for la in range(n_layers)]
    for number, name in enumerate(order):
        row, col = 2 * (number // columns) + 1, number % columns + 1
        mean = named[name].mean.numpy()
        fig.add_heatmap(
            z=mean / _largest(mean),
            coloraxis="coloraxis",
            name=plain(name),
            customdata=np.stack([np.array(heads), mean], axis=-1, dtype=object),
            hovertemplate=(
                "<b>%{customdata[0]}</b><br>relevance %{customdata[1]:.4f}"
                "<br>share of the largest %{z:.2f}<extra></extra>"
            ),
            row=row,
            col=col,
        )
        fig.update_yaxes(
            range=[n_layers - 0.5, -0.5],
            dtick=math.ceil(n_layers / 8),
            title="layer" if col == 1 else None,
            showticklabels=col == 1,
            row=row,
            col=col,
        )
        fig.update_xaxes(dtick=math.ceil(n_heads / 5), row=row, col=col)
        if name == reference:
            continue
        fig.add_scatter(
            x=exact.flatten(),
            y=mean.flatten(),
            mode="markers",
            name=plain(name),
            marker={
                "color": PALETTE[0] if mode == "light" else PALETTE[5],
                "size": 6 if exact.size <= 100 else 4,
                "opacity": 0.7,
            },
            text=np.array(heads).flatten(),
            hovertemplate="<b>%{text}</b><br>%{y:.4f}, by the reference %{x:.4f}<extra></extra>",
            row=row + 1,
            col=col,
        )
        line = {"zerolinecolor": colours.quiet, "zeroline": True}
        fig.update_xaxes(
            **line, nticks=4, title=f"by {plain(reference)}", tickangle=0, row=row + 1, col=col
        )
        fig.update_yaxes(**line, nticks=5, row=row + 1, col=col)
    fig.update_layout(
        coloraxis={
            "colorscale": colours.diverging,
            "cmin": -1,
            "cmax": 1,
            "colorbar": colour_bar("relevance, share of the scorer's own largest"),
        }
    )
    return fig


def _named(
    scores: Sequence[HeadScores] | Mapping[str, HeadScores] | ScorerComparison, reference: str
) -> dict[str, HeadScores]:
    """Scores by name, checked."""
    if isinstance(scores, ScorerComparison):
        scores = scores.scores
    if isinstance(scores, Mapping):
        named = dict(scores)
    else:
        several = list(scores)
        named = {s.method: s for s in several}
        if len(named) < len(several):
            raise InputError("Two of the scores are from one method: name them in a mapping.")
    if reference not in named:
        raise InputError(
            f"There are no scores by {reference!r} to compare with: add those of "
            f"cl.relevance(…, method={reference!r}), or name another reference."
        )
    if len(named) < 2:
        raise InputError("Agreement needs scores of at least two scorers, but one was given.")
    exact = named[reference]
    for name, one in named.items():
        if (one.n_layers, one.n_heads) != (exact.n_layers, exact.n_heads):
            raise InputError(
                f"The scores by {name} are of a {one.n_layers} × {one.n_heads} model, but those by "
                f"{reference} of a {exact.n_layers} × {exact.n_heads} one."
            )
    if exact.n_layers * exact.n_heads < 2:
        raise InputError("A rank correlation needs at least two heads, but the model has one.")
    return named


def _largest(mean: np.ndarray) -> float:
    return float(np.abs(mean).max()) or 1.0


def _specs(n: int, bands: int, columns: int) -> list[list[dict[str, str] | None]]:
    """Which cells of the grid have a panel; the reference has none below its heat map."""
    taken = [[k < n for k in range(b * columns, (b + 1) * columns)] for b in range(bands)]
    rows: list[list[dict[str, str] | None]] = []
    for band, row in enumerate(taken):
        rows.append([{} if there else None for there in row])
        rows.append([{} if there and band + k > 0 else None for k, there in enumerate(row)])
    return rows


def _titles(
    order: Sequence[str],
    named: Mapping[str, HeadScores],
    reference: str,
    bands: int,
    columns: int,
) -> list[str]:
    """Titles of the panels there are, row by row."""
    exact = named[reference].mean.flatten().numpy()
    titles: list[str] = []
    for band in range(bands):
        row = order[band * columns : (band + 1) * columns]
        for name in row:
            largest = _largest(named[name].mean.numpy())
            titles.append(f"{_broken(name)}<br>largest {largest:.3g}")
        for name in row:
            if name != reference:
                rho = float(spearmanr(exact, named[name].mean.flatten().numpy()).statistic)
                found = "undefined" if math.isnan(rho) else f"{rho:.2f}"
                titles.append(f"{_broken(name)}<br>Spearman {found}")
    return titles


def _broken(name: str, longest: int = 14) -> str:
    """A name on two lines if it has a hyphen to break at and is too long for a narrow panel."""
    if len(name) <= longest or "-" not in name:
        return plain(name)
    head, _, rest = name.partition("-")
    return f"{plain(head)}-<br>{plain(rest)}"
