"""A cache that is spread over a mesh as a file: what one device would write, and from any file."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import jaxkv
from jaxkv.snapshot import container, inspect, parts
from jaxkv.snapshot.split import Share, Split
from tests.snapshot.test_snapshot import ADDRESSINGS, assign_pages, small_config, with_random_bits

pytestmark = pytest.mark.devices(8)

LENGTHS = np.array([7, 0, 16, 5], np.int32)
NEWEST = jaxkv.Newest(3, jaxkv.Dense("float32"))
# Meshes of 8, 4, 1 and 8 devices again, whatever a cache allows.
WAYS = {
    "heads": ({"heads": 8}, {"heads": 4}, {"heads": 1}, {"heads": 2}),
    "batch": ({"batch": 4, "heads": 2}, {"batch": 4}, {"batch": 1}, {"batch": 2, "heads": 4}),
    "context": (
        {"context": 8},
        {"heads": 2, "context": 2},
        {"context": 1},
        {"batch": 2, "heads": 2, "context": 2},
    ),
}


def over(sizes, axis_type=AxisType.Auto):
    devices = jax.devices()[: np.prod(list(sizes.values()))]
    types = (axis_type,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), types, devices=devices)
    return {"mesh": mesh, "axes": jaxkv.Axes(**{what: what for what in sizes})}


def config_of(codec="int8", addressing="contiguous", **fields):
    return small_config(codec, addressing, **{"num_kv_heads": 8, "batch_size": 4, **fields})


@pytest.mark.slow_cases(r"kind[1-4]")
@pytest.mark.parametrize(
    ("way", "kv_heads", "codec", "kind"),
    [
        ("context", 8, "int8", {}),
        ("batch", 8, "bfloat16", {"addressing": ADDRESSINGS["ring"]}),
        ("heads", 2, "bfloat16", {"newest": NEWEST}),
        ("context", 8, "float32", {"addressing": ADDRESSINGS["paged"], "max_context_length": 32}),
        ("heads", 4, "rotated4-centred", {}),
    ],
)
def test_from_mesh_to_mesh_the_file_stays_what_one_device_wrote(
    tmp_path, way, kv_heads, codec, kind
):
    config = config_of(codec, num_kv_heads=kv_heads, **kind)
    jaxkv.save(with_random_bits(jaxkv.create(config), LENGTHS, None), tmp_path / "one")
    written = (tmp_path / "one").read_bytes()
    (tmp_path / "file").write_bytes(written)
    for number, sizes in enumerate(WAYS[way]):
        axis_type = (AxisType.Auto, AxisType.Explicit)[number % 2]
        cache = jaxkv.load(tmp_path / "file", **over(sizes, axis_type))
        assert cache.spread.mesh.size == np.prod(list(sizes.values()))
        for leaf in jax.tree.leaves(cache):
            assert len(leaf.sharding.device_set) == cache.spread.mesh.size
        jaxkv.save(cache, tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == written
    jaxkv.save(jaxkv.load(tmp_path / "file"), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == written


@pytest.mark.slow
def test_a_hybrid_cache_and_rows_of_a_batch(tmp_path):
    ring = config_of(addressing="ring", num_kv_heads=2)
    config = jaxkv.HybridConfig((ring, dataclasses.replace(config_of(), num_layers=1)), (0, 1, 0))
    one = jaxkv.create(config.replace(batch_size=2))
    one = one.with_groups([with_random_bits(each, LENGTHS[2:], None) for each in one.groups])
    jaxkv.save(one, tmp_path / "file")
    many = jaxkv.create(config, **over({"batch": 2, "heads": 4}))
    many = jaxkv.load(tmp_path / "file", into=many, rows=[3, 0])
    whole = jaxkv.load(tmp_path / "file", into=jaxkv.create(config), rows=[3, 0])
    assert many.lengths.tolist() == [5, 0, 0, 16]
    jax.tree.map(np.testing.assert_array_equal, jaxkv.gather(many), whole)


def test_into_pools_whose_pages_each_device_counts_for_itself(tmp_path):
    config = config_of(addressing=jaxkv.Paged(4, num_pages=16))
    one = with_random_bits(jaxkv.create(config_of()), LENGTHS, None)
    jaxkv.save(one, tmp_path / "file")
    pool = jaxkv.create(config, **over({"batch": 2}))
    table = np.tile(np.arange(8, dtype=np.int32)[::-1].reshape(2, 4), (2, 1))
    pool = jaxkv.load(tmp_path / "file", into=pool.with_pages(table, pool.lengths))
    jaxkv.save(pool, tmp_path / "pool")
    back = jaxkv.load(tmp_path / "pool", addressing=jaxkv.Contiguous())
    jaxkv.save(back, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes()


def test_what_a_mesh_cannot_load_is_refused_and_nothing_is_changed(tmp_path):
    jaxkv.save(with_random_bits(jaxkv.create(config_of()), LENGTHS, None), tmp_path / "file")
    place = over({"batch": 2})
    with pytest.raises(ValueError, match="give device= or axes=, not both"):
        jaxkv.load(tmp_path / "file", device=jax.devices()[0], **place)
    full = jaxkv.create(config_of(max_context_length=8), **place)
    with pytest.raises(jaxkv.CacheFullError, match="holds 16 tokens, and the cache has room for 8"):
        jaxkv.load(tmp_path / "file", into=full)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(full))
    with pytest.raises(jaxkv.ConfigError, match="batch_size must be a multiple of 8"):
        jaxkv.load(tmp_path / "file", **over({"batch": 8}))
    few = assign_pages(jaxkv.create(config_of("float32", batch_size=None)))
    jaxkv.save(jaxkv.compress(few, jaxkv.policies.KeyDiff(), keep=4), tmp_path / "kept")
    with pytest.raises(jaxkv.SnapshotError, match=r"saved after jaxkv.compress.*jaxkv.spread"):
        jaxkv.load(tmp_path / "kept", **over({"heads": 2}))


# --- several files -------------------------------------------------------------------------------


@pytest.fixture
def in_parts(tmp_path):
    """A snapshot in three files, as three processes would write it, and in one."""
    one = tmp_path / "one"
    cache = with_random_bits(jaxkv.create(config_of("rotated4-centred")), LENGTHS, None)
    jaxkv.save(cache, one, tokens=[list(range(length)) for length in LENGTHS], model="mine")
    split = Split(heads=4, context=2)
    shares = list(split.shares)
    saved, file = inspect(one), tmp_path / "file"
    found = parts.Parts("0123456789abcdef", split, (tuple(shares[:3]), tuple(shares[3:]), ()))

    def layout_of(json):
        return saved.layout()

    with container.opened(one, layout_of) as (_, tensors):

        def of_share(name):
            share, rest = parts.share_of(name)
            heads = split.kv_heads(share, 8)
            tensor = tensors[rest]
            if rest in ("0.means", "0.sinks"):
                return [tensor[:, :, heads.start : heads.stop]]
            return [tensor[:, :, share.context :: 2, heads.start : heads.stop]]

        for number in range(3):
            layout = found.layout(number, saved.groups, saved.lengths)
            container.write(found.path(file, number), found.to_json(number), layout, of_share)
        whole = dataclasses.replace(saved, parts=found)
        container.write(file, whole.to_json(), whole.layout(), lambda name: [tensors[name]])
    return file


def part_of(file, number):
    return file.with_name(f"file.0123456789abcdef.{number}-of-3")


def test_parts_are_one_snapshot(in_parts):
    jaxkv.save(
        jaxkv.load(in_parts, model="mine"),
        in_parts.with_name("again"),
        tokens=[list(range(length)) for length in LENGTHS],
        model="mine",
    )
    assert in_parts.with_name("again").read_bytes() == in_parts.with_name("one").read_bytes()
    with pytest.raises(jaxkv.SnapshotError, match="another prompt"):
        jaxkv.load(in_parts, tokens=[[1], [2], [3], [4]])
    with pytest.raises(jaxkv.SnapshotError, match="is one part of a snapshot"):
        jaxkv.load(part_of(in_parts, 0))


def test_a_new_save_takes_the_parts_of_the_old_one_away(in_parts):
    jaxkv.save(jaxkv.create(config_of()), in_parts)
    assert sorted(each.name for each in in_parts.parent.iterdir()) == ["file", "one"]


def test_of_the_parts_only_those_are_opened_that_a_process_needs(in_parts):
    part_of(in_parts, 0).unlink()
    saved = inspect(in_parts)
    wanted = Share(0, 3, 1)  # of the second file
    arguments = in_parts, saved.parts, saved.groups, saved.lengths
    with parts.opened(*arguments, lambda split, share: share == wanted) as tensors:
        assert list(tensors["0.2.codes"].arrays) == [(6, 1)]
    with (
        pytest.raises(jaxkv.SnapshotError, match=r"0-of-3 is missing: .*file is in 3 parts"),
        parts.opened(*arguments, lambda split, share: share.context == 0),
    ):
        pass


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("missing", r"1-of-3 is missing"),
        ("truncated", r"1-of-3 is truncated"),
        ("damaged", r"1-of-3 is damaged: .* fails its checksum"),
        ("of another number", r"1-of-3 is not part 1 of .*file: it says that it is .*'part': 0"),
        ("of another save", r"1-of-3 is not part 1 of .*file: .*'of': 'ffffffffffffffff'"),
    ],
)
def test_a_part_that_is_not_right_is_named_and_nothing_is_changed(in_parts, what, reason):
    part = part_of(in_parts, 1)
    contents = bytearray(part.read_bytes())
    if what == "missing":
        part.unlink()
    elif what == "truncated":
        part.write_bytes(contents[:-1])
    elif what == "damaged":
        contents[-1] ^= 1
        part.write_bytes(contents)
    elif what == "of another number":
        part.write_bytes(part_of(in_parts, 0).read_bytes())
    else:
        other = dataclasses.replace(inspect(in_parts).parts, id="f" * 16)
        container.write(part, other.to_json(1), {}, lambda name: [])
    cache = jaxkv.create(config_of("rotated4-centred"))
    with pytest.raises(jaxkv.SnapshotError, match=reason):
        jaxkv.load(in_parts, into=cache)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
    assert not cache.lengths.any()


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("id", "../0123456789abc", "16 hexadecimal digits"),
        ("split", [1, 4], "three numbers"),
        ("split", [1, 4, True], "must be ints"),
        ("split", [1, 4, 4], "each of 16 shares once"),
        ("split", [1, 3, 2], "each of 6 shares once"),
        ("split", [1, 0, 0], "each of 0 shares once"),
        ("files", [[[0, 0, 0]] * 8], "each of 8 shares once"),
        ("files", 3, "does not describe a cache"),
        (None, None, "expected an object with files, id, split"),
    ],
)
def test_a_split_that_cannot_be_is_refused(in_parts, field, value, reason):
    json_of = inspect(in_parts).to_json()
    json_of = json.loads(json.dumps(json_of))
    if field is None:
        json_of["parts"]["more"] = 1
    else:
        json_of["parts"][field] = value
    container.write(in_parts, json_of, {}, lambda name: [])
    with pytest.raises(jaxkv.SnapshotError, match=reason):
        inspect(in_parts)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ({"addressing": ADDRESSINGS["ring"]}, (1, 1, 2)),
        ({"newest": NEWEST}, (1, 1, 2)),
        ({}, (3, 1, 1)),
        ({}, (1, 3, 1)),
    ],
    ids=str,
)
def test_a_split_that_this_cache_cannot_have_is_refused(kind, sizes):
    split = Split(*sizes)
    found = parts.Parts("0" * 16, split, (tuple(split.shares),))
    with pytest.raises(ValueError, match="cannot be split by"):
        found.check(config_of(**kind))
