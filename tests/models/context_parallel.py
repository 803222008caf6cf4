"""One of several processes that run students with their tokens split among them; started by test_students.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

import piflow.models
from tests.models import networks

CLASSES = {
    "GMQwenImageTransformer2DModel": "qwen",
    "DXQwenImageTransformer2DModel": "qwen",
    "GMFluxTransformer2DModel": "flux",
    "DXFluxTransformer2DModel": "flux",
    "GMFlux2Transformer2DModel": "flux2",
    "DXFlux2Transformer2DModel": "flux2",
}


def main() -> None:
    torch.accelerator.device_count = lambda: 1  # diffusers numbers each rank's device: here all have the CPU
    dist.init_process_group("gloo")
    for name, family in CLASSES.items():
        arguments = dict(networks.ARGUMENTS[family])
        arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"][:, :4]  # a number that two can share
        if "txt_ids" in arguments:
            arguments["txt_ids"] = arguments["txt_ids"][:4]
        if family == "flux2":
            arguments |= {key: arguments[key][None].expand(2, -1, -1) for key in ("img_ids", "txt_ids")}
        torch.manual_seed(0)
        student = getattr(piflow.models, name).from_teacher(getattr(networks, family)(), 3)
        with torch.no_grad():
            expected = student(**arguments)
            student.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))
            output = student(**arguments)
        for part, whole in zip(output, expected):
            torch.testing.assert_close(part, whole, rtol=0, atol=1e-5)
        print(f"{name} on rank {dist.get_rank()}: equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
