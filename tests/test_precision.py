"""Training models in 16 bits, models that were frozen, and trainings that diverge."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from helpers import made_up, tiny

import circuitlens as cl
from circuitlens.adapt.options import TrainingOptions
from circuitlens.adapt.precision import in_float32
from circuitlens.adapt.strategies import Choice, strategy_of
from circuitlens.adapt.training import train
from circuitlens.tasks import toy

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("name", "dtype"), zip(["gpt2", "qwen2", "gemma2", "bert"], 2 * HALVES, strict=True)
)
def test_16_bit_weights_move_as_those_in_float32(name, dtype):
    half = cl.load(tiny(name, dtype))
    whole = half.clone()
    whole.hf.float()
    before = {n: p.detach().float() for n, p in half.clone().hf.named_parameters()}
    # At this rate most steps are smaller than half a unit in the last place of 16 bits.
    options = TrainingOptions(2e-5, epochs=6, batch_size=8)
    for model in (half, whole):
        train(model, made_up(), None, options)
    trained = dict(whole.hf.named_parameters())
    moved = 0
    for parameter_name, parameter in half.hf.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, trained[parameter_name].to(dtype)), parameter_name
        moved += float((parameter.detach().float() - before[parameter_name]).abs().sum())
    assert moved > 0


@pytest.mark.parametrize("dtype", HALVES)
def test_what_does_not_change_keeps_its_bits_and_views_stay_views(dtype):
    weight = torch.nn.Parameter(torch.randn(50, 8).to(dtype))
    rows = weight.data[:10]
    bits = weight.detach().clone()
    module = torch.nn.Module()
    module.weight = weight
    with in_float32(module):
        assert weight.dtype == torch.float32
        weight.data[3] += 1
        weight.grad = torch.zeros_like(weight)
    assert weight.grad is None
    assert torch.equal(weight[:3], bits[:3])
    assert torch.equal(weight[4:], bits[4:])
    assert torch.equal(rows, weight[:10])
    assert torch.equal(rows[3], (bits[3].float() + 1).to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
def test_16_bit_models_take_every_step_of_the_line(dtype, toy_proxy, toy_task, toy_scores):
    model = toy_proxy.clone()
    model.hf.to(dtype)
    task = toy_task.to("near")
    for strategy in ("circuit", "full"):
        result = cl.transfer(
            model, toy_scores.top(4), task, strategy=strategy, learning_rates=[1e-3], epochs=1
        )
        assert result.model.dtype == dtype
        assert result.target_after.accuracy > 0.4


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_what_sixteen_bits_round_away_is_counted(dtype):
    model = cl.load(tiny("qwen2", dtype))
    g = model.geometry
    choice = Choice(cl.Circuit((cl.Head(0, 1), cl.Head(2, 0)), g.n_layers, g.n_heads))
    how = strategy_of("circuit")
    trainable = how.make(model, choice, how.choose(choice))
    assert trainable.rounded_away() == (0, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable.parameters.values():
            sizes = torch.tensor([1e-7, 0.0, 0.5])
            kind = torch.randint(3, parameter.shape, generator=generator)
            parameter.copy_(sizes[kind])
    lost, moved = trainable.rounded_away()
    assert moved == sum(int((p != 0).sum()) for p in trainable.parameters.values())
    merged = dict(trainable.merged().hf.named_parameters())
    changed = sum(int((merged[n] != p).sum()) for n, p in model.hf.named_parameters())
    assert changed == moved - lost
    assert (lost > 0.2 * moved) == (dtype != torch.float32)


@pytest.mark.slow
def test_what_sixteen_bits_round_away_is_said(toy_proxy, toy_task, toy_scores, caplog):
    options = {"learning_rates": [3e-3], "epochs": 2, "quiet": True}
    model = toy_proxy.clone()
    model.hf.to(torch.bfloat16)
    with caplog.at_level("WARNING", logger="circuitlens"):
        result = cl.transfer(model, toy_scores.top(4), toy_task.to("near"), **options)
    assert result.learning_rate > 0
    assert re.search(r"\d+ of \d+ trained entries are rounded away .* torch.bfloat16", caplog.text)


def test_finetuning_trains_what_was_frozen_too_and_freezes_it_again():
    model = cl.load(tiny("gpt2"))
    for parameter in model.hf.parameters():
        parameter.requires_grad_(False)
    before = {name: p.clone() for name, p in model.hf.named_parameters()}
    train(model, made_up(), None, TrainingOptions(1e-2, epochs=1, batch_size=8))
    still = [name for name, p in model.hf.named_parameters() if torch.equal(p, before[name])]
    assert not still
    assert not any(p.requires_grad for p in model.hf.parameters())


@pytest.mark.slow
def test_a_rate_that_diverges_is_left_out(toy_proxy, toy_task, toy_scores, caplog):
    near, circuit = toy_task.to("near"), toy_scores.top(4)
    options = {"strategy": "full", "epochs": 2, "quiet": True}
    with caplog.at_level(logging.WARNING):
        result = cl.transfer(toy_proxy, circuit, near, learning_rates=[1e12, 3e-3], **options)
    alone = cl.transfer(toy_proxy, circuit, near, learning_rates=[3e-3], **options)
    assert result.learning_rate == 3e-3
    assert set(result.validation) == {0.0, 3e-3}
    assert result.model.fingerprint() == alone.model.fingerprint()
    assert "rate 1e+12 diverged" in caplog.text
    with pytest.raises(cl.NotFiniteError, match=r"every learning rate \(1e\+12, 1e\+13\)"):
        cl.transfer(toy_proxy, circuit, near, learning_rates=[1e12, 1e13], **options)


def test_training_that_diverges_later_keeps_its_best_epoch(toy_proxy, toy_task, monkeypatch):
    from circuitlens.adapt import trainer

    calls, real = [], trainer.label_scores

    def label_scores(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise cl.NotFiniteError("NaN")
        return real(*arguments)

    monkeypatch.setattr(trainer, "label_scores", label_scores)
    model = toy_proxy.clone()
    near = toy_task.to("near")
    log = train(
        model,
        near.encode(model, near["pool_b"]),
        near.encode(model, near["validation"]),
        TrainingOptions(1e-3, epochs=6),
    )
    assert len(log.history) == 2
    assert len(calls) == 3
    now = cl.evaluate(model, near, near["validation"])
    assert now.accuracy == pytest.approx(log.best["accuracy"])


def test_a_model_that_gives_nan_is_not_evaluated(toy_task):
    model = toy.toy_model(n_layers=1)
    with torch.no_grad():
        model.hf.lm_head.weight[:] = float("nan")
    with pytest.raises(cl.NotFiniteError, match="NaN or infinite logits on 20 of 20 examples"):
        cl.evaluate(model, toy_task, toy_task["test"][:20])
    with pytest.raises(cl.NotFiniteError, match="diverged"):
        train(model, made_up(), None, TrainingOptions(1e-3, epochs=1))
