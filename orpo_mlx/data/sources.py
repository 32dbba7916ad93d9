"""Where pairs come from: a file, a folder of splits, or a data set on the Hub."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from orpo_mlx.data.arrow_values import rows_of
from orpo_mlx.data.readers import READERS, Row, file_kind, file_stem, read_rows
from orpo_mlx.errors import DataError, reason_of
from orpo_mlx.files import read_json_table, sha256_of

SPLIT_NAMES = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev", "eval"),
    "test": ("test",),
}
"""Our splits, and the names others give them."""

# How `datasets` and Spark number the parts of a file.
_SHARD = re.compile(r"^(?P<stem>.*?)-(?P<number>\d{5})-of-(?P<count>\d{5})$")
_LAST_WORD = re.compile(r"[._-]")
# owner/name:configuration@revision; a revision may have slashes in it, as branches do.
_HUB_ID = re.compile(r"^(?P<id>[\w.-]+/[\w.-]+?)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?$")
# What `datasets` writes beside the rows.
_NOT_ROWS = ("dataset_info.json", "dataset_dict.json", "state.json")
_COMMIT = re.compile(r"^[0-9a-f]{7,40}$")
# Seconds to wait for the Hub's first answer.
_ANSWER_S = 3.0
# Data sets with several kinds of rows name the split with preferences so.
_HUB_SUFFIXES = ("", "_prefs", "_preferences")


class Source(Protocol):
    """The rows of one split."""

    @property
    def name(self) -> str:
        """What to call it in a message."""

    def rows(self) -> Iterator[Row]:
        """All rows, from the first; can be called again."""

    def sha256(self) -> str:
        """Hash of the content, as hex."""


class FileSource:
    """One file, or the shards of one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)

    @property
    def name(self) -> str:
        first = self.paths[0]
        return str(first) if len(self.paths) == 1 else f"{first} and {len(self.paths) - 1} more shards"

    def rows(self) -> Iterator[Row]:
        for path in self.paths:
            yield from read_rows(path)

    def sha256(self) -> str:
        return sha256_of(*self.paths)


class HubSource:
    """One split of a data set that the `datasets` library has downloaded and memory-mapped."""

    def __init__(self, name: str, dataset: Any) -> None:
        self.name = name
        self._dataset = dataset

    def rows(self) -> Iterator[Row]:
        number = 0
        # As Arrow has them, in batches, so that a row is the same here and in a file: `datasets` has objects of its own
        # for nested values, and decodes one row at a time.
        for table in self._dataset.with_format("arrow").iter(batch_size=256):
            for row in rows_of(table):
                number += 1
                yield Row(f"{self.name}:{number}", *row)

    def sha256(self) -> str:
        return sha256_of(*(Path(entry["filename"]) for entry in self._dataset.cache_files))


def find_splits(data: str | Path, needed: Sequence[str] = ("train",)) -> dict[str, Source]:
    """Map "train", "valid" and "test" to their sources.

    `data` is a file, which is the first of the `needed` splits alone; a folder; or a Hub id with an optional
    configuration and revision, `owner/name:configuration@revision`. In a folder, a split is the file (or the shards, or
    the sub-folder of files) that carries its name: `train.jsonl`, `anything.validation.parquet`,
    `data/test-00000-of-00002.parquet`.

    Raises:
        DataError: nothing there, none of the splits `needed`, or two files for one split.
    """
    path = Path(data).expanduser()
    if path.is_file():
        return {needed[0]: FileSource([path])}
    if path.is_dir():
        return folder_splits(path, needed)
    if path.exists():
        raise DataError(f"`data` {data}: is a device or pipe, expected a file or folder; write its rows into a file.")
    hub = _HUB_ID.match(str(data))
    # `data/train.jsonl` has the form of an id, and asking the Hub for it would hide that the path is mistyped.
    if hub is None or file_kind(path) in READERS or str(data).startswith("."):
        kinds = ", ".join(READERS)
        raise DataError(
            f"`data` {data}: no such file or folder; expected a folder with a {needed[0]} split, a file ({kinds}), or "
            "a Hub id such as owner/name."
        )
    return hub_splits(str(data), hub["id"], hub["config"], hub["revision"], needed)


def folder_splits(folder: Path, needed: Sequence[str]) -> dict[str, Source]:
    """`find_splits` for a folder."""
    # A folder named train.jsonl is a mistake that would otherwise be skipped in silence.
    for entry in (folder, *sorted(folder.iterdir())):
        if entry.is_dir() and file_kind(entry) in READERS:
            raise DataError(f"{entry}: is a folder, expected a file.")
    splits: dict[str, Source] = {}
    for split, names in SPLIT_NAMES.items():
        groups: dict[str, list[Path]] = {}
        for path in data_files(folder):
            stem = _split_name(path, folder)
            if _LAST_WORD.split(stem)[-1].lower() in names:
                groups.setdefault(str(path.parent / stem), []).append(path)
        # `train.jsonl` wins over `other.train.jsonl`, the folder over its `data/`.
        exact = [paths for key, paths in groups.items() if Path(key).name.lower() in names]
        candidates = exact if len(exact) == 1 else list(groups.values())
        if len(candidates) > 1 or any(len(paths) > 1 and not _are_shards(paths, folder) for paths in candidates):
            found = ", ".join(str(path.relative_to(folder)) for paths in candidates for path in paths[:4])
            raise DataError(f"{folder}: several files for the {split} split ({found}); keep one, or give its path.")
        if candidates:
            check_shards(candidates[0])
            splits[split] = FileSource(candidates[0])
    if not any(name in splits for name in needed):
        present = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "nothing"
        first = needed[0]
        raise DataError(f"{folder}: no {first}.jsonl (or *.{first}.jsonl, .csv, .parquet, ...) in it, found {present}.")
    return splits


def data_files(folder: Path) -> list[Path]:
    """Readable files in a folder, its `data/`, and its sub-folders that bear a split's name."""
    known = {name for names in SPLIT_NAMES.values() for name in names} | {"data"}
    folders = [folder, *(entry for entry in sorted(folder.iterdir()) if entry.is_dir() and entry.name in known)]
    files = [entry for each in folders for entry in _files_of(each)]
    return [entry for entry in files if file_kind(entry) in READERS and entry.name not in _NOT_ROWS]


def _files_of(folder: Path) -> list[Path]:
    """A folder's files; of one that `datasets` saved, those that it says hold the rows."""
    files = [entry for entry in sorted(folder.iterdir()) if entry.is_file()]
    state = folder / "state.json"
    if state not in files:
        return files
    # Beside them lie the results of `map` and `filter`, which are other rows.
    listed = read_json_table(state, DataError).get("_data_files")
    if not isinstance(listed, list):
        return files
    named = {entry.get("filename") for entry in listed if isinstance(entry, dict)}
    missing = sorted(str(name) for name in named if not (folder / str(name)).is_file())
    if missing:
        raise DataError(f"{state}: names {missing[0]}, which is not there; copy the whole folder.")
    return [entry for entry in files if entry.name in named]


def check_shards(paths: Sequence[Path]) -> None:
    """Make sure that the shards of a file are all there, and of one file; DataError where they are not."""
    found = [(path, shard) for path in paths if (shard := _SHARD.match(file_stem(path)))]
    for (_, stem), same in itertools.groupby(found, lambda each: (each[0].parent, each[1]["stem"])):
        shards = list(same)
        counts = sorted({shard["count"] for _, shard in shards})
        folder = shards[0][0].parent
        if len(counts) > 1:
            raise DataError(
                f"{folder}: shards of {stem} of which there are {int(counts[0])}, and of {int(counts[1])}; keep those "
                "of one."
            )
        numbers = {int(shard["number"]) for _, shard in shards}
        missing = next((number for number in range(int(counts[0])) if number not in numbers), None)
        if missing is not None:
            raise DataError(
                f"{folder}: shard {stem}-{missing:05d}-of-{counts[0]} is missing; fetch it, or give the path of one "
                "file."
            )


def _split_name(path: Path, folder: Path) -> str:
    """A file's name without ending and shard number; in a split's own folder, the folder's."""
    if path.parent not in (folder, folder / "data"):
        return path.parent.name
    shard = _SHARD.match(file_stem(path))
    return shard["stem"] if shard else file_stem(path)


def _are_shards(paths: Sequence[Path], folder: Path) -> bool:
    return all(_SHARD.match(file_stem(path)) or path.parent not in (folder, folder / "data") for path in paths)


def hub_splits(
    data: str, name: str, config: str | None, revision: str | None, needed: Sequence[str]
) -> dict[str, Source]:
    """`find_splits` for a data set on the Hub."""
    unreachable = why_unreachable(name, revision)
    silent = DataError(
        f"`data` {data}: no such file or folder, and the Hub cannot be reached ({unreachable}); check the name and the "
        "connection."
    )
    if unreachable and not may_be_cached(name):
        raise silent
    # Imported here: it takes seconds to load, and pandas with it.
    from datasets import load_dataset

    try:
        with offline() if unreachable else nullcontext():
            found = load_dataset(name, config, revision=revision)
    except Exception as error:  # Hub, HTTP, format and cache errors of three libraries; each means it is not to be had.
        if unreachable:
            raise silent from None
        raise DataError(
            f"`data` {data}: no such file or folder, and not to be had from the Hub as a data set ({reason_of(error)})."
        ) from None
    _check_revision(data, revision, found)
    splits: dict[str, Source] = {}
    for split, names in SPLIT_NAMES.items():
        candidates = [name + suffix for suffix in _HUB_SUFFIXES for name in names]
        chosen = next((candidate for candidate in candidates if candidate in found), None)
        if chosen is not None:
            splits[split] = HubSource(f"{data}/{chosen}", found[chosen])
    # A data set of one split is meant whatever that is called.
    if not any(name in splits for name in needed) and len(found) == 1:
        (only,) = found
        splits[needed[0]] = HubSource(f"{data}/{only}", found[only])
    if not any(name in splits for name in needed):
        raise DataError(f"`data` {data}: no {needed[0]} split, found {', '.join(map(str, found))}.")
    return splits


def why_unreachable(name: str, revision: str | None) -> str | None:
    """Why the Hub does not answer about a data set; None where it does, whatever it says.

    Asked once and for seconds: `datasets` asks six times, over half a minute, before it looks into its cache.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(name, revision=revision, timeout=_ANSWER_S)
    except (HfHubHTTPError, HFValidationError):
        return None
    except Exception as error:  # No route, no name, no time, no certificate, and offline mode, each of its own type.
        return reason_of(error, first_line=True)
    return None


def may_be_cached(name: str) -> bool:
    """Whether the caches of `datasets` or of the Hub's library have a folder for a data set."""
    from huggingface_hub import constants

    processed = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    downloaded = Path(constants.HF_HUB_CACHE)
    return any(
        (folder / f"{prefix}{name.replace('/', mark)}").exists()
        for folder, prefix, mark in ((processed, "", "___"), (downloaded, "datasets--", "--"))
    )


@contextmanager
def offline() -> Iterator[None]:
    """For the length of a `with` block, `datasets` looks into its cache alone."""
    import datasets
    import huggingface_hub

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        # Both libraries read the environment as they are imported: a variable set now would be too late.
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _check_revision(data: str, revision: str | None, found: Any) -> None:
    """Make sure that a data set is of the commit that was asked for."""
    # Offline, `datasets` takes the newest version in its cache, whichever was asked for. Its cache's folders are named
    # by commit, which is all there is to tell.
    if revision is None or not _COMMIT.match(revision):
        return
    files = [entry["filename"] for split in found.values() for entry in split.cache_files]
    if not any(part.startswith(revision) for file in files for part in Path(file).parts):
        raise DataError(
            f"`data` {data}: commit {revision} is not in the cache of data sets, which holds another; connect to the "
            "Hub, or leave out the revision."
        )
