"""Which rows and columns of which Hugging Face weights a head owns.

A head reads the residual stream through its rows of W_Q, W_K and W_V and writes to it through
its columns of W_O. Checkpoints store these in a few layouts:

* separate ``q_proj``/``k_proj``/``v_proj``/``o_proj`` (Llama, Mistral, Qwen, Gemma, OPT, …; BERT
  under other names);
* fused and concatenated, all queries, then all keys, then all values (Phi-3; GPT-2 with the
  transposed ``Conv1D``);
* fused and interleaved by key/value head: its queries, its key, its value, then those of the next
  (Falcon; GPT-NeoX and BLOOM, where every head is its own group).

One :class:`WeightSlice` describes any of them as a range on one axis of one named parameter.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from circuitlens.errors import InputError, UnsupportedModelError
from circuitlens.nodes import Head

__all__ = ["HeadGeometry", "Projection", "WeightSlice", "made_by", "norm_parameters"]

Projection = Literal["q", "k", "v", "o"]

# Norms of queries and keys belong to attention patterns, not to the residual stream.
_QK_NORMS = {"q_norm", "k_norm", "q_layernorm", "k_layernorm"}
# Names of projections within attention modules; those with a dot are BERT's.
_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("self.query", "self.key", "self.value"),
    ("q_lin", "k_lin", "v_lin"),
)
_JOINT = ("c_attn", "qkv_proj", "Wqkv", "query_key_value")
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "output.dense", "out_lin", "Wo")


@dataclass(frozen=True)
class WeightSlice:
    """The range ``start:stop`` on axis ``dim`` of the parameter named ``parameter``."""

    parameter: str
    projection: Projection
    dim: int
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of this slice in ``tensor`` (the parameter, its gradient, a mask)."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True)
class _Projection:
    """A projection's place in a fused or separate weight: where each of its heads starts."""

    module: str
    transposed: bool
    starts: tuple[int, ...]


class HeadGeometry:
    """Sizes of the attention heads of a model and the weights that belong to each.

    Attributes:
        n_layers, n_heads, n_kv_heads: counts; ``n_heads`` are query heads per layer.
        d_head, d_model: sizes.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        attention_modules: list[str],
        *,
        n_heads: int,
        n_kv_heads: int,
        d_head: int,
        d_model: int,
    ) -> None:
        self.n_layers = len(attention_modules)
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.d_head = d_head
        self.d_model = d_model
        self._shapes = {name: tuple(p.shape) for name, p in hf.named_parameters()}
        self._projections = [self._locate(hf, name) for name in attention_modules]

    def __iter__(self) -> Iterator[Head]:
        for layer in range(self.n_layers):
            for index in range(self.n_heads):
                yield Head(layer, index)

    def __len__(self) -> int:
        return self.n_layers * self.n_heads

    def check(self, head: Head) -> Head:
        """Return ``head`` if the model has it.

        Raises:
            InputError: naming the head and the model's size otherwise.
        """
        if 0 <= head.layer < self.n_layers and 0 <= head.index < self.n_heads:
            return head
        raise InputError(
            f"The model has no head {head}: it has {self.n_layers} layers of {self.n_heads} heads."
        )

    def kv_index(self, head: Head) -> int:
        """Index of the key/value head that the query head uses (grouped-query attention)."""
        return head.index // (self.n_heads // self.n_kv_heads)

    def slices(self, head: Head) -> tuple[WeightSlice, ...]:
        """Weight and bias slices of a head: rows of q, k, v and columns of W_O.

        Under grouped-query attention the key/value slices are those of the shared key/value
        head, so two query heads of one group return the same ones. b_O belongs to no head.
        """
        self.check(head)
        found: list[WeightSlice] = []
        for kind, place in self._projections[head.layer].items():
            index = self.kv_index(head) if kind in ("k", "v") else head.index
            start = place.starts[index]
            # Linear weights are (out, in): q, k, v own output rows and o owns input columns.
            # Conv1D weights are (in, out), which swaps the axes.
            dim = (1 if kind == "o" else 0) ^ int(place.transposed)
            names = [(f"{place.module}.weight", dim)]
            if kind != "o" and f"{place.module}.bias" in self._shapes:
                names.append((f"{place.module}.bias", 0))
            found += [WeightSlice(n, kind, d, start, start + self.d_head) for n, d in names]
        return tuple(found)

    def rows(self, layer: int, kind: Projection) -> tuple[str, Tensor]:
        """The module that holds a projection, and its output rows, head after head."""
        place = self._projections[layer][kind]
        rows = torch.tensor(place.starts)[:, None] + torch.arange(self.d_head)
        return place.module, rows.flatten()

    def output_weight(self, hf: PreTrainedModel, head: Head) -> Tensor:
        """W_O of one head, shape ``d_head d_model`` (a view of the model's weight)."""
        (piece,) = (s for s in self.slices(head) if s.projection == "o")
        view = piece.of(hf.get_parameter(piece.parameter))
        return view.T if piece.dim == 1 else view

    def _locate(self, hf: PreTrainedModel, name: str) -> dict[Projection, _Projection]:
        """Find the projections of the attention module ``name``."""
        attention = hf.get_submodule(name)
        layout = self._layout({path for path, _ in attention.named_modules()})
        if layout is None:
            parts = sorted(child for child, _ in attention.named_children())
            raise UnsupportedModelError(
                f"The attention module {name} of {type(hf).__name__} has the parts {parts}, a "
                "weight layout in which circuitlens cannot tell the heads apart; supported are "
                "separate q/k/v/o, and the fused layouts of GPT-2, Phi-3, GPT-NeoX and Falcon."
            )
        places: dict[Projection, _Projection] = {}
        for kind, (part, starts) in layout.items():
            module = attention.get_submodule(part)
            if not isinstance(module, nn.Linear | Conv1D):
                _refuse(module, f"{name}.{part} of {type(hf).__name__}")
            places[kind] = _Projection(
                f"{name}.{part}", isinstance(module, Conv1D), tuple(s * self.d_head for s in starts)
            )
        q_width, kv_width = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        self._check_widths(places, q_width, kv_width)
        return places

    def _layout(self, parts: Container[str]) -> dict[Projection, tuple[str, Iterable[int]]] | None:
        """Module of each projection and where its heads start in it, in heads."""
        q, kv = range(self.n_heads), range(self.n_kv_heads)
        output = next((name for name in _OUTPUTS if name in parts), None)
        if output is None:
            return None
        for wq, wk, wv in _SEPARATE:
            if wq in parts and wk in parts and wv in parts:
                return {"q": (wq, q), "k": (wk, kv), "v": (wv, kv), "o": (output, q)}
        joint = next((name for name in _JOINT if name in parts), None)
        if joint is None:
            return None
        if joint != "query_key_value":
            keys, values = self.n_heads, self.n_heads + self.n_kv_heads
            return {
                "q": (joint, q),
                "k": (joint, [keys + i for i in kv]),
                "v": (joint, [values + i for i in kv]),
                "o": (output, q),
            }
        # Each key/value head is preceded by the queries that use it.
        group = self.n_heads // self.n_kv_heads
        return {
            "q": (joint, [i + 2 * (i // group) for i in q]),
            "k": (joint, [i * (group + 2) + group for i in kv]),
            "v": (joint, [i * (group + 2) + group + 1 for i in kv]),
            "o": (output, q),
        }

    def _check_widths(
        self, places: dict[Projection, _Projection], q_width: int, kv_width: int
    ) -> None:
        """Reject layers whose weights do not have the sizes that the configuration says."""
        fused = places["q"].module == places["k"].module
        width = {"q": q_width, "k": kv_width, "v": kv_width, "o": q_width}
        for kind, place in places.items():
            axis = (1 if kind == "o" else 0) ^ int(place.transposed)
            found = self._shapes[f"{place.module}.weight"][axis]
            expected = q_width + 2 * kv_width if fused and kind != "o" else width[kind]
            if found != expected:
                raise UnsupportedModelError(
                    f"{place.module} has {found} entries where {expected} were expected from "
                    f"{self.n_heads} heads of size {self.d_head}, so heads cannot be told apart."
                )


def _refuse(module: nn.Module, where: str) -> NoReturn:
    """Reject a projection that is not a plain linear map."""
    if made_by(module, "peft"):
        raise UnsupportedModelError(
            f"{where} is a layer of a PEFT adapter, whose rows do not belong to single heads: "
            "merge the adapter first (merge_and_unload() of the PeftModel)."
        )
    kind = type(module)
    # The name alone may be that of a plain one, as in many libraries of quantisation.
    raise UnsupportedModelError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}, not a plain linear map, so its rows "
        "do not belong to single heads: load the model without quantisation."
    )


def made_by(thing: object, library: str) -> bool:
    """Whether the class of ``thing``, or one that it derives from, is of that library.

    Looked up by name, because an import takes seconds, and most models need none.
    """
    return any(kind.__module__.split(".")[0] == library for kind in type(thing).__mro__)


def norm_parameters(hf: nn.Module) -> list[str]:
    """Names of the parameters of all norms on the residual stream (not of q/k norms)."""
    names: list[str] = []
    for path, module in hf.named_modules():
        is_norm = isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower()
        if is_norm and path.rsplit(".", 1)[-1] not in _QK_NORMS:
            names += [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
    return names


@torch.no_grad()
def selection_masks(
    hf: PreTrainedModel, slices: list[WeightSlice], whole: list[str]
) -> dict[str, Tensor]:
    """Boolean masks, by parameter name, of the union of ``slices`` and ``whole`` parameters."""
    parameters = dict(hf.named_parameters())
    masks: dict[str, Tensor] = {}
    for piece in slices:
        parameter = parameters[piece.parameter]
        mask = masks.setdefault(piece.parameter, torch.zeros_like(parameter, dtype=torch.bool))
        piece.of(mask).fill_(True)
    for name in whole:
        masks[name] = torch.ones_like(parameters[name], dtype=torch.bool)
    return masks
