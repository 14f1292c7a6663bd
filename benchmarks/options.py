"""Options that the programs of this folder share."""

from __future__ import annotations

import os
from pathlib import Path


def path_option(text: str) -> Path:
    """A path, for argparse: shells leave the `~` of `--out=~/results` as it is."""
    return Path(os.path.expanduser(text))
