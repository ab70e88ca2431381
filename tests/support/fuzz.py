"""Damaged input, by the thousand: checkpoints, GGUF files, adapters, command lines, mutated from whole ones.

Accepted is success or one of the errors that a user sees as one line. A finding is anything else: another exception,
a case of more than `LIMIT` seconds, a file left by a failure or written elsewhere, code from a checkpoint that ran.

    python tests/support/fuzz.py --count 20000 --seed 3
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # as a program, too

import torch
from safetensors.torch import save

from hf_gptq_cli import app as cli
from hf_gptq_cli import main
from hf_gptq_cli.app import user_errors
from hf_gptq_plugin.convert.gguf import write_gguf
from hf_gptq_plugin.convert.inspect import inspect
from hf_gptq_plugin.convert.layouts import TARGETS, layout
from hf_gptq_plugin.convert.order import natural_order
from hf_gptq_plugin.convert.source import Source, open_source
from hf_gptq_plugin.convert.stream import convert
from hf_gptq_plugin.format.grid import QuantizedWeight, natural_groups
from hf_gptq_plugin.format.spec import QuantSpec
from hf_gptq_plugin.hf.adapter import check_adapter

LIMIT = 20  # seconds per case, on a busy machine
WIDTH, HEADS = 64, 2
USER_ERRORS = user_errors()
Files = dict[str, bytes]

# What takes the place of a value in JSON.
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**70), 0.5, -0.0, 1e400, float("nan"), "", "x", "4", "../../x",
    "/etc/passwd", "a\0b", "\ud800", "[bold]", "[/]", "é" * 300, [], [[]], [1, "2"], {}, {"a": {}}, [None] * 50,
    "(a+)+$", "re:(.*)*y", "re:(", "-:(", "(?:a|a)*b", ".*.*.*.*.*.*.*.*.*.*z",
]  # fmt: skip


class Unexpected(Exception):
    """A command ended with one line about an error that this package does not raise itself."""


class Hang(BaseException):
    """A case took too long. Not an Exception, so that nothing swallows it."""


def weight(n: int, k: int, spec: QuantSpec) -> QuantizedWeight:
    groups = spec.groups(k)
    zeros = torch.full((groups, n), 2 ** (spec.bits - 1), dtype=torch.int32)
    if not spec.sym:
        zeros = torch.randint(1, spec.maxq + 1, (groups, n), dtype=torch.int32)
    group = natural_groups(k, spec.group_size)
    if spec.desc_act:
        group = group[torch.randperm(k)]
    codes = torch.randint(0, 2**spec.bits, (n, k), dtype=torch.uint8)
    return QuantizedWeight(codes, torch.rand(groups, n).half() + 0.1, zeros, group, spec)


def checkpoints() -> list[Files]:
    """A small Llama in every layout, as files."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "intermediate_size": 96, "vocab_size": 40,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "auto_map": {"AutoModel": "modeling_x.X"},
    }  # fmt: skip
    names = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 64)}
    names |= {"mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96)}
    vocabulary = {chr(ord("A") + i): i for i in range(38)}
    tokenizer = {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["A", "B"]]},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "added_tokens": [{"id": 38, "content": "<s>", "special": True}],
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}]},
    }
    out = []
    kinds = [
        ("gptq", QuantSpec(4, 32, sym=False)), ("gptq", QuantSpec(3, 32, sym=True)), ("gptq_v2", QuantSpec(4, 32)),
        ("gptq_v2", QuantSpec(8, -1, sym=False)), ("gptq", QuantSpec(4, 32, desc_act=True)),
        ("awq", QuantSpec(4, 32, sym=False)), ("compressed-tensors", QuantSpec(4, 32, sym=False)),
        ("compressed-tensors", QuantSpec(8, 32)), ("dense", QuantSpec(4, 32)),
    ]  # fmt: skip
    for name, spec in kinds:
        kind = layout(name)
        tensors: dict[str, torch.Tensor] = {"model.embed_tokens.weight": torch.randn(40, WIDTH).half()}
        tensors |= {"lm_head.weight": torch.randn(40, WIDTH).half(), "model.norm.weight": torch.ones(WIDTH).half()}
        specs = {}
        for block in range(2):
            for leaf, shape in names.items():
                module = f"model.layers.{block}.{leaf}"
                written = kind.write(module, weight(*shape, spec))
                tensors |= {f"{module}.{part}": value.contiguous() for part, value in written.items()}
                specs[module] = spec
        described = kind.config(specs, ["lm_head"])
        if name.startswith("gptq"):
            described = {**(described or {}), "dynamic": {"+:.*nothing.*": {"bits": 8}}}
        files = {"config.json": json.dumps({**config, "quantization_config": described} if described else config)}
        files |= {"tokenizer.json": json.dumps(tokenizer), "tokenizer_config.json": json.dumps({"bos_token": "<s>"})}
        files["model.safetensors.index.json"] = json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")})
        encoded = {path: text.encode() for path, text in files.items()}
        out.append({**encoded, "model.safetensors": save(tensors), "modeling_x.py": b"open('ran', 'w')\n"})
    return out


def replaced(value: Any, rng: random.Random) -> Any:
    """A JSON value with one thing in it changed: replaced, removed, or doubled under another name."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        out = dict(value)
        action = rng.random()
        if action < 0.15:
            del out[key]
        elif action < 0.2:
            out[str(rng.choice(JUNK))] = out.pop(key)
        else:
            out[key] = replaced(value[key], rng)
        return out
    if isinstance(value, list) and value and rng.random() < 0.7:
        index = rng.randrange(len(value))
        return [*value[:index], replaced(value[index], rng), *value[index + 1 :]]
    if type(value) is int and rng.random() < 0.5:
        return rng.choice([value + 1, value - 1, -value, value * 2, value * 10**9, float(value), str(value)])
    return rng.choice(JUNK)


def mutated_bytes(data: bytes, rng: random.Random, start: int = 0, end: int | None = None) -> bytes:
    """Some bytes changed, cut out, put in or cut off, between two places."""
    end = min(len(data), len(data) if end is None else end)
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        place = rng.randrange(start, max(end, start + 1))
        action = rng.random()
        if action < 0.5 and place < len(out):
            out[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif action < 0.7:
            out[place : place + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1]))
        elif action < 0.8:
            del out[place : place + rng.choice([1, 4, 64])]
        elif action < 0.9:
            out[place:place] = rng.randbytes(rng.choice([1, 4, 64]))
        else:
            del out[place:]
    return bytes(out)


def mutated_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header, values or length are not what they were."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + size], data[8 + size :]
    action = rng.random()
    if action < 0.2:
        return mutated_bytes(data, rng, 0, 8 + size)
    if action < 0.4:
        return header[:0] + data[: 8 + size] + mutated_bytes(body, rng)[: len(body)].ljust(len(body), b"\xff")
    if action < 0.5:  # NaN and large numbers wherever they fall
        filled = bytearray(body)
        for _ in range(64):
            place = rng.randrange(0, len(filled) - 4) & ~3
            filled[place : place + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x00\x7c\x00\x7c", b"\x00\x00\x00\x80"])
        return data[: 8 + size] + bytes(filled)
    changed = json.dumps(replaced(json.loads(header), rng)).encode()
    changed += b" " * (-len(changed) % 8)
    return struct.pack("<Q", len(changed)) + changed + body


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    action = rng.random()
    if action < 0.1:
        return mutated_bytes(data, rng)
    if action < 0.12:
        return b"[" * 100_000 + b"]" * 100_000
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        value = replaced(value, rng)
    return json.dumps(value).encode()


def mutated(files: Files, rng: random.Random) -> Files:
    """Files of which one or two are damaged or gone."""
    out = dict(files)
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice([n for n in out if not n.endswith(".py")] or [""])
        if not name:
            continue
        if rng.random() < 0.03:
            del out[name]
        elif name.endswith(".json"):
            out[name] = mutated_json(files[name], rng)
        elif name.endswith(".safetensors"):
            out[name] = mutated_safetensors(files[name], rng)
        else:
            out[name] = mutated_bytes(files[name], rng, 0, 2000)
    if rng.random() < 0.5:
        out.pop("model.safetensors.index.json", None)
    return out


def put(files: Files, folder: Path) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


class Fuzz:
    """Cases of all kinds in one folder, and what came of them.

    Args:
        root: an empty folder.
        seed: of the mutations.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.rng = root, random.Random(seed)
        self.counts: dict[str, Counter[str]] = {}
        self.findings: list[str] = []
        self.sources = checkpoints()
        put(self.sources[0], root / "whole")
        write_gguf(open_source(root / "whole"), root / "whole.gguf")
        self.gguf = (root / "whole.gguf").read_bytes()
        self.adapter = {
            "adapter_config.json": json.dumps(
                {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
            ).encode(),
            "adapter_model.safetensors": save(
                {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{m}.weight": torch.ones(s)
                 for m, s in (("A", (4, WIDTH)), ("B", (WIDTH, 4)))}
            ),
        }  # fmt: skip
        for leftover in list(root.iterdir()):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def case(self, kind: str, run: Callable[[], object], makes: tuple[str, ...] = ()) -> None:
        """Run one case; `makes` are the names that only a success may leave in the root."""
        outcome = "done"
        before = set(os.listdir(self.root))
        handler, timer = signal.signal(signal.SIGALRM, _hang), signal.setitimer(signal.ITIMER_REAL, LIMIT)
        try:
            run()
        except Unexpected:
            outcome = "another library's error"
        except USER_ERRORS as error:
            outcome = "refused"
            if not str(error).strip():
                self._finding(kind, f"{type(error).__name__} without a word")
        except Hang:
            outcome = "hang"
            self._finding(kind, f"more than {LIMIT} s")
        except BaseException as error:
            outcome = "crash"
            where = traceback.format_exception(error)[-3:]
            self._finding(kind, f"{type(error).__name__}: {error}"[:300] + "".join(where)[-600:])
        finally:
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, *timer)  # a test's own limit
        after = set(os.listdir(self.root)) - before
        if after - (set(makes) if outcome == "done" else set()):
            self._finding(kind, f"{outcome}, but it left {sorted(after)}")
        for name in after:
            path = self.root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.counts.setdefault(kind, Counter())[outcome] += 1

    def _finding(self, kind: str, text: str) -> None:
        kept = self.root.parent / f"finding-{len(self.findings)}"
        if (self.root / "case").exists() and len(self.findings) < 20:
            shutil.copytree(self.root / "case", kept, dirs_exist_ok=True)
        self.findings.append(f"{kind}: {text} ({kept})")

    def checkpoint(self) -> None:
        """Inspect a damaged checkpoint and convert it."""
        folder = put(mutated(self.rng.choice(self.sources), self.rng), self.root / "case")
        self.case("inspect a checkpoint", lambda: inspect(folder))
        target = self.rng.choice([*TARGETS, "gguf"])
        out, natural = self.root / "out", self.rng.random() < 0.5

        def source() -> Source:
            return natural_order(open_source(folder)).source if natural else open_source(folder)

        if target == "gguf":
            self.case("convert to gguf", lambda: write_gguf(source(), out / "m.gguf"), ("out",))
        else:
            shard = self.rng.choice([10**9, 5000])
            self.case("convert a checkpoint", lambda: convert(source(), out, target, shard), ("out",))
        shutil.rmtree(folder)

    def gguf_file(self) -> None:
        """Inspect a damaged GGUF file."""
        folder = put({"m.gguf": mutated_bytes(self.gguf, self.rng, 0, 4000)}, self.root / "case")
        self.case("inspect a GGUF file", lambda: inspect(folder / "m.gguf"))
        shutil.rmtree(folder)

    def lora(self) -> None:
        """Check a damaged adapter."""
        folder = put(mutated(self.adapter, self.rng), self.root / "case")
        self.case("check an adapter", lambda: check_adapter(folder))
        shutil.rmtree(folder)

    def command(self) -> None:
        """A command line of options that do not belong together, on a damaged checkpoint."""
        folder = put(mutated(self.rng.choice(self.sources), self.rng), self.root / "case")
        arguments = command_line(self.rng, folder, self.root / "out")
        self.case("a command line", lambda: called(arguments), ("out", "out.gguf"))
        shutil.rmtree(folder)

    def run(self, count: int) -> None:
        """So many cases, two thirds of them checkpoints."""
        kinds = [self.checkpoint] * 4 + [self.gguf_file, self.lora]
        for _ in range(count):
            self.rng.choice(kinds)()

    def commands(self, count: int) -> None:
        """So many command lines."""
        for _ in range(count):
            self.command()


def _hang(*args: object) -> None:
    raise Hang


WORDS = ("0", "-1", "1", "2", "x", "", "nan", "1e9", "99999999999999999999", "../x", "[/]", "--", "a\nb", "é", "auto")


def command_line(rng: random.Random, folder: Path, out: Path) -> list[str]:
    """A command, its arguments, and options of it or of others, with values that may fit."""
    import typer

    group: Any = typer.main.get_command(cli)
    name = rng.choice(
        ["inspect", "inspect", "convert", "convert", "push", "verify", "eval", "fold", "train", "quantize"]
    )
    command = group.commands[name]
    arguments = [name]
    for parameter in command.params:
        if parameter.param_type_name == "argument" and rng.random() < 0.95:
            arguments.append(str(out) if parameter.name == "out" else rng.choice([str(folder)] * 6 + list(WORDS)))
        elif parameter.param_type_name == "option" and rng.random() < (0.95 if parameter.required else 0.15):
            option = rng.choice(parameter.opts)
            if parameter.name not in ("dry_run", "install_completion", "show_completion"):
                arguments += [option] if parameter.is_flag else [option, rng.choice([*WORDS, *TARGETS, str(folder)])]
    if name == "push":
        arguments.append("--dry-run")
    if rng.random() < 0.1:
        arguments.insert(rng.randrange(1, len(arguments) + 1), rng.choice(["--nonsense", "--json", *WORDS]))
    return [argument.replace("\0", "") for argument in arguments]


def called(arguments: list[str]) -> None:
    """Run the entry point as a process would.

    Raises:
        RuntimeError: an exit code without meaning, a failure without a message, a traceback.
        ValueError: exit code 1, 2 or 3 with a message.
    """
    before, sys.argv = sys.argv, ["hf-gptq", *arguments]
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as error:
        code = error.code or 0
    finally:
        sys.argv = before
    text = out.getvalue() + err.getvalue()
    if code not in (0, 1, 2, 3) or "Traceback" in text or (code and not text.strip()):
        raise RuntimeError(f"exit code {code!r} of {arguments}: {text[-500:]}")
    if "(unexpected: " in text:
        raise Unexpected(text)
    if code:
        raise ValueError(f"exit code {code}")


@contextlib.contextmanager
def running(seed: int) -> Iterator[Fuzz]:
    """A `Fuzz` in a folder of its own, from where code that runs would be seen."""
    place = Path(tempfile.mkdtemp(prefix="fuzz."))
    before = Path.cwd()
    (place / "root").mkdir()
    (place / "cwd").mkdir()
    os.chdir(place / "cwd")
    try:
        fuzz = Fuzz(place / "root", seed)
        yield fuzz
        for written in sorted(path.name for path in (place / "cwd").iterdir()):
            fuzz.findings.append(f"{written} was written into the working folder")
    finally:
        os.chdir(before)
        if not any(place.glob("finding-*")):
            shutil.rmtree(place, ignore_errors=True)


def table(fuzz: Fuzz) -> str:
    """Counts per kind and outcome."""
    rows = [f"{kind:24} {dict(counts)}" for kind, counts in sorted(fuzz.counts.items())]
    total = sum(sum(counts.values()) for counts in fuzz.counts.values())
    return "\n".join([*rows, f"{total} cases, {len(fuzz.findings)} findings", *fuzz.findings[:20]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000, help="damaged files")
    parser.add_argument("--commands", type=int, default=500, help="command lines")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with running(given.seed) as fuzzing:
        fuzzing.run(given.count)
        fuzzing.commands(given.commands)
    print(table(fuzzing))
    sys.exit(bool(fuzzing.findings))
