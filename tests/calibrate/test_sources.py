"""Names, files and lists to samples."""

from __future__ import annotations

import csv
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_gptq_plugin.calibrate import sources
from hf_gptq_plugin.calibrate.sources import NAMED, CalibrationError, Samples, read_samples

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A file of this name and content."""

    def make(name: str, content: str) -> Path:
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return path

    return make


def lines(*rows: Any) -> str:
    return "\n".join(json.dumps(row) for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "kind", "items"),
    [
        ("a.txt", "one\n\ntwo\n", "texts", ["one\n\ntwo\n"]),
        ("a.TXT", "x", "texts", ["x"]),
        ("a.json", '["one", "two"]', "texts", ["one", "two"]),
        ("a.json", json.dumps([CHAT, CHAT]), "chats", [CHAT, CHAT]),
        ("a.json", "[[1, 2], [3]]", "tokens", [[1, 2], [3]]),
        ("a.jsonl", lines({"text": "one\u2028"}, {"text": "two", "prompt": 3}) + "\n\n", "texts", ["one\u2028", "two"]),
        ("a.jsonl", lines({"content": "one"}), "texts", ["one"]),
        ("a.jsonl", lines({"id": 1, "prompt": "one"}), "texts", ["one"]),
        ("a.jsonl", lines({"prompt": "hello", "messages": CHAT}), "chats", [CHAT]),
        ("a.jsonl", lines({"conversations": [{"from": "human", "value": "hello"}]}), "chats", [CHAT[:1]]),
        ("a.jsonl", lines({"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}), "tokens", [[5, 6]]),
        ("a.csv", 'id,text\n1,"one, two"\n2,"three\nfour"\n', "texts", ["one, two", "three\nfour"]),
        ("a.csv", "text\n" + "x" * 200_000, "texts", ["x" * 200_000]),
    ],
)
def test_files(name: str, content: str, kind: str, items: list[Any], write: Write) -> None:
    path = write(name, content)
    for given in (path, str(path)):
        found = read_samples(given, 0)
        assert found.kind == kind
        assert [x.tolist() if kind == "tokens" else x for x in found.items] == items
        assert found.source == name  # and no folder
    assert csv.field_size_limit() == 131072  # left as it was


@pytest.mark.parametrize(
    ("name", "content", "items"),
    [
        ("a.txt", "one", ["one"]),
        ("a.json", '["one"]', ["one"]),
        ("a.jsonl", '{"text": "one"}', ["one"]),
        ("a.csv", "text,id\none,1\n", ["one"]),
    ],
)
def test_a_byte_order_mark_is_no_text(name: str, content: str, items: list[str], write: Write) -> None:
    assert read_samples(write(name, "\ufeff" + content), 0) == Samples("texts", items, name)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="reads Parquet through pyarrow, of the extra `data`")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["one", "two"]}), path)
    assert read_samples(path, 0) == Samples("texts", ["one", "two"], "a.parquet")
    ids = pyarrow.table({"input_ids": [[0, 7, 8], [9, 10, 0]], "attention_mask": [[0, 1, 1], [1, 1, 0]]})
    parquet.write_table(ids, path)
    assert [x.tolist() for x in read_samples(path, 0).items] == [[7, 8], [9, 10]]
    parquet.write_table(pyarrow.table({"messages": [CHAT]}), path)
    assert read_samples(path, 0).items == [CHAT]
    parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    with pytest.raises(CalibrationError, match=r"a\.parquet, row 0, column 'text', is int; a text must be a string"):
        read_samples(path, 0)
    parquet.write_table(pyarrow.table({"label": [1, 2]}), path)
    with pytest.raises(CalibrationError, match=r"a\.parquet has the columns label; it needs one of input_ids, text"):
        read_samples(path, 0)
    path.write_bytes(b"PAR1 not")
    with pytest.raises(CalibrationError, match=r"a\.parquet is not a Parquet file"):
        read_samples(path, 0)


@pytest.mark.parametrize("column", ["text", None])
def test_long_files_are_drawn_from(column: str | None, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MOST_ROWS", 5)
    path = write("a.jsonl", lines(*({column: str(i)} if column else str(i) for i in range(20))))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3)).tolist()
    assert read_samples(path, 3).items == [str(i) for i in sorted(order[:5])]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.md",
            "text",
            r"a\.md: files with the suffix '\.md' are not read; use \.txt, \.jsonl, \.json, \.csv, \.parq",
        ),
        ("a", "text", "files with the suffix '' are not read"),
        ("a.jsonl", '{"text": "one"}\n\n{"text": ', r"a\.jsonl, line 3: not JSON \(Expecting value"),
        ("a.jsonl", "\n\n", r"a\.jsonl is empty"),
        ("a.jsonl", lines({"text": "one"}, {"text": 2}), r"a\.jsonl, line 2, column 'text', is int; a text must be"),
        ("a.jsonl", lines({"text": "one"}, {"prompt": "two"}), r"a\.jsonl, line 2 has no 'text'; the rows before it"),
        ("a.jsonl", lines({"label": 1}), r"a\.jsonl, line 1 has the columns label; it needs one of input_ids, text"),
        ("a.jsonl", lines({"messages": "x"}), "column 'messages', is str; a chat must be a list of messages"),
        ("a.jsonl", lines({"messages": [{"text": "x"}]}), r"has the message \{'text': 'x'\} at place 0"),
        ("a.jsonl", lines({"input_ids": "1 2"}), "column 'input_ids', is str"),
        ("a.jsonl", lines({"input_ids": [1, 2], "attention_mask": [1]}), r"mask of shape \(1, 1\) beside .* \(1, 2\)"),
        (
            "a.jsonl",
            lines({"input_ids": [1], "attention_mask": "x"}),
            r"line 1, .* has attention_mask='x'; accepted is",
        ),
        ("a.jsonl", lines({"input_ids": [1], "attention_mask": [None]}), r"has attention_mask=\[None\]; accepted is"),
        ("a.jsonl", '"one"\n' + "[" * 100_000, r"a\.jsonl, line 2: JSON that cannot be read \(maximum recursion depth"),
        ("a.json", "[" * 100_000 + "]" * 100_000, r"a\.json: JSON that cannot be read \(maximum recursion depth"),
        ("a.json", f"[{'1' * 5000}]", r"a\.json: JSON that cannot be read \(Exceeds the limit"),
        ("a.jsonl", lines("one", CHAT), r"line 2 is a chat; each item before it is a text"),
        ("a.json", "[1, \n2,", r"a\.json, line 2: not JSON"),
        ("a.json", '{"text": "x"}', r"a\.json holds dict; it must hold a list"),
        ("a.json", json.dumps(CHAT), r"a\.json, item 0 is a single message of a chat; .* pass \[chat\]"),
        ("a.csv", "id,label\n1,2\n", r"a\.csv, line 2 has the columns id, label"),
        ("a.csv", "id,text\n1,one\n2\n", r"a\.csv, line 3, column 'text', is NoneType"),
        ("a.csv", "", r"a\.csv is empty"),
    ],
)
def test_files_that_cannot_be_used(name: str, content: str, message: str, write: Write) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_samples(write(name, content), 0)


def test_files_that_are_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"gone\.txt' is neither a file nor the name of a data set \(wikitext2"):
        read_samples(tmp_path / "gone.txt", 0)
    with pytest.raises(CalibrationError, match=r"a text of your own goes into a list: dataset=\[text\]"):
        read_samples("a whole text " * 1000, 0)
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    with pytest.raises(CalibrationError, match=r"bad\.txt is not UTF-8 text \(invalid start byte at byte 2\)"):
        read_samples(tmp_path / "bad.txt", 0)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ([{"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1]}], [[5, 6]]),
        ([{"input_ids": [5, 6, 0], "attention_mask": torch.tensor([True, True, False])}], [[5, 6]]),
        (
            {"input_ids": torch.tensor([[5, 6], [7, 0]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])},
            [[5, 6], [7]],
        ),
        ([{"input_ids": [5, 6]}], [[5, 6]]),
        (torch.tensor([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
        (torch.tensor([5, 6]), [[5, 6]]),
        ([torch.tensor([[5, 6], [7, 8]]), torch.tensor([9])], [[5, 6], [7, 8], [9]]),
        ([(5, 6), [], [7]], [[5, 6], [7]]),
    ],
)
def test_token_ids(dataset: Any, expected: list[list[int]]) -> None:
    found = read_samples(dataset, 0)
    assert (found.kind, found.source) == ("tokens", "token ids passed by the caller")
    assert [x.tolist() for x in found.items] == expected
    assert all(x.dtype == torch.int64 for x in found.items)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (["one", [1, 2]], r"dataset\[1\] is a list of token ids; each item before it is a text"),
        ([[1, 2], "one"], r"dataset\[1\] is a text; each item before it is a list of token ids"),
        ([[1, 2], [True, False]], r"dataset\[1\] is list, \[True, False\]; accepted are"),
        ([[[1, 2], [3]]], r"dataset\[0\] is list"),
        ([torch.ones(1, 1, 1, dtype=torch.int64)], r"dataset\[0\] is Tensor"),
        (CHAT, r"dataset\[0\] is a single message of a chat; a chat is a list of them: pass \[chat\]"),
        ([{"label": 3}], r"dataset\[0\] has the columns label; it needs one of input_ids"),
        ((x for x in "ab"), "is empty or not a list"),
        ({}, r"dataset\[0\] has the columns ; it needs"),
    ],
)
def test_lists_that_cannot_be_used(dataset: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_samples(dataset, 0)


class Stream:
    """As much of a streamed data set as is used."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def shuffle(self, seed: int, buffer_size: int) -> Stream:
        return Stream(self.rows[seed:] + self.rows[:seed])

    def take(self, count: int) -> list[dict[str, Any]]:
        return self.rows[:count]


def test_named_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(**arguments: Any) -> Stream:
        asked.update(arguments)
        return Stream([{"text": t, "sentence": t, "messages": CHAT} for t in ("one", " ", "two")])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert read_samples("wikitext2", 2) == Samples("texts", ["two", "one"], "wikitext2")
    assert asked == {
        "path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train", "streaming": True,
    }  # fmt: skip
    for name in NAMED:
        assert read_samples(name, 0).items == ([CHAT] * 3 if name == "ultrachat" else ["one", "two"])

    def offline(**arguments: Any) -> Stream:
        raise ConnectionError("no route")

    module.load_dataset = offline  # type: ignore[attr-defined]
    with pytest.raises(CalibrationError, match=r"dataset='c4' could not be fetched \(ConnectionError: no route\)"):
        read_samples("c4", 0)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for dataset in ("c4", write("a.parquet", "")):
        with pytest.raises(CalibrationError, match=r"pip install 'hf-gptq-plugin\[data\]'"):
            read_samples(dataset, 0)
