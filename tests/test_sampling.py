"""Sampling against a plain numpy definition: what may be drawn, how often, and from which seed."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.serve.sampling import RowSampling, Sampling, sample

LOGITS = np.log(np.array([0.05, 0.4, 0.02, 0.25, 0.1, 0.15, 0.03], np.float32))
DRAWS = 10_000

SAMPLINGS = {
    "plain": Sampling(temperature=1.0),
    "hot": Sampling(temperature=2.0),
    "cold": Sampling(temperature=0.5),
    "coldest": Sampling(temperature=1.2e-38),
    "coldest of all": Sampling(temperature=1e-37, top_k=5, top_p=0.8, min_p=0.4),
    "hottest": Sampling(temperature=8e37),
    "top_k": Sampling(temperature=1.0, top_k=3),
    "top_k 1": Sampling(temperature=1.0, top_k=1),
    "top_k of all": Sampling(temperature=1.0, top_k=50),
    "top_p below two": Sampling(temperature=1.0, top_p=0.64),
    "top_p above two": Sampling(temperature=1.0, top_p=0.66),
    "top_p of one": Sampling(temperature=1.0, top_p=0.01),
    "least top_p": Sampling(temperature=1.0, top_p=5e-324),
    "min_p": Sampling(temperature=1.0, min_p=0.2),
    "least min_p": Sampling(temperature=1e-2, min_p=1e-60),
    "min_p 1": Sampling(temperature=1.0, min_p=1.0),
    "hot top_p": Sampling(temperature=2.0, top_p=0.7),
    "hot min_p": Sampling(temperature=2.0, min_p=0.55),
    "all": Sampling(temperature=1.5, top_k=5, top_p=0.8, min_p=0.4),
}


def probabilities(logits, sampling):
    """The documented distribution, in the order of the arguments, a token at a time."""
    logits = np.asarray(logits, np.float64)
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    order = list(np.argsort(-weights))
    kept = order[: sampling.top_k]
    total, nucleus = 0.0, []
    for token in kept:
        if total < sampling.top_p:
            nucleus.append(token)
        total += weights[token] / weights[kept].sum()
    final = [token for token in nucleus if weights[token] >= sampling.min_p * weights[order[0]]]
    result = np.zeros(len(weights))
    result[final] = weights[final] / weights[final].sum()
    return result


def draw(logits, sampling, seeds, positions):
    tokens, logprobs = jax.jit(sample, static_argnums=1)(
        jnp.asarray(logits),
        sampling,
        seeds=jnp.asarray(seeds, jnp.int32),
        positions=jnp.asarray(positions, jnp.int32),
    )
    return np.asarray(tokens), np.asarray(logprobs)


@functools.cache
def draws_of_every_sampling():
    """In one program: the noise, and most of the time to compile, is shared."""
    numbers = jnp.arange(DRAWS)
    logits = jnp.broadcast_to(LOGITS, (DRAWS, len(LOGITS)))

    @jax.jit
    def draw_all(logits, seeds, positions):
        return {
            name: sample(logits, sampling, seeds=seeds, positions=positions)
            for name, sampling in SAMPLINGS.items()
        }

    return draw_all(logits, numbers % 100, numbers)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_draws_have_the_documented_distribution(name):
    expected = DRAWS * probabilities(LOGITS, SAMPLINGS[name])
    tokens, logprobs = draws_of_every_sampling()[name]
    counts = np.bincount(tokens, minlength=len(LOGITS))
    assert set(np.flatnonzero(counts)) == set(np.flatnonzero(expected))
    kept = expected > 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < 30  # with 6 degrees of freedom, 1 in 25,000 seeds would fail
    np.testing.assert_allclose(logprobs, LOGITS[tokens], atol=1e-5)  # of the unfiltered model


def test_greedy_takes_the_most_likely_whatever_the_seed():
    logits = np.array([[0, 3, 1], [7, 7, 2], [-np.inf, -1, -2]], np.float32)
    for seed in (0, 5):
        tokens, logprobs = draw(logits, Sampling(), [seed] * 3, [0, 1, 2])
        assert tokens.tolist() == [1, 0, 1]
        expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(np.exp(logprobs), expected[[0, 1, 2], tokens], rtol=1e-6)


def test_a_row_that_asks_for_its_own_is_drawn_as_where_all_ask_for_it():
    """Beside every other, and where nobody draws, cuts or sorts."""
    every = {**SAMPLINGS, "greedy": Sampling()}
    logits = np.random.default_rng(0).standard_normal((40, 57)).astype(np.float32) * 3
    logits[:7, :7] = LOGITS
    seeds = np.arange(40)
    alone = {name: draw(logits, sampling, seeds, seeds)[0] for name, sampling in every.items()}
    for names in (list(every), ["greedy", "greedy"], ["greedy", "cold", "min_p"]):
        asked = [names[row % len(names)] for row in range(40)]
        rows = RowSampling.of([every[name] for name in asked])
        tokens, _ = jax.jit(sample)(
            jnp.asarray(logits),
            rows,
            seeds=jnp.asarray(seeds, jnp.int32),
            positions=jnp.asarray(seeds, jnp.int32),
        )
        assert tokens.tolist() == [alone[name][row] for row, name in enumerate(asked)]


TIED, FAR_APART = [19, 20, 20, 19.9999], [-3e38, 3e38, -3e38, -np.inf]
NO_DISTRIBUTIONS = [[np.nan, 1, 2, 3], [0, np.inf, 1, 2], [-np.inf] * 4]
ROWS = [TIED] * 2000 + [FAR_APART, *NO_DISTRIBUTIONS]


@functools.cache
def draws_of_extremes(*, spoiled=True):
    """In one program too; with the rows that are no distributions, or others in their place."""
    logits = np.array(ROWS, np.float32)
    if not spoiled:
        logits[-3:] = 0
    names = ("coldest", "hottest", "least top_p", "min_p 1", "all")
    samplings = {name: SAMPLINGS[name] for name in names} | {"greedy": Sampling()}
    return _draw_extremes(logits, tuple(samplings.items()))


@functools.partial(jax.jit, static_argnums=1)
def _draw_extremes(logits, samplings):
    numbers = jnp.arange(len(logits))
    return {
        name: sample(logits, sampling, seeds=numbers, positions=numbers)
        for name, sampling in samplings
    }


@pytest.mark.parametrize("name", ["coldest", "least top_p", "min_p 1"])
def test_equally_likely_tokens_stay_so_with_extreme_arguments(name):
    counts = np.bincount(draws_of_extremes()[name][0][:2000], minlength=4)
    assert counts[[0, 3]].tolist() == [0, 0]
    assert 850 < counts[1] < 1150


@pytest.mark.parametrize("name", ["coldest", "hottest", "least top_p", "min_p 1", "all", "greedy"])
def test_the_logprob_says_where_logits_are_no_distribution(name):
    tokens, logprobs = draws_of_extremes()[name]
    others = len(ROWS) - 3
    assert np.isnan(logprobs[others:]).all()
    assert (tokens[others - 1], logprobs[others - 1]) == (1, 0) or name == "hottest"
    undisturbed = draws_of_extremes(spoiled=False)[name]
    for drawn, without in zip((tokens, logprobs), undisturbed, strict=True):
        assert not np.isnan(without).any()
        assert drawn[:others].tolist() == without[:others].tolist()


def test_bfloat16_logits_are_sampled_in_float32():
    logits = jnp.asarray(np.broadcast_to(LOGITS, (50, 7)), jnp.bfloat16)
    seeds = np.arange(50)
    tokens, logprobs = draw(logits, SAMPLINGS["all"], seeds, seeds)
    same, _ = draw(logits.astype(jnp.float32), SAMPLINGS["all"], seeds, seeds)
    assert tokens.tolist() == same.tolist()
    assert logprobs.dtype == np.float32


def test_a_forbidden_token_is_never_drawn():
    logits = np.where(np.arange(7) % 2, LOGITS, -np.inf)
    rows = np.broadcast_to(logits, (1000, 7))
    tokens, _ = draw(rows, Sampling(temperature=5.0), np.arange(1000), np.zeros(1000))
    assert set(tokens) == {1, 3, 5}


@pytest.mark.parametrize("name", ["plain", "all"])
def test_a_draw_depends_on_its_own_row_seed_and_position_alone(name):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((12, 300), np.float32)
    seeds, positions = rng.integers(0, 2**31 - 1, 12), rng.integers(0, 4096, 12)
    tokens, logprobs = draw(logits, SAMPLINGS[name], seeds, positions)
    shuffled = rng.permutation(12)
    again, _ = draw(logits[shuffled], SAMPLINGS[name], seeds[shuffled], positions[shuffled])
    assert again.tolist() == tokens[shuffled].tolist()
    for row in range(3):
        one = slice(row, row + 1)
        alone = draw(logits[one], SAMPLINGS[name], seeds[one], positions[one])
        assert alone[0] == tokens[one]
        np.testing.assert_allclose(alone[1], logprobs[one], rtol=1e-6)


def test_other_seeds_and_other_positions_give_other_draws():
    flat, zeros, numbers = np.zeros((64, 10_000), np.float32), np.zeros(64), np.arange(64)
    for seeds, positions in [(numbers, zeros), (zeros, numbers), (numbers, numbers)]:
        tokens, _ = draw(flat, Sampling(temperature=1.0), seeds, positions)
        assert len(set(tokens)) > 60


def test_equal_samplings_compile_once():
    chex.clear_trace_counter()
    run = jax.jit(chex.assert_max_traces(sample, n=2), static_argnums=1)
    numbers = jnp.zeros(1, jnp.int32)
    for temperature in (0, 0.0, 1, 1.0):
        sampling = Sampling(temperature=temperature)
        run(jnp.asarray(LOGITS[None]), sampling, seeds=numbers, positions=numbers)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        *(
            ("temperature", value, r"0, or from 1.2e-38 to 8.5e\+37")
            for value in (-0.1, 1e-38, 5e-324, 1e38, float("inf"), float("nan"))
        ),
        ("top_k", 0, "an int of at least 1, or None"),
        ("top_k", -3, "an int of at least 1, or None"),
        ("top_k", 2.5, "an int of at least 1, or None"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.1, "above 0 and at most 1"),
        ("min_p", -0.5, "between 0 and 1"),
        ("min_p", 2.0, "between 0 and 1"),
        ("min_p", float("nan"), "between 0 and 1"),
    ],
)
def test_bad_values(field, value, allowed):
    with pytest.raises(ValueError, match=f"Sampling: {field} must be {allowed}, got ") as caught:
        Sampling(**{field: value})
    assert str(caught.value).endswith(f"got {value}.")


def test_every_bad_value_is_named():
    with pytest.raises(ValueError, match=r"temperature.*; top_k.*; top_p.*; min_p"):
        Sampling(temperature=-1.0, top_k=0, top_p=2.0, min_p=-1.0)
