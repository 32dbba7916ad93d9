"""Every shape that data sets come in gives the same pairs. The samples are written after the data sets' own columns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from orpo_mlx.data.shapes.formats import PROMPT_ELSEWHERE, SHAPES, read_row
from orpo_mlx.data.shapes.messages import as_turns
from orpo_mlx.errors import DataError
from orpo_mlx.types import Group, Message, Pair, TokenizedGroup, TokenizedPair

Row = dict[str, Any]

# Question, chosen, rejected: accents, digits, line ends, code, and answers that begin alike.
SINGLE = [
    ("Who painted Guernica?", "Pablo Picasso painted it.", "Pablo Neruda did."),
    ("Wie heißt die Hauptstadt?\nKurz.", "Wien.", "Das kommt darauf an: 1, 2 oder 3?"),
    ("Print 1 in Python", "```python\nprint(1)\n```", "print 1"),
    ("2 + 2 = ?", "4", "5"),
    ("Say hi", "Hi!", "Hi?"),
]
HISTORY = ("Hello", "Hi, what is it?")


def said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def turns(question: str, *, history: bool = False, system: str = "") -> list[Message]:
    first = [said("system", system)] if system else []
    earlier = [said("user", HISTORY[0]), said("assistant", HISTORY[1])] if history else []
    return [*first, *earlier, said("user", question)]


def sharegpt(messages: list[Message]) -> list[Row]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in messages]


def dialogue(messages: list[Message]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in messages)


def strings(question: str, chosen: str, rejected: str) -> Row:
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def messages(question: str, chosen: str, rejected: str, **which: Any) -> Row:
    sides = {"chosen": [said("assistant", chosen)], "rejected": [said("assistant", rejected)]}
    return {"prompt": turns(question, **which), **sides}


def whole(question: str, chosen: str, rejected: str, **which: Any) -> Row:
    start = turns(question, **which)
    return {"chosen": [*start, said("assistant", chosen)], "rejected": [*start, said("assistant", rejected)]}


def ultrafeedback(question: str, chosen: str, rejected: str) -> Row:
    row = whole(question, chosen, rejected)
    scores = {"score_chosen": 8.5, "score_rejected": 6.0}
    return {"prompt": question, "prompt_id": "0a1b", **row, "messages": row["chosen"], **scores}


def hh_rlhf(question: str, chosen: str, rejected: str) -> Row:
    return {side: dialogue(value) for side, value in whole(question, chosen, rejected, history=True).items()}


def hh_prompt(question: str, chosen: str, rejected: str) -> Row:
    start = dialogue(turns(question, history=True))
    return {"prompt": f"{start}\n\nAssistant:", "chosen": f" {chosen}".strip(), "rejected": rejected}


def orca(question: str, chosen: str, rejected: str) -> Row:
    return {"system": "Be brief.", "question": question, "chosen": chosen, "rejected": rejected}


def llama_factory(question: str, chosen: str, rejected: str) -> Row:
    start = sharegpt(turns(question, history=True))
    (good,), (bad,) = (sharegpt([said("assistant", text)]) for text in (chosen, rejected))
    return {"conversations": start, "chosen": good, "rejected": bad}


def openai_ranking(question: str, chosen: str, rejected: str) -> Row:
    start = turns(question, history=True)
    return {"messages": start, "chosen": said("assistant", chosen), "rejected": said("assistant", rejected)}


def alpaca(question: str, chosen: str, rejected: str) -> Row:
    instruction, _, rest = question.partition("\n")
    return {"instruction": instruction, "input": rest, "chosen": chosen, "rejected": rejected}


def alpaca_history(question: str, chosen: str, rejected: str) -> Row:
    return {**alpaca(question, chosen, rejected), "history": [list(HISTORY)]}


def capybara(question: str, chosen: str, rejected: str) -> Row:
    row = whole(question, chosen, rejected, history=True)
    return {"source": "Dove", **row, "rating_chosen": 5, "rating_rejected": 2, "chosen_model": "m"}


def text_parts(question: str, chosen: str, rejected: str) -> Row:
    row = messages(question, chosen, rejected)
    return {
        name: [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in value]
        for name, value in row.items()
    }


def rated(question: str, chosen: str, rejected: str) -> Row:
    return {"prompt": question, "completions": [rejected, "A third.", chosen], "scores": [1, 2, 3]}


def openai(question: str, chosen: str, rejected: str) -> Row:
    sides = {"preferred_output": [said("assistant", chosen)], "non_preferred_output": [said("assistant", rejected)]}
    return {"input": {"messages": turns(question), "tools": [], "parallel_tool_calls": True}, **sides}


def swift(question: str, chosen: str, rejected: str) -> Row:
    return {"messages": [*turns(question, history=True), said("assistant", chosen)], "rejected_response": rejected}


def swift_messages(question: str, chosen: str, rejected: str) -> Row:
    row = whole(question, chosen, rejected)
    return {"messages": row["chosen"], "rejected_messages": row["rejected"]}


CASES: list[tuple[str, Callable[[str, str, str], Row], dict[str, Any]]] = [
    ("strings, explicit prompt", strings, {}),
    ("conversational, explicit prompt", messages, {}),
    ("conversational, explicit prompt", text_parts, {}),
    ("conversational, implicit prompt", whole, {}),
    ("conversations beside a prompt (ultrafeedback_binarized)", ultrafeedback, {}),
    ("dialogue strings (hh-rlhf)", hh_rlhf, {"history": True}),
    ("dialogue prompt (hh-rlhf)", hh_prompt, {"history": True}),
    ("question with system (orca_dpo_pairs)", orca, {"system": "Be brief."}),
    ("conversations with from and value (ShareGPT)", llama_factory, {"history": True}),
    ("messages and two answers", openai_ranking, {"history": True}),
    ("instruction and input (Alpaca)", alpaca, {}),
    ("instruction and input (Alpaca)", alpaca_history, {"history": True}),
    ("conversational, implicit prompt", capybara, {"history": True}),
    ("rated completions", rated, {}),
    ("preferred output (OpenAI)", openai, {}),
    ("messages and a rejected response (ms-swift)", swift, {"history": True}),
    ("messages and a rejected response (ms-swift)", swift_messages, {}),
]


def as_conversation(pair: Any) -> tuple[Any, ...]:
    assert isinstance(pair, Pair)
    return as_turns(pair.prompt, "user"), as_turns(pair.chosen, "assistant"), as_turns(pair.rejected, "assistant")


@pytest.mark.parametrize(("name", "make", "which"), CASES, ids=[case[1].__name__ for case in CASES])
def test_every_shape_gives_the_same_pairs(name: str, make: Callable[..., Row], which: dict[str, Any]) -> None:
    for question, chosen, rejected in SINGLE:
        # Through JSON, since that is how rows arrive.
        row = json.loads(json.dumps({**make(question, chosen, rejected), "weight": 0.5}))
        read = read_row(row, "f:1", pair_ratings="best_worst")
        assert read.shape == name
        assert read.notes == ()
        (pair,) = read.pairs
        expected = (turns(question, **which), [said("assistant", chosen)], [said("assistant", rejected)])
        assert as_conversation(pair) == tuple(map(tuple, expected))
        assert (pair.location, pair.weight) == ("f:1", 0.5)


def test_the_table_above_has_every_shape() -> None:
    others = {"strings, implicit prompt", "token ids", "token ids of completions", "labelled completion"}
    assert {shape.name for shape in SHAPES} - {case[0] for case in CASES} == others


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is bluish.", "The sky is"),
        ("Count: 1, 2, 3", "Count: 1, 2, 4", "Count: 1, 2,"),
        ("Q: one\nA: yes", "Q: one\nA: yesterday", "Q: one\nA:"),
        ("He said no", "He said no way", "He said no"),
    ],
)
def test_two_strings_share_whole_words_only(chosen: str, rejected: str, prompt: str) -> None:
    read = read_row({"chosen": chosen, "rejected": rejected}, "f:1")
    assert read.shape == "strings, implicit prompt"
    assert read.pairs == [Pair(prompt, chosen[len(prompt) :], rejected[len(prompt) :], "f:1", divided_text=True)]


@pytest.mark.parametrize(
    ("names", "margin"),
    [
        (("score_chosen", "score_rejected"), 2.5),
        (("chosen_score", "rejected_score"), 2.5),
        (("chosen-rating", "rejected-rating"), 2.5),
        (("chosen_rating", "rejected_rating"), 2.5),
        (("rating_chosen", "rating_rejected"), 2.5),
        (("better", "worse"), None),
    ],
)
def test_scores_become_a_margin(names: tuple[str, str], margin: float | None) -> None:
    for high, low in [(8.5, 6), ("8.5", "6.0")]:
        row = {**strings("Q", "A", "B"), names[0]: high, names[1]: low}
        (pair,) = read_row(row, "f:1").pairs
        assert isinstance(pair, Pair)
        assert pair.margin == margin


RATED: list[Row] = [
    {"prompt": "Q", "completions": ["b", "a", "c"], "scores": [2, 3, 1]},
    {"instruction": "Q", "completions": [{"response": t, "score": s} for t, s in [("c", 1), ("a", 3), ("b", 2)]]},
    {"prompt": "Q", "responses": [{"text": t, "rating": s} for t, s in [("b", "2"), ("c", "1"), ("a", "3")]]},
    {"prompt": "Q", "answers": [{"answer": t, "rank": r} for t, r in [("a", 1.0), ("b", 2.0), ("c", 3.0)]]},
    {"question": "Q", "generations": ["a", "b", "c"], "ranks": [1, 2, 3]},
]


@pytest.mark.parametrize("row", RATED)
def test_rated_completions_become_pairs_on_request(row: Row) -> None:
    best_worst = read_row(row, "f:1", pair_ratings="best_worst")
    assert best_worst.shape == "rated completions"
    assert best_worst.pairs == [Pair("Q", "a", "c", "f:1", margin=2.0)]
    for pairing, expected in {
        "all": [("a", "b"), ("a", "c"), ("b", "c")],
        "adjacent": [("a", "b"), ("b", "c")],
        None: [],
    }.items():
        (group,) = read_row(row, "f:1", pair_ratings=pairing).pairs
        assert isinstance(group, Group)
        assert [(group.completions[better], group.completions[worse]) for better, worse in group.pairs] == expected
        assert [text for _, text in sorted(zip(group.scores, group.completions, strict=True))] == ["c", "b", "a"]


def test_equal_ratings_give_no_pair() -> None:
    row = {"prompt": "Q", "completions": ["a", "b"], "scores": [1, 1]}
    assert read_row(row, "f:1", pair_ratings="all").pairs == []
    # Each with all of the next lower rank, so that none is forgotten.
    tied = {"prompt": "Q", "completions": ["a", "b", "c", "d"], "scores": [1, 2, 1, 0]}
    (group,) = read_row(tied, "f:1", pair_ratings="adjacent").pairs
    assert group.pairs == ((1, 0), (1, 2), (0, 3), (2, 3))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("value", "words", "good"),
    [
        (True, (), 1.0),
        (0, (), 0.0),
        ("1", (), 1.0),
        ("False", (), 0.0),
        ("👍", (), 1.0),
        ("thumbs_down", (), 0.0),
        ("Yes", ("yes", "no"), 1.0),
        ("no", ("yes", "no"), 0.0),
    ],
)
def test_labels_become_one_completion_that_is_good_or_bad(value: Any, words: tuple[str, ...], good: float) -> None:
    for row in (
        {"prompt": "Q", "completion": "A", "label": value},
        {"prompt": turns("Q"), "completion": [said("assistant", "A")], "label": value},
        {"messages": turns("Q"), "response": "A", "label": value},
    ):
        (group,) = read_row(row, "f:1", labels=words).pairs
        assert isinstance(group, Group)
        assert (as_turns(group.prompt, "user"), group.scores, group.labelled) == (tuple(turns("Q")), (good,), True)
        assert as_turns(group.completions[0], "assistant") == (said("assistant", "A"),)
    (ids,) = read_row({"prompt_ids": [1], "completion_ids": [2], "label": value}, "f:1", labels=words).pairs
    assert ids == TokenizedGroup((1,), ((2,),), (good,), True, (), "f:1")


@pytest.mark.parametrize(
    "names",
    [("prompt_ids", "chosen_ids", "rejected_ids"), ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")],
)
def test_token_ids(names: tuple[str, str, str]) -> None:
    for sides in ([1, 2], [3], [4, 5]), ([0], [0], [1]), ([9] * 50, [7], [8]), ([1], [2, 3], [3]), ([5], [6], [7, 8]):
        read = read_row(dict(zip(names, sides, strict=True)), "f:1")
        assert read.shape == "token ids"
        assert read.pairs == [TokenizedPair(tuple(sides[0]), tuple(sides[1]), tuple(sides[2]), "f:1")]
        scored = {"weight": "2", "score_chosen": 3, "score_rejected": 2.5}
        (pair,) = read_row({**dict(zip(names, sides, strict=True)), **scored}, "f:1").pairs
        assert (pair.margin, pair.weight) == (0.5, 2.0)


def test_tools_and_template_arguments_travel_along() -> None:
    # A null in a JSON Schema says something: a default of null is one.
    function = {"name": "f", "strict": None, "parameters": {"a": None, "b": [1]}}
    tool = {"type": "function", "function": function}
    as_text = {"type": "function", "function": {**function, "parameters": json.dumps(function["parameters"])}}
    for tools in ([tool], json.dumps([tool]), [json.dumps(tool)], [as_text]):
        row = {**messages("Q", "A", "B"), "tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
        (pair,) = read_row(row, "f:1").pairs
        assert isinstance(pair, Pair)
        assert pair.tools == (tool,)
        assert pair.template_kwargs == {"enable_thinking": False}
    (pair,) = read_row({**messages("Q", "A", "B"), "functions": json.dumps([function])}, "f:1").pairs
    assert isinstance(pair, Pair)
    assert pair.tools == ({"type": "function", "function": function},)
    call = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]
    (pair,) = read_row({**messages("Q", "A", "B"), "chosen": call, "tools": None}, "f:1").pairs
    assert isinstance(pair, Pair)
    assert pair.chosen == ({**call[0], "content": ""},)
    assert pair.tools == ()


def test_a_function_call_in_sharegpt() -> None:
    start = [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
        {"from": "observation", "value": "42"},
    ]
    row = {"conversations": start, "chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}}
    (pair,) = read_row(row, "f:1").pairs
    assert isinstance(pair, Pair)
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert pair.prompt[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert pair.prompt[2] == {"role": "tool", "content": "42"}


def test_a_prompt_that_is_not_in_its_conversation_is_noted() -> None:
    row = {**ultrafeedback("Q", "A", "B"), "prompt": "something else"}
    read = read_row(row, "f:1")
    assert read.notes == (PROMPT_ELSEWHERE,)
    assert as_conversation(read.pairs[0])[0] == (said("user", "Q"),)


def test_whole_conversations_win_over_columns_that_repeat_their_question() -> None:
    extras: list[Row] = [
        {"conversations": sharegpt(turns("Q"))},
        {"question": "Q"},
        {"instruction": "Q"},
        {"messages": []},
    ]
    for extra in extras:
        read = read_row({**whole("Q", "A", "B"), **extra}, "f:1")
        assert read.shape == "conversational, implicit prompt"
        assert as_conversation(read.pairs[0])[0] == (said("user", "Q"),)


@pytest.mark.parametrize("name", ["assistant", "gpt", "model", "Assistant"])
def test_answers_of_several_turns_are_no_whole_conversations(name: str) -> None:
    side = [{"role": name, "content": "A"}, said("user", "Why?"), {"role": name, "content": "So."}]
    read = read_row({"prompt": "Q", "chosen": side, "rejected": [*side[:2], {"role": name, "content": "No."}]}, "f:1")
    assert read.shape == "conversational, explicit prompt"
    assert as_conversation(read.pairs[0])[0] == (said("user", "Q"),)


def test_sides_that_are_the_same_conversation_keep_an_answer() -> None:
    (pair,) = read_row(whole("Q", "A", "A"), "f:1").pairs
    assert as_conversation(pair) == ((said("user", "Q"),), (said("assistant", "A"),), (said("assistant", "A"),))


def test_a_side_that_stops_early_is_empty() -> None:
    start = turns("Q", history=True)
    (pair,) = read_row({"chosen": start, "rejected": [*start, said("assistant", "B")]}, "f:1").pairs
    assert as_conversation(pair) == (tuple(start), (), (said("assistant", "B"),))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"chosen": "Yes", "rejected": "No"}, "chosen and rejected do not begin with the same words"),
        ({"chosen": "蓝天白云", "rejected": "蓝天黑云"}, "chosen and rejected do not begin with the same words"),
        (
            {"chosen": [*turns("Q"), said("assistant", "A")], "rejected": [*turns("R"), said("assistant", "B")]},
            "chosen and rejected share no first turn",
        ),
        (
            {"chosen": [*turns("Q"), said("user", "A")], "rejected": [*turns("Q"), said("assistant", "B")]},
            "chosen[1], the first turn that differs, is of role 'user', expected the assistant's",
        ),
        ({"prompt": "Q", "chosen": turns("A"), "rejected": "B"}, "'chosen' begins with a turn of the user"),
        (
            {"prompt": [*turns("Q"), said("assistant", "A")], "chosen": "A", "rejected": "B"},
            "the prompt ends with a turn of the assistant, so the answer may be in it already",
        ),
        (
            {"conversations": sharegpt([*turns("Q"), said("assistant", "A")]), "chosen": "A", "rejected": "B"},
            "the prompt ends with a turn of the assistant",
        ),
        ({**strings("Q", "A", "B"), "tools": "x"}, "'tools' is text but not JSON"),
        ({**strings("Q", "A", "B"), "tools": [1]}, "'tools' must be a list of tool descriptions"),
        ({**strings("Q", "A", "B"), "chat_template_kwargs": [1]}, "'chat_template_kwargs' must be an object"),
        ({**strings("Q", "A", "B"), "score_chosen": "x", "score_rejected": 1}, "'score_chosen' must be a number"),
        ({**strings("Q", "A", "B"), "score_chosen": True, "score_rejected": 1}, "'score_chosen' must be a number"),
        ({**strings("Q", "A", "B"), "score_chosen": float("nan"), "score_rejected": 1}, "'score_chosen' is nan"),
        (
            {**strings("Q", "A", "B"), "score_chosen": 1, "score_rejected": "-Infinity"},
            "'score_rejected' is -inf, expected a number of at most 1e+38 in size",
        ),
        ({**strings("Q", "A", "B"), "weight": -1}, "'weight' is -1, expected a number of 0 or more"),
        ({**strings("Q", "A", "B"), "weight": float("inf")}, "'weight' is inf, expected a number of at most 1e+38"),
        ({**strings("Q", "A", "B"), "weight": [1]}, "'weight' must be a number"),
        ({"instruction": "Q", "history": ["x"], "chosen": "A", "rejected": "B"}, "'history' must be a list of"),
        ({"conversations": [{"from": "human"}], "chosen": "A", "rejected": "B"}, "must have 'from' and 'value'"),
        (
            {"conversations": [{"from": "function_call", "value": "{"}], "chosen": "A", "rejected": "B"},
            "is a function call, but its value is not JSON",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "A", "rejected": "B"},
            "prompt[0].content[0] is of type 'image'; only text",
        ),
        ({"completions": ["a", "b"], "scores": [1, 2]}, "the row has rated completions but no prompt"),
        ({"prompt": "Q", "completions": ["a"], "scores": [1]}, "at least two completions"),
        ({"prompt": "Q", "completions": ["a", "b"], "scores": [1, None]}, "'completions scores' must be a number"),
        ({"prompt": "Q", "completions": ["a", "b"], "scores": [1, math.nan]}, "'completions scores' is nan"),
        ({"prompt": "Q", "completions": ["a", "b"], "scores": [1, math.inf]}, "'completions scores' is inf"),
        ({"prompt": "Q", "completions": ["a", "b"], "scores": [1, 1e39]}, "'completions scores' is 1e+39"),
        ({"prompt": "Q", "completion": "a", "label": None}, "'label': found null 'None', expected true or false"),
        ({"prompt": "Q", "completion": "a", "label": "meh"}, "`labels=GOOD,BAD` says which words"),
        ({"prompt": "Q", "label": True}, "the row has a label but no completion"),
        ({"completion": "a", "label": True}, "the row has a label but no prompt"),
        ({"prompt_ids": [1], "completion_ids": [2]}, "the row has one completion and no label"),
        ({"prompt": "Q", "completions": ["a", "b"], "scores": [1]}, "needs a list of as many scores"),
        ({"prompt": "Q", "completions": [{"x": 1}, {"x": 2}]}, "completions[0] has x; expected a text"),
        ({"prompt": "Q", "good": "A", "bad": "B"}, "`columns=chosen=NAME` says which column it is"),
    ],
)
def test_rows_that_cannot_be_used(row: Row, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        read_row(row, "f:1", pair_ratings="all")
    assert str(caught.value).startswith("f:1: ")
    assert expected in str(caught.value)


SYSTEM = [
    {"system": "S", "prompt": "Q", "chosen": "A", "rejected": "B"},
    {
        "system_prompt": "S",
        "chosen": dialogue([*turns("Q"), said("assistant", "A")]),
        "rejected": dialogue([*turns("Q"), said("assistant", "B")]),
    },
    {"system": "S", **whole("Q", "A", "B")},
    {"system": "S", "prompt": "Q", **whole("Q", "A", "B")},
    {"system": "S", **whole("Q", "A", "B", system="S")},
    {"system": "S", "system_prompt": " S ", "prompt": turns("Q", system="S"), "chosen": "A", "rejected": "B"},
    {"system": [said("system", "S")], "conversations": sharegpt(turns("Q")), "chosen": "A", "rejected": "B"},
    {"system": "S", "messages": turns("Q"), "chosen": "A", "rejected": "B"},
    {"system": "S", "instruction": "Q", "input": "", "chosen": "A", "rejected": "B"},
    {"system": "S", "question": "Q", "chosen": "A", "rejected": "B"},
    {"system": "S", "prompt": "Q", "completions": ["A", "B"], "scores": [2, 1]},
    {"system": "S", "input": {"messages": turns("Q")}, "preferred_output": "A", "non_preferred_output": "B"},
    {"system": "S", "messages": [*turns("Q"), said("assistant", "A")], "rejected_response": "B"},
]


@pytest.mark.parametrize("row", SYSTEM, ids=lambda row: "+".join(row))
def test_a_system_text_is_one_turn_in_every_shape(row: Row) -> None:
    (pair,) = read_row(row, "f:1", pair_ratings="best_worst").pairs
    assert as_conversation(pair) == (
        (said("system", "S"), said("user", "Q")),
        (said("assistant", "A"),),
        (said("assistant", "B"),),
    )


def test_two_system_texts_are_refused() -> None:
    for row in (
        {"system": "S", **messages("Q", "A", "B", system="other")},
        {"system": "S", "system_prompt": "T", **strings("Q", "A", "B")},
    ):
        with pytest.raises(DataError, match=r"f:1: .* are different system texts, expected one"):
            read_row(row, "f:1")


@pytest.mark.parametrize(("name", "form"), [("messages", list), ("conversations", sharegpt)])
def test_a_label_is_about_the_turn_that_ends_a_conversation(name: str, form: Callable[..., Any]) -> None:
    asked = turns("Q", history=True, system="S")
    ((group,), shape) = read_row({name: form([*asked, said("assistant", "A")]), "label": False}, "f:1")[1::-1]
    assert shape == "labelled completion"
    assert isinstance(group, Group)
    assert (group.prompt, group.completions, group.scores, group.labelled) == (
        tuple(asked),
        ((said("assistant", "A"),),),
        (0.0,),
        True,
    )
    for wrong in (asked, [said("assistant", "A")]):
        with pytest.raises(DataError, match="f:1: the row has a label but no completion"):
            read_row({name: form(wrong), "label": True}, "f:1")


def test_columns_that_a_row_has_no_use_for_are_noted() -> None:
    assert read_row({**strings("Q", "A", "B"), "question": "R", "history": [["a", "b"]]}, "f:1").notes == (
        "without their history and question, which the rest of the row has no use for",
    )
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    assert "system" in read_row({**ids, "system": "S"}, "f:1").notes[0]
    assert read_row({**ids, "system": "", "tools": None}, "f:1").notes == ()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q", "completion": "A"}, "the row is one answer to imitate"),
        ({"messages": turns("Q")}, "the row is one conversation to imitate"),
        ({"text": "Q"}, "the row is one text"),
        (
            {"instruction": "Q", "output": ["A", "B"]},
            "'output' is a list of 2, and nothing says which of",
        ),
        ({"question": "Q", "answer": [turns("Q"), turns("Q")]}, "'answer' is a list of 2, and nothing says"),
        ({**strings("Q", "A", "B"), "images": ["x.png"]}, "the row has 'images'; only text"),
        ({"prompt": None, "chosen": "The A", "rejected": "The B"}, "'prompt' is a JSON null"),
    ],
)
def test_rows_that_are_no_pairs_are_called_what_they_are(row: Row, expected: str) -> None:
    with pytest.raises(DataError, match=f"f:1: {expected}"):
        read_row(row, "f:1")
    assert read_row({**strings("Q", "A", "B"), "images": []}, "f:1").pairs


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Eine 👩\u200d🚀 natürlich.", "Eine 👩\u200d🔬 vielleicht.", "Eine"),
        ("Red? 🇩🇰 it is.", "Red? 🇩🇪 it is.", "Red?"),
        ("Hi 👍🏽 you", "Hi 👍🏿 you", "Hi"),
        ("वह घर कि ओर गया।", "वह घर की छत पर गया।", "वह घर"),
        ("Say it: cafe\u0301 noir", "Say it: cafe latte", "Say it:"),
        ("He can't swim.", "He can walk.", "He"),
        ("Pi is about 3.14", "Pi is about 3.2", "Pi is about"),
        ("call my_value()", "call my_vault()", "call"),
        ("see https://a.b/c?d=1", "see https://a.b/c?d=2", "see"),
        ("a well-known man", "a well-made car", "a"),
        ("costs $46", "costs $47", "costs"),
        ("你好吗？我很好。", "你好吗？我不好。", "你好吗？"),
        ("a \u0301b", "a c", "a"),
    ],
)
def test_an_implicit_prompt_ends_between_words(chosen: str, rejected: str, prompt: str) -> None:
    (pair,) = read_row({"chosen": chosen, "rejected": rejected}, "f:1").pairs
    assert isinstance(pair, Pair)
    assert (pair.prompt, pair.chosen) == (prompt, chosen[len(prompt) :])
