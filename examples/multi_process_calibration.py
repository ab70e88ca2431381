"""Quantize with several processes: each runs a share of the calibration text, all end with the same model.

    torchrun --nproc-per-node 2 multi_process_calibration.py MODEL OUT --calibration corpus.txt

`accelerate launch` starts it as well; without GPUs with `--multi_gpu`, or it starts one process. On GPUs every process
takes the device of its local rank.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.calibrate import processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name of the dense model")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--calibration", required=True, help="text file, or the name of a data set such as wikitext2")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows, all processes together")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens per window")
    parser.add_argument("--preset", default="balanced", choices=["fast", "balanced", "best"])
    arguments = parser.parse_args()

    processes.join()  # before loading: Hessians are summed over all processes
    device = processes.own_device("cuda" if torch.cuda.is_available() else "cpu")

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    config = GPTQConfig(
        bits=arguments.bits,
        group_size=arguments.group_size,
        dataset=arguments.calibration,
        tokenizer=tokenizer,
        samples=arguments.samples,
        seqlen=arguments.seqlen,
        preset=arguments.preset,
    )
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, quantization_config=config, dtype="auto", device_map=device
    )
    if processes.rank() == 0:  # all hold the same; one writes
        model.save_pretrained(arguments.out)
        tokenizer.save_pretrained(arguments.out)
        tokens = {report.tokens for report in model.hf_quantizer.reports}
        print(f"{processes.count()} processes, {max(tokens)} calibration tokens; written to {arguments.out}")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
