"""SDUMC's published fusion checkpoint (arXiv 2410.15029): `{"state_dict": {…}}` of the official classes.

The official code has two classes of one name. In `wengnet_mosei_mult_views_text_missing.py` the imagination's residual
starts from the incoming text; in `wengnet_mosei_mult_views_text_missing copy.py` from the transition's output, and only
this one has a batch norm `normali` (which its forward does not use). So a file tells which of them it is of.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from dist_train.fusion import VIEWS
from dist_train.imagination import Skip
from sharding.errors import UserError
from tools.convert.held import Held
from tools.convert.pickles import keys_of, load_pickle, tensors_of
from tools.convert.slam import contiguous, save_pickle
from tools.convert.source import Context, Outgoing, Source, in_memory, others, select, together

FILE = "fusion.pt"
INSIDE = "model."  # the official `get_models` holds the network under this name
FUSION = "fusion."
# In the official state_dict, though no forward uses them.
UNUSED = ("fc_out_e.", "fc_out_ev.", "prelu.", "normali.", "layer_normali.")
OFFICIAL_VIEWS = {"fused": "avt", "at": "at", "tv": "tv", "av": "av", "audio": "a", "text": "t", "video": "v"}
CLASSES: dict[Skip, str] = {
    "text": "wengnet_mosei_mult_views_text_missing.py",
    "transition": "wengnet_mosei_mult_views_text_missing copy.py",
}


def name_map() -> dict[str, str]:
    """Beginnings of official names → ours."""
    names = {
        "attention_mlp.": "modality_gate.mlp.",
        "fc_att.": "modality_gate.weights.",
        "cross_attention_mlp.": "view_gate.mlp.",
        "cross_fc_att.": "view_gate.weights.",
        "fc_out_v.": "head.",
        "orgin_linear_change.": "rnc_head.",
    }
    for index, modality in enumerate(("audio", "text", "video")):
        names |= {
            f"frame_dim_reshape_{index}.": f"projections.{index}.",
            f"fra2utt_{index}.attention_context_vector": f"pooled_attention.{index}.query",
            f"fra2utt_{index}.input_proj.": f"pooled_attention.{index}.key.",
            f"{modality}_mlp.": f"pooled_attention.{index}.mlp.",
            f"cross_att_fra2utt_{index}.query_proj.": f"view_attention.{index}.query.",
            f"cross_att_fra2utt_{index}.input_proj.": f"view_attention.{index}.key.",
            f"cross_{modality}_mlp.": f"view_attention.{index}.mlp.",
        }
    assert list(OFFICIAL_VIEWS.values()) == list(VIEWS)
    names |= {f"cross_{official}_query_mlp.": f"views.{ours}." for official, ours in OFFICIAL_VIEWS.items()}
    for official, ours in {"text": "pooled", "cross_text_query": "views"}.items():
        names |= {
            f"missing_{official}_imagination_mlp.transition.": f"{ours}_imagination.text.transition.",
            f"missing_{official}_imagination_mlp.encoder_0.0.": f"{ours}_imagination.text.encoder.",
            f"missing_{official}_imagination_mlp.decoder_0.0.": f"{ours}_imagination.text.decoder.",
        }
    return names


NAMES = name_map()


def our_name(official: str) -> str | None:
    """An official name → ours; None for what we do not have."""
    for begin, ours in NAMES.items():
        if official.startswith(begin):
            return FUSION + ours + official.removeprefix(begin)
    return None


def official_name(ours: str) -> str | None:
    """The other way."""
    for official, begin in NAMES.items():
        if ours.startswith(FUSION + begin):
            return official + ours.removeprefix(FUSION + begin)
    return None


def plain(key: str) -> str:
    """A name without what `get_models` and DataParallel put before it."""
    return key.removeprefix("module.").removeprefix(INSIDE).removeprefix("module.")


def detect(path: Path) -> bool:
    """Whether a file's names are those of the official network."""
    if path.is_dir():
        path = path / FILE
    return path.is_file() and any(plain(key).startswith("fra2utt_0.") for key in keys_of(path))


def read(path: Path, context: Context) -> Source:
    """The fusion network of an official file.

    Raises:
        UserError: it cannot be read, is refused, lacks weights, or is of the class with the other skip than the run's.
    """
    file = path / FILE if path.is_dir() else path
    held = load_pickle(file)
    inner = held.get("state_dict", held) if isinstance(held, dict) else held
    found = {plain(key): x for key, x in tensors_of(inner, file).items()}
    skip: Skip = "transition" if any(key.startswith("normali.") for key in found) else "text"
    if context.run is not None and context.run.recipe.imagination.skip != skip:
        raise UserError(
            str(file),
            f"is of the official class whose imagination skips from the {skip}, the run's from the "
            f"{context.run.recipe.imagination.skip}",
            f"Give a run with imagination.skip: {skip}.",
        )
    names = {ours: key for key in found if (ours := our_name(key)) is not None}
    missing = [begin for begin, ours in NAMES.items() if not any(x.startswith(FUSION + ours) for x in names)]
    if missing:
        raise UserError(str(file), f"lacks {missing[0]}*", "Give a file of the official network.")
    left = sorted(found.keys() - set(names.values()))
    state = {"skip": skip}
    return Source(
        Held(select(in_memory(found), names), state=state),
        [file],
        left_out=[f"{len(left)} weights that no forward uses ({', '.join(left)})"] if left else [],
    )


def plan(source: Source, context: Context) -> Outgoing:
    """The official file, in fp32.

    Raises:
        UserError: the source has no such network.
    """
    weights = source.held.weights
    names = {official: name for name in weights.shapes if (official := official_name(name)) is not None}
    missing = [begin for begin in NAMES if not any(name.startswith(begin) for name in names)]
    if missing:
        ours = FUSION + NAMES[missing[0]]
        raise UserError(
            "SRC", f"holds no {ours}*, which the official class has", "Give a run with imagination.enabled: true."
        )
    skip = (
        source.held.state.get("skip") or context.needs_run("its recipe tells imagination.skip").recipe.imagination.skip
    )
    width = weights.shapes[names["fc_att.weight"]][1]
    whole = together(select(weights, names, torch.float32), in_memory(unused(skip, width)))
    tensors = select(whole, {INSIDE + name: name for name in whole.shapes})
    notes = [f"the official class with this imagination is that of toolkit/models/{CLASSES[skip]!r}"]
    notes += [f"{', '.join(UNUSED)} are as at the start: no forward uses them"]
    widths = {"fc_att.weight": [3, 256], "missing_text_imagination_mlp.encoder_0.0.weight": [128, 256],
              "missing_cross_text_query_imagination_mlp.encoder_0.0.weight": [64, 128]}  # fmt: skip
    odd = [name for name, shape in widths.items() if weights.shapes[names[name]] != shape]
    if odd:
        notes.append(
            f"the official class has other widths ({odd[0]} is {widths[odd[0]]}): change them there to load it"
        )
    if context.run is not None and context.run.recipe.fusion.attention_scale != 0.3:
        notes.append("the official class has softmax_scale 0.3, the run another")
    return Outgoing(
        tensors,
        lambda place, chosen: save_pickle(place / FILE, {"epoch": 0, "state_dict": contiguous(chosen)}),
        lambda place: reopened(place / FILE),
        "torch.load(weights_only=True)",
        files=[FILE],
        left_out=others(source, names.values()),
        notes=notes,
    )


def unused(skip: Skip, width: int) -> dict[str, Tensor]:
    """What the official class holds and its forward does not use, as at the start (its linears zero)."""
    found = {
        "fc_out_e.weight": torch.zeros(1, 128), "fc_out_e.bias": torch.zeros(1),
        "fc_out_ev.weight": torch.zeros(1, 1), "fc_out_ev.bias": torch.zeros(1),
        "prelu.weight": torch.full((6,), 0.25),
        "layer_normali.weight": torch.ones(width), "layer_normali.bias": torch.zeros(width),
    }  # fmt: skip
    if skip == "transition":
        found |= {
            "normali.weight": torch.ones(7), "normali.bias": torch.zeros(7), "normali.running_mean": torch.zeros(7),
            "normali.running_var": torch.ones(7), "normali.num_batches_tracked": torch.tensor(0),
        }  # fmt: skip
    return found


def reopened(path: Path) -> Iterable[tuple[str, Tensor]]:
    """The tensors of the file."""
    return iter(tensors_of(load_pickle(path)["state_dict"], path).items())
