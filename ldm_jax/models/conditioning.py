"""Conditions of the UNet, and the networks that compute them."""

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ldm_jax.models.kernels.convolution import convolve
from ldm_jax.models.layers import area_downsample
from ldm_jax.types import Dtype


class ConditionInputs(NamedTuple):
    """Conditions from the data or the user; None for those the model does not read."""

    label: Int[Any, " b"] | None = None
    """Class of each image, in [0, num_classes]; the last is the null class."""
    tokens: Int[Any, "b n"] | None = None
    """Token ids of a text or a layout, in [0, vocab_size)."""
    embedding: Float[Any, "b n d"] | None = None
    """Embeddings of another network."""
    image: Float[Any, "b h w c"] | None = None
    """Input that is concatenated to the latent, before the rescaler: a low-resolution
    image in [-1, 1]; the latent of a masked image and its mask in {-1, 1}; or a one-hot
    segmentation map."""


class Condition(NamedTuple):
    """Conditions as the UNet reads them; None for those it does not read."""

    label: Int[Any, " b"] | Float[Any, "b k"] | None = None
    """Class whose embedding is added to the time embedding; or weights of all classes,
    the null class last, to mix their embeddings."""
    context: Float[Any, "b n d"] | None = None
    """Tokens for cross-attention."""
    concat: Float[Any, "b h w c"] | None = None
    """Channels concatenated to the noisy latent."""


def null_inputs(
    like: ConditionInputs,
    *,
    num_classes: int,
    null_tokens: tuple[int, ...],
    null_embedding: Float[Any, "n d"] | None = None,
) -> ConditionInputs:
    """Return the unconditional inputs of classifier-free guidance.

    A concatenated image is kept: models with one are never trained without it.

    Args:
      like: Inputs with the shapes of the result.
      num_classes: Number of classes, which is the index of the null class.
      null_tokens: Tokens of the empty prompt.
      null_embedding: Embedding of the empty prompt; None for zeros.

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
    """An embedding for each class and for the null class, whose index is `num_classes`.

    Training replaces some labels by the null class, so that one network learns the
    conditional and the unconditional model.

    Fields:
      num_classes: Number of classes without the null class.
      width: Length of an embedding.
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
    """Halve a segmentation map several times, then project its channels.

    Bilinear halving without antialiasing is the mean of 2x2 blocks.

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
        """Rescale a map whose sides are multiples of `2 ** num_stages`."""
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
    """Convert conditions from the data or the user to the UNet's.

    Fields:
      reads: Input that becomes the context: labels, tokens, embeddings, or none.
      encoder: Network from labels or tokens to the context; None for embeddings.
      rescaler: Network of the concatenated image; None for no change.
      adds_label: Whether the UNet reads the label.

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
