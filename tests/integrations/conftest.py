import jax
import pytest


@pytest.fixture(autouse=True)
def compiled_in_haste(request):
    """There are hundreds of small programs in these tests; proofs need what a user compiles."""
    hasty = "in_place" not in request.node.name
    jax.config.update("jax_disable_most_optimizations", hasty)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
