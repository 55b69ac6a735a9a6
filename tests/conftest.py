"""Set before jax starts: eight CPU devices, strict promotion, and nothing from the network."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import jax

# Thousands of examples where a test leaves their number open: --hypothesis-profile=nightly.
hypothesis.settings.register_profile("nightly", max_examples=5000)

jax.config.update("jax_numpy_dtype_promotion", "strict")
