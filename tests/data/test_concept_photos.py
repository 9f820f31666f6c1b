"""The training set of a concept: the contents of its items, and that they depend only on seed, index and epoch."""
from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm.common.errors import UserError
from ldm.data.concept_photos import ConceptPhotos, ConceptScene
from ldm.data.images import crop_square, read_image, to_tensor
from ldm.data.templates import PHOTO, TEMPLATES, get_templates

SIZE = 16


def save_noise(path: Path, width: int, height: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, shape in enumerate([(32, 32), (48, 32), (20, 40)]):
        save_noise(folder / f"{number}.png", *shape, seed=number)
    return folder


@pytest.fixture
def masks(tmp_path: Path, photos: Path) -> Path:
    """Each photo's mask is its own red channel at twice the size, so that both are aligned in every pixel."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for path in photos.iterdir():
        red = read_image(path).getchannel("R")
        red.resize((red.width * 2, red.height * 2), Image.Resampling.NEAREST).save(folder / path.name)
    return folder


def test_items(photos: Path) -> None:
    data = ConceptPhotos(photos, size=SIZE, repeats=4, placeholder_token="<my-teddy>")
    assert len(data) == 12
    assert [path.name for path in data.paths] == ["0.png", "1.png", "2.png"]
    assert not data.has_masks
    for index in range(len(data)):
        item = data[index]
        assert (item["image"].shape, item["image"].dtype) == ((3, SIZE, SIZE), torch.float32)
        assert item["caption"] in {template.replace("{}", "<my-teddy>") for template in PHOTO}
        assert item["mask"].shape == (1, SIZE, SIZE) and item["mask"].eq(1).all()
        expected = to_tensor(crop_square(read_image(data.paths[item["index"]]), SIZE))
        assert torch.equal(item["image"], expected.flip(-1) if item["flipped"] else expected)
    assert [data[index]["index"] for index in range(6)] == [0, 1, 2, 0, 1, 2]
    with pytest.raises(IndexError):
        data[12]


def collected(data: ConceptPhotos, workers: int) -> list[tuple[str, bool, int, float]]:
    loader = DataLoader(data, batch_size=4, num_workers=workers)
    return [row for batch in loader for row in rows_of(batch)]


def rows_of(batch: dict) -> list[tuple[str, bool, int, float]]:
    totals = batch["image"].mul(torch.arange(SIZE)).sum((1, 2, 3)).tolist()
    return list(zip(batch["caption"], batch["flipped"].tolist(), batch["index"].tolist(), totals, strict=True))


def test_items_do_not_depend_on_workers_or_global_generators(photos: Path) -> None:
    def build() -> ConceptPhotos:
        return ConceptPhotos(photos, size=SIZE, repeats=5, seed=7)

    alone = collected(build(), 0)
    torch.manual_seed(99)
    random.seed(99)
    assert collected(build(), 2) == alone
    assert [row[:3] for row in alone] != [row[:3] for row in collected(ConceptPhotos(photos, SIZE, 5, seed=8), 0)]


def test_epochs_differ_and_are_reproducible(photos: Path) -> None:
    data = ConceptPhotos(photos, size=SIZE, repeats=5)
    epochs = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        epochs.append(collected(data, 0))
    assert epochs[0] == epochs[2] != epochs[1]


def test_running_workers_see_a_new_epoch(photos: Path) -> None:
    data = ConceptPhotos(photos, size=SIZE, repeats=4)
    loader = DataLoader(data, batch_size=4, num_workers=1, persistent_workers=True)
    first = [row for batch in loader for row in rows_of(batch)]
    data.set_epoch(1)
    second = [row for batch in loader for row in rows_of(batch)]
    assert second == collected(data, 0) != first


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (1.0, 60)])
def test_flips_never_or_always(photos: Path, probability: float, expected: int) -> None:
    data = ConceptPhotos(photos, size=SIZE, repeats=20, flip_p=probability)
    assert sum(data[index]["flipped"] for index in range(60)) == expected


def test_flips_and_templates_are_uniform(photos: Path) -> None:
    data = ConceptPhotos(photos, size=8, repeats=200)
    items = [data[index] for index in range(600)]
    assert abs(sum(item["flipped"] for item in items) - 300) < 5 * (600 * 0.25) ** 0.5
    assert len({item["caption"] for item in items}) == len(PHOTO)


def test_image_and_mask_stay_aligned(photos: Path, masks: Path) -> None:
    data = ConceptPhotos(photos, size=SIZE, repeats=10, mask_root=masks)
    assert data.has_masks
    flips = set()
    for index in range(len(data)):
        item = data[index]
        red = (item["image"][:1] + 1) / 2
        assert item["mask"].amax() == 1 and item["mask"].amin() >= 0
        assert torch.corrcoef(torch.stack([red.ravel(), item["mask"].ravel()]))[0, 1] > 0.95
        flips.add(item["flipped"])
    assert flips == {False, True}


def half(shape: tuple[int, int], axis: int) -> torch.Tensor:
    """Return a mask (h, w) whose second half along an axis is 1."""
    mask = torch.zeros(shape)
    mask.narrow(axis, shape[axis] // 2, shape[axis] - shape[axis] // 2).fill_(1)
    return mask


def test_masks_of_whole_photos_move_the_crop(photos: Path) -> None:
    data = ConceptPhotos(photos, size=SIZE, repeats=8)
    tall = torch.zeros(40, 20)
    tall[26:, 4:18] = 1
    data.set_subject_masks([torch.ones(32, 32), half((32, 48), 1), tall])
    assert not data.left_out
    photo = read_image(data.paths[2])
    assert data.images[2].tobytes() == photo.resize(
        (SIZE, SIZE), Image.Resampling.LANCZOS, box=(0, 20, 20, 40)).tobytes()
    for index in range(len(data)):
        item = data[index]
        mask = item["mask"].flip(-1) if item["flipped"] else item["mask"]
        assert torch.equal(mask, data.mask(item["index"])) and mask.max() == 1
    assert data.mask(2)[0, 6:, 4:12].min() > 0.9 and data.mask(2)[0, :3].max() < 0.1


def test_photos_without_the_subject_are_left_out(photos: Path) -> None:
    data = ConceptPhotos(photos, size=SIZE, repeats=8)
    data.set_subject_masks([None, half((32, 48), 1), None])
    assert list(data.left_out) == ["0.png", "2.png"]
    assert [path.name for path in data.paths] == ["1.png"] and len(data) == 8 and len(data.images) == 1
    other = ConceptPhotos(photos, size=SIZE, repeats=8)
    before = [image.tobytes() for image in other.images]
    other.set_subject_masks([None] * 3)
    assert not other.left_out and len(other) == 24 and not other.has_masks
    assert [image.tobytes() for image in other.images] == before


def test_center_crops_keep_the_center(photos: Path) -> None:
    data = ConceptPhotos(photos, size=SIZE, crop="center")
    data.set_subject_masks([torch.ones(32, 32), torch.ones(32, 48), half((40, 20), 0)])
    assert data.images[2].tobytes() == crop_square(read_image(data.paths[2]), SIZE).tobytes()
    assert data.mask(2)[0, :6].max() < 0.1


@pytest.mark.parametrize("wrong", [torch.ones(1, 4, 4), torch.full((4, 4), 1.5), torch.full((4, 4), torch.nan)])
def test_masks_of_another_kind_are_refused(photos: Path, wrong: torch.Tensor) -> None:
    data = ConceptPhotos(photos, size=SIZE)
    with pytest.raises(ValueError, match="mask"):
        data.set_subject_masks([torch.ones(4, 4), wrong, None])
    with pytest.raises(ValueError, match="masks for 3 photos"):
        data.set_subject_masks([torch.ones(4, 4)])


def test_notes_become_part_of_the_captions(photos: Path) -> None:
    (photos / "0.txt").write_text("next to a blue mug")
    (photos / "1.txt").write_text("my <teddy> in a box")
    data = ConceptPhotos(photos, size=SIZE, repeats=30, placeholder_token="<teddy>", templates=["a {}", "one {}"])
    captions = {index: {data[item]["caption"] for item in range(index, 90, 3)} for index in range(3)}
    assert captions[0] == {"a <teddy>, next to a blue mug", "one <teddy>, next to a blue mug"}
    assert captions[1] == {"my <teddy> in a box"} and captions[2] == {"a <teddy>", "one <teddy>"}
    assert {prompt.replace("{}", "<teddy>") for prompt in data.prompts} == set().union(*captions.values())


def test_label_maps_are_masks_too(photos: Path, tmp_path: Path) -> None:
    for path in photos.iterdir():
        with Image.open(path) as photo:
            labels = Image.new("L", photo.size, 0)
        labels.paste(1, (0, 0, labels.width, labels.height // 2))
        (tmp_path / "labels").mkdir(exist_ok=True)
        labels.save(tmp_path / "labels" / f"{path.stem}.bmp")
    mask = ConceptPhotos(photos, size=SIZE, mask_root=tmp_path / "labels").mask(0)
    assert mask[0, :6].eq(1).all() and mask[0, 10:].eq(0).all()


def spoil_missing(folder: Path) -> None:
    (folder / "1.png").unlink()


def spoil_black(folder: Path) -> None:
    Image.new("L", (48, 32)).save(folder / "1.png")


def spoil_aspect(folder: Path) -> None:
    Image.new("L", (32, 48), 255).save(folder / "1.png")


def spoil_bytes(folder: Path) -> None:
    (folder / "1.png").write_bytes(b"nothing")


@pytest.mark.parametrize("spoil", [spoil_missing, spoil_black, spoil_aspect, spoil_bytes])
def test_unusable_masks_are_named(photos: Path, masks: Path, spoil: Callable[[Path], None]) -> None:
    spoil(masks)
    with pytest.raises(UserError, match="1.png"):
        ConceptPhotos(photos, size=SIZE, mask_root=masks)


@pytest.mark.parametrize(
    ("name", "value"),
    [("size", 0), ("repeats", 0), ("flip_p", 1.5), ("placeholder_token", " "), ("templates", "poetry"),
     ("templates", []), ("templates", ["a photo"]), ("templates", ["a {} and a {}"])],
)
def test_params_out_of_range_are_named(photos: Path, name: str, value: object) -> None:
    with pytest.raises(UserError, match=name):
        ConceptPhotos(photos, **{name: value})


def test_templates_of_a_list(photos: Path) -> None:
    data = ConceptPhotos(photos, size=SIZE, repeats=1, templates=["{odd} {}"], placeholder_token="<{}>")
    assert data[0]["caption"] == "{odd} <{}>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_sets(name: str) -> None:
    templates = get_templates(name)
    assert len(set(templates)) == len(templates) >= 4
    assert all(template.count("{}") == 1 and len(template.split()) < 12 for template in templates)
    assert get_templates(list(templates)) == templates


@pytest.mark.parametrize(("shape", "scale"), [((48, 32), 0.5), ((20, 40), 0.8), ((512, 320), 0.05)])
def test_sizes_of_center_crops(tmp_path: Path, shape: tuple[int, int], scale: float) -> None:
    """What public trainers compute: resize so that the shorter side is the size, mirror, crop the center."""
    save_noise(tmp_path / "photo.png", *shape, seed=0)
    width, height = round(shape[0] * scale), round(shape[1] * scale)
    corner = [round((height - SIZE) / 2), round((width - SIZE) / 2)]
    expected = [shape[1], shape[0], *corner, SIZE, SIZE]
    assert ConceptPhotos(tmp_path, size=SIZE).sizes(0).tolist() == [expected, expected]


def test_sizes_of_crops_around_the_subject(photos: Path) -> None:
    data = ConceptPhotos(photos, size=SIZE)
    corner = torch.zeros(32, 48)
    corner[12:22, 2:14] = 1
    data.set_subject_masks([torch.ones(32, 32), corner, torch.ones(40, 20)])
    # A square of 16 pixels from (9, 0) on: nothing is resized. Mirrored, it is 48 - 16 pixels from the left.
    assert data.sizes(1).tolist() == [[32, 48, 9, 0, SIZE, SIZE], [32, 48, 9, 32, SIZE, SIZE]]
    assert data.sizes(0).tolist() == [[32, 32, 0, 0, SIZE, SIZE]] * 2


def test_every_other_item_is_a_scene(photos: Path) -> None:
    data = ConceptPhotos(photos, size=SIZE, repeats=8, flip_p=0.0, placeholder_token="<it>")
    before = data.prompts
    scenes = [ConceptScene(Image.new("RGB", (SIZE, SIZE), (value, 0, 0)), torch.full((1, SIZE, SIZE), 0.5),
                           f"a photo of a {{}} next to a {name}") for value, name in ((10, "mug"), (20, "car"))]
    data.add_scenes(scenes)
    assert len(data) == 40 and data.scene_count == 2 and len(data.photos) == 3
    assert [data[index]["index"] for index in range(8)] == [0, 3, 1, 4, 2, 3, 0, 4]
    for index in (1, 3):
        item, scene = data[index], scenes[index // 2]
        assert torch.equal(item["image"], to_tensor(scene.image)) and torch.equal(item["mask"], scene.mask)
        assert item["caption"] == scene.caption.replace("{}", "<it>")
    assert set(data.prompts) == {*before, scenes[0].caption, scenes[1].caption}
    assert data.sizes(4).tolist() == [[SIZE, SIZE, 0, 0, SIZE, SIZE]] * 2
    assert len(data.cropped_shares()) == 3
