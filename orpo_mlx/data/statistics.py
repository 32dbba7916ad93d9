"""What there is to know about a data set before training on it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from orpo_mlx.data.batching import epoch_order, micro_batches, padded_tokens, real_tokens
from orpo_mlx.data.group_statistics import compared_lengths, completion_lengths, group_figures, group_lines
from orpo_mlx.data.prompts import evenly_spread
from orpo_mlx.data.splits import Split
from orpo_mlx.data.tokens.token_codec import show_tokens
from orpo_mlx.data.tokens.token_store import TokenStore
from orpo_mlx.data.tokens.trained_turns import read_ids
from orpo_mlx.text import printable
from orpo_mlx.types import Example, TokenizedPair

SIDES = ("prompt", "chosen", "rejected")
QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}

# Rows shown of each split.
_EXAMPLES = 3
# Step batches from which padding is estimated, so that a large data set takes no longer than a small one.
_MOST_BATCHES = 2000
# Okabe and Ito's colours for prompt, chosen and rejected, which colour-blind readers distinguish as well.
_COLOURS = ("#0072B2", "#009E73", "#D55E00")


class PaddingShare(NamedTuple):
    """Shares of padding among the tokens that are run."""

    micro_batches: float
    """As training divides its step batches."""
    one_block: float
    """Were each step batch one block."""


def inspect_splits(
    splits: Mapping[str, Split], tokenizer: Any | None, *, batch_size: int, micro_batch_tokens: int, seed: int
) -> dict[str, Any]:
    """Counts and figures of all splits, as plain JSON; docs/data.md says what each key is.

    The top level adds up the rows of all splits; `splits` has each one's figures. Padding is that of an epoch as
    training would run it with these settings, over at most 2000 of its batches.
    """
    tables = {
        name: split_figures(split, tokenizer, batch_size=batch_size, micro_batch_tokens=micro_batch_tokens, seed=seed)
        for name, split in splits.items()
    }
    dropped: dict[str, int] = {}
    for table in tables.values():
        for reason, count in table["rows_dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + count
    return {
        "rows_read": sum(table["rows_read"] for table in tables.values()),
        "rows_kept": sum(table["rows_kept"] for table in tables.values()),
        "rows_dropped": dropped,
        "pairs": sum(table["pairs"] for table in tables.values()),
        "shape": " + ".join(dict.fromkeys(table["shape"] for table in tables.values())),
        "batch_size": batch_size,
        "splits": tables,
        "overlap": prompt_overlap(splits),
    }


def split_figures(
    split: Split, tokenizer: Any | None, *, batch_size: int, micro_batch_tokens: int, seed: int
) -> dict[str, Any]:
    """The figures of one split, as plain JSON."""
    report = split.report
    store = split.pairs
    totals = store.lengths.sum(axis=0)
    distinct = len(np.unique(store.prompt_hashes))
    padding = padding_share(store, batch_size, micro_batch_tokens, seed)
    return {
        "source": split.source.name,
        "shape": report.shape,
        "shapes": dict(report.shapes),
        "rows_read": report.rows_read,
        "rows_kept": report.rows_kept,
        "rows_dropped": dict(report.dropped),
        "dropped_places": {reason: report.places[reason] for reason in report.dropped},
        "left_out": report.left_out[:10],
        "notes": dict(report.notes),
        "note_places": {note: report.places[note] for note in report.notes},
        "pairs": len(store),
        "pairs_left_out": report.pairs_left_out,
        "mean_weight": float(store.weights.mean()),
        **group_figures(store),
        "lengths": {side: quantiles(lengths) for side, lengths in lengths_by_side(store).items()},
        "prompt_token_share": float(totals[0] / totals.sum()),
        "padding_share": padding.micro_batches,
        "padding_share_one_block": padding.one_block,
        "distinct_prompts": distinct,
        "duplicated_prompts": len(store) - distinct,
        "length_bias": length_bias(compared_lengths(store)),
        "examples": [_example(store, number, tokenizer) for number in evenly_spread(len(store), _EXAMPLES)],
    }


def quantiles(lengths: npt.NDArray[np.int64]) -> dict[str, float]:
    """`QUANTILES` and the mean of some lengths."""
    values = np.quantile(lengths, list(QUANTILES.values()))
    return {**dict(zip(QUANTILES, values.tolist(), strict=True)), "mean": float(lengths.mean())}


def padding_share(store: TokenStore, batch_size: int, micro_batch_tokens: int, seed: int) -> PaddingShare:
    """Padding of the first epoch, from evenly spread step batches."""
    batches = epoch_order(store, batch_size, seed=seed, epoch=0)
    every = -(-len(batches) // _MOST_BATCHES)
    real = run = real_block = block = 0
    for indices in batches[::every]:
        pairs = [store[index] for index in indices]
        parts = micro_batches(pairs, batch_size, micro_batch_tokens)
        real += sum(map(real_tokens, parts))
        run += sum(map(padded_tokens, parts))
        # One block for each number of completions that the batch has.
        # Sorted, since groupby joins neighbours only.
        for _, same in itertools.groupby(sorted(pairs, key=_completions), key=_completions):
            together = list(same)
            real_block += real_tokens(together)
            block += padded_tokens(together)
    return PaddingShare(1 - real / run, 1 - real_block / block)


def _completions(example: Example) -> int:
    return len(example.completions)


def lengths_by_side(store: TokenStore) -> dict[str, npt.NDArray[np.int64]]:
    """Tokens of prompts and of each side, or, where there are groups, of all completions."""
    if store.groups is None:
        return {side: store.lengths[:, number] for number, side in enumerate(SIDES)}
    return {"prompt": store.lengths[:, 0], "completion": completion_lengths(store)}


def length_bias(lengths: npt.NDArray[np.int64]) -> dict[str, float]:
    """How far length alone tells the sides apart; ties count half in the accuracy. Empty where nothing is compared."""
    if not len(lengths):
        return {}
    longer = (lengths[:, 1] > lengths[:, 2]).mean()
    shorter = (lengths[:, 1] < lengths[:, 2]).mean()
    return {
        "chosen_longer": float(longer),
        "chosen_shorter": float(shorter),
        "mean_extra_tokens": float((lengths[:, 1] - lengths[:, 2]).mean()),
        "accuracy_of_picking_the_longer": float(longer + (1 - longer - shorter) / 2),
    }


def prompt_overlap(splits: Mapping[str, Split]) -> dict[str, int]:
    """Pairs of held-out splits whose prompt also stands in an earlier split."""
    names = list(splits)
    return {
        f"{later} in {earlier}": int(
            np.isin(splits[later].pairs.prompt_hashes, splits[earlier].pairs.prompt_hashes).sum()
        )
        for number, earlier in enumerate(names)
        for later in names[number + 1 :]
    }


def _example(store: TokenStore, number: int, tokenizer: Any | None) -> dict[str, Any]:
    example = store[number]
    shown = {"place": example.location, "prompt": show_tokens(example.prompt_ids, tokenizer)}
    completions = [shown_completion(ids, tokenizer) for ids in example.completions]
    if isinstance(example, TokenizedPair):
        return {**shown, **dict(zip(SIDES[1:], completions, strict=True))}
    return {**shown, "completions": completions, "scores": list(example.scores)}


def shown_completion(ids: Sequence[int], tokenizer: Any | None) -> str:
    """A completion as text; what is read and not learned stands between ⟧ and ⟦, as it will between the other marks."""
    texts = [
        show_tokens(read_ids(list(run)), tokenizer) if learned else f"⟧{show_tokens(read_ids(list(run)), tokenizer)}⟦"
        for learned, run in itertools.groupby(ids, lambda token: token >= 0)
    ]
    return "".join(texts)


def as_text(figures: Mapping[str, Any]) -> str:
    """The figures as a report to read."""
    lines: list[str] = []
    for name, table in figures["splits"].items():
        lines += [
            f"{name}: {table['source']}",
            *(f"  {line}" for line in _split_lines(table, figures["batch_size"])),
            "",
        ]
    for where, count in figures["overlap"].items():
        lines.append(f"overlap: {count} prompts of {where}")
    return "\n".join(lines).rstrip() + "\n"


def _split_lines(table: Mapping[str, Any], batch_size: int) -> list[str]:
    lines = [
        f"shape: {table['shape']}",
        f"rows: {table['rows_read']} read, {table['rows_kept']} kept"
        + ("" if "completions" in table else f", {table['pairs']} pairs"),
    ]
    if len(table["shapes"]) > 1:
        lines.append("shapes: " + "; ".join(f"{count} {shape}" for shape, count in table["shapes"].items()))
    for reason, count in table["rows_dropped"].items():
        lines.append(f"left out: {count} {reason} ({_places(table['dropped_places'][reason], count)})")
    if table["rows_dropped"].get("bad_row"):
        lines += [f"  {printable(line)}" for line in table["left_out"]]
    for note, count in table["notes"].items():
        lines.append(f"taken: {count} {note} ({_places(table['note_places'][note], count)})")
    if table["mean_weight"] != 1:
        lines.append(f"weights: {table['mean_weight']:g} on average")
    lines += group_lines(table)
    lines.append(f"{'tokens':10}" + "".join(f"{name:>9}" for name in (*QUANTILES, "mean")))
    for side, values in table["lengths"].items():
        lines.append(f"{side:10}" + "".join(f"{value:9.0f}" for value in values.values()))
    lines += [
        f"prompt tokens: {table['prompt_token_share']:.1%} of {' + '.join(table['lengths'])}",
        f"padding at batch size {batch_size}: {table['padding_share']:.1%} as run in micro-batches, "
        f"{table['padding_share_one_block']:.1%} were each batch one block",
        f"prompts: {table['distinct_prompts']} distinct, {table['duplicated_prompts']} duplicates",
    ]
    if bias := table["length_bias"]:
        lines.append(
            f"length: chosen is longer in {bias['chosen_longer']:.1%}, shorter in {bias['chosen_shorter']:.1%} of "
            f"pairs, by {bias['mean_extra_tokens']:+.1f} tokens on average; picking the longer one is right in "
            f"{bias['accuracy_of_picking_the_longer']:.1%}"
        )
    for example in table["examples"]:
        lines += ["", f"example {example['place']} (trained tokens between ⟦ and ⟧, ↵ is a line's end)"]
        lines.append(f"prompt    {example['prompt']}")
        if "completions" in example:
            scored = zip(example["scores"], example["completions"], strict=True)
            lines += [f"{score:<9g} ⟦{text}⟧" for score, text in scored]
        else:
            lines += [f"{side:9} ⟦{example[side]}⟧" for side in SIDES[1:]]
    return lines


def _places(places: list[str], count: int) -> str:
    return ", ".join(places) + (", ..." if count > len(places) else "")


def draw_lengths(splits: Mapping[str, Split], max_seq_length: int, path: Path) -> None:
    """Histograms of tokens per prompt, chosen and rejected, a row of panels for each split, as a PNG file."""
    # Without pyplot, which keeps figures alive and asks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.6 + 2.6 * len(splits)), layout="constrained")
    FigureCanvasAgg(figure)
    lengths_of = {name: lengths_by_side(split.pairs) for name, split in splits.items()}
    columns = max(map(len, lengths_of.values()))
    panels = figure.subplots(len(splits), columns, squeeze=False, sharex=True, sharey="row")
    longest = max(int(lengths.max()) for sides in lengths_of.values() for lengths in sides.values())
    # Logarithmic, since lengths spread over three orders of magnitude; whole numbers, so that no bar stays empty.
    edges = np.unique(np.geomspace(1, max(longest, 2) + 1, 41).round())
    for row, (name, sides) in zip(panels, lengths_of.items(), strict=True):
        # A split of groups has a panel less than one of pairs.
        for number, (panel, (side, lengths)) in enumerate(zip(row, sides.items(), strict=False)):
            panel.hist(lengths, bins=edges, color=_COLOURS[number])
            panel.axvline(float(np.median(lengths)), color="black", linewidth=1, linestyle="--")
            panel.set_title(f"{name}: {side}, median {np.median(lengths):.0f}", fontsize=10)
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter("{x:g}")
        row[0].set_ylabel("pairs")
    for panel in panels[-1]:
        panel.set_xlabel("tokens")
    figure.suptitle(f"Tokens per side (max_seq_length {max_seq_length}; dashed: median)", fontsize=11)
    figure.savefig(path, dpi=110, format="png")
