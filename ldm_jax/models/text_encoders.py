"""Text encoders: latent diffusion's, and CLIP's.

Both are pre-norm transformers with learned positions and share their layer. They differ
in the mask (none, causal), the biases of q, k and v, and the output.
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
"""Epsilon of the layer norms of latent-diffusion's encoder; flax' default is 1e-6."""

LATENT_DIFFUSION_EXPANSION = 4
"""Hidden width of the MLPs of latent-diffusion's encoder, in units of its width."""

EMBEDDING_STD = 0.02
"""Standard deviation of CLIP's initial token and position embeddings."""

MISSTATED_EOS_ID = 2
"""End-of-text id of early CLIP configs, which differs from that of their tokenizer."""

Activation = Literal["quick_gelu", "gelu"]
TextOutput = Literal["last", "penultimate", "pooled"]
PositionInit = Literal["normal", "sinusoids"]


class TextTransformer(nn.Module):
    """Latent diffusion's text encoder, trained together with the UNet.

    Its tokenizer is BERT's. There is no mask: tokens attend to the padding too, so a
    text must have the length of training.

    Fields:
      vocab_size: Tokens of the vocabulary.
      length: Most tokens of a text.
      width: Width of the residual stream and of the output.
      depth: Layers.
      num_heads: Attention heads.
      head_width: Width of a head; need not be `width / num_heads`.
      positions: Initial position embeddings; see `embed_tokens`.
      embedding_std: Standard deviation of initial embeddings.
      dtype: Compute dtype of the branches; parameters, norms, residual stream and
        output are float32.

    Source:
      Rombach et al., arXiv:2112.10752, app. E.2.1; latent-diffusion `BERTEmbedder`,
      without its unused projection to tokens (`to_logits`).
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
    """CLIP's text encoder, OpenAI's or OpenCLIP's.

    Attention is causal. All `depth` layers have parameters, even if the output does not
    use the last one: weights files contain it.

    Fields:
      vocab_size: Tokens of the vocabulary.
      length: Most tokens of a text.
      width: Width of the residual stream.
      depth: Layers.
      num_heads: Attention heads; must divide `width`.
      mlp_width: Hidden width of the MLPs.
      activation: Activation of the MLPs: `quick_gelu` for OpenAI's weights, `gelu` for
        OpenCLIP's.
      epsilon: Epsilon of the norms.
      output: `last`: output of the last layer; `penultimate`: of the layer before, both
        after the final norm; `pooled`: last output at the end of the text, after the
        final norm and a projection.
      projection_width: Width of `pooled`; ignored otherwise.
      eos_token_id: Token that ends a text; 2, which some configs state by mistake: the
        largest token. Ignored unless `pooled`.
      dtype: Compute dtype of the branches; parameters, norms, residual stream and
        output are float32.

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
    """Attention and an MLP, each after a norm, with residual connections.

    Fields:
      num_heads: Heads.
      head_width: Width of each.
      qkv_bias: Whether q, k and v have biases (CLIP) or not (latent-diffusion).
      mlp_width: Hidden width of the MLP.
      activation: Activation of the MLP.
      epsilon: Epsilon of both norms.
      dtype: Compute dtype of the branches; their sum is float32.

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
        """Apply the layer; `mask[i, j]` is true if token i attends to token j."""
        y = layer_norm(self.epsilon, "norm1")(x)
        y = TextAttention(
            self.num_heads, self.head_width, self.qkv_bias, self.dtype, name="attention"
        )(y, mask)
        x = x + y.astype(jnp.float32)
        y = layer_norm(self.epsilon, "norm2")(x)
        y = TextMlp(self.mlp_width, self.activation, self.dtype, name="mlp")(y)
        return x + y.astype(jnp.float32)


class TextAttention(nn.Module):
    """Self-attention under a mask, without norm and residual connection.

    Fields:
      num_heads: Heads.
      head_width: Width of each.
      qkv_bias: Whether q, k and v have biases; the output always has one.
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
        """Return the attention output of every token."""

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
    """Two linear layers with an activation in between.

    Fields:
      width: Hidden width.
      activation: `gelu` is the exact GELU.
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
        """Apply the MLP to every token."""
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
    """Return the sum of token and position embeddings, float32.

    The tables are `token_embedding` and `position_embedding` of the module whose
    compact method calls this function.

    Args:
      tokens: Token ids, in [0, vocab_size).
      length: Number of positions.
      width: Width of the embeddings; even for `sinusoids`.
      positions: Initial position embeddings: normal noise, or sinusoids, from which
        attention can find neighbouring positions before training.
      std: Standard deviation of the initial embeddings.

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
    """Return the first position of the end-of-text token; 0 in a text without one.

    Args:
      tokens: Token ids, padded at the end.
      eos_token_id: End-of-text id; 2 for the largest id of each text.

    Source:
      `CLIPTextModel` of transformers, for the rule of early configs.
    """
    if eos_token_id == MISSTATED_EOS_ID:
        return tokens.argmax(axis=-1)
    return (tokens == eos_token_id).argmax(axis=-1)


def layer_norm(epsilon: float, name: str) -> nn.LayerNorm:
    """Return a float32 layer norm with an accurate variance, unbound.

    flax' fast variance, mean square minus squared mean, is inaccurate for the few very
    large channels of trained encoders.
    """
    return nn.LayerNorm(
        epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, name=name
    )
