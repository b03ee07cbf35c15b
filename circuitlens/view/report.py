"""The report: one HTML file that needs neither network nor server."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from circuitlens.adapt import STRATEGIES, TransferResult
from circuitlens.circuit import Circuit
from circuitlens.circuits.curve import FaithfulnessCurve
from circuitlens.circuits.effects import HeadEffects
from circuitlens.circuits.lens import MarginByLayer
from circuitlens.circuits.looking import HeadRoles
from circuitlens.errors import InputError
from circuitlens.experiments import Comparison
from circuitlens.experiments.costs import all_passes
from circuitlens.experiments.simple_rivals import SimpleRival
from circuitlens.nodes import Head
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.scoring.scorers import METHODS
from circuitlens.utils.provenance import Provenance
from circuitlens.utils.storage import replacing
from circuitlens.view.caveats import comparison_warnings, run_warnings
from circuitlens.view.curves import faithfulness_curve
from circuitlens.view.fronts import transfer_fronts
from circuitlens.view.graph import circuit_graph
from circuitlens.view.heads import head_bars, head_heatmap
from circuitlens.view.roles import head_card, margin_lens
from circuitlens.view.small_multiples import cells_of
from circuitlens.view.strategy_grids import paired_differences, strategy_table
from circuitlens.view.tradeoff import transfer_tradeoff
from circuitlens.view.training import training_curves, weight_drift
from circuitlens.view.verdict import verdicts

__all__ = ["render_report", "write_report"]

_CONFIG = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["lasso2d"]}
# Heads of which the report shows a card.
_CARDS = 3
_ENVIRONMENT = Environment(
    loader=PackageLoader("circuitlens.view"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def _fixed(number: float, digits: int, sign: str = "") -> str:
    """A number with a minus as in the figures, which a rounded zero does not have; – for NaN."""
    if math.isnan(number):
        return "–"
    return f"{number:{sign}z.{digits}f}".replace("-", "−")


_ENVIRONMENT.filters |= {"fixed": _fixed, "signed": partial(_fixed, sign="+")}


def _embed(figures: Mapping[str, go.Figure]) -> dict[str, Markup]:
    """Figures as divs; the library itself is embedded once, in the page's head."""
    return {
        name: Markup(
            plotly.io.to_html(
                fig, include_plotlyjs=False, full_html=False, config=_CONFIG, div_id=f"fig-{name}"
            )
        )
        for name, fig in figures.items()
    }


def render_report(
    *,
    title: str,
    settings: Mapping[str, Any] | None = None,
    scores: HeadScores | None = None,
    circuit: Circuit | None = None,
    effects: HeadEffects | None = None,
    roles: HeadRoles | None = None,
    lens: MarginByLayer | None = None,
    curve: FaithfulnessCurve | None = None,
    results: Sequence[TransferResult] = (),
    rivals: Sequence[SimpleRival] = (),
    comparison: Comparison | None = None,
    competence: str = "",
) -> str:
    """Render the page; all text from data and settings is escaped.

    Args:
        title: heading.
        settings: name and value of everything that was set, shown as a table.
        scores, circuit: discovery; both or none.
        effects: what ablating each head of the circuit does, if it was measured.
        roles: what its heads look at, and which labels they raise.
        lens: the task margin behind every layer.
        curve: faithfulness, if it was measured.
        results: single transfers, if there were any.
        rivals: simple rivals in their languages (:func:`circuitlens.experiments.simple_rival`).
        comparison: strategies × languages × seeds, if they were compared.
        competence: a sentence on how competent the model is in the source language.

    Raises:
        InputError: if there is nothing to report.
    """
    has_cells = comparison is not None and bool(comparison.cells)
    if scores is None and not has_cells:
        raise InputError(
            "There is nothing to report: give scores with a circuit, or a comparison with a "
            "finished cell."
        )
    context: dict[str, Any] = {
        "title": title,
        "plotly": Markup(get_plotlyjs()),
        "settings": {k: v for k, v in (settings or {}).items() if v is not None},
        "competence": competence,
        "run": None,
        "verdicts": [],
        "comparison": None,
        "warnings": [],
    }
    if scores is not None:
        if circuit is None:
            raise InputError("A report of scores shows their circuit: pass circuit=… too.")
        context["run"] = _run(scores, circuit, effects, curve, results)
        context["run"]["figures"] |= _embed(_looks(scores, circuit, roles, lens))
        context["run"] |= {"rivals": rivals, "roles": roles}
        context["run"]["explorer"] = _explorer(scores, circuit, effects, roles)
        context["verdicts"] = verdicts(scores, circuit, effects, curve, results, rivals)
        context["warnings"] += run_warnings(scores, curve, results)
        context["provenance"] = scores.provenance
    if comparison is not None and has_cells:
        context["comparison"] = _comparison(comparison)
        context["warnings"] += comparison_warnings(comparison)
        # Simple rivals have none, and where every training failed they stand alone.
        cell = next((c["provenance"] for c in comparison.cells if c.get("provenance")), None)
        if cell is not None:
            context.setdefault("provenance", Provenance.from_dict(cell))
            context["settings"] = context["settings"] or cell["settings"]
    return _ENVIRONMENT.get_template("report.html.j2").render(context)


def _run(
    scores: HeadScores,
    circuit: Circuit,
    effects: HeadEffects | None,
    curve: FaithfulnessCurve | None,
    results: Sequence[TransferResult],
) -> dict[str, Any]:
    """What the sections of discovery, faithfulness and single transfers show."""
    # Ranks and shares cannot stand on one axis with logits.
    shown = effects if scores.unit == "logits" else None
    figures = {
        "heads": head_heatmap(scores, circuit),
        "bars": head_bars(scores, circuit=circuit, effects=shown),
    }
    if circuit.edges:
        figures["graph"] = circuit_graph(circuit)
    if curve is not None:
        # In large models the small circuits, which matter, would all sit at the left edge.
        scale = "log" if curve.n_heads > 100 else "linear"
        figures["faithfulness"] = faithfulness_curve(curve, circuit, scale=scale)
    if any(r.source_change is not None for r in results):
        figures["tradeoff"] = transfer_tradeoff(results)
    if results:
        figures |= _fronts(results)
        figures["training"] = training_curves(results)
    if drifted := [r for r in results if r.heads is not None]:
        figures["drift"] = weight_drift(drifted[0])
    at = curve.at(len(circuit)) if curve is not None and len(circuit) in curve.sizes else None
    return {
        "scores": scores,
        "method": METHODS.get(scores.method, "a rule set of your own"),
        "table": _rows(scores, effects)[:15],
        "circuit": circuit,
        # Of all heads, as the strongest need not be in the circuit.
        "label": {str(h): circuit.label(h) for h in scores.ranking()},
        "effects": effects,
        "total": scores.n_layers * scores.n_heads,
        "curve": curve,
        "at": at,
        "results": results,
        "drifted": drifted[0] if results and drifted else None,
        "strategies": {s.name: s.description for s in STRATEGIES.values()},
        "figures": _embed(figures),
    }


def _looks(
    scores: HeadScores, circuit: Circuit, roles: HeadRoles | None, lens: MarginByLayer | None
) -> dict[str, go.Figure]:
    """What the strongest heads do, and in which layers the answer is made."""
    found = {} if lens is None else {"lens": margin_lens(lens, by_label=len(set(lens.labels)) < 7)}
    if roles is not None:
        known = {role.head for role in roles.roles}
        for head in [head for head in scores.ranking() if head in known][:_CARDS]:
            found[f"card {head}"] = head_card(roles, head, circuit)
    return found


def _explorer(
    scores: HeadScores, circuit: Circuit, effects: HeadEffects | None, roles: HeadRoles | None
) -> dict[str, Any]:
    """What the page's own explorer says of every head, in a form that JSON has."""
    known = {str(role.head): role for role in roles.roles} if roles else {}
    inside = set(map(str, circuit))
    heads = []
    for row in _rows(scores, effects):
        name = str(row["head"])
        entry = {key: row[key] for key in ("rank", "relevance", "low", "high")}
        entry |= {"head": name, "label": circuit.label(Head.parse(name)), "inside": name in inside}
        if effects is not None and row["effect"] is not None:
            entry["effect"] = [row["effect"], row["effect_low"], row["effect_high"]]
        if role := known.get(name):
            entry |= {
                "summary": role.summary,
                "attention": role.attention,
                "raises": role.raises,
            }
        heads.append(entry)
    return {"heads": heads, "prompts": roles.prompts if roles else (), "unit": scores.unit}


def _fronts(results: Comparison | Sequence[TransferResult]) -> dict[str, go.Figure]:
    """Fronts on validation and on test, as far as they are there."""
    cells = cells_of(results)
    found = {}
    # One training at one rate without a way between is a point, and no front.
    if any(len((cell.get("front") or {"points": ()})["points"]) > 2 for cell in cells):
        found["fronts"] = transfer_fronts(results)
    if any(cell.get("test_front") for cell in cells):
        found["fronts-test"] = transfer_fronts(results, split="test")
    return found


def _rows(scores: HeadScores, effects: HeadEffects | None) -> list[dict[Any, Any]]:
    """All heads, the strongest first, with their effects where these were measured."""
    rows = scores.to_frame()
    if effects is not None:
        rows = rows.merge(effects.to_frame(), on="head", how="left")
    return rows.astype(object).where(rows.notna(), None).to_dict("records")


def _comparison(comparison: Comparison) -> dict[str, Any]:
    """What the section of a comparison shows."""
    figures = {"gains": strategy_table(comparison)}
    if any(cell["source_language"] for cell in comparison.cells):
        figures["grid-tradeoff"] = transfer_tradeoff(comparison)
    known = comparison.strategies
    reference = comparison.reference
    figures |= {f"grid-{name}": fig for name, fig in _fronts(comparison).items()}
    if len(known) > 1:
        figures["paired"] = paired_differences(comparison, reference)
    rows = comparison.summary().to_dict("records")
    for row in rows:
        row["all_passes"] = all_passes(row)
    best = {
        language: max(row["gain"] for row in rows if row["language"] == language)
        for language in comparison.languages
    }
    return {
        "cells": len(comparison.cells),
        "languages": comparison.languages,
        "strategies": known,
        "reference": reference,
        "rows": rows,
        "best": best,
        "figures": _embed(figures),
    }


def write_report(path: str | Path, **content: Any) -> Path:
    """Write :func:`render_report` to ``path``, whole or not at all."""
    page = render_report(**content)
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
