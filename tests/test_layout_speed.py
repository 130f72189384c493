"""What the shared-prefix layout is for. A step is at least twice as fast as one padded row per
response whose logits are all computed, with the same loss. And the memory of a loss does not grow
with the number of tokens."""

import statistics
import time
import weakref

import pytest
import torch
from conftest import (
    make_model,
    make_tokenizer,
    packed_averages,
    padded_averages,
    random_examples,
    save,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adpa import advantages, expected_advantage
from common import LM, pack, per_token, token_logps
from dckd import forward_kl

CPU = torch.device("cpu")


# -------------------------------------------------------------------------------------------- speed
@pytest.mark.parametrize("n, share", [(2, 0.67), (4, 0.50), (8, 0.42)])
def test_every_prompt_goes_through_the_model_once_and_only_response_tokens_through_the_head(
    n, share, tmp_path
):
    """Where the time goes, counted: tokens in the backbone, and positions in the head."""
    lm = LM(save(tmp_path, make_tokenizer(), make_model(400)), CPU)
    examples = random_examples(400, [(228, [112] * n)] * 3)
    batch = pack(examples, lm)
    padded_tokens = 3 * n * (228 + 112)
    assert batch.input_ids.numel() == 3 * (228 + n * 112) <= share * padded_tokens
    assert batch.predict_index.numel() == 3 * n * 112


def timed_step(averages, lm: LM, examples, vocab_size: int) -> tuple[float, float, list]:
    """Forward and backward: its seconds, the loss, and the gradient of every parameter."""
    lm.model.zero_grad()
    started = time.process_time()
    loss = -averages(lm, examples, vocab_size).mean()
    loss.backward()
    seconds = time.process_time() - started
    return seconds, loss.item(), [parameter.grad.clone() for parameter in lm.model.parameters()]


@pytest.mark.slow
def test_a_packed_step_is_twice_as_fast_as_a_padded_row_per_response(tmp_path):
    vocab_size = 49_152
    model = make_model(vocab_size, width=128, layers=4, initializer_range=0.1)
    lm = LM(save(tmp_path, make_tokenizer(), model), CPU, trainable=True)
    examples = random_examples(400, [(228, [112, 104]), (219, [97, 112])])
    packed_times = []
    padded_times = []
    for _ in range(3):  # turn by turn, so that other work on the machine slows both
        seconds, packed_loss, packed_gradients = timed_step(
            packed_averages, lm, examples, vocab_size
        )
        packed_times.append(seconds)
        seconds, padded_loss, padded_gradients = timed_step(
            padded_averages, lm, examples, vocab_size
        )
        padded_times.append(seconds)
    assert packed_loss == pytest.approx(padded_loss, abs=1e-4)
    for packed, padded in zip(packed_gradients, padded_gradients):
        assert torch.allclose(packed, padded, rtol=1e-3, atol=1e-5)
    packed_seconds = statistics.median(packed_times)
    padded_seconds = statistics.median(padded_times)
    message = f"packed {packed_seconds:.2f} s, padded {padded_seconds:.2f} s"
    assert padded_seconds > 2 * packed_seconds, message


# ------------------------------------------------------------------------------------------- memory
class Meter(TorchDispatchMode):
    """The most bytes that tensors made under it held at one time, and the largest of them."""

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self.largest = 0
        self.seen = set()

    def drop(self, key, size):
        self.live -= size
        self.seen.discard(key)

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        out = call(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf.untyped_storage())
        self.peak = max(self.peak, self.live)
        return out

    def count(self, storage):
        key = storage._cdata
        size = storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.live += size
        self.largest = max(self.largest, size)
        weakref.finalize(storage, self.drop, key, size)


# Functions for `per_token`, each with the number of models that it takes.
def logps_and_kl(target_ids, student_log_probs, teacher_log_probs):
    logps = token_logps(target_ids, student_log_probs)
    return logps, forward_kl(teacher_log_probs, student_log_probs)


def binned_kl(_, student_log_probs, teacher_log_probs):
    return forward_kl(teacher_log_probs, student_log_probs, 50)


def value_of_states(_, student_log_probs, teacher_log_probs, reference_log_probs):
    advantage = advantages(teacher_log_probs, reference_log_probs)
    return expected_advantage(student_log_probs, advantage)


LOSSES = {
    "log-probs, one model": (1, token_logps),
    "KL, two models": (2, logps_and_kl),
    "51-bin KL, two models": (2, binned_kl),
    "advantage, three models": (3, value_of_states),
}
VOCAB_SIZE = 4096
WIDTH = 16


def meter_step(function, lms: list[LM], tokens: int, chunk_size: int) -> Meter:
    """Memory of forward and backward of a loss on random hidden states [N, H]."""
    with Meter() as meter:
        hidden = []
        for lm in lms:
            hidden.append(torch.randn(tokens, WIDTH, requires_grad=lm.trainable))
        values = per_token(
            function,
            torch.zeros(tokens, dtype=torch.long),
            lms,
            hidden,
            vocab_size=VOCAB_SIZE,
            chunk_size=chunk_size,
        )
        if torch.is_tensor(values):
            values = [values]
        loss = sum(value.sum() for value in values)
        loss.backward()
    return meter


@pytest.mark.parametrize("loss", LOSSES)
def test_memory_of_a_loss_does_not_grow_with_the_tokens_beyond_a_chunk(loss, tmp_path):
    num_models, function = LOSSES[loss]
    path = save(tmp_path, make_tokenizer(), make_model(VOCAB_SIZE, width=WIDTH))
    lms = [LM(path, CPU, trainable=number == 0) for number in range(num_models)]
    chunk = 64
    tokens = 16 * chunk

    small = meter_step(function, lms, 2 * chunk, chunk)
    large = meter_step(function, lms, tokens, chunk)
    dense = meter_step(function, lms, tokens, 10**9)
    # Nothing but hidden states and their gradients grows with N.
    hidden_bytes = 4 * tokens * WIDTH
    logits_bytes = 4 * chunk * VOCAB_SIZE
    head_bytes = 4 * VOCAB_SIZE * WIDTH
    assert large.peak < small.peak + 4 * num_models * hidden_bytes
    assert large.largest <= max(logits_bytes, hidden_bytes, head_bytes)
    assert dense.peak > 8 * large.peak
    assert dense.largest == 4 * tokens * VOCAB_SIZE
