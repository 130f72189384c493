"""common.py against slow, obvious versions: plain forward passes, float64, Python loops."""

import json
import math

import pytest
import torch
from conftest import make_model, make_tokenizer, plain_log_probs, random_examples, save

import common
from common import (
    LM,
    Example,
    make_examples,
    pack,
    per_token,
    read_rows,
    response_means,
    stage,
    target_logps,
)

CPU = torch.device("cpu")
SHAPES = [(7, [5, 3]), (1, [1, 9]), (12, [4, 4, 2]), (3, [6])]


def scored_logps(lm, examples, chunk=1024):
    batch = pack(examples, lm)
    scored = [(lm, lm.hidden_states(batch)[batch.source])]
    return batch, per_token(target_logps, batch.target_ids, scored, lm.vocab_size, chunk)


def slow_logps(lm, examples) -> list[list[float]]:
    """Log-prob of every response token, one plain forward pass and one Python loop per response."""
    result = []
    for example in examples:
        for response in example.responses:
            log_probs = plain_log_probs(lm.model, example.prompt, response, lm.vocab_size)
            result.append([log_probs[t, token].item() for t, token in enumerate(response)])
    return result


# ------------------------------------------------------------------------------------------------------------- layout
@pytest.mark.parametrize("share_prefix", [True, False])
def test_r05_r06_packed_log_probs_equal_plain_forward_passes(load, share_prefix):
    lm = load("student")
    assert lm.share_prefix
    lm.share_prefix = share_prefix
    examples = random_examples(lm.vocab_size, SHAPES)
    batch, logps = scored_logps(lm, examples)
    slow = slow_logps(lm, examples)
    assert len(batch.input_ids) == (len(examples) if share_prefix else 8)
    assert logps.tolist() == pytest.approx(
        [value for response in slow for value in response], abs=1e-4
    )
    assert batch.lengths.tolist() == [len(response) for response in slow]
    means = response_means(logps, batch.response_of, batch.lengths)
    assert means.tolist() == pytest.approx(
        [sum(response) / len(response) for response in slow], abs=1e-4
    )


def test_r04_every_response_token_is_scored_once_and_no_prompt_token(load):
    lm = load("student")
    examples = random_examples(lm.vocab_size, SHAPES)
    batch = pack(examples, lm)
    responses = [response for example in examples for response in example.responses]
    assert batch.target_ids.tolist() == [token for response in responses for token in response]
    assert batch.response_of.tolist() == [
        i for i, response in enumerate(responses) for _ in response
    ]
    flat = batch.input_ids.flatten()
    assert flat[batch.last].tolist() == [response[-1] for response in responses]
    assert flat[batch.source[batch.response_of.diff(prepend=torch.tensor([-1])) > 0]].tolist() == [
        example.prompt[-1] for example in examples for _ in example.responses
    ]


def test_r32_a_response_does_not_depend_on_its_neighbours(load):
    lm = load("student")
    examples = random_examples(lm.vocab_size, SHAPES)
    _, together = scored_logps(lm, examples)
    alone = [
        scored_logps(lm, [Example(row, p, [r])])[1]
        for row, p, responses in examples
        for r in responses
    ]
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)


def test_sequences_beyond_a_sliding_window_get_rows_of_their_own(load):
    lm = load("student")
    lm.window = 12
    assert len(pack(random_examples(lm.vocab_size, [(7, [5, 3])]), lm).input_ids) == 1
    assert len(pack(random_examples(lm.vocab_size, [(7, [6, 3])]), lm).input_ids) == 2


def test_eager_attention_gets_an_additive_mask(checkpoints, load):
    lm = load("student")
    examples = random_examples(lm.vocab_size, SHAPES)
    _, sdpa = scored_logps(lm, examples)
    lm.model.set_attn_implementation("eager")
    assert torch.allclose(scored_logps(lm, examples)[1], sdpa, atol=1e-4)


def test_r11_empty_responses_cannot_be_packed(load):
    lm = load("student")
    with pytest.raises(AssertionError, match="without tokens"):
        pack([Example({"id": "1"}, [1, 2], [[3], []])], lm)


@pytest.mark.parametrize("chunk", [1, 3, 26, 27, 28, 1024])
def test_chunks_change_neither_values_nor_gradients(load, chunk):
    results = []
    for size in (10**9, chunk):
        lm, other = load("student", trains=True), load("teacher")
        batch = pack(random_examples(lm.vocab_size, [(5, [9, 8]), (3, [10])]), lm, other)
        scored = [(model, model.hidden_states(batch)[batch.source]) for model in (lm, other)]
        both = per_token(
            lambda ids, ours, theirs: (target_logps(ids, ours), (ours.exp() * theirs).sum(-1)),
            *(batch.target_ids, scored, lm.vocab_size, size),
        )
        sum(value.sum() for value in both).backward()
        assert all(parameter.grad is None for parameter in other.model.parameters())
        results.append([*both, *(parameter.grad for parameter in lm.model.parameters())])
    for dense, sliced in zip(*results):
        assert torch.allclose(dense, sliced, rtol=1e-4, atol=1e-5)


def test_r26_response_means_are_means_and_times_lengths_sums():
    values, response_of = torch.tensor([1.0, 2.0, 3.0, 10.0, 4.0]), torch.tensor([0, 0, 0, 1, 3])
    lengths = torch.tensor([3, 1, 2, 1])  # of response 2 no token is given: it gets 0
    means = response_means(values, response_of, lengths)
    assert means.tolist() == [2.0, 10.0, 0.0, 4.0] and (means * lengths).tolist() == [
        6.0,
        10.0,
        0.0,
        4.0,
    ]


# ------------------------------------------------------------------------------------------------------------- loading
def test_r28_r31_trained_weights_are_float32_and_dropout_is_off(tmp_path, tokenizer):
    model = make_model(len(tokenizer), attention_dropout=0.5).to(torch.bfloat16)
    lm = LM(save(tmp_path, tokenizer, model), CPU, trains=True, checkpointing=True)
    assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.float32}
    examples = random_examples(lm.vocab_size, SHAPES)
    assert lm.model.training  # as gradient checkpointing requires
    assert torch.equal(scored_logps(lm, examples)[1], scored_logps(lm, examples)[1])


def test_gradient_checkpointing_changes_nothing(load):
    gradients = []
    for checkpointing in (False, True):
        lm = load("student", trains=True, checkpointing=checkpointing)
        scored_logps(lm, random_examples(lm.vocab_size, SHAPES))[1].sum().backward()
        gradients.append([parameter.grad for parameter in lm.model.parameters()])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*gradients))


def test_a_head_that_is_not_understood_ends_the_program(checkpoints, capsys, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(SystemExit) as stopped:
        LM(checkpoints["student"], CPU)
    assert stopped.value.code == 2 and "LM head" in capsys.readouterr().err


def test_an_architecture_that_ignores_the_mask_gets_a_row_per_response(
    checkpoints, capsys, monkeypatch
):
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.create_causal_mask
    monkeypatch.setattr(  # every mask of ours is dropped for the ordinary causal one
        modeling_llama,
        "create_causal_mask",
        lambda **kwargs: plain(**{**kwargs, "attention_mask": None}),
    )
    lm = LM(checkpoints["student"], CPU)
    assert not lm.share_prefix and "a row per response" in capsys.readouterr().out
    examples = random_examples(lm.vocab_size, SHAPES)
    slow = [value for response in slow_logps(lm, examples) for value in response]
    assert scored_logps(lm, examples)[1].tolist() == pytest.approx(slow, abs=1e-4)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "no/such-model-on-the-hub"])
def test_r46_missing_models_are_one_line(path, capsys):
    with pytest.raises(SystemExit) as stopped:
        LM(path, CPU)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and path in error and error.count("\n") == 1


def test_r49_only_safetensors_are_read(tmp_path, tokenizer, capsys):
    model = make_model(len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(SystemExit):
        LM(tmp_path, CPU)
    assert "safetensors" in capsys.readouterr().err


def test_r49_code_that_comes_with_a_model_is_not_run_unasked(tmp_path, tokenizer, capsys):
    path, ran = tmp_path / "model", tmp_path / "ran"
    save(path, tokenizer, make_model(len(tokenizer)))
    config = json.loads((path / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "own.py").write_text(f"open({str(ran)!r}, 'w').write('owned')\n")
    with pytest.raises(SystemExit):
        LM(path, CPU)
    assert "cannot load" in capsys.readouterr().err and not ran.exists()


# ---------------------------------------------------------------------------------------------------------- vocabulary
def test_r01_heads_of_different_sizes_share_the_tokenizers_vocabulary(tmp_path, tokenizer):
    sizes = {"student": len(tokenizer) + 5, "teacher": len(tokenizer) + 17}
    lms = [
        LM(save(tmp_path / name, tokenizer, make_model(size)), CPU) for name, size in sizes.items()
    ]
    assert common.shared_vocab(*lms) == len(tokenizer)
    batch = pack(random_examples(len(tokenizer), SHAPES), *lms)
    scored = [(lm, lm.hidden_states(batch)[batch.source]) for lm in lms]
    mass = per_token(
        lambda _, *log_probs: sum(p.exp().sum(-1) for p in log_probs),
        batch.target_ids,
        scored,
        400,
        1024,
    )
    assert torch.allclose(
        mass, torch.full_like(mass, 2.0), atol=1e-5
    )  # nothing is left on the padding


def test_r02_different_tokenizers_are_refused_with_both_names(tmp_path, tokenizer, capsys):
    other = make_tokenizer(text="entirely other words make other merges " * 50)
    lms = [
        LM(save(tmp_path / n, t, make_model(len(t))), CPU)
        for n, t in (("one", tokenizer), ("two", other))
    ]
    with pytest.raises(SystemExit):
        common.shared_vocab(*lms)
    error = capsys.readouterr().err
    assert str(tmp_path / "one") in error and str(tmp_path / "two") in error


# ------------------------------------------------------------------------------------------------------- text to tokens
QUESTION = [{"role": "user", "content": "What is it?"}]


def lm_with(tokenizer, tmp_path, **config) -> LM:
    return LM(
        save(tmp_path / f"lm{len(list(tmp_path.iterdir()))}", tokenizer, make_model(400, **config)),
        CPU,
    )


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_r12_r13_bos_once_and_end_once(tmp_path, chat, adds_bos):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(chat=chat)
    if adds_bos:
        bos = [("<|begin|>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|begin|> $A", special_tokens=bos
        )
    lm = lm_with(tokenizer, tmp_path)
    prompt, [finished, cut] = lm.encode(
        QUESTION, ["A thing.", {"text": "A thing.", "finished": False}]
    )
    assert (prompt + finished).count(tokenizer.bos_token_id) == (1 if chat or adds_bos else 0)
    assert finished.count(tokenizer.eos_token_id) == 1 and finished[-1] == tokenizer.eos_token_id
    assert cut == finished[:-1]
    assert lm.tokenizer.decode(cut) == "A thing."


def test_r09_the_end_of_turn_is_found_in_the_template(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|pad|>"  # a base model's end of text; turns end otherwise
    lm = lm_with(tokenizer, tmp_path, eos_token_id=3)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end in lm.end_ids and tokenizer.pad_token_id in lm.end_ids
    assert lm.encode(QUESTION, ["A thing."])[1][0][-1] == end


def pad_and_end_apart_and_one(tmp_path) -> list[LM]:
    """One model twice, with a padding token of its own and with padding that is the end of turn (id 5)."""
    model, lms = make_model(400), []
    for pad, token in ((0, "<|pad|>"), (5, "<|end|>")):
        model.config.pad_token_id = pad
        lms.append(LM(save(tmp_path / token, make_tokenizer(pad=token), model), CPU, trains=True))
    return lms


def test_r07_padding_and_end_of_turn_may_be_one_token(tmp_path):
    """Nothing is masked by comparing ids with padding: the end of an answer is scored, and answers are the same."""
    plain, same = pad_and_end_apart_and_one(tmp_path)
    assert (
        same.tokenizer.pad_token_id
        == same.tokenizer.eos_token_id
        == 5
        != plain.tokenizer.pad_token_id
    )
    answers = ["A thing.", "Something that is much longer.", {"text": "cut", "finished": False}]
    encoded = [lm.encode(QUESTION, answers) for lm in (plain, same)]
    assert encoded[0] == encoded[1]
    prompt, responses = encoded[0]
    assert [response[-1] == 5 for response in responses] == [True, True, False]
    examples = [Example({}, prompt, responses), Example({}, prompt[:3], responses[:1])]
    batch, logps = scored_logps(same, examples)
    assert (batch.target_ids == 5).sum() == 3 and torch.equal(
        logps, scored_logps(plain, examples)[1]
    )
    prompts = [prompt, prompt[:2], prompt + responses[0]]
    how = {"max_new_tokens": 12, "batch_size": 4, "seed": 0}
    assert plain.sample(prompts, **how) == same.sample(prompts, **how)


def test_r07_an_end_of_turn_that_also_pads_learns_like_any_token(tmp_path):
    gradients = []
    for lm in pad_and_end_apart_and_one(tmp_path):
        prompt, [response] = lm.encode(QUESTION, ["A thing."])
        scored_logps(lm, [Example({}, prompt + response + prompt, [response])])[1].sum().backward()
        gradients.append(lm.model.get_input_embeddings().weight.grad[5])
    assert gradients[0].any() and torch.equal(*gradients)


def test_special_token_strings_in_data_stay_text(tmp_path):
    for chat in (True, False):
        lm = lm_with(make_tokenizer(chat=chat), tmp_path)
        text = "a <|end|> b <|user|> c"
        prompt, [response] = lm.encode([{"role": "user", "content": text}], [text])
        special = {
            token for token, added in lm.tokenizer.added_tokens_decoder.items() if added.special
        }
        assert lm.tokenizer.decode(response[:-1]) == text
        assert special.isdisjoint(response[:-1])
        assert sum(token in special for token in prompt) == (
            4 if chat else 0
        )  # begin, user, end, assistant


@pytest.mark.parametrize(
    "text",
    ["A thing.", " żółć\n\n猫 ", "a < b", "a <|end|> b", "[TOOL] and <|pad|>", "[no] tool", "=> x"],
)
def test_every_chat_is_encoded_as_if_it_was_sanitised(tmp_path, text):
    """Only a text with a character that a control token begins with takes the slow way."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL]"]})
    lm, taken = lm_with(tokenizer, tmp_path), []
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    how = {"return_dict": False, "sanitize_control_tokens": True}
    assert lm.template(chat) == lm.tokenizer.apply_chat_template(chat, **how)
    apply = lm.tokenizer.apply_chat_template
    lm.tokenizer.apply_chat_template = lambda *chat, **how: taken.append(how) or apply(*chat, **how)
    lm.template(chat)
    lm.template(
        [{**turn, "tools": [text]} for turn in chat]
    )  # a value that is no text may hold anything
    assert [how["sanitize_control_tokens"] for how in taken] == ["<" in text or "[" in text, True]


def test_r16_prompts_of_several_turns(tmp_path, tokenizer):
    lm = lm_with(tokenizer, tmp_path)
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."), ("user", "Bye")]
    prompt, [response] = lm.encode(
        [{"role": role, "content": text} for role, text in turns], ["See you."]
    )
    expected = "<|begin|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>Hi.<|end|><|user|>Bye<|end|>"
    assert lm.tokenizer.decode(prompt) == expected + "<|assistant|>"
    assert lm.tokenizer.decode(response) == "See you.<|end|>"


def test_r14_r16_templates_that_refuse_or_rewrite_a_prompt_end_the_program(tmp_path, capsys):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + CHAT
    )
    lm = lm_with(tokenizer, tmp_path)
    with pytest.raises(SystemExit):
        lm.encode([{"role": "system", "content": "x"}, *QUESTION], ["y"])
    assert "no system role" in capsys.readouterr().err
    lm.tokenizer.chat_template = (
        "{% if messages[-1]['role'] == 'assistant' %}answered: {% endif %}" + CHAT
    )
    with pytest.raises(SystemExit):
        lm.encode(QUESTION, ["y"])
    assert "otherwise once it is answered" in capsys.readouterr().err


CHAT = make_tokenizer().chat_template


# ---------------------------------------------------------------------------------------------------------------- data
def write_lines(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turn(role, content):
    return {"role": role, "content": content}


PLAIN = {"prompt": "p", "chosen": "good", "rejected": "bad"}
CONVERSATIONS = {
    "chosen": [turn("user", "p"), turn("assistant", "good")],
    "rejected": [turn("user", "p"), turn("assistant", "bad")],
}
FORMS = {
    "text": PLAIN,
    "messages as prompt": PLAIN | {"prompt": [turn("user", "p")]},
    "answers as messages": PLAIN
    | {"chosen": [turn("assistant", "good")], "rejected": [turn("assistant", "bad")]},
    "prompt and conversations": PLAIN | CONVERSATIONS,
    "implicit prompt": CONVERSATIONS,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_all_forms_of_a_row_read_the_same(tmp_path, form, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list([FORMS[form]]).to_parquet(path)
    elif suffix == ".json":
        path.write_text(json.dumps([FORMS[form]]))
    else:
        write_lines(path, FORMS[form])
    [row] = read_rows(str(path), "train")
    assert (row["prompt"], row["chosen"], row["rejected"]) == ([turn("user", "p")], "good", "bad")
    assert row["id"].startswith("1-")


def test_text_that_looks_like_a_date_stays_text(tmp_path):
    [row] = read_rows(
        write_lines(tmp_path / "rows.jsonl", PLAIN | {"prompt": "2021-01-01"}), "train"
    )
    assert row["prompt"][0]["content"] == "2021-01-01"


@pytest.mark.parametrize(
    "good, bad",
    [("Yes, it is.", "Yes"), ("Yes", "Yes, it is."), ("No", "Yes"), ("Y", "N")],
    ids=["rejected is a prefix", "chosen is a prefix", "differ at once", "one character"],
)
def test_r15_implicit_prompts_end_where_the_last_turn_begins(tmp_path, good, bad):
    shared = [turn("user", "Is it?"), turn("assistant", "Maybe."), turn("user", "Well?")]
    row = {
        "chosen": [*shared, turn("assistant", good)],
        "rejected": [*shared, turn("assistant", bad)],
    }
    [read] = read_rows(write_lines(tmp_path / "rows.jsonl", row), "train")
    assert (read["prompt"], read["chosen"], read["rejected"]) == (shared, good, bad)


BAD_FILES = {
    "broken line": (
        b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "cho',
        "line 2",
    ),
    "not UTF-8": (b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "\xff"}', "line 2"),
    "missing column": (b'{"prompt": "a", "chosen": "b"}', "row 1"),
    "number as prompt": (b'{"prompt": 3, "chosen": "b", "rejected": "c"}', "row 1"),
    "null as answer": (b'{"prompt": "a", "chosen": null, "rejected": "c"}', "row 1"),
    "no prompt": (b'{"chosen": "b", "rejected": "c"}', "row 1"),
    "different contexts": (
        json.dumps(
            CONVERSATIONS | {"rejected": [turn("user", "q"), turn("assistant", "c")]}
        ).encode(),
        "row 1",
    ),
    "not an object": (b"[1, 2]", "row 1"),
    "a bare number": (b"17", "row 1"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_r46_bad_files_are_one_line_with_the_place(tmp_path, capsys, case):
    content, place = BAD_FILES[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        read_rows(str(path), "train")
    error = capsys.readouterr().err
    assert (
        stopped.value.code == 2 and place in error and str(path) in error and error.count("\n") == 1
    )


@pytest.mark.parametrize(
    "source", ["/no/such/file.jsonl", "/no/such/file.parquet", "no-such/hub-id", "/no/folder"]
)
def test_r46_missing_data_is_one_line(source, capsys):
    with pytest.raises(SystemExit):
        read_rows(source, "train")
    error = capsys.readouterr().err
    assert source in error and error.count("\n") == 1


def test_r17_r18_r19_r46_rows_that_do_not_fit_are_dropped_and_counted(load, tmp_path, capsys):
    lm = load("student")
    rows = [
        PLAIN,
        PLAIN | {"rejected": "good"},
        PLAIN | {"chosen": "  "},
        PLAIN | {"prompt": ""},
        PLAIN | {"prompt": "long " * 100_000},
        PLAIN | {"chosen": "long " * 60},
    ]
    path = write_lines(tmp_path / "rows.jsonl", *rows)
    examples = make_examples(lm, read_rows(path, "train"), ("chosen", "rejected"), 40, 40)
    line = capsys.readouterr().out.strip()
    assert [example.row["id"][0] for example in examples] == ["1"]
    assert line.startswith("1 of 6 rows, ")
    assert "2 dropped (empty prompt or answer)" in line and "1 dropped (equal answers)" in line
    assert "2 dropped (over 40 prompt or 40 response tokens)" in line
    with pytest.raises(SystemExit):
        make_examples(lm, read_rows(path, "train")[1:], ("chosen", "rejected"), 40, 40)
    assert "no row left: 0 of 5 rows" in capsys.readouterr().err


def test_r08_a_sample_that_never_ended_is_cut_at_the_limit_again_and_a_finished_one_is_not(
    load, capsys
):
    """Its text may take more tokens than were sampled: text to tokens is not the inverse of tokens to text."""
    lm, prompt = load("student"), [turn("user", "hi")]
    long = {"text": "what a long answer this is", "finished": False}
    whole = lm.encode(prompt, [long])[1][0]
    row = {"id": "1", "prompt": prompt, "student": long}
    assert make_examples(lm, [row], ("student",), 40, 4)[0].responses == [whole[:4]]
    with pytest.raises(SystemExit):
        make_examples(lm, [row | {"student": long | {"finished": True}}], ("student",), 40, 4)
    assert "1 dropped (over 40 prompt or 4 response tokens)" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- stages
ROWS = [{"id": str(i), "prompt": [turn("user", f"p{i}")]} for i in range(7)]


def test_r34_a_stage_is_completed_not_trusted_and_not_duplicated(tmp_path):
    path, calls = tmp_path / "stage.jsonl", []

    def produce(rows, number):
        calls.append(number)
        return [{"text": f"{row['id']} of {number}"} for row in rows]

    whole = stage(path, ROWS, produce, 3)
    assert calls == [0, 3, 6] and [row["id"] for row in whole] == [row["id"] for row in ROWS]
    lines = path.read_text().splitlines(keepends=True)
    for cut in (
        0,
        10,
        len(lines[0]),
        len("".join(lines[:4])) - 1,
        len("".join(lines[:4])),
        len("".join(lines)) - 1,
    ):
        calls.clear()
        path.write_text("".join(lines)[:cut])
        assert stage(path, ROWS, produce, 3) == whole
        assert (
            sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["id"])
            == whole
        )
    calls.clear()
    path.write_text("".join(reversed(lines)))  # made elsewhere, in completion order
    assert stage(path, ROWS, produce, 3) == whole and calls == []


def test_r35_a_stage_of_other_data_is_refused(tmp_path, capsys):
    path = tmp_path / "stage.jsonl"
    stage(path, ROWS, lambda rows, _: [{"text": "x"} for _ in rows], 3)
    changed = [ROWS[0] | {"prompt": [turn("user", "another")]}, *ROWS[1:]]
    for rows in (changed, ROWS[1:]):
        with pytest.raises(SystemExit):
            stage(path, rows, lambda rows, _: [{"text": "y"} for _ in rows], 3)
        assert str(path) in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ sampling
HOW = {"max_new_tokens": 12, "batch_size": 64, "seed": 0}


def slow_greedy(lm, prompt, length=12) -> tuple[list[int], bool]:
    ids = list(prompt)
    for _ in range(length):
        with torch.no_grad():
            ids.append(lm.model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] in lm.end_ids:
            return ids[len(prompt) : -1], True
    return ids[len(prompt) :], False


PROMPTS = [
    example.prompt for example in random_examples(400, [(n, []) for n in (3, 17, 1, 9, 9, 2)])
]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_r41_r42_greedy_answers_equal_a_plain_loop_whatever_the_batch(load, n, batch_size):
    lm = load("student")
    answers = lm.sample(PROMPTS, n=n, temperature=0.0, **(HOW | {"batch_size": batch_size}))
    for prompt, several in zip(PROMPTS, answers, strict=True):
        ids, finished = slow_greedy(lm, prompt)
        expected = {
            "text": lm.tokenizer.decode(ids, skip_special_tokens=True),
            "finished": finished,
        }
        assert several == [expected] * n


def test_r42_sampling_is_seeded_and_leaves_the_random_state(load):
    lm = load("student")
    state = torch.get_rng_state()
    first, again, other = (lm.sample(PROMPTS, n=2, **(HOW | {"seed": seed})) for seed in (1, 1, 2))
    assert first == again != other and torch.equal(state, torch.get_rng_state())
    assert any(a != b for a, b in first)  # two answers of a prompt are two draws


def test_sampled_frequencies_are_the_models_probabilities(load):
    lm = load("student")
    draws = lm.sample([PROMPTS[0]] * 4, n=2000, **(HOW | {"max_new_tokens": 1, "batch_size": 2000}))
    texts = [answer["text"] for several in draws for answer in several]
    with torch.no_grad():
        probs = lm.model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    for token in probs.topk(5).indices.tolist():
        same_text = [
            t for t in range(400) if lm.tokenizer.decode([t]) == lm.tokenizer.decode([token])
        ]
        p = probs[same_text].sum().item()
        seen = sum(
            text == lm.tokenizer.decode([token], skip_special_tokens=True) for text in texts
        ) / len(texts)
        assert seen == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / len(texts)) + 1e-3)


def test_r39_the_checkpoints_generation_config_does_not_leak(tmp_path, tokenizer):
    from transformers import GenerationConfig

    model = make_model(len(tokenizer))
    plain = LM(save(tmp_path / "plain", tokenizer, model), CPU)
    ends = [tokenizer.eos_token_id, 77]
    opinions = {
        "temperature": 0.01,
        "top_k": 1,
        "top_p": 0.1,
        "repetition_penalty": 9.0,
        "min_new_tokens": 9,
    }
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=ends, **opinions)
    opinionated = LM(save(tmp_path / "opinionated", tokenizer, model), CPU)
    assert opinionated.end_ids == ends  # several end-of-turn ids, the only thing that is taken
    opinionated.end_ids = plain.end_ids
    assert opinionated.sample(PROMPTS, **HOW) == plain.sample(PROMPTS, **HOW)
    assert (
        opinionated.model.generation_config.repetition_penalty == 9.0
    )  # and it is saved as it was


def test_r40_sampling_works_while_training_with_gradient_checkpointing(load):
    plain, lm = load("student"), load("student", trains=True, checkpointing=True)
    assert lm.sample(PROMPTS, n=2, **HOW) == plain.sample(PROMPTS, n=2, **HOW)
    assert lm.model.training


# -------------------------------------------------------------------------------------------------------------- judges
@pytest.fixture
def reward_model(tmp_path, tokenizer):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.3, **shape)
    config.pad_token_id = tokenizer.eos_token_id  # the trap: padding and end of turn are one id
    model = LlamaForSequenceClassification(config)
    return save(tmp_path / "rm", tokenizer, model), model


def test_r43_a_reward_model_is_read_at_the_last_token_even_when_pad_is_eos(reward_model, load):
    path, model = reward_model
    prompts, answers = (
        [QUESTION] * 5,
        ["A.", "Something much longer than that.", "", "B", "Nothing at all."],
    )
    scores = common.load_reward(path, CPU, batch_size=2)(prompts, answers)
    lm = load("student")
    for prompt, answer, score in zip(prompts, answers, scores):
        ids, [response] = lm.encode(prompt, [answer])
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids + response])).last_hidden_state[0, -1]
        assert score == pytest.approx(model.score(hidden).item(), abs=1e-4)


def test_judges_that_do_not_exist_or_do_not_judge_are_one_line(capsys, monkeypatch):
    for spec in ("no.such:function", "playground.world:nothing", "math:pi", "/no/such/model"):
        with pytest.raises(SystemExit):
            common.load_reward(spec, CPU)
        assert spec in capsys.readouterr().err
    for bad in ([1.0], [1.0, math.nan], []):
        monkeypatch.setattr("playground.world.reward", lambda prompts, answers, bad=bad: bad)
        with pytest.raises(SystemExit):
            common.load_reward("playground.world:reward", CPU)([QUESTION] * 2, ["a", "b"])
        assert "finite numbers" in capsys.readouterr().err
