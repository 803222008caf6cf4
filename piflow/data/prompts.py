"""Prompts through the text encoder of a diffusers base, into shards: `piflow cache-prompts`.

Embeddings are those of the pipeline's own `encode_prompt`, bit for bit, in the batches in which the source is read.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from piflow.data.shards import Plan, Sample, ShardError, ShardWriter, write_whole

NEGATIVE = "negative.safetensors"
RAGGED = ("prompt_embeds",)
TABLES = {".parquet": "parquet", ".csv": "csv"}
"""Files that the `datasets` package reads."""
FAMILIES = {"qwen_image": "QwenImagePipeline", "flux": "FluxPipeline", "flux2": "Flux2Pipeline"}


@dataclass(frozen=True)
class Prompts:
    """Texts and the place (line or row, from 0) of each in its source."""

    texts: list[str]
    places: list[int]

    @property
    def sha256(self) -> str:
        """Changes where a text or its place does."""
        return hashlib.sha256(json.dumps([self.texts, self.places]).encode()).hexdigest()


def read_prompts(source: str, key: str = "prompt", split: str = "train") -> Prompts:
    """The prompts of a text file (one a line), a JSONL, CSV or Parquet file or a Hugging Face dataset (`key` of each).

    Empty ones are left out. Raises FileNotFoundError, ModuleNotFoundError where a needed package is missing, or
    ValueError that names the line or row at fault.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_file() and suffix not in TABLES:
        lines = _lines(path)
        texts = list(_of_json(path, lines, key)) if suffix in (".jsonl", ".json", ".ndjson") else lines
    elif suffix in (".txt", ".jsonl", ".json", ".ndjson", *TABLES) and not path.exists():
        raise FileNotFoundError(f"There is no file {source} (looked from {Path.cwd()}).")
    else:
        texts = _of_dataset(source, key, split)
    stripped = [text.strip() for text in texts]
    places = [place for place, text in enumerate(stripped) if text]
    if not places:
        raise ValueError(f"{source} holds no prompt: it has {len(texts)} lines or rows, and not one with text.")
    return Prompts([stripped[place] for place in places], places)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error


def _of_json(path: Path, lines: list[str], key: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            yield ""
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}). One object a line is expected.") from error
        yield _text(row, key, f"{path}, line {number}")


def _of_dataset(source: str, key: str, split: str) -> list[str]:
    try:
        datasets = import_module("datasets")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{source} is read with the `datasets` package, which is not installed: pip install 'piflow[data]'. "
            "A text file (one prompt a line) or a JSONL file needs none.",
            name=error.name,
        ) from error
    if table := TABLES.get(Path(source).suffix.lower()):
        rows = datasets.load_dataset(table, data_files=source, split="train")
    elif (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
        rows = datasets.load_from_disk(source)  # as `save_to_disk` wrote it, with or without splits
        if isinstance(rows, dict):
            if split not in rows:
                raise ValueError(f"{source} has no split {split!r} but {sorted(rows)}: name one with --split.")
            rows = rows[split]
    else:
        rows = datasets.load_dataset(source, split=split)
    if key not in rows.column_names:
        raise ValueError(f"{source} has no column {key!r} but {rows.column_names}: name one with --key.")
    return [_text({key: text}, key, f"{source}, row {row}") for row, text in enumerate(rows[key])]


def _text(row: Any, key: str, where: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with the key {key!r}, got {type(row).__name__}.")
    if key not in row:
        raise ValueError(f"{where}: there is no key {key!r} but {sorted(row)}: name one with --key.")
    text = row[key]
    if not isinstance(text, str | None):
        raise ValueError(f"{where}: {key!r} must be text, got {text!r}.")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:  # \ud800 and the like, which JSON lets pass and tokenizers do not
        raise ValueError(f"{where}: {key!r} is no Unicode text, it has half a character at {error.start}.") from error
    return text or ""


class PromptEncoder:
    """The text encoders and tokenizers of a diffusers pipeline, and nothing else of it.

    model: folder or repository of a base. family: one of FAMILIES, by default what `model` says it is.
    max_length: tokens, by default the pipeline's own. Raises ValueError for a base of another family.
    """

    def __init__(
        self,
        model: str,
        family: str | None = None,
        *,
        max_length: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
    ) -> None:
        import diffusers

        self.family = _family_of(model, family)
        cls = getattr(diffusers, FAMILIES[self.family])
        absent: dict[str, Any] = {"transformer": None, "vae": None, "scheduler": None}
        self.pipeline = cls.from_pretrained(model, dtype=dtype, **absent).to(device)
        self.device = torch.device(device)
        self.max_length = max_length or inspect.signature(cls.__call__).parameters["max_sequence_length"].default

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> list[Sample]:
        """One sample for each prompt: prompt_embeds (L, D) without padding, and for FLUX.1 pooled (P,); on the CPU."""
        encode = self.pipeline.encode_prompt
        embeds, *rest = encode(prompt=prompts, device=self.device, max_sequence_length=self.max_length)
        samples = [{"prompt_embeds": embed.cpu()} for embed in embeds]
        if self.family == "qwen_image" and rest[0] is not None:  # the mask; None says that nothing is padded
            for sample, mask in zip(samples, rest[0].bool().cpu()):
                sample["prompt_embeds"] = sample["prompt_embeds"][mask]
        if self.family == "flux":
            for sample, pooled in zip(samples, rest[0].cpu()):
                sample["pooled"] = pooled
        return samples


def _family_of(model: str, asked: str | None) -> str:
    from diffusers import DiffusionPipeline

    if asked is not None and asked not in FAMILIES:
        raise ValueError(f"--pipeline must be one of {', '.join(FAMILIES)}, got {asked!r}.")
    name = DiffusionPipeline.load_config(model).get("_class_name", "")
    found = next((family for family, cls in FAMILIES.items() if name in (cls, f"Pi{cls}")), None)
    if asked and found and asked != found:
        raise ValueError(f"{model} is the base of a {name}, not of a {FAMILIES[asked]}: leave out --pipeline {asked}.")
    if family := found or asked:
        return family
    raise ValueError(
        f"{model} is the base of a {name or 'pipeline without a name'}; prompts can be encoded for "
        f"{', '.join(FAMILIES.values())}. Name the one that it fits with --pipeline ({', '.join(FAMILIES)})."
    )


def plan_prompts(
    prompts: Prompts, encoder: PromptEncoder, model: str, shard_size: int, batch_size: int, **more: Any
) -> Plan:
    """What the shards will hold; `more`: further settings that change the embeddings."""
    settings = {
        "model": model,
        "pipeline": encoder.family,
        "text_encoder": type(encoder.pipeline.text_encoder).__name__,
        "max_length": encoder.max_length,
        "batch_size": batch_size,
        "source_sha256": prompts.sha256,
        **more,
    }
    return Plan(kind="prompts", items=len(prompts.texts), shard_size=shard_size, settings=settings)


def write_prompts(
    writer: ShardWriter, pending: Iterable[int], prompts: Prompts, encoder: PromptEncoder
) -> Iterator[int]:
    """Write the `pending` shards; yields the number of prompts done, batch by batch."""
    batch_size = writer.plan.settings["batch_size"]
    for number in pending:
        samples: list[tuple[int, Sample]] = []
        items = writer.items(number)
        for start in range(items.start, items.stop, batch_size):
            batch = slice(start, min(start + batch_size, items.stop))
            encoded = encoder(prompts.texts[batch])
            samples += zip(prompts.places[batch], encoded)
            if batch.stop < items.stop:
                yield len(encoded)
        writer.write(number, samples)
        yield len(encoded)


def write_negative(folder: Path, encoder: PromptEncoder, prompt: str) -> None:
    """Write the embedding of the unconditional branch of guidance, if it is not there."""
    path = folder / NEGATIVE
    if path.is_file():
        return
    write_whole(path, save({name: value.contiguous() for name, value in encoder([prompt])[0].items()}))


def read_negative(folder: str | Path) -> Sample:
    """prompt_embeds (L, D), and pooled (P,) for FLUX.1, of the negative prompt with which a folder was written."""
    path = Path(folder) / NEGATIVE
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ShardError(
            f"{path} cannot be read: {error}. Delete it and run `piflow cache-prompts` with the same arguments again."
        ) from error
