from __future__ import annotations

import importlib
import inspect
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ALL, tiny

import circuitlens as cl
from circuitlens.adapt import stages
from circuitlens.adapt.masking import masked_adamw, only_selected_train
from circuitlens.adapt.options import TrainingOptions
from circuitlens.adapt.restoring import restore
from circuitlens.adapt.strategies import STRATEGIES, Choice, strategy_of
from circuitlens.adapt.tensor_files import Trained
from circuitlens.adapt.training import train
from circuitlens.models.geometry import norm_parameters, selection_masks
from circuitlens.tasks import toy


def bits(model: cl.HookedModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.hf.named_parameters()}


def slices_and_norms(model: cl.HookedModel, heads) -> dict[str, torch.Tensor]:
    slices = [piece for head in heads for piece in model.geometry.slices(head)]
    return selection_masks(model.hf, slices, norm_parameters(model.hf))


def steps(model, masks, weight_decay, n=4):
    """A few masked AdamW steps on an arbitrary loss with gradients everywhere."""
    batch = model.unlabelled(torch.randint(5, 90, (4, 7)))
    with only_selected_train(model.hf, masks):
        optimizer = masked_adamw(model.hf, masks, learning_rate=1e-2, weight_decay=weight_decay)
        for _ in range(n):
            optimizer.zero_grad()
            model.hf_logits(batch).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.hf.parameters(), 1.0)
            optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("name", ALL)
def test_only_selected_entries_change_to_the_bit_in_every_layout(name, weight_decay):
    model = cl.load(tiny(name))
    circuit = cl.Circuit.of(["a0.h1", "a2.h0", "a2.h3"], 3, 4)
    masks = slices_and_norms(model, circuit)
    before = bits(model)
    steps(model, masks, weight_decay)
    for parameter_name, after in model.hf.named_parameters():
        changed = after != before[parameter_name]
        mask = masks.get(parameter_name, torch.zeros_like(changed))
        assert not bool((changed & ~mask).any()), parameter_name
        if bool(mask.any()):
            # Rounding can leave a few entries where they were, not most of them. (A key's bias
            # adds the same score to all keys, so it never has a gradient.)
            moved = float((changed & mask).sum() / mask.sum())
            assert moved > 0.3, (parameter_name, moved)


# All weights, and those that test_strategies.py compares with references of their own.
ELSEWHERE = ("full", "gradual", "head-bias", "lottery", "shield", "circuit-lora-edges")


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(s, marks=[pytest.mark.slow] if s == "neurons" else [])
        for s in STRATEGIES
        if s not in ELSEWHERE
    ],
)
def test_a_transfer_changes_no_frozen_bit(tmp_path, toy_proxy, toy_task, toy_scores, strategy):
    circuit = toy_scores.top(3)
    before = bits(toy_proxy)
    result = cl.transfer(
        toy_proxy,
        circuit,
        toy_task.to("near"),
        strategy=strategy,
        scores=toy_scores,
        learning_rates=[3e-3, 1e-2],
        epochs=3,
    )
    after = bits(result.model)
    assert list(after) == list(before)
    changed = {name: after[name] != before[name] for name in before}
    if result.heads is not None or strategy == "norms":
        masks = slices_and_norms(toy_proxy, result.heads or ())
        assert result.n_trainable == sum(int(m.sum()) for m in masks.values())
    elif strategy == "neurons":
        choice = Choice(circuit, toy_scores, source=toy_task)
        masks = STRATEGIES["neurons"].make(toy_proxy, choice, None).masks
        assert result.n_trainable == sum(int(m.sum()) for m in masks.values())
    elif strategy == "head":
        weight = toy_proxy.hf.get_output_embeddings().weight
        rows = torch.zeros_like(weight, dtype=torch.bool)
        rows[list(toy_task.encode(toy_proxy, toy_task["test"][:1]).readout.tokens)] = True
        masks = {n: rows for n, p in toy_proxy.hf.named_parameters() if p is weight}
        assert result.n_trainable == 3 * weight.shape[1]
    else:  # LoRA reaches whole projections
        layers = {head.layer for head in circuit} if strategy == "circuit-lora" else {0, 1}
        inside = tuple(f"layers.{layer}.self_attn" for layer in layers)
        masks = {
            n: torch.ones_like(p, dtype=torch.bool)
            for n, p in before.items()
            if n.endswith("proj.weight") and any(part in n for part in inside)
        }
        if strategy == "lora-norms":
            masks |= slices_and_norms(toy_proxy, ())
    for name, mine in changed.items():
        assert not bool((mine & ~masks.get(name, torch.zeros_like(mine))).any()), name
    assert any(bool(mine.any()) for mine in changed.values())
    assert all(torch.equal(p, before[n]) for n, p in toy_proxy.hf.named_parameters())
    assert all(p.requires_grad for p in result.model.hf.parameters())
    # The drift is that of heads, and the files hold the trained tensors.
    drift = torch.tensor(result.drift)
    assert bool((drift > 0).any()) == (strategy not in ("norms", "head", "neurons"))
    result.save(tmp_path / "r")
    again = cl.TransferResult.load(tmp_path / "r", toy_proxy)
    assert again == result
    for name, weight in again.model.hf.named_parameters():
        torch.testing.assert_close(weight.detach(), after[name], rtol=0, atol=0)


def test_weight_decay_reaches_selected_entries_only_and_all_of_them():
    model = cl.load(tiny("qwen2"))
    masks = slices_and_norms(model, cl.Circuit.of(["a1.h1"], 3, 4))
    before = bits(model)
    optimizer = masked_adamw(model.hf, masks, learning_rate=0.1, weight_decay=0.5)
    with only_selected_train(model.hf, masks):
        for parameter in model.hf.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for name, after in model.hf.named_parameters():
        expected = before[name].clone()
        if name in masks:
            expected[masks[name]] *= 1 - 0.1 * 0.5
        assert torch.equal(after, expected), name


def test_the_best_epoch_is_kept_and_training_stops_early(toy_task):
    model = toy.toy_model(n_layers=1)
    data = toy_task.encode(model, toy_task["pool_a"][:200])
    validation = toy_task.encode(model, toy_task["validation"])
    # A rate that wrecks the model sooner or later.
    options = TrainingOptions(learning_rate=0.1, epochs=30, batch_size=32, patience=2)
    log = train(model, data, validation, options)
    assert len(log.history) < 30
    assert log.best == max(log.history, key=lambda e: (e["accuracy"], e["margin"]))
    assert log.history[-1]["epoch"] - log.best["epoch"] == 2
    now = cl.evaluate(model, toy_task, toy_task["validation"])
    assert now.accuracy == pytest.approx(log.best["accuracy"])
    assert now.margin == pytest.approx(log.best["margin"], rel=1e-5)


def test_epochs_of_the_warm_up_do_not_count_as_patience(toy_task):
    model = toy.toy_model(n_layers=1)
    data = toy_task.encode(model, toy_task["pool_a"][:64])
    validation = toy_task.encode(model, toy_task["validation"][:60])
    # A rate at which nothing moves: no epoch is better than the first.
    options = TrainingOptions(1e-12, epochs=12, batch_size=32, warmup=0.5, patience=2)
    assert len(train(model, data, validation, options).history) == 6 + 2


def test_training_is_repeatable_and_leaves_the_global_seeds_alone(toy_task):
    fingerprints = []
    for noise in (1, 2):
        np.random.seed(noise)
        torch.manual_seed(noise)
        states = np.random.get_state()[1].copy(), torch.get_rng_state()
        model = toy.toy_model(n_layers=1)
        data = toy_task.encode(model, toy_task["pool_a"][:64])
        validation = toy_task.encode(model, toy_task["validation"][:60])
        train(model, data, validation, TrainingOptions(learning_rate=1e-3, epochs=2))
        fingerprints.append(model.fingerprint())
        assert (np.random.get_state()[1] == states[0]).all()
        assert torch.equal(torch.get_rng_state(), states[1])
    assert fingerprints[0] == fingerprints[1]


def test_finetuning_teaches_the_source_and_leaves_the_model_alone(toy_proxy, toy_task):
    assert cl.evaluate(toy_proxy, toy_task, toy_task["test"]).accuracy > 0.9


def test_finetuning_that_ends_near_chance_is_refused_with_the_model(toy_task):
    model = toy.toy_model(n_layers=1)
    before = model.fingerprint()
    with pytest.raises(cl.CompetenceError, match="told from chance") as caught:
        cl.finetune(model, toy_task, learning_rate=1e-8, epochs=1, batch_size=512)
    assert isinstance(caught.value.model, cl.HookedModel)
    assert model.fingerprint() == before


@pytest.mark.slow
def test_the_rate_is_chosen_on_validation_and_never_on_test(toy_proxy, toy_task, toy_scores):
    target = toy_task.to("near")
    options = {"learning_rates": [1e-6, 3e-3], "epochs": 2}
    honest = cl.transfer(toy_proxy, toy_scores.top(4), target, **options)
    # With every test label wrong, whoever peeked at test would choose otherwise.
    wrong = {"negative": "positive", "neutral": "negative", "positive": "neutral"}
    poisoned_test = tuple(replace(e, label=wrong[e.label]) for e in target["test"])
    poisoned = replace(target, pools=replace(target.pools, test=poisoned_test))
    other = cl.transfer(toy_proxy, toy_scores.top(4), poisoned, **options)
    assert other.learning_rate == honest.learning_rate == 3e-3
    assert other.model.fingerprint() == honest.model.fingerprint()
    assert other.target_after.accuracy < honest.target_after.accuracy
    assert list(honest.validation) == [0.0, 1e-6, 3e-3]


def test_no_training_is_a_candidate_of_every_transfer(toy_proxy, toy_task, toy_scores, caplog):
    near = toy_task.to("near")
    # One epoch at this rate leaves the model worse than it was.
    options = {"learning_rates": [0.3], "epochs": 1, "quiet": True}
    result = cl.transfer(toy_proxy, toy_scores.top(3), near, **options)
    assert result.validation[0.3] < result.validation[0.0]
    assert result.learning_rate == 0
    assert result.model.fingerprint() == toy_proxy.fingerprint()
    assert result.target_before == result.target_after
    assert result.source_before == result.source_after
    assert "no learning rate did better on validation than no training" in caplog.text
    start = cl.evaluate(toy_proxy, near, "validation", quiet=True)
    assert result.validation[0.0] == start.accuracy


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "stages"), [(1, [1]), (3, [1, 1, 1]), (10, [2, 2, 3, 3])])
def test_gradual_trains_as_many_epochs_as_the_options_say(
    toy_proxy, toy_task, toy_scores, monkeypatch, epochs, stages
):
    module = importlib.import_module("circuitlens.adapt.stages")
    original, seen = module.train, []

    def note(model, data, validation, options, **kwargs):
        log = original(model, data, validation, options, **kwargs)
        seen.append((options.epochs, len(data), len(log.history)))
        return log

    monkeypatch.setattr(module, "train", note)
    near = toy_task.to("near")
    few = replace(near, pools=replace(near.pools, pool_b=near["pool_b"][:20]))
    options = {"strategy": "gradual", "epochs": epochs, "learning_rates": [1e-3]}
    result = cl.transfer(toy_proxy, toy_scores.top(2), few, **options, quiet=True)
    assert [each for each, *_ in seen] == stages
    # Fewer epochs than stages are the last ones, which have the least of the source.
    assert [n for _, n, _ in seen] == [40, 30, 25, 20][-len(stages) :]
    assert [entry["epoch"] for entry in result.history] == list(range(1, epochs + 1))
    assert len(result.history) == sum(n for *_, n in seen)


def test_random_states_are_as_they_were_after_a_training_that_diverged(toy_proxy, toy_task):
    data = toy_task.encode(toy_proxy, toy_task["pool_a"][:40])
    validation = toy_task.encode(toy_proxy, toy_task["validation"][:20])
    model = toy_proxy.clone()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    # Checks of types in tests draw random numbers.
    with pytest.raises(cl.NotFiniteError):
        inspect.unwrap(train)(
            model, data, validation, TrainingOptions(1e30, warmup=0.0), quiet=True
        )
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert before[2].equal(after[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "bert"])
def test_lora_with_norms_trains_norms_in_float32_and_comes_back_plain(name, dtype, tmp_path):
    model = cl.load(tiny(name, dtype))
    g = model.geometry
    choice = Choice(cl.Circuit((cl.Head(0, 0),), g.n_layers, g.n_heads))
    made = strategy_of("lora-norms").make(model, choice, None)
    alone = strategy_of("lora").make(model, choice, None)
    norms = sum(dict(model.hf.named_parameters())[n].numel() for n in norm_parameters(model.hf))
    assert made.n_entries == alone.n_entries + norms
    assert {p.dtype for p in made.parameters.values()} == {torch.float32}
    batch = model.unlabelled(torch.randint(5, 90, (2, 6)))
    torch.testing.assert_close(made.model.hf_logits(batch), model.hf_logits(batch))
    with torch.no_grad():
        for parameter in made.parameters.values():
            parameter.add_(0.1)
    changed = made.model.hf_logits(batch)
    made.write(tmp_path)
    plain = made.merged()
    assert {p.dtype for p in plain.hf.parameters()} == {dtype}
    assert [n for n, _ in plain.hf.named_parameters()] == [
        n for n, _ in model.hf.named_parameters()
    ]
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.3}
    torch.testing.assert_close(plain.hf_logits(batch), changed, **tolerance)
    again = restore(model, tmp_path, Trained.found(tmp_path)).merged()
    assert again.fingerprint() == plain.fingerprint()


def test_a_transfer_reports_gain_and_retention_and_reloads(
    tmp_path, toy_proxy, toy_task, toy_scores
):
    target = toy_task.to("near")
    result = cl.transfer(toy_proxy, toy_scores.top(4), target, learning_rates=[3e-3], epochs=4)
    assert result.target_before == cl.evaluate(toy_proxy, target, target["test"])
    assert result.target_after == cl.evaluate(result.model, target, target["test"])
    assert result.source_after == cl.evaluate(result.model, toy_task, toy_task["test"])
    assert result.target_gain > 0
    assert (result.source_language, result.target_language) == ("source", "near")
    result.save(tmp_path / "r")
    again = cl.TransferResult.load(tmp_path / "r", toy_proxy)
    assert again.model.fingerprint() == result.model.fingerprint()
    assert again.to_dict() == result.to_dict()
    assert again == result
    size = (tmp_path / "r" / "adapter_model.safetensors").stat().st_size
    assert size < 4.5 * result.n_trainable + 20_000
    with pytest.raises(cl.InputError, match="other weights"):
        cl.TransferResult.load(tmp_path / "r", result.model)
    numbers = cl.TransferResult.load(tmp_path / "r")
    assert numbers == result
    assert numbers.model is None
    with pytest.raises(cl.InputError, match="loaded without its model"):
        numbers.save(tmp_path / "again")


def test_a_task_without_origin_has_no_retention(toy_proxy, toy_scores):
    target = cl.load_task("toy", "near")
    result = cl.transfer(toy_proxy, toy_scores.top(2), target, learning_rates=[1e-3], epochs=1)
    assert result.source_after is None
    assert result.source_change is None
    assert "near" in result._repr_html_()


def test_strategies_choose_as_many_heads(toy_proxy, toy_scores):
    circuit = toy_scores.top(5)
    choice = Choice(circuit, toy_scores, seed=3)
    assert strategy_of("circuit").choose(toy_proxy, choice) is circuit
    assert strategy_of("near-zero").choose(toy_proxy, choice) == toy_scores.near_zero(5)
    assert len(strategy_of("random").choose(toy_proxy, choice)) == 5
    matched = strategy_of("random-by-layer").choose(toy_proxy, choice)
    assert [sum(h.layer == la for h in matched) for la in range(2)] == [
        sum(h.layer == la for h in circuit) for la in range(2)
    ]
    assert matched != strategy_of("random-by-layer").choose(toy_proxy, Choice(circuit, seed=4))
    assert strategy_of("norms").choose(toy_proxy, choice) is None
    with pytest.raises(cl.InputError, match="pass scores="):
        strategy_of("near-zero").choose(toy_proxy, Choice(circuit))
    with pytest.raises(cl.InputError, match="no strategy 'dora'; use one of circuit"):
        strategy_of("dora")


def test_lora_has_about_as_many_entries_as_the_circuit(toy_proxy, toy_scores):
    circuit = toy_scores.top(6)
    choice = Choice(circuit, toy_scores)
    pieces = {s for head in circuit for s in toy_proxy.geometry.slices(head)}
    parameters = dict(toy_proxy.hf.named_parameters())
    budget = sum(piece.of(parameters[piece.parameter]).numel() for piece in pieces)
    for name in ("lora", "circuit-lora"):
        made = strategy_of(name).make(toy_proxy, choice, None)
        assert 0.6 < made.n_entries / budget < 1.5, name
    eight = strategy_of("lora-r8").make(toy_proxy, choice, None)
    ranks = {m.r["default"] for _, m in eight.model.hf.named_modules() if hasattr(m, "lora_A")}
    assert ranks == {8}


@pytest.mark.slow
def test_replay_and_stages_mix_source_examples_in(toy_proxy, toy_task, toy_scores, monkeypatch):
    seen: list[list[str]] = []
    module = importlib.import_module("circuitlens.adapt.stages")
    original = module.train

    def note(model, data, *args, **kwargs):
        seen.append(list(data.ids))
        return original(model, data, *args, **kwargs)

    monkeypatch.setattr(module, "train", note)
    target = toy_task.to("near")
    options = {"learning_rates": [1e-3], "epochs": 4}
    n = len(target["pool_b"])
    cl.transfer(toy_proxy, toy_scores.top(2), target, replay=0.1, **options)
    assert len(seen[0]) == n + round(0.1 * n)
    old = {e.id for e in toy_task["pool_a"]}
    assert set(seen[0][n:]) <= old
    seen.clear()
    cl.transfer(toy_proxy, toy_scores.top(2), target, strategy="gradual", **options)
    mixed = [len(ids) - n for ids in seen]
    assert len(mixed) == 4
    assert mixed[-1] == 0
    assert mixed == sorted(mixed, reverse=True)
    assert mixed[0] > 0
    alone = cl.load_task("toy", "near")
    with pytest.raises(cl.InputError, match="need the source task: pass source="):
        cl.transfer(toy_proxy, toy_scores.top(2), alone, replay=0.5)


@pytest.mark.slow
def test_retention_of_other_languages_and_of_the_circuit_itself(toy_proxy, toy_task, toy_scores):
    far = toy_task.to("far")
    result = cl.transfer(
        toy_proxy,
        toy_scores.top(4),
        toy_task.to("near"),
        scores=toy_scores,
        retain=["far"],
        rediscover=True,
        learning_rates=[3e-3],
        epochs=1,
    )
    assert [r.name for r in result.retained] == ["toy/source", "toy/far"]
    assert result.retained[1].before == cl.evaluate(toy_proxy, far, far["test"])
    assert result.retained[1].after == cl.evaluate(result.model, far, far["test"])
    assert result.source_after == result.retained[0].after
    assert len(result.target_right) == len(toy_task.to("near")["test"])
    assert np.mean(result.target_right) == pytest.approx(result.target_after.accuracy)
    shift = result.shift
    assert len(shift.after) == 4
    assert shift.overlap == toy_scores.top(4).overlap(shift.after)
    assert -1 <= shift.rank_correlation <= 1


@pytest.mark.slow
def test_the_circuit_is_searched_anew_as_it_was_found(toy_proxy):
    few = toy.ToyLanguages(n_train=600, n_validation=60, n_test=60)
    task = cl.Task.from_source(few, "source", name="toy", **toy.TOY_PROMPT)
    baseline = cl.label_balanced_mean(toy_proxy, task)
    found = []
    for options in ({"path": "direct"}, {"method": "integrated-gradients", "steps": 1}):
        scores = cl.relevance(toy_proxy, task, baseline, max_examples=300, **options)
        found.append(scores.mean)
        # Nothing is trained at this rate, so the same question has the same answer.
        shift = cl.transfer(
            toy_proxy,
            scores.top(4),
            task.to("near"),
            strategy="norms",
            scores=scores,
            rediscover=True,
            learning_rates=[1e-12],
            epochs=1,
        ).shift
        assert shift.after == scores.top(4)
        assert shift.rank_correlation == pytest.approx(1)
    assert not torch.equal(*found)


def test_a_circuit_that_cannot_be_searched_anew_costs_no_transfer(
    toy_proxy, toy_task, toy_scores, monkeypatch, caplog
):
    from circuitlens.adapt import retention

    def forgets(*arguments, **options):
        raise cl.InputError("No example of the label 'neutral' is answered correctly")

    monkeypatch.setattr(retention, "label_balanced_mean", forgets)
    options = {"scores": toy_scores, "rediscover": True, "learning_rates": [1e-3], "epochs": 1}
    near, circuit = toy_task.to("near"), toy_scores.top(4)
    result = cl.transfer(toy_proxy, circuit, near, **options)
    assert result.shift is None
    assert "could not be searched again: No example of the label 'neutral'" in caplog.text
    options["scores"] = replace(toy_scores, method="mine")
    with pytest.raises(cl.InputError, match=r"mine.*cdt-linear"):
        cl.transfer(toy_proxy, circuit, near, **options)


def test_inputs_of_another_model_and_mistakes_are_refused(
    toy_proxy, toy_task, toy_scores, monkeypatch
):
    def trains(*arguments, **options):
        raise AssertionError("trained")

    monkeypatch.setattr(stages, "train", trains)
    cases = {
        "The circuit is of a 12 × 12 model": {"circuit": cl.Circuit.of(["a0.h0"], 12, 12)},
        "The circuit has no heads": {"circuit": cl.Circuit.of([], 2, 8)},
        "The scores are of a model with 1 × 8 heads": {
            "scores": replace(toy_scores, per_example=toy_scores.per_example[:, :1])
        },
        "There is no kv_policy 'gruop'": {"kv_policy": "gruop", "strategy": "full"},
        r"learning_rates is a list: give \[0.001\]": {"learning_rates": 1e-3},
        "no language 'mars'": {"retain": ["mars"]},
        "Retention of toy/far was asked for twice": {"retain": ["far", toy_task.to("far")]},
        "Retention of toy/source was asked for twice": {"retain": ["source"]},
    }
    for message, options in cases.items():
        arguments = {"circuit": toy_scores.top(4), "task": toy_task.to("near"), **options}
        with pytest.raises(cl.InputError, match=message):
            # Without the type checks of the tests.
            inspect.unwrap(cl.transfer)(toy_proxy, **arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("epochs", "batch_size", "patience", "accumulation")),
        ("epochs", True),
        ("seed", -1),
        ("seed", 2**32),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("weight_decay", -0.1),
        ("warmup", 1.5),
    ],
)
def test_options_that_cannot_be_are_refused(name, value):
    with pytest.raises(cl.InputError, match=f"{name} (must be|is a share)"):
        TrainingOptions(**{"learning_rate": 1e-3, name: value})
