"""Stage 2: the UNet, what it is conditioned on, the noise and the training."""

import dataclasses
from typing import Literal

from ldm_jax.config.training import OptimConfig
from ldm_jax.config.validation import (
    DtypeName,
    checked_dataclass,
    require,
    require_at_least,
    require_widths,
)
from ldm_jax.types import InputError

ContextName = Literal["none", "class", "text", "clip", "embedding"]
ConcatName = Literal["none", "low_resolution", "masked_image", "segmentation"]
ScheduleName = Literal["ldm_linear", "linear", "cosine", "flow", "edm"]
PredictionName = Literal["eps", "v", "x0", "flow", "edm"]

CAPTIONS = "captions"
"""In the place of a tokenizer's folder: learn it from the captions."""

GAMMAS = {"min_snr": 5.0, "p2": 1.0, "debiased": 0.5}
LONGEST_AVERAGE = 0.28
"""As a share of training; a uniform average of all of it has 0.289."""


@checked_dataclass
class TextConfig:
    """LDM's own text transformer (also for the box tokens of a layout)."""

    vocab_size: int = 30_522
    """Tokens it knows."""
    length: int = 77
    """Tokens of a prompt, padded."""
    width: int = 640
    """Width of a token, and of the context."""
    depth: int = 32
    """Layers."""
    num_heads: int = 8
    """Heads of every layer."""
    head_width: int = 64
    """Width of a head, whatever the width of a token."""
    positions: Literal["normal", "sinusoids"] = "normal"
    """What the learned vectors of positions start as: noise, or sines and cosines,
    which know from the start what is next to what."""
    embedding_std: float = 0.02
    """Standard deviation of untrained vectors of tokens and positions."""

    def _check(self) -> None:
        counts = "vocab_size length width depth num_heads head_width"
        require_at_least(self, 1, *counts.split())
        require(self, "embedding_std", self.embedding_std > 0, "above 0")
        even = self.positions == "normal" or self.width % 2 == 0
        require(self, "width", even, "an even number for positions of sinusoids")


@checked_dataclass
class ClipConfig:
    """CLIP's text encoder; the defaults are those of ViT-L/14."""

    vocab_size: int = 49_408
    """Tokens it knows."""
    length: int = 77
    """Tokens of a prompt, padded."""
    width: int = 768
    """Width of a token."""
    depth: int = 12
    """Layers."""
    num_heads: int = 12
    """Heads of every layer."""
    mlp_width: int = 3072
    """Width inside each layer's MLP."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Of the MLP: OpenAI's CLIP has `quick_gelu`, OpenCLIP-H has `gelu`."""
    epsilon: float = 1e-5
    """Of the norms."""
    output: Literal["last", "penultimate", "pooled"] = "last"
    """Tokens after the last layer or the one before it, or one projected vector."""
    projection_width: int = 768
    """Width of the projected vector (`pooled`)."""
    eos_token_id: int = 49_407
    """Token that ends a prompt; 2: the largest token of the prompt ends it."""

    def _check(self) -> None:
        counts = "vocab_size length width depth num_heads mlp_width projection_width"
        require_at_least(self, 1, *counts.split())
        divides = self.width % self.num_heads == 0
        require(self, "num_heads", divides, f"a divisor of the width, {self.width}")


@checked_dataclass
class ConditionConfig:
    """What an image is conditioned on; the three ways may be combined."""

    label: bool = False
    """Add a vector of the class to the time embedding."""
    context: ContextName = "none"
    """What cross-attention reads: nothing, the class as one token, LDM's own text
    transformer, CLIP's, or vectors that come with the data."""
    pooled: bool = False
    """Also add the mean of what cross-attention reads to the time embedding: small
    models come to heed texts much sooner."""
    concat: ConcatName = "none"
    """What is stacked on the latent: nothing, the image at low resolution, the image
    with a hole and its mask, or a rescaled segmentation map."""
    class_width: int = 512
    """Width of the class token (`context class`)."""
    embedding_width: int = 768
    """Width of the data's vectors (`context embedding`)."""
    embedding_length: int = 1
    """Number of the data's vectors (`context embedding`)."""
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    """LDM's text transformer (`context text`)."""
    clip: ClipConfig = dataclasses.field(default_factory=ClipConfig)
    """CLIP's text encoder (`context clip`)."""
    trained: bool = True
    """Train the conditioner jointly; otherwise it is frozen, as `weights` has it."""
    weights: str | None = None
    """File or folder of a frozen conditioner's weights."""
    tokenizer: str | None = None
    """Folder with the tokenizer's files, for prompts as words; `captions`: learn one
    from the data's captions, and keep it in the run's folder."""
    low_resolution_factor: int = 4
    """How much smaller the low-resolution image is (`concat low_resolution`)."""
    num_segments: int = 182
    """Classes of the segmentation map (`concat segmentation`)."""
    rescale_stages: int = 2
    """Halvings of the segmentation map."""
    rescale_channels: int = 3
    """Channels the segmentation map is projected to."""

    @property
    def uses_classes(self) -> bool:
        """Whether a class label is read."""
        return self.label or self.context == "class"

    @property
    def uses_tokens(self) -> bool:
        """Whether tokens are read."""
        return self.context in ("text", "clip")

    @property
    def learns_tokenizer(self) -> bool:
        """Whether the tokenizer is learned from the data's captions."""
        return self.tokenizer == CAPTIONS

    @property
    def num_tokens(self) -> int:
        """Tokens of a prompt; 0 if none are read."""
        lengths = {"text": self.text.length, "clip": self.clip.length}
        return lengths.get(self.context, 0)

    @property
    def vocab_size(self) -> int:
        """Tokens that the text encoder knows; 0 if none are read."""
        sizes = {"text": self.text.vocab_size, "clip": self.clip.vocab_size}
        return sizes.get(self.context, 0)

    @property
    def context_width(self) -> int:
        """Width of what cross-attention reads; 0 without it."""
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
        """Whether text is read by an encoder that is not trained."""
        return self.uses_tokens and not self.trained

    def as_vectors(self) -> "ConditionConfig":
        """Return what reads a text encoder's output in the place of the text."""
        pooled = self.context == "clip" and self.clip.output == "pooled"
        return dataclasses.replace(
            self,
            context="embedding",
            embedding_length=1 if pooled else self.num_tokens,
            embedding_width=self.context_width,
            tokenizer=None,
        )

    def concat_channels(self, *, image_channels: int, latent_channels: int) -> int:
        """Return the channels stacked on the latent."""
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
        reads = self.context != "none" or not self.pooled
        require(self, "pooled", reads, "False where `context` is none")
        learns = not self.learns_tokenizer or self.context == "text"
        require(
            self, "tokenizer", learns, "a folder, or `captions` with `context text`"
        )


@checked_dataclass
class DiffusionConfig:
    """Stage 2: the UNet, the noise schedule and the training."""

    channels: int = 224
    """Channels at full latent resolution."""
    channel_multipliers: tuple[int, ...] = (1, 2, 3, 4)
    """Width of each level; every level but the last halves the resolution."""
    num_res_blocks: int = 2
    """Residual blocks a level (one more on the way up)."""
    attention_downsampling: tuple[int, ...] = (2, 4, 8)
    """Levels with attention, by down-sampling factor (1, 2, 4 ...)."""
    num_heads: int = 8
    """Heads of every attention, where `head_channels` is 0."""
    head_channels: int = 0
    """Channels of a head, so that wider levels have more heads; 0: `num_heads`."""
    transformer_depth: int = 0
    """Blocks of each spatial transformer; 0: plain self-attention. Needed to read a
    context."""
    linear_projection: bool = False
    """Linear instead of 1x1-convolutional projections around a spatial transformer:
    the same function, kept as the weights' files have it."""
    coordinates: bool = False
    """Give the UNet x and y of every pixel, so that it learns soon where things are."""
    scale_shift_norm: bool = False
    """The time embedding scales and shifts the second norm instead of being added."""
    resblock_updown: bool = False
    """Resample inside ResBlocks instead of by strided convolutions."""
    num_groups: int = 32
    """Groups of every group norm; must divide every width."""
    norm_epsilon: float = 1e-5
    """Of the group norms outside spatial transformers (those have 1e-6)."""
    remat: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    dtype: DtypeName = "float32"
    """Compute dtype; parameters, softmax, statistics and losses stay float32."""
    condition: ConditionConfig = dataclasses.field(default_factory=ConditionConfig)
    """What it is conditioned on."""
    condition_dropout: float = 0.1
    """Probability of training an example without its condition, in [0, 1]."""
    prediction: PredictionName = "eps"
    """What the network predicts: the noise, the velocity, the clean latent, the flow
    from latent to noise, or EDM's F."""
    loss: Literal["l1", "l2"] = "l2"
    """Absolute or squared error of the prediction."""
    loss_weight: Literal["uniform", "min_snr", "p2", "debiased"] = "uniform"
    """How much the squared error counts at a noise level: the same at all, no more than
    at an SNR of gamma (min-SNR), less where there is little noise (P2), or as a power
    of the SNR (debiased: P2's, but for much noise, where it counts more)."""
    loss_weight_gamma: float | None = None
    """Gamma of `loss_weight`, above 0; unset: the paper's, 5 of min-SNR, 1 of P2,
    1/2 of debiased."""
    offset_noise: float = 0.0
    """Weight of noise that all pixels of a channel share, at least 0; 0.1 teaches very
    dark and very bright images."""
    num_timesteps: int = 1000
    """T, the number of noise levels in training; of `flow` and `edm`, whose levels are
    continuous, the scale of the time that the network sees."""
    schedule: ScheduleName = "ldm_linear"
    """Noise levels: linear in the square root of beta, linear in beta, a squared
    cosine, the straight path of flow matching, or EDM's log-normal ratios."""
    beta_start: float = 0.0015
    """First beta of `ldm_linear` and `linear`, in (0, 1)."""
    beta_end: float = 0.0195
    """Last beta of `ldm_linear` and `linear`, in [beta_start, 1)."""
    timestep_shift: float = 1.0
    """Above 1, training meets much noise more often, below 1 little: a time u in [0, 1]
    becomes shift u / (1 + (shift - 1) u). Not of `edm`."""
    zero_terminal_snr: bool = False
    """Rescale the betas so that the last level is noise alone, as sampling starts."""
    sigma_data: float = 1.0
    """Standard deviation of the latents, above 0 (`edm`); they are scaled to 1."""
    sigma_min: float = 0.002
    """Smallest ratio of noise to signal that is sampled from, above 0 (`edm`)."""
    sigma_max: float = 80.0
    """Largest ratio that is sampled from, above `sigma_min` (`edm`)."""
    log_sigma_mean: float = -1.2
    """Mean of the ratio's natural logarithm in training (`edm`)."""
    log_sigma_std: float = 1.2
    """Its standard deviation, above 0 (`edm`)."""
    batch_size: int = 64
    """Latents a step, over all devices."""
    steps: int = 400_000
    """Training steps."""
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    """Optimiser."""
    average_lengths: tuple[float, ...] = ()
    """More averages of the weights, by their lengths as shares of training, above 0, at
    most 0.28; of 0.05 and 0.1 all from 0.02 to 0.25 can be made afterwards."""
    average_snapshots: int = 16
    """How often those are kept, evenly over the stage; each is a file of their size."""

    @property
    def gamma(self) -> float:
        """Gamma of the weight, as it was given or as its paper has it."""
        if self.loss_weight_gamma is not None:
            return self.loss_weight_gamma
        return GAMMAS.get(self.loss_weight, 5.0)

    def _check(self) -> None:
        require_widths(self)
        require(self, "channels", self.channels % 2 == 0, "an even number")
        require_at_least(self, 1, "num_heads", "num_timesteps")
        require_at_least(self, 0, "head_channels", "transformer_depth")
        field = "head_channels" if self.head_channels else "num_heads"
        parts = getattr(self, field)
        heads_fit = all(
            self.channels * multiplier % parts == 0
            for level, multiplier in enumerate(self.channel_multipliers)
            if 2**level in self.attention_downsampling
            or level == len(self.channel_multipliers) - 1
        )
        require(self, field, heads_fit, "a divisor of every width with attention")
        require(self, "norm_epsilon", self.norm_epsilon > 0.0, "above 0")
        self._check_levels()
        self._check_objective()
        lengths = self.average_lengths
        fits = all(0.0 < one <= LONGEST_AVERAGE for one in lengths)
        wanted = f"each above 0, at most {LONGEST_AVERAGE}, and no two the same"
        fits &= len(set(lengths)) == len(lengths)
        require(self, "average_lengths", fits, wanted)
        require_at_least(self, 1, "average_snapshots")
        require(
            self, "condition_dropout", 0.0 <= self.condition_dropout <= 1.0, "0 to 1"
        )
        if self.condition.concat == "segmentation" and not self.condition.trained:
            raise InputError(
                "condition.trained: got False with concat segmentation, wanted True: "
                "the map's projection is trained"
            )
        if self.condition.context != "none" and not self.transformer_depth:
            raise InputError(
                f"transformer_depth: got 0 with condition.context "
                f"{self.condition.context}, wanted at least 1 to read it"
            )

    def _check_levels(self) -> None:
        require(self, "beta_start", 0.0 < self.beta_start < 1.0, "above 0, below 1")
        require(
            self,
            "beta_end",
            self.beta_start <= self.beta_end < 1.0,
            "beta_start to below 1",
        )
        for name in ("sigma_data", "sigma_min", "log_sigma_std"):
            require(self, name, getattr(self, name) > 0.0, "above 0")
        require(self, "sigma_max", self.sigma_max > self.sigma_min, "above sigma_min")
        require(self, "timestep_shift", self.timestep_shift > 0.0, "above 0")
        shifts = self.schedule != "edm" or self.timestep_shift == 1.0
        wanted = "1 with schedule edm; try --diffusion.log-sigma-mean"
        require(self, "timestep_shift", shifts, wanted)
        if self.zero_terminal_snr:
            discrete = self.schedule not in ("flow", "edm")
            wanted = f"False with schedule {self.schedule}, which has no betas"
            require(self, "zero_terminal_snr", discrete, wanted)
            wanted = "at least 2 with zero_terminal_snr"
            require(self, "num_timesteps", self.num_timesteps >= 2, wanted)

    def _check_objective(self) -> None:
        require(self, "loss_weight_gamma", self.gamma > 0.0, "above 0")
        if self.loss_weight == "debiased":
            wanted = "at most 1 with loss_weight debiased"
            require(self, "loss_weight_gamma", self.gamma <= 1.0, wanted)
        require_at_least(self, 0, "offset_noise")
        squared = self.loss == "l2" or self.loss_weight == "uniform"
        wanted = f"l2 with loss_weight {self.loss_weight}, a weight of squared errors"
        require(self, "loss", squared, wanted)
        if self.prediction == "eps" and (
            self.schedule == "flow" or self.zero_terminal_snr
        ):
            flow = self.schedule == "flow"
            raise InputError(
                f"prediction: got 'eps' with "
                f"{'schedule flow' if flow else 'zero_terminal_snr'}, wanted v, x0, "
                "flow or edm: where there is noise alone, knowing the noise says "
                f"nothing of the image; try {'flow' if flow else 'v'}"
            )
