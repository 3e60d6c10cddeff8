"""Train a latent diffusion model: the same as `ldm train`.

python train.py --config digits --workdir runs/digits
"""

from ldm_jax.cli.main import main

if __name__ == "__main__":
    main("train")
