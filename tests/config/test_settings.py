"""A setting has one home: its declaration, from which everything else follows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orpo_mlx.config import settings as home
from orpo_mlx.config.settings import SETTINGS, TrainingConfig, settings_with
from orpo_mlx.config.traits import GROUPS, Trait
from orpo_mlx.device_profile import CPU, GPU, VARIABLE, DeviceProfile
from orpo_mlx.losses.recipe import PARAMETERS
from orpo_mlx.losses.registry import METHODS

HOME = Path(home.__file__)
PACKAGE = HOME.parent.parent

_MOST = 3
"""Settings that may stand side by side in a literal: a few belong to a format, such as mlx-lm's adapter_config.json."""
_FORMATS = {("training", "run.py")}

_WITH_ONE_MORE = """
import importlib.util, sys, dataclasses
import orpo_mlx.config
spec = importlib.util.spec_from_file_location("orpo_mlx.config.settings", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)

from orpo_mlx.config.checks import check_settings
from orpo_mlx.config.command_line import build_parser, given_settings, merge_settings
from orpo_mlx.config.derived import settings_for_card
from orpo_mlx.config.flags import with_flags
from orpo_mlx.config.traits import Trait
from orpo_mlx.errors import ConfigError

assert "--extra-steps N" in (text := build_parser().format_help()) and "more of them (default: 7)" in text
assert merge_settings(given_settings(["--extra-steps", "3"]), {}).extra_steps == 3
for table in ({"extra_steps": 0}, {"bonus_steps": 1}):
    try:
        check_settings(table, "file")
    except ConfigError as error:
        print(error)
config = merge_settings(given_settings(["--extra-steps", "3"]), {})
assert settings_for_card(config.settings())["extra_steps"] == 3
assert "extra_steps" not in settings_for_card(module.TrainingConfig().settings())
assert "extra_steps" not in config.settings(without=Trait.RESUMABLE)
assert "extra_steps" in config.settings(without=Trait.COMPARED)
print(with_flags("give `extra_steps=5`"))
try:
    merge_settings(given_settings(["--extra-steps", "3", "--print-config"]), {})
except SystemExit:
    pass
"""


def literals(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Names of settings in each tuple, list, set and dictionary that is written down in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        entries = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
        names = [entry.value for entry in entries if isinstance(entry, ast.Constant)]
        yield getattr(node, "lineno", 0), [name for name in names if name in SETTINGS]


def test_no_other_module_lists_settings() -> None:
    found = [
        f"{path}:{line}: {', '.join(names)}"
        for path in PACKAGE.rglob("*.py")
        if path != HOME and path.parts[-2:] not in _FORMATS and "losses" not in path.parts
        for line, names in literals(path)
        if len(names) > _MOST
    ]
    assert found == []


def test_a_setting_that_is_added_in_one_file_is_known_everywhere(tmp_path: Path) -> None:
    source = HOME.read_text(encoding="utf-8")
    line = (
        "    extra_steps: int = in_training(\n"
        '        7, "more of them", Trait.RESUMABLE, range=POSITIVE, aliases=("bonus_steps",)\n    )\n'
    )
    mark = "    shuffle: bool ="
    assert mark in source
    changed = tmp_path / "settings.py"
    changed.write_text(source.replace(mark, line + mark), encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", _WITH_ONE_MORE, str(changed)], capture_output=True, text=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "file: extra_steps: found 0, expected a whole number greater than 0."
    assert lines[1] == "file: unknown key 'bonus_steps'; did you mean extra_steps?"
    assert lines[2] == "give --extra-steps 5"
    assert "extra_steps: 3  # flag" in lines


def test_declarations_agree_with_each_other() -> None:
    for name, setting in SETTINGS.items():
        assert setting.group in GROUPS
        assert set(setting.replaces) <= set(SETTINGS)
        assert not set(setting.aliases) & set(SETTINGS)
        assert bool(setting.off_help) == (setting.kind is bool and setting.default is True), name
        assert Trait.ON_CARD | Trait.NOT_ON_CARD not in setting.traits
        if setting.range is not None and setting.default is not None:
            assert setting.range.holds(setting.default), name
    assert set(PARAMETERS) <= set(settings_with(Trait.OF_METHOD))


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_help_that_names_methods_names_all_that_have_the_parameter(parameter: str) -> None:
    named = set(re.findall(r"\w+", SETTINGS[parameter].help)) & set(METHODS)
    assert named <= (having := {name for name, method in METHODS.items() if parameter in method.parameters})
    assert named in (set(), having)


@pytest.mark.parametrize("profile", [CPU, GPU])
def test_micro_batch_tokens_are_the_devices(profile: DeviceProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, profile.name)
    assert TrainingConfig().micro_batch_tokens == profile.micro_batch_tokens
    assert TrainingConfig(micro_batch_tokens=7).micro_batch_tokens == 7
