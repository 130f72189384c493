"""The benchmarks on tiny models: all ways to a step have one loss, and the results are complete."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import ideas, sampling, shared, step, whole

TRL = {"TRL", "TRL lean"} if importlib.util.find_spec("trl") else set()


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("benchmarks") / "results.json"


def test_step(output):
    step.main(step.Args(quick=True, repeats=2, output=str(output)))
    result = json.loads(output.read_text())["step"]
    assert result["machine"]["torch"] and result["seconds"] > 0
    assert {case["script"] for case in result["cases"]} == step.FROZEN.keys()
    for case in result["cases"]:
        ways = case["ways"]
        # TRL's GKD loss is one term of DCKD's, compared with that term before anything is timed
        for name in ways.keys() - (TRL if case["script"] == "dckd" else set()):
            limit = step.TOLERANCE[case["bf16"]] * max(1, abs(ways["padded"]["loss"]))
            assert ways[name]["loss"] == pytest.approx(ways["padded"]["loss"], abs=limit)
        assert all(len(way["seconds"]) == 2 * case["timed"] for way in ways.values())
        assert all(way["peak_bytes"] >= way["alive_bytes"] > 0 for way in ways.values())
        assert (
            0 < ways["prefdistill"]["flops"] < ways["padded"]["flops"] or case["note"]
        )  # which takes y_T along
    assert any(case["ways"].keys() >= TRL for case in result["cases"])
    tables = step.tables(result)
    assert all(table.count("\n") >= 2 for table in tables.values())


def test_a_wrong_loss_stops_the_benchmark(output, monkeypatch):
    monkeypatch.setattr(
        step, "padded_dckd", lambda *_, student, **__: student.model.lm_head.weight.square().mean()
    )
    with pytest.raises(SystemExit, match="the loss of padded is"):
        step.main(step.Args(quick=True, repeats=1, only="vocabulary", output=str(output)))


def test_sampling(output):
    sampling.main(sampling.Args(quick=True, output=str(output)))
    results = json.loads(output.read_text())
    for n, case in results["sampling"]["cases"].items():
        assert case["sampled_tokens"] == len(case["prompt_lengths"]) * int(n[2:]) * 8
        assert all(len(way["seconds"]) == 2 for way in case["ways"].values())
    assert "step" in results  # one file holds all results


def test_ideas(output):
    ideas.main(ideas.Args(quick=True, output=str(output)))
    result = json.loads(output.read_text())["ideas"]
    assert all(
        idea["difference"] < 2e-2 and len(idea["with"]["seconds"]) == 2
        for idea in result["ideas"].values()
    )


def test_the_page_shows_what_was_measured():
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    page = (ROOT / "benchmarks" / "README.md").read_text()
    others = {"sampling": sampling, "whole": whole, "ideas": ideas}
    made = step.tables(results["step"]) | {
        name: module.table(results[name]) for name, module in others.items()
    }
    assert set(re.findall(r"<!-- results:(\w+) -->", page)) == made.keys()
    assert shared.fill(page, made) == page
    for script, stages in results["whole"]["scripts"].items():
        assert max(stages["all"]) < whole.LIMITS[script]
