"""Stage 6, transfer: train a few heads on a little data of the target language.

For each learning rate the proxy's weights are trained on pool B of the target language; the rate
with the best accuracy on the target's validation split is kept; then, once, target and source are
measured on their test splits.
"""

from __future__ import annotations

import html
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from circuitlens.adapt.strategies import choose_heads, trainable_masks
from circuitlens.adapt.training import TrainingLog, TrainingOptions, train
from circuitlens.circuit import Circuit
from circuitlens.errors import InputError
from circuitlens.evaluation import Evaluation, evaluate
from circuitlens.model import HookedModel
from circuitlens.progress import progress
from circuitlens.provenance import Provenance
from circuitlens.scores import HeadScores
from circuitlens.storage import read_json, read_tensors, write_json, write_tensors
from circuitlens.tasks import Task

__all__ = ["DEFAULT_RATES", "TransferResult", "transfer"]

logger = logging.getLogger(__name__)

_SCHEMA = "circuitlens.transfer/1"
_WEIGHTS_SCHEMA = "circuitlens.weights/1"
DEFAULT_RATES = (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class TransferResult:
    """What a transfer gained and what it cost.

    Attributes:
        strategy: which weights were trained.
        heads: the heads among them, if it was about heads.
        target_language, source_language: where it was measured; ``None`` without source task.
        target_before, target_after: on the target's test split.
        source_before, source_after: on the source's test split (retention).
        n_trainable: trained entries.
        learning_rate: the rate chosen on the target's validation split.
        validation: best validation accuracy for every rate tried.
        history: validation after each epoch, at the chosen rate.
        seconds: training time, all rates together.
        provenance: of the model before the transfer.
        model: the adapted model; ``None`` if only the numbers were loaded.
    """

    strategy: str
    heads: Circuit | None
    target_language: str
    source_language: str | None
    target_before: Evaluation
    target_after: Evaluation
    source_before: Evaluation | None
    source_after: Evaluation | None
    n_trainable: int
    learning_rate: float
    validation: dict[float, float]
    history: tuple[dict[str, float], ...]
    seconds: float
    provenance: Provenance
    model: HookedModel | None = field(default=None, repr=False, compare=False)

    @property
    def target_gain(self) -> float:
        """Target accuracy after minus before."""
        return self.target_after.accuracy - self.target_before.accuracy

    @property
    def source_change(self) -> float | None:
        """Source accuracy after minus before; negative means forgotten."""
        if self.source_before is None or self.source_after is None:
            return None
        return self.source_after.accuracy - self.source_before.accuracy

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON (without the model)."""
        evaluations = {
            name: None if (value := getattr(self, name)) is None else value.to_dict()
            for name in ("target_before", "target_after", "source_before", "source_after")
        }
        return {
            "strategy": self.strategy,
            "heads": self.heads.to_dict() if self.heads else None,
            "target_language": self.target_language,
            "source_language": self.source_language,
            **evaluations,
            "n_trainable": self.n_trainable,
            "learning_rate": self.learning_rate,
            "validation": [[rate, accuracy] for rate, accuracy in self.validation.items()],
            "history": list(self.history),
            "seconds": self.seconds,
            "provenance": self.provenance.to_dict(),
        }

    def to_frame(self) -> pd.DataFrame:
        """Return one row with the main numbers."""
        before, after = self.source_before, self.source_after
        row = {
            "strategy": self.strategy,
            "target": self.target_language,
            "target_accuracy_before": self.target_before.accuracy,
            "target_accuracy": self.target_after.accuracy,
            "target_macro_f1_before": self.target_before.macro_f1,
            "target_macro_f1": self.target_after.macro_f1,
            "source_accuracy_before": before.accuracy if before else None,
            "source_accuracy": after.accuracy if after else None,
            "n_trainable": self.n_trainable,
            "learning_rate": self.learning_rate,
            "seconds": self.seconds,
        }
        return pd.DataFrame([row])

    def save(self, folder: str | Path) -> None:
        """Write ``result.json`` and ``weights.safetensors`` (the trained entries only).

        Raises:
            InputError: if the result was loaded without its model.
        """
        if self.model is None:
            raise InputError(
                "This result was loaded without its model, so it has no weights to save: "
                "give TransferResult.load the model that the transfer began from."
            )
        folder = Path(folder)
        masks = trainable_masks(self.model, self.strategy, self.heads)
        parameters = dict(self.model.hf.named_parameters())
        entries = {name: parameters[name].detach()[mask] for name, mask in masks.items()}
        meta = {"base": self.provenance.model_fingerprint, "strategy": self.strategy}
        write_tensors(folder / "weights.safetensors", _WEIGHTS_SCHEMA, entries, meta)
        # Last, so that a folder with a result is a whole one.
        write_json(folder / "result.json", _SCHEMA, self.to_dict())

    @classmethod
    def load(cls, folder: str | Path, model: HookedModel | None = None) -> TransferResult:
        """Read what :meth:`save` wrote.

        Args:
            folder: the folder.
            model: the model that the transfer began from, which is copied to adapt it; without
                it only the numbers are loaded.

        Raises:
            InputError: if ``model`` has other weights than that one.
        """
        content = read_json(Path(folder) / "result.json", _SCHEMA)
        heads = Circuit.from_dict(content["heads"]) if content["heads"] else None
        adapted = None
        if model is not None:
            entries, meta = read_tensors(Path(folder) / "weights.safetensors", _WEIGHTS_SCHEMA)
            if model.fingerprint() != meta["base"]:
                raise InputError(
                    f"{folder} was trained from other weights than those of {model.name}: load "
                    "it with the model that the transfer began from."
                )
            adapted = model.clone()
            masks = trainable_masks(adapted, content["strategy"], heads)
            _set(adapted, {n: e.to(model.device) for n, e in entries.items()}, masks)
        evaluations = {
            name: Evaluation(**content[name]) if content[name] else None
            for name in ("source_before", "source_after")
        }
        return cls(
            strategy=content["strategy"],
            heads=heads,
            target_language=content["target_language"],
            source_language=content["source_language"],
            target_before=Evaluation(**content["target_before"]),
            target_after=Evaluation(**content["target_after"]),
            **evaluations,
            n_trainable=content["n_trainable"],
            learning_rate=content["learning_rate"],
            validation={rate: accuracy for rate, accuracy in content["validation"]},  # noqa: C416
            history=tuple(content["history"]),
            seconds=content["seconds"],
            provenance=Provenance.from_dict(content["provenance"]),
            model=adapted,
        )

    def _repr_html_(self) -> str:
        table = self.to_frame().T.to_html(header=False)
        return f"<p><b>TransferResult</b> {html.escape(self.strategy)}</p>{table}"


def transfer(
    model: HookedModel,
    circuit: Circuit,
    task: Task,
    *,
    strategy: str = "circuit",
    scores: HeadScores | None = None,
    source: Task | None = None,
    learning_rates: Sequence[float] = DEFAULT_RATES,
    epochs: int = 10,
    batch_size: int = 16,
    weight_decay: float = 0.0,
    patience: int = 10,
    seed: int = 0,
    quiet: bool = False,
) -> TransferResult:
    """Adapt a competent model to a target language by training a part of its weights.

    Args:
        model: the proxy, competent in the source language; left as it is.
        circuit: the heads to train; the strategies ``near-zero`` and ``random`` take its size.
        task: the task in the target language, usually ``source_task.to(language)``.
        strategy: one of :data:`circuitlens.adapt.strategies.STRATEGIES`.
        scores: needed by ``near-zero`` and ``random``.
        source: where retention is measured; by default the task that ``task`` was made from.
        learning_rates: tried in turn; the best on the target's validation split is kept. The
            default suits models of a few million parameters; large ones want 1e-5 to 3e-4.
        epochs, batch_size, weight_decay, patience: see
            :class:`circuitlens.adapt.training.TrainingOptions`.
        seed: for everything random.
        quiet: no progress bar.

    Raises:
        InputError: for an unknown strategy, missing scores, or a circuit of another model.
    """
    heads = choose_heads(strategy, circuit, scores, seed)
    if (circuit.n_layers, circuit.n_heads) != (model.geometry.n_layers, model.geometry.n_heads):
        raise InputError(
            f"The circuit is of a model with {circuit.n_layers} × {circuit.n_heads} heads, but "
            f"{model.name} has {model.geometry.n_layers} × {model.geometry.n_heads}."
        )
    if not learning_rates:
        raise InputError("Give at least one learning rate.")
    options = [
        TrainingOptions(
            learning_rate=rate,
            epochs=epochs,
            batch_size=batch_size,
            weight_decay=weight_decay,
            patience=patience,
            seed=seed,
        )
        for rate in dict.fromkeys(learning_rates)
    ]
    source = source or task.origin
    data = task.encode(model, task["pool_b"])
    validation = task.encode(model, task["validation"])
    target_before = evaluate(model, task, task["test"], quiet=quiet)
    source_before = evaluate(model, source, source["test"], quiet=quiet) if source else None

    adapted = model.clone()
    masks = trainable_masks(adapted, strategy, heads)
    start = time.perf_counter()
    tried: list[tuple[TrainingLog, float]] = []
    best: dict[str, Tensor] = {}
    label = f"Transfer to {task.language} ({strategy})"
    for option in progress(options, label, quiet=quiet):
        _set(adapted, _entries(model, masks), masks)
        log = train(adapted, data, validation, option, masks=masks, quiet=True)
        if not tried or _score(log) > max(_score(earlier) for earlier, _ in tried):
            best = _entries(adapted, masks)
        tried.append((log, option.learning_rate))
    seconds = time.perf_counter() - start
    _set(adapted, best, masks)
    log, rate = max(tried, key=lambda pair: _score(pair[0]))

    target_after = evaluate(adapted, task, task["test"], quiet=quiet)
    source_after = evaluate(adapted, source, source["test"], quiet=quiet) if source else None
    logger.info(
        "%s: %s test accuracy %.3f -> %.3f at rate %g.",
        strategy,
        task.language,
        target_before.accuracy,
        target_after.accuracy,
        rate,
    )
    settings = {**options[0].to_dict(), "learning_rate": list(learning_rates)}
    return TransferResult(
        strategy=strategy,
        heads=heads,
        target_language=task.language,
        source_language=source.language if source else None,
        target_before=target_before,
        target_after=target_after,
        source_before=source_before,
        source_after=source_after,
        n_trainable=sum(int(mask.sum()) for mask in masks.values()),
        learning_rate=rate,
        validation={rate: log.best["accuracy"] for log, rate in tried},
        history=log.history,
        seconds=seconds,
        provenance=Provenance(
            model.name,
            model.fingerprint(),
            f"{task.name}/{task.language}",
            task.fingerprint(),
            seed,
            settings,
        ),
        model=adapted,
    )


def _score(log: TrainingLog) -> tuple[float, float]:
    return log.best["accuracy"], log.best["margin"]


def _entries(model: HookedModel, masks: Mapping[str, Bool[Tensor, "..."]]) -> dict[str, Tensor]:
    parameters = dict(model.hf.named_parameters())
    return {name: parameters[name].detach()[mask] for name, mask in masks.items()}


@torch.no_grad()
def _set(
    model: HookedModel,
    entries: Mapping[str, Tensor],
    masks: Mapping[str, Bool[Tensor, "..."]],
) -> None:
    parameters = dict(model.hf.named_parameters())
    for name, values in entries.items():
        parameters[name][masks[name]] = values
