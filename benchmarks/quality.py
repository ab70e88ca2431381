"""Perplexity, time and size of checkpoints of one model, over bits and presets, and of gptqmodel's where asked.

    python benchmarks/quality.py MODEL --calibration FILE --text FILE [--bits 4 3 2] [--presets fast balanced best]
        [--methods rtn hqq] [--group-size 64] [--samples 64] [--seqlen 512] [--windows 8] [--bos] [--peer PYTHON]
        [--json FILE] [--work FOLDER]

Every row is made by the command line in a process of its own, one after the other, and evaluated by the same command.
Beside FILE the perplexity on Python's help topics is measured: text of another domain than the calibration's, which no
calibration should lose on. Methods read no text at all; `--bos` begins every window that is evaluated with the
tokenizer's BOS, as some models need it. Seconds of ours are those of the whole command, megabytes those of all weights.
`--peer` names the Python of an environment that has gptqmodel; it quantizes the same token
windows at its defaults, timed without loading and saving, and its checkpoint is evaluated like ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import pydoc_data.topics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from hf_gptq_plugin.calibrate.data import calibration_windows
from hf_gptq_plugin.calibrate.sources import read_samples

TOPICS_WINDOWS = 6

PEER = """
import json, sys, time
from gptqmodel import GPTQModel, QuantizeConfig
import gptqmodel
model, out, bits, group_size, data = sys.argv[1:]
windows = json.load(open(data))
loaded = GPTQModel.load(model, QuantizeConfig(bits=int(bits), group_size=int(group_size)), device="cpu")
start = time.perf_counter()
loaded.quantize([{"input_ids": w, "attention_mask": [1] * len(w)} for w in windows], batch_size=1)
seconds = time.perf_counter() - start
loaded.save(out)
print("PEER " + json.dumps({"seconds": seconds, "version": gptqmodel.__version__}))
"""


def call(*command: Any, folder: Path | None = None, **environment: str) -> str:
    """Run a command, in a folder where it may leave logs, return what it printed."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **environment}, cwd=folder
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def ours(*arguments: Any) -> str:
    """Our command line, in a process of its own."""
    return call(sys.executable, "-c", "from hf_gptq_cli import main; main()", *arguments)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--presets", nargs="*", default=["fast", "balanced", "best"])
    parser.add_argument("--methods", nargs="*", default=["rtn", "hqq"])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--bos", action="store_true")
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help="where checkpoints are kept; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        topics = work / "topics.txt"
        topics.write_text("\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())))
        run(options, work, topics)


def run(options: argparse.Namespace, work: Path, topics: Path) -> None:
    """All rows, printed as they come."""
    rows: list[dict[str, Any]] = []

    def measure(name: str, folder: str | Path, **more: Any) -> None:
        row: dict[str, Any] = {"name": name, **more}
        row["bytes"] = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        for label, text, windows in (("text", options.text, options.windows), ("topics", topics, TOPICS_WINDOWS)):
            printed = ours("eval", folder, "--text", text, "--windows", windows, "--seqlen", 2048, "--json", *bos)
            row[label] = json.loads(printed)["perplexity"]
        rows.append(row)
        seconds = f"{row['seconds']:8.0f}" if "seconds" in row else " " * 8
        print(
            f"{name:24} {row['text']:10.3f} {row['topics']:10.3f} {row['bytes'] / 1e6:8.1f} {seconds}".rstrip(),
            flush=True,
        )

    bos = ["--bos"] if options.bos else []
    text = (
        "--calibration", options.calibration, "--samples", options.samples, "--seqlen", options.seqlen, "--seed", 0,
    )  # fmt: skip
    print(f"{'':24} {options.text.name[:10]:>10} {'topics':>10} {'MB':>8} {'seconds':>8}")
    measure("dense", options.model)
    for bits in options.bits:
        ways = [(method, ("--method", method)) for method in options.methods]
        ways += [(preset, ("--preset", preset, *text)) for preset in options.presets]
        for name, way in ways:
            out = work / f"{bits}-{name}"
            start = time.perf_counter()
            ours("quantize", options.model, out, "--bits", bits, "--group-size", options.group_size, *way)
            measure(f"{bits} bit, {name}", out, seconds=time.perf_counter() - start)
        if options.peer is not None:
            data, out = work / "windows.json", work / f"{bits}-peer"
            tokenizer = AutoTokenizer.from_pretrained(options.model)
            found = read_samples(str(options.calibration), 0)
            windows = calibration_windows(found, tokenizer, options.samples, options.seqlen, 0, len(tokenizer), "auto")
            data.write_text(json.dumps([window.tolist() for window in windows]))
            workers = str(os.cpu_count())
            model = Path(options.model).resolve() if Path(options.model).exists() else options.model
            printed = call(
                options.peer.absolute(), "-c", PEER, model, out.resolve(), bits, options.group_size, data.resolve(),
                folder=work, GPTQMODEL_CPU_WORKERS=workers,
            )  # fmt: skip
            peer = json.loads(next(line for line in printed.splitlines() if line.startswith("PEER "))[5:])
            measure(f"{bits} bit, gptqmodel {peer['version']}", out, seconds=peer["seconds"])
    if options.json is not None:
        machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        versions = {name: version(name) for name in ("torch", "transformers", "hf-gptq-plugin")}
        settings = {k: str(v) for k, v in vars(options).items() if k not in ("json", "work", "peer")}
        options.json.write_text(
            json.dumps({"machine": machine, "versions": versions, "settings": settings, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
