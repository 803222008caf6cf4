"""What the networks of a step do: FLOPs, and bytes beside the parameters, worked out without allocating anything.

The networks run on fake tensors (torch's FakeTensorMode): every operation computes shapes alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from piflow.training.config import TrainConfig
from piflow.training.module import PiIDModule
from piflow.training.networks import blocks_of


@dataclass(frozen=True)
class Workload:
    """What the networks do in one micro-step: FLOPs, and bytes beside the parameters.

    held: between the student's forward and backward pass; block: one block run forward and backward; block_held: what
    it holds in between; teacher: a call of the teacher. student_flops: forward pass, recomputation and backward pass.
    """

    student_flops: float
    teacher_flops: float
    held: float
    block: float
    block_held: float
    teacher: float

    def times(self, factor: float) -> Workload:
        """Of a batch `factor` times as large."""
        return Workload(*(factor * getattr(self, field.name) for field in fields(self)))

    def activations(self, checkpointing: bool) -> float:
        """The most that lives at once; without checkpointing what blocks hold is in `held` already."""
        return self.held + max(self.block - (0 if checkpointing else self.block_held), self.teacher)


def workload(
    module: PiIDModule, config: TrainConfig, latent_shape: tuple[int, int, int], prompt_tokens: int
) -> Workload:
    """Run student, one block and teacher on fake tensors. Turns the module's parameters into fake ones."""
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    batch = config.batch_size_per_rank
    branches = 1 if config.distillation.guidance_scale == 1 else 2
    blocks = blocks_of(module.student)
    with FakeTensorMode(allow_non_fake_inputs=True):
        known = _fake_parameters(module, dtype)
        seen: dict[type, tuple[nn.Module, Any, Any]] = {}

        def note(block: nn.Module, args: Any, kwargs: Any) -> None:
            seen.setdefault(type(block), (block, args, kwargs))

        hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
        inputs = _inputs(module, latent_shape, batch, prompt_tokens, dtype)
        module.train()
        with LiveBytes(known) as live, _flop_counter() as forward:
            output = module.student(**inputs)
        for hook in hooks:
            hook.remove()
        held = live.now

        in_blocks, recomputed, backward, largest, largest_held = 0, 0, 0, 0, 0
        for kind, (block, args, kwargs) in seen.items():
            count = sum(type(other) is kind for other in blocks)
            cost = _run_block(block, args, kwargs)
            in_blocks += count * cost[0]
            backward += count * cost[1]
            if cost[2] > largest:
                largest, largest_held = cost[2], cost[3]
        if config.student.gradient_checkpointing:
            recomputed = in_blocks
        total = forward.get_total_flops()
        outside = 2 * (total - in_blocks)
        del output

        inputs = _inputs(module, latent_shape, branches * batch, prompt_tokens, dtype)
        with LiveBytes((inputs, known)) as live, _flop_counter() as call, torch.no_grad():
            module.teacher(**inputs, return_dict=False)
    student_flops = total + recomputed + backward + outside
    return Workload(student_flops, call.get_total_flops(), held, largest, largest_held, live.peak)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made within it: `now`, those still alive, and `peak`. Views of `known` do not count.

    Works on fake tensors and on real ones, of any device.
    """

    def __init__(self, known: Any = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages: set[int] = set()
        for storage in {x.untyped_storage() for x in tree_leaves(known) if isinstance(x, Tensor)}:
            self._register(storage, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, result)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages:
            self._register(storage, storage.nbytes())

    def _register(self, storage: Any, size: int) -> None:
        self.storages.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, size)  # another one may come to lie at its address

    def _gone(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.now -= size


def _run_block(block: nn.Module, args: Any, kwargs: Any) -> tuple[int, int, int, int]:
    """(FLOPs forward, FLOPs backward, peak bytes, bytes held in between) of one block, run without checkpointing."""
    args, kwargs = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.is_floating_point()), (args, kwargs))
    with LiveBytes((args, kwargs, list(block.parameters()))) as live, _flop_counter() as flops:
        outputs = [x for x in tree_leaves(block(*args, **kwargs)) if isinstance(x, Tensor) and x.requires_grad]
        forward, held = flops.get_total_flops(), live.now
        torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
    for parameter in block.parameters():
        parameter.grad = None
    return forward, flops.get_total_flops() - forward, live.peak, held


def _inputs(module: PiIDModule, shape: tuple[int, int, int], batch: int, tokens: int, dtype: torch.dtype) -> Any:
    """Keyword arguments of a network for `batch` latents of `shape`, in a FakeTensorMode."""
    state = module.calls.state(torch.empty(batch, *shape, dtype=dtype)).requires_grad_()
    network = module.teacher.config
    condition: dict[str, Any] = {"class_labels": torch.zeros(batch, dtype=torch.long)}
    if module.calls.layout == "packed":
        condition = {
            "prompt_embeds": torch.empty(batch, tokens, network.joint_attention_dim, dtype=dtype),
            "prompt_mask": None,
            "pooled": torch.empty(batch, getattr(network, "pooled_projection_dim", 1), dtype=dtype),
        }
    return module.calls.inputs(state, torch.empty(batch), condition, (shape[1], shape[2]))


def _fake_parameters(module: nn.Module, dtype: torch.dtype) -> list[nn.Parameter]:
    """Put parameters without memory in place of the module's, and return them."""
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        fake = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad)
        module.get_submodule(owner).register_parameter(leaf, fake)
    return list(module.parameters())


@contextmanager
def _flop_counter() -> Iterator[FlopCounterMode]:
    """torch's counter, which does not know the attention kernels of the CPU by itself."""

    def forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    aten = torch.ops.aten
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        yield counter
