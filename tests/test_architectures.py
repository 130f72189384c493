"""Packed rows against the model's own forward pass, on tiny random models of the usual families."""

from pathlib import Path

import pytest
import torch
import transformers
from conftest import packed_logps, plain_log_probs, random_examples, save

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
