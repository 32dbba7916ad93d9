"""Whether a run fits, told from the command line."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.cli.fit import PROG, fit_request, main
from orpo_mlx.config.checks import make_config
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.memory.fit import predicted, remedies, verdict
from orpo_mlx.memory.predict import Prediction
from orpo_mlx.models.loading import LoadedModel


@pytest.fixture
def arguments(model_folder: Path) -> list[str]:
    return ["--model", str(model_folder), "--max-seq-length", "64", "--batch-size", "2", "--method", "dpo"]


def test_a_small_model_fits_the_smallest_mac(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    # What takes the time, before it is taken.
    assert lines.pop(0).startswith("A step is run on models of this shape with few layers")
    assert lines[0] == "dpo, 2 pairs of 64 tokens a side, predicted:"
    assert [line.split()[0] for line in lines[1:-1]] == [*Prediction._fields, "peak"]
    assert lines[-1] == "It fits Macs with 8 GiB and more."


def test_nothing_is_loaded(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> LoadedModel:
        raise AssertionError("loaded")

    for place in ("orpo_mlx.models.loading.load", "orpo_mlx.training.prepare.load", "mlx.core.load"):
        monkeypatch.setattr(place, refuse)
    assert main(arguments) == 0


_TOKENS = TrainingConfig().micro_batch_tokens


def stand_in(peaks: dict[tuple[int, str, int], float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks by --micro-batch-tokens, --memory and --max-seq-length."""

    def peak(config: TrainingConfig, *_: Any) -> Prediction:
        key = (config.micro_batch_tokens, config.memory, config.max_seq_length)
        return Prediction(peaks[key], 0, 0, 0, 0, 0)

    monkeypatch.setattr("orpo_mlx.memory.fit.predicted", peak)


def test_what_would_make_it_fit(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments[3] = "512"
    peaks = {(_TOKENS, "auto", 512): 20.0, (1, "auto", 512): 15.0, (1, "balanced", 512): 13.0}
    peaks |= {(1, "thrift", 512): 12.0, (1, "thrift", 256): 10.0}
    stand_in({**peaks, (1, "thrift", 128): 0.0, (1, "thrift", 64): 0.0}, monkeypatch)
    assert main([*arguments, "--memory", "16"]) == 0
    assert capsys.readouterr().out.splitlines()[-6:] == [
        "A Mac with 16 GiB recommends a working set of 10.67 GiB: it does not fit.",
        "That is the lowest figure reported for such Macs: newer systems recommend more, and train asks the device.",
        "  with --micro-batch-tokens 1: 15.00 GiB",
        "  with --micro-batch-tokens 1 --memory balanced: 13.00 GiB",
        "  with --micro-batch-tokens 1 --memory thrift: 12.00 GiB",
        "  with --micro-batch-tokens 1 --memory thrift --max-seq-length 256: 10.00 GiB, which fits",
    ]


def test_nothing_makes_it_fit(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks = {(_TOKENS, "auto", 64): 9.0, (1, "auto", 64): 8.0, (1, "balanced", 64): 7.5, (1, "thrift", 64): 7.0}
    stand_in(peaks, monkeypatch)
    assert main([*arguments, "--memory", "8"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("No flag makes it fit")


def test_flags_already_given_are_not_advised() -> None:
    config = make_config({"micro_batch_tokens": 1, "grad_checkpoint": True, "max_seq_length": 200})
    assert list(remedies(config)) == [({"max_seq_length": 100}, dataclasses.replace(config, max_seq_length=100))]


def test_what_train_would_refuse_is_not_advised() -> None:
    for settings in ({"plain_head": True}, {"memory": "plain", "router_aux_loss_coef": 0.01}):
        found = list(remedies(make_config({"max_seq_length": 256, **settings})))
        assert found
        for changed, config in found:
            assert "memory" not in changed
            make_config(config.settings())


def test_verdicts() -> None:
    assert verdict(10.6, 16).endswith("10.67 GiB: it fits.")
    assert verdict(10.7, 16).endswith("10.67 GiB: it does not fit.")
    assert verdict(10.7, None) == "It fits Macs with 18 GiB and more."
    assert verdict(1e4, None) == "It fits no Mac."


def test_a_longer_prompt_takes_less(model_folder: Path) -> None:
    from orpo_mlx.memory.skeleton import read_blueprint

    config = make_config({"batch_size": 1, "max_seq_length": 128})
    blueprint = read_blueprint(str(model_folder))
    # The prompt is run once for both completions.
    assert predicted(config, blueprint, 120).peak < predicted(config, blueprint, 8).peak


def test_settings() -> None:
    config, memory, prompt = fit_request(["--memory", "16", "--prompt-tokens", "7", "--batch-size", "3"])
    assert (config.batch_size, memory, prompt) == (3, 16.0, 7)
    assert fit_request([])[1:] == (None, None)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--memory", "much"], "--memory: found 'much', expected a number greater than 0."),
        (["--memory=-1"], "--memory: found '-1'"),
        (["--memory", "inf"], "--memory: found 'inf'"),
        (["--prompt-tokens", "1.5"], "--prompt-tokens: found '1.5', expected a whole number greater than 0."),
        (["--prompt-tokens", "64"], "--max-seq-length 64: leaves no token for the completion"),
        (["--max-seq-length", "1"], "--max-seq-length 1: leaves no token for the completion"),
        (["--batch-size", "0"], "--batch-size: found '0'"),
        (["--method", "orop"], "did you mean orpo?"),
        (["--model", "./nowhere"], "--model ./nowhere: no such file or folder"),
        (["--num-layers", "9"], "--num-layers 9: the model has 2 layers"),
        (["--lora-rank", "2147483647"], "lora_parameters.rank: found 2147483647, expected 32 at most"),
        (["--test"], "--test: this command is about the steps of a new training; leave it out."),
        (["--resume"], "--resume: this command is about"),
        (["--dry-run"], "--dry-run: this command is about"),
    ],
)
def test_wrong_input_is_one_sentence(
    arguments: list[str], words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *words]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(rf"{re.escape(PROG)}: error: .*\n", err)
    assert expected in err
