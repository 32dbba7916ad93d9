"""Tier 1: a tiny model made on the spot, replies of one length drawn from it, and a reward that is known exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.llama import Model, ModelArgs

from orpo_mlx.compare.exercise.significance import Floats
from orpo_mlx.compare.exercise.task import PerPrompt, Size
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.engine.pair_scorer import PairScorer
from orpo_mlx.engine.score import score_pairs
from orpo_mlx.models.adapters import adapters_off, in_evaluation
from orpo_mlx.models.loading import LoadedModel
from orpo_mlx.types import TokenizedPair

Ids = npt.NDArray[np.int64]

VOCABULARY = 128
PROMPT_TOKENS = 4
REPLY_TOKENS = 8
# Uniform weights of mlx's `nn.Linear` give logits a standard deviation of 1/√3: times this, 1.7, so that the model has
# likes and dislikes (3.4 nats a token, of ln 128 = 4.9) and still says nearly everything.
_SHARPNESS = 3.0
# Bradley-Terry: P(first is chosen) = σ(difference of gold / this); gold has a standard deviation of 1.
_LABEL_TEMPERATURE = 0.5
_MODEL_SEED = 0
# Splits must not share prompts' random numbers.
_SEEDS = {"train": 1, "held_out": 2, "valid": 3, "test": 4, "scale": 5}
_SCALE_ROWS = 4096
_FRONTIER = (8.0, 4.0, 2.0, 1.4, 1.0, 0.8, 0.7, 0.6, 0.5)
# To a prompt: at the bound their weights are worth some twenty of them.
_FRONTIER_REPLIES = 128


class Measured(NamedTuple):
    """Replies of a model, measured; a value for each prompt, the mean over its samples."""

    gold: Floats
    """The expected reward, in standard deviations of the base model's replies, whose mean is 0."""
    kl: Floats
    """KL(model ‖ base), nats per reply."""
    entropy: Floats
    """Of the next token, nats."""


class Sampled(NamedTuple):
    """Replies and the distributions that their tokens were drawn from."""

    replies: Ids
    """(N, T)."""
    logps: mx.array
    """(N, T, V)."""


def tiny_model() -> LoadedModel:
    """A Llama of two layers with made-up weights; the same on every machine of a kind."""
    args = ModelArgs(
        model_type="llama",
        hidden_size=48,
        num_hidden_layers=2,
        intermediate_size=96,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    mx.random.seed(_MODEL_SEED)
    model = Model(args)
    model.lm_head.weight = model.lm_head.weight * _SHARPNESS
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    return LoadedModel(model, None, {"model_type": "llama"}, Path(), None, None)


class GoldTask:
    """Pairs of replies that the model itself drew, all of one length, labelled by a reward linear in token embeddings.

    gold(y) = (Σ_t u·E[y_t] - μ)/σ with a random direction u, E the input embeddings, and μ, σ of the base model's
    replies: a model can learn it from tokens' embeddings, and no count of anything gives it away. Labels are drawn by
    Bradley-Terry, then a share of them is flipped.

    Variants are named by the share of labels that is flipped: "0 % flipped".
    """

    name = "exact"
    bound = 1.0
    kl_targets: tuple[float, ...] = (0.5, 0.9)

    def __init__(self, size: Size) -> None:
        self.size = size
        self.loaded = tiny_model()
        embeddings = np.array(self.loaded.model.model.embed_tokens.weight, np.float64)
        raw = embeddings @ np.random.default_rng(_MODEL_SEED).normal(size=embeddings.shape[1])
        prompts = self.prompts("scale", _SCALE_ROWS)
        totals = raw[self.sample(prompts, _SEEDS["scale"]).replies].sum(axis=1)
        self.token_gold = (raw - totals.mean() / REPLY_TOKENS) / totals.std()
        """(V,): a reply's gold is the sum of its tokens'."""
        # Drawn now, while the model has no adapters: even ones that do nothing yet change sums in their last bits.
        self._drawn = {split: self._draw(split, count) for split, count in self._counts().items()}
        self._held_out = self._balanced(self._pairs("held_out", exact=True))

    def shared(self) -> TrainingConfig:
        """The settings that hold for all methods."""
        lora = {"rank": 8, "scale": 8.0, "dropout": 0.0}
        return TrainingConfig(
            batch_size=self.size.batch_size, lora_parameters=lora, num_layers=-1, memory="fast", share_prompt=False
        )

    def train_pairs(self, variant: str) -> list[TokenizedPair]:
        """Pairs of the train split, a share of their labels flipped."""
        return self._pairs("train", flipped=float(variant.split(" %")[0]) / 100)

    def reference_table(self, variant: str) -> None:
        """None: a reference's pass over this model takes no time."""

    def held_out_pairs(self) -> list[TokenizedPair]:
        """Pairs labelled by gold, in exactly half of which the base model gives the better side the higher log-prob.

        What a reference-free loss does to its own margins before it learns anything from labels (it evens them out)
        is then as often right as wrong.
        """
        return self._held_out

    def look(self, split: str) -> PerPrompt:
        """Gold, KL and entropy of the model as it is; one reply to each valid prompt, `size.samples` to a test one."""
        size = self.size
        prompts, samples = {"valid": (size.valid_prompts, 1), "test": (size.test_prompts, size.samples)}[split]
        return {key: values.tolist() for key, values in self.measure(split, prompts, samples)._asdict().items()}

    def besides(self) -> PerPrompt:
        """Nothing."""
        return {}

    def replies(self) -> list[dict[str, str]]:
        """None: its replies are made-up tokens."""
        return []

    def facts(self) -> dict[str, Any]:
        """What a reader has to know of the data: how good its labels are, how far a model could come, and lengths."""
        pairs = self.train_pairs("0 %")
        gold = [[float(self.token_gold[list(side)].sum()) for side in pair[1:3]] for pair in pairs]
        agree = sum(chosen > rejected for chosen, rejected in gold) / len(gold)
        return {
            "model": f"Llama, 2 layers of 48, {VOCABULARY} tokens, made-up weights",
            "reply_tokens": [REPLY_TOKENS, REPLY_TOKENS],
            "labels_that_agree_with_gold": agree,
            "frontier": self.frontier("test", self.size.test_prompts, _FRONTIER_REPLIES, _FRONTIER),
        }

    def prompts(self, split: str, count: int) -> Ids:
        """`count` prompts of a split, (count, PROMPT_TOKENS)."""
        return np.random.default_rng(_SEEDS[split]).integers(0, VOCABULARY, (count, PROMPT_TOKENS))

    def sample(self, prompts: Ids, seed: int) -> Sampled:
        """A reply to each prompt, drawn at temperature 1 from the model as it is."""
        mx.random.seed(seed)
        cache = make_prompt_cache(self.loaded.model)
        logps: list[mx.array] = []
        drawn = [mx.array(prompts)]
        for _ in range(REPLY_TOKENS):
            logps.append(nn.log_softmax(self.loaded.model(drawn[-1], cache=cache)[:, -1].astype(mx.float32), axis=-1))
            drawn.append(mx.random.categorical(logps[-1])[:, None].astype(drawn[0].dtype))
            mx.eval(drawn[-1])
        return Sampled(np.array(mx.concatenate(drawn[1:], axis=1)), mx.stack(logps, axis=1))

    def _counts(self) -> dict[str, int]:
        return {"train": self.size.pairs, "held_out": self.size.held_out}

    def _draw(self, split: str, count: int) -> tuple[Ids, list[Ids]]:
        """Prompts of a split, and two replies to each."""
        prompts = self.prompts(split, count)
        # In steps of 1000: no other draw of replies has these random numbers.
        return prompts, [self.sample(prompts, 1000 * _SEEDS[split] + side).replies for side in (0, 1)]

    def _pairs(self, split: str, *, flipped: float = 0.0, exact: bool = False) -> list[TokenizedPair]:
        """Pairs of a split; `exact` labels them by gold itself, without Bradley-Terry's chance.

        What is flipped at a smaller share is flipped at a larger one too.
        """
        prompts, sides = self._drawn[split]
        gold = [self.token_gold[side].sum(axis=1) for side in sides]
        rng = np.random.default_rng(10 + _SEEDS[split])
        chance, flips = rng.random(len(prompts)), rng.random(len(prompts))
        preferred = 1 / (1 + np.exp((gold[1] - gold[0]) / _LABEL_TEMPERATURE))
        first = gold[0] > gold[1] if exact else chance < preferred
        first = np.where(flips < flipped, ~first, first)
        return [
            TokenizedPair(_ids(prompt), _ids(a if wins else b), _ids(b if wins else a), f"{split}:{row}")
            for row, (prompt, a, b, wins) in enumerate(zip(prompts, *sides, first, strict=True))
        ]

    def _balanced(self, pairs: list[TokenizedPair]) -> list[TokenizedPair]:
        """As many pairs of which the base model gives the chosen side the higher log-prob as of the others."""
        rows = score_pairs(PairScorer(self.loaded.model), pairs, batch_size=64)
        sides: dict[bool, list[TokenizedPair]] = {True: [], False: []}
        for pair, row in zip(pairs, rows, strict=True):
            sides[row["prefers_chosen"]].append(pair)
        fewest = min(map(len, sides.values()))
        return [*sides[True][:fewest], *sides[False][:fewest]]

    def measure(self, split: str, prompts: int, samples: int) -> Measured:
        """Gold, KL and entropy of the model with its adapters as they are, `samples` replies to each prompt.

        At each position the sums go over the whole vocabulary (expectations given what was drawn before), which is
        unbiased and of smaller variance than the drawn tokens alone. Every method is asked with the same draws.
        """
        asked = np.repeat(self.prompts(split, prompts), samples, axis=0)
        model = self.loaded.model
        with in_evaluation(model):
            drawn = self.sample(asked, 100 + _SEEDS[split])
            with adapters_off(model):
                full = mx.array(np.concatenate([asked, drawn.replies], axis=1))
                places = slice(PROMPT_TOKENS - 1, PROMPT_TOKENS + REPLY_TOKENS - 1)
                base = nn.log_softmax(model(full)[:, places].astype(mx.float32), axis=-1)
        chances = mx.exp(drawn.logps)
        parts = (
            chances @ mx.array(self.token_gold.astype(np.float32)),
            (chances * (drawn.logps - base)).sum(axis=-1),
            -(chances * drawn.logps).sum(axis=-1) / REPLY_TOKENS,
        )
        return Measured(*(_by_prompt(part, prompts) for part in parts))

    def frontier(
        self, split: str, prompts: int, replies: int, temperatures: tuple[float, ...]
    ) -> list[dict[str, float]]:
        """Gold and KL of the best there is: the base model's replies to each prompt weighed by exp(gold/temperature).

        π*(y|x) ∝ π₀(y|x) exp(gold(y)/τ) has the highest expected gold of all models at its KL. Estimated by weighing
        `replies` of the base model to each prompt; KL(π* ‖ π₀) = E*[gold]/τ - log E₀[exp(gold/τ)], means over prompts.
        """
        asked = np.repeat(self.prompts(split, prompts), replies, axis=0)
        gold = self.token_gold[self.sample(asked, 7).replies].sum(axis=1).reshape(prompts, replies)
        found = []
        for temperature in temperatures:
            weights = np.exp(gold / temperature)
            means = (weights * gold).sum(axis=1) / weights.sum(axis=1)
            kls = means / temperature - np.log(weights.mean(axis=1))
            found.append({"gold": float(means.mean()), "kl": float(kls.mean())})
        return found


def _by_prompt(values: mx.array, prompts: int) -> Floats:
    """Sums over positions, means over the samples of each prompt."""
    totals: Any = np.array(values, np.float64).sum(axis=1)
    return np.asarray(totals.reshape(prompts, -1).mean(axis=1))


def _ids(row: Ids) -> tuple[int, ...]:
    return tuple(row.tolist())
