"""One DeepSpeed ZeRO-3 engine around the whole pi-ID micro-step."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from piflow.training.config import TrainConfig
from piflow.training.errors import ConfigError, TrainingError
from piflow.training.lora import lora_values
from piflow.training.module import PiIDModule, build_module
from piflow.training.teachers import diffusers_class, teacher_source
from piflow.training.watch import RankWatch

LOCK_PATIENCE = 600  # seconds; the build takes about 30
SHARED_MEMORY = Path("/dev/shm")
_watch: list[RankWatch] = []


def prepare_process() -> tuple[int, int]:
    """Choose the accelerator, join the process group, bound the CPU threads; returns (rank, world size).

    Without a GPU this is DeepSpeed's CPU accelerator over gloo. A process started without a launcher is a world of one.
    Raises TrainingError where DeepSpeed's extension for the CPU cannot be built.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29500")
    local_size = int(os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", max((os.cpu_count() or 1) // local_size, 1))))

    warnings.filterwarnings("ignore", category=FutureWarning, message=".*(reduce_scatter|all_gather).*is deprecated")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.utils.logger.setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "WARNING").upper())
    backend = "nccl" if get_accelerator().device_name() == "cuda" else "gloo"
    if torch.cuda.is_available():
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    build_extension()
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    unname_shared_memory(torch.distributed.get_rank())
    from piflow.training.loading import from_rank_0

    _watch.append(RankWatch(torch.distributed.get_rank(), torch.distributed.get_world_size(), from_rank_0))
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def leave_process(exit_code: int) -> NoReturn:
    """End this rank at once, output flushed and, after a success, the process group closed by all ranks together.

    Not through the interpreter's own end: threads of gloo that are still there when C++ tears down abort the process
    now and then ("terminate called without an active exception"), after everything was saved.
    """
    for watch in _watch:
        watch.close(exit_code)
    if exit_code == 0 and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def build_extension() -> None:
    """Compile, the first time, what DeepSpeed's process group wants on the CPU; elsewhere nothing.

    It happens here and not within the group, because torch lets one process build and the others wait without end for
    its lock file, which a process that was killed leaves behind. Raises TrainingError for such a lock, or if the build
    fails.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.comm.torch import build_shm_op
    from torch.utils.cpp_extension import _get_build_directory

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None:
        return
    # Always the ninja beside this Python: two versions rebuild each other's work at every start.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    lock = Path(_get_build_directory(builder.name, verbose=False)) / "lock"
    await_lock(lock)
    if os.environ["LOCAL_RANK"] == "0" and not list(lock.parent.glob("*.so")):
        print(f"compiling DeepSpeed's CPU communication, once, in {lock.parent}", flush=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it announces itself again when the group is joined
            build_shm_op()
    except (RuntimeError, ImportError, OSError) as error:
        raise TrainingError(
            f"DeepSpeed's CPU communication cannot be built in {lock.parent}: {error} "
            "Check that g++ works, remove that folder, and start again."
        ) from error


def unname_shared_memory(rank: int) -> None:
    """Take the name off the 69 MB of shared memory that DeepSpeed's CPU communication has opened on this rank.

    DeepSpeed never does: the memory of every run would stay taken until the machine restarts. Once all ranks have it
    open no name is needed, and it goes with the last of them, however they end. Collective.
    """
    torch.distributed.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"
    with contextlib.suppress(OSError):
        (SHARED_MEMORY / name).unlink()


def await_lock(lock: Path, patience: float = LOCK_PATIENCE) -> None:
    """Wait while another process builds. Raises TrainingError for a lock older than `patience` seconds."""
    told = False
    with contextlib.suppress(FileNotFoundError):
        while True:
            age = time.time() - lock.stat().st_mtime
            if age > patience:
                raise TrainingError(
                    f"{lock} is {age / 60:.0f} minutes old: a process that built DeepSpeed's extension has died. "
                    "Remove this file and start again."
                )
            if age > 5 and not told:
                print(f"waiting for the build that holds {lock}; if none is running, remove this file", flush=True)
                told = True
            time.sleep(0.2)


def micro_steps(config: TrainConfig, world_size: int) -> int:
    """Forward and backward passes in an iteration: one for each batch, of data-free training for each segment of it."""
    return config.accumulation(world_size) * (config.distillation.nfe if config.distillation.data_free else 1)


def deepspeed_config(config: TrainConfig, world_size: int = 1) -> dict[str, Any]:
    """The engine's settings. Clipping is explicit, because DeepSpeed's default changed between versions."""
    return {
        "train_micro_batch_size_per_gpu": config.batch_size_per_rank,
        "gradient_accumulation_steps": micro_steps(config, world_size),
        "gradient_clipping": config.optimizer.gradient_clipping,
        "bf16": {"enabled": config.precision == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,  # of bitsandbytes
        "steps_per_print": 2**31,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": torch.cuda.is_available(),
            "memory_efficient_linear": False,  # it would replace F.linear in the whole process
            "stage3_prefetch_bucket_size": config.zero.prefetch_bucket_size,
            "stage3_max_live_parameters": config.zero.max_live_parameters,
            "stage3_max_reuse_distance": config.zero.max_reuse_distance,
            "stage3_param_persistence_threshold": config.zero.param_persistence_threshold,
            "reduce_bucket_size": config.zero.reduce_bucket_size,
            "log_trace_cache_warnings": True,
        },
    }


def build_partitioned(config: TrainConfig, world_size: int) -> PiIDModule:
    """The root module; a text-to-image base is read into partitions, so that no rank ever holds it whole. Collective.

    Raises ConfigError on every rank alike, before anything large is read, where recipe, teacher and data do not fit.
    """
    if not config.teacher.is_text_to_image or config.teacher.random is not None:
        return build_module(config)
    import deepspeed

    from piflow.training.loading import from_rank_0, load_partitioned, partition

    problem = None
    if torch.distributed.get_rank() == 0:
        try:
            build_module(config, meta=True)
        except ConfigError as error:
            problem = str(error)
    if problem := from_rank_0(problem):
        raise ConfigError(problem)

    precision: Any = {
        "dtype": torch.bfloat16 if config.precision == "bfloat16" else torch.float32,
        "config_dict_or_path": deepspeed_config(config, world_size),
    }
    networks = [
        load_partitioned(diffusers_class(config.teacher), teacher_source(config.teacher), **precision)
        for _ in range(1 if config.student.lora else 2)  # trained whole, the student has a base of its own
    ]
    ends = [p for network in networks for m in (network.norm_out, network.proj_out) for p in m.parameters()]
    with deepspeed.zero.GatheredParameters(ends):
        module = build_module(config, *networks, fill=False)
    return partition(module, partial(lora_values, seed=config.seed), **precision)


def build_engine(module: PiIDModule, config: TrainConfig) -> Any:
    """The DeepSpeed engine of `module`: parameters partitioned over the ranks, AdamW on the student's shards."""
    import deepspeed

    for leaf in module.leaf_modules():
        deepspeed.utils.set_z3_leaf_module(leaf, True)
    settings = deepspeed_config(config, torch.distributed.get_world_size())
    module.to(torch.bfloat16 if config.precision == "bfloat16" else torch.float32)
    deepspeed.zero.Init(module=module, config_dict_or_path=settings)  # partitions before anything is put on a GPU
    engine, _, _, _ = deepspeed.initialize(model=module, optimizer=build_optimizer(module, config), config=settings)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(engine.device)
    return engine


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters: fused, or with moments in 8 bits.

    In a bfloat16 run ZeRO-3 hands it float32 master weights of all of them, output layers included; what the network
    computes with is rounded from these. Raises ConfigError as `check_optimizer` does.
    """
    settings = config.optimizer
    trainable = [p for p in module.parameters() if p.requires_grad]
    common: Any = {"lr": settings.learning_rate, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if settings.kind == "adamw":
        return torch.optim.AdamW(trainable, **common, fused=True)
    check_optimizer(config)
    bitsandbytes: Any = importlib.import_module("bitsandbytes")
    return bitsandbytes.optim.AdamW8bit(trainable, **common)


def check_optimizer(config: TrainConfig, *, needs_gpu: bool = True) -> None:
    """ConfigError where AdamW of 8 bits cannot run: without bitsandbytes, or without a GPU if it `needs_gpu`."""
    if config.optimizer.kind == "adamw":
        return
    otherwise = "or set optimizer.kind=adamw."
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"optimizer.kind=adamw_8bit needs bitsandbytes: `pip install 'piflow[quantization]'`, {otherwise}"
        )
    if needs_gpu and not torch.cuda.is_available():
        raise ConfigError(f"optimizer.kind=adamw_8bit needs a GPU, this machine has none: use one, {otherwise}")


def set_for_iteration(engine: Any, config: TrainConfig, iteration: int) -> None:
    """Learning rate and clipping of the coming step."""
    settings = config.optimizer
    for group in engine.optimizer.param_groups:
        group["lr"] = settings.learning_rate_at(iteration)
    engine.optimizer.clip_grad = settings.gradient_clipping if iteration >= settings.clipping_start_iteration else 0.0
