"""The house: who may import whom, how long a file may be, and how it may be called."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import circuitlens as cl
from circuitlens import adapt

ROOT = Path(cl.__file__).parent
# A reader should hold a file in his head.
LONGEST = 450


def modules(root: Path) -> dict[str, Path]:
    """Modules of a package by dotted name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules that a file imports anywhere in it, also in functions and for types only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively"
            # A name of a package may be a module of it.
            wanted = [f"{node.module}.{a.name}" for a in node.names]
            wanted = [w if w in known else str(node.module) for w in wanted]
        else:
            continue
        yield from (w for w in wanted if w in known and w != name)


def graph(root: Path) -> dict[str, set[str]]:
    known = modules(root)
    return {name: set(imports(name, path, known)) for name, path in known.items()}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The nodes of a circle, in order; empty if there is none."""
    done: set[str] = set()

    def walk(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node not in done:
            for other in sorted(edges[node]):
                if found := walk(other, [*trail, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(edges) if (found := walk(node, []))), [])


def houses(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same of folders: the part of the name behind the package's."""

    def house(name: str) -> str:
        return ".".join(name.split(".")[:2])

    found: dict[str, set[str]] = {}
    for name, others in edges.items():
        mine = found.setdefault(house(name), set())
        mine |= {house(other) for other in others} - {house(name)}
    # The names of the whole package are imported when they are used.
    return {name: others - {"circuitlens"} for name, others in found.items()}


EDGES = graph(ROOT)


def test_a_circle_would_be_found(tmp_path):
    package = tmp_path / "p"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.py").write_text("from p.b import x\n")
    (package / "b.py").write_text("def f():\n    import p.c\n")
    (package / "c.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import a\n"
    )
    assert circle(graph(package)) == ["p.a", "p.b", "p.c", "p.a"]


def test_no_module_imports_itself_by_way_of_others():
    assert sum(map(len, EDGES.values())) > 300
    assert not circle(EDGES), " → ".join(circle(EDGES))


def test_no_folder_does():
    assert not circle(houses(EDGES)), " → ".join(circle(houses(EDGES)))


def test_figures_know_no_model():
    """They draw results; what runs a model is in other houses."""
    models = {
        (name, other)
        for name, others in EDGES.items()
        if name.startswith("circuitlens.view")
        for other in others
        if other.startswith(("circuitlens.models", "circuitlens.cdt", "circuitlens.explorer"))
    }
    assert not models


def test_only_what_puts_everything_together_draws():
    users = {
        name
        for name, others in EDGES.items()
        if any(other.startswith("circuitlens.view") for other in others)
        and not name.startswith("circuitlens.view")
    }
    allowed = ("circuitlens.run_output", "circuitlens.cli", "circuitlens.explorer")
    assert {name for name in users if not name.startswith(allowed)} == set()


def test_the_ground_floor_knows_nobody():
    assert not EDGES["circuitlens.errors"]


@pytest.mark.parametrize("name", sorted(EDGES))
def test_files_can_be_read_at_once(name):
    assert len(modules(ROOT)[name].read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_no_module_has_the_name_of_a_public_function():
    """Else ``from circuitlens.x import name`` gives a module or a function, as the day may be."""
    public = {*cl.__all__, *cl.view.__all__}
    public |= {*adapt.__all__, *cl.tasks.__all__} - {"toy"}
    packages = {"tasks", "view"}
    assert not {name for name in EDGES if name.rsplit(".", 1)[-1] in public - packages}


def test_public_names_are_listed_and_nothing_else():
    assert set(dir(cl.view)) == set(cl.view.__all__)
    for module in (cl, cl.view):
        assert all(hasattr(module, name) for name in module.__all__)
