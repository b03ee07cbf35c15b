"""Figures of evaluations: which labels are mistaken for which."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from circuitlens.view.theme import Mode, colour_bar, figure, look, plain

if TYPE_CHECKING:
    from circuitlens.tasks.evaluation import Evaluation

__all__ = ["confusion_matrix"]


def confusion_matrix(evaluation: Evaluation, title: str = "", *, mode: Mode = "light") -> go.Figure:
    """Draw how often each label is answered for examples of each label.

    A row is the right label, a column the answer. Colours are shares of the row, numbers are
    examples; the diagonal is what is answered correctly.

    Args:
        evaluation: of :func:`circuitlens.evaluate`, or of a result.
        title: of the figure.
        mode: ``"light"`` or ``"dark"``.

    Raises:
        InputError: if the evaluation is from an older version and does not know.
    """
    counts = evaluation.confusion()
    colours = look(mode)
    values = counts.to_numpy()
    shares = values / np.maximum(values.sum(1, keepdims=True), 1)
    names = [plain(name) for name in counts.index]
    # Labels that do not fit side by side are written upright.
    longest = max(map(len, counts.index))
    upright = 7 * longest if longest * len(names) > 45 else 0
    fig = figure(title, mode=mode, height=190 + 34 * len(names) + upright)
    fig.add_heatmap(
        z=shares,
        x=names,
        y=names,
        text=values,
        texttemplate="%{text}",
        customdata=values,
        zmin=0,
        zmax=1,
        colorscale=colours.sequential,
        colorbar={**colour_bar("share of the row"), "tickformat": ".0%"},
        hovertemplate="%{y} answered as %{x}: %{customdata} (%{z:.1%})<extra></extra>",
        xgap=1,
        ygap=1,
    )
    style = {"showgrid": False, "type": "category", "automargin": True, "dtick": 1}
    fig.update_yaxes(autorange="reversed", title={"text": "right label", "standoff": 12}, **style)
    fig.update_xaxes(
        title={"text": "answer", "standoff": 12}, tickangle=-90 if upright else 0, **style
    )
    fig.update_layout(margin={"t": 60 if title else 40, "b": 60})
    return fig
