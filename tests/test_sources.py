from __future__ import annotations

import csv
import shutil
from collections import Counter, defaultdict
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import datasets
import pytest

import circuitlens as cl
from circuitlens.tasks import Example, Pools, Task
from circuitlens.tasks.sources.americasnli import AmericasNLI
from circuitlens.tasks.sources.nusax import NusaX
from circuitlens.tasks.sources.smsa import SmSA
from circuitlens.tasks.sources.xnli import Xnli

DATA = Path(__file__).parents[2] / "shared" / "data"
POOLS = ("pool_a", "pool_b", "validation", "test")
TRAINING, EVALUATION = POOLS[:2], POOLS[2:]

needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the shared data sets are not beside the project"
)

NUSAX = {
    "ace": "acehnese",
    "ban": "balinese",
    "bjn": "banjarese",
    "bug": "buginese",
    "eng": "english",
    "ind": "indonesian",
    "jav": "javanese",
    "mad": "madurese",
    "min": "minangkabau",
    "nij": "ngaju",
    "sun": "sundanese",
    "bbc": "toba_batak",
}
NUSAX_FILES = {"train": "train", "validation": "valid", "test": "test"}


def everything(pools: Pools) -> list[Example]:
    return [e for pool in POOLS for e in getattr(pools, pool)]


def pool_of(task: Task, *, by: str = "id") -> dict[str, str]:
    """The pool of every id (or group or premise), each of which may have only one."""
    found: dict[str, set[str]] = defaultdict(set)
    for pool in POOLS:
        for e in task[pool]:
            found[e.fields["premise"] if by == "premise" else getattr(e, by)].add(pool)
    torn = {name: pools for name, pools in found.items() if len(pools) > 1}
    assert not torn
    return {name: next(iter(pools)) for name, pools in found.items()}


@cache
def nusax_rows(language: str) -> dict[str, dict[str, dict[str, str]]]:
    """Rows by split and id, as the files hold them."""
    found = {}
    for split, file in NUSAX_FILES.items():
        path = DATA / "nusax" / language / f"{file}.csv"
        with path.open(encoding="utf-8", newline="") as lines:
            found[split] = {row["id"]: row for row in csv.DictReader(lines)}
    return found


@cache
def nusax_issues() -> dict[str, set[tuple[str, str]]]:
    found: dict[str, set[tuple[str, str]]] = defaultdict(set)
    lines = (DATA / "nusax" / "known_issues.tsv").read_text(encoding="utf-8").splitlines()
    for line in lines[1:]:
        language, split, name, *_ = line.split("\t")
        found[language].add((split, name))
    return found


def nusax(language: str = "indonesian", **options: Any) -> Task:
    return cl.load_task("nusax", language, data=DATA / "nusax", **options)


def americas(language: str = "quy", **options: Any) -> Task:
    return cl.load_task("americasnli", language, data=DATA / "americasnli", **options)


# -- NusaX ---------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize("language", list(NUSAX.values()))
def test_nusax_holds_every_row_of_the_files_but_the_faulty_ones(language):
    splits = NusaX(DATA / "nusax").splits(language)
    for split, file in NUSAX_FILES.items():
        expected = {
            name: (row["text"].strip(), row["label"])
            for name, row in nusax_rows(language)[split].items()
            if (file, name) not in nusax_issues()[language]
        }
        assert {e.id: (e.fields["text"], e.label) for e in splits[split]} == expected
    counts = {split: len(examples) for split, examples in splits.items()}
    if not nusax_issues()[language]:
        assert counts == {"train": 500, "validation": 100, "test": 400}
    if language == "ngaju":
        assert counts == {"train": 484, "validation": 95, "test": 389}


@needs_data
def test_nusax_says_how_many_faulty_rows_are_left_out(caplog):
    with caplog.at_level("INFO", logger="circuitlens"):
        task = nusax("ngaju")
    assert "NusaX ngaju: 32 rows with known faults left out" in caplog.text
    names = {e.id for e in everything(task.pools)}
    assert len(nusax_issues()["ngaju"]) == 32
    assert not names & {name for _, name in nusax_issues()["ngaju"]}
    caplog.clear()
    with caplog.at_level("INFO", logger="circuitlens"):
        nusax("javanese")
    assert "left out" not in caplog.text


@needs_data
def test_nusax_without_a_list_of_faults_holds_all_rows(tmp_path):
    shutil.copytree(DATA / "nusax" / "ngaju", tmp_path / "ngaju")
    splits = NusaX(tmp_path).splits("ngaju")
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [500, 100, 400]
    assert NusaX(tmp_path).languages == ["ngaju"]
    with pytest.raises(cl.InputError, match=r"no language 'javanese'; it has ngaju\."):
        cl.load_task("nusax", "javanese", data=tmp_path)


@needs_data
@pytest.mark.parametrize(("code", "name"), list(NUSAX.items()))
def test_nusax_takes_codes_and_names(code, name):
    source = NusaX(DATA / "nusax")
    spelled = name.replace("_", " ").title()
    assert {source.resolve(given) for given in (code, name, f" {spelled} ")} == {name}


@needs_data
def test_nusax_lists_its_languages_where_one_is_unknown():
    assert sorted(NusaX(DATA / "nusax").languages) == sorted(NUSAX.values())
    for ask in (nusax, nusax().to):
        with pytest.raises(cl.InputError, match="NusaX has no language 'klingon'") as caught:
            ask("klingon")
        assert [name for name in NUSAX.values() if name not in str(caught.value)] == []


def test_a_missing_data_folder_is_named(tmp_path):
    for make, language in ((NusaX, "indonesian"), (SmSA, "indonesian"), (AmericasNLI, "quy")):
        # Asked directly, because checking a source's type in tests asks for its languages.
        source = make(tmp_path / "nowhere")
        with pytest.raises(cl.InputError, match="nowhere does not exist; it should contain"):
            source.splits(source.resolve(language))


def test_a_folder_without_any_language_is_named_with_what_it_should_hold(tmp_path):
    (tmp_path / "readme").mkdir()
    for name, example in (("nusax", "indonesian/train.csv"), ("americasnli", "dev/quy.tsv")):
        with pytest.raises(cl.InputError, match="contains no language of") as caught:
            cl.load_task(name, data=tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert example in str(caught.value)


@needs_data
def test_encoding_nusax_by_default_warns_of_no_indonesian_texts(caplog):
    folder = DATA.parent / "models" / "nusa-tiny"
    if not folder.is_dir():
        pytest.skip("the shared checkpoints are not beside the project")
    model, task = cl.load(folder), nusax()
    caplog.clear()
    for pool in POOLS:
        task.encode(model, pool)
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == []


def test_a_missing_split_of_nusax_is_named(tmp_path):
    (tmp_path / "english").mkdir()
    (tmp_path / "english" / "train.csv").write_text("id,text,label\n1,fine,positive\n")
    with pytest.raises(cl.InputError, match=r"There is no data file .*valid\.csv"):
        cl.load_task("nusax", "english", data=tmp_path)


def test_unknown_tasks_and_tasks_that_need_a_folder():
    with pytest.raises(cl.InputError, match="no task 'nusaxx'; use afrisenti, americasnli, gr"):
        cl.load_task("nusaxx")
    with pytest.raises(cl.InputError, match=r"SmSA is read from a local folder only: give data="):
        cl.load_task("smsa")
    with pytest.raises(cl.InputError, match="AmericasNLI is read from a local folder only"):
        cl.load_task("americasnli")


@needs_data
@pytest.mark.parametrize("seed", [0, 1])
def test_a_nusax_sentence_is_in_one_pool_in_all_languages(seed):
    reference = pool_of(nusax("indonesian", seed=seed))
    assert len(reference) == 1000
    for language in NUSAX.values():
        pools = pool_of(nusax(language, seed=seed))
        assert pools == {name: reference[name] for name in pools}
        assert len(pools) == 1000 - len(nusax_issues()[language])


@needs_data
def test_nusax_in_ngaju_never_evaluates_what_indonesian_trained_on():
    source = nusax(share_a=0.7, seed=3, max_text_tokens=50)
    target = source.to("ngaju")
    assert (target.language, target.share_a) == ("ngaju", 0.7)
    assert (target.seed, target.max_text_tokens) == (3, 50)
    assert target.origin is source
    here, there = pool_of(source), pool_of(target)
    assert len(there) == 968
    assert all(here[name] == pool for name, pool in there.items())
    texts = {e.id: e.fields["text"] for e in everything(target.pools)}
    rows = {name: row for split in nusax_rows("ngaju").values() for name, row in split.items()}
    assert texts == {name: rows[name]["text"].strip() for name in texts}


@needs_data
def test_to_drops_nusax_rows_that_another_language_keeps_elsewhere(tmp_path, caplog):
    # As if the Javanese files had their first 30 training rows in the test split.
    for language in ("indonesian", "javanese"):
        shutil.copytree(DATA / "nusax" / language, tmp_path / language)
    rows = nusax_rows("javanese")
    moved = list(rows["train"])[:30]
    names = {"train": list(rows["train"])[30:], "test": [*rows["test"], *moved]}
    every = {name: row for split in rows.values() for name, row in split.items()}
    for file, kept in names.items():
        with (tmp_path / "javanese" / f"{file}.csv").open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, ["id", "text", "label"])
            writer.writeheader()
            writer.writerows(every[name] for name in kept)
    alone = cl.load_task("nusax", "javanese", data=tmp_path)
    assert set(moved) <= {e.id for e in alone["test"]}
    target = cl.load_task("nusax", data=tmp_path).to("javanese")
    assert {e.id for e in target["test"]} == set(rows["test"])
    assert "30 examples were left out" in caplog.text


@needs_data
def test_sentiment_prompts_and_words_fit_the_shared_tokenizer():
    folder = DATA.parent / "models" / "nusa-tiny"
    if not folder.is_dir():
        pytest.skip("the shared checkpoints are not beside the project")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = nusax("javanese", tokenizer=tokenizer)
    assert list(task.labels) == ["negative", "neutral", "positive"]
    words = {**task.labels, "neutral": " negatif"}
    with pytest.raises(cl.InputError, match="'negative' and 'neutral' have the same tokens"):
        nusax("javanese", tokenizer=tokenizer, labels=words)


# -- SmSA ----------------------------------------------------------------------------------


@cache
def smsa_rows() -> dict[tuple[str, int], tuple[str, str]]:
    """Text and label of every SmSA row that does not overlap with NusaX, by file and line."""
    listing = (DATA / "smsa" / "overlap_with_nusax.txt").read_text(encoding="utf-8")
    lines = [line.split("\t") for line in listing.splitlines() if not line.startswith("#")]
    overlap = {(split, int(row)) for split, row in lines}
    found = {}
    for file in ("train", "valid", "test"):
        path = DATA / "smsa" / f"{file}_preprocess.tsv"
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if line and (file, number) not in overlap:
                text, label = line.rsplit("\t", 1)
                found[file, number] = (text.strip(), label.strip())
    return found


@needs_data
def test_smsa_leaves_out_what_nusax_repeats(caplog):
    with caplog.at_level("INFO", logger="circuitlens"):
        splits = SmSA(DATA / "smsa").splits("indonesian")
    expected = {f"{file}:{number}": row for (file, number), row in smsa_rows().items()}
    found = {e.id: (e.fields["text"], e.label) for s in splits.values() for e in s}
    assert found == expected
    assert {name: len(s) for name, s in splits.items()} == {
        "train": 10_319,
        "validation": 1_260 - 26,
        "test": 500 - 20,
    }
    assert Counter(e.label for e in splits["train"]) == {
        "negative": 3_179,
        "neutral": 1_032,
        "positive": 6_108,
    }
    assert "727 rows left out" in caplog.text


@needs_data
def test_smsa_pools_hold_no_text_of_validation_or_test():
    def normal(text: str) -> str:
        return " ".join(text.lower().split())

    task = cl.load_task("smsa", "ind", data=DATA / "smsa")
    held_out = {normal(text) for (file, _), (text, _) in smsa_rows().items() if file != "train"}
    expected = {
        f"train:{number}"
        for (file, number), (text, _) in smsa_rows().items()
        if file == "train" and normal(text) not in held_out
    }
    pools = task["pool_a"], task["pool_b"]
    kept = {e.id for pool in pools for e in pool}
    # Repetitions within train are only left out where they would stand in both pools.
    assert kept <= expected
    assert len(expected - kept) < 71
    sides = [{normal(e.text) for e in pool} for pool in pools]
    assert not sides[0] & sides[1]
    assert len(expected) < 10_319
    with pytest.raises(cl.InputError, match=r"SmSA has no language 'javanese'; it has indonesian"):
        task.to("javanese")


@needs_data
def test_smsa_training_texts_hold_no_nusax_test_sentence():
    def letters(text: str) -> str:
        return "".join(filter(str.isalnum, text.lower()))

    task = cl.load_task("smsa", data=DATA / "smsa")
    trained = {letters(e.fields["text"]) for pool in TRAINING for e in task[pool]}
    evaluated = {letters(e.fields["text"]) for pool in EVALUATION for e in nusax()[pool]}
    assert not trained & evaluated


# -- AmericasNLI ---------------------------------------------------------------------------

AMERICAS = ("aym", "bzd", "cni", "gn", "hch", "nah", "oto", "quy", "shp", "tar")


@cache
def americas_rows(split: str, language: str) -> dict[str, dict[str, str]]:
    """Rows by id, those with a blank text left out."""
    path = DATA / "americasnli" / split / f"{language}.tsv"
    header, *lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    rows = [
        dict(zip(header.split("\t"), line.rstrip("\r").split("\t"), strict=True)) for line in lines
    ]
    return {r["id"]: r for r in rows if r["premise"].strip() and r["hypothesis"].strip()}


@needs_data
@pytest.mark.parametrize("language", AMERICAS)
def test_americasnli_holds_every_row_and_tears_no_premise_apart(language):
    task = americas(language, seed=1)
    rows = {split: americas_rows(split, language) for split in ("dev", "test")}
    assert {e.id for e in task["test"]} == set(rows["test"])
    of_dev = [e for pool in (*TRAINING, "validation") for e in task[pool]]
    assert sorted(e.id for e in of_dev) == sorted(rows["dev"])
    for e in everything(task.pools):
        row = {**rows["dev"], **rows["test"]}[e.id]
        assert e.fields == {name: row[name].strip() for name in ("premise", "hypothesis")}
        assert e.label == row["label"]
    # By text, not by the group that the package made up.
    pool_of(task, by="premise")
    pool_of(task, by="group")


@needs_data
def test_americasnli_premises_share_a_group_and_groups_have_one_premise():
    examples = [
        e for split in AmericasNLI(DATA / "americasnli").splits("quy").values() for e in split
    ]
    pairs = {(e.group, e.fields["premise"]) for e in examples}
    assert len(pairs) == len({group for group, _ in pairs}) == len({text for _, text in pairs})
    # Three hypotheses a premise at most, and nearly always.
    sizes = Counter(e.group for e in examples)
    assert max(sizes.values()) == 3
    assert len(sizes) < len(examples) / 2


@needs_data
def test_americasnli_leaves_out_the_blank_premises_of_nahuatl(caplog):
    with caplog.at_level("INFO", logger="circuitlens"):
        task = americas("nahuatl")
    assert task.language == "nah"
    assert "AmericasNLI nah: 3 rows without premise left out" in caplog.text
    names = {e.id for e in everything(task.pools)}
    assert not names & {"25576", "25577", "25578"}
    assert len(task["test"]) == 735


@needs_data
def test_americasnli_choices_are_made_on_the_same_rows_whatever_the_seed():
    one, other = americas(seed=0), americas(seed=7)
    assert one["validation"] == other["validation"]
    assert one["test"] == other["test"]
    assert {e.id for e in one["pool_a"]} != {e.id for e in other["pool_a"]}


@needs_data
@pytest.mark.parametrize(("source", "target"), list(permutations(["quy", "nah", "oto", "cni"], 2)))
def test_americasnli_is_leak_safe_between_languages(source, target):
    first = americas(source)
    second = first.to(target)
    here, there = pool_of(first, by="group"), pool_of(second, by="group")
    both = here.keys() & there.keys()
    assert len(both) > 250
    assert all(here[group] == there[group] for group in both)
    # Every language assigns premises alike, so nothing has to be left out.
    size = sum(len(americas_rows(split, target)) for split in ("dev", "test"))
    assert second.pools.size == size


@needs_data
def test_americasnli_takes_codes_and_names_and_lists_them():
    source = AmericasNLI(DATA / "americasnli")
    assert sorted(source.languages) == sorted(AMERICAS)
    given_names = {"quy": "Quy", "shp": "Shipibo Konibo", "gn": "guarani", "tar": "raramuri"}
    for code, name in given_names.items():
        assert source.resolve(name) == code
    with pytest.raises(cl.InputError, match="no language 'es'; it has aym, bzd, cni, gn, hch, nah"):
        source.resolve("es")


# -- the hub -------------------------------------------------------------------------------


class Hub:
    """Stands in for ``datasets.load_dataset`` and remembers what was asked for."""

    def __init__(self, configurations: dict[str, datasets.DatasetDict]) -> None:
        self.configurations = configurations
        self.asked: list[tuple[str, str, str | None]] = []

    def load(self, path: str, name: str = "", **options: Any) -> datasets.DatasetDict:
        revision = options.pop("revision", None)
        # The converted copy knows no names of configurations, only folders.
        code = name if revision is None else options.pop("data_dir")
        assert not options
        assert not name or revision is None
        self.asked.append((path, code, revision))
        return self.configurations[code]


@pytest.fixture
def hub(monkeypatch):
    def install(configurations: dict[str, datasets.DatasetDict]) -> Hub:
        made = Hub(configurations)
        monkeypatch.setattr(datasets, "load_dataset", made.load)
        return made

    return install


def with_classes(splits: dict[str, list[dict[str, Any]]], names: list[str]) -> datasets.DatasetDict:
    texts = [column for column in splits["test"][0] if column != "label"]
    features = datasets.Features(
        {column: datasets.Value("string") for column in texts}
        | {"label": datasets.ClassLabel(names=names)}
    )
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows, features=features) for name, rows in splits.items()}
    )


SENTIMENTS = ["negative", "neutral", "positive"]
RELATIONS = ["entailment", "neutral", "contradiction"]
SIZES = {"train": 60, "validation": 9, "test": 12}


def hub_sentiment(code: str, skip: int = 0) -> datasets.DatasetDict:
    splits, start = {}, 0
    for name, size in SIZES.items():
        rows = [
            {"id": str(n), "text": f"{code} sentence {n}", "label": n % 3}
            for n in range(start + skip, start + size)
        ]
        splits[name] = rows
        start += size
    return with_classes(splits, SENTIMENTS)


def hub_inference(code: str) -> datasets.DatasetDict:
    splits = {
        name: [
            {
                "premise": f"{code} {name} premise {n // 3}",
                "hypothesis": f"{code} {name} hypothesis {n}",
                "label": n % 3,
            }
            for n in range(size)
        ]
        for name, size in {"train": 180, "validation": 30, "test": 60}.items()
    }
    return with_classes(splits, RELATIONS)


def test_nusax_from_the_hub_asks_for_the_converted_copy(hub):
    served = hub({"ind": hub_sentiment("ind"), "nij": hub_sentiment("nij", skip=3)})
    task = cl.load_task("nusax")
    target = task.to("ngaju")
    assert served.asked == [
        ("indonlp/NusaX-senti", "ind", "refs/convert/parquet"),
        ("indonlp/NusaX-senti", "nij", "refs/convert/parquet"),
    ]
    assert [e.id for e in task["test"]] == [str(n) for n in range(69, 81)]
    assert {e.id for e in everything(task.pools)} == {str(n) for n in range(81)}
    for e in everything(task.pools):
        assert e.fields == {"text": f"ind sentence {e.id}"}
        assert e.label == SENTIMENTS[int(e.id) % 3]
    here, there = pool_of(task), pool_of(target)
    assert len(there) == 81 - 9
    assert all(here[name] == pool for name, pool in there.items())


def test_nusax_from_the_hub_knows_its_languages_without_asking(hub):
    served = hub({})
    with pytest.raises(cl.InputError, match="no language 'klingon'; it has acehnese, balinese"):
        cl.load_task("nusax", "klingon")
    assert NusaX().resolve("bbc") == "toba_batak"
    assert sorted(NusaX().languages) == sorted(NUSAX.values())
    assert served.asked == []


@needs_data
def test_nusax_from_the_hub_and_from_a_folder_is_the_same_task(hub):
    def rows(split: str) -> list[dict[str, Any]]:
        return [
            {"id": name, "text": row["text"], "label": SENTIMENTS.index(row["label"])}
            for name, row in nusax_rows("indonesian")[split].items()
        ]

    hub({"ind": with_classes({split: rows(split) for split in NUSAX_FILES}, SENTIMENTS)})
    assert cl.load_task("nusax").fingerprint() == nusax().fingerprint()


def test_xnli_from_the_hub_keeps_premises_together(hub):
    served = hub({code: hub_inference(code) for code in ("en", "sw")})
    task = cl.load_task("xnli")
    target = task.to("sw")
    assert served.asked == [("facebook/xnli", "en", None), ("facebook/xnli", "sw", None)]
    assert (task.language, target.language) == ("en", "sw")
    assert task.pools.size == target.pools.size == 270
    for found, code in ((task, "en"), (target, "sw")):
        for e in everything(found.pools):
            split, number = e.fields["hypothesis"].removeprefix(f"{code} ").split(" hypothesis ")
            assert e.fields["premise"] == f"{code} {split} premise {int(number) // 3}"
            assert e.label == RELATIONS[int(number) % 3]
        pool_of(found, by="premise")
    here, there = pool_of(task), pool_of(target)
    assert here == there
    assert {e.fields["premise"] for e in task["test"]} == {
        f"en test premise {n}" for n in range(20)
    }


def test_xnli_lists_its_languages():
    assert len(Xnli().languages) == 15
    assert Xnli().resolve("SW") == "sw"
    with pytest.raises(cl.InputError, match="XNLI has no language 'quy'; it has ar, bg, de"):
        cl.load_task("xnli", "quy")


@pytest.mark.parametrize("failure", [ConnectionError("no route"), FileNotFoundError("gone")])
def test_a_failing_download_says_what_to_do(failure, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(cl.InputError) as caught:
        cl.load_task("nusax", "jav")
    for part in ("indonlp/NusaX-senti (jav)", type(failure).__name__, "local folder", "data="):
        assert part in str(caught.value)
    assert caught.value.__cause__ is failure
    with pytest.raises(cl.InputError, match=r"facebook/xnli \(en\) could not be loaded"):
        cl.load_task("xnli")
