"""Prompt embeddings and latents computed once, kept in safetensors shards, read back at random."""

from .shards import Index, ShardedDataset, ShardError, ShardWriter, check_shards, read_index

__all__ = ["Index", "ShardError", "ShardWriter", "ShardedDataset", "check_shards", "read_index"]
