"""Check what a release uploads: what the archives hold, and that all of them hold the same."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOP = {"hf_gptq_plugin", "hf_gptq_cli", "vllm_plugin"}
NEWEST_GLIBC = 28  # manylinux_2_28: RHEL 8, Debian 10, Ubuntu 18.10


def require(holds: bool, message: str) -> None:
    """Stop with the message where something does not hold."""
    if not holds:
        sys.exit(f"release check failed: {message}")


def main(sdist: Path, wheel: Path, from_sdist: Path, from_tree: Path) -> None:
    """Check the four archives that `.ci/wheel` makes."""
    version = re.search(r'__version__ = "([^"]+)"', (ROOT / "hf_gptq_plugin/version.py").read_text())
    require(version is not None, "hf_gptq_plugin/version.py states no version")
    number = version.group(1)
    check_tag(number)

    require(wheel.name.startswith(f"hf_gptq_plugin-{number}-py3-none-"), f"{wheel.name} is not py3-none")
    platforms = [int(minor) for minor in re.findall(r"manylinux_2_(\d+)_", wheel.name)]
    require(bool(platforms), f"{wheel.name} has no manylinux tag")
    require(min(platforms) <= NEWEST_GLIBC, f"{wheel.name} needs a glibc newer than 2.{NEWEST_GLIBC}")

    files = contents(wheel)
    info = f"hf_gptq_plugin-{number}.dist-info"
    top = {name.split("/")[0] for name in files}
    require(top == {*TOP, info}, f"top-level names of the wheel: {sorted(top)}")
    require("hf_gptq_plugin/_native/libhf_gptq.so" in files, "the wheel has no native library")
    require({f"{name}/py.typed" for name in TOP} <= set(files), "the wheel lacks py.typed")
    license_name = f"{info}/licenses/LICENSE"
    require(files.get(license_name) == (ROOT / "LICENSE").read_bytes(), f"the wheel has no {license_name}")
    stray = [name for name in files if re.search(r"\.(cpp|h|cu|cuh|o|a|pyc)$|(^|/)tests?/", name)]
    require(not stray, f"the wheel ships {stray}")
    metadata = Parser().parsestr(files[f"{info}/METADATA"].decode())
    require(metadata["License-Expression"] == "Apache-2.0", "License-Expression is not Apache-2.0")
    entry_points = files[f"{info}/entry_points.txt"].decode()
    for line in ("hf-gptq = hf_gptq_cli:main", "hf_gptq = vllm_plugin:register"):
        require(line in entry_points, f"entry_points.txt lacks {line!r}")
    needs = [r for r in metadata.get_all("Requires-Dist", []) if re.match(r"vllm\b", r)]
    require(not needs, f"the wheel depends on {needs}; that would overwrite another build of vLLM")

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    missing = [name for name in tracked if name not in packed and not name.startswith(".")]
    require(not missing, f"the sdist lacks {missing}")

    one, other = contents(from_sdist), contents(from_tree)
    differing = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    require(not differing, f"the wheels built from the sdist and from the tree differ in {differing}")
    changed = [n for n, data in one.items() if not n.startswith(info) and files.get(n) != data]
    require(not changed, f"the manylinux tag was not free: {changed} had to be changed")
    print(f"{wheel.name}: {len(files)} files, {wheel.stat().st_size / 1e6:.2f} MB; {sdist.name}: {len(packed)} files.")


def check_tag(version: str) -> None:
    """A tagged commit carries the version of its tag."""
    tags = subprocess.run(["git", "tag", "--points-at", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
    wrong = [tag for tag in tags.stdout.split() if re.fullmatch(r"v\d.*", tag) and tag != f"v{version}"]
    require(not wrong, f"this commit is tagged {wrong}, and hf_gptq_plugin/version.py says {version}")


def contents(wheel: Path) -> dict[str, bytes]:
    """Files of a wheel by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
