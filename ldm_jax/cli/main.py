"""`ldm`: one program with sub-commands, each in a module of its own.

A module is imported when its command is chosen, and JAX when its arguments are good.
"""

import importlib
import sys
from typing import NamedTuple, NoReturn

from ldm_jax.cli.exit_codes import run_main
from ldm_jax.cli.huge_pages import use_huge_pages
from ldm_jax.cli.streams import check_stdout
from ldm_jax.config.flags import asks_help
from ldm_jax.types import InputError, choices


class Command(NamedTuple):
    """A sub-command."""

    module: str
    """Module of this package whose `main` takes the arguments."""
    summary: str
    """One line for the help."""
    computes: bool = False
    """Whether it runs networks for long, which is faster with huge pages."""


COMMANDS = {
    "train": Command("train", "train both stages, or what is left of them", True),
    "sample": Command("sample", "make images with a trained run or weights", True),
    "evaluate": Command("evaluate", "measure FID and other scores of a run", True),
    "steps": Command("steps", "compare samplers and numbers of steps", True),
    "report": Command("report", "write a run's page: curves, samples, scores"),
    "plan": Command("plan", "does a step fit on chips that are not here, how fast"),
    "serve": Command("serve", "try a run's samples on a web page", True),
    "import": Command("import_weights", "turn diffusers or CompVis weights into ours"),
    "export": Command("export", "write a run as diffusers or CompVis weights"),
    "inspect": Command("inspect", "list what weights hold, as JSON"),
    "check-images": Command("check_images", "survey a folder of images"),
    "cache-latents": Command("cache_latents", "encode a training split once", True),
}


def main(*first: str) -> NoReturn:
    """Run `ldm` on this process' arguments.

    Args:
      first: Words before the arguments, such as the sub-command.
    """
    args = [*first, *sys.argv[1:]]
    name = args[0] if args else ""
    if name in COMMANDS and COMMANDS[name].computes and not asks_help(args):
        use_huge_pages()
    run_main(run, f"ldm {name}" if name in COMMANDS else "ldm", args)


def run(args: list[str]) -> int | None:
    """Run the sub-command that comes first, with the remaining arguments.

    Returns:
      Its exit code; None is 0.

    Raises:
      InputError: If there is none of that name, or its arguments are wrong.
      SystemExit: After printing the help.
    """
    if not args:
        raise InputError("command: not given; see ldm --help")
    name, *rest = args
    if asks_help(args):
        check_stdout()
    if name in ("-h", "--help"):
        print(_help())
        return None
    if name not in COMMANDS:
        raise InputError(f"command: {choices(name, COMMANDS)}")
    command = importlib.import_module(f"ldm_jax.cli.{COMMANDS[name].module}")
    return command.main(rest)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {one.summary}" for name, one in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ldm COMMAND [FLAGS]\n\nLatent diffusion models in JAX.\n",
            *lines,
            "\nldm COMMAND --help lists the flags of a command.",
        ]
    )
