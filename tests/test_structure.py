"""Imports flow one way. What the wheel ships is checked where it is built (`.ci/check_release.py`)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_gptq_plugin"

# Who may import whom, inside the package. Everything else is an error.
ALLOWED: dict[str, set[str]] = {
    "version": set(),
    "native": set(),
    "native_cuda": {"native"},
    "format": set(),
    "solve": {"format", "native"},
    "nn": {"format", "native", "native_cuda"},
    "config": {"format", "solve", "version"},
    "calibrate": {"format", "solve", "nn", "version"},
    "convert": {"format"},
    "train": {"format", "nn", "solve"},
    "hf": {"format", "solve", "nn", "calibrate", "config", "convert", "train", "native", "native_cuda"},
    "diagnose": {"native", "native_cuda", "hf", "version"},
    "demo": {"config", "format", "hf"},
    "": {"config", "format", "hf", "native", "nn", "version"},  # the package's own __init__
}
WITHOUT_TRANSFORMERS = {"convert", "train", "format", "solve", "nn", "native", "native_cuda", "version"}


def room(module: str) -> str:
    """ "hf_gptq_plugin.solve.gptq" -> "solve"; the package itself is ""."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(path: Path, package: str) -> list[str]:
    """Absolute names of the modules that a file imports, those inside functions too."""
    module = [package, *path.relative_to(ROOT / package).with_suffix("").parts]
    if module[-1] == "__init__":
        module.pop()
        base = module
    else:
        base = module[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = base[: len(base) - node.level + 1] if node.level else []
            source = ".".join([*prefix, *([node.module] if node.module else [])])
            # `from .. import native` names a module, `from ..native import x` names what is in one.
            found += [f"{source}.{alias.name}" for alias in node.names] if node.module is None else [source]
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def own_room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


@pytest.mark.parametrize("path", files("hf_gptq_plugin"), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_one_way(path: Path) -> None:
    here = own_room(path)
    for name in imports(path, "hf_gptq_plugin"):
        if name.split(".")[0] == "hf_gptq_plugin":
            target = room(name)
            assert target == here or target in ALLOWED[here], f"{here or 'the package'} imports {name}"
        if here in WITHOUT_TRANSFORMERS:
            assert name.split(".")[0] not in ("transformers", "vllm", "peft"), f"{here} imports {name}"
        assert name.split(".")[0] != "hf_gptq_cli", f"{here} imports {name}: the command line is on top"
        if here != "demo":
            assert name.split(".")[0] not in ("vllm", "vllm_plugin"), f"{here} imports {name}"


def test_the_rules_allow_no_cycle() -> None:
    done: set[str] = set()
    waiting = {name: set(targets) for name, targets in ALLOWED.items()}
    while waiting:
        ready = {name for name, targets in waiting.items() if targets <= done}
        assert ready, f"a cycle among {sorted(waiting)}"
        done |= ready
        for name in ready:
            del waiting[name]


@pytest.mark.parametrize("path", files("vllm_plugin"), ids=lambda p: p.name)
def test_the_vllm_plugin_uses_the_core_only(path: Path) -> None:
    for name in imports(path, "vllm_plugin"):
        if name.split(".")[0] == "hf_gptq_plugin":
            assert room(name) in ("format", "nn"), f"{path.name} imports {name}"


def test_help_loads_neither_pytorch_nor_the_library() -> None:
    program = (
        "import sys; from hf_gptq_cli import app; from typer.testing import CliRunner as R; "
        "assert R().invoke(app, ['quantize', '--help']).exit_code == 0; "
        "print(sorted({'torch', 'transformers', 'numpy', 'hf_gptq_plugin'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_kernels_is_no_python_package() -> None:
    assert list((ROOT / "kernels").rglob("*.py")) == []


def test_nothing_in_the_package_unpickles() -> None:
    for package in ("hf_gptq_plugin", "hf_gptq_cli", "vllm_plugin"):
        for path in files(package):
            modules = {name.split(".")[0] for name in imports(path, package)}
            assert not modules & {"pickle", "dill", "cloudpickle", "shelve", "joblib"}, path
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    assert ast.unparse(node) not in ("torch.load", "torch.serialization.load", "torch.package"), path
