"""What a network says of many images, and the statistics of real ones on disk."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ldm_jax.evaluation.fid import Moments, Sums, moments_of
from ldm_jax.types import InputError

MOST_KEPT = 50_000
"""Features of real images that are kept one by one, for scores that need them so."""


class FeatureSet(NamedTuple):
    """What a network says of images, by image."""

    pooled: Float[np.ndarray, "n d"]
    """Features."""
    spatial: Float[np.ndarray, "n e"] | None
    """Those of sFID; None where the network has none."""
    logits: Float[np.ndarray, "n k"] | None
    """Of its classes; None likewise."""


class Provenance(NamedTuple):
    """What statistics are of; two are compared only if the first two agree."""

    protocol: str
    """Name of the protocol."""
    network: str
    """Digest of the network's weights."""
    source: str
    """Data set, or what made the images."""
    split: str
    """Of the data set, or ""."""
    num_images: int
    """How many."""
    image_size: int
    """Their side in pixels."""
    data: str
    """Digest of the images, in order."""


class Reference(NamedTuple):
    """Statistics of real images."""

    provenance: Provenance
    """What they are of."""
    pooled: Moments
    """Moments of all features."""
    spatial: Moments | None
    """Moments of sFID's; None where the network has none."""
    kept: Float[np.ndarray, "n d"]
    """Features one by one, of images from all over, in no order."""


def join(parts: list[FeatureSet]) -> FeatureSet:
    """Join what was said of parts of the images, in order."""
    columns = zip(*parts, strict=True)
    return FeatureSet(
        *(None if column[0] is None else np.concatenate(column) for column in columns)  # pyright: ignore[reportArgumentType]
    )


def reference_of(
    provenance: Provenance,
    pooled: Sums,
    spatial: Sums | None,
    kept: Float[np.ndarray, "n d"],
) -> Reference:
    """Make the statistics of real images from what a stream left."""
    return Reference(
        provenance,
        moments_of(pooled),
        None if spatial is None else moments_of(spatial),
        kept,
    )


def write_reference(path: Path, reference: Reference) -> None:
    """Write statistics, whole or not at all.

    Raises:
      OSError: If they cannot be written.
    """
    arrays: dict[str, np.ndarray] = {
        "provenance": np.asarray(json.dumps(reference.provenance._asdict())),
        "mean": reference.pooled.mean,
        "covariance": reference.pooled.covariance,
        "features": np.asarray(reference.kept, np.float32),
    }
    if reference.spatial is not None:
        arrays["spatial_mean"] = reference.spatial.mean
        arrays["spatial_covariance"] = reference.spatial.covariance
    write_arrays(path, arrays)


def read_reference(path: Path) -> Reference:
    """Read statistics.

    Raises:
      InputError: If the file is not one of statistics.
    """
    arrays = read_arrays(path)
    try:
        provenance = Provenance(**json.loads(str(arrays["provenance"])))
        spatial = None
        if "spatial_mean" in arrays:
            spatial = Moments(arrays["spatial_mean"], arrays["spatial_covariance"])
        pooled = Moments(arrays["mean"], arrays["covariance"])
        return Reference(provenance, pooled, spatial, arrays["features"])
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{path}: not statistics of images by this program (no protocol, or parts "
            "are missing); figures of an unknown pipeline are not compared: try "
            "without --reference, which measures the data set"
        ) from None


def check_comparable(ours: Provenance, theirs: Provenance, *, path: Path) -> None:
    """Raise `InputError` where two statistics were measured in different ways.

    Args:
      ours: Of what is to be measured.
      theirs: Of a file.
      path: The file's.
    """
    for name in ("protocol", "network"):
        got, wanted = getattr(theirs, name), getattr(ours, name)
        if got != wanted:
            raise InputError(
                f"{path}: got statistics of {name} {got}, wanted {wanted}: two ways of "
                "measuring are never compared; try the same --protocol and weights, or "
                "other statistics"
            )


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays by name, whole or not at all.

    Raises:
      OSError: If they cannot be written.
    """
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    os.replace(part, path)


def read_arrays(path: Path) -> dict[str, Any]:
    """Read arrays by name; nothing that a file may hold beside is run.

    Raises:
      InputError: If they cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(
            f"{path}: not a file of arrays ({' '.join(str(error).split())[:80]})"
        ) from None
