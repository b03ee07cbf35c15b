"""What must not change a result, and what must change it in a known way."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import circuitlens as cl
from circuitlens.tasks import Task

N = 24
METHODS = ["cdt-linear", "cdt", "ablation", "attribution", "midpoint", "dla", "iterative"]


@pytest.fixture(scope="module")
def records(toy_task):
    return [
        {"id": e.id, "text": e.fields["text"], "label": e.label} for e in toy_task["pool_a"][:180]
    ]


def task_of(records, labels):
    return Task.from_records(
        records, template="{text} ->", labels=labels, id="id", share_a=0.7, language="source"
    )


def score(model, task, method="cdt-linear", **options):
    few = task["pool_a"][:N]
    baseline = cl.label_balanced_mean(model, task, examples=few, quiet=True, allow_chance=True)
    return cl.relevance(model, task, baseline, method=method, quiet=True, **options)


def same(a, b, **tolerance):
    tolerance = {"atol": 2e-4, "rtol": 1e-3, **tolerance}
    torch.testing.assert_close(a.mean, b.mean, **tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_labels_does_not_matter(toy_proxy, toy_task, records, method):
    words = dict(toy_task.labels)
    turned = dict(reversed(words.items()))
    same(
        score(toy_proxy, task_of(records, words), method),
        score(toy_proxy, task_of(records, turned), method),
    )


@pytest.mark.parametrize("method", ["cdt-linear", "ablation"])
def test_the_order_of_the_examples_does_not_matter(toy_proxy, toy_task, records, method):
    task = task_of(records, toy_task.labels)
    pools = replace(task.pools, pool_a=task["pool_a"][:N][::-1] + task["pool_a"][N:])
    same(score(toy_proxy, task, method), score(toy_proxy, replace(task, pools=pools), method))


def test_ids_only_say_where_an_example_goes(toy_proxy, toy_task, records):
    task = task_of(records, toy_task.labels)

    def renamed(pool):
        return tuple(replace(e, id=f"other-{e.id}", group=f"other-{e.group}") for e in pool)

    pools = replace(
        task.pools,
        **{name: renamed(task[name]) for name in ("pool_a", "pool_b", "validation", "test")},
    )
    same(score(toy_proxy, task), score(toy_proxy, replace(task, pools=pools)))


@pytest.mark.parametrize("method", METHODS)
def test_a_data_set_twice_is_the_data_set(toy_proxy, toy_task, records, method):
    task = task_of(records, toy_task.labels)
    few = task["pool_a"][:N]
    twice = replace(
        task.pools,
        pool_a=few + tuple(replace(e, id=f"again-{e.id}", group=f"again-{e.id}") for e in few),
    )
    doubled = replace(task, pools=twice)
    baseline = cl.label_balanced_mean(toy_proxy, doubled, quiet=True, allow_chance=True)
    found = cl.relevance(toy_proxy, doubled, baseline, method=method, quiet=True)
    same(found, score(toy_proxy, task, method))


def permuted(model, layer, order):
    """The same model with the heads of a layer in another order (groups stay together)."""
    twin = model.clone()
    attention = twin.hf.model.layers[layer].self_attn
    g = model.geometry
    size = g.d_head
    group = g.n_heads // (attention.k_proj.out_features // size)
    with torch.no_grad():
        queries = torch.cat([torch.arange(h * size, (h + 1) * size) for h in order])
        keys = [h // group for h in order][::group]
        pairs = torch.cat([torch.arange(h * size, (h + 1) * size) for h in keys])
        for name, rows in (("q_proj", queries), ("k_proj", pairs), ("v_proj", pairs)):
            linear = getattr(attention, name)
            linear.weight.copy_(linear.weight[rows].clone())
            if linear.bias is not None:
                linear.bias.copy_(linear.bias[rows].clone())
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, queries].clone())
    return twin


@pytest.mark.parametrize("method", METHODS)
def test_scores_follow_the_heads(toy_proxy, toy_task, records, method):
    task = task_of(records, toy_task.labels)
    # Pairs share their keys and values, so pairs change places, and heads within a pair.
    order = [5, 4, 0, 1, 7, 6, 2, 3]
    before = score(toy_proxy, task, method).mean
    after = score(permuted(toy_proxy, 1, order), task, method).mean
    torch.testing.assert_close(after[0], before[0], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(after[1], before[1][order], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_head_that_writes_nothing_scores_nothing(toy_proxy, toy_task, records, method):
    task = task_of(records, toy_task.labels)
    silent = toy_proxy.clone()
    size = toy_proxy.geometry.d_head
    with torch.no_grad():
        silent.hf.model.layers[0].self_attn.o_proj.weight[:, 3 * size : 4 * size] = 0
    found = score(silent, task, method)
    if found.whole:
        assert float(found.mean[0, 3]) < 0.9
    else:
        assert float(found.per_example[:, 0, 3].abs().max()) < 1e-4


@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(scale=st.floats(0.25, 4.0))
def test_scaled_logits_scale_the_scores(toy_proxy, toy_task, records, scale):
    """An untied unembedding, multiplied."""
    task = task_of(records, toy_task.labels)
    hf = copy.deepcopy(toy_proxy.hf)
    hf.config.tie_word_embeddings = False
    hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.detach() * scale)
    louder = cl.HookedModel(hf, toy_proxy.tokenizer, "louder")
    before, after = score(toy_proxy, task).mean, score(louder, task).mean
    torch.testing.assert_close(after, scale * before, atol=1e-3 * scale, rtol=1e-3)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_rounding_only(toy_proxy, toy_task, records, threads):
    task, usual = task_of(records, toy_task.labels), torch.get_num_threads()
    expected = score(toy_proxy, task)
    torch.set_num_threads(threads)
    try:
        same(score(toy_proxy, task), expected)
    finally:
        torch.set_num_threads(usual)


def test_faithfulness_does_not_know_names(toy_proxy, toy_task, toy_scores, toy_baseline):
    """A circuit of permuted heads in a permuted model keeps as much."""
    order = [5, 4, 0, 1, 7, 6, 2, 3]
    twin = permuted(toy_proxy, 1, order)
    few = toy_task["pool_a"][:60]
    own = cl.label_balanced_mean(twin, toy_task, examples=few, quiet=True)
    usual = cl.label_balanced_mean(toy_proxy, toy_task, examples=few, quiet=True)
    circuit = toy_scores.top(5)
    moved = cl.Circuit.of(
        [cl.Head(h.layer, order.index(h.index)) if h.layer == 1 else h for h in circuit],
        circuit.n_layers,
        circuit.n_heads,
    )
    options = {"n_random": 1, "quiet": True, "examples": toy_task["validation"][:80]}
    here = cl.faithfulness(toy_proxy, toy_task, circuit, usual, **options)
    there = cl.faithfulness(twin, toy_task, moved, own, **options)
    np.testing.assert_allclose(there.faithfulness, here.faithfulness, atol=1e-4)
    np.testing.assert_allclose(there.completeness, here.completeness, atol=1e-4)
