"""Students on diffusers' class-conditional DiT: the teacher's network with a GMFlow or DX output head."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Generator, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from piflow.json_files import read_json_object
from piflow.models.heads import (
    DXOutput,
    GMOutput,
    check_policy,
    check_teacher,
    in_dtype_of,
    logstd_head,
    start_logstd_head,
    widened,
)
from piflow.noise_schedule import check_whole

TEACHER_CLASSES = ("DiTTransformer2DModel", "DiTTransformer2DModelMod")  # diffusers', and the published name


class _GivenConditioning(nn.Module):
    """Stands where a DiT block keeps its own embedder: the conditioning vector comes in through `timestep`."""

    def forward(self, timestep: Tensor, class_labels: Tensor | None = None, hidden_dtype: object = None) -> Tensor:
        return timestep


class _DiTStudent(DiTTransformer2DModel):
    """What the students share: where the embedder stands, the way to the last tokens, what they take from a teacher."""

    _no_split_modules = ["BasicTransformerBlock"]  # noqa: RUF012 - as diffusers declares it elsewhere; DiT lacks it

    def _move_embedders(self, class_dropout_prob: float, shared_embedding: bool) -> None:
        embedders = [block.norm1.emb for block in self.transformer_blocks]
        for embedder in embedders:
            embedder.class_embedder.dropout_prob = class_dropout_prob
            embedder.time_proj.downscale_freq_shift = 0 if shared_embedding else 1
        self.emb = embedders[0] if shared_embedding else nn.ModuleList(embedders)
        for block in self.transformer_blocks:
            block.norm1.emb = _GivenConditioning()

    def _tokens(
        self, hidden_states: Tensor, timestep: Tensor | float, class_labels: Tensor
    ) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Modulated tokens (B, h w, D), the conditioning vector (B, D) that the output layers see, and (h, w)."""
        timestep = torch.as_tensor(timestep, device=hidden_states.device)
        batch, _, height, width = self._check(hidden_states, timestep, class_labels)
        timestep = timestep.expand(batch)
        tokens = self.pos_embed(hidden_states)
        embedders = list(self.emb) if isinstance(self.emb, nn.ModuleList) else [self.emb]
        conditionings = [embed(timestep, class_labels, hidden_dtype=tokens.dtype) for embed in embedders]
        if len(conditionings) == 1:
            conditionings *= len(self.transformer_blocks)
        for block, conditioning in zip(self.transformer_blocks, conditionings):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, None, None, None, conditioning)
            else:
                tokens = block(tokens, timestep=conditioning)

        conditioning = in_dtype_of(self.proj_out_1, conditionings[0])
        shift, scale = self.proj_out_1(F.silu(conditioning)).chunk(2, dim=1)
        tokens = self.norm_out(tokens) * (1 + scale[:, None]) + shift[:, None]
        return tokens, conditioning, (height // self.patch_size, width // self.patch_size)

    def _unpatchify(self, tokens: Tensor, grid: tuple[int, int], n: int) -> Tensor:
        """(B, h w, p p n C) with channel index (ph, pw, n, C) -> (B, n, C, h p, w p)."""
        (h, w), p = grid, self.patch_size
        pixels = tokens.reshape(-1, h, w, p, p, n, tokens.shape[-1] // (p * p * n)).permute(0, 5, 6, 1, 3, 2, 4)
        return pixels.reshape(*pixels.shape[:3], h * p, w * p)

    def _check(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> torch.Size:
        channels, p, classes = self.config.in_channels, self.patch_size, self.config.num_embeds_ada_norm
        shape = hidden_states.shape
        if len(shape) != 4 or shape[1] != channels or shape[2] % p or shape[3] % p:
            raise ValueError(
                f"hidden_states must be (B, {channels}, H, W) with H, W multiples of {p}, got {tuple(shape)}."
            )
        if timestep.shape not in (shape[:1], ()):
            raise ValueError(f"timestep must be ({shape[0]},) or a scalar, got {tuple(timestep.shape)}.")
        if class_labels.shape != shape[:1]:
            raise ValueError(f"class_labels must be ({shape[0]},), one per sample, got {tuple(class_labels.shape)}.")
        check_class_labels(class_labels, classes)
        return shape

    @classmethod
    def _with_body_of(cls, teacher: DiTTransformer2DModel, head: dict[str, Any]) -> Self:
        """A student with copies of the teacher's weights in all but the output layer, in the teacher's dtype."""
        check_teacher(cls, teacher)
        weights = teacher.state_dict()
        blocks = range(teacher.config.num_layers)
        embedders = [_strip(weights, f"transformer_blocks.{i}.norm1.emb.") for i in blocks]
        original_frequencies = teacher.transformer_blocks[0].norm1.emb.time_proj.downscale_freq_shift == 0
        shared = original_frequencies and all(torch.equal(e[key], embedders[0][key]) for e in embedders for key in e)
        config = {key: value for key, value in teacher.config.items() if not key.startswith("_")}
        student = cls(**{**config, **head, "shared_embedding": shared})
        if teacher.dtype != student.dtype:
            student.to(teacher.dtype)

        body = {key: value for key, value in weights.items() if ".norm1.emb." not in key and "proj_out_2" not in key}
        for i, embedder in enumerate(embedders[:1] if shared else embedders):
            body |= {f"emb.{key}" if shared else f"emb.{i}.{key}": value for key, value in embedder.items()}
        student.load_state_dict(body, strict=False)
        return student


class GMDiTTransformer2DModelV2(_DiTStudent):
    """DiT with a GMFlow head, under the published parameter names and configuration keys.

    All blocks share one embedder `emb`, with the timestep frequencies of the original DiT, 10000^(-i/128). With
    `shared_embedding=False` each block has its own (`emb.0`, `emb.1`, ...), with 10000^(-i/127), as in diffusers' plain
    DiT. The class table has one row more than `num_embeds_ada_norm`: the null class.
    """

    @register_to_config
    def __init__(
        self,
        num_gaussians: int = 16,
        constant_logstd: float | None = None,
        logstd_inner_dim: int = 1024,
        gm_num_logstd_layers: int = 2,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        class_dropout_prob: float = 0.0,
        shared_embedding: bool = True,
    ) -> None:
        check_whole("num_gaussians", num_gaussians, least=1)
        check_whole("gm_num_logstd_layers", gm_num_logstd_layers, least=1)
        check_whole("logstd_inner_dim", logstd_inner_dim, least=1)
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            dropout=dropout,
            norm_num_groups=norm_num_groups,
            attention_bias=attention_bias,
            sample_size=sample_size,
            patch_size=patch_size,
            activation_fn=activation_fn,
            num_embeds_ada_norm=num_embeds_ada_norm,
            upcast_attention=upcast_attention,
            norm_type=norm_type,
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
        )
        self._move_embedders(class_dropout_prob, shared_embedding)
        del self.proj_out_2
        subpixels = patch_size * patch_size
        self.proj_out_means = nn.Linear(self.inner_dim, subpixels * num_gaussians * self.out_channels)
        self.proj_out_logweights = nn.Linear(self.inner_dim, subpixels * num_gaussians)
        if constant_logstd is None:
            self.proj_out_logstds = logstd_head(self.inner_dim, logstd_inner_dim, gm_num_logstd_layers)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor,
    ) -> GMOutput:
        """The mixture predicted at the source state `hidden_states` (B, C, H, W).

        `timestep` (B,) or a scalar is 1000 sigma_src; `class_labels` (B,) int64 lie in [0, num_embeds_ada_norm], the
        last of which is the null class. Raises ValueError for shapes or labels (on the CPU) that do not fit.
        """
        tokens, conditioning, grid = self._tokens(hidden_states, timestep, class_labels)
        k = self.config.num_gaussians
        means = self._unpatchify(self.proj_out_means(tokens), grid, k)
        logweights = self._unpatchify(self.proj_out_logweights(tokens), grid, k).log_softmax(dim=1)
        if self.config.constant_logstd is None:
            logstds = self.proj_out_logstds(conditioning).reshape(-1, 1, 1, 1, 1)
        else:
            logstds = means.new_full((len(means), 1, 1, 1, 1), self.config.constant_logstd)
        return GMOutput(means, logstds, logweights)

    @classmethod
    def from_teacher(
        cls,
        teacher: DiTTransformer2DModel,
        num_gaussians: int = 8,
        *,
        logstd: float = -1.0,
        spread: float = 0.3,
        logstd_inner_dim: int | None = None,
        gm_num_logstd_layers: int = 2,
        constant_logstd: float | None = None,
        generator: Generator | None = None,
    ) -> Self:
        """A student whose policy has the teacher's velocity at every source state.

        Every component starts at the teacher's output plus a constant offset of standard deviation `spread`; the
        offsets break the symmetry and average to zero under the uniform weights. `logstd` is the mixture's initial log
        standard deviation. The weights are copies, in the teacher's dtype; `generator` makes every draw.
        """
        head = {
            "num_gaussians": num_gaussians,
            "constant_logstd": constant_logstd,
            "logstd_inner_dim": logstd_inner_dim or getattr(teacher, "inner_dim", None),
            "gm_num_logstd_layers": gm_num_logstd_layers,
        }
        student: Any = cls._with_body_of(teacher, head)
        k, c, subpixels = num_gaussians, student.out_channels, student.patch_size**2
        weight, bias = teacher.proj_out_2.weight.detach(), teacher.proj_out_2.bias.detach()
        offsets = spread * torch.randn(subpixels, k, c, generator=generator).to(bias)
        offsets = offsets - offsets.mean(dim=1, keepdim=True)
        with torch.no_grad():
            student.proj_out_means.weight.copy_(
                weight.reshape(subpixels, 1, c, -1).expand(-1, k, -1, -1).reshape(subpixels * k * c, -1)
            )
            student.proj_out_means.bias.copy_((bias.reshape(subpixels, 1, c) + offsets).flatten())
            student.proj_out_logweights.weight.zero_()
            student.proj_out_logweights.bias.zero_()
            if constant_logstd is None:
                start_logstd_head(student.proj_out_logstds, logstd, generator)
        return student


class DXDiTTransformer2DModel(_DiTStudent):
    """DiT with a DX head: `proj_out_2` predicts N velocities, or polynomial coefficients, for each channel.

    The embedder stands as in `GMDiTTransformer2DModelV2`. `out_channels` is N x in_channels, as published.
    """

    @register_to_config
    def __init__(
        self,
        n_grid: int | None = None,
        policy: Literal["grid", "polynomial"] = "grid",
        shift: float | None = None,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        class_dropout_prob: float = 0.0,
        shared_embedding: bool = True,
    ) -> None:
        check_policy(policy)
        out_channels, n_grid = widened(in_channels, out_channels, n_grid)
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            dropout=dropout,
            norm_num_groups=norm_num_groups,
            attention_bias=attention_bias,
            sample_size=sample_size,
            patch_size=patch_size,
            activation_fn=activation_fn,
            num_embeds_ada_norm=num_embeds_ada_norm,
            upcast_attention=upcast_attention,
            norm_type=norm_type,
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
        )
        self.register_to_config(out_channels=out_channels, n_grid=n_grid)
        self._move_embedders(class_dropout_prob, shared_embedding)

    def forward(self, hidden_states: Tensor, timestep: Tensor | float, class_labels: Tensor) -> DXOutput:
        """grid (B, N, C, H, W) predicted at the source state; arguments and errors as in a GM student's forward."""
        tokens, _, grid = self._tokens(hidden_states, timestep, class_labels)
        return DXOutput(self._unpatchify(self.proj_out_2(tokens), grid, self.config.n_grid))

    @classmethod
    def from_teacher(cls, teacher: DiTTransformer2DModel, n_grid: int = 10, **config: Any) -> Self:
        """A student whose policy has the teacher's velocity at every source state: each grid point is its output.

        So is each coefficient of a polynomial. `config` holds `policy` and `shift`; the weights are copies.
        """
        check_whole("n_grid", n_grid, least=1)
        student: Any = cls._with_body_of(teacher, {"n_grid": n_grid, "out_channels": None, **config})
        subpixels = student.patch_size**2
        with torch.no_grad():
            for name, values in teacher.proj_out_2.named_parameters():
                repeated = values.reshape(subpixels, 1, -1).expand(-1, n_grid, -1)
                getattr(student.proj_out_2, name).copy_(repeated.reshape(n_grid * len(values), *values.shape[1:]))
        return student


def check_class_labels(class_labels: Tensor, classes: int, null_class: bool = True) -> None:
    """ValueError for labels (B,) that are no integers, or naming the first outside [0, classes).

    The null class `classes` counts as inside with `null_class`. The range is checked neither on a GPU nor in a compiled
    graph nor of fake tensors.
    """
    if class_labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"class_labels must be int64, got {class_labels.dtype}.")
    has_values = class_labels.device.type == "cpu" and not isinstance(class_labels, FakeTensor)
    if has_values and not torch.compiler.is_compiling():
        wrong = class_labels[(class_labels < 0) | (class_labels >= classes + null_class)]
        if wrong.numel():
            takes = f"this network takes 0 to {classes - 1}" if null_class else f"data has 0 to {classes - 1}"
            and_null = f", and {classes} for no class" if null_class else ""
            raise ValueError(f"class label {wrong[0].item()} is out of range: {takes}{and_null}.")


def load_dit_teacher(folder: str | Path) -> DiTTransformer2DModel:
    """A DiT saved with one shared embedder (`emb.*`, as the published ImageNet teachers are) as diffusers' plain DiT.

    The blocks then share the embedder module. A folder in diffusers' own layout loads as well.
    Raises FileNotFoundError, or ValueError for a network of another class and for damaged files.
    """
    folder = Path(folder)
    missing = [name for name in ("config.json", "diffusion_pytorch_model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"no DiT in {folder}: {missing[0]} is missing.")
    check_is_dit(folder)
    try:
        return _load_dit(folder).eval()
    except (SafetensorError, RuntimeError, TypeError, ValueError, KeyError) as error:
        problem = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the DiT in {folder} is damaged or its weights do not fit its config.json: {problem}. Copy it again."
        ) from error


def check_is_dit(folder: str | Path) -> None:
    """ValueError if `folder`/config.json names another class than a DiT, such as a student's."""
    file = Path(folder) / "config.json"
    name = read_json_object(file).get("_class_name", TEACHER_CLASSES[0]) if file.is_file() else TEACHER_CLASSES[0]
    if name not in TEACHER_CLASSES:
        raise ValueError(f"{folder} holds a {name}, not a {TEACHER_CLASSES[0]}.")


def _load_dit(folder: Path) -> DiTTransformer2DModel:
    config = read_json_object(folder / "config.json")
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    config = {k: v for k, v in config.items() if not k.startswith("_") and k != "class_dropout_prob"}
    teacher = DiTTransformer2DModel(**config)
    if "emb.class_embedder.embedding_table.weight" in weights:
        shared: CombinedTimestepLabelEmbeddings = teacher.transformer_blocks[0].norm1.emb
        shared.time_proj.downscale_freq_shift = 0
        for block in teacher.transformer_blocks:
            block.norm1.emb = shared
        embedder = _strip(weights, "emb.")
        shared.load_state_dict(embedder)
        weights = {key: value for key, value in weights.items() if not key.startswith("emb.")}
        for i in range(teacher.config.num_layers):
            weights |= {f"transformer_blocks.{i}.norm1.emb.{key}": value for key, value in embedder.items()}
    teacher.load_state_dict(weights)
    return teacher


def _strip(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
