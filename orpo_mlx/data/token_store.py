"""Tokenised pairs on disk: written once, mapped into memory, read one at a time."""

from __future__ import annotations

import bisect
import errno
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from orpo_mlx.data.row_counts import RowReport
from orpo_mlx.files import sha256_of
from orpo_mlx.types import TokenizedPair

_TOKENS = "tokens.i32"
_INDEX = "index.npy"
_HEADER = "store.json"
# Columns of the index: first token; tokens of prompt, chosen and rejected; line; hash of the prompt; and as the bits of
# a float64 each margin (NaN where there is none) and weight.
_COLUMNS = 8


class Largest(NamedTuple):
    """The largest token id of a store."""

    token: int
    location: str


class TokenStore(Sequence[TokenizedPair]):
    """Pairs of a split as one flat array of int32 token ids and an index, both mapped from files.

    Args:
        folder: what `StoreWriter` wrote.

    Raises:
        ValueError: it is not whole.
    """

    def __init__(self, folder: Path) -> None:
        try:
            header = json.loads((folder / _HEADER).read_text(encoding="utf-8"))
            index = np.load(folder / _INDEX, allow_pickle=False)
            size = (folder / _TOKENS).stat().st_size
            # The index is hashed with the tokens: one row of it damaged would shift every pair after it.
            sound = header["sha256"] == sha256_of(folder / _TOKENS, head=index.tobytes())
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise ValueError(f"{folder}: not a whole token store ({error}).") from None
        if not sound:
            raise ValueError(f"{folder}: the tokens are not those that were written.")
        self.report = RowReport.from_json(header["report"])
        self.largest = Largest(*header["largest"])
        self.lengths: npt.NDArray[np.int64] = index[:, 1:4]
        """(N, 3): tokens of prompt, chosen and rejected."""
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
    def __getitem__(self, number: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, number: slice) -> list[TokenizedPair]: ...

    def __getitem__(self, number: int | slice) -> TokenizedPair | list[TokenizedPair]:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        start = int(self._starts[number])
        prompt, chosen, rejected = self.lengths[number].tolist()
        ids = self._tokens[start : start + prompt + chosen + rejected].tolist()
        return TokenizedPair(
            tuple(ids[:prompt]),
            tuple(ids[prompt : prompt + chosen]),
            tuple(ids[prompt + chosen :]),
            self.location(number),
            None if math.isnan(self.margins[number]) else float(self.margins[number]),
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
        self._folder = Path(tempfile.mkdtemp(prefix=".writing-", dir=target.parent))
        self._file = (self._folder / _TOKENS).open("wb")
        self._rows: list[npt.NDArray[np.int64]] = []
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

    def extend(self, pairs: Iterable[TokenizedPair]) -> None:
        """Add pairs, whose locations end in `:number`."""
        rows = []
        for pair in pairs:
            name, _, line = pair.location.rpartition(":")
            if not self._names or self._names[-1] != name:
                self._names.append(name)
                self._first.append(self._count)
            ids = np.array((*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids), np.int32)
            self._file.write(ids.tobytes())
            # Prompts are counted and compared between splits by hash, which 8 bytes tell apart in any data set.
            prompt = hashlib.blake2b(ids[: len(pair.prompt_ids)].tobytes(), digest_size=8).digest()
            if len(ids) and ids.max() > self._largest.token:
                self._largest = Largest(int(ids.max()), pair.location)
            lengths = (len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids))
            scored = np.array([math.nan if pair.margin is None else pair.margin, pair.weight], np.float64)
            hashed = int.from_bytes(prompt, "little", signed=True)
            rows.append((self._position, *lengths, int(line), hashed, *scored.view(np.int64).tolist()))
            self._position += len(ids)
            self._count += 1
        if rows:
            self._rows.append(np.array(rows, np.int64))

    def close(self, report: RowReport) -> TokenStore:
        """Finish the files, open them, and move their folder to its place.

        Opened first: another process that reads the same rows may put its own, equal, store there at any moment.
        """
        self._file.close()
        index = np.concatenate(self._rows) if self._rows else np.zeros((0, _COLUMNS), np.int64)
        np.save(self._folder / _INDEX, index)
        header: dict[str, Any] = {
            "sha256": sha256_of(self._folder / _TOKENS, head=index.tobytes()),
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
            damaged = Path(tempfile.mkdtemp(prefix=".damaged-", dir=self._target.parent))
            with suppress(FileNotFoundError):
                self._target.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        try:
            self._folder.rename(self._target)
        except OSError as error:
            # Another process was faster, with the same tokens; this one's are read from the folder they are in.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
