from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

import circuitlens as cl
from circuitlens import baseline
from circuitlens.scoring.scorers import Request, scorer
from circuitlens.tasks import toy


def naive_mean(model, task, examples, positions):
    """One example at a time, in the plainest way."""
    per_label: dict[str, list[torch.Tensor]] = {}
    for example in examples:
        encoded = task.encode(model, [example])
        batch = encoded.batch([0])
        with torch.no_grad():
            answer = model.hf_label_logits(batch)[0].argmax()
        if int(answer) != encoded.gold[0]:
            continue
        z = model.head_outputs(batch)[:, 0].double()
        z = z[:, 1:].mean(1) if positions == "all" else z[:, -1]
        per_label.setdefault(example.label, []).append(z)
    return torch.stack([torch.stack(zs).mean(0) for zs in per_label.values()]).mean(0)


@pytest.mark.parametrize("positions", ["all", "decision"])
def test_the_mean_is_balanced_over_labels_and_examples(toy_proxy, toy_task, positions):
    # Lopsided on purpose: many positive examples, few of the others.
    by_label = {
        label: [e for e in toy_task["pool_a"] if e.label == label] for label in toy_task.labels
    }
    examples = by_label["positive"][:20] + by_label["negative"][:5] + by_label["neutral"][:3]
    found = cl.label_balanced_mean(
        toy_proxy, toy_task, positions=positions, examples=examples, allow_chance=True
    )
    expected = naive_mean(toy_proxy, toy_task, examples, positions)
    torch.testing.assert_close(found.mean.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_batch_size_changes_nothing(toy_proxy, toy_task, toy_baseline):
    examples = toy_task["pool_a"][:300]
    other = cl.label_balanced_mean(toy_proxy, toy_task, examples=examples, batch_size=7)
    torch.testing.assert_close(other.mean, toy_baseline.mean, rtol=1e-5, atol=1e-6)
    assert other.example_ids == toy_baseline.example_ids
    assert other.n_per_label == toy_baseline.n_per_label


def test_class_directions_cancel(toy_proxy, toy_task, toy_baseline):
    # Means of single labels differ much more from each other than the balanced mean of one half
    # of the data does from that of the other half.
    pool = toy_task["pool_a"]
    halves = [
        cl.label_balanced_mean(toy_proxy, toy_task, examples=part).mean
        for part in (pool[300:600], pool[600:900])
    ]
    singles = [
        naive_mean(toy_proxy, toy_task, [e for e in pool[:200] if e.label == label], "all")
        for label in ("positive", "negative")
    ]
    assert (singles[0] - singles[1]).norm() > 2 * (halves[0] - halves[1]).norm()


def test_a_label_without_a_correct_answer_is_named(toy_proxy, toy_task):
    # A syllable, which the model never gives for an answer.
    confused = replace(toy_task, labels={**toy_task.labels, "positive": " vo"})
    examples = toy_task["pool_a"][:200]
    with pytest.raises(cl.InputError, match="label 'positive' is answered correctly"):
        cl.label_balanced_mean(toy_proxy, confused, examples=examples, allow_chance=True)


def test_a_model_at_chance_is_refused(toy_task):
    with pytest.raises(cl.CompetenceError, match=r"near chance .* cl\.finetune"):
        cl.label_balanced_mean(toy.toy_model(), toy_task, examples=toy_task["pool_a"][:200])


def test_means_by_position_are_counted_from_the_decision(tmp_path, toy_proxy, toy_task):
    examples = toy_task["pool_a"][:60]
    options = {"examples": examples, "allow_chance": True}
    found = cl.label_balanced_mean(toy_proxy, toy_task, pooling="position", **options)
    pooled = cl.label_balanced_mean(toy_proxy, toy_task, **options)
    assert torch.equal(found.mean, pooled.mean)
    found.save(tmp_path / "b.safetensors")
    found = cl.MeanBaseline.load(tmp_path / "b.safetensors")
    at_decision = cl.label_balanced_mean(toy_proxy, toy_task, positions="decision", **options)
    torch.testing.assert_close(found.by_position[-1], at_decision.mean)
    torch.testing.assert_close(found.mlp_by_position[-1], at_decision.mlp_mean)

    encoded = toy_task.encode(toy_proxy, examples)
    back = 6  # not all prompts are as long, but some of every label are
    per_label: dict[int, list[torch.Tensor]] = {}
    for i in range(len(encoded)):
        batch = encoded.batch([i])
        with torch.no_grad():
            if int(toy_proxy.label_logits(batch).argmax()) != encoded.gold[i]:
                continue
            if batch.mask("all").sum() >= back:
                z = toy_proxy.head_outputs(batch)[:, 0, -back]
                per_label.setdefault(encoded.gold[i], []).append(z)
    expected = torch.stack([torch.stack(zs).mean(0) for zs in per_label.values()]).mean(0)
    torch.testing.assert_close(found.by_position[-back], expected, rtol=1e-4, atol=1e-5)
    # <s> is no position of the mean, so the pooled one stands where the longest prompts begin.
    torch.testing.assert_close(found.by_position[0], found.mean)
    means = found.means()
    like = torch.zeros(1, len(found.by_position) + 3, 8, 8)
    wide = means.of_heads(0, like)
    assert torch.equal(wide[:3], found.mean[0].expand(3, -1, -1))
    assert torch.equal(wide[3:], found.by_position[:, 0])
    with pytest.raises(cl.InputError, match="nothing to separate"):
        cl.label_balanced_mean(
            toy_proxy, toy_task, positions="decision", pooling="position", **options
        )


def test_the_mean_of_mlps_is_that_of_their_outputs(toy_proxy, toy_task):
    found = cl.label_balanced_mean(toy_proxy, toy_task, examples=toy_task["pool_a"][:40])
    encoded = toy_task.encode(toy_proxy, toy_task["pool_a"][:40])
    per_label: dict[int, list[torch.Tensor]] = {}
    outputs: list[torch.Tensor] = []
    handle = toy_proxy.hf.model.layers[1].mlp.register_forward_hook(
        lambda _m, _i, output: outputs.append(output[0, 1:].mean(0))
    )
    for i in range(len(encoded)):
        batch = encoded.batch([i])
        with torch.no_grad():
            answer = toy_proxy.hf_label_logits(batch)[0].argmax()
        if int(answer) == encoded.gold[i]:
            per_label.setdefault(encoded.gold[i], []).append(outputs[-1])
    handle.remove()
    expected = torch.stack([torch.stack(ms).mean(0) for ms in per_label.values()]).mean(0)
    torch.testing.assert_close(found.mlp_mean[1], expected, rtol=1e-4, atol=1e-5)


def test_saving_and_loading(tmp_path, toy_proxy, toy_baseline):
    toy_baseline.save(tmp_path / "b.safetensors")
    again = cl.MeanBaseline.load(tmp_path / "b.safetensors")
    assert torch.equal(again.mean, toy_baseline.mean)
    assert torch.equal(again.mlp_mean, toy_baseline.mlp_mean)
    for name in ("positions", "example_ids", "n_per_label", "accuracy", "provenance"):
        assert getattr(again, name) == getattr(toy_baseline, name)
    assert again != toy_baseline  # an answer, though none about the tensors
    assert repr(again) == (
        "MeanBaseline(toy/source: 2 layers of 8 heads, all positions, pooled, "
        f"{len(again.example_ids)} examples)"
    )
    again.check_model(toy_proxy)
    again.check_task(cl.load_task("toy"))
    assert "264" in again._repr_html_() or "correct" in again._repr_html_()
    assert len(again.to_frame()) == len(toy_proxy.geometry)


def test_means_of_other_weights_are_refused(toy_baseline, toy_task):
    other = toy.toy_model(n_layers=2)
    with pytest.raises(cl.InputError, match="other weights"):
        cl.relevance(other, toy_task, toy_baseline)


def _other_tasks(task: cl.Task) -> dict[str, cl.Task]:
    """Tasks whose examples have the ids of those of ``task``."""
    first, *others = task.labels.values()
    swapped = dict(zip(task.labels, [*others, first], strict=True))
    return {
        "on toy/source, not on toy/near:": task.to("near"),
        "on toy/source with another template": replace(task, template="{text} ="),
        "on toy/source with .* other label words": replace(task, labels=swapped),
    }


@pytest.mark.parametrize("which", [0, 1, 2], ids=["language", "template", "label words"])
def test_means_of_another_task_are_refused(toy_proxy, toy_task, toy_baseline, toy_scores, which):
    words, other = list(_other_tasks(toy_task).items())[which]
    assert set(toy_baseline.example_ids) <= {e.id for e in other["pool_a"]}
    circuit = toy_scores.top(4)
    for call in (
        lambda: cl.relevance(toy_proxy, other, toy_baseline, max_examples=4),
        lambda: cl.discover(toy_proxy, other, toy_baseline, max_examples=4),
        lambda: cl.compare_scorers(toy_proxy, other, toy_baseline, methods=["cdt"], quiet=True),
        lambda: cl.faithfulness(toy_proxy, other, toy_scores, toy_baseline, sizes=[4], n_random=0),
        lambda: cl.minimality(toy_proxy, other, circuit, toy_baseline),
    ):
        with pytest.raises(cl.InputError, match=rf"baseline was taken {words}.* call cl\.label"):
            call()


def test_discovery_scores_the_examples_of_the_baseline_whatever_their_pool(toy_proxy, toy_task):
    examples = toy_task["pool_b"][:60]
    baseline = cl.label_balanced_mean(toy_proxy, toy_task, examples=examples)
    assert set(baseline.example_ids) <= {e.id for e in examples}
    scores = cl.relevance(toy_proxy, toy_task, baseline, method="ablation")
    assert scores.example_ids == baseline.example_ids
    first = next(e for e in examples if e.id == baseline.example_ids[0])
    batch = toy_task.encode(toy_proxy, [first]).batch([0])
    by_hand = scorer("ablation").batch(toy_proxy, batch, baseline.means(), Request()).heads[0]
    torch.testing.assert_close(scores.per_example[0], by_hand, rtol=1e-3, atol=1e-4)
    # What is held out by default holds them, so others are asked for.
    with pytest.raises(cl.InputError, match="was used for discovery"):
        cl.faithfulness(toy_proxy, toy_task, scores, baseline)
    options = {"examples": toy_task["validation"][:10], "sizes": [4], "n_random": 0}
    assert cl.faithfulness(toy_proxy, toy_task, scores, baseline, **options).sizes == (0, 4, 16)


def test_examples_of_ones_own_need_ids_of_their_own(toy_proxy, toy_task):
    translated = toy_task.to("near")["pool_a"][:40]
    with pytest.raises(cl.InputError, match="has the id of another example of toy/source"):
        cl.label_balanced_mean(toy_proxy, toy_task, examples=translated)
    mine = [replace(e, id=f"mine:{e.id}") for e in toy_task["pool_a"][:40]]
    baseline = cl.label_balanced_mean(toy_proxy, toy_task, examples=mine)
    assert set(baseline.example_ids) <= {e.id for e in mine}
    with pytest.raises(cl.InputError, match=r"example 'mine:.*, which is not in any pool of toy"):
        cl.relevance(toy_proxy, toy_task, baseline)


def test_means_of_nothing_and_misspelt_choices_are_refused(toy_proxy, toy_task, toy_baseline):
    with pytest.raises(cl.InputError, match="no examples to take means of: give some"):
        cl.label_balanced_mean(toy_proxy, toy_task, examples=[])
    with pytest.raises(cl.InputError, match="has no examples to score"):
        cl.relevance(toy_proxy, toy_task, replace(toy_baseline, example_ids=()))
    # The type checks of the tests would be first to complain; users do not have them.
    take = inspect.unwrap(cl.label_balanced_mean)
    for misspelt, known in (({"positions": "last"}, "all, decision"), ({"pooling": "p"}, "pooled")):
        with pytest.raises(cl.InputError, match=f"is unknown: choose one of {known}"):
            take(toy_proxy, toy_task, **misspelt)


def changed_outputs(monkeypatch, change):
    """Let ``change(layer, outputs, batch)`` edit the node outputs that means are taken of."""
    original = baseline._node_outputs

    def outputs(model, batch):
        logits, found = original(model, batch)
        sizes = [part.shape[-1] for part in found[0]]
        changed = (
            change(layer, torch.cat(pair, -1), batch).split(sizes, -1)
            for layer, pair in enumerate(found)
        )
        return logits, list(changed)

    monkeypatch.setattr(baseline, "_node_outputs", outputs)


@pytest.mark.parametrize("pooling", ["pooled", "position"])
def test_nan_in_the_padding_reaches_no_mean(monkeypatch, pooling):
    model, task = toy.toy_model(n_layers=1), cl.load_task("toy")
    options = {"examples": task["pool_a"][:60], "pooling": pooling, "allow_chance": True}
    everything_right(monkeypatch)
    clean = cl.label_balanced_mean(model, task, **options)
    changed_outputs(
        monkeypatch,
        lambda _, output, batch: output.masked_fill(
            batch.attention_mask[..., None] == 0, torch.nan
        ),
    )
    found = cl.label_balanced_mean(model, task, **options)
    assert torch.equal(found.means().heads, clean.means().heads)
    assert torch.equal(found.means().mlps, clean.means().mlps)


@pytest.mark.parametrize("pooling", ["pooled", "position"])
def test_a_mean_that_is_not_finite_is_named(monkeypatch, pooling):
    model, task = toy.toy_model(n_layers=2), cl.load_task("toy")
    everything_right(monkeypatch)
    d_head = model.geometry.d_head

    def overflow(layer, output, batch):
        if layer == 1:
            output[0, -1, 3 * d_head] = torch.inf
        return output

    changed_outputs(monkeypatch, overflow)
    with pytest.raises(cl.NotFiniteError, match=r"mean of a1\.h3 .* dtype float32"):
        cl.label_balanced_mean(
            model, task, examples=task["pool_a"][:60], pooling=pooling, allow_chance=True
        )


def everything_right(monkeypatch):
    """Let an untrained model answer every example rightly."""
    original = baseline._node_outputs

    def outputs(model, batch):
        logits, found = original(model, batch)
        return torch.nn.functional.one_hot(batch.gold, logits.shape[1]).to(logits), found

    monkeypatch.setattr(baseline, "_node_outputs", outputs)


@pytest.mark.parametrize("part", ["self_attn.o_proj", "mlp.down_proj"])
def test_a_weight_that_is_not_finite_is_named(toy_proxy, toy_task, part):
    broken = toy_proxy.clone()
    with torch.no_grad():
        broken.hf.get_parameter(f"model.layers.1.{part}.weight")[0, 3] = float("nan")
    message = rf"NaN or infinite logits on .* its weight model\.layers\.1\.{part}\.weight is not"
    with pytest.raises(cl.NotFiniteError, match=message):
        cl.label_balanced_mean(broken, toy_task, quiet=True)
    with pytest.raises(cl.NotFiniteError, match=message):
        cl.evaluate(broken, toy_task, toy_task["test"], quiet=True)
