"""Files that were damaged, folders that vanish, data and models at the edge of what there is."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from helpers import shortened

import circuitlens as cl
from circuitlens.experiments.simple_rivals import simple_rival
from circuitlens.tasks import toy
from circuitlens.utils.storage import read_plain_json

OURS = (cl.InputError, cl.NotFiniteError, cl.UnsupportedModelError)
FAST = {"learning_rates": [3e-3], "epochs": 1, "quiet": True}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, toy_proxy, toy_task, toy_scores):
    """Two adapters, entries of the weights, and a comparison."""
    folder = tmp_path_factory.mktemp("saved")
    parts, near = (toy_proxy, toy_scores.top(3)), shortened(toy_task.to("near"))
    for strategy in ("circuit", "lora", "neurons"):
        found = cl.transfer(*parts, near, strategy=strategy, scores=toy_scores, **FAST)
        found.save(folder / strategy)
    grid = cl.compare(
        *parts, shortened(toy_task), ["near"], strategies=["norms"], seeds=[0], simple=False, **FAST
    )
    grid.save(folder / "grid")
    return folder


ADAPTERS = [
    f"{kind}/{name}"
    for kind in ("circuit", "lora")
    for name in ("adapter_config.json", "adapter_model.safetensors")
]
FILES = [*ADAPTERS, "neurons/weights.safetensors", "lora/result.json", "grid/comparison.json"]


def content(folder: Path, name: str, model: cl.HookedModel) -> object:
    """All that is read of the folder of a file, for comparison."""
    part = folder / name.split("/")[0]
    if part.name == "grid":
        return cl.Comparison.load(part).cells
    result = cl.TransferResult.load(part, model)
    assert result.model is not None
    return result.to_dict(), result.model.fingerprint()


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_or_read_as_it_was(name, saved, toy_proxy, tmp_path):
    chance = random.Random(name)
    whole = content(saved, name, toy_proxy)
    refused = []
    for _ in range(10):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(saved, tmp_path / "copy")
        file = tmp_path / "copy" / name
        data = bytearray(file.read_bytes())
        if chance.random() < 0.3:
            data = data[: chance.randrange(len(data))]
        else:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        try:
            found = content(tmp_path / "copy", name, toy_proxy)
        except OURS as error:
            refused.append(str(error))
        else:
            # A space in JSON that became a line end, or a checksum's name.
            assert found == whole
    assert len(refused) >= 4
    assert all(name.split("/")[0] in said for said in refused)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_is_refused(name, saved, toy_proxy, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    with pytest.raises(cl.InputError, match=name.split("/")[0]):
        content(tmp_path / "copy", name, toy_proxy)


@pytest.mark.parametrize("kind", ["circuit", "lora"])
def test_an_adapter_without_some_of_its_tensors_is_refused(kind, saved, toy_proxy, tmp_path):
    """PEFT only warns, and what is missing stays as it was initialised."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "copy"
    shutil.copytree(saved / kind, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file)
    with pytest.raises(cl.InputError, match="damaged, or was changed"):
        cl.TransferResult.load(folder, toy_proxy)
    # As one that somebody else made, which has no note.
    for name in ("result.json", "trained.json"):
        (folder / name).unlink()
    toy_proxy.save(tmp_path / "model")
    config = read_plain_json(folder / "adapter_config.json")
    config["base_model_name_or_path"] = str(tmp_path / "model")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(cl.InputError, match="missing adapter keys"):
        cl.load(folder)


def test_a_pickle_is_not_read_in_the_place_of_safetensors(saved, toy_proxy, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved / "lora", folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(cl.InputError, match="no longer has the trained tensors"):
        cl.TransferResult.load(folder, toy_proxy)


@pytest.mark.parametrize("gone", ["before", "meanwhile"])
def test_a_folder_that_vanishes_costs_the_file_and_not_the_result(
    gone, toy_proxy, toy_task, toy_scores, tmp_path, monkeypatch
):
    """What is asked to be saved is saved, in a folder that is made again."""
    result = cl.transfer(toy_proxy, toy_scores.top(2), shortened(toy_task.to("near")), **FAST)
    folder = tmp_path / "out"
    if gone == "meanwhile":
        result.save(folder)
    shutil.rmtree(folder, ignore_errors=True)
    result.save(folder)
    assert cl.TransferResult.load(folder) == result


# -- the edge -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "heads"),
    [
        pytest.param(1, 1, marks=pytest.mark.slow),
        pytest.param(1, 4, marks=pytest.mark.slow),
        pytest.param(3, 1, marks=pytest.mark.slow),
    ],
)
def test_a_model_of_one_layer_or_head_goes_all_the_way(layers, heads, toy_task, tmp_path):
    small = toy.toy_model(n_layers=layers, n_heads=heads, d_model=32, d_mlp=32)
    epochs = 10 if (layers, heads) == (3, 1) else 3
    model = cl.finetune(small, toy_task, **{**toy.TOY_FINETUNE, "epochs": epochs}, quiet=True)
    baseline = cl.label_balanced_mean(model, toy_task, allow_chance=True, quiet=True)
    scores = cl.relevance(model, toy_task, baseline, max_examples=20, quiet=True)
    assert scores.mean.shape == (layers, heads)
    few = toy_task["test"][:40]
    curve = cl.faithfulness(model, toy_task, scores, baseline, n_random=2, examples=few, quiet=True)
    assert curve.to_frame()["heads"].iloc[-1] == layers * heads
    near = shortened(toy_task.to("near"))
    found = cl.transfer(model, scores.top(1), near, **FAST)
    page = cl.view.write_report(
        tmp_path / "report.html",
        title="Small",
        scores=scores,
        circuit=scores.top(1),
        curve=curve,
        results=[found],
    )
    assert page.is_file()


def rows_of(task: cl.Task, pool: str, n: int) -> list[dict[str, str]]:
    return [
        {"id": f"{task.language}-{pool}-{e.id}", "text": e.fields["text"], "label": e.label}
        for e in task[pool][:n]
    ]


@pytest.fixture
def two_languages(tmp_path, toy_task):
    """Make a folder of files, the source whole and of the target what is given."""

    def made(**target: list[dict[str, str]]) -> cl.Task:
        source = {"train": "pool_b", "validation": "validation", "test": "test"}
        for language in ("source", "near"):
            (tmp_path / language).mkdir()
            for split, pool in source.items():
                usual = rows_of(toy_task, pool, 150)
                table = usual if language == "source" else target[split]
                pd.DataFrame(table).to_csv(tmp_path / language / f"{split}.csv", index=False)
        options = {"template": "{text} ->", "labels": dict(toy_task.labels), "id": "id"}
        return cl.load_task(str(tmp_path / "{language}" / "*.csv"), "source", **options)

    return made


def test_a_target_of_ten_sentences_without_one_of_the_labels_is_adapted(
    two_languages, toy_proxy, toy_task, toy_scores, caplog
):
    near = toy_task.to("near")
    missing = list(toy_task.labels)[-1]
    few = [row for row in rows_of(near, "pool_b", 60) if row["label"] != missing][:10]
    other = [row for row in rows_of(near, "validation", 60) if row["label"] != missing][:10]
    task = two_languages(train=few, validation=other, test=rows_of(near, "test", 80))
    target = task.to("near")
    assert f"No example has the label '{missing}' in pool_b of" in caplog.text
    assert len(target["pool_b"]) < 10
    found = cl.transfer(toy_proxy, toy_scores.top(3), target, **FAST)
    assert 0 <= found.target_after.accuracy <= 1
    n_grams = simple_rival(target)
    assert 0 <= n_grams.result.accuracy <= 1
    assert n_grams.result.counts[-1][-1] == 0


def test_a_target_without_training_sentences_is_refused(two_languages, toy_task):
    near = toy_task.to("near")
    task = two_languages(
        train=[], validation=rows_of(near, "validation", 9), test=rows_of(near, "test", 9)
    )
    with pytest.raises(cl.InputError):
        task.to("near")


def of_labels(counts: dict[str, int], salt: str) -> list[dict[str, str]]:
    return [
        {"id": f"{salt}{label}-{n}", "text": f"{salt} {n} wa {label}", "label": label}
        for label, many in counts.items()
        for n in range(many)
    ]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"a": 1, "b": 1}, "every class must occur in every pool"),
        ({f"l{n}": 1 for n in range(200)}, "every class must occur in every pool"),
        ({"a": 400, "b": 1}, "every class must occur in every pool"),
    ],
)
def test_too_few_examples_of_a_label_name_it_with_the_remedy(counts, message):
    with pytest.raises(cl.InputError, match=message):
        cl.Task.from_records(of_labels(counts, "x"), template="{text} ->", id="id")


def test_two_hundred_labels_and_ninety_five_to_five_are_tasks():
    many = {f"l{n}": 20 for n in range(200)}
    splits = {split: of_labels(many, split) for split in ("train", "validation", "test")}
    task = cl.Task.from_records(splits, template="{text} ->", id="id")
    assert len(task.labels) == 200
    skewed = cl.Task.from_records(
        of_labels({"a": 950, "b": 50}, "x"), template="{text} ->", id="id"
    )
    assert all({e.label for e in skewed[pool]} == {"a", "b"} for pool in ("pool_b", "test"))


def test_a_proxy_that_is_always_wrong_is_refused_before_discovery(toy_proxy, toy_task):
    """Its labels are turned round."""
    names = list(toy_task.labels)
    turned = dict(zip(names, names[1:] + names[:1], strict=True))
    wrong = [replace(e, id=f"x{e.id}", label=turned[e.label]) for e in toy_task["pool_a"][:200]]
    with pytest.raises(cl.CompetenceError, match="near chance"):
        cl.label_balanced_mean(toy_proxy, toy_task, examples=wrong, quiet=True)


def test_a_text_of_a_hundred_thousand_letters_is_cut(toy_proxy, toy_task):
    long = replace(toy_task["test"][0], fields={"text": "wa " * 40_000})
    encoded = toy_task.encode(toy_proxy, [long])
    assert encoded.n_truncated == 1
    assert len(encoded.tokens[0]) <= toy_proxy.context
