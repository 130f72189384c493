"""Generated bad input ends with a clean result, or with one line and exit code 2. It never ends
with a traceback, and no row is dropped in silence."""

import dataclasses
import importlib
import json
import math
import re
import types
import typing
from types import SimpleNamespace

import pytest
import torch
from conftest import SCRIPTS, one_short
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import LM, encode_rows, exit_in_one_line, parse_flags, read_rows

LIMITS = SimpleNamespace(max_prompt_tokens=64, max_response_tokens=64)
COLUMNS = ["chosen", "rejected"]

# ---------------------------------------------------------------------------------- generated files
# Texts that break careless code: markup, control and zero-width characters, right-to-left text,
# and what looks like another type.
NASTY_TEXTS = [
    "<|end|>",
    "<|assistant|>",
    "<|begin|>",
    "<|endoftext|>",
    "</s>",
    "\x00",
    "\x1b[2J",
    "\u200b",
    "\u202e",
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
HALF_CHARACTER = "\ud83e"  # JSON can spell it, UTF-8 cannot
texts = st.lists(st.sampled_from(NASTY_TEXTS) | st.text(max_size=20), max_size=4).map("".join)
file_texts = st.lists(texts | st.just(HALF_CHARACTER), max_size=2).map("".join)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": file_texts}
)


def nested(inner):
    """Lists and objects of what is given."""
    keys = st.sampled_from(["role", "a"])
    return st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)


values = st.none() | st.booleans() | st.integers() | st.floats() | file_texts
junk = st.recursive(values, nested, max_leaves=5)
good_rows = st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts})
chat_rows = st.fixed_dictionaries(
    {"chosen": st.lists(messages, max_size=3), "rejected": st.lists(messages, max_size=3)}
)
bad_rows = st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "id"]), junk | file_texts, max_size=4
)
lines = st.one_of(
    good_rows.map(json.dumps),
    chat_rows.map(json.dumps),
    bad_rows.map(json.dumps),
    junk.map(json.dumps),
    st.text(max_size=30),
)


def join_lines(rows: list[str]) -> bytes:
    return "\n".join(rows).encode()


def cut_short(row: dict) -> bytes:
    """A row as JSON without its last five characters."""
    return json.dumps(row)[:-5].encode()


files = st.one_of(
    st.lists(good_rows.map(json.dumps), max_size=6).map(join_lines),
    st.lists(lines, max_size=5).map(join_lines),
    st.lists(good_rows | junk, max_size=4).map(json.dumps).map(str.encode),
    st.binary(max_size=60),
    good_rows.map(cut_short),
)


def generated(max_examples: int):
    """Settings of a test. The same inputs are generated every time."""
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
        ],
    )


@pytest.fixture(scope="session")
def lm(checkpoints) -> LM:
    return LM(checkpoints["student"], torch.device("cpu"))


def result_or_error_line(capsys, function, *arguments):
    """(result, "") of a function, or (None, the one line with which it ends the program)."""
    capsys.readouterr()
    try:
        return function(*arguments), ""
    except SystemExit as stopped:
        error = capsys.readouterr().err
        assert stopped.code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        return None, error


@pytest.mark.slow
@generated(max_examples=300)
@given(content=files, suffix=st.sampled_from([".jsonl", ".json", ".parquet"]))
def test_generated_data_files(content, suffix, tmp_path, lm, capsys):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)

    rows, error = result_or_error_line(capsys, read_rows, str(path), "train")

    if rows is None:
        assert str(path) in error
    else:
        result_or_error_line(capsys, encode_rows, lm, rows, COLUMNS, LIMITS, "pairs")


@pytest.mark.slow
@generated(max_examples=100)
@given(rows=st.lists(good_rows, min_size=1, max_size=6))
def test_no_row_is_dropped_in_silence(rows, tmp_path, lm, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))

    read = read_rows(str(path), "train")
    kept, report = result_or_error_line(capsys, encode_rows, lm, read, COLUMNS, LIMITS, "pairs")

    assert len(read) == len(rows)
    if kept is None:
        kept = []
    else:
        report = capsys.readouterr().out
    dropped = [int(count) for count in re.findall(r"(\d+) dropped", report)]
    assert f"{len(kept)} of {len(rows)} rows" in report
    assert len(kept) + sum(dropped) == len(rows)


@generated(max_examples=150)
@given(prompt=texts, response=texts)
def test_special_tokens_come_from_the_template_only(prompt, response, lm):
    added_tokens = lm.tokenizer.added_tokens_decoder
    special = {token for token, added in added_tokens.items() if added.special}

    prompt_ids, [response_ids] = lm.encode([{"role": "user", "content": prompt}], [response])

    empty_prompt_ids, _ = lm.encode([{"role": "user", "content": ""}])
    assert [token for token in prompt_ids if token in special] == [
        token for token in empty_prompt_ids if token in special
    ]
    *text_ids, last = response_ids
    assert last in special
    assert special.isdisjoint(text_ids)
    assert lm.tokenizer.decode(text_ids) == response


# -------------------------------------------------------------------------------- nonsense as flags
NONSENSE = [-1, -0.5, math.nan, math.inf, -math.inf]


def flag_types(script: str) -> dict:
    """The type of every flag of a script."""
    return typing.get_type_hints(importlib.import_module(script).Args)


def as_a_program(module, args):
    """What a script does behind its last line."""
    with exit_in_one_line(args):
        module.main(args)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_r47_nonsense_numbers_are_refused_before_anything_is_written(
    script, tmp_path, capsys, monkeypatch
):
    module = importlib.import_module(script)
    numbers = [name for name, kind in flag_types(script).items() if kind in (int, float)]
    monkeypatch.chdir(tmp_path)

    for name in numbers:
        for value in NONSENSE:
            args = module.Args(student="/nowhere", **{name: value})
            _, error = result_or_error_line(capsys, as_a_program, module, args)
            # The flag, what it was, and what it may be.
            assert f"--{name} {value} must be" in error
            assert re.search(r"at least \d|between \d", error), error

    assert len(numbers) > 15
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]


def wrong_words(name: str, kind) -> list[str]:
    """A flag with a value that its type does not allow, or nothing if it allows any text."""
    if kind in (int, float):
        return [f"--{name}", "many"]
    if typing.get_origin(kind) is typing.Literal:
        return [f"--{name}", "no-such-choice"]
    if isinstance(kind, types.UnionType):
        return [f"--{name}", "low", "high"]
    return []


@pytest.mark.parametrize("script", one_short(SCRIPTS, "dckd"))
def test_r47_flags_of_the_wrong_kind_and_unknown_flags_are_refused(script, capsys):
    module = importlib.import_module(script)
    kinds = flag_types(script)
    command_lines = [["--no_such_flag", "1"], ["surplus"]]
    for field in dataclasses.fields(module.Args):
        words = wrong_words(field.name, kinds[field.name])
        if words:
            command_lines.append(words)

    for words in command_lines:
        with pytest.raises(SystemExit) as stopped:
            parse_flags(module.Args, module.__doc__, words)
        assert stopped.value.code == 2, words
        assert "Traceback" not in capsys.readouterr().err, words
