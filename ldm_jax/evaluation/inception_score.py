"""The Inception Score: are images clear, and of many kinds?"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import log_softmax

from ldm_jax.types import InputError

SPLITS, SEED = 10, 2020


class InceptionScore(NamedTuple):
    """A score over splits.

    Attributes:
      mean: From 1 to the number of classes.
      std: Over the splits.
    """

    mean: float
    std: float


def inception_score(
    logits: Float[np.ndarray, "n k"], *, splits: int = SPLITS, seed: int | None = SEED
) -> InceptionScore:
    """Return `exp(E KL(p(y | x) || p(y)))`, a mean over splits, in float64.

    Args:
      logits: Of a classifier, by image.
      splits: Parts that p(y) is taken over.
      seed: Of the order in which images are dealt to splits; None keeps the given one.

    Raises:
      InputError: If there are fewer images than splits.

    Source:
      Salimans et al., arXiv:1606.03498, sec. 4; the order as in torch-fidelity.
    """
    num = len(logits)
    if num < splits or splits < 1:
        raise InputError(
            f"inception score: got {num} images, wanted at least one for each of "
            f"{splits} splits; the published one takes 50,000"
        )
    if seed is not None:
        logits = logits[np.random.RandomState(seed).permutation(num)]
    log_p = log_softmax(np.asarray(logits, np.float64), axis=1)
    found: list[float] = []
    for i in range(splits):
        part = log_p[i * num // splits : (i + 1) * num // splits]
        p = np.exp(part)
        marginal = p.mean(axis=0)
        # A class that no image may be of has p = 0 everywhere: it adds nothing.
        log_marginal = np.log(np.where(marginal > 0.0, marginal, 1.0))
        divergence = (p * (np.where(p > 0.0, part, 0.0) - log_marginal)).sum(axis=1)
        found.append(float(np.exp(divergence.mean())))
    return InceptionScore(float(np.mean(found)), float(np.std(found)))
