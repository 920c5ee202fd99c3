"""Tokenizers: any Hugging Face tokenizer folder, or a byte-level BPE trained on the input.

The anchor is the tokenizer's BOS (Llama: <|begin_of_text|>), else its EOS (Qwen: <|endoftext|>), else a token
that the user names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["anchor_token_id", "batch_encoder", "encoder_source", "load_tokenizer", "train_tokenizer"]

BOS, EOS = "<|bos|>", "<|eos|>"


def load_tokenizer(folder: str | Path) -> Any:
    """transformers' tokenizer in `folder`; ValueError naming the folder where there is none."""
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise ValueError(f"tokenizer {folder}: no such folder; expected a Hugging Face tokenizer's")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a folder that holds no tokenizer
        raise ValueError(f"tokenizer {folder}: transformers cannot open it: {error}") from error


def encoder_source(tokenizer: Any, folder: Path) -> str | Path:
    """What `batch_encoder` needs: the fast (Rust) tokenizer as JSON, else the folder. The JSON opens in a
    worker without transformers, whose import takes seconds.
    """
    if not tokenizer.is_fast:
        return folder
    return str(tokenizer.backend_tokenizer.to_str())


def batch_encoder(source: str | Path) -> Callable[[list[str]], list[list[int]]]:
    """Texts to token ids; special tokens are not added, nothing is cut or padded."""
    if isinstance(source, Path):
        slow = load_tokenizer(source)
        return lambda texts: (
            slow(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        )
    from tokenizers import Tokenizer

    fast = Tokenizer.from_str(source)
    fast.no_truncation()
    fast.no_padding()
    return lambda texts: [one.ids for one in fast.encode_batch_fast(texts, add_special_tokens=False)]


def anchor_token_id(tokenizer: Any, named: str | None = None) -> int:
    """Id of the anchor: the token `named`, else the tokenizer's BOS, else its EOS; ValueError where there is
    none.
    """
    if named is not None:
        found = tokenizer.get_vocab().get(named)
        if found is None:
            raise ValueError(f"--anchor-token: got {named!r}, expected a token of {tokenizer.name_or_path}")
        return int(found)
    for found in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    raise ValueError(
        f"tokenizer {tokenizer.name_or_path}: has neither BOS nor EOS; name an anchor by --anchor-token"
    )


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, folder: Path) -> None:
    """Trains a byte-level BPE of at most `vocab_size` entries on `texts` and saves it as a Hugging Face
    tokenizer folder.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise ValueError(
            f"--train-tokenizer: got {vocab_size}, expected at least {smallest} (bytes, BOS and EOS)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    whole.save_pretrained(str(folder))
