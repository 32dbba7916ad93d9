"""Pages and Markdown files from templates in which text cannot be anything but text.

The templates (`*.html.jinja`, `*.md.jinja`) lie beside the modules that fill them in. What they show is escaped
here, for all of them: a template says nothing about it, so none can forget it.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from orpo_mlx.text import printable, printable_lines


class TableCell(NamedTuple):
    """What a table shows, and what it is sorted by."""

    text: str
    value: float | None = None
    """None sorts by the text."""


class Table(NamedTuple):
    """A table for Markdown and HTML alike."""

    header: tuple[str, ...]
    rows: tuple[tuple[TableCell, ...], ...]
    prose: bool = False
    """Whether its cells are sentences, which read from the left."""

    def markdown(self) -> str:
        """GitHub's Markdown; what the cells hold is text there too."""
        lines = [self.header, *(tuple(cell.text for cell in row) for row in self.rows)]
        shown = [f"| {' | '.join(map(markdown_text, line))} |" for line in lines]
        return "\n".join([shown[0], f"| {' | '.join('---' for _ in self.header)} |", *shown[1:]])


class Picture(NamedTuple):
    """A chart as two PNGs, of which the browser takes the one for its colour scheme."""

    name: str
    light: bytes
    dark: bytes
    caption: str


def render_page(
    template: str, title: str, *, style: str = "", script: str | None = None, live: bool = False, **values: Any
) -> str:
    """A whole document from a template that extends `reporting/page.html.jinja`.

    Args:
        template: its path within the package.
        title: of the page; its heading, too.
        style: rules beside those of every page; not escaped, so of this package only.
        script: run at the end of the page instead of the one that sorts tables; of this package only.
        live: whether it may ask the server it came from for more.
        values: what the template names. All text among them is shown as it is, whatever it holds.
    """
    own_style = Markup(read_asset("reporting", "page.css") + style)
    own_script = Markup(read_asset("reporting", "sort_tables.js") if script is None else script)
    found = html_templates().get_template(template)
    return found.render(title=title, style=own_style, script=own_script, live=live, **values)


def render_markdown(template: str, **values: Any) -> str:
    """A Markdown file from a template; all text among `values` is shown as it is, on one line."""
    return markdown_templates().get_template(template).render(values)


def read_asset(*names: str) -> str:
    """A file that comes with the package, by its path in it."""
    return files("orpo_mlx").joinpath(*names).read_text(encoding="utf-8")


@cache
def html_templates() -> Environment:
    """The templates of pages."""
    made = _templates(printable_lines, autoescape=True)
    made.filters["lines"] = with_line_breaks
    made.filters["base64"] = lambda content: base64.b64encode(content).decode()
    made.filters["sha256"] = lambda content: base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return made


@cache
def markdown_templates() -> Environment:
    """The templates of Markdown files."""
    made = _templates(markdown_text, autoescape=False)
    made.filters["code"] = code_span
    made.filters["table"] = lambda table: Markup(table.markdown())
    return made


def _templates(shown: Callable[[str], str], *, autoescape: bool) -> Environment:
    return Environment(
        loader=PackageLoader("orpo_mlx", ""),
        autoescape=autoescape,
        undefined=StrictUndefined,
        # `Markup` is a text that has been made safe already.
        finalize=lambda value: shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def with_line_breaks(text: str) -> Markup:
    """`text` as HTML that shows exactly it, broken where it breaks; control characters are spelled out."""
    return Markup("<br>").join(escape(printable(line)) for line in text.split("\n"))


def markdown_text(text: str) -> str:
    """`text` as Markdown that shows exactly it, on one line."""
    plain = printable(" ".join(text.split("\n")))
    # The backslash first: later it would double those that the other marks were given.
    for mark in "\\`*_[]|#~":
        plain = plain.replace(mark, "\\" + mark)
    return html.escape(plain, quote=False)


def code_span(text: str) -> Markup:
    """`text` as code in Markdown, where it can be."""
    # A backtick would end the code span, a bar the table's cell.
    return Markup(markdown_text(text) if set(text) & set("`|") else f"`{printable(text)}`")
