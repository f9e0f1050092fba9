"""Each line of a server's stderr is JSON, whoever writes it."""

import json
import os
import subprocess
import sys

import pytest

START = """
import asyncio, logging, os, sys, threading, warnings
from dave_fast.serve.logs import log_to_stderr
old = logging.StreamHandler()
logging.getLogger("library").addHandler(old)
log_to_stderr()
class Odd:
    def __str__(self): raise ValueError("no text")
    __repr__ = __str__
circle = []
circle.append(circle)
log = logging.getLogger("library")
"""
CASES = {
    "lines": "log.warning('one\\ntwo\\r\\u2028three')",
    "surrogate": "log.warning('a\\udc80b')",
    "odd object": "log.warning('%s', Odd())",
    "odd field": "log.warning('a', extra={'odd': Odd()})",
    "not a number": "log.warning('a', extra={'odd': float('nan')})",
    "circle": "log.warning('a', extra={'odd': circle})",
    "odd keys": "log.warning('a', extra={'odd': {(1, 2): 3}})",
    "arguments too many": "log.warning('a', 1, 2)",
    "warning": "warnings.warn('a\\nb')",
    "print": "print('a', 'b\\nc', file=sys.stderr)",
    "without Python": "os.write(2, b'a\\nb\\n'); import time; time.sleep(0.3)",
    "thread": "t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()",
    "main thread": "1 / 0",
    "callback": "l = asyncio.new_event_loop(); l.call_soon(lambda: 1 / 0); l.call_later(0.1, l.stop); l.run_forever()",
}


@pytest.mark.parametrize("case", CASES)
def test_line_is_json(case):
    done = subprocess.run([sys.executable, "-c", START + CASES[case]], capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert lines and all({"time", "level", "logger", "message"} <= line.keys() for line in lines)


@pytest.mark.parametrize("error", ["ConnectionResetError", "BrokenPipeError", "TimeoutError", "asyncio.CancelledError"])
@pytest.mark.parametrize("logger", ["uvicorn.error", "asyncio"])
def test_client_that_leaves_is_no_line(error, logger):
    code = f"{START}logging.getLogger({logger!r}).error('Exception', exc_info={error}())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_nobody_reads_stderr():
    read, write = os.pipe()
    code = START + "for _ in range(20_000): log.warning('a' * 100)\nprint('goes on', flush=True)"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=write, text=True, check=False)
    os.close(read)
    os.close(write)
    assert done.stdout == "goes on\n"


def test_stderr_is_closed():
    command = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, START + "log.warning('a')\nprint('goes on')"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert done.stdout == "goes on\n"
