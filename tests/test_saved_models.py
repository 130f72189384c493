"""What other programs read from the models that runs save: scores, dtypes, permissions."""

import json

import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer, save
from test_architectures import make_family
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from common import LM, load_reward_function
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
# Phi-3 writes one more token behind the end-of-turn. Mistral's template writes no begin token here,
# which its tokenizer adds, and a plain one writes no end-of-turn.
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
    return reward_fn([chat[:-1] for chat in CHATS], [chat[-1]["content"] for chat in CHATS])


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
                    text = text.removesuffix("<|system|>").rstrip("\n").removesuffix("<|end|>")
                    text += "<|end|>"
                assert saved.apply_chat_template(chat[:length], **keywords) == text
