from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers import run_command

import circuitlens as cl
from circuitlens.tasks import toy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.docs
def test_the_python_examples_run_as_they_stand(tmp_path, monkeypatch, toy_proxy):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)

    def finetune(model, task, **options):
        # A smaller one that a fixture has trained: that saves a minute.
        assert (model.fingerprint(), task.language) == (toy.toy_model().fingerprint(), "source")
        assert options == toy.TOY_FINETUNE
        return toy_proxy.clone()

    monkeypatch.setattr(cl, "finetune", finetune)
    gains = []
    for block in blocks:
        names: dict[str, object] = {}
        exec(compile(block, "README.md", "exec"), names)
        if "result" in names:
            gains.append(names["result"].target_gain)  # type: ignore[attr-defined]
    assert gains
    assert min(gains) > 0
    assert (tmp_path / "javanese" / "adapter_config.json").is_file()
    assert (tmp_path / "heads.html").stat().st_size > 10_000


def test_the_commands_name_options_that_exist():
    from typer.main import get_command

    from circuitlens.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    found = 0
    for block in re.findall(r"```sh\n(.*?)```", README, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if len(words) < 2 or not words[0].endswith("circuitlens"):
                continue
            known = {o for p in commands[words[1]].params for o in p.opts}
            assert {w for w in words if w.startswith("--")} <= known, line
            found += 1
    assert found >= 2


@pytest.mark.docs
def test_the_commands_run_in_their_order(tmp_path, monkeypatch, toy_proxy):
    """Those of the first block, on the toy languages and little of everything."""

    toy_proxy.save(tmp_path / "my-model")
    (tmp_path / "new.csv").write_text("text\nbada gu\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    stands_for = {"nusax": "toy", "indonesian": "source", "javanese": "near", "sundanese": "far"}
    little = {
        "run": "--max-examples 20 --n-random 1 --epochs 1 --rate 1e-3 --strategy norms",
        "discover": "--max-examples 4",
    }
    block = next(b for b in re.findall(r"```sh\n(.*?)```", README, re.S) if "circuitlens run" in b)
    done = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words.pop(0) == "circuitlens"
        done.append(run_command(words, stands_for, little)[0])
    # What is shown later must not be lost by what comes after it.
    assert done == ["run", "discover", "faithfulness", "transfer", "compare", "report", "predict"]
    assert (tmp_path / "runs/ind-jav/transfers/far/circuit/result.json").is_file()
    assert (tmp_path / "runs/ind-jav/compare/comparison.json").is_file()
    assert "label" in (tmp_path / "labelled.csv").read_text()


@pytest.mark.docs
def test_the_comparison_runs_as_it_stands(tmp_path, monkeypatch, toy_proxy, toy_task, toy_scores):
    (call,) = re.findall(r"`(cl\.compare\(.*?\))`", README.replace("\n", " "))
    monkeypatch.chdir(tmp_path)
    names = {"cl": cl, "model": toy_proxy, "circuit": toy_scores.top(2), "task": toy_task}
    small = "epochs=1, learning_rates=[1e-3], quiet=True)"
    comparison = eval(call.replace("seeds=(0, 1, 2)", "seeds=(0,)")[:-1] + ", " + small, names)
    assert not comparison.errors
    assert (tmp_path / "grid" / "summary.csv").is_file()


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert f"\n{target}:" in makefile


@pytest.mark.parametrize("name", re.findall(r"\]\(((?!http)[^)#]+)", README))
def test_links_lead_to_files(name):
    assert (ROOT / name).exists()
