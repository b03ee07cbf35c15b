"""Figures of fronts: what a strategy gains on the target for what it may lose elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import numpy as np
import pandas as pd
import plotly.colors
import plotly.graph_objects as go

from circuitlens.adapt.front import Front
from circuitlens.errors import InputError
from circuitlens.experiments.simple_rivals import SIMPLE
from circuitlens.view.small_multiples import (
    Results,
    below,
    cells_of,
    panels,
    shown,
    strategy_styles,
)
from circuitlens.view.theme import Mode, look

__all__ = ["front_frame", "transfer_fronts"]

_MOST = 0.05
_DASHES = {"majority": "dot", "n-grams": "dash"}


def transfer_fronts(
    results: Results,
    title: str = "",
    *,
    most_lost: float = _MOST,
    columns: int = 3,
    mode: Mode = "light",
) -> go.Figure:
    """Draw the target gain that each strategy offers for a loss on the source, in points.

    Further up is better. A line is the best target accuracy, on validation, of all rates and α that
    lose at most so much on every task to keep; several seeds are their mean, with a band from the
    least to the greatest. Every language has a panel, and all have the same axes. Simple rivals,
    which have nothing to lose, are dotted lines at their accuracy on validation.

    Args:
        results: a comparison, or single results; of those the ones with the same language and
            strategy count as seeds. Results without a front are left out.
        title: of the figure.
        most_lost: where the x axis ends, as a share: 0.05 is five points.
        columns: panels side by side.
        mode: of colours.

    Raises:
        InputError: if no result has a front, or ``most_lost`` is not between 0 and 1.
    """
    frame = front_frame(results, most_lost)
    colours = look(mode)
    languages = list(dict.fromkeys(frame["language"]))
    strategies = list(dict.fromkeys(frame["strategy"]))
    styles = strategy_styles(strategies)
    fig = panels(
        [shown(name) for name in languages],
        columns=columns,
        panel=230 if len(languages) == 1 else 190,
        legend=len(strategies),
        title=title,
        mode=mode,
    )
    n_columns = min(columns, len(languages))
    seen: set[str] = set()
    several = False
    for key, curve in frame.groupby(["language", "strategy"], sort=False):
        language, strategy = map(str, cast(tuple[str, str], key))
        row, column = divmod(languages.index(language), n_columns)
        place = {"row": row + 1, "col": column + 1, "legendgroup": strategy}
        style = styles[strategy]
        if int(curve["n_seeds"].iloc[0]) > 1:
            several = True
            fill = plotly.colors.hex_to_rgb(style.colour)
            fig.add_scatter(
                x=[*curve["lost"], *curve["lost"][::-1]],
                y=[*curve["high"], *curve["low"][::-1]],
                fill="toself",
                fillcolor=f"rgba{(*fill, 0.15)}",
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
                **place,
            )
        simple = strategy in SIMPLE
        fig.add_scatter(
            x=curve["lost"],
            y=curve["gain"],
            mode="lines" if simple else "lines+markers",
            line={"color": style.colour, "width": 1.5, "dash": _DASHES.get(strategy, "solid")},
            marker={"symbol": style.symbol, "size": 7, "maxdisplayed": 4},
            name=shown(strategy),
            showlegend=strategy not in seen,
            customdata=[[shown(language), shown(strategy)]] * len(curve),
            hovertemplate="%{customdata[0]}: at most %{x:.1f} points lost, target %{y:+.1f}"
            "<extra>%{customdata[1]}</extra>",
            **place,
        )
        seen.add(strategy)
    axis = {"zeroline": True, "zerolinecolor": colours.quiet, "zerolinewidth": 1, "nticks": 6}
    fig.update_xaxes(range=[0, 100 * most_lost], **axis)
    # Far below, the most frequent label would take the room of all others.
    seen_whole = frame[frame["strategy"] != "majority"]
    high, low = float(seen_whole["high"].max()), min(0.0, float(seen_whole["low"].min()))
    edge = 0.06 * (high - low) or 1.0
    # Not left to plotly: beside axes that match, it takes no notice of what is drawn.
    fig.update_yaxes(range=[low - edge, high + edge], **axis)
    fig.update_yaxes(title_text="target accuracy,<br>gain in points", col=1)
    last = -(-len(languages) // n_columns)
    fig.update_xaxes(title_text="source accuracy that may<br>be lost, in points", row=last)
    band = "; band: least to greatest of the seeds" if several else ""
    fig.update_layout(legend=below(f"strategy, on validation{band}"))
    return fig


def front_frame(results: Results, most_lost: float = _MOST) -> pd.DataFrame:
    """Return what :func:`transfer_fronts` draws: a row a language, strategy and step of the loss.

    Args:
        results: as of :func:`transfer_fronts`.
        most_lost: the largest loss, as a share.

    Returns:
        ``lost`` and ``gain`` (mean over seeds, ``low`` and ``high`` its extremes), in points, and
        ``n_seeds``.

    Raises:
        InputError: as :func:`transfer_fronts`.
    """
    if not 0 < most_lost < 1:
        raise InputError(f"most_lost is a share between 0 and 1, but is {most_lost:g}.")
    fronts: dict[tuple[str, str], list[Front]] = {}
    for cell in cells_of(results):
        if cell.get("front"):
            key = cell["target_language"], cell["strategy"]
            fronts.setdefault(key, []).append(Front.from_dict(cell["front"]))
    if not fronts:
        raise InputError(
            "None of these transfers has a front: give those with a source task, run by this "
            "version."
        )
    steps = np.linspace(0.0, most_lost, 51)
    found = []
    starts = {language: several[0].start.target for (language, _), several in fronts.items()}
    flat = {
        (cell["target_language"], cell["strategy"]): max(a for _, a in cell["validation"])
        for cell in cells_of(results)
        if cell["strategy"] in SIMPLE and cell["target_language"] in starts
    }
    for (language, strategy), several in fronts.items():
        gains = np.array([_gains(front, steps) for front in several])
        found.append(
            pd.DataFrame(
                {
                    "language": language,
                    "strategy": strategy,
                    "lost": 100 * steps,
                    "gain": 100 * gains.mean(0),
                    "low": 100 * gains.min(0),
                    "high": 100 * gains.max(0),
                    "n_seeds": len(several),
                }
            )
        )
    for (language, rival), accuracy in flat.items():
        gain = 100 * (accuracy - starts[language])
        level = {"gain": gain, "low": gain, "high": gain, "n_seeds": 1}
        about = {"language": language, "strategy": rival, "lost": 100 * steps}
        found.append(pd.DataFrame(about | level))
    return pd.concat(found, ignore_index=True)


def _gains(front: Front, steps: Iterable[float]) -> list[float]:
    return [front.choose(float(step)).target - front.start.target for step in steps]
