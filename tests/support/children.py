"""Processes that a test starts side by side."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port")


def launched(arguments: Sequence[object], launcher: Sequence[str] = TORCHRUN) -> str:
    """What `hf-gptq` in two processes, started by a launcher whose last argument is the port, writes to its standard
    output.

    Raises:
        AssertionError: it has failed: what it wrote to its standard error.
    """
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(free_port()), "-m", "hf_gptq_cli", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def outputs(children: Sequence[subprocess.Popen[str]], timeout: float = 600) -> list[str]:
    """What each has written to its standard output, at the end of all of them.

    Raises:
        AssertionError: one has failed: what it wrote to its standard error. Others may wait for it, and are killed.
    """
    failed: list[str] = []

    def output(child: subprocess.Popen[str]) -> str:
        out, err = child.communicate(timeout=timeout)
        if child.returncode:
            failed.append(err)
            for other in children:
                other.kill()
        return out

    try:
        with ThreadPoolExecutor(len(children)) as pool:
            printed = list(pool.map(output, children))
    finally:
        for child in children:
            child.kill()
    assert not failed, failed[0]
    return printed
