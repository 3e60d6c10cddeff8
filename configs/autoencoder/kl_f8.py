r"""KL-regularized, 8 times smaller: 256x256 images, 32x32x4 latents.

    ldm train --config autoencoder/kl_f8 \
        --workdir runs/kl_f8 \
        --autoencoder.perceptual-files vgg16.safetensors lpips.safetensors

The autoencoder of LSUN-Churches, of the 1.45B text-to-image model and of
Stable Diffusion.

From the released config: Adam with a learning rate of 4.5e-6 for each image of the
batch, so 1.8e-5 for the global batch of 4, for both players, without warm-up or
clipping; the adversary joins after 50,001 steps.
The latent scale is measured after training, to a standard deviation of 1.

Published, of the released weights on ImageNet's validation images (model zoo, and
arXiv:2112.10752, tab. 8): rFID 0.90, PSNR 24.19, PSIM 1.02 after 246,803 steps on
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
        autoencoder=first_stage("kl_f8"),
        checkpoint=CheckpointConfig(every=5000, keep=2),
        log=LogConfig(every=100, images_every=5000),
    )
