import json

import pytest
import torch

from piflow.digits.classifier import (
    SHIPPED_WEIGHTS,
    ClassifierRecipe,
    accuracy,
    extract,
    load_classifier,
    main,
    train_classifier,
)
from piflow.digits.data import load_digits_images, split_indices


def test_shipped_classifier_recognises_held_out_digits():
    recipe = json.loads((SHIPPED_WEIGHTS / "recipe.json").read_text())["recipe"]
    assert ClassifierRecipe(**recipe) == ClassifierRecipe()
    images, labels = load_digits_images()
    _, held_out = split_indices(len(images), recipe["held_out_fraction"], recipe["split_seed"])
    features, predicted = extract(load_classifier(), images[held_out])
    assert features.shape == (len(held_out), 64)
    assert accuracy(predicted, labels[held_out]) >= 0.97


def test_command_trains_a_classifier_that_loads(tmp_path, capsys):
    main(["--out", str(tmp_path), "--epochs", "12"])
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["recipe"]["epochs"] == 12
    assert recipe["held_out_accuracy"] >= 0.97
    images, labels = load_digits_images()
    assert accuracy(extract(load_classifier(tmp_path), images)[1], labels) >= 0.97
    assert "accuracy" in capsys.readouterr().out


def test_training_is_deterministic_given_the_seed():
    recipe = ClassifierRecipe(epochs=1)
    (a, _), (b, _) = train_classifier(recipe), train_classifier(recipe)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_missing_or_damaged_weights_name_the_file_and_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"classifier\.safetensors.*python -m piflow\.digits\.classifier --out"):
        load_classifier(tmp_path)
    whole = (SHIPPED_WEIGHTS / "classifier.safetensors").read_bytes()
    (tmp_path / "classifier.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot be read.*python -m piflow\.digits\.classifier"):
        load_classifier(tmp_path)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(B, 1, 8, 8\), got \(2, 8, 8\)"):
        load_classifier()(torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match="one shape"):
        accuracy(torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))


def test_failures_end_with_one_message_and_save_nothing(tmp_path, capsys):
    out, file = tmp_path / "classifier", tmp_path / "file"
    file.write_text("mine")
    for target, option, message in [
        (out, ["--epochs", "1", "--learning-rate", "1e30"], "The classifier's loss is nan: lower learning_rate."),
        (out, ["--epochs", "1", "--learning-rate", "1e30", "--batch-size", "1797"], "The classifier's loss is nan"),
        (out, ["--held-out-fraction", "2"], "held_out_fraction must lie between 0 and 1"),
        (out, ["--held-out-fraction", "1e-9"], "leave some of 1797 samples on either side, got 1e-09"),
        (file, [], f"{file} cannot be a folder for the results"),
    ]:
        assert main(["--out", str(target), *option]) == 1
        assert message in capsys.readouterr().err
    assert list(out.iterdir()) == []
    assert file.read_text() == "mine"
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(out), "--epochs", "0"])
    assert "epochs must be at least 1, got 0" in capsys.readouterr().err
