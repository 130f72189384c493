"""Files that a disk spoilt, and disks that are full: one clear line, and nothing good is lost."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from common import load_checkpoint, save_checkpoint, stage


def refused(capsys, act) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        act()
    written = capsys.readouterr().err
    assert end.value.code == 2 and written.startswith("error: ") and written.count("\n") == 1
    return written


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_r37_a_truncated_checkpoint_is_one_line(keep, tmp_path, capsys):
    path, model = tmp_path / "checkpoint.pt", torch.nn.Linear(100, 100)
    save_checkpoint(path, 3, model=model)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    before = [p.clone() for p in model.parameters()]
    assert str(path) in refused(capsys, lambda: load_checkpoint(path, model=model))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_a_checkpoint_of_another_model_is_one_line(tmp_path, capsys):
    save_checkpoint(tmp_path / "c.pt", 3, model=torch.nn.Linear(2, 2))
    assert "c.pt" in refused(
        capsys, lambda: load_checkpoint(tmp_path / "c.pt", model=torch.nn.Linear(3, 3))
    )


def test_a_checkpoint_that_runs_code_is_not_loaded(tmp_path, capsys):
    """r49: pickles can run anything; `weights_only` refuses all but tensors and plain containers."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"step": 1, "model": Evil()}, tmp_path / "c.pt")
    refused(capsys, lambda: load_checkpoint(tmp_path / "c.pt", model=torch.nn.Linear(2, 2)))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("line", [b"{broken\n", b'{"no": "id"}\n', b"[1]\n", b"3\n", b"\xff\xfe\n"])
def test_a_spoilt_line_inside_a_stage_is_one_line_and_stays(line, tmp_path, capsys):
    rows = [{"id": str(i), "prompt": f"p{i}"} for i in range(3)]
    path = tmp_path / "answers.jsonl"
    good = json.dumps({"id": "0", "prompt": "p0", "text": "a"}).encode() + b"\n"
    path.write_bytes(good + line)
    assert str(path) in refused(
        capsys, lambda: stage(path, rows, lambda some, _: [{"text": "b"}] * len(some), 1)
    )
    assert path.read_bytes() == good + line


@pytest.mark.parametrize("room", [2_000, 60_000, 200_000])
def test_r37_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(room, tmp_path):
    """A limit on file sizes stands in for the disk: writing beyond it fails like a full one (OSError, EFBIG)."""
    limited = f"""
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    run = tmp_path / "run"
    flags = [
        "--max_steps",
        "4",
        "--save_every",
        "2",
        "--eval_prompts",
        "8",
        "--output_dir",
        str(run),
    ]
    how = {
        "cwd": ROOT,
        "env": {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        "capture_output": True,
    }
    how |= {"text": True, "timeout": 200}
    done = subprocess.run([sys.executable, "-c", limited, "dckd.py", *flags], **how)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert not (run / "summary.json").exists()
    done = subprocess.run([sys.executable, "dckd.py", "--resume", str(run)], **how)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "summary.json").read_text())["reward_after"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"no_such_flag": 1}'])
def test_a_run_whose_flags_are_spoilt_is_not_resumed(text, tmp_path, capsys):
    import dckd

    (tmp_path / "args.json").write_text(text)
    assert str(tmp_path) in refused(capsys, lambda: dckd.main(dckd.Args(resume=str(tmp_path))))
    assert (tmp_path / "args.json").read_text() == text
