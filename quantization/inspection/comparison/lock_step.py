"""Two models side by side, one layer after the other, so that no output is kept longer than needed.

The one that runs ahead has a thread of its own, but the two take turns: it runs only while the
other waits for what it says of a layer, and stops as soon as that is there.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

__all__ = ["LockStep"]


class _Stopped(BaseException):
    """Ends the model that runs ahead."""


class LockStep:
    """A call that runs ahead of another.

    Args:
        run: the call; it gets its own copy of the caller's autocast, and no gradients.

    Example:
        >>> def ahead():
        ...     steps.say("a", 1)
        ...     steps.say("b", 2)
        ...     return 3
        >>> steps = LockStep(ahead)
        >>> steps.hear("a"), steps.hear("b"), steps.hear("c"), steps.finish()
        (1, 2, None, 3)
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._said: dict[str, deque[Any]] = defaultdict(deque)
        self._wanted: str | None = None
        self._stopping = self._done = False
        self._result: Any = None
        self._error: BaseException | None = None
        self._autocasts = [
            torch.autocast(device, torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
            if torch.is_autocast_enabled(device)
        ]
        self._thread = threading.Thread(target=self._ahead, daemon=True)
        self._thread.start()

    def _ahead(self) -> None:
        self._go.acquire()
        try:
            if not self._stopping:
                with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
                    for autocast in self._autocasts:
                        stack.enter_context(autocast)
                    self._result = self._run()
        except _Stopped:
            pass
        except BaseException as error:  # it is raised where the result is asked for
            self._error = error
        self._done = True
        self._back.release()

    def say(self, name: str, value: Any) -> None:
        """In the call that is ahead: what it has to say of a layer."""
        if self._stopping:  # the other was interrupted while this one ran
            raise _Stopped
        self._said[name].append(value)
        if name == self._wanted:
            self._wanted = None
            self._back.release()
            self._go.acquire()
            if self._stopping:
                raise _Stopped

    def hear(self, name: str) -> Any:
        """In the call behind: what was said of a layer; None if nothing will be.

        Raises:
            Exception: what the call that is ahead has raised.
        """
        if not self._said[name] and not self._done:
            self._wanted = name
            self._turn()
        return self._said[name].popleft() if self._said[name] else None

    def finish(self) -> Any:
        """The result of the call that is ahead, which runs to its end."""
        self._wanted = None
        self._turn()
        return self._result

    def stop(self) -> None:
        """End the call that is ahead, wherever it is, and forget what it said."""
        self._stopping = True
        if not self._done:
            self._go.release()
        self._thread.join()
        self._said.clear()

    def _turn(self) -> None:
        if not self._done:
            self._go.release()
            self._back.acquire()
        if self._error is not None:
            raise self._error
