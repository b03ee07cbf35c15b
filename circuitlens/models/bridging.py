"""Building the hooked view on the tensors of the Hugging Face model, and correcting what is off.

``TransformerBridge`` rewires the module tree it is given, so it gets a structural copy: new
modules around the same parameters and buffers. Three things are then put right:

* the tokenizer is set afterwards, because the builder would load it again by its name;
* projections that the bridge split off a fused weight *by copying* read the fused weight instead;
* float64 models get float64 attention patterns.

The copy does not notice what happens to the model's own modules: :class:`Wiring` does.
"""

from __future__ import annotations

import copy
import operator
import warnings
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from circuitlens.errors import InputError, UnsupportedModelError, first_line
from circuitlens.models.families import Family, tested_types
from circuitlens.models.geometry import HeadGeometry, Projection

__all__ = ["Wiring", "boot"]


def boot(family: Family, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Any, HeadGeometry]:
    """Build the ``TransformerBridge`` of the model of ``family``, and the geometry of its heads.

    Raises:
        UnsupportedModelError: if the model has no heads that can be hooked or told apart.
    """
    hf = family.hf
    bridge = _build(hf, family)
    cfg = bridge.cfg
    geometry = HeadGeometry(
        hf,
        [f"{block.name}.{block.attn.name}" for block in bridge.blocks],
        n_heads=cfg.n_heads,
        n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
        d_head=cfg.d_head,
        d_model=cfg.d_model,
    )
    if tokenizer is not None:
        from transformer_lens.model_bridge.sources import detect_tokenizer_bos_eos

        bridge.tokenizer = tokenizer
        flags = detect_tokenizer_bos_eos(tokenizer)
        bridge.cfg.tokenizer_prepends_bos, bridge.cfg.tokenizer_appends_eos = flags
    _share_fused_projections(bridge, hf, geometry)
    if hf.dtype == torch.float64:
        _softmax_in_float64(bridge)
    return bridge, geometry


class Wiring:
    """The parameters that a hooked view was built on, and where their data were."""

    def __init__(self, hf: PreTrainedModel) -> None:
        self._names = dict(hf.named_parameters(remove_duplicate=False))
        # Held on to, so that no new parameter can have the id of one that is gone.
        self._parameters = _parameters(hf)
        self._data = _data(self._parameters)

    def holds(self, hf: PreTrainedModel) -> bool:
        """Whether the view can still be used; if not, the data moved, and it must be built again.

        Moved to another device or type, parameters remain the same objects, but buffers do not,
        and parts of fused weights would stay what and where they were.

        Raises:
            InputError: if the model has other parameters now.
        """
        parameters = _parameters(hf)
        same = len(parameters) == len(self._parameters)
        if same and all(map(operator.is_, parameters, self._parameters)):
            return _data(parameters) == self._data
        names = dict(hf.named_parameters(remove_duplicate=False))
        changed = [n for n in self._names | names if names.get(n) is not self._names.get(n)]
        raise InputError(
            f"The {type(hf).__name__} was rewired after it was hooked "
            f"({changed[0] if changed else 'a parameter'} is not what it was), as an adapter, "
            "resize_token_embeddings and load_state_dict(assign=True) do, so the hooks would show "
            "another model: merge an adapter into it (merge_and_unload), and call cl.load again."
        )


def _parameters(hf: nn.Module) -> list[nn.Parameter]:
    # On every use of the hooked view, and hf.parameters() is seven times as slow.
    found: list[nn.Parameter] = []
    modules: list[nn.Module] = [hf]
    for module in modules:
        found += [p for p in module._parameters.values() if p is not None]
        modules += [child for child in module._modules.values() if child is not None]
    return found


def _data(parameters: list[nn.Parameter]) -> list[tuple[int, torch.dtype]]:
    return [(p.data_ptr(), p.dtype) for p in parameters]


def _build(hf: PreTrainedModel, family: Family) -> Any:
    # Deferred: this import takes seconds, and not every command needs a model.
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    shared = {id(tensor): tensor for tensor in chain(hf.parameters(), hf.buffers())}
    structure = copy.deepcopy(hf, shared)
    # Fused attention kernels never form the pattern, so its hook could not fire.
    structure.set_attn_implementation("eager")
    # The bridge reads the pad token from configurations that transformers 5 leaves without one.
    if getattr(structure.config, "pad_token_id", None) is None:
        structure.config.pad_token_id = structure.config.eos_token_id
    try:
        bridge = build_bridge_from_module(
            structure,
            family.architecture,
            hf_config=structure.config,
            model_name=str(hf.config.name_or_path) or type(hf).__name__,
            post_adapter_hook=family.adapt,
        )
        bridge.eval()
        for needed in ("blocks.0.attn.hook_pattern", "blocks.0.attn.o.hook_in"):
            if needed not in bridge.hook_dict:
                raise UnsupportedModelError(f"the hooked model has no {needed}")
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"There is not enough memory on {hf.device} to hook {type(hf).__name__} "
            f"({first_line(error)}): load it in fewer bits, or on another device."
        ) from error
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(hf).__name__} has no attention heads that TransformerLens can hook "
            f"({first_line(error)}): circuitlens needs a model with softmax attention in every "
            f"layer, and is tested on the types {tested_types()}."
        ) from error
    return bridge


class _RowsOf(nn.Module):
    """A linear map made of some rows of a fused one, read again in every pass.

    The bridge copies these rows when they are not one block, as in GPT-NeoX's interleaved layout;
    training the fused weight would then not show in the hooks.
    """

    def __init__(self, fused: nn.Module, rows: Tensor) -> None:
        super().__init__()
        # In a tuple, so that the fused module is not registered here a second time.
        self._fused = (fused,)
        self._rows = rows

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self._fused[0].weight)[self._rows]

    @property
    def bias(self) -> Tensor | None:
        bias = self._fused[0].bias
        return None if bias is None else cast(Tensor, bias)[self._rows]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def _share_fused_projections(bridge: Any, hf: PreTrainedModel, geometry: HeadGeometry) -> None:
    storages = {p.untyped_storage().data_ptr() for p in hf.parameters()}
    kinds: tuple[Projection, ...] = ("q", "k", "v")
    for layer, block in enumerate(bridge.blocks):
        for kind in kinds:
            part = getattr(block.attn, kind).original_component
            if part.weight.untyped_storage().data_ptr() in storages:
                continue
            module, rows = geometry.rows(layer, kind)
            split = _RowsOf(hf.get_submodule(module), rows.to(hf.device))
            getattr(block.attn, kind).set_original_component(split)


@torch.no_grad()
def _probe_patterns(bridge: Any) -> tuple[bool, bool]:
    """Whether attention patterns are exact in float64, and whether edits of them reach z.

    Some families (OPT, BERT) leave attention to Hugging Face's code, and ``hook_pattern`` only
    sees the pattern after it was used.
    """
    sums: list[Tensor] = []
    z: list[Tensor] = []

    def erase(pattern: Tensor, hook: object) -> Tensor:
        sums.append(pattern.sum(-1))
        return torch.zeros_like(pattern)

    hooks = [
        ("blocks.0.attn.hook_pattern", erase),
        ("blocks.0.attn.o.hook_in", lambda value, hook: z.append(value)),
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A hook on .* returned a modified tensor")
        tokens = torch.arange(6, device=bridge.cfg.device)[None]
        bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    return bool((sums[0] - 1).abs().max() < 1e-12), not bool(z[0].any())


def _softmax_in_float64(bridge: Any) -> None:
    """Let a float64 model have float64 attention patterns.

    Many bridges take softmax in float32. That costs the precision one asked for, and the masks'
    float64 minimum becomes −∞ there, so queries in the padding, which see nothing, become NaN.
    """
    exact, editable = _probe_patterns(bridge)
    if exact:
        return
    if not editable:
        raise UnsupportedModelError(
            f"{bridge.cfg.architecture} takes its softmax in float32 where no hook reaches it, "
            "which gives NaN for padded prompts in float64: load it in float32."
        )
    for block in bridge.blocks:
        scores: list[Tensor] = []

        def see(value: Tensor, hook: object, scores: list[Tensor] = scores) -> None:
            scores[:] = [value]

        def again(value: Tensor, hook: object, scores: list[Tensor] = scores) -> Tensor:
            return scores.pop().softmax(-1)

        block.attn.hook_attn_scores.add_hook(see, is_permanent=True)
        block.attn.hook_pattern.add_hook(again, is_permanent=True)
