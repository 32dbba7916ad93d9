"""What a run's settings come to: its method with parameters, how rows are read, what its model card lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orpo_mlx.config.settings import TrainingConfig, settings_with
from orpo_mlx.config.traits import Trait
from orpo_mlx.data.pairs import Reading, parse_columns, parse_labels
from orpo_mlx.losses.recipe import PARAMETERS, Recipe, make_recipe


def settings_for_card(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a run's settings that its model card lists: not the defaults, except where they always matter."""
    always = settings_with(Trait.ON_CARD)
    never = settings_with(Trait.NOT_ON_CARD)
    defaults = TrainingConfig().settings()
    return {
        name: value
        for name, value in settings.items()
        if name in always or (name not in never and value != defaults.get(name))
    }


def recipe(config: TrainingConfig) -> Recipe:
    """The method of a run with its parameters.

    Raises:
        ConfigError: see `losses.recipe.make_recipe`.
    """
    return make_recipe(config.method, {name: getattr(config, name) for name in PARAMETERS}, config.margin_scale)


def data_reading(config: TrainingConfig) -> Reading:
    """How a run's rows are read.

    Raises:
        ConfigError: see `data.pairs.parse_columns` and `parse_labels`.
    """
    columns = parse_columns(config.columns)
    labels = parse_labels(config.labels)
    return Reading(
        columns,
        config.pair_ratings,
        config.min_margin,
        labels,
        skip_bad_rows=config.skip_bad_rows,
        template_strings=config.template_strings,
        one_sided=recipe(config).one_sided,
        train_on=config.train_on,
    )
