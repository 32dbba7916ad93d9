"""Several processes, on one machine or more, that train as one: who has which rows, and how they agree."""

from __future__ import annotations

import json
import os
import select
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from orpo_mlx.config.flags import with_flags
from orpo_mlx.engine.pair_scorer import AnyLogProbs, join_logps
from orpo_mlx.errors import TrainingError, reason_of
from orpo_mlx.types import GroupLogProbs, PairLogProbs

# One of these is set in a process that was started by mlx.launch or mpirun.
_STARTED_BY = ("MLX_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# The status of bad input as well: whoever started this has to do something.
_LOST = 2
# A transfer of tens of MiB is as fast per byte as a larger one, and what is in flight stays small beside a model.
_FEW_BYTES = 32 << 20
# Far below any timeout, and too seldom to be seen in a profile.
_LOOK_EVERY_S = 0.2

Thing = TypeVar("Thing")


class Ranks:
    """The processes of a run. Rank 0 writes and speaks; all take the same steps, each on its own rows.

    Every method that exchanges something must be called by all ranks in the same order. Where the others do not answer
    within `timeout_s`, the process ends with a sentence and status 2.

    Args:
        group: MLX's; None for a process that is alone.
        timeout_s: the longest wait for the others.
    """

    def __init__(self, group: mx.distributed.Group | None = None, timeout_s: float = 300.0) -> None:
        self._group = group
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        self.timeout_s = timeout_s
        self._deadline: float | None = None
        if self.size > 1:
            # A transfer that hangs cannot be interrupted: only another thread can end it, and the process with it.
            threading.Thread(target=self._watch, daemon=True).start()

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def share(self, things: Sequence[Thing], rank: int | None = None) -> list[Thing]:
        """What a rank (this one, if none is given) has of `things`: disjoint, and all of it together."""
        # Every size-th: neighbours in a sorted list are of like length, so that ranks have like work.
        return list(things[self.rank if rank is None else rank :: self.size])

    def gather(self, value: Any) -> list[Any]:
        """A JSON value of every rank, by rank."""
        return [json.loads(content) for content in self.gather_bytes(json.dumps(value).encode())]

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """Some bytes of every rank, by rank."""
        if self.size == 1:
            return [content]
        with self._limited():
            # MLX gathers arrays of one shape alone: lengths first, then all contents padded to the longest.
            sizes = self._all_gather(np.array([len(content)], np.uint32)).tolist()
            padded = np.zeros(max(1, *sizes), np.uint8)
            padded[: len(content)] = np.frombuffer(content, np.uint8)
            rows = self._all_gather(padded).reshape(self.size, -1)
        return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]

    def from_first(self, content: bytes) -> bytes:
        """Rank 0's bytes; what the others give is not looked at."""
        if self.size == 1:
            return content
        size = self.gather(len(content))[0]
        received = bytearray()
        for start in range(0, size, _FEW_BYTES):
            piece = np.zeros(min(_FEW_BYTES, size - start), np.uint8)
            if self.first:
                piece[:] = np.frombuffer(content[start : start + _FEW_BYTES], np.uint8)
            # MLX has no broadcast. A sum in which all others give zeros is one.
            received += np.array(self.sum({"piece": mx.array(piece)})["piece"]).tobytes()
        return bytes(received)

    def gather_logps(self, parts: Sequence[AnyLogProbs]) -> AnyLogProbs:
        """The log-probs of all ranks' batches as those of one batch, those of rank 0 first; without gradient."""
        own = [[None if column is None else column.tolist() for column in part] for part in parts]
        everyone = self.gather([type(part).__name__ for part in parts[:1]] + own)
        # A rank may have had no batch, and so not know what the others' are.
        kind: Any = next(kind for kind in (PairLogProbs, GroupLogProbs) if [kind.__name__] in [e[:1] for e in everyone])
        columns = [part for parts_of_rank in everyone for part in parts_of_rank[1:]]
        joined: AnyLogProbs = join_logps(
            [kind(*(None if column is None else mx.array(column) for column in part)) for part in columns]
        )
        return joined

    def sum(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The sum of each array over all ranks; the same bits on all of them."""
        if self.size == 1:
            return dict(arrays)
        summed: dict[str, mx.array] = {}
        with self._limited():
            for names in _batches(arrays):
                flat = mx.concatenate([arrays[name].reshape(-1) for name in names])
                total = mx.distributed.all_sum(flat, group=self._group)
                # Now: a lazy transfer would take place wherever it is first looked at, outside of the time limit.
                mx.eval(total)
                # One transfer for many small arrays: LoRA has two of each layer, and latency would rule.
                bounds = np.cumsum([arrays[name].size for name in names])[:-1].tolist()
                for name, part in zip(names, mx.split(total, bounds), strict=True):
                    summed[name] = part.reshape(arrays[name].shape)
                mx.eval(summed)
        return summed

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Raise TrainingError where a rank has other `facts` than rank 0; it names the rank and what it has."""
        everyone = self.gather(facts)
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    self._wait_for_all()
                    raise TrainingError(
                        f"rank {rank} has {name} {_short(theirs.get(name))}, rank 0 has {_short(value)}; "
                        "start all ranks with the same settings, model and data"
                    )

    def _wait_for_all(self) -> None:
        """Let every rank come this far: one that ends at once takes from the others what they have not read yet."""
        with suppress(TrainingError):
            self.gather(None)

    def _all_gather(self, array: Any) -> Any:
        gathered = mx.distributed.all_gather(mx.array(array), group=self._group)
        mx.eval(gathered)
        return np.array(gathered)

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """A transfer that ends: with a TrainingError where a rank is gone."""
        self._deadline = time.monotonic() + self.timeout_s
        try:
            yield
        except RuntimeError as error:
            raise TrainingError(
                f"rank {self.rank}: the connection to another rank is lost ({reason_of(error)})"
            ) from None
        finally:
            self._deadline = None

    def _watch(self) -> None:
        while True:
            time.sleep(_LOOK_EVERY_S)
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                _leave(
                    f"rank {self.rank}: the other ranks have not answered for {self.timeout_s:g} s (`rank_timeout`); "
                    "one of them has ended, or does something else; `resume` goes on from the last checkpoint"
                )


def find_ranks(timeout_s: float) -> Ranks:
    """The ranks this process was started with by `mlx.launch`; one that was started by itself is alone.

    Raises:
        TrainingError: it was started as one of several, and no backend brings them together.
    """
    if not any(name in os.environ for name in _STARTED_BY) or _is_empty(os.environ.get("MLX_HOSTFILE")):
        return Ranks()
    with _ended_by_a_child(timeout_s):
        try:
            group = mx.distributed.init(strict=True)
        except RuntimeError as error:
            raise TrainingError(f"the ranks cannot be brought together ({reason_of(error)})") from None
    return Ranks(group, timeout_s)


@contextmanager
def _ended_by_a_child(timeout_s: float) -> Iterator[None]:
    """End the process with a sentence if the block takes longer."""
    # MLX waits for the others' first word with Python's lock in hand: no thread of this process could say anything. A
    # child can. It ends when its pipe is closed, which the system does for a process that is gone.
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        if not select.select([reading], [], [], timeout_s)[0]:
            os.write(2, f"the other ranks have not come within {timeout_s:g} s.\n".encode())
            os.kill(os.getppid(), signal.SIGTERM)
        # Past Python's own exit: handlers and unwritten buffers are copies of the parent's.
        os._exit(0)
    os.close(reading)
    try:
        yield
    finally:
        os.close(writing)
        os.waitpid(child, 0)


def _is_empty(hosts: str | None) -> bool:
    """Whether `mlx.launch` has started one process alone."""
    # Its list of hosts is then an empty file.
    return hosts is not None and Path(hosts).is_file() and not Path(hosts).read_text(encoding="utf-8").strip()


def _leave(sentence: str) -> None:
    """End the process, whatever its main thread is waiting for."""
    # No command gets to see this, so its flags are named here.
    os.write(2, f"{with_flags(sentence)}.\n".encode())
    # sys.exit would end this thread alone, and run handlers that wait for the main one.
    os._exit(_LOST)


def _batches(arrays: Mapping[str, mx.array]) -> Iterator[list[str]]:
    """Names in order, in groups of one dtype that are worth a transfer."""
    group: list[str] = []
    size = 0
    # Sorted: ranks may have built their tables in another order, and must send the same thing at the same time.
    for name in sorted(arrays):
        array = arrays[name]
        if group and (arrays[group[0]].dtype != array.dtype or size + array.nbytes > _FEW_BYTES):
            yield group
            group = []
            size = 0
        group.append(name)
        size += array.nbytes
    if group:
        yield group


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
