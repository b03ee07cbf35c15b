"""The readout is the only home of where an answer is read; another one works everywhere."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers import ALL, MASKED, batch_of, loaded, tiny
from peft import PeftConfig

import circuitlens as cl
from circuitlens.adapt.strategies import Choice, strategy_of
from circuitlens.models.batch import margin
from circuitlens.models.readouts import TokenReadout, readout_of

PACKAGE = Path(cl.__file__).parent
# What one token at one column of a language model's head looks like in code.
TRACES = re.compile(
    r"label_tokens|logits_to_keep|get_output_embeddings|\bunembed\.|AutoModelFor\w|mlm_head\b"
    r"|final_logit_softcapping|CAUSAL_LM|cross_entropy|\.lm_head\b|batch\.decision|mask_token_id"
)
# The published rules are those of GPT-2 with its own head; hook names belong to families.
# Retention on text reads every token of a text, and no answer. Composites have an auto class of
# their own, and are compared with the language model inside, head and all.
ALLOWED = {
    "cdt/gpt2.py",
    "adapt/text_loss.py",
    "models/weights.py",
    "models/inside.py",
    "models/composite.py",
}


def test_nothing_else_knows_where_an_answer_is_read():
    found = {
        str(path.relative_to(PACKAGE)): sorted(set(TRACES.findall(path.read_text())))
        for path in PACKAGE.rglob("*.py")
        if TRACES.search(path.read_text())
    }
    assert "models/readouts/token.py" in found
    others = {k: v for k, v in found.items() if not k.startswith("models/readouts/")}
    families = {k for k in others if k.startswith("models/families/")}
    assert set(others) - families <= ALLOWED, others


@pytest.mark.parametrize("name", ALL)
def test_label_scores_are_logits_of_their_tokens_in_both_views(name):
    model = loaded(name)
    batch = batch_of(model, 8, 5)
    assert readout_of(model.hf) == model.readout
    assert model.readout.n_labels == 0
    column = -1 if model.family.causal else -2
    assert batch.readout.where(batch).nonzero()[:, 1].tolist() == [8 + column] * 2
    with torch.no_grad():
        arguments = {"input_ids": batch.input_ids[:1], "attention_mask": batch.attention_mask[:1]}
        own = model.hf(**arguments).logits[0, column].double()
        for labels in (model.label_logits(batch), model.hf_label_logits(batch)):
            torch.testing.assert_close(labels[0].double(), own[[7, 11, 13]], rtol=1e-5, atol=1e-5)
        losses = batch.readout.losses(model, batch, model.hf)
    torch.testing.assert_close(losses[0].double(), -own.log_softmax(0)[7], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", sorted(MASKED)[0]])
def test_the_head_is_the_label_rows_and_names_its_class(name):
    model = loaded(name)
    masks = replace(model.readout, tokens=(3, 5)).head_masks(model.hf)
    ((parameter, mask),) = masks.items()
    assert mask.any(1).nonzero()[:, 0].tolist() == [3, 5]
    assert dict(model.hf.named_parameters())[parameter] is model.hf.get_output_embeddings().weight
    assert type(model.hf) in model.readout.auto_class()._model_mapping.values()
    assert model.readout.peft_task_type() == (None if name in MASKED else "CAUSAL_LM")


@dataclass(frozen=True)
class Synonyms(TokenReadout):
    """Another readout: the score of a label is the mean logit of its token and the one before."""

    def label_logits(self, model, batch, hooks):
        return self.of_labels(self.logits(model, batch, hooks))

    def of_labels(self, logits):
        return (super().of_labels(logits) + super().of_labels(logits.roll(1, -1))) / 2

    def losses(self, model, batch, module):
        scores = self.hf_label_logits(model, batch, module)
        return torch.nn.functional.cross_entropy(scores, batch.gold, reduction="none")

    def head_masks(self, hf):
        return replace(self, tokens=(*self.tokens, *(t - 1 for t in self.tokens))).rows(hf)

    def rows(self, hf):
        return super().head_masks(hf)


@pytest.fixture(scope="module")
def other(toy_proxy):
    model = toy_proxy.clone()
    model.readout = Synonyms()
    return model


@pytest.fixture(scope="module")
def other_baseline(other, toy_task):
    return cl.label_balanced_mean(other, toy_task, examples=toy_task["pool_a"][:150], quiet=True)


def by_hand(model, task, examples, hooks=None):
    """Margins from Hugging Face's tokens, or from hooked logits."""
    encoded = task.encode(model, examples)
    batch = encoded.batch(range(len(encoded)))
    with torch.no_grad():
        every = model.logits(batch, hooks or {}).double()
    tokens = torch.tensor(encoded.readout.tokens)
    return margin((every[:, tokens] + every[:, tokens - 1]) / 2, batch.gold)


def test_another_readout_is_asked_by_evaluation_and_scoring(other, other_baseline, toy_task):
    test = toy_task["test"][:20]
    assert isinstance(toy_task.encode(other, test).readout, Synonyms)
    evaluation = cl.evaluate(other, toy_task, test, quiet=True)
    assert evaluation.margin == pytest.approx(
        float(by_hand(other, toy_task, test).mean()), rel=1e-5
    )
    found = {
        method: cl.relevance(
            other, toy_task, other_baseline, method=method, max_examples=20, quiet=True
        )
        for method in ("ablation", "cdt", "cdt-linear", "attribution")
    }
    means = {name: scores.mean for name, scores in found.items()}
    assert all(not means["ablation"].allclose(means[name]) for name in found if name != "ablation")
    scored = [e for e in toy_task["pool_a"] if e.id in set(found["ablation"].example_ids)]
    before = by_hand(other, toy_task, scored)
    where = toy_task.encode(other, scored).batch(range(len(scored))).mask(other_baseline.positions)
    for head in (cl.Head(0, 1), cl.Head(1, 2)):

        def ablate(z, head=head):
            z = z.clone()
            z[..., head.index, :][where] = other_baseline.mean[head.layer, head.index].to(z)
            return z

        lost = before - by_hand(other, toy_task, scored, {other.z_hook(head.layer): ablate})
        mine = float(means["ablation"][head.layer, head.index])
        assert mine == pytest.approx(float(lost.mean()), rel=1e-3, abs=1e-4)


def test_another_readout_is_asked_by_faithfulness(other, other_baseline, toy_task):
    scores = cl.relevance(other, toy_task, other_baseline, max_examples=40, quiet=True)
    seen = {*scores.example_ids, *other_baseline.example_ids}
    examples = [e for e in toy_task.held_out if e.id not in seen][:25]
    curve = cl.faithfulness(
        other, toy_task, scores, other_baseline, examples=examples, n_random=0, quiet=True
    )
    full = float(by_hand(other, toy_task, examples).mean())
    assert curve.to_frame()["margin"].iloc[-1] == pytest.approx(full, rel=1e-4)


def test_another_readout_is_asked_by_training(other, toy_task):
    circuit = cl.Circuit((cl.Head(0, 0),), 2, other.geometry.n_heads)
    options = {"strategy": "head", "learning_rates": [1e-2], "epochs": 1, "quiet": True}
    result = cl.transfer(other, circuit, toy_task.to("near"), **options)
    tokens = toy_task.encode(other, toy_task["test"][:1]).readout.tokens
    rows = {*tokens, *(t - 1 for t in tokens)}
    weight = other.hf.get_output_embeddings().weight
    assert result.n_trainable == len(rows) * weight.shape[1]
    moved = (result.model.hf.get_output_embeddings().weight != weight).any(1)
    assert set(moved.nonzero()[:, 0].tolist()) == rows


def test_adapters_say_what_they_are_for(tmp_path):
    for name, expected in (("qwen2", "CAUSAL_LM"), (sorted(MASKED)[0], None)):
        model = cl.load(tiny(name))
        g = model.geometry
        choice = Choice(cl.Circuit((cl.Head(0, 0),), g.n_layers, g.n_heads))
        how = strategy_of("circuit")
        how.make(model, choice, how.choose(model, choice)).write(tmp_path / name)
        assert PeftConfig.from_pretrained(str(tmp_path / name)).task_type == expected
