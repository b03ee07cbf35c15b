from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from frozen_oracle import Frozen
from helpers import ALL, batch_of, loaded, prompts, row, task_margin, tiny

import circuitlens as cl
from circuitlens.cdt import RULES, RuleSet, relevance_by_difference, relevance_by_gradient
from circuitlens.cdt.gradient import project
from circuitlens.models.batch import Batch
from circuitlens.node_means import NodeMeans
from circuitlens.utils.row_budget import RowBudget

DIFFERENCE = [name for name, rules in RULES.items() if rules.activation == "difference"]
GRADIENT = [name for name in RULES if name not in DIFFERENCE]


def score(model: cl.HookedModel, batch: Batch, mean, method: str | RuleSet, **options):
    rules = RULES[method] if isinstance(method, str) else method
    engine = relevance_by_difference if rules.activation == "difference" else relevance_by_gradient
    return engine(model, batch, NodeMeans.pooled(mean), rules, **options).heads.detach()


def means(model: cl.HookedModel) -> torch.Tensor:
    g = model.geometry
    torch.manual_seed(5)
    return 0.3 * torch.randn(g.n_layers, g.n_heads, g.d_head, dtype=model.dtype)


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("positions", ["all", "decision"])
@pytest.mark.parametrize(
    "rules",
    [
        RULES["cdt"],
        RULES["cdt-linear"],
        RuleSet("live scales", True, False, "difference"),
    ],
    ids=lambda rules: rules.name,
)
def test_relevance_is_that_of_the_frozen_network_written_out(name, positions, rules):
    model = loaded(name)
    batch, mean = row(batch_of(model, 7), 0), means(model)
    with torch.no_grad():
        oracle = Frozen(
            copy.deepcopy(model.hf),
            batch.input_ids,
            freeze_scales=rules.freeze_scales,
            linear=rules.activation == "secant",
        )
        first = 1 if positions == "all" else batch.input_ids.shape[1] - 1
        clean = task_margin(oracle.logits[None], batch)
        expected = torch.stack(
            [
                clean - task_margin(oracle.run(la, h, mean[la, h], first)[None], batch)
                for la in range(3)
                for h in range(4)
            ]
        ).reshape(3, 4)
    found = score(model, batch, mean, rules, positions=positions)[0]
    # Hugging Face's RMSNorm is float32 inside, whatever the dtype.
    tolerance = 1e-9 if name == "gpt2" else 2e-6
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert expected.abs().max() > 1e-3


def test_ablation_is_a_full_forward_with_the_mean_put_in():
    model = cl.load(tiny("gemma2"))
    batch, mean = batch_of(model, 8, 5), means(model)
    found = score(model, batch, mean, "ablation", positions="all+first")
    for index in range(2):
        alone = row(batch, index)
        for layer, head in ((0, 1), (2, 3)):

            def put(z, layer=layer, head=head):
                z = z.clone()
                z[:, :, head] = mean[layer, head]
                return z

            with torch.no_grad():
                clean = task_margin(model.logits(alone), alone)
                patched = task_margin(model.logits(alone, {model.z_hook(layer): put}), alone)
            torch.testing.assert_close(
                found[index, layer, head], (clean - patched)[0], rtol=1e-4, atol=1e-5
            )


def test_attribution_is_the_slope_of_the_margin():
    model = cl.load(tiny("gpt2"))
    batch, mean = batch_of(model, 6), means(model)
    found = score(model, batch, mean, "attribution", positions="all+first")[0]
    step = 1e-5
    for layer, head in ((0, 0), (1, 3), (2, 2)):
        margins = []
        for sign in (1, -1):

            def move(z, sign=sign, layer=layer, head=head):
                z = z.clone()
                z[:, :, head] += sign * step * (z[:, :, head] - mean[layer, head])
                return z

            with torch.no_grad():
                margins.append(task_margin(model.logits(batch, {model.z_hook(layer): move}), batch))
        slope = (margins[0] - margins[1])[0] / (2 * step)
        torch.testing.assert_close(found[layer, head], slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("method", list(RULES))
def test_batched_and_padded_scores_are_those_of_single_prompts(name, method):
    model = loaded(name)
    batch, mean = batch_of(model, 9, 5, 7), means(model)
    together = score(model, batch, mean, method)
    assert together.shape == (3, 3, 4)
    assert torch.isfinite(together).all()
    for index in range(3):
        alone = score(model, row(batch, index), mean, method)[0]
        torch.testing.assert_close(together[index], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", DIFFERENCE)
def test_the_number_of_rows_at_once_changes_nothing(method):
    model = cl.load(tiny("llama"))
    batch, mean = batch_of(model, 6, 6), means(model)
    one = score(model, batch, mean, method, budget=RowBudget(2))
    many = score(model, batch, mean, method, budget=RowBudget(64))
    torch.testing.assert_close(one, many, rtol=1e-10, atol=1e-12)


def test_frozen_patterns_matter_in_every_family():
    # If freezing were lost on the way (as an edit of the pattern is in OPT), cdt would be equal
    # to the same rules with live patterns.
    for name in ALL:
        model = loaded(name)
        batch, mean = batch_of(model, 8), means(model)
        frozen = score(model, batch, mean, RuleSet("a", True, False, "difference"))
        live = score(model, batch, mean, "ablation")
        assert (frozen - live)[:, :2].abs().max() > 1e-4 * live.abs().max(), name
        # Above the last layer's heads there is no further pattern, though there may be a router.
        if not model.family.routing(2, model.bridge.hook_dict):
            torch.testing.assert_close(frozen[:, 2], live[:, 2], rtol=1e-4, atol=1e-5)


def test_the_first_token_deviates_from_nothing_unless_asked_to():
    """It is an attention sink, whether the tokenizer puts ``<s>`` there or not."""
    model = cl.load(tiny("qwen2"))
    batch, mean = batch_of(model, 6), means(model)
    for n_prefix in (0, 1):
        prefixed = replace(batch, n_prefix=n_prefix)
        assert prefixed.mask("all")[0].tolist() == [False] + [True] * 5
        assert prefixed.mask("all+first")[0].all()
        assert prefixed.mask("decision")[0].tolist() == [False] * 5 + [True]
    for method in RULES:
        with_it = score(model, batch, mean, method, positions="all+first")
        assert (score(model, batch, mean, method) - with_it).abs().max() > 1e-6


@pytest.mark.parametrize("n_prefix", [0, 1, 2])
def test_the_first_token_is_found_behind_padding(n_prefix):
    batch = prompts(7, 4, 3, n_prefix=n_prefix)
    for positions in ("all", "all+first", "decision"):
        mask = batch.mask(positions)
        for index, length in enumerate((7, 4, 3)):
            alone = row(batch, index).mask(positions)[0]
            assert mask[index].tolist() == [False] * (7 - length) + alone.tolist()
            if positions == "all":
                assert alone.tolist() == [k >= max(n_prefix, 1) for k in range(length)]


def test_a_prompt_of_one_token_keeps_the_position_of_its_answer():
    batch = prompts(3, 1)
    assert batch.mask("all").tolist() == [[False, True, True], [False, False, True]]


def test_scoring_leaves_the_weights_trainable_and_without_gradients():
    model = cl.load(tiny("qwen2"))
    score(model, batch_of(model, 5), means(model), "cdt-linear")
    assert all(p.requires_grad and p.grad is None for p in model.hf.parameters())


def test_bfloat16_scores_are_close_to_float32():
    model = cl.load(tiny("qwen2", torch.float32))
    batch, mean = batch_of(model, 7, 7), means(model)
    exact = score(model, batch, mean, "cdt-linear")
    rough = cl.load(model.hf.to(torch.bfloat16))
    found = score(rough, batch, mean, "cdt-linear")
    assert found.dtype == torch.float32
    correlation = torch.corrcoef(torch.stack([exact.flatten(), found.flatten()]))[0, 1]
    assert correlation > 0.99


def test_nan_in_the_padding_reaches_no_relevance():
    model, batch = loaded("qwen2"), batch_of(loaded("qwen2"), 6, 4)
    g, where = model.geometry, batch.mask("all")
    generator = torch.Generator().manual_seed(0)

    def made_up(*size: int) -> torch.Tensor:
        return torch.randn(*batch.input_ids.shape, *size, generator=generator)

    names = {model.z_hook(layer): (g.n_heads, g.d_head) for layer in range(g.n_layers)}
    names |= {model.mlp_hook(layer): (g.d_model,) for layer in range(g.n_layers)}
    outputs, slopes = ({n: made_up(*size) for n, size in names.items()} for _ in range(2))
    mean = NodeMeans.pooled(means(model), torch.zeros(g.n_layers, g.d_model))
    clean = project(model, batch, outputs, slopes, mean, where, True, True)
    padding = batch.attention_mask == 0
    for values in (outputs, slopes):
        for value in values.values():
            value[padding] = torch.nan
    found = project(model, batch, outputs, slopes, mean, where, True, True)
    assert torch.equal(found.heads, clean.heads)
    assert torch.equal(found.mlps, clean.mlps)
    assert torch.equal(found.by_position, clean.by_position)
