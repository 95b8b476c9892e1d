"""From what is heard to what a language model reads: SLAM-ASR's projector, from random or pre-trained weights."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dist_train.packed import TextStates
from dist_train.rollout import SimulationSettings
from sharding.errors import UserError
from sharding.portable import MANIFEST, Portable

# Where a projector's weights lie in a directory: a run of ours, one of its checkpoints, SLAM-LLM's, DeepSpeed's.
PLACES = ("checkpoints/best/manifest.json", "manifest.json", "model.safetensors", "model.pt", "pytorch_model.bin")
REMEDY = (
    "Give the run directory of a projector pre-training (recipes/slam_asr.yaml), or SLAM-LLM's model.pt or "
    "pytorch_model.bin."
)


class Projector(nn.Module):
    """SLAM-ASR's linear projector (arXiv 2402.08846): stack k frames, Linear, ReLU, Linear. Drops T mod k frames."""

    def __init__(self, audio_width: int, text_width: int, settings: SimulationSettings) -> None:
        super().__init__()
        self.stack = settings.stack_frames
        self.linear1 = nn.Linear(audio_width * self.stack, settings.projector_width)
        self.linear2 = nn.Linear(settings.projector_width, text_width)

    def forward(self, frames: Tensor, mask: Tensor) -> TextStates:
        """frames [B, T, D], mask [B, T] → [B, T//k, H] and its mask; a position counts if all its k frames do."""
        B, T, D = frames.shape
        length = T // self.stack
        stacked = frames[:, : length * self.stack].reshape(B, length, D * self.stack)
        lengths = mask.sum(1) // self.stack
        kept = torch.arange(length, device=mask.device) < lengths[:, None]
        return TextStates(self.linear2(torch.relu(self.linear1(stacked))), kept)


def load_projector(projector: Projector, name: str) -> None:
    """Fills the projector from a file or directory: a run or checkpoint of ours, or SLAM-LLM's `encoder_projector`.

    Other weights in the file (LoRA, fusion) are left out; of pickled files only tensors are read.

    Raises:
        UserError: there is none, it cannot be read, or its projector has other shapes.
    """
    path = weights_file(Path(name))
    found = projector_weights(path)
    for own, parameter in projector.named_parameters():
        if own not in found:
            raise UserError("simulation.projector", f"{path} holds no weights *projector.{own}", REMEDY)
        if found[own].layout != torch.strided or found[own].is_meta or found[own].is_quantized:
            raise UserError("simulation.projector", f"{path} has values in {own} that are no plain numbers", REMEDY)
        if found[own].shape != parameter.shape:
            raise UserError(
                "simulation.projector",
                f"{path} has {own} of shape {list(found[own].shape)}, this model needs {list(parameter.shape)}",
                "Set audio, text, simulation.stack_frames and simulation.projector_width as they were there.",
            )
        if not (found[own].is_floating_point() and found[own].isfinite().all()):
            raise UserError("simulation.projector", f"{path} has values in {own} that are not finite numbers", REMEDY)
        parameter.data.copy_(found[own])


def weights_file(path: Path) -> Path:
    """The file itself, or the one of PLACES that a directory holds."""
    files = [path] if path.is_file() else [path / place for place in PLACES if (path / place).is_file()]
    if not files:
        raise UserError("simulation.projector", f"{path} is no file, nor a directory with {', '.join(PLACES)}", REMEDY)
    return files[0]


def projector_weights(path: Path) -> dict[str, Tensor]:
    """linear1|linear2.weight|bias of a file, whatever stands before these names ends in `projector.`."""
    if path.name == MANIFEST:
        checkpoint = Portable(path.parent, checksums=False)
        return {own: checkpoint.tensor("model", key) for key in checkpoint.names("model") if (own := own_name(key))}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {own: file.get_tensor(key) for key in file.keys() if (own := own_name(key))}  # noqa: SIM118
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no file of torch.save")
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, which torch.save never does: it may hold any size")
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        held = held.get("model", held) if isinstance(held, dict) else {}
        return {own: value for key, value in held.items() if isinstance(value, Tensor) and (own := own_name(key))}
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
        SafetensorError,
        zipfile.BadZipFile,
        NotImplementedError,
    ) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError("simulation.projector", f"{path} cannot be read ({reason})", REMEDY) from None


def own_name(key: object) -> str | None:
    """`…projector.linear1.weight` → linear1.weight; None for other keys."""
    _, found, own = str(key).rpartition("projector.")
    return own if found else None
