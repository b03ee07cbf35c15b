"""Decomposition: what of each activation stems from sources (β) and what does not (γ)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.errors import CircuitLensError, InputError
from circuitlens.models.hooked import HookedModel
from circuitlens.nodes import Head, Node

__all__ = [
    "Decomposition",
    "check_heads",
    "check_means",
    "check_nodes",
    "check_tokens",
]

# Float64 models are allowed more than their rounding, because Hugging Face's RMSNorm is float32
# inside whatever the model's type.
_TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


@dataclass(frozen=True, eq=False, repr=False)
class Decomposition:
    """β and the total of logits, of head outputs and of other activations, for every source set.

    γ, the irrelevant part, is the total minus β.

    Attributes:
        relevant, total: logits at the last position. By frozen rules the total is the model's own;
            by the published ones it lacks what TOL takes from biases (3e-6 logits on random weights
            with 3 layers of width 32, 2e-4 with 12 layers of width 768).
        target_relevant, target_total: outputs z of the target heads at their positions; without
            targets that axis has length 0.
        activations_relevant: by hook name, β of the activations that were asked for,
            ``source batch pos …``.
        activations: by hook name, their totals, ``batch pos …``.
    """

    relevant: Float[Tensor, "source batch d_vocab"]
    total: Float[Tensor, "source batch d_vocab"]
    target_relevant: Float[Tensor, "source batch target d_head"]
    target_total: Float[Tensor, "source batch target d_head"]
    activations_relevant: Mapping[str, Float[Tensor, "source batch ..."]] = field(
        default_factory=dict
    )
    activations: Mapping[str, Float[Tensor, "batch ..."]] = field(default_factory=dict)
    _real: Callable[[], Mapping[str, Tensor]] = field(default=dict)

    def __repr__(self) -> str:
        n_sets, n_prompts, n_tokens = self.relevant.shape
        return (
            f"Decomposition({n_sets} source sets on {n_prompts} prompts: logits of {n_tokens} "
            f"tokens, {self.target_total.shape[2]} targets, {len(self.activations)} activations)"
        )

    @property
    def irrelevant(self) -> Float[Tensor, "source batch d_vocab"]:
        """γ of the logits."""
        return self.total - self.relevant

    @property
    def target_irrelevant(self) -> Float[Tensor, "source batch target d_head"]:
        """γ of the targets' outputs."""
        return self.target_total - self.target_relevant

    def irrelevant_at(self, hook: str) -> Float[Tensor, "source batch ..."]:
        """γ of the activation at a hook.

        Raises:
            InputError: if that hook was not asked for.
        """
        if hook not in self.activations:
            raise InputError(
                f"The activation at {hook!r} was not kept; name it in decompose(hooks=…). Kept "
                f"are: {', '.join(self.activations) or 'none'}."
            )
        return self.activations[hook] - self.activations_relevant[hook]

    def check(self, tolerance: float | None = None) -> float:
        """Verify that β + γ is what the model really computes, in a run without any hook edits.

        The logits and the activations at all hooks that were asked for are compared.

        Args:
            tolerance: largest deviation allowed, relative to the largest activation or β at the
                same hook; the default follows from the model's type.

        Returns:
            The largest relative deviation.

        Raises:
            CircuitLensError: if it is larger than allowed, or β overflows; the hook is named.
        """
        worst = 0.0
        for name, real in self._real().items():
            if name == "logits":
                beta, gamma = self.relevant, self.irrelevant
            else:
                beta, gamma = self.activations_relevant[name], self.irrelevant_at(name)
            if not bool(torch.isfinite(beta).all()):
                raise CircuitLensError(
                    f"β is not finite at {name}: it overflows {real.dtype}; load the model with "
                    "dtype float32."
                )
            allowed = _TOLERANCE[real.dtype] if tolerance is None else tolerance
            # Held norms let β grow far beyond the activation, and rounding grows with it.
            scale = max(float(real.abs().max()), float(beta.abs().max()) if len(beta) else 0.0)
            error = float((beta + gamma - real).double().abs().max()) / max(scale, 1e-30)
            if error > allowed:
                raise CircuitLensError(
                    f"β + γ differs from the model's own activation at {name} by {error:.1e} of "
                    f"the largest value there, and {allowed:.0e} is allowed: this model does not "
                    "behave as its hooks say, so do not trust the decomposition."
                )
            worst = max(worst, error)
        return worst


def check_tokens(model: HookedModel, tokens: Tensor) -> None:
    """Reject tokens that the model cannot read.

    Raises:
        InputError: saying what is wrong with them.
    """
    whole = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    if tokens.ndim != 2 or tokens.numel() == 0 or not whole:
        raise InputError(
            "tokens must be integers of shape (batch, pos), with at least one prompt and token, "
            f"but they are {tokens.dtype} of shape {tuple(tokens.shape)}."
        )
    config = model.hf.config.get_text_config()
    n_positions = getattr(config, "max_position_embeddings", None)
    if n_positions is not None and tokens.shape[1] > n_positions:
        raise InputError(
            f"The prompts have {tokens.shape[1]} tokens, but {model.name} has positions for "
            f"{n_positions}: shorten them."
        )
    n_tokens = model.hf.get_input_embeddings().weight.shape[0]
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= n_tokens:
        raise InputError(
            f"{model.name} has {n_tokens} tokens, and {low if low < 0 else high} is not one: "
            "encode the prompts with its own tokenizer."
        )


def check_means(
    model: HookedModel, means: Tensor, n_pos: int
) -> Float[Tensor, "layer pos head d_head"]:
    """Return the means if they fit the model and the prompts.

    Raises:
        InputError: naming both shapes otherwise.
    """
    g = model.geometry
    expected = (g.n_layers, n_pos, g.n_heads, g.d_head)
    if tuple(means.shape) != expected:
        raise InputError(
            f"means must have the shape (layer, pos, head, d_head), {expected} for this model and "
            f"these prompts, but it is {tuple(means.shape)}."
        )
    return means


def check_heads(
    model: HookedModel, sites: object, n_pos: int, role: str
) -> list[tuple[Head, int | None]]:
    """As :func:`check_nodes`, and reject MLPs."""
    found = []
    for node, position in check_nodes(model, sites, n_pos, role):
        if not isinstance(node, Head):
            raise InputError(f"{node} cannot be a {role} here: give attention heads.")
        found.append((node, position))
    return found


def check_nodes(
    model: HookedModel, sites: object, n_pos: int, role: str
) -> list[tuple[Node, int | None]]:
    """Return nodes with their positions counted from the start.

    Raises:
        InputError: naming the first site that the model or the prompts do not have.
    """
    found: list[tuple[Node, int | None]] = []
    for site in sites if isinstance(sites, Iterable) else [sites]:
        if not (isinstance(site, Sequence) and len(site) == 2 and isinstance(site[0], Node)):
            example = "[[(cl.Head(3, 5), -1)]]" if role == "source" else "[(cl.Head(3, 5), -1)]"
            raise InputError(
                f"{site} is not a {role}: give (head, position) pairs, as in {role}s={example}."
            )
        node, position = site
        if isinstance(node, Head):
            model.geometry.check(node)
        elif not 0 <= node.layer < model.geometry.n_layers:
            raise InputError(
                f"The model has no MLP {node}: it has {model.geometry.n_layers} layers."
            )
        if position is None and role == "source":
            found.append((node, None))
            continue
        try:
            index = operator.index(position)
        except TypeError as error:
            either = " or None for all positions" if role == "source" else ""
            raise InputError(
                f"The position of the {role} {node} must be an integer{either}, "
                f"but is {position!r}."
            ) from error
        if not -n_pos <= index < n_pos:
            raise InputError(
                f"The {role} {node} is at position {index}, but the prompts have {n_pos} tokens."
            )
        found.append((node, index % n_pos))
    return found
