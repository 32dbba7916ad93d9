"""Services by name, and what each needs."""

from __future__ import annotations

import sys
import types

import pytest
from mlx_lm.tuner.callbacks import SUPPORT_CALLBACK

from orpo_mlx.errors import ConfigError
from orpo_mlx.reporting.services import SERVICES, check_reporting, parse_services, require_installed


def test_the_services_are_those_of_mlx_lm_and_tensorboard() -> None:
    assert {*SERVICES} == {*SUPPORT_CALLBACK, "tensorboard"}


@pytest.mark.parametrize(
    ("text", "names"),
    [(None, ()), ("wandb", ("wandb",)), (" TensorBoard, swanlab,tensorboard", ("tensorboard", "swanlab"))],
)
def test_names_are_read_as_mlx_lm_reads_them(text: str | None, names: tuple[str, ...]) -> None:
    assert parse_services(text) == names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wanbd", "found 'wanbd'.*; did you mean wandb?"),
        ("wandb,", "found an empty name, expected.*"),
        ("", "found an empty name.*"),
        ("comet", "found 'comet'.*board.$"),
    ],
)
def test_a_name_that_is_no_service(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"`report_to` {text!r}: {expected}"):
        parse_services(text)


def test_a_project_needs_a_service_that_has_them() -> None:
    check_reporting("tensorboard,swanlab", "mine")
    check_reporting("tensorboard", None)
    for report_to in (None, "tensorboard"):
        with pytest.raises(ConfigError, match="`project_name`: is a project of `report_to=wandb or swanlab`"):
            check_reporting(report_to, "mine")


# A folder of that name in the working directory is a package to Python.
@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")], ids=["missing", "folder"])
@pytest.mark.parametrize("name", SERVICES)
def test_a_package_that_is_not_there(
    name: str, module: types.ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = SERVICES[name].package
    monkeypatch.setitem(sys.modules, package, module)
    with pytest.raises(ConfigError, match=f"^`report_to={name}`: needs a package; pip install {package}$"):
        require_installed([name])
