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
from pyro_hollow.experiments.data import (
    DATASETS,
    MNIST_FILES,
    OMNIGLOT_FILES,
    STATIC_FILES,
    DataError,
    load_images,
    read_idx,
)

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


def test_unknown_name_and_binarization():
    with pytest.raises(ValueError, match="cifar") as raised:
        load_images("cifar")
    assert all(name in str(raised.value) for name in DATASETS)
    with pytest.raises(ValueError, match="binarization must be one of .*'dynamic'.* but got 'none'"):
        load_images("mnist", binarization="none")


def check_binary(x):
    assert ((x == 0) | (x == 1)).all()


# Digits


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("float32", "float64"))
def test_digits(dtype):
    torch.set_default_dtype(dtype)
    images = load_images("digits")
    assert images.shape == (8, 8)
    assert [len(x) for x in (images.train, images.validation, images.test)] == [1257, 180, 360]
    assert all(x.dtype == dtype and x.shape[1] == 64 for x in (images.train, images.validation, images.test))
    assert images.train.min() == 0 and images.train.max() == 1
    check_binary(images.validation)
    check_binary(images.test)
    assert "digits" in images.source and "anew" in images.source


def test_digits_are_split_without_loss(monkeypatch):
    """Images are told apart by their grey values, before those for validation and test are binarised."""
    from sklearn.datasets import load_digits

    monkeypatch.setattr(torch, "bernoulli", lambda x, generator=None: x)
    images = load_images("digits")
    split = torch.cat([images.train, images.validation, images.test])
    # All rows differ: what is in one part is in no other.
    whole = np.unique(load_digits().data / 16, axis=0)
    assert len(whole) == len(split)
    assert (np.unique(split, axis=0) == whole).all()


def test_digits_are_the_same_every_time():
    first = load_images("digits")
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state()
    second = load_images("digits")
    assert torch.equal(torch.get_rng_state(), before)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(first, part), getattr(second, part))


# MNIST


def grey(count, start=0):
    return (np.arange(start, start + count * 784) % 256).astype(np.uint8).reshape(count, 28, 28)


def small_mnist(folder, monkeypatch):
    """Writes two small files in the place of those of MNIST, with checksums to match."""
    checksums = {}
    for name, count in zip(MNIST_FILES, (12, 3), strict=True):
        content = gzip.compress(idx(grey(count)))
        (folder / name).write_bytes(content)
        checksums[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(data, "MNIST_FILES", checksums)


def bits(count, seed):
    return np.random.default_rng(seed).integers(0, 2, size=(count, 784), dtype=np.uint8)


STATIC = {"train": bits(5, 0), "valid": bits(3, 1), "test": bits(2, 2)}


def small_static_texts(folder, monkeypatch):
    checksums = {}
    for name, array in zip(STATIC_FILES, STATIC.values(), strict=True):
        content = "".join(" ".join(map(str, row)) + "\n" for row in array).encode()
        (folder / name).write_bytes(content)
        checksums[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(data, "STATIC_FILES", checksums)


def small_static_arrays(folder, monkeypatch):
    np.savez_compressed(folder / data.STATIC_ARRAYS, **STATIC)


subfolders = pytest.mark.parametrize("subfolder", (".", "mnist"), ids=("folder itself", "folder mnist in it"))


@subfolders
def test_dynamic_mnist(subfolder, tmp_path, monkeypatch):
    folder = tmp_path / subfolder
    folder.mkdir(exist_ok=True)
    small_mnist(folder, monkeypatch)
    images = load_images("mnist", str(tmp_path), "dynamic")
    assert images.shape == (28, 28)
    # The last sixth of the training images is for validation.
    assert torch.allclose(255 * images.train, torch.from_numpy(grey(10).reshape(-1, 784)).double())
    for part, whole in (("validation", grey(12)[10:]), ("test", grey(3))):
        x = getattr(images, part)
        assert x.shape == (len(whole), 784)
        check_binary(x)
        assert not x.flatten()[whole.flatten() == 0].any() and x.flatten()[whole.flatten() == 255].all()
    assert "anew" in images.source


@subfolders
@pytest.mark.parametrize("write", (small_static_texts, small_static_arrays))
def test_static_mnist(write, subfolder, tmp_path, monkeypatch):
    folder = tmp_path / subfolder
    folder.mkdir(exist_ok=True)
    small_mnist(folder, monkeypatch)  # which is not what is wanted
    write(folder, monkeypatch)
    images = load_images("mnist", tmp_path)
    for x, expected in zip((images.train, images.validation, images.test), STATIC.values(), strict=True):
        assert torch.equal(x, torch.from_numpy(expected).double())
    assert images.shape == (28, 28)
    assert "static" in images.source and "Salakhutdinov" in images.source


def test_dynamic_mnist_does_not_take_static_arrays(tmp_path, monkeypatch):
    small_mnist(tmp_path, monkeypatch)
    small_static_arrays(tmp_path, monkeypatch)
    assert len(load_images("mnist", tmp_path, "dynamic").train) == 10


def test_static_mnist_from_grey_values(tmp_path, monkeypatch):
    small_mnist(tmp_path, monkeypatch)
    images = load_images("mnist", tmp_path)
    dynamic = load_images("mnist", tmp_path, "dynamic")
    check_binary(images.train)
    assert images.train.shape == (10, 784)
    assert not images.train[dynamic.train == 0].any() and images.train[dynamic.train == 1].all()
    assert abs((images.train - dynamic.train).mean()) < 0.03
    assert torch.equal(images.validation, dynamic.validation) and torch.equal(images.test, dynamic.test)
    # Said, and the same every time.
    assert f"once by seed {data.SEED}" in images.source and "for want of" in images.source
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert torch.equal(load_images("mnist", tmp_path).train, images.train)
    assert torch.equal(torch.get_rng_state(), before)


MISSING = {
    "static": ("mnist", "static", "binarized_mnist_train.amat"),
    "dynamic": ("mnist", "dynamic", "train-images-idx3-ubyte.gz"),
    "omniglot": ("omniglot", "static", "chardata.mat or chardata_rebuilt.mat"),
}


@pytest.mark.parametrize("folder", (".", "not there"), ids=("empty folder", "missing folder"))
@pytest.mark.parametrize("case", MISSING.values(), ids=MISSING.keys())
def test_missing_files_are_named(case, folder, tmp_path):
    name, binarization, told = case
    with pytest.raises(DataError) as raised:
        load_images(name, tmp_path / folder, binarization)
    for words in (told, str(tmp_path / folder), "--data-dir"):
        assert words in str(raised.value)


@pytest.mark.parametrize("which", range(3))
def test_missing_part_of_the_static_texts_is_named(which, tmp_path, monkeypatch):
    small_static_texts(tmp_path, monkeypatch)
    name = list(STATIC_FILES)[which]
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=name):
        load_images("mnist", tmp_path)


def test_other_files_of_the_same_name_are_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        small_mnist(tmp_path, patched)
    with pytest.raises(DataError, match=MNIST_FILES["train-images-idx3-ubyte.gz"]):
        load_images("mnist", tmp_path, "dynamic")
    with monkeypatch.context() as patched:
        small_static_texts(tmp_path, patched)
    with pytest.raises(DataError, match=STATIC_FILES["binarized_mnist_train.amat"]) as raised:
        load_images("mnist", tmp_path)
    assert str(tmp_path / "binarized_mnist_train.amat") in str(raised.value)


def truncate(content):
    return content[: len(content) // 2]


def damage(content):
    middle = len(content) // 2
    return content[:middle] + bytes(255 - byte for byte in content[middle : middle + 64]) + content[middle + 64 :]


spoilers = pytest.mark.parametrize(
    "spoil",
    (truncate, damage, lambda content: b"", lambda content: b"<html>not found</html>", lambda content: content[:3]),
    ids=("truncated", "damaged", "empty", "a web page", "three bytes"),
)


@spoilers
def test_corrupt_static_arrays_are_named(spoil, tmp_path):
    path = tmp_path / data.STATIC_ARRAYS
    np.savez_compressed(path, **STATIC)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match="cannot be read") as raised:
        load_images("mnist", tmp_path)
    assert str(path) in str(raised.value)


def test_static_arrays_of_other_values_are_refused(tmp_path):
    np.savez(tmp_path / data.STATIC_ARRAYS, **{**STATIC, "train": 255 * STATIC["train"]})
    with pytest.raises(DataError, match=r"cannot be read: pixels must be in \[0, 1\]"):
        load_images("mnist", tmp_path)


def test_static_arrays_without_a_part_are_named(tmp_path):
    np.savez(tmp_path / data.STATIC_ARRAYS, train=STATIC["train"], test=STATIC["test"])
    with pytest.raises(DataError, match="valid"):
        load_images("mnist", tmp_path)


# OMNIGLOT


def small_omniglot(path):
    """As the original: an image a column, its pixels column by column. Each has a bar in its uppermost row."""
    from scipy.io import savemat

    pictures = np.zeros((1350, 28, 28))
    pictures[:, 0, 3:20] = 1.0
    pictures[np.arange(1350), 5, np.arange(1350) % 28] = 0.25  # so that not all are the same
    columns = pictures.transpose(0, 2, 1).reshape(1350, 784).T
    savemat(path, {"data": columns, "testdata": columns[:, :4]})
    return pictures.reshape(1350, 784)


@pytest.mark.parametrize("name", OMNIGLOT_FILES)
@pytest.mark.parametrize("subfolder", (".", "omniglot"), ids=("folder itself", "folder omniglot in it"))
def test_omniglot(name, subfolder, tmp_path):
    folder = tmp_path / subfolder
    folder.mkdir(exist_ok=True)
    pictures = torch.from_numpy(small_omniglot(folder / name))
    images = load_images("omniglot", tmp_path)
    assert images.shape == (28, 28)
    assert images.train.shape == (5, 784) and images.validation.shape == (1345, 784) and images.test.shape == (4, 784)
    upright = images.train.view(-1, 28, 28)
    assert (upright[:, 0, 3:20] == 1).all() and upright.sum((1, 2)).tolist() == [17.25] * 5
    check_binary(images.validation)
    check_binary(images.test)
    assert torch.equal(images.test[:, :28], pictures[:4, :28])
    assert ("rebuilt" in images.source) == ("rebuilt" in name)
    assert torch.equal(load_images("omniglot", tmp_path).train, images.train)


def test_omniglot_is_shuffled_without_loss(tmp_path, monkeypatch):
    pictures = small_omniglot(tmp_path / "chardata.mat")
    monkeypatch.setattr(torch, "bernoulli", lambda x, generator=None: x)
    images = load_images("omniglot", tmp_path)
    split = torch.cat([images.train, images.validation]).numpy()
    assert not (split == pictures).all()
    assert (np.unique(split, axis=0, return_counts=True)[1] == np.unique(pictures, axis=0, return_counts=True)[1]).all()


def test_original_omniglot_comes_before_the_rebuilt_one(tmp_path):
    for name in OMNIGLOT_FILES:
        small_omniglot(tmp_path / name)
    assert "rebuilt" not in load_images("omniglot", tmp_path).source


@spoilers
def test_corrupt_omniglot_is_named(spoil, tmp_path):
    path = tmp_path / "chardata.mat"
    small_omniglot(path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match="is not the MATLAB file of Burda et al.") as raised:
        load_images("omniglot", tmp_path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    "content", ({"data": np.zeros((784, 1350))}, {"data": np.zeros((7, 5)), "testdata": np.zeros((7, 5))})
)
def test_other_matlab_files_are_refused(content, tmp_path):
    from scipy.io import savemat

    savemat(tmp_path / "chardata.mat", content)
    with pytest.raises(DataError, match="is not the MATLAB file of Burda et al."):
        load_images("omniglot", tmp_path)


# Download


DOWNLOADS = {
    "static": ("mnist", "static", "STATIC_URL", "STATIC_FILES"),
    "dynamic": ("mnist", "dynamic", "MNIST_URL", "MNIST_FILES"),
    "omniglot": ("omniglot", "static", "OMNIGLOT_URL", None),
}


@pytest.mark.parametrize("case", DOWNLOADS.values(), ids=DOWNLOADS.keys())
def test_download_uses_address_and_checksum(case, tmp_path, monkeypatch):
    name, binarization, url, files = case
    small_mnist(tmp_path, monkeypatch)
    small_static_texts(tmp_path, monkeypatch)
    small_omniglot(tmp_path / "chardata.mat")
    asked = []

    def retrieve(url, known_hash, fname, **kwargs):
        asked.append((url, known_hash))
        return str(tmp_path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    images = load_images(name, None, binarization)
    assert torch.equal(images.train, load_images(name, tmp_path, binarization).train)
    known = {"chardata.mat": None} if files is None else {n: f"sha256:{h}" for n, h in getattr(data, files).items()}
    assert asked == [(getattr(data, url) + name, checksum) for name, checksum in known.items()]


@pytest.mark.parametrize(
    "error", (OSError("no network"), ValueError("hash of downloaded file")), ids=("network", "hash")
)
@pytest.mark.parametrize("case", DOWNLOADS.values(), ids=DOWNLOADS.keys())
def test_failed_download_tells_what_to_do(case, error, monkeypatch):
    def retrieve(*args, **kwargs):
        raise error

    name, binarization, url, _ = case
    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(DataError, match="--data-dir") as raised:
        load_images(name, None, binarization)
    assert str(error) in str(raised.value) and getattr(data, url) in str(raised.value)


# Real data


def check_real(images, counts):
    assert images.shape == (28, 28)
    assert tuple(len(x) for x in (images.train, images.validation, images.test)) == counts
    assert images.train.min() == 0 and images.train.max() == 1
    check_binary(images.validation)
    check_binary(images.test)


def test_real_mnist(data_dir):
    torch.set_default_dtype(torch.float32)
    images = load_images("mnist", data_dir, "dynamic")
    check_real(images, (50_000, 10_000, 10_000))
    assert abs(images.train.mean(dtype=torch.float64) - 0.1306) < 2e-3
    assert abs(images.test.mean(dtype=torch.float64) - 33.7912 / 255) < 1e-3


def test_real_static_mnist(data_dir):
    torch.set_default_dtype(torch.float32)
    images = load_images("mnist", data_dir)
    check_real(images, (50_000, 10_000, 10_000))
    check_binary(images.train)
    assert "for want of" not in images.source
    # Drawn from the grey values, so the same on average.
    grey = load_images("mnist", data_dir, "dynamic")
    for part in ("train", "validation", "test"):
        assert abs(getattr(images, part).mean(0) - getattr(grey, part).mean(0)).max() < 0.05


def test_real_omniglot(data_dir):
    torch.set_default_dtype(torch.float32)
    images = load_images("omniglot", data_dir)
    check_real(images, (23_000, 1345, 8070))
    # Grey, and not yet binarised.
    assert 0.01 < ((images.train > 0) & (images.train < 1)).double().mean() < 0.5
