"""The config of rounds: what is wrong is one sentence with file and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.errors import ConfigError
from orpo_mlx.rounds.settings import read_rounds_config, rounds_config

GOOD = {"data": "d", "judge": "rule:plain"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"judge": "rule:plain"}, "data is not given as text"),
        ({**GOOD, "sample": 4}, "unknown key 'sample'; did you mean samples?"),
        ({**GOOD, "samples": 1}, "samples: found 1, expected 2 or more"),
        ({**GOOD, "samples": 2.5}, "samples: found 2.5, expected a whole number"),
        ({**GOOD, "samples": True}, "samples: found True, expected a whole number"),
        ({**GOOD, "rounds": 16**5000}, "rounds: found a number of thousands of digits, expected a whole number"),
        ({**GOOD, "data": 7}, "data is not given as text"),
        ({**GOOD, "columns": 7}, "columns: found 7, expected text"),
        ({**GOOD, "min_gap": float("inf")}, "min_gap: found inf, expected a number"),
        ({**GOOD, "temperature": 0}, "temperature: found 0.0, expected a number above 0"),
        ({**GOOD, "top_p": 2}, "top_p: found 2.0"),
        ({**GOOD, "judge": "rule:no"}, "no rule 'no'"),
        ({**GOOD, "train": 3}, "train is not a table"),
        ({**GOOD, "train": {"data": "x"}}, "train.data: is set by the rounds themselves"),
        ({**GOOD, "train": {"iter": 3}}, "train: unknown key 'iter'; did you mean iters?"),
        ({**GOOD, "iters": 3}, "rounds.yaml: unknown key 'iters'; give train: {iters: ...}."),
        ({**GOOD, "train": {"iters": 3, "epochs": 2}}, "rounds.yaml: train.iters and train.epochs both say how long"),
        ({**GOOD, "train": {"report": False, "report_every": 3}}, "rounds.yaml: train.report: false: train.report_"),
        ({**GOOD, "train": {"lora_parameters": {"rank": 0}}}, "rounds.yaml: train.lora_parameters.rank: found 0"),
        ({**GOOD, "judge": "rule:no"}, "rounds.yaml: judge"),
        (
            {**GOOD, "judge_tokens": 9},
            "rounds.yaml: judge_tokens: 9: is for a model that writes its verdict, or a serv",
        ),
        ({**GOOD, "columns": "a=b"}, "rounds.yaml: columns"),
        ({**GOOD, "columns": "a=b"}, "'a' is not a name"),
    ],
)
def test_what_is_wrong_is_named(table: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rounds_config(table, "rounds.yaml")
    assert message in str(caught.value)


def test_a_file_is_read_and_seeds_differ_from_round_to_round(tmp_path: Path) -> None:
    path = tmp_path / "rounds.yaml"
    path.write_text("data: d\njudge: rule:plain\nseed: 3\nprompts:\ntrain:\n  learning_rate: 1e-5\n")
    config = read_rounds_config(path)
    assert config.training.learning_rate == 1e-5
    assert config.training.seed == 3
    assert config.prompts is None
    assert config.sampling(1).seed != config.sampling(2).seed
