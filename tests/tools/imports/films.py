"""Small films, written by PyAV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np


def write_film(
    path: Path, samples: np.ndarray | None, rate: int, frames: np.ndarray | None = None, fps: int = 10
) -> None:
    """A film.

    Args:
        samples: int16 [channels, n], stored losslessly where the container can; None: no sound track.
        frames: uint8 [n, height, width, 3], stored losslessly in .mkv; None: no pictures.
    """
    codec = {".mp4": "aac", ".mkv": "pcm_s16le", ".avi": "pcm_s16le"}[path.suffix]
    with av.open(path, "w") as container:
        sound: Any = None
        picture: Any = None
        if samples is not None:
            sound = container.add_stream(codec, rate=rate, layout="stereo" if len(samples) == 2 else "mono")
        if frames is not None:
            lossless = path.suffix == ".mkv"
            picture = container.add_stream("ffv1" if lossless else "mpeg4", rate=fps)
            picture.height, picture.width = frames.shape[1:3]
            picture.pix_fmt = "bgr0" if lossless else "yuv420p"
            for frame in frames:
                container.mux(picture.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(picture.encode(None))
        if sound is not None and samples is not None:
            layout = "stereo" if len(samples) == 2 else "mono"
            whole = av.AudioFrame.from_ndarray(samples.T.reshape(1, -1).copy(), format="s16", layout=layout)
            whole.sample_rate = rate
            container.mux(sound.encode(whole))
            container.mux(sound.encode(None))
