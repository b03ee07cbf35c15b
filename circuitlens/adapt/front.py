"""Target gained against source kept: what one training offers, and how a point of it is chosen.

A training ends at one point, but the way there is a whole curve: the trained entries are tried at
W0 + α(W1 - W0), as WiSE-FT does (Wortsman et al. 2022, arXiv 2109.01903), which costs only
evaluation. Every rate and every amount of replay gives such points; those that no other one beats
on both the target and the source are the front.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from circuitlens.adapt.monitors import PREFIX, Watch, measured
from circuitlens.adapt.options import ROUNDING
from circuitlens.adapt.trainable import Trainable
from circuitlens.models.hooked import HookedModel
from circuitlens.tasks import Encoded
from circuitlens.tasks.evaluation import label_scores, summarise

__all__ = ["ALPHAS", "LOSSES", "Front", "FrontPoint", "front_point", "points_between"]

# Shares of the way from the start (0, which is common to all) to the trained entries.
ALPHAS = (0.25, 0.5, 0.75, 1.0)
# Points of source accuracy that tables look at, as shares.
LOSSES = (0.0, 0.01, 0.02, 0.05)


@dataclass(frozen=True)
class FrontPoint:
    """Accuracy on validation splits at one setting.

    Attributes:
        learning_rate, replay: of the training; a rate of 0 is the start, where nothing is trained.
        alpha: share of the way from the start to the trained entries.
        target: accuracy on the target's validation split.
        margin: mean margin there (logit of the right label minus the mean of the others).
        kept: accuracy on the validation split of every task in :attr:`Front.tasks`.
        right: which examples are answered correctly, ``"1"`` or ``"0"`` each: of the target's
            validation split, then of every task's; empty in results from before version 0.2.
        watched: value of every monitor in :attr:`Front.monitors`.
    """

    learning_rate: float
    replay: float
    alpha: float
    target: float
    margin: float
    kept: tuple[float, ...] = ()
    right: tuple[str, ...] = ()
    watched: tuple[float, ...] = ()

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key: the best point on the target is the largest."""
        return self.target, self.margin


@dataclass(frozen=True)
class Front:
    """Points of all trainings of a transfer, on validation splits.

    Attributes:
        tasks: names of the tasks that may be forgotten, ``task/language``; the source is the first.
        points: one for every rate, amount of replay and α; the start is the first.
        ids: of the examples in :attr:`FrontPoint.right`.
        monitors: names of what was watched.
        limits: how much of each of them may be lost; ``None``: any.
    """

    tasks: tuple[str, ...]
    points: tuple[FrontPoint, ...]
    ids: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    monitors: tuple[str, ...] = ()
    limits: tuple[float | None, ...] = ()

    @property
    def start(self) -> FrontPoint:
        """The model before the transfer."""
        return self.points[0]

    def lost(self, point: FrontPoint) -> float:
        """Return the largest loss of accuracy on any of the tasks; negative where all gained."""
        return max((a - b for a, b in zip(self.start.kept, point.kept, strict=True)), default=0.0)

    def keeps(self, point: FrontPoint, keep_source: float) -> bool:
        """Whether a point loses at most ``keep_source`` on every task, and keeps the monitors."""
        return self.lost(point) <= keep_source + ROUNDING and self.within(point)

    def within(self, point: FrontPoint) -> bool:
        """Whether a point loses at most its limit of every monitor."""
        pairs = zip(self.limits, self.start.watched, point.watched, strict=False)
        return all(k is None or before - now <= k + ROUNDING for k, before, now in pairs)

    def choose(self, keep_source: float) -> FrontPoint:
        """Return the best point on the target that :meth:`keeps` the tasks.

        Args:
            keep_source: accuracy that may be lost on every task, as a share: 0.01 is a point.

        Returns:
            The start, if none of the others does better than it.
        """
        return max(
            (point for point in self.points if self.keeps(point, keep_source)),
            key=lambda point: point.rank,
        )

    def non_dominated(self) -> tuple[FrontPoint, ...]:
        """Points that no other one beats, by target accuracy and :meth:`lost`, least lost first."""
        found: list[FrontPoint] = []
        for point in sorted(self.points, key=lambda p: (self.lost(p), -p.target)):
            if not found or point.target > found[-1].target:
                found.append(point)
        return tuple(found)

    def hypervolume(self, most_lost: float = 0.05) -> float:
        """Return the area that the front covers beyond the start.

        It lies above the start's target accuracy, and above the start's source accuracy less
        ``most_lost`` (Zitzler and Thiele 1999, with that corner as the reference point). 0.005 is
        as much as ten points gained on the target at a price of no source accuracy.

        Args:
            most_lost: what is lost beyond this counts for nothing.

        Returns:
            Target gain × source kept, in accuracies (shares) multiplied.
        """
        area, height = 0.0, 0.0
        for point in self.non_dominated():
            gain, room = point.target - self.start.target, most_lost - self.lost(point)
            if gain > height and room > 0:
                area += (gain - height) * room
                height = gain
        return area

    def to_frame(self) -> pd.DataFrame:
        """Return one row per point; ``lost`` is the largest loss, ``on_front`` marks the unbeaten.

        A column ``kept: TASK`` has the accuracy on every task, ``monitor: NAME`` every monitor.
        """
        front = set(self.non_dominated())
        rows = []
        for point in self.points:
            row = {
                "learning_rate": point.learning_rate,
                "replay": point.replay,
                "alpha": point.alpha,
                "target": point.target,
                "lost": self.lost(point),
                "on_front": point in front,
            }
            kept = zip(self.tasks, point.kept, strict=True)
            row |= {f"kept: {task}": accuracy for task, accuracy in kept}
            watched = zip(self.monitors, point.watched, strict=False)
            rows.append(row | {f"{PREFIX}{name}": value for name, value in watched})
        return pd.DataFrame(rows)

    def _repr_html_(self) -> str:
        return str(self.to_frame().to_html(index=False))

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON."""
        points = []
        for point in self.points:
            row = {**asdict(point), "kept": list(point.kept), "right": list(point.right)}
            watched = row.pop("watched")
            points.append(row | ({"watched": list(watched)} if watched else {}))
        found = {"tasks": list(self.tasks), "points": points, "ids": [*map(list, self.ids)]}
        if self.monitors:
            found |= {"monitors": list(self.monitors), "limits": list(self.limits)}
        return found

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Front:
        """Rebuild what :meth:`to_dict` returned."""
        points = [
            {
                **point,
                "kept": tuple(point["kept"]),
                "right": tuple(point.get("right", ())),
                "watched": tuple(point.get("watched", ())),
            }
            for point in content["points"]
        ]
        return cls(
            tuple(content["tasks"]),
            tuple(FrontPoint(**point) for point in points),
            tuple(map(tuple, content.get("ids", ()))),
            tuple(content.get("monitors", ())),
            tuple(content.get("limits", ())),
        )


def front_point(
    model: HookedModel,
    validation: Encoded,
    held: Sequence[Encoded],
    watches: Sequence[Watch] = (),
    *,
    learning_rate: float = 0.0,
    replay: float = 0.0,
    alpha: float = 0.0,
) -> FrontPoint:
    """Measure a model on the validation splits of the target and of what may be forgotten.

    Monitors are measured too.

    Raises:
        NotFiniteError: if it gives logits that are not finite.
    """
    found, right = [], []
    for data in (validation, *held):
        logits, gold = label_scores(model, data), torch.tensor(data.gold)
        found.append(summarise(logits, gold))
        right.append("".join("01"[hit] for hit in (logits.argmax(1) == gold).tolist()))
    target, *kept = found
    return FrontPoint(
        learning_rate,
        replay,
        alpha,
        target.accuracy,
        target.margin,
        tuple(other.accuracy for other in kept),
        tuple(right),
        measured(model, watches),
    )


def points_between(
    trainable: Trainable,
    initial: Mapping[str, Tensor],
    validation: Encoded,
    held: Sequence[Encoded],
    watches: Sequence[Watch] = (),
    *,
    learning_rate: float,
    replay: float,
) -> Iterator[FrontPoint]:
    """Yield the points of one training; ``trainable`` then has the entries of the last one.

    Args:
        trainable: as training left it.
        initial: its entries before.
        validation: of the target.
        held: validation splits of the tasks that may be forgotten; without any only the end of the
            way is of interest.
        watches: monitors; what is on the way is of interest for one with a limit too.
        learning_rate, replay: of the training.

    Raises:
        NotFiniteError: if a model gives logits that are not finite.
    """
    end = trainable.state()
    bound = held or any(watch.keep is not None for watch in watches)
    alphas = ALPHAS if bound and trainable.is_line(initial, end) else (1.0,)
    for alpha in alphas:
        trainable.load(trainable.between(initial, end, alpha))
        yield front_point(
            trainable.model,
            validation,
            held,
            watches,
            learning_rate=learning_rate,
            replay=replay,
            alpha=alpha,
        )
