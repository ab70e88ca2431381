"""Configuration: what is accepted, what is refused and in which words."""

from __future__ import annotations

from typing import Any

import pytest

from hf_gptq_plugin.format.spec import CheckpointConfig, CheckpointError, QuantSpec, name_matches


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 5), ("bits", "4"), ("bits", True), ("group_size", 0), ("group_size", -2), ("group_size", 1.5),
        ("sym", "yes"), ("desc_act", 1), ("checkpoint_format", "marlin"),
    ],
)  # fmt: skip
def test_impossible_specs_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field}={value!r} is not supported; use"):
        QuantSpec(**{field: value})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "must be a JSON object"),
        ({"quant_method": "awq", "bits": 4}, "quant_method='awq' is not GPTQ"),
        ({"quant_method": ["gptq"], "bits": 4}, r"quant_method=\['gptq'\] must be a string"),
        ({"quant_method": "", "bits": 4}, "quant_method='' is not GPTQ"),
        ({"quant_method": "gptq"}, "has no field 'bits'"),
        ({"bits": 5}, "bits=5 is not supported"),
        ({"bits": 4, "group_size": "all"}, "group_size='all' is not supported"),
        ({"bits": 4, "checkpoint_format": 2}, "checkpoint_format=2 is not supported"),
        ({"bits": 4, "lm_head": "no"}, "lm_head='no'"),
        ({"bits": 4, "dynamic": ["x"]}, "dynamic must map regexes"),
        ({"bits": 4, "dynamic": {"(": {}}}, r"dynamic\['\('\]"),
        ({"bits": 4, "dynamic": {"x": {"bits": 7}}}, r"dynamic\['x'\]: bits=7"),
        ({"bits": 4, "dynamic": {1: {}}}, r"dynamic\[1\]: a key must be a string"),
        ({"bits": 4, "dynamic": {"x": 3}}, r"dynamic\['x'\] must be a JSON object"),
    ],
)
def test_bad_json_names_the_field(config: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        CheckpointConfig.from_dict(config)


def test_defaults_and_spellings() -> None:
    read = CheckpointConfig.from_dict({"bits": 3, "format": "GPTQ_V2", "unknown": 1})
    assert read.spec == QuantSpec(3, 128, True, False, "gptq_v2")
    assert CheckpointConfig.from_dict({"bits": 4, "checkpoint_format": "gptq", "format": "gptq_v2"}).spec.zero_offset
    for method in ("GPTQ", None):
        assert CheckpointConfig.from_dict({"bits": 4, "quant_method": method}).spec == QuantSpec(4)


def test_dynamic_rules_first_match_wins() -> None:
    dynamic = {
        r"-:model\.layers\.0\.": {},
        r"+:.*\.down_proj": {"bits": 8, "group_size": 32},
        r".*\.layers\.1\.": {"sym": False},
    }
    config = CheckpointConfig.from_dict({"bits": 4, "group_size": 128, "dynamic": dynamic})
    assert config.for_module("model.layers.0.mlp.down_proj") is None
    assert config.for_module("model.layers.1.mlp.down_proj") == QuantSpec(8, 32)
    assert config.for_module("model.layers.1.self_attn.q_proj") == QuantSpec(4, 128, sym=False)
    assert config.for_module("model.layers.2.self_attn.q_proj") == QuantSpec(4, 128)


def test_shapes_of_the_ragged_case() -> None:
    # 576 input features in groups of 128: four whole groups and one of 64.
    assert QuantSpec(4, 128).shapes(576, 100) == {
        "qweight": (72, 100), "qzeros": (5, 13), "scales": (5, 100), "g_idx": (576,),
    }  # fmt: skip
    assert QuantSpec(3, -1).shapes(100, 32)["qweight"] == (10, 32)


@pytest.mark.parametrize("pattern", [r"(a|a)+(?![a!])", r"(?:a|[a-z]|\w)+(?![a!])"])
def test_a_pattern_that_matches_for_ever_is_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError, match=r"takes more than 1 s to match 'a+!'"):
        CheckpointConfig.from_dict({"bits": 4, "dynamic": {pattern: {"bits": 8}}}).for_module("a" * 40 + "!")


@pytest.mark.parametrize("pattern", [
    "a" * 10 + "{99999999999999}", "a{1000000000}", "(?:a{1,200}){,100}", "((?:a{100}){100}){3}", "a" * 100_001,
    "x{ 20000 , }", "a{" + 5000 * "9" + "}",
])  # fmt: skip
def test_a_pattern_that_would_fill_the_memory_is_refused(pattern: str) -> None:
    """Before it is compiled, which takes memory by every count and every character."""
    with pytest.raises(CheckpointError, match=r"its counts come to \d+; accepted are 100000 and 10000"):
        CheckpointConfig.from_dict({"bits": 4, "dynamic": {f"+:{pattern}": {"bits": 8}}})


@pytest.mark.parametrize("pattern", ["(", "[", "(?P<a>x)(?P<a>"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="is no regular expression"):
        CheckpointConfig.from_dict({"bits": 4, "dynamic": {f"+:{pattern}": {"bits": 8}}})


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (r".*\.mlp\.(?:gate|up)_proj", True), (r"^model\.layers\.(\d+)\.mlp\..*", True), (r"layers\.1", False),
        (r"model\.layers\.(?:0|1|2|3|4|5|6|7|8|9|10)\.", True), (r"(.*a)?[^.]*\.layers(\.\d)*", True), ("model", True),
        (r"(?:\w{1,40}\.){3,4}mlp", True), ("|".join(rf"layers\.\d{{1,3}}\.x{i}" for i in range(30)), False),
        ("|".join(f"model.layers.{i}.x" for i in range(1000)), False),
    ],
)  # fmt: skip
def test_patterns_of_names(pattern: str, matches: bool) -> None:
    """From the beginning of a name, as GPTQModel reads them."""
    assert name_matches(pattern, "model.layers.1.mlp.gate_proj") == matches
