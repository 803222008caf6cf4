"""Where the time of one pipeline call goes, at the width of the real models with random weights and a few blocks.

    python -m benchmarks.pipeline [--models qwen-image flux] [--blocks 2] [--size 1024] [--nfe 4] [--json FILE]

Prints seconds in the network, the policy (rollouts of all steps) and the VAE, the peak memory of the process, and the
policy's share of the network's time at full depth, which takes every block beyond those that ran to cost the same.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from torch import Tensor, nn

from benchmarks.machine import machine
from piflow.models import GMFluxTransformer2DModel, GMQwenImageTransformer2DModel
from piflow.pipelines import PiFluxPipeline, PiQwenImagePipeline
from piflow.pipelines.schedules import PUBLISHED_SCHEDULE
from piflow.pipelines.stand_ins import PolicyTransformer
from piflow.schedulers import FlowMapSDEScheduler

FULL_DEPTH = {
    "qwen-image": {"transformer_blocks": 60},
    "flux": {"transformer_blocks": 19, "single_transformer_blocks": 38},
}
FLUX_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "latent_channels": 16, "layers_per_block": 2, "norm_num_groups": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "sample_size": 1024,
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules are made in `dtype`, so that they never need the memory of float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(model: str, blocks: int, device: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline without text encoders, and the arguments of a call that stand in for a prompt."""
    scheduler = FlowMapSDEScheduler(**PUBLISHED_SCHEDULE)
    draw = torch.Generator().manual_seed(0)

    def embeds(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, torch.bfloat16)

    with default_dtype(torch.bfloat16):
        if model == "qwen-image":
            parts: dict[str, Any] = {"transformer": GMQwenImageTransformer2DModel(num_layers=blocks)}
            parts |= {"vae": AutoencoderKLQwenImage(), "text_encoder": None, "tokenizer": None}
            pipeline = PiQwenImagePipeline(**parts, scheduler=scheduler)
            arguments = {"prompt_embeds": embeds(1, 128, 3584)}
        else:
            double, single = blocks - blocks // 2, blocks // 2
            network = GMFluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True)
            parts = {"transformer": network, "vae": AutoencoderKL(**FLUX_VAE), "text_encoder": None, "tokenizer": None}
            pipeline = PiFluxPipeline(**parts, text_encoder_2=None, tokenizer_2=None, scheduler=scheduler)
            arguments = {"prompt_embeds": embeds(1, 512, 4096), "pooled_prompt_embeds": embeds(1, 768)}
    pipeline.transformer.eval(), pipeline.vae.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device), arguments


class Clock:
    """Seconds by name, of calls wrapped by it."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.on_gpu = device.startswith("cuda")

    def now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] += self.now() - start

        return timed


def measure(model: str, blocks: int, size: int, nfe: int, device: str) -> dict[str, Any]:
    """One call, after one of a single step at the same size; what it took and how much memory."""
    pipeline, arguments = build(model, blocks, device)
    arguments |= {"height": size, "width": size, "generator": torch.Generator().manual_seed(0)}
    pipeline(**arguments, num_inference_steps=1, output_type="latent")

    clock, network = Clock(device), pipeline.transformer
    depth: dict[str, nn.ModuleList] = {name: getattr(network, name) for name in FULL_DEPTH[model]}
    wrapped = [
        (network, "forward", "network"),
        (pipeline.vae, "decode", "vae"),
        (PolicyTransformer, "_destination", "policy"),
    ]
    wrapped += [(block, "forward", name) for name, layers in depth.items() for block in layers]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in wrapped]
    try:
        for owner, name, label in wrapped:
            setattr(owner, name, clock.wrap(label, getattr(owner, name)))
        start = clock.now()
        image = pipeline(**arguments, num_inference_steps=nfe, output_type="pt").images
        total = clock.now() - start
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)
    assert image.shape == (1, 3, size, size)
    assert image.isfinite().all()

    seconds = clock.seconds
    deeper = sum(seconds[name] * (FULL_DEPTH[model][name] / len(layers) - 1) for name, layers in depth.items())
    peak = (
        torch.cuda.max_memory_allocated() if clock.on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {
        "model": model, "blocks": blocks, "size": size, "nfe": nfe,
        "parameters": sum(p.numel() for p in network.parameters()),
        "seconds": {"total": total, **{name: seconds[name] for name in ("network", "policy", "vae")}},
        "network_seconds_at_full_depth": seconds["network"] + deeper,
        "policy_share_at_full_depth": seconds["policy"] / (seconds["network"] + deeper),
        "peak_memory_bytes": peak,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=FULL_DEPTH, default=list(FULL_DEPTH))
    parser.add_argument(
        "--blocks", type=int, default=2, help="transformer blocks of each network (default: %(default)s)"
    )
    parser.add_argument("--size", type=int, default=1024, help="height and width in pixels (default: %(default)s)")
    parser.add_argument("--nfe", type=int, default=4, help="network evaluations (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="store the results in this file")
    parser.add_argument("--one", choices=FULL_DEPTH, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:  # in a process of its own, for the peak memory is the process's
        result = measure(arguments.one, arguments.blocks, arguments.size, arguments.nfe, arguments.device)
        print(json.dumps(result))
        return 0

    settings = [f"--{name}={getattr(arguments, name)}" for name in ("blocks", "size", "nfe", "device")]
    results = []
    for model in arguments.models:
        command = [sys.executable, "-m", "benchmarks.pipeline", "--one", model, *settings]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(result := json.loads(done.stdout.splitlines()[-1]))
        parts = ", ".join(f"{name} {value:.2f} s" for name, value in result["seconds"].items())
        print(f"{model}, {arguments.blocks} blocks, {arguments.size}^2, {arguments.nfe} NFE: {parts};")
        share, full = result["policy_share_at_full_depth"], result["network_seconds_at_full_depth"]
        print(f"    policy {share:.3%} of the network at full depth ({full:.0f} s)")
        print(f"    peak memory {result['peak_memory_bytes'] / 2**30:.1f} GiB")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "pipelines": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
