"""Training models in 16 bits, models that were frozen, and trainings that diverge."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from helpers import made_up, tiny
from peft import PeftModel

import circuitlens as cl
from circuitlens.adapt.options import TrainingOptions
from circuitlens.adapt.retention import weight_drift
from circuitlens.adapt.strategies import Choice, strategy_of
from circuitlens.adapt.training import train
from circuitlens.tasks import toy
from circuitlens.tasks.evaluation import label_scores

HALVES = [torch.bfloat16, torch.float16]


STRATEGIES = ("circuit", "norms", "lora", "lora-norms", "head", "full")


@pytest.mark.parametrize(
    ("name", "dtype"), list(zip(["gpt2", "qwen2", "gemma2", "bert"], 2 * HALVES, strict=True))
)
def test_16_bit_weights_are_trained_as_those_in_float32_and_stay_so(name, dtype):
    half = cl.load(tiny(name, dtype))
    whole = half.clone()
    whole.hf.float()
    # At this rate most steps are smaller than half a unit in the last place of 16 bits.
    options = TrainingOptions(2e-5, epochs=6, batch_size=8)
    for model in (half, whole):
        train(model, made_up(), None, options)
    assert half.dtype == torch.float32
    assert half.fingerprint() == whole.fingerprint()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_validation_saw_is_what_one_gets(
    strategy, dtype, toy_proxy, toy_task, toy_scores, tmp_path, monkeypatch
):
    from circuitlens.adapt import trainer

    seen, real = [], trainer.evaluate_encoded

    def evaluate_encoded(model, data):
        seen.append(label_scores(model, data))
        return real(model, data)

    monkeypatch.setattr(trainer, "evaluate_encoded", evaluate_encoded)
    toy_proxy.save(tmp_path / "base")
    model = cl.load(tmp_path / "base", dtype=dtype)
    task, circuit = toy_task.to("near"), toy_scores.top(4)
    # Norms alone need more to do better than no training.
    rate, epochs = (1e-2, 6) if strategy == "norms" else (3e-3, 3)
    options = {"learning_rates": [rate], "epochs": epochs, "quiet": True}
    result = cl.transfer(model, circuit, task, strategy=strategy, scores=toy_scores, **options)
    assert result.learning_rate == rate
    best = max(
        range(epochs), key=lambda n: (result.history[n]["accuracy"], result.history[n]["margin"])
    )
    data = task.encode(model, "validation")
    assert torch.equal(label_scores(result.model, data), seen[best])
    assert not torch.equal(seen[best], label_scores(model, data))

    result.save(tmp_path / "result")
    again = cl.TransferResult.load(tmp_path / "result", model).model
    assert again.fingerprint() == result.model.fingerprint()
    assert torch.equal(label_scores(again, data), seen[best])
    # Its base is known, though not its type, if nothing but the folder is given.
    assert torch.equal(label_scores(cl.load(tmp_path / "result"), data), seen[best])
    # PEFT by itself rounds modules that are saved whole.
    if result.is_adapter and strategy != "lora-norms":
        base = cl.load(tmp_path / "base", dtype=dtype)
        PeftModel.from_pretrained(base.hf, tmp_path / "result")
        assert torch.equal(label_scores(base, data), seen[best])
    assert result.model.clone().fingerprint() == result.model.fingerprint()


_OTHER_PROCESS = """
import sys
import torch
import circuitlens as cl
from circuitlens.tasks.evaluation import label_scores
torch.set_num_threads(1)
model = cl.load(sys.argv[1])
task = cl.load_task("toy").to("near")
torch.save(label_scores(model, task.encode(model, "validation")), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_process_gives_the_logits_that_validation_saw(
    strategy, toy_proxy, toy_task, toy_scores, tmp_path
):
    toy_proxy.save(tmp_path / "base")
    model = cl.load(tmp_path / "base", dtype="bfloat16")
    task = toy_task.to("near")
    options = {"learning_rates": [1e-2], "epochs": 6, "quiet": True}
    result = cl.transfer(
        model, toy_scores.top(4), task, strategy=strategy, scores=toy_scores, **options
    )
    result.save(tmp_path / "result")
    mine = label_scores(result.model, task.encode(model, "validation"))
    command = [sys.executable, "-c", _OTHER_PROCESS, tmp_path / "result", tmp_path / "logits.pt"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert torch.equal(torch.load(tmp_path / "logits.pt"), mine)


@pytest.mark.parametrize("strategy", ["circuit", "lora", "full"])
def test_merging_says_what_it_changes(strategy, toy_proxy, toy_task, toy_scores, tmp_path):
    model = toy_proxy.clone()
    model.hf.to(torch.bfloat16)
    task, circuit = toy_task.to("near"), toy_scores.top(4)
    options = {"learning_rates": [3e-3], "epochs": 2, "quiet": True}
    result = cl.transfer(model, circuit, task, strategy=strategy, **options)
    before = result.model.fingerprint()
    merged = cl.merge(result.model, task, dtype=torch.bfloat16, quiet=True)
    assert result.model.fingerprint() == before
    assert (merged.dtype, merged.n) == ("bfloat16", len(task["test"]))
    assert merged.accuracy_before == result.target_after.accuracy
    data = task.encode(model, "test")
    logits = [label_scores(m, data) for m in (result.model, merged.model)]
    moved = (logits[1] - logits[0]).abs()
    assert 0 < merged.logit_change == pytest.approx(float(moved.mean()))
    assert merged.largest_logit_change == float(moved.max())
    assert merged.changed == int((logits[0].argmax(1) != logits[1].argmax(1)).sum())
    assert {p.dtype for p in merged.model.hf.parameters()} == {torch.bfloat16}
    assert f"accuracy {merged.accuracy_before:.1%} before" in str(merged)
    merged.model.save(tmp_path)
    assert cl.load(tmp_path).fingerprint() == merged.model.fingerprint()
    cl.label_balanced_mean(merged.model, task, quiet=True)  # hooks reach it
    # In float32 nothing is lost but the last bits of a sum.
    exact = cl.merge(result.model, task, "validation", dtype="float32", quiet=True)
    assert exact.n == len(task["validation"])
    if strategy == "full":
        assert exact.largest_logit_change == 0


def test_a_model_with_an_adapter_beside_it_says_where_it_must_be_merged(
    toy_proxy, toy_task, toy_scores, tmp_path
):
    model = toy_proxy.clone()
    model.hf.to(torch.bfloat16)
    task = toy_task.to("near")
    options = {"learning_rates": [3e-3], "epochs": 1, "quiet": True}
    result = cl.transfer(
        model, toy_scores.top(4), task, rediscover=True, **(options | {"scores": toy_scores})
    )
    assert result.shift is not None
    assert "with an adapter" in repr(result.model)
    assert result.model.geometry.n_heads == model.geometry.n_heads
    with pytest.raises(cl.InputError, match=r"hooks do not reach: .*cl\.merge\(model, task\)"):
        cl.label_balanced_mean(result.model, task, quiet=True)
    with pytest.raises(cl.InputError, match=r"result\.save\(…\), or merge the"):
        result.model.save(tmp_path)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("strategy", ["circuit", "lora"])
def test_drift_counts_steps_that_16_bits_would_round_away(strategy, dtype):
    drifts = []
    for kind in (dtype, torch.float32):
        model = cl.load(tiny("gpt2", dtype))
        model.hf.to(kind)
        g = model.geometry
        choice = Choice(cl.Circuit((cl.Head(0, 1), cl.Head(2, 0)), g.n_layers, g.n_heads))
        how = strategy_of(strategy)
        trainable = how.make(model, choice, how.choose(model, choice))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in trainable.parameters.values():
                parameter.copy_(1e-5 * torch.randn(parameter.shape, generator=generator))
        drifts.append(weight_drift(model, trainable.model))
        # Merged, it is the same in float32.
        if kind == torch.float32:
            torch.testing.assert_close(
                weight_drift(model, trainable.merged()), drifts[-1], rtol=1e-3, atol=1e-7
            )
    torch.testing.assert_close(drifts[0], drifts[1], rtol=1e-3, atol=1e-9)
    assert drifts[0].max() > 0


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

    calls, real = [], trainer.evaluate_encoded

    def evaluate_encoded(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise cl.NotFiniteError("NaN")
        return real(*arguments)

    monkeypatch.setattr(trainer, "evaluate_encoded", evaluate_encoded)
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
