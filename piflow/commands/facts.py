"""What a file or folder is, told from JSON and the headers of safetensors files.

No weight is read, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from piflow.json_files import read_json_object

CONFIG, PIPELINE, MANIFEST, SHARDS, RUN = "config.json", "model_index.json", "manifest.json", "plan.json", "config.yaml"
RECIPE = "recipe.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LORA = re.compile(r"\.lora_(?P<side>[AB])(\.[^.]+)?\.(weight|bias)$")
OTHER_LORA = re.compile(r"lora[_.](up|down|te|unet|transformer)")
HEAD = ("proj_out", "norm_out")
ARCHITECTURE = ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "in_channels")

Facts = dict[str, Any]


@dataclass(frozen=True)
class Weights:
    """Headers of safetensors files: {tensor: shape}, {tensor: dtype}, and their metadata."""

    shapes: dict[str, list[int]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    bytes: int = 0

    def parameters(self, which: Callable[[str], bool] = lambda name: True) -> int:
        return sum(math.prod(shape) for name, shape in self.shapes.items() if which(name))


def facts_of(path: Path, verify: bool = False) -> Facts:
    """`kind` and whatever else is known of a file or folder.

    Args:
        verify: read a checkpoint's files whole, and compare their hashes.

    Raises:
        FileNotFoundError: there is no such thing.
        ValueError: it is damaged, pickled, or nothing that this library has to do with.
    """
    if path.is_dir():
        return _folder(path, verify)
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path} here (a repository is to be downloaded first).")
    if path.name in (CONFIG, PIPELINE, MANIFEST, RUN) or path.name.endswith(".safetensors.index.json"):
        return _folder(path.parent, verify)
    if path.suffix == ".png":
        from piflow.apps.png import read_settings

        return {"kind": "picture", "path": str(path), "settings": read_settings(path)}
    if path.suffix in PICKLED:
        raise ValueError(
            f"{path} is a pickled file, which can run code when it is read: this command never does. Convert it to "
            "safetensors, or ask for the folder of its checkpoint."
        )
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is nothing that this command knows: give a safetensors file, a picture of `piflow sample`, or the "
            "folder of an adapter, student, checkpoint, training, pipeline or cache."
        )
    config = path.parent / CONFIG
    return _model(path, read_json_object(config) if config.is_file() else {}, _weights([path]))


def _folder(path: Path, verify: bool) -> Facts:
    if (path / PIPELINE).is_file():
        return _pipeline(path)
    if (path / MANIFEST).is_file():
        return _checkpoint(path, verify)
    if (path / RUN).is_file() or any((*path.glob("step_*"), *path.glob("checkpoints/step_*"))):
        return _training(path, verify)
    if (path / CONFIG).is_file():
        config, files = read_json_object(path / CONFIG), _weight_files(path)
        if not files:
            raise ValueError(f"{path} is incomplete: beside {CONFIG} there are no weights (*.safetensors).")
        return _model(path, config, _weights(files))
    if (path / SHARDS).is_file():
        plan = read_json_object(path / "index.json" if (path / "index.json").is_file() else path / SHARDS)
        said: Facts = {key: plan[key] for key in ("source", "model", "shard_size", "count") if key in plan}
        complete = (path / "index.json").is_file()
        return {"kind": "cache", "path": str(path), "contents": plan.get("kind"), **said, "complete": complete}
    if files := sorted(path.glob("*.safetensors")):
        return _model(path, {}, _weights(files))
    markers = (PIPELINE, MANIFEST, RUN, CONFIG, SHARDS)
    below = sorted(file.parent.name for marker in markers for file in path.glob(f"*/{marker}"))
    where = f" Look into its folders: {', '.join(dict.fromkeys(below))}." if below else ""
    raise ValueError(
        f"{path} holds nothing that this command knows: no pipeline ({PIPELINE}), student or adapter ({CONFIG}, "
        f"*.safetensors), checkpoint ({MANIFEST}), training ({RUN}) or cache ({SHARDS}).{where}"
    )


def _model(path: Path, config: Facts, weights: Weights) -> Facts:
    """A student, an adapter, or a network that is neither."""
    name = str(config.get("_class_name", "")).lstrip("_")
    policy = _json_in(weights.metadata, "policy_config", path) or config.get("_policy_config") or {}
    kind = _policy(name, policy, weights)
    facts: Facts = {"kind": "", "path": str(path), "class": name or None}
    lora = sorted(key for key in weights.shapes if LORA.search(key))
    body = [key for key in weights.shapes if not LORA.search(key) and not key.startswith(HEAD)]
    if kind is None:
        foreign_lora = lora or any(OTHER_LORA.search(key) for key in weights.shapes)
        of_nothing = "LoRA without a policy's output layers" if foreign_lora else "network without a policy"
        facts |= {"kind": of_nothing, "pi_flow": False}
    else:
        facts |= {"kind": "adapter" if lora or not body else "student", "policy": kind}
        facts |= _gm(config, weights) if kind == "GMFlow" else _dx(name, config, policy, weights)
        facts["base_model"] = _base_of(name)
        nfe = policy.get("nfe") or _nfe_beside(path) or _nfe_of_segments(policy)
        facts |= {"trained_nfe": nfe, "policy_config": policy or None}
    facts |= {key: config[key] for key in (*ARCHITECTURE, "patch_size", "sample_size") if config.get(key) is not None}
    if lora:
        facts["lora"] = _lora(path, lora, weights)
    if weights.shapes:
        counts: Counter[str] = Counter()
        for key, dtype in weights.dtypes.items():
            counts[dtype] += math.prod(weights.shapes[key])
        parts = {
            "lora": weights.parameters(lambda key: bool(LORA.search(key))),
            "output_layers": weights.parameters(lambda key: key.startswith(HEAD)) if kind else 0,
        }
        facts["parameters"] = {"total": weights.parameters(), **{key: n for key, n in parts.items() if n}}
        facts |= {"dtypes": dict(counts), "bytes": weights.bytes}
    return facts


def _policy(name: str, policy: Facts, weights: Weights) -> str | None:
    """GMFlow or DX, by the class, what the weights' metadata says, or the tensors' names; None for neither."""
    if name.startswith("GM") or any(key.startswith("proj_out_logweights") for key in weights.shapes):
        return "GMFlow"
    asked = str(policy.get("type", "")).removesuffix("Policy")
    return "DX" if name.startswith("DX") or asked == "DX" else asked or None


def _gm(config: Facts, weights: Weights) -> Facts:
    k = config.get("num_gaussians")
    means, logweights = (weights.shapes.get(f"proj_out_{head}.weight") for head in ("means", "logweights"))
    facts: Facts = {"components": k}
    if means and logweights:
        facts["channels"] = means[0] // logweights[0]
        if k is None:  # K for each of p sub-pixels of a token, and only config.json says p
            facts["components_times_subpixels"] = logweights[0]
    if config.get("constant_logstd") is not None:
        facts["constant_logstd"] = config["constant_logstd"]
    return facts


def _dx(name: str, config: Facts, policy: Facts, weights: Weights) -> Facts:
    n = config.get("n_grid")
    last = weights.shapes.get("proj_out.weight") or weights.shapes.get("proj_out_2.weight")
    width = config.get("in_channels", 0) * (config.get("patch_size", 1) ** 2 if "DiT" in name else 1)
    if n is None and last and width and last[0] % width == 0:
        n = last[0] // width
    mode = policy.get("mode") or config.get("policy") or "grid"
    shift = policy.get("shift") or config.get("shift")
    return {"mode": mode, "grid_points": n, "segment_size": policy.get("segment_size"), "shift": shift}


def _base_of(name: str) -> str | None:
    """The diffusers class that a student extends; an export may name that class itself."""
    return re.sub(r"^(GM|DX)", "", name).removesuffix("V2") or None


def _lora(path: Path, keys: list[str], weights: Weights) -> Facts:
    ranks = Counter(weights.shapes[key][0] for key in keys if (match := LORA.search(key)) and match["side"] == "A")
    targets = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", LORA.sub("", key), count=1) for key in keys if ".lora_A" in key)
    said = _json_in(weights.metadata, "lora_adapter_metadata", path)
    alpha = said.get("lora_alpha") or ("in the file" if any(k.endswith(".alpha") for k in weights.shapes) else "rank")
    return {"rank": sorted(ranks), "alpha": alpha, "layers": sum(targets.values()), "targets": dict(targets)}


def _pipeline(path: Path) -> Facts:
    index = read_json_object(path / PIPELINE)
    parts = {key: value[1] for key, value in index.items() if isinstance(value, list) and len(value) == 2 and value[1]}
    facts: Facts = {"kind": "pipeline", "path": str(path), "class": index.get("_class_name"), "parts": parts}
    if (path / "transformer" / CONFIG).is_file():
        facts["transformer"] = facts_of(path / "transformer")
    return facts


def _checkpoint(path: Path, verify: bool) -> Facts:
    manifest = read_json_object(path / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or not isinstance(manifest.get("world_size"), int):
        raise ValueError(f"{path / MANIFEST} is no manifest of a checkpoint, or is damaged.")
    problems = [problem for name, said in files.items() if (problem := _file_problem(path / name, said, verify))]
    if not isinstance(manifest.get("config"), dict):
        problems.append(f"{MANIFEST} lacks the configuration: an earlier version of piflow wrote it")
    facts: Facts = {"kind": "checkpoint", "path": str(path), "iteration": manifest.get("iteration")}
    facts |= {"samples_seen": manifest.get("position"), "loss": loss_of(manifest)}
    facts |= {"processes": manifest["world_size"], **_run(manifest.get("config") or {})}
    facts |= {"bytes": sum(said.get("size", 0) for said in files.values()), "files": len(files)}
    facts |= {"whole": not problems, "problems": problems or None, "checked": "hashes" if verify else "sizes"}
    if not problems:
        ranks = [path / f"rank_{rank}.safetensors" for rank in range(manifest["world_size"])]
        shards = _weights([rank for rank in ranks if rank.is_file()])
        facts["trained_tensors"] = sum(name.startswith("ema.") for name in shards.shapes)
    return facts


def _training(path: Path, verify: bool) -> Facts:
    facts: Facts = {"kind": "training", "path": str(path)}
    if (path / RUN).is_file():
        import yaml

        try:
            config = yaml.safe_load((path / RUN).read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path / RUN} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{path / RUN} must hold `key: value` pairs, got a {type(config).__name__}.")
        facts |= {"iterations": config.get("iterations"), **_run(config)}
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = sorted(step for step in folder.glob("step_*") if (step / MANIFEST).is_file())
    facts["checkpoints"] = [step.name for step in found]
    if found:
        facts["newest_checkpoint"] = _checkpoint(found[-1], verify)
    if (path / "student" / CONFIG).is_file():
        facts["student"] = facts_of(path / "student")
    return facts


def _run(config: Facts) -> Facts:
    """What a training's configuration says of its student."""
    student, distillation = (config.get(key) or {} for key in ("student", "distillation"))
    teacher, lora = config.get("teacher") or {}, student.get("lora") or {}
    if not distillation:
        return {}
    gm = student.get("policy", "gm") == "gm"
    facts: Facts = {"policy": "GMFlow" if gm else "DX"}
    facts |= {"components": student.get("num_gaussians")} if gm else {"grid_points": student.get("n_grid")}
    facts |= {"trained_nfe": distillation.get("nfe"), "teacher": teacher.get("path") or teacher.get("kind")}
    facts |= {"precision": config.get("precision")}
    if lora:
        facts["lora"] = {"rank": [lora.get("rank")], "alpha": lora.get("alpha") or "rank", "targets": lora["targets"]}
    return facts


def _nfe_beside(student: Path) -> int | None:
    """What the training of a student says: the recipe that it is shipped with, or the configuration of its run."""
    folder = student if student.is_dir() else student.parent
    if (folder / RECIPE).is_file():
        return _nfe_in(folder / RECIPE, "config", "distillation", "nfe")
    return _nfe_in(folder.parent / RUN, "distillation", "nfe") if folder.name == "student" else None


def _nfe_in(file: Path, *keys: str) -> int | None:
    """The entry of a YAML or JSON file; None where there is none, or where the file is somebody else's."""
    import yaml

    try:
        found = yaml.safe_load(file.read_text())
        for key in keys:
            found = found[key]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError):
        return None
    return found if isinstance(found, int) else None


def _nfe_of_segments(policy: Facts) -> int | None:
    """What a DX policy's segments make: 1 / segment_size is nfe - 1 and the last one's scale, which is at most 1."""
    size = policy.get("segment_size")
    return math.ceil(1 / size - 1e-3) if isinstance(size, int | float) and 0 < size <= 1 else None


def _file_problem(file: Path, said: Any, verify: bool) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    if file.stat().st_size != said.get("size"):
        return f"{file.name} has {file.stat().st_size} bytes, not {said.get('size')}"
    if verify:
        with file.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != said.get("sha256"):
                return f"{file.name} has another content than was written"
    return None


def loss_of(manifest: Facts) -> float | None:
    """The loss of a checkpoint's last iteration; None where it is not finite, which JSON has no number for."""
    try:
        loss = float.fromhex(manifest["loss"])
    except (KeyError, TypeError, ValueError):
        return None
    return loss if math.isfinite(loss) else None


def _weight_files(folder: Path) -> list[Path]:
    """All safetensors files of a network's folder, those that an index lists included."""
    listed = {
        folder / name
        for index in folder.glob("*.safetensors.index.json")
        for name in (read_json_object(index).get("weight_map") or {}).values()
    }
    if missing := sorted(file.name for file in listed if not file.is_file()):
        raise ValueError(f"{folder} is incomplete: {missing[0]} is missing, which its index lists.")
    files = sorted(listed or folder.glob("*.safetensors"))
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    if not files and pickled:
        raise ValueError(f"{folder} has its weights in {pickled[0]}, a pickled file, which this command never reads.")
    return files


def _weights(files: list[Path]) -> Weights:
    found = Weights(bytes=sum(file.stat().st_size for file in files))
    for path in files:
        try:
            with safe_open(path, "np") as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    tensor = file.get_slice(key)
                    found.shapes[key], found.dtypes[key] = tensor.get_shape(), tensor.get_dtype()
                found.metadata.update(file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is no safetensors file, or damaged or cut short ({error}). Copy or download it again."
            ) from error
    return found


def _json_in(metadata: dict[str, str], key: str, path: Path) -> Facts:
    try:
        content = json.loads(metadata.get(key, "{}"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {key} in the weights' metadata is no JSON object.")
    return content
