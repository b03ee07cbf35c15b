from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import ALL, CONFIGS, MASKED, batch_of, loaded
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

import circuitlens as cl

MOE = {"mixtral": [0, 1, 2], "qwen3_moe": [0, 2]}


def values(model: cl.HookedModel, batch, *names: str) -> dict[str, torch.Tensor]:
    seen = {}
    hooks = {name: partial(lambda name, x: seen.update({name: x}), name) for name in names}
    with torch.no_grad():
        seen["logits"] = model.logits(batch, hooks)
    return seen


def replaced(model: cl.HookedModel, batch, hooks) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(batch, hooks)


def other(x: torch.Tensor) -> torch.Tensor:
    # Not a multiple: norms do not feel that.
    return x.flip(-1)


def far(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-5)


@pytest.mark.parametrize("name", ALL)
def test_patterns_times_values_are_z(name):
    model = loaded(name)
    batch = batch_of(model, 8, 5)
    for layer in range(3):
        pattern, v = f"blocks.{layer}.attn.hook_pattern", f"blocks.{layer}.attn.v.hook_out"
        seen = values(model, batch, pattern, v, model.z_hook(layer))
        z = seen[model.z_hook(layer)]
        heads = seen[v].reshape(*z.shape[:2], -1, z.shape[-1])
        heads = heads.repeat_interleave(4 // heads.shape[2], dim=2)
        expected = torch.einsum("bhqk,bkhd->bqhd", seen[pattern], heads)
        tokens = batch.attention_mask.bool()
        torch.testing.assert_close(expected[tokens], z[tokens], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_edits_of_heads_and_mlps_reach_the_logits(name):
    model = loaded(name)
    batch = batch_of(model, 7, 7)
    clean = replaced(model, batch, {})
    for layer in range(3):
        for hook in (model.z_hook(layer), model.mlp_hook(layer)):
            assert far(replaced(model, batch, {hook: other}), clean), hook


@pytest.mark.parametrize("name", ALL)
def test_the_output_of_an_mlp_is_what_its_last_map_returns(name):
    model = loaded(name)
    for layer in range(3):
        mlp = f"blocks.{layer}.mlp"
        last = [f"{mlp}.{part}.hook_out" for part in ("out", "dense_out", "experts")]
        (last,) = (hook for hook in last if hook in model.bridge.hook_dict)
        seen = values(model, batch_of(model, 6, 6), model.mlp_hook(layer), last)
        assert seen[model.mlp_hook(layer)].shape == (2, 6, 32)
        assert torch.equal(seen[model.mlp_hook(layer)].flatten(), seen[last].flatten())


@pytest.mark.parametrize("name", ALL)
def test_norm_scales_can_be_held(name):
    model = loaded(name)
    batch = batch_of(model, 7, 5)
    scales = [n for n in model.bridge.hook_dict if n.endswith(".hook_scale")]
    if name == "modernbert":
        # In place of the first layer's norm stands nothing.
        scales.remove("blocks.0.ln1.hook_scale")
    assert len(scales) >= 4
    seen = values(model, batch, *scales)
    for hook in scales:
        assert far(replaced(model, batch, {hook: lambda x: 2 * x}), seen["logits"]), hook
    held = {hook: lambda _, hook=hook: seen[hook] + 0 for hook in scales}
    torch.testing.assert_close(replaced(model, batch, held), seen["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_all_activations_have_hooks_that_count(name):
    model = loaded(name)
    batch = batch_of(model, 7, 7)
    sites = model.activations()
    assert len(sites) == (4 if name in MASKED else 3)
    config = model.hf.config
    kinds = ("hidden_activation", "hidden_act", "activation_function", "activation")
    kind = next((k for k in (getattr(config, name, None) for name in kinds) if k), "gelu_new")
    # BLOOM computes that approximation in its own code.
    activation = ACT2FN["gelu_new" if name == "bloom" else kind]
    for site in sites:
        hooks = [hook for hook in (site.up, site.gate, site.post) if hook is not None]
        seen = values(model, batch, *hooks)
        for hook in hooks:
            assert far(replaced(model, batch, {hook: other}), seen["logits"]), hook
        if site.gate is None:
            expected = activation(seen[site.up])
        else:
            expected = activation(seen[site.gate]) * seen[site.up]
        torch.testing.assert_close(expected, seen[site.post], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_only_experts_are_routed(name):
    model = loaded(name)
    hooks = model.bridge.hook_dict
    routed = [layer for layer in range(3) if model.family.routing(layer, hooks)]
    assert routed == MOE.get(name, [])


@pytest.mark.parametrize("name", MOE)
def test_hooked_experts_are_those_of_hugging_face(name):
    model = loaded(name)
    theirs = model.hf.model.layers[2].mlp.experts
    ours = model.bridge.blocks[2].mlp.experts
    assert type(theirs).__name__.endswith("Experts")
    assert type(theirs) is not type(ours)
    hidden = torch.randn(6, 32, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    # Expert 3 is chosen by no token.
    index = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [2, 1], [1, 0]])
    inputs = [hidden, weights, theirs.gate_up_proj, theirs.down_proj]
    outputs = [experts(hidden, index, weights) for experts in (theirs, ours)]
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in outputs]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MOE)
def test_routing_can_be_held(name):
    model = loaded(name)
    batch, other = batch_of(model, 7, 7), batch_of(model, 7, 7, seed=2)
    routing = model.family.routing(2, model.bridge.hook_dict)
    index, weights = routing
    experts = model.hf.model.layers[2].mlp.experts
    inside, out = "blocks.2.mlp.experts.hook_in", "blocks.2.mlp.experts.hook_out"
    clean = values(model, batch, *routing)
    live = values(model, other, *routing, inside, out)
    assert clean[index].shape == clean[weights].shape == (14, 2)
    assert not torch.equal(clean[index], live[index])
    held = {}
    hooks = {name: lambda _, name=name: clean[name] for name in routing}
    logits = replaced(model, other, {**hooks, out: lambda x: held.update({out: x})})
    with torch.no_grad():
        expected = experts(live[inside], clean[index], clean[weights])
    torch.testing.assert_close(held[out], expected, rtol=1e-9, atol=1e-12)
    assert far(logits, live["logits"])


@pytest.mark.parametrize("name", sorted(MASKED))
def test_positions_are_those_that_masked_models_count_themselves(name):
    model = loaded(name)
    batch = batch_of(model, 8)
    tolerance = 1e-9 if model.dtype == torch.float64 else 1e-5
    with torch.no_grad():
        own = model.hf(input_ids=batch.input_ids).logits[:, -2]
    torch.testing.assert_close(model.hf_logits(batch), own, rtol=tolerance, atol=tolerance)


def test_masked_models_see_both_ways_and_causal_ones_do_not():
    for name in ("bert", "qwen2"):
        model = loaded(name)
        assert model.family.causal == (name == "qwen2")
        seen = values(model, batch_of(model, 6), "blocks.0.attn.hook_pattern")
        later = seen["blocks.0.attn.hook_pattern"].triu(1)
        assert bool(later.any()) == (name == "bert")


@pytest.mark.parametrize(
    "options",
    [
        # Falcon 2: one norm for attention and MLP.
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        # One key/value head for each query.
        {"new_decoder_architecture": True, "multi_query": False},
        {"multi_query": True, "parallel_attn": False},
        {"multi_query": True, "alibi": True},
    ],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_falcon_agrees_with_hugging_face(options, attention):
    config = CONFIGS["falcon_mq"]()
    for key, value in options.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double()
    model = cl.load(hf)
    batch = batch_of(model, 8, 5)
    torch.testing.assert_close(
        replaced(model, batch, {}), model.hf_logits(batch).detach(), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", ["falcon_new", "falcon_mq", "gpt_neox"])
def test_outputs_of_parallel_branches_sum_to_the_block_s(name):
    # Falcon adds one to the other in place, which must not change what a hook has seen.
    model = loaded(name)
    names = ["blocks.1.hook_in", "blocks.1.attn.o.hook_out", model.mlp_hook(1)]
    seen = values(model, batch_of(model, 6, 6), *names, "blocks.1.hook_out")
    total = sum(seen[name] for name in names)
    torch.testing.assert_close(total, seen["blocks.1.hook_out"], rtol=1e-9, atol=1e-9)
