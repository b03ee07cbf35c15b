from __future__ import annotations

import numpy as np
import pytest
import torch

import circuitlens as cl
from circuitlens.batch import label_logits, task_margin
from circuitlens.curve import ablated_logits, default_sizes


@pytest.fixture(scope="module")
def curve(toy_proxy, toy_task, toy_scores, toy_baseline):
    return cl.faithfulness(
        toy_proxy, toy_task, toy_scores, toy_baseline, sizes=[2, 4, 8], n_random=10
    )


def test_none_and_all_heads_are_the_ends(curve, toy_proxy, toy_task):
    assert curve.sizes == (0, 2, 4, 8, 16)
    assert curve.faithfulness[[0, -1]].tolist() == [0.0, 1.0]
    whole = cl.evaluate(toy_proxy, toy_task, toy_task.held_out)
    assert curve.accuracy[-1] == pytest.approx(whole.accuracy)
    assert curve.margin[-1] == pytest.approx(whole.margin, rel=1e-4)


def test_the_top_heads_beat_random_ones(curve):
    middle = curve.at(4)
    assert middle["faithfulness"] > middle["random_faithfulness"] + 0.1
    assert curve.random_margin.shape == (10, 5)


def test_one_circuit_by_hand(curve, toy_proxy, toy_task, toy_scores, toy_baseline):
    keep = set(toy_scores.top(4))
    hooks = {}
    for layer in range(2):

        def ablate(z, layer=layer):
            z = z.clone()
            for head in range(8):
                if cl.Head(layer, head) not in keep:
                    z[:, 1:, head] = toy_baseline.mean[layer, head]
            return z

        hooks[toy_proxy.z_hook(layer)] = ablate
    margins, right = [], []
    encoded = toy_task.encode(toy_proxy, toy_task.held_out)
    for index in range(len(encoded)):
        batch = encoded.batch([index])
        with torch.no_grad():
            logits = toy_proxy.logits(batch, hooks)
        margins.append(float(task_margin(logits, batch)))
        right.append(int(label_logits(logits, batch).argmax()) == encoded.gold[index])
    place = curve.sizes.index(4)
    assert curve.margin[place] == pytest.approx(np.mean(margins), rel=1e-3)
    assert curve.accuracy[place] == pytest.approx(np.mean(right), abs=0.006)


def test_keeping_all_heads_is_the_clean_model(toy_proxy, toy_task, toy_baseline):
    batch = toy_task.encode(toy_proxy, toy_task["test"][:4]).batch(range(4))
    keep = torch.ones(2, 8, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(
            ablated_logits(toy_proxy, batch, keep, toy_baseline), toy_proxy.logits(batch)
        )


def test_examples_that_discovery_saw_are_refused(toy_proxy, toy_task, toy_scores, toy_baseline):
    with pytest.raises(cl.InputError, match="was used for discovery"):
        cl.faithfulness(
            toy_proxy, toy_task, toy_scores, toy_baseline, examples=toy_task["pool_a"][:300]
        )


def test_impossible_sizes_are_refused(toy_proxy, toy_task, toy_scores, toy_baseline):
    with pytest.raises(cl.InputError, match="between 0 and 16"):
        cl.faithfulness(toy_proxy, toy_task, toy_scores, toy_baseline, sizes=[17])
    assert default_sizes(16)[0] == 0
    assert default_sizes(16)[-1] == 16


def test_saving_and_loading(tmp_path, curve):
    curve.save(tmp_path / "f.safetensors")
    again = cl.FaithfulnessCurve.load(tmp_path / "f.safetensors")
    assert again.to_frame().equals(curve.to_frame())
    assert again.provenance == curve.provenance
    assert "faithfulness" in again._repr_html_()
    with pytest.raises(cl.InputError, match=r"no size 5; it has \[0, 2, 4, 8, 16\]"):
        again.at(5)
