"""Makes the playground from nothing, with `python -m playground.build`: tokenizer, data, models.

Stages: a tokenizer; preference pairs of two writers; `student`, a small model after supervised
training on the writers' answers; `teacher_ref`, a larger one that answers, judges, scores and
rewrites; `teacher`, which is `teacher_ref` after DPO. Then every ability is measured on held-out
requests and written to README.md. A seed gives the same files every time on one machine. It takes
about 20 minutes on two CPU cores.

The teacher learns the very prompts that pad.py and rm_distiller.py put to it. Whoever changes one
of them has to build a new teacher.
"""

import json
import math
import random
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common import LM, Example, mean_per_response, pack, per_token, token_logps
from pad import JUDGE_PROMPT
from playground.world import (
    ALL_WORDS,
    CATEGORIES,
    COUNTS,
    KIND_WORDS,
    MISTAKEN,
    PHRASINGS,
    RIGHT,
    Request,
    Verdict,
    all_requests,
    assess,
    edit,
    explain,
    score,
    write,
)
from rm_distiller import REFINE_PROMPT, RESCORE_PROMPT, SCORE_PROMPT

MODEL_NAMES = ("student", "teacher_ref", "teacher")
TRAIN_REQUESTS, TEST_REQUESTS = all_requests()
# Between these are the skills of the writers of the data, from whom `teacher_ref` and `student`
# learn to answer.
SKILLS = (0.55, 1.0)
# The temperature of the Bradley-Terry noise in the preference labels, in units of the reward.
NOISE = 0.2


@dataclass
class Args:
    seed: int = 1
    """everything random follows from it"""
    output_dir: str = "playground"
    """where data/, teacher_ref/, teacher/, student/ and README.md go"""
    teacher_steps: int = 7000
    """optimiser steps of `teacher_ref`"""
    dpo_steps: int = 600
    """optimiser steps from `teacher_ref` to `teacher`"""
    student_steps: int = 3000
    """optimiser steps of `student`"""
    train_pairs: int = 2000
    """rows of data/train.jsonl"""
    test_pairs: int = 512
    """rows of data/test.jsonl: four pairs for each of the 128 held-out requests"""


# ---------------------------------------------------------------------------------------- tokenizer
SPECIAL_TOKENS = ["<|pad|>", "<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Helper tasks. Without them judging stays near chance at this size.
MEMBER_PROMPT = "Does {word} belong to {category}?"
CHECK_PROMPT = "Request: {prompt}\nAnswer: {answer}\nCheck each word."
GRADE_PROMPT = "Request: {prompt}\nAnswer: {answer}\nScore the answer from 1 to 10."
PROMPTS = [
    JUDGE_PROMPT,
    SCORE_PROMPT,
    REFINE_PROMPT,
    RESCORE_PROMPT,
    MEMBER_PROMPT,
    CHECK_PROMPT,
    GRADE_PROMPT,
]
WORDS_OF_REPLIES = (
    "and A B None Why Edited is wrong repeated extra missing no full stop kind word nothing "
    "Yes No right"
)


def make_tokenizer(more_words: str = "") -> PreTrainedTokenizerFast:
    """One token for every word of the world, of the prompts and of a text with more words. Any
    other text becomes bytes."""
    singular_nouns = [singular for singular, _, _ in CATEGORIES.values()]
    texts = [*ALL_WORDS, *COUNTS, *KIND_WORDS, *PHRASINGS, *CATEGORIES, *singular_nouns]
    texts += [WORDS_OF_REPLIES, *PROMPTS, more_words]
    without_fields = re.sub(r"\{[^}]*\}", "", "\n".join(texts))
    numbers = {str(number) for number in range(1, 11)}
    words = sorted(numbers.union(re.findall(r"[A-Za-z]+", without_fields)))
    # Behind a line break a word has no space.
    words_of_lines = sorted(set(re.findall(r"(?<=\n)[A-Z][a-z]+", "\n".join(PROMPTS))))
    pieces = [f"▁{word}" for word in words] + words_of_lines + ["▁", *".,:?!'\n"]

    # Unigram takes the likeliest split into pieces. Bytes are the last resort.
    vocab = [(token, 0.0) for token in [*SPECIAL_TOKENS, "<unk>"]]
    vocab += [(piece, -1.0) for piece in dict.fromkeys(pieces)]
    vocab += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    unk_id = len(SPECIAL_TOKENS)
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=unk_id, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Metaspace(replacement="▁", prepend_scheme="always"),
            decoders.ByteFallback(),
            decoders.Fuse(),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return with_chat_template(tokenizer)


def with_chat_template(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the special tokens, as transformers takes it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        unk_token="<unk>",
    )


# --------------------------------------------------------------------------------------------- data
def write_as_in_the_data(request: Request, rng: random.Random) -> str:
    return write(request, rng.uniform(*SKILLS), rng)


def preference(request: Request, rng: random.Random) -> dict | None:
    """Two writers' answers in the order of their rewards, with Bradley-Terry noise: the better one
    is chosen with probability σ(gap / NOISE). None if the two wrote the same."""
    a = write_as_in_the_data(request, rng)
    b = write_as_in_the_data(request, rng)
    gap = assess(request, a).reward - assess(request, b).reward
    return noisy_pair(request, a, b, gap, rng)


def noisy_pair(request: Request, a: str, b: str, gap: float, rng: random.Random) -> dict | None:
    """Two answers as a row, from the difference of their rewards. None if they are the same."""
    a_is_chosen = rng.random() <= torch.sigmoid(torch.tensor(gap / NOISE)).item()
    if a == b:
        return None
    if a_is_chosen:
        return {"prompt": request.text, "chosen": a, "rejected": b}
    return {"prompt": request.text, "chosen": b, "rejected": a}


def preferences(
    requests: list[Request], count: int, rng: random.Random, draw_pair=preference
) -> list[dict]:
    """`count` pairs. The numbers of pairs of any two requests differ by one at most."""
    rows = []
    while len(rows) < count:
        for request in rng.sample(requests, len(requests)):
            row = draw_pair(request, rng)
            while row is None:
                row = draw_pair(request, rng)
            rows.append(row)
    return rows[:count]


def write_data(folder: Path, args: Args, rng: random.Random):
    """Writes data/train.jsonl and data/test.jsonl."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "data/train.jsonl", preferences(TRAIN_REQUESTS, args.train_pairs, rng))
    write_jsonl(folder / "data/test.jsonl", preferences(TEST_REQUESTS, args.test_pairs, rng))


def write_jsonl(path: Path, rows: list[dict]):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


# -------------------------------------------------------------------------------------------- tasks
@dataclass
class Turn:
    """A question and its reply. A reply that is not learned is only there to be talked about."""

    question: str
    reply: str
    is_learned: bool = True


def score_question(request: Request, a: str, b: str) -> str:
    return SCORE_PROMPT.format(prompt=request.text, a=a, b=b)


def refine_question(request: Request, better: str, worse: str) -> str:
    return REFINE_PROMPT.format(prompt=request.text, better=better, worse=worse)


# A task draws a conversation about a request. Each of the functions with the arguments (request,
# rng) that return turns is one.
def answering(request: Request, rng: random.Random) -> list[Turn]:
    return [Turn(request.text, write_as_in_the_data(request, rng))]


def membership(request: Request, rng: random.Random) -> list[Turn]:
    """Whether a word is one of the category: in half of the draws it is."""
    category = request.category
    pool = rng.choice([RIGHT[category], RIGHT[category], MISTAKEN[category], ALL_WORDS])
    word = rng.choice(pool)
    reply = "Yes" if word in RIGHT[category] else "No"
    return [Turn(MEMBER_PROMPT.format(word=word, category=category), reply)]


def any_answer(request: Request, rng: random.Random) -> str:
    """An answer to be judged. Judging must also work on answers that are better than the writers'
    and have other faults. So half of the draws are skilled or perfect."""
    skill = rng.choice([rng.random(), rng.random(), rng.uniform(0.8, 1), 1 - 0.1 * rng.random()])
    return write(request, skill, rng)


def reward_score(request: Request, answer: str) -> int:
    """The score from 1 to 10 that the exact reward of an answer amounts to."""
    return score(assess(request, answer).reward)


def checking(request: Request, rng: random.Random) -> list[Turn]:
    """Every word of an answer with its fault, or with "right"."""
    answer = any_answer(request, rng)
    verdict = assess(request, answer)
    marks = []
    for word, fault in zip(verdict.words, verdict.faults):
        mark = fault or "right"
        marks.append(f"{word} {mark}")
    return [Turn(CHECK_PROMPT.format(prompt=request.text, answer=answer), ", ".join(marks))]


def grading(request: Request, rng: random.Random) -> list[Turn]:
    """The score of one answer."""
    answer = any_answer(request, rng)
    reply = str(reward_score(request, answer))
    return [Turn(GRADE_PROMPT.format(prompt=request.text, answer=answer), reply)]


def two_answers(request: Request, rng: random.Random) -> tuple[str, str]:
    """Two answers of any kind, or an answer and its correction."""
    a = any_answer(request, rng)
    b = any_answer(request, rng)
    if rng.random() < 0.25:
        b = edit(request, a, rng)
    return (a, b) if rng.random() < 0.5 else (b, a)


def verdict_on(request: Request, a: str, b: str) -> str:
    """Which of two answers is better: "A", "B", or "None" if neither is by a tenth."""
    gap = assess(request, a).reward - assess(request, b).reward
    if gap > 0.09:
        return "A"
    if gap < -0.09:
        return "B"
    return "None"


def judging(request: Request, rng: random.Random) -> list[Turn]:
    """Which of two answers is better, in the words of PAD."""
    a, b = two_answers(request, rng)
    question = JUDGE_PROMPT.format(prompt=request.text, a=a, b=b)
    return [Turn(question, verdict_on(request, a, b))]


def scoring(request: Request, rng: random.Random) -> list[Turn]:
    """The scores of two answers, in the words of RM-Distiller."""
    a, b = two_answers(request, rng)
    reply = f"A: {reward_score(request, a)}, B: {reward_score(request, b)}"
    return [Turn(score_question(request, a, b), reply)]


def rewriting(request: Request, rng: random.Random) -> list[Turn]:
    """A correction and then its score, in the words of RM-Distiller. Half of the corrections are
    poor: those are not learned, only scored."""
    better = write(request, rng.uniform(0.7, 1), rng)
    worse = any_answer(request, rng)
    is_poor = rng.random() < 0.5
    edited = any_answer(request, rng) if is_poor else edit(request, worse, rng)
    reply = f"Why: {explain(request, worse)} Edited: {edited}"
    rescore_question = RESCORE_PROMPT.format(score=reward_score(request, worse))
    return [
        Turn(refine_question(request, better, worse), reply, is_learned=not is_poor),
        Turn(rescore_question, str(reward_score(request, edited))),
    ]


# (until this share of the steps, weights of the tasks). What is built on comes before what builds
# on it.
CURRICULUM = [
    (0.15, {answering: 2, membership: 2}),
    (0.35, {answering: 1, membership: 0.5, checking: 2, grading: 1, rewriting: 2}),
    (
        1.00,
        {
            answering: 1,
            membership: 0.2,
            checking: 0.6,
            grading: 0.6,
            judging: 3,
            scoring: 2,
            rewriting: 1.6,
        },
    ),
]


# ----------------------------------------------------------------------------------------- training
STUDENT = {
    "hidden_size": 24,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEACHER = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


def new_model(tokenizer: PreTrainedTokenizerFast, shape: dict) -> LlamaForCausalLM:
    """A model with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        initializer_range=0.1,
        **shape,
    )
    return LlamaForCausalLM(config)


@dataclass
class Conversation:
    """Token ids, and the weight of each in the loss."""

    ids: list[int]
    weights: list[float]


def to_tokens(tokenizer, turns: list[Turn]) -> Conversation:
    """The turns as a conversation.

    Every learned reply counts 1, whatever its length. Every question counts a fifth of that:
    learning to predict the questions teaches words and answers before any task.
    """
    begin, user, assistant, end = tokenizer.convert_tokens_to_ids(
        ["<|begin|>", "<|user|>", "<|assistant|>", "<|end|>"]
    )
    ids = [begin]
    weights = [0.0]
    for turn in turns:
        question_ids = [user, *tokenizer(turn.question).input_ids, end, assistant]
        reply_ids = [*tokenizer(turn.reply).input_ids, end]
        reply_weight = 1 / len(reply_ids) if turn.is_learned else 0.0
        ids += question_ids + reply_ids
        weights += [0.2 / len(question_ids)] * len(question_ids)
        weights += [reply_weight] * len(reply_ids)
    return Conversation(ids, weights)


def draw_batches(
    tokenizer, requests: list[Request], task_weights: dict, batch_size: int, rng: random.Random
) -> list:
    """Eight batches of conversations. Those of a batch have similar lengths."""
    tasks = rng.choices(list(task_weights), list(task_weights.values()), k=8 * batch_size)
    conversations = []
    for task in tasks:
        turns = task(rng.choice(requests), rng)
        conversations.append(to_tokens(tokenizer, turns))
    conversations.sort(key=lambda conversation: len(conversation.ids))
    batches = []
    for start in range(0, len(conversations), batch_size):
        batches.append(conversations[start : start + batch_size])
    rng.shuffle(batches)
    return batches


def weighted_loss(model: LlamaForCausalLM, batch: list[Conversation]) -> torch.Tensor:
    """Σ_t weight_t · −log p(token_t) of a conversation, its mean over the batch."""
    longest = max(len(conversation.ids) for conversation in batch)
    padded_ids = []
    padded_weights = []
    for conversation in batch:
        padding = longest - len(conversation.ids)
        padded_ids.append(conversation.ids + [0] * padding)
        padded_weights.append(conversation.weights + [0.0] * padding)
    ids = torch.tensor(padded_ids)  # [B, T]
    weights = torch.tensor(padded_weights)[:, 1:]  # [B, T − 1]
    hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]  # [B, T − 1, H]
    is_scored = weights > 0
    logits = model.lm_head(hidden[is_scored])  # [N, V]
    nll = F.cross_entropy(logits, ids[:, 1:][is_scored], reduction="none")  # [N]
    return (nll * weights[is_scored]).sum() / len(batch)


def optimizer_step(model, loss: torch.Tensor, optimizer, scheduler):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


def train(
    tokenizer: PreTrainedTokenizerFast,
    *,
    shape: dict,
    curriculum: list,
    steps: int,
    learning_rate: float,
    rng: random.Random,
    name: str,
    requests: list[Request] = TRAIN_REQUESTS,
    model: LlamaForCausalLM | None = None,
    batch_size: int = 64,
) -> LlamaForCausalLM:
    """Supervised training of a model, or of one with random weights if there is none."""
    if model is None:
        model = new_model(tokenizer, shape)
    optimizer = torch.optim.AdamW(
        model.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )

    def share_of_learning_rate(step: int) -> float:
        """It rises for 200 steps, stays, and falls during the last 40% of the steps."""
        rising = (step + 1) / 200
        falling = (1 - step / steps) / 0.4
        return min(rising, max(0.02, min(1, falling)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_learning_rate)
    batches = []
    losses = []
    progress = tqdm(range(steps), desc=name)
    for step in progress:
        if not batches:
            task_weights = weights_of_tasks(curriculum, step, steps)
            batches = draw_batches(tokenizer, requests, task_weights, batch_size, rng)
        loss = weighted_loss(model, batches.pop())
        optimizer_step(model, loss, optimizer, scheduler)
        losses.append(loss.item())
        if step % 50 == 0:
            progress.set_postfix(loss=f"{statistics.mean(losses[-50:]):.3f}")
    return model.eval()


def weights_of_tasks(curriculum: list, step: int, steps: int) -> dict:
    """The weights of the tasks in the part of the curriculum that a step belongs to."""
    for until, task_weights in curriculum:
        if step < until * steps:
            return task_weights
    raise ValueError(f"the curriculum ends before step {step} of {steps}")


def save(model, tokenizer, path: Path, dtype: torch.dtype):
    model.to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)


def log_ratio(
    target_ids: torch.Tensor, policy_log_probs: torch.Tensor, reference_log_probs: torch.Tensor
) -> torch.Tensor:
    """[N]: log π_θ(y_t|s_t) − log π_ref(y_t|s_t), from [N] and two of [N, V]."""
    policy_logps = token_logps(target_ids, policy_log_probs)
    reference_logps = token_logps(target_ids, reference_log_probs)
    return policy_logps - reference_logps


def dpo_loss(policy: LM, reference: LM, examples: list[Example], beta: float) -> torch.Tensor:
    """Direct Preference Optimization (Rafailov et al. 2023, equation 7): the mean of
    −log σ(β (log-ratio of chosen − log-ratio of rejected))."""
    batch = pack(examples, policy)
    lms = [policy, reference]
    log_ratios = per_token(
        log_ratio,
        batch.target_ids,
        lms,
        [lm.hidden_states(batch)[batch.predict_index] for lm in lms],
        vocab_size=policy.vocab_size,
        chunk_size=4096,
    )
    sums = mean_per_response(log_ratios, batch) * batch.lengths  # [2B]
    chosen_ratio, rejected_ratio = sums.view(-1, 2).unbind(1)  # [B] each
    return -F.logsigmoid(beta * (chosen_ratio - rejected_ratio)).mean()


def dpo(
    policy: LM,
    reference: LM,
    pairs: list[dict],
    *,
    steps: int,
    rng: random.Random,
    beta: float = 0.3,
    learning_rate: float = 3e-5,
    batch_size: int = 32,
):
    """Trains the policy on preference pairs with DPO."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), learning_rate, weight_decay=0.0)

    def share_of_learning_rate(step: int) -> float:
        """It rises for 20 steps and falls during all steps."""
        return min((step + 1) / 20, 1 - step / steps)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_learning_rate)
    progress = tqdm(range(steps), desc="teacher (DPO)")
    for _ in progress:
        examples = []
        for row in rng.sample(pairs, batch_size):
            prompt = [{"role": "user", "content": row["prompt"]}]
            encoded = policy.encode(prompt, [row["chosen"], row["rejected"]])
            examples.append(Example(row, *encoded))
        loss = dpo_loss(policy, reference, examples, beta)
        optimizer_step(policy.model, loss, optimizer, scheduler)
        progress.set_postfix(loss=f"{loss.item():.3f}")


# ---------------------------------------------------------------------------------------- measuring
def ask(
    lm: LM,
    conversations: list,
    *,
    temperature: float = 0.0,
    max_new_tokens: int = 72,
    seed: int = 0,
) -> list[str]:
    """One reply to each conversation. A text is a conversation of one user turn."""
    prompts = []
    for conversation in conversations:
        if isinstance(conversation, str):
            conversation = [{"role": "user", "content": conversation}]
        prompts.append(lm.prompt_ids(conversation))
    samples = lm.sample(
        prompts,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=256,
        seed=seed,
    )
    return [responses[0]["text"] for responses in samples]


def measure_answers(lm: LM, temperature: float) -> dict:
    """The reward of answers to the held-out requests, and the share of answers that say a word
    twice. Sampled answers are drawn four times."""
    requests = TEST_REQUESTS * 4 if temperature else TEST_REQUESTS
    texts = [request.text for request in requests]
    answers = ask(lm, texts, temperature=temperature, max_new_tokens=32)
    verdicts = [assess(request, answer) for request, answer in zip(requests, answers)]
    return {
        "reward": statistics.mean(verdict.reward for verdict in verdicts),
        "repeats": statistics.mean("repeated" in verdict.faults for verdict in verdicts),
    }


def measure_judging(lm: LM, pairs: list[tuple[Request, str, str]], least_gap=0.3) -> dict:
    """Share of greedy verdicts that are right, among pairs of answers whose rewards differ by
    `least_gap` or more."""
    questions = []
    verdicts = []
    for request, a, b in pairs:
        gap = assess(request, a).reward - assess(request, b).reward
        if abs(gap) > least_gap - 1e-6:
            questions.append(JUDGE_PROMPT.format(prompt=request.text, a=a, b=b))
            verdicts.append(verdict_on(request, a, b))
    replies = ask(lm, questions, max_new_tokens=2)
    is_right = [reply == verdict for reply, verdict in zip(replies, verdicts)]
    return {"accuracy": statistics.mean(is_right), "pairs": len(is_right)}


def score_error(given: float, right: int) -> float:
    """The distance of two scores. That of an unreadable reply, which is infinite, counts as 9."""
    return min(9, abs(given - right))


def measure_scoring(lm: LM, pairs: list[tuple[Request, str, str]]) -> dict:
    """Mean distance of greedy scores from the exact ones, on the scale from 1 to 10."""
    questions = [score_question(request, a, b) for request, a, b in pairs]
    replies = ask(lm, questions, max_new_tokens=10)
    errors = []
    for (request, a, b), reply in zip(pairs, replies):
        given_a = math.inf
        given_b = math.inf
        match = re.fullmatch(r"A: (\d+), B: (\d+)", reply)
        if match:
            given_a, given_b = map(int, match.groups())
        errors.append(score_error(given_a, reward_score(request, a)))
        errors.append(score_error(given_b, reward_score(request, b)))
    return {"error": statistics.mean(errors), "unreadable": sum(error == 9 for error in errors)}


@dataclass
class RewritingCase:
    """An answer, its rewriting by a model, and the score that the model then gave the rewriting."""

    request: Request
    worse: str
    question: str
    reply: str = ""
    given_score: float = math.inf

    def before(self) -> Verdict:
        return assess(self.request, self.worse)

    def after(self) -> Verdict:
        return assess(self.request, self.reply.partition("Edited:")[2])


def draw_rewriting_case(request: Request, rng: random.Random) -> RewritingCase:
    """An answer by a writer of any skill, to be rewritten with the help of a better one."""
    better = write(request, rng.uniform(0.7, 1), rng)
    worse = write(request, rng.random(), rng)
    return RewritingCase(request, worse, refine_question(request, better, worse))


def rewrite_and_score(lm: LM, cases: list[RewritingCase], temperature: float):
    """Fills in the model's rewritings, and its greedy scores of them."""
    questions = [case.question for case in cases]
    for case, reply in zip(cases, ask(lm, questions, temperature=temperature)):
        case.reply = reply
    conversations = []
    for case in cases:
        rescore_question = RESCORE_PROMPT.format(score=score(case.before().reward))
        conversations.append(
            [
                {"role": "user", "content": case.question},
                {"role": "assistant", "content": case.reply},
                {"role": "user", "content": rescore_question},
            ]
        )
    for case, reply in zip(cases, ask(lm, conversations, max_new_tokens=3)):
        if reply.isdigit():
            case.given_score = int(reply)


def measure_rewriting(lm: LM, rng: random.Random, temperature: float) -> dict:
    """The reward before and after rewriting, the share of right words that survive, how often a
    word is said twice, and the distance of the model's scores of its rewritings."""
    cases = [draw_rewriting_case(request, rng) for request in TEST_REQUESTS * 3]
    rewrite_and_score(lm, cases, temperature)
    befores = [case.before() for case in cases]
    afters = [case.after() for case in cases]
    right_words = 0
    kept_words = 0
    for before, after in zip(befores, afters):
        right = {word for word, fault in zip(before.words, before.faults) if not fault}
        right_words += len(right)
        kept_words += len(right.intersection(after.words))
    errors = []
    for case, after in zip(cases, afters):
        errors.append(score_error(case.given_score, score(after.reward)))
    return {
        "before": statistics.mean(verdict.reward for verdict in befores),
        "after": statistics.mean(verdict.reward for verdict in afters),
        "kept": kept_words / right_words,
        "repeats": statistics.mean("repeated" in verdict.faults for verdict in afters),
        "rescore_error": statistics.mean(errors),
    }


def measure(folder: Path, seed: int) -> dict:
    """Every number of README.md, from the saved checkpoints."""
    rng = random.Random(seed)
    lms = {name: LM(folder / name, torch.device("cpu")) for name in MODEL_NAMES}
    measured = {}
    for name, lm in lms.items():
        measured[name] = {
            "sampled": measure_answers(lm, temperature=1.0),
            "greedy": measure_answers(lm, temperature=0.0),
            "parameters": lm.model.num_parameters(),
        }

    teacher = lms["teacher"]
    any_pairs = []
    for request in rng.choices(TEST_REQUESTS, k=1000):
        any_pairs.append((request, *two_answers(request, rng)))
    requests = TEST_REQUESTS * 8
    texts = [request.text for request in requests]
    own_a = ask(teacher, texts, temperature=1.0, max_new_tokens=32, seed=1)
    own_b = ask(teacher, texts, temperature=1.0, max_new_tokens=32, seed=2)
    own_pairs = list(zip(requests, own_a, own_b))
    measured["judging"] = {
        "any": measure_judging(teacher, any_pairs),
        "own": measure_judging(teacher, own_pairs),
    }
    measured["scoring"] = measure_scoring(teacher, any_pairs)
    measured["rewriting"] = {
        "greedy": measure_rewriting(teacher, rng, temperature=0.0),
        "sampled": measure_rewriting(teacher, rng, temperature=1.0),
    }
    return measured


# ------------------------------------------------------------------------------------------- README
README = """# The playground

A small world in which every method can be tried in seconds on a CPU: requests such as "Name three
planets.", answers such as "Mars, Venus and Earth. Enjoy!", and an exact reward. Answers are not
just right or wrong, they differ in degree. The reward of an answer is a sum:

- each right word counts 1 over the number of words asked for;
- each wrong, repeated or surplus word counts −0.5;
- a kind word at the end ("Enjoy!") counts +0.2;
- a missing full stop counts −0.5.

It is never below −1 and at best 1.2. "Mars, Pluto and Earth. Enjoy!" gets 2/3 − 0.5 + 0.2 = 0.37,
because Pluto is no planet.

Every category has words that people take for members of it: Pluto for a planet, a spider for an
insect, Sydney for a capital. The answers of the data are by simulated writers of mixed skill
(`write` in `world.py`), and the less skilled ones believe in such words. In half of the categories
one of these words is likelier than any right one. So a model that imitates the average writer says
it, when it is sampled and when it decodes greedily.

## Try it

```bash
head -n 3 playground/data/train.jsonl             # look at some preference pairs
python -m playground.chat playground/teacher      # talk to the teacher: Name three planets.
python -m playground.chat playground/student      # talk to the untrained student
python adpa.py --output_dir runs/adpa             # distil the teacher into the student
python -m playground.chat runs/adpa               # talk to the trained student
```

```python
from playground.world import reward

reward(["Name three planets."], ["Mars, Pluto and Earth. Enjoy!"])  # [0.36666666666666664]
```

## Files

- `world.py`: requests, writers, the reward.
- `chat.py`: talk to a model in the terminal.
- `build.py`: makes everything below but `data/rm_test.jsonl` from nothing, with
  `python -m playground.build` ({minutes:.0f} minutes on two CPU cores).
- `data/train.jsonl` and `data/test.jsonl`: {train_pairs} and {test_pairs} preference pairs. Each is
  two writers' answers in the order of their rewards, with noise: the better answer is chosen with
  probability σ(difference of rewards / {noise}), as Bradley and Terry model it.
- `data/rm_test.jsonl`: 768 held-out pairs in the exact order of their rewards, for reward models:
  easy, hard and shifted ones. `python -m studies.rm_pairs` draws them anew.
- `teacher_ref/`: a model that answers requests, says which of two answers is better, scores answers
  from 1 to 10 and rewrites them. It was trained on examples of all four, and answers like the
  writers.
- `teacher/`: `teacher_ref` after DPO on preference pairs.
- `student/`: a far smaller model, trained on the writers' answers.

There are 512 requests, and 128 of them are held out: those of 16 pairs of a category and a number
of words, in all their phrasings. No model has seen "two spices" in any wording.

## Measured by `build.py` on held-out requests (seed {seed})

| model | parameters | reward, sampled | greedy | answers with a repeated word, sampled | greedy |
|---|---|---|---|---|---|
{model_rows}

| ability of `teacher` | measured |
|---|---|
{ability_rows}

A score of 1 is a reward of 0 or less, a score of 10 a reward of 1.2. Replies are greedy unless the
table says otherwise. `measured.json` has all digits.

Building gives the same files for a seed on one machine with one number of threads. Elsewhere sums
are rounded in another order, and training ends in other weights of the same kind: a second build on
another processor measured 0.93 sampled and 1.12 greedy for `teacher`, and 95.0% and 73.2% of its
judgements were right (any answers, its own).
"""


def model_row(name: str, measured: dict) -> str:
    """A line of the first table: a model's rewards, and how often it repeats a word."""
    sampled = measured["sampled"]
    greedy = measured["greedy"]
    return (
        f"| `{name}` | {measured['parameters']:,} "
        f"| {sampled['reward']:.2f} | {greedy['reward']:.2f} "
        f"| {sampled['repeats']:.1%} | {greedy['repeats']:.1%} |"
    )


def rewriting_row(kind: str, measured: dict) -> str:
    return (
        f"| rewriting an answer, {kind} "
        f"| reward {measured['before']:.2f} → {measured['after']:.2f}, "
        f"{measured['kept']:.0%} of the right words kept, "
        f"{measured['repeats']:.1%} say a word twice |"
    )


def ability_rows(measured: dict) -> list[str]:
    """The lines of the second table: what the teacher can do besides answering."""
    any_pairs = measured["judging"]["any"]
    own_pairs = measured["judging"]["own"]
    scoring = measured["scoring"]
    greedy = measured["rewriting"]["greedy"]
    return [
        "| which of two answers is better, where rewards differ by 0.3 or more "
        f"| {any_pairs['accuracy']:.1%} of {any_pairs['pairs']} pairs right |",
        "| the same for two of its own sampled answers "
        f"| {own_pairs['accuracy']:.1%} of {own_pairs['pairs']} pairs right |",
        "| scoring two answers from 1 to 10 "
        f"| {scoring['error']:.2f} points off on average, {scoring['unreadable']} unreadable |",
        rewriting_row("greedy", greedy),
        rewriting_row("sampled", measured["rewriting"]["sampled"]),
        "| scoring its own greedy rewriting "
        f"| {greedy['rescore_error']:.2f} points off on average |",
    ]


def readme(measured: dict, args: Args) -> str:
    """The text of README.md."""
    model_rows = [model_row(name, measured[name]) for name in MODEL_NAMES]
    return README.format(
        minutes=measured["seconds"] / 60,
        train_pairs=args.train_pairs,
        test_pairs=args.test_pairs,
        noise=NOISE,
        seed=measured["seed"],
        model_rows="\n".join(model_rows),
        ability_rows="\n".join(ability_rows(measured)),
    )


# --------------------------------------------------------------------------------------------- main
def main(args: Args):
    started = time.time()
    folder = Path(args.output_dir)
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    write_data(folder, args, rng)

    student = train(
        tokenizer,
        shape=STUDENT,
        curriculum=[(1.0, {answering: 1})],
        steps=args.student_steps,
        learning_rate=4e-3,
        rng=rng,
        name="student",
    )
    save(student, tokenizer, folder / "student", torch.float32)

    teacher_ref = train(
        tokenizer,
        shape=TEACHER,
        curriculum=CURRICULUM,
        steps=args.teacher_steps,
        learning_rate=1.5e-3,
        rng=rng,
        name="teacher_ref",
    )
    save(teacher_ref, tokenizer, folder / "teacher_ref", torch.float16)

    # Both are loaded from the file, whose weights are rounded to float16.
    teacher = LM(folder / "teacher_ref", torch.device("cpu"), trainable=True)
    reference = LM(folder / "teacher_ref", torch.device("cpu"))
    pairs = preferences(TRAIN_REQUESTS, 4000, rng)
    dpo(teacher, reference, pairs, steps=args.dpo_steps, rng=rng)
    save(teacher.model, tokenizer, folder / "teacher", torch.float16)

    measured = measure(folder, args.seed)
    measured["seconds"] = time.time() - started
    measured["seed"] = args.seed
    (folder / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    text = readme(measured, args)
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
