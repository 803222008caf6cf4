"""GM and DX heads on any diffusers transformer that predicts a flow velocity (docs/own_teacher.md).

No forward pass of our own: the last linear layer is widened, and the base class brings the wider output into latent
layout by itself. A GM head's channels are K velocities, then K logweights (for each sub-pixel of a packed token), then
one for the log standard deviation, whose mean over the sample counts; a DX head's are N velocities.

`GMSD3Transformer2DModel`, say, is the GM student of diffusers' `SD3Transformer2DModel`: an attribute of this module and
of `piflow.models`, made when first asked for.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, Self

import diffusers
import torch
from diffusers import ModelMixin
from torch import Generator, Tensor, nn

import piflow.models
from piflow.models.heads import (
    DXOutput,
    GMOutput,
    Network,
    base_of,
    check_policy,
    check_teacher,
    config_for,
    init_with_head,
    keep_precise,
    take_over,
)
from piflow.noise_schedule import check_whole


def student_class(base: Any, policy: Literal["GM", "DX"]) -> type[Any]:
    """The class of GM or DX students of a diffusers transformer; that of `piflow.models` where it has one by name.

    Beside what the base class takes, its configuration holds by keyword `num_gaussians` and `constant_logstd` (GM), or
    `n_grid`, `policy` and `shift` (DX), and where the base's output is found:

        velocity_channels   C of one velocity, C p of a packed token; as a rule the base's `in_channels`
        output_layer        path of the last linear layer
        channels_first      order of that layer's outputs: channel, sub-pixel; otherwise sub-pixel, channel
        layout              "spatial": the base returns (B, C, *S), or a list of (C, *S); "packed": (B, T, C p)
        logweights_channels p of a packed token
        velocity_scale      what turns the base's output into d x_t / d sigma; -1 for those that predict x_0 - noise
    """
    if policy not in ("GM", "DX"):
        raise ValueError(f"policy: expected 'GM' or 'DX', got {policy!r}")
    name = policy + base.__name__
    own = getattr(piflow.models, name) if name in piflow.models.__all__ else None
    return own or _make_class(base, policy)


@cache
def _make_class(base: Any, policy: str) -> type[Any]:
    heads: dict[str, tuple[type[Any], dict[str, Any]]] = {
        "GM": (_GMHead, {"num_gaussians": 8, "constant_logstd": None}),
        "DX": (_DXHead, {"n_grid": 10, "policy": "grid", "shift": None}),
    }
    mixin, settings = heads[policy]
    where: dict[str, Any] = {
        "out_channels": None,
        "velocity_channels": None,
        "output_layer": "proj_out",
        "channels_first": False,
        "layout": "spatial",
        "logweights_channels": 1,
        "velocity_scale": 1.0,
    }
    name = policy + base.__name__
    doc = f"{base.__name__} with a {policy} head; see `student_class`."
    body = {"__init__": init_with_head(base, **settings, **where), "__module__": __name__, "__doc__": doc}
    return type(name, (mixin, base), body)


def __getattr__(name: str) -> Any:
    base = getattr(diffusers, name[2:], None) if name.startswith(("GM", "DX")) and "Transformer" in name else None
    if not (isinstance(base, type) and issubclass(base, ModelMixin)):
        raise AttributeError(f"no student {name!r}: expected GM or DX before the name of a diffusers transformer")
    return student_class(base, "GM" if name.startswith("GM") else "DX")


class _WidenedHead(Network):
    """What generic GM and DX students share."""

    out_channels: int

    @classmethod
    @abstractmethod
    def width(cls, config: dict[str, Any]) -> int:
        """Number of channels of the output."""

    def complete_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """With `velocity_channels` and the widened `out_channels`; ValueError where they do not fit each other."""
        if config["layout"] not in ("spatial", "packed"):
            raise ValueError(f"layout: expected 'spatial' or 'packed', got {config['layout']!r}")
        config["velocity_channels"] = config["velocity_channels"] or config.get("in_channels")
        if config["velocity_channels"] is None:
            raise ValueError("velocity_channels: expected a number where the base has no in_channels, got None")
        width = self.width(config)
        if config["out_channels"] not in (None, width):
            raise ValueError(
                f"out_channels: expected {width} of this head on {config['velocity_channels']} velocity_channels, "
                f"got {config['out_channels']}"
            )
        return {**config, "out_channels": width}

    def install_head(self) -> None:
        """Widen the output layer where the base class has not done so itself, and give it a bias."""
        path, width = self.config.output_layer, self.config.out_channels
        layer = output_layer_of(self, path)
        one = vars(self).get("out_channels", self.config.velocity_channels)  # getattr would fall back on the config's
        built_for = width if takes_out_channels(base_of(type(self))) else one
        wide = nn.Linear(layer.in_features, layer.out_features // built_for * width)
        self.set_submodule(path, wide)
        keep_precise(self, path)
        self.out_channels = width

    def _output(self, *args: Any, **kwargs: Any) -> tuple[Tensor, int]:
        """The base's (B, M, *S) or (B, T, M), and its channel axis."""
        output = super().forward(*args, **kwargs, return_dict=False)[0]
        output = output if isinstance(output, Tensor) else torch.stack(tuple(output))
        return output, 1 if self.config.layout == "spatial" else 2

    @classmethod
    def _widened(
        cls,
        teacher: ModelMixin,
        config: dict[str, Any],
        share: bool,
        widen: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Self:
        """A student whose output layer is `widen`(the teacher's weight (C, sub-pixels, D), bias (C, sub-pixels))."""
        check_teacher(cls, teacher)
        channels = teacher.config.get("out_channels") or teacher.config.get("in_channels")
        config = {**config_for(cls, teacher), "velocity_channels": channels, **config, "out_channels": None}
        channels, path = config["velocity_channels"], config.get("output_layer", "proj_out")
        layer = output_layer_of(teacher, path)
        if not channels or layer.out_features % channels:
            raise ValueError(
                f"velocity_channels: expected a divisor of {layer.out_features}, the outputs of {path}, got {channels}"
            )
        axes = (0, 1) if config.get("channels_first") else (1, 0)  # of channel and sub-pixel among the layer's outputs
        bias = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
        sizes = (channels, -1) if axes == (0, 1) else (-1, channels)
        weight, bias = (v.unflatten(0, sizes).movedim(axes, (0, 1)) for v in (layer.weight.detach(), bias))
        weight, bias = (v.movedim((0, 1), axes).flatten(0, 1) for v in widen(weight, bias))
        wide = nn.utils.skip_init(nn.Linear, *weight.shape[::-1], device=weight.device, dtype=weight.dtype)
        wide.load_state_dict({"weight": weight, "bias": bias})
        return take_over(cls, teacher, config, {path: wide}, share)


class _GMHead(_WidenedHead):
    """Mixin before a diffusers transformer in the bases: its output is a Gaussian mixture for each (sub-)pixel."""

    @classmethod
    def width(cls, config: dict[str, Any]) -> int:
        """K velocities, K logweights and the log standard deviation."""
        check_whole("num_gaussians", config["num_gaussians"], least=1)
        check_whole("logweights_channels", config["logweights_channels"], least=1)
        per_component = config["velocity_channels"] + config["logweights_channels"]
        return config["num_gaussians"] * per_component + (config["constant_logstd"] is None)

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> GMOutput:
        """The mixture at the source state, for the arguments of the base class; a tuple whatever `return_dict`.

        In spatial or packed layout as the configuration says; shapes as `GMOutput` has them.
        """
        output, axis = self._output(*args, **kwargs)
        k = self.config.num_gaussians
        sizes = [k * self.config.velocity_channels, k * self.config.logweights_channels]
        means, logweights, rest = output.split([*sizes, output.shape[axis] - sum(sizes)], dim=axis)
        means = self.config.velocity_scale * means.unflatten(axis, (k, -1))
        logweights = logweights.unflatten(axis, (k, -1)).log_softmax(dim=axis)
        if self.config.constant_logstd is None:
            logstds = rest.mean(dim=tuple(range(1, rest.dim())), keepdim=True).unsqueeze(1)
        else:
            logstds = means.new_full((len(means), *[1] * (means.dim() - 1)), self.config.constant_logstd)
        return GMOutput(means, logstds, logweights)

    @classmethod
    def from_teacher(
        cls,
        teacher: ModelMixin,
        num_gaussians: int = 8,
        *,
        logstd: float = math.log(0.05),
        spread: float = 0.05,
        share: bool = False,
        generator: Generator | None = None,
        **config: Any,
    ) -> Self:
        """A student whose policy has the teacher's velocity at every source state.

        Arguments as in `PackedGMHead.from_teacher`; `config` holds what `student_class` lists.
        """
        config["num_gaussians"] = k = num_gaussians
        check_whole("num_gaussians", k, least=1)
        p = config.get("logweights_channels", 1)

        def widen(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            offsets = spread * torch.randn(k, len(weight) // p, generator=generator)
            offsets = (offsets - offsets.mean(dim=0)).repeat_interleave(p, dim=1).to(bias).flatten()
            logstd_rows = int(config.get("constant_logstd") is None)
            wide_weight = torch.cat([weight.repeat(k, 1, 1), weight.new_zeros(k * p + logstd_rows, *weight.shape[1:])])
            wide_bias = [bias.repeat(k, 1) + offsets[:, None], bias.new_zeros(k * p, bias.shape[1])]
            return wide_weight, torch.cat([*wide_bias, bias.new_full((logstd_rows, bias.shape[1]), logstd)])

        return cls._widened(teacher, config, share, widen)


class _DXHead(_WidenedHead):
    """Mixin before a diffusers transformer in the bases: its output is N velocities or polynomial coefficients."""

    @classmethod
    def width(cls, config: dict[str, Any]) -> int:
        """N velocities."""
        check_whole("n_grid", config["n_grid"], least=1)
        check_policy(config["policy"])
        return config["n_grid"] * config["velocity_channels"]

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> DXOutput:
        """grid (B, N, C, *S), or (B, T, N, C p) if packed, for the arguments of the base class."""
        output, axis = self._output(*args, **kwargs)
        return DXOutput(self.config.velocity_scale * output.unflatten(axis, (self.config.n_grid, -1)))

    @classmethod
    def from_teacher(cls, teacher: ModelMixin, n_grid: int = 10, *, share: bool = False, **config: Any) -> Self:
        """A student whose policy has the teacher's velocity at every source state: each grid point is its output.

        As `PackedDXHead.from_teacher`; `config` holds what `student_class` lists.
        """
        check_whole("n_grid", n_grid, least=1)
        config["n_grid"] = n_grid
        return cls._widened(teacher, config, share, lambda w, b: (w.repeat(n_grid, 1, 1), b.repeat(n_grid, 1)))


def output_layer_of(network: nn.Module, path: str) -> nn.Linear:
    """The last linear layer; ValueError where there is none under that path."""
    try:
        layer: nn.Module | None = network.get_submodule(path)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        found = "nothing" if layer is None else type(layer).__name__
        raise ValueError(
            f"output_layer: expected the path of a {type(network).__name__}'s last linear layer, found {found} "
            f"under {path!r}"
        )
    return layer


def takes_out_channels(base: type[Any]) -> bool:
    """Whether the base class builds an output of any width that its configuration asks for."""
    return "out_channels" in base._get_init_keys(base)
