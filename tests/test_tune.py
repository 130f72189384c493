"""studies/tune.py: the grid is even, an interrupted study goes on, and the tables say what
docs/tuning.json holds."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line

from studies import compare, tune
from studies.tune import METHODS, Setting


# --------------------------------------------------------------------------------------------- grid
@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_three_rates_and_three_values_of_each_coefficient(name):
    """A coefficient's values stand with equal values of the others: three for each, with one
    setting in common."""
    method = METHODS[name]
    rates = [float(rate) for rate in method.rates]
    assert len(rates) == 3
    # Neighbouring steps of one ladder: half a power of ten, rounded.
    assert [round(rate / rates[0]) for rate in rates] == [1, 3, 10]
    # DCKD has one weight for both sides.
    rows = {flags.replace("--kl_rejected", "") for flags in method.coefficients}
    assert len(rows) == len(method.coefficients) in (1, 3, 5)
    values = {}
    for flags in method.coefficients:
        words = flags.split()
        for flag, value in zip(words[::2], words[1::2]):
            values.setdefault(flag, set()).add(value)
    varied = [flag for flag in values if len(values[flag]) > 1]
    assert all(len(values[flag]) == 3 for flag in varied)
    expected = {1: 0, 3: 1, 5: 2}[len(method.coefficients)]
    assert len(set(varied) - {"--kl_rejected"}) == expected


def test_names_of_runs_differ_and_are_found_in_commands():
    names = [setting.name() for method in METHODS for setting in tune.settings(method)]
    names += [*compare.RUNS, *tune.SOURCES]
    assert len(set(names)) == len(names)
    for name in names:
        assert compare.needs(f"adpa.py --student {{{name}}}/model") == [name]


def test_every_flag_is_known_to_its_script():
    """And every source is there."""
    for name, method in METHODS.items():
        words = method.command.removeprefix("-m ").split()
        script = words[0].removesuffix(".py").replace(".", "/")
        source = (ROOT / f"{script}.py").read_text()
        command = f"{method.command} {method.coefficients[0]}{tune.QUICK}"
        for flag in re.findall(r"--(?:no-)?(\w+)", command):
            assert f"    {flag}: " in source, (name, flag)
        needed = compare.needs(method.command)
        assert set(needed) <= {*tune.SOURCES, "start"}
    assert {method.start for method in METHODS.values()} - {""} <= METHODS.keys()


def test_methods_and_baselines_of_the_report_are_tuned():
    """All that is trained in the README's table, all reward models but the release's loss, and what
    PAD, DPKD and DPO are compared with."""
    trained = set(compare.METHODS.values()) - {"student", "teacher"}
    reward_models = set(compare.REWARD_MODELS.values()) - {"rm_released"}
    others = {"pad_dpo", "pad_simpo", "pad_vpd", "seqkd", "kd", "dpo_large", "adpa_no_reference"}
    assert trained | reward_models | others <= METHODS.keys()


# ------------------------------------------------------------------------------ what a study does
SETTINGS = {
    "eval_data": "rows.jsonl",
    "eval_config": "",
    "eval_split": "test",
    "reward": "a:b",
    "reward_label": "",
    "max_response_tokens": 64,
}
VERSIONS = {"torch": "9.9", "transformers": "8.8", "datasets": "7.7"}


class FakeRuns:
    """Writes what a run would have left, in place of a process. `rewards` gives a reward to a part
    of a command, and `errors` a last line."""

    def __init__(self):
        self.commands = []
        self.rewards = {}
        self.errors = {}
        self.stop_after = None

    def run(self, command: str, log: Path):
        if len(self.commands) == self.stop_after:
            raise KeyboardInterrupt
        self.commands.append(command)
        folder = Path(re.search(r"--output_dir (\S+)", command)[1])
        (folder / "model").mkdir(parents=True, exist_ok=True)
        for part, message in self.errors.items():
            if part in command:
                with log.open("a") as file:
                    file.write(f"training\n{message}\n")
                raise SystemExit(f"{log.stem} failed: {message}")
        if "studies.measure" in command:
            trained = (folder / "args.json").read_text()
            reward = 0.5
            for part, value in self.rewards.items():
                if part in trained:
                    reward = value
            measured = {"reward": reward, "stderr_over_prompts": 0.01, "responses": 1024}
            measured |= {"finished": 1.0, "tokens": 8.5}
            (folder / "measured.json").write_text(json.dumps(measured))
            return
        (folder / "args.json").write_text(json.dumps({**SETTINGS, "command": command}))
        summary = {**VERSIONS, "reward_after": 0.1, "accuracy": {"all": [0.8, 0.02, 768]}}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "model" / "weights").write_text("heavy")
        (folder / "checkpoint.pt").write_text("heavy")


@pytest.fixture
def fake(monkeypatch, tmp_path) -> FakeRuns:
    """Runs that are not made, in a project whose docs are a copy."""
    runs = FakeRuns()
    monkeypatch.setattr(tune, "run_forked", runs.run)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(compare, "RUNS", dict(compare.RUNS))
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(tune, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/tuning.md").write_text("<!-- results:tuning -->\n<!-- /results -->\nend\n")
    return runs


def study(tmp_path: Path, **flags) -> dict:
    """A study of these flags. Returns what docs/tuning.json holds then."""
    tune.main(tune.Args(**{"at_once": 1, "output_dir": "runs", **flags}))
    return json.loads((tmp_path / "docs/tuning.json").read_text())


def page(tmp_path: Path) -> str:
    return (tmp_path / "docs/tuning.md").read_text()


def test_cells_are_made_and_the_best_is_found(fake, tmp_path):
    fake.rewards = {"--gamma 1.4 --learning_rate 3e-3": 0.75}
    results = study(tmp_path, only="^adpa$")
    assert len(results["cells"]) == 27
    first = results["cells"][0]
    command = "python adpa.py --gamma 0.35 --learning_rate 1e-3"
    assert first.pop("command").startswith(command)
    assert first.pop("seconds") >= 0
    assert first == {
        "method": "adpa",
        "coefficient": "--gamma 0.35",
        "learning_rate": "1e-3",
        "seed": 101,
        "reward": 0.5,
        "standard_error": 0.01,
        "responses": 1024,
        "finished": 1.0,
        "tokens": 8.5,
        **VERSIONS,
    }
    # A run and its measurement each, all settings of a seed first.
    seeds = [re.search(r"--seed (\d+)", command)[1] for command in fake.commands]
    assert seeds == ["101"] * 18 + ["102"] * 18 + ["103"] * 18
    assert compare.best_flags("adpa") == " --gamma 1.4 --learning_rate 3e-3"
    assert compare.best_flags("dckd") == ""
    best = results["best"]["adpa"]
    assert (best["reward"], best["standard_error"]) == (0.75, 0.0)
    line = "| ADPA | `--gamma 1.4` | 0.500 ± 0.000 | **0.750 ± 0.000** | 0.500 ± 0.000 |"
    assert line in page(tmp_path)
    edge = "| ADPA | `--gamma 1.4 --learning_rate 3e-3` | 0.750 ± 0.000 | coefficient |"
    assert edge in page(tmp_path)
    assert page(tmp_path).endswith("\nend\n")


def test_only_small_files_are_left_and_what_another_cell_needs(fake, tmp_path):
    study(tmp_path, only="^(sft|dckd)$", seeds=1)
    names = {path.name for path in (tmp_path / "runs").rglob("*") if path.parent.name[:3] == "sft"}
    assert names == {"args.json", "summary.json", "measured.json"}
    # ADPA+ starts from the best DCKD.
    assert len(list((tmp_path / "runs").glob("dckd*/model"))) == 9
    assert not list((tmp_path / "runs").rglob("checkpoint.pt"))


@pytest.mark.parametrize("at_once", [1, 2])
def test_an_interrupted_study_goes_on_and_left_a_table(at_once, fake, tmp_path):
    fake.stop_after = 5
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, only="^sft$", at_once=at_once)
    results = json.loads((tmp_path / "docs/tuning.json").read_text())
    done = len(results["cells"])
    assert 1 <= done <= 2
    assert f"**Incomplete**: {done} of " in page(tmp_path)
    assert "| SFT on chosen |  | 0.500 (seeds: 1) |" in page(tmp_path)
    # Not every setting has a seed yet, so there is no best one.
    assert results["best"] == {}

    fake.stop_after = None
    before = len(fake.commands)
    results = study(tmp_path, only="^sft$", at_once=at_once)
    assert len(results["cells"]) == 9
    again = [command for command in fake.commands[before:] if "1e-3 " in command]
    assert not any("--seed 101" in command for command in again)
    # A finished study makes nothing, even without the runs' folders.
    for folder in (tmp_path / "runs").iterdir():
        folder.rename(tmp_path / f"moved-{folder.name}")
    before = len(fake.commands)
    assert study(tmp_path, only="^sft$") == results
    assert len(fake.commands) == before


def test_a_diverged_cell_is_a_result_and_shown(fake, tmp_path):
    line = "error: loss nan, gradient norm inf in step 7 on rows ['3', '4']"
    fake.errors = {"--learning_rate 1e-2 --eval_every 1000000 --save_every": line}
    results = study(tmp_path, only="^sft$", seeds=2)
    diverged = [cell for cell in results["cells"] if cell["learning_rate"] == "1e-2"]
    assert [cell["diverged"] for cell in diverged] == ["loss nan, gradient norm inf in step 7"] * 2
    assert len(results["cells"]) == 6
    assert "| diverged: 2 of 2 (seeds: 2) |" in page(tmp_path)
    assert results["best"]["sft"]["learning_rate"] in ("1e-3", "3e-3")
    before = len(fake.commands)
    study(tmp_path, only="^sft$", seeds=2)
    assert len(fake.commands) == before


def test_a_setting_that_diverged_once_is_not_the_best(fake, tmp_path):
    fake.rewards = {"--learning_rate 1e-2": 0.9}
    fake.errors = {"sft-1e-2__102": "error: loss inf, gradient norm nan in step 1 on rows []"}
    results = study(tmp_path, only="^sft$", seeds=3)
    assert results["best"]["sft"]["reward"] == 0.5
    assert "0.900 ± 0.000 diverged: 1 of 3 |" in page(tmp_path)


def test_another_failure_is_no_result_and_ends_nothing(fake, tmp_path):
    fake.errors = {"sft-3e-3__101": "ValueError: a bug"}
    with pytest.raises(SystemExit, match=r"sft-3e-3__101 failed: ValueError: a bug"):
        study(tmp_path, only="^sft$")
    results = json.loads((tmp_path / "docs/tuning.json").read_text())
    assert len(results["cells"]) == 8
    # The best is chosen with the seeds that all have.
    assert results["best"]["sft"]["seeds"] == [102, 103]
    fake.errors = {}
    before = len(fake.commands)
    assert len(study(tmp_path, only="^sft$")["cells"]) == 9
    assert len(fake.commands) == before + 2


def test_stages_are_shared_by_the_cells_of_a_seed(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "DATA_FILES", {"best_and_worst": lambda run: [{"prompt": "p"}]})
    results = study(tmp_path, only="^(pad|pad_dpo|rm)$", seeds=2)
    sources = [command for command in fake.commands if "--max_steps 1 " in command]
    assert len(sources) == 4
    pad = [command for command in fake.commands if command.startswith("pad.py --scores")]
    assert len(pad) == 30
    for command in pad:
        seed = re.search(r"--seed (\d+)", command)[1]
        assert f"--scores {tmp_path}/runs/pad_scores__{seed}/scores_1.jsonl" in command
    # The data file of every cell is gone.
    assert not list((tmp_path / "runs").glob("*.best_and_worst.jsonl"))
    accuracies = [cell["accuracy"] for cell in results["cells"] if cell["method"] == "rm"]
    assert accuracies == [0.8] * 18
    assert "| RM-Distiller, the full method | `--kl_coef 0.03" in page(tmp_path)


def test_a_shared_stage_waits_once_and_before_its_cells(fake, tmp_path):
    """Twice, two processes would write to one folder."""
    cells = tune.read_cells(tmp_path / "docs/tuning.json")
    waiting = tune.waiting_runs(["pad", "rm"], range(101, 103), tune.Study(tmp_path, 8, cells))
    assert len(set(waiting)) == len(waiting) == 2 * (15 + 9 + 2)
    first = [name for name, _ in waiting if name in tune.SOURCES]
    assert first == ["pad_scores", "rm_annotations"] * 2
    assert waiting[0] == ("pad_scores", 101)


def test_adpa_plus_starts_from_the_best_dckd_of_all_seeds(fake, tmp_path):
    best = "--kl_chosen 1 --kl_rejected 1 --learning_rate 3e-3"
    fake.rewards = {best: 0.8}
    results = study(tmp_path, only="^adpa_plus$", seeds=2)
    assert {cell["method"] for cell in results["cells"]} == {"dckd", "adpa_plus"}
    plus = [command for command in fake.commands if command.startswith("adpa.py")]
    assert len(plus) == 18
    for command in plus:
        seed = re.search(r"--seed (\d+)", command)[1]
        folder = f"{tmp_path}/runs/dckd-kl_chosen-1-kl_rejected-1-3e-3__{seed}/model"
        assert f"--student {folder} " in command
    # With another best DCKD these cells are out of date.
    for cell in results["cells"]:
        if cell["method"] == "dckd":
            cell["reward"] = 0.9 if cell["learning_rate"] == "1e-2" else 0.1
    (tmp_path / "docs/tuning.json").write_text(json.dumps(results))
    before = len(fake.commands)
    fake.stop_after = before + 2
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, only="^adpa_plus$", seeds=2)
    assert len(json.loads((tmp_path / "docs/tuning.json").read_text())["cells"]) == 18 + 1
    fake.stop_after = None
    results = study(tmp_path, only="^adpa_plus$", seeds=2)
    assert len(results["cells"]) == 36
    again = [command for command in fake.commands[before:] if command.startswith("adpa.py")]
    assert len(again) == 18
    assert all("-1e-2__10" in command for command in again)


@pytest.mark.slow
def test_a_forked_run_is_what_its_command_does(tmp_path):
    """Of a script and of a module: arguments, folder, threads, output. A failed one is named."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "print(sys.argv[1:], os.getcwd(), __name__)\n"
        "print('to stderr', file=sys.stderr)\n"
        "sys.exit('a bug' if 'bad' in sys.argv else 0)\n"
    )
    log = tmp_path / "run__1.log"
    log.write_text("the command\n")
    tune.run_forked(f"{script} --seed '1 2'", log)
    lines = log.read_text().splitlines()
    assert sorted(lines) == sorted(
        ["the command", "to stderr", f"['--seed', '1 2'] {ROOT} __main__"]
    )
    with pytest.raises(SystemExit, match=r"run__1 failed: see .*, which ends in: a bug"):
        tune.run_forked(f"{script} bad", log)

    module_log = tmp_path / "module.log"
    tune.run_forked("-m studies.tune --dry_run --only ^sft$", module_log)
    assert module_log.read_text().splitlines()[-1].startswith("all ")


# -------------------------------------------------------------------------------------- the tables
def cell(setting: Setting, seed: int, reward: float) -> dict:
    return {
        "method": setting.method,
        "coefficient": setting.coefficient,
        "learning_rate": setting.rate,
        "seed": seed,
        "reward": reward,
        "torch": "9.9",
        "transformers": "8.8",
        "seconds": 30.0,
    }


def read(tmp_path: Path, cells: list[dict]) -> tune.Cells:
    (tmp_path / "tuning.json").write_text(json.dumps({"cells": cells}))
    return tune.read_cells(tmp_path / "tuning.json")


def test_the_best_is_of_equal_seeds(tmp_path):
    """1e-2 has the highest values, of a seed that the others do not have."""
    cells = []
    for rate, reward in {"1e-3": 0.5, "3e-3": 0.7, "1e-2": 0.6}.items():
        cells.append(cell(Setting("sft", "", rate), 101, reward))
    cells.append(cell(Setting("sft", "", "1e-2"), 102, 0.99))
    grid = read(tmp_path, cells)
    assert tune.best_setting(grid, "sft") == Setting("sft", "", "3e-3")
    assert tune.best_setting(grid, "adpa") is None


def test_a_table_by_hand(tmp_path):
    cells = []
    for seed, rewards in {101: (0.5, 0.6, 0.4), 102: (0.6, 0.8, 0.4), 103: (0.7, 0.7, 0.4)}.items():
        for rate, reward in zip(("1e-3", "3e-3", "1e-2"), rewards):
            cells.append(cell(Setting("sft", "", rate), seed, reward))
    report = tune.report(read(tmp_path, cells))
    # The deviations of 0.6, 0.7 and 0.8 are 0.1: 0.1/√3 = 0.058.
    text = "| SFT on chosen |  | 0.600 ± 0.058 | **0.700 ± 0.058** | 0.400 ± 0.000 |"
    assert text in report
    assert "| SFT on chosen | `--learning_rate 3e-3` | 0.700 ± 0.058 |  |" in report


def test_an_edge_is_the_lowest_or_the_highest_value_that_is_tried():
    """--gamma has one value, and so no edge."""
    tried = ["--gamma 1 --beta 2", "--gamma 1 --beta 10", "--gamma 1 --beta 9"]
    assert [tune.is_edge(flags, tried) for flags in tried] == [True, True, False]
    pad = METHODS["pad"].coefficients
    assert [tune.is_edge(flags, pad) for flags in pad] == [True, False, True, True, True]
    assert not tune.is_edge("", [""])


def test_the_page_says_what_the_file_holds():
    path = ROOT / "docs/tuning.json"
    cells = tune.read_cells(path)
    assert tune.report(cells) in (ROOT / "docs/tuning.md").read_text()
    if path.exists():
        assert json.loads(path.read_text())["best"] == tune.best_of_all(cells)


def test_the_plan_counts_cells_and_makes_none(fake, capsys):
    tune.main(tune.Args(dry_run=True, only="^(sft|adpa)$"))
    header, adpa, sft, whole = capsys.readouterr().out.splitlines()
    assert header.split() == ["cells", "missing", "minutes"]
    assert adpa.split() == ["adpa", "27", "27", "11"]
    assert sft.split() == ["sft", "9", "9", "4"]
    assert whole.split() == ["all", "36", "36", "15"]
    assert fake.commands == []


WRONG_FLAGS = {
    "no such method": ({"only": "zzz"}, "--only zzz matches none of: dckd, "),
    "no regular expression": ({"only": "("}, "is no regular expression"),
    "no seed": ({"seeds": 0}, "must be at least 1"),
    "no responses": ({"responses": 0}, "must be at least 1"),
}


@pytest.mark.parametrize("case", WRONG_FLAGS)
def test_what_cannot_be_done_is_one_line_before_any_cell(case, fake, capsys):
    flags, message = WRONG_FLAGS[case]
    assert message in one_error_line(capsys, tune.main, tune.Args(**flags))
    assert fake.commands == []
