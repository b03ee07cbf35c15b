"""What a click in the explorer computes: attention, direct attribution, ablation, faithfulness.

All of it on a bounded sample of held-out examples. What several clicks share is computed once:

* for a language, the clean run of the sample (:mod:`circuitlens.explorer.sampling`);
* for an example, the linear map from the heads' outputs to the logits.

Direct logit attribution takes the way of the ``dla`` scorer: in the linearised network
(:class:`circuitlens.cdt.gradient.LinearisedRun`) every later head and MLP is a constant, so what
is left behind a head is W_O, norms with frozen scales and the unembedding. The scorer takes the
gradient J'v of the margin; here the whole J(z − μ) is wanted, a number for every token of the
vocabulary. As J'v is linear in v, that is the gradient of (z − μ)·J'v by v.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.baseline import MeanBaseline
from circuitlens.cdt import RULES
from circuitlens.cdt.gradient import LinearisedRun
from circuitlens.errors import InputError
from circuitlens.explorer.sampling import Effect, Faithfulness, Sample
from circuitlens.models.batch import Batch, at_least_float32
from circuitlens.models.hooked import HookedModel
from circuitlens.models.hooks import pattern_hook, recording
from circuitlens.nodes import Head
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.scoring.score_heads import relevance
from circuitlens.scoring.scorers import SCORERS
from circuitlens.tasks import Task

__all__ = ["CHEAP_METHODS", "Attribution", "Probe"]

# Scorers that take a forward and a backward pass for all heads together.
CHEAP_METHODS = tuple(s.name for s in SCORERS.values() if s.cheap)

T = TypeVar("T")


class _Recent:
    """The last results of a kind; the oldest goes first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept: OrderedDict[Hashable, object] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self.kept:
            self.kept[key] = make()
            while len(self.kept) > self.limit:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        return self.kept[key]  # type: ignore[return-value]


@dataclass(frozen=True)
class Attribution:
    """What one head adds to the logits at the decision position of one example, directly.

    Attributes:
        labels: by label.
        promoted: tokens with the largest addition, and the addition.
        suppressed: tokens with the smallest, the smallest first.
    """

    labels: dict[str, float]
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]


class _DirectPath:
    """The map from every head's output at the decision position to the logits of one prompt."""

    def __init__(self, model: HookedModel, batch: Batch, baseline: MeanBaseline) -> None:
        # Nodes that pass on constants leave a graph of norms and sums.
        run = LinearisedRun(
            model,
            batch,
            RULES["cdt-linear"],
            mlps=True,
            move=lambda _, output: output.detach(),
            all_logits=True,
        )
        self._logits, self._where = run.labels, batch.mask("decision")
        means = baseline.means(model.device)
        self._leaves, self._deviations = [], []
        for layer in range(model.geometry.n_layers):
            z = run.outputs[model.z_hook(layer)]
            self._leaves.append(run.leaves[model.z_hook(layer)])
            self._deviations.append((z - means.of_heads(layer, z))[self._where])

    def of(self, head: Head) -> Float[Tensor, " d_vocab"]:
        """What the head's deviation from its mean adds to each logit."""
        leaf, deviation = self._leaves[head.layer], self._deviations[head.layer][:, head.index]
        with torch.enable_grad():
            v = torch.zeros_like(self._logits, requires_grad=True)
            (slope,) = torch.autograd.grad(self._logits, leaf, v, create_graph=True)
            # As all statistics, in float32 at least.
            slope = at_least_float32(slope[self._where][:, head.index])
            moved = (slope * at_least_float32(deviation)).sum()
            (added,) = torch.autograd.grad(moved, v, retain_graph=True)
        return at_least_float32(added[0].detach().cpu())


class Probe:
    """Answers the explorer's questions about single heads, examples and circuits.

    Heads are set to the means of ``baseline`` in every language. Results are kept, so the weights
    may not change meanwhile.
    """

    def __init__(
        self,
        model: HookedModel,
        task: Task,
        baseline: MeanBaseline,
        *,
        n_examples: int = 60,
        max_score_examples: int | None = 200,
        seed: int = 0,
        seen: Iterable[str] = (),
    ) -> None:
        """Check that the parts belong together; nothing is run yet.

        Args:
            model: competent in the task.
            task: in the language that the baseline was taken in.
            baseline: means of the heads.
            n_examples: size of the sample in each language.
            max_score_examples: most examples on which :meth:`scores` scores heads.
            seed: of the sample and of bootstrap intervals.
            seen: ids that may not be in a sample, in addition to those of the baseline.

        Raises:
            InputError: if the baseline is of another model or task, or ``n_examples`` is not
                positive.
        """
        if n_examples < 1:
            raise InputError(f"n_examples must be positive, but is {n_examples}.")
        baseline.check_model(model)
        baseline.check_constant("The explorer")
        baseline.check_task(task)
        self.model, self.task, self.baseline = model, task, baseline
        self.n_examples, self.max_score_examples, self.seed = n_examples, max_score_examples, seed
        self.seen = {*seen, *baseline.example_ids}
        source = () if task.source is None else task.source.languages
        self.languages = tuple(dict.fromkeys((task.language, *source)))
        # Samples and direct paths hold many activations, the rest little.
        self._samples, self._paths = _Recent(2), _Recent(1)
        self._patterns, self._effects, self._circuits = _Recent(8), _Recent(4096), _Recent(256)

    def sample(self, language: str) -> Sample:
        """The sample of a language.

        Raises:
            InputError: for an unknown language, or if discovery saw one of the examples.
        """

        def make() -> Sample:
            task = self.task if language == self.task.language else self.task.to(language)
            return Sample(
                self.model,
                task,
                self.baseline,
                n_examples=self.n_examples,
                seed=self.seed,
                seen=self.seen,
            )

        return self._samples.get(language, make)

    def _prompt(self, language: str, example: int) -> Batch:
        sample = self.sample(language)
        if not 0 <= example < len(sample.examples):
            raise InputError(
                f"The sample has {len(sample.examples)} examples, so there is no number {example}."
            )
        return sample.encoded.batch([example], self.model.device)

    def tokens(self, language: str, example: int) -> list[str]:
        """The tokens of a prompt, as text."""
        return self.model.tokens(self._prompt(language, example).input_ids[0].tolist())

    def decision(self, language: str, example: int) -> int:
        """Column at which the answer to a prompt is read."""
        return int(self._prompt(language, example).mask("decision")[0].nonzero()[-1])

    @torch.no_grad()
    def attention(self, language: str, example: int, head: Head) -> Float[Tensor, "query key"]:
        """Attention pattern of a head on an example of the sample."""
        self.model.geometry.check(head)
        batch = self._prompt(language, example)

        def make() -> Tensor:
            hooks, found = recording([pattern_hook(head.layer)])
            self.model.label_logits(batch, hooks)
            return found[pattern_hook(head.layer)][0].float().cpu()

        return self._patterns.get((language, example, head.layer), make)[head.index]

    def added_logits(self, language: str, example: int, head: Head) -> Float[Tensor, " d_vocab"]:
        """Direct logit attribution of a head at the decision position, for every token."""
        self.model.geometry.check(head)
        batch = self._prompt(language, example)
        path = self._paths.get(
            (language, example), lambda: _DirectPath(self.model, batch, self.baseline)
        )
        return path.of(head)

    def attribution(self, language: str, example: int, head: Head, k: int = 8) -> Attribution:
        """Labels and the ``k`` most promoted and suppressed tokens by direct attribution."""
        added = self.added_logits(language, example, head)

        readout = self.sample(language).encoded.readout

        def top(sign: int) -> list[tuple[str, float]]:
            ids = (sign * added).topk(min(k, len(added))).indices.tolist()
            names = readout.output_names(tuple(self.task.labels))
            if names is None:
                # Each by itself: they do not follow each other.
                texts = [self.model.tokens([i])[0] for i in ids]
            else:
                texts = [names[i] for i in ids]
            return list(zip(texts, added[ids].tolist(), strict=True))

        labels = readout.of_labels(added).tolist()
        return Attribution(dict(zip(self.task.labels, labels, strict=True)), top(1), top(-1))

    def effect(self, language: str, head: Head) -> Effect:
        """What mean ablation of one head does on the sample."""
        self.model.geometry.check(head)
        return self._effects.get((language, head), lambda: self.sample(language).effect(head))

    def faithfulness(self, language: str, heads: Iterable[Head]) -> Faithfulness:
        """What a circuit keeps on the sample."""
        chosen = frozenset(map(self.model.geometry.check, heads))
        return self._circuits.get(
            (language, chosen), lambda: self.sample(language).faithfulness(chosen)
        )

    def scores(self, method: str) -> HeadScores:
        """Score all heads by one of :data:`CHEAP_METHODS` on the baseline's examples.

        Raises:
            InputError: for a method that takes longer than a click may.
        """
        if method not in CHEAP_METHODS:
            raise InputError(
                f"The explorer computes only {', '.join(CHEAP_METHODS)} itself: score by "
                f"{method!r} with cl.relevance and pass the result, explore(scores=…)."
            )
        return relevance(
            self.model,
            self.task,
            self.baseline,
            method=method,
            max_examples=self.max_score_examples,
            seed=self.seed,
            quiet=True,
        )
