"""Configuration: what a person mistypes is named, with the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from piflow.training.config import load_config
from piflow.training.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


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
