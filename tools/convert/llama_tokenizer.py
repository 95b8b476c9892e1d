"""llama2.c's tokenizer file (pieces with scores) → a tokenizer of transformers.

llama2.c joins, again and again, the two neighbours whose joint piece has the best score. That is byte pair encoding
whose merges are ordered by the score of what they make.
"""

from __future__ import annotations

import struct
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sharding.errors import UserError
from sharding.files import MOST_JSON, read_bounded

SPACE = "▁"  # how SentencePiece writes a space
SPECIAL = ("<unk>", "<s>", "</s>")
FIRST_PIECE = 3 + 256  # after the special ones and the bytes


def read_tokenizer(path: Path, vocabulary: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a model with that vocabulary.

    Raises:
        UserError: the file is truncated or of another model.
    """
    pieces, scores = read_pieces(path, vocabulary)
    ids: dict[str, int] = {}
    for number, piece in enumerate(pieces):
        ids.setdefault(piece, number)
    if len(ids) != len(pieces):  # a place must stay taken, or the ids behind it would move
        raise UserError(str(path), "holds a piece twice", "Give the tokenizer.bin that belongs to the model.")
    merges = []
    for piece in sorted(pieces[FIRST_PIECE:], key=lambda piece: -scores[ids[piece]]):
        merges += [
            (piece[:cut], piece[cut:]) for cut in range(1, len(piece)) if {piece[:cut], piece[cut:]} <= ids.keys()
        ]
    made = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def read_pieces(path: Path, vocabulary: int) -> tuple[list[str], list[float]]:
    """The pieces as SentencePiece writes them, and their scores: int32 longest piece, then of each a float32 score, an
    int32 length and its bytes.

    Raises:
        UserError: the file ends too early or too late.
    """
    data = read_bounded(path, MOST_JSON, "Give the tokenizer.bin that belongs to the model.")
    pieces, scores, place = [], [], 4
    try:
        for _ in range(vocabulary):
            score, length = struct.unpack_from("<fi", data, place)
            if not 0 <= length <= len(data) - place - 8:
                raise ValueError(f"a piece of {length} bytes")
            pieces.append(data[place + 8 : place + 8 + length].decode().replace(" ", SPACE))
            scores.append(score)
            place += 8 + length
        if place != len(data):
            raise ValueError(f"{len(data) - place} bytes are left after {vocabulary} pieces")
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise UserError(
            str(path),
            f"is no tokenizer of a model with {vocabulary} tokens ({error})",
            "Give the one that belongs to it.",
        ) from None
    pieces[: len(SPECIAL)] = SPECIAL
    return pieces, scores
