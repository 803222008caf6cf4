"""Cached prompts are what the pipeline's own encode_prompt gives; sources are read as they are meant."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from piflow.cli import app
from piflow.data import ShardedDataset, ShardError, ShardWriter
from piflow.data.prompts import (
    FAMILIES,
    RAGGED,
    PromptEncoder,
    plan_prompts,
    read_negative,
    read_prompts,
    write_prompts,
)
from tests.data.bases import SAVE

TEXTS = ["a cat", "two cats on a mat", "", "  rain over \t the sea", "ü", "nine long words " * 5]
PROMPTS = [text.strip() for text in TEXTS if text]
LENGTH = {"qwen_image": 300, "flux": 24, "flux2": 800}  # templates of single letters take most of it


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save(tmp_path_factory.mktemp(family)) for family, save in SAVE.items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def cache(source: Path, base: Path, out: Path, *options: str, code: int = 0) -> str:
    arguments = ["cache-prompts", str(source), "--model", str(base), "--out", str(out), "--batch-size", "2"]
    spoken = diffusers.utils.logging.get_verbosity(), diffusers.utils.logging.is_progress_bar_enabled()
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", *options])
    assert result.exit_code == code, result.output
    assert (diffusers.utils.logging.get_verbosity(), diffusers.utils.logging.is_progress_bar_enabled()) == spoken
    return result.output


def expected(base: Path, family: str, prompts: list[str]) -> list[dict[str, Tensor]]:
    """From the whole pipeline of the base, in the batches of `cache`, with padding cut by the mask that it returns."""
    pipe = getattr(diffusers, FAMILIES[family]).from_pretrained(base, dtype=torch.bfloat16)
    samples = []
    for start in range(0, len(prompts), 2):
        with torch.no_grad():
            embeds, *rest = pipe.encode_prompt(prompt=prompts[start : start + 2], max_sequence_length=LENGTH[family])
        for row, embed in enumerate(embeds):
            mask = rest[0] if family == "qwen_image" else None
            sample = {"prompt_embeds": embed if mask is None else embed[: int(mask[row].sum())]}
            samples.append(sample | ({"pooled": rest[0][row]} if family == "flux" else {}))
    return samples


@pytest.mark.parametrize("family", SAVE)
def test_embeddings_are_those_of_the_pipeline(
    family: str, bases: dict[str, Path], source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cache(source, bases[family], out, "--max-length", str(LENGTH[family]), "--shard-size", "4")
    data, wanted = ShardedDataset(out, "prompts"), expected(bases[family], family, PROMPTS)
    assert data.sources().tolist() == [0, 1, 3, 4, 5]
    for index, sample in enumerate(wanted):
        assert data[index].keys() == sample.keys()
        assert all(torch.equal(data[index][name], sample[name]) for name in sample)
    lengths = {len(data[index]["prompt_embeds"]) for index in range(5)}
    assert (len(lengths) > 1) == (family == "qwen_image")
    different = {data[index]["prompt_embeds"].double().sum().item() for index in range(5)}
    assert len(different) == 5

    negative = " " if family == "qwen_image" else ""
    assert data.index.settings["negative_prompt"] == negative
    (wanted_negative,) = expected(bases[family], family, [negative])
    assert all(torch.equal(read_negative(out)[name], value) for name, value in wanted_negative.items())


def test_two_ranks_give_the_same_dataset(
    bases: dict[str, Path], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, size = bases["qwen_image"], ("--shard-size", "2")
    assert "5 samples in" in cache(source, base, tmp_path / "one", *size)
    said = cache(source, base, tmp_path / "two", *size, "--rank", "0", "--world-size", "2")
    assert "rank 0 of 2 is done (2 shards written, 0 kept)" in said
    with pytest.raises(ShardError, match="incomplete: 2 of 3 shards"):
        ShardedDataset(tmp_path / "two")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "5 samples in" in cache(source, base, tmp_path / "two", *size)
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}


def test_an_interrupted_run_goes_on(bases: dict[str, Path], source: Path, tmp_path: Path) -> None:
    out, base = tmp_path / "out", bases["qwen_image"]
    first = json.loads(cache(source, base, out, "--num-shards", "3", "--json"))
    assert first == {
        "folder": str(out), "shards": 3, "written": 3, "kept": 0, "items": 5, "complete": True, "samples": 5
    }  # fmt: skip
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("shard-*.safetensors")}
    for rest in ("index.json", "shard-00001.json", "shard-00002.safetensors"):  # as if killed in between
        (out / rest).unlink()
    again = json.loads(cache(source, base, out, "--num-shards", "3", "--json"))
    assert (again["written"], again["kept"], again["items"], again["complete"]) == (2, 1, 3, True)
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("shard-*.safetensors")}
    assert {name for name in after if after[name] == before[name]} == {"shard-00000.safetensors"}
    assert {name: content for name, (content, _) in after.items()} == {name: c for name, (c, _) in before.items()}


class Counting:
    """An encoder that keeps what it has been asked for."""

    def __init__(self, encoder: PromptEncoder) -> None:
        self.encoder, self.asked = encoder, list[str]()

    def __call__(self, prompts: list[str]) -> list[dict[str, Tensor]]:
        self.asked += prompts
        return self.encoder(prompts)


def test_only_what_is_missing_is_encoded(bases: dict[str, Path], source: Path, tmp_path: Path) -> None:
    prompts, encoder = read_prompts(str(source)), PromptEncoder(str(bases["qwen_image"]))
    plan = plan_prompts(prompts, encoder, "base", shard_size=3, batch_size=2)
    writer, counting = ShardWriter(tmp_path / "out", plan, ragged=RAGGED), Counting(encoder)
    steps = write_prompts(writer, writer.pending(), prompts, counting)  # type: ignore[arg-type]
    assert [next(steps), next(steps)] == [2, 1]
    steps.close()  # stopped between two batches
    assert counting.asked == PROMPTS[:3]
    again = ShardWriter(tmp_path / "out", plan, ragged=RAGGED)
    assert again.pending() == [1]
    assert list(write_prompts(again, again.pending(), prompts, counting)) == [2]  # type: ignore[arg-type]
    assert counting.asked == PROMPTS
    assert again.finish() is not None


def test_mistakes_are_told(bases: dict[str, Path], source: Path, tmp_path: Path) -> None:
    out, base = tmp_path / "out", bases["qwen_image"]

    def told(*options: str, source: Path = source, base: Path = base, code: int = 1) -> str:
        return cache(source, base, out, *options, code=code)

    assert "not of a FluxPipeline: leave out --pipeline flux" in told("--pipeline", "flux")
    assert "--pipeline must be one of qwen_image, flux, flux2, got 'sd'" in told("--pipeline", "sd")
    assert "--rank must be below --world-size (1), got 2" in told("--rank", "2")
    assert "--device nowhere cannot be used" in told("--device", "nowhere", code=2)
    assert "There is no file" in told(source=tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n  \n")
    assert "holds no prompt: it has 3 lines or rows, and not one with text" in told(source=tmp_path / "empty.txt")
    assert not out.exists()
    cache(source, base, out)
    assert "was begun with other settings: batch_size was 2, is 3." in told("--batch-size", "3")
    source.write_text("another\n")
    assert "items was 5, is 1; source_sha256 was" in told()


def test_an_unknown_base_needs_its_pipeline_named(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    index = json.loads((bases["flux"] / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "OwnPipeline"}))
    for part in bases["flux"].iterdir():
        if part.is_dir():
            (folder / part.name).symlink_to(part)
    with pytest.raises(ValueError, match=r"is the base of a OwnPipeline; prompts can be encoded for .*--pipeline"):
        PromptEncoder(str(folder))
    assert PromptEncoder(str(folder), "flux", max_length=8)(["a"])[0]["prompt_embeds"].shape == (8, 24)


def test_only_text_encoders_are_loaded(bases: dict[str, Path]) -> None:
    encoder = PromptEncoder(str(bases["flux"]))
    loaded = {name for name, part in encoder.pipeline.components.items() if part is not None}
    assert loaded == {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
    assert encoder.max_length == 512
    assert encoder.pipeline.text_encoder.dtype == torch.bfloat16


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    rows: list[Any] = [{"prompt": "a", "text": "b"}, {"prompt": None, "text": "c"}, {"prompt": " d "}]
    path.write_text("\n".join(json.dumps(row) for row in rows[:2]) + "\n\n" + json.dumps(rows[2]))
    prompts = read_prompts(str(path))
    assert (prompts.texts, prompts.places) == (["a", "d"], [0, 3])
    with pytest.raises(
        ValueError, match=r"captions.jsonl, line 4: there is no key 'text' but \['prompt'\]: name one wi"
    ):
        read_prompts(str(path), "text")
    for bad, message in (("{", "line 2: not JSON"), ("[1]", "line 2: expected an object"), ('{"prompt": 3}', "got 3")):
        path.write_text(json.dumps(rows[0]) + "\n" + bad)
        with pytest.raises(ValueError, match=message):
            read_prompts(str(path))
    path.write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match="is not UTF-8 text: invalid start byte at byte 0"):
        read_prompts(str(path))


@pytest.mark.parametrize(
    ("content", "texts", "places"),
    [
        (b"\xef\xbb\xbfa cat\r\n two \r\n\r\nlast", ["a cat", "two", "last"], [0, 1, 3]),  # of Windows
        (b"one\x0btwo\nfi\xe2\x80\xa8ve\xc2\x85six\n", ["one\x0btwo", "fi\u2028ve\x85six"], [0, 1]),
        (b"\xf0\x9f\x90\x88\xe2\x80\x8d\xe2\xac\x9b\n\x00nul\n" + b"word " * 50000, None, [0, 1, 2]),
    ],
)  # fmt: skip
def test_lines_end_where_an_editor_ends_them(
    tmp_path: Path, content: bytes, texts: list[str] | None, places: list[int]
) -> None:
    path = tmp_path / "odd.txt"
    path.write_bytes(content)
    prompts = read_prompts(str(path))
    assert prompts.places == places
    assert prompts.texts == (texts or ["\U0001f408\u200d\u2b1b", "\x00nul", ("word " * 50000).strip()])


@pytest.mark.parametrize("family", SAVE)
def test_odd_and_very_long_prompts_are_encoded(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "odd.txt"
    source.write_text(
        "word " * 5000 + "\n\U0001f408\u200d\u2b1b \u202eleft\n\x00\n<|endoftext|> {}%s\n", encoding="utf-8"
    )
    cache(source, bases[family], tmp_path / "out", "--max-length", str(LENGTH[family]))
    data = ShardedDataset(tmp_path / "out", "prompts")
    assert len(data) == 4
    assert all(data[i]["prompt_embeds"].isfinite().all() for i in range(4))
    assert len(data[0]["prompt_embeds"]) <= LENGTH[family]


def test_half_a_character_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    """JSON lets it pass, tokenizers do not."""
    source = tmp_path / "half.jsonl"
    source.write_text('{"prompt": "a cat"}\n{"prompt": "bad \\ud83d end"}\n')
    said = cache(source, bases["qwen_image"], tmp_path / "out", code=1)
    assert "half.jsonl, line 2: 'prompt' is no Unicode text, it has half a character at 4." in said
    assert not (tmp_path / "out").exists()


def test_the_hash_follows_texts_and_places(tmp_path: Path) -> None:
    hashes = set()
    for number, text in enumerate(["a\nb", "a\n\nb", "a\nc", "ab"]):
        path = tmp_path / f"{number}.txt"
        path.write_text(text)
        hashes.add(read_prompts(str(path)).sha256)
    assert len(hashes) == 4


def test_datasets_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as Python marks what cannot be imported
    with pytest.raises(
        ModuleNotFoundError, match=r"owner/name is read with the `datasets` package.*pip install 'piflow.data"
    ):
        read_prompts("owner/name")


def test_hugging_face_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables, a folder of them, and what `save_to_disk` wrote, with splits and without: read by the real package."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"caption": ["a cat", "", 'two, "dogs"\nat dusk'], "n": [1, 2, 3]})
    (tmp_path / "folder").mkdir()
    rows.to_csv(tmp_path / "rows.csv")
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.to_parquet(tmp_path / "folder" / "train-0.parquet")
    rows.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "splits")
    for name in ("rows.csv", "rows.parquet", "folder", "plain", "splits"):
        prompts = read_prompts(str(tmp_path / name), "caption", "train")
        assert prompts.texts == ["a cat", 'two, "dogs"\nat dusk'], name
        assert prompts.places == [0, 2]
    assert read_prompts(str(tmp_path / "splits"), "caption", "test").texts == ["a cat"]
    with pytest.raises(ValueError, match=r"no split 'validation' but \['test', 'train'\]"):
        read_prompts(str(tmp_path / "splits"), "caption", "validation")
    with pytest.raises(ValueError, match=r"no column 'prompt' but \['caption', 'n'\]: name one with --key"):
        read_prompts(str(tmp_path / "plain"), "prompt", "train")
