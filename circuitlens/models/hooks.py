"""Hooks: functions of an activation, by the canonical name of the place where it passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

__all__ = ["Hook", "layer_of", "pattern_hook", "read_values", "recording", "then", "value_hook"]

Hook = Callable[[Tensor], Tensor | None]


def recording(names: Iterable[str]) -> tuple[dict[str, Hook], dict[str, Tensor]]:
    """Hooks that change nothing, and the store in which they put what passes, by name."""
    store: dict[str, Tensor] = {}

    def keep(name: str) -> Hook:
        def hook(activation: Tensor) -> None:
            store[name] = activation.detach()

        return hook

    return {name: keep(name) for name in names}, store


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


def pattern_hook(layer: int) -> str:
    """Canonical name of the attention pattern's hook."""
    return f"blocks.{layer}.attn.hook_pattern"


def value_hook(layer: int) -> str:
    """Canonical name of the hook at the heads' values."""
    return f"blocks.{layer}.attn.v.hook_out"


def read_values(
    pattern: Float[Tensor, "batch head query key"], v: Tensor, d_head: int
) -> Float[Tensor, "rows query head d_head"]:
    """What heads read, z = A·v.

    Args:
        pattern: attention weights.
        v: values of shape ``rows key …``; the rows are those of the pattern, once or several
            times over, and all value heads of a token are side by side or on an axis.
        d_head: size of a head.
    """
    batch, heads = pattern.shape[:2]
    v = v.reshape(-1, batch, v.shape[1], v.numel() // (v.shape[0] * v.shape[1] * d_head), d_head)
    # Grouped-query attention: each value head serves a run of query heads.
    v = v.repeat_interleave(heads // v.shape[3], dim=3)
    read = einsum(
        pattern.to(v),
        v,
        "batch head query key, copy batch key head d_head -> copy batch query head d_head",
    )
    return rearrange(read, "copy batch query head d_head -> (copy batch) query head d_head")
