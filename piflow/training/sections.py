"""The sections of a run's configuration, as pydantic models: what each key means, and what does not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, model_validator

from piflow.noise_schedule import segment_sizes

PositiveInt = Annotated[int, Field(strict=True, gt=0)]  # strict: true is not 1
NonNegativeInt = Annotated[int, Field(strict=True, ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Unknown keys are errors, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TeacherConfig(Section):
    """`digits`: the teacher of piflow.digits. `dit`: a folder with a DiT in diffusers' or the published layout.
    `qwen_image`, `flux`, `flux2`: the transformer folder of a text-to-image model as diffusers saves it.

    `random`: a network of this architecture (what its class takes, beside its defaults) with random weights, for tests
    and measurements, in place of `path`.
    """

    kind: Literal["digits", "dit", "qwen_image", "flux", "flux2"] = "digits"
    path: Path | None = None
    random: dict[str, Any] | None = None

    @property
    def is_text_to_image(self) -> bool:
        """Whether its condition is a prompt, and not a class label."""
        return self.kind in ("qwen_image", "flux", "flux2")

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if self.random is not None and (self.path is not None or self.kind == "digits"):
            other = "teacher.kind=digits brings its own weights" if self.path is None else "teacher.path is given too"
            raise ValueError(f"random weights are wanted, but {other}; leave one of them out")
        return self


class LoRAConfig(Section):
    """Low-rank updates of the linear layers whose dotted path ends with one of `targets`.

    `alpha` None: as much as the rank, which is the published adapters' convention. `dropout` acts on what goes into the
    update.
    """

    rank: PositiveInt
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    alpha: PositiveFloat | None = None
    dropout: Fraction = 0.0


class StudentConfig(Section):
    """The head put on the teacher's network, and what is trained beside it: all (`lora` None), or low-rank updates.

    `policy: gm` reads num_gaussians, constant_logstd, logstd and spread, `policy: dx` n_grid and dx_mode: see the
    `from_teacher` of the students in piflow.models. `gradient_checkpointing` recomputes every block in the backward
    pass.
    """

    policy: Literal["gm", "dx"] = "gm"
    num_gaussians: PositiveInt = 8
    constant_logstd: float | None = None
    logstd: float = -1.0
    spread: NonNegativeFloat = 0.3
    n_grid: PositiveInt = 10
    dx_mode: Literal["grid", "polynomial"] = "grid"
    lora: LoRAConfig | None = None
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _no_key_of_the_other_head(self) -> Self:
        other = {
            "gm": ("n_grid", "dx_mode"),
            "dx": ("num_gaussians", "constant_logstd", "logstd", "spread"),
        }[self.policy]
        fields = type(self).model_fields
        if wrong := [name for name in other if getattr(self, name) != fields[name].default]:
            keys = ", ".join(f"student.{name}" for name in wrong)
            head = "gm" if self.policy == "dx" else "dx"
            raise ValueError(f"student.policy={self.policy} has no {keys}: of a {head} head only; leave it out")
        return self


class DynamicShift(Section):
    """A shift that grows with the number of image tokens; see piflow.noise_schedule.NoiseSchedule."""

    base_seq_len: PositiveInt = 256
    max_seq_len: PositiveInt = 4096
    base_logshift: float = 0.5
    max_logshift: float = 1.15
    kind: Literal["exp", "sqrt"] = "exp"

    @model_validator(mode="after")
    def _lengths_grow(self) -> Self:
        if self.base_seq_len >= self.max_seq_len:
            raise ValueError(f"base_seq_len {self.base_seq_len} must be below max_seq_len {self.max_seq_len}")
        return self


class DistillationConfig(Section):
    """pi-ID (arXiv 2510.14974, section 5). The teacher's share of the mixed trajectory starts at `teacher_ratio` and
    falls linearly to 0 over `teacher_ratio_decay` iterations (0: it stays).

    data_free: all `nfe` segments in turn from pure noise, each from where the student's rollout ended; otherwise one
    random segment of noised data. latent_shape (C, H, W): of that noise, where the data holds prompts or labels alone.
    guidance_scale: classifier-free guidance of the teacher, at noise levels within `guidance_interval`, less the part
    `guidance_orthogonal` (0 to 1) of it that is parallel to the conditional x_0. embedded_guidance: what a teacher that
    was distilled with guidance (FLUX) takes as input; the student takes the same. `shift` is not read with a
    `dynamic_shift`.
    """

    data_free: bool = False
    latent_shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    nfe: PositiveInt = 1
    final_step_size_scale: PositiveFloat = 1.0
    total_substeps: PositiveInt = 128
    num_intermediate_states: PositiveInt = 2
    window_substeps: NonNegativeInt = 0
    policy_dropout: Fraction = 0.0
    loss_scale: PositiveFloat = 1.0
    teacher_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    teacher_ratio_decay: NonNegativeInt = 0
    guidance_scale: NonNegativeFloat = 1.0
    guidance_interval: tuple[NonNegativeFloat, NonNegativeFloat] | None = None
    guidance_orthogonal: Annotated[float, Field(ge=0, le=1)] = 0.0
    embedded_guidance: NonNegativeFloat | None = None
    shift: PositiveFloat = 1.0
    dynamic_shift: DynamicShift | None = None

    @model_validator(mode="after")
    def _segments_hold_substeps(self) -> Self:
        sizes = segment_sizes(self.nfe, self.final_step_size_scale)
        substeps = round(min(sizes) * self.total_substeps)
        if substeps < 1:
            raise ValueError(
                f"nfe={self.nfe} does not fit total_substeps={self.total_substeps}: the shortest of its segments is "
                f"{min(sizes):.3g} of the time, less than one substep. Take more substeps or fewer nfe"
            )
        if self.window_substeps > substeps:
            raise ValueError(
                f"window_substeps={self.window_substeps} does not fit nfe={self.nfe}: the shortest of its segments has "
                f"{substeps} of the {self.total_substeps} substeps"
            )
        return self

    @model_validator(mode="after")
    def _guidance_is_ordered(self) -> Self:
        if self.guidance_interval is not None and self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(f"guidance_interval must be (lowest, highest) noise level, got {self.guidance_interval}")
        return self


class RandomDataConfig(Section):
    """Shapes of made-up samples; what has none is left out. Tokens of a prompt: between one and `prompt_length`."""

    size: PositiveInt = 1024
    latents: tuple[PositiveInt, ...] | None = None
    num_classes: PositiveInt | None = None
    prompt_length: PositiveInt = 16
    prompt_width: PositiveInt | None = None
    pooled_width: PositiveInt | None = None


class DataConfig(Section):
    """`latents` and `prompts`: a `path` that `piflow cache-latents` or `piflow cache-prompts` wrote; latents with the
    `prompts` of the same source are captioned images. `random`: for tiny recipes.

    A damaged shard ends the run, or is left out with `on_corrupt: skip`; `verify: hash` reads every byte to find out,
    `size` compares sizes. `workers` processes read ahead on each rank; 0 reads in the training process.
    """

    kind: Literal["digits", "latents", "prompts", "random"] = "digits"
    path: Path | None = None
    prompts: Path | None = None
    on_corrupt: Literal["fatal", "skip"] = "fatal"
    verify: Literal["size", "hash"] = "size"
    workers: NonNegativeInt = 0
    random: RandomDataConfig = RandomDataConfig()


class OptimizerConfig(Section):
    """AdamW with linear warm-up; `adamw_8bit` keeps its moments in 8 bits (bitsandbytes, on GPUs).

    `gradient_clipping` is the largest global gradient norm, from iteration `clipping_start_iteration` on.
    """

    kind: Literal["adamw", "adamw_8bit"] = "adamw"
    learning_rate: PositiveFloat = 1e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.0
    warmup_iterations: NonNegativeInt = 0
    gradient_clipping: PositiveFloat = 1.0
    clipping_start_iteration: NonNegativeInt = 0

    def learning_rate_at(self, iteration: int) -> float:
        """Linear from one `warmup_iterations`-th at iteration 0 to the full rate."""
        return self.learning_rate * min((iteration + 1) / max(self.warmup_iterations, 1), 1.0)


class EMAConfig(Section):
    """Karras momentum (1 - 1/t)^(gamma+1); before `start_iteration` the average is the student itself."""

    gamma: NonNegativeFloat = 7.0
    start_iteration: NonNegativeInt = 0


class ZeroConfig(Section):
    """DeepSpeed ZeRO-3, in numbers of parameters. A large `max_reuse_distance` keeps what a step uses again."""

    prefetch_bucket_size: NonNegativeInt = 350_000_000
    max_live_parameters: NonNegativeInt = 1_000_000_000
    max_reuse_distance: NonNegativeInt = 0
    param_persistence_threshold: NonNegativeInt = 0
    reduce_bucket_size: PositiveInt = 500_000_000


class WandbConfig(Section):
    """A project of Weights & Biases. `offline` keeps the run in the output folder, for `wandb sync`."""

    project: Annotated[str, Field(min_length=1)]
    entity: str | None = None
    name: str | None = None
    mode: Literal["online", "offline"] = "online"


class LoggingConfig(Section):
    """In iterations; 0 is never.

    samples_every: how often `num_samples` pictures of the averaged student are drawn, always of the same noise and
    conditions; `vae` (a folder) decodes them. evaluate_every: how often `hooks` are called, "package.module:function"
    each, see piflow.training.evaluation.
    """

    wandb: WandbConfig | None = None
    samples_every: NonNegativeInt = 0
    num_samples: PositiveInt = 16
    vae: Path | None = None
    evaluate_every: NonNegativeInt = 0
    hooks: tuple[str, ...] = ()


class CheckpointConfig(Section):
    """A checkpoint `every` so many iterations. The newest `keep` stay (null: all), besides the one resumed from, the
    last that is known to be good, and for ever those of the multiples of `keep_every`.
    """

    every: PositiveInt = 200
    keep: PositiveInt | None = None
    keep_every: PositiveInt | None = None


class DirectoriesConfig(Section):
    """Where to put what: a local folder, or a URL of fsspec such as s3://bucket/run; null: below `output_dir`.

    For a URL everything is written below `output_dir` too, and copied when it is whole.
    """

    checkpoints: str | None = None
    logs: str | None = None
    pictures: str | None = None
