"""Random models, rules, tokenizers and files of settings: what holds of all of them."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import torch
import transformers as hf
from helpers import batch_of, node_means
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

import circuitlens as cl
from circuitlens.adapt.headslice import HeadSliceConfig
from circuitlens.cdt import relevance_by_difference, relevance_by_gradient
from circuitlens.models.prompt import Prompt
from circuitlens.models.readouts import TokenReadout
from circuitlens.settings_files import expanded
from circuitlens.tasks import Example
from circuitlens.tasks.encoding import encode

OURS = (cl.InputError, cl.NotFiniteError, cl.UnsupportedModelError)
# Each loads a model or makes a tokenizer, so there are fewer.
FUZZ = settings(
    max_examples=max(4, int(os.environ.get("FUZZ", "30")) // 5),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@st.composite
def geometries(draw) -> hf.PretrainedConfig:
    """A configuration with odd sizes."""
    kv = draw(st.integers(1, 3))
    heads = kv * draw(st.integers(1, 3))
    size = draw(st.sampled_from([2, 4, 6]))
    layers = draw(st.integers(1, 3))
    mlp = draw(st.integers(1, 9))
    shared = {"vocab_size": 97, "num_hidden_layers": layers, "num_attention_heads": heads}
    kind = draw(st.sampled_from(["qwen2", "llama", "gpt2", "bert", "qwen3"]))
    if kind == "gpt2":
        return hf.GPT2Config(
            vocab_size=97,
            n_embd=heads * size,
            n_layer=layers,
            n_head=heads,
            n_inner=mlp,
            n_positions=32,
        )
    if kind == "bert":
        return hf.BertConfig(
            **shared, hidden_size=heads * size, intermediate_size=mlp, max_position_embeddings=32
        )
    makers = {"qwen2": hf.Qwen2Config, "llama": hf.LlamaConfig, "qwen3": hf.Qwen3Config}
    own = kind == "qwen3" or (kind == "qwen2" and draw(st.booleans()))
    width = draw(st.integers(2, 12)) * 2 if own else heads * size
    return makers[kind](
        **shared,
        num_key_value_heads=kv,
        hidden_size=width,
        head_dim=size,
        intermediate_size=mlp,
        max_position_embeddings=32,
        tie_word_embeddings=draw(st.booleans()),
    )


def made(config: hf.PretrainedConfig) -> cl.HookedModel:
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if config.model_type == "bert" else AutoModelForCausalLM
    model = auto.from_config(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter) + (parameter.ndim == 1))
    return cl.load(model)


@st.composite
def rule_sets(draw) -> cl.RuleSet:
    parts = draw(st.booleans()), draw(st.booleans())
    return cl.RuleSet("drawn", *parts, draw(st.sampled_from(["difference", "gradient", "secant"])))


@FUZZ
@given(config=geometries(), rules=rule_sets(), data=st.data())
def test_any_geometry_is_decomposed_by_any_rules(config, rules, data):
    model = made(config)
    g, batch = model.geometry, batch_of(model, 6, 4)
    assert (g.n_layers, g.n_heads) == (config.num_hidden_layers, config.num_attention_heads)
    means = node_means(model)
    source = data.draw(st.sampled_from(list(g))), data.draw(st.sampled_from([None, 0, -1]))
    by_position = means.heads.expand(-1, 6, -1, -1)
    # Where patterns or scales live, only differences are defined.
    with suppress(cl.InputError):
        found = cl.decompose(
            model, batch.input_ids[:1], [[source]], by_position, rules, hooks="all"
        )
        assert found.check() < 1e-5


@FUZZ
@given(config=geometries(), data=st.data())
def test_any_geometry_is_scored_and_linear_rules_agree_with_differences(config, data):
    """With linear activations all rules are one; here the linear part is tested on its own."""
    model = made(config)
    batch, means = batch_of(model, 5, 3), node_means(model)
    linear = relevance_by_gradient(model, batch, means, cl.RULES["cdt-linear"]).heads
    secant = cl.RuleSet("same", True, True, "secant")
    patched = relevance_by_difference(model, batch, means, secant).heads
    # Norms compute in float32, and what is left of a difference may be small.
    torch.testing.assert_close(linear, patched, rtol=1e-3, atol=1e-5)
    n_layers, n_heads = linear.shape[1:]
    assert (n_layers, n_heads) == (model.geometry.n_layers, model.geometry.n_heads)


@FUZZ
@given(config=geometries(), data=st.data())
def test_any_heads_of_any_geometry_are_trained_and_nothing_else(config, data):
    from peft import get_peft_model

    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if config.model_type == "bert" else AutoModelForCausalLM
    plain = auto.from_config(config)
    before = {n: p.detach().clone() for n, p in plain.named_parameters()}
    geometry = cl.load(plain).geometry
    chosen = data.draw(st.lists(st.sampled_from(list(geometry)), min_size=1, unique=True))
    policy = data.draw(st.sampled_from(["shared", "frozen", "group"]))
    model = get_peft_model(plain, HeadSliceConfig(heads=[str(h) for h in chosen], kv_policy=policy))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    tokens = torch.arange(5, 12)[None]
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=tokens).logits.square().mean().backward()
        optimizer.step()
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    merged = model.merge_and_unload()
    after = dict(merged.named_parameters())
    touched = sum(int((after[name] != value).sum()) for name, value in before.items())
    assert 0 < touched <= n_trained


@st.composite
def tokenizers(draw) -> PreTrainedTokenizerFast:
    """A tokenizer of some kind, trained on a few words."""
    words = draw(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=8))
    corpus = [*words, "bad good negative positive", "a b c"]
    kind = draw(st.sampled_from(["bpe", "unigram", "wordpiece", "wordlevel"]))
    special = ["<unk>", "<pad>", "<s>", "</s>"]
    made = {
        "bpe": (models.BPE(unk_token="<unk>"), trainers.BpeTrainer),
        "unigram": (models.Unigram(), trainers.UnigramTrainer),
        "wordpiece": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer),
        "wordlevel": (models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer),
    }
    model, trainer = made[kind]
    tokenizer = Tokenizer(model)
    if draw(st.booleans()):
        tokenizer.normalizer = draw(
            st.sampled_from([normalizers.NFC(), normalizers.NFKC(), normalizers.Lowercase()])
        )
    before = draw(st.sampled_from(["bytes", "spaces", "meta"]))
    if before == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=draw(st.booleans()))
        tokenizer.decoder = decoders.ByteLevel()
    elif before == "spaces":
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    options = {"unk_token": "<unk>"} if kind == "unigram" else {}
    tokenizer.train_from_iterator(
        corpus, trainer(vocab_size=90, special_tokens=special, show_progress=False, **options)
    )
    named = {"unk_token": "<unk>", "pad_token": "<pad>"}
    if draw(st.booleans()):
        named["bos_token"] = "<s>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


@FUZZ
@given(
    tokenizer=tokenizers(),
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40),
    template=st.sampled_from(["{text} ->", "{text}:", "Is {text} bad? ", "<s>{text}", "{text}"]),
    answers=st.sampled_from([(" bad", " good"), ("bad", "good"), ("bad good", "good bad")]),
    readout=st.sampled_from(["auto", "token", "sequence"]),
)
def test_any_tokenizer_encodes_any_text_or_it_is_refused(
    tokenizer, text, template, answers, readout
):
    labels = dict(zip("xy", answers, strict=True))
    rows = [Example("1", {"text": text}, "x"), Example("2", {"text": "a"}, "y")]
    with suppress(*OURS):
        prompt = Prompt(template, labels, max_text_tokens=12, readout=readout)
        found = encode(rows, tokenizer, prompt, readout=TokenReadout())
        assert found.gold == (0, 1)
        assert all(0 <= t < len(tokenizer) for row in found.tokens for t in row)
        assert all(row for row in found.tokens)
        # A prompt is what it is alone, whatever stands beside it.
        alone = encode(rows[:1], tokenizer, prompt, readout=TokenReadout())
        assert alone.tokens[0] == found.tokens[0]


PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = st.one_of(
    st.text(max_size=8), st.sampled_from(["model", "task", "target", "label", "rate", "size"])
)


@FUZZ
@given(content=st.one_of(st.dictionaries(KEYS, PLAIN, max_size=4), PLAIN, st.text(max_size=60)))
def test_any_settings_file_is_options_or_refused(content, tmp_path_factory):
    path = Path(tmp_path_factory.mktemp("fuzz") / "run.yaml")
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8", errors="replace")
    with suppress(*OURS):
        words = expanded(["run", "--config", str(path)])
        assert words[0] == "run"
        assert all(isinstance(word, str) for word in words)


@FUZZ
@given(content=PLAIN, kind=st.sampled_from(["circuit", "graph", "nodes", "comparison", "result"]))
def test_any_json_is_a_result_or_refused(content, kind, tmp_path_factory):
    folder = Path(tmp_path_factory.mktemp("fuzz"))
    schemas = {
        "circuit": ("circuit.json", "circuitlens.circuit/2"),
        "graph": ("graph.json", ""),
        "nodes": ("nodes.json", "circuitlens.node-circuit/1"),
        "comparison": ("comparison.json", "circuitlens.comparison/1"),
        "result": ("result.json", "circuitlens.transfer/2"),
    }
    name, schema = schemas[kind]
    whole = {**content, "schema": schema} if isinstance(content, dict) else content
    (folder / name).write_text(json.dumps(whole), encoding="utf-8")
    loaders = {
        "circuit": lambda: cl.Circuit.load(folder / name),
        "graph": lambda: cl.Circuit.load_graph(folder / name),
        "nodes": lambda: cl.NodeCircuit.load(folder / name),
        "comparison": lambda: cl.Comparison.load(folder),
        "result": lambda: cl.TransferResult.load(folder),
    }
    with suppress(*OURS):
        loaders[kind]()
