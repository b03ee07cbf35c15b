"""What the scorers cost, in units of plain Hugging Face passes over the same batch.

Random weights, one thread; every figure is a ratio to a rival that is timed in turns with it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

import circuitlens as cl
from benchmarks.timing import ratio
from circuitlens.baseline import NodeMeans
from circuitlens.cdt import RULES, relevance_by_difference, relevance_by_gradient
from circuitlens.models.batch import Batch, Readout, margin
from circuitlens.models.readouts import ClassifierReadout, SequenceReadout, TokenReadout
from circuitlens.tasks import Encoded


def qwen(d_vocab: int, d_model: int, d_mlp: int, n_layers: int) -> cl.HookedModel:
    """A random Qwen2 with 8 heads a layer."""
    config = Qwen2Config(
        vocab_size=d_vocab,
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_hidden_layers=n_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    return cl.load(Qwen2ForCausalLM(config))


def small_qwen() -> cl.HookedModel:
    return qwen(4000, 256, 704, 8)


def batch_of(vocabulary: int, rows: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (rows, length), generator=generator)
    return Batch(ids, torch.ones_like(ids), torch.zeros(rows).long(), TokenReadout((1, 2, 3)))


def zero_means(model: cl.HookedModel) -> NodeMeans:
    g = model.geometry
    heads = torch.zeros(g.n_layers, g.n_heads, g.d_head)
    return NodeMeans.pooled(heads, torch.zeros(g.n_layers, g.d_model))


def forward_backward(model: cl.HookedModel, batch: Batch) -> None:
    """Hugging Face forward and backward of the task margin to the input embeddings."""
    model.hf.requires_grad_(False)
    inputs = model.hf.get_input_embeddings()(batch.input_ids).requires_grad_(True)
    logits = model.hf(inputs_embeds=inputs, logits_to_keep=1).logits[:, -1]
    margins = margin(batch.readout.of_labels(logits), batch.gold)
    torch.autograd.grad(margins.sum(), inputs)
    model.hf.requires_grad_(True)


def linear(model: cl.HookedModel, batch: Batch) -> None:
    relevance_by_gradient(model, batch, zero_means(model), RULES["cdt-linear"], mlps=True)


def linear_against_forward_backward() -> dict[str, Any]:
    model, batch = small_qwen(), batch_of(4000, 16, 64)
    return {
        "benchmark": "cdt-linear, all heads and MLPs",
        "rival": "HF forward + backward to the inputs, same batch",
        "model": "random Qwen2, 8 layers, 8 heads, d 256; 16 × 64 tokens",
        "target": 1.25,
        **ratio(lambda: linear(model, batch), lambda: forward_backward(model, batch)),
    }


def difference_against_forward(positions: str, target: float) -> dict[str, Any]:
    torch.manual_seed(0)
    model = cl.load(GPT2LMHeadModel(GPT2Config()))
    batch, means = batch_of(50_000, 1, 32), zero_means(model)

    def ours() -> None:
        relevance_by_difference(model, batch, means, RULES["cdt"], positions=positions)  # type: ignore[arg-type]

    def rival() -> None:
        with torch.no_grad():
            model.hf(batch.input_ids, logits_to_keep=1)

    return {
        "benchmark": f"cdt, all 144 heads, positions={positions}",
        "rival": "one HF forward of the same input",
        "model": "random GPT-2 small; 1 × 32 tokens",
        "target": target,
        **ratio(ours, rival),
    }


def ablation_against_full_forwards() -> dict[str, Any]:
    model, batch = small_qwen(), batch_of(4000, 16, 64)
    means = zero_means(model)

    def rival() -> None:
        """One full forward for each head, with a hook that puts its mean in."""
        for head in model.geometry:

            def put(z: torch.Tensor, head: cl.Head = head) -> torch.Tensor:
                z = z.clone()
                z[:, :, head.index] = means.heads[head.layer, 0, head.index]
                return z

            with torch.no_grad():
                model.logits(batch, {model.z_hook(head.layer): put})

    return {
        "benchmark": "ablation, all 64 heads, prefix reused",
        "rival": "one full hooked forward per head",
        "model": "random Qwen2, 8 layers, 8 heads, d 256; 16 × 64 tokens",
        "target": 0.6,
        **ratio(lambda: relevance_by_difference(model, batch, means, RULES["ablation"]), rival),
    }


def of_readout(readout: Readout, rows: int, length: int) -> Batch:
    """The same random prompts, laid out as a readout has them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 4000, (rows, length), generator=generator).tolist()
    names = tuple(map(str, range(rows)))
    data = Encoded(names, tuple(map(tuple, tokens)), (0,) * rows, readout, 0, 0, 0, 0)
    return data.batch(range(rows))


def readouts_against_token(what: str) -> Iterator[dict[str, Any]]:
    """Each readout beside the token readout: scores of all heads, or a training step's loss."""
    model = small_qwen()
    config = model.hf.config
    config.num_labels, config.pad_token_id = 3, 0
    classifier = cl.load(Qwen2ForSequenceClassification(config))
    token = of_readout(TokenReadout((1, 2, 3)), 16, 64)
    others: dict[str, tuple[cl.HookedModel, Readout]] = {
        "sequence, words of one token": (model, SequenceReadout((((1,),), ((2,),), ((3,),)))),
        "sequence, words of two tokens": (
            model,
            SequenceReadout((((1, 4),), ((2, 5),), ((3, 6),))),
        ),
        "classifier": (
            classifier,
            ClassifierReadout(("a", "b", "c"), "last", 0, classes=(0, 1, 2)),
        ),
    }

    def step(chosen: cl.HookedModel, batch: Batch) -> None:
        batch.readout.losses(chosen, batch, chosen.hf).sum().backward()
        chosen.hf.zero_grad()

    run = linear if what == "cdt-linear" else step
    for name, (chosen, readout) in others.items():
        batch = of_readout(readout, 16, 64)
        yield {
            "benchmark": f"{what}, readout {name}",
            "rival": "the same by the token readout",
            "model": "random Qwen2, 8 layers, 8 heads, d 256; 16 × 64 tokens, 3 labels",
            "target": None,
            **ratio(partial(run, chosen, batch), partial(run, model, token)),
        }


_MEMORY = """
import resource, sys, torch
from benchmarks import relevance as r
torch.set_num_threads(1)
model = r.small_qwen()
model.bridge
run = {"ours": r.linear, "rival": r.forward_backward}[sys.argv[1]]
run(model, r.batch_of(4000, 1, 4))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(model, r.batch_of(4000, 64, 128))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def memory_against_forward_backward() -> dict[str, Any]:
    """Each side in a process of its own, because peak memory never falls."""
    mib = {
        side: float(
            subprocess.run(
                [sys.executable, "-c", _MEMORY, side], capture_output=True, text=True, check=True
            ).stdout
        )
        for side in ("ours", "rival")
    }
    return {
        "benchmark": "peak memory of cdt-linear, all heads and MLPs",
        "rival": "HF forward + backward to the inputs, same batch",
        "model": "random Qwen2, 8 layers, 8 heads, d 256; 64 × 128 tokens",
        "target": 1.5,
        "ratio": round(mib["ours"] / mib["rival"], 3),
        "ours_mib": round(mib["ours"]),
        "rival_mib": round(mib["rival"]),
    }


def run() -> Iterator[dict[str, Any]]:
    """Run the benchmarks one by one, on one thread."""
    torch.set_num_threads(1)
    yield linear_against_forward_backward()
    yield from readouts_against_token("cdt-linear")
    yield from readouts_against_token("a training step")
    yield memory_against_forward_backward()
    yield ablation_against_full_forwards()
    yield difference_against_forward("decision", 8)
    yield difference_against_forward("all", 60)
