"""Which tokens are worth keeping: one file a policy, one row in `POLICIES`."""

from jaxkv.policies.controls import Oracle, Random
from jaxkv.policies.expected_attention import ExpectedAttention
from jaxkv.policies.heavy_hitters import HeavyHitters
from jaxkv.policies.key_diff import KeyDiff
from jaxkv.policies.policy import Policy, StatefulPolicy, attention_weights, query_positions
from jaxkv.policies.query_window import QueryWindow
from jaxkv.policies.recent import SinksAndRecent
from jaxkv.policies.reconstruction import reconstruction_scores
from jaxkv.policies.select import select

# By the names of the papers; the test table walks them. KVzip gives scores too, but has to run
# the model for them: `jaxkv.reconstruction_scores`.
POLICIES: dict[str, Policy] = {
    "streaming_llm": SinksAndRecent(),
    "snapkv": QueryWindow(),
    "tova": QueryWindow(window=1, pool=1, per_head=False),
    "keydiff": KeyDiff(),
    "expected_attention": ExpectedAttention(),
    "h2o": HeavyHitters(),
    "random": Random(),
    "oracle": Oracle(),
}


# What a name alone does not say.
_NEED_MORE = {
    "expected_attention": "the frequencies of the model's rope: ExpectedAttention(frequencies=...)",
    "oracle": "queries that are to come: jaxkv.compress(..., queries=...)",
}


def named_policy(policy: Policy | str) -> Policy:
    """A policy by its name in `POLICIES`; any other is handed back.

    Raises:
      ValueError: a name that there is not, or of a policy that needs more than its name.

    >>> named_policy("snapkv") == QueryWindow()
    True
    """
    if not isinstance(policy, str):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"There is no policy {policy!r}; there are {', '.join(POLICIES)}.")
    if policy in _NEED_MORE:
        raise ValueError(f"The policy {policy!r} needs {_NEED_MORE[policy]}, not its name alone.")
    return POLICIES[policy]


__all__ = [
    "POLICIES",
    "ExpectedAttention",
    "HeavyHitters",
    "KeyDiff",
    "Oracle",
    "Policy",
    "QueryWindow",
    "Random",
    "SinksAndRecent",
    "StatefulPolicy",
    "attention_weights",
    "named_policy",
    "query_positions",
    "reconstruction_scores",
    "select",
]
