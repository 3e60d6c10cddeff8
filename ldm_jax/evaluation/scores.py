"""All scores of a protocol, from the features of samples and of real images."""

from typing import Any

from ldm_jax.evaluation.features import FeatureSet, Reference
from ldm_jax.evaluation.fid import Moments, frechet_distance, inception_score, moments
from ldm_jax.evaluation.kid import kernel_distance
from ldm_jax.evaluation.precision_recall import neighbourhoods
from ldm_jax.evaluation.protocols import Protocol
from ldm_jax.types import InputError

Scores = dict[str, float | None]


def check_enough(num: int, width: int, *, what: str) -> None:
    """Raise `InputError` if there are too few images for a covariance.

    Args:
      num: Number of images.
      width: Number of a feature's components.
      what: Source of the images, for the message.
    """
    if num <= width:
        raise InputError(
            f"{what}: got {num} images, wanted more than the {width} components of a "
            "feature: with fewer their covariance is singular, and the Fréchet "
            "distance means little; try more images, or the protocol "
            "dataset-classifier"
        )


def score(protocol: Protocol, made: FeatureSet, reference: Reference) -> Scores:
    """Score samples against real images.

    Args:
      protocol: The one that `reference` was measured by.
      made: Features of samples.
      reference: Statistics of real images.

    Returns:
      Scores by name. `fid` is the Fréchet distance of the features of the protocol's
      network.

    Raises:
      InputError: If there are too few images.
    """
    num, width = made.pooled.shape
    check_enough(num, width, what="--num-images")
    found: Scores = {"fid": frechet_distance(moments(made.pooled), reference.pooled)}
    if made.spatial is not None and reference.spatial is not None:
        found["sfid"] = _spatial(made, reference.spatial)
    real = reference.features
    size = min(protocol.kernel_size, num, len(real))
    kernel = kernel_distance(
        made.pooled, real, subsets=protocol.kernel_subsets, subset_size=size
    )
    found |= {
        "kid": kernel.mean,
        "kid_std": kernel.std,
        "kid_half_interval": kernel.half,
        "kid_subset_size": size,
    }
    if made.logits is not None:
        inception = inception_score(
            made.logits, splits=protocol.score_splits, seed=protocol.score_seed
        )
        found |= {
            "inception_score": inception.mean,
            "inception_score_std": inception.std,
        }
    near = neighbourhoods(
        made.pooled[: protocol.neighbour_samples],
        real[: protocol.neighbour_images],
        neighbours=protocol.neighbours,
    )
    return found | near._asdict()


def _spatial(made: FeatureSet, reference: Moments) -> float | None:
    """Return sFID, or None for too few images for its wider features."""
    features: Any = made.spatial
    if len(features) <= features.shape[1]:
        return None
    return frechet_distance(moments(features), reference)
