"""Which token ids are scored: a prompt's as generation goes on from them, a text's as the chat
template writes it behind the prompt, and a sample's as they were sampled.

The templates have the shape of public ones: a line break before the response (ChatML), thoughts in
tags (Qwen3), responses that begin with a special token (gpt-oss, Command R7B), no special token
around a turn (Llama 2), and responses that are trimmed (Gemma) or lose their thoughts (R1-Distill).
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, one_error_line, save
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

from common import LM, encode_rows

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
    assert "pairs: 1 of 4 rows, 3 dropped (refused or changed by the chat template)" in printed
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
    assert "pairs: 1 of 2 rows, 1 dropped (chosen equals rejected)" in printed
    assert f"note: {lm.path} writes 1 responses otherwise, as {difference}" in printed


def test_r58_a_template_that_writes_texts_as_they_are_is_passed_over_in_silence(chatml, capsys):
    encode_pairs(chatml(CHATML), [row("\ncod <|im_end|>", "é 🦊  <think>")])

    assert capsys.readouterr().out == "pairs: 1 of 1 rows\n"
