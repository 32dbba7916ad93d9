"""What a training step launches on a Mac, counted from its graph, and its seconds there, reckoned: see --help."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A script's own folder comes first in sys.path; its modules are those of the repository's root, as tests have them.
sys.path.insert(0, str(ROOT))

import orpo_mlx  # noqa: F401  (loads a BLAS before mlx)

# isort: split
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.engine.modes import MODES
from orpo_mlx.errors import UserError, reason_of
from scripts.graph.steps import MODELS, WORKLOADS, Workload, empty_model, sample_pairs, training_step
from scripts.graph.table import Record, as_table, record

TRAINER = "orpo-mlx"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description="Count kernels, graph nodes, evaluations and host waits of one training step, as MLX would build "
        "it for a Mac's GPU, and reckon its seconds on Apple's chips. Nothing is computed, and no Mac is needed."
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write all records, with the chips that have no column")
    made.add_argument("--against", type=Path, metavar="FILE", help="records of other trainers, to be shown beside ours")
    made.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES), help="values of --memory")
    made.add_argument("--only", default="", metavar="TEXT", help="workloads whose title contains TEXT")
    return made


def count(workload: Workload, mode: str) -> Record:
    """The record of one step of this package."""
    config = dataclasses.replace(TrainingConfig(), memory=mode)
    model = empty_model(MODELS[workload.model], workload.dtype, workload.bits)
    step = training_step(config, model, sample_pairs(workload))
    return record(workload.title, TRAINER, mode, step)


def others(path: Path, titles: list[str]) -> list[Record]:
    """Records of a file that an earlier call, or another trainer's harness, has written."""
    try:
        records = json.loads(path.read_text())["records"]
        return [one for one in records if one["workload"] in titles and one["trainer"] != TRAINER]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--against {path}: found no records of this script ({reason_of(error)}).") from None


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    # The graph of a GPU is to be counted, whatever the device is.
    os.environ.setdefault("ORPO_MLX_PROFILE", "gpu")
    workloads = [one for one in WORKLOADS if arguments.only in one.title]
    try:
        records = others(arguments.against, [one.title for one in workloads]) if arguments.against else []
        for workload in workloads:
            for mode in arguments.modes:
                records.append(count(workload, mode))
                gc.collect()
        print(as_table(records))
        if arguments.json:
            arguments.json.write_text(json.dumps({"records": records}, indent=1) + "\n")
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
