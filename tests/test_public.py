"""What a newcomer leans on: light imports, documented names, a true README."""

import ast
import graphlib
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


def floors():
    """Each room with the number of its line on ARCHITECTURE's page."""
    page = (ROOT / "ARCHITECTURE.md").read_text()
    (block,) = re.findall(r"## The floors\n\n```\n(.*?)```", page, re.DOTALL)
    names = [re.split(r" {3,}", line)[0].split() for line in block.splitlines()]
    return {name.rstrip("/"): number for number, line in enumerate(names) for name in line}


def imports(file):
    """The jaxkv modules that a file imports, at any depth."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxkv"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("jaxkv."))


def module_name(file):
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in PACKAGE.rglob("*.py")}


def test_imports_only_point_down_and_never_in_a_circle():
    floor_of, arrows = floors(), {}
    for module, file in MODULES.items():
        if module == "jaxkv":
            continue
        own = module.split(".")[1]
        arrows[module] = {
            other for other in imports(file) if other not in (module, "jaxkv", "jaxkv.__version__")
        }
        for other in arrows[module]:
            room = other.split(".")[1]
            assert room == own or floor_of[room] < floor_of[own], (module, other)
    assert {module.split(".")[1] for module in arrows} == set(floor_of)
    # A package brings all that it imports itself: only modules can be in a circle.
    packages = {module for module in MODULES if MODULES[module].name == "__init__.py"}
    files = {
        module: others - packages for module, others in arrows.items() if module not in packages
    }
    tuple(graphlib.TopologicalSorter(files).static_order())  # raises CycleError


def test_import_is_light():
    code = "import sys, jaxkv; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    heavy = {"flax", "transformers", "torch", "matplotlib", "tokenizers", "rich", "psutil"}
    heavy |= {"gguf", "jinja2"}
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
def test_the_readmes_python_runs(number, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if "integrations.nnx" in BLOCKS[number]:
        try:
            import jaxkv.integrations.nnx  # noqa: F401
        except ImportError as refusal:  # flax 0.11, which Colab has, has not what it needs
            pytest.skip(str(refusal))
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(BLOCKS[number], f"README block {number}", "exec"), {})
    printed = capsys.readouterr().out
    # A comment after a print is what it prints.
    for line in re.findall(r"^print\(cache\) +# (.+)$", BLOCKS[number], re.MULTILINE):
        assert line in printed


def test_the_readme_has_programs():
    assert len(BLOCKS) >= 3
