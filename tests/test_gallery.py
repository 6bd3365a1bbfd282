"""The gallery: its pictures are those of the model, its page holds them all and nothing from elsewhere."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lpips_networks import squared_error
from PIL import Image
from support import image, tiny_model

from ncsr_fast.data import degrade, to_float
from ncsr_fast.flow.samples import NonFiniteSamples
from ncsr_fast.gallery import Deviation, Picture, View, Viewer, write_page
from ncsr_fast.gallery.page import coloured, data_uri
from ncsr_fast.gallery.views import MOST_PIXELS, deviation_of
from ncsr_fast.metrics import imresize, lr_psnr, psnr, ssim, to_uint8

HR = to_uint8(0.35 + 0.3 * image(3, 32, 40, seed=1))
LR = degrade(HR, 4)


@pytest.fixture(scope="module")
def model():
    """A tiny model whose samples are well inside [0, 1]."""
    model = tiny_model()
    model.initialize(0.45 + 0.1 * image(4, 3, 64, 64, seed=8), image(4, 3, 16, 16, seed=9))
    return model


def sampled(model, lr, n, temperature, seed=3):
    with torch.no_grad():
        lr = to_float(lr)[None].double()
        return to_uint8(model.sample(lr, n, temperature, torch.Generator().manual_seed(seed))[0])


def test_pictures_are_those_of_the_model(model):
    view = Viewer(model, 3, 0.4, [0.0, 0.2, 0.2, 0], seed=3, lpips_network=squared_error).view("a", LR, HR)
    pictures = {picture.key: picture for picture in view.pictures}
    samples = sampled(model, LR, 3, 0.4)
    expected = {"lr": LR, "bicubic": imresize(LR, 4)} | {f"sample-{number}": sample for number, sample in enumerate(samples)}
    expected |= {f"temperature-{heat:g}": sampled(model, LR, 1, heat)[0] for heat in (0, 0.2)} | {"original": HR}
    assert [picture.key for picture in view.pictures] == list(expected), "each temperature once"
    for key, pixels in expected.items():
        assert torch.equal(pictures[key].pixels, pixels), key
        if key in ("lr", "original"):
            assert pictures[key].metrics == {}
        else:
            measured = {"psnr": psnr(pixels[None], HR[None]), "ssim": ssim(pixels[None], HR[None])}
            measured |= {"lr_psnr": lr_psnr(pixels[None], LR[None], 4)}
            measured |= {"lpips": squared_error(to_float(pixels)[None] * 2 - 1, to_float(HR)[None] * 2 - 1).mean()}
            assert pictures[key].metrics == pytest.approx({name: float(value) for name, value in measured.items()})
    deviation = samples.numpy().astype(np.float64).std(axis=0, ddof=1)
    np.testing.assert_allclose(view.deviation.levels, np.sqrt((deviation**2).mean(axis=0)), rtol=1e-5)
    assert view.notes == []


def test_lr_images_are_made_as_evaluate_makes_them(model):
    large = to_uint8(image(3, 45, 38, seed=2))
    view = Viewer(model, 1, 0.0, []).view("a", None, large)
    (lr,), (original,) = view.of_kind("lr"), view.of_kind("original")
    assert torch.equal(original.pixels, large[:, :40, :32]) and torch.equal(lr.pixels, degrade(large[:, :40, :32], 4))


def test_the_middle_of_a_large_image(model):
    view = Viewer(model, 1, 0.0, [], crop=5).view("a", LR, HR)
    pictures = {picture.key: picture.pixels for picture in view.pictures}
    assert torch.equal(pictures["lr"], LR[:, 1:6, 2:7]) and torch.equal(pictures["original"], HR[:, 4:24, 8:28])
    assert torch.equal(pictures["sample-0"], sampled(model, LR[:, 1:6, 2:7], 1, 0.0)[0])
    assert view.notes == ["The middle of an image of 10×8 pixels.", "One sample has no standard deviation."]
    assert torch.equal(Viewer(model, 1, 0.0, [], crop=10).view("a", LR).pictures[0].pixels, LR)


def test_metrics_that_cannot_be_computed_are_told(model):
    """LPIPS of an original that is too small for its network; what compares with an original that is not there."""

    def pool(images):
        raise RuntimeError("Output size is too small")

    network = SimpleNamespace(lins=[], scaling_layer=pool)
    view = Viewer(model, 1, 0.0, [], lpips_network=network).view("a", LR[:, :2, :2], HR[:, :8, :8])
    assert set(view.of_kind("sample")[0].metrics) == {"psnr", "ssim", "lr_psnr"}
    assert view.notes[0].startswith("LPIPS cannot measure images of 8×8 pixels")
    view = Viewer(model, 1, 0.0, []).view("a", LR)
    assert set(view.of_kind("sample")[0].metrics) == {"lr_psnr"} and view.of_kind("original") == []
    assert view.notes[0] == "PSNR, SSIM and LPIPS compare with an original, and none was given."


@pytest.mark.parametrize(
    "lr, hr, message",
    [
        (LR, HR[:, :24], "the HR image is 24×40 and the LR image 8×10, which should be 6×10 at scale 4"),
        (None, None, "neither an LR image nor an original"),
        (torch.zeros(3, 1, MOST_PIXELS // 16 + 1, dtype=torch.uint8), None, "1.0 megapixels each, more than the 1.0 of a page"),
        (None, HR[:, :7], "less than 8×8"),
        (LR[None], None, r"^lr must have shape \(3, H, W\), not \(1, 3, 8, 10\)"),
        (LR, HR[:1], r"^hr must have shape \(3, H, W\), not \(1, 32, 40\)"),
    ],
)
def test_what_has_no_view(model, lr, hr, message):
    with pytest.raises(ValueError, match=message):
        Viewer(model, 1, 0.0, []).view("a", lr, hr)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n": 0}, "^n must"),
        ({"crop": 0}, "^crop must"),
        ({"temperatures": [-1]}, "^temperature"),
        ({"seed": -1}, "^seed must be from 0"),
        ({"seed": 2**64}, "^seed must be from 0"),
    ],
)
def test_what_settings_may_not_be(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        Viewer(model, **arguments)


def test_images_of_floats_have_no_view(model):
    """A page cannot hold floats, which a user would learn after all samples were drawn."""
    for images in ((LR / 255, None), (LR, HR / 255)):
        with pytest.raises(TypeError, match="^[lh]r must be uint8, as read_image reads files, not torch.float32"):
            Viewer(model, 1, 0.0, []).view("a", *images)


def test_samples_that_blow_up_have_no_view():
    broken = tiny_model()
    with torch.no_grad():
        broken.levels[0].actnorm_logs.fill_(-600)
    with pytest.raises(NonFiniteSamples):
        Viewer(broken, 2, 0.5).view("a", LR)


@pytest.mark.parametrize("spread, top", [(0, 2), (3, 4), (100, 128)])
def test_the_colours_go_up_to_nearly_all_pixels(spread, top):
    """At most five in a thousand are beyond them."""
    samples = torch.full((2, 3, 20, 20), 100, dtype=torch.uint8)
    samples[1] += round(spread * 2**0.5)  # the standard deviation of two values is their difference over √2
    samples[1, :, 0, :2] = 255
    deviation = deviation_of(samples)
    assert deviation.top == top and deviation.levels[1, 0] == pytest.approx(spread, abs=0.5)


def test_colours():
    levels = torch.tensor([[0.0, 8.0, 16.0, 300.0, 1.0]])
    found = coloured(Deviation(levels, 16.0))[:, 0].T.tolist()
    assert found[:4] == [[0, 0, 4], [0xBC, 0x37, 0x54], [0xFC, 0xFF, 0xA4], [0xFC, 0xFF, 0xA4]]
    assert found[4] == [round(0x21 / 2), 6, round((4 + 0x4A) / 2)], "half way to the second of nine"


class Page(HTMLParser):
    """What a page holds: elements by their attributes, text, and references to other things."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "elements are closed in order"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def pixels_of(uri):
    kind, data = uri.split(",", 1)
    assert kind == "data:image/png;base64"
    return torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))).permute(2, 0, 1)


NAME = "<script>alert('x')</script> \"ä\" $name &amp; \udcff.png"


@pytest.fixture(scope="module")
def page(model, tmp_path_factory):
    """A page of two images, the second without original, and their views."""
    viewer = Viewer(model, 3, 0.4, [0.0, 0.2])
    views = [viewer.view(NAME, LR, HR), viewer.view("b", LR)]
    path = tmp_path_factory.mktemp("page") / "new" / "page.html"
    settings = {**viewer.settings(), "<b>": "$x"}
    assert write_page(path, iter(views), title="<T> $y", settings=settings, notes=["without <LPIPS>"]) == 2
    return Page(path.read_text(encoding="utf-8")), views


def test_a_page_holds_all_pictures(page):
    page, views = page
    sources = [attributes for attributes in page.of("img") if "src" in attributes]
    shown = {}
    for attributes, (_, radio) in zip(sources, [e for e in page.elements if e[1].get("name", "").startswith("right-")]):
        pixels = pixels_of(attributes["src"])
        assert [int(attributes[side]) for side in ("height", "width")] == list(pixels.shape[1:])
        shown[radio["name"], radio["value"]] = pixels
    for number, view in enumerate(views, 1):
        expected = {picture.key: picture.pixels for picture in view.pictures} | {"deviation": coloured(view.deviation)}
        for key, pixels in expected.items():
            assert torch.equal(shown.pop((f"right-{number}", key)), pixels), key
    assert not shown, "each once"
    assert [(article["data-width"], article["data-height"], article["data-left"]) for article in page.of("article")] == [
        ("40", "32", "lr")
    ] * 2


def test_a_page_needs_nothing_from_elsewhere(page):
    page, _ = page
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert name not in ("src", "href") or value.startswith("data:"), (tag, name, value)
            assert not name.startswith("on") and name not in ("srcset", "action", "data", "poster")
    (policy,) = [meta["content"] for meta in page.of("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert [tag for tag, _ in page.elements if tag in ("script", "style", "link", "iframe")] == ["link", "style", "script"]
    assert page.open == []


def test_names_are_text(page):
    page, _ = page
    text = "".join(page.words)
    for words in (
        NAME.replace("\udcff", "?"),
        "<T> $y",
        "<b>",
        "$x",
        "without <LPIPS>",
        "none was given",
        "10×8 → 40×32 pixels",
    ):
        assert words in text, words


def test_controls_have_names(page):
    """Each by its label, or by an aria-label; ids are of one element each."""
    page, _ = page
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) == 4
    assert all(attributes["aria-labelledby"] in ids for attributes in page.of("article"))
    for tag in ("select", "button"):
        assert all(attributes.get("aria-label") for attributes in page.of(tag))
    for attributes in page.of("input"):
        assert attributes["type"] == "radio" or attributes["aria-label"]


def test_metrics_are_in_a_table(page):
    page, (view, other) = page
    text = [word.strip() for word in page.words if word.strip()]
    samples = view.of_kind("sample")
    start = text.index("Mean of 3 samples")
    psnr_mean, ssim_mean = (sum(sample.metrics[name] for sample in samples) / 3 for name in ("psnr", "ssim"))
    assert text[start + 1 : start + 3] == [f"{psnr_mean:.2f}", f"{ssim_mean:.3f}"]
    second = text.index("Mean of 3 samples", start + 1)
    assert text[second + 1] == f"{sum(sample.metrics['lr_psnr'] for sample in other.of_kind('sample')) / 3:.2f}"
    assert text[second - 1] == f"{other.of_kind('sample')[-1].metrics['lr_psnr']:.2f}", "no other column"


def test_an_infinite_psnr_is_written(tmp_path):
    pictures = [Picture("lr", "LR", LR, {}), Picture("sample-0", "Sample 0", HR, {"psnr": float("inf")})]
    write_page(tmp_path / "page.html", [View("a", 4, pictures, None)])
    assert "PSNR ∞ dB" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_leaves_the_one_before(tmp_path, model):
    (tmp_path / "page.html").write_text("before")
    with pytest.raises(ValueError, match="no image to show"):
        write_page(tmp_path / "page.html", [])
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "before"


def test_pictures_are_lossless():
    assert torch.equal(pixels_of(data_uri(HR)), HR)
