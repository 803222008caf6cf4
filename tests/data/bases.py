"""Tiny diffusers bases in folders: the real classes with random weights, and tokenizers that know single letters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, FluxPipeline, QwenImagePipeline
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.pipelines.tiny import TEXT_WIDTH, flux2_base, flux2_vae, flux_base, qwen_base, qwen_vae, seeded, vae

LETTERS = sorted(ByteLevel.alphabet())
CHAT = "{% for message in messages %}{{ message['role'][0] + message['content'][0]['text'] }}{% endfor %}"


def numbered(*tokens: str) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def qwen_tokenizer(**options: Any) -> Qwen2Tokenizer:
    return Qwen2Tokenizer(vocab=numbered("<|endoftext|>", *LETTERS), merges=[], **options)


def save_qwen_image(folder: Path) -> Path:
    """A QwenImagePipeline with a text encoder of two layers."""
    text = {
        "vocab_size": 300, "hidden_size": TEXT_WIDTH, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=qwen_vae(),
        text_encoder=seeded(lambda: Qwen2_5_VLForConditionalGeneration(config)),
        tokenizer=qwen_tokenizer(),
        transformer=qwen_base(),
    ).save_pretrained(folder)
    return folder


def save_flux(folder: Path) -> Path:
    """A FluxPipeline with CLIP and T5 of one and two layers."""
    clip = CLIPTextConfig(
        vocab_size=600, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=12, bos_token_id=1, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    t5 = T5Config(vocab_size=300, d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS)]
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=seeded(lambda: CLIPTextModel(clip)),
        tokenizer=CLIPTokenizer(
            vocab=numbered("<|endoftext|>", "<|startoftext|>", *words), merges=[], model_max_length=77
        ),
        text_encoder_2=seeded(lambda: T5EncoderModel(t5)),
        tokenizer_2=T5TokenizerFast(
            vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)],
            extra_ids=0,
        ),
        transformer=flux_base(),
    ).save_pretrained(folder)
    return folder


def save_flux2(folder: Path) -> Path:
    """A Flux2Pipeline whose text encoder has as many layers as the pipeline reads.

    With a tokenizer in the place of PixtralProcessor, which needs torchvision, has a tokenizer within, and passes on to
    it what has no images.
    """
    text = {
        "model_type": "mistral", "vocab_size": 300, "hidden_size": TEXT_WIDTH // 3, "intermediate_size": 16,
        "num_hidden_layers": 31, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=5)
    Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux2_vae(),
        text_encoder=seeded(lambda: Mistral3ForConditionalGeneration(config)),
        tokenizer=qwen_tokenizer(chat_template=CHAT, padding_side="left"),
        transformer=flux2_base(),
    ).save_pretrained(folder)
    return folder


SAVE = {"qwen_image": save_qwen_image, "flux": save_flux, "flux2": save_flux2}
