"""Whole words as answers: scores by hand, one-token words as tokens, every scorer's oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import MASKED, loaded, node_means

import circuitlens as cl
from circuitlens.cdt import RULES, relevance_by_difference, relevance_by_gradient
from circuitlens.cdt.ablation import ablated_label_logits
from circuitlens.cdt.difference import FrozenNetwork, Source
from circuitlens.models.batch import margin
from circuitlens.models.readouts import SequenceReadout, TokenReadout
from circuitlens.node_means import NodeMeans
from circuitlens.tasks import Encoded

# A word of three tokens, one that begins like it, a label of two words, and one token alone.
WORDS = (((7, 8, 9),), ((7, 8), (20, 21)), ((30,),))


def encoded(name: str, readout, n: int = 4, answers=()) -> Encoded:
    masked = name in MASKED
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(n):
        length = 4 + i % 3
        tokens = torch.randint(40, 90, (length,), generator=generator).tolist()
        rows.append((*tokens, 3) if masked else tuple(tokens))
    return Encoded(
        ids=tuple(map(str, range(n))),
        tokens=tuple(rows),
        gold=tuple(i % readout.n_labels for i in range(n)),
        readout=readout,
        pad_token=0,
        n_prefix=0,
        n_suffix=int(masked),
        n_truncated=0,
        answers=answers,
    )


def log_p(model, prompt, word) -> float:
    """By whole forward passes of Hugging Face, a token at a time (with masks: all at once)."""
    if model.family.causal:
        total = 0.0
        for t, token in enumerate(word):
            ids = torch.tensor([[*prompt, *word[:t]]])
            total += float(model.hf(ids).logits[0, -1].double().log_softmax(-1)[token])
        return total
    ids = torch.tensor([[*prompt[:-1], *[4] * len(word), prompt[-1]]])
    at = model.hf(ids).logits[0, -1 - len(word) : -1].double().log_softmax(-1)
    return float(at[range(len(word)), list(word)].sum())


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma2", "bloom", "bert", "roberta"])
@torch.no_grad()
def test_scores_are_log_probabilities_of_words(name):
    model = loaded(name)
    readout = SequenceReadout(WORDS, mask=4 if name in MASKED else None)
    data = encoded(name, readout)
    batch = data.batch(range(4))
    expected = torch.tensor(
        [
            [
                torch.tensor([log_p(model, prompt, w) for w in label]).logsumexp(0).item()
                for label in WORDS
            ]
            for prompt in data.tokens
        ]
    )
    for found in (model.hf_label_logits(batch), model.label_logits(batch)):
        torch.testing.assert_close(found.double(), expected.double(), rtol=2e-4, atol=2e-4)
    # (7, 8) is read in the row of (7, 8, 9), and (30,) in any.
    assert data.n_rows == (3 if name in MASKED else 2)
    alone = torch.cat([model.label_logits(data.batch([i])) for i in range(4)])
    torch.testing.assert_close(alone, model.label_logits(batch), rtol=1e-4, atol=1e-4)
    losses = readout.losses(model, batch, model.hf)
    gold = expected[torch.arange(4), batch.gold]
    torch.testing.assert_close(losses.double(), -gold.double(), rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_the_mean_over_tokens_is_an_option():
    model = loaded("qwen2")
    words = (((7, 8, 9),), ((20, 21),))
    sums = model.label_logits(encoded("qwen2", SequenceReadout(words)).batch([0, 1]))
    means = model.label_logits(encoded("qwen2", SequenceReadout(words, mean=True)).batch([0, 1]))
    torch.testing.assert_close(means, sums / torch.tensor([3.0, 2.0], dtype=sums.dtype))


@torch.no_grad()
def test_examples_may_bring_their_own_answers():
    model = loaded("qwen2")
    answers = ((((7, 8),), ((9,),)), (((9,),), ((20, 21, 22),)), (((5,),), ((6,),)))
    data = encoded("qwen2", SequenceReadout(n_choices=2), n=3, answers=answers)
    found = model.hf_label_logits(data.batch([2, 0, 1]))
    for row, i in enumerate((2, 0, 1)):
        expected = [log_p(model, data.tokens[i], label[0]) for label in answers[i]]
        assert found[row].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "bert"])
def test_one_token_words_give_the_token_readouts_margins_and_relevances(name):
    model, means = loaded(name), node_means(loaded(name))
    mask = 4 if name in MASKED else None
    whole = encoded(name, SequenceReadout((((7,),), ((11,),), ((13,),)), mask=mask))
    token = replace(whole, readout=TokenReadout((7, 11, 13), masked=mask is not None))
    if mask is not None:
        token = replace(token, tokens=tuple((*r[:-1], 4, r[-1]) for r in whole.tokens))
    a, b = whole.batch(range(4)), token.batch(range(4))
    assert a.mask("all").equal(b.mask("all"))
    with torch.no_grad():
        torch.testing.assert_close(
            margin(model.label_logits(a), a.gold), margin(model.label_logits(b), b.gold)
        )
    for rules in ("cdt", "cdt-linear", "ablation", "attribution"):
        engine = (
            relevance_by_difference
            if RULES[rules].activation == "difference"
            else relevance_by_gradient
        )
        one, two = (engine(model, x, means, RULES[rules]).heads for x in (a, b))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "bert"])
@torch.no_grad()
def test_ablation_is_that_of_whole_forward_passes(name):
    model, means = loaded(name), node_means(loaded(name))
    g = model.geometry
    readout = SequenceReadout(WORDS, mask=4 if name in MASKED else None)
    batch = encoded(name, readout).batch(range(4))
    where = batch.mask("all")
    found = relevance_by_difference(model, batch, means, RULES["ablation"]).heads
    keeps = torch.ones(len(g), g.n_layers, g.n_heads, dtype=torch.bool)
    for k, head in enumerate(g):
        keeps[k, head.layer, head.index] = False
    grid = ablated_label_logits(model, batch, keeps, means, "all", rows=3)
    clean = margin(model.label_logits(batch), batch.gold)
    for k, head in enumerate(g):

        def put(z, head=head):
            z = z.clone()
            z[..., head.index, :][where] = means.heads[head.layer, 0, head.index].to(z)
            return z

        labels = model.label_logits(batch, {model.z_hook(head.layer): put})
        lost = clean - margin(labels, batch.gold)
        torch.testing.assert_close(found[:, head.layer, head.index], lost, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grid[k], labels.to(grid), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_the_linear_scorer_is_the_slope_of_the_frozen_network(name):
    model, means = loaded(name), node_means(loaded(name))
    batch = encoded(name, SequenceReadout(WORDS)).batch(range(4))
    linear = relevance_by_gradient(model, batch, means, RULES["cdt-linear"]).heads
    # A source that deviates a little: difference and slope agree to second order.
    for head in (cl.Head(0, 1), cl.Head(2, 3)):
        step = 1e-3

        class Near(NodeMeans):
            """A mean that is hardly away from what the heads say."""

            def of_heads(self, layer, z, step=step):
                return z + step * (means.of_heads(layer, z) - z)

        where = batch.mask("all")
        network = FrozenNetwork(model, batch, RULES["cdt-linear"], reach=where)
        labels, _ = network.patched([[Source(head, where)]], Near(means.heads))
        moved = margin(network.labels, batch.gold) - margin(labels[0], batch.gold)
        torch.testing.assert_close(
            linear[:, head.layer, head.index], moved / step, rtol=2e-2, atol=1e-4
        )


@pytest.mark.slow
def test_training_and_transfer_take_whole_words(toy_task, toy_proxy):
    words = {"negative": " badi", "neutral": " bagu", "positive": [" gaga", " dada"]}
    task = replace(toy_task, labels=words)
    model = toy_proxy.clone()
    readout = task.encode(model, task["test"][:3]).readout
    assert isinstance(readout, SequenceReadout)
    tuned = cl.finetune(model, task, epochs=4, learning_rate=3e-3, quiet=True)
    assert cl.evaluate(tuned, task, "validation", quiet=True).accuracy > 0.6
    few = task["pool_a"][:60]
    baseline = cl.label_balanced_mean(tuned, task, examples=few, allow_chance=True, quiet=True)
    scores = cl.relevance(tuned, task, baseline, max_examples=20, quiet=True)
    with pytest.raises(cl.InputError, match="by_position"):
        cl.relevance(tuned, task, baseline, by_position=True, max_examples=20, quiet=True)
    with pytest.raises(cl.InputError, match="pooling='position'"):
        cl.label_balanced_mean(tuned, task, examples=few, pooling="position", quiet=True)
    result = cl.transfer(
        tuned, scores.top(3), task.to("near"), learning_rates=[1e-3], epochs=1, quiet=True
    )
    assert result.n_trainable > 0
