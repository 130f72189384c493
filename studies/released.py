"""What the papers' released code computes in place of four formulas, to be measured.

    python -m studies.released adpa
    python -m studies.released dpkd --data y_t.jsonl
    python -m studies.released pad --micro_batch_size 2
    python -m studies.released rm_distiller

A variant replaces one function of a method's script by what the release does, and runs the script.
It takes the script's flags. It begins with the release's settings of what the formula depends on,
above all the number of examples of a forward pass. Learning rate, β, γ and α stay the script's own,
so that the formula is what differs. Nothing here is a recommendation.

Every formula names the repository, the commit, the file and the function that it is read from.
tests/test_studies.py has values that these functions returned. The formulas are written anew here:
the repositories carry no licence, but for LMOps.
"""

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from common import exit_in_one_line, parse_flags, stop

# isort: split
# common comes first: with it Ctrl-C ends in one line, also while the slow imports run.
import torch
import torch.nn.functional as F

import pad


# -------------------------------------------------------------------------------------- mathematics
def stabilised_margins(
    teacher_log_probs: torch.Tensor,
    reference_log_probs: torch.Tensor,
    clip: tuple[float, float] | None = None,
    top_k: int = 50,
) -> torch.Tensor:
    """[N, V]: ADPA as released, log [π_dpo(a|s)/π_ref(a|s)] of the teacher's k likeliest tokens,
    clamped to [1e-8, 1 − 1e-8]. All other tokens get the lower bound.

    Of both models the release has the k likeliest tokens of a state. A token that is not among the
    reference's gets the k-th probability of the teacher in place of its own. No probability is
    below 1e-7. `clip` is an argument of `adpa.advantages`, and has no meaning here.

    Example: π_dpo = (.5, .3, .15, .05), π_ref = (.1, .6, .2, .1) and k = 2. The reference has the
    tokens 1 and 2, so token 0 gets log(.5/.3) = .511. Token 1 would get log(.3/.6), and gets 1e-8.

    Source: gaoshiping/ADPA a95c32f, utils/merge_logits_adpa_dataset.py `get_margin_logp_token`, and
    utils/compress_logits.py `load_input_and_target_probs_fast` (`prob_stabilize`). Left out: the
    release never scores the end-of-sequence token, and counts it in the mean.
    """
    k = min(top_k, teacher_log_probs.shape[-1])
    teacher_probs, teacher_tokens = teacher_log_probs.exp().topk(k)  # [N, k] each
    reference_probs, reference_tokens = reference_log_probs.exp().topk(k)  # [N, k] each
    floor = teacher_probs[:, -1:]  # [N, 1]
    known = floor.expand_as(reference_log_probs)
    known = known.scatter(-1, reference_tokens, reference_probs)  # [N, V]
    ratios = teacher_probs.clamp(min=1e-7) / known.gather(-1, teacher_tokens).clamp(min=1e-7)
    margins = torch.zeros_like(teacher_log_probs).scatter(-1, teacher_tokens, ratios.log())
    return margins.clamp(1e-8, 1 - 1e-8)


def argmax_preference(
    teacher_log_probs: torch.Tensor,
    student_log_probs: torch.Tensor,
    top_k: int = 0,
    beta: float = 0.1,
) -> torch.Tensor:
    """[N]: DPKD as released, −log σ( β log [q(y_t)/p(y_t)] − β log [q(y_s)/p(y_s)] ) at every
    position, from the log-probs [N, V] of the teacher p and the student q.

    No response is sampled. At every position of the data's own response, y_t is the teacher's
    likeliest token and y_s the student's. `top_k` is an argument of `dckd.forward_kl`, which this
    function replaces, and has no meaning here.

    Example: p = (.5, .3, .2) and q = (.2, .2, .6) make y_t the first token and y_s the third. The
    margin is log(.2/.5) − log(.6/.2) = −2.01, and −log σ(.1 · −2.01) = 0.799.

    Source: microsoft/LMOps 4f2a9de, dpkd/main.py `get_distil_loss` with `seqKD_DPO`. `finetune`
    gives it and the cross-entropy the weight ½ each (`kd_ratio`), so they count alike. The data
    folder of dpkd/scripts/dpkd-gpt2_base_runner.sh is named pseudo-…: in MiniLLM, from which this
    code stems, such folders hold what the teacher wrote. Left out: the term on a corpus, softmax in
    bfloat16, and the mean over the tokens of a batch in place of a response's.
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

    All prompts of a micro-batch share M = ½ Σ (S + T), a sum over the B prompts. So M has the mass
    B, and a value depends on the other prompts. With one prompt M is a distribution, and only the
    arguments of the KL are exchanged. The value is not bounded by log 2.

    Example: two prompts with the scores 2·(0, −1, −2, −3) and 2·(−3, −2, −1, 0), of student and
    teacher alike, give 10.933 for each. One of them alone gives 0.

    Source: EganGu/PAD 89f2a91, scripts/simpo_trainer.py `jenson_shannon_divergence`, called by
    `pd_loss`. training_configs/gemma-2-2b-it-pd.yaml has one prompt a device, and the run in
    gemma-log/pad.log has two. Left out: `get_batch_loss_metrics` weights a micro-batch with its
    share of the step's response tokens.
    """
    student_logps = pad.ranking_logps(s_student)  # [B, n!]
    teacher_logps = pad.ranking_logps(s_teacher)  # [B, n!]
    all_logps = torch.cat([student_logps, teacher_logps])  # [2·B, n!]
    mixture_logps = all_logps.logsumexp(0) - math.log(2)  # [n!]
    summands = mixture_logps.exp() * (2 * mixture_logps - student_logps - teacher_logps)
    return summands.sum(-1) / 2


def margin_loss_over_a_table(
    better: torch.Tensor, worse: torch.Tensor, margins: torch.Tensor
) -> torch.Tensor:
    """[B]: RM-Distiller as released, the mean over k of (r(x_i, y_w) − r(x_i, y_l) − m_k)².

    Differences [B] less margins [B, 1] are a table [B, B]. So every pair is pulled to the mean
    margin of its micro-batch.

    Example: rewards of (1, 2) and (0, 0) with the margins (1, 4) give (4.5, 2.5), and not (0, 4).

    Source: Joe-Hall-Lee/RM-Distiller 0436fb0,
    RewardTrainer/train/reward_models/distilrm_reward_trainer.py `JointRewardTrainer.compute_loss`.
    RewardTrainer/scripts/train_distilrm.sh, which the release's README names, has four pairs a
    device. The other trainer of the release, reward_trainer.py with `--loss_type margin-aware`, has
    rewards [B, 1] and so takes the loss per pair, as it is here.
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
    "adpa": Variant(
        script="adpa",
        function_name="advantages",
        replacement=stabilised_margins,
        flags=["--top_k", "50"],
    ),
    "dpkd": Variant(
        script="dckd",
        function_name="forward_kl",
        replacement=argmax_preference,
        # 3e-3 is what suits the toy task, as for the other distillation of the teacher's responses.
        flags=["--kl_chosen", "1", "--kl_rejected", "0", "--learning_rate", "3e-3"],
    ),
    "pad": Variant(
        script="pad",
        function_name="ppd",
        replacement=divergence_from_a_shared_mixture,
        flags=["--micro_batch_size", "1"],
    ),
    "rm_distiller": Variant(
        script="rm_distiller",
        function_name="pair_loss",
        replacement=margin_loss_over_a_table,
        flags=["--micro_batch_size", "4"],
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
