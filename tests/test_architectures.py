"""The shared-prefix layout against the model's own forward pass, on tiny random models of the families people use."""

import pytest
import torch
import transformers
from conftest import plain_log_probs, random_examples, save

from common import LM, pack, per_token, response_means, target_logps

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SHAPE |= {
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 5,
}
HEAD = {"head_dim": 8}
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": HEAD,
    "Gemma2": HEAD | {"query_pre_attn_scalar": 8, "sliding_window": 64},
    "Gemma3Text": HEAD | {"query_pre_attn_scalar": 8, "sliding_window": 64},
    "Mistral": {},
    "Olmo2": {},
    "Phi3": {},
    "SmolLM3": {},
    "Granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "GPT2": {},
    "GPTNeoX": {},
}


def build(family: str, vocab_size: int, tied: bool) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    shape = SHAPE | FAMILIES[family]
    if family == "GPT2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocab_size, tie_word_embeddings=tied, **shape
    )
    name = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}.get(
        family, f"{family}ForCausalLM"
    )
    return getattr(transformers, name)(config).eval()


def packed_log_probs(lm: LM, examples) -> tuple[torch.Tensor, torch.Tensor]:
    """([N, V] log-probs of a packed batch, [R] summed log-probs)."""
    batch = pack(examples, lm)
    hidden = lm.hidden_states(batch)[batch.source]
    log_probs = per_token(
        lambda _, values: values, batch.target_ids, [(lm, hidden)], lm.vocab_size, 10**6
    )
    logps = target_logps(batch.target_ids, log_probs)
    return log_probs, response_means(logps, batch.response_of, batch.lengths) * batch.lengths


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_r48_packed_log_probs_equal_the_models_own(family, tied, tmp_path, tokenizer, capsys):
    lm = LM(save(tmp_path, tokenizer, build(family, len(tokenizer), tied)), torch.device("cpu"))
    examples = random_examples(lm.vocab_size, [(7, [5, 3]), (2, [1, 9]), (12, [4, 4])])
    log_probs, _ = packed_log_probs(lm, examples)
    own = [
        plain_log_probs(lm.model, e.prompt, r, lm.vocab_size) for e in examples for r in e.responses
    ]
    torch.testing.assert_close(log_probs.double(), torch.cat(own), atol=2e-4, rtol=1e-4)
    assert lm.share_prefix == ("row per response" not in capsys.readouterr().out)


def test_r48_most_families_share_the_prefix(tmp_path, tokenizer):
    """Falling back to a row per response is correct but slow: none of these needs it."""
    for family in FAMILIES:
        lm = LM(
            save(tmp_path / family, tokenizer, build(family, len(tokenizer), True)),
            torch.device("cpu"),
        )
        assert lm.share_prefix, family


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2"])
def test_r32_bfloat16_stays_within_stated_bounds_of_float32(family, tmp_path, tokenizer):
    """Log-probs are off by less than 0.05 nats per token, weighted by probability (docs/reliability.md)."""
    path = save(tmp_path, tokenizer, build(family, len(tokenizer), True))
    exact = LM(path, torch.device("cpu"))
    rounded = LM(path, torch.device("cpu"))
    rounded.model.to(torch.bfloat16)
    examples = random_examples(exact.vocab_size, [(7, [5, 3]), (2, [1, 9]), (12, [4, 4])])
    ours, theirs = packed_log_probs(exact, examples)[0], packed_log_probs(rounded, examples)[0]
    assert theirs.dtype == torch.float32
    difference = (ours - theirs).abs() * ours.exp()
    assert difference.sum(-1).mean() < 0.05


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_r30_log_softmax_is_float32_for_bfloat16_models(family, tmp_path, tokenizer):
    """Against float64 on the very same logits the error is that of float32, not that of bfloat16."""
    lm = LM(save(tmp_path, tokenizer, build(family, len(tokenizer), True)), torch.device("cpu"))
    lm.model.to(torch.bfloat16)
    batch = pack(random_examples(lm.vocab_size, [(7, [5, 3])]), lm)
    hidden = lm.hidden_states(batch)[batch.source]
    exact = lm.logits(hidden, lm.vocab_size).double().log_softmax(-1)
    ours = per_token(
        lambda _, values: values, batch.target_ids, [(lm, hidden)], lm.vocab_size, 10**6
    )
    torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_give_finite_log_probs_and_gradients(scale, tmp_path, tokenizer):
    lm = LM(
        save(tmp_path, tokenizer, build("Llama", len(tokenizer), False)),
        torch.device("cpu"),
        trains=True,
    )
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(scale)
    _, logps = packed_log_probs(lm, random_examples(lm.vocab_size, [(3, [4, 2])]))
    logps.sum().backward()
    assert logps.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in lm.model.parameters())


def test_answers_of_one_and_of_two_thousand_tokens_in_one_batch(tmp_path, tokenizer):
    model = build("Llama", len(tokenizer), True)
    lm = LM(save(tmp_path, tokenizer, model), torch.device("cpu"))
    examples = random_examples(lm.vocab_size, [(3, [1, 2000]), (2, [1, 1])])
    _, logps = packed_log_probs(lm, examples)
    for (_, prompt, responses), ours in zip(examples, logps.view(-1, 2)):
        for response, value in zip(responses, ours):
            own = plain_log_probs(lm.model, prompt, response, lm.vocab_size)
            exact = own.gather(-1, torch.tensor(response)[:, None]).sum().item()
            assert abs(value.item() - exact) < 1e-5 * abs(exact) + 1e-3


def test_r03_a_model_whose_sizes_are_nested_under_a_text_config(tmp_path, tokenizer):
    """Gemma 3 with images keeps its language model's vocabulary under `text_config`."""
    text = SHAPE | FAMILIES["Gemma3Text"] | {"vocab_size": len(tokenizer)}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    assert not hasattr(config, "vocab_size")
    lm = LM(
        save(tmp_path, tokenizer, transformers.Gemma3ForConditionalGeneration(config)),
        torch.device("cpu"),
    )
    assert lm.vocab_size == len(tokenizer)
    examples = random_examples(lm.vocab_size, [(7, [5, 3]), (2, [1, 9])])
    own = [
        plain_log_probs(lm.model, e.prompt, r, lm.vocab_size) for e in examples for r in e.responses
    ]
    torch.testing.assert_close(
        packed_log_probs(lm, examples)[0].double(), torch.cat(own), atol=2e-4, rtol=1e-4
    )
