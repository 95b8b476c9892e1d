"""The members of one sample in a tar, as our writer lays them: plain files, long names in an extended header.

Nothing else is read. Links, devices and sparse files have no place in a sample, and tarfile, which would follow and
expand them (and takes ten times as long), goes back and forth in an archive whose sizes lie.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

BLOCK = 512
FILE, EXTENDED = b"0", b"x"
_SIZE = re.compile(rb"[0-7]{11}[\0 ]")  # 8 GiB is more than a sample has
_RECORD = re.compile(rb"(\d{1,7}) ([^=\n]+)=")
_DAMAGED = "has a damaged tar header"


def members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents, in order.

    Args:
        data: the bytes of whole members.

    Raises:
        ValueError: a member is no plain file, is there twice, or its header lies.
    """
    start, seen, long_name = 0, set(), None
    while start < len(data):
        header, body = data[start : start + BLOCK], start + BLOCK
        if not _SIZE.fullmatch(header[124:136]):
            raise ValueError(_DAMAGED)
        end = body + int(header[124:135], 8)
        if end > len(data):
            raise ValueError(_DAMAGED)
        kind = header[156:157]
        start = end + -end % BLOCK
        if kind == EXTENDED and long_name is None:
            long_name = _path(data[body:end])
            continue
        name = header[:100].rstrip(b"\0").decode() if long_name is None else long_name
        if kind != FILE:
            raise ValueError(f"holds {name}, which is no plain file (tar type {kind.decode('latin-1')!r})")
        if name in seen:
            raise ValueError(f"holds {name} twice")
        seen.add(name)
        long_name = None
        yield name, data[body:end]
    if long_name is not None:
        raise ValueError(_DAMAGED)


def _path(records: bytes) -> str:
    """The name in an extended header (records "LENGTH path=NAME NEWLINE"), which our writer fills with nothing else."""
    found = _RECORD.match(records)
    if found is None or int(found[1]) != len(records) or records[-1:] != b"\n":
        raise ValueError(_DAMAGED)
    if found[2] != b"path":
        raise ValueError(
            f"has an extended tar header with {found[2].decode(errors='replace')}, where only path is read"
        )
    return records[found.end() : -1].decode()
