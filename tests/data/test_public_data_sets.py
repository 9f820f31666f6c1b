"""LSUN, ImageNet and streamed data sets, under the names of public configs."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm.common.errors import UserError
from ldm.data import imagenet, lsun
from ldm.data.base import Txt2ImgIterableBaseDataset
from ldm.data.utils import custom_collate
from ldm.util import instantiate_from_config

KINDS = {"Churches": ("church_outdoor", "churches"), "Bedrooms": ("bedrooms", "bedrooms"), "Cats": ("cat", "cats")}


def save_noise(path: Path, width: int, height: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["Train", "Validation"])
def test_lsun(kind: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, folder = KINDS[kind]
    save_noise(tmp_path / "data" / "lsun" / folder / "a" / "1.png", 24, 17)
    (tmp_path / "data" / "lsun" / f"{name}_{'train' if split == 'Train' else 'val'}.txt").write_text("a/1.png\n")
    monkeypatch.chdir(tmp_path)
    data = instantiate_from_config({"target": f"ldm.data.lsun.LSUN{kind}{split}", "params": {"size": 8}})
    (item,) = (data[index] for index in range(len(data)))
    assert item["relative_file_path_"] == "a/1.png" and item["file_path_"] == f"data/lsun/{folder}/a/1.png"
    square = Image.open(item["file_path_"]).crop((3, 0, 20, 17)).resize((8, 8), Image.Resampling.BICUBIC)
    expected = np.asarray(square) / 127.5 - 1
    is_flipped = not np.allclose(item["image"], expected)
    assert np.allclose(item["image"], expected[:, ::-1] if is_flipped else expected) and item["image"].dtype == "f4"
    assert split == "Train" or not is_flipped


def test_lsun_without_its_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must list the images"):
        lsun.LSUNBase(tmp_path / "none.txt", tmp_path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("n02/b.JPEG", "n01/a.JPEG", "n02/c.JPEG"):
        save_noise(tmp_path / "ILSVRC2012_train" / "data" / name, 40, 20)
    return tmp_path


def test_imagenet(images: Path) -> None:
    target = "ldm.data.imagenet.ImageNetTrain"
    data = instantiate_from_config({"target": target, "params": {"config": {"size": 16}, "data_root": str(images)}})
    items = [data[index] for index in range(3)]
    assert [item["class_label"] for item in items] == [0, 1, 1] and [item["synsets"] for item in items][0] == "n01"
    assert all(item["image"].shape == (16, 16, 3) and "human_label" not in item for item in items)
    assert imagenet.ImageNetTrain(process_images=False, data_root=images)[0].endswith("n01/a.JPEG")


def test_crops_of_imagenet(images: Path) -> None:
    (images / "ILSVRC2012_train" / "synset_human.txt").write_text("n01 tench, Tinca\nn02 goldfish\n")
    center = imagenet.ImageNetTrain(data_root=images, config={"size": 20, "ImageNetTrain/random_crop": False})
    expected = np.asarray(Image.open(center.abspaths[0]).crop((10, 0, 30, 20))) / 127.5 - 1
    assert np.allclose(center[0]["image"], expected) and center[0]["human_label"] == "tench, Tinca"
    at_random = imagenet.ImageNetTrain(data_root=images, config={"size": 20})
    assert len({at_random[0]["image"].tobytes() for _ in range(10)}) > 1


def test_imagenet_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no ImageNet here"):
        imagenet.ImageNetValidation(data_root=tmp_path)
    with pytest.raises(UserError, match="super-resolution"):
        instantiate_from_config({"target": "ldm.data.imagenet.ImageNetSRTrain",
                                 "params": {"size": 256, "degradation": "pil_nearest"}})


def test_a_streamed_data_set() -> None:
    class Stream(Txt2ImgIterableBaseDataset):
        def __iter__(self) -> Iterator[int]:
            yield from self.sample_ids

    data = Stream(num_records=3, valid_ids=[4, 5, 6])
    assert len(data) == 3 and data.size == 256 and torch.cat(list(DataLoader(data))).tolist() == [4, 5, 6]


def test_batches_of_annotated_images() -> None:
    class Annotation(NamedTuple):
        area: float

    items = [{"image": np.zeros((2, 2, 3)), "caption": "a", "boxes": [Annotation(1.0)], "size": (4, 5)},
             {"image": np.ones((2, 2, 3)), "caption": "b", "boxes": [Annotation(2.0), Annotation(3.0)], "size": (6, 7)}]
    batch = custom_collate(items)
    assert batch["image"].shape == (2, 2, 2, 3) and list(batch["caption"]) == ["a", "b"]
    assert batch["boxes"] == [item["boxes"] for item in items]
    assert [sizes.tolist() for sizes in batch["size"]] == [[4, 6], [5, 7]]
