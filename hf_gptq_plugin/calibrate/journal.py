"""What a calibration leaves on disk as it goes, so that the same command can go on where it was stopped.

A folder holds, for every finished block, the tensors of its quantized layers and their reports, and the hidden states
that entered the next one. `journal.json` names what counts; it is replaced in one step after all it names is written,
so a process that is killed at any moment leaves the journal of the block before. A journal belongs to one job: its
fingerprint says which, and another job's is not gone on with.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# What safetensors writes to before it renames; a process that is killed leaves it.
BEGUN = re.compile(r"\.tmp\w{6}")
_INDEX = "journal.json"
_VERSION = 1
_SAMPLED = 256  # values of every tensor that take part in a fingerprint


class JournalError(RuntimeError):
    """A journal that cannot be written or read."""


class Journal:
    """The journal of one calibration.

    Args:
        folder: made where it is missing. One process at a time.
        fingerprint: of the job, see `fingerprint`. Where the folder holds another job's journal, that is discarded
            with a warning.

    Raises:
        JournalError: a folder with files in it that are no journal.
    """

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        self.folder = Path(folder)
        with named_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._index: dict[str, Any] = {"version": _VERSION, "fingerprint": fingerprint, "blocks": []}
        found = self._read()
        if found is None:
            return
        if found.get("version") == _VERSION and found.get("fingerprint") == fingerprint:
            self._index = found
            if self.blocks:
                logger.info("Going on after %s (%d blocks are done).", self.blocks[-1], len(self.blocks))
            return
        logger.warning(
            "%s holds the journal of another calibration (other model, data, settings or version); starting over.",
            self.folder,
        )
        self.clear()

    def _read(self) -> dict[str, Any] | None:
        path = self.folder / _INDEX
        if not path.exists():
            strangers = [p.name for p in self.folder.iterdir() if not _ours(p.name)]
            if strangers:
                raise JournalError(
                    f"the journal's folder {self.folder} holds {strangers[0]!r}, which is none of a journal's files; "
                    "name an empty or a new folder"
                )
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError):
            return {}

    @property
    def blocks(self) -> list[str]:
        """Names of the finished blocks, in order."""
        return [entry["name"] for entry in self._index["blocks"]]

    def records(self, block: str) -> list[dict[str, Any]]:
        """The records of a finished block's layers."""
        return list(self._entry(block)["reports"])

    def file(self, block: str) -> Path:
        """The safetensors file of a finished block's quantized tensors."""
        return self.folder / self._entry(block)["file"]

    def write_block(self, tensors: Mapping[str, Tensor]) -> Path:
        """Write a block's quantized tensors; they count once `commit` names them."""
        path = self.folder / f"block-{len(self._index['blocks']):05d}.safetensors"
        with named_errors(self.folder), _replacing(path) as part:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
        return path

    def commit(self, block: str, file: Path, records: Iterable[dict[str, Any]], streams: Mapping[str, str]) -> None:
        """Say that a block is done.

        Args:
            block: its name.
            file: what `write_block` returned.
            records: of its layers.
            streams: the sequences of hidden states to go on from, see `Hiddens.sequence`.
        """
        entry = {"name": block, "file": file.name, "reports": list(records)}
        self._index = {**self._index, "blocks": [*self._index["blocks"], entry], "streams": dict(streams)}
        with named_errors(self.folder), _replacing(self.folder / _INDEX) as part:
            part.write_text(json.dumps(self._index), encoding="utf-8")
        for path in self.folder.glob("*.hidden"):
            if path.name.split(".")[0] not in streams.values():
                path.unlink(missing_ok=True)

    def streams(self) -> dict[str, str]:
        """The sequences of hidden states that the last commit named."""
        return dict(self._index.get("streams", {}))

    def clear(self) -> None:
        """Delete all of the journal's files."""
        _delete_files(self.folder)
        self._index = {**self._index, "blocks": []}
        self._index.pop("streams", None)

    def _entry(self, block: str) -> dict[str, Any]:
        return next(entry for entry in self._index["blocks"] if entry["name"] == block)


def discard(folder: Path) -> None:
    """Delete a journal whose work is done: its own files, and the folder if nothing else is in it."""
    if not (folder / _INDEX).exists():
        return
    _delete_files(folder)
    if not any(folder.iterdir()):
        folder.rmdir()


def _delete_files(folder: Path) -> None:
    """The index first: without it, what is left counts for nothing."""
    (folder / _INDEX).unlink(missing_ok=True)
    for path in folder.iterdir():
        if _ours(path.name):
            path.unlink()


class Hiddens(Sequence[Tensor]):
    """Hidden states, one tensor per window: in memory, on disk, or both.

    Args:
        values: to begin with.
        folder: where they are written; None to keep them in memory only.
        sequence: what tells them from other hidden states in the folder; letters, digits and dashes.
        in_memory: whether they are kept in memory, too.
        count: of windows whose are `put` later, or were written by an earlier process.
        device: where these are wanted.
    """

    def __init__(
        self, values: Iterable[Tensor] = (), folder: Path | None = None, sequence: str = "", in_memory: bool = True,
        count: int = 0, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.sequence = sequence
        self._folder = folder
        self._in_memory = in_memory or folder is None
        self._values: list[Tensor | None] = [None] * count
        self._device = torch.device(device)
        for value in values:
            self.append(value)

    def append(self, value: Tensor) -> None:
        """Add the next window's, `[1, tokens, width]`."""
        self._values.append(None)
        self.put(len(self) - 1, value)

    def put(self, window: int, value: Tensor) -> None:
        """Say what a window's are, in any thread."""
        if self._folder is not None:
            write_tensor(self._path(window), value)
        self._device = value.device
        self._values[window] = value if self._in_memory else None

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, window: Any) -> Any:
        value = self._values[window]
        if value is None:
            value = read_tensor(self._path(window)).to(self._device)
            if self._in_memory:
                self._values[window] = value
        return value

    def __iter__(self) -> Iterator[Tensor]:
        return (self[window] for window in range(len(self)))

    def _path(self, window: int) -> Path:
        if self._folder is None:
            raise RuntimeError("these hidden states are in memory only")
        return self._folder / f"{self.sequence}.{window:06d}.hidden"


def write_tensor(path: Path, value: Tensor) -> None:
    """Write one tensor to a file of its own."""
    with named_errors(path.parent):
        save_file({"hidden": value.detach().cpu().contiguous()}, path)


def read_tensor(path: Path) -> Tensor:
    """What `write_tensor` wrote, on the CPU."""
    with reading(path), safe_open(path, framework="pt") as handle:
        return handle.get_tensor("hidden").clone()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """While the context lasts, a file of a journal is read.

    Raises:
        JournalError: it cannot be.
    """
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise JournalError(f"{path} cannot be read ({error}); delete the folder {path.parent} and start over") from None


def fingerprint(model: nn.Module, windows: Iterable[Tensor], job: Mapping[str, Any]) -> str:
    """What tells one calibration from another: equal only where model, data and settings are the same.

    Of every weight some values take part.

    Args:
        model: before anything of it is quantized.
        windows: token ids.
        job: everything else that decides about the outcome; JSON, or what `str` tells apart.
    """
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        digest.update(json.dumps(value, sort_keys=True, default=str).encode())
        digest.update(b"\0")

    add(job)
    config = getattr(model, "config", None)
    if config is not None:
        described = config.to_dict()
        for name in ("quantization_config", "_name_or_path", "transformers_version"):
            described.pop(name, None)
        add(described)
    for window in windows:
        digest.update(window.cpu().numpy().tobytes())
        digest.update(b"\0")
    for module_name, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            add([module_name, name, list(tensor.shape), str(tensor.dtype)])
            if tensor.is_meta:
                add(_where(module, name))
            else:
                step = max(tensor.numel() // _SAMPLED, 1)
                values = tensor.detach().reshape(-1)[::step][:_SAMPLED]
                digest.update(values.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _where(module: nn.Module, name: str) -> list[Any]:
    """What can be told of an offloaded weight without reading it."""
    weights: Any = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    prefix = getattr(weights, "prefix", "")
    index = getattr(getattr(weights, "dataset", None), "index", None) or {}
    entry = index.get(f"{prefix}{name}", {})
    file = entry.get("safetensors_file")
    if file is None:
        return []
    # Some values, not the file's time: Transformers writes anew what a checkpoint holds in another form.
    with safe_open(file, framework="pt") as handle:
        stored = handle.get_slice(entry["weight_name"])
        row = stored[:1] if stored.get_shape() else handle.get_tensor(entry["weight_name"])
    return [Path(file).name, entry["weight_name"], *row.reshape(-1)[:_SAMPLED].float().tolist()]


def _ours(name: str) -> bool:
    written = name == _INDEX or name.endswith((".hidden", ".part")) or name.startswith("block-")
    return written or BEGUN.fullmatch(name) is not None


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Write beside, then rename."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def named_errors(folder: Path) -> Iterator[None]:
    """While the context lasts, a journal's folder is written to.

    Raises:
        JournalError: it cannot be.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        what = "is on a disk that is full; free some space" if full else f"cannot be written ({error}); correct that"
        raise JournalError(
            f"the journal's folder {folder} {what} and run the same command again: it goes on after the last finished "
            "block"
        ) from None
