"""How a calibration's cost grows with text, layers and width: processor time and peak memory, with exponents.

    python benchmarks/scaling.py [--preset balanced] [--low-memory] [--json FILE]

Each point is a random Llama with heads of 64, quantized to 4 bit in a process of its own. Processor time is that of all
threads, so that other work on the machine changes little; memory is the highest resident size of the process from the
call of `from_pretrained` on, above what it was before it. An exponent e says that cost grows as quantity^e between the
largest two points.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

BASE = {"tokens": 4096, "layers": 4, "width": 512}
POINTS = {"tokens": (4096, 8192, 16384), "layers": (4, 8, 16), "width": (256, 512, 1024)}
SEQLEN = 256
VOCABULARY = 1024


def resident() -> int:
    """Bytes of this process in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The highest resident size while the context lasts, above that at its beginning, looked at every 10 ms."""

    def __enter__(self) -> Peak:
        self.start = self.highest = resident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.highest = max(self.highest, resident())

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        return self.highest - self.start


def measure(tokens: int, layers: int, width: int, preset: str, low_memory: bool) -> dict[str, float]:
    """One point, in this process."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from hf_gptq_plugin import GPTQConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(Path(folder, "dense"))
        text = torch.randint(VOCABULARY, (tokens // SEQLEN, SEQLEN)).tolist()
        disk: dict[str, Any] = {"low_memory": True, "journal": str(Path(folder, "journal"))} if low_memory else {}
        quantization = GPTQConfig(
            bits=4, group_size=64, dataset=text, samples=len(text), seqlen=SEQLEN, preset=preset, generated=0, **disk
        )
        start = time.process_time()
        with Peak() as peak:
            AutoModelForCausalLM.from_pretrained(
                Path(folder, "dense"), dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
            )
        return {"seconds": time.process_time() - start, "bytes": peak.bytes}


def main() -> None:
    """Measure every point and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--low-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)  # one point, for this program's own use
    options = parser.parse_args()
    if options.point is not None:
        print("POINT " + json.dumps(measure(**options.point, preset=options.preset, low_memory=options.low_memory)))
        return
    known: dict[str, dict[str, float]] = {}
    rows = []
    print(f"{'quantity':10} {'value':>8} {'CPU s':>8} {'peak MB':>8} {'e time':>7} {'e memory':>8}")
    for quantity, values in POINTS.items():
        before: dict[str, float] | None = None
        for value in values:
            point = json.dumps({**BASE, quantity: value})
            if point not in known:
                flags = ["--low-memory"] if options.low_memory else []
                command = [sys.executable, __file__, "--preset", options.preset, "--point", point, *flags]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr[-4000:])
                known[point] = json.loads(done.stdout.split("POINT ")[1])
            found = {"value": value, **known[point]}
            exponents = ""
            if before is not None:
                step = math.log(value / before["value"])
                time_e, memory_e = (math.log(found[k] / before[k]) / step for k in ("seconds", "bytes"))
                exponents = f"{time_e:7.2f} {memory_e:8.2f}"
            print(
                f"{quantity:10} {value:8} {found['seconds']:8.1f} {found['bytes'] / 1e6:8.0f} {exponents}", flush=True
            )
            rows.append({"quantity": quantity, **found})
            before = found
    if options.json is not None:
        machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        versions = {name: version(name) for name in ("torch", "transformers", "hf-gptq-plugin")}
        options.json.write_text(
            json.dumps(
                {"machine": machine, "versions": versions, "preset": options.preset, "low_memory": options.low_memory,
                 "base": BASE, "rows": rows},
                indent=2,
            )
        )  # fmt: skip


if __name__ == "__main__":
    main()
