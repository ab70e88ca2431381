"""`hf-gptq quantize`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import DeviceMap, Dtype, Json, console, print_json, torch_dtype
from .choices import DATASETS, DEFAULT, METHODS, ORDERS, OUTPUT_HESSIANS, PRESETS, SEARCHES, TOKEN_WEIGHTS
from .refuse import (
    MAPS,
    discard_offload,
    require_dense,
    require_loadable,
    require_own_offload,
    require_writable,
    warn_long,
)

_PRESETS = "Steps of the preset, one by one"
_SOLVER = "Solver"


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub name of the dense model.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the checkpoint to.")],
    bits: Annotated[int, typer.Option(help="Width of a code: 2, 3, 4 or 8.")] = DEFAULT["bits"],
    group_size: Annotated[int, typer.Option(help="Input features per scale; -1 for one group.")] = DEFAULT[
        "group_size"
    ],
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Symmetric or asymmetric grid.")] = DEFAULT["sym"],
    desc_act: Annotated[bool, typer.Option(help="Let groups follow the solve order (g_idx).")] = DEFAULT["desc_act"],
    calibration: Annotated[
        str,
        typer.Option(
            help="File (.txt, .json, .jsonl, .csv, .parquet), or name of a data set, fetched with the extra `data`: "
            f"{', '.join(DATASETS)}."
        ),
    ] = "wikitext2",
    method: Annotated[
        str, typer.Option(help=f"One of {', '.join(METHODS)}; all but gptq use no calibration data.")
    ] = DEFAULT["method"],
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = DEFAULT["samples"],
    seqlen: Annotated[int, typer.Option(help="Tokens per calibration window.")] = DEFAULT["seqlen"],
    seed: Annotated[int, typer.Option(help="Which windows are drawn from a longer text.")] = DEFAULT["seed"],
    preset: Annotated[
        str,
        typer.Option(
            help=f"One of {', '.join(PRESETS)}. fast: less time, higher perplexity; best: lower perplexity, more time."
        ),
    ] = DEFAULT["preset"],
    generated: Annotated[
        float | None,
        typer.Option(
            help="Windows that the model writes itself, as a multiple of the samples; 0 with --low-memory.",
            rich_help_panel=_PRESETS,
        ),
    ] = None,
    token_weights: Annotated[
        str | None,
        typer.Option(
            help=f"What tokens count in a layer's error: {' or '.join(TOKEN_WEIGHTS)}; uniform with --low-memory.",
            rich_help_panel=_PRESETS,
        ),
    ] = None,
    output_hessian: Annotated[
        str | None,
        typer.Option(
            help=f"How errors of a layer's outputs count together: {' or '.join(OUTPUT_HESSIANS)}; identity with "
            "--low-memory.",
            rich_help_panel=_PRESETS,
        ),
    ] = None,
    propagation: Annotated[
        float | None,
        typer.Option(help="How much of earlier layers' error a layer takes over, 0 to 1.", rich_help_panel=_PRESETS),
    ] = None,
    refit: Annotated[
        bool | None, typer.Option("--refit/--no-refit", help="Fit scales to the codes.", rich_help_panel=_PRESETS)
    ] = None,
    alternations: Annotated[
        int | None,
        typer.Option(help="Times that columns are solved again with refitted scales.", rich_help_panel=_PRESETS),
    ] = None,
    descent: Annotated[
        int | None, typer.Option(help="Rounds of coordinate descent on the codes.", rich_help_panel=_PRESETS)
    ] = None,
    block_epochs: Annotated[
        int | None,
        typer.Option(help="Passes in which a block's rounding and scales learn.", rich_help_panel=_PRESETS),
    ] = None,
    model_epochs: Annotated[
        int | None,
        typer.Option(
            help="Passes in which the whole model's scales, norms and biases learn; 0 with --low-memory.",
            rich_help_panel=_PRESETS,
        ),
    ] = None,
    order: Annotated[
        str, typer.Option(help=f"Of the columns: {' or '.join(ORDERS)}.", rich_help_panel=_SOLVER)
    ] = DEFAULT["order"],
    scale_search: Annotated[
        str, typer.Option(help=f"How scales are chosen: {', '.join(SEARCHES)}.", rich_help_panel=_SOLVER)
    ] = DEFAULT["scale_search"],
    damp_percent: Annotated[
        float, typer.Option(help="Damping, as a fraction of the Hessian diagonal's mean.", rich_help_panel=_SOLVER)
    ] = DEFAULT["damp_percent"],
    checkpoint_format: Annotated[str, typer.Option("--format", help="gptq (v1) or gptq_v2.")] = "gptq",
    lm_head: Annotated[bool, typer.Option(help="Quantize the output embedding too.")] = DEFAULT["lm_head"],
    dynamic: Annotated[
        str | None,
        typer.Option(
            help="Rules for single layers: JSON, or a file of it, from regular expressions on their names to bits, "
            'group_size, sym, desc_act; behind "-:" layers that stay dense.'
        ),
    ] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "cpu",
    low_memory: Annotated[
        bool, typer.Option(help="Keep on disk what is not worked on: for models larger than memory.")
    ] = False,
    report: Annotated[bool, typer.Option(help="Write calibration.html, .json and .csv into OUT.")] = True,
    eval_text: Annotated[
        Path | None, typer.Option(help="Text file: measure perplexity before and after, for the report.")
    ] = None,
    eval_windows: Annotated[int, typer.Option(help="Windows of --eval-text, from the beginning; 0 for all.")] = 8,
    eval_seqlen: Annotated[int, typer.Option(help="Tokens per window of --eval-text.")] = 2048,
    as_json: Json = False,
) -> None:
    """Quantize MODEL and write a GPTQ checkpoint to OUT.

    While it works, what is finished lies in OUT.journal; interrupted, the same command goes on from there. Under
    torchrun or accelerate launch, the processes share the calibration text.

    Examples:

    hf-gptq quantize ./smollm2 ./smollm2-4bit --group-size 64 --calibration corpus.txt --samples 64

    hf-gptq quantize ./smollm2 ./smollm2-3bit --bits 3 --group-size 64 --preset best --calibration corpus.txt

    hf-gptq quantize ./smollm2 ./smollm2-mixed --dynamic '{".*down_proj": {"bits": 8}, "-:.*layers.0.": {}}'

    hf-gptq quantize ./large ./large-4bit --low-memory --calibration corpus.txt
    """
    from transformers import AutoConfig, AutoTokenizer

    from hf_gptq_plugin.calibrate import processes
    from hf_gptq_plugin.calibrate.journal import discard
    from hf_gptq_plugin.calibrate.report import Perplexity
    from hf_gptq_plugin.calibrate.sources import read_text
    from hf_gptq_plugin.config import GPTQConfig
    from hf_gptq_plugin.hf.evaluate import perplexity, text_windows
    from hf_gptq_plugin.hf.loading import auto_class, load_model
    from hf_gptq_plugin.hf.report import write_report
    from hf_gptq_plugin.hf.saving import save_checkpoint

    start = time.perf_counter()
    processes.join()
    dataset = calibration if method == "gptq" else None
    config = GPTQConfig(
        bits=bits, group_size=group_size, sym=sym, desc_act=desc_act, dataset=dataset, samples=samples, seqlen=seqlen,
        seed=seed, method=method, preset=preset, generated=generated, token_weights=token_weights,
        output_hessian=output_hessian, propagation=propagation, refit=refit, alternations=alternations, descent=descent,
        block_epochs=block_epochs, model_epochs=model_epochs, order=order, scale_search=scale_search,
        damp_percent=damp_percent, format=checkpoint_format, lm_head=lm_head, low_memory=low_memory,
        dynamic=None if dynamic is None else _rules(dynamic),
    )  # fmt: skip
    place = out.resolve()  # of a name of its own, whatever OUT is
    journal, offloaded = (place.with_name(f"{place.name}.{what}") for what in ("journal", "offload"))
    if method == "gptq":
        config.journal = str(journal)
    if out.is_file():
        raise ValueError(f"OUT={str(out)!r} is a file; name a folder")
    if place == Path(model).resolve():
        raise ValueError(f"OUT={str(out)!r} is MODEL, whose dense weights would be lost; name another folder")
    if low_memory and device_map in MAPS:
        raise ValueError(
            f"--device-map {device_map} shares a model among devices, and --low-memory works on one; name it: cpu, cuda"
        )
    if low_memory and eval_text is not None:
        raise ValueError(
            "--eval-text loads the whole dense model, which --low-memory is to avoid; leave it out, and run "
            "hf-gptq eval on MODEL and on OUT afterwards"
        )
    require_loadable(model, device_map=device_map)
    require_dense(model)
    require_writable(out)
    if low_memory:
        require_own_offload(offloaded)
    tokenizer = AutoTokenizer.from_pretrained(model)
    config.tokenizer = tokenizer
    device_map = processes.own_device(device_map)
    where = {"": device_map} if low_memory else device_map
    loading = {"dtype": torch_dtype(dtype), "device_map": where}
    if low_memory:
        loading["offload_folder"] = str(offloaded)  # for what the checkpoint holds in another form: fused experts
    pieces, before = [], None
    made_for = AutoConfig.from_pretrained(model)
    if method == "gptq":
        warn_long(made_for, seqlen, "--seqlen")
    if eval_text is not None:
        pieces = text_windows(tokenizer, read_text(eval_text), eval_seqlen, eval_windows or None)
        warn_long(made_for, max((ids.shape[1] for ids in pieces), default=0), "--eval-seqlen")
        before = perplexity(load_model(model, **loading), pieces)
    quantized: Any = auto_class(made_for.architectures).from_pretrained(model, quantization_config=config, **loading)
    if processes.rank():
        return  # all processes hold the same model; the first one writes it
    save_checkpoint(quantized, out, tokenizer=tokenizer)
    quality = None
    if eval_text is not None:
        tokens = sum(p.shape[1] for p in pieces)
        quality = Perplexity(eval_text.name, len(pieces), eval_seqlen, tokens, before, perplexity(quantized, pieces))
    page = write_report(out, quantized, quality) if report else None
    if method == "gptq" and processes.count() == 1:
        discard(journal)
    if low_memory:
        discard_offload(offloaded)
    size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    layers, seconds = len(quantized.hf_quantizer.reports), time.perf_counter() - start
    if as_json:
        measured = None if quality is None else asdict(quality)
        print_json({
            "out": str(out), "layers": layers, "bits": bits, "seconds": seconds, "bytes": size, "perplexity": measured,
            "report": None if page is None else str(page),
        })  # fmt: skip
        return
    if quality is not None:
        console.print(f"Perplexity {quality.dense:.4f} before, {quality.quantized:.4f} after.")
    console.print(
        f"Quantized {layers} layers to {bits} bit in {seconds:.0f} s; {out} holds {size / 1e6:.1f} MB of weights."
    )
    if page is not None:
        console.print(f"What the calibration did: {page}")


def _rules(text: str) -> Any:
    """`dynamic` from JSON, or from a file of it.

    Raises:
        ValueError: neither.
    """
    given = text.strip()
    where = "--dynamic"
    if not given.startswith("{"):
        path = Path(given)
        if not path.is_file():
            raise ValueError(f"--dynamic={given!r} is neither a JSON object nor a file")
        where, given = str(path), path.read_text(encoding="utf-8")
    try:
        return json.loads(given)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
