"""What a merge keeps of an adapter's effect: measured, warned of, and kept by mixed quantisation."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from orpo_mlx.cli.convert import main
from orpo_mlx.convert.effect import Margins, effect_of, effect_text, measure_effect
from orpo_mlx.files import save_adapters, save_json
from orpo_mlx.models.adapters import adapter_weights, add_adapters
from tests.conftest import make_model, write_model_folder, write_rows

KEYS = ["self_attn.q_proj", "self_attn.v_proj"]
LORA = {"rank": 4, "scale": 4.0, "dropout": 0.0, "keys": KEYS}


def test_the_share_that_is_kept_and_how_far_margins_are_off() -> None:
    # The base moved by 3 and 1 in being quantised, which is not the adapter's doing.
    found = effect_of(Margins([0.0, 1.0], [2.0, 0.0], [4.0, 1.5], [3.0, 2.0]))
    assert found.kept == pytest.approx((1 * 2 + -0.5 * -1) / 5)
    assert (found.tuned_change, found.merged_change, found.off) == (0.5, 0.25, 0.75)
    assert effect_text(found).startswith("Warning: 50.0% of the adapter's effect is kept on 2 pairs")
    assert effect_of(Margins([1.0], [1.0], [5.0], [5.0])).kept == 1
    assert not effect_text(effect_of(Margins([0.0], [1.0], [1.0], [0.0]))).startswith("Warning")


def test_a_merge_keeps_all_a_coarse_one_less_and_a_mixed_one_most(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model_folder(tmp_path / "base")
    model = make_model()
    add_adapters(model, "lora", -1, LORA)
    mx.random.seed(0)
    # Small beside the weights, as adapters are: coarse steps swallow it.
    moved = [(name, 0.03 * mx.random.normal(value.shape)) for name, value in adapter_weights(model).items()]
    model.load_weights(moved, strict=False)
    (tmp_path / "adapters").mkdir()
    save_adapters(tmp_path / "adapters", adapter_weights(model))
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": LORA}
    save_json(tmp_path / "adapters" / "adapter_config.json", config)
    rows = [{"prompt": f"Say {number}", "chosen": f"one {number}", "rejected": f"{number} two"} for number in range(12)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    common = ["merge", "--model", str(folder), "--adapter-path", str(tmp_path / "adapters"), "--data", str(data)]
    assert main([*common, str(tmp_path / "exact")]) == 0
    assert "100.0% of the adapter's effect is kept on 12 pairs" in capsys.readouterr().out
    off = {}
    for mode in ("affine", "mixed"):
        target = tmp_path / mode
        argv = [str(target), "--quantize", "--bits", "4", "--group-size", "32", "--mode", mode, "--no-verify"]
        assert main([*common, *argv]) == 0
        assert "of the adapter's effect is kept" in capsys.readouterr().out
        found = measure_effect(str(folder), tmp_path / "adapters", target, data, trust_remote_code=False)
        off[mode] = found.off
    quantised = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization"]
    finer = [name for name, value in quantised.items() if isinstance(value, dict) and value["bits"] == 8]
    assert sorted(finer) == sorted(f"model.layers.{number}.{key}" for number in range(2) for key in KEYS)
    assert quantised["bits"] == 4
    assert off["mixed"] < 0.7 * off["affine"]
    assert main([*common[:-1], str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 2
    assert "--data" in capsys.readouterr().err
