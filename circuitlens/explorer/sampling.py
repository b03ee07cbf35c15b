"""A bounded sample of held-out examples: what mean ablation of heads does to it, quickly.

The clean run of the sample is kept, and ablated runs begin with it
(:class:`circuitlens.cdt.ablation.PrefixCache`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.baseline import MeanBaseline
from circuitlens.cdt.ablation import PrefixCache, ablated_label_logits, head_mask
from circuitlens.circuits.curve import caveat_of, normalised, ratio_interval
from circuitlens.circuits.measure_faithfulness import refuse_seen
from circuitlens.errors import InputError
from circuitlens.models.batch import Batch, margin
from circuitlens.models.hooked import HookedModel
from circuitlens.nodes import Head
from circuitlens.tasks import Encoded, Example, Task
from circuitlens.utils.bootstrap import percentiles, resampled_means
from circuitlens.utils.row_budget import RowBudget
from circuitlens.utils.storage import digest

__all__ = ["Effect", "Faithfulness", "Sample"]

# The clean run of a sample is kept up to this size; a larger one is made again for every click.
_PREFIX_BYTES = 1 << 29
# Examples that are padded to one width.
_BATCH = 20


@dataclass(frozen=True)
class Effect:
    """Mean ablation of one head on the sample.

    Attributes:
        n: examples.
        accuracy, margin: of the whole model.
        ablated_accuracy, ablated_margin: with the head at its mean.
        interval: 95 % bootstrap interval of the change of the margin.
    """

    n: int
    accuracy: float
    margin: float
    ablated_accuracy: float
    ablated_margin: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Faithfulness:
    """A circuit alone, all other heads mean-ablated, on the sample.

    Attributes:
        n: examples.
        f: normalised margin (:mod:`circuitlens.circuits.curve`).
        interval: its 95 % bootstrap interval; ``None`` where it has no bounds.
        accuracy: of the circuit.
        full_accuracy, empty_accuracy: of the whole model and of the one without any head.
    """

    n: int
    f: float
    interval: tuple[float, float] | None
    accuracy: float
    full_accuracy: float
    empty_accuracy: float


class Sample:
    """Held-out examples of one language, and their clean run.

    Attributes:
        examples: in an order that depends on their ids only, so that the samples of two languages
            of a parallel corpus hold the same sentences.
        n_held_out: how many there are to choose from.
    """

    def __init__(
        self,
        model: HookedModel,
        task: Task,
        baseline: MeanBaseline,
        *,
        n_examples: int,
        seed: int,
        seen: Collection[str],
    ) -> None:
        self.task = task
        self.n_held_out = len(task.held_out)
        ordered = sorted(task.held_out, key=lambda e: digest(str(seed), e.id))
        self.examples: tuple[Example, ...] = tuple(ordered[:n_examples])
        refuse_seen(self.examples, seen)
        self.encoded: Encoded = task.encode(model, self.examples)
        self._model, self._baseline, self._seed = model, baseline, seed
        self._rows = RowBudget(256)
        self._means = baseline.means(model.device)
        self._batches = list(self.encoded.batches(_BATCH, model.device))
        g = model.geometry
        tokens = sum(batch.input_ids.numel() for _, batch in self._batches)
        size = tokens * g.n_layers * g.d_model * model.dtype.itemsize
        self._prefixes = [self._capture(batch) for _, batch in self._batches]
        self.clean = self._gather([prefix.labels for prefix in self._prefixes])
        if size > _PREFIX_BYTES:
            self._prefixes = []

    def _capture(self, batch: Batch) -> PrefixCache:
        return PrefixCache.capture(self._model, batch, rows=self._rows)

    def _gather(self, parts: Sequence[Float[Tensor, "_ label"]]) -> Float[Tensor, "example label"]:
        """Label logits of the batches in the order of the examples."""
        order = torch.cat([index for index, _ in self._batches])
        return torch.cat([part.cpu().double() for part in parts])[order.argsort()]

    def kept(self, heads: Iterable[Head]) -> Float[Tensor, "example label"]:
        """Label logits with all heads but these at their means."""
        g = self._model.geometry
        keeps = head_mask(heads, g.n_layers, g.n_heads)[None]
        parts = []
        for number, (_, batch) in enumerate(self._batches):
            prefix = self._prefixes[number] if self._prefixes else self._capture(batch)
            labels = ablated_label_logits(
                self._model,
                batch,
                keeps,
                self._means,
                self._baseline.positions,
                prefix=prefix,
                rows=self._rows,
            )
            parts.append(labels[0])
        return self._gather(parts)

    @cached_property
    def _empty(self) -> Float[Tensor, "example label"]:
        return self.kept(())

    def _margins(self, labels: Float[Tensor, "example label"]) -> Float[np.ndarray, " example"]:
        return np.asarray(margin(labels, torch.tensor(self.encoded.gold)).numpy())

    def _accuracy(self, labels: Float[Tensor, "example label"]) -> float:
        return float((labels.argmax(-1) == torch.tensor(self.encoded.gold)).double().mean())

    def effect(self, head: Head) -> Effect:
        """Ablate one head."""
        ablated = self.kept(h for h in self._model.geometry if h != head)
        before, after = self._margins(self.clean), self._margins(ablated)
        low, high = percentiles(resampled_means((after - before)[None], self._seed), 0.95)[:, 0]
        return Effect(
            n=len(self.examples),
            accuracy=self._accuracy(self.clean),
            margin=float(before.mean()),
            ablated_accuracy=self._accuracy(ablated),
            ablated_margin=float(after.mean()),
            interval=(float(low), float(high)),
        )

    def faithfulness(self, heads: Iterable[Head]) -> Faithfulness:
        """Measure the circuit of these heads.

        Raises:
            InputError: if the whole model is no better than without heads: f has no meaning.
        """
        circuit = self.kept(heads)
        rows = np.stack([self._margins(x) for x in (self._empty, self.clean, circuit)])
        empty, full, mean = rows.mean(1)
        drawn = resampled_means(rows, self._seed)
        denominators = drawn[:, 1] - drawn[:, 0]
        if caveat := caveat_of(empty, full):
            raise InputError(caveat)
        f = normalised(np.array([mean]), empty, full)[0]
        low, high = ratio_interval(drawn[:, 2:3] - drawn[:, 0:1], denominators, 0.95)[:, 0]
        return Faithfulness(
            n=len(self.examples),
            f=float(f),
            interval=None if np.isnan(low) else (float(low), float(high)),
            accuracy=self._accuracy(circuit),
            full_accuracy=self._accuracy(self.clean),
            empty_accuracy=self._accuracy(self._empty),
        )
