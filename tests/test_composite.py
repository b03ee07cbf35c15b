"""The language model inside a speech or vision model: hooked, trained, saved; nothing else is."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from composites import (
    KIND,
    MAKERS,
    MARKS,
    RATE,
    VOCABULARY,
    Frames,
    Patches,
    composite,
    media_task,
    medium,
    qwen2_vl,
    tokenizer,
)
from helpers import unchecked
from scipy.io import wavfile

import circuitlens as cl
from circuitlens.experiments import simple_rival
from circuitlens.models.batch import margin
from circuitlens.models.media import digest_of, media_value

KINDS = list(MAKERS)
# A quick one of every way in which the language model can be inside.
FEW = ["qwen2-audio", "llava", "ultravox-like"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    if request.param == "llava":
        pytest.importorskip("PIL")
    return request.param


def text_task(n: int = 200) -> cl.Task:
    return media_task("qwen2-audio", n=n, template="{text} ->")


def whole_logits(model: cl.HookedModel, task: cl.Task, example: cl.Example) -> torch.Tensor:
    """What the composite says of one prompt, made by its own processor in one piece."""
    name = next(k for k in KIND.values() if f"{{{k}}}" in task.template)
    encoded = task.encode(model, [example])
    own, _ = model.features(
        model.tokenizer(task.template.format(**{name: MARKS[name], "text": example.text}))[
            "input_ids"
        ],
        {name: example.fields[name]},
    )
    assert own == encoded.tokens[0]
    processor = model.composite.processor
    given = (
        {"audio": [example.fields["audio"].samples], "sampling_rate": RATE}
        if name == "audio"
        else {"images": [example.fields["image"]]}
    )
    inputs = dict(processor(text=[MARKS[name]], return_tensors="pt", **given))
    inputs |= {"input_ids": torch.tensor([own]), "attention_mask": torch.ones(1, len(own)).long()}
    return model.whole(**inputs).logits[:, -1]


@torch.no_grad()
def test_the_hooked_view_is_the_composite(kind):
    model, task = composite(kind), media_task(kind)
    examples = task["validation"][:3] + task["test"][:3]
    encoded = task.encode(model, examples)
    batch = encoded.batch(range(len(examples)))
    assert len({len(tokens) for tokens in encoded.tokens}) > 1
    hooked, native = model.logits(batch), model.hf_logits(batch)
    torch.testing.assert_close(hooked, native)
    for n, example in enumerate(examples):
        expected = whole_logits(model, task, example)
        torch.testing.assert_close(native[n : n + 1], expected, rtol=1e-4, atol=1e-5)
        alone = encoded.batch([n])
        torch.testing.assert_close(model.logits(alone), expected, rtol=1e-4, atol=1e-5)
    # Without its features the answer is another one.
    deaf = replace(encoded, features=())
    assert not torch.allclose(model.logits(deaf.batch(range(len(examples)))), native)


@torch.no_grad()
def test_text_prompts_are_those_of_the_language_model_alone(kind):
    model, task = composite(kind), text_task()
    batch = task.encode(model, "validation").batch(range(4))
    assert batch.features is None
    found = model.logits(batch)
    said = model.whole(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    torch.testing.assert_close(found[:1], said.logits[:1, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", [FEW[0], *(pytest.param(name, marks=pytest.mark.slow) for name in FEW[1:])]
)
def test_heads_are_ablated_and_scored_on_media(name):
    """The exact effect of a head is that of holding it at its mean in the Hugging Face model."""
    if name == "llava":
        pytest.importorskip("PIL")
    task = media_task(name)
    model = cl.finetune(
        composite(name), task, learning_rate=1e-2, epochs=4, quiet=True, batch_size=8
    )
    baseline = cl.label_balanced_mean(model, task, quiet=True)
    exact = cl.relevance(model, task, baseline, method="ablation", max_examples=6, quiet=True)
    for method in ("cdt-linear", "cdt", "attribution"):
        found = cl.relevance(model, task, baseline, method=method, max_examples=6, quiet=True)
        assert found.mean.isfinite().all()
    by_id = {e.id: e for e in task["pool_a"]}
    encoded = task.encode(model, [by_id[i] for i in exact.example_ids])
    batch = encoded.batch(range(len(encoded)))
    whole = batch.readout.hf_label_logits(model, batch)
    head, width = cl.Head(1, 2), model.geometry.d_head
    columns = slice(head.index * width, (head.index + 1) * width)
    chosen = batch.mask("all")

    def ablate(_module, inputs):
        z = inputs[0].clone()
        held = baseline.mean[head.layer, head.index].expand_as(z[..., columns])
        z[..., columns] = torch.where(chosen[..., None], held, z[..., columns])
        return (z,)

    output = model.hf.base_model.layers[head.layer].self_attn.o_proj
    handle = output.register_forward_pre_hook(ablate)
    without = batch.readout.hf_label_logits(model, batch)
    handle.remove()
    effect = (margin(whole, batch.gold) - margin(without, batch.gold)).mean()
    assert float(effect.detach()) == pytest.approx(float(exact.mean[1, 2]), abs=1e-4)
    curve = cl.faithfulness(model, task, exact, baseline, sizes=[4], n_random=2, quiet=True)
    assert curve.at(8)["faithfulness"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("qwen2-audio", "circuit"),
        ("llava", "lora-norms"),
        ("ultravox-like", "full"),
        pytest.param("qwen2-audio", "lora", marks=pytest.mark.slow),
        pytest.param("llava", "head-scale", marks=pytest.mark.slow),
        pytest.param("voxtral", "full", marks=pytest.mark.slow),
    ],
)
def test_training_leaves_the_encoder_and_the_whole_is_saved(name, strategy, tmp_path):
    if name == "llava":
        pytest.importorskip("PIL")
    model, task = composite(name), text_task()
    before = {n: p.clone() for n, p in model.whole.named_parameters()}
    result = cl.transfer(
        model, cl.Circuit.of(["a0.h1", "a1.h2"], n_layers=2, n_heads=4), task, strategy=strategy,
        source=media_task(name), learning_rates=[5e-3, 2e-2], epochs=3, quiet=True,
    )  # fmt: skip
    adapted = result.model
    assert result.learning_rate
    assert all(torch.equal(before[n], p) for n, p in model.whole.named_parameters())
    own = {n for n, _ in adapted.composite.rest(adapted.hf)}
    assert own
    after = dict(adapted.whole.named_parameters())
    assert {n for n in own if torch.equal(before[n], after[n])} == own
    assert {n for n in after if not torch.equal(before[n], after[n])}
    # The composite answers as the trained language model does, on text and on media.
    ids = torch.tensor([task.encode(adapted, "test").tokens[0]])
    with torch.no_grad():
        said = adapted.whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        mine = adapted.hf(input_ids=ids).logits
    torch.testing.assert_close(said, mine)
    assert not torch.allclose(mine, model.hf(input_ids=ids).logits)
    media = media_task(name)
    expected = whole_logits(adapted, media, media["test"][0])
    found = adapted.hf_logits(media.encode(adapted, media["test"][:1]).batch([0]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # The result alone gives the same model again.
    result.save(tmp_path / "result")
    again = cl.TransferResult.load(tmp_path / "result", model).model
    assert again.fingerprint() == adapted.fingerprint()
    if name != "ultravox-like":  # which AutoConfig does not know
        adapted.save(tmp_path / "model")
        # Voxtral's own processor needs the tokenizer of another library.
        how = adapted.composite.processor if name == "voxtral" else None
        loaded = cl.load(tmp_path / "model", processor=how)
        assert loaded.fingerprint() == adapted.fingerprint()
        written = [
            m.whole.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                             max_new_tokens=5, do_sample=False)
            for m in (adapted, loaded)
        ]  # fmt: skip
        assert torch.equal(*written)
        batch = media.encode(loaded, media["test"][:1]).batch([0])
        torch.testing.assert_close(loaded.hf_logits(batch), expected, rtol=1e-4, atol=1e-5)


def test_in_16_bits_the_whole_follows_the_adapter():
    model = composite("qwen2-audio")
    model.whole.to(torch.bfloat16)
    model = cl.load(model.whole, processor=model.composite.processor)
    task = text_task()
    result = cl.transfer(
        model,
        cl.Circuit.of(["a0.h1"], n_layers=2, n_heads=4),
        task,
        learning_rates=[2e-2],
        epochs=3,
        quiet=True,
    )
    adapted = result.model
    assert adapted.adapter is not None
    ids = torch.tensor([task.encode(adapted, "test").tokens[0]])
    with torch.no_grad():
        whole = adapted.whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert torch.equal(whole, adapted.hf(input_ids=ids).logits)
        assert not torch.equal(whole, model.whole(input_ids=ids).logits)
    plain = cl.merge(adapted, task).model
    assert plain.takes_media
    assert plain.whole.dtype == plain.dtype == torch.bfloat16


def test_clones_are_independent_and_whole():
    model = composite("voxtral")
    twin = model.clone()
    assert twin.fingerprint() == model.fingerprint()
    with torch.no_grad():
        twin.hf.get_output_embeddings().weight.add_(1)
    assert twin.fingerprint() != model.fingerprint()
    ids = torch.tensor([[1, 2, 3]])
    said = twin.whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(said, twin.hf(input_ids=ids).logits)
    # The encoder counts too.
    other = model.clone()
    with torch.no_grad():
        next(p for _, p in other.composite.rest(other.hf)).add_(1)
    assert other.fingerprint() != model.fingerprint()


def test_several_words_and_replay_mix_text_and_media():
    model, media = composite("qwen2-audio"), media_task("qwen2-audio")
    words = {"bad": (" bad", " one two"), "good": (" good", " three four")}
    rows = {
        pool: [{**e.fields, "id": e.id, "label": e.label} for e in media[pool]]
        for pool in ("validation", "test")
    } | {
        "train": [
            {**e.fields, "id": e.id, "label": e.label} for e in (*media["pool_a"], *media["pool_b"])
        ]
    }
    long = cl.Task.from_records(rows, template="{audio} {text} ->", labels=words)
    encoded = long.encode(model, "validation")
    batch = encoded.batch(range(3))
    assert batch.n_rows > 1
    torch.testing.assert_close(model.label_logits(batch), model.hf_label_logits(batch))
    loss = batch.readout.losses(model, batch, model.hf)
    alone = [
        e.readout.losses(model, e, model.hf)
        for e in (batch.part(range(n, n + 1)) for n in range(3))
    ]
    torch.testing.assert_close(loss, torch.cat(alone))
    both = text_task().encode(model, "validation") + media.encode(model, "validation")
    assert len(both.features) == len(both)
    mixed = both.batch([0, len(both) - 1])
    assert mixed.places.any(1).tolist() == [False, True]
    apart = torch.cat([model.hf_logits(both.batch([i])) for i in (0, len(both) - 1)])
    torch.testing.assert_close(model.hf_logits(mixed), apart)
    taken = both.take([len(both) - 1])
    torch.testing.assert_close(model.hf_logits(taken.batch([0])), apart[1:])


@pytest.mark.slow
def test_counterfactual_sounds_stand_in_as_their_own():
    plain, rows = media_task("qwen2-audio"), {}
    pools = {name: plain[name] for name in ("validation", "test")}
    pools["train"] = (*plain["pool_a"], *plain["pool_b"])
    for name, pool in pools.items():
        rows[name] = [
            {
                **e.fields,
                "id": e.id,
                "label": e.label,
                "counterfactual_audio": medium("qwen2-audio", 300 + int(e.id)),
            }
            for e in pool
        ]
    task = cl.Task.from_records(rows, template=plain.template, labels=plain.labels)
    model = cl.finetune(
        composite("qwen2-audio"), task, learning_rate=1e-2, epochs=4, batch_size=8, quiet=True
    )
    baseline = cl.label_balanced_mean(model, task, reference="counterfactual", quiet=True)
    encoded = baseline.encode(model, task, task["validation"])
    batch = encoded.batch([0, 1])
    other = [
        cl.Example(e.id, {**e.fields, **e.counterfactual}, e.label) for e in task["validation"][:2]
    ]
    expected = task.encode(model, other).batch([0, 1])
    torch.testing.assert_close(batch.partner.values, expected.values)
    assert not torch.equal(batch.values, batch.partner.values)


# -- how sounds and images are given ---------------------------------------------------------------


def test_files_are_found_beside_the_data(tmp_path):
    model = composite("qwen2-audio")
    (tmp_path / "clips").mkdir()
    with (tmp_path / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "audio", "text", "label"])
        for n in range(200):
            sound = medium("qwen2-audio", n)
            name = f"clips/{n}.wav"
            wavfile.write(tmp_path / name, RATE, (sound.samples * 32767).astype(np.int16))
            writer.writerow([n, name, f"one w{n}", ("bad", "good")[n % 2]])
    task = cl.Task.from_csv(tmp_path / "data.csv", template="{audio} {text} ->")
    same = media_task("qwen2-audio")
    encoded = task.encode(model, "test")
    assert encoded.features[0].places.any()
    # Rounded to 16 bits, but the same sound.
    by_id = task["test"][0]
    exact = cl.Example("x", {**by_id.fields, "audio": medium("qwen2-audio", int(by_id.id))}, "bad")
    near = task.encode(model, [exact]).features[0].values
    assert torch.allclose(encoded.features[0].values, near, atol=0.05)
    assert by_id.text.startswith("one")
    # The task is what is in the files, not what they are called.
    fingerprint = task.fingerprint()
    first = task["pool_a"][0].fields["audio"]
    wavfile.write(first, RATE, np.zeros(2000, np.int16))
    assert task.fingerprint() != fingerprint
    assert same.fingerprint() == media_task("qwen2-audio").fingerprint()


@pytest.mark.parametrize("form", ["dict", "tuple", "bytes", "decoder", "rate"])
def test_sounds_as_libraries_give_them(form):
    sound = medium("qwen2-audio", 1)
    raw = io.BytesIO()
    wavfile.write(raw, RATE, sound.samples)

    class Decoder:
        def get_all_samples(self):
            class Samples:
                data = torch.tensor(np.stack([sound.samples] * 2))
                sample_rate = RATE

            return Samples

    given = {
        "dict": {"array": sound.samples, "sampling_rate": RATE, "path": None},
        "tuple": (sound.samples, RATE),
        "bytes": {"bytes": raw.getvalue(), "path": "x.wav"},
        "decoder": Decoder(),
        "rate": cl.Audio(sound.at(8000), 8000),
    }[form]
    found = media_value("audio", given, "Row 1")
    assert isinstance(found, cl.Audio)
    if form == "rate":
        assert found.rate == 8000
        assert (
            np.abs(found.at(RATE)[200:-200] - sound.samples[200 : len(found.at(RATE)) - 200]).max()
            < 0.02
        )
    else:
        assert found == sound
        assert hash(found) == hash(sound)
        assert found.seconds == pytest.approx(len(sound.samples) / RATE)


@pytest.mark.parametrize(
    ("samples", "rate", "says"),
    [
        (np.zeros((2, 5)), RATE, "one row of samples"),
        (np.zeros(0), RATE, "one row of samples"),
        (np.zeros(5, np.int16), RATE, "floats between -1 and 1"),
        (np.array([0.0, np.nan]), RATE, "NaN"),
        (np.zeros(5), 0, "rate"),
        (np.zeros(5), None, "rate"),
        (np.zeros(5), float("nan"), "rate"),
        (np.array([0.0, 3000.0]), RATE, "divide them by their full scale"),
    ],
)
def test_sounds_that_are_none(samples, rate, says):
    with pytest.raises(cl.InputError, match=says):
        unchecked(cl.Audio, samples, rate)


def test_what_cannot_be_read_is_named(tmp_path):
    model, plain = composite("qwen2-audio"), cl.load(qwen2_vl()[0], tokenizer())
    task = media_task("qwen2-audio")
    bad = cl.Example("q", {"audio": "lost.wav", "text": "one"}, "bad")
    with pytest.raises(cl.InputError, match="no file"):
        task.encode(model, [bad])
    with pytest.raises(cl.InputError, match=r"pathlib\.Path, circuitlens\.Audio"):
        task.encode(model, [cl.Example("q", {"audio": 3, "text": "one"}, "bad")])
    with pytest.raises(cl.InputError, match="takes text only"):
        media_task("qwen2-audio").encode(cl.load(model.hf, tokenizer()), "test")
    with pytest.raises(cl.InputError, match="processor"):
        task.encode(plain, "test")
    (tmp_path / "bad.wav").write_bytes(b"RIFF nothing")
    with pytest.raises(cl.InputError, match="could not be read"):
        cl.Audio.load(tmp_path / "bad.wav")
    with pytest.raises(cl.InputError, match="could not be read"):
        cl.Audio.load(tmp_path / "none.wav")
    pixels = np.zeros((4, 4, 3), np.uint8)
    rows = [{"text": f"one w{n}", "image": pixels, "label": "ab"[n % 2]} for n in range(200)]
    labels = {"a": " bad", "b": " good"}
    media = cl.Task.from_records(rows, template="{image} {text}", labels=labels)
    with pytest.raises(cl.InputError, match="no image_token"):
        media.encode(model, "test")
    model.save(tmp_path / "model")
    with pytest.raises(cl.InputError, match="leave labels out"):
        cl.load(tmp_path / "model", labels=["a", "b"])
    with pytest.raises(cl.InputError, match="takes text only"):
        cl.load(model.hf, processor=Frames())
    other = composite("ultravox-like")
    other.composite.processor = type("Crowded", (Frames,), {"__call__": many})()
    with pytest.raises(cl.InputError, match="context"):
        task.encode(other, task["test"][:1])


def many(self, text, audio, **options):
    ids = self.tokenizer([" ".join([self.audio_token] * 140)], return_tensors="pt")
    return {**ids, "audio_values": torch.zeros(1, 140, 16)}


def test_a_field_called_audio_is_text_for_a_model_of_text():
    rows = [{"audio": f"one w{n}", "label": "ab"[n % 2]} for n in range(200)]
    task = cl.Task.from_records(rows, template="{audio} ->", labels={"a": " bad", "b": " good"})
    model = cl.load(composite("qwen2-audio").hf, tokenizer())
    encoded = task.encode(model, "test")
    assert not encoded.features
    assert VOCABULARY.index("one") in encoded.tokens[0]


def test_a_composite_that_answers_otherwise_with_media_is_refused(monkeypatch):
    model, task = composite("ultravox-like"), media_task("ultravox-like")
    kind = type(model.whole)
    real = kind.forward

    def louder(self, *args, audio_values=None, **options):
        found = real(self, *args, audio_values=audio_values, **options)
        if audio_values is not None:
            found.logits = found.logits * 2
        return found

    monkeypatch.setattr(kind, "forward", louder)
    with pytest.raises(cl.UnsupportedModelError, match="otherwise than the whole"):
        task.encode(model, "test")


def test_images_with_positions_of_several_axes_are_refused():
    images = pytest.importorskip("PIL.Image")
    model = cl.load(qwen2_vl()[0], processor=Patches())
    ids = model.tokenizer(f"one {MARKS['image']} two ->")["input_ids"]
    with pytest.raises(cl.UnsupportedModelError, match="positions of several axes"):
        model.features(ids, {"image": images.new("RGB", (16, 16), (200, 30, 90))})


def test_positions_of_several_axes_are_for_text_only():
    model = cl.load(qwen2_vl()[0], tokenizer())
    task = text_task()
    batch = task.encode(model, "test").batch(range(3))
    torch.testing.assert_close(model.logits(batch), model.hf_logits(batch))
    result = cl.transfer(
        model,
        cl.Circuit.of(["a0.h1"], n_layers=2, n_heads=4),
        task,
        learning_rates=[2e-2],
        epochs=1,
        quiet=True,
    )
    assert type(result.model.whole).__name__ == "Qwen2VLForConditionalGeneration"


def test_an_encoder_decoder_is_refused():
    import transformers as hf

    sizes = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2,
             "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "pad_token_id": 1, "bos_token_id": 0,
             "eos_token_id": 2, "decoder_start_token_id": 2}  # fmt: skip
    model = hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**sizes, num_mel_bins=8, max_source_positions=8, max_target_positions=8)
    )
    with pytest.raises(cl.UnsupportedModelError):
        cl.load(model)


# -- what a new user tried ------------------------------------------------------------------------


def test_predict_hears(tmp_path):
    model, task = composite("qwen2-audio"), media_task("qwen2-audio")
    model.prompt = task.prompt
    examples = task["test"][:3]
    expected = evaluated(model, task, examples)
    found = cl.predict(model, [dict(e.fields) for e in examples], quiet=True)
    assert found["p(bad)"].tolist() == pytest.approx(expected, abs=1e-6)
    sound = examples[0].fields["audio"]
    wavfile.write(tmp_path / "a.wav", RATE, sound.samples)
    text = {"text": examples[0].fields["text"]}
    by_file = cl.predict(model, [{"audio": str(tmp_path / "a.wav"), **text}], quiet=True)
    assert by_file["p(bad)"][0] == pytest.approx(expected[0], abs=1e-4)
    beside = cl.predict(model, [{"audio": "a.wav", **text}], folder=tmp_path, quiet=True)
    assert beside["p(bad)"][0] == by_file["p(bad)"][0]
    with pytest.raises(cl.InputError, match="no file"):
        cl.predict(model, [{"audio": "lost.wav", **text}], quiet=True)
    with pytest.raises(cl.InputError, match="Text 1 has the audio int"):
        cl.predict(model, [{"audio": 3, **text}], quiet=True)


def evaluated(model, task, examples):
    logits = model.hf_label_logits(task.encode(model, examples).batch(range(len(examples))))
    return logits.double().softmax(1)[:, 0].tolist()


def test_sounds_longer_than_the_encoder_hears_are_warned_of_once(caplog):
    model, task = composite("qwen2-audio"), media_task("qwen2-audio")
    long = cl.Audio(np.zeros(3 * RATE), RATE)
    examples = [cl.Example(str(n), {"audio": long, "text": "one"}, "bad") for n in range(3)]
    task.encode(model, task["test"][:3])
    assert "hears the first" not in caplog.text
    task.encode(model, examples)
    assert caplog.text.count("hears the first 1 s of a sound") == 1
    short = cl.Audio(np.zeros(50), RATE)
    with pytest.raises(cl.InputError, match="too short"):
        task.encode(model, [cl.Example("s", {"audio": short, "text": "one"}, "bad")])


def test_the_encoder_has_no_dropout_whatever_mode_it_is_in():
    model, task = composite("qwen2-audio"), media_task("qwen2-audio")
    tower = model.whole.model.audio_tower
    tower.dropout = tower.layers[0].dropout = 0.5
    first = task.encode(model, "test").features[0].values
    model.whole.train()
    again = task.encode(model, "test").features[0].values
    assert torch.equal(first, again)
    assert model.whole.training


def test_images_are_what_is_in_them(tmp_path):
    images = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 4), dtype=np.uint8)
    clear = images.fromarray(pixels)
    clear.save(tmp_path / "x.png")
    model = composite("llava")
    ids = model.tokenizer("<image> one ->")["input_ids"]
    given = (tmp_path / "x.png", clear, clear.convert("RGB"))
    a, b, c = (model.features(ids, {"image": value})[1].values for value in given)
    assert torch.equal(a, b)
    assert torch.equal(b, c)
    assert len({digest_of("image", value) for value in given}) == 1
    palettes = []
    for n in range(3):
        picture = images.new("P", (4, 4))
        picture.putpalette([n, n, n] * 256)
        palettes.append(digest_of("image", picture))
    assert len(set(palettes)) == 3
    for wrong in (pixels / 255, pixels.transpose(2, 0, 1).astype(np.int64)):
        with pytest.raises(cl.InputError, match="Row 7: An image is an array of bytes"):
            media_value("image", wrong, "Row 7")


def test_a_sound_is_the_same_from_a_file_and_in_memory(tmp_path):
    sound = medium("qwen2-audio", 3)
    wavfile.write(tmp_path / "a.wav", RATE, sound.samples)
    assert digest_of("audio", tmp_path / "a.wav") == digest_of("audio", sound)


def test_captions_called_image_are_text_however_long():
    rows = [
        {"image": f"{'a caption ' * 40}{n}", "label": ("bad", "good")[n % 2]} for n in range(80)
    ]
    task = cl.Task.from_records(rows, template="{image} ->")
    assert task["test"][0].text.startswith("a caption")


def test_n_grams_of_sounds_alone_are_the_majority():
    task = media_task("qwen2-audio")
    silent = replace(task, template="{audio} ->", pools=task.pools.__class__(
        *[tuple(replace(e, fields={"audio": e.fields["audio"]}) for e in task[pool])
          for pool in ("pool_a", "pool_b", "validation", "test")]))  # fmt: skip
    both = [simple_rival(silent, name).result for name in ("majority", "n-grams")]
    assert both[0].counts == both[1].counts


def test_a_model_of_a_class_of_ones_own_is_saved_whole_and_says_how_to_load_it(tmp_path):
    model = composite("ultravox-like")
    model.save(tmp_path)
    assert (tmp_path / "tokenizer_config.json").is_file()
    with pytest.raises(cl.InputError, match="saved as a Around, a class that transformers does"):
        cl.load(tmp_path)
    again = type(model.whole).from_pretrained(tmp_path)
    loaded = cl.load(again, processor=model.composite.processor)
    assert loaded.fingerprint() == model.fingerprint()


def test_a_processor_that_is_none_is_refused():
    for wrong in ("name", tokenizer()):
        with pytest.raises(cl.InputError, match="processor is a"):
            cl.load(composite("qwen2-audio").whole, processor=wrong)


def test_a_hook_that_only_looks_at_embeddings_leaves_the_features_in():
    model, task = composite("qwen2-audio"), media_task("qwen2-audio")
    batch = task.encode(model, "test").batch(range(2))
    seen = []
    found = model.logits(batch, {"embed.hook_out": lambda x: seen.append(x)})
    assert torch.equal(found, model.logits(batch))
    assert torch.equal(seen[0][batch.places], batch.values[batch.places])
