"""Hostile recipes, overrides and hardware profiles (YAML)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.security.attempt import Words
from tests.security.case import Case

GOOD = "data: {path: x}\naudio: {pretrained: a}\ntext: {pretrained: b}\n"
LAUGHS = "a: &a0 [x, x]\n" + "".join(f"b{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
DOUBLING = "".join(f"v{i}: '${{v{i + 1}}}${{v{i + 1}}}'\n" for i in range(40)) + "v40: words\n"


def recipe(text: str | bytes, *overrides: str) -> Callable[[Path], Words]:
    """`recipe` with a file of this content."""

    def lay(folder: Path) -> Words:
        (folder / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["recipe", "r.yaml", *overrides]

    return lay


def added(text: str) -> Callable[[Path], Words]:
    """A good recipe and something more."""
    return recipe(GOOD + text)


def config(part: str, fields: str) -> Callable[[Path], Words]:
    """A recipe with these fields in one model's configuration."""
    other = "audio" if part == "text" else "text"
    tuning = ", tuning: full" if part == "text" else ""
    return recipe(f"data: {{path: x}}\n{other}: {{pretrained: a}}\n{part}: {{config: {{{fields}}}{tuning}}}\n")


def override(*texts: str) -> Callable[[Path], Words]:
    return recipe(GOOD, *texts)


def profile(text: str) -> Callable[[Path], Words]:
    """`plan` with a hardware profile of this content."""

    def lay(folder: Path) -> Words:
        (folder / "r.yaml").write_text(GOOD)
        (folder / "h.yaml").write_text(text)
        return ["plan", "r.yaml", "--hardware", "h.yaml"]

    return lay


def special(make: Callable[[Path], object]) -> Callable[[Path], Words]:
    def lay(folder: Path) -> Words:
        make(folder / "r.yaml")
        return ["recipe", "r.yaml"]

    return lay


def terabyte(path: Path) -> None:
    path.write_text(GOOD)
    os.truncate(path, 1 << 40)


TAG = r"r\.yaml: is not YAML \(could not determine a constructor for the tag"
BIG = r"{}: is not YAML \(it has more than \d+ values, each alias counted as what it stands for"
DEEP = r"{}: is not YAML \(it is nested more than \d+ deep"
ITSELF = r"{}: is not YAML \(\*a stands inside what it stands for"
OWN = r"r\.yaml: .*{}.*\. Write \\\$\{{"
USES = r"r\.yaml: .*it uses \$\{{…\}} {} times"
CONFIG = r"text\.config\.num_hidden_layers: is 1e\+09\. Write at most 1000"

# fmt: off
CASES = [
    Case("tag that runs a command", recipe("a: !!python/object/apply:os.mkdir [ran]\n"), (TAG,)),
    Case("tag that makes an object", recipe("!!python/object/new:os._wrap_close {}\n"), (TAG,)),
    Case("tag that imports a module", recipe("a: !!python/module:antigravity\n"), (TAG,)),
    Case("tag of a name", recipe("a: !!python/name:os.system\n"), (TAG,)),
    Case("billion laughs", recipe(LAUGHS), (BIG.format(r"r\.yaml"),)),
    Case("billion laughs by merging", recipe("a0: &a0 {x: 1, y: 2}\n" + "".join(
         f"a{i}: &a{i} {{p: *a{i - 1}, <<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))),
         (BIG.format(r"r\.yaml"),)),
    Case("alias inside itself", recipe("a: &a {b: *a}\n"), (ITSELF.format(r"r\.yaml"),)),
    Case("merge of itself", recipe("a: &a {<<: *a}\n"), (ITSELF.format(r"r\.yaml"),)),
    Case("merge of a number", added("training: {<<: 3}\n"), (r"r\.yaml: is not YAML \(while constructing a mapping",)),
    Case("alias of nothing", recipe("a: *nothing\n"), (r"r\.yaml: is not YAML \(found undefined alias",)),
    Case("lists nested deeply", recipe("a: " + "[" * 100_000), (DEEP.format(r"r\.yaml"),)),
    Case("mappings nested deeply", recipe("{a: " * 50_000), (DEEP.format(r"r\.yaml"),)),
    Case("block lists nested deeply", recipe("- " * 100_000 + "1"), (DEEP.format(r"r\.yaml"),)),
    Case("explicit keys nested deeply", recipe("? " * 100_000), (DEEP.format(r"r\.yaml"),)),
    Case("many values", recipe("a: [" + "1," * 100_000 + "1]"), (BIG.format(r"r\.yaml"),)),
    Case("many anchors of nothing", recipe("".join(f"k{i}: &a{i}\n" for i in range(12_000))),
         (BIG.format(r"r\.yaml"),)),
    Case("a megabyte", recipe("a: " + "x" * 2**20), (r"r\.yaml: has 1048579 bytes",)),
    Case("a terabyte", special(terabyte), (r"r\.yaml: has 1099511627776 bytes",)),
    Case("a FIFO", special(os.mkfifo), (r"r\.yaml: is not a regular file",)),
    Case("a device", lambda folder: ["recipe", "/dev/zero"], (r"/dev/zero: is not a regular file",)),
    Case("key twice", recipe(GOOD + "seed: 1\nseed: 2\n"), (r"r\.yaml: is not YAML \(while constructing a mapping",)),
    Case("tabs", recipe("data:\n\tpath: x\n"), (r"r\.yaml: is not YAML \(while scanning",)),
    Case("NUL", recipe("data: {path: a\0b}\n"), (r"r\.yaml: is not YAML \(unacceptable character",)),
    Case("no UTF-8", recipe(b"data: {path: \xff\xfe}\n"), (r"r\.yaml: is not YAML",)),
    Case("number of 1e5 digits", added(f"seed: {'9' * 100_000}\n"), (r"r\.yaml: is not YAML \(Exceeds the limit",)),
    Case("date of the 99th month", added("seed: 2001-99-99\n"), (r"seed: cannot be",)),
    Case("number beyond every bound", added("optimizer: {learning_rate: 1e999}\n"),
         (r"optimizer\.learning_rate: cannot be",)),
    Case("binary", added("seed: !!binary aGVsbG8=\n"), (r"seed: cannot be",)),
    Case("key that is a list", added("? [a]\n: 1\n"), (r"r\.yaml: is not YAML|r\.yaml: .*key",)),
    Case("key that clears the terminal", added('"\\e[2J": 1\n'), (r"^\\x1b\[2J: is not a key",)),
    Case("key that forges a line", added('"x\\nerror: y": 1\n'), (r"^x\\nerror: y: is not a key",)),
    Case("key of many characters", added(f"? {'k' * 100_000}\n: 1\n"), (r"^k{500}…: is not a key",)),
    Case("environment by interpolation", added("optimizer: {name: '${oc.env:DIST_TRAIN_CANARY}'}\n"),
         (OWN.format("interpolation type oc.env"),)),
    Case("environment by override", override("optimizer.name=${oc.env:DIST_TRAIN_CANARY}"),
         (OWN.format("interpolation type oc.env"),)),
    Case("environment by a name put together", added("e: env\noptimizer: {name: '${oc.${e}:DIST_TRAIN_CANARY}'}\n"),
         (OWN.format("interpolation type oc.env"),)),
    Case("decoded by interpolation", added("seed: \"${oc.decode:'[1,[2]]'}\"\n"),
         (OWN.format("interpolation type oc.decode"),)),
    Case("interpolation of itself", added("seed: ${seed}\n"), (OWN.format("seed"),)),
    Case("interpolation in a circle", added("seed: ${loss}\nloss: ${seed}\n"), (OWN.format("seed|loss"),)),
    Case("interpolation that doubles", recipe(DOUBLING), (USES.format(80),)),
    Case("interpolation nested deeply", added("seed: '" + "${" * 5000 + "a" + "}" * 5000 + "'\n"),
         (USES.format(5000),)),
    Case("interpolation that does not end", added("seed: '${a" + "[b" * 5000 + "'\n"),
         (r"r\.yaml: is not YAML \(missing BRACKET_CLOSE",)),
    Case("override with a tag", override("seed=!!python/object/apply:os.mkdir [ran]"),
         (r"cannot be applied \(could not determine",)),
    Case("override nested deeply", override("seed=" + "[" * 50_000), (r"cannot be applied \(it is nested more than",)),
    Case("override of a billion laughs", override("seed={" + LAUGHS.replace("\n", ", ") + "}"),
         (r"cannot be applied \(it has more than",)),
    Case("override of a deep key", override("a." * 20_000 + "b=1"), (r"cannot be applied \(",)),
    Case("override of a huge index", override("audio.lora.target_modules[99999999999]=1"),
         (r"audio\.lora\.target_modules: cannot be",)),
    Case("override of a number of 1e5 digits", override("seed=" + "9" * 100_000),
         (r"^seed=9{495}…: cannot be applied \(Exceeds",)),
    Case("override that clears the terminal", override("\x1b[2J=1"), (r"^\\x1b: is not a key",)),
    Case("a billion layers", config("text", "num_hidden_layers: 1000000000"), (CONFIG,)),
    Case("convolutions without end", config("audio", f"conv_dim: [{'1, ' * 3000}1], num_feat_extract_layers: 3001"),
         (r"audio\.config\.num_feat_extract_layers: is 3001",)),
    Case("heads of zero", config("text", "num_attention_heads: 0"), (r"text\.config: does not make a working model",)),
    Case("width of 10^18", config("text", "hidden_size: 1000000000000000000"),
         (r"text\.config: does not make a working model",)),
    Case("profile with a tag", profile("!!python/object/apply:os.mkdir [ran]\n"),
         (r"--hardware: .*could not determine a constructor",)),
    Case("profile of a billion laughs", profile(LAUGHS), (r"--hardware: .*it has more than",)),
    Case("profile nested deeply", profile("[" * 100_000), (r"--hardware: .*it is nested more than",)),
    Case("profile inside itself", profile("a: &a [*a]\n"), (r"--hardware: .*stands inside",)),
    Case("profile with a number of 1e5 digits", profile(f"memory: {'9' * 100_000}\n"),
         (r"--hardware: .*Exceeds the limit",)),
    Case("profile with infinite memory", profile("like: h100\nmemory: .inf\n"), (r"h\.yaml: memory: Input should be",)),
    Case("profile like a list", profile("like: [1]\n"), (r"h\.yaml: like: cannot be",)),
]
# fmt: on
