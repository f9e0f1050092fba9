"""Tests of numbers from callers, command lines and requests: what is one, and that all others are refused in words."""

import base64
import math
import time
from contextlib import suppress

import httpx
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dave_fast import DAVE
from dave_fast.cli.app import app
from dave_fast.errors import InputError
from dave_fast.explain.depth import check_depth, parse_depth
from dave_fast.models.labels import Labels
from dave_fast.models.spec import ModelSpec
from dave_fast.numbers import LONGEST, check_integer, number_in, parse_number, parse_whole, shown, whole_in
from dave_fast.targets import Patch
from dave_fast.targets.text import parse_target
from tests.serve.tiny_server import file_of, serving
from tests.tiny import random_head_vit

LONG = "9" * 5000
# pytest cannot write them as names of tests
HUGE, MINUS_HUGE = pytest.param(10**5000, id="huge"), pytest.param(-(10**5000), id="-huge")
# texts that Python's int() takes or fails on by an error of its own, and texts that look like numbers
NO_WHOLE = (
    *("--5", "+-5", "-+0", "++1", "1_0", "٣", "²", "５", "1e3", "10.0", "1e400", "nan", "inf", "-inf", "0x10", "0b1"),
    *("", " ", "+", "-", "1 0", "1\x00", "\x001", "\ud800", "½", "1,0", "true", "1\n2", LONG, f"-{LONG}", "1" * 41),
)
NO_NUMBER = (
    *NO_WHOLE[:8],
    "1e400",
    "-1e400",
    "nan",
    "NaN",
    "inf",
    "Infinity",
    "0x1p3",
    "1e",
    ".",
    "1.2.3",
    "1,5",
    LONG,
)
NO_INTEGER = (True, False, 1.0, 2.5, math.nan, math.inf, "3", None, HUGE, MINUS_HUGE, [3], np.True_, np.float64(2))
NAMES = ("tiger, Panthera tigris", "lion", "three-toed sloth, ai", "T-shirt", "shirt", "T", "toed sloth", "three")


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("-0", 0), ("+7", 7), ("007", 7), ("-12", -12), ("9" * 40, 10**40 - 1)]
)
def test_ascii_digits_with_a_sign_are_whole_numbers(text, value):
    assert whole_in(text) == parse_whole(f" {text} ", "n") == value


@pytest.mark.parametrize("text", NO_WHOLE, ids=lambda text: ascii(text)[:12])
def test_other_texts_are_no_whole_numbers(text):
    with pytest.raises(InputError, match=r"n is .*; expected an integer|the number .* is too long") as caught:
        parse_whole(text, "n")
    assert len(str(caught.value)) < 300 and str(caught.value).encode()


@pytest.mark.parametrize(
    ("text", "value"), [("0.5", 0.5), ("-1e-3", -1e-3), (".5", 0.5), ("2.", 2.0), ("+1E3", 1000.0)]
)
def test_numbers_may_have_a_point_and_an_exponent(text, value):
    assert number_in(text) == parse_number(text, "x") == value


@pytest.mark.parametrize("text", NO_NUMBER, ids=lambda text: ascii(text)[:12])
def test_other_texts_are_no_numbers(text):
    with pytest.raises(InputError, match=r"x is .*; expected a number"):
        parse_number(text, "x")


@pytest.mark.parametrize("value", [True, None, [1.0], 10**400, math.nan, -math.inf, 1j, b"1"])
def test_other_values_are_no_numbers(value):
    with pytest.raises(InputError, match=r"x is .*; expected a number ≥ 0 and ≤ 10"):
        parse_number(value, "x", 0, 10)


def test_integers_of_other_libraries_are_integers():
    assert [check_integer(each, "n") for each in (np.int64(3), np.uint8(3), torch.tensor(3))] == [3, 3, 3]
    for value in (torch.tensor(True), torch.tensor(1.0), torch.tensor([1, 2])):
        with pytest.raises(InputError, match="expected an integer"):
            check_integer(value, "n")


@pytest.mark.parametrize("value", [LONG, "\ud800", "\x00\n", HUGE, [0] * 1000, "a" * 101])
def test_values_in_messages_are_short_and_valid(value):
    assert len(shown(value)) < 800 and "\n" not in shown(value) and shown(value).encode()


# Targets


@pytest.mark.parametrize("text", [text for text in NO_WHOLE if text.strip()], ids=lambda text: ascii(text)[:12])
@pytest.mark.parametrize("names", [None, NAMES])
def test_targets_that_are_no_number_and_no_name_are_refused(text, names):
    labels = Labels(8, names)
    for ask in (labels.resolve, lambda text: parse_target(text, labels)):
        with pytest.raises(InputError) as caught:
            ask("x" + text if text in ("-", "+") else text)
        assert str(caught.value).encode()


@pytest.mark.parametrize("value", [True, 2.5, math.nan, HUGE, None, 8, -1])
def test_classes_that_are_no_index_are_refused(value):
    with pytest.raises(InputError):
        Labels(8, NAMES).resolve(value)


@pytest.mark.parametrize(
    "text",
    [
        *("patch:999999999999999999999,", f"patch:{LONG},0", "patch:1,2,3", "patch:-1,0", "patch:1_0,0", "patch:٣,0"),
        *(
            "patch:1,2@",
            "patch:1,2@probe.npy#-1",
            f"patch:1,2@p.npy#{LONG}",
            "patch:1,2@\x00.npy",
            "patch:,",
            "patch:²,1",
        ),
        *('"tiger', 'tiger"', '"tiger"+"lion', '"""', "tiger+", "+-+", "text: ", "text:a-text:", "text:+text:", '""'),
        *("a" * 10_001, "text:" + " " * 20_000, "1-" * 17 + "1"),
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_targets_that_are_not_whole_are_refused(text):
    with pytest.raises(InputError) as caught:
        parse_target(text, Labels(8, NAMES))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("row", [True, 1.0, "1", None, HUGE, math.nan])
def test_patches_have_whole_numbers(row):
    with pytest.raises(InputError, match="the patch's row is"):
        Patch(row, 0)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "-" * 200,
            "+-" * 5000,
            "a-" * 100,
            "1-" * 16 + "1",
            "tiger+" * 16 + "lion",
            "e-" * 16 + "e",
            "a -" * 16 + "b",
        ),
        *('"' * 9999, "text:" + " " * 9000, "text:" + "+ " * 4000, "patch:" + "1" * 9000, "patch:1,2@" + "#" * 9000),
    ],
    ids=lambda text: text[:8],
)
def test_the_work_of_a_target_is_bounded(text):
    labels = Labels(20_000, tuple(f"thing {i}, tiger-{i}, e-{i}" for i in range(20_000)))
    with pytest.raises(InputError):
        labels.resolve("none of them")
    began = time.process_time()
    with suppress(InputError):
        parse_target(text, labels)
    assert time.process_time() - began < 0.2


# Depths and the Python interface


@pytest.mark.parametrize(
    "text",
    [
        *(
            "9999999999-1",
            "9999-1",
            "0.5-0.7",
            "1e999",
            "-1",
            "nan",
            "inf",
            "1_0",
            "٣",
            "0x1",
            "5-",
            "-5-9",
            "5--9",
            LONG,
        ),
        *(f"0-{LONG}", "1.5", "", ",", "1,,2", "5–9", "\ud800", "10000", "auto-pixels", "５-９", "1\x00"),
    ],
    ids=lambda text: ascii(text)[:12],
)
def test_texts_that_are_no_depth_are_refused(text):
    with pytest.raises(InputError, match=r"depth .* is unknown|depth is .*; expected"):
        parse_depth(text)


@pytest.mark.parametrize("depth", [True, math.nan, 2.5, -1, HUGE, 10**4, None, b"6", [], [[1]], np.True_, {}, "5-5"])
def test_values_that_are_no_depth_are_refused(depth):
    with pytest.raises(InputError, match="depth is"):
        check_depth(depth)


@pytest.fixture(scope="module")
def tiny():
    return DAVE(random_head_vit(), precision="fp32", backend="torch", noise_alpha=0.1)


@pytest.mark.parametrize("value", NO_INTEGER, ids=lambda value: str(type(value).__name__))
@pytest.mark.parametrize("name", ["n_samples", "seed", "top_k", "image_keys", "internal_batch_size"])
def test_settings_that_are_no_integers_are_refused(tiny, name, value):
    if value is None and name in ("top_k", "image_keys", "internal_batch_size"):
        return
    with pytest.raises(InputError, match="; expected an integer"):
        tiny.explain(torch.zeros(1, 3, 32, 32), **{"n_samples": 1, name: [value] if name == "image_keys" else value})


def test_more_samples_than_memory_holds_are_refused(tiny):
    with pytest.raises(InputError, match="n_samples is 1000000000; expected an integer ≤"):
        tiny.explain(torch.zeros(1, 3, 32, 32), n_samples=10**9)


@pytest.mark.parametrize("target", [True, 1.0, HUGE, -(10**30), (1.0,), (True,), (1, 2), "1.0", [True], np.float64(1)])
def test_targets_that_are_no_integers_are_refused(tiny, target):
    with pytest.raises(InputError):
        tiny.explain(torch.zeros(1, 3, 32, 32), targets=[target], n_samples=1)


@pytest.mark.parametrize("name", ["num_classes", "image_size"])
@pytest.mark.parametrize("value", [0, -1, True, 2.5, math.nan, "3", 10**12, HUGE])
def test_sizes_of_models_are_bounded(name, value):
    with pytest.raises(InputError, match=f"{name}.* is .*; expected an integer"):
        ModelSpec("demo", random_weights=True, **{name: value})


# The command line and the routes


@pytest.mark.parametrize("option", ["--n-samples", "--seed", "--noise-alpha", "--image-size"])
@pytest.mark.parametrize(
    "text", ["1_0", "٣", "nan", "1e400", "0x10", LONG, "--5", ""], ids=lambda text: ascii(text)[:8]
)
def test_options_take_numbers_alone(option, text):
    result = CliRunner().invoke(app, ["explain", "--demo", f"{option}={text}"])
    assert result.exit_code == 2 and "Invalid value" in result.output


@pytest.fixture(scope="module")
def http():
    with serving() as (address, _), httpx.Client(base_url=address, timeout=60) as client:
        yield client


def infer(http, parameters):
    image = f'{{"name": "image", "shape": [1], "datatype": "BYTES", "data": ["{base64.b64encode(PHOTO).decode()}"]}}'
    body = f'{{"inputs": [{image}], "parameters": {parameters}}}'
    return http.post("/v2/models/tiny/infer", content=body, headers={"content-type": "application/json"})


PHOTO = file_of(np.zeros((32, 32, 3), np.uint8))
NUMBERS = ("n_samples", "top_k", "seed", "tolerance", "deadline_ms", "target", "depth")


@pytest.mark.parametrize("name", NUMBERS)
def test_routes_answer_texts_that_are_no_numbers_by_422(http, name):
    for each in ({name: text} for text in NO_NUMBER):
        statuses = {
            http.post("/v1/explain", params=each, content=PHOTO).status_code,
            http.post("/v1/explain", data=each, files={"image": PHOTO}).status_code,
        }
        assert statuses == {422}, (each, statuses)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "json",
    [
        "1e400",
        "NaN",
        "-Infinity",
        "1" + "0" * 400,
        LONG,
        "10.5",
        "true",
        '"\\ud800"',
        '"1_0"',
        "{}",
        '"٣"',
        "[[1]]",
        '"--5"',
    ],
    ids=lambda json: json[:8],
)
def test_kserve_answers_values_that_are_no_numbers_by_4xx(http, name, json):
    if name == "tolerance" and json == "10.5":
        json = "10.5e1"
    answer = infer(http, f'{{"{name}": {json}}}')
    assert answer.status_code in (400, 422), answer.text


@pytest.mark.parametrize("key", ["\\ud800", "\\u0000", "a" * 5000, "n_samples\\u200b"])
def test_kserve_answers_unknown_names_by_422(http, key):
    answer = infer(http, f'{{"{key}": 1}}')
    assert answer.status_code == 422 and len(answer.text) < 2000, answer.text


def test_longest_is_more_than_the_seeds_of_64_bits():
    assert 10**LONGEST > 2**64
