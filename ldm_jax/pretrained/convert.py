"""Conversion of models between our format and those of other programs."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ldm_jax.config import CONFIG_FILE, to_json
from ldm_jax.config.run import without_tokenizer
from ldm_jax.data.tokenizer import copy_tokenizer
from ldm_jax.pretrained.compvis_export import write_compvis
from ldm_jax.pretrained.diffusers_export import write_folder
from ldm_jax.pretrained.load_run import run_weights
from ldm_jax.pretrained.model_weights import DtypeName, with_latent_scale, write_native
from ldm_jax.pretrained.open_weights import open_weights
from ldm_jax.types import InputError


def import_weights(
    path: Path,
    out: Path,
    *,
    config_file: Path | None = None,
    tokenizer: Path | None = None,
    latent_scale: float | None = None,
) -> None:
    """Convert weights of another program to a folder of our own format, atomically.

    Args:
      path: A diffusers folder, or a CompVis file.
      out: A new folder.
      config_file: Config of a file that does not carry one: a config's name or file.
      tokenizer: Folder of the tokenizer, if the weights have none.
      latent_scale: Factor of the latents, if the weights do not state it.

    Raises:
      InputError: If the weights cannot be read, or `out` exists and is not empty.
      OSError: If a file cannot be written.
    """
    opened = open_weights(path, config_file=config_file, tokenizer=tokenizer)
    weights = with_latent_scale(opened.read(), latent_scale)
    with new_folder(out) as folder:
        write_native(weights, folder)
        files = weights.config.diffusion.condition.tokenizer
        if files is not None:
            copy_tokenizer(Path(files), folder / "tokenizer")
        (folder / CONFIG_FILE).write_text(to_json(without_tokenizer(weights.config)))


def export_run(
    workdir: Path,
    out: Path,
    *,
    layout: Literal["diffusers", "compvis"],
    dtype: DtypeName = "float32",
) -> None:
    """Convert a run to the format of another program, atomically.

    Args:
      workdir: Folder of the run.
      out: A new folder for diffusers, a .safetensors file for CompVis.
      layout: Format of the result.
      dtype: Dtype of the parameters; float32 is lossless.

    Raises:
      InputError: If the folder is no run, or `out` does not fit the format.
      OSError: If a file cannot be written.
    """
    if not (workdir / CONFIG_FILE).is_file():
        raise InputError(
            f"{workdir}: not a run, wanted a folder with {CONFIG_FILE}; try the one "
            "that was given to ldm train, or that ldm import wrote"
        )
    if layout == "compvis":
        if out.suffix != ".safetensors":
            raise InputError(
                f"--out: got {out}, wanted a name that ends in .safetensors"
            )
        write_compvis(run_weights(workdir), out, dtype=dtype)
        return
    weights = run_weights(workdir)
    with new_folder(out) as folder:
        write_folder(weights, folder, dtype=dtype)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `out` if no exception is raised.

    Raises:
      InputError: If `out` exists and is not empty.
      OSError: If it cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out: {out} is there and not empty; try another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    private = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        # An inner folder: that of `mkdtemp` is readable by one user only.
        part = private / "part"
        part.mkdir()
        yield part
        os.replace(part, out)
    finally:
        shutil.rmtree(private, ignore_errors=True)
