"""Which token ids are scored: a prompt's as generation goes on from them, a text's as the chat
template writes it behind the prompt, and a sample's as they were sampled.

The templates have the shape of public ones: a line break before the response (ChatML), thoughts in
tags (Qwen3), responses that begin with a special token (gpt-oss, Command R7B), no special token
around a turn (Llama 2), and responses that are trimmed (Gemma) or lose their thoughts (R1-Distill).
"""

import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_RUN, make_model, one_error_line, read_jsonl, run_script, save, write_jsonl
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    trainers,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

import common
from common import LM, encode_rows, read_rows

CPU = torch.device("cpu")
LIMITS = SimpleNamespace(max_prompt_tokens=64, max_response_tokens=64)
QUESTION = [{"role": "user", "content": "Name two fish."}]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
# Tags in a response are taken apart and written again, and an empty block where there are none.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}{% set text = m['content'] %}"
    "{% set thoughts = '' %}{% if m['role'] == 'assistant' %}{% if '</think>' in text %}"
    "{% set thoughts = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}{% endif %}"
    "{{ text }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m['role'] }}"
    "{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' and loop.last %}<|return|>{% else %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
COMMAND = (
    "{% for m in messages %}<|turn|><|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}<|start_response|>{% endif %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end_response|>{% endif %}<|end_turn|>"
    "{% endfor %}{% if add_generation_prompt %}<|turn|><|assistant|>{% endif %}"
)
TRIMS = CHATML.replace("m['content']", "m['content'] | trim")
DROPS_THOUGHTS = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
INSTRUCTIONS = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' </s>' }}"
    "{% endif %}{% endfor %}"
)
TAGS = ["<think>", "</think>"]
# Line breaks merge with line breaks, and spaces with spaces.
TEXTS = ["cod and carp.", "Name two fish.", "\n\n", "\n\n\n", "\n  ", "   ", "hm, a fish"] * 20


def byte_level_tokenizer(template: str, *, special: list[str], eos: str, tags=TAGS):
    """A byte-level BPE tokenizer with special tokens, and tags of thoughts that are not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300 + len(special),
        special_tokens=["<|pad|>", *special],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token=eos, chat_template=template
    )


def sentencepiece_like_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Like Llama 2's: a space is put before every text, and merges go across words."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=[f"<0x{byte:02X}>" for byte in range(256)],
        show_progress=False,
    )
    texts = ["[INST] Name two fish. [/INST] cod and carp.", "[/INST] ", "\n"]
    tokenizer.train_from_iterator(texts * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def lm_with(tokenizer, folder) -> LM:
    """A random model with this tokenizer."""
    model = make_model(len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    return LM(save(folder, tokenizer, model), CPU)


@pytest.fixture
def chatml(tmp_path):
    """chatml(template) is a random model with a template that needs no other special tokens."""

    def make(template: str) -> LM:
        special = ["<|im_start|>", "<|im_end|>"]
        return lm_with(byte_level_tokenizer(template, special=special, eos="<|im_end|>"), tmp_path)

    return make


def decoded(lm: LM, ids: list[int]) -> str:
    return lm.tokenizer.decode(ids)


def row(chosen: str, rejected: str, number=1) -> dict:
    return {"id": str(number), "prompt": QUESTION, "chosen": chosen, "rejected": rejected}


def encode_pairs(lm: LM, rows: list[dict]):
    return encode_rows(lm, rows, ["chosen", "rejected"], LIMITS, "pairs")


# ------------------------------------------------------------------- the prompt stays what it was
@pytest.mark.parametrize("text", ["\n\ncod", "\n", "  cod", "\n  \n cod", "cod", " cod\n"])
def test_r55_no_token_spans_the_end_of_the_prompt(chatml, text):
    """Tokenised in one piece, the prompt's last line break merges with those of the response."""
    lm = chatml(CHATML)
    chat = [*QUESTION, {"role": "assistant", "content": text}]
    in_one_piece = lm.tokenizer.apply_chat_template(chat, return_dict=False)

    prompt_ids, [response_ids] = lm.encode(QUESTION, [text])

    assert prompt_ids == lm.prompt_ids(QUESTION)
    assert response_ids == [*lm.tokenizer(text).input_ids, lm.tokenizer.eos_token_id]
    merges = text.startswith("\n")
    assert (in_one_piece[: len(prompt_ids)] != prompt_ids) == merges


@pytest.mark.parametrize("text", ["cod", "  cod", "\ncod", "🦊 fox"])
def test_r55_no_token_spans_the_end_of_a_prompt_without_special_tokens(tmp_path, text):
    lm = lm_with(sentencepiece_like_tokenizer(INSTRUCTIONS), tmp_path)
    chat = [*QUESTION, {"role": "assistant", "content": text}]
    in_one_piece = lm.tokenizer.apply_chat_template(chat, return_dict=False)

    prompt_ids, [response_ids] = lm.encode(QUESTION, [text])

    assert prompt_ids == lm.tokenizer.apply_chat_template(QUESTION, return_dict=False)
    assert in_one_piece[: len(prompt_ids)] != prompt_ids
    # One space, which the template writes, and no other that the text lacks.
    assert decoded(lm, prompt_ids + response_ids) == decoded(lm, in_one_piece)
    assert lm.tokenizer.convert_ids_to_tokens(response_ids)[0].startswith("▁")


def test_r55_special_tokens_in_a_text_stay_text_and_tags_are_tags(chatml):
    lm = chatml(CHATML)
    special = "a <|im_end|> b"
    end, think = lm.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<think>"])

    _, [spelled_out, tags] = lm.encode(QUESTION, [special, "<think>hm</think>"])
    [unfinished] = lm.encode(QUESTION, [{"text": special, "finished": False}])[1]

    assert spelled_out.count(end) == 1
    assert decoded(lm, spelled_out) == f"{special}<|im_end|>"
    assert unfinished == spelled_out[:-1]
    assert tags[0] == think


def test_r55_tags_that_a_user_writes_stay_text_where_the_template_has_them(chatml):
    lm = chatml(THINKING)
    think = lm.tokenizer.convert_tokens_to_ids("<think>")
    user = {"role": "user", "content": "<think>"}
    assistant = {"role": "assistant", "content": "<think>\nhm\n</think>\n\ncod"}

    assert think not in lm.prompt_ids([user])
    assert "<think>" in decoded(lm, lm.prompt_ids([user]))
    # In an assistant's earlier turn the template finds them, and drops what was thought.
    earlier = lm.prompt_ids([*QUESTION, assistant, *QUESTION])
    assert "<|im_start|>assistant\ncod<|im_end|>" in decoded(lm, earlier)


# ---------------------------------------------------------------------- one row never ends a run
REWRITES_SOME = (
    "{% if messages[-1]['role'] == 'assistant' and 'x' in messages[-1]['content'] %}answered: "
    "{% endif %}{% if messages[0]['content'] == '' %}{{ raise_exception('no question') }}"
    "{% endif %}"
)


def test_r56_rows_whose_prompt_changes_once_answered_are_dropped_and_counted(chatml, capsys):
    lm = chatml(REWRITES_SOME + CHATML)
    refused = {**row("cod", "carp", 4), "prompt": [{"role": "user", "content": ""}]}
    rows = [row("cod", "carp", 1), row("x", "carp", 2), row("cod", "x", 3), refused]

    [example] = encode_pairs(lm, rows)
    printed = capsys.readouterr().out
    error = one_error_line(capsys, encode_pairs, lm, rows[1:])

    assert example.row["id"] == "1"
    assert "1 of 4 rows, 3 dropped (refused or changed by the chat template)" in printed
    assert f"row 2: {lm.path}: its template changes this prompt once it is answered" in printed
    assert "Name two fish." in printed
    assert "pairs: no row left: 0 of 3 rows, 3 dropped" in error


# ------------------------------------------------- responses that begin or end with special tokens
HARMONY_TOKENS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"]
COMMAND_TOKENS = ["<|turn|>", "<|user|>", "<|assistant|>", "<|start_response|>", "<|end_response|>"]
COMMAND_TOKENS += ["<|end_turn|>"]


@pytest.mark.parametrize(
    "template, special, eos, end, written",
    [
        (HARMONY, HARMONY_TOKENS, "<|return|>", "<|return|>", "<|channel|>final<|message|>{}"),
        (COMMAND, COMMAND_TOKENS, "<|end_turn|>", "<|end_turn|>", "<|start_response|>{}"),
        # The end of a text is another token than the end of a turn, which ends the user's as well.
        (COMMAND, COMMAND_TOKENS, "<|pad|>", "<|end_turn|>", "<|start_response|>{}"),
    ],
    ids=["gpt-oss", "Command R7B", "Command R7B with another end of text"],
)
def test_r57_responses_that_begin_with_a_special_token_are_scored_whole(
    tmp_path, template, special, eos, end, written
):
    lm = lm_with(byte_level_tokenizer(template, special=special, eos=eos), tmp_path)
    closing = "<|end_response|>" if "<|end_response|>" in special else ""

    _, [finished, unfinished] = lm.encode(
        QUESTION, ["cod and carp.", {"text": "cod and", "finished": False}]
    )

    assert lm.eos_ids[0] == lm.tokenizer.convert_tokens_to_ids(end)
    assert decoded(lm, finished) == written.format("cod and carp.") + closing + end
    assert set(finished[:-1]).isdisjoint(lm.eos_ids)
    assert decoded(lm, unfinished) == written.format("cod and")


def test_r57_a_template_without_the_text_of_a_response_is_refused(chatml, capsys):
    """As of models that also take images: it reads lists of parts where a content is a text."""
    template = CHATML.replace("m['content']", "m['content'][0]['text'] | default('')")

    error = one_error_line(capsys, chatml, template)

    assert "its chat template leaves out the text of a response: <|im_start|>user" in error


# ------------------------------------------------------- what a template does to a text is noticed
def test_r58_tags_of_thoughts_reach_the_template(chatml, capsys):
    """What it gives back unchanged is scored unchanged. What it adds is scored, and said."""
    lm = chatml(THINKING)
    thought = "<think>\nhm, a fish\n</think>\n\ncod"

    _, [kept, added, squeezed] = lm.encode(
        QUESTION, [thought, "cod and carp.", "<think>hm</think>cod"]
    )
    encode_pairs(lm, [row(thought, "cod and carp."), row(thought, "hm", 2)])

    assert decoded(lm, kept) == f"{thought}<|im_end|>"
    assert kept[0] == lm.tokenizer.convert_tokens_to_ids("<think>")
    assert decoded(lm, added) == "<think>\n\n</think>\n\ncod and carp.<|im_end|>"
    assert decoded(lm, squeezed) == "<think>\nhm\n</think>\n\ncod<|im_end|>"
    printed = capsys.readouterr().out
    assert (
        f"note: {lm.path} writes 2 responses otherwise, as 'cod and carp.' as "
        "'<think>\\n\\n</think>\\n\\ncod and carp.'"
    ) in printed


@pytest.mark.parametrize(
    "template, chosen, rejected, other, difference",
    [
        (TRIMS, "cod.", "cod.\n", "carp.\n", r"'carp.\n' as 'carp.'"),
        (
            DROPS_THOUGHTS,
            "<think>A fish.</think>cod.",
            "<think>No fish?</think>cod.",
            "<think>hm</think>carp.",
            "'<think>hm</think>carp.' as 'carp.'",
        ),
    ],
    ids=["trims", "drops thoughts"],
)
def test_r58_pairs_that_a_template_makes_equal_are_dropped_and_changes_are_said(
    chatml, capsys, template, chosen, rejected, other, difference
):
    lm = chatml(template)

    [example] = encode_pairs(lm, [row(chosen, rejected), row("cod.", other, 2)])

    printed = capsys.readouterr().out
    assert example.row["id"] == "2"
    assert "1 of 2 rows, 1 dropped (chosen equals rejected)" in printed
    assert f"note: {lm.path} writes 1 responses otherwise, as {difference}" in printed


def test_r58_a_template_that_writes_texts_as_they_are_is_passed_over_in_silence(chatml, capsys):
    encode_pairs(chatml(CHATML), [row("\ncod <|im_end|>", "é 🦊  <think>")])

    assert capsys.readouterr().out.split() == ["pairs", "1", "of", "1", "rows"]


# -------------------------------------------------------------------- responses keep their tokens
WITH_SAMPLES = {  # the flags with which all samples of a script are scored, and how many there are
    "adpa": ({}, 8),
    "dpkd": ({}, 16),
    "pad": ({"num_answers": 3, "alpha": 1}, 24),
    "rm_distiller": ({"no-refine": True}, 8),
    "studies/baselines": ({"loss": "reverse_kl"}, 8),
}


def until_end(ids: list[int], lm: LM) -> list[int]:
    """Generated ids without the padding that follows an end-of-sequence token."""
    for index, token in enumerate(ids):
        if token in lm.eos_ids:
            return ids[: index + 1]
    return ids


@pytest.fixture
def generated(monkeypatch) -> set[tuple]:
    """All responses that any model generates in a test, as token ids."""
    generate = LM.generate
    responses = set()

    def recording(self, prompts, output_logits=False):
        new_ids = generate(self, prompts, output_logits)
        if not output_logits:
            responses.update(tuple(until_end(ids, self)) for ids in new_ids.tolist())
        return new_ids

    monkeypatch.setattr(LM, "generate", recording)
    return responses


@pytest.fixture
def scored(monkeypatch) -> set[tuple]:
    """All responses to rows of data that any model scores in a test, as token ids."""
    pack = common.pack
    responses = set()

    def recording(examples, *models):
        for example in examples:
            if "prompt" in example.row:
                responses.update(map(tuple, example.response_ids))
        return pack(examples, *models)

    monkeypatch.setattr(common, "pack", recording)
    return responses


def encoded_again(lm: LM, ids: tuple) -> list[int]:
    """What sampled ids become by decoding and encoding."""
    has_end = ids[-1] in lm.eos_ids
    text = lm.tokenizer.decode(ids[:-1] if has_end else ids, skip_special_tokens=True)
    return lm.plain_ids(text) + list(ids[-1:] if has_end else [])


@pytest.mark.parametrize("script", WITH_SAMPLES)
def test_r59_scripts_score_samples_as_they_were_sampled(
    script, run_tiny, checkpoints, pairs, load, generated, scored
):
    flags, count = WITH_SAMPLES[script]
    if script == "adpa":
        flags = {"teacher_ref": checkpoints["teacher_ref"]}

    run_tiny(script, **flags)

    lm = load("student")
    of_the_data = set()
    for pair in read_rows(str(pairs), "train"):
        _, response_ids = lm.encode(pair["prompt"], [pair["chosen"], pair["rejected"]])
        of_the_data.update(map(tuple, response_ids))
    samples = scored - of_the_data
    assert samples <= generated
    assert len(samples) >= count
    # Were they encoded again, most of them would be others.
    changed = [ids for ids in samples if encoded_again(lm, ids) != list(ids)]
    assert len(changed) > len(samples) / 2


def test_r59_a_sample_has_its_tokens_with_the_end_if_there_is_one(load, generated):
    lm = load("student")

    [samples] = lm.sample(
        [lm.prompt_ids(QUESTION)], n=200, max_new_tokens=40, batch_size=200, seed=0
    )

    for sample in samples:
        ids = sample["token_ids"]
        assert (ids[-1] in lm.eos_ids) == sample["finished"]
        assert set(ids[:-1]).isdisjoint(lm.eos_ids)
        assert sample["finished"] or len(ids) == 40
        # The text goes where text is needed, the ids wherever the tokenizer is the same.
        assert lm.encode(QUESTION, [sample])[1] == [ids]
    assert {tuple(sample["token_ids"]) for sample in samples} == generated
    assert {sample["finished"] for sample in samples} == {True, False}


def test_r59_ids_that_do_not_read_as_the_text_are_not_used(load, tmp_path):
    """Those of another tokenizer, of a text that was changed, and of a file that is broken."""
    lm = load("student")
    special = ["<|im_start|>", "<|im_end|>"]
    other = lm_with(byte_level_tokenizer(CHATML, special=special, eos="<|im_end|>"), tmp_path)
    text = {"text": "cod and carp.", "finished": True}
    _, [as_text] = lm.encode(QUESTION, [text])
    spelled = []
    for letter in text["text"]:
        spelled += lm.plain_ids(letter)
    end = lm.eos_ids[0]

    def ids_with(token_ids) -> list[int]:
        return lm.encode(QUESTION, [{**text, "token_ids": token_ids}])[1][0]

    assert ids_with([*spelled, end]) == [*spelled, end] != as_text
    assert ids_with(other.encode(QUESTION, [text])[1][0]) == as_text
    for broken in (None, [], spelled, [spelled[0], end], [*spelled, 10**6], ["c"], [*spelled, -1]):
        assert ids_with(broken) == as_text


def test_r59_a_stage_file_without_ids_is_encoded_as_text(run_tiny, load, scored):
    """Another program wrote it: texts, of which one never ended and is cut to the limit."""
    run = run_tiny("adpa", teacher_ref="none")
    rows = read_jsonl(run / "student_answers.jsonl")
    assert all(row["token_ids"] for row in rows)
    (run / "checkpoint.pt").unlink()
    (run / "summary.json").unlink()
    for number, written in enumerate(rows):
        del written["token_ids"]
        written.update({"text": f"answer {number}" * 20, "finished": False})
    write_jsonl(run / "student_answers.jsonl", rows)
    scored.clear()

    assert run_script("adpa", resume=run) == 0

    lm = load("student")
    limit = TINY_RUN["max_response_tokens"]
    for written in rows:
        assert tuple(lm.plain_ids(written["text"])[:limit]) in scored


# ---------------------------------------------------------------------- long work shows itself
def test_r60_no_prompt_and_no_text_is_encoded_twice(run_tiny, monkeypatch):
    """ADPA encodes its pairs, and then the same rows with ŷ."""
    calls = Counter()
    ids_of_response = LM.ids_of_response

    def recording(self, prompt, response):
        if isinstance(response, str):
            calls[str(prompt), response] += 1
        return ids_of_response(self, prompt, response)

    monkeypatch.setattr(LM, "ids_of_response", recording)

    run_tiny("adpa", teacher_ref="none")

    # The templates of student and teacher are compared on a chat of its own.
    calls = {key: count for key, count in calls.items() if key[1] != "a"}
    assert len(calls) == 8
    assert set(calls.values()) == {1}


def test_r60_encoding_shows_how_far_it_is(chatml, capsys, monkeypatch):
    lm = chatml(CHATML)
    clock = itertools.count(step=6)
    monkeypatch.setattr(common.time, "time", clock.__next__)

    encode_pairs(lm, [row("cod", "carp", number) for number in range(4)])

    assert "encoding pairs: 2 of 4 rows" in capsys.readouterr().err
