"""`pyflocality cache`: the folder of files that save work."""

from __future__ import annotations

from collections.abc import Sequence
from json import dumps
from typing import TYPE_CHECKING, Annotated

import typer

from pyflocality._support.streams import answer
from pyflocality._support.text import bytes_told
from pyflocality.cli._errors import reported
from pyflocality.cli._groups import OneOf

if TYPE_CHECKING:
    from pyflocality.storage.limit import Entry


@reported()
def cache(
    action: Annotated[
        str | None,
        typer.Argument(
            help="path: where it is; size: bytes that it holds; clear: remove what it holds; all "
            "that is known of it if not given.",
            show_default=False,
        ),
        OneOf("path", "size", "clear"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show or clear the cache: decoded sets, masks and bases of large images, and linear images.

    It lies in pyflocality in the user's cache folder, or where PYFLOCALITY_CACHE_DIR says. It holds
    at most 20GB (21,474,836,480 bytes), or what PYFLOCALITY_CACHE_LIMIT says: before something is
    written, what was used longest ago goes. Neither that nor clear removes what a process has
    open, nor files of others in that folder.
    """
    from pyflocality.storage.cache import cache_folder
    from pyflocality.storage.limit import cache_use, remove_all, told_use

    folder = cache_folder()
    gone, open_ones = remove_all(folder) if action == "clear" and folder is not None else ([], [])
    removed, in_use = _sum_of(gone), _sum_of(open_ones)
    use = cache_use()
    if as_json:
        cleared = {"removed": removed, "in_use": in_use} if action == "clear" else {}
        text = dumps({**use, **cleared}, indent=2)
    elif action == "path":
        text = use["folder"] or ""
    elif action == "size":
        text = str(use["bytes"])
    elif action == "clear":
        kept = f"; {_told(in_use)} are in use and stay" if open_ones else ""
        text = f"removed {_told(removed)}{kept}"
    else:
        text = told_use(use)
    answer(text, only_here=True)


def _sum_of(entries: Sequence[Entry]) -> dict[str, int]:
    return {"entries": len(entries), "bytes": sum(entry.size for entry in entries)}


def _told(total: dict[str, int]) -> str:
    return f"{total['entries']} entries ({bytes_told(total['bytes'])})"
