"""A small real tokenizer for tests: byte-level BPE from our own trainer, with ChatML control tokens and template."""

from collections.abc import Sequence
from pathlib import Path

from dayzero.data.tokenizer_training import save_tokenizer, train_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = [
    "The quick brown fox jumps over the lazy dog.\n\nIt was the best of times, it was the worst of times.",
    "user assistant system\nassistant\n\nWhat is 17 + 25? The answer is 42.\n\n",
] * 20


def tiny_tokenizer(
    path: Path, *, chat_template: str | None = CHATML, eos_token: str | None = None, added: Sequence[str] = ()
) -> Path:
    """Save a tokenizer of about 400 entries to `path`; pad is EOS, as for many real models.

    `added`: further entries that it does not call special.
    """
    tokenizer = train_tokenizer(iter(TEXT), 400)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(list(added))
    if eos_token:
        tokenizer.eos_token = tokenizer.pad_token = eos_token
    tokenizer.chat_template = chat_template
    save_tokenizer(tokenizer, path)
    return path
