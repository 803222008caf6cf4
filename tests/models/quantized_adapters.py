"""A pi-Flow adapter on quantised bases, run as a process of its own: the packages that quantise slow every import.

    python -m tests.models.quantized_adapters

Prints one JSON object: for each kind, how the student over that base compares with the reference vectors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import gguf
import torch
from diffusers import QwenImageTransformer2DModel, TorchAoConfig
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig

from piflow.models.adapters import load_piflow_adapter
from tests.golden_vectors import GOLDEN, load_group

BASE, ADAPTER = GOLDEN / "g08_lora_base_qwen", GOLDEN / "g08_export_gmqwen"


def nf4(layer: nn.Linear) -> nn.Module:
    new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type="nf4")
    new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    return new.to("cpu")


def int8(layer: nn.Linear) -> nn.Module:
    new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return new.to("cpu")


def gguf_q8(layer: nn.Linear) -> nn.Module:
    new = GGUFLinear(layer.in_features, layer.out_features, compute_dtype=torch.float32)
    packed = gguf.quantize(layer.weight.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
    new.weight = GGUFParameter(torch.from_numpy(packed), quant_type=gguf.GGMLQuantizationType.Q8_0)
    return new


def quantized(make: Callable[[nn.Linear], nn.Module], block: int) -> QwenImageTransformer2DModel:
    """The base with every linear layer quantised whose rows are whole blocks, its output layers too."""
    base = QwenImageTransformer2DModel.from_pretrained(BASE)
    for path, layer in list(base.named_modules()):
        if type(layer) is nn.Linear and layer.in_features % block == 0:
            new = make(layer)
            new.bias = layer.bias
            base.set_submodule(path, new)
    return base.eval()


KINDS: dict[str, Callable[[], QwenImageTransformer2DModel]] = {
    "bitsandbytes nf4": lambda: quantized(nf4, 64),  # diffusers itself quantises with it on a GPU only
    "bitsandbytes int8": lambda: quantized(int8, 1),
    "GGUF Q8_0": lambda: quantized(gguf_q8, 32),
    "torchao int8": lambda: QwenImageTransformer2DModel.from_pretrained(
        BASE, torch_dtype=torch.float32, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    ).eval(),
}


@torch.no_grad()
def compare(base: QwenImageTransformer2DModel) -> dict[str, Any]:
    group = load_group("g08_lora_export")
    inputs, expected = group["gmqwen.adapter"].inputs, group["gmqwen.adapter"].outputs["means"]

    def call(model: nn.Module) -> Tensor:
        tokens, text, time = (inputs[key] for key in ("tokens", "encoder_hidden_states", "timestep"))
        return model(tokens, text, timestep=time, img_shapes=[[(1, 4, 3)]] * 2, return_dict=False)[0]

    before = call(base)
    student = load_piflow_adapter(base, ADAPTER)
    means = call(student)
    student.disable_lora()
    without = call(student)
    parameters = {name.replace(".base_layer.", "."): p for name, p in student.named_parameters()}
    shared = {name: p for name, p in base.named_parameters() if not name.startswith(("proj_out", "norm_out.linear"))}
    own = [p for name, p in parameters.items() if ".lora_" in name or name.startswith(("proj_out", "norm_out.linear"))]
    return {
        "quantised tensors": sum(type(p) is not nn.Parameter for p in base.parameters()),
        "error": float((means - expected).norm() / expected.norm()),
        "error without LoRA": float((without - expected).norm() / expected.norm()),
        "shared": all(parameters[name] is p for name, p in shared.items()),
        "own dtypes": sorted({str(p.dtype) for p in own}),
        "own types": sorted({type(p).__name__ for p in own}),
        "base unchanged": torch.equal(call(base), before),
        "repeats": torch.equal(call(load_piflow_adapter(base, ADAPTER, adapter_name="again")), means),
    }


if __name__ == "__main__":
    print(json.dumps({kind: compare(make()) for kind, make in KINDS.items()}))
