from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

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


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert f"\n{target}:" in makefile


@pytest.mark.parametrize("name", re.findall(r"\]\(((?!http)[^)#]+)", README))
def test_links_lead_to_files(name):
    assert (ROOT / name).exists()
