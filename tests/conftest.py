"""Shared fixtures: tiny random models of several families, and a trained toy model."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# For processes that tests start; tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Two threads that wait for each other on busy cores are slower than one.
torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared"

_SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}


def _falcon(**options: object) -> hf.FalconConfig:
    sizes = {**_SMALL, "ffn_hidden_size": 48}
    del sizes["intermediate_size"]
    return hf.FalconConfig(**sizes, **options)


# One for every weight layout and for what makes a family special.
CONFIGS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "qwen2": lambda: hf.Qwen2Config(**_GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**_GROUPED, head_dim=12),
    "llama": lambda: hf.LlamaConfig(**_GROUPED),
    "mistral": lambda: hf.MistralConfig(**_GROUPED),
    "gemma2": lambda: hf.Gemma2Config(**_GROUPED, head_dim=8, query_pre_attn_scalar=8),
    "phi3": lambda: hf.Phi3Config(**_GROUPED, pad_token_id=0),
    "gpt2": lambda: hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_SMALL),
    "opt": lambda: hf.OPTConfig(
        vocab_size=97,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "bloom": lambda: hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=3, n_head=4),
    "olmo2": lambda: hf.Olmo2Config(**_SMALL),
    # A window of four tokens in all layers but one.
    "gemma3": lambda: hf.Gemma3TextConfig(
        **_GROUPED,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "falcon_new": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "falcon_mq": lambda: _falcon(multi_query=True),
    "falcon_rw": lambda: _falcon(multi_query=False, alibi=True, parallel_attn=False, bias=True),
    "mixtral": lambda: hf.MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    # The middle layer has a plain MLP.
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **_GROUPED,
        head_dim=12,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    ),
    "bert": lambda: hf.BertConfig(**_SMALL),
    "roberta": lambda: hf.RobertaConfig(**_SMALL),
    "xlm_roberta": lambda: hf.XLMRobertaConfig(**_SMALL),
}
ALL = list(CONFIGS)
MASKED = {"bert", "roberta", "xlm_roberta"}
# Hugging Face takes their softmax in float32, which makes NaN of float64 masks in the padding.
FLOAT32_ONLY = {"opt", "gemma2", "bloom"}


def tiny(name: str, dtype: torch.dtype | None = None, seed: int = 0) -> PreTrainedModel:
    """A random model; biases and norms are random too, so that nothing hides behind a zero."""
    dtype = dtype or (torch.float32 if name in FLOAT32_ONLY else torch.float64)
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    auto = AutoModelForMaskedLM if name in MASKED else AutoModelForCausalLM
    # The default implementation of experts knows no float64.
    options = {"experts_implementation": "eager"} if hasattr(config, "num_experts_per_tok") else {}
    model = auto.from_config(config, **options).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.5 / parameter.shape[-1] ** 0.5)
    return model.eval()


@cache
def loaded(name: str, dtype: torch.dtype | None = None):
    """A loaded tiny model that all tests share: for reading only."""
    import circuitlens as cl

    return cl.load(tiny(name, dtype))


def prompts(*lengths: int, seed: int = 1, n_prefix: int = 0, n_suffix: int = 0):
    """Left-padded random prompts of the given lengths."""
    from circuitlens.batch import Batch

    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(5, 97, (length,), generator=generator)
        mask[row, width - length :] = 1
    gold = torch.arange(len(lengths)) % 3
    return Batch(ids, mask, gold, torch.tensor([7, 11, 13]), n_prefix, n_suffix)


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "data" / "nusax").is_dir():
        pytest.skip("the shared data and checkpoints are not beside the project")
    return SHARED


@pytest.fixture(scope="session")
def toy_task():
    import circuitlens as cl

    return cl.load_task("toy")


@pytest.fixture(scope="session")
def toy_proxy(toy_task):
    """A small model that does the toy task well, though not perfectly."""
    import circuitlens as cl
    from circuitlens.tasks import toy

    options = {**toy.TOY_FINETUNE, "epochs": 12}
    return cl.finetune(toy.toy_model(n_layers=2), toy_task, **options)


@pytest.fixture(scope="session")
def toy_baseline(toy_proxy, toy_task):
    import circuitlens as cl

    return cl.label_balanced_mean(toy_proxy, toy_task, examples=toy_task["pool_a"][:300])


@pytest.fixture(scope="session")
def toy_scores(toy_proxy, toy_task, toy_baseline):
    import circuitlens as cl

    return cl.relevance(toy_proxy, toy_task, toy_baseline, method="cdt-linear")
