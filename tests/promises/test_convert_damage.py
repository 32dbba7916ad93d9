"""Damaged and hostile inputs: one sentence, status 2, nothing left behind, no memory spent on what a header claims."""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from orpo_mlx.cli.convert import main
from orpo_mlx.models.loading import load
from tests.conftest import make_model, write_model_folder
from tests.convert.test_conversions import sharded, write_adapter_folder
from tests.convert.test_peft_adapters import write_peft_folder
from tests.models.gguf.test_loading import write_gguf

Damage = Callable[[Path], object]


def change_json(name: str, **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        value = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps({key: each for key, each in value.items() if each is not ...}))

    return damage


def rewrite(name: str, content: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / name).write_bytes(content((folder / name).read_bytes())) and None


def header(change: Callable[[dict[str, Any]], None], name: str = "model.safetensors") -> Damage:
    def damage(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        table = json.loads(content[8 : 8 + length])
        change(table)
        text = json.dumps(table).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return rewrite(name, damage)


def weights(change: Callable[[dict[str, mx.array]], None], name: str = "model.safetensors") -> Damage:
    def damage(folder: Path) -> None:
        loaded = mx.load(str(folder / name))
        assert isinstance(loaded, dict)
        change(loaded)
        mx.eval(list(loaded.values()))
        (folder / name).unlink()
        mx.save_safetensors(str(folder / name), loaded)

    return damage


def index(change: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(folder: Path) -> None:
        path = sharded(folder) / "model.safetensors.index.json"
        table = json.loads(path.read_text())
        change(table)
        path.write_text(json.dumps(table))

    return damage


def without(key: str) -> Callable[[dict[str, Any]], None]:
    def damage(table: dict[str, Any]) -> None:
        del table[key]

    return damage


SHARD, LAYER_9 = "model-00001-of-00002.safetensors", "model.layers.9.self_attn.q_proj"
GPT2 = "base_model.model.h.0.lora_A.weight"
FIRST, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
MODEL: dict[str, tuple[Damage, str]] = {
    "cut short": (rewrite("model.safetensors", lambda data: data[:-100]), "not fully covered"),
    "cut in the header": (rewrite("model.safetensors", lambda data: data[:60]), "invalid header length"),
    "empty": (rewrite("model.safetensors", lambda data: b""), "not a safetensors file"),
    "header of 2^60": (
        rewrite("model.safetensors", lambda data: struct.pack("<Q", 2**60) + data[8:]),
        "header too large",
    ),
    "header of 2^64 - 1": (rewrite("model.safetensors", lambda data: b"\xff" * 8 + data[8:]), "header too large"),
    "header not JSON": (
        rewrite("model.safetensors", lambda data: data[:8] + b"x" + data[9:]),
        "invalid JSON in header",
    ),
    "header nested deeply": (
        rewrite("model.safetensors", lambda data: struct.pack("<Q", 200_000) + b"[" * 200_000),
        "not a",
    ),
    "tensor of 2^50 numbers": (
        header(lambda table: table[NORM].update(shape=[2**50])),
        "invalid shape, data type, or offset",
    ),
    "tensor past the end": (
        header(lambda table: table[NORM].update(data_offsets=[2**40, 2**40 + 128])),
        "invalid offset for tensor",
    ),
    "negative shape": (header(lambda table: table[NORM].update(shape=[-32])), "integer `-32`"),
    "unknown dtype": (header(lambda table: table[NORM].update(dtype="F99")), "F99"),
    "tensors that overlap": (
        header(lambda table: table[NORM].update(data_offsets=[4, 132])),
        "invalid offset for tensor",
    ),
    "missing tensor": (weights(without(NORM)), "model.norm.weight"),
    "unknown tensor": (weights(lambda table: table.update(odd=mx.zeros(2))), "odd"),
    "wrong shape": (weights(lambda table: table.update({FIRST: mx.zeros((7, 32))})), "(7, 32)"),
    "not a number in it": (weights(lambda table: table.update({FIRST: table[FIRST] * float("nan")})), "failed"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model*.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
    "config not JSON": (rewrite("config.json", lambda data: data[:-9]), "cannot be read as JSON"),
    "config a list": (rewrite("config.json", lambda data: b"[1]"), "expected a table"),
    "config not UTF-8": (rewrite("config.json", lambda data: b"\xff\xfe"), "cannot be read as JSON"),
    "no model_type": (change_json("config.json", model_type=...), "model_type None"),
    "unknown model_type": (change_json("config.json", model_type="martian"), "'martian'"),
    "model_type is a path": (change_json("config.json", model_type="../../evil"), "evil"),
    "no hidden_size": (change_json("config.json", hidden_size=...), "hidden_size"),
    "wrong width": (change_json("config.json", hidden_size=64), "shape"),
    "its own code": (change_json("config.json", model_file="evil.py"), "--trust-remote-code"),
    "missing shard": (lambda folder: (sharded(folder) / "model-00002-of-00002.safetensors").unlink(), "is missing"),
    "index out of the folder": (
        index(lambda table: table["weight_map"].update({NORM: "../../etc/passwd"})),
        "not a file name within",
    ),
    "index to an absolute path": (
        index(lambda table: table["weight_map"].update({NORM: "/etc/passwd"})),
        "not a file name within",
    ),
    "index to the wrong shard": (
        index(lambda table: table["weight_map"].update(dict.fromkeys(table["weight_map"], SHARD))),
        "is not in it",
    ),
    "index without a map": (index(without("weight_map")), "no weight_map"),
    "pickled weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin") and None,
        "torch",
    ),
}
ADAPTER: dict[str, tuple[Damage, str]] = {
    "of another model": (
        weights(lambda table: table.update({next(iter(table)): mx.zeros((5, 2))}), "adapters.safetensors"),
        "shape",
    ),
    "of more layers": (
        weights(lambda table: table.update({f"{LAYER_9}.lora_a": mx.zeros((32, 2))}), "adapters.safetensors"),
        "model.layers.9",
    ),
    "no settings": (change_json("adapter_config.json", lora_parameters=...), "no adapter config"),
    "whole weights": (change_json("adapter_config.json", fine_tune_type="full"), "use merge"),
    "cut short": (rewrite("adapters.safetensors", lambda data: data[:-5]), "not fully covered"),
}
PEFT: dict[str, tuple[Damage, str]] = {
    "another kind": (change_json("adapter_config.json", peft_type="IA3"), "'IA3'"),
    "trained biases": (change_json("adapter_config.json", bias="all"), "bias"),
    "ranks that differ": (change_json("adapter_config.json", rank_pattern={"q_proj": 7}), "rank_pattern"),
    "a changed base": (change_json("adapter_config.json", init_lora_weights="pissa"), "init_lora_weights"),
    "rank zero": (change_json("adapter_config.json", r=0), "not numbers"),
    "no file": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter folder"),
    "of another model": (
        weights(lambda table: table.update({GPT2: mx.zeros((2, 2))}), "adapter_model.safetensors"),
        "does not have",
    ),
}


def refused(command: list[str], tmp_path: Path, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    assert expected in error
    assert sorted(tmp_path.iterdir()) == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300_000  # KiB on Linux, bytes on a Mac.


@pytest.mark.parametrize("name", MODEL)
def test_models(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, expected = MODEL[name]
    damage(write_model_folder(tmp_path / "hf"))
    refused(["hf", str(tmp_path / "hf"), str(tmp_path / "out")], tmp_path, expected, capsys)


@pytest.mark.parametrize("name", ADAPTER)
def test_adapters(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, expected = ADAPTER[name]
    model = write_model_folder(tmp_path / "hf")
    damage(write_adapter_folder(tmp_path / "a"))
    command = ["mlx-to-peft", str(tmp_path / "a"), str(tmp_path / "out"), "--model", str(model)]
    refused(command, tmp_path, expected, capsys)


@pytest.mark.parametrize("name", PEFT)
def test_peft_adapters(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, expected = PEFT[name]
    model = write_model_folder(tmp_path / "hf")
    damage(write_peft_folder(tmp_path / "a"))
    command = ["peft-to-mlx", str(tmp_path / "a"), str(tmp_path / "out"), "--model", str(model)]
    refused(command, tmp_path, expected, capsys)


def at(place: int, content: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:place] + content + data[place + len(content) :]


def in_table(offset: int, content: bytes) -> Callable[[bytes], bytes]:
    """Change the table's entry of a tensor: 4 bytes of dimensions, 8 for each of two, 4 of type, 8 of place."""

    def change(data: bytes) -> bytes:
        return at(data.index(b"token_embd.weight") + len("token_embd.weight") + offset, content)(data)

    return change


GGUF: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "cannot be read as GGUF"),
    "another file": (at(0, b"GGML"), "does not begin with that word"),
    "version 9": (at(4, struct.pack("<I", 9)), "version 9"),
    "2^60 tensors": (at(8, struct.pack("<Q", 2**60)), "more than it can hold"),
    "2^63 settings": (at(16, struct.pack("<Q", 2**63)), "more than it can hold"),
    "a key of 2^60 letters": (at(24, struct.pack("<Q", 2**60)), "more than it can hold"),
    "cut short": (lambda data: data[:-100], "cut short"),
    "cut in the settings": (lambda data: data[:900], "cannot be read as GGUF"),
    "a tensor past its end": (in_table(24, struct.pack("<Q", 2**40)), "cut short"),
    "a tensor of 2^59 columns": (in_table(4, struct.pack("<Q", 2**59)), "cut short"),
    "a type that is not known": (in_table(20, struct.pack("<I", 10)), "Q2_K"),
    "a type that does not exist": (in_table(20, struct.pack("<I", 999)), "999"),
}


@pytest.mark.parametrize("name", GGUF)
def test_gguf_files(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, expected = GGUF[name]
    path = write_gguf(tmp_path / "model.gguf")
    path.write_bytes(damage(path.read_bytes()))
    refused(["gguf", str(path), str(tmp_path / "out")], tmp_path, expected, capsys)


@pytest.mark.slow
def test_killed_at_20_moments_the_folder_is_not_there_or_verifies(tmp_path: Path) -> None:
    rng, source, target = random.Random(0), write_model_folder(tmp_path / "hf"), tmp_path / "out"
    command = [sys.executable, "-m", "orpo_mlx.cli.convert", "hf", str(source), str(target), "--overwrite"]
    subprocess.run(command, check=True)
    began = time.monotonic()
    subprocess.run(command, check=True)  # Once more, since the first reads every module from disk.
    whole = time.monotonic() - began
    shutil.rmtree(target)
    ids, there = mx.array([[3, 4, 5]]), 0
    for _ in range(20):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            time.sleep(rng.uniform(0.4 * whole, 0.95 * whole))  # Before that it has not found its modules yet.
            process.kill()
        if target.exists():
            there += 1
            assert mx.array_equal(load(str(target)).model(ids), make_model()(ids)).item()
            shutil.rmtree(target)
    print(f"there after {there} of 20 kills")
    subprocess.run(command, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["hf", "{}/nowhere", "{}/out"], "SRC"),
        (["hf", "{}/hf", "{}/no/such/out"], "a folder that exists"),
        (["hf", "{}/hf", "{}/out", "--bits", "8"], "does nothing without --quantize"),
        (["hf", "{}/hf", "{}/out", "--quantize", "--mode", "mxfp4", "--bits", "8"], "no other form"),
        (["hf", "{}/hf", "{}/out", "--quantize", "--group-size", "128"], "no layer's width"),
        (["peft-to-mlx", "{}/hf", "{}/out", "--model", "{}/hf"], "no adapter folder"),
        (["merge", "--model", "{}/hf", "--adapter-path", "{}/hf", "{}/out"], "no adapter folder"),
    ],
)
def test_commands(tmp_path: Path, command: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_model_folder(tmp_path / "hf")
    refused([word.format(tmp_path) for word in command], tmp_path, expected, capsys)
