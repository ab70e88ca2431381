"""Calibration text to windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_gptq_plugin.calibrate.data import CalibrationError, calibration_windows


class Letters:
    """One token per letter, ids from 10; BOS 1 where asked for, EOS 2."""

    eos_token_id = 2

    def __init__(self, bos: bool) -> None:
        self.bos = bos

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        ids = [ord(c) - ord("a") + 10 for c in text]
        return {"input_ids": ([1] if self.bos and add_special_tokens else []) + ids}


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
        ([""], "fewer than 2 tokens"),
        (["a"], "fewer than 2 tokens"),
        (7, "is empty or not a list"),
        ("wikitext3", "dataset='wikitext3' is not known; use one of wikitext2"),
        ([[1, 300]], "token id 300; this model takes 0 to 255"),
        ([[1, -1]], "token id -1"),
        ([[0.5, 1.5]], "accepted are strings, lists of token ids"),
        ([{"text": "a"}], "needs 'input_ids'"),
        (["ab", 3], r"dataset\[1\] is int"),
    ],
)
def test_unusable_data_is_refused(dataset: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibration_windows(dataset, Letters(False), 8, 4, 0, vocab_size=256)


def test_text_without_a_tokenizer() -> None:
    with pytest.raises(CalibrationError, match=r"pass GPTQConfig\(tokenizer"):
        calibration_windows(["abc"], None, 8, 4, 0)
