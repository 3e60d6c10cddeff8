"""Named protocols, which fix every detail of a score. Imports no JAX.

Scores of two pipelines are comparable only if every step before the score is the same.
So every file of statistics and of scores holds the name of its protocol, and files of
two protocols are never compared.
"""

from typing import Literal, NamedTuple

from ldm_jax.types import PROTOCOL_NAMES, InputError, ProtocolName, choices

NetworkName = Literal["inception", "classifier"]
ResizeName = Literal["tensorflow_1", "clean", "none"]


class Protocol(NamedTuple):
    """All choices between 8-bit images and their scores."""

    name: ProtocolName
    """Name of the protocol."""
    network: NetworkName
    """Network of the features: FID's Inception, or a classifier trained on the data
    set's own labels."""
    resize: ResizeName
    """Resizing of images for the network."""
    num_images: int
    """Number of samples of published scores."""
    score_splits: int
    """Splits of the Inception Score."""
    score_seed: int | None
    """Seed of the order of images before they are split; None keeps the order."""
    kernel_subsets: int
    """Subsets of the kernel distance."""
    kernel_size: int
    """Images in each subset."""
    neighbours: int
    """k of precision, recall, density and coverage."""
    neighbour_images: int
    """Maximum number of real images for these four."""
    neighbour_samples: int
    """Maximum number of samples for them."""


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
      InputError: If there is no protocol of that name.
    """
    for known, protocol in PROTOCOLS.items():
        if known == name:
            return protocol
    raise InputError(f"--protocol: {choices(name, PROTOCOL_NAMES)}")
