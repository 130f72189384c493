"""What the papers' released code computes instead, to be measured: `python -m playground.released dpkd --seed 1`.

Each variant replaces one function of a method's script by what the release does, and runs that script. For comparison
only: nothing here is a recommendation. (ADPA's clamp needs no variant: it is `adpa.py --advantage_clip`.)
"""

import sys

import torch.nn.functional as F
import tyro

import dckd


def argmax_preference(teacher_log_probs, student_log_probs, top_k=0, beta=0.1):
    """[N]: DPKD as released: no answer is sampled. At every position of the data's own answer y_t is the teacher's
    likeliest token and y_s the student's, and the preference of one over the other is a loss per token,
    −log σ(β log [q(y_t)/p(y_t)] − β log [q(y_s)/p(y_s)]). The release adds half the cross-entropy of the data's tokens,
    so with dckd.py, whose cross-entropy has weight 1, this has weight 2."""
    log_ratios = student_log_probs - teacher_log_probs  # [N, V]
    y_t, y_s = (log_probs.argmax(-1, keepdim=True) for log_probs in (teacher_log_probs, student_log_probs))
    return -F.logsigmoid(beta * (log_ratios.gather(-1, y_t) - log_ratios.gather(-1, y_s))).squeeze(-1)


# name: (script, function that is replaced, what replaces it, flags)
VARIANTS = {
    "dpkd": (dckd, "forward_kl", argmax_preference, ["--kl_chosen", "2", "--kl_rejected", "0"]),
}


def main():
    if sys.argv[1:2] == [] or sys.argv[1] not in VARIANTS:
        raise SystemExit(f"usage: python -m playground.released {{{','.join(VARIANTS)}}} [flags of the script]")
    module, name, variant, flags = VARIANTS[sys.argv[1]]
    assert callable(getattr(module, name))
    setattr(module, name, variant)
    module.main(tyro.cli(module.Args, args=[*flags, *sys.argv[2:]]))


if __name__ == "__main__":
    main()
