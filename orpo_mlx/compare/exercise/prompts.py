"""Open prompts: frames filled with topics, of which no two splits share either."""

from __future__ import annotations

import itertools

import numpy as np

# One sentence: two fifths of the replies end by themselves within 40 tokens, so that their lengths say something.
_FRAMES = {
    "train": (
        "In one short sentence, tell me what you think of {}.",
        "Describe {} in one sentence.",
        "Write one sentence about {} for a friend.",
        "What comes to mind about {}? Answer in one short sentence.",
        "Give me your opinion of {} in a few words.",
        "Write the first sentence of a story about {}.",
        "Say something short about {}.",
        "How would a child describe {}? One sentence.",
        "In a few words, what is {} like?",
    ),
    "valid": (
        "Finish in one sentence: when I think of {}, I",
        "Write a one-line review of {}.",
        "Tell a neighbour about {} in one sentence.",
    ),
    "test": (
        "Write a short diary entry of one sentence about {}.",
        "What would a visitor say about {}? One sentence.",
        "Comment on {} in a single sentence.",
        "Send a one-sentence message about {}.",
    ),
}
_TOPICS = {
    "train": (
        "rainy mornings", "a long train ride", "the first day at a new job", "an old bookshop",
        "cooking for ten people", "a broken bicycle", "winter evenings", "a crowded bus", "learning to swim",
        "the neighbour's dog", "a visit to the dentist", "moving to a new town",
        "a power cut", "a school concert", "growing tomatoes",
        "a lost wallet", "the night sky", "waiting in a queue", "a family dinner", "repairing a roof",
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
    """Prompts of "train" (180), "valid" (30) or "test" (60), in a fixed random order; the first `count` of them.

    Raises:
        ValueError: there are not as many.
    """
    every = [frame.format(topic) for frame, topic in itertools.product(_FRAMES[split], _TOPICS[split])]
    if count is not None and count > len(every):
        raise ValueError(f"{split} has {len(every)} prompts, asked for {count}.")
    # Mixed, since the first `count` of the product would share a frame or two.
    order = np.random.default_rng(len(every)).permutation(len(every))
    return [every[place] for place in order[:count]]
