"""The language model inside a larger one, such as a speech or a vision model.

A composite of Hugging Face is an encoder, a projector and a language model, whose input embeddings
are those of tokens, with the encoder's features in the places of a placeholder. All that
circuitlens does concerns the language model, so that one is hooked and trained, as the
causal language model that it is, on the modules of the composite itself:

* Encoder and projector have no part in it, and stay as they are to the bit.
* The composite sees every change at once; saved, loaded and asked to generate, it is whole.
* A prompt with a sound or an image runs through the encoder once. Its features then replace the
  embeddings of the placeholder, in both views, in every pass.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from circuitlens.errors import InputError, UnsupportedModelError, first_line
from circuitlens.models.features import Features, replacing
from circuitlens.models.freezing import evaluating
from circuitlens.models.inside import close, parts, places
from circuitlens.models.media import opened

__all__ = ["Composite"]

logger = logging.getLogger(__name__)


class _CapturedError(Exception):
    """Ends a forward pass behind the encoder."""


@dataclass
class Composite:
    """A model around the language model that is hooked.

    Attributes:
        whole: the composite; read it by :attr:`circuitlens.HookedModel.whole`, which follows
            what an adapter put in place of modules.
        processor: turns text with sounds and images into what ``whole`` takes.
        checked: kinds of media for which the language model was compared with ``whole``.
    """

    whole: PreTrainedModel
    processor: Any = None
    checked: set[str] = field(default_factory=set)

    def follow(self, hf: PreTrainedModel) -> PreTrainedModel:
        """Return ``whole`` with the modules that the language model has now."""
        if hf not in (module for _, module in parts(self.whole)):
            body, head = places(self.whole)
            self.whole.set_submodule(body, hf.base_model)
            self.whole.set_submodule(head, hf.get_output_embeddings())
        return self.whole

    def rest(self, hf: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
        """Parameters of encoder and projector, which are not those of the language model."""
        own = {id(p) for p in hf.parameters()}
        return [(n, p) for n, p in self.follow(hf).named_parameters() if id(p) not in own]

    # -- sounds and images -----------------------------------------------------------------------

    def placeholder(self, name: str) -> str:
        """The token that stands for a sound or an image in a prompt, as text.

        Raises:
            InputError: if there is no processor, or it has none.
        """
        kind = type(self.whole).__name__
        if self.processor is None:
            raise InputError(
                f"The prompt has {{{name}}}, which takes the processor of {kind}: load the model "
                "by its folder or name, or pass cl.load(model, processor=…)."
            )
        token = getattr(self.processor, f"{name}_token", None)
        if not token:
            raise InputError(
                f"The processor of {kind} ({type(self.processor).__name__}) has no {name}_token: "
                f"the model takes no {name}; leave {{{name}}} out of the template."
            )
        return str(token)

    def rate(self) -> int:
        """Samples per second that the encoder expects."""
        extractor = getattr(self.processor, "feature_extractor", self.processor)
        return int(getattr(extractor, "sampling_rate", 16_000))

    def features(
        self, hf: PreTrainedModel, ids: Sequence[int], given: Mapping[str, Any], where: str
    ) -> tuple[tuple[int, ...], Features]:
        """Expand the placeholders of a prompt, and encode what they stand for.

        Args:
            hf: the language model.
            ids: tokens of the prompt, in which each placeholder occurs once.
            given: sound and image by name.
            where: what to call the example in errors.

        Returns:
            The tokens with as many placeholders as there are features, and these, on the CPU.

        Raises:
            InputError: if processor or model cannot read what is given.
            UnsupportedModelError: if features do not stand where placeholders do, or the language
                model alone does not answer as the composite does.
        """
        tokens, inputs = list(ids), dict[str, Any]()
        types: dict[str, list[int]] = {}
        for name, value in given.items():
            found, own = self._processed(name, value, where)
            token = self._token(name)
            if tokens.count(token) != 1:
                raise InputError(
                    f"The prompt of {where} has {tokens.count(token)} places for its {name} "
                    f"({self.placeholder(name)!r}): name {{{name}}} once in the template."
                )
            at = tokens.index(token)
            for key in [key for key in own if key.endswith("token_type_ids")]:
                row = own.pop(key)[0].tolist()
                # Those of a second sound or image come where the first has moved them.
                before = types.pop(key, [0] * len(tokens))
                types[key] = before[:at] + row + before[at + 1 :]
            types = {
                key: row if len(row) != len(tokens) else row[:at] + [0] * len(found) + row[at + 1 :]
                for key, row in types.items()
            }
            tokens[at : at + 1] = found
            inputs |= own
        whole = self.follow(hf)
        device = hf.device
        inputs = {
            key: value.to(device, whole.dtype if value.is_floating_point() else None)
            for key, value in inputs.items()
        } | {key: torch.tensor([row], device=device) for key, row in types.items()}
        inputs["input_ids"] = torch.tensor([tokens], device=device)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        kinds = "+".join(sorted(given))
        embedded, logits = self._run(hf, inputs, where, whole_pass=kinds not in self.checked)
        own_embeddings = hf.get_input_embeddings()(inputs["input_ids"])
        if embedded.shape != own_embeddings.shape:
            raise UnsupportedModelError(
                f"{type(whole).__name__} gives its language model {embedded.shape[1]} positions "
                f"for a prompt of {len(tokens)} tokens: its processor has to repeat the "
                "placeholder once for every feature."
            )
        there = (embedded != own_embeddings).any(-1)
        values = torch.where(there[..., None], embedded, torch.zeros_like(embedded))
        features = Features(values[0].cpu(), there[0].cpu())
        if logits is not None:
            self._check(hf, inputs, features, logits)
            self.checked.add(kinds)
        return tuple(tokens), features

    def _token(self, name: str) -> int:
        tokenizer = getattr(self.processor, "tokenizer", None)
        assert tokenizer is not None
        return int(tokenizer.convert_tokens_to_ids(self.placeholder(name)))

    def _processed(self, name: str, value: Any, where: str) -> tuple[list[int], dict[str, Tensor]]:
        """Tokens that stand for a sound or image, and what the encoder takes of it."""
        text = [self.placeholder(name)]
        if name == "audio":
            rate = self.rate()
            samples = opened(name, value).at(rate)
            arguments: dict[str, Any] = {"audio": [samples], "sampling_rate": rate}
        else:
            arguments = {"images": [opened(name, value)]}
        try:
            found = dict(self.processor(text=text, return_tensors="pt", **arguments))
        except Exception as error:  # what processors raise is up to them
            raise InputError(
                f"The processor {type(self.processor).__name__} does not take the {name} of "
                f"{where} ({first_line(error)})."
            ) from error
        ids = found.pop("input_ids")[0].tolist()
        found.pop("attention_mask", None)
        token = self._token(name)
        if name == "audio":
            self._warn_of_cut(len(samples), found.get("input_features"), where)
            if token not in ids:
                raise InputError(
                    f"The sound of {where} is too short ({len(samples) / rate:.3g} s): the "
                    "processor makes nothing of it; leave the example out."
                )
        if token not in ids:
            raise UnsupportedModelError(
                f"The processor {type(self.processor).__name__} gives no token "
                f"{self.placeholder(name)!r} for the {name} of {where}."
            )
        first, last = ids.index(token), len(ids) - ids[::-1].index(token)
        for key in [key for key in found if key.endswith("token_type_ids")]:
            found[key] = found[key][:, first:last]
        return ids[first:last], {k: v for k, v in found.items() if isinstance(v, Tensor)}

    def _warn_of_cut(self, n_samples: int, frames: Any, where: str) -> None:
        """Say once that sounds lose their end."""
        hop = getattr(getattr(self.processor, "feature_extractor", None), "hop_length", None)
        if not isinstance(frames, Tensor) or frames.ndim != 3 or not hop:
            return
        heard = frames.shape[0] * frames.shape[2] * int(hop)
        if n_samples <= heard + int(hop) or "cut" in self.checked:
            return
        self.checked.add("cut")
        rate = self.rate()
        logger.warning(
            "%s hears the first %.3g s of a sound, and that of %s lasts %.3g s: cut longer ones "
            "into parts, or what decides their labels may be gone. (Said once for a model.)",
            type(self.whole).__name__,
            heard / rate,
            where,
            n_samples / rate,
        )

    @torch.no_grad()
    def _run(
        self, hf: PreTrainedModel, inputs: Mapping[str, Tensor], where: str, *, whole_pass: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What the language model is given, and what the composite then says."""
        whole = self.follow(hf)
        caught: list[Tensor] = []

        def catch(_module: nn.Module, positional: Any, named: Mapping[str, Any]) -> None:
            embedded = named.get("inputs_embeds")
            if embedded is None:
                raise UnsupportedModelError(
                    f"{type(whole).__name__} does not give its language model inputs_embeds, so "
                    "that its features cannot be read."
                )
            caught.append(embedded)
            if fault := _beyond(named, embedded.shape[1]):
                raise UnsupportedModelError(
                    f"{type(whole).__name__} gives its language model {fault} with the media of "
                    f"{where}, which the hooked view does not have: use it on text."
                )
            if not whole_pass:
                raise _CapturedError

        handle = hf.base_model.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with evaluating(whole):
                output = whole(**inputs)
        except _CapturedError:
            return caught[0], None
        except (UnsupportedModelError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # what models raise is up to them
            raise InputError(
                f"{type(whole).__name__} does not take what its processor made of {where} "
                f"({first_line(error)}): give the processor that belongs to it."
            ) from error
        finally:
            handle.remove()
        if not caught:
            raise UnsupportedModelError(
                f"{type(whole).__name__} did not run its language model ({type(hf).__name__})."
            )
        return caught[0], output.logits[:, -1]

    @torch.no_grad()
    def _check(
        self, hf: PreTrainedModel, inputs: Mapping[str, Tensor], features: Features, logits: Tensor
    ) -> None:
        row = Features(features.values[None], features.places[None])
        with evaluating(hf), replacing(hf.get_input_embeddings(), row):
            alone = hf(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).logits[:, -1]
        if not close(alone, logits):
            raise UnsupportedModelError(
                f"The language model inside {type(self.whole).__name__} answers prompts with media "
                "otherwise than the whole does, as where positions have several axes or attention "
                "looks ahead within an image: use it on text, or use a model with plain positions."
            )


def _beyond(given: Mapping[str, Any], n: int) -> str:
    """What a language model is given that embeddings alone do not say; empty if there is nothing.

    Logits may hide it: where weights are random, or attention is even, positions hardly matter.
    """
    positions = given.get("position_ids")
    if positions is not None and not bool(
        (positions == torch.arange(n, device=positions.device)).all()
    ):
        return "positions of several axes"
    masks = given.get("attention_mask")
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    for mask in masks.values() if isinstance(masks, Mapping) else (masks,):
        if isinstance(mask, Tensor) and mask.ndim == 4:
            seen = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
            if not torch.equal(seen.cpu(), causal):
                return "attention that looks ahead"
        elif mask is not None and not isinstance(mask, Tensor):
            return "a mask of its own kind"
    deeper = [name for name, value in given.items() if "deepstack" in name and value is not None]
    return f"features in later layers ({deeper[0]})" if deeper else ""
