"""What a device wants of the engine: every choice that differs between a CPU and a GPU, as data in one place.

The CPU's figures were measured on Linux with OpenBLAS; the GPU's follow from MLX's sources and from counting the graph
that a step builds (`scripts/graph_cost.py`), and are to be replaced by what Macs measure (`orpo-mlx doctor`).
"""

from __future__ import annotations

import os
import re
from functools import cache
from typing import NamedTuple

import mlx.core as mx

from orpo_mlx.errors import ConfigError
from orpo_mlx.package_versions import version_of

VARIABLE = "ORPO_MLX_PROFILE"
"""Environment variable that names a profile whatever the device is: the GPU's branches can be run on a CPU."""

FUSED_BACKWARD_SINCE = (0, 32, 4)
"""The first MLX whose attention has a fused backward pass on Metal; earlier ones make all scores under a gradient."""

GATED_DELTA_BACKWARD_SINCE = (0, 32, 4)
"""The first MLX whose gated delta rule has a kernel for its backward pass; 0.32.3 has the forward one alone."""


class RowLayout(NamedTuple):
    """How pairs become rows of token ids."""

    share_prompt: bool
    """Whether what a batch's prompts may share with their completions is run once."""
    multiple: int
    """Shared prompts are cut to multiples of this, so that shapes repeat."""
    row_multiple: int
    """Rows are padded to multiples of this."""
    joined: bool
    """Whether chosen and rejected completions are rows of one array, as long as the longer: half as many calls."""
    token_multiple: int
    """The number of predicted tokens is padded to multiples of this."""
    few_shapes: bool
    """Whether multiples grow with the length, so that few shapes are met."""
    padding_worth_a_batch: int
    """Tokens of padding that cost less than one more micro-batch does."""


class DeviceProfile(NamedTuple):
    """What one kind of device wants."""

    name: str
    """`cpu` or `gpu`."""
    native_attention: bool
    """Whether attention without an array mask is MLX's own, forward and backward."""
    attention_rows: int
    """Fewest query rows of a block of this package's attention."""
    attention_block_mib: int
    """Scores of one block, where that is more rows."""
    kept_attention: bool
    """Whether attention weights may be kept for the backward pass, as `--memory` says."""
    kept_width: float
    """Layers that run again do not compute linear layers' outputs of up to this many times their inputs' width: these
    are kept."""
    head_tile_rows: int
    head_tile_tokens: int
    """Rows and tokens of the logits that exist at one time under a frozen head."""
    head_chunk_mib: int
    """Float32 logits of one chunk of rows, where a head is trained or cannot be tiled."""
    micro_batch_tokens: int
    """Default of --micro-batch-tokens."""
    cache_share: float | None
    """Freed buffers that MLX may keep, as a share of the recommended working set; None leaves MLX's own limit."""
    polynomial_exp: bool
    """Whether e^x is this package's polynomial rather than MLX's function."""
    half_products: bool
    """Whether products of half-precision matrices are as fast as those of float32."""
    load_dtype: str | None
    """What a model's weights are converted to where --dtype is not given; None keeps the checkpoint's dtype."""
    native_gated_delta: bool
    """Whether the gated delta rule is MLX's kernel where it has one, forward and backward."""
    native_cross_entropy: bool
    """Whether log-probs of logits in one piece are MLX's kernel, which sums in float32."""
    most_traces: int
    """Shapes for which a compiled function is kept; beyond, the one that was used longest ago is dropped. 0: nothing is
    compiled."""
    handovers: int
    """Times that the device is given a part of a backward pass in segments while the host builds the rest; 0 evaluates
    each segment before the next is built."""
    layout: RowLayout

    @property
    def compiled(self) -> bool:
        """Whether a step's forward and backward pass, its norm and its update are compiled (`mx.compile`)."""
        return self.most_traces > 0


CPU = DeviceProfile(
    name="cpu",
    # MLX's own makes all scores at once on a CPU, and keeps them for the backward pass.
    native_attention=False,
    # Blocks whose scores stay in a core's cache.
    attention_rows=32,
    attention_block_mib=2,
    kept_attention=True,
    # Memory is all that running layers again is for, where a step is bound by its products.
    kept_width=0.0,
    # 2 MiB of logits: they are read again while they are in the cache.
    head_tile_rows=256,
    head_tile_tokens=2048,
    head_chunk_mib=4,
    # Larger ones take more memory and gain no time on a CPU.
    micro_batch_tokens=1024,
    cache_share=None,
    polynomial_exp=True,
    # No BLAS has them: MLX's own loops take thirty times as long as float32's, conversions included.
    half_products=False,
    load_dtype="float32",
    native_gated_delta=False,
    # There it sums in the logits' dtype, and in one level.
    native_cross_entropy=False,
    # MLX compiles CPU kernels with the system's C++ compiler, about a second each, and gains nothing here.
    most_traces=0,
    handovers=0,
    # Nothing is compiled, so shapes need not repeat, and padding is work.
    layout=RowLayout(
        share_prompt=True,
        multiple=1,
        row_multiple=8,
        joined=False,
        token_multiple=1,
        few_shapes=False,
        padding_worth_a_batch=128,
    ),
)

GPU = DeviceProfile(
    name="gpu",
    native_attention=True,
    # Where MLX's cannot be taken: fewer, larger blocks, since each costs launches.
    attention_rows=512,
    attention_block_mib=64,
    kept_attention=False,
    # Keys and values where several query heads share a key head, and what narrows attention's output again; queries and
    # gates are as wide as what they are made of, or wider.
    kept_width=0.75,
    head_tile_rows=1024,
    head_tile_tokens=16384,
    head_chunk_mib=128,
    micro_batch_tokens=4096,
    # A limit below what a step frees and takes again would make every step allocate anew; MLX itself frees what is kept
    # before it goes beyond the working set.
    cache_share=0.5,
    polynomial_exp=False,
    half_products=True,
    load_dtype=None,
    native_gated_delta=True,
    native_cross_entropy=True,
    # Real lengths come in hundreds of shapes, most of which are met a few times and never compiled. A trace holds a
    # graph, not arrays.
    most_traces=32,
    handovers=2,
    # Metal's matrix kernels work on tiles of 32 rows or more: padding up to there costs nothing that was not idle.
    layout=RowLayout(
        share_prompt=True,
        multiple=32,
        row_multiple=32,
        joined=True,
        token_multiple=128,
        few_shapes=True,
        # Reckoned: a micro-batch is some thousands of dispatches, whatever it holds.
        padding_worth_a_batch=512,
    ),
)

PROFILES = {profile.name: profile for profile in (CPU, GPU)}


def device_profile() -> DeviceProfile:
    """The profile of MLX's default device, or the one that `ORPO_MLX_PROFILE` names.

    Raises:
        ConfigError: the variable names no profile.
    """
    named = os.environ.get(VARIABLE)
    if named is None:
        named = "cpu" if mx.default_device() == mx.Device(mx.cpu) else "gpu"
    if named not in PROFILES:
        raise ConfigError(f"{VARIABLE}: found {named!r}, expected one of {', '.join(PROFILES)}, or leave it unset.")
    profile = PROFILES[named]
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    return profile._replace(
        native_attention=profile.native_attention and mlx_version() >= FUSED_BACKWARD_SINCE,
        # Elsewhere these run token by token, and in the logits' dtype.
        native_gated_delta=profile.native_gated_delta
        and on_gpu
        and mx.metal.is_available()
        and mlx_version() >= GATED_DELTA_BACKWARD_SINCE
        and hasattr(mx.fast, "gated_delta_update"),
        native_cross_entropy=profile.native_cross_entropy and on_gpu and hasattr(mx.fast, "cross_entropy"),
    )


@cache
def mlx_version() -> tuple[int, ...]:
    """MLX's version as numbers: 0.32.4 is (0, 32, 4)."""
    return tuple(map(int, re.findall(r"\d+", version_of("mlx"))[:3]))
