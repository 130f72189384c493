"""Packed rows against the model's own forward pass, on tiny random models of the usual families."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import one_error_line, packed_logps, plain_log_probs, random_examples, save

import common
from common import LM, Example, mean_per_response, pack, per_token

CPU = torch.device("cpu")
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 5,
}
GPT2_SHAPE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
GEMMA_SHAPE = {**SHAPE, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}
GRANITE_SHAPE = {
    **SHAPE,
    "logits_scaling": 3.0,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
}
FAMILIES = {
    "Llama": SHAPE,
    "Qwen2": SHAPE,
    "Qwen3": {**SHAPE, "head_dim": 8},
    "Gemma2": GEMMA_SHAPE,
    "Gemma3Text": GEMMA_SHAPE,
    "Mistral": SHAPE,
    "Olmo2": SHAPE,
    "Phi3": SHAPE,
    "SmolLM3": SHAPE,
    "Granite": GRANITE_SHAPE,
    "GPT2": GPT2_SHAPE,
    "GPTNeoX": SHAPE,
}
MODEL_CLASSES = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
SHAPES = [(7, [5, 3]), (2, [1, 9]), (12, [4, 4])]


def make_family(family: str, vocab_size: int, *, tied: bool) -> transformers.PreTrainedModel:
    """A random model of a family, whose LM head may be its embeddings."""
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(vocab_size=vocab_size, tie_word_embeddings=tied, **FAMILIES[family])
    model_class = MODEL_CLASSES.get(family, f"{family}ForCausalLM")
    return getattr(transformers, model_class)(config).eval()


def load_family(family: str, folder: Path, tokenizer, *, tied: bool = True, **keywords) -> LM:
    """A random model of a family as a script loads it."""
    model = make_family(family, len(tokenizer), tied=tied)
    return LM(save(folder, tokenizer, model), CPU, **keywords)


def all_log_probs(_, log_probs: torch.Tensor) -> torch.Tensor:
    """A function for per_token that returns what it is given: [N, V]."""
    return log_probs


def packed_log_probs(lm: LM, examples: list[Example]) -> torch.Tensor:
    """[N, V]: the log-probs of all tokens at every position that predicts a response token."""
    batch = pack(examples, lm)
    return per_token(
        all_log_probs,
        batch.target_ids,
        [lm],
        [lm.hidden_states(batch)[batch.predict_index]],
        vocab_size=lm.vocab_size,
        chunk_size=10**6,
    )


def own_log_probs(lm: LM, examples: list[Example]) -> torch.Tensor:
    """[N, V] in float64: the same from a plain forward pass for each response."""
    log_probs = []
    for example in examples:
        for response in example.response_ids:
            log_probs.append(plain_log_probs(lm.model, example.prompt_ids, response, lm.vocab_size))
    return torch.cat(log_probs)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_r48_packed_log_probs_equal_the_models_own(family, tied, tmp_path, tokenizer, capsys):
    lm = load_family(family, tmp_path, tokenizer, tied=tied)
    examples = random_examples(lm.vocab_size, SHAPES)

    log_probs = packed_log_probs(lm, examples)

    expected = own_log_probs(lm, examples)
    torch.testing.assert_close(log_probs.double(), expected, atol=2e-4, rtol=1e-4)
    is_noted = "row per response" in capsys.readouterr().out
    assert is_noted == (not lm.share_prefix)


def test_r48_most_families_share_the_prefix(tmp_path, tokenizer):
    """A row per response is correct as well, but slow. None of these families needs it."""
    for family in FAMILIES:
        lm = load_family(family, tmp_path / family, tokenizer)
        assert lm.share_prefix, family


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2"])
def test_r32_bfloat16_stays_within_stated_bounds_of_float32(family, tmp_path, tokenizer):
    """A token's log-probs are off by less than 0.05 nats, weighted by their probability."""
    exact = load_family(family, tmp_path, tokenizer)
    rounded = LM(tmp_path, CPU)
    rounded.model.to(torch.bfloat16)
    examples = random_examples(exact.vocab_size, SHAPES)

    exact_log_probs = packed_log_probs(exact, examples)
    rounded_log_probs = packed_log_probs(rounded, examples)

    assert rounded_log_probs.dtype == torch.float32
    differences = (exact_log_probs - rounded_log_probs).abs()  # [N, V]
    weighted = (exact_log_probs.exp() * differences).sum(-1)  # [N]
    assert weighted.mean() < 0.05


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_r30_log_softmax_is_float32_for_bfloat16_models(family, tmp_path, tokenizer):
    """Against float64 on the very same logits, the error is that of float32, not of bfloat16."""
    lm = load_family(family, tmp_path, tokenizer)
    lm.model.to(torch.bfloat16)
    examples = random_examples(lm.vocab_size, [(7, [5, 3])])

    log_probs = packed_log_probs(lm, examples)

    batch = pack(examples, lm)
    logits = lm.logits(lm.hidden_states(batch)[batch.predict_index], lm.vocab_size)
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(log_probs.double(), exact, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_give_finite_log_probs_and_gradients(scale, tmp_path, tokenizer):
    lm = load_family("Llama", tmp_path, tokenizer, tied=False, trainable=True)
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(scale)

    _, logps = packed_logps(lm, random_examples(lm.vocab_size, [(3, [4, 2])]), lm.vocab_size)
    logps.sum().backward()

    assert logps.isfinite().all()
    gradients = [parameter.grad for parameter in lm.model.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
    assert lm.model.lm_head.weight.grad.isfinite().all()


def test_answers_of_one_and_of_two_thousand_tokens_in_one_batch(tmp_path, tokenizer):
    lm = load_family("Llama", tmp_path, tokenizer)
    examples = random_examples(lm.vocab_size, [(3, [1, 2000]), (2, [1, 1])])

    batch, logps = packed_logps(lm, examples, lm.vocab_size)

    sums = (mean_per_response(logps, batch) * batch.lengths).tolist()
    expected = []
    for example in examples:
        for response in example.response_ids:
            log_probs = own_log_probs(lm, [Example({}, example.prompt_ids, [response])])
            expected.append(log_probs.gather(-1, torch.tensor(response)[:, None]).sum().item())
    for measured, exact in zip(sums, expected, strict=True):
        assert abs(measured - exact) < 1e-5 * abs(exact) + 1e-3


def test_r03_a_model_whose_sizes_are_nested_under_a_text_config(tmp_path, tokenizer):
    """Gemma 3 with images keeps its language model's vocabulary under `text_config`."""
    config = transformers.Gemma3Config(
        text_config={**GEMMA_SHAPE, "vocab_size": len(tokenizer)},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    assert not hasattr(config, "vocab_size")
    model = transformers.Gemma3ForConditionalGeneration(config)

    lm = LM(save(tmp_path, tokenizer, model), CPU)

    assert lm.vocab_size == len(tokenizer)
    examples = random_examples(lm.vocab_size, [(7, [5, 3]), (2, [1, 9])])
    expected = own_log_probs(lm, examples)
    log_probs = packed_log_probs(lm, examples).double()
    torch.testing.assert_close(log_probs, expected, atol=2e-4, rtol=1e-4)


# ------------------------------------------------ what a model must not do: noise, windows, padding
MOE = {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}
GPT_NEO = {
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 2]],
    "window_size": 16,
    "max_position_embeddings": 128,
    "intermediate_size": 64,
}
LLAMA_4 = {
    **SHAPE,
    "intermediate_size_mlp": 64,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 16,
}
DEEPSEEK_V32 = {
    **SHAPE,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "index_topk": 24,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "max_position_embeddings": 512,
}
DYNAMIC = {
    **SHAPE,
    "max_position_embeddings": 24,
    "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
}
LONGROPE = {
    **SHAPE,
    "max_position_embeddings": 96,
    "original_max_position_embeddings": 24,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 24,
    },
}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "pad_token_id": 0}
OPT = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 64,
    "layerdrop": 0.5,
    "dropout": 0.5,
}
RWKV = {
    "hidden_size": 32,
    "attention_hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "context_length": 128,
}


def load_type(model_type: str, folder: Path, tokenizer, config: dict, **keywords) -> LM:
    """A random model of a type, whose next-token distributions are far from uniform."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **config)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.25)
    return LM(save(folder, tokenizer, model), CPU, **keywords)


NOISY = {
    "phimoe": MOE,  # draws its experts at random in train mode
    "mixtral": {**MOE, "router_jitter_noise": 0.5},
    "opt": OPT,
    "llama": {**SHAPE, "attention_dropout": 0.5},
}


@pytest.mark.parametrize("model_type", NOISY)
def test_r84_nothing_is_random_under_gradient_checkpointing(model_type, tmp_path, tokenizer):
    results = []
    for checkpointing in (False, True, True):
        lm = load_type(
            model_type,
            tmp_path,
            tokenizer,
            NOISY[model_type],
            trainable=True,
            gradient_checkpointing=checkpointing,
        )
        examples = random_examples(lm.vocab_size, SHAPES)
        _, logps = packed_logps(lm, examples, lm.vocab_size)
        logps.sum().backward()
        gradients = [p.grad for p in lm.model.parameters() if p.grad is not None]
        results.append([logps.detach(), *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_r84_noise_of_nested_configs_is_off():
    config = transformers.DbrxConfig(
        ffn_config={"moe_jitter_eps": 0.1}, attn_config={"attn_pdrop": 0.1}, resid_pdrop=0.1
    )
    common.switch_noise_off(config)
    assert config.ffn_config.moe_jitter_eps == config.attn_config.attn_pdrop == 0
    assert config.resid_pdrop == 0


def test_r84_layers_are_computed_again_in_the_backward_pass(tmp_path, tokenizer):
    calls = []
    lm = load_family("Llama", tmp_path, tokenizer, trainable=True, gradient_checkpointing=True)
    mlp = lm.model.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda *_: calls.append(mlp.training))
    _, logps = packed_logps(lm, random_examples(lm.vocab_size, SHAPES), lm.vocab_size)
    assert calls == [False]
    logps.sum().backward()
    assert calls == [False, False]


def test_r84_an_architecture_with_noise_of_its_own_is_refused(
    tmp_path, tokenizer, monkeypatch, capsys
):
    path = save(tmp_path, tokenizer, make_family("Llama", len(tokenizer), tied=True))
    mlp = transformers.models.llama.modeling_llama.LlamaMLP
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: forward(self, x) + 1e-5 * torch.rand(1))
    assert "its forward pass is random" in one_error_line(capsys, LM, path, CPU)


WINDOWED = {"gpt_neo": GPT_NEO, "llama4_text": LLAMA_4, "gpt_oss": {**MOE, "sliding_window": 16}}


@pytest.mark.parametrize("model_type", WINDOWED)
def test_r85_packed_rows_within_and_beyond_windows_of_any_name(model_type, tmp_path, tokenizer):
    lm = load_type(model_type, tmp_path, tokenizer, WINDOWED[model_type])
    for shapes in ([(4, [5, 5])], [(6, [8, 9]), (2, [3, 4])], [(14, [10, 30]), (2, [1, 3])]):
        examples = random_examples(lm.vocab_size, shapes)
        log_probs = packed_log_probs(lm, examples).double()
        expected = own_log_probs(lm, examples)
        torch.testing.assert_close(log_probs, expected, atol=2e-4, rtol=1e-4)
    # What fits the window is one row.
    batch = pack(random_examples(lm.vocab_size, [(4, [5, 5])]), lm)
    assert batch.input_ids.shape == (1, 14)


# Names that sound like windows and are none.
NO_WINDOWS = {"max_window_layers", "use_sliding_window", "_sliding_window_pattern"}
NO_WINDOWS |= {"sliding_window_pattern", "prefix_dense_sliding_window_pattern"}


def test_r85_the_windows_of_all_architectures_of_transformers_are_known():
    """A new release may bring another name."""
    names = set()
    for config_class in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        names |= set(inspect.signature(config_class.__init__).parameters)
        names |= set(vars(config_class)) | set(getattr(config_class, "__annotations__", {}))
    windows = {name for name in names if re.search("window|attention_chunk|index_topk$", name)}
    assert {"sliding_window", "window_size", "attention_chunk_size", "index_topk"} <= windows
    assert windows - NO_WINDOWS <= {"sliding_window", *common.WINDOWS}


LIMITED = {
    "llama": (DYNAMIC, "dynamic rotary embeddings change"),
    "phi3": (LONGROPE, "longrope rotary embeddings change"),
    "deepseek_v32": (DEEPSEEK_V32, "sparse attention looks at padding"),
}


@pytest.mark.parametrize("model_type", LIMITED)
def test_r85_rows_that_would_change_with_their_neighbours_are_refused(
    model_type, tmp_path, tokenizer, capsys
):
    config, reason = LIMITED[model_type]
    lm = load_type(model_type, tmp_path, tokenizer, config)
    # Up to the limit all is well, also where a packed row is longer.
    examples = random_examples(lm.vocab_size, [(4, [20, 20, 20]), (2, [1, 3])])
    log_probs = packed_log_probs(lm, examples).double()
    torch.testing.assert_close(log_probs, own_log_probs(lm, examples), atol=2e-4, rtol=1e-4)

    longer = random_examples(lm.vocab_size, [(5, [20])])
    assert reason in one_error_line(capsys, pack, longer, lm)
    prompts = [longer[0].prompt_ids]
    limits = {"max_new_tokens": 20, "batch_size": 1, "seed": 0}
    assert reason in one_error_line(capsys, lm.sample, prompts, **limits)


def test_r85_a_model_whose_rows_look_at_each_other_is_refused(
    tmp_path, tokenizer, monkeypatch, capsys
):
    path = save(tmp_path, tokenizer, make_family("Llama", len(tokenizer), tied=True))
    mlp = transformers.models.llama.modeling_llama.LlamaMLP
    forward = mlp.forward

    def mean_over_the_batch(self, x):
        return forward(self, x - 0.1 * x.mean(0, keepdim=True))

    monkeypatch.setattr(mlp, "forward", mean_over_the_batch)
    assert "rows of a batch see each other" in one_error_line(capsys, LM, path, CPU)


def expect_greedy_alone(lm: LM):
    """Greedy responses in a batch are those of a plain loop without a cache."""
    lm.eos_ids = lm.eos_ids[:1]
    shapes = [(4, [1]), (11, [1]), (7, [1]), (4, [1])]
    prompts = [example.prompt_ids for example in random_examples(lm.vocab_size, shapes)]
    settings = {"temperature": 0.0, "max_new_tokens": 6, "seed": 0}
    together = lm.sample(prompts, n=2, batch_size=8, **settings)
    for prompt, responses in zip(prompts, together, strict=True):
        expected = []
        while len(expected) < 6 and expected[-1:] != lm.eos_ids:
            with torch.no_grad():
                logits = lm.model(torch.tensor([prompt + expected])).logits[0, -1]
            expected.append(logits[: lm.vocab_size].argmax().item())
        assert [response["token_ids"] for response in responses] == [expected, expected]


def test_r86_a_model_without_a_state_for_each_prompt_samples_one_at_a_time(
    tmp_path, tokenizer, capsys
):
    lm = load_type("rwkv", tmp_path, tokenizer, RWKV)
    expect_greedy_alone(lm)
    assert lm.samples_together == "single"
    assert capsys.readouterr().out.count("samples one response at a time") == 1


def test_r86_a_model_that_reads_padding_samples_prompts_of_one_length(
    tmp_path, tokenizer, monkeypatch, capsys
):
    lm = load_family("Llama", tmp_path, tokenizer)
    forward = type(lm.model).forward

    def without_mask(self, *args, attention_mask=None, position_ids=None, **keywords):
        return forward(self, *args, **keywords)

    monkeypatch.setattr(type(lm.model), "forward", without_mask)
    expect_greedy_alone(lm)
    assert lm.samples_together == "one length"
    assert capsys.readouterr().out.count("samples prompts of one length") == 1


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPT2"])
def test_r86_usual_models_sample_all_prompts_together(family, tmp_path, tokenizer, capsys):
    lm = load_family(family, tmp_path, tokenizer)
    expect_greedy_alone(lm)
    assert lm.samples_together == "any"
    assert capsys.readouterr().out == ""


def test_r87_architectures_that_lack_an_argument_or_a_base_model_are_scored(tmp_path, tokenizer):
    """MPT takes no positions, and its logit_scale is None. Llama 4's base_model is the whole."""
    for model_type, config in {"mpt": MPT, "llama4_text": LLAMA_4}.items():
        lm = load_type(model_type, tmp_path / model_type, tokenizer, config)
        examples = random_examples(lm.vocab_size, SHAPES)
        expected = own_log_probs(lm, examples)
        log_probs = packed_log_probs(lm, examples).double()
        torch.testing.assert_close(log_probs, expected, atol=2e-4, rtol=1e-4)


def test_r87_a_refusal_names_the_error_of_the_forward_pass(
    tmp_path, tokenizer, monkeypatch, capsys
):
    path = save(tmp_path, tokenizer, make_family("Llama", len(tokenizer), tied=True))

    def fail(*_, **__):
        raise RuntimeError("a kernel is missing")

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", fail)
    line = one_error_line(capsys, LM, path, CPU)
    assert "LlamaForCausalLM" in line and "RuntimeError: a kernel is missing" in line


def test_r87_an_adapter_beside_a_model_is_refused(tmp_path, tokenizer, capsys):
    path = save(tmp_path, tokenizer, make_family("Llama", len(tokenizer), tied=True))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "adapter_config.json" in one_error_line(capsys, LM, path, CPU)


def test_r87_a_teacher_that_was_taught_with_another_template_is_noted(
    tmp_path, checkpoints, tokenizer, capsys
):
    student = LM(checkpoints["student"], CPU)
    teacher = LM(checkpoints["teacher"], CPU)
    common.shared_vocab_size(student, teacher)
    assert capsys.readouterr().out == ""

    teacher.tokenizer.chat_template = (
        "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}### assistant: {% endif %}"
    )
    other = LM(save(tmp_path, teacher.tokenizer, teacher.model), CPU)
    common.shared_vocab_size(student, other)
    note = capsys.readouterr().out
    assert note.startswith(f"note: {other.path} has another chat template than {student.path}")
