"""What the repository holds, and what the package says that it needs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Binaries that may be larger than 500 kB; there are none.
LARGE: set[str] = set()


def tracked() -> list[Path]:
    found = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if found.returncode:
        pytest.skip("this is no git checkout")
    return [ROOT / name for name in found.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_large_binaries():
    large = {
        str(path.relative_to(ROOT))
        for path in tracked()
        if path.stat().st_size > 500_000 and b"\0" in path.read_bytes()[:8000]
    }
    assert large <= LARGE


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_is_imported_is_declared_and_the_other_way_round():
    imported: set[str] = set()
    for path in (ROOT / "circuitlens").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    imported -= {"circuitlens", *sys.stdlib_module_names}
    homes = packages_distributions()
    needed = {normal(homes[name][0]) for name in imported}
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    declared = {normal(re.split(r"[\[<>=!~ ]", line)[0]) for line in PROJECT["dependencies"]}
    optional = {normal(re.split(r"[\[<>=!~ ]", line)[0]) for line in extras}
    assert needed <= declared | optional
    assert needed & optional - declared <= {
        *("anywidget", "traitlets", "kaleido", "pillow", "ray", "soundfile"),
    }
    assert declared <= needed


@pytest.mark.parametrize("name", ["peft", "kaleido", "plotly", "datasets", "accelerate"])
def test_what_breaks_easily_is_capped(name):
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["figures"]]
    (line,) = [line for line in lines if re.match(rf"{name}\W", line)]
    assert "<" in line


def test_papers_are_cited_by_their_authors():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    for reference in cited["references"]:
        assert all("family-names" in author for author in reference["authors"])


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "circuitlens = circuitlens.cli:main" in archive.read(entry).decode()
    package = {
        str(p.relative_to(ROOT)) for p in tracked() if p.is_relative_to(ROOT / "circuitlens")
    }
    assert names == package


def test_the_package_is_found_from_the_folder_above_a_clone():
    """An editable install is a path: a folder of the same name is not taken for the package."""
    code = "import circuitlens; print(circuitlens.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()) == ROOT / "circuitlens" / "__init__.py"


def test_the_version_is_one_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(PROJECT['version'])} ", changes, re.M)


def test_hosted_checks_call_what_there_is():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, re.M))
    called: set[str] = set()
    for path in sorted((ROOT / ".github").rglob("*.yml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for job in content.get("jobs", {}).values():
            for step in job["steps"]:
                called |= set(re.findall(r"\bmake (\w+)", step.get("run", "")))
    assert {"lint", "test", "slow", "docs"} <= called <= targets
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {hook["id"] for repo in config["repos"] for hook in repo["hooks"]} >= {"ruff-check"}
