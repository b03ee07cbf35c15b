"""A classification head through everything: loading, competence, circuit, transfers, files."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pandas as pd
import pytest
import torch
from helpers import tiny, tiny_classifier
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel
from typer.testing import CliRunner

import circuitlens as cl
from circuitlens.adapt import STRATEGIES
from circuitlens.cli import app
from circuitlens.explorer.probing import Probe
from circuitlens.models.readouts import ClassifierReadout
from circuitlens.tasks import toy

LABELS = ["negative", "neutral", "positive"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model without classification head, as people download it."""
    path = tmp_path_factory.mktemp("base")
    toy.toy_model(n_layers=2).save(path)
    return path


@pytest.fixture(scope="module")
def proxy(folder, toy_task):
    model = cl.load(folder, labels=toy_task)
    assert model.new == ("score.weight",)
    return cl.finetune(model, toy_task, **{**toy.TOY_FINETUNE, "epochs": 6}, quiet=True)


@pytest.fixture(scope="module")
def found(proxy, toy_task):
    few = toy_task["pool_a"][:200]
    baseline = cl.label_balanced_mean(proxy, toy_task, examples=few, quiet=True)
    return baseline, cl.relevance(proxy, toy_task, baseline, max_examples=60, quiet=True)


def test_a_new_head_is_said_to_be_new_until_it_is_trained(folder, proxy, toy_task, caplog):
    with caplog.at_level("WARNING", logger="circuitlens"):
        model = cl.load(folder, labels=toy_task)
    assert "has no classification head: a new one for negative, neutral, positive" in caplog.text
    assert "new untrained head" in repr(model)
    # It begins the same every time, whatever was drawn before, and what is drawn next is too.
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    again = cl.load(folder, labels=toy_task)
    assert torch.equal(again.hf.score.weight, model.hf.score.weight)
    assert torch.equal(torch.rand(1), drawn)
    assert isinstance(model.readout, ClassifierReadout)
    assert not proxy.new
    assert cl.evaluate(proxy, toy_task, "test", quiet=True).accuracy > 0.85


def test_no_prompt_and_no_word_is_used(proxy, toy_task):
    data = toy_task.encode(proxy, toy_task["test"][:5])
    for example, row in zip(toy_task["test"][:5], data.tokens, strict=True):
        own = proxy.tokenizer(example.fields["text"])["input_ids"]
        assert list(row) == own


def test_everything_that_is_measured_works(proxy, toy_task, found):
    baseline, scores = found
    exact = cl.relevance(proxy, toy_task, baseline, method="ablation", max_examples=60, quiet=True)
    agreement = torch.corrcoef(torch.stack([scores.mean.flatten(), exact.mean.flatten()]))
    assert agreement[0, 1] > 0.5
    seen = {*scores.example_ids, *baseline.example_ids}
    fresh = [e for e in toy_task.held_out if e.id not in seen][:60]
    curve = cl.faithfulness(
        proxy, toy_task, scores, baseline, examples=fresh, n_random=2, quiet=True
    )
    assert curve.to_frame()["accuracy"].iloc[-1] > 0.8
    marginal = cl.minimality(proxy, toy_task, scores.top(4), baseline, fresh, quiet=True)
    assert len(marginal.to_frame()) == 4
    table = cl.compare_scorers(
        proxy,
        toy_task,
        baseline,
        methods=["cdt-linear", "midpoint"],
        max_examples=20,
        examples=fresh[:20],
        n_random=1,
        quiet=True,
    )
    assert len(table.table) >= 2
    with pytest.raises(cl.InputError, match="but not the 'classifier' readout"):
        cl.relevance(proxy, toy_task, baseline, method="hsu2024", max_examples=5, quiet=True)
    assert len(cl.discover(proxy, toy_task, baseline, max_examples=20, quiet=True)) > 0


@pytest.mark.slow
# The circuit of so small a model has no edges between heads.
@pytest.mark.parametrize(
    "strategy", [s for s in STRATEGIES if s not in ("gradual", "circuit-lora-edges")]
)
def test_every_strategy_adapts_it(proxy, toy_task, found, strategy, tmp_path):
    _, scores = found
    result = cl.transfer(
        proxy,
        scores.top(3),
        toy_task.to("near"),
        strategy=strategy,
        scores=scores,
        learning_rates=[3e-3],
        epochs=2,
        quiet=True,
    )
    head = sum(p.numel() for n, p in proxy.hf.named_parameters() if not n.startswith("model."))
    if strategy == "head":
        assert result.n_trainable == head
    elif strategy not in ("full", "lottery", "shield"):  # which train entries of all weights
        weight = result.model.hf.score.weight
        assert torch.equal(weight, proxy.hf.score.weight)
    result.save(tmp_path / "adapter")
    again = cl.TransferResult.load(tmp_path / "adapter", proxy)
    batch = toy_task.encode(proxy, toy_task["test"][:8]).batch(range(8))
    with torch.no_grad():
        expected = result.model.hf_logits(batch)
        torch.testing.assert_close(again.model.hf_logits(batch), expected)
        if result.is_adapter:
            base = proxy.clone().hf
            peft = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
            assert peft.peft_config["default"].task_type == "SEQ_CLS"
            own = peft(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_another_process_predicts_the_same_from_the_adapter_alone(proxy, toy_task, found, tmp_path):
    proxy.save(tmp_path / "proxy")
    model = cl.load(tmp_path / "proxy")
    assert model.prompt == toy_task.prompt
    _, scores = found
    result = cl.transfer(
        model, scores.top(3), toy_task.to("near"), learning_rates=[3e-3], epochs=1, quiet=True
    )
    result.save(tmp_path / "adapter")
    # Where the base is on this machine stands in trained.json, not in what is published.
    for name in ("result.json", "README.md"):
        (tmp_path / "adapter" / name).unlink(missing_ok=True)
    texts = [e.fields["text"] for e in toy_task.to("near")["test"][:12]]
    expected = cl.predict(result.model, texts, quiet=True)
    assert expected["label"].isin(LABELS).all()
    shares = expected.filter(like="p(").sum(1)
    assert shares.to_numpy() == pytest.approx(1.0)
    pd.DataFrame({"text": texts}).to_csv(tmp_path / "new.csv", index=False)
    command = [sys.executable, "-m", "circuitlens.cli", "predict", str(tmp_path / "adapter")]
    command += ["--in", str(tmp_path / "new.csv"), "--out", str(tmp_path / "out.jsonl"), "-q"]
    subprocess.run(command, check=True, timeout=120)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == expected["label"].tolist()
    assert [row["p(neutral)"] for row in rows] == pytest.approx(
        expected["p(neutral)"].tolist(), abs=1e-5
    )


def test_a_classifier_comes_with_its_head_and_its_classes_are_matched(tmp_path, toy_task):
    tokenizer = toy.toy_tokenizer()
    hf = tiny_classifier("qwen2", torch.float32)
    hf.resize_token_embeddings(len(tokenizer))
    own = cl.load(hf, tokenizer)
    with pytest.raises(cl.InputError, match=r"of the task is not one of the classes.*a, b"):
        toy_task.encode(own, toy_task["test"][:2])
    named = cl.load(hf, tokenizer, labels=["Positive", "NEGATIVE", "neutral"])
    assert toy_task.encode(named, toy_task["test"][:2]).readout.classes == (1, 2, 0)
    assert hf.config.id2label[0] == "a"
    hf.save_pretrained(tmp_path)
    again = cl.load(tmp_path, tokenizer)
    batch = named.unlabelled(torch.arange(5, 12)[None])
    with torch.no_grad():
        torch.testing.assert_close(again.hf_logits(batch), named.hf_logits(batch))
    with pytest.raises(cl.InputError, match=r"has 3 classes .* but labels names 2"):
        cl.load(tmp_path, tokenizer, labels=["x", "y"])
    hf.config.id2label = {n: f"LABEL_{n}" for n in range(3)}
    with pytest.raises(cl.InputError, match=r"LABEL_0, LABEL_1.*--classifier"):
        toy_task.encode(cl.load(hf, tokenizer), toy_task["test"][:2])
    words = cl.load_task("toy", readout="token")
    with pytest.raises(cl.InputError, match="reads words, and this model has a classification"):
        words.encode(named, words["test"][:2])


def test_nothing_is_loaded_with_random_weights_unasked(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    plain = BertModel(BertConfig(vocab_size=97, num_attention_heads=4, **sizes))
    plain.save_pretrained(tmp_path / "plain")
    tokenizer = toy.toy_tokenizer()
    with pytest.raises(cl.InputError, match=r"has no language-model head.*labels=task"):
        cl.load(tmp_path / "plain", tokenizer)
    asked = cl.load(tmp_path / "plain", tokenizer, labels=LABELS)
    assert all(n.startswith("classifier.") for n in asked.new)
    # A file without some of the weights of the body.
    hf = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain", num_labels=3)
    state = {k: v for k, v in hf.state_dict().items() if "layer.1.attention.self.query" not in k}
    hf.config.id2label = dict(enumerate("abc"))
    hf.save_pretrained(tmp_path / "broken", state_dict=state)
    with pytest.raises(cl.InputError, match=r"missing in .*query.*incomplete"):
        cl.load(tmp_path / "broken", tokenizer)


def test_options_that_cannot_work_are_refused_before_anything_is_loaded(tmp_path):
    hf = tiny("qwen2", torch.float32)
    hf.save_pretrained(tmp_path)
    tokenizer = toy.toy_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = cl.load(tmp_path, attn_implementation="eager", device_map="cpu")
    assert loaded.hf.config._attn_implementation == "eager"
    for option in ({"quantization_config": object()}, {"load_in_4bit": True}):
        with pytest.raises(cl.InputError, match="no longer belong to single heads"):
            cl.load("nowhere/at-all", **option)
    with pytest.raises(cl.InputError, match="runs code from the checkpoint"):
        cl.load(tmp_path, trust_remote_code=True)
    with pytest.raises(cl.InputError, match="nonsense"):
        cl.load(tmp_path, nonsense=1)
    with pytest.raises(cl.InputError, match="was given a model in memory"):
        cl.load(hf, tokenizer, cache_dir="x")
    with pytest.raises(cl.InputError, match="has no classification head"):
        cl.load(hf, tokenizer, labels=["a", "b"])


def test_a_head_needs_to_know_what_is_padding(toy_task):
    hf = tiny_classifier("qwen2", torch.float32)
    hf.config.pad_token_id = None
    with pytest.raises(cl.InputError, match=r"names no token for padding.*pad_token_id"):
        cl.load(hf, toy.toy_tokenizer())
    regression = tiny_classifier("bert", torch.float32)
    regression.config.problem_type = "multi_label_classification"
    with pytest.raises(cl.InputError, match="multi_label_classification"):
        cl.load(regression, toy.toy_tokenizer())


def test_the_explorer_shows_classes_and_words_alike(proxy, toy_task, found, toy_proxy):
    baseline, _ = found
    probe = Probe(proxy, toy_task, baseline, n_examples=5)
    told = probe.attribution("source", 0, cl.Head(1, 2))
    assert set(told.labels) == set(LABELS)
    assert {name for name, _ in told.promoted} == set(LABELS)
    assert probe.attention("source", 0, cl.Head(0, 0)).shape[0] == len(probe.tokens("source", 0))
    assert probe.effect("source", cl.Head(0, 0)).n == 5
    # Whole words: what a head adds to each label's log-probability, over all that are read.
    task = cl.load_task("toy", readout="sequence")
    means = cl.label_balanced_mean(toy_proxy, task, examples=task["pool_a"][:60], quiet=True)
    whole = Probe(toy_proxy, task, means, n_examples=3)
    told = whole.attribution("source", 0, cl.Head(1, 2))
    assert {name for name, _ in told.suppressed} == set(LABELS)
    assert all(math.isfinite(value) for value in told.labels.values())


@pytest.mark.slow
def test_a_run_and_a_comparison_with_a_new_head(folder, tmp_path):
    out = str(tmp_path / "run")
    options = ["--model", str(folder), "--task", "toy", "--classifier", "--target", "near"]
    options += ["--strategy", "circuit", "--rate", "3e-3", "--epochs", "1", "--n-random", "1"]
    options += ["--finetune-rate", "3e-3", "--finetune-epochs", "4", "--max-examples", "60"]
    found = CliRunner().invoke(app, ["run", *options, "--out", out, "-q"])
    assert found.exit_code == 0, found.output
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "classifier" in page
    card = (tmp_path / "run" / "transfers" / "near" / "circuit" / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card
    assert "- label neutral:" in card
    compared = CliRunner().invoke(
        app, ["compare", out, "--strategy", "norms", "--strategy", "head", "--seed", "0", "-q"]
    )
    assert compared.exit_code == 0, compared.output
    (tmp_path / "new.csv").write_text("text\nbada gu\n", encoding="utf-8")
    told = ["predict", out, "--in", str(tmp_path / "new.csv"), "--out", str(tmp_path / "o.csv")]
    labelled = CliRunner().invoke(app, [*told, "-q"])
    assert labelled.exit_code == 0, labelled.output
    assert "label" in (tmp_path / "o.csv").read_text().splitlines()[0]
