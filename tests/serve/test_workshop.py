"""Tests of the processes that read what clients send: their answers, their limits, and whom they make wait."""

import asyncio
import io
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dave_fast.errors import ImageError, InputError, RefusedError, TooLargeError
from dave_fast.images.preprocess import from_config
from dave_fast.serve import workshop as module
from dave_fast.serve.account import Account, Share
from dave_fast.serve.jobs import DeadlineError
from dave_fast.serve.limits import FORMATS, Limits
from dave_fast.serve.workshop import QUICK_BYTES, Workshop
from tests.images.decoding_memory import PICTURES
from tests.serve.tiny_server import file_of
from tests.tolerances import DECODING_MEMORY

CONFIG = {"input_size": (3, 32, 32), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
PICTURE = {"pixels": 25_000_000, "formats": FORMATS, "config": CONFIG}
SMALL = file_of(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
GIB = 1 << 30


@pytest.fixture
def run():
    """Return a function that gives a workshop to a coroutine and returns its result."""

    def running(work, **limits):
        async def whole():
            workshop = Workshop(Limits(**limits))
            try:
                return await work(workshop)
            finally:
                workshop.stop()

        return asyncio.run(whole())

    return running


def task(workshop, content=SMALL, name="picture", account=None, deadline=None, **options):
    share = Share(account or Account(GIB))
    return workshop.run(name, content, share, deadline=deadline, **(options or PICTURE))


def slow_picture(side=2500):
    """Return a picture that takes seconds to decode: Pillow reads plain PPM in Python."""
    return b"P3 %d %d 255\n" % (side, side) + b"0 " * (3 * side * side)


def test_a_crop_is_that_of_the_preprocessing(run):
    told, crop = run(task)
    expected = from_config(CONFIG).crop(Image.open(io.BytesIO(SMALL)))
    assert crop == expected.tobytes()
    assert told == {"width": 50, "height": 40, "notes": [], "shape": [32, 32, 3]}


@pytest.mark.parametrize(
    ("name", "content", "options", "error"),
    [
        ("picture", b"", PICTURE, ImageError),
        ("picture", b"no picture", PICTURE, ImageError),
        ("picture", SMALL[:200], PICTURE, ImageError),
        ("picture", SMALL, PICTURE | {"pixels": 1999}, TooLargeError),
        ("form", b"", {"content_type": "multipart/form-data"}, ImageError),
        ("form", b"--b\r\n\r\nx", {"content_type": "multipart/form-data; boundary=b"}, ImageError),
        ("infer", b"", {}, InputError),
        ("infer", b"\xff", {}, InputError),
        ("infer", b"[" * 100_000, {}, InputError),
        ("infer", b'{"inputs": [{"data": ' + b"9" * 5000 + b"}]}", {}, InputError),
        ("infer", b'{"inputs": [{"datatype": "FP32", "shape": [2], "data": [1, true]}]}', {}, InputError),
        ("infer", b'{"inputs": [{"datatype": "FP32", "shape": [3], "data": [1, 2]}]}', {}, InputError),
    ],
)
def test_what_cannot_be_read_is_refused_and_the_process_lives(run, name, content, options, error):
    async def work(workshop):
        with pytest.raises(error):
            await task(workshop, content, name, **(options or {"none": 0}))
        before = children()
        await task(workshop)
        return before, children()

    before, after = run(work)
    assert before == after


def children():
    """Return the processes that read, by id."""
    origin = module._origin._process
    return {int(pid) for pid in Path(f"/proc/{origin.pid}/task/{origin.pid}/children").read_text().split()}


def test_memory_that_is_not_there_is_refused_and_all_is_released(run):
    account = Account(1 << 20)
    with pytest.raises(RefusedError) as refused:
        run(lambda workshop: task(workshop, PICTURES["png rgb"](), account=account))
    assert refused.value.kind == "too large" and account.now == 0
    account = Account(GIB)
    account.hold(GIB - 1000)
    with pytest.raises(RefusedError) as refused:
        run(lambda workshop: task(workshop, account=account))
    assert refused.value.kind == "full" and account.now == GIB - 1000


def test_a_slow_picture_ends_at_its_deadline_and_at_the_limit(run):
    picture = slow_picture()

    async def work(workshop):
        began = time.monotonic()
        with pytest.raises(DeadlineError):
            await task(workshop, picture, deadline=began + 0.6)
        at_deadline = time.monotonic() - began
        with pytest.raises(TooLargeError, match=r"more than 0\.5 s"):
            await task(workshop, picture)
        return at_deadline, time.monotonic() - began - at_deadline

    at_deadline, at_limit = run(work, decode_seconds=0.5)
    assert 0.6 <= at_deadline < 1.5 and 0.5 <= at_limit < 2.5


def test_slow_and_large_pictures_do_not_keep_small_ones_waiting(run):
    many = [slow_picture(800), PICTURES["tiff of floats"]()]

    async def work(workshop):
        others = [asyncio.create_task(task(workshop, many[n % 2])) for n in range(8)]
        await asyncio.sleep(0.2)
        waits = []
        for _ in range(5):
            began = time.monotonic()
            await task(workshop)
            waits.append(time.monotonic() - began)
        done = sum(each.done() for each in others)
        await asyncio.gather(*others)
        return sorted(waits), done

    waits, done = run(work)
    assert done < 8, "the others were done before it could be seen"
    assert waits[2] < 1.0


def test_a_process_that_is_killed_is_replaced(run):
    async def work(workshop):
        await task(workshop)
        waiting = asyncio.create_task(task(workshop, slow_picture(1500)))
        await asyncio.sleep(0.1)
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(ImageError, match="crash"):
            await waiting
        return await task(workshop)

    assert run(work)[0]["width"] == 50


def test_where_too_many_wait_the_last_is_refused(run, monkeypatch):
    monkeypatch.setattr(module, "WAITING", 3)

    async def work(workshop):
        tasks = [task(workshop, SMALL + bytes(n * 10_000)) for n in range(12)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    told = run(work)
    refused = [n for n, each in enumerate(told) if isinstance(each, RefusedError)]
    assert refused and not any(isinstance(told[n], RefusedError) for n in range(3))
    assert all(isinstance(each, RefusedError | tuple) for each in told)


def test_waiting_ends_at_the_deadline(run):
    async def work(workshop):
        others = [asyncio.create_task(task(workshop, slow_picture(400))) for _ in range(6)]
        await asyncio.sleep(0)
        with pytest.raises(DeadlineError):
            await task(workshop, slow_picture(400), deadline=time.monotonic() + 0.02)
        await asyncio.gather(*others)
        return await task(workshop)

    assert run(work)[0]["height"] == 40


def numbers(item, count):
    tensor = json.dumps({"name": "image", "datatype": "FP32", "shape": [count]})[:-1].encode()
    items = (item.replace(b"%x", b"%x" % n) for n in range(count))
    return b'{"inputs":[' + tensor + b',"data":[' + b",".join(items) + b"]}]}"


WORST = {
    "png rgba": (PICTURES["png rgba"], "picture", PICTURE),
    "webp rgba": (PICTURES["webp rgba"], "picture", PICTURE),
    "png of 16 bits": (PICTURES["png rgba of 16 bits, dark"], "picture", PICTURE),
    "a picture that grows": (
        lambda: file_of(np.zeros((8, 600_000, 3), np.uint8)),
        "picture",
        PICTURE | {"config": CONFIG | {"crop_pct": 1.0, "input_size": (3, 12, 12)}},
    ),
    "numbers": (lambda: numbers(b"0.5", 4_000_000), "infer", {"none": 0}),
    "lists": (lambda: numbers(b"[0.5]", 1_500_000), "infer", {"none": 0}),
    "dictionaries": (lambda: numbers(b'{"%x":0.5}', 800_000), "infer", {"none": 0}),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize("name", WORST)
def test_a_process_takes_what_the_account_holds(run, name):
    make, kind, options = WORST[name]
    content, account = make(), Account(2 * GIB)

    async def work(workshop):
        await task(workshop)
        (pid,) = children()
        before = resident(pid, "VmRSS")
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        try:
            await task(workshop, content, kind, account, **options)
        except InputError:
            assert kind == "infer"
        return max(resident(each, "VmHWM") for each in children()) - before

    taken = run(work)
    # of twice the content, once is the server's
    told = account.peak - len(content)
    assert (1 - DECODING_MEMORY) * told <= taken <= (1 + DECODING_MEMORY) * told, f"{taken / told:.2f}"


def resident(pid, key):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def test_what_fits_into_the_quick_lane_is_a_photograph():
    """A photograph of a telephone, twelve megapixels as JPEG, takes eight or twelve bytes a pixel."""
    assert QUICK_BYTES > 12 * 4000 * 3000


def test_a_fault_of_the_task_is_no_error_of_the_client(run):
    async def work(workshop):
        with pytest.raises(RuntimeError, match="KeyError: 'config'"):
            await task(workshop, SMALL, pixels=25_000_000, formats=FORMATS)
        return await task(workshop)

    assert run(work)[0]["width"] == 50


def test_a_large_content_after_a_small_one_is_read(run):
    async def work(workshop):
        await task(workshop)
        return await task(workshop, SMALL + bytes(120 << 20))

    assert run(work)[0]["height"] == 40
