"""Every number of a run, in frozen dataclasses that check themselves.

A default lives here and nowhere else. This file imports neither JAX nor NumPy, so
that `--help` and a misspelt flag answer at once.
"""

import dataclasses
import hashlib
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from ldm_jax.types import InputError

DtypeName = Literal["float32", "bfloat16"]
T = TypeVar("T")

CONFIG_FILE = "config.json"


class _Checked:
    """Check the type of every field at birth; a subclass adds ranges in `_check`."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = _typed(field.name, field.type, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        self._check()

    def _check(self) -> None:
        """Raise `InputError` for a value out of range."""

    def _want(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise InputError(f"{name}: got {getattr(self, name)!r}, wanted {wanted}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(_Checked):
    """Where the images come from and what they are made into."""

    source: Literal["tfds:digits"] = "tfds:digits"
    """Data set: `tfds:digits` is scikit-learn's handwritten digits."""
    directory: str | None = None
    """Where TFDS keeps data; unset: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    image_size: int = 32
    """Height and width that images are resized to, in pixels."""
    image_channels: int = 1
    """Channels of an image: 1 is grey, 3 is RGB."""
    num_classes: int = 10
    """Classes of the data set."""
    num_train_examples: int = 1500
    """Examples of its training split."""

    def _check(self) -> None:
        self._want("image_size", self.image_size >= 1, "at least 1")
        self._want("image_channels", self.image_channels in (1, 3), "1 or 3")
        self._want("num_classes", self.num_classes >= 1, "at least 1")
        self._want("num_train_examples", self.num_train_examples >= 1, "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig(_Checked):
    """AdamW with linear warm-up, clipping, and an average of the weights."""

    lr: float = 1e-4
    """Learning rate after warm-up; absolute, for the global batch."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    decay_steps: int = 0
    """Last steps over which the learning rate falls linearly to 0."""
    b1: float = 0.9
    """Adam's decay of the gradient average, in [0, 1)."""
    b2: float = 0.999
    """Adam's decay of the squared-gradient average, in [0, 1)."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, at least 0."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; longer ones are scaled down."""
    ema_decay: float = 0.9999
    """Decay of the average of the weights, in [0, 1); shorter at first."""

    def _check(self) -> None:
        self._want("lr", self.lr > 0.0, "above 0")
        self._want("warmup_steps", self.warmup_steps >= 0, "at least 0")
        self._want("decay_steps", self.decay_steps >= 0, "at least 0")
        self._want("b1", 0.0 <= self.b1 < 1.0, "0 to below 1")
        self._want("b2", 0.0 <= self.b2 < 1.0, "0 to below 1")
        self._want("weight_decay", self.weight_decay >= 0.0, "at least 0")
        self._want("clip_norm", self.clip_norm > 0.0, "above 0")
        self._want("ema_decay", 0.0 <= self.ema_decay < 1.0, "0 to below 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(_Checked):
    """Stage 1: the autoencoder and its training."""

    channels: int = 128
    """Channels at full resolution."""
    channel_multipliers: tuple[int, ...] = (1, 2, 4)
    """Width of each level; every level but the last halves the resolution."""
    num_res_blocks: int = 2
    """Residual blocks a level (the decoder has one more)."""
    attention_resolutions: tuple[int, ...] = ()
    """Heights of feature maps, in pixels, that get self-attention."""
    mid_attention: bool = True
    """Self-attention at the lowest resolution."""
    latent_channels: int = 3
    """Channels of the latent."""
    num_groups: int = 32
    """Groups of every group norm; must divide every width."""
    dtype: DtypeName = "float32"
    """Compute dtype; parameters, statistics and losses stay float32."""
    reconstruction_loss: Literal["l1", "l2"] = "l1"
    """Absolute or squared error, as a mean over pixels."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence (nats a latent)."""
    batch_size: int = 64
    """Images a step, over all devices."""
    steps: int = 100_000
    """Training steps."""
    scale_batches: int = 100
    """Batches over which the latent scale is measured after training."""
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    """Optimiser."""

    @property
    def downsampling(self) -> int:
        """Pixels of an image per pixel of its latent, along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    def _check(self) -> None:
        _check_network(self)
        self._want("latent_channels", self.latent_channels >= 1, "at least 1")
        self._want("kl_weight", self.kl_weight >= 0.0, "at least 0")
        self._want("scale_batches", self.scale_batches >= 1, "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionConfig(_Checked):
    """Stage 2: the UNet, the noise schedule and the training."""

    channels: int = 224
    """Channels at full latent resolution."""
    channel_multipliers: tuple[int, ...] = (1, 2, 3, 4)
    """Width of each level; every level but the last halves the resolution."""
    num_res_blocks: int = 2
    """Residual blocks a level (one more on the way up)."""
    attention_downsampling: tuple[int, ...] = (2, 4, 8)
    """Levels with self-attention, by down-sampling factor (1, 2, 4 ...)."""
    num_heads: int = 8
    """Heads of every attention; must divide the width of every level that has any."""
    num_groups: int = 32
    """Groups of every group norm; must divide every width."""
    dtype: DtypeName = "float32"
    """Compute dtype; parameters, softmax, statistics and losses stay float32."""
    num_timesteps: int = 1000
    """T, the number of noise levels in training."""
    schedule: Literal["ldm_linear", "linear"] = "ldm_linear"
    """`ldm_linear` is linear in the square root of beta."""
    beta_start: float = 0.0015
    """First beta of the schedule, in (0, 1)."""
    beta_end: float = 0.0195
    """Last beta of the schedule, in [beta_start, 1)."""
    condition_dropout: float = 0.1
    """Probability of training an example without its label, in [0, 1]."""
    batch_size: int = 64
    """Latents a step, over all devices."""
    steps: int = 400_000
    """Training steps."""
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    """Optimiser."""

    def _check(self) -> None:
        _check_network(self)
        self._want("num_heads", self.num_heads >= 1, "at least 1")
        heads_fit = all(
            self.channels * multiplier % self.num_heads == 0
            for level, multiplier in enumerate(self.channel_multipliers)
            if 2**level in self.attention_downsampling
            or level == len(self.channel_multipliers) - 1
        )
        self._want("num_heads", heads_fit, "a divisor of every width with attention")
        self._want("num_timesteps", self.num_timesteps >= 1, "at least 1")
        self._want("beta_start", 0.0 < self.beta_start < 1.0, "above 0, below 1")
        self._want(
            "beta_end", self.beta_start <= self.beta_end < 1.0, "beta_start to below 1"
        )
        self._want("condition_dropout", 0.0 <= self.condition_dropout <= 1.0, "0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(_Checked):
    """When the state is written, and how much of it is kept."""

    every: int = 1000
    """Steps between two checkpoints; the last step always writes one."""
    keep: int = 2
    """Checkpoints kept of each stage."""

    def _check(self) -> None:
        self._want("every", self.every >= 1, "at least 1")
        self._want("keep", self.keep >= 1, "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig(_Checked):
    """When numbers and pictures are written."""

    every: int = 20
    """Steps between two lines of metrics.jsonl."""
    images_every: int = 1000
    """Steps between two grids of pictures; the last step always draws one."""

    def _check(self) -> None:
        self._want("every", self.every >= 1, "at least 1")
        self._want("images_every", self.images_every >= 1, "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(_Checked):
    """How images are made, in training's grids and in `sample.py`."""

    chunk: int = 16
    """Images the network sees at once; part of what fixes the bits of an image."""
    grid_steps: int = 50
    """DDIM steps of training's grids."""
    grid_guidance_scale: float = 2.0
    """Guidance scale of training's grids."""

    def _check(self) -> None:
        self._want("chunk", self.chunk >= 1, "at least 1")
        self._want("grid_steps", self.grid_steps >= 1, "at least 1")
        self._want("grid_guidance_scale", self.grid_guidance_scale >= 0, "at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_Checked):
    """A whole run: data, two stages, and how it is watched."""

    seed: int = 0
    """Root of every random draw, 0 to 4294967295."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Where the images come from."""
    autoencoder: AutoencoderConfig = dataclasses.field(
        default_factory=AutoencoderConfig
    )
    """Stage 1."""
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    """Stage 2."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """When the state is written."""
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    """When numbers and pictures are written."""
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    """How images are made."""

    def _check(self) -> None:
        self._want("seed", 0 <= self.seed < 2**32, "0 to 4294967295")
        size, factor = self.data.image_size, self.autoencoder.downsampling
        if size % factor:
            raise InputError(
                f"data.image_size: got {size}, wanted a multiple of {factor}, the "
                "autoencoder's down-sampling"
            )
        latent = size // factor
        deepest = 2 ** (len(self.diffusion.channel_multipliers) - 1)
        if latent % deepest:
            raise InputError(
                f"diffusion.channel_multipliers: got {deepest} as down-sampling, "
                f"wanted a divisor of the latent's side, {latent}; try fewer levels"
            )
        if self.sampling.grid_steps > self.diffusion.num_timesteps:
            raise InputError(
                f"sampling.grid_steps: got {self.sampling.grid_steps}, wanted 1 to "
                f"diffusion.num_timesteps = {self.diffusion.num_timesteps}"
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a latent."""
        side = self.data.image_size // self.autoencoder.downsampling
        return (side, side, self.autoencoder.latent_channels)


def _check_network(config: AutoencoderConfig | DiffusionConfig) -> None:
    want = config._want
    want("channels", config.channels >= 1, "at least 1")
    multipliers = config.channel_multipliers
    want("channel_multipliers", len(multipliers) >= 1, "at least one level")
    want("channel_multipliers", min(multipliers) >= 1, "each at least 1")
    want("num_res_blocks", config.num_res_blocks >= 1, "at least 1")
    groups_fit = config.num_groups >= 1 and all(
        config.channels * multiplier % config.num_groups == 0
        for multiplier in (1, *multipliers)
    )
    want("num_groups", groups_fit, f"a divisor of {config.channels} and every width")
    even = config.channels % 2 == 0
    want("channels", even or isinstance(config, AutoencoderConfig), "an even number")
    want("batch_size", config.batch_size >= 1, "at least 1")
    want("steps", config.steps >= 1, "at least 1")


def _typed(name: str, annotation: Any, value: Any) -> Any:
    """Return `value` as the field's type, or raise; an int may stand for a float."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    wanted = getattr(annotation, "__name__", str(annotation))
    if origin is Literal:
        if value in args:
            return value
        wanted = "one of " + ", ".join(str(choice) for choice in args)
    elif origin is types.UnionType:
        if value is None or isinstance(value, args):
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_typed(name, args[0], item) for item in value)
        wanted = "a tuple"
    elif annotation is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = float(value)
            if value == value and abs(value) != float("inf"):
                return value
        wanted = "a finite number"
    elif annotation is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        wanted = "a whole number"
    elif isinstance(value, annotation):
        return value
    raise InputError(f"{name}: got {value!r}, wanted {wanted}")


def to_json(config: Config) -> str:
    """Write a config as strict JSON that `from_json` reads back equal."""
    return json.dumps(dataclasses.asdict(config), indent=2, allow_nan=False) + "\n"


def from_json(text: str) -> Config:
    """Read a config that `to_json` wrote.

    Args:
      text: JSON with every field of `Config` and no other.

    Returns:
      The config, equal to the one that was written and with the same digest.

    Raises:
      InputError: If the text is not JSON, a field is missing or unknown, or a value
        is of the wrong type or out of range.
    """
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"config: not JSON ({error})") from None
    return _from_tree(Config, tree, "config")


def _from_tree(cls: type[T], tree: Any, where: str) -> T:
    fields = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    if not isinstance(tree, dict):
        raise InputError(f"{where}: got {tree!r}, wanted an object")
    if wrong := sorted(tree.keys() ^ fields.keys()):
        raise InputError(
            f"{where}: fields missing or unknown: {', '.join(wrong)}; it was written "
            "by another version of ldm_jax"
        )
    values = {
        name: _from_tree(field.type, tree[name], name)
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type)
        else tree[name]
        for name, field in fields.items()
    }
    return cls(**values)


def digest(config: Config) -> str:
    """Return the sha256 of a config, the same for equal configs."""
    text = json.dumps(dataclasses.asdict(config), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def flatten(config: Any) -> dict[str, Any]:
    """Return every leaf of a config under its dotted name."""
    leaves: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            inner = flatten(value)
            leaves |= {f"{field.name}.{name}": leaf for name, leaf in inner.items()}
        else:
            leaves[field.name] = value
    return leaves


def differences(ours: Config, theirs: Config) -> list[str]:
    """Name the fields in which two configs differ, with both values."""
    left, right = flatten(ours), flatten(theirs)
    return [
        f"{name} ({left[name]!r} there, {right[name]!r} here)"
        for name in left
        if left[name] != right[name]
    ]


def read_config(workdir: Path) -> Config:
    """Read the config that made a run.

    Raises:
      InputError: If the folder is not a run.
    """
    path = workdir / CONFIG_FILE
    if not path.is_file():
        raise InputError(
            f"--workdir: {workdir} is not a run (no {CONFIG_FILE}); try the folder "
            "that was given to train.py"
        )
    return from_json(path.read_text())
