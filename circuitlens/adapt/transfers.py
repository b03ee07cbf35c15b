"""Stage 6, transfer: train a few heads on a little data of the target language.

For each learning rate (and amount of replay) a part of the proxy (an adapter on slices of heads,
LoRA, or weights of its own) is trained on pool B of the target language. What is best on the
target's validation split is kept, among what keeps the source if that was asked for, or the model
as it was, if nothing does better; then, once, target and source are measured on their test splits.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, get_args

import torch

from circuitlens.adapt.auto import Decision, decide
from circuitlens.adapt.merging import plain_copy
from circuitlens.adapt.monitors import Measure, watches_of
from circuitlens.adapt.options import (
    TRANSFER,
    TrainingKeywords,
    TrainingOptions,
    check_keep_source,
    rank,
    replays_of,
    training_tries,
    trains,
)
from circuitlens.adapt.result import TransferResult
from circuitlens.adapt.retention import (
    Retained,
    circuit_shift,
    evaluate_all,
    retained_tasks,
    weight_drift,
)
from circuitlens.adapt.search import Search, search
from circuitlens.adapt.stages import stages_of
from circuitlens.adapt.strategies import AUTO, Choice, KVPolicy, Strategy, strategy_of
from circuitlens.adapt.text_loss import text_loss
from circuitlens.circuit import Circuit
from circuitlens.errors import (
    CIRCUIT,
    MODEL,
    TASK,
    InputError,
    check_types,
)
from circuitlens.models.hooked import HookedModel
from circuitlens.models.passes import counting
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.scoring.scorers import scorer
from circuitlens.tasks import Task
from circuitlens.tasks.evaluation import Evaluation, label_scores, summarise
from circuitlens.utils.processes import summed
from circuitlens.utils.provenance import Provenance

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = [
    "check_circuit",
    "check_kv_policy",
    "check_scores",
    "transfer",
]

logger = logging.getLogger(__name__)


@trains(TRANSFER, but=("learning_rate",))
def transfer(
    model: HookedModel,
    circuit: Circuit,
    task: Task,
    *,
    strategy: str | PeftConfig | Strategy = "circuit",
    scores: HeadScores | None = None,
    source: Task | None = None,
    retain: Sequence[Task | str] = (),
    replay: float | Sequence[float] = 0.0,
    keep_source: float | None = None,
    monitor: Task | Measure | Mapping[str, Task | Measure] | None = None,
    keep_monitor: float | Mapping[str, float] | None = None,
    kv_policy: KVPolicy = "shared",
    rediscover: bool = False,
    test_front: bool = False,
    learning_rates: Iterable[float] | None = None,
    training: TrainingOptions | None = None,
    checkpoints: str | Path | None = None,
    quiet: bool = False,
    **options: Unpack[TrainingKeywords],
) -> TransferResult:
    """Adapt a competent model to a target language by training a part of its weights.

    On six languages and three seeds no strategy was ahead of ``full`` under the same
    ``keep_source``, and n-grams were level with it (docs/results.md): compare before you choose.
    What the circuit saves is entries, files and, on our checkpoint, more of the source's language.

    Args:
        model: the proxy, competent in the source language; left as it is.
        circuit: the heads to train; other strategies take its size.
        task: the task in the target language, usually ``source_task.to(language)``.
        strategy: one of :data:`circuitlens.adapt.STRATEGIES`; a configuration of PEFT, such as
            ``peft.ShiraConfig(…)``, or ``"peft:config.json"``; or ``"auto"``, which tries
            ``circuit``, ``near-zero``, ``lora-norms`` and ``full`` and chooses on validation
            (:mod:`circuitlens.adapt.auto`).
        scores: of all heads; needed by ``near-zero``, ``circuit-lora``, ``auto`` and
            ``rediscover``.
        source: where retention is measured; by default the task that ``task`` was made from.
        retain: further tasks, or languages of this one, on which retention is measured.
        replay: mix this many source examples (pool A) per target example into the training data;
            of several amounts the best is chosen as the rate is.
        keep_source: accuracy that may be lost on the source and on each task of ``retain``, as a
            share (0.01 is one point). Rate, replay and α, the share of the way from the untouched
            weights to the trained ones, are then chosen together on validation: the best on the
            target among those that keep within it, or the untouched model if none does better.
            What is lost on test can be more. By default the rate alone is chosen, by the target.
        monitor: what to watch while the model is trained: a task (its validation accuracy), a
            function that takes the model and returns a number (larger is better), or several by
            name. It is measured at the start, after every epoch and at every α
            (``result.history``, ``result.front``, :attr:`TransferResult.monitored`), such as
            accuracy on speech while a speech model is adapted with text.
        keep_monitor: how much of every monitor may be lost, in its own units, or by name. Epoch,
            rate and α are then chosen among those that keep within it, together with
            ``keep_source`` if that is given; or the model stays as it was.
        kv_policy: under grouped-query attention, train the key/value head that a chosen query
            head shares (``"shared"``), only where all its query heads are chosen (``"group"``), or
            none (``"frozen"``).
        rediscover: search the source circuit again in the adapted model (in 16 bits, in a merged
            copy of it).
        test_front: measure every point of the front on the test splits too, once all choices are
            made, for a report that shows what validation's promises are worth
            (:attr:`TransferResult.test_front`). The trained entries of every rate are kept until
            then.
        learning_rates: tried in turn; the best on the target's validation split is kept. The
            default is that of ``training``, or 3e-4, 1e-3 and 3e-3, which suit models of a few
            million parameters; large ones want 1e-5 to 3e-4.
        training: how to train. Weight decay of an adapter pulls its own weights to zero, and so
            the model to where it began.
        checkpoints: folder for the state of every training after every epoch: a call that was
            killed resumes when it is repeated with the same arguments (of a monitor that is a
            function, the name is all that is compared). Remove the folder once the result is saved.
        quiet: no progress bar.
        options: fields of :class:`circuitlens.adapt.options.TrainingOptions`, which replace those
            of ``training``: ``epochs``, ``batch_size``, ``seed`` (for everything random) and so on.

    Returns:
        Numbers, trained tensors, ``result.front`` (target and source on validation for every rate,
        amount of replay and α, if there is a source), and ``result.model``, which is the model that
        validation saw. If ``model`` is in 16 bits, the trained tensors are float32 all the same:
        an adapter stays alongside the weights (:func:`circuitlens.merge` merges it and says what
        that changes), and strategies that train the weights themselves make the whole copy float32.

    Raises:
        InputError: for an unknown strategy, missing scores, a circuit or scores of another model,
            ``keep_source`` without a task to keep, or a monitor that gives no finite number.
        NotFiniteError: if training diverges at every learning rate. One rate that diverges is
            left out, with a warning in the log.
    """
    check_types(
        "transfer",
        model=(model, HookedModel, MODEL),
        circuit=(circuit, Circuit, CIRCUIT),
        task=(task, Task, TASK),
    )
    how = strategy_of("circuit" if strategy == AUTO else strategy)
    name = AUTO if strategy == AUTO else how.name
    check_circuit(model, circuit)
    check_scores(model, scores)
    check_kv_policy(kv_policy)
    tries = training_tries(learning_rates, training, options)
    mixes = replays_of(replay)
    check_keep_source(keep_source)
    seed = tries[0].seed
    kept = None if checkpoints is None else Path(checkpoints)
    source = source or task.origin
    if source is None and (any(mixes) or how.gradual or how.by_source or rediscover):
        raise InputError(
            "Replay, gradual training, rediscovery and strategies that look at the source's data "
            "need the source task: pass source=…."
        )
    if rediscover:
        if scores is None:
            raise InputError(
                "rediscover compares with the scores before the transfer: pass scores=…."
            )
        scorer(scores.method)  # a rule set of one's own has no name to find it by
    others = retained_tasks(task, source, retain)
    if (keep_source is not None or test_front) and not others:
        rule = "test_front" if keep_source is None else "keep_source"
        raise InputError(f"{rule} needs a task that is to be kept: pass source=… or retain=….")
    watches = watches_of(model, monitor, keep_monitor)
    data = task.encode(model, task["pool_b"])
    validation = task.encode(model, task["validation"])
    held = [other.encode(model, other["validation"]) for other in others]
    middle = sorted(tries, key=lambda option: option.learning_rate)[len(tries) // 2]
    choice = Choice(
        circuit,
        scores,
        seed,
        kv_policy,
        data.readout,
        data=data,
        source=source,
        training=middle,
        checkpoints=kept and kept / "first",
    )
    # Before anything is trained, as replay may be refused; what auto may choose is not gradual.
    stages = {mix: stages_of(model, data, source, how.gradual, mix, seed) for mix in mixes}
    label = f"Transfer to {task.language} ({name})"
    given = Search(
        stages,
        validation,
        held,
        tuple(other.full_name for other in others),
        tries,
        keep_source,
        kept,
        quiet,
        task.prompt,
        [t.encode(model, t["test"]) for t in (task, *others)] if test_front else (),
        watches,
    )
    scratch = tempfile.TemporaryDirectory(prefix="circuitlens-")
    target_before = _measure(model, task, quiet)[0]
    before = evaluate_all(model, others, quiet=quiet)
    losses = [text_loss(model, other) for other in others]
    decision: Decision | None = None
    with counting() as spent:
        if strategy == AUTO:
            decision, found = decide(model, choice, given, label, Path(scratch.name))
        else:
            found = search(model, how, choice, given, label)
    passes = summed(torch.tensor(spent.both_ways, dtype=torch.float64), model.device)
    trainable, front, chosen, logs = found.trainable, found.front, found.chosen, found.logs
    heads, start = found.heads, found.front.start
    seconds = decision.seconds if decision else found.seconds
    if chosen is start:
        within = (
            "no learning rate"
            if keep_source is None
            else f"nothing that loses at most {keep_source:g} of accuracy elsewhere"
        )
        if bound := [w for w in watches if w.keep is not None]:
            within += f" within the limit of {', '.join(w.name for w in bound)}"
        logger.warning(
            "%s: %s did better on validation than no training (accuracy %.3f), so the model stays "
            "as it was: give other rates, or more epochs%s.",
            label,
            within,
            start.target,
            "" if keep_source is None else ", replay, or allow a larger loss",
        )
        log = max(logs.values(), key=lambda log: rank(log.best))
    else:
        log = logs[chosen.learning_rate, chosen.replay]
    assert trainable is not None
    if decision is None:
        trainable.write(Path(scratch.name))
    drift = weight_drift(model, trainable.model)
    adapted = trainable.adapted()

    target_after, target_right = _measure(adapted, task, quiet)
    after = evaluate_all(adapted, others, quiet=quiet)
    retained = tuple(
        Retained(t.full_name, b, a, _pair(loss, text_loss(adapted, t)))
        for t, b, a, loss in zip(others, before, after, losses, strict=True)
    )
    shift = None
    if rediscover and source is not None and scores is not None:
        try:
            plain = plain_copy(adapted) if adapted.adapter is not None else adapted
            shift = circuit_shift(plain, source, circuit, scores, quiet=quiet)
        except InputError as error:
            # The adapted model may have forgotten a label; what was trained is worth keeping.
            logger.warning("%s: the circuit could not be searched again: %s", label, error)
    logger.info(
        "%s: %s test accuracy %.3f -> %.3f at rate %g, α %g.",
        name,
        task.language,
        target_before.accuracy,
        target_after.accuracy,
        chosen.learning_rate,
        chosen.alpha,
    )
    settings = {
        **tries[0].to_dict(),
        "learning_rate": [option.learning_rate for option in tries],
        # What was chosen, as cards say what was trained on.
        "replay": mixes[0] if chosen is start else chosen.replay,
        "kv_policy": kv_policy,
    }
    if len(mixes) > 1:
        settings["replays"] = list(mixes)
    if keep_source is not None:
        settings["keep_source"] = keep_source
    if any(w.keep is not None for w in watches):
        settings["keep_monitor"] = {w.name: w.keep for w in watches if w.keep is not None}
    return TransferResult(
        strategy=name,
        heads=heads,
        target_language=task.language,
        source_language=source.language if source else None,
        target_before=target_before,
        target_after=target_after,
        retained=retained,
        n_trainable=found.n_entries,
        learning_rate=chosen.learning_rate,
        alpha=chosen.alpha if chosen is not start else 1.0,
        front=front if others or watches else None,
        monitored={
            watch.name: (before, now)
            for watch, before, now in zip(watches, start.watched, chosen.watched, strict=True)
        },
        test_front=found.test_front,
        passes=float(passes),
        validation={
            0.0: start.target,
            **{
                rate: max(log.best["accuracy"] for (r, _), log in logs.items() if r == rate)
                for rate, _ in logs
            },
        },
        history=log.history,
        seconds=seconds,
        target_right=target_right,
        target_ids=tuple(e.id for e in task["test"]),
        drift=tuple(map(tuple, drift.tolist())),
        shift=shift,
        decision=decision,
        prompt=task.prompt,
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


def _pair(before: float | None, after: float | None) -> tuple[float, float] | None:
    return None if before is None or after is None else (before, after)


def check_circuit(model: HookedModel, circuit: Circuit) -> None:
    """Reject a circuit of a model with another number of layers or heads, or without any head.

    Raises:
        InputError: naming both sizes.
    """
    if not len(circuit):
        raise InputError(
            "The circuit has no heads, so there is nothing to train: choose some with scores.top, "
            "or a lower threshold."
        )
    circuit.check_model(model)


def check_scores(model: HookedModel, scores: HeadScores | None) -> None:
    """Reject scores of a model with another number of layers or heads.

    Raises:
        InputError: naming both sizes.
    """
    if scores is None:
        return
    size = (model.geometry.n_layers, model.geometry.n_heads)
    if tuple(scores.mean.shape) != size:
        raise InputError(
            f"The scores are of a model with {' × '.join(map(str, scores.mean.shape))} heads, but "
            f"{model.name} has {' × '.join(map(str, size))}."
        )


def check_kv_policy(kv_policy: str) -> None:
    """Reject a misspelt policy, also where a strategy does not need one.

    Raises:
        InputError: naming those there are.
    """
    if kv_policy not in get_args(KVPolicy):
        raise InputError(
            f"There is no kv_policy {kv_policy!r}; use one of {', '.join(get_args(KVPolicy))}."
        )


def _measure(model: HookedModel, task: Task, quiet: bool) -> tuple[Evaluation, tuple[bool, ...]]:
    """Evaluate on the test split, and say of every example whether it was answered right."""
    encoded = task.encode(model, task["test"])
    logits = label_scores(model, encoded, quiet=quiet)
    gold = torch.tensor(encoded.gold)
    return summarise(logits, gold, tuple(task.labels)), tuple((logits.argmax(1) == gold).tolist())
