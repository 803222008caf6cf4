"""Networks of the real classes with weights that need no download, saved to files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from piflow.evaluation.inception import InceptionV3


def inception_weights() -> dict[str, Tensor]:
    """Weights of Inception by a formula, scaled so that activations neither die nor explode."""
    weights = {}
    for place, (name, value) in enumerate(sorted(InceptionV3().state_dict().items())):
        if name.endswith("num_batches_tracked"):
            continue
        number = torch.arange(value.numel(), dtype=torch.float64)
        uniform = ((number * 12.9898 + 7.233 * place).sin() * 43758.5453).frac()  # in (-1, 1)
        spread = (6 / value[0].numel()) ** 0.5 if value.dim() > 1 else 0.1
        shift = 1.0 if name.endswith(("running_var", "bn.weight")) else 0.0
        weights[name] = (shift + spread * uniform).float().reshape(value.shape)
    return weights


def picture(height: int, width: int) -> Tensor:
    """One image (1, 3, height, width) uint8, the same everywhere."""
    number = torch.arange(3 * height * width)
    return ((number * number * 7 + number * 31) % 251).to(torch.uint8).reshape(1, 3, height, width)


def save_clip(folder: Path) -> Path:
    """A CLIP model with random weights, its processor and a tokenizer that knows single letters."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    end = vocabulary["<|endoftext|>"]
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(words), "max_position_embeddings": 16, "eos_token_id": end,
                     "bos_token_id": end - 1, "pad_token_id": end},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).eval().save_pretrained(folder)
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "clip"
    return folder
