"""The numbers that define a GPTQ tensor, and how a checkpoint's JSON assigns them to modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import regex

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
WORD = 32  # bits per int32 of qweight and qzeros


class CheckpointError(ValueError):
    """A checkpoint, or its configuration, that cannot be read as GPTQ. The message says what to do."""


@dataclass(frozen=True)
class QuantSpec:
    """How one weight `[N, K]` is quantized.

    Args:
        bits: width of a code; one of 2, 3, 4, 8.
        group_size: input features that share one scale and zero; -1 means all `K`. Need not divide `K`:
            the last group is then shorter.
        sym: every zero is `2**(bits - 1)`.
        desc_act: groups follow the order in which the columns were solved (stored in g_idx).
        checkpoint_format: "gptq" (v1, qzeros holds zero - 1) or "gptq_v2" (qzeros holds zero).

    Raises:
        ValueError: a field outside of what is listed above.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    checkpoint_format: str = "gptq"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise ValueError(f"bits={self.bits!r} is not supported; use one of {', '.join(map(str, BITS))}")
        if type(self.group_size) is not int or (self.group_size != -1 and self.group_size < 1):
            raise ValueError(
                f"group_size={self.group_size!r} is not supported; use a positive integer, or -1 for one group"
            )
        for name in ("sym", "desc_act"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported; use true or false")
        if self.checkpoint_format not in FORMATS:
            raise ValueError(
                f"checkpoint_format={self.checkpoint_format!r} is not supported; use one of {', '.join(FORMATS)}"
            )

    @property
    def maxq(self) -> int:
        """Largest code."""
        return 2**self.bits - 1

    @property
    def zero_offset(self) -> int:
        """What must be added to a stored zero: 1 in v1, 0 in v2."""
        return 1 if self.checkpoint_format == "gptq" else 0

    @property
    def zero_range(self) -> tuple[int, int]:
        """Zeros that a writer may choose. v1 cannot hold 0: its field would be -1."""
        return self.zero_offset, self.maxq

    def width(self, in_features: int) -> int:
        """Input features per group, `-1` resolved."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def groups(self, in_features: int) -> int:
        """Number of groups `G`, a shorter last one included."""
        return -(-in_features // self.width(in_features))

    def shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the canonical tensors of a weight `[out_features, in_features]`."""
        groups = self.groups(in_features)
        return {
            "qweight": (words(in_features, self.bits), out_features),
            "qzeros": (groups, words(out_features, self.bits)),
            "scales": (groups, out_features),
            "g_idx": (in_features,),
        }


def words(count: int, bits: int) -> int:
    """int32 words that hold `count` codes of `bits` bits, packed as one bit stream."""
    return -(-count * bits // WORD)


# Fields of a `dynamic` rule, as GPTQModel writes them.
OVERRIDES = ("bits", "group_size", "sym", "desc_act")


@dataclass(frozen=True)
class CheckpointConfig:
    """The `quantization_config` of a GPTQ checkpoint, checked.

    Args:
        spec: what holds for every module without a rule of its own.
        dynamic: rules of single modules, first match wins: regex of the module's name, optionally behind
            "+:", to overrides of `QuantSpec`'s fields; behind "-:" the module is not quantized.
        lm_head: the output embedding is quantized too.
    """

    spec: QuantSpec
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lm_head: bool = False

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> CheckpointConfig:
        """Read the JSON of `config.json["quantization_config"]` or `quantize_config.json`.

        Raises:
            CheckpointError: naming the field, its value and what is accepted.
        """
        if not isinstance(config, Mapping):
            raise CheckpointError(f"quantization_config must be a JSON object, but it is {config!r}")
        method = quant_method(config)
        if method not in ("gptq", "hf_gptq"):
            raise CheckpointError(f'quant_method={method!r} is not GPTQ; this package reads "gptq"')
        if "bits" not in config:
            raise CheckpointError(f"quantization_config has no field 'bits'; add one of {BITS}")
        fmt = config.get("checkpoint_format") or config.get("format") or "gptq"
        try:
            spec = QuantSpec(
                bits=config["bits"],
                group_size=config.get("group_size", 128),
                sym=config.get("sym", True),
                desc_act=config.get("desc_act", False),
                checkpoint_format=fmt.lower() if isinstance(fmt, str) else fmt,
            )
        except ValueError as error:
            raise CheckpointError(f"quantization_config: {error}") from None
        lm_head = config.get("lm_head", False)
        if not isinstance(lm_head, bool):
            raise CheckpointError(f"quantization_config: lm_head={lm_head!r}; use true or false")
        return cls(spec, check_dynamic(spec, config.get("dynamic")), lm_head)

    def for_module(self, name: str) -> QuantSpec | None:
        """The spec of module `name`, or None where a rule excludes it."""
        return resolve(self.spec, self.dynamic, name)


def quant_method(config: Mapping[str, Any]) -> str:
    """The `quant_method` of a `quantization_config`, in lower case as vLLM takes it; "gptq" where none is given.

    Raises:
        CheckpointError: it is no string.
    """
    method = config.get("quant_method")
    method = "gptq" if method is None else getattr(method, "value", method)  # Transformers has an enum
    if not isinstance(method, str):
        raise CheckpointError(f'quant_method={method!r} must be a string, e.g. "gptq"')
    return method.lower()


def check_dynamic(spec: QuantSpec, dynamic: Any) -> dict[str, dict[str, Any]]:
    """Validate `dynamic` rules: regexes that compile, known fields, values that make a `QuantSpec`.

    Raises:
        CheckpointError: naming the rule.
    """
    if dynamic is None:
        return {}
    if not isinstance(dynamic, Mapping):
        raise CheckpointError(f"dynamic must map regexes to overrides, but it is {dynamic!r}")
    for pattern, overrides in dynamic.items():
        if not isinstance(pattern, str):
            raise CheckpointError(f"dynamic[{pattern!r}]: a key must be a string, the regex of modules' names")
        if not isinstance(overrides, Mapping):
            raise CheckpointError(f"dynamic[{pattern!r}] must be a JSON object, but it is {overrides!r}")
        try:
            _compiled(_regex(pattern))
            replace(spec, **{k: v for k, v in overrides.items() if k in OVERRIDES})
        except ValueError as error:
            raise CheckpointError(f"dynamic[{pattern!r}]: {error}") from None
    return {pattern: dict(overrides) for pattern, overrides in dynamic.items()}


def resolve(spec: QuantSpec, dynamic: Mapping[str, Mapping[str, Any]], name: str) -> QuantSpec | None:
    """The spec of module `name` under `dynamic`'s first matching rule; None where it excludes the module."""
    pattern = rule_of(dynamic, name)
    if pattern is None:
        return spec
    if pattern.startswith("-:"):
        return None
    return replace(spec, **{k: v for k, v in dynamic[pattern].items() if k in OVERRIDES})


def rule_of(dynamic: Iterable[str], name: str) -> str | None:
    """The first of `dynamic`'s rules that matches module `name`; None where none does."""
    return next((pattern for pattern in dynamic if name_matches(_regex(pattern), name)), None)


# How long a pattern may look at one name. A matcher that backtracks can take for ever.
_MATCH_SECONDS = 1.0
_MOST_CHARACTERS, _MOST_REPEATS = 100_000, 10_000
_COUNT = regex.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")


def name_matches(pattern: str, name: str) -> bool:
    """Whether a checkpoint's regex matches a module's name from its beginning.

    Raises:
        CheckpointError: it is no regex, or takes too long.
    """
    try:
        return _compiled(pattern).match(name, timeout=_MATCH_SECONDS) is not None
    except TimeoutError:
        raise CheckpointError(
            f"{pattern[:200]!r} takes more than {_MATCH_SECONDS:g} s to match {name!r}; write it without repeats in "
            "repeats"
        ) from None


def _repeats(pattern: str) -> int:
    """How many times something is compiled, at most: as often as it is repeated, and repeats in repeats multiply."""
    groups = singles = 1
    for found in _COUNT.finditer(pattern):
        count = max(int(digits[:9] or 1) for digits in found.groups())
        before = pattern[max(found.start() - 1, 0) : found.start()]
        if before.isalnum() or before in ("_", "]", "."):  # one character
            singles += count
        else:
            groups *= max(count, 1)
    return groups * singles


@lru_cache
def _compiled(pattern: str) -> Any:
    repeats = _repeats(pattern[:_MOST_CHARACTERS])
    if len(pattern) > _MOST_CHARACTERS or repeats > _MOST_REPEATS:
        raise CheckpointError(
            f"{pattern[:200]!r} has {len(pattern)} characters, and its counts come to {repeats}; accepted are "
            f"{_MOST_CHARACTERS} and {_MOST_REPEATS} at most"
        )
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{pattern[:200]!r} is no regular expression: {error}") from None


def _regex(pattern: str) -> str:
    return pattern[2:] if pattern[:2] in ("+:", "-:") else pattern
