"""Move models in and out: `ldm import|export|inspect`."""

import argparse
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ldm_jax.config.flags import OneLineParser, run_main
from ldm_jax.types import InputError

PROG = "ldm"


def parse(args: list[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
      InputError: If it is wrong.
      SystemExit: After printing the help.
    """
    parser = OneLineParser(prog=PROG, description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(
        dest="command", required=True, parser_class=OneLineParser
    )
    inspect = commands.add_parser("inspect", help="say what weights hold, as JSON")
    inspect.add_argument("path", type=Path, help="a folder or a file")
    load = commands.add_parser(
        "import", help="turn foreign weights into a folder for sample.py --workdir"
    )
    load.add_argument("path", type=Path, help="diffusers folder, or CompVis file")
    load.add_argument("--out", type=Path, required=True, help="a new folder")
    load.add_argument("--config", type=Path, help="recipe of a file that has none")
    load.add_argument("--tokenizer", type=Path, help="folder of the tokenizer's files")
    load.add_argument("--latent-scale", type=float, help="if the weights do not say it")
    save = commands.add_parser("export", help="write a run for other programs")
    save.add_argument("path", type=Path, help="folder of a run")
    save.add_argument("--out", type=Path, required=True, help="folder, or .safetensors")
    save.add_argument("--format", choices=("diffusers", "compvis"), default="diffusers")
    save.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32"
    )
    return parser.parse_args(args)


def main(args: list[str]) -> None:
    """Parse and do it."""
    given = parse(args)
    # Only now: help and misspelt flags need not wait for JAX.
    if given.command == "inspect":
        from ldm_jax.pretrained.inspect_weights import inspect

        print(json.dumps(inspect(given.path), indent=2))  # noqa: T201
    elif given.command == "import":
        import_weights(given)
    else:
        export_run(given)
    if given.command != "inspect":
        print(given.out)  # noqa: T201


def import_weights(given: argparse.Namespace) -> None:
    """Write foreign weights as a folder of ours, whole or not at all."""
    from ldm_jax import config as config_lib
    from ldm_jax.config.run import without_tokenizer
    from ldm_jax.data.tokenizer import copy_tokenizer
    from ldm_jax.pretrained.model_weights import with_latent_scale, write_native
    from ldm_jax.pretrained.open_weights import open_weights

    opened = open_weights(
        given.path, config_file=given.config, tokenizer=given.tokenizer
    )
    weights = with_latent_scale(opened.read(), given.latent_scale)
    with new_folder(given.out) as folder:
        write_native(weights, folder)
        tokenizer = weights.config.diffusion.condition.tokenizer
        if tokenizer is not None:
            copy_tokenizer(Path(tokenizer), folder / "tokenizer")
        text = config_lib.to_json(without_tokenizer(weights.config))
        (folder / config_lib.CONFIG_FILE).write_text(text)


def export_run(given: argparse.Namespace) -> None:
    """Write a run in another program's format, whole or not at all."""
    from ldm_jax.config import CONFIG_FILE
    from ldm_jax.pretrained.compvis_export import write_compvis
    from ldm_jax.pretrained.diffusers_export import write_folder
    from ldm_jax.pretrained.load_run import run_weights

    if not (given.path / CONFIG_FILE).is_file():
        raise InputError(
            f"{given.path}: not a run, wanted a folder with {CONFIG_FILE}; try the one "
            "that was given to train.py, or that import wrote"
        )
    if given.format == "compvis":
        if given.out.suffix != ".safetensors":
            raise InputError(
                f"--out: got {given.out}, wanted a name that ends in .safetensors"
            )
        write_compvis(run_weights(given.path), given.out, dtype=given.dtype)
        return
    weights = run_weights(given.path)
    with new_folder(given.out) as folder:
        write_folder(weights, folder, dtype=given.dtype)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder to fill, which becomes `out` when all went well.

    Raises:
      InputError: If `out` is there and not empty.
      OSError: If it cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out: {out} is there and not empty; try another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    private = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        # A folder within: `mkdtemp` gives its own to one user alone.
        part = private / "part"
        part.mkdir()
        yield part
        os.replace(part, out)
    finally:
        shutil.rmtree(private, ignore_errors=True)


if __name__ == "__main__":
    run_main(main, PROG)
