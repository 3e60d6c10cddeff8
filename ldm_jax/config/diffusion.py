"""Config of stage 2: the UNet, the noise levels and the training."""

import dataclasses
from typing import Literal

from ldm_jax.config.condition import ConditionConfig
from ldm_jax.config.training import OptimConfig
from ldm_jax.config.validation import (
    DtypeName,
    checked_dataclass,
    require,
    require_at_least,
    require_widths,
)
from ldm_jax.types import InputError

ScheduleName = Literal["ldm_linear", "linear", "cosine", "flow", "edm"]
PredictionName = Literal["eps", "v", "x0", "flow", "edm"]


GAMMAS = {"min_snr": 5.0, "p2": 1.0, "debiased": 0.5}
LONGEST_AVERAGE = 0.28
"""Longest relative length of an average; a uniform average has 0.289."""


@checked_dataclass
class DiffusionConfig:
    """Stage 2: the UNet, its noise levels and its training."""

    channels: int = 224
    """Channels at full latent resolution."""
    channel_multipliers: tuple[int, ...] = (1, 2, 3, 4)
    """Width of each level, times `channels`; all but the last halve the resolution."""
    num_res_blocks: int = 2
    """Residual blocks of each level (one more on the way up)."""
    attention_downsampling: tuple[int, ...] = (2, 4, 8)
    """Down-sampling factors (1, 2, 4, ...) of the levels with attention."""
    num_heads: int = 8
    """Attention heads, if `head_channels` is 0."""
    head_channels: int = 0
    """Channels of a head, so that wider levels have more heads; 0: use `num_heads`."""
    transformer_depth: int = 0
    """Blocks of each spatial transformer; 0: plain self-attention. A context needs at
    least 1."""
    linear_projection: bool = False
    """Store the projections around a spatial transformer as matrices instead of 1x1
    convolutions; the same function."""
    coordinates: bool = False
    """Give the UNet the x and y of every pixel; it then learns positions faster."""
    scale_shift_norm: bool = False
    """Scale and shift the second norm by the time embedding instead of adding it."""
    resblock_updown: bool = False
    """Resample in residual blocks instead of by strided convolutions."""
    num_groups: int = 32
    """Groups of every group norm; must divide every width."""
    norm_epsilon: float = 1e-5
    """Epsilon of the group norms outside spatial transformers (there 1e-6), above 0."""
    remat: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    dtype: DtypeName = "float32"
    """Compute dtype; parameters, softmax, statistics and losses stay float32."""
    condition: ConditionConfig = dataclasses.field(default_factory=ConditionConfig)
    """Conditions of the UNet."""
    condition_dropout: float = 0.1
    """Probability of training without the condition, in [0, 1]; for guidance."""
    prediction: PredictionName = "eps"
    """Prediction of the UNet: the noise, the velocity, the clean latent, the flow from
    latent to noise, or EDM's F."""
    loss: Literal["l1", "l2"] = "l2"
    """Absolute or squared error of the prediction."""
    loss_weight: Literal["uniform", "min_snr", "p2", "debiased"] = "uniform"
    """Weight of the squared error at a noise level: uniform; capped at an SNR of gamma
    (min-SNR); smaller at little noise (P2); or a power of the SNR (debiased)."""
    loss_weight_gamma: float | None = None
    """Gamma of `loss_weight`, above 0; unset: the paper's: 5 for min-SNR, 1 for P2, 1/2
    for debiased."""
    offset_noise: float = 0.0
    """Weight of noise that is equal in all pixels of a channel, at least 0; with 0.1
    the model learns very dark and very bright images."""
    num_timesteps: int = 1000
    """T, the number of noise levels in training; for `flow` and `edm`, whose levels are
    continuous, the scale of the UNet's time input."""
    schedule: ScheduleName = "ldm_linear"
    """Noise levels: linear in the square root of beta, linear in beta, squared cosine,
    flow matching, or EDM's log-normal ratios."""
    beta_start: float = 0.0015
    """First beta of `ldm_linear` and `linear`, in (0, 1)."""
    beta_end: float = 0.0195
    """Last beta of `ldm_linear` and `linear`, in [beta_start, 1)."""
    timestep_shift: float = 1.0
    """Above 1, training draws high noise levels more often, below 1 low ones: a time u
    in [0, 1] becomes shift u / (1 + (shift - 1) u). Must be 1 for `edm`."""
    zero_terminal_snr: bool = False
    """Rescale the betas so that the last level is pure noise, as in sampling."""
    sigma_data: float = 1.0
    """Standard deviation of the scaled latents, above 0 (`edm`)."""
    sigma_min: float = 0.002
    """Smallest noise level in sampling, above 0 (`edm`)."""
    sigma_max: float = 80.0
    """Largest noise level in sampling, above `sigma_min` (`edm`)."""
    log_sigma_mean: float = -1.2
    """Mean of ln(sigma) in training (`edm`)."""
    log_sigma_std: float = 1.2
    """Standard deviation of ln(sigma) in training, above 0 (`edm`)."""
    batch_size: int = 64
    """Latents of a step on all devices."""
    steps: int = 400_000
    """Training steps."""
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    """Optimizer."""
    average_lengths: tuple[float, ...] = ()
    """Relative lengths of averages kept for post-hoc EMA, each above 0, at most 0.28;
    of 0.05 and 0.1, all lengths from 0.02 to 0.25 can be made after training."""
    average_snapshots: int = 16
    """Snapshots of those averages, evenly over the stage; each holds all of them."""

    @property
    def gamma(self) -> float:
        """Gamma of the loss weight: `loss_weight_gamma`, or its paper's."""
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
                "flow or edm: where there is only noise, the noise does not "
                f"determine the image; try {'flow' if flow else 'v'}"
            )
