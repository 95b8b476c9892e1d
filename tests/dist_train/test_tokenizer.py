from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dist_train.llm import load_tokenizer, pad_id
from dist_train.tokenizer import SPECIAL, train_tokenizer
from tests import tiny

SENTENCEPIECE = Path(__file__).resolve().parents[3] / "shared" / "data" / "llama_vicuna_tokenizer.model"
TRANSCRIPTS = [" ".join(tiny.WORDS[i:] + tiny.WORDS[:i]) for i in range(len(tiny.WORDS))]
TRAINED = train_tokenizer(TRANSCRIPTS, 300)


@given(st.text().filter(lambda text: not any(name in text for name in SPECIAL)))
def test_any_text_can_be_written_and_read_back(text: str) -> None:
    ids = TRAINED(text, add_special_tokens=False).input_ids
    assert all(len(SPECIAL) <= i < 300 for i in ids)
    assert str(TRAINED.decode(ids)).removeprefix(" ") == text.removeprefix(" ")


def test_the_vocabulary_is_as_large_as_asked_and_learnt_from_the_transcripts() -> None:
    assert len(TRAINED) == 300
    small, large = train_tokenizer(TRANSCRIPTS, 258), train_tokenizer(TRANSCRIPTS, 1024)
    assert len(small) == 258 < len(large) < 1024  # no more merges than the transcripts offer
    count = [len(each("really awful film").input_ids) for each in (small, TRAINED, large)]
    assert count[0] > count[1] > count[2] == 4


def test_it_begins_with_bos_and_survives_saving(tmp_path: Path) -> None:
    TRAINED.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert len(loaded) == len(TRAINED)
    for text in ("the plot was awful", "Zürich — 日本 🙂", ""):
        ids = loaded(text).input_ids
        assert ids == TRAINED(text).input_ids
        assert ids[0] == loaded.bos_token_id == TRAINED.bos_token_id
    assert loaded.eos_token_id == pad_id(loaded) != loaded.bos_token_id


def test_without_any_transcript_there_are_still_the_bytes() -> None:
    assert len(train_tokenizer([], 1024)) == 258


@pytest.mark.skipif(not SENTENCEPIECE.is_file(), reason="the SentencePiece model is not there")
def test_the_sentencepiece_model_of_llama(tmp_path: Path) -> None:
    """As a file, as a hub folder of Vicuna has it, and as a run directory keeps it."""
    import sentencepiece  # noqa: PLC0415

    reference = sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE))
    folder = tmp_path / "vicuna"
    folder.mkdir()
    shutil.copy(SENTENCEPIECE, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    )
    from_file, from_folder = load_tokenizer(str(SENTENCEPIECE)), load_tokenizer(str(folder))
    from_file.save_pretrained(tmp_path / "run")
    for loaded in (from_file, from_folder, AutoTokenizer.from_pretrained(tmp_path / "run")):
        assert len(loaded) == 32_000
        assert (loaded.bos_token_id, loaded.eos_token_id, pad_id(loaded)) == (1, 2, 2)
        for text in ("Well, I didn't like the plot: 3 of 10!", "Zürich — 日本 🙂", "USER: Say it. \n ASSISTANT:", ""):
            assert loaded(text, add_special_tokens=False).input_ids == reference.encode(text)
