"""What a comparison is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from orpo_mlx.cli.compare import parse_names, parse_plan
from orpo_mlx.compare.plan import Budget
from orpo_mlx.errors import ConfigError

BASE = ["--output", "out", "--steps", "5"]


def test_arms_carry_their_own_flags() -> None:
    plan = parse_plan(
        [*BASE, "--methods", "orpo, dpo --reference copy ,dpo,simpo --gamma 0.3,0.5*dpo + sft", "--batch-size", "2"]
    )
    assert [arm.name for arm in plan.arms] == [
        "orpo",
        "dpo --reference copy",
        "dpo",
        "simpo --gamma 0.3",
        "0.5*dpo + sft",
    ]
    assert [arm.needs_reference for arm in plan.arms] == [False, True, True, False, True]
    assert [arm.copies_reference for arm in plan.arms] == [False, True, False, False, False]
    assert [arm.beta for arm in plan.arms] == [0.1, 0.1, 0.1, 2.0, 0.1]
    assert plan.arms[1].sweep_key == plan.arms[2].sweep_key != plan.arms[3].sweep_key
    assert plan.config.batch_size == 2
    assert plan.arguments == ("--batch-size", "2")


@pytest.mark.parametrize(
    ("words", "budget", "share"),
    [
        (["--steps", "4"], ("steps", 4), 0.5),
        (["--pair-tokens", "100"], ("pair_tokens", 100), 0.3),
        (["--seconds", "2.5"], ("seconds", 2.5), 0.4),
    ],
)
def test_budgets(words: list[str], budget: tuple[str, float], share: float) -> None:
    found = parse_plan(["--output", "out", *words]).budget
    assert tuple(found) == budget
    assert found.share(steps=2, pair_tokens=30, seconds=1.0) == share
    assert str(Budget("pair_tokens", 12000)) == "12,000 pair tokens"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--output", "out"], "give exactly one"),
        ([*BASE, "--seconds", "3"], "give exactly one"),
        ([*BASE, "--methods", "orpo,,dpo"], "found an empty name"),
        ([*BASE, "--methods", "orpo,orpo"], "stands in the list twice"),
        ([*BASE, "--methods", "orop"], "did you mean orpo"),
        ([*BASE, "--methods", "orpo --reference copy"], "compares with no reference"),
        ([*BASE, "--methods", "dpo --reference copy,orpo"], "the first method"),
        ([*BASE, "--methods", "orpo --batch-size 2"], "--batch-size is not a method's"),
        ([*BASE, "--methods", "orpo --beta 'x"], "cannot be read"),
        ([*BASE, "--sanity", "sft"], "--sanity sft: is not among --methods"),
        ([*BASE, "--learning-rates", "1e-4,x"], "--learning-rates 1e-4,x: expected"),
        ([*BASE, "--learning-rates", "1e-4,1e-4"], "expected different numbers"),
        ([*BASE, "--beta-factors", "0"], "--beta-factors 0: expected"),
        ([*BASE, "--iters", "3"], "--iters: a comparison sets this itself"),
        ([*BASE, "--beta", "3"], "--beta: a comparison sets this itself"),
        ([*BASE, "--report-to", "tensorboard"], "--report-to: a comparison sets this itself"),
        ([*BASE, "--sample-every", "3"], "--sample-every: a comparison sets this itself"),
        ([*BASE, "--learning-rate", "3"], "--learning-rate: a comparison sets this itself"),
        ([*BASE, "--fine-tune-type", "full"], "the base model must stay at hand"),
        (["--steps", "3", "--output", __file__], "is a file; give a folder"),
    ],
)
def test_what_cannot_be_compared(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_plan(words)


@pytest.mark.parametrize(
    "words", [["--steps", "0"], ["--steps", "x"], ["--seconds", "inf"], ["--valid-pairs", "-2"], ["--accuracy", "2"]]
)
def test_numbers_out_of_range_end_it(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_plan(["--output", "out", *words])
    assert left.value.code == 2
    assert f"argument {words[0]}: found {words[1]!r}, expected" in capsys.readouterr().err


def test_the_identity_is_what_all_arms_share(tmp_path: Path) -> None:
    one = parse_plan([*BASE, "--methods", "orpo", "--seeds", "1"]).identity
    assert parse_plan([*BASE, "--methods", "orpo,dpo", "--seeds", "3", "--learning-rates", "1e-3"]).identity == one
    assert parse_plan([*BASE, "--batch-size", "2"]).identity != one
    assert parse_plan(["--output", "out", "--steps", "6"]).identity != one


def test_commas_within_a_value_part_no_methods() -> None:
    listed = "orpo, dpo --sync-reference 0.6,512,dpo --reference copy"
    assert parse_names(listed, "--methods") == ["orpo", "dpo --sync-reference 0.6,512", "dpo --reference copy"]
