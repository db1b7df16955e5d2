"""A function over many inputs: in order, a few inputs ahead, errors as they were raised."""

from __future__ import annotations

import os
import time

import pytest

from megatron_octo.data.workers import AHEAD, ordered
from megatron_octo.errors import BadInput


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_results_come_in_the_order_of_the_inputs_however_long_each_takes(num_workers):
    def slow_if_even(number: int) -> tuple[int, bytes]:
        time.sleep(0.01 * (number % 2 == 0))
        return number, bytes(200_000)  # more than a pipe holds

    results = list(ordered(slow_if_even, iter(range(40)), num_workers))
    assert [number for number, _ in results] == list(range(40))


def test_inputs_are_taken_only_a_few_ahead():
    taken = []

    def inputs():
        for number in range(100):
            taken.append(number)
            yield number

    results = ordered(abs, inputs(), 3)
    for done, _ in enumerate(results, 1):
        assert len(taken) <= done + AHEAD * 3 + 1
    assert len(taken) == 100


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_is_raised_as_it_was_and_ends_the_workers(num_workers):
    def fail_at_7(number: int) -> int:
        if number == 7:
            raise BadInput("number 7", fix="leave it out")
        return os.getpid()

    results = ordered(fail_at_7, iter(range(20)), num_workers)
    with pytest.raises(BadInput, match="number 7") as error:
        pids = [next(results) for _ in range(20)]
        assert pids
    assert error.value.fix == "leave it out"


class Panic(BaseException):
    pass


def test_a_panic_is_an_error_too():
    def panic(_: int) -> None:
        raise Panic("assertion failed")

    with pytest.raises(RuntimeError, match="Panic: assertion failed"):
        list(ordered(panic, iter(range(3)), 2))
