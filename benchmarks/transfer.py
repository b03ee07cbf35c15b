"""What a training step costs: slices of heads, gradient masking, LoRA and full fine-tuning.

The same random model and batch for all; each side is a forward pass, a backward pass and a step of
AdamW on what it trains. Peak memory is measured in a process of its own for each.

    python -m benchmarks.transfer
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import circuitlens as cl
from benchmarks.relevance import batch_of, qwen
from circuitlens.adapt.masking import masked_adamw, only_selected_train
from circuitlens.adapt.strategies import Choice, strategy_of
from circuitlens.adapt.trainable import Trainable
from circuitlens.models.geometry import norm_parameters, selection_masks

SIDES = ("slices", "masking", "lora-r8", "full")
REPEATS = 5


def model_of() -> cl.HookedModel:
    return qwen(32_000, 512, 2048, 12)


def circuit_of(model: cl.HookedModel) -> cl.Circuit:
    """5 % of the heads, one in every other layer or so."""
    g = model.geometry
    count = round(0.05 * len(g))
    heads = [cl.Head((i * g.n_layers) // count, i % g.n_heads) for i in range(count)]
    return cl.Circuit.of(heads, g.n_layers, g.n_heads)


class Side:
    """One way to train, ready to take steps."""

    def __init__(self, name: str, model: cl.HookedModel, stack: ExitStack) -> None:
        circuit = circuit_of(model)
        choice = Choice(circuit)
        if name == "masking":
            slices = [piece for head in circuit for piece in model.geometry.slices(head)]
            masks = selection_masks(model.hf, slices, norm_parameters(model.hf))
            self.trainable = Trainable.of_entries(model, masks)
            hf = self.trainable.model.hf
            stack.enter_context(only_selected_train(hf, masks))
            self.optimizer = masked_adamw(hf, masks, learning_rate=1e-4, weight_decay=0.0)
        else:
            how = strategy_of({"slices": "circuit"}.get(name, name))
            self.trainable = how.make(model, choice, how.choose(model, choice))
            parameters = list(self.trainable.parameters.values())
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
        self.model = self.trainable.model

    def step(self, batch: Any) -> None:
        self.model.hf.train()
        batch.readout.losses(self.model, batch, self.model.hf).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_bytes(self) -> int:
        return sum(
            value.numel() * value.element_size()
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )


_MEMORY = """
import ctypes, sys, torch
from contextlib import ExitStack
from benchmarks import transfer as t
from circuitlens.utils.peak_memory import PeakMemory
torch.set_num_threads(1)
with ExitStack() as stack:
    side = t.Side(sys.argv[1], t.model_of(), stack)
    # Give freed memory back, so that using it again is seen.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with PeakMemory(torch.device("cpu")) as memory:
        for _ in range(2):
            side.step(t.batch_of(32000, 8, 64))
    print(memory.mib)
"""


def _peak_mib(side: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, side], capture_output=True, text=True, check=True
    )
    return round(float(done.stdout))


def _file_bytes(write: Callable[[Path], Any]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return sum(p.stat().st_size for p in Path(folder).iterdir() if p.suffix == ".safetensors")


def run() -> list[dict[str, Any]]:
    """Time all sides in turns, on one thread."""
    torch.set_num_threads(1)
    model, batch = model_of(), batch_of(32_000, 8, 64)
    with ExitStack() as stack:
        sides = {name: Side(name, model, stack) for name in SIDES}
        times: dict[str, list[float]] = {name: [] for name in SIDES}
        for number in range(REPEATS + 1):
            for name, side in sides.items():
                start = time.perf_counter()
                side.step(batch)
                if number:
                    times[name].append(time.perf_counter() - start)
        seconds = {name: statistics.median(values) for name, values in times.items()}
        state = {name: side.state_bytes() for name, side in sides.items()}
        files = {name: _file_bytes(side.trainable.write) for name, side in sides.items()}
        entries = {name: side.trainable.n_entries for name, side in sides.items()}
    checkpoint = _file_bytes(model.hf.save_pretrained)
    return [
        {
            "benchmark": "one training step",
            "side": name,
            "model": "random Qwen2, 12 layers, 8 heads, d 512, vocabulary of 32,000",
            "batch": "8 × 64 tokens",
            "heads": "5 %",
            "step_s": round(seconds[name], 4),
            "step_of_full": round(seconds[name] / seconds["full"], 3),
            "step_of_lora": round(seconds[name] / seconds["lora-r8"], 3),
            "entries": entries[name],
            "optimizer_bytes": state[name],
            "optimizer_of_full": round(state[name] / state["full"], 5),
            "peak_mib_beyond_weights": _peak_mib(name),
            "file_of_checkpoint": round(files[name] / checkpoint, 5),
        }
        for name in SIDES
    ]


if __name__ == "__main__":
    for result in run():
        print(json.dumps(result), flush=True)
