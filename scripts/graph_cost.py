"""What a training step launches on a Mac, counted from its graph, and its seconds there, reckoned: see --help."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A script's own folder comes first in sys.path; its modules are those of the repository's root, as tests have them.
sys.path.insert(0, str(ROOT))

import orpo_mlx  # noqa: F401  (loads a BLAS before mlx)

# isort: split
from orpo_mlx.cli.common.arguments import check_apart, check_output_file
from orpo_mlx.config.flags import OneLineParser, exit_status
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.engine.modes import MODES
from orpo_mlx.errors import ConfigError, reason_of
from orpo_mlx.files import read_json_table, write_text
from scripts.graph.steps import MODELS, WORKLOADS, Workload, empty_model, sample_pairs, training_step
from scripts.graph.table import Record, as_table, record

TRAINER = "orpo-mlx"
PROG = "python scripts/graph_cost.py"


def build_parser() -> OneLineParser:
    """The command line."""
    made = OneLineParser(
        prog=PROG,
        description="Count kernels, graph nodes, evaluations and host waits of one training step, as MLX would build "
        "it for a Mac's GPU, and reckon its seconds on Apple's chips. Nothing is computed, and no Mac is needed.",
        allow_abbrev=False,
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write all records, with the chips that have no column")
    made.add_argument("--against", type=Path, metavar="FILE", help="records of other trainers, to be shown beside ours")
    made.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES), help="values of --memory")
    made.add_argument("--only", metavar="TEXT", help="workloads whose title contains TEXT")
    return made


def count(workload: Workload, mode: str) -> Record:
    """The record of one step of this package."""
    config = dataclasses.replace(TrainingConfig(), memory=mode)
    model = empty_model(MODELS[workload.model], workload.dtype, workload.bits)
    step = training_step(config, model, sample_pairs(workload))
    return record(workload.title, TRAINER, mode, step)


def others(path: Path, titles: list[str]) -> list[Record]:
    """Records of a file that an earlier call, or another trainer's harness, has written; ConfigError otherwise."""
    try:
        records = read_json_table(path, ConfigError)["records"]
        found = [one for one in records if one["workload"] in titles and one["trainer"] != TRAINER]
        # What is missing in them is said before the work, and not after it.
        as_table(found)
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--against {path}: found no records of this script ({reason_of(error)}).") from None
    return found


def chosen_workloads(text: str | None) -> list[Workload]:
    """The workloads whose title contains a text, all where there is none; ConfigError where none does."""
    found = [one for one in WORKLOADS if text is None or text in one.title]
    if not found:
        titles = "; ".join(one.title for one in WORKLOADS)
        raise ConfigError(f"--only {text}: no workload's title contains that, expected a part of one of {titles}.")
    return found


def run(argv: Sequence[str] | None) -> None:
    """Do what a command line asks; raises UserError."""
    arguments = build_parser().parse_args(argv)
    file = None
    if arguments.json is not None:
        file = check_output_file("--json", arguments.json)
        check_apart("--json", file, {"--against": arguments.against})
    # The graph of a GPU is to be counted, whatever the device is.
    os.environ.setdefault("ORPO_MLX_PROFILE", "gpu")
    workloads = chosen_workloads(arguments.only)
    records = others(arguments.against, [one.title for one in workloads]) if arguments.against else []
    for workload in workloads:
        for mode in arguments.modes:
            records.append(count(workload, mode))
            gc.collect()
    print(as_table(records))
    if file is not None:
        write_text(file, json.dumps({"records": records}, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    return exit_status(PROG, lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
