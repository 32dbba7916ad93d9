"""Methods of single completions and of lists through whole runs: data, KL estimate, running mean, resuming."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from orpo_mlx.cli.train import main
from orpo_mlx.engine.pair_scorer import group_logps
from orpo_mlx.engine.score import score_pairs
from orpo_mlx.errors import ConfigError, DataError
from orpo_mlx.models.adapters import adapters_off
from orpo_mlx.training.data_order import groups_to_come, training_order
from orpo_mlx.training.run import Run
from orpo_mlx.training.steps.gradients import step_gradient
from orpo_mlx.training.steps.step import optimiser_step
from orpo_mlx.training.steps.step_values import mismatched
from orpo_mlx.types import Example
from tests.helpers import float64_group_losses as oracle
from tests.helpers.quiet_training import make_run, rows, run_quietly
from tests.training.test_groups import rated_rows, write


def labelled_rows(count: int, labels: tuple[bool, ...] = (False, True, True)) -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)

    def ids(low: int, high: int) -> list[int]:
        found: list[int] = rng.integers(3, 90, int(rng.integers(low, high))).tolist()
        return found

    return [
        {"prompt_ids": ids(4, 12), "completion_ids": ids(3, 9), "label": labels[number % len(labels)]}
        for number in range(count)
    ]


def as_columns(run: Run, examples: list[Example]) -> dict[str, Any]:
    """What an oracle looks at, from the scores that `score` writes of the policy and of the base."""
    run.loaded.model.eval()
    policy = score_pairs(run.scorer, examples)
    with adapters_off(run.loaded.model):
        base = score_pairs(run.scorer, examples)
    run.loaded.model.train()
    width = max(len(row["logps"]) for row in policy)

    def column(rows: list[dict[str, Any]], key: str) -> oracle.Array:
        return np.array([row[key] + [0.0] * (width - len(row[key])) for row in rows], np.float64)

    return {
        "s": column(policy, "logps"),
        "ref": column(base, "logps"),
        "n": column(policy, "tokens"),
        "score": column(policy, "scores"),
    }


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
@pytest.mark.parametrize("method", ["kto", "bco", "pl", "lipo", "pro"])
def test_the_loss_of_a_step_is_the_papers(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, profile: str
) -> None:
    monkeypatch.setenv("ORPO_MLX_PROFILE", profile)
    given = labelled_rows(7) if method in ("kto", "bco") else rated_rows([4, 16, 2, 4, 3])
    settings |= {"data": write(tmp_path / "rows.jsonl", given), "method": method, "learning_rate": 0.05}
    # In one micro-batch, and in many.
    for most in (4096, 40):
        run = make_run({**settings, "micro_batch_tokens": most, "batch_size": 7, "grad_accumulation_steps": 1})
        examples = run.splits["train"].pairs[:]
        for step in (1, 2):
            optimiser_step(run, examples, step)
        x = as_columns(run, examples)
        others = as_columns(run, mismatched(examples, run.max_seq_length))
        x["kl"] = float((others["s"] - others["ref"]).mean())
        x["running"] = (run.rewards.mean, run.rewards.count)
        expected = oracle.ORACLES[method].loss(x, **run.method.parameters[method])
        found = step_gradient(run, examples)
        means = {**found.means.means(), **found.values.metrics()}
        assert means["loss"] == pytest.approx(expected.sum() / run.method.count(examples), rel=1e-4)
        if method == "kto":
            assert means["kl"] == pytest.approx(max(0.0, x["kl"]), rel=1e-3, abs=1e-5)
        if method == "bco":
            assert run.rewards.count == 14


@pytest.mark.parametrize(
    ("method", "changes"),
    [("kto", {"fine_tune_type": "full"}), ("bco", {}), ("pl", {"precompute_reference": True}), ("kto", {})],
)
def test_a_resumed_run_takes_the_same_steps(
    settings: dict[str, Any], tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    """Over two shuffled epochs, in which every prompt meets other prompts' completions anew."""
    given = rated_rows([3, 2, 4, 3, 2, 5]) if method == "pl" else labelled_rows(6)
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "train.jsonl", given)
    write(folder / "valid.jsonl", given[:3])
    settings |= {
        "data": str(folder),
        "method": method,
        **changes,
        "learning_rate": 0.01,
        "save_every": 2,
        "steps_per_eval": 2,
    }
    whole = {**settings, "adapter_path": str(tmp_path / "whole"), "iters": 6}
    run_quietly(whole)
    parts = {**settings, "adapter_path": str(tmp_path / "parts")}
    run_quietly({**parts, "iters": 2})
    run_quietly({**parts, "iters": 6, "resume": True})

    def losses(settings: dict[str, Any], split: str) -> list[float]:
        return [row["loss"] for row in rows(settings, split)]

    for split in ("train", "valid"):
        assert losses(parts, split)[-2:] == losses(whole, split)[-2:]
    if method == "kto":
        assert rows(whole, "train")[0]["kl"] == pytest.approx(0, abs=1e-4)
        assert rows(whole, "valid")[-1]["kl"] >= 0


@pytest.mark.parametrize("method", ["kto", "bco", "apo_zero_unpaired"])
def test_a_reference_that_follows_is_never_stale(settings: dict[str, Any], tmp_path: Path, method: str) -> None:
    """Moved at every step, it is the policy of the step before: nothing that it remembered is used again."""
    settings |= {"data": write(tmp_path / "rows.jsonl", labelled_rows(5)), "method": method, "learning_rate": 0.05}
    run = make_run(settings, sync_reference="1,1", batch_size=5)
    examples, reference = run.splits["train"].pairs[:], run.reference
    assert reference is not None
    batch = run.scorer.collate(examples, whole_groups=True)
    seen = []
    for step in (1, 2, 3):
        policy = group_logps(run.scorer, batch, gradient=False).logps
        means = optimiser_step(run, examples, step).means()
        # Twice: computed, and remembered.
        for _ in range(2):
            assert mx.allclose(reference.values(examples, batch)[0], policy, rtol=0, atol=1e-4).item()
        # Rewards are measured from the weights that the step began with.
        assert means["rewards/chosen"] == pytest.approx(0, abs=1e-5)
        assert means["rewards/rejected"] == pytest.approx(0, abs=1e-5)
        reference.after_step(step)
        seen.append(policy)
    assert all(not mx.allclose(one, other, atol=1e-2).item() for one, other in itertools.pairwise(seen))


def test_mismatched_rows_are_no_longer_than_others_and_known_beforehand(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    long = [
        {"prompt_ids": [5] * prompt, "completion_ids": [6] * answer, "label": True}
        for prompt, answer in ((24, 1), (1, 24))
    ]
    settings |= {"data": write(tmp_path / "rows.jsonl", [*labelled_rows(5), *long]), "method": "kto", "batch_size": 7}
    run = make_run(settings, fine_tune_type="full", max_seq_length=25, iters=3)
    train, groups, reference = run.splits["train"].pairs[:], groups_to_come(run), run.reference
    assert max(row.pair_tokens for row in mismatched(train, 99)) > 25
    assert max(row.pair_tokens for group in groups for row in group) == 25
    assert reference is not None
    reference.remember(groups)
    # Weights that define it change at the first step: what is not known by then is refused.
    for step, indices in zip((1, 2), training_order(run), strict=False):
        optimiser_step(run, [train[index] for index in indices], step)


def test_what_bco_measures_from_before_training_is_no_reward_of_it(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        write(folder / f"{split}.jsonl", labelled_rows(6))
    run_quietly({**settings, "data": str(folder), "method": "bco", "learning_rate": 0.05, "batch_size": 6})
    for split in ("valid", "test"):
        before, after = rows(settings, split)[0], rows(settings, split)[-1]
        assert before["loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert after["loss"] != pytest.approx(np.log(2), abs=1e-3)


def test_a_run_tells_its_reference_of_each_step(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"data": write(tmp_path / "rows.jsonl", labelled_rows(6)), "method": "kto", "learning_rate": 0.05}
    run_quietly({**settings, "sync_reference": "1,2", "iters": 5, "batch_size": 6})
    apart = [abs(row["rewards/chosen"]) for row in rows(settings, "train")]
    # It moves after the second and the fourth step, and the policy moves at every one.
    assert [each < 1e-5 for each in apart] == [True, False, True, False, True]


def test_labels_of_one_kind_train_and_say_so(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings |= {"data": write(tmp_path / "rows.jsonl", labelled_rows(6, (True,))), "method": "kto"}
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if not isinstance(value, bool)]
    assert main([*argv, "--no-memory-check"]) == 0
    assert (Path(settings["adapter_path"]) / "report.html").is_file()
    said = " ".join(capsys.readouterr().out.split())
    assert "6 good and 0 bad completions" in said
    assert "3 of 3 steps of an epoch have only good or only bad completions" in said
    assert "rewards/rejected" not in rows(settings, "train")[0]


@pytest.mark.parametrize(
    ("method", "given", "changes", "expected"),
    [
        ("kto", rated_rows([3]), {}, "learns from completions that are good or bad.*`pair_ratings=best_worst`"),
        ("pl", labelled_rows(1), {}, "learns from lists of rated completions, and the row holds one completion"),
        ("dpo", labelled_rows(1), {}, "learns from pairs, and the row holds one completion with a label.*kto"),
        ("pl", [], {"pair_ratings": "all"}, "makes pairs, and method pl is a loss of a list"),
        ("kto", [], {"batch_size": 1}, "give `batch_size=2` or more"),
        ("kto", [], {"nll": "sequence"}, "is no loss of a pair"),
        ("kto + dpo", [], {}, "kto is a loss of a completion and dpo is a loss of a pair"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    settings: dict[str, Any], tmp_path: Path, method: str, given: Any, changes: dict[str, Any], expected: str
) -> None:
    if given:
        settings["data"] = write(tmp_path / "rows.jsonl", given)
    with pytest.raises((ConfigError, DataError), match=expected) as caught:
        make_run(settings, method=method, **changes)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("method", ["pro", "pl", "kto"])
def test_a_pairs_margin_is_the_score_of_its_better_side(settings: dict[str, Any], tmp_path: Path, method: str) -> None:
    rated = [{**row, "scores": [5.0, 4.75]} for row in rated_rows([2, 2, 2])]
    pairs = [
        dict(zip(("chosen_ids", "rejected_ids"), row["completion_ids"], strict=True))
        | {"prompt_ids": row["prompt_ids"], "score_chosen": 5.0, "score_rejected": 4.75}
        for row in rated
    ]
    bare = [{key: value for key, value in row.items() if "score" not in key} for row in pairs]

    def loss(rows: list[dict[str, Any]]) -> float:
        run = make_run(settings, data=write(tmp_path / "rows.jsonl", rows), method=method, batch_size=3)
        train = run.splits["train"].pairs[:]
        optimiser_step(run, train, 1)
        return step_gradient(run, train).means.means()["loss"]

    # Which of two is good or better is all that kto and pl ask.
    assert loss(pairs) == pytest.approx(loss(bare if method == "kto" else rated), rel=1e-6)
    assert (loss(pairs) == pytest.approx(loss(bare), rel=1e-3)) == (method != "pro")


def test_best_and_worst_of_ratings_are_good_and_bad(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["data"] = write(tmp_path / "rows.jsonl", rated_rows([4, 4]))
    run = make_run(settings, method="apo_zero_unpaired", pair_ratings="best_worst")
    assert run.method.count(run.splits["train"].pairs[:]) == 4
