"""Files, folders of splits and data sets on the Hub, under the names people give them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import datasets
import pytest

from orpo_mlx.data.sources import FileSource, find_splits
from orpo_mlx.errors import DataError
from tests.conftest import write_rows

GOOD = {"prompt": "Q", "chosen": "A", "rejected": "B"}


def files(folder: Path) -> dict[str, list[str]]:
    found = {}
    for split, source in find_splits(folder).items():
        assert isinstance(source, FileSource)
        found[split] = [str(path.relative_to(folder)) for path in source.paths]
    return found


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.jsonl", "valid.jsonl", "test.jsonl"], {"train": 0, "valid": 1, "test": 2}),
        (["train.csv", "validation.parquet"], {"train": 0, "valid": 1}),
        (["real.train.jsonl", "real.valid.jsonl"], {"train": 0, "valid": 1}),
        (["training.json", "dev.json"], {"train": 0, "valid": 1}),
        (["my-train.jsonl", "my_test.csv", "notes.jsonl"], {"train": 0, "test": 1}),
        (["Train.jsonl", "eval.arrow"], {"train": 0, "valid": 1}),
        (["train.jsonl", "old.train.jsonl", "val.jsonl"], {"train": 0, "valid": 2}),
        (["data/train.jsonl", "data/test.jsonl", "README.md", "other/train.jsonl"], {"train": 0, "test": 1}),
    ],
)
def test_splits_of_a_folder(tmp_path: Path, names: list[str], expected: dict[str, int]) -> None:
    for name in names:
        write_rows(tmp_path / name, [GOOD])
    assert files(tmp_path) == {split: [names[number]] for split, number in expected.items()}


def test_shards_are_one_split_in_order(tmp_path: Path) -> None:
    shards = [f"data/train-0000{number}-of-00003.jsonl" for number in (2, 0, 1)]
    for name in [*shards, "data/test-00000-of-00001.jsonl"]:
        write_rows(tmp_path / name, [{**GOOD, "prompt": name}])
    splits = find_splits(tmp_path)
    assert files(tmp_path) == {"train": sorted(shards), "test": ["data/test-00000-of-00001.jsonl"]}
    assert [row.value for row in splits["train"].rows()] == [{**GOOD, "prompt": name} for name in sorted(shards)]
    assert splits["train"].name.endswith("train-00000-of-00003.jsonl and 2 more shards")


def test_a_data_set_saved_to_disk(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([GOOD, {**GOOD, "prompt": "R"}])
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(tmp_path)
    splits = find_splits(tmp_path)
    assert list(splits) == ["train", "valid"]
    assert [row.value for row in splits["valid"].rows()] == list(table)
    # Whoever works on it leaves other rows beside the data set's own.
    loaded = datasets.load_from_disk(str(tmp_path))["train"]
    loaded.map(lambda row: {**row, "prompt": row["prompt"] * 2}, load_from_cache_file=False)
    loaded.filter(lambda row: row["prompt"] == "Q", load_from_cache_file=False)
    assert list((tmp_path / "train").glob("cache-*.arrow"))
    assert [row.value for row in find_splits(tmp_path)["train"].rows()] == list(table)
    next((tmp_path / "train").glob("data-*.arrow")).unlink()
    with pytest.raises(DataError, match=r"state\.json: names data-00000-of-00001\.arrow, which is not there"):
        find_splits(tmp_path)


def test_a_file_is_the_train_split(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "anything.jsonl", [GOOD])
    source = find_splits(path)["train"]
    assert source.name == str(path)
    assert source.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "no train.jsonl"),
        (["a.train.jsonl", "b.train.jsonl"], "several files for the train split"),
        (["train.jsonl", "train.csv"], "several files for the train split"),
        (["train.jsonl", "valid.jsonl", "dev.jsonl"], "several files for the valid split"),
        (["x.json"], "found x.json"),
        (
            ["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"],
            "shard train-00001-of-00003 is missing; fetch it",
        ),
        (
            ["train-00000-of-00001.jsonl", "train-00001-of-00002.jsonl"],
            "shards of train of which there are 1, and of 2",
        ),
        (["train.jsonl/"], "train.jsonl: is a folder, expected a file"),
    ],
)
def test_a_folder_without_one_train_split(tmp_path: Path, names: list[str], expected: str) -> None:
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=expected):
        find_splits(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "owner/rows.jsonl", "./owner/name", "owner/na me"])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(DataError, match="no such file or folder"):
        find_splits(name)


@pytest.fixture(autouse=True)
def answering_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that answers whatever it is asked; what it says comes from the tests."""
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)


def test_a_hub_that_does_not_answer_is_asked_once_and_the_cache_after_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = on_the_hub(monkeypatch, tmp_path, ["train"])
    answers: list[float] = []

    def silent(*_: Any, timeout: float, **__: Any) -> Any:
        answers.append(timeout)
        raise ConnectionError("[Errno -2] Name or service not known\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", silent)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="the Hub cannot be reached"):
        find_splits("owner/name")
    assert asked == []
    (tmp_path / "cache" / "owner___name").mkdir(parents=True)
    assert list(find_splits("owner/name")) == ["train"]
    assert len(asked) == 1
    assert max(answers) < 5

    def missing(*_: Any, **__: Any) -> Any:
        assert datasets.config.HF_HUB_OFFLINE
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(DataError, match=r"the Hub cannot be reached \(\[Errno -2\] Name or service not known\); check"):
        find_splits("owner/name")
    assert not datasets.config.HF_HUB_OFFLINE


def on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: list[str]) -> list[Any]:
    asked = []
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "prompt": "R"}])
    table = datasets.Dataset.from_json(str(path), cache_dir=str(tmp_path / "hub"))

    def load(*arguments: Any, **keywords: Any) -> Any:
        asked.append((arguments, keywords))
        return datasets.DatasetDict(dict.fromkeys(names, table))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_hub_id_with_configuration_and_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = on_the_hub(monkeypatch, tmp_path, ["train", "validation", "test"])
    splits = find_splits("owner/name.v1:en-US@refs/pr/1")
    assert asked == [(("owner/name.v1", "en-US"), {"revision": "refs/pr/1"})]
    assert list(splits) == ["train", "valid", "test"]
    source = splits["valid"]
    assert [row.location for row in source.rows()] == [
        f"owner/name.v1:en-US@refs/pr/1/validation:{number}" for number in (1, 2)
    ]
    assert next(iter(source.rows())).value == GOOD
    assert len(source.sha256()) == 64
    find_splits("owner/name")
    assert asked[1] == (("owner/name", None), {"revision": None})


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train_sft", "train_prefs", "test_prefs", "test_sft"], {"train": "train_prefs", "test": "test_prefs"}),
        (["train", "train_prefs"], {"train": "train"}),
        (["everything"], {"train": "everything"}),
    ],
)
def test_names_of_splits_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: list[str], expected: dict[str, str]
) -> None:
    on_the_hub(monkeypatch, tmp_path, names)
    found = {split: source.name for split, source in find_splits("owner/name").items()}
    assert found == {split: f"owner/name/{name}" for split, name in expected.items()}


def test_the_hub_without_such_a_data_set_or_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_the_hub(monkeypatch, tmp_path, ["a", "b"])
    with pytest.raises(DataError, match="`data` owner/name: no train split, found a, b"):
        find_splits("owner/name")

    def missing(*_: Any, **__: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist\non the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(DataError, match=r"not to be had from the Hub as a data set \(Dataset .* exist on the Hub\)"):
        find_splits("owner/name")


def test_another_commit_than_was_asked_for_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = datasets.Dataset.from_json(
        str(write_rows(tmp_path / "rows.jsonl", [GOOD])), cache_dir=str(tmp_path / "0123456789abcdef")
    )
    found = datasets.DatasetDict({"train": table})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    assert list(find_splits("owner/name@0123456")) == ["train"]
    with pytest.raises(DataError, match="commit fedcba9 is not in the cache of data sets"):
        find_splits("owner/name@fedcba9")


def test_a_test_needs_a_held_out_split_and_no_train_split(tmp_path: Path) -> None:
    held_out = ("test", "valid")
    (tmp_path / "valid.jsonl").write_text("{}\n")
    assert list(find_splits(tmp_path, held_out)) == ["valid"]
    assert list(find_splits(tmp_path / "valid.jsonl", held_out)) == ["test"]
    (tmp_path / "valid.jsonl").rename(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"no test.jsonl \(or \*.test.jsonl, .* found train.jsonl"):
        find_splits(tmp_path, held_out)
