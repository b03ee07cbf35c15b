"""What figures of transfers share: one style per strategy, numbers over seeds, small multiples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuitlens.adapt import TransferResult
from circuitlens.adapt.strategies import look_of
from circuitlens.errors import InputError
from circuitlens.experiments.comparison import Comparison
from circuitlens.view.theme import LEGEND_BELOW, PALETTE, Mode, figure, look, plain

__all__ = [
    "MEAN",
    "Results",
    "Style",
    "below",
    "cells_of",
    "note",
    "panels",
    "seeds_of",
    "shown",
    "strategy_styles",
    "ticks_of",
    "title_below",
    "transfer_points",
]

Results = Comparison | Sequence[TransferResult]

# What the mean over languages is called where a language's name would stand.
MEAN = "all languages"
# Of strategies that circuitlens does not know; no known one has an open symbol.
_OTHERS = ("circle-open", "diamond-open", "square-open", "cross-open", "x-open", "star-open")
_VALUES = ("gain", "target_after", "source_change", "source_after")
_LONGEST = 24
_LINE = 16


class Style(NamedTuple):
    """How a strategy is drawn.

    Attributes:
        colour: of the palette.
        symbol: plotly's name of it.
    """

    colour: str
    symbol: str


def strategy_styles(strategies: Iterable[str]) -> dict[str, Style]:
    """Colour and symbol of strategies; those of circuitlens have the same in every figure.

    Args:
        strategies: names; unknown ones follow the known ones, in the order of the alphabet.
    """
    named = list(strategies)
    others = sorted(name for name in set(named) if look_of(name) is None)
    styles = {}
    for name in named:
        known = look_of(name)
        if known is None:
            i = others.index(name)
            known = PALETTE[i % len(PALETTE)], _OTHERS[i % len(_OTHERS)]
        styles[name] = Style(*known)
    return styles


def shown(name: str) -> str:
    """A name as figures show it: markup escaped, and cut to what a heading has room for."""
    short = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
    return plain(short)


def cells_of(results: Results | TransferResult) -> list[Mapping[str, Any]]:
    """Return the cells of a comparison, or of single results what would be their cells.

    Raises:
        InputError: if there is none.
    """
    if isinstance(results, Comparison):
        cells = list(results.cells)
    else:
        several = [results] if isinstance(results, TransferResult) else results
        cells = [{**r.to_dict(), "seed": r.provenance.settings.get("seed")} for r in several]
    if not cells:
        raise InputError("There is no finished transfer to draw.")
    return cells


def transfer_points(results: Results) -> pd.DataFrame:
    """Return the numbers that figures of transfers draw: one row per language and strategy.

    Accuracies in per cent and their changes in points: ``gain`` and ``target_after``, and
    ``source_change`` and ``source_after`` (empty without a source task), each a mean over seeds
    with the standard deviation (``_sd``, divisor n - 1, empty with one seed) and the lowest and
    highest value (``_low``, ``_high``). ``n_seeds`` says of how many seeds, ``n_languages`` of how
    many languages.

    If at least two languages have a cell of every strategy, the mean over these languages follows
    under the name ``all languages``; its spread is that of the mean over the seeds that all of
    them have.

    Args:
        results: a comparison, or single results; of those the ones with the same language and
            strategy count as seeds.

    Raises:
        InputError: if there is no result.
    """
    rows = []
    for cell in cells_of(results):
        before, after = (cell[f"target_{phase}"]["accuracy"] for phase in ("before", "after"))
        # The source is the first of the retained tasks.
        source = cell["retained"][0] if cell["source_language"] else None
        old, new = (source[p]["accuracy"] if source else np.nan for p in ("before", "after"))
        rows.append(
            {
                "language": cell["target_language"],
                "strategy": cell["strategy"],
                "seed": cell["seed"],
                "gain": 100 * (after - before),
                "target_after": 100 * after,
                "source_change": 100 * (new - old),
                "source_after": 100 * new,
                "n_trainable": cell["n_trainable"],
            }
        )
    cells = pd.DataFrame(rows)
    points = _over_seeds(cells).assign(n_languages=1)
    strategies = set(cells["strategy"])
    per_language = cells.groupby("language", sort=False)["strategy"].agg(set)
    whole = [
        name
        for name, found in zip(per_language.index, per_language, strict=True)
        if found == strategies
    ]
    if len(whole) < 2:
        return points
    common = cells[cells["language"].isin(whole)]
    n_seen = common.groupby(["strategy", "seed"], dropna=False)["language"].transform("nunique")
    means = (
        common[n_seen == len(whole)]
        .groupby(["strategy", "seed"], sort=False, dropna=False)[[*_VALUES, "n_trainable"]]
        .mean()
        .reset_index()
        .assign(language=MEAN)
    )
    spread = _over_seeds(means).set_index("strategy")
    overall = []
    for strategy, group in points[points["language"].isin(whole)].groupby("strategy", sort=False):
        row: dict[str, Any] = {"language": MEAN, "strategy": strategy, "n_languages": len(whole)}
        # Languages may have different seeds; then the mean has no spread.
        found = spread.loc[strategy].to_dict() if strategy in spread.index else {"n_seeds": 0}
        row |= {str(k): v for k, v in found.items() if k != "language"}
        row |= {name: group[name].mean() for name in (*_VALUES, "n_trainable")}
        overall.append(row)
    return pd.concat([points, pd.DataFrame(overall)], ignore_index=True)


def _over_seeds(cells: pd.DataFrame) -> pd.DataFrame:
    groups = cells.groupby(["language", "strategy"], sort=False)
    columns: dict[str, Any] = {"n_seeds": ("gain", "size")}
    for name in _VALUES:
        columns |= {
            name: (name, "mean"),
            f"{name}_sd": (name, "std"),
            f"{name}_low": (name, "min"),
            f"{name}_high": (name, "max"),
        }
    found: pd.DataFrame = groups.agg(**columns, n_trainable=("n_trainable", "mean"))
    return found.reset_index()


def seeds_of(points: pd.DataFrame, mark: str) -> str:
    """Say over how many seeds the spread is: ``3 seeds``, ``2 to 3 seeds``; empty without any.

    ``mark`` is what shows the spread, and is missing where there is one seed.
    """
    counts = points.loc[points["n_seeds"] > 1, "n_seeds"]
    if counts.empty:
        return ""
    low, high = int(counts.min()), int(counts.max())
    told = f"{low} seeds" if low == high else f"{low} to {high} seeds"
    return f"{told}; no {mark}: one seed" if (points["n_seeds"] == 1).any() else told


def panels(
    headings: Sequence[str],
    *,
    columns: int,
    panel: int,
    legend: int,
    title: str = "",
    mode: Mode = "light",
    bottom: int = 2,
    shared_y: bool = True,
) -> go.Figure:
    """Make a figure of small multiples with shared x axes, filled row by row.

    Args:
        headings: of the panels, as plotly should render them.
        columns: at most this many side by side.
        panel: height of one in pixels.
        legend: entries of the legend, which stands below in two or more columns; 0 for none.
        title: of the figure.
        mode: of colours.
        bottom: lines of the :func:`note` below the panels.
        shared_y: one y axis for all; otherwise each panel has its own.

    Raises:
        InputError: if ``columns`` is not positive.
    """
    if columns < 1:
        raise InputError(f"columns must be positive, but is {columns}.")
    n = len(headings)
    n_columns = min(columns, n)
    n_rows = math.ceil(n / n_columns)
    more = _LINE * max((heading.count("<br>") for heading in headings), default=0)
    # Tick labels of a panel above an empty place stand in the gap.
    gap = (30 if n == n_rows * n_columns else 46) + more
    plot = n_rows * panel + (n_rows - 1) * gap
    room = _LINE * bottom + 34
    entries = 20 * (math.ceil(legend / 2) + 1) if legend else 0
    # The bar of buttons comes over the first 28 pixels.
    top = (60 if title else 46) + more
    fig = make_subplots(
        n_rows,
        n_columns,
        subplot_titles=list(headings),
        shared_xaxes="all",
        shared_yaxes="all" if shared_y else False,
        horizontal_spacing=(0.14 if shared_y else 0.24) / n_columns,
        vertical_spacing=gap / plot if n_rows > 1 else 0,
    )
    fig.update_layout(figure(title, mode=mode, height=top + plot + room + entries).layout)
    fig.update_layout(
        margin={"t": top, "b": room}, title={"y": 1, "yanchor": "top", "pad": {"t": 14}}
    )
    for number, heading in enumerate(fig.layout.annotations, start=1):
        axis = "" if number == 1 else str(number)
        heading.update(x=0, xref=f"x{axis} domain", xanchor="left", align="left", font={"size": 12})
    for empty in range(n, n_rows * n_columns):
        row, column = divmod(empty, n_columns)
        fig.update_xaxes(visible=False, row=row + 1, col=column + 1)
        fig.update_yaxes(visible=False, row=row + 1, col=column + 1)
        # The panel above is the lowest of its column.
        fig.update_xaxes(showticklabels=True, row=row, col=column + 1)
    if legend:
        fig.update_layout(legend=below())
    title_style = {"font": {"size": 12}, "standoff": 6}
    fig.update_xaxes(tickangle=0, zeroline=False, title=title_style)
    fig.update_yaxes(zeroline=False, title=title_style)
    return fig


def ticks_of(n_columns: int) -> int:
    """Most numbers on the x axis of a panel; side by side they would run into each other."""
    return 6 if n_columns < 3 else 4


def title_below(fig: go.Figure, text: str, n_panels: int, n_columns: int) -> None:
    """Name the x axes of the lowest row; where it has three panels or more, once for all."""
    row = -(-n_panels // n_columns)
    lowest = n_panels - (row - 1) * n_columns
    once = {"col": (lowest + 1) // 2} if n_columns > 2 else {}
    fig.update_xaxes(title_text=text, row=row, **once)


def below(text: str = "") -> dict[str, Any]:
    """Where a legend stands below everything else, with a line of text over it."""
    return {
        **LEGEND_BELOW,
        "x": 0.01,
        # From the edge of the figure, not of the panels: names of strategies are long.
        "xref": "container",
        "title": {"text": text, "side": "top", "font": {"size": 11}},
        "font": {"size": 11},
        # Otherwise it would scroll where it is longer than half of the figure.
        "maxheight": 1,
        "tracegroupgap": 0,
    }


def note(fig: go.Figure, text: str, mode: Mode) -> None:
    """Write one line or more below the numbers of all x axes together, where no legend stands."""
    fig.add_annotation(
        text=text,
        x=0.5,
        xref="paper",
        y=0,
        yref="paper",
        yanchor="top",
        yshift=-20,
        showarrow=False,
        font={"size": 12, "color": look(mode).ink},
    )
