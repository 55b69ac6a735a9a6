"""What a newcomer leans on: light imports, documented names, a true README."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys

import jax
import pytest

import jaxkv

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "jaxkv"

# From the bottom up, as in ARCHITECTURE.md. A file imports from its own floor or lower ones.
FLOORS = [
    {
        "errors",
        "devices",
        "display",
        "text",
        "hf_config",
        "hf_families",
        "html",
        "native",
        "programs",
    },
    {"codecs", "addressing", "paging"},
    {"placement", "newest"},
    {"config"},
    {"kv_cache"},
    {"vectors"},
    {"hybrid"},
    {"model_shape"},
    {"checks", "exported"},
    {"streaming"},
    {"creation", "cache", "rearrange"},
    {"attention"},
    {"policies"},
    {"compression"},
    {"measure", "memory", "sampling", "known_models", "snapshot"},
    {"closures", "model_step"},
    {"decode"},
    {"generation", "engine"},
    {"models", "integrations", "plots"},
    {"commands", "cli", "__main__"},
]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}


def floor_name(module):
    return module.split(".")[1]


def imports(file):
    """The jaxkv modules that a file imports, at any depth."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxkv"):
            names = (
                [f"jaxkv.{alias.name}" for alias in node.names]
                if node.module == "jaxkv"
                else [node.module]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("jaxkv.")]
        yield from names


def test_imports_only_point_down():
    seen = set()
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts == ("__init__",):
            continue
        seen.add(parts[0])
        for module in imports(file):
            if floor_name(module) != "__version__":
                assert FLOOR_OF[floor_name(module)] <= FLOOR_OF[parts[0]], (file, module)
    assert seen == set(FLOOR_OF)


def test_import_is_light():
    code = "import sys, jaxkv; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    heavy = {"flax", "transformers", "torch", "matplotlib", "tokenizers", "rich", "psutil"}
    assert not heavy & loaded


@pytest.mark.parametrize("name", jaxkv.__all__)
def test_public_names_are_documented(name):
    thing = getattr(jaxkv, name)
    documentation = inspect.getdoc(thing)
    assert documentation
    assert ">>>" in documentation, "an example, which is run as a test"
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        assert signature.return_annotation is not inspect.Signature.empty
        takes_more = [name for name in signature.parameters if name != "cache"]
        if len(takes_more) > 1:
            assert "Args:" in documentation
            for parameter in takes_more:
                assert re.search(rf"\b{parameter}\b", documentation), parameter


def test_version_is_the_changelogs():
    assert f"## [{jaxkv.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_top_level_holds_no_more_than_it_should():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    allowed = {"pyproject.toml", "README.md", "ARCHITECTURE.md", "CHANGELOG.md", "LICENSE"}
    allowed |= {"CONTRIBUTING.md", "CITATION.cff", "jaxkv", "tests", "notebooks", "benchmarks"}
    top = {path.split("/")[0] for path in tracked}
    assert {name for name in top if not name.startswith(".")} <= allowed


README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_readmes_python_runs(number, capsys):
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(BLOCKS[number], f"README block {number}", "exec"), {})
    printed = capsys.readouterr().out
    # A comment after a print is what it prints.
    for line in re.findall(r"^print\(cache\) +# (.+)$", BLOCKS[number], re.MULTILINE):
        assert line in printed


def test_the_readme_has_programs():
    assert len(BLOCKS) >= 3
