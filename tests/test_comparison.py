from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import spearmanr

import circuitlens as cl
from circuitlens.utils.peak_memory import PeakMemory


@pytest.fixture(scope="module")
def comparison(toy_proxy, toy_task, toy_baseline):
    return cl.compare_scorers(
        toy_proxy,
        toy_task,
        toy_baseline,
        methods=["cdt-linear", "attribution", "random", "greedy"],
        sizes=[2, 4],
        n_random=3,
        max_examples=30,
        examples=toy_task.held_out[:40],
        quiet=True,
    )


def test_each_scorer_has_a_row(comparison):
    table = comparison.to_frame().set_index("scorer")
    assert list(table.index) == [
        "ablation",
        "cdt-linear",
        "attribution",
        "random",
        "greedy",
        "random circuits",
    ]
    exact = table.loc["ablation"]
    assert [exact.spearman, exact.overlap] == pytest.approx([1, 1])
    # Two MLPs can be in two orders only, which is no correlation.
    assert np.isnan(exact.mlp_spearman)
    assert (comparison.n_top, comparison.n_examples, comparison.n_held_out) == (4, 30, 40)
    named = table.drop("random circuits")
    assert ((named.low <= named.spearman + 0.1) & (named.spearman - 0.1 <= named.high)).all()
    assert (named.seconds > 0).all()
    assert table.loc["greedy", "mlp_spearman"] != table.loc["greedy", "mlp_spearman"]
    # Circuits that were chosen do better than those that were not.
    assert exact.area_f > table.loc["random circuits", "area_f"]


def test_the_figures_are_those_of_single_calls(comparison, toy_proxy, toy_task, toy_baseline):
    table = comparison.to_frame().set_index("scorer")
    linear, exact = (
        cl.relevance(toy_proxy, toy_task, toy_baseline, method=m, max_examples=30, mlps=True)
        for m in ("cdt-linear", "ablation")
    )
    rank = spearmanr(linear.mean.flatten(), exact.mean.flatten()).statistic
    assert table.loc["cdt-linear", "spearman"] == pytest.approx(rank)
    both = set(linear.top(4)) & set(exact.top(4))
    assert table.loc["cdt-linear", "overlap"] == len(both) / 4
    curve = cl.faithfulness(
        toy_proxy,
        toy_task,
        linear,
        toy_baseline,
        sizes=[2, 4],
        n_random=3,
        examples=toy_task.held_out[:40],
    )
    assert table.loc["cdt-linear", "area_f"] == pytest.approx(curve.area("faithfulness"), abs=1e-5)
    middle = np.trapezoid(curve.random_accuracy.mean(0), curve.shares)
    assert table.loc["random circuits", "area_accuracy"] == pytest.approx(middle)


def test_it_prints_saves_and_loads(comparison, tmp_path):
    stream = io.StringIO()
    comparison.print(Console(file=stream, width=200))
    text = stream.getvalue()
    assert "cdt-linear" in text
    assert "faithfulness on 40 others" in text
    comparison.save(tmp_path / "c.json")
    again = cl.ScorerComparison.load(tmp_path / "c.json")
    assert again.to_frame().equals(comparison.to_frame())
    assert again.provenance == comparison.provenance
    assert again != comparison
    assert repr(again) == repr(comparison)
    assert "30 examples scored" in repr(again)
    assert len(repr(again)) < 300
    assert "random circuits" in again._repr_html_()


def test_unknown_scorers_are_refused(toy_proxy, toy_task, toy_baseline):
    with pytest.raises(cl.InputError, match="method='magic' is unknown"):
        cl.compare_scorers(toy_proxy, toy_task, toy_baseline, methods=["magic"])


def test_methods_of_one_name_are_refused(toy_proxy, toy_task, toy_baseline):
    def compare(*methods: str | cl.RuleSet, **options):
        options = {"max_examples": 4, "n_random": 0, "sizes": [4], "quiet": True} | options
        return cl.compare_scorers(toy_proxy, toy_task, toy_baseline, methods=methods, **options)

    live = replace(cl.RULES["cdt"], freeze_scales=False)
    with pytest.raises(cl.InputError, match="already is a method 'cdt'"):
        compare("cdt", live, "cdt-live")
    with pytest.raises(cl.InputError, match="already is a method 'ablation'"):
        compare(replace(live, name="ablation"))
    mine = replace(live, name="mine")
    with pytest.raises(cl.InputError, match="Two different rule sets are named 'mine'"):
        compare(mine, cl.RULES["cdt"], replace(mine, freeze_patterns=False))
    # The same one twice is one row, and rows differ where rules do.
    examples = toy_task.held_out[:10]
    table = compare("cdt", cl.RULES["cdt"], mine, mine, examples=examples, mlps=False).table
    assert list(table["scorer"]) == ["ablation", "cdt", "mine"]
    with pytest.raises(cl.InputError, match="no examples to measure on"):
        compare("cdt", examples=())
    with pytest.raises(cl.InputError, match="overlap of no heads is undefined"):
        compare("cdt", top=0)


def test_peak_memory_sees_what_was_freed_again():
    with PeakMemory(torch.device("cpu")) as memory:
        block = torch.ones(64 * 2**18)  # 64 MiB, touched
        for _ in range(20):
            block += 1
        del block
    assert 50 < memory.mib < 100
