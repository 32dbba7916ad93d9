"""Talk with a tuned model, and with the model it was made from beside it."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence

from orpo_mlx.cli.common.arguments import add_model_options, check_count
from orpo_mlx.config.flags import OneLineParser, exit_status, naming_flags
from orpo_mlx.errors import ConfigError

PROG = "orpo-mlx chat"


def build_parser() -> OneLineParser:
    """The command line of `chat`."""
    parser = OneLineParser(
        prog=PROG, description="Talk with a model, tuned or not. /reset forgets, /quit or Ctrl-D leaves."
    )
    parser.add_argument(
        "--adapter-path", metavar="FOLDER", help="folder that train wrote (default: adapters; with --model alone: none)"
    )
    parser.add_argument("--compare", action="store_true", help="answer with the base model, too, beside it")
    parser.add_argument("--model", help="Hub id, local folder or .gguf file; default: what the adapters were made for")
    parser.add_argument("--prompt", help="answer this and leave")
    parser.add_argument("--max-tokens", type=int, default=256, help="of one answer (default: %(default)s)")
    parser.add_argument("--temp", type=float, default=0.0, help="temperature; 0 is greedy (default: %(default)s)")
    add_model_options(parser)
    return parser


def _typed() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lets input() edit its line)
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")


def run(argv: Sequence[str] | None) -> None:
    """Do what a command line asks; raises UserError."""
    args = build_parser().parse_args(argv)
    check_count("--max-tokens", args.max_tokens)
    if not (math.isfinite(args.temp) and args.temp >= 0):
        raise ConfigError(f"--temp: found {args.temp}, expected a number of 0 or more.")
    if args.prompt is not None and not args.prompt.strip():
        raise ConfigError("--prompt: is empty; give what is to be answered, or leave it out to be asked.")
    from orpo_mlx.cli.common.run_folder import chosen_adapters

    with naming_flags(vars(args)):
        adapters = chosen_adapters(args.adapter_path, args.model)
    # Only now: a mistyped flag need not wait for mlx-lm and transformers.
    from rich.console import Console

    from orpo_mlx.cli.common.conversation import open_chat, talk

    with naming_flags(vars(args)):
        chat = open_chat(
            adapters,
            Console(highlight=False),
            model=args.model,
            compare=args.compare,
            max_tokens=args.max_tokens,
            temperature=args.temp,
            dtype=args.dtype,
            trust_remote_code=args.trust_remote_code,
        )
    try:
        if args.prompt is not None:
            chat.ask(args.prompt)
        else:
            talk(chat, _typed() if sys.stdin.isatty() else sys.stdin)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the chat is over") from None
    except UnicodeError as error:
        raise ConfigError(f"standard input: is not text in {sys.stdin.encoding} ({error}); give UTF-8.") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    return exit_status(PROG, lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
