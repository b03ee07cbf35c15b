"""Figures of fronts: what a strategy gains on the target for a given loss elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast, get_args

import numpy as np
import pandas as pd
import plotly.colors
import plotly.graph_objects as go

from circuitlens.adapt.front import LOSSES, Front
from circuitlens.errors import InputError, check_choice
from circuitlens.experiments.front_bootstrap import front_gains
from circuitlens.experiments.simple_rivals import SIMPLE
from circuitlens.view.small_multiples import (
    Results,
    below,
    cells_of,
    panels,
    shown,
    strategy_styles,
    ticks_of,
    title_below,
)
from circuitlens.view.theme import Mode, look

__all__ = ["Split", "front_frame", "transfer_fronts"]

Split = Literal["validation", "test"]

_MOST = 0.05
_DASHES = {"majority": "dot", "n-grams": "dash"}


def transfer_fronts(
    results: Results,
    title: str = "",
    *,
    most_lost: float = _MOST,
    split: Split = "validation",
    columns: int = 3,
    mode: Mode = "light",
) -> go.Figure:
    """Draw the target gain that each strategy offers for a loss on the source, in points.

    Further up is better. A line is the best target accuracy, on validation, of all rates and α that
    lose at most that much on every task to keep, the mean over seeds, with a 95 % interval by
    bootstrap over validation sentences. Every language has a panel, and all have the same axes.
    Simple rivals, which have nothing to lose, are dotted lines at their accuracy on validation.

    With ``split="test"`` it shows how these promises turned out: every marker is the point that
    validation would choose if 0, 1, 2 or 5 points might be lost there, at what it gains and loses
    on test.

    Args:
        results: a comparison, or single results; of those the ones with the same language and
            strategy count as seeds. Results without a front are left out.
        title: of the figure.
        most_lost: where the x axis ends, as a share: 0.05 is five points.
        split: ``"test"`` takes transfers with ``test_front=True``; its x axis is as long as the
            losses are.
        columns: panels side by side.
        mode: of colours.

    Raises:
        InputError: if no result has a front, or ``most_lost`` is not between 0 and 1.
    """
    check_choice("split", split, get_args(Split))
    frame = front_frame(results, most_lost, split=split)
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
    hover = (
        "%{customdata[0]}: at most %{customdata[2]:.1f} points lost on validation, target %{y:+.1f}"
        "<extra>%{customdata[1]}</extra>"
        if split == "validation"
        else "%{customdata[0]}: %{x:.1f} points lost, target %{y:+.1f}"
        "<extra>%{customdata[1]}, %{customdata[2]:g} allowed on validation</extra>"
    )
    seen: set[str] = set()
    banded = False
    for key, curve in frame.groupby(["language", "strategy"], sort=False):
        language, strategy = map(str, cast(tuple[str, str], key))
        row, column = divmod(languages.index(language), n_columns)
        place = {"row": row + 1, "col": column + 1, "legendgroup": strategy}
        style = styles[strategy]
        if bool((curve["high"] > curve["low"]).any()):
            banded = True
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
            customdata=[[shown(language), shown(strategy), loss] for loss in curve["allowed"]],
            hovertemplate=hover,
            **place,
        )
        seen.add(strategy)
    axis = {"zeroline": True, "zerolinecolor": colours.quiet, "zerolinewidth": 1}
    fig.update_xaxes(nticks=ticks_of(n_columns))
    if split == "validation":
        fig.update_xaxes(range=[0, 100 * most_lost], **axis)
    else:
        far = max(1.0, float(frame["lost"].max()))
        near = min(0.0, float(frame["lost"].min()))
        fig.update_xaxes(range=[near - 0.06 * (far - near), far + 0.06 * (far - near)], **axis)
    # Far below, the most frequent label would take the room of all others.
    seen_whole = frame[frame["strategy"] != "majority"]
    high, low = float(seen_whole["high"].max()), min(0.0, float(seen_whole["low"].min()))
    edge = 0.06 * (high - low) or 1.0
    # Not left to plotly: beside axes that match, it takes no notice of what is drawn.
    fig.update_yaxes(range=[low - edge, high + edge], nticks=6, **axis)
    fig.update_yaxes(title_text="target accuracy,<br>gain in points", col=1)
    if split == "test":
        title_below(fig, "source accuracy<br>lost, in points", len(languages), n_columns)
        note = "strategy, on test; markers: points that validation chooses for 0, 1, 2, 5 lost"
    else:
        below_all = "source accuracy that may<br>be lost, in points"
        title_below(fig, below_all, len(languages), n_columns)
        note = "strategy, on validation" + "; band: 95 % interval over sentences" * banded
    fig.update_layout(legend=below(note))
    return fig


def front_frame(
    results: Results,
    most_lost: float = _MOST,
    *,
    split: Split = "validation",
    draws: int = 300,
) -> pd.DataFrame:
    """Return what :func:`transfer_fronts` draws: a row per language, strategy and step of the loss.

    Args:
        results: as of :func:`transfer_fronts`.
        most_lost: the largest loss, as a share.
        split: where gains and losses are measured.
        draws: of the bootstrap over validation sentences.

    Returns:
        ``allowed`` (the loss that may be on validation), ``lost``, and ``gain`` (mean over seeds),
        with the bounds ``low`` and ``high`` of its 95 % interval on validation, in points; and
        ``n_seeds``. Results from before version 0.2 have no interval.

    Raises:
        InputError: as :func:`transfer_fronts`.
    """
    if not 0 < most_lost < 1:
        raise InputError(f"most_lost must be a share between 0 and 1, but is {most_lost:g}.")
    key = "front" if split == "validation" else "test_front"
    fronts: dict[tuple[str, str], list[tuple[Front, Front]]] = {}
    for cell in cells_of(results):
        if cell.get(key):
            place = cell["target_language"], cell["strategy"]
            both = Front.from_dict(cell["front"]), Front.from_dict(cell[key])
            fronts.setdefault(place, []).append(both)
    if not fronts:
        how = "with test_front=True" if split == "test" else "with a source task"
        raise InputError(
            f"None of these transfers has a front on {split}: give those that ran {how}, by this "
            "version."
        )
    found = []
    for (language, strategy), several in fronts.items():
        about = {"language": language, "strategy": strategy, "n_seeds": len(several)}
        if split == "test":
            found.append(pd.DataFrame(about | _kept_promises(several)))
            continue
        steps = np.linspace(0.0, most_lost, 51)
        mine = [front for front, _ in several]
        known = all(front.ids and all(p.right for p in front.points) for front in mine)
        gain, *drawn = 100 * front_gains(mine, steps.tolist(), draws if known else 0)
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0) if drawn else (gain, gain)
        columns = {"gain": gain, "low": low, "high": high}
        found.append(pd.DataFrame(about | {"allowed": 100 * steps, "lost": 100 * steps} | columns))
    starts = {language: both[0][1].start.target for (language, _), both in fronts.items()}
    flat: set[tuple[str, str]] = set()
    for cell in cells_of(results):
        language, name = cell["target_language"], cell["strategy"]
        # Seeds of it are the same.
        if name not in SIMPLE or (language, name) in flat or language not in starts:
            continue
        flat.add((language, name))
        accuracy = (
            cell["target_after"]["accuracy"]
            if split == "test"
            else max(a for _, a in cell["validation"])
        )
        gain = 100 * (accuracy - starts[language])
        steps = 100 * np.linspace(0.0, most_lost, 2)
        about = {"language": language, "strategy": name, "n_seeds": 1}
        level = {"gain": gain, "low": gain, "high": gain}
        found.append(pd.DataFrame(about | {"allowed": steps, "lost": steps} | level))
    return pd.concat(found, ignore_index=True)


def _kept_promises(seeds: Sequence[tuple[Front, Front]]) -> dict[str, np.ndarray]:
    """For every loss that validation may allow, mean gain and loss on test, in points."""
    rows = []
    for front, tested in seeds:
        at = {(p.learning_rate, p.replay, p.alpha): p for p in tested.points}
        # Of all points, only those that no other one beats were measured on test.
        best = [
            max((p for p in front.non_dominated() if front.keeps(p, x)), key=lambda p: p.rank)
            for x in LOSSES
        ]
        reached = [at[p.learning_rate, p.replay, p.alpha] for p in best]
        rows.append([(p.target - tested.start.target, tested.lost(p)) for p in reached])
    gain, lost = 100 * np.mean(rows, axis=0).T
    allowed = 100 * np.array(LOSSES)
    return {"allowed": allowed, "lost": lost, "gain": gain, "low": gain, "high": gain}
