"""What both stages share: the optimiser, and when things are written."""

from typing import Literal

from ldm_jax.config.validation import checked_dataclass, require, require_at_least
from ldm_jax.types import ProtocolName, SamplerName

LayoutName = Literal["pmap", "fsdp"]
AlgorithmName = Literal["adamw", "muon"]
OWN_LATENTS = "own"
"""In the place of a cache's folder: the run makes it."""
IMAGES_AT_ONCE = 32
"""That a device encodes for a cache, unless another number is asked for."""


@checked_dataclass
class DataConfig:
    """Where the images come from and what they are made into."""

    source: str = "tfds:digits"
    """Data set: `tfds:NAME`, where `tfds:digits` is scikit-learn's handwritten digits;
    `folder:PATH`, a folder of images (docs/how_to/own_pictures.md); or
    `builder:FILE.py/CONFIG`, a TFDS builder of your own, prepared when it is needed."""
    directory: str | None = None
    """Where TFDS keeps data; unset: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    train_split: str = "train"
    """Split to train on, in TFDS' own notation. A folder that is not split has `train`,
    `test` (a twentieth of it, by the names of the files) and `all`."""
    test_split: str = "test"
    """Split held out."""
    image_size: int = 32
    """Height and width that images are resized to, in pixels."""
    image_channels: int = 1
    """Channels of an image: 1 is grey, 3 is RGB."""
    num_classes: int = 10
    """Classes of the data set; 0 if it has none."""
    num_train_examples: int = 1500
    """Examples of its training split; 0 if it is not known."""
    crop: Literal["center", "random"] = "center"
    """Where a square is cut from an image that is none, in training: from the middle,
    or anywhere along the longer side, anew whenever the image is met."""
    flip: bool = False
    """Whether left and right are exchanged in half of the training examples."""
    max_broken_files: int = 0
    """Files of a folder that cannot be read and may be passed over; they are named."""
    latents: str | None = None
    """Folder of the training split's latents, which `ldm cache-latents` makes; `own`:
    the run makes it, in its own folder, once it has a first stage; unset: stage 2
    encodes images. The same training, and no part of what a run is."""

    def _check(self) -> None:
        kind, _, name = self.source.partition(":")
        named = kind in ("tfds", "folder", "builder") and name != ""
        wanted = "tfds:NAME, folder:PATH or builder:FILE.py; try tfds:digits"
        require(self, "source", named, wanted)
        require_at_least(self, 1, "image_size")
        require(self, "image_channels", self.image_channels in (1, 3), "1 or 3")
        require_at_least(
            self, 0, "num_classes", "num_train_examples", "max_broken_files"
        )


@checked_dataclass
class OptimConfig:
    """AdamW or Muon with linear warm-up, clipping, and an average of the weights."""

    algorithm: AlgorithmName = "adamw"
    """AdamW; or Muon, which makes the updates of matrices orthogonal and leaves all
    else to AdamW at the same rate: small networks learn shapes sooner by it."""
    muon_embeddings: bool = True
    """Whether Muon also moves tables of embeddings, whose rows no product mixes. False
    leaves them to AdamW: words find their neighbours sooner."""
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
    """Decoupled weight decay, at least 0."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient, longer ones are scaled down; 0: no limit."""
    ema_decay: float = 0.9999
    """Decay of the average of the weights, in [0, 1); shorter at first."""

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
    """When the state is written, and how much of it is kept."""

    every: int = 1000
    """Steps between two checkpoints; the last step always writes one."""
    keep: int = 2
    """Checkpoints kept of each stage."""

    def _check(self) -> None:
        require_at_least(self, 1, "every", "keep")


@checked_dataclass
class LogConfig:
    """When numbers and pictures are written."""

    every: int = 20
    """Steps between two lines of metrics.jsonl."""
    images_every: int = 1000
    """Steps between two grids of pictures; the last step always draws one."""

    def _check(self) -> None:
        require_at_least(self, 1, "every", "images_every")


@checked_dataclass
class ScoresConfig:
    """How good samples are while stage 2 is trained: a curve beside the loss.

    The samples are those of `ldm evaluate`, seeds 0 and on with the
    averaged weights, and so are the scores. Training itself stays as it is without.
    """

    every: int = 0
    """Steps between two measurements, a multiple of log.every; the last step is always
    measured; 0: never."""
    images: int = 1000
    """Samples of each; the scores of fewer are worse."""
    protocol: ProtocolName = "dataset-classifier"
    """How they are measured (docs/how_to/evaluation.md)."""
    inception: str | None = None
    """Weights of FID's Inception network, which all protocols but dataset-classifier
    look with."""
    sampler: SamplerName = "ddim"
    """Of the samples."""
    steps: int = 50
    """Denoising steps of the samples."""
    guidance_scale: float = 1.0
    """Guidance scale of the samples; 1 is none."""

    def _check(self) -> None:
        require_at_least(self, 0, "every", "guidance_scale")
        require_at_least(self, 1, "steps")
        require_at_least(self, 2, "images")


@checked_dataclass
class PreviewConfig:
    """How images are made, in training's grids and in `sample.py`."""

    chunk: int = 16
    """Images the network sees at once; part of what fixes the bits of an image."""
    grid_steps: int = 50
    """DDIM steps of training's grids."""
    grid_guidance_scale: float = 2.0
    """Guidance scale of training's grids."""

    def _check(self) -> None:
        require_at_least(self, 1, "chunk", "grid_steps")
        require_at_least(self, 0, "grid_guidance_scale")


@checked_dataclass
class ParallelConfig:
    """How a run is spread over chips and hosts; it may change when a run goes on."""

    layout: LayoutName = "pmap"
    """`pmap`: every chip holds the whole state. `fsdp`: each holds a part of it."""
    accumulate: int = 1
    """Parts a batch is computed in, one after the other; divides each chip's share."""
    steps_per_dispatch: int = 1
    """Steps a chip makes before the host is asked again, where nothing is due."""
    cpu_devices: int = 1
    """Devices that a CPU counts as, at most one a core: each has its share of a batch,
    which small networks use the cores better by. Chips ignore it."""
    peer_timeout: int = 100
    """Seconds without a sign of life after which a process counts as dead."""
    stall_timeout: int = 1800
    """Seconds a step may take before every thread's stack is printed; 0: never."""

    def _check(self) -> None:
        require_at_least(self, 1, "accumulate", "steps_per_dispatch", "cpu_devices")
        require_at_least(self, 10, "peer_timeout")
        require_at_least(self, 0, "stall_timeout")


StageName = Literal["autoencoder", "diffusion"]
