"""Tokenised pairs and groups on disk: written once, mapped into memory, read one at a time."""

from __future__ import annotations

import bisect
import errno
import hashlib
import itertools
import json
import math
import shutil
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, overload
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from orpo_mlx.data.row_counts import RowReport
from orpo_mlx.data.tokens.trained_turns import read_ids
from orpo_mlx.files import new_folder, sha256_of
from orpo_mlx.types import Example, TokenizedGroup, TokenizedPair

_TOKENS = "tokens.i32"
_INDEX = "index.npy"
_GROUPS = "groups.npz"
_HEADER = "store.json"
# Columns of the index: first token; tokens of prompt, of the first completion and of all others; line; hash of the
# prompt; and as the bits of a float64 each margin (NaN where there is none) and weight.
_COLUMNS = 8
# What a row of a store is.
PAIR, RATED, LABELLED = 0, 1, 2


class Largest(NamedTuple):
    """The largest token id of a store."""

    token: int
    location: str


class GroupTable(NamedTuple):
    """What the groups of a store are made of; a store of pairs alone has none."""

    kinds: npt.NDArray[np.uint8]
    """(N,): whether a row is a pair, a group with scores or one with labels."""
    counts: npt.NDArray[np.int64]
    """(N,): its completions."""
    pair_counts: npt.NDArray[np.int64]
    """(N,): its pairs."""
    lengths: npt.NDArray[np.int64]
    """(M,): tokens of each completion of each row, one after another."""
    scores: npt.NDArray[np.float64]
    """(M,): their scores."""
    pairs: npt.NDArray[np.int64]
    """(P, 2): better and worse of each pair of each row, by place among the row's completions."""

    def bytes(self) -> bytes:
        """All of it, to be hashed."""
        return b"".join(array.tobytes() for array in self)


class TokenStore(Sequence[Example]):
    """Pairs and groups of a split as one flat array of int32 token ids and an index, both mapped from files.

    Args:
        folder: what `StoreWriter` wrote.

    Raises:
        ValueError: it is not whole.
    """

    def __init__(self, folder: Path) -> None:
        try:
            header = json.loads((folder / _HEADER).read_text(encoding="utf-8"))
            index = np.load(folder / _INDEX, allow_pickle=False)
            groups = _read_groups(folder / _GROUPS)
            size = (folder / _TOKENS).stat().st_size
            # The index is hashed with the tokens: one row of it damaged would shift every pair after it.
            head = index.tobytes() + (groups.bytes() if groups else b"")
            sound = header["sha256"] == sha256_of(folder / _TOKENS, head=head)
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
            raise ValueError(f"{folder}: not a whole token store ({error}).") from None
        if not sound:
            raise ValueError(f"{folder}: the tokens are not those that were written.")
        self.report = RowReport.from_json(header["report"])
        self.largest = Largest(*header["largest"])
        self.lengths: npt.NDArray[np.int64] = index[:, 1:4]
        """(N, 3): tokens of prompt, first completion and all others: of a pair's prompt, chosen and rejected."""
        self.groups = groups
        """What its groups are made of; None where all rows are pairs."""
        self.counts: npt.NDArray[np.int64] = np.full(len(index), 2) if groups is None else groups.counts
        """(N,): completions of each row."""
        if groups is not None:
            self._first_completion = np.cumsum(groups.counts) - groups.counts
            self._first_pair = np.cumsum(groups.pair_counts) - groups.pair_counts
        self.prompt_hashes: npt.NDArray[np.int64] = index[:, 5]
        """(N,): equal where prompts are."""
        self.margins: npt.NDArray[np.float64] = index[:, 6].copy().view(np.float64)
        """(N,): score of chosen minus score of rejected; NaN where the row has no scores."""
        self.weights: npt.NDArray[np.float64] = index[:, 7].copy().view(np.float64)
        """(N,): what a pair's loss is multiplied by."""
        self._starts = index[:, 0]
        self._lines = index[:, 4]
        self._first = header["first_pair_of_file"]
        self._names = header["files"]
        # An empty file cannot be mapped.
        self._tokens = np.memmap(folder / _TOKENS, np.int32, "r") if size else np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, number: int) -> Example: ...
    @overload
    def __getitem__(self, number: slice) -> list[Example]: ...

    def __getitem__(self, number: int | slice) -> Example | list[Example]:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        start = int(self._starts[number])
        prompt, chosen, rejected = self.lengths[number].tolist()
        ids = self._tokens[start : start + prompt + chosen + rejected].tolist()
        if self.groups is not None and self.groups.kinds[number] != PAIR:
            return self._group(number, ids[:prompt], ids[prompt:])
        return TokenizedPair(
            tuple(ids[:prompt]),
            tuple(ids[prompt : prompt + chosen]),
            tuple(ids[prompt + chosen :]),
            self.location(number),
            None if math.isnan(self.margins[number]) else float(self.margins[number]),
            float(self.weights[number]),
        )

    def _group(self, number: int, prompt: list[int], completions: list[int]) -> TokenizedGroup:
        assert self.groups is not None
        first, pair = self._first_completion[number], self._first_pair[number]
        own = slice(first, first + self.groups.counts[number])
        ends = np.cumsum(self.groups.lengths[own]).tolist()
        return TokenizedGroup(
            tuple(prompt),
            tuple(tuple(completions[start:end]) for start, end in zip([0, *ends], ends, strict=False)),
            tuple(self.groups.scores[own].tolist()),
            bool(self.groups.kinds[number] == LABELLED),
            tuple(map(tuple, self.groups.pairs[pair : pair + self.groups.pair_counts[number]].tolist())),
            self.location(number),
            float(self.weights[number]),
        )

    def location(self, number: int) -> str:
        """Where pair `number` stands, `file:line`."""
        # Pairs of one file stand together, so a list of where each begins will do.
        file = bisect.bisect_right(self._first, number) - 1
        return f"{self._names[file]}:{self._lines[number]}"


class StoreWriter:
    """Writes a `TokenStore` pair by pair into a new temporary folder beside `target`; `close` puts it in place."""

    def __init__(self, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        self._target = target
        self._folder = new_folder(target.parent, ".writing-")
        self._file = (self._folder / _TOKENS).open("wb")
        self._rows: list[npt.NDArray[np.int64]] = []
        self._groups: GroupColumns | None = None
        self._count = 0
        self._position = 0
        self._names: list[str] = []
        self._first: list[int] = []
        self._largest = Largest(-1, "")

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing of a store that was not closed."""
        self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def extend(self, pairs: Sequence[Example]) -> None:
        """Add pairs or groups, whose locations end in `:number`."""
        rows = []
        for pair in pairs:
            # From the right, since a file's name may have colons in it.
            name, _, line = pair.location.rpartition(":")
            if not self._names or self._names[-1] != name:
                self._names.append(name)
                self._first.append(self._count)
            ids = np.array([*pair.prompt_ids, *itertools.chain(*pair.completions)], np.int32)
            self._file.write(ids.tobytes())
            # Prompts are counted and compared between splits by hash, which 8 bytes tell apart in any data set.
            # A text by itself has its first token for a prompt, which says nothing of it.
            text = isinstance(pair, TokenizedGroup) and pair.labelled and len(pair.prompt_ids) <= 1
            asked = ids if text else ids[: len(pair.prompt_ids)]
            prompt = hashlib.blake2b(asked.tobytes(), digest_size=8).digest()
            largest = max(read_ids(ids.tolist()), default=-1)
            if largest > self._largest.token:
                self._largest = Largest(largest, pair.location)
            first, prompt_tokens = len(pair.completions[0]), len(pair.prompt_ids)
            lengths = (prompt_tokens, first, len(ids) - prompt_tokens - first)
            scored = np.array([math.nan if pair.margin is None else pair.margin, pair.weight], np.float64)
            # Signed, as the index is of int64: half of all hashes without a sign would not fit.
            hashed = int.from_bytes(prompt, "little", signed=True)
            rows.append((self._position, *lengths, int(line), hashed, *scored.view(np.int64).tolist()))
            self._position += len(ids)
            self._count += 1
        if rows:
            self._rows.append(np.array(rows, np.int64))
            if self._groups is None and not all(isinstance(pair, TokenizedPair) for pair in pairs):
                # The table holds every row: those before the first group are pairs, whose lengths the index has.
                self._groups = GroupColumns()
                for lengths_before in np.concatenate(self._rows)[: -len(rows), 2:4].tolist():
                    self._groups.add_pair(*lengths_before)
            if self._groups is not None:
                self._groups.extend(pairs)

    def close(self, report: RowReport) -> TokenStore:
        """Finish the files, open them, and move their folder to its place.

        Opened first: another process that reads the same rows may put its own, equal, store there at any moment.
        """
        self._file.close()
        index = np.concatenate(self._rows) if self._rows else np.zeros((0, _COLUMNS), np.int64)
        np.save(self._folder / _INDEX, index)
        head = index.tobytes()
        # A store of pairs alone needs no table, and is the file it always was.
        if self._groups is not None:
            groups = self._groups.table()
            np.savez(self._folder / _GROUPS, **groups._asdict())
            head += groups.bytes()
        header: dict[str, Any] = {
            "sha256": sha256_of(self._folder / _TOKENS, head=head),
            "files": self._names,
            "first_pair_of_file": self._first,
            "largest": self._largest,
            "report": report.to_json(),
        }
        (self._folder / _HEADER).write_text(json.dumps(header), encoding="utf-8")
        store = TokenStore(self._folder)
        self._put_in_place()
        return store

    def _put_in_place(self) -> None:
        # Whole stores are opened and not written again, so what stands there is damaged. Moved first: to remove it
        # where it stands would let another process see half of it.
        if self._target.exists():
            damaged = new_folder(self._target.parent, ".damaged-")
            with suppress(FileNotFoundError):
                self._target.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        try:
            self._folder.rename(self._target)
        except OSError as error:
            # Another process was faster, with the same tokens; this one's are read from the folder they are in.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


class GroupColumns:
    """A `GroupTable` that grows row by row."""

    def __init__(self) -> None:
        self._kinds = array("B")
        self._counts, self._pair_counts, self._lengths, self._pairs = (array("q") for _ in range(4))
        self._scores = array("d")

    def add_pair(self, chosen_tokens: int, rejected_tokens: int) -> None:
        """Add a row that is a pair."""
        self._add(PAIR, (chosen_tokens, rejected_tokens), (1.0, 0.0), ((0, 1),))

    def extend(self, examples: Sequence[Example]) -> None:
        """Add rows."""
        for example in examples:
            lengths = tuple(map(len, example.completions))
            if isinstance(example, TokenizedPair):
                self.add_pair(*lengths)
            else:
                self._add(LABELLED if example.labelled else RATED, lengths, example.scores, example.pairs)

    def table(self) -> GroupTable:
        """All rows."""
        return GroupTable(
            np.array(self._kinds, np.uint8),
            np.array(self._counts, np.int64),
            np.array(self._pair_counts, np.int64),
            np.array(self._lengths, np.int64),
            np.array(self._scores, np.float64),
            np.array(self._pairs, np.int64).reshape(-1, 2),
        )

    def _add(
        self, kind: int, lengths: Sequence[int], scores: Sequence[float], pairs: Sequence[tuple[int, int]]
    ) -> None:
        self._kinds.append(kind)
        self._counts.append(len(lengths))
        self._pair_counts.append(len(pairs))
        self._lengths.extend(lengths)
        self._scores.extend(scores)
        self._pairs.extend(itertools.chain(*pairs))


def _read_groups(path: Path) -> GroupTable | None:
    if not path.exists():
        return None
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return GroupTable(*(arrays[name] for name in GroupTable._fields))
