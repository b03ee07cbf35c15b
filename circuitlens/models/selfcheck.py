"""A check of the hooks of a model that is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitlens.errors import UnsupportedModelError, first_line
from circuitlens.models.batch import Batch
from circuitlens.models.families import is_tested, refuse_misread, tested_types
from circuitlens.models.hooks import pattern_hook, read_values, recording, value_hook

if TYPE_CHECKING:
    from circuitlens.models.hooked import HookedModel

__all__ = ["check_hooks"]

_PADDING = 2
_MASKED_OUT = "softmax in float32"
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def check_hooks(model: HookedModel) -> None:
    """Make sure, on six random tokens and on four, that hooks do what every method relies on.

    * The configuration has no option that the hooked view is known not to have.
    * The hooked view gives Hugging Face's logits, and padding does not change them.

    Of types that the tests do not cover, moreover:

    * Heads' outputs are z = A·v, and what replaces them reaches the logits.
    * There are hooks around every activation function.

    Raises:
        UnsupportedModelError: naming the model or its type, and what is wrong.
    """
    refuse_misread(model.hf)
    tested = is_tested(model.hf.config)
    cause: Exception | None = None
    try:
        fault = _fault_of_tested(model) if tested else _fault(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        fault, cause = first_line(error), error
    if fault is None:
        return
    if fault == _MASKED_OUT:
        raise UnsupportedModelError(
            f"{type(model.hf).__name__} computes its softmax in float32, where float64 masks "
            "become −∞: padded prompts would give NaN. Load it in float32 or, if supported, "
            "with attn_implementation='sdpa'."
        )
    kind, type_ = type(model.hf).__name__, model.hf.config.model_type
    if not tested:
        raise UnsupportedModelError(
            f"{kind} is of the type {type_}, which is not one that circuitlens is tested on "
            f"({tested_types()}), and it failed the check of its hooks: {fault}."
        ) from cause
    name = kind if model.name == kind else f"{model.name} ({kind})"
    remedy = "" if model.dtype == torch.float32 else "load it in float32, or "
    raise UnsupportedModelError(
        f"{name} failed the check of its hooks: {fault}, as when TransformerLens "
        f"misreads its configuration; {remedy}use a model of the type {type_} with usual options."
    ) from cause


@torch.no_grad()
def _fault_of_tested(model: HookedModel) -> str | None:
    """What is wrong with a model of a tested type, if anything."""
    batch = _random_batch(model)
    return _fault_of_logits(model, batch, model.logits(batch), tested=True)


def _fault_of_logits(
    model: HookedModel, batch: Batch, logits: Tensor, *, tested: bool
) -> str | None:
    tolerance = _tolerance(model.dtype)
    with _eager(model) if model.dtype in _SIXTEEN_BITS else nullcontext():
        native = model.hf_logits(batch)
    if model.dtype == torch.float64 and not _exact_softmax(model, batch):
        return _MASKED_OUT
    kept = batch.attention_mask[1].bool()
    alone = model.logits(model.unlabelled(batch.input_ids[1:, kept]))
    for found, expected, fault in (
        (logits, native, "the hooked view does not give the logits of Hugging Face"),
        (logits[1:], alone, "padding changes the logits"),
    ):
        # Overflow, which some models show in the padding only, is for evaluation to complain of.
        rows = expected.isfinite().all(-1) | (not tested)
        if rows.any() and not _close(found[rows], expected[rows], tolerance):
            return fault
    return None


def _exact_softmax(model: HookedModel, batch: Batch) -> bool:
    """Whether attention weights of a float64 model add up to 1 as float64 numbers do.

    Kernels do, and give no weights.
    """
    found = model.hf(input_ids=batch.input_ids[:1], output_attentions=True)
    patterns = [p for p in found.get("attentions") or () if p is not None]
    return all(bool((p.sum(-1) - 1).abs().max() < 1e-12) for p in patterns)


@contextmanager
def _eager(model: HookedModel) -> Iterator[None]:
    """Have Hugging Face compute attention as the hooked view does, step by step.

    Kernels round differently. In 16 bits that moves logits by some per cent, and where it sends a
    token to another expert, by anything: a tolerance for that could not fail. Step by step, most
    architectures give the same bits in both views, whatever their depth.
    """
    own = model.hf.config._attn_implementation
    try:
        model.hf.set_attn_implementation("eager")
        yield
    finally:
        model.hf.set_attn_implementation(own)


def _tolerance(dtype: torch.dtype) -> float:
    """How much values may differ, as a share of the largest.

    In 16 bits: 16 units of rounding. Random models of 48 layers, where views do not agree to the
    bit, differ by up to 5.
    """
    if dtype in _SIXTEEN_BITS:
        return 16 * torch.finfo(dtype).eps
    return _half_of_the_digits(dtype)


@torch.no_grad()
def _fault(model: HookedModel) -> str | None:
    """What is wrong with a model of another type, if anything."""
    layers = range(model.geometry.n_layers)
    for site in model.activations():
        for hook in (site.post, site.up):
            if hook not in model.bridge.hook_dict:
                return f"there is no hook {hook}"
    batch = _random_batch(model)
    names = [(pattern_hook(n), value_hook(n), model.z_hook(n)) for n in layers]
    hooks, seen = recording(chain.from_iterable(names))
    logits = model.logits(batch, hooks)
    if fault := _fault_of_logits(model, batch, logits, tested=False):
        return fault
    tokens = batch.attention_mask.bool()
    tolerance = _tolerance(model.dtype)
    for layer, (pattern, v, z) in enumerate(names):
        read = read_values(seen[pattern], seen[v], seen[z].shape[-1])
        if not _close(read[tokens], seen[z][tokens], tolerance):
            return f"{z} is not the pattern times the values"
        if torch.equal(model.logits(batch, {z: torch.zeros_like}), logits):
            return f"replacing the outputs of the heads of layer {layer} changes nothing"
    return None


def _random_batch(model: HookedModel) -> Batch:
    """Two prompts, the second one padded."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.hf.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (2, 6), generator=generator)
    # Heads of decoders look at the last token that is not the one for padding.
    pad = model.hf.config.get_text_config().pad_token_id
    if pad is not None:
        tokens[tokens == pad] = (pad + 1) % vocabulary
    batch = model.unlabelled(tokens)
    side = slice(-_PADDING, None) if model.readout.pad_right else slice(_PADDING)
    batch.attention_mask[1, side] = 0
    return batch


def _half_of_the_digits(dtype: torch.dtype) -> float:
    # Norms and softmax are in float32 even in float64 models.
    return float(max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** 0.5)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    # Not the negation of ">": NaN is not close to anything.
    return bool((a - b).abs().max() <= tolerance * b.abs().max())
