"""Order, grouping and padding of examples: functions of the seed and the epoch, so that they can be replayed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from orpo_mlx.data.tokens.token_store import TokenStore
from orpo_mlx.data.tokens.trained_turns import learned_ids, learned_places, read_ids
from orpo_mlx.device_profile import RowLayout, device_profile
from orpo_mlx.types import Batch, Example, GroupMembers

# Step batches sorted by length together: more of them pad less, and leave less of the order to chance.
_BUCKET_BATCHES = 16
# With these, rounding a length of more than 16 multiples up adds less than an eighth to it.
_STEPS_PER_OCTAVE = 16

AnyExample = TypeVar("AnyExample", bound=Example)
Ids = Sequence[int]
Places = npt.NDArray[np.int64]


def collate(
    examples: Sequence[Example],
    layout: RowLayout | None = None,
    *,
    with_prompt: bool = False,
    whole_groups: bool = False,
) -> Batch:
    """B examples as one `Batch`: what their prompts share with the completions once, the rest before each completion.

    All prompts give the same number of tokens to `prefix_ids`, so that only the right end of a row is ever padded:
    every row is causal from its first token on, and no layer needs a mask. The last token of a completion is not run,
    since nothing is predicted from it.

    Args:
        examples: B examples, all of as many completions.
        layout: how rows are made; the device profile's by default.
        with_prompt: whether the log-probs of prompt tokens are wanted as well.
        whole_groups: whether the method looks at whole groups and not at pairs.

    Raises:
        ValueError: no examples, or some have more completions than others.
    """
    if not examples:
        raise ValueError("collate needs at least one pair, got none.")
    if len({len(example.completions) for example in examples}) > 1:
        raise ValueError("collate needs examples that all have as many completions.")
    layout = layout or device_profile().layout
    shared = shared_tokens(examples, layout)
    row_ids = [_padded(rows, layout) for rows in _row_groups(examples, shared, layout)]
    widths = [ids.shape[1] for ids in row_ids]
    places = _completion_places(examples, shared, widths, layout)
    targets: list[Ids] = [learned_ids(ids) for completions in _by_place(examples) for ids in completions]
    if with_prompt:
        places += _prompt_places(examples, shared, widths, layout)
        targets += [example.prompt_ids[1:] for example in examples]
    lengths = [len(ids) for ids in targets]
    size = bucket(sum(lengths), layout.token_multiple, layout)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    members = np.zeros((len(lengths), size), np.bool_)
    members[owner, np.arange(owner.size)] = True
    count, rows = len(examples), len(examples) * len(examples[0].completions)
    numbers, better, worse = _pair_places(examples)
    prefix = np.array([example.prompt_ids[:shared] for example in examples], np.int32)
    return Batch(
        mx.array(prefix) if shared else None,
        tuple(map(mx.array, row_ids)),
        mx.array(_flat(places, size)),
        mx.array(_flat(targets, size)),
        # Completions lie by place first and by example then: place · B + number.
        mx.array(members[better * count + numbers]),
        mx.array(members[worse * count + numbers]),
        mx.array(members[rows + numbers]) if with_prompt else None,
        _group_members(examples, members[:rows]) if whole_groups else None,
    )


def shared_tokens(examples: Sequence[Example], layout: RowLayout) -> int:
    """Tokens of each prompt that are run once for all its completions: as many in all prompts, and never a last token,
    since a completion's first token is predicted from it."""
    # A single completion has nobody to share its prompt with.
    if not layout.share_prompt or len(examples[0].completions) == 1:
        return 0
    return bucket(min(len(example.prompt_ids) for example in examples) - 1, layout.multiple, layout, up=False)


def row_lengths(examples: Sequence[Example], layout: RowLayout) -> list[npt.NDArray[np.int32]]:
    """Tokens of each row without padding, for each array of rows that `collate` makes where it shares no prompt."""
    return [np.array([len(row) for row in rows], np.int32) for rows in _row_groups(examples, 0, layout)]


def bucket(length: int, multiple: int, layout: RowLayout, *, up: bool = True) -> int:
    """`length`, rounded up or down to a multiple of `multiple`.

    With `layout.few_shapes` to one of at most 16 sizes between a length and its double, so that shapes repeat and
    padding takes little.
    """
    step = multiple
    while layout.few_shapes and length > step * _STEPS_PER_OCTAVE:
        step *= 2
    return (-(-length // step) if up else length // step) * step


def split_by_completion(examples: Sequence[Example], values: npt.NDArray[Any]) -> list[list[npt.NDArray[Any]]]:
    """Of values for a batch's predicted tokens, those of each completion of each example."""
    lengths = [len(learned_ids(ids)) for completions in _by_place(examples) for ids in completions]
    ends = np.cumsum(lengths).tolist()
    parts = [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return [parts[number :: len(examples)] for number in range(len(examples))]


def count_pairs(examples: Sequence[Example]) -> int:
    """Pairs that some examples hold together."""
    return sum(len(example.pairs) for example in examples)


def sequence_tokens(examples: Sequence[Example]) -> int:
    """Predicted tokens of prompt + chosen over all pairs: the normaliser of the NLL with `nll="sequence"`."""
    return sum(
        len(example.prompt_ids) + len(learned_ids(example.completions[better])) - 1
        for example in examples
        for better, _ in example.pairs
    )


def epoch_order(
    examples: Sequence[Example], batch_size: int, *, seed: int, epoch: int, shuffle: bool = True
) -> list[list[int]]:
    """Indices of each batch of one epoch; every example once, the last batch perhaps smaller.

    Shuffled, then sorted by length within runs of 16 batches, then the batches shuffled: neighbours are of like
    length, and the order depends on `seed` and `epoch` only. Without `shuffle`, in the order given.
    """
    indices = np.arange(len(examples))
    if not shuffle:
        return _chunks(indices, batch_size)
    generator = np.random.default_rng((seed, epoch))
    generator.shuffle(indices)
    lengths = _tokens_of_each(examples)
    batches: list[list[int]] = []
    for run in _chunks(indices, batch_size * _BUCKET_BATCHES):
        # Stable, so that equal lengths keep the shuffled order and a replay is the same.
        by_length = np.array(run)[np.argsort(lengths[run], kind="stable")]
        batches.extend(_chunks(by_length, batch_size))
    # A short batch in the middle would be a noisier step than the others for no reason: it goes last.
    full = [batch for batch in batches if len(batch) == batch_size]
    rest = [batch for batch in batches if len(batch) < batch_size]
    generator.shuffle(full)
    return full + rest


def length_order(examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """Batches of like length, and of as many completions, for evaluation, where order does not matter."""
    order = np.argsort(_tokens_of_each(examples), kind="stable")
    counts = completion_counts(examples)[order]
    return [batch for count in np.unique(counts) for batch in _chunks(order[counts == count], batch_size)]


def held_out_batches(
    examples: Sequence[AnyExample], batch_size: int, most_tokens: int | None, layout: RowLayout | None = None
) -> list[list[AnyExample]]:
    """`length_order`'s batches, each cut where it would have more than `most_tokens` tokens, padding included, as
    `collate` lays them out: an evaluation takes no more memory at a time than a step. In the same order however cut."""
    batches: list[list[AnyExample]] = []
    for indices in length_order(examples, batch_size):
        batch: list[AnyExample] = []
        for index in indices:
            longer = [*batch, examples[index]]
            if batch and most_tokens is not None and padded_tokens(longer, layout) > most_tokens:
                batches.append(batch)
                longer = longer[-1:]
            batch = longer
        batches.append(batch)
    return batches


def steps_per_epoch(num_pairs: int, batch_size: int) -> int:
    """Batches in one epoch, the partial one included."""
    return -(-num_pairs // batch_size)


class TrainingOrder:
    """Endless batches of indices; `step` alone is its state, so that a resumed run continues where it stopped."""

    def __init__(self, pairs: Sequence[Example], batch_size: int, *, seed: int, shuffle: bool, step: int = 0) -> None:
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
    step_batch: Sequence[AnyExample], most_pairs: int, most_tokens: int, layout: RowLayout | None = None
) -> list[list[AnyExample]]:
    """The examples of a step in batches of at most `most_pairs` of them and `most_tokens` tokens, padding included.

    Each one, by length, joins the batch of as many completions that it pads least, unless that costs more tokens than a
    batch of its own is worth; one that is longer than `most_tokens` is always alone. Tokens are those that are run, as
    `collate` lays them out.
    """
    layout = layout or device_profile().layout
    batches: list[list[AnyExample]] = []
    for example in sorted(step_batch, key=lambda example: example.pair_tokens):
        alone = padded_tokens([example], layout)
        costs = []
        for number, batch in enumerate(batches):
            if len(batch) >= most_pairs or len(batch[0].completions) != len(example.completions):
                continue
            together = padded_tokens([*batch, example], layout)
            cost = together - padded_tokens(batch, layout) - alone
            if together <= most_tokens and cost <= layout.padding_worth_a_batch:
                costs.append((cost, number))
        if costs:
            batches[min(costs)[1]].append(example)
        else:
            batches.append([example])
    return batches


def padded_tokens(examples: Sequence[Example], layout: RowLayout | None = None) -> int:
    """Tokens that are run for a batch of these examples, padding included."""
    layout = layout or device_profile().layout
    shared = shared_tokens(examples, layout)
    rests = [len(example.prompt_ids) - shared - 1 for example in examples]
    widths = [
        bucket(max(rest + len(ids) for rest, ids in zip(rests, completions, strict=True)), layout.row_multiple, layout)
        for completions in _by_place(examples)
    ]
    return len(examples) * (shared + (len(widths) * max(widths) if layout.joined else sum(widths)))


def real_tokens(examples: Sequence[Example], layout: RowLayout | None = None) -> int:
    """Tokens that are run for a batch of these examples, without padding."""
    shared = shared_tokens(examples, layout or device_profile().layout)
    rows = sum(len(example.prompt_ids) - shared - 1 + len(ids) for example in examples for ids in example.completions)
    return len(examples) * shared + rows


def row_weights(examples: Sequence[Example]) -> npt.NDArray[np.float64]:
    """What the loss of each row is multiplied by: (N,) of a store's rows, (P,) of the pairs of some examples."""
    # A store has them in one array; to go through its examples would read all their tokens.
    if isinstance(examples, TokenStore):
        return examples.weights
    return np.array([example.weight for example in examples for _ in example.pairs], np.float64)


def two_sided(examples: Sequence[Example]) -> npt.NDArray[np.bool_]:
    """(P,): which pairs of some examples have two sides; a single completion is one with itself."""
    _, better, worse = _pair_places(examples)
    differ: npt.NDArray[np.bool_] = better != worse
    return differ


def row_margins(examples: Sequence[Example]) -> npt.NDArray[np.float64]:
    """Score of chosen minus score of rejected, NaN where a row has no scores: (N,) of a store's rows (of a group its
    best and its worst), (P,) of the pairs of some examples."""
    if isinstance(examples, TokenStore):
        return examples.margins
    margins = [margin for example in examples for margin in example.margins]
    return np.array([np.nan if margin is None else margin for margin in margins], np.float64)


def side_lengths(examples: Sequence[Example]) -> npt.NDArray[np.int64]:
    """(N, 3): tokens of prompt, first completion and all others: of a pair's prompt, chosen and rejected."""
    if isinstance(examples, TokenStore):
        return examples.lengths
    rows = [
        (len(example.prompt_ids), len(example.completions[0]), sum(map(len, example.completions[1:])))
        for example in examples
    ]
    return np.array(rows, np.int64).reshape(-1, 3)


def completion_counts(examples: Sequence[Example]) -> npt.NDArray[np.int64]:
    """(N,): completions of each example."""
    if isinstance(examples, TokenStore):
        return examples.counts
    return np.array([len(example.completions) for example in examples], np.int64)


def _tokens_of_each(examples: Sequence[Example]) -> npt.NDArray[Any]:
    """`pair_tokens` of each example."""
    prompts, first, others = side_lengths(examples).T
    return np.asarray(completion_counts(examples) * prompts + first + others)


def _chunks(indices: npt.NDArray[Any], size: int) -> list[list[int]]:
    return [[int(index) for index in indices[start : start + size]] for start in range(0, len(indices), size)]


def _by_place(examples: Sequence[Example]) -> list[tuple[Ids, ...]]:
    """The first completion of each example, the second of each, and so on."""
    return list(zip(*(example.completions for example in examples), strict=True))


def _row_groups(examples: Sequence[Example], shared: int, layout: RowLayout) -> list[list[Ids]]:
    """The rows of each array: of first completions, of second ones and so on, or all, a prompt's rows side by side."""
    sides: list[list[Ids]] = [
        [
            (*example.prompt_ids[shared:], *read_ids(ids[:-1]))
            for example, ids in zip(examples, completions, strict=True)
        ]
        for completions in _by_place(examples)
    ]
    return [[row for group in zip(*sides, strict=True) for row in group]] if layout.joined else sides


def _padded(rows: Sequence[Ids], layout: RowLayout) -> npt.NDArray[np.int32]:
    """(R, W) ids, 0 behind each row."""
    # Any id would do: rows are causal, so no token of a row sees what is behind it.
    ids = np.zeros((len(rows), bucket(max(map(len, rows)), layout.row_multiple, layout)), np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return ids


def _row_starts(examples: Sequence[Example], widths: Ids, layout: RowLayout) -> list[npt.NDArray[np.int64]]:
    """Where the rows of first completions begin, of second ones and so on, in all rows laid end to end."""
    number, places = np.arange(len(examples)), range(len(examples[0].completions))
    if layout.joined:
        return [(len(places) * number + place) * widths[0] for place in places]
    return [len(examples) * sum(widths[:place]) + number * widths[place] for place in places]


def _completion_places(examples: Sequence[Example], shared: int, widths: Ids, layout: RowLayout) -> list[Places]:
    """For each first completion, each second one and so on, where the states are that its tokens are predicted from."""
    return [
        start + len(example.prompt_ids) - shared - 1 + learned_places(ids)
        for starts, completions in zip(_row_starts(examples, widths, layout), _by_place(examples), strict=True)
        for start, example, ids in zip(starts, examples, completions, strict=True)
    ]


def _prompt_places(examples: Sequence[Example], shared: int, widths: Ids, layout: RowLayout) -> list[Places]:
    """The same for prompt tokens from the second on: in the prefixes, which lie behind all rows, and then in the rest
    of the prompt in the first completion's row."""
    first = _row_starts(examples, widths, layout)[0]
    rows = len(examples[0].completions) if layout.joined else 1
    behind = len(examples) * rows * sum(widths)
    return [
        np.concatenate(
            [
                behind + number * shared + np.arange(shared),
                first[number] + np.arange(len(example.prompt_ids) - shared - 1),
            ]
        )
        for number, example in enumerate(examples)
    ]


def _pair_places(examples: Sequence[Example]) -> tuple[Places, Places, Places]:
    """Of each pair of a batch: its example's number, and the places of the better and the worse completion in it."""
    found = [
        (number, *pair)
        for number, example in enumerate(examples)
        for pair in example.pairs or [best_and_worst(example)]
    ]
    numbers, better, worse = np.array(found, np.int64).T
    return numbers, better, worse


def best_and_worst(example: Example) -> tuple[int, int]:
    """The places of an example's completions with the highest and the lowest score."""
    return int(np.argmax(example.scores)), int(np.argmin(example.scores))


def _group_members(examples: Sequence[Example], members: npt.NDArray[np.bool_]) -> GroupMembers:
    # Rows are by place first: (K, B, N).
    completions = members.reshape(-1, len(examples), members.shape[1]).swapaxes(0, 1)
    scores = np.array([example.scores for example in examples], np.float32)
    return GroupMembers(mx.array(np.ascontiguousarray(completions)), mx.array(scores))


def _flat(parts: Sequence[Any], size: int) -> npt.NDArray[np.int32]:
    """All parts in one array of that size, 0 behind them."""
    flat = np.zeros(size, np.int32)
    whole = np.concatenate([np.asarray(part, np.int32) for part in parts])
    flat[: whole.size] = whole
    return flat
