"""A self-contained HTML page: text that cannot be anything but text, sortable tables, pictures for light and dark."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from orpo_mlx.text import printable

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1c1c; --faint: #5b5b5b; --rule: #d4d4d4; --shade: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --ink: #e8e8e8; --faint: #a8a8a8; --rule: #3d4148; --shade: #22262c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p, ul { max-width: 46rem; } .faint { color: var(--faint); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top; }
th:first-child, td:first-child, .text th, .text td { text-align: left; } thead th { vertical-align: bottom; }
.text td { min-width: 8rem; } table:not(.text) td { white-space: nowrap; }
table:not(.text) td:first-child { min-width: min(12rem, 40vw); white-space: normal; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid; }
th button::after { content: "\\a0\\2195"; color: var(--faint); }
th[aria-sort=ascending] button::after { content: "\\a0\\2191"; color: inherit; }
th[aria-sort=descending] button::after { content: "\\a0\\2193"; color: inherit; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; } img { display: block; width: 100%; max-width: 40rem; height: auto; }
figcaption { color: var(--faint); font-size: .9rem; }
code { background: var(--shade); padding: .1em .3em; border-radius: .2em; overflow-wrap: anywhere; }
pre { background: var(--shade); padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; border-radius: .3rem; }
pre code { padding: 0; }
"""

_LIVE = "connect-src 'self'; "

_SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const compare = (a, b) => {
        const [x, y] = [Number(key(a)), Number(key(b))];
        if (Number.isNaN(x) || Number.isNaN(y)) {
          if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;
          return key(a).localeCompare(key(b)) * (down ? -1 : 1);
        }
        return (x - y) * (down ? -1 : 1);
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
"""


class Cell(NamedTuple):
    """What a table shows, and what it is sorted by."""

    text: str
    value: float | None = None
    """None sorts by the text."""


class Table(NamedTuple):
    """A table for Markdown and HTML alike."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    prose: bool = False
    """Whether its cells are sentences, which read from the left."""

    def markdown(self) -> str:
        """GitHub's Markdown; what the cells hold is text there too."""
        lines = [self.header, tuple("---" for _ in self.header), *(tuple(c.text for c in row) for row in self.rows)]
        return "\n".join(
            "| " + " | ".join(line if number == 1 else map(markdown_text, line)) + " |"
            for number, line in enumerate(lines)
        )

    def html(self) -> str:
        """A table whose columns sort on a click."""
        head = "".join(f'<th scope="col">{text(name)}</th>' for name in self.header)
        rows = "".join(f"<tr>{''.join(map(_td, row))}</tr>\n" for row in self.rows)
        kind = "sortable text" if self.prose else "sortable"
        return (
            f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{rows}</tbody></table></div>\n"
        )


def text(words: str) -> str:
    """`words` as HTML that shows exactly them: markup is escaped, control characters are spelled out."""
    return "<br>".join(html.escape(printable(line)) for line in words.split("\n"))


def markdown_text(words: str) -> str:
    """`words` as Markdown that shows exactly them, on one line."""
    plain = printable(" ".join(words.split("\n")))
    for mark in "\\`*_[]|#~":
        plain = plain.replace(mark, "\\" + mark)
    return html.escape(plain, quote=False)


def picture(name: str, light: bytes, dark: bytes, words: str) -> str:
    """A chart as two PNGs, of which the browser takes the one for its colour scheme, with a caption."""
    sources = [f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (light, dark)]
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">'
        f'<img src="{sources[0]}" alt="{html.escape(printable(name))}"></picture>'
        f"<figcaption>{text(words)}</figcaption></figure>\n"
    )


def definition_list(values: Mapping[str, str]) -> str:
    """Names and values, a line each."""
    return (
        "<ul>"
        + "".join(f"<li>{text(key)}: <code>{text(value)}</code></li>" for key, value in values.items())
        + "</ul>\n"
    )


def page(title: str, parts: Sequence[str], *, style: str = "", script: str = _SCRIPT, live: bool = False) -> str:
    """The whole document. Its policy lets it run no script but its own, and fetch nothing.

    Args:
        title: of the page; its heading, too.
        parts: HTML, one after the other.
        style: rules beside those of every page.
        script: run at the end of the page.
        live: whether it may ask the server it came from for more.
    """
    style = _STYLE + style
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{_sha256(style)}'; "
        f"script-src 'sha256-{_sha256(script)}'; {_LIVE if live else ''}base-uri 'none'; form-action 'none'"
    )
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<h1>{text(title)}</h1>\n"
        f"{body}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _td(cell: Cell) -> str:
    value = "" if cell.value is None else f' data-value="{cell.value!r}"'
    return f"<td{value}>{text(cell.text)}</td>"


def _sha256(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
