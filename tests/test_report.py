from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

import circuitlens as cl
from circuitlens.view import faithfulness_curve, head_heatmap, render_report, transfer_tradeoff
from circuitlens.view.report import _ENVIRONMENT


@pytest.fixture(scope="module")
def results(toy_proxy, toy_task, toy_scores, toy_baseline):
    curve = cl.faithfulness(toy_proxy, toy_task, toy_scores, toy_baseline, sizes=[4], n_random=2)
    transfers = [
        cl.transfer(
            toy_proxy,
            toy_scores.top(4),
            toy_task.to(target),
            strategy=strategy,
            learning_rates=[1e-3],
            epochs=1,
        )
        for target in ("near", "far")
        for strategy in ("circuit", "norms")
    ]
    return curve, transfers


def render(toy_scores, found, **changes):
    curve, transfers = found
    content = {
        "title": "A title",
        "settings": {"model": "m", "nothing": None},
        "scores": toy_scores,
        "circuit": toy_scores.top(4),
        "curve": curve,
        "results": transfers,
        "competence": "Competent.",
    }
    return render_report(**{**content, **changes})


def test_the_report_stands_alone(toy_scores, results):
    page = render(toy_scores, results)

    class Requests(HTMLParser):
        def __init__(self):
            super().__init__()
            self.found = []

        def handle_starttag(self, tag, attrs):
            self.found += [v for k, v in attrs if k in ("src", "href") and not v.startswith("#")]

    reader = Requests()
    reader.feed(page)
    assert reader.found == []
    assert page.count("Plotly.newPlot(") >= 3
    assert len(page) < 6e6


def test_text_from_data_is_escaped(toy_scores, results):
    evil = "<script>alert('x')</script>"
    scores = replace(toy_scores, provenance=replace(toy_scores.provenance, task=evil, model=evil))
    curve, transfers = results
    named = [replace(r, target_language=evil) for r in transfers]
    page = render(
        scores,
        (curve, named),
        title=evil,
        settings={evil: evil},
        competence=evil,
    )
    # The figures carry names inside JSON, where "<" may not stand either.
    assert evil not in page
    assert "&lt;script&gt;alert" in page


def test_the_numbers_of_the_table_are_those_of_the_results(toy_scores, results):
    page = render(toy_scores, results)
    rows = re.findall(r"<tr[^>]*>\s*<td>(near|far)</td><td>(\w+)</td>(.*?)</tr>", page, re.S)
    assert len(rows) == 4
    for target, strategy, cells in rows:
        result = next(
            r for r in results[1] if (r.target_language, r.strategy) == (target, strategy)
        )
        assert f">{100 * result.target_after.accuracy:.1f}<" in cells
        assert f">{result.n_trainable:,}<" in cells


@pytest.fixture(scope="module")
def compared(toy_proxy, toy_task, toy_scores):
    return cl.compare(
        toy_proxy,
        toy_scores.top(4),
        toy_task,
        ["near"],
        strategies=("circuit", "norms"),
        seeds=(0, 1),
        learning_rates=[1e-3],
        epochs=1,
        quiet=True,
    )


@pytest.fixture(scope="module")
def looked_at(toy_proxy, toy_task, toy_scores, toy_baseline):
    return cl.head_roles(
        toy_proxy, toy_task, toy_scores.top(4), toy_baseline, max_examples=24, quiet=True
    )


def explored(page):
    (raw,) = re.findall(r'<script type="application/json" id="explored-data">(.*?)</script>', page)
    return json.loads(raw)


def test_the_explorer_of_the_report_has_every_head(toy_scores, results, looked_at):
    data = explored(render(toy_scores, results, roles=looked_at))
    frame = toy_scores.to_frame()
    assert [head["head"] for head in data["heads"]] == list(frame["head"])
    assert [head["relevance"] for head in data["heads"]] == pytest.approx(list(frame["relevance"]))
    inside = {str(head) for head in toy_scores.top(4)}
    assert {head["head"] for head in data["heads"] if head["inside"]} == inside
    assert {head["head"] for head in data["heads"] if "attention" in head} == inside
    assert len(data["prompts"]) >= 3
    # Without roles it has the numbers alone, and names and tokens of strangers stay text.
    assert not any("raises" in head for head in explored(render(toy_scores, results))["heads"])
    nasty = "</script><img src=x onerror=alert(1)>"
    prompts = (("a", (nasty,) * len(looked_at.prompts[0][1])), *looked_at.prompts[1:])
    named = toy_scores.top(4).named({looked_at.roles[0].head: nasty})
    page = render(toy_scores, results, roles=replace(looked_at, prompts=prompts), circuit=named)
    assert nasty not in page
    assert explored(page)["prompts"][0][1][0] == nasty


def test_a_comparison_has_a_report_of_its_own_or_a_section(toy_scores, results, compared):
    alone = render_report(title="Compared", comparison=compared)
    assert "Relevance of the heads" not in alone
    both = render(toy_scores, results, comparison=compared)
    for page in (alone, both):
        rows = re.findall(
            r"<tr[^>]*>\s*<td>near</td><td>([\w-]+)</td><td class=\"n\">2</td>(.*?)</tr>",
            page,
            re.S,
        )
        assert [name for name, _ in rows] == ["circuit", "norms", "majority", "n-grams"]
        after = compared.summary()["target_after"][0]
        assert f">{100 * after:.1f} ±" in rows[0][1]
        assert "only 2 seeds" in page
        # Links lead to sections that are there, and ids are not used twice.
        ids = re.findall(r'\bid="([^"]+)"', page)
        assert len(ids) == len(set(ids))
        assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
        assert len(page) < 6e6


def test_failed_cells_are_warned_of(compared):
    evil = "<b>boom</b>"
    error = {"language": "near", "strategy": "full", "seed": 0, "type": "E", "message": evil}
    page = render_report(title="t", comparison=replace(compared, errors=(error,)))
    assert "Failed and left out: full for near, seed 0 (E: &lt;b&gt;boom" in page
    assert evil not in page


def test_nothing_to_report_is_refused(toy_scores):
    with pytest.raises(cl.InputError, match="nothing to report"):
        render_report(title="t", comparison=cl.Comparison(()))
    with pytest.raises(cl.InputError, match="pass circuit"):
        render_report(title="t", scores=toy_scores)


def test_unstable_rankings_are_warned_of(toy_scores, results):
    noise = torch.randn(toy_scores.per_example.shape, generator=torch.Generator().manual_seed(0))
    assert "ranking of the heads is unstable" in render(
        replace(toy_scores, per_example=noise), results
    )
    assert "unstable" not in render(toy_scores, results)


def test_a_report_without_transfers_or_curve_renders(toy_scores, results):
    page = render(toy_scores, results, curve=None, results=[])
    assert "Faithfulness</h2>" not in page
    assert "Transfer</h2>" not in page


def test_warnings_name_what_limits_the_numbers(toy_scores, results):
    few = replace(
        toy_scores,
        per_example=toy_scores.per_example[:20],
        example_ids=toy_scores.example_ids[:20],
    )
    assert "only 20 examples" in render(few, results)
    assert "only 20 examples" not in render(toy_scores, results)


def test_the_heatmap_is_centred_on_zero_and_outlines_the_circuit(toy_scores):
    circuit = toy_scores.top(3)
    fig = head_heatmap(toy_scores, circuit)
    (heat,) = fig.data
    assert heat.zmin == -heat.zmax
    assert heat.zmax == pytest.approx(float(toy_scores.mean.abs().max()))
    outlined = {(int(s.y0 + 0.5), int(s.x0 + 0.5)) for s in fig.layout.shapes}
    assert outlined == {(h.layer, h.index) for h in circuit}
    top = circuit.heads[0]
    assert heat.customdata[top.layer][top.index][0] == str(top)
    assert "in the circuit" in heat.customdata[top.layer][top.index][4]
    with pytest.raises(cl.InputError, match="scores are of a 2 × 8 one"):
        head_heatmap(toy_scores, cl.Circuit.of(["a0.h0"], 3, 3))


def test_curves_of_several_methods_share_one_figure(results):
    curve, transfers = results
    fig = faithfulness_curve([curve, replace(curve, method="other")])
    names = [t.name for t in fig.data if t.showlegend is not False]
    assert {"top heads (cdt-linear)", "top heads (other)"} <= set(names)
    tradeoff = transfer_tradeoff(transfers)
    points = [(x, y) for t in tradeoff.data for x, y in zip(t.x, t.y, strict=True) if x is not None]
    expected = [(100 * r.source_change, 100 * r.target_gain) for r in transfers]
    for one, other in zip(sorted(points), sorted(expected), strict=True):
        assert one == pytest.approx(other)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_report_works_in_a_browser_from_disk(tmp_path, toy_scores, results, compared):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    file = tmp_path / "report.html"
    evil = "<img src=x onerror=console.error('run')>"
    file.write_text(render(toy_scores, results, comparison=compared, title=evil))
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        complaints, asked = [], []
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("#fig-heads .heatmaplayer image, #fig-heads .hm")
        assert page.title() == evil
        # Hovering over a head says which it is.
        plot = page.locator("#fig-heads .nsewdrag").first
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] / 2, steps=4)
        page.wait_for_selector("#fig-heads .hoverlayer .hovertext")
        assert re.search(r"a\d\.h\d", page.text_content("#fig-heads .hoverlayer"))
        # A click on it opens it in the explorer, and so does the list, by keyboard.
        page.mouse.click(box["x"] + box["width"] / 3, box["y"] + box["height"] / 2)
        page.wait_for_function("document.getElementById('explored').selectedIndex > 0")
        chosen = page.input_value("#explored")
        assert "Rank" in page.text_content("#explored-head")
        page.focus("#explored")
        page.keyboard.press("Home")
        page.wait_for_function(f"document.getElementById('explored').value != '{chosen}'")
        assert page.text_content("#explored-head").startswith("Rank 1 ")
        # A click on the legend hides a curve.
        toggle = page.locator("#fig-faithfulness .legendtoggle").first
        toggle.scroll_into_view_if_needed()
        toggle.click(force=True)
        page.wait_for_function(
            "document.getElementById('fig-faithfulness').data"
            ".some(trace => trace.visible === 'legendonly')"
        )
        # Links of the navigation lead to their sections.
        page.click("nav a[href='#comparison']")
        page.wait_for_function(
            "Math.abs(document.getElementById('comparison').getBoundingClientRect().top) < 200"
        )
        browser.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_numbers_have_the_minus_of_the_figures_and_zero_has_none():
    def shown(template):
        return _ENVIRONMENT.from_string("{{ " + template + " }}").render()

    assert [shown(f"({x})|fixed(2)") for x in (-0.001, -0.5, 3.14159)] == ["0.00", "−0.50", "3.14"]
    assert [shown(f"({x})|signed(1)") for x in (-0.01, -4.0, 4.0)] == ["+0.0", "−4.0", "+4.0"]
