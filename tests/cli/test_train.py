"""The command `orpo-mlx train`: words and exit status."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from orpo_mlx.cli.train import main
from tests.helpers.quiet_training import flags


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--learning-rate", "-1"], "--learning-rate: found '-1', expected a number greater than 0."),
        (["--method", "orop"], "did you mean orpo?"),
        (["--model", "./nowhere"], "--model ./nowhere: no such file or folder"),
        (["--method", "sft", "--beta", "1"], "--beta: method sft has no such parameter"),
        (["--resume-adapter-file", "nowhere"], "--resume-adapter-file nowhere: no such adapter file"),
        (["--precompute-reference"], "--precompute-reference: method orpo compares with no reference"),
        (["--num-layers", "9"], "--num-layers 9: the model has 2 layers"),
        (["--max-seq-length", "2"], "no pair can be used (6 longer than --max-seq-length 2)"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    settings: dict[str, Any], changes: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = flags(settings)
    assert main([*argv, *changes]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("orpo-mlx train: error: ")
    assert expected in err


def test_the_module_runs_as_a_program(settings: dict[str, Any]) -> None:
    argv = flags(settings)
    done = subprocess.run([sys.executable, "-m", "orpo_mlx.train", *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Held-out pairs, before and after training" in done.stdout
    assert "Adapters, metrics and settings are in" in done.stdout
