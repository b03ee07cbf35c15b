"""Training on the label token, on top of ``transformers.Trainer``.

The loss is the cross-entropy over the vocabulary at the decision position. After every epoch the
validation split is evaluated; the best weights are kept in memory and put back at the end.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from circuitlens.adapt.masking import masked_adamw, only_selected_train
from circuitlens.adapt.trainable import Trainable
from circuitlens.batch import Batch
from circuitlens.errors import InputError
from circuitlens.evaluation import predict, summarise
from circuitlens.model import HookedModel
from circuitlens.progress import interactive
from circuitlens.tasks import Encoded

__all__ = ["TrainingLog", "TrainingOptions", "train"]


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        learning_rate: peak rate; linear decay to zero.
        epochs: passes over the training examples, at most.
        batch_size: examples per step.
        weight_decay: decoupled (AdamW), on trained entries only.
        warmup: share of the steps in which the rate rises.
        patience: stop after this many epochs without a better validation score.
        max_grad_norm: gradients are clipped to this norm (after masking).
        seed: order of the examples, dropout.
    """

    learning_rate: float
    epochs: int = 10
    batch_size: int = 16
    weight_decay: float = 0.0
    warmup: float = 0.1
    patience: int = 10
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "batch_size", "patience"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} must be positive, but is {getattr(self, name)}.")

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TrainingLog:
    """What happened.

    Attributes:
        history: one entry per epoch: ``epoch``, ``accuracy`` and ``margin`` on validation; empty
            without validation.
        best: the entry whose weights were kept.
        steps: optimiser steps taken.
    """

    history: tuple[dict[str, float], ...]
    best: dict[str, float]
    steps: int


class _Indices(Dataset[int]):
    """The Trainer shuffles indices; the collator makes batches of them."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


class _LabelTokenTrainer(Trainer):
    def __init__(
        self, hooked: HookedModel, data: Encoded, validation: Encoded | None, **kwargs: Any
    ) -> None:
        self._hooked = hooked
        self._data = data
        self._validation = validation

        def collate(indices: Sequence[int]) -> dict[str, Any]:
            batch = data.batch(indices)
            return {
                "input_ids": batch.input_ids,
                "attention_mask": batch.attention_mask,
                "gold": batch.gold,
                "label_tokens": batch.label_tokens.expand(len(batch), -1),
            }

        super().__init__(
            model=hooked.hf,
            train_dataset=_Indices(len(data)),
            # The Trainer wants to see a data set before it evaluates; evaluate() has its own.
            eval_dataset=None if validation is None else _Indices(len(validation)),
            data_collator=collate,
            **kwargs,
        )

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        batch = Batch(
            inputs["input_ids"],
            inputs["attention_mask"],
            inputs["gold"],
            inputs["label_tokens"][0],
            self._data.n_prefix,
            self._data.n_suffix,
        )
        logits = self._hooked.hf_logits(batch, model)
        return torch.nn.functional.cross_entropy(logits.float(), batch.label_tokens[batch.gold])

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        assert self._validation is not None
        training = self._hooked.hf.training
        self._hooked.hf.eval()
        result = summarise(
            predict(self._hooked, self._validation), torch.tensor(self._validation.gold)
        )
        self._hooked.hf.train(training)
        metrics = {"eval_accuracy": result.accuracy, "eval_margin": result.margin}
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class _KeepBest(TrainerCallback):
    """Keep the trainable weights of the best epoch in memory; stop when none gets better.

    The Trainer's own way writes whole checkpoints to disk and reads one back.
    """

    def __init__(self, model: HookedModel, patience: int) -> None:
        self.parameters = [p for p in model.hf.parameters() if p.requires_grad]
        self.patience = patience
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] | None = None
        self.weights: list[Tensor] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics: Mapping[str, float] = kwargs["metrics"]
        entry = {
            "epoch": float(state.epoch),
            "accuracy": metrics["eval_accuracy"],
            "margin": metrics["eval_margin"],
        }
        self.history.append(entry)
        if self.best is None or _rank(entry) > _rank(self.best):
            self.best = entry
            self.weights = [p.detach().clone() for p in self.parameters]
        elif len(self.history) - 1 - self.history.index(self.best) >= self.patience:
            control.should_training_stop = True

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, weights in zip(self.parameters, self.weights, strict=True):
            parameter.copy_(weights)


def _rank(entry: Mapping[str, float]) -> tuple[float, float]:
    # Accuracy on a hundred examples ties often; the margin then decides.
    return entry["accuracy"], entry["margin"]


def train(
    model: HookedModel,
    data: Encoded,
    validation: Encoded | None,
    options: TrainingOptions,
    *,
    trainable: Trainable | None = None,
    quiet: bool = False,
) -> TrainingLog:
    """Train a model in place and leave it with the weights of its best epoch.

    Args:
        model: is changed.
        data: encoded examples to train on.
        validation: encoded examples that choose the epoch; without them the last one is kept.
        options: how to train.
        trainable: what of ``model`` (its own copy) is trained; by default all parameters.
        quiet: no progress bar.
    """
    masks = None if trainable is None else trainable.masks
    freeze = nullcontext() if masks is None else only_selected_train(model.hf, masks)
    with _own_randomness(), freeze, tempfile.TemporaryDirectory() as scratch:
        optimizer = (
            torch.optim.AdamW(
                [p for p in model.hf.parameters() if p.requires_grad],
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
        steps = options.epochs * -(-len(data) // options.batch_size)
        keeper = _KeepBest(model, options.patience)
        trainer = _LabelTokenTrainer(
            model,
            data,
            validation,
            optimizers=(optimizer, None),
            callbacks=[keeper],
            args=TrainingArguments(
                output_dir=scratch,
                learning_rate=options.learning_rate,
                num_train_epochs=options.epochs,
                per_device_train_batch_size=options.batch_size,
                warmup_steps=round(options.warmup * steps),
                lr_scheduler_type="linear",
                max_grad_norm=options.max_grad_norm,
                seed=options.seed,
                eval_strategy="no" if validation is None else "epoch",
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                remove_unused_columns=False,
                dataloader_pin_memory=model.device.type != "cpu",
                use_cpu=model.device.type == "cpu",
                disable_tqdm=quiet or not interactive(),
            ),
        )
        trainer.remove_callback(PrinterCallback)
        if quiet or not interactive():
            trainer.remove_callback(ProgressCallback)
        trainer.train()
        if validation is not None:
            keeper.restore()
    model.hf.eval()
    model.hf.zero_grad(set_to_none=True)
    return TrainingLog(tuple(keeper.history), keeper.best or {}, int(trainer.state.global_step))


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Give the block random states of its own: the Trainer seeds the global ones."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)
