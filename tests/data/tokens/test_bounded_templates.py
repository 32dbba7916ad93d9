"""A chat template, of a model or of a row, cannot hold a run up or fill the memory."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.cli.common.conversation import prompt_ids
from orpo_mlx.data.pairs import load_pairs
from orpo_mlx.data.tokens.bounded_templates import BoundedEnvironment, TemplateLimitError, bounded_time
from orpo_mlx.data.tokens.tokenization import PairTokenizer
from orpo_mlx.errors import DataError, ModelError
from orpo_mlx.judging.judges.model_judge import rendered_turn
from orpo_mlx.models.loading import find
from tests.conftest import CHAT_TEMPLATE, write_model_folder, write_rows

ROW = {"prompt": "q", "chosen": "a", "rejected": "b"}
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    "loops": LOOPS,
    "recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "power": "{{ 9 ** 999999999 }}",
    "repeat": "{{ 'spam' * 2000000000 }}",
    "repeat a list": "{{ 2000000000 * [1] }}",
    "width": "{{ '%0*d' % (2000000000, 1) }}",
    "width in the format": "{{ '%2000000000d' % 1 }}",
    "center": "{{ 'a'.center(3000000000) }}",
    "center, the filter": "{{ 'a' | center(3000000000) }}",
    "replace": "{% set a = 'a' * 9000000 %}{{ a.replace('a', a) }}",
    "replace nothing": "{% set a = 'a' * 9000000 %}{{ a.replace('', 'bc') }}",
    "replace, the filter": "{% set a = 'a' * 9000000 %}{{ a | replace('a', a) }}",
    "replace a number, the filter": "{% set a = '1' * 9000000 %}{{ a | replace(1, a) }}",
    "join, the filter": "{{ ('b' * 9000000) | join('a' * 9000000) }}",
    "join": "{{ (('a' * 9000000).join('b' * 9000000)) }}",
    "long": "{{ 'spam ' * 400000 }}",
    "long for a row": "{% if messages[0].content != 'Hi' %}{{ 'spam ' * 400000 }}{% endif %}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_models_template(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orpo_mlx.data.tokens.chat_template.bounded_time", lambda: bounded_time(0.5))
    folder = tmp_path / name.replace(" ", "_")
    folder.mkdir()
    info = find(str(write_model_folder(folder, template=ENDLESS[name] + CHAT_TEMPLATE)))
    rows = load_pairs(write_rows(tmp_path / "rows.jsonl", [ROW]))
    started = time.monotonic()
    with pytest.raises(ModelError, match="its chat template cannot be used") as caught:
        list(PairTokenizer(info.tokenizer).each(rows))
    assert time.monotonic() - started < 20
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", ["message['content']", "message['content'].replace('/no_think', '')"])
def test_a_template_that_is_long_because_the_row_is(content: str, tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model", template=CHAT_TEMPLATE.replace("message['content']", content))
    rows = load_pairs(write_rows(tmp_path / "rows.jsonl", [{**ROW, "prompt": "q" * 2_000_000}]))
    (pair,) = PairTokenizer(find(str(folder)).tokenizer).each(rows)
    assert len(pair.prompt_ids) > 2_000_000


@pytest.mark.parametrize(
    "arguments", [{"chat_template": LOOPS}, {"tokenize": True}, {"return_dict": True}, {"continue_final_message": True}]
)
@pytest.mark.parametrize("as_text", [False, True])
def test_a_row_brings_no_template(arguments: dict[str, Any], as_text: bool, tmp_path: Path) -> None:
    row = {**ROW, "chat_template_kwargs": json.dumps(arguments) if as_text else arguments}
    with pytest.raises(DataError, match=f"rows.jsonl:1: 'chat_template_kwargs' holds '{next(iter(arguments))}'"):
        load_pairs(write_rows(tmp_path / "rows.jsonl", [row]))


def test_what_published_templates_do_is_left_alone() -> None:
    environment = BoundedEnvironment()
    for source, expected in {
        "{{ '=' * 40 }}": "=" * 40,
        "{{ 'a'.replace('a', 'b') }}": "b",
        "{% macro m(n) %}{{ n }}{% endmacro %}{{ m(1700000000) }} {{ 1700000000 | string }}": "1700000000 1700000000",
        "{{ ', '.join(['a', 'b']) }}{{ [1, 2] | join('-') }}": "a, b1-2",
        "{{ '%05.1f and %s' % (2, 'x') }}": "002.0 and x",
        "{{ 7 * 6 }} {{ 7 % 4 }} {{ 2 ** 10 }} {{ 2.5 * 2 }}": "42 3 1024 5.0",
        "{{ 'a' | center(5) }}{{ 'x' | indent(4, true) }}{{ 'a'.rjust(3) }}": "  a      x  a",
        "{{ {'a': 1} | tojson }}{{ [3, 1] | sort | first }}{{ 'A b' | lower | trim }}": '{"a": 1}1a b',
        "{{ [1, 2, 3] | map('string') | select('equalto', '2') | list }}": "['2']",
    }.items():
        assert environment.from_string(source).render() == expected


def asked_in_chat(tokenizer: Any, text: str) -> list[int]:
    return prompt_ids(PairTokenizer(tokenizer), [{"role": "user", "content": text}])


def in_another_thread(work: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("run", [lambda work: work(), in_another_thread])
def test_time_is_the_processors(run: Callable[[Callable[[], object]], object]) -> None:
    def spin() -> None:
        with bounded_time(0.05):
            while True:
                pass

    def wait(seconds: float, wall: float) -> bool:
        with bounded_time(0.05, wall):
            time.sleep(seconds)
        return True

    with pytest.raises(TemplateLimitError, match=re.escape("it took more than 0.05 seconds of the processor's time")):
        run(spin)
    # Waiting, as for a processor that others have, is none of it.
    assert run(lambda: wait(0.3, 60))
    with pytest.raises(TemplateLimitError, match=re.escape("it did not end in 0.1 seconds")):
        run(lambda: wait(0.3, 0.1))
    # Nothing is left behind that would end what comes next.
    assert run(lambda: wait(0.1, 60))


@pytest.mark.parametrize("ask", [rendered_turn, asked_in_chat])
def test_chat_and_judges_are_bounded(
    ask: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orpo_mlx.data.tokens.chat_template.bounded_time", lambda: bounded_time(0.2))
    folder = write_model_folder(
        tmp_path / "m", template="{% if messages[0].content == 'now' %}" + LOOPS + "{% endif %}" + CHAT_TEMPLATE
    )
    tokenizer = find(str(folder)).tokenizer
    ask(tokenizer, "not yet")
    with pytest.raises(ModelError, match="chat template"):
        ask(tokenizer, "now")
