"""`python -m ldm_jax.cli`, the same as `ldm`."""

from ldm_jax.cli.main import main

if __name__ == "__main__":
    main()
