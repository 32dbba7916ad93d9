"""Rows of one completion: what supervised fine-tuning learns from, in the shapes of mlx_lm.lora, TRL and Alpaca."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.cli.train import main
from orpo_mlx.data.shapes.formats import read_row
from orpo_mlx.errors import DataError
from orpo_mlx.types import Group
from tests.conftest import write_rows
from tests.helpers.kill_and_resume import adapters, records
from tests.helpers.quiet_training import run_quietly
from tests.test_train import flags

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "q", "completion": "a"}, "q", "a"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, (USER,), (ASSISTANT,)),
        ({"prompt": "q", "completion": "a", "system": "s"}, (SYSTEM, USER), (ASSISTANT,)),
        ({"instruction": "q", "input": "i", "output": "a"}, "q\ni", "a"),
        ({"instruction": "q", "input": "", "output": "a"}, "q", "a"),
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
        # A column under another name is not passed over.
        ({"prompt": "q", "completion": "a", "rejected": "b"}, "the row has no 'chosen'"),
        ({"text": "q a"}, "the row is one text"),
    ],
)
def test_a_row_that_is_none(row: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        read_row(row, "f:1", one_sided=True)


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
    capsys.readouterr()
    assert main(flags({**settings, "data": str(tmp_path / "single"), "method": "orpo"})) == 2
    err = capsys.readouterr().err
    assert "train.jsonl:1: the row is one answer to imitate" in err
    assert "--method sft learns from single answers" in err
