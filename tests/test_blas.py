"""The BLAS that is loaded before MLX, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from orpo_mlx import _blas

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Accelerate needs no help")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)


@linux
def test_off_loads_nothing_and_says_nothing() -> None:
    code = "import orpo_mlx, pathlib; print('openblas' in pathlib.Path('/proc/self/maps').read_text())"
    done = run(code, ORPO_MLX_BLAS="off")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "False"


@linux
def test_a_library_that_cannot_be_loaded_names_the_variable() -> None:
    done = run("import orpo_mlx", ORPO_MLX_BLAS="/nowhere/libblas.so")
    assert done.returncode != 0
    assert "ORPO_MLX_BLAS=/nowhere/libblas.so cannot be loaded" in done.stderr


@linux
def test_a_command_whose_library_cannot_be_loaded_ends_in_a_sentence() -> None:
    words = [sys.executable, "-m", "orpo_mlx", "--version"]
    env = {**os.environ, "ORPO_MLX_BLAS": "/nowhere/libblas.so"}
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("orpo-mlx: error: ORPO_MLX_BLAS=/nowhere/libblas.so cannot be loaded (")
    assert done.stderr.count("\n") == 1


@linux
def test_one_warning_names_the_remedy_where_none_is_found() -> None:
    code = "import ctypes\ndef fail(*a, **k): raise OSError\nctypes.CDLL = fail\nimport orpo_mlx"
    done = run(code)
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert "apt-get install libopenblas0-pthread" in done.stderr


@linux
def test_mlx_imported_first_is_said() -> None:
    done = run("import mlx.core, orpo_mlx")
    assert "import orpo_mlx first" in done.stderr


@pytest.mark.parametrize(
    ("chosen", "flags", "expected"),
    [
        ("Prescott", "sse3 avx2 fma avx512f avx512bw avx512dq avx512vl", "SKYLAKEX"),
        ("Nehalem", "avx2 fma avx512f", "HASWELL"),
        ("Prescott", "sse3", None),
        ("Zen", "avx2 fma", None),
        ("SkylakeX", "avx2 fma avx512f avx512bw avx512dq avx512vl", None),
        ("", "avx2 fma", None),
    ],
)
def test_kernels_are_named_only_where_openblas_does_not_know_the_cpu(
    chosen: str, flags: str, expected: str | None
) -> None:
    assert _blas.better_kernels(chosen, set(flags.split())) == expected


@linux
def test_openblas_runs_with_the_kernels_this_cpu_has() -> None:
    code = (
        "import ctypes, orpo_mlx; from orpo_mlx import _blas\n"
        "try: name = _blas._core_name(ctypes.CDLL('libopenblas.so.0'))\n"
        "except OSError: name = ''\n"
        "print(_blas.better_kernels(name, _blas._cpu_flags()))"
    )
    assert run(code).stdout.strip() == "None"
