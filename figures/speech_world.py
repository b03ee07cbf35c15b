"""A language of tones, and a speech model that transcribes it, both made here.

Every word is a tone. Six words share three tones: of each pair of homophones the sentence's first
word, its cue, decides which one was said. A domain is a set of cues, so a model that has heard and
read one domain can still write the homophones of another one only by chance: half of them. Text of
the new domain has all that is missing, and no sound is needed for it.

The model is a Qwen2-Audio of a few thousand parameters with its own processor: log-mel features,
encoder, projector, language model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F  # noqa: N812
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    WhisperFeatureExtractor,
)

import circuitlens as cl
from circuitlens.errors import InputError
from circuitlens.tasks import Example, Task

__all__ = ["DOMAINS", "Speech", "speech_task", "text_task", "train_from_scratch", "untrained"]

RATE = 16_000
SECONDS = 0.15
DOMAINS = ("source", "target")
CUES = {
    "source": {
        "a": ("river", "forest", "meadow", "canyon", "glacier", "desert"),
        "b": ("market", "street", "office", "harbour", "station", "factory"),
    },
    "target": {"a": ("tide", "shell", "coral"), "b": ("ledger", "invoice", "loan")},
}
FILLERS = ("old", "new", "long", "grey", "low", "fine")
# Of every pair the first is said behind a cue of kind a.
PAIRS = (("bank", "banc"), ("bow", "bough"), ("sail", "sale"))
HOMOPHONES = tuple(word for pair in PAIRS for word in pair)
AUDIO = "<|AUDIO|>"
SPECIAL = ("<unk>", "<pad>", "<s>", AUDIO)


def vocabulary() -> list[str]:
    cues = [cue for kinds in CUES.values() for words in kinds.values() for cue in words]
    return [*SPECIAL, *cues, *FILLERS, *HOMOPHONES]


@cache
def tone(word: str) -> NDArray[Any]:
    """Samples of a word; homophones have the same."""
    sounds = [w for w in vocabulary() if w not in SPECIAL and w not in HOMOPHONES]
    pair = next((n for n, words in enumerate(PAIRS) if word in words), None)
    place = sounds.index(word) if pair is None else len(sounds) + pair
    times = np.arange(int(RATE * SECONDS)) / RATE
    # Half an octave apart at most, and loud in the middle, as syllables are.
    frequency = 250 * 2 ** (place * 4 / (len(sounds) + len(PAIRS)))
    return np.sin(2 * np.pi * frequency * times) * np.hanning(len(times))


def say(words: Sequence[str], noise: np.random.Generator) -> cl.Audio:
    """Tones with a little noise and of varying loudness."""
    clean = np.concatenate([tone(word) * noise.uniform(0.5, 1.0) for word in words])
    return cl.Audio(clean * 0.5 + noise.normal(0, 0.02, len(clean)), RATE)


@dataclass(frozen=True)
class Speech:
    """Sentences of both domains, as sound and as text.

    Attributes:
        seed: of sentences and noise.
        answer: ``"kind"``, which of a pair was said (``a`` or ``b``, whatever the pair), or
            ``"word"``, the homophone itself.
        n_train, n_validation, n_test: sizes of the splits in each domain.
    """

    seed: int = 0
    answer: str = "kind"
    n_train: int = 240
    n_validation: int = 90
    n_test: int = 180
    languages: Sequence[str] = field(default=DOMAINS)

    def resolve(self, language: str) -> str:
        if language not in DOMAINS:
            raise InputError(f"There is no domain {language!r}; there are {', '.join(DOMAINS)}.")
        return language

    def splits(self, language: str) -> Mapping[str, Sequence[Example]]:
        found = sentences(self.seed, language)
        sizes = {"test": self.n_test, "validation": self.n_validation, "train": self.n_train}
        return {
            name: [
                Example(f"{language}:{name}:{n}", fields, kind if self.answer == "kind" else word)
                for n, (fields, kind, word) in zip(range(size), found, strict=False)
            ]
            for name, size in sizes.items()
        }


def sentences(seed: int, domain: str) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield words without the last one and their sound, the kind of the cue, and the last word."""
    choice = random.Random(f"speech-{seed}-{domain}")
    noise = np.random.default_rng([seed, DOMAINS.index(domain)])
    said: set[str] = set()
    while True:
        # Each kind and pair in turn, so that labels are balanced.
        n = len(said)
        kind, pair = "ab"[n % 2], PAIRS[n // 2 % len(PAIRS)]
        cue = choice.choice(CUES[domain][kind])
        words = [cue, *choice.choices(FILLERS, k=choice.choice((1, 2, 3)))]
        word = pair["ab".index(kind)]
        text = " ".join(words)
        key = f"{text} {word}"
        if key in said:
            # The same words in another recording are another sentence, but not the same text.
            words = [cue, *choice.choices(FILLERS, k=3)]
            text = " ".join(words)
            key = f"{text} {word}"
            if key in said:
                continue
        said.add(key)
        yield {"text": text, "audio": say([*words, word], noise)}, kind, word


def text_task(domain: str = "source", seed: int = 0, **sizes: int) -> Task:
    """Which homophone follows the text: ``a`` or ``b``, by any word of that kind."""
    kinds = {k: tuple(f" {pair['ab'.index(k)]}" for pair in PAIRS) for k in "ab"}
    return Task.from_source(
        Speech(seed, "kind", **sizes), domain, name="text", template="{text}", labels=kinds
    )


def speech_task(domain: str = "source", seed: int = 0, **sizes: int) -> Task:
    """Which of the six homophones was said: word accuracy, given the words before it."""
    words = {word: f" {word}" for word in HOMOPHONES}
    return Task.from_source(
        Speech(seed, "word", **sizes),
        domain,
        name="speech",
        template="{audio} {text}",
        labels=words,
    )


def processor() -> Qwen2AudioProcessor:
    words = {word: n for n, word in enumerate(vocabulary())}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<s>",
        additional_special_tokens=[AUDIO],
        padding_side="left",
    )
    extractor = WhisperFeatureExtractor(
        feature_size=24, sampling_rate=RATE, hop_length=160, chunk_length=1, n_fft=400
    )
    return Qwen2AudioProcessor(extractor, tokenizer)


def untrained(seed: int = 0, *, d_model: int = 48, n_layers: int = 3) -> cl.HookedModel:
    """A speech model with random weights."""
    how = processor()
    text = Qwen2Config(
        vocab_size=len(vocabulary()),
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=vocabulary().index("<s>"),
        eos_token_id=vocabulary().index("<s>"),
        pad_token_id=vocabulary().index("<pad>"),
    )
    sound = {
        "num_mel_bins": 24,
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "max_source_positions": 50,
        "dropout": 0.0,
    }
    config = Qwen2AudioConfig(
        audio_config=sound, text_config=text.to_dict(), audio_token_id=vocabulary().index(AUDIO)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole = Qwen2AudioForConditionalGeneration(config)
    return cl.load(whole, processor=how)


def train_from_scratch(
    seed: int = 0, *, steps: int = 1500, n_sentences: int = 1500, rate: float = 2e-3
) -> cl.HookedModel:
    """Teach a speech model the source domain, by sound and by text, and the target's words.

    Half of every batch is sound with its transcript, half is text alone. Of the target domain there
    is text without homophones, so that its words are known but not what they do.
    """
    model = untrained(seed)
    whole, tokenizer = model.whole, model.tokenizer
    found = sentences(1000 + seed, "source")
    heard = [next(found) for _ in range(n_sentences)]
    choice = random.Random(f"speech-training-{seed}")
    foreign = [cue for words in CUES["target"].values() for cue in words]
    plain = [" ".join([choice.choice(foreign), *choice.choices(FILLERS, k=3)]) for _ in range(500)]
    read = [f"{fields['text']} {word}" for fields, _, word in heard]
    inputs = _prepared(model, heard)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    whole.train()
    for _ in range(steps):
        chosen = torch.randint(len(heard), (24,), generator=generator).tolist()
        loss = _loss(whole, _collated([inputs[i] for i in chosen], tokenizer.pad_token_id))
        texts = [choice.choice(read) for _ in range(16)] + [choice.choice(plain) for _ in range(8)]
        rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]
        loss = loss + _loss(whole, _collated(rows, tokenizer.pad_token_id))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    whole.eval()
    model.origin = "fine-tuned"
    return model


def _prepared(model: cl.HookedModel, heard: Sequence[Any]) -> list[dict[str, Any]]:
    how = model.composite.processor
    texts = [f"{AUDIO} {fields['text']} {word}" for fields, _, word in heard]
    found = []
    for start in range(0, len(texts), 100):
        part = how(
            text=texts[start : start + 100],
            audio=[fields["audio"].samples for fields, _, _ in heard[start : start + 100]],
            sampling_rate=RATE,
            padding=True,
            return_tensors="pt",
        )
        for n in range(len(part["input_ids"])):
            kept = part["attention_mask"][n].bool()
            row = {"input_ids": part["input_ids"][n][kept].tolist()}
            names = ("input_features", "feature_attention_mask")
            found.append(row | {name: part[name][n] for name in names})
    return found


def _collated(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Any]:
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([[pad] * (width - len(r["input_ids"])) + r["input_ids"] for r in rows])
    mask = torch.tensor(
        [[0] * (width - len(r["input_ids"])) + [1] * len(r["input_ids"]) for r in rows]
    )
    others = {name: torch.stack([r[name] for r in rows]) for name in rows[0] if name != "input_ids"}
    return {"input_ids": ids, "attention_mask": mask, **others}


def _loss(whole: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    logits = whole(**batch).logits[:, :-1]
    ids, kept = batch["input_ids"], batch["attention_mask"].bool()
    special = torch.tensor([word in SPECIAL for word in vocabulary()])
    # What follows padding or sound is not to be predicted from it, but for the first word.
    wanted = kept[:, 1:] & ~special[ids[:, 1:]]
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return losses[wanted].mean()
