"""Training on labelled prompts, on top of ``transformers.Trainer``.

The loss is that of the task's readout. After every epoch the
validation split is evaluated; the best weights are kept in memory and put back at the end.
"""

from __future__ import annotations

import logging
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from circuitlens.adapt.checkpoints import Checkpoints
from circuitlens.adapt.masking import masked_adamw, only_selected_train
from circuitlens.adapt.monitors import Watch
from circuitlens.adapt.options import TrainingLog, TrainingOptions
from circuitlens.adapt.precision import widen
from circuitlens.adapt.trainable import Trainable
from circuitlens.adapt.trainer import KeepBest, LabelTrainer, Progress
from circuitlens.errors import InputError, NotFiniteError
from circuitlens.models.freezing import gradients
from circuitlens.models.hooked import HookedModel
from circuitlens.models.passes import counting
from circuitlens.tasks import Encoded
from circuitlens.utils.progress import interactive
from circuitlens.utils.room import writing_to

__all__ = ["train"]

logger = logging.getLogger(__name__)


def train(
    model: HookedModel,
    data: Encoded,
    validation: Encoded | None,
    options: TrainingOptions,
    *,
    trainable: Trainable | None = None,
    watches: Sequence[Watch] = (),
    checkpoints: Path | None = None,
    quiet: bool = False,
) -> TrainingLog:
    """Train a model in place and leave it with the weights of its best epoch.

    Weights in 16 bits become float32 and stay so, for steps smaller than their last bit count too.

    Several processes (``accelerate launch``) share the examples of every step, and all end with
    the same weights.

    Args:
        model: is changed.
        data: encoded examples to train on.
        validation: encoded examples that choose the epoch; without them the last one is kept.
        options: how to train.
        trainable: what of ``model`` (its own copy) is trained; by default all parameters.
        watches: monitors, measured after every epoch.
        checkpoints: folder for the state after every epoch. A training that was killed resumes
            from the last one there, a finished one is not repeated.
        quiet: no progress bar.

    Raises:
        InputError: if ``checkpoints`` holds those of another training, or the processes share the
            model out (FSDP, DeepSpeed).
        NotFiniteError: if training diverges before there is anything to keep.
    """
    _refuse_sharding()
    masks = None if trainable is None else trainable.masks
    if trainable is None:
        widen(model.hf)
    with (
        _own_randomness(),
        _what_trains(model, trainable),
        counting() as count,
        tempfile.TemporaryDirectory() as scratch,
    ):
        steps_per_epoch = -(-len(data) // options.batch_size)
        warmup_steps = round(options.warmup * options.epochs * steps_per_epoch)
        keeper = KeepBest(model, options.patience, -(-warmup_steps // steps_per_epoch), watches)
        keeper.count = count
        kept = (
            None
            if checkpoints is None
            else Checkpoints(checkpoints, model, data, validation, options, trainable, watches)
        )
        if kept is not None and (log := kept.finished()) is not None:
            return log
        optimizer = (
            torch.optim.AdamW(
                keeper.parameters.values(),
                lr=options.learning_rate,
                weight_decay=options.weight_decay,
            )
            if masks is None
            else masked_adamw(
                model.hf,
                masks,
                learning_rate=options.learning_rate,
                weight_decay=options.weight_decay,
            )
        )
        trainer = LabelTrainer(
            model,
            data,
            validation,
            watches,
            optimizers=(optimizer, None),
            callbacks=[keeper],
            args=TrainingArguments(
                output_dir=str(checkpoints or scratch),
                learning_rate=options.learning_rate,
                num_train_epochs=options.epochs,
                gradient_accumulation_steps=options.accumulation,
                bf16=options.bf16,
                warmup_steps=warmup_steps,
                lr_scheduler_type="linear",
                max_grad_norm=options.max_grad_norm,
                seed=options.seed,
                eval_strategy="no" if validation is None else "epoch",
                save_strategy="no" if kept is None else "epoch",
                logging_strategy="no",
                report_to="none",
                remove_unused_columns=False,
                use_cpu=model.device.type == "cpu",
                disable_tqdm=quiet or not interactive(),
            ),
        )
        trainer.parts(options.batch_size)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if not quiet and interactive():
            trainer.add_callback(Progress)
        last = None if kept is None else kept.last()
        n_steps = 0 if last is None else keeper.resume(last)
        if not keeper.exhausted:
            with writing_to(checkpoints or Path(scratch)):
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
            n_steps = int(trainer.state.global_step)
            _undo_autocast(trainer)
        else:
            logger.info("%s had stopped early already.", checkpoints)
        _refuse_divergence(keeper, validation, options)
        keeper.restore()
        log = TrainingLog(
            tuple(keeper.history),
            keeper.best or {},
            n_steps,
            keeper.seconds,
            count.forward,
            count.backward,
        )
        if kept is not None and trainer.args.should_save:
            kept.finish(log)
    model.hf.eval()
    model.hf.zero_grad(set_to_none=True)
    return log


@contextmanager
def _what_trains(model: HookedModel, trainable: Trainable | None) -> Iterator[None]:
    """Freeze the rest."""
    if trainable is None:
        which = gradients(model.hf, wanted=True)
    elif trainable.masks is not None:
        which = only_selected_train(model.hf, trainable.masks)
    else:
        yield  # PEFT has frozen the model, and adapters are float32 whatever it is.
        return
    with which:
        yield


def _refuse_divergence(
    keeper: KeepBest, validation: Encoded | None, options: TrainingOptions
) -> None:
    diverged = (
        not all(bool(p.isfinite().all()) for p in keeper.parameters.values())
        if validation is None
        else keeper.best is None
    )
    if diverged:
        raise NotFiniteError(
            f"Training at the rate {options.learning_rate:g} diverged (NaN or infinity): give a "
            "lower learning rate."
        )


def _refuse_sharding() -> None:
    for variable, name in (
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
    ):
        if os.environ.get(variable, "").lower() in ("true", "1"):
            raise InputError(
                f"circuitlens does not train under {name}, which shares the weights out among "
                "processes: launch with --multi_gpu (or --cpu), where each process has the whole "
                "model. Slices of heads need little memory beyond that of the model."
            )


def _undo_autocast(trainer: Trainer) -> None:
    """Take off what Accelerate puts around ``forward`` for mixed precision."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    if "forward" in vars(model):
        del model.forward


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Give the block random states of its own: the Trainer seeds the global ones."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
