"""provenance.json of a result: where it comes from."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train import __version__
from sharding.portable import digest, flush
from tools.convert.source import Context, Outgoing, Source

if TYPE_CHECKING:
    from tools.convert.formats import Format

FILE = "provenance.json"


def write_provenance(
    place: Path, src: Path, found: Format, target: Format, source: Source, planned: Outgoing, context: Context
) -> None:
    """Writes it: paths, formats, checksums of what was read, version, command, date, what was left out.

    Raises:
        OSError: the disk refuses it.
    """
    files = [path for path in source.files if path.is_file()]
    value: dict[str, Any] = {
        "format": target.name,
        "source": {
            "path": str(src.resolve()),
            "format": found.name,
            "files": {str(path.resolve()): source.checksums.get(path) or digest(path) for path in files},
        },
        "run": str(context.run.path.resolve()) if context.run is not None else None,
        "base": str(planned.base) if planned.base is not None else None,
        "bases": source.held.state.get("bases", {}),
        "dist_train": __version__,
        "command": shlex.join(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "tensors": len(planned.tensors.shapes),
        "left_out": planned.left_out,
        "notes": planned.notes,
    }
    (place / FILE).write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    flush(place / FILE)
