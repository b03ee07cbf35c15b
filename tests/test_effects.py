"""Effects of single heads, the smallest circuit, circuits of one's own, and published ones."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

import circuitlens as cl
from circuitlens.circuits.published import PUBLISHED
from circuitlens.models.passes import counting
from circuitlens.utils.provenance import Provenance


@pytest.fixture(scope="module")
def effects(toy_proxy, toy_task, toy_scores, toy_baseline):
    return cl.head_effects(toy_proxy, toy_task, toy_scores.top(5), toy_baseline, quiet=True)


def test_effects_are_the_scores_of_exact_ablation(effects, toy_proxy, toy_task, toy_baseline):
    exact = cl.relevance(toy_proxy, toy_task, toy_baseline, method="ablation", quiet=True)
    assert effects.example_ids == exact.example_ids
    for place, head in enumerate(effects.heads):
        torch.testing.assert_close(
            effects.per_example[:, place].float(),
            exact.per_example[:, head.layer, head.index],
            atol=1e-4,
            rtol=1e-3,
        )


def test_effects_are_read_back_whole(effects, toy_scores, tmp_path):
    effects.save(tmp_path / "effects.safetensors")
    again = cl.HeadEffects.load(tmp_path / "effects.safetensors")
    assert again.heads == effects.heads
    assert torch.equal(again.per_example, effects.per_example)
    frame = again.to_frame(toy_scores)
    assert list(frame["effect"]) == sorted(frame["effect"], reverse=True)
    row = frame.iloc[0]
    head = cl.Head.parse(row["head"])
    assert row["relevance"] == pytest.approx(float(toy_scores.mean[head.layer, head.index]))
    assert row["effect_low"] <= row["effect"] <= row["effect_high"]


def test_a_head_that_does_nothing_is_contradicted(effects):
    silent = cl.HeadEffects(
        effects.heads,
        torch.cat([effects.per_example[:, :-1], torch.zeros(len(effects.per_example), 1)], dim=1),
        effects.example_ids,
        effects.provenance,
    )
    assert effects.heads[-1] in silent.contradicted()
    assert silent.of(cl.Head(1, 7)) is None or cl.Head(1, 7) in silent.heads


def test_effects_need_heads_of_this_model(toy_proxy, toy_task, toy_baseline):
    with pytest.raises(cl.InputError, match="no heads to ablate"):
        cl.head_effects(toy_proxy, toy_task, [], toy_baseline)
    other = cl.Circuit.of(["a0.h0"], 5, 5)
    with pytest.raises(cl.InputError, match="is of a 5 × 5 model"):
        cl.head_effects(toy_proxy, toy_task, other, toy_baseline)


def test_the_smallest_circuit_reaches_its_share_and_smaller_ones_do_not(
    toy_proxy, toy_task, toy_scores, toy_baseline
):
    found = cl.smallest_circuit(toy_proxy, toy_task, toy_scores, toy_baseline, f=0.6, quiet=True)
    examples = [e for e in toy_task["pool_a"] if e.id in toy_scores.example_ids]
    ranking = toy_scores.ranking()
    reached = {}
    for n in (len(found) - 1, len(found)):
        top = cl.Circuit.of(ranking[:n], toy_scores.n_layers, toy_scores.n_heads)
        reached[n] = by_hand(toy_proxy, toy_task, toy_baseline, examples, top)
    assert set(found) == set(ranking[: len(found)])
    assert reached[len(found)] >= 0.6 - 0.05
    assert reached[len(found) - 1] < 0.6 + 0.05
    assert reached[len(found)] > reached[len(found) - 1]
    with pytest.raises(cl.InputError, match="between 0 and 1"):
        cl.smallest_circuit(toy_proxy, toy_task, toy_scores, toy_baseline, f=1.5)


def by_hand(model, task, baseline, examples, circuit):
    """f of a circuit, by hooks that are written here."""
    encoded = task.encode(model, examples[:120])
    g, means = model.geometry, baseline.means()

    def mean_margin(kept):
        total = 0.0
        for _, batch in encoded.batches(32, model.device):
            where = batch.mask("all")

            def hook(layer, where=where):
                def set_to_mean(z):
                    z = z.clone()
                    for index in range(g.n_heads):
                        if cl.Head(layer, index) not in kept:
                            mu = means.of_heads(layer, z)[..., index, :].expand_as(z[:, :, index])
                            z[:, :, index][where] = mu[where]
                    return z

                return set_to_mean

            hooks = {model.z_hook(layer): hook(layer) for layer in range(g.n_layers)}
            with torch.no_grad():
                logits = model.label_logits(batch, hooks)
            right = logits.gather(1, batch.gold[:, None])[:, 0]
            others = (logits.sum(1) - right) / (logits.shape[1] - 1)
            total += float((right - others).sum())
        return total / len(encoded)

    empty, full = mean_margin(set()), mean_margin(set(g))
    return (mean_margin(set(circuit)) - empty) / (full - empty)


def test_a_circuit_has_the_faithfulness_of_its_place_in_the_ranking(
    toy_proxy, toy_task, toy_scores, toy_baseline
):
    options = {"n_random": 2, "quiet": True}
    curve = cl.faithfulness(toy_proxy, toy_task, toy_scores, toy_baseline, sizes=[4], **options)
    own = cl.Circuit.of(map(str, toy_scores.top(4)), toy_scores.n_layers, toy_scores.n_heads)
    one = cl.faithfulness(toy_proxy, toy_task, own, toy_baseline, **options)
    assert one.sizes == (0, 4, len(toy_proxy.geometry))
    assert one.method == "by hand"
    place = curve.sizes.index(4)
    np.testing.assert_allclose(one.faithfulness[1], curve.faithfulness[place], atol=1e-6)
    np.testing.assert_allclose(one.completeness[1], curve.completeness[place], atol=1e-6)
    assert one.random_margin.shape == (2, 3)
    assert one.smallest(min(0.99, float(one.faithfulness[1]))) == 4
    cl.view.faithfulness_curve([curve, one])
    with pytest.raises(cl.InputError, match="leave sizes out"):
        cl.faithfulness(toy_proxy, toy_task, own, toy_baseline, sizes=[3])
    with pytest.raises(cl.InputError, match="No circuit of this curve keeps f = 5"):
        one.smallest(5.0)


def test_an_empty_and_a_whole_circuit_can_be_measured(toy_proxy, toy_task, toy_baseline):
    g = toy_proxy.geometry
    for heads in ([], list(g)):
        own = cl.Circuit.of(heads, g.n_layers, g.n_heads)
        curve = cl.faithfulness(toy_proxy, toy_task, own, toy_baseline, n_random=1, quiet=True)
        assert curve.sizes == (0, len(g))


# -- counting ------------------------------------------------------------------------------------


def test_passes_are_counted_and_stay_below_what_plans_say(toy_proxy, toy_task, toy_baseline):
    from circuitlens.scoring.scorers import SCORERS, Request

    g, n = toy_proxy.geometry, 6
    for name, by in SCORERS.items():
        if by.only or by.control:
            continue
        with counting() as count:
            cl.relevance(toy_proxy, toy_task, toy_baseline, method=name, max_examples=n, quiet=True)
        most = by.passes(g.n_layers, g.n_heads, Request())
        assert count.forward / n <= most[0] + 1e-6, name
        assert count.forward / n >= 0.4 * most[0], name
        assert count.backward / n <= most[1] + 1e-6, name
        assert count.backward / n >= 0.6 * most[1], name


# -- published circuits --------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_circuits_belong_to_a_task_that_can_be_loaded(name, caplog):
    with caplog.at_level(logging.WARNING):
        task = cl.load_task(name)
    assert not caplog.records
    for pool in ("pool_a", "pool_b", "validation", "test"):
        for e in task[pool]:
            right, wrong = (
                e.fields[e.label],
                e.fields["second" if e.label == "first" else "first"],
            )
            assert right != wrong
            assert len(e.counterfactual["text"].split()) == len(e.fields["text"].split())
    published = cl.published_circuit(name)
    everything = published.overlap(published.circuit).set_index("group")
    assert (everything["found"] == everything["published"]).all()
    assert everything.loc["all", "published"] == sum(map(len, published.groups.values()))
    nothing = published.overlap(published.circuit.complement()).set_index("group")
    assert not nothing["found"].any()
    with pytest.raises(cl.InputError, match="12 × 12"):
        published.overlap(cl.Circuit.of([], 3, 8))


def test_the_receiver_is_whoever_does_not_give():
    for e in cl.load_task("ioi")["test"]:
        names = [e.fields["first"], e.fields["second"]]
        text = e.fields["text"]
        giver = next(n for n in names if text.count(n) == 2)
        assert e.fields[e.label] != giver
        assert text.count(e.fields[e.label]) == 1
        assert not any(n in e.counterfactual["text"].split() for n in names)


def test_the_right_year_comes_after_the_first():
    for e in cl.load_task("greater-than")["test"]:
        start = int(e.fields["text"].split()[6])
        wrong = "second" if e.label == "first" else "first"
        assert int(e.fields[e.label]) > start >= int(e.fields[wrong])


def test_templates_know_english_only():
    with pytest.raises(cl.InputError, match="no language 'german'"):
        cl.load_task("ioi", "german")
    with pytest.raises(cl.InputError, match="makes its own data"):
        cl.load_task("ioi", data=".")


# -- references ----------------------------------------------------------------------------------


def test_references_are_what_they_say(toy_proxy, toy_task):
    few = toy_task["pool_a"][:60]
    options = {"examples": few, "quiet": True, "allow_chance": True}
    balanced, plain, zero = (
        cl.label_balanced_mean(toy_proxy, toy_task, reference=name, **options)
        for name in ("label-balanced", "mean", "zero")
    )
    assert not zero.mean.any()
    assert zero.reference == "zero"
    by_label = {
        label: cl.label_balanced_mean(
            toy_proxy,
            toy_task,
            examples=[e for e in few if e.label == label] + list(_one_of_each(toy_task, label)),
            reference="mean",
            quiet=True,
            allow_chance=True,
        )
        for label in toy_task.labels
    }
    assert set(by_label) == set(toy_task.labels)
    # By hand: the mean over examples of each example's own mean.
    encoded = toy_task.encode(toy_proxy, few)
    total, n = torch.zeros_like(plain.mean, dtype=torch.float64), 0
    for _, batch in encoded.batches(16, toy_proxy.device):
        z = toy_proxy.head_outputs(batch)
        right = toy_proxy.label_logits(batch).argmax(1) == batch.gold
        where = batch.mask("all")
        for row in right.nonzero()[:, 0].tolist():
            total += z[:, row, where[row]].double().mean(1)
            n += 1
    torch.testing.assert_close(plain.mean.double(), total / n, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain.mean, balanced.mean, atol=1e-6)


def _one_of_each(task, but):
    for label in task.labels:
        if label != but:
            yield next(e for e in task["pool_a"][60:] if e.label == label)


# -- scorers that look again ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def chosen(toy_proxy, toy_task, toy_baseline):
    return cl.relevance(
        toy_proxy, toy_task, toy_baseline, method="auto", max_examples=60, mlps=True, quiet=True
    )


def test_auto_takes_the_ranking_whose_circuits_keep_most(chosen, toy_proxy, toy_task, toy_baseline):
    said = chosen.provenance.settings
    assert set(said["mean_f"]) == {"cdt-linear", "sampled"}
    assert said["mean_f"][said["chosen"]] == max(said["mean_f"].values())
    scored = [e for e in toy_task["pool_a"] if e.id in chosen.example_ids]
    for name, f in said["mean_f"].items():
        own = cl.relevance(
            toy_proxy, toy_task, toy_baseline, method=name, max_examples=60, quiet=True
        )
        by_size = [
            by_hand(toy_proxy, toy_task, toy_baseline, scored, own.top(n)) for n in (4, 8, 12)
        ]
        assert np.mean(by_size) == pytest.approx(f, abs=1e-3), name
        if name == said["chosen"]:
            torch.testing.assert_close(own.per_example, chosen.per_example)


def test_auto_scores_mlps_by_exact_ablation(chosen, toy_proxy, toy_task, toy_baseline):
    exact = cl.relevance(
        toy_proxy,
        toy_task,
        toy_baseline,
        method="ablation",
        mlps=True,
        max_examples=60,
        quiet=True,
    )
    torch.testing.assert_close(chosen.mlps, exact.mlps, atol=1e-4, rtol=1e-3)


def test_relevance_in_circuits_is_a_gradient(toy_proxy, toy_task, toy_baseline):
    """Beside differences of the margin by the gates themselves."""
    from circuitlens.cdt import RULES
    from circuitlens.cdt.gated import relevance_in_circuits
    from circuitlens.models.batch import margin

    encoded = toy_task.encode(toy_proxy, toy_task["pool_a"][:4])
    ((_, batch),) = encoded.batches(4, toy_proxy.device)
    g, means = toy_proxy.geometry, toy_baseline.means()
    generator = torch.Generator().manual_seed(0)
    gates = torch.rand(4, g.n_layers, g.n_heads, generator=generator)
    found = relevance_in_circuits(toy_proxy, batch, means, gates, RULES["attribution"]).heads

    def margins(gates):
        where = batch.mask("all")[:, :, None, None]

        def hook(layer):
            def scale(z):
                mean = means.of_heads(layer, z)
                return torch.where(where, mean + gates[:, layer][:, None, :, None] * (z - mean), z)

            return scale

        hooks = {toy_proxy.z_hook(layer): hook(layer) for layer in range(g.n_layers)}
        with torch.no_grad():
            return margin(toy_proxy.label_logits(batch, hooks), batch.gold)

    step = 1e-2
    for head in (cl.Head(0, 1), cl.Head(1, 3), cl.Head(1, 6)):
        more, less = gates.clone(), gates.clone()
        more[:, head.layer, head.index] += step
        less[:, head.layer, head.index] -= step
        slope = (margins(more) - margins(less)) / (2 * step)
        torch.testing.assert_close(
            found[:, head.layer, head.index], slope.float(), atol=2e-3, rtol=2e-2
        )


def test_scorers_that_look_again_follow_from_the_seed_and_not_from_batches(
    toy_proxy, toy_task, toy_baseline
):
    def score(method, **options):
        return cl.relevance(
            toy_proxy, toy_task, toy_baseline, method=method, max_examples=24, quiet=True, **options
        )

    first, again = score("sampled", rounds=2), score("sampled", rounds=2)
    assert torch.equal(first.per_example, again.per_example)
    other = score("sampled", rounds=2, batch_size=5)
    assert other.example_ids == first.example_ids
    order = score("iterative")
    torch.testing.assert_close(order.mean, score("iterative", batch_size=5).mean)
    assert order.whole
    assert sorted(order.mean.flatten().tolist()) == pytest.approx(
        [i / len(toy_proxy.geometry) for i in range(len(toy_proxy.geometry))]
    )
    for wrong in ({"rounds": 0}, {"share": 1.0}, {"candidates": []}):
        with pytest.raises(cl.InputError):
            score("auto", **wrong)
    with pytest.raises(cl.InputError, match="candidates"):
        score("auto", candidates=["nonsense"])


def test_samples_of_examples_have_areas_of_their_own(toy_proxy, toy_task, toy_baseline):
    compared = cl.compare_scorers(
        toy_proxy,
        toy_task,
        toy_baseline,
        methods=["cdt-linear", "greedy"],
        max_examples=20,
        samples=2,
        sizes=[4, 8],
        examples=toy_task["validation"][:40],
        n_random=1,
        quiet=True,
    )
    table = compared.table.set_index("scorer")
    assert table.loc["greedy", "of_greedy_f"] == pytest.approx(1)
    row = table.loc["cdt-linear"]
    assert row["area_f_min"] <= row["area_f"] <= row["area_f_max"]
    assert (row["forward"], row["backward"]) == (1, 1)
    with pytest.raises(cl.InputError, match="give max_examples"):
        cl.compare_scorers(toy_proxy, toy_task, toy_baseline, samples=2)


# -- what heads do -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def roles(toy_proxy, toy_task, toy_scores, toy_baseline):
    circuit = toy_scores.top(3)
    return cl.head_roles(toy_proxy, toy_task, circuit, toy_baseline, max_examples=24, quiet=True)


def test_roles_are_means_of_attention(roles, toy_proxy, toy_task, toy_scores, toy_baseline):
    """By hand, prompt by prompt and without padding."""
    from circuitlens.models.hooks import pattern_hook, recording

    scored = [e for e in toy_task["pool_a"] if e.id in toy_scores.example_ids]
    ids = set(_ids_of(roles, toy_task, toy_baseline))
    role = roles.roles[0]
    first, previous, itself, queries, later = 0.0, 0.0, 0.0, 0, 0
    looked: dict[int, list[float]] = {}
    for example in (e for e in scored if e.id in ids):
        ((_, batch),) = toy_task.encode(toy_proxy, [example]).batches(1, toy_proxy.device)
        hooks, found = recording([pattern_hook(role.head.layer)])
        with torch.no_grad():
            toy_proxy.label_logits(batch, hooks)
        pattern = found[pattern_hook(role.head.layer)][0, role.head.index].double()
        n = len(pattern)
        for q in range(n):
            itself += float(pattern[q, q])
            queries += 1
            if q:
                first += float(pattern[q, 0])
                previous += float(pattern[q, q - 1])
                later += 1
        for k, token in enumerate(batch.input_ids[0].tolist()):
            looked.setdefault(token, []).append(float(pattern[-1, k]))
    assert role.itself == pytest.approx(itself / queries, abs=1e-5)
    assert role.first == pytest.approx(first / later, abs=1e-5)
    assert role.previous == pytest.approx(previous / later, abs=1e-5)
    means = {t: np.mean(found) for t, found in looked.items() if len(found) >= 5}
    best = max(means, key=lambda t: means[t])
    assert role.looked_at[0][0] == toy_proxy.tokens([best])[0]
    assert role.looked_at[0][1] == pytest.approx(means[best], abs=1e-5)


def test_the_attention_on_a_few_prompts_is_kept(roles, toy_proxy, toy_task, toy_baseline, tmp_path):
    """By hand, from the decision of each prompt."""
    from circuitlens.models.hooks import pattern_hook, recording

    by_id = {e.id: e for e in toy_task["pool_a"]}
    seen = [by_id[i] for i in _ids_of(roles, toy_task, toy_baseline)]
    labels = [label for label, _ in roles.prompts]
    assert labels == sorted(labels, key=list(toy_task.labels).index)
    assert set(labels) == set(toy_task.labels)
    for n, (label, tokens) in enumerate(roles.prompts):
        found = []
        for example in (e for e in seen if e.label == label):
            batch = toy_task.encode(toy_proxy, [example]).batch([0])
            if tuple(toy_proxy.tokens(batch.input_ids[0].tolist())) == tokens:
                found.append(batch)
        for role in roles.roles:
            hooks, recorded = recording([pattern_hook(role.head.layer)])
            with torch.no_grad():
                toy_proxy.label_logits(found[0], hooks)
            pattern = recorded[pattern_hook(role.head.layer)][0, role.head.index, -1]
            assert role.attention[n] == pytest.approx(pattern.tolist(), abs=1e-6)
            assert sum(role.attention[n]) == pytest.approx(1, abs=1e-5)
    roles.save(tmp_path / "roles.json")
    assert cl.HeadRoles.load(tmp_path / "roles.json").prompts == roles.prompts


def _ids_of(roles, task, baseline):
    from circuitlens.scoring.score_heads import discovery_examples

    return [e.id for e in discovery_examples(task, baseline, roles.n_examples, 0)]


def test_what_a_head_raises_adds_up_to_its_effect(
    roles, toy_proxy, toy_task, toy_scores, toy_baseline
):
    effects = cl.head_effects(
        toy_proxy, toy_task, toy_scores.top(3), toy_baseline, max_examples=24, quiet=True
    )
    labels = {e.id: e.label for e in toy_task["pool_a"]}
    gold = np.array([labels[i] for i in effects.example_ids])
    n = len(toy_task.labels)
    for place, role in enumerate(roles.roles):
        assert role.head == effects.heads[place]
        for label, row in role.raises.items():
            assert sum(row.values()) == pytest.approx(0, abs=1e-6)
            of_class = effects.per_example[:, place].numpy()[gold == label].mean()
            # The margin is the logit of the right label minus the mean of the others.
            assert row[label] * n / (n - 1) == pytest.approx(of_class, abs=1e-4)


def test_roles_are_read_back_whole(roles, tmp_path):
    roles.save(tmp_path / "roles.json")
    again = cl.HeadRoles.load(tmp_path / "roles.json")
    assert again.roles == roles.roles
    assert again.of(str(roles.roles[1].head)) == roles.roles[1]
    assert list(again.to_frame()["head"]) == [str(r.head) for r in roles.roles]
    assert "From the decision it looks at" in roles.roles[0].summary
    with pytest.raises(cl.InputError, match=r"Head a9\.h9 is none of"):
        roles.of("a9.h9")


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_tasks_of_published_circuits_run_on_gpt2(name, caplog):
    """A tiny random one, whose tokenizer knows no names: they are words of several tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from circuitlens.tasks.toy import toy_tokenizer

    tokenizer = toy_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_head=4, n_embd=32, n_positions=256)
    torch.manual_seed(0)
    model = cl.HookedModel(GPT2LMHeadModel(config), tokenizer, "tiny-gpt2")
    task = cl.load_task(name, max_text_tokens=160)
    few = task["pool_a"][:12]
    baseline = cl.label_balanced_mean(model, task, examples=few, allow_chance=True, quiet=True)
    for method in ("cdt-linear", "auto"):
        scores = cl.relevance(model, task, baseline, method=method, quiet=True)
        assert torch.isfinite(scores.mean).all()
    circuit = scores.top(3)
    fresh = task["validation"][:6]
    curve = cl.faithfulness(model, task, circuit, baseline, examples=fresh, n_random=1, quiet=True)
    # Accuracy of the whole model, by the log-probabilities of the two continuations.
    right = 0
    for example in fresh:
        score = {}
        for choice in ("first", "second"):
            prompt = tokenizer(example.fields["text"], return_tensors="pt").input_ids
            whole = tokenizer(
                f"{example.fields['text']} {example.fields[choice]}", return_tensors="pt"
            ).input_ids
            with torch.no_grad():
                logp = model.hf(whole).logits.log_softmax(-1)[0, :-1]
            span = range(prompt.shape[1] - 1, whole.shape[1] - 1)
            score[choice] = sum(float(logp[i, whole[0, i + 1]]) for i in span)
        right += max(score, key=lambda c: score[c]) == example.label
    assert curve.accuracy[-1] == pytest.approx(right / len(fresh))
    with pytest.raises(cl.InputError, match="12 × 12"):
        cl.published_circuit(name).overlap(circuit)


def test_a_class_without_example_is_left_out(
    toy_proxy, toy_task, toy_scores, toy_baseline, tmp_path
):
    found = cl.head_roles(
        toy_proxy, toy_task, toy_scores.top(2), toy_baseline, max_examples=1, quiet=True
    )
    assert [len(role.raises) for role in found.roles] == [1, 1]
    found.save(tmp_path / "roles.json")
    assert cl.HeadRoles.load(tmp_path / "roles.json").roles == found.roles
    assert found.roles[0].summary


def test_auto_where_faithfulness_has_no_meaning_is_saved_all_the_same(toy_task, tmp_path):
    """Heads that write nothing: no circuit is better than another."""
    from circuitlens.tasks import toy

    model = toy.toy_model(n_layers=2)
    with torch.no_grad():
        for layer in model.hf.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    # Without attention it says the same of every prompt, which is right for one label: the words
    # are given to all labels in turn.
    said = toy_task.encode(model, toy_task["pool_a"][:1])
    ((_, batch),) = said.batches(1, model.device)
    word = list(toy_task.labels)[int(model.label_logits(batch).argmax())]
    few = [e for e in toy_task["pool_a"] if e.label == word][:10]
    own = cl.MeanBaseline(
        torch.zeros(2, 8, 8),
        torch.zeros(2, 64),
        "all",
        tuple(e.id for e in few),
        {word: len(few)},
        1.0,
        Provenance(
            model.name,
            model.fingerprint(),
            toy_task.full_name,
            toy_task.fingerprint(),
            0,
            {},
        ),
    )
    scores = cl.relevance(model, toy_task, own, method="auto", rounds=1, quiet=True)
    assert set(scores.provenance.settings["mean_f"].values()) == {None}
    scores.save(tmp_path / "scores.safetensors")
    assert cl.HeadScores.load(tmp_path / "scores.safetensors").method == "auto"
