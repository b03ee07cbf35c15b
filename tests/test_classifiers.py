"""Models with a classification head, of every architecture: parity, padding, oracles, files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as hf
from helpers import CLASSIFIERS, CONFIGS, classifier, node_means
from transformers import AutoModelForSequenceClassification

import circuitlens as cl
from circuitlens.adapt.strategies import Choice, strategy_of
from circuitlens.cdt import RULES, relevance_by_difference, relevance_by_gradient
from circuitlens.models.batch import Batch, margin
from circuitlens.models.geometry import norm_parameters, selection_masks

NAMES = list(CLASSIFIERS)


def batch_of(model: cl.HookedModel, *lengths: int) -> Batch:
    """Random texts, padded on the side that the head needs."""
    generator = torch.Generator().manual_seed(1)
    readout = replace(model.readout, classes=(1, 0, 2))
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        first = 0 if readout.pad_right else width - length
        tokens = torch.randint(5, 97, (length,), generator=generator)
        ids[row, first : first + length], mask[row, first : first + length] = tokens, 1
    return Batch(ids, mask, torch.arange(len(lengths)) % 3, readout)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_class_scores_are_hugging_faces_padded_or_not(name):
    model = classifier(name)
    batch = batch_of(model, 9, 5, 7)
    found = {
        "hooked": model.label_logits(batch).double(),
        "plain": model.hf_label_logits(batch).double(),
    }
    for row in range(3):
        ids = batch.input_ids[row : row + 1, batch.attention_mask[row].bool()]
        own = model.hf(input_ids=ids).logits[0, [1, 0, 2]].double()
        for labels in found.values():
            torch.testing.assert_close(labels[row], own, rtol=1e-4, atol=1e-5)
    where = batch.readout.where(batch)
    last = batch.attention_mask.cumsum(-1).argmax(-1)
    if model.family.pooled != "mean":
        columns = where.nonzero()[:, 1]
        assert columns.tolist() == (last.tolist() if model.family.causal else [0, 0, 0])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_ablation_is_that_of_whole_passes_and_cdt_of_the_frozen_network(name):
    model, means = classifier(name), node_means(classifier(name))
    batch = batch_of(model, 9, 5)
    where = batch.mask("all")
    found = relevance_by_difference(model, batch, means, RULES["ablation"]).heads
    clean = margin(model.label_logits(batch), batch.gold)
    for head in (cl.Head(0, 1), cl.Head(model.geometry.n_layers - 1, 2)):

        def put(z, head=head):
            z = z.clone()
            z[..., head.index, :][where] = means.heads[head.layer, 0, head.index].to(z)
            return z

        lost = clean - margin(
            model.label_logits(batch, {model.z_hook(head.layer): put}), batch.gold
        )
        torch.testing.assert_close(found[:, head.layer, head.index], lost, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_batched_scores_are_those_of_single_texts(name):
    model, means = classifier(name), node_means(classifier(name))
    for rules, engine in (
        ("cdt", relevance_by_difference),
        ("cdt-live", relevance_by_difference),
        ("cdt-linear", relevance_by_gradient),
        ("attribution", relevance_by_gradient),
    ):
        both = batch_of(model, 9, 5)
        found = engine(model, both, means, RULES[rules]).heads
        ids = both.input_ids[1:, both.attention_mask[1].bool()]
        alone = Batch(ids, torch.ones_like(ids), both.gold[1:], both.readout)
        one = engine(model, alone, means, RULES[rules]).heads
        torch.testing.assert_close(found[1:], one, rtol=1e-3, atol=1e-4)
        assert found.abs().max() > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_linear_scores_are_differences_by_secant(name):
    model, means = classifier(name), node_means(classifier(name))
    batch = batch_of(model, 9, 5)
    linear = relevance_by_gradient(model, batch, means, RULES["cdt-linear"]).heads
    moved = relevance_by_difference(model, batch, means, RULES["cdt-linear"]).heads
    torch.testing.assert_close(linear, moved, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_beta_and_gamma_add_up_to_the_class_scores(name):
    model = classifier(name)
    batch = batch_of(model, 7)
    g = model.geometry
    means = node_means(model).heads.expand(-1, 7, -1, -1)
    found = cl.decompose(model, batch.input_ids, [[(h, None) for h in g]], means, quiet=True)
    with torch.no_grad():
        own = model.hf_logits(batch)
    torch.testing.assert_close(found.total[0], own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.relevant + found.irrelevant, found.total)
    assert found.relevant.abs().max() > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_slices_have_the_gradients_of_the_masked_weights(name):
    model = classifier(name, torch.float32).clone()
    g, batch = model.geometry, batch_of(model, 9, 5)
    heads = (cl.Head(0, 1), cl.Head(1, 0))
    loss = batch.readout.losses(model, batch, model.hf).sum()
    names, parameters = zip(*model.hf.named_parameters(), strict=True)
    full = dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))
    slices = [s for h in heads for s in g.slices(h)]
    masks = selection_masks(model.hf, slices, [])
    choice = Choice(cl.Circuit(heads, g.n_layers, g.n_heads))
    how = strategy_of("circuit")
    adapted = how.make(model, choice, how.choose(model, choice))
    before = batch.readout.losses(adapted.model, batch, adapted.model.hf).sum()
    torch.testing.assert_close(before, loss, rtol=1e-4, atol=1e-5)
    norms = {n.rsplit(".", 1)[0] for n in norm_parameters(model.hf)}
    leaves = {n: p for n, p in adapted.model.hf.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(before, list(leaves.values()), allow_unused=True)
    of_slices = sum(float(full[n][m].square().sum()) for n, m in masks.items())
    of_leaves = sum(
        float(grad.square().sum())
        for leaf, grad in zip(leaves, grads, strict=True)
        if grad is not None and leaf.split(".headslice_")[0] not in norms
    )
    assert of_leaves == pytest.approx(of_slices, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    model = classifier(name, torch.float32)
    batch = batch_of(model, 9, 5)
    model.save(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert [again.config.id2label[n] for n in range(3)] == ["a", "b", "c"]
    with torch.no_grad():
        found = cl.load(again).hf_logits(batch)
        torch.testing.assert_close(found, model.hf_logits(batch))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (hf.AlbertConfig, "all its layers share one set of weights"),
        (hf.DebertaV2Config, "terms of content and of relative positions"),
    ],
)
def test_types_that_cannot_be_hooked_are_refused_by_name(config, reason, tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    made = config(vocab_size=97, num_hidden_layers=2, **sizes)
    model = AutoModelForSequenceClassification.from_config(made)
    with pytest.raises(cl.UnsupportedModelError, match=f"{made.model_type} are not.*{reason}"):
        cl.load(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(cl.UnsupportedModelError, match=reason):
        cl.load(tmp_path)


@torch.no_grad()
def test_a_head_that_pools_all_tokens_is_read_at_all_of_them():
    config = CONFIGS["modernbert"]()
    config.classifier_pooling, config.num_labels = "mean", 3
    torch.manual_seed(0)
    model = cl.load(AutoModelForSequenceClassification.from_config(config))
    batch = batch_of(model, 9, 5, 7)
    assert model.family.pooled == "mean"
    assert batch.readout.where(batch).equal(batch.attention_mask.bool())
    for found in (model.label_logits(batch), model.hf_label_logits(batch)):
        for row in range(3):
            ids = batch.input_ids[row : row + 1, batch.attention_mask[row].bool()]
            own = model.hf(input_ids=ids).logits[0, [1, 0, 2]]
            torch.testing.assert_close(found[row], own, rtol=1e-4, atol=1e-5)
