"""Test the command `dave-fast bench`: rows, JSON, pages, exit codes, and the comparison with a revision."""

import json
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from dave_fast.bench import compare, machine, op_tests
from dave_fast.bench.page import write_page
from dave_fast.bench.rates import kinds_of
from dave_fast.cli.app import app
from dave_fast.errors import BackendError, InputError
from dave_fast.ops import _ext

MODEL = ["--model", "tests.bench.kernels:model", "--samples", "5", "--repeats", "2", "--budget", "1"]
KERNELS = "tests.bench.kernels"


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *MODEL, "--no-tests", *arguments])


def test_the_whole_engine_into_json_and_a_page_with_plots(tmp_path):
    file, docs = tmp_path / "new" / "bench.json", tmp_path / "docs"
    done = run("--precision", "fp32", "--images", "2", "--json", str(file), "--docs", str(docs))
    assert done.exit_code == 0, done.output
    assert "dave-fast fp32, auto" in done.output and "images/s" in done.output
    result = json.loads(file.read_text())
    (row,) = result["engine"]
    assert row["error"] <= 2 * row["plain error"] and row["images a second"]["median"] > 0
    assert result["setting"]["samples"] == 5 and result["environment"]["commit"]
    assert result["latency"][0]["samples"] == 8
    page = (docs / "performance.md").read_text()
    assert "Nothing here was measured on a GPU yet" in page
    assert "| dave-fast fp32, auto |" in page
    (figure,) = (docs / "figures").glob("latency_*.png")
    assert figure.name in page


def test_all_ops_beside_one_another_with_a_roofline(tmp_path):
    file = tmp_path / "linear.json"
    done = run("--op", "linear", "--precision", "fp32", "--json", str(file), "--docs", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "values back" in done.output and "torch" in done.output
    assert list((tmp_path / "figures").glob("roofline_*.png"))
    assert re.search("% of (mkl|packed|native)-fp32", (tmp_path / "performance.md").read_text())
    # results that differ in one setting have headings and figures of their own
    result = json.loads(file.read_text())
    for name, value in (("precision", "bf16"), ("op", "linear_fp8"), ("image", "3×64×64"), ("samples", 6)):
        other = result | {"setting": result["setting"] | {name: value}}
        page = write_page([result, other], tmp_path / name).read_text()
        figures = re.findall(r"\]\((figures/roofline_.*\.png)\)", page)
        assert len(set(figures)) == 2 and all((tmp_path / name / figure).exists() for figure in figures)
        assert len(set(re.findall("(?m)^## Op by op: .*", page))) == 2


def test_instruction_sets_are_measured_each_into_its_own_file(tmp_path):
    if _ext.unavailable() is not None:
        pytest.skip("there is no native core, which alone has instruction sets")
    done = run("--op", "row_rstd", "--isa", "baseline", "--json", str(tmp_path / "norm.json"), "--docs", str(tmp_path))
    assert done.exit_code == 0 and done.output.count("baseline:") == 1, done.output
    result = json.loads((tmp_path / "norm_baseline.json").read_text())
    assert result["environment"]["isa"] == "baseline" and result["setting"]["precision"] in ("bf16", "fp32")
    assert "baseline" in (tmp_path / "performance.md").read_text()


def test_a_precision_that_an_instruction_set_lacks_is_not_measured(monkeypatch):
    monkeypatch.setattr("dave_fast.bench.isas.why_not", lambda precision, device: "it has no bfloat16")
    done = run("--op", "row_rstd", "--precision", "bf16")
    assert done.exit_code == 0 and "not measured: it has no bfloat16" in done.output, done.output


def test_the_rates_of_all_libraries_stand_beside_a_product(tmp_path):
    done = run("--op", "linear_int8", "--backend", "torch", "--json", str(tmp_path / "int8.json"))
    assert done.exit_code == 0, done.output
    for row in json.loads((tmp_path / "int8.json").read_text())["ops"]:
        assert set(row["ceilings"]) == set(kinds_of("int8", "cpu"))
        assert row["ceilings"][row["ceiling of"]] == max(row["ceilings"].values()) == row["ceiling"]
        assert f"of {row['ceiling of']}" in done.output


def test_your_own_kernel_is_timed_and_a_wrong_one_turns_the_exit_code(tmp_path):
    done = run("--op", "row_rstd", "--kernel", f"{KERNELS}:own_row_rstd")
    assert done.exit_code == 0 and "yours" in done.output, done.output
    file = tmp_path / "red.json"
    done = run("--op", "row_rstd", "--kernel", f"row_rstd={KERNELS}:wrong_row_rstd", "--json", str(file))
    assert done.exit_code == 1
    assert "yours: its error against float64" in json.loads(file.read_text())["red"][0]


def test_your_own_kernel_in_the_whole_engine():
    done = run("--precision", "fp32", "--kernel", f"row_rstd={KERNELS}:own_row_rstd")
    assert done.exit_code == 0 and "dave-fast fp32, yours" in done.output, done.output
    done = run("--precision", "fp32", "--kernel", f"row_rstd={KERNELS}:careless_row_rstd")
    assert done.exit_code == 1 and "refused: dave-fast fp32, yours: its error" in done.output, done.output

    # in bfloat16 the engine's own rounding hides an error of 0.001 in one op
    done = run("--precision", "bf16", "--kernel", f"row_rstd={KERNELS}:wrong_row_rstd")
    assert done.exit_code == 1 and "row_rstd by yours: its error against float64" in done.output, done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--op", "soften"], "there is no op 'soften'"),
        (["--op", "row_rstd", "--backend", "quantum"], "no backend 'quantum'"),
        (["--compare", "HEAD", "--threshold", "a bit"], "--threshold is 'a bit'"),
        (["--kernel", "a.b:c"], "does not say for which op"),
        (["--op", "row_rstd", "--kernel", "a.b:c"], "cannot be loaded"),
        (["--precision", "fp7"], "fp7"),
        (["--isa", "avx10"], "--isa is 'avx10'; expected all"),
        (
            ["--kernel", f"row_rstd={KERNELS}:row_rstd_without_eps"],
            "too many positional arguments; expected row_rstd(x:",
        ),
        (["--kernel", f"row_rstd={KERNELS}:row_rstd_without_centred"], "unexpected keyword argument 'centred'"),
        (["--kernel", f"pack_weight={KERNELS}:pack_without_arguments"], "too many positional arguments"),
        (["--kernel", f"linear={KERNELS}:linear_without_gate", "--op", "linear"], "keyword argument 'gate'"),
        (["--kernel", f"row_rstd={KERNELS}:calls_of_tired"], "is a list; expected a function"),
    ],
)
def test_requests_that_cannot_be_measured_exit_with_2_and_one_line(arguments, words):
    done = run(*arguments)
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())


def test_red_tests_of_an_op_keep_it_from_being_reported(monkeypatch):
    monkeypatch.setattr("dave_fast.bench.measure.run_tests", lambda op: ("red: FAILED here", True))
    done = CliRunner().invoke(app, ["bench", *MODEL, "--op", "row_rstd"])
    assert done.exit_code == 1
    assert "row_rstd is not timed" in done.output and "GB/s" not in done.output


def test_tests_are_run_only_in_a_checkout(tmp_path, monkeypatch):
    folder = tmp_path / "tests" / "ops"
    folder.mkdir(parents=True)
    monkeypatch.setattr(op_tests, "ROOT", tmp_path)
    monkeypatch.setattr(op_tests, "FOLDER", folder)
    assert op_tests.run_tests("smooth")[0].startswith("not run: the tests are in a checkout")
    (folder / "test_smooth.py").write_text("def test_it():\n    pass\n")
    assert op_tests.run_tests("smooth") == ("passed: tests/ops/test_smooth.py", False)
    (folder / "test_smooth.py").write_text("def test_it():\n    assert 1 == 2\n")
    said, red = op_tests.run_tests("smooth")
    assert red and "test_it" in said


@contextmanager
def this_tree(name, root):
    yield root


def test_two_trees_are_timed_in_turns_and_a_slower_one_is_seen(monkeypatch):
    """Test the comparison with this tree on both sides."""
    if machine.checkout() is None:
        pytest.skip("no git checkout: there is nothing to compare")
    monkeypatch.setattr(compare, "revision", this_tree)
    done = run("--op", "row_rstd", "--compare", "HEAD", "--threshold", "1000%")
    assert done.exit_code == 0, done.output
    assert "row_rstd" in done.output and "after / before" in done.output


def test_ratios_are_of_turns_and_the_median_decides():
    row = compare._row("x", [1.0, 2.0, 1.0], [1.2, 2.0, 1.2], 0.05)
    assert row["slower"] and row["ratio"]["median"] == pytest.approx(1.2)
    assert not compare._row("x", [1.0, 2.0, 1.0], [1.2, 2.0, 1.0], 0.05)["slower"]


def test_a_worker_that_fails_says_why_and_is_ended():
    with compare.started("before", machine.ROOT) as worker:
        with pytest.raises(BackendError, match="before cannot be timed: KeyError"):
            worker.ask({"time": "nothing"})
        process = worker._process
    assert process.poll() is not None


@pytest.mark.slow
def test_a_revision_of_another_layout_is_refused(tmp_path):
    (tmp_path / "dave_fast").mkdir()
    (tmp_path / "dave_fast" / "__init__.py").touch()
    wanted = {"threads": 1, "device": "cpu", "precision": "fp32", "backend": "auto", "model": "demo", "size": None}
    with (
        compare.started("before", tmp_path) as worker,
        pytest.raises(BackendError, match=r"before cannot be timed: .*(no module|No module named).*dave_fast\.\w+"),
    ):
        worker.ask({"prepare": wanted | {"pretrained": True, "ops": [], "samples": 1, "rows": None, "seed": 0}})


def test_an_unknown_revision_and_a_missing_checkout_are_refused(monkeypatch):
    if machine.checkout() is not None:
        with (
            pytest.raises(InputError, match="git knows no revision 'no-such'"),
            compare.revision("no-such", machine.ROOT),
        ):
            pass
    monkeypatch.setattr(machine, "checkout", lambda: None)
    with pytest.raises(InputError, match="needs a git checkout"):
        compare.compare("HEAD", {}, repeats=1, threshold=0.05)


@pytest.mark.parametrize(
    ("what", "words"),
    [("installed", "needs a git checkout of dave-fast"), ("no git", "needs git, which"), ("wrong", "no revision 'no-")],
)
def test_what_cannot_be_compared_is_refused_before_a_model_is_built(monkeypatch, tmp_path, what, words):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    if what != "installed":
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    if what == "no git":
        monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("dave_fast.bench.measure.run", lambda *_, **__: pytest.fail("it was measured"))
    done = run("--op", "row_rstd", "--compare", "no-such")
    assert done.exit_code == 2 and words in " ".join(done.output.split()), done.output


@pytest.mark.slow
def test_a_revision_is_checked_out_built_and_removed_again():
    if machine.checkout() is None:
        pytest.skip("no git checkout: there is nothing to compare")
    with compare.revision("HEAD", machine.ROOT) as tree:
        said = subprocess.run(
            [
                sys.executable,
                "-c",
                "import dave_fast; from dave_fast.ops import _ext; print(dave_fast.__file__, _ext.isa())",
            ],
            cwd=tree,
            capture_output=True,
            text=True,
            check=True,
        )
        assert str(tree) in said.stdout and "None" not in said.stdout
    assert not tree.exists()


def test_a_page_of_several_results_names_gpus_only_where_they_were(tmp_path):
    def result(device, name):
        where = {"device": name, "commit": "abc", "threads": 2, "python": "3.12", "versions": {"torch": "2.15"}}
        missing = {"name": "a peer | of ours", "not measured": "captum is not installed"}
        setting = {"model": "demo", "image": "3×128×128", "samples": 8, "device": device}
        return {"setting": setting, "environment": where, "engine": [missing], "red": ["x"]}

    text = write_page([result("cpu", "Zen"), result("cuda", "H200")], tmp_path).read_text()
    assert "Devices: H200." in text and "Nothing here was measured" not in text
    assert text.count("- demo, 3×128×128, S = 8: a peer | of ours: not measured: captum is not installed.") == 2
    assert "- Refused: x." in text


def test_a_page_without_results_and_one_with_ratios_that_do_not_count(tmp_path):
    assert "No result of the bench is kept here yet" in write_page([], tmp_path).read_text()
    where = {"device": "Zen", "commit": "abc", "threads": 2, "python": "3.12", "versions": {}}
    half = {"median": 0.5, "min": 0.5, "max": 0.5, "repeats": 3}
    row = {"name": "ours", "rows": None, "peak bytes": None, "images a second": half, "seconds an image": half}
    row["times plain"] = {"median": 2.0, "min": 1.5, "max": 2.5}
    setting = {"model": "demo", "image": "3×128×128", "samples": 8, "device": "cpu"}
    result = {"setting": setting, "environment": where, "engine": [row], "agreement": {"bf16": 0.9998, "images": 8}}
    text = write_page([result | {"does not count because": ["the plain way is slow"]}], tmp_path).read_text()
    # columns without entries, such as memory on a CPU, are left out
    assert "|  | images/s | one image | 99 % | rows | times plain |" in text
    cells = "0.5 | 500 ms | ≤ 500 ms (3) | own choice | 2.00 (1.50 to 2.50)"
    assert f"| demo, 3×128×128, S = 8: ours | {cells} |" in text
    assert "Pearson ≥ 0.99980" in text and "**These ratios do not count**: the plain way is slow." in text
