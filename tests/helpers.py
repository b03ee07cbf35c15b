"""What several test modules share: tiny random models, made-up batches, data and results."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers as hf
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import circuitlens as cl
from circuitlens.models.batch import Batch, margin
from circuitlens.models.prompt import Prompt
from circuitlens.models.readouts import TokenReadout
from circuitlens.node_means import NodeMeans
from circuitlens.tasks import Encoded, toy
from circuitlens.tasks.evaluation import Evaluation
from circuitlens.utils.provenance import Provenance
from circuitlens.view import paper


def can_draw() -> bool:
    """Whether this machine has what draws figures as files, by the package's own search."""
    try:
        paper._kaleido()
        paper._browser()
    except cl.InputError:
        return False
    return True


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
    # Embeddings of another size than the layers.
    "electra": lambda: hf.ElectraConfig(**_SMALL, embedding_size=16),
    "distilbert": lambda: hf.DistilBertConfig(
        vocab_size=97, dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=64
    ),
    # A window of two tokens on each side in all layers but the first.
    "modernbert": lambda: hf.ModernBertConfig(
        **_SMALL,
        local_attention=4,
        global_attn_every_n_layers=3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
    "roberta": lambda: hf.RobertaConfig(**_SMALL),
    "xlm_roberta": lambda: hf.XLMRobertaConfig(**_SMALL),
}
ALL = list(CONFIGS)
MASKED = {"bert", "electra", "distilbert", "modernbert", "roberta", "xlm_roberta"}
# Hugging Face takes their softmax in float32, which makes NaN of float64 masks in the padding.
FLOAT32_ONLY = {"opt", "gemma2", "bloom", "modernbert"}


def run_command(words: list[str], stands_for: dict[str, str], little: dict[str, str]) -> list[str]:
    """Run a command of the documentation, less its local data, on what stands for its names.

    Args:
        words: of the command line, without the program.
        stands_for: words that are replaced.
        little: by subcommand, options that keep it short.
    """
    from typer.testing import CliRunner

    from circuitlens.cli import app

    words = list(words)
    if "--data" in words:
        place = words.index("--data")
        del words[place : place + 2]
    words = [stands_for.get(word, word) for word in words]
    found = CliRunner().invoke(app, [*words, "-q", *little.get(words[0], "").split()])
    assert found.exit_code == 0, (words, found.output, found.exception)
    return words


def quick_or_slow(name: str):
    """A family as a parameter; all but one of each layout are left to the slow group."""
    quick = ("qwen2", "gpt2", "phi3", "bloom", "bert", "modernbert", "mixtral")
    return pytest.param(name, marks=[] if name in quick else [pytest.mark.slow])


def tiny(name: str, dtype: torch.dtype | None = None, seed: int = 0) -> PreTrainedModel:
    """A random model; biases and norms are random too, so that nothing hides behind a zero."""
    dtype = dtype or (torch.float32 if name in FLOAT32_ONLY else torch.float64)
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    auto = AutoModelForMaskedLM if name in MASKED else AutoModelForCausalLM
    return _random(auto, config, dtype)


def tiny_classifier(name: str, dtype: torch.dtype | None = None, seed: int = 0):
    """A random classifier; its classes are a, b and c."""
    dtype = dtype or (torch.float32 if name in FLOAT32_ONLY else torch.float64)
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    config.id2label, config.label2id = dict(enumerate("abc")), {c: n for n, c in enumerate("abc")}
    if config.pad_token_id is None:
        config.pad_token_id = 0
    return _random(AutoModelForSequenceClassification, config, dtype)


def _random(auto, config: hf.PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
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
    return cl.load(tiny(name, dtype))


# Architectures of which Hugging Face makes classifiers.
CLASSIFIERS = list(CONFIGS)


@cache
def classifier(name: str, dtype: torch.dtype | None = None):
    """A loaded tiny classifier of three classes that all tests share: for reading only."""
    return cl.load(tiny_classifier(name, dtype))


def prompts(*lengths: int, seed: int = 1, n_prefix: int = 0, n_suffix: int = 0):
    """Left-padded random prompts of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(5, 97, (length,), generator=generator)
        mask[row, width - length :] = 1
    gold = torch.arange(len(lengths)) % 3
    return Batch(ids, mask, gold, TokenReadout((7, 11, 13)), n_prefix, n_suffix)


def batch_of(model: cl.HookedModel, *lengths: int, seed: int = 1) -> Batch:
    """Random prompts for a model; one that answers in a mask's place has a token behind it."""
    return prompts(*lengths, seed=seed, n_suffix=0 if model.family.causal else 1)


def answers(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Logits of the label tokens, picked by hand."""
    return logits[..., list(batch.readout.tokens)]  # type: ignore[attr-defined]


def task_margin(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Task margin of every example from all outputs of the head."""
    return margin(batch.readout.of_labels(logits), batch.gold)


def token_of_labels(tokenizer, template: str, words: dict[str, str]) -> dict[str, int]:
    """The token that stands for each label."""
    found = TokenReadout().for_labels(Prompt(template, words).bare(tokenizer), words)
    return dict(zip(words, found.tokens, strict=True))


def row(batch: Batch, index: int) -> Batch:
    """One example without its padding."""
    start = int((batch.attention_mask[index] == 0).sum())
    return replace(
        batch,
        input_ids=batch.input_ids[index : index + 1, start:],
        attention_mask=batch.attention_mask[index : index + 1, start:],
        gold=batch.gold[index : index + 1],
    )


def node_means(model: cl.HookedModel) -> NodeMeans:
    g = model.geometry
    torch.manual_seed(5)
    heads = 0.3 * torch.randn(g.n_layers, g.n_heads, g.d_head, dtype=model.dtype)
    return NodeMeans.pooled(heads, 0.3 * torch.randn(g.n_layers, g.d_model, dtype=model.dtype))


def unchecked(kind: type, *arguments, **options):
    """Make an object without the type checks of the tests, which users do not have."""
    made = object.__new__(kind)
    inspect.unwrap(kind.__init__)(made, *arguments, **options)
    return made


def made_up(n=40):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 9, (n,), generator=generator).tolist()
    return Encoded(
        ids=tuple(map(str, range(n))),
        tokens=tuple(tuple((7 * i + k) % 85 + 5 for k in range(m)) for i, m in enumerate(lengths)),
        gold=tuple(i % 2 for i in range(n)),
        readout=TokenReadout((1, 2)),
        pad_token=0,
        n_prefix=0,
        n_suffix=0,
        n_truncated=0,
    )


FAST = {"simple": False, "learning_rates": [1e-3], "epochs": 1, "quiet": True}
GRID = {"strategies": ["random", "norms"], "seeds": [0, 1]}


def small() -> tuple[cl.HookedModel, cl.Circuit, cl.Task]:
    """A random model: what a grid does with it does not depend on what it knows."""
    model = toy.toy_model(n_layers=1)
    g = model.geometry
    return model, cl.Circuit.of(["a0.h1", "a0.h2"], g.n_layers, g.n_heads), cl.load_task("toy")


HISTORY = [
    {"epoch": 1.0, "accuracy": 0.5, "margin": 1.0},
    {"epoch": 2.0, "accuracy": 0.7, "margin": 2.0},
    {"epoch": 3.0, "accuracy": 0.7, "margin": 3.0},
    {"epoch": 4.0, "accuracy": 0.6, "margin": 9.0},
]


def evaluation(accuracy: float) -> dict[str, float]:
    return Evaluation(50, accuracy, accuracy / 2, 3.0, 0.1).to_dict()


def cell(language, strategy, seed, after, kept=0.8, **more):
    right = [int(i < round(50 * after)) for i in range(50)]
    name = {"name": "t/src", "before": evaluation(0.9), "after": evaluation(kept)}
    return {
        "strategy": strategy,
        "target_language": language,
        "source_language": "src",
        "seed": seed,
        "target_before": evaluation(0.5),
        "target_after": evaluation(after),
        "retained": [name],
        "n_trainable": 1234,
        "seconds": 2.0,
        "peak_mib": 5.0,
        "target_right": right,
        "history": HISTORY,
        **more,
    }


def result(strategy="circuit", language="x", seed=None, drift=((0.0, 2.0), (0.5, 0.0)), **more):
    settings = {} if seed is None else {"seed": seed}
    values = {
        "strategy": strategy,
        "heads": cl.Circuit.of(["a0.h1", "a1.h0"], 2, 2),
        "target_language": language,
        "source_language": "src",
        "target_before": Evaluation(**evaluation(0.5)),
        "target_after": Evaluation(**evaluation(0.7)),
        "retained": (
            cl.adapt.retention.Retained(
                "t/src", Evaluation(**evaluation(0.9)), Evaluation(**evaluation(0.8))
            ),
        ),
        "n_trainable": 10,
        "learning_rate": 1e-3,
        "validation": {1e-3: 0.7},
        "history": tuple(HISTORY),
        "seconds": 1.0,
        "target_right": (True, False),
        "drift": drift,
        "shift": None,
        "decision": None,
        "provenance": Provenance("m", "f", "t", "d", 0, settings),
        **more,
    }
    return cl.TransferResult(**values)


def shortened(task: cl.Task, n: int = 60) -> cl.Task:
    """A task with as few examples, and so its origin: for tests that train many times."""
    pools = task.pools
    cut = {name: getattr(pools, name)[:n] for name in ("pool_b", "validation", "test")}
    origin = None if task.origin is None else shortened(task.origin, n)
    return replace(task, pools=replace(pools, **cut), origin=origin)
