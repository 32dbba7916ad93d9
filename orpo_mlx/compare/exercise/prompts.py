"""Open prompts: frames filled with topics, of which no two splits share either."""

from __future__ import annotations

import itertools

import numpy as np

# Of which the first sentence of an answer is mostly a whole one, of ten to thirty tokens.
_FRAMES = {
    "train": (
        "Describe {}.",
        "Tell me about {}.",
        "What is {} like?",
        "What do you think of {}?",
        "Say something about {}.",
        "Give me your opinion of {}.",
        "How do you feel about {}?",
        "Write a review of {}.",
        "What comes to mind about {}?",
        "How would a child describe {}?",
        "Write a slogan about {}.",
        "Write to a friend about {}.",
    ),
    "valid": (
        "Write a tweet about {}.",
        "Tell a neighbour about {}.",
        "Finish the sentence: {} is",
        "Make a remark on {}.",
    ),
    "test": (
        "What would a visitor say about {}?",
        "Comment on {}.",
        "Send me a message about {}.",
        "Write a diary entry about {}.",
    ),
}
_TOPICS = {
    "train": (
        "rainy mornings", "a long train ride", "the first day at a new job", "an old bookshop",
        "cooking for ten people", "a broken bicycle", "winter evenings", "a crowded bus", "learning to swim",
        "the neighbour's dog", "a visit to the dentist", "moving to a new town",
        "a power cut", "a school concert", "growing tomatoes",
        "a lost wallet", "the night sky", "waiting in a queue", "a family dinner", "repairing a roof",
        "a stray cat", "a game of cards", "a hot summer", "a leaking tap", "a street market",
    ),
    "valid": (
        "a ferry crossing", "a surprise party", "a flat tyre", "early mornings", "a museum of clocks", "a long meeting",
        "homemade bread", "a noisy street", "the end of summer", "a chess club",
    ),
    "test": (
        "a camping trip", "a job interview", "the village fair", "a delayed flight", "a new haircut", "a quiet library",
        "spring cleaning", "a borrowed car", "a power drill", "the first snow", "a hospital waiting room",
        "a garden wedding", "an empty fridge", "a marathon", "a thunderstorm",
    ),
}  # fmt: skip


def open_prompts(split: str, count: int | None = None) -> list[str]:
    """Prompts of "train" (300), "valid" (40) or "test" (60), in a fixed random order; the first `count` of them.

    Raises:
        ValueError: there are not as many.
    """
    every = [frame.format(topic) for frame, topic in itertools.product(_FRAMES[split], _TOPICS[split])]
    if count is not None and count > len(every):
        raise ValueError(f"{split} has {len(every)} prompts, asked for {count}.")
    # Mixed, since the first `count` of the product would share a frame or two.
    order = np.random.default_rng(len(every)).permutation(len(every))
    return [every[place] for place in order[:count]]
