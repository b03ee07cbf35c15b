"""Tiny speech and vision models with random weights, and processors for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

import circuitlens as cl

RATE = 16_000
WORDS = ["bad", "good", "one", "two", "three", "four", "->", "<s>", "<pad>", "<unk>"]
MARKS = {"audio": "<|AUDIO|>", "image": "<image>"}
VOCABULARY = [*WORDS, *(f"w{n}" for n in range(80 - len(WORDS) - 2)), *MARKS.values()]
_TEXT = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": VOCABULARY.index("<pad>"),
    "bos_token_id": VOCABULARY.index("<s>"),
    "eos_token_id": VOCABULARY.index("<s>"),
}


def tokenizer() -> hf.PreTrainedTokenizerFast:
    raw = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<s>",
        additional_special_tokens=list(MARKS.values()),
        padding_side="left",
    )


def qwen2_audio() -> tuple[Any, Any]:
    sound = {
        "num_mel_bins": 16,
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "max_source_positions": 50,
    }
    config = hf.Qwen2AudioConfig(
        audio_config=sound,
        text_config=hf.Qwen2Config(**_TEXT).to_dict(),
        audio_token_id=VOCABULARY.index(MARKS["audio"]),
    )
    extractor = hf.WhisperFeatureExtractor(feature_size=16, sampling_rate=RATE, chunk_length=1)
    return (
        hf.Qwen2AudioForConditionalGeneration(config),
        hf.Qwen2AudioProcessor(extractor, tokenizer()),
    )


class VoxtralLike:
    """As Voxtral's, which takes the tokenizer of another library, and half a minute of sound."""

    audio_token = MARKS["audio"]

    def __init__(self) -> None:
        self.tokenizer = tokenizer()
        self.feature_extractor = hf.WhisperFeatureExtractor(
            feature_size=16, sampling_rate=RATE, chunk_length=1
        )

    def __call__(self, text: list[str], audio: list[Any], **options: Any) -> dict[str, Any]:
        found = self.feature_extractor(
            audio, sampling_rate=options["sampling_rate"], return_tensors="pt"
        )
        # The encoder halves 100 frames, and the projector takes four of these for one.
        repeated = [" ".join([self.audio_token] * 12) for _ in text]
        ids = self.tokenizer(repeated, return_tensors="pt")
        return {**ids, "input_features": found["input_features"]}


def voxtral() -> tuple[Any, Any]:
    sound = {
        "vocab_size": 8,
        "num_mel_bins": 16,
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "max_source_positions": 48,
    }
    config = hf.VoxtralConfig(
        audio_config=sound,
        text_config=hf.LlamaConfig(**_TEXT).to_dict(),
        audio_token_id=VOCABULARY.index(MARKS["audio"]),
    )
    how = VoxtralLike()
    how.feature_extractor = hf.WhisperFeatureExtractor(
        feature_size=16, sampling_rate=RATE, chunk_length=1, hop_length=RATE // 96
    )
    return hf.VoxtralForConditionalGeneration(config), how


def llava() -> tuple[Any, Any]:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        text_config=hf.LlamaConfig(**_TEXT),
        image_token_index=VOCABULARY.index(MARKS["image"]),
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
    how = hf.LlavaProcessor(
        images,
        tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token=MARKS["image"],
        num_additional_image_tokens=1,
    )
    return hf.LlavaForConditionalGeneration(config), how


def qwen2_vl() -> tuple[Any, Any]:
    """Its positions have three axes where there are images."""
    text = hf.Qwen2Config(
        **_TEXT,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    )
    config = hf.Qwen2VLConfig(
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
        },
        text_config={**text.to_dict(), "model_type": "qwen2_vl_text"},
        image_token_id=VOCABULARY.index(MARKS["image"]),
        video_token_id=70,
        vision_start_token_id=71,
        vision_end_token_id=72,
    )
    return hf.Qwen2VLForConditionalGeneration(config), None


class Patches:
    """The image processor of Qwen2-VL, and a placeholder for each of its patches."""

    image_token = MARKS["image"]

    def __init__(self) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        self.tokenizer = tokenizer()
        self.patches = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=1024
        )

    def __call__(self, text: list[str], images: list[Any], **options: Any) -> dict[str, Any]:
        found = self.patches(images, return_tensors="pt")
        n = int(found["image_grid_thw"].prod()) // 4
        ids = self.tokenizer([" ".join([self.image_token] * n)], return_tensors="pt")
        seen = ids["input_ids"] == VOCABULARY.index(self.image_token)
        return {**ids, "mm_token_type_ids": seen.long(), **found}


class Around(hf.PreTrainedModel):
    """As Ultravox has it: the causal language model is a part, head included."""

    config_class = hf.Qwen2Config
    _tied_weights_keys = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.encoder = torch.nn.Linear(16, config.hidden_size)
        self.language_model = hf.Qwen2ForCausalLM(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        audio_values: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        embedded = self.language_model.get_input_embeddings()(input_ids)
        if audio_values is not None:
            places = input_ids == VOCABULARY.index(MARKS["audio"])
            embedded = embedded.masked_scatter(places[..., None], self.encoder(audio_values))
        return self.language_model(inputs_embeds=embedded, attention_mask=attention_mask, **options)


class Frames:
    """16 samples a frame, and a placeholder for each."""

    audio_token = MARKS["audio"]
    sampling_rate = RATE

    def __init__(self) -> None:
        self.tokenizer = tokenizer()

    def __call__(self, text: list[str], audio: list[Any], **options: Any) -> dict[str, Any]:
        frames = torch.tensor(np.asarray(audio[0][:160])).float().unflatten(0, (-1, 16))
        ids = self.tokenizer([" ".join([self.audio_token] * len(frames))], return_tensors="pt")
        return {**ids, "audio_values": frames[None]}


def around() -> tuple[Any, Any]:
    return Around(hf.Qwen2Config(**_TEXT)), Frames()


MAKERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2-audio": qwen2_audio,
    "voxtral": voxtral,
    "llava": llava,
    "ultravox-like": around,
}
KIND = {"qwen2-audio": "audio", "voxtral": "audio", "llava": "image", "ultravox-like": "audio"}


def composite(name: str, seed: int = 0) -> cl.HookedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        whole, processor = MAKERS[name]()
    # Random maps of images and sounds are small beside embeddings.
    with torch.no_grad():
        for path, parameter in whole.named_parameters():
            if "projector" in path or path.startswith("encoder"):
                parameter.mul_(20)
    return cl.load(whole, processor=processor)


def medium(name: str, n: int) -> Any:
    """A sound or an image that differs by number."""
    generator = np.random.default_rng(n)
    if KIND[name] == "audio":
        times = np.arange(RATE // 3 + 400 * (n % 7)) / RATE
        return cl.Audio(np.sin(times * (2000 + 90 * n)) * 0.5, RATE)
    from PIL import Image

    return Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8))


def media_task(name: str, *, n: int = 200, template: str = "") -> cl.Task:
    """Random sentences with a sound or an image each."""
    kind = KIND[name]
    generator = np.random.default_rng(0)
    rows = []
    for number in range(n):
        words = generator.choice(["one", "two", "three", "four"], size=1 + number % 4)
        text = f"{' '.join(words)} w{number % 60} {('three', 'four')[number % 2]}"
        # What the last word says, so that it can be learned.
        row = {"id": f"{number}", "text": text, "label": ("bad", "good")[number % 2]}
        rows.append({**row, kind: medium(name, number)})
    return cl.Task.from_records(
        rows,
        name="media",
        template=template or f"{{{kind}}} {{text}} ->",
        labels={"bad": " bad", "good": " good"},
        share_a=0.5,
    )
