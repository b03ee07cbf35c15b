"""Names from others' files: they stay names on disk, in HTML, Markdown, spreadsheets, terminals."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from helpers import cell, evaluation, result

import circuitlens as cl
from circuitlens.adapt.retention import Retained
from circuitlens.utils.strangers import (
    as_code,
    as_markdown,
    for_spreadsheets,
    on_one_line,
    printable,
)

TAG = "<img src=x onerror=alert(1)>"
NASTY = [
    TAG,
    "</script><script>alert(1)</script>",
    '=HYPERLINK("http://x","y")',
    "@SUM(1+1)*cmd|' /C calc'!A0",
    "../../up",
    "/etc/passwd",
    "[red]x[/blue]",
    "\x1b]0;owned\x07\x1b[2Jgone",
    "a\u202egnp.exe",
    "`rm -rf`| x | [click](javascript:alert(1))",
    "${x} {{ 7*7 }} {% raw %}",
    "line\nbreak",
]


class Tags(HTMLParser):
    """Collects what a browser would make of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def harmless(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert not [t for t, a in tags.found if t == "img" and a.get("src") == "x"]
    assert not [
        a
        for _, a in tags.found
        if any(k.startswith("on") and "alert" in str(v) for k, v in a.items())
    ]
    assert "<script>alert(1)" not in page


# Drawing takes time, so some are among the long tests.
DRAWN = [
    pytest.param(name, marks=[] if n in (0, 2, 4, 7) else [pytest.mark.slow])
    for n, name in enumerate(NASTY)
]


@pytest.mark.parametrize("name", DRAWN)
def test_a_comparison_of_strangers_is_only_read(name, tmp_path):
    """Its languages, strategies and source come from a JSON file."""
    cells = tuple(
        cell(
            language,
            strategy,
            seed,
            0.7,
            source_language=name,
            retained=[{"name": f"t/{name}", "before": evaluation(0.9), "after": evaluation(0.8)}],
        )
        for language in (name, "x")
        for strategy in ("circuit", name)
        for seed in (0, 1)
    )
    folder = tmp_path / "in" / "deep"
    comparison = cl.Comparison(cells, ())
    comparison.save(folder)
    again = cl.Comparison.load(folder)
    assert again == comparison
    harmless(again._repr_html_())
    page = cl.view.write_report(tmp_path / "report.html", title=name, comparison=again)
    harmless(page.read_text())
    before = set(tmp_path.rglob("*"))
    files = cl.view.write_figures(folder, folder / "figures", ["html"])
    new = set(tmp_path.rglob("*")) - before - {folder / "figures"}
    assert new == set(files)
    assert {f.parent for f in files} == {folder / "figures"}
    for file in files:
        if file.suffix == ".html":
            harmless(file.read_text())
    for file in [*folder.glob("*.csv"), *folder.glob("figures/*.csv")]:
        with file.open(newline="") as text:
            for row in csv.reader(text):
                assert not [c for c in row if c[:1] in tuple("=@\t\r")]
                assert not [
                    c
                    for c in row
                    if c[:1] in ("+", "-")
                    and not re.fullmatch(r"[-+]?[\d.e+-]+", c)
                    and c not in ("-",)
                ]


@pytest.mark.parametrize("name", NASTY)
def test_a_result_of_strangers_makes_a_harmless_card_and_page(name, tmp_path, capsys, toy_scores):
    from rich.console import Console

    from circuitlens.adapt.card import model_card
    from circuitlens.cli_tables import strategy_table

    before, after = (cl.Evaluation(**evaluation(share)) for share in (0.9, 0.8))
    kept = (Retained(f"t/{name}", before, after),)
    found = result(name, name, source_language=name, retained=kept)
    harmless(found._repr_html_())
    text = str(model_card(found))
    body = text.split("---", 2)[2]
    assert "\x1b" not in body
    assert "\u202e" not in body
    # Markdown's own parser finds no link, image or tag in it.
    from markdown import markdown

    tags = Tags()
    tags.feed(markdown(body, extensions=["tables", "fenced_code"]))
    links = [a.get("href", "") for t, a in tags.found if t == "a"]
    assert all(str(link).startswith("https://") for link in links)
    assert not [t for t, _ in tags.found if t in ("img", "script")]
    page = cl.view.write_report(
        tmp_path / "r.html",
        title=name,
        results=[found],
        scores=toy_scores,
        circuit=toy_scores.top(2),
    )
    harmless(page.read_text())
    Console(markup=False, emoji=False, width=200).print(strategy_table([found]))
    shown = capsys.readouterr().out
    assert "\x1b]0" not in shown
    assert "\x1b[2J" not in shown
    if name.startswith("[red]"):
        assert "[red]" in shown


@pytest.mark.parametrize("name", DRAWN)
def test_labels_and_names_of_heads_of_strangers_are_shown_as_they_are(name, toy_scores, tmp_path):
    circuit = toy_scores.top(2)
    circuit = circuit.named({circuit.heads[0]: name})
    harmless(circuit._repr_html_())
    circuit.save(tmp_path / "circuit.json")
    again = cl.Circuit.load(tmp_path / "circuit.json")
    assert again == circuit
    page = cl.view.write_report(
        tmp_path / "report.html", title="t", scores=toy_scores, circuit=again
    )
    harmless(page.read_text())
    rows = [
        {"id": str(i), "text": f"wa {i} {name}", "label": (name, "b")[i % 2]} for i in range(90)
    ]
    task = cl.Task.from_records(rows, template="{text} ->", id="id")
    harmless(task._repr_html_())


def test_what_a_terminal_would_act_on_is_spelt_out():
    assert printable("a\x1b[2Jb\x07\u202e") == "a\\x1b[2Jb\\x07\\u202e"
    assert printable("a\tb\nc") == "a\tb\nc"
    # Letters of scripts that join and do not join.
    assert printable("می\u200cروم क्\u200dष") == "می\u200cروم क्\u200dष"
    assert on_one_line("a\n\nb\tc") == "a b c"


def test_markdown_and_code_of_any_text():
    assert as_markdown("a|b`c\n# d") == "a\\|b\\`c \\# d"
    assert as_code("a`b") == "``a`b``"
    assert as_code("`a`") == "`` `a` ``"


def test_spreadsheets_see_no_formula_and_numbers_stay():
    frame = pd.DataFrame({"=a": ["=1+1", "-5", "near-zero"], "n": [-0.5, 1.0, 2.0]})
    found = for_spreadsheets(frame)
    assert found.columns.tolist() == ["'=a", "n"]
    assert found["'=a"].tolist() == ["'=1+1", "-5", "near-zero"]
    assert found["n"].tolist() == [-0.5, 1.0, 2.0]


def test_errors_on_the_command_line_are_plain(monkeypatch, capsys, tmp_path):
    from circuitlens.cli import main

    (tmp_path / "run.json").write_text(json.dumps({"schema": "\x1b[2Jgone"}))
    monkeypatch.setattr("sys.argv", ["circuitlens", "report", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert "gone" in said
    assert "\x1b" not in said
