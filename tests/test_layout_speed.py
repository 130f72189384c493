"""What the shared-prefix layout is for: a step at least twice as fast as one padded row per response whose logits are
all computed, with the same loss; and losses whose memory does not grow with the number of tokens."""

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
from common import LM, pack, per_token, target_logps
from dckd import forward_kl

CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------------------------------- speed
def test_every_prompt_goes_through_the_model_once_and_only_response_tokens_through_the_head(
    tmp_path,
):
    """Where the time goes, counted: tokens in the backbone, and positions in the head of 49,152 rows."""
    lm = LM(save(tmp_path, make_tokenizer(), make_model(400)), CPU)
    for n, share in ((2, 0.67), (4, 0.50), (8, 0.42)):
        batch = pack(random_examples(400, [(228, [112] * n)] * 3), lm)
        assert batch.input_ids.numel() == 3 * (228 + n * 112) <= share * 3 * n * (228 + 112)
        assert batch.source.numel() == 3 * n * 112


def test_a_packed_step_is_twice_as_fast_as_a_padded_row_per_response(tmp_path):
    vocab_size = 49_152
    model = make_model(vocab_size, width=128, layers=4, initializer_range=0.1)
    lm = LM(save(tmp_path, make_tokenizer(), model), CPU, trains=True)
    examples = random_examples(400, [(228, [112, 104]), (219, [97, 112])])
    seconds, losses, gradients = {packed_averages: [], padded_averages: []}, {}, {}
    for _ in range(3):
        for (
            step,
            times,
        ) in seconds.items():  # turn by turn, so that other work on the machine slows both
            lm.model.zero_grad()
            start = time.process_time()
            loss = -step(lm, examples, vocab_size).mean()
            loss.backward()
            times.append(time.process_time() - start)
            losses[step] = loss.item()
            gradients[step] = [parameter.grad.clone() for parameter in lm.model.parameters()]
    assert losses[packed_averages] == pytest.approx(losses[padded_averages], abs=1e-4)
    for packed, padded in zip(gradients[packed_averages], gradients[padded_averages]):
        assert torch.allclose(packed, padded, rtol=1e-3, atol=1e-5)
    packed, padded = (statistics.median(times) for times in seconds.values())
    assert padded > 2 * packed, f"packed {packed:.2f} s, padded {padded:.2f} s"


# -------------------------------------------------------------------------------------------------------------- memory
class Meter(TorchDispatchMode):
    """The most bytes that tensors made under it held at one time, and the largest of them."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.largest, self.seen = 0, 0, 0, set()

    def drop(self, key, size):
        self.live -= size
        self.seen.discard(key)

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        out = call(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.seen.add(key)
                    self.live += size
                    self.largest = max(self.largest, size)
                    weakref.finalize(storage, self.drop, key, size)
        self.peak = max(self.peak, self.live)
        return out


LOSSES = {
    "log-probs, one model": (1, target_logps),
    "KL, two models": (
        2,
        lambda ids, ours, theirs: (target_logps(ids, ours), forward_kl(theirs, ours)),
    ),
    "51-bin KL, two models": (2, lambda _, ours, theirs: forward_kl(theirs, ours, 50)),
    "advantage, three models": (
        3,
        lambda _, ours, *theirs: expected_advantage(ours, advantages(*theirs)),
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_memory_of_a_loss_does_not_grow_with_the_tokens_beyond_a_chunk(loss, tmp_path):
    vocab_size, width, chunk = 4096, 16, 64
    models, function = LOSSES[loss]
    path = save(tmp_path, make_tokenizer(), make_model(vocab_size, width=width))
    lms = [LM(path, CPU, trains=i == 0) for i in range(models)]

    def step(tokens, chunk) -> Meter:
        with Meter() as meter:
            scored = [(lm, torch.randn(tokens, width, requires_grad=lm.trains)) for lm in lms]
            values = per_token(
                function, torch.zeros(tokens, dtype=torch.long), scored, vocab_size, chunk
            )
            sum(
                value.sum() for value in (values if isinstance(values, tuple) else [values])
            ).backward()
        return meter

    small, large, dense = step(2 * chunk, chunk), step(16 * chunk, chunk), step(16 * chunk, 10**9)
    hidden_bytes = 16 * chunk * width * 4
    assert (
        large.peak < small.peak + 4 * models * hidden_bytes
    )  # only hidden states and their gradients grow with N
    assert large.largest <= max(chunk * vocab_size * 4, hidden_bytes, vocab_size * width * 4)
    assert dense.peak > 8 * large.peak and dense.largest == 16 * chunk * vocab_size * 4
