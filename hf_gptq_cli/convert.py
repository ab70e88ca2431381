"""`hf-gptq convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import Json, console, folder_of, print_json, torch_dtype
from .choices import GGUF_TYPES, LAYOUTS

if TYPE_CHECKING:
    from hf_gptq_plugin.convert.order import Reordering


def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub name.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write; for gguf a file ending in .gguf, or a folder.")
    ],
    to: Annotated[str, typer.Option(help=f"One of {', '.join((*LAYOUTS, 'gguf'))}.")],
    shard_size: Annotated[float, typer.Option("--shard-size", "--shard", help="Largest file, in GB.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="Of dense weights: bfloat16, float16, float32.")] = "bfloat16",
    gguf_type: Annotated[
        str,
        typer.Option(help=f"Of gguf's quantized tensors: {', '.join(GGUF_TYPES)}; auto takes the smallest that fits."),
    ] = "auto",
    natural: Annotated[
        bool,
        typer.Option(
            "--natural-order",
            help="Take modules out of act-order (desc_act) where their inputs can change places exactly.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a quantized checkpoint in another reader's layout, or its weights dense; what is lost is said.

    Every module is read back from what was written and compared with its source. Memory holds one file of the output
    and one module.

    Examples:

    hf-gptq convert ./model-awq ./model-gptq --to gptq_v2

    hf-gptq convert ./model-gptq ./model.gguf --to gguf

    hf-gptq convert ./model-act-order ./model-gptq --to gptq_v2 --natural-order
    """
    from tqdm.auto import tqdm

    from hf_gptq_plugin.convert.gguf import file_of, write_gguf
    from hf_gptq_plugin.convert.order import natural_order
    from hf_gptq_plugin.convert.source import open_source
    from hf_gptq_plugin.convert.stream import convert as rewrite

    kept = torch_dtype(dtype)
    if kept == "auto":
        raise ValueError("--dtype='auto' is not supported here; use bfloat16, float16 or float32")
    if not 0 < shard_size < float("inf"):
        raise ValueError(f"--shard-size={shard_size} must be a number of GB above 0")
    source = open_source(folder_of(model))
    notes: list[str] = []
    order = natural_order(source) if natural else None
    if order is not None:
        source = order.source
        notes += _told(order)
    with tqdm(total=len(source.modules), desc="Converting", unit="layer", disable=as_json) as bar:
        if to == "gguf":
            done, more = write_gguf(source, out, gguf_type, lambda outcome: bar.update() and None)
            notes += more
        else:
            shard = max(int(shard_size * 1e9), 1)
            done = rewrite(source, out, to, shard, kept, lambda outcome: bar.update() and None)
    rounded = [outcome for outcome in done if outcome.module not in source.modules]
    done = [outcome for outcome in done if outcome.module in source.modules]
    lossy = [outcome for outcome in done if not outcome.exact]
    written = [file_of(out)] if to == "gguf" else list(out.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in written)
    if as_json:
        modules = [vars(outcome) for outcome in done]
        report = {"from": source.layout, "to": to, "bytes": size, "notes": notes, "modules": modules}
        report["rounded"] = [vars(outcome) for outcome in rounded]
        if order is not None:
            report |= {"natural": order.natural, "act_order": order.kept}
        print_json(report)
        return
    if source.layout != source.label:
        console.print(f"The source is labelled {source.label}, and its zero points are {source.layout}: read as such.")
    for note in notes:
        console.print(f"Note: {note}.", highlight=False)
    if lossy:
        for reason in dict.fromkeys(outcome.note for outcome in lossy):
            of_it = [outcome for outcome in lossy if outcome.note == reason]
            worst = max(of_it, key=lambda outcome: outcome.error)
            console.print(
                f"{len(of_it)} of {len(done)} modules changed: {reason}; at most {worst.error:.2e} relative to the "
                f"weight, in {worst.module}."
            )
    else:
        but = ", but for the order of channels" if order is not None and order.natural else ""
        console.print(f"All {len(done)} modules are what they were, bit for bit in float32{but}.")
    if rounded:
        worst = max(rounded, key=lambda outcome: outcome.error)
        others = len(source.headers) - sum(map(len, source.modules.values()))
        console.print(
            f"{len(rounded)} of {others} tensors that were never quantized changed: {worst.note}; at most "
            f"{worst.error:.2e} relative to the tensor, in {worst.module}."
        )
    console.print(f"{out} holds {size / 1e6:.1f} MB as {to}.")


def _told(order: Reordering) -> list[str]:
    """What became natural, and what stays in act-order and why."""
    from hf_gptq_plugin.convert.inspect import patterns

    if not (order.natural or order.kept):
        return ["no module is in act-order"]
    told = []
    if order.natural:
        told.append(
            f"{len(order.natural)} modules leave act-order: {', '.join(patterns(order.natural))}. Where their inputs "
            "changed places, adapters trained on the source do not fit"
        )
    for reason in dict.fromkeys(order.kept.values()):
        names = [name for name, why in order.kept.items() if why == reason]
        told.append(f"{len(names)} modules stay in act-order, {', '.join(patterns(names))}: {reason}")
    return told
