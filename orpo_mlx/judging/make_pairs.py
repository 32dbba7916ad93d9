"""The story of `orpo-mlx pairs`: N samples a prompt, scored, made into rows that `train` reads; resumable.

Two passes: the samples of every prompt are drawn into a file beside the output, then judged and made into rows. After
each group of prompts a state file says how far both have come, so that a run that is killed at any moment goes on with
the next group and ends with the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from orpo_mlx.data.prompts import Prompt, distinct
from orpo_mlx.errors import ConfigError, DataError
from orpo_mlx.files import check_regular, read_json_table, save_json, sha256_of
from orpo_mlx.judging.contest import check_answers, check_judge, question_of
from orpo_mlx.judging.generation import Generator
from orpo_mlx.judging.judges.scorer import Asked, Scorer
from orpo_mlx.judging.judges.verdicts import Judge, ballots
from orpo_mlx.judging.ranking import Sample, Scored, different, make_rows
from orpo_mlx.judging.requests import ROWS, Loading, Sampling, Side
from orpo_mlx.judging.sides import load_side, prompt_ids
from orpo_mlx.models.adapters import weights_file
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.reporting.resumable_jsonl import FileMark, LineFile, check_beginning

# Prompts that are judged together and then written down.
_JUDGED_TOGETHER = 16


class PairPlan(NamedTuple):
    """What is sampled, who scores it, and what is made of it."""

    side: Side
    judge: Judge
    sampling: Sampling
    samples: int = 8
    """Per prompt."""
    form: str = "pairs"
    """One of `ranking.FORMS`."""
    min_gap: float = 0.0
    """The least score of the best above the worst."""
    rows: int = ROWS
    loading: Loading = Loading()


class PairCounts(NamedTuple):
    """What a run has made."""

    prompts: int
    rows: int
    left_out: dict[str, int]
    """By a key of `ranking.LEFT_OUT`."""


class State:
    """How far a run has come, in a file beside its output.

    Raises:
        ConfigError: the file there is of a run with other settings.
    """

    def __init__(self, output: Path, identity: dict[str, Any], prompts: int, *, overwrite: bool) -> None:
        self._path = state_file(output)
        self._prompts = prompts
        self.counts: Counter[str] = Counter()
        self.sampled = 0
        """Groups of prompts whose samples are drawn."""
        self.judged = 0
        """Prompts that are judged."""
        self.rows = 0
        self._table: dict[str, Any] = {"identity": identity}
        self.is_new = overwrite or not self._path.exists()
        if self.is_new:
            if output.exists() and not overwrite:
                raise ConfigError(f"{output}: exists already; give `overwrite` to replace it, or another file.")
            return
        known = read_json_table(self._path, DataError)
        try:
            changed = [name for name in identity if known["identity"].get(name) != identity[name]]
            self._table = {**self._table, **known}
            self.counts = Counter({str(name): int(count) for name, count in known["counts"].items()})
            self.sampled, self.judged, self.rows = (int(known[name]) for name in ("sampled", "judged", "rows"))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{self._path}: is not what pairs wrote; remove it, or give another output.") from None
        if changed:
            raise ConfigError(
                f"{output}: was begun with another {', '.join(changed)}; give `overwrite` to begin anew, or another "
                "file."
            )

    def mark(self, name: str) -> FileMark | None:
        """How far the file of that name has come; None before its first line."""
        known = self._table.get(name)
        return None if known is None else FileMark(int(known["size"]), str(known["sha256"]))

    def forget_lost(self, output: Path) -> list[str]:
        """Begin again with what was removed since it was written; a sentence about each."""
        said = []
        if self.mark("output") is not None and not output.exists():
            del self._table["output"]
            said.append(f"{output} is gone: {self.judged} prompts are judged again.")
            self.judged = self.rows = 0
            self.counts.clear()
        samples = samples_file(output)
        # Who has judged all of them may have removed them.
        if self.mark("samples") is not None and not samples.exists() and self.finished(output) is None:
            del self._table["samples"]
            said.append(f"{samples} is gone: the samples are drawn again.")
            self.sampled = 0
        return said

    def finished(self, output: Path) -> FileMark | None:
        """What was made of the prompts, where all were judged and it is there."""
        return self.mark("output") if self.judged == self._prompts and output.exists() else None

    def save(self, name: str, file: LineFile) -> None:
        """Write down what is done, once the lines of it are on the disk."""
        file.sync()
        self._table |= {name: file.mark()._asdict(), "counts": dict(self.counts)}
        self._table |= {"sampled": self.sampled, "judged": self.judged, "rows": self.rows}
        save_json(self._path, self._table)


def state_file(output: Path) -> Path:
    """Where a run's state is."""
    return output.with_name(f"{output.name}.state.json")


def samples_file(output: Path) -> Path:
    """Where a run's samples are."""
    return output.with_name(f"{output.name}.samples")


def make_pairs(
    plan: PairPlan, prompts: Sequence[Prompt], output: Path, reporter: Reporter, *, overwrite: bool = False
) -> PairCounts:
    """Sample, score, and write `output`; a run that was killed goes on where it was.

    Raises:
        UserError: model, judge or prompts cannot be used, the output is another run's, or a judge that is a server has
            stopped answering.
        OSError: the disk is full.
    """
    repeated = len(prompts)
    prompts = distinct(prompts)
    if repeated > len(prompts):
        reporter.say(f"{repeated - len(prompts)} prompts repeat another and are asked once.")
    check_judge(plan.judge, prompts)
    state = State(output, identity_of(plan, prompts), len(prompts), overwrite=overwrite)
    if state.is_new:
        # A state of an earlier run, or its samples, must not be taken for this one's.
        # The state first: if this is killed in between, it must not speak of files that are gone.
        for path in (state_file(output), samples_file(output), output):
            path.unlink(missing_ok=True)
    for sentence in state.forget_lost(output):
        reporter.say(sentence)
    finished = state.finished(output)
    if finished is not None:
        # Whatever was added to it since is the user's own.
        check_beginning(output, finished)
        return PairCounts(len(prompts), state.rows, dict(state.counts))
    draw_samples(plan, prompts, output, state, reporter)
    judge_samples(plan, prompts, output, state, reporter)
    return PairCounts(len(prompts), state.rows, dict(state.counts))


def identity_of(plan: PairPlan, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a run that goes on must have in common with the one that was killed."""
    adapter = plan.side.adapter
    weights = None if adapter is None else weights_file(adapter)
    return {
        **plan._asdict(),
        "side": plan.side.model,
        # By what is in the file: another training may have written to the same folder since.
        "adapter": None if weights is None else sha256_of(weights),
        "judge": plan.judge.identity,
        "sampling": plan.sampling._asdict(),
        "loading": plan.loading.dtype,
        # A rule compares with the right answer, which a row of prompt and answer has beside its pair.
        "prompts": sha256_of(head=repr([(prompt.pair, prompt.reference) for prompt in prompts]).encode()),
    }


def draw_samples(plan: PairPlan, prompts: Sequence[Prompt], output: Path, state: State, reporter: Reporter) -> None:
    """The first pass: the samples of every prompt, a line each, into `samples_file`."""
    # As `Generator` groups them: `state.sampled` counts its groups.
    group_size = max(1, plan.rows // plan.samples)
    if state.sampled * group_size >= len(prompts):
        return
    # Only now: a run that was killed while it judged needs the model no more.
    loaded = load_side(plan.side, plan.loading)
    ids = prompt_ids(loaded, prompts, plan.sampling)
    generator = Generator(loaded.model, loaded.tokenizer, plan.sampling, samples=plan.samples, rows=plan.rows)
    with (
        closing(LineFile(samples_file(output), state.mark("samples"))) as file,
        reporter.bar("samples", len(prompts), "prompts") as advance,
    ):
        for group in generator.groups(ids, state.sampled):
            file.append([{"samples": [[reply.text, reply.finished] for reply in replies]} for replies in group])
            state.sampled += 1
            state.save("samples", file)
            advance(min(state.sampled * group_size, len(prompts)))


def judge_samples(plan: PairPlan, prompts: Sequence[Prompt], output: Path, state: State, reporter: Reporter) -> None:
    """The second pass: samples scored and made into rows, into `output`."""
    drawn = read_samples(samples_file(output), len(prompts))
    with (
        closing(LineFile(output, state.mark("output"))) as file,
        reporter.bar("judgements", len(prompts), "prompts") as advance,
    ):
        if state.mark("output") is None:
            state.save("output", file)
        while state.judged < len(prompts):
            chunk = slice(state.judged, state.judged + _JUDGED_TOGETHER)
            kept = [different(samples, state.counts) for samples in drawn[chunk]]
            scores = list(score(plan.judge, prompts[chunk], kept, state.counts))
            # Before they are written down as judged.
            check_answers(plan.judge)
            rows = []
            for prompt, scored in zip(prompts[chunk], scores, strict=True):
                rows += make_rows(prompt, scored, plan.form, plan.min_gap, provenance(plan, prompt), state.counts)
            file.append(rows)
            state.rows += len(rows)
            state.judged += len(kept)
            state.save("output", file)
            advance(state.judged)


def read_samples(path: Path, count: int) -> list[list[Sample]]:
    """What `draw_samples` wrote.

    Raises:
        DataError: it is something else.
    """
    try:
        check_regular(path)
        lines = [json.loads(line)["samples"] for line in path.read_text(encoding="utf-8").splitlines()]
        found = [
            [Sample(str(text), bool(finished), number) for number, (text, finished) in enumerate(samples)]
            for samples in lines
        ]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path}: is not what pairs wrote; give `overwrite` to draw the samples again.") from None
    if len(found) != count:
        raise DataError(f"{path}: has the samples of {len(found)} prompts, expected {count}; give `overwrite`.")
    return found


def score(
    judge: Judge, prompts: Sequence[Prompt], kept: Sequence[Sequence[Sample]], counts: Counter[str]
) -> Iterator[list[Scored]]:
    """The samples of each prompt with their scores; those whose judgement failed are counted.

    A scorer, such as a rule or a reward model, scores each by itself. Any other judge compares each with the prompt's
    first, in both orders; its score is how far it is preferred, 0 to 1, and the first's is 1/2.
    """
    if isinstance(judge, Scorer):
        yield from score_each(judge, prompts, kept, counts)
        return
    # Against one sample and not each against each: questions grow with the samples, not with their square.
    asked = [(number, sample) for number, samples in enumerate(kept) for sample in samples[1:]]
    questions = [question_of(prompts[number], kept[number][0].text, sample.text) for number, sample in asked]
    found = iter(ballots(judge, questions))
    for samples in kept:
        scored = [Scored(sample, 0.5) for sample in samples[:1]]
        for sample in samples[1:]:
            ballot = next(found)
            if ballot.failure is None:
                scored.append(Scored(sample, ballot.preference))
            else:
                counts["unjudged"] += 1
        yield scored


def score_each(
    scorer: Scorer, prompts: Sequence[Prompt], kept: Sequence[Sequence[Sample]], counts: Counter[str]
) -> Iterator[list[Scored]]:
    """`score` by what scores a reply by itself."""
    asked = [
        Asked(sample.text, prompt.question, prompt.reference, prompt.pair)
        for prompt, samples in zip(prompts, kept, strict=True)
        for sample in samples
    ]
    found = iter(scorer.scores(asked, lambda done: None))
    for samples in kept:
        both = [(sample, next(found)) for sample in samples]
        scored = [Scored(sample, given.value) for sample, given in both if given.value is not None]
        if len(scored) < len(both):
            counts["unjudged"] += len(both) - len(scored)
        yield scored


def provenance(plan: PairPlan, prompt: Prompt) -> dict[str, Any]:
    """Where a row comes from."""
    return {
        "model": plan.side.model,
        "adapter": None if plan.side.adapter is None else str(plan.side.adapter),
        "judge": plan.judge.name,
        "temperature": plan.sampling.temperature,
        "top_p": plan.sampling.top_p,
        "seed": plan.sampling.seed,
        "prompt": prompt.location,
    }
