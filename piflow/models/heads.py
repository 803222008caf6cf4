"""Policy heads on diffusers transformers that read packed tokens (T tokens of p sub-pixels, C p channels each).

Such a transformer ends with `proj_out(norm_out(tokens, conditioning))`. A student keeps the whole of its forward pass:
`proj_out` becomes a method that computes the mixture (GM) or is widened (DX).
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Generator, Tensor, nn

from piflow.noise_schedule import check_whole

if TYPE_CHECKING:

    class Network(nn.Module):
        """What a mixin may expect of the diffusers transformer behind it."""

        _cp_plan: dict[str, Any]
        _skip_layerwise_casting_patterns: list[str]

        def __getattr__(self, name: str) -> Any: ...

else:
    Network = nn.Module


class GMOutput(NamedTuple):
    """A Gaussian mixture over velocities at the source state (arXiv 2510.14974, section 3).

    In spatial layout `means` (B, K, C, H, W), `logstds` (B, 1, 1, 1, 1), `logweights` (B, K, 1, H, W); packed `means`
    (B, T, K, C p), `logstds` (B, 1, 1, 1), `logweights` (B, T, K, p): what `piflow_kernels` takes. The logweights are
    normalised over K.
    """

    means: Tensor
    logstds: Tensor
    logweights: Tensor


class DXOutput(NamedTuple):
    """Velocities on a grid of N times or polynomial coefficients (arXiv 2510.14974, section 4.1).

    `grid` (B, N, C, H, W), or packed (B, T, N, C p); index 0 of a grid is the segment's end.
    """

    grid: Tensor


def logstd_head(width: int, inner_width: int, n_layers: int) -> nn.Sequential:
    """`n_layers` linear layers, each after a SiLU, from the conditioning vector to one log standard deviation."""
    widths = [width] + [inner_width] * (n_layers - 1) + [1]
    return nn.Sequential(*(layer for a, b in pairwise(widths) for layer in (nn.SiLU(), nn.Linear(a, b))))


def start_logstd_head(layers: nn.Sequential, logstd: float, generator: Generator | None) -> None:
    """Initialise a `logstd_head` so that it predicts `logstd` everywhere. Under `torch.no_grad`."""
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    for layer in linear:
        # Drawn where the generator is: one of the CPU does not draw into a layer on a GPU.
        drawn = torch.empty_like(layer.weight, device=None if generator is None else generator.device)
        layer.weight.copy_(nn.init.xavier_uniform_(drawn, generator=generator))
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(linear[-1].weight)
    nn.init.constant_(linear[-1].bias, logstd)


def append_conditioning(norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook of `norm_out`(tokens, conditioning): the conditioning vector goes on as one more token.

    So the head gets it out of the base class's own forward pass, and nothing is kept on the module in between.
    """
    return torch.cat([output, args[1][:, None].to(output)], dim=1)


def in_dtype_of(layer: Any, hidden: Tensor) -> Tensor:
    """`hidden` as `layer` takes it, whose weight may be in another precision than the rest of the network."""
    dtype = layer.weight.dtype
    return hidden.to(dtype) if dtype.is_floating_point and dtype.itemsize > 1 else hidden  # else: quantised


def cast_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
    """Forward pre-hook of a widened output layer: so it can be kept in float32 on a bfloat16 network."""
    return (in_dtype_of(layer, args[0]),)


def widen_lora(student: Any, weights: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Load hook of a DX student: a LoRA that was made for its teacher's `proj_out` changes each velocity alike."""
    n, width = student.config.n_grid, student.config.out_channels
    for name, tensor in weights.items():
        if name.startswith(f"{prefix}proj_out.lora_B.") and n * len(tensor) == width:
            weights[name] = tensor.repeat(n, *[1] * (tensor.dim() - 1))


class PackedGMHead(Network):
    """Mixin before a diffusers transformer in the bases: its output is a Gaussian mixture for each sub-pixel.

    The class's configuration holds `num_gaussians` (K), `constant_logstd` (a number, or None for a predicted one),
    `logstd_inner_dim`, `gm_num_logstd_layers`, `logweights_channels` (p) and `out_channels` (C p).
    """

    replaced = ("norm_out", "proj_out")
    """Modules that a student does not share with its teacher."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Context parallelism gathers the tokens before the conditioning is appended to them, not after."""
        super().__init_subclass__(**kwargs)
        plan = dict(cls._cp_plan)
        if "proj_out" in plan:
            plan["norm_out"] = plan.pop("proj_out")
        cls._cp_plan = plan
        cls._skip_layerwise_casting_patterns = [*cls._skip_layerwise_casting_patterns, "^proj_out"]

    def install_head(self) -> None:
        """To be called at the end of `__init__`."""
        config, width = self.config, self.inner_dim
        check_head(config)
        self.norm_out.register_forward_hook(append_conditioning)
        del self.proj_out
        self.proj_out_means = nn.Linear(width, config.num_gaussians * config.out_channels)
        self.proj_out_logweights = nn.Linear(width, config.num_gaussians * config.logweights_channels)
        if config.constant_logstd is None:
            self.proj_out_logstds = logstd_head(width, config.logstd_inner_dim, config.gm_num_logstd_layers)

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> GMOutput | tuple[Any, ...]:
        """The mixture at the source state, for the arguments of the base class; a tuple whatever `return_dict`.

        Means (B, T, K, C p), logstds (B, 1, 1, 1), logweights (B, T, K, p), in the dtype of the head. Where the base
        returns more than its sample (FLUX.2's extracted `kv_cache`), so does this: (mixture, more).
        """
        mixture, *more = super().forward(*args, return_dict=False, **kwargs)
        return (mixture, *more) if more else mixture

    def proj_out(self, hidden: Tensor) -> GMOutput:
        """Stands where the base class calls its output layer, so that what it does to LoRA layers reaches the head."""
        hidden = in_dtype_of(self.proj_out_means, hidden)
        tokens, conditioning = hidden[:, :-1], hidden[:, -1]
        k = (self.config.num_gaussians, -1)
        means = self.proj_out_means(tokens).unflatten(-1, k)
        logweights = self.proj_out_logweights(tokens).unflatten(-1, k).log_softmax(dim=2)
        if self.config.constant_logstd is None:
            logstds = self.proj_out_logstds(conditioning)[:, :, None, None]
        else:
            logstds = means.new_full((len(means), 1, 1, 1), self.config.constant_logstd)
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

        Every component starts at the teacher's output plus a constant offset of standard deviation `spread` for each
        component and channel; the offsets break the symmetry and average to zero under the uniform weights. `logstd` is
        the mixture's initial log standard deviation.

        Args:
            teacher: of the diffusers class that this one extends.
            share: take the teacher's own modules for all but the head and `norm_out`, instead of copies.
            generator: makes every draw.
            config: further keys of the head's configuration.
        """
        student = adopt(cls, teacher, {"num_gaussians": num_gaussians, **config}, share)
        weight, bias = teacher.proj_out.weight.detach(), teacher.proj_out.bias
        k, p = num_gaussians, student.config.logweights_channels
        offsets = spread * torch.randn(k, len(weight) // p, generator=generator)
        offsets = (offsets - offsets.mean(dim=0)).repeat_interleave(p, dim=1).to(weight)
        with torch.no_grad():
            student.proj_out_means.weight.copy_(weight.repeat(k, 1))
            student.proj_out_means.bias.copy_((offsets if bias is None else bias + offsets).flatten())
            student.proj_out_logweights.weight.zero_()
            student.proj_out_logweights.bias.zero_()
            if student.config.constant_logstd is None:
                start_logstd_head(student.proj_out_logstds, logstd, generator)
        return student


class PackedDXHead(Network):
    """Mixin before a diffusers transformer in the bases: its `proj_out` is widened to N velocities or coefficients.

    The class's configuration holds `n_grid` (N), `out_channels` (N C p), `in_channels` (C p) and `policy` ("grid" or
    "polynomial"). Published configurations lack `n_grid`; it is out_channels / in_channels.
    """

    replaced = ("norm_out", "proj_out")

    def install_head(self) -> None:
        """To be called at the end of `__init__`."""
        check_policy(self.config.policy)
        keep_precise(self, "proj_out")
        self.register_load_state_dict_pre_hook(widen_lora)

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> DXOutput | tuple[Any, ...]:
        """grid (B, T, N, C p), for the arguments of the base class; a tuple, and more after it, as in a GM student."""
        sample, *more = super().forward(*args, return_dict=False, **kwargs)
        grid = DXOutput(sample.unflatten(-1, (self.config.n_grid, -1)))
        return (grid, *more) if more else grid

    @classmethod
    def from_teacher(cls, teacher: ModelMixin, n_grid: int = 10, *, share: bool = False, **config: Any) -> Self:
        """A student whose policy has the teacher's velocity at every source state: each grid point is its output.

        So is each coefficient of a polynomial. Its velocity at the source is the first one's. A further one adds
        (r_s - r)^n (x_s - sigma v_n) to x_0, where no constant weights make nought of the bracket; at the teacher's
        output it is the estimate of x_0, free of noise. `share` and `config` as in a GM student.
        """
        check_whole("n_grid", n_grid, least=1)
        out_channels = n_grid * len(teacher.proj_out.weight)
        student = adopt(cls, teacher, {"n_grid": n_grid, "out_channels": out_channels, **config}, share)
        with torch.no_grad():
            student.proj_out.weight.copy_(teacher.proj_out.weight.repeat(n_grid, 1))
            if student.proj_out.bias is not None:
                student.proj_out.bias.copy_(teacher.proj_out.bias.repeat(n_grid))
        return student


def widened(in_channels: int, out_channels: int | None, n_grid: int | None) -> tuple[int, int]:
    """(out_channels, n_grid) of a DX head, from whichever of the two a configuration holds.

    `out_channels` is the widened number, as published, or the number of one velocity beside an `n_grid`.
    """
    if n_grid is None:
        n_grid = max((out_channels or in_channels) // in_channels, 1)
    check_whole("n_grid", n_grid, least=1)
    if out_channels in (None, in_channels):
        out_channels = n_grid * in_channels
    if out_channels != n_grid * in_channels:
        raise ValueError(
            f"out_channels: expected n_grid x in_channels = {n_grid} x {in_channels} = {n_grid * in_channels}, "
            f"got {out_channels}"
        )
    return out_channels, n_grid


def keep_precise(network: Any, path: str) -> None:
    """Let a widened output layer have float32 weights on a bfloat16 network, and keep it out of layerwise casting."""
    network.get_submodule(path).register_forward_pre_hook(cast_input)
    patterns = network._skip_layerwise_casting_patterns or ()
    network._skip_layerwise_casting_patterns = [*patterns, f"^{re.escape(path)}"]


def repeated(layer: nn.Linear, n: int) -> nn.Linear:
    """`layer` with its output n times over, one after the other."""
    widened = nn.utils.skip_init(
        nn.Linear,
        layer.in_features,
        n * layer.out_features,
        bias=layer.bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    with torch.no_grad():
        for name, values in layer.named_parameters():
            getattr(widened, name).copy_(values.repeat(n, *[1] * (values.dim() - 1)))
    return widened


def check_policy(policy: str) -> None:
    """ValueError unless `policy` is one that DX knows."""
    if policy not in ("grid", "polynomial"):
        raise ValueError(f"policy: expected 'grid' or 'polynomial', got {policy!r}")


def check_head(config: Any) -> None:
    """ValueError for the configuration of a packed GM head that no weights fit."""
    for name in ("num_gaussians", "logweights_channels", "gm_num_logstd_layers", "logstd_inner_dim"):
        check_whole(name, getattr(config, name), least=1)
    if config.out_channels % config.logweights_channels:
        raise ValueError(
            f"logweights_channels: expected a divisor of out_channels = {config.out_channels}, the sub-pixels of a "
            f"token, got {config.logweights_channels}"
        )


def check_teacher(cls: type[Any], teacher: ModelMixin) -> None:
    """ValueError unless `teacher` is of the diffusers class that `cls` extends, and no student itself."""
    base, given = base_of(cls), type(teacher)
    if not isinstance(teacher, base) or hasattr(given, "from_teacher"):
        raise ValueError(f"teacher: expected a {base.__name__}, which {cls.__name__} extends, got a {given.__name__}")


def adopt(cls: type[Any], teacher: ModelMixin, head: dict[str, Any], share: bool) -> Any:
    """A `cls` with the teacher's configuration, the `head`'s, and the teacher's modules where it does not replace them.

    Other modules are copies, or the teacher's own with `share`; `norm_out` is always a copy. The rest of the head is
    not initialised. Raises ValueError for a teacher of another class than `cls` extends.
    """
    check_teacher(cls, teacher)
    config = config_for(cls, teacher)
    config["out_channels"] = len(teacher.proj_out.weight)
    with torch.device("meta"):
        student = cls(**{**config, **head})
    for name, module in teacher.named_children():
        if name not in cls.replaced:
            setattr(student, name, module if share else copy.deepcopy(module))
    student.norm_out.load_state_dict(copy.deepcopy(teacher.norm_out.state_dict()), assign=True)
    like = teacher.proj_out.weight
    for module in head_modules(student):
        module.to_empty(device=like.device).to(like.dtype)
    return student.train(teacher.training)


def config_for(cls: type[Any], teacher: ModelMixin) -> dict[str, Any]:
    """What `cls` takes of the teacher's configuration."""
    accepted = cls._get_init_keys(cls)
    return {key: value for key, value in teacher.config.items() if key in accepted}


def take_over(
    cls: type[Any], teacher: ModelMixin, config: dict[str, Any], layers: dict[str, nn.Linear], share: bool
) -> Any:
    """A `cls` of this `config` with all that the teacher consists of, and `layers` in place of its own, by path.

    The rest are copies, or the teacher's own with `share`, but for the modules that the layers stand in. Raises
    ValueError for a teacher of another class than `cls` extends.
    """
    check_teacher(cls, teacher)
    with init_empty_weights():
        student = cls(**config)
    for name, module in teacher.named_children():
        around = any(path.partition(".")[0] == name for path in layers)
        setattr(student, name, module if share and not around else copy.deepcopy(module))
    for name, parameter in teacher.named_parameters(recurse=False):
        setattr(student, name, parameter if share else copy.deepcopy(parameter))
    for name, buffer in teacher.named_buffers(recurse=False):
        setattr(student, name, buffer if share else buffer.clone())
    for path, layer in layers.items():
        layer.register_forward_pre_hook(cast_input)
        student.set_submodule(path, layer)
    return student.train(teacher.training)


def init_with_head(base: type[Any], **head: Any) -> Callable[..., None]:
    """An `__init__` of all that the `base`'s takes, and by keyword the settings `head`, given with their defaults.

    The class has `complete_config(config)`, which returns the configuration with what follows from the rest filled in,
    and `install_head()`, which is called last.
    """
    init_base = base.__init__.__wrapped__  # without the decorator, which would register its arguments once more
    parameters = inspect.signature(init_base).parameters
    own = [p.replace(default=head.pop(name)) if name in head else p for name, p in parameters.items()]
    settings = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=head[name]) for name in head]
    signature = inspect.Signature([*own, *settings])

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        config = self.complete_config({name: value for name, value in bound.arguments.items() if name != "self"})
        self.register_to_config(**config)
        init_base(self, **{name: value for name, value in config.items() if name in parameters})
        self.install_head()

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    return register_to_config(__init__)


def base_of(cls: type[Any]) -> type[Any]:
    """The diffusers transformer that a student's class extends."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("diffusers.models.transformers."))


def head_modules(student: nn.Module) -> Iterable[nn.Module]:
    """The modules that make up a student's head, without `norm_out`."""
    return (module for name, module in student.named_children() if name.startswith("proj_out"))
