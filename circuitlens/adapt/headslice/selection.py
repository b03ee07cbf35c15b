"""From a configuration to the modules that get leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from circuitlens.adapt.headslice.config import HeadSliceConfig
from circuitlens.adapt.headslice.geometry import Anatomy, anatomy_of
from circuitlens.errors import InputError, UnsupportedModelError
from circuitlens.models.geometry import HeadGeometry, WeightSlice
from circuitlens.nodes import Head

__all__ = ["Target", "selected_norms", "selected_slices", "targets_of"]


@dataclass(frozen=True)
class Target:
    """What is trained of one module.

    Attributes:
        kind: ``"rows"`` of q, k and v (output features of the map), ``"columns"`` of o (input
            features), what goes into o (``"outputs"`` of heads), or all of a ``"norm"``.
        index: the features, sorted; empty for a norm.
        bias: whether the bias is trained as well; of outputs, whether a vector is added.
        heads: of outputs, how many heads the features belong to; else 0.
        scale: of outputs, whether a factor is trained.
    """

    kind: Literal["rows", "columns", "outputs", "norm"]
    index: tuple[int, ...]
    bias: bool
    heads: int = 0
    scale: bool = False


def selected_slices(geometry: HeadGeometry, config: HeadSliceConfig) -> tuple[WeightSlice, ...]:
    """Weight and bias slices that ``config`` trains, each once.

    With :func:`circuitlens.models.geometry.selection_masks` they give the masks for gradient
    masking on full weights, the reference for the adapter.

    Raises:
        InputError: for a head that the model does not have.
    """
    chosen = set(config.chosen)
    slices = (
        piece
        for head in sorted(chosen)
        for piece in geometry.slices(head)
        if piece.projection in config.projections
        if config.biases or not piece.parameter.endswith(".bias")
        if piece.projection in ("q", "o") or _trains_kv(geometry, config, head, chosen)
    )
    return tuple(dict.fromkeys(slices))


def _trains_kv(
    geometry: HeadGeometry, config: HeadSliceConfig, head: Head, chosen: set[Head]
) -> bool:
    """Whether the key/value head of ``head``, which is chosen, is trained."""
    if config.kv_policy == "group":
        size = geometry.n_heads // geometry.n_kv_heads
        first = geometry.kv_index(head) * size
        return all(Head(head.layer, first + i) in chosen for i in range(size))
    return config.kv_policy == "shared"


def selected_norms(anatomy: Anatomy, config: HeadSliceConfig) -> tuple[str, ...]:
    """Names of the parameters of norms that ``config`` trains."""
    names = anatomy.norms + (anatomy.qk_norms if config.qk_norms else ())
    if config.norms == "all":
        return names
    if config.norms == "none":
        return ()
    layers = {head.layer for head in config.chosen}
    # What is in no layer is the final norm, that of the head, or one of the embedding.
    return tuple(
        name
        for name in names
        if (layer := anatomy.layer_of(name)) in layers or (layer is None and "embed" not in name)
    )


def targets_of(hf: nn.Module, config: HeadSliceConfig) -> dict[str, Target]:
    """What ``config`` trains of the modules of a model, by module path.

    Raises:
        InputError: for a head that the model does not have, or if nothing is selected.
        UnsupportedModelError: if heads cannot be told apart, or a norm has other parameters than
            weight and bias.
    """
    anatomy = anatomy_of(hf)
    pieces: dict[str, list[WeightSlice]] = {}
    for piece in selected_slices(anatomy.geometry, config):
        pieces.setdefault(piece.parameter.rpartition(".")[0], []).append(piece)
    targets = {path: _target(found) for path, found in pieces.items()}
    targets |= _outputs(anatomy.geometry, config)
    parameters: dict[str, set[str]] = {}
    for name in selected_norms(anatomy, config):
        path, _, parameter = name.rpartition(".")
        parameters.setdefault(path, set()).add(parameter)
    for path, found in parameters.items():
        if "weight" not in found or not found <= {"weight", "bias"}:
            raise UnsupportedModelError(
                f"The norm {path} has the parameters {', '.join(sorted(found))} where a weight and "
                'perhaps a bias were expected: choose norms="none".'
            )
        targets[path] = Target("norm", (), "bias" in found)
    if not targets:
        raise InputError(
            f"With heads={config.heads}, projections={config.projections}, "
            f"kv_policy={config.kv_policy!r} and norms={config.norms!r} the adapter has nothing to "
            "train: choose more."
        )
    return targets


def _target(pieces: Sequence[WeightSlice]) -> Target:
    """The slices of one module as one target."""
    index = {i for piece in pieces for i in range(piece.start, piece.stop)}
    # No module holds rows of q, k or v and columns of o at once.
    kind: Literal["rows", "columns"] = "columns" if pieces[0].projection == "o" else "rows"
    bias = any(piece.parameter.endswith(".bias") for piece in pieces)
    return Target(kind, tuple(sorted(index)), bias)


def _outputs(geometry: HeadGeometry, config: HeadSliceConfig) -> dict[str, Target]:
    """What is trained of the outputs of heads, by the path of the o that reads them."""
    columns: dict[str, list[WeightSlice]] = {}
    for head in config.chosen if config.outputs else ():
        for piece in geometry.slices(head):
            if piece.projection == "o":
                columns.setdefault(piece.parameter.rpartition(".")[0], []).append(piece)
    return {
        path: Target(
            "outputs",
            # Head by head, so that features are next to those of their head.
            tuple(i for piece in found for i in range(piece.start, piece.stop)),
            "offset" in config.outputs,
            heads=len(found),
            scale="scale" in config.outputs,
        )
        for path, found in columns.items()
    }
