"""Names in the registries, read from their source without importing it.

Importing a registry imports torch, which takes seconds; help, completion and the check of an
argument should not wait for that. A test compares these names with those of the registries.
"""

from __future__ import annotations

import ast
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

from circuitlens.errors import InputError

__all__ = ["check_task", "choices", "constant", "data_sets", "scorers", "strategies"]

_PACKAGE = Path(__file__).parent


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse((_PACKAGE / module).read_text(encoding="utf-8"))


def _entries(module: str, *makers: str) -> dict[str, str]:
    """Names and descriptions in the calls of functions that make entries of a registry."""
    found: dict[str, str] = {}
    for node in ast.walk(_tree(module)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        if node.func.id not in makers:
            continue
        given = dict(zip(("name", "description"), node.args, strict=False))
        given |= {k.arg: k.value for k in node.keywords if k.arg in ("name", "description")}
        values = {k: v.value for k, v in given.items() if isinstance(v, ast.Constant)}
        # What makes entries in a loop or a function has no constant for a name.
        if isinstance(values.get("name"), str):
            found[str(values["name"])] = str(values.get("description", ""))
    return found


def scorers() -> dict[str, str]:
    """Names and descriptions of the scorers."""
    return _entries("scoring/scorers.py", "Scorer", "_rule_scorer")


def strategies() -> dict[str, str]:
    """Names and descriptions of the strategies, ``auto`` among them."""
    known = _entries("adapt/strategies.py", "Strategy")
    return known | {"auto": "tries circuit, near-zero, lora-norms, full; chooses on validation"}


def data_sets() -> dict[str, str]:
    """Names and descriptions of the data sets, in alphabetical order."""
    found: dict[str, str] = {}
    for path in sorted((_PACKAGE / "tasks" / "sources").glob("*.py")):
        found |= _entries(f"tasks/sources/{path.name}", "DataSet")
    return dict(sorted(found.items()))


def check_task(name: str, known: Collection[str]) -> None:
    """Reject the name of a task that is neither a known data set nor looks like a data file.

    Raises:
        InputError: naming the known ones.
    """
    if name in known or Path(name).suffix or "{language}" in name or Path(name).is_dir():
        return
    raise InputError(
        f"There is no task {name!r}; use {', '.join(known)}, or the path of a data file."
    )


def choices(module: str, name: str) -> tuple[str, ...]:
    """The strings of a ``Literal`` or a tuple that a module assigns to ``name``."""
    return tuple(constant(module, name))


def constant(module: str, name: str) -> Any:
    """What a module assigns to ``name``, written out in its source."""
    for node in _tree(module).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if name in map(ast.unparse, targets):
            value = node.value.slice if isinstance(node.value, ast.Subscript) else node.value
            return ast.literal_eval(ast.unparse(value))
    raise LookupError(f"{module} assigns nothing to {name}.")
