"""Charts that can be told apart."""

from __future__ import annotations

import struct

import pytest

from orpo_mlx.reporting.charts import DARK, LIGHT, Theme, label, legend, png, style, whole_steps


def test_many_things_have_styles_of_their_own() -> None:
    styles = [style(number) for number in range(22)]
    assert len({(look.color, str(look.dash)) for look in styles}) == 22
    assert len({(look.color, look.marker) for look in styles}) == 22
    # The first seven differ by colour and by marker: prints and colour-blind readers have both.
    assert len({look.color for look in styles[:7]}) == len({look.marker for look in styles[:7]}) == 7


def test_labels_are_plain() -> None:
    assert label("a $x$\x1b[2J\nb") == "a \\$x\\$\\x1b[2J b"
    assert label("x" * 50, 10) == "x" * 9 + "…"


@pytest.mark.parametrize("steps", [[2], [0, 1], [3, 4, 5], [0, 1000]])
def test_ticks_of_steps_are_whole_numbers(steps: list[int]) -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    axes.plot(steps, [1.0] * len(steps), marker="o")
    whole_steps(axes)
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(float(tick).is_integer() for tick in ticks)


def test_pictures_have_their_size_and_paper() -> None:
    from matplotlib.image import imread

    def panel(axes: object, theme: Theme) -> None:
        axes.plot([0, 1, 2], [1, 2, 1], label="a")  # type: ignore[attr-defined]
        axes.plot([0, 1, 2], [2, 1, 1], label="b")  # type: ignore[attr-defined]
        whole_steps(axes)  # type: ignore[arg-type]
        legend(axes)  # type: ignore[arg-type]

    for theme, paper in ((LIGHT, 1.0), (DARK, 0x16 / 255)):
        content = png([panel, panel, panel], theme, columns=2)
        assert content.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", content[16:24])
        assert (width, height) == (2 * 700, 2 * 476)
        import io

        assert abs(imread(io.BytesIO(content), format="png")[0, 0, 0] - paper) < 0.01
