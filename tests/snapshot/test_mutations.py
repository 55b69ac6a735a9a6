"""Files that chance or malice has changed: refused without a trace, or loaded exactly.

A few hundred by default, 10,000 with ``--hypothesis-profile=nightly``.
"""

import copy
import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxkv
from jaxkv.addressing import KeptByHead
from jaxkv.errors import JaxkvError
from jaxkv.snapshot import container, load, manifest
from tests.snapshot.test_snapshot import filled, small_config

load_module = importlib.import_module("jaxkv.snapshot.load")
FIELDS = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 4}
CACHES = {
    "int8": small_config("int8", **FIELDS),
    "ring": small_config(
        "bfloat16", "ring", batch_size=2, newest=jaxkv.Newest(3, jaxkv.Int8()), **FIELDS
    ),
    "kept": small_config("int8", jaxkv.Kept(4, 5, 1, 1, sums=True), **FIELDS),
    "kept by head": small_config("int8", KeptByHead(4, 4, 5, 1, 1), **FIELDS),
    "cross-attention": jaxkv.HybridConfig(
        (small_config("int8", **FIELDS),),
        group_of_layer=(0, -1),
        cross=(small_config("bfloat16", **FIELDS | {"max_context_length": 4}),),
        cross_of_layer=(-1, 0),
    ),
}
kinds = st.sampled_from(sorted(CACHES))
many = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Kind -> (bytes of a file, what is loaded from it)."""
    folder, found = tmp_path_factory.mktemp("saved"), {}
    for kind, config in CACHES.items():
        if kind.startswith("kept"):
            cache = with_chosen_tokens(filled(config, 2))
        elif kind == "cross-attention":
            cache = with_encoder_tokens(jaxkv.create(config))
        else:
            cache = filled(config, 9 if kind == "int8" else np.array([12, 3]))
        ids = [range(12), range(3)] if kind == "ring" else np.arange(9)
        jaxkv.save(cache, folder / kind, tokens=ids, model="tiny")
        found[kind] = (folder / kind).read_bytes(), contents_of(load(folder / kind))
    return found


def with_chosen_tokens(cache):
    """Nine tokens, of which the first seven are not all kept any more."""
    index = dataclasses.replace(cache.index, lengths=jnp.int32(9))
    if hasattr(index, "with_runs"):
        index = index.with_runs(jnp.full((1, 1), 4))
    return dataclasses.replace(cache, index=index.with_kept(0, jnp.int32([[0, 5, -1, 3]])))


def with_encoder_tokens(cache):
    """Nine tokens of the text, and three of an encoder."""
    vectors = np.random.default_rng(0).standard_normal((4, 9, 1, 4), np.float32)
    cache = jaxkv.append(cache, *vectors[:2], layer=0)
    return jaxkv.advance(jaxkv.write_cross(cache, *vectors[2:, :3], layer=1), 9)


def contents_of(cache):
    return [(leaf.dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(cache)]


def assert_refused_or_exact(path, contents, kind, expected):
    path.write_bytes(contents)
    created = []

    def allocate(config, device):
        created.append(config)
        return jaxkv.create(config, device=device)

    # What a careful caller says: the file has no say in how much is allocated.
    config = CACHES[kind].groups[0]
    options = {"max_context_length": 16, "addressing": config.addressing, "newest": config.newest}
    options["max_encoder_length"] = 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_module, "allocate", allocate)
        cache, error = outcome(path, model="tiny", **options)
    if error is None:
        assert contents_of(cache) == expected
    else:
        assert str(path) in error
        assert not created


def outcome(path, **options):
    """The cache, or what the error says."""
    try:
        return load(path, **options), None
    except JaxkvError as error:
        return None, str(error)


# --- any bytes ---------------------------------------------------------------------------------

places = st.floats(0, 1)
byte_edits = st.one_of(
    st.tuples(st.just("flip"), places, st.integers(1, 255)),
    st.tuples(st.just("write"), places, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("insert"), places, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("delete"), places, st.integers(1, 200)),
    st.tuples(st.just("double"), places, st.integers(1, 200)),
    st.tuples(st.just("cut"), places, st.none()),
)


def edited(contents, edits):
    contents = bytearray(contents)
    for what, where, value in edits:
        place = int(where * max(len(contents) - 1, 0))
        if what == "flip" and contents:
            contents[place] ^= value
        elif what == "write":
            contents[place : place + len(value)] = value
        elif what == "insert":
            contents[place:place] = value
        elif what == "delete":
            del contents[place : place + value]
        elif what == "double":
            contents[place:place] = contents[place : place + value]
        elif what == "cut":
            del contents[place:]
    return bytes(contents)


@many
@given(kind=kinds, edits=st.lists(byte_edits, min_size=1, max_size=3))
def test_changed_bytes(tmp_path, saved, kind, edits):
    contents, expected = saved[kind]
    assert_refused_or_exact(tmp_path / "file", edited(contents, edits), kind, expected)


# --- headers with a valid seal -----------------------------------------------------------------

DEEP = json.loads("[" * 400 + "]" * 400)
hostile = st.sampled_from(
    [None, True, False, 0, 1, -1, 2, 9, 2**31, 2**63, 10**40, 0.5, float("nan"), "", "F64", "I8",
     "Rotated", "a" * 300, [], [0], [[0]], [3, 9], [2**40] * 5, {}, {"kind": "Dense"}, DEEP]
)  # fmt: skip


def paths_in(value, prefix=()):
    yield prefix
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in children:
        yield from paths_in(child, (*prefix, key))


def changed(document, choose, value, how):
    """The document with one of its parts replaced, removed, or doubled under another name."""
    document = copy.deepcopy(document)
    paths = [path for path in paths_in(document) if path]
    *parents, last = paths[int(choose * (len(paths) - 1))]
    parent = document
    for key in parents:
        parent = parent[key]
    if how == "replace":
        parent[last] = value
    elif how == "remove":
        del parent[last]
    elif isinstance(parent, dict):
        parent[f"{last}2"] = value
    else:
        parent.append(value)
    return document


@many
@given(
    kind=kinds,
    part=st.sampled_from(["manifest", "checksums", "tensors"]),
    changes=st.lists(
        st.tuples(places, hostile, st.sampled_from(["replace", "remove", "add"])),
        min_size=1, max_size=2,
    ),
)  # fmt: skip
def test_hostile_headers(tmp_path, saved, kind, part, changes):
    contents, expected = saved[kind]
    length = int.from_bytes(contents[:8], "little")
    table = json.loads(contents[8 : 8 + length])
    metadata = table.pop("__metadata__")
    documents = {
        "manifest": json.loads(metadata["jaxkv"]),
        "checksums": json.loads(metadata["sha256"]),
        "tensors": table,
    }
    for choose, value, how in changes:
        if documents[part]:
            documents[part] = changed(documents[part], choose, value, how)
    texts = [container._canonical(documents[name]) for name in ("manifest", "checksums")]
    sealed = {"jaxkv": texts[0], "sha256": texts[1], "seal": container._seal(*texts)}
    header = container._canonical({"__metadata__": sealed, **documents["tensors"]}).encode()
    header += b" " * (-len(header) % 8)
    forged = len(header).to_bytes(8, "little") + header + contents[8 + length :]
    assert_refused_or_exact(tmp_path / "file", forged, kind, expected)


@many
@given(kind=kinds, choose=places, value=hostile, how=st.sampled_from(["replace", "remove", "add"]))
def test_hostile_files_that_agree_with_themselves(tmp_path, saved, kind, choose, value, how):
    """Another manifest with the tensors that it describes: refused, or a cache without a crash."""
    contents, _ = saved[kind]
    path = tmp_path / "file"
    path.write_bytes(contents)
    forged = changed(container.read_manifest(path), choose, value, how)
    try:
        layout = manifest.read(path, forged).layout()
    except jaxkv.SnapshotError:
        return
    if sum(spec.size_bytes for spec in layout.values()) > 1 << 20:
        return

    def garbage(name):
        return [np.zeros(layout[name].size_bytes, np.uint8)]

    container.write(path, forged, layout, garbage)
    outcome(path, max_context_length=64, addressing=jaxkv.Contiguous())  # any JaxkvError is fine
