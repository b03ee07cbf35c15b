from __future__ import annotations

import pytest
import torch
import transformers as hf
from conftest import CONFIGS, tiny
from transformers import AutoModelForCausalLM

import circuitlens as cl
from circuitlens import families, selfcheck

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


def test_tested_types_are_not_checked_again(monkeypatch):
    monkeypatch.setattr(selfcheck, "_fault", lambda model: "never mind")
    cl.load(tiny("qwen2"))
    with pytest.raises(cl.UnsupportedModelError, match=r"its hooks: never mind\."):
        cl.load(build(UNTESTED["phi"]()))
