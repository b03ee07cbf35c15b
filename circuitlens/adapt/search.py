"""The trainings of one strategy: every rate and amount of replay, and the best point of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from circuitlens.adapt.choice import Choice
from circuitlens.adapt.front import Front, FrontPoint, front_point, points_between
from circuitlens.adapt.monitors import Watch
from circuitlens.adapt.options import TrainingLog, TrainingOptions
from circuitlens.adapt.stages import train_in_stages
from circuitlens.adapt.strategies import Strategy
from circuitlens.adapt.trainable import Trainable
from circuitlens.circuit import Circuit
from circuitlens.errors import NotFiniteError
from circuitlens.models.hooked import HookedModel
from circuitlens.models.prompt import Prompt
from circuitlens.tasks import Encoded
from circuitlens.utils.progress import progress

__all__ = ["Found", "Search", "search"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Search:
    """What all strategies of a transfer have in common.

    Attributes:
        stages: training data of each stage, for every amount of replay.
        validation: of the target.
        held: validation splits of the tasks that may be forgotten.
        tasks: their names.
        tries: options for every rate.
        keep_source: accuracy that may be lost on them, as a share; ``None``: any.
        checkpoints: folder of the states of trainings.
        quiet: no progress bar.
        prompt: what the model is trained to answer.
        test: test splits of the target and of ``tasks``, on which the front is measured once it is
            there. Nothing is chosen by them.
        watches: monitors, measured after every epoch and at every point.
    """

    stages: Mapping[float, Sequence[Encoded]]
    validation: Encoded
    held: Sequence[Encoded]
    tasks: tuple[str, ...]
    tries: Sequence[TrainingOptions]
    keep_source: float | None
    checkpoints: Path | None
    quiet: bool
    prompt: Prompt | None = None
    test: Sequence[Encoded] = ()
    watches: Sequence[Watch] = ()


@dataclass(frozen=True)
class Found:
    """What the trainings of a strategy gave; the trainable has the entries of the chosen point.

    Attributes:
        heads: that were trained, if it was about heads.
        trainable: with the entries of the chosen point; ``None`` once it is on disk.
        n_entries: number of trained entries.
        front: all points.
        chosen: the best of them on the target, among those that keep the source if that was asked
            for; the start, if none does better.
        logs: by rate and amount of replay, but for those that diverged.
        seconds: of choosing what is trained and of training.
        test_front: the points that no other one beats on validation, on test.
    """

    heads: Circuit | None
    trainable: Trainable | None
    n_entries: int
    front: Front
    chosen: FrontPoint
    logs: Mapping[tuple[float, float], TrainingLog]
    seconds: float
    test_front: Front | None = None


def search(model: HookedModel, how: Strategy, choice: Choice, given: Search, label: str) -> Found:
    """Train at every rate and amount of replay, and choose on validation.

    Args:
        model: is left as it is.
        how: the strategy.
        choice: what it may choose from.
        given: what all strategies have in common.
        label: of the progress bar and of messages.

    Raises:
        NotFiniteError: if every training diverges.
    """
    began = time.perf_counter()
    heads = how.choose(model, choice)
    trainable = how.make(model, choice, heads)
    # What is trained may take looking at data, or a training, to know.
    seconds = time.perf_counter() - began
    trainable.model.prompt = given.prompt
    initial = trainable.state()
    start = front_point(trainable.model, given.validation, given.held, given.watches)
    watches = [w.after(v) for w, v in zip(given.watches, start.watched, strict=True)]
    ids = tuple(tuple(encoded.ids) for encoded in (given.validation, *given.held))
    names, limits = tuple(w.name for w in watches), tuple(w.keep for w in watches)
    front = Front(given.tasks, (start,), ids, names, limits)
    chosen, best = start, initial
    logs: dict[tuple[float, float], TrainingLog] = {}
    ends: dict[tuple[float, float], Mapping[str, Tensor]] = {}
    both = [(option, mix) for mix in given.stages for option in given.tries]
    for option, mix in progress(both, label, quiet=given.quiet):
        trainable.load(initial)
        rate = option.learning_rate
        where = f"rate-{rate:g}" if len(given.stages) == 1 else f"replay-{mix:g}-rate-{rate:g}"
        kept = given.checkpoints and given.checkpoints / where
        try:
            log = train_in_stages(
                trainable, given.stages[mix], given.validation, option, kept, watches
            )
            seconds, logs[rate, mix] = seconds + log.seconds, log
            between = points_between(
                trainable,
                initial,
                given.validation,
                given.held,
                watches,
                learning_rate=rate,
                replay=mix,
            )
            # At the end of the path before its first point is taken.
            if given.test:
                ends[rate, mix] = trainable.state()
            for point in between:
                front = replace(front, points=(*front.points, point))
                if _wanted(front, point, given.keep_source) and point.rank > chosen.rank:
                    chosen, best = point, trainable.state()
        except NotFiniteError as error:
            logger.warning("%s: %s", label, error)
    if not logs:
        rates = ", ".join(f"{option.learning_rate:g}" for option in given.tries)
        raise NotFiniteError(
            f"Training diverged (NaN or infinity) at every learning rate ({rates}): lower them."
        )
    tested = _on_test(trainable, initial, ends, front, given) if given.test else None
    trainable.load(best)
    return Found(heads, trainable, trainable.n_entries, front, chosen, logs, seconds, tested)


def _on_test(
    trainable: Trainable,
    initial: Mapping[str, Tensor],
    ends: Mapping[tuple[float, float], Mapping[str, Tensor]],
    front: Front,
    given: Search,
) -> Front:
    """Measure the start and the points of a front on the test splits.

    Raises:
        NotFiniteError: if a model gives logits that are not finite.
    """
    found = []
    for point in (front.start, *(p for p in front.non_dominated() if p is not front.start)):
        way = point.learning_rate, point.replay
        if point is front.start:
            trainable.load(initial)
        else:
            trainable.load(trainable.between(initial, ends[way], point.alpha))
        target, *held = given.test
        found.append(
            front_point(
                trainable.model,
                target,
                held,
                learning_rate=point.learning_rate,
                replay=point.replay,
                alpha=point.alpha,
            )
        )
    ids = tuple(tuple(encoded.ids) for encoded in given.test)
    return Front(given.tasks, tuple(found), ids)


def _wanted(front: Front, point: FrontPoint, keep_source: float | None) -> bool:
    if keep_source is not None:
        return front.keeps(point, keep_source)
    bound = any(limit is not None for limit in front.limits)
    return front.within(point) if bound else point.alpha == 1
