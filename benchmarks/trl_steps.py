"""TRL's trainers where TRL has the objective, around the benchmark's own models.

DPOTrainer has DPKD's loss, GKDTrainer the KL of DCKD, and RewardTrainer the loss of Bradley-Terry.
TRL is imported when a trainer is made, because the benchmarks run without it as well.
"""

import copy
import os
from pathlib import Path

import torch

import dckd
from benchmarks.padded import Padded
from benchmarks.shared import Setup


def make_trainer(script: str, setup: Setup, folder: Path, *, bf16: bool):
    """The trainer with a script's objective. Its own checkpoints would go to `folder`."""
    config = {
        "output_dir": str(folder / "trl"),
        "report_to": [],
        "bf16": bf16,
        "use_cpu": setup.student.device.type == "cpu",
        "max_length": None,
        "per_device_train_batch_size": len(setup.examples),
    }
    trainer = TRAINERS[script](setup, config)
    trainer.current_gradient_accumulation_steps = 1  # `train` sets it before its first step
    return trainer


def step_of(trainer, script: str, setup: Setup) -> float:
    """Forward and backward of a trainer, the batch's making included. Returns the loss."""
    batch = BATCHES[script](trainer, setup)
    return trainer.training_step(trainer.model, batch).item()


def one_row(**columns):
    """A data set, which a trainer wants. Batches are made from the benchmark's examples instead."""
    from datasets import Dataset

    return Dataset.from_list([columns])


def dpkd_trainer(setup: Setup, config: dict):
    import trl

    loss_type = "sigmoid_norm" if setup.args.length_normalize else "sigmoid"
    return trl.DPOTrainer(
        model=setup.student.model,
        ref_model=setup.teacher.model,
        processing_class=setup.student.tokenizer,
        train_dataset=one_row(prompt="t5 t6 ", chosen="t7 ", rejected="t8 "),
        args=trl.DPOConfig(**config, beta=setup.args.beta, loss_type=[loss_type]),
    )


def dckd_trainer(setup: Setup, config: dict):
    """With beta 0 its divergence is the forward KL, with lmbda 0 it is taken on the data's own
    responses."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    return GKDTrainer(
        model=setup.student.model,
        teacher_model=setup.teacher.model,
        processing_class=setup.student.tokenizer,
        train_dataset=one_row(prompt="t5 t6 ", chosen="t7 ", rejected="t8 "),
        args=GKDConfig(**config, beta=0.0, lmbda=0.0),
    )


def rm_distiller_trainer(setup: Setup, config: dict):
    """The trainer wants a sequence classifier. It gets one around the weights that the other ways
    train."""
    import trl
    from transformers import AutoModelForSequenceClassification

    shape = copy.deepcopy(setup.student.config)
    shape.num_labels = 1
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(shape)
    classifier.model = setup.student.model.base_model
    classifier.score = setup.student.model.score
    return trl.RewardTrainer(
        model=classifier,
        processing_class=setup.student.tokenizer,
        train_dataset=one_row(chosen_ids=[5, 6, 7], rejected_ids=[5, 6, 7]),
        args=trl.RewardConfig(**config),
    )


def dpkd_batch(trainer, setup: Setup) -> dict:
    rows = []
    for example in setup.examples:
        chosen, rejected = example.response_ids
        rows.append(
            {"prompt_ids": example.prompt_ids, "chosen_ids": chosen, "rejected_ids": rejected}
        )
    return trainer.data_collator(rows)


def dckd_batch(trainer, setup: Setup) -> dict:
    batch = Padded(setup.examples, setup.student.device)
    labels = batch.ids.clone()
    labels[:, 0] = -100
    labels[:, 1:][~batch.is_scored] = -100
    return {"input_ids": batch.ids, "attention_mask": batch.attention_mask, "labels": labels}


def rm_distiller_batch(trainer, setup: Setup) -> dict:
    rows = []
    for example in setup.examples:
        chosen, rejected = example.response_ids
        rows.append(
            {
                "chosen_ids": example.prompt_ids + chosen,
                "rejected_ids": example.prompt_ids + rejected,
            }
        )
    return trainer.data_collator(rows)


TRAINERS = {"dckd": dckd_trainer, "dpkd": dpkd_trainer, "rm_distiller": rm_distiller_trainer}
BATCHES = {"dckd": dckd_batch, "dpkd": dpkd_batch, "rm_distiller": rm_distiller_batch}


@torch.no_grad()
def token_kl(setup: Setup) -> float:
    """What GKDTrainer's loss must be: the KL, averaged over the tokens of all responses."""
    batch = Padded(setup.examples, setup.student.device)
    teacher_log_probs = batch.log_probs(setup.teacher)
    student_log_probs = batch.log_probs(setup.student)
    kl = dckd.forward_kl(teacher_log_probs, student_log_probs)  # [R, T-1]
    return kl[batch.is_scored].mean().item()
