r"""Vector-quantized, 8 times smaller, 256 codes: 256x256 images, 32x32x4 latents.

    ldm train --config autoencoder/vq_f8_n256 \
        --workdir runs/vq_f8_n256 \
        --autoencoder.perceptual-files vgg16.safetensors lpips.safetensors

From the released config: Adam with a learning rate of 4.5e-6 for each image of the
batch, so 4.5e-5 for the global batch of 10, for both players, without warm-up or
clipping; the adversary joins after 250,001 steps.
The codebook's loss is weighted as in the VQ-VAE paper; the released weights were
trained with `--autoencoder.commitment legacy`. Latents are used as they are, unscaled.

Published, of the released weights on ImageNet's validation images (model zoo, and
arXiv:2112.10752, tab. 8): rFID 1.49, PSNR 22.35, PSIM 1.26 after 1,608,649 steps on
OpenImages, 256-pixel crops of images at 384 pixels.
Ours: images are cut to their middle square and resized to 256x256; an EMA of the
weights is kept as well.

Hours: not measured here.
"""

from ldm_jax.config import CheckpointConfig, Config, DataConfig, LogConfig
from ldm_jax.config.presets import first_stage


def get_config() -> Config:
    """Return the config."""
    return Config(
        stages=("autoencoder",),
        data=DataConfig(
            source="tfds:open_images_v4",
            test_split="validation",
            image_size=256,
            image_channels=3,
            num_classes=0,
            num_train_examples=1_743_042,
        ),
        autoencoder=first_stage("vq_f8_n256"),
        checkpoint=CheckpointConfig(every=5000, keep=2),
        log=LogConfig(every=100, images_every=5000),
    )
