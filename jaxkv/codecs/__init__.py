"""How a token's key or value vector is stored: one file a codec, one row in `CODECS`."""

from jaxkv.codecs.centred import Centred
from jaxkv.codecs.codec import (
    Codec,
    LeafSpec,
    LeafSpecs,
    Leaves,
    State,
    bitcast,
    bytes_of,
    bytes_per_token,
    container_dtype,
    leaf_specs,
    out_of_containers,
    refuse_gradient,
    state_bytes,
    state_specs,
)
from jaxkv.codecs.dense import Dense
from jaxkv.codecs.float8 import Float8
from jaxkv.codecs.int8 import Int8
from jaxkv.codecs.keys_values import KeysValues
from jaxkv.codecs.offsets import Offsets
from jaxkv.codecs.rope import Rope
from jaxkv.codecs.rotated import Rotated
from jaxkv.codecs.stair import Stair

# The codecs that `plan`, the command line and the test table know, by name.
CODECS: dict[str, Codec] = {
    "float32": Dense("float32"),
    "float16": Dense("float16"),
    "bfloat16": Dense("bfloat16"),
    "int8": Int8(),
    "float8": Float8(),
    "rotated4": Rotated(bits=4),
    "rotated3": Rotated(bits=3),
    "rotated2": Rotated(bits=2),
    "int8-centred": Centred(Int8()),
    "rotated4-centred": Centred(Rotated(bits=4)),
    "rotated2-centred": Centred(Rotated(bits=2)),
    "stair4": Stair(bits=4),
    "stair3": Stair(bits=3),
}

__all__ = [
    "CODECS",
    "Centred",
    "Codec",
    "Dense",
    "Float8",
    "Int8",
    "KeysValues",
    "LeafSpec",
    "LeafSpecs",
    "Leaves",
    "Offsets",
    "Rope",
    "Rotated",
    "Stair",
    "State",
    "bitcast",
    "bytes_of",
    "bytes_per_token",
    "container_dtype",
    "leaf_specs",
    "out_of_containers",
    "refuse_gradient",
    "state_bytes",
    "state_specs",
]
