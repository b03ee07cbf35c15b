from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import ALL, tiny

import circuitlens as cl
from circuitlens.adapt.masking import masked_adamw, only_selected_train
from circuitlens.adapt.strategies import STRATEGIES, choose_heads, trainable_masks
from circuitlens.adapt.training import TrainingOptions, train
from circuitlens.tasks import toy


def bits(model: cl.HookedModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.hf.named_parameters()}


def steps(model, masks, weight_decay, n=4):
    """A few masked AdamW steps on an arbitrary loss with gradients everywhere."""
    batch = model.unlabelled(torch.randint(5, 90, (4, 7)))
    with only_selected_train(model.hf, masks):
        optimizer = masked_adamw(model.hf, masks, learning_rate=1e-2, weight_decay=weight_decay)
        for _ in range(n):
            optimizer.zero_grad()
            model.hf_logits(batch).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.hf.parameters(), 1.0)
            optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("name", ALL)
def test_only_selected_entries_change_to_the_bit_in_every_layout(name, weight_decay):
    model = cl.load(tiny(name))
    circuit = cl.Circuit.of(["a0.h1", "a2.h0", "a2.h3"], 3, 4)
    masks = trainable_masks(model, "circuit", circuit)
    before = bits(model)
    steps(model, masks, weight_decay)
    for parameter_name, after in model.hf.named_parameters():
        changed = after != before[parameter_name]
        mask = masks.get(parameter_name, torch.zeros_like(changed))
        assert not bool((changed & ~mask).any()), parameter_name
        if bool(mask.any()):
            # Rounding can leave a few entries where they were, not most of them. (A key's bias
            # adds the same score to all keys, so it never has a gradient.)
            moved = float((changed & mask).sum() / mask.sum())
            assert moved > 0.3, (parameter_name, moved)


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "full"])
def test_a_transfer_changes_no_frozen_bit(toy_proxy, toy_task, toy_scores, strategy):
    circuit = toy_scores.top(3)
    before = bits(toy_proxy)
    result = cl.transfer(
        toy_proxy,
        circuit,
        toy_task.to("near"),
        strategy=strategy,
        scores=toy_scores,
        learning_rates=[1e-2],
        epochs=1,
        weight_decay=0.1,
    )
    masks = trainable_masks(toy_proxy, strategy, result.heads)
    for name, after in result.model.hf.named_parameters():
        changed = after != before[name]
        assert not bool((changed & ~masks.get(name, torch.zeros_like(changed))).any()), name
    assert any(
        bool((after != before[name]).any()) for name, after in result.model.hf.named_parameters()
    )
    assert all(torch.equal(p, before[n]) for n, p in toy_proxy.hf.named_parameters())
    assert all(p.requires_grad for p in result.model.hf.parameters())
    assert result.n_trainable == sum(int(m.sum()) for m in masks.values())


def test_weight_decay_reaches_selected_entries_only_and_all_of_them():
    model = cl.load(tiny("qwen2"))
    masks = trainable_masks(model, "circuit", cl.Circuit.of(["a1.h1"], 3, 4))
    before = bits(model)
    optimizer = masked_adamw(model.hf, masks, learning_rate=0.1, weight_decay=0.5)
    with only_selected_train(model.hf, masks):
        for parameter in model.hf.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for name, after in model.hf.named_parameters():
        expected = before[name].clone()
        if name in masks:
            expected[masks[name]] *= 1 - 0.1 * 0.5
        assert torch.equal(after, expected), name


def test_the_best_epoch_is_kept_and_training_stops_early(toy_task):
    model = toy.toy_model(n_layers=1)
    data = toy_task.encode(model, toy_task["pool_a"][:200])
    validation = toy_task.encode(model, toy_task["validation"])
    # A rate that wrecks the model sooner or later.
    options = TrainingOptions(learning_rate=0.1, epochs=30, batch_size=32, patience=2)
    log = train(model, data, validation, options)
    assert len(log.history) < 30
    assert log.best == max(log.history, key=lambda e: (e["accuracy"], e["margin"]))
    assert log.history[-1]["epoch"] - log.best["epoch"] == 2
    now = cl.evaluate(model, toy_task, toy_task["validation"])
    assert now.accuracy == pytest.approx(log.best["accuracy"])
    assert now.margin == pytest.approx(log.best["margin"], rel=1e-5)


def test_training_is_repeatable_and_leaves_the_global_seeds_alone(toy_task):
    fingerprints = []
    for noise in (1, 2):
        np.random.seed(noise)
        torch.manual_seed(noise)
        states = np.random.get_state()[1].copy(), torch.get_rng_state()
        model = toy.toy_model(n_layers=1)
        data = toy_task.encode(model, toy_task["pool_a"][:64])
        validation = toy_task.encode(model, toy_task["validation"][:60])
        train(model, data, validation, TrainingOptions(learning_rate=1e-3, epochs=2))
        fingerprints.append(model.fingerprint())
        assert (np.random.get_state()[1] == states[0]).all()
        assert torch.equal(torch.get_rng_state(), states[1])
    assert fingerprints[0] == fingerprints[1]


def test_finetuning_teaches_the_source_and_leaves_the_model_alone(toy_proxy, toy_task):
    assert cl.evaluate(toy_proxy, toy_task, toy_task["test"]).accuracy > 0.9


def test_finetuning_that_ends_near_chance_is_refused_with_the_model(toy_task):
    model = toy.toy_model(n_layers=1)
    before = model.fingerprint()
    with pytest.raises(cl.CompetenceError, match="near chance") as caught:
        cl.finetune(model, toy_task, learning_rate=1e-8, epochs=1, batch_size=512)
    assert isinstance(caught.value.model, cl.HookedModel)
    assert model.fingerprint() == before


def test_the_rate_is_chosen_on_validation_and_never_on_test(toy_proxy, toy_task, toy_scores):
    from dataclasses import replace

    target = toy_task.to("near")
    options = {"learning_rates": [1e-6, 3e-3], "epochs": 2}
    honest = cl.transfer(toy_proxy, toy_scores.top(4), target, **options)
    # With every test label wrong, whoever peeked at test would choose otherwise.
    wrong = {"negative": "positive", "neutral": "negative", "positive": "neutral"}
    poisoned_test = tuple(replace(e, label=wrong[e.label]) for e in target["test"])
    poisoned = replace(target, pools=replace(target.pools, test=poisoned_test))
    other = cl.transfer(toy_proxy, toy_scores.top(4), poisoned, **options)
    assert other.learning_rate == honest.learning_rate == 3e-3
    assert other.model.fingerprint() == honest.model.fingerprint()
    assert other.target_after.accuracy < honest.target_after.accuracy
    assert list(honest.validation) == [1e-6, 3e-3]


def test_a_transfer_reports_gain_and_retention_and_reloads(
    tmp_path, toy_proxy, toy_task, toy_scores
):
    target = toy_task.to("near")
    result = cl.transfer(toy_proxy, toy_scores.top(4), target, learning_rates=[3e-3], epochs=4)
    assert result.target_before == cl.evaluate(toy_proxy, target, target["test"])
    assert result.target_after == cl.evaluate(result.model, target, target["test"])
    assert result.source_after == cl.evaluate(result.model, toy_task, toy_task["test"])
    assert result.target_gain > 0
    assert (result.source_language, result.target_language) == ("source", "near")
    result.save(tmp_path / "r")
    again = cl.TransferResult.load(tmp_path / "r", toy_proxy)
    assert again.model.fingerprint() == result.model.fingerprint()
    assert again.to_dict() == result.to_dict()
    assert again == result
    size = (tmp_path / "r" / "weights.safetensors").stat().st_size
    assert size < 4.5 * result.n_trainable + 20_000
    with pytest.raises(cl.InputError, match="other weights"):
        cl.TransferResult.load(tmp_path / "r", result.model)
    numbers = cl.TransferResult.load(tmp_path / "r")
    assert numbers == result
    assert numbers.model is None
    with pytest.raises(cl.InputError, match="loaded without its model"):
        numbers.save(tmp_path / "again")


def test_a_task_without_origin_has_no_retention(toy_proxy, toy_scores):
    target = cl.load_task("toy", "near")
    result = cl.transfer(toy_proxy, toy_scores.top(2), target, learning_rates=[1e-3], epochs=1)
    assert result.source_after is None
    assert result.source_change is None
    assert "near" in result._repr_html_()


def test_strategies_choose_as_many_heads(toy_scores):
    circuit = toy_scores.top(5)
    assert choose_heads("circuit", circuit, None, 0) is circuit
    assert len(choose_heads("near-zero", circuit, toy_scores, 0)) == 5
    assert len(choose_heads("random", circuit, toy_scores, 3)) == 5
    assert choose_heads("norms", circuit, None, 0) is None
    with pytest.raises(cl.InputError, match="pass scores="):
        choose_heads("random", circuit, None, 0)
    with pytest.raises(cl.InputError, match="no strategy 'lora'; known are circuit"):
        choose_heads("lora", circuit, toy_scores, 0)


def test_a_circuit_of_another_model_is_refused(toy_proxy, toy_task):
    circuit = cl.Circuit.of(["a0.h0"], 12, 12)
    with pytest.raises(cl.InputError, match="12 × 12 heads"):
        cl.transfer(toy_proxy, circuit, toy_task.to("near"))


@pytest.mark.parametrize("name", ["learning_rate", "epochs", "batch_size", "patience"])
def test_options_that_cannot_be_are_refused(name):
    with pytest.raises(cl.InputError, match=f"{name} must be positive"):
        TrainingOptions(**{"learning_rate": 1e-3, name: 0.0 if name == "learning_rate" else 0})
