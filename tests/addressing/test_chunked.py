"""A cache of chunks of the text goes on from a file, and after a rollback, bit for bit."""

import numpy as np
import pytest

import jaxkv
from tests.oracle import random_step, run_step


def test_a_file_and_a_rollback_go_on(tmp_path):
    """Past the end of the second chunk of four, and back to before it."""
    fields = {"num_kv_heads": 2, "head_dim": 4, "codec": jaxkv.Int8(), "batch_size": 2}
    addressing = jaxkv.Chunked(size=4, chunk=3)
    config = jaxkv.KVCacheConfig(2, 32, **fields, addressing=addressing)
    cache = jaxkv.create(config)
    for tokens in (3, 3, 1):
        cache = run_step(cache, *random_step(config, tokens, heads=2, seed=tokens))[0]
    jaxkv.save(cache, tmp_path / "saved")
    step = random_step(config, 3, heads=2)
    gone_on, expected = run_step(cache, *step)
    loaded = jaxkv.load(tmp_path / "saved")
    assert loaded.config == config
    for other in (loaded, jaxkv.truncate(gone_on, 7)):
        np.testing.assert_array_equal(run_step(other, *step)[1], expected)
    with pytest.raises(ValueError, match="the chunked cache has lost tokens"):
        jaxkv.truncate(gone_on, 2)
