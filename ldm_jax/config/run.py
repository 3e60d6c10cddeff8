"""Config of a whole run."""

import dataclasses
from pathlib import Path

from ldm_jax.config.autoencoder import AutoencoderConfig
from ldm_jax.config.diffusion import DiffusionConfig
from ldm_jax.config.training import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ParallelConfig,
    PreviewConfig,
    ScoresConfig,
    StageName,
)
from ldm_jax.config.validation import checked_dataclass, require, require_at_least
from ldm_jax.types import USUAL_PRECISION, InputError, PrecisionName


@checked_dataclass
class Config:
    """A whole run: data, both stages, checkpoints, logs, scores and devices."""

    seed: int = 0
    """Seed of all random numbers, 0 to 4294967295."""
    stages: tuple[StageName, ...] = ("autoencoder", "diffusion")
    """Stages to train, in order; `autoencoder` alone ends after stage 1."""
    first_stage: str | None = None
    """Run folder or weights whose autoencoder is used; unset: train stage 1."""
    max_skipped_steps: int = 0
    """Steps of a stage that may be skipped for a loss or gradient that is not
    finite."""
    precision: PrecisionName = USUAL_PRECISION
    """Products of float32 on GPUs and TPUs: `default` is the fast one of the chip (TF32
    on GPUs, bfloat16 on TPUs), `highest` full float32. On CPUs both are the same."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The data set."""
    autoencoder: AutoencoderConfig = dataclasses.field(
        default_factory=AutoencoderConfig
    )
    """Stage 1: the autoencoder."""
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    """Stage 2: the diffusion model."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """When checkpoints are written."""
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    """When metrics and images are written."""
    sampling: PreviewConfig = dataclasses.field(default_factory=PreviewConfig)
    """How images are made during training and by `ldm sample`."""
    scores: ScoresConfig = dataclasses.field(default_factory=ScoresConfig)
    """Scores during training; may change when the run resumes."""
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    """Devices and processes; may change when the run resumes."""

    @property
    def trained_stages(self) -> tuple[StageName, ...]:
        """The stages that the run trains itself."""
        return self.stages if self.first_stage is None else ("diffusion",)

    @property
    def latent_side(self) -> int:
        """Height and width of a latent."""
        return self.data.image_size // self.autoencoder.downsampling

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a latent."""
        return (self.latent_side, self.latent_side, self.autoencoder.latent_channels)

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the moments of a latent."""
        side, _, channels = self.latent_shape
        is_gaussian = self.autoencoder.regularizer == "kl"
        return (side, side, 2 * channels if is_gaussian else channels)

    @property
    def concat_channels(self) -> int:
        """Channels of the condition that is concatenated to the latent."""
        return self.diffusion.condition.concat_channels(
            image_channels=self.data.image_channels,
            latent_channels=self.autoencoder.latent_channels,
        )

    def _check(self) -> None:
        require(self, "seed", 0 <= self.seed < 2**32, "0 to 4294967295")
        require_at_least(self, 0, "max_skipped_steps")
        allowed = (("autoencoder",), ("autoencoder", "diffusion"))
        require(self, "stages", self.stages in allowed, "autoencoder, or both in order")
        if self.first_stage is not None and "diffusion" not in self.stages:
            raise InputError(
                f"first_stage: got {self.first_stage!r} in a run of stage 1 alone, "
                "wanted none: there would be nothing to train"
            )
        size, factor = self.data.image_size, self.autoencoder.downsampling
        if size % factor:
            raise InputError(
                f"data.image_size: got {size}, wanted a multiple of {factor}, the "
                "autoencoder's down-sampling"
            )
        wanted = self.autoencoder.attention_resolutions
        if len(self.autoencoder.attention_levels(size)) != len(wanted):
            heights = [
                size // 2**i for i in range(len(self.autoencoder.channel_multipliers))
            ]
            raise InputError(
                f"autoencoder.attention_resolutions: got {wanted}, wanted heights of "
                f"its feature maps: {heights}"
            )
        if "diffusion" in self.stages:
            self._check_diffusion()
        self._check_latents()
        self._check_parallel()
        if self.scores.every:
            self._check_scores()

    def _check_latents(self) -> None:
        details = f"data.latents: got {self.data.latents!r}"
        if self.data.latents is None:
            return
        if "diffusion" not in self.stages:
            raise InputError(
                f"{details} in a run of stage 1 alone, wanted none: stage 1 trains "
                "on images"
            )
        if self.diffusion.condition.concat in ("low_resolution", "masked_image"):
            raise InputError(
                f"{details} with diffusion.condition.concat "
                f"{self.diffusion.condition.concat}, wanted none: that needs images, "
                "which a latent cache does not hold"
            )
        if self.data.crop != "center" or self.data.flip:
            field = "crop" if self.data.crop != "center" else "flip"
            raise InputError(
                f"{details} with data.{field} {getattr(self.data, field)}, wanted "
                "none: a latent cache holds the middle square of each image"
            )

    def _check_scores(self) -> None:
        scores, details = self.scores, f"scores.every: got {self.scores.every}"
        if "diffusion" not in self.stages:
            raise InputError(
                f"{details} in a run of stage 1 alone, wanted 0: it draws no samples"
            )
        if scores.every % self.log.every:
            # Otherwise scores would change how many steps a program call makes.
            raise InputError(
                f"{details}, wanted a multiple of log.every, {self.log.every}"
            )
        condition = self.diffusion.condition
        if condition.context == "embedding" or condition.concat != "none":
            raise InputError(
                f"{details} with a model that is conditioned on embeddings or images, "
                "wanted 0, or a model of classes or texts, or without condition"
            )
        if scores.steps > self.diffusion.num_timesteps:
            raise InputError(
                f"scores.steps: got {scores.steps}, wanted 1 to "
                f"diffusion.num_timesteps = {self.diffusion.num_timesteps}"
            )

    def _check_parallel(self) -> None:
        adversary = self.autoencoder.adversary
        parallel = self.parallel
        if parallel.exact_shards:
            if parallel.accumulate > 1:
                raise InputError(
                    f"parallel.accumulate: got {parallel.accumulate}, wanted 1 with "
                    "parallel.reduction exact, whose shards are computed one by one; "
                    "try more --parallel.shards"
                )
            trained = adversary.enabled and "autoencoder" in self.trained_stages
            if trained and adversary.sync_batch_norm:
                raise InputError(
                    "autoencoder.adversary.sync_batch_norm: got True, wanted False "
                    "with parallel.reduction exact, whose statistics are those of a "
                    "shard"
                )
        if self.first_stage is not None or not adversary.enabled:
            return
        if self.parallel.accumulate > 1:
            raise InputError(
                f"parallel.accumulate: got {self.parallel.accumulate}, wanted 1 with "
                "an adversary, whose weight depends on the whole batch; try a smaller "
                "batch or more devices"
            )
        of_shards = parallel.exact_shards or adversary.sync_batch_norm
        if self.parallel.layout == "fsdp" and not of_shards:
            raise InputError(
                "autoencoder.adversary.sync_batch_norm: got False, wanted True under "
                "parallel.layout fsdp, which computes whole batches only"
            )

    def _check_diffusion(self) -> None:
        deepest = 2 ** (len(self.diffusion.channel_multipliers) - 1)
        if self.latent_side % deepest:
            raise InputError(
                f"diffusion.channel_multipliers: got {deepest} as down-sampling, "
                f"wanted a divisor of the latent's side, {self.latent_side}; try fewer "
                "levels"
            )
        if self.sampling.grid_steps > self.diffusion.num_timesteps:
            raise InputError(
                f"sampling.grid_steps: got {self.sampling.grid_steps}, wanted 1 to "
                f"diffusion.num_timesteps = {self.diffusion.num_timesteps}"
            )
        condition = self.diffusion.condition
        if condition.uses_classes and not self.data.num_classes:
            raise InputError(
                "data.num_classes: got 0, wanted at least 1 for a class condition"
            )
        factor_by_concat = {
            "low_resolution": condition.low_resolution_factor,
            "segmentation": 2**condition.rescale_stages,
        }
        factor = factor_by_concat.get(condition.concat, self.autoencoder.downsampling)
        if factor != self.autoencoder.downsampling:
            raise InputError(
                f"diffusion.condition.concat: {condition.concat} is {factor} times "
                f"smaller than the image, wanted {self.autoencoder.downsampling} as "
                "the latent"
            )


def with_tokenizer(config: Config, tokenizer: Path | None) -> Config:
    """Return the config with the folder of a tokenizer, if one is given."""
    return config if tokenizer is None else _set_tokenizer(config, str(tokenizer))


def without_tokenizer(config: Config) -> Config:
    """Return the config without the tokenizer's folder, which only one machine has."""
    return _set_tokenizer(config, None)


def _set_tokenizer(config: Config, tokenizer: str | None) -> Config:
    condition = dataclasses.replace(config.diffusion.condition, tokenizer=tokenizer)
    diffusion = dataclasses.replace(config.diffusion, condition=condition)
    return dataclasses.replace(config, diffusion=diffusion)
