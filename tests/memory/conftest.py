import gc

import jax
import pytest


@pytest.fixture
def fake_stats(monkeypatch):
    """Make every device report the numbers given, as an accelerator would."""

    def report(**stats):
        monkeypatch.setattr(type(jax.devices()[0]), "memory_stats", lambda device: dict(stats))

    return report


@pytest.fixture
def live_arrays():
    """The identities of all live arrays, to compare before and after."""

    def identities():
        gc.collect()
        return sorted(id(array) for array in jax.live_arrays() if not array.is_deleted())

    return identities
