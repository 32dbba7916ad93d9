"""Whatever stands in a file, a user gets a sentence and never a traceback.

The suite tries some hundreds of inputs; `python -m pytest -m slow tests/promises/test_fuzz.py` tries 20,000.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orpo_mlx.config.checks import make_config
from orpo_mlx.config.command_line import read_config_file
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.data.pairs import Reading, load_pairs
from orpo_mlx.data.splits import Lengths
from orpo_mlx.data.tokens.tokenization import PairTokenizer
from orpo_mlx.data.tokens.truncation import fit
from orpo_mlx.errors import UserError
from orpo_mlx.models.adapters import adapter_weights, add_trained_adapters, load_adapter_file
from orpo_mlx.training.checkpoints.folders import CheckpointFolder, defect, whole_checkpoints, write_checkpoint
from orpo_mlx.training.checkpoints.resume import settings_to_resume
from orpo_mlx.training.checkpoints.state import read_state
from orpo_mlx.training.optimizers import make_optimizer
from orpo_mlx.types import TokenizedPair
from tests.conftest import make_model
from tests.training.checkpoints.test_resume import LONG, interrupted

SUITE, NIGHT = 60, 4_000
COUNTS = [SUITE, pytest.param(NIGHT, marks=pytest.mark.slow)]

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
NAMES = ["prompt", "chosen", "rejected", "messages", "role", "content", "prompt_ids", "chosen_ids", "rejected_ids"]
NAMES += ["question", "score_chosen", "completions", "tools", "rank", "scale", "files", "step", "sha256", "bytes"]
NAMES += ["system", "tool_calls", "function_call", "function", "arguments", "functions", "parameters", "from", "value"]
NAMES += ["chat_template_kwargs", "history", "label", "completion", "input", "preferred_output", "rejected_response"]
KEYS = st.sampled_from(NAMES) | st.text(max_size=6)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=12
)


def fuzz(count: int, strategy: st.SearchStrategy[Any], body: Callable[[Any], object]) -> None:
    """Try `body` on `count` inputs; a sentence for the user is what it may raise."""

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count == SUITE,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def attempt(value: Any) -> None:
        with contextlib.suppress(UserError):
            body(value)

    attempt()


def changed(whole: Any) -> st.SearchStrategy[Any]:
    """A JSON value with one place of it replaced, or removed."""
    places: list[tuple[Any, ...]] = []

    def walk(value: Any, path: tuple[Any, ...]) -> None:
        places.append(path)
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            walk(inner, (*path, key))

    walk(whole, ())

    def replace(path: tuple[Any, ...], new: Any, remove: bool) -> Any:
        copy = json.loads(json.dumps(whole))
        if not path:
            return new
        inner = copy
        for key in path[:-1]:
            inner = inner[key]
        if remove:
            del inner[path[-1]]
        else:
            inner[path[-1]] = new
        return copy

    return st.builds(replace, st.sampled_from(places), VALUES, st.booleans())


def texts(values: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """JSON of `values`, and now and then any bytes at all."""
    return st.one_of(values.map(lambda value: json.dumps(value).encode()), st.binary(max_size=60))


@pytest.mark.parametrize("count", COUNTS)
def test_the_config_file(tmp_path: Path, count: int) -> None:
    path = tmp_path / "config.yaml"
    names = list(TrainingConfig().settings())
    tables = st.dictionaries(st.sampled_from(names) | KEYS, VALUES, max_size=4)
    documents = tables.map(lambda table: yaml.safe_dump(table).encode()) | texts(tables)

    def body(content: bytes) -> None:
        path.write_bytes(content)
        make_optimizer(make_config(read_config_file(path)))

    fuzz(count, documents, body)


@pytest.mark.parametrize("count", COUNTS)
def test_data_rows(tmp_path: Path, model_folder: Path, count: int) -> None:
    from mlx_lm.utils import load_tokenizer

    tokenizer = PairTokenizer(load_tokenizer(model_folder))
    path = tmp_path / "rows.jsonl"
    turns = st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]) | SCALARS, "content": SCALARS}),
        max_size=3,
    )
    # As JSON in a text too, which is how tables hold them.
    sides = st.text(max_size=8) | turns | VALUES | (turns | VALUES).map(json.dumps)
    good = st.fixed_dictionaries({"prompt": sides, "chosen": sides, "rejected": sides})
    other = st.dictionaries(KEYS, VALUES | sides, max_size=5)
    rows = st.lists(
        texts(good | other | st.tuples(good, other).map(lambda both: {**both[0], **both[1]})), min_size=1, max_size=3
    )

    def body(lines: list[bytes]) -> None:
        path.write_bytes(b"\n".join(lines))
        pairs = load_pairs(path, Reading())
        for outcome in tokenizer.each(pairs):
            if isinstance(outcome, TokenizedPair):
                fit(outcome, Lengths(20).max_seq_length, "drop")

    fuzz(count, rows, body)


@pytest.mark.parametrize("count", COUNTS)
def test_the_adapter_config(tmp_path: Path, count: int) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = make_model()
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 1.0, "dropout": 0.0})
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), adapter_weights(model))
    path = tmp_path / "adapter_config.json"
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0}}
    peft = {"r": 2, "lora_alpha": 2, "use_rslora": True}

    def body(content: bytes) -> None:
        path.write_bytes(content)
        for attempt in (
            lambda: load_adapter_file(model, tmp_path, 1.0),
            lambda: add_trained_adapters(make_model(), tmp_path),
        ):
            with contextlib.suppress(UserError):
                attempt()

    fuzz(count, texts(changed(config) | changed(peft) | VALUES), body)


@pytest.mark.parametrize("count", COUNTS)
def test_the_manifest_of_a_checkpoint(tmp_path: Path, count: int) -> None:
    def write(folder: Path) -> None:
        (folder / "state.json").write_text("{}")

    folder = write_checkpoint(tmp_path, 7, write).path
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())

    def body(content: bytes) -> None:
        path.write_bytes(content)
        problem = defect(folder, 7)
        assert problem is None or problem
        list(whole_checkpoints(tmp_path))

    fuzz(count, texts(changed(manifest) | VALUES), body)


@pytest.mark.parametrize("count", COUNTS)
def test_the_state_in_a_whole_checkpoint(settings: dict[str, Any], tmp_path: Path, count: int) -> None:
    folder = interrupted({**settings, **LONG, "save_best": True})
    state = json.loads((folder / "checkpoints" / "step-0000005" / "state.json").read_text())
    parent = tmp_path / "fuzzed"
    made = CheckpointFolder(parent / "checkpoints" / "step-0000005", 5)
    made.path.mkdir(parents=True)

    def body(content: bytes) -> None:
        (made.path / "state.json").write_bytes(content)
        read_state(made)
        make_config({**settings_to_resume(str(parent)), "resume": True})
        settings = read_state(made).recorded.settings
        taken = {name: value for name, value in settings.items() if name != "trust_remote_code"}
        make_config(taken)

    fuzz(count, texts(changed(state) | VALUES), body)
