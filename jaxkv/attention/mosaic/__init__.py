"""Decode on Hopper GPUs: a Pallas kernel for Mosaic GPU."""
