"""Reference batches of ADM's evaluation suite, in their published format."""

from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.evaluation.extractors import Extractor
from ldm_jax.evaluation.features import Provenance, Reference
from ldm_jax.evaluation.fid import Moments, moments
from ldm_jax.evaluation.protocols import Protocol
from ldm_jax.types import InputError

IMAGES = "arr_0"


def is_batch(arrays: dict[str, Any]) -> bool:
    """Return whether a file's arrays are a batch of images, not statistics of ours."""
    return IMAGES in arrays and "provenance" not in arrays


def reference_of_batch(
    path: Path,
    arrays: dict[str, Any],
    protocol: Protocol,
    extractor: Extractor,
    *,
    digest: str,
) -> Reference:
    """Make statistics of a reference batch.

    Args:
      path: The file.
      arrays: Its arrays: 8-bit images as `arr_0`; where the batch represents more
        images than it holds, their moments as `mu` and `sigma`, and those of sFID's
        features as `mu_s` and `sigma_s`.
      protocol: Must be `adm`.
      digest: Digest of the file.

    Returns:
      The file's moments, or those of its images where it has none; and the features of
      its images.

    Raises:
      InputError: If the protocol is another one, or the file is no such batch.

    Source:
      Dhariwal & Nichol, arXiv:2105.05233, sec. 2.2 (the metrics); the names of the
      arrays are those of the published files.
    """
    if protocol.name != "adm":
        raise InputError(
            f"--reference: {path} is a reference batch of ADM's, wanted statistics of "
            f"{protocol.name}; try --protocol adm"
        )
    images = arrays[IMAGES]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise InputError(
            f"--reference: {path} holds {images.dtype} of shape {images.shape}, wanted "
            "8-bit images (n, height, width, 3)"
        )
    found = extractor.extract(images)
    pooled = _given(arrays, "") or moments(found.pooled)
    spatial = _given(arrays, "_s")
    if spatial is None and found.spatial is not None:
        enough = len(images) > found.spatial.shape[1]
        spatial = moments(found.spatial) if enough else None
    if len(pooled.mean) != found.pooled.shape[1]:
        raise InputError(
            f"--reference: {path} has moments of {len(pooled.mean)} features, wanted "
            f"{found.pooled.shape[1]}"
        )
    provenance = Provenance(
        protocol=protocol.name,
        network=extractor.digest,
        source=path.name,
        split="",
        num_images=len(images),
        image_size=images.shape[1],
        data=digest,
    )
    return Reference(provenance, pooled, spatial, found.pooled)


def _given(arrays: dict[str, Any], tail: str) -> Moments | None:
    if f"mu{tail}" not in arrays:
        return None
    return Moments(
        np.asarray(arrays[f"mu{tail}"], np.float64),
        np.asarray(arrays[f"sigma{tail}"], np.float64),
    )
