"""Student networks: output heads on diffusers transformers. Each imports diffusers when it is first touched.

Beside the names in `__all__`, `GM` or `DX` before the name of any other diffusers transformer is a student of it, such
as `GMSD3Transformer2DModel` (see `piflow.models.generic`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dit import DXDiTTransformer2DModel, GMDiTTransformer2DModelV2, load_dit_teacher
    from .flux import DXFluxTransformer2DModel, GMFluxTransformer2DModel
    from .flux2 import DXFlux2Transformer2DModel, GMFlux2Transformer2DModel
    from .generic import student_class
    from .heads import DXOutput, GMOutput
    from .kandinsky import DXKandinsky6SRTransformer3DModel, DXKandinsky6Transformer3DModel
    from .qwen_image import DXQwenImageTransformer2DModel, GMQwenImageTransformer2DModel

__all__ = [
    "DXDiTTransformer2DModel",
    "DXFlux2Transformer2DModel",
    "DXFluxTransformer2DModel",
    "DXKandinsky6SRTransformer3DModel",
    "DXKandinsky6Transformer3DModel",
    "DXOutput",
    "DXQwenImageTransformer2DModel",
    "GMDiTTransformer2DModelV2",
    "GMFlux2Transformer2DModel",
    "GMFluxTransformer2DModel",
    "GMOutput",
    "GMQwenImageTransformer2DModel",
    "load_dit_teacher",
    "student_class",
]

_MODULE_OF = {
    "DXDiTTransformer2DModel": ".dit",
    "DXFlux2Transformer2DModel": ".flux2",
    "DXFluxTransformer2DModel": ".flux",
    "DXKandinsky6SRTransformer3DModel": ".kandinsky",
    "DXKandinsky6Transformer3DModel": ".kandinsky",
    "DXOutput": ".heads",
    "DXQwenImageTransformer2DModel": ".qwen_image",
    "GMDiTTransformer2DModelV2": ".dit",
    "GMFlux2Transformer2DModel": ".flux2",
    "GMFluxTransformer2DModel": ".flux",
    "GMOutput": ".heads",
    "GMQwenImageTransformer2DModel": ".qwen_image",
    "load_dit_teacher": ".dit",
    "student_class": ".generic",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF and not name.startswith(("GM", "DX")):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_MODULE_OF.get(name, ".generic"), __name__), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "diffusers":
            raise
        raise ImportError(f"{name} needs diffusers: pip install 'piflow[diffusers]'") from error
