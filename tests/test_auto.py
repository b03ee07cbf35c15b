"""What decides beforehand, what LoRA is matched to, and what replay mixes in."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as hf
from helpers import shortened

import circuitlens as cl
from circuitlens.adapt.auto import CANDIDATES, _pick
from circuitlens.adapt.options import TrainingLog
from circuitlens.adapt.strategies import NAMES, Choice, strategy_of
from circuitlens.tasks import toy
from circuitlens.utils.provenance import Provenance

AUTO = importlib.import_module("circuitlens.adapt.auto")
STAGES = importlib.import_module("circuitlens.adapt.stages")


def scores_of(model: cl.HookedModel) -> cl.HeadScores:
    """Scores from 1 upwards: no ties, and all of them positive."""
    g = model.geometry
    values = 1.0 + torch.arange(g.n_layers * g.n_heads).view(1, g.n_layers, g.n_heads)
    return cl.HeadScores(values, "random", "all", ("a",), Provenance("m", "f", "t", "d", 0))


@pytest.fixture(scope="module")
def model():
    """A random model: what is tested here does not depend on what it knows."""
    return toy.toy_model(n_layers=1)


def grouped(examples, size):
    """``size`` examples share a group, and none stands beside another of its own."""
    n = len(examples) // size
    return tuple(replace(e, group=f"premise-{i % n}") for i, e in enumerate(examples[: n * size]))


def answers(n_plans: int, n: int) -> np.ndarray:
    return np.random.default_rng(5).random((n_plans, n)) < 0.6


CIRCUIT = cl.Circuit.of(["a0.h0", "a0.h1"], 1, 8)
PLANS = ("circuit", "near-zero", "lora-norms", "full")
ENTRIES = (20, 10, 30, 900)


def picked(right, groups=None):
    return _pick(PLANS, ENTRIES, right, CIRCUIT, groups)


@pytest.mark.parametrize("size", [1, 3])
def test_no_group_is_trained_on_and_held_out(toy_task, size):
    examples = grouped(toy_task["pool_b"][:60], size)
    folds = AUTO._folds([e.group for e in examples], 3, 0)
    assert sorted(i for fold in folds for i in fold) == list(range(len(examples)))
    for fold in folds:
        rest = [i for other in folds if other is not fold for i in other]
        assert not {examples[i].group for i in rest} & {examples[i].group for i in fold}
        assert len(fold) in (18, 20, 21)


def test_folds_of_examples_on_their_own_are_those_of_published_tables():
    alone = [str(i) for i in range(11)]
    assert AUTO._folds(alone, 3, 0) == [[10, 0, 4, 3], [5, 8, 2, 1], [9, 7, 6]]
    assert AUTO._folds(alone[:7], 3, 3) == [[5, 3, 4], [6, 0], [2, 1]]


def test_too_few_groups_are_refused():
    with pytest.raises(cl.InputError, match=r"only 2 groups of examples \(6 examples\) for 3 part"):
        AUTO._folds([str(i % 2) for i in range(6)], 3, 0)
    with pytest.raises(cl.InputError, match="only 2 examples for 3 parts"):
        AUTO._folds(["a", "b"], 3, 0)


def test_errors_are_those_of_the_paired_difference():
    right = answers(len(PLANS), 17)
    found = {c.strategy: c for c in picked(right).candidates}
    best = right[right.mean(1).argmax()].astype(float)
    for plan, row in zip(PLANS, right, strict=True):
        gap = best - row
        # To the bit: who is within one error of the best hangs on it.
        assert found[plan].behind == (gap.mean(), gap.std(ddof=1) / np.sqrt(gap.size))


def test_the_error_is_over_groups():
    # Groups of one to four examples.
    names = [f"g{max(i % 9, i % 4)}" for i in range(23)]
    right = answers(len(PLANS), 23)
    found = {c.strategy: c for c in picked(right, names).candidates}
    lead = max(range(4), key=lambda i: (right[i].mean(), -ENTRIES[i]))
    best = right[lead].astype(float)
    n_groups = len(set(names))
    for plan, row in zip(PLANS, right, strict=True):
        gap = best - row
        total = 0.0
        for group in set(names):
            rest = sum(gap[i] - gap.mean() for i in range(23) if names[i] == group)
            total += rest**2
        expected = np.sqrt(n_groups / (n_groups - 1) * total) / 23
        assert found[plan].behind == pytest.approx((gap.mean(), expected))


def test_repeating_every_example_in_its_group_makes_nothing_surer():
    right = answers(len(PLANS), 40)
    once = picked(right)
    thrice = picked(np.repeat(right, 3, 1), [i // 3 for i in range(120)])
    for mine, other in zip(once.candidates, thrice.candidates, strict=True):
        assert other.behind == pytest.approx(mine.behind)
    assert once.candidates[-1].behind[1] > 0


def test_of_those_within_one_error_the_smallest_wins():
    right = np.zeros((4, 100), dtype=bool)
    for row, n in enumerate((70, 40, 72, 73)):
        # They answer different ones, so that three points are within an error.
        right[row, :n] = True
        right[row] = np.roll(right[row], 9 * row)
    decision = picked(right)
    # near-zero is smaller, and far behind.
    assert decision.strategy == "circuit"
    assert "70.0% on 100 examples" in decision.why
    assert [c.strategy for c in decision.candidates] == [
        "full",
        "lora-norms",
        "circuit",
        "near-zero",
    ]
    right[1, :72] = True
    assert picked(right).strategy == "near-zero"


OPTIONS = {"learning_rates": [1e-3, 1e-2], "epochs": 2, "quiet": True}


@pytest.mark.slow
def test_what_auto_returns_is_the_transfer_by_what_it_chose(
    toy_proxy, toy_task, toy_scores, tmp_path
):
    near, circuit = shortened(toy_task.to("near")), toy_scores.top(4)
    options = {**OPTIONS, "scores": toy_scores, "keep_source": 0.02}
    result = cl.transfer(toy_proxy, circuit, near, strategy="auto", **options)
    assert result.strategy == "auto"
    decision = result.decision
    assert {c.strategy for c in decision.candidates} == set(CANDIDATES)
    alone = {
        name: cl.transfer(toy_proxy, circuit, near, strategy=name, **options) for name in CANDIDATES
    }
    same = alone[decision.strategy]
    assert result.front == same.front
    assert result.target_right == same.target_right
    assert (result.n_trainable, result.heads) == (same.n_trainable, same.heads)
    assert result.model.fingerprint() == same.model.fingerprint()
    for candidate in decision.candidates:
        other = alone[candidate.strategy]
        assert candidate.size == other.n_trainable
        chosen = [p for p in other.front.points if p.learning_rate == other.learning_rate]
        best = max(p.target for p in chosen if p.alpha in (other.alpha, 0.0))
        assert candidate.accuracy == pytest.approx(best)
    result.save(tmp_path)
    again = cl.TransferResult.load(tmp_path, toy_proxy)
    assert again == result
    assert again.model.fingerprint() == result.model.fingerprint()


@pytest.mark.slow
def test_where_validation_is_small_the_training_pool_helps(toy_proxy, toy_task, toy_scores):
    near = shortened(toy_task.to("near"))
    by_label = [[e for e in near["validation"] if e.label == x][:4] for x in near.labels]
    few = tuple(e for part in by_label for e in part)
    small = replace(near, pools=replace(near.pools, validation=few, pool_b=near["pool_b"][:30]))
    options = {**OPTIONS, "learning_rates": [3e-3], "scores": toy_scores}
    result = cl.transfer(toy_proxy, toy_scores.top(4), small, strategy="auto", **options)
    assert f"on {12 + 30} examples" in result.decision.why


def test_without_scores_nothing_is_trained(toy_proxy, toy_task, toy_scores):
    with pytest.raises(cl.InputError, match="scores"):
        cl.transfer(
            toy_proxy, toy_scores.top(4), shortened(toy_task.to("near")), strategy="auto", **OPTIONS
        )


def test_encoded_examples_keep_their_groups(model, toy_task):
    examples = grouped(toy_task["pool_b"][:12], 3)
    names = tuple(e.group for e in examples)
    data = toy_task.encode(model, examples)
    assert data.groups == names
    assert data.take([5, 1]).groups == (names[5], names[1])
    alone = toy_task.encode(model, toy_task["pool_a"][:2])
    assert alone.groups == alone.ids
    assert (data + alone).groups == names + alone.ids
    assert data.take([]).groups == ()


# -- what LoRA is matched to -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "circuit-lora"])
@pytest.mark.parametrize(("kv_policy", "n"), [("shared", 7240), ("group", 6200), ("frozen", 5160)])
def test_lora_is_matched_to_the_slices_that_the_kv_policy_trains(name, kv_policy, n):
    config = hf.Qwen2Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    model = cl.load(hf.Qwen2ForCausalLM(config))
    # The whole of one group of query heads, and one head of the other.
    circuit = cl.Circuit.of([f"a0.h{i}" for i in range(5)], 1, 8)
    choice = Choice(circuit, scores_of(model), kv_policy=kv_policy)
    norms = strategy_of("norms").make(model, choice, None).n_entries
    assert strategy_of("circuit").make(model, choice, circuit).n_entries - norms == n
    one_rank = strategy_of("lora-r8").make(model, choice, None).n_entries / 8
    assert abs(strategy_of(name).make(model, choice, None).n_entries - n) <= one_rank / 2


def test_an_unknown_strategy_is_answered_with_all_that_there_are(model, toy_task):
    known = ", ".join(NAMES)
    with pytest.raises(cl.InputError, match=f"no strategy 'dora'; use one of {known}"):
        cl.transfer(model, scores_of(model).top(2), shortened(toy_task.to("near")), strategy="dora")
    with pytest.raises(cl.InputError, match="chooses a strategy and is none itself"):
        strategy_of("auto")


# -- replay ------------------------------------------------------------------------------------


@pytest.fixture
def mixed(model, toy_task, monkeypatch):
    """Transfer to 40 examples with 30 in pool A, without training; count the source's."""
    counts: list[int] = []

    def train(model, data, *args, **kwargs):
        counts.append(len(data) - 40)
        best = {"epoch": 1.0, "accuracy": 0.5, "margin": 0.0}
        return TrainingLog((best,), best, 1, 0.0)

    def run(**options):
        source = replace(toy_task, pools=replace(toy_task.pools, pool_a=toy_task["pool_a"][:30]))
        target = shortened(toy_task.to("near"))
        few = replace(target.pools, pool_b=target["pool_b"][:40], test=target["test"][:10])
        target = replace(target, pools=few)
        scores = scores_of(model)
        options = {"scores": scores, "learning_rates": [1e-3], "epochs": 4, **options}
        cl.transfer(model, scores.top(2), target, source=source, quiet=True, **options)

    monkeypatch.setattr(STAGES, "train", train)
    monkeypatch.setattr(AUTO, "train", train)
    return run, counts


@pytest.mark.parametrize("strategy", ["circuit", "gradual", "auto"])
def test_replay_that_pool_a_cannot_give_is_refused_before_any_training(mixed, strategy):
    run, counts = mixed
    with pytest.raises(
        cl.InputError, match=r"200 source examples, .* has 30: choose at most 0\.75"
    ):
        run(replay=5.0, strategy=strategy)
    with pytest.raises(cl.InputError, match=r"replay=0\.01 .* 40 .* more than 0\.0125"):
        run(replay=0.01, strategy=strategy)
    assert counts == []


def test_replay_gives_as_many_as_it_says(mixed):
    run, counts = mixed
    for replay in (0.0, 0.0126, 0.5, 0.75):
        run(replay=replay)
    assert counts == [0, 1, 20, 30]
    counts.clear()
    # Its own share is not asked for by anybody: it goes as far as pool A does.
    run(strategy="gradual")
    assert counts == [30, 20, 10, 0]
    counts.clear()
    run(strategy="gradual", replay=0.5)
    assert counts == [30, 30, 30, 20]
