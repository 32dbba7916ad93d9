"""Judges by name."""

from __future__ import annotations

from typing import NamedTuple

from orpo_mlx.errors import ConfigError
from orpo_mlx.judging.judges.endpoint_judge import ENDPOINT, LOOPBACK, EndpointJudge
from orpo_mlx.judging.judges.model_judge import CHOICE, TOKENS, ChoiceJudge, ModelJudge
from orpo_mlx.judging.judges.rules import PREFIX, Rule, make_rule
from orpo_mlx.judging.judges.scorer import IMPLICIT, REWARD
from orpo_mlx.judging.judges.verdicts import Judge


class JudgeOptions(NamedTuple):
    """What a judge that is a model is asked with."""

    max_tokens: int = TOKENS
    """Of a verdict."""
    timeout_s: float = 60.0
    """Of an endpoint's answer."""
    model: str = "default"
    """The name of the model at an endpoint."""
    dtype: str | None = None
    trust_remote_code: bool = False
    template_strings: bool = True
    """Of implicit rewards, which are those of the very rows that the adapters were trained on."""


def make_judge(name: str, options: JudgeOptions | None = None) -> Judge:
    """The judge of that name: `rule:...`, `reward:` a reward model, `implicit:` adapters, `endpoint` (mlx_lm.server's
    address on this machine), the address of another, a model, or `choice:` and a model.

    Raises:
        ConfigError: the name is empty, or no rule's or address's.
        ModelError: what it names are no adapters.
    """
    options = options or JudgeOptions()
    check_heeded(name, options)
    if name in (REWARD, IMPLICIT, CHOICE):
        raise ConfigError(f"`judge={name}`: names nothing; expected {name}{'MODEL' if name == CHOICE else 'FOLDER'}.")
    if name.startswith(PREFIX):
        return make_rule(name)
    if name.startswith(REWARD):
        # Here and not above: a command knows a wrong name before it waits for mlx-lm.
        from orpo_mlx.judging.judges.reward_judge import RewardJudge

        return RewardJudge(name, dtype=options.dtype, trust_remote_code=options.trust_remote_code)
    if name.startswith(IMPLICIT):
        from orpo_mlx.judging.judges.implicit_judge import ImplicitJudge

        return ImplicitJudge(
            name,
            dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
            template_strings=options.template_strings,
        )
    if _is_address(name):
        url = LOOPBACK if name == ENDPOINT else name
        return EndpointJudge(url, model=options.model, timeout_s=options.timeout_s, max_tokens=options.max_tokens)
    if not name.strip():
        raise ConfigError(
            "`judge`: is empty; expected rule:..., reward:..., implicit:..., choice:..., endpoint, an address, or a "
            "model."
        )
    kind = ChoiceJudge if name.startswith(CHOICE) else ModelJudge
    return kind(
        name,
        max_tokens=options.max_tokens,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
    )


def check_heeded(name: str, options: JudgeOptions) -> None:
    """Refuse options that the judge of that name does not heed; raises ConfigError."""
    asked = not name.startswith((PREFIX, REWARD, IMPLICIT, CHOICE))
    server = _is_address(name)
    # A choice is read off one token's probabilities: nothing is written.
    for field, setting, heeded, whose in (
        ("max_tokens", "judge_tokens", asked, "a model that writes its verdict, or a server"),
        ("timeout_s", "judge_timeout", server, "a server"),
        ("model", "judge_model", server, "a server"),
    ):
        value = getattr(options, field)
        if not heeded and value != JudgeOptions._field_defaults[field]:
            raise ConfigError(f"`{setting}={value}`: is for {whose}, and `judge={name}` is none; leave it out.")


def _is_address(name: str) -> bool:
    return name == ENDPOINT or ("://" in name and not name.startswith((PREFIX, REWARD, IMPLICIT, CHOICE)))


def rule_of(name: str) -> Rule:
    """The rule of that name.

    Raises:
        ConfigError: it is not one.
    """
    if not name.startswith(PREFIX):
        raise ConfigError(f"{name!r} is no rule; expected rule:KIND, such as rule:plain.")
    return make_rule(name)
