"""Student networks: output heads on diffusers transformers."""

from piflow.models.dit import GMDiTTransformer2DModelV2, GMOutput, load_dit_teacher

__all__ = ["GMDiTTransformer2DModelV2", "GMOutput", "load_dit_teacher"]
