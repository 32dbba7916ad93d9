"""Settings in a YAML file, read whatever is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orpo_mlx.errors import ConfigError, reason_of
from orpo_mlx.text import quoted


def read_yaml_table(path: Path, location: str) -> dict[Any, Any]:
    """The table in a YAML file; ConfigError, which begins with `location`, where it cannot be read or is none."""
    import yaml

    # mlx-lm's loader reads 1e-5 as a number, which PyYAML alone does not.
    from mlx_lm.lora import yaml_loader

    # Reading a pipe would wait for somebody to write into it; one of the shell's own, `-c <(...)`, has a writer.
    if path.exists() and not (path.is_file() or path.is_dir() or path.is_relative_to("/dev")):
        raise ConfigError(f"{location}: is no regular file, expected YAML.")
    try:
        table = yaml.load(path.read_text(encoding="utf-8"), _without_repeats(yaml_loader, location))
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{location}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{location}: not a text file in UTF-8, expected YAML.") from None
    except RecursionError:
        raise ConfigError(f"{location}: not valid YAML (nested too deeply).") from None
    # PyYAML leaves the errors of Python's types as they are: of a number of thousands of digits, of a thirteenth month.
    except Exception as error:
        raise ConfigError(f"{location}: not valid YAML ({reason_of(error)}).") from None
    if not isinstance(table, dict):
        found = "nothing" if table is None else f"a {type(table).__name__}"
        raise ConfigError(f"{location}: found {found}, expected a table of settings (key: value).")
    return table


def _without_repeats(loader: Any, location: str) -> Any:
    """A YAML loader that refuses a table with a key twice, of which PyYAML would take the last without a word."""

    class Loader(loader):
        # As nodes are read: later on, what `<<` merges stands among a table's own keys, which may override it.
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen: set[tuple[str, str]] = set()
            for key, _ in node.value:
                # PyYAML itself refuses lists and tables as keys.
                if not isinstance(key.value, str):
                    continue
                if (key.tag, key.value) in seen:
                    line = key.start_mark.line + 1
                    raise ConfigError(f"{location}: line {line}: key {quoted(key.value)} is given twice; keep one.")
                seen.add((key.tag, key.value))
            return node

    return Loader
