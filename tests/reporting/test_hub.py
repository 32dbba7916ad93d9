"""Adapters sent to a Hub that is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd
from rich.console import Console

from orpo_mlx.cli.push import main
from orpo_mlx.cli.train import main as train_main
from orpo_mlx.config.checks import make_config
from orpo_mlx.errors import ConfigError
from orpo_mlx.reporting import hub as module
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.reporting.run_report import write_report
from orpo_mlx.train import train
from tests.helpers.quiet_training import run_quietly

SENT = ["adapters.safetensors", "adapter_config.json", "README.md", "run.json", "metrics.jsonl"]


class Hub:
    """Stands in for `HfApi`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.sent: dict[str, bytes] = {}
        self.refuses: BaseException | None = None

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> str:
        assert exist_ok
        self.calls.append((repo_id, private))
        return f"https://hub.test/{repo_id}"

    def create_commit(self, repo_id: str, operations: list[CommitOperationAdd], *, commit_message: str) -> None:
        assert commit_message
        if self.refuses is not None:
            raise self.refuses
        for operation in operations:
            with operation.as_file() as file:
                self.sent[operation.path_in_repo] = file.read()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr(module, "HfApi", lambda: stand_in)
    monkeypatch.setattr(module, "get_token", lambda: "a token")
    return stand_in


@pytest.fixture
def adapters(settings: dict[str, Any]) -> Path:
    run_quietly(settings)
    return Path(settings["adapter_path"])


def test_everything_but_checkpoints_is_sent_as_it_is_and_without_local_paths(adapters: Path, hub: Hub) -> None:
    (adapters / "left_out.txt").write_text("private rows")
    assert (adapters / "checkpoints").is_dir()
    assert main([str(adapters), "me/mine"]) == 0
    assert hub.calls == [("me/mine", None)]
    assert list(hub.sent) == SENT
    for name in ("adapters.safetensors", "README.md", "metrics.jsonl"):
        assert hub.sent[name] == (adapters / name).read_bytes()
    own, sent = json.loads((adapters / "adapter_config.json").read_text()), json.loads(hub.sent["adapter_config.json"])
    assert sent == {**own, "model": Path(own["model"]).name}
    here = str(adapters.parent).encode()
    assert here in (adapters / "run.json").read_bytes()
    assert not any(here in content or own["model"].encode() in content for content in hub.sent.values())


@pytest.mark.usefixtures("undrawn")
def test_a_report_that_is_sent_names_no_local_paths(adapters: Path, hub: Hub) -> None:
    write_report([adapters], adapters)
    assert main([str(adapters), "me/mine"]) == 0
    assert {"report.html", "report.png"} <= set(hub.sent)
    settings = json.loads((adapters / "run.json").read_text())["settings"]
    model, data = Path(settings["model"]), Path(settings["data"])
    page = hub.sent["report.html"].decode()
    assert model.name in page
    for path in (model, data):
        assert path.is_absolute()
        assert str(path.parent) not in page


def test_private_is_passed_on(adapters: Path, hub: Hub) -> None:
    assert main([str(adapters), "me/mine", "--private"]) == 0
    assert hub.calls == [("me/mine", True)]


def test_a_dry_run_lists_and_sends_nothing(
    adapters: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "get_token", lambda: None)
    assert main([str(adapters), "me/mine", "--dry-run"]) == 0
    assert hub.calls == []
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    sizes = {name: int(size.replace(",", "")) for size, name, *_ in lines}
    assert list(sizes) == [*SENT, "bytes"]
    assert sizes["adapters.safetensors"] == (adapters / "adapters.safetensors").stat().st_size
    assert sizes.pop("bytes") == sum(sizes.values())


def test_a_failure_after_training_loses_nothing(
    settings: dict[str, Any], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = settings["adapter_path"]
    hub.refuses = ConnectionError("no route\nto host")
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if not isinstance(value, bool)]
    argv += ["--no-memory-check", "--no-report", "--push-to-hub", "me/mine"]
    assert train_main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "me/mine: the Hub did not take the push (no route to host); the adapters are saved in" in error
    again = error.rstrip(".\n").split("to push again: ")[1].split()
    assert again == ["orpo-mlx", "push", folder, "me/mine"]
    hub.refuses = None
    assert main(again[2:]) == 0
    assert list(hub.sent) == SENT


def test_training_pushes_at_its_end(settings: dict[str, Any], hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    train(make_config({**settings, "push_to_hub": "me/mine"}), Reporter(Console(width=300)))
    assert list(hub.sent) == SENT
    assert "Pushed to https://hub.test/me/mine" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mine", "a/b/c", "me/", "me/sp ace", "/me", "me/mine--x"])
def test_a_name_that_is_none_ends_before_anything_is_read(settings: dict[str, Any], hub: Hub, name: str) -> None:
    with pytest.raises(ConfigError, match="expected owner/name"):
        train(make_config({**settings, "push_to_hub": name}))
    assert not Path(settings["adapter_path"]).exists()


def test_without_a_token_training_does_not_begin(
    settings: dict[str, Any], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="no token for the Hub"):
        train(make_config({**settings, "push_to_hub": "me/mine"}))
    assert not Path(settings["adapter_path"]).exists()


def test_a_folder_without_adapters_is_refused(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "me/mine"]) == 2
    assert "has no adapters.safetensors" in capsys.readouterr().err
    (tmp_path / "adapters.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text("{")
    assert main([str(tmp_path), "me/mine"]) == 2
    assert "is not JSON" in capsys.readouterr().err
    assert hub.calls == []


def test_an_interrupted_push_says_what_is_saved(adapters: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.refuses = KeyboardInterrupt()
    assert main([str(adapters), "me/mine"]) == 130
    assert f"interrupted: the adapters are saved in {adapters}; to push again" in capsys.readouterr().err
