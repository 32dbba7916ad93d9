"""What is said of the machine, and what it can do."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from orpo_mlx.doctor import machine
from orpo_mlx.doctor.findings import Finding
from orpo_mlx.doctor.machine import check_calibration, check_machine, check_paths, linux_chip
from orpo_mlx.doctor.package import MEMORY_MODES
from tests.doctor.conftest import TINY, Examined


def test_the_machine_is_described_without_its_owner() -> None:
    (found,) = check_machine()
    assert set(found.figures) == {"machine", "versions", "device", "profile", "environment"}
    assert found.figures["machine"]["memory_gib"] > 0.5
    assert {"orpo-mlx", "mlx", "mlx-lm", "python"} <= set(found.figures["versions"])
    assert "share_prompt" in found.figures["profile"]["layout"]
    text = json.dumps(found.figures, default=str) + found.sentence
    assert platform.node() not in text
    assert str(Path.home()) not in text
    assert getpass.getuser() == "root" or getpass.getuser() not in text


def test_a_mac_is_asked_by_sysctl(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"machdep.cpu.brand_string": "Apple M9 Max\n", "hw.perflevel0.physicalcpu": "12\n"}

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(words, 0, answers[words[-1]], "")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("27.0", ("", "", ""), "arm64"))
    monkeypatch.setattr(subprocess, "run", run)
    found = machine.machine()
    assert (found["chip"], found["performance_cores"], found["system"]) == ("Apple M9 Max", 12, "macOS 27.0")


def test_a_linux_machine_has_its_chip_in_a_file(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name\t: Some Chip 9\n")
    assert linux_chip(info) == "Some Chip 9"
    assert linux_chip(tmp_path / "nothing") == ""


def test_float32_adapters_of_a_half_precision_model_leave_every_path_on() -> None:
    assert [found.sentence for found in check_paths("bfloat16") if not found.passed] == []


def test_what_is_off_is_a_failure_with_its_note(examined: Examined, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [found.passed for found in examined.of("paths")] == [True] * len(MEMORY_MODES)
    note = "This model's layers cannot be run in segments."
    monkeypatch.setattr(machine, "notes_of", lambda model, mode: (note,) if mode == "thrift" else ())
    failed = [found for found in check_paths("float32") if not found.passed]
    assert [(found.name, found.sentence) for found in failed] == [("thrift, float32", note)]


def test_calibration_has_a_rate_for_everything() -> None:
    found = {each.name: each for each in check_calibration(TINY)}
    for dtype in TINY.dtypes:
        assert found[f"product, {dtype}"].figures["tflop_per_s"] > 0
        assert found[f"product with 4 bits, {dtype}"].figures["tflop_per_s"] > 0
    assert found["memory"].figures["gigabytes_per_s"] > 0
    assert found["launches"].figures["microseconds_per_eval"] > 0
    assert all(each.passed is None for each in found.values())


def test_what_mlx_cannot_multiply_is_said_and_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any, **__: Any) -> mx.array:
        raise NotImplementedError("QMM NYI")

    monkeypatch.setattr(mx, "quantized_matmul", raises)
    found = {each.name: each for each in check_calibration(TINY)}
    assert found["product with 4 bits, float32"] == Finding(
        "calibration", "product with 4 bits, float32", None, "NotImplementedError: QMM NYI", {}
    )
    assert found["launches"].figures
