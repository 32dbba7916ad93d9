"""Order, grouping and padding of pairs. NumPy only; a function of the seed and the epoch, so it can be replayed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from orpo_mlx.data.token_store import TokenStore
from orpo_mlx.types import Batch, TokenizedPair

_PAD_MULTIPLE = 8
_BUCKET_BATCHES = 16
# Padded tokens that cost less than running one more batch does.
_PADDING_WORTH_A_BATCH = 128


def collate(pairs: Sequence[TokenizedPair]) -> Batch:
    """Pad B pairs to one `Batch`: prompts on the left, completions on the right.

    Padding leaves log-probs alone. Completion widths are multiples of 8, which bounds the number of shapes.

    Raises:
        ValueError: no pairs.
    """
    if not pairs:
        raise ValueError("collate needs at least one pair, got none.")
    prompt_ids, prompt_mask = _pad([pair.prompt_ids for pair in pairs], left=True)
    chosen_ids, chosen_mask = _pad([pair.chosen_ids for pair in pairs])
    rejected_ids, rejected_mask = _pad([pair.rejected_ids for pair in pairs])
    padding = (~prompt_mask).sum(axis=1).astype(np.int32)
    return Batch(
        mx.array(prompt_ids),
        mx.array(prompt_mask),
        mx.array(padding) if padding.any() else None,
        mx.array(chosen_ids),
        mx.array(chosen_mask),
        mx.array(rejected_ids),
        mx.array(rejected_mask),
    )


def sequence_tokens(pairs: Sequence[TokenizedPair]) -> int:
    """Predicted tokens of prompt + chosen over all pairs: the normaliser of the NLL with `nll="sequence"`."""
    return sum(len(pair.prompt_ids) + len(pair.chosen_ids) - 1 for pair in pairs)


def epoch_order(
    pairs: Sequence[TokenizedPair], batch_size: int, *, seed: int, epoch: int, shuffle: bool = True
) -> list[list[int]]:
    """Indices of each batch of one epoch; every pair once, the last batch perhaps smaller.

    Shuffled, then sorted by length within runs of 16 batches, then the batches shuffled: neighbours are of like
    length, and the order depends on `seed` and `epoch` only. Without `shuffle`, in the order given.
    """
    indices = np.arange(len(pairs))
    if not shuffle:
        return _chunks(indices, batch_size)
    generator = np.random.default_rng((seed, epoch))
    generator.shuffle(indices)
    lengths = _pair_tokens(pairs)
    batches: list[list[int]] = []
    for run in _chunks(indices, batch_size * _BUCKET_BATCHES):
        by_length = np.array(run)[np.argsort(lengths[run], kind="stable")]
        batches.extend(_chunks(by_length, batch_size))
    # A short batch in the middle would be a noisier step than the others for no reason: it goes last.
    full = [batch for batch in batches if len(batch) == batch_size]
    rest = [batch for batch in batches if len(batch) < batch_size]
    generator.shuffle(full)
    return full + rest


def length_order(pairs: Sequence[TokenizedPair], batch_size: int) -> list[list[int]]:
    """Batches of like length for evaluation, where order does not matter."""
    return _chunks(np.argsort(_pair_tokens(pairs), kind="stable"), batch_size)


def steps_per_epoch(num_pairs: int, batch_size: int) -> int:
    """Batches in one epoch, the partial one included."""
    return -(-num_pairs // batch_size)


class TrainingOrder:
    """Endless batches of indices; `step` alone is its state, so that a resumed run continues where it stopped."""

    def __init__(
        self, pairs: Sequence[TokenizedPair], batch_size: int, *, seed: int, shuffle: bool, step: int = 0
    ) -> None:
        self._pairs, self._batch_size, self._seed, self._shuffle = pairs, batch_size, seed, shuffle
        self.step = step

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = steps_per_epoch(len(self._pairs), self._batch_size)
        while True:
            epoch, start = divmod(self.step, per_epoch)
            batches = epoch_order(self._pairs, self._batch_size, seed=self._seed, epoch=epoch, shuffle=self._shuffle)
            for batch in batches[start:]:
                self.step += 1
                yield batch


def micro_batches(window: Sequence[TokenizedPair], most_pairs: int, most_tokens: int) -> list[list[TokenizedPair]]:
    """The pairs of a window in batches of at most `most_pairs` pairs and `most_tokens` padded tokens.

    Each pair, by length, joins the batch it pads least, unless that costs more padding than a batch of its own is
    worth; a pair that is longer than `most_tokens` is always alone. Tokens are those that are run: prompt + chosen +
    rejected, each padded as `collate` does.
    """
    batches: list[list[TokenizedPair]] = []
    for pair in sorted(window, key=lambda pair: pair.pair_tokens):
        alone = padded_tokens([pair])
        costs = []
        for number, batch in enumerate(batches):
            together = padded_tokens([*batch, pair])
            cost = together - padded_tokens(batch) - alone
            if len(batch) < most_pairs and together <= most_tokens and cost <= _PADDING_WORTH_A_BATCH:
                costs.append((cost, number))
        if costs:
            batches[min(costs)[1]].append(pair)
        else:
            batches.append([pair])
    return batches


def padded_tokens(pairs: Sequence[TokenizedPair]) -> int:
    """Tokens that are run for a batch of these pairs, padding included."""
    prompt, chosen, rejected = (
        max(len(ids) for ids in side) for side in zip(*(pair[:3] for pair in pairs), strict=True)
    )
    return len(pairs) * (prompt + _up(chosen) + _up(rejected))


def _up(length: int) -> int:
    """The width a completion is padded to."""
    return -(-length // _PAD_MULTIPLE) * _PAD_MULTIPLE


def side_lengths(pairs: Sequence[TokenizedPair]) -> npt.NDArray[np.int64]:
    """(N, 3): tokens of prompt, chosen and rejected of each pair."""
    if isinstance(pairs, TokenStore):
        return pairs.lengths
    return np.array([[len(side) for side in pair[:3]] for pair in pairs], np.int64).reshape(-1, 3)


def _pair_tokens(pairs: Sequence[TokenizedPair]) -> npt.NDArray[Any]:
    """2·prompt + chosen + rejected of each pair."""
    return np.asarray(side_lengths(pairs) @ np.array([2, 1, 1]))


def _chunks(indices: npt.NDArray[Any], size: int) -> list[list[int]]:
    return [[int(index) for index in indices[start : start + size]] for start in range(0, len(indices), size)]


def _pad(rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """(B, L) ids and mask. Prompts keep the longest row's width: every row padded would cost the unpadded path."""
    longest = max(map(len, rows))
    width = longest if left else _up(longest)
    ids, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.bool_)
    for number, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(len(row))
        ids[number, columns] = row
        mask[number, columns] = True
    return ids, mask
