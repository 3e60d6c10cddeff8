"""Config of what both stages share: data, optimizer, checkpoints, logs, parallelism."""

from typing import Literal

from ldm_jax.config.validation import (
    MAX_COUNT,
    MAX_SIZE,
    checked_dataclass,
    require,
    require_at_least,
    require_at_most,
)
from ldm_jax.types import ProtocolName, SamplerName

ReductionName = Literal["plain", "exact"]
LayoutName = Literal["pmap", "fsdp"]
AlgorithmName = Literal["adamw", "muon"]
OWN_LATENTS = "own"
"""Value of `latents` with which the run makes the cache in its own folder."""
IMAGES_AT_ONCE = 32
"""Images that a device encodes at once for a latent cache, by default."""


@checked_dataclass
class DataConfig:
    """The data set, and how its images are prepared."""

    source: str = "tfds:digits"
    """Data set: `tfds:NAME`, such as `tfds:digits`, scikit-learn's handwritten digits;
    `folder:PATH`, a folder of images (docs/how_to/own_pictures.md); or
    `builder:FILE.py/CONFIG`, your own TFDS builder, prepared on first use."""
    directory: str | None = None
    """TFDS' data folder; unset: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    train_split: str = "train"
    """Split to train on, in TFDS' notation. A folder without splits has `train`, `test`
    (a twentieth of it, by a hash of the file names) and `all`."""
    test_split: str = "test"
    """Held-out split."""
    image_size: int = 32
    """Height and width of the resized images, in pixels."""
    image_channels: int = 1
    """Channels of an image: 1 for grey, 3 for RGB."""
    num_classes: int = 10
    """Number of classes; 0 if there are none."""
    num_train_examples: int = 1500
    """Number of training examples; 0 if unknown."""
    crop: Literal["center", "random"] = "center"
    """Square crop of a training image: its middle, or a random place along the longer
    side in every epoch."""
    flip: bool = False
    """Flip half of the training examples left to right, at random in every epoch."""
    max_broken_files: int = 0
    """Unreadable files of a folder that are skipped and named; more stop the run."""
    latents: str | None = None
    """Latent cache of the training split: a folder that `ldm cache-latents` made;
    `own`: the run makes it in its folder after stage 1; unset: stage 2 encodes images.
    Does not change the training."""

    def _check(self) -> None:
        kind, _, name = self.source.partition(":")
        named = kind in ("tfds", "folder", "builder") and name != ""
        wanted = "tfds:NAME, folder:PATH or builder:FILE.py; try tfds:digits"
        require(self, "source", named, wanted)
        require_at_least(self, 1, "image_size")
        require_at_most(self, MAX_SIZE, "image_size")
        require(self, "image_channels", self.image_channels in (1, 3), "1 or 3")
        require_at_least(
            self, 0, "num_classes", "num_train_examples", "max_broken_files"
        )


@checked_dataclass
class OptimConfig:
    """AdamW or Muon, with warm-up, gradient clipping and an EMA of the weights."""

    algorithm: AlgorithmName = "adamw"
    """`adamw`, or `muon`: orthogonal updates of matrices, AdamW at the same rate for
    other parameters. Muon trains small networks faster."""
    muon_embeddings: bool = True
    """Whether Muon also updates embedding tables; False leaves them to AdamW, with
    which text embeddings train faster."""
    lr: float = 1e-4
    """Learning rate after warm-up, above 0; not scaled by the batch size."""
    warmup_steps: int = 0
    """First steps, over which the learning rate rises linearly from 0."""
    decay_steps: int = 0
    """Last steps over which the learning rate falls linearly to 0."""
    b1: float = 0.9
    """Adam's decay of the average gradient, in [0, 1)."""
    b2: float = 0.999
    """Adam's decay of the average squared gradient, in [0, 1)."""
    weight_decay: float = 0.0
    """Decoupled weight decay, at least 0."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient, which is scaled down to it; 0: no limit."""
    ema_decay: float = 0.9999
    """Decay of the EMA of the weights, in [0, 1); smaller in the first steps."""

    def _check(self) -> None:
        require(self, "lr", self.lr > 0.0, "above 0")
        require_at_least(
            self, 0, "warmup_steps", "decay_steps", "weight_decay", "clip_norm"
        )
        require(self, "b1", 0.0 <= self.b1 < 1.0, "0 to below 1")
        require(self, "b2", 0.0 <= self.b2 < 1.0, "0 to below 1")
        require(self, "ema_decay", 0.0 <= self.ema_decay < 1.0, "0 to below 1")


@checked_dataclass
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    every: int = 1000
    """Steps between checkpoints, at least 1; the last step always writes one."""
    keep: int = 2
    """Newest checkpoints kept of each stage, at least 1."""

    def _check(self) -> None:
        require_at_least(self, 1, "every", "keep")


@checked_dataclass
class LogConfig:
    """When metrics and images are written."""

    every: int = 20
    """Steps between lines of metrics.jsonl, at least 1."""
    images_every: int = 1000
    """Steps between image grids, at least 1; the last step always draws one."""

    def _check(self) -> None:
        require_at_least(self, 1, "every", "images_every")


@checked_dataclass
class ScoresConfig:
    """Scores of samples during stage 2, as `ldm evaluate` measures them.

    The samples have the seeds 0, 1, ... and the averaged weights. The training does not
    change.
    """

    every: int = 0
    """Steps between measurements, a multiple of log.every; the last step is always
    measured; 0: never."""
    images: int = 1000
    """Samples of a measurement, at least 2; fewer samples give worse FIDs."""
    protocol: ProtocolName = "dataset-classifier"
    """Protocol of the scores (docs/how_to/evaluation.md)."""
    inception: str | None = None
    """Weights of FID's Inception network; needed by all protocols but
    dataset-classifier."""
    sampler: SamplerName = "ddim"
    """Sampler."""
    steps: int = 50
    """Sampling steps, at least 1."""
    guidance_scale: float = 1.0
    """Guidance scale, at least 0; 1 is no guidance."""

    def _check(self) -> None:
        require_at_least(self, 0, "every", "guidance_scale")
        require_at_least(self, 1, "steps")
        require_at_least(self, 2, "images")


@checked_dataclass
class PreviewConfig:
    """How images are made, in the grids of training and by `ldm sample`."""

    chunk: int = 16
    """Images of one sampling call, at least 1; on a chip the bits depend on it."""
    grid_steps: int = 50
    """DDIM steps of the grids of training, at least 1."""
    grid_guidance_scale: float = 2.0
    """Guidance scale of the grids of training, at least 0."""

    def _check(self) -> None:
        require_at_least(self, 1, "chunk", "grid_steps")
        require_at_least(self, 0, "grid_guidance_scale")


@checked_dataclass
class ParallelConfig:
    """How a run is computed on its devices; may change when the run resumes."""

    layout: LayoutName = "pmap"
    """`pmap`: every device holds the whole state. `fsdp`: each holds a part of it."""
    accumulate: int = 1
    """Gradient accumulation: parts of a device's batch, computed one by one."""
    steps_per_dispatch: int = 1
    """Steps in one call of the training program, fewer before logs or checkpoints."""
    reduction: ReductionName = "plain"
    """`plain`: sums over a batch are taken in any order. `exact`: in one order, that of
    `shards`, whatever the number of devices."""
    shards: int = 8
    """Parts of a batch in an exact reduction, a power of two and a multiple of the
    devices; part of what a run is."""
    cpu_devices: int = 1
    """Devices that a CPU is split into, at most one a core; small networks then use the
    cores better. Ignored on GPUs and TPUs."""
    peer_timeout: int = 100
    """Seconds without a heartbeat after which a process counts as dead, at least 10."""
    stall_timeout: int = 1800
    """Seconds of a step after which every thread's stack is printed; 0: never."""

    @property
    def exact_shards(self) -> int:
        """The shards of an exact reduction; 0 for a plain one."""
        return self.shards if self.reduction == "exact" else 0

    def _check(self) -> None:
        require_at_least(self, 1, "accumulate", "steps_per_dispatch", "cpu_devices")
        power = 2 <= self.shards <= 2**16 and self.shards.bit_count() == 1
        require(self, "shards", power, "a power of two from 2 to 65536")
        require_at_least(self, 10, "peer_timeout")
        require_at_least(self, 0, "stall_timeout")
        require_at_most(self, MAX_COUNT, "peer_timeout", "stall_timeout")


StageName = Literal["autoencoder", "diffusion"]
