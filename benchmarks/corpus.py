"""The standard library of Python as a text to learn from, with files held out."""

import gzip
import hashlib
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np

# Between files, and in front of each: a byte that no source file contains.
SEPARATOR = 0
HELD_OUT = pathlib.Path(__file__).parent / "heldout.txt.gz"
_HELD_OUT_BYTES = 1 << 17
# Tables of data rather than code.
_LEFT_OUT = {"encodings", "pydoc_data", "site-packages", "__pycache__"}


def standard_library() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_path("stdlib"))


def split(root: pathlib.Path) -> dict[str, np.ndarray]:
    """Bytes for ``train``, ``validation`` and ``heldout``, by the hash of a file's path."""
    texts = {"train": [], "validation": [], "heldout": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _LEFT_OUT & set(name.parts) or not 200 < path.stat().st_size < 400_000:
            continue
        bucket = hashlib.sha256(name.as_posix().encode()).digest()[0] % 20
        part = {0: "heldout", 1: "validation"}.get(bucket, "train")
        texts[part].append(path.read_bytes().replace(b"\x00", b"") + bytes([SEPARATOR]))
    return {
        part: np.frombuffer(bytes([SEPARATOR]) + b"".join(files), np.uint8)
        for part, files in texts.items()
    }


def write_held_out(root: pathlib.Path) -> None:
    """Commit a sample of the held-out files: evenly spread pieces of 4 KiB."""
    text = split(root)["heldout"]
    starts = np.linspace(0, len(text) - 4096, _HELD_OUT_BYTES // 4096).astype(int)
    sample = b"".join(text[start : start + 4096].tobytes() for start in starts)
    HELD_OUT.write_bytes(gzip.compress(sample, 9, mtime=0))


def held_out() -> np.ndarray:
    """The committed sample, ``[windows, 1024]`` bytes."""
    text = np.frombuffer(gzip.decompress(HELD_OUT.read_bytes()), np.uint8)
    return text.reshape(-1, 1024)


def bits_per_byte(model, windows: np.ndarray, batch_size: int = 16) -> float:
    """Mean cross-entropy in bits of each byte given those before it in its window.

    Args:
      model: ``model(tokens, None) -> (logits, None)``.
      windows: bytes, ``[windows, length]``.
    """

    @jax.jit
    def cross_entropy(model, tokens):
        logits, _ = model(tokens[:, :-1], None)
        logprobs = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1).mean()

    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    nats = [cross_entropy(model, batch.astype(np.int32)) * len(batch) for batch in batches]
    return float(sum(nats)) / len(windows) / float(np.log(2))
