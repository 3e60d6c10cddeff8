r"""vq_f4 without attention: 8192 codes, 256x256 images, 64x64x3 latents.

    ldm train --config autoencoder/vq_f4_noattn \
        --workdir runs/vq_f4_noattn \
        --autoencoder.perceptual-files vgg16.safetensors lpips.safetensors

The autoencoder of the inpainting model: without attention, decoding a large image needs
less memory.

From the released config: Adam with a learning rate of 4.5e-6 for each image of the
batch, so 3.6e-5 for the global batch of 8, for both players, without warm-up or
clipping; the adversary joins after 11 steps.
A start this early suggests that the released run went on from an earlier one; for a
run from scratch try `--autoencoder.adversary.start-step 250001`.
The codebook's loss is weighted as in the VQ-VAE paper; the released weights were
trained with `--autoencoder.commitment legacy`. Latents are used as they are, unscaled.

Published, of the released weights on ImageNet's validation images (model zoo, and
arXiv:2112.10752, tab. 8): rFID 1.06, PSNR 25.21, PSIM 0.72 after 658,131 steps on
OpenImages, 256-pixel crops.
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
        autoencoder=first_stage("vq_f4_noattn"),
        checkpoint=CheckpointConfig(every=5000, keep=2),
        log=LogConfig(every=100, images_every=5000),
    )
