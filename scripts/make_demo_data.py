"""Make the demo task in `data/`: the answer first, in plain words, against the same answer padded, hedged or buried.

The facts and phrases are in `data/facts.json`. The same seed gives the same bytes. Questions of the test split come
from topic families that are absent from train and valid; train and valid share families but no fact.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

# A script's own folder comes first in sys.path; the package is in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orpo_mlx.cli.common.arguments import check_output_file
from orpo_mlx.config.flags import OneLineParser, exit_status
from orpo_mlx.errors import ConfigError
from orpo_mlx.files import write_text

PROG = "python scripts/make_demo_data.py"
DATA = Path(__file__).resolve().parent.parent / "data"
SIZES = {"train": 640, "valid": 100, "test": 200}
VALID_EVERY = 7


def make_pair(question: str, answer: str, source: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """One row: the answer as it is against the answer in one of the wordy styles."""
    template = rng.choice(source["styles"][rng.choice(sorted(source["styles"]))])
    phrases = {name: rng.choice(options).format(question=question) for name, options in source["phrases"].items()}
    rejected = template.format(answer=answer, **phrases)
    sides = {"chosen": answer, "rejected": rejected}
    messages = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
    return {"prompt": [{"role": "user", "content": question}], **messages}


def make_splits(source: dict[str, Any], seed: int) -> dict[str, list[dict[str, Any]]]:
    """All rows of each split, in an order that depends on `seed` only."""
    rng = random.Random(seed)
    splits: dict[str, list[dict[str, Any]]] = {name: [] for name in SIZES}
    fact_number = 0
    for family in source["families"]:
        for left, right in family["facts"]:
            fact_number += 1
            held_out = family["split"] == "train" and fact_number % VALID_EVERY == 0
            rows = splits["valid" if held_out else family["split"]]
            starts = family["answer"].startswith("{b}")
            answer = family["answer"].format(a=left, b=right[0].upper() + right[1:] if starts else right)
            rows += [make_pair(question.format(a=left), answer, source, rng) for question in family["questions"]]
    for rows in splits.values():
        rng.shuffle(rows)
    return {name: rows[: SIZES[name]] for name, rows in splits.items()}


def build_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser(prog=PROG, description=__doc__.splitlines()[0] if __doc__ else "", allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=DATA, help="folder to write into (default: data/)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    return parser


def main() -> None:
    """Write the three splits; ConfigError where there is no such folder."""
    args = build_parser().parse_args()
    if not args.output.is_dir():
        raise ConfigError(f"--output {args.output}: is no folder; give one that is there.")
    source = json.loads((DATA / "facts.json").read_text(encoding="utf-8"))
    for name, rows in make_splits(source, args.seed).items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(check_output_file("--output", args.output / f"{name}.jsonl"), lines)
        print(f"{args.output / name}.jsonl: {len(rows)} pairs")


if __name__ == "__main__":
    sys.exit(exit_status(PROG, main))
