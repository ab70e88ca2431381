"""What may stand in `dataset`: the name of a data set, a file, a list. It becomes texts, chats or token ids."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Data sets by name: arguments of `datasets.load_dataset`, and the column. "c4-new" is a name of the stock GPTQConfig.
NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "wikitext2": ({"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}, "text"),
    "c4": ({"path": "allenai/c4", "name": "en"}, "text"),
    "c4-new": ({"path": "allenai/c4", "name": "en"}, "text"),
    # Its own loading script no longer runs; this is what the Hub converted it to.
    "ptb": (
        {
            "path": "parquet",
            "data_files": "hf://datasets/ptb-text-only/ptb_text_only@refs/convert/parquet/penn_treebank/train/*.parquet",
        },
        "sentence",
    ),
    "pile-10k": ({"path": "NeelNanda/pile-10k"}, "text"),
    "ultrachat": ({"path": "HuggingFaceH4/ultrachat_200k", "split": "train_sft"}, "messages"),
}
MOST_ROWS = 20_000  # of a data set or a file of rows; enough for any sensible number of windows

# Columns in which a row's sample is looked for, the first that is there, and what it then is. `messages` stands
# before `prompt`, because data sets of chats often repeat their first message there.
COLUMNS = {
    "input_ids": "tokens", "text": "texts", "messages": "chats", "conversations": "chats", "content": "texts",
    "prompt": "texts",
}  # fmt: skip
_KINDS = {"texts": ("a text", "text"), "chats": ("a chat", "chats"), "tokens": ("a list of token ids", "token ids")}
_SPEAKERS = {"human": "user", "gpt": "assistant"}  # of the older notation of chats, {"from": ..., "value": ...}


class CalibrationError(ValueError):
    """Calibration data that cannot be used; the message says what is accepted."""


@dataclass(frozen=True)
class Samples:
    """Calibration data as it was found.

    Args:
        kind: "texts", "chats" or "tokens".
        items: strings; lists of messages (dicts with "role"); int64 tensors `[tokens]`.
        source: what to call it in a checkpoint: a data set's or a file's name, never a folder of this machine.
    """

    kind: str
    items: list[Any]
    source: str


def read_samples(dataset: Any, seed: int) -> Samples:
    """Read calibration data.

    Args:
        dataset: one of
            - a name in `NAMED` (needs the extra `data`);
            - a file: `.txt` (one text), `.json` (a list), `.jsonl`, `.csv`, `.parquet` (needs the extra `data`);
              where items or rows have columns, the first of `COLUMNS` that is there is read;
            - a list of texts, of chats (lists of messages `{"role": ..., "content": ...}`), of token ids (lists, or
              integer tensors of one or two dimensions), or of rows with columns. Beside "input_ids", what an
              "attention_mask" masks is left out;
            - a tensor of token ids, or what a tokenizer returns for a batch.
        seed: of the draw of `MOST_ROWS` rows of a longer data set or file.

    Raises:
        CalibrationError: none of these, not readable, empty, or not all items of one kind. It names the item.
    """
    if dataset is None:
        raise CalibrationError(
            "quantizing needs calibration text: pass GPTQConfig(dataset=[...texts...], tokenizer=...), or "
            'method="rtn" or "hqq", which need none'
        )
    if isinstance(dataset, str) and dataset in NAMED:
        return _from_rows(enumerate(_fetched(dataset, seed)), f"{dataset}, row {{}}", dataset)
    if isinstance(dataset, (str, Path)):
        return _from_file(dataset, seed)
    if isinstance(dataset, Mapping) or (isinstance(dataset, Tensor) and dataset.dim() < 2):
        dataset = [dataset]
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__iter__") or not len(dataset):
        raise CalibrationError(
            f"dataset={dataset!r:.80} is empty or not a list; pass a list of texts, of chats or of token ids, a file, "
            f"or one of the names {', '.join(NAMED)}"
        )
    return _from_rows(enumerate(dataset), "dataset[{}]", None)


def read_text(path: str | Path) -> str:
    """A UTF-8 file's text, without the byte order mark that some editors put before it.

    Raises:
        CalibrationError: no such file, or not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except FileNotFoundError:
        raise CalibrationError(f"{path}: there is no such file") from None


def _from_file(dataset: str | Path, seed: int) -> Samples:
    path = Path(dataset)
    if not os.path.isfile(path):  # unlike Path.is_file, takes any string, such as a whole text
        raise CalibrationError(
            f"dataset={str(dataset)!r:.200} is neither a file nor the name of a data set ({', '.join(NAMED)}); a text "
            "of your own goes into a list: dataset=[text]"
        )
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return Samples("texts", [read_text(path)], path.name)
    if suffix not in _READERS:
        raise CalibrationError(
            f"{path.name}: files with the suffix {suffix!r} are not read; use .txt, {', '.join(_READERS)}"
        )
    read, place = _READERS[suffix]
    rows = read(path)
    if not rows:
        raise CalibrationError(f"{path.name} is empty; it needs at least one row")
    if len(rows) > MOST_ROWS:
        draw = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:MOST_ROWS]
        rows = [rows[i] for i in sorted(draw.tolist())]
    return _from_rows(rows, f"{path.name}, {place}", path.name)


Rows = list[tuple[int, Any]]  # a row's number, as a user counts it, and the row


def _decoded(text: str, name: str, line: int | None = None) -> Any:
    """JSON of a file called `name`, or of one line of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{name}, line {line or error.lineno}: not JSON ({error.msg})") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        place = name if line is None else f"{name}, line {line}"
        raise CalibrationError(f"{place}: JSON that cannot be read ({error})") from None


def _read_json(path: Path) -> Rows:
    data = _decoded(read_text(path), path.name)
    if not isinstance(data, list):
        raise CalibrationError(f"{path.name} holds {type(data).__name__}; it must hold a list of texts, chats or rows")
    return list(enumerate(data))


def _read_jsonl(path: Path) -> Rows:
    rows = []
    # Not splitlines: a JSON string may hold the other characters at which that splits.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            rows.append((number, _decoded(line, path.name, number)))
    return rows


def _read_csv(path: Path) -> Rows:
    limit = csv.field_size_limit(sys.maxsize)  # a text may be longer than what the module takes by default
    try:
        reader = csv.DictReader(io.StringIO(read_text(path)))
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise CalibrationError(f"{path.name}, line {reader.line_num}: not CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise CalibrationError(
            f"{path.name}: reading Parquet needs pyarrow: pip install 'hf-gptq-plugin[data]'"
        ) from None
    try:
        names = parquet.read_schema(path).names
        chosen = _column(names, path.name)
        wanted = [chosen, "attention_mask"] if chosen == "input_ids" and "attention_mask" in names else [chosen]
        return list(enumerate(parquet.read_table(path, columns=wanted).to_pylist()))
    except ArrowException as error:
        raise CalibrationError(f"{path.name} is not a Parquet file ({error})") from None


_READERS: dict[str, tuple[Callable[[Path], Rows], str]] = {
    ".jsonl": (_read_jsonl, "line {}"),
    ".json": (_read_json, "item {}"),
    ".csv": (_read_csv, "line {}"),
    ".parquet": (_read_parquet, "row {}"),
}


def _fetched(name: str, seed: int) -> list[Any]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(
            f"dataset={name!r} is fetched through the datasets library: pip install 'hf-gptq-plugin[data]'"
        ) from None
    arguments, column = NAMED[name]
    try:
        rows = load_dataset(**{"split": "train", **arguments}, streaming=True).shuffle(seed=seed, buffer_size=1000)
        values = [row[column] for row in rows.take(MOST_ROWS)]
    except (OSError, RuntimeError, ValueError) as error:
        raise CalibrationError(
            f"dataset={name!r} could not be fetched ({type(error).__name__}: {error}); pass a file or texts of your own"
        ) from error
    return [value for value in values if not isinstance(value, str) or value.strip()]


def _from_rows(rows: Iterable[tuple[int, Any]], place: str, source: str | None) -> Samples:
    """Samples of rows that must all be of one kind.

    Args:
        rows: number and row.
        place: a format that says where a number is, for messages.
        source: None where the caller handed the rows over.
    """
    kind = column = None
    items: list[Any] = []
    for number, row in rows:
        where = place.format(number)
        if isinstance(row, (list, tuple)) and not len(row):
            continue  # no tokens, or nothing said
        value, named = row, where
        if isinstance(row, Mapping):
            column = column or _column(row, where)
            if column not in row:
                raise CalibrationError(f"{where} has no {column!r}; the rows before it have")
            found, named = COLUMNS[column], f"{where}, column {column!r},"
            value = row if found == "tokens" else row[column]
        elif isinstance(row, str):
            found = "texts"
        else:
            found = "chats" if isinstance(row, (list, tuple)) and isinstance(row[0], Mapping) else "tokens"
        read: Any = {"texts": _text, "chats": _chat, "tokens": _token_ids}[found]
        made = read(value, named)
        kind = kind or found
        if found != kind:
            raise CalibrationError(f"{where} is {_KINDS[found][0]}; each item before it is {_KINDS[kind][0]}")
        items += made
    if kind is None:
        raise CalibrationError(f"{source or 'dataset'} is empty: none of its items holds anything; pass text")
    return Samples(kind, items, source or f"{_KINDS[kind][1]} passed by the caller")


def _column(names: Iterable[Any], where: str) -> str:
    names = list(names)
    if "role" in names and "content" in names:
        raise CalibrationError(f"{where} is a single message of a chat; a chat is a list of them: pass [chat]")
    for column in COLUMNS:
        if column in names:
            return column
    raise CalibrationError(
        f"{where} has the columns {', '.join(map(str, names))}; it needs one of {', '.join(COLUMNS)}"
    )


def _text(value: Any, where: str) -> list[str]:
    if not isinstance(value, str):
        raise CalibrationError(f"{where} is {type(value).__name__}; a text must be a string")
    return [value]


def _chat(value: Any, where: str) -> list[list[dict[str, Any]]]:
    if not isinstance(value, (list, tuple)):
        raise CalibrationError(f"{where} is {type(value).__name__}; a chat must be a list of messages")
    chat = []
    for i, message in enumerate(value):
        if isinstance(message, Mapping) and "from" in message and "value" in message:
            message = {"role": _SPEAKERS.get(message["from"], message["from"]), "content": message["value"]}
        if not isinstance(message, Mapping) or "role" not in message:
            raise CalibrationError(
                f'{where} has the message {message!r:.60} at place {i}; a message is {{"role": ..., "content": ...}}'
            )
        chat.append(dict(message))
    return [chat] if chat else []


def _token_ids(value: Any, where: str) -> list[Tensor]:
    """The rows of one item, each `[tokens]`, without what is masked."""
    if isinstance(value, Mapping):
        ids, mask = _integers(value["input_ids"], where), value.get("attention_mask")
        if mask is None:
            return list(ids)
        try:
            kept = torch.atleast_2d(torch.as_tensor(mask).cpu())
        except (TypeError, ValueError, RuntimeError):
            raise CalibrationError(
                f"{where} has attention_mask={mask!r:.60}; accepted is a list of 0 and 1, one for each of input_ids"
            ) from None
        if kept.shape != ids.shape:
            raise CalibrationError(
                f"{where} has attention_mask of shape {tuple(kept.shape)} beside input_ids of shape {tuple(ids.shape)}"
            )
        return [row[keep != 0] for row, keep in zip(ids, kept, strict=True)]
    return list(_integers(value, where))


def _integers(value: Any, where: str) -> Tensor:
    """int64 `[rows, tokens]`."""
    if isinstance(value, (list, tuple)) and not len(value):
        return torch.empty(1, 0, dtype=torch.int64)
    try:
        ids = torch.as_tensor(value).cpu()
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0)
    if ids.dim() not in (1, 2) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise CalibrationError(
            f"{where} is {type(value).__name__}, {value!r:.60}; accepted are strings, lists of token ids, chats, and "
            f"dicts with one of {', '.join(COLUMNS)}"
        )
    return torch.atleast_2d(ids).long()
