"""Judges that are rules: right by construction wherever the rule is what is wanted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from orpo_mlx.errors import ConfigError, did_you_mean
from orpo_mlx.judging.judges.scorer import Asked, Score, Scorer
from orpo_mlx.judging.judges.verdicts import Question, Verdict, check_references

PREFIX = "rule:"

# A pattern of the user's own may take time that grows with the square of a text, or worse.
_MOST_SEARCHED = 20_000


ScoreOf = Callable[[Asked], float]
"""The higher the better."""


class Rule(Scorer):
    """A scorer that is right by construction wherever the rule is what is wanted.

    Args:
        name: as the user gave it.
        score: of one reply.
        needs_reference: whether it compares with a right answer.
    """

    def __init__(self, name: str, score: ScoreOf, *, needs_reference: bool = False) -> None:
        self.name = name
        self.score = score
        self.needs_reference = needs_reference

    def __call__(self, questions: Sequence[Question], progress: Callable[[int], None]) -> list[Verdict]:
        """See `Judge`; DataError where a right answer is needed and a question has none."""
        if self.needs_reference:
            check_references(questions, self.name)
        return super().__call__(questions, progress)

    def scores(self, asked: Sequence[Asked], progress: Callable[[int], None]) -> list[Score]:
        """See `Scorer`."""
        found = [Score(self.score(each)) for each in asked]
        progress(len(found))
        return found


def make_rule(name: str) -> Rule:
    """The rule of `rule:KIND` or `rule:KIND=ARGUMENT`.

    Raises:
        ConfigError: there is no such rule, or its argument is missing or wrong.
    """
    kind, _, argument = name.removeprefix(PREFIX).partition("=")
    if kind not in RULES:
        hint = did_you_mean(kind, RULES, f"; expected one of {', '.join(RULES)}.")
        raise ConfigError(f"`judge={name}`: no rule {kind!r}{hint}")
    return RULES[kind](name, argument)


def regex_rule(name: str, argument: str) -> Rule:
    """1 where the pattern is found in a reply."""
    try:
        pattern = re.compile(argument)
    except re.error as error:
        raise ConfigError(f"`judge={name}`: {argument!r} is no regular expression ({error}).") from None
    if not argument:
        raise ConfigError(f"`judge={name}`: expected a regular expression, such as rule:regex=^Yes.")
    return Rule(name, lambda asked: float(pattern.search(asked.reply[:_MOST_SEARCHED]) is not None))


def length_rule(name: str, argument: str) -> Rule:
    """0 for a reply of a wanted number of words, minus the words by which it misses that otherwise."""
    bounds = re.fullmatch(r"(?:(\d{1,6})-)?(\d{1,6})", argument)
    # What does not match comes out as an empty range, which is refused below.
    least, most = (int(bounds[1] or 1), int(bounds[2])) if bounds else (1, 0)
    if least > most:
        raise ConfigError(f"`judge={name}`: expected words at most, or from and to: rule:length=20, rule:length=5-20.")

    def score(asked: Asked) -> float:
        words = len(asked.reply.split())
        return -float(max(least - words, words - most, 0))

    return Rule(name, score)


def json_rule(name: str, argument: str) -> Rule:
    """1 for a reply that is JSON; with names, for an object that has them all."""
    keys = [key.strip() for key in argument.split(",") if key.strip()]

    def score(asked: Asked) -> float:
        try:
            value = json.loads(asked.reply)
        except (ValueError, RecursionError):
            return 0.0
        return float(not keys or (isinstance(value, dict) and all(key in value for key in keys)))

    return Rule(name, score)


def exact_rule(name: str, argument: str) -> Rule:
    """1 for a reply that is the right answer but for capitals, white space and a full stop at its end."""
    _without_argument(name, argument)

    def same(text: str) -> str:
        return " ".join(text.casefold().split()).rstrip(".")

    def score(asked: Asked) -> float:
        return float(asked.reference is not None and same(asked.reply) == same(asked.reference))

    return Rule(name, score, needs_reference=True)


def plain_rule(name: str, argument: str) -> Rule:
    """The demo task's rule: the answer first, in one or two plain sentences; see `plainness`."""
    _without_argument(name, argument)
    return Rule(name, plainness)


def _without_argument(name: str, argument: str) -> None:
    if argument:
        raise ConfigError(f"`judge={name}`: takes no argument, found {argument!r}.")


# Hyphens, apostrophes, points and commas within a word are part of it: well-known, don't, 3.14, 1,000.
_WORD = re.compile(r"[^\W_]+(?:[-'’.,][^\W_]+)*")
# Only before white space or the end, so that the point of 3.14 ends no sentence.
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)]*(?=\s|$)")
# Hyphens, single stars and numbers count at the beginning of a line alone: elsewhere they are prose.
_MARKUP = re.compile(r"\n|\*\*|`|^\s*([-*#>]|\d+[.)]\s)", re.MULTILINE)
# What is said around an answer.
_AROUND = re.compile(
    r"\b(as an ai|language model|i'?m (sorry|happy|glad|not sure|not certain)|i'?d be|i would be|i am (sorry|happy|not)"
    r"|great question|good question|thank you|hope (this|that)|let me know|feel free|hesitate|happy to help|of course"
    r"|certainly|sure|you asked|your question|the question|the answer (is|to)|here is|here's|it'?s (important|worth)"
    r"|important to note|worth noting|however|may vary|can vary|in general|generally speaking)\b",
    re.IGNORECASE,
)
# Words that say nothing of an answer before it.
_FUNCTION_WORDS = frozenset(
    _WORD.findall(
        "a an the this that these those it its he she they there here is are was were be been being do does did can "
        "could will would shall should may might must has have had of in on at to for from by with as and or not so "
        "also what which who whom whose where when why how called known named name word term one used use usually "
        "mainly most"
    )
)
_ARTICLES = frozenset(("a", "an", "the"))


def plainness(asked: Asked) -> float:
    """How far a reply is the answer first, in one or two plain sentences: 0 to 1, the mean of four parts.

    One or two sentences: 1, more: 2 over their number. No line breaks, lists or markup: 1. Nothing said around the
    answer, such as courtesies, disclaimers and doubts: 1. The answer first: 1 / (1 + w), w being the words, articles at
    the beginning left out, before the first that is new, neither in the question nor a function word; 0 where something
    is said around it. An empty reply is 0.
    """
    words = [word.casefold() for word in _WORD.findall(asked.reply)]
    if not words:
        return 0.0
    sentences = max(1, len(_SENTENCE_END.findall(asked.reply)))
    direct = _AROUND.search(asked.reply) is None
    parts = [
        min(1.0, 2 / sentences),
        float(_MARKUP.search(asked.reply.strip()) is None),
        float(direct),
        1 / (1 + words_before_the_answer(words, asked.prompt)) if direct else 0.0,
    ]
    return sum(parts) / len(parts)


def words_before_the_answer(words: Sequence[str], prompt: str) -> int:
    """How many words a reply has before its first new one; all of them where none is new."""
    old = _FUNCTION_WORDS | {word.casefold() for word in _WORD.findall(prompt)}
    first = next((number for number, word in enumerate(words) if word not in old), len(words))
    articles = next((number for number, word in enumerate(words) if word not in _ARTICLES), 0)
    return max(0, first - articles)


RULES: Mapping[str, Callable[[str, str], Rule]] = {
    "regex": regex_rule,
    "length": length_rule,
    "json": json_rule,
    "exact": exact_rule,
    "plain": plain_rule,
}
"""By the name after `rule:`; each takes the judge's whole name and what stands after `=`."""
