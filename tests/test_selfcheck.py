from __future__ import annotations

import pytest
import torch
import transformers as hf
from helpers import CONFIGS, tiny
from transformers import AutoModelForCausalLM

import circuitlens as cl
from circuitlens.models import families, selfcheck
from circuitlens.models.hooked import HookedModel

RIGHT = HookedModel.unlabelled

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
UNTESTED = {
    "gemma": lambda: hf.GemmaConfig(**SIZES, head_dim=8),
    "phi": lambda: hf.PhiConfig(**SIZES),
    "stablelm": lambda: hf.StableLmConfig(**SIZES),
}


def build(config: hf.PretrainedConfig, dtype: torch.dtype = torch.float32) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype)


def test_the_types_said_to_be_tested_are():
    assert {make().model_type for make in CONFIGS.values()} == set(
        families.tested_types().split(", ")
    )


@pytest.mark.parametrize("name", UNTESTED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_types_are_taken_if_their_hooks_are_right(name, dtype):
    config = UNTESTED[name]()
    assert not families.is_tested(config)
    model = cl.load(build(config, dtype))
    assert len(model.geometry) == 4


def test_experts_of_other_types_are_refused():
    config = hf.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2)
    with pytest.raises(cl.UnsupportedModelError, match=r"type olmoe.*there is no hook blocks\.0"):
        cl.load(build(config))


@pytest.mark.parametrize(
    ("part", "broken", "message"),
    [
        ("hf_logits", lambda self, batch: self.logits(batch) + 1, "the logits of Hugging Face"),
        ("hf_logits", lambda self, batch: self.logits(batch) * torch.nan, "of Hugging Face"),
        ("unlabelled", None, "padding changes the logits"),
        ("z_hook", lambda layer: f"blocks.{layer}.attn.q.hook_out", "not the pattern times the"),
        ("z_hook", lambda layer: f"blocks.{layer}.attn.nothing", "no hook blocks.0.attn.nothing"),
    ],
)
def test_what_is_wrong_is_named(monkeypatch, part, broken, message):
    model = cl.load(build(UNTESTED["phi"]()))
    if part == "unlabelled":
        right = model.unlabelled
        # Of the prompts, the one without padding gets another token.
        broken = lambda tokens: right(tokens + (len(tokens) == 1))  # noqa: E731
        monkeypatch.setattr(model, "unlabelled", broken)
    elif part == "z_hook":
        monkeypatch.setattr(type(model), part, staticmethod(broken))
    else:
        monkeypatch.setattr(type(model), part, broken)
    with pytest.raises(cl.UnsupportedModelError, match=f"PhiForCausalLM.*bert, bloom.*{message}"):
        selfcheck.check_hooks(model)


def test_heads_that_cannot_be_replaced_are_found(monkeypatch):
    model = cl.load(build(UNTESTED["phi"]()))
    right = model.logits
    monkeypatch.setattr(model, "logits", lambda b, h=None: right(b, h if len(h or {}) > 1 else {}))
    with pytest.raises(cl.UnsupportedModelError, match="heads of layer 0 changes nothing"):
        selfcheck.check_hooks(model)


def configured(name: str, dtype: torch.dtype = torch.float32, **options) -> hf.PreTrainedModel:
    """A tiny model of a tested type with other options."""
    config = CONFIGS[name]()
    for key, value in options.items():
        setattr(config, key, value)
    return build(config, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"add_cross_attention": True}),
        ("gemma3", {"attn_logit_softcapping": 50.0}),
        ("gemma3", {"use_bidirectional_attention": True}),
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"_remove_final_layer_norm": True}),
        # Its last norm would have no hooks.
        ("opt", {"word_embed_proj_dim": 16}),
    ],
)
def test_options_that_the_hooked_view_would_not_have_are_refused(name, options, dtype):
    (option,) = options
    with pytest.raises(cl.UnsupportedModelError, match=f"{option}.*: use a checkpoint"):
        cl.load(configured(name, dtype, **options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"reorder_and_upcast_attn": True}),
        # OPT-350m.
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    ],
)
def test_unusual_options_that_are_right_are_taken(name, options):
    cl.load(configured(name, **options))


def test_options_of_tested_types_that_nobody_thought_of_are_found():
    hf_model = configured("bloom", slow_but_exact=True, pretraining_tp=2)
    # Random weights make it differ.
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with pytest.raises(cl.UnsupportedModelError, match=r"does not give.*type bloom with usual"):
        cl.load(hf_model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("part", "broken", "message"),
    [
        ("hf_logits", lambda self, batch: 2 * self.logits(batch), "of Hugging Face"),
        ("unlabelled", lambda self, tokens: RIGHT(self, tokens + (len(tokens) == 1)), "padding"),
        ("logits", lambda self, batch, hooks=None: 1 / 0, "division by zero"),
    ],
)
def test_tested_types_are_compared_with_hugging_face(monkeypatch, part, broken, message, dtype):
    monkeypatch.setattr(HookedModel, part, broken)
    with pytest.raises(cl.UnsupportedModelError, match=message) as caught:
        cl.load(tiny("qwen2", dtype))
    assert ("load it in float32" in str(caught.value)) == (dtype is torch.bfloat16)


def test_weights_that_overflow_are_not_the_fault_of_hooks():
    model = tiny("qwen2", torch.float32)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    cl.load(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_experts_chosen_by_rounding_do_not_hide_a_fault(monkeypatch, dtype):
    cl.load(tiny("mixtral", dtype))
    monkeypatch.setattr(HookedModel, "hf_logits", lambda self, batch: 1.2 * self.logits(batch))
    with pytest.raises(cl.UnsupportedModelError, match="of Hugging Face"):
        cl.load(tiny("mixtral", dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_check_passes_in_16_bits_and_leaves_the_attention_as_it_was(name, dtype):
    model = tiny(name, dtype)
    own = model.config._attn_implementation
    cl.load(model)
    assert model.config._attn_implementation == own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_wrong_scale_of_attention_is_found_in_16_bits_too(monkeypatch, dtype):
    # As if nobody had thought of this option.
    monkeypatch.setattr(selfcheck, "refuse_misread", lambda hf: None)
    model = configured("gpt2", dtype, scale_attn_weights=False)
    with torch.no_grad():
        # Random attention is so even that its scale does not matter.
        for block in model.transformer.h:
            block.attn.c_attn.weight.mul_(30)
            block.attn.c_proj.weight.mul_(30)
    with pytest.raises(cl.UnsupportedModelError, match="of Hugging Face"):
        cl.load(model)
