"""Reference log-probs in memory and on disk, so that no run computes again what an earlier one has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from orpo_mlx.errors import reason_of
from orpo_mlx.files import write_atomically

_KEY = np.dtype("S16")
# `save(sparingly=True)` waits until one row of this many is new.
_SPARING = 10


class ReferenceRows(NamedTuple):
    """N pairs: 24 bytes each."""

    keys: npt.NDArray[np.bytes_]
    """(N,) 16-byte digests of a pair's token ids, ascending."""
    logps: npt.NDArray[np.float32]
    """(N, 2) summed log-probs of the chosen and the rejected completion, nats."""


class ReferenceTable:
    """Reference log-probs by pair, remembered for the run and, with a `file`, for later ones.

    The file is NumPy's `.npz`: `keys` and `logps` as in `ReferenceRows`, and `identity`, a JSON text. It is replaced
    whole. A file that is damaged, or whose identity is another, is not used: `notes` says so and its rows are computed
    anew.

    Args:
        file: where rows are kept; None keeps them for this run only.
        identity: everything the numbers depend on besides a pair's token ids.
    """

    def __init__(self, file: Path | None = None, identity: Mapping[str, Any] | None = None) -> None:
        self._file = file
        self._identity = _canonical(identity or {})
        self.notes: list[str] = []
        """Sentences for the user, newest last."""
        self._new: dict[bytes, tuple[float, float]] = {}
        self._rows = self._read()

    def __len__(self) -> int:
        return len(self._rows.keys) + len(self._new)

    def get(self, key: bytes) -> tuple[float, float] | None:
        """Log-probs of the chosen and the rejected completion, or None where they are not known."""
        if key in self._new:
            return self._new[key]
        keys = self._rows.keys
        index = int(np.searchsorted(keys, np.array(key, _KEY)))
        # Both as NumPy's type, which drops zero bytes at a key's end: as `bytes` such a key would not be found.
        if index == len(keys) or keys[index] != np.array(key, _KEY):
            return None
        chosen, rejected = self._rows.logps[index].tolist()
        return chosen, rejected

    def add(self, key: bytes, chosen: float, rejected: float) -> None:
        """Remember a pair; what is known already stays."""
        if self.get(key) is None:
            self._new[key] = chosen, rejected

    def arrays(self) -> dict[str, mx.array]:
        """All rows that are finite, for a checkpoint: `keys` (N, 16) uint8 and `logps` (N, 2) float32."""
        rows = self._merged(ReferenceRows(np.empty(0, _KEY), np.empty((0, 2), np.float32)))
        return {"keys": mx.array(rows.keys.view(np.uint8).reshape(-1, 16)), "logps": mx.array(rows.logps)}

    @property
    def identity(self) -> str:
        """A name for all that the numbers depend on besides a pair's token ids."""
        return hashlib.sha256(self._identity.encode()).hexdigest()

    def restore(self, arrays: Mapping[str, mx.array], identity: str = "") -> None:
        """Know what `arrays` gave and nothing else; KeyError or ValueError where they are something else.

        `identity` is that of the table that gave them: a run goes on with the numbers it began with, also under other
        versions or settings, and the file is for no others than its own.
        """
        keys = np.array(arrays["keys"])
        logps = np.array(arrays["logps"])
        if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != _KEY.itemsize:
            raise ValueError("keys of another shape or type")
        self._rows = _checked(ReferenceRows(np.ascontiguousarray(keys).view(_KEY).reshape(-1), logps))
        self._new.clear()
        if identity != self.identity:
            self._file = None

    def save(self, *, sparingly: bool = False) -> None:
        """Write the file with the new rows, and those another run has put there meanwhile.

        A disk that cannot be written costs a note, not the run. `sparingly` waits for a tenth of the rows to be new:
        all saves of a run then write a few times the file's final size, however often they come.
        """
        lost = {key: row for key, row in self._new.items() if not np.isfinite(row).all()}
        new = len(self._new) - len(lost)
        if self._file is None or not new or (sparingly and _SPARING * new < len(self)):
            return
        self._rows = self._merged(self._read())
        # Known to this run alone: whoever reads the file computes them again.
        self._new = lost
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, self._write)
        except OSError as error:
            self.notes.append(f"{self._file}: reference log-probs cannot be kept there ({error.strerror or error}).")
            self._file = None

    def _merged(self, theirs: ReferenceRows) -> ReferenceRows:
        ours = list(self._new.items())
        keys = np.concatenate([self._rows.keys, np.array([key for key, _ in ours], _KEY), theirs.keys])
        news = np.array([pair for _, pair in ours], np.float32).reshape(-1, 2)
        logps = np.concatenate([self._rows.logps, news, theirs.logps])
        # The first of equal keys: this run goes on with the numbers it began with.
        keys, first = np.unique(keys, return_index=True)
        # What is not finite is named where it is met, and would make the whole file one that is damaged.
        good = np.isfinite(logps[first]).all(axis=1)
        return ReferenceRows(keys[good], logps[first][good])

    def _write(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, keys=self._rows.keys, logps=self._rows.logps, identity=np.array(self._identity))

    def _read(self) -> ReferenceRows:
        """The rows of the file, none where there is no file or it is not what it should be."""
        if self._file is not None and self._file.exists():
            try:
                # No Python objects are read, which could run code; each part carries a CRC-32 sum.
                with self._file.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                    rows = ReferenceRows(arrays["keys"], arrays["logps"])
                    identity = str(arrays["identity"])
                if identity == self._identity:
                    return _checked(rows)
                problem = "is of another model, other settings or versions"
            except Exception as error:  # Any of a dozen, depending on which byte is wrong; each means it is of no use.
                problem = f"is damaged ({reason_of(error)})"
            self.notes.append(f"{self._file} {problem}: its reference log-probs are not used, but computed again.")
        return ReferenceRows(np.empty(0, _KEY), np.empty((0, 2), np.float32))


def identity_digest(identity: Mapping[str, Any]) -> str:
    """A name for an identity, 32 hex digits."""
    return hashlib.sha256(_canonical(identity).encode()).hexdigest()[:32]


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the name, shape, dtype and content of every parameter, and the scale of every adapter."""
    # All bytes count, since size and date of a file prove nothing about an array in memory. Arrays are hashed in place,
    # in threads (hashlib lets go of the interpreter's lock): 1.6 GB/s per core on the x86-64 machine this was written
    # on, less time than the weights take to load.
    parameters: list[tuple[str, mx.array]] = sorted(dict(tree_flatten(model.parameters())).items())
    contents = [memoryview(array.reshape(-1).view(mx.uint8)) for _, array in parameters]  # type: ignore[arg-type]
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda content: hashlib.sha256(content).hexdigest(), contents))
    described: list[Any] = [
        [name, list(array.shape), str(array.dtype), digest]
        for (name, array), digest in zip(parameters, digests, strict=True)
    ]
    # A scale is a number of Python's and no parameter, but changes the model as much.
    described += sorted([name, module.scale] for name, module in model.named_modules() if "lora_a" in module)
    return hashlib.sha256(_canonical(described).encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _checked(rows: ReferenceRows) -> ReferenceRows:
    """`rows`, or a ValueError that says what they lack."""
    keys, logps = rows
    if keys.dtype != _KEY or logps.dtype != np.float32 or keys.ndim != 1 or logps.shape != (len(keys), 2):
        raise ValueError("arrays of another shape or type")
    if not (np.isfinite(logps).all() and (keys[:-1] < keys[1:]).all()):
        raise ValueError("rows that are not finite or not in order")
    return rows
