"""Files of every depth, orientation and state: read right, or refused by name."""

from __future__ import annotations

import struct
import zipfile
import zlib

import numpy as np
import pytest
from lightning.pytorch import Trainer
from lightning_stubs import SILENT
from PIL import Image

from lightning_samrefine import SAMRefineWriter
from lightning_samrefine.data import FolderDataModule
from lightning_samrefine.segmenters import StoredPredictions

HW = (6, 8)
ORIENTATION = 0x112


def picture(seed: int = 0, hw=HW) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*hw, 3)).astype(np.uint8)


def labels(seed: int = 0, hw=HW) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, hw).astype(np.uint8)


def save(array, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def turned_by(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def module(folder, which=("labels",), split="val", **kwargs):
    stems = kwargs.pop("stems", None)
    paths = {key: folder / key for key in ("images", *which)}
    return FolderDataModule(num_classes=3, **{split: {**paths, "stems": stems}}, **kwargs)


def read(folder, *which, **kwargs):
    data = module(folder, which or ("labels",), **kwargs)
    data.setup("validate")
    return list(data.val_dataloader())


@pytest.fixture
def folder(tmp_path):
    for seed, stem in enumerate("ab"):
        save(picture(seed), tmp_path / "images" / f"{stem}.png")
        save(labels(seed), tmp_path / "labels" / f"{stem}.png")
    return tmp_path


def png(array: np.ndarray, bits: int, color: int) -> bytes:
    """Encode values of any depth, as Pillow cannot."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + end

    height, width = array.shape[:2]
    flat = array.reshape(height, -1)
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in flat]
    else:
        shifts = np.arange(bits - 1, -1, -1)
        bit_rows = (flat[:, :, None] >> shifts & 1).reshape(height, -1)
        rows = [np.packbits(row).tobytes() for row in bit_rows]
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(3 * 2**bits)) if color == 3 else b""
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    signature = b"\x89PNG\r\n\x1a\n"
    return (
        signature + chunk(b"IHDR", header) + palette + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )


def tiff(array: np.ndarray) -> bytes:
    """Encode (H, W, 3) uint16, as Pillow cannot."""
    height, width = array.shape[:2]
    data = array.astype("<u2").tobytes()
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 134), (259, 3, 1, 1)]
    tags += [(262, 3, 1, 2), (273, 4, 1, 140), (277, 3, 1, 3), (278, 3, 1, height)]
    tags += [(279, 4, 1, len(data)), (284, 3, 1, 1)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    return head + struct.pack("<HHH", 16, 16, 16) + data


class TestDepth:
    @pytest.mark.parametrize("highest", [4095, 65535])
    @pytest.mark.parametrize("kind", ["RGB", "RGBA", "LA", "tiff"])
    def test_16_bits_a_channel_are_refused_before_any_work(self, folder, kind, highest):
        channels, color = {"RGB": (3, 2), "RGBA": (4, 6), "LA": (2, 4), "tiff": (3, None)}[kind]
        array = np.random.default_rng(0).integers(0, highest + 1, (*HW, channels))
        (folder / "images" / "a.png").unlink()
        path = folder / "images" / ("a.tif" if kind == "tiff" else "a.png")
        path.write_bytes(tiff(array) if kind == "tiff" else png(array, 16, color))
        with pytest.raises(ValueError, match=rf"{path.name} must have 8 bits per channel.*got 16"):
            module(folder).setup("validate")

    def test_an_8_bit_tiff_is_read(self, folder):
        (folder / "images" / "a.png").unlink()
        save(picture(), folder / "images" / "a.tif")
        pixels = read(folder)[0]["image"][0]
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), picture())

    @pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
    @pytest.mark.parametrize("color", [0, 3])
    def test_label_maps_of_every_depth_hold_their_own_values(self, folder, bits, color):
        if color == 3 and bits == 16:
            pytest.skip("no PNG has a palette of 16 bits")
        written = np.random.default_rng(bits).integers(0, min(2**bits, 3), HW)
        (folder / "labels" / "a.png").write_bytes(png(written, bits, color))
        assert np.array_equal(read(folder)[0]["mask"][0].numpy(), written)

    def test_a_stored_prediction_of_2_bits_holds_its_own_values(self, folder):
        for stem in "ab":
            path = folder / "predictions" / f"{stem}.png"
            save(labels(7), path)
            path.write_bytes(png(labels(7).astype(int), 2, 0))
        batches = read(folder, "labels", "predictions")
        assert np.array_equal(batches[0]["prediction"][0].numpy(), labels(7))


class TestDamage:
    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp"])
    def test_a_truncated_image_is_named(self, folder, suffix):
        (folder / "images" / "a.png").unlink()
        path = folder / "images" / f"a.{suffix}"
        save(picture(), path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 2 // 3])
        with pytest.raises(ValueError, match=rf"images/a\.{suffix} must be a readable image"):
            read(folder)

    @pytest.mark.parametrize("which", ["labels", "predictions"])
    @pytest.mark.parametrize("kept", [0, 30, 60])
    def test_a_truncated_label_map_is_named(self, folder, which, kept):
        for seed, stem in enumerate("ab"):
            save(labels(seed), folder / "predictions" / f"{stem}.png")
        path = folder / which / "b.png"
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(ValueError, match=rf"{which}/b\.png must be a readable image"):
            read(folder, "labels", "predictions")

    def test_bytes_that_were_flipped_are_named(self, folder):
        path = folder / "labels" / "b.png"
        content = bytearray(path.read_bytes())
        content[content.index(b"IDAT") + 8] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"labels/b\.png must be a readable image"):
            read(folder)

    @pytest.mark.parametrize("damage", ["crc", "truncated", "objects", "header"])
    def test_a_damaged_npz_is_named(self, folder, damage):
        hw = (48, 64)  # more than is read along with a header
        probs = np.full((3, *hw), 1 / 3, np.float32)
        (folder / "predictions").mkdir()
        for stem in "ab":
            save(picture(hw=hw), folder / "images" / f"{stem}.png")
            save(labels(hw=hw), folder / "labels" / f"{stem}.png")
            np.savez(folder / "predictions" / f"{stem}.npz", probs=probs)
        path = folder / "predictions" / "b.npz"
        if damage == "objects":
            values = np.empty((3, *hw), object)
            np.savez(path, probs=values)
        content = bytearray(path.read_bytes())
        if damage == "crc":
            content[content.index(probs.tobytes()[:16]) + 9] ^= 0xFF
        elif damage == "truncated":
            content = content[:-30]
        elif damage == "header":
            content[content.index(b"NUMPY")] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"predictions/b\.npz must be a readable npz"):
            read(folder, "labels", "predictions")
        assert zipfile.is_zipfile(folder / "predictions" / "a.npz")


class TestStems:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    def test_with_and_without_a_byte_order_mark(self, folder, encoding):
        save(picture(), folder / "images" / "größe.png")
        save(labels(), folder / "labels" / "größe.png")
        (folder / "val.txt").write_bytes("b\r\ngröße\r\n".encode(encoding))
        batches = read(folder, stems=folder / "val.txt")
        assert [batch["name"][0] for batch in batches] == ["b", "größe"]

    @pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
    def test_other_text_is_refused_by_name(self, folder, encoding):
        (folder / "val.txt").write_bytes("b\ngröße\n".encode(encoding))
        with pytest.raises(ValueError, match=r"val\.txt: stems must be UTF-8 text"):
            read(folder, stems=folder / "val.txt")


class TestOrientation:
    """Pillow turns pixels by their EXIF orientation only on request."""

    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
    @pytest.mark.parametrize("orientation", [5, 6, 7, 8])
    def test_labels_of_the_turned_size_turn_the_image(self, folder, suffix, orientation):
        (folder / "images" / "a.png").unlink()
        path = folder / "images" / f"a.{suffix}"
        save(picture(), path, exif=turned_by(orientation))
        save(labels(hw=HW[::-1]), folder / "labels" / "a.png")
        # EXIF's definition: the sides of the display that the stored first row and column show.
        with Image.open(path) as stored:
            pixels = np.array(stored.convert("RGB"))
        expected = {
            5: pixels.transpose(1, 0, 2),
            6: np.rot90(pixels, -1),
            7: np.rot90(pixels, 2).transpose(1, 0, 2),
            8: np.rot90(pixels),
        }[orientation]
        found = read(folder)[0]["image"][0].permute(1, 2, 0).numpy()
        assert np.array_equal(found, expected)

    def test_labels_of_the_stored_size_leave_it(self, folder):
        save(picture(), folder / "images" / "a.png", exif=turned_by(6))
        found = read(folder)[0]["image"][0].permute(1, 2, 0).numpy()
        assert np.array_equal(found, picture())

    @pytest.mark.parametrize(("orientation", "hw"), [(3, HW), (2, HW), (6, (6, 6))])
    def test_if_sizes_do_not_decide_the_error_lists_the_images(self, folder, orientation, hw):
        save(picture(hw=hw), folder / "images" / "a.png", exif=turned_by(orientation))
        save(labels(hw=hw), folder / "labels" / "a.png")
        with pytest.raises(
            ValueError, match=r"one orientation, got a\.png, whose EXIF orientation.*upright"
        ):
            module(folder).setup("validate")

    def test_sizes_that_disagree_name_the_orientation(self, folder):
        save(picture(), folder / "images" / "a.png", exif=turned_by(6))
        save(labels(hw=(9, 9)), folder / "labels" / "a.png")
        with pytest.raises(ValueError, match=r"image a\.png, whose EXIF orientation 6 turns it"):
            module(folder).setup("validate")

    def test_a_tiff_that_pillow_turns_needs_turned_labels(self, folder):
        (folder / "images" / "a.png").unlink()
        save(picture(), folder / "images" / "a.tif", exif=turned_by(6))
        with pytest.raises(ValueError, match=r"image a\.tif, whose EXIF orientation 6 turns it"):
            module(folder).setup("validate")
        save(labels(hw=HW[::-1]), folder / "labels" / "a.png")
        found = read(folder)[0]["image"][0].permute(1, 2, 0).numpy()
        assert np.array_equal(found, np.rot90(picture(), -1))

    def test_without_a_label_map_an_image_is_turned(self, folder):
        save(picture(), folder / "images" / "a.png", exif=turned_by(3))
        data = module(folder, (), "predict")
        data.setup("predict")
        found = next(iter(data.predict_dataloader()))["image"][0].permute(1, 2, 0).numpy()
        assert np.array_equal(found, np.rot90(picture(), 2))


class TestSubfolders:
    def test_images_in_subfolders_are_found_with_their_labels(self, tmp_path, random_sam):
        for seed, stem in enumerate(("x/1", "y/1", "y/2")):
            save(picture(seed), tmp_path / "images" / f"{stem}.jpg")
            save(labels(seed), tmp_path / "labels" / f"{stem}.png")
        save(picture(), tmp_path / "images" / "y" / ".checkpoints" / "1.jpg")
        batches = read(tmp_path)
        assert [batch["name"][0] for batch in batches] == ["x/1", "y/1", "y/2"]
        assert [batch["folder"][0] for batch in batches] == ["x", "y", "y"]
        for seed, batch in enumerate(batches):
            assert np.array_equal(batch["mask"][0].numpy(), labels(seed))
        split = {"images": tmp_path / "images", "predictions": tmp_path / "labels"}
        data = FolderDataModule(num_classes=3, predict=split)
        writer = SAMRefineWriter(tmp_path / "out", random_sam, num_classes=3, refine="fast")
        trainer = Trainer(**SILENT, callbacks=[writer])
        trainer.predict(StoredPredictions(), datamodule=data, return_predictions=False)
        written = sorted((tmp_path / "out" / "labels").rglob("*.png"))
        found = [path.relative_to(tmp_path / "out" / "labels").as_posix() for path in written]
        assert found == ["x/1.png", "y/1.png", "y/2.png"]

    def test_a_missing_label_map_is_named_with_its_subfolder(self, tmp_path):
        for stem in ("x/1", "y/1"):
            save(picture(), tmp_path / "images" / f"{stem}.png")
        save(labels(), tmp_path / "labels" / "x" / "1.png")
        with pytest.raises(
            FileNotFoundError, match=r"one label map for each of 2 stems, got none for 1: y/1"
        ):
            module(tmp_path).setup("validate")

    def test_images_beside_subfolders_are_warned_of(self, folder):
        save(picture(), folder / "images" / "more" / "c.png")
        with pytest.warns(UserWarning, match=r"1 images in its sub-folders \(more\) are left out"):
            assert len(read(folder)) == 2
