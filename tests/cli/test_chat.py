"""The chat, with adapters that have learnt one answer."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from mlx_lm import generate, stream_generate
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import load_tokenizer
from rich.console import Console
from tokenizers.processors import TemplateProcessing

from orpo_mlx.cli.chat import main
from orpo_mlx.cli.common import conversation as chat_module
from orpo_mlx.cli.common.conversation import Chat, Conversation, prompt_ids, talk
from orpo_mlx.data.tokens.tokenization import PairTokenizer
from orpo_mlx.errors import ModelError
from orpo_mlx.judging.judges.model_judge import rendered_turn
from orpo_mlx.models.adapters import add_trained_adapters
from orpo_mlx.models.loading import load
from orpo_mlx.models.recorded import base_model
from tests.conftest import write_model_folder
from tests.helpers.tuned_adapters import ANSWER, PROMPT, tuned_adapters


@pytest.fixture
def adapters(taught_adapters: Path) -> Path:
    return taught_adapters


class Said:
    """A side that answers what it is told to, and remembers what it was asked."""

    def __init__(self, *pieces: str) -> None:
        self.pieces, self.asked, self.resets = pieces, list[str](), 0

    def answer(self, prompt: str) -> Any:
        self.asked.append(prompt)
        yield from self.pieces

    def reset(self) -> None:
        self.resets += 1


def shown(sides: dict[str, Any], lines: list[str], *, width: int = 80, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, highlight=False)
    talk(Chat(sides, console), lines)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def base_answer(model_folder: Path, max_tokens: int) -> str:
    loaded = load(str(model_folder))
    assert loaded.tokenizer is not None
    ids = loaded.tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    return str(generate(loaded.model, loaded.tokenizer, ids, max_tokens=max_tokens))


def conversation(model_folder: Path, adapters: Path | None, max_tokens: int = 6) -> Conversation:
    loaded = load(str(model_folder))
    if adapters is not None:
        add_trained_adapters(loaded.model, adapters)
    return Conversation(loaded.model, loaded.tokenizer, max_tokens=max_tokens, sampler=make_sampler(0.0))


def test_one_prompt_is_answered_as_the_adapters_were_taught(adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--adapter-path", str(adapters), "--prompt", PROMPT, "--max-tokens", "12"]) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n"


def test_the_base_answers_are_those_of_the_model_without_adapters(
    adapters: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--adapter-path", str(adapters), "--compare", "--prompt", PROMPT, "--max-tokens", "5"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    head, _, tuned = out.partition("[tuned]\n")
    expected = chat_module.shown(base_answer(model_folder, 5)).plain
    assert head == f"[base]\n{expected}\n"
    assert tuned == f"{ANSWER[:5]}\n"


def test_a_later_turn_is_answered_as_without_a_cache(model_folder: Path, adapters: Path) -> None:
    first = conversation(model_folder, adapters)
    said = ["".join(first.answer(prompt)) for prompt in (PROMPT, "And then?", PROMPT)]
    fresh = conversation(model_folder, adapters)
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": said[0]}]
    fresh._history = [*turns, {"role": "user", "content": "And then?"}, {"role": "assistant", "content": said[1]}]
    assert "".join(fresh.answer(PROMPT)) == said[2]
    assert len(first._history) == 6
    first.reset()
    assert "".join(first.answer(PROMPT)) == said[0]


def test_a_question_is_put_as_in_training(tmp_path: Path) -> None:
    parts = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}<|end|>{% endfor %}"
    tokenizer = load_tokenizer(write_model_folder(tmp_path / "model", template=parts))
    asked = [{"role": "user", "content": "Who?"}]
    assert tokenizer.decode(prompt_ids(PairTokenizer(tokenizer), asked)) == "Who?<|end|>"
    assert rendered_turn(tokenizer, "Who?") == "Who?<|end|>"
    # Without a template, and with a tokenizer that closes every text.
    tokenizer._tokenizer.chat_template = None
    tokenizer.has_chat_template = False
    end = TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", tokenizer.eos_token_id)])
    tokenizer._tokenizer.backend_tokenizer.post_processor = end
    assert tokenizer.decode(prompt_ids(PairTokenizer(tokenizer), asked)) == "Who?"


def test_only_what_is_new_is_run_again(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, real = list[int](), stream_generate

    def counted(model: Any, tokenizer: Any, prompt: list[int], **arguments: Any) -> Any:
        lengths.append(len(prompt))
        return real(model, tokenizer, prompt, **arguments)

    monkeypatch.setattr(chat_module, "stream_generate", counted)
    side = conversation(model_folder, None, max_tokens=1)
    for _ in range(2):
        list(side.answer("A long question, asked twice, word for word."))
        side._history = []
    assert lengths[0] > 40
    assert lengths[1] == 1


def test_commands_and_blank_lines_are_no_prompts() -> None:
    side = Said("fine")
    assert shown({"tuned": side}, ["one\n", "\n", "/reset\n", "/other\n", "/quit\n", "two\n"]) == "fine\nfine\n"
    assert (side.asked, side.resets) == (["one", "/other"], 1)


def test_each_side_is_asked_and_reset() -> None:
    sides = {"base": Said("a"), "tuned": Said("b")}
    assert shown(sides, ["q", "/reset"]) == "[base]\na\n[tuned]\nb\n"
    assert [(side.asked, side.resets) for side in sides.values()] == [(["q"], 1), (["q"], 1)]


@pytest.mark.parametrize(("width", "terminal", "beside"), [(200, True, True), (80, True, False), (200, False, False)])
def test_answers_stand_side_by_side_in_a_wide_terminal(width: int, terminal: bool, beside: bool) -> None:
    text = shown({"base": Said("left"), "tuned": Said("right")}, ["q"], width=width, terminal=terminal)
    assert any("left" in line and "right" in line for line in text.splitlines()) == beside
    assert max(len(line) for line in text.splitlines() if "\x1b" not in line) <= width


@pytest.mark.parametrize("width", [80, 200])
def test_an_answer_cannot_move_the_cursor_nor_be_markup(width: int) -> None:
    sides = {"base": Said("\x1b[2J[red]x", "\n\ty\r"), "tuned": Said("z")}
    text = shown(sides, ["q"], width=width, terminal=True)
    assert "\\x1b[2J[red]x" in text
    assert "    y\\r" in text
    assert "\x1b[2J" not in text


def test_piped_lines_are_one_conversation(
    adapters: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n/reset\n{PROMPT}\n"))
    assert main(["--adapter-path", str(adapters), "--max-tokens", "12"]) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n{ANSWER}\n"


@pytest.mark.parametrize(("ends_with", "status"), [(EOFError, 0), (KeyboardInterrupt, 130)])
def test_leaving_a_terminal(
    adapters: Path, monkeypatch: pytest.MonkeyPatch, ends_with: type[BaseException], status: int
) -> None:
    def typed(_: str) -> str:
        raise ends_with

    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr("builtins.input", typed)
    assert main(["--adapter-path", str(adapters)]) == status


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max-tokens", "0"], "--max-tokens: found 0"),
        (["--temp", "-1"], "--temp: found -1.0"),
        (["--prompt", " "], "--prompt: is empty"),
        (["--model", "/nowhere/m"], "--model /nowhere/m: no such file"),
        (["--adapter-path", "/nowhere"], "holds no adapters.safetensors"),
    ],
)
def test_bad_input_is_one_sentence(
    adapters: Path, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--adapter-path", str(adapters), *argv]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_input_that_is_not_text_is_refused(
    adapters: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    assert main(["--adapter-path", str(adapters)]) == 2
    assert "standard input: is not text in utf-8" in capsys.readouterr().err


def test_without_flags_the_folder_that_train_writes_is_taken(
    adapters: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").symlink_to(adapters)
    assert main(["--prompt", PROMPT, "--max-tokens", "12"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{ANSWER}\n"
    assert said.err == f"{model_folder}, with the adapters in adapters.\n"
    # A model alone is the base.
    assert main(["--model", str(model_folder), "--prompt", PROMPT, "--max-tokens", "5"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{chat_module.shown(base_answer(model_folder, 5)).plain}\n"
    assert said.err == f"{model_folder}, without adapters.\n"
    assert main(["--model", str(model_folder), "--compare", "--prompt", PROMPT]) == 2
    assert "--compare: there are no adapters to compare with" in capsys.readouterr().err


def test_the_model_is_the_one_the_adapters_name(tmp_path: Path) -> None:
    (tmp_path / "adapters.safetensors").touch()
    with pytest.raises(ModelError, match="names no model"):
        base_model(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"model": "a/of-run"}}))
    assert base_model(tmp_path) == "a/of-run"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"model": "a/of-config"}))
    assert base_model(tmp_path) == "a/of-config"


def test_whole_weights_cannot_be_compared(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tuned_adapters(tmp_path, model_folder, fine_tune_type="full", iters=1)
    assert main(["--adapter-path", str(folder), "--compare", "--prompt", "Q"]) == 2
    assert "whole weights, which cannot be switched off" in capsys.readouterr().err
