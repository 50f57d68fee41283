"""Waiting without stopping: events, the worker threads behind them, and tasks that wait for events.

Everything that decides or commits runs in the one fault-service thread. What blocks (reading a file,
writing back, fsync) is a Job for the workers; its completion comes back to the fault-service thread
through an eventfd, which runs what was asked to follow. A Task is a generator that yields the events
it waits for: a flush of a thousand pages never holds up a fault.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator

__all__ = ["Event", "Job", "Task", "Workers", "run_task"]


class Event:
    """Something that will have happened. Only the fault-service thread touches it."""

    __slots__ = ("followers", "happened")

    def __init__(self) -> None:
        self.happened = False
        self.followers: list[Callable[[], None]] = []

    def then(self, run: Callable[[], None]) -> None:
        """Runs that once it has happened; at once if it has."""
        if self.happened:
            run()
        else:
            self.followers.append(run)

    def happen(self) -> None:
        self.happened = True
        followers, self.followers = self.followers, []
        for run in followers:
            run()


class Job(Event):
    """A blocking call for a worker; `result` is >= 0 or -errno, as the call's."""

    __slots__ = ("result", "work")

    def __init__(self, work: Callable[[], int]) -> None:
        super().__init__()
        self.work = work
        self.result = 0


class Workers:
    """Threads that run jobs; `fd` is readable when some are complete, then call `reap()`."""

    def __init__(self, nr_workers: int) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.nr_pending = 0
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._complete: deque[Job] = deque()
        self._threads = [
            threading.Thread(target=self._run, name=f"uvm-io/{n}", daemon=True)
            for n in range(nr_workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        self.nr_pending += 1
        self._queue.put(job)

    def reap(self) -> None:
        """Lets every complete job happen. In the fault-service thread."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass
        while self._complete:
            job = self._complete.popleft()
            self.nr_pending -= 1
            job.happen()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                job.result = job.work()
            except OSError as error:
                job.result = -(error.errno or 5)
            self._complete.append(job)
            os.eventfd_write(self.fd, 1)

    def close(self, timeout_s: float = 1.0) -> None:
        """Ends the threads; one that is stuck in a file system is left behind (a daemon)."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout_s)
        if not any(thread.is_alive() for thread in self._threads):
            os.close(self.fd)


#: Yields events to wait for; returns >= 0, or raises OSError.
Task = Generator[Event, None, int]


def run_task(task: Task, finished: Callable[[int, OSError | None], None]) -> None:
    """Runs a task up to its next event, and on from there each time; `finished(result, error)`."""

    def advance() -> None:
        try:
            event = next(task)
        except StopIteration as stop:
            finished(stop.value, None)
        except OSError as error:
            finished(0, error)
        else:
            event.then(advance)

    advance()
