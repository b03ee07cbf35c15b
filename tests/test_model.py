from __future__ import annotations

import inspect
import logging
import resource
import subprocess
import sys
from dataclasses import replace
from functools import partial

import peft
import pytest
import torch
from helpers import ALL, FLOAT32_ONLY, answers, batch_of, loaded, prompts, tiny
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import (
    AutoModelForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
)

import circuitlens as cl
from circuitlens.models import weights
from circuitlens.models.hooked import HookedModel

TIED = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("name", ALL)
def test_both_views_agree_and_padding_changes_nothing(name):
    model = loaded(name)
    batch = batch_of(model, 9, 6)
    with torch.no_grad():
        hooked, native = model.logits(batch), model.hf_logits(batch)
        alone = [
            model.logits(replace(model.unlabelled(tokens[None]), n_suffix=batch.n_suffix))
            for tokens in (batch.input_ids[0], batch.input_ids[1, 3:])
        ]
    # Some families take norms or softmax in float32 whatever the dtype.
    tolerance = 2e-5 if name in FLOAT32_ONLY else 1e-9
    torch.testing.assert_close(hooked, native, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(hooked, torch.cat(alone), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ALL)
def test_label_logits_are_those_of_the_whole_vocabulary(name):
    model = loaded(name)
    batch = batch_of(model, 7, 5)
    with torch.no_grad():
        labels, every = model.label_logits(batch), model.logits(batch)
    torch.testing.assert_close(labels, answers(every, batch), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_only_the_decision_position_is_unembedded(name):
    model = loaded(name)
    batch = batch_of(model, 7, 5)
    seen = []
    see = lambda _module, _inputs, output: seen.append(tuple(output.shape))  # noqa: E731
    handle = model.hf.get_output_embeddings().register_forward_hook(see)
    with torch.no_grad():
        model.hf_logits(batch)
        model.logits(batch, {"unembed.hook_out": lambda x: seen.append(tuple(x.shape))})
    handle.remove()
    assert seen == [(2, 1, 97)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_float_dtype_agrees_with_hugging_face(dtype):
    model = cl.load(tiny("qwen2", dtype))
    batch = batch_of(model, 9, 9)
    with torch.no_grad():
        hooked, native = model.logits(batch), model.hf_logits(batch)
    assert hooked.dtype == dtype
    error = (hooked.double() - native.double()).abs().max()
    assert error <= 32 * torch.finfo(dtype).eps * native.double().abs().max()


@pytest.mark.parametrize("name", ALL)
def test_head_contributions_sum_to_the_attention_output(name):
    model = loaded(name)
    batch = batch_of(model, 7, 7)
    seen = {}
    layers = range(model.geometry.n_layers)
    hooks = {
        f"blocks.{n}.attn.o.hook_out": partial(lambda n, x: seen.update({n: x}), n) for n in layers
    }
    with torch.no_grad():
        model.logits(batch, hooks)
    contributions = model.head_contributions(batch)
    assert contributions.shape == (3, 2, 7, 4, 32)
    for layer in layers:
        bias = getattr(model.bridge.blocks[layer].attn.o.original_component, "bias", None)
        total = contributions[layer].sum(2) + (0 if bias is None else bias.detach())
        torch.testing.assert_close(total, seen[layer].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_starting_at_a_layer_gives_the_same_logits(name):
    model = loaded(name)
    batch = batch_of(model, 8, 5)
    for layer in (0, 1, 2):
        seen = []
        with torch.no_grad():
            full = model.logits(batch, {f"blocks.{layer}.hook_in": seen.append})
            # Other tokens: nothing below the layer may matter any more.
            other = replace(batch, input_ids=torch.full_like(batch.input_ids, 3))
            with model.starting_at(layer, seen[0]):
                again = model.logits(other if layer else batch)
            after = model.logits(batch)
        torch.testing.assert_close(again, full, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(after, full, rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_the_views_share_every_tensor(name):
    model = loaded(name)
    mine = {p.untyped_storage().data_ptr() for p in model.hf.parameters()}
    parts = torch.nn.Module.named_parameters(model.bridge)
    strangers = [n for n, p in parts if p.untyped_storage().data_ptr() not in mine]
    assert not strangers
    assert model.hf is not model.bridge.original_model


def test_the_hooked_view_takes_no_memory_for_weights():
    # In a process of its own, because peak memory never falls.
    script = """
import resource, torch, circuitlens as cl
from transformers import Qwen2Config, Qwen2ForCausalLM
config = Qwen2Config(vocab_size=20_000, hidden_size=1024, intermediate_size=4096,
    num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4)
cl.load(Qwen2ForCausalLM(Qwen2Config(vocab_size=50, hidden_size=8, intermediate_size=8,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)))
model = Qwen2ForCausalLM(config)
weights = sum(p.numel() * 4 for p in model.parameters())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
hooked = cl.load(model)
hooked.bridge
with torch.no_grad():
    hooked.logits(hooked.unlabelled(torch.ones(1, 4, dtype=torch.long)))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print((after - before) / weights)
"""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.2


@pytest.mark.parametrize("name", ALL)
def test_training_the_hugging_face_view_shows_in_the_hooks(name):
    model = cl.load(tiny(name))
    batch = batch_of(model, 6, 6)
    with torch.no_grad():
        before = model.logits(batch)
    optimizer = torch.optim.SGD(model.hf.parameters(), lr=0.1)
    model.hf_logits(batch).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        after, native = model.logits(batch), model.hf_logits(batch)
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(after, native, rtol=2e-5, atol=2e-5)


def test_save_pretrained_reloads_exactly(tmp_path):
    model = cl.load(tiny("gpt2"))
    model.bridge.state_dict()
    model.hf.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    for (name, a), (other, b) in zip(
        model.hf.named_parameters(), again.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)


def test_a_clone_has_weights_of_its_own():
    model = cl.load(tiny("qwen2"))
    fingerprint = model.fingerprint()
    copy = model.clone()
    assert copy.fingerprint() == fingerprint
    with torch.no_grad():
        next(copy.hf.parameters()).add_(1.0)
    assert model.fingerprint() == fingerprint != copy.fingerprint()


def test_a_hook_that_does_not_exist_or_fire_is_an_error():
    model = cl.load(tiny("qwen2"))
    batch = batch_of(model, 4)
    with pytest.raises(cl.UnsupportedModelError, match=r"no hook blocks\.9\.hook_in"):
        model.logits(batch, {"blocks.9.hook_in": lambda x: None})
    with (
        pytest.raises(cl.UnsupportedModelError, match="did not fire"),
        model.hooked({"blocks.0.hook_in": lambda x: None}),
    ):
        pass


def adapt_in_place(hf):
    peft.get_peft_model(hf, peft.LoraConfig(target_modules=["v_proj"]))


def assign(hf):
    hf.load_state_dict({name: 2 * value for name, value in hf.state_dict().items()}, assign=True)


def resize(hf):
    hf.resize_token_embeddings(120)


@pytest.mark.parametrize(
    ("rewire", "changed"),
    [
        (adapt_in_place, r"model\.layers\.0\.self_attn\.v_proj\.weight"),
        (assign, r"model\.embed_tokens\.weight"),
        (resize, r"lm_head\.weight"),
    ],
)
def test_a_model_rewired_after_it_was_hooked_is_refused(rewire, changed):
    model = cl.load(tiny("qwen2"))
    batch = batch_of(model, 5)
    rewire(model.hf)
    assert "Qwen2ForCausalLM, 3 layers" in repr(model)
    uses = [
        lambda: model.bridge,
        lambda: model.geometry,
        lambda: model.logits(batch),
        lambda: model.label_logits(batch),
        lambda: model.head_outputs(batch),
        lambda: model.head_contributions(batch),
    ]
    for use in uses:
        with pytest.raises(cl.InputError, match=rf"rewired.*\({changed} .*call cl\.load again"):
            use()


def test_tied_embeddings_that_were_resized_show_in_the_hooks():
    # Hugging Face keeps the parameter here, and gives it other data.
    config = Qwen2Config(**TIED)
    model = cl.load(Qwen2ForCausalLM(config))
    resize(model.hf)
    hooked, native = (logits(batch_of(model, 5)) for logits in (model.logits, model.hf_logits))
    assert native.shape == (1, 120)
    torch.testing.assert_close(hooked, native)


def test_a_merged_adapter_shows_in_the_hooks():
    model = cl.load(tiny("phi3"))
    batch = batch_of(model, 5)
    before = model.logits(batch).detach()
    adapted = peft.get_peft_model(model.hf, peft.LoraConfig(target_modules=["qkv_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    assert adapted.merge_and_unload() is model.hf
    with torch.no_grad():
        after = model.logits(batch)
        torch.testing.assert_close(after, model.hf_logits(batch), rtol=1e-9, atol=1e-9)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_the_hooks_follow_weights_to_another_type(name):
    model = cl.load(tiny(name, torch.float32))
    batch = batch_of(model, 7, 5)
    objects = list(model.hf.parameters())
    with torch.no_grad():
        model.hf.to(torch.bfloat16)
        hooked, native = model.logits(batch), model.hf_logits(batch)
        assert hooked.dtype == torch.bfloat16
        assert (hooked - native).abs().max() < 0.1 * native.abs().max()
        for parameter in model.hf.to(torch.float32).parameters():
            parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
        hooked, native = model.logits(batch), model.hf_logits(batch)
    torch.testing.assert_close(hooked, native, rtol=2e-5, atol=2e-5)
    assert all(a is b for a, b in zip(objects, model.hf.parameters(), strict=True))


def test_the_hooked_view_is_kept_while_weights_stay():
    model = cl.load(tiny("gpt2", torch.bfloat16))
    bridge = model.bridge
    model.hf.requires_grad_(False)
    next(model.hf.parameters()).add_(1)
    assert model.bridge is bridge


def test_hugging_face_s_view_has_dropout_only_in_a_trainer_s_hands():
    model = cl.load(tiny("gpt2"))
    batch = batch_of(model, 6, 6)
    with torch.no_grad():
        expected = model.hf_logits(batch)
        model.hf.train()
        model.hf.lm_head.eval()
        modes = [module.training for module in model.hf.modules()]
        assert torch.equal(model.hf_logits(batch), expected)
        assert [module.training for module in model.hf.modules()] == modes
        assert (model.hf_logits(batch, model.hf) - expected).abs().max() > 1e-3
        # Only part of it is in training.
        model.hf.eval()
        model.hf.transformer.h.train()
        assert torch.equal(model.hf_logits(batch), expected)


def test_the_hooked_view_has_no_dropout():
    batch = prompts(6, 6)
    # Built of a model that is in training.
    model = HookedModel(tiny("gpt2"))
    model.hf.train()
    with torch.no_grad():
        expected = HookedModel(tiny("gpt2")).logits(batch)
        assert torch.equal(model.logits(batch), expected)
        model.bridge.train()
        assert torch.equal(model.logits(batch), expected)


def test_a_model_is_said_to_be_loaded_when_it_is(caplog):
    caplog.set_level(logging.INFO, "circuitlens")
    cl.load(tiny("qwen2"))
    assert caplog.messages == [message for message in caplog.messages if "Qwen2" in message] != []
    caplog.clear()
    with pytest.raises(cl.UnsupportedModelError):
        cl.load(MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=50)))
    assert not [record for record in caplog.records if "Loaded" in str(record.msg)]


def rewired(hf):
    build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config, model_name="x")
    return hf


WRAPPED = {
    "PeftModel": lambda hf: peft.get_peft_model(hf, peft.LoraConfig(target_modules=["v_proj"])),
    "prompt": lambda hf: peft.get_peft_model(
        hf, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    ),
    "adapter": lambda hf: WRAPPED["PeftModel"](hf) and hf,
    "bridge": lambda hf: HookedModel(hf).bridge,
    "rewired": rewired,
    "compiled": torch.compile,
    "parallel": torch.nn.DataParallel,
    "module": lambda hf: hf.model.layers,
    "weights": lambda hf: hf.state_dict(),
    "nothing": lambda hf: None,
}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("PeftModel", r"PeftModel\b.*cl\.load\(model\.merge_and_unload\(\), …\)"),
        ("prompt", r"PeftModelForCausalLM\b.*give the model without it"),
        ("adapter", r"model\.layers\.0\.self_attn\.v_proj of Qwen2ForCausalLM.*merge_and_unload"),
        ("bridge", r"TransformerBridge of TransformerLens.*loaded again"),
        ("rewired", r"model\.\S+ of Qwen2ForCausalLM is a \w+Bridge.*load .* again"),
        ("compiled", r"OptimizedModule.*cl\.load\(model\._orig_mod, …\)"),
        ("parallel", r"DataParallel.*cl\.load\(model\.module, …\)"),
        ("module", r"ModuleList.*hub name, a local folder or a transformers\.PreTrainedModel"),
        ("weights", r"OrderedDict.*hub name"),
        ("nothing", r"NoneType.*hub name"),
    ],
)
def test_what_is_no_plain_model_is_named_with_the_remedy(kind, message):
    # As users call it: tests check the types of arguments beforehand.
    load = inspect.unwrap(cl.load)
    with pytest.raises(cl.InputError, match=message):
        load(WRAPPED[kind](tiny("qwen2")))


def test_an_adapter_beside_the_weights_is_not_loaded_unawares(tmp_path):
    hf = tiny("qwen2", torch.float32)
    hf.save_pretrained(tmp_path)
    WRAPPED["PeftModel"](hf).save_pretrained(tmp_path)
    with pytest.raises(cl.InputError, match=r"v_proj .* is a layer of a PEFT adapter"):
        cl.load(tmp_path)


def test_a_loaded_model_is_loaded_already():
    model = cl.load(tiny("qwen2"))
    assert cl.load(model) is model
    with pytest.raises(cl.InputError, match=r"is a HookedModel already.*cl\.load\(model\.hf, …\)"):
        cl.load(model, device="cpu")


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"])
def test_devices_that_are_not_there_are_refused_before_anything_is_loaded(device):
    with pytest.raises(cl.InputError, match=rf"no device '{device}' here: give device=cpu"):
        cl.load("no/model", device=device)


@pytest.mark.parametrize("dtype", ["fp16", "nn", torch.int8])
def test_dtypes_that_are_none_are_refused(dtype):
    with pytest.raises(cl.InputError, match=rf"dtype '{dtype}': .*auto, float32, bfloat16"):
        cl.load("no/model", dtype=dtype)


def test_dtypes_are_taken_by_name(shared):
    folder = shared / "models" / "nusa-tiny-ind"
    assert cl.load(folder, dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    assert cl.load(folder, dtype=torch.float64).dtype == torch.float64


def test_models_without_attention_heads_are_refused_by_name():
    mamba = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=50))
    with pytest.raises(cl.UnsupportedModelError, match="MambaForCausalLM has no attention heads"):
        cl.load(mamba)


def test_models_that_are_no_causal_language_models_are_refused(tmp_path):
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(cl.UnsupportedModelError, match="t5 model"):
        cl.load(tmp_path)


def test_missing_folders_and_tokenizers_are_named(tmp_path):
    with pytest.raises(cl.InputError, match="does not exist"):
        cl.load(tmp_path / "nothing")
    with pytest.raises(cl.InputError, match=r"has no config\.json"):
        cl.load(tmp_path)
    tiny("qwen2", torch.float32).save_pretrained(tmp_path)
    with pytest.raises(cl.InputError, match="No tokenizer was found"):
        cl.load(tmp_path)


def test_a_model_in_memory_asks_for_a_tokenizer_only_when_text_is_encoded(toy_task):
    model = cl.load(tiny("qwen2"))
    with pytest.raises(cl.InputError, match="tokenizer="):
        toy_task.encode(model, toy_task["test"])


def test_a_tied_embedding_stays_tied():
    model = cl.load(Qwen2ForCausalLM(Qwen2Config(**TIED)))
    inner = model.bridge.original_model
    assert inner.get_input_embeddings().weight is not None
    pointers = {
        model.hf.lm_head.weight.data_ptr(),
        model.hf.model.embed_tokens.weight.data_ptr(),
        *(p.data_ptr() for p in inner.parameters() if p.shape == (50, 16)),
    }
    assert len(pointers) == 1


def test_the_shared_checkpoint_loads(shared):
    model = cl.load(shared / "models" / "nusa-tiny-ind")
    assert (model.geometry.n_layers, model.geometry.n_heads, model.geometry.n_kv_heads) == (4, 8, 4)
    assert model.tokenizer.padding_side == "left"


@pytest.mark.parametrize("was_on", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_bars_of_transformers_are_left_as_they_were(was_on, fails, tmp_path):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if was_on else logging.disable_progress_bar)()
    try:
        model = cl.load(tiny("qwen2"))
        model.save(tmp_path / "m")
        if fails:
            (tmp_path / "m" / "model.safetensors").write_bytes(b"nothing")
            with pytest.raises(Exception):  # noqa: B017, PT011
                weights.load_weights(str(tmp_path / "m"), "auto", None)
        assert logging.is_progress_bar_enabled() == was_on
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def test_why_a_tokenizer_cannot_be_loaded_is_said(tmp_path, monkeypatch):
    cause = ImportError("you need sentencepiece")

    def missing(*_, **__):
        raise cause

    monkeypatch.setattr(weights.AutoTokenizer, "from_pretrained", missing)
    with pytest.raises(cl.InputError, match="you need sentencepiece") as caught:
        weights.load_tokenizer("somewhere", None)
    assert caught.value.__cause__ is cause


def test_memory_that_runs_out_while_hooking_is_said_to_be_that(monkeypatch):
    from transformer_lens.model_bridge import sources

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sources, "build_bridge_from_module", full)
    with pytest.raises(cl.InputError, match="not enough memory on cpu to hook Qwen2ForCausalLM"):
        cl.load(tiny("qwen2"))
