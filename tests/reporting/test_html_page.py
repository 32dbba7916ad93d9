"""Text stays text, in HTML and in Markdown; the policy names the page's own script and style and nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError

from orpo_mlx.reporting.html_page import (
    Picture,
    Table,
    TableCell,
    html_templates,
    markdown_templates,
    markdown_text,
    render_page,
)
from orpo_mlx.reporting.metrics_log import Sample
from orpo_mlx.reporting.run_report import PromptReplies

TABLE = Table(
    ("name <i>", "value"), ((TableCell("a|b\n*c*"), TableCell("1.5 s", 1.5)), (TableCell("\x1b[2J"), TableCell("–")))
)


class Texts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.found = ""
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.found += "\n" if tag == "br" else ""

    def handle_data(self, data: str) -> None:
        self.found += data


def fill_in(source: str, **values: object) -> str:
    """What a template of the package makes of `source`."""
    return html_templates().from_string(source).render(**values)


def shown(document: str) -> Texts:
    parser = Texts()
    parser.feed(document)
    parser.close()
    return parser


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_out_as_itself(words: str) -> None:
    # Printable characters are themselves; what would move a cursor is spelled out.
    printable = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in words)
    broken = shown(fill_in("{{ words | lines }}", words=words))
    assert set(broken.tags) <= {"br"}
    assert broken.found == printable
    plain = shown(fill_in('<i title="{{ words }}">{{ words }}</i>', words=words))
    assert plain.tags == ["i"]
    assert plain.found == plain.attributes[0][1] == printable


def test_a_name_that_a_template_is_not_given_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        fill_in("{{ nothing }}")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_markdown_is_one_line_without_markup(words: str) -> None:
    found = markdown_text(words)
    assert "\n" not in found
    assert not re.search(r"(?<!\\)(\\\\)*[`*_\[\]|#~]", found)
    assert "<" not in found


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_markdown_templates_show_text_as_text(words: str) -> None:
    templates = markdown_templates()
    assert templates.from_string("{{ words }}").render(words=words) == markdown_text(words)
    code = templates.from_string("{{ words | code }}").render(words=words)
    # A backtick would end the code early, a bar the cell of a table.
    assert code == markdown_text(words) if set(words) & set("`|") else (code[0], code[-1]) == ("`", "`")


def test_a_table_in_markdown() -> None:
    assert TABLE.markdown().splitlines() == [
        "| name &lt;i&gt; | value |",
        "| --- | --- |",
        "| a\\|b \\*c\\* | 1.5 s |",
        "| \\\\x1b\\[2J | – |",
    ]


SORTABLE = '{% from "reporting/parts.html.jinja" import sortable %}{{ sortable(table) }}'


def test_a_table_in_html() -> None:
    found = fill_in(SORTABLE, table=TABLE)
    assert '<td data-value="1.5">1.5 s</td>' in found
    assert "<td>a|b<br>*c*</td>" in found
    assert 'class="sortable"' in found
    assert 'class="sortable text"' in fill_in(SORTABLE, table=TABLE._replace(prose=True))


def test_the_policy_allows_exactly_what_is_there() -> None:
    document = render_page(
        "reporting/run_report.html.jinja",
        "A <title>",
        summary=TABLE,
        key="<key>",
        pictures=[Picture('a"b', b"light", b"dark", "<caption>")],
        facts=None,
        sample_replies=[("<replies>", [PromptReplies("<prompt>", [Sample(3, "<prompt>", "<reply>", 2)])])],
        unread=["<unread>"],
    )
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', document)[1])  # type: ignore[index]
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "connect-src" not in policy
    for tag in ("style", "script"):
        blocks = re.findall(f"<{tag}>(.*?)</{tag}>", document, re.S)
        assert len(blocks) == 1
        digest = base64.b64encode(hashlib.sha256(blocks[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "<title>A &lt;title&gt;</title>" in document
    for name in ("key", "caption", "replies", "unread"):
        assert f"&lt;{name}&gt;" in document
        assert f"<{name}>" not in document
    assert 'alt="a&#34;b"' in document
    assert not re.search(r"(?:src|href|srcset)=\"(?!data:)", document)
    assert base64.b64encode(b"dark").decode() in document
