"""How a token's key or value vector is stored: one file a codec, one row in `CODECS`."""

from jaxkv.codecs.codec import (
    Codec,
    LeafSpecs,
    Leaves,
    bitcast,
    bytes_per_vector,
    container_dtype,
    decode_stored,
)
from jaxkv.codecs.dense import Dense
from jaxkv.codecs.float8 import Float8
from jaxkv.codecs.int8 import Int8

# The codecs that `plan`, the command line and the test table know, by name.
CODECS: dict[str, Codec] = {
    "float32": Dense("float32"),
    "float16": Dense("float16"),
    "bfloat16": Dense("bfloat16"),
    "int8": Int8(),
    "float8": Float8(),
}

__all__ = [
    "CODECS",
    "Codec",
    "Dense",
    "Float8",
    "Int8",
    "LeafSpecs",
    "Leaves",
    "bitcast",
    "bytes_per_vector",
    "container_dtype",
    "decode_stored",
]
