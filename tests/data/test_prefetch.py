import threading
import time

import pytest

from modjax.data.prefetch import prefetch


def test_items_come_in_order_and_the_last_step_is_left_out():
    with prefetch(lambda step: step * step, 3, 8) as items:
        assert list(items) == [9, 16, 25, 36, 49]
        assert list(items) == []


def test_it_works_ahead_but_no_further_than_its_depth():
    made = []
    with prefetch(lambda step: made.append(step) or step, 0, 100, depth=2) as items:
        assert next(items) == 0
        deadline = time.monotonic() + 5
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert made == [0, 1, 2, 3]  # one taken, two waiting, one in hand


def test_waiting_is_counted_when_the_maker_is_slow_and_not_when_the_consumer_is():
    def slow(step):
        time.sleep(0.05)
        return step

    with prefetch(slow, 0, 4) as items:
        list(items)
        assert 0.15 < items.waited_seconds < 2
    with prefetch(lambda step: step, 0, 4) as items:
        for _ in items:
            time.sleep(0.05)
        assert items.waited_seconds < 0.1


def test_an_error_is_raised_where_its_item_would_have_been():
    def failing(step):
        if step == 2:
            raise KeyError("the third")
        return step

    with prefetch(failing, 0, 5) as items:
        assert [next(items), next(items)] == [0, 1]
        with pytest.raises(KeyError, match="the third"):
            next(items)


def test_leaving_early_ends_the_thread():
    before = threading.active_count()
    with prefetch(lambda step: step, 0, 10**9) as items:
        next(items)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(items)
