"""The model card a run leaves in its adapter folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from rich.console import Console

from orpo_mlx.config.checks import make_config
from orpo_mlx.config.derived import settings_for_card
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.reporting.model_card import card_text, write_card
from orpo_mlx.text import shareable
from orpo_mlx.train import train
from tests.helpers.quiet_training import run_quietly

HELD = {
    "test": {
        "accuracies/mean_logps": 0.25,
        "accuracies/sum_logps": 0.5,
        "rewards/accuracies": 0.75,
        "rewards/margins": 1.5,
        "nll_loss": 2.5,
        "loss": 3.5,
    }
}


def record(**settings: Any) -> dict[str, Any]:
    config = make_config(settings)
    return {
        "settings": config.settings(),
        "method_parameters": {"orpo": {"beta": 0.1}, "dpo": {"beta": 0.1, "label_smoothing": 0.0}},
        "data": {"train": {"path": "x/train.jsonl", "sha256": "ab" * 32, "rows": 1234, "pairs": 1200}},
        "trainable_parameters": 4567,
        "versions": {"mlx": "9.8.7"},
    }


def test_training_writes_a_card_with_its_figures(settings: dict[str, Any]) -> None:
    after = run_quietly({**settings, "method": "dpo", "beta": 0.37})
    folder = Path(settings["adapter_path"])
    card = ModelCard((folder / "README.md").read_text(encoding="utf-8"))
    run = json.loads((folder / "run.json").read_text())
    assert card.data.to_dict()["library_name"] == "mlx"
    assert "base_model" not in card.data.to_dict()
    assert "license" not in card.data.to_dict()
    assert "dpo" in card.data.to_dict()["tags"]
    assert "beta 0.37" in card.text
    assert "arXiv:2305.18290" in card.text
    for split in run["data"].values():
        assert split["sha256"] in card.text
    for split, metrics in after.items():
        assert f"{split} after" in card.text
        assert f" {metrics['nll_loss']:.4f} |" in card.text
    assert f"{run['trainable_parameters']:,}" in card.text
    assert run["versions"]["mlx"] in card.text
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    peak = max(row.get("peak_memory_gib", 0) for row in map(json.loads, lines) if row["split"] == "train")
    assert f"| peak memory while training (MLX) | {peak:.2f} GiB |" in card.text
    assert str(folder.parent) not in card.content


def test_a_card_is_made_anew_until_somebody_changes_it(settings: dict[str, Any]) -> None:
    run_quietly(settings)
    folder = Path(settings["adapter_path"])
    card = folder / "README.md"
    assert write_card(folder, HELD, HELD, settings_for_card)
    written = card.read_text(encoding="utf-8")
    assert "| 25.0% | 25.0% |" in written
    for changed in (written.replace("25.0%", "99.0%"), written + "\nMore.\n", "My own.\n", "", "x" + written):
        card.write_text(changed, encoding="utf-8")
        assert not write_card(folder, HELD, HELD, settings_for_card)
        assert card.read_text(encoding="utf-8") == changed
    card.unlink()
    assert write_card(folder, HELD, HELD, settings_for_card)


def test_a_changed_card_is_kept_by_training_which_says_so(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(settings["adapter_path"])
    folder.mkdir()
    (folder / "README.md").write_text("Mine.\n")
    train(make_config(settings), Reporter(Console(width=300)))
    assert "README.md was changed by hand and stays as it is" in capsys.readouterr().out
    assert (folder / "README.md").read_text() == "Mine.\n"


def test_the_header_names_what_is_on_the_hub() -> None:
    settings = {"model": "Qwen/Qwen3-0.6B", "data": "trl-lib/pairs:main@abc", "fine_tune_type": "full"}
    card = ModelCard(card_text(record(**settings), HELD, HELD, None, settings_for_card))
    assert card.data.to_dict()["base_model"] == "Qwen/Qwen3-0.6B"
    assert card.data.to_dict()["datasets"] == ["trl-lib/pairs"]
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert "peak memory" not in card.text


def test_a_sum_has_a_row_for_each_term() -> None:
    text = card_text(record(method="sigmoid + 0.2*orpo"), HELD, HELD, 1.0, settings_for_card)
    assert "| `dpo` | 1 |" in text
    assert "| `orpo` | 0.2 |" in text


def test_names_from_outside_are_only_text() -> None:
    values = record(model="m`<b>|*x*")
    values["data"] = {"train": {**values["data"]["train"], "path": "<script>|[a](b)\x1b"}}
    text = card_text(values, HELD, HELD, None, settings_for_card)
    assert "<script>" not in text
    assert "\x1b" not in text
    assert "&lt;script&gt;\\|\\[a\\](b)" in text


def test_no_held_out_pairs_is_said() -> None:
    assert "No held-out pairs were measured" in card_text(record(), {}, {}, None, settings_for_card)


def test_local_paths_are_cut_down() -> None:
    value = {"a": "/home/me/model", "b": ["~/x/y.jsonl, /data/z.jsonl"], "c": "owner/name", "d": 3, "e": "../up/f/"}
    assert shareable(value) == {"a": "model", "b": ["y.jsonl, z.jsonl"], "c": "owner/name", "d": 3, "e": "f"}
