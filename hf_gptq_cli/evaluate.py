"""`hf-gptq eval`, `verify`, `compare` and `bench`: how well, and how fast, a model does, alone and beside others."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .app import CHECK_FAILED, DeviceMap, Dtype, Json, console, folder_of, print_json, torch_dtype
from .refuse import require_device, require_exists, require_loadable, require_writable, warn_long

_HARNESS = "lm-evaluation-harness"


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub name, quantized or not.")],
    text: Annotated[Path | None, typer.Option(help="Text file.")] = None,
    windows: Annotated[int, typer.Option(help="Windows, from the beginning; 0 for all.")] = 8,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    stride: Annotated[
        int, typer.Option(help="Tokens from window to window, of which only the new ones count; 0 for no overlap.")
    ] = 0,
    bos: Annotated[bool, typer.Option(help="Begin every window with the BOS token.")] = False,
    tasks: Annotated[
        str, typer.Option(help="Names of tasks, with commas; needs lm_eval.", rich_help_panel=_HARNESS)
    ] = "",
    shots: Annotated[
        int | None,
        typer.Option(help="Examples per prompt; each task's own number by default.", rich_help_panel=_HARNESS),
    ] = None,
    limit: Annotated[int, typer.Option(help="Documents per task; 0 for all.", rich_help_panel=_HARNESS)] = 0,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder with task files of your own.", rich_help_panel=_HARNESS)
    ] = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = "cpu",
    as_json: Json = False,
) -> None:
    """Perplexity of MODEL on a text, and its marks in tasks of the lm-evaluation-harness.

    Windows lie side by side: every token but a window's first is predicted from the tokens before it in its window.
    Published figures of WikiText-2 are of this kind, with --windows 0 --seqlen 2048. With --stride S windows overlap.

    Examples:

    hf-gptq eval ./smollm2-4bit --text held-out.txt --windows 8 --seqlen 2048

    hf-gptq eval ./smollm2-4bit --text held-out.txt --windows 0 --seqlen 1024 --stride 512

    hf-gptq eval ./smollm2-4bit --tasks arc_easy,piqa --limit 200
    """
    from transformers import AutoTokenizer

    from hf_gptq_plugin.calibrate.sources import read_text
    from hf_gptq_plugin.hf.evaluate import harness, perplexity, sliding_windows
    from hf_gptq_plugin.hf.loading import load_model

    if text is None and not tasks:
        raise ValueError("nothing to evaluate on: name a file with --text, or tasks with --tasks")
    content = None if text is None else read_text(text)
    require_loadable(model, device_map=device_map)
    tokenizer = AutoTokenizer.from_pretrained(model)
    pieces = (
        [] if content is None else sliding_windows(tokenizer, content, seqlen, stride or None, windows or None, bos)
    )
    loaded: Any = load_model(model, dtype=torch_dtype(dtype), device_map=device_map)
    result: dict[str, Any] = {"model": model}
    if pieces:
        warn_long(loaded.config, max(ids.shape[1] for ids, _ in pieces), "--seqlen")
        start = time.perf_counter()
        counts = [count for _, count in pieces]
        value = perplexity(loaded, [ids for ids, _ in pieces], counts=counts)
        seconds = time.perf_counter() - start
        tokens = sum(ids.shape[1] for ids, _ in pieces)
        result |= {"perplexity": value, "windows": len(pieces), "seqlen": seqlen, "stride": stride or None, "bos": bos}
        result |= {"tokens": tokens, "counted": sum(counts)}
        if not as_json:
            console.print(f"perplexity {value:.4f}  ({len(pieces)} windows, {tokens} tokens, {seconds:.0f} s)")
    if tasks:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        folder = None if task_folder is None else str(task_folder)
        result["tasks"] = harness(loaded, tokenizer, names, shots, limit or None, folder)
        if not as_json:
            table = Table(header_style="bold")
            for column in ("task", "metric", "value"):
                table.add_column(column)
            for task, values in result["tasks"].items():
                for metric, number in values.items():
                    table.add_row(Text(task), Text(metric), f"{number:.4f}")
            console.print(table)
    if as_json:
        print_json(result)


def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub name.")],
    reference: Annotated[
        str, typer.Argument(metavar="REFERENCE", help="Folder or Hub name of what it should be like.")
    ],
    text: Annotated[Path, typer.Option(help="Text file.")],
    windows: Annotated[int, typer.Option(help="Windows, from the beginning; 0 for all.")] = 8,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    max_divergence: Annotated[
        float | None, typer.Option(help="Exit code 3 where the mean KL divergence per token is larger.")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Exit code 3 where a smaller share of likeliest tokens agrees, 0 to 1.")
    ] = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = "cpu",
    as_json: Json = False,
) -> None:
    """Two models side by side on a text: perplexity, KL divergence and agreement on the likeliest next token.

    Examples:

    hf-gptq verify ./smollm2-4bit ./smollm2 --text held-out.txt

    hf-gptq verify ./converted ./smollm2-4bit --text held-out.txt --max-divergence 1e-6 --json
    """
    from transformers import AutoTokenizer

    from hf_gptq_plugin.calibrate.sources import read_text
    from hf_gptq_plugin.hf.evaluate import compared, text_windows
    from hf_gptq_plugin.hf.loading import load_model

    require_loadable(model, reference, device_map=device_map)
    pieces = text_windows(AutoTokenizer.from_pretrained(reference), read_text(text), seqlen, windows or None)
    first, second = (load_model(name, dtype=torch_dtype(dtype), device_map=device_map) for name in (model, reference))
    found = compared(first, second, pieces)
    failed = max_divergence is not None and not found.divergence <= max_divergence
    failed = failed or (min_agreement is not None and not found.agreement >= min_agreement)
    if as_json:
        print_json({"model": model, "reference": reference, "passed": not failed, **vars(found)})
    else:
        table = Table(show_header=False)
        table.add_column(style="bold")
        table.add_column()
        table.add_row("perplexity", f"{found.perplexity:.4f}, reference {found.reference_perplexity:.4f}")
        table.add_row("KL divergence", f"{found.divergence:.3e} per token on average, {found.largest:.3e} at most")
        table.add_row("same likeliest token", f"{100 * found.agreement:.2f} % of {found.tokens} tokens")
        console.print(table)
    raise typer.Exit(CHECK_FAILED if failed else 0)


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub name.")],
    reference: Annotated[str | None, typer.Option(help="Another one to time after it, e.g. the dense model.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens per prompt.")] = 128,
    new: Annotated[int, typer.Option(help="Tokens to write.")] = 32,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    repeats: Annotated[int, typer.Option(help="Measurements, of which the median counts.")] = 3,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "cpu",
    as_json: Json = False,
) -> None:
    """Tokens per second of MODEL in Transformers: reading a prompt, and writing token by token.

    Example: hf-gptq bench ./smollm2-4bit --reference ./smollm2 --prompt 256 --new 64
    """
    from hf_gptq_plugin.hf.bench import speed
    from hf_gptq_plugin.hf.loading import load_model

    names = list(dict.fromkeys([model, *([reference] if reference else [])]))
    require_loadable(*names, device_map=device_map)
    found = {}
    for name in names:
        loaded: Any = load_model(name, dtype=torch_dtype(dtype), device_map=device_map)
        found[name] = speed(loaded, prompt, new, batch, repeats, progress=not as_json)
        del loaded
    if as_json:
        print_json({"models": [{"model": name, **asdict(each)} for name, each in found.items()]})
        return
    table = Table(header_style="bold")
    for column in ("model", "reading, tokens/s", "writing, tokens/s", "first token, ms", "weights, MB", "kernel"):
        table.add_column(column)
    for name, each in found.items():
        numbers = [f"{each.prefill:.1f}", f"{each.decode:.1f}", f"{1000 * each.first:.1f}", f"{each.weights / 1e6:.1f}"]
        table.add_row(Text(name), *numbers, each.machine["kernel"])
    console.print(table)
    machine = next(iter(found.values())).machine
    where = ", ".join(f"{key} {value}" for key, value in machine.items() if key != "kernel")
    console.print(f"{batch} × {prompt} tokens read, {batch} × {new} written, median of {repeats}; {where}.")


def compare(
    models: Annotated[
        list[str], typer.Argument(metavar="MODELS", help="Folders or Hub names, of one model; the dense one too.")
    ],
    text: Annotated[Path, typer.Option(help="Text file.")],
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("comparison.html"),
    windows: Annotated[int, typer.Option(help="Windows, from the beginning; 0 for all.")] = 8,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    speed: Annotated[bool, typer.Option(help="Measure tokens per second too.")] = True,
    prompt: Annotated[int, typer.Option(help="Tokens per prompt, for speed.")] = 128,
    new: Annotated[int, typer.Option(help="Tokens to write, for speed.")] = 32,
    dtype: Dtype = "float32",
    device_map: DeviceMap = "cpu",
    as_json: Json = False,
) -> None:
    """Several checkpoints on one page: perplexity against bits per weight, size, speed.

    Example: hf-gptq compare ./smollm2 ./smollm2-4bit ./smollm2-3bit --text held-out.txt --out comparison.html
    """
    from hf_gptq_plugin.calibrate.sources import read_text
    from hf_gptq_plugin.hf.comparison import measure, page, to_dict

    if out.is_dir():
        raise ValueError(f"--out={str(out)!r} is a folder; name a file")
    content = read_text(text)
    if out.exists() and out.samefile(text):
        raise ValueError(f"--out={str(out)!r} is the text itself, which would be overwritten; name another file")
    require_exists(*models)
    require_device(device_map)
    require_writable(out, "--out")
    folders = [folder_of(model) for model in models]
    rows = measure(
        models, folders, content, windows or None, seqlen, torch_dtype(dtype), device_map, speed, prompt, new
    )
    protocol = {"text": text.name, "windows": windows, "seqlen": seqlen, "dtype": dtype}
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.part")
    staging.write_text(page(rows, protocol), encoding="utf-8")
    staging.replace(out)
    if as_json:
        print_json(to_dict(rows, protocol))
        return
    table = Table(header_style="bold")
    for column in ("checkpoint", "format", "perplexity", "bits per weight", "MB", "writing, tokens/s"):
        table.add_column(column)
    for row in rows:
        written = f"{row.speed.decode:.1f}" if row.speed else ""
        numbers = [f"{row.perplexity:.4f}", f"{row.bits:.2f}", f"{row.size / 1e6:.1f}", written]
        table.add_row(Text(row.name), Text(row.layout), *numbers)
    console.print(table)
    console.print(f"The page: {out}", soft_wrap=True)
