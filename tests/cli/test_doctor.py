"""The command `orpo-mlx doctor`: words, file, exit status."""

from __future__ import annotations

import getpass
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.cli.doctor import main, summary
from orpo_mlx.doctor import examine
from orpo_mlx.doctor.examine import Event, Say
from orpo_mlx.doctor.findings import Finding
from orpo_mlx.doctor.machine import check_machine

FOUND = [
    Finding("paths", "fast, float32", True, "all on"),
    Finding("attention", "float32, head dim 64", True, "2 calls", {"rows": [
        [4, "none", True, "mlx", False, None, None, None, "RuntimeError: no"],
        [4, "none", True, "package", True, 1e-7, 1.0, 9.0, None],
    ]}),
    Finding("functions", "swiglu, float32", True, "relative error 2e-07, allowed 1e-04", {
        "error": 2e-7, "tolerance": 1e-4,
    }),
    Finding("modes", "fast, float32, short pairs", True, "fine", {"loss_error": 1e-7, "gradient_error": 2e-6}),
    Finding("training", "20 steps against a CPU's", True, "loss 1.0e-06 off"),
    Finding("speed", "tiny, float32, fast", None, "0.1 s", {
        "shape": "tiny", "dtype": "float32", "bits": None, "mode": "fast", "step_s": 0.125, "peak_gib": 0.5,
    }),
    Finding("calibration", "product, float32", None, "1 TFLOP/s", {"size": 64, "tflop_per_s": 1.5}),
    Finding("calibration", "memory", None, "reads and writes 99 GB/s"),
    Finding("rival", "mlx-lm-lora", None, "mlx-lm-lora is not installed"),
]  # fmt: skip


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines of the processes that would examine; what they would find is `FOUND`."""
    lines: list[list[str]] = []

    class Stand:
        def __init__(self, words: Sequence[str]) -> None:
            lines.append(list(words))

        def __call__(self, first: int, say: Say) -> Iterator[Event]:
            yield {"unit": 0, "of": 1, "group": "modes", "name": "all"}
            for finding in [*check_machine(), *FOUND]:
                yield {"finding": finding._asdict()}
            yield {"done": True}

    monkeypatch.setattr(examine, "Process", Stand)
    return lines


def test_all_is_well(examined: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mac.json"
    assert main(["--quick", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert examined[0][-2:] == ["quick", "alone"]
    assert err == "1/1 modes: all\n"
    assert lines[1:-2] == [
        "paths        PASS  all on in 1 modes and dtypes",
        "attention    PASS  1 calls; MLX's own raises in 1, for 4 queries, all under a gradient",
        "functions    PASS  1 checks; closest to its tolerance: swiglu, float32, relative error 2e-07, allowed 1e-04",
        "modes        PASS  float32: loss within 1.0e-07, gradients within 2.0e-06 of plain",
        "training     PASS  loss 1.0e-06 off",
        "speed        -     tiny float32: fast 0.125 s 0.50 GiB",
        "calibration  -     TFLOP/s: float32 1.5; reads and writes 99 GB/s",
        "rival        -     mlx-lm-lora is not installed",
    ]
    assert lines[-2].startswith("PASS, ")
    record = json.loads(file.read_text(encoding="utf-8"))
    assert list(record)[:6] == ["schema", "date", "level", "verdict", "failures", "seconds"]
    assert {"machine", "versions", "device", "profile", "checks"} <= set(record)
    text = file.read_text(encoding="utf-8")
    assert platform.node() not in text
    assert str(Path.home()) not in text
    assert getpass.getuser() == "root" or getpass.getuser() not in text


def test_what_failed_is_listed(
    examined: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(globals(), "FOUND", [Finding("modes", f"part {n}", False, "is off") for n in range(12)])
    assert main(["--bench"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert examined[0][-2:] == ["full", "bench"]
    assert lines[1] == "modes        FAIL  none ran in float32"
    assert lines[2:12] == [f"  modes: part {n}: is off" for n in range(10)]
    assert lines[12] == "  and 2 more, which --json has"
    assert lines[13].startswith("FAIL, ")


def test_a_machine_that_could_not_be_examined() -> None:
    record: dict[str, Any] = {"checks": {}, "failures": ["machine: start: no"], "verdict": "FAIL", "seconds": 1.0}
    assert summary(record).splitlines() == [
        "machine      FAIL  could not be examined",
        "  machine: start: no",
        "FAIL, 1 s",
    ]


@pytest.mark.parametrize("words", [["--json", "."], ["--json", "no/such/folder/x.json"]])
def test_a_file_that_cannot_be_written(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"orpo-mlx doctor: error: --json {words[1]}: cannot be written there")


def test_flags_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--fast"])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_profile_that_there_is_not_ends_the_examination(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORPO_MLX_PROFILE", "tpu")
    assert main(["--quick"]) == 2
    assert "ORPO_MLX_PROFILE: found 'tpu', expected one of cpu, gpu" in capsys.readouterr().err
