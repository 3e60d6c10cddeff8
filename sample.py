"""Make images with a trained run: the same as `ldm sample`.

python sample.py --workdir runs/digits --labels 0-9 --seeds 0-9 --out samples
"""

from ldm_jax.cli.main import main

if __name__ == "__main__":
    main("sample")
