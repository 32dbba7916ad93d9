"""Tasks of lm-eval on a tiny model, from local files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orpo_mlx.cli.evaluate import main
from orpo_mlx.errors import DataError
from orpo_mlx.judging.tasks import compare_samples
from tests.conftest import write_rows
from tests.helpers.tuned_adapters import ANSWER, PROMPT, tuned_adapters

TASK = """
task: say
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.mark.slow
def test_a_task_from_local_files_is_compared_item_by_item(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    adapters = tuned_adapters(tmp_path, model_folder, iters=40)
    rows = [{"question": PROMPT + " " * n, "choices": [ANSWER, "no", "maybe"], "answer": 0} for n in range(6)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "say.yaml").write_text(TASK.format(path=data))
    output = tmp_path / "out.json"
    argv = ["--adapter-path", str(adapters), "--tasks", "say", "--tasks-path", str(tmp_path / "tasks")]
    assert main([*argv, "--json", str(output)]) == 0
    found = json.loads(output.read_text())["say"]
    assert found["items"] == 6
    assert found["kept"] + found["gained"] + found["lost"] + found["missed"] == 6
    assert found["after"] >= found["before"]
    assert "say: " in capsys.readouterr().out
    assert main([*argv[:-3], "sat", *argv[-2:]]) == 2
    assert "lm-eval has no task 'sat'" in capsys.readouterr().err


def test_what_tasks_need_is_said(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        (["--tasks", "x"], "give --adapter-path"),
        (["--tasks", "x", "--judge", "rule:plain"], "--judge: has no meaning with --tasks"),
        (["--tasks", "x", "--temp", "1"], "--temp: has no meaning with --tasks"),
        (["--data", "d", "--judge", "rule:plain", "--limit", "3"], "--limit: is about --tasks; give both"),
        (["--data", "d", "--judge", "rule:plain", "--tasks-path", "d"], "--tasks-path: is about --tasks; give both"),
        ([], "give --data and --judge"),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1


def answered(f1: list[float], em: list[float]) -> list[dict[str, object]]:
    rows = enumerate(zip(f1, em, strict=True))
    return [{"doc_id": number, "metrics": ["f1", "em"], "f1": a, "em": b} for number, (a, b) in rows]


def test_before_and_after_are_held_against_each_other_by_one_metric() -> None:
    # Graded, and yet 0 for every item of a model that knows nothing.
    before, after = answered([0.0, 0.0, 0.0], [0.0, 1.0, 0.0]), answered([1.0, 0.4, 0.0], [1.0, 0.0, 0.0])
    found = compare_samples("qa", before, after)
    assert (found.kept, found.gained, found.lost, found.missed) == (0, 1, 1, 1)
    with pytest.raises(DataError, match="qa has no metric that is right or wrong"):
        compare_samples("qa", before, answered([1.0, 0.4, 0.0], [1.0, 0.5, 0.0]))
