"""`hf-gptq train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import Dtype, Json, console, print_json, torch_dtype
from .choices import DEFAULT, METHODS, PRESETS, TRAINING
from .refuse import require_exists, require_writable

if TYPE_CHECKING:
    from hf_gptq_plugin.hf.training import Outcome


def train(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder or Hub name of a GPTQ or dense model; folder of an AWQ or compressed-tensors one.",
        ),
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
    save_every: Annotated[
        int, typer.Option(help="Steps between two states that an interrupted training goes on from.")
    ] = TRAINING["save_every"],
    rank: Annotated[
        int | None, typer.Option(help="Of lora, qa-lora and l4q; 16 by default.", rich_help_panel="Method")
    ] = None,
    gamma: Annotated[
        float | None,
        typer.Option(help="Factor of lora, qa-lora and l4q (lora_alpha / r); 2 by default.", rich_help_panel="Method"),
    ] = None,
    every: Annotated[
        int | None, typer.Option(help="Steps between roundings; 4 by default.", rich_help_panel="shadow")
    ] = None,
    cap: Annotated[
        float | None,
        typer.Option(help="Largest share of codes that change at once; 0.05 by default.", rich_help_panel="shadow"),
    ] = None,
    decay: Annotated[
        float | None, typer.Option(help="How much a rounding forgets; 0.01 by default.", rich_help_panel="shadow")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, or q-galore for whole matrices.")] = "adamw",
    subspace: Annotated[
        int, typer.Option(help="Rank of the gradients' projection.", rich_help_panel="q-galore")
    ] = TRAINING["subspace"],
    gradients: Annotated[
        str, typer.Option(help="float, or int8-block: rounded in blocks of 256.", rich_help_panel="Gradients")
    ] = "float",
    gradient_warmup: Annotated[
        int, typer.Option(help="Steps before int8-block begins; fewer than --steps.", rich_help_panel="Gradients")
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
    start: Annotated[
        str,
        typer.Option(  # torchrun would take --start for an abbreviation of its own options
            "--start", "--quantize-by", help=f"One of {', '.join(METHODS)}.", rich_help_panel="Dense models"
        ),
    ] = DEFAULT["method"],
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

    A dense MODEL is quantized first, on the windows it trains on. Interrupted, the same command goes on (OUT.training).
    Under torchrun, processes share the windows of every step; --start is spelled --quantize-by there.

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
        exchange=exchange, save_every=save_every,
    )  # fmt: skip
    asked = {"rank": rank, "gamma": gamma, "every": every, "cap": cap, "decay": decay}
    options = {name: value for name, value in asked.items() if value is not None}
    names = None if target_modules is None else [name.strip() for name in target_modules.split(",")]
    quantization = {"bits": bits, "group_size": group_size, "sym": sym, "method": start, "seed": seed}
    if start == "gptq":
        quantization["preset"] = preset
    require_exists(model)
    require_writable(out)
    processes.join()
    quiet = as_json or processes.rank() > 0
    bar: Any = None

    def tell(text: str) -> None:
        if not quiet:
            console.print(text, soft_wrap=True, highlight=False)

    def progress(done: int, loss: float) -> None:
        nonlocal bar
        bar = bar or tqdm(initial=done - 1, total=steps, desc="Training", unit="step", disable=quiet)
        bar.update(done - bar.n)
        bar.set_postfix_str(f"loss {loss:.4f}")
        if done == steps:
            bar.close()

    try:
        found = run(
            model, out, method, Data(data, held_out, samples, seqlen), settings, quantization, names, options,
            torch_dtype(dtype), progress, checkpointing, tell,
        )  # fmt: skip
    finally:
        if bar is not None:
            bar.close()  # an error is told on a line of its own
    if processes.rank() > 0:
        return
    if as_json:
        print_json(vars(found))
        return
    tell(f"Loaded again, logits are the trained model's to {found.difference:.1e} of the largest.")
    tell(f"Held-out loss {found.before:.4f} before, {found.after:.4f} after.")
    if not found.after < found.before:
        tell(
            "It has not improved: train for longer, on more windows, or at a lower --rate, and hold out text that is "
            "like what is trained on."
        )
    tell(f"vllm serve {found.folder} --quantization hf_gptq{'' if found.adapter is None else _lora(found, rank)}")


# Ranks that vLLM makes room for; more than the first must be asked for.
_VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)


def _lora(found: Outcome, rank: int | None) -> str:
    """vLLM's options for the adapter."""
    asked = 16 if rank is None else rank
    room = next((each for each in _VLLM_RANKS if each >= asked), asked)
    wide = "" if room == _VLLM_RANKS[0] else f" --max-lora-rank {room}"
    # One place more than there are adapters: vLLM 0.32 on the CPU gives requests without one the last place's weights.
    return f" --enable-lora --max-loras 2{wide} --lora-modules tuned={found.adapter}"
