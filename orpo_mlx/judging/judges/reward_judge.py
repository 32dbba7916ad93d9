"""Reward models as judges: a checkpoint with one label in Hugging Face's layout for sequence classification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from orpo_mlx.data.tokens.chat_template import PairRenderer
from orpo_mlx.data.tokens.token_codec import TokenCodec
from orpo_mlx.engine.lm_head import ModelHead, find_head
from orpo_mlx.errors import ModelError
from orpo_mlx.files import read_json_table
from orpo_mlx.judging.judges.model_judge import context_of
from orpo_mlx.judging.judges.scorer import REWARD, Asked, Score, Scorer, number
from orpo_mlx.models.loading import LoadedModel, find, load, locate
from orpo_mlx.models.stored.safetensors_files import read_header, safetensors_shards
from orpo_mlx.models.stored.tied_head import tied
from orpo_mlx.models.vocabulary import check_ids, vocabulary_of
from orpo_mlx.process_memory import clear_cache_above

HEAD = "score.weight"
"""What transformers calls the layer that makes a state a score."""
# Conversations are long, and all of a batch are in memory at once.
_ROWS = 8


class RewardModel(NamedTuple):
    """A reward model, loaded."""

    loaded: LoadedModel
    """Its language model's own head is never run."""
    body: ModelHead
    head: mx.array
    """(1, H) float32."""
    renderer: PairRenderer
    codec: TokenCodec


class RewardJudge(Scorer):
    """Scores a reply as transformers' classes for sequence classification do: w · h_T.

    h_T is the state of the last token of prompt and reply, in the model's own chat template, and w the checkpoint's
    `score.weight`. A checkpoint without a template is given both as they stand, and EOS.

    Args:
        name: `reward:` and a folder or Hub id.
        dtype: a key of `LOAD_DTYPES`; None for the checkpoint's.
        trust_remote_code: whether Python code that comes with the checkpoint may run.
    """

    def __init__(self, name: str, *, dtype: str | None = None, trust_remote_code: bool = False) -> None:
        self.name = name
        self._path = name.removeprefix(REWARD)
        self._dtype = dtype
        self._trust_remote_code = trust_remote_code
        self._model: RewardModel | None = None

    def find(self) -> None:
        """See `Loaded`."""
        find_score(locate(self._path, f"`judge={self.name}`:")[0], self.name)

    def scores(self, asked: Sequence[Asked], progress: Callable[[int], None]) -> list[Score]:
        """See `Scorer`; ModelError where the model cannot be used, DataError where a row cannot be given to it."""
        if self._model is None:
            self._model = load_reward_model(self._path, self.name, self._dtype, self._trust_remote_code)
        model = self._model
        ids = [conversation_ids(model, each) for each in asked]
        vocabulary = vocabulary_of(model.loaded.model)
        for row in ids:
            check_ids(vocabulary, row, f"a reply for `judge={self.name}`")
        room = context_of(model.loaded)
        found = [Score(None, "prompt_too_long")] * len(asked)
        # Rows of a batch are as long as its longest.
        order = sorted((index for index in range(len(ids)) if len(ids[index]) <= room), key=lambda each: len(ids[each]))
        for start in range(0, len(order), _ROWS):
            batch = order[start : start + _ROWS]
            for index, value in zip(batch, rewards(model, [ids[index] for index in batch]), strict=True):
                found[index] = number(value)
            progress(start + len(batch))
        clear_cache_above(0)
        return found


def rewards(model: RewardModel, rows: Sequence[Sequence[int]]) -> list[float]:
    """The reward of each row of token ids."""
    longest = max(map(len, rows))
    # Behind a row's last token, whose state does not see what follows.
    padded = np.zeros((len(rows), longest), np.int32)
    for number_, row in enumerate(rows):
        padded[number_, : len(row)] = row
    states = model.body.backbone(mx.array(padded))
    last = states[mx.arange(len(rows)), mx.array([len(row) - 1 for row in rows])].astype(mx.float32)
    return [float(value) for value in np.array((last * model.head).sum(axis=-1))]


def conversation_ids(model: RewardModel, asked: Asked) -> list[int]:
    """Prompt and reply as token ids; DataError where the chat template refuses them."""
    texts = model.renderer.texts(asked.pair_with(asked))
    (ids,) = model.codec.encode([texts.whole[0]], special=not texts.templated)
    return list(ids if texts.templated else model.codec.closed(model.codec.open_prompt(ids)))


def load_reward_model(path: str, name: str, dtype: str | None, trust_remote_code: bool) -> RewardModel:
    """The reward model in a folder or of a Hub id.

    Raises:
        ModelError: it is none, or has no tokenizer.
    """
    folder, _ = locate(path, f"`judge={name}`:")
    file = find_score(folder, name)
    info = find(str(folder), trust_remote_code=trust_remote_code)
    # It has no head over tokens: mlx-lm is to look for none.
    info = info._replace(config=tied(info.config))
    loaded = load(info, dtype=dtype, trust_remote_code=trust_remote_code, left_out=HEAD.partition(".")[0])
    body = find_head(loaded.model)
    if loaded.tokenizer is None or body is None:
        missing = "tokenizer" if loaded.tokenizer is None else "backbone that can be told apart"
        raise ModelError(f"`judge={name}`: {folder} has no {missing}, so it cannot score texts.")
    weights: Any = mx.load(str(file))
    codec = TokenCodec(loaded.tokenizer)
    head = weights[HEAD].astype(mx.float32)
    return RewardModel(loaded, body, head, PairRenderer(loaded.tokenizer, codec.eos_texts), codec)


def find_score(folder: Path, name: str) -> Path:
    """The file with the score layer of a checkpoint.

    Raises:
        ModelError: it is no checkpoint for sequence classification with one label.
    """
    expected = "expected a Hugging Face folder of a model for sequence classification with one label"
    if folder.is_file():
        raise ModelError(f"`judge={name}`: is a file, {expected}.")
    classes = read_json_table(folder / "config.json", ModelError).get("architectures")
    for file in safetensors_shards(folder):
        shape = read_header(file).tensors.get(HEAD)
        if shape is not None:
            if tuple(shape.shape)[:1] != (1,):
                raise ModelError(f"`judge={name}`: its {HEAD} has shape {tuple(shape.shape)}, {expected}.")
            return file
    raise ModelError(f"`judge={name}`: holds no {HEAD} ({classes}), {expected}.")
