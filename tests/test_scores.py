from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import circuitlens as cl
from circuitlens.batch import task_margin


@pytest.mark.parametrize("method", list(cl.METHODS))
def test_every_method_scores_every_head_on_every_example(toy_proxy, toy_task, toy_baseline, method):
    scores = cl.relevance(toy_proxy, toy_task, toy_baseline, method=method, max_examples=40)
    assert scores.per_example.shape == (40, 2, 8)
    assert scores.method == method
    assert set(scores.example_ids) <= set(toy_baseline.example_ids)
    again = cl.relevance(
        toy_proxy, toy_task, toy_baseline, method=method, max_examples=40, batch_size=7
    )
    torch.testing.assert_close(again.per_example, scores.per_example, rtol=1e-3, atol=1e-4)


def test_ablation_scores_are_margin_lost(toy_proxy, toy_task, toy_baseline):
    scores = cl.relevance(toy_proxy, toy_task, toy_baseline, method="ablation", max_examples=6)
    by_id = {e.id: e for e in toy_task["pool_a"]}
    encoded = toy_task.encode(toy_proxy, [by_id[i] for i in scores.example_ids])
    for row in range(6):
        batch = encoded.batch([row])
        for layer, head in ((0, 3), (1, 6)):

            def put(z, layer=layer, head=head):
                z = z.clone()
                z[:, 1:, head] = toy_baseline.mean[layer, head]
                return z

            with torch.no_grad():
                lost = task_margin(toy_proxy.logits(batch), batch) - task_margin(
                    toy_proxy.logits(batch, {toy_proxy.z_hook(layer): put}), batch
                )
            torch.testing.assert_close(
                scores.per_example[row, layer, head], lost[0], rtol=1e-3, atol=1e-4
            )


def test_scores_of_a_rule_set_of_ones_own(toy_proxy, toy_task, toy_baseline):
    rules = cl.RuleSet("mine", False, True, "difference")
    scores = cl.relevance(toy_proxy, toy_task, toy_baseline, method=rules, max_examples=10)
    assert scores.method == "mine"
    named = cl.relevance(toy_proxy, toy_task, toy_baseline, method="cdt", max_examples=10)
    assert not torch.allclose(scores.per_example, named.per_example)


def test_unknown_methods_and_foreign_baselines_are_refused(toy_proxy, toy_task, toy_baseline):
    with pytest.raises(cl.InputError, match="no method 'magic'; known are cdt, cdt-linear"):
        cl.relevance(toy_proxy, toy_task, toy_baseline, method="magic")
    foreign = replace(toy_baseline, example_ids=("nowhere:1",))
    with pytest.raises(cl.InputError, match="'nowhere:1', which is not in pool A"):
        cl.relevance(toy_proxy, toy_task, foreign)


def test_the_random_method_follows_its_seed(toy_proxy, toy_task, toy_baseline):
    def draw(seed):
        return cl.relevance(toy_proxy, toy_task, toy_baseline, method="random", seed=seed).mean

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_the_frame_lists_heads_by_rank_with_intervals(toy_scores):
    frame = toy_scores.to_frame()
    assert frame["rank"].tolist() == list(range(1, 17))
    assert (np.diff(frame["relevance"]) <= 0).all()
    assert ((frame["low"] <= frame["relevance"]) & (frame["relevance"] <= frame["high"])).all()
    assert frame["head"].iloc[0] in toy_scores._repr_html_()
