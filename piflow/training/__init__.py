"""Distillation on DeepSpeed ZeRO-3: configuration, data, engine, average, checkpoints, loop."""
