"""Windows are worked on side by side, in order, and each by one thread."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch

from hf_gptq_plugin.calibrate.threads import in_order, single_threaded


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
