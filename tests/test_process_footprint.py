"""The process's memory as the operating system tells it, with stand-ins for the systems this does not run on."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orpo_mlx.process_memory import Footprint, RUsageInfo, process_footprint


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_is_taken_is_seen_and_its_peak_stays() -> None:
    # In a process of its own: in this one, earlier tests may have left memory that is used again.
    program = """
import numpy as np
from orpo_mlx.process_memory import process_footprint
before = process_footprint()
block = np.ones(256 << 20, np.uint8)
during = process_footprint()
del block
after = process_footprint()
print(before.now_gib, during.now_gib, after.now_gib, after.peak_gib)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, during, after, peak = map(float, done.stdout.split())
    assert during - before == pytest.approx(0.25, abs=0.05)
    assert after < during - 0.15
    # The kernel's counters are kept per thread and lag a little.
    assert peak > during - 0.01


def test_linux_status_is_in_kib(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\ta kB\nVmHWM:\t 3145728 kB\nVmRSS:\t 1048576 kB\n")
    assert process_footprint("linux", tmp_path / "status") == Footprint(1.0, 3.0)


def test_macos_structure_is_apples() -> None:
    # sys/resource.h: 16 bytes of UUID, phys_footprint is number 7 and lifetime_max_phys_footprint 28 of 35.
    assert ctypes.sizeof(RUsageInfo) == 16 + 35 * 8
    assert RUsageInfo.phys_footprint.offset == 16 + 7 * 8
    assert RUsageInfo.lifetime_max_phys_footprint.offset == 16 + 28 * 8


@pytest.mark.parametrize("status", [0, -1])
def test_macos_asks_for_its_own_process(status: int, tmp_path: Path) -> None:
    asked: list[Any] = []

    def proc_pid_rusage(pid: int, flavour: int, buffer: Any) -> int:
        asked.append((pid, flavour))
        buffer._obj.phys_footprint, buffer._obj.lifetime_max_phys_footprint = 2 << 30, 5 << 30
        return status

    found = process_footprint("darwin", tmp_path / "none", SimpleNamespace(proc_pid_rusage=proc_pid_rusage))
    assert len(asked) == 1
    assert asked[0][1] == 4
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
    assert found == (Footprint(2.0, 5.0) if status == 0 else Footprint(largest, largest))


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("freebsd", 1024)])
def test_what_cannot_be_read_falls_back_to_the_peak_resident_set(platform: str, unit: int, tmp_path: Path) -> None:
    found = process_footprint(platform, tmp_path / "none", SimpleNamespace())
    assert found.now_gib == found.peak_gib
    assert found.peak_gib == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, rel=0.01)
