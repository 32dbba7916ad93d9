"""The oldest versions that pyproject.toml allows, as constraints for pip.

`python -m tests.helpers.lowest_versions > oldest.txt`
"""

from __future__ import annotations

import re
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent.parent / "pyproject.toml"
_REQUIREMENT = re.compile(r'"([A-Za-z0-9_.-]+)(?:\[[a-z,]+\])?>=([0-9][0-9a-z.]*)[^"]*"')
_TABLE = re.compile(r"^\[(.+)\]$", re.MULTILINE)


def oldest() -> list[str]:
    """`name==version` of every requirement that has a lower bound, those of the extras included.

    Raises:
        ValueError: a requirement has no lower bound, or two that differ.
    """
    # Python 3.10 has no reader of TOML.
    parts = _TABLE.split(PYPROJECT.read_text(encoding="utf-8"))
    tables = dict(zip(parts[1::2], parts[2::2], strict=True))
    dependencies = tables["project"].split("dependencies = [")[1].split("]\n")[0]
    lines = [line.strip() for line in dependencies.splitlines() + tables["project.optional-dependencies"].splitlines()]
    found: dict[str, str] = {}
    for line in filter(lambda line: '"' in line, lines):
        requirement = _REQUIREMENT.search(line)
        if requirement is None:
            raise ValueError(f"{PYPROJECT.name}: no lower bound in {line}")
        name, version = requirement.groups()
        if found.setdefault(name, version) != version:
            raise ValueError(f"{PYPROJECT.name}: {name} has two lower bounds, {found[name]} and {version}")
    return [f"{name}=={version}" for name, version in found.items()]


if __name__ == "__main__":
    print("\n".join(oldest()))
