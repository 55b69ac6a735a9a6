import re
import sys
import types
from pathlib import Path

import pytest

from jaxkv.errors import CheckpointError
from jaxkv.models import Decoder, load
from tests.models.variants import write_checkpoint


@pytest.fixture
def hub(monkeypatch):
    module = types.ModuleType("huggingface_hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def test_name_of_the_hub_is_fetched(hub, tmp_path):
    asked = {}

    def snapshot_download(name, *, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(write_checkpoint("llama", tmp_path))

    hub.snapshot_download = snapshot_download
    model, _ = load("Qwen/Qwen2.5-0.5B")
    assert isinstance(model, Decoder)
    assert asked["name"] == "Qwen/Qwen2.5-0.5B"
    assert not any(Path("pytorch_model.bin").match(pattern) for pattern in asked["patterns"])


def test_hub_that_cannot_be_reached(hub):
    def snapshot_download(name, *, allow_patterns):
        raise OSError("no network")

    hub.snapshot_download = snapshot_download
    with pytest.raises(CheckpointError, match=r"'org/name', and it could not .*: no network"):
        load("org/name")


def test_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # makes the import fail
    with pytest.raises(ImportError, match=r"pip install jaxkv\[hf\]"):
        load("org/name")


@pytest.mark.parametrize("name", ["no-such-folder", "a/b/c", "./here"])
def test_no_such_folder(name):
    with pytest.raises(FileNotFoundError, match=re.escape(repr(name))):
        load(name)


def test_a_folder_named_like_a_repository_is_read_here(hub, tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    write_checkpoint("llama", tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    model, _ = load("org/name")
    assert model.vocab_size == 64
