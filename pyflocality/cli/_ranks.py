"""Commands that `torchrun` started as several ranks: they join, and speak with one voice."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING

from pyflocality._support.streams import tell

if TYPE_CHECKING:
    from pyflocality.posterior.ranks import Ranks

# How long a rank that failed waits to hear whether rank 0 failed alike, in seconds.
_PATIENCE = 10.0
# What is noted of a rank 0 that has lost another one; else its exit code.
_LOST = "lost"


def in_job() -> bool:
    """Whether this process is one of several ranks."""
    count = os.environ.get("WORLD_SIZE", "1")
    # Of another program, where it is no number.
    return count.isdecimal() and int(count) > 1


def is_first() -> bool:
    """Whether this process is rank 0, or alone."""
    return not in_job() or os.environ.get("RANK") == "0"


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

    The others print nothing, unless they fail in another way than rank 0 does. Where a rank was
    lost, it is told how to go on.

    Args:
        run: Runs the command line and answers its exit code.
    """
    if is_first():
        code, lost = _ended(run)
        if code:
            _told(_LOST if lost else str(code))
        return code
    held = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(held):
        code, lost = _ended(run)
    if code:
        first = _told()
        # Whoever lost a rank has no more to say than rank 0, whatever that said.
        if first is None or not (lost or first == str(code)):
            sys.stderr.write(held.getvalue())
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


def _told(end: str | None = None) -> str | None:
    """How rank 0 failed, in the store that torchrun keeps for its ranks.

    Args:
        end: What rank 0 notes; None waits for it.

    Returns:
        The note, which has then arrived: rank 0 may end; None where there was none in time.
    """
    from datetime import timedelta

    import torch.distributed as dist

    key = f"pyflocality/told/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            timeout=timedelta(seconds=_PATIENCE),
            wait_for_workers=False,
        )
        if end is not None:
            store.set(key, end)
        return store.get(key).decode()
    except (RuntimeError, KeyError):
        # Each rank speaks for itself.
        return None
