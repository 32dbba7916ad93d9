"""Make the tables in README.md and docs/ anew from the results in docs/results/, so that no figure is typed by hand."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

from orpo_mlx.compare import tables
from orpo_mlx.compare.exercise import page as exercise
from orpo_mlx.compare.exercise import tables as exercise_tables
from orpo_mlx.compare.report import facts
from orpo_mlx.compare.tables import number
from orpo_mlx.config.flags import OneLineParser, exit_status
from orpo_mlx.errors import ConfigError, DataError
from orpo_mlx.files import read_json_table, write_text
from orpo_mlx.losses.recipe import PARAMETERS
from orpo_mlx.losses.registry import METHODS
from orpo_mlx.reporting.html_page import Table, TableCell, markdown_text

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
_MISSING = "Not measured yet."
_MARKED = re.compile(r"<!-- results: (?P<what>[a-z0-9_ -]+) -->\n.*?<!-- end of results -->", re.S)


def _facts(results: Mapping[str, Any]) -> str:
    return "\n".join(f"- {key}: {markdown_text(value)}" for key, value in facts(results).items())


def _taken(results: Mapping[str, Any]) -> str:
    """One sentence on how and where the figures were taken."""
    machine, versions = results["machine"], results["versions"]
    device = machine.get("device_name") or machine["platform"]
    kept = ", ".join(f"{name} {versions[name]}" for name in ("orpo-mlx", "mlx", "mlx-lm", "python"))
    pairs = results["settings"]["batch_size"] * results["settings"]["grad_accumulation_steps"]
    return (
        f"Means over {results['seeds']} seeds, {results['budget']['words']} of {pairs} pairs each; in brackets, 95 % "
        f"intervals. Taken {results['date'][:10]} on {machine['cores']} cores of {device} "
        f"({machine['platform']}), {kept}, by `{results['command']}`."
    )


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "facts": _facts,
    "taken": _taken,
    "overview": lambda results: tables.overview(results).markdown(),
    "claims": lambda results: tables.claims(results).markdown(),
    "quality": lambda results: tables.quality(results).markdown(),
    "cost": lambda results: tables.cost(results).markdown(),
    "sensitivity": lambda results: tables.sensitivity(results).markdown(),
    "grid": lambda results: tables.grid(results).markdown(),
    "sanity": lambda results: tables.sanity(results).markdown(),
    "replies": lambda results: tables.replies(results).markdown(),
}
"""What may stand after a comparison's name in a marker."""


def _exercise_facts(results: Mapping[str, Any]) -> str:
    found = {"sanity": exercise.first_line(results), **exercise.facts(results)}
    return "\n".join(f"- {key}: {markdown_text(value)}" for key, value in found.items())


def _exercise_taken(results: Mapping[str, Any]) -> str:
    """One sentence on how and where the figures were taken."""
    size = next(iter(results["tiers"].values()))["size"]
    machine, versions = results["machine"], results["versions"]
    kept = ", ".join(f"{name} {versions[name]}" for name in ("orpo-mlx", "mlx", "mlx-lm", "python"))
    return (
        f"{size['seeds']} seeds, {size['test_prompts'] * size['samples']} replies each; standard errors in brackets. "
        f"Taken {results['date'][:10]} on {machine['cores']} cores of "
        f"{machine.get('device_name') or machine['platform']}, commit {results['commit']}, {kept}, "
        f"by `{results['command']}`."
    )


def _exercise_quality(results: Mapping[str, Any]) -> str:
    """Every tier and variant, a table each."""
    return "\n\n".join(
        f"{tier} tier, {variant}:\n\n{exercise_tables.quality(results, tier, variant).markdown()}"
        for tier, found in results["tiers"].items()
        for variant in found["variants"]
    )


def _exercise_equal_kl(results: Mapping[str, Any]) -> str:
    """As `_exercise_quality`, of those where it was measured."""
    made = {
        f"{tier} tier, {variant}": exercise_tables.equal_kl(results, tier, variant)
        for tier, found in results["tiers"].items()
        for variant in found["variants"]
    }
    return "\n\n".join(f"{name}:\n\n{table.markdown()}" for name, table in made.items() if table.rows)


def _by_tier(made: Callable[[Mapping[str, Any], str], Table]) -> Callable[[Mapping[str, Any]], str]:
    """A table for each tier that has it."""
    return lambda results: "\n\n".join(
        table.markdown() for table in (made(results, tier) for tier in results["tiers"]) if table.rows
    )


EXERCISE_TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "facts": _exercise_facts,
    "taken": _exercise_taken,
    "power": lambda results: exercise_tables.power(results).markdown(),
    "quality": _exercise_quality,
    "equal_kl": _exercise_equal_kl,
    "gains": _by_tier(exercise_tables.gains),
    "courses": _by_tier(exercise_tables.courses),
    "controls": lambda results: exercise_tables.controls(results).markdown(),
    "lengths": lambda results: exercise_tables.lengths(results).markdown(),
    "lengths_at_kl": lambda results: exercise_tables.lengths_at_kl(results).markdown(),
}
"""What may stand after the name of results of the exercise, or of one tier of it."""
EXACT_TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "overview": lambda results: exercise_tables.overview(results).markdown(),
    "claims": lambda results: exercise_tables.claims(results).markdown(),
    "verdicts": lambda results: exercise_tables.claims(results, short=True).markdown(),
    "sanity": lambda results: exercise_tables.sanity(results).markdown(),
    "costs": lambda results: exercise_tables.costs(results).markdown(),
    "peaks": lambda results: exercise_tables.peaks(results).markdown() if results["cost"].get("peaks") else _MISSING,
    "copies": lambda results: exercise_tables.copies(results).markdown(),
}
"""What may stand there besides where the exact tier was run, to which claims and costs belong."""


def tables_for(results: Mapping[str, Any]) -> dict[str, Callable[[Mapping[str, Any]], str]]:
    """The tables that can be made of some results."""
    if results.get("kind") != "exercise":
        return TABLES
    return {**EXERCISE_TABLES, **EXACT_TABLES} if "exact" in results["tiers"] else EXERCISE_TABLES


def memory_table(records: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every published measurement of memory, a row for each method and mode."""
    header = (
        "machine",
        "model",
        "pairs a step",
        "method",
        "--memory",
        "peak, GiB (MLX)",
        "step, s",
        "pair tokens/s",
        "date",
    )
    rows: list[tuple[TableCell, ...]] = []
    for record in records.values():
        settings = record["settings"]
        machine = str(record["machine"].get("device_name") or record["machine"]["platform"])
        pairs = settings["batch_size"] * settings["grad_accumulation_steps"]
        for row in record["methods"]:
            start = (
                TableCell(machine),
                TableCell(settings["model"]),
                TableCell(str(pairs), pairs),
                TableCell(row["method"]),
                TableCell(_mode(row, settings)),
            )
            figures = (
                (TableCell(row["error"]), TableCell("–"), TableCell("–"))
                if "error" in row
                else (
                    number(row["peak_memory_gib"], "{:.2f}"),
                    number(row["step_s_median"], "{:.2f}"),
                    number(row["pair_tokens_per_s"], "{:.0f}"),
                )
            )
            rows.append((*start, *figures, TableCell(record["date"][:10])))
    return Table(header, tuple(rows))


def _mode(row: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The memory mode of a row with the switches that were off."""
    switches = {"--no-share-prompt": not settings.get("share_prompt", True), "--plain-head": settings.get("plain_head")}
    return " ".join([row["memory"], *(flag for flag, given in switches.items() if given)])


def modes_table(records: Mapping[str, Mapping[str, Any]]) -> Table:
    """Modes and switches against `plain` on the same batches: each idea's share. A method is compared with itself."""
    found = [(row, _mode(row, record["settings"])) for record in records.values() for row in record["methods"]]
    plain = {row["method"]: row for row, mode in found if mode == "plain"}

    def cells(row: Mapping[str, Any], mode: str) -> dict[str, TableCell]:
        base = plain[row["method"]]
        return {
            "method": TableCell(row["method"]),
            "--memory": TableCell(mode),
            "all batches, s": number(sum(row["steps_s"]), "{:.1f}"),
            "speed, plain = 1": number(sum(base["steps_s"]) / sum(row["steps_s"]), "{:.2f}"),
            "step, s (median)": number(row["step_s_median"], "{:.2f}"),
            "step of a first epoch, s": number(row["step_s_median"] + row["reference_s"], "{:.2f}"),
            "peak, GiB (MLX)": number(row["peak_memory_gib"], "{:.2f}"),
            "peak, plain = 1": number(row["peak_memory_gib"] / base["peak_memory_gib"], "{:.2f}"),
        }

    rows = [cells(row, mode) for row, mode in sorted(found, key=lambda each: each[0]["method"] != "orpo")]
    return Table(tuple(rows[0]), tuple(tuple(row.values()) for row in rows))


def examined_table(records: Mapping[str, Mapping[str, Any]]) -> Table:
    """What `orpo-mlx doctor` found, a row for each machine; steps are those of the full examination only.

    Raises:
        DataError: a record is not the doctor's.
    """
    header = ("machine", "memory, GiB", "system", "mlx", "checks", "verdict")
    timed = tuple(f"{mode}, s" for mode in _TIMED)
    rates = ("peak of fast, GiB", "bfloat16, TFLOP/s", "4 bits, TFLOP/s", "GB/s", "µs a launch", "date")
    rows = []
    for name, record in records.items():
        try:
            rows.append(_examined_row(record))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{name}: is not what orpo-mlx doctor --json writes ({error!r}).") from None
    return Table((*header, *timed, *rates), tuple(rows))


_TIMED_SHAPE = "SmolLM2-135M, bfloat16, "
_TIMED = ("fast", "balanced", "thrift", "plain", "mlx-lm-lora")


def _examined_row(record: Mapping[str, Any]) -> tuple[TableCell, ...]:
    checks = record["checks"]
    steps = {check["name"].removeprefix(_TIMED_SHAPE): check for check in checks.get("speed", ())}
    rivals = [check for check in checks.get("rival", ()) if check["name"].endswith(_TIMED_SHAPE.rstrip(", "))]
    if rivals:
        steps["mlx-lm-lora"] = rivals[0]
    rates = {check["name"]: check for check in checks.get("calibration", ())}

    def figure(found: Mapping[str, Any], key: str, shown: str) -> TableCell:
        return number(found[key], shown) if key in found else TableCell("–")

    return (
        TableCell(str(record["device"].get("device_name") or record["machine"]["chip"])),
        number(record["machine"]["memory_gib"], "{:.0f}"),
        TableCell(record["machine"]["system"]),
        TableCell(record["versions"]["mlx"]),
        TableCell(record["level"]),
        TableCell(record["verdict"]),
        *(figure(steps.get(mode, {}), "step_s", "{:.3f}") for mode in _TIMED),
        figure(steps.get("fast", {}), "peak_gib", "{:.2f}"),
        figure(rates.get("product, bfloat16", {}), "tflop_per_s", "{:.1f}"),
        figure(rates.get("product with 4 bits, bfloat16", {}), "tflop_per_s", "{:.1f}"),
        figure(rates.get("memory", {}), "gigabytes_per_s", "{:.0f}"),
        figure(rates.get("launches", {}), "microseconds_per_launch", "{:.2f}"),
        TableCell(record["date"][:10]),
    )


def figures(record: Mapping[str, Any]) -> str:
    """A table of figures a program printed, and how they were taken."""
    rows = tuple(tuple(TableCell(str(value)) for value in row) for row in record["rows"])
    table = Table(tuple(record["columns"]), rows).markdown()
    return f"{table}\n\nTaken {record['date']} on {record['machine']}, by `{record['command']}`."


def methods_table() -> str:
    """The losses by their cards."""
    rows = ["| `--method` | loss | of a | reference model | source |", "|---|---|---|---|---|"]
    for name, method in METHODS.items():
        equation = method.equation.replace("|", r"\|")
        reference = "yes" if method.needs_reference else "no"
        rows.append(f"| `{name}` | {equation} | {method.unit} | {reference} | {method.source} |")
    return "\n".join(rows)


def parameters_table() -> str:
    """The losses' hyper-parameters: the values each takes, and the losses that have it with their defaults."""
    rows = ["| flag | values | methods and their defaults |", "|---|---|---|"]
    for parameter in PARAMETERS:
        having: dict[str, list[str]] = {}
        for name, method in METHODS.items():
            if parameter in method.parameters:
                default, values = method.parameters[parameter]
                having.setdefault(values.text, []).append(f"`{name}` {default:g}")
        flag = f"`--{parameter.replace('_', '-')}`"
        rows += [f"| {flag} | {text} | {', '.join(methods)} |" for text, methods in having.items()]
    return "\n".join(rows)


def methods_with_margins() -> str:
    """The methods that heed `--margin-scale`."""
    return ", ".join(f"`{name}`" for name, method in METHODS.items() if method.takes_margin) + "."


FROM_CODE = {"margins": methods_with_margins, "methods": methods_table, "parameters": parameters_table}


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
        body = _MISSING if results is None else known[table](results)
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
