"""Answers at the decision position: margins, accuracy, macro-F1, and what counts as chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, f1_score
from torch import Tensor

from circuitlens.errors import MODEL, TASK, InputError, NotFiniteError, check_types
from circuitlens.models.hooked import HookedModel
from circuitlens.tasks.encoding import Encoded
from circuitlens.tasks.examples import Example
from circuitlens.tasks.task import Task
from circuitlens.utils.progress import progress

__all__ = [
    "Evaluation",
    "evaluate",
    "label_scores",
    "near_chance",
    "refuse_not_finite",
    "summarise",
]

_BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """How well a model does on some examples.

    Attributes:
        n: number of examples.
        accuracy: share of examples whose right label has the largest logit of all labels.
        macro_f1: F1 score, averaged over the labels that occur, as answers or as right ones.
        margin: mean task margin, in logits.
        calibration_error: expected calibration error of the label probabilities (softmax over
            the labels' scores): mean distance between confidence and accuracy over 15 bins of equal
            width (Guo et al. 2017, arXiv 1706.04599). 0 is calibrated.
        labels: the labels, in order.
        counts: how often each label (column) was answered for examples of each label (row); empty
            in results from before version 0.2.
    """

    n: int
    accuracy: float
    macro_f1: float
    margin: float
    calibration_error: float
    labels: Sequence[str] = ()
    counts: Sequence[Sequence[int]] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        # As they are written: a JSON file makes lists of them.
        object.__setattr__(self, "labels", list(self.labels))
        object.__setattr__(self, "counts", [list(row) for row in self.counts])

    def confusion(self) -> pd.DataFrame:
        """How often each label (column) was answered for examples of each label (row).

        Raises:
            InputError: if it is unknown, as in results from before version 0.2.
        """
        if not self.counts:
            raise InputError(
                "This evaluation is from an older version and does not know which label was "
                "answered how often: evaluate again, cl.evaluate(model, task, …)."
            )
        names = self.labels or [str(n) for n in range(len(self.counts))]
        return pd.DataFrame(
            self.counts,
            index=pd.Index(names, name="right label"),
            columns=pd.Index(names, name="answer"),
        )

    def per_class(self) -> pd.DataFrame:
        """Precision, recall and F1 of every label, and the number of its examples.

        A label that is never answered has the precision 0, as in scikit-learn.

        Raises:
            InputError: as :meth:`confusion`.
        """
        table = self.confusion()
        counts = table.to_numpy()
        right, answered, support = np.diag(counts), counts.sum(0), counts.sum(1)
        precision = right / np.maximum(answered, 1)
        recall = right / np.maximum(support, 1)
        both = np.maximum(precision + recall, np.finfo(float).tiny)
        return pd.DataFrame(
            {
                "precision": precision,
                "recall": recall,
                "f1": 2 * precision * recall / both,
                "examples": support,
            },
            index=pd.Index(table.index, name="label"),
        )

    def _repr_html_(self) -> str:
        head = (
            f"<p><b>Evaluation</b> of {self.n} examples: accuracy {self.accuracy:.1%}, macro-F1 "
            f"{self.macro_f1:.3f}, margin {self.margin:.2f} logits, calibration error "
            f"{self.calibration_error:.3f}</p>"
        )
        if not self.counts:
            return head
        shown = self.per_class().to_html(float_format="{:.3f}".format)
        table = self.confusion().to_html()
        return f"{head}{shown}<p>Answers (columns) by right label (rows):</p>{table}"

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON."""
        return asdict(self)


@torch.no_grad()
def label_scores(
    model: HookedModel, encoded: Encoded, *, batch_size: int = 64, quiet: bool = True
) -> Float[Tensor, "example label"]:
    """Label logits of all examples from the Hugging Face view, in the order given.

    Raises:
        NotFiniteError: if any of them is NaN or infinite, as no accuracy would mean anything.
    """
    found = torch.empty(len(encoded), encoded.readout.n_labels)
    batches = encoded.batches(batch_size, model.device)
    for index, batch in progress(
        batches, "Evaluating", quiet=quiet, total=encoded.n_batches(batch_size)
    ):
        found[index] = model.hf_label_logits(batch).float().cpu()
    refuse_not_finite(model, found)
    return found


def refuse_not_finite(model: HookedModel, labels: Float[Tensor, "example label"]) -> None:
    """Reject label logits of which any is NaN or infinite.

    Raises:
        NotFiniteError: naming the first weight that is not finite, if there is one.
    """
    n_bad = int((~labels.isfinite()).any(1).sum())
    if not n_bad:
        return
    weights = model.hf.named_parameters()
    broken = next((name for name, p in weights if not bool(p.isfinite().all())), None)
    why = "go back to weights that have not diverged."
    if broken is not None:
        why = f"its weight {broken} is not finite, so {why}"
    elif model.dtype == torch.float16:
        why = f"load it in float32, which reaches further than float16, or {why}"
    raise NotFiniteError(
        f"{model.name} ({model.dtype}) gives NaN or infinite logits on {n_bad} of {len(labels)} "
        f"examples: {why}"
    )


def evaluate(
    model: HookedModel,
    task: Task,
    examples: Sequence[Example] | str,
    *,
    batch_size: int = 64,
    quiet: bool = False,
) -> Evaluation:
    """Evaluate a model on examples of a task.

    Args:
        model: the model.
        task: gives prompt and labels.
        examples: what to evaluate on: examples, or the name of a pool of the task, such as
            ``"test"``.
        batch_size: examples per forward pass; the result does not depend on it.
        quiet: no progress bar.

    Raises:
        InputError: if there are no examples, one does not fit the task, or there is no such pool.
    """
    check_types(
        "evaluate",
        model=(model, HookedModel, MODEL),
        task=(task, Task, TASK),
    )
    encoded = task.encode(model, examples)
    return evaluate_encoded(model, encoded, tuple(task.labels), batch_size=batch_size, quiet=quiet)


def evaluate_encoded(
    model: HookedModel,
    data: Encoded,
    labels: Sequence[str] = (),
    *,
    batch_size: int = 64,
    quiet: bool = True,
) -> Evaluation:
    """As :func:`evaluate`, of examples that are encoded already.

    Raises:
        NotFiniteError: as :func:`label_scores`.
    """
    logits = label_scores(model, data, batch_size=batch_size, quiet=quiet)
    return summarise(logits, torch.tensor(data.gold), labels)


def summarise(
    logits: Float[Tensor, "example label"], gold: Tensor, labels: Sequence[str] = ()
) -> Evaluation:
    """Turn label logits and right labels into an :class:`Evaluation`; ``labels`` are names."""
    predicted = logits.argmax(1)
    right = logits.gather(1, gold[:, None])[:, 0]
    margin = right - (logits.sum(1) - right) / (logits.shape[1] - 1)
    # Over the labels that occur: a small test split may lack one.
    macro = f1_score(gold.numpy(), predicted.numpy(), average="macro", zero_division=0.0)
    return Evaluation(
        n=len(gold),
        accuracy=float((predicted == gold).double().mean()),
        macro_f1=float(macro),
        margin=float(margin.double().mean()),
        calibration_error=_calibration_error(logits, gold),
        labels=labels,
        counts=confusion_matrix(
            gold.numpy(), predicted.numpy(), labels=list(range(logits.shape[1]))
        ).tolist(),
    )


def _calibration_error(logits: Float[Tensor, "example label"], gold: Tensor) -> float:
    confidence, predicted = logits.double().softmax(1).max(1)
    right = (predicted == gold).double()
    # A confidence of 1 belongs to the last bin.
    bins = (confidence * _BINS).long().clamp(max=_BINS - 1)
    gap = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, confidence - right)
    return float(gap.abs().sum() / len(gold))


def near_chance(n_correct: int, gold: Sequence[int]) -> tuple[bool, float]:
    """Whether an accuracy could be that of always naming the most frequent label.

    Returns:
        Whether the 95 % Wilson interval of the accuracy reaches down to the share of the most
        frequent label, and that share.
    """
    majority = max(Counter(gold).values()) / len(gold)
    interval = binomtest(n_correct, len(gold)).proportion_ci(0.95, method="wilson")
    return bool(interval.low <= majority), majority
