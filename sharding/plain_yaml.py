"""What is refused of YAML before anything is built of it: a few lines may stand for gigabytes, or end the process."""

from __future__ import annotations

import yaml

MOST_DEPTH = 32  # the deepest recipe has 4; libyaml composes recursively and overflows the stack of C
MOST_VALUES = 10_000  # with aliases counted as what they stand for; the longest recipe has 200
_Parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_yaml(text: str) -> list[str]:
    """Reads a document's events, which takes no more room than the text.

    Returns:
        Its scalars, each where it is written.

    Raises:
        yaml.YAMLError: it is no YAML, nested too deeply, refers to itself, or stands for too many values.
    """
    scalars: list[str] = []
    sizes: dict[str | None, int] = {}  # of what has an anchor and is complete
    open_: list[tuple[str | None, int]] = []  # anchor, and values that came before
    total = 0
    for event in yaml.parse(text, Loader=_Parser):
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_):
                raise yaml.YAMLError(f"*{event.anchor} stands inside what it stands for")
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            scalars.append(event.value)
            total += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if len(open_) > MOST_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MOST_DEPTH} deep")
        if total > MOST_VALUES:
            raise yaml.YAMLError(f"it has more than {MOST_VALUES} values, each alias counted as what it stands for")
    return scalars
