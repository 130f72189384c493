"""common.py against slow, obvious versions: plain forward passes, float64, Python loops."""

import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    CHAT_TEMPLATE,
    TURNS,
    make_model,
    make_tokenizer,
    one_error_line,
    packed_logps,
    plain_log_probs,
    random_examples,
    read_jsonl,
    save,
    write_jsonl,
)

import common
from common import (
    LM,
    Example,
    Metrics,
    cached_map,
    encode_rows,
    load_checkpoint,
    mean_per_response,
    pack,
    per_token,
    read_rows,
    read_timings,
    save_checkpoint,
    shared_vocab_size,
    step_examples,
    token_logps,
)

CPU = torch.device("cpu")
# Four examples with 2 + 2 + 3 + 1 = 8 responses.
SHAPES = [(7, [5, 3]), (1, [1, 9]), (12, [4, 4, 2]), (3, [6])]


def turn(role: str, content: str) -> dict:
    """A chat message."""
    return {"role": role, "content": content}


def response_logps(lm: LM, examples: list[Example]) -> torch.Tensor:
    """[N]: the log-probs of all response tokens, packed as the scripts pack them."""
    _, logps = packed_logps(lm, examples, lm.vocab_size)
    return logps


def slow_logps(lm: LM, examples: list[Example]) -> list[list[float]]:
    """The log-probs of every response's tokens: a plain forward pass and a loop per response."""
    result = []
    for example in examples:
        for response in example.response_ids:
            log_probs = plain_log_probs(lm.model, example.prompt_ids, response, lm.vocab_size)
            result.append([log_probs[t, token].item() for t, token in enumerate(response)])
    return result


def flat(lists: list[list]) -> list:
    """The lists behind one another, as one list."""
    return [item for items in lists for item in items]


def all_responses(examples: list[Example]) -> list[list[int]]:
    """The token ids of every response, in order."""
    return flat([example.response_ids for example in examples])


# -------------------------------------------------------------------------------------- packed rows
def test_a_packed_row_is_what_the_docstring_draws(load):
    example = Example({}, [11, 12, 13], [[21, 22, 23], [31, 32]])

    batch = pack([example], load("student"))

    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 23, 31, 32]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4]]
    assert batch.target_ids.tolist() == [21, 22, 23, 31, 32]
    # 13 at position 2 predicts the first token of both. The others are predicted by the one before.
    assert batch.predict_index.tolist() == [2, 3, 4, 2, 6]
    assert batch.response_index.tolist() == [0, 0, 0, 1, 1]
    assert batch.last_index.tolist() == [5, 7]
    assert batch.lengths.tolist() == [3, 2]
    # Every token looks back. The second response does not look at the first one.
    assert batch.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 0],
        [1, 1, 1, 0, 0, 0, 1, 1],
    ]


def test_only_scores_one_response_of_every_example(load):
    examples = [Example({}, [11], [[21, 22], [31]]), Example({}, [12], [[41], [51, 52, 53]])]
    batch = pack(examples, load("student"))

    second = batch.only(1, of=2)

    assert torch.equal(second.input_ids, batch.input_ids)
    assert second.target_ids.tolist() == [31, 51, 52, 53]
    assert second.response_index.tolist() == [0, 1, 1, 1]
    assert second.lengths.tolist() == [1, 3]
    # Rows are 11 21 22 31 · and 12 41 51 52 53. So 31 is at 3 and 53 is at 5 + 4 = 9.
    assert second.last_index.tolist() == [3, 9]
    assert second.predict_index.tolist() == [0, 5, 7, 8]


@pytest.mark.parametrize("share_prefix, rows", [(True, 4), (False, 8)])
def test_r05_r06_packed_log_probs_equal_plain_forward_passes(load, share_prefix, rows):
    lm = load("student")
    assert lm.share_prefix
    lm.share_prefix = share_prefix
    examples = random_examples(lm.vocab_size, SHAPES)

    batch, logps = packed_logps(lm, examples, lm.vocab_size)

    expected = slow_logps(lm, examples)
    assert len(batch.input_ids) == rows
    assert logps.tolist() == pytest.approx(flat(expected), abs=1e-4)
    assert batch.lengths.tolist() == [len(response) for response in expected]
    expected_means = [statistics.mean(response) for response in expected]
    assert mean_per_response(logps, batch).tolist() == pytest.approx(expected_means, abs=1e-4)


def test_r04_every_response_token_is_scored_once_and_no_prompt_token(load):
    lm = load("student")
    examples = random_examples(lm.vocab_size, SHAPES)
    responses = all_responses(examples)

    batch = pack(examples, lm)

    assert batch.target_ids.tolist() == flat(responses)
    owners = []
    for number, response in enumerate(responses):
        owners += [number] * len(response)
    assert batch.response_index.tolist() == owners
    tokens = batch.input_ids.flatten()
    assert tokens[batch.last_index].tolist() == [response[-1] for response in responses]
    # The first token of a response is predicted by the last token of its prompt.
    last_of_prompts = []
    for example in examples:
        last_of_prompts += [example.prompt_ids[-1]] * len(example.response_ids)
    is_first = batch.response_index.diff(prepend=torch.tensor([-1])) > 0
    assert tokens[batch.predict_index[is_first]].tolist() == last_of_prompts


def test_r32_a_response_does_not_depend_on_its_neighbours(load):
    lm = load("student")
    examples = random_examples(lm.vocab_size, SHAPES)

    together = response_logps(lm, examples)

    alone = []
    for example in examples:
        for response in example.response_ids:
            alone.append(response_logps(lm, [Example({}, example.prompt_ids, [response])]))
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)


def test_sequences_beyond_a_sliding_window_get_rows_of_their_own(load):
    lm = load("student")
    lm.sliding_window = 12
    fits = random_examples(lm.vocab_size, [(7, [5, 3])])  # 7 + 5 = 12
    too_long = random_examples(lm.vocab_size, [(7, [6, 3])])

    assert len(pack(fits, lm).input_ids) == 1
    assert len(pack(too_long, lm).input_ids) == 2


def test_eager_attention_gets_an_additive_mask(load):
    lm = load("student")
    examples = random_examples(lm.vocab_size, SHAPES)
    sdpa = response_logps(lm, examples)

    lm.model.set_attn_implementation("eager")

    assert torch.allclose(response_logps(lm, examples), sdpa, atol=1e-4)


def test_r11_empty_responses_cannot_be_packed(load):
    with pytest.raises(ValueError, match="without tokens"):
        pack([Example({"id": "1"}, [1, 2], [[3], []])], load("student"))


def logps_and_agreement(target_ids, student_log_probs, teacher_log_probs):
    """Two values [N] for per_token, one of which needs both models."""
    agreement = (student_log_probs.exp() * teacher_log_probs).sum(-1)
    return token_logps(target_ids, student_log_probs), agreement


def values_and_gradients(student: LM, teacher: LM, chunk_size: int) -> list[torch.Tensor]:
    """What per_token gives with a chunk size, and the student's gradients of its sum."""
    examples = random_examples(student.vocab_size, [(5, [9, 8]), (3, [10])])  # 27 response tokens
    batch = pack(examples, student, teacher)
    models = [student, teacher]
    logps, agreement = per_token(
        logps_and_agreement,
        batch.target_ids,
        models,
        [lm.hidden_states(batch)[batch.predict_index] for lm in models],
        vocab_size=student.vocab_size,
        chunk_size=chunk_size,
    )
    (logps.sum() + agreement.sum()).backward()
    return [logps, agreement, *(parameter.grad for parameter in student.model.parameters())]


@pytest.mark.parametrize("chunk_size", [1, 3, 26, 27, 28, 1024])
def test_chunks_change_neither_values_nor_gradients(load, chunk_size):
    teacher = load("teacher")

    whole = values_and_gradients(load("student", trainable=True), teacher, 10**9)
    sliced = values_and_gradients(load("student", trainable=True), teacher, chunk_size)

    for expected, measured in zip(whole, sliced, strict=True):
        assert torch.allclose(expected, measured, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


def test_r26_response_means_are_means_and_times_lengths_sums():
    """Response 0 has the values 1, 2, 3, whose mean is 6 / 3. Response 2 has none here: 0 / 2."""
    values = torch.tensor([1.0, 2.0, 3.0, 10.0, 4.0])
    batch = SimpleNamespace(
        response_index=torch.tensor([0, 0, 0, 1, 3]), lengths=torch.tensor([3, 1, 2, 1])
    )

    means = mean_per_response(values, batch)

    assert means.tolist() == [2.0, 10.0, 0.0, 4.0]
    assert (means * batch.lengths).tolist() == [6.0, 10.0, 0.0, 4.0]


# ------------------------------------------------------------------------------------------ loading
def test_r28_r31_trained_weights_are_float32_and_dropout_is_off(tmp_path, tokenizer):
    model = make_model(len(tokenizer), attention_dropout=0.5).to(torch.bfloat16)
    path = save(tmp_path, tokenizer, model)

    lm = LM(path, CPU, trainable=True, gradient_checkpointing=True)

    assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.float32}
    assert lm.model.model.layers[0].training  # as gradient checkpointing requires
    examples = random_examples(lm.vocab_size, SHAPES)
    assert torch.equal(response_logps(lm, examples), response_logps(lm, examples))


def test_gradient_checkpointing_changes_nothing(load):
    gradients = []
    for checkpointing in (False, True):
        lm = load("student", trainable=True, gradient_checkpointing=checkpointing)
        response_logps(lm, random_examples(lm.vocab_size, SHAPES)).sum().backward()
        gradients.append([parameter.grad for parameter in lm.model.parameters()])

    for plain, checkpointed in zip(*gradients):
        assert torch.allclose(plain, checkpointed, atol=1e-6)


def test_a_head_that_is_not_understood_ends_the_program(checkpoints, capsys, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def scaled_forward(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled_forward)

    assert "LM head" in one_error_line(capsys, LM, checkpoints["student"], CPU)


def expect_a_row_per_response(lm: LM, printed: str):
    """Checks that a model without our mask says so, and that its log-probs are right."""
    assert not lm.share_prefix
    assert "a row per response" in printed
    examples = random_examples(lm.vocab_size, SHAPES)
    expected = flat(slow_logps(lm, examples))
    assert response_logps(lm, examples).tolist() == pytest.approx(expected, abs=1e-4)


def test_an_architecture_that_ignores_the_mask_gets_a_row_per_response(
    checkpoints, capsys, monkeypatch
):
    from transformers.models.llama import modeling_llama

    create_mask = modeling_llama.create_causal_mask

    def create_ordinary_mask(**kwargs):
        return create_mask(**{**kwargs, "attention_mask": None})

    monkeypatch.setattr(modeling_llama, "create_causal_mask", create_ordinary_mask)

    lm = LM(checkpoints["student"], CPU)

    expect_a_row_per_response(lm, capsys.readouterr().out)


def refuse_masks(monkeypatch, error: Exception):
    """From now on a Llama raises the error when it is given a 4-D mask."""
    from transformers import LlamaModel

    forward = LlamaModel.forward

    def refusing_forward(self, *args, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.dim() == 4:
            raise error
        return forward(self, *args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", refusing_forward)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, IndexError])
def test_an_architecture_that_refuses_the_mask_gets_a_row_per_response(
    error, checkpoints, capsys, monkeypatch
):
    refuse_masks(monkeypatch, error("a mask of two dimensions is needed"))

    lm = LM(checkpoints["student"], CPU)

    expect_a_row_per_response(lm, capsys.readouterr().out)


@pytest.mark.parametrize("error", [TypeError, KeyError, AttributeError, AssertionError])
def test_other_errors_of_a_forward_pass_are_not_taken_for_a_refused_mask(
    error, checkpoints, monkeypatch
):
    refuse_masks(monkeypatch, error("a bug"))

    with pytest.raises(error, match="a bug"):
        LM(checkpoints["student"], CPU)


def test_a_bug_inside_pack_surfaces_as_what_it_is(checkpoints, monkeypatch):
    monkeypatch.delattr(common, "Batch")  # as if somebody had mistyped the name in `pack`

    with pytest.raises(NameError, match="Batch"):
        LM(checkpoints["student"], CPU)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "no/such-model-on-the-hub"])
def test_r46_missing_models_are_one_line(path, capsys):
    assert f"from {path}, which is no folder here: " in one_error_line(capsys, LM, path, CPU)


def test_r46_the_folder_of_a_run_is_no_model_and_the_error_names_the_model(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    error = one_error_line(capsys, LM, tmp_path, CPU)

    assert f"from {tmp_path}, which is a run with the model {tmp_path / 'model'}: " in error


def test_r49_only_safetensors_are_read(tmp_path, tokenizer, capsys):
    model = make_model(len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")

    assert "safetensors" in one_error_line(capsys, LM, tmp_path, CPU)


def test_r49_code_that_comes_with_a_model_is_not_run_unasked(tmp_path, tokenizer, capsys):
    folder = tmp_path / "model"
    proof = tmp_path / "proof"
    save(folder, tokenizer, make_model(len(tokenizer)))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(proof)!r}, 'w').write('the code ran')\n")

    assert "cannot load" in one_error_line(capsys, LM, folder, CPU)
    assert not proof.exists()


# --------------------------------------------------------------------------------------- vocabulary
def sum_of_probs(_, student_log_probs, teacher_log_probs):
    """[N]: the probability of all tokens together, of both models together."""
    return student_log_probs.exp().sum(-1) + teacher_log_probs.exp().sum(-1)


def test_r01_heads_of_different_sizes_share_the_tokenizers_vocabulary(tmp_path, tokenizer):
    size = len(tokenizer)
    student = LM(save(tmp_path / "student", tokenizer, make_model(size + 5)), CPU)
    teacher = LM(save(tmp_path / "teacher", tokenizer, make_model(size + 17)), CPU)
    models = [student, teacher]
    batch = pack(random_examples(size, SHAPES), *models)

    vocab_size = shared_vocab_size(student, teacher)
    probs = per_token(
        sum_of_probs,
        batch.target_ids,
        models,
        [lm.hidden_states(batch)[batch.predict_index] for lm in models],
        vocab_size=vocab_size,
        chunk_size=1024,
    )

    assert vocab_size == size
    # Nothing is left on the padding: 1 + 1 at every token.
    assert torch.allclose(probs, torch.full_like(probs, 2.0), atol=1e-5)


def test_r02_different_tokenizers_are_refused_with_both_names(tmp_path, tokenizer, capsys):
    other = make_tokenizer(text="entirely other words make other merges " * 50)
    one_path = save(tmp_path / "one", tokenizer, make_model(len(tokenizer)))
    other_path = save(tmp_path / "other", other, make_model(len(other)))

    error = one_error_line(capsys, shared_vocab_size, LM(one_path, CPU), LM(other_path, CPU))

    assert one_path in error
    assert other_path in error


# -------------------------------------------------------------------------------- text to token ids
QUESTION = [turn("user", "What is it?")]


def lm_with(tokenizer, tmp_path: Path, **config) -> LM:
    """A random model with this tokenizer."""
    folder = tmp_path / f"lm{len(list(tmp_path.iterdir()))}"
    return LM(save(folder, tokenizer, make_model(400, **config)), CPU)


def special_ids(lm: LM) -> set[int]:
    """The ids of all special tokens."""
    added_tokens = lm.tokenizer.added_tokens_decoder
    return {token for token, added in added_tokens.items() if added.special}


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_r12_r13_bos_once_and_end_once(tmp_path, chat, adds_bos):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(chat=chat)
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
        )
    lm = lm_with(tokenizer, tmp_path)
    unfinished = {"text": "A thing.", "finished": False}

    prompt_ids, [whole, cut] = lm.encode(QUESTION, ["A thing.", unfinished])

    expected_bos = 1 if chat or adds_bos else 0
    assert (prompt_ids + whole).count(tokenizer.bos_token_id) == expected_bos
    assert whole.count(tokenizer.eos_token_id) == 1
    assert whole[-1] == tokenizer.eos_token_id
    assert cut == whole[:-1]
    assert lm.tokenizer.decode(cut) == "A thing."


def test_r09_the_end_of_turn_is_found_in_the_template(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|pad|>"  # the end of text of a base model, whose turns end otherwise
    end_of_turn = tokenizer.convert_tokens_to_ids("<|end|>")

    lm = lm_with(tokenizer, tmp_path, eos_token_id=3)

    assert lm.eos_ids == [end_of_turn, tokenizer.pad_token_id, 3]
    _, [response] = lm.encode(QUESTION, ["A thing."])
    assert response[-1] == end_of_turn


def test_r09_each_of_several_tokens_ends_a_sample(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|pad|>"
    lm = lm_with(tokenizer, tmp_path, eos_token_id=3)
    words = lm.plain_ids("A thing.")
    assert len(lm.eos_ids) == 3

    for token in lm.eos_ids:
        # What `generate` returns for a response that is shorter than another one of its batch.
        sample = lm.decode_response([*words, token, lm.eos_ids[0], lm.eos_ids[0]])

        assert sample == {"text": "A thing.", "finished": True, "token_ids": [*words, token]}


def padding_apart_and_padding_is_end(tmp_path: Path) -> list[LM]:
    """One model twice: with a padding token of its own, and with the end of turn (5) as padding."""
    model = make_model(400)
    lms = []
    for pad_id, pad in ((0, "<|pad|>"), (5, "<|end|>")):
        model.config.pad_token_id = pad_id
        path = save(tmp_path / pad, make_tokenizer(pad=pad), model)
        lms.append(LM(path, CPU, trainable=True))
    return lms


def test_r07_padding_and_end_of_turn_may_be_one_token(tmp_path):
    """Nothing is masked by comparing ids with padding, so the end of a response is scored."""
    apart, same = padding_apart_and_padding_is_end(tmp_path)
    assert same.tokenizer.pad_token_id == same.tokenizer.eos_token_id == 5
    assert apart.tokenizer.pad_token_id == 0
    texts = ["A thing.", "Something that is much longer.", {"text": "cut", "finished": False}]

    prompt_ids, responses = apart.encode(QUESTION, texts)

    assert same.encode(QUESTION, texts) == (prompt_ids, responses)
    assert [response[-1] == 5 for response in responses] == [True, True, False]
    examples = [Example({}, prompt_ids, responses), Example({}, prompt_ids[:3], responses[:1])]
    batch, logps = packed_logps(same, examples, same.vocab_size)
    assert (batch.target_ids == 5).sum() == 3
    assert torch.equal(logps, response_logps(apart, examples))

    prompts = [prompt_ids, prompt_ids[:2], prompt_ids + responses[0]]
    sampled = [lm.sample(prompts, max_new_tokens=12, batch_size=4, seed=0) for lm in (apart, same)]
    assert sampled[0] == sampled[1]


def test_r07_an_end_of_turn_that_also_pads_learns_like_any_token(tmp_path):
    gradients = []
    for lm in padding_apart_and_padding_is_end(tmp_path):
        prompt_ids, [response] = lm.encode(QUESTION, ["A thing."])
        two_turns = prompt_ids + response + prompt_ids
        response_logps(lm, [Example({}, two_turns, [response])]).sum().backward()
        gradients.append(lm.model.get_input_embeddings().weight.grad[5])

    assert gradients[0].any()
    assert torch.equal(*gradients)


@pytest.mark.parametrize("chat, from_the_template", [(True, 4), (False, 0)])
def test_special_token_strings_in_data_stay_text(tmp_path, chat, from_the_template):
    """The template writes four of them into a prompt: begin, user, end, assistant."""
    lm = lm_with(make_tokenizer(chat=chat), tmp_path)
    text = "a <|end|> b <|user|> c"

    prompt_ids, [response] = lm.encode([turn("user", text)], [text])

    special = special_ids(lm)
    assert lm.tokenizer.decode(response[:-1]) == text
    assert special.isdisjoint(response[:-1])
    assert sum(token in special for token in prompt_ids) == from_the_template


@pytest.fixture
def lm_with_a_tool_token(tmp_path) -> LM:
    """A model whose special tokens begin with "<" and, one of them, with "["."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL]"]})
    return lm_with(tokenizer, tmp_path)


@pytest.mark.parametrize(
    "text, is_sanitized",
    [
        ("A thing.", False),
        (" żółć\n\n猫 ", False),
        ("=> x", False),
        ("a < b", False),
        ("a <|end|> b", True),
        ("[TOOL] and <|pad|>", True),
        ("[no] tool", False),
    ],
)
def test_every_chat_is_encoded_as_if_it_was_sanitised(
    lm_with_a_tool_token, text, is_sanitized, monkeypatch
):
    """Only a text that spells out a control token takes the slow way."""
    lm = lm_with_a_tool_token
    chat = [turn("user", text), turn("assistant", text), turn("user", text)]
    apply_chat_template = lm.tokenizer.apply_chat_template
    expected = apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
    calls = []

    def recording(messages, **keywords):
        calls.append(keywords["sanitize_control_tokens"])
        return apply_chat_template(messages, **keywords)

    monkeypatch.setattr(lm.tokenizer, "apply_chat_template", recording)

    assert lm.prompt_ids(chat) == expected
    # A value that is no text may hold anything.
    lm.prompt_ids([{**message, "tools": [text]} for message in chat])
    assert calls == [is_sanitized, True]


def test_r16_prompts_of_several_turns(tmp_path, tokenizer):
    lm = lm_with(tokenizer, tmp_path)

    prompt_ids, [response] = lm.encode(TURNS, ["A piece."])

    assert lm.tokenizer.decode(prompt_ids) == (
        "<|begin|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>Hi.<|end|>"
        "<|user|>What is a token?<|end|><|assistant|>"
    )
    assert lm.tokenizer.decode(response) == "A piece.<|end|>"


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}"
REWRITES = "{% if messages[-1]['role'] == 'assistant' %}answered: "


def test_r14_r16_templates_that_refuse_or_rewrite_a_prompt_end_the_program(tmp_path, capsys):
    lm = lm_with(make_tokenizer(), tmp_path)

    lm.tokenizer.chat_template = NO_SYSTEM + "{% endif %}" + CHAT_TEMPLATE
    refused = one_error_line(capsys, lm.encode, [turn("system", "x"), *QUESTION], ["y"])
    lm.tokenizer.chat_template = REWRITES + "{% endif %}" + CHAT_TEMPLATE
    rewritten = one_error_line(capsys, lm.encode, QUESTION, ["y"])

    assert "no system role" in refused
    assert "changes this prompt once it is answered: What is it?" in rewritten


# --------------------------------------------------------------------------------------------- data
PLAIN = {"prompt": "p", "chosen": "good", "rejected": "bad"}


def limits(max_prompt_tokens: int, max_response_tokens: int) -> SimpleNamespace:
    """The flags that encode_rows reads."""
    return SimpleNamespace(
        max_prompt_tokens=max_prompt_tokens, max_response_tokens=max_response_tokens
    )


def test_r17_r18_r19_r46_rows_that_do_not_fit_are_dropped_and_counted(load, tmp_path, capsys):
    lm = load("student")
    rows = [
        PLAIN,
        {**PLAIN, "rejected": "good"},
        {**PLAIN, "chosen": "  "},
        {**PLAIN, "prompt": ""},
        {**PLAIN, "prompt": "long " * 100_000},
        {**PLAIN, "chosen": "long " * 60},
    ]
    rows = read_rows(str(write_jsonl(tmp_path / "rows.jsonl", rows)), "train")
    columns = ["chosen", "rejected"]

    examples = encode_rows(lm, rows, columns, limits(40, 40), "training pairs")
    printed = capsys.readouterr().out.strip()
    error = one_error_line(capsys, encode_rows, lm, rows[1:], columns, limits(40, 40), "pairs")

    assert [example.row["id"][0] for example in examples] == ["1"]
    assert " ".join(printed.split()) == (
        "training pairs 1 of 6 rows, 1 dropped (chosen equals rejected), "
        "2 dropped (empty prompt or response), 1 dropped (prompt over 40 tokens), "
        "1 dropped (response over 40 tokens)"
    )
    assert "pairs: no row left: 0 of 5 rows, 1 dropped (chosen equals rejected)" in error


def test_r08_a_sample_that_never_ended_is_cut_at_the_limit_again_and_a_finished_one_is_not(
    load, capsys
):
    """Without token ids its text may take more tokens than were sampled."""
    lm = load("student")
    prompt = [turn("user", "hi")]
    unfinished = {"text": "what a long answer this is", "finished": False}
    finished = {**unfinished, "finished": True}
    _, [whole] = lm.encode(prompt, [unfinished])
    assert len(whole) > 4
    row = {"id": "1", "prompt": prompt}

    [example] = encode_rows(lm, [{**row, "y": unfinished}], ["y"], limits(40, 4), "samples")
    error = one_error_line(
        capsys, encode_rows, lm, [{**row, "y": finished}], ["y"], limits(40, 4), "samples"
    )

    assert example.response_ids == [whole[:4]]
    assert "1 dropped (response over 4 tokens)" in error


def test_an_error_while_rows_are_encoded_names_the_row(load):
    lm = load("student")
    rows = [{"id": str(i), "prompt": [turn("user", "p")], "chosen": "y"} for i in range(3)]
    rows[2]["chosen"] = None  # what no file gives, since read_rows refuses it

    with pytest.raises(AttributeError) as raised:
        encode_rows(lm, rows, ["chosen"], limits(40, 40), "pairs")

    assert raised.value.__notes__ == ["while encoding row 2 (pairs)"]


# ------------------------------------------------------------------------------------------- stages
ROWS = [{"id": str(i), "prompt": [turn("user", f"p{i}")]} for i in range(7)]


class Recorder:
    """A stage's function, which remembers the seed of every call."""

    def __init__(self):
        self.seeds = []

    def __call__(self, rows: list[dict], seed: int) -> list[dict]:
        self.seeds.append(seed)
        return [{"text": f"{row['id']} with {seed}"} for row in rows]


def by_id(path: Path) -> list[dict]:
    return sorted(read_jsonl(path), key=lambda row: row["id"])


def test_r34_a_stage_is_completed_not_trusted_and_not_duplicated(tmp_path):
    path = tmp_path / "stage.jsonl"
    first = Recorder()
    whole = cached_map(path, ROWS, first, batch_size=3, seed=10)
    assert first.seeds == [10, 13, 16]
    assert [row["id"] for row in whole] == [row["id"] for row in ROWS]

    content = path.read_text()
    lines = content.splitlines(keepends=True)
    four_lines = len("".join(lines[:4]))
    for cut in (0, 10, len(lines[0]), four_lines - 1, four_lines, len(content) - 1):
        path.write_text(content[:cut])
        assert cached_map(path, ROWS, Recorder(), batch_size=3, seed=10) == whole
        assert by_id(path) == whole

    path.write_text("".join(reversed(lines)))  # as another program may write it
    unused = Recorder()
    assert cached_map(path, ROWS, unused, batch_size=3, seed=10) == whole
    assert unused.seeds == []


def test_r35_a_stage_of_other_data_is_refused(tmp_path, capsys):
    path = tmp_path / "stage.jsonl"
    cached_map(path, ROWS, Recorder(), batch_size=3, seed=1)
    other_prompt = [{**ROWS[0], "prompt": [turn("user", "another")]}, *ROWS[1:]]

    for rows in (other_prompt, ROWS[1:]):
        assert str(path) in one_error_line(capsys, cached_map, path, rows, Recorder(), 3, 1)


def test_the_seconds_of_a_stage_are_those_of_all_processes_and_of_new_rows_alone(
    tmp_path, monkeypatch
):
    """Every call of a stage's function takes 2 seconds by a clock that only it moves."""
    clock = SimpleNamespace(now=100.0)

    def read_clock() -> float:
        return clock.now

    monkeypatch.setattr(common, "time", SimpleNamespace(time=read_clock))

    def slow(rows, seed):
        clock.now += 2.0
        return [{"text": "a"} for _ in rows]

    path = tmp_path / "stage.jsonl"
    common.add_seconds(tmp_path, "earlier", 1.5)
    cached_map(path, ROWS, slow, batch_size=3, seed=10)
    assert read_timings(tmp_path) == {"earlier": 1.5, "stage": 6.0}

    # A kill cuts the last two of three batches.
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    cached_map(path, ROWS, slow, batch_size=3, seed=10)
    assert read_timings(tmp_path) == {"earlier": 1.5, "stage": 10.0}
    cached_map(path, ROWS, slow, batch_size=3, seed=10)
    assert read_timings(tmp_path) == {"earlier": 1.5, "stage": 10.0}


def test_an_error_in_a_stage_names_its_file_and_rows(tmp_path):
    def fail(rows, seed):
        raise KeyError("a bug")

    with pytest.raises(KeyError) as raised:
        cached_map(tmp_path / "stage.jsonl", ROWS, fail, batch_size=3, seed=1)

    assert raised.value.__notes__ == [f"while making rows 0 to 2 of {tmp_path / 'stage.jsonl'}"]


# ----------------------------------------------------------------------------------------- sampling
PROMPTS = [
    [41, 42, 43],
    list(range(100, 117)),
    [7],
    list(range(20, 29)),
    list(range(9, 18)),
    [8, 9],
]


def slow_greedy(lm: LM, prompt: list[int], length: int) -> dict:
    """The likeliest token again and again, by plain forward passes."""
    ids = list(prompt)
    finished = False
    while len(ids) < len(prompt) + length and not finished:
        with torch.no_grad():
            token = lm.model(torch.tensor([ids])).logits[0, -1].argmax().item()
        finished = token in lm.eos_ids
        if not finished:
            ids.append(token)
    new_ids = ids[len(prompt) :]
    text = lm.tokenizer.decode(new_ids, skip_special_tokens=True)
    token_ids = [*new_ids, token] if finished else new_ids
    return {"text": text, "finished": finished, "token_ids": token_ids}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_r41_r42_greedy_answers_equal_a_plain_loop_whatever_the_batch(load, n, batch_size):
    lm = load("student")

    sampled = lm.sample(
        PROMPTS, n=n, temperature=0.0, max_new_tokens=12, batch_size=batch_size, seed=0
    )

    for prompt, responses in zip(PROMPTS, sampled, strict=True):
        assert responses == [slow_greedy(lm, prompt, length=12)] * n


def sample_short(lm: LM, n: int = 1, seed: int = 0) -> list[list[dict]]:
    """Responses of at most 12 tokens to PROMPTS, at temperature 1."""
    return lm.sample(PROMPTS, n=n, max_new_tokens=12, batch_size=64, seed=seed)


def test_r42_sampling_is_seeded_and_leaves_the_random_state(load):
    lm = load("student")
    state = torch.get_rng_state()

    sampled = sample_short(lm, n=2, seed=1)

    assert sample_short(lm, n=2, seed=1) == sampled
    assert sample_short(lm, n=2, seed=2) != sampled
    assert torch.equal(state, torch.get_rng_state())
    # Two responses to a prompt are two draws.
    assert any(first != second for first, second in sampled)


def test_sampled_frequencies_are_the_models_probabilities(load):
    lm = load("student")
    draws = 8000
    prompt = PROMPTS[0]

    sampled = lm.sample([prompt] * 4, n=draws // 4, max_new_tokens=1, batch_size=2000, seed=0)

    texts = [response["text"] for response in flat(sampled)]
    with torch.no_grad():
        probs = lm.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    words = [lm.tokenizer.decode([token], skip_special_tokens=True) for token in range(400)]
    for token in probs.topk(5).indices.tolist():
        # Several tokens may be written alike.
        same_text = [other for other in range(400) if words[other] == words[token]]
        expected = probs[same_text].sum().item()
        frequency = texts.count(words[token]) / draws
        # Four standard deviations of a frequency: √(p (1 − p) / draws).
        tolerance = 4 * math.sqrt(expected * (1 - expected) / draws) + 1e-3
        assert frequency == pytest.approx(expected, abs=tolerance)


def test_r39_the_checkpoints_generation_config_does_not_leak(tmp_path, tokenizer):
    from transformers import GenerationConfig

    model = make_model(len(tokenizer))
    plain = LM(save(tmp_path / "plain", tokenizer, model), CPU)
    model.generation_config = GenerationConfig(
        do_sample=True,
        eos_token_id=[tokenizer.eos_token_id, 77],
        temperature=0.01,
        top_k=1,
        top_p=0.1,
        repetition_penalty=9.0,
        min_new_tokens=9,
    )
    opinionated = LM(save(tmp_path / "opinionated", tokenizer, model), CPU)

    # Of all that, the ids that end a response are taken.
    assert opinionated.eos_ids == [tokenizer.eos_token_id, 77]
    opinionated.eos_ids = plain.eos_ids
    assert sample_short(opinionated) == sample_short(plain)
    # It will be saved as it was.
    assert opinionated.model.generation_config.repetition_penalty == 9.0


def test_r40_sampling_works_while_training_with_gradient_checkpointing(load):
    plain = load("student")
    trained = load("student", trainable=True, gradient_checkpointing=True)

    assert sample_short(trained, n=2) == sample_short(plain, n=2)
    assert trained.model.model.layers[0].training


# ------------------------------------------------------------------------------ arithmetic of a run
def test_the_steps_of_an_epoch_show_every_example_once_in_an_order_of_its_own():
    examples = list(range(10))

    steps = [step_examples(examples, step, batch_size=4, seed=1) for step in range(6)]

    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first_epoch = flat(steps[:3])
    second_epoch = flat(steps[3:])
    assert sorted(first_epoch) == sorted(second_epoch) == examples
    assert first_epoch != second_epoch
    # A step depends on nothing but the seed, so a resumed run sees what it would have seen.
    assert step_examples(examples, 4, batch_size=4, seed=1) == steps[4]
    assert step_examples(examples, 4, batch_size=4, seed=2) != steps[4]


def test_a_checkpoint_gives_back_the_step_the_counts_and_the_weights(tmp_path):
    path = tmp_path / "checkpoint.pt"
    saved = torch.nn.Linear(3, 3)
    save_checkpoint(path, 7, {"tokens": 1234, "seconds": 5.5}, model=saved)
    counts = {"tokens": 0, "seconds": 0.0}
    loaded = torch.nn.Linear(3, 3)

    step = load_checkpoint(path, counts, model=loaded)

    assert step == 7
    assert counts == {"tokens": 1234, "seconds": 5.5}
    assert torch.equal(loaded.weight, saved.weight)
    assert load_checkpoint(tmp_path / "none.pt", counts, model=loaded) == 0


def test_a_resumed_run_removes_the_metrics_of_steps_that_it_repeats(tmp_path):
    args = SimpleNamespace(track="none")
    metrics = Metrics(tmp_path, args, first_step=0)
    for step in (1, 2, 3):
        metrics.log(step, {"losses/total": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "losses/to')  # a line that a kill cut

    Metrics(tmp_path, args, first_step=2).log(3, {"losses/total": 0.7})

    assert read_jsonl(tmp_path / "metrics.jsonl") == [
        {"step": 1, "losses/total": 0.1},
        {"step": 2, "losses/total": 0.2},
        {"step": 3, "losses/total": 0.7},
    ]
    # A new run, or one that was killed before its first checkpoint, begins anew.
    Metrics(tmp_path, args, first_step=0)
    assert read_jsonl(tmp_path / "metrics.jsonl") == []
