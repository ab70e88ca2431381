"""Checkpoints on disk: damaged, mislabelled and incomplete ones end in one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_gptq_plugin.format import checkpoint, packing
from hf_gptq_plugin.format.grid import QuantizedWeight, natural_groups, quantize
from hf_gptq_plugin.format.spec import BITS, CheckpointError, QuantSpec


def write(path: Path, **tensors: torch.Tensor) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


def test_truncated_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", x=torch.zeros(100))
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=r"a\.safetensors cannot be read.*fetch it again"):
        checkpoint.read_headers([file])


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x80\x04pickle"])
def test_garbage_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        checkpoint.read_headers([file])


def test_pickle_is_not_opened(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(b"anything")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        checkpoint.read_headers([file])


def test_tensor_in_two_files(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.safetensors", x=torch.zeros(1)) for i in range(2)]
    with pytest.raises(CheckpointError, match=r"tensor x stands in 0\.safetensors and in 1\.safetensors"):
        checkpoint.read_headers(files)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800.safetensors"])
def test_a_name_that_no_file_has(tmp_path: Path, name: str) -> None:
    (tmp_path / checkpoint.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=rf"{checkpoint.INDEX} names"):
        checkpoint.weight_files(tmp_path)


def test_act_order_needs_a_group_index() -> None:
    spec = QuantSpec(4, 32, desc_act=True)
    with pytest.raises(CheckpointError, match=r"^m\.g_idx is missing .* desc_act=True"):
        checkpoint.require_g_idx("m", spec, ("qweight", "qzeros", "scales"), 2)
    checkpoint.require_g_idx("m", spec, ("qweight", "qzeros", "scales"), 1)
    checkpoint.require_g_idx("m", spec, checkpoint.TENSORS, 2)
    checkpoint.require_g_idx("m", QuantSpec(4, 32), ("qweight", "qzeros", "scales"), 2)


INT, HALF = torch.zeros(2, 8, dtype=torch.int32), torch.zeros(1, 8, dtype=torch.float16)


@pytest.mark.parametrize("missing", ["qweight", "qzeros", "scales"])
def test_missing_tensor_is_named(tmp_path: Path, missing: str) -> None:
    tensors = {"a.qweight": INT, "a.qzeros": INT, "a.scales": HALF, "a.g_idx": INT[0]}
    del tensors[f"a.{missing}"]
    headers = checkpoint.read_headers([write(tmp_path / "m.safetensors", **tensors)])
    with pytest.raises(CheckpointError, match=rf"a\.{missing} is missing"):
        checkpoint.quantized_modules(headers)


@pytest.mark.parametrize(("leaf", "bad"), [("qweight", INT.float()), ("scales", INT), ("qzeros", INT.long())])
def test_wrong_dtype_is_named(tmp_path: Path, leaf: str, bad: torch.Tensor) -> None:
    tensors = {"a.qweight": INT, "a.qzeros": INT, "a.scales": HALF, f"a.{leaf}": bad}
    headers = checkpoint.read_headers([write(tmp_path / "m.safetensors", **tensors)])
    with pytest.raises(CheckpointError, match=rf"a\.{leaf} has dtype .*; accepted"):
        checkpoint.quantized_modules(headers)


def test_dense_tensors_are_no_modules(tmp_path: Path) -> None:
    tensors = {"a.qweight": INT, "a.qzeros": INT, "a.scales": HALF, "b.weight": HALF, "b.scales": HALF}
    headers = checkpoint.read_headers([write(tmp_path / "m.safetensors", **tensors)])
    assert list(checkpoint.quantized_modules(headers)) == ["a"]


def test_wrong_bits_and_group_are_explained() -> None:
    shapes = QuantSpec(4, 32).shapes(128, 64)
    with pytest.raises(CheckpointError, match=r"m\.qweight has shape \(16, 64\), but bits=8.*bits=4 would fit"):
        checkpoint.check_shapes("m", shapes, QuantSpec(8, 32), 128, 64)
    with pytest.raises(CheckpointError, match=r"group_size=64.*group_size=32 would fit"):
        checkpoint.check_shapes("m", {"scales": shapes["scales"]}, QuantSpec(4, 64), 128, 64)
    with pytest.raises(CheckpointError, match=r"m\.scales has shape \(4, 64\).*not this module's"):
        checkpoint.check_shapes("m", {"scales": shapes["scales"]}, QuantSpec(4, 32), 128, 80)
    checkpoint.check_shapes("m", shapes, QuantSpec(4, 32), 128, 64)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scale_that_is_not_finite(value: float) -> None:
    scales = torch.ones(2, 3, dtype=torch.float16)
    scales[1, 2] = value
    with pytest.raises(CheckpointError, match=r"m\.scales\[1, 2\] is (nan|inf)"):
        checkpoint.check_values("m", scales, None)


@pytest.mark.parametrize("bad", [-1, 2])
def test_group_index_out_of_range(bad: int) -> None:
    with pytest.raises(CheckpointError, match=rf"m\.g_idx holds group {bad}; .* 0 to 1"):
        checkpoint.check_values("m", torch.ones(2, 3), torch.tensor([0, 1, bad]))


def quantized(bits: int, sym: bool, fmt: str) -> dict[str, torch.Tensor]:
    """A random weight on a minmax grid, packed."""
    spec = QuantSpec(bits, 32, sym, checkpoint_format=fmt)
    weight = torch.randn(64, 512)
    parts = weight.view(64, 16, 32)
    if sym:
        scales = 2 * parts.abs().amax(2).T / spec.maxq
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        low, high = parts.amin(2).T, parts.amax(2).T
        scales = (high - low) / spec.maxq
        zeros = torch.round(-low / scales).clamp(*spec.zero_range)
    group = natural_groups(512, 32)
    codes = quantize(weight, scales, zeros, group, bits)
    return QuantizedWeight(codes, scales.half(), zeros.int(), group, spec).pack()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
def test_zero_format_is_read_off_the_values(bits: int, sym: bool, fmt: str, label: str) -> None:
    tensors = quantized(bits, sym, fmt)
    found = checkpoint.zero_format(
        tensors["qweight"], tensors["qzeros"], QuantSpec(bits, 32, sym, checkpoint_format=label), 64
    )
    # One step of an asymmetric 8-bit grid is less than the mean of a weight: the label must decide.
    assert found == (None if bits == 8 and not sym else fmt)


def test_zero_format_weighs_zeros_by_their_inputs() -> None:
    """A short last group has a zero of its own; counted like the others, it would speak for the other format."""
    spec = QuantSpec(3, 32, sym=False)
    group = natural_groups(40, 32)
    zeros = torch.tensor([[2], [6]], dtype=torch.int32).expand(2, 64)
    codes = zeros.T[:, group.long()] + torch.tensor([-1, 1]).repeat(20)
    tensors = packing.pack_codes(codes, 3), packing.pack_zeros(zeros, 3, 0)
    assert checkpoint.zero_format(*tensors, spec, 64, group) == "gptq_v2"
    assert checkpoint.zero_format(*tensors, spec, 64) != "gptq_v2"


def test_zero_format_keeps_silent_without_evidence() -> None:
    # Every code 0 under a middle zero: no weight matrix looks like that, so the label must decide.
    qweight = torch.zeros(16, 64, dtype=torch.int32)
    qzeros = torch.full((4, 8), 0x33333333, dtype=torch.int32)
    assert checkpoint.zero_format(qweight, qzeros, QuantSpec(4, 32, sym=False), 64) is None


def test_agreed_format(caplog: pytest.LogCaptureFixture) -> None:
    assert checkpoint.agreed_format("gptq", {"a": None, "b": "gptq"}) == "gptq"
    assert not caplog.records
    assert checkpoint.agreed_format("gptq", {"a": None, "b": "gptq_v2"}) == "gptq_v2"
    assert "labelled checkpoint_format=gptq but its zero points are stored as gptq_v2" in caplog.text
    with pytest.raises(CheckpointError, match="zero points of a are stored as v1 and those of b as v2"):
        checkpoint.agreed_format("gptq", {"a": "gptq", "b": "gptq_v2"})


def test_written_whole_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OSError, match="disk full"), checkpoint.written_whole(target) as staging:
        (staging / "model.safetensors").write_text("half")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_written_whole_touches_nothing_else(tmp_path: Path) -> None:
    """Other people's files, folders that are there already, a link to another place."""
    place, target = tmp_path / "place", tmp_path / "out"
    (place / "templates").mkdir(parents=True)
    target.symlink_to(place)
    for name in ("model_mine.safetensors", "model.fp16.safetensors", "model-00001-of-00002.safetensors"):
        (place / name).write_text("old")
    with checkpoint.written_whole(target) as staging:
        (staging / "model.safetensors").write_text("new")
        (staging / "templates").mkdir()
        (staging / "templates" / "a.jinja").write_text("new")
    assert target.is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["out", "place"]
    assert sorted(p.name for p in place.iterdir()) == [
        "model.fp16.safetensors", "model.safetensors", "model_mine.safetensors", "templates",
    ]  # fmt: skip
    assert (place / "templates" / "a.jinja").read_text() == "new"
    (place / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"config\.json is a folder"), checkpoint.written_whole(target) as staging:
        (staging / "model-00001-of-00001.safetensors").write_text("newer")
        (staging / "config.json").write_text("newer")
    assert (place / "model.safetensors").read_text() == "new"


def test_written_whole_replaces_and_removes_stale_shards(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.txt"):
        (target / name).write_text("old")
    with checkpoint.written_whole(target) as staging:
        (staging / "config.json").write_text("new")
        (staging / "model.safetensors").write_text("new")
    assert {p.name: p.read_text() for p in target.iterdir()} == {
        "config.json": "new", "model.safetensors": "new", "notes.txt": "old",
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
