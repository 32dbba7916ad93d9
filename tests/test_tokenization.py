"""Which ids are prompt and which completion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer

from orpo_mlx.errors import DataError
from orpo_mlx.tokenization import PairTokenizer, tokenize_pairs
from orpo_mlx.types import Pair, TokenizedPair
from tests.conftest import CHAT_TEMPLATE, write_model_folder

END = 258


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    return load_tokenizer(model_folder)


def with_template(tmp_path: Path, template: str) -> Any:
    return load_tokenizer(write_model_folder(tmp_path / "model", template=template))


def test_prompt_and_completion_of_a_chat(tokenizer: Any) -> None:
    pair = PairTokenizer(tokenizer)(Pair("Hi", "Yes", "No", "f:1"))
    assert tokenizer.decode(list(pair.prompt_ids)) == "<|start|>user\nHi<|end|>\n<|start|>assistant\n"
    assert tokenizer.decode(list(pair.chosen_ids)) == "Yes<|end|>\n"
    assert tokenizer.decode(list(pair.rejected_ids)) == "No<|end|>\n"


def test_strings_and_messages_are_the_same_conversation(tokenizer: Any) -> None:
    messages = Pair(
        ({"role": "user", "content": "Hi"},),
        ({"role": "assistant", "content": "Yes"},),
        ({"role": "assistant", "content": "No"},),
        "f:1",
    )
    to_ids = PairTokenizer(tokenizer)
    assert to_ids(messages) == to_ids(Pair("Hi", "Yes", "No", "f:1"))


def test_eos_is_appended_once_where_the_template_writes_none(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
                              "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    pair = PairTokenizer(tokenizer)(Pair("Hi", "Yes", "No", "f:1"))
    assert pair.chosen_ids.count(END) == 1
    assert pair.chosen_ids[-1] == END


def test_eos_in_the_middle_does_not_count(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, CHAT_TEMPLATE.replace("<|end|>\n", "\n"))
    pair = PairTokenizer(tokenizer)(Pair("Hi", "a<|end|>b", "No", "f:1"))
    assert pair.chosen_ids.count(END) == 2
    assert pair.chosen_ids[-1] == END


def test_without_a_template_strings_are_joined(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "")
    tokenizer._tokenizer.chat_template = None
    tokenizer.has_chat_template = False
    pair = PairTokenizer(tokenizer)(Pair("Hi ", "Yes", "No", "f:1"))
    assert tokenizer.decode(list(pair.prompt_ids)) == "Hi "
    assert tokenizer.decode(list(pair.chosen_ids)) == "Yes<|end|>"
    with pytest.raises(DataError, match="f:2: the row is a conversation but"):
        PairTokenizer(tokenizer)(Pair(({"role": "user", "content": "Hi"},), "Yes", "No", "f:2"))


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{{ messages | length }}" + CHAT_TEMPLATE)
    with pytest.raises(DataError, match="f:7: the chat template renders the prompt differently"):
        PairTokenizer(tokenizer)(Pair("Hi", "Yes", "No", "f:7"))


def test_a_template_that_raises_is_named(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{{ raise_exception('system role not supported') }}")
    with pytest.raises(
        DataError, match=r"f:3: the chat template refused the turns \(user\): system role not supported"
    ):
        PairTokenizer(tokenizer)(Pair("Hi", "Yes", "No", "f:3"))


def test_text_without_a_tokenizer_is_refused_and_ids_pass() -> None:
    ids = TokenizedPair((1,), (2,), (3,), "f:1")
    assert PairTokenizer(None)(ids) is ids
    with pytest.raises(DataError, match="f:9: the row is text but the model has no tokenizer"):
        PairTokenizer(None)(Pair("Hi", "Yes", "No", "f:9"))


def test_what_is_left_out_is_counted_and_the_limit_is_inclusive() -> None:
    fits = TokenizedPair((1, 2), (3,), (4, 5))
    long_prompt = TokenizedPair((1, 2, 3), (3,), (4, 5))
    long_rejected = TokenizedPair((1, 2), (3,), (4, 5, 6))
    equal = TokenizedPair((1,), (3,), (3,))
    kept, dropped = tokenize_pairs([fits, long_prompt, long_rejected, equal], None, max_seq_length=4)
    assert kept == [fits]
    assert dropped == {"longer than --max-seq-length 4": 2, "chosen and rejected are the same tokens": 1}
