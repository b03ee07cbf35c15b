"""``transformers.Trainer`` for labelled prompts, and what it keeps between epochs and processes."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from circuitlens.adapt.batch_parts import AsIs, Part, Parts
from circuitlens.adapt.monitors import PREFIX, Watch, measured
from circuitlens.adapt.options import ROUNDING, rank
from circuitlens.errors import NotFiniteError
from circuitlens.models.batch import Batch
from circuitlens.models.hooked import HookedModel
from circuitlens.models.passes import PassCount, count_backward, count_forward
from circuitlens.tasks import Encoded
from circuitlens.tasks.evaluation import evaluate_encoded
from circuitlens.utils.progress import tell_run
from circuitlens.utils.storage import read_tensors, write_tensors

__all__ = ["KeepBest", "LabelTrainer", "Progress", "put", "trained"]

logger = logging.getLogger(__name__)

_WEIGHTS = "circuitlens.checkpoint-weights/1"
_BEST = "circuitlens.checkpoint-best/1"


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that a gradient reaches, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def put(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    """Copy weights into parameters."""
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


class LabelTrainer(Trainer):
    """The loss is that of the task's readout.

    Checkpoints hold trained parameters only, not the whole model.
    """

    def __init__(
        self,
        hooked: HookedModel,
        data: Encoded,
        validation: Encoded | None,
        watches: Sequence[Watch] = (),
        **kwargs: Any,
    ) -> None:
        self._hooked = hooked
        self._watches = watches
        self._data = data
        self._validation = validation
        super().__init__(
            model=hooked.hf,
            train_dataset=AsIs(len(data)),
            # The Trainer wants to see a data set before it evaluates; evaluate() has its own.
            eval_dataset=None if validation is None else AsIs(len(validation)),
            **kwargs,
        )

    def parts(self, batch_size: int) -> None:
        """Set the number of examples in a step, over all parts and processes."""
        self._parts = Parts(
            [len(tokens) for tokens in self._data.tokens],
            batch_size,
            self.args.gradient_accumulation_steps,
            rank=self.args.process_index,
            world=self.args.world_size,
            seed=self.args.seed,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the parts as batches; they are divided among processes already."""
        loader = DataLoader(AsIs(len(self._data)), batch_sampler=self._parts, collate_fn=self._pad)
        # The Trainer tells the loader which epoch begins.
        loader.set_epoch = self._parts.set_epoch
        return loader

    def _pad(self, part: Part) -> dict[str, Tensor]:
        batch = self._data.batch([i for i, _ in part])
        return {**batch.tensors, "weights": torch.tensor([weight for _, weight in part])}

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Weighted sum of the losses of a part."""
        tensors: dict[str, Any] = {n: t for n, t in inputs.items() if n != "weights"}
        data = self._data
        batch = Batch(
            **tensors,
            readout=data.readout,
            n_prefix=data.n_prefix,
            n_suffix=data.n_suffix,
            n_rows=data.n_rows,
        )
        count_backward(len(batch.input_ids))
        return batch.readout.losses(self._hooked, batch, model) @ inputs["weights"]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Accuracy and margin on validation, and monitors; every process does it for itself.

        Where the model has diverged, training ends, and there is nothing to compare.
        """
        assert self._validation is not None
        training = self._hooked.hf.training
        self._hooked.hf.eval()
        try:
            result = evaluate_encoded(self._hooked, self._validation)
            watched = measured(self._hooked, self._watches)
        except NotFiniteError as error:
            logger.warning("Training stops: %s", error)
            self.control.should_training_stop = True
            # Nothing could continue from there.
            self.control.should_save = False
            return {}
        finally:
            self._hooked.hf.train(training)
        metrics = {"eval_accuracy": result.accuracy, "eval_margin": result.margin}
        for watch, value in zip(self._watches, watched, strict=True):
            metrics[f"{PREFIX}{watch.name}"] = value
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        write_tensors(
            Path(output_dir) / "weights.safetensors", _WEIGHTS, trained(self._hooked.hf), {}
        )

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        weights, _ = read_tensors(Path(resume_from_checkpoint) / "weights.safetensors", _WEIGHTS)
        put(trained(self._hooked.hf), weights)


class Progress(ProgressCallback):
    """The Trainer's bar, which tells what is left of the run too."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        super().on_step_end(args, state, control, **kwargs)
        bar: Any = self.training_bar
        if bar is not None:
            tell_run(bar)


class KeepBest(TrainerCallback):
    """Keep the trained weights of the best epoch in memory; stop when none gets better.

    The Trainer's own way writes whole checkpoints to disk and reads one back, and counts the epochs
    of the warm-up as patience, in which a model hardly moves.
    """

    def __init__(
        self,
        model: HookedModel,
        patience: int,
        warmup_epochs: int,
        watches: Sequence[Watch] = (),
    ) -> None:
        self.parameters = trained(model.hf)
        self.watches = watches
        self.patience = patience
        self.warmup_epochs = warmup_epochs
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] | None = None
        self.weights: dict[str, Tensor] = {}
        self.count = PassCount()
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since training began, without the time between an interruption and its resumption."""
        return time.perf_counter() - self._start

    @property
    def exhausted(self) -> bool:
        """Whether ``patience`` epochs have gone by since the best one, and since the warm-up."""
        if self.best is None:
            return False
        since = max(self.history.index(self.best) + 1, self.warmup_epochs)
        return len(self.history) - since >= self.patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare an epoch with the best one."""
        metrics: Mapping[str, float] = kwargs["metrics"]
        entry = {
            "epoch": float(state.epoch),
            "accuracy": metrics["eval_accuracy"],
            "margin": metrics["eval_margin"],
        }
        for watch in self.watches:
            entry[f"{PREFIX}{watch.name}"] = metrics[f"{PREFIX}{watch.name}"]
        if any(watch.keep is not None for watch in self.watches):
            within = all(entry[f"{PREFIX}{w.name}"] >= w.least - ROUNDING for w in self.watches)
            entry["within"] = float(within)
        self.history.append(entry)
        if self.best is None or rank(entry) > rank(self.best):
            self.best = entry
            self.weights = {name: p.detach().clone() for name, p in self.parameters.items()}
        elif self.exhausted:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete a checkpoint: it counts once this file is there. Older ones are removed then.

        The Trainer would remove those with the older dates, of which a clock that is set back makes
        the newest one.
        """
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            meta = {"history": self.history, "best": self.best, "seconds": self.seconds}
            meta |= {"steps": state.global_step, **asdict(self.count)}
            write_tensors(folder / "best.safetensors", _BEST, self.weights, meta)
            for old in folder.parent.glob("checkpoint-*"):
                if old != folder:
                    (old / "best.safetensors").unlink(missing_ok=True)
                    shutil.rmtree(old, ignore_errors=True)

    def resume(self, checkpoint: Path) -> int:
        """Go on from a checkpoint; return its number of steps."""
        weights, meta = read_tensors(checkpoint / "best.safetensors", _BEST)
        self.weights = {name: w.to(self.parameters[name]) for name, w in weights.items()}
        self.history, self.best = meta["history"], meta["best"]
        self._start -= meta["seconds"]
        # What an earlier process ran belongs to this training too.
        count_forward(meta.get("forward", 0.0))
        count_backward(meta.get("backward", 0.0))
        return int(meta["steps"])

    def restore(self) -> None:
        """Put the best epoch's weights back."""
        if self.weights:
            put(self.parameters, self.weights)
