"""The engine on every family, against whole forward passes with hooks written in the tests."""

from __future__ import annotations

import inspect
import logging
from dataclasses import replace

import pytest
import torch
from hand_frozen import HandFrozen, put
from helpers import ALL, MASKED, batch_of, loaded, node_means, row, task_margin, tiny, unchecked
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitlens as cl
from circuitlens.cdt import (
    RULES,
    FrozenNetwork,
    Source,
    relevance_along_path,
    relevance_by_difference,
    relevance_by_gradient,
)
from circuitlens.models.batch import margin
from circuitlens.scoring.scorers import Request, scorer
from circuitlens.utils.provenance import Provenance
from circuitlens.utils.row_budget import RowBudget

CAUSAL = [name for name in ALL if name not in MASKED]
HEADS = (cl.Head(0, 1), cl.Head(1, 3), cl.Head(2, 0))
# Norms are float32 inside, whatever the type; in float32 models everything is.
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


def patches_of(model, means, nodes, where):
    """Edits for :class:`HandFrozen` that set all ``nodes`` to their means."""
    edits = {}
    for node in nodes:
        if isinstance(node, cl.MLP):
            name, edit = model.mlp_hook(node.layer), put(where, means.mlps[node.layer, 0])
        else:
            name = model.z_hook(node.layer)
            edit = put(where, means.heads[node.layer, 0, node.index], node.index)
        before = edits.get(name)
        edits[name] = edit if before is None else (lambda x, a=before, b=edit: b(a(x)))
    return edits


@pytest.mark.parametrize("method", ["cdt", "cdt-linear"])
@pytest.mark.parametrize("positions", ["all", "decision"])
@pytest.mark.parametrize("name", ALL)
def test_relevance_is_what_a_patch_costs_in_the_frozen_network(name, positions, method):
    # The linearised network is linear, so that a step all the way to the mean is as good a
    # difference quotient as a small one.
    model = loaded(name)
    batch, means = batch_of(model, 7, 4), node_means(model)
    request = Request(positions=positions, mlps=True)
    found = scorer(method).batch(model, batch, means, request)
    oracle = HandFrozen(model, batch, linear=method == "cdt-linear")
    where = batch.mask(positions)
    for node in (*HEADS, cl.MLP(0), cl.MLP(1)):
        expected = oracle.lost(patches_of(model, means, [node], where))
        mine = (
            found.mlps[:, node.layer]
            if isinstance(node, cl.MLP)
            else found.heads[:, node.layer, node.index]
        )
        torch.testing.assert_close(mine, expected.to(mine), **CLOSE)
        assert expected.abs().max() > 1e-3, node


@pytest.mark.parametrize("mlps", [False, True], ids=["heads", "heads and MLPs"])
@pytest.mark.parametrize("name", ALL)
def test_direct_relevances_add_up_to_what_all_means_together_cost(name, mlps):
    model = loaded(name)
    batch, means = batch_of(model, 7, 4), node_means(model)
    found = relevance_by_gradient(
        model, batch, means, RULES["cdt-linear"], mlps=mlps, path="direct"
    )
    total = found.heads.sum((1, 2)) + (found.mlps.sum(1) if mlps else 0)
    nodes = [*model.geometry, *(cl.MLP(layer) for layer in range(3) if mlps)]
    oracle = HandFrozen(model, batch, linear=True)
    expected = oracle.lost(patches_of(model, means, nodes, batch.mask("all")))
    torch.testing.assert_close(total, expected.to(total), **CLOSE)
    # By total paths it is another sum.
    through = relevance_by_gradient(model, batch, means, RULES["cdt-linear"], mlps=mlps)
    assert (through.heads.sum((1, 2)) - found.heads.sum((1, 2))).abs().max() > 1e-3


@pytest.mark.parametrize("rules", ["cdt", "cdt-linear", "cdt-live", "ablation"])
@pytest.mark.parametrize("name", ALL)
def test_beta_and_gamma_add_up_to_the_activation_at_every_hook(name, rules):
    model = loaded(name)
    tokens = batch_of(model, 6, 6).input_ids
    g, means = model.geometry, node_means(model)
    by_position = means.heads.expand(-1, 6, -1, -1)
    found = cl.decompose(
        model,
        tokens,
        [[(cl.Head(0, 1), None), (cl.MLP(1), 3)], [(cl.Head(2, 3), -1)], []],
        by_position,
        rules,
        targets=[(cl.Head(2, 3), -1), (cl.Head(1, 0), 4)],
        mlp_means=means.mlps.expand(-1, 6, -1),
        hooks="all",
    )
    assert found.check() < 1e-5
    assert len(found.activations) >= 4 * g.n_layers + 1
    # At a source γ is the mean; nothing is relevant below it, nor anywhere without a source.
    gamma = found.irrelevant_at(model.z_hook(0))[0, :, :, 1]
    torch.testing.assert_close(gamma, means.heads[0, :, 1].expand_as(gamma), **CLOSE)
    torch.testing.assert_close(found.target_irrelevant[1, 0, 0], means.heads[2, 0, 3], **CLOSE)
    assert not found.activations_relevant[f"blocks.{1}.hook_in"][1].any()
    assert not found.relevant[2].any()
    assert all(not beta[2].any() for beta in found.activations_relevant.values())
    assert found.target_relevant[0, :, 1].abs().max() > 1e-6


def test_check_notices_totals_that_are_not_the_models():
    model = loaded("llama")
    tokens = batch_of(model, 6).input_ids
    means = node_means(model).heads.expand(-1, 6, -1, -1)
    found = cl.decompose(model, tokens, [[(cl.Head(0, 1), 2)]], means, "cdt", hooks="all")
    assert found.check(1e-5) < 1e-5
    spoilt = {**found.activations, model.mlp_hook(1): found.activations[model.mlp_hook(1)] * 1.01}
    with pytest.raises(cl.CircuitLensError, match=r"at blocks\.1\.mlp\.out\.hook_out by \d"):
        replace(found, activations=spoilt).check()
    with pytest.raises(cl.InputError, match="was not kept"):
        found.irrelevant_at("blocks.0.ln1.hook_in")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decompositions_in_16_bits_add_up_within_their_rounding(dtype):
    model = loaded("qwen2", dtype)
    tokens = batch_of(model, 6).input_ids
    means = node_means(model).heads.expand(-1, 6, -1, -1)
    found = cl.decompose(model, tokens, [[(cl.Head(0, 1), None)]], means, "cdt", hooks="all")
    assert 1e-5 < found.check() < 5e-2
    too_far = 6e4 * torch.ones_like(means)
    burst = cl.decompose(model, tokens, [[(cl.Head(0, 1), None)]], too_far, "cdt", hooks="all")
    if dtype == torch.float16:
        with pytest.raises(cl.CircuitLensError, match=r"β is not finite at .* load the model with"):
            burst.check()


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "mixtral", "bert"])
def test_source_sets_of_any_nodes_at_any_positions(name):
    model = loaded(name)
    batch = batch_of(model, 6)
    means = node_means(model)
    sets = [
        [(cl.Head(0, 0), 1), (cl.Head(2, 3), 4), (cl.MLP(0), 2)],
        [(cl.MLP(1), None)],
        [(cl.Head(1, 2), -1)],
    ]
    found = cl.decompose(
        model,
        batch.input_ids,
        sets,
        means.heads.expand(-1, 6, -1, -1),
        "cdt",
        mlp_means=means.mlps.expand(-1, 6, -1),
        batch_size=2,
    )
    plain = replace(batch, n_suffix=0)
    oracle = HandFrozen(model, plain)
    for k, sites in enumerate(sets):
        edits = {}
        for node, position in sites:
            where = torch.zeros(1, 6, dtype=torch.bool)
            where[:, slice(None) if position is None else position] = True
            edits |= patches_of(model, means, [node], where)
        expected = oracle.lost(edits)
        mine = task_margin(found.relevant[k], plain)
        torch.testing.assert_close(mine, expected.to(mine), **CLOSE)
    assert found.check() < 1e-4


def baseline_of(model: cl.HookedModel, n_pos: int) -> cl.MeanBaseline:
    """Means by hand, of ``n_pos`` single positions too."""
    g, means = model.geometry, node_means(model)
    return cl.MeanBaseline(
        means.heads[:, 0],
        means.mlps[:, 0],
        "all",
        ("a",),
        {"positive": 1},
        1.0,
        Provenance(model.name, model.fingerprint(), "task", "data", 0),
        torch.randn(n_pos, g.n_layers, g.n_heads, g.d_head, dtype=model.dtype),
        torch.randn(n_pos, g.n_layers, g.d_model, dtype=model.dtype),
    )


def test_a_baseline_gives_the_means_of_heads_and_mlps():
    model = loaded("gpt2")
    tokens, baseline = batch_of(model, 6, 6).input_ids, baseline_of(model, 4)
    # The prompts are longer than the positions that have means of their own.
    heads, mlps = (
        torch.cat([mean.expand(2, *mean.shape), at]).transpose(0, 1)
        for mean, at in (
            (baseline.mean, baseline.by_position),
            (baseline.mlp_mean, baseline.mlp_by_position),
        )
    )
    sets = [[(cl.Head(0, 1), None), (cl.MLP(1), 2)], [(cl.Head(2, 0), -1)]]
    found = cl.decompose(model, tokens, sets, baseline)
    expected = cl.decompose(model, tokens, sets, heads, "cdt", mlp_means=mlps)
    assert torch.equal(found.relevant, expected.relevant)
    assert found.relevant.abs().max() > 1e-3
    zero = torch.zeros_like(mlps)
    found = cl.decompose(model, tokens, sets, baseline, mlp_means=zero)
    expected = cl.decompose(model, tokens, sets, heads, "cdt", mlp_means=zero)
    assert torch.equal(found.relevant, expected.relevant)
    published = cl.decompose(model, tokens, sets[1:], baseline, "hsu2024")
    expected = cl.decompose(model, tokens, sets[1:], heads, "hsu2024")
    assert torch.equal(published.relevant, expected.relevant)
    assert repr(published) == (
        "Decomposition(1 source sets on 2 prompts: logits of 97 tokens, 0 targets, 0 activations)"
    )
    with pytest.raises(cl.InputError, match="taken from other weights than"):
        cl.decompose(loaded("qwen2"), tokens, sets, baseline)
    with pytest.raises(cl.InputError, match=r"source m1 is an MLP, .* give mlp_means= too"):
        cl.decompose(model, tokens, sets, heads)


_nodes = st.one_of(
    st.builds(cl.Head, st.integers(0, 2), st.integers(0, 3)), st.builds(cl.MLP, st.integers(0, 2))
)
_sets = st.lists(st.tuples(_nodes, st.one_of(st.none(), st.integers(-6, 5))), max_size=5)


@settings(max_examples=25, deadline=None)
@given(sites=_sets, linear=st.booleans())
def test_any_source_set_is_a_patch_of_the_frozen_network(sites, linear):
    model = loaded("llama")
    batch, means = batch_of(model, 6), node_means(model)
    found = cl.decompose(
        model,
        batch.input_ids,
        [sites],
        means.heads.expand(-1, 6, -1, -1),
        "cdt-linear" if linear else "cdt",
        mlp_means=means.mlps.expand(-1, 6, -1),
    )
    oracle = HandFrozen(model, batch, linear=linear)
    edits = {}
    for node, position in sites:
        where = torch.zeros(1, 6, dtype=torch.bool)
        where[:, slice(None) if position is None else position] = True
        for name, edit in patches_of(model, means, [node], where).items():
            before = edits.get(name, lambda x: x)
            edits[name] = lambda x, a=before, b=edit: b(a(x))
    expected = oracle.lost(edits)
    mine = task_margin(found.relevant[0], batch)
    torch.testing.assert_close(mine, expected.to(mine), **CLOSE)


@pytest.mark.parametrize("name", CAUSAL)
def test_columns_that_beta_cannot_reach_are_not_computed(name, monkeypatch):
    model = loaded(name)
    batch, means = batch_of(model, 7, 5), node_means(model)
    only = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
    only[:, 4] = True
    sets = [[Source(cl.Head(0, 2), only)], [Source(cl.Head(1, 1), only)]]
    whole = FrozenNetwork(model, batch, RULES["cdt"])
    expected, _ = whole.patched(sets, means)
    network = FrozenNetwork(model, batch, RULES["cdt"], reach=only)
    assert network.batch.input_ids.shape == (2, 3)
    found, _ = network.patched(sets, means)
    torch.testing.assert_close(network.labels, whole.labels, **CLOSE)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (found - network.labels).abs().max() > 1e-4


@pytest.mark.parametrize("method", ["cdt", "cdt-linear", "attribution", "midpoint", "dla"])
def test_positions_one_by_one_are_those_of_single_sources(method):
    model = loaded("qwen2")
    batch, means = batch_of(model, 6, 4), node_means(model)
    request = Request(by_position=True, mlps=True)
    found = scorer(method).batch(model, batch, means, request)
    assert found.by_position.shape == (2, 6, 3, 4)
    assert found.mlps.shape == (2, 3)
    assert not found.by_position[1, :2].any()
    if method != "cdt":  # a sum of positions only where everything is linear
        torch.testing.assert_close(found.by_position.sum(1), found.heads, rtol=1e-6, atol=1e-9)
        return
    only = torch.zeros(2, 6, dtype=torch.bool)
    only[:, 3] = True
    expected = HandFrozen(model, batch).lost(patches_of(model, means, [cl.Head(1, 1)], only))
    torch.testing.assert_close(found.by_position[:, 3, 1, 1], expected, **CLOSE)


def test_mlps_are_nodes_of_exact_ablation_and_attribution():
    model = loaded("gpt2")
    batch, means = batch_of(model, 6, 4), node_means(model)
    where = batch.mask("all")
    exact = scorer("ablation").batch(model, batch, means, Request(mlps=True))
    slope = scorer("attribution").batch(model, batch, means, Request(mlps=True))
    for layer in range(3):
        name = model.mlp_hook(layer)
        mean = means.mlps[layer, 0]
        with torch.no_grad():
            clean = task_margin(model.logits(batch), batch)
            ablated = task_margin(model.logits(batch, {name: put(where, mean)}), batch)
        torch.testing.assert_close(exact.mlps[:, layer], clean - ablated, **CLOSE)

        def move(out, sign, mean=mean):
            return torch.where(where[..., None], out + sign * 1e-5 * (out - mean), out)

        with torch.no_grad():
            up, down = (
                task_margin(model.logits(batch, {name: lambda x, s=s, f=move: f(x, s)}), batch)
                for s in (1, -1)
            )
        torch.testing.assert_close(slope.mlps[:, layer], (up - down) / 2e-5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mlps", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "bert"])
def test_integrated_gradients_are_complete(name, mlps):
    model = loaded(name)
    batch, means = batch_of(model, 6, 4), node_means(model)
    found = relevance_along_path(model, batch, means, steps=100, mlps=mlps)
    total = found.heads.sum((1, 2)) + (found.mlps.sum(1) if mlps else 0)
    nodes = [*model.geometry, *(cl.MLP(layer) for layer in range(3) if mlps)]
    edits = patches_of(model, means, nodes, batch.mask("all"))
    with torch.no_grad():
        lost = task_margin(model.logits(batch), batch) - task_margin(
            model.logits(batch, edits), batch
        )
    torch.testing.assert_close(total, lost, rtol=2e-3, atol=2e-3)
    one = scorer("midpoint").batch(model, batch, means, Request(mlps=mlps))
    again = relevance_along_path(model, batch, means, steps=1, mlps=mlps)
    torch.testing.assert_close(one.heads, again.heads)
    with pytest.raises(cl.InputError, match="at least one step, but steps is 0"):
        relevance_along_path(model, batch, means, steps=0)


def test_direct_logit_attribution_by_hand():
    model = loaded("llama")
    batch, means = batch_of(model, 6), node_means(model)
    seen = {}
    with torch.no_grad():
        model.logits(batch, {"ln_final.hook_scale": lambda s: seen.__setitem__(0, s)})
        z = model.head_outputs(batch)[:, 0, -1]
        found = scorer("dla").batch(model, batch, means, Request())
        unembedding = model.hf.lm_head.weight[list(batch.readout.tokens)]
        for head in HEADS:
            out = (z[head.layer, head.index] - means.heads[head.layer, 0, head.index]) @ (
                model.geometry.output_weight(model.hf, head)
            )
            logits = unembedding @ (out / seen[0][0, -1] * model.hf.model.norm.weight)
            expected = margin(logits[None], batch.gold)[0]
            mine = found.heads[0, head.layer, head.index]
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-7)


def test_the_published_rules_score_padded_prompts():
    model = loaded("gpt2")
    batch, means = replace(batch_of(model, 6, 4), n_prefix=1), node_means(model)
    found = scorer("hsu2024").batch(model, batch, means, Request())
    for index in range(2):
        alone = row(batch, index)
        n = alone.input_ids.shape[1]
        result = cl.decompose(
            model,
            alone.input_ids,
            [[(cl.Head(1, 2), p) for p in range(1, n)]],
            means.heads.expand(-1, n, -1, -1),
            "hsu2024",
        )
        expected = task_margin(result.relevant[0], alone)[0]
        torch.testing.assert_close(found.heads[index, 1, 2], expected)
    with pytest.raises(cl.UnsupportedModelError, match="needs a GPT2LMHeadModel"):
        scorer("hsu2024").batch(loaded("llama"), batch, means, Request())


def test_greedy_takes_the_cheapest_head_away_each_time():
    model = loaded("qwen2")
    batch, means = batch_of(model, 6, 4), node_means(model)
    found = scorer("greedy").whole(model, [batch], means, Request()).heads
    where, left, expected = batch.mask("all"), list(model.geometry), []
    gone: list[cl.Head] = []
    while left:
        kept = []
        for head in left:
            edits = patches_of(model, means, [*gone, head], where)
            with torch.no_grad():
                kept.append(float(task_margin(model.logits(batch, edits), batch).sum()))
        cheapest = left[max(range(len(left)), key=kept.__getitem__)]
        left.remove(cheapest)
        gone.append(cheapest)
        expected.append(cheapest)
    order = [cl.Head(int(i) // 4, int(i) % 4) for i in found.flatten().argsort()]
    assert order == expected


def test_running_out_of_memory_halves_the_rows_and_says_so(monkeypatch, caplog):
    model = cl.load(loaded("llama").hf)
    batch, means = batch_of(model, 6, 6), node_means(model)
    expected = relevance_by_difference(model, batch, means, RULES["cdt"]).heads
    original = model.label_logits

    def small(rows, hooks=None):
        if len(rows) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(rows, hooks)

    monkeypatch.setattr(model, "label_logits", small)
    budget = RowBudget(64)
    with caplog.at_level(logging.WARNING):
        found = relevance_by_difference(model, batch, means, RULES["cdt"], budget=budget).heads
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert budget.rows == 4
    assert "continuing with 4 rows at once" in caplog.text


def test_what_a_scorer_cannot_do_is_refused():
    with pytest.raises(cl.InputError, match=r"greedy cannot do mlps=True; these can: cdt, "):
        scorer("greedy").check(Request(mlps=True))
    with pytest.raises(cl.InputError, match="cdt cannot do path='direct'; these can: cdt-linear"):
        scorer("cdt").check(Request(path="direct"))
    model = loaded("llama")
    tokens, means = batch_of(model, 6).input_ids, node_means(model).heads.expand(-1, 6, -1, -1)
    for misspelt in ({"path": "dircet"}, {"positions": "last"}):
        with pytest.raises(cl.InputError, match=r"='\w+' is unknown: choose one of \w+, "):
            unchecked(Request, **misspelt)
    with pytest.raises(cl.InputError, match="path='dircet' is unknown: choose one of total, dire"):
        inspect.unwrap(relevance_by_gradient)(
            model, batch_of(model, 6), node_means(model), RULES["cdt-linear"], path="dircet"
        )
    with pytest.raises(cl.InputError, match="uses gradients, which give relevances"):
        cl.decompose(model, tokens, [[]], means, "attribution")


def test_rule_sets_that_make_no_sense_or_take_a_name_are_refused():
    for fields, words in (
        (("x", True, True, "differnce"), r"activation='differnce' is unknown: .* difference, grad"),
        (("x", True, "no", "secant"), r"freeze_scales of a rule set must be .* but is 'no'"),
        (("", True, True, "secant"), "name of a rule set must be a string, but is ''"),
    ):
        with pytest.raises(cl.InputError, match=words):
            unchecked(cl.RuleSet, *fields)
    # Tables and files know a method by its name only.
    for name in ("cdt", "ablation", "greedy", "hsu2024"):
        with pytest.raises(cl.InputError, match=f"already is a method '{name}'"):
            scorer(cl.RuleSet(name, True, False, "secant"))
    assert scorer(replace(RULES["cdt"])) is scorer("cdt")
    assert scorer(replace(RULES["cdt"], name="mine", freeze_scales=False)).name == "mine"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_an_activation_that_is_not_the_configured_one_is_seen_in_every_type(name, dtype):
    model = cl.load(tiny(name, dtype))
    batch = batch_of(model, 8, 5)
    means = node_means(model)
    score(model, batch, means)
    config = model.hf.config
    for key in ("hidden_activation", "hidden_act"):
        if hasattr(config, key):
            setattr(config, key, "gelu" if getattr(config, key) == "silu" else "silu")
    with pytest.raises(cl.UnsupportedModelError, match="with the configured activation"):
        score(model, batch, means)


def score(model, batch, means):
    return relevance_by_gradient(model, batch, means, RULES["cdt-linear"])
