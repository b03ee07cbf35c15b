from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers import ALL, loaded, tiny
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from torch import nn

import circuitlens as cl
from circuitlens.adapt.headslice import (
    HeadSliceConfig,
    HeadSliceLayer,
    HeadSliceModel,
    geometry_of,
    registration,
    selected_slices,
)
from circuitlens.adapt.masking import masked_adamw, only_selected_train
from circuitlens.models.geometry import norm_parameters, selection_masks
from circuitlens.nodes import Head

# Layer 1 has none, two heads of layer 2 share a key/value head, and rows have gaps.
HEADS = ("a0.h1", "a2.h0", "a2.h1", "a2.h3")


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 90, (4, 7), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, seed: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(seed)).logits


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base's parameters under the names that they have without adapter."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if "headslice" not in name
    }


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def leaves(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    return {
        n: p for n, p in model.named_parameters() if "headslice" in n and n.endswith(f".{adapter}")
    }


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adapted(name: str = "qwen2", dtype: torch.dtype | None = None, **options) -> PeftModel:
    """A tiny model with an adapter whose leaves are not zero."""
    options = {"heads": HEADS, **options}
    return randomised(get_peft_model(tiny(name, dtype), HeadSliceConfig(**options)))


@torch.no_grad()
def randomised(model: PeftModel, adapter: str = "default", seed: int = 0) -> PeftModel:
    generator = torch.Generator().manual_seed(seed)
    for leaf in leaves(model, adapter).values():
        leaf.copy_(0.1 * torch.randn(leaf.shape, generator=generator))
    return model


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, n: int = 5) -> torch.Tensor:
    """A few steps with clipping on batches of their own; the norms before clipping."""
    norms = []
    for seed in range(n):
        optimizer.zero_grad()
        (30 * model(input_ids=tokens(seed)).logits.square().mean()).backward()
        norms.append(nn.utils.clip_grad_norm_(trainable(model), 1.0))
        optimizer.step()
    return torch.stack(norms)


# -- where the slices are -------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_geometry_is_that_of_the_hooked_model(name):
    expected = loaded(name).geometry
    hf = tiny(name)
    plain = geometry_of(hf)
    get_peft_model(hf, HeadSliceConfig(heads=HEADS))  # in place
    for found in (plain, geometry_of(hf)):
        for size in ("n_layers", "n_heads", "n_kv_heads", "d_head", "d_model"):
            assert getattr(found, size) == getattr(expected, size), size
        assert [found.slices(h) for h in found] == [expected.slices(h) for h in expected]


def test_finding_them_draws_no_random_number_and_leaves_the_configuration():
    hf = tiny("falcon_rw")
    state, config = torch.get_rng_state(), copy.deepcopy(hf.config)
    geometry_of(hf)
    assert torch.equal(torch.get_rng_state(), state)
    assert hf.config == config
    assert hf.config._attn_implementation == config._attn_implementation


# -- training -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_training_leaves_is_training_slices(name):
    # Oracle: gradient masking on full weights, with the slices of the hooked model.
    hf = tiny(name, torch.float64)
    reference = copy.deepcopy(hf)
    geometry = loaded(name).geometry
    pieces = [piece for head in HEADS for piece in geometry.slices(Head.parse(head))]
    masks = selection_masks(reference, pieces, norm_parameters(reference))
    with only_selected_train(reference, masks):
        optimizer = masked_adamw(reference, masks, learning_rate=1e-2, weight_decay=0.0)
        norms = steps(reference, optimizer)
    assert norms.min() > 1  # or clipping would not be seen

    before = bits(hf)
    model = get_peft_model(hf, HeadSliceConfig(heads=HEADS))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    torch.testing.assert_close(steps(model, optimizer), norms)
    assert same_bits(bits(model), before)
    assert {id(p) for p in optimizer.state} == {id(p) for p in leaves(model).values()}
    counts = model.get_nb_trainable_parameters()[0]
    assert counts == sum(int(mask.sum()) for mask in masks.values())

    unmerged = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), unmerged)
    for key, expected in reference.named_parameters():
        after = merged.get_parameter(key)
        torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-9)
        frozen = ~masks.get(key, torch.zeros_like(after, dtype=torch.bool))
        assert torch.equal(after[frozen], before[key][frozen]), key


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_have_the_same_gradients(reentrant):
    model = adapted()
    model.train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=tokens()).logits.square().mean().backward()
        return [p.grad.clone() for p in leaves(model).values()]

    plain = gradients()
    assert all(bool(gradient.any()) for gradient in plain[:4])
    model.enable_input_require_grads()
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for now, before in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(now, before)


def test_the_trainer_trains_and_writes_leaves_only(tmp_path):
    model = get_peft_model(tiny("qwen2", torch.float32), HeadSliceConfig(heads=HEADS))
    before = bits(model)
    data = [{"input_ids": row, "labels": row} for row in tokens()]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        save_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    transformers.Trainer(model, arguments, train_dataset=data).train()
    assert same_bits(bits(model), before)
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert saved.keys() == {name.removesuffix(".default") for name in leaves(model)}
    again = PeftModel.from_pretrained(tiny("qwen2", torch.float32), tmp_path / "checkpoint-2")
    model.eval()
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(model), logits(tiny("qwen2", torch.float32)))


# -- types ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2", "falcon_new"])
def test_leaves_on_bfloat16_are_float32(name):
    hf = tiny(name, torch.bfloat16)
    plain, before = logits(hf), bits(hf)
    model = get_peft_model(hf, HeadSliceConfig(heads=HEADS))
    assert {p.dtype for p in leaves(model).values()} == {torch.float32}
    assert torch.equal(logits(model), plain)  # leaves of zeros change no bit
    model(input_ids=tokens()).logits.float().square().mean().backward()
    assert {p.grad.dtype for p in leaves(model).values()} == {torch.float32}
    randomised(model)
    assert logits(model).dtype == torch.bfloat16
    acting = {n: m.weight for n, m in model.named_modules() if isinstance(m, HeadSliceLayer)}
    model.merge_adapter()
    for path, layer in model.named_modules():
        if isinstance(layer, HeadSliceLayer):
            # The sum is made in float32 and rounded once; that of a norm acts unrounded.
            assert torch.equal(layer.base_layer.weight, acting[path].bfloat16())
            assert acting[path].dtype == (
                torch.float32 if acting[path].ndim == 1 else torch.bfloat16
            )
            leaf, old = layer.headslice_weight["default"], before[_plain(path)]
            if leaf.ndim == 1:
                assert torch.equal(layer.base_layer.weight, (old.float() + leaf).bfloat16())
    model.unmerge_adapter()
    assert same_bits(bits(model), before)


def _plain(path: str) -> str:
    return f"{path.removeprefix('base_model.model.')}.weight"


def test_merging_in_bfloat16_changes_what_rounding_changes():
    model = adapted("llama", torch.bfloat16, norms="none")
    fine = copy.deepcopy(model).float()
    merged = model.merge_and_unload()
    exact = fine.merge_and_unload()
    for name, parameter in exact.named_parameters():
        assert torch.equal(merged.get_parameter(name), parameter.bfloat16()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gemma2", "gpt2", "qwen2", "bert", "modernbert"])
def test_norms_act_in_float32(name, dtype):
    # A step of training, which 16 bits beside a weight of 1 cannot hold.
    plain = logits(tiny(name, dtype))
    model = get_peft_model(tiny(name, dtype), HeadSliceConfig(heads=()))
    step = torch.finfo(dtype).eps / 8
    with torch.no_grad():
        for n, leaf in enumerate(leaves(model).values()):
            leaf.copy_(step * (1 + n % 3))
    moved = logits(model)
    assert moved.dtype == dtype
    # The same in float32, where the sums are exact.
    wide = get_peft_model(tiny(name, dtype).float(), HeadSliceConfig(heads=()))
    wide.load_state_dict({n: p.float() for n, p in model.state_dict().items()})
    exact = logits(wide)
    rounding = (plain.float() - logits(tiny(name, dtype).float())).abs().max()
    assert (moved.float() - exact).abs().max() <= 2 * rounding
    with torch.no_grad():
        for leaf in leaves(model).values():
            leaf.mul_(64)
    assert not torch.equal(logits(model), plain)
    acting = [m for m in model.modules() if isinstance(m, HeadSliceLayer)]
    for layer in acting:
        x = torch.randn(4, layer.weight.shape[0]).to(dtype)
        found = layer(x)
        base = copy.deepcopy(layer.base_layer).float()
        with torch.no_grad():
            base.weight += layer.headslice_weight["default"]
            if layer.bias is not None:
                base.bias += layer.headslice_bias["default"]
        torch.testing.assert_close(found, base(x.float()).to(dtype), rtol=0.01, atol=1e-3)


def test_autocast_chooses_the_type():
    model = adapted(dtype=torch.float32)
    exact = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=tokens()).logits
    out.float().square().mean().backward()
    assert {p.grad.dtype for p in leaves(model).values()} == {torch.float32}
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.1)


# -- merging, files, several adapters ---------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gpt_neox"])
def test_merging_is_undone_to_the_bit(name):
    model = adapted(name)
    before, out = bits(model), logits(model)
    model.merge_adapter()
    assert not same_bits(bits(model), before)
    torch.testing.assert_close(logits(model), out)
    with model.disable_adapter():  # unmerges
        assert torch.equal(logits(model), logits(tiny(name)))
    assert same_bits(bits(model), before)
    assert torch.equal(logits(model), out)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model), out)
    assert torch.equal(logits(model.unload()), logits(tiny(name)))


def test_infinities_are_not_merged_if_one_asks():
    model = adapted()
    before = bits(model)
    leaf = next(iter(leaves(model).values()))
    with torch.no_grad():
        leaf[0, 0] = torch.inf
    with pytest.raises(cl.InputError, match="'default' would write infinities or NaN"):
        model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "bert"])
def test_weights_are_read_with_their_leaves(name):
    model = adapted(name)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, HeadSliceLayer)}
    acting = {n: (m.weight, m.bias) for n, m in layers.items()}
    with model.disable_adapter():
        assert all(m.weight is m.base_layer.weight for m in layers.values())
    # What asks for a parameter, as the geometry does, is refused rather than given the base's.
    with pytest.raises(AttributeError, match=r"not an nn\.Parameter"):
        geometry_of(tiny(name)).output_weight(model.get_base_model(), Head(0, 1))
    model.merge_adapter()
    for path, layer in layers.items():
        assert torch.equal(layer.weight, acting[path][0])
        assert layer.bias is None or torch.equal(layer.bias, acting[path][1])


def test_a_file_holds_the_leaves_and_the_choice(tmp_path):
    model = adapted(heads=[Head(2, 1), "a0.h1"], kv_policy="group", norms="circuit")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    entries = sum(p.numel() for p in leaves(model).values())
    assert entries * 8 < file.stat().st_size < entries * 8 + 10_000
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "HEADSLICE"
    assert config["heads"] == ["a0.h1", "a2.h1"]
    assert (config["kv_policy"], config["norms"]) == ("group", "circuit")
    for lazily in (False, True):
        again = PeftModel.from_pretrained(tiny("qwen2"), tmp_path, low_cpu_mem_usage=lazily)
        assert again.peft_config["default"].chosen == (Head(0, 1), Head(2, 1))
        assert {p.dtype for p in leaves(again).values()} == {torch.float64}
        assert not trainable(again)
        assert torch.equal(logits(again), logits(model))
    further = PeftModel.from_pretrained(tiny("qwen2"), tmp_path, is_trainable=True)
    assert len(trainable(further)) == len(leaves(further))


def test_float32_leaves_of_a_bfloat16_model_keep_their_bits_in_files(tmp_path):
    model = adapted(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    for lazily in (False, True):
        again = PeftModel.from_pretrained(
            tiny("qwen2", torch.bfloat16), tmp_path, low_cpu_mem_usage=lazily
        )
        for name, leaf in leaves(again).items():
            assert torch.equal(leaf, leaves(model)[name]), name


_OTHER_PROCESS = """
import sys
import circuitlens
assert "peft" not in sys.modules and "torch" not in sys.modules
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
import circuitlens.adapt.headslice
folder = sys.argv[1]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder + "/base")
model = PeftModel.from_pretrained(model, folder + "/adapter")
generator = torch.Generator().manual_seed(0)
with torch.no_grad():
    tokens = torch.randint(5, 90, (4, 7), generator=generator)
    torch.save(model(input_ids=tokens).logits, folder + "/logits.pt")
"""


def test_another_process_loads_the_same_numbers(tmp_path):
    model = adapted(dtype=torch.float32)
    model.save_pretrained(tmp_path / "adapter")
    tiny("qwen2", torch.float32).save_pretrained(tmp_path / "base")
    subprocess.run([sys.executable, "-c", _OTHER_PROCESS, str(tmp_path)], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model))


def test_several_adapters_take_turns(tmp_path):
    plain = logits(tiny("qwen2"))
    model = adapted()
    first = logits(model)
    # Other heads, other modules: layer 1 is new, layer 2 is not in it.
    config = HeadSliceConfig(heads=["a0.h2", "a1.h0"], norms="circuit")
    model.add_adapter("second", config)
    assert torch.equal(logits(model), first)
    assert {id(p) for p in trainable(model)} == {id(p) for p in leaves(model).values()}
    randomised(model, "second", seed=1)
    model.set_adapter("second")
    assert {id(p) for p in trainable(model)} == {id(p) for p in leaves(model, "second").values()}
    second = logits(model)
    alone = randomised(get_peft_model(tiny("qwen2"), config), seed=1)
    torch.testing.assert_close(second, logits(alone))
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "second", "third")
    model.set_adapter("third")
    assert torch.equal(logits(model), second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    # Both at once: the sum of their leaves, merged in turn and taken out again.
    model.base_model.set_adapter(["default", "second"])
    both, before = logits(model), bits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both)
    model.unmerge_adapter()
    assert same_bits(bits(model), before)
    assert not torch.allclose(both, first)


def test_deleting_the_active_adapter_leaves_one_other_active_everywhere():
    model = adapted(heads=["a0.h0"], norms="none")
    for name, head in (("ind", "a0.h0"), ("jav", "a1.h0"), ("sun", "a2.h0")):
        model.add_adapter(name, HeadSliceConfig(heads=[head], norms="none"))
        randomised(model, name)
    model.add_adapter("all", HeadSliceConfig(heads=["a0.h0", "a1.h0", "a2.h0"], norms="none"))
    model.set_adapter("ind")
    expected = logits(model)
    model.set_adapter("all")
    model.delete_adapter("default")
    assert model.active_adapters == ["all"]
    model.delete_adapter("all")
    assert not [n for n, _ in model.named_parameters() if n.endswith((".all", ".default"))]
    # Layers 1 and 2 do not have "ind", and would each have taken the one that they have.
    assert model.active_adapter == "ind"
    assert {tuple(m.active_adapters) for m in model.modules() if isinstance(m, HeadSliceLayer)} == {
        ("ind",)
    }
    assert torch.equal(logits(model), expected)
    for name in ("ind", "jav", "sun"):
        model.delete_adapter(name)
    assert torch.equal(logits(model.unload()), logits(tiny("qwen2")))


def test_one_batch_for_several_adapters_is_refused():
    model = adapted()
    with pytest.raises(cl.InputError, match="set_adapter and one batch for each"):
        model(input_ids=tokens(), adapter_names=["default"] * 4)


# -- what is trained ------------------------------------------------------------------------


def counts(name: str = "qwen2", **options) -> dict[str, int]:
    """Trained entries by module, without the path to it."""
    model = get_peft_model(tiny(name), HeadSliceConfig(**options))
    found: dict[str, int] = {}
    for leaf, parameter in leaves(model).items():
        path = leaf.removeprefix("base_model.model.").split(".headslice")[0]
        found[path] = found.get(path, 0) + parameter.numel()
    return found


def test_key_value_heads_are_trained_by_policy_and_once():
    # d_model 32, d_head 8; heads 0 and 1 share a key/value head; q, k and v have biases.
    def sizes(heads: list[str], policy: str) -> list[int]:
        found = counts(heads=heads, kv_policy=policy, norms="none")
        return [found.get(f"model.layers.0.self_attn.{x}_proj", 0) for x in "qkvo"]

    row = 32 + 1
    assert sizes(["a0.h0"], "shared") == [8 * row, 8 * row, 8 * row, 8 * 32]
    assert sizes(["a0.h0"], "group") == [8 * row, 0, 0, 8 * 32]
    assert sizes(["a0.h0"], "frozen") == [8 * row, 0, 0, 8 * 32]
    assert sizes(["a0.h0", "a0.h1"], "shared") == [16 * row, 8 * row, 8 * row, 16 * 32]
    assert sizes(["a0.h0", "a0.h1"], "group") == [16 * row, 8 * row, 8 * row, 16 * 32]
    assert sizes(["a0.h0", "a0.h1"], "frozen") == [16 * row, 0, 0, 16 * 32]
    assert sizes(["a0.h1", "a0.h2"], "shared") == [16 * row, 16 * row, 16 * row, 16 * 32]
    assert sizes(["a0.h1", "a0.h2"], "group") == [16 * row, 0, 0, 16 * 32]


def test_without_groups_only_frozen_holds_keys_and_values_back():
    every = counts("gpt2", heads=["a0.h0"], norms="none")
    assert every == counts("gpt2", heads=["a0.h0"], norms="none", kv_policy="group")
    frozen = counts("gpt2", heads=["a0.h0"], norms="none", kv_policy="frozen")
    assert every["transformer.h.0.attn.c_attn"] == 3 * frozen["transformer.h.0.attn.c_attn"]


def test_projections_and_biases_are_chosen():
    only = counts(heads="a1.h0", projections="ov", norms="none", biases=False)
    assert only == {
        "model.layers.1.self_attn.v_proj": 8 * 32,
        "model.layers.1.self_attn.o_proj": 8 * 32,
    }


@pytest.mark.parametrize(
    ("name", "outside"),
    [
        ("qwen2", ["model.norm"]),
        ("opt", ["model.decoder.final_layer_norm"]),
        ("bloom", ["transformer.ln_f"]),
        ("bert", ["cls.predictions.transform.LayerNorm"]),
    ],
)
def test_norms_of_the_circuit_are_those_of_its_layers_and_the_final_one(name, outside):
    def norms(which: str) -> set[str]:
        found = counts(name, heads=["a1.h0"], norms=which)
        return set(found) - set(counts(name, heads=["a1.h0"], norms="none"))

    every, some = norms("all"), norms("circuit")
    assert every == {path.rpartition(".")[0] for path in norm_parameters(tiny(name))}
    assert some == {path for path in every if ".1." in path} | set(outside)
    assert len(some) == len(outside) + 2


@pytest.mark.parametrize("name", ["qwen3", "olmo2", "gemma3"])
def test_norms_of_queries_and_keys_are_trained_only_if_asked_for(name):
    asked = counts(name, heads=["a1.h0"], norms="circuit", qk_norms=True)
    extra = set(asked) - set(counts(name, heads=["a1.h0"], norms="circuit"))
    assert extra == {f"model.layers.1.self_attn.{x}_norm" for x in "qk"}
    assert len(counts(name, heads=(), qk_norms=True)) == len(counts(name, heads=())) + 2 * 3


def test_a_configuration_gives_the_masks_of_the_reference():
    hf = tiny("qwen2")
    config = HeadSliceConfig(heads=HEADS, kv_policy="group", biases=False, norms="none")
    masks = selection_masks(hf, list(selected_slices(geometry_of(hf), config)), [])
    model = get_peft_model(hf, config)
    assert sum(int(m.sum()) for m in masks.values()) == model.get_nb_trainable_parameters()[0]


def test_a_circuit_will_do(capsys):
    circuit = cl.Circuit.of(HEADS, 3, 4)
    model = get_peft_model(tiny("qwen2"), HeadSliceConfig(heads=circuit, task_type="CAUSAL_LM"))
    assert model.peft_config["default"].heads == HEADS
    assert isinstance(model.base_model, HeadSliceModel)
    assert type(model.get_base_model()).__name__ == "Qwen2ForCausalLM"
    model.print_trainable_parameters()
    entries = sum(p.numel() for p in leaves(model).values())
    assert f"trainable params: {entries:,d} " in capsys.readouterr().out


# -- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": ["3.5"]}, "'3.5' is not a head name"),
        ({"heads": HEADS, "kv_policy": "some"}, "no kv_policy 'some'; use one of shared, group"),
        ({"heads": HEADS, "norms": "final"}, "no norms 'final'; use one of all, circuit, none"),
        ({"heads": HEADS, "projections": ["q", "w"]}, "no projection 'w'; use one of q, k, v, o"),
        ({"heads": HEADS, "projections": []}, "No projection of the heads is chosen"),
        ({"norms": "none"}, "neither heads nor norms"),
        ({"heads": HEADS, "norms": "none", "qk_norms": True}, "qk_norms=True trains nothing"),
        ({"heads": HEADS, "task_type": "TOKEN_CLS"}, "TOKEN_CLS needs an output layer"),
    ],
)
def test_choices_that_cannot_be_are_refused(options, message):
    with pytest.raises(cl.InputError, match=message):
        HeadSliceConfig(**options)


def test_what_the_model_does_not_have_is_refused_and_the_model_left_alone():
    hf = tiny("qwen2")
    with pytest.raises(cl.InputError, match=r"no head a3\.h0: it has 3 layers of 4 heads"):
        get_peft_model(hf, HeadSliceConfig(heads=["a0.h0", "a3.h0"]))
    nothing = HeadSliceConfig(heads=["a0.h0"], projections="kv", norms="none", kv_policy="group")
    with pytest.raises(cl.InputError, match=r"kv_policy='group'.*nothing to train"):
        get_peft_model(hf, nothing)
    assert not [m for m in hf.modules() if isinstance(m, HeadSliceLayer)]
    assert all(p.requires_grad for p in hf.parameters())
    model = adapted()
    out = logits(model)
    with pytest.raises(cl.InputError, match=r"no head a0\.h9"):
        model.add_adapter("second", HeadSliceConfig(heads=["a0.h9"]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), out)


def test_models_without_heads_of_their_own_are_refused():
    config = HeadSliceConfig(heads=["a0.h0"])
    with pytest.raises(cl.UnsupportedModelError, match="needs a Hugging Face model, but got a Lin"):
        get_peft_model(nn.Linear(2, 2), config)
    sizes = {"vocab_size": 97, "hidden_size": 32, "embedding_size": 16, "intermediate_size": 48}
    albert = transformers.AlbertConfig(**sizes, num_hidden_layers=3, num_attention_heads=4)
    with pytest.raises(
        cl.UnsupportedModelError, match="AlbertForMaskedLM has 1 attention modules for 3 layers"
    ):
        get_peft_model(transformers.AlbertForMaskedLM(albert), config)


def test_adapters_of_another_method_are_refused():
    hf = tiny("qwen2")
    get_peft_model(hf, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(cl.UnsupportedModelError, match=r"q_proj already has an adapter of another"):
        get_peft_model(hf, HeadSliceConfig(heads=["a0.h0"]))


class _Linear4bit(nn.Linear):
    """Stands for bitsandbytes': weights packed as bytes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.full)


def test_quantised_weights_are_trained_on_but_not_merged():
    hf = tiny("llama", torch.float32)
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"):
        linear = hf.get_submodule(path)
        quantised = _Linear4bit(linear.in_features, linear.out_features, bias=False)
        quantised.full = linear.weight.detach()
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        quantised.weight = nn.Parameter(packed, requires_grad=False)
        hf.set_submodule(path, quantised)
    model = randomised(get_peft_model(hf, HeadSliceConfig(heads=["a0.h1"])))
    full = randomised(
        get_peft_model(tiny("llama", torch.float32), HeadSliceConfig(heads=["a0.h1"]))
    )
    assert torch.equal(logits(model), logits(full))
    before = bits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(cl.InputError, match=r"_proj has quantised weights \(_Linear4bit\)"):
            merge()
    assert same_bits(bits(model), before)


# -- registration ---------------------------------------------------------------------------


def test_registering_twice_changes_nothing():
    assert PeftType("HEADSLICE") is PeftType.HEADSLICE
    assert PeftType.HEADSLICE in list(PeftType)
    methods = list(PeftType)
    registration.register(HeadSliceConfig, HeadSliceModel)
    assert list(PeftType) == methods
    assert PEFT_TYPE_TO_CONFIG_MAPPING["HEADSLICE"] is HeadSliceConfig


def test_another_package_of_the_same_name_is_refused():
    with pytest.raises(cl.InputError, match="Another package has registered"):
        registration.register(HeadSliceConfig, nn.Module)


def test_a_peft_that_lacks_something_is_refused(monkeypatch):
    registration.require_peft()
    monkeypatch.delattr("peft.utils.register_peft_method")
    with pytest.raises(
        cl.InputError, match=rf"PEFT {peft.__version__} .* no peft.utils.register_peft_method: inst"
    ):
        registration.require_peft()
    monkeypatch.undo()
    base = peft.tuners.tuners_utils.BaseTuner
    monkeypatch.setattr(base, "__abstractmethods__", frozenset({"_create_and_replace", "merge"}))
    with pytest.raises(cl.InputError, match=r"common code .*: install peft>=0\.18"):
        registration.require_peft()


def test_it_is_not_imported_with_the_package():
    # Loading PEFT takes a second that --help and plain analyses need not wait for.
    package = Path(cl.__file__).parent
    users = [p for p in package.rglob("*.py") if "headslice" not in p.parts]
    assert not [p for p in users if "\nfrom peft" in p.read_text()]
