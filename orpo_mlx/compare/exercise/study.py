"""A tier of the exercise: tuning, final trainings under several seeds, and sanity checks, cell by cell."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from orpo_mlx.compare.exercise.cells import Cells, every, until_done
from orpo_mlx.compare.exercise.contenders import CONTENDERS, LIKELIHOOD_ALONE, Contender, Setting, grid
from orpo_mlx.compare.exercise.equal_kl import at_targets
from orpo_mlx.compare.exercise.halving import Round, successive_halving
from orpo_mlx.compare.exercise.task import PerPrompt, Size, Task
from orpo_mlx.compare.exercise.trainer import Trained, fresh_run, put_back, reward_margins, train
from orpo_mlx.config.derived import recipe
from orpo_mlx.training.run import Run
from orpo_mlx.types import TokenizedPair

GIVEN, SWAPPED = "given", "swapped"


def run_study(task: Task, cells: Cells) -> Iterator[dict[str, Any]]:
    """All trainings of a tier, and what is known after each variant; docs/results.md has the keys."""
    contenders = contenders_of(task.size)
    size = size_record(task.size, task.bound)
    found: dict[str, Any] = {"facts": task.facts(), "size": size, "variants": {}}
    for variant in task.size.variants:
        until_done(calls_of(task, cells, variant))
        base = base_cell(task, cells)
        found["base"] = base["test"]
        found["variants"][variant] = {
            each.name: run_contender(task, cells, variant, each, base["valid"]) for each in contenders
        }
        if has_sanity(task.size, variant):
            found["sanity"] = [sanity_cells(task, cells, each, base["valid"]) for each in contenders]
        yield found


def help_study(task: Task, cells: Cells) -> None:
    """Compute what no other process is at, until all of it is there."""
    # One variant after the other, though a process waits where one ends: what is finished can be looked at.
    for variant in task.size.variants:
        until_done(calls_of(task, cells, variant))


def calls_of(task: Task, cells: Cells, variant: str) -> list[Callable[[], object]]:
    """What computes all cells of a variant: calls that depend on each other through cells alone."""

    def call(made: Callable[..., object], *arguments: Any) -> object:
        return made(task, cells, *arguments, base_cell(task, cells)["valid"])

    contenders = contenders_of(task.size)
    sane = contenders if has_sanity(task.size, variant) else []
    return [
        *(partial(call, run_contender, variant, each) for each in contenders),
        *(partial(call, sanity_cells, each) for each in sane),
    ]


def contenders_of(size: Size) -> list[Contender]:
    """Those that take part, in the order in which they were asked for."""
    by_name = {contender.name: contender for contender in CONTENDERS}
    return [by_name[name] for name in size.contenders]


def has_sanity(size: Size, variant: str) -> bool:
    """Whether sanity checks are made on this variant's labels."""
    return size.shuffles > 0 and variant == size.variants[0]


def size_record(size: Size, bound: float) -> dict[str, Any]:
    """How large a tier was run."""
    rounds = [each._asdict() for each in size.rounds]
    return {**size._asdict(), "rounds": rounds, "kl_bound": bound, "replies_per_prompt": size.samples}


def base_cell(task: Task, cells: Cells) -> dict[str, Any]:
    """What `measured_base` found."""
    return cells.get({"tier": task.name, "what": "base model on both splits"}, lambda: measured_base(task))


def measured_base(task: Task) -> dict[str, PerPrompt]:
    """The base model on both splits, with adapters that do nothing yet: what every training looks like at step 0."""
    with fresh_run(task.loaded, task.shared()):
        return {"valid": task.look("valid"), "test": {**task.look("test"), **task.besides()}}


def run_contender(task: Task, cells: Cells, variant: str, contender: Contender, start: PerPrompt) -> dict[str, Any]:
    """One method on one variant: its tuning (on the first variant, where one is to do for all), its choice, its final
    trainings."""
    size = task.size
    tuned_on = size.variants[0] if size.tuned_once else variant
    tuning: list[dict[str, Any]] = []

    def score(setting: Setting, of: Round) -> float:
        trainings = every(
            partial(training, task, cells, tuned_on, contender, setting, seed, of.steps, start)
            for seed in range(of.seeds)
        )
        together = judged_together(trainings, task.bound)
        tuning.append({**setting._asdict(), "steps": of.steps, "seeds": of.seeds, **together})
        return float(tuning[-1]["score"])

    entries = successive_halving(grid(contender, size.rates, size.rounds[0].settings), size.rounds, score)
    setting, steps = entries[-1].setting, size.rounds[-1].steps
    chosen = setting._asdict()
    if size.fixed_steps:
        # The last of it: a setting may stand in several rounds.
        won = [each for each in tuning if Setting(each["rate"], each["strength"]) == setting][-1]
        chosen["step"] = won["step"]
        final = partial(fixed_training, task, cells, variant, contender, setting, chosen["step"])
        finals = every(partial(final, seed) for seed in range(size.seeds))
    else:
        finals = every(
            partial(training, task, cells, variant, contender, setting, seed, steps, start, test=True)
            for seed in range(size.seeds)
        )
    kept = ("rate", "strength", "steps", "seeds", "score", "kl", "best", "step", "failed", "valid_gold")
    return {
        "strength": contender.strength,
        "likelihood": contender.likelihood,
        "chosen": chosen,
        "tuning": [{key: entry[key] for key in kept} for entry in tuning],
        "seeds": finals,
    }


def judged_together(trainings: Sequence[Mapping[str, Any]], bound: float) -> dict[str, Any]:
    """One setting under several seeds: the look of all of them that has the highest mean gold at a mean KL of at most
    the bound; the base model is the first."""
    curves = [each["curve"] for each in trainings]
    looks = [
        {key: statistics.fmean(look[key] for look in at_once) for key in ("step", "gold", "kl")}
        for at_once in zip(*curves, strict=False)
    ]
    best = max(
        (place for place, look in enumerate(looks) if place == 0 or look["kl"] <= bound),
        key=lambda place: (looks[place]["gold"], -place),
    )
    golds = zip(*(each["golds"][best] for each in trainings), strict=True)
    return {
        "score": looks[best]["gold"],
        "kl": looks[best]["kl"],
        "best": best,
        "step": round(looks[best]["step"]),
        "failed": next((each["failed"] for each in trainings if each["failed"]), None),
        "valid_gold": list(map(statistics.fmean, golds)),
    }


def training(
    task: Task,
    cells: Cells,
    variant: str,
    contender: Contender,
    setting: Setting,
    seed: int,
    steps: int,
    start: PerPrompt,
    *,
    test: bool = False,
) -> dict[str, Any]:
    """One training, looked at on the way, and where `test` judged on the test prompts as well (`tested`).

    `start` is what the base model looks like on the valid prompts.
    """
    identity = _identity(task, variant, contender, setting, seed, steps)

    def compute() -> dict[str, Any]:
        # A final training may repeat one of the tuning, whose adapters were not kept.
        with begun(task, variant, contender, setting, seed) as run:
            seen: list[PerPrompt] = [start]

            def look(run: Run) -> dict[str, float]:
                seen.append(task.look("valid"))
                return means(seen[-1])

            found = train(
                run, contender, task.train_pairs(variant), look_steps(task, steps), look, task.bound, means(start)
            )
            result = {
                "losses": found.losses,
                "accuracies": found.accuracies,
                "curve": found.curve,
                "best": found.best,
                "failed": found.failed,
            }
            if not test:
                return {**result, "golds": [list(look["gold"]) for look in seen]}
            return {**result, "valid_gold": list(seen[found.best]["gold"]), **tested(task, cells, run, found)}

    return cells.get({**identity, "what": "final" if test else "tuning"}, compute)


@contextmanager
def begun(task: Task, variant: str, contender: Contender, setting: Setting, seed: int) -> Iterator[Run]:
    """A run of a method at step 0, with the reference log-probs that all trainings share, where it has a reference."""
    config = contender.config(setting, task.shared(), seed)
    table = task.reference_table(variant) if recipe(config).needs_reference else None
    with fresh_run(task.loaded, config, table) as run:
        yield run


def fixed_training(
    task: Task, cells: Cells, variant: str, contender: Contender, setting: Setting, step: int, seed: int
) -> dict[str, Any]:
    """One final training for a number of steps that tuning chose, whatever its KL then is, looked at on the test
    prompts alone; it goes on to the task's last KL target, as far as the longest of the tuning went."""
    steps = task.size.rounds[-1].steps
    looks = final_looks(task)
    named = _identity(task, variant, contender, setting, seed, steps)
    identity = {**named, "looks": looks, "what": "final", "judged_at": step}

    def compute() -> dict[str, Any]:
        seen: list[PerPrompt] = [base_cell(task, cells)["test"]]
        replies: list[list[dict[str, str]]] = [[]]

        def look(run: Run) -> dict[str, float]:
            seen.append(task.look("test"))
            replies.append(task.replies())
            return means(seen[-1])

        first = {key: means(seen[0])[key] for key in ("gold", "kl")}
        with begun(task, variant, contender, setting, seed) as run:
            pairs = task.train_pairs(variant)
            found = train(run, contender, pairs, looks, look, task.kl_targets[-1], first, least=step)
            at = [each["step"] for each in found.curve]
            # One that failed before it is judged as far as it came.
            judged = at.index(step) if step in at else len(at) - 1
            put_back(run, found.adapters[judged])
            test = {**seen[judged], **task.besides()}
        return {
            "losses": found.losses,
            "accuracies": found.accuracies,
            "curve": found.curve,
            "best": judged,
            "failed": found.failed,
            "test": test,
            "replies": replies[judged],
            "at_kl": at_targets(task.kl_targets, [each["kl"] for each in found.curve], at, seen.__getitem__),
            "test_curve": [{key: each[key] for key in ("step", "gold", "kl")} for each in found.curve],
        }

    return cells.get(identity, compute)


def tested(task: Task, cells: Cells, run: Run, found: Trained) -> dict[str, Any]:
    """A training on the test prompts: at its best step, and where its KL reaches the task's targets."""
    measured: dict[int, PerPrompt] = {}

    def look(place: int) -> PerPrompt:
        if place not in measured:
            put_back(run, found.adapters[place])
            measured[place] = task.look("test")
        return measured[place]

    # In this order: the replies are those of the last look.
    result = {"test": look(found.best), "replies": task.replies()}
    if task.kl_targets:
        measured[0] = base_cell(task, cells)["test"]
        kls, at = ([each[key] for each in found.curve] for key in ("kl", "step"))
        result["at_kl"] = at_targets(task.kl_targets, kls, at, look)
        result["test_curve"] = [
            {"step": at[place], **{key: means(each)[key] for key in ("gold", "kl")}}
            for place, each in sorted(measured.items())
        ]
    return result


def sanity_cells(task: Task, cells: Cells, contender: Contender, start: PerPrompt) -> dict[str, Any]:
    """Trainings of one method on the given, the swapped and shuffled labels, judged by its own reward.

    `wins` have a 1 where training raised the method's own reward of the held-out pair's better side by more than that
    of the worse one; the change, since a reward that has no reference prefers one side before any training.
    """
    setting = Setting(**run_contender(task, cells, task.size.variants[0], contender, start)["chosen"])
    labels = [GIVEN, SWAPPED, *shuffles(task.size.shuffles)]
    found = {"name": contender.name, "likelihood": contender.likelihood, **setting._asdict()}
    wins = every(partial(own_reward, task, cells, contender, setting, each) for each in labels)
    found["wins"] = dict(zip(labels, wins, strict=True))
    if contender.likelihood:
        # What the likelihood term does by itself, at the same rate, on the same shuffles.
        alone = next(each for each in CONTENDERS if each.name == LIKELIHOOD_ALONE)
        same_rate = Setting(setting.rate, None)
        wins = every(partial(own_reward, task, cells, alone, same_rate, each) for each in labels[2:])
        found["likelihood_wins"] = dict(zip(labels[2:], wins, strict=True))
    return found


def own_reward(task: Task, cells: Cells, contender: Contender, setting: Setting, labels: str) -> str:
    """One training on some labels to its last step, judged by its own reward: 1 or 0 for each held-out pair."""
    steps = task.size.rounds[-1].steps
    variant = task.size.variants[0]
    identity = {**_identity(task, variant, contender, setting, 0, steps), "what": "own reward", "labels": labels}

    def compute() -> dict[str, Any]:
        held_out = task.held_out_pairs()
        pairs = relabelled(task.train_pairs(variant), labels)
        unseen = {"gold": 0.0, "kl": 0.0}
        with fresh_run(task.loaded, contender.config(setting, task.shared(), 0)) as run:
            before = reward_margins(run, contender.reward, held_out)
            # Not its best step: choosing one by gold would let the right labels in by the back door.
            found = train(run, contender, pairs, (steps,), lambda run: unseen, task.bound, unseen)
            change = reward_margins(run, contender.reward, held_out) - before
        return {"wins": [int(value > 0) for value in change], "failed": found.failed}

    # A character each: a list of numbers, a line each, would be most of results.json.
    return "".join(map(str, cells.get(identity, compute)["wins"]))


def relabelled(pairs: Sequence[TokenizedPair], labels: str) -> list[TokenizedPair]:
    """Pairs with their labels as given, all swapped, or (`shuffle N`) half of them, drawn by N, swapped.

    `shuffle N mirrored` swaps the other half. A shuffle agrees with the truth somewhat more or less than by half, and
    its mirror image by as much less or more: their mean is free of it.
    """
    if labels == GIVEN:
        return list(pairs)
    if labels == SWAPPED:
        return [_swapped(pair) for pair in pairs]
    _, number, *mirrored = labels.split()
    rng = np.random.default_rng((int(number), len(pairs)))
    flipped = set(rng.permutation(len(pairs))[: len(pairs) // 2].tolist())
    return [_swapped(pair) if (place in flipped) != bool(mirrored) else pair for place, pair in enumerate(pairs)]


def shuffles(count: int) -> list[str]:
    """The names of `count` shuffles and their mirror images, side by side."""
    return [f"shuffle {number}{mirrored}" for number in range(count) for mirrored in ("", " mirrored")]


def look_steps(task: Task, steps: int) -> list[int]:
    """The steps at which a training is looked at, its last among them: a short one's are those of a final one."""
    final = task.size.rounds[-1].steps
    apart = max(1, final // task.size.looks)
    # A setting that is best early must be met there again by its final trainings: later it may be beyond the bound.
    looks = {*range(apart, final + 1, apart), *(each.steps for each in task.size.rounds)}
    return sorted(look for look in looks if look <= steps)


def final_looks(task: Task) -> list[int]:
    """`look_steps` of the longest trainings, and one look more, half as many steps into them as the first: few steps
    take a training far from the base model, and what it is worth near to it is measured there."""
    looks = look_steps(task, task.size.rounds[-1].steps)
    return sorted({max(1, looks[0] // 2), *looks})


def means(measures: PerPrompt) -> dict[str, float]:
    """The mean over prompts of each measure that has a value for each."""
    return {key: statistics.fmean(values) for key, values in measures.items()}


def count_cells(size: Size) -> int:
    """How many cells `run_study` will ask for."""
    contenders = contenders_of(size)
    tunings = 1 if size.tuned_once else len(size.variants)
    tuned, before = 0, Counter[int]()
    for each in size.rounds:
        # What an earlier round trained as long is there, for as many seeds.
        tuned += each.settings * (each.seeds - before[each.steps])
        before[each.steps] = each.seeds
    trainings = tunings * tuned + len(size.variants) * size.seeds
    shuffled = 2 * size.shuffles
    sane = (2 + shuffled) * len(contenders) + shuffled * sum(each.likelihood for each in contenders)
    return 1 + len(contenders) * trainings + (sane if size.shuffles else 0)


def _identity(
    task: Task, variant: str, contender: Contender, setting: Setting, seed: int, steps: int
) -> dict[str, Any]:
    named = {"tier": task.name, "variant": variant, "method": contender.name, **setting._asdict()}
    # What a training is worth depends on when it was looked at.
    return {**named, "seed": seed, "steps": steps, "looks": look_steps(task, steps)}


def _swapped(pair: TokenizedPair) -> TokenizedPair:
    return pair._replace(chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids)
