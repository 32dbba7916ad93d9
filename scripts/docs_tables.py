"""Make the tables in README.md and docs/ anew from the results in docs/results/, so that no figure is typed by hand."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path, PurePath

# A script's own folder comes first in sys.path; its modules are those of the repository's root, as tests have them.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orpo_mlx.config.flags import OneLineParser, exit_status
from orpo_mlx.errors import ConfigError, DataError
from orpo_mlx.files import read_json_table, write_text
from scripts.tables.comparisons import EXACT_TABLES, EXERCISE_TABLES, MISSING, TABLES, tables_for
from scripts.tables.losses import FROM_CODE
from scripts.tables.records import examined_table, figures, memory_table, modes_table

ROOT = Path(__file__).resolve().parent.parent
PROG = "python scripts/docs_tables.py"
FOLDER = PurePath("docs", "results")
DOCUMENTS = (
    "README.md",
    "docs/comparison.md",
    "docs/data.md",
    "docs/evaluating.md",
    "docs/macs.md",
    "docs/memory.md",
    "docs/methods.md",
    "docs/recipes.md",
)
"""Where `<!-- results: NAME TABLE -->` and `<!-- end of results -->` may stand. `memory` in the place of both is every
published measurement of memory; `memory START` compares the modes in those whose file names begin so; `figures NAME`
is a table that another program printed; `macs` and `gpus` are what `orpo-mlx doctor --json` wrote on them; `methods`
and `parameters` are the cards of the losses."""
EXAMINED = {"macs": "No Mac has been measured yet.", "gpus": "No doctor's file of an NVIDIA GPU has been sent in yet."}
"""Folders of the doctor's files, and what stands where they have none."""

# A list of numbers in one line: raw figures of an exercise would be a million lines.
_NUMBERS = re.compile(r"\[[-+.\deE,\s]*\]")
_MARKED = re.compile(r"<!-- results: (?P<what>[a-z0-9_ -]+) -->\n.*?<!-- end of results -->", re.S)


def add_results(source: Path, root: Path, name: str, *, replies: bool) -> Path:
    """Copy a comparison's `results.json` to where tables are made from; without `replies`, without prompts and answers.

    Raises:
        DataError: it is not one.
        ConfigError: the name cannot stand in a marker.
    """
    if not re.fullmatch(r"[a-z0-9_-]+", name) or name in ("memory", "figures", *EXAMINED, *FROM_CODE):
        raise ConfigError(f"--name {name}: expected small letters, digits, - and _, and no name of another table.")
    results = dict(read_json_table(source, DataError))
    try:
        for make in tables_for(results).values():
            make(results)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{source}: is not a results.json of compare_methods.py ({error!r}).") from None
    if not replies and tables_for(results) is TABLES:
        results["base"] = {**results["base"], "replies": []}
        results["methods"] = [{**arm, "replies": []} for arm in results["methods"]]
    target = root / FOLDER / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, _NUMBERS.sub(lambda found: re.sub(r"\s+", "", found[0]), json.dumps(results, indent=1)) + "\n")
    return target


def regenerated(text: str, root: Path) -> str:
    """A document with every marked table made anew from the results below `root`.

    Raises:
        DataError: a marker names no table, or results that cannot be read.
    """
    return _MARKED.sub(lambda match: _block(match["what"], root), text)


def stale_documents(root: Path, *, write: bool) -> list[str]:
    """Documents whose tables are not those of the results; with `write`, they are written anew."""
    stale = []
    for name in DOCUMENTS:
        path = root / name
        before = path.read_text(encoding="utf-8")
        after = regenerated(before, root)
        if after != before:
            stale.append(name)
            if write:
                write_text(path, after)
    return stale


def _block(what: str, root: Path) -> str:
    name, _, table = what.partition(" ")
    if name in FROM_CODE:
        body = FROM_CODE[name]()
    elif name == "memory":
        files = sorted((root / FOLDER / "memory").glob(f"{table}*.json"), key=lambda file: file.stem)
        make = modes_table if table else memory_table
        records = {file.name: read_json_table(file, DataError) for file in files}
        body = make(records).markdown() if records else "None yet."
    elif name in EXAMINED:
        files = sorted((root / FOLDER / name).glob("*.json"), key=lambda file: file.stem)
        records = {str(file): read_json_table(file, DataError) for file in files}
        body = examined_table(records).markdown() if records else EXAMINED[name]
    elif name == "figures":
        body = figures(read_json_table(root / FOLDER / "figures" / f"{table}.json", DataError))
    else:
        file = root / FOLDER / f"{name}.json"
        results = read_json_table(file, DataError) if file.is_file() else None
        known = {**EXERCISE_TABLES, **EXACT_TABLES, **TABLES} if results is None else tables_for(results)
        if table not in known:
            raise DataError(f"<!-- results: {what} -->: no table {table!r}, expected one of {', '.join(known)}.")
        body = MISSING if results is None else known[table](results)
    return f"<!-- results: {what} -->\n{body}\n<!-- end of results -->"


def build_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser(prog=PROG, description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a table is not that of its results"
    )
    parser.add_argument("--add", type=Path, metavar="FILE", help="results.json of compare_methods.py to publish first")
    parser.add_argument("--name", help="its name in docs/results/ and in markers")
    parser.add_argument("--without-replies", action="store_true", help="publish it without prompts and replies")
    return parser


def _run() -> None:
    args = build_parser().parse_args()
    if (args.add is None) != (args.name is None) or (args.without_replies and args.add is None):
        raise ConfigError("--add, --name: give both, or neither; --without-replies goes with them.")
    if args.check and args.add is not None:
        raise ConfigError("--check writes nothing; leave out --add.")
    if args.add is not None:
        print(add_results(args.add, ROOT, args.name, replies=not args.without_replies))
    stale = stale_documents(ROOT, write=not args.check)
    for name in stale:
        print(name)
    if args.check and stale:
        raise DataError(f"{', '.join(stale)}: tables are not those of docs/results/; run {PROG}.")


if __name__ == "__main__":
    sys.exit(exit_status(PROG, _run))
