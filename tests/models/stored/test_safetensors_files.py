"""Headers are those of the files MLX writes, and files that do not agree with theirs are refused."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from orpo_mlx.errors import ModelError
from orpo_mlx.models.stored.safetensors_files import Tensor, read_header

NAMES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "I8": mx.int8, "BOOL": mx.bool_}


def test_a_header_says_what_mlx_wrote(tmp_path: Path) -> None:
    arrays = {name: mx.zeros((2, number)).astype(dtype) for number, (name, dtype) in enumerate(NAMES.items(), 1)}
    mx.save_safetensors(str(tmp_path / "x.safetensors"), arrays, {"format": "mlx", "é": "ü"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.tensors == {name: Tensor(name, (2, number)) for number, name in enumerate(NAMES, 1)}
    assert header.metadata == {"format": "mlx", "é": "ü"}


def test_a_file_of_another_writer_without_metadata(tmp_path: Path) -> None:
    save_file({"x": np.zeros((3, 0), np.float64), "y": np.array(1, np.float32)}, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    assert header.tensors == {"x": Tensor("F64", (3, 0)), "y": Tensor("F32", ())}
    assert header.metadata == {}


@pytest.mark.parametrize("change", ["cut", "longer", "empty"])
def test_every_byte_belongs_to_a_tensor(change: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    mx.save_safetensors(str(path), {"x": mx.arange(5)})
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-1], "longer": content + b"\0", "empty": b""}[change])
    with pytest.raises(ModelError, match=r"x.safetensors: not a safetensors file, or a damaged one \(.*\)"):
        read_header(path)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"x.safetensors: cannot be read \(No such file"):
        read_header(tmp_path / "x.safetensors")
