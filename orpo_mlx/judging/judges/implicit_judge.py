"""The reward that adapters stand for: how much likelier they make a reply than the model without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.nn as nn

from orpo_mlx.data.tokens.tokenization import PairTokenizer
from orpo_mlx.engine.pair_scorer import PairScorer
from orpo_mlx.engine.score import score_pairs
from orpo_mlx.errors import ModelError
from orpo_mlx.files import read_json_table, sha256_of
from orpo_mlx.judging.judges.model_judge import context_of
from orpo_mlx.judging.judges.scorer import IMPLICIT, Asked, Score, Scorer, number
from orpo_mlx.models.adapters import adapters_off, add_trained_adapters, has_switchable_adapters, weights_file
from orpo_mlx.models.loading import LoadedModel, find, load
from orpo_mlx.models.recorded import base_model
from orpo_mlx.models.vocabulary import check_ids, vocabulary_of
from orpo_mlx.process_memory import clear_cache_above
from orpo_mlx.run_folder import ADAPTER_CONFIG_FILE
from orpo_mlx.types import TokenizedPair


class ImplicitJudge(Scorer):
    """Scores a reply y to a prompt x by log π(y|x) - log π_ref(y|x), nats: DPO's implicit reward without its factor β.

    π is the model with the adapters, π_ref the same without (Rafailov et al. 2023, arXiv:2305.18290). Sums over the
    reply's tokens, as an answer that has ended.

    Args:
        name: `implicit:` and a folder of LoRA or DoRA adapters, which names its model.
        dtype: a key of `LOAD_DTYPES`; None for the checkpoint's.
        trust_remote_code: whether Python code that comes with the model may run.
        template_strings: whether strings are put into the chat template.

    Raises:
        ModelError: there are no adapters there, or they name no model.
    """

    def __init__(
        self,
        name: str,
        *,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        template_strings: bool = True,
    ) -> None:
        self.name = name
        self._folder = Path(name.removeprefix(IMPLICIT)).expanduser()
        self._base = base_model(self._folder, f"`judge={name}`")
        self._dtype = dtype
        self._template_strings = template_strings
        self._trust_remote_code = trust_remote_code
        self._loaded: LoadedModel | None = None

    @property
    def identity(self) -> str:
        """See `Scorer`: by the adapters' content, since another training may write to the same folder."""
        weights = weights_file(self._folder)
        return self.name if weights is None else f"{self.name} {sha256_of(weights)}"

    def find(self) -> None:
        """See `Loaded`; ModelError also where what was trained leaves no model to compare with."""
        if read_json_table(self._folder / ADAPTER_CONFIG_FILE, ModelError).get("fine_tune_type") == "full":
            raise self._not_switchable()
        find(self._base, trust_remote_code=self._trust_remote_code, source="`judge`")

    def scores(self, asked: Sequence[Asked], progress: Callable[[int], None]) -> list[Score]:
        """See `Scorer`; ModelError where the model cannot be used, DataError where a row cannot be given to it."""
        loaded = self._load()
        tokenizer = PairTokenizer(loaded.tokenizer, template_strings=self._template_strings)
        # Two replies a pair, of one prompt each: `score_pairs` takes nothing else.
        pairs = [tokenizer(each.pair_with(each)) for each in asked]
        vocabulary = vocabulary_of(loaded.model)
        for pair in pairs:
            check_ids(vocabulary, [*pair.prompt_ids, *pair.chosen_ids], f"a reply for `judge={self.name}`")
        room = context_of(loaded)
        fitting = [index for index, pair in enumerate(pairs) if len(pair.prompt_ids) + len(pair.chosen_ids) <= room]
        found = [Score(None, "prompt_too_long")] * len(asked)
        for index, value in zip(fitting, log_ratios(loaded.model, [pairs[each] for each in fitting]), strict=True):
            found[index] = number(value)
        progress(len(asked))
        clear_cache_above(0)
        return found

    def _load(self) -> LoadedModel:
        # Only now: until the replies are there, the memory is theirs.
        if self._loaded is None:
            loaded = load(self._base, dtype=self._dtype, trust_remote_code=self._trust_remote_code)
            add_trained_adapters(loaded.model, self._folder, f"`judge={self.name}`:")
            if not has_switchable_adapters(loaded.model):
                raise self._not_switchable()
            self._loaded = loaded
        return self._loaded

    def _not_switchable(self) -> ModelError:
        return ModelError(
            f"`judge={self.name}`: holds whole weights, which leave no model to compare with; expected LoRA or DoRA."
        )


def log_ratios(model: nn.Module, pairs: Sequence[TokenizedPair]) -> list[float]:
    """log π - log π_ref of each pair's chosen side, nats."""
    tuned = score_pairs(PairScorer(model), pairs)
    with adapters_off(model):
        base = score_pairs(PairScorer(model), pairs)
    return [row["chosen_logps"] - plain["chosen_logps"] for row, plain in zip(tuned, base, strict=True)]
