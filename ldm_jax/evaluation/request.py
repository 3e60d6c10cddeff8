"""The request of `ldm evaluate`, and its checks. Imports no JAX."""

from pathlib import Path
from typing import NamedTuple

from ldm_jax.config import Config
from ldm_jax.evaluation.protocols import Protocol
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError, PrecisionName


class EvaluationRequest(NamedTuple):
    """An evaluation of a run."""

    protocol: Protocol
    """Protocol of the scores."""
    settings: tuple[SamplingConfig, ...]
    """Settings of the samples; each is measured separately."""
    num_images: int
    """Number of samples of each setting: seeds 0 to `num_images - 1`."""
    inception: Path | None
    """File of Inception's weights, or None for the classifier."""
    reference: Path | None
    """File of statistics to compare with; None for the run's own data."""
    out: Path
    """Folder for the results."""
    workdir: Path
    """Folder of the run."""
    reconstructions: bool
    """Whether to measure the first stage instead of samples."""
    lpips: tuple[str, ...]
    """Files of LPIPS' weights."""
    precision: PrecisionName | None
    """Products of reconstructions, as in `SamplingConfig`."""


def check_network(
    protocol: Protocol, inception: Path | None, *, flag: str = "--inception"
) -> None:
    """Raise `InputError` if weights are missing, or are given and not used."""
    if protocol.network == "inception" and inception is None:
        raise InputError(
            f"{flag}: not given, but protocol {protocol.name} measures with FID's "
            f"Inception network; try {flag} pt_inception-2015-12-05-6726825d.pth "
            "(of pytorch-fid), or protocol dataset-classifier, which needs no file"
        )
    if protocol.network != "inception" and inception is not None:
        raise InputError(
            f"{flag}: got it with protocol {protocol.name}, which reads none"
        )


def check_run(config: Config, workdir: Path, *, try_: str = "another run") -> None:
    """Raise `InputError` unless a run samples from labels, texts or noise alone."""
    if "diffusion" not in config.stages:
        raise InputError(
            f"--workdir: {workdir} is a run of an autoencoder alone, wanted one "
            f"with a diffusion stage; try {try_}"
        )
    condition = config.diffusion.condition
    if condition.context == "embedding" or condition.concat != "none":
        raise InputError(
            f"--workdir: {workdir} is conditioned on vectors or images; wanted "
            "a model of classes or texts, or without condition"
        )
