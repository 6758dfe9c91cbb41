"""CIFAR-10 from every possible source, the split, the batches, image files."""

import hashlib
import http.server
import io
import pickle
import struct
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional as reference
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

import datasets
from data import (
    Preprocessing,
    Split,
    by_kind,
    image_files,
    nearly_constant,
    shuffled_batches,
    stratified_split,
)
from datasets import load_dataset
from small import CIFAR10, DAMAGES, damage, default_dtype, generator, images_of, needs_cifar10
from utils import UserError

CLASSES = [f"class {label}" for label in range(10)]


# ---------------------------------------------------------------------------- a small stand-in


@pytest.fixture
def archive(monkeypatch):
    """CIFAR-10's archive with 110 images instead of 60,000; torchvision expects its md5."""
    random = np.random.default_rng(0)
    source = torchvision.datasets.CIFAR10
    files = {"batches.meta": {"label_names": CLASSES}}
    for name, _ in source.train_list + source.test_list:
        count = 10 if name == "test_batch" else 20
        pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        files[name] = {"data": pixels, "labels": [i % 10 for i in range(count)]}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            packed = pickle.dumps(content, protocol=2)
            member = tarfile.TarInfo(f"{source.base_folder}/{name}")
            member.size = len(packed)
            tar.addfile(member, io.BytesIO(packed))

    monkeypatch.setattr(source, "tgz_md5", hashlib.md5(buffer.getvalue()).hexdigest())
    for option in ("train_list", "test_list"):  # accept any md5
        listed = [[name, None] for name, _ in getattr(source, option)]
        monkeypatch.setattr(source, option, listed)
    monkeypatch.setattr(source, "meta", source.meta | {"md5": None})
    return buffer.getvalue(), files


@pytest.fixture
def serve():
    """serve(answer) starts a local http server that answers each request by `answer(handler)`."""
    servers = []

    def start(answer):
        handler = type("Handler", (QuietHandler,), {"answer": answer})
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/cifar-10-python.tar.gz"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class QuietHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def sending(content, announced=None):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(announced or len(content)))
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(content)

    return answer


# ---------------------------------------------------------------------------- CIFAR-10


NOBODY = "http://127.0.0.1:9/nothing-listens-here"


def load(folder, url=NOBODY):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets.CIFAR10, "url", url)
        return load_dataset("cifar10", validation_images=20, data_dir=folder)


def test_a_download_a_tarball_and_an_unpacked_folder_give_the_images_that_were_packed(
    archive, serve, tmp_path
):
    packed, files = archive
    tarball = tmp_path / "cifar-10-python.tar.gz"
    tarball.write_bytes(packed)
    for folder, url in ((tmp_path, NOBODY), (tmp_path / "new", serve(sending(packed)))) * 2:
        dataset = load(folder, url)
        assert dataset.classes == tuple(CLASSES)
        assert dataset.test.labels.tolist() == files["test_batch"]["labels"]
        assert images_of(dataset.test).flatten(1).tolist() == files["test_batch"]["data"].tolist()
        assert (len(dataset.train), len(dataset.validation)) == (80, 20)
        tarball.unlink(missing_ok=True)
    whole = load_dataset("cifar10", validation_images=0, data_dir=tmp_path)
    assert whole.validation is None and len(whole.train) == 100


@pytest.mark.parametrize("failure", ["damaged", "cut off", "404", "stalls", "nobody", "no folder"])
def test_a_failed_download_is_one_line_that_says_what_to_do(
    failure, archive, serve, tmp_path, monkeypatch
):
    packed, _ = archive
    monkeypatch.setattr(datasets, "DOWNLOAD_TIMEOUT", 0.5)
    over = threading.Event()
    answers = {
        "damaged": sending(packed[:-100] + bytes(100)),
        "cut off": sending(packed[:1000], announced=len(packed)),
        "404": lambda handler: handler.send_error(404),
        "stalls": lambda handler: over.wait(20),
    }
    url = serve(answers[failure]) if failure in answers else NOBODY
    folder = tmp_path / "data"
    if failure == "no folder":
        folder.write_text("not a folder")
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        load(folder, url)
    over.set()
    assert time.monotonic() - started < 10
    message = str(caught.value)
    assert "\n" not in message and url in message and str(folder) in message
    assert "cifar-10-python.tar.gz" in message and "--recipe demo" in message


@pytest.mark.parametrize(
    ("name", "sizes", "close"),
    [
        ("shapes", [9_000, 1_000, 2_000], 0.005),
        pytest.param("cifar10", [45_000, 5_000, 10_000], 1e-4, marks=needs_cifar10),
    ],
)
def test_the_stated_mean_and_deviation_are_those_of_the_training_images(name, sizes, close):
    dataset = load_dataset(name, validation_images=0.1, data_dir=CIFAR10)
    assert list(map(len, dataset.splits().values())) == sizes
    assert len(set(dataset.validation.labels.bincount().tolist())) == 1
    pixels = torch.cat([images_of(dataset.train), images_of(dataset.validation)])
    stated, values = dataset.preprocessing, torch.arange(256) / 255
    for channel, mean, std in zip(range(3), stated.mean, stated.std, strict=True):
        share = pixels[:, channel].flatten().bincount(minlength=256) / pixels[:, 0].numel()
        assert (share @ values).item() == pytest.approx(mean, abs=close)
        assert (share @ (values - mean) ** 2).sqrt().item() == pytest.approx(std, abs=close)


# ---------------------------------------------------------------------------- split and batches


@pytest.mark.parametrize(
    ("labels", "shares"),
    [
        (torch.arange(1000) % 10, [2] * 10),
        # Of 16.1, 4.6 and 2.3, the one with the largest remainder is rounded up.
        (torch.arange(3).repeat_interleave(torch.tensor([70, 20, 10])), [16, 5, 2]),
        (torch.tensor([2, 2, 0, 2, 0]), [0, 0, 1]),  # no class 1
    ],
)
def test_the_split_is_stratified_complete_and_that_of_every_earlier_run(labels, shares):
    """Otherwise, an older model would be validated on images that it was trained on."""
    kept, held_out = stratified_split(labels, sum(shares))
    assert torch.cat([kept, held_out]).sort().values.tolist() == list(range(len(labels)))
    assert labels[held_out].bincount(minlength=len(shares)).tolist() == shares
    if len(labels) == 1000:
        assert held_out[:8].tolist() == [23, 37, 44, 158, 209, 261, 264, 483]


@pytest.mark.parametrize(
    ("counts", "held_out"),
    [([10, 10], -10), ([10, 10], 20), ([10, 10], 30), ([10, 10], 19), ([1, 1000], 901)],
)
def test_an_impossible_split_is_refused_with_its_number(counts, held_out):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    with pytest.raises(UserError, match=f"{held_out}, must be .* less than the {len(labels):,}"):
        stratified_split(labels, held_out)


def test_batches_hold_each_row_once_in_an_order_of_the_generator():
    seventy = Split(torch.arange(70, dtype=torch.uint8).view(70, 1, 1, 1), torch.arange(70))

    def order(seed):
        parts = list(seventy.batches(shuffled_batches(seventy, 32, generator(seed))))
        assert [len(part.labels) for part in parts] == [32, 32, 6]
        assert all(torch.equal(part.images.flatten().long(), part.labels) for part in parts)
        return torch.cat([part.labels for part in parts]).tolist()

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(70))
    some = seventy.subset(torch.tensor([5, 3, 69])).to("cpu")
    assert (len(some), some.labels.tolist()) == (3, [5, 3, 69])
    assert some.take(torch.tensor([2])).images.flatten().tolist() == [69]


# ---------------------------------------------------------------------------- preprocessing


def expecting(size, channels=3, **options):
    return Preprocessing(size=size, mean=(0.5,) * channels, std=(0.2,) * channels, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalize_is_torchvisions(dtype):
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    scaled = reference.to_dtype(images, dtype, scale=True)
    expected = reference.normalize(scaled, mean, std)
    with default_dtype(dtype):
        ours = Preprocessing(size=(4, 4), mean=mean, std=std).normalize(images)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"size": (0, 4)}, "size must be two positive numbers, not (0, 4)"),
        ({"mean": (0.5,) * 3}, "std must be 3 positive numbers, not (0.2, 0.2)"),
        ({"std": (0.2, 0.0)}, "std must be 2 positive numbers, not (0.2, 0.0)"),
        ({"mean": (), "std": ()}, "std must be 0 positive numbers"),
    ],
)
def test_what_no_model_expects_is_refused(options, named):
    with pytest.raises(UserError) as refusal:
        Preprocessing(**{"size": (4, 4), "mean": (0.5,) * 2, "std": (0.2,) * 2} | options)
    assert named in str(refusal.value)


def test_the_center_that_is_kept_has_the_stated_share_of_each_side(tmp_path):
    """A red square of 32 pixels in the middle of a blue one of 40, which is 80% of it."""
    image = Image.new("RGB", (40, 40), "blue")
    image.paste("red", (4, 4, 36, 36))
    image.save(tmp_path / "image.png")
    for interpolation in ("bicubic", "bilinear"):
        options = {"interpolation": interpolation}
        kept = expecting((32, 32), crop=0.8, **options).read(tmp_path / "image.png")
        assert torch.equal(kept, pil_to_tensor(image)[:, 4:36, 4:36])
        whole = expecting((40, 40), **options).read(tmp_path / "image.png")
        assert torch.equal(whole, pil_to_tensor(image))


# ---------------------------------------------------------------------------- image files


def two_halves(mode: str = "RGB", size: tuple[int, int] = (40, 40)) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", size, "red")
    image.paste("blue", (size[0] // 2, 0, *size))
    return image.convert(mode)


@pytest.mark.parametrize(
    "name", ["RGB.tif", "P.tif", "CMYK.tif", "CMYK.jpg", "RGB.gif", "wide.png", "alpha.png"]
)
def test_any_kind_of_image_is_read_as_rgb_at_the_models_size(name, tmp_path):
    kind, options = name.split(".")[0], {"quality": 100}
    image = two_halves({"wide": "RGB", "alpha": "RGBA"}.get(kind, kind))
    if kind == "wide":
        image = ImageOps.expand(image, (9_980, 0), "green")
    elif kind == "alpha":
        image.putalpha(Image.linear_gradient("L").resize((40, 40)).point(lambda v: 255 * (v > 127)))
    elif name == "RGB.gif":  # animated
        options |= {"save_all": True, "append_images": [Image.new("RGB", (40, 40), "green")]}
    image.save(tmp_path / name, **options)
    image = expecting((16, 16)).read(tmp_path / name)
    assert image.dtype == torch.uint8 and image.shape == (3, 16, 16)
    red, blue = (torch.tensor(color).view(3, 1, 1) for color in ([255, 0, 0], [0, 0, 255]))
    visible = image[:, 9:] if kind == "alpha" else image  # its upper half is transparent
    assert (visible[:, :, 1:7].int() - red).abs().max() <= 3
    assert (visible[:, :, 9:15].int() - blue).abs().max() <= 3
    if kind == "alpha":
        assert (image[:, :7] == 255).all()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", "deep.png", "deep.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_is_undone_as_pillow_does(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5).resize((16, 16))
    if suffix.startswith("deep"):
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    path = tmp_path / f"turned{suffix}"
    picture.save(path, exif=exif, quality=95)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image)
    if suffix.startswith("deep"):
        expected = Image.fromarray((np.asarray(expected) // 257).astype(np.uint8))
    expected = np.asarray(expected.convert("RGB"))
    assert np.array_equal(expecting((16, 16)).read(path).permute(1, 2, 0), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_costs_no_pixels(tmp_path):
    path = tmp_path / "image.jpg"
    two_halves().save(path, quality=100, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert expecting((16, 16)).read(path).float().mean(dim=(1, 2))[0] > 100


def test_an_orientation_is_undone_beside_exif_that_cannot_be_written_again(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 3
    two_halves().save(tmp_path / "image.jpg", exif=exif)
    monkeypatch.setattr(Image.Exif, "tobytes", lambda *_: 1 / 0)
    red, _, blue = expecting((16, 16)).read(tmp_path / "image.jpg")
    assert blue[:, :7].min() > 200 > 50 > red[:, :7].max()


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size_with_nearly_the_same_result(tmp_path):
    """On average, the pixels differ from a full decode and resize by less than 1 of 255."""
    waves = np.sin(np.arange(1200) / 40)[:, None, None] * np.cos(np.arange(1600) / 70)[:, None]
    picture = Image.fromarray((127 + 120 * np.tile(waves, (1, 1, 3))).astype(np.uint8))
    picture.save(tmp_path / "large.jpg", quality=95)
    with Image.open(tmp_path / "large.jpg") as image:
        expecting((32, 32)).fit(image)
        assert image.size == (200, 150)  # an eighth
        whole = Image.open(tmp_path / "large.jpg").convert("RGB")
    expected = ImageOps.fit(whole, (32, 32), Image.Resampling.BICUBIC)
    found = expecting((32, 32)).read(tmp_path / "large.jpg").permute(1, 2, 0)
    assert np.abs(found.numpy().astype(int) - np.asarray(expected)).mean() < 1


def save_gray(path: Path, dtype: str, low: float, high: float) -> Path:
    """A gray ramp from left to right; its first pixel is NaN if the type has NaN."""
    values = np.repeat(np.linspace(low, high, 16)[None], 16, axis=0).astype(dtype)
    if values.dtype.kind == "f":
        values[0, 0] = np.nan
    Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "dtype", "low", "high", "black", "white"),
    [
        ("gray.png", "u2", 0, 65535, 0, 65535),
        ("gray.tif", "u2", 0, 4000, 0, 4095),
        ("gray.tif", ">u2", 0, 4000, 0, 4095),
        ("gray.png", "u2", 0, 1000, 0, 1023),
        ("gray.tif", "i4", 0, 255, 0, 255),
        ("gray.tif", "i4", 0, 100_000, 0, 100_000),
        ("gray.tif", "i4", -1024, 3071, -1024, 3071),
        ("gray.tif", "f4", 0, 0.5, 0, 1),
        ("gray.tif", "f4", -1, 0.5, -1, 1),
        ("gray.tif", "f4", 0, 250, 0, 255),
        ("gray.tif", "f4", 0, 1e4, 0, 1e4),
        ("gray.tif", "f4", -5, 7, -5, 7),
    ],
)
def test_gray_of_more_than_8_bits_has_its_range_from_the_data(
    name, dtype, low, high, black, white, tmp_path
):
    path = save_gray(tmp_path / name, dtype, low, high)
    preprocessing, (note,) = expecting((16, 16)).measured([path])
    assert f"in 1 of 1 files: of {low:g} to {high:g}, {black:g} becomes black" in note
    expected = 255 * (torch.linspace(low, high, 16) - black) / (white - black)
    for each in (preprocessing, expecting((16, 16))):
        image = each.read(path)[:, 1:].float()
        assert (image - expected.expand(3, 15, 16)).abs().max() <= 1


def test_all_files_of_a_folder_have_one_range_and_a_models_range_stays(tmp_path):
    dark = save_gray(tmp_path / "dark.png", "u2", 0, 900)
    bright = save_gray(tmp_path / "bright.png", "u2", 0, 4000)
    share = save_gray(tmp_path / "share.tif", "f4", 0, 1)
    (tmp_path / "broken.png").write_text("no picture")
    two_halves().save(tmp_path / "color.png")
    files = [*tmp_path.iterdir()]
    preprocessing, notes = expecting((16, 16)).measured(files)
    assert len(notes) == 2 and "(mode I;16) in 2 of 5 files" in notes[1]
    assert preprocessing.read(dark).max() == round(900 / 4095 * 255)
    assert preprocessing.read(bright).max() == round(4000 / 4095 * 255)
    assert preprocessing.read(share).max() == 255
    narrow = expecting((16, 16), ranges={"I;16": (0, 1023)})
    again, (_, note) = narrow.measured(files)
    assert again.read(dark).max() == round(900 / 1023 * 255)
    assert "of 0 to 4000, 0 becomes black and 1023 white, what is outside is cut off" in note
    of_contrast = torch.stack([narrow.read(dark), narrow.read(dark) // 20])
    assert nearly_constant(of_contrast).tolist() == [False, True]


def test_a_tiff_in_which_white_is_the_least_is_turned(tmp_path):
    path = save_gray(tmp_path / "gray.tif", "u2", 0, 65535)
    black, white = (struct.pack("<HHII", 262, 3, 1, least) for least in (1, 0))
    path.write_bytes(path.read_bytes().replace(black, white))
    image = expecting((16, 16)).read(path)
    assert image[0, 0].tolist() == list(range(255, -1, -17))


def test_one_pixel_fills_the_picture_in_rgb_or_in_gray_and_in_nothing_else(tmp_path):
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "dot.png")
    image = expecting((16, 24)).read(tmp_path / "dot.png")
    assert image.shape == (3, 16, 24)
    assert image.amax(dim=(1, 2)).tolist() == image.amin(dim=(1, 2)).tolist() == [10, 20, 30]
    gray = expecting((16, 24), channels=1).read(tmp_path / "dot.png")
    assert gray.shape == (1, 16, 24) and gray.unique().tolist() == [18]
    with pytest.raises(UserError, match="1 or 3 channels, not 5"):
        expecting((16, 24), channels=5).read(tmp_path / "dot.png")


@pytest.mark.parametrize("kind", [*DAMAGES, "PostScript", "bomb"])
def test_what_is_no_image_is_refused_in_one_line(kind, tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    two_halves(size=(300, 300)).save(path)
    if kind == "PostScript":  # Ghostscript would run it, if installed
        path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop")
    elif kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    else:
        damage(path, kind)
    with pytest.raises(UserError) as caught:
        expecting((16, 16)).read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    if kind == "bomb":
        assert "exceeds limit of 2000 pixels" in str(caught.value)


def test_the_image_files_of_a_folder_and_its_subfolders_are_found_and_all_others_counted(tmp_path):
    (tmp_path / "2021/may").mkdir(parents=True)
    (tmp_path / ".cache").mkdir()
    files = "b.JPG a.png notes.h5 2021/c.webp d.heic 2021/may/e.heic noname .DS_Store .cache/f.png"
    for name in files.split():
        (tmp_path / name).touch()
    (tmp_path / "2021/loop").symlink_to(tmp_path)
    found, others = image_files(tmp_path)
    names = [str(file.relative_to(tmp_path)) for file in found]
    assert names == ["2021/c.webp", "a.png", "b.JPG"]
    assert others == {".h5": 1, ".heic": 2, "without an extension": 1, "hidden": 1}
    line = "1 .h5, 2 .heic (pip install pillow-heif), 1 hidden, 1 without an extension"
    assert by_kind(others) == line
