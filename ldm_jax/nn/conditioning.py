"""What the UNet may be conditioned on."""

import flax.linen as nn
from jaxtyping import Array, Float, Int

from ldm_jax.types import Dtype


class ClassEmbedding(nn.Module):
    """A vector for each class, and one more for "no class".

    The null class has index `num_classes`. Training replaces a label by it now and
    then, so that one network learns both the conditional and the unconditional model.

    Fields:
      num_classes: Real classes.
      width: Length of each vector.
      dtype: Compute dtype.

    Source:
      Ho & Salimans, arXiv:2207.12598, sec. 3.2.
    """

    num_classes: int
    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, labels: Int[Array, " b"]) -> Float[Array, "b d"]:
        """Look up labels in [0, num_classes]."""
        table = nn.Embed(
            self.num_classes + 1,
            self.width,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(1.0),
            name="table",
        )
        return table(labels)
