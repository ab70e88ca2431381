"""Calibration text to windows."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import references
import torch

from hf_gptq_plugin.calibrate.data import calibration_record, calibration_windows
from hf_gptq_plugin.calibrate.sources import CalibrationError, Samples, read_samples


class Letters:
    """One token per letter, ids from 10; BOS 1 (also written "^") where asked for, EOS 2."""

    eos_token_id = 2

    def __init__(self, bos: bool, chat_template: str | None = None) -> None:
        self.bos = bos
        self.chat_template = chat_template

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        ids = [1 if c == "^" else ord(c) - ord("a") + 10 for c in text]
        return {"input_ids": ([1] if self.bos and add_special_tokens else []) + ids}

    def apply_chat_template(self, chat: list[dict[str, str]], tokenize: bool) -> str:
        assert not tokenize and self.chat_template
        if chat[0]["role"] != "user":
            raise RuntimeError("the user speaks first")
        return self.chat_template + "".join(message["role"][0] + message["content"] for message in chat)


def long_text(length: int) -> str:
    """Letters from a linear congruential generator: the same everywhere and for ever."""
    state, letters = 1, []
    for _ in range(length):
        state = (1103515245 * state + 12345) % 2**31
        letters.append(chr(ord("a") + (state >> 16) % 26))
    return "".join(letters)


def as_lists(windows: list[torch.Tensor]) -> list[list[int]]:
    return [w.tolist() for w in windows]


def test_texts_are_joined_and_cut() -> None:
    got = calibration_windows(["abc", "", "de"], Letters(bos=False), 10, 3, 0)
    assert as_lists(got) == [[10, 11, 12], [2, 13, 14]]


def test_every_window_opens_as_the_tokenizer_opens_a_text() -> None:
    got = calibration_windows(["abcde"], Letters(bos=True), 10, 3, 0)
    assert as_lists(got) == [[1, 10, 11], [1, 12, 13]]


def test_draw_is_seeded_and_in_text_order() -> None:
    text = ["abcdefghijklmnopqrstuvwxyz" * 4]
    draws = {seed: as_lists(calibration_windows(text, Letters(False), 5, 4, seed)) for seed in (0, 1)}
    again = as_lists(calibration_windows(text, Letters(False), 5, 4, 0))
    assert draws[0] == again != draws[1]
    whole = as_lists(calibration_windows(text, Letters(False), 100, 4, 0))
    places = [next(i for i, w in enumerate(whole) if w is not None and w == window) for window in again]
    assert len(whole) == 26 and len(again) == 5
    assert all(window in whole for window in again) and len(places) == 5


def test_short_text_gives_one_short_window(caplog: pytest.LogCaptureFixture) -> None:
    assert as_lists(calibration_windows(["abcd"], Letters(True), 8, 100, 0)) == [[1, 10, 11, 12, 13]]
    assert "1 windows, 5 tokens; 8 × 100 were asked for" in caplog.text


def test_token_lists_and_masks() -> None:
    items: list[Any] = [[5, 6, 7, 8], torch.tensor([1, 2]), {"input_ids": [[3, 4, 0]], "attention_mask": [[1, 1, 0]]}]
    assert as_lists(calibration_windows(items, None, 8, 3, 0)) == [[5, 6, 7], [1, 2], [3, 4]]
    assert as_lists(calibration_windows(torch.tensor([[1, 2], [3, 4]]), None, 8, 3, 0)) == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (None, "needs calibration text"),
        ([], "is empty or not a list"),
        ([""], r"text passed by the caller\) gives windows of at most 0 tokens; at least 2 are needed, and 8 × 4 = 32"),
        (["a"], "gives windows of at most 1 tokens"),
        ([[], []], "dataset is empty"),
        ([[1], [2], [3]], r"token ids passed by the caller\) gives windows of at most 1 tokens"),
        (7, "is empty or not a list"),
        ([[1, 2], [3, 4, 300]], "window 1 holds at position 2 the token id 300; this model takes 0 to 255"),
        ([[1, -1]], "window 0 holds at position 1 the token id -1; this model takes 0 to 255"),
        ([[0.5, 1.5]], "accepted are strings, lists of token ids"),
        (["ab", 3], r"dataset\[1\] is int, 3"),
    ],
)
def test_unusable_data_is_refused(dataset: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibration_windows(dataset, Letters(False), 8, 4, 0, vocab_size=256)


@pytest.mark.parametrize(
    ("pieces", "bos", "digest"),
    [
        (100_000, True, "008c8616505432593b96618a0f9f3260f3667c46bafc638da4f2a405f8a1f9db"),
        (777, False, "978fe1cb983d3936215e0830c15cda0a04fd7cc10820b52d1a9893b34d4e9072"),
    ],
)
def test_the_draw_from_a_text_is_what_it_always_was(pieces: int, bos: bool, digest: str) -> None:
    whole = long_text(100_000)
    texts = [whole[i : i + pieces] for i in range(0, len(whole), pieces)]
    got = calibration_windows(texts, Letters(bos), 64, 512, 0)
    streams = [Letters(False)(text)["input_ids"] for text in texts]
    expected = references.packed_windows(streams, 2, [1] if bos else [], 64, 512, 0)
    assert as_lists(got) == expected
    record = calibration_record(Samples("texts", texts, "t"), got, 512, 0)
    by_hand = b"".join(n.to_bytes(8, "little") for window in expected for n in (len(window), *window))
    # The digests were taken before there was more than one way of packing.
    assert record["sha256"] == hashlib.sha256(by_hand).hexdigest() == digest
    assert record == {
        "dataset": "t", "windows": 64, "seqlen": 512, "tokens": 64 * 512, "seed": 0, "packing": "concat",
        "sha256": digest,
    }  # fmt: skip


def test_each_text_may_have_a_window_of_its_own() -> None:
    texts = ["abcdef", "", "gh", "i"]
    each = as_lists(calibration_windows(texts, Letters(True), 10, 4, 0, packing="each"))
    assert each == [[1, 10, 11, 12], [1, 16, 17], [1, 18]]
    many = [letter * 3 for letter in "abcdefghijklmnopqrstuvwxyz"]
    drawn = as_lists(calibration_windows(many, Letters(False), 5, 4, 0, packing="each"))
    order = torch.randperm(26, generator=torch.Generator().manual_seed(0)).tolist()
    assert drawn == [[10 + i] * 3 for i in sorted(order[:5])]
    assert drawn != as_lists(calibration_windows(many, Letters(False), 5, 4, 1, packing="each"))


def test_token_ids_may_be_joined() -> None:
    ids = [[5, 6, 7], [8], [9, 10, 11]]
    assert as_lists(calibration_windows(ids, None, 8, 3, 0, packing="concat")) == [[5, 6, 7], [8, 9, 10]]
    # On their own the first ones are taken, as they are.
    assert as_lists(calibration_windows(ids, None, 2, 2, 0)) == [[5, 6], [8]]


def test_chats_are_rendered_and_open_once() -> None:
    chats = [
        [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}],
        [{"from": "human", "value": "d"}, {"from": "gpt", "value": "e"}],
    ]
    tokenizer = Letters(bos=True, chat_template="^")
    a, b, c, d, e, u = (ord(letter) - ord("a") + 10 for letter in "abcdeu")
    first, second = [u, a, b, a, c], [u, d, a, e]
    each = as_lists(calibration_windows(chats, tokenizer, 8, 32, 0, packing="each"))
    assert each == [[1, *first], [1, *second]]
    assert as_lists(calibration_windows(chats, tokenizer, 8, 10, 0)) == [[1, *first, *second]]
    found = read_samples(chats, 0)
    assert (found.kind, found.source) == ("chats", "chats passed by the caller")
    with pytest.raises(CalibrationError, match="the tokenizer has no chat template; set tokenizer"):
        calibration_windows(chats, Letters(True), 8, 10, 0)
    with pytest.raises(CalibrationError, match=r"refuses chat 1 \(RuntimeError: the user speaks first\)"):
        calibration_windows([chats[0], chats[0][1:]], tokenizer, 8, 10, 0)


def test_unknown_packing() -> None:
    with pytest.raises(CalibrationError, match="packing='tight' is not supported; use 'auto', 'concat' or 'each'"):
        calibration_windows(["abc"], Letters(False), 8, 4, 0, packing="tight")


def test_text_without_a_tokenizer() -> None:
    with pytest.raises(CalibrationError, match=r"pass GPTQConfig\(tokenizer"):
        calibration_windows(["abc"], None, 8, 4, 0)
