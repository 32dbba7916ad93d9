"""From a source of rows to tokens on disk, remembered by content so that the next run starts at once."""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from orpo_mlx.data.pairs import PairsOfRow, Reading, read_pairs, with_remedy
from orpo_mlx.data.row_counts import RowReport
from orpo_mlx.data.sources import Source
from orpo_mlx.data.token_store import StoreWriter, TokenStore
from orpo_mlx.data.tokenization import PairTokenizer
from orpo_mlx.data.truncation import fit
from orpo_mlx.errors import DataError
from orpo_mlx.files import cache_folder
from orpo_mlx.types import Pair

PROMPT_CUT = "with the prompt cut"
COMPLETION_CUT = "with a completion cut"
SYSTEM_FOLDED = "with the system text put into the next turn, since the chat template has no system role"


class Lengths(NamedTuple):
    """The longest prompt + completion that is taken, and what becomes of longer ones."""

    max_seq_length: int
    truncate: str = "drop"
    """One of `truncation.TRUNCATIONS`."""
    limit: str = "--max-seq-length"
    """Where the length comes from, in words."""


@dataclasses.dataclass
class Split:
    """One split, tokenised."""

    source: Source
    sha256: str
    """Of the source's content."""
    pairs: TokenStore
    reading: Reading

    @property
    def report(self) -> RowReport:
        """What became of its rows."""
        return self.pairs.report

    def summary(self, name: str) -> str:
        """What was read and what was left out, in one line."""
        report = self.report
        return f"{name}: {len(self.pairs)} pairs from {self.source.name} ({report.shape}){report.summary()}"

    def raw(self) -> Iterator[Pair]:
        """Its pairs that are text, read again."""
        for row in read_pairs(self.source, self.reading, RowReport()):
            yield from (pair for pair in row.pairs if isinstance(pair, Pair))


def tokenized_split(source: Source, reading: Reading, tokenizer: Any | None, lengths: Lengths) -> Split:
    """A split's tokens, from the cache if its content, the tokenizer and all settings are those they were made with.

    Raises:
        DataError: the source or (without `skip_bad_rows`) a row of it cannot be used, or no pair is left.
    """
    sha256 = source.sha256()
    key = _key(source.name, sha256, dataclasses.asdict(reading), lengths, tokenizer_fingerprint(tokenizer))
    cache = cache_folder()
    target = None if cache is None else cache / "tokens" / key
    store = (target and _opened(target)) or _write(source, reading, tokenizer, lengths, target)
    if not len(store):
        report = store.report
        reasons = ", ".join(f"{count} {report.words(reason)}" for reason, count in report.dropped.items())
        first = report.left_out[0].rstrip(".")
        raise DataError(f"{source.name}: no pair can be used ({reasons}); the first: {first}.")
    return Split(source, sha256, store, reading)


def tokenizer_fingerprint(tokenizer: Any | None) -> str:
    """What decides a text's tokens, as a hash: vocabulary, merges, template, special tokens."""
    if tokenizer is None:
        return "none"
    inner = tokenizer._tokenizer
    backend = getattr(inner, "backend_tokenizer", None)
    parts = (
        backend.to_str() if backend is not None else json.dumps(sorted(inner.get_vocab().items())),
        str(getattr(inner, "chat_template", None)),
        sorted(tokenizer.eos_token_ids),
        tokenizer.has_chat_template,
        inner.bos_token_id,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _opened(folder: Path) -> TokenStore | None:
    try:
        return TokenStore(folder)
    except ValueError:
        return None


def _write(
    source: Source, reading: Reading, tokenizer: Any | None, lengths: Lengths, target: Path | None
) -> TokenStore:
    writer = _writer(target)
    report = RowReport(limit=f"{lengths.limit} {lengths.max_seq_length}")
    with writer:
        to_ids = PairTokenizer(tokenizer)
        waiting: deque[PairsOfRow] = deque()

        def pairs() -> Iterator[Any]:
            for row in read_pairs(source, reading, report):
                waiting.append(row)
                if to_ids.folds_system and any(map(_has_system_turn, row.pairs)):
                    report.note(SYSTEM_FOLDED, row.location)
                yield from row.pairs

        outcomes = to_ids.batches(pairs())
        for first in outcomes:
            row = waiting.popleft()
            writer.extend(_kept(row, [first, *(next(outcomes) for _ in row.pairs[1:])], reading, lengths, report))
        return writer.close(report)


def _writer(target: Path | None) -> StoreWriter:
    if target is not None:
        try:
            return StoreWriter(target)
        except OSError:  # A home that cannot be written to is as good as none.
            pass
    folder = Path(tempfile.mkdtemp(prefix="orpo_mlx-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return StoreWriter(folder / "tokens")


def _kept(row: PairsOfRow, outcomes: list[Any], reading: Reading, lengths: Lengths, report: RowReport) -> list[Any]:
    """The pairs of a row that are trained on; counts what is not."""
    cuts, bad = [], None
    for outcome in outcomes:
        if isinstance(outcome, DataError):
            if not reading.skip_bad_rows:
                raise with_remedy(outcome)
            bad = outcome
        else:
            cuts.append(fit(outcome, lengths.max_seq_length, lengths.truncate))
    kept = [cut for cut in cuts if cut.pair is not None]
    if not kept:
        report.drop("bad_row" if bad else cuts[0].reason, row.location, bad)
        return []
    report.rows_kept += 1
    report.pairs_left_out += len(outcomes) - len(kept)
    for words, flags in (
        (PROMPT_CUT, [cut.prompt_cut for cut in kept]),
        (COMPLETION_CUT, [cut.completion_cut for cut in kept]),
    ):
        if any(flags):
            report.note(words, row.location)
    return [cut.pair for cut in kept]


def _has_system_turn(pair: Any) -> bool:
    return isinstance(pair, Pair) and not isinstance(pair.prompt, str) and pair.prompt[0]["role"] == "system"


def _key(*parts: Any) -> str:
    """A name for what `parts` and the code of this folder decide.

    All of its code, although not every module decides which tokens a row becomes: a list of those that do would be
    forgotten when one is split, and stale tokens trained on. Tokenizing once more after an upgrade is cheap.
    """
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:32]
