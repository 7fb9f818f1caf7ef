"""The rules of the house that code can check."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fastlora
from fastlora_kernels import cpu, gpu, reference

ROOT = Path(__file__).parent.parent
OPS = [
    "dropout_mask", "lora_linear", "lora_linear_backward", "lora_linear_group", "lora_linear_group_backward",
    "lora_linear_mixed", "lora_linear_mixed_backward", "merge_rows", "quantize_rows",
]  # fmt: skip

# A module imports from its own level or one below it.
LEVELS = [
    {"fastlora_kernels"},
    {"fastlora.log", "fastlora.progress"},
    {"fastlora.ops"},
    {"fastlora.layers"},
    {"fastlora.config", "fastlora.init_settings"},
    {"fastlora.models", "fastlora.adapters", "fastlora.inits", "fastlora.quantize", "fastlora.compute",
     "fastlora.patch", "fastlora.prepare", "fastlora.merge"},
    {"fastlora.checkpoints", "fastlora.environment", "fastlora.planning"},
    {"fastlora"},
    {"fastlora.integrations"},
    {"fastlora.quickstart", "fastlora.training"},
    {"fastlora.cli"},
]  # fmt: skip


@pytest.mark.parametrize("room", [cpu, gpu], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", OPS)
def test_rooms_share_names_and_signatures(room, name):
    assert inspect.signature(getattr(room, name)) == inspect.signature(getattr(reference, name))
    assert sorted(room.__all__) == OPS


def module_name(file: Path) -> str:
    relative = file.relative_to(ROOT / "kernels" if "kernels" in file.parts else ROOT).with_suffix("")
    return ".".join(part for part in relative.parts if part != "__init__")


def level(module: str) -> int:
    """The index of the longest listed prefix."""
    prefixes = {name: index for index, names in enumerate(LEVELS) for name in names}
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:length])) in prefixes:
            return prefixes[prefix]
    raise AssertionError(f"{module} is in no level")


def imports_of(file: Path) -> set[str]:
    """The project's modules that a file imports, by whole name."""
    package = module_name(file).split(".") if file.name == "__init__.py" else module_name(file).split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{stem}.{alias.name}" for alias in node.names} if not node.module else {stem}
    return {name for name in found if name.split(".")[0] in ("fastlora", "fastlora_kernels")}


SOURCES = sorted([*(ROOT / "fastlora").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down(file):
    if file == ROOT / "fastlora" / "__init__.py":
        return  # the public names come from every room of the runtime
    own = level(module_name(file))
    for imported in imports_of(file):
        assert level(imported) <= own, f"{module_name(file)} imports {imported}, which stands above it"


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the package of that name on PyPI"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_are_short(file):
    assert len(file.read_text().splitlines()) <= 310


def test_import_is_light():
    """Importing fastlora loads no other library of the field, no GPU, and no Triton."""
    libraries = ["transformers", "peft", "bitsandbytes", "accelerate", "triton", "rich", "matplotlib", "typer"]
    code = (
        "import sys, torch; before = set(sys.modules); import fastlora; "
        f"new = set(sys.modules) - before; print([n for n in {libraries} if n in new], torch.cuda.is_initialized())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] False"


@pytest.mark.parametrize("name", fastlora.__all__)
def test_public_names_are_documented(name):
    assert inspect.getdoc(getattr(fastlora, name))
