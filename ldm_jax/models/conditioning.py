"""What the UNet may be conditioned on, and the networks that prepare it."""

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ldm_jax.models.kernels.convolution import convolve
from ldm_jax.models.layers import area_downsample
from ldm_jax.types import Dtype


class ConditionInputs(NamedTuple):
    """What the data or the user gives; what a model does not read is None."""

    label: Int[Any, " b"] | None = None
    """Class of each image, in [0, num_classes]; the last means "none"."""
    tokens: Int[Any, "b n"] | None = None
    """Token ids of a text or a layout, in [0, vocab_size)."""
    embedding: Float[Any, "b n d"] | None = None
    """Vectors that some other network made."""
    image: Float[Any, "b h w c"] | None = None
    """What is stacked on the latent, before the rescaler if there is one: a
    low-resolution image in [-1, 1]; the latent of an image with a hole, and the hole's
    mask in {-1, 1}; or a one-hot segmentation map."""


class Condition(NamedTuple):
    """What the UNet reads; None where it reads nothing."""

    label: Int[Any, " b"] | Float[Any, "b k"] | None = None
    """Class, whose vector is added to the time embedding; or a weight for each class,
    "none" last, where it lies between several."""
    context: Float[Any, "b n d"] | None = None
    """Tokens that cross-attention reads."""
    concat: Float[Any, "b h w c"] | None = None
    """Channels stacked on the noisy latent."""


def null_inputs(
    like: ConditionInputs,
    *,
    num_classes: int,
    null_tokens: tuple[int, ...],
    null_embedding: Float[Any, "n d"] | None = None,
) -> ConditionInputs:
    """Make the inputs that mean "no condition".

    A stacked image stays: guidance is by what is said of the image, and models that
    are given one never learn to do without.

    Args:
      like: Inputs whose shapes are taken.
      num_classes: Real classes; the null class has this index.
      null_tokens: Tokens of the empty prompt.
      null_embedding: Vectors that mean nothing; None for zeros.

    Returns:
      The null class, the empty prompt, the null vectors, and the same images.

    Source:
      Ho & Salimans, arXiv:2207.12598, sec. 3.2.
    """
    label, tokens, embedding = like.label, like.tokens, like.embedding
    if label is not None:
        label = jnp.full_like(label, num_classes)
    if tokens is not None:
        empty = jnp.asarray(null_tokens, tokens.dtype)
        tokens = jnp.broadcast_to(empty, tokens.shape)
    if embedding is not None and null_embedding is not None:
        embedding = jnp.broadcast_to(null_embedding, embedding.shape)
    elif embedding is not None:
        embedding = jnp.zeros_like(embedding)
    return ConditionInputs(label, tokens, embedding, like.image)


class ClassEmbedding(nn.Module):
    """A vector for each class, and one more for "no class".

    The null class has index `num_classes`. Training replaces a label by it now and
    then, so that one network learns both the conditional and the unconditional model.

    Fields:
      num_classes: Real classes.
      width: Length of each vector.
      dtype: Compute dtype.

    Source:
      Ho & Salimans, arXiv:2207.12598, sec. 3.2; latent-diffusion `ClassEmbedder`.
    """

    num_classes: int
    width: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self, labels: Int[Array, " b"] | Float[Array, "b k"]
    ) -> Float[Array, "b d"]:
        """Look up labels in [0, num_classes], or mix all classes by their weights."""
        table = nn.Embed(
            self.num_classes + 1,
            self.width,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(1.0),
            name="table",
        )
        if labels.ndim == 1:
            return table(labels)
        vectors = table.embedding.astype(self.dtype)
        return jnp.dot(
            labels.astype(self.dtype), vectors, precision=jax.lax.Precision.HIGHEST
        )


class SpatialRescaler(nn.Module):
    """Halve a map a few times, then mix its channels: for segmentation maps.

    A bilinear halving without antialiasing takes each pixel half-way between two, in
    both directions: it is the mean of blocks of 2x2.

    Fields:
      num_stages: Halvings.
      channels: Channels out.
      dtype: Compute dtype.

    Source:
      latent-diffusion `SpatialRescaler`.
    """

    num_stages: int
    channels: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 e"]:
        """Rescale a map whose sides are multiples of two to the power of stages."""
        x = area_downsample(x.astype(self.dtype), factor=2**self.num_stages)
        mix = nn.Conv(
            self.channels,
            (1, 1),
            padding=0,
            use_bias=False,
            dtype=self.dtype,
            conv_general_dilated=convolve,
            name="mix",
        )
        return mix(x)


class Conditioner(nn.Module):
    """Turn what the data gives into what the UNet reads.

    Fields:
      reads: Which input becomes the context: a class, tokens, vectors as they are, or
        none.
      encoder: Network from labels or tokens to the context; None for vectors.
      rescaler: Network of the stacked image; None leaves it as it is.
      adds_label: Whether the label goes to the UNet as it is.

    Source:
      Rombach et al., arXiv:2112.10752, sec. 3.3 (their tau_theta is `encoder`).
    """

    reads: Literal["none", "label", "tokens", "embedding"]
    encoder: nn.Module | None
    rescaler: nn.Module | None
    adds_label: bool

    def __call__(self, inputs: ConditionInputs) -> Condition:
        """Prepare the condition of a batch."""
        context: Any = None
        if self.reads == "embedding":
            context = inputs.embedding
        elif self.encoder is not None:
            value = inputs.label if self.reads == "label" else inputs.tokens
            context = self.encoder(value)
            if context.ndim == 2:
                context = context[:, None, :]
        concat = inputs.image
        if self.rescaler is not None:
            concat = self.rescaler(concat)
        label = inputs.label if self.adds_label else None
        return Condition(label, context, concat)
