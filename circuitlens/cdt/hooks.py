"""Hooks put together."""

from __future__ import annotations

from torch import Tensor

from circuitlens.model import Hook

__all__ = ["layer_of", "then"]


def layer_of(hook: str) -> int:
    """Layer that a hook lies in; what lies behind the layers counts as above them all."""
    parts = hook.split(".")
    return int(parts[1]) if parts[0] == "blocks" else 1 << 30


def then(hooks: dict[str, Hook], name: str, second: Hook) -> None:
    """Add ``second`` to ``hooks`` under ``name``, to run on what is there already returns."""
    first = hooks.get(name)
    if first is None:
        hooks[name] = second
        return
    before = first

    def both(activation: Tensor) -> Tensor | None:
        changed = before(activation)
        again = second(activation if changed is None else changed)
        return changed if again is None else again

    hooks[name] = both
