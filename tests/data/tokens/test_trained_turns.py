"""Of completions of several turns the assistant's are learned, whatever the template makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer

from orpo_mlx.data.tokens.tokenization import PairTokenizer
from orpo_mlx.data.tokens.trained_turns import learned_ids, learned_places, read_ids
from orpo_mlx.data.tokens.truncation import fit
from orpo_mlx.errors import DataError
from orpo_mlx.types import Message, Pair
from tests.conftest import CHAT_TEMPLATE, write_model_folder, write_rows
from tests.helpers.quiet_training import make_run, run_quietly

HEAD = "{% for message in messages %}"
TAIL = "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    # No header before an answer, none for generation.
    "inst": HEAD + "{% if message.role == 'assistant' %} {{ message.content }}<|end|>{% else %}"
    "[INST] {{ message.content }} [/INST]{% endif %}{% endfor %}",
    # White space before EOS; roles under other names.
    "gemma": HEAD + "<|start|>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}\n<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>model\n{% endif %}",
    # Thinks before its last answer, and no longer shows it once there is another turn.
    "thinking": HEAD + "<|start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ message.content.split('</think>')[-1] }}"
    "{% else %}{{ message.content }}{% endif %}<|end|>\n" + TAIL,
    "calls": HEAD + "<|start|>{{ message.role }}\n{{ message.content }}{% for call in message.tool_calls or [] %}"
    "<call>{{ call.function.name }}</call>{% endfor %}<|end|>\n" + TAIL,
    # More than EOS behind an answer, and something else behind a call.
    "closed": HEAD + "<|start|>{{ message.role }}\n{% if message.role != 'assistant' %}{{ message.content }}"
    "{% elif message.tool_calls %}<call>{{ message.tool_calls[0].function.name }}</call></act>"
    "{% else %}{{ message.content }}</said>{% endif %}<|end|>\n" + TAIL,
}
# A tool's result behind a call alone.
STRICT = (
    "{% for m in messages %}{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
    "{{ raise_exception('a result without a call') }}{% endif %}{% endfor %}"
)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
CALL_AND_ANSWER = (CALL, {"role": "tool", "content": "42"}, {"role": "assistant", "content": "It is 42."})


def tokenizer_of(folder: Path, template: str) -> Any:
    return load_tokenizer(write_model_folder(folder, template=template))


def turns(*contents: str, first: str = "assistant") -> tuple[Message, ...]:
    roles = ("assistant", "user") if first == "assistant" else ("user", "assistant")
    return tuple({"role": roles[number % 2], "content": content} for number, content in enumerate(contents))


def learned_text(tokenizer: Any, ids: tuple[int, ...]) -> list[str]:
    """The learned stretches of a completion."""
    places = learned_places(ids).tolist()
    runs: list[list[int]] = []
    for place in places:
        if runs and place - 1 in places:
            runs[-1].append(ids[place])
        else:
            runs.append([ids[place]])
    return [tokenizer.decode(run) for run in runs]


ASK = turns("Zq who?", first="user")
# Answers that begin and end like the texts put in their place, like each other, and like nothing.
THREE = turns("Zq1", "and Zq1?", "Zébra 1", "Z?", "Zq1 Zq1")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["Zq1<|end|>", "Zébra 1<|end|>", "Zq1 Zq1<|end|>\n"]),
        ("inst", [" Zq1<|end|>", " Zébra 1<|end|>", " Zq1 Zq1<|end|>"]),
        ("gemma", ["Zq1\n<|end|>", "Zébra 1\n<|end|>", "Zq1 Zq1\n<|end|>\n"]),
        ("thinking", ["Zq1<|end|>", "Zébra 1<|end|>", "<think>\n\n</think>\n\nZq1 Zq1<|end|>\n"]),
        ("calls", ["Zq1<|end|>", "Zébra 1<|end|>", "Zq1 Zq1<|end|>\n"]),
        ("closed", ["Zq1</said><|end|>", "Zébra 1</said><|end|>", "Zq1 Zq1</said><|end|>\n"]),
    ],
)
def test_the_assistants_turns_are_learned(tmp_path: Path, name: str, expected: list[str]) -> None:
    tokenizer = tokenizer_of(tmp_path, TEMPLATES[name])
    pair = Pair(ASK, THREE, turns("No"), "f:1")
    whole = PairTokenizer(tokenizer, "all")(pair)
    for which, stretches in (("assistant", expected), ("last", expected[-1:])):
        found = PairTokenizer(tokenizer, which)(pair)
        assert learned_text(tokenizer, found.completions[0]) == stretches
        assert tuple(read_ids(found.completions[0])) == whole.completions[0]
        # An answer of one turn is learned as ever.
        assert found.completions[1] == whole.completions[1]
    assert learned_ids(whole.completions[0]) == list(whole.completions[0])


def test_a_call_is_the_assistants_and_its_result_is_not(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, TEMPLATES["calls"])
    found = PairTokenizer(tokenizer)(Pair(ASK, CALL_AND_ANSWER, turns("No"), "f:1"))
    assert learned_text(tokenizer, found.completions[0]) == ["<call>f</call><|end|>", "It is 42.<|end|>\n"]
    only = (*turns("Yes", "Bye"), {"role": "user", "content": "Still there?"})
    found = PairTokenizer(tokenizer, "last")(Pair(ASK, only, turns("No"), "f:1"))
    assert learned_text(tokenizer, found.completions[0]) == ["Yes<|end|>"]
    tools = ({"role": "tool", "content": "1"}, {"role": "tool", "content": "2"})
    with pytest.raises(DataError, match=r"f:1: a completion has no turn of the assistant.*`train_on=all`"):
        PairTokenizer(tokenizer_of(tmp_path / "inst", TEMPLATES["inst"]))(Pair(ASK, tools, turns("No"), "f:1"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("calls", ["<call>f</call><|end|>", "It is 42.<|end|>\n"]),
        ("closed", ["<call>f</call></act><|end|>", "It is 42.</said><|end|>\n"]),
    ],
)
@pytest.mark.parametrize("strict", [STRICT, ""], ids=["strict", "lenient"])
def test_a_call_whose_place_no_other_turn_can_take(tmp_path: Path, strict: str, name: str, expected: list[str]) -> None:
    tokenizer = tokenizer_of(tmp_path, strict + TEMPLATES[name])
    found = PairTokenizer(tokenizer)(Pair(ASK, CALL_AND_ANSWER, turns("No"), "f:1"))
    assert learned_text(tokenizer, found.completions[0]) == expected


def test_a_call_that_is_not_to_be_found_is_refused(tmp_path: Path) -> None:
    # Written otherwise once its result follows.
    changed = TEMPLATES["calls"].replace("<call>", "<call>{{ messages | length }}")
    tokenizer = tokenizer_of(tmp_path, STRICT + changed)
    with pytest.raises(DataError, match=r"f:1: the chat template refused the turns .*: a result without a call"):
        PairTokenizer(tokenizer)(Pair(ASK, CALL_AND_ANSWER, turns("No"), "f:1"))


def test_transformers_own_mask_agrees(tmp_path: Path) -> None:
    """Of a template that says itself, for transformers, what is generated."""
    template = (
        HEAD + "<|start|>{{ message.role }}\n{% if message.role == 'assistant' %}{% generation %}"
        "{{ message.content }}<|end|>{% endgeneration %}\n{% else %}{{ message.content }}<|end|>\n{% endif %}" + TAIL
    )
    tokenizer = tokenizer_of(tmp_path, template)
    side = turns("Hé 1!", "What?", "So: 2\n3", "?", "Wv Yx 4")
    found = PairTokenizer(tokenizer)(Pair(ASK, side, turns("No"), "f:1"))
    encoded = tokenizer._tokenizer.apply_chat_template(
        [*map(dict, ASK), *map(dict, side)], return_assistant_tokens_mask=True, return_dict=True
    )
    skip = len(found.prompt_ids)
    assert encoded["input_ids"][skip:] == read_ids(found.completions[0])
    learned = [int(token >= 0) for token in found.completions[0]]
    # The line's end behind the last EOS is learned here, as of an answer of one turn.
    assert learned == [*encoded["assistant_masks"][skip:-1], 1]


def test_a_cut_that_leaves_nothing_to_learn(tmp_path: Path) -> None:
    found = PairTokenizer(tokenizer_of(tmp_path, CHAT_TEMPLATE), "last")(Pair(ASK, THREE, turns("No"), "f:1"))
    assert fit(found, len(found.prompt_ids) + 4, "keep_start").reason == "no_completion_left"


def test_a_run_says_what_it_trains_on(settings: dict[str, Any], data: Path, model_folder: Path) -> None:
    chat = [{"prompt": list(ASK), "chosen": list(THREE), "rejected": list(turns(f"No {n}"))} for n in range(4)]
    write_rows(data / "train.jsonl", chat)
    tokens = {}
    for which in ("assistant", "last", "all"):
        run = make_run(settings, train_on=which)
        notes = dict(run.splits["train"].report.notes)
        assert len(notes) == (which != "all")
        assert all(f"`train_on={which}`" in note for note in notes)
        tokens[which] = len(learned_ids(run.splits["train"].pairs[0].completions[0]))
    assert tokens["last"] < tokens["assistant"] < tokens["all"]
    run_quietly({**settings, "method": "dpo"})
