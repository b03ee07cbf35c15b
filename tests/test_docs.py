"""The site: its code runs page by page, its commands exist, it is complete, and it builds."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from helpers import can_draw, run_command

import circuitlens as cl
from circuitlens.adapt import STRATEGIES
from circuitlens.tasks import toy
from circuitlens.tasks.sources import data_sets, toy_languages
from circuitlens.view import paper

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    str(p.relative_to(DOCS)): p.read_text(encoding="utf-8") for p in sorted(DOCS.rglob("*.md"))
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.S | re.M)


WITH_CODE = [page for page in PAGES if blocks(page, "python")]


@pytest.fixture
def one_training(monkeypatch, toy_proxy):
    """Pages train the same model; here it is trained once."""
    calls = []

    real = cl.finetune

    def finetune(model, task, **options):
        if model.family.is_classifier:
            return real(model, task, **{**options, "epochs": 2})
        calls.append(options)
        assert (task.name, task.language, model.geometry.n_layers) == ("toy", "source", 2)
        return toy_proxy.clone()

    monkeypatch.setattr(cl, "finetune", finetune)
    return calls


def shrink(monkeypatch, sentences: int) -> None:
    """Fewer sentences and fewer random circuits: what is tested is that the code runs."""

    @dataclass(frozen=True)
    class Fewer(toy.ToyLanguages):
        n_train: int = sentences
        n_validation: int = 60
        n_test: int = 100

    monkeypatch.setattr(toy_languages, "ToyLanguages", Fewer)
    assert len(cl.load_task("toy")["pool_a"]) < sentences
    measure = cl.faithfulness

    def faithfulness(*args, n_random=2, **options):
        return measure(*args, n_random=min(2, n_random), **options)

    monkeypatch.setattr(cl, "faithfulness", faithfulness)


@pytest.fixture
def _pictures(monkeypatch):
    """Files of figures are drawn by a browser, which not every machine has."""
    if not can_draw():
        monkeypatch.setattr(paper, "_draw", lambda jobs, scale: [b"drawn" for _ in jobs])


@pytest.mark.parametrize("page", WITH_CODE)
@pytest.mark.usefixtures("_pictures")
def test_the_code_of_a_page_runs_in_its_order(page, request, tmp_path, monkeypatch):
    if "cl.finetune(" in "".join(blocks(page, "python")):
        calls = request.getfixturevalue("one_training")
    monkeypatch.chdir(tmp_path)
    # The first page shows a gain, which takes some sentences of the target language.
    shrink(monkeypatch, 2000 if page == "getting-started.md" else 600)
    if page == "howto/speech.md":
        from figures import speech_world

        few = partial(speech_world.train_from_scratch, steps=400)
        monkeypatch.setattr(speech_world, "train_from_scratch", few)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(block, f"docs/{page}, block {number}", "exec"), names)
    if page == "getting-started.md":
        assert calls
        assert names["result"].target_gain > 0  # type: ignore[attr-defined]
        assert (tmp_path / "heads.html").stat().st_size > 10_000


def test_there_is_code_to_run():
    assert len(WITH_CODE) >= 8


def test_the_commands_name_options_that_exist():
    from typer.main import get_command

    from circuitlens.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    found = 0
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if not words or not words[0].endswith("circuitlens"):
                    continue
                known = {o for p in commands[words[1]].params for o in p.opts}
                assert {w for w in words if w.startswith("--")} <= known, f"{page}: {line}"
                found += 1
    assert found >= 5


# What a page's commands are about here, and what makes them take seconds.
STANDS_FOR = {
    "nusax": "toy",
    "indonesian": "source",
    "javanese": "near",
    "sundanese": "near",
    "minangkabau": "far",
    "runs/ind-jav": "runs/mine",
}
LITTLE = {
    "run": "--max-examples 20 --n-random 1 --epochs 1 --rate 1e-3 --strategy norms "
    "--competence never --allow-chance",
    "compare": "--strategy norms",
    "figures": "--format svg",
}
# Not run: the demo takes minutes, and there is no GPU.
SKIPPED = {"getting-started.md": "the demo", "howto/gpu.md": "a GPU"}
WITH_COMMANDS = [
    page
    for page in PAGES
    if page not in SKIPPED and re.search(r"^circuitlens ", "".join(blocks(page, "sh")), re.M)
]


def test_pages_have_commands_to_run():
    assert len(WITH_COMMANDS) >= 4
    assert set(SKIPPED) <= set(PAGES)


@pytest.mark.usefixtures("_pictures")
@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_the_commands_run_in_their_order(page, tmp_path, monkeypatch, toy_proxy):

    toy_proxy.save(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    if page == "howto/own-data.md":
        # The page's own files.
        exec(blocks(page, "python")[0], {"__name__": "__main__"})
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    commands = [w[1:] for w in words if w and w[0] == "circuitlens"]
    if commands[0][0] != "run":
        # A page that begins with the folder of a run.
        commands.insert(
            0,
            [
                "run",
                "--model",
                "my-model",
                "--task",
                "toy",
                "--target",
                "near",
                "--out",
                "runs/mine",
            ],
        )
    for command in commands:
        run_command(command, STANDS_FOR, LITTLE)


def test_extras_that_are_named_exist():
    project = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r"'\.\[([\w,]+)\]'", "".join(PAGES.values())):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", project, re.M), extra


def documented() -> dict[str, object]:
    """Objects that the reference renders by themselves, by their path."""
    found = {}
    for page, text in PAGES.items():
        for path in re.findall(r"^::: ([\w.]+)", text, re.M):
            assert page.startswith("reference/"), page
            try:
                found[path] = importlib.import_module(path)
            except ModuleNotFoundError:
                module, _, name = path.rpartition(".")
                found[path] = getattr(importlib.import_module(module), name)
    return found


def test_every_public_name_is_in_the_reference():
    objects = list(documented().values())
    modules = [
        thing for thing in objects if hasattr(thing, "__path__") or hasattr(thing, "__file__")
    ]
    within = [
        getattr(module, name) for module in modules for name in getattr(module, "__all__", ())
    ]
    for name in cl.__all__:
        if name in ("tasks", "__version__"):
            continue
        thing = getattr(cl, name)
        assert any(thing is other for other in (*objects, *within)), name


def test_every_scorer_strategy_figure_and_data_set_is_explained():
    for names, page in (
        (cl.METHODS, "method.md"),
        ([*STRATEGIES, "auto"], "howto/strategies.md"),
        (cl.view.__all__, "howto/figures.md"),
        (data_sets(), "howto/own-data.md"),
    ):
        for name in names:
            assert re.search(rf"`(cl\.view\.)?{re.escape(name)}`", PAGES[page]), f"{name}: {page}"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("mkdocs", "material", "mkdocstrings", "mkdocs_jupyter"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not re.search(r"^(WARNING|ERROR)", done.stderr, re.M), done.stderr
    return folder


def pages_of(site: Path) -> dict[str, str]:
    return {p.name: p.read_text(encoding="utf-8") for p in site.rglob("*.html")}


def test_the_site_builds_without_warnings(site):
    names = {p.relative_to(site).with_suffix("").as_posix() for p in site.rglob("*.html")}
    assert {page.removesuffix(".md") for page in PAGES} <= names
    assert len([name for name in names if name.startswith("notebooks/")]) == 6
    assert not (site / "extensions").exists()


def test_every_figure_has_an_entry(site):
    text = (site / "reference" / "view.html").read_text(encoding="utf-8")
    entries = re.findall(r'doc-function-name">([^<]+)<', text)
    assert set(cl.view.__all__) <= set(entries)


def test_every_figure_has_a_picture_beside_its_code():
    """``python -m figures.gallery`` draws them."""
    others = {"explore", "export", "export_all", "figures_of", "notebook_pictures"}
    others |= {"render_report", "write_figures", "write_report"}
    page = (ROOT / "docs" / "howto" / "figures.md").read_text(encoding="utf-8")
    for name in set(cl.view.__all__) - others:
        assert f"images/gallery/{name}.svg" in page, name
        assert (ROOT / "docs" / "images" / "gallery" / f"{name}.svg").is_file(), name


def test_the_search_works_from_disk(site):
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        asked = []
        page.on("request", lambda r: asked.append(r.url))
        page.goto((site / "howto" / "plan.html").as_uri())
        page.locator("input.md-search__input").click()
        page.keyboard.type("faithfulness", delay=20)
        page.locator(".md-search-result__item").first.wait_for(state="attached", timeout=20_000)
        chromium.close()
    assert not [url for url in asked if url.startswith("http")]


def test_the_site_loads_nothing_from_elsewhere(site):
    for name, text in pages_of(site).items():
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?(https?:[^\" >]+)", text)
        loaded += re.findall(
            r"<link[^>]* rel=\"?stylesheet\"?[^>]* href=\"?(https?:[^\" >]+)", text
        )
        assert not loaded, f"{name}: {loaded}"


def test_formulas_are_drawn_or_readable(site):
    method = (site / "method.html").read_text(encoding="utf-8")
    assert "arithmatex" not in method
    if importlib.util.find_spec("latex2mathml"):
        assert method.count("<math ") > 30
        assert "\\frac" not in re.sub(r"<annotation.*?</annotation>", "", method)
    else:
        assert "<code>" in method
        assert "\\frac" in method


def test_roles_of_docstrings_became_links(site):
    for name, text in pages_of(site).items():
        assert not re.search(r":(class|func|meth|attr|data|mod):`", text), name
        assert not re.search(r":(class|func|meth|attr|data|mod):<code>", text), name
    adapt = (site / "reference" / "adapt.html").read_text(encoding="utf-8")
    assert re.search(r'<a [^>]*href="#circuitlens\.adapt\.options\.TrainingOptions"', adapt)


def test_the_options_of_every_command_are_listed(site):
    from typer.main import get_command

    from circuitlens.cli import app

    text = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    for command in get_command(app).commands.values():  # type: ignore[attr-defined]
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert f"<code>{parameter.opts[0]}</code>" in text
