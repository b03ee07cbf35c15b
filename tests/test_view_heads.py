from __future__ import annotations

import html
import re
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import plotly.io
import pytest
import torch
from scipy.stats import spearmanr

import circuitlens as cl
from circuitlens.nodes import Head
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.utils.provenance import Provenance
from circuitlens.view.curves import faithfulness_curve, minimality_bars
from circuitlens.view.graph import circuit_graph
from circuitlens.view.heads import head_bars, head_heatmap, head_positions, overlap_matrix
from circuitlens.view.scorers import scorer_agreement
from circuitlens.view.theme import look, plain
from circuitlens.view.tokens import (
    attention_pattern,
    attention_patterns,
    short_tokens,
    token_relevance,
)

EVIL = "<b>x</b>"
SIZES = [(24, 14), (32, 32)]


def synthetic(n_layers=24, n_heads=14, seed=0, method="cdt-linear", width=None):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(n_layers, n_heads, generator=generator)
    noise = torch.randn(12, n_layers, n_heads, generator=generator)
    at = None
    if width:
        at = torch.randn(12, width, n_layers, n_heads, generator=generator)
    return HeadScores(
        per_example=mean + 0.3 * noise if at is None else at.sum(1),
        method=method,
        positions="all",
        example_ids=tuple(f"e{k}" for k in range(12)),
        provenance=Provenance("m", "f", "toy/a", "d", 0),
        by_position=at,
    )


def at(values, head):
    return float(values[head.layer, head.index])


def shown(fig):
    """What a reader sees of a figure's text: tags are gone, entities are characters."""
    page = fig.to_json().encode().decode("unicode_escape")
    return html.unescape(re.sub(r"</?(b|i|a|br)>", "", page))


@pytest.fixture(scope="module")
def found(toy_scores):
    """A circuit of two levels, made by hand: what a search finds depends on the processor."""
    above, below = [Head(1, 0), Head(1, 2)], [Head(0, 1), Head(0, 3)]
    edges = {(s, t): 0.5 - 0.3 * i for i, (s, t) in enumerate(product(below, above))}
    return cl.Circuit(
        (*above, *below),
        toy_scores.n_layers,
        toy_scores.n_heads,
        "cdt-linear: 2 levels of 2",
        toy_scores.provenance,
        levels=dict.fromkeys(above, 1) | dict.fromkeys(below, 2),
        edges=edges,
    )


@pytest.fixture(scope="module")
def by_position(toy_proxy, toy_task, toy_baseline):
    return cl.relevance(
        toy_proxy, toy_task, toy_baseline, by_position=True, max_examples=20, quiet=True
    )


@pytest.fixture(scope="module")
def minimal(toy_proxy, toy_task, toy_baseline, toy_scores):
    examples = toy_task.held_out[:40]
    circuit = toy_scores.top(5)
    return cl.minimality(toy_proxy, toy_task, circuit, toy_baseline, examples, quiet=True)


@pytest.fixture(scope="module")
def ablated(toy_proxy, toy_task, toy_baseline):
    return cl.relevance(
        toy_proxy, toy_task, toy_baseline, method="ablation", max_examples=20, quiet=True
    )


# -- all of them -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_every_figure_is_drawn_in_both_modes(
    mode, toy_scores, found, by_position, minimal, ablated
):
    pattern = np.full((3, 3), 1 / 3)
    figures = [
        head_heatmap(toy_scores, found, mode=mode),
        head_bars(toy_scores, 5, found, mode=mode),
        head_positions(by_position, 5, mode=mode),
        overlap_matrix({"a": found, "b": toy_scores.top(4)}, mode=mode),
        token_relevance(["a", "b"], [1.0, -1.0], mode=mode),
        attention_pattern(pattern, list("abc"), mode=mode),
        attention_patterns({"one": pattern, "two": pattern}, list("abc"), mode=mode),
        scorer_agreement([toy_scores, ablated], mode=mode),
        minimality_bars(minimal, mode=mode),
        circuit_graph(found, toy_scores, mode=mode),
    ]
    for fig in figures:
        assert fig.layout.template.layout.paper_bgcolor == look(mode).paper
        assert fig.layout.template.layout.font.color == look(mode).ink
        # Beside the plot, a legend or a colour bar would leave a narrow column no room.
        assert fig.layout.legend.orientation in (None, "h")
        bars = [t.colorbar for t in fig.data if t.type == "heatmap" and t.coloraxis is None]
        if (bar := fig.layout.coloraxis.colorbar).title.text:
            bars.append(bar)
        assert all((b.orientation, b.yref, b.y) == ("h", "container", 0) for b in bars)
        plotly.io.to_html(fig, include_plotlyjs=False)


def test_text_that_looks_like_markup_stays_text():
    assert plain(EVIL + " & $x$") == "&lt;b&gt;x&lt;/b&gt; &amp; &#36;x&#36;"
    tokens = ["Ġa", EVIL, "$x$"]
    pattern = np.eye(3)
    scores = synthetic(2, 3, width=3)
    named = {EVIL: scores, "ablation": synthetic(2, 3, seed=1)}
    circuits = {EVIL: scores.top(2), "b": scores.top(3)}
    figures = [
        token_relevance(tokens, [1.0, 2.0, 3.0]),
        attention_pattern(pattern, tokens),
        attention_patterns({EVIL: pattern}, list("abc")),
        head_positions(scores, tokens=tokens),
        scorer_agreement(named),
        overlap_matrix(circuits),
    ]
    for fig in figures:
        page = fig.to_json().encode().decode("unicode_escape")
        assert EVIL not in page
        assert "&lt;b&gt;x&lt;/b&gt;" in page
        assert EVIL in shown(fig)
        assert "$x$" not in page


# -- heads -----------------------------------------------------------------------------------


def test_levels_stand_in_the_outlined_cells(toy_scores, found):
    (heat,) = head_heatmap(toy_scores, found).data
    assert set(found.levels.values()) == {1, 2}
    for layer in range(found.n_layers):
        for index in range(found.n_heads):
            head = Head(layer, index)
            level = found.levels.get(head)
            assert heat.text[layer][index] == ("" if level is None else str(level))
            inside = heat.customdata[layer][index][4]
            assert inside == ("" if level is None else f"<br>in the circuit, level {level}")
    assert heat.texttemplate
    # One level says nothing that the outline does not.
    (heat,) = head_heatmap(toy_scores, replace(found, levels=dict.fromkeys(found, 1))).data
    assert heat.texttemplate is None


@pytest.mark.parametrize(("n_layers", "n_heads"), SIZES)
def test_large_models_keep_labels_apart(n_layers, n_heads):
    fig = head_heatmap(synthetic(n_layers, n_heads))
    assert n_layers / fig.layout.yaxis.dtick <= 16
    assert n_heads / fig.layout.xaxis.dtick <= 16
    # Pixels for each row, without the frame.
    assert (fig.layout.height - 150) / n_layers >= 20
    fig = head_bars(synthetic(n_layers, n_heads))
    assert len(fig.data[0].y) == 20


def test_bars_are_the_largest_of_either_sign_in_order(toy_scores):
    # The toy model has no head that opposes the task by much.
    turned = toy_scores.per_example.clone()
    turned[:, 1] *= -1
    toy_scores = replace(toy_scores, per_example=turned)
    circuit = toy_scores.top(3)
    fig = head_bars(toy_scores, 6, circuit)
    bars, *_ = fig.data
    order = sorted(toy_scores.ranking(), key=lambda h: -abs(at(toy_scores.mean, h)))[:6]
    assert list(bars.y) == [str(h) for h in order]
    assert fig.layout.yaxis.autorange == "reversed"
    assert min(bars.x) < 0 < max(bars.x)
    low, high = toy_scores.interval()
    for k, head in enumerate(order):
        value = at(toy_scores.mean, head)
        assert bars.x[k] == pytest.approx(value)
        assert value - bars.error_x.arrayminus[k] == pytest.approx(at(low, head))
        assert value + bars.error_x.array[k] == pytest.approx(at(high, head))
        filled = bars.marker.color[k] != look("light").paper
        assert filled == (head in circuit)
        assert bars.customdata[k][2] == toy_scores.ranking().index(head) + 1
    assert [t.name for t in fig.data[1:]] == ["in the circuit", "other heads"]
    everything = head_bars(toy_scores, 1000)
    assert len(everything.data[0].y) == 16
    assert len(everything.data) == 1
    with pytest.raises(cl.InputError, match="at least one head"):
        head_bars(toy_scores, 0)
    with pytest.raises(cl.InputError, match="scores are of a 2 × 8 one"):
        head_bars(toy_scores, circuit=cl.Circuit.of(["a0.h0"], 3, 3))


def test_positions_are_those_of_the_scores(by_position):
    (heat,) = head_positions(by_position, 4).data
    values = by_position.by_position.double().mean(0)
    width = values.shape[0]
    strength = values.abs().amax(0)
    first = Head.parse(heat.y[0])
    assert at(strength, first) == pytest.approx(float(strength.max()))
    assert heat.zmax == -heat.zmin == pytest.approx(float(strength.max()))
    assert heat.x == tuple(str(p) for p in range(-width, 0))
    for row, name in zip(heat.z, heat.y, strict=True):
        head = Head.parse(name)
        np.testing.assert_allclose(row, values[:, head.layer, head.index])
    # The whole is what the parts sum to.
    total = at(by_position.mean, first)
    assert sum(heat.z[0]) == pytest.approx(total, abs=1e-4)


def test_positions_of_one_example_with_its_tokens(by_position):
    name = by_position.example_ids[3]
    tokens = ["the", "the", "Ġend"]
    fig = head_positions(by_position, 2, tokens, name)
    (heat,) = fig.data
    head = Head.parse(heat.y[0])
    expected = by_position.by_position[3, -3:, head.layer, head.index]
    np.testing.assert_allclose(heat.z[0], expected, atol=1e-6)
    # The same token twice is two places.
    assert heat.x == ("-3", "-2", "-1")
    assert fig.layout.xaxis.labelalias == {"-3": "the", "-2": "the", "-1": "·end"}
    assert heat.customdata[0][2] == "“·end”, position -1"
    (heat,) = head_positions(by_position, 2, tokens, name, last=2).data
    assert heat.x == ("-2", "-1")
    assert heat.customdata[0][0] == "“the”, position -2"


def test_positions_refuse_what_they_cannot_draw(toy_scores, by_position):
    with pytest.raises(cl.InputError, match="by_position=True"):
        head_positions(toy_scores)
    with pytest.raises(cl.InputError, match="no example 'nobody'"):
        head_positions(by_position, example="nobody")
    with pytest.raises(cl.InputError, match="99 tokens were given"):
        head_positions(by_position, tokens=["a"] * 99)
    with pytest.raises(cl.InputError, match="at least one position"):
        head_positions(by_position, last=0)
    with pytest.raises(cl.InputError, match="at least one head"):
        head_positions(by_position, 0)


def test_overlap_says_how_much_circuits_share():
    one, other = (cl.Circuit.of(names, 2, 4) for names in (["a0.h0", "a0.h1"], ["a0.h1"]))
    (heat,) = overlap_matrix({"ind": one, "jav": other}).data
    np.testing.assert_allclose(heat.z, [[100, 50], [50, 100]])
    assert heat.x == heat.y == ("ind", "jav")
    (heat,) = overlap_matrix({"ind": one, "jav": other}, "share").data
    np.testing.assert_allclose(heat.z, [[100, 50], [100, 100]])
    assert list(heat.customdata[0][1]) == [1, 2, 1]
    with pytest.raises(cl.InputError, match="'jaccard' or 'share'"):
        overlap_matrix({"ind": one}, "dice")
    with pytest.raises(cl.InputError, match="no circuits"):
        overlap_matrix({})
    with pytest.raises(cl.InputError, match="different models"):
        overlap_matrix({"ind": one, "jav": cl.Circuit.of([], 3, 3)})


# -- tokens ----------------------------------------------------------------------------------


def test_boxes_lie_behind_their_tokens_and_wrap():
    tokens = ["Ġone", "two", "Ġthree", "Ċ", "four"]
    values = np.array([1.0, -2.0, 0.5, 0.0, 0.1])
    fig = token_relevance(tokens, values, columns=12)
    heat, text = fig.data
    assert text.text == ("·one", "two", "·three", "↵", "four")
    # 5 + 4 columns; the next would need 7; a line break ends a line.
    assert text.y == (0, 0, 1, 1, 2)
    assert heat.zmax == -heat.zmin == 2.0
    cells = np.array(heat.z)
    for k, (x, y) in enumerate(zip(text.x, text.y, strict=True)):
        column = round((x - heat.x0) / heat.dx)
        assert cells[y, column] == values[k]
        assert heat.customdata[y][column][0] == text.text[k]
        box = np.flatnonzero([c[1] == k + 1 for c in heat.customdata[y]] & ~np.isnan(cells[y]))
        # The text stands in the middle of its box.
        assert heat.x0 + heat.dx * box.mean() == pytest.approx(x)
    assert np.isnan(cells[2, -1])


def test_a_long_token_is_cut_in_the_picture_and_whole_in_the_hover():
    long = "x" * 60
    heat, text = token_relevance([long], torch.tensor([1.0])).data
    assert text.text[0].endswith("x…")
    assert len(text.text[0]) < 44
    assert heat.customdata[0][0][0] == long
    assert short_tokens([long]) == ["x" * 11 + "…"]


def test_marks_of_spaces_follow_the_vocabulary():
    assert short_tokens(["Ġa", "ĠĠb", " c", "dĠ"]) == ["·a", "··b", "·c", "dĠ"]
    # In Maltese, Ġ is a letter.
    assert short_tokens(["▁Ġurnata", "Ġ"]) == ["·Ġurnata", "Ġ"]


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_can_be_read_on_every_colour(mode):
    heat, text = token_relevance(list("abcde"), [-1, -0.5, 0, 0.5, 1], mode=mode).data
    stops = [colour for _, colour in heat.colorscale]

    def luminance(colour):
        rgb = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    for ink, behind in zip(text.textfont.color, stops, strict=True):
        dark, light = sorted([luminance(ink), luminance(behind)])
        assert (light + 0.05) / (dark + 0.05) > 4.5


@pytest.mark.parametrize(
    ("tokens", "values", "message"),
    [
        (["a", "b"], [1.0], "2 tokens and 1 values"),
        (["a"], [[1.0]], "1 axis"),
        (["a"], [float("nan")], "finite"),
        (["a"], ["x"], "must be numbers"),
        ([], [], "none of them empty"),
    ],
)
def test_relevance_needs_one_number_a_token(tokens, values, message):
    with pytest.raises(cl.InputError, match=message):
        token_relevance(tokens, values)
    with pytest.raises(cl.InputError, match="8 characters"):
        token_relevance(["a"], [1.0], columns=3)


def test_attention_has_queries_downwards_and_one_scale():
    tokens = ["<s>", "Ġa", "Ġa"]
    stack = torch.tril(torch.rand(5, 3, 3, generator=torch.Generator().manual_seed(0)))
    fig = attention_patterns(stack, tokens, names=[f"a0.h{k}" for k in range(5)])
    assert len(fig.data) == 5
    for trace, pattern in zip(fig.data, stack, strict=True):
        np.testing.assert_allclose(trace.z, pattern)
        assert trace.coloraxis == "coloraxis"
        assert list(trace.customdata[1][0]) == ["·a", "&lt;s&gt;"]
    assert fig.layout.coloraxis.cmin == 0
    assert fig.layout.coloraxis.cmax == pytest.approx(float(stack.max()))
    assert [a.text for a in fig.layout.annotations] == [f"a0.h{k}" for k in range(5)]
    assert fig.layout.yaxis.autorange == "reversed"
    assert fig.layout.xaxis.labelalias == {"0": "&lt;s&gt;", "1": "·a", "2": "·a"}
    # Three columns: the third has its labels in the first row, below its only panel.
    labelled = [axis.title.text == "key" for axis in fig.select_xaxes()]
    assert labelled == [False, False, True, True, True]
    (one,) = attention_pattern(stack[0], tokens).data
    np.testing.assert_allclose(one.z, stack[0])


def test_attention_refuses_other_shapes():
    tokens = list("abc")
    with pytest.raises(cl.InputError, match=r"this one is 2 × 3"):
        attention_pattern(np.ones((2, 3)), tokens)
    with pytest.raises(cl.InputError, match="that of x is 2 × 2"):
        attention_patterns({"x": np.ones((2, 2))}, tokens)
    with pytest.raises(cl.InputError, match="2 axes"):
        attention_pattern(np.ones((1, 3, 3)), tokens)
    with pytest.raises(cl.InputError, match="3 axes"):
        attention_patterns(torch.ones(3, 3), tokens)
    with pytest.raises(cl.InputError, match="1 names and 2 patterns"):
        attention_patterns(np.ones((2, 3, 3)), tokens, names=["same", "same"])
    with pytest.raises(cl.InputError, match="no attention patterns"):
        attention_patterns({}, tokens)
    with pytest.raises(cl.InputError, match="at least one column"):
        attention_patterns(np.ones((2, 3, 3)), tokens, columns=0)
    with pytest.raises(cl.InputError, match="finite"):
        attention_pattern(np.full((3, 3), np.inf), tokens)


# -- scorers ---------------------------------------------------------------------------------


def test_agreement_compares_each_scorer_with_the_reference(toy_scores, ablated):
    fig = scorer_agreement([toy_scores, ablated])
    heats = [t for t in fig.data if t.type == "heatmap"]
    (points,) = [t for t in fig.data if t.type == "scatter"]
    # The reference comes first, whatever the order given.
    assert [t.name for t in heats] == ["ablation", "cdt-linear"]
    for trace, one in zip(heats, (ablated, toy_scores), strict=True):
        mean = one.mean.numpy()
        np.testing.assert_allclose(trace.z, mean / np.abs(mean).max())
        assert trace.customdata[1][2][0] == "a1.h2"
        assert trace.customdata[1][2][1] == pytest.approx(mean[1, 2])
    np.testing.assert_allclose(points.x, ablated.mean.flatten())
    np.testing.assert_allclose(points.y, toy_scores.mean.flatten())
    assert points.text[10] == "a1.h2"
    rho = spearmanr(ablated.mean.flatten(), toy_scores.mean.flatten()).statistic
    titles = [a.text for a in fig.layout.annotations]
    assert titles[2] == f"cdt-linear<br>Spearman {rho:.2f}"
    assert titles[0] == f"ablation<br>largest {float(ablated.mean.abs().max()):.3g}"


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_every_panel_has_its_own_title(n):
    several = {f"s{k}": synthetic(3, 4, seed=k) for k in range(n)}
    fig = scorer_agreement(several, reference="s1")
    names = ["s1", *(f"s{k}" for k in range(n) if k != 1)]
    axes = {t.xaxis: t for t in fig.data}
    assert len(axes) == len(fig.data) == 2 * n - 1
    for title in fig.layout.annotations:
        # The panel whose middle is that of the title, and whose top is nearest below it.
        def distance(trace, title=title):
            x = fig.layout[trace.xaxis.replace("x", "xaxis")].domain
            y = fig.layout[trace.yaxis.replace("y", "yaxis")].domain
            return abs(sum(x) / 2 - title.x) + abs(y[1] - title.y)

        nearest = min(fig.data, key=distance)
        assert title.text.startswith(f"{nearest.name}<br>")
        assert ("Spearman" in title.text) == (nearest.type == "scatter")
    assert [t.name for t in fig.data if t.type == "heatmap"] == names


def test_a_comparison_of_scorers_will_do(toy_scores, ablated):
    scores = {"cdt-linear": toy_scores, "ablation": ablated}
    found = cl.ScorerComparison(pd.DataFrame(), 4, 12, 0, toy_scores.provenance, scores)
    assert scorer_agreement(found) == scorer_agreement(scores)


def test_agreement_refuses_what_it_cannot_compare():
    with pytest.raises(cl.InputError, match="no curve to draw"):
        faithfulness_curve([])
    one = synthetic()
    with pytest.raises(cl.InputError, match="no scores by 'ablation'"):
        scorer_agreement([one])
    with pytest.raises(cl.InputError, match="at least two scorers"):
        scorer_agreement([one], reference="cdt-linear")
    with pytest.raises(cl.InputError, match="name them in a mapping"):
        scorer_agreement([one, synthetic(seed=1)])
    with pytest.raises(cl.InputError, match="2 × 3 model"):
        scorer_agreement([one, synthetic(2, 3, method="dla")], reference="cdt-linear")


# -- curves ----------------------------------------------------------------------------------


def test_minimality_shows_losses_and_which_reach_zero(minimal):
    fig = minimality_bars(minimal)
    bars = fig.data[0]
    frame = minimal.to_frame()
    assert list(bars.y) == list(frame["head"])
    assert list(bars.x) == sorted(minimal.loss, reverse=True)
    np.testing.assert_allclose(np.array(bars.x) + bars.error_x.array, frame["high"])
    np.testing.assert_allclose(np.array(bars.x) - bars.error_x.arrayminus, frame["low"])
    hollow = [colour == look("light").paper for colour in bars.marker.color]
    assert hollow == [low <= 0 <= high for low, high in zip(frame.low, frame.high, strict=True)]
    assert f"f = {minimal.faithfulness:.2f}" in fig.layout.xaxis.title.text


def test_a_method_that_looks_like_markup_stays_text(toy_proxy, toy_task, toy_scores, toy_baseline):
    curve = cl.faithfulness(
        toy_proxy,
        toy_task,
        replace(toy_scores, method=EVIL),
        toy_baseline,
        sizes=[4],
        n_random=0,
        examples=toy_task.held_out[:10],
        quiet=True,
    )
    assert f"top heads ({EVIL})" in shown(faithfulness_curve(curve))


# -- graph -----------------------------------------------------------------------------------


def drawn_edges(fig):
    """Source, target, score and line of every edge, from the data of the lines."""
    lines = [t for t in fig.data if t.mode == "lines" and t.meta is not None]
    edges = {tuple(t.meta[:2]): t for t in lines}
    assert len(edges) == len(lines)
    return edges


def test_the_graph_has_levels_as_columns_and_edges_between_its_heads(found, toy_scores):
    fig = circuit_graph(found, toy_scores, max_edges=1000)
    (nodes,) = [t for t in fig.data if t.mode == "markers"]
    place = dict(zip(nodes.text, zip(nodes.x, nodes.y, strict=True), strict=True))
    assert {name: -x for name, (x, _) in place.items()} == {
        str(head): level for head, level in found.levels.items()
    }
    assert len(set(place.values())) == len(found)
    place["task margin"] = (0.0, 0.5)
    edges = drawn_edges(fig)
    margin = {k for k, level in found.levels.items() if level == 1}
    expected = {(str(s), str(t)) for s, t in found.edges} | {
        (str(h), "task margin") for h in margin
    }
    assert set(edges) == expected
    assert len(found.edges) > 0
    largest = max(map(abs, found.edges.values()))
    for (source, target), line in edges.items():
        assert (line.x[0], line.y[0]) == pytest.approx(place[source])
        assert (line.x[-1], line.y[-1]) == pytest.approx(place[target])
        if target != "task margin":
            score = found.edges[Head.parse(source), Head.parse(target)]
            assert line.line.width == pytest.approx(max(0.4, 5 * abs(score) / largest))
            assert line.name == ("positive edge" if score >= 0 else "negative edge")
            assert f"{score:.4f}" in line.text
    labels = {a.text for a in fig.layout.annotations}
    assert labels == {*map(str, found), "margin"}
    for name, text in zip(nodes.text, nodes.customdata, strict=True):
        assert f"relevance {at(toy_scores.mean, Head.parse(name)):.4f} logits" in text
    assert fig.layout.xaxis.ticktext == ("level 2", "level 1", "task margin")


def test_the_graph_keeps_the_strongest_edges_and_says_so(found):
    pairs = {(Head(0, k), Head(1, k)): (-1) ** k * (k + 1.0) for k in range(6)}
    levels = {h: 2 - h.layer for pair in pairs for h in pair}
    circuit = cl.Circuit(tuple(levels), 2, 8, levels=levels, edges=pairs)
    fig = circuit_graph(circuit, max_edges=2)
    edges = {k: t for k, t in drawn_edges(fig).items() if k[1] != "task margin"}
    assert set(edges) == {("a0.h5", "a1.h5"), ("a0.h4", "a1.h4")}
    assert edges["a0.h5", "a1.h5"].line.color == look("light").diverging[0][1]
    assert edges["a0.h4", "a1.h4"].line.color == look("light").diverging[-1][1]
    assert fig.layout.xaxis.title.text == "the 2 strongest of 6 edges"
    assert circuit_graph(circuit).layout.xaxis.title.text == "6 edges"


@pytest.mark.parametrize("size", [4, 40])
def test_without_levels_columns_are_layers(size):
    scores = synthetic()
    circuit = scores.top(size)
    fig = circuit_graph(circuit, scores)
    (nodes,) = fig.data
    layers = sorted({head.layer for head in circuit})
    assert [layers[int(x)] for x in nodes.x] == [Head.parse(t).layer for t in nodes.text]
    # Of many layers every second has a number.
    every = 1 if len(layers) < 16 else 2
    shown = [str(layer) if n % every == 0 else "" for n, layer in enumerate(layers)]
    assert fig.layout.xaxis.ticktext == tuple(shown)
    labels = [a.text for a in fig.layout.annotations]
    # Whole names have no room when there are many columns.
    assert labels == [str(h) if size == 4 else str(h.index) for h in circuit]


def test_the_graph_refuses_what_it_cannot_draw(found, toy_scores):
    with pytest.raises(cl.InputError, match="no heads to draw"):
        circuit_graph(cl.Circuit.of([], 2, 8))
    with pytest.raises(cl.InputError, match="cannot be negative"):
        circuit_graph(found, max_edges=-1)
    with pytest.raises(cl.InputError, match="scores are of a 24 × 14 one"):
        circuit_graph(found, synthetic())


def test_figures_of_ones_own_can_have_the_look():
    import plotly.graph_objects as go

    fig = go.Figure().update_layout(template="circuitlens")
    assert fig.layout.template.layout.paper_bgcolor == look("light").paper
    fig.update_layout(template="circuitlens_dark")
    assert fig.layout.template.layout.font.color == look("dark").ink
