"""Win rates in the middle of a run: written, drawn, resumed, and what the best checkpoint goes by."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer
from rich.console import Console

from orpo_mlx.config.checks import make_config
from orpo_mlx.errors import ConfigError, ModelError
from orpo_mlx.judging.generation import Generated, Generator
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.reporting.metrics_log import read_run
from orpo_mlx.train import train
from orpo_mlx.training.checkpoints.progress import Best
from tests.conftest import CHAT_TEMPLATE, write_id_rows, write_model_folder, write_rows
from tests.helpers.kill_and_resume import adapters, metrics
from tests.helpers.tuned_adapters import ANSWER, PROMPT
from tests.reporting.test_tracking import shown

STEPS = 45


@pytest.fixture
def judged(tmp_path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    for split in ("train", "valid"):
        rows = [{"prompt": PROMPT, "chosen": ANSWER, "rejected": "no"}] * 2
        write_rows(tmp_path / "said" / f"{split}.jsonl", rows)
    return settings | {
        **{"data": str(tmp_path / "said"), "method": "sft", "iters": STEPS, "learning_rate": 1e-2},
        **{"steps_per_report": 15, "steps_per_eval": STEPS, "sample_tokens": 8, "save_every": 15, "keep": 9},
        **{"evaluate_every": 15, "judge": f"rule:regex=^{ANSWER}"},
    }


def run(settings: dict[str, Any]) -> tuple[Any, str]:
    console = Console(record=True, quiet=False, file=io.StringIO())
    result = train(make_config(settings), Reporter(console))
    return result, console.export_text()


@pytest.mark.usefixtures("undrawn")
def test_the_win_rate_stands_beside_the_loss_and_decides_what_is_best(tmp_path: Path, judged: dict[str, Any]) -> None:
    result, said = run(judged | {"save_best": True, "best_by": "win_rate", "report": True})
    log = read_run(tmp_path / "adapters")
    rates = log.points("valid", "win_rate")
    assert [step for step, _ in rates] == [15, 30, 45]
    assert rates[-1][1] == 1
    # The evaluation and the judgement of the last step are both there.
    assert log.points("valid", "loss")[-1][0] == STEPS
    assert log.points("valid", "judge_failures")[-1] == (STEPS, 0)
    best = max(rates, key=lambda point: (point[1], -point[0]))
    assert (result.best.step, result.best.win_rate, result.best.loss) == (best[0], best[1], None)
    assert (tmp_path / "adapters" / "best").resolve().name.endswith(str(best[0]))
    assert "win rate 100.0% over the base" in said
    assert "best win rate" in said
    assert "win rate over the base" in (tmp_path / "adapters" / "report.html").read_text()


def test_another_measure_begins_anew() -> None:
    by_rate, by_loss = Best(4, None, 0.6), Best(6, 1.5)
    assert by_loss.is_better_than(by_rate)
    assert by_rate.is_better_than(by_loss)
    assert not Best(8, 1.6).is_better_than(by_loss)
    assert not Best(8, None, 0.5).is_better_than(by_rate)


def test_judging_changes_no_number_and_is_the_same_after_resuming(tmp_path: Path, judged: dict[str, Any]) -> None:
    lora = {"rank": 8, "dropout": 0.1, "scale": 20.0}
    judged |= {"iters": 4, "evaluate_every": 2, "save_every": 2, "steps_per_report": 1, "lora_parameters": lora}
    run(judged | {"report_to": "tensorboard"})
    folder = tmp_path / "adapters"
    events = [
        (step, figures["win_rate"])
        for step, figures in shown(folder / "tensorboard" / "valid")
        if "win_rate" in figures
    ]
    assert events == read_run(tmp_path / "adapters").points("valid", "win_rate")
    whole = metrics(tmp_path / "adapters")
    cut = judged | {"adapter_path": str(tmp_path / "cut")}
    run(cut | {"iters": 2})
    run(cut | {"resume": True})
    rates = [[row for row in rows if "win_rate" in row] for rows in (metrics(tmp_path / "cut"), whole)]
    assert rates[0] == rates[1]
    assert len(rates[1]) == 2
    of_replies = ("evaluate_every", "judge", "sample_tokens")
    without = {name: value for name, value in judged.items() if name not in of_replies}
    run(without | {"adapter_path": str(tmp_path / "without")})
    weights = [adapters(tmp_path / name) for name in ("adapters", "cut", "without")]
    assert all((weights[0][name] == other[name]).all() for other in weights[1:] for name in other)


@pytest.mark.parametrize("templated", [True, False])
def test_prompts_are_given_as_the_run_gives_them(
    templated: bool, judged: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    def replies(self: Generator, prompts: Sequence[Sequence[int]], *_: Any) -> list[list[Generated]]:
        asked.extend(tuple(prompt) for prompt in prompts)
        return [[Generated((5,), "a", True)] for _ in prompts]

    monkeypatch.setattr(Generator, "replies", replies)
    run(judged | {"iters": 2, "evaluate_every": 2, "template_strings": templated, "report_to": None})
    tokenizer = load_tokenizer(Path(str(judged["model"])))
    turns = [{"role": "user", "content": PROMPT}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True) if templated else None
    assert set(asked) == {tuple(expected or tokenizer.encode(PROMPT))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": None}, "`evaluate_every` and `judge`"),
        ({"fine_tune_type": "full"}, "leaves no base to judge replies against"),
        ({"best_by": "win_rate"}, "`best_by=win_rate`: needs `save_best`"),
        ({"judge": "rule:no"}, "no rule 'no'"),
    ],
)
def test_what_cannot_be_judged_is_refused(judged: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run({name: value for name, value in (judged | changes).items() if value is not None})
    assert message in str(caught.value)


def test_a_judge_that_is_not_there_is_said_before_the_first_step(judged: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"`judge` \./nowhere: no such file or folder"):
        run(judged | {"judge": "./nowhere"})
    assert not (Path(str(judged["adapter_path"])) / "adapters.safetensors").exists()


def test_rows_of_token_ids_or_without_prompts_cannot_be_asked(tmp_path: Path, judged: dict[str, Any]) -> None:
    from tests.conftest import make_pairs

    for split in ("train", "valid"):
        write_id_rows(tmp_path / "ids" / f"{split}.jsonl", make_pairs(4))
        write_rows(tmp_path / "texts" / f"{split}.jsonl", [{"text": "All of it."}] * 4)
    for name in ("ids", "texts"):
        with pytest.raises(ConfigError, match="nothing to ask"):
            run(judged | {"data": str(tmp_path / name)})


def test_rows_that_are_left_out_are_not_asked(tmp_path: Path, judged: dict[str, Any]) -> None:
    refused = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('refused') }}{% endif %}"
    model = write_model_folder(tmp_path / "model", template=refused + CHAT_TEMPLATE)
    for split in ("train", "valid"):
        rows = [{"prompt": prompt, "chosen": ANSWER, "rejected": "no"} for prompt in ("no", PROMPT, "long " * 99)]
        write_rows(tmp_path / "some" / f"{split}.jsonl", rows)
    own = {"model": str(model), "data": str(tmp_path / "some"), "skip_bad_rows": True, "max_seq_length": 200}
    _, said = run(judged | {**own, "iters": 1, "evaluate_every": 1, "samples": 3})
    assert said.count("before  ") == 1
    assert "win rate" in said
