"""The gallery's page in a headless browser: what is drawn is what the divider, the lists and the small pictures ask for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from browser import Browser

from ncsr_fast.gallery import Picture, View, write_page
from ncsr_fast.gallery.views import deviation_of

pytestmark = pytest.mark.slow

SIZE = (40, 60)  # of the pictures; LR is a quarter


def noise(height, width, seed):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def view(name, seed, size=SIZE):
    height, width = size
    pictures = [Picture("lr", "LR (nearest)", noise(height // 4, width // 4, seed), {})]
    pictures += [
        Picture(f"sample-{k}", f"Sample {k}", noise(height, width, seed + 1 + k), {"psnr": 20.0 + k}) for k in range(2)
    ]
    pictures.append(Picture("original", "Original", noise(height, width, seed + 3), {}))
    return View(name, 4, pictures, deviation_of(torch.stack([pictures[1].pixels, pictures[2].pixels])))


VIEWS = [view("first", 0), view("<b>second</b>", 10)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser, tmp_path):
    """The page in a window of a desktop; nothing is loaded, logged or raised during the test."""
    write_page(tmp_path / "page.html", VIEWS, title="A title", notes=["a note"])
    browser.events.clear()
    browser.open((tmp_path / "page.html").as_uri())
    yield browser
    asked = {event["request"]["url"] for event in browser.of_kind("Network.requestWillBeSent")}
    assert (tmp_path / "page.html").as_uri() in asked
    assert all(url.startswith("data:") for url in asked - {(tmp_path / "page.html").as_uri()}), asked
    assert browser.of_kind("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded") == []


def picture(key, factor, place=0):
    """A picture of a view as it is drawn, uint8 (H, W, 3)."""
    (pixels,) = [p.pixels for p in VIEWS[place].pictures if p.key == key]
    grown = factor * SIZE[0] // pixels.shape[1]
    return pixels.repeat_interleave(grown, 1).repeat_interleave(grown, 2).permute(1, 2, 0).numpy()


def assert_drawn(page, left, right, part, factor, place=0):
    """Both pictures to the pixel: beside the divider, below their names, without the rounded corners."""
    found, rows = page.pixels(f"#image-{place + 1} .stage"), slice(40, -4)
    edge = round(part * factor * SIZE[1])
    assert found.shape == (factor * SIZE[0], factor * SIZE[1], 3)
    for key, columns in ((left, slice(0, max(0, edge - 22))), (right, slice(edge + 22, None))):
        assert np.array_equal(found[rows, columns], picture(key, factor, place)[rows, columns]), key


def factor_of(page, place=0):
    return round(page.box(f"#image-{place + 1} .canvas")[2] / SIZE[1])


def middle(page, selector, part=0.5):
    left, top, width, height = page.box(selector)
    return left + part * width, top + height / 2


def choose(page, select, value):
    """Choose an entry of a list."""
    found = f"document.querySelector('{select}')"
    page.evaluate(f"{found}.value = '{value}'; {found}.dispatchEvent(new Event('change'))")
    page.settle()


def test_the_divider_is_dragged(page):
    """By its handle, and by any place of the picture."""
    factor = factor_of(page)
    assert factor > 4, "a whole factor that fits"
    assert_drawn(page, "lr", "sample-0", 0.5, factor)
    page.drag(middle(page, "#image-1 .knob"), middle(page, "#image-1 .stage", 0.25))
    assert page.evaluate("document.querySelector('#image-1 .over').style.clipPath") == f"inset(-1px -1px -1px {factor * 15}px)"
    assert_drawn(page, "lr", "sample-0", 0.25, factor)
    page.drag(middle(page, "#image-1 .stage", 0.6), middle(page, "#image-1 .stage", 0.75))
    assert_drawn(page, "lr", "sample-0", 0.75, factor)
    assert_drawn(page, "lr", "sample-0", 0.5, factor_of(page, 1), place=1)


def test_the_divider_by_keys(page):
    page.evaluate("document.querySelector('#image-1 .position').focus()")
    page.key("End", 35)
    assert_drawn(page, "lr", "sample-0", 1, factor_of(page))
    page.key("Home", 36)
    page.key("ArrowRight", 39)
    said = page.evaluate("document.querySelector('#image-1 .position').getAttribute('aria-valuetext')")
    assert said == "1 % LR (nearest), 99 % Sample 0"
    assert_drawn(page, "lr", "sample-0", 0.01, factor_of(page))


def test_the_divider_by_touch(page, tmp_path):
    """In the window of a phone, wide enough for all that is on the page; a touch that wanders up is no scrolling."""
    page.open((tmp_path / "page.html").as_uri(), 390, 844)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    start, end = middle(page, "#image-1 .knob"), middle(page, "#image-1 .stage", 0.7)
    page.touch(start, *((start[0], start[1] - up) for up in (10, 40, 70)), end)
    assert page.evaluate("scrollY") == 0
    assert_drawn(page, "lr", "sample-0", 0.7, factor_of(page))


def test_pictures_are_switched(page):
    """By a click on a small picture, by keys from there, by the lists and by the button between them."""
    factor = factor_of(page)
    page.drag(*[middle(page, "#image-1 .thumb:has([value='sample-1'])")] * 2)
    assert_drawn(page, "lr", "sample-1", 0.5, factor)
    assert page.evaluate("document.querySelector('#image-1 dd.right').textContent") == "PSNR 21.00 dB"
    page.key("ArrowLeft", 37)
    assert_drawn(page, "lr", "sample-0", 0.5, factor)
    choose(page, "#image-1 select.left", "sample-1")
    choose(page, "#image-1 select.right", "original")
    assert_drawn(page, "sample-1", "original", 0.5, factor)
    page.drag(*[middle(page, "#image-1 .swap")] * 2)
    assert_drawn(page, "original", "sample-1", 0.5, factor)
    assert page.evaluate("document.querySelector('#image-1 .thumb input:checked').value") == "sample-1"
    assert_drawn(page, "lr", "sample-0", 0.5, factor_of(page, 1), place=1)


def test_zoom(page):
    page.drag(*[middle(page, "#image-1 .zoom [value='1']")] * 2)
    assert_drawn(page, "lr", "sample-0", 0.5, 1)
    page.drag(*[middle(page, "#image-1 .zoom [value='4']")] * 2)
    assert_drawn(page, "lr", "sample-0", 0.5, 4)


def test_a_picture_larger_than_its_window_is_moved(page, tmp_path):
    """By a drag; the divider stays in its place and clips what has come there. There the handle alone moves it."""
    write_page(tmp_path / "page.html", [view("large", 0, (400, 600))])
    page.open((tmp_path / "page.html").as_uri())
    page.evaluate("""document.querySelector("#image-1 .zoom [value='4']").click()""")
    left, top, width, height = page.box("#image-1 .stage")
    page.drag((left + 300, top + 200), (left + 200, top + 150))
    assert page.evaluate("(({scrollLeft, scrollTop}) => [scrollLeft, scrollTop])(document.querySelector('.stage'))") == [
        100,
        50,
    ]
    page.drag(middle(page, "#image-1 .knob"), middle(page, "#image-1 .stage", 0.25))
    clip = page.evaluate("document.querySelector('.over').style.clipPath")
    assert float(clip.split()[3].rstrip("px)")) == pytest.approx(100 + 0.25 * width, abs=0.5)
    assert page.evaluate("document.querySelector('.stage').scrollLeft") == 100


@pytest.mark.parametrize("scheme, dark", [("light", False), ("dark", True)])
def test_schemes(page, tmp_path, scheme, dark):
    page.open((tmp_path / "page.html").as_uri(), scheme=scheme)
    corner = page.pixels()[-1, 0].mean()
    assert (corner < 60) if dark else (corner > 200)
    words = page.evaluate("getComputedStyle(document.body).color")
    assert (words == "rgb(236, 236, 234)") is dark


def test_names_of_images_are_text_and_lead_there(page):
    assert page.evaluate("[...document.querySelectorAll('h2')].map((h) => h.textContent)") == ["first", "<b>second</b>"]
    choose(page, ".jump select", "image-2")
    assert page.evaluate("scrollY") > 100


def test_controls_have_names_for_assistive_technology(page):
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("slider", "radio", "button", "combobox", "group", "radiogroup")
    named = [(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if node["role"]["value"] in roles]
    assert {role for role, _ in named} >= {"slider", "radio", "button", "combobox"}
    assert all(name for role, name in named if role != "group"), named
    assert ("button", "Swap left and right") in named
    assert ("slider", "Divider between the left and the right picture") in named and (
        "radio",
        "Sample 1 PSNR 21.00 dB",
    ) in named
