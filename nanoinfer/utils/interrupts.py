"""Ctrl-C between steps, never inside one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Hold SIGINT back until the block is left, so that the scheduler's books are never half-written.

    A second one inside the block is not held back, in case a step hangs. Outside the main thread, where Python delivers
    no signals, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGINT)
    if not callable(previous):  # ignored, or handled outside Python: leave it so
        yield
        return
    received: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if received:
            previous(number, frame)
        received.append(number)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        previous(received[0], None)
