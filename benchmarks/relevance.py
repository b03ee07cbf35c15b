"""What the scorers cost, in units of plain Hugging Face passes over the same batch.

Every figure is a ratio of medians: the scorer and its rival are timed in turns in one process, on
one thread, with random weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

import circuitlens as cl
from circuitlens.batch import Batch
from circuitlens.cdt import RULES, relevance_by_difference, relevance_by_gradient

REPEATS = 5


def _ratio(ours: Callable[[], Any], rival: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of both, timed in turns after one warm-up each, and their ratio."""
    times: dict[str, list[float]] = {"ours": [], "rival": []}
    for number in range(REPEATS + 1):
        for name, function in (("ours", ours), ("rival", rival)):
            start = time.perf_counter()
            function()
            if number:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "ratio": round(medians["ours"] / medians["rival"], 3),
        "ours_s": round(medians["ours"], 4),
        "rival_s": round(medians["rival"], 4),
    }


def _batch(vocabulary: int, rows: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (rows, length), generator=generator)
    return Batch(ids, torch.ones_like(ids), torch.zeros(rows).long(), torch.tensor([1, 2, 3]))


def _means(model: cl.HookedModel) -> torch.Tensor:
    g = model.geometry
    return torch.zeros(g.n_layers, g.n_heads, g.d_head)


def linear_against_forward_backward() -> dict[str, Any]:
    """All heads by cdt-linear, against HF forward + backward to the input embeddings."""
    config = Qwen2Config(
        vocab_size=4000,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    model = cl.load(Qwen2ForCausalLM(config))
    batch, mean = _batch(4000, 16, 64), _means(model)
    embed = model.hf.get_input_embeddings()

    def rival() -> None:
        model.hf.requires_grad_(False)
        inputs = embed(batch.input_ids).requires_grad_(True)
        logits = model.hf(inputs_embeds=inputs, logits_to_keep=1).logits[:, -1]
        margin = logits[:, 1] - logits[:, [2, 3]].mean(1)
        torch.autograd.grad(margin.sum(), inputs)
        model.hf.requires_grad_(True)

    measured = _ratio(lambda: relevance_by_gradient(model, batch, mean, RULES["cdt-linear"]), rival)
    return {
        "benchmark": "cdt-linear, all heads",
        "rival": "HF forward + backward to the inputs, same batch",
        "model": "random Qwen2, 8 layers, 8 heads, d 256; 16 × 64 tokens",
        **measured,
    }


def difference_against_forward(positions: str) -> dict[str, Any]:
    """All 144 heads of a GPT-2-small-sized model by cdt, in HF forwards of the same input."""
    torch.manual_seed(0)
    model = cl.load(GPT2LMHeadModel(GPT2Config()))
    batch, mean = _batch(50_000, 1, 32), _means(model)

    def rival() -> None:
        with torch.no_grad():
            model.hf(batch.input_ids, logits_to_keep=1)

    measured = _ratio(
        lambda: relevance_by_difference(
            model,
            batch,
            mean,
            RULES["cdt"],
            positions=positions,  # type: ignore[arg-type]
        ),
        rival,
    )
    return {
        "benchmark": f"cdt, all heads, positions={positions}",
        "rival": "one HF forward of the same input",
        "model": "random GPT-2 small; 1 × 32 tokens",
        **measured,
    }


def run() -> Iterator[dict[str, Any]]:
    """Run the benchmarks one by one, on one thread."""
    torch.set_num_threads(1)
    yield linear_against_forward_backward()
    yield difference_against_forward("all")
    yield difference_against_forward("decision")
