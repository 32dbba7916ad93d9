"""From a source of rows to tokens on disk, remembered by content so that the next run starts at once."""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import inspect
import itertools
import json
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from orpo_mlx.data.groups import COMPLETIONS_LEFT_OUT, pair_count
from orpo_mlx.data.pairs import PairsOfRow, Reading, read_pairs, with_remedy
from orpo_mlx.data.row_counts import MAX_SEQ_LENGTH, RowReport
from orpo_mlx.data.sources import Source
from orpo_mlx.data.tokens.token_codec import backend_of
from orpo_mlx.data.tokens.token_store import StoreWriter, TokenStore
from orpo_mlx.data.tokens.tokenization import Outcome, PairTokenizer
from orpo_mlx.data.tokens.truncation import Fitted, fit
from orpo_mlx.errors import DataError
from orpo_mlx.files import cache_folder
from orpo_mlx.package_versions import version_of
from orpo_mlx.types import Example, Group, Pair

PROMPT_CUT = "with the prompt cut"
COMPLETION_CUT = "with a completion cut"
SEVERAL_TURNS = {
    "assistant": "with completions of several turns, of which the assistant's are trained on",
    "last": "with completions of several turns, of which the assistant's last is trained on",
}


# Packages that make texts and tokens of rows.
_RENDERERS = ("mlx-lm", "transformers", "jinja2", "tokenizers")
# What a template has in it that writes the date: transformers' function for that, or Python's module.
_ASK_THE_DATE = ("strftime", "datetime")


class Lengths(NamedTuple):
    """The longest prompt + completion that is taken, and what becomes of longer ones."""

    max_seq_length: int
    truncate: str = "drop"
    """One of `truncation.TRUNCATIONS`."""
    limit: str = MAX_SEQ_LENGTH
    """Where the length comes from, as text."""


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
        what = "pairs" if self.pairs.groups is None else "rows"
        return f"{name}: {len(self.pairs)} {what} from {self.source.name} ({report.shape}){report.summary()}"

    def raw(self) -> Iterator[Pair | Group]:
        """The pairs and groups of rows that are kept, as far as they are text, read again."""
        # Pairs stand in the store as their rows do in the source.
        kept = (place for place, _ in itertools.groupby(map(self.pairs.location, range(len(self.pairs)))))
        place = next(kept, None)
        for row in read_pairs(self.source, self.reading, RowReport()):
            # What is too long, or what the chat template refuses, nobody must be asked either.
            if row.location == place:
                yield from (pair for pair in row.pairs if isinstance(pair, Pair | Group))
                place = next(kept, None)


def tokenized_split(source: Source, reading: Reading, tokenizer: Any | None, lengths: Lengths) -> Split:
    """A split's tokens, from the cache if its content, the tokenizer and all settings are those they were made with.

    Raises:
        DataError: the source or (without `skip_bad_rows`) a row of it cannot be used, or no pair is left.
    """
    # By content, so that a file changed in place is not taken for what it was.
    sha256 = source.sha256()
    versions = [version_of(name) for name in _RENDERERS]
    key = _key(source.name, sha256, dataclasses.asdict(reading), lengths, versions, tokenizer_fingerprint(tokenizer))
    cache = cache_folder()
    target = None if cache is None else cache / "tokens" / key
    store = (target and opened_store(target)) or _write(source, reading, tokenizer, lengths, target)
    if not len(store):
        report = store.report
        reasons = ", ".join(f"{count} {report.text_of(reason)}" for reason, count in report.dropped.items())
        first = report.left_out[0].rstrip(".")
        raise DataError(f"{source.name}: no pair can be used ({reasons}); the first: {first}.")
    return Split(source, sha256, store, reading)


def tokenizer_fingerprint(tokenizer: Any | None) -> str:
    """What decides a text's tokens, as a hash: vocabulary, merges, template, special tokens, the checkpoint's code."""
    if tokenizer is None:
        return "none"
    # mlx-lm's wrapper hides transformers' tokenizer, which has what is wanted.
    inner = tokenizer._tokenizer
    # As texts are encoded: without the truncation and padding that a checkpoint may ask for.
    backend = backend_of(tokenizer)
    # A template may be a function of mlx-lm's, of which the name is enough beside the version.
    function = getattr(tokenizer, "_chat_template", None)
    templates = (str(getattr(inner, "chat_template", None)), *_own_code(type(inner)))
    parts = (
        backend.to_str() if backend is not None else json.dumps(sorted(inner.get_vocab().items())),
        templates,
        None if function is None else (function.__module__, function.__qualname__),
        date.today().isoformat() if any(word in text for text in templates for word in _ASK_THE_DATE) else None,
        sorted(tokenizer.eos_token_ids),
        # Of several ends the one that answers are given.
        inner.eos_token_id,
        str(getattr(inner, "special_tokens_map", None)),
        tokenizer.has_chat_template,
        inner.bos_token_id,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _own_code(tokenizer: type) -> list[str]:
    """The Python files that come with a checkpoint, where its tokenizer is a class of theirs."""
    if not tokenizer.__module__.startswith("transformers_modules."):
        return []
    folder = Path(inspect.getfile(tokenizer)).parent
    return [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py"))]


def opened_store(folder: Path) -> TokenStore | None:
    """The token store in a folder; None where there is none, or a damaged one."""
    try:
        return TokenStore(folder)
    except ValueError:
        return None


def _write(
    source: Source, reading: Reading, tokenizer: Any | None, lengths: Lengths, target: Path | None
) -> TokenStore:
    writer = _store_writer(target)
    report = RowReport(limit=f"{lengths.limit} {lengths.max_seq_length}")
    with writer:
        to_ids = PairTokenizer(tokenizer, reading.train_on, template_strings=reading.template_strings)
        # Rows whose pairs are being encoded: outcomes come in the same order, some hundreds behind.
        waiting: deque[PairsOfRow] = deque()

        def pairs() -> Iterator[Any]:
            for row in read_pairs(source, reading, report):
                waiting.append(row)
                yield from row.pairs

        outcomes = to_ids.outcomes(pairs())
        for first in outcomes:
            row = waiting.popleft()
            every = [first, *(next(outcomes) for _ in row.pairs[1:])]
            row = row._replace(notes=(*row.notes, *to_ids.notes.pop(row.location, ())))
            writer.extend(kept_pairs(row, every, reading, lengths, report))
        return writer.close(report)


def _store_writer(target: Path | None) -> StoreWriter:
    if target is not None:
        try:
            return StoreWriter(target)
        except OSError:  # The cache is not writable: use a temporary folder.
            pass
    # Where nothing is kept, tokens still live on disk: memory does not grow with the data.
    folder = Path(tempfile.mkdtemp(prefix="orpo_mlx-"))
    # At exit and not sooner: the store stays mapped from its files while it is used.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return StoreWriter(folder / "tokens")


def kept_pairs(
    row: PairsOfRow, outcomes: list[Outcome], reading: Reading, lengths: Lengths, report: RowReport
) -> list[Example]:
    """The pairs or the group of a row that are trained on; counts what is not."""
    fitted: list[Fitted] = []
    bad = None
    for outcome in outcomes:
        if isinstance(outcome, DataError):
            if not reading.skip_bad_rows:
                raise with_remedy(outcome)
            bad = outcome
        else:
            fitted.append(fit(outcome, lengths.max_seq_length, lengths.truncate))
    kept = [each for each in fitted if each.pair is not None]
    if not kept:
        report.drop("bad_row" if bad else fitted[0].reason, row.location, bad)
        return []
    report.rows_kept += 1
    # A row is either some pairs or one group.
    report.pairs_left_out += (
        row.pairs_left_out + sum(map(pair_count, row.pairs)) - sum(pair_count(each.pair) for each in kept if each.pair)
    )
    # Each once: completions may be left out as they are read and once more as they are too long.
    for note in dict.fromkeys((*row.notes, *_notes_on(row, kept, reading))):
        report.note(note, row.location)
    return [each.pair for each in kept if each.pair is not None]


def _notes_on(row: PairsOfRow, kept: list[Fitted], reading: Reading) -> Iterator[str]:
    """What to know about how a row's pairs were fitted, and what is learned of them."""
    if reading.train_on != "all" and any(map(_has_several_turns, row.pairs)):
        yield f"{SEVERAL_TURNS[reading.train_on]} (`train_on={reading.train_on}`)"
    if any(each.pair and len(each.pair.completions) < len(row.pairs[0].completions) for each in kept):
        yield COMPLETIONS_LEFT_OUT
    if any(each.prompt_cut for each in kept):
        yield PROMPT_CUT
    if any(each.completion_cut for each in kept):
        yield COMPLETION_CUT


def _has_several_turns(pair: Any) -> bool:
    """Whether some completion is more than one turn."""
    if not isinstance(pair, Pair | Group):
        return False
    return any(not isinstance(completion, str) and len(completion) > 1 for completion in pair.completions)


def _key(*parts: Any) -> str:
    """A name for what `parts` and the code of this folder decide.

    All of its code, although not every module decides which tokens a row becomes: a list of those that do would be
    forgotten when one is split, and stale tokens trained on. Tokenizing once more after an upgrade is cheap.
    """
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for module in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:32]
