from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import task_margin

import circuitlens as cl


@pytest.fixture(scope="module")
def circuit() -> cl.Circuit:
    return cl.Circuit.of(["a0.h1", "a0.h6", "a1.h0", "a1.h3", "a1.h5"], 2, 8)


@pytest.fixture(scope="module")
def found(toy_proxy, toy_task, toy_baseline, circuit):
    return cl.minimality(toy_proxy, toy_task, circuit, toy_baseline, toy_task["validation"][:40])


def margins_by_hand(model, task, baseline, examples, heads) -> list[float]:
    found = []
    for example in examples:
        batch = task.encode(model, [example]).batch([0])
        hooks = {}
        for layer in range(2):

            def ablate(z, layer=layer):
                z = z.clone()
                for index in range(8):
                    if cl.Head(layer, index) not in heads:
                        z[:, 1:, index] = baseline.mean[layer, index]
                return z

            hooks[model.z_hook(layer)] = ablate
        with torch.no_grad():
            found.append(float(task_margin(model.logits(batch, hooks), batch)))
    return found


def test_losses_by_hand(found, toy_proxy, toy_task, toy_baseline, circuit):
    def m(heads):
        examples = toy_task["validation"][:40]
        return np.mean(margins_by_hand(toy_proxy, toy_task, toy_baseline, examples, heads))

    empty, full = m(set()), m(set(toy_proxy.geometry))
    f = (m(set(circuit)) - empty) / (full - empty)
    assert found.faithfulness == pytest.approx(f, abs=1e-4)
    for head, loss in zip(circuit, found.loss, strict=True):
        rest = (m(set(circuit) - {head}) - empty) / (full - empty)
        assert loss == pytest.approx(f - rest, abs=1e-4)


def test_intervals_resample_all_margins_together(found):
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(400):
        at = rng.integers(40, size=40)
        scale = found.full_margin[at].mean() - found.empty_margin[at].mean()
        lost = found.circuit_margin[at].mean() - found.without_margin[:, at].mean(1)
        drawn.append(lost / scale)
    expected = np.quantile(drawn, [0.05, 0.95], axis=0)
    width = np.ptp(expected, axis=0)
    assert (np.abs(found.interval(0.9) - expected) < 0.25 * width).all()


def test_the_frame_is_sorted_and_files_hold_everything(found, tmp_path):
    frame = found.to_frame()
    assert list(frame["loss"]) == sorted(found.loss, reverse=True)
    by_name = dict(zip(map(str, found.circuit), found.loss, strict=True))
    assert dict(zip(frame["head"], frame["loss"], strict=True)) == by_name
    assert ((frame["low"] <= frame["loss"]) & (frame["loss"] <= frame["high"])).all()
    found.save(tmp_path / "m.safetensors")
    again = cl.Minimality.load(tmp_path / "m.safetensors")
    assert again.to_frame().equals(frame)
    assert again.provenance == found.provenance
    assert again.circuit == found.circuit
    assert again != found
    assert repr(again) == "Minimality(toy/source: 5 heads, 40 examples)"
    assert "40 examples" in again._repr_html_()


def test_held_out_examples_are_the_default(toy_proxy, toy_task, toy_baseline):
    one = cl.Circuit.of(["a1.h0"], 2, 8)
    found = cl.minimality(toy_proxy, toy_task, one, toy_baseline)
    assert found.example_ids == tuple(e.id for e in toy_task.held_out)
    # Without its only head a circuit is empty.
    np.testing.assert_array_equal(found.without_margin[0], found.empty_margin)
    assert found.loss[0] == pytest.approx(found.faithfulness)


def test_what_cannot_be_measured_is_refused(toy_proxy, toy_task, toy_baseline, circuit):
    with pytest.raises(cl.InputError, match="was used for discovery"):
        cl.minimality(toy_proxy, toy_task, circuit, toy_baseline, toy_task["pool_a"][:300])
    with pytest.raises(cl.InputError, match="no examples to measure on"):
        cl.minimality(toy_proxy, toy_task, circuit, toy_baseline, [])
    with pytest.raises(cl.InputError, match="has no heads"):
        cl.minimality(toy_proxy, toy_task, replace(circuit, heads=()), toy_baseline)
    with pytest.raises(cl.InputError, match="of a 3 × 8 model"):
        cl.minimality(toy_proxy, toy_task, replace(circuit, n_layers=3), toy_baseline)
