"""Figures of a comparison: strategies × languages as a table, and paired differences."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from circuitlens.errors import InputError
from circuitlens.experiments.comparison import Comparison
from circuitlens.view.small_multiples import (
    MEAN,
    Results,
    note,
    panels,
    seeds_of,
    shown,
    strategy_styles,
    ticks_of,
    transfer_points,
)
from circuitlens.view.theme import Mode, figure, look

__all__ = ["paired_differences", "strategy_table"]

_MEANING = {
    "gain": "target accuracy, gain in points",
    "target_after": "target accuracy after the transfer, %",
    "source_change": "source accuracy, change in points",
    "source_after": "source accuracy after the transfer, %",
}
_SIGNED = ("gain", "source_change")


def strategy_table(
    results: Results,
    value: str = "gain",
    title: str = "",
    *,
    mode: Mode = "light",
) -> go.Figure:
    """Draw one number for every language and strategy, written in the cells: mean ± deviation.

    The deviation is the standard deviation over seeds. The best strategy of a language, among those
    with the most seeds, is bold. If there are more strategies than languages, they are the rows,
    else the languages are; the mean over the languages that have every strategy stands last. Up to
    seven columns are legible in a column of a paper.

    Args:
        results: a comparison, or single results.
        value: ``"gain"`` or ``"source_change"`` in accuracy points, with a scale centred on zero,
            or ``"target_after"`` or ``"source_after"``, accuracy in per cent.
        title: of the figure.
        mode: of colours.

    Raises:
        InputError: for another value, or if no result has a source task and it was asked for.
    """
    if value not in _MEANING:
        raise InputError(f"The value must be one of {', '.join(_MEANING)}, but is {value!r}.")
    colours = look(mode)
    points = transfer_points(results)
    points = points[points[value].notna()]
    if points.empty:
        raise InputError(
            "None of these transfers measured a source task, so there is nothing to draw."
        )
    languages = list(dict.fromkeys(points["language"]))
    strategies = list(dict.fromkeys(points["strategy"]))
    mean, spread = (
        points.pivot(index="language", columns="strategy", values=name).reindex(
            index=languages, columns=strategies
        )
        for name in (value, f"{value}_sd")
    )
    seeds = points.pivot(index="language", columns="strategy", values="n_seeds").reindex_like(mean)
    text = _cell_texts(mean, spread, seeds)
    has_mean = MEAN in languages
    n = int(points["n_languages"].max())
    names = [f"<b>mean of {n}</b>" if name == MEAN else shown(name) for name in languages]
    kinds = [shown(name) for name in strategies]
    z, seen = mean.to_numpy(), seeds.fillna(0).to_numpy(dtype=int)
    labels = np.array([[[a, b] for b in kinds] for a in names], dtype=object)
    flipped = len(strategies) > len(languages) - has_mean
    rows, across = (kinds, names) if flipped else (names, kinds)
    if flipped:
        z, text, seen, labels = z.T, text.T, seen.T, labels.swapaxes(0, 1)
    fig = figure(title, mode=mode, height=(50 if title else 34) + 34 * len(rows) + 150)
    # The scale goes twice as far as the numbers do, because on its ends no text would be legible.
    if value in _SIGNED:
        limit = 2 * float(np.nanmax(np.abs(z))) or 1.0
        scale = {"zmin": -limit, "zmax": limit, "colorscale": colours.diverging}
    else:
        low, high = float(np.nanmin(z)), float(np.nanmax(z))
        far = high + (high - low or 1.0)
        scale = {"zmin": low, "zmax": far, "colorscale": colours.sequential}
    fig.add_heatmap(
        z=z,
        x=np.arange(len(across)),
        y=np.arange(len(rows)),
        text=text,
        texttemplate="%{text}",
        textfont={"size": 11, "color": colours.ink},
        customdata=np.concatenate([labels, seen[..., None].astype(object)], axis=-1),
        hovertemplate=(
            "%{customdata[0]}, %{customdata[1]}<br>%{text}<br>"
            "seeds: %{customdata[2]}<extra></extra>"
        ),
        hoverongaps=False,
        showscale=False,
        xgap=1,
        ygap=1,
        **scale,
    )
    if has_mean:
        at = len(languages) - 1.5
        ends = (
            {"x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper"}
            if flipped
            else {"y0": at, "y1": at, "x0": 0, "x1": 1, "xref": "paper"}
        )
        fig.add_shape(type="line", line={"color": colours.paper, "width": 6}, **ends)
    over = seeds_of(points, "±")
    told = f"mean ± standard deviation over {over}" if over else "one seed"
    uneven = bool((points.groupby("language")["n_seeds"].nunique() > 1).any())
    best = "bold: the best of a language" + (" among those with the most seeds" if uneven else "")
    fig.update_xaxes(
        tickvals=np.arange(len(across)),
        ticktext=across,
        ticks="",
        ticklabelstandoff=4,
        # Upright where they do not fit; slanted ones would run out of the figure.
        autotickangles=[0, 90],
        showgrid=False,
        zeroline=False,
        title={
            "text": f"{_MEANING[value]}<br>{told}<br>{best}",
            "standoff": 10,
            "font": {"size": 11},
        },
    )
    fig.update_yaxes(
        tickvals=np.arange(len(rows)),
        ticktext=rows,
        range=[len(rows) - 0.5, -0.5],
        ticks="",
        ticklabelstandoff=4,
        showgrid=False,
        zeroline=False,
    )
    fig.update_layout(margin={"l": 10, "b": 20, "t": 50 if title else 34})
    return fig


def _cell_texts(mean: pd.DataFrame, spread: pd.DataFrame, seeds: pd.DataFrame) -> np.ndarray:
    """What stands in the cells, the best of each row bold: of those with the most seeds."""
    # Adding zero makes a plain one of -0.0.
    numbers, deviations = (frame.to_numpy(dtype=float).round(1) + 0.0 for frame in (mean, spread))
    texts = np.full(numbers.shape, "", dtype=object)
    counts = seeds.fillna(-1).to_numpy()
    for i, row in enumerate(numbers):
        # One lucky seed is not better than a mean over several.
        rivals = counts[i] == counts[i].max()
        best = f"{np.nanmax(row[rivals]):.1f}"
        for j in np.flatnonzero(~np.isnan(row)):
            text = f"{row[j]:.1f}"
            # Among equal numbers a single bold one would be a riddle.
            bold = rivals[j] and text == best
            texts[i, j] = f"<b>{_minus(text)}</b>" if bold else _minus(text)
            if not np.isnan(sd := deviations[i, j]):
                texts[i, j] += f"<br>±{sd:.1f}"
    return texts


def _minus(number: str) -> str:
    """The sign that axes have, too."""
    return number.replace("-", "−")


def paired_differences(
    comparison: Comparison,
    reference: str = "circuit",
    title: str = "",
    *,
    columns: int = 3,
    mode: Mode = "light",
) -> go.Figure:
    """Draw how far a strategy is ahead of every other one, language by language.

    Differences in target accuracy, in points, on the same test examples and seeds, with 95 %
    bootstrap intervals over examples (:meth:`circuitlens.Comparison.paired`). An open symbol is a
    difference whose interval has zero in it.

    Args:
        comparison: of at least two strategies.
        reference: which is compared with all others.
        title: of the figure.
        columns: panels side by side; two are as many as a column of a paper has room for.
        mode: of colours.

    Raises:
        InputError: if the reference has no finished cell, or shares no seed with any other.
    """
    colours = look(mode)
    pairs = comparison.pairs(reference)
    if len(comparison.languages) == 1:  # which is all of them
        pairs = pairs[pairs["language"] == comparison.languages[0]]
    if pairs.empty:
        raise InputError(
            f"There is no other strategy to compare {reference} with: one is needed with the same "
            "language and seed."
        )
    languages = list(dict.fromkeys(pairs["language"]))
    others = list(dict.fromkeys(pairs["b"]))
    several = len(comparison.languages) > 1
    headings = [
        "<b>all languages</b>" if several and number == len(languages) - 1 else shown(name)
        for number, name in enumerate(languages)
    ]
    fig = panels(
        headings,
        columns=columns,
        panel=12 + 16 * len(others),
        legend=0,
        title=title,
        mode=mode,
        bottom=3,
    )
    n_columns = min(columns, len(languages))
    styles = strategy_styles(others)
    for number, language in enumerate(languages):
        row, column = divmod(number, n_columns)
        for pair in pairs[pairs["language"] == language].to_dict("records"):
            mean, low, high = (100 * pair[name] for name in ("difference", "low", "high"))
            style = styles[pair["b"]]
            sure = low > 0 or high < 0
            fig.add_scatter(
                x=[mean],
                y=[others.index(pair["b"])],
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [high - mean],
                    "arrayminus": [mean - low],
                    "color": style.colour,
                    "thickness": 1.5,
                    "width": 0,
                },
                mode="markers",
                marker={
                    "size": 9,
                    "symbol": style.symbol,
                    "color": style.colour if sure else colours.paper,
                    "line": {"color": style.colour, "width": 1.5},
                },
                name=shown(pair["b"]),
                customdata=[[shown(reference), shown(pair["b"]), shown(language)]],
                hovertemplate=(
                    "%{customdata[2]}: %{customdata[0]} minus %{customdata[1]} %{x:+.1f} points"
                    f"<br>95 % interval {low:+.1f} to {high:+.1f}, p = {pair['p']:.3g}"
                    f"<br>{pair['n_examples']} examples, seeds: {pair['n_seeds']}<extra></extra>"
                ),
                showlegend=False,
                row=row + 1,
                col=column + 1,
            )
    ends = 100 * pairs[["low", "high"]]
    low, high = min(0.0, ends["low"].min()), max(0.0, ends["high"].max())
    edge = 0.06 * (high - low) or 1.0
    fig.update_xaxes(
        range=[low - edge, high + edge],
        nticks=ticks_of(n_columns),
        zeroline=True,
        zerolinecolor=colours.quiet,
        zerolinewidth=1,
    )
    fig.update_yaxes(
        tickvals=list(range(len(others))),
        ticktext=[shown(name) for name in others],
        range=[len(others) - 0.4, -0.6],
        zeroline=False,
        showgrid=False,
    )
    fig.update_layout(margin={"l": 10})
    text = (
        f"{shown(reference)} minus the other, in points<br>of target accuracy; bars: 95 % interval"
        "<br>filled: zero is not in it"
    )
    note(fig, text, mode)
    return fig
