"""Random walks: any sequence of verbs, each beside the history of what the cache was given."""

import hypothesis
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from hypothesis.stateful import run_state_machine_as_test as run

from tests.walk.caches import MOST_ROWS, Kind, is_pool
from tests.walk.walk import POLICIES, Call, Walk, refused_by_jaxkv

CALLS = [
    Call(1),
    Call(4, options="window", padded=True),
    Call(1, "native", "together", padded=True),
    Call(1, "reference", "sinks", padded=True),
    Call(4, "blockwise", "softcap", padded=True),
    Call(1, options="scale", padded=True, jitted=True),
    Call(4, padded=True, jitted=True),
]
NUMBERS = st.tuples(*[st.integers(0, 6)] * MOST_ROWS)  # one of each sequence


class Machine(RuleBasedStateMachine):
    """A verb that this cache does not have is refused, which leaves all as it was."""

    kind: Kind
    calls = CALLS
    steps = 0

    @initialize(seed=st.integers(0, 99))
    def start(self, seed):
        self.walk = Walk(self.kind.config, seed)

    @invariant()
    def it_is_sound(self):
        if hasattr(self, "walk"):
            self.walk.check()

    def attempt(self, verb, *arguments, **options):
        type(self).steps += 1
        try:
            verb(*arguments, **options)
        except (ValueError, TypeError) as error:
            if not refused_by_jaxkv(error):
                raise
            hypothesis.note(f"refused: {error}")

    @rule(call=st.sampled_from(CALLS), missing=st.tuples(*[st.integers(0, 2)] * MOST_ROWS))
    def step(self, call, missing):
        call = self.calls[CALLS.index(call) % len(self.calls)]
        self.attempt(self.walk.step, call, missing, or_another=True)

    # Again, to be drawn more often.
    @rule(call=st.sampled_from(CALLS), missing=st.tuples(*[st.integers(0, 2)] * MOST_ROWS))
    def another_step(self, call, missing):
        self.step(call, missing)

    @rule()
    def read(self):
        self.attempt(self.walk.read)

    @rule(back=NUMBERS, jitted=st.booleans())
    def truncate(self, back, jitted):
        lengths = np.array(self.walk.history.lengths) - back[: self.walk.num_rows]
        self.attempt(self.walk.truncate, np.maximum(lengths, 0), jitted)

    @rule()
    def reset(self):
        self.attempt(self.walk.reset)

    @rule(policy=st.sampled_from(list(POLICIES)), in_pool=st.booleans())
    def compress(self, policy, in_pool):
        in_pool &= np.ndim(self.kind.keep) == 0 and is_pool(self.walk.cache)
        self.attempt(self.walk.compress, self.kind.keep, policy=policy, in_pool=in_pool)

    @rule(jitted=st.booleans())
    def evict(self, jitted):
        self.attempt(self.walk.evict, jitted)

    @rule(rows=NUMBERS, jitted=st.booleans())
    def select(self, rows, jitted):
        rows = np.array(rows) % self.walk.num_rows
        self.attempt(self.walk.select, rows, jitted)

    @rule()
    def fork(self):
        if self.walk.num_rows < MOST_ROWS:
            self.attempt(self.walk.fork, MOST_ROWS)

    @rule(page=st.integers(0, 4))
    def copy_pages(self, page):
        self.attempt(self.walk.copy_pages, page)

    @rule()
    def give_back(self):
        self.attempt(self.walk.give_back)

    @rule()
    def offload(self):
        if self.kind.offloads:
            self.attempt(self.walk.offload)

    @rule()
    def prefetch(self):
        self.attempt(self.walk.prefetch)

    @rule(into=st.booleans(), order=st.permutations(range(MOST_ROWS)), convert=st.booleans())
    def save_and_load(self, into, order, convert):
        order = [row for row in order if row < self.walk.num_rows]
        self.attempt(self.walk.save_and_load, into, order, convert)


def walk(kind, examples, verbs, seed=None, **settings):
    """So many walks of so many verbs, and how many verbs that were."""
    machine = type("Machine", (Machine,), {"kind": kind})
    run(
        machine if seed is None else hypothesis.seed(seed)(machine),
        settings=hypothesis.settings(
            max_examples=examples,
            stateful_step_count=verbs,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            **settings,
        ),
    )
    return machine.steps
