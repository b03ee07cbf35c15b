"""The report: one HTML file that needs neither network nor server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from circuitlens.adapt import STRATEGIES, TransferResult
from circuitlens.circuit import Circuit
from circuitlens.curve import FaithfulnessCurve
from circuitlens.scorers import METHODS
from circuitlens.scores import HeadScores
from circuitlens.storage import replacing
from circuitlens.view.curves import faithfulness_curve
from circuitlens.view.heads import head_heatmap
from circuitlens.view.transfers import transfer_tradeoff

__all__ = ["render_report", "write_report"]

_CONFIG = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["lasso2d"]}


def _embed(fig: go.Figure, name: str) -> Markup:
    """One figure as a div; the library itself is embedded once, in the page's head."""
    return Markup(
        plotly.io.to_html(fig, include_plotlyjs=False, full_html=False, config=_CONFIG, div_id=name)
    )


def warnings_for(
    scores: HeadScores, curve: FaithfulnessCurve | None, results: Sequence[TransferResult]
) -> list[str]:
    """What a reader should know before trusting the numbers."""
    found: list[str] = []
    if (n := len(scores.example_ids)) < 50:
        found.append(f"Discovery used only {n} examples; rankings of so few are unstable.")
    if curve is not None and curve.accuracy[-1] < 0.5:
        found.append(
            f"The whole model answers only {curve.accuracy[-1]:.0%} of the held-out examples."
        )
    sizes = {r.target_after.n for r in results}
    if sizes and min(sizes) < 200:
        found.append(f"The smallest test split has only {min(sizes)} examples.")
    return found


def render_report(
    *,
    title: str,
    settings: Mapping[str, Any],
    scores: HeadScores,
    circuit: Circuit,
    curve: FaithfulnessCurve | None,
    results: Sequence[TransferResult],
    competence: str,
) -> str:
    """Render the page; all text from data and settings is escaped.

    Args:
        title: heading.
        settings: name and value of everything that was set, shown as a table.
        scores, circuit: discovery.
        curve: faithfulness, if it was measured.
        results: transfers, if there were any.
        competence: a sentence on how competent the model is in the source language.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = resources.files("circuitlens.view") / "templates" / "report.html.j2"
    figures = {"heatmap": _embed(head_heatmap(scores, circuit), "heads")}
    if curve is not None:
        # In large models the small circuits, which matter, would all sit at the left edge.
        scale = "log" if curve.n_heads > 100 else "linear"
        fig = faithfulness_curve(curve, circuit, scale=scale)
        figures["faithfulness"] = _embed(fig, "faithfulness-figure")
    if any(r.source_change is not None for r in results):
        figures["tradeoff"] = _embed(transfer_tradeoff(results), "tradeoff")
    total = scores.n_layers * scores.n_heads
    at = curve.at(len(circuit)) if curve is not None and len(circuit) in curve.sizes else None
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        title=title,
        plotly=Markup(get_plotlyjs()),
        settings={k: v for k, v in settings.items() if v is not None},
        provenance=scores.provenance,
        scores=scores,
        method=METHODS.get(scores.method, "a rule set of your own"),
        table=scores.to_frame().head(15).to_dict("records"),
        circuit=circuit,
        total=total,
        curve=curve,
        at=at,
        results=results,
        strategies={s.name: s.description for s in STRATEGIES.values()},
        competence=competence,
        warnings=warnings_for(scores, curve, results),
        figures=figures,
    )


def write_report(path: str | Path, **content: Any) -> Path:
    """Write :func:`render_report` to ``path``, whole or not at all."""
    page = render_report(**content)
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
