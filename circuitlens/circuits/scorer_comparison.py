"""Scorers side by side: agreement with exact ablation, faithfulness of their circuits, cost.

What a good ranking is has two answers that need not agree: the order of exact mean ablation of
single heads, and the circuits that keep the task when all other heads are ablated together.
"""

from __future__ import annotations

import html
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata, spearmanr
from torch import Tensor

from circuitlens.baseline import MeanBaseline
from circuitlens.cdt import RuleSet
from circuitlens.circuits.curve import FaithfulnessCurve
from circuitlens.circuits.measure_faithfulness import faithfulness, unseen_examples
from circuitlens.errors import InputError
from circuitlens.models.hooked import HookedModel
from circuitlens.scoring.head_scores import HeadScores, head_count
from circuitlens.scoring.score_heads import relevance
from circuitlens.scoring.scorers import SCORERS, scorer
from circuitlens.tasks import Example, Task
from circuitlens.utils.bootstrap import resampled_means
from circuitlens.utils.peak_memory import PeakMemory
from circuitlens.utils.provenance import Provenance
from circuitlens.utils.storage import read_json, whole, write_json

__all__ = ["ScorerComparison", "compare_scorers"]

logger = logging.getLogger(__name__)

_SCHEMA = "circuitlens.scorers/1"
_DRAWS = 500


@dataclass(frozen=True, eq=False, repr=False)
class ScorerComparison:
    """One row of figures per scorer.

    Attributes:
        table: by scorer: ``spearman`` with exact ablation over heads, with a 95 % bootstrap
            interval over examples (``low``, ``high``); ``overlap``, the share of the top
            ``n_top`` heads that are among ablation's; ``area_f`` and ``area_accuracy``, the areas
            under the faithfulness curve over the share of heads (of several samples the mean, with
            lowest and highest, ``_min`` and ``_max``), and ``of_greedy_f`` and
            ``of_greedy_accuracy``, their share of ``greedy``'s on the same samples;
            ``mlp_spearman`` with its interval, if three or more MLPs were scored; ``forward`` and
            ``backward``, passes of an example that scoring took, counted; ``seconds`` and
            ``peak_mib``. The row
            ``random circuits`` holds areas of circuits drawn at random.
        n_top: number of top heads that ``overlap`` refers to.
        n_examples: examples scored.
        n_held_out: examples that faithfulness was measured on; discovery saw none of them.
        provenance: where it comes from.
        scores: the scores of every scorer, by name, for :func:`circuitlens.view.scorer_agreement`;
            empty if the comparison was loaded.
        curves: faithfulness by each of them, for :func:`circuitlens.view.faithfulness_curve`;
            empty if the comparison was loaded.
    """

    table: pd.DataFrame
    n_top: int
    n_examples: int
    n_held_out: int
    provenance: Provenance
    scores: Mapping[str, HeadScores] = field(default_factory=dict)
    curves: Mapping[str, FaithfulnessCurve] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """Return the table."""
        return self.table

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        # Empty cells are NaN in the table and null in the file.
        rows = self.table.astype(object).where(self.table.notna(), None).to_dict("records")
        content = {
            "rows": rows,
            "n_top": self.n_top,
            "n_examples": self.n_examples,
            "n_held_out": self.n_held_out,
            "provenance": self.provenance.to_dict(),
        }
        write_json(Path(path), _SCHEMA, content, sealed=True)

    @classmethod
    def load(cls, path: str | Path) -> ScorerComparison:
        """Read what :meth:`save` wrote."""
        with whole(path):
            content = read_json(Path(path), _SCHEMA)
            table = pd.DataFrame(content["rows"])
            numbers = [column for column in table.columns if column != "scorer"]
            table[numbers] = table[numbers].astype(float)
            return cls(
                table,
                content["n_top"],
                content["n_examples"],
                content["n_held_out"],
                Provenance.from_dict(content["provenance"]),
            )

    def _title(self) -> str:
        return (
            f"Scorers of {self.provenance.model} on {self.provenance.task}: {self.n_examples} "
            f"examples scored, faithfulness on {self.n_held_out} others, top {self.n_top} heads"
        )

    def print(self, console: Console | None = None) -> None:
        """Show the table on a console."""
        shown = Table(title=self._title(), title_justify="left")
        for column in self.table.columns:
            shown.add_column(column, justify="left" if column == "scorer" else "right")
        for row in self.table.itertuples(index=False):
            shown.add_row(*(_cell(value) for value in row))
        (console or Console()).print(shown)

    def __repr__(self) -> str:
        return f"ScorerComparison({self._title()}; {', '.join(self.table['scorer'])})"

    def _repr_html_(self) -> str:
        table = self.table.to_html(index=False, float_format="{:.3f}".format, na_rep="")
        return f"<p><b>ScorerComparison</b> {html.escape(self._title())}</p>{table}"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.3g}" if abs(value) >= 10 else f"{value:.2f}"
    return str(value)


def compare_scorers(
    model: HookedModel,
    task: Task,
    baseline: MeanBaseline,
    *,
    methods: Sequence[str | RuleSet] | None = None,
    top: int | float = 0.25,
    sizes: Sequence[int | float] | None = None,
    n_random: int = 30,
    mlps: bool = True,
    examples: Sequence[Example] | None = None,
    max_examples: int | None = None,
    samples: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    quiet: bool = False,
) -> ScorerComparison:
    """Compare scorers on one model and task.

    Args:
        model: competent in the task.
        task: the task that the baseline was taken on.
        baseline: means of the nodes; its examples are scored.
        methods: scorers by name, or your own rule sets. The default is all that know the
            model; ``greedy``, the practical upper bound, only up to 64 heads. Exact ablation is
            always among them.
        top: how many top heads (or which share) to compare with ablation's.
        sizes: of the circuits whose faithfulness is measured; as in ``cl.faithfulness``.
        n_random: random circuits of each size.
        mlps: score MLPs too, where the scorer can.
        examples: measure faithfulness on these instead of the held-out ones.
        max_examples: score a random subset of this size.
        samples: how many such subsets, each with its own ranking of every scorer; areas are then
            means over them, with the lowest and the highest.
        batch_size: examples per forward pass.
        seed: for subsets, random circuits and intervals.
        quiet: no progress bar.

    Raises:
        InputError: for an unknown method, two rule sets of one name or one with the name of
            another method, an impossible ``top``, a baseline of another model or task, or
            examples that are none or were used for discovery.
    """
    asked = [*(_default(model, task) if methods is None else methods)]
    chosen = [scorer(m) for m in asked]
    own: dict[str, RuleSet] = {}
    for rules in (m for m in asked if isinstance(m, RuleSet)):
        if own.setdefault(rules.name, rules) != rules:
            raise InputError(
                f"Two different rule sets are named {rules.name!r}, and the table has a row for "
                "each name: rename one of them."
            )
    if not (n_top := head_count(top, len(model.geometry))):
        raise InputError("An overlap of no heads is undefined: let top be at least 1.")
    # Faithfulness would say so too, but only after the first scoring.
    unseen_examples(task, examples, baseline.example_ids)
    names = list(dict.fromkeys(["ablation", *(s.name for s in chosen)]))
    if samples < 1:
        raise InputError(f"samples must be at least 1, but is {samples}.")
    if samples > 1 and max_examples is None:
        raise InputError("Several samples need a size: give max_examples.")
    scores: dict[str, HeadScores] = {}
    curves: dict[str, FaithfulnessCurve] = {}
    costs: dict[str, dict[str, float]] = {}
    areas: dict[str, list[tuple[float, float]]] = {}
    for number, name in enumerate(names):
        method: str | RuleSet = own.get(name, name)
        by = scorer(method)

        def score(with_mlps: bool, sample: int = 0, method: str | RuleSet = method) -> HeadScores:
            return relevance(
                model,
                task,
                baseline,
                method=method,
                mlps=with_mlps,
                max_examples=max_examples,
                batch_size=batch_size,
                seed=seed + sample,
                quiet=quiet,
            )

        def measure(scores: HeadScores, random: int = 0) -> FaithfulnessCurve:
            return faithfulness(
                model,
                task,
                scores,
                baseline,
                sizes=sizes,
                n_random=random,
                examples=examples,
                seed=seed,
                quiet=quiet,
            )

        with PeakMemory(model.device) as memory:
            start = time.perf_counter()
            scores[name] = score(mlps and by.mlps and not by.joint)
            seconds = time.perf_counter() - start
        passes = scores[name].provenance.settings["passes"]
        if mlps and by.mlps and by.joint:
            scores[name] = replace(scores[name], mlps=score(True).mlps)
        costs[name] = {
            "forward": passes["forward"],
            "backward": passes["backward"],
            "seconds": seconds,
            "peak_mib": memory.mib,
        }
        # The same random circuits for every scorer, so they are measured once.
        curves[name] = measure(scores[name], n_random if number == 0 else 0)
        measured = [curves[name]]
        measured += [measure(score(False, sample)) for sample in range(1, samples)]
        areas[name] = [(c.area("faithfulness"), c.area("accuracy")) for c in measured]
        logger.info("%s scored in %.1f s.", name, seconds)
    exact = scores["ablation"]
    best = set(exact.top(n_top))
    rows = []
    for name in names:
        row: dict[str, object] = {"scorer": name}
        row |= _agreement(scores[name], exact, lambda s: s.per_example, "", seed)
        row["overlap"] = len(best & set(scores[name].top(n_top))) / n_top
        if mlps:
            row |= _agreement(scores[name], exact, lambda s: s.mlps, "mlp_", seed)
        rows.append(row | _areas(areas[name], areas.get("greedy")) | costs[name])
    if n_random:
        rows.append(_random_row(curves[names[0]]))
    return ScorerComparison(
        pd.DataFrame(rows),
        n_top,
        len(exact.example_ids),
        len(curves[names[0]].example_ids),
        exact.provenance,
        scores,
        curves,
    )


def _areas(
    own: list[tuple[float, float]], greedy: list[tuple[float, float]] | None
) -> dict[str, float]:
    """Areas over the samples, and their share of ``greedy``'s on the same samples."""
    found: dict[str, float] = {}
    for place, name in enumerate(("f", "accuracy")):
        values = np.array([area[place] for area in own])
        found[f"area_{name}"] = float(values.mean())
        if len(values) > 1:
            found[f"area_{name}_min"] = float(values.min())
            found[f"area_{name}_max"] = float(values.max())
        if greedy is not None:
            best = np.array([area[place] for area in greedy])
            found[f"of_greedy_{name}"] = float((values / best).mean())
    return found


def _default(model: HookedModel, task: Task) -> list[str]:
    """All scorers that know the model and how it answers, and are not too slow for it."""
    readout = task.encode(model, task["validation"][:1]).readout
    return [name for name, by in SCORERS.items() if by.suits(model, readout)]


def _random_row(curve: FaithfulnessCurve) -> dict[str, object]:
    shares = curve.shares
    draws = {"area_f": curve.random_faithfulness, "area_accuracy": curve.random_accuracy}
    areas = {name: float(np.trapezoid(values.mean(0), shares)) for name, values in draws.items()}
    return {"scorer": "random circuits", **areas}


def _agreement(
    scores: HeadScores,
    exact: HeadScores,
    values: Callable[[HeadScores], Float[Tensor, "example *node"] | None],
    prefix: str,
    seed: int,
) -> dict[str, float]:
    """Spearman with exact ablation, and its interval when examples are drawn again."""
    keys = [f"{prefix}spearman", f"{prefix}low", f"{prefix}high"]
    a, b = values(scores), values(exact)
    if a is None or b is None:
        return dict.fromkeys(keys, float("nan"))
    x, y = (v.double().flatten(1).numpy() for v in (a, b))
    if x.shape[1] < 2:
        raise InputError("A rank correlation needs at least two nodes, but the model has one.")
    if prefix and x.shape[1] < 3:
        # Of two MLPs every order is right or wrong.
        return dict.fromkeys(keys, float("nan"))
    # Both are drawn alike. A scorer that says the same of all examples has no spread itself,
    # but ablation has.
    ranks = [rankdata(resampled_means(v.T, seed, _DRAWS), axis=1) for v in (x, y)]
    centred = [r - r.mean(1, keepdims=True) for r in ranks]
    sizes = [np.sqrt((c**2).sum(1)) for c in centred]
    drawn = (centred[0] * centred[1]).sum(1) / (sizes[0] * sizes[1])
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = float(spearmanr(x.mean(0), y.mean(0)).statistic)
    return dict(zip(keys, (value, float(low), float(high)), strict=True))
