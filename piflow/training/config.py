"""The typed configuration of a distillation run: YAML, dotted overrides, unknown keys are errors.

config = load_config("configs/digits/nfe1.yaml", ["iterations=100", "optimizer.learning_rate=1e-3"])
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat
from pydantic import ValidationError as PydanticError

from piflow.training.errors import ConfigError

PositiveInt = Annotated[int, Field(strict=True, gt=0)]  # strict: true is not 1
NonNegativeInt = Annotated[int, Field(strict=True, ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TeacherConfig(_Section):
    """`digits`: the teacher of piflow.digits. `dit`: a folder with a DiT in diffusers' or the published layout."""

    kind: Literal["digits", "dit"] = "digits"
    path: Path | None = None


class StudentConfig(_Section):
    """The GM head put on the teacher's network; see GMDiTTransformer2DModelV2.from_teacher."""

    num_gaussians: PositiveInt = 8
    logstd: float = -1.0
    spread: NonNegativeFloat = 0.3
    gradient_checkpointing: bool = False


class DistillationConfig(_Section):
    """pi-ID (arXiv 2510.14974, section 5). The teacher's share of the mixed trajectory starts at `teacher_ratio` and
    falls linearly to 0 over `teacher_ratio_decay` iterations (0: it stays).
    """

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
    shift: PositiveFloat = 1.0


class DataConfig(_Section):
    """`workers` processes read ahead on each rank; 0 reads in the training process."""

    kind: Literal["digits"] = "digits"
    workers: NonNegativeInt = 0


class OptimizerConfig(_Section):
    """AdamW with linear warm-up. `gradient_clipping` is the largest global gradient norm."""

    learning_rate: PositiveFloat = 1e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.0
    warmup_iterations: NonNegativeInt = 0
    gradient_clipping: PositiveFloat = 1.0

    def learning_rate_at(self, iteration: int) -> float:
        """Linear from one `warmup_iterations`-th at iteration 0 to the full rate."""
        return self.learning_rate * min((iteration + 1) / max(self.warmup_iterations, 1), 1.0)


class EMAConfig(_Section):
    """Karras momentum (1 - 1/t)^(gamma+1); before `start_iteration` the average is the student itself."""

    gamma: NonNegativeFloat = 7.0
    start_iteration: NonNegativeInt = 0


class ZeroConfig(_Section):
    """DeepSpeed ZeRO-3, in numbers of parameters. A large `max_reuse_distance` keeps what a step uses again."""

    prefetch_bucket_size: NonNegativeInt = 350_000_000
    max_live_parameters: NonNegativeInt = 1_000_000_000
    max_reuse_distance: NonNegativeInt = 0
    param_persistence_threshold: NonNegativeInt = 0


class TrainConfig(_Section):
    """One run. The global batch is `batch_size_per_rank` times the number of processes."""

    output_dir: Path
    iterations: PositiveInt
    seed: Annotated[NonNegativeInt, Field(lt=2**63)] = 0
    batch_size_per_rank: PositiveInt = 32
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: PositiveInt = 200
    log_every: PositiveInt = 10
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    distillation: DistillationConfig = DistillationConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    zero: ZeroConfig = ZeroConfig()

    def to_yaml(self) -> str:
        """The resolved configuration; `load_config` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """Read `path`, apply `a.b=c` overrides (values in YAML). Raises ConfigError that names the key and the remedy."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"There is no configuration file {path} (looked from {Path.cwd()}). Give the path of a YAML file."
        )
    try:
        raw = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold `key: value` pairs at its top, got a {type(raw).__name__}.")
    for override in overrides:
        _apply_override(raw, override)
    try:
        return TrainConfig.model_validate(raw)
    except PydanticError as error:
        problems = "\n".join(f"  - {_explain(problem)}" for problem in error.errors())
        raise ConfigError(f"{path} cannot be used:\n{problems}") from error


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    keys = name.split(".")
    if not separator or not all(keys):
        raise ConfigError(
            f"The override `{override}` is not of the form key=value, such as optimizer.learning_rate=1e-4."
        )
    section = raw
    for key in keys[:-1]:
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise ConfigError(f"The override `{override}` goes into `{key}`, which is a value, not a section.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value of the override `{override}` is not valid YAML.") from error
    section[keys[-1]] = value


def _explain(problem: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        given = "" if problem["type"] == "missing" else f" (got {problem['input']!r})"
        return f"{name}: {problem['msg']}{given}"
    known = _fields_at(problem["loc"][:-1])
    nearest = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean `{nearest[0]}`?" if nearest else f"known keys here: {', '.join(known)}."
    return f"unknown key `{name}`: {hint}"


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    model: Any = TrainConfig
    for part in location:
        model = model.model_fields[part].annotation
    return list(model.model_fields)
