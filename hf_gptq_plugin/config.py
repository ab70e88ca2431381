"""GPTQConfig: Transformers' own, plus what it lacks, and the JSON that goes into a checkpoint."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from transformers import GPTQConfig as StockGPTQConfig

from .format.spec import FORMATS, CheckpointConfig, QuantSpec, check_dynamic
from .solve.gptq import SolveSettings
from .solve.learn import TuneSettings
from .version import __version__

__all__ = ["GPTQConfig"]

_SOLVER = SolveSettings()  # the defaults of the fields below that are the solver's
# What presets decide.
_STEPS = (
    "generated", "token_weights", "output_hessian", "propagation", "refit", "alternations", "descent", "block_epochs",
    "model_epochs",
)  # fmt: skip
# Those that need all of the model in memory, and what they are without it.
_WHOLE_MODEL: dict[str, Any] = {
    "generated": 0.0, "token_weights": "uniform", "output_hessian": "identity", "model_epochs": 0,
}  # fmt: skip

# How much a calibration does: time for perplexity.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {
        "generated": 0.0, "token_weights": "uniform", "output_hessian": "identity", "propagation": 0.0, "refit": False,
        "alternations": 0, "descent": 0, "block_epochs": 0, "model_epochs": 0,
    },
    "balanced": {
        "generated": 0.125, "token_weights": "uniform", "output_hessian": "loss", "propagation": 0.5, "refit": True,
        "alternations": 1, "descent": 1, "block_epochs": 0, "model_epochs": 0,
    },
}  # fmt: skip
PRESETS["best"] = {
    **PRESETS["balanced"], "generated": 1.0, "token_weights": "loss", "alternations": 7, "descent": 5,
    "block_epochs": 2, "model_epochs": 2,
}  # fmt: skip
# What "balanced" does besides up to so many bits: the more is lost, the more it matters where. At 4 bits it gains
# nothing, for half as much time again or more.
_FEW_BITS = 3
_AT_FEW_BITS: dict[str, Any] = {"generated": 0.25, "token_weights": "loss", "alternations": 3, "descent": 3}

_MOST_GENERATED = 100
# Fields that only a checkpoint that is finished has.
_FINISHED = {"checkpoint_format", "meta"}

METHODS = ("gptq", "rtn", "hqq")
TOKEN_WEIGHTS = ("uniform", "loss")
OUTPUT_HESSIANS = ("identity", "loss")
PACKINGS = ("auto", "concat", "each")

# What only a calibration needs. It is recorded under `meta`, never written as fields: readers would not know them,
# and a tokenizer or a whole data set does not belong into a config.json.
_CALIBRATION = (
    "tokenizer", "dataset", "method", "samples", "seqlen", "seed", "packing", "preset", "generated", "token_weights",
    "output_hessian", "order", "scale_search", "blocksize", "propagation", "refit", "alternations", "descent",
    "block_epochs", "model_epochs", "min_expert_tokens", "journal", "low_memory",
)  # fmt: skip
# Fields of the stock config that describe how others quantize or load; they say nothing about a checkpoint.
_NOT_WRITTEN = (
    "act_group_aware", "batch_size", "block_name_to_quantize", "cache_block_outputs", "max_input_length",
    "model_seqlen", "module_name_preceding_first_block", "pad_token_id", "format",
)  # fmt: skip


class GPTQConfig(StockGPTQConfig):  # of the same name: Transformers compares the names of config classes
    """How to quantize, or what a checkpoint says about itself. Takes every argument of the stock `GPTQConfig`.

    Args:
        bits: 2, 3, 4 or 8.
        tokenizer: tokenizer, or the name or path of one; the model's own by default.
        dataset: calibration data: a list of texts, of chats or of token ids, a file of them, or the name of a data set
            ("wikitext2", "c4", ...; needs the `data` extra). See `calibrate.sources.read_samples`.
        group_size: input features per scale; -1 for one group. Need not divide the width.
        damp_percent: damping as a fraction of the Hessian diagonal's mean; raised by itself where needed.
        desc_act: let groups follow the solve order (stored in g_idx). Off, columns are still solved in that order.
        sym: symmetric grid.
        dynamic: rules of single modules as GPTQModel writes them: `{"+:regex": {"bits": 8}, "-:regex": {}}`.
        lm_head: quantize the output embedding too.
        method: "gptq"; or, without calibration data and without a forward pass, "rtn", which rounds to the nearest on
            the grid that `scale_search` finds, or "hqq", which first moves that grid closer to most weights, see
            `solve.hqq`.
        samples: calibration windows.
        seqlen: tokens per window.
        seed: which windows are drawn from a longer text.
        packing: "concat" joins samples and cuts them into windows (also True), "each" makes one window of every
            sample, cut off after seqlen tokens (also False); "auto" is "each" for token ids, "concat" for the rest.
        preset: "balanced" is the default; "fast" leaves out what comes before and after the column loop: text that
            the model writes, the dense model's passes, descent and refit; "best" weighs tokens (as "balanced" does up
            to 3 bits), writes as many windows as are given, takes more alternations and rounds of descent, and then
            tunes scales, rounding, norms and biases by gradient descent: several times the time of "balanced". The
            fields below override it one by one.
        generated: windows that the dense model writes itself and that are used beside the samples, as a multiple of
            their number; needs the model in memory. A text shows what its own domain asks of the weights, this what
            all others do. Models that do not write text are calibrated without. See `calibrate.generate`.
        token_weights: "loss" lets every token count by how much the model's loss feels an error in what a layer
            returns for it, which takes one backward pass of the dense model, in memory; "uniform" lets all count
            alike. See `calibrate.sensitivity`.
        output_hessian: "loss" lets errors of a layer's outputs count together as the model's loss feels them, found
            by the same pass (of a few windows, where tokens count alike); "identity" lets each count by itself, all
            alike. See `solve.joint`.
        order: "hessian" or "natural", see `SolveSettings`.
        scale_search: "mse", "minmax", "percentile" or "entropy", see `choose_scales`.
        blocksize: columns per lazy batch of the solver.
        propagation: 0 to 1, see `refine.propagate`.
        refit: see `refine.refit_scales`.
        alternations: times that columns are solved again with refitted scales, see `SolveSettings`.
        descent: rounds, see `refine.descend`.
        block_epochs: passes over the calibration data, per block, in which its rounding and scales learn to give the
            dense block's output. See `calibrate.tune`.
        model_epochs: passes in which all scales, and the blocks' norms and biases, learn to give the dense model's
            output; needs the quantized model in memory.
        journal: a folder. Finished blocks are written to it, and the same job goes on from there after it was
            interrupted. It can be deleted once the model is saved.
        low_memory: keep on disk whatever is not worked on: the model's blocks, its embeddings and the activations. For
            models that are larger than memory; with fused experts, give `from_pretrained` an `offload_folder`. Presets
            leave out what needs all of the model then (generated, token_weights, output_hessian, model_epochs), as they
            do where `device_map` offloads a part of it.
        min_expert_tokens: a layer of a mixture's expert that the router sends fewer calibration tokens leans on all
            tokens of its layer as well, as though they had been sent to it; None for twice its in_features.
        **stock: see `transformers.GPTQConfig`. An unknown name raises TypeError.

    Raises:
        ValueError: a value that is not supported, naming the field and what is accepted.
    """

    generated: float
    token_weights: str
    output_hessian: str
    propagation: float
    refit: bool
    alternations: int
    descent: int
    block_epochs: int
    model_epochs: int

    def __init__(
        self,
        bits: int = 4,
        tokenizer: Any = None,
        dataset: Any = None,
        group_size: int = 128,
        damp_percent: float = _SOLVER.damp_percent,
        desc_act: bool = False,
        act_group_aware: bool = False,
        sym: bool = True,
        *,
        dynamic: Mapping[str, Mapping[str, Any]] | None = None,
        lm_head: bool = False,
        samples: int = 128,
        seqlen: int = 512,
        seed: int = 0,
        method: str = "gptq",
        packing: str | bool = "auto",
        preset: str = "balanced",
        order: str = _SOLVER.order,
        scale_search: str = _SOLVER.scale_search,
        blocksize: int = _SOLVER.blocksize,
        generated: float | None = None,
        token_weights: str | None = None,
        output_hessian: str | None = None,
        propagation: float | None = None,
        refit: bool | None = None,
        alternations: int | None = None,
        descent: int | None = None,
        block_epochs: int | None = None,
        model_epochs: int | None = None,
        journal: str | None = None,
        low_memory: bool = False,
        min_expert_tokens: int | None = None,
        modules_in_block_to_quantize: list[Any] | None = None,
        **stock: Any,
    ) -> None:
        unknown = sorted(set(stock) - _stock_names())
        if unknown:
            raise TypeError(f"GPTQConfig got an unexpected argument {unknown[0]!r}; it takes {', '.join(_names())}")
        if not isinstance(stock.get("format", ""), str):
            raise ValueError(f"format={stock['format']!r} is not supported; use one of {', '.join(FORMATS)}")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"preset={preset!r} is not known; use one of {', '.join(PRESETS)}")
        self.preset = preset
        asked = (
            generated, token_weights, output_hessian, propagation, refit, alternations, descent, block_epochs,
            model_epochs,
        )  # fmt: skip
        few = preset == "balanced" and isinstance(bits, int) and bits <= _FEW_BITS
        usual = {**PRESETS[preset], **(_AT_FEW_BITS if few else {}), **(_WHOLE_MODEL if low_memory else {})}
        for name, value in zip(_STEPS, asked, strict=True):
            setattr(self, name, usual[name] if value is None else value)
        self.journal = None if journal is None else str(journal)
        self.low_memory = low_memory
        self.dynamic = dict(dynamic) if isinstance(dynamic, Mapping) else dynamic or {}  # checked below
        self.lm_head = lm_head
        self.samples = samples
        self.seqlen = seqlen
        self.seed = seed
        self.method = method
        self.packing = {True: "concat", False: "each"}[packing] if isinstance(packing, bool) else packing
        self.order = order
        self.scale_search = scale_search
        self.blocksize = blocksize
        self.min_expert_tokens = min_expert_tokens
        super().__init__(
            bits=bits,
            tokenizer=tokenizer,
            dataset=dataset,
            group_size=group_size,
            damp_percent=damp_percent,
            desc_act=desc_act,
            act_group_aware=act_group_aware and not desc_act,
            sym=sym,
            **stock,
        )
        stages = modules_in_block_to_quantize
        if stages is not None and not (
            isinstance(stages, (list, tuple))
            and all(
                isinstance(stage, str) or (isinstance(stage, (list, tuple)) and all(isinstance(n, str) for n in stage))
                for stage in stages
            )
        ):
            raise ValueError(
                f"modules_in_block_to_quantize={stages!r} is not supported; use names, or lists of them, e.g. "
                '[["self_attn.q_proj", "self_attn.k_proj"], ["mlp.down_proj"]]'
            )
        # The stock check of this field asks for an installed optimum, which plays no part here.
        self.modules_in_block_to_quantize = modules_in_block_to_quantize

    @classmethod
    def from_stock(cls, config: StockGPTQConfig) -> GPTQConfig:
        """Ours from a stock config: its fields, and our defaults for the rest. Its own default of `damp_percent`, ten
        times ours, counts as not given."""
        if isinstance(config, cls):
            return config
        fields = {k: v for k, v in vars(config).items() if k != "quant_method"}
        if fields["damp_percent"] == inspect.signature(StockGPTQConfig).parameters["damp_percent"].default:
            del fields["damp_percent"]
        return cls(**fields)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From a checkpoint's JSON. Fields that are not ours (other writers leave many) are ignored."""
        checkpoint = CheckpointConfig.from_dict(config_dict)
        fields = {k: v for k, v in config_dict.items() if k in _names()}
        damp = fields.get("damp_percent")
        if not (isinstance(damp, float) and 0 < damp < 1):
            fields.pop("damp_percent", None)  # only ever a record in a finished checkpoint
        if fields.get("method") not in METHODS:
            fields.pop("method", None)  # other writers mean other things by it
        # Calibration text that some writers leave in a finished checkpoint is not read back.
        if set(config_dict) & _FINISHED:
            for name in ("dataset", "tokenizer"):
                fields.pop(name, None)
        fields["format"] = checkpoint.spec.checkpoint_format
        fields.pop("checkpoint_format", None)
        return super().from_dict(fields, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def post_init(self) -> None:
        """Check every field. Called by the constructor."""
        spec = self.spec
        check_dynamic(spec, self.dynamic)
        self.settings  # noqa: B018  (raises on a field that cannot be)
        self.tuning  # noqa: B018
        for name, least in (("samples", 1), ("seqlen", 2)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        for name, accepted in (
            ("method", METHODS), ("packing", PACKINGS), ("token_weights", TOKEN_WEIGHTS),
            ("output_hessian", OUTPUT_HESSIANS),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in accepted:
                raise ValueError(f"{name}={value!r} is not supported; use one of {', '.join(accepted)}")
        if self.method != "gptq" and any([self.desc_act, *(rule.get("desc_act") for rule in self.dynamic.values())]):
            raise ValueError(
                f"desc_act=True orders groups by what calibration data show, and method={self.method!r} uses none; set "
                "desc_act=False"
            )
        few = self.min_expert_tokens
        if few is not None and (type(few) is not int or few < 1):
            raise ValueError(f"min_expert_tokens={few!r} must be an integer of at least 1, or None")
        if type(self.generated) not in (int, float) or not 0 <= self.generated <= _MOST_GENERATED:
            raise ValueError(f"generated={self.generated!r} must be a number from 0 to {_MOST_GENERATED}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed!r} must be an integer from 0 to 2**32 - 1")
        for name in ("low_memory", "true_sequential", "lm_head"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported; use True or False")
        if self.meta is not None and not isinstance(self.meta, Mapping):
            raise ValueError(f"meta={self.meta!r} is not supported; use a mapping")
        for name, without in _WHOLE_MODEL.items() if self.low_memory and self.method == "gptq" else ():
            if getattr(self, name) != without:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} needs the whole model at once, and low_memory=True holds one "
                    f"block at a time; set {name}={without!r}"
                )
        if self.backend is None:
            self.backend = "auto"

    @property
    def spec(self) -> QuantSpec:
        """What holds for modules without a rule of their own."""
        return QuantSpec(self.bits, self.group_size, self.sym, self.desc_act, self.format)

    @property
    def settings(self) -> SolveSettings:
        """How layers are solved."""
        return SolveSettings(
            damp_percent=self.damp_percent,
            order=self.order,
            scale_search=self.scale_search,
            blocksize=self.blocksize,
            propagation=self.propagation,
            refit=self.refit,
            alternations=self.alternations,
            descent=self.descent,
        )

    @property
    def tuning(self) -> TuneSettings:
        """What is learned after the solver."""
        return TuneSettings(block_epochs=self.block_epochs, model_epochs=self.model_epochs)

    @property
    def checkpoint(self) -> CheckpointConfig:
        """The part that describes a checkpoint."""
        return CheckpointConfig(self.spec, dict(self.dynamic), self.lm_head)

    def leave_out_whole_model(self) -> list[str]:
        """Turn off what needs all of the model in memory, for a model that is not. Returns the names of what was on."""
        on = [name for name, without in _WHOLE_MODEL.items() if getattr(self, name) != without]
        vars(self).update({name: _WHOLE_MODEL[name] for name in on})
        return on

    def __deepcopy__(self, memo: dict[int, Any]) -> GPTQConfig:
        """A copy that shares the tokenizer and the text: Transformers copies configs many times while it loads."""
        for value in (self.tokenizer, self.dataset):
            memo[id(value)] = value
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a caller may change about a checkpoint that is already quantized."""
        return {"max_input_length": self.max_input_length, "backend": self.backend}

    def to_dict(self) -> dict[str, Any]:
        """The JSON for a checkpoint: standard fields only, everything else under `meta`."""
        written = {k: v for k, v in vars(self).items() if k not in _CALIBRATION and k not in _NOT_WRITTEN}
        out = copy.deepcopy({k: v for k, v in written.items() if v is not None})
        out["quant_method"] = "gptq"
        out["checkpoint_format"] = out["format"] = self.format
        if not self.dynamic:
            out.pop("dynamic")
        return out

    def record_calibration(self, calibration: dict[str, Any] | None) -> None:
        """Note under `meta` what the checkpoint was made by and from.

        Args:
            calibration: the data, see `calibrate.data.calibration_record`; None where the method uses none.
        """
        solver: dict[str, Any] = {"method": self.method, "scale_search": self.scale_search}
        if self.method == "gptq":
            solver |= {
                "generated": self.generated,
                "token_weights": self.token_weights,
                "output_hessian": self.output_hessian,
                "order": self.order,
                "static_groups": True,
                "propagation": self.propagation,
                "refit": self.refit,
                "alternations": self.alternations,
                "descent": self.descent,
                "block_epochs": self.block_epochs,
                "model_epochs": self.model_epochs,
                "min_expert_tokens": self.min_expert_tokens,
            }
        self.meta = {
            **(self.meta or {}),
            "quantizer": [f"hf_gptq_plugin:{__version__}"],
            **({} if calibration is None else {"calibration": calibration}),
            "solver": solver,
        }


def _stock_names() -> set[str]:
    names = set(inspect.signature(StockGPTQConfig.__init__).parameters) - {"self", "kwargs"}
    return names | {"checkpoint_format"}  # read from the stock config's **kwargs


def _names() -> list[str]:
    own = set(inspect.signature(GPTQConfig.__init__).parameters) - {"self", "stock"}
    return sorted(own | _stock_names())
