from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import made_up, tiny
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

import circuitlens as cl
from circuitlens.adapt.batch_parts import Parts
from circuitlens.adapt.checkpoints import Checkpoints
from circuitlens.adapt.headslice import HeadSliceConfig
from circuitlens.adapt.options import TrainingOptions
from circuitlens.adapt.trainable import Trainable
from circuitlens.adapt.trainer import KeepBest
from circuitlens.adapt.training import train
from circuitlens.tasks import toy


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    batch_size=st.integers(1, 12),
    n_parts=st.integers(1, 5),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_parts_of_all_processes_are_the_batches(lengths, batch_size, n_parts, world, epoch):
    ranks = []
    for rank in range(world):
        parts = Parts(lengths, batch_size, n_parts, rank=rank, world=world, seed=7)
        parts.set_epoch(epoch)
        ranks.append(list(parts))
        # Every process takes as many steps as the others.
        assert len(ranks[-1]) == len(parts)
    whole = Parts(lengths, batch_size, seed=7)
    whole.set_epoch(epoch)
    for step, batch in enumerate(whole):
        mine = slice(step * n_parts, (step + 1) * n_parts)
        pieces = [piece for rank in ranks for piece in rank[mine]]
        seen = sorted((i, weight) for piece in pieces for i, weight in piece if weight)
        # The mean over processes and parts of the weighted sums is the mean over the batch.
        assert [i for i, _ in seen] == sorted(i for i, _ in batch)
        total = sum(weight for _, weight in seen) / (n_parts * world)
        assert total == pytest.approx(1.0)
        assert len({weight for _, weight in seen}) == 1
    once = sorted(i for batch in whole for i, _ in batch)
    assert once == list(range(len(lengths)))


def test_epochs_differ_in_order():
    parts = Parts([3] * 50, 8)
    first = list(parts)
    parts.set_epoch(1)
    assert first != list(parts)


@pytest.fixture(scope="module")
def uneven(toy_task):
    """Examples of different lengths, not a multiple of the batch size, and a fresh model."""

    def make():
        model = toy.toy_model(n_layers=1)
        data = toy_task.encode(model, toy_task["pool_a"][:70])
        assert len({len(tokens) for tokens in data.tokens}) > 3
        return model, data, toy_task.encode(model, toy_task["validation"][:50])

    return make


def _weights(model):
    return torch.cat([p.detach().flatten() for p in model.hf.parameters()])


def test_accumulation_changes_nothing_but_rounding(uneven):
    found = []
    for accumulation in (1, 3, 16):
        model, data, validation = uneven()
        options = TrainingOptions(1e-3, epochs=2, batch_size=16, accumulation=accumulation)
        log = train(model, data, validation, options)
        assert log.steps == 2 * 5
        found.append(_weights(model))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=2e-6)


def test_bf16_leaves_a_plain_model_and_other_trainings_alone(uneven):
    found = {}
    for bf16 in (False, True, False):
        model, data, validation = uneven()
        log = train(model, data, validation, TrainingOptions(1e-3, epochs=1, bf16=bf16))
        assert np.isfinite(log.best["margin"])
        assert all(p.dtype == torch.float32 for p in model.hf.parameters())
        # Nothing of the autocast is left, or copies of the model would run the original.
        assert "forward" not in vars(model.hf)
        assert "_original_forward" not in vars(model.hf)
        found.setdefault(bf16, []).append(_weights(model))
        batch = data.batch([0, 1])
        torch.testing.assert_close(model.clone().hf_logits(batch), model.hf_logits(batch))
    assert torch.equal(found[False][0], found[False][1])
    gap = (found[True][0] - found[False][0]).abs().max()
    assert 1e-5 < gap < 1e-2


def test_bf16_and_accumulation_reach_a_transfer(toy_proxy, toy_task, toy_scores):
    options = {"learning_rates": [1e-3], "epochs": 1}
    target = toy_task.to("near")
    plain = cl.transfer(toy_proxy, toy_scores.top(2), target, **options)
    both = cl.transfer(toy_proxy, toy_scores.top(2), target, accumulation=2, bf16=True, **options)
    assert both.provenance.settings["bf16"]
    assert both.provenance.settings["accumulation"] == 2
    assert both.target_after.accuracy == pytest.approx(plain.target_after.accuracy, abs=0.05)
    assert both.model.fingerprint() != plain.model.fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulation": 0}, "accumulation must be a whole number"),
        ({"accumulation": 17}, "cannot be more than batch_size"),
    ],
)
def test_impossible_parts_are_refused(options, message):
    with pytest.raises(cl.InputError, match=message):
        TrainingOptions(1e-3, batch_size=16, **options)


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_sharded_training_is_refused_before_any_work(monkeypatch, uneven, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    model, data, validation = uneven()
    before = model.fingerprint()
    with pytest.raises(cl.InputError, match=f"does not train under {name}"):
        train(model, data, validation, TrainingOptions(1e-3))
    assert model.fingerprint() == before


# -- checkpoints ---------------------------------------------------------------------------


class Killed(BaseException):
    """As sudden as a signal, as far as the training can tell."""


def _with_dropout():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.2
    )
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("has_validation", [True, False])
def test_a_resumed_training_ends_with_the_same_bits(tmp_path, monkeypatch, has_validation):
    """With dropout, so that the random states have to come back too."""
    data = made_up()
    validation = data.take(range(20)) if has_validation else None
    options = TrainingOptions(3e-3, epochs=5, batch_size=8)
    start = cl.load(_with_dropout())
    reference = start.clone()
    expected = train(reference, data, validation, options)
    saves = []
    on_save = KeepBest.on_save

    def die(self, *args, **kwargs):
        saves.append(1)
        if len(saves) == 3:
            raise Killed  # the third checkpoint is not complete
        on_save(self, *args, **kwargs)

    monkeypatch.setattr(KeepBest, "on_save", die)
    with pytest.raises(Killed):
        train(start.clone(), data, validation, options, checkpoints=tmp_path / "t")
    again = start.clone()
    log = train(again, data, validation, options, checkpoints=tmp_path / "t")
    # Three epochs again: the third, which was lost, and two new ones.
    assert len(saves) == 3 + 3
    assert (log.history, log.best, log.steps) == (expected.history, expected.best, expected.steps)
    assert torch.equal(_weights(again), _weights(reference))
    # A finished training is loaded.
    third = start.clone()
    assert train(third, data, validation, options, checkpoints=tmp_path / "t") == log
    assert len(saves) == 6
    assert torch.equal(_weights(third), _weights(reference))
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == [
        "finished.safetensors",
        "training.json",
    ]


def test_a_training_killed_after_it_had_stopped_early_does_not_go_on(tmp_path, monkeypatch):
    data = made_up()
    options = TrainingOptions(0.3, epochs=20, batch_size=8, patience=1)
    start = cl.load(tiny("gpt2"))
    reference = start.clone()
    expected = train(reference, data, data, options)
    assert len(expected.history) < 20
    monkeypatch.setattr(Checkpoints, "finish", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        train(start.clone(), data, data, options, checkpoints=tmp_path)
    monkeypatch.undo()
    again = start.clone()
    log = train(again, data, data, options, checkpoints=tmp_path)
    assert (log.history, log.steps) == (expected.history, expected.steps)
    assert torch.equal(_weights(again), _weights(reference))


@pytest.mark.parametrize("change", ["learning_rate", "data", "first weights"])
def test_checkpoints_of_another_training_are_refused(tmp_path, change):
    data = made_up()
    options = TrainingOptions(1e-3, epochs=1, batch_size=8)
    model = cl.load(tiny("gpt2"))
    other = model.clone()
    train(model, data, None, options, checkpoints=tmp_path)
    if change == "learning_rate":
        options = TrainingOptions(2e-3, epochs=1, batch_size=8)
    elif change == "data":
        data = data.take(range(39))
    else:
        other = model
    with pytest.raises(cl.InputError, match=rf"another training \({change} was"):
        train(other, data, None, options, checkpoints=tmp_path)


@pytest.mark.parametrize("change", ["heads", "mask", "frozen weights", "validation"])
def test_checkpoints_are_of_what_is_trained_and_of_what_is_not(tmp_path, change):
    # Slices begin at zero, so which heads they are of does not show in their weights.
    data, options = made_up(), TrainingOptions(1e-3, epochs=1, batch_size=8)
    model = cl.load(tiny("gpt2"))

    def slices(head, of=model):
        return Trainable.of_adapter(of, HeadSliceConfig(heads=[head]), seed=0)

    def masked(column, of=model):
        mask = torch.zeros(96, dtype=torch.bool)
        mask[column] = True
        return Trainable.of_entries(of, {"transformer.h.0.attn.c_attn.bias": mask})

    make = masked if change == "mask" else slices
    first = make(1 if change == "mask" else "a0.h1")
    train(first.model, data, data, options, trainable=first, checkpoints=tmp_path)
    again = make(1 if change == "mask" else "a0.h1")
    train(again.model, data, data, options, trainable=again, checkpoints=tmp_path)
    assert all(torch.equal(first.state()[name], w) for name, w in again.state().items())
    validation, other = data, again
    if change == "validation":
        validation, other = data.take(range(39)), slices("a0.h1")
    elif change == "frozen weights":
        proxy = model.clone()
        with torch.no_grad():
            proxy.hf.lm_head.weight[0] += 1
        other = slices("a0.h1", proxy)
    else:
        other = make(2 if change == "mask" else "a0.h2")
    with pytest.raises(cl.InputError, match="contains checkpoints of another training"):
        train(other.model, data, validation, options, trainable=other, checkpoints=tmp_path)
