"""ComfyUI's nodes without ComfyUI: shims stand in for the few functions of it that they call."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from piflow.apps.comfyui import Loaded, PiFlowLoadAdapter, PiFlowLoadBase, PiFlowSample, pictures
from piflow.apps.latents import QWEN_IMAGE_GUIDANCE
from piflow.apps.web.models import FAMILIES
from piflow.models.export import export_adapter
from tests.apps.tiny_models import save_tiny
from tests.pipelines.tiny import flux_base, picture, student_of

FOLDER = Path(__file__).parents[2] / "comfyui"
SMALL: dict[str, Any] = {"prompt": "a cat", "width": 16, "height": 12, "substeps": 32, "temperature": -1.0}
CALL: dict[str, Any] = {"prompt": "a cat", "width": 16, "height": 12, "total_substeps": 32, "output_type": "pt"}


class Interrupted(Exception):
    """As ComfyUI's InterruptProcessingException."""


class Comfy:
    """The shims, and what was asked of them."""

    def __init__(self, models: Path) -> None:
        self.progress: list[tuple[int, int]] = []
        self.interrupt_at: int | None = None
        comfy = self

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.total = total

            def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
                comfy.progress.append((value, total or self.total))

        self.utils, self.model_management = ModuleType("comfy.utils"), ModuleType("comfy.model_management")
        self.utils.ProgressBar = ProgressBar
        self.model_management.get_torch_device = lambda: torch.device("cpu")
        self.model_management.throw_exception_if_processing_interrupted = self.check
        self.package = ModuleType("comfy")
        self.package.utils, self.package.model_management = self.utils, self.model_management
        self.folder_paths = ModuleType("folder_paths")
        self.folder_paths.models_dir = str(models)
        names = {"diffusers": ([str(models / "diffusers")], ["folder"])}
        self.folder_paths.folder_names_and_paths = names
        self.folder_paths.get_folder_paths = lambda kind: names[kind][0][:]
        self.folder_paths.add_model_folder_path = lambda kind, path: names.setdefault(kind, ([], set()))[0].append(path)

    def check(self) -> None:
        if self.interrupt_at is not None and len(self.progress) >= self.interrupt_at:
            raise Interrupted


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, folder) for family in FAMILIES}


@pytest.fixture(autouse=True)
def comfy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comfy:
    shims = Comfy(tmp_path)
    for name, module in (
        ("comfy", shims.package),
        ("comfy.utils", shims.utils),
        ("comfy.model_management", shims.model_management),
        ("folder_paths", shims.folder_paths),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return shims


def execute(node: type, **inputs: Any) -> Any:
    """As ComfyUI executes a node: an object of its own, the method that it names, in inference mode."""
    with torch.inference_mode():
        return getattr(node(), node.FUNCTION)(**inputs)


def base_of(places: tuple[str, str]) -> Loaded:
    return execute(PiFlowLoadBase, model=places[0], dtype="float32", offload=False)[0]


def adapted(base: Loaded, adapter: str, strength: float = 1.0) -> Loaded:
    return execute(PiFlowLoadAdapter, pipeline=base, adapter=adapter, strength=strength)[0]


def sampled(pipeline: Loaded, **changes: Any) -> tuple[Tensor, Tensor]:
    inputs = {"seed": 3, "steps": 4, "batch_size": 1, **SMALL, **changes}
    images, latent = execute(PiFlowSample, pipeline=pipeline, **inputs)
    return images, latent["samples"]


def by_hand(family: str, places: tuple[str, str], adapter: str | None, seed: int = 3, **changes: Any) -> Tensor:
    """(1, H, W, 3) of the pipeline as somebody loads and calls it without ComfyUI."""
    pipe = FAMILIES[family].pipeline.from_pretrained(places[0])
    pipe.set_progress_bar_config(disable=True)
    call = {**CALL, **changes}
    if adapter is None:
        call.pop("total_substeps")
    else:
        pipe.load_piflow_adapter(adapter)
    return pipe(**call, num_inference_steps=4, generator=torch.Generator().manual_seed(seed)).images.permute(0, 2, 3, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_and_latents(family: str, folders: dict[str, tuple[str, str]]) -> None:
    """A batch counts the seeds upwards; the latent is what ComfyUI's VAE of that model decodes."""
    loaded = adapted(base_of(folders[family]), folders[family][1])
    images, samples = sampled(loaded, batch_size=2)
    assert (images.shape, images.dtype, images.device.type) == ((2, 12, 16, 3), torch.float32, "cpu")
    assert 0 <= images.min() < images.max() <= 1
    for index, image in enumerate(images):
        theirs = by_hand(family, folders[family], folders[family][1], seed=3 + index)[0]
        torch.testing.assert_close(image, theirs, atol=1e-5, rtol=0)
    with torch.inference_mode():
        pipe = loaded.pipe
        if family == "qwen_image":
            assert samples.shape == (2, 4, 1, 6, 8)
            pixels = pipe.vae.decode(samples).sample[:, :, 0]
        elif family == "flux":
            assert samples.shape == (2, 4, 6, 8)
            pixels = pipe.vae.decode(samples).sample
        else:  # ComfyUI's VAE undoes the patches and their normalisation itself
            assert samples.shape == (2, 16, 3, 4)
            mean, std = (x.view(1, -1, 1, 1) for x in (pipe.vae.bn.running_mean, pipe.vae.bn.running_var.sqrt()))
            patches = torch.nn.functional.pixel_shuffle(samples * std + mean, 2)
            pixels = pipe.vae.decode(patches).sample
    torch.testing.assert_close(images, (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_strength(family: str, folders: dict[str, tuple[str, str]]) -> None:
    """0 is the base model, 1 the adapter as it is, between them its LoRA is scaled; no order of use matters."""
    places = folders[family]
    base = base_of(places)
    by_strength = {strength: sampled(adapted(base, places[1], strength))[0] for strength in (0.5, 1.0, 0.0)}
    guidance = QWEN_IMAGE_GUIDANCE if family == "qwen_image" else {}
    torch.testing.assert_close(by_strength[0.0], by_hand(family, places, None, **guidance), atol=1e-5, rtol=0)
    torch.testing.assert_close(by_strength[1.0], by_hand(family, places, places[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(sampled(base)[0], by_strength[0.0], atol=0, rtol=0)
    torch.testing.assert_close(sampled(adapted(base, places[1]))[0], by_strength[1.0], atol=0, rtol=0)

    pipe = FAMILIES[family].pipeline.from_pretrained(places[0])
    pipe.set_progress_bar_config(disable=True)
    name = pipe.load_piflow_adapter(places[1])
    pipe.transformer.set_adapters([name], [0.5])
    half = pipe(**CALL, num_inference_steps=4, generator=torch.Generator().manual_seed(3)).images.permute(0, 2, 3, 1)
    torch.testing.assert_close(by_strength[0.5], half, atol=1e-5, rtol=0)
    assert (half - by_strength[1.0]).abs().max() > 1e-3


def test_several_adapters_on_one_base(folders: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    base = base_of(folders["flux"])
    other = export_adapter(student_of(flux_base(), "DX"), flux_base(), tmp_path / "other")
    first, second = adapted(base, folders["flux"][1]), adapted(base, str(other))
    before = sampled(first)[0]
    assert not torch.equal(sampled(second)[0], before)
    assert torch.equal(sampled(first)[0], before)
    assert adapted(base, folders["flux"][1]).adapter == first.adapter
    assert len(first.pipe.transformer.piflow_family.students) == 2
    with pytest.raises(ValueError, match="strength: this adapter has no LoRA to scale, so that only 0 and 1"):
        sampled(adapted(base, str(other), 0.5))


def test_editing(folders: dict[str, tuple[str, str]]) -> None:
    places, reference = folders["flux2"], picture((64, 80))
    given = torch.frombuffer(bytearray(reference.tobytes()), dtype=torch.uint8).view(1, 80, 64, 3) / 255
    assert pictures(given)[0].tobytes() == reference.tobytes()
    images, _ = sampled(adapted(base_of(places), places[1]), images=given)
    theirs = by_hand("flux2", places, places[1], image=[reference])
    torch.testing.assert_close(images, theirs, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"images: only FLUX\.2 takes pictures to change"):
        sampled(base_of(folders["flux"]), images=given)


def test_progress_and_interruption(comfy: Comfy, folders: dict[str, tuple[str, str]]) -> None:
    loaded = adapted(base_of(folders["flux"]), folders["flux"][1], 0.7)
    before, _ = sampled(loaded)
    assert comfy.progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    comfy.progress.clear()
    comfy.interrupt_at = 2
    with pytest.raises(Interrupted):
        sampled(loaded)
    assert comfy.progress == [(1, 4), (2, 4)]
    comfy.interrupt_at = None
    assert torch.equal(sampled(loaded)[0], before)


def test_temperature(folders: dict[str, tuple[str, str]]) -> None:
    loaded = adapted(base_of(folders["flux"]), folders["flux"][1])
    automatic, fixed, none = (sampled(loaded, temperature=value)[0] for value in (-1.0, 0.3, 1.0))
    assert torch.equal(automatic, fixed)
    assert not torch.equal(automatic, none)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 18}, "width, height: expected multiples of 4, got 18 x 12"),
        ({"steps": 0}, "num_inference_steps: expected"),
    ],
)
def test_what_cannot_be_sampled(changes: dict[str, Any], message: str, folders: dict[str, tuple[str, str]]) -> None:
    with pytest.raises(ValueError, match=message):
        sampled(adapted(base_of(folders["flux"]), folders["flux"][1]), **changes)


def test_a_base_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="is a StableDiffusionPipeline; adapters are for QwenImagePipeline, Flux"):
        execute(PiFlowLoadBase, model=str(tmp_path), dtype="float32", offload=False)


def as_comfyui_imports_it(monkeypatch: pytest.MonkeyPatch, folder: Path = FOLDER) -> ModuleType:
    """By its place and under the name of its place, which is no name that Python could import."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("put", [shutil.copytree, lambda folder, place: place.symlink_to(folder)], ids=["copy", "link"])
def test_among_the_custom_nodes(put: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the name that both pages give it, which no `import piflow` of another node's search path can hit."""
    pages = [(FOLDER / "README.md").read_text(), (FOLDER.parent / "docs" / "comfyui.md").read_text()]
    (name,) = {found for page in pages for found in re.findall(r"ln -s \S+ \S+/custom_nodes/(\S+)", page)}
    assert not name.isidentifier()
    (tmp_path / "custom_nodes").mkdir()
    put(FOLDER, tmp_path / "custom_nodes" / name)
    monkeypatch.syspath_prepend(tmp_path / "custom_nodes")  # as some custom nodes do
    nodes = as_comfyui_imports_it(monkeypatch, tmp_path / "custom_nodes" / name)
    assert list(nodes.NODE_CLASS_MAPPINGS) == ["PiFlowLoadBase", "PiFlowLoadAdapter", "PiFlowSample"]


def test_nodes_say_what_they_take(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI calls FUNCTION with the inputs by name, and unpacks as many results as there are RETURN_TYPES."""
    nodes = as_comfyui_imports_it(monkeypatch)
    assert comfy.folder_paths.folder_names_and_paths["piflow"][0] == [
        str(Path(comfy.folder_paths.models_dir) / "piflow")
    ]
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS.keys() == nodes.NODE_CLASS_MAPPINGS.keys()
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        function = inspect.signature(getattr(node, node.FUNCTION)).parameters
        required = [name for name, parameter in function.items() if parameter.default is parameter.empty]
        assert required == ["self", *inputs["required"]]
        assert list(function)[len(required) :] == list(inputs.get("optional", {}))
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)


def test_without_piflow_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "piflow.apps.comfyui", None)
    with pytest.raises(ModuleNotFoundError, match="Install piflow into the Python that runs ComfyUI"):
        as_comfyui_imports_it(monkeypatch)


def test_the_workflow_runs(comfy: Comfy, folders: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The example, with the models found by name in ComfyUI's folders and at a small size."""
    nodes = as_comfyui_imports_it(monkeypatch)
    workflow = json.loads((FOLDER / "workflow.json").read_text())
    models = Path(comfy.folder_paths.models_dir)
    for folder, name, place in zip(("diffusers", "piflow"), ("base", "adapter"), folders["qwen_image"]):
        (models / folder).mkdir()
        (models / folder / name).symlink_to(place)
    smaller = {"model": "base", "adapter": "adapter", "dtype": "float32", "width": 16, "height": 12}
    links = {number: (node, slot, to, at, kind) for number, node, slot, to, at, kind in workflow["links"]}
    results: dict[int, Any] = {}
    for node in sorted(workflow["nodes"], key=lambda node: node["order"]):
        given = {}
        for socket in node["inputs"]:
            if socket["link"] is not None:
                source, slot, to, _, kind = links[socket["link"]]
                assert (to, kind) == (node["id"], socket["type"])
                given[socket["name"]] = results[source][slot]
        if node["type"] == "SaveImage":
            assert given["images"].shape == (1, 12, 16, 3)
            continue
        cls = nodes.NODE_CLASS_MAPPINGS[node["type"]]
        assert [(o["name"], o["type"]) for o in node["outputs"]] == list(zip(cls.RETURN_NAMES, cls.RETURN_TYPES))
        values = iter(node["widgets_values"])
        for name, (kind, *options) in {
            **cls.INPUT_TYPES()["required"],
            **cls.INPUT_TYPES().get("optional", {}),
        }.items():
            if kind not in ("PIFLOW_PIPELINE", "IMAGE"):  # these come through links, the others are widgets
                given[name] = value = next(values)
                assert value in kind if isinstance(kind, list) else type(value) is WIDGETS[kind]
                if options and options[0].get("control_after_generate"):
                    assert next(values) in ("fixed", "increment", "decrement", "randomize")
        assert list(values) == []
        results[node["id"]] = execute(cls, **{**given, **{k: v for k, v in smaller.items() if k in given}})


WIDGETS = {"STRING": str, "INT": int, "FLOAT": float, "BOOLEAN": bool}
