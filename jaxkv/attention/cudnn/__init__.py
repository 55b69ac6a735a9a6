"""Attention on NVIDIA GPUs through cuDNN, by `jax.nn`."""
