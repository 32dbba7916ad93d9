"""The story of `orpo-mlx iterate`: rounds of pairs, training and evaluation.

Read it from top to bottom. A round has three stages, each of which can be killed: pairs go on with the next group of
prompts, a training with its newest checkpoint, and an evaluation is done again. What is done stands in `rounds.json`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orpo_mlx.config.checks import checked_config
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.data.pairs import parse_columns
from orpo_mlx.data.prompts import Prompt, distinct, read_prompts, spread
from orpo_mlx.data.sources import find_splits
from orpo_mlx.errors import ConfigError, DataError
from orpo_mlx.files import read_json_table, save_json, sha256_of
from orpo_mlx.folder_lock import locked
from orpo_mlx.judging.contest import check_answers, check_judge
from orpo_mlx.judging.evaluate import Plan, evaluate, write_replies
from orpo_mlx.judging.generation import Generated
from orpo_mlx.judging.make_pairs import PairCounts, PairPlan, make_pairs
from orpo_mlx.judging.ranking import summary
from orpo_mlx.judging.requests import Loading, Side
from orpo_mlx.judging.sides import rendered, require_tokenizer
from orpo_mlx.models.loading import find
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.reporting.hub import check_ready
from orpo_mlx.reporting.services import parse_services, require_installed
from orpo_mlx.rounds.report import write_report
from orpo_mlx.rounds.settings import TRAIN, RoundsConfig
from orpo_mlx.run_folder import ADAPTERS_FILE
from orpo_mlx.train import train
from orpo_mlx.training.prepare import check_parts, refuse_to_wait_for_validation
from orpo_mlx.training.references.choose_reference import find_other_model

RECORD = "rounds.json"
"""What is done, in the output folder."""

_DIFFERENT = 2
"""Rounds whose trainings differ in more than paths: the first starts from the model, all others from adapters."""


class Rounds:
    """The rounds in a folder.

    Args:
        config: their settings.
        folder: receives `round-N` (a run), `round-N-pairs`, evaluations, `rounds.json` and the report.
        reporter: where is said what happens.

    Raises:
        UserError: settings or data cannot be used, or the folder holds rounds of other settings.
    """

    def __init__(self, config: RoundsConfig, folder: Path, reporter: Reporter) -> None:
        self.config = config
        self.folder = folder
        self.reporter = reporter
        self.judge = config.make_judge()
        self.prompts, self.asked = prompts_of(config)
        # The prompts that are compared come last: without this, after hours.
        check_judge(self.judge, [*self.prompts, *self.asked])
        check_trainings([self.training(number) for number in range(1, 1 + min(config.rounds, _DIFFERENT))])
        check_model(config, self.asked)
        self.record = self._open_record()

    def run(self) -> dict[str, Any]:
        """All rounds that are left, until one of the reasons to stop; what `rounds.json` holds at the end.

        Raises:
            UserError: a round cannot be done; says why.
            KeyboardInterrupt: it was interrupted; the same command goes on.
        """
        while self.record["stopped"] is None:
            number = len(self.record["rounds"]) + 1
            self.reporter.say(f"Round {number} of at most {self.config.rounds}")
            self.record["rounds"].append(self.round(number))
            self.record["stopped"] = self.reason_to_stop()
            self._save()
        # Also where all rounds were done before and the loop had nothing to do.
        write_report(self.folder, self.record)
        return self.record

    def round(self, number: int) -> dict[str, Any]:
        """One round; its figures."""
        pairs = self.draw_pairs(number)
        if not pairs.rows:
            # Later it is a reason to stop, with rounds to show; before the first training there is nothing to show.
            if number == 1:
                raise DataError(f"{self.pairs_file(number)}: no prompt gave a pair ({summary(pairs.left_out)})")
            return {"round": number, "pairs": pairs._asdict(), "training": None, "evaluation": None}
        training = self.train(number)
        return {"round": number, "pairs": pairs._asdict(), "training": training, "evaluation": self.evaluate(number)}

    def draw_pairs(self, number: int) -> PairCounts:
        """The pairs of a round, from samples of the model as the round before left it."""
        config = self.config
        self.pairs_file(number).parent.mkdir(exist_ok=True)
        plan = PairPlan(
            self.side(number - 1),
            self.judge,
            config.sampling(number),
            config.samples,
            min_gap=config.min_gap,
            rows=config.rows,
            loading=self.loading,
        )
        found = make_pairs(plan, self.prompts, self.pairs_file(number), self.reporter)
        left_out = summary(found.left_out)
        self.reporter.say(
            f"{found.rows} pairs of {found.prompts} prompts{f'; left out: {left_out}' if left_out else ''}"
        )
        return found

    def training(self, number: int) -> TrainingConfig:
        """The settings of a round's training: on its pairs, from the adapters of the round before."""
        before = self.folder_of(number - 1) / ADAPTERS_FILE
        return dataclasses.replace(
            self.config.training,
            data=str(self.pairs_file(number)),
            adapter_path=str(self.folder_of(number)),
            resume_adapter_file=str(before) if number > 1 else None,
            # Where nothing was begun, this begins.
            resume=True,
        )

    def train(self, number: int) -> dict[str, Any]:
        """A round's training; its figures."""
        result = train(self.training(number), self.reporter)
        return {
            "steps": result.steps,
            "trained_tokens": result.trained_tokens,
            "training_seconds": result.training_seconds,
        }

    def evaluate(self, number: int) -> dict[str, Any]:
        """Replies of the round's model against the base model's, judged."""
        plan = Plan(
            self.side(0),
            self.side(number),
            self.judge,
            sampling=self.config.evaluation,
            loading=self.loading,
            rows=self.config.rows,
            baseline_replies=self._known_base_replies(),
        )
        found = evaluate(plan, self.asked, self.reporter)
        # Its failures would be a reason to stop for good.
        check_answers(self.judge)
        save_json(self.folder / "base-replies.json", {"replies": [list(reply) for reply in found.replies.baseline]})
        write_replies(self.folder / f"round-{number}-replies.jsonl", found.judged)
        save_json(self.folder / f"round-{number}-evaluation.json", found.figures)
        rate = found.figures["win_rate"]
        said = "no win rate: too many judgements failed" if rate is None else f"win rate over the base {rate:.1%}"
        self.reporter.say(f"Round {number}: {said}")
        return found.figures

    def reason_to_stop(self) -> str | None:
        """Why there is no other round; None where there is one."""
        rounds = self.record["rounds"]
        rates = [each["evaluation"]["win_rate"] for each in rounds if each["evaluation"] is not None]
        if rounds[-1]["evaluation"] is None:
            return "no prompt gave a pair any more"
        if rates[-1] is None:
            return "too many judgements failed"
        # No earlier rate is None: the rounds ended where one was.
        if len(rates) > 1 and rates[-1] < max(rates[:-1]) + self.config.least_gain:
            return f"the win rate rose by less than {self.config.least_gain:g}"
        return "all rounds are done" if len(rounds) >= self.config.rounds else None

    @property
    def loading(self) -> Loading:
        """How models are loaded."""
        return Loading(self.config.training.dtype, self.config.training.trust_remote_code)

    def side(self, number: int) -> Side:
        """The model after a round; 0 is the base."""
        return Side(self.config.training.model, self.folder_of(number) if number else None)

    def folder_of(self, number: int) -> Path:
        """A round's run."""
        return self.folder / f"round-{number}"

    def pairs_file(self, number: int) -> Path:
        """A round's pairs."""
        return self.folder / f"round-{number}-pairs" / "train.jsonl"

    def _known_base_replies(self) -> list[Generated] | None:
        """What the base said in an earlier round: it says the same in every one."""
        path = self.folder / "base-replies.json"
        if not path.is_file():
            return None
        rows = read_json_table(path, DataError)["replies"]
        return [Generated(tuple(ids), text, finished) for ids, text, finished in rows]

    def _open_record(self) -> dict[str, Any]:
        path = self.folder / RECORD
        # Through JSON, as it is read back.
        own: dict[str, Any] = json.loads(
            json.dumps(
                {
                    "settings": dataclasses.asdict(self.config),
                    "prompts": _digest(self.prompts),
                    "evaluation_prompts": _digest(self.asked),
                },
                default=str,
            )
        )
        if not path.is_file():
            record: dict[str, Any] = {**own, "rounds": [], "stopped": None}
            save_json(path, record)
            return record
        known = read_json_table(path, DataError)
        changed = [name for name in own["settings"] if (known.get("settings") or {}).get(name) != own["settings"][name]]
        changed += [name for name in own if name != "settings" and known.get(name) != own[name]]
        if changed:
            raise ConfigError(f"{self.folder}: holds rounds of another {', '.join(changed)}; give another folder.")
        return known

    def _save(self) -> None:
        save_json(self.folder / RECORD, self.record)
        write_report(self.folder, self.record)


def iterate(config: RoundsConfig, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """All rounds, into `folder`, which no other process may use meanwhile; what `rounds.json` holds at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        try:
            return Rounds(config, folder, reporter).run()
        except KeyboardInterrupt as interrupt:
            # The exception's kind decides the exit status; its words were about a single training.
            interrupt.args = (f"the same command goes on with the rounds in {folder}",)
            raise


def check_trainings(configs: Sequence[TrainingConfig]) -> None:
    """Refuse trainings that would be refused once their pairs are there, which is after hours; raises UserError."""
    for number, config in enumerate(configs, start=1):
        try:
            check_parts(checked_config(config))
            refuse_to_wait_for_validation(config, "the pairs of a round have no valid split; leave it out")
            if config.push_to_hub is not None:
                check_ready(config.push_to_hub, "`push_to_hub`")
            require_installed(parse_services(config.report_to))
        except ConfigError as error:
            raise ConfigError(f"{TRAIN}, round {number}: {error}") from None


def check_model(config: RoundsConfig, prompts: Sequence[Prompt]) -> None:
    """Refuse a reference that is not there, and prompts that the model cannot be given, before the hours that come
    before them; raises UserError."""
    training = config.training
    info = find(training.model, trust_remote_code=training.trust_remote_code)
    find_other_model(training, info)
    require_tokenizer(info)
    rendered(info, prompts, config.evaluation)


def prompts_of(config: RoundsConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to sample from, and prompts to compare replies to; DataError where there are none."""
    splits = find_splits(config.data)
    columns = parse_columns(config.columns)
    held_out = next(name for name in ("test", "valid", "train") if name in splits)
    sampled = distinct(list(read_prompts(splits["train"], columns)))
    # Repeats stay, unlike above: the intervals count a repeated prompt as one cluster.
    asked = list(read_prompts(splits[held_out], columns))
    return spread(sampled, config.prompts), spread(asked, config.evaluation_prompts)


def _digest(prompts: Sequence[Prompt]) -> str:
    return sha256_of(head=repr([prompt.pair for prompt in prompts]).encode())
