"""What every verb costs at the shape of a real model, in units of plain Hugging Face passes.

The weights are random and the prompts are random syllables, with two label words between which the
model is undecided, so that every verb runs as it does for people. Times are of the verb and of its
rival, in turns. On the CPU every part is a process of its own, because resident memory never falls.

    python -m benchmarks.scale                             # Qwen2.5-0.5B's shape, float32
    python -m benchmarks.scale --shape qwen2.5-1.5b --examples 10
    python -m benchmarks.scale --device cuda --dtype bfloat16 --shape qwen2.5-7b
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import circuitlens as cl
from benchmarks.relevance import forward_backward
from benchmarks.shapes import BATCH, SHAPES, checkpoint, task_of
from circuitlens.adapt.strategies import Choice, strategy_of
from circuitlens.adapt.trainer import LabelTrainer
from circuitlens.models.batch import Batch
from circuitlens.utils.peak_memory import PeakMemory


def median_ratio(
    ours: Callable[[], Any], rival: Callable[[], Any], repeats: int
) -> dict[str, float]:
    """Seconds of both, in turns, and the median ratio with its least and most."""
    pairs = []
    for _ in range(repeats):
        pair = []
        for function in (ours, rival):
            start = time.perf_counter()
            function()
            _wait()
            pair.append(time.perf_counter() - start)
        pairs.append(pair)
    ratios = sorted(a / b for a, b in pairs)
    return {
        "ratio": round(ratios[len(ratios) // 2], 3),
        "ratio_min": round(ratios[0], 3),
        "ratio_max": round(ratios[-1], 3),
        "ours_s": round(min(a for a, _ in pairs), 3),
        "rival_s": round(min(b for _, b in pairs), 3),
    }


def _wait() -> None:
    """Until a GPU has done what it was asked to: calls return before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Part:
    """A loaded model with its task, and what the parts of the benchmark do with them."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        self.device = torch.device(args.device)
        self.n_weights = 0
        self._model: cl.HookedModel | None = None

    def load(self) -> Iterator[dict[str, Any]]:
        """Loading with the check of hooks, beside from_pretrained."""

        def rival() -> None:
            hf: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype="auto")
            hf.to(self.device)

        def ours() -> None:
            cl.load(self.folder, device=self.device)

        rival()
        yield {
            "what": "cl.load, with the check of hooks",
            "rival": "from_pretrained",
            **median_ratio(ours, rival, self.args.repeats),
        }

    def baseline(self) -> Iterator[dict[str, Any]]:
        """The baseline beside forward passes over the same batches."""
        model, task = self._opened(self.args.examples, self.args.tokens)
        batches = self._batches(model, task, "pool_a", self.args.batch)

        def ours() -> None:
            self._mean(model, task, self.args.batch)

        def rival() -> None:
            for batch in batches:
                self._forward(model, batch)

        self._forward(model, batches[0])
        yield {
            "what": "label_balanced_mean",
            "rival": "HF forward passes over the same batches",
            "target": 1.1,
            **self._timed(ours, rival, batches),
        }

    def linear(self) -> Iterator[dict[str, Any]]:
        """Relevance of all heads and MLPs beside forward and backward passes."""
        model, task = self._opened(self.args.examples, self.args.tokens)
        baseline = self._mean(model, task, self.args.batch)
        batches = self._batches(model, task, "pool_a", self.args.batch)

        def ours() -> None:
            cl.relevance(
                model,
                task,
                baseline,
                mlps=True,
                max_examples=10**6,
                batch_size=self.args.batch,
                quiet=True,
            )

        def rival() -> None:
            for batch in batches:
                forward_backward(model, batch)

        widest = max(batches, key=lambda b: b.input_ids.numel())
        self._trim()
        with PeakMemory(self.device) as of_rival:
            forward_backward(model, widest)
        self._trim()
        with PeakMemory(self.device) as of_ours:
            ours()
        yield {
            "what": f"cdt-linear, {len(model.geometry)} heads and all MLPs",
            "rival": "HF forward + backward to the inputs, same batches",
            "target": 1.25,
            **self._timed(ours, rival, batches),
            "memory": round(of_ours.mib / of_rival.mib, 3),
            "memory_target": 1.3,
            "ours_mib": round(of_ours.mib),
            "rival_mib": round(of_rival.mib),
        }

    def exact(self) -> Iterator[dict[str, Any]]:
        """Methods that cost a run a head, and faithfulness, on few and short prompts."""
        model, task = self._opened(self.args.few, self.args.few_tokens)
        baseline = self._mean(model, task, BATCH)
        asked = task["validation"][: self.args.few]
        batches = self._batches(model, task, "pool_a")

        def rival() -> None:
            for batch in batches:
                forward_backward(model, batch)

        rival()
        scores = cl.relevance(model, task, baseline, quiet=True)

        def score(method: str) -> Callable[[], Any]:
            return lambda: cl.relevance(
                model, task, baseline, method=method, batch_size=BATCH, quiet=True
            )

        def curve() -> None:
            shares = [round(len(model.geometry) * n / 10) for n in range(1, 11)]
            cl.faithfulness(
                model, task, scores, baseline, sizes=shares, n_random=30, examples=asked, quiet=True
            )

        size = f"{self.args.few} × {self.args.few_tokens} tokens"
        for what, ours in (
            ("cdt, all heads", score("cdt")),
            ("ablation, all heads", score("ablation")),
            ("faithfulness, 10 sizes × 2 × 30 random circuits", curve),
        ):
            yield {
                "what": f"{what}, {size}",
                "rival": "one HF forward + backward of the same batch",
                "target": None,
                **self._timed(ours, rival, batches, 1),
            }

    def steps(self) -> Iterator[dict[str, Any]]:
        """A training step of every strategy beside a forward and a backward pass."""
        model, task = self._opened(8, self.args.few_tokens)
        (batch,) = self._batches(model, task, "validation")
        g = model.geometry
        choice = Choice(_some_heads(model))
        for name in ("circuit", "lora-r8", "full"):
            about = {
                "what": f"training step, {name}",
                "rival": "HF forward + backward to the inputs, same batch",
                "target": None,
                "layers": g.n_layers,
            }
            try:
                yield about | self._step(model, batch, name, choice)
            except torch.OutOfMemoryError:
                yield about | {"out_of_memory": True}
            self._trim()

    def _step(
        self, model: cl.HookedModel, batch: Batch, name: str, choice: Choice
    ) -> dict[str, Any]:
        """One strategy's step. Peak memory is of all of it, with optimiser state and weights."""
        with PeakMemory(self.device) as memory:
            how = strategy_of(name)
            trainable = how.make(model, choice, how.choose(model, choice))
            optimizer = torch.optim.AdamW(trainable.parameters.values(), lr=1e-5)
            own = trainable.model
            for parameter in () if trainable.masks is None else own.hf.parameters():
                parameter.requires_grad_(True)

            def ours() -> None:
                batch.readout.losses(own, batch, own.hf).mean().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            ours()
            ours()
        return {
            **self._timed(ours, lambda: forward_backward(model, batch), [batch]),
            "entries": trainable.n_entries,
            "entries_share": round(trainable.n_entries / self.n_weights, 6),
            "peak_beside_the_model_mib": round(memory.mib),
        }

    def transfer(self) -> Iterator[dict[str, Any]]:
        """A whole transfer with three rates beside its training steps, its peak and its file."""
        model, task = self._opened(self.args.few * 8, self.args.few_tokens)
        circuit = _some_heads(model)
        options = {"learning_rates": [1e-5, 3e-5, 1e-4], "epochs": 3, "batch_size": BATCH}
        small = replace(
            task,
            pools=replace(task.pools, validation=task["validation"][:4], test=task["test"][:4]),
        )
        model.fingerprint()
        # Of two prompts at once, so that weights are most of it.
        short = replace(small, pools=replace(small.pools, pool_b=small["pool_b"][:8]))
        batch = max(self._batches(model, short, "pool_b", 2), key=lambda b: b.input_ids.numel())
        with PeakMemory(self.device) as activations:
            forward_backward(model, batch)
        self._trim()
        with PeakMemory(self.device) as memory:
            few = {"learning_rates": [1e-4], "epochs": 2, "batch_size": 2}
            cl.transfer(model, circuit, short, quiet=True, **few)  # type: ignore[arg-type]
        with _timed_steps() as spent:
            start = time.perf_counter()
            result = cl.transfer(model, circuit, small, quiet=True, **options)  # type: ignore[arg-type]
            _wait()
            seconds = time.perf_counter() - start
        size = next(model.hf.parameters()).element_size() * self.n_weights
        beyond = (memory.mib - activations.mib) * 2**20
        yield {
            "what": "transfer, circuit, three rates",
            "rival": "the sum of its training steps",
            "target": 1.15,
            "ratio": round(seconds / spent[0], 3),
            "ours_s": round(seconds, 3),
            "rival_s": round(spent[0], 3),
            "n_trained_on": len(small["pool_b"]),
            "evaluating_s": round(spent[1], 3),
            "peak_mib": round(size / 2**20 + memory.mib),
            "activations_mib": round(activations.mib),
            "peak_without_activations_of_weights": round(1 + beyond / size, 3),
            "peak_without_activations_bytes_per_weight": round((size + beyond) / self.n_weights, 2),
            "peak_target": 2.2,
        }

        def rival() -> None:
            with tempfile.TemporaryDirectory() as scratch:
                model.hf.save_pretrained(scratch)

        def ours() -> None:
            with tempfile.TemporaryDirectory() as scratch:
                result.save(scratch)

        yield {
            "what": "result.save",
            "rival": "save_pretrained of the model",
            "target": None,
            **median_ratio(ours, rival, 1),
        }

    @staticmethod
    def _mean(model: cl.HookedModel, task: cl.Task, batch_size: int) -> cl.MeanBaseline:
        # Few examples are near chance, whatever the model answers.
        return cl.label_balanced_mean(
            model, task, batch_size=batch_size, allow_chance=True, quiet=True
        )

    def _opened(self, examples: int, tokens: int) -> tuple[cl.HookedModel, cl.Task]:
        if self._model is None:
            self._model = cl.load(self.folder, device=self.device)
        model = self._model
        self.n_weights = sum(p.numel() for p in model.hf.parameters())
        # As many again for pool B; small numbers could leave a pool without a label.
        task = task_of(model, 2 * max(examples, 16), tokens)
        pools = {name: _even(task, name, examples) for name in ("pool_a", "pool_b")}
        others = {name: _even(task, name, 8) for name in ("validation", "test")}
        return model, replace(task, pools=replace(task.pools, **pools, **others))

    def _trim(self) -> None:
        """Give memory back that was freed: it would be used again unseen."""
        if self.device.type == "cpu":
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        else:
            torch.cuda.empty_cache()

    def _timed(
        self,
        ours: Callable[[], Any],
        rival: Callable[[], Any],
        batches: list[Batch],
        repeats: int | None = None,
    ) -> dict[str, float]:
        """Seconds and ratios, and how many tokens of the batches ours reads per second."""
        found = median_ratio(ours, rival, repeats or self.args.repeats)
        tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
        return {**found, "tokens_per_s": round(tokens / found["ours_s"])}

    def _batches(
        self, model: cl.HookedModel, task: cl.Task, pool: str, size: int = BATCH
    ) -> list[Batch]:
        data = task.encode(model, pool)
        return [batch for _, batch in data.batches(size, self.device)]

    @staticmethod
    @torch.no_grad()
    def _forward(model: cl.HookedModel, batch: Batch) -> None:
        model.hf(batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=1)


def _some_heads(model: cl.HookedModel) -> cl.Circuit:
    """5 % of the heads, spread over the layers."""
    g = model.geometry
    count = max(1, round(0.05 * len(g)))
    heads = [cl.Head((i * g.n_layers) // count, i % g.n_heads) for i in range(count)]
    return cl.Circuit.of(heads, g.n_layers, g.n_heads)


def _even(task: cl.Task, pool: str, n: int) -> tuple[cl.Example, ...]:
    """As many examples of a pool, the labels in turns."""
    by_label = [[e for e in task[pool] if e.label == label] for label in task.labels]
    mixed = [e for pair in zip(*by_label, strict=False) for e in pair]
    return (*mixed, *(e for e in task[pool] if e not in mixed))[:n]


@contextmanager
def _timed_steps() -> Iterator[list[float]]:
    """Seconds in training steps and in evaluations.

    A step is what a loop by hand has too: passes, clipping, optimiser and zeroed gradients.
    """
    spent = [0.0, 0.0]
    trainer: Any = LabelTrainer
    optimizer: Any = torch.optim.AdamW
    timed_ones = [
        (trainer, "training_step", 0),
        (trainer, "_clip_grad_norm", 0),
        (optimizer, "step", 0),
        (optimizer, "zero_grad", 0),
        (trainer, "evaluate", 1),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in timed_ones]

    def timed(function: Callable[..., Any], place: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            _wait()
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                _wait()
                spent[place] += time.perf_counter() - start

        return call

    for owner, name, place in timed_ones:
        setattr(owner, name, timed(getattr(owner, name), place))
    try:
        yield spent
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


PARTS = ("load", "baseline", "linear", "steps", "transfer", "exact")


def main() -> None:
    """Run the parts one by one and print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--examples", type=int, default=50, help="for means and scores")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=BATCH, help="of examples, for the same")
    parser.add_argument("--few", type=int, default=4, help="examples of what costs a run a head")
    parser.add_argument("--few-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--in", dest="folder", type=Path, help="of a checkpoint written before")
    args = parser.parse_args()
    on_gpu = torch.device(args.device).type == "cuda"
    if args.folder is not None and (len(args.parts) == 1 or on_gpu):
        part = Part(args.folder, args)
        for found in chain.from_iterable(getattr(part, name)() for name in args.parts):
            where = torch.cuda.get_device_name() if part.device.type == "cuda" else "cpu"
            about = {"shape": args.shape, "dtype": args.dtype, "device": where}
            about |= {"n_examples": args.examples, "tokens": args.tokens, "batch": args.batch}
            print(json.dumps({"benchmark": "scale", **about, **found}), flush=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        if args.folder is None:
            checkpoint(args.shape, args.dtype, folder, args.device)
            torch.cuda.empty_cache()
        for names in [args.parts] if on_gpu else [[name] for name in args.parts]:
            own = [a for a in sys.argv[1:] if a not in ("--parts", *PARTS)]
            command = [sys.executable, "-m", "benchmarks.scale", *own, "--in", str(folder)]
            subprocess.run([*command, "--parts", *names], check=False)


if __name__ == "__main__":
    main()
