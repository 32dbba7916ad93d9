"""Imports point one way, so that any module can be read without the ones after it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "orpo_mlx"
LAYERS = [
    {"_blas", "alarms", "allocator", "conversation", "errors", "exponential", "gguf_blocks", "signals", "types"},
    {
        "cache",
        "distributed",
        "gguf_file",
        "line_file",
        "lock",
        "peft_config",
        "row_report",
        "rows",
        "safetensors_files",
        "services",
        "shrinking",
        "staging",
        "turns",
    },
    {"shapes", "sources", "token_store", "tokenization", "gguf_models", "gguf_tokenizer", "merging"},
    {
        "attention",
        "gated_delta",
        "head",
        "modes",
        "cli",
        "data",
        "batching",
        "shared_prompt",
        "losses",
        "lora",
        "hf_config",
        "activations",
        "gguf",
        "checkpoint",
        "footprint",
        "charts",
        "page",
        "run_log",
        "wilson",
    },
    {"lean", "metrics", "methods", "model_files", "models", "peft_adapters", "splits", "reference_table"},
    {"logprobs", "config", "samples", "blueprint", "hf_import"},
    {"reference", "segments", "progress", "callbacks", "config_checks", "mlx_lm_keys", "settled"},
    {"reference_copy", "command_line", "result", "tracking"},
    {"compare_plan", "divergence", "intervals"},
    {"evaluation", "prepare", "reporting", "report", "chapter", "score", "inspection", "live", "live_page"},
    {"chat", "gradients", "inspect", "live_server", "model_card", "order", "verification"},
    {"finite", "resume", "conversion", "push", "watch"},
    {"step", "convert"},
    {"memory", "held_out"},
    {"loop", "evaluate_only"},
    {"memory_plan", "announce"},
    {"training"},
    {"fit", "train", "__init__"},
    {"compare_cell"},
    {"compare_results"},
    {"verdicts"},
    {"compare_tables", "compare_charts"},
    {"compare_report"},
    {"compare", "published"},
    {"memory_benchmark"},
    {"main"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """Modules of the package that `path` imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "orpo_mlx":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
    return found & set(LEVEL)


def test_every_module_has_a_place() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(LEVEL)


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_imports_point_to_earlier_layers_only(name: str) -> None:
    later = {other for other in imports(PACKAGE / f"{name}.py") if LEVEL[other] >= LEVEL[name]}
    assert not later


def test_losses_know_nothing_but_types() -> None:
    assert imports(PACKAGE / "losses.py") == {"types"}


def test_no_module_asks_for_a_method_by_name() -> None:
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                names = [getattr(side, "attr", getattr(side, "id", "")) for side in (node.left, *node.comparators)]
                strings = [side for side in node.comparators if isinstance(getattr(side, "value", None), str)]
                assert not ("method" in names and strings), f"{path.name}:{node.lineno} branches on a method's name"
