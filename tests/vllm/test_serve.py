"""`vllm serve` with the options of the README, over HTTP, against Transformers."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm.version", reason="these tests need vLLM")

# vLLM, and what it imports, warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

START_SECONDS = 240


@pytest.fixture
def server(quantized: Callable[..., Path], adapter: Callable[..., Path], engines: Any, tmp_path: Path) -> Iterator[str]:
    """Address of a server of the base model "base" and the adapter "tuned"."""
    vllm = shutil.which("vllm", path=str(Path(sys.executable).parent))
    if vllm is None:
        pytest.skip("the vllm command is not beside this Python")
    engines.end()  # two would fight for the cores
    checkpoint = quantized(bits=4, group_size=32)
    port = _free_port()
    command = [
        vllm, "serve", str(checkpoint), "--quantization", "hf_gptq", "--enable-lora",
        "--served-model-name", "base", "--lora-modules", f"tuned={adapter(checkpoint, seed=1)}",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
        "--max-lora-rank", "8", "--max-model-len", "64", "--max-num-seqs", "8",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "PYTHONPATH": os.pathsep.join(filter(None, (_metadata(tmp_path), os.environ.get("PYTHONPATH")))),
    }
    log = tmp_path / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(process, f"{address}/health", log)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _metadata(folder: Path) -> str:
    """A path on which a distribution "vllm" is found, or "" where one is installed.

    vLLM's command asks for its version by that name, and fails where it was installed as vllm-cpu.
    """
    try:
        version("vllm")
        return ""
    except PackageNotFoundError:
        metadata = folder / "vllm.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
        return str(folder)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"vllm serve ended with code {process.returncode}:\n{log.read_text()[-4000:]}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"vllm serve did not answer within {START_SECONDS} s:\n{log.read_text()[-4000:]}")


def _complete(address: str, model: str, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Eight greedy tokens from the server, and the log-probability of each."""
    request = {
        "model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 1,
        "ignore_eos": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    body = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(body, timeout=60) as response:
        logprobs = json.load(response)["choices"][0]["logprobs"]
    return [int(token.removeprefix("token_id:")) for token in logprobs["tokens"]], logprobs["token_logprobs"]


def test_base_and_adapter_over_http_match_transformers(
    server: str,
    quantized: Callable[..., Path],
    adapter: Callable[..., Path],
    reference: Any,
    prompts: list[list[int]],
) -> None:
    checkpoint = quantized(bits=4, group_size=32)
    said = []
    for model, path in (("base", None), ("tuned", adapter(checkpoint, seed=1))):
        tokens, values = _complete(server, model, prompts[0])
        expected = reference(checkpoint, path).logprobs(prompts[0], tokens)
        assert expected.argmax(-1).tolist() == tokens
        assert values == pytest.approx(expected.max(-1).values.tolist(), abs=1e-3)
        said.append(tokens)
    assert said[0] != said[1]  # the adapter matters
