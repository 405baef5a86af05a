# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The data sets of the experiments: grey images with values in [0, 1]."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["DATASETS", "DataError", "Images", "load_images", "read_idx"]

DATASETS = ("digits", "mnist")

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
#: SHA-256 of the four original files.
MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}


class DataError(RuntimeError):
    """Data files that are missing, unreadable or not what they should be."""


@dataclass(frozen=True)
class Images:
    """
    A data set of grey images.

    :ivar train: training images with shape ``(n, height * width)`` and values in [0, 1].
    :ivar test: test images, likewise.
    :ivar train_labels: class numbers with shape ``(n,)``.
    :ivar test_labels: class numbers of the test images.
    :ivar shape: height and width.
    """

    train: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor
    shape: tuple[int, int]


def load_images(name: str, data_dir: str | Path | None = None) -> Images:
    """
    Loads a data set.

    :param str name: "digits", the 1,797 images of 8 x 8 pixels that scikit-learn ships, the last 360 of a fixed shuffle
        as test images; or "mnist", 60,000 and 10,000 images of 28 x 28 pixels.
    :param data_dir: the folder with the four IDX files of MNIST, or with a folder "mnist" that has them; None to
        download them once, with a checksum.
    :raises ValueError: for an unknown name.
    :raises DataError: for files that are missing, cannot be read, or have another checksum.
    """
    if name == "digits":
        return _digits()
    if name == "mnist":
        return _mnist(None if data_dir is None else Path(data_dir))
    raise ValueError(f"name must be one of {DATASETS}, but got {name!r}")


def _digits() -> Images:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = torch.from_numpy(images[order] / 16).to(torch.get_default_dtype())
    y = torch.from_numpy(labels[order])
    return Images(x[:-360], x[-360:], y[:-360], y[-360:], (8, 8))


def _mnist(data_dir: Path | None) -> Images:
    arrays = [read_idx(_find(name, data_dir), checksum) for name, checksum in MNIST_FILES.items()]
    train, test = (torch.from_numpy(a).flatten(1).to(torch.get_default_dtype()) / 255 for a in arrays[::2])
    train_labels, test_labels = (torch.from_numpy(a).long() for a in arrays[1::2])
    return Images(train, test, train_labels, test_labels, (28, 28))


def _find(name: str, data_dir: Path | None) -> Path:
    if data_dir is None:
        import pooch

        try:
            return Path(
                pooch.retrieve(
                    MNIST_URL + name, f"sha256:{MNIST_FILES[name]}", name, path=pooch.os_cache("pyro_hollow"),
                    progressbar=True,
                )
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise DataError(
                f"{name} could not be downloaded from {MNIST_URL} ({error}); get the four files of MNIST another way "
                "and name their folder with --data-dir"
            ) from error
    for path in (data_dir / name, data_dir / "mnist" / name):
        if path.exists():
            return path
    raise DataError(f"{name} is neither in {data_dir} nor in {data_dir / 'mnist'}; without --data-dir it is downloaded")


def read_idx(path: Path, checksum: str | None = None) -> np.ndarray:
    """
    Reads an array of bytes from a gzipped file in IDX format.

    :param ~pathlib.Path path: the file.
    :param str checksum: the SHA-256 that the file must have; None not to check.
    :returns: the array, of type uint8.
    :raises DataError: if the file cannot be read, is not in IDX format, is too short or too long, or has another
        checksum; the message tells both checksums.
    """
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    actual = hashlib.sha256(packed).hexdigest()
    told = f"its SHA-256 is {actual}" + (f", but should be {checksum}" if checksum else "")
    try:
        content = gzip.decompress(packed)
        zero, kind, dims = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{dims}I", content, 4)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise DataError(f"{path} is not a complete gzipped IDX file ({error}); {told}") from error
    data = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dims)
    if zero != 0 or kind != 8 or data.size != math.prod(shape):
        raise DataError(
            f"{path} is not an IDX file of bytes with shape {shape}: it holds {data.size} bytes of data; {told}"
        )
    if checksum is not None and actual != checksum:
        raise DataError(f"{path} is not the original file: {told}")
    return data.reshape(shape).copy()
