from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitlens as cl
from circuitlens import Circuit, Head, HeadScores
from circuitlens.scoring.head_scores import head_count
from circuitlens.utils.provenance import Provenance

quick = settings(max_examples=80, deadline=None)

LAYERS, HEADS = 3, 4
GRID = [Head(layer, index) for layer in range(LAYERS) for index in range(HEADS)]
head_sets = st.sets(st.sampled_from(GRID))


def circuit(heads, n_layers: int = LAYERS, n_heads: int = HEADS) -> Circuit:
    return Circuit(tuple(heads), n_layers, n_heads)


def provenance(seed: int = 0, **settings_) -> Provenance:
    return Provenance("model", "0123", "task/language", "4567", seed, settings_, {"python": "3"})


def scores(values, seed: int = 0, method: str = "cdt") -> HeadScores:
    """Scores from nested lists: example × layer × head."""
    tensor = torch.as_tensor(values, dtype=torch.float32)
    names = tuple(f"id {n}" for n in range(len(tensor)))
    return HeadScores(tensor, method, "decision", names, provenance(seed))


def random_scores(n: int = 200, seed: int = 3) -> HeadScores:
    generator = torch.Generator().manual_seed(seed)
    shift = torch.linspace(-1, 1, LAYERS * HEADS).view(LAYERS, HEADS)
    return scores(torch.randn(n, LAYERS, HEADS, generator=generator) + shift)


# -- heads ---------------------------------------------------------------------------------


@quick
@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_a_head_is_read_as_it_is_printed(layer, index):
    head = Head(layer, index)
    assert str(head) == f"a{layer}.h{index}"
    assert Head.parse(str(head)) == head


@pytest.mark.parametrize(
    "name", ["", "a1", "h1", "a1h2", "a-1.h2", "A1.H2", " a1.h2", "a1.h2 ", "a1.h2\n", "a1.h2.h3"]
)
def test_what_is_no_head_name_is_refused(name):
    with pytest.raises(cl.InputError, match="is not a head name"):
        Head.parse(name)


def test_heads_are_ordered_by_layer_and_index_as_numbers():
    names = ["a10.h0", "a2.h11", "a2.h3", "a0.h7"]
    assert [str(h) for h in sorted(map(Head.parse, names))] == names[::-1]


# -- circuits ------------------------------------------------------------------------------


@quick
@given(head_sets, head_sets)
def test_set_algebra_is_that_of_the_sets_of_heads(one, other):
    a, b = circuit(one), circuit(other)
    assert set(a | b) == one | other
    assert set(a & b) == one & other
    assert set(a - b) == one - other
    assert set(a ^ b) == one ^ other
    assert (a <= b, a < b, a >= b, a > b) == (
        one <= other,
        one < other,
        one >= other,
        one > other,
    )
    assert (a | other, a & other, a - other, a ^ other) == (a | b, a & b, a - b, a ^ b)
    assert (a <= other, a > other) == (one <= other, one > other)
    # Equal as sets, though they were made in another way.
    assert (a | b) == (b | a)
    assert (a - b) == (a & b.complement())
    assert hash(a ^ b) == hash((a | b) - (a & b))
    assert (a == b) == (one == other)
    assert set(a.complement()) == set(GRID) - one
    assert a.complement().complement().heads == a.heads
    assert (a - b).heads == (a & b.complement()).heads
    union = len(one | other)
    assert a.overlap(b) == b.overlap(a) == (len(one & other) / union if union else 1.0)
    assert len(a) == len(one)
    for head in GRID:
        place = (head.layer, head.index)
        assert (head in a) == (str(head) in a) == (place in a) == (head in one)


@quick
@given(st.lists(st.sampled_from(GRID), max_size=20), st.randoms())
def test_order_and_repetition_do_not_matter(heads, rng):
    shuffled = heads * 2
    rng.shuffle(shuffled)
    assert circuit(heads) == circuit(shuffled)
    assert list(circuit(shuffled)) == sorted(set(heads))
    assert Circuit.of([str(head) for head in shuffled], LAYERS, HEADS) == circuit(heads)
    pairs = [(head.layer, head.index) for head in shuffled]
    assert Circuit.of(pairs, LAYERS, HEADS) == circuit(heads)
    assert hash(circuit(heads)) == hash(circuit(shuffled))


def test_results_say_how_they_were_made():
    a, b = (Circuit.of([name], 2, 2) for name in ("a0.h0", "a1.h1"))
    named = Circuit(a.heads, 2, 2, "cdt: top 1")
    assert (named | b).selection == "(cdt: top 1) | (by hand)"
    assert (named & b).selection == "(cdt: top 1) & (by hand)"
    assert (named - b).selection == "(cdt: top 1) - (by hand)"
    assert named.complement().selection == "all but (cdt: top 1)"
    assert repr(a | b) == "Circuit(2 of 4 heads: a0.h0, a1.h1)"


@pytest.mark.parametrize("head", ["a3.h0", "a0.h4", "a99.h99"])
def test_a_head_that_the_model_does_not_have_is_refused(head):
    with pytest.raises(cl.InputError, match=rf"head {head}, but the model has 3 layers of 4"):
        Circuit.of(["a0.h0", head], LAYERS, HEADS)
    with pytest.raises(cl.InputError, match=r"head a-1\.h0"):
        circuit([Head(-1, 0)])


def test_what_is_no_head_is_refused_or_not_in_a_circuit():
    a = circuit([Head(0, 0), Head(1, 3)])
    # The type checks of the tests would be first to complain; users do not have them.
    make = inspect.unwrap(Circuit.of.__func__)
    for wrong in ((1, 3, 5), (1, "3"), 13, None, 1.5):
        with pytest.raises(cl.InputError, match=r"not a head: write cl\.Head\(3, 5\), 'a3.h5' or"):
            make(Circuit, [wrong], LAYERS, HEADS)
    assert 13 not in a
    assert None not in a
    assert cl.MLP(1) not in a
    assert "a9.h9" not in a
    with pytest.raises(cl.InputError, match="'head 3' is not a head name"):
        _ = "head 3" in a
    for operation in ("or", "and", "sub", "xor", "le", "lt", "ge", "gt"):
        method = inspect.unwrap(getattr(Circuit, f"__{operation}__"))
        assert method(a, 3) is NotImplemented
        assert method(a, [Head(0, 0)]) is NotImplemented
    with pytest.raises(TypeError):
        _ = a | 3


@pytest.mark.parametrize("size", [(3, 5), (4, 4), (4, 3)])
def test_circuits_of_models_of_other_sizes_are_not_combined(size):
    a, b = circuit([Head(0, 0)]), circuit([Head(0, 0)], *size)
    for combine in (
        lambda: a | b,
        lambda: a & b,
        lambda: b - a,
        lambda: a ^ b,
        lambda: a <= b,
        lambda: a > b,
        lambda: a.overlap(b),
    ):
        with pytest.raises(cl.InputError, match="Circuits of different models"):
            combine()
    assert a != b


@settings(max_examples=25, deadline=None)
@given(heads=head_sets, selection=st.text(max_size=20), origin=st.booleans())
def test_a_saved_circuit_is_read_back_whole(heads, selection, origin, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "circuit.json"
    given_origin = provenance(7, method="cdt", sizes=[1, 2]) if origin else None
    saved = Circuit(tuple(heads), LAYERS, HEADS, selection, given_origin)
    saved.save(path)
    again = Circuit.load(path)
    assert again == saved
    assert again.selection == selection
    assert again.provenance == given_origin
    assert json.loads(path.read_text(encoding="utf-8"))["heads"] == [str(h) for h in saved]


def test_a_circuit_file_with_heads_out_of_range_is_refused(tmp_path):
    path = tmp_path / "circuit.json"
    circuit([Head(2, 3)]).save(path)
    text = path.read_text()
    path.write_text(text.replace("a2.h3", "a2.h4"))
    with pytest.raises(cl.InputError, match=r"head a2\.h4, but the model has 3 layers"):
        Circuit.load(path)
    path.write_text(text.replace("a2.h3", "2,3"))
    with pytest.raises(cl.InputError, match="'2,3' is not a head name"):
        Circuit.load(path)


def test_a_circuit_as_a_table_and_as_html():
    frame = Circuit(circuit([Head(2, 0), Head(0, 3)]).heads, 3, 4, "a < b").to_frame()
    assert frame.to_dict("list") == {
        "head": ["a0.h3", "a2.h0"],
        "layer": [0, 2],
        "index": [3, 0],
    }
    assert list(circuit([]).to_frame().columns) == ["head", "layer", "index"]
    page = Circuit((Head(0, 1),), 3, 4, "a < b")._repr_html_()
    assert "a &lt; b" in page
    assert "1 of 12 heads: a0.h1" in page
    assert "no heads" in circuit([])._repr_html_()


# -- choosing heads by their scores --------------------------------------------------------

# Means over the two examples: 0.5, -3, 2, 0 | -0.25, 4, 0.125, 1.
HAND = [
    [[1.5, -2.0, 2.0, 1.0], [0.0, 8.0, 0.25, 1.0]],
    [[-0.5, -4.0, 2.0, -1.0], [-0.5, 0.0, 0.0, 1.0]],
]
RANKED = ["a1.h1", "a0.h2", "a1.h3", "a0.h0", "a1.h2", "a0.h3", "a1.h0", "a0.h1"]


def names(chosen) -> set[str]:
    return {str(head) for head in chosen}


def test_the_mean_is_over_examples():
    found = scores(HAND)
    assert found.mean.tolist() == [[0.5, -3, 2, 0], [-0.25, 4, 0.125, 1]]
    assert (found.n_layers, found.n_heads) == (2, 4)


def test_the_ranking_is_signed_and_begins_with_the_most_supporting_head():
    assert [str(head) for head in scores(HAND).ranking()] == RANKED


def test_ties_are_ranked_by_layer_and_index():
    assert [str(h) for h in scores([[[1.0, 2.0], [2.0, 1.0]]]).ranking()] == [
        "a0.h1",
        "a1.h0",
        "a0.h0",
        "a1.h1",
    ]


@pytest.mark.parametrize("count", range(9))
def test_top_takes_the_first_heads_of_the_ranking(count):
    top = scores(HAND).top(count)
    assert names(top) == set(RANKED[:count])
    assert top.selection == f"cdt: top {count}"
    assert (top.n_layers, top.n_heads) == (2, 4)
    assert top.provenance == provenance()


def test_near_zero_takes_the_smallest_magnitudes():
    found = scores(HAND)
    assert names(found.near_zero(1, signed=True)) == {"a0.h3"}
    assert names(found.near_zero(3, signed=True)) == {"a0.h3", "a1.h2", "a1.h0"}
    assert names(found.near_zero(7, signed=True)) == set(RANKED) - {"a1.h1"}
    assert found.near_zero(3).selection == "cdt: 3 nearest to zero"


def test_threshold_includes_its_value_and_leaves_out_negative_heads():
    found = scores(HAND)
    assert names(found.threshold(1.0)) == {"a1.h1", "a0.h2", "a1.h3"}
    assert names(found.threshold(1.0001)) == {"a1.h1", "a0.h2"}
    assert names(found.threshold(0.0)) == set(RANKED[:6])
    assert names(found.threshold(-5.0)) == set(RANKED)
    assert len(found.threshold(5.0)) == 0
    assert found.threshold(0.5).selection == "cdt: relevance ≥ 0.5"


def test_a_float_is_a_share_and_an_integer_is_a_count():
    found = scores(HAND)
    assert len(found.top(1)) == 1
    assert len(found.top(1.0)) == 8
    assert names(found.top(0.5)) == set(RANKED[:4])
    assert len(found.near_zero(0.25)) == len(found.random(0.25)) == 2
    # A share is never rounded down to nothing.
    assert len(found.top(0.01)) == 1
    assert len(found.top(0)) == 0


@pytest.mark.parametrize("size", [0.0, -0.5, 1.5, float("nan")])
def test_shares_outside_zero_and_one_are_refused(size):
    for choose in (scores(HAND).top, scores(HAND).near_zero, scores(HAND).random):
        with pytest.raises(cl.InputError, match="A share of heads must be between 0 and 1"):
            choose(size)


@pytest.mark.parametrize("size", [-1, 9])
def test_more_heads_than_there_are_are_refused(size):
    for choose in (scores(HAND).top, scores(HAND).near_zero, scores(HAND).random):
        with pytest.raises(cl.InputError, match=f"{size} heads were asked for.* the model has 8"):
            choose(size)


def test_random_heads_follow_from_the_seed_and_not_from_the_scores():
    found, other = scores(HAND), scores([[[0.0] * 4] * 2])
    assert found.random(3, seed=5).heads == found.random(3, seed=5).heads
    assert found.random(3, seed=5).heads == other.random(3, seed=5).heads
    assert len({found.random(3, seed=s).heads for s in range(20)}) > 10
    assert len(found.random(8)) == 8
    assert found.random(3, seed=5).selection == "cdt: 3 at random (seed 5)"


def test_random_heads_are_drawn_evenly():
    found = scores(HAND)
    drawn = [head for seed in range(400) for head in found.random(2, seed=seed)]
    # Each of 8 heads is expected 100 times, with a deviation of 8.7.
    counts = [drawn.count(head) for head in found.top(8)]
    assert sum(counts) == 800
    assert 60 < min(counts) <= max(counts) < 140


# -- intervals, tables and files -----------------------------------------------------------


def naive_interval(values: np.ndarray, level: float, draws: int = 3000) -> np.ndarray:
    rng = np.random.default_rng(99)
    means = np.stack(
        [values[rng.integers(len(values), size=len(values))].mean(0) for _ in range(draws)]
    )
    tail = (1 - level) / 2
    return np.quantile(means, [tail, 1 - tail], axis=0)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_interval_is_that_of_a_naive_bootstrap(level):
    found = random_scores()
    values = found.per_example.double().numpy()
    low, high = found.interval(level)
    naive_low, naive_high = naive_interval(values, level)
    # The quantiles of 1,000 and 3,000 draws differ by about 0.1 standard errors.
    slack = 0.35 * values.std(0) / len(values) ** 0.5
    assert (np.abs(low.numpy() - naive_low) < slack).all()
    assert (np.abs(high.numpy() - naive_high) < slack).all()


def test_the_interval_contains_the_mean_and_grows_with_the_level():
    found = random_scores()
    narrow, wide = found.interval(0.5), found.interval()
    assert wide.shape == (2, LAYERS, HEADS)
    assert ((wide[0] < narrow[0]) & (narrow[0] < found.mean)).all()
    assert ((found.mean < narrow[1]) & (narrow[1] < wide[1])).all()
    assert torch.equal(wide, found.interval(0.95))


def test_the_interval_of_skewed_scores_is_skewed():
    # One example in ten stands out: the mean can rise further than it can fall.
    values = torch.zeros(20, 1, 1)
    values[::10] = 1.0
    low, high = (float(bound) for bound in scores(values).interval().flatten())
    assert low >= 0
    assert high - 0.1 > 0.1 - low > 0.05


def test_without_spread_the_interval_is_the_mean():
    found = scores([HAND[0]] * 7)
    low, high = found.interval()
    torch.testing.assert_close(low, found.mean)
    torch.testing.assert_close(high, found.mean)


def test_intervals_follow_from_the_seed():
    values = random_scores().per_example
    one, again, other = (scores(values, seed=s).interval() for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_table_ranks_heads_and_agrees_with_the_tensors():
    found = random_scores()
    frame = found.to_frame()
    assert list(frame["rank"]) == list(range(1, LAYERS * HEADS + 1))
    assert list(frame["head"]) == [str(head) for head in found.ranking()]
    assert frame["relevance"].is_monotonic_decreasing
    low, high = found.interval()
    for row in frame.to_dict("records"):
        place = row["layer"], row["index"]
        assert row["head"] == "a{}.h{}".format(*place)
        assert row["relevance"] == float(found.mean[place])
        assert (row["low"], row["high"]) == (float(low[place]), float(high[place]))


def test_saved_scores_are_read_back_whole(tmp_path):
    tensor = random_scores(17).per_example
    saved = HeadScores(
        tensor, "ablation", "all", tuple(f"é{n}" for n in range(17)), provenance(4, sizes=[1, None])
    )
    saved.save(tmp_path / "deep" / "scores.safetensors")
    again = HeadScores.load(tmp_path / "deep" / "scores.safetensors")
    assert torch.equal(again.per_example, tensor)
    assert again.per_example.dtype == torch.float32
    assert (again.method, again.positions) == ("ablation", "all")
    assert again.example_ids == saved.example_ids
    assert again.provenance == saved.provenance
    assert torch.equal(again.interval(), saved.interval())
    assert again.top(3) == saved.top(3)


def test_scores_in_html_name_method_and_task_safely():
    page = scores(HAND, method="<mine>")._repr_html_()
    assert "&lt;mine&gt; on task/language" in page
    assert "2 examples" in page
    assert page.index("a1.h1") < page.index("a0.h2")


def test_heads_without_a_level_have_none_in_the_frame():
    heads = (cl.Head(0, 0), cl.Head(1, 1))
    frame = Circuit(heads, 2, 2, levels={cl.Head(1, 1): 1}).to_frame()
    assert frame["level"].isna().tolist() == [True, False]
    assert frame["level"].tolist()[1] == 1


def test_a_circuit_has_no_places():
    with pytest.raises(cl.InputError, match=r"no circuit\[0\]: use circuit.heads\[0\]"):
        _ = Circuit((cl.Head(0, 0),), 1, 1)[0]


@pytest.mark.parametrize("size", [True, np.True_, "8", None])
def test_a_size_is_a_number(size):
    with pytest.raises(cl.InputError, match="A size must be a number of heads or a share"):
        inspect.unwrap(head_count)(size, 8)
