"""The frozen network written out by hand from Hugging Face weights: an oracle for the engine.

No hooks and no bridge: patterns come from ``output_attentions``, everything else is a few lines of
algebra for a Llama-like and a GPT-2-like block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel


@dataclass
class Frozen:
    """One prompt, no padding. ``linear`` replaces activations by their secants."""

    hf: PreTrainedModel
    ids: Tensor
    freeze_scales: bool = True
    linear: bool = False

    def __post_init__(self) -> None:
        self.hf.set_attn_implementation("eager")
        out = self.hf(self.ids, output_attentions=True)
        self.patterns = out.attentions
        self.scales: dict[str, Tensor] = {}
        self.acts: dict[int, tuple[Tensor, Tensor]] = {}
        self.clean_z: dict[int, Tensor] = {}
        self.gpt2 = self.hf.config.model_type == "gpt2"
        self.logits = self.run()
        torch.testing.assert_close(self.logits, out.logits[0, -1], rtol=1e-5, atol=1e-5)

    def norm(self, name: str, module, x: Tensor) -> Tensor:
        if self.gpt2:
            x = x - x.mean(-1, keepdim=True)
        eps = module.eps if self.gpt2 else module.variance_epsilon
        scale = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        if self.freeze_scales:
            scale = self.scales.setdefault(name, scale)
        return x / scale * module.weight + (module.bias if self.gpt2 else 0)

    def activation(self, layer: int, gate: Tensor, up: Tensor | None) -> Tensor:
        f = (lambda t: F.gelu(t, approximate="tanh")) if self.gpt2 else F.silu
        if not self.linear:
            return f(gate) * (1 if up is None else up)
        gate0, up0 = self.acts.setdefault(layer, (gate, up))
        slope = f(gate0) / gate0
        if up is None:
            return slope * gate
        return 0.5 * slope * up0 * gate + 0.5 * f(gate0) * up

    def run(self, layer: int = -1, head: int = -1, value: Tensor | None = None, first: int = 0):
        """Logits at the last position, with one head's output replaced from position ``first``."""
        decoder = self.hf.transformer if self.gpt2 else self.hf.model
        blocks = decoder.h if self.gpt2 else decoder.layers
        if self.gpt2:
            x = (decoder.wte(self.ids) + decoder.wpe(torch.arange(self.ids.shape[1])))[0]
        else:
            x = decoder.embed_tokens(self.ids)[0]
        for n, block in enumerate(blocks):
            ln1 = block.ln_1 if self.gpt2 else block.input_layernorm
            ln2 = block.ln_2 if self.gpt2 else block.post_attention_layernorm
            attention = block.attn if self.gpt2 else block.self_attn
            a = self.patterns[n][0]
            h = self.norm(f"{n}.1", ln1, x)
            v = attention.c_attn(h).chunk(3, -1)[2] if self.gpt2 else attention.v_proj(h)
            size = self.hf.config.hidden_size // a.shape[0]
            v = v.unflatten(-1, (-1, size))
            v = v.repeat_interleave(a.shape[0] // v.shape[1], dim=1)
            z = torch.einsum("hqk,khd->qhd", a, v)
            self.clean_z.setdefault(n, z)
            if n == layer:
                z = z.clone()
                z[first:, head] = value
            x = x + (attention.c_proj if self.gpt2 else attention.o_proj)(z.flatten(-2))
            h = self.norm(f"{n}.2", ln2, x)
            if self.gpt2:
                x = x + block.mlp.c_proj(self.activation(n, block.mlp.c_fc(h), None))
            else:
                mlp = block.mlp
                x = x + mlp.down_proj(self.activation(n, mlp.gate_proj(h), mlp.up_proj(h)))
        final = decoder.ln_f if self.gpt2 else decoder.norm
        return self.hf.lm_head(self.norm("final", final, x[-1:]))[0]
