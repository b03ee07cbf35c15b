"""Docstrings are written for ``help()``; this makes them fit for the site.

* Roles such as ``:func:`circuitlens.transfer``` become links where the site has the target.
* Arguments that are described together, ``n_layers, n_heads: counts``, become a row each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from griffe import Extension, Module, Object

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):`~?([\w.]+)`")
_GROUP = re.compile(r"^( +)((?:\w+, )+\w+): (.*(?:\n\1 +\S.*)*)", re.M)
_SECTION = re.compile(r"^(?:Args|Attributes):\n(?:(?: +.*)?\n?)*", re.M)


class ForTheSite(Extension):
    """Rewrites docstrings before they are parsed."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Rewrite all docstrings of a package."""
        if pkg.name != "circuitlens":
            return
        for thing in _within(pkg):
            if thing.docstring is not None:
                text = _SECTION.sub(_one_by_one, thing.docstring.value)
                thing.docstring.value = _ROLE.sub(_Link(thing), text)


def _within(thing: Object) -> Iterator[Object]:
    yield thing
    for member in thing.members.values():
        if not member.is_alias:
            yield from _within(member)


def _one_by_one(section: re.Match[str]) -> str:
    def split(match: re.Match[str]) -> str:
        indent, names, text = match.groups()
        return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))

    return _GROUP.sub(split, section[0])


class _Link:
    """Makes links of what the docstring of one object names."""

    def __init__(self, thing: Object) -> None:
        self.thing = thing

    def __call__(self, role: re.Match[str]) -> str:
        name = role[1]
        target = name if name.startswith("circuitlens") else self._find(name)
        # Public names are shown as they are imported.
        shown = name.replace("circuitlens", "cl", 1) if target.count(".") == 1 else name
        return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'

    def _find(self, name: str) -> str:
        """What a name means where it stands: in the object, or in what that stands in."""
        home: Object | None = self.thing
        while home is not None and name.split(".")[0] not in home.members:
            home = home.parent
        return name if home is None else f"{home.path}.{name}"
