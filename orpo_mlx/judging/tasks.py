"""Tasks of lm-evaluation-harness, on a model with its adapters off and on; nothing is fused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from orpo_mlx.errors import ConfigError, DataError, ModelError, did_you_mean, reason_of
from orpo_mlx.judging.regression import Regression, compare_items
from orpo_mlx.judging.requests import Loading, Side
from orpo_mlx.judging.sides import load_side
from orpo_mlx.models.adapters import adapters_off, has_switchable_adapters, in_evaluation
from orpo_mlx.models.loading import LoadedModel

Samples = Sequence[Mapping[str, Any]]
"""What lm-eval says of each item of a task: `doc_id`, `filter`, `metrics` and a value of each of these."""


class TaskPlan(NamedTuple):
    """What is run."""

    side: Side
    """With adapters that can be switched off."""
    names: Sequence[str]
    """lm-eval's names of tasks."""
    folder: Path | None = None
    """Of further tasks, as YAML files."""
    limit: int | None = None
    """Items of each task, at most."""
    loading: Loading = Loading()


def run_tasks(plan: TaskPlan) -> dict[str, Regression]:
    """Each task with the adapters off and on, item by item.

    Raises:
        ConfigError: lm-eval is not installed, or has no such task.
        ModelError: the adapters cannot be switched off.
        DataError: a task cannot be run, or has no metric that is right or wrong.
    """
    manager = task_manager(plan)
    loaded = load_side(plan.side, plan.loading)
    if not has_switchable_adapters(loaded.model):
        raise ModelError(
            f"{plan.side.adapter}: holds whole weights, which cannot be switched off; tasks need LoRA or DoRA."
        )
    before = answered_items(plan, loaded, manager, adapters_off(loaded.model))
    after = answered_items(plan, loaded, manager, nullcontext())
    return {name: compare_samples(name, before[name], after[name]) for name in before}


def task_manager(plan: TaskPlan) -> Any:
    """lm-eval's table of tasks; ConfigError where it is not installed, or a name is not in it."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError("`tasks`: needs lm-evaluation-harness: pip install 'orpo-mlx[tasks]'.") from None
    manager = TaskManager(include_path=None if plan.folder is None else str(plan.folder))
    for name in plan.names:
        if name not in manager.all_tasks:
            raise ConfigError(f"`tasks`: lm-eval has no task {name!r}{did_you_mean(name, manager.all_tasks)}")
    return manager


def answered_items(
    plan: TaskPlan, loaded: LoadedModel, manager: Any, state: AbstractContextManager[None]
) -> Mapping[str, Samples]:
    """The items of each task as they are answered in a `state` such as that with the adapters off."""
    import lm_eval

    with state, in_evaluation(loaded.model):
        try:
            found = lm_eval.simple_evaluate(
                model=harness_model(loaded),
                tasks=list(plan.names),
                limit=plan.limit,
                log_samples=True,
                # lm-eval's own errors are not used: what is tested is each item before and after.
                bootstrap_iters=0,
                task_manager=manager,
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise DataError(f"`tasks`: lm-eval cannot run them ({reason_of(error)}).") from error
    answered: Mapping[str, Samples] = found["samples"]
    return answered


def harness_model(loaded: LoadedModel) -> Any:
    """mlx-lm's adapter for lm-eval, around a model that is loaded already."""
    from mlx_lm import evaluate

    module: Any = evaluate
    # mlx-lm's class loads a model by its name, and knows nothing of adapters.
    real = module.load
    module.load = lambda *_, **__: (loaded.model, loaded.tokenizer)
    try:
        return module.MLXLM("loaded", max_tokens=None, use_chat_template=False)
    finally:
        module.load = real


def compare_samples(task: str, before: Samples, after: Samples) -> Regression:
    """Items right before and after, by the task's first metric that is 0 or 1 for all of both.

    Raises:
        DataError: it has none.
    """
    # Of both: a graded metric may happen to be 0 for every item of a poor model.
    both = [*before, *after]
    for metric in dict.fromkeys(name for sample in both for name in sample.get("metrics", ())):
        if all(sample.get(metric) in (0, 1) for sample in both):
            return compare_items(_right(before, metric), _right(after, metric))
    raise DataError(f"`tasks`: {task} has no metric that is right or wrong for each item; give another.")


def _right(samples: Samples, metric: str) -> dict[str, bool]:
    # By filter too: a task with several lists every item once for each of them.
    return {f"{sample['doc_id']}/{sample.get('filter', '')}": bool(sample[metric]) for sample in samples}
