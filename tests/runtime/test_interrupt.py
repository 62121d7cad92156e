"""Ctrl-C takes effect where the work looks for it, and never earlier."""

import os
import signal
import time

import pytest

from runtime.interrupt import check_interrupt, deferred_interrupts


def press():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)  # another thread may be the one that receives it


def test_ctrl_c_waits_for_the_next_check():
    steps = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        for step in range(5):
            if step == 2:
                press()
            steps.append(step)
            check_interrupt()
    assert steps == [0, 1, 2]
    check_interrupt()  # the wish is spent


def test_a_second_ctrl_c_does_not_wait():
    reached = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        press()
        reached.append(1)
        press()
        reached.append(2)
    assert reached == [1]
    with pytest.raises(KeyboardInterrupt):
        check_interrupt()


def test_a_wish_that_no_check_saw_is_raised_at_the_end():
    done = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        press()
        done.append(1)
    assert done == [1]


def test_the_handler_that_was_there_is_put_back_and_nesting_waits_for_the_outermost():
    before = signal.getsignal(signal.SIGINT)
    inner_left = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        with deferred_interrupts():
            press()
        inner_left.append(1)
        check_interrupt()
    assert inner_left == [1] and signal.getsignal(signal.SIGINT) == before


def test_control_without_it_ctrl_c_strikes_at_once():
    reached = []
    with pytest.raises(KeyboardInterrupt):
        press()
        reached.append(1)
    assert reached == []
