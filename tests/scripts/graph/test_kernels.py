"""Launches, bytes and operations, by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from scripts.graph.count import Cost, counting
from scripts.graph.kernels import Work, _tiles, launches, work
from scripts.graph.walker import Node, zeros

F32, BF16 = mx.float32, mx.bfloat16


def counted(build: Callable[[], Any]) -> Cost:
    with counting() as cost:
        cost.add(build())
    return cost


def last(build: Callable[[], Any], name: str) -> Work:
    """The work of the only node called `name`."""
    (node,) = (node for node in counted(build).nodes if node.name == name)
    return work(node)


def test_a_product() -> None:
    one = last(lambda: zeros((4, 512, 128), BF16) @ zeros((4, 128, 256), BF16), "Matmul")
    assert (one.launches, one.dtype) == (1, "g2")
    assert one.flops == 2 * 4 * 512 * 128 * 256
    assert one.nbytes == 2 * 4 * (512 * 128 + 128 * 256 + 512 * 256)


def test_a_product_with_few_outputs_and_long_sums_is_split() -> None:
    # 2 x 1 tiles of 16 x 16, one of 32 x 32; 4096 / 16 = 256 steps, at most 32 parts.
    one = last(lambda: zeros((32, 4096), F32) @ zeros((4096, 8), F32), "Matmul")
    assert one.product is not None
    assert (one.launches, one.product.parts) == (2, 32)
    assert one.nbytes == 4 * (32 * 4096 + 4096 * 8 + 32 * 8) + 2 * 4 * 32 * 32 * 8
    assert last(lambda: zeros((32, 64), F32) @ zeros((64, 8), F32), "Matmul").launches == 1
    assert last(lambda: zeros((1, 4096), F32) @ zeros((4096, 8), F32), "Matmul").launches == 1


def test_a_quantised_product_reads_packed_weights() -> None:
    packed, scales = zeros((4096, 2048 // 8), mx.uint32), zeros((4096, 2048 // 64), BF16)
    one = last(lambda: mx.quantized_matmul(zeros((1024, 2048), BF16), packed, scales, scales), "QuantizedMatmul")
    assert (one.family, one.launches) == ("quantized products", 1)
    assert one.flops == 2 * 1024 * 2048 * 4096
    assert one.nbytes == 4 * 4096 * 256 + 2 * (2 * 4096 * 32 + 1024 * 2048 + 1024 * 4096)


def test_a_quantised_product_of_few_rows_is_split() -> None:
    packed, scales = zeros((256, 2048 // 8), mx.uint32), zeros((256, 2048 // 64), BF16)
    one = last(lambda: mx.quantized_matmul(zeros((64, 2048), BF16), packed, scales, scales), "QuantizedMatmul")
    # 2 x 8 threadgroups of 32 x 32, 512 wanted: 32 parts of 64 along 2048.
    assert one.product is not None
    assert (one.launches, one.product.parts) == (2, 32)


@pytest.mark.parametrize(
    ("build", "name", "expected"),
    [
        (lambda: mx.concatenate([zeros((2, 3), F32)] * 3), "Concatenate", 3),
        (lambda: mx.pad(zeros((2, 3), F32), 1), "Pad", 2),
        (lambda: mx.full((3,), mx.array(2.0)), "Full", 1),
        (lambda: zeros((4096,), F32).sum(), "Sum", 1),
        (lambda: zeros((4097,), F32).sum(), "Sum", 2),
        (lambda: zeros((300, 512), F32).sum(axis=1), "Sum", 1),
        (lambda: zeros((300, 512), F32).sum(axis=0), "Sum", 2),
        (lambda: zeros((200, 512), F32).sum(axis=0), "Sum", 1),
        (lambda: zeros((300, 65536), F32).sum(axis=0), "Sum", 1),
        (lambda: zeros((3, 4), F32).astype(BF16), "AsType", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_launches(build: Callable[[], Any], name: str, expected: int) -> None:
    assert last(build, name).launches == expected


def test_views_launch_nothing() -> None:
    cost = counted(lambda: mx.broadcast_to(zeros((6, 4), F32)[1:3].reshape(2, 2, 2)[None].T, (2, 2, 2, 5)))
    assert cost.nodes
    assert all(launches(node) == 0 for node in cost.nodes)


def test_gathered_rows_are_read_and_the_table_is_not() -> None:
    one = last(lambda: zeros((49152, 64), F32)[zeros((10,), mx.int32)], "Gather")
    assert one.nbytes == 2 * 10 * 64 * 4 + 10 * 4


def test_an_update_in_place_writes_what_it_changes() -> None:
    def build() -> mx.array:
        array = zeros((1000, 64), F32) * 1.0
        array[3:5] = zeros((2, 64), F32)
        return array

    assert last(build, "SliceUpdate").nbytes == 3 * 2 * 64 * 4


def test_attention_passes_over_what_is_hidden() -> None:
    q, k = zeros((2, 4, 100, 64), F32), zeros((2, 2, 300, 64), F32)

    def build(mask: str | None) -> Callable[[], Any]:
        return lambda: mx.fast.scaled_dot_product_attention(q, k, k, scale=1.0, mask=mask)

    full, causal = last(build(None), "Marker"), last(build("causal"), "Marker")
    assert (full.family, full.launches) == ("attention", 1)
    assert full.flops == 4 * 2 * 4 * 100 * 300 * 64
    assert causal.flops == pytest.approx(full.flops * (300 - 50) / 300)


def test_tiles_of_the_backward_of_attention() -> None:
    assert _tiles(1500, 2048, causal=False) == [1024 * 1024, 1024 * 1024, 476 * 1024, 476 * 1024]
    # The first query sees 549 keys, the 1024th 1572: the second column of tiles is seen by both rows.
    assert _tiles(1500, 2048, causal=True) == _tiles(1500, 2048, causal=False)
    assert _tiles(2048, 2048, causal=True) == [1024 * 1024] * 3


def test_a_norm_adds_up_the_gradient_of_its_weight() -> None:
    def launches_of(rows: int, *, weight: bool) -> int:
        x, w = zeros((rows, 64), F32), zeros((64,), F32) if weight else None

        def build() -> Any:
            return mx.grad(lambda x: mx.fast.rms_norm(x, w, 1e-5).sum())(x)

        return max(launches(node) for node in counted(build).nodes if node.name == "Marker" and node.kind % 2)

    assert launches_of(100, weight=True) == 2
    assert launches_of(300, weight=True) == 3
    assert launches_of(300, weight=False) == 1


def test_partial_rotation_copies_first() -> None:
    def one(dims: int) -> int:
        x = zeros((1, 2, 8, 64), F32)

        def build() -> mx.array:
            return mx.fast.rope(x, dims, traditional=False, base=1e4, scale=1.0, offset=0)

        return last(build, "Marker").launches

    assert (one(64), one(32)) == (1, 2)


def test_every_marker_has_its_work() -> None:
    q = zeros((1, 2, 16, 64), F32)
    x, w = zeros((4, 64), F32), zeros((64,), F32)

    def build() -> Any:
        norm = mx.grad(lambda x, w: mx.fast.layer_norm(x, w, w, 1e-5).sum(), argnums=(0, 1))(x, w)
        loss = mx.value_and_grad(lambda x: mx.fast.cross_entropy(x, zeros((4,), mx.int32)).sum())(x)
        heads = mx.value_and_grad(
            lambda q: mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0, mask="causal").sum()
        )(q)
        return norm, loss, heads

    found: list[Node] = [node for node in counted(build).nodes if node.name == "Marker"]
    assert {work(node).family for node in found} == {"norms and rope", "loss", "attention"}
    assert all(work(node).nbytes > 0 for node in found)
