"""Training data in stages, with source examples mixed in, and training on one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from circuitlens.adapt.monitors import Watch
from circuitlens.adapt.options import TrainingLog, TrainingOptions
from circuitlens.adapt.trainable import Trainable
from circuitlens.adapt.training import train
from circuitlens.errors import InputError
from circuitlens.models.hooked import HookedModel
from circuitlens.tasks import Encoded, Task

__all__ = ["GRADUAL", "stages_of", "train_in_stages"]

# Source examples per target example in the stages of gradual fine-tuning (Xu, Ebner,
# Yarmohammadi et al. 2021, arXiv 2103.02205, go from much out-of-domain data to none).
GRADUAL = (1.0, 0.5, 0.25, 0.0)


def train_in_stages(
    trainable: Trainable,
    stages: Sequence[Encoded],
    validation: Encoded,
    options: TrainingOptions,
    checkpoints: Path | None,
    watches: Sequence[Watch] = (),
) -> TrainingLog:
    """Train on one stage after the other, as many epochs in all as the options say.

    Where epochs cannot be divided equally, later stages, which have more of the target's data, get
    more. Every stage has its own warm-up and decay.
    """
    each, more = divmod(options.epochs, len(stages))
    history: list[dict[str, float]] = []
    steps, seconds = 0, 0.0
    for n, stage in enumerate(stages):
        epochs = each + (n >= len(stages) - more)
        if not epochs:
            continue
        log = train(
            trainable.model,
            stage,
            validation,
            replace(options, epochs=epochs),
            trainable=trainable,
            watches=watches,
            checkpoints=checkpoints and checkpoints / f"stage-{n}",
            quiet=True,
        )
        done = history[-1]["epoch"] if history else 0.0
        history += [{**entry, "epoch": done + entry["epoch"]} for entry in log.history]
        best = {**log.best, "epoch": done + log.best["epoch"]}
        steps, seconds = steps + log.steps, seconds + log.seconds
    return TrainingLog(tuple(history), best, steps, seconds)


def stages_of(
    model: HookedModel, data: Encoded, source: Task | None, gradual: bool, replay: float, seed: int
) -> list[Encoded]:
    """Training data of each stage: the target's, with some of the source's mixed in.

    Raises:
        InputError: if replay asks for more than there is, or for less than one example.
    """
    shares = [replay + share for share in (GRADUAL if gradual else (0.0,))]
    if source is None or not any(shares):
        return [data]
    old = source.encode(model, source["pool_a"])
    _check_replay(replay, len(data), len(old))
    order = torch.randperm(len(old), generator=torch.Generator().manual_seed(seed)).tolist()
    # What gradual adds of its own nobody asked for in numbers: it goes as far as pool A does.
    counts = [min(len(old), round(share * len(data))) for share in shares]
    return [data + old.take(order[:count]) for count in counts]


def _check_replay(replay: float, n_target: int, n_source: int) -> None:
    wanted = round(replay * n_target)
    if wanted > n_source:
        raise InputError(
            f"replay={replay:g} of {n_target} target examples asks for {wanted} source examples, "
            f"but pool A has {n_source}: choose at most {n_source / n_target:g}."
        )
    if replay > 0 and n_target and not wanted:
        raise InputError(
            f"replay={replay:g} of {n_target} target examples rounds to no source example: choose "
            f"more than {0.5 / n_target:g}, or 0 for none."
        )
