"""Small models and data that the tests make themselves."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

import tests.helpers.blas_threads  # noqa: F401  (before a BLAS is loaded)

# isort: split
import orpo_mlx  # noqa: F401  (loads a BLAS before mlx)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from orpo_mlx.types import TokenizedPair
from tests.helpers.compile_without_kernels import fuse_nothing
from tests.helpers.thinned import EVERY_NTH, TOGETHER, WITH_THE_SLOW

fuse_nothing()

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"

SMALL = {
    "batch_size": 2,
    "iters": 3,
    "samples": 0,
    "steps_per_report": 1,
    "learning_rate": 1e-3,
    "memory_check": False,
    "report": False,
}

SPLITS = {"train": 0, "valid": 1, "test": 2}
"""Seeds of the pairs of each."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|start|>", "<|end|>")
VOCABULARY = 256 + len(SPECIAL_TOKENS)

_GEMMA4 = {
    "model_type": "gemma4_text",
    "head_dim": 16,
    "global_head_dim": 16,
    "rms_norm_eps": 1e-6,
    "sliding_window": 6,
    "sliding_window_pattern": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "head_dim": 16},
    "mistral": {"model_type": "mistral", "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    "gemma2": {
        "model_type": "gemma2",
        "rms_norm_eps": 1e-6,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 10.0,
    },
    "phi3": {
        "model_type": "phi3",
        "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 256,
        "partial_rotary_factor": 1.0,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5},
    "sliding": {
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 6,
    },
    # Wrapped, as in vision-language checkpoints.
    "gemma3": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "head_dim": 16,
            "rms_norm_eps": 1e-6,
            "query_pre_attn_scalar": 16,
            "sliding_window": 6,
            "sliding_window_pattern": 2,
        },
    },
    # Layers that return keys and values beside states; the last two take those of the first two.
    "gemma4": {"model_type": "gemma4", "text_config": {**_GEMMA4, "num_kv_shared_layers": 0}},
    "gemma4_shared": {
        "model_type": "gemma4",
        "text_config": {
            **_GEMMA4,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
    },
    # A recurrent layer and one of attention.
    "qwen3_5": {
        "model_type": "qwen3_5",
        "text_config": {
            "model_type": "qwen3_5_text",
            "head_dim": 16,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "partial_rotary_factor": 0.5,
            "full_attention_interval": 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_conv_kernel_dim": 4,
        },
    },
    "gemma": {"model_type": "gemma", "rms_norm_eps": 1e-6, "head_dim": 16, "hidden_act": "gelu_pytorch_tanh"},
    "mamba": {
        "model_type": "mamba",
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
}

PROVABLE = [kind for kind in CONFIGS if kind != "mamba"]
"""Kinds whose head can be told apart; mlx-lm's Mamba has it in its backbone."""


def make_model(kind: str = "llama", *, seed: int = 0, vocabulary: int = VOCABULARY) -> nn.Module:
    """A small random model of a kind named in `CONFIGS`."""
    model_class, args_class = _get_classes(model_config(kind, vocabulary))
    mx.random.seed(seed)
    model: nn.Module = model_class(args_class.from_dict(model_config(kind, vocabulary)))
    # Larger weights than the default initialiser's, so that logits and gradients are far from trivial.
    model.update_modules({})
    model.load_weights([(name, 3 * value if value.ndim == 2 else value) for name, value in _flat(model)], strict=False)
    mx.eval(model.parameters())
    model.freeze()
    model.eval()
    return model


def quantise(model: nn.Module) -> None:
    """Four bits where the width allows it."""
    nn.quantize(
        model,
        group_size=32,
        bits=4,
        class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0,
    )


def model_config(kind: str, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """The config.json of such a model."""
    common = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "eos_token_id": 258,
    }
    own = CONFIGS[kind]
    inner = own.get("text_config")
    if inner is None:
        return {**common, **own}
    return {**own, "vocab_size": vocabulary, "text_config": {**common, **inner}}


def make_pairs(
    count: int = 6, *, seed: int = 0, vocabulary: int = VOCABULARY, longest: int = 12
) -> list[TokenizedPair]:
    """Random pairs of unequal lengths; the first has a one-token prompt, the second a one-token completion."""
    rng = np.random.default_rng(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(int(token) for token in rng.integers(1, vocabulary, length))

    pairs = []
    for number in range(count):
        prompt, chosen, rejected = (int(length) for length in rng.integers(2, longest, 3))
        pairs.append(
            TokenizedPair(
                ids(1 if number == 0 else prompt), ids(1 if number == 1 else chosen), ids(rejected), f"made:{number}"
            )
        )
    return pairs


def make_tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges: one token per byte, after the special tokens' bytes."""
    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def write_model_folder(
    folder: Path, kind: str = "llama", *, tokenizer: bool = True, template: str = CHAT_TEMPLATE
) -> Path:
    """A model folder as mlx-lm reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(kind)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(_flat(model)))
    (folder / "config.json").write_text(json.dumps(model_config(kind)))
    if tokenizer:
        make_tokenizer().save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|end|>",
            "pad_token": "<|pad|>",
            "chat_template": template,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_id_rows(path: Path, pairs: list[TokenizedPair]) -> Path:
    """A JSONL file of token-id rows."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return write_rows(path, [{name: list(getattr(pair, name)) for name in names} for pair in pairs])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test keeps its reference log-probs in a folder of its own, never in the user's."""
    monkeypatch.setenv("ORPO_MLX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tokenizer and a chat template."""
    return write_model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference files that lie beside some checkouts; tests that need them are left out elsewhere."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared beside this checkout")
    return SHARED


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split, seed in SPLITS.items():
        write_id_rows(tmp_path / "data" / f"{split}.jsonl", make_pairs(6, seed=seed))
    return tmp_path / "data"


@pytest.fixture
def settings(tmp_path: Path, data: Path, model_folder: Path) -> dict[str, Any]:
    return {**SMALL, "model": str(model_folder), "data": str(data), "adapter_path": str(tmp_path / "adapters")}


def _flat(model: nn.Module) -> list[tuple[str, mx.array]]:
    return [(str(name), value) for name, value in dict(tree_flatten(model.parameters())).items()]


def pytest_configure(config: pytest.Config) -> None:
    """Interrupts and hangups reach the tests' processes, whatever the shell that started pytest has switched off; and
    none of these waits for the disk, as a training run does a dozen times: no test ends by a power cut."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    # As `fsync` does, it raises where the file is not open. Processes that tests start have the real one.
    patch.setattr(os, "fsync", os.fstat)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of one file run in one process, and so do all that share a fixture which takes long to make."""
    from xdist.scheduler import LoadFileScheduling

    class LoadSharing(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((group for start, group in TOGETHER.items() if nodeid.startswith(start)), nodeid.split("::")[0])

    return LoadSharing(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays to the end, half a million objects that the garbage collector need not go
    through again and again: not while they are made, and not whenever a test has it run to measure memory."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


_met: Counter[str] = Counter()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Of tests with many cases of one shape every n-th runs in the suite, and all of them with `-m slow`."""
    name = item.nodeid.split("::")[-1].partition("[")[0]
    every = EVERY_NTH.get(name, 1)
    if _met[name] % every or name in WITH_THE_SLOW:
        item.add_marker(pytest.mark.slow)
    _met[name] += 1


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have pictures that nobody can see: a second of drawing each, where a test looks at the words alone."""
    for module in ("compare.report", "reporting.run_report", "rounds.report"):
        monkeypatch.setattr(f"orpo_mlx.{module}.png", lambda *_, **__: b"\x89PNG\r\n\x1a\n")


@pytest.fixture(scope="session")
def taught_adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of adapters with which the tiny model says what `tests.helpers.tuned_adapters` has taught it."""
    from tests.helpers.tuned_adapters import tuned_adapters

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORPO_MLX_CACHE", "off")
        return tuned_adapters(tmp_path_factory.mktemp("taught"), model_folder)


@pytest.fixture(scope="session")
def short_run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of three steps has left, for tests that copy it; its data stay where they are."""
    from tests.helpers.quiet_training import run_quietly

    folder = tmp_path_factory.mktemp("short")
    for split, seed in SPLITS.items():
        write_id_rows(folder / "data" / f"{split}.jsonl", make_pairs(6, seed=seed))
    paths = {"model": str(model_folder), "data": str(folder / "data"), "adapter_path": str(folder / "adapters")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORPO_MLX_CACHE", "off")
        run_quietly({**SMALL, **paths})
    return folder / "adapters"


@pytest.fixture
def run_of_three_steps(short_run: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return shutil.copytree(short_run, tmp_path / "adapters", symlinks=True)


@pytest.fixture(scope="session")
def comparison(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of tiny trainings, on data whose texts would like to be markup; its output folder."""
    from tests.helpers.small_comparison import run_comparison

    return run_comparison(tmp_path_factory.mktemp("comparison"), model_folder)
