"""The cases that `benchmarks/make_policy_goldens.py` runs kvpress on, and the tests jaxkv."""

from pathlib import Path

import numpy as np

from jaxkv.policies import (
    ExpectedAttention,
    HeavyHitters,
    KeyDiff,
    QueryWindow,
    SinksAndRecent,
)

GOLDENS = Path(__file__).parent / "goldens.npz"
VARIANT = "llama"  # of tests/models/variants.py: GQA, two layers
NUM_TOKENS = 96
RATIO = 0.5  # of the tokens are dropped
PREFIX_IDS = [7, 11, 13]  # stands for KVzip's request to repeat
KVZIP_CHUNK = 40
FREQUENCIES = tuple((10000.0 ** -(np.arange(0, 8, 2) / 8)).astype(np.float32).tolist())

# Name -> (class of kvpress, its options, the same policy here).
CASES = {
    "streaming_llm": ("StreamingLLMPress", {}, SinksAndRecent()),
    "snapkv": ("SnapKVPress", {"window_size": 16}, QueryWindow(window=16)),
    "tova": ("TOVAPress", {}, QueryWindow(window=1, pool=1, per_head=False)),
    "keydiff": ("KeyDiffPress", {}, KeyDiff()),
    "expected_attention": (
        "ExpectedAttentionPress",
        {},
        ExpectedAttention(frequencies=FREQUENCIES),
    ),
    "h2o": ("ObservedAttentionPress", {}, HeavyHitters()),
    "kvzip": ("KVzipPress", {"chunk_size": KVZIP_CHUNK}, None),
}


def context_ids():
    """Token ids of the context, from a seeded stream that numpy promises not to change."""
    return np.random.Generator(np.random.PCG64(5)).integers(0, 64, NUM_TOKENS)
