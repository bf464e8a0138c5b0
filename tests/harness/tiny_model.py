"""A model small enough to start in seconds: two Llama layers, random weights, a real byte-level BPE tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).resolve().parents[2] / "examples" / "chat_template.jinja"


def _shun_white_space(model: Any, tokenizer: Any) -> None:
    """Give white space and special tokens a bias against them.

    A grammar for JSON allows white space without end, and random weights like nothing better. Dimension 0 of the
    residual stream becomes a constant, which the output layer can use as a bias.
    """
    weights = model.state_dict()
    weights["model.embed_tokens.weight"][:, 0] = 1.0
    for layer in range(model.config.num_hidden_layers):
        for projection in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{layer}.{projection}.weight"][0] = 0.0
    special = set(tokenizer.all_special_ids)
    weights["lm_head.weight"][:, 0] = 0.0
    for token in range(len(tokenizer)):
        if token in special or not tokenizer.decode([token]).strip():
            weights["lm_head.weight"][token, 0] = -5.0


def make_tiny_model(folder: Path) -> Path:
    """Write the model into `folder`, unless it is there already."""
    if (folder / "ready").exists():
        return folder
    import pydoc_data.topics

    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2_000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = TEMPLATE.read_text()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=8_192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    _shun_white_space(model, tokenizer)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "ready").touch()
    return folder
