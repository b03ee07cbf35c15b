"""Random models of real models' shapes, and prompts that such a model is undecided about."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import circuitlens as cl
from circuitlens.tasks.toy import toy_tokenizer

__all__ = ["BATCH", "SHAPES", "checkpoint", "task_of"]

SHAPES = {
    "tiny": {"layers": 4, "heads": 8, "kv": 2, "d": 256, "mlp": 700, "vocabulary": 4000},
    "qwen2.5-0.5b": {
        "layers": 24, "heads": 14, "kv": 2, "d": 896, "mlp": 4864, "vocabulary": 151_936
    },
    "qwen2.5-1.5b": {
        "layers": 28, "heads": 12, "kv": 2, "d": 1536, "mlp": 8960, "vocabulary": 151_936
    },
    "qwen2.5-7b": {
        "layers": 28, "heads": 28, "kv": 4, "d": 3584, "mlp": 18_944, "vocabulary": 152_064
    },
}  # fmt: skip
BATCH = 10


def checkpoint(shape: str, dtype: str, folder: Path, device: str = "cpu") -> None:
    """Write a random model, drawn on a device, and a tokenizer of syllables."""
    sizes, tokenizer = SHAPES[shape], toy_tokenizer()
    config = Qwen2Config(
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["d"],
        intermediate_size=sizes["mlp"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv"],
        tie_word_embeddings=sizes["d"] < 2000,
        dtype=dtype,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        Qwen2ForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    tokenizer.save_pretrained(folder)


def task_of(model: cl.HookedModel, examples: int, tokens: int) -> cl.Task:
    """Random prompts, labelled by what the model says of two words that it is undecided between."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.tokenizer.get_vocab()
    words = [w[1:] for w in vocabulary if w.startswith("Ġ") and w[1:].isalpha()]
    # <s> and "->" come besides.
    drawn = torch.randint(len(words), (3 * examples, tokens - 2), generator=generator)
    texts = [" ".join(words[i] for i in row) for row in drawn.tolist()]

    def make(answers: tuple[str, str], labels: dict[str, str]) -> cl.Task:
        rows = [{"text": text, "label": labels[text]} for text in texts]
        names = ("train", "validation", "test")
        splits = {name: rows[n * examples : (n + 1) * examples] for n, name in enumerate(names)}
        return cl.Task.from_records(
            splits,
            template="{text} ->",
            labels={"a": f" {answers[0]}", "b": f" {answers[1]}"},
            max_text_tokens=tokens,
            share_a=0.5,
        )

    any_labels = {text: "ab"[n % 2] for n, text in enumerate(texts)}
    task = make((words[0], words[1]), any_labels)
    pools = [task[pool] for pool in ("pool_a", "pool_b", "validation", "test")]
    asked = [example for pool in pools for example in pool]
    logits = torch.empty(len(asked), len(words))
    ids = torch.tensor([vocabulary[f"Ġ{word}"] for word in words])
    with torch.no_grad():
        for index, batch in task.encode(model, asked).batches(BATCH, model.device):
            logits[index] = model.hf_logits(batch).float().cpu()[:, ids]
    # Each pool should have both labels, as evenly as may be.
    ends = torch.tensor([len(pool) for pool in pools]).cumsum(0).tolist()
    best = (1.0, 0, 1)
    for one in range(len(words)):
        says = (logits[:, one, None] > logits).float()
        parts = [says[a:b].mean(0) for a, b in zip([0, *ends], ends, strict=False)]
        uneven = torch.stack([(part - 0.5).abs() for part in parts]).amax(0)
        other = int(uneven.argmin())
        best = min(best, (float(uneven[other]), one, other))
    _, one, other = best
    found = {
        example.fields["text"]: "a" if row[one] > row[other] else "b"
        for example, row in zip(asked, logits, strict=True)
    }
    return make((words[one], words[other]), found)
