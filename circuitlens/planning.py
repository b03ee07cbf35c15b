"""What a run will cost, before it begins: passes, examples, tokens, memory and time of each stage.

1. Count the forward and backward passes of every stage, in examples, from the pools of the task and
   the settings. What the data decide (how many examples are answered correctly, when training stops
   early) is counted at its maximum.
2. Measure two batches, forward alone and forward and backward, for the seconds of a token and the
   memory of activations.
3. Add up the memory: weights, the copy that is trained, its gradients and the optimiser's state.
"""

from __future__ import annotations

import html
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import psutil
import torch

from circuitlens.adapt.auto import CANDIDATES, ENOUGH, N_FOLDS
from circuitlens.adapt.competence import is_competent
from circuitlens.adapt.front import ALPHAS
from circuitlens.adapt.options import (
    DEFAULT_RATES,
    DEFAULT_STRATEGIES,
    TRANSFER,
    TrainingOptions,
    replays_of,
)
from circuitlens.adapt.precision import in_16_bits
from circuitlens.adapt.stages import GRADUAL
from circuitlens.adapt.strategies import AUTO, strategy_of
from circuitlens.adapt.text_loss import MAX_TEXTS
from circuitlens.circuits.measure_faithfulness import default_sizes
from circuitlens.errors import MODEL, TASK, InputError, check_types
from circuitlens.models.batch import Batch
from circuitlens.models.freezing import gradients
from circuitlens.models.hooked import HookedModel
from circuitlens.run_settings import RunSettings
from circuitlens.scoring.head_scores import head_count
from circuitlens.scoring.request import Request
from circuitlens.scoring.scorers import scorer
from circuitlens.tasks import Task
from circuitlens.utils.peak_memory import PeakMemory
from circuitlens.utils.progress import spoken

__all__ = ["Plan", "PlannedStage", "check_memory", "plan", "plan_run"]

_GIB = 2**30
# A step without the optimiser's update, in units of a forward and a backward pass through a frozen
# model (benchmarks/scale.py): gradients of weights cost as much as those of activations.
_STEP, _STEP_OF_ALL = 1.15, 1.6
# Bytes for a weight that is trained: float32 value, gradient, two moments of AdamW; and the copies
# of the first weights, of the best epoch's and of the best rate's.
_TRAINED = 4 * (1 + 1 + 2 + 3)


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a run and what it takes at most.

    Attributes:
        name: such as ``"faithfulness"``, or ``"transfer to javanese, circuit"``.
        examples: how many it looks at.
        forward, backward: passes, each of one example.
        tokens: in all forward passes together.
        seconds: estimated from two batches; NaN if none were measured.
        memory: bytes at its peak, weights included.
    """

    name: str
    examples: int
    forward: float
    backward: float
    tokens: float
    seconds: float
    memory: float


@dataclass(frozen=True)
class Plan:
    """What a run takes, stage by stage.

    Attributes:
        stages: in order.
        free: bytes of memory that are free for it, those of the loaded weights included.
        device: where it runs.
    """

    stages: tuple[PlannedStage, ...] = field(repr=False)
    free: float
    device: str

    @property
    def seconds(self) -> float:
        """Of all stages; NaN if none were measured."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def memory(self) -> float:
        """Bytes of the stage that needs most."""
        return max(stage.memory for stage in self.stages)

    def check(self) -> None:
        """Reject what does not fit.

        Raises:
            InputError: naming the stage, what it needs and what is free.
        """
        worst = max(self.stages, key=lambda stage: stage.memory)
        if worst.memory > self.free:
            raise InputError(
                f"{worst.name[0].upper()}{worst.name[1:]} needs about {worst.memory / _GIB:.1f} "
                f"GiB of memory, and {self.device} has {self.free / _GIB:.1f} GiB free: leave out "
                "strategies that train all weights, load the model in bfloat16, or use smaller "
                "batches (accumulation)."
            )

    def to_frame(self) -> pd.DataFrame:
        """Return one row for each stage, with memory in GiB."""
        rows = [
            {
                "stage": stage.name,
                "examples": stage.examples,
                "forward": stage.forward,
                "backward": stage.backward,
                "tokens": stage.tokens,
                "seconds": stage.seconds,
                "memory_gib": stage.memory / _GIB,
            }
            for stage in self.stages
        ]
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        took = "" if self.seconds != self.seconds else f"at most {spoken(self.seconds)} and "
        return (
            f"{took}about {self.memory / _GIB:.1f} GiB of memory (free on {self.device}: "
            f"{self.free / _GIB:.1f} GiB)"
        )

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, float_format="{:,.1f}".format)
        return f"<p><b>Plan</b>: {html.escape(str(self))}</p>{table}"


def plan(
    model: HookedModel,
    task: Task,
    targets: Sequence[str] = (),
    *,
    finetuning: TrainingOptions | None = None,
    method: str = "cdt-linear",
    mlps: bool = False,
    steps: int = 5,
    max_examples: int | None = None,
    sizes: Sequence[int | float] | None = None,
    n_random: int = 30,
    batch_size: int = 16,
    strategies: Sequence[Any] = DEFAULT_STRATEGIES,
    learning_rates: Sequence[float] = DEFAULT_RATES,
    training: TrainingOptions = TRANSFER,
    retain: Sequence[str] = (),
    replay: float | Sequence[float] = 0.0,
    rediscover: bool = False,
    test_front: bool = False,
    seeds: int = 1,
    checked: int = 0,
    probe: bool = True,
) -> Plan:
    """Estimate what competence, discovery, faithfulness and transfers take, without running them.

    Args:
        model: as for the run.
        task: in the source language.
        targets: target languages.
        finetuning: options of the competence stage; ``None`` leaves that stage out.
        method, mlps, steps, max_examples: of :func:`circuitlens.relevance`.
        sizes, n_random: of :func:`circuitlens.faithfulness`.
        batch_size: examples per forward pass in discovery.
        strategies, learning_rates, training, retain, replay, rediscover, test_front: of
            :func:`circuitlens.transfer`.
        seeds: how many times each transfer is run (:func:`circuitlens.compare`).
        checked: heads that are ablated one by one (:func:`circuitlens.head_effects`).
        probe: measure two batches; without it there are no seconds, and no memory of activations.

    Returns:
        Upper bounds: training may stop early, and only correctly answered examples are scored.

    Raises:
        InputError: for an unknown method, strategy or language.
    """
    check_types("plan", model=(model, HookedModel, MODEL), task=(task, Task, TASK))
    costs = _Costs(model, task if probe else None, batch_size)
    by, layers, heads = scorer(method), model.geometry.n_layers, model.geometry.n_heads
    request = Request(positions="all", mlps=mlps, steps=steps)
    n = len(task["pool_a"])
    scored = min(n, max_examples or n)
    passes = by.passes(layers, heads, request)

    def discovery(prefix: str) -> Iterator[PlannedStage]:
        yield costs.stage(f"{prefix}baseline", task, {"pool_a": 1.0}, n)
        of_pool = {"pool_a": passes[0] * scored / n}
        yield costs.stage(f"{prefix}relevance", task, of_pool, scored, passes[1] * scored)

    stages: list[PlannedStage] = []
    if finetuning is not None:
        passes_of = {"pool_a": float(finetuning.epochs), "validation": float(finetuning.epochs)}
        stages.append(costs.training("competence", task, passes_of, finetuning, True))
    stages += discovery("")
    total = layers * heads
    counts = {0, total, *(head_count(s, total) for s in sizes or default_sizes(total))}
    # Each size with its complement, random circuits and matched ones; those of all or no heads,
    # which are equal, once.
    circuits = 1.0 + 2 * len(counts) + 2 * n_random * max(0, len(counts) - 2)
    held_out = {"pool_b": circuits, "validation": circuits}
    stages.append(
        costs.stage("faithfulness", task, held_out, len(task["pool_b"]) + len(task["validation"]))
    )
    if checked:
        # A head of layer l is ablated in a run of the layers from l on.
        runs = 1 + checked * (layers + 1) / (2 * layers)
        stages.append(costs.stage("effects", task, {"pool_a": runs * scored / n}, scored))
    others = [task, *(task.to(name) for name in retain)]
    mixes = replays_of(replay)
    trainings = len(set(learning_rates)) * len(mixes)
    tried = 1.0 + len(ALPHAS) * trainings  # the start, and all points of every way
    tested = tried if test_front else 0.0
    for target in map(task.to, targets):
        for name in strategies:
            auto = name == AUTO
            kinds = [strategy_of(kind) for kind in (CANDIDATES if auto else (name,))]
            n = len(kinds)
            epochs = float(trainings * training.epochs)
            # Source examples for one of the target's, of the stages' mean.
            gradual = any(how.gradual for how in kinds)
            mixed = sum(mixes) / len(mixes) + (sum(GRADUAL) / len(GRADUAL) if gradual else 0.0)
            beforehand = sum(float(training.epochs) for how in kinds if how.trains_first)
            if auto and len(target["validation"]) < ENOUGH:
                # Each candidate on two of three folds at one rate.
                beforehand += n * (N_FOLDS - 1) * training.epochs
            trained = {
                "pool_b": n * epochs * (1 + mixed) + beforehand,
                "validation": n * (epochs + tried),
                "test": 2.0 + n * tested,
            }
            # Accuracy before and after, and the loss of up to this many texts.
            beside = [
                (other, pool, times)
                for other in others
                for pool, times in (
                    ("validation", n * tried),
                    ("test", 2.0 + 2 * min(1.0, MAX_TEXTS / len(other["test"])) + n * tested),
                )
            ]
            stage = costs.training(
                f"transfer to {target.language}, {name if auto else kinds[0].name}",
                target,
                trained,
                training,
                any(how.all_weights for how in kinds),
                times=seeds,
                beside=beside,
            )
            stages.append(stage)
            if rediscover:
                stages += discovery(f"{stage.name}: ")
    return Plan(tuple(stages), costs.free, str(model.device))


def plan_run(model: HookedModel, task: Task, settings: RunSettings) -> Plan:
    """Plan a run, from its beginning, by its settings."""
    competent = settings.competence == "never" or (
        settings.competence == "auto" and is_competent(model, task)[0]
    )
    total = len(model.geometry)
    # How many heads keep a share of the margin is not known before.
    chosen = head_count(0.5 if isinstance(settings.size, str) else settings.size, total)
    sizes = [*default_sizes(total), chosen, *settings.sizes]
    names = ("method", "mlps", "steps", "max_examples", "n_random", "strategies", "rediscover")
    shared = {name: getattr(settings, name) for name in names}
    unused = ("kv_policy", "keep_source")  # change nothing that has to be run
    shared |= {k: v for k, v in settings.transferring.items() if k not in unused}
    return plan(
        model,
        task,
        settings.targets,
        finetuning=None if competent else settings.competence_options({}),
        sizes=sizes,
        checked=chosen,
        **shared,
        **settings.batch_size,
    )


def check_memory(model: HookedModel, strategies: Sequence[str], *, finetunes: bool) -> None:
    """Reject a run whose weights, gradients and optimiser do not fit; activations come besides.

    Raises:
        InputError: as :meth:`Plan.check`.
    """
    costs = _Costs(model, None, 0)
    needs = {f"transfer, {name}": costs.copies(_trains_all(name)) for name in strategies}
    if finetunes:
        needs["competence"] = costs.copies(True)
    stages = [PlannedStage(name, 0, 0.0, 0.0, 0.0, 0.0, size) for name, size in needs.items()]
    if stages:
        Plan(tuple(stages), costs.free, str(model.device)).check()


def _trains_all(strategy: str) -> bool:
    # What auto tries trains all weights too.
    return strategy == AUTO or strategy_of(strategy).all_weights


class _Costs:
    """What passes cost on a model."""

    def __init__(self, model: HookedModel, probed: Task | None, batch_size: int) -> None:
        self.model = model
        self.weights = sum(p.numel() for p in model.hf.parameters())
        self.bytes = sum(p.numel() * p.element_size() for p in model.hf.parameters())
        self.free = self.bytes + _free(model.device)
        self.batch_size = batch_size
        self._tokens: dict[tuple[str, str], tuple[int, int]] = {}
        self.forward = self.both = self.update = float("nan")
        self.activation = 0.0
        if probed is not None:
            self._probe(probed)

    def copies(self, all_weights: bool) -> float:
        """Bytes of the weights and of what training makes of them."""
        return float(self.bytes + (_TRAINED * self.weights if all_weights else self.bytes))

    def _probe(self, task: Task) -> None:
        """Measure seconds and bytes of a token in two batches, after one to warm up."""
        data = task.encode(self.model, task["pool_a"][: 2 * self.batch_size])
        batches = [batch for _, batch in data.batches(self.batch_size, self.model.device)]
        tokens = sum(batch.input_ids.numel() for batch in batches)

        def forward(batch: Batch) -> None:
            with torch.no_grad():
                self.model.label_logits(batch)

        def both(batch: Batch) -> None:
            with gradients(self.model.hf, wanted=False):
                embed = self.model.hf.get_input_embeddings()
                handle = embed.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))
                try:
                    batch.readout.losses(self.model, batch, self.model.hf).sum().backward()
                finally:
                    handle.remove()

        seconds = []
        for run in (forward, both):
            run(batches[0].part(range(1)))
            with PeakMemory(self.model.device) as memory:
                start = time.perf_counter()
                for batch in batches:
                    run(batch)
                if self.model.device.type == "cuda":
                    torch.cuda.synchronize(self.model.device)
                seconds.append((time.perf_counter() - start) / tokens)
        self.forward, self.both = seconds
        self.update = self._time_of_update()
        self.activation = memory.mib * 2**20 / max(b.input_ids.numel() for b in batches)

    def _time_of_update(self) -> float:
        """Seconds of AdamW for a weight: where batches are small it takes most of the time."""
        values = torch.nn.Parameter(torch.zeros(1 << 22, device=self.model.device))
        values.grad = torch.zeros_like(values)
        optimizer = torch.optim.AdamW([values])
        optimizer.step()
        start = time.perf_counter()
        optimizer.step()
        if values.device.type == "cuda":
            torch.cuda.synchronize(values.device)
        return (time.perf_counter() - start) / values.numel()

    def _size(self, task: Task, pool: str) -> tuple[int, int]:
        """Tokens of a pool in one pass, and those of its longest example."""
        key = (task.full_name, pool)
        if key not in self._tokens:
            data = task.encode(self.model, pool)
            sizes = [len(tokens) * data.n_rows for tokens in data.tokens]
            self._tokens[key] = sum(sizes), max(sizes)
        return self._tokens[key]

    def stage(
        self, name: str, task: Task, passes: dict[str, float], examples: int, backward: float = 0.0
    ) -> PlannedStage:
        """A stage without training; ``passes`` are forward passes of each pool."""
        sizes = {pool: self._size(task, pool) for pool in passes}
        tokens = sum(sizes[pool][0] * n for pool, n in passes.items())
        forward = sum(len(task[pool]) * n for pool, n in passes.items())
        # The forward pass that a backward pass needs is one of those counted.
        back = tokens * backward / forward if forward else 0.0
        seconds = (tokens - back) * self.forward + back * self.both
        batch = self.batch_size * max(longest for _, longest in sizes.values())
        memory = self.bytes + batch * self.activation
        return PlannedStage(name, examples, forward, backward, tokens, seconds, memory)

    def training(
        self,
        name: str,
        task: Task,
        passes: dict[str, float],
        options: TrainingOptions,
        all_weights: bool,
        *,
        times: int = 1,
        beside: Sequence[tuple[Task, str, float]] = (),
    ) -> PlannedStage:
        """A training; ``passes`` are those of each pool, the first of which is trained on.

        ``beside`` are other tasks, a pool of each and the passes over it.
        """
        (pool, epochs), *rest = passes.items()
        size, longest = self._size(task, pool)
        read = [*((task, other, n) for other, n in rest), *beside]
        trained = size * epochs
        evaluated = sum(self._size(other, split)[0] * n for other, split, n in read)
        step = self.both * (_STEP_OF_ALL if all_weights else _STEP)
        seconds = times * (trained * step + evaluated * self.forward)
        if all_weights:
            updates = epochs * -(-len(task[pool]) // options.batch_size)
            seconds += times * updates * self.weights * self.update
        rows = -(-options.batch_size // options.accumulation)
        # Weights of 16 bits that are trained become float32, and so do their activations.
        wide = 2 if all_weights and in_16_bits(self.model.hf) else 1
        memory = self.copies(all_weights) + wide * rows * longest * self.activation
        steps = len(task[pool]) * epochs
        return PlannedStage(
            name,
            len(task[pool]) + sum(len(other[split]) for other, split, _ in read),
            times * (steps + sum(len(other[split]) * n for other, split, n in read)),
            times * steps,
            times * (trained + evaluated),
            seconds,
            memory,
        )


def _free(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)
