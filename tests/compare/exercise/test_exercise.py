"""What is said of raw figures: recomputed by another script, loud where a check fails. Runs of the exercise: slow."""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from orpo_mlx.cli import compare as command
from orpo_mlx.compare.exercise import helpers, sizes, study
from orpo_mlx.compare.exercise import run as exercise
from orpo_mlx.compare.exercise.analysis import analyse
from orpo_mlx.compare.exercise.contenders import CONTENDERS, Setting
from orpo_mlx.compare.exercise.gold_task import GoldTask
from orpo_mlx.compare.exercise.halving import Round
from orpo_mlx.compare.exercise.open_task import OpenTask
from orpo_mlx.compare.exercise.page import first_line, markdown
from orpo_mlx.compare.exercise.significance import rounded
from orpo_mlx.compare.exercise.tables import lengths
from orpo_mlx.compare.exercise.task import Size
from orpo_mlx.compare.exercise.trainer import fresh_run, train
from orpo_mlx.compare.exercise.verdicts import verdicts
from orpo_mlx.errors import ConfigError, DataError, TrainingError
from orpo_mlx.reporting.console import Reporter
from scripts.check_comparison import check, differing, leaves, read, same
from scripts.check_comparison import run as check_command
from scripts.recompute import tiers
from scripts.recompute.verdicts import verdicts as recomputed_verdicts
from tests.helpers.documented_commands import ROOT

TINY = sizes.QUICK_EXACT._replace(
    pairs=64,
    batch_size=16,
    rounds=(Round(2, 1), Round(1, 2)),
    looks=1,
    seeds=2,
    valid_prompts=8,
    test_prompts=6,
    samples=2,
    held_out=40,
    contenders=("orpo", "dpo", "chapter's step"),
    variants=("0 % flipped",),
)
ARMS = ("orpo", "dpo", "dpo --reference copy")
ROW = {"model": "m", "memory": "fast", "tokens": 8, "weights_gib": 1.0, "peak_gib": 2.0, "copy_ratio": 1.5}
PEAKS = {"fine_tune_type": "full", "tokens": 8, "pairs": 1, "peaks_gib": {"orpo": 1.0, "dpo": 1.5}}
COST = {"steps": 2, "forward_tokens": 512, "peak_gib": 1.25, "step_s": 0.5, "reference_s": 0.1}


@pytest.mark.parametrize(
    ("tiers", "words"),
    [
        ({}, "has no figures"),
        ({"open": {"size": 3}}, r"missing or damaged \(KeyError\('analysis'\)\)"),
        ({"open": {"analysis": [], "base": {"gold": [1]}}}, "missing or damaged"),
    ],
)
def test_results_without_figures_are_not_called_right(
    tiers: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"kind": "exercise", "tiers": tiers}))
    monkeypatch.setattr("sys.argv", ["check_comparison.py", str(file)])
    with pytest.raises(DataError, match=words):
        check_command()


def test_lengths_are_those_of_a_variant_minus_the_first(made: dict[str, Any]) -> None:
    assert lengths(made).rows == ()
    rng = np.random.default_rng(1)
    tier = made["tiers"]["exact"]
    variants = tier["variants"]
    more = {"orpo": 4.0, "orpo_style": 4.0, "dpo": 0.0, "chapter's step": -4.0}
    for name, extra in more.items():
        for before, after in zip(*(variants[each][name]["seeds"] for each in variants), strict=True):
            before["test"]["tokens"] = rng.normal(30, 1, 7).tolist()
            after["test"]["tokens"] = [tokens + extra for tokens in before["test"]["tokens"]]
    tier["analysis"] = analyse(tier)
    rows = [[cell.text for cell in row] for row in lengths(made).rows]
    assert [row[:3] for row in rows] == [["exact", "20 % flipped minus 0 % flipped", name] for name in more]
    longer, same, shorter = "+4.0* (+4.0 to +4.0)", "+0.0 (+0.0 to +0.0)", "-4.0* (-4.0 to -4.0)"
    assert [row[3] for row in rows] == [longer, longer, same, shorter]
    assert [float(row[4]) < 0.05 for row in rows] == [True, True, False, True]
    assert "Length of replies" in markdown(made)


@pytest.mark.parametrize("size", [size for extent in sizes.EXTENTS.values() for size in extent])
def test_what_tuning_saw_final_trainings_see_again(size: Size) -> None:
    task: Any = SimpleNamespace(size=size)
    final = size.rounds[-1].steps
    looks = study.look_steps(task, final)
    assert looks[-1] == final
    assert {final * place // size.looks for place in range(1, size.looks + 1)} <= set(looks)
    for each in size.rounds:
        short = study.look_steps(task, each.steps)
        assert short == [step for step in looks if step <= each.steps]
    nearer = study.final_looks(task)
    assert set(looks) <= set(nearer)
    assert nearer[0] <= max(1, looks[0] / 2)


def test_a_training_that_was_looked_at_otherwise_is_another() -> None:
    contender = study.contenders_of(sizes.FULL_OPEN)[0]

    def identity(size: Size) -> dict[str, Any]:
        task: Any = SimpleNamespace(size=size, name="open")
        return study._identity(task, "clean", contender, Setting(1e-4, 0.1), 0, 16)

    # Rounds may be added to a folder that holds others.
    other = sizes.FULL_OPEN._replace(rounds=(Round(8, 12), Round(1, 16)))
    assert identity(other) != identity(sizes.FULL_OPEN)
    assert identity(sizes.FULL_OPEN._replace(seeds=9)) == identity(sizes.FULL_OPEN)


def test_cells_that_are_published_are_of_the_present_design() -> None:
    with tarfile.open(ROOT / "docs" / "results" / "exercise_open_cells.tar.xz") as archive:
        files = [archive.extractfile(member) for member in archive.getmembers()]
        tables = [json.load(file) for file in files if file is not None]
    size = study.size_record(sizes.FULL_OPEN, OpenTask.bound)
    (common,) = (table for table in tables if "identity" not in table)
    assert common == {
        **{key: value for key, value in size.items() if key not in exercise._MAY_GROW},
        "versions": common["versions"],
    }
    contenders = {each.name: each for each in CONTENDERS}
    task: Any = SimpleNamespace(size=sizes.FULL_OPEN, name="open")
    identities = [json.loads(table["identity"]) for table in tables if table is not common]
    trainings = [each for each in identities if each["what"] in ("tuning", "final")]
    assert len(trainings) >= 40
    for each in trainings:
        setting = Setting(each["rate"], each["strength"])
        own = study._identity(task, each["variant"], contenders[each["method"]], setting, each["seed"], each["steps"])
        judged = {"judged_at": each["judged_at"], "looks": study.final_looks(task)} if each["what"] == "final" else {}
        assert each == {**own, "what": each["what"], **judged}


@pytest.fixture(scope="module")
def tiny() -> Iterator[pytest.MonkeyPatch]:
    """The exercise with its exact tier alone, and costs that are not measured: they need the real model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exercise, "tiers_of", lambda extent, tier: {"exact": sizes.make_tier("exact", TINY)})
        patch.setattr(exercise, "load", lambda name: None)
        patch.setattr(exercise, "measured_steps", lambda *shape: {name: dict(COST) for name in ARMS})
        patch.setattr(exercise, "measured_peaks", lambda shapes: [PEAKS])
        patch.setattr(exercise, "predicted_copies", lambda small, large: [ROW])
        yield patch


def quiet() -> Reporter:
    return Reporter(Console(file=io.StringIO(), highlight=False))


@pytest.fixture(scope="module")
def run_folder(tiny: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the exact tier, a few steps each."""
    folder = tmp_path_factory.mktemp("exercise")
    exercise.run_exercise("quick", folder, ["--quick", "--output", "out"], quiet())
    return folder


@pytest.fixture
def made() -> dict[str, Any]:
    """Results with made-up raw figures in the place of trainings."""
    rng = np.random.default_rng(0)

    def some(*shape: int) -> Any:
        return rng.normal(size=shape).round(5).tolist()

    def near(mean: float, count: int) -> Any:
        values = rng.normal(size=count)
        return (values - values.mean() + mean).round(5).tolist()

    def seed(shift: float, reaches: bool) -> dict[str, Any]:
        golds = (0.0, shift + 0.1 * rng.random(), shift + 0.2 + 0.1 * rng.random())
        curve = [{"step": step, "gold": gold, "kl": step / 10} for step, gold in zip((0, 1, 2), golds, strict=True)]
        course = [{"step": step, "gold": step / 2, "kl": kl} for step, kl in ((0, 0.0), (1, 0.36), (2, 0.64))]
        test = {"gold": near(1.0, 7), "kl": near(0.64, 7), "text_nll": some(1)}
        # √0.5 between 0.6 and 0.8.
        share = (0.5**0.5 - 0.6) / 0.2
        at = {"0.5": {"step": 1 + share, "gold": near((1 + share) / 2 + shift, 7)}} if reaches else {}
        course = [{**look, "gold": look["gold"] + (shift if 0 < look["step"] < 3 else 0)} for look in course]
        test["gold"] = near(course[-1]["gold"], 7)
        seed = {"curve": curve, "best": 2, "valid_gold": near(golds[2], 9), "test": test}
        return {**seed, "at_kl": at, "test_curve": course}

    def method(name: str) -> dict[str, Any]:
        tuning = [
            {"rate": rate, "strength": 1.0, "steps": steps, "score": 0.0, "kl": 0.1, "valid_gold": some(9)}
            for rate, steps in ((1e-3, 1), (2e-3, 1), (4e-3, 1), (1e-3, 2))
        ]
        for entry in tuning:
            entry["score"] = round(float(np.mean(entry["valid_gold"])), 5)
        chosen = {"rate": 1e-3, "strength": 1.0}
        shift = 0.5 if name == "orpo" else 0.0
        seeds = [seed(shift, reaches=name != "chapter's step" or number > 0) for number in range(3)]
        return {"likelihood": name == "orpo", "chosen": chosen, "tuning": tuning, "seeds": seeds}

    def wins(share: float) -> str:
        return "".join(str(int(value < share)) for value in rng.random(200))

    def sane(name: str) -> dict[str, Any]:
        shuffled = {each: wins(0.5) for each in study.shuffles(3)}
        found = {"name": name, "likelihood": name == "orpo"}
        found["wins"] = {"given": wins(0.8), "swapped": wins(0.2), **shuffled}
        return found | ({"likelihood_wins": {each: wins(0.5) for each in shuffled}} if name == "orpo" else {})

    names = ("orpo", "orpo_style", "dpo", "chapter's step")
    size = TINY._replace(seeds=3, contenders=names, variants=("0 % flipped", "20 % flipped"))
    tier: dict[str, Any] = {
        "facts": {"frontier": [{"kl": 0.5, "gold": 1.0}]},
        "size": study.size_record(size, 1.0),
        "base": {"gold": some(7), "kl": [0.0] * 7},
        "variants": {variant: {name: method(name) for name in names} for variant in size.variants},
        "sanity": [sane(name) for name in names],
    }
    results: dict[str, Any] = {
        "kind": "exercise", "extent": "quick", "date": "2026-01-01", "command": "c", "seconds": 1, "commit": None,
        "machine": {"cores": 2}, "versions": {"mlx": "0"}, "unfinished": ["open"],
        "tiers": {"exact": {**tier, "analysis": analyse(tier)}},
        "cost": {
            "model": "m", "tokens": 8, "pairs": 2, "measured": {n: dict(COST) for n in ARMS}, "peaks": [PEAKS],
            "predicted": [ROW],
        },
    }  # fmt: skip
    results["verdicts"] = rounded([each._asdict() for each in verdicts(results)])
    return dict(json.loads(json.dumps(results)))


def test_every_figure_is_recomputed_by_another_script(made: dict[str, Any], tmp_path: Path) -> None:
    count, wrong = check(made)
    assert wrong == []
    assert count > 100
    part = copy.deepcopy(made)
    part["tiers"]["exact"]["size"]["variants"].append("40 % flipped")
    (missing,) = check(part)[1]
    assert missing.startswith("exact tier, variants")
    assert check({**part, "unfinished": ["exact, 40 % flipped"]})[1] == []
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(DataError, match="holds a list, expected a table"):
        read(tmp_path / "other.json")


def changed(place: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(place, bool | str):
        return not place if isinstance(place, bool) else f"un{place}"
    if isinstance(place, int):
        return place - 1
    return [0.5, *place] if isinstance(place, list) else 7 if place is None else place + 0.02


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values, lists of plain values taken as one."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if not items or (isinstance(tree, list) and not any(isinstance(each, dict | list) for each in tree)):
        yield path
    for key, value in items if path else tree.items():
        if isinstance(value, dict | list) or isinstance(tree, dict):
            yield from places(value, (*path, key))


def test_whatever_is_changed_in_the_published_figures_is_noticed(made: dict[str, Any]) -> None:
    tier = made["tiers"]["exact"]
    mine = tiers.analysis(tier)

    def differ(published: Any) -> bool:
        return any(not same(ours, theirs) for _, ours, theirs in leaves(published, mine))

    found = copy.deepcopy(tier["analysis"])
    assert not differ(found)
    paths = list(places(found))
    assert len(paths) > 250
    for *before, last in paths:
        node = functools.reduce(lambda node, key: node[key], before, found)
        kept = node[last]
        node[last] = changed(kept)
        assert differ(found), (*before, last)
        if isinstance(node, dict):
            del node[last]
            assert differ(found), (*before, last)
        node[last] = kept
    raw = ("tiers", "exact", "variants", "0 % flipped", "orpo")
    others: list[tuple[Any, ...]] = [(*raw, "chosen", "rate"), (*raw, "tuning", 1, "score"), (*raw, "seeds", 0, "best")]
    others += [(*raw, "seeds", 0, "at_kl", "0.5", "step"), ("cost", "predicted", 0, "copy_ratio")]
    others += [("tiers", "exact", "size", "seeds"), ("tiers", "exact", "size", "contenders")]
    others += [("verdicts", place, "verdict") for place in range(7)]
    others += [("verdicts", 3, "figures", 0, "low"), ("verdicts", 5, "figures", 1, "lost")]
    for *before, last in others:
        found = copy.deepcopy(made)
        node = functools.reduce(lambda node, key: node[key], before, found)
        node[last] = changed(node[last])
        assert differs(found), (*before, last)
    for place in (2, 3, 5):
        found = copy.deepcopy(made)
        found["verdicts"][place]["measured"] = made["verdicts"][place]["measured"].replace("0", "1")
        assert differs(found), place


def differs(results: dict[str, Any]) -> bool:
    """Whether raw figures or verdicts are noticed to be wrong; not the analysis, which takes longer."""
    pairs = (*tiers.raw_figures(results["tiers"]["exact"]), *recomputed_verdicts(results))
    return any(not same(*values) for what, *both in pairs for _, *values in leaves(*both))


def test_a_failed_sanity_check_fails_the_command_and_stands_on_the_first_line(
    made: dict[str, Any], tmp_path: Path
) -> None:
    assert first_line(made).startswith("Sanity: swapped labels mirror")
    raw = made["tiers"]["exact"]
    # As if the shuffled labels had been learned from: by much the same under every shuffle.
    for number, labels in enumerate(raw["sanity"][2]["wins"]):
        raw["sanity"][2]["wins"][labels] = ("0" * (130 * (labels == "swapped") + number)).ljust(200, "1")
    raw["analysis"] = analyse(raw)
    assert raw["analysis"]["sanity"]["failed"] == ["dpo"]
    assert raw["analysis"]["sanity"]["methods"][2]["mirrors"]
    assert markdown(made).startswith("A SANITY CHECK FAILED (exact tier, dpo)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exercise, "run_exercise", lambda *a: made)
        with pytest.raises(TrainingError, match="sanity check failed"):
            command.run(["--quick", "--output", str(tmp_path)])
    assert (tmp_path / "report.md").read_text().startswith("A SANITY CHECK FAILED")
    assert first_line(made) in (tmp_path / "report.html").read_text()


def test_the_page_has_the_power_before_the_results(made: dict[str, Any]) -> None:
    text = markdown(made)
    assert text.index("What the design could find") < text.index("The chapter's claims") < text.index("exact tier")
    assert "chapter's step" in text


def test_what_differs_is_named(made: dict[str, Any]) -> None:
    other = copy.deepcopy(made)
    other["date"], other["cost"]["measured"]["dpo"]["step_s"] = "tomorrow", 9.0
    other["cost"]["predicted"][0] |= {"peak_gib": 2.1, "copy_ratio": 1.4}
    other["verdicts"][2]["measured"] = "1.4 times"
    assert list(differing(made, other)) == []
    other["verdicts"][0]["verdict"] = "?"
    assert list(differing(made, other)) == ["/verdicts/0/verdict"]


@pytest.mark.parametrize("words", [["--steps", "3"], ["--batch-size", "2"]])
def test_the_exercise_sets_everything_else_itself(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="--seeds and --processes alone"):
        command.parse_request(["--quick", "--output", "x", *words])


def test_a_part_of_the_exercise_can_be_asked_for() -> None:
    words = ["--full", "--tier", "open", "--methods", "orpo, dpo", "--seeds", "3", "--processes", "2", "--output", "x"]
    asked = command.parse_request(words)
    assert asked == command.ExerciseRequest("full", Path("x"), "open", ("orpo", "dpo"), 3, 2)
    part = sizes.part_of(sizes.EXTENTS["full"], sizes.Part("open", ("dpo", "orpo"), 3))
    assert part.open == sizes.FULL_OPEN._replace(contenders=("orpo", "dpo"), seeds=3)
    assert sizes.part_of(sizes.EXTENTS["full"], sizes.Part()) == sizes.EXTENTS["full"]
    assert list(sizes.tiers_of(part, "exact")) == ["exact"]
    # SFT takes part in one tier of the quick exercise alone.
    both = sizes.part_of(sizes.EXTENTS["quick"], sizes.Part(methods=("orpo", "dpo", "sft")))
    assert [size.contenders for size in both] == [("orpo", "dpo", "sft"), ("orpo", "dpo")]
    for flags in (["--tier", "open"], ["--processes", "2"]):
        with pytest.raises(ConfigError, match=rf"{' '.join(flags)}: .*give --quick or --full"):
            command.parse_request([*flags, "--output", "x"])


@pytest.mark.parametrize(("methods", "match"), [(("orpo", "dpo", "ppo"), "ppo: does not"), (("orpo",), "orpo and dpo")])
def test_methods_that_the_exercise_cannot_do_with_are_refused(methods: tuple[str, ...], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        sizes.part_of(sizes.EXTENTS["quick"], sizes.Part(methods=methods))


def test_settings_of_the_first_variant_are_those_of_all_where_tuning_is_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def training(task: Any, cells: Any, variant: str, *others: Any, test: bool = False) -> dict[str, Any]:
        asked.append((variant, test))
        point = {"step": 0, "gold": 1.0, "kl": 0.0}
        return {"curve": [point], "best": 0, "failed": None, "golds": [[1.0]]}

    monkeypatch.setattr(study, "training", training)
    dpo = next(each for each in CONTENDERS if each.name == "dpo")
    for once, expected in ((True, {("a", False), ("b", True)}), (False, {("b", False), ("b", True)})):
        size = TINY._replace(variants=("a", "b"), tuned_once=once)
        task: Any = SimpleNamespace(size=size, bound=1.0)
        study.run_contender(task, None, "b", dpo, {})  # type: ignore[arg-type]
        assert set(asked) == expected
        asked.clear()


def test_seeds_of_a_setting_are_judged_where_all_of_them_were_looked_at() -> None:
    def of(*looks: tuple[int, float, float]) -> dict[str, Any]:
        curve = [{"step": step, "gold": gold, "kl": kl} for step, gold, kl in looks]
        return {"curve": curve, "failed": None, "golds": [[gold - 0.1, gold + 0.1] for _, gold, _ in looks]}

    first = of((0, 0.0, 0.0), (4, 0.2, 0.5), (8, 0.6, 1.5))
    found = study.judged_together([first, of((0, 0.0, 0.0), (4, 0.4, 0.5), (8, 0.4, 0.4))], 1.0)
    assert found == {
        "score": 0.5, "kl": 0.95, "best": 2, "step": 8, "failed": None, "valid_gold": pytest.approx([0.4, 0.6]),
    }  # fmt: skip
    # Beyond the bound in the mean; then a seed that ended before.
    assert study.judged_together([first, of((0, 0.0, 0.0), (4, 0.4, 0.5), (8, 0.9, 0.6))], 1.0)["step"] == 4
    assert study.judged_together([first, {**of((0, 0.0, 0.0)), "failed": "why"}], 1.0) == {
        "score": 0.0, "kl": 0.0, "best": 0, "step": 0, "failed": "why", "valid_gold": pytest.approx([-0.1, 0.1]),
    }  # fmt: skip


UNSEEN = {"gold": 0.0, "kl": 0.0}
"""What a look finds that looks at nothing."""


class Kept:
    """Cells that live in memory."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def get(self, identity: dict[str, Any], compute: Any) -> Any:
        key = json.dumps(identity)
        if key not in self.found:
            self.found[key] = compute()
        return self.found[key]


def test_a_training_of_fixed_steps_is_judged_where_tuning_said() -> None:
    # A setting that is in both rounds, of the same length.
    size = TINY._replace(rounds=(Round(2, 4), Round(1, 4, 2)), looks=2, fixed_steps=True, contenders=("dpo",))
    task = GoldTask(size)
    cells: Any = Kept()
    dpo = next(each for each in CONTENDERS if each.name == "dpo")
    base = study.base_cell(task, cells)
    variant = "0 % flipped"
    found = study.run_contender(task, cells, variant, dpo, base["valid"])
    chosen = found["chosen"]
    assert [(each["steps"], each["seeds"]) for each in found["tuning"]] == [(4, 1), (4, 1), (4, 2)]
    assert chosen["step"] == found["tuning"][-1]["step"]
    figures = tiers.raw_figures({"size": study.size_record(size, task.bound), "variants": {variant: {"dpo": found}}})
    for what, published, recomputed in figures:
        assert published == (pytest.approx(recomputed) if isinstance(recomputed, float) else recomputed), what
    setting = Setting(chosen["rate"], chosen["strength"])
    assert [[look["step"] for look in each["curve"]] for each in found["seeds"]] == [[0, 1, 2, 4]] * 2
    for step in {chosen["step"], 2}:
        final = study.fixed_training(task, cells, variant, dpo, setting, step, 1)
        assert final["curve"][final["best"]]["step"] == step
        # The same steps again, by nothing but the trainer.
        with fresh_run(task.loaded, dpo.config(setting, task.shared(), 1)) as run:
            if step:
                train(run, dpo, task.train_pairs(variant), (step,), lambda run: UNSEEN, 1.0, UNSEEN)
            again = task.look("test")
        assert final["test"]["gold"] == pytest.approx(again["gold"], abs=1e-6)
        assert final["test_curve"][final["best"]]["kl"] == pytest.approx(np.mean(again["kl"]), abs=1e-6)
    # It goes on behind the step that it is judged at, until it is beyond the last KL target.
    task.kl_targets = (1e-9,)
    cells.found = {key: value for key, value in cells.found.items() if "final" not in key}
    final = study.fixed_training(task, cells, variant, dpo, setting, 2, 0)
    assert [look["step"] for look in final["curve"]] == [0, 1, 2]
    assert list(final["at_kl"]) == ["1e-09"]


@pytest.mark.parametrize("size", [size for extent in sizes.EXTENTS.values() for size in extent])
def test_a_size_is_the_same_after_json(size: Size) -> None:
    assert sizes.size_from(json.loads(json.dumps(size._asdict()))) == size


@pytest.mark.parametrize("size", [size for extent in sizes.EXTENTS.values() for size in extent])
def test_the_cells_of_a_study_are_as_many_as_were_announced(size: Size) -> None:
    asked = set()

    class Counted:
        def get(self, identity: dict[str, Any], compute: Any) -> dict[str, Any]:
            asked.add(json.dumps(identity))
            point = {"step": 0, "gold": identity.get("rate", 0.0), "kl": 0.0}
            return {"curve": [point], "failed": None, "golds": [[1.0]], "wins": [], "test": {}, "valid": {}}

    task: Any = SimpleNamespace(name="t", size=size, bound=1.0, facts=dict)
    cells: Any = Counted()
    for found in study.run_study(task, cells):
        assert found["variants"]
    # What the likelihood term does alone is the same training for methods that were given one rate.
    shared = sum(each.likelihood for each in study.contenders_of(size)) * 2 * size.shuffles
    assert study.count_cells(size) - shared <= len(asked) <= study.count_cells(size)


def test_what_is_still_to_come_is_named_by_tier_and_variant() -> None:
    size = {"variants": ["a", "b", "c"]}
    assert exercise.unfinished(["exact", "open"], {"exact": {"size": size, "variants": {"a": 0, "b": 0}}}) == [
        "exact, c",
        "open",
    ]
    assert exercise.unfinished(["open"], {"open": {"size": size, "variants": {"a": 0, "b": 0, "c": 0}}}) == []


def test_the_open_tier_alone_has_a_page_without_claims(made: dict[str, Any]) -> None:
    del made["cost"], made["verdicts"]
    tier = made["tiers"].pop("exact")
    del tier["sanity"], tier["analysis"]["sanity"]
    tier["size"]["tuned_once"] = True
    made["tiers"]["open"] = tier
    text = markdown(made)
    assert text.startswith("Sanity: not checked here")
    assert "claims" not in text
    assert text.count("tuned on 0 % flipped") == 1
    assert check(made)[1] == []
    assert list(differing(made, made)) == []


@pytest.mark.slow
def test_what_was_done_is_not_done_again_and_a_second_run_is_the_same(run_folder: Path, tmp_path: Path) -> None:
    first = read(run_folder / "results.json")
    assert check(first)[1] == []
    cells = run_folder / "cells" / "exact"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "train", None)
        exercise.run_exercise("quick", run_folder, [], quiet())
    assert list(differing(first, read(run_folder / "results.json"))) == []
    # Interrupted: some cells are gone, one was cut off while it was written.
    files = sorted(path for path in cells.glob("*.json") if path.name != "exercise.json")
    for file in files[::4]:
        file.unlink()
    files[1].write_text(files[1].read_text()[:50])
    exercise.run_exercise("quick", run_folder, [], quiet())
    exercise.run_exercise("quick", tmp_path, [], quiet())
    for folder in (run_folder, tmp_path):
        assert list(differing(first, read(folder / "results.json"))) == []


@pytest.mark.slow
def test_several_processes_give_what_one_gives(run_folder: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # The first process leaves all trainings to the others.
        patch.setattr(study, "train", None)
        # A CPU's sums depend on how many threads a product is shared by: as many as in this process.
        for variable in helpers.THREADS:
            patch.setenv(variable, os.environ.get(variable, str(os.cpu_count())))
        exercise.run_exercise("quick", tmp_path, [], quiet(), processes=2)
    assert list(differing(read(run_folder / "results.json"), read(tmp_path / "results.json"))) == []


@pytest.mark.slow
def test_cells_of_another_exercise_are_not_taken(run_folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        other = sizes.make_tier("exact", TINY._replace(pairs=48))
        patch.setattr(exercise, "tiers_of", lambda extent, tier: {"exact": other})
        with pytest.raises(ConfigError, match="another exercise"):
            exercise.run_exercise("quick", run_folder, [], quiet())
