"""The model card of a transfer, in the form that the Hugging Face hub reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from circuitlens.evaluation import Evaluation

if TYPE_CHECKING:
    from circuitlens.adapt.result import TransferResult

__all__ = ["model_card"]

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

Adapted with [circuitlens](https://arxiv.org/abs/2601.08146) (CT-SFT): {{ trained }}

## Circuit

{{ circuit }}

## Data

Trained on the training pool of {{ task }}; the learning rate was chosen on its validation split,
and the figures below are from its test split, read once.

## Results

| test split | accuracy before | after | macro-F1 before | after | ECE before | after |
|---|---|---|---|---|---|---|
{{ rows }}

ECE is the expected calibration error of the label probabilities (15 bins).

## Licence

No licence is set here. The adapter is a derivative of the base model and of the training data:
read the licences of both before you publish it.

## Provenance

{{ provenance }}
"""


def model_card(result: TransferResult) -> ModelCard:
    """Write the card of a finished transfer.

    It names the base model, what was trained, the circuit, data, figures and provenance, and says
    that licences follow from the base model and the data.
    """
    origin = result.provenance
    target = f"{origin.task.split('/')[0]}/{result.target_language}"
    measured = [(target, result.target_before, result.target_after)]
    measured += [(r.name, r.before, r.after) for r in result.retained]
    name = f"{origin.model} adapted to {result.target_language} ({result.strategy})"
    data = ModelCardData(
        # The hub knows names, not folders of somebody's machine.
        base_model=None if Path(origin.model).exists() else origin.model,
        library_name="peft" if result.is_adapter else "transformers",
        tags=["circuitlens", "ct-sft", result.strategy],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-classification",
                dataset_type=task,
                dataset_name=task,
                dataset_split="test",
                metric_type="accuracy",
                metric_value=round(after.accuracy, 4),
            )
            for task, _, after in measured
        ],
    )
    heads = result.heads
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=name,
        trained=f"strategy `{result.strategy}`, {result.n_trainable:,} trained entries, learning "
        f"rate {result.learning_rate:g}." + (f" {result.decision.why}" if result.decision else ""),
        circuit=(
            f"{len(heads)} of {heads.n_layers * heads.n_heads} heads ({heads.selection}): "
            + ", ".join(map(str, heads))
            if heads
            else "This strategy is not about heads."
        ),
        task=target,
        rows="\n".join(_row(*entry) for entry in measured),
        provenance="\n".join(
            f"- {key}: {value}" for key, value in origin.to_dict().items() if value is not None
        ),
    )
    return cast(ModelCard, card)


def _row(name: str, before: Evaluation, after: Evaluation) -> str:
    pairs = (
        (before.accuracy, after.accuracy),
        (before.macro_f1, after.macro_f1),
        (before.calibration_error, after.calibration_error),
    )
    cells = [f"{value:.3f}" for pair in pairs for value in pair]
    return f"| {name} | " + " | ".join(cells) + " |"
