"""What a run says: ``run.json`` with all numbers, and the report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from circuitlens.adapt import TransferResult
from circuitlens.baseline import MeanBaseline
from circuitlens.circuit import Circuit
from circuitlens.circuits.curve import FaithfulnessCurve
from circuitlens.circuits.effects import HeadEffects
from circuitlens.circuits.lens import MarginByLayer
from circuitlens.circuits.looking import HeadRoles
from circuitlens.experiments import Comparison
from circuitlens.experiments.simple_rivals import simple_rivals
from circuitlens.run_settings import RunSettings
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.tasks import Task
from circuitlens.utils.provenance import library_versions, machine
from circuitlens.view import write_report

__all__ = ["Found", "log_checks", "record_of", "report_of"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """Discovery of a run, as far as it is there."""

    baseline: MeanBaseline
    scores: HeadScores
    circuit: Circuit
    effects: HeadEffects | None
    roles: HeadRoles | None
    lens: MarginByLayer | None
    curve: FaithfulnessCurve | None


def report_of(
    page: Path,
    task: Task,
    settings: RunSettings,
    found: Found,
    results: Sequence[TransferResult],
    *,
    trained: bool,
    comparison: Path | None,
) -> Path:
    """Write the report of what is there.

    Args:
        page: where to.
        task, settings: of the run.
        found: its discovery.
        results: its transfers.
        trained: whether the competence stage trained the model.
        comparison: folder of a comparison, if there is one.
    """
    b = found.baseline
    how = "after fine-tuning on pool A" if trained else "as it was loaded"
    return write_report(
        page,
        title=f"{task.name}: a circuit for {task.language}",
        settings=settings.to_flat(),
        scores=found.scores,
        circuit=found.circuit,
        effects=found.effects,
        roles=found.roles,
        lens=found.lens,
        curve=found.curve,
        results=results,
        rivals=simple_rivals(task, [r.target_language for r in results]),
        comparison=None if comparison is None else Comparison.load(comparison),
        competence=(
            f"The model ({how}) answers {b.accuracy:.1%} of the pool-A examples of "
            f"{b.provenance.task} correctly; discovery uses those."
        ),
    )


def record_of(
    settings: RunSettings,
    found: Found | None,
    results: Sequence[TransferResult] | None,
    *,
    finished: bool,
) -> dict[str, Any]:
    """All numbers that are there, for JSON."""
    record: dict[str, Any] = {
        "finished": finished,
        "settings": asdict(settings),
        "versions": library_versions(),
        "machine": machine(),
    }
    if found is not None:
        origin = found.baseline.provenance
        record["model_fingerprint"] = origin.model_fingerprint
        record["data_fingerprint"] = origin.data_fingerprint
        record["baseline"] = {
            "accuracy": found.baseline.accuracy,
            "n_per_label": found.baseline.n_per_label,
        }
        record["scores"] = found.scores.to_frame().to_dict("records")
        record["circuit"] = found.circuit.to_dict()
        if found.effects is not None:
            record["effects"] = found.effects.to_frame(found.scores).to_dict("records")
        if found.lens is not None:
            record["margin_by_layer"] = found.lens.to_frame().to_dict("records")
        if found.curve is not None:
            table = found.curve.to_frame()
            rows = table.astype(object).where(table.notna(), None).to_dict("records")
            record["faithfulness"] = rows
            record["faithfulness_caveat"] = found.curve.caveat
    if results is not None:
        record["transfers"] = [result.to_dict() for result in results]
    return record


def log_checks(circuit: Circuit, curve: FaithfulnessCurve, effects: HeadEffects) -> None:
    """Report the results of a circuit's checks."""
    at = curve.at(len(circuit))
    logger.info(
        "Faithfulness: the circuit alone keeps f = %.2f (95 %% interval %.2f to %.2f; random "
        "circuits %.2f, layer-matched %.2f) and accuracy %.3f (whole model %.3f).",
        at["faithfulness"],
        at["faithfulness_low"],
        at["faithfulness_high"],
        at["random_faithfulness"],
        at["layer_matched_faithfulness"],
        at["accuracy"],
        curve.accuracy[-1],
    )
    if curve.caveat:
        logger.warning("Faithfulness: %s", curve.caveat)
    if contradicted := effects.contradicted():
        logger.warning(
            "Ablating %s alone does not lower the margin, whatever the relevance says.",
            ", ".join(map(str, contradicted)),
        )
