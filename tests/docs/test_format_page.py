"""The page that specifies the format says what the package writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pages import DOCS, blocks

from hf_gptq_plugin import GPTQConfig, native
from hf_gptq_plugin.format.grid import QuantizedWeight
from hf_gptq_plugin.format.spec import QuantSpec
from hf_gptq_plugin.nn import ops

PAGE = DOCS / "format.md"


@pytest.fixture(scope="module")
def example() -> dict[str, list[list[float]]]:
    """The names that the worked example defines; its own assertions hold."""
    (block,) = [block for block in blocks(PAGE) if block.language == "python"]
    names: dict[str, list[list[float]]] = {}
    exec(block.text, names)
    return names


def rows(heading: str) -> dict[str, list[str]]:
    """The table behind a heading or words of the page: first cell to the others."""
    text = PAGE.read_text().partition(heading)[2]
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert table, heading
    cells = [[c.strip() for c in line.strip("|\n ").split(" | ")] for line in table[0].splitlines()[2:]]
    return {row[0].replace("`", ""): row[1:] for row in cells}


@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
def test_the_example_is_what_is_written(fmt: str, example: dict[str, list[list[float]]]) -> None:
    group = torch.arange(11, dtype=torch.int32) // 8
    weight = QuantizedWeight(
        torch.tensor(example["codes"], dtype=torch.uint8),
        torch.tensor(example["scales"], dtype=torch.float16),
        torch.tensor(example["zeros"], dtype=torch.int32),
        group,
        QuantSpec(bits=3, group_size=8, sym=False, checkpoint_format=fmt),
    )
    packed = weight.pack()
    table = rows("byte for byte:")
    keys = {
        "qweight": "qweight",
        "qzeros": "qzeros, v1" if fmt == "gptq" else "qzeros, v2",
        "scales": "scales, float16",
    }
    for leaf, key in keys.items():
        shape, data = (cell.strip("`") for cell in table[key])
        assert list(packed[leaf].shape) == json.loads(shape)
        assert packed[leaf].numpy().tobytes() == bytes.fromhex(data)
    assert packed["g_idx"].numpy().tobytes() == bytes.fromhex("00000000" * 8 + "01000000" * 3)
    dense = weight.dequantize()
    assert dense[0, 8] == -5 and dense[1, 8] == 0


def test_every_field_that_is_written_is_specified(
    tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path
) -> None:
    import transformers

    config = GPTQConfig(
        bits=4, group_size=32, dataset=windows, samples=4, seqlen=32, preset="fast", dynamic={"+:.*q_proj": {"bits": 8}}
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny("llama"), quantization_config=config, dtype=torch.float32
    )
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    specified = rows("## The configuration")
    assert set(written) <= set(specified), set(written) - set(specified)
    solver = rows("is ignored by readers")["meta.solver"][0]
    assert set(written["meta"]) == {"quantizer", "solver", "calibration"}
    for name in written["meta"]["solver"]:
        assert f"`{name}`" in solver, name


@pytest.mark.skipif(native.library() is None, reason="the native library lays words out in blocks, and is absent")
def test_the_blocked_layout_is_where_the_page_says() -> None:
    R, N = 3, 37
    words = torch.arange(R * N, dtype=torch.int32).view(R, N)
    blocked = ops._repack(words, 4, None).flatten()
    for r in range(R):
        for n in range(N):
            assert blocked[(n // 16 * R + r) * 16 + n % 16] == words[r, n]
