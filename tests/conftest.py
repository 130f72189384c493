"""Small real models and tokenizers, made on the spot, that the tests share."""

import os
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = (ROOT / "common.py").read_text() + (ROOT / "playground" / "world.py").read_text()


def make_tokenizer(vocab_size=400, chat=True, bos=True, pad="<|pad|>", text=TEXT) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on this project's own source text."""
    special = ["<|pad|>", "<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token="<|end|>",
        bos_token="<|begin|>" if bos else None,
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def make_model(vocab_size: int, seed=0, layers=2, width=32, **config) -> LlamaForCausalLM:
    """A random Llama whose next-token distributions are far from uniform, so that errors show."""
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    shape |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 5}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**shape, **config}))


def save(folder: Path, tokenizer, model) -> str:
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tokenizer) -> dict[str, str]:
    """Folders of three random models with one tokenizer: student, teacher, teacher_ref."""
    folder = tmp_path_factory.mktemp("models")
    shapes = {"student": {"seed": 1}, "teacher": {"seed": 2, "width": 48}, "teacher_ref": {"seed": 3, "width": 48}}
    return {name: save(folder / name, tokenizer, make_model(len(tokenizer), **shape)) for name, shape in shapes.items()}


@pytest.fixture
def load(checkpoints):
    """load("teacher") is a fresh LM on the CPU."""
    from common import LM

    return lambda name, **how: LM(checkpoints.get(name, name), torch.device("cpu"), **how)


def random_examples(vocab_size: int, shapes, seed=0):
    """Examples with prompts and responses of the given lengths: [(prompt, [response, ...]), ...]."""
    from common import Example

    generator = torch.Generator().manual_seed(seed)
    draw = lambda length: torch.randint(vocab_size, (length,), generator=generator).tolist()  # noqa: E731
    return [
        Example({"id": str(i)}, draw(prompt), [draw(length) for length in responses])
        for i, (prompt, responses) in enumerate(shapes)
    ]


def plain_log_probs(model, prompt: list[int], response: list[int], vocab_size: int) -> torch.Tensor:
    """[|response|, V] in float64, from one ordinary forward pass over prompt + response."""
    with torch.no_grad():
        values = model(torch.tensor([prompt + response])).logits[0, :, :vocab_size]
    return values[len(prompt) - 1 : -1].double().log_softmax(-1)
