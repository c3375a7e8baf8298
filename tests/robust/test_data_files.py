"""Claims about a user's own data: image folders, CSV tables and NumPy archives."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from robust.data import load_data
from robust.data.base import check_labels
from robust.errors import DataError
from tests.robust.pictures import Trap, fails, folder, picture, save

# Image folders


def test_image_folder_is_read_round_robin_with_exact_pixels(tmp_path: Path) -> None:
    data = load_data(f"imagefolder:{folder(tmp_path, {'ant': 3, 'bee': 1, 'cat': 2})}")
    assert (data.classes, data.shape, len(data)) == (("ant", "bee", "cat"), (3, 6, 5), 6)
    assert data.labels.tolist() == [0, 1, 2, 0, 2, 0]
    for row, value in enumerate((0, 100, 200, 1, 201, 2)):
        expected = torch.from_numpy(picture(value)).permute(2, 0, 1).float() / 255
        assert torch.equal(data[row][0], expected)


def test_image_folder_agrees_with_torchvision(tmp_path: Path) -> None:
    from torchvision import datasets, transforms

    folder(tmp_path, {"b": 2, "a": 2})
    theirs = datasets.ImageFolder(str(tmp_path), transforms.ToTensor())
    ours = load_data(f"imagefolder:{tmp_path}")
    assert list(ours.classes) == theirs.classes
    for row, other in enumerate((0, 2, 1, 3)):
        assert torch.equal(ours[row][0], theirs[other][0])
        assert ours[row][1] == theirs[other][1]


@pytest.mark.parametrize(
    ("suffix", "options"), [("webp", {"lossless": True}), ("bmp", {}), ("png", {}), ("tiff", {}), ("ppm", {})]
)
def test_every_lossless_format_gives_the_same_pixels(
    tmp_path: Path, suffix: str, options: dict[str, Any]
) -> None:
    pixels = save(tmp_path / "a" / f"x.{suffix}", 7, **options)
    x, _ = load_data(f"imagefolder:{tmp_path}")[0]
    assert torch.equal((x * 255).round().to(torch.uint8), torch.from_numpy(pixels).permute(2, 0, 1))


def test_grey_images_have_one_channel_and_mix_into_coloured_ones(tmp_path: Path) -> None:
    grey = save(tmp_path / "grey" / "a" / "x.png", 1, (6, 5))
    x, _ = load_data(f"imagefolder:{tmp_path / 'grey'}")[0]
    assert torch.equal(x, torch.from_numpy(grey)[None].float() / 255)
    save(tmp_path / "mixed" / "a" / "0.png", 1)
    save(tmp_path / "mixed" / "a" / "1.png", 2, (6, 5))
    x, _ = load_data(f"imagefolder:{tmp_path / 'mixed'}")[1]
    assert torch.equal(x[0], x[2])


def test_transparency_is_dropped(tmp_path: Path) -> None:
    pixels = save(tmp_path / "a" / "x.png", 3, (6, 5, 4))
    x, _ = load_data(f"imagefolder:{tmp_path}")[0]
    assert torch.equal(x, torch.from_numpy(pixels[:, :, :3].copy()).permute(2, 0, 1).float() / 255)


def test_hidden_and_other_files_are_left_out(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 2})
    for name in ("a/.hidden.png", "a/notes.txt", "readme.txt", ".cache/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    assert len(load_data(f"imagefolder:{tmp_path}")) == 2


def test_images_are_read_from_disk_when_they_are_asked_for(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 3})
    data = load_data(f"imagefolder:{tmp_path}")
    before = data[1][0]
    replaced = save(tmp_path / "a" / "001.png", 55)
    assert not torch.equal(before, data[1][0])
    assert torch.equal(
        (data[1][0] * 255).round().to(torch.uint8), torch.from_numpy(replaced).permute(2, 0, 1)
    )
    (tmp_path / "a" / "001.png").unlink()
    with pytest.raises(DataError, match=r"001\.png does not exist"):
        data[1]


def test_only_the_first_n_files_matter(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "b" / "002.png").write_bytes(b"broken")
    assert len(load_data(f"imagefolder:{tmp_path}", n=5)) == 5
    fails(r"b/002\.png is not an image", f"imagefolder:{tmp_path}", n=6)


def test_a_missing_or_empty_image_folder_gets_one_line(tmp_path: Path) -> None:
    fails("nowhere does not exist", f"imagefolder:{tmp_path / 'nowhere'}")
    fails("holds no class folders; expected", f"imagefolder:{tmp_path}")
    (tmp_path / "a").mkdir()
    fails("/a holds no image files", f"imagefolder:{tmp_path}")
    (tmp_path / "file").write_text("")
    fails("is not a folder", f"imagefolder:{tmp_path / 'file'}")


def test_a_folder_of_parts_is_not_taken_for_a_folder_of_classes(tmp_path: Path) -> None:
    folder(tmp_path / "test", {"a": 1})
    fails("test holds no image files", f"imagefolder:{tmp_path}")


def test_an_image_of_another_size_is_named(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 2})
    save(tmp_path / "a" / "999.png", 1, (7, 5, 3))
    fails(
        r"a/999\.png is 5x7 pixels, .*a/000\.png is 5x6; all images must share one size",
        f"imagefolder:{tmp_path}",
    )


def test_a_coloured_image_among_grey_ones_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a" / "0.png", 1, (6, 5))
    save(tmp_path / "a" / "1.png", 1)
    fails(r"1\.png has colours", f"imagefolder:{tmp_path}")


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg", "bmp"])
def test_a_truncated_image_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "a" / f"x.{suffix}"
    save(path, 5, (40, 40, 3))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"x\.{suffix} is "):
        load_data(f"imagefolder:{tmp_path}").tensors()


def test_pixels_of_16_bits_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "a" / "x.png")
    fails("convert it to 8 bits", f"imagefolder:{tmp_path}")


# CSV tables


def table(root: Path, text: str) -> str:
    """A table beside three images."""
    for number in range(3):
        save(root / "images" / f"{number}.png", number)
    (root / "t.csv").write_text(text)
    return f"csv:{root / 't.csv'}"


def test_csv_paths_are_relative_to_the_table_and_rows_keep_their_order(tmp_path: Path) -> None:
    absolute = tmp_path / "images" / "0.png"
    spec = table(tmp_path, f"label,path,more\n2,images/2.png,x\n0,{absolute},\n")
    data = load_data(spec)
    assert (data.labels.tolist(), data.classes, data.name) == ([2, 0], ("0", "1", "2"), "csv:t.csv")
    assert torch.equal(data[0][0], torch.from_numpy(picture(2)).permute(2, 0, 1).float() / 255)


def test_csv_class_names_are_numbered_alphabetically(tmp_path: Path) -> None:
    data = load_data(
        table(tmp_path, "path,label\nimages/0.png,dog\nimages/1.png,cat\nimages/2.png,dog\n"), n=1
    )
    assert (data.labels.tolist(), data.classes) == ([1], ("cat", "dog"))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", r"has the columns \(none\); expected path and label"),
        ("file,label\nx,1\n", "has the columns file, label"),
        ("path,label\n", "has no rows"),
        ("path,label\nimages/9.png,1\n", r"line 2: .*images/9\.png does not exist"),
        ("path,label\nimages/0.png,1\nimages/1.png\n", "line 3: expected a path and a label"),
        ("path,label\nimages/0.png,-1\n", "has the label -1 in row 0"),
        ("path,label\nimages/0.png,1\nimages/1.png,cat\n", "line 3: label 'cat' is no whole number"),
        ("path,label\nimages/0.png,99999999999999999999999\n", "has the label 1e\\+23"),
        ("path,label\nt.csv,1\n", r"t\.csv is not an image"),
    ],
)
def test_a_bad_csv_table_gets_one_line(tmp_path: Path, text: str, line: str) -> None:
    fails(line, table(tmp_path, text))


def test_a_missing_or_binary_csv_table_gets_one_line(tmp_path: Path) -> None:
    fails("cannot be read as a CSV table", f"csv:{tmp_path / 'none.csv'}")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00path")
    fails("cannot be read as a CSV table", f"csv:{tmp_path / 'b.csv'}")


# NumPy archives


def archive(root: Path, **arrays: object) -> str:
    np.savez(root / "a.npz", **arrays)  # type: ignore[arg-type]
    return f"npz:{root / 'a.npz'}"


def test_npz_bytes_are_scaled_and_either_layout_gives_the_same(tmp_path: Path) -> None:
    x = np.stack([picture(value) for value in range(4)])
    expected = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
    y = np.array([0, 2, 1, 2], np.int32)
    for arrays in (
        {"x": x, "y": y},
        {"images": x.transpose(0, 3, 1, 2), "labels": y},
        {"x": (x / np.float32(255)).astype(">f4"), "y": y.astype(np.float64)},
    ):
        data = load_data(archive(tmp_path, **arrays))
        assert (data.shape, data.classes, data.labels.tolist()) == ((3, 6, 5), ("0", "1", "2"), [0, 2, 1, 2])
        assert torch.equal(data.tensors()[0], expected)


def test_npz_grey_images_need_no_channel_axis(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((3, 9, 7))
    data = load_data(archive(tmp_path, x=x, y=[0, 1, 0], classes=["no", "yes", "perhaps"]))
    assert (data.shape, data.classes) == ((1, 9, 7), ("no", "yes", "perhaps"))
    assert torch.equal(data.tensors()[0][:, 0], torch.from_numpy(x).float())


def test_npz_layout_is_asked_for_where_the_shape_cannot_tell(tmp_path: Path) -> None:
    x = np.zeros((2, 3, 8, 3), np.uint8)
    fails("may be", archive(tmp_path, x=x, y=[0, 1]))
    fails("may be", archive(tmp_path, x=np.zeros((2, 8, 8, 8), np.uint8), y=[0, 1]))
    assert load_data(archive(tmp_path, x=x, y=[0, 1], layout="NHWC")).shape == (3, 3, 8)
    assert load_data(archive(tmp_path, x=x, y=[0, 1], layout="NCHW")).shape == (3, 8, 3)
    fails("layout is 'CHWN'", archive(tmp_path, x=x, y=[0, 1], layout="CHWN"))


BYTES = np.zeros((2, 1, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"x": BYTES}, "expected arrays x"),
        ({"x": BYTES, "y": [0]}, "2 images and 1 labels"),
        ({"x": BYTES[:0], "y": np.zeros(0, int)}, "holds no images"),
        ({"x": BYTES, "y": [0, -1]}, "label -1 in row 1"),
        ({"x": BYTES, "y": [0.5, 1]}, "label 0.5 in row 0"),
        ({"x": BYTES, "y": [np.nan, 1]}, "label nan in row 0"),
        ({"x": BYTES, "y": [0, 10**9]}, "label 1e\\+09 in row 1"),
        ({"x": BYTES, "y": [0, 2], "classes": ["a", "b"]}, "from 0 to 1"),
        ({"x": BYTES, "y": [[0, 1], [1, 0]]}, r"shape \(2, 2\)"),
        ({"x": BYTES, "y": ["a", "b"]}, "labels are whole numbers"),
        ({"x": np.zeros((2, 64)), "y": [0, 1]}, r"shape \(2, 64\); expected \(N, C, H, W\)"),
        ({"x": np.zeros((2, 1, 0, 8)), "y": [0, 1]}, "expected"),
        ({"x": np.full((2, 1, 8, 8), 255.0), "y": [0, 1]}, r"ranges from 255 to 255; expected \[0, 1\]"),
        ({"x": np.full((2, 1, 8, 8), np.nan), "y": [0, 1]}, r"expected \[0, 1\]"),
        ({"x": np.zeros((2, 1, 8, 8), int), "y": [0, 1]}, "x is int64; expected uint8"),
        ({"x": np.array([None, None]), "y": [0, 1]}, "not a NumPy archive of plain arrays"),
    ],
)
def test_bad_npz_arrays_get_one_line(tmp_path: Path, arrays: dict[str, object], line: str) -> None:
    fails(line, archive(tmp_path, **arrays))


def test_npz_never_unpickles(tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    np.savez(tmp_path / "a.npz", x=np.array([Trap(flag)], dtype=object), y=[0])
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Trap(flag)))
    for name in ("a", "b"):
        fails("not a NumPy archive of plain arrays", f"npz:{tmp_path / name}.npz")
    assert not flag.exists()


def test_a_missing_damaged_or_single_array_file_gets_one_line(tmp_path: Path) -> None:
    fails("none.npz does not exist", f"npz:{tmp_path / 'none.npz'}")
    np.save(tmp_path / "a.npy", BYTES)
    fails("is one array", f"npz:{tmp_path / 'a.npy'}")
    spec = archive(tmp_path, x=BYTES, y=[0, 1])
    content = (tmp_path / "a.npz").read_bytes()
    for damaged in (
        content[:100],
        content[:-30],
        b"",
        b"PK\x03\x04",
        content.replace(b"\x93NUMPY", b"\x93NUMPX"),
    ):
        (tmp_path / "a.npz").write_bytes(damaged)
        fails("not a NumPy archive", spec)


def test_labels_are_whole_numbers_in_range() -> None:
    assert check_labels(np.array([0, 9], np.uint8), "y", 10).dtype == torch.int64
    with pytest.raises(DataError, match="expected a whole number from 0 to 9"):
        check_labels(np.array([10]), "y", 10)
