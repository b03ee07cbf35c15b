"""Figures and the report. Results go in; no model is needed to draw.

The public names are in ``__init__.pyi`` and are imported when they are first used, so that listing
them shows figures and no modules.
"""

import importlib as _importlib
from typing import Any as _Any

import lazy_loader as _lazy

_figure, _, _figures = _lazy.attach_stub(__name__, __file__)
__all__ = sorted([*_figures, "explore"])


def __dir__() -> list[str]:
    return list(__all__)


def __getattr__(name: str) -> _Any:
    if name == "explore":
        # The explorer runs models and draws with this package: a cycle, if it were imported here.
        return _importlib.import_module("circuitlens.explorer").explore
    return _figure(name)
