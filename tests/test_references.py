"""What heads are measured from and set to: means, constants that are learned, other prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import ALL, FLOAT32_ONLY, answers, loaded, prompts, quick_or_slow, row

import circuitlens as cl
from circuitlens.cdt import RULES
from circuitlens.cdt.ablation import ablated_label_logits
from circuitlens.cdt.difference import relevance_by_difference
from circuitlens.models.batch import margin
from circuitlens.models.hooks import recording
from circuitlens.node_means import NodeMeans, PairedMeans


def some_means(model) -> tuple[torch.Tensor, torch.Tensor]:
    g = model.geometry
    torch.manual_seed(4)
    return (
        torch.randn(g.n_layers, g.n_heads, g.d_head, dtype=model.dtype),
        torch.randn(g.n_layers, g.d_model, dtype=model.dtype),
    )


def paired(model, *lengths):
    batch = prompts(*lengths, n_prefix=1)
    partner = prompts(*reversed(lengths), seed=9, n_prefix=1)
    return replace(batch, partner=partner), PairedMeans.pooled(*some_means(model))


@pytest.mark.parametrize("name", [quick_or_slow(name) for name in ALL])
def test_ablated_heads_are_those_of_the_partner(name):
    model = loaded(name)
    batch, means = paired(model, 7, 4, 6)
    torch.manual_seed(1)
    keeps = torch.rand(4, 3, 4) < 0.6
    found = ablated_label_logits(model, batch, keeps, means, "all", rows=2)
    expected = torch.stack([by_hand(model, batch, keep, means) for keep in keeps])
    close = 5e-5 if name in FLOAT32_ONLY else 1e-9
    torch.testing.assert_close(found.to(expected), expected, rtol=close, atol=close)
    plain = NodeMeans(means.heads, means.mlps)
    assert not torch.allclose(found, ablated_label_logits(model, batch, keeps, plain, "all"))


def by_hand(model, batch, keep, means):
    """Prompt by prompt without padding, position by position counted from the end."""
    found = []
    names = [model.z_hook(layer) for layer in range(3)]
    for n in range(len(batch)):
        alone, other = row(replace(batch, partner=None), n), row(batch.partner, n)
        hooks, theirs = recording(names)
        model.logits(other, hooks)
        own, long = alone.input_ids.shape[1], other.input_ids.shape[1]

        def put(layer, own=own, long=long, theirs=theirs):
            def hook(z):
                z = z.clone()
                for head in range(4):
                    if keep[layer, head]:
                        continue
                    for position in range(1, own):
                        back = own - position
                        z[0, position, head] = (
                            theirs[names[layer]][0, long - back, head]
                            if back <= long
                            else means.heads[layer, 0, head]
                        )
                return z

            return hook

        with torch.no_grad():
            logits = model.logits(alone, {names[layer]: put(layer) for layer in range(3)})
        found.append(answers(logits, alone))
    return torch.cat(found)


def test_scorers_measure_from_the_partner():
    """By difference: a head is set to what it is on the partner, which ablation does too."""
    model = loaded("qwen2")
    batch, means = paired(model, 6, 6)
    g = model.geometry
    live = replace(RULES["cdt-live"], freeze_patterns=False, freeze_scales=False)
    found = relevance_by_difference(model, batch, means, live).heads
    everything = torch.ones(g.n_layers, g.n_heads, dtype=torch.bool)
    keeps = torch.stack([everything.clone() for _ in range(len(g))])
    for n, head in enumerate(g):
        keeps[n, head.layer, head.index] = False
    without = ablated_label_logits(model, batch, keeps, means, "all")
    with torch.no_grad():
        clean = margin(model.label_logits(batch), batch.gold)
    expected = (clean - margin(without, batch.gold)).T.unflatten(1, (g.n_layers, g.n_heads))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("reference", ["resample", "counterfactual"])
@pytest.mark.parametrize(
    "method", ["cdt-linear", "cdt", "ablation", "midpoint", "attribution", "sampled", "greedy"]
)
def test_every_scorer_and_verb_takes_partners(method, reference, toy_proxy, toy_task, monkeypatch):
    task = with_counterfactuals(toy_task)
    baseline = cl.label_balanced_mean(
        toy_proxy, task, reference=reference, examples=task["pool_a"][:60], quiet=True
    )
    given = (toy_proxy, task)
    scores = cl.relevance(*given, baseline, method=method, max_examples=6, rounds=2, quiet=True)
    assert scores.provenance.settings["reference"] == reference
    assert scores.per_example.isfinite().all()
    if method == "ablation":
        held = task.held_out[:12]
        curve = cl.faithfulness(*given, scores, baseline, examples=held, n_random=1, quiet=True)
        small = cl.faithfulness(
            *given, scores, baseline, examples=held, n_random=1, batch_size=3, rows=4, quiet=True
        )
        assert curve.margin == pytest.approx(small.margin, rel=1e-4, abs=1e-4)
        assert curve.provenance.settings["reference"] == reference
        circuit = scores.top(2)
        cl.head_effects(*given, circuit, baseline, max_examples=6, quiet=True)
        cl.minimality(*given, circuit, baseline, examples=held, quiet=True)


def with_counterfactuals(task):
    """Each sentence's words in the opposite order stand for the prompt without what decides."""

    def changed(e):
        other = " ".join(reversed(e.fields["text"].split()))
        return replace(e, counterfactual={"text": other})

    pools = {
        pool: tuple(map(changed, task[pool])) for pool in ("pool_a", "pool_b", "validation", "test")
    }
    return cl.Task.from_records(
        [
            {"id": e.id, "text": e.fields["text"], "label": e.label,
             "counterfactual": e.counterfactual["text"]}
            for pool in pools.values() for e in pool
        ],
        language="source",
        template=task.template,
        labels=dict(task.labels),
    )  # fmt: skip


def test_partners_are_of_another_label_and_the_same_among_others(toy_proxy, toy_task):
    baseline = cl.label_balanced_mean(toy_proxy, toy_task, reference="resample", quiet=True)
    examples = toy_task.held_out[:30]
    by_tokens = {
        tokens: e.label
        for e, tokens in zip(
            toy_task["pool_a"], toy_task.encode(toy_proxy, toy_task["pool_a"]).tokens, strict=True
        )
    }
    encoded = baseline.encode(toy_proxy, toy_task, examples)
    assert all(by_tokens[p] != e.label for p, e in zip(encoded.partners, examples, strict=True))
    assert len(set(encoded.partners)) > 10
    few = baseline.encode(toy_proxy, toy_task, examples[7:3:-1])
    assert few.partners == encoded.partners[7:3:-1]
    assert encoded.take([4]).partners == (few.partners[-1],)


def test_a_counterfactual_column_is_read_and_its_absence_named(toy_proxy, toy_task, tmp_path):
    rows = "id,text,label,counterfactual\n" + "".join(
        f"{i},good {i},{'positive' if i % 2 else 'negative'},fine {i}\n" for i in range(60)
    )
    (tmp_path / "xx.csv").write_text(rows)
    labels = {"positive": " good", "negative": " bad"}
    task = cl.Task.from_csv(tmp_path / "xx.csv", language="xx", template="{text} is", labels=labels)
    assert task["pool_a"][0].counterfactual["text"].startswith("fine")
    assert list(task["pool_a"][0].fields) == ["text"]
    with pytest.raises(cl.InputError, match="has no counterfactual prompt: give a column"):
        cl.label_balanced_mean(toy_proxy, toy_task, reference="counterfactual", quiet=True)
    baseline = cl.label_balanced_mean(toy_proxy, toy_task, reference="resample", quiet=True)
    for verb in (cl.discover, cl.neuron_relevance):
        with pytest.raises(cl.InputError, match="needs means, and this baseline has reference"):
            verb(toy_proxy, toy_task, baseline)
    with pytest.raises(cl.InputError, match="The explorer needs means"):
        cl.view.explore(model=toy_proxy, task=toy_task, baseline=baseline)
    with pytest.raises(cl.InputError, match="has no pooling by position"):
        cl.label_balanced_mean(toy_proxy, toy_task, reference="resample", pooling="position")


def test_optimal_constants_do_least_harm(toy_proxy, toy_task):
    held = toy_task.held_out[:80]
    examples = toy_task["pool_a"][:150]
    given = {"examples": examples, "quiet": True}
    means = cl.label_balanced_mean(toy_proxy, toy_task, **given)
    learned = cl.label_balanced_mean(toy_proxy, toy_task, reference="optimal", **given)
    again = cl.label_balanced_mean(toy_proxy, toy_task, reference="optimal", **given)
    assert torch.equal(learned.mean, again.mean)
    assert learned.reference == "optimal"
    assert not torch.allclose(learned.mean, means.mean)
    assert torch.equal(learned.mlp_mean, means.mlp_mean)
    ranked = cl.relevance(toy_proxy, toy_task, means, quiet=True)

    def divergence(baseline):
        """KL between the whole model and random circuits, on sentences not learned on."""
        encoded = toy_task.encode(toy_proxy, held)
        generator = torch.Generator().manual_seed(11)
        keeps = torch.rand(24, 2, 8, generator=generator) < 0.6
        keeps[0] = True
        _, batch = next(iter(encoded.batches(len(held))))
        labels = ablated_label_logits(toy_proxy, batch, keeps, baseline.means(), "all")
        found = labels.log_softmax(-1)
        return float((found[:1].exp() * (found[:1] - found)).sum(-1)[1:].mean())

    assert divergence(learned) < 0.9 * divergence(means)
    curve = cl.faithfulness(
        toy_proxy, toy_task, ranked, learned, examples=held, n_random=2, quiet=True
    )
    assert curve.provenance.settings["reference"] == "optimal"
