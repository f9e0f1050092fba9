"""Test scripts/gpu on the CPU: its stages and rows, and stages that fail, hang or are killed."""

from __future__ import annotations

import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import __main__ as stage_program
from benchmarks.gpu import build, conductor, rows, setting, speed, stages
from benchmarks.gpu.stages import Stage

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu"
MOST_FILES, MOST_BYTES = 8, 16 << 20
# seconds for steps that an idle machine makes at once
PATIENCE = 120.0
# a stage that writes numbered rows without end
COUNTING = """
import itertools, time
from benchmarks.gpu.rows import row, write
for number in itertools.count():
    write(row(f"row {number}", "measured", number, number=number))
    time.sleep(0.001)
"""
# the script with stages of a test, without the import of PyTorch
DRIVER = """
import sys, runpy
sys.path.insert(0, {root!r})
from benchmarks.gpu import conductor, stages
conductor.probe = dict
one = lambda name, code: stages.Stage(name, "", {patience}, [], [[sys.executable, "-c", code]])
stages.short = lambda *_: [one(*each) for each in {given!r}]
sys.argv = ["gpu", "short", "--rehearse", "--out", {out!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


def plain_environment():
    return {key: value for key, value in os.environ.items() if key != "OUT"} | {"OMP_NUM_THREADS": "1"}


def rehearse(form, out, *arguments):
    command = [sys.executable, str(SCRIPT), form, "--rehearse", "--out", str(out), *arguments]
    return subprocess.run(command, env=plain_environment(), capture_output=True, text=True, check=False)


def driven(out, *given):
    """Start a process of the script whose stages are (name, Python code)."""
    code = DRIVER.format(patience=PATIENCE, root=str(ROOT), script=str(SCRIPT), out=str(out), given=list(given))
    return subprocess.Popen([sys.executable, "-c", code], env=plain_environment(), stdout=subprocess.DEVNULL)


def ended(out):
    """Return stage -> the state of its end."""
    return {made["stage"]: made["state"] for made in rows.read(out / "rows.jsonl") if made["name"] == "the stage"}


def check_files(out):
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {path.name for path in files} <= {"rows.jsonl", "table.txt", "logs.txt", "junit.xml"}
    assert {"rows.jsonl", "table.txt"} <= {path.name for path in files}
    assert len(files) <= MOST_FILES and all(path.stat().st_size < MOST_BYTES for path in files)


def wait_for(condition):
    ends = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < ends, "nothing happened"
        time.sleep(0.02)


def alive(pid):
    """Return whether a process runs; one that has ended and is not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# rows


def test_nan_and_paths_are_strict_json(tmp_path, monkeypatch):
    monkeypatch.setenv(rows.FILE, str(tmp_path / "rows.jsonl"))
    monkeypatch.setenv(rows.STAGE, "here")
    rows.write(rows.row("a", "measured", float("nan"), "ms", path=tmp_path, every=[float("inf"), 1.0]))
    (made,) = (
        json.loads(text, parse_constant=pytest.fail) for text in (tmp_path / "rows.jsonl").read_text().splitlines()
    )
    assert (made["stage"], made["value"], made["every"]) == ("here", "nan", ["inf", 1.0])
    assert "nan" in rows.table([made])


def test_rows_of_processes_that_write_at_once_do_not_mix(tmp_path):
    code = "from benchmarks.gpu.rows import row, write\nfor i in range(200): write(row('x' * 500, 'measured', i))"
    environment = plain_environment() | {rows.FILE: str(tmp_path / "rows.jsonl")}
    running = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        for _ in range(3)
    ]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert sorted(made["value"] for made in rows.read(tmp_path / "rows.jsonl")) == sorted(3 * list(range(200)))


# stages that fail, hang or print without end


def run_stage(tmp_path, code, limit):
    command = [sys.executable, "-c", code]
    return conductor.run(Stage("x", "", limit, [command], None), [command], tmp_path / "logs.txt", limit)


def test_a_failing_stage_leaves_its_last_line(tmp_path):
    assert run_stage(tmp_path, "raise ValueError('seven')", PATIENCE) == ("failed", "ValueError: seven")


def endless_stage(tmp_path, monkeypatch, state):
    """Return the state of a stage that writes one row and does not end within its time."""
    monkeypatch.setenv(rows.FILE, str(tmp_path / "rows.jsonl"))
    monkeypatch.setenv(rows.STAGE, "tests")
    code = f"from benchmarks.gpu import rows; rows.write(rows.row('a', {state!r})); import time; time.sleep(1000)"
    run = conductor.Run(tmp_path, tmp_path / "work", False, 1e9)
    monkeypatch.setattr(conductor, "GRACE", 0.5)
    monkeypatch.setattr(run, "ends", 100.0)
    is_late_when(monkeypatch, tmp_path / "rows.jsonl")
    command = [sys.executable, "-c", code]
    run.stage(Stage("tests", "", math.inf, [command], None), None)
    return ended(tmp_path)["tests"]


def test_the_runs_end_is_no_failure_of_tests_that_all_passed(tmp_path, monkeypatch):
    assert endless_stage(tmp_path, monkeypatch, "passed") == "no time left"


def test_the_runs_end_hides_no_failed_test(tmp_path, monkeypatch):
    assert endless_stage(tmp_path, monkeypatch, "failed") == "out of time"


def test_a_missing_program_is_named(tmp_path):
    state, note = conductor.run(Stage("x", "", 5.0, [["no-such"]], None), [["no-such"]], tmp_path / "logs.txt", 5.0)
    assert (state, note) == ("failed", "no-such is not installed")


def is_late_when(monkeypatch, told):
    """Give the conductor a clock that stands still until the stage has written the file `told`, then shows the end."""

    def now():
        return 1e9 if told.exists() and told.read_text() else 0.0

    monkeypatch.setattr(conductor, "time", SimpleNamespace(monotonic=now, sleep=time.sleep))


@pytest.mark.parametrize("started_in", ["foreground", "background"])
def test_a_late_stage_is_interrupted_and_may_say_where_it_was(tmp_path, monkeypatch, request, started_in):
    if started_in == "background":
        # as a shell does for `command &`
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    monkeypatch.setattr(conductor, "GRACE", 2 * PATIENCE)
    is_late_when(monkeypatch, tmp_path / "told")
    code = f"""
import time
try:
    # closed here, because an interrupt while the garbage collector closes a file is lost
    with open({str(tmp_path / "told")!r}, "w") as file:
        file.write("x")
    time.sleep({4 * PATIENCE})
except KeyboardInterrupt:
    print("asleep")
    raise SystemExit(1)
"""
    began = time.monotonic()
    assert run_stage(tmp_path, code, 1.0) == ("out of time", "asleep")
    # the ended process was not waited for
    assert time.monotonic() - began < conductor.GRACE


def test_a_stage_that_ignores_the_interrupt_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(conductor, "GRACE", 0.5)
    is_late_when(monkeypatch, tmp_path / "pid")
    code = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep({4 * PATIENCE})"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep({4 * PATIENCE})
"""
    assert run_stage(tmp_path, code, 1.0)[0] == "out of time"
    # the process that adopts a child notices its end after a moment
    wait_for(lambda: not alive(int((tmp_path / "pid").read_text())))


def test_a_log_without_end_loses_its_middle(tmp_path, monkeypatch):
    monkeypatch.setattr(conductor, "LOG_BYTES", 1 << 14)
    log = tmp_path / "logs.txt"
    log.write_text("of a stage before\n")
    assert (
        run_stage(tmp_path, "for i in range(20000): print('line', i)\nraise SystemExit('the end')", PATIENCE)[1]
        == "the end"
    )
    text = log.read_text()
    assert len(text) < 1 << 15 and "bytes left out" in text
    assert text.startswith("of a stage before\n") and "line 3\n" in text and "line 19999\n" in text


def test_after_a_failed_and_a_hanging_stage_the_next_one_runs(tmp_path):
    given = [("fails", "raise SystemExit(3)"), ("works", "print('fine')")]
    assert driven(tmp_path, *given).wait() == 1
    assert ended(tmp_path) == {"fails": "failed", "works": "passed"}
    check_files(tmp_path)


# kills


def test_sigkill_keeps_every_row_and_ends_the_stage(tmp_path):
    pid = f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
    process = driven(tmp_path / "out", ("first", "print('fine')"), ("second", pid + COUNTING))
    path = tmp_path / "out" / "rows.jsonl"
    wait_for(lambda: path.exists() and path.read_text().count("\n") > 100)
    process.kill()
    process.wait()
    wait_for(lambda: not alive(int((tmp_path / "pid").read_text())))
    made = rows.read(path)
    assert ended(tmp_path / "out") == {"first": "passed"}
    numbers = [each["number"] for each in made if "number" in each]
    assert len(numbers) > 90 and numbers == list(range(len(numbers)))
    assert "the stage" in (tmp_path / "out" / "table.txt").read_text()


def test_sigterm_leaves_a_table(tmp_path):
    process = driven(tmp_path, ("long", COUNTING))
    wait_for(lambda: (tmp_path / "rows.jsonl").exists() and (tmp_path / "rows.jsonl").read_text().count("\n") > 10)
    process.terminate()
    assert process.wait() != 0
    assert ended(tmp_path) == {"long": "interrupted"}
    assert "row 5 " in (tmp_path / "table.txt").read_text()


@pytest.mark.slow
def test_a_rehearsal_killed_at_any_moment_keeps_what_it_printed(tmp_path):
    for attempt in range(3):
        out = tmp_path / str(attempt)
        command = [sys.executable, str(SCRIPT), "short", "--rehearse", "--out", str(out)]
        process = subprocess.Popen(command, env=plain_environment(), stdout=subprocess.DEVNULL, start_new_session=True)
        wait_for(lambda out=out: (out / "logs.txt").exists())
        time.sleep(random.uniform(2.0, 25.0))
        process.kill()
        process.wait()
        # output of the interrupted stage's children
        time.sleep(1.0)
        kept = [rows.line(made) for made in rows.read(out / "rows.jsonl")]
        printed = [text for text in (out / "logs.txt").read_text().splitlines() if text.startswith("  ")]
        measured = [text for text in printed if any(f" {state} " in text + " " for state in ("passed", "measured"))]
        assert measured and set(measured) <= set(kept)


# whole runs


def check_rehearsal(done, out, expected):
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "table.txt").read_text().strip() in done.stdout
    found = ended(out)
    assert found == {name: found[name] if state == "any" else state for name, state in expected.items()}
    first, *others = rows.read(out / "rows.jsonl")
    assert first["stage"] == "machine" and first["torch"] and first["device"] == "CPU, a rehearsal"
    assert all(made["commit"] == "abc" and made["stage"] in expected for made in others)
    check_files(out)


def test_a_rehearsal_of_two_stages(tmp_path):
    done = rehearse("full", tmp_path, "--commit", "abc", "--only", "build", "sanitizer")
    check_rehearsal(done, tmp_path, {"build": "passed", "sanitizer": "needs a GPU"})
    assert any(made["name"] == "versions" and made["versions"]["torch"] for made in rows.read(tmp_path / "rows.jsonl"))


def test_stages_name_tests_that_exist():
    # without a GPU no op has a form in Triton
    selections = {stages.REHEARSED: 10, stages.WATCHED.replace("triton", "torch"): 1}
    # one process, because importing the tests takes longer than selecting among them
    code = (
        "import json, sys, pytest\nfor words in json.loads(sys.argv[1]): print('ended with', int(pytest.main(words)))"
    )
    options = ["--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([options + shlex.split(each) for each in selections])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    *collected, rest = done.stdout.split("ended with 0\n")
    assert done.returncode == 0 and not rest, done.stdout + done.stderr
    for text, least in zip(collected, selections.values(), strict=True):
        assert sum("::" in line for line in text.splitlines()) >= least


@pytest.mark.slow
@pytest.mark.parametrize("form", ["short", "full"])
def test_the_whole_rehearsal(tmp_path, form):
    expected = {
        stage.name: "needs a GPU" if stage.rehearsal is None else "passed"
        for stage in getattr(stages, form)(tmp_path, tmp_path, "90a")
    }
    check_rehearsal(rehearse(form, tmp_path, "--commit", "abc"), tmp_path, expected)
    kept = rows.read(tmp_path / "rows.jsonl")
    measured = {
        made["stage"] for made in kept if made["name"] != "the stage" and made["state"] in ("measured", "passed")
    }
    # nothing was tuned here
    assert measured >= {name for name, state in expected.items() if state == "passed"} - {"choices"}
    if form == "short":
        assert sum(made.get("test", False) and made["state"] == "passed" for made in kept) > 10


def test_an_unknown_stage_is_refused_with_the_names(tmp_path):
    done = rehearse("short", tmp_path, "--only", "polish")
    assert done.returncode == 2
    assert "no such stage: polish" in done.stdout and "kernels" in done.stdout
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_every_stage_fails_plainly(tmp_path):
    environment = plain_environment() | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), "short", "--out", str(tmp_path), "--only", "ops", "speed"]
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 1
    assert ended(tmp_path) == {"ops": "failed", "speed": "failed"}
    assert "PyTorch sees no GPU" in (tmp_path / "table.txt").read_text()


def test_when_the_time_is_over_the_rest_is_not_run(tmp_path):
    done = rehearse("short", tmp_path, "--seconds", "1")
    assert done.returncode == 0
    assert set(ended(tmp_path).values()) == {"no time left"}


def test_a_second_run_appends(tmp_path):
    for _ in range(2):
        assert driven(tmp_path, ("only", "print('fine')")).wait() == 0
    assert [made["stage"] for made in rows.read(tmp_path / "rows.jsonl")] == ["machine", "only"] * 2


# command lines


def command_lines(tmp_path):
    """Return every command of both forms, with paths that contain a space."""
    authors, wheels, work = (tmp_path / name for name in ("their code", "some wheels", "my work"))
    wheels.mkdir()
    wheel(wheels)
    every = stages.short(work, work, "90a") + stages.full(work, work, "90a", authors, wheels)
    return [command for stage in every for command in [*stage.commands, *(stage.rehearsal or [])]]


def wheel(folder):
    """Return the smallest package that pip installs."""
    name = "tiny_thing-1.0"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_thing.py", "")
        archive.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n")
        archive.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}.dist-info/RECORD", "")


def after(command, program):
    return command[command.index(program) + 1 :]


def test_every_stage_takes_its_options(tmp_path):
    commands = [command for command in command_lines(tmp_path) if "benchmarks.gpu" in command]
    parsed = [stage_program.parser().parse_args(after(command, "benchmarks.gpu")) for command in commands]
    assert {args.stage for args in parsed} == set(stage_program.STAGES)
    assert {args.authors for args in parsed} == {None, tmp_path / "their code"}
    assert any(args.micro_batches == [None, 14, 28, 50, 56, 112] for args in parsed)


def test_pytest_takes_its_options_and_finds_its_folders(tmp_path):
    # a rehearsal runs the third
    commands = [
        command for command in command_lines(tmp_path) if "pytest" in command and "one-token" not in str(command)
    ]
    assert len(commands) == 2
    environment = plain_environment() | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for command in commands:
        # --help ends pytest once it has read everything else
        line = [sys.executable, "-m", "pytest", "-p", "xdist", *after(command, "pytest"), "--help"]
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert all((ROOT / part).exists() for part in command if part.startswith("tests/"))


def test_pip_takes_its_options(tmp_path):
    (command,) = (command for command in command_lines(tmp_path) if "--no-index" in command)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my work" / "site" / "tiny_thing.py").exists()


def test_the_sanitizers_program_is_built_by_cmake(tmp_path):
    commands = command_lines(tmp_path)
    assert any(command[0] == "cmake" and build.SMOKE in command for command in commands) or any(
        command[:2] == ["cp", str(build.PREBUILT / build.SMOKE)] for command in commands
    )
    assert f"add_executable({build.SMOKE} " in (ROOT / "CMakeLists.txt").read_text()
    tools = [command[4] for command in commands if command[0] == "compute-sanitizer" and command[3] == "--tool"]
    assert tools == ["memcheck", "racecheck", "memcheck"]


# measurements


def speed_rows(monkeypatch, broken):
    """Return rows of three micro-batches at S = 2; that of `broken` rows has an image with wrong attributions."""
    monkeypatch.setattr(speed, "REHEARSAL", True)
    monkeypatch.setattr(speed, "DEVICE", "cpu")
    raw = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(speed, "images_here", lambda number, size: raw[:number])
    monkeypatch.setattr(speed, "timed", lambda *_: {"median": 1.0, "min": 1.0, "max": 1.0, "repeats": 1})
    monkeypatch.setattr(speed, "as_graphs", lambda made, explainer: made)

    def explain(images, target, samples, internal_batch_size):
        wrong = torch.tensor([1.0, 1.5 if internal_batch_size == broken else 1.0])
        return SimpleNamespace(raw=images * wrong[:, None, None, None])

    explainer = SimpleNamespace(explain=explain, fitting_rows=lambda images: 1)
    monkeypatch.setattr(speed, "explainer_here", lambda model, precision: explainer)
    args = stage_program.parser().parse_args(["speed", "--micro-batches", "own", "1", "28", "56"])
    return list(speed._images(args, torch.nn.Identity(), "bf16", 2))


def test_a_rehearsal_runs_each_micro_batch_once_and_equal_ones_are_measured(monkeypatch):
    made = speed_rows(monkeypatch, broken=0)
    assert [(each["rows"], each["state"], each["apart"]) for each in made] == [
        (None, "measured", None),
        (1, "measured", 0.0),
        (2, "measured", 0.0),
    ]


def test_a_micro_batch_with_one_wrong_image_fails(monkeypatch):
    made = speed_rows(monkeypatch, broken=2)
    assert [each["state"] for each in made] == ["measured", "measured", "failed"]
    assert made[2]["apart"] == pytest.approx(0.5) and "at most 0.17" in made[2]["note"]


def test_goals_hold_for_fifty_samples_alone():
    assert speed.goal_of(None, 50, "bf16", 1) == 7.0 and speed.goal_of(672, 50, "bf16", 4) == 67.0
    assert speed.goal_of(None, 200, "bf16", 1) is None and speed.goal_of(448, 50, "bf16", 1) is None


def test_eager_launches_are_told_and_fail(monkeypatch):
    monkeypatch.setattr(setting, "REHEARSAL", False)
    made = setting.as_graphs(
        rows.row("a", "measured", 1.0, note="x"), SimpleNamespace(_cache=SimpleNamespace(graphs=None))
    )
    assert (made["state"], made["value"], made["graphs"]) == ("failed", 1.0, False)
    assert "one by one; x" in made["note"]


# tests as rows


def test_after_a_sticky_cuda_error_another_process_runs_the_other_tests(tmp_path):
    suite = tmp_path / "test_suite.py"
    suite.write_text(
        "import os\n"
        "def test_fine(): pass\n"
        "def test_lost(): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_later(): print(os.getpid())\n"
    )
    plugins = ["-p", "benchmarks.gpu.tests", "-p", "xdist", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *plugins, "-n", "1", "-c", "/dev/null", str(suite)]
    environment = plain_environment() | {
        rows.FILE: str(tmp_path / "rows.jsonl"),
        "PYTHONPATH": str(ROOT),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "replacing crashed worker" in done.stdout, done.stdout + done.stderr
    states = [(made["name"].split("::")[-1], made["state"]) for made in rows.read(tmp_path / "rows.jsonl")]
    assert set(states) == {("test_fine", "passed"), ("test_lost", "failed"), ("test_later", "passed")}
    notes = [made["note"] for made in rows.read(tmp_path / "rows.jsonl") if made["state"] == "failed"]
    assert any("an illegal memory access" in note for note in notes)


# prebuilt modules


@pytest.fixture
def prebuilt(tmp_path):
    """Return a folder of modules that can be imported, built from these sources."""
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    for name in ("_native", "_cuda"):
        (folder / f"{name}.py").write_text("")
    (folder / "sources").write_text(build.sources() + "\n")
    (folder / "architectures").write_text("90a-real\n")
    return folder


def test_prebuilt_modules_of_these_sources_are_taken(prebuilt):
    assert build.why_not_prebuilt(prebuilt) is None


def test_prebuilt_modules_of_other_sources_are_not_taken(prebuilt):
    (prebuilt / "sources").write_text("0" * 64)
    assert "other sources" in build.why_not_prebuilt(prebuilt)


def test_prebuilt_modules_that_do_not_import_are_not_taken(prebuilt):
    (prebuilt / "_cuda.py").write_text("raise ImportError('GLIBC_9.9 not found')")
    assert "GLIBC_9.9 not found" in build.why_not_prebuilt(prebuilt)


@pytest.mark.parametrize(
    ("made_for", "device", "fits"),
    [
        ("90a-real", "90", True),
        ("80-real;90a-real", "90", True),
        ("80-real", "90", False),
        ("", "90", False),
        ("80-real", "", True),
    ],
)
def test_prebuilt_modules_of_another_architecture_are_not_taken(made_for, device, fits):
    reason = build.why_not_for(made_for, device)
    assert reason is None if fits else "not for sm_90" in reason


def test_of_caches_that_are_too_large_the_largest_kernels_are_left_out(tmp_path, monkeypatch):
    cache, archive = tmp_path / "cache", tmp_path / "cache.tar.gz"
    for size in (1, 2, 3, 4, 40):
        (cache / "triton" / f"of {size} KiB").mkdir(parents=True)
        (cache / "triton" / f"of {size} KiB" / "k.cubin").write_bytes(os.urandom(size << 10))
    (cache / "choices").mkdir()
    (cache / "choices" / "choices-GPU.json").write_text("{}")

    def kept():
        with tarfile.open(archive) as packed:
            names = packed.getnames()
        assert names[0] == "choices/choices-GPU.json"
        return {name.split()[1] for name in names if name.endswith("cubin")}

    assert "no room" not in build.keep_caches(cache, archive) and kept() == {"1", "2", "3", "4", "40"}
    monkeypatch.setattr(build, "MOST_BYTES", 16 << 10)
    assert "the 1 largest had no room" in build.keep_caches(cache, archive) and kept() == {"1", "2", "3", "4"}
    monkeypatch.setattr(build, "MOST_BYTES", 1 << 10)
    assert "the 5 largest had no room" in build.keep_caches(cache, archive) and kept() == set()


def test_choices_that_travelled_replace_none_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    for folder, names in ((tmp_path / "prebuilt" / "cache", "ab"), (tmp_path / "here", "b")):
        (folder / "choices").mkdir(parents=True)
        for name in names:
            (folder / "choices" / f"choices-{name}.json").write_text(folder.name)
    build.adopt_caches(tmp_path / "here")
    out = tmp_path / "out"
    out.mkdir()
    build.keep_choices(tmp_path / "here", out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "choices-a.json": "cache",
        "choices-b.json": "here",
    }


def test_a_cache_of_triton_is_found_in_another_folder(tmp_path):
    cache = pytest.importorskip("triton.runtime.cache")
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        (folder / "KEY").mkdir(parents=True)
    kernel = cache.FileCacheManager("KEY")
    kernel.cache_dir = str(here / "KEY")
    files = {name: kernel.put(name.encode(), name) for name in ("k.cubin", "k.ttir", "k.json")}
    kernel.put_group("k.json", files)
    build.adopt(here, there)
    shutil.rmtree(here)
    kernel.cache_dir = str(there / "KEY")
    assert kernel.get_group("k.json") == {name: str(there / "KEY" / name) for name in ("k.cubin", "k.json")}


@pytest.mark.slow
def test_kernels_are_compiled_for_the_cache_without_a_gpu(tmp_path, monkeypatch):
    precompile = pytest.importorskip("benchmarks.gpu.precompile")
    monkeypatch.setattr(precompile, "PRECISIONS", ("bf16",))
    monkeypatch.setattr(precompile, "ROWS", (2,))
    monkeypatch.setattr(precompile, "MODEL", "vit_tiny_patch16_224")
    kernels = precompile.compile_all(tmp_path / "cache", 90, candidates=False)
    assert kernels > 10
    groups = [json.loads(path.read_text())["child_paths"] for path in (tmp_path / "cache").glob("*/__grp__*.json")]
    kept = [Path(path) for group in groups for path in group.values()]
    assert len(groups) == kernels and all(path.exists() for path in kept)
    assert {path.suffix for path in kept} == {".cubin", ".json"}
