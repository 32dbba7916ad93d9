"""Where things are remembered."""

from __future__ import annotations

from pathlib import Path

import pytest

from orpo_mlx.files import cache_folder


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ORPO_MLX_CACHE": "/a"}, Path("/a")),
        ({"ORPO_MLX_CACHE": "off"}, None),
        ({"XDG_CACHE_HOME": "/x"}, Path("/x/orpo_mlx")),
        ({"HOME": "/h"}, Path("/h/.cache/orpo_mlx")),
        ({"HOME": "/h", "XDG_CACHE_HOME": "", "ORPO_MLX_CACHE": ""}, Path("/h/.cache/orpo_mlx")),
    ],
)
def test_where_it_is_kept(environment: dict[str, str], expected: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ORPO_MLX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == expected
