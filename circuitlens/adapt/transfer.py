"""Stage 6, transfer: train a few heads on a little data of the target language.

For each learning rate a part of the proxy (an adapter on slices of heads, LoRA, or weights of its
own) is trained on pool B of the target language; the rate with the best accuracy on the target's
validation split is kept; then, once, target and source are measured on their test splits.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from circuitlens.adapt.auto import Decision, decide
from circuitlens.adapt.options import TrainingLog, TrainingOptions, rank
from circuitlens.adapt.result import TransferResult
from circuitlens.adapt.retention import (
    Retained,
    circuit_shift,
    evaluate_all,
    weight_drift,
)
from circuitlens.adapt.strategies import AUTO, Choice, KVPolicy, strategy_of
from circuitlens.adapt.training import train
from circuitlens.circuit import Circuit
from circuitlens.errors import InputError
from circuitlens.evaluation import Evaluation, predict, summarise
from circuitlens.model import HookedModel
from circuitlens.progress import progress
from circuitlens.provenance import Provenance
from circuitlens.scores import HeadScores
from circuitlens.tasks import Encoded, Task

__all__ = ["DEFAULT_RATES", "check_circuit", "training_options", "transfer"]

logger = logging.getLogger(__name__)

DEFAULT_RATES = (3e-4, 1e-3, 3e-3)
# Source examples per target example in the stages of gradual fine-tuning (Xu, Ebner,
# Yarmohammadi et al. 2021, arXiv 2103.02205, go from much out-of-domain data to none).
_GRADUAL = (1.0, 0.5, 0.25, 0.0)


def transfer(
    model: HookedModel,
    circuit: Circuit,
    task: Task,
    *,
    strategy: str = "circuit",
    scores: HeadScores | None = None,
    source: Task | None = None,
    retain: Sequence[Task] = (),
    replay: float = 0.0,
    kv_policy: KVPolicy = "shared",
    rediscover: bool = False,
    learning_rates: Sequence[float] = DEFAULT_RATES,
    epochs: int = 10,
    batch_size: int = 16,
    weight_decay: float = 0.0,
    patience: int = 10,
    accumulation: int = 1,
    bf16: bool = False,
    seed: int = 0,
    checkpoints: str | Path | None = None,
    quiet: bool = False,
) -> TransferResult:
    """Adapt a competent model to a target language by training a part of its weights.

    Args:
        model: the proxy, competent in the source language; left as it is.
        circuit: the heads to train; other strategies take its size.
        task: the task in the target language, usually ``source_task.to(language)``.
        strategy: one of :data:`circuitlens.adapt.STRATEGIES`, or ``"auto"``, which decides between
            ``circuit`` and ``near-zero``, and the number of heads, by cross-validation inside the
            training data (:mod:`circuitlens.adapt.auto`).
        scores: of all heads; needed by ``near-zero``, ``circuit-lora``, ``auto`` and
            ``rediscover``.
        source: where retention is measured; by default the task that ``task`` was made from.
        retain: further tasks or languages on which retention is measured.
        replay: mix this many source examples (pool A) per target example into the training data.
        kv_policy: under grouped-query attention, train the key/value head that a chosen query
            head shares (``"shared"``), only where all its query heads are chosen (``"group"``), or
            none (``"frozen"``).
        rediscover: search the source circuit anew in the adapted model.
        learning_rates: tried in turn; the best on the target's validation split is kept. The
            default suits models of a few million parameters; large ones want 1e-5 to 3e-4.
        epochs, batch_size, weight_decay, patience, accumulation, bf16: see
            :class:`circuitlens.adapt.options.TrainingOptions`. Weight decay of an adapter pulls
            its own weights to zero, and so the model to where it began.
        seed: for everything random.
        checkpoints: folder for the state of every training after every epoch: a call that was
            killed goes on where it stopped when it is repeated with the same arguments. Remove
            the folder once the result is saved.
        quiet: no progress bar.

    Raises:
        InputError: for an unknown strategy, missing scores, or a circuit of another model.
    """
    how = strategy_of("circuit" if strategy == AUTO else strategy)
    check_circuit(model, circuit)
    options = training_options(
        learning_rates,
        replay,
        epochs=epochs,
        batch_size=batch_size,
        weight_decay=weight_decay,
        patience=patience,
        accumulation=accumulation,
        bf16=bf16,
        seed=seed,
    )
    kept = None if checkpoints is None else Path(checkpoints)
    source = source or task.origin
    if source is None and (replay or how.gradual or rediscover):
        raise InputError(
            "Replay, gradual training and rediscovery need the source task: pass source=…."
        )
    if rediscover and scores is None:
        raise InputError("rediscover compares with the scores before the transfer: pass scores=….")
    data = task.encode(model, task["pool_b"])
    validation = task.encode(model, task["validation"])
    choice = Choice(circuit, scores, seed, kv_policy, data.label_tokens)
    decision: Decision | None = None
    if strategy == AUTO:
        middle = sorted(options, key=lambda option: option.learning_rate)[len(options) // 2]
        decision = decide(
            model, choice, data, middle, checkpoints=kept and kept / AUTO, quiet=quiet
        )
        how, choice = strategy_of(decision.strategy), replace(choice, circuit=decision.circuit)
    heads = how.choose(choice)
    others = [source, *retain] if source else list(retain)
    target_before = _measure(model, task, quiet)[0]
    before = evaluate_all(model, others, quiet=quiet)

    trainable = how.make(model, choice, heads)
    stages = _stages(model, data, source, how.gradual, replay, seed)
    seconds = decision.seconds if decision else 0.0
    tried: list[tuple[TrainingLog, float]] = []
    initial = trainable.state()
    best = initial
    label = f"Transfer to {task.language} ({strategy})"
    for option in progress(options, label, quiet=quiet):
        trainable.load(initial)
        per_stage = replace(option, epochs=max(1, epochs // len(stages)))
        for n, stage in enumerate(stages):
            log = train(
                trainable.model,
                stage,
                validation,
                per_stage,
                trainable=trainable,
                checkpoints=kept and kept / f"rate-{option.learning_rate:g}" / f"stage-{n}",
                quiet=True,
            )
            seconds += log.seconds
        if not tried or rank(log.best) > max(rank(earlier.best) for earlier, _ in tried):
            best = trainable.state()
        tried.append((log, option.learning_rate))
    trainable.load(best)
    log, rate = max(tried, key=lambda pair: rank(pair[0].best))
    n_trainable = trainable.n_entries
    scratch = tempfile.TemporaryDirectory(prefix="circuitlens-")
    trainable.write(Path(scratch.name))
    adapted = trainable.merged()

    target_after, target_right = _measure(adapted, task, quiet)
    after = evaluate_all(adapted, others, quiet=quiet)
    retained = tuple(
        Retained(f"{t.name}/{t.language}", b, a)
        for t, b, a in zip(others, before, after, strict=True)
    )
    shift = None
    if rediscover and source is not None and scores is not None:
        shift = circuit_shift(adapted, source, circuit, scores, quiet=quiet)
    logger.info(
        "%s: %s test accuracy %.3f -> %.3f at rate %g.",
        strategy,
        task.language,
        target_before.accuracy,
        target_after.accuracy,
        rate,
    )
    settings = {
        **options[0].to_dict(),
        "learning_rate": list(learning_rates),
        "replay": replay,
        "kv_policy": kv_policy,
    }
    return TransferResult(
        strategy=strategy,
        heads=heads,
        target_language=task.language,
        source_language=source.language if source else None,
        target_before=target_before,
        target_after=target_after,
        retained=retained,
        n_trainable=n_trainable,
        learning_rate=rate,
        validation={rate: log.best["accuracy"] for log, rate in tried},
        history=log.history,
        seconds=seconds,
        target_right=target_right,
        drift=tuple(tuple(row) for row in weight_drift(model, adapted).tolist()),
        shift=shift,
        decision=decision,
        provenance=Provenance(
            model.name,
            model.fingerprint(),
            task.full_name,
            task.fingerprint(),
            seed,
            settings,
        ),
        model=adapted,
        folder=Path(scratch.name),
        _scratch=scratch,
    )


def training_options(
    learning_rates: Sequence[float], replay: float, **settings: Any
) -> list[TrainingOptions]:
    """Options for every rate, each once.

    Raises:
        InputError: for settings that no transfer could work with.
    """
    if not learning_rates:
        raise InputError("Give at least one learning rate.")
    if replay < 0:
        raise InputError(f"replay is a number of source examples per target's, not {replay}.")
    return [
        TrainingOptions(learning_rate=rate, **settings) for rate in dict.fromkeys(learning_rates)
    ]


def check_circuit(model: HookedModel, circuit: Circuit) -> None:
    """Refuse a circuit of a model with another number of layers or heads.

    Raises:
        InputError: naming both sizes.
    """
    if (circuit.n_layers, circuit.n_heads) != (model.geometry.n_layers, model.geometry.n_heads):
        raise InputError(
            f"The circuit is of a model with {circuit.n_layers} × {circuit.n_heads} heads, but "
            f"{model.name} has {model.geometry.n_layers} × {model.geometry.n_heads}."
        )


def _measure(model: HookedModel, task: Task, quiet: bool) -> tuple[Evaluation, tuple[bool, ...]]:
    """Evaluate on the test split, and say of every example whether it was answered right."""
    encoded = task.encode(model, task["test"])
    logits = predict(model, encoded, quiet=quiet)
    gold = torch.tensor(encoded.gold)
    return summarise(logits, gold), tuple((logits.argmax(1) == gold).tolist())


def _stages(
    model: HookedModel, data: Encoded, source: Task | None, gradual: bool, replay: float, seed: int
) -> list[Encoded]:
    """Training data of each stage: the target's, with some of the source's mixed in."""
    shares = [replay + share for share in (_GRADUAL if gradual else (0.0,))]
    if source is None or not any(shares):
        return [data]
    old = source.encode(model, source["pool_a"])
    order = torch.randperm(len(old), generator=torch.Generator().manual_seed(seed)).tolist()
    counts = [min(len(old), round(share * len(data))) for share in shares]
    return [data + old.take(order[:count]) for count in counts]
