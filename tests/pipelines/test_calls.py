"""Every pipeline, with GM and DX students, behaves as a diffusers pipeline does, and samples what the policies say."""

from __future__ import annotations

import copy
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from piflow.noise_schedule import NoiseSchedule
from piflow.pipelines import PiDiTPipeline
from piflow.policies import DXPolicy
from piflow.sampler import dx_policy_fn, gm_policy_fn, sample
from piflow.schedulers import FlowMapSDEScheduler
from tests.pipelines.tiny import FAMILIES, SCHEDULE, Family, pooled, qwen_prompt, text

EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
FROM_NOISE = ["qwen", "flux", "flux2", "dit"]


def network_of(name: str, pipe: Any) -> Any:
    """The pipeline's student as a function (x_src, sigma_src) -> output, called without any pipeline."""
    student, prompt = pipe.transformer, text()

    def network(x: Tensor, sigma: Tensor) -> Any:
        guidance = {"guidance": torch.full((len(x),), 4.0 if name == "flux2" else 3.5)}
        ids = torch.zeros(6, 3 if name == "flux" else 4)
        grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(3.0))
        zeros = torch.zeros(12, 1)
        if name == "qwen":
            given = {"encoder_hidden_states": prompt, "img_shapes": [[(1, 4, 3)]]}
        elif name == "flux":
            given = {"encoder_hidden_states": prompt, "pooled_projections": pooled(), **guidance}
            given |= {"txt_ids": ids, "img_ids": torch.cat([zeros, grid], dim=1)}
        elif name == "flux2":
            ids[:, 3] = torch.arange(6)
            given = {"encoder_hidden_states": prompt, **guidance}
            given |= {"txt_ids": ids[None], "img_ids": torch.cat([zeros, grid, zeros], dim=1)[None]}
        else:
            return student(x, timestep=1000 * sigma, class_labels=torch.zeros(1, dtype=torch.int64))
        return student(hidden_states=x, timestep=sigma, **given)

    return network


@pytest.mark.parametrize("kind", ["GM", "DX"])
@pytest.mark.parametrize("name", FROM_NOISE)
def test_samples_what_the_policies_say(name: str, kind: str) -> None:
    """The sampler of `piflow.sampler`, on the bare network, ends in the same latents."""
    pipe = FAMILIES[name].pipe(kind)
    layout = "spatial" if name == "dit" else "packed"
    noise = torch.randn((1, 4, 8, 8) if name == "dit" else (1, 12, 16), generator=torch.Generator().manual_seed(3))
    network = network_of(name, pipe)
    if kind == "GM":
        policy_fn = gm_policy_fn(network, layout=layout)
    else:
        policy_fn = dx_policy_fn(lambda x, sigma: network(x, sigma).grid, layout=layout)
    temperature = None if name == "dit" else "auto"
    settings = {"schedule": NoiseSchedule(3.2), "final_step_size_scale": 0.5, "temperature": temperature}
    expected = sample(policy_fn, noise, 4, **settings)
    given = noise.transpose(1, 2).reshape(1, 16, 4, 3) if name == "flux2" else noise
    latents = pipe(**FAMILIES[name].arguments(latents=given)).images
    torch.testing.assert_close(latents, expected, atol=5e-4, rtol=0)


@EVERY
@pytest.mark.parametrize("kind", ["GM", "DX"])
def test_output_types(family: Family, kind: str) -> None:
    pipe = family.pipe(kind)
    images = {form: pipe(**family.arguments(output_type=form)).images for form in ("latent", "pt", "np", "pil")}
    assert images["latent"].dtype == torch.float32
    height, width = images["np"].shape[1:3]
    assert images["np"].shape == (1, height, width, 3)
    np.testing.assert_array_equal(images["pt"].permute(0, 2, 3, 1).float().numpy(), images["np"])
    assert isinstance(images["pil"][0], Image.Image)
    assert np.abs(np.asarray(images["pil"][0]) / 255 - images["np"][0]).max() <= 0.5 / 255 + 1e-6
    (alone,) = pipe(**family.arguments(), return_dict=False)
    assert torch.equal(alone, images["latent"])


@EVERY
def test_students_draw_on_their_policy(family: Family) -> None:
    """Temperature, substeps and the number of network evaluations matter; the auto temperature is 0.1 (nfe - 1).

    It is the default, but for class-conditional students.
    """
    pipe = family.pipe()
    auto = pipe(**family.arguments(temperature="auto")).images
    assert torch.equal(auto, pipe(**family.arguments(temperature=0.1 * 3)).images)
    for change in ({"temperature": None}, {"total_substeps": 16}, {"num_inference_steps": 6}):
        assert not torch.equal(auto, pipe(**family.arguments(**{"temperature": "auto"} | change)).images)
    usual = {"temperature": None} if isinstance(pipe, PiDiTPipeline) else {"temperature": "auto"}
    assert torch.equal(pipe(**family.arguments()).images, pipe(**family.arguments(**usual)).images)
    assert torch.equal(
        pipe(**family.arguments(temperature=1.0)).images, pipe(**family.arguments(temperature=None)).images
    )


@EVERY
def test_callbacks(family: Family) -> None:
    """A callback sees each step's latents and can change them, or interrupt the call."""
    pipe, seen = family.pipe(), []

    def watch(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, float(timestep), tensors["latents"]))
        return tensors

    plain = pipe(**family.arguments(callback_on_step_end=watch)).images
    assert [step for step, _, _ in seen] == list(range(len(seen)))
    assert len(seen) == (2 if "strength" in family.call else 4)
    assert [t for _, t, _ in seen] == sorted((t for _, t, _ in seen), reverse=True)
    assert torch.equal(seen[-1][2], plain)

    def change(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"] + 1} if step == 0 else tensors

    assert not torch.equal(pipe(**family.arguments(callback_on_step_end=change)).images, plain)

    def interrupt(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = True
        return tensors

    assert torch.equal(pipe(**family.arguments(callback_on_step_end=interrupt)).images, seen[0][2])
    assert torch.equal(pipe(**family.arguments()).images, plain)


def test_callback_sees_prompt_embeddings() -> None:
    family = FAMILIES["qwen"]
    pipe, shapes = family.pipe(), []

    def look(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes.append(tuple(tensors["prompt_embeds"].shape))
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    inputs = ["latents", "prompt_embeds"]
    changed = pipe(**family.arguments(callback_on_step_end=look, callback_on_step_end_tensor_inputs=inputs)).images
    assert shapes == [(1, 6, 24)] * 4
    assert not torch.equal(changed, pipe(**family.arguments()).images)


@EVERY
def test_a_call_leaves_no_trace(family: Family) -> None:
    """Components, configuration and the scheduler's state are those of before a call, an interrupted one included."""
    pipe = family.pipe()
    parts, config = dict(pipe.components), dict(pipe.config)
    seen = []

    def stop(called: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert called is pipe
        seen.append(called.components["transformer"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(**family.arguments(callback_on_step_end=stop))
    assert seen == [parts["transformer"]]
    assert dict(pipe.components) == parts
    assert dict(pipe.config) == config
    assert pipe.transformer is parts["transformer"]
    assert pipe.scheduler is parts["scheduler"]
    assert pipe.scheduler.num_inference_steps is None


def test_stand_ins_can_be_copied_within_a_call() -> None:
    family = FAMILIES["qwen"]
    pipe, copies = family.pipe(), []

    def keep(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        copies.append((copy.deepcopy(pipe.scheduler), copy.deepcopy(pipe.transformer)))
        return tensors

    pipe(**family.arguments(callback_on_step_end=keep))
    assert [scheduler.step_index for scheduler, _ in copies] == [1, 2, 3, 4]
    assert all(type(transformer.student) is type(pipe.transformer) for _, transformer in copies)


@EVERY
def test_a_call_shows_diffusers_arguments_and_ours(family: Family) -> None:
    theirs = next(base for base in family.cls.__mro__ if base.__module__.startswith("diffusers.")).__call__
    shown = inspect.signature(family.cls.__call__).parameters
    assert shown.keys() >= {*inspect.signature(theirs).parameters, "total_substeps", "temperature"}
    assert not {"args", "kwargs"} & shown.keys()
    for name in ("generator", "temperature"):
        assert name in inspect.getdoc(family.cls.__call__)


def test_a_subclass_may_have_its_own_call() -> None:
    class Twice(FAMILIES["qwen"].cls):  # type: ignore[misc]
        def __call__(self, **kwargs: Any) -> Any:
            return [super(Twice, self).__call__(**kwargs) for _ in range(2)]

    class Heir(Twice):
        pass

    family = FAMILIES["qwen"]
    pipe = Heir(**family.pipe().components)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(**family.arguments())) == 2


def test_pipelines_of_the_same_parts_run_side_by_side() -> None:
    family = FAMILIES["qwen"]
    pipes = [family.pipe(scheduler=FlowMapSDEScheduler(**SCHEDULE, h=1.0))]
    pipes.append(type(pipes[0])(**pipes[0].components))
    pipes[1].set_progress_bar_config(disable=True)
    expected = [pipes[0](**family.arguments(seed=seed)).images for seed in range(2)]
    both_in_their_loops = threading.Barrier(2, timeout=60)

    def meet(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        both_in_their_loops.wait()
        return tensors

    def run(seed: int) -> Tensor:
        return pipes[seed](**family.arguments(seed=seed, callback_on_step_end=meet)).images

    with ThreadPoolExecutor(2) as threads:
        assert all(torch.equal(a, b) for a, b in zip(threads.map(run, range(2)), expected))


@pytest.mark.parametrize("kind", ["GM", "base"])
def test_one_call_at_a_time(kind: str) -> None:
    """A call from within a call is refused; a second pipeline of the same parts is not, and both go on."""
    family = FAMILIES["flux"]
    pipe = family.pipe(kind)
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    plain = pipe(**family.arguments()).images

    def nested(called: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        with pytest.raises(RuntimeError, match="in a call already"):
            pipe(**family.arguments())
        assert torch.equal(other(**family.arguments()).images, plain)
        return tensors

    assert torch.equal(pipe(**family.arguments(callback_on_step_end=nested)).images, plain)
    assert torch.equal(pipe(**family.arguments()).images, plain)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "dit"])
@pytest.mark.parametrize("h", [0.0, 1.0])
def test_several_images_per_prompt(name: str, h: float) -> None:
    """Two images for each of two prompts; with a generator for each, every image is the one it is alone."""
    family = FAMILIES[name]
    pipe = family.pipe(scheduler=FlowMapSDEScheduler(**SCHEDULE, h=h))

    def generators(seeds: list[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    seeds = [0, 1, 2, 3]
    four = pipe(**family.arguments(2, num_images_per_prompt=2, generator=generators(seeds))).images
    assert four.shape == (4, 12, 16)
    assert all((four[i] - four[j]).abs().max() > 0.1 for i, j in combinations(seeds, 2))
    if name == "flux-inpaint" and h > 0:
        return  # diffusers draws an encoding of the masked image, which it does not use, from the first generator
    both = family.prompt(2)
    for seed in seeds:
        one = {key: value[seed // 2 : seed // 2 + 1] for key, value in both.items()}
        alone = pipe(**family.arguments(generator=generators([seed])) | one).images
        torch.testing.assert_close(four[seed : seed + 1], alone, atol=2e-4, rtol=0)


@EVERY
@pytest.mark.parametrize("h", [0.5, 1.0, "inf"])
def test_stochastic_sampling_follows_the_generator(family: Family, h: float | str) -> None:
    pipe = family.pipe(scheduler=FlowMapSDEScheduler(**SCHEDULE, h=h))
    first = pipe(**family.arguments(seed=0)).images
    assert first.isfinite().all()
    torch.manual_seed(7)
    assert torch.equal(first, pipe(**family.arguments(seed=0)).images)
    state = torch.random.get_rng_state()
    assert not torch.equal(first, pipe(**family.arguments(seed=1)).images)
    assert torch.equal(state, torch.random.get_rng_state())


def test_stochastic_noise_is_the_callers() -> None:
    """From the same latents, only the noise between the steps can differ."""
    family = FAMILIES["qwen"]
    pipe = family.pipe(scheduler=FlowMapSDEScheduler(**SCHEDULE, h=1.0))
    latents = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(5))
    runs = [pipe(**family.arguments(seed=seed, latents=latents)).images for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_no_noise_is_drawn_without_stochasticity() -> None:
    family = FAMILIES["qwen"]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 12, 16)
    before = generator.get_state()
    family.pipe()(**family.arguments(latents=latents, generator=generator))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("shift", [3.2, 3.0, 1.7, 7.3, 11.9, 0.3])
def test_half_stochastic_is_finite_at_every_shift(shift: float) -> None:
    """Some shifts put sigma[0] an ulp above 1 in float32, where h = 0.5 asks for the root of a negative number."""
    family = FAMILIES["qwen"]
    pipe = family.pipe(scheduler=FlowMapSDEScheduler(shift=shift, h=0.5))
    assert pipe(**family.arguments()).images.isfinite().all()


@pytest.mark.parametrize("name", ["qwen", "qwen-img2img", "flux", "flux2", "flux2-edit"])
@pytest.mark.parametrize("kind", ["sqrt", "exp"])
def test_dynamic_shift_counts_image_tokens(name: str, kind: str) -> None:
    family = FAMILIES[name]
    dynamic = {"use_dynamic_shifting": True, "base_seq_len": 8, "max_seq_len": 64, "dynamic_shifting_type": kind}
    pipe = family.pipe(scheduler=FlowMapSDEScheduler(**dynamic))
    shift = pipe.scheduler.noise_schedule.shift_for(12)
    fixed = family.pipe(scheduler=FlowMapSDEScheduler(shift=shift))
    torch.testing.assert_close(pipe(**family.arguments()).images, fixed(**family.arguments()).images, atol=1e-4, rtol=0)
    assert pipe.scheduler.seq_len is None


def test_own_sigmas() -> None:
    """Raw times of one's own, by diffusers' argument for it."""
    family = FAMILIES["flux"]
    pipe = family.pipe()
    plain = pipe(**family.arguments(num_inference_steps=3)).images
    raw_t = [1.0, 1 - 1 / 2.5, 1 - 2 / 2.5]
    torch.testing.assert_close(pipe(**family.arguments(sigmas=raw_t)).images, plain, atol=1e-5, rtol=0)
    assert not torch.equal(pipe(**family.arguments(sigmas=[1.0, 0.8, 0.3])).images, plain)


@pytest.mark.parametrize("name", ["qwen", "flux"])
def test_true_guidance_combines_mean_velocities(name: str) -> None:
    """For one evaluation: x_noise - (u_neg + 2 (u_pos - u_neg)), rescaled to the norm of u_pos for Qwen-Image."""
    family = FAMILIES[name]
    pipe = family.pipe()
    noise = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(4))
    negative = {f"negative_{key}": value for key, value in family.prompt().items()}
    negative["negative_prompt_embeds"] = text(seed=9)
    options = {"latents": noise, "num_inference_steps": 1}
    positive_x = pipe(**family.arguments(**options)).images
    negative_x = pipe(**family.arguments(**options, prompt_embeds=negative["negative_prompt_embeds"])).images
    assert torch.equal(pipe(**family.arguments(**options, **negative)).images, positive_x)
    guided = pipe(**family.arguments(**options, **negative, true_cfg_scale=2.0)).images
    u = 2 * (noise - positive_x) - (noise - negative_x)
    if name == "qwen":
        u = u * (noise - positive_x).norm(dim=-1, keepdim=True) / u.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(guided, noise - u, atol=1e-5, rtol=0)


def test_embedded_guidance_reaches_the_network() -> None:
    family = FAMILIES["flux"]
    pipe = family.pipe()
    default = pipe(**family.arguments()).images
    assert torch.equal(default, pipe(**family.arguments(guidance_scale=3.5)).images)
    assert not torch.equal(default, pipe(**family.arguments(guidance_scale=1.0)).images)


def test_editing_looks_at_the_references() -> None:
    plain, edit = FAMILIES["flux2"], FAMILIES["flux2-edit"]
    pipe = plain.pipe()
    results = [pipe(**family.arguments()).images for family in (plain, edit)]
    assert results[0].shape == results[1].shape == (1, 12, 16)
    assert not torch.equal(*results)
    by_image = {key: value for key, value in edit.arguments().items() if key not in ("height", "width")}
    assert pipe(**by_image).images.shape == (1, 16 * 16, 16)  # the size of the first reference, 64 x 64


@pytest.mark.parametrize(("name", "of_image"), [("qwen", "qwen-img2img"), ("flux", "flux-img2img")])
def test_image_to_image_takes_the_last_steps(name: str, of_image: str) -> None:
    """At strength 1/2, the last two of four steps, from the image's latents with noise of the third step's level."""
    family = FAMILIES[of_image]
    image = torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(2))
    results = family.pipe()(**family.arguments(seed=0, image=image, strength=0.5)).images

    noise = torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    raw_t = [1 - 2 / 3.5, 1 - 3 / 3.5]
    sigma = NoiseSchedule(3.2).sigma(raw_t[0])
    plain = FAMILIES[name].pipe()
    start = plain._pack_latents((1 - sigma) * image + sigma * noise, 1, 4, 8, 6)
    expected = plain(**FAMILIES[name].arguments(latents=start, sigmas=raw_t, temperature=0.3)).images
    torch.testing.assert_close(results, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["qwen-inpaint", "flux-inpaint"])
def test_inpainting_keeps_what_is_not_masked(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.pipe()
    one, other = (pipe(**family.arguments(prompt_embeds=text(seed=seed))).images for seed in (0, 1))
    upper, lower = slice(0, 6), slice(6, 12)  # tokens, of which the mask covers the lower ones
    assert torch.equal(one[:, upper], other[:, upper])
    assert (one[:, lower] - other[:, lower]).abs().amax(dim=-1).min() > 1e-3


@EVERY
def test_networks_in_bfloat16(family: Family) -> None:
    """The networks run in bfloat16, states stay in float32, and the result is close to that of float32."""
    exact = family.pipe()(**family.arguments(2)).images
    pipe = family.pipe()
    half = type(pipe)(**{**pipe.components, "vae": type(pipe.vae).from_config(pipe.vae.config)})
    half.vae.load_state_dict(pipe.vae.state_dict())
    half.set_progress_bar_config(disable=True)
    half.to(torch.bfloat16)
    arguments = family.arguments(2)
    arguments |= {key: value.bfloat16() for key, value in arguments.items() if key.endswith("_embeds")}
    latents = half(**arguments).images
    assert latents.dtype == torch.float32
    assert (latents - exact).pow(2).mean().sqrt() < 0.1 * exact.std()
    images = half(**{**arguments, "output_type": "np"}).images
    assert images.dtype == np.float32
    assert np.isfinite(images).all()


@pytest.mark.parametrize("name", ["qwen-img2img", "qwen-inpaint", "flux-img2img"])
def test_starts_in_float32_beside_networks_in_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise and the encoded image are not rounded to the precision of the text embeddings."""
    family = FAMILIES[name]
    starts: list[Any] = []

    def recorded(start: Any) -> Any:
        starts.append(start)
        return start

    for dtype in (torch.float32, torch.bfloat16):
        pipe = family.pipe()
        pipe.transformer.to(dtype)
        prepare = pipe.prepare_latents
        monkeypatch.setattr(pipe, "prepare_latents", lambda *args, prepare=prepare: recorded(prepare(*args)))
        pipe(**family.arguments(**{k: v.to(dtype) for k, v in family.prompt().items() if k.endswith("_embeds")}))
    exact, beside_bfloat16 = (start if isinstance(start, tuple) else (start,) for start in starts)
    assert all(torch.equal(a, b) for a, b in zip(exact, beside_bfloat16))
    assert {part.dtype for part in beside_bfloat16} == {torch.float32}


@EVERY
def test_compiled_transformer(family: Family) -> None:
    pipe = family.pipe()
    plain = pipe(**family.arguments()).images
    pipe.transformer.compile(backend="eager")
    torch.testing.assert_close(pipe(**family.arguments()).images, plain, atol=1e-5, rtol=0)
    wrapped = family.pipe()
    wrapped.transformer = torch.compile(wrapped.transformer, backend="eager")
    torch.testing.assert_close(wrapped(**family.arguments()).images, plain, atol=1e-5, rtol=0)


def test_cache_context_is_the_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["qwen"]
    pipe, names = family.pipe(), []
    own = pipe.transformer.cache_context
    monkeypatch.setattr(pipe.transformer, "cache_context", lambda name: names.append(name) or own(name))
    pipe(**family.arguments())
    assert names == ["cond"] * 4


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    family = FAMILIES["qwen"]
    pipe = family.pipe()
    pipe(**family.arguments())
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    pipe(**family.arguments())
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["qwen", "flux", "flux2"])
def test_vae_slicing_and_tiling(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.pipe()
    arguments = family.arguments(2, output_type="np")
    plain = pipe(**arguments).images
    pipe.vae.enable_slicing()
    arguments["generator"].manual_seed(0)
    np.testing.assert_allclose(pipe(**arguments).images, plain, atol=1e-5)
    pipe.vae.disable_slicing()
    pipe.vae.enable_tiling()
    arguments["generator"].manual_seed(0)
    assert pipe(**arguments).images.shape == plain.shape
    pipe.vae.disable_tiling()


def test_switching_the_pipeline_class_keeps_the_student() -> None:
    pipe = FAMILIES["qwen"].pipe()
    family = FAMILIES["qwen-img2img"]
    other = family.cls.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert other.transformer is pipe.transformer
    assert other(**family.arguments()).images.isfinite().all()


@pytest.mark.parametrize("h", [0.0, 0.5, "inf"])
def test_a_segment_is_as_long_as_the_step(h: float | str) -> None:
    """At the trained number of steps, DX students need not say it, however far stochastic steps follow a policy."""
    family = FAMILIES["qwen"]
    pipe = family.pipe("DX", FlowMapSDEScheduler(**SCHEDULE, h=h))
    plain = pipe(**family.arguments()).images
    pipe.transformer.policy_config = {"type": "DX", "segment_size": 1 / 3.5, "shift": 3.2}
    torch.testing.assert_close(pipe(**family.arguments()).images, plain, atol=1e-5, rtol=0)


def test_policy_settings_of_the_adapter_are_used() -> None:
    """Its segment size and shift for DX."""
    family = FAMILIES["qwen"]
    pipe = family.pipe("DX")
    plain = pipe(**family.arguments(num_inference_steps=8)).images
    pipe.transformer.policy_config = {"type": "DX", "segment_size": 1 / 3.5, "shift": 3.2}
    trained = pipe(**family.arguments(num_inference_steps=8)).images
    assert not torch.allclose(plain, trained, atol=1e-3)

    noise = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(3))
    network = network_of("qwen", pipe)

    def policy_fn(x: Tensor, sigma: Tensor, step: Any) -> DXPolicy:
        return DXPolicy(network(x, sigma).grid, x, sigma, 1 / 3.5, 3.2, layout="packed")

    expected = sample(policy_fn, noise, 8, schedule=NoiseSchedule(3.2), final_step_size_scale=0.5)
    latents = pipe(**qwen_prompt(), height=16, width=12, latents=noise, num_inference_steps=8, output_type="latent")
    torch.testing.assert_close(latents.images, expected, atol=5e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "asked", "config"),
    [
        ("GM", {"eps": 0.3}, {}),
        ("DX", {"eps": 0.3}, {}),
        ("DX", {"mode": "polynomial"}, {"policy": "polynomial"}),
        ("DX", {"shift": 1.5}, {"shift": 1.5}),
    ],
)
def test_policy_settings_of_the_adapter_and_of_the_configuration(
    kind: str, asked: dict[str, Any], config: dict[str, Any]
) -> None:
    """Each has its effect; what a student's configuration can say has the same one there, and the adapter's counts."""
    family = FAMILIES["qwen"]
    pipe = family.pipe(kind)
    plain = pipe(**family.arguments()).images
    pipe.transformer.policy_config = asked
    expected = pipe(**family.arguments()).images
    assert not torch.allclose(expected, plain, atol=1e-4)
    if config:
        pipe.transformer.policy_config = {}
        pipe.transformer.register_to_config(**config)
        assert torch.equal(pipe(**family.arguments()).images, expected)
        pipe.transformer.policy_config = {"mode": "grid", "shift": 3.2}
        assert torch.equal(pipe(**family.arguments()).images, plain)
