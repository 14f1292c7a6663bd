"""Commands that `torchrun` started as several ranks: they join, and speak with one voice."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

from pyflocality._support.streams import tell

if TYPE_CHECKING:
    from pyflocality.posterior.ranks import Ranks

# How long a rank that failed waits to hear whether rank 0 failed alike, in seconds.
_PATIENCE = 10.0
# Characters that are kept of what rank 0 said last.
_REMEMBERED = 4000


def in_job() -> bool:
    """Whether this process is one of several ranks."""
    count = os.environ.get("WORLD_SIZE", "1")
    # Of another program, where it is no number.
    return count.isdecimal() and int(count) > 1


def split_in_force(asked: str | None) -> str | None:
    """What the ranks divide among them, "images" or "samples"; None for one process alone."""
    if in_job():
        return asked or "images"
    # A job of one rank is let be: its script may run with any number.
    if asked is not None and "WORLD_SIZE" not in os.environ:
        raise ValueError("`split_over` is of several ranks, which torchrun starts")
    return None


@contextmanager
def joined() -> Iterator[Ranks | None]:
    """The ranks of the job, joined for a `with` block; None where there is one process alone.

    `torchrun` ends the ranks that are left once one has failed: inside the block that raises
    `RankLostError`, so that nothing half-done stays behind.
    """
    if not in_job():
        yield None
        return
    from pyflocality.distributed import ranks
    from pyflocality.posterior.ranks import Ranks

    with ranks():
        before = signal.signal(signal.SIGTERM, _told_to_end)
        try:
            yield Ranks(None)
        except BaseException:
            # From here on it would but cut off the last words.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise
        signal.signal(signal.SIGTERM, before)


def _told_to_end(*_: object) -> None:
    from pyflocality.posterior.ranks import RankLostError

    # An error that is on its way out already is not to be replaced.
    if sys.exc_info()[1] is None:
        raise RankLostError(
            "this rank was told to end: another one has ended, or the job was stopped"
        )


def one_voice(run: Callable[[], int]) -> int:
    """Run the command line; of the ranks of a job rank 0 speaks for all.

    The others print nothing, unless they fail in a way of their own. Where a rank was lost, it is
    told how to go on.

    Args:
        run: Runs the command line and answers its exit code.
    """
    if not in_job():
        return run()
    if os.environ.get("RANK") == "0":
        heard = _Heard(sys.stderr)
        with redirect_stderr(heard):
            code, _ = _ended(run)
        if code:
            _tell(heard.text)
        return code
    held = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(held):
        code, lost = _ended(run)
    words = held.getvalue()
    if code:
        first = _told()
        # Whoever lost a rank has no more to say than rank 0, whatever that said.
        alike = first is not None and (lost or words.strip().rpartition("\n")[2] in first)
        if not alike:
            sys.stderr.write(words)
    return code


def _ended(run: Callable[[], int]) -> tuple[int, bool]:
    """Exit code, and whether a rank was lost."""
    from pyflocality.posterior.ranks import RankLostError

    try:
        return run(), False
    except RankLostError as error:
        tell(
            f"pyflocality: error: {error}. Start the job again with the same options: it goes on "
            "behind the last finished step"
        )
        return 1, True


class _Heard:
    """A stream that remembers the end of what was written to it."""

    def __init__(self, stream: Any) -> None:  # noqa: ANN401
        self.text = ""
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, and remember."""
        self.text = (self.text + text)[-_REMEMBERED:]
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Everything else is the stream's."""
        return getattr(self._stream, name)


def _tell(words: str) -> None:
    """Let the other ranks know what rank 0 said."""
    try:
        store, key = _store()
        store.set(key, words)
        # The answer tells that it arrived: this process ends next.
        store.get(key)
    except (RuntimeError, KeyError):
        # They say it themselves.
        return


def _told() -> str | None:
    """What rank 0 said when it failed, or None if it did not in time."""
    try:
        store, key = _store()
        return store.get(key).decode()
    except (RuntimeError, KeyError):
        return None


def _store() -> tuple[Any, str]:
    """The store that torchrun keeps for its ranks, and the key of rank 0's words in it."""
    from datetime import timedelta

    from torch.distributed import TCPStore

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        timeout=timedelta(seconds=_PATIENCE),
        wait_for_workers=False,
    )
    return store, f"pyflocality/told/{attempt}"
