"""SIB-200 and the data sets that the hub keeps as Parquet, on folders of that layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from helpers import tiny

import circuitlens as cl
from circuitlens.models.readouts import SequenceReadout
from circuitlens.tasks.sources import data_sets
from circuitlens.tasks.sources.data_set import CONVERTED, from_hub
from circuitlens.tasks.sources.sib200 import _NAMES, Sib200
from circuitlens.tasks.toy import toy_tokenizer

TOPICS = ["science/technology", "travel", "politics", "sports", "health", "entertainment"]


def write(folder: Path, code: str, rows, names: dict[str, list[str]], *, nested=False) -> None:
    """Write splits as the hub lays them out, with classes where it has them."""
    for split, table in rows.items():
        found = datasets.Dataset.from_list(table)
        for column, classes in names.items():
            found = found.cast_column(column, datasets.ClassLabel(names=classes))
        place = folder / code / split / "0000.parquet"
        path = place if nested else folder / code / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        found.to_parquet(path)


def pools(task) -> dict[str, str]:
    return {e.id: pool for pool in ("pool_a", "pool_b", "validation", "test") for e in task[pool]}


# -- SIB-200 -------------------------------------------------------------------------------------


def test_sib200_is_parallel_and_takes_names_and_codes(shared):
    folder = shared / "data" / "sib200"
    task = cl.load_task("sib200", data=folder)
    assert task.language == "eng_Latn"
    assert set(task.labels) == {*TOPICS, "geography"}
    assert [len(task[p]) for p in ("validation", "test")] == [99, 204]
    for given, code in (
        ("javanese", "jav_Latn"),
        ("jav", "jav_Latn"),
        ("AMH_ethi", "amh_Ethi"),
        ("min", "min_Latn"),
        ("min_Arab", "min_Arab"),
    ):
        target = task.to(given)
        assert target.language == code
        assert pools(target) == pools(task)
        assert {e.id: e.label for e in target["test"]} == {e.id: e.label for e in task["test"]}
    with pytest.raises(cl.InputError, match=r"SIB-200 has no language 'klingon'; it has ace_Arab"):
        task.to("klingon")


def test_sib200_knows_every_language_of_the_folder_by_name_and_code(shared):
    source = Sib200(shared / "data" / "sib200")
    codes = set(source.languages)
    assert len(codes) == 26
    for code in codes:
        for given in (code, code.lower(), f" {code.upper()} "):
            assert source.resolve(given) == code
    # The Arabic scripts of Acehnese and Minangkabau have no name of their own.
    assert {source.resolve(name) for name in _NAMES} == codes - {"ace_Arab", "min_Arab"}
    assert {source.resolve(code[:3]) for code in codes} == codes - {"ace_Arab", "min_Arab"}


def test_sib200_codes_without_script_mean_one(tmp_path):
    for code in (
        "arb_Arab",
        "arb_Latn",
        "zho_Hans",
        "zho_Hant",
        "kas_Arab",
        "kas_Deva",
        "nso_Latn",
    ):
        (tmp_path / code).mkdir()
        (tmp_path / code / "train.tsv").touch()
    source = Sib200(tmp_path)
    found = {code: source.resolve(code) for code in ("arb", "zho", "nso", "NSO")}
    assert found == {"arb": "arb_Arab", "zho": "zho_Hans", "nso": "nso_Latn", "NSO": "nso_Latn"}
    with pytest.raises(cl.InputError, match="several scripts: say which, kas_Arab or kas_Deva"):
        source.resolve("kas")
    assert source.resolve("kas_deva") == "kas_Deva"


def test_sib200_knows_all_codes_of_the_hub(monkeypatch):
    asked = []

    def load(repository, name):
        asked.append((repository, code := name))
        rows = [
            {"index_id": n, "category": ([*TOPICS, "geography"])[n % 7], "text": f"{code} {n}"}
            for n in range(210)
        ]
        return datasets.DatasetDict(
            {
                name: datasets.Dataset.from_list(rows[start::3])
                for start, name in enumerate(("train", "validation", "test"))
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = cl.load_task("sib200", "nso_Latn")
    assert asked == [("Davlan/sib200", "nso_Latn")]
    assert len(task["test"]) == 70
    assert Sib200().resolve("Swahili") == "swh_Latn"
    assert Sib200().resolve("NSO_latn") == "nso_Latn"
    assert Sib200().resolve("arb") == "arb_Arab"


# -- Parquet -------------------------------------------------------------------------------------


def test_the_converted_copy_of_a_repository_is_read_by_folder(tmp_path):
    rows = {"validation": [{"tweet": "a", "label": 1}], "test": [{"tweet": "b", "label": 0}]}
    for code in ("hau", "orm"):
        write(tmp_path, code, rows, {"label": ["positive", "negative"]}, nested=True)
    # The hub's index files lie beside the data.
    (tmp_path / "orm" / "test" / "index.duckdb").write_bytes(b"index")
    found = from_hub(str(tmp_path), "orm", revision=CONVERTED)
    assert {name: part["tweet"][:] for name, part in found.items()} == {
        "validation": ["a"],
        "test": ["b"],
    }
    assert found["test"].features["label"].names == ["positive", "negative"]


def test_afrisenti(tmp_path):
    senses = ["positive", "neutral", "negative"]
    tweets = {
        split: [{"tweet": f"{split} {n}", "label": n % 3} for n in range(size)]
        for split, size in {"train": 90, "validation": 30, "test": 30}.items()
    }
    write(tmp_path / "a", "hau", tweets, {"label": senses}, nested=True)
    task = cl.load_task("afrisenti", data=tmp_path / "a")
    assert task.language == "hausa"
    assert {e.label for e in task["test"]} == set(senses)
    assert [len(task[p]) for p in ("validation", "test")] == [30, 30]


NEWS = ["business", "entertainment", "health", "politics", "religion", "sports", "technology"]


def news(folder: Path, code: str, topics: list[str]) -> None:
    rows = {
        split: [
            {"headline": f"{split} {n}", "text": "long", "label": n % len(topics), "url": "u"}
            for n in range(140)
        ]
        for split in ("train", "validation", "test")
    }
    write(folder, code, rows, {"label": topics})


def test_masakhanews_asks_for_the_topics_that_a_language_has(tmp_path):
    for code, without in (
        ("eng", {"religion"}),
        ("tir", {"religion"}),
        ("hau", set()),
        ("yor", {"business", "technology"}),
    ):
        news(tmp_path, code, [topic for topic in NEWS if topic not in without])
    english = cl.load_task("masakhanews", data=tmp_path)
    assert list(english.labels) == [topic for topic in NEWS if topic != "religion"]
    assert {e.fields["headline"] for e in english["test"]} == {f"test {n}" for n in range(140)}
    yoruba = cl.load_task("masakhanews", "Yor", data=tmp_path)
    assert list(yoruba.labels) == ["entertainment", "health", "politics", "religion", "sports"]
    assert cl.load_task("masakhanews", "hausa", data=tmp_path).labels.keys() == set(NEWS)
    # Headlines of two languages are no translations, whatever their numbers.
    target = english.to("tigrinya")
    assert target.labels == english.labels
    assert not set(pools(target)) & set(pools(english))
    assert target.pools.size == 420
    with pytest.raises(cl.InputError, match=r"the label 'religion', which is not one of"):
        english.to("hausa")


def test_prompts_of_a_language_go_with_its_name_and_stay_when_it_is_left(monkeypatch):
    known = data_sets()
    own = {"near": {"template": "{text} near:"}}
    changed = {**known, "toy": replace(known["toy"], prompts=own)}
    monkeypatch.setattr("circuitlens.tasks.sources.data_sets", lambda: changed)
    plain = known["toy"].prompt["template"]
    task = cl.load_task("toy")
    assert task.template == task.to("near").template == plain
    near = cl.load_task("toy", "near")
    assert near.template == near.to("far").template == "{text} near:"
    assert near.labels == task.labels
    assert cl.load_task("toy", "near", template="{text} mine:").template == "{text} mine:"


def test_afrisenti_divides_validation_where_there_is_no_train_split(tmp_path):
    def tweets(code, sizes):
        return {
            split: [{"tweet": f"{code} {split} {n}", "label": n % 3} for n in range(size)]
            for split, size in sizes.items()
        }

    senses = {"label": ["positive", "neutral", "negative"]}
    whole = {"train": 90, "validation": 60, "test": 30}
    write(tmp_path, "hau", tweets("hau", whole), senses)
    write(tmp_path, "orm", tweets("orm", {"validation": 60, "test": 30}), senses)
    write(tmp_path, "tir", tweets("tir", {"validation": 60, "test": 30}), senses)
    task = cl.load_task("afrisenti", data=tmp_path)
    assert task.pools.size == 180
    for language, code in (("oromo", "orm"), ("tir", "tir")):
        for found in (task.to(language), cl.load_task("afrisenti", language, data=tmp_path)):
            # Nothing is left out as if it were a translation of the source's validation.
            assert len(pools(found)) == found.pools.size == 90
            assert [len(found[p]) for p in ("validation", "test")] == [12, 30]
            assert all(name.startswith(f"{code}:") for name in pools(found))
    (tmp_path / "orm" / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(cl.InputError, match=r"orm has no validation\*\.parquet file"):
        task.to("oromo")


def test_a_split_that_the_hub_lacks_is_named(monkeypatch):
    part = datasets.Dataset.from_list([{"id": 1, "sentence1": "a", "sentence2": "b", "label": 1}])
    hub = datasets.DatasetDict({"validation": part, "test": part})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    with pytest.raises(cl.InputError, match="PAWS-X german has no train split"):
        cl.load_task("pawsx", "de")


def test_pawsx_keeps_pairs_of_one_sentence_together(tmp_path):
    rows = {
        split: [
            {
                "id": n + 1,
                "sentence1": f"{split} {n // 2}",
                "sentence2": f"{split} s{n}",
                "label": n % 2,
            }
            for n in range(60)
        ]
        for split in ("train", "validation", "test")
    }
    rows["train"].append({"id": 61, "sentence1": "NS", "sentence2": "NS", "label": 0})
    write(tmp_path, "en", rows, {"label": ["0", "1"]})
    task = cl.load_task("pawsx", data=tmp_path)
    where = pools(task)
    assert len(where) == 180
    for n in range(0, 60, 2):
        assert where[f"train:{n + 1}"] == where[f"train:{n + 2}"]


def test_pawsx_pairs_that_share_any_sentence_stay_together_in_every_language(tmp_path):
    def rows(code, render):
        made = {
            split: [
                {
                    "id": n + 1,
                    "sentence1": f"{code} {split} {n}",
                    "sentence2": f"{split} x{n}",
                    "label": n % 2,
                }
                for n in range(40)
            ]
            for split in ("validation", "test")
        }
        # Chains of three: a and b, b and c, c and d; each pair in another place of the file.
        ends = [(f"{n}a", f"{n}b") for n in range(50)]
        ends += [(f"{n}c", f"{n}b") for n in range(50)] + [(f"{n}c", f"{n}d") for n in range(50)]
        made["train"] = [
            {"id": n + 1, "sentence1": render(one, n), "sentence2": render(two, n), "label": n % 2}
            for n, (one, two) in enumerate(ends)
        ]
        return made

    write(tmp_path, "en", rows("en", lambda text, n: text), {"label": ["0", "1"]})
    # Every sentence is translated differently in every pair, and the first pairs are empty.
    german = rows("de", lambda text, n: f"de {text} {n}")
    for row in german["train"][:10]:
        row["sentence1"] = "NS"
    german["train"][11]["label"] = -1
    write(tmp_path, "de", german, {"label": ["0", "1"]})
    task = cl.load_task("pawsx", data=tmp_path)
    where = pools(task)
    for n in range(50):
        assert len({where[f"train:{n + k + 1}"] for k in (0, 50, 100)}) == 1
    assert 0.3 < len(task["pool_a"]) / 150 < 0.7
    for found in (task.to("german"), cl.load_task("pawsx", "de", data=tmp_path)):
        there = pools(found)
        assert len(there) == len(where) - 11
        assert all(where[name] == pool for name, pool in there.items())
    # Without the English pairs a language goes by its own sentences.
    write(tmp_path / "alone", "de", rows("de", lambda text, n: f"de {text}"), {"label": ["0", "1"]})
    alone = pools(cl.load_task("pawsx", "de", data=tmp_path / "alone"))
    assert alone == where


def test_pawsx_training_pairs_with_a_sentence_of_test_are_left_out(tmp_path, caplog):
    rows = {
        split: [
            {"id": n + 1, "sentence1": f"{split} {n}", "sentence2": f"{split} s{n}", "label": n % 2}
            for n in range(60)
        ]
        for split in ("train", "validation", "test")
    }
    rows["train"][5]["sentence2"] = "test 7"
    write(tmp_path, "en", rows, {"label": ["0", "1"]})
    task = cl.load_task("pawsx", data=tmp_path)
    assert "train:6" not in pools(task)
    assert "1 training examples were left out: the same text or group" in caplog.text


@pytest.fixture
def xcopa(tmp_path):
    for code in ("id", "qu"):
        rows = {
            split: [
                {
                    "premise": f"{code} {split} {n}.",
                    "choice1": "bada gu",
                    "choice2": f"gu {'da ' * (n % 3)}ba",
                    "question": ("cause", "effect")[n % 2],
                    "label": n % 2 if n % 5 else 1 - n % 2,
                    "idx": n,
                    "changed": False,
                }
                for n in range(60)
            ]
            for split in ("validation", "test")
        }
        write(tmp_path, code, rows, {})
    return tmp_path


def test_xcopa_is_answered_by_its_own_choices(xcopa):
    task = cl.load_task("xcopa", data=xcopa)
    assert task.choices == ("choice1", "choice2")
    assert pools(task) == pools(task.to("qu"))
    assert len(task["validation"]) == 12
    hf = tiny("qwen2", torch.float32)
    hf.resize_token_embeddings(len(toy_tokenizer()))
    model = cl.load(hf, toy_tokenizer())
    data = task.encode(model, task["test"][:4])
    assert isinstance(data.readout, SequenceReadout)
    shown = toy_tokenizer().decode(data.batch([1]).input_ids[0])
    assert "id test 1 so" in shown
    scores = model.hf_label_logits(data.batch(range(4)))
    assert scores.shape == (4, 2)
    # By hand: log-probabilities of the tokens of one answer, behind its prompt.
    prompt = "id test 1 so"
    first = toy_tokenizer()(prompt)["input_ids"]
    whole = toy_tokenizer()(f"{prompt} bada gu")["input_ids"]
    with torch.no_grad():
        logs = model.hf(torch.tensor([whole])).logits[0].log_softmax(-1)
    expected = sum(float(logs[k - 1, whole[k]]) for k in range(len(first), len(whole)))
    assert float(scores[1, 0]) == pytest.approx(expected, rel=1e-4)
    found = cl.predict(model, [dict(e.fields) for e in task["test"][:4]], task, quiet=True)
    assert set(found["label"]) <= {"choice1", "choice2"}


def test_xcopa_ends_premises_in_every_script_and_needs_labels(tmp_path):
    rows = {
        split: [
            {
                "premise": f"那人打开水龙头{split}{n}。",
                "choice1": "a",
                "choice2": "b",
                "question": "effect",
                "label": n // 2 % 2,
                "idx": n,
            }
            for n in range(40)
        ]
        for split in ("validation", "test")
    }
    write(tmp_path / "good", "zh", rows, {})
    task = cl.load_task("xcopa", "zh", data=tmp_path / "good")
    assert {e.fields["premise"] for e in task["test"]} == {
        f"那人打开水龙头test{n}" for n in range(40)
    }
    assert {e.id: e.label for e in task["test"]}["test:2"] == "choice2"
    rows["test"][3]["label"] = -1
    write(tmp_path / "bad", "zh", rows, {})
    with pytest.raises(cl.InputError, match="XCOPA chinese test has no 'answer' in row 4"):
        cl.load_task("xcopa", "zh", data=tmp_path / "bad")


def test_choices_are_refused_where_they_make_no_sense(xcopa):
    with pytest.raises(cl.InputError, match="name a choice for each"):
        cl.load_task("xcopa", data=xcopa, choices=("choice1",))
    task = cl.load_task("xcopa", data=xcopa, readout="token")
    hf = tiny("qwen2", torch.float32)
    hf.resize_token_embeddings(len(toy_tokenizer()))
    model = cl.load(hf, toy_tokenizer())
    with pytest.raises(cl.InputError, match="read by readout='sequence'"):
        task.encode(model, task["test"][:1])
