"""One set of weights, two views: Hugging Face for training, TransformerBridge for hooks.

``TransformerBridge`` rewires the module tree it is given, after which ``state_dict`` and
``save_pretrained`` no longer speak Hugging Face's names. So the Hugging Face model stays pristine
and the bridge is built on a *structural* copy of it (:mod:`circuitlens.models.bridging`): new
modules around the very same parameter and buffer tensors. Training one view is visible in the other
at once, and nothing is stored twice.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from circuitlens.errors import InputError, UnsupportedModelError
from circuitlens.models.batch import Batch, Readout
from circuitlens.models.bridging import Wiring, boot
from circuitlens.models.composite import Composite
from circuitlens.models.families import ActivationSite, Family, family_of
from circuitlens.models.features import Features, replaced, replacing
from circuitlens.models.fingerprint import Fingerprints
from circuitlens.models.freezing import evaluating
from circuitlens.models.geometry import HeadGeometry
from circuitlens.models.hooks import Hook, recording
from circuitlens.models.passes import count_forward
from circuitlens.models.prompt import Prompt
from circuitlens.models.readouts import readout_of
from circuitlens.models.shortened import Shortened
from circuitlens.models.tokens import token_texts
from circuitlens.models.writing import write_weights

__all__ = ["HookedModel"]

Forward = Callable[[Batch, Mapping[str, Hook]], Tensor]


class HookedModel(Shortened):
    """A language model with two views of the same weights, made by :func:`circuitlens.load`.

    Attributes:
        hf: the pristine Hugging Face model; train it, save it, hand it to any other library. Of a
            speech or vision model it is the language model inside, on the same weights.
        adapter: a PEFT model around ``hf``, if a transfer on weights in 16 bits keeps what it
            trained alongside them. Hooks and files need :func:`circuitlens.merge`.
        name: name or folder it was loaded from.
        origin: where the weights come from, ``"hub"`` (as ``name`` stands there), ``"folder"``,
            ``"memory"`` or a revision; or what changed them since, ``"fine-tuned"`` or
            ``"adapted"``. Set it if you change them yourself: model cards say what it says.
        labels: names given to the classes of a classification head, in place of its own.
        new: names of weights that were not in the checkpoint, such as those of a new head, and
            were not trained since.
        prompt: what the model was last trained to answer, if that is known; saved with it.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str = "",
        origin: str = "memory",
        labels: Sequence[str] = (),
        composite: Composite | None = None,
    ) -> None:
        self.hf = hf.eval()
        self.labels = tuple(labels)
        self.origin = origin
        self.name = name or str(hf.config.name_or_path) or type(hf).__name__
        self._tokenizer = tokenizer
        self.composite = composite
        self.adapter: Any = None
        self._view: tuple[Any, HeadGeometry, Wiring] | None = None
        self._geometry: HeadGeometry | None = None
        self._fingerprints = Fingerprints()
        self.new: tuple[str, ...] = ()
        self.prompt: Prompt | None = None

    def __repr__(self) -> str:
        # Not through the property: a model that was rewired can still be named.
        g = self._geometry or self.geometry
        inside = f"{type(self.composite.whole).__name__} with " if self.composite else ""
        return (
            f"HookedModel({self.name!r}: {inside}{type(self.hf).__name__}, {g.n_layers} layers of "
            f"{g.n_heads} heads, d_model {g.d_model}, {self.dtype}, {self.device}"
            f"{', new untrained head' * bool(self.new)}{', with an adapter' * bool(self.adapter)})"
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            InputError: if the model was loaded from memory without one.
        """
        if self._tokenizer is None:
            raise InputError(
                f"{self.name} has no tokenizer, which text needs: cl.load(model, tokenizer=…)."
            )
        return self._tokenizer

    @property
    def whole(self) -> PreTrainedModel:
        """The Hugging Face model that was loaded: of a speech or vision model with its encoder.

        It has the weights of :attr:`hf` as they are now, so ``model.whole.generate(…)`` answers as
        the trained model does.
        """
        return self.composite.follow(self.hf) if self.composite else self.hf

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return torch.device(self.hf.device)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return cast(torch.dtype, self.hf.dtype)

    def _hooked_view(self) -> tuple[Any, HeadGeometry, Wiring]:
        if self.adapter is not None:
            raise InputError(
                f"{self!r} keeps an adapter alongside its weights, where hooks do not reach: merge "
                "it first, cl.merge(model, task).model."
            )
        if self._view is None or not self._view[2].holds(self.hf):
            self._view = (*boot(self.family, self._tokenizer), Wiring(self.hf))
            self._geometry = self._view[1]
        return self._view

    @property
    def bridge(self) -> Any:
        """The hooked view, a ``TransformerBridge``, always in evaluation mode.

        It is built when first used, and again when the weights were moved to another device or
        type since.

        Raises:
            InputError: if :attr:`hf` was given other parameters since, as adapters do.
            UnsupportedModelError: if the model has no heads that can be hooked or told apart.
        """
        bridge = self._hooked_view()[0]
        if bridge.training:
            bridge.eval()
        return bridge

    @property
    def geometry(self) -> HeadGeometry:
        """Sizes of the heads and the weight slices that each one owns.

        Raises:
            InputError, UnsupportedModelError: as :attr:`bridge`.
        """
        if self._view is None and self._geometry is not None:
            return self._geometry
        return self._hooked_view()[1]

    @cached_property
    def family(self) -> Family:
        """What this kind of model needs beyond the hooks that all share."""
        return family_of(self.hf)

    def activations(self) -> tuple[ActivationSite, ...]:
        """All activation functions on the residual stream's way to the answer, in order."""
        layers = self.family.activations(self.geometry.n_layers, self.bridge.hook_dict)
        return (*layers, *self.readout.activations(self))

    @cached_property
    def readout(self) -> Readout:
        """Where this kind of model answers; it knows no labels, which a task adds."""
        return readout_of(self.hf, self.labels)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Tokens as text that people can read, whatever the script and the vocabulary.

        A letter that is split between tokens appears in each of them, numbered.
        """
        return token_texts(self.tokenizer, ids)

    @property
    def context(self) -> int | None:
        """Most tokens that the model takes, if it has a limit."""
        found = getattr(self.hf.config, "max_position_embeddings", None)
        # RoBERTa's first position ids belong to no token.
        return None if found is None else int(found) - self.family.first_position

    @property
    def n_embeddings(self) -> int:
        """Number of tokens that the model has embeddings for."""
        return int(self.hf.get_input_embeddings().weight.shape[0])

    def fingerprint(self) -> str:
        """SHA-256, 16 hex digits, of all parameters and of what else changes the outputs.

        Parameters are hashed again only where they have changed.
        """
        around = self.composite.rest(self.hf) if self.composite else ()
        return self._fingerprints.of(self.hf, around)

    # -- sounds and images ---------------------------------------------------------------------

    @property
    def takes_media(self) -> bool:
        """Whether prompts can have sounds or images."""
        return self.composite is not None

    def placeholder(self, name: str) -> str:
        """The token that stands for ``"audio"`` or ``"image"`` in a prompt, as text.

        Raises:
            InputError: if the model takes none, or has no processor.
        """
        if self.composite is None:
            raise InputError(f"{self.name} takes text only, and no {name}.")
        return self.composite.placeholder(name)

    def features(
        self, ids: Sequence[int], given: Mapping[str, Any], where: str = "the example"
    ) -> tuple[tuple[int, ...], Features]:
        """Tokens of a prompt with its placeholders repeated, and the features that go there.

        Args:
            ids: tokens of the prompt, each placeholder once.
            given: sound and image by name.
            where: what to call the example in errors.

        Raises:
            InputError, UnsupportedModelError: as
                :meth:`circuitlens.models.composite.Composite.features`.
        """
        assert self.composite is not None
        return self.composite.features(self.hf, ids, given, where)

    # -- forward ---------------------------------------------------------------------------

    def logits(
        self, batch: Batch, hooks: Mapping[str, Hook] | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """All logits where the answer is read (of a language model: the vocabulary's), hooked.

        Args:
            batch: the prompts.
            hooks: by canonical hook name, a function of the activation that returns the
                activation to continue with, or ``None`` to leave it as it is.

        Raises:
            UnsupportedModelError: if a hook did not fire, which would make any result wrong.
        """
        return batch.readout.logits(self, batch, hooks or {})

    def label_logits(
        self, batch: Batch, hooks: Mapping[str, Hook] | None = None
    ) -> Float[Tensor, "batch label"]:
        """Scores of the labels, in float32 at least; else as :meth:`logits`, but cheaper."""
        return batch.readout.label_logits(self, batch, hooks or {})

    def hf_logits(
        self, batch: Batch, module: torch.nn.Module | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """As :meth:`logits`, from the Hugging Face view.

        Args:
            batch: the prompts.
            module: the Hugging Face model as a training framework has wrapped it, which runs in the
                mode that it is in. Without it there is no dropout, whatever mode :attr:`hf` is in.
        """
        return batch.readout.hf_logits(self, batch, module)

    def hf_label_logits(self, batch: Batch) -> Float[Tensor, "batch label"]:
        """Scores of the labels from the Hugging Face view, in float32 at least."""
        return batch.readout.hf_label_logits(self, batch)

    def run(self, batch: Batch, hooks: Mapping[str, Hook], **arguments: Any) -> Any:
        """Output of the hooked view for whole prompts; readouts pick answers from it.

        Raises:
            UnsupportedModelError: if a hook did not fire.
        """
        arguments |= self._arguments(batch)
        tokens = arguments.pop("input_ids")
        count_forward(len(tokens))
        if batch.features is not None:
            put = replaced(batch.features, hooks.get("embed.hook_out"))
            hooks = {**hooks, "embed.hook_out": put}
        with self.hooked(hooks):
            return self.bridge(tokens, **arguments)

    def run_hf(self, batch: Batch, module: torch.nn.Module | None = None, **arguments: Any) -> Any:
        """Output of the Hugging Face view; ``module`` as in :meth:`hf_logits`."""
        count_forward(len(batch.input_ids))
        mode = evaluating(self.hf) if module is None else nullcontext()
        with mode, replacing(self.hf.get_input_embeddings(), batch.features):
            return (module or self.hf)(**self._arguments(batch), **arguments)

    @cached_property
    def accepted(self) -> Collection[str]:
        """Names of the arguments that the Hugging Face model takes."""
        return inspect.signature(self.hf.forward).parameters

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of ``hf.forward`` for a batch."""
        arguments: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
        }
        # Models without learned or rotary positions (BLOOM's ALiBi) derive them from the mask.
        if "position_ids" in self.accepted or self.family.passes_positions:
            arguments["position_ids"] = batch.position_ids + self.family.first_position
        return arguments

    @contextmanager
    def hooked(self, hooks: Mapping[str, Hook]) -> Iterator[None]:
        """Attach hooks for the block's forward pass and make sure that each one fired."""
        bridge = self.bridge
        points = bridge.hook_dict
        fired: set[str] = set()

        def wrap(name: str, function: Hook) -> Callable[..., Tensor | None]:
            def call(activation: Tensor, hook: object) -> Tensor | None:
                fired.add(name)
                return function(activation)

            return call

        if unknown := [name for name in hooks if name not in points]:
            raise UnsupportedModelError(
                f"{type(self.hf).__name__} has no hook {unknown[0]}, which this analysis needs."
            )
        with (
            warnings.catch_warnings(),
            bridge.hooks(fwd_hooks=[(n, wrap(n, f)) for n, f in hooks.items()]),
        ):
            # A held norm scale is meant to leave the native norm for the hooked one.
            warnings.filterwarnings("ignore", message="A forward hook edited hook_scale")
            yield
        if missed := sorted(set(hooks) - fired):
            raise UnsupportedModelError(
                f"{type(self.hf).__name__}: hook {missed[0]} did not fire in the forward pass, so "
                "the result would be wrong (TransformerLens fires hooks under canonical names)."
            )

    # -- head by head ----------------------------------------------------------------------

    @staticmethod
    def z_hook(layer: int) -> str:
        """Canonical name of z, the heads' outputs before W_O (TransformerLens ``hook_z``)."""
        return f"blocks.{layer}.attn.o.hook_in"

    def mlp_hook(self, layer: int) -> str:
        """Canonical name of the hook at an MLP's output (TransformerLens ``hook_mlp_out``)."""
        return self.family.mlp_output(layer)

    @torch.no_grad()
    def head_outputs(self, batch: Batch) -> Float[Tensor, "layer batch pos head d_head"]:
        """Return z, the output of every head before W_O."""
        names = [self.z_hook(layer) for layer in range(self.geometry.n_layers)]
        hooks, found = recording(names)
        self.logits(batch, hooks)
        return torch.stack([found[name] for name in names])

    @torch.no_grad()
    def head_contributions(self, batch: Batch) -> Float[Tensor, "layer batch pos head d_model"]:
        """Return z_h W_O[h], what each head writes to the residual stream.

        Summed over heads and with b_O added this is the attention output of the layer (in
        models with a norm behind attention, such as Gemma 2: the input of that norm).
        """
        g = self.geometry
        weights = torch.stack([g.output_weight(self.hf, head) for head in g]).unflatten(
            0, (g.n_layers, g.n_heads)
        )
        shape = "layer batch pos head d_head, layer head d_head d_model"
        shape += " -> layer batch pos head d_model"
        return cast(Tensor, einsum(self.head_outputs(batch), weights, shape))

    def unlabelled(self, tokens: Int[Tensor, "batch pos"]) -> Batch:
        """Wrap unpadded token ids as a :class:`Batch` without labels."""
        tokens = tokens.to(self.device)
        nothing = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        return Batch(tokens, torch.ones_like(tokens), nothing, self.readout)

    # -- copies and files ------------------------------------------------------------------

    def clone(self) -> HookedModel:
        """Return an independent copy with weights of its own."""
        # Together, so that the copy of the whole has the copy of the language model inside.
        hf, adapter, whole = copy.deepcopy((self.hf, self.adapter, self.whole))
        around = self.composite and replace(self.composite, whole=whole)
        twin = HookedModel(hf, self._tokenizer, self.name, self.origin, self.labels, around)
        twin.new, twin.prompt, twin.adapter = self.new, self.prompt, adapter
        twin._fingerprints = self._fingerprints.carried(self.hf, twin.hf)
        twin._geometry = self._geometry
        return twin

    def save(self, folder: str | Path) -> None:
        """Write weights, configuration and tokenizer the Hugging Face way.

        Of a speech or vision model the whole is written, with its processor.

        Raises:
            InputError: if the model keeps an adapter alongside its weights.
        """
        if self.adapter is not None:
            raise InputError(
                f"{self!r} keeps an adapter alongside its weights: save the transfer, "
                "result.save(…), or merge the adapter first, cl.merge(model, task).model.save(…)."
            )
        write_weights(self.whole, Path(folder), self.labels)
        processor = self.composite.processor if self.composite else None
        if processor is not None and hasattr(processor, "save_pretrained"):
            processor.save_pretrained(folder)
        elif self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)
        if self.prompt is not None:
            self.prompt.save(Path(folder))
