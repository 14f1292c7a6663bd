"""Files of JSON that carry their own checksum, written as somebody else would write them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping


def sealed(entry: Mapping[str, object]) -> str:
    """An object with the CRC-32 of its text under `self`."""
    return json.dumps({**entry, "self": zlib.crc32(json.dumps(entry).encode())})


def unsealed(text: str) -> dict[str, object]:
    """The object without its checksum."""
    entry = json.loads(text)
    del entry["self"]
    return entry
