"""A byte-level Llama with random weights, as a folder from save_pretrained: no download."""

from pathlib import Path

import torch


def save(folder: Path, hidden: int = 64, layers: int = 2, positions: int = 128) -> Path:
    """4 heads, 2 of keys and values, an MLP of twice the hidden size; always the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_kernels.finetune.stdlib_base import byte_tokenizer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=258,
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=positions,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=256,
                pad_token_id=257,
            )
        )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def squares(lines: int = 90) -> str:
    """Text whose end differs from its beginning, about 45 bytes a line."""
    return "".join(f"line {i}: the square of {i} is {i * i}, its cube {i**3}\n" for i in range(lines))
