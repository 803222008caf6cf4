"""Students on diffusers' Kandinsky 6 transformers, with the widened output that `PiflowScheduler` integrates."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from diffusers import Kandinsky6SRTransformer3DModel, Kandinsky6Transformer3DModel, ModelMixin

from piflow.models.heads import (
    Network,
    check_teacher,
    config_for,
    init_with_head,
    keep_precise,
    repeated,
    take_over,
)
from piflow.noise_schedule import check_whole


class WidenedOutput(Network):
    """Mixin: each output layer predicts `n_grid` velocities, on the last axis of the output in the order (n, C).

    Inputs and outputs are the base class's own, so that diffusers' pipelines run it with `FusedPiflowScheduler` or
    `PiflowScheduler`. An unfolded output, `sample.unflatten(-1, (n_grid, -1))`, is (B, T, H, W, N, C); index 0 is the
    segment's end. The configuration holds `n_grid` and the `shift` of the distillation; those published without have
    n_grid = out_visual_dim / in_visual_dim.
    """

    outputs: ClassVar[dict[str, tuple[str, str]]]
    """Output layers: the keys of the configuration for their numbers of channels, of one velocity and of the output."""

    def complete_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """With `n_grid`; ValueError where an output is not n_grid velocities wide."""
        if config["n_grid"] is None:
            config["n_grid"] = max(config["out_visual_dim"] // config["in_visual_dim"], 1)
        check_whole("n_grid", config["n_grid"], least=1)
        for one, all_of_them in self.outputs.values():
            if config[all_of_them] != config["n_grid"] * config[one]:
                raise ValueError(
                    f"{all_of_them}: expected n_grid x {one} = {config['n_grid']} x {config[one]}, "
                    f"got {config[all_of_them]}"
                )
        return config

    def install_head(self) -> None:
        """To be called at the end of `__init__`."""
        for path in self.outputs:
            keep_precise(self, path)

    @classmethod
    def from_teacher(cls, teacher: ModelMixin, n_grid: int = 10, *, share: bool = False, **config: Any) -> Self:
        """A student whose policy has the teacher's velocity at every source state: each grid point is its output.

        `share` takes the teacher's own modules for all but the output layers, instead of copies. `config` holds further
        keys, such as `shift`. Raises ValueError for a teacher of another class.
        """
        check_whole("n_grid", n_grid, least=1)
        check_teacher(cls, teacher)
        config = {**config_for(cls, teacher), "n_grid": n_grid, **config}
        config |= {all_of_them: n_grid * config[one] for one, all_of_them in cls.outputs.values()}
        layers = {path: repeated(teacher.get_submodule(path), n_grid) for path in cls.outputs}
        return take_over(cls, teacher, config, layers, share)


class DXKandinsky6Transformer3DModel(WidenedOutput, Kandinsky6Transformer3DModel):
    """Kandinsky 6 for video and audio, with `n_grid` velocities for each channel of both."""

    outputs: ClassVar = {
        "out_layer.out_layer": ("in_visual_dim", "out_visual_dim"),
        "audio_out_layer.out_layer": ("in_audio_dim", "out_audio_dim"),
    }
    __init__ = init_with_head(Kandinsky6Transformer3DModel, n_grid=None, shift=None)


class DXKandinsky6SRTransformer3DModel(WidenedOutput, Kandinsky6SRTransformer3DModel):
    """Kandinsky 6 for video super-resolution, with `n_grid` velocities for each channel."""

    outputs: ClassVar = {"out_layer.out_layer": ("in_visual_dim", "out_visual_dim")}
    __init__ = init_with_head(Kandinsky6SRTransformer3DModel, n_grid=None, shift=None)
