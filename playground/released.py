"""What the papers' released code computes instead, to be measured: `python -m playground.released dpkd --seed 1`.

Each variant replaces one function of a method's script by what the release does, and runs that script. For comparison
only: nothing here is a recommendation. (ADPA's clamp needs no variant: it is `adpa.py --advantage_clip`.)
"""

import importlib
import math
import sys

import torch
import torch.nn.functional as F
import tyro

import pad


def argmax_preference(teacher_log_probs, student_log_probs, top_k=0, beta=0.1):
    """[N]: DPKD as released: no answer is sampled. At every position of the data's own answer y_t is the teacher's
    likeliest token and y_s the student's, and the preference of one over the other is a loss per token,
    −log σ(β log [q(y_t)/p(y_t)] − β log [q(y_s)/p(y_s)]). The release adds half the cross-entropy of the data's tokens,
    so with dckd.py, whose cross-entropy has weight 1, this has weight 2."""
    log_ratios = student_log_probs - teacher_log_probs  # [N, V]
    y_t, y_s = (
        log_probs.argmax(-1, keepdim=True) for log_probs in (teacher_log_probs, student_log_probs)
    )
    return -F.logsigmoid(beta * (log_ratios.gather(-1, y_t) - log_ratios.gather(-1, y_s))).squeeze(
        -1
    )


def divergence_from_a_shared_mixture(student, teacher):
    """[B]: PAD as released: ½ [KL(M ‖ S) + KL(M ‖ T)] instead of ½ [KL(S ‖ M) + KL(T ‖ M)], and one mixture M for all
    prompts of the micro-batch. Not bounded by log 2, and 0 only if all prompts have one distribution."""
    ours, theirs = pad.ranking_logps(student), pad.ranking_logps(teacher)  # [B, n!]
    both = torch.cat([ours, theirs])
    mixture = both.logsumexp(0) - math.log(len(both))  # [n!]
    return (mixture.exp() * (2 * mixture - ours - theirs)).sum(-1) / 2


def margin_loss_over_a_table(better, worse, margins=None):
    """[B]: RM-Distiller as released: differences [B] minus margins [B, 1] make a table [B, B], so every pair is pulled
    to the mean margin of its micro-batch."""
    return (better - worse - margins[:, None]).square().mean(0)


# name: (script, function that is replaced, what replaces it, flags)
VARIANTS = {
    "dpkd": ("dckd", "forward_kl", argmax_preference, ["--kl_chosen", "2", "--kl_rejected", "0"]),
    "pad": ("pad", "ppd", divergence_from_a_shared_mixture, []),
    "rm_distiller": ("rm_distiller", "pair_loss", margin_loss_over_a_table, []),
}


def main():
    if sys.argv[1:2] == [] or sys.argv[1] not in VARIANTS:
        raise SystemExit(
            f"usage: python -m playground.released {{{','.join(VARIANTS)}}} [flags of the script]"
        )
    script, name, variant, flags = VARIANTS[sys.argv[1]]
    module = importlib.import_module(script)
    assert callable(getattr(module, name))
    setattr(module, name, variant)
    module.main(tyro.cli(module.Args, args=[*flags, *sys.argv[2:]]))


if __name__ == "__main__":
    main()
