"""A GPT-2 on pairs (relevant, irrelevant): each of its maps by its rule, layer by layer.

1. (a, c) = LN of the residual pair; Q, K and V each by LIN.
2. A is the pattern of the total scores, A_r that of the scores q_r·k_r alone;
   z_r = A_r v_r and z_i = A v − z_r.
3. Sources are set in z, then targets are recorded.
4. W_O by LIN on the heads' outputs side by side, added to the residual pair.
5. LN, LIN, CANCEL, ACT, LIN, CANCEL, added to the residual pair, CANCEL.

After the last layer LN and LIN with the unembedding (arXiv 2407.00886).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from circuitlens.cdt.pairs import Pair, activate, cancel, linear, norm, set_sources
from circuitlens.errors import UnsupportedModelError
from circuitlens.models.hooked import HookedModel
from circuitlens.nodes import Head

__all__ = ["PairedGPT2", "Site", "State"]

# A head and a position counted from the start, or None for all positions.
Site = tuple[Head, int | None]


@dataclass(frozen=True)
class State:
    """How far some rows have come.

    Attributes:
        layer: the layer to compute next.
        x: the residual stream entering it, ``row pos d_model``.
        z_targets: outputs of the targets below it, ``row target d_head``; 0 for the others.
    """

    layer: int
    x: Pair
    z_targets: Pair

    def repeat(self, times: int) -> State:
        """The rows ``times`` times over: row r of copy c is at ``c * rows + r``."""
        x, z_targets = (
            pair.map(lambda part: part.repeat(times, 1, 1)) for pair in (self.x, self.z_targets)
        )
        return State(self.layer, x, z_targets)


class PairedGPT2:
    """The maps of a GPT-2 under the rules, on the weights of the Hugging Face model.

    Attributes:
        n_layers, n_heads, d_head, d_vocab: sizes.
        device: of the model.
        dtype: type to compute in, that of the model but at least float32.

    Raises:
        UnsupportedModelError: if the model has other maps than those of a GPT-2.
    """

    def __init__(self, model: HookedModel) -> None:
        _check_supported(model.hf)
        geometry = model.geometry
        self.n_layers, self.n_heads = geometry.n_layers, geometry.n_heads
        self.d_head = geometry.d_head
        self.device = model.device
        self.dtype = torch.promote_types(model.dtype, torch.float32)
        self._config = model.hf.config
        self._decoder = cast(Any, model.hf).transformer
        self._lm_head = cast(Any, model.hf).lm_head
        self._activation = ACT2FN[model.hf.config.activation_function]
        self.d_vocab = int(self._lm_head.weight.shape[0])

    def zeros(self, *shape: int) -> Pair:
        """A pair of zeros, to write results into."""
        return Pair(
            torch.zeros(shape, dtype=self.dtype, device=self.device),
            torch.zeros(shape, dtype=self.dtype, device=self.device),
        )

    def start(self, tokens: Int[Tensor, "batch pos"], n_targets: int) -> State:
        """The state before layer 0: the embedding is irrelevant."""
        embedded = self._decoder.wte.weight[tokens].to(self.dtype)
        embedded = embedded + self._decoder.wpe.weight[: tokens.shape[1]].to(self.dtype)
        x = Pair(torch.zeros_like(embedded), embedded)
        return State(0, x, self.zeros(len(tokens), n_targets, self.d_head))

    def advance(
        self,
        state: State,
        to_layer: int,
        targets: Sequence[Site],
        sets: Sequence[Sequence[Site]] = (),
        means: Float[Tensor, "layer pos head d_head"] | None = None,
    ) -> State:
        """Compute the layers below ``to_layer``.

        Args:
            state: where to begin. Its rows are as many copies of the prompts as there are sets.
            to_layer: the first layer that is not computed.
            targets: whose z to record.
            sets: source sets, one per copy; without any nothing becomes relevant.
            means: needed with sets.
        """
        x, found = state.x, state.z_targets.map(torch.clone)
        for layer in range(state.layer, to_layer):
            z = self._attend(layer, x)
            if means is not None and any(h.layer == layer for s in sets for h, _ in s):
                z = set_sources(z, self._chosen(layer, sets, z), means[layer])
            for index, (head, position) in enumerate(targets):
                if head.layer == layer:
                    found.relevant[:, index] = z.relevant[:, position, head.index]
                    found.irrelevant[:, index] = z.irrelevant[:, position, head.index]
            x = self._finish(layer, x, z)
        return State(to_layer, x, found)

    def logits(self, x: Pair) -> Pair:
        """Logits at the last position, ``row d_vocab``."""
        # Norm and unembedding act on single positions, so the others need not be computed.
        last = x.map(lambda part: part[:, -1])
        return self._linear(self._norm(last, self._decoder.ln_f), self._lm_head)

    def _chosen(
        self, layer: int, sets: Sequence[Sequence[Site]], z: Pair
    ) -> Bool[Tensor, "row pos head"]:
        """Mask of the sources in a layer, ``row pos head``."""
        rows, n_pos, n_heads, _ = z.relevant.shape
        chosen = torch.zeros(len(sets), n_pos, n_heads, dtype=torch.bool)
        for mask, sites in zip(chosen, sets, strict=True):
            for head, position in sites:
                if head.layer == layer:
                    mask[slice(None) if position is None else position, head.index] = True
        return chosen.repeat_interleave(rows // len(sets), 0).to(self.device)

    def _attend(self, layer: int, x: Pair) -> Pair:
        """From the residual stream to the outputs z of the heads, ``row pos head d_head``."""
        block = self._decoder.h[layer]
        # Shares go by single outputs, so LIN of the fused projection is LIN of each of its parts.
        fused = self._linear(self._norm(x, block.ln_1), block.attn.c_attn)
        fused = fused.map(lambda part: part.unflatten(-1, (3, self.n_heads, self.d_head)))
        q, k, v = (fused.map(partial(torch.select, dim=-3, index=n)) for n in range(3))
        relevant = _mix(self._pattern(layer, q.relevant, k.relevant), v.relevant)
        return Pair(relevant, _mix(self._pattern(layer, q.total, k.total), v.total) - relevant)

    def _finish(self, layer: int, x: Pair, z: Pair) -> Pair:
        """From the outputs of the heads to the residual stream entering the next layer."""
        block = self._decoder.h[layer]
        middle = x + self._linear(z.map(lambda part: part.flatten(-2)), block.attn.c_proj)
        hidden = cancel(self._linear(self._norm(middle, block.ln_2), block.mlp.c_fc))
        written = cancel(self._linear(activate(hidden, self._activation), block.mlp.c_proj))
        return cancel(middle + written)

    def _pattern(
        self,
        layer: int,
        q: Float[Tensor, "row pos head d_head"],
        k: Float[Tensor, "row pos head d_head"],
    ) -> Float[Tensor, "row head pos pos"]:
        """Attention of every position to itself and those before it."""
        scale = 1 / math.sqrt(self.d_head) if self._config.scale_attn_weights else 1.0
        if self._config.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1
        # `reorder_and_upcast_attn` is about how the scores are rounded, so it does not matter here.
        scores = (
            einsum(q, k, "row query head d_head, row key head d_head -> row head query key") * scale
        )
        n_pos = scores.shape[-1]
        seen = torch.ones(n_pos, n_pos, dtype=torch.bool, device=scores.device).tril()
        return scores.masked_fill(~seen, -torch.inf).softmax(-1)

    def _norm(self, x: Pair, module: nn.LayerNorm) -> Pair:
        return norm(x, module.weight.to(self.dtype), module.bias.to(self.dtype), module.eps)

    def _linear(self, x: Pair, module: Conv1D | nn.Linear) -> Pair:
        # Conv1D keeps its weight as (in, out), Linear as (out, in).
        weight = module.weight if isinstance(module, Conv1D) else module.weight.T
        bias = None if module.bias is None else module.bias.to(self.dtype)
        return linear(x, weight.to(self.dtype), bias)


def _mix(
    pattern: Float[Tensor, "row head query key"], v: Float[Tensor, "row key head d_head"]
) -> Float[Tensor, "row query head d_head"]:
    return einsum(pattern, v, "row head query key, row key head d_head -> row query head d_head")


def _check_supported(hf: PreTrainedModel) -> None:
    """Reject a model that has maps for which there is no rule.

    Raises:
        UnsupportedModelError: naming the model or the layer.
    """
    needs = (
        "rules='hsu2024' needs a GPT2LMHeadModel with its own layers, because each of its maps "
        "(LayerNorm before attention and before an ungated MLP, learned positions) has a rule"
    )
    # A subclass may make something else of the same weights.
    if type(hf) is not GPT2LMHeadModel:
        raise UnsupportedModelError(
            f"{type(hf).__name__} cannot be decomposed by the published rules: {needs}; choose "
            "rules='cdt' (in cl.relevance method='cdt')."
        )
    kinds: dict[str, type[nn.Module]] = {
        "transformer.wte": nn.Embedding,
        "transformer.wpe": nn.Embedding,
        "transformer.ln_f": nn.LayerNorm,
        "lm_head": nn.Linear,
    }
    for block in (f"transformer.h.{layer}" for layer in range(hf.config.n_layer)):
        kinds |= {f"{block}.{part}": nn.LayerNorm for part in ("ln_1", "ln_2")}
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            kinds[f"{block}.{part}"] = Conv1D
    for name, kind in kinds.items():
        # The weight of an adapted or quantised layer is not the map that the layer applies.
        found = type(hf.get_submodule(name))
        if found is not kind:
            raise UnsupportedModelError(
                f"{name} of this GPT2LMHeadModel is a {found.__name__}, not a {kind.__name__}: "
                f"{needs}; merge adapters or dequantise first."
            )
