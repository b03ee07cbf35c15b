"""The simplest rivals: what they see, what they answer, and where they stand in comparisons."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

import circuitlens as cl
from circuitlens.experiments import simple_rival
from circuitlens.experiments.paired import holm
from circuitlens.tasks import Example


@pytest.fixture(scope="module")
def near(toy_task):
    return toy_task.to("near")


def test_the_majority_is_that_of_the_training_pool(near):
    rival = simple_rival(near, "majority")
    labels = [e.label for e in near["pool_b"]]
    most = max(near.labels, key=labels.count)
    right = [e.label == most for e in near["test"]]
    assert list(rival.right) == right
    assert rival.result.accuracy == pytest.approx(np.mean(right))


def test_n_grams_are_those_of_scikit_learn_tuned_on_validation(near):
    rival = simple_rival(near)
    texts = {p: [e.text for e in near[p]] for p in ("pool_b", "validation", "test")}
    gold = {p: [e.label for e in near[p]] for p in texts}
    parts = [
        TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", sublinear_tf=True),
        TfidfVectorizer(analyzer="char", ngram_range=(2, 5), sublinear_tf=True),
    ]
    for part in parts:
        part.fit(texts["pool_b"])
    rows = {p: np.hstack([part.transform(t).toarray() for part in parts]) for p, t in texts.items()}
    scores = {}
    for strength, accuracy in rival.validation:
        model = LogisticRegression(C=strength, max_iter=2000).fit(rows["pool_b"], gold["pool_b"])
        scores[strength] = model.score(rows["validation"], gold["validation"])
        assert accuracy == pytest.approx(scores[strength], abs=0.01)
    best = max(scores, key=lambda c: (scores[c], -c))
    model = LogisticRegression(C=best, max_iter=2000).fit(rows["pool_b"], gold["pool_b"])
    assert rival.result.accuracy == pytest.approx(model.score(rows["test"], gold["test"]), abs=0.01)
    assert rival.result.accuracy > simple_rival(near, "majority").result.accuracy


def test_validation_alone_chooses(near):
    rival = simple_rival(near)
    first, second, *_ = near.labels
    swapped = {first: second, second: first}
    test = tuple(replace(e, label=swapped.get(e.label, e.label)) for e in near["test"])
    other = simple_rival(replace(near, pools=replace(near.pools, test=test)))
    assert other.validation == rival.validation


@pytest.mark.parametrize("text", ["🙂🙃🙂🙃", "٭٭٭ ٭٭"])
def test_texts_without_words_have_letters(near, text):
    few = {
        pool: tuple(
            Example(f"{pool}{i}", {**e.fields, next(iter(e.fields)): text * (1 + i % 3)}, e.label)
            for i, e in enumerate(near[pool][:9])
        )
        for pool in ("pool_b", "validation", "test")
    }
    task = replace(near, pools=replace(near.pools, **few))
    assert len(simple_rival(task).right) == 9


def test_another_name_is_refused(near):
    with pytest.raises(cl.InputError, match="choose one of majority, n-grams"):
        simple_rival(near, "forest")


def test_they_stand_beside_strategies_in_every_table(toy_proxy, toy_task, toy_scores, tmp_path):
    options = {"learning_rates": [1e-3], "epochs": 1, "quiet": True, "out": tmp_path}
    grid = cl.compare(
        toy_proxy, toy_scores.top(2), toy_task, ["near"], strategies=["norms"], seeds=[0, 1],
        **options,
    )  # fmt: skip
    assert grid.strategies == ("norms", "majority", "n-grams")
    summary = grid.summary().set_index("strategy")
    expected = simple_rival(toy_task.to("near")).result.accuracy
    assert summary.loc["n-grams", "target_after"] == pytest.approx(expected)
    assert summary.loc["n-grams", "target_before"] == summary.loc["norms", "target_before"]
    assert np.isnan(summary.loc["n-grams", "source_after"])
    pair = grid.paired("norms", "n-grams")
    gap = summary.loc["norms", "target_after"] - expected
    assert (pair.n_seeds, pair.difference) == (2, pytest.approx(gap))
    assert list(grid.regret("norms")["best"]) == []
    assert list(grid.fronts()["strategy"]) == ["norms", "norms"]
    again = cl.Comparison.load(tmp_path)
    assert again.to_frame().equals(grid.to_frame())
    for figure in (cl.view.strategy_table, cl.view.transfer_tradeoff, cl.view.training_curves):
        figure(grid)
    cl.view.paired_differences(grid, "norms")
    table = cl.view.strategy_table(grid, "target_after")
    assert "n-grams" in [*table.layout.yaxis.ticktext, *table.layout.xaxis.ticktext]


@given(st.lists(st.floats(0, 1), max_size=9))
def test_holm_is_step_down(p):
    found = holm(p)
    order = sorted(p)
    for value, corrected in zip(p, found, strict=True):
        # The definition: the largest of the smaller ones, each times how many are left.
        expected = max(
            min(1.0, (len(p) - rank) * other) for rank, other in enumerate(order) if other <= value
        )
        assert corrected <= expected + 1e-12
        assert corrected >= value
    assert [found[i] for i in sorted(range(len(p)), key=lambda i: p[i])] == sorted(found)


def test_an_example_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
