"""Networks that read text: latent diffusion's own encoder, and CLIP's.

Both are transformers with norms before the branches, over learned positions, and share
their layer. They differ in the mask (none, causal), in the biases of q, k and v, and in
what they return.
"""

import functools
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from ldm_jax.models.attention import attend
from ldm_jax.models.layers import timestep_embedding
from ldm_jax.types import Dtype

LATENT_DIFFUSION_EPSILON = 1e-5
"""Of the layer norms of latent-diffusion's encoder; flax would take 1e-6."""

LATENT_DIFFUSION_EXPANSION = 4
"""Width of the MLPs of latent-diffusion's encoder, in units of its own width."""

EMBEDDING_STD = 0.02
"""Standard deviation of CLIP's untrained token and position embeddings."""

MISSTATED_EOS_ID = 2
"""What early CLIP configs state as end of text, though their tokenizer has another."""

Activation = Literal["quick_gelu", "gelu"]
TextOutput = Literal["last", "penultimate", "pooled"]
PositionInit = Literal["normal", "sinusoids"]


class TextTransformer(nn.Module):
    """Latent diffusion's text encoder, trained together with the UNet.

    Of BERT it has the tokenizer only. There is no mask: tokens read the padding too, so
    a text means something only at the length it was trained with.

    Fields:
      vocab_size: Tokens there are.
      length: Most tokens of a text; each position has a learned vector.
      width: Width of the stream and of the output.
      depth: Layers.
      num_heads: Heads of every attention.
      head_width: Width of each head; need not be `width / num_heads`.
      positions: What untrained vectors of positions are; see `embed_tokens`.
      embedding_std: Standard deviation of untrained vectors.
      dtype: Compute dtype of the branches; parameters, norms, stream and output stay
        float32.

    Source:
      Rombach et al., arXiv:2112.10752, app. E.2.1; latent-diffusion `BERTEmbedder`,
      less the map back to tokens (`to_logits`) that it holds and never calls.
    """

    vocab_size: int
    length: int
    width: int
    depth: int
    num_heads: int
    head_width: int
    positions: PositionInit
    embedding_std: float
    dtype: Dtype

    @nn.compact
    def __call__(self, tokens: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """Encode tokens in [0, vocab_size); one outside makes its text NaN."""
        x = embed_tokens(
            tokens,
            vocab_size=self.vocab_size,
            length=self.length,
            width=self.width,
            positions=self.positions,
            std=self.embedding_std,
        )
        for i in range(self.depth):
            x = TextLayer(
                self.num_heads,
                self.head_width,
                qkv_bias=False,
                mlp_width=LATENT_DIFFUSION_EXPANSION * self.width,
                activation="gelu",
                epsilon=LATENT_DIFFUSION_EPSILON,
                dtype=self.dtype,
                name=f"layer_{i}",
            )(x)
        return layer_norm(LATENT_DIFFUSION_EPSILON, "norm_out")(x)


class ClipTextTransformer(nn.Module):
    """CLIP's text encoder, OpenAI's and OpenCLIP's alike.

    A token reads itself and the tokens before it. All `depth` layers have parameters,
    also where the output leaves the last one unused: weights name them.

    Fields:
      vocab_size: Tokens there are.
      length: Most tokens of a text; each position has a learned vector.
      width: Width of the stream.
      depth: Layers.
      num_heads: Heads of every attention; must divide `width`.
      mlp_width: Hidden width of every MLP.
      activation: Of every MLP; OpenAI's weights have `quick_gelu`, OpenCLIP's `gelu`.
      epsilon: Of every norm.
      output: `last` is the output of the last layer, `penultimate` that of the layer
        before it, both after the final norm; `pooled` is the last output at the end of
        the text, after the final norm and a projection: one vector a text.
      projection_width: Width of `pooled`; ignored otherwise.
      eos_token_id: Marks the end of a text, at its first place; if 2, which some
        configs say by mistake, the largest token does. Ignored unless `pooled`.
      dtype: Compute dtype of the branches; parameters, norms, stream and output stay
        float32.

    Source:
      Radford et al., arXiv:2103.00020, sec. 2.4; Stable Diffusion 2's
      `FrozenOpenCLIPEmbedder` for `penultimate`.
    """

    vocab_size: int
    length: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    activation: Activation
    epsilon: float
    output: TextOutput
    projection_width: int
    eos_token_id: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b n"]
    ) -> Float[Array, "b n d"] | Float[Array, "b e"]:
        """Encode tokens in [0, vocab_size); one outside makes its text NaN."""
        if self.width % self.num_heads:
            raise ValueError(
                f"text encoder: width {self.width} does not divide into "
                f"{self.num_heads} heads"
            )
        x = embed_tokens(
            tokens, vocab_size=self.vocab_size, length=self.length, width=self.width
        )
        causal = jnp.tri(tokens.shape[1], dtype=bool)
        for i in range(self.depth):
            y = TextLayer(
                self.num_heads,
                self.width // self.num_heads,
                qkv_bias=True,
                mlp_width=self.mlp_width,
                activation=self.activation,
                epsilon=self.epsilon,
                dtype=self.dtype,
                name=f"layer_{i}",
            )(x, causal)
            # Called all the same, for its parameters; compiled, it is dropped.
            unused = self.output == "penultimate" and i == self.depth - 1
            x = x if unused else y
        x = layer_norm(self.epsilon, "norm_out")(x)
        if self.output != "pooled":
            return x
        x = x[jnp.arange(len(x)), end_of_text(tokens, eos_token_id=self.eos_token_id)]
        project = nn.Dense(
            self.projection_width, use_bias=False, dtype=self.dtype, name="projection"
        )
        return project(x).astype(jnp.float32)


class TextLayer(nn.Module):
    """Attention and an MLP, each after a norm and around a skip.

    Fields:
      num_heads: Heads.
      head_width: Width of each.
      qkv_bias: Whether q, k and v have biases (CLIP) or not (latent-diffusion).
      mlp_width: Hidden width of the MLP.
      activation: Of the MLP.
      epsilon: Of both norms.
      dtype: Compute dtype of the two branches; their sum stays float32.

    Source:
      Xiong et al., arXiv:2002.04745, fig. 1b.
    """

    num_heads: int
    head_width: int
    qkv_bias: bool
    mlp_width: int
    activation: Activation
    epsilon: float
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "n n"] | None = None
    ) -> Float[Array, "b n d"]:
        """Transform `x`; `mask` says which token (row) may read which."""
        y = layer_norm(self.epsilon, "norm1")(x)
        y = TextAttention(
            self.num_heads, self.head_width, self.qkv_bias, self.dtype, name="attention"
        )(y, mask)
        x = x + y.astype(jnp.float32)
        y = layer_norm(self.epsilon, "norm2")(x)
        y = TextMlp(self.mlp_width, self.activation, self.dtype, name="mlp")(y)
        return x + y.astype(jnp.float32)


class TextAttention(nn.Module):
    """Let every token read those that the mask allows; no norm, no skip.

    Fields:
      num_heads: Heads.
      head_width: Width of each.
      qkv_bias: Whether q, k and v have biases; the way out always has one.
      dtype: Compute dtype; the softmax stays float32.
    """

    num_heads: int
    head_width: int
    qkv_bias: bool
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "n n"] | None
    ) -> Float[Array, "b n d"]:
        """Return what each token reads."""

        def heads(name: str) -> Float[Array, "b n k e"]:
            project = nn.Dense(
                self.num_heads * self.head_width,
                use_bias=self.qkv_bias,
                dtype=self.dtype,
                name=name,
            )
            return project(x).reshape(*x.shape[:2], self.num_heads, self.head_width)

        y = attend(heads("q"), heads("k"), heads("v"), mask=mask)
        y = y.reshape(*x.shape[:2], self.num_heads * self.head_width)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="out")(y)


class TextMlp(nn.Module):
    """Two affine maps with an activation in between; no gate.

    Fields:
      width: Width in between.
      activation: `gelu` is the exact one, by the error function.
      dtype: Compute dtype.

    Source:
      Hendrycks & Gimpel, arXiv:1606.08415, sec. 2; its second approximation there is
      `quick_gelu`, x times the logistic function of 1.702 x.
    """

    width: int
    activation: Activation
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Transform every token by itself."""
        h = nn.Dense(self.width, dtype=self.dtype, name="in")(x)
        if self.activation == "gelu":
            h = jax.nn.gelu(h, approximate=False)
        else:
            h = h * jax.nn.sigmoid(1.702 * h)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="out")(h)


def embed_tokens(
    tokens: Int[Array, "b n"],
    *,
    vocab_size: int,
    length: int,
    width: int,
    positions: PositionInit = "normal",
    std: float = EMBEDDING_STD,
) -> Float[Array, "b n d"]:
    """Add a learned vector of the token and one of its position, unscaled, float32.

    The two tables become `token_embedding` and `position_embedding` of the module whose
    compact method calls.

    Args:
      tokens: In [0, vocab_size).
      vocab_size: Tokens there are.
      length: Positions there are.
      width: Of the vectors; even for `sinusoids`.
      positions: Untrained, those of positions are normal, or sines and cosines of the
        position: the same turn leads from any of these to the next, so that attention
        can find a neighbour wherever it is before anything is learned.
      std: Standard deviation of untrained vectors, of either kind.

    Returns:
      One vector a token.

    Raises:
      ValueError: If there are more tokens than positions.

    Source:
      Vaswani et al., arXiv:1706.03762, sec. 3.5.
    """
    n = tokens.shape[1]
    if n > length:
        raise ValueError(f"text encoder: got {n} tokens, wanted at most {length}")
    init = nn.initializers.normal(std)
    token = nn.Embed(vocab_size, width, embedding_init=init, name="token_embedding")
    if positions == "sinusoids":
        init = functools.partial(_sinusoids, std=std)
    position = nn.Embed(length, width, embedding_init=init, name="position_embedding")
    return token(tokens) + position(jnp.arange(n))


def _sinusoids(
    key: Key[Array, ""], shape: tuple[int, int], dtype: DTypeLike, *, std: float
) -> Float[Array, "n d"]:
    del key
    n, width = shape
    waves = timestep_embedding(jnp.arange(n), width=width)
    return (std * math.sqrt(2.0) * waves).astype(dtype)


def end_of_text(tokens: Int[Array, "b n"], *, eos_token_id: int) -> Int[Array, " b"]:
    """Return the position of the token that speaks for the whole text.

    Args:
      tokens: Token ids, padded at the end.
      eos_token_id: The id that ends a text; 2 asks for the largest id instead.

    Returns:
      The first such position; 0 in a text that has none.

    Source:
      `CLIPTextModel` of transformers, which keeps this rule for its early configs.
    """
    if eos_token_id == MISSTATED_EOS_ID:
        return tokens.argmax(axis=-1)
    return (tokens == eos_token_id).argmax(axis=-1)


def layer_norm(epsilon: float, name: str) -> nn.LayerNorm:
    """Make a float32 layer norm that takes the variance about the mean.

    flax's fast variance, the mean square less the squared mean, loses digits where
    trained encoders have a few very large channels.
    """
    return nn.LayerNorm(
        epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, name=name
    )
