"""Tests of the gallery of a run: its files, and its page in Chromium, opened from the disk."""

from __future__ import annotations

import json
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image

import dave_fast
from dave_fast.images import drawing
from dave_fast.run.export import export
from tests.browser import chromium, complaints, emulate, flaws, needs_chromium
from tests.run import made

EVIL = ['<img src=x onerror="window.pwned = 1">', "</script><script>window.pwned = 1</script>", "'\"&\u2028\\"]
PATIENCE = 20.0
# records of the run: with maps, then errors
MAPS, ERRORS = 700, 3


def data_of(folder: Path) -> dict:
    text = (folder / "data.js").read_text(encoding="ascii")
    assert text.startswith("window.gallery = ") and text.endswith(";\n")
    return json.loads(text.removeprefix("window.gallery = ").removesuffix(";\n"))


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """A gallery of 700 maps and 3 errors; the first ids, the first class and an error are hostile."""
    folder = tmp_path_factory.mktemp("gallery")
    photos = made.scenes(folder / "photos", 4)
    ids = [*EVIL, *(f"photo {number:04d}" for number in range(MAPS - len(EVIL)))]
    rows = [
        {"id": name, "uri": str(photos[number % 4]), "target": number % 7, "prediction": number % 7 % 5}
        | {"probability": None if number == 9 else (number * 37 % MAPS) / MAPS}
        for number, name in enumerate(ids)
    ]
    rows += [{"id": f"bad {number}", "uri": f"/bad{number}", "error": f"cannot read /bad{number}"} for number in (1, 2)]
    rows.append({"id": "bad 3", "uri": "/x", "error": f"odd: {EVIL[0]}"})
    run = made.make_run(folder / "run", rows, names=[EVIL[0], *made.NAMES[1:]], raw=True, target="label")
    with pytest.MonkeyPatch.context() as patch:
        # small pictures are quick
        patch.setattr(drawing, "SHORTEST_SIDE", 2 * made.SIDE)
        assert export(dave_fast.open_maps(run), "html", folder / "page") == 0
    return folder / "page"


# Files


def test_data_and_pictures_of_each_row(gallery):
    data = data_of(gallery)
    assert len(data["id"]) == MAPS + ERRORS and data["shown"] == [2] * MAPS + [0] * ERRORS
    assert data["views"] == ["overlay", "photograph", "signed"] and data["labelled"] is True
    assert data["probability"][9] is None and data["names"]["3"] == "digit 3"
    assert len(list(gallery.rglob("*.webp"))) == MAPS * 3 * 2


def test_pictures_are_large_and_small_and_the_photograph_is_as_the_model_saw_it(tmp_path):
    (photo,) = made.scenes(tmp_path / "photos", 1)
    made.make_run(tmp_path / "run", [{"id": "a", "uri": str(photo)}])
    export(dave_fast.open_maps(tmp_path / "run"), "html", tmp_path / "page")
    for name, side in (("pictures/000/000000.overlay", 448), ("small/000/000000.overlay", 288)):
        with Image.open(tmp_path / "page" / f"{name}.webp") as picture:
            assert picture.size == (side, side)
    with Image.open(tmp_path / "page/pictures/000/000000.photograph.webp") as picture:
        assert picture.size == (made.SIDE, made.SIDE)


def test_errors_are_of_one_kind_whatever_their_file_and_numbers(gallery):
    kinds = [kind for _, kind in data_of(gallery)["errors"].values()]
    assert kinds[0] == kinds[1] == "cannot read …" and kinds[2].startswith("odd: ")


def test_no_name_stands_in_the_page_itself(gallery):
    assert all("onerror" not in path.read_text() for path in gallery.glob("index.html"))
    assert not any(part in (gallery / "data.js").read_bytes() for part in (b"\xe2\x80\xa8", b"\x80"))


def test_a_map_whose_photograph_is_gone_is_shown_alone(tmp_path):
    photos = made.scenes(tmp_path / "photos", 2)
    rows = [{"id": path.name, "uri": str(path)} for path in photos]
    made.make_run(tmp_path / "run", rows)
    photos[1].unlink()
    assert export(dave_fast.open_maps(tmp_path / "run"), "html", tmp_path / "page") == 1
    assert data_of(tmp_path / "page")["shown"] == [2, 1]
    assert [path.name for path in (tmp_path / "page/pictures/000").glob("000001.*")] == ["000001.overlay.webp"]


def test_errors_alone_make_a_gallery(tmp_path):
    made.make_run(tmp_path / "run", [{"id": "a", "uri": "/a", "error": "none"}])
    assert export(dave_fast.open_maps(tmp_path / "run"), "html", tmp_path / "page") == 0
    assert data_of(tmp_path / "page")["shown"] == [0]


@pytest.mark.parametrize(("target", "wrong", "labelled"), [(None, 0, False), (None, 1, True), (3, 1, False)])
def test_a_class_is_a_label_where_the_records_named_it(tmp_path, target, wrong, labelled):
    (photo,) = made.scenes(tmp_path / "photos", 1)
    rows = [{"id": "a", "uri": str(photo), "target": 3, "prediction": 3 + wrong}]
    made.make_run(tmp_path / "run", rows, target=target)
    export(dave_fast.open_maps(tmp_path / "run"), "html", tmp_path / "page")
    assert data_of(tmp_path / "page")["labelled"] is labelled


def test_probabilities_that_are_none_are_no_number_in_the_data(gallery):
    assert "NaN" not in (gallery / "data.js").read_text()


# The page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


class Page:
    """The gallery as a person uses it."""

    def __init__(self, browser, folder: Path) -> None:
        self.browser, self.address = browser, (folder / "index.html").as_uri()
        emulate(browser)
        self.go()

    def go(self, state: str = "") -> None:
        # another page in between, since a change of the hash alone loads nothing
        self.browser.get("about:blank")
        self.browser.get(self.address + state)
        self.until(lambda: self.run("return document.readyState === 'complete'"), "page")

    def run(self, script: str, *arguments):
        return self.browser.execute_script(script, *arguments)

    def until(self, holds, what: str):
        end = time.monotonic() + PATIENCE
        while not (value := holds()):
            assert time.monotonic() < end, f"no {what}: {self.count!r}, {self.browser.current_url}"
            time.sleep(0.03)
        return value

    def choose(self, name: str, value: str) -> None:
        script = """
            const element = document.getElementById(arguments[0]); element.value = arguments[1]
            element.dispatchEvent(new Event('input', { bubbles: true }))
        """
        self.run(script, name, value)

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    @property
    def count(self) -> str:
        return self.text("#count")

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def ids(self) -> list[str]:
        return self.run("return [...document.querySelectorAll('#grid .id')].map((each) => each.textContent)")

    def state(self) -> dict[str, str]:
        """Return what the address remembers, once it has had the time to."""
        time.sleep(0.25)
        fragment = urlsplit(self.browser.current_url).fragment
        return {name: values[0] for name, values in parse_qs(fragment).items()}

    def viewer(self) -> str | None:
        """Return the id in the viewer, None where it is closed."""
        shown = "const v = document.getElementById('viewer'); return v.open ? v.querySelector('h2').textContent : null"
        return self.run(shown)


@pytest.fixture
def page(browser, gallery):
    page = Page(browser, gallery)
    complaints(browser)
    yield page
    assert page.run("return window.pwned") is None
    assert not complaints(browser)


@needs_chromium
def test_few_records_are_in_the_page_at_a_time_and_scrolling_shows_the_others(page):
    assert page.count == "703 of 703 records"
    assert 8 < len(page.ids()) < 150 and page.ids()[:3] == EVIL
    page.run("scrollTo(0, document.documentElement.scrollHeight)")
    page.until(lambda: page.ids()[-1] == "bad 3", "last record")
    assert len(page.ids()) < 150 and EVIL[0] not in page.ids()
    places = page.run("return [...document.querySelectorAll('#grid li')].map((each) => Number(each.dataset.place))")
    assert places == sorted(places)


@needs_chromium
def test_pictures_near_the_window_load(page):
    loaded = "const i = [...document.querySelectorAll('#grid img')].slice(0, 6); return i.every((e) => e.naturalWidth)"
    page.until(lambda: page.run(loaded), "pictures")


@needs_chromium
def test_filters_meet_and_are_told_and_show_all_ends_them(page):
    page.choose("q", "PHOTO 00")
    assert page.count == "100 of 703 records"
    page.choose("target", "5")
    page.choose("right", "no")
    # of numbers 3 to 102 those with 5 as the rest of a division by 7, all of which are predicted as class 0
    assert page.count == f"{sum(number % 7 == 5 for number in range(3, 103))} of 703 records"
    page.choose("right", "yes")
    assert page.count == "0 of 703 records" and page.run("return !document.getElementById('none').hidden")
    page.run("document.getElementById('reset').click()")
    assert page.count == "703 of 703 records" and page.state() == {}


@needs_chromium
def test_errors_are_records_that_can_be_chosen_by_kind(page):
    page.choose("status", "error")
    assert page.ids() == ["bad 1", "bad 2", "bad 3"] and "cannot read /bad1" in page.text("#grid li")
    page.choose("status", "error cannot read …")
    assert page.ids() == ["bad 1", "bad 2"]
    page.choose("status", "ok")
    assert page.count == "700 of 703 records"


@needs_chromium
def test_orders(page):
    page.choose("status", "ok")
    for order, factor in (("low", 1), ("high", -1)):
        page.choose("sort", order)
        script = "return [...document.querySelectorAll('#grid .percent')].map((each) => each.textContent)"
        told = [float(text.replace("< ", "").rstrip(" %")) for text in page.run(script)]
        assert len(told) > 8 and told == sorted(told, key=lambda share: factor * share)
    # without a probability: last
    page.run("scrollTo(0, document.documentElement.scrollHeight)")
    page.until(lambda: page.ids()[-1] == "photo 0006", "record without a probability")
    page.choose("status", "")
    page.choose("sort", "errors")
    page.run("scrollTo(0, 0)")
    page.until(lambda: page.ids()[:3] == ["bad 1", "bad 2", "bad 3"], "errors")


@needs_chromium
def test_the_address_keeps_the_state_and_opens_with_it(page):
    page.choose("q", "photo 000")
    page.choose("sort", "low")
    page.run("document.querySelector('.bar [data-view=photograph]').click()")
    state = page.state()
    assert state == {"q": "photo 000", "sort": "low", "view": "photograph"}
    before = page.ids()
    page.go(page.browser.current_url.removeprefix(page.address) + "&open=photo+0005")
    assert page.ids() == before and page.viewer() == "photo 0005"
    assert page.run("return document.querySelector('#grid img').src").endswith(".photograph.webp")
    page.go("#target=99&view=none&open=nobody&sort=high")
    assert page.count == "703 of 703 records" and page.viewer() is None


@needs_chromium
def test_the_viewer_by_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    page.run("document.querySelector('#grid button').focus()")
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ENTER)
    assert page.viewer() == EVIL[2] and page.text("#place") == "3 of 703"
    page.press(Keys.ARROW_RIGHT)
    assert page.viewer() == "photo 0000" and page.state()["open"] == "photo 0000"
    page.press(Keys.ARROW_DOWN)
    assert page.run("return document.getElementById('picture').src").endswith("000003.photograph.webp")
    page.until(lambda: page.run("return document.getElementById('picture').naturalWidth"), "picture")
    page.press(Keys.END)
    assert page.viewer() == "bad 3" and page.text("#no-picture") == f"odd: {EVIL[0]}"
    page.press(Keys.HOME, Keys.ARROW_LEFT)
    assert page.viewer() == EVIL[0]
    page.press(Keys.ESCAPE)
    assert page.viewer() is None and "open" not in page.state()
    assert page.run("return document.activeElement.closest('li').dataset.place") == "0"


@needs_chromium
def test_arrows_walk_through_the_grid_beyond_the_window(page):
    from selenium.webdriver.common.keys import Keys

    page.run("document.querySelector('#grid button').focus()")
    page.press(*[Keys.ARROW_DOWN] * 12)
    place = int(page.run("return document.activeElement.closest('li').dataset.place"))
    columns = page.run("return columns")
    assert place == 12 * columns
    top, bottom = page.run("const r = document.activeElement.getBoundingClientRect(); return [r.top, r.bottom]")
    assert top > page.run("return document.getElementById('controls').getBoundingClientRect().bottom")
    assert bottom <= page.run("return innerHeight")


@needs_chromium
def test_overlay_photograph_and_signed_are_other_pictures(page, gallery):
    pixels = {}
    for view in ("overlay", "photograph", "signed"):
        page.run("document.querySelector(`.bar [data-view=${arguments[0]}]`).click()", view)
        assert page.run("return document.querySelector('[aria-pressed=true]').dataset.view") == view
        name = page.run("return document.querySelector('#grid img').getAttribute('src')")
        pixels[view] = np.asarray(Image.open(gallery / name).convert("RGB").resize((16, 16)), np.int16)
    assert np.abs(pixels["overlay"] - pixels["photograph"]).max() > 50
    assert np.abs(pixels["overlay"] - pixels["signed"]).max() > 50


@needs_chromium
def test_without_its_data_the_page_says_so(browser, gallery, tmp_path):
    for name in ("index.html", "gallery.css", "gallery.js"):
        (tmp_path / name).write_bytes((gallery / name).read_bytes())
    page = Page(browser, tmp_path)
    assert "data.js is missing" in page.text("#problem")
    complaints(browser)


@needs_chromium
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_nothing_is_wider_than_the_window(page, width, scheme):
    emulate(page.browser, width=width, scheme=scheme)
    page.choose("sort", "errors")
    if width < 800:
        page.run("document.getElementById('more').click()")
    assert flaws(page.browser) == []
    assert page.run("return document.documentElement.scrollWidth") <= width
    page.run("document.querySelectorAll('#grid button')[5].click()")
    assert page.viewer() is not None and flaws(page.browser) == []
    assert page.run("return document.getElementById('viewer').scrollWidth") <= width
