import subprocess
import sys

import pytest
import torch

from piflow.digits.data import NULL_CLASS, check_labels, load_digits_images, split_indices


def test_images_and_labels():
    images, labels = load_digits_images()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert labels.shape == (1797,)
    assert labels.dtype == torch.int64
    assert labels.unique().tolist() == list(range(10))
    assert torch.equal((images + 1) * 8, ((images + 1) * 8).round())  # the scans' sixteen grey levels


def test_split_is_fixed_disjoint_and_complete():
    train, held_out = split_indices(1797)
    assert len(held_out) == round(1797 * 0.2)
    assert torch.equal(torch.cat([train, held_out]).sort().values, torch.arange(1797))
    assert all(torch.equal(a, b) for a, b in zip(split_indices(1797), (train, held_out)))
    assert not torch.equal(split_indices(1797, seed=1)[1], held_out)
    with pytest.raises(ValueError, match="held_out_fraction"):
        split_indices(10, held_out_fraction=1.0)


@pytest.mark.parametrize("label", [-1, 10, 99])
def test_label_out_of_range_is_named(label):
    with pytest.raises(ValueError, match=rf"label {label} \(position 2\).*valid labels are 0 to 9"):
        check_labels(torch.tensor([0, 9, label]))
    check_labels(torch.tensor([0, 9, NULL_CLASS]), num_classes=NULL_CLASS + 1)


def test_labels_must_be_a_vector_of_integers():
    with pytest.raises(ValueError, match=r"shape \(2, 1\)"):
        check_labels(torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="float32"):
        check_labels(torch.zeros(2))


def test_missing_scikit_learn_names_the_extra():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from piflow.digits.data import load_digits_images\n"
        "try: load_digits_images()\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'piflow[evaluation]'" in result.stdout
