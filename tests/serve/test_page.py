"""Tests of the page in Chromium, driven by Selenium, with access to loopback only."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dave_fast.client import Client
from dave_fast.models.demo import demo_scene
from dave_fast.serve.limits import Limits
from dave_fast.serve.models import load_models
from tests.browser import chromium, complaints, emulate, flaws, needs_chromium
from tests.serve.tiny_server import file_of, serve_clip, serve_model, serving

pytestmark = needs_chromium
PATIENCE = 60.0
SAMPLES = 48


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Serve the embedded model first, a small one, and models of tokens and of texts; yield the address."""
    demo, tokens = load_models(["demo", "patches=tokens:demo"], [None]).values()
    with serving(models=[demo, serve_model(), tokens, serve_clip()]) as (address, _):
        yield address


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "scene.png"
    demo_scene().image.save(path)
    return path


class Page:
    """The page as a person uses it: clicks, files, keys, and the shown text and pixels."""

    def __init__(self, browser: Any, address: str) -> None:
        self.browser = browser
        self.emulate()
        browser.get_log("browser")
        browser.get(address)
        self.until(lambda: self.all("#model option"), "models")
        self.run(f"document.getElementById('samples').value = {SAMPLES}")
        # records each text that is shown or announced
        self.run("""
            window.seen = {}
            for (const id of ["told-samples", "told-bound", "heard", "status"]) {
              const list = (window.seen[id] = [])
              const look = () => list.push(document.getElementById(id).textContent)
              const wanted = { childList: true, characterData: true, subtree: true }
              new MutationObserver(look).observe(document.getElementById(id), wanted)
            }
        """)

    def emulate(self, **wanted: Any) -> None:
        emulate(self.browser, **wanted)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0])?.textContent ?? ''", selector))

    def seen(self, name: str) -> list[str]:
        return list(self.run("return window.seen[arguments[0]]", name))

    def until(self, holds: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + PATIENCE
        while not (value := holds()):
            assert time.monotonic() < end, f"no {what}: {self.text('#status')!r}, {self.text('#problem')!r}"
            time.sleep(0.05)
        return value

    def choose_model(self, name: str) -> None:
        self.run(
            "const model = arguments[0]; model.value = arguments[1]; model.dispatchEvent(new Event('change'))",
            self.one("#model"),
            name,
        )

    def forms(self) -> list[str]:
        """Return the forms of questions that are shown."""
        return [form.get_attribute("id") for form in self.all("#questions form") if form.is_displayed()]

    def give(self, path: Path) -> None:
        self.one("#file").send_keys(str(path))

    def done(self, classes: int = 1) -> None:
        def holds() -> bool:
            assert not self.text("#problem"), self.text("#problem")
            over = self.text("#status").startswith(("Done", "Good enough"))
            return over and len(self.all("#maps article")) == classes

        self.until(holds, "answer")

    def problem(self) -> str:
        return str(self.until(lambda: self.text("#problem"), "problem"))

    def pixels(self, selector: str) -> np.ndarray:
        """Return the pixels of a canvas, uint8 (H, W, 3)."""
        width, height, data = self.run(
            """
            const canvas = document.querySelector(arguments[0])
            const { width, height } = canvas
            return [width, height, [...canvas.getContext("2d").getImageData(0, 0, width, height).data]]
            """,
            selector,
        )
        return np.array(data, np.uint8).reshape(height, width, 4)[..., :3]

    def file(self, name: str) -> bytes:
        """Return the content of a downloaded file, and remove it."""
        path = self.browser.downloads / name
        self.until(path.exists, f"file {name}")
        content = path.read_bytes()
        path.unlink()
        return content

    def flaws(self) -> list[str]:
        return flaws(self.browser)


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Page]:
    page = Page(browser, address)
    yield page
    # entries of these sources mean a violated policy or a failed script; the server's refusals are logged under others
    assert not complaints(browser)


@pytest.fixture
def explained(page: Page, scene: Path) -> Page:
    page.give(scene)
    page.done()
    return page


def test_the_map_sharpens_live_and_screen_readers_hear_start_and_end(page: Page, scene: Path) -> None:
    page.give(scene)
    page.done()
    samples = [int(text.split("/")[0]) for text in page.seen("told-samples") if "/" in text]
    assert len(set(samples)) >= 3 and samples == sorted(samples) and samples[-1] == SAMPLES
    bounds = [float(text.rstrip(" %")) for text in page.seen("told-bound") if text != "–"]
    assert bounds[-1] < bounds[0]
    heard = [text for text in page.seen("heard") if text]
    assert heard[0] == "Explaining." and heard[-1].startswith(f"Done: {SAMPLES} samples, error below")
    assert len(heard) == 2 and page.one("#heard").get_attribute("role") == "status"
    assert page.text("#maps h3").startswith("four")
    names = [name.text for name in page.all("#top .name")]
    assert names[:2] == ["four", "six"] and len(names) == 5
    assert page.all("#curve polyline") and page.all("#curve polygon")


def test_every_byte_comes_from_the_server_under_a_strict_policy(explained: Page, address: str) -> None:
    asked = explained.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert len(asked) >= 8 and all(name.startswith((address, "data:")) for name in asked)
    policy = explained.run("return fetch('/').then((answer) => answer.headers.get('content-security-policy'))")
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert explained.run("try { document.body.innerHTML = '<p>' } catch (error) { return error.name }") == "TypeError"
    # reading the log empties it, since other tests expect no entry
    assert "TrustedHTML" in str(explained.browser.get_log("browser"))


def test_the_picture_is_the_one_that_files_have(explained: Page, address: str, scene: Path) -> None:
    shown = explained.pixels("#maps canvas").astype(float)
    with Client(address) as client:
        answer = client._http.post(
            "/v1/explain", params={"n_samples": SAMPLES}, content=scene.read_bytes(), headers={"accept": "image/png"}
        )
    file = Image.open(io.BytesIO(answer.content)).convert("RGB").resize((128, 128), Image.Resampling.BOX)
    assert np.corrcoef(shown.ravel(), np.asarray(file, float).ravel())[0, 1] > 0.99
    # at opacity 0 the photograph is shown
    explained.run(
        "const slider = arguments[0]; slider.value = 0; slider.dispatchEvent(new Event('input'))",
        explained.one("#opacity"),
    )
    assert (explained.pixels("#maps canvas") == explained.pixels("#photo")).all()
    assert (explained.pixels("#photo") == np.asarray(demo_scene().image)).all()
    assert explained.text("#opacity-value") == "0 %"


def test_classes_switch_by_the_arrow_keys_and_compare_side_by_side(explained: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    four = explained.pixels("#maps canvas")
    explained.one("#top input:checked").send_keys(Keys.ARROW_DOWN)
    explained.until(lambda: explained.text("#maps h3").startswith("six"), "map of six")
    explained.done()
    assert explained.run("return document.activeElement.dataset.target") == "6"
    assert (explained.pixels("#maps canvas") != four).any()
    explained.one("#compare").click()
    explained.one("#top input[data-target='4']").click()
    explained.until(lambda: len(explained.all("#maps article")) == 2, "second map")
    explained.done(2)
    assert [title.text.split("\n")[0] for title in explained.all("#maps h3")] == ["six", "four"]
    assert (explained.pixels("#maps article:nth-child(2) canvas") == four).mean() > 0.99
    assert len(explained.all("#curve polyline")) == 2
    # by name, a class that is not among the five most probable
    explained.one("#other").send_keys("seven\n")
    explained.until(lambda: len(explained.all("#maps article")) == 3, "third map")
    explained.done(3)
    explained.one("#compare").click()
    explained.done(1)


def test_downloads_hold_what_is_shown(explained: Page, address: str, scene: Path) -> None:
    png, npz = explained.all("#maps article button")
    png.click()
    picture = Image.open(io.BytesIO(explained.file("dave-four.png")))
    assert picture.size == (512, 512)
    small = np.asarray(picture.convert("RGB").resize((128, 128), Image.Resampling.BOX), float)
    assert np.abs(small - explained.pixels("#maps canvas")).mean() < 3
    npz.click()
    with np.load(io.BytesIO(explained.file("dave-four.npz"))) as arrays, Client(address) as client:
        expected = client.explain(scene, "four", n_samples=SAMPLES, seed=0)
        np.testing.assert_allclose(arrays["maps"], expected.maps, atol=1e-5)
        assert (
            arrays["targets"].tolist() == [4]
            and arrays["samples"] == SAMPLES
            and arrays["input"].shape == (128, 128, 3)
            and arrays["shrink"]
        )


def test_shrinkage_is_the_servers_until_it_is_switched_off(explained: Page) -> None:
    shrunk, box = explained.pixels("#maps canvas"), explained.one("#shrink")
    assert explained.run("return arguments[0].checked", box)
    explained.run("arguments[0].click()", box)
    explained.until(lambda: (explained.pixels("#maps canvas") != shrunk).any(), "the paper's map")
    explained.done()
    explained.all("#maps article button")[1].click()
    with np.load(io.BytesIO(explained.file("dave-four.npz"))) as arrays:
        assert not arrays["shrink"]


def test_the_slider_shows_other_depths_of_the_same_samples(explained: Page, address: str, scene: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    asked = "return performance.getEntriesByType('resource').filter((one) => one.name.includes('explain')).length"
    pixels, requests, slider = explained.pixels("#maps canvas"), explained.run(asked), explained.one("#depth")
    assert explained.text("#depth-value") == "pixels"
    assert explained.text("#depth-share").startswith("The pixels account for ")
    bounds = {explained.text("#told-bound")}
    slider.send_keys(*[Keys.ARROW_RIGHT] * 4)
    assert slider.get_attribute("aria-valuetext") == explained.text("#depth-value") == "block 3 of 5"
    assert explained.text("#depth-share").startswith("The tokens that enter this block account for ")
    assert explained.one("#maps canvas").get_attribute("aria-label").startswith("Map of what enters block 3 of 5")
    assert explained.run(asked) == requests and len(bounds | {explained.text("#told-bound")}) == 2
    assert explained.run("return location.search") == "?depth=3"
    deep = explained.pixels("#maps canvas")
    assert (deep != pixels).any()
    explained.all("#maps article button")[1].click()
    with np.load(io.BytesIO(explained.file("dave-four-block-3.npz"))) as arrays, Client(address) as client:
        told = client.explain(scene, "four", n_samples=SAMPLES, depth=3)
        assert arrays["depth"] == "3"
        np.testing.assert_allclose(arrays["maps"], told.maps, atol=1e-5)
    (account,) = told.accounts or []
    assert f"of the score {account['score']:.2f}" in explained.text("#depth-share")
    # the address brings it back, and it is the map that is refined
    again = Page(explained.browser, f"{address}/?depth=3")
    again.give(scene)
    again.done()
    assert again.text("#depth-value") == "block 3 of 5" and (again.pixels("#maps canvas") == deep).mean() > 0.99
    again.one("#depth").send_keys(Keys.HOME)
    assert again.run("return location.search") == "" and (again.pixels("#maps canvas") == pixels).mean() > 0.99


def test_difference_of_two_classes_is_shown_in_the_two_colours_of_files(
    explained: Page, address: str, scene: Path
) -> None:
    assert explained.forms() == ["ask-class", "ask-contrast"]
    assert not explained.one("#two-colours").is_displayed()
    # the two most probable classes stand in the fields
    explained.one("#ask-contrast button").click()
    explained.until(lambda: explained.text("#maps h3") == "four − six", "difference")
    explained.done()
    shown = explained.pixels("#maps canvas").astype(float)
    asked = {"target": "four-six", "view": "signed", "n_samples": SAMPLES}
    with Client(address) as client:
        answer = client._http.post(
            "/v1/explain", params=asked, content=scene.read_bytes(), headers={"accept": "image/png"}
        )
    file = Image.open(io.BytesIO(answer.content)).convert("RGB").resize((128, 128), Image.Resampling.BOX)
    assert np.corrcoef(shown.ravel(), np.asarray(file, float).ravel())[0, 1] > 0.99
    # both colours are there: much redder than blue, and much bluer than red
    redder = shown[..., 0] - shown[..., 2]
    assert redder.max() > 100 and redder.min() < -100
    assert explained.one("#two-colours").is_displayed() and not explained.one("#one-colour").is_displayed()
    assert "blue where against" in explained.one("#maps canvas").get_attribute("aria-label")
    assert [box.is_selected() for box in explained.all("#top input")] == [False] * 5 + [True]
    explained.all("#maps article button")[1].click()
    with np.load(io.BytesIO(explained.file("dave-four-six.npz"))) as arrays:
        assert arrays["targets"].tolist() == [-1] and arrays["class_names"].tolist() == ["four − six"]
    # classes of the user's own, by index and by name
    explained.one("#this").send_keys("3")
    explained.one("#that").send_keys("nine\n")
    explained.until(lambda: explained.text("#maps h3") == "three − nine", "another difference")
    explained.done()


def test_what_speaks_against_a_class_is_shown_when_it_is_wanted(explained: Page) -> None:
    one = explained.pixels("#maps canvas").astype(int)
    explained.run("arguments[0].click()", explained.one("#both"))
    explained.until(lambda: explained.one("#two-colours").is_displayed(), "two colours")
    explained.done()
    both = explained.pixels("#maps canvas").astype(int)
    assert (one[..., 0] - one[..., 2]).min() > -100 > (both[..., 0] - both[..., 2]).min()
    explained.run("arguments[0].click()", explained.one("#both"))
    assert (explained.pixels("#maps canvas") == one).mean() > 0.99


def test_question_that_the_server_refuses_is_told_at_its_field_and_the_maps_stay(explained: Page) -> None:
    before = explained.pixels("#maps canvas")
    explained.one("#other").send_keys("walrus\n")
    explained.until(lambda: "walrus" in explained.text("#class-wrong"), "words of the server")
    assert explained.text("#problem") == "" and explained.one("#class-wrong").get_attribute("role") == "alert"
    assert explained.run("return document.activeElement.id") == "other"
    assert explained.one("#other").get_attribute("aria-invalid") == "true"
    assert (explained.pixels("#maps canvas") == before).all()
    assert explained.text("#told-samples") == f"{SAMPLES} / {SAMPLES}"
    assert explained.one("#top input:checked").get_attribute("data-target") == "4" and explained.all("#curve polyline")
    explained.one("#other").clear()
    explained.one("#other").send_keys("seven\n")
    explained.until(lambda: explained.text("#maps h3").startswith("seven"), "map of another class")
    explained.done()
    assert explained.text("#class-wrong") == "" and explained.one("#other").get_attribute("aria-invalid") is None


def test_model_of_texts_is_asked_about_a_text_and_a_difference(page: Page, scene: Path, address: str) -> None:
    page.choose_model("clip")
    assert page.forms() == ["ask-text"] and page.text("#legend") == "Question"
    assert not page.one("#text").is_enabled()
    page.give(scene)
    page.until(lambda: page.text("#status") == "Ask about a text", "invitation")
    assert page.flaws() == []
    page.one("#text").send_keys("a cat\n")
    page.done()
    assert page.text("#maps h3") == "“a cat”" and page.one("#one-colour").is_displayed()
    page.one("#not-text").send_keys("a dog\n")
    page.until(lambda: page.text("#maps h3") == "“a cat” − “a dog”", "difference")
    page.done()
    assert page.one("#two-colours").is_displayed()
    page.all("#maps article button")[1].click()
    with np.load(io.BytesIO(page.file("dave-a-cat-a-dog.npz"))) as arrays, Client(address) as client:
        told = client.explain(scene, "text:a cat - text:a dog", model="clip", n_samples=SAMPLES)
        np.testing.assert_allclose(arrays["maps"], told.maps, atol=1e-5)
    # questions of one model are none of another
    page.choose_model("demo")
    page.until(lambda: page.text("#maps h3").startswith("four"), "predicted class")
    page.done()
    assert page.forms() == ["ask-class", "ask-contrast"] and len(page.all("#top label")) == 5


def test_patch_is_asked_about_by_a_click_and_by_the_keyboard(page: Page, scene: Path, address: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    page.choose_model("patches")
    assert page.forms() == ["ask-patch"]
    page.give(scene)
    page.until(lambda: page.text("#status") == "Ask about a patch", "invitation")
    photo = page.one("#photo")
    assert not page.one("#cell").is_displayed()
    # offsets from the centre, of 8 x 8 patches: the one above and right of it
    side = photo.size["width"] / 8
    ActionChains(page.browser).move_to_element_with_offset(photo, int(side / 2), int(-side / 2)).click().perform()
    page.done()
    assert page.text("#maps h3") == "patch 3, 4" and page.flaws() == []
    cell = page.run("return document.getElementById('cell').getBoundingClientRect().toJSON()")
    frame = page.run("return document.getElementById('photo').getBoundingClientRect().toJSON()")
    assert (cell["left"] - frame["left"]) / frame["width"] == pytest.approx(4 / 8, abs=0.01)
    assert (cell["top"] - frame["top"]) / frame["height"] == pytest.approx(3 / 8, abs=0.01)
    page.one("#row").clear()
    page.one("#row").send_keys("6\n")
    page.until(lambda: page.text("#maps h3") == "patch 6, 4", "another patch")
    page.done()
    page.all("#maps article button")[1].click()
    with np.load(io.BytesIO(page.file("dave-patch-6-4.npz"))) as arrays, Client(address) as client:
        told = client.explain(scene, "patch:6,4", model="patches", n_samples=SAMPLES)
        np.testing.assert_allclose(arrays["maps"], told.maps, atol=1e-5)
    page.one("#row").clear()
    page.one("#row").send_keys("8\n")
    page.until(lambda: "grid of 8 rows" in page.text("#patch-wrong"), "words of the server")
    assert not page.one("#cell").is_displayed()


def test_drop_paste_and_another_model(page: Page, photo: bytes) -> None:
    page.run("document.getElementById('model').value = 'tiny'")
    give = """
        const made = new DataTransfer()
        const [kind, name, bytes] = arguments
        made.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }))
        const event = kind === "drop" ? new DragEvent("drop", { dataTransfer: made, bubbles: true, cancelable: true })
                                      : new ClipboardEvent("paste", { clipboardData: made, bubbles: true })
        document.body.dispatchEvent(event)
    """
    page.run(give, "drop", "dropped.png", list(photo))
    page.done()
    assert any("dropped.png" in text for text in page.seen("status"))
    page.run(give, "paste", "pasted.png", list(photo))
    page.until(lambda: any("pasted.png" in text for text in page.seen("status")), "pasted image")
    page.done()
    page.choose_model("demo")
    page.until(lambda: page.pixels("#photo").shape == (128, 128, 3), "crop of the other model")
    page.done()


def test_tolerance_ends_early(page: Page, scene: Path) -> None:
    page.run("document.getElementById('tolerance').value = '0.5'; document.getElementById('samples').value = 512")
    page.give(scene)
    page.done()
    assert page.text("#status").startswith("Good enough") and page.all("#curve .wanted")
    assert int(page.text("#told-samples").split("/")[0]) < 512


def test_stop_ends_it(page: Page, scene: Path) -> None:
    page.run("document.getElementById('samples').value = 1024")
    page.give(scene)
    page.until(lambda: "/" in page.text("#told-samples"), "first samples")
    page.one("#stop").click()
    assert page.text("#status") == "Stopped" and not page.one("#stop").is_enabled()
    assert page.run("return document.activeElement.id") == "again"


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page: Page, scene: Path, scheme: str, width: int) -> None:
    page.emulate(width=width, scheme=scheme)
    assert page.flaws() == []
    page.give(scene)
    page.done()
    page.one("summary").click()
    page.run("document.querySelector('#ask-contrast button').click()")
    page.until(lambda: page.text("#maps h3") == "four − six", "difference")
    page.done()
    assert page.flaws() == []
    page.one("#other").send_keys("no such class\n")
    page.until(lambda: "no such class" in page.text("#class-wrong"), "words of the server at the field")
    assert page.flaws() == []


def test_the_keyboard_reaches_everything_in_order(explained: Page) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    explained.run("document.activeElement.blur(); window.scrollTo(0, 0)")
    order: list[str] = []
    while "both" not in order and len(order) < 25:
        ActionChains(explained.browser).send_keys(Keys.TAB).perform()
        order.append(
            explained.run("const at = document.activeElement; return at.id || at.name || at.textContent.trim()")
        )
        assert explained.run("return document.activeElement.matches(':focus-visible')")
    assert order[:3] == ["file", "model", "class"]
    rest = [
        "compare",
        "other",
        "add",
        "this",
        "that",
        "Explain the difference",
        "Samples and accuracy",
        "again",
        "Save PNG of four",
        "Save .npz of four",
        "depth",
        "opacity",
        "both",
    ]
    assert order[3:] == rest


def test_narrow_screens_and_reduced_motion(explained: Page) -> None:
    for width in (320, 390, 640, 1920):
        explained.emulate(width=width, motion="reduce")
        assert explained.run("return document.documentElement.scrollWidth") <= width
    assert explained.run("return getComputedStyle(document.querySelector('.bar span')).transitionDuration") == "0s"


def test_files_that_are_no_image_are_refused_in_words(page: Page, scene: Path, tmp_path: Path) -> None:
    text, broken = tmp_path / "notes.txt", tmp_path / "broken.png"
    text.write_text("not an image")
    broken.write_bytes(scene.read_bytes()[:100])
    page.give(text)
    assert "“notes.txt” is no image file" in page.problem()
    assert page.one("#problem").get_attribute("role") == "alert"
    # its name is that of an image, so the server refuses it
    page.give(broken)
    page.until(lambda: "notes.txt" not in page.text("#problem") and page.text("#problem"), "problem of the server")
    assert page.one("#welcome").is_displayed() and not page.one("#result").is_displayed()
    page.give(scene)
    page.done()
    assert page.text("#problem") == "" and page.one("#result").is_displayed()
    # the result stays when the next file is no image
    page.give(text)
    assert "no image" in page.problem() and page.text("#status").startswith("Done")


def test_numbers_that_cannot_be_are_not_sent(explained: Page) -> None:
    explained.run("const f = document.getElementById('samples'); f.value = 0; f.dispatchEvent(new Event('change'))")
    assert explained.text("#status").startswith("Done")
    assert explained.run("return document.getElementById('samples').matches(':invalid')")


def test_an_image_that_the_server_forgot_is_sent_again(browser: Any, scene: Path) -> None:
    with serving(Limits(stored_images=1)) as (address, _), Client(address) as client:
        page = Page(browser, address)
        page.give(scene)
        page.done()
        client._http.post("/v1/images", content=file_of(np.zeros((32, 32, 3), np.uint8)))
        page.one("#again").click()
        page.done()
        assert page.seen("heard").count("Explaining.") == 2


@contextmanager
def occupied(address: str, photo: bytes) -> Iterator[None]:
    """Occupy the only place of a server's queue within this context."""
    leave, there = threading.Event(), threading.Event()

    def stay() -> None:
        with Client(address) as client:
            while not leave.is_set():
                for _ in client.stream(photo, n_samples=1024):
                    there.set()
                    if leave.is_set():
                        break

    thread = threading.Thread(target=stay)
    thread.start()
    try:
        assert there.wait(PATIENCE)
        yield
    finally:
        leave.set()
        thread.join()


def test_a_busy_server_is_asked_again(browser: Any, photo: bytes, scene: Path) -> None:
    with serving(Limits(requests=1)) as (address, _):
        page = Page(browser, address)
        with occupied(address, photo):
            page.give(scene)
            page.until(lambda: "busy" in page.text("#status"), "wait")
        page.done()


def test_a_server_that_goes_away_is_said(browser: Any, scene: Path) -> None:
    with serving() as (address, _):
        page = Page(browser, address)
        page.give(scene)
        page.done()
    page.one("#again").click()
    assert "does not answer" in page.problem() and page.text("#status") == "Not explained"
    assert page.one("#again").is_enabled()
    # the map shown before can still be viewed and saved
    before = page.pixels("#maps canvas")
    slide = "const slider = arguments[0]; slider.value = 0; slider.dispatchEvent(new Event('input'))"
    page.run(slide, page.one("#opacity"))
    assert (page.pixels("#maps canvas") != before).any()
    page.all("#maps article button")[0].click()
    assert Image.open(io.BytesIO(page.file(f"dave-{page.text('#maps .name').replace(' ', '-')}.png"))).width >= 448


def test_a_key_is_asked_for(browser: Any, scene: Path) -> None:
    with serving(api_keys=["open sesame"]) as (address, _):
        browser.execute_cdp_cmd("Network.enable", {})
        browser.get(address)
        dialog = browser.find_element("id", "key-dialog")
        end = time.monotonic() + PATIENCE
        while not dialog.is_displayed():
            assert time.monotonic() < end
            time.sleep(0.05)
        browser.find_element("id", "key").send_keys("open sesame\n")
        while not browser.find_elements("css selector", "#model option"):
            assert time.monotonic() < end
            time.sleep(0.05)
        browser.find_element("id", "file").send_keys(str(scene))
        while not browser.find_element("id", "status").text.startswith("Done"):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert json.loads(browser.execute_script("return JSON.stringify({...sessionStorage})")) == {
            "dave-fast-key": "open sesame"
        }
