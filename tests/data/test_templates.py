"""Kinds of chat templates: what is trained is what follows where any answer begins, and what is lost is counted."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer

from orpo_mlx.data.shapes.formats import read_row
from orpo_mlx.data.tokens.chat_template import (
    CALL_LEFT_OUT,
    CALLS_LEFT_OUT,
    DEVELOPER_RENAMED,
    PROMPT_WORDS_LEFT_OUT,
    SYSTEM_FOLDED,
    THOUGHT_LEFT_OUT,
    TOOLS_LEFT_OUT,
    WORDS_LEFT_OUT,
)
from orpo_mlx.data.tokens.tokenization import PairTokenizer
from orpo_mlx.data.tokens.trained_turns import read_ids
from orpo_mlx.errors import DataError
from orpo_mlx.types import Message, Pair
from tests.conftest import write_model_folder

ASK = "{% if add_generation_prompt %}<|start|>assistant\n<think>\n{% endif %}"
WORDS = "{{ m.content.split('</think>')[-1].lstrip() }}"
EACH = "{% for m in messages %}<|start|>{{ m.role }}\n"
END = "<|end|>\n{% endfor %}"
CALLS = "{% for c in m.tool_calls %}<tool>{{ c.function.name }}{{ c.function.arguments | tojson }}</tool>{% endfor %}"
LAST = "{% set ns = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.user = loop.index0 %}{% endif %}{% endfor %}"  # noqa: E501


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def says(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def thinks(thought: str, content: str) -> Message:
    return says(f"<think>\n{thought}\n</think>\n\n{content}")


CALL = {"type": "function", "function": {"name": "lookup", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "lookup", "parameters": {"type": "object", "properties": {}}}}


class Reading:
    """The texts of a pair, and what is told of it."""

    def __init__(self, tokenizer: Any, pair: Pair) -> None:
        to_ids = PairTokenizer(tokenizer)
        self.prompt, self.chosen, self.rejected = (tokenizer.decode(read_ids(ids)) for ids in to_ids(pair)[:3])
        self.notes = to_ids.notes.get(pair.location, ())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_model_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture
def read(tokenizer: Any) -> Callable[..., Reading]:
    def reading(template: str, prompt: Any, chosen: Any, rejected: Any, **more: Any) -> Reading:
        tokenizer._tokenizer.chat_template = template
        return Reading(tokenizer, Pair(prompt, chosen, rejected, "f:1", **more))

    return reading


# A header that is written only where an answer is asked for -----------------------------------------------------------

THOUGHTS_STRIPPED = EACH + WORDS + END + ASK
"""As DeepSeek's R1: the beginning of a thought where one is asked for, no thought in any answer."""

EMPTY_THOUGHTS = (
    EACH
    + "{% if m.role == 'assistant' and '</think>' not in m.content %}<think></think>{% endif %}{{ m.content }}"
    + END
    + "{% if add_generation_prompt %}<|start|>assistant\n<think>\n{% endif %}"
)
"""As Nemotron's: an empty thought in answers that have none."""

LAST_THOUGHTS = (
    LAST + EACH + "{% if loop.index0 > ns.user %}{{ m.content }}{% else %}" + WORDS + "{% endif %}" + END + ASK
)
"""As Qwen3's: thoughts stay after the last question only."""

CUT = "whose prompt ends before {}, which the chat template writes only where an answer is asked for"


def test_a_thought_that_is_begun_only_where_asked_for_is_not_the_prompts(read: Callable[..., Reading]) -> None:
    pair = read(THOUGHTS_STRIPPED, "Hi", "Yes", "No")
    assert pair.prompt == "<|start|>user\nHi<|end|>\n<|start|>assistant\n"
    assert (pair.chosen, pair.rejected) == ("Yes<|end|>\n", "No<|end|>\n")
    assert pair.notes == (CUT.format("<think>↵"),)


@pytest.mark.parametrize("content", ["hi", "think", "assistant", "t"])
def test_a_question_that_stands_in_the_header_by_chance(read: Callable[..., Reading], content: str) -> None:
    pair = read(THOUGHTS_STRIPPED, content, "Yes", "No")
    assert pair.prompt == f"<|start|>user\n{content}<|end|>\n<|start|>assistant\n"
    assert pair.notes == (CUT.format("<think>↵"),)


def test_what_answers_share_with_the_header_by_chance_is_theirs(read: Callable[..., Reading]) -> None:
    # Both begin as <think> does.
    pair = read(THOUGHTS_STRIPPED, "Hi", "<tool>a</tool>", "<table>")
    assert pair.prompt.endswith("assistant\n")
    assert (pair.chosen, pair.rejected) == ("<tool>a</tool><|end|>\n", "<table><|end|>\n")
    words = (
        EACH.replace("<|start|>", "") + "{{ m.content }}" + END + "{% if add_generation_prompt %}Answer: {% endif %}"
    )
    pair = read(words, "Hi", "Anna", "Andy")
    assert pair.prompt == "user\nHi<|end|>\n"
    assert pair.chosen == "assistant\nAnna<|end|>\n"


def test_an_empty_thought_is_cut_where_the_two_part(read: Callable[..., Reading]) -> None:
    pair = read(EMPTY_THOUGHTS, "Hi", [thinks("so", "Yes")], [says("No")])
    assert pair.prompt == "<|start|>user\nHi<|end|>\n<|start|>assistant\n<think>"
    assert (pair.chosen, pair.rejected) == ("\nso\n</think>\n\nYes<|end|>\n", "</think>No<|end|>\n")


def test_thoughts_that_a_later_turn_strips_are_counted(read: Callable[..., Reading]) -> None:
    chosen = [thinks("one", "Yes"), user("And?"), thinks("two", "Yes!")]
    pair = read(LAST_THOUGHTS, "Hi", chosen, [says("No")])
    assert pair.prompt.endswith("<|start|>assistant\n")
    assert pair.chosen.startswith("Yes<|end|>\n<|start|>user\nAnd?")
    assert pair.chosen.endswith("<think>\ntwo\n</think>\n\nYes!<|end|>\n")
    assert pair.notes == (CUT.format("<think>↵"), THOUGHT_LEFT_OUT)
    pair = read(LAST_THOUGHTS, "Hi", [thinks("one", "Yes")], [thinks("two", "No")])
    assert pair.prompt.endswith("<|start|>assistant\n<think>\n")
    assert pair.notes == ()


def test_a_history_that_one_side_rewrites_is_refused(read: Callable[..., Reading]) -> None:
    # The chosen side's later question strips the thought in the prompt, the rejected side has none: two prompts.
    prompt = [user("Hi"), thinks("one", "Let me look."), {"role": "tool", "content": "14"}]
    chosen = [says("Yes"), user("And?"), says("Yes!")]
    with pytest.raises(DataError, match="f:1: the chat template renders the prompt differently once the answer"):
        read(LAST_THOUGHTS, prompt, chosen, [says("No")])


@pytest.mark.parametrize("template", [THOUGHTS_STRIPPED, EMPTY_THOUGHTS, LAST_THOUGHTS], ids=["R1", "Nemotron", "Qwen"])
def test_nothing_of_the_prompt_is_trained_and_nothing_of_the_answers_lost(
    read: Callable[..., Reading], template: str
) -> None:
    prompts: list[Any] = [
        "Hi",
        [user("Hi"), thinks("old", "Hello"), user("Who?")],
        [{"role": "system", "content": "S"}, user("Q")],
    ]
    answers = [[says("Yes")], [thinks("why", "Sure")], [says("<b>bold</b>")], [says("One"), user("more"), says("Two")]]
    for prompt, chosen, rejected in itertools.product(prompts, answers, answers):
        if chosen == rejected:
            continue
        pair = read(template, tuple(prompt) if isinstance(prompt, list) else prompt, tuple(chosen), tuple(rejected))
        last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        assert last in pair.prompt
        for side, text in ((chosen, pair.chosen), (rejected, pair.rejected)):
            for turn in side:
                assert turn["content"].rpartition("</think>")[2].strip() in text
            assert text.endswith("<|end|>\n")
            # The rendered row, whole.
        assert pair.prompt.count("<|start|>") == (2 if isinstance(prompt, str) else len(prompt) + 1)


# Marks, headers, parts ------------------------------------------------------------------------------------------------


def test_an_end_that_only_the_last_turn_has(read: Callable[..., Reading]) -> None:
    end = "{% if loop.last and not add_generation_prompt %}<|end|>{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
    template = EACH + "{{ m.content }}" + end + ASK.replace("<think>\n", "")
    pair = read(template, "Hi", "Yes", [says("No"), user("Why?"), says("So")])
    assert pair.chosen == "Yes<|end|>"
    assert pair.rejected == "No\n<|start|>user\nWhy?\n<|start|>assistant\nSo<|end|>"


def test_contents_in_parts_where_the_template_wants_them(read: Callable[..., Reading]) -> None:
    # As SmolVLM's, which shows nothing of a plain string.
    parts = "{% for m in messages %}{{ m.role | capitalize }}:{% for part in m.content %}{% if part.type == 'text' %} {{ part.text }}{% endif %}{% endfor %}"  # noqa: E501
    template = parts + END + "{% if add_generation_prompt %}Assistant:{% endif %}"
    pair = read(template, [{"role": "system", "content": "S"}, user("Hi")], "Yes", "No")
    assert pair.prompt == "System: S<|end|>\nUser: Hi<|end|>\nAssistant:"
    assert (pair.chosen, pair.rejected) == (" Yes<|end|>\n", " No<|end|>\n")


def test_a_template_that_leaves_out_answers_is_named(read: Callable[..., Reading]) -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match="f:1: the chat template leaves out the assistant's text"):
        read(template, "Hi", "Yes", "No")
    cut = EACH + "{{ m.content[:3] }}" + END
    assert read(cut, "Hi", "Yes, sir", "No").notes == (WORDS_LEFT_OUT,)


# Turns that a template does not know ----------------------------------------------------------------------------------

KNOWN = (
    "{{% for m in messages %}}{{% if m.role in {roles} %}}<|start|>{{{{ m.role }}}}\n{{{{ m.content }}}}<|end|>\n"
    "{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}<|start|>assistant\n{{% endif %}}"
)
DEVELOPER = {"role": "developer", "content": "Be brief."}
SYSTEM = {"role": "system", "content": "In German."}


def test_a_developers_text_is_not_lost(read: Callable[..., Reading]) -> None:
    pair = read(KNOWN.format(roles="['developer', 'user', 'assistant']"), [DEVELOPER, user("Hi")], "Yes", "No")
    assert pair.prompt.startswith("<|start|>developer\nBe brief.<|end|>")
    assert pair.notes == ()
    pair = read(KNOWN.format(roles="['system', 'user', 'assistant']"), [DEVELOPER, user("Hi")], "Yes", "No")
    assert pair.prompt.startswith("<|start|>system\nBe brief.<|end|>\n<|start|>user\nHi<|end|>")
    assert pair.notes == (DEVELOPER_RENAMED,)
    pair = read(KNOWN.format(roles="['user', 'assistant']"), [SYSTEM, DEVELOPER, user("Hi")], "Yes", "No")
    assert pair.prompt.startswith("<|start|>user\nIn German.\n\nBe brief.\n\nHi<|end|>")
    assert pair.notes == (DEVELOPER_RENAMED, SYSTEM_FOLDED)


def test_turns_of_the_prompt_that_are_left_out_are_counted(read: Callable[..., Reading]) -> None:
    known = KNOWN.format(roles="['system', 'user', 'assistant']").replace(
        "m.role in", "(m.role != 'system' or loop.first) and m.role in"
    )
    assert read(known, [user("Hi"), thinks("so", "Hello"), user("Bye")], "Yes", "No").notes == ()
    for turn in (SYSTEM, {"role": "tool", "content": "14"}):
        found = read(known, [user("Hi"), says("Hello"), turn, user("Bye")], "Yes", "No")
        assert found.notes == (PROMPT_WORDS_LEFT_OUT,)
    # As JSON, a tool's result is all there.
    results = EACH + "{{ m.content | tojson if m.role == 'tool' else m.content }}" + END
    asked = [user("Hi"), says("", tool_calls=[CALL]), {"role": "tool", "content": 'a "b"\n\u00e9'}]
    assert PROMPT_WORDS_LEFT_OUT not in read(results, asked, "Yes", "No").notes


def test_a_system_text_that_is_shown_only_where_an_answer_is_asked_for(read: Callable[..., Reading]) -> None:
    # As Mistral's of the third version, which writes it before the last question where nothing follows that.
    template = (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
        "{% endif %}{% for m in messages %}{% if m.role == 'user' %}[I]{% if system and loop.last %}{{ system }}\n\n"
        "{% endif %}{{ m.content }}[/I]{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    )
    pair = read(template, [SYSTEM, user("Hi")], "Yes", "No")
    assert (pair.prompt, pair.chosen) == ("[I]In German.\n\nHi[/I]", "Yes<|end|>")
    assert pair.notes == (SYSTEM_FOLDED,)


# Strings --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"system": "S"}])
def test_an_answer_divided_from_its_prompt_does_not_begin_with_the_space_between(
    tokenizer: Any, more: dict[str, str]
) -> None:
    tokenizer._tokenizer.chat_template = EACH + "{{ m.content }}" + END + ASK.replace("<think>\n", "")
    (pair,) = read_row({"chosen": "Name a fruit. Apple", "rejected": "Name a fruit. Stone", **more}, "f:1").pairs
    assert isinstance(pair, Pair)
    found = Reading(tokenizer, pair)
    assert found.prompt.endswith("user\nName a fruit.<|end|>\n<|start|>assistant\n")
    assert (found.chosen, found.rejected, found.notes) == ("Apple<|end|>\n", "Stone<|end|>\n", ())
    # A space of the row's own stays.
    assert Reading(tokenizer, pair._replace(divided_text=False)).chosen == " Apple<|end|>\n"
    if not more:
        ids = PairTokenizer(tokenizer, template_strings=False)(pair)
        assert tokenizer.decode([*ids.prompt_ids, *ids.completions[0]]) == "Name a fruit. Apple<|end|>"


# Tools ----------------------------------------------------------------------------------------------------------------


def test_tool_turns(read: Callable[..., Reading]) -> None:
    tools = "{% if tools %}{{ tools | tojson }}{% endif %}"
    template = tools + EACH + "{{ m.content }}" + CALLS + END + ASK.replace("<think>\n", "")
    chosen = [says("", tool_calls=[CALL]), {"role": "tool", "content": "14"}, says("14 of them.")]
    pair = read(template, [user("How many?")], chosen, [says("Many.")], tools=(TOOL,))
    call = '<tool>lookup{"x": 1}</tool>'
    assert pair.chosen == f"{call}<|end|>\n<|start|>tool\n14<|end|>\n<|start|>assistant\n14 of them.<|end|>\n"
    assert pair.notes == ()


def test_arguments_are_text_where_the_template_joins_them_to_text(read: Callable[..., Reading]) -> None:
    joined = CALLS.replace("{{ c.function.arguments | tojson }}", "{{ '```' + c.function.arguments }}")
    pair = read(EACH + "{{ m.content }}" + joined + END, [user("Q")], [says("", tool_calls=[CALL])], [says("No")])
    assert '<tool>lookup```{"x": 1}</tool>' in pair.chosen


def test_tools_that_the_template_does_not_write_are_counted(read: Callable[..., Reading]) -> None:
    plain = EACH + "{{ m.content }}" + END
    earlier = [user("Q"), says("Wait.", tool_calls=[CALL]), {"role": "tool", "content": "14"}]
    assert read(plain, earlier, "Yes", "No", tools=(TOOL,)).notes == (TOOLS_LEFT_OUT, CALLS_LEFT_OUT)
    assert read(plain, [user("Q")], [says("Yes", tool_calls=[CALL])], [says("No")]).notes == (CALL_LEFT_OUT,)
    with pytest.raises(DataError, match="f:1: the chat template leaves out the tool call that is the answer"):
        read(plain, [user("Q")], [says("", tool_calls=[CALL])], [says("No")])


def test_strings_stay_as_they_are_where_that_is_asked_for(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer._tokenizer.chat_template = EACH + "{{ m.content }}" + END
    to_ids = PairTokenizer(tokenizer, template_strings=False)
    strings = Pair("Hi ", "Yes", "No", "f:1")
    conversation = Pair((user("Hi"),), (says("Yes"),), (says("No"),), "f:2")
    first, second = to_ids.each([strings, conversation])
    assert [tokenizer.decode(list(ids)) for ids in first[:3]] == ["Hi ", "Yes<|end|>", "No<|end|>"]
    assert tokenizer.decode(list(second.prompt_ids)) == "<|start|>user\nHi<|end|>\n"
    assert to_ids.prompt_ids(strings) == first.prompt_ids
