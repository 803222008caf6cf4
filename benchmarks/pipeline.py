"""Where the time of one pipeline call goes, at the width of the real models with random weights and a few blocks.

    python -m benchmarks.pipeline [--models qwen-image flux] [--blocks 2] [--size 1024] [--nfe 4] [--json FILE]

Prints seconds in the network, the policy (rollouts of all steps) and the VAE, the peak memory of the process, and the
policy's share of the network's time at full depth, which takes every block beyond those that ran to cost the same.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage
from torch import Tensor, nn

from benchmarks.candidates import Run
from benchmarks.machine import machine
from benchmarks.operations import AT_SOURCE, Case, Operation, candidates
from benchmarks.roofline import Work
from benchmarks.shapes import FULL_DEPTH, GMShape, gm_work
from piflow.models import (
    GMDiTTransformer2DModelV2,
    GMFlux2Transformer2DModel,
    GMFluxTransformer2DModel,
    GMQwenImageTransformer2DModel,
)
from piflow.pipelines import PiDiTPipeline, PiFlux2Pipeline, PiFluxPipeline, PiQwenImagePipeline
from piflow.pipelines.schedules import PUBLISHED_SCHEDULE
from piflow.pipelines.stand_ins import PolicyTransformer
from piflow.policies import Policy
from piflow.schedulers import FlowMapSDEScheduler

PUBLISHED = ("qwen-image", "flux")
"""Those that `python -m benchmarks.pipeline` runs by default."""
KL_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
FLUX_VAE: dict[str, Any] = KL_VAE | {
    "latent_channels": 16, "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    "use_quant_conv": False, "use_post_quant_conv": False,
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
    double, single = blocks - blocks // 2, blocks // 2
    no_text: dict[str, Any] = {"text_encoder": None, "tokenizer": None, "scheduler": scheduler}

    def embeds(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, torch.bfloat16)

    pipeline: Any
    arguments: dict[str, Any]
    with default_dtype(torch.bfloat16):
        if model == "qwen-image":
            network: Any = GMQwenImageTransformer2DModel(num_layers=blocks)
            pipeline = PiQwenImagePipeline(transformer=network, vae=AutoencoderKLQwenImage(), **no_text)
            arguments = {"prompt_embeds": embeds(1, 128, 3584)}
        elif model == "flux":
            network = GMFluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True)
            no_text |= {"text_encoder_2": None, "tokenizer_2": None}
            pipeline = PiFluxPipeline(transformer=network, vae=AutoencoderKL(**FLUX_VAE), **no_text)
            arguments = {"prompt_embeds": embeds(1, 512, 4096), "pooled_prompt_embeds": embeds(1, 768)}
        elif model == "flux-2":
            network = GMFlux2Transformer2DModel(num_layers=double, num_single_layers=single)
            pipeline = PiFlux2Pipeline(transformer=network, vae=AutoencoderKLFlux2(), **no_text)
            arguments = {"prompt_embeds": embeds(1, 512, 15360)}
        else:
            network = GMDiTTransformer2DModelV2(num_gaussians=32, num_layers=blocks)
            scheduler = FlowMapSDEScheduler()
            pipeline = PiDiTPipeline(transformer=network, vae=AutoencoderKL(**KL_VAE), scheduler=scheduler)
            arguments = {"class_labels": [207]}
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


@dataclass(frozen=True)
class PolicyCall:
    """What the pipeline asked of a policy in one step: `policy.integrate(x_src, *times)`."""

    policy: Any
    x_src: Tensor
    times: tuple[Any, ...]


def measure(
    model: str,
    blocks: int,
    size: int,
    nfe: int,
    device: str,
    asked: list[PolicyCall] | None = None,
    decode: bool = True,
) -> dict[str, Any]:
    """One call, after one of a single step at the same size; what it took and how much memory.

    asked: filled with what the pipeline asked of its policies. decode: whether the VAE makes an image of the latents.
    """
    pipeline, arguments = build(model, blocks, device)
    arguments["generator"] = torch.Generator().manual_seed(0)
    if model == "imagenet-dit-xl":
        size = 8 * pipeline.transformer.config.sample_size
    else:
        arguments |= {"height": size, "width": size}
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
        if asked is not None:
            PolicyTransformer._destination = noting(asked, PolicyTransformer._destination)  # type: ignore[method-assign]
        start = clock.now()
        image = pipeline(**arguments, num_inference_steps=nfe, output_type="pt" if decode else "latent").images
        total = clock.now() - start
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)
    assert not decode or image.shape == (1, 3, size, size)
    assert image.isfinite().all()

    seconds = clock.seconds
    deeper = sum(seconds[name] * (FULL_DEPTH[model][name] / max(len(layers), 1) - 1) for name, layers in depth.items())
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


def noting(asked: list[PolicyCall], destination: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def noted(self: PolicyTransformer, policy: Policy, x_src: Tensor) -> Tensor:
        steps = self.steps
        start, end = (raw_t[steps.index].expand(len(x_src)) for raw_t in (steps.raw_t_src, steps.raw_t_dst))
        asked.append(PolicyCall(policy, x_src, (start, end, steps.noise_schedule, self.total_substeps, steps.seq_len)))
        return destination(self, policy, x_src)

    return noted


# ---------------------------------------------------------------------------------------------------------------------
# As a suite of `benchmarks.run`


def pipeline_case(model: str, device: str, tiny: bool) -> tuple[Case, list[dict[str, Any]]]:
    """A pipeline's policies on the outputs of its own network, as an operation; and rows of the call's parts.

    Without the VAE, which takes most of a call on a CPU: `python -m benchmarks.pipeline` has it.
    """
    asked: list[PolicyCall] = []
    blocks = 28 if model == "imagenet-dit-xl" and not tiny else 2
    size, nfe = (64, 2) if tiny else (1024, 4)
    call = measure(model, blocks, size, nfe, device, asked, decode=False)
    name = f"{model}-{call['size']}"
    common: dict[str, Any] = {
        "suite": "pipeline", "case": name, "device": device, "dtype": "bfloat16",
        "pass": "forward", "candidate": "ours", "status": "ok", "rounds": 1,
        "note": f"{blocks} blocks, {nfe} network evaluations",
    }  # fmt: skip
    rows = []
    for part in PARTS:
        seconds = call["seconds"][part]
        row = common | {"operation": PARTS[part], "ms": {"p50": seconds * 1e3}}
        rows.append(row | {"call": call} if part == "total" else row)
    return Case("pipeline", name, nfe, (lambda batch: policies_of(asked[:batch], device),)), rows


PARTS = {"total": "call without VAE", "network": "network in it", "policy": "policies in it"}


def work_of(asked: PolicyCall) -> Work:
    """A rollout from the source to the next step's."""
    means, logweights = asked.policy.means, asked.policy.logweights
    start, end, noise_schedule, total_substeps, seq_len = asked.times
    levels = noise_schedule.substep_sigmas(start, end, total_substeps, seq_len)
    channels = means.numel() // logweights.numel()
    pixels = asked.x_src.numel() // channels  # of all samples
    shape = GMShape(1, means.numel() // asked.x_src.numel(), channels, (pixels,), levels.shape[1] - 1)
    return gm_work(shape, means.dtype, AT_SOURCE)


def policies_of(asked: list[PolicyCall], device: str) -> Operation:
    """All policies of a call, one after the other: samples of the operation are the call's steps."""
    parts = ("means", "logstds", "logweights")
    problem = {"x_src": torch.cat([call.x_src for call in asked])}
    problem |= {name: torch.cat([getattr(call.policy, name) for call in asked]) for name in parts}
    problem["step"] = torch.arange(len(asked))  # samples may be picked, and each has noise levels of its own

    def run(backend: Any) -> Run:
        def destinations(step: Tensor, **problem: Tensor) -> Tensor:
            ends = []
            for i, call in enumerate(asked[number] for number in step.tolist()):
                network = {name: value[i : i + 1] for name, value in problem.items()}
                sigma_src = call.policy.sigma_src.to(network["x_src"].dtype)
                policy = replace(call.policy, **network, sigma_src=sigma_src, backend=backend)
                ends.append(policy.integrate(network["x_src"], *call.times))
            return torch.cat(ends)

        return destinations

    substeps = asked[0].times[3]  # of all steps together
    work = functools.reduce(operator.add, map(work_of, asked))
    return Operation("policies of a call", substeps, problem, candidates(run, (), device), (), work)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=FULL_DEPTH, default=list(PUBLISHED))
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
        print(f"{model}, {arguments.blocks} blocks, {result['size']}^2, {arguments.nfe} NFE: {parts};")
        share, full = result["policy_share_at_full_depth"], result["network_seconds_at_full_depth"]
        print(f"    policy {share:.3%} of the network at full depth ({full:.0f} s)")
        print(f"    peak memory {result['peak_memory_bytes'] / 2**30:.1f} GiB")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "pipelines": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
