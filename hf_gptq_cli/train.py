"""`hf-gptq train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Dtype, Json, console, print_json, torch_dtype
from .choices import DEFAULT, METHODS, PRESETS, TRAINING


def train(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or Hub name: GPTQ, AWQ, compressed-tensors, or dense.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; adapters go to OUT/adapter.")],
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
    optimizer: Annotated[str, typer.Option(help="adamw, or q-galore for whole matrices.")] = "adamw",
    subspace: Annotated[
        int, typer.Option(help="Rank of the gradients' projection.", rich_help_panel="q-galore")
    ] = TRAINING["subspace"],
    gradients: Annotated[
        str, typer.Option(help="float, or int8-block: rounded in blocks of 256.", rich_help_panel="Gradients")
    ] = "float",
    gradient_warmup: Annotated[
        int, typer.Option(help="Steps before int8-block begins.", rich_help_panel="Gradients")
    ] = TRAINING["gradient_warmup"],
    gradient_modules: Annotated[
        str | None,
        typer.Option(help="Layers that int8-block is for: parts of names, with commas.", rich_help_panel="Gradients"),
    ] = None,
    exchange: Annotated[
        str, typer.Option(help="float or int8-block: between processes (torchrun).", rich_help_panel="Gradients")
    ] = "float",
    checkpointing: Annotated[
        bool, typer.Option(help="Compute activations again in the backward pass: less memory, more time.")
    ] = False,
    start: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.", rich_help_panel="Dense models")] = DEFAULT[
        "method"
    ],
    sym: Annotated[
        bool, typer.Option("--sym/--asym", help="Symmetric or asymmetric grid.", rich_help_panel="Dense models")
    ] = DEFAULT["sym"],
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

    A dense MODEL is quantized first, on --data. Interrupted, the same command goes on (OUT.training). Under torchrun,
    processes share the windows of every step.

    Example: hf-gptq train ./smollm2-4bit ./tuned --method affine --data corpus.txt --steps 50
    """
    from tqdm.auto import tqdm

    from hf_gptq_plugin.calibrate import processes
    from hf_gptq_plugin.hf.training import TRAINABLE, Data, run, usual_rate
    from hf_gptq_plugin.train.loop import TrainSettings

    if method not in TRAINABLE:
        raise ValueError(f"--method={method!r} is not known; use one of {', '.join(TRAINABLE)}")
    settings = TrainSettings(
        steps=steps, batch=batch, rate=usual_rate(method, optimizer) if rate is None else rate, warmup=warmup,
        seed=seed, optimizer=optimizer, subspace=subspace, gradients=gradients, gradient_warmup=gradient_warmup,
        gradient_modules=() if gradient_modules is None else tuple(n.strip() for n in gradient_modules.split(",")),
        exchange=exchange,
    )  # fmt: skip
    asked = {"rank": rank, "gamma": gamma, "every": every, "cap": cap, "decay": decay}
    options = {name: value for name, value in asked.items() if value is not None}
    names = None if target_modules is None else [name.strip() for name in target_modules.split(",")]
    quantization = {"bits": bits, "group_size": group_size, "sym": sym, "method": start, "seed": seed}
    if start == "gptq":
        quantization |= {"preset": preset, "dataset": data}
    processes.join()
    with tqdm(total=steps, desc="Training", unit="step", disable=as_json or processes.rank() > 0) as bar:

        def progress(done: int, loss: float) -> None:
            bar.update(done - bar.n)
            bar.set_postfix_str(f"loss {loss:.4f}")

        found = run(
            model, out, method, Data(data, held_out, samples, seqlen), settings, quantization, names, options,
            torch_dtype(dtype), progress, checkpointing,
        )  # fmt: skip
    if processes.rank() > 0:
        return
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
