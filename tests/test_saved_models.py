"""What other programs read from the models that runs save: scores, dtypes, permissions."""

import json
import os
import stat

import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer, save
from safetensors.torch import load_file
from test_architectures import make_family
from test_rm_distiller import annotations
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from common import LM, load_reward_function, save_model
from rm_distiller import add_reward_head, save_reward_model

CPU = torch.device("cpu")

# The shapes of public templates. ChatML (Qwen2, SmolLM2) ends with a line break, and Qwen3 leaves
# out what earlier turns thought.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|user|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)
QWEN3 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|user|>system\n' + messages[0].content + '<|end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if message.role != 'system' %}
        {{- '<|user|>' + message.role + '\n' + content + '<|end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|user|>assistant\n' }}
{%- endif %}
"""
LLAMA3 = """\
{% for message in messages %}{% set content = '<|user|>' + message['role'] + '<|system|>

' + message['content'] | trim + '<|end|>' %}{% if loop.index0 == 0 %}{% set content = bos_token \
+ content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}\
{{ '<|user|>assistant<|system|>

' }}{% endif %}
"""
# Phi-3 writes one more token behind the end-of-turn, which may be a second end-of-turn. Mistral's
# template writes no begin token here, which its tokenizer adds, and a plain one no end-of-turn.
PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|system|>' }}{% endif %}"
)
WITHOUT_BOS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[I] ' + message['content'] + ' [/I]' }}{% else %}{{ message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
WITHOUT_END = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "Qwen3": QWEN3,
    "Llama 3": LLAMA3,
    "Phi-3": PHI3,
    "Phi-3 with two ends": PHI3.replace("'<|system|>'", "eos_token"),
    "no begin": WITHOUT_BOS,
    "no end": WITHOUT_END,
}
CHATS = [
    [
        {"role": "user", "content": "Name two fish."},
        {"role": "assistant", "content": "cod and carp"},
    ],
    [
        {"role": "user", "content": "Go on"},
        {"role": "assistant", "content": "A token is a piece of text. " * 4},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "x"},
    ],
    [{"role": "user", "content": "def f(x):"}, {"role": "assistant", "content": "return x"}],
]


def tokenizer_with(template: str, **keywords):
    """A tokenizer that adds the begin-of-sequence token itself, as Llama's does."""
    tokenizer = make_tokenizer(**keywords)
    tokenizer.chat_template = template
    begin = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    return tokenizer


def saved_reward_model(model, tokenizer, folder):
    """(folder of the saved reward model, the scores of CHATS before it was saved).

    The scores come from one plain forward pass each.
    """
    lm = LM(save(folder / "student", tokenizer, model), CPU, trainable=True)
    add_reward_head(lm, seed=1)
    expected = []
    for chat in CHATS:
        prompt_ids, [response_ids] = lm.encode(chat[:-1], [chat[-1]["content"]])
        assert response_ids[-1] == tokenizer.eos_token_id
        with torch.no_grad():
            ids = torch.tensor([prompt_ids + response_ids])
            hidden = lm.model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
            expected.append((hidden * lm.model.score.weight[0]).sum().item())
    save_reward_model(lm, folder / "rm")
    return folder / "rm", expected


def trl_grpo(folder) -> list[float]:
    """As TRL's GRPOTrainer scores with a model among its reward_funcs."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    inputs = tokenizer(
        text=texts,
        return_tensors="pt",
        padding=True,
        padding_side="right",
        add_special_tokens=False,
    )
    with torch.inference_mode():
        return model(**inputs).logits[:, 0].tolist()


def trl_reward_trainer(folder) -> list[float]:
    """As TRL's RewardTrainer encodes a conversation: the template gives the token ids."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"] for chat in CHATS]
    inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="right")
    with torch.inference_mode():
        return model(**inputs).logits[:, 0].tolist()


def pipeline_scores(folder, padding_side: str, **keywords) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = padding_side
    classify = transformers.pipeline("text-classification", str(folder), tokenizer=tokenizer)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    return [result["score"] for result in classify(texts, batch_size=3, **keywords)]


def pipeline_without_a_word(folder) -> list[float]:
    """transformers' text-classification pipeline as it is: no sigmoid is taken."""
    return pipeline_scores(folder, "right")


def reward_bench(folder) -> list[float]:
    """As RewardBench uses that pipeline for classifiers it does not know by name."""
    return pipeline_scores(
        folder,
        "left",
        truncation=False,
        padding=True,
        max_length=2048,
        function_to_apply="none",
        return_token_type_ids=False,
    )


def other_scripts(folder) -> list[float]:
    """--reward of the other scripts."""
    reward_fn = load_reward_function(str(folder), CPU)
    rows = [{"prompt": chat[:-1]} for chat in CHATS]
    return reward_fn(rows, [chat[-1]["content"] for chat in CHATS])


CONVENTIONS = [trl_grpo, trl_reward_trainer, pipeline_without_a_word, reward_bench, other_scripts]


FAMILIES = [("Llama", template) for template in TEMPLATES]
FAMILIES += [("Qwen2", "ChatML"), ("Qwen3", "Qwen3")]


@pytest.mark.parametrize("family, template", FAMILIES)
def test_r81_other_programs_read_the_reward_at_the_same_token(family, template, tmp_path):
    tokenizer = tokenizer_with(TEMPLATES[template])
    model = make_family(family, len(tokenizer), tied=True)
    folder, expected = saved_reward_model(model, tokenizer, tmp_path)
    assert max(expected) - min(expected) > 0.1
    for convention in CONVENTIONS:
        assert convention(folder) == pytest.approx(expected, abs=1e-4), convention.__name__
    [architecture] = json.loads((folder / "config.json").read_text())["architectures"]
    assert architecture == f"{family}ForSequenceClassification"
    assert hasattr(transformers, architecture)
    # The language model is still there.
    generated = AutoModelForCausalLM.from_pretrained(folder).generate(
        torch.tensor([[3, 4]]), max_new_tokens=2
    )
    assert generated.shape[1] > 2


PADDING = {  # what pads in the tokenizer, and the id that pads in the config
    "in the config": ("<|pad|>", 5),
    "in the tokenizer": ("<|end|>", 0),
    "in both": ("<|end|>", 5),
    "in neither": ("<|pad|>", 0),
    "no padding token": (None, None),
}


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("case", PADDING)
def test_r80_the_end_of_turn_may_pad(case, is_known, tmp_path, monkeypatch):
    """Whether the tokenizer has a token <|pad|> before or gets one when the model is saved."""
    pad, pad_id = PADDING[case]
    if not is_known:
        tokens = ["<|unknown|>", "<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
        monkeypatch.setattr("conftest.SPECIAL_TOKENS", tokens)
        pad = "<|unknown|>" if pad == "<|pad|>" else pad
    tokenizer = tokenizer_with(CHATML, pad=pad)
    model = make_model(len(tokenizer), pad_token_id=pad_id)
    folder, expected = saved_reward_model(model, tokenizer, tmp_path)
    for convention in CONVENTIONS:
        assert convention(folder) == pytest.approx(expected, abs=1e-4), convention.__name__


@pytest.mark.parametrize("template", TEMPLATES)
def test_r81_the_saved_template_changes_nothing_but_the_last_end(template, tmp_path):
    tokenizer = tokenizer_with(TEMPLATES[template])
    model = make_model(len(tokenizer))
    saved = AutoTokenizer.from_pretrained(saved_reward_model(model, tokenizer, tmp_path)[0])
    for chat in CHATS:
        for length in range(1, len(chat) + 1):
            for add_generation_prompt in (False, True):
                keywords = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
                text = tokenizer_with(TEMPLATES[template]).apply_chat_template(
                    chat[:length], **keywords
                )
                if not text.startswith("<|begin|>"):
                    text = "<|begin|>" + text
                if length % 2 == 0 and not add_generation_prompt:
                    response = chat[length - 1]["content"].strip()
                    before, after = text.rsplit(response, 1)
                    text = before + response + after.partition("<|end|>")[0] + "<|end|>"
                assert saved.apply_chat_template(chat[:length], **keywords) == text


# ------------------------------------------------------------------------------ dtypes and files
def files_dtypes(folder) -> set:
    """The dtypes of all tensors in a saved model."""
    dtypes = set()
    for path in folder.glob("*.safetensors"):
        dtypes |= {tensor.dtype for tensor in load_file(path).values()}
    return dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_r82_a_saved_model_has_the_dtype_of_its_checkpoint(dtype, tied, tmp_path, tokenizer):
    model = make_model(len(tokenizer), tie_word_embeddings=tied)
    lm = LM(save(tmp_path / "student", tokenizer, model.to(dtype)), CPU, trainable=True)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            assert parameter.dtype == torch.float32
            parameter.add_(1e-3)
    trained = {name: value.clone() for name, value in lm.model.state_dict().items()}

    save_model(lm, tmp_path / "model")

    assert files_dtypes(tmp_path / "model") == {dtype}
    size = (tmp_path / "model/model.safetensors").stat().st_size
    assert size == (tmp_path / "student/model.safetensors").stat().st_size
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert reloaded.dtype == dtype
    for name, value in reloaded.state_dict().items():
        assert torch.equal(value, trained[name].to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_r82_where_the_config_declares_no_dtype_the_weights_show_it(dtype, tmp_path, tokenizer):
    model = make_model(len(tokenizer)).to(dtype)
    path = save(tmp_path / "student", tokenizer, model)
    config = json.loads((tmp_path / "student/config.json").read_text())
    assert config.pop("dtype")
    (tmp_path / "student/config.json").write_text(json.dumps(config))

    lm = LM(path, CPU, trainable=True)
    save_model(lm, tmp_path / "model")

    assert files_dtypes(tmp_path / "model") == {dtype}


@pytest.mark.parametrize("script", ["dckd", "rm_distiller"])
def test_r82_scripts_save_the_dtype_of_the_student(script, run_tiny, checkpoints, pairs, tmp_path):
    student = AutoModelForCausalLM.from_pretrained(checkpoints["student"]).to(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["student"])
    flags = {"student": save(tmp_path / "student", tokenizer, student)}
    if script == "rm_distiller":
        flags["annotations"] = annotations(tmp_path, pairs)
    run = run_tiny(script, **flags)
    assert files_dtypes(run / "model") == {torch.bfloat16}
    state = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    assert {value.dtype for value in state.values()} == {torch.float32}


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such permissions")
@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_r83_files_of_a_run_have_the_permissions_of_other_files(umask, run_tiny):
    before = os.umask(umask)
    try:
        run = run_tiny("dckd")
    finally:
        os.umask(before)
    for path in [run, *run.rglob("*")]:
        expected = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == expected & ~umask, path
    assert (run / "model/model.safetensors").exists() and (run / "checkpoint.pt").exists()
