"""Quantize a model and publish the checkpoint on the Hub, with a card that says how it was made and how to load it.

    python quantize_and_push.py HuggingFaceTB/SmolLM2-135M-Instruct you/SmolLM2-4bit --calibration corpus.txt

Log in first (`hf auth login`), or set HF_TOKEN.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_gptq_plugin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name of the dense model")
    parser.add_argument("repo", help="Hub repository to publish to, e.g. you/SmolLM2-4bit")
    parser.add_argument("--calibration", required=True, help="text file, or the name of a data set such as wikitext2")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens per window")
    parser.add_argument("--preset", default="balanced", choices=["fast", "balanced", "best"])
    parser.add_argument("--public", action="store_true", help="make the repository public")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    config = hf_gptq_plugin.GPTQConfig(
        bits=arguments.bits,
        group_size=arguments.group_size,
        dataset=arguments.calibration,
        tokenizer=tokenizer,
        samples=arguments.samples,
        seqlen=arguments.seqlen,
        preset=arguments.preset,
    )
    model = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=config, dtype="auto")

    # Look before you publish: a layer that calibration did not reach, or that needed much damping, shows here.
    for report in sorted(model.hf_quantizer.reports, key=lambda report: -report.solve.relative_error)[:5]:
        print(f"{report.name}: relative error {report.solve.relative_error:.2e}, damping {report.solve.damp_percent:g}")

    model.push_to_hub(arguments.repo, private=not arguments.public)
    tokenizer.push_to_hub(arguments.repo)
    print(f"Published as {arguments.repo}. Serve it: vllm serve {arguments.repo} --quantization hf_gptq")


if __name__ == "__main__":
    main()
