"""`hf-gptq train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..config import PRESETS
from .app import DEFAULT, Dtype, Json, console, print_json, torch_dtype


def train(
    model: Annotated[str, typer.Argument(help="Folder or Hub name: GPTQ, AWQ, compressed-tensors, or dense.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; adapters go to OUT/adapter.")],
    data: Annotated[str, typer.Option(help="Text or chats: a file, or the name of a data set.")],
    method: Annotated[str, typer.Option(help="lora, qa-lora, affine, eetq, ste, shadow or l4q.")] = "lora",
    held_out: Annotated[
        str | None, typer.Option(help="What to evaluate on; a tenth of --data is kept back otherwise.")
    ] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Which layers learn: last parts of names, with commas; all by default.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Most windows of --data.")] = 256,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 4,
    rate: Annotated[float | None, typer.Option(help="Learning rate; the method's own by default.")] = None,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of windows and their order.")] = 0,
    rank: Annotated[int | None, typer.Option(help="Of lora, qa-lora and l4q.", rich_help_panel="Method")] = None,
    gamma: Annotated[
        float | None, typer.Option(help="Factor of lora, qa-lora and l4q (lora_alpha / r).", rich_help_panel="Method")
    ] = None,
    every: Annotated[int | None, typer.Option(help="Steps between roundings.", rich_help_panel="shadow")] = None,
    cap: Annotated[
        float | None, typer.Option(help="Largest share of codes that change at once.", rich_help_panel="shadow")
    ] = None,
    decay: Annotated[float | None, typer.Option(help="How much a rounding forgets.", rich_help_panel="shadow")] = None,
    bits: Annotated[int, typer.Option(help="Width of a code.", rich_help_panel="Dense models")] = DEFAULT["bits"],
    group_size: Annotated[
        int, typer.Option(help="Input features per scale.", rich_help_panel="Dense models")
    ] = DEFAULT["group_size"],
    preset: Annotated[
        str, typer.Option(help=f"One of {', '.join(PRESETS)}.", rich_help_panel="Dense models")
    ] = DEFAULT["preset"],
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Train on a quantized base and write what vLLM serves: a GPTQ checkpoint, or an adapter for one.

    A dense MODEL is quantized first, on --data. Interrupted, the same command goes on (OUT.training).

    Example: hf-gptq train ./smollm2-4bit ./tuned --method affine --data corpus.txt --steps 50
    """
    from tqdm.auto import tqdm

    from ..hf.training import LORA_RATE, TRAINABLE, Data, run
    from ..train.loop import TrainSettings
    from ..train.methods import METHODS

    if method not in TRAINABLE:
        raise ValueError(f"--method={method!r} is not known; use one of {', '.join(TRAINABLE)}")
    usual = LORA_RATE if method == "lora" else METHODS[method].rate
    settings = TrainSettings(steps=steps, batch=batch, rate=usual if rate is None else rate, warmup=warmup, seed=seed)
    asked = {"rank": rank, "gamma": gamma, "every": every, "cap": cap, "decay": decay}
    options = {name: value for name, value in asked.items() if value is not None}
    names = None if target_modules is None else [name.strip() for name in target_modules.split(",")]
    quantization = {"bits": bits, "group_size": group_size, "preset": preset, "dataset": data, "seed": seed}
    with tqdm(total=steps, desc="Training", unit="step", disable=as_json) as bar:

        def progress(done: int, loss: float) -> None:
            bar.update(done - bar.n)
            bar.set_postfix_str(f"loss {loss:.4f}")

        found = run(
            model, out, method, Data(data, held_out, samples, seqlen), settings, quantization, names, options,
            torch_dtype(dtype), progress,
        )  # fmt: skip
    if as_json:
        print_json(vars(found))
        return
    console.print(
        f"{found.method}: {found.parameters / 1e6:.2f} M numbers in {found.layers} layers; held-out loss "
        f"{found.before:.4f} before, {found.after:.4f} after."
    )
    console.print(f"Loaded again, logits are the trained model's to {found.difference:.1e} of the largest.")
    lora = "" if found.adapter is None else f" --enable-lora --lora-modules tuned={found.adapter}"
    console.print(f"vllm serve {found.folder} --quantization hf_gptq{lora}", soft_wrap=True, highlight=False)
