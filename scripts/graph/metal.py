"""Builds, on any machine, the graph that MLX builds for a Mac's GPU.

`mx.fast` decides by the stream's device between one fused primitive and a dozen plain ones; a build without a GPU takes
the plain ones. In `metal_graph` these functions leave a marker instead, which the walker reports as one node with the
inputs and outputs of the fused primitive. Sources: MLX's mlx/fast.cpp and mlx/backend/metal/*.cpp (0.32.2, the newest
published), the headers of 0.32.4, and for its fused backward of attention its behaviour.

A marker is `mx.depends(outputs, [*inputs, tag])`: a primitive that `mx.compile` neither fuses nor drops, with an array
as its tag whose shape says which primitive it stands for. Where the numbers are wanted, the outputs are MLX's plain
ones, computed behind the marker and not counted; where not, they are arrays that take no memory.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import mlx.core as mx

from scripts.graph.walker import TAG, zeros

KINDS = (
    "RMSNorm",
    "RMSNormVJP",
    "LayerNorm",
    "LayerNormVJP",
    "RoPE",
    "ScaledDotProductAttention",
    "ScaledDotProductAttentionVJP",
    "CrossEntropy",
    "CrossEntropyVJP",
    "GatedDeltaUpdate",
    "GatedDeltaUpdateVJP",
    "CustomKernel",
)
"""MLX's names of what a marker can stand for."""

FULL_HEAD_DIMS = (64, 72, 80, 96, 128, 192, 256)
VECTOR_HEAD_DIMS = (64, 96, 128, 192, 256)
MOST_VECTOR_QUERIES = 8
"""Rows of queries up to which Metal's attention runs its vector kernel, and queries times queries per key head up to
which it can: scaled_dot_product_attention.cpp, `has_fused_kernel`."""
MOST_VECTOR_WORK = 32

LSE_ERROR = (
    "[scaled_dot_product_attention] the vector kernels do not produce a logsumexp; the VJP path requires the "
    "full-attention kernel."
)

Arrays = Sequence[mx.array]
Forms = Sequence[tuple[tuple[int, ...], mx.Dtype]]
Function = Callable[..., Any]


@contextmanager
def replaced(owner: Any, **functions: Any) -> Iterator[None]:
    """Give `owner` other attributes, and every loaded module that holds one of the old ones under some name."""
    undo: list[tuple[Any, str, Any]] = []
    by_id = {id(getattr(owner, name)): new for name, new in functions.items()}
    try:
        for name, new in functions.items():
            undo.append((owner, name, getattr(owner, name) if name in vars(owner) else None))
            setattr(owner, name, new)
        for module in list(sys.modules.values()) if owner in (mx, mx.fast) else []:
            if module is owner or module is sys.modules[__name__]:
                continue
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if id(value) in by_id:
                    undo.append((module, name, value))
                    setattr(module, name, by_id[id(value)])
        yield
    finally:
        for place, name, value in reversed(undo):
            if value is None:
                delattr(place, name)  # Inherited.
            else:
                setattr(place, name, value)


class GradientDepth:
    """Whether a gradient is being taken, as MLX's `in_grad_tracing`: all the time that `mx.vjp` and the like run."""

    def __init__(self) -> None:
        self.depth = 0

    def within(self, function: Function) -> Function:
        """`function`, known to take a gradient while it runs."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1

        return run

    def made_by(self, transform: Function) -> Function:
        """`mx.grad` or `mx.value_and_grad`, whose results take the gradient."""
        return lambda *args, **kwargs: self.within(transform(*args, **kwargs))


@contextmanager
def metal_graph(*, evaluate: bool = False) -> Iterator[None]:
    """Let what is built inside be built as for Metal; with `evaluate`, it can be evaluated too.

    A function that was compiled before has the plain primitives in its trace, and one that is compiled inside keeps the
    markers. A function of `mx.grad` or `mx.value_and_grad` should be made inside.
    """
    fast = Fast(evaluate)
    gradient = fast.gradient
    with ExitStack() as stack:
        functions = {name: getattr(fast, name) for name in Fast.names if hasattr(mx.fast, name)}
        stack.enter_context(replaced(mx.fast, **functions))
        whole = {"vjp": gradient.within(mx.vjp), "jvp": gradient.within(mx.jvp)}
        made = {"grad": gradient.made_by(mx.grad), "value_and_grad": gradient.made_by(mx.value_and_grad)}
        stack.enter_context(replaced(mx, **whole, **made, default_device=lambda: mx.Device(mx.gpu)))
        stack.enter_context(replaced(mx.metal, is_available=lambda: True))
        yield


class Fast:
    """The functions of `mx.fast`, as they build their graphs for Metal; arguments and results are theirs."""

    names = (
        "rms_norm",
        "layer_norm",
        "rope",
        "scaled_dot_product_attention",
        "cross_entropy",
        "gated_delta_update",
        "metal_kernel",
    )

    def __init__(self, evaluate: bool) -> None:
        self.evaluate = evaluate
        self.gradient = GradientDepth()
        self.plain: dict[str, Function] = {
            name: getattr(mx.fast, name) for name in self.names if hasattr(mx.fast, name)
        }
        self._vjp: Function = mx.vjp

    def rms_norm(self, x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
        """x / √(mean(x²) + eps) · weight over the last axis."""
        plain = self.plain["rms_norm"]
        weights = [] if weight is None else [weight]
        return self._norm("RMSNorm", [x, *weights], lambda x, *w: plain(x, *(w or [None]), eps))

    def layer_norm(self, x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float, **_: Any) -> mx.array:
        """(x - mean) / √(variance + eps) · weight + bias over the last axis."""
        plain = self.plain["layer_norm"]
        given = [array for array in (weight, bias) if array is not None]

        def run(x: mx.array, *arrays: mx.array) -> mx.array:
            left = list(arrays)
            scale = left.pop(0) if weight is not None else None
            result: mx.array = plain(x, scale, left.pop(0) if bias is not None else None, eps)
            return result

        return self._norm("LayerNorm", [x, *given], run)

    def _norm(self, kind: str, arrays: list[mx.array], plain: Function) -> mx.array:
        dtype = mx.result_type(*arrays)
        inputs = [array.astype(dtype) for array in arrays]
        backward = self._backward(f"{kind}VJP", plain)
        return self._fused(kind, inputs, [(inputs[0].shape, dtype)], plain, backward)[0]

    def rope(
        self,
        a: mx.array,
        dims: int,
        *,
        offset: int | mx.array,
        freqs: mx.array | None = None,
        **options: Any,
    ) -> mx.array:
        """Rotary positions; the gradient is the same primitive, turning the other way."""
        plain = partial(self.plain["rope"], dims=dims, offset=offset, freqs=freqs, **options)
        rest = [offset if isinstance(offset, mx.array) else _leaf((), mx.int32)]
        rest += [] if freqs is None else [freqs.astype(mx.float32)]
        detail = int(dims < a.shape[-1])

        def backward(primals: Arrays, cotangents: Arrays, _outputs: Arrays) -> list[mx.array]:
            # The rotation is linear: what was turned does not matter.
            turned = _leaf(primals[0].shape, primals[0].dtype)

            def back(cotangent: mx.array, *_: mx.array) -> Arrays:
                return self._gradients(plain, [turned], [cotangent])

            return self._marker("RoPE", _forms(cotangents), [cotangents[0], *rest], back, detail)

        return self._fused("RoPE", [a], _forms([a]), plain, backward, rest=rest, detail=detail)[0]

    def scaled_dot_product_attention(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        mask: Any = None,
        sinks: mx.array | None = None,
        force_fused: bool = False,
        **options: Any,
    ) -> mx.array:
        """softmax(scale · q kᵀ + mask) v.

        Raises:
            RuntimeError: MLX would choose a kernel that cannot give what the gradient needs.
        """
        plain = partial(self.plain["scaled_dot_product_attention"], mask=mask, sinks=sinks, **options)
        training = self.gradient.depth > 0
        if not (force_fused or is_fused(q, k, v, mask, sinks, training=training)):
            result: mx.array = plain(q, k, v)
            return result
        if training and is_vector(q, k, v):
            raise RuntimeError(LSE_ERROR)
        dtype = mx.result_type(q, k, v)
        # A gradient needs the log-sum-exp of each row of scores, which the forward then gives as a second output.
        forms = [((*q.shape[:3], v.shape[-1]), dtype), ((*q.shape[:3], 1), mx.float32)][: 1 + training]
        rest = [mx.broadcast_to(mask, (*q.shape[:3], k.shape[2]))] if isinstance(mask, mx.array) else []
        rest += [] if sinks is None else [sinks.astype(dtype)]
        detail = int(isinstance(mask, str))

        def with_sums(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
            return [plain(q, k, v), _leaf((*q.shape[:3], 1), mx.float32)][: len(forms)]

        def backward(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
            if rest:
                raise RuntimeError("metal_graph: make the gradient's function inside it; outside, it is not seen.")

            def back(q: mx.array, k: mx.array, v: mx.array, *given: mx.array) -> Arrays:
                return self._gradients(plain, [q, k, v], [given[-1]])

            inputs = [*primals, *outputs, cotangents[0]]
            return self._marker("ScaledDotProductAttentionVJP", _forms(primals), inputs, back, detail)

        inputs = [array.astype(dtype) for array in (q, k, v)]
        kind = "ScaledDotProductAttention"
        return self._fused(kind, inputs, forms, with_sums, backward, rest=rest, detail=detail)[0]

    def cross_entropy(self, logits: mx.array, targets: mx.array, **_: Any) -> mx.array:
        """logsumexp(logits) - logits[target] in float32, without writing the logits again."""
        plain = self.plain["cross_entropy"]
        form = [(targets.shape, mx.float32)]

        def run(logits: mx.array, *_: mx.array) -> Any:
            return plain(logits, targets).astype(mx.float32)

        backward = self._backward("CrossEntropyVJP", run, rest=[targets])
        return self._fused("CrossEntropy", [logits], form, run, backward, rest=[targets])[0]

    def gated_delta_update(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        gamma: mx.array,
        beta: mx.array,
        initial_state: mx.array | None = None,
        mask: mx.array | None = None,
        **_: Any,
    ) -> list[mx.array]:
        """The gated delta rule over chunks; fused without a mask, for heads of 128 (of heads, a guess)."""
        plain = self.plain["gated_delta_update"]
        heads, dims = (k.shape[2], v.shape[2]), (k.shape[3], v.shape[3])
        given = [q, k, v, gamma, beta, *([] if initial_state is None else [initial_state])]
        if mask is not None or dims != (128, 128) or heads[1] % heads[0]:
            return list(plain(*given, mask=mask))
        backward = self._backward("GatedDeltaUpdateVJP", plain)
        return self._fused("GatedDeltaUpdate", given, _forms(plain(*given)), plain, backward)

    def metal_kernel(self, *_args: Any, **_kwargs: Any) -> Function:
        """A kernel in Metal's language, which only a Mac can run: one launch, known by its inputs and outputs."""

        def refuse(*_: mx.array) -> list[mx.array]:
            raise RuntimeError("metal_graph: a kernel of mx.fast.metal_kernel can be counted, not evaluated.")

        def kernel(*, inputs: Sequence[Any], output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            arrays = [array for array in inputs if isinstance(array, mx.array)]
            return self._marker("CustomKernel", list(zip(output_shapes, output_dtypes, strict=True)), arrays, refuse)

        return kernel

    def _fused(
        self,
        kind: str,
        inputs: Arrays,
        forms: Forms,
        plain: Function,
        backward: Function,
        *,
        rest: Arrays = (),
        detail: int = 0,
    ) -> list[mx.array]:
        """A marker of `inputs`, which have gradients by `backward`, and of `rest`, which have none."""

        def run(*arrays: mx.array) -> list[mx.array]:
            return self._marker(kind, forms, [*arrays, *rest], lambda *all_: plain(*all_[: len(arrays)]), detail)

        def run_vjp(primals: Any, cotangents: Any, outputs: Any) -> list[mx.array]:
            found: list[mx.array] = backward(*map(_listed, (primals, cotangents, outputs)))
            return found

        function: Any = mx.custom_function(run)
        function.vjp(run_vjp)
        outputs: list[mx.array] = function(*inputs)
        return outputs

    def _backward(self, kind: str, plain: Function, rest: Arrays = ()) -> Function:
        """The gradient by one primitive, from the inputs and the outputs' gradients."""

        def backward(primals: Arrays, cotangents: Arrays, _outputs: Arrays) -> list[mx.array]:
            def back(*given: mx.array) -> Arrays:
                return self._gradients(plain, given[: len(primals)], given[-len(cotangents) :])

            return self._marker(kind, _forms(primals), [*primals, *rest, *cotangents], back)

        return backward

    def _gradients(self, plain: Function, primals: Arrays, cotangents: Arrays) -> list[mx.array]:
        found: list[mx.array] = self._vjp(plain, list(primals), list(cotangents))[1]
        return found

    def _marker(self, kind: str, forms: Forms, inputs: Arrays, plain: Function, detail: int = 0) -> list[mx.array]:
        """Arrays of the given shapes and dtypes that stand for outputs of the fused primitive `kind`."""
        tag = _leaf((TAG, 1 + KINDS.index(kind), 1 + detail, 1), mx.uint8)
        behind = _listed(plain(*inputs)) if self.evaluate else [_leaf(tuple(shape), dtype) for shape, dtype in forms]
        outputs: list[mx.array] = mx.depends(behind, [*inputs, tag])
        return outputs


def is_vector(q: mx.array, k: mx.array, v: mx.array) -> bool:
    """Whether Metal's vector kernel runs this attention: few queries."""
    queries, keys, heads = q.shape[2], k.shape[2], (q.shape[3], v.shape[3])
    fits = (heads[0] == heads[1] and heads[0] in VECTOR_HEAD_DIMS) or heads == (192, 128)
    few = queries <= MOST_VECTOR_QUERIES and queries * (q.shape[1] // k.shape[1]) <= MOST_VECTOR_WORK
    return fits and few and queries <= keys


def is_fused(q: mx.array, k: mx.array, v: mx.array, mask: Any, sinks: mx.array | None, *, training: bool) -> bool:
    """Whether MLX 0.32.4 runs this attention as one primitive on Metal.

    While a gradient is taken, it does for none and causal masks, with a backward of its own; with sinks it is taken not
    to (a guess: the published sources have no fused backward yet).
    """
    queries, heads = q.shape[2], (q.shape[3], v.shape[3])
    if mx.result_type(q, k, v) not in (mx.float32, mx.float16, mx.bfloat16):
        return False
    if training and (isinstance(mask, mx.array) or sinks is not None):
        return False
    if queries <= MOST_VECTOR_QUERIES:
        return is_vector(q, k, v) and (training or heads != (192, 192))
    too_short = isinstance(mask, str) and queries > k.shape[2]
    if heads[0] != heads[1] or heads[0] not in FULL_HEAD_DIMS or too_short:
        return False
    # Where no gradient is taken, wide heads are faster unfused (`use_fallback`; M5 has an exception of its own).
    return training or heads[0] not in (192, 256)


def _forms(arrays: Arrays) -> Forms:
    return [(array.shape, array.dtype) for array in arrays]


def _listed(arrays: Any) -> list[mx.array]:
    return list(arrays) if isinstance(arrays, (list, tuple)) else [arrays]


@functools.lru_cache(maxsize=1 << 12)
def _leaf(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return zeros(shape, dtype)
