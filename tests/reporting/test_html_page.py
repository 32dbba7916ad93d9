"""Text stays text, in HTML and in Markdown; the policy names the page's own script and style and nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from orpo_mlx.reporting.html_page import Cell, Table, definition_list, markdown_text, page, picture, text

TABLE = Table(("name <i>", "value"), ((Cell("a|b\n*c*"), Cell("1.5 s", 1.5)), (Cell("\x1b[2J"), Cell("–"))))


class Texts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.found = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += "\n" if tag == "br" else ""

    def handle_data(self, data: str) -> None:
        self.found += data


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_out_as_itself(words: str) -> None:
    parser = Texts()
    parser.feed(text(words))
    parser.close()
    assert set(parser.tags) <= {"br"}
    # Printable characters are themselves; what would move a cursor is spelled out.
    printable = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in words)
    assert parser.found == printable


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_markdown_is_one_line_without_markup(words: str) -> None:
    found = markdown_text(words)
    assert "\n" not in found
    assert not re.search(r"(?<!\\)(\\\\)*[`*_\[\]|#~]", found)
    assert "<" not in found


def test_a_table_in_markdown() -> None:
    assert TABLE.markdown().splitlines() == [
        "| name &lt;i&gt; | value |", "| --- | --- |", "| a\\|b \\*c\\* | 1.5 s |", "| \\\\x1b\\[2J | – |",
    ]  # fmt: skip


def test_a_table_in_html() -> None:
    found = TABLE.html()
    assert '<td data-value="1.5">1.5 s</td>' in found
    assert "<td>a|b<br>*c*</td>" in found
    assert 'class="sortable"' in found
    assert 'class="sortable text"' in TABLE._replace(prose=True).html()


def test_the_policy_allows_exactly_what_is_there() -> None:
    document = page(
        "A <title>", [TABLE.html(), picture('a"b', b"light", b"dark", "<caption>"), definition_list({"k": "<v>"})]
    )
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', document)[1])  # type: ignore[index]
    assert policy.startswith("default-src 'none'; img-src data:; ")
    for tag in ("style", "script"):
        blocks = re.findall(f"<{tag}>(.*?)</{tag}>", document, re.S)
        assert len(blocks) == 1
        digest = base64.b64encode(hashlib.sha256(blocks[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "<title>A &lt;title&gt;</title>" in document
    assert "&lt;caption&gt;" in document
    assert 'alt="a&quot;b"' in document
    assert "<code>&lt;v&gt;</code>" in document
    assert not re.search(r"(?:src|href|srcset)=\"(?!data:)", document)
    assert base64.b64encode(b"dark").decode() in document
