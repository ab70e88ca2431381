"""Work on calibration windows side by side, each in one thread, with the same bits for any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_pool: ThreadPoolExecutor | None = None


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], parallel: bool = True, most: int | None = None,
    together: int = 1,
) -> Iterator[Result]:  # fmt: skip
    """`map(work, items)`, as many items at a time as torch has threads; each item is worked on by one thread.

    Torch splits single operations among threads at places that depend on their number, and so does rounding. Within
    `work` every operation is therefore done by one thread. Gradient mode and autocast are `work`'s own business: new
    threads begin with torch's defaults.

    Args:
        work: safe to run in several threads at once.
        items: taken in batches.
        parallel: False works on one item at a time in the calling thread, with all of torch's threads: for an
            accelerator.
        most: how many items are worked on at a time at most.
        together: how many results several threads make before the caller gets the first; as many as there are threads
            at least. Between batches threads wait for each other and for the caller, and torch's own, which look for
            new work for a while, are in the way of these.
    """
    if not parallel:
        yield from map(work, items)
        return
    threads = torch.get_num_threads()
    if most is not None:
        threads = min(threads, most)
    remaining = iter(items)
    while batch := list(islice(remaining, max(threads, together) if threads > 1 else 1)):
        with single_threaded():
            if threads == 1 or len(batch) == 1:
                results = [work(item) for item in batch]
            else:
                futures = [_workers(threads).submit(work, item) for item in batch]
                try:
                    wait(futures)  # for all, also where one of them fails: none works on behind its caller's back
                except BaseException:  # an interruption
                    for future in futures:
                        future.cancel()
                    wait(futures)
                    raise
                results = [future.result() for future in futures]
                del futures
        # Outside: what the caller does between items may use all threads. What it has had is let go of.
        results.reverse()
        while results:
            yield results.pop()


def _workers(threads: int) -> ThreadPoolExecutor:
    global _pool
    if _pool is None or _pool._max_workers != threads:
        if _pool is not None:
            _pool.shutdown(wait=False)  # what it works on goes on
        _pool = ThreadPoolExecutor(threads, "calibrate", initializer=torch.set_num_threads, initargs=(1,))
    return _pool


@contextmanager
def single_threaded() -> Iterator[None]:
    """Let torch use one thread, for bits that do not depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
