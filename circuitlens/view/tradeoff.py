"""Figures of transfers: what was learned, what was kept.

Those of languages × strategies and of single trainings are made in modules of their own.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from circuitlens.errors import InputError
from circuitlens.view.small_multiples import (
    MEAN,
    Results,
    Style,
    below,
    panels,
    seeds_of,
    shown,
    strategy_styles,
    ticks_of,
    title_below,
    transfer_points,
)
from circuitlens.view.theme import Mode, look

__all__ = ["transfer_tradeoff"]

_BARS = {"sd": "± standard deviation over", "range": "least to largest of"}


def transfer_tradeoff(
    results: Results,
    title: str = "",
    *,
    intervals: str = "sd",
    facets: str = "languages",
    columns: int = 3,
    mode: Mode = "light",
) -> go.Figure:
    """Draw target gain against source change, one point per strategy, in accuracy points.

    Up is learned, left is forgotten. Every target language has a panel; all have the same axes. A
    strategy has the same colour and symbol in every figure. Results without a source task are left
    out.

    Args:
        results: a comparison, or single results; of those the ones with the same language and
            strategy count as seeds.
        title: of the figure.
        intervals: what the bars show: ``"sd"``, the standard deviation over seeds to both sides,
            or ``"range"``, from the lowest to the highest. One seed has no bars.
        facets: ``"languages"``, ``"mean"`` (over the languages that have every strategy), or
            ``"all"``, which adds the mean to the languages if there are two of these.
        columns: panels side by side; two are as many as a column of a paper has room for.
        mode: of colours.

    Raises:
        InputError: if no result has a source task, for a mean over fewer than two languages, or
            for unknown options.
    """
    if intervals not in _BARS:
        raise InputError(f"The intervals must be 'sd' or 'range', but are {intervals!r}.")
    if facets not in ("all", "languages", "mean"):
        raise InputError(f"The facets must be 'all', 'languages' or 'mean', but are {facets!r}.")
    colours = look(mode)
    points = transfer_points(results)
    points = points[points["source_change"].notna()]
    if points.empty:
        raise InputError(
            "None of these transfers measured a source task, so there is no change to draw."
        )
    if facets != "all":
        points = points[(points["language"] == MEAN) == (facets == "mean")]
        if points.empty:
            raise InputError(
                "A mean over languages needs at least two languages that have every strategy."
            )
    languages = list(dict.fromkeys(points["language"]))
    strategies = list(dict.fromkeys(points["strategy"]))
    styles = strategy_styles(strategies)
    headings = [_heading(points, name) for name in languages]
    alone = len(languages) == 1
    fig = panels(
        headings,
        columns=columns,
        panel=230 if alone else 190,
        legend=len(strategies),
        title=title,
        mode=mode,
        bottom=1,
        # Languages gain very different amounts; within one, strategies are to be told apart.
        shared_y=False,
    )
    n_columns = min(columns, len(languages))
    seen: set[str] = set()
    for number, language in enumerate(languages):
        row, column = divmod(number, n_columns)
        for point in points[points["language"] == language].to_dict("records"):
            strategy = point["strategy"]
            fig.add_scatter(
                **_marker(point, styles[strategy], intervals, colours.paper),
                showlegend=strategy not in seen,
                row=row + 1,
                col=column + 1,
            )
            seen.add(strategy)
        of_language = points[points["language"] == language]
        span = _range(of_language, "gain", intervals, with_zero=False)
        fig.update_yaxes(range=span, row=row + 1, col=column + 1)
    zero = {"zeroline": True, "zerolinecolor": colours.quiet, "zerolinewidth": 1}
    fig.update_xaxes(
        range=_range(points, "source_change", intervals), nticks=ticks_of(n_columns), **zero
    )
    fig.update_yaxes(nticks=6, **zero)
    fig.update_yaxes(title_text="target accuracy,<br>gain in points", col=1)
    # In two lines: a panel in a column of a paper is not wider.
    title_below(fig, "source accuracy,<br>change in points", len(languages), n_columns)
    seeds = seeds_of(points, "bars")
    bars = f"strategy; bars: {_BARS[intervals]} {seeds}" if seeds else "strategy"
    fig.update_layout(legend=below(bars))
    return fig


def _heading(points: pd.DataFrame, language: str) -> str:
    if language != MEAN:
        return shown(language)
    n = int(points.loc[points["language"] == MEAN, "n_languages"].iloc[0])
    return f"<b>mean of {n} languages</b>"


def _range(
    points: pd.DataFrame, name: str, intervals: str, *, with_zero: bool = True
) -> list[float]:
    """Room for all points with their bars, and for zero."""
    if intervals == "sd":
        spread = points[f"{name}_sd"].fillna(0.0)
        lows, highs = points[name] - spread, points[name] + spread
    else:
        # A mean over languages has no spread if they have no seed in common.
        lows, highs = (points[name + end].fillna(points[name]) for end in ("_low", "_high"))
    low, high = lows.min(), highs.max()
    if with_zero:
        low, high = min(0.0, low), max(0.0, high)
    edge = 0.09 * (high - low) or 1.0
    return [low - edge, high + edge]


def _marker(point: dict[str, Any], style: Style, intervals: str, rim: str) -> dict[str, Any]:
    """One strategy in one panel, as arguments of a scatter trace."""
    trace: dict[str, Any] = {
        "x": [point["source_change"]],
        "y": [point["gain"]],
        "mode": "markers",
        "name": shown(point["strategy"]),
        "legendgroup": point["strategy"],
        "marker": {
            "size": 11,
            "color": style.colour,
            "symbol": style.symbol,
            "line": {"color": rim, "width": 1},
        },
    }
    told = {"x": "", "y": ""}
    if point["n_seeds"] > 1:
        for axis, name in (("x", "source_change"), ("y", "gain")):
            mean, low, high = (point[name + end] for end in ("", "_low", "_high"))
            if intervals == "sd":
                bars: dict[str, Any] = {"array": [point[f"{name}_sd"]]}
                told[axis] = f" ± {point[f'{name}_sd']:.1f}"
            else:
                bars = {"array": [high - mean], "arrayminus": [mean - low], "symmetric": False}
                told[axis] = f" ({low:+.1f} to {high:+.1f})"
            trace[f"error_{axis}"] = {
                "type": "data",
                "color": style.colour,
                "thickness": 1.2,
                "width": 2,
                **bars,
            }
    n_seeds, n_languages = int(point["n_seeds"]), int(point["n_languages"])
    spread = {"sd": "standard deviation over", "range": _BARS["range"]}[intervals]
    over = f"<br>{spread} {n_seeds} seeds" if n_seeds > 1 else ""
    mean_of = f"<br>mean of {n_languages} languages" if n_languages > 1 else ""
    # Names travel as data: in the template itself, %{…} would be read as a placeholder.
    trace["customdata"] = [[shown(point["language"]), shown(point["strategy"])]]
    trace["hovertemplate"] = (
        f"%{{customdata[0]}}: target %{{y:+.1f}}{told['y']}, source %{{x:+.1f}}{told['x']} points"
        f"{mean_of}{over}<br>{point['n_trainable']:,.0f} trained<extra>%{{customdata[1]}}</extra>"
    )
    return trace
