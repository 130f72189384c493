"""Files that a disk spoilt, and disks that are full: one clear line, and nothing good is lost."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command_line, first_rows, one_error_line, training_rows

import dckd
from common import cached_map, load_checkpoint, save_checkpoint, save_summary

# -------------------------------------------------------------------------------------- checkpoints
COUNTS = {"tokens": 10, "seconds": 1.0}


@pytest.mark.parametrize("kept_bytes", [0, 1, 100, 0.5, 0.99])
def test_r37_a_truncated_checkpoint_is_one_line(kept_bytes, tmp_path, capsys):
    """A number below 1 is a share of the file."""
    path = tmp_path / "checkpoint.pt"
    model = torch.nn.Linear(100, 100)
    save_checkpoint(path, 3, COUNTS, model=model)
    content = path.read_bytes()
    if 0 < kept_bytes < 1:
        kept_bytes = int(kept_bytes * len(content))
    path.write_bytes(content[:kept_bytes])
    weights = model.weight.clone()
    counts = {"tokens": 0, "seconds": 0.0}

    error = one_error_line(capsys, load_checkpoint, path, counts, model=model)

    assert str(path) in error
    assert torch.equal(model.weight, weights)
    assert counts == {"tokens": 0, "seconds": 0.0}


def test_a_checkpoint_of_another_model_is_one_line(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, 3, COUNTS, model=torch.nn.Linear(2, 2))

    error = one_error_line(capsys, load_checkpoint, path, {}, model=torch.nn.Linear(3, 3))

    assert str(path) in error


class MakesAFolder:
    """An object whose pickle makes a folder when it is loaded, as a stranger's could do worse."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_that_runs_code_is_not_loaded(tmp_path, capsys):
    """r49: `weights_only` refuses all but tensors and plain containers."""
    path = tmp_path / "checkpoint.pt"
    folder = tmp_path / "made by the pickle"
    torch.save({"step": 1, "counts": COUNTS, "model": MakesAFolder(folder)}, path)

    error = one_error_line(capsys, load_checkpoint, path, {}, model=torch.nn.Linear(2, 2))

    assert str(path) in error
    assert not folder.exists()


# --------------------------------------------------------------------------------- stages and flags
def answer_b(rows: list[dict]) -> list[dict]:
    return [{"text": "b"} for _ in rows]


@pytest.mark.parametrize("line", [b"{broken\n", b'{"no": "id"}\n', b"[1]\n", b"3\n", b"\xff\xfe\n"])
def test_a_spoilt_line_inside_a_stage_is_one_line_and_stays(line, tmp_path, capsys):
    rows = [{"id": str(i), "prompt": f"p{i}"} for i in range(3)]
    path = tmp_path / "answers.jsonl"
    good_line = json.dumps({"id": "0", "prompt": "p0", "text": "a"}).encode() + b"\n"
    path.write_bytes(good_line + line)

    error = one_error_line(capsys, cached_map, path, rows, answer_b, batch_size=1)

    assert str(path) in error
    assert path.read_bytes() == good_line + line


@pytest.mark.parametrize("text", ["", "{", "[]", '{"no_such_flag": 1}'])
def test_a_run_whose_flags_are_spoilt_is_not_resumed(text, tmp_path, capsys):
    (tmp_path / "args.json").write_text(text)

    error = one_error_line(capsys, dckd.main, dckd.Args(resume=str(tmp_path)))

    assert str(tmp_path) in error
    assert (tmp_path / "args.json").read_text() == text


# -------------------------------------------------------------------------------------- a full disk
# Beyond a limit on the size of files, writing fails as it does on a full disk (OSError, EFBIG).
WITH_A_LIMIT = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
room = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_python(*words: str) -> subprocess.CompletedProcess:
    """`python <words>` in the repository, on one core and without progress bars."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_r37_a_summary_that_a_full_disk_cuts_is_no_sign_of_a_finished_run(tmp_path):
    _, largest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, largest))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_summary(tmp_path, {}, COUNTS, dckd.Args(device="cpu"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    assert not (tmp_path / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "room, cut_file",
    [
        (2_000, "eval_before.jsonl"),
        (60_000, "checkpoint.pt.partial"),
        (200_000, "checkpoint.pt.partial"),
    ],
)
def test_r37_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    room, cut_file, tmp_path
):
    """inputs.json is some 1,800 bytes, 16 evaluated rows are 2,700, a checkpoint is 370,000."""
    run = tmp_path / "run"
    flags = {
        "data": first_rows("train", 32, tmp_path),
        "eval_data": first_rows("test", 16, tmp_path),
        "max_steps": 4,
        "save_every": 2,
        "eval_prompts": 16,
        "output_dir": run,
    }

    stopped = run_python("-c", WITH_A_LIMIT, str(room), "dckd.py", *command_line(flags))

    assert stopped.returncode == 2, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert stopped.stderr.splitlines()[-1].startswith("error: ")
    assert (run / cut_file).stat().st_size == room
    assert not (run / "summary.json").exists()

    resumed = run_python("dckd.py", "--resume", str(run))

    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["reward_after"]
    assert [row["step"] for row in training_rows(run)] == [4]
