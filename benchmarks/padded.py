"""What one would write first: a row per response, padded to the longest, logits at all positions.

The losses take the whole batch at once and use the scripts' own mathematics, on [R, T−1, V]
log-probs. Shapes: B examples, R responses, T tokens of a row, V vocabulary.
"""

import torch

import adpa
import dckd
import dpkd
import pad
import rm_distiller
from benchmarks.shared import Setup
from common import LM, Example


class Padded:
    """A batch of one row per response, padded on the right, and what models say of it."""

    def __init__(self, examples: list[Example], device: torch.device):
        rows = []
        starts = []
        for example in examples:
            for response in example.response_ids:
                rows.append(example.prompt_ids + response)
                starts.append(len(example.prompt_ids))
        lengths = [len(row) for row in rows]
        width = max(lengths)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
        positions = torch.arange(width)
        is_token = positions < torch.tensor(lengths)[:, None]  # [R, T]
        is_response = is_token & (positions >= torch.tensor(starts)[:, None])  # [R, T]
        self.ids = ids.to(device)  # [R, T]
        self.attention_mask = is_token.long().to(device)  # [R, T]
        self.is_scored = is_response[:, 1:].to(device)  # [R, T-1]
        self.lengths = self.is_scored.sum(-1)  # [R]
        self.last_index = torch.tensor(lengths).to(device) - 1  # [R]

    def log_probs(self, lm: LM) -> torch.Tensor:
        """[R, T-1, V] in float32: of the token after each position."""
        with torch.set_grad_enabled(lm.trainable), lm.autocast():
            output = lm.model(self.ids, attention_mask=self.attention_mask, use_cache=False)
        return output.logits[:, :-1].float().log_softmax(-1)

    def token_logps(self, log_probs: torch.Tensor) -> torch.Tensor:
        """[R, T-1]: the log-prob of the token that stands there."""
        target_ids = self.ids[:, 1:, None]
        return log_probs.gather(-1, target_ids).squeeze(-1)

    def logps_of(self, lm: LM) -> torch.Tensor:
        """[R, T-1]: the same, by a model."""
        log_probs = self.log_probs(lm)
        return self.token_logps(log_probs)

    def means(self, values: torch.Tensor) -> torch.Tensor:
        """[R]: the mean of values [R, T-1] over the tokens of each response."""
        sums = (values * self.is_scored).sum(-1)
        return sums / self.lengths


def with_responses(examples: list[Example], wanted: slice) -> list[Example]:
    """The same examples with some of their responses."""
    return [Example(e.row, e.prompt_ids, e.response_ids[wanted]) for e in examples]


def dckd_loss(setup: Setup) -> torch.Tensor:
    args = setup.args
    batch = Padded(setup.examples, setup.student.device)
    student_log_probs = batch.log_probs(setup.student)  # [R, T-1, V]
    teacher_log_probs = batch.log_probs(setup.teacher)  # [R, T-1, V]
    logps = batch.token_logps(student_log_probs)  # [R, T-1]
    kl = dckd.forward_kl(teacher_log_probs, student_log_probs)  # [R, T-1]
    nll_chosen, _ = -batch.means(logps).view(-1, 2).T  # [B] each
    kl_chosen, kl_rejected = batch.means(kl).view(-1, 2).T  # [B] each
    losses = nll_chosen + args.kl_chosen * kl_chosen + args.kl_rejected * kl_rejected
    return losses.mean()


def adpa_loss(setup: Setup) -> torch.Tensor:
    device = setup.student.device
    batch = Padded(setup.examples, device)
    states = Padded(with_responses(setup.examples, slice(1, 2)), device)
    student_log_probs = batch.log_probs(setup.student)  # [R, T-1, V]
    logps = batch.token_logps(student_log_probs)  # [R, T-1]
    nll_chosen, _ = -batch.means(logps).view(-1, 2).T  # [B] each
    # [B, T-1, V], with the T of the rows of ŷ, which may be smaller
    advantage = adpa.advantages(
        states.log_probs(setup.teacher), states.log_probs(setup.teacher_ref)
    )
    width = advantage.shape[1]
    on_states = student_log_probs[1::2, :width]
    values = adpa.expected_advantage(on_states, advantage)  # [B, T-1]
    losses = nll_chosen - setup.args.gamma * states.means(values)
    return losses.mean()


def dpkd_loss(setup: Setup) -> torch.Tensor:
    args = setup.args
    batch = Padded(setup.examples, setup.student.device)
    student_logps = batch.logps_of(setup.student)  # [R, T-1]
    teacher_logps = batch.logps_of(setup.teacher)  # [R, T-1]
    log_ratios = batch.means(student_logps - teacher_logps)  # [R]
    if not args.length_normalize:
        log_ratios = log_ratios * batch.lengths
    losses, _ = dpkd.preference_loss(args.beta * log_ratios)  # [B]
    return losses.mean()


def pad_loss(setup: Setup) -> torch.Tensor:
    args = setup.args
    batch = Padded(setup.examples, setup.student.device)
    logps = batch.logps_of(setup.student)  # [R, T-1]
    s_student = batch.means(logps).view(len(setup.examples), -1)  # [B, n]
    rows = [example.row for example in setup.examples]
    s_teacher = pad.scores_of_rows(rows, args.alpha).to(s_student)  # [B, n]
    return pad.ppd(args.beta * s_student, args.beta * s_teacher).mean()


def rm_distiller_loss(setup: Setup) -> torch.Tensor:
    """The pairs are rows for the backbone and the reward head. The answers y_T are rows of their
    own for the language model."""
    args = setup.args
    student = setup.student
    pairs = Padded(with_responses(setup.examples, slice(0, 2)), student.device)
    with student.autocast():
        output = student.model.base_model(pairs.ids, attention_mask=pairs.attention_mask)
    rows = torch.arange(len(pairs.ids), device=student.device)
    last_hidden = output.last_hidden_state[rows, pairs.last_index]  # [R, H]
    better, worse = student.model.score(last_hidden.float()).view(-1, 2).T  # [B] each
    margins = None
    if args.margin:
        points = [example.row["margin"] for example in setup.examples]
        margins = args.margin_scale * better.new_tensor(points)  # [B]
    loss = rm_distiller.pair_loss(better, worse, margins).mean()
    if args.kl_coef == 0:
        return loss
    answers = Padded(with_responses(setup.examples, slice(2, 3)), student.device)
    teacher_log_probs = answers.log_probs(setup.teacher)  # [B, T-1, V]
    student_log_probs = answers.log_probs(student)  # [B, T-1, V]
    kl = rm_distiller.forward_kl(teacher_log_probs, student_log_probs)  # [B, T-1]
    return loss + args.kl_coef * answers.means(kl).mean()
