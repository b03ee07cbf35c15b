"""Constants that ablated heads are set to, learned: the least harm that ablation can do.

Means are one choice of a constant, and what a head is replaced by can itself do harm. Li and
Janson (2024, arXiv 2409.09951) replace it by the constant at which the model loses least. Theirs
are learned for each circuit; here one constant per head serves all circuits, as a baseline has to:

1. Begin at the label-balanced means.
2. In every step, each example of a batch draws a share between 0 and 1 and keeps each head with
   that probability; all others are at their constants.
3. The loss is the divergence KL(whole model ‖ circuit) over the labels; Adam changes the constants.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div

from circuitlens.models.batch import Positions
from circuitlens.models.freezing import gradients
from circuitlens.models.hooked import HookedModel
from circuitlens.models.hooks import Hook
from circuitlens.tasks import Encoded
from circuitlens.utils.progress import progress

__all__ = ["optimal_constants"]

_EPOCHS = 10
_BATCH = 16
_RATE = 0.02


@torch.enable_grad()
def optimal_constants(
    model: HookedModel,
    encoded: Encoded,
    start: Float[Tensor, "layer head d_head"],
    positions: Positions,
    *,
    epochs: int = _EPOCHS,
    seed: int = 0,
    quiet: bool = False,
) -> Float[Tensor, "layer head d_head"]:
    """Learn the constant of every head (module docstring).

    Args:
        model: is left as it is.
        encoded: the examples to learn on.
        start: where the constants begin.
        positions: where heads are ablated.
        epochs: passes over the examples.
        seed: of the circuits drawn.
        quiet: no progress bar.
    """
    g = model.geometry
    generator = torch.Generator().manual_seed(seed)
    # Steps of Adam have the size of the rate: in units of how large each head's output is.
    scale = start.norm(dim=-1, keepdim=True).clamp(min=1e-6).to(model.device) / g.d_head**0.5
    change = torch.zeros_like(start, device=model.device, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=_RATE)
    batches = list(encoded.batches(_BATCH, model.device))
    with gradients(model.hf, wanted=False):
        for _ in progress(range(epochs), "Optimal constants", quiet=quiet):
            for k in torch.randperm(len(batches), generator=generator).tolist():
                _, batch = batches[k]
                with torch.no_grad():
                    whole = model.label_logits(batch).log_softmax(-1)
                share = torch.rand(len(batch), 1, 1, generator=generator)
                kept = torch.rand(len(batch), g.n_layers, g.n_heads, generator=generator) < share
                of_rows = kept.to(model.device).repeat_interleave(batch.n_rows, 0)
                where = batch.mask(positions)[:, :, None]
                constants = start.to(model.device) + scale * change

                def ablate(
                    layer: int,
                    of_rows: Tensor = of_rows,
                    where: Tensor = where,
                    constants: Tensor = constants,
                ) -> Hook:
                    def hook(z: Tensor) -> Tensor:
                        away = where & ~of_rows[:, None, layer]
                        return torch.where(away[..., None], constants[layer].to(z), z)

                    return hook

                hooks = {model.z_hook(layer): ablate(layer) for layer in range(g.n_layers)}
                found = model.label_logits(batch, hooks).log_softmax(-1)
                loss = kl_div(found, whole, log_target=True, reduction="batchmean")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    learned: Tensor = (start + (scale * change).detach().cpu()).to(start)
    return learned
