import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from piflow.digits.classifier import accuracy, extract, load_classifier
from piflow.digits.data import load_digits_images
from piflow.digits.teacher import (
    SHIPPED_WEIGHTS,
    TeacherRecipe,
    euler_sample,
    load_teacher,
    main,
    network_velocity,
    teacher_velocity,
    train_teacher,
)
from piflow.distillation import flow_matching_loss
from piflow.noise_schedule import NoiseSchedule


def sample_accuracy(teacher, num_samples, num_steps):
    labels = torch.arange(num_samples) % 10
    noise = torch.randn(num_samples, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    x_0 = euler_sample(teacher_velocity(teacher, labels, 2.0), noise, num_steps, NoiseSchedule())
    return accuracy(extract(load_classifier(), x_0)[1], labels)


@pytest.mark.slow
def test_recipe_still_learns(tmp_path, capsys):
    """The real command at a twentieth of its cost: the loss and the samples leave chance far behind."""
    main(["--out", str(tmp_path), "--steps", "220", "--batch-size", "128"])
    assert "Teacher saved" in capsys.readouterr().out
    account = json.loads((tmp_path / "recipe.json").read_text())
    shipped = json.loads((SHIPPED_WEIGHTS / "recipe.json").read_text())
    assert account.keys() == shipped.keys()
    assert [account[key] for key in ("command", "data", "objective")] == [
        shipped[key] for key in ("command", "data", "objective")
    ]
    assert account["recipe"]["steps"] == 220
    assert account["zero_predictor_loss"] == pytest.approx(1.717, abs=0.001)
    assert account["first_loss"] == pytest.approx(account["zero_predictor_loss"], abs=0.1)  # adaLN-zero starts at u = 0
    assert account["final_loss"] < 0.5 * account["zero_predictor_loss"]
    assert sample_accuracy(load_teacher(tmp_path), 200, 8) > 0.5


def test_training_is_repeatable_and_leaves_the_global_generator_alone():
    recipe = TeacherRecipe(num_layers=1, steps=2, batch_size=16)
    state = torch.random.get_rng_state()
    (a, losses_a), (b, losses_b) = train_teacher(recipe), train_teacher(recipe)
    assert losses_a == losses_b
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert train_teacher(TeacherRecipe(num_layers=1, steps=2, batch_size=16, seed=1))[1] != losses_a


def test_shipped_weights_match_their_recipe():
    account = json.loads((SHIPPED_WEIGHTS / "recipe.json").read_text())
    assert TeacherRecipe(**account["recipe"]) == TeacherRecipe()  # the command's defaults made them
    files = [file for file in SHIPPED_WEIGHTS.parent.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 3e6

    teacher = load_teacher()
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    images, labels = load_digits_images()
    generator = torch.Generator().manual_seed(0)
    sigma = (torch.arange(len(images)) + 0.5) / len(images)
    shuffled = torch.randperm(len(images), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    with torch.no_grad():
        velocity = network_velocity(teacher, labels[shuffled])
        result = flow_matching_loss(
            velocity, images[shuffled], NoiseSchedule(), loss_scale=2.0, raw_t=sigma, noise=noise
        )
    assert result.loss.item() == pytest.approx(account["final_loss"], rel=0.1)


def test_shipped_teacher_draws_the_requested_digits():
    assert sample_accuracy(load_teacher(), 200, 32) > 0.95


def test_guidance_extrapolates_from_the_null_class():
    teacher = load_teacher()
    labels = torch.tensor([3, 7])
    x_t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.3, 0.9])
    with torch.no_grad():
        u_cond = teacher(x_t, timestep=1000 * sigma, class_labels=labels).sample
        u_uncond = teacher(x_t, timestep=1000 * sigma, class_labels=torch.tensor([10, 10])).sample
    assert not torch.allclose(u_cond, u_uncond, atol=1e-2)
    for scale, expected in [(0.0, u_uncond), (1.0, u_cond), (2.0, 2 * u_cond - u_uncond)]:
        torch.testing.assert_close(teacher_velocity(teacher, labels, scale)(x_t, sigma), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("label", [-1, 10])
def test_label_out_of_range_is_named(label):
    with pytest.raises(ValueError, match=rf"label {label} .*valid labels are 0 to 9"):
        teacher_velocity(load_teacher(), torch.tensor([label]), 2.0)


def test_states_that_do_not_fit_the_labels_are_named():
    velocity = teacher_velocity(load_teacher(), torch.tensor([3, 7]), 2.0)
    for x_t, sigma, message in [
        (torch.zeros(3, 1, 8, 8), torch.ones(3), r"x_t must have shape \(2, 1, 8, 8\) .*got \(3, 1, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8), torch.ones(2), r"x_t must have shape \(2, 1, 8, 8\) .*got \(2, 3, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8), torch.ones(3), r"sigma must have shape \(2,\) .*got \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            velocity(x_t, sigma)


def test_euler_is_exact_for_a_constant_velocity():
    noise, u = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for num_steps, shift in [(1, 1.0), (5, 1.0), (5, 3.2)]:
        x_0 = euler_sample(lambda x_t, sigma: u, noise, num_steps, NoiseSchedule(shift=shift))
        torch.testing.assert_close(x_0, noise - u, atol=1e-5, rtol=1e-5)


def test_euler_visits_the_shifted_noise_levels():
    visited = []

    def velocity(x_t, sigma):
        visited.append(sigma)
        return torch.zeros_like(x_t)

    euler_sample(velocity, torch.zeros(3, 1, 8, 8), 4, NoiseSchedule(shift=2.0))
    raw_t = torch.tensor([1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(torch.stack(visited), (2 * raw_t / (1 + raw_t))[:, None].expand(4, 3))
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        euler_sample(velocity, torch.zeros(3, 1, 8, 8), 0, NoiseSchedule())


def test_missing_or_damaged_weights_name_the_folder_and_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m piflow\.digits\.teacher --out"):
        load_teacher(tmp_path)
    for file in SHIPPED_WEIGHTS.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"cannot be read.*python -m piflow\.digits\.teacher --out"):
        load_teacher(tmp_path)
    whole = load_file(SHIPPED_WEIGHTS / weights.name)
    save_file({key: value for key, value in whole.items() if key != "proj_out_2.bias"}, weights)
    with pytest.raises(
        ValueError, match=rf"{weights} lacks 1 tensors, proj_out_2\.bias .*piflow\.digits\.teacher --out"
    ):
        load_teacher(tmp_path)


def test_wrong_recipe_ends_with_one_message(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path), "--steps", "0"])
    assert stop.value.code == 2
    assert "steps must be at least 1, got 0" in capsys.readouterr().err


def test_failures_end_with_one_message_and_save_nothing(tmp_path, capsys):
    out = tmp_path / "teacher"
    for steps in ("1", "50"):  # after one step only the loss of the result is broken
        size = ["--steps", steps, "--batch-size", "16", "--num-layers", "1"]
        assert main(["--out", str(out), *size, "--learning-rate", "1e30", "--warmup-steps", "1"]) == 1
        assert re.search(r"The teacher.s loss is (nan|inf) after .* lower learning_rate", capsys.readouterr().err)
        assert list(out.iterdir()) == []
    file = tmp_path / "file"
    file.write_text("mine")
    assert main(["--out", str(file)]) == 1
    assert f"{file} cannot be a folder for the results" in capsys.readouterr().err
    assert file.read_text() == "mine"
