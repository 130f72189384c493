"""What the papers' released code computes in place of three formulas, to be measured.

    python -m studies.released dpkd --seed 1
    python -m studies.released pad --seed 1
    python -m studies.released rm_distiller --seed 1

A variant replaces one function of a method's script by what the release does, and runs the script.
It takes the script's flags. Nothing here is a recommendation. ADPA's clamp needs no variant: it is
`adpa.py --advantage_clip`.
"""

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import pad
from common import exit_in_one_line, parse_flags, stop


# -------------------------------------------------------------------------------------- mathematics
def argmax_preference(
    teacher_log_probs: torch.Tensor,
    student_log_probs: torch.Tensor,
    top_k: int = 0,
    beta: float = 0.1,
) -> torch.Tensor:
    """[N]: DPKD as released, −log σ( β log [q(y_t)/p(y_t)] − β log [q(y_s)/p(y_s)] ) at every
    position, from the log-probs [N, V] of the teacher p and the student q.

    No response is sampled. At every position of the data's own response, y_t is the teacher's
    likeliest token and y_s the student's. `top_k` has no meaning here: it is an argument of
    `dckd.forward_kl`, which this function replaces. The release adds half the cross-entropy of the
    data's tokens. dckd.py takes the whole of it, so this term gets weight 2 there.
    """
    log_ratios = student_log_probs - teacher_log_probs  # [N, V]
    y_t = teacher_log_probs.argmax(-1, keepdim=True)  # [N, 1]
    y_s = student_log_probs.argmax(-1, keepdim=True)  # [N, 1]
    margin = log_ratios.gather(-1, y_t) - log_ratios.gather(-1, y_s)  # [N, 1]
    return -F.logsigmoid(beta * margin).squeeze(-1)


def divergence_from_a_shared_mixture(
    s_student: torch.Tensor, s_teacher: torch.Tensor
) -> torch.Tensor:
    """[B]: PAD as released, ½ [KL(M ‖ S) + KL(M ‖ T)] in place of ½ [KL(S ‖ M) + KL(T ‖ M)], from
    two sets of scores [B, n].

    All prompts of a micro-batch share one mixture M. The value is not bounded by log 2, and it is 0
    only if all prompts have the same distribution.
    """
    student_logps = pad.ranking_logps(s_student)  # [B, n!]
    teacher_logps = pad.ranking_logps(s_teacher)  # [B, n!]
    all_logps = torch.cat([student_logps, teacher_logps])  # [2·B, n!]
    mixture_logps = all_logps.logsumexp(0) - math.log(len(all_logps))  # [n!]
    summands = mixture_logps.exp() * (2 * mixture_logps - student_logps - teacher_logps)
    return summands.sum(-1) / 2


def margin_loss_over_a_table(
    better: torch.Tensor, worse: torch.Tensor, margins: torch.Tensor
) -> torch.Tensor:
    """[B]: RM-Distiller as released, the mean over k of (r(x_i, y_w) − r(x_i, y_l) − m_k)².

    Differences [B] less margins [B, 1] are a table [B, B]. So every pair is pulled to the mean
    margin of its micro-batch.
    """
    differences = better - worse  # [B]
    table = differences - margins[:, None]  # [B, B], a row for each margin
    return table.square().mean(0)


# ----------------------------------------------------------------------------------------- variants
@dataclass
class Variant:
    """A script, the name of one function in it, what takes its place, and flags that go with it."""

    script: str
    function_name: str
    replacement: Callable
    flags: list[str] = field(default_factory=list)


VARIANTS = {
    "dpkd": Variant(
        script="dckd",
        function_name="forward_kl",
        replacement=argmax_preference,
        flags=["--kl_chosen", "2", "--kl_rejected", "0"],
    ),
    "pad": Variant(script="pad", function_name="ppd", replacement=divergence_from_a_shared_mixture),
    "rm_distiller": Variant(
        script="rm_distiller", function_name="pair_loss", replacement=margin_loss_over_a_table
    ),
}


def main(words: list[str]):
    """Runs a variant: the first word names it, and the others are flags of its script."""
    if not words or words[0] not in VARIANTS:
        names = ",".join(VARIANTS)
        stop(f"usage: python -m studies.released {{{names}}} [flags of the script]")
    variant = VARIANTS[words[0]]
    script = importlib.import_module(variant.script)
    # The script must have such a function, or the replacement would change nothing.
    if not callable(getattr(script, variant.function_name, None)):
        raise ValueError(f"{variant.script}.py has no function {variant.function_name}")
    setattr(script, variant.function_name, variant.replacement)
    args = parse_flags(script.Args, script.__doc__, variant.flags + words[1:])
    with exit_in_one_line(args):
        script.main(args)


if __name__ == "__main__":
    main(sys.argv[1:])
