"""The benchmarks on tiny models: all ways to a step have one loss, and the results are complete."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import ideas, sampling, shared, step, whole

TRL_WAYS = {"TRL", "TRL lean"}
HAS_TRL = importlib.util.find_spec("trl") is not None


@pytest.fixture(scope="session")
def output(tmp_path_factory) -> Path:
    """One file for the results of all tests here."""
    return tmp_path_factory.mktemp("benchmarks") / "results.json"


def check_case(case: dict):
    """Equal losses, seconds where the case is timed, memory, and fewer operations than padded."""
    ways = case["ways"]
    compared = set(ways)
    if case["script"] == "dckd":
        # GKDTrainer's loss is one term of DCKD's. It was compared with that term before timing.
        compared -= TRL_WAYS
    padded_loss = ways["padded"]["loss"]
    tolerance = step.loss_tolerance(padded_loss, bf16=case["bf16"])
    for way in compared:
        assert ways[way]["loss"] == pytest.approx(padded_loss, abs=tolerance)
    for way in ways.values():
        assert len(way["seconds"]) == (2 if case["timed"] else 0)
        assert way["peak_bytes"] >= way["alive_bytes"] > 0
    assert 0 < ways["prefdistill"]["flops"] < ways["padded"]["flops"]


@pytest.mark.slow
@pytest.mark.xdist_group("benchmarks")
def test_step(output):
    step.main(step.Args(quick=True, repeats=2, output=str(output)))
    result = json.loads(output.read_text())["step"]
    assert result["machine"]["torch"] and result["seconds"] > 0
    assert {case["script"] for case in result["cases"]} == step.LOSSES.keys()
    for case in result["cases"]:
        check_case(case)
    if HAS_TRL:
        assert any(case["ways"].keys() >= TRL_WAYS for case in result["cases"])
    for table in step.tables(result).values():
        assert table.count("\n") >= 2


def test_every_script_has_a_step():
    scripts = {path.stem for path in ROOT.glob("*.py")} - {"common"}
    assert step.LOSSES.keys() == step.PADDED_LOSSES.keys() == scripts


@pytest.mark.slow
def test_a_wrong_loss_stops_the_benchmark(output, monkeypatch):
    def wrong_loss(setup):
        return setup.student.model.lm_head.weight.square().mean()

    monkeypatch.setitem(step.PADDED_LOSSES, "dckd", wrong_loss)
    with pytest.raises(SystemExit, match="the loss of padded is"):
        step.main(step.Args(quick=True, repeats=1, only="vocabulary", output=str(output)))


@pytest.mark.slow
@pytest.mark.xdist_group("benchmarks")
def test_sampling_is_written_beside_the_results_of_others(tmp_path):
    output = tmp_path / "results.json"
    output.write_text(json.dumps({"step": "measured before"}))

    sampling.main(sampling.Args(quick=True, output=str(output)))
    results = json.loads(output.read_text())
    for n, case in results["sampling"]["cases"].items():
        responses = len(case["prompt_lengths"]) * int(n.removeprefix("n="))
        assert case["sampled_tokens"] == responses * 8
        assert all(len(way["seconds"]) == 2 for way in case["ways"].values())
    assert results["step"] == "measured before"


@pytest.mark.slow
@pytest.mark.xdist_group("benchmarks")
def test_ideas(output):
    ideas.main(ideas.Args(quick=True, output=str(output)))
    result = json.loads(output.read_text())["ideas"]
    assert result["ideas"].keys() == ideas.IDEAS.keys() - {ideas.COMPILE}
    for idea in result["ideas"].values():
        assert idea["difference"] < 2e-2
        assert len(idea["with"]["seconds"]) == 2


def test_the_page_shows_what_was_measured():
    folder = ROOT / "benchmarks"
    results = json.loads((folder / "results.json").read_text())
    page = (folder / "README.md").read_text(encoding="utf-8")
    tables = step.tables(results["step"])
    tables["sampling"] = sampling.table(results["sampling"])
    tables["whole"] = whole.table(results["whole"])
    tables["ideas"] = ideas.table(results["ideas"])
    assert set(re.findall(r"<!-- results:(\w+) -->", page)) == tables.keys()
    assert shared.fill(page, tables) == page
    for script, stages in results["whole"]["scripts"].items():
        assert max(stages["all"]) < whole.LIMITS[script]
