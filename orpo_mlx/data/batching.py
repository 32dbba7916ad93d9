"""Order, grouping and padding of pairs. NumPy only; a function of the seed and the epoch, so it can be replayed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from orpo_mlx.data.token_store import TokenStore
from orpo_mlx.device_profile import RowLayout, device_profile
from orpo_mlx.types import Batch, TokenizedPair

_BUCKET_BATCHES = 16
# Padded tokens that cost less than running one more batch does.
_PADDING_WORTH_A_BATCH = 128
_STEPS_PER_OCTAVE = 16

Ids = Sequence[int]
Places = npt.NDArray[np.int64]


class CompletionValues(NamedTuple):
    """Values for each token of a pair's two completions."""

    chosen: npt.NDArray[Any]
    rejected: npt.NDArray[Any]


def collate(pairs: Sequence[TokenizedPair], layout: RowLayout | None = None, *, with_prompt: bool = False) -> Batch:
    """B pairs as one `Batch`: what their prompts share with the completions once, the rest before each completion.

    All prompts give the same number of tokens to `prefix_ids`, so that only the right end of a row is ever padded:
    every row is causal from its first token on, and no layer needs a mask. The last token of a completion is not run,
    since nothing is predicted from it.

    Args:
        pairs: B pairs.
        layout: how rows are made; the device profile's by default.
        with_prompt: whether the log-probs of prompt tokens are wanted as well.

    Raises:
        ValueError: no pairs.
    """
    if not pairs:
        raise ValueError("collate needs at least one pair, got none.")
    layout = layout or device_profile().layout
    shared = shared_tokens(pairs, layout)
    row_ids = [_padded(rows, layout) for rows in _row_groups(pairs, shared, layout)]
    widths = [ids.shape[1] for ids in row_ids]
    places = _completion_places(pairs, shared, widths, layout)
    targets = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    if with_prompt:
        places += _prompt_places(pairs, shared, widths, layout)
        targets += [pair.prompt_ids[1:] for pair in pairs]
    lengths = [len(ids) for ids in targets]
    size = bucket(sum(lengths), layout.token_multiple, layout)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    members = np.zeros((len(lengths), size), np.bool_)
    members[owner, np.arange(owner.size)] = True
    count = len(pairs)
    prefix = np.array([pair.prompt_ids[:shared] for pair in pairs], np.int32)
    return Batch(
        mx.array(prefix) if shared else None,
        tuple(map(mx.array, row_ids)),
        mx.array(_flat(places, size)),
        mx.array(_flat(targets, size)),
        mx.array(members[:count]),
        mx.array(members[count : 2 * count]),
        mx.array(members[2 * count :]) if with_prompt else None,
    )


def shared_tokens(pairs: Sequence[TokenizedPair], layout: RowLayout) -> int:
    """Tokens of each prompt that are run once for both completions: as many in all prompts, and never a last token,
    since a completion's first token is predicted from it."""
    if not layout.share_prompt:
        return 0
    return bucket(min(len(pair.prompt_ids) for pair in pairs) - 1, layout.multiple, layout, up=False)


def bucket(length: int, multiple: int, layout: RowLayout, *, up: bool = True) -> int:
    """`length`, rounded up or down to a multiple of `multiple`.

    With `layout.few_shapes` to one of at most 16 sizes between a length and its double, so that shapes repeat and
    padding takes little.
    """
    step = multiple
    while layout.few_shapes and length > step * _STEPS_PER_OCTAVE:
        step *= 2
    return (-(-length // step) if up else length // step) * step


def split_by_completion(pairs: Sequence[TokenizedPair], values: npt.NDArray[Any]) -> list[CompletionValues]:
    """Of values for a batch's predicted tokens, those of each pair's chosen and rejected completion."""
    ends = np.cumsum([len(pair.chosen_ids) for pair in pairs] + [len(pair.rejected_ids) for pair in pairs]).tolist()
    parts = [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return [CompletionValues(*both) for both in zip(parts[: len(pairs)], parts[len(pairs) :], strict=True)]


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


def micro_batches(
    step_batch: Sequence[TokenizedPair], most_pairs: int, most_tokens: int, layout: RowLayout | None = None
) -> list[list[TokenizedPair]]:
    """The pairs of a step in batches of at most `most_pairs` pairs and `most_tokens` tokens, padding included.

    Each pair, by length, joins the batch it pads least, unless that costs more tokens than a batch of its own is worth;
    a pair that is longer than `most_tokens` is always alone. Tokens are those that are run, as `collate` lays them out.
    """
    layout = layout or device_profile().layout
    batches: list[list[TokenizedPair]] = []
    for pair in sorted(step_batch, key=lambda pair: pair.pair_tokens):
        alone = padded_tokens([pair], layout)
        costs = []
        for number, batch in enumerate(batches):
            together = padded_tokens([*batch, pair], layout)
            cost = together - padded_tokens(batch, layout) - alone
            if len(batch) < most_pairs and together <= most_tokens and cost <= _PADDING_WORTH_A_BATCH:
                costs.append((cost, number))
        if costs:
            batches[min(costs)[1]].append(pair)
        else:
            batches.append([pair])
    return batches


def padded_tokens(pairs: Sequence[TokenizedPair], layout: RowLayout | None = None) -> int:
    """Tokens that are run for a batch of these pairs, padding included."""
    layout = layout or device_profile().layout
    shared = shared_tokens(pairs, layout)
    widths = [
        bucket(max(len(pair.prompt_ids) - shared + len(ids) - 1 for pair, ids in rows), layout.row_multiple, layout)
        for rows in zip(*([(pair, pair.chosen_ids), (pair, pair.rejected_ids)] for pair in pairs), strict=True)
    ]
    return len(pairs) * (shared + (2 * max(widths) if layout.joined else sum(widths)))


def side_lengths(pairs: Sequence[TokenizedPair]) -> npt.NDArray[np.int64]:
    """(N, 3): tokens of prompt, chosen and rejected of each pair."""
    if isinstance(pairs, TokenStore):
        return pairs.lengths
    return np.array([[len(side) for side in pair[:3]] for pair in pairs], np.int64).reshape(-1, 3)


def row_weights(pairs: Sequence[TokenizedPair]) -> npt.NDArray[np.float64]:
    """(N,): what the loss of each pair is multiplied by."""
    return pairs.weights if isinstance(pairs, TokenStore) else np.array([pair.weight for pair in pairs], np.float64)


def row_margins(pairs: Sequence[TokenizedPair]) -> npt.NDArray[np.float64]:
    """(N,): score of chosen minus score of rejected; NaN where a row has no scores."""
    if isinstance(pairs, TokenStore):
        return pairs.margins
    return np.array([np.nan if pair.margin is None else pair.margin for pair in pairs], np.float64)


def _pair_tokens(pairs: Sequence[TokenizedPair]) -> npt.NDArray[Any]:
    """2·prompt + chosen + rejected of each pair."""
    return np.asarray(side_lengths(pairs) @ np.array([2, 1, 1]))


def _chunks(indices: npt.NDArray[Any], size: int) -> list[list[int]]:
    return [[int(index) for index in indices[start : start + size]] for start in range(0, len(indices), size)]


def real_tokens(pairs: Sequence[TokenizedPair], layout: RowLayout | None = None) -> int:
    """Tokens that are run for a batch of these pairs, without padding."""
    shared = shared_tokens(pairs, layout or device_profile().layout)
    rows = sum(
        2 * (len(pair.prompt_ids) - shared - 1) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs
    )
    return len(pairs) * shared + rows


def _row_groups(pairs: Sequence[TokenizedPair], shared: int, layout: RowLayout) -> list[list[Ids]]:
    """The rows of each array: of chosen and of rejected completions, or both, a pair's rows side by side."""
    sides: list[list[Ids]] = [
        [(*pair.prompt_ids[shared:], *ids[:-1]) for pair, ids in zip(pairs, completions, strict=True)]
        for completions in ([pair.chosen_ids for pair in pairs], [pair.rejected_ids for pair in pairs])
    ]
    return [[row for both in zip(*sides, strict=True) for row in both]] if layout.joined else sides


def _padded(rows: Sequence[Ids], layout: RowLayout) -> npt.NDArray[np.int32]:
    """(R, W) ids, 0 behind each row."""
    ids = np.zeros((len(rows), bucket(max(map(len, rows)), layout.row_multiple, layout)), np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return ids


def _row_starts(count: int, widths: Ids, layout: RowLayout) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where each pair's chosen and rejected row begins, in all rows laid end to end."""
    number = np.arange(count)
    if layout.joined:
        return 2 * number * widths[0], (2 * number + 1) * widths[0]
    return number * widths[0], count * widths[0] + number * widths[1]


def _completion_places(pairs: Sequence[TokenizedPair], shared: int, widths: Ids, layout: RowLayout) -> list[Places]:
    """For each chosen and then each rejected completion, where the states are that its tokens are predicted from."""
    chosen, rejected = _row_starts(len(pairs), widths, layout)
    sides = ((chosen, [pair.chosen_ids for pair in pairs]), (rejected, [pair.rejected_ids for pair in pairs]))
    return [
        start + len(pair.prompt_ids) - shared - 1 + np.arange(len(ids))
        for starts, completions in sides
        for start, pair, ids in zip(starts, pairs, completions, strict=True)
    ]


def _prompt_places(pairs: Sequence[TokenizedPair], shared: int, widths: Ids, layout: RowLayout) -> list[Places]:
    """The same for prompt tokens from the second on: in the prefixes, which lie behind all rows, and then in the rest
    of the prompt in the chosen row."""
    chosen, _ = _row_starts(len(pairs), widths, layout)
    behind = len(pairs) * (2 * widths[0] if layout.joined else sum(widths))
    return [
        np.concatenate(
            [
                behind + number * shared + np.arange(shared),
                chosen[number] + np.arange(len(pair.prompt_ids) - shared - 1),
            ]
        )
        for number, pair in enumerate(pairs)
    ]


def _flat(parts: Sequence[Any], size: int) -> npt.NDArray[np.int32]:
    """All parts in one array of that size, 0 behind them."""
    flat = np.zeros(size, np.int32)
    whole = np.concatenate([np.asarray(part, np.int32) for part in parts])
    flat[: whole.size] = whole
    return flat
