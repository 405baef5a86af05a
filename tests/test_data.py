# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import gzip
import hashlib
import struct

import numpy as np
import pooch
import pytest
import torch

from pyro_hollow.experiments import data
from pyro_hollow.experiments.data import DATASETS, MNIST_FILES, DataError, load_images, read_idx

ARRAYS = {
    "images": np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4),
    "labels": np.array([7, 0, 255, 3], dtype=np.uint8),
    "nothing": np.zeros((0, 28, 28), dtype=np.uint8),
}
IMAGES = ARRAYS["images"]


def idx(array, zero=0, kind=8):
    return struct.pack(f">HBB{array.ndim}I", zero, kind, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS.keys())
def test_idx_round_trip(array, tmp_path):
    content = gzip.compress(idx(array))
    path = tmp_path / "array.gz"
    path.write_bytes(content)
    read = read_idx(path, hashlib.sha256(content).hexdigest())
    assert read.dtype == np.uint8 and read.shape == array.shape
    assert (read == array).all()
    assert read.flags.writeable


# Contents of a file, and what the message says of it.
BROKEN = {
    "first bytes are not zero": (gzip.compress(idx(IMAGES, zero=1)), "not an IDX file"),
    "not of bytes": (gzip.compress(idx(IMAGES, kind=13)), "not an IDX file"),
    "truncated gzip": (gzip.compress(idx(IMAGES))[:-12], "not a complete gzipped IDX file"),
    "damaged gzip": (gzip.compress(idx(IMAGES))[:-8] + b"12345678", "not a complete gzipped IDX file"),
    "truncated header": (gzip.compress(idx(IMAGES)[:9]), "not a complete gzipped IDX file"),
    "truncated data": (gzip.compress(idx(IMAGES)[:-1]), "23 bytes"),
    "more data": (gzip.compress(idx(IMAGES) + b"1"), "25 bytes"),
    "not gzipped": (idx(IMAGES), "not a complete gzipped IDX file"),
    "a web page": (b"<html>not found</html>", "not a complete gzipped IDX file"),
    "absurd shape": (gzip.compress(struct.pack(">HBB4I", 0, 8, 4, *[2**16] * 4)), "not an IDX file"),
    "empty": (b"", "not a complete gzipped IDX file"),
    "nothing inside": (gzip.compress(b""), "not a complete gzipped IDX file"),
}


@pytest.mark.parametrize("content_and_reason", BROKEN.values(), ids=BROKEN.keys())
def test_broken_files_are_named(content_and_reason, tmp_path):
    content, reason = content_and_reason
    path = tmp_path / "broken.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as raised:
        read_idx(path)
    assert str(path) in str(raised.value)


def test_wrong_checksum_is_told_with_the_right_one(tmp_path):
    content = gzip.compress(idx(IMAGES))
    path = tmp_path / "array.gz"
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        read_idx(path, "0123abcd")
    for told in (str(path), hashlib.sha256(content).hexdigest(), "0123abcd"):
        assert told in str(raised.value)


@pytest.mark.parametrize("make", (lambda path: None, lambda path: path.mkdir()), ids=("missing", "a folder"))
def test_files_that_cannot_be_read(make, tmp_path):
    path = tmp_path / "array.gz"
    make(path)
    with pytest.raises(DataError, match="array.gz cannot be read"):
        read_idx(path)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("float32", "float64"))
def test_digits(dtype):
    torch.set_default_dtype(dtype)
    images = load_images("digits")
    assert images.shape == (8, 8)
    assert images.train.shape == (1437, 64) and images.test.shape == (360, 64)
    for x, labels in ((images.train, images.train_labels), (images.test, images.test_labels)):
        assert x.dtype == dtype
        assert x.min() == 0 and x.max() == 1
        assert labels.shape == (len(x),)
        assert labels.unique().tolist() == list(range(10))


def test_digits_are_split_without_loss():
    from sklearn.datasets import load_digits

    images = load_images("digits")
    split = np.column_stack(
        [torch.cat([images.train, images.test]), torch.cat([images.train_labels, images.test_labels])]
    )
    x, labels = load_digits(return_X_y=True)
    # All rows differ: what is in the training images is not in the test images.
    whole = np.unique(np.column_stack([x / 16, labels]), axis=0)
    assert len(whole) == len(split)
    assert (np.unique(split, axis=0) == whole).all()


def test_digits_are_the_same_every_time():
    first = load_images("digits")
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(first.test, load_images("digits").test)


def test_unknown_name():
    with pytest.raises(ValueError, match="cifar") as raised:
        load_images("cifar")
    assert all(name in str(raised.value) for name in DATASETS)


@pytest.mark.parametrize("folder", (".", "not there"), ids=("empty folder", "missing folder"))
def test_missing_files_of_mnist_are_named(folder, tmp_path):
    with pytest.raises(DataError) as raised:
        load_images("mnist", tmp_path / folder)
    assert str(tmp_path / folder) in str(raised.value)
    assert "train-images-idx3-ubyte.gz" in str(raised.value)


def small_mnist(folder, monkeypatch):
    """Writes four small files in the place of those of MNIST, with checksums to match."""
    checksums = {}
    for name, count in zip(MNIST_FILES, (5, 5, 2, 2), strict=True):
        shape = (count, 28, 28) if "images" in name else (count,)
        content = gzip.compress(idx(np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)))
        (folder / name).write_bytes(content)
        checksums[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(data, "MNIST_FILES", checksums)


@pytest.mark.parametrize("subfolder", (".", "mnist"), ids=("folder itself", "folder mnist in it"))
def test_files_like_those_of_mnist(subfolder, tmp_path, monkeypatch):
    folder = tmp_path / subfolder
    folder.mkdir(exist_ok=True)
    small_mnist(folder, monkeypatch)
    images = load_images("mnist", str(tmp_path))
    assert images.train.shape == (5, 784) and images.test.shape == (2, 784)
    assert images.shape == (28, 28)
    assert torch.allclose(255 * images.train.flatten(), (torch.arange(5 * 784) % 256).double())
    assert images.train_labels.tolist() == [0, 1, 2, 3, 4]
    assert images.test_labels.tolist() == [0, 1]


def test_other_files_of_the_same_name_are_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        small_mnist(tmp_path, patched)
    with pytest.raises(DataError, match=MNIST_FILES["train-images-idx3-ubyte.gz"]):
        load_images("mnist", tmp_path)


def test_download_uses_address_and_checksum(tmp_path, monkeypatch):
    small_mnist(tmp_path, monkeypatch)
    asked = []

    def retrieve(url, known_hash, fname, **kwargs):
        asked.append((url, known_hash))
        return str(tmp_path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert load_images("mnist").train.shape == (5, 784)
    assert asked == [(data.MNIST_URL + name, f"sha256:{value}") for name, value in data.MNIST_FILES.items()]


@pytest.mark.parametrize(
    "error", (OSError("no network"), ValueError("hash of downloaded file")), ids=("network", "hash")
)
def test_failed_download_tells_what_to_do(error, monkeypatch):
    def retrieve(*args, **kwargs):
        raise error

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(DataError, match="--data-dir") as raised:
        load_images("mnist")
    assert str(error) in str(raised.value)


def test_mnist(data_dir):
    torch.set_default_dtype(torch.float32)
    images = load_images("mnist", data_dir)
    assert images.train.shape == (60_000, 784) and images.test.shape == (10_000, 784)
    assert abs(images.train.mean(dtype=torch.float64) - 33.3184 / 255) < 1e-4
    assert abs(images.test.mean(dtype=torch.float64) - 33.7912 / 255) < 1e-4
    assert images.train.min() == 0 and images.train.max() == 1
    train = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert images.train_labels.bincount().tolist() == train
    assert images.test_labels.bincount().tolist() == test
