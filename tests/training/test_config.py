"""Configuration: what a person mistypes is named, with the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from piflow.cli import app
from piflow.training.config import load_config
from piflow.training.errors import ConfigError

CONFIGS_ROOT = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(CONFIGS_ROOT.rglob("*.yaml"))


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: out\niterations: 10\ndistillation: {nfe: 2}\n")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load(path: Path) -> None:
    assert load_config(path).iterations > 0


def test_overrides_and_round_trip(config_file: Path, tmp_path: Path) -> None:
    overrides = ["optimizer.learning_rate=1e-3", "distillation.guidance_scale=2", "ema={gamma: 3}"]
    config = load_config(config_file, overrides)
    assert config.optimizer.learning_rate == 1e-3
    assert config.distillation.nfe == 2
    assert config.distillation.guidance_scale == 2.0
    assert config.ema.gamma == 3.0
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rat=1", "unknown key `optimizer.learning_rat`: did you mean `learning_rate`"),
        ("iteration=5", "unknown key `iteration`: did you mean `iterations`"),
        ("ema.zzz=5", "unknown key `ema.zzz`: known keys here: gamma, start_iteration"),
        ("distillation.nfe=0", r"distillation.nfe: Input should be greater than 0 \(got 0\)"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate: Input should be a finite number"),
        ("distillation.policy_dropout=1", "distillation.policy_dropout: Input should be less than 1"),
        ("iterations=true", r"iterations: Input should be a valid integer \(got True\)"),
        ("optimizer.betas=[2,3]", r"optimizer.betas.0: Input should be less than 1 \(got 2\)"),
        ("seed=99999999999999999999999", "seed: Input should be less than 9223372036854775808"),
        ("iterations", "`iterations` is not of the form key=value"),
        ("seed.x=5", "seed: Input should be a valid integer"),
        ("iterations.x=5", "goes into `iterations`, which is a value"),
        ("seed=[", "`seed=\\[` is not valid YAML"),
    ],
)
def test_bad_override(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, [override])


def test_every_problem_is_listed(config_file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, ["sed=1", "distillation.nfes=2"])
    assert "did you mean `seed`" in str(caught.value)
    assert "did you mean `nfe`" in str(caught.value)


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1,\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml is not valid YAML.*line"):
        load_config(bad)
    bad.write_text("- 1\n")
    with pytest.raises(ConfigError, match="must hold `key: value` pairs at its top, got a list"):
        load_config(bad)
    bad.write_text("")
    with pytest.raises(ConfigError, match="output_dir: Field required"):
        load_config(bad)


def test_warm_up() -> None:
    optimizer = load_config(CONFIGS[0], ["optimizer.warmup_iterations=4", "optimizer.learning_rate=1.0"]).optimizer
    assert [optimizer.learning_rate_at(i) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_section_that_is_given_twice(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("output_dir: out\niterations: 10\nema: {gamma: 3}\nseed: 1\nema: {start_iteration: 5}\n")
    with pytest.raises(ConfigError, match=r"`ema` is given twice in one section, again.*line 5"):
        load_config(bad)


def test_an_override_goes_into_a_section_that_is_off(config_file: Path) -> None:
    config_file.write_text(config_file.read_text() + "logging: {wandb: null}\n")
    wandb = load_config(config_file, ["logging.wandb.project=few-steps", "logging.wandb.mode=offline"]).logging.wandb
    assert wandb is not None
    assert (wandb.project, wandb.mode) == ("few-steps", "offline")


def test_a_dry_run_speaks_of_the_processes_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe, out = str(TINY / "qwen_image" / "gm_4nfe.yaml"), f"output_dir={tmp_path / 'out'}"
    wanted = [recipe, out, "optimizer.learning_rate=3e-4", "--dry-run", "--processes", "4"]
    result = CliRunner().invoke(app, ["train", *wanted])
    assert result.exit_code == 0
    said = result.output + capsys.readouterr().out
    assert "# batch: 4 = 1 x 4 process(es) x 1 in turn" in said
    assert "# memory of each of 4 process(es)" in said
    assert "# trainable: 46,097 parameters" in said
    assert "  learning_rate: 0.0003\n" in said
    assert not (tmp_path / "out").exists()


TINY = CONFIGS_ROOT / "tiny"


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        (
            "flux/dx_4nfe",
            "student.num_gaussians=4",
            "student.policy=dx has no student.num_gaussians: of a gm head only",
        ),
        ("flux/gm_4nfe", "student.n_grid=4", "student.policy=gm has no student.n_grid: of a dx head only"),
        ("flux/dx_4nfe", "distillation.policy_dropout=0.1", "policy_dropout drops mixture components"),
        ("flux/gm_4nfe", "distillation.total_substeps=3", "nfe=4 does not fit total_substeps=3: the shortest of its"),
        ("flux/gm_8nfe", "distillation.total_substeps=32", "window_substeps=3 does not fit nfe=8: .* has 2 of the 32"),
        ("flux/gm_4nfe", "distillation.guidance_interval=[0.7, 0.1]", r"must be \(lowest, highest\) noise level"),
        (
            "flux/gm_4nfe",
            "student.gradient_checkpointing=false",
            "gradient_checkpointing must be true with student.lora",
        ),
        ("imagenet/dit_2nfe", "student.lora={rank: 4, targets: [to_q]}", "teacher.kind=dit has no LoRA"),
        ("flux/gm_4nfe", "student.lora.rank=0", "student.lora.rank: Input should be greater than 0"),
        ("flux/gm_4nfe", "student.lora.rnk=4", "unknown key `student.lora.rnk`: did you mean `rank`"),
        ("flux/gm_4nfe", "student.lora.targets=[]", "student.lora.targets: .* at least 1 item"),
        ("qwen_image/gm_4nfe", "distillation.embedded_guidance=3.5", "embedded_guidance is for FLUX teachers"),
        ("flux/gm_4nfe", "data.kind=digits", "data.kind=digits has class labels, teacher.kind=flux needs prompts"),
        ("flux/gm_4nfe", "teacher.path=somewhere", "random weights are wanted, but teacher.path is given too"),
        ("flux/gm_4nfe", "teacher.kind=digits", "random weights are wanted, but teacher.kind=digits brings its own"),
        ("flux/gm_4nfe", "batch_size_per_rank=3", "batch_size=4 must be a multiple of batch_size_per_rank=3"),
    ],
)
def test_keys_that_do_not_fit_each_other(recipe: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(TINY / f"{recipe}.yaml", [override])


def test_a_batch_that_does_not_divide_over_the_processes() -> None:
    config = load_config(TINY / "flux" / "gm_4nfe.yaml", ["batch_size=12", "batch_size_per_rank=2"])
    assert [config.accumulation(world_size) for world_size in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(ConfigError, match=r"batch_size=12 does not divide over 4 process.*The nearest are 8 and 16\."):
        config.accumulation(4)
    assert load_config(TINY / "flux" / "gm_4nfe.yaml", ["batch_size=null"]).accumulation(5) == 1


def test_a_file_begins_from_its_base(tmp_path: Path, config_file: Path) -> None:
    over = tmp_path / "sub" / "over.yaml"
    over.parent.mkdir()
    over.write_text("base: ../run.yaml\niterations: 7\ndistillation: {total_substeps: 32}\n")
    config = load_config(over, ["seed=3"])
    assert (config.iterations, config.seed, config.output_dir) == (7, 3, Path("out"))
    assert (config.distillation.nfe, config.distillation.total_substeps) == (2, 32)
    over.write_text("base: over.yaml\n")
    with pytest.raises(ConfigError, match=r"over\.yaml has itself as its base"):
        load_config(over)
    over.write_text("base: nowhere.yaml\n")
    with pytest.raises(ConfigError, match=r"no configuration file .*nowhere\.yaml"):
        load_config(over)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_config_survives_writing(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config


def test_recipes_have_the_papers_settings() -> None:
    for path in (CONFIGS_ROOT / "imagenet").glob("*.yaml"):
        config = load_config(path)
        assert (config.batch_size, config.optimizer.learning_rate) == (4096, 5e-5)
        assert (config.student.num_gaussians, config.distillation.policy_dropout) == (32, 0.05)
        assert (config.distillation.guidance_scale, config.distillation.guidance_interval) == (3.2, (0.0, 0.7))
        assert (config.distillation.teacher_ratio, config.distillation.loss_scale) == (0, 3)
        assert config.iterations == {1: 140_000, 2: 24_000}[config.distillation.nfe]
        optimizer, start = config.optimizer, config.ema.start_iteration
        assert (optimizer.warmup_iterations, optimizer.clipping_start_iteration, start) == (400, 400, 400)
    for family, iterations, states in (("flux", 3000, 4), ("flux2", 3000, 4), ("qwen_image", 9000, 2)):
        for path in (CONFIGS_ROOT / family).glob("*.yaml"):
            config = load_config(path)
            distillation, lora = config.distillation, config.student.lora
            assert lora is not None
            assert (config.batch_size, config.optimizer.learning_rate, lora.rank) == (256, 1e-4, 256)
            assert (config.iterations, distillation.num_intermediate_states) == (iterations, states)
            assert (distillation.shift, distillation.final_step_size_scale) == (3.2, 0.5)
            assert (distillation.window_substeps, distillation.total_substeps) == (3, 128)
            assert distillation.policy_dropout == (0.1 if config.student.policy == "gm" else 0)
            decay = (distillation.teacher_ratio, distillation.teacher_ratio_decay)
            assert decay == ((0, 0) if family == "qwen_image" else (1, 2000))
            assert (distillation.loss_scale, config.optimizer.gradient_clipping, lora.dropout) == (30, 50, 0.05)
            optimizer, start = config.optimizer, config.ema.start_iteration
            assert (optimizer.warmup_iterations, optimizer.clipping_start_iteration, start) == (100, 100, 100)
            assert config.student.num_gaussians == 8
            assert distillation.nfe == int(path.stem.split("_")[1].removesuffix("nfe"))
            assert distillation.data_free == path.stem.endswith("data_free")
            guidance = {"flux": (1.0, 3.5), "flux2": (1.0, 4.0), "qwen_image": (4.0, None)}[family]
            assert (distillation.guidance_scale, distillation.embedded_guidance) == guidance
