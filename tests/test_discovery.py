from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import batch_of, loaded, node_means

import circuitlens as cl
from circuitlens.cdt import RULES
from circuitlens.scoring import discovery
from circuitlens.scoring.discovery import edges_by_difference, edges_by_gradient

TARGETS = [cl.Head(1, 2), cl.Head(2, 0), cl.Head(2, 3)]


@pytest.mark.parametrize("positions", ["all", "decision"])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mixtral", "bert"])
def test_edges_are_projections_of_beta_at_the_target(name, positions):
    model = loaded(name)
    batch, means = batch_of(model, 6, 6), node_means(model)
    where = batch.mask(positions)
    columns = where[0].nonzero()[:, 0].tolist()
    found = edges_by_difference(model, batch, means, RULES["cdt"], TARGETS, where)
    assert found.shape == (2, 3, 4, 3)
    z = model.head_outputs(batch)
    for k, target in enumerate(TARGETS):
        result = cl.decompose(
            model,
            batch.input_ids,
            [[(head, p) for p in columns] for head in (cl.Head(0, 1), cl.Head(1, 1))],
            means.heads.expand(-1, 6, -1, -1),
            "cdt",
            targets=[(target, p) for p in columns],
        )
        own = z[target.layer, :, columns, target.index] - means.heads[target.layer, 0, target.index]
        expected = (result.target_relevant * own).sum(-1) / own.norm(dim=-1)
        expected = expected.sum(-1)
        if target.layer == 1:
            expected[1] = 0  # not below the target
        mine = torch.stack([found[:, 0, 1, k], found[:, 1, 1, k]])
        torch.testing.assert_close(mine, expected.to(mine), rtol=1e-4, atol=1e-6)
    assert not found[:, 2].any()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_edges_by_gradient_are_those_of_the_linearised_network(name):
    model = loaded(name)
    batch, means = batch_of(model, 6, 4), node_means(model)
    rules, where = RULES["cdt-linear"], batch.mask("all")
    forward = edges_by_difference(model, batch, means, rules, TARGETS, where)
    backward = edges_by_gradient(model, batch, means, rules, TARGETS, where)
    torch.testing.assert_close(backward, forward, rtol=1e-4, atol=1e-6)
    assert forward.abs().max() > 1e-3


@pytest.fixture(scope="module")
def circuit(toy_proxy, toy_task, toy_baseline):
    return cl.discover(toy_proxy, toy_task, toy_baseline, depth=2, share=0.15, max_examples=40)


def test_level_one_are_the_top_heads_and_level_two_feeds_them(
    circuit, toy_proxy, toy_task, toy_baseline
):
    scores = cl.relevance(toy_proxy, toy_task, toy_baseline, max_examples=40)
    first = {head for head, level in circuit.levels.items() if level == 1}
    assert first == set(scores.top(2))
    second = [head for head, level in circuit.levels.items() if level == 2]
    targets = sorted(head for head in first if head.layer == 1)
    assert len(second) <= 2
    assert set(circuit.heads) == first | set(second)
    assert all(s.layer < t.layer and t in circuit and s in circuit for s, t in circuit.edges)
    for head in second:
        assert sum(circuit.edges[head, t] for t in targets) > 0
        # No head that was left out feeds the targets more.
    full = cl.discover(toy_proxy, toy_task, toy_baseline, depth=2, share=1.0, max_examples=40)
    feeds = {
        head: sum(full.edges.get((head, t), 0.0) for t in targets)
        for head in toy_proxy.geometry
        if head not in first
    }
    assert set(second) == set(sorted(feeds, key=feeds.__getitem__, reverse=True)[: len(second)])


def test_levels_and_edges_are_saved_and_tabled(circuit, tmp_path):
    circuit.save(tmp_path / "c.json")
    again = cl.Circuit.load(tmp_path / "c.json")
    assert again == circuit
    assert (again.levels, again.edges) == (circuit.levels, circuit.edges)
    assert set(circuit.to_frame().columns) == {"head", "layer", "index", "level"}
    assert len(circuit.edge_frame()) == len(circuit.edges)


@pytest.mark.parametrize("method", ["cdt", "ablation"])
def test_other_rule_sets_find_levels_too(toy_proxy, toy_task, toy_baseline, method):
    found = cl.discover(
        toy_proxy, toy_task, toy_baseline, share=0.4, method=method, max_examples=10
    )
    assert max(found.levels.values()) == 2
    assert found.edges


def test_impossible_searches_are_refused(toy_proxy, toy_task, toy_baseline):
    with pytest.raises(cl.InputError, match="depth is 0"):
        cl.discover(toy_proxy, toy_task, toy_baseline, depth=0)
    with pytest.raises(cl.InputError, match=r"between 0 and 1, but 2\.0 was given"):
        cl.discover(toy_proxy, toy_task, toy_baseline, share=2.0)
    with pytest.raises(cl.InputError, match="'greedy' cannot score one head's effect"):
        cl.discover(toy_proxy, toy_task, toy_baseline, method="greedy")


def test_the_next_level_are_the_heads_with_most_edge_score_over_all_targets(
    toy_proxy, toy_task, toy_baseline, toy_scores, monkeypatch
):
    g = toy_proxy.geometry
    targets = [cl.Head(1, 1), cl.Head(1, 4), cl.Head(1, 6)]
    values = torch.zeros_like(toy_scores.per_example)
    for head in targets:
        values[:, head.layer, head.index] = 1.0
    known = replace(toy_scores, per_example=values)

    def made_up(model, task, baseline, asked, *_):
        assert asked == targets
        scores = torch.zeros(g.n_layers, g.n_heads, len(asked))
        # Head 5 is ahead by its sum, head 2 by one of the targets.
        scores[0, 5], scores[0, 2, 0], scores[0, 7] = 1.0, 1.5, 0.9
        return scores

    monkeypatch.setattr(discovery, "relevance", lambda *_, **__: known)
    monkeypatch.setattr(discovery, "_edge_scores", made_up)
    found = cl.discover(toy_proxy, toy_task, toy_baseline, share=3 / len(g), quiet=True)
    second = {head for head, level in found.levels.items() if level == 2}
    assert second == {cl.Head(0, 5), cl.Head(0, 7), cl.Head(0, 2)}
    alone = cl.discover(toy_proxy, toy_task, toy_baseline, share=3 / len(g), depth=1, quiet=True)
    assert set(alone.levels) == set(targets)
    assert list(found.levels)[3:] == [cl.Head(0, 5), cl.Head(0, 7), cl.Head(0, 2)]
