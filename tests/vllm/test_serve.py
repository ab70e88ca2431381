"""`vllm serve` with the options of the README, over HTTP, against Transformers."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from vllm_server import serving

pytest.importorskip("vllm.version", reason="these tests need vLLM")

# vLLM, and what it imports, warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def checkpoint(quantized: Callable[..., Path]) -> Path:
    return quantized(bits=4, group_size=32)


@pytest.fixture(scope="module")
def server(checkpoint: Path, adapter: Callable[..., Path], engines: Any) -> Iterator[str]:
    """Address of a server of the base model "base" and the adapters "first" and "second"."""
    engines.end()  # two would fight for the cores
    adapters = [f"{name}={adapter(checkpoint, seed=seed)}" for seed, name in enumerate(("first", "second"), start=1)]
    options = [
        "--quantization", "hf_gptq", "--enable-lora", "--served-model-name", "base", "--lora-modules", *adapters,
        "--max-loras", "4", "--dtype", "float32", "--enforce-eager", "--max-lora-rank", "8", "--max-model-len", "64",
        "--max-num-seqs", "8",
    ]  # fmt: skip
    variables = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with serving(checkpoint, *options, **variables) as address:
        yield address


def _post(address: str, path: str, body: dict[str, Any]) -> Any:
    """The open response; its status is an error's if there was one."""
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=120)


def _request(model: str, prompt: list[int], **more: Any) -> dict[str, Any]:
    """For eight greedy tokens and the log-probability of each."""
    return {
        "model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 1,
        "ignore_eos": True, "return_tokens_as_token_ids": True, **more,
    }  # fmt: skip


def _said(logprobs: dict[str, Any]) -> tuple[list[int], list[float]]:
    return [int(token.removeprefix("token_id:")) for token in logprobs["tokens"]], logprobs["token_logprobs"]


def _complete(address: str, model: str, prompt: list[int]) -> tuple[list[int], list[float]]:
    with _post(address, "/v1/completions", _request(model, prompt)) as response:
        return _said(json.load(response)["choices"][0]["logprobs"])


def _models(address: str) -> set[str]:
    with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as response:
        return {model["id"] for model in json.load(response)["data"]}


def _assert_said(transformers: Any, prompt: list[int], said: tuple[list[int], list[float]]) -> None:
    tokens, values = said
    expected = transformers.logprobs(prompt, tokens)
    assert expected.argmax(-1).tolist() == tokens
    assert values == pytest.approx(expected.max(-1).values.tolist(), abs=1e-3)


def test_base_and_adapters_at_the_same_time(
    server: str, checkpoint: Path, adapter: Callable[..., Path], reference: Any, prompts: list[list[int]]
) -> None:
    """Nine requests at once, of three models: each gets its own model's answer."""
    models = {"base": None, "first": adapter(checkpoint, seed=1), "second": adapter(checkpoint, seed=2)}
    assert _models(server) == set(models)
    requests = [(model, prompt) for prompt in prompts for model in models]
    with ThreadPoolExecutor(len(requests)) as pool:
        said = list(pool.map(lambda request: _complete(server, *request), requests))
    references = {model: reference(checkpoint, path) for model, path in models.items()}
    for (model, prompt), answer in zip(requests, said, strict=True):
        _assert_said(references[model], prompt, answer)
    assert len({tuple(tokens) for tokens, _ in said[: len(models)]}) == len(models)  # the adapters matter


def test_streaming(server: str, prompts: list[list[int]]) -> None:
    chunks = []
    with _post(server, "/v1/completions", _request("first", prompts[1], stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response:
            data = line.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                chunks.append(_said(json.loads(data)["choices"][0]["logprobs"]))
    assert len(chunks) > 1
    tokens, values = _complete(server, "first", prompts[1])
    assert [token for chunk in chunks for token in chunk[0]] == tokens
    assert [value for chunk in chunks for value in chunk[1]] == pytest.approx(values, abs=1e-4)


def test_adapters_come_and_go_while_it_runs(
    server: str, checkpoint: Path, adapter: Callable[..., Path], reference: Any, prompts: list[list[int]]
) -> None:
    path = adapter(checkpoint, seed=3)
    with _post(server, "/v1/load_lora_adapter", {"lora_name": "third", "lora_path": str(path)}) as response:
        assert response.status == 200
    assert "third" in _models(server)
    _assert_said(reference(checkpoint, path), prompts[2], _complete(server, "third", prompts[2]))
    with _post(server, "/v1/unload_lora_adapter", {"lora_name": "third"}) as response:
        assert response.status == 200
    with pytest.raises(urllib.error.HTTPError, match="404"):
        _complete(server, "third", prompts[2])
    _assert_said(reference(checkpoint), prompts[2], _complete(server, "base", prompts[2]))
