"""The explorer in a real notebook: JupyterLab, a kernel, and a browser without a screen."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlparse

import pytest

pytest.importorskip("anywidget", reason="anywidget is not installed")
pytest.importorskip("jupyterlab", reason="jupyterlab is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

LIMIT = 45_000
EVIL = "<img src=x onerror=alert(1)>"

# Untrained: what it says does not matter here, only that it says it. Texts and labels are hostile.
SETUP = f"""
import torch
torch.set_num_threads(1)
import circuitlens as cl
from circuitlens.baseline import MeanBaseline
from circuitlens.utils.provenance import Provenance
from circuitlens.tasks import toy
from circuitlens.explorer.opening import explore

model = cl.load(toy.toy_model(n_layers=2, d_model=32).hf, toy.toy_tokenizer())
# The other way round the heads of this random model hurt, and f has no meaning.
model.hf.model.norm.weight.data.neg_()
rows = [
    {{"text": f"{{i}} {EVIL} ba be", "label": label}}
    for i in range(60) for label in ("negative", "positive")
]
task = cl.Task.from_records(rows, name="{EVIL}", language="toy")
g = model.geometry
origin = Provenance("toy", model.fingerprint(), "toy/toy", task.fingerprint(), 0)
baseline = MeanBaseline(
    torch.zeros(g.n_layers, g.n_heads, g.d_head), torch.zeros(g.n_layers, g.d_model),
    "all", (), {{"negative": 1, "positive": 1}}, 1.0, origin)
generator = torch.Generator().manual_seed(0)
scores = cl.HeadScores(
    torch.randn(9, g.n_layers, g.n_heads, generator=generator), "cdt-linear", "all",
    tuple(map(str, range(9))), origin)
explorer = explore(model, task, baseline, scores, scores.top(3), n_examples=8)
explorer
"""
PRINT = "print('IN PYTHON', *explorer.circuit.heads, '|', explorer.circuit.selection)"
DARK = "\nexplorer.mode = 'dark'"
# Busy until it is told otherwise: a fixed time is too short for a loaded machine.
BUSY = """import time, pathlib
end = time.monotonic() + 120
while not pathlib.Path("go-on").exists() and time.monotonic() < end:
    time.sleep(0.05)
"""


def notebook(path: Path, *cells: str) -> None:
    """A notebook file, in the format that every Jupyter reads."""
    made = [
        {
            "cell_type": "code",
            "id": f"cell-{n}",
            "metadata": {},
            "source": source.strip(),
            "outputs": [],
            "execution_count": None,
        }
        for n, source in enumerate(cells)
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    content = {
        "cells": made,
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    path.write_text(json.dumps(content))


@contextmanager
def lab(root: Path) -> Iterator[str]:
    """A JupyterLab of its own below ``root``; it and its kernels are gone afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # No question about news over the notebook.
    settings = root / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True})
    )
    environment = os.environ | {
        "JUPYTERLAB_SETTINGS_DIR": str(root / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(root / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(root / "config"),
        "JUPYTER_DATA_DIR": str(root / "data"),
        "JUPYTER_RUNTIME_DIR": str(root / "runtime"),
        "IPYTHONDIR": str(root / "ipython"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--ServerApp.token=",
        f"--ServerApp.root_dir={root}",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    log = (root / "server.log").open("w")
    # A session of its own, so that kernels can be stopped with the server.
    server = subprocess.Popen(
        command, cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 40
        while True:
            try:
                urllib.request.urlopen(f"{url}/api/status", timeout=2).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(
                        f"JupyterLab did not start: {(root / 'server.log').read_text()[-2000:]}"
                    )
                time.sleep(0.2)
        yield url
    finally:
        # On the first signal the server shuts its kernels down, which have sessions of their own.
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait(5)
        log.close()


@contextmanager
def browser_page(url: str, **options: object) -> Iterator[tuple[object, dict[str, list[str]]]]:
    """A page, and what it complained of and asked for."""
    seen: dict[str, list[str]] = {"errors": [], "requests": [], "dialogs": []}
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            page = browser.new_context(**options).new_page()
            page.set_default_timeout(LIMIT)
            page.on("request", lambda request: seen["requests"].append(request.url))
            page.on("pageerror", lambda error: seen["errors"].append(str(error)))
            page.on(
                "console",
                lambda line: seen["errors"].append(line.text) if line.type == "error" else None,
            )

            def refuse(dialog: object) -> None:
                seen["dialogs"].append(dialog.message)
                dialog.dismiss()

            page.on("dialog", refuse)
            page.goto(url)
            yield page, seen
        finally:
            browser.close()


def await_kernel(page: object) -> None:
    """Wait until cells can be run; what is sent before that is lost without a word."""
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.locator(".jp-StatusBar-Widget", has_text="| Idle").first.wait_for()


def run_cell(page: object, number: int) -> None:
    """Run a cell; again if nothing came of it, as happens before the kernel is connected."""
    cell = page.locator(".jp-Notebook .jp-CodeCell").nth(number)
    started = cell.locator(".jp-InputPrompt", has_text=re.compile(r"\[(\*|\d+)\]"))
    for _ in range(6):
        cell.locator(".cm-content").click()
        page.keyboard.press("Shift+Enter")
        with suppress(sync_api.TimeoutError):
            started.wait_for(timeout=3000)
            return
    pytest.fail(f"JupyterLab did not run cell {number}")


def printed(page: object, number: int) -> tuple[list[str], str]:
    """Heads and selection of the circuit as a cell printed them."""
    cell = page.locator(".jp-Notebook .jp-CodeCell").nth(number)
    output = cell.locator(".jp-OutputArea-output", has_text="IN PYTHON")
    output.wait_for()
    heads, selection = output.inner_text().removeprefix("IN PYTHON").split("|")
    return heads.split(), selection


@pytest.mark.slow
def test_a_notebook_shows_edits_and_exports(tmp_path):
    notebook(tmp_path / "explore.ipynb", SETUP, PRINT, BUSY, PRINT + DARK)
    with (
        lab(tmp_path) as url,
        browser_page(f"{url}/lab/tree/explore.ipynb", viewport={"width": 1500, "height": 1200}) as (
            page,
            seen,
        ),
    ):
        await_kernel(page)
        run_cell(page, 0)
        widget = page.locator(".cl-explorer")
        widget.wait_for()
        seen["errors"].clear()

        cells = widget.locator('[role="gridcell"]')
        assert cells.count() == 16
        outside = widget.locator('[role="gridcell"]:not([aria-label*="in the circuit"])').first
        head = outside.get_attribute("aria-label").split(":")[0]
        outside.click()
        card = widget.locator(f'section[aria-label="head {head}"]')
        card.locator(".cl-matrix").wait_for()
        card.get_by_text("most promoted tokens").wait_for()
        card.get_by_text("Accuracy", exact=False).first.wait_for()
        assert "Relevance" in card.inner_text()
        assert "n = 8 held-out examples" in card.inner_text()

        card.get_by_role("button", name=f"add {head} to the circuit").click()
        widget.get_by_text("Circuit: 4 of 16 heads").wait_for()
        widget.locator(".cl-kept:not(.cl-stale)").wait_for()
        assert "f = " in widget.locator(".cl-kept").inner_text()

        # What the data says is text, wherever it stands.
        assert EVIL in widget.locator(".cl-text").inner_text()
        assert EVIL in widget.locator(".cl-head").inner_text()
        assert widget.locator("img").count() == 0

        # By keyboard: one head to the right or, at the edge, to the left; then out and in again.
        widget.locator('[role="grid"]').focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowLeft")
        before = widget.locator(".cl-circuit h4").inner_text()
        page.keyboard.press("Enter")
        page.wait_for_function(
            "before => document.querySelector('.cl-circuit h4').innerText !== before", arg=before
        )
        page.keyboard.press("Enter")
        widget.get_by_text(before).wait_for()

        widget.get_by_label("file to write").fill("mine.json")
        widget.get_by_role("button", name="save circuit").click()
        widget.get_by_text("Saved 4 heads to").wait_for()
        saved = json.loads((tmp_path / "mine.json").read_text())
        assert head in saved["heads"]

        run_cell(page, 1)
        heads, selection = printed(page, 1)
        assert heads == saved["heads"]
        assert "by hand in the explorer" in selection

        # While the kernel is busy every click counts, and the newest is answered.
        run_cell(page, 2)
        rest = [
            label.split(":")[0]
            for label in cells.evaluate_all("all => all.map(c => c.getAttribute('aria-label'))")
            if "in the circuit" not in label
        ]
        for name in rest[:3]:
            widget.locator(f'[id$="-{name}"]').click()
            page.keyboard.press("Enter")
        page.locator('.cl-explorer[aria-busy="true"]').wait_for()
        assert widget.locator(".cl-circuit h4").inner_text() == "Circuit: 7 of 16 heads"
        (tmp_path / "go-on").touch()
        card = widget.locator(f'section[aria-label="head {rest[2]}"]')
        card.locator(".cl-matrix").wait_for()
        widget.locator(".cl-kept:not(.cl-stale)").wait_for()
        assert widget.get_attribute("data-theme") == "light"
        run_cell(page, 3)
        heads, _ = printed(page, 3)
        assert heads == sorted([*saved["heads"], *rest[:3]])
        page.locator('.cl-explorer[data-theme="dark"]').wait_for()

        assert seen["errors"] == []
        assert seen["dialogs"] == []
        outward = [u for u in seen["requests"] if urlparse(u).hostname not in ("127.0.0.1", None)]
        assert outward == []
