"""Rows of one completion: what supervised fine-tuning learns from, in the shapes of mlx_lm.lora, TRL and Alpaca."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tuner.datasets import TextDataset
from mlx_lm.utils import load_tokenizer
from tokenizers import processors

from orpo_mlx.cli.train import main
from orpo_mlx.data.groups import usable_group
from orpo_mlx.data.shapes.formats import read_row
from orpo_mlx.data.tokens.tokenization import PairTokenizer
from orpo_mlx.errors import DataError
from orpo_mlx.losses.metrics import METRICS, OF_ONE_SIDE
from orpo_mlx.types import Group
from tests.conftest import write_rows
from tests.helpers.kill_and_resume import adapters, records
from tests.helpers.quiet_training import flags, run_quietly

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
BEFORE, ANSWERED = {"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "q", "completion": "a"}, "q", "a"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, (USER,), (ASSISTANT,)),
        ({"prompt": "q", "completion": "a", "system": "s"}, (SYSTEM, USER), (ASSISTANT,)),
        ({"instruction": "q", "input": "i", "output": "a"}, "q\ni", "a"),
        ({"instruction": "q", "input": "", "output": "a"}, "q", "a"),
        ({"instruction": "q", "history": [["p", "b"]], "output": "a"}, (BEFORE, ANSWERED, USER), (ASSISTANT,)),
        ({"question": "q", "answer": "a", "id": 3}, "q", "a"),
        ({"messages": [USER, ASSISTANT]}, (USER,), (ASSISTANT,)),
        ({"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]}, (SYSTEM, USER), (ASSISTANT, USER, ASSISTANT)),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, (USER,), (ASSISTANT,)),
    ],
)
def test_a_row_of_one_completion(row: dict[str, Any], prompt: Any, completion: Any) -> None:
    (group,) = read_row(row, "f:1", one_sided=True).pairs
    assert isinstance(group, Group)
    assert (group.prompt, group.completions, group.scores, group.pairs) == (prompt, (completion,), (1.0,), ((0, 0),))
    with pytest.raises(DataError, match="`method=sft` learns from single answers"):
        read_row(row, "f:1")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER]}, "'messages' ends with a turn of the user, expected the assistant's"),
        ({"messages": [ASSISTANT]}, "'messages' begins with an answer"),
        ({"prompt": "q", "completion": [USER]}, "'completion' begins with a turn of the user"),
        ({"prompt": [USER, ASSISTANT], "completion": "a"}, "the prompt ends with a turn of the assistant"),
        # A column under another name is not passed over.
        ({"prompt": "q", "completion": "a", "rejected": "b"}, "the row has no 'chosen'"),
        ({"text": 3}, "'text'"),
        ({"text": "q a", "rejected": "b"}, "the row has no 'chosen'"),
        ({"text": "q a", "prompt": "q"}, "expected prompt and completion, messages, text, or prompt, chosen"),
    ],
)
def test_a_row_that_is_none(row: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        read_row(row, "f:1", one_sided=True)


@pytest.mark.parametrize("bos", [False, True])
def test_a_text_is_tokenised_as_mlx_lm_has_it(model_folder: Path, bos: bool) -> None:
    tokenizer = load_tokenizer(model_folder)
    if bos:
        backend = tokenizer._tokenizer.backend_tokenizer
        backend.post_processor = processors.TemplateProcessing("<|start|> $A", special_tokens=[("<|start|>", 257)])
    text = "A text by itself."
    (group,) = read_row({"text": text, "id": 3}, "f:1", one_sided=True).pairs
    assert isinstance(group, Group)
    found = PairTokenizer(tokenizer)(group)
    ids, offset = TextDataset([], tokenizer).process({"text": text})
    assert offset == 0
    # There, position t is predicted from those before it, from the second on.
    assert (list(found.prompt_ids), [list(found.completions[0])]) == (ids[:1], [ids[1:]])
    with pytest.raises(DataError, match="the row is one text"):
        read_row({"text": text}, "f:1")


def test_pairs_are_pairs_to_a_method_of_one_side_as_well() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert read_row(row, "f:1", one_sided=True) == read_row(row, "f:1")


def test_a_run_on_single_completions_is_that_on_the_chosen_sides_of_pairs(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [("What is it?", "A horse.", "No."), ("And this?", "A long boat.", "Hm."), ("Why?", "So.", "It is so.")] * 2
    for name, keys in {"pairs": ("prompt", "chosen", "rejected"), "single": ("prompt", "completion")}.items():
        for split in ("train", "valid", "test"):
            rows = [dict(zip(keys, row, strict=False)) for row in texts]
            write_rows(tmp_path / name / f"{split}.jsonl", rows)
    # In file order: lengths of pairs would put them into other batches.
    settings |= {"method": "sft"}
    for name in ("pairs", "single"):
        own = {"data": str(tmp_path / name), "adapter_path": str(tmp_path / f"{name} adapters"), "shuffle": False}
        run_quietly({**settings, **own})
    first, second = (adapters(tmp_path / f"{name} adapters") for name in ("pairs", "single"))
    for key, array in first.items():
        assert abs(array - second[key]).max() <= 1e-6, key
    losses = [[row["loss"] for row in records(tmp_path / f"{name} adapters")] for name in ("pairs", "single")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    # Nothing compares a completion with itself, and what is left is what pairs have.
    of_pairs, of_single = (records(tmp_path / f"{name} adapters") for name in ("pairs", "single"))
    gone = set(METRICS) - set(OF_ONE_SIDE)
    assert all(gone <= row.keys() for row in of_pairs)
    assert not any(gone & row.keys() for row in of_single)
    assert [row["rewards/chosen"] for row in of_single] == pytest.approx(
        [row["rewards/chosen"] for row in of_pairs], abs=1e-5
    )
    single = {**settings, "data": str(tmp_path / "single")}
    capsys.readouterr()
    assert main(flags({**single, "patience": 2, "patience_on": "accuracy"})) == 2
    assert "give --patience-on loss" in capsys.readouterr().err
    assert main(flags({**settings, "data": str(tmp_path / "single"), "method": "orpo"})) == 2
    err = capsys.readouterr().err
    assert "train.jsonl:1: the row is one answer to imitate" in err
    assert "--method sft learns from single answers" in err


@pytest.mark.parametrize("text", ["", " "])
def test_a_text_without_words_is_counted_as_one(text: str) -> None:
    (group,) = read_row({"text": text}, "f:1", one_sided=True).pairs
    assert isinstance(group, Group)
    assert usable_group(group, None) == (None, "empty_side")
