"""A tokenizer of one's own for language models that start from a configuration, and what begins a transcript."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>"]


def train_tokenizer(transcripts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training transcripts: any text can be written, so unseen words never fail.

    Args:
        transcripts: training transcripts.
        vocabulary: number of tokens at most, the 256 bytes and the two special tokens counted in.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(transcripts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def start_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What a transcript begins with: BOS, or EOS where there is no BOS (Qwen).

    A first position without content is needed: attention sinks there, and an empty transcript has one. EOS ends the
    document before it in training data; EleutherAI's lm-evaluation-harness begins with it, too.
    """
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
