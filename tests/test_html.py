"""What a notebook shows of a cache, whatever state it is in."""

import re
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import pytest

import jaxkv

GROUP = jaxkv.KVCacheConfig(2, 64, 2, 4)
RING = GROUP.replace(addressing=jaxkv.Ring(window=8))


def held(tokens, **fields):
    # Under jit too many are no error.
    return jax.jit(jaxkv.advance)(jaxkv.create(GROUP.replace(**fields)), jnp.asarray(tokens))


class Text(HTMLParser):
    """Collects the texts, and fails where a tag is not closed."""

    def __init__(self, html):
        super().__init__()
        self.open, self.texts, self.widths = [], [], re.findall(r"[^-]width: ([\d.]+%)", html)
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_one_sequence():
    shown = Text(held(16)._repr_html_())
    assert shown.texts == [
        "KVCache",
        "2 layers, 2 KV heads x 4, bfloat16, contiguous",
        "16 of 64 tokens",
        "4.1 kB (4,096 bytes)",
    ]
    assert shown.widths == ["25.0%"]


def test_a_ragged_batch_one_of_it_overfull():
    shown = Text(held([3, 74], batch_size=2)._repr_html_())
    assert shown.texts[2:6] == [
        "sequence 0", "3 of 64 tokens", "sequence 1", "74 of 64 tokens, 10 dropped"
    ]  # fmt: skip
    assert shown.widths == ["4.7%", "100.0%"]


def test_a_large_batch_is_told_in_three_lines():
    shown = Text(held([*range(20)], batch_size=20)._repr_html_())
    assert shown.texts[2:-1] == [
        "all 20 sequences", "190 of 1,280 tokens",
        "the fullest, sequence 19", "19 of 64 tokens",
        "the emptiest, sequence 0", "0 of 64 tokens",
    ]  # fmt: skip


def donated():
    cache = held(3)
    jax.jit(lambda cache: jaxkv.advance(cache, 1), donate_argnums=0)(cache)
    return cache


def traced():
    seen = []
    jax.jit(lambda cache: seen.append((repr(cache), cache._repr_html_())) or 0)(held(3))
    return seen[0]


def shapes():
    return jax.eval_shape(lambda: jaxkv.create(GROUP))


@pytest.mark.parametrize(
    ("make", "state"), [(donated, "donated"), (traced, "traced"), (shapes, "shapes alone")]
)
def test_where_nobody_knows_what_it_holds(make, state):
    made = make()
    line, html = made if isinstance(made, tuple) else (repr(made), made._repr_html_())
    assert "? of 64 tokens" in line
    assert Text(html).texts[-1] == f"4.1 kB (4,096 bytes), {state}"


def test_a_hybrid_cache_shows_its_groups():
    config = jaxkv.HybridConfig((GROUP, RING), group_of_layer=(0, 1, 1, 0))
    shown = Text(jaxkv.advance(jaxkv.create(config), 9)._repr_html_())
    assert shown.texts[:2] == ["HybridCache", "4 layers, 8.2 kB (8,192 bytes)"]
    assert shown.texts.count("9 of 64 tokens") == 2


@pytest.mark.filterwarnings("ignore:The chararray class is deprecated")  # treescope's own
def test_treescope():
    treescope = pytest.importorskip("treescope")
    text = treescope.render_to_text(held(3))
    assert text.startswith("KVCache(\n  storage={")
    assert "config=KVCacheConfig(num_layers=2" in text
    hybrid = jaxkv.create(jaxkv.HybridConfig((GROUP,), (0, 0)))
    assert treescope.render_to_text(hybrid).startswith("HybridCache(")
