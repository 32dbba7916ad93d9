"""What of a group is left when some of it cannot be used, and groups on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orpo_mlx.data.groups import usable_group
from orpo_mlx.data.row_counts import RowReport
from orpo_mlx.data.shapes.formats import read_row
from orpo_mlx.data.tokens.token_store import StoreWriter, TokenStore
from orpo_mlx.data.tokens.truncation import fit
from orpo_mlx.errors import DataError
from orpo_mlx.types import Example, Group, TokenizedGroup, TokenizedPair

ALL = ((0, 1), (0, 2), (1, 2))
RATED = Group("Q", ("a", "b", "c"), (3.0, 2.5, 1.0), False, ALL, "f:1")


def test_what_of_a_group_can_be_used() -> None:
    assert usable_group(RATED, None) == (RATED, None)
    found, reason = usable_group(RATED._replace(completions=("a", " ", "c")), None)
    assert found is not None
    assert (found.completions, found.scores, found.pairs, reason) == (("a", "c"), (3.0, 1.0), ((0, 1),), "empty_side")
    found, reason = usable_group(RATED, 1.0)
    assert found is not None
    assert (found.pairs, reason) == (((0, 2), (1, 2)), "low_margin")
    assert usable_group(RATED, 5.0) == (None, "low_margin")
    assert usable_group(RATED._replace(prompt=" "), None) == (None, "empty_prompt")
    # Without pairs, a list is as long as it is.
    assert usable_group(RATED._replace(pairs=()), None) == (RATED._replace(pairs=()), None)
    with pytest.raises(DataError, match="`min_margin=1` is about pairs"):
        usable_group(RATED._replace(pairs=()), 1.0)


def test_a_group_is_fitted_to_a_length() -> None:
    group = TokenizedGroup((1, 2, 3), ((4,) * 2, (5,) * 9, (6,)), (3.0, 2.0, 1.0), False, ALL, "f:1")
    dropped = fit(group, 6).pair
    assert dropped == group._replace(completions=((4,) * 2, (6,)), scores=(3.0, 1.0), pairs=((0, 1),))
    cut = fit(group, 6, "keep_end")
    assert cut.pair == group._replace(prompt_ids=(3,), completions=((4,) * 2, (5,) * 5, (6,)))
    assert (cut.prompt_cut, cut.completion_cut) == (True, True)
    same = fit(group._replace(completions=((4,), (4,), (6,))), 6)
    assert same.pair is not None
    assert same.pair.pairs == ((0, 2), (1, 2))
    assert fit(group, 3).reason == "too_long"


def test_a_store_gives_back_pairs_and_groups(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, 100, rng.integers(1, most)).tolist())

    examples: list[Example] = []
    for number in range(40):
        count, place = int(rng.integers(1, 17)), f"f:{number + 1}"
        if number < 3 or number % 5 == 0:
            examples.append(TokenizedPair(ids(9), ids(9), ids(9), place))
        elif count == 1:
            examples.append(TokenizedGroup(ids(9), (ids(9),), (1.0,), True, (), place))
        else:
            pairs = tuple((0, other) for other in range(1, count))
            scores = tuple(map(float, range(count, 0, -1)))
            examples.append(TokenizedGroup(ids(9), tuple(ids(9) for _ in scores), scores, False, pairs, place))
    with StoreWriter(tmp_path / "store") as writer:
        for example in examples[:10]:
            writer.extend([example])
        writer.extend(examples[10:])
        store = writer.close(RowReport())
    assert list(store) == examples
    assert store.counts.tolist() == [len(example.completions) for example in examples]
    damaged = bytearray((tmp_path / "store" / "groups.npz").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "store" / "groups.npz").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"not a whole token store|not those that were written"):
        TokenStore(tmp_path / "store")


HELLO = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: What is 2+2?"
Q, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize("parts", [{"completion": "4", "label": True}, {"completions": ["4", "5"], "scores": [2, 1]}])
def test_prompts_of_groups_lose_nothing(parts: dict[str, Any]) -> None:
    def prompt(**columns: Any) -> Any:
        (found,) = read_row({**columns, **parts}, "f:1").pairs
        assert isinstance(found, Group)
        return found.prompt

    said = [("user", "Hi"), ("assistant", "Hello!"), ("user", "What is 2+2?")]
    for text in (HELLO, f"{HELLO}\n\nAssistant:"):
        assert [(turn["role"], turn["content"]) for turn in prompt(prompt=text)] == said
    with pytest.raises(DataError, match="the prompt ends with a turn of the assistant"):
        prompt(prompt=f"{HELLO}\n\nAssistant: The answer is")
    with pytest.raises(DataError, match="the prompt ends with a turn of the assistant"):
        prompt(messages=[Q, A])
    assert prompt(instruction="Translate.", input="cat") == "Translate.\ncat"
    turns = prompt(instruction="And 3+3?", history=[["2+2?", "4"]])
    assert [turn["content"] for turn in turns] == ["2+2?", "4", "And 3+3?"]
