"""The experts of a layer with hooks inside.

Hugging Face keeps the experts of a layer in two three-dimensional parameters and computes them in
one function without modules that could be hooked. :class:`HookedExperts` computes the same from
the same parameters. Tokens are those of the whole batch in one row, row after row of the batch,
and each is seen once for every expert chosen for it:

    hook_index     token k         which experts; a hook may return others
    hook_weights   token k         how much of each
    gate.hook_out  token k d_mlp   what the activation function is applied to
    in.hook_out    token k d_mlp   what its output is multiplied by
    out.hook_in    token k d_mlp   the product
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

__all__ = ["HookedExperts"]


class HookedExperts(GeneralizedComponent):  # type: ignore[misc]
    """TransformerLens component round the experts of a layer; layers without are left alone."""

    def __init__(self) -> None:
        super().__init__("experts", optional=True)
        self.hook_index = HookPoint()
        self.hook_weights = HookPoint()
        for part, hook in (("gate", "hook_out"), ("in", "hook_out"), ("out", "hook_in")):
            self.add_module(part, nn.ModuleDict({hook: HookPoint()}))

    def forward(
        self,
        hidden_states: Float[Tensor, "token d_model"],
        top_k_index: Int[Tensor, "token k"],
        top_k_weights: Float[Tensor, "token k"],
    ) -> Float[Tensor, "token d_model"]:
        """Sum the outputs of the chosen experts."""
        experts: Any = self.original_component
        x = self.hook_in(hidden_states)
        index, weights = self.hook_index(top_k_index), self.hook_weights(top_k_weights)
        once_each = x[:, None].expand(-1, index.shape[1], -1)
        gate, up = _by_expert(once_each, experts.gate_up_proj, index).chunk(2, -1)
        gate, up = self.gate.hook_out(gate), getattr(self, "in").hook_out(up)
        post = self.out.hook_in(experts.act_fn(gate) * up)
        output = _by_expert(post, experts.down_proj, index) * weights[..., None]
        return cast(Tensor, self.hook_out(output.to(x.dtype).sum(1)))


def _by_expert(
    x: Float[Tensor, "token k d_in"],
    weight: Float[Tensor, "expert d_out d_in"],
    index: Int[Tensor, "token k"],
) -> Float[Tensor, "token k d_out"]:
    """Apply the maps of the chosen experts, those of one expert together."""
    chosen = index.flatten()
    order = chosen.argsort(stable=True)
    sizes = chosen.bincount(minlength=len(weight)).tolist()
    sorted_x = x[order // index.shape[1], order % index.shape[1]]
    found = [F.linear(rows, weight[e]) for e, rows in enumerate(sorted_x.split(sizes)) if len(rows)]
    pairs = torch.cat(found)[order.argsort()]
    return pairs.reshape(*index.shape, -1)
