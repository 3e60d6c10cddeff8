"""Named protocols: how images are measured, fixed to the last detail. Imports no JAX.

Figures of two pipelines can be compared only if every step before the figure is the
same. So each protocol has a name, the name stands in every file of statistics and of
scores, and nothing compares two.
"""

from typing import Literal, NamedTuple

from ldm_jax.types import PROTOCOL_NAMES, InputError, ProtocolName, choices

NetworkName = Literal["inception", "classifier"]
ResizeName = Literal["tensorflow_1", "clean", "none"]


class Protocol(NamedTuple):
    """How images become scores. Images are 8-bit levels before anything else."""

    name: ProtocolName
    """Of the protocol."""
    network: NetworkName
    """What looks at the images: FID's Inception, or a classifier taught on the data
    set's own labels."""
    resize: ResizeName
    """How images get the size the network wants."""
    num_images: int
    """Samples that published figures take."""
    score_splits: int
    """Splits of the Inception Score."""
    score_seed: int | None
    """Of the order of images before they are split; None for none."""
    kernel_subsets: int
    """Subsets of the kernel distance."""
    kernel_size: int
    """Images in each."""
    neighbours: int
    """k of precision, recall, density and coverage."""
    neighbour_images: int
    """Most real images for these four."""
    neighbour_samples: int
    """Most samples for them."""


_ROWS = (
    # name, network, resize, images; splits, seed; subsets, size; k, at most
    Protocol(
        "adm", "inception", "tensorflow_1", 50_000, 10, None, 100, 1000, 3, 10_000,
        50_000,
    ),
    Protocol(
        "torch-fidelity", "inception", "tensorflow_1", 50_000, 10, 2020, 100, 1000, 3,
        50_000, 50_000,
    ),
    Protocol(
        "clean-fid", "inception", "clean", 50_000, 10, 2020, 100, 1000, 3, 10_000,
        10_000,
    ),
    Protocol(
        "dataset-classifier", "classifier", "none", 50_000, 10, 2020, 100, 100, 3,
        10_000, 10_000,
    ),
)  # fmt: skip
PROTOCOLS: dict[ProtocolName, Protocol] = {row.name: row for row in _ROWS}


def protocol_of(name: str) -> Protocol:
    """Find a protocol.

    Raises:
      InputError: If there is none of that name.
    """
    for known, protocol in PROTOCOLS.items():
        if known == name:
            return protocol
    raise InputError(f"--protocol: {choices(name, PROTOCOL_NAMES)}")
