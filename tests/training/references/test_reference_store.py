"""What is kept on disk comes back as it was, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from orpo_mlx.cli.train import main
from orpo_mlx.models.adapters import add_adapters
from orpo_mlx.training.references import reference_store as reference_table
from orpo_mlx.training.references.reference import ReferenceLogProbs
from orpo_mlx.training.references.reference_store import ReferenceTable, identity_digest, weights_fingerprint
from orpo_mlx.types import Batch, TokenizedPair
from tests.conftest import make_model
from tests.helpers.quiet_training import flags, rows, run_quietly
from tests.training.test_loop import fail_at

IDENTITY = {"weights": "abc", "nll": None}


def key(number: int) -> bytes:
    """A digest; those of multiples of 256 end in a zero byte, which NumPy's byte strings drop."""
    return number.to_bytes(8, "big") * 2


def filled(path: Path, numbers: range = range(5)) -> ReferenceTable:
    table = ReferenceTable(path, IDENTITY)
    for number in numbers:
        table.add(key(256 * number), -number - 0.1, -number / 3)
    table.save()
    return table


def test_rows_come_back_as_float32_and_no_other(tmp_path: Path) -> None:
    filled(tmp_path / "new" / "a.npz")
    table = ReferenceTable(tmp_path / "new" / "a.npz", IDENTITY)
    assert len(table) == 5
    assert table.notes == []
    for number in range(5):
        assert table.get(key(256 * number)) == (np.float32(-number - 0.1), np.float32(-number / 3))
    assert table.get(key(1)) is None
    assert table.get(key(1 << 40)) is None
    assert ReferenceTable().get(key(0)) is None


def test_what_is_known_stays(tmp_path: Path) -> None:
    table = filled(tmp_path / "a.npz")
    table.add(key(0), 5.0, 5.0)
    assert table.get(key(0)) == (np.float32(-0.1), 0.0)


def test_rows_of_another_identity_are_known_and_stay_out_of_the_file(tmp_path: Path) -> None:
    theirs = filled(tmp_path / "a.npz")
    others: list[dict[str, object]] = [{**IDENTITY}, {**IDENTITY, "versions": 2}]
    for number, identity in enumerate(others):
        path = tmp_path / f"{number}.npz"
        table = ReferenceTable(path, identity)
        table.restore(theirs.arrays(), theirs.identity)
        assert len(table) == 5
        table.add(key(9), -9.0, -9.0)
        table.save()
        assert table.get(key(9)) == (-9.0, -9.0)
        assert path.exists() == (identity == IDENTITY)


def test_two_runs_at_once_lose_nothing(tmp_path: Path) -> None:
    first, second = (ReferenceTable(tmp_path / "a.npz", IDENTITY) for _ in range(2))
    first.add(key(1), -1.0, -1.0)
    second.add(key(1), -2.0, -2.0)
    second.add(key(2), -3.0, -3.0)
    second.save()
    first.save()
    assert first.get(key(1)) == (-1.0, -1.0)
    assert ReferenceTable(tmp_path / "a.npz", IDENTITY).get(key(2)) == (-3.0, -3.0)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    """One bit of a stored number."""
    place = content.index(np.float32(-1 / 3).tobytes())
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("damage", [cut, flip, lambda _: b"", lambda _: b"PK\x03\x04 not a file of ours"])
def test_a_damaged_file_is_told_and_not_used(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a.npz"
    filled(path)
    path.write_bytes(damage(path.read_bytes()))
    table = ReferenceTable(path, IDENTITY)
    assert len(table) == 0
    (note,) = table.notes
    assert note.startswith(f"{path} is damaged (")
    assert note.endswith("computed again.")
    table.add(key(9), -9.0, -9.0)
    table.save()
    assert ReferenceTable(path, IDENTITY).get(key(9)) == (-9.0, -9.0)


@pytest.mark.parametrize(
    ("keys", "logps"),
    [
        (np.array([key(2), key(1)]), np.zeros((2, 2), np.float32)),
        (np.array([key(1), key(2)]), np.zeros((1, 2), np.float32)),
        (np.array([key(1)]), np.full((1, 2), np.nan, np.float32)),
        (np.array([key(1)]), np.zeros((1, 2), np.float64)),
        (np.array([key(1)], object), np.zeros((1, 2), np.float32)),
    ],
)
def test_arrays_that_are_not_ours_are_not_used(tmp_path: Path, keys: object, logps: object) -> None:
    path = tmp_path / "a.npz"
    filled(path)
    with np.load(path) as arrays:
        identity = arrays["identity"]
    np.savez(path, keys=keys, logps=logps, identity=identity)  # type: ignore[arg-type]
    table = ReferenceTable(path, IDENTITY)
    assert len(table) == 0
    assert "is damaged" in table.notes[0]


def test_a_foreign_file_is_told_and_not_used(tmp_path: Path) -> None:
    filled(tmp_path / "a.npz")
    table = ReferenceTable(tmp_path / "a.npz", {**IDENTITY, "weights": "abd"})
    assert len(table) == 0
    assert "is of another model, other settings or versions" in table.notes[0]


def test_a_disk_that_cannot_be_written_costs_a_note(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    table = filled(tmp_path / "file" / "a.npz")
    assert len(table) == 5
    assert "cannot be kept there" in table.notes[0]
    table.add(key(1), -1.0, -1.0)
    table.save()
    assert len(table.notes) == 1


def test_saves_along_the_way_wait_for_a_tenth(tmp_path: Path) -> None:
    table = filled(tmp_path / "a.npz", range(100))
    sizes = []
    for number in range(100, 115):
        table.add(key(256 * number), -1.0, -1.0)
        table.save(sparingly=True)
        sizes.append(len(ReferenceTable(tmp_path / "a.npz", IDENTITY)))
    assert sizes == 11 * [100] + 4 * [112]
    table.save()
    assert len(ReferenceTable(tmp_path / "a.npz", IDENTITY)) == 115


def test_rows_are_small_and_found(tmp_path: Path) -> None:
    count = 200_000
    table = ReferenceTable(tmp_path / "a.npz", IDENTITY)
    rows = np.sort(np.frombuffer(np.random.default_rng(0).bytes(16 * count), "S16"))
    table._rows = reference_table.ReferenceRows(rows, np.zeros((count, 2), np.float32))
    table.add(b"0" * 16, -1.0, -1.0)
    table.save()
    assert (tmp_path / "a.npz").stat().st_size < 24.1 * count
    assert all(table.get(bytes(row)) is not None for row in rows[:1000] if len(row) == 16)


def test_an_identity_has_one_name() -> None:
    assert identity_digest({"a": 1, "b": 2}) == identity_digest({"b": 2, "a": 1})
    assert identity_digest({"a": 1}) != identity_digest({"a": 2})
    assert len(identity_digest({})) == 32


def test_a_fingerprint_sees_content_dtype_and_scale() -> None:
    def fingerprint(scale: float = 4.0, dtype: mx.Dtype = mx.float32, nudge: float = 0.0) -> str:
        model = make_model()
        mx.random.seed(1)
        add_adapters(model, "lora", -1, {"rank": 2, "scale": scale, "dropout": 0.0})
        model.set_dtype(dtype)
        head = np.array(model.lm_head.weight.astype(mx.float32))
        head[-1, -1] += nudge
        model.lm_head.weight = mx.array(head).astype(dtype)
        return weights_fingerprint(model)

    assert fingerprint() == fingerprint()
    others = [
        fingerprint(scale=5.0),
        fingerprint(dtype=mx.bfloat16),
        fingerprint(dtype=mx.float16),
        fingerprint(nudge=1e-5),
    ]
    assert len({fingerprint(), *others}) == 5


def test_rows_that_are_not_finite_are_known_to_this_run_and_written_nowhere(tmp_path: Path) -> None:
    table = filled(tmp_path / "a.npz")
    table.add(key(7), float("nan"), -1.0)
    table.add(key(8), -8.0, -8.0)
    known = table.arrays()
    table.save()
    assert np.isnan(table.get(key(7)) or ()).any()
    other = ReferenceTable(tmp_path / "a.npz", IDENTITY)
    assert not other.notes
    assert (other.get(key(7)), other.get(key(8)), other.get(key(1))) == (None, (-8.0, -8.0), table.get(key(1)))
    restored = ReferenceTable()
    restored.restore(known)
    assert len(restored) == len(other)
    # Nor is the file written again for it at each save.
    before = (tmp_path / "a.npz").stat().st_mtime_ns
    table.save()
    assert (tmp_path / "a.npz").stat().st_mtime_ns == before


def count_reference_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pairs of every reference forward, as they come."""
    passes: list[int] = []
    compute = ReferenceLogProbs._compute

    def counted(self: ReferenceLogProbs, pairs: Sequence[TokenizedPair], batch: Batch) -> None:
        passes.append(len(pairs))
        compute(self, pairs, batch)

    monkeypatch.setattr(ReferenceLogProbs, "_compute", counted)
    return passes


@pytest.mark.parametrize("start", ["fresh", "warm", "full"])
def test_a_reference_is_computed_once_for_all_epochs_and_runs(
    settings: dict[str, Any], start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if start == "warm":
        run_quietly({**settings, "adapter_path": str(tmp_path / "first")})
        settings["resume_adapter_file"] = str(tmp_path / "first")
    settings |= {"method": "dpo", "iters": 7, "fine_tune_type": "full" if start == "full" else "lora"}
    passes = count_reference_passes(monkeypatch)
    run_quietly(settings)
    # The held-out pairs are met before the first step, where the policy is the reference.
    assert sum(passes) == (6 if start == "fresh" else 18)
    first = rows(settings)
    passes.clear()
    run_quietly({**settings, "adapter_path": str(tmp_path / "second")})
    assert passes == []
    numbers = [
        [{**row, "pair_tokens_per_s": 0, "peak_memory_gib": 0} for row in table]
        for table in (first, rows({"adapter_path": str(tmp_path / "second")}))
    ]
    assert numbers[0] == numbers[1]
    run_quietly({**settings, "seed": 1, "beta": 0.5})
    assert sum(passes) == 0


def test_precomputing_takes_the_pairs_to_come_and_changes_no_number(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    settings |= {"method": "dpo", "iters": 2, "val_batches": 1, "test_batches": 0}
    run_quietly(settings)
    first = [row["loss"] for row in rows(settings)]
    shutil.rmtree(own_cache)
    passes = count_reference_passes(monkeypatch)
    run_quietly({**settings, "precompute_reference": True})
    assert passes == [2, 2, 2]
    assert [row["loss"] for row in rows(settings)] == first


def test_a_run_that_ends_early_keeps_its_reference(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings |= {"method": "dpo", "val_batches": 0, "test_batches": 0}
    with monkeypatch.context() as patch:
        fail_at(3, KeyboardInterrupt(), patch)
        assert main(flags(settings)) == 130
    passes = count_reference_passes(monkeypatch)
    assert main([*flags(settings), "--overwrite"]) == 0
    assert sum(passes) == 2
    assert "4 pairs have reference log-probs from earlier runs with this model;" in capsys.readouterr().out


def test_a_damaged_reference_is_computed_again(
    settings: dict[str, Any], own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings["method"] = "dpo"
    run_quietly(settings)
    first = [row["loss"] for row in rows(settings)]
    (file,) = (own_cache / "reference").iterdir()
    file.write_bytes(file.read_bytes()[:-30])
    assert main(flags(settings)) == 0
    assert f"{file} is damaged" in capsys.readouterr().out
    assert [row["loss"] for row in rows(settings)] == first


def test_nothing_is_kept_where_the_cache_is_off(
    settings: dict[str, Any], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORPO_MLX_CACHE", "off")
    run_quietly({**settings, "method": "dpo"})
    assert not own_cache.exists()
