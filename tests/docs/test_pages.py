"""What the pages say exists, exists: files, functions, options, messages, links of the README."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import DOCS, ROOT, blocks, pages

ROOMS = ("format", "solve", "calibrate", "nn", "train", "convert", "hf")
SOURCES = [*(ROOT / "hf_gptq_plugin").rglob("*.py"), *(ROOT / "vllm_plugin").rglob("*.py")]


def quoted(page: Path) -> set[str]:
    """What stands between backticks outside of fenced blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r"`([^`\n]+)`", text))


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(DOCS)))
def test_names_exist(page: Path) -> None:
    header = (ROOT / "kernels/include/hf_gptq.h").read_text()
    for name in quoted(page):
        if re.fullmatch(r"(hf_gptq_plugin|vllm_plugin|kernels|tests|examples|benchmarks|docs|\.ci)/[\w./-]*", name):
            assert (ROOT / name).exists(), name
        elif re.fullmatch(rf"({'|'.join(ROOMS)})/[\w./]*", name):
            assert (ROOT / "hf_gptq_plugin" / name).exists(), name
        elif name in ("config.json", "nn.Linear"):
            continue  # of others
        elif re.fullmatch(rf"({'|'.join((*ROOMS, 'config', 'native'))})(\.\w+)+", name):
            assert resolves(f"hf_gptq_plugin.{name}"), name
        elif re.fullmatch(r"vllm_plugin\.\w+(\.\w+)*", name):
            assert defined(name), name
        elif re.fullmatch(r"QuantLinear\.\w+", name):
            assert resolves(f"hf_gptq_plugin.nn.linear.{name}"), name
        elif re.fullmatch(r"hf_gptq_[a-z_]+", name) and name not in ("hf_gptq_plugin", "hf_gptq_cli"):
            assert name in header, name


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module or something in one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def defined(dotted: str) -> bool:
    """Whether a name is defined in the file of a module; for modules whose imports may not be installed."""
    package, *rest = dotted.split(".")
    file = ROOT / package / "__init__.py"
    if (ROOT / package / f"{rest[0]}.py").exists():
        file, rest = ROOT / package / f"{rest[0]}.py", rest[1:]
    return not rest or re.search(rf"^(?:def|class) {rest[0]}\b", file.read_text(), re.MULTILINE) is not None


def templates() -> list[str]:
    """Every string of the sources as a regex, with what is filled in left open."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    re.escape(p.value) if isinstance(p, ast.Constant) and isinstance(p.value, str) else ".+?"
                    for p in node.values
                ]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 20:
                text = re.escape(node.value)
                found.append(re.sub(r"%[a-z]", ".+?", text))
    return found


def test_messages_are_the_packages_own() -> None:
    page = DOCS / "troubleshooting.md"
    messages = [" ".join(block.text.split()) for block in blocks(page) if block.language == "text"]
    assert len(messages) > 15
    known = templates()
    for message in messages:
        # The name of a layer may be put before it.
        assert any(re.search(f"(?:^|: ){template}", message) for template in known if len(template) > 25), message


def test_every_option_of_the_config_is_in_the_reference() -> None:
    from hf_gptq_plugin import GPTQConfig

    documented = inspect.getdoc(GPTQConfig) or ""
    for name in inspect.signature(GPTQConfig).parameters:
        if name not in ("stock", "act_group_aware", "modules_in_block_to_quantize"):
            assert re.search(rf"^\s+{name}: ", documented, re.MULTILINE), name


def test_migration_names_real_options() -> None:
    from hf_gptq_plugin.config import _names

    text = (DOCS / "migration.md").read_text().partition("## Options")[2].partition("\n## ")[0]
    assert text.count("\n|") > 20
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("|") and len(cells) == 3:
            theirs = re.findall(r"`(\w+)`", cells[0]) if "accepted, changes nothing" in cells[2] else []
            for name in [*theirs, *re.findall(r"`(\w+)`", cells[1])]:
                assert name in _names(), name


WITH_CODE = [p for p in pages() if p.parent != DOCS / "tutorials" and any(block.run for block in blocks(p))]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(DOCS)))
def test_code_on_other_pages_runs(page: Path, tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(ROOT / "tests/support"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/support/run_page.py", page],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
