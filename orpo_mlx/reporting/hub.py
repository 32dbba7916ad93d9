"""Send what a run made to the Hub: adapters, model card and figures, never checkpoints."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token

from orpo_mlx.errors import ConfigError, ModelError, TrainingError, reason_of
from orpo_mlx.files import json_text
from orpo_mlx.reporting.model_card import has_hub_form
from orpo_mlx.run_folder import (
    ADAPTER_CONFIG_FILE,
    ADAPTERS_FILE,
    CARD_FILE,
    METRICS_FILE,
    REPORT_PAGE,
    REPORT_PICTURE,
    RUN_FILE,
)
from orpo_mlx.text import shareable

_NEEDED = (ADAPTERS_FILE, ADAPTER_CONFIG_FILE)
_FILES = (*_NEEDED, CARD_FILE, RUN_FILE, METRICS_FILE, REPORT_PAGE, REPORT_PICTURE)
# Sent with local paths cut down to their last part.
_WITH_PATHS = (ADAPTER_CONFIG_FILE, RUN_FILE)


def contents(folder: Path) -> dict[str, bytes | Path]:
    """What is sent of an adapter folder: by name, its bytes or the file that holds them.

    Raises:
        ModelError: the folder holds no adapters, or its JSON cannot be read.
    """
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder}: has no {missing[0]}; give the `adapter_path` of a run of orpo_mlx.train.")
    return {
        name: without_paths(folder / name) if name in _WITH_PATHS else folder / name
        for name in _FILES
        if (folder / name).is_file()
    }


def without_paths(path: Path) -> bytes:
    """A JSON file's content with local paths cut down to their last part."""
    try:
        return json_text(shareable(json.loads(path.read_text(encoding="utf-8")))).encode()
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON ({error}); put back the file that training wrote.") from None


def check_ready(repo_id: str, source: str) -> None:
    """Make sure that a push could begin, without asking the Hub.

    Raises:
        ConfigError: `repo_id` is not owner/name, or there is no token; names `source`.
    """
    check_name(repo_id, source)
    if not get_token():
        raise ConfigError(f"{source} {repo_id}: there is no token for the Hub; set HF_TOKEN or run 'hf auth login'.")


def check_name(repo_id: str, source: str) -> None:
    if not has_hub_form(repo_id):
        raise ConfigError(f"{source} {repo_id}: found no repository id, expected owner/name, such as me/my-adapters.")


def push(folder: Path, repo_id: str, *, private: bool | None = None) -> str:
    """Send the adapter folder to a model repository, which is made where it is not there, as one commit.

    Args:
        folder: where a run wrote its adapters.
        repo_id: owner/name.
        private: whether a repository that is made is private; None leaves that to the owner's settings on the Hub.

    Returns:
        The address of the repository.

    Raises:
        ModelError: there are no adapters in `folder`.
        TrainingError: the Hub did not take it; says where the adapters are and how to push again.
    """
    sent = contents(folder)
    # What to do after a failure is put together first: nothing is lost, and nobody should train again for it.
    again = shlex.join(["orpo-mlx", "push", str(folder), repo_id, *(["--private"] if private else [])])
    saved = f"the adapters are saved in {folder}; to push again: {again}"
    try:
        api = HfApi()
        address = str(api.create_repo(repo_id, private=private, exist_ok=True))
        # One commit: nobody ever finds half of it there.
        operations = [CommitOperationAdd(name, content) for name, content in sent.items()]
        api.create_commit(repo_id, operations, commit_message="Adapters trained with orpo_mlx")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(saved) from None
    except Exception as error:  # Any of a dozen Hub, HTTP, transfer and file errors; each means it was not taken.
        raise TrainingError(f"{repo_id}: the Hub did not take the push ({reason_of(error)}); {saved}") from None
    return address


def listing(sent: dict[str, bytes | Path]) -> str:
    """Sizes in bytes and names, a file a line, with the sum."""
    sizes = {name: len(what) if isinstance(what, bytes) else what.stat().st_size for name, what in sent.items()}
    return "\n".join(f"{size:>15,}  {name}" for name, size in [*sizes.items(), ("bytes together", sum(sizes.values()))])
