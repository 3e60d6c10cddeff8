"""Config of the conditions: label, context, concat, and their text encoders."""

import dataclasses
from typing import Literal

from ldm_jax.config.validation import (
    checked_dataclass,
    require,
    require_at_least,
    require_at_most,
)

ContextName = Literal["none", "class", "text", "clip", "embedding"]
ConcatName = Literal["none", "low_resolution", "masked_image", "segmentation"]

MAX_STAGES = 16
"""Of halvings: no image is larger."""
CAPTIONS = "captions"
"""Value of `tokenizer` with which the run trains one on the captions."""


@checked_dataclass
class TextConfig:
    """LDM's text transformer, also for the box tokens of layouts."""

    vocab_size: int = 30_522
    """Tokens of the vocabulary."""
    length: int = 77
    """Tokens of a prompt, with padding."""
    width: int = 640
    """Width of the tokens and of the context."""
    depth: int = 32
    """Layers."""
    num_heads: int = 8
    """Attention heads of each layer."""
    head_width: int = 64
    """Width of a head."""
    positions: Literal["normal", "sinusoids"] = "normal"
    """Initial position embeddings: normal noise, or sinusoids, with which small models
    learn word order faster."""
    embedding_std: float = 0.02
    """Standard deviation of the initial token and position embeddings, above 0."""

    def _check(self) -> None:
        counts = "vocab_size length width depth num_heads head_width"
        require_at_least(self, 1, *counts.split())
        require(self, "embedding_std", self.embedding_std > 0, "above 0")
        even = self.positions == "normal" or self.width % 2 == 0
        require(self, "width", even, "an even number for positions of sinusoids")


@checked_dataclass
class ClipConfig:
    """CLIP's text encoder; the defaults are ViT-L/14's."""

    vocab_size: int = 49_408
    """Tokens of the vocabulary."""
    length: int = 77
    """Tokens of a prompt, with padding."""
    width: int = 768
    """Width of the tokens."""
    depth: int = 12
    """Layers."""
    num_heads: int = 12
    """Attention heads of each layer."""
    mlp_width: int = 3072
    """Hidden width of each layer's MLP."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Activation of the MLP: `quick_gelu` in OpenAI's CLIP, `gelu` in OpenCLIP-H."""
    epsilon: float = 1e-5
    """Epsilon of the norms."""
    output: Literal["last", "penultimate", "pooled"] = "last"
    """Output: tokens of the last layer or the one before, or one projected vector."""
    projection_width: int = 768
    """Width of the projected vector (`output pooled`)."""
    eos_token_id: int = 49_407
    """Token that ends a prompt (`output pooled`); 2: the largest token of the prompt
    does."""

    def _check(self) -> None:
        counts = "vocab_size length width depth num_heads mlp_width projection_width"
        require_at_least(self, 1, *counts.split())
        divides = self.width % self.num_heads == 0
        require(self, "num_heads", divides, f"a divisor of the width, {self.width}")
        require(self, "epsilon", self.epsilon > 0.0, "above 0")
        known = self.output != "pooled" or 0 <= self.eos_token_id < self.vocab_size
        require(self, "eos_token_id", known, f"0 to {self.vocab_size - 1}")


@checked_dataclass
class ConditionConfig:
    """Conditions of the UNet: label, context and concat, which may be combined."""

    label: bool = False
    """Add a class embedding to the time embedding."""
    context: ContextName = "none"
    """Input of cross-attention: none, the class as one token, LDM's text transformer,
    CLIP's text encoder, or embeddings from the data set."""
    pooled: bool = False
    """Also add the mean of the context to the time embedding; small models then learn
    to follow texts much faster."""
    concat: ConcatName = "none"
    """Input concatenated to the latent: none, the low-resolution image, the masked
    image and its mask, or a rescaled segmentation map."""
    class_width: int = 512
    """Width of the class token (`context class`)."""
    embedding_width: int = 768
    """Width of the data set's embeddings (`context embedding`)."""
    embedding_length: int = 1
    """Embeddings of an example (`context embedding`)."""
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    """LDM's text transformer (`context text`)."""
    clip: ClipConfig = dataclasses.field(default_factory=ClipConfig)
    """CLIP's text encoder (`context clip`)."""
    trained: bool = True
    """Train the conditioner with the UNet; otherwise `weights` are read and frozen."""
    weights: str | None = None
    """File or folder with the weights of a frozen conditioner."""
    tokenizer: str | None = None
    """Folder of the tokenizer's files; `captions`: train a tokenizer on the captions
    and keep it in the run's folder."""
    low_resolution_factor: int = 4
    """Down-sampling of the low-resolution image (`concat low_resolution`)."""
    num_segments: int = 182
    """Classes of the segmentation map (`concat segmentation`)."""
    rescale_stages: int = 2
    """Halvings of the segmentation map (`concat segmentation`)."""
    rescale_channels: int = 3
    """Channels of the projected segmentation map (`concat segmentation`)."""

    @property
    def uses_classes(self) -> bool:
        """Whether the model reads class labels."""
        return self.label or self.context == "class"

    @property
    def uses_tokens(self) -> bool:
        """Whether the model reads tokens."""
        return self.context in ("text", "clip")

    @property
    def learns_tokenizer(self) -> bool:
        """Whether the run trains a tokenizer on the captions."""
        return self.tokenizer == CAPTIONS

    @property
    def num_tokens(self) -> int:
        """Tokens of a prompt; 0 without a text encoder."""
        lengths = {"text": self.text.length, "clip": self.clip.length}
        return lengths.get(self.context, 0)

    @property
    def vocab_size(self) -> int:
        """Vocabulary size of the text encoder; 0 without one."""
        sizes = {"text": self.text.vocab_size, "clip": self.clip.vocab_size}
        return sizes.get(self.context, 0)

    @property
    def context_width(self) -> int:
        """Width of the context; 0 without one."""
        pooled = self.clip.output == "pooled"
        widths: dict[ContextName, int] = {
            "none": 0,
            "class": self.class_width,
            "text": self.text.width,
            "clip": self.clip.projection_width if pooled else self.clip.width,
            "embedding": self.embedding_width,
        }
        return widths[self.context]

    @property
    def freezes_text(self) -> bool:
        """Whether the text encoder is frozen."""
        return self.uses_tokens and not self.trained

    def as_vectors(self) -> "ConditionConfig":
        """Return the condition that reads the text encoder's output instead of text."""
        pooled = self.context == "clip" and self.clip.output == "pooled"
        return dataclasses.replace(
            self,
            context="embedding",
            embedding_length=1 if pooled else self.num_tokens,
            embedding_width=self.context_width,
            tokenizer=None,
        )

    def concat_channels(self, *, image_channels: int, latent_channels: int) -> int:
        """Return the channels of the input concatenated to the latent."""
        channels: dict[ConcatName, int] = {
            "none": 0,
            "low_resolution": image_channels,
            "masked_image": latent_channels + 1,
            "segmentation": self.rescale_channels,
        }
        return channels[self.concat]

    def _check(self) -> None:
        counts = "class_width embedding_width embedding_length low_resolution_factor"
        require_at_least(self, 1, *counts.split(), "num_segments", "rescale_channels")
        require_at_least(self, 0, "rescale_stages")
        require_at_most(self, MAX_STAGES, "rescale_stages")
        reads = self.context != "none" or not self.pooled
        require(self, "pooled", reads, "False where `context` is none")
        learns = not self.learns_tokenizer or self.context == "text"
        require(
            self, "tokenizer", learns, "a folder, or `captions` with `context text`"
        )
