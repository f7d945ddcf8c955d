"""A tiny exported model as the export stage leaves it: a random Llama that vLLM can serve, and its tokenizer."""

from __future__ import annotations

from pathlib import Path

from tests.tiny_tokenizer import CHATML, tiny_tokenizer


def tiny_export(
    path: Path,
    *,
    chat_template: str | None = CHATML,
    head_dim: int = 32,
    num_key_value_heads: int = 1,
    tie_word_embeddings: bool = False,
) -> Path:
    """Save model and tokenizer to `path`; the same arguments give the same weights."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tiny_tokenizer(path, chat_template=chat_template, eos_token="<|im_end|>" if chat_template else None)
    tokenizer = AutoTokenizer.from_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path
