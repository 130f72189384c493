"""Generated bad input: a clean result or one clear line and exit code 2, never a traceback, never a silent drop."""

import dataclasses
import importlib
import json
import math
import types
import typing

import pytest
import torch
import tyro
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import LM, make_examples, read_rows

SCRIPTS = [
    name
    for name in ("adpa", "dckd", "dpkd", "pad", "rm_distiller")
    if (ROOT / f"{name}.py").exists()
]
SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]

# texts that break careless code: markup, control and zero-width characters, right-to-left, lone surrogates' escapes
NASTY = [
    "<|end|>",
    "<|assistant|>",
    "<|begin|>",
    "<|endoftext|>",
    "</s>",
    "\x00",
    "\x1b[2J",
    "\u200b",
    "\u202e",
]
NASTY += [
    "שלום",
    "{{ bos_token }}",
    "{% raise %}",
    "\r\n",
    "\t",
    " ",
    "",
    "\u2028",
    "é",
    "🦊",
    "2021-01-01",
    "NaN",
]
texts = st.lists(st.sampled_from(NASTY) | st.text(max_size=20), max_size=4).map("".join)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": texts}
)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "a"]), inner, max_size=3)
    ),
    max_leaves=5,
)
good_rows = st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts})
chat_rows = st.fixed_dictionaries(
    {"chosen": st.lists(turns, max_size=3), "rejected": st.lists(turns, max_size=3)}
)
bad_rows = st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "id"]), junk, max_size=4
)
lines = st.one_of(
    good_rows.map(json.dumps),
    chat_rows.map(json.dumps),
    bad_rows.map(json.dumps),
    junk.map(json.dumps),
    st.text(max_size=30),
)
files = st.one_of(
    st.lists(good_rows.map(json.dumps), max_size=6).map(lambda rows: "\n".join(rows).encode()),
    st.lists(lines, max_size=5).map(lambda rows: "\n".join(rows).encode("utf-8", "surrogatepass")),
    st.lists(good_rows | junk, max_size=4).map(lambda rows: json.dumps(rows).encode()),
    st.binary(max_size=60),
    good_rows.map(lambda row: json.dumps(row)[:-5].encode()),
)


@pytest.fixture(scope="module")
def lm(checkpoints):
    return LM(checkpoints["student"], torch.device("cpu"))


def ends_well(capsys, act):
    """act() returns, or ends the program with code 2 and one line that begins with "error:"."""
    capsys.readouterr()
    try:
        return act()
    except SystemExit as end:
        written = capsys.readouterr().err
        assert end.code == 2 and written.startswith("error: ") and written.count("\n") == 1, written


@settings(max_examples=300, deadline=None, suppress_health_check=SHARED, derandomize=True)
@given(content=files, suffix=st.sampled_from([".jsonl", ".json", ".parquet"]))
def test_generated_data_files(content, suffix, tmp_path, lm, capsys):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    rows = ends_well(capsys, lambda: read_rows(str(path), "train"))
    if rows is not None:
        ends_well(capsys, lambda: make_examples(lm, rows, ("chosen", "rejected"), 64, 64))


@settings(max_examples=100, deadline=None, suppress_health_check=SHARED, derandomize=True)
@given(rows=st.lists(good_rows, min_size=1, max_size=6))
def test_no_row_is_dropped_in_silence(rows, tmp_path, lm, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    read = read_rows(str(path), "train")
    assert len(read) == len(rows)
    capsys.readouterr()
    try:
        kept = make_examples(lm, read, ("chosen", "rejected"), 64, 64)
        said = capsys.readouterr().out
    except SystemExit:
        kept, said = [], capsys.readouterr().err
    dropped = [int(part.split()[0]) for part in said.split(", ")[1:]]
    assert len(kept) + sum(dropped) == len(rows)


@settings(max_examples=150, deadline=None, suppress_health_check=SHARED, derandomize=True)
@given(prompt=texts, answer=texts)
def test_special_tokens_come_from_the_template_only(prompt, answer, lm):
    ids, (response,) = lm.encode([{"role": "user", "content": prompt}], [answer])
    special = {token for token, added in lm.tokenizer.added_tokens_decoder.items() if added.special}
    empty, _ = lm.encode([{"role": "user", "content": ""}])
    assert sum(token in special for token in ids) == sum(token in special for token in empty)
    assert [token in special for token in response] == [False] * (len(response) - 1) + [True]
    assert lm.tokenizer.decode(response[:-1]) == answer


NONSENSE = [-1, -0.5, math.nan, math.inf, -math.inf]


def numeric_flags(script: str) -> list[str]:
    hints = typing.get_type_hints(importlib.import_module(script).Args)
    return [name for name, kind in hints.items() if kind in (int, float)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_r47_nonsense_numbers_are_refused_before_anything_is_written(
    script, tmp_path, capsys, monkeypatch
):
    module = importlib.import_module(script)
    monkeypatch.chdir(tmp_path)
    for name in numeric_flags(script):
        for value in NONSENSE:
            args = module.Args(student="/nowhere")
            setattr(args, name, value)
            with pytest.raises(SystemExit) as end:
                module.main(args)
            written = capsys.readouterr().err
            assert (
                end.value.code == 2 and f"--{name} {value}" in written and written.count("\n") == 1
            ), (name, written)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_r47_flags_of_the_wrong_kind_and_unknown_flags_are_refused(script, capsys):
    module = importlib.import_module(script)
    bad = [["--no_such_flag", "1"], ["surplus"]]
    for field in dataclasses.fields(module.Args):
        kind = typing.get_type_hints(module.Args)[field.name]
        if kind in (int, float):
            bad.append([f"--{field.name}", "many"])
        elif typing.get_origin(kind) is typing.Literal:
            bad.append([f"--{field.name}", "no-such-choice"])
        elif isinstance(kind, types.UnionType):
            bad.append([f"--{field.name}", "low", "high"])
    for words in bad:
        with pytest.raises(SystemExit) as end:
            tyro.cli(module.Args, args=words)
        assert end.value.code == 2 and "Traceback" not in capsys.readouterr().err, words
