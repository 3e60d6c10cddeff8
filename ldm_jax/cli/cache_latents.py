"""`ldm cache-latents`."""

from pathlib import Path
from typing import Annotated

import tyro

from ldm_jax.config import IMAGES_AT_ONCE, Config, flatten, read_config
from ldm_jax.config.flags import Inline, parse_flags_with_config
from ldm_jax.config.launch import Launch
from ldm_jax.config.validation import checked_dataclass, require_at_least
from ldm_jax.data.tfds_builders import check_builder
from ldm_jax.parallel.launch import start
from ldm_jax.types import InputError


@checked_dataclass
class Flags:
    r"""Encode a training split once, so that stage 2 need not encode it every epoch.

        ldm cache-latents --workdir runs/digits --out runs/latents
        ldm train --config digits --workdir runs/second \
            --first-stage runs/digits --data.latents runs/latents

    Takes the data and the finished first stage of a run, or of a config that names a
    first stage; every field of that config is a flag, as in `ldm train`. Stores the
    moments of each latent, not a sample of it, and the text embedding of each caption
    if the text encoder is frozen. Several hosts share the work. The same command
    resumes after an interruption, and later replaces damaged shards.
    """

    workdir: Path | None = None
    """Folder of a run."""
    config_name: Annotated[str | None, tyro.conf.arg(name="config")] = None
    """Instead of a run: a shipped config, or a file with get_config()."""
    builder: str | None = None
    """The file and config of the run's data set, FILE.py or FILE.py/CONFIG, where its
    config names one: reading the data runs it."""
    out: Path | None = None
    """Folder of the cache."""
    shards: int | None = None
    """Files of records; chosen by the size of the data by default."""
    batch: int = IMAGES_AT_ONCE
    """Images that a device encodes at once."""
    states: bool = True
    """Store the text embeddings of a frozen text encoder."""
    launch: Annotated[Launch, Inline] = Launch()
    """Processes and compilation cache of the program."""
    config: Annotated[Config, Inline] = Config()
    """With --config: the data, and the first stage."""

    def _check(self) -> None:
        require_at_least(self, 1, "shards", "batch")


def parse(args: list[str]) -> tuple[Flags, Path, Config]:
    """Read the command line.

    Returns:
      The flags, the folder of the cache, and the config of the data and first stage.

    Raises:
      InputError: If it is wrong.
      SystemExit: After printing the help.
    """
    flags = parse_flags_with_config(Flags, args, prog="ldm cache-latents")
    if (flags.workdir is None) == (flags.config_name is None):
        raise InputError(
            "--workdir: wanted it, the folder of a run, or --config FILE.py with "
            "--first-stage RUN; try --workdir runs/digits"
        )
    if flags.out is None:
        raise InputError("--out: not given, wanted a folder; try --out runs/latents")
    if flags.workdir is not None:
        usual, given = flatten(Config()), flatten(flags.config)
        for name in usual:
            if given[name] != usual[name]:
                raise InputError(
                    f"--{name.replace('_', '-')}: got it beside --workdir, whose "
                    "config is the run's; try --config FILE.py --first-stage "
                    f"{flags.workdir}"
                )
        config = read_config(flags.workdir)
        check_builder(config.data.source, flags.builder)
        return flags, flags.out, config
    if flags.config.first_stage is None:
        raise InputError(
            "--first-stage: not given, wanted the run or weights whose latents are "
            "kept; try --first-stage RUN"
        )
    return flags, flags.out, flags.config


def main(args: list[str]) -> None:
    """Encode, and print what was written."""
    flags, out, config = parse(args)
    start(
        flags.launch,
        beside=flags.workdir or out,
        peer_timeout=config.parallel.peer_timeout,
        cpu_devices=config.parallel.cpu_devices,
    )
    from ldm_jax.parallel.multihost import is_first
    from ldm_jax.pretrained.frozen import open_encoders
    from ldm_jax.training.encode_latents import make_cache

    outcome = make_cache(
        config,
        flags.workdir,
        out,
        open_encoders=open_encoders,
        num_shards=flags.shards,
        batch_size=flags.batch,
        states=flags.states,
    )
    if not is_first():
        return
    note = outcome.note
    if not outcome.num_made:
        print(f"finished: {out} has nothing left to write")
        return
    size = sum(shard.size for shard in note.shards)
    print(
        f"finished: {out} ({note.num_examples} examples, {outcome.num_made} of "
        f"{note.num_shards} shards made now, {size / 2**20:.1f} MiB)"
    )
