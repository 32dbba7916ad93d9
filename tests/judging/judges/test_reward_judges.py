"""Reward models and implicit rewards: scores against float64 sums over the models' own states and log-probs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

from orpo_mlx.data.prompts import Prompt, read_prompt
from orpo_mlx.errors import ModelError
from orpo_mlx.judging.contest import check_judge, compare_replies
from orpo_mlx.judging.judges.judges import make_judge
from orpo_mlx.judging.judges.scorer import Asked, Scorer
from orpo_mlx.judging.judges.verdicts import FIRST, SECOND
from orpo_mlx.judging.make_pairs import score
from orpo_mlx.judging.ranking import Sample
from orpo_mlx.models.adapters import add_trained_adapters
from orpo_mlx.models.loading import load
from tests.conftest import make_model, model_config, write_model_folder
from tests.convert.test_conversions import write_adapter_folder
from tests.engine.test_pair_scorer import oracle_logps

REPLIES = ("Paris.", "It is Paris, of course, as everybody knows.", "Rome", "")
PROMPT = read_prompt({"prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Q?"}]}, "f:1")
CLASSES = {"llama": "LlamaForSequenceClassification", "qwen2": "Qwen2ForSequenceClassification"}


def write_reward_model(folder: Path, kind: str, labels: int = 1, **changes: Any) -> mx.array:
    """A tiny model as transformers saves one for sequence classification: no head, and a score layer; the layer."""
    write_model_folder(folder, kind)
    weights = dict(tree_flatten(make_model(kind).parameters()))
    weights.pop("lm_head.weight", None)
    mx.random.seed(3)
    layer = mx.random.normal((labels, model_config(kind)["hidden_size"]))
    mx.save_safetensors(str(folder / "model.safetensors"), {**weights, "score.weight": layer}, {"format": "pt"})
    config = {**model_config(kind), "architectures": [CLASSES[kind]], "pad_token_id": 0, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return layer


def asked(prompt: Prompt = PROMPT) -> list[Asked]:
    return [Asked(reply, prompt.question, None, prompt.pair) for reply in REPLIES]


def values(judge: Any, of: list[Asked]) -> list[float]:
    assert isinstance(judge, Scorer)
    found = judge.scores(of, lambda done: None)
    assert [each.failure for each in found] == [None] * len(of)
    return [float(each.value or 0.0) for each in found]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_reward_is_the_score_layer_on_the_state_of_the_last_token(kind: str, tmp_path: Path) -> None:
    layer = write_reward_model(tmp_path / "rm", kind)
    judge = make_judge(f"reward:{tmp_path / 'rm'}")
    found = values(judge, asked())
    # transformers: LlamaForSequenceClassification takes the logits of the last token that is no padding.
    tokenizer = mlx_lm.utils.load_tokenizer(tmp_path / "rm")
    model = make_model(kind)
    for reply, value in zip(REPLIES, found, strict=True):
        turns = [dict(turn) for turn in PROMPT.pair.prompt if isinstance(turn, dict)]
        ids = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": reply}], tokenize=True)
        state = np.array(model.model(mx.array([ids]))[0, -1], np.float64)
        assert value == pytest.approx(float(state @ np.array(layer[0], np.float64)), abs=1e-4)
    assert len({round(value, 3) for value in found}) == len(found)


def test_a_prompt_in_text_and_a_model_without_template(tmp_path: Path) -> None:
    layer = write_reward_model(tmp_path / "rm", "llama")
    config = tmp_path / "rm" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": None}))
    prompt = read_prompt({"prompt": "The capital is "}, "f:1")
    (found,) = values(make_judge(f"reward:{tmp_path / 'rm'}"), asked(prompt)[:1])
    tokenizer = mlx_lm.utils.load_tokenizer(tmp_path / "rm")
    ids = [*tokenizer.encode("The capital is Paris.", add_special_tokens=False), tokenizer.eos_token_id]
    state = np.array(make_model("llama").model(mx.array([ids]))[0, -1], np.float64)
    assert found == pytest.approx(float(state @ np.array(layer[0], np.float64)), abs=1e-4)


def test_an_implicit_reward_is_the_log_ratio_of_the_reply(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "hf")
    adapter = write_adapter_folder(tmp_path / "adapters")
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model": str(folder)}))
    judge = make_judge(f"implicit:{adapter}")
    assert isinstance(judge, Scorer)
    identity = judge.identity
    found = values(judge, asked())
    loaded = load(str(folder))
    tuned = load(str(folder)).model
    add_trained_adapters(tuned, adapter)
    tokenizer = mlx_lm.utils.load_tokenizer(folder)
    turns = [dict(turn) for turn in PROMPT.pair.prompt if isinstance(turn, dict)]
    prompt = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True)
    for reply, value in zip(REPLIES, found, strict=True):
        # The template closes the turn with its EOS and a line's end.
        whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": reply}], tokenize=True)
        assert whole[: len(prompt)] == prompt
        both = [np.sum(oracle_logps(model, prompt, whole[len(prompt) :])) for model in (tuned, loaded.model)]
        assert value == pytest.approx(both[0] - both[1], abs=1e-3)
    # A run of `pairs` that goes on must not go on with other adapters of the same name.
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {"other": mx.ones(2)})
    assert judge.identity != identity


def test_scores_choose_samples_and_judge_pairs(tmp_path: Path) -> None:
    write_reward_model(tmp_path / "rm", "llama")
    judge = make_judge(f"reward:{tmp_path / 'rm'}")
    expected = values(judge, asked())
    counts: Counter[str] = Counter()
    (scored,) = score(judge, [PROMPT], [[Sample(reply, True) for reply in REPLIES]], counts)
    assert [each.score for each in scored] == pytest.approx(expected, abs=1e-5)
    assert counts == {}
    judged = compare_replies(judge, [PROMPT, PROMPT], REPLIES[:2], REPLIES[2:])
    for number, ballot in enumerate(judged.ballots):
        wins = expected[number + 2] > expected[number]
        assert ballot.baseline_first.winner == (SECOND if wins else FIRST)
        assert ballot.consistent


def test_what_cannot_be_scored_is_a_failure_and_counted(tmp_path: Path) -> None:
    write_reward_model(tmp_path / "rm", "llama", max_position_embeddings=60)
    judge = make_judge(f"reward:{tmp_path / 'rm'}")
    counts: Counter[str] = Counter()
    (scored,) = score(judge, [PROMPT], [[Sample("a", True), Sample("b" * 100, True)]], counts)
    assert [each.sample.text for each in scored] == ["a"]
    assert counts == {"unjudged": 1}
    (ballot,) = compare_replies(judge, [PROMPT], ["a"], ["b" * 100]).ballots
    assert ballot.failure == "prompt_too_long"


def test_what_is_no_reward_model_or_no_adapter_is_one_sentence(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "plain")
    write_reward_model(tmp_path / "many", "llama", labels=3)
    (tmp_path / "empty").mkdir()
    full = write_adapter_folder(tmp_path / "full", fine_tune_type="full")
    config = {**json.loads((full / "adapter_config.json").read_text()), "model": str(tmp_path / "plain")}
    (full / "adapter_config.json").write_text(json.dumps(config))
    for name, message in (
        (f"reward:{tmp_path / 'plain'}", "holds no score.weight"),
        (f"reward:{tmp_path / 'many'}", "has shape (3, 32)"),
        (f"reward:{tmp_path / 'nowhere'}", "no such file or folder"),
        (f"implicit:{tmp_path / 'empty'}", "holds no adapters.safetensors"),
        (f"implicit:{full}", "leave no model to compare with"),
    ):
        with pytest.raises(ModelError) as caught:
            values(make_judge(name), asked()[:1])
        assert message in str(caught.value)
        assert f"judge={name}" in str(caught.value)
        assert len(str(caught.value)) < 400
    # Before replies are drawn.
    with pytest.raises(ModelError, match="leave no model to compare with"):
        check_judge(make_judge(f"implicit:{full}"), [])
