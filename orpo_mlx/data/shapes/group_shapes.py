"""The shapes of rows that are no pairs: rated completions of one prompt, or one completion with a label."""

from __future__ import annotations

from orpo_mlx.data.shapes.columns import Columns, extras
from orpo_mlx.data.shapes.dialogues import dialogue_prompt, is_dialogue
from orpo_mlx.data.shapes.messages import as_turns, text_or_turns, texts
from orpo_mlx.data.shapes.ratings import label_of, pairs_of_scores, rated_completions_of, weight_of
from orpo_mlx.data.shapes.row_parts import Completed, Found, Options, completed, ids_of, instruction_prompt
from orpo_mlx.errors import DataError
from orpo_mlx.types import Group, Pair, Text, TokenizedGroup, TokenizedPair

# Where a row of rated or labelled completions has its prompt.
_GROUP_PROMPTS = ("prompt", "instruction", "question", "messages")
# Where a labelled row has its completion.
_CONVERSATIONS = ("messages", "conversations")
_COMPLETION = ("completion", "response", "answer", "generation", "output")


def group_token_ids(row: Columns, location: str, options: Options) -> Found:
    """Token ids of a prompt and of one completion with a label, or of several with scores, taken as they are."""
    value = row["completion_ids"]
    several = isinstance(value, list) and value and isinstance(value[0], list)
    if several:
        rated = rated_completions_of({"completions": value, "scores": row.get("scores")}, location)
        scores, labelled = tuple(each.score for each in rated), False
    else:
        value, scores, labelled = [value], (_label(row, location, options),), True
    if "prompt_ids" not in row:
        raise DataError(f"{location}: the row has completion_ids but no prompt_ids.")
    ids = tuple(ids_of(each, "completion_ids", location) for each in value)
    pairs = () if options.pair_ratings is None or labelled else tuple(pairs_of_scores(scores, options.pair_ratings))
    prompt = ids_of(row["prompt_ids"], "prompt_ids", location)
    if len(pairs) == 1:
        (better, worse), margin = pairs[0], max(scores) - min(scores)
        pair = TokenizedPair(prompt, ids[better], ids[worse], location, margin, weight_of(row, location))
        return Found([pair])
    return Found([TokenizedGroup(prompt, ids, scores, labelled, pairs, location, weight_of(row, location))])


def labelled_completion(row: Columns, location: str, options: Options) -> Found:
    """One completion of a prompt, and whether it is good."""
    name = next((name for name in _COMPLETION if name in row), None)
    if name is None:
        texts_of = _labelled_turns(row, location)
    else:
        texts_of = completed(_group_prompt(row, location), [row[name]], [name], row, location)
    score = _label(row, location, options)
    return Found([Group(*texts_of, (score,), True, (), location, *extras(row, location), weight_of(row, location))])


def _labelled_turns(row: Columns, location: str) -> Completed:
    """A conversation whose last turn is what the label is about, as LLaMA-Factory and ms-swift have it."""
    name = next((name for name in _CONVERSATIONS if name in row), None)
    turns = texts(row[name], name, location) if name else ()
    if name is None or len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise DataError(
            f"{location}: the row has a label but no completion ({', '.join(_COMPLETION)}, or messages that end with "
            "the assistant's turn)."
        )
    return completed(as_turns(turns[:-1], "user"), [list(turns[-1:])], [name], row, location)


def rated_completions(row: Columns, location: str, options: Options) -> Found:
    """A list of rated completions of one prompt: one group, or the pair that is wanted of it."""
    rated = rated_completions_of(row, location)
    scores = tuple(each.score for each in rated)
    # Nothing is better than anything else: without pairs, the row is counted under `equal_ratings`.
    if len(set(scores)) == 1:
        return Found([])
    pairs = tuple(pairs_of_scores(scores, options.pair_ratings)) if options.pair_ratings else ()
    prompt = _group_prompt(row, location)
    # What is in no pair need not be run.
    alone = len(pairs) == 1
    if alone:
        rated = [rated[place] for place in pairs[0]]
    names = ["chosen", "rejected"] if alone else [f"completions[{number}]" for number in range(len(rated))]
    texts_of = completed(prompt, [each.completion for each in rated], names, row, location)
    more, weight = extras(row, location), weight_of(row, location)
    if alone:
        margin = rated[0].score - rated[1].score
        better, worse = texts_of.completions
        return Found([Pair(texts_of.prompt, better, worse, location, *more, margin, weight)])
    return Found([Group(*texts_of, scores, False, pairs, location, *more, weight)])


def _group_prompt(row: Columns, location: str) -> Text:
    name = next((name for name in _GROUP_PROMPTS if name in row), None)
    if name is None:
        has = "a label" if "label" in row else "rated completions"
        raise DataError(f"{location}: the row has {has} but no prompt.")
    if name == "instruction":
        return instruction_prompt(row, location)
    prompt = text_or_turns(row[name], name, location, "user")
    return dialogue_prompt(prompt) if isinstance(prompt, str) and is_dialogue(prompt) else prompt


def _label(row: Columns, location: str, options: Options) -> float:
    if "label" not in row:
        raise DataError(f"{location}: the row has one completion and no label; expected label, or chosen and rejected.")
    return float(label_of(row["label"], location, options.labels))
