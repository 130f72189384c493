"""Rows as they come: kinds of files, forms of rows, splits and configs, and what is refused."""

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import TINY_RUN, one_error_line, one_short, read_jsonl, run_script, write_jsonl

from common import read_rows


def turn(role: str, content: str) -> dict:
    """A chat message."""
    return {"role": role, "content": content}


def said(row: dict) -> tuple:
    """What a row says, whatever its form: who said what, the better and the worse response."""
    prompt = tuple((message["role"], message["content"]) for message in row["prompt"])
    return prompt, row["chosen"], row["rejected"]


# ----------------------------------------------------------------------------------- forms of a row
PLAIN = {"prompt": "p", "chosen": "good", "rejected": "bad"}
CONVERSATIONS = {
    "chosen": [turn("user", "p"), turn("assistant", "good")],
    "rejected": [turn("user", "p"), turn("assistant", "bad")],
}
LAST_TURNS = {"chosen": [turn("assistant", "good")], "rejected": [turn("assistant", "bad")]}
FORMS = {
    "text": PLAIN,
    "messages as prompt": {**PLAIN, "prompt": [turn("user", "p")]},
    "responses as messages": {**PLAIN, **LAST_TURNS},
    "prompt and conversations": {**PLAIN, **CONVERSATIONS},
    "implicit prompt": CONVERSATIONS,
}


def write_rows(path: Path, rows: list[dict]) -> str:
    """Writes rows as the kind of file that the suffix names."""
    if path.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    return str(path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_all_forms_of_a_row_read_the_same(tmp_path, form, suffix):
    path = write_rows(tmp_path / f"rows{suffix}", [FORMS[form]])

    [row] = read_rows(path, "train")

    assert row["prompt"] == [turn("user", "p")]
    assert row["chosen"] == "good"
    assert row["rejected"] == "bad"
    assert row["id"].startswith("1-")


def test_text_that_looks_like_a_date_stays_text(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{**PLAIN, "prompt": "2021-01-01"}])

    [row] = read_rows(path, "train")

    assert row["prompt"][0]["content"] == "2021-01-01"


@pytest.mark.parametrize(
    "good, bad",
    [("Yes, it is.", "Yes"), ("Yes", "Yes, it is."), ("No", "Yes"), ("Y", "N")],
    ids=["rejected is a prefix", "chosen is a prefix", "differ at once", "one character"],
)
def test_r15_implicit_prompts_end_where_the_last_turn_begins(tmp_path, good, bad):
    shared = [turn("user", "Is it?"), turn("assistant", "Maybe."), turn("user", "Well?")]
    conversations = {
        "chosen": [*shared, turn("assistant", good)],
        "rejected": [*shared, turn("assistant", bad)],
    }
    path = write_rows(tmp_path / "rows.jsonl", [conversations])

    [row] = read_rows(path, "train")

    assert row["prompt"] == shared
    assert row["chosen"] == good
    assert row["rejected"] == bad


GOOD_LINE = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
OTHER_CONTEXT = {**CONVERSATIONS, "rejected": [turn("user", "q"), turn("assistant", "c")]}
BAD_FILES = {  # the bytes of a file, and what the error must name
    "broken line": (GOOD_LINE + b'{"prompt": "a", "cho', "line 2"),
    "not UTF-8": (GOOD_LINE + b'{"prompt": "\xff"}', "line 2"),
    "nested without end": (GOOD_LINE + b'{"a":' * 100_000, "line 2"),
    "half a character": (GOOD_LINE + GOOD_LINE.replace(b'"c"', b'"\\ud83e"'), "row 2"),
    "missing column": (b'{"prompt": "a", "chosen": "b"}', "row 1"),
    "number as prompt": (b'{"prompt": 3, "chosen": "b", "rejected": "c"}', "row 1"),
    "null as response": (b'{"prompt": "a", "chosen": null, "rejected": "c"}', "row 1"),
    "no prompt": (b'{"chosen": "b", "rejected": "c"}', "row 1"),
    "different contexts": (json.dumps(OTHER_CONTEXT).encode(), "row 1"),
    "not an object": (b"[1, 2]", "row 1"),
    "a bare number": (b"17", "row 1"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_r46_bad_files_are_one_line_with_the_place(tmp_path, capsys, case):
    content, place = BAD_FILES[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)

    error = one_error_line(capsys, read_rows, str(path), "train")

    assert f"{path}, {place}:" in error


@pytest.mark.parametrize(
    "source",
    ["/no/file.jsonl", "/no/file.csv.gz", "/no/file.parquet", "no-such/hub-id", "/no/folder"],
)
def test_r46_missing_data_is_one_line(source, capsys):
    error = one_error_line(capsys, read_rows, source, "train")

    assert source in error
    is_file = "." in source
    assert (f"cannot read {source}: there is no such file" in error) == is_file
    assert (f"{source} is no file or folder, and cannot be read from the hub" in error) != is_file


# ------------------------------------------------------------- which forms serve which need
QUESTION = [turn("system", "Be brief."), turn("user", "Name a fish.")]
GOOD = turn("assistant", "cod.")
BAD = turn("assistant", "whale.")
FROM_VALUE = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Name a fish."}]
GPT = {"from": "gpt", "value": "cod."}
CLAUDE = {"from": "gpt", "value": "whale."}
SAME_PROMPT = {  # the prompt is QUESTION in all of them, the responses are "cod." and "whale."
    "prompt and texts": {"prompt": QUESTION, "chosen": "cod.", "rejected": "whale."},
    "prompt and messages": {"prompt": QUESTION, "chosen": [GOOD], "rejected": [BAD]},
    "prompt and one message": {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    "prompt and conversations": {
        "prompt": QUESTION,
        "chosen": [*QUESTION, GOOD],
        "rejected": [*QUESTION, BAD],
    },
    "conversations": {"chosen": [*QUESTION, GOOD], "rejected": [*QUESTION, BAD]},
    "a conversation and a text": {"chosen": [*QUESTION, GOOD], "rejected": "whale."},
    "no prompt but null": {
        "prompt": None,
        "chosen": [*QUESTION, GOOD],
        "rejected": [*QUESTION, BAD],
    },
    "from and value": {"chosen": [*FROM_VALUE, GPT], "rejected": [*FROM_VALUE, CLAUDE]},
    "conversations and one message": {
        "conversations": FROM_VALUE,
        "chosen": GPT,
        "rejected": CLAUDE,
    },
    "messages and texts": {"messages": QUESTION, "chosen": "cod.", "rejected": "whale."},
}
ONLY_CHOSEN = {
    "conversation": {"chosen": [*QUESTION, GOOD]},
    "other responses are not read": {"chosen": [*QUESTION, GOOD], "rejected": [turn("user", "?")]},
    "prompt and text": {"prompt": QUESTION, "chosen": "cod.", "rejected": None},
}
ONLY_PROMPT = {
    "prompt": {"prompt": QUESTION},
    "messages": {"messages": [*QUESTION, GOOD]},
    "messages without a response": {"messages": QUESTION},
    "conversations": {"conversations": [*FROM_VALUE, GPT]},
    "chosen": {"chosen": [*QUESTION, GOOD]},
    "prompt counts before messages": {"prompt": QUESTION, "messages": [turn("user", "?"), GOOD]},
}


@pytest.mark.parametrize("form", SAME_PROMPT)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_r62_pairs_in_every_form(tmp_path, suffix, form):
    path = write_rows(tmp_path / f"rows{suffix}", [SAME_PROMPT[form]])

    [row] = read_rows(path, "train")

    assert row["prompt"] == QUESTION
    assert (row["chosen"], row["rejected"]) == ("cod.", "whale.")


@pytest.mark.parametrize("form", ONLY_CHOSEN)
def test_r62_chosen_responses_alone(tmp_path, form):
    path = write_rows(tmp_path / "rows.jsonl", [ONLY_CHOSEN[form]])

    [row] = read_rows(path, "train", ["chosen"])

    assert (row["prompt"], row["chosen"]) == (QUESTION, "cod.")


@pytest.mark.parametrize("form", [*ONLY_PROMPT, *ONLY_CHOSEN, *SAME_PROMPT])
def test_r62_prompts_alone(tmp_path, form):
    record = {**SAME_PROMPT, **ONLY_CHOSEN, **ONLY_PROMPT}[form]
    path = write_rows(tmp_path / "rows.jsonl", [record])

    [row] = read_rows(path, "train", ())

    assert row["prompt"] == QUESTION


@pytest.mark.parametrize("columns", [(), ["chosen"], ["chosen", "rejected"]], ids=len)
def test_r62_a_missing_column_is_named_with_what_is_needed_and_found(tmp_path, capsys, columns):
    row = {"question": "a", "chosen": None, "score": 3}
    if columns:
        row["prompt"] = "a"
    path = write_rows(tmp_path / "rows.jsonl", [row])

    error = one_error_line(capsys, read_rows, path, "train", columns)

    assert f"{path}, row 1: the columns {', '.join(['prompt', *columns])} are needed" in error
    assert f"found {', '.join(name for name in row if name != 'chosen')}:" in error


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_r66_rows_without_a_value_are_left_out_and_counted(tmp_path, capsys, suffix):
    """A row that lacks the column is one that has null there, as in parquet."""
    rows = [{**PLAIN, "n": 0}, {**PLAIN, "rejected": None}, {"prompt": "p", "chosen": "good"}]
    path = write_rows(tmp_path / f"rows{suffix}", [*rows, {**PLAIN, "n": 3}])

    read = read_rows(path, "train")

    assert [row["n"] for row in read] == [0, 3]
    assert [row["id"][:2] for row in read] == ["1-", "4-"]
    printed = capsys.readouterr().out
    assert printed.startswith(f"note: left out 2 of 4 rows, as {path}, row 2: the columns prompt, ")
    assert len(read_rows(path, "train", ["chosen"])) == 4
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("quote", ["'", '"'])
def test_r66_a_conversation_that_was_written_as_a_text_is_no_response(tmp_path, capsys, quote):
    """As pandas writes it to a .csv file."""
    bad = {}
    for column, conversation in CONVERSATIONS.items():
        bad[column] = json.dumps(conversation).replace('"', quote)
    alone = write_rows(tmp_path / "alone.jsonl", [bad])
    with_prompt = write_rows(tmp_path / "with_prompt.jsonl", [{**PLAIN, **bad}])
    among = write_rows(tmp_path / "among.jsonl", [bad, PLAIN])

    errors = [one_error_line(capsys, read_rows, path, "train") for path in (alone, with_prompt)]
    [row] = read_rows(among, "train")

    for error in errors:
        assert "row 1: chosen is a conversation that was written as a text" in error
    assert row["chosen"] == "good"
    assert "left out 1 of 2 rows" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "folder/train.jsonl"])
def test_r46_files_without_rows_are_named_before_models_load(tmp_path, capsys, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text({".json": "[]", ".csv": "prompt,chosen,rejected\n"}.get(path.suffix, ""))
    source = str(path.parent if name.startswith("folder") else path)

    error = one_error_line(capsys, read_rows, source, "train")

    assert f"there are no rows in {source} (split train)" in error


def test_r62_a_final_turn_may_answer_a_tool(tmp_path):
    call = {"function": {"name": "look"}}
    prompt = [
        turn("user", "Look."),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "a fish", "name": "look"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [*prompt, GOOD]}])

    [row] = read_rows(path, "train", ())

    assert row["prompt"] == prompt


# --------------------------------------------- conversations that are not a prompt and one response
MORE = [turn("user", "Name a planet."), turn("assistant", "Mars.")]
REFUSED = {  # the columns of a row, and what the error says
    "turns behind a first prompt": (
        {"prompt": "Name a fish.", "chosen": [turn("user", "Name a fish."), GOOD, *MORE]},
        "the turns before the response in chosen are not the prompt",
    ),
    "a system turn that the prompt lacks": (
        {"prompt": "Name a fish.", "chosen": [*QUESTION, GOOD]},
        "the turns before the response in chosen are not the prompt",
    ),
    "several turns behind the prompt": (
        {"prompt": QUESTION, "chosen": [GOOD, *MORE]},
        "the turns before the response in chosen are not the prompt",
    ),
    "pairs of different prompts": (
        {"chosen": [*QUESTION, GOOD], "rejected": [turn("user", "?"), BAD]},
        "the turns before the response in rejected are not the prompt",
    ),
    "the user has the last turn": (
        {"chosen": [*QUESTION, GOOD, turn("user", "thanks")]},
        "the last turn of chosen is the user's",
    ),
    "the user has the last turn of rejected": (
        {"prompt": QUESTION, "chosen": "cod.", "rejected": [*QUESTION, BAD, turn("user", "no")]},
        "the last turn of rejected is the user's",
    ),
    "a prompt that begins the response": (
        {"prompt": [*QUESTION, turn("assistant", "The fish is")], "chosen": " cod."},
        "the prompt ends with a turn of the assistant",
    ),
    "a response of two turns": (
        {"chosen": [*QUESTION, turn("assistant", "Well,"), GOOD]},
        "the prompt ends with a turn of the assistant",
    ),
    "a prompt of a system turn": (
        {"prompt": QUESTION[:1], "chosen": "cod."},
        "the prompt ends with a turn of the system",
    ),
    "a call of a tool as response": (
        {"prompt": QUESTION, "chosen": [{**GOOD, "tool_calls": [{"function": {"name": "look"}}]}]},
        "the response in chosen is more than a text, it has tool_calls",
    ),
    "thoughts besides the response": (
        {"prompt": QUESTION, "chosen": [{**GOOD, "reasoning_content": "Hm."}]},
        "the response in chosen is more than a text, it has reasoning_content",
    ),
    "content in parts": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "?"}]}], "chosen": "a"},
        "a message of prompt has no role and content as text",
    ),
    "a message that is a text": (
        {"prompt": ["Name a fish."], "chosen": "a"},
        "a message of prompt has no role and content as text",
    ),
    "no turn at all": (
        {"prompt": [], "chosen": "a"},
        "prompt is neither a text nor a conversation",
    ),
    "a number": ({"prompt": "a", "chosen": 7}, "chosen is neither a text nor a conversation"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_r63_what_is_not_a_prompt_and_one_response_is_refused_with_its_row(tmp_path, capsys, case):
    record, reason = REFUSED[case]
    path = write_rows(tmp_path / "rows.jsonl", [PLAIN, {"rejected": "whale.", **record}])

    error = one_error_line(capsys, read_rows, path, "train")

    assert f"{path}, row 2: {reason}" in error


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": [*QUESTION, GOOD, turn("user", "thanks")]},
        {"messages": [*QUESTION, turn("assistant", "Well,"), GOOD]},
        {"messages": [GOOD]},
        {"conversations": [*FROM_VALUE, GPT, {**GPT, "from": "observation"}]},
    ],
    ids=["chosen", "two responses", "no prompt", "another role"],
)
def test_r63_prompts_alone_are_refused_as_well(tmp_path, capsys, record):
    path = write_rows(tmp_path / "rows.jsonl", [record])

    assert f"{path}, row 1: the" in one_error_line(capsys, read_rows, path, "train", ())


# --------------------------------------------------------------------------------- kinds of files
LINES = [
    {"prompt": "Name a fish.", "chosen": "cod, or\ncarp 🐟.", "rejected": 'a "whale".'},
    {"prompt": "2021-01-01", "chosen": "2021-01-02T00:00:00", "rejected": "007"},
]
WINDOWS = b"\xef\xbb\xbf"


def zstd(data: bytes) -> bytes:
    """Data as the program `zstd` writes it."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def as_jsonl() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in LINES).encode()


def as_csv(newline="\r\n", delimiter=",") -> bytes:
    """LINES as Python's own module writes them, with a column that is empty."""
    path = Path("lines.csv")
    with path.open("w", newline="", encoding="utf-8") as file:
        columns = [*LINES[0], "note"]
        writer = csv.DictWriter(file, columns, lineterminator=newline, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(LINES)
    return path.read_bytes()


def as_parquet() -> bytes:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(LINES), "lines.parquet")
    return Path("lines.parquet").read_bytes()


FILES = {
    "plain.jsonl": as_jsonl,
    "list.json": lambda: json.dumps(LINES, indent=1).encode(),
    "lines.json": as_jsonl,
    "mark.jsonl": lambda: WINDOWS + as_jsonl(),
    "mark.json": lambda: WINDOWS + json.dumps(LINES).encode(),
    "carriage.jsonl": lambda: WINDOWS + as_jsonl().replace(b"\n", b"\r\n\r\n"),
    "LOUD.JSONL": as_jsonl,
    "Loud.Json.GZ": lambda: gzip.compress(as_jsonl()),
    "packed.jsonl.gz": lambda: gzip.compress(as_jsonl()),
    "packed twice.jsonl.gz": lambda: b"".join(map(gzip.compress, as_jsonl().splitlines(True))),
    "packed.jsonl.bz2": lambda: bz2.compress(as_jsonl()),
    "packed.jsonl.xz": lambda: lzma.compress(as_jsonl()),
    "packed.jsonl.zst": lambda: zstd(as_jsonl()),
    "packed.json.zst": lambda: zstd(WINDOWS + json.dumps(LINES).encode()),
    "plain.csv": as_csv,
    "unix.CSV": lambda: as_csv("\n"),
    "mark.csv": lambda: WINDOWS + as_csv(),
    "semicolons.csv": lambda: as_csv(delimiter=";"),
    "tabs.csv": lambda: WINDOWS + as_csv(delimiter="\t"),
    "packed.csv.gz": lambda: gzip.compress(as_csv()),
    "plain.parquet": as_parquet,
    "LOUD.PARQUET": as_parquet,
    "odd [1] *?ü.jsonl": as_jsonl,
    "odd [1] *?ü.parquet": as_parquet,
    "a.b.c.jsonl": as_jsonl,
}


def expected() -> list[tuple]:
    return [((("user", row["prompt"]),), row["chosen"], row["rejected"]) for row in LINES]


@pytest.mark.parametrize("name", FILES)
def test_r61_every_kind_of_file_reads_the_same(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(FILES[name]())

    assert [said(row) for row in read_rows(name, "train")] == expected()


FOLDERS = {  # files in a folder, each with the whole data
    "sets": ["train.jsonl", "test.jsonl"],
    "odd [1] *?ü": ["train.jsonl", "test.jsonl"],
    "loud": ["train.JSONL", "test.CSV"],
    "packed": ["data/train.jsonl.gz", "data/test.parquet"],
    "shards": ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"],
    "by folder": ["train/a.jsonl", "test/b.jsonl"],
    "with a page": ["train.jsonl", "test.jsonl", "README.md", "LICENSE"],
}


def content_of(name: str) -> bytes:
    if name.endswith("gz"):
        return gzip.compress(as_jsonl())
    if name.lower().endswith("csv"):
        return as_csv()
    if name.endswith("parquet"):
        return as_parquet()
    return as_jsonl()


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_r61_folders_read_the_same(tmp_path, monkeypatch, capsys, folder, split):
    monkeypatch.chdir(tmp_path)
    for name in FOLDERS[folder]:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content_of(name))

    assert [said(row) for row in read_rows(folder, split)] == expected()
    error = one_error_line(capsys, read_rows, folder, "validation")
    assert f"cannot read {folder}: it has no split validation, but train, test" in error


def test_r61_shards_are_read_in_order_and_a_bad_row_is_named_with_its_file(tmp_path, capsys):
    for number in range(3):
        write_jsonl(tmp_path / f"train-{number:05}-of-00003.jsonl", [{**PLAIN, "n": number}] * 2)

    rows = read_rows(str(tmp_path), "train")
    write_jsonl(tmp_path / "train-00001-of-00003.jsonl", [PLAIN, {**PLAIN, "prompt": 7}])
    error = one_error_line(capsys, read_rows, str(tmp_path), "train")

    assert [row["n"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert len({row["id"] for row in rows}) == 6
    assert f"{tmp_path}/train-00001-of-00003.jsonl, row 2: " in error


def test_r61_files_beside_the_data_are_left_out_and_named(tmp_path, capsys):
    for name in ("LICENSE", "notes.txt", "README.md"):
        (tmp_path / name).write_text("text")
    write_jsonl(tmp_path / "mine.jsonl", LINES)

    rows = read_rows(str(tmp_path), "train")
    printed = capsys.readouterr().out
    (tmp_path / "mine.jsonl").unlink()
    error = one_error_line(capsys, read_rows, str(tmp_path), "train")

    assert [said(row) for row in rows] == expected()
    assert printed == f"note: not read in {tmp_path}: LICENSE, notes.txt (2 of 3)\n"
    assert "what is needed is a file of the kinds" in error


BROKEN = {  # a file that exists, what is in it, and what is said of it
    "rows.txt": (b"a\nb\n", "what is needed is a file of the kinds .jsonl, .json, .csv, .parquet"),
    "rows.txt.gz": (gzip.compress(b"a\n"), "what is needed is a file of the kinds"),
    "rows": (b"{}", "what is needed is a file of the kinds"),
    "rows.jsonl.gz": (b"{}", "cannot read"),
    "cut.jsonl.gz": (gzip.compress(b"{}" * 999)[:-9], "cannot read"),
    "cut.jsonl.xz": (lzma.compress(b"{}" * 999)[:-9], "cannot read"),
    "cut.jsonl.bz2": (bz2.compress(b"{}" * 999)[:-9], "cannot read"),
    "rows.jsonl.zst": (b"{}", "cannot read"),
    "rows.parquet": (b"{}", "cannot read"),
    "long.csv": (b"prompt,chosen\na,b\nc,d,e\n", "line 3: it has more values than"),
    "open.csv": (b'prompt,chosen\na,b\n"c,d\n', "line 3: "),
    "latin.csv": ("prompt\ncafé\n".encode("latin-1"), "cannot read"),
    "bars.csv": (b"prompt|chosen\na|b\n", "are needed, found prompt|chosen: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_r61_a_file_that_exists_is_never_said_to_be_missing(tmp_path, capsys, name):
    content, reason = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)

    error = one_error_line(capsys, read_rows, str(path), "train")

    assert str(path) in error and reason in error
    assert "find" not in error and "No such" not in error


# ------------------------------------------------------------------------------ splits and configs
SPLITS = {  # a split of ten rows, and which of them it is
    "train": range(10),
    "anything": range(10),
    "train[:3]": range(3),
    "train[-2:]": range(8, 10),
    "train[20%:50%]": range(2, 5),
    "train[:2]+train[8:]": [0, 1, 8, 9],
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "folder/train.jsonl"])
def test_r64_slices_of_files_are_those_that_datasets_takes(tmp_path, split, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    write_rows(path, [{**PLAIN, "n": n} for n in range(10)])
    source = path
    if name.startswith("folder"):
        if split == "anything":
            return  # a folder has splits with names
        source = path.parent

    rows = read_rows(str(source), split)

    assert [row["n"] for row in rows] == list(SPLITS[split])
    if split != "anything":
        reference = datasets.Dataset.from_list([{"n": n} for n in range(10)])
        reference = datasets.DatasetDict({"train": reference})["train"]
        spec = datasets.ReadInstruction.from_spec(split).to_absolute({"train": 10})
        taken = []
        for part in spec:
            taken += reference.select(range(part.from_, part.to))["n"]
        assert [row["n"] for row in rows] == taken


@pytest.mark.parametrize("split", ["train[", "train[:x]", "train test", "train+", "train[:200%]"])
def test_r64_splits_that_cannot_be_read_are_one_line(tmp_path, capsys, split):
    path = write_rows(tmp_path / "rows.jsonl", [PLAIN])

    error = one_error_line(capsys, read_rows, path, split)

    assert f"cannot read the split {split} of {path}" in error


def test_r64_a_config_of_a_folder_and_none_of_a_file(tmp_path, capsys):
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", [{**PLAIN, "name": name}])
    page = ["---", "configs:"]
    for name in ("a", "b"):
        page += [f"- config_name: {name}", f"  data_files: {name}.jsonl"]
    (tmp_path / "README.md").write_text("\n".join([*page, "---", "text"]))

    [row] = read_rows(str(tmp_path), "train", config="b")
    no_config = one_error_line(capsys, read_rows, str(tmp_path), "train")
    wrong = one_error_line(capsys, read_rows, str(tmp_path), "train", config="c")
    of_file = one_error_line(capsys, read_rows, str(tmp_path / "a.jsonl"), "train", config="c")

    assert row["name"] == "b"
    assert "['a', 'b']" in no_config and "['a', 'b']" in wrong
    assert "is a file, which has no config c" in of_file


# ----------------------------------------------- what the hub has, and columns that nothing needs
@pytest.fixture
def hub(monkeypatch):
    """hub(dataset) makes load_dataset return it, and lists what load_dataset was asked."""
    asked = []

    def offer(dataset) -> list:
        def load_dataset(*arguments, **keywords):
            asked.append((arguments, keywords))
            return dataset

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return offer


NO_IMAGE = {"bytes": b"this is no image", "path": None}


def test_r65_images_and_sounds_are_never_decoded(tmp_path, hub):
    features = datasets.Features(
        {name: datasets.Value("string") for name in PLAIN}
        | {"image": datasets.Image(), "frames": datasets.List(datasets.Image())}
        | {"sound": datasets.Audio(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    record = {**PLAIN, "image": NO_IMAGE, "frames": [NO_IMAGE], "sound": NO_IMAGE, "label": 1}
    table = pyarrow.Table.from_pylist([record], schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    hub(datasets.Dataset(table))

    [of_hub] = read_rows("some/id", "train")
    [of_file] = read_rows(str(tmp_path / "rows.parquet"), "train")

    for row in (of_hub, of_file):
        assert said(row) == ((("user", "p"),), "good", "bad")
        assert row.keys() - {"record"} == {"id", "prompt", "chosen", "rejected", "label"}


def test_r64_a_hub_id_is_asked_for_its_config_and_split(hub):
    asked = hub(datasets.Dataset.from_list([PLAIN]))

    [row] = read_rows("some/id", "train_prefs[:90%]", config="english")
    read_rows("some/id", "test_sft")

    assert row["chosen"] == "good"
    assert asked == [
        (("some/id", "english"), {"split": "train_prefs[:90%]"}),
        (("some/id", None), {"split": "test_sft"}),
    ]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "folder/train.jsonl"])
def test_r65_texts_that_look_like_something_else_stay_texts(tmp_path, name):
    texts = ["2021-01-01", "2021-01-01T10:00:00Z", "1", "1.50", "true", "null", "NaN", "NA", " x "]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    rows = [{"prompt": text, "chosen": text + " a", "rejected": text + " b"} for text in texts]
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        write_rows(path, rows)
    source = path.parent if name.startswith("folder") else path

    read = read_rows(str(source), "train")

    assert [row["prompt"][0]["content"] for row in read] == texts
    assert [row["chosen"] for row in read] == [text + " a" for text in texts]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_r66_null_values_and_other_columns_do_no_harm(tmp_path, suffix):
    rows = [
        {"prompt": QUESTION, "chosen": "a", "rejected": "b", "score": None, "meta": {"k": 1}},
        {"prompt": MORE[:1], "chosen": "a", "rejected": "b", "score": 3.5, "meta": None},
    ]
    rows[0]["prompt"] = [{**message, "name": None} for message in QUESTION]
    rows[1]["prompt"] = [{**MORE[0], "name": "Ann"}]
    path = write_rows(tmp_path / f"rows{suffix}", rows)

    first, second = read_rows(path, "train")

    # A template asks whether a message has a name, and null would be one.
    assert first["prompt"] == QUESTION
    assert second["prompt"] == [{**MORE[0], "name": "Ann"}]
    assert (first["score"], second["score"]) == (None, 3.5)
    assert first["meta"] == {"k": 1}


# ---------------------------------------------------------------------------- what a script needs
NEEDS = {
    "adpa": ["chosen"],
    "dckd": ["chosen", "rejected"],
    "dpkd": [],
    "pad": [],
    "rm_distiller": ["chosen", "rejected"],
}


@pytest.mark.parametrize("script", one_short(["adpa", "dpkd", "pad"], "adpa"))
def test_r62_a_script_runs_on_the_columns_that_it_needs_alone(
    script, checkpoints, pairs, run_tiny, tmp_path
):
    """The rows of `pairs` without what the script does not use give the same training."""
    flags = {}
    if script == "adpa":
        flags["teacher_ref"] = checkpoints["teacher_ref"]
    if script == "pad":
        flags = {"num_answers": 2, "alpha": 1}
    rows = []
    for row in read_jsonl(pairs):
        prompt = row["prompt"]
        if isinstance(prompt, str):
            prompt = [turn("user", prompt)]
        conversation = [*prompt, turn("assistant", row["chosen"])]
        rows.append({"chosen" if script == "adpa" else "messages": conversation})
    path = write_jsonl(tmp_path / "rows.jsonl", rows)

    whole = run_tiny(script, **flags)
    part = run_tiny(script, **flags, data=path, eval_data=path)

    [expected_row] = [row for row in read_jsonl(whole / "metrics.jsonl") if row["step"] == 1]
    [row] = [row for row in read_jsonl(part / "metrics.jsonl") if row["step"] == 1]
    assert row["losses/total"] == expected_row["losses/total"]
    assert row["eval/reward"] == expected_row["eval/reward"]


@pytest.mark.parametrize("script", NEEDS)
def test_r66_a_script_refuses_what_lacks_a_column_that_it_needs(
    script, checkpoints, tmp_path, capsys
):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}])
    flags = {name: checkpoints[name] for name in ("student", "teacher")}
    if script == "adpa":
        flags["teacher_ref"] = checkpoints["teacher_ref"]

    assert run_script(script, **flags, **TINY_RUN, data=path, output_dir=tmp_path / "run") == 2

    error = capsys.readouterr().err.splitlines()[-1]
    needed = ", ".join(["prompt", *NEEDS[script]])
    assert error.startswith(f"error: {path}, row 1: the columns {needed} are needed, found")
    assert not (tmp_path / "run").exists()
