"""The typed configuration of a distillation run: YAML, dotted overrides, unknown keys are errors.

config = load_config("configs/digits/nfe1.yaml", ["iterations=100", "optimizer.learning_rate=1e-3"])
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import Field, model_validator
from pydantic import ValidationError as PydanticError

from piflow.training.errors import ConfigError
from piflow.training.sections import (
    CheckpointConfig,
    DataConfig,
    DirectoriesConfig,
    DistillationConfig,
    DynamicShift,
    EMAConfig,
    LoggingConfig,
    LoRAConfig,
    NonNegativeInt,
    OptimizerConfig,
    PositiveInt,
    RandomDataConfig,
    Section,
    StudentConfig,
    TeacherConfig,
    WandbConfig,
    ZeroConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DirectoriesConfig",
    "DistillationConfig",
    "DynamicShift",
    "EMAConfig",
    "LoRAConfig",
    "LoggingConfig",
    "OptimizerConfig",
    "RandomDataConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "WandbConfig",
    "ZeroConfig",
    "load_config",
]


class TrainConfig(Section):
    """One run. Each process reads `batch_size_per_rank` samples at once, and as often in an iteration as `batch_size`,
    the global batch, asks for (None: once).

    An iteration whose loss or gradient is not finite on any rank is skipped on all; after `max_skipped_iterations` in a
    row the run ends at the next one.
    """

    output_dir: Path
    iterations: PositiveInt
    seed: Annotated[NonNegativeInt, Field(lt=2**63)] = 0
    batch_size: PositiveInt | None = None
    batch_size_per_rank: PositiveInt = 32
    precision: Literal["float32", "bfloat16"] = "float32"
    log_every: PositiveInt = 10
    max_skipped_iterations: NonNegativeInt = 10
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    distillation: DistillationConfig = DistillationConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    zero: ZeroConfig = ZeroConfig()
    logging: LoggingConfig = LoggingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    directories: DirectoriesConfig = DirectoriesConfig()

    @model_validator(mode="before")
    @classmethod
    def _rename_checkpoint_every(cls, raw: Any) -> Any:
        """`checkpoint_every`, as older files have it, is `checkpoint.every`."""
        if isinstance(raw, dict) and "checkpoint_every" in raw:
            raw = dict(raw)
            every, section = raw.pop("checkpoint_every"), raw.get("checkpoint") or {}
            if isinstance(section, dict):
                raw["checkpoint"] = {"every": every, **section}
        return raw

    @model_validator(mode="after")
    def _recipe_fits_the_teacher(self) -> Self:
        text, student, distillation = self.teacher.is_text_to_image, self.student, self.distillation
        kind = f"teacher.kind={self.teacher.kind}"
        problems = [
            problem
            for applies, problem in (
                (student.lora and not text, f"student.lora: {kind} has no LoRA; leave it out to train the whole"),
                (
                    student.lora and not student.gradient_checkpointing,
                    "student.gradient_checkpointing must be true with student.lora: the teacher runs in the same "
                    "blocks between forward and backward pass, which would leave all of them gathered",
                ),
                (
                    student.policy == "dx" and distillation.policy_dropout,
                    "distillation.policy_dropout drops mixture components, which student.policy=dx has not; set it "
                    "to 0",
                ),
                (
                    distillation.embedded_guidance is not None and self.teacher.kind not in ("flux", "flux2"),
                    f"distillation.embedded_guidance is for FLUX teachers, {kind} takes guidance_scale",
                ),
                (
                    text and self.data.kind == "digits",
                    f"data.kind=digits has class labels, {kind} needs prompts: set data.kind",
                ),
                (
                    self.batch_size is not None and self.batch_size % self.batch_size_per_rank,
                    f"batch_size={self.batch_size} must be a multiple of batch_size_per_rank="
                    f"{self.batch_size_per_rank}",
                ),
            )
            if applies
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def accumulation(self, world_size: int) -> int:
        """Batches that each of `world_size` processes reads in an iteration.

        Raises ConfigError where the global batch does not divide.
        """
        at_once = self.batch_size_per_rank * world_size
        if self.batch_size is None:
            return 1
        if self.batch_size % at_once:
            raise ConfigError(
                f"batch_size={self.batch_size} does not divide over {world_size} process(es) with batch_size_per_rank="
                f"{self.batch_size_per_rank}: it must be a multiple of {at_once}. The nearest are "
                f"{max(self.batch_size // at_once, 1) * at_once} and {(self.batch_size // at_once + 1) * at_once}."
            )
        return self.batch_size // at_once

    def to_yaml(self) -> str:
        """The resolved configuration; `load_config` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        given = set()
        for key, _ in node.value:
            if key.value in given:
                raise yaml.YAMLError(f"`{key.value}` is given twice in one section, again{key.start_mark}")
            given.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """Read `path`, apply `a.b=c` overrides (values in YAML). Raises ConfigError that names the key and the remedy.

    A file may begin from another: `base: PATH`, relative to itself, whose sections it then changes key by key.
    """
    path = Path(path)
    raw = _read(path)
    for override in overrides:
        _apply_override(raw, override)
    try:
        return TrainConfig.model_validate(raw)
    except PydanticError as error:
        problems = "\n".join(f"  - {_explain(problem)}" for problem in error.errors())
        raise ConfigError(f"{path} cannot be used:\n{problems}") from error


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a file, over those of its base."""
    if not path.is_file():
        raise ConfigError(
            f"There is no configuration file {path} (looked from {Path.cwd()}). Give the path of a YAML file."
        )
    try:
        raw = yaml.load(path.read_text(), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold `key: value` pairs at its top, got a {type(raw).__name__}.")
    if "base" not in raw:
        return raw
    base = path.parent / str(raw.pop("base"))
    if path.resolve() in seen:
        raise ConfigError(f"{path} has itself as its base.")
    return _merged(_read(base, (*seen, path.resolve())), raw)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    whole = dict(base)
    for key, value in over.items():
        below = whole.get(key)
        whole[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return whole


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    keys = name.split(".")
    if not separator or not all(keys):
        raise ConfigError(
            f"The override `{override}` is not of the form key=value, such as optimizer.learning_rate=1e-4."
        )
    section = raw
    for key in keys[:-1]:
        if section.get(key) is None:  # a section that is off, such as `lora: null`
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise ConfigError(f"The override `{override}` goes into `{key}`, which is a value, not a section.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value of the override `{override}` is not valid YAML.") from error
    section[keys[-1]] = value


def _explain(problem: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":  # of a validator, whose message names the keys
        return f"{name}: {problem['ctx']['error']}" if name else str(problem["ctx"]["error"])
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
        annotation = model.model_fields[part].annotation
        choices = [kind for kind in get_args(annotation) if hasattr(kind, "model_fields")]  # of an optional section
        model = choices[0] if choices else annotation
    return list(model.model_fields)
