# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The data sets of the experiments: images with values in [0, 1], split for training, validation and test; and JSON."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import struct
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_hollow.experiments.harness import extra

DATASETS = ("digits", "mnist", "omniglot")
BINARIZATIONS = ("static", "dynamic")

#: Where a file comes from, and its SHA-256; None for a file that no one has vouched for.
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
}
STATIC_URL = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
STATIC_FILES = {
    "binarized_mnist_train.amat": "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
    "binarized_mnist_valid.amat": "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
    "binarized_mnist_test.amat": "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
}
#: The same arrays in one file.
STATIC_ARRAYS = "binarized_mnist_static.npz"
OMNIGLOT_URL = "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/"
OMNIGLOT_FILES = ("chardata.mat", "chardata_rebuilt.mat")

#: The seed by which what has to be drawn once for all is drawn.
SEED = 777


class DataError(RuntimeError):
    """Data files that are missing, unreadable or not what they should be."""


#: The errors of numpy and torch for a file that is no NPZ file of numbers.
_UNREADABLE = (
    OSError, ValueError, TypeError, AttributeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Data files in JSON and NPZ, in a folder of the folder that the option --data-dir names."""

    folder: str  #: its name.
    origin: str  #: where the files come from, in words.

    def find(self, data_dir: Path | None, file: str) -> Path:
        """
        The path of a file.

        :raises DataError: if it is missing.
        """
        hint = f"it comes from {self.origin}; name the folder that has {self.folder}/{file} with --data-dir"
        if data_dir is None:
            raise DataError(f"{file} is needed: {hint}")
        path = data_dir / self.folder / file
        if not path.is_file():
            raise DataError(f"{path} is missing: {hint}")
        return path

    def read(self, data_dir: Path | None, file: str, *keys: str) -> list[Tensor]:
        """
        The values of keys in a file, as tensors of the default dtype.

        :raises DataError: if the file is missing, cannot be read, or has not all keys.
        """
        path = self.find(data_dir, file)
        try:
            content = json.loads(path.read_text())
            return [torch.tensor(content[key], dtype=torch.get_default_dtype()) for key in keys]
        except (OSError, ValueError, TypeError, KeyError) as error:
            name = self.origin.partition(" (")[0]
            raise DataError(f"{path} is not a data set of {name} with {', '.join(keys)}: {error!r}") from error

    def read_arrays(self, data_dir: Path | None, file: str, *keys: str) -> dict[str, Tensor]:
        """
        The arrays in a file of numpy's format NPZ, as tensors of the default dtype; all of them without keys.

        :raises DataError: if the file is missing, cannot be read, or has not all keys.
        """
        path = self.find(data_dir, file)
        try:
            with open(path, "rb") as opened, np.load(opened) as arrays:
                return {key: torch.from_numpy(arrays[key]).to(torch.get_default_dtype()) for key in keys or arrays}
        except _UNREADABLE as error:
            raise DataError(f"{path} is not an NPZ file of numbers: {error!r}") from error


@dataclass(frozen=True)
class Images:
    """A data set of images."""

    train: Tensor  #: training images with shape ``(n, height * width)``, the probabilities of ink in [0, 1].
    validation: Tensor  #: validation images, binary.
    test: Tensor  #: test images, binary.
    shape: tuple[int, int]  #: height and width.
    source: str  #: what exactly the images are, in words.


def load_images(name: str, data_dir: str | Path | None = None, binarization: str = "static") -> Images:
    """
    Loads a data set. Images for validation and test that are not binary are binarised once, by a fixed seed.

    "digits" are the 1,797 images of 8 x 8 pixels that scikit-learn ships, in a fixed order of which the last 360 are
    for test and 180 before them for validation. "mnist" are 50,000, 10,000 and 10,000 images of 28 x 28 pixels; the
    static binarisation is that of Salakhutdinov and Murray (2008), or, in a folder that has the four original files
    only, one that is drawn from their grey values. "omniglot" are 28 x 28 pixels in the split of Burda et al. (2016):
    23,000 and 1,345 of its training images in a fixed order, and 8,070 test images.

    :param str name: "digits", "mnist" or "omniglot".
    :param data_dir: the folder with the files, or with a folder of that name that has them; None to download them once.
    :param str binarization: for "mnist", "static", or "dynamic" for grey values, to be binarised anew in each epoch.
    :raises ValueError: for an unknown name or binarisation.
    :raises DataError: for files that are missing, cannot be read, or have another checksum.

    References:

    [1] Ruslan Salakhutdinov, Iain Murray. On the Quantitative Analysis of Deep Belief Networks. ICML 2008

    [2] Yuri Burda, Roger Grosse, Ruslan Salakhutdinov. Importance Weighted Autoencoders. [arXiv:1509.00519]
    """
    if binarization not in BINARIZATIONS:
        raise ValueError(f"binarization must be one of {BINARIZATIONS}, but got {binarization!r}")
    folder = None if data_dir is None else Path(data_dir)
    if name == "digits":
        return _digits()
    if name == "omniglot":
        return _omniglot(folder)
    if name == "mnist":
        return _static_mnist(folder) if binarization == "static" else _mnist(folder)
    raise ValueError(f"name must be one of {DATASETS}, but got {name!r}")


def _digits() -> Images:
    with extra():
        from sklearn.datasets import load_digits

    x = load_digits().data
    x = x[np.random.default_rng(0).permutation(len(x))] / 16
    return _images(x[:-540], x[-540:-360], x[-360:], "scikit-learn's digits, binarised anew in each epoch")


def _mnist(folder: Path | None) -> Images:
    files = [_file("mnist", [name], folder, MNIST_URL, checksum) for name, checksum in MNIST_FILES.items()]
    train, test = (
        read_idx(path, checksum).reshape(-1, 784) / 255
        for path, checksum in zip(files, MNIST_FILES.values(), strict=True)
    )
    cut = len(train) - len(train) // 6
    return _images(train[:cut], train[cut:], test, "MNIST, binarised anew in each epoch")


def _static_mnist(folder: Path | None) -> Images:
    source = "MNIST in the static binarisation of Salakhutdinov and Murray"
    packed, text, grey = (
        folder is not None and _find(name, "mnist", folder) is not None
        for name in (STATIC_ARRAYS, next(iter(STATIC_FILES)), next(iter(MNIST_FILES)))
    )
    if packed:
        path = _file("mnist", [STATIC_ARRAYS], folder)
        try:
            with open(path, "rb") as file, np.load(file) as content:
                return _images(content["train"], content["valid"], content["test"], source)
        except Exception as error:  # of any kind, where the file is damaged
            raise DataError(f"{path} cannot be read: {error}") from error
    if grey and not text:
        images = _mnist(folder)
        train = torch.bernoulli(images.train, generator=torch.Generator().manual_seed(SEED))
        source = f"MNIST, binarised once by seed {SEED}, for want of the static binarisation of the literature"
        return replace(images, train=train, source=source)
    arrays = [_read_amat(name, checksum, folder) for name, checksum in STATIC_FILES.items()]
    return _images(arrays[0], arrays[1], arrays[2], source)


def _read_amat(name: str, checksum: str, folder: Path | None) -> np.ndarray:
    """An array of the digits 0 and 1 in a text, which are every second byte of it."""
    path = _file("mnist", [name], folder, STATIC_URL, checksum)
    content = path.read_bytes()
    actual = hashlib.sha256(content).hexdigest()
    if actual != checksum:
        raise DataError(f"{path} is not the original file: its SHA-256 is {actual}, but should be {checksum}")
    return (np.frombuffer(content, dtype=np.uint8)[::2] - ord("0")).reshape(-1, 784)


def _omniglot(folder: Path | None) -> Images:
    from scipy.io import loadmat

    path = _file("omniglot", OMNIGLOT_FILES, folder, OMNIGLOT_URL)
    rebuilt = ", rebuilt from the released drawings" if path.name == OMNIGLOT_FILES[1] else ""
    try:
        arrays = loadmat(path)
        # One image a column, its pixels in the order of Fortran.
        train, test = (
            arrays[key].T.reshape(-1, 28, 28).swapaxes(1, 2).reshape(-1, 784) for key in ("data", "testdata")
        )
        train = train[np.random.default_rng(SEED).permutation(len(train))]
        cut = len(train) - 1345
        return _images(train[:cut], train[cut:], test, f"OMNIGLOT 28 x 28{rebuilt}, binarised anew in each epoch")
    except Exception as error:  # of any kind, where the file is damaged
        raise DataError(f"{path} is not the MATLAB file of Burda et al.: {error}") from error


def _images(train: np.ndarray, validation: np.ndarray, test: np.ndarray, source: str) -> Images:
    parts = [torch.from_numpy(np.ascontiguousarray(x)).to(torch.get_default_dtype()) for x in (train, validation, test)]
    if not all(((x >= 0) & (x <= 1)).all() for x in parts):
        raise DataError("pixels must be in [0, 1]")
    generator = torch.Generator().manual_seed(SEED)
    validation_images, test_images = (torch.bernoulli(x, generator=generator) for x in parts[1:])
    side = math.isqrt(train.shape[1])
    return Images(parts[0], validation_images, test_images, (side, side), source)


def _find(name: str, dataset: str, folder: Path) -> Path | None:
    return next((path for path in (folder / name, folder / dataset / name) if path.exists()), None)


def _file(
    dataset: str, names: Sequence[str], folder: Path | None, url: str | None = None, checksum: str | None = None
) -> Path:
    """The file of one of these names in the folder, or, without a folder, the first of them from the address."""
    if folder is not None:
        found = next((path for name in names if (path := _find(name, dataset, folder))), None)
        if found is None:
            raise DataError(
                f"{' or '.join(names)} is neither in {folder} nor in {folder / dataset}; without --data-dir it is "
                "downloaded"
            )
        return found
    with extra():
        import pooch

    known, cache = None if checksum is None else f"sha256:{checksum}", pooch.os_cache("pyro_hollow")
    try:
        return Path(pooch.retrieve(f"{url}{names[0]}", known, names[0], path=cache, progressbar=sys.stderr.isatty()))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{names[0]} could not be downloaded from {url} ({error}); get it another way and name its folder with "
            "--data-dir"
        ) from error


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
