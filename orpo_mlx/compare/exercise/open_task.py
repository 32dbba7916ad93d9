"""Tier 2: SmolLM2's own replies to open prompts, ranked by a scorer that has seen no language model."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from orpo_mlx.compare.exercise.base_kl import BaseKL
from orpo_mlx.compare.exercise.cells import Cells, until_done
from orpo_mlx.compare.exercise.prompts import open_prompts
from orpo_mlx.compare.exercise.task import PerPrompt, Size
from orpo_mlx.compare.exercise.trainer import fresh_run
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.data.batching import micro_batches
from orpo_mlx.engine.head_logps import token_logps
from orpo_mlx.engine.pair_scorer import PairScorer
from orpo_mlx.engine.score import score_pairs
from orpo_mlx.errors import ConfigError
from orpo_mlx.judging.generation import Drawn, Generator, StopTokens
from orpo_mlx.judging.requests import Sampling
from orpo_mlx.models.adapters import adapters_merged, in_evaluation
from orpo_mlx.models.loading import load
from orpo_mlx.models.names import DEFAULT_MODEL
from orpo_mlx.training.references.reference_store import ReferenceTable
from orpo_mlx.types import TokenizedPair

CLEAN, FLIPPED, LONGER = "clean", "25 % flipped", "80 % longer chosen"
VARIANTS = (CLEAN, FLIPPED, LONGER)
SAMPLES = 4
"""Replies to each prompt of which pairs are made."""
REPLY_TOKENS = 40
_CLOSE_LENGTHS = 3
# Of the 80 % variant: pairs whose lengths a model could tell apart.
_FAR_LENGTHS = 4
_LONGER_SHARE, _FLIPPED_SHARE = 0.8, 0.25
# Scores are -1 to 1; a smaller difference is a word's.
_LEAST_DIFFERENCE = 0.1
_ROWS = 64
"""Replies that are drawn together."""
_SHOWN = 4
_ENDS = (".", "!", "?", "…")
# What may follow the mark that ends a sentence within one token.
_CLOSING = "\"'”’)]}*» "
_SEEDS = {"train": 1, "valid": 2, "test": 3}

# Plain prose by the authors of this package: is what a model knew of language still there?
HELD_OUT_TEXT = (
    "The river rises in the hills to the north and reaches the sea after some two hundred miles. For most of that way "
    "it is too shallow for boats, so the towns along it grew around bridges and mills rather than harbours. In dry "
    "summers the upper reaches disappear into gravel, and farmers dig wells in the bed itself. When the rain returns "
    "in October, the water comes down within a day, brown and loud, and carries branches past the windows of people "
    "who have moved their chairs upstairs. Nobody remembers a year without a flood, and nobody has ever left."
)


class Answer(NamedTuple):
    """A reply with what it is compared by."""

    ids: tuple[int, ...]
    text: str
    gold: float


def sentiment_scorer() -> Callable[[str], float]:
    """VADER's compound score of a text, -1 to 1 (Hutto & Gilbert 2014): a lexicon with rules for negation and emphasis.

    Raises:
        ConfigError: the package is not installed.
    """
    # Deterministic, offline, and made by people who rated words: it shares no data with the model that it scores.
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ConfigError("the exercise's scorer is missing: pip install 'orpo-mlx[exercise]'.") from None
    analyzer = SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


class OpenTask:
    """Pairs of one model's replies to the same prompt, the better one by VADER chosen.

    Variants: of `clean` and `25 % flipped` a pair is the best and the worst of four replies whose lengths differ by at
    most three tokens; of `80 % longer chosen` by at least four, and the better one is the longer one in 80 % of them.
    Valid and test are prompts alone, so nothing about length is in them.

    A reply is a sentence: it ends with the first token that ends one (`sentence_ends`), or a line, or the model's turn.

    Args:
        size: how large the tier is run.
        cells: where the base model's replies and log-probs are kept, which take minutes on a CPU.
    """

    name = "open"
    bound = 5.0
    kl_targets: tuple[float, ...] = (0.5, 2.0)

    def __init__(self, size: Size, cells: Cells) -> None:
        self.size = size
        self._cells = cells
        # On every device: in half precision a method's small differences would be the rounding's.
        self.loaded = load(DEFAULT_MODEL, dtype="float32")
        assert self.loaded.tokenizer is not None
        self._tokenizer: Any = self.loaded.tokenizer
        self._score = sentiment_scorer()
        self._turn_ends: set[int] = set(self._tokenizer.eos_token_ids)
        self._stops = StopTokens(self._turn_ends | sentence_ends(self._tokenizer))
        self._seen: list[Answer] = []
        self._prompts = {
            "train": open_prompts("train", size.pairs),
            "valid": open_prompts("valid", size.valid_prompts),
            "test": open_prompts("test", size.test_prompts),
        }
        self._ids = {split: [self._prompt_ids(text) for text in texts] for split, texts in self._prompts.items()}
        self._answers = {split: self._of_base(split, SAMPLES, seed=_SEEDS[split]) for split in ("train", "valid")}
        self._pairs = {variant: make_pairs(self._ids["train"], self._answers["train"], variant) for variant in VARIANTS}
        self._held_out = make_pairs(self._ids["valid"], self._answers["valid"], CLEAN)
        self._kl = {split: BaseKL(self.loaded.model, self._ids[split]) for split in ("valid", "test")}
        self._drawing = {split: self._generator(1, _drawn_by(split), keep_logps=True) for split in ("valid", "test")}
        self._base_logps = self._kept(("held-out log-probs", lambda: {"logps": self._logps()}))[0]["logps"]
        self._tables: dict[str, ReferenceTable] = {}
        self._base_gold = {split: self._golds(split) for split in ("valid", "test")}

    def shared(self) -> TrainingConfig:
        """The settings that hold for all methods."""
        lora = {"rank": 8, "scale": 20.0, "dropout": 0.0}
        # Half of the layers, mlx-lm's default: a step takes two thirds of the time of one that trains all.
        return TrainingConfig(batch_size=self.size.batch_size, lora_parameters=lora, num_layers=16, memory="fast")

    def train_pairs(self, variant: str) -> list[TokenizedPair]:
        """Pairs of the train prompts; a prompt whose replies make none of a variant is left out (`facts` counts)."""
        return self._pairs[variant]

    def reference_table(self, variant: str) -> ReferenceTable:
        """Log-probs of a variant's pairs under the base model, computed once, in batches of the training's size."""
        if variant not in self._tables:
            rows = self._kept((f"reference of {variant}", partial(self._reference_rows, variant)))[0]
            self._tables[variant] = ReferenceTable()
            self._tables[variant].restore(
                {"keys": mx.array(rows["keys"], mx.uint8), "logps": mx.array(rows["logps"], mx.float32)}
            )
        return self._tables[variant]

    def held_out_pairs(self) -> list[TokenizedPair]:
        """Clean pairs of the valid prompts."""
        return self._held_out

    def look(self, split: str) -> PerPrompt:
        """One reply to each prompt, drawn at temperature 1: gold, KL, length, win over the base."""
        generator = self._drawing[split]
        drawn: list[Drawn] = []
        with adapters_merged(self.loaded.model):
            for number, prompts in enumerate(generator.split(self._ids[split])):
                drawn += generator.draw(prompts, number)
        answers = [self._scored(row) for row in drawn]
        kls = self._kl[split]([answer.ids for answer in answers], [row.logps for row in drawn if row.logps is not None])
        self._seen = answers
        gold = [answer.gold for answer in answers]
        return {
            "gold": gold,
            "kl": kls,
            "tokens": [float(len(answer.ids)) for answer in answers],
            "win": [
                1.0 if g > b else 0.5 if g == b else 0.0 for g, b in zip(gold, self._base_gold[split], strict=True)
            ],
        }

    def besides(self) -> PerPrompt:
        """What became of log-probs: `chosen_drift` and `rejected_drift` of held-out pairs, `text_nll` of a text."""
        drift = [after - before for after, before in zip(self._logps(), self._base_logps, strict=True)]
        return {"chosen_drift": drift[::2], "rejected_drift": drift[1::2], "text_nll": [self._text_nll()]}

    def replies(self) -> list[dict[str, str]]:
        """The first of the replies that the last `look` scored."""
        shown = zip(self._prompts["test"], self._seen[:_SHOWN], strict=False)
        return [{"prompt": prompt, "reply": answer.text} for prompt, answer in shown]

    def facts(self) -> dict[str, Any]:
        """What a reader has to know of the data: how many pairs, how far apart their gold and their lengths are."""
        found: dict[str, Any] = {"model": DEFAULT_MODEL, "scorer": "VADER compound (vaderSentiment)"}
        golds = {answer.ids: answer.gold for answers in self._answers["train"] for answer in answers}
        for variant, pairs in self._pairs.items():
            longer = [len(pair.chosen_ids) > len(pair.rejected_ids) for pair in pairs]
            apart = [abs(golds[pair.chosen_ids] - golds[pair.rejected_ids]) for pair in pairs]
            found[variant] = {
                "pairs": len(pairs),
                "prompts_without_a_pair": len(self._ids["train"]) - len(pairs),
                "longer_chosen": statistics.fmean(longer) if longer else 0.0,
                "gold_difference": statistics.fmean(apart) if apart else 0.0,
            }
        return found

    def _kept(self, *wanted: tuple[str, Callable[[], dict[str, Any]]]) -> list[dict[str, Any]]:
        """What has a name and is computed once, by whichever process comes to it first."""
        return until_done(
            [partial(self._cells.keep, {"tier": self.name, "what": what}, compute) for what, compute in wanted]
        )

    def _reference_rows(self, variant: str) -> dict[str, Any]:
        config = dataclasses.replace(self.shared(), method="dpo")
        with fresh_run(self.loaded, config) as run:
            assert run.reference is not None
            run.reference.remember(micro_batches(self._pairs[variant], config.batch_size, config.micro_batch_tokens))
            return {name: rows.tolist() for name, rows in run.reference.table.arrays().items()}

    def _prompt_ids(self, text: str) -> list[int]:
        # Without the system turn that the template would put first: two fifths of all tokens to run.
        turns = [{"role": "system", "content": ""}, {"role": "user", "content": text}]
        return list(self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True))

    def _generator(self, samples: int, seed: int, *, keep_logps: bool = False) -> Generator:
        # The token that ends a reply is its last.
        sampling = Sampling(max_tokens=REPLY_TOKENS, temperature=1.0, seed=seed)
        return Generator(self.loaded.model, self._stops, sampling, samples=samples, rows=_ROWS, keep_logps=keep_logps)

    def _scored_group(self, generator: Generator, prompts: Sequence[Sequence[int]], number: int) -> dict[str, Any]:
        answers = [self._scored(row) for row in generator.draw(prompts, number)]
        samples = len(answers) // len(prompts)
        return {"answers": [answers[start : start + samples] for start in range(0, len(answers), samples)]}

    def _of_base(self, split: str, samples: int, seed: int) -> list[list[Answer]]:
        """Answers of the model as it was loaded."""
        generator = self._generator(samples, seed)
        named = f"{samples} answers to {split} prompts"
        groups = [
            (f"{named}, group {number}", partial(self._scored_group, generator, prompts, number))
            for number, prompts in enumerate(generator.split(self._ids[split]))
        ]
        kept = [answers for group in self._kept(*groups) for answers in group["answers"]]
        return [[Answer(tuple(ids), text, gold) for ids, text, gold in answers] for answers in kept]

    def _scored(self, row: Drawn) -> Answer:
        # What ends a reply is trained on as well: how long to speak is part of what is said.
        end = () if row.end is None else (row.end,)
        spoken = [*row.ids, *(token for token in end if token not in self._turn_ends)]
        text = str(self._tokenizer.decode(spoken)).strip()
        return Answer((*row.ids, *end), text, self._score(text))

    def _golds(self, split: str) -> list[float]:
        # The seed of `look`: a reply wins or loses against the base model's under the same random numbers.
        return [each[0].gold for each in self._of_base(split, 1, seed=_drawn_by(split))]

    def _logps(self) -> list[float]:
        """Summed log-probs of chosen and rejected of each held-out pair, in turn."""
        self.loaded.model.eval()
        rows = score_pairs(PairScorer(self.loaded.model), self._held_out, batch_size=_ROWS)
        return [row[key] for row in rows for key in ("chosen_logps", "rejected_logps")]

    def _text_nll(self) -> float:
        """Nats per token of `HELD_OUT_TEXT`."""
        ids = mx.array([self._tokenizer.encode(HELD_OUT_TEXT)])
        with in_evaluation(self.loaded.model):
            logps = token_logps(self.loaded.model(ids[:, :-1]), ids[:, 1:])
        return -float(logps.mean())


def _drawn_by(split: str) -> int:
    """The seed of the replies that a split's prompts are judged by."""
    return 100 + _SEEDS[split]


def sentence_ends(tokenizer: Any) -> set[int]:
    """Tokens that end a sentence or a line."""
    texts = {token: str(tokenizer.decode([token])) for token in range(tokenizer.vocab_size)}
    return {
        token for token, text in texts.items() if "\n" in text or "\r" in text or text.rstrip(_CLOSING).endswith(_ENDS)
    }


def make_pairs(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Answer]], variant: str
) -> list[TokenizedPair]:
    """A pair of each prompt whose answers make one of a variant; see `OpenTask`."""
    rng = np.random.default_rng(0)
    pairs = []
    for row, (prompt, drawn) in enumerate(zip(prompts, answers, strict=True)):
        # Drawn for every prompt, used or not, so that one prompt's pair does not depend on the others'.
        flips, longer = rng.random() < _FLIPPED_SHARE, rng.random() < _LONGER_SHARE
        found = best_and_worst(drawn, longer if variant == LONGER else None)
        if found is not None:
            better, worse = found[::-1] if variant == FLIPPED and flips else found
            pairs.append(TokenizedPair(tuple(prompt), better.ids, worse.ids, f"train:{row}"))
    return pairs


def best_and_worst(answers: Sequence[Answer], longer: bool | None) -> tuple[Answer, Answer] | None:
    """The two answers that gold parts the most, the better first; None where there are no two that fit.

    Args:
        answers: to one prompt.
        longer: whether the better one must be longer (or shorter) by four tokens; None: they must be of nearly one
            length.
    """

    def fits(better: Answer, worse: Answer) -> bool:
        extra = len(better.ids) - len(worse.ids)
        if longer is None:
            return abs(extra) <= _CLOSE_LENGTHS
        return (extra if longer else -extra) >= _FAR_LENGTHS

    found = [
        (better.gold - worse.gold, better, worse)
        for better, worse in itertools.permutations(answers, 2)
        if better.gold - worse.gold >= _LEAST_DIFFERENCE and fits(better, worse)
    ]
    return max(found, key=lambda each: each[0])[1:] if found else None
