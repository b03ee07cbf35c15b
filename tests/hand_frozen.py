"""The frozen network by whole forward passes with hooks written here: an oracle for all families.

Nothing of the engine is used: no cached prefixes, no columns left out, no coefficients of its own.
(For Llama and GPT-2 `frozen_oracle` does without hooks too.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers import task_margin
from torch import Tensor

import circuitlens as cl
from circuitlens.models.batch import Batch


class HandFrozen:
    """Patterns and routing of a batch held; scales and activations held as asked."""

    def __init__(self, model: cl.HookedModel, batch: Batch, scales: bool = True, linear=False):
        self.model, self.batch, self.linear = model, batch, linear
        self.layers = range(model.geometry.n_layers)
        points = model.bridge.hook_dict
        self.sites = model.activations()
        self.held = [h for la in self.layers for h in model.family.routing(la, points)]
        if scales:
            inside = ("q_norm", "k_norm", "embed")
            self.held += [
                h for h in points if h.endswith("hook_scale") and not any(i in h for i in inside)
            ]
        names = [
            *self.held,
            *(f"blocks.{la}.attn.hook_pattern" for la in self.layers),
            *(f"blocks.{la}.attn.v.hook_out" for la in self.layers),
            *(model.z_hook(la) for la in self.layers),
            *(model.mlp_hook(la) for la in self.layers),
            *(n for s in self.sites for n in (s.post, s.up, s.gate) if n),
        ]
        self.clean: dict[str, Tensor] = {}
        with torch.no_grad():
            model.logits(batch, {n: self._keep(n) for n in dict.fromkeys(names)})
        self.margin = self.run({})

    def _keep(self, name: str) -> Callable[[Tensor], None]:
        return lambda value: self.clean.__setitem__(name, value.detach().clone())

    @torch.no_grad()
    def run(self, patches: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
        """Task margins with further edits of z and of MLP outputs."""
        seen: dict[str, Tensor] = {}
        hooks: dict = {name: lambda _, name=name: self.clean[name] for name in self.held}

        def see(name):
            return lambda value: seen.__setitem__(name, value)

        for la in self.layers:
            hooks[f"blocks.{la}.attn.v.hook_out"] = see(f"v{la}")

            def mix(z, la=la):
                a = self.clean[f"blocks.{la}.attn.hook_pattern"]
                v = seen[f"v{la}"].reshape(*z.shape[:2], -1, z.shape[-1])
                out = torch.empty_like(z)
                for head in range(z.shape[2]):
                    group = head // (z.shape[2] // v.shape[2])
                    out[:, :, head] = a[:, head] @ v[:, :, group]
                return patches.get(self.model.z_hook(la), lambda x: x)(out)

            hooks[self.model.z_hook(la)] = mix
            name = self.model.mlp_hook(la)
            if name in patches:
                hooks[name] = patches[name]
        for site in self.sites if self.linear else ():
            for name in filter(None, (site.up, site.gate)):
                hooks[name] = see(name)

            def line(_, site=site):
                post, up = self.clean[site.post], self.clean[site.up]
                if site.gate is None:
                    return post / up * seen[site.up]
                gate = self.clean[site.gate]
                # act(g)·u is half of a line in g and half of one in u, both through the clean run.
                return 0.5 * post / gate * seen[site.gate] + 0.5 * post / up * seen[site.up]

            hooks[site.post] = line
        if self.linear and (cap := getattr(self.model.hf.config, "final_logit_softcapping", None)):
            return self._uncapped(hooks, cap)
        return task_margin(self.model.logits(self.batch, hooks), self.batch)

    def _uncapped(self, hooks, cap: float) -> Tensor:
        seen: list[Tensor] = []
        hooks["unembed.hook_out"] = lambda x: seen.append(x[:, -1 - self.batch.n_suffix])
        self.model.logits(self.batch, hooks)
        self.clean.setdefault("unembed.hook_out", seen[0])
        clean = self.clean["unembed.hook_out"]
        return task_margin(seen[0] * cap * (clean / cap).tanh() / clean, self.batch)

    def lost(self, patches: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
        return self.margin - self.run(patches)


def put(where: Tensor, mean: Tensor, head: int | None = None):
    """Edit that sets a head (or a whole MLP output) to its mean at the positions ``where``."""

    def edit(output: Tensor) -> Tensor:
        output = output.clone()
        if head is None:
            output[where] = mean.to(output)
        else:
            output[:, :, head][where] = mean.to(output)
        return output

    return edit
