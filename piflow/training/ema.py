"""Exponential moving average of ZeRO-3 parameters: each rank averages the float32 shard that it owns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from piflow.training.config import EMAConfig


def karras_momentum(iteration: int, gamma: float, start_iteration: int = 0) -> float:
    """(1 - 1/t)^(gamma+1) with t = max(iteration + 1 - start_iteration, 1), iteration from 0 (power-function EMA)."""
    t = max(iteration + 1 - start_iteration, 1)
    return (1 - 1 / t) ** (gamma + 1)


@torch.no_grad()
def update_average(shadow: Iterable[Tensor], current: Iterable[Tensor], momentum: float) -> None:
    """shadow <- momentum shadow + (1 - momentum) current, in place."""
    torch._foreach_lerp_(list(shadow), list(current), 1 - momentum)


class ShardedEMA:
    """The average of a ZeRO-3 engine's trainable parameters, one padded float32 shard per parameter and rank.

    `shadow` {name: (shard,)} is what a checkpoint keeps. `full_state_dict` is a collective call.
    """

    def __init__(self, module: nn.Module, config: EMAConfig) -> None:
        self.config = config
        self.parameters: dict[str, Any] = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.shadow = {name: shard.clone() for name, shard in self.current_shards().items()}

    def current_shards(self) -> dict[str, Tensor]:
        """{name: (shard,)}: this rank's float32 shards of the weights themselves."""
        from deepspeed.utils import safe_get_local_fp32_param

        return {name: safe_get_local_fp32_param(p).detach() for name, p in self.parameters.items()}

    def update(self, iteration: int) -> None:
        """Take in the weights after the optimiser step of `iteration` (from 0)."""
        momentum = karras_momentum(iteration, self.config.gamma, self.config.start_iteration)
        update_average(self.shadow.values(), self.current_shards().values(), momentum)

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Put back the shards of a checkpoint. Raises ValueError where names or sizes differ."""
        if shadow.keys() != self.shadow.keys():
            raise ValueError(f"the average holds other parameters: {sorted(shadow.keys() ^ self.shadow.keys())[:3]}")
        for name, shard in self.shadow.items():
            if shard.shape != shadow[name].shape:
                raise ValueError(
                    f"the average of {name} has {shadow[name].numel()} elements, expected {shard.numel()}."
                )
            shard.copy_(shadow[name])

    @contextlib.contextmanager
    def swapped_in(self, engine: Any) -> Iterator[None]:
        """The average in place of the weights until the end, and then the same weights as before, to the bit.

        Collective at both ends. Within it the student may be evaluated, not trained or saved.
        """
        own = {name: p.ds_tensor.detach().clone() for name, p in self.parameters.items()}
        self._put(engine, self.shadow)
        try:
            yield
        finally:
            self._put(engine, own)

    @torch.no_grad()
    def _put(self, engine: Any, shards: Mapping[str, Tensor]) -> None:
        engine.empty_partition_cache()  # weights that are still gathered would stay the old ones
        for name, p in self.parameters.items():
            p.ds_tensor.copy_(shards[name])
        engine.optimizer.checkpoint_event_epilogue()  # gathers those anew that ZeRO-3 never partitions

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole average {name: float32 on the CPU}, on rank 0; an empty dict elsewhere. Every rank must call it."""
        import torch.distributed as dist

        full = {}
        for name, shard in self.shadow.items():
            p = self.parameters[name]
            gathered = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, shard)
            if dist.get_rank() == 0:
                full[name] = torch.cat(gathered)[: p.ds_numel].reshape(p.ds_shape).cpu()
        return full
