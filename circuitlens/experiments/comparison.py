"""Comparison: the numbers of a grid of transfers, as tables."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from circuitlens.adapt.front import LOSSES, Front
from circuitlens.errors import InputError
from circuitlens.experiments.costs import COSTS, text_loss_change
from circuitlens.experiments.front_bootstrap import front_values
from circuitlens.experiments.paired import (
    PairedDifference,
    bootstrap_difference,
    differences,
    holm,
    interval_of,
    shared_ids,
)
from circuitlens.experiments.simple_rivals import SIMPLE
from circuitlens.utils.storage import read_json, replacing, whole, write_json
from circuitlens.utils.strangers import for_spreadsheets

__all__ = ["Comparison"]

_SCHEMA = "circuitlens.comparison/1"
_METRICS = ("accuracy", "macro_f1", "margin", "calibration_error")
_TIDY = ("language", "strategy", "seed", "split", "phase", "metric", "value")
_PAIRS = (
    "language",
    "a",
    "b",
    "difference",
    "low",
    "high",
    "p",
    "p_holm",
    "n_examples",
    "n_seeds",
)
_REGRET = ("language", "strategy", "best", "accuracy", "best_accuracy", "regret", "n_seeds")
_FRONTS = (
    "language",
    "strategy",
    "seed",
    "start",
    "hypervolume",
    *(f"target at {100 * x:g}" for x in LOSSES),
)
_ALL = "all languages"


@dataclass(frozen=True)
class Comparison:
    """Transfers by several strategies, to several languages, with several seeds.

    Make one with :func:`circuitlens.compare`.

    Attributes:
        cells: of every finished transfer what :meth:`circuitlens.TransferResult.to_dict` returns,
            with ``seed`` and ``peak_mib`` (peak memory in MiB beyond what was in use before; on
            the CPU an estimate, see :class:`circuitlens.utils.peak_memory.PeakMemory`).
        errors: of every failed one ``language``, ``strategy``, ``seed``, and ``type`` and
            ``message`` of the error.
    """

    cells: tuple[Mapping[str, Any], ...]
    errors: tuple[Mapping[str, Any], ...] = ()

    @property
    def languages(self) -> tuple[str, ...]:
        """Target languages that have a finished cell."""
        return tuple(dict.fromkeys(cell["target_language"] for cell in self.cells))

    @property
    def strategies(self) -> tuple[str, ...]:
        """Strategies that have a finished cell."""
        return tuple(dict.fromkeys(cell["strategy"] for cell in self.cells))

    @property
    def reference(self) -> str:
        """The strategy that others are compared with unless told otherwise."""
        return "circuit" if "circuit" in self.strategies else self.strategies[0]

    def __repr__(self) -> str:
        seeds = len({cell["seed"] for cell in self.cells})
        return (
            f"Comparison({len(self.cells)} transfers: {len(self.languages)} languages, "
            f"{len(self.strategies)} strategies, {seeds} seeds; {len(self.errors)} failed)"
        )

    # -- tables ----------------------------------------------------------------------------

    def to_frame(self) -> pd.DataFrame:
        """Return the tidy long table: one number per row.

        Columns: ``language``, ``strategy``, ``seed``; ``split``, which is ``target`` or the name
        of a retained task; ``phase``, ``before`` or ``after`` the transfer; ``metric``
        (``accuracy``, ``macro_f1`` and ``calibration_error`` as shares, ``margin`` in logits;
        ``text_loss`` of retained tasks, in nats per token); ``value``. Costs
        (``n_trainable`` in entries, ``seconds`` of training, ``passes`` of it and
        ``discovery_passes`` of the baseline and the scores, if the strategy needs a circuit, in
        prompts forward and backward, ``peak_mib`` in MiB) have an empty split and the phase
        ``after``.
        """
        rows: list[tuple[Any, ...]] = []
        for cell in self.cells:
            key = (cell["target_language"], cell["strategy"], cell["seed"])
            measured = [("target", cell["target_before"], cell["target_after"])]
            measured += [(r["name"], r["before"], r["after"]) for r in cell["retained"]]
            for split, before, after in measured:
                for phase, evaluation in (("before", before), ("after", after)):
                    rows += [(*key, split, phase, name, evaluation[name]) for name in _METRICS]
            for kept in cell["retained"]:
                for phase, loss in zip(
                    ("before", "after"), kept.get("text_loss") or (), strict=False
                ):
                    rows.append((*key, kept["name"], phase, "text_loss", loss))
            costs = {name: cell[name] for name in COSTS if cell.get(name) is not None}
            rows += [(*key, "", "after", name, value) for name, value in costs.items()]
        return pd.DataFrame(rows, columns=list(_TIDY)).astype({"seed": int, "value": float})

    def summary(self) -> pd.DataFrame:
        """Return one row per language and strategy, over seeds.

        Accuracies are shares. ``_sd`` is the standard deviation over seeds (divisor n - 1; empty
        with one seed), everything else a mean: ``target_before``, ``target_after``, ``gain``,
        ``source_before``, ``source_after`` (empty without a source task), ``text_loss_change``
        (of the next token on source text, in nats per token), ``n_trainable``,
        ``seconds``, ``passes``, ``discovery_passes``, ``peak_mib``; ``n_seeds`` is their number.
        """
        rows = []
        for cell in self.cells:
            before, after = (cell[f"target_{phase}"]["accuracy"] for phase in ("before", "after"))
            # The source is the first of the retained tasks.
            source = cell["retained"][0] if cell["source_language"] else None
            rows.append(
                {
                    "language": cell["target_language"],
                    "strategy": cell["strategy"],
                    "target_before": before,
                    "target_after": after,
                    "gain": after - before,
                    "source_before": source["before"]["accuracy"] if source else np.nan,
                    "source_after": source["after"]["accuracy"] if source else np.nan,
                    "text_loss_change": text_loss_change(source),
                    **{name: cell.get(name) for name in COSTS},
                }
            )
        keys = ["language", "strategy"]
        numbers = ["target_before", "target_after", "gain", "source_before", "source_after"]
        numbers += ["text_loss_change"]
        frame = pd.DataFrame(rows, columns=[*keys, *numbers, *COSTS])
        # Without any cell the columns have no type of their own.
        groups = frame.astype(dict.fromkeys((*numbers, *COSTS), float)).groupby(keys, sort=False)
        return groups.agg(
            n_seeds=("gain", "size"),
            target_before=("target_before", "mean"),
            target_after=("target_after", "mean"),
            target_after_sd=("target_after", "std"),
            gain=("gain", "mean"),
            source_before=("source_before", "mean"),
            source_after=("source_after", "mean"),
            source_after_sd=("source_after", "std"),
            text_loss_change=("text_loss_change", "mean"),
            **{name: (name, "mean") for name in COSTS},
        ).reset_index()

    # -- statistics ------------------------------------------------------------------------

    def paired(
        self,
        a: str,
        b: str,
        language: str | None = None,
        level: float = 0.95,
        draws: int = 1000,
    ) -> PairedDifference:
        """Compare two strategies on the same test examples and seeds, with a bootstrap interval.

        Args:
            a, b: the strategies; the difference is the target accuracy of ``a`` minus that of
                ``b``.
            language: a target language; by default the mean of the differences of all languages
                in which both have a seed in common, with examples drawn within each language.
            level: of the interval.
            draws: of the bootstrap.

        Raises:
            InputError: for an unknown strategy or language, or if no seed is common.
        """
        for name, known, kind in (
            (a, self.strategies, "strategy"),
            (b, self.strategies, "strategy"),
            (language, self.languages, "language"),
        ):
            if name is not None and name not in known:
                raise InputError(
                    f"The comparison has no finished cell of the {kind} {name!r}; it has "
                    f"{', '.join(known) or 'none'}."
                )
        chosen = self.languages if language is None else (language,)
        values, counts = [], []
        ids: list[list[str] | None] = []
        for name in chosen:
            first, second = self._right(a, name), self._right(b, name)
            if seeds := [seed for seed in first if seed in second]:
                rows = (np.array([side[s] for s in seeds], dtype=bool) for side in (first, second))
                values.append(differences(*rows))
                counts.append(len(seeds))
                ids.append(self._ids(name))
        if not values:
            raise InputError(
                f"{a} and {b} have no seed in common in {language or 'any language'}: compare them "
                "with the same seeds."
            )
        difference, low, high, p = bootstrap_difference(values, level, draws, ids)
        return PairedDifference(
            a=a,
            b=b,
            language=language,
            difference=difference,
            low=low,
            high=high,
            level=level,
            p=p,
            n_examples=sum(map(len, values)),
            n_seeds=min(counts),
            n_languages=len(values),
            n_shared=shared_ids(ids),
        )

    def fronts(self) -> pd.DataFrame:
        """Return what every transfer offers on validation, whichever point of it was chosen.

        Returns:
            One row per cell with a front: ``language``, ``strategy``, ``seed``, ``start`` (target
            accuracy before), ``hypervolume`` (:meth:`circuitlens.adapt.Front.hypervolume`), and
            ``target at 0``, ``1``, ``2`` and ``5`` points: the best target accuracy at which no
            task to keep loses more. These are maxima over rates and α on the data that they are
            measured on, so they flatter all strategies a little, most of all those with more
            trainings.
        """
        rows = []
        for cell in self.cells:
            if not cell.get("front"):
                continue
            front = Front.from_dict(cell["front"])
            row = {
                "language": cell["target_language"],
                "strategy": cell["strategy"],
                "seed": cell["seed"],
                "start": front.start.target,
                "hypervolume": front.hypervolume(),
            }
            row |= {f"target at {100 * x:g}": front.choose(x).target for x in LOSSES}
            rows.append(row)
        return pd.DataFrame(rows, columns=_FRONTS)

    def paired_fronts(
        self,
        a: str,
        b: str,
        language: str | None = None,
        *,
        keep_source: float | None = 0.01,
        level: float = 0.95,
        draws: int = 500,
    ) -> PairedDifference:
        """Compare what two strategies offer on validation, whichever points were chosen.

        Args:
            a, b: the strategies.
            language: a target language; by default the mean over all in which both have a seed in
                common.
            keep_source: compare the best target accuracy of the points that lose at most this on
                every task to keep, as a share; ``None`` compares hypervolumes.
            level: of the interval.
            draws: of the bootstrap over validation sentences
                (:mod:`circuitlens.experiments.front_bootstrap`).

        Raises:
            InputError: if no seed is common, or fronts do not say which examples are right.
        """
        chosen = self.languages if language is None else (language,)
        sides: tuple[dict[str, list[Front]], dict[str, list[Front]]] = ({}, {})
        counts = []
        for name in chosen:
            first, second = self._fronts_of(a, name), self._fronts_of(b, name)
            if seeds := [seed for seed in first if seed in second]:
                for side, found in zip(sides, (first, second), strict=True):
                    side[name] = [found[seed] for seed in seeds]
                counts.append(len(seeds))
        if not counts:
            raise InputError(
                f"{a} and {b} have no front of a common seed in {language or 'any language'}."
            )
        values = [front_values(side, draws, keep_source) for side in sides]
        difference, *drawn = values[0] - values[1]
        low, high, p = interval_of(np.array(drawn), level)
        ids = [front[0].ids[0] for front in sides[0].values()]
        return PairedDifference(
            a=a,
            b=b,
            language=language,
            difference=float(difference),
            low=low,
            high=high,
            level=level,
            p=p,
            n_examples=sum(map(len, ids)),
            n_seeds=min(counts),
            n_languages=len(counts),
            n_shared=shared_ids(ids),
        )

    def _fronts_of(self, strategy: str, language: str) -> dict[int, Front]:
        return {
            cell["seed"]: Front.from_dict(cell["front"])
            for cell in self.cells
            if (cell["strategy"], cell["target_language"]) == (strategy, language)
            and cell.get("front")
        }

    def regret(self, strategy: str = "auto") -> pd.DataFrame:
        """Return how far a strategy falls behind the best single one, chosen on the test split.

        One row per language: ``best`` is the other strategy (no simple rival) with the highest mean
        target accuracy over the seeds that both have, ``accuracy`` and ``best_accuracy`` are those
        means (shares), ``regret`` their difference; negative if ``strategy`` is ahead. As
        the best is chosen on test, regret is overstated by what chance gives the luckiest.

        Raises:
            InputError: if the strategy has no finished cell.
        """
        if strategy not in self.strategies:
            raise InputError(
                f"The comparison has no finished cell of the strategy {strategy!r}; it has "
                f"{', '.join(self.strategies) or 'none'}."
            )
        rows = []
        for language in self.languages:
            mine = self._right(strategy, language)
            found: list[tuple[float, float, str, int]] = []
            for other in self.strategies:
                theirs = self._right(other, language)
                seeds = [seed for seed in mine if seed in theirs]
                if seeds and other not in (strategy, *SIMPLE):
                    best, own = (
                        float(np.mean([side[seed] for seed in seeds])) for side in (theirs, mine)
                    )
                    found.append((best, own, other, len(seeds)))
            if found:
                # Of equally good ones the first in the order of the strategies.
                best, own, name, n = max(found, key=lambda row: row[0])
                rows.append((language, strategy, name, own, best, best - own, n))
        return pd.DataFrame(rows, columns=list(_REGRET))

    def _ids(self, language: str) -> list[str] | None:
        """Ids of a language's test examples, if all cells have the same."""
        found = [c.get("target_ids") for c in self.cells if c["target_language"] == language]
        return found[0] if found and all(ids == found[0] for ids in found) else None

    def _right(self, strategy: str, language: str) -> dict[int, list[int]]:
        """Which test examples are answered correctly, by seed."""
        return {
            cell["seed"]: cell["target_right"]
            for cell in self.cells
            if (cell["strategy"], cell["target_language"]) == (strategy, language)
        }

    def pairs(self, reference: str = "circuit") -> pd.DataFrame:
        """Return :meth:`paired` of a strategy with every other one.

        One row for each language, and one for the mean over all of them, whose ``language`` is
        ``all languages``. Pairs without a common seed are left out. ``p_holm`` is corrected for the
        pairs of the table (Holm 1979): those of single languages are one family, and those over all
        languages another.

        Raises:
            InputError: if the reference has no finished cell.
        """
        others = [name for name in self.strategies if name != reference]
        if len(others) == len(self.strategies):
            raise InputError(
                f"The comparison has no finished cell of the strategy {reference!r}; it has "
                f"{', '.join(self.strategies) or 'none'}: name another reference."
            )
        rows = []
        for language in (*self.languages, None):
            where = self.languages if language is None else (language,)
            for other in others:
                if any(self._right(reference, n).keys() & self._right(other, n) for n in where):
                    row = asdict(self.paired(reference, other, language))
                    rows.append({**row, "language": language or _ALL})
        frame = pd.DataFrame(rows, columns=list(_PAIRS))
        for family in (frame["language"] == _ALL, frame["language"] != _ALL):
            frame.loc[family, "p_holm"] = holm(frame.loc[family, "p"].tolist())
        return frame.astype({"p_holm": float})

    # -- files -----------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write ``table.csv``, ``summary.csv`` and ``comparison.json``."""
        folder = Path(folder)
        table = self.to_frame()
        for name, frame in (("table.csv", table), ("summary.csv", self.summary())):
            with replacing(folder / name) as temporary:
                for_spreadsheets(frame).to_csv(temporary, index=False)
        content = {"cells": list(self.cells), "errors": list(self.errors)}
        write_json(folder / "comparison.json", _SCHEMA, content, compact=True, sealed=True)

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: if the folder contains no saved comparison.
        """
        with whole(folder):
            content = read_json(Path(folder) / "comparison.json", _SCHEMA)
            return cls(tuple(content["cells"]), tuple(content["errors"]))

    def _repr_html_(self) -> str:
        table = self.summary().to_html(index=False, float_format="{:.3f}".format, na_rep="")
        failed = "".join(
            "<li>"
            + html.escape(
                f"{e['language']}, {e['strategy']}, seed {e['seed']}: {e['type']}: {e['message']}"
            )
            + "</li>"
            for e in self.errors
        )
        note = f"<p>{len(self.errors)} failed:</p><ul>{failed}</ul>" if failed else ""
        return f"<p><b>Comparison</b> of {len(self.cells)} transfers</p>{table}{note}"
