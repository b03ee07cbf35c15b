"""Figures of single transfers: how training went, and what it changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from circuitlens.adapt import TransferResult
from circuitlens.adapt.monitors import PREFIX
from circuitlens.adapt.options import rank
from circuitlens.circuit import Circuit
from circuitlens.errors import InputError
from circuitlens.view.small_multiples import (
    Results,
    below,
    cells_of,
    panels,
    shown,
    strategy_styles,
)
from circuitlens.view.theme import Mode, colour_bar, figure, look

__all__ = ["drift_frame", "history_frame", "training_curves", "weight_drift"]


def history_frame(results: Results | TransferResult) -> pd.DataFrame:
    """Return validation after every epoch, as :func:`training_curves` draws it.

    Columns: ``language``, ``strategy``, ``seed``, ``epoch``, ``accuracy`` in per cent, ``margin``
    in logits, ``best``, whether the weights of this epoch were kept, and ``monitor: NAME`` of every
    monitor. Where there are monitors, epoch 0 has their values before.

    Raises:
        InputError: if there is no result.
    """
    rows: list[dict[str, Any]] = []
    watched: dict[str, None] = {}
    for cell in cells_of(results):
        history: list[Mapping[str, float]] = list(cell["history"])
        # As in training, of equal ones the earlier.
        ranks = list(map(rank, history))
        best = ranks.index(max(ranks)) if ranks else None
        about = {
            "language": cell["target_language"],
            "strategy": cell["strategy"],
            "seed": cell["seed"],
        }
        if history and cell.get("monitored"):
            before = {f"{PREFIX}{n}": pair[0] for n, pair in cell["monitored"].items()}
            rows.append({**about, "epoch": 0.0, "best": False, **before})
        for number, entry in enumerate(history):
            own = {key: value for key, value in entry.items() if key.startswith(PREFIX)}
            watched |= dict.fromkeys(own)
            rows.append(
                {
                    **about,
                    "epoch": entry["epoch"],
                    "accuracy": 100 * entry["accuracy"],
                    "margin": entry["margin"],
                    "best": number == best,
                    **own,
                }
            )
    names = ["language", "strategy", "seed", "epoch", "accuracy", "margin", "best", *watched]
    return pd.DataFrame(rows, columns=names)


def training_curves(
    results: Results | TransferResult, title: str = "", *, mode: Mode = "light"
) -> go.Figure:
    """Draw validation accuracy and margin after every epoch, at the learning rate chosen.

    One line per strategy and seed, one row of panels per target language; the large outlined symbol
    is the epoch whose weights were kept. A monitor has a column of panels, which begins at epoch 0,
    before the training.

    Args:
        results: one result, several, or a comparison.
        title: of the figure.
        mode: of colours.

    Raises:
        InputError: if none of the results has a history.
    """
    colours = look(mode)
    frame = history_frame(results)
    if frame.empty:
        raise InputError("None of these transfers has a history of its epochs.")
    languages = list(dict.fromkeys(frame["language"]))
    strategies = list(dict.fromkeys(frame["strategy"]))
    styles = strategy_styles(strategies)
    measures = {"accuracy": "accuracy, %", "margin": "margin, logits"}
    watched = [name for name in map(str, frame) if name.startswith(PREFIX)]
    measures |= {name: shown(name.removeprefix(PREFIX)) for name in watched}
    # One line is too short for both at the width of a column.
    headings = [
        what if len(languages) == 1 else f"{shown(language)}:<br>{what}"
        for language in languages
        for what in measures.values()
    ]
    fig = panels(
        headings,
        columns=len(measures),
        panel=210 if len(languages) == 1 else 140,
        legend=len(strategies),
        title=title,
        mode=mode,
        bottom=1,
    )
    seen: set[str] = set()
    # A seed that is not known is one more group, not none.
    keys = frame.groupby(["language", "strategy", "seed"], sort=False, dropna=False)
    crowded = len(keys) > len(languages) * len(strategies)
    for key, run in keys:
        language, strategy = str(key[0]), str(key[1])
        seed: Any = key[2]
        style = styles[strategy]
        told = "" if pd.isna(seed) else f"<br>seed {seed:.0f}"
        names = [shown(language), shown(strategy)]
        best = run[run["best"]]
        for column, name in enumerate(measures, start=1):
            place = {"row": languages.index(language) + 1, "col": column}
            about = {
                "name": shown(strategy),
                "legendgroup": strategy,
                "hovertemplate": (
                    f"%{{customdata[0]}}, epoch %{{x:.3g}}: %{{y:.3g}}{told}"
                    "<extra>%{customdata[1]}</extra>"
                ),
            }
            fig.add_scatter(
                x=run["epoch"],
                y=run[name],
                mode="lines+markers",
                opacity=0.75 if crowded else 1,
                line={"color": style.colour, "width": 1.2 if crowded else 1.8},
                marker={"symbol": style.symbol, "size": 4 if crowded else 6},
                customdata=[names] * len(run),
                showlegend=column == 1 and strategy not in seen,
                **about,
                **place,
            )
            fig.add_scatter(
                x=best["epoch"],
                y=best[name],
                mode="markers",
                marker={
                    "symbol": style.symbol,
                    "color": style.colour,
                    "size": 9 if crowded else 11,
                    "line": {"color": colours.ink, "width": 1.2},
                },
                customdata=[names] * len(best),
                showlegend=False,
                **about,
                **place,
            )
        seen.add(strategy)
    for column, name in enumerate(measures, start=1):
        # Each measure has its scale, which is shared by the languages.
        low, high = frame[name].min(), frame[name].max()
        edge = 0.08 * (high - low) or 1.0
        fig.update_yaxes(
            range=[low - edge, high + edge],
            matches="y" if column == 1 else f"y{column}",
            showticklabels=True,
            nticks=6,
            col=column,
        )
    for column in range(1, len(measures) + 1):
        fig.layout[f"yaxis{column if column > 1 else ''}"].matches = None
    last = frame["epoch"].max()
    fig.update_xaxes(range=[-0.5 if watched else 0.5, last + 0.5], nticks=6)
    fig.update_xaxes(title_text="epoch", row=len(languages))
    fig.update_layout(legend=below("validation by strategy; large: the epoch that was kept"))
    return fig


def drift_frame(result: TransferResult) -> pd.DataFrame:
    """Return one row per head: ``head``, ``layer``, ``index``, ``drift``, and ``trained`` or not.

    ``drift`` is the norm of the change of the head's weights.
    """
    inside = {(head.layer, head.index) for head in result.heads or ()}
    rows = [
        (f"a{layer}.h{index}", layer, index, value, (layer, index) in inside)
        for layer, row in enumerate(result.drift)
        for index, value in enumerate(row)
    ]
    return pd.DataFrame(rows, columns=["head", "layer", "index", "drift", "trained"])


def weight_drift(result: TransferResult, title: str = "", *, mode: Mode = "light") -> go.Figure:
    """Draw how far a transfer moved the weights of every head, layers downwards.

    The number is the Euclidean norm of the change of a head's slices of q, k, v and o, in the units
    of the weights; the scale begins at zero. The heads that were chosen for training are outlined:
    under grouped-query attention others move too if they share keys and values with them.

    Args:
        result: of a transfer.
        title: of the figure.
        mode: of colours.

    Raises:
        InputError: if the result has no drift.
    """
    if not result.drift or not result.drift[0]:
        raise InputError("This result has no drift of its heads.")
    colours = look(mode)
    drift = np.array(result.drift, dtype=float)
    n_layers, n_heads = drift.shape
    trained: Circuit | tuple[()] = result.heads or ()
    inside = {(head.layer, head.index) for head in trained}
    names = [
        [
            [f"a{la}.h{h}", "<br>chosen for training" if (la, h) in inside else ""]
            for h in range(n_heads)
        ]
        for la in range(n_layers)
    ]
    cell = max(14, min(30, 620 // n_layers))
    fig = figure(title, mode=mode, height=(50 if title else 20) + 110 + max(150, cell * n_layers))
    fig.add_heatmap(
        z=drift,
        zmin=0.0,
        zmax=float(drift.max()) or 1.0,
        colorscale=colours.sequential,
        xgap=1,
        ygap=1,
        customdata=names,
        hovertemplate=(
            "<b>%{customdata[0]}</b>%{customdata[1]}<br>norm of the change %{z:.4g}<extra></extra>"
        ),
        colorbar=colour_bar("norm of the change of the head's weights"),
    )
    fig.update_traces(colorbar_title_font_size=12)
    line = {"color": colours.ink, "width": 2 if n_heads <= 16 else 1.3}
    # All at once: plotly checks the whole list whenever one is added.
    fig.layout.shapes = [
        {
            "type": "rect",
            "x0": head.index - 0.5,
            "x1": head.index + 0.5,
            "y0": head.layer - 0.5,
            "y1": head.layer + 0.5,
            "line": line,
        }
        for head in trained
    ]
    # Every step that is left out is a power of two, as head counts mostly are.
    steps = [2 ** max(0, int(np.ceil(np.log2(n / 12)))) for n in (n_heads, n_layers)]
    about = {
        "showgrid": False,
        "zeroline": False,
        "ticks": "",
        "title_font_size": 12,
        "title_standoff": 6,
    }
    title_of_heads = "head (outlined: chosen for training)" if trained else "head"
    moved = drift_frame(result).query("drift > 0 and not trained")
    if trained and len(moved):
        title_of_heads = (
            "head (outlined: chosen; others moved with keys and values that they share)"
        )
    fig.update_xaxes(
        title=title_of_heads,
        dtick=steps[0],
        range=[-0.6, n_heads - 0.4],
        tickangle=0,
        **about,
    )
    fig.update_yaxes(title="layer", dtick=steps[1], range=[n_layers - 0.4, -0.6], **about)
    return fig
