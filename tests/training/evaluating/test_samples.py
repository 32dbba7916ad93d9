"""Sample replies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlx_lm import load as mlx_lm_load
from mlx_lm import stream_generate

from orpo_mlx.cli.train import main
from orpo_mlx.config.checks import make_config
from orpo_mlx.errors import TrainingError
from orpo_mlx.models.loading import load
from orpo_mlx.train import train
from orpo_mlx.training.evaluating.samples import pick_prompts, sample_replies
from orpo_mlx.types import Pair
from tests.conftest import write_rows
from tests.helpers.kill_and_resume import same
from tests.helpers.quiet_training import flags
from tests.helpers.small_comparison import quiet
from tests.training.checkpoints.test_resume import fail_before

_SHORT = 5


def pairs(count: int) -> list[Pair]:
    return [Pair(f"Q{number}", "A", "B", f"f:{number}") for number in range(count)]


def test_prompts_are_spread_over_the_split() -> None:
    assert [pair.prompt for pair in pick_prompts(pairs(100), 4)] == ["Q12", "Q37", "Q62", "Q87"]
    assert len(pick_prompts(pairs(2), 5)) == 2
    assert pick_prompts(pairs(3), 0) == []


def test_replies_are_greedy_bounded_and_leave_the_mode_alone(model_folder: Path) -> None:
    loaded = load(str(model_folder))
    loaded.model.train()
    conversation = Pair(({"role": "system", "content": "s"}, {"role": "user", "content": "u"}), "A", "B", "f:1")
    first, second = (
        sample_replies(loaded.model, loaded.tokenizer, [pairs(1)[0], conversation], _SHORT) for _ in range(2)
    )
    assert first == second
    assert [reply.prompt for reply in first] == ["Q0", "u"]
    assert all(1 <= reply.tokens <= _SHORT for reply in first)
    assert loaded.model.training


def test_a_reply_that_fails_leaves_the_mode_alone(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(str(model_folder))
    loaded.model.train()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr("orpo_mlx.training.evaluating.samples.stream_generate", fail)
    with pytest.raises(RuntimeError):
        sample_replies(loaded.model, loaded.tokenizer, pairs(1), _SHORT)
    assert loaded.model.training


@pytest.fixture
def texts(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of seven steps with dropout on rows of text, two of whose prompts are answered, shortly."""
    for split in ("train", "valid"):
        rows = [{"prompt": f"{split} {n}?", "chosen": f"Yes, {n}.", "rejected": "No."} for n in range(6)]
        write_rows(tmp_path / "texts" / f"{split}.jsonl", rows)
    more: dict[str, Any] = {"iters": 7, "save_every": 2, "steps_per_eval": 3, "lora_parameters": {"dropout": 0.1}}
    return {**settings, **more, "data": str(tmp_path / "texts"), "samples": 2, "sample_tokens": _SHORT}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("undrawn")
def test_samples_along_the_way_change_no_number(
    texts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_config({**texts, "adapter_path": str(tmp_path / "without")}), quiet())
    folder = Path(texts["adapter_path"])
    train(make_config({**texts, "sample_every": 3, "report": True}))
    assert same(tmp_path / "without", folder)
    assert not (tmp_path / "without" / "samples.jsonl").exists()
    found = lines(folder)
    assert [(row["step"], row["prompt"]) for row in found] == [
        (step, f"valid {n}?") for step in (0, 3, 6, 7) for n in (1, 4)
    ]
    assert all(row.keys() == {"step", "prompt", "text", "tokens"} and 0 < row["tokens"] <= _SHORT for row in found)
    out = capsys.readouterr().out
    assert out.count("reply   [") == 4
    for row in found:
        label = {0: "before  ", 7: "after   "}.get(row["step"], f"step {row['step']}  reply   ")
        assert f"{label}[{row['tokens']} tokens]" in out
    assert "Sample replies" in (folder / "report.html").read_text()
    # The last ones are what mlx-lm makes of the adapters; no more of these rows without the flag.
    model, tokenizer = mlx_lm_load(texts["model"], adapter_path=str(folder))[:2]
    messages = [{"role": "user", "content": "valid 4?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    text = "".join(part.text for part in stream_generate(model, tokenizer, ids, max_tokens=_SHORT))
    assert found[-1]["text"] == text.strip()
    train(make_config(texts), quiet())
    assert not (folder / "samples.jsonl").exists()


@pytest.mark.parametrize("lost", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_samples_of_each_step_once(texts: dict[str, Any], tmp_path: Path, lost: bool) -> None:
    texts |= {"sample_every": 1}
    train(make_config({**texts, "adapter_path": str(tmp_path / "whole")}), quiet())
    folder = Path(texts["adapter_path"])
    with pytest.MonkeyPatch.context() as patch:
        fail_before(6, patch)
        with pytest.raises(TrainingError, match="step 5 is saved"):
            train(make_config(texts), quiet())
    if lost:  # As if it had been killed: the last checkpoint is that of step 4, and step 5 is in the files.
        shutil.rmtree(folder / "checkpoints" / "step-0000005")
    train(make_config({**texts, "resume": True}), quiet())
    assert lines(folder) == lines(tmp_path / "whole")
    assert same(tmp_path / "whole", folder)


def test_text_rows_and_sample_replies(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {"prompt": "Say \x1b[31mred", "chosen": "Yes.", "rejected": "Well, perhaps."}
    write_rows(tmp_path / "text" / "train.jsonl", [{**text, "prompt": f"{text['prompt']} {n}"} for n in range(4)])
    argv = flags(settings)
    assert main([*argv, "--data", str(tmp_path / "text"), "--samples", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("before  [") == out.count("after   [") == 2
    assert "\x1b" not in out
    assert "No valid split: training without validation." in out
