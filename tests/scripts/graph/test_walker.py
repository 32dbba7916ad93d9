"""Graphs whose primitives are known."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from orpo_mlx.errors import UserError
from scripts.graph import walker
from scripts.graph.walker import Operand, Walker, zeros


@pytest.fixture
def counter() -> Walker:
    made = Walker()
    made.forget()
    return made


def test_primitives_with_shapes_and_dtypes(counter: Walker) -> None:
    a, b = zeros((3, 4), mx.bfloat16), zeros((4, 5), mx.bfloat16)
    nodes = counter.walk([mx.exp(a @ b + 1.0)])
    by_name = {node.name: node for node in nodes}
    assert nodes.total() == 4
    assert set(by_name) == {"Matmul", "Broadcast", "Add", "Exp"}
    assert by_name["Matmul"].inputs == (Operand("g2", (3, 4), 12), Operand("g2", (4, 5), 20))
    assert by_name["Exp"].outputs == (Operand("g2", (3, 5), 15),)


def test_a_broadcast_is_stored_once(counter: Walker) -> None:
    nodes = counter.walk([zeros((8, 16), mx.float32) + zeros((16,), mx.float32)])
    (add,) = (node for node in nodes if node.name == "Add")
    assert [operand.stored for operand in add.inputs] == [128, 16]
    assert [operand.nbytes for operand in add.inputs] == [512, 64]


def test_each_node_is_counted_once(counter: Walker) -> None:
    shared = mx.exp(zeros((2,), mx.float32))
    assert counter.walk([mx.sin(shared), mx.cos(shared)]).total() == 3
    assert counter.walk([shared * 2.0]).total() == 2  # With the broadcast of 2.
    counter.forget()
    assert counter.walk([shared]).total() == 1


def test_siblings_are_one_node(counter: Walker) -> None:
    parts = mx.split(mx.exp(zeros((4,), mx.float32)), 2)
    nodes = counter.walk(parts)
    assert nodes.total() == 2
    assert [len(node.outputs) for node in nodes if node.name == "Split"] == [2]


def test_what_is_evaluated_ends_the_graph(counter: Walker) -> None:
    array = mx.exp(mx.ones((2,)))
    assert counter.is_pending(array)
    assert not counter.is_evaluated(array)
    mx.eval(array)
    assert counter.walk([array + array]).total() == 1
    assert counter.is_evaluated(array)


def test_zeros_of_any_size_take_no_memory() -> None:
    before = mx.get_active_memory()
    large = zeros((1 << 20, 1 << 20), mx.float16)
    assert large.shape == (1 << 20, 1 << 20)
    assert mx.get_active_memory() - before < 1024
    assert mx.array_equal(zeros((2, 3), mx.int32), mx.zeros((2, 3), mx.int32)).item()


@pytest.mark.parametrize(
    ("compiler", "said"), [("", "found no C++ compiler"), ("false", "cannot compile"), ("/nowhere", "cannot be run")]
)
def test_without_a_compiler_it_says_so(
    compiler: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=said.replace("+", r"\+")) as caught:
        walker._compile(tmp_path / "walker.so")
    assert "\n" not in str(caught.value)


def test_the_library_is_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def compile_one(target: Path) -> None:
        target.write_bytes(b"a library")
        made.append(target)

    monkeypatch.setattr(walker, "_compile", compile_one)
    kept = walker._compiled()
    assert walker._compiled() == kept
    assert len(made) == 1
    assert list((own_cache / "graph_cost").iterdir()) == [kept]
