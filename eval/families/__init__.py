"""Which features of diffusers work with each family of diffusion transformers: `python -m eval.support`."""
