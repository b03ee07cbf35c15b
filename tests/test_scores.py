from __future__ import annotations

import importlib
import inspect
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import task_margin, unchecked

import circuitlens as cl
from circuitlens.scoring import rounds, score_heads
from circuitlens.scoring.head_scores import head_count
from circuitlens.scoring.scorers import Request


@pytest.mark.parametrize("method", [name for name in cl.METHODS if name != "hsu2024"])
def test_every_method_scores_every_head_on_every_example(toy_proxy, toy_task, toy_baseline, method):
    scores = cl.relevance(toy_proxy, toy_task, toy_baseline, method=method, max_examples=40)
    assert scores.per_example.shape == (40, 2, 8)
    assert scores.method == method
    assert set(scores.example_ids) <= set(toy_baseline.example_ids)
    again = cl.relevance(
        toy_proxy, toy_task, toy_baseline, method=method, max_examples=40, batch_size=7
    )
    torch.testing.assert_close(again.per_example, scores.per_example, rtol=1e-3, atol=1e-4)


def test_ablation_scores_are_margin_lost(toy_proxy, toy_task, toy_baseline):
    scores = cl.relevance(toy_proxy, toy_task, toy_baseline, method="ablation", max_examples=6)
    by_id = {e.id: e for e in toy_task["pool_a"]}
    encoded = toy_task.encode(toy_proxy, [by_id[i] for i in scores.example_ids])
    for row in range(6):
        batch = encoded.batch([row])
        for layer, head in ((0, 3), (1, 6)):

            def put(z, layer=layer, head=head):
                z = z.clone()
                z[:, 1:, head] = toy_baseline.mean[layer, head]
                return z

            with torch.no_grad():
                lost = task_margin(toy_proxy.logits(batch), batch) - task_margin(
                    toy_proxy.logits(batch, {toy_proxy.z_hook(layer): put}), batch
                )
            torch.testing.assert_close(
                scores.per_example[row, layer, head], lost[0], rtol=1e-3, atol=1e-4
            )


def test_scores_of_a_rule_set_of_ones_own(toy_proxy, toy_task, toy_baseline):
    rules = cl.RuleSet("mine", False, True, "difference")
    scores = cl.relevance(toy_proxy, toy_task, toy_baseline, method=rules, max_examples=10)
    assert scores.method == "mine"
    named = cl.relevance(toy_proxy, toy_task, toy_baseline, method="cdt", max_examples=10)
    assert not torch.allclose(scores.per_example, named.per_example)


def test_unknown_methods_and_foreign_baselines_are_refused(toy_proxy, toy_task, toy_baseline):
    with pytest.raises(cl.InputError, match="method='magic' is unknown: choose one of cdt, cdt-l"):
        cl.relevance(toy_proxy, toy_task, toy_baseline, method="magic")
    foreign = replace(toy_baseline, example_ids=("nowhere:1",))
    with pytest.raises(cl.InputError, match="'nowhere:1', which is not in any pool of"):
        cl.relevance(toy_proxy, toy_task, foreign)


def test_a_misspelt_path_is_refused(toy_proxy, toy_task, toy_baseline, monkeypatch):
    # The type checks of the tests would be first to complain; users do not have them.
    monkeypatch.setattr(score_heads, "Request", partial(unchecked, Request))
    with pytest.raises(cl.InputError, match="path='foo' is unknown: choose one of total, direct"):
        inspect.unwrap(cl.relevance)(toy_proxy, toy_task, toy_baseline, path="foo")


def test_the_random_method_follows_its_seed(toy_proxy, toy_task, toy_baseline):
    def draw(seed):
        return cl.relevance(toy_proxy, toy_task, toy_baseline, method="random", seed=seed).mean

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_the_frame_lists_heads_by_rank_with_intervals(toy_scores):
    frame = toy_scores.to_frame()
    assert frame["rank"].tolist() == list(range(1, 17))
    assert (np.diff(frame["relevance"]) <= 0).all()
    assert ((frame["low"] <= frame["relevance"]) & (frame["relevance"] <= frame["high"])).all()
    assert frame["head"].iloc[0] in toy_scores._repr_html_()


def test_mlps_and_positions_are_scored_on_request(tmp_path, toy_proxy, toy_task, toy_baseline):
    options = {"max_examples": 24, "mlps": True, "by_position": True}
    scores = cl.relevance(toy_proxy, toy_task, toy_baseline, **options)
    again = cl.relevance(toy_proxy, toy_task, toy_baseline, batch_size=5, **options)
    assert scores.mlps.shape == (24, 2)
    torch.testing.assert_close(again.mlps, scores.mlps, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(again.by_position, scores.by_position, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scores.by_position.sum(1), scores.per_example, rtol=1e-3, atol=1e-4)
    frame = scores.mlp_frame()
    assert set(frame["mlp"]) == {"m0", "m1"}
    assert ((frame["low"] <= frame["relevance"]) & (frame["relevance"] <= frame["high"])).all()
    scores.save(tmp_path / "s.safetensors")
    loaded = cl.HeadScores.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.mlps, scores.mlps)
    assert torch.equal(loaded.by_position, scores.by_position)
    assert loaded != scores  # an answer, though none about the tensors
    assert repr(loaded) == (
        "HeadScores(cdt-linear on toy/source: 2 layers of 8 heads, MLPs, single positions, "
        "all positions, 24 examples)"
    )
    plain = cl.relevance(toy_proxy, toy_task, toy_baseline, max_examples=4)
    with pytest.raises(cl.InputError, match=r"call cl\.relevance with mlps=True"):
        plain.mlp_frame()


def by_hand(toy_scores, values: torch.Tensor) -> cl.HeadScores:
    ids = tuple(f"e{i}" for i in range(len(values)))
    return replace(toy_scores, per_example=values, example_ids=ids)


def test_significant_heads_are_those_whose_interval_lies_above_zero(toy_scores):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100, 2, 8, generator=generator)
    values[:, 0, 1] += 2.0
    values[:, 1, 4] -= 2.0
    scores = by_hand(toy_scores, values)
    alone = scores.significant(0.95)
    assert cl.Head(0, 1) in alone
    assert cl.Head(1, 4) not in alone
    low = scores.interval(0.95)[0]
    assert set(alone) == {cl.Head(*map(int, i)) for i in (low > 0).nonzero()}
    together = scores.significant(0.95, control="fdr")
    assert cl.Head(0, 1) in together
    assert set(together) <= set(alone)
    # Without any effect, control over all heads lets next to none through.
    silent = by_hand(toy_scores, torch.randn(100, 2, 8, generator=generator))
    assert len(silent.significant(0.95, control="fdr")) == 0
    assert len(by_hand(toy_scores, torch.zeros(9, 2, 8)).significant(control="fdr")) == 0
    with pytest.raises(cl.InputError, match="between 0 and 1, but is 95"):
        scores.significant(95.0)
    for level in (95.0, 0.0):
        with pytest.raises(cl.InputError, match="confidence level must be between 0 and 1, but is"):
            scores.significant(level, control="fdr")
    with pytest.raises(cl.InputError, match=r"control='bonferroni' is unknown: .* each, fdr"):
        inspect.unwrap(cl.HeadScores.significant)(scores, control="bonferroni")


def test_stability_is_one_without_noise_and_nothing_without_signal(toy_scores):
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(2, 8, generator=generator)
    noise = torch.randn(60, 2, 8, generator=generator)
    same = by_hand(toy_scores, signal.expand(60, -1, -1).clone()).stability()
    assert (same.spearman, same.low, same.reliability) == (1, 1, 1)
    noisy = by_hand(toy_scores, noise).stability()
    assert abs(noisy.spearman) < 0.3
    between = by_hand(toy_scores, signal + 2 * noise).stability(50)
    assert noisy.spearman < between.spearman < 1
    assert between.low < between.spearman < between.high
    assert between.spearman < between.reliability
    assert between.n_splits == 50
    with pytest.raises(cl.InputError, match="only 3: score at least four"):
        by_hand(toy_scores, noise[:3]).stability()


# -- scores without a spread over examples -----------------------------------------------------


@pytest.mark.parametrize("method", ["greedy", "random"])
def test_scorers_of_whole_sets_refuse_statistics(
    method, toy_proxy, toy_task, toy_baseline, tmp_path
):
    scores = cl.relevance(
        toy_proxy, toy_task, toy_baseline, method=method, max_examples=6, quiet=True
    )
    assert scores.whole
    assert scores.unit != "logits"
    for what, call in {
        "stability": scores.stability,
        "interval": scores.interval,
        "significance": scores.significant,
    }.items():
        with pytest.raises(cl.InputError, match=f"{method} scores all .*there is no {what} over"):
            call()
    with pytest.raises(cl.InputError, match="no significance"):
        scores.significant(control="fdr")
    assert scores.to_frame()[["low", "high"]].isna().all().all()
    assert len(scores.top(3)) == 3
    scores.save(tmp_path / "s.safetensors")
    again = cl.HeadScores.load(tmp_path / "s.safetensors")
    assert (again.whole, again.unit) == (True, scores.unit)
    for draw in (cl.view.head_bars, cl.view.head_heatmap):
        text = draw(scores).to_json()
        assert scores.unit in text
        assert "95 % interval" not in text
        assert "NaN" not in text


def test_other_scorers_have_statistics_and_logits(toy_scores):
    assert (toy_scores.whole, toy_scores.unit) == (False, "logits")
    assert "95 % interval" in cl.view.head_bars(toy_scores).to_json()
    assert not toy_scores.to_frame()[["low", "high"]].isna().any().any()


def test_greedy_runs_what_is_clean_once_per_batch(toy_proxy, toy_task, toy_baseline, monkeypatch):
    from circuitlens.cdt import ablation

    calls = []
    original = ablation.PrefixCache.capture.__func__

    def capture(cls, *arguments, **options):
        calls.append(1)
        return original(cls, *arguments, **options)

    monkeypatch.setattr(ablation.PrefixCache, "capture", classmethod(capture))
    cl.relevance(
        toy_proxy,
        toy_task,
        toy_baseline,
        method="greedy",
        max_examples=8,
        batch_size=4,
        quiet=True,
    )
    assert len(calls) == 2


def test_near_zero_is_by_the_mean_magnitude_unless_asked_for(toy_scores):
    values = torch.zeros_like(toy_scores.per_example) + 0.5
    # Supports half of the examples and opposes the others: a mean of nothing, but no small effect.
    values[:, 0, 0] = 2.0
    values[::2, 0, 0] = -2.0
    values = values[: len(values) // 2 * 2]
    values[:, 1, 1] = 0.1
    scores = replace(toy_scores, per_example=values)
    assert [str(h) for h in scores.near_zero(1)] == ["a1.h1"]
    assert [str(h) for h in scores.near_zero(1, signed=True)] == ["a0.h0"]


def test_scores_say_all_that_they_depend_on(toy_proxy, toy_task, toy_baseline):
    def settings(**options):
        options = {"max_examples": 8, "quiet": True, **options}
        return cl.relevance(toy_proxy, toy_task, toy_baseline, **options).provenance.settings

    heads, both = (settings(method="midpoint", mlps=mlps) for mlps in (False, True))
    assert (heads["mlps"], both["mlps"]) == (False, True)
    assert settings(by_position=True)["by_position"]
    rules = replace(cl.RULES["cdt"], name="mine", freeze_scales=False)
    assert settings(method=rules)["rules"] == asdict(rules)
    assert "rules" not in settings()


@pytest.mark.parametrize("kind", ["midpoint with MLPs", "rules"])
def test_the_search_after_a_transfer_is_the_one_before(kind, toy_proxy, toy_task, toy_baseline):
    from circuitlens.adapt.retention import circuit_shift

    how = {"method": "midpoint", "mlps": True}
    if kind == "rules":
        how = {"method": replace(cl.RULES["cdt"], name="mine", freeze_scales=False)}
    source = replace(toy_task, pools=replace(toy_task.pools, pool_a=toy_task["pool_a"][:60]))
    baseline = cl.label_balanced_mean(toy_proxy, source, quiet=True)
    scores = cl.relevance(toy_proxy, source, baseline, max_examples=12, quiet=True, **how)
    shift = circuit_shift(toy_proxy, source, scores.top(4), scores, quiet=True)
    assert shift.after == scores.top(4)
    assert shift.rank_correlation == pytest.approx(1)


def test_discovery_without_a_supporting_head_says_so(
    toy_proxy, toy_task, toy_baseline, toy_scores, monkeypatch
):
    module = importlib.import_module("circuitlens.scoring.discovery")
    against = replace(toy_scores, per_example=-toy_scores.per_example.abs())
    monkeypatch.setattr(module, "relevance", lambda *_, **__: against)
    with pytest.raises(cl.InputError, match=r"No head of .* supports the task by cdt"):
        cl.discover(toy_proxy, toy_task, toy_baseline, quiet=True)


def test_sizes_of_random_circuits_are_spread_evenly():
    edges = rounds._edges(40, 24, torch.Generator().manual_seed(0))
    assert sorted((edges / 24 * 40).floor().tolist()) == list(range(40))
    assert edges.tolist() != sorted(edges.tolist())
    assert len(set((edges % 1).tolist())) == 40


def test_heads_at_the_edge_of_a_circuit_count_most():
    width = rounds._WIDTH * 24
    weight = rounds._weight(
        torch.tensor([[0.0, width, -width, 2 * width]], dtype=torch.float64), 24
    )
    expected = torch.tensor([[1.0, np.exp(-1), np.exp(-1), np.exp(-4)]], dtype=torch.float64)
    torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize(
    ("size", "total", "count"),
    [(3, 16, 3), (0.25, 16, 4), (0.3, 10, 3), (0.01, 16, 1), (1.0, 7, 7), (0, 4, 0)],
)
def test_a_size_is_a_number_or_a_share_of_the_heads(size, total, count):
    assert head_count(size, total) == count


def test_passes_are_told_where_they_were_counted(toy_scores):
    counted = toy_scores.provenance.settings["passes"]
    both = (counted["forward"] + 2 * counted["backward"]) / 3
    assert toy_scores.passes == pytest.approx(both * counted["prompts"])
    assert toy_scores.passes > 0
    old = {k: v for k, v in toy_scores.provenance.settings.items() if k != "passes"}
    provenance = replace(toy_scores.provenance, settings=old)
    assert replace(toy_scores, provenance=provenance).passes is None
