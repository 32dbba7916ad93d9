"""The demo task: made from a seed, byte for byte, with splits that share nothing they should not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    return {
        name: [json.loads(line) for line in (ROOT / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in SPLITS
    }


def test_the_script_makes_the_committed_files(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "make_demo_data.py"
    subprocess.run([sys.executable, str(script), "--output", str(tmp_path)], check=True, capture_output=True)
    for name in SPLITS:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (ROOT / "data" / f"{name}.jsonl").read_bytes()


def test_another_seed_makes_other_rows(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "make_demo_data.py"
    command = [sys.executable, str(script), "--output", str(tmp_path), "--seed", "1"]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "train.jsonl").read_bytes() != (ROOT / "data" / "train.jsonl").read_bytes()


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "make_demo_data.py"
    command = [sys.executable, str(script), "--output", str(tmp_path / "no")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = (
        f"python scripts/make_demo_data.py: error: --output {tmp_path / 'no'}: is no folder; give one that is there.\n"
    )
    assert (done.returncode, done.stderr) == (2, said)


def test_sizes(rows: dict[str, list[dict[str, Any]]]) -> None:
    assert {name: len(rows[name]) for name in SPLITS} == {"train": 640, "valid": 100, "test": 200}


def test_no_prompt_twice_in_any_split(rows: dict[str, list[dict[str, Any]]]) -> None:
    prompts = [row["prompt"][0]["content"] for name in SPLITS for row in rows[name]]
    assert len(set(prompts)) == len(prompts)


def test_test_families_are_absent_from_train(rows: dict[str, list[dict[str, Any]]]) -> None:
    families = json.loads((ROOT / "data" / "facts.json").read_text())["families"]
    seen: dict[str, set[str]] = {name: set() for name in SPLITS}
    for family in families:
        questions = {q.format(a=left) for q in family["questions"] for left, _ in family["facts"]}
        for name in SPLITS:
            if questions & {row["prompt"][0]["content"] for row in rows[name]}:
                seen[name].add(family["name"])
    assert not seen["test"] & (seen["train"] | seen["valid"])
    assert len(seen["test"]) >= 5


def test_rejected_holds_the_same_answer_at_more_length(rows: dict[str, list[dict[str, Any]]]) -> None:
    for name in SPLITS:
        for row in rows[name]:
            chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
            assert chosen in rejected
            assert len(rejected) > 2 * len(chosen)
            assert "{" not in chosen + rejected + row["prompt"][0]["content"]
