"""Stage 1, competence: teach a model the task in the source language."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Unpack

import torch

from circuitlens.adapt.options import COMPETENCE, TrainingKeywords, TrainingOptions, trains
from circuitlens.adapt.training import train
from circuitlens.errors import MODEL, TASK, CompetenceError, check_types
from circuitlens.models.hooked import HookedModel
from circuitlens.tasks import Task
from circuitlens.tasks.evaluation import label_scores, near_chance

__all__ = ["finetune", "is_competent"]

logger = logging.getLogger(__name__)


@trains(COMPETENCE)
def finetune(
    model: HookedModel,
    task: Task,
    *,
    training: TrainingOptions = COMPETENCE,
    checkpoints: str | Path | None = None,
    inplace: bool = False,
    quiet: bool = False,
    **options: Unpack[TrainingKeywords],
) -> HookedModel:
    """Fine-tune all weights on pool A of a task and return the competent model.

    A model in 16 bits comes back in float32, as validation saw it: many steps are smaller than the
    last of 16 bits. :func:`circuitlens.merge` rounds it, and reports what that changes.

    Args:
        model: left as it is, unless ``inplace``.
        task: trains on pool A; the epoch with the best validation accuracy is kept.
        training: how to train. The default learning rate suits models of a few million
            parameters; large ones need 1e-5 to 5e-5.
        checkpoints: folder for the state after every epoch: a call that was killed resumes when
            it is repeated. Remove the folder once the model is saved.
        inplace: train ``model`` itself, which saves a copy of the weights.
        quiet: no progress bar.
        options: fields of :class:`circuitlens.adapt.options.TrainingOptions`, which replace those
            of ``training``: ``learning_rate``, ``epochs``, ``batch_size`` and so on.

    Raises:
        CompetenceError: if the validation accuracy is near chance afterwards: a circuit found in
            such a model would be noise. The trained model is on the error as ``.model``.
        InputError: for options that no training could work with.
    """
    check_types(
        "finetune",
        model=(model, HookedModel, MODEL),
        task=(task, Task, TASK),
    )
    training = training.updated(options)
    data = task.encode(model, task["pool_a"])
    validation = task.encode(model, task["validation"])
    trained = model if inplace else model.clone()
    kept = None if checkpoints is None else Path(checkpoints)
    # Beforehand: an interrupt leaves changed weights too.
    trained.origin, trained.prompt, trained.new = "fine-tuned", task.prompt, ()
    log = train(trained, data, validation, training, checkpoints=kept, quiet=quiet)
    logger.info(
        "Competence: %s/%s validation accuracy %.3f after %d steps (best epoch %g).",
        task.name,
        task.language,
        log.best["accuracy"],
        log.steps,
        log.best["epoch"],
    )
    correct = round(log.best["accuracy"] * len(validation))
    chance, majority = near_chance(correct, validation.gold)
    if chance:
        raise CompetenceError(
            f"After fine-tuning, {model.name} answers {log.best['accuracy']:.1%} of the "
            f"{len(validation)} examples of the {task.full_name} validation split, which cannot be "
            f"told from chance (the most frequent label has {majority:.1%}), so a circuit would be "
            "noise: train longer, change the learning rate, or give more data.",
            trained,
        )
    return trained


def is_competent(model: HookedModel, task: Task) -> tuple[bool, float]:
    """Whether a model does better than chance on the validation split, and its accuracy."""
    validation = task.encode(model, task["validation"])
    predicted = label_scores(model, validation).argmax(1)
    correct = int((predicted == torch.tensor(validation.gold)).sum())
    return not near_chance(correct, validation.gold)[0], correct / len(validation)
