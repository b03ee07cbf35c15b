"""A fingerprint of a model: of its weights, and of what else changes its outputs.

Hashing half a billion weights takes seconds, and every stage asks whose results it is given. So
digests of parameters are kept until a parameter changes, which three signs tell: another place in
memory, PyTorch's counter of changes in place, and two sums over its bits, because changes through
``.data`` are not counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from circuitlens.utils.storage import digest

__all__ = ["Fingerprints"]

# Entries of a configuration that change no output, or that the weights tell themselves.
_NEUTRAL = frozenset(
    {
        "_name_or_path",
        "architectures",
        "dtype",
        "id2label",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 4096
# Blocks that are summed at once: on the CPU they stay in its cache, a GPU waits for every launch.
_PIECES = {"cpu": 64}
_PIECES_ON_GPU = 4096

Key = tuple[int, int, torch.dtype, tuple[int, ...], torch.device]


class Fingerprints:
    """Digests of parameters, as long as they hold."""

    def __init__(self) -> None:
        self._known: dict[Key, tuple[tuple[int, int], str]] = {}

    def of(self, hf: PreTrainedModel, around: Sequence[tuple[str, nn.Parameter]] = ()) -> str:
        """SHA-256, 16 hex digits, of all parameters and of the rest that changes outputs.

        ``around`` are parameters of a model that ``hf`` is inside of.
        """
        named = [*hf.named_parameters(), *around]
        sums = _sums([p for _, p in named])
        found: dict[Key, tuple[tuple[int, int], str]] = {}
        parts: list[str] = []
        for (name, parameter), bits in zip(named, sums, strict=True):
            key = _key(parameter)
            known = self._known.get(key)
            same = known is not None and known[0] == bits
            found[key] = known if known and same else (bits, digest(parameter))
            parts += [name, found[key][1]]
        self._known = found
        return digest(*parts, *_settings(hf))

    def carried(self, old: PreTrainedModel, new: PreTrainedModel) -> Fingerprints:
        """Return what holds of a copy, whose parameters are the same at other places."""
        carried = Fingerprints()
        for one, other in zip(old.parameters(), new.parameters(), strict=True):
            if known := self._known.get(_key(one)):
                carried._known[_key(other)] = known
        return carried


def _key(parameter: nn.Parameter) -> Key:
    return (
        parameter.data_ptr(),
        parameter._version,
        parameter.dtype,
        tuple(parameter.shape),
        parameter.device,
    )


@torch.no_grad()
def _sums(parameters: list[nn.Parameter]) -> list[tuple[int, int]]:
    """Of every parameter, the sum of its bits, and that of its blocks weighted by their place."""
    pairs: list[Tensor] = []
    for parameter in parameters:
        flat = parameter.detach().contiguous().reshape(-1)
        bits = flat.view(_BITS[flat.element_size()])
        whole = len(bits) - len(bits) % _BLOCK
        # Piece by piece: the sum turns what it adds up into int64 first. What is kept is made
        # beforehand, for between the pieces it would keep their memory from being used again.
        parts = bits[:whole].view(-1, _BLOCK)
        blocks = torch.empty(len(parts), dtype=torch.int64, device=bits.device)
        size = _PIECES.get(bits.device.type, _PIECES_ON_GPU)
        for start in range(0, len(parts), size):
            piece = slice(start, start + size)
            torch.sum(parts[piece], 1, dtype=torch.int64, out=blocks[piece])
        rest = bits[whole:].sum(dtype=torch.int64)
        places = torch.arange(1, len(blocks) + 1, device=bits.device)
        pairs.append(torch.stack([blocks.sum() + rest, (blocks * places).sum() - rest]))
    # One transfer per device: each waits for the device.
    by_device: dict[torch.device, list[int]] = {}
    for index, pair in enumerate(pairs):
        by_device.setdefault(pair.device, []).append(index)
    found: list[tuple[int, int]] = [(0, 0)] * len(pairs)
    for indices in by_device.values():
        values = torch.stack([pairs[i] for i in indices]).tolist()
        for index, (first, second) in zip(indices, values, strict=True):
            found[index] = first, second
    return found


def _settings(hf: PreTrainedModel) -> Iterator[str]:
    """What changes outputs besides the weights: configuration, and numbers that modules hold."""
    config = {k: v for k, v in hf.config.to_diff_dict().items() if k not in _NEUTRAL}
    yield json.dumps(_plain(config), sort_keys=True, default=str)
    for path, module in hf.named_modules():
        for name, value in sorted(vars(module).items()):
            # Epsilons and scales; dropout is off in evaluation.
            if isinstance(value, float) and "dropout" not in name and name != "p":
                yield f"{path}.{name}={value!r}"


def _plain(value: Any) -> Any:
    """Leave out, at every depth, what is neutral."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k not in _NEUTRAL}
    return value
