"""Windows are worked on side by side, in order, and each by one thread."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.calibrate.threads import in_order, single_threaded
from hf_gptq_plugin.calibrate.walk import WalkError


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_and_side_by_side(two_threads: None) -> None:
    met = threading.Barrier(2)  # passed only by two at once

    def work(item: int) -> tuple[int, int]:
        met.wait(timeout=30)
        return item * item, torch.get_num_threads()

    assert list(in_order(work, range(6))) == [(i * i, 1) for i in range(6)]
    assert torch.get_num_threads() == 2


def test_results_of_a_batch_are_made_before_the_caller_gets_one(two_threads: None) -> None:
    done: list[int] = []
    results = in_order(done.append, range(7), together=5)
    next(results)
    assert sorted(done) == [0, 1, 2, 3, 4]
    assert len(list(results)) == 6 and sorted(done) == list(range(7))


@pytest.mark.parametrize("options", [{"together": 8}, {"most": 2}, {}])
def test_no_more_results_live_than_are_made_at_once(options: dict[str, int], two_threads: None) -> None:
    class Result:
        pass

    made: list[weakref.ref[Result]] = []
    most = 0

    def work(item: int) -> Result:
        nonlocal most
        result = Result()
        made.append(weakref.ref(result))
        most = max(most, sum(reference() is not None for reference in list(made)))
        return result

    for result in in_order(work, range(32), **options):
        del result
    assert len(made) == 32 and most <= options.get("together", 2)


def test_the_caller_has_all_threads_between_items(two_threads: None) -> None:
    assert [torch.get_num_threads() for _ in in_order(lambda item: item, range(3))] == [2, 2, 2]


def test_in_the_calling_thread_for_an_accelerator(two_threads: None) -> None:
    def work(item: int) -> tuple[bool, int]:
        return threading.current_thread() is threading.main_thread(), torch.get_num_threads()

    assert list(in_order(work, range(3), parallel=False)) == [(True, 2)] * 3


def test_errors_reach_the_caller(two_threads: None) -> None:
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("window 3")
        return item

    results = in_order(work, range(6))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="window 3"):
        list(results)
    assert torch.get_num_threads() == 2


def test_none_works_on_after_an_error(two_threads: None) -> None:
    done = threading.Event()

    def work(item: int) -> None:
        if item == 0:
            raise ValueError("window 0")
        time.sleep(0.3)
        done.set()

    with pytest.raises(ValueError, match="window 0"):
        list(in_order(work, range(2)))
    assert done.is_set()


def test_single_threaded(two_threads: None) -> None:
    with single_threaded():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def made(folder: Path, windows: list[list[int]], threads: int = 1, dtype: Any = torch.bfloat16, **fields: Any) -> Any:
    """All tensors of a model that is calibrated by so many threads."""
    config = GPTQConfig(bits=3, group_size=32, dataset=windows, **fields)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    finally:
        torch.set_num_threads(before)
    return dict(model.state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two models have the same bits."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("threads", [1, 2])
def test_the_callers_autocast_plays_no_part(threads: int, tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    folder = tiny("llama")
    wanted = made(folder, windows, threads, torch.float32, preset="fast")
    with torch.autocast("cpu", torch.bfloat16):
        found = made(folder, windows, threads, torch.float32, preset="fast")
    assert same(found, wanted)


def test_few_tokens_of_an_expert_have_the_same_bits_for_any_number_of_threads(
    tiny: Callable[..., Path], windows: list[list[int]]
) -> None:
    """Torch's product of 5 to 11 rows in fp32 has others by each."""
    folder = tiny(
        "mixtral", hidden_size=512, intermediate_size=704, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    fields: dict[str, Any] = {"preset": "fast", "dynamic": {r"-:.*(gate_proj|up_proj|w1|w3)$": {}}}
    one, two = (made(folder, [windows[0][:18]], threads, torch.float32, **fields) for threads in (1, 2))
    assert any("qweight" in name for name in one) and same(one, two)


def test_inference_mode_is_refused_by_name(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    folder = tiny("llama")
    with torch.inference_mode(), pytest.raises(WalkError, match=r"torch\.inference_mode\(\); use torch\.no_grad"):
        made(folder, windows)
