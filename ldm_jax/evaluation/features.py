"""Features of images, and the statistics of real images on disk."""

import hashlib
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ldm_jax.evaluation.fid import Moments, Sums, moments_of
from ldm_jax.files import parse_json, write_file
from ldm_jax.types import InputError

DIGEST = "sha256"
"""Name of the digest of all other arrays of a file."""
DAMAGED = (
    *(OSError, ValueError, AttributeError, EOFError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What NumPy raises of a damaged file of arrays."""
MAX_FEATURES = 50_000
"""Single features of real images that are kept, for scores that need them."""


class FeatureSet(NamedTuple):
    """A network's outputs for some images."""

    pooled: Float[np.ndarray, "n d"]
    """Features."""
    spatial: Float[np.ndarray, "n e"] | None
    """Features of sFID; None where the network has none."""
    logits: Float[np.ndarray, "n k"] | None
    """Logits of the network's classes; None likewise."""


class Provenance(NamedTuple):
    """Protocol, network and images of statistics.

    Statistics are comparable only if protocol and network agree.
    """

    protocol: str
    """Name of the protocol."""
    network: str
    """Digest of the network's weights."""
    source: str
    """Data set, or file of a reference batch."""
    split: str
    """Split of the data set, or ""."""
    num_images: int
    """Number of images."""
    image_size: int
    """Side of the images, in pixels."""
    data: str
    """Digest of the images, in order."""


class Reference(NamedTuple):
    """Statistics of real images."""

    provenance: Provenance
    """Protocol, network and images."""
    pooled: Moments
    """Moments of all features."""
    spatial: Moments | None
    """Moments of sFID's features; None where the network has none."""
    features: Float[np.ndarray, "n d"]
    """Single features of images spread over the data set, unordered."""


def join(parts: list[FeatureSet]) -> FeatureSet:
    """Join the features of parts of the images, in order."""
    columns = zip(*parts, strict=True)
    return FeatureSet(
        *(None if column[0] is None else np.concatenate(column) for column in columns)  # pyright: ignore[reportArgumentType]
    )


def reference_of(
    provenance: Provenance,
    pooled: Sums,
    spatial: Sums | None,
    features: Float[np.ndarray, "n d"],
) -> Reference:
    """Make the statistics of real images from sums."""
    return Reference(
        provenance,
        moments_of(pooled),
        None if spatial is None else moments_of(spatial),
        features,
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
        "features": np.asarray(reference.features, np.float32),
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
        text = str(arrays["provenance"])
        provenance = Provenance(**parse_json(text, what=f"{path}", remedy=""))
        spatial = None
        if "spatial_mean" in arrays:
            spatial = Moments(arrays["spatial_mean"], arrays["spatial_covariance"])
        pooled = Moments(arrays["mean"], arrays["covariance"])
        return Reference(provenance, pooled, spatial, arrays["features"])
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{path}: not statistics of images by this program (no protocol, or parts "
            "are missing); statistics of an unknown pipeline are not comparable: try "
            "without --reference, which measures the data set"
        ) from None


def check_comparable(ours: Provenance, theirs: Provenance, *, path: Path) -> None:
    """Raise `InputError` if the statistics of a file were measured in another way."""
    for name in ("protocol", "network"):
        got, wanted = getattr(theirs, name), getattr(ours, name)
        if got != wanted:
            raise InputError(
                f"{path}: got statistics of {name} {got}, wanted {wanted}: statistics "
                "of two protocols or networks are never compared; try the same "
                "--protocol and weights, or other statistics"
            )


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays by name, whole or not at all.

    Raises:
      OSError: If they cannot be written.
    """
    arrays = {**arrays, DIGEST: np.asarray(arrays_digest(arrays))}
    write_file(path, lambda file: np.savez(file, **arrays))  # pyright: ignore[reportArgumentType]


def arrays_digest(arrays: dict[str, np.ndarray]) -> str:
    """Return the sha256 over name, dtype, shape and bytes of arrays."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def read_arrays(path: Path) -> dict[str, Any]:
    """Read arrays by name; no code in the file is run.

    Raises:
      InputError: If they cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        saved = arrays.pop(DIGEST, None)  # none in other programs' files
        if saved is not None and str(saved) != arrays_digest(arrays):
            raise ValueError("its arrays are not what was written")
        return arrays
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except DAMAGED as error:
        raise InputError(
            f"{path}: not a file of arrays ({' '.join(str(error).split())[:80]})"
        ) from None
