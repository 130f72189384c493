"""Makes the playground's tokenizer, data and checkpoints from nothing: `python -m playground.build`.

Stages: a tokenizer; preference pairs of two writers; `teacher_ref`, one small generalist that answers, judges, scores
and rewrites; `teacher`, which is `teacher_ref` after DPO; `student`, a far smaller model after SFT on the writers'
answers. Then every ability is measured on held-out requests and written to README.md. Deterministic for a seed on one
machine; about 20 minutes on two CPU cores.
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

from common import LM, Example, pack, per_token, response_means, target_logps
from pad import JUDGE
from playground.world import (
    ALL_WORDS,
    CATEGORIES,
    COUNTS,
    KIND_WORDS,
    MISTAKEN,
    PHRASINGS,
    RIGHT,
    Request,
    all_requests,
    edit,
    explain,
    judge,
    score,
    write,
)
from rm_distiller import REFINE, RESCORE, SCORE

TRAIN_REQUESTS, TEST_REQUESTS = all_requests()
SKILLS = (
    0.55,
    1.0,
)  # of the writers of the data; `teacher_ref` and `student` learn to answer from them
NOISE = 0.2  # temperature of the Bradley-Terry noise in the preference labels, in units of the oracle reward


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


# ------------------------------------------------------------------------------------------------------------ tokenizer
SPECIAL = ["<|pad|>", "<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Helper tasks: without them judging stays near chance at this size.
MEMBER = "Does {word} belong to {category}?"
CHECK = "Request: {prompt}\nAnswer: {answer}\nCheck each word."
GRADE = "Request: {prompt}\nAnswer: {answer}\nScore the answer from 1 to 10."


def score_question(request: Request, a: str, b: str) -> str:
    return (SCORE % ("a", "b")).format(asked=request.text, a=a, b=b)


def refine_question(request: Request, better: str, worse: str) -> str:
    return REFINE.format(asked=request.text, teacher={"text": better}, rejected=worse)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every word of the world and of the templates; any other text is spelled in bytes."""
    world = [
        *ALL_WORDS,
        *COUNTS,
        *KIND_WORDS,
        *PHRASINGS,
        *CATEGORIES,
        *(c[0] for c in CATEGORIES.values()),
    ]
    replies = "and A B None Why Edited is wrong repeated extra missing no full stop kind word nothing Yes No right"
    templates = [JUDGE, SCORE, REFINE, RESCORE, MEMBER, CHECK, GRADE]
    text = re.sub(r"\{[^}]*\}", "", "\n".join([*world, replies, *templates]))
    words = sorted({*re.findall(r"[A-Za-z]+", text), *map(str, range(1, 11))})
    bare = sorted(
        {*re.findall(r"(?<=\n)[A-Z][a-z]+", "\n".join(templates))}
    )  # behind a line break, no space
    pieces = [*(f"▁{word}" for word in words), *bare, "▁", *".,:?!'\n"]
    vocab = [(token, 0.0) for token in [*SPECIAL, "<unk>"]] + [
        (piece, -1.0) for piece in dict.fromkeys(pieces)
    ]
    vocab += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=len(SPECIAL), byte_fallback=True))
    spaces = {"replacement": "▁", "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**spaces)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Metaspace(**spaces), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    names = {
        "pad_token": "<|pad|>",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "unk_token": "<unk>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **names)


# ----------------------------------------------------------------------------------------------------------------- data
def preference(request: Request, rng: random.Random) -> dict | None:
    """Two writers' answers, ordered by the oracle with Bradley-Terry noise; None when they wrote the same."""
    chosen, rejected = (write(request, rng.uniform(*SKILLS), rng) for _ in range(2))
    gap = judge(request, chosen).reward - judge(request, rejected).reward
    if rng.random() > torch.sigmoid(torch.tensor(gap / NOISE)).item():
        chosen, rejected = rejected, chosen
    return (
        {"prompt": request.text, "chosen": chosen, "rejected": rejected}
        if chosen != rejected
        else None
    )


def preferences(requests: list[Request], count: int, rng: random.Random) -> list[dict]:
    """`count` pairs, with as many for each request as for any other (but for one)."""
    rows: list[dict] = []
    while len(rows) < count:
        for request in rng.sample(requests, len(requests)):
            while not (row := preference(request, rng)):
                pass
            rows.append(row)
    return rows[:count]


# ---------------------------------------------------------------------------------------------------------------- tasks
# A task draws one conversation: turns of (question, reply, whether the reply is learned).
def answering(request, rng):
    return [(request.text, write(request, rng.uniform(*SKILLS), rng), True)]


def membership(request, rng):
    pool = rng.choice(
        [RIGHT[request.category], RIGHT[request.category], MISTAKEN[request.category], ALL_WORDS]
    )
    word, category = rng.choice(pool), request.category
    return [
        (
            MEMBER.format(word=word, category=category),
            "Yes" if word in RIGHT[category] else "No",
            True,
        )
    ]


def any_answer(request, rng):
    """An answer to be judged. Judging must also work on answers better than the writers', whose faults are others: half
    of the draws are skilled or perfect."""
    skill = rng.choice([rng.random(), rng.random(), rng.uniform(0.8, 1), 1 - 0.1 * rng.random()])
    return write(request, skill, rng)


def checking(request, rng):
    answer = any_answer(request, rng)
    verdict = judge(request, answer)
    marks = ", ".join(
        f"{word} {fault or 'right'}" for word, fault in zip(verdict.words, verdict.faults)
    )
    return [(CHECK.format(prompt=request.text, answer=answer), marks, True)]


def grading(request, rng):
    answer = any_answer(request, rng)
    return [
        (
            GRADE.format(prompt=request.text, answer=answer),
            str(score(judge(request, answer).reward)),
            True,
        )
    ]


def two_answers(request, rng):
    """Two answers of any kind, or an answer and its correction."""
    a, b = any_answer(request, rng), any_answer(request, rng)
    if rng.random() < 0.25:
        b = edit(request, a, rng)
    return (a, b) if rng.random() < 0.5 else (b, a)


def verdict_on(request, a, b):
    """ "A", "B", or "None" when neither is better by a tenth."""
    gap = judge(request, a).reward - judge(request, b).reward
    return "A" if gap > 0.09 else "B" if gap < -0.09 else "None"


def judging(request, rng):
    a, b = two_answers(request, rng)
    return [(JUDGE.format(prompt=request.text, a=a, b=b), verdict_on(request, a, b), True)]


def scoring(request, rng):
    a, b = two_answers(request, rng)
    scores = [score(judge(request, answer).reward) for answer in (a, b)]
    return [(score_question(request, a, b), "A: {}, B: {}".format(*scores), True)]


def rewriting(request, rng):
    """A correction, then its score. Half of the corrections are poor: those are not learned, only scored."""
    better, worse = write(request, rng.uniform(0.7, 1), rng), any_answer(request, rng)
    poor = rng.random() < 0.5
    edited = any_answer(request, rng) if poor else edit(request, worse, rng)
    before, after = (score(judge(request, answer).reward) for answer in (worse, edited))
    question = refine_question(request, better, worse)
    reply = f"Why: {explain(request, worse)} Edited: {edited}"
    return [(question, reply, not poor), (RESCORE.format(score_rejected=before), str(after), True)]


CURRICULUM = [  # (until this share of the steps, weights): what is built on comes before what builds on it
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


# ------------------------------------------------------------------------------------------------------------- training
def to_tokens(tokenizer, turns) -> tuple[list[int], list[float]]:
    """Ids of a conversation and a weight for each of them. Every learned reply counts the same, whatever its length;
    the questions count a fifth of that: learning to predict them teaches words and answers before any task."""
    special = tokenizer.convert_tokens_to_ids(SPECIAL)
    ids, weights = [special[1]], [0.0]
    for question, reply, learned in turns:
        asked = [special[3], *tokenizer(question).input_ids, special[5], special[4]]
        told = [*tokenizer(reply).input_ids, special[5]]
        ids += asked + told
        weights += [0.2 / len(asked)] * len(asked) + [learned / len(told)] * len(told)
    return ids, weights


SHAPE = {"tie_word_embeddings": True, "max_position_embeddings": 512, "initializer_range": 0.1}
STUDENT = {
    "hidden_size": 24,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    **SHAPE,
}
TEACHER = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    **SHAPE,
}


def train(
    tokenizer, curriculum, steps, config, learning_rate, rng, name, batch_size=64
) -> LlamaForCausalLM:
    """Supervised training from random weights; batches hold conversations of similar length."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ids, **config
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    decay = lambda step: min((step + 1) / 200, max(0.02, min(1, (1 - step / steps) / 0.4)))  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    queue, losses, progress = [], [], tqdm(range(steps), desc=name)
    for step in progress:
        if not queue:
            tasks = next(tasks for until, tasks in curriculum if step < until * steps)
            drawn = rng.choices(list(tasks), list(tasks.values()), k=8 * batch_size)
            drawn = [to_tokens(tokenizer, task(rng.choice(TRAIN_REQUESTS), rng)) for task in drawn]
            drawn.sort(key=lambda item: len(item[0]))
            queue = [drawn[i : i + batch_size] for i in range(0, len(drawn), batch_size)]
            rng.shuffle(queue)
        batch = queue.pop()
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
        weights = torch.tensor([weights + [0.0] * (width - len(weights)) for _, weights in batch])[
            :, 1:
        ]
        hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
        nll = F.cross_entropy(
            model.lm_head(hidden[weights > 0]), ids[:, 1:][weights > 0], reduction="none"
        )
        loss = (nll * weights[weights > 0]).sum() / len(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0:
            progress.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}")
    return model.eval()


def save(model, tokenizer, path: Path, dtype=torch.float16):
    model.to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)


def dpo(
    policy: LM,
    reference: LM,
    pairs: list[dict],
    steps: int,
    rng,
    beta=0.3,
    learning_rate=3e-5,
    batch_size=32,
):
    """Direct Preference Optimization (Rafailov et al. 2023, equation 7): −log σ(β (log-ratio chosen − rejected))."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), learning_rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1 - step / steps)
    )
    progress = tqdm(range(steps), desc="teacher (DPO)")
    for _ in progress:
        examples = []
        for row in rng.sample(pairs, batch_size):
            question = [{"role": "user", "content": row["prompt"]}]
            examples.append(
                Example(row, *policy.encode(question, [row["chosen"], row["rejected"]]))
            )
        batch = pack(examples, policy)
        scored = [(lm, lm.hidden_states(batch)[batch.source]) for lm in (policy, reference)]
        ours, theirs = per_token(
            lambda target, ours, theirs: (target_logps(target, ours), target_logps(target, theirs)),
            batch.target_ids, scored, policy.vocab_size, 4096,
        )  # fmt: skip
        sums = response_means(ours - theirs, batch.response_of, batch.lengths) * batch.lengths
        chosen, rejected = sums.view(-1, 2).unbind(1)
        loss = -F.logsigmoid(beta * (chosen - rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")


# ------------------------------------------------------------------------------------------------------------ measuring
def ask(lm: LM, conversations: list, temperature=0.0, max_new_tokens=72, seed=0) -> list[str]:
    """One reply to each conversation (a text is a conversation of one user turn)."""
    chats = [[{"role": "user", "content": c}] if isinstance(c, str) else c for c in conversations]
    how = {
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "batch_size": 256,
        "seed": seed,
    }
    return [
        answers[0]["text"] for answers in lm.sample([lm.encode(chat)[0] for chat in chats], **how)
    ]


def measure_answers(lm: LM, temperature: float) -> dict:
    """Oracle reward, and the share of answers that say a word twice, on the held-out requests, four times each."""
    requests = TEST_REQUESTS * (4 if temperature else 1)
    texts = ask(lm, [request.text for request in requests], temperature, 32)
    verdicts = [judge(request, text) for request, text in zip(requests, texts)]
    return {
        "reward": statistics.mean(verdict.reward for verdict in verdicts),
        "repeats": statistics.mean("repeated" in verdict.faults for verdict in verdicts),
    }


def measure_judging(lm: LM, pairs: list[tuple[Request, str, str]], gap=0.3) -> dict:
    """Share of greedy verdicts that are right, among pairs with an oracle gap of at least `gap`."""
    gaps = [judge(request, a).reward - judge(request, b).reward for request, a, b in pairs]
    pairs = [pair for pair, difference in zip(pairs, gaps) if abs(difference) > gap - 1e-6]
    replies = ask(
        lm,
        [JUDGE.format(prompt=request.text, a=a, b=b) for request, a, b in pairs],
        max_new_tokens=2,
    )
    right = [reply == verdict_on(*pair) for reply, pair in zip(replies, pairs)]
    return {"accuracy": statistics.mean(right), "pairs": len(right)}


def measure_scoring(lm: LM, pairs: list[tuple[Request, str, str]]) -> dict:
    """Mean distance of greedy scores from the oracle's on the scale from 1 to 10; unreadable replies count as 9."""
    replies = ask(lm, [score_question(request, a, b) for request, a, b in pairs], max_new_tokens=10)
    errors = []
    for (request, *answers), reply in zip(pairs, replies):
        read = re.fullmatch(r"A: (\d+), B: (\d+)", reply)
        given = [int(number) for number in read.groups()] if read else [math.inf, math.inf]
        errors += [
            min(9, abs(one - score(judge(request, answer).reward)))
            for one, answer in zip(given, answers)
        ]
    return {"error": statistics.mean(errors), "unreadable": sum(error == 9 for error in errors)}


def measure_rewriting(lm: LM, rng: random.Random, temperature: float) -> dict:
    """What the oracle says of rewritten answers, the share of right words that survive, words said twice, and the
    distance of the score that the model then gives its own rewriting."""
    draws = [
        (q, write(q, rng.uniform(0.7, 1), rng), write(q, rng.random(), rng))
        for q in TEST_REQUESTS * 3
    ]
    questions = [refine_question(q, better, worse) for q, better, worse in draws]
    replies = ask(lm, questions, temperature)
    befores = [judge(q, worse) for q, _, worse in draws]
    afters = [judge(q, reply.partition("Edited:")[2]) for (q, _, _), reply in zip(draws, replies)]
    chats = [
        [
            {"role": "user", "content": question},
            {"role": "assistant", "content": reply},
            {"role": "user", "content": RESCORE.format(score_rejected=score(before.reward))},
        ]
        for question, reply, before in zip(questions, replies, befores)
    ]
    given = [int(text) if text.isdigit() else math.inf for text in ask(lm, chats, max_new_tokens=3)]
    right = [
        {word for word, fault in zip(before.words, before.faults) if not fault}
        for before in befores
    ]
    return {
        "before": statistics.mean(before.reward for before in befores),
        "after": statistics.mean(after.reward for after in afters),
        "kept": sum(len(words & set(after.words)) for words, after in zip(right, afters))
        / sum(map(len, right)),
        "repeats": statistics.mean("repeated" in after.faults for after in afters),
        "rescore_error": statistics.mean(
            min(9, abs(one - score(after.reward))) for one, after in zip(given, afters)
        ),
    }


def measure(folder: Path, seed: int) -> dict:
    """Every number of README.md, from the saved checkpoints."""
    models = {
        name: LM(folder / name, torch.device("cpu"))
        for name in ("student", "teacher_ref", "teacher")
    }
    teacher, rng, result = models["teacher"], random.Random(seed), {}
    for name, lm in models.items():
        result[name] = {
            kind: measure_answers(lm, t) for kind, t in (("sampled", 1.0), ("greedy", 0.0))
        }
        result[name]["parameters"] = lm.model.num_parameters()
    pairs = [
        (request, *two_answers(request, rng)) for request in rng.choices(TEST_REQUESTS, k=1000)
    ]
    texts = [request.text for request in TEST_REQUESTS * 8]
    own = list(
        zip(
            TEST_REQUESTS * 8,
            ask(teacher, texts, 1.0, 32, seed=1),
            ask(teacher, texts, 1.0, 32, seed=2),
        )
    )
    result["judging"] = {
        "any": measure_judging(teacher, pairs),
        "own": measure_judging(teacher, own),
    }
    result["scoring"] = measure_scoring(teacher, pairs)
    result["rewriting"] = {
        kind: measure_rewriting(teacher, rng, t) for kind, t in (("greedy", 0.0), ("sampled", 1.0))
    }
    return result


README = """# The playground

The CartPole of preference distillation: requests such as "Name three planets.", answers such as "Mars, Venus and
Earth. Enjoy!", and an exact judge. Small enough that every method trains in seconds on a CPU, rich enough that answers
differ in degree: a right word counts 1 over the number asked, every wrong, repeated or surplus word −0.5, a kind word
at the end +0.2, a missing full stop −0.5; the sum is never below −1 and at best 1.2 (`world.py`, `reward`).

Every category has words that people take for members of it: Pluto for a planet, a spider for an insect, Sydney for a
capital. Poor writers believe in them, and in half of the categories such a word is likelier than any right one; so a
model that imitates the average writer says it when it is sampled and when it decodes greedily.

| file | what it is |
|---|---|
| `world.py` | requests, writers, the judge |
| `build.py` | makes everything below from nothing: `python -m playground.build` ({minutes:.0f} minutes on two CPU cores) |
| `data/train.jsonl`, `data/test.jsonl` | {train} and {test} preference pairs: two writers' answers, ordered by the oracle with Bradley-Terry noise of temperature {noise} |
| `teacher_ref/` | a generalist that answers, judges, scores and rewrites, after supervised training on mixed writers |
| `teacher/` | `teacher_ref` after DPO on preference pairs |
| `student/` | a far smaller model after supervised training on the writers' answers |

The 128 held-out requests (of 512) are those of 16 pairs of a category and a count, in all phrasings: no model has seen
"four spices" in any wording.

## Measured by `build.py` on held-out requests (seed {seed})

| model | parameters | oracle reward, sampled | greedy | answers with a word said twice, sampled | greedy |
|---|---|---|---|---|---|
{answers}

| ability of `teacher`, greedy replies | measured |
|---|---|
| judging two answers, oracle gap ≥ 0.3 | {judging[any][accuracy]:.1%} of {judging[any][pairs]} pairs |
| judging two of its own sampled answers, gap ≥ 0.3 | {judging[own][accuracy]:.1%} of {judging[own][pairs]} pairs |
| scoring two answers from 1 to 10 | {scoring[error]:.2f} off on average, {scoring[unreadable]} unreadable |
| rewriting an answer, greedy | {rewriting[greedy][before]:.2f} → {rewriting[greedy][after]:.2f}, {rewriting[greedy][kept]:.0%} of the right words kept, {rewriting[greedy][repeats]:.1%} say a word twice |
| rewriting an answer, sampled | {rewriting[sampled][before]:.2f} → {rewriting[sampled][after]:.2f}, {rewriting[sampled][kept]:.0%} of the right words kept, {rewriting[sampled][repeats]:.1%} say a word twice |
| scoring its own greedy rewriting | {rewriting[greedy][rescore_error]:.2f} off on average |

A score of 1 is a reward of 0 or less, a score of 10 a reward of 1.2. `measured.json` has all digits.

Building is deterministic for a seed on one machine with one number of threads. Elsewhere sums are rounded in another
order and training ends in other weights of the same kind: a second build of these very files on another processor
measured 0.93 sampled and 1.12 greedy for `teacher`, and 95.0% and 73.2% of judgements right (any answers, its own).
"""  # noqa: E501


def main(args: Args):
    started, folder = time.time(), Path(args.output_dir)
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    (folder / "data").mkdir(parents=True, exist_ok=True)
    files = ("train", TRAIN_REQUESTS, args.train_pairs), ("test", TEST_REQUESTS, args.test_pairs)
    for name, requests, count in files:
        lines = [
            json.dumps(row, ensure_ascii=False) + "\n" for row in preferences(requests, count, rng)
        ]
        (folder / f"data/{name}.jsonl").write_text("".join(lines))
    student = train(
        tokenizer, [(1.0, {answering: 1})], args.student_steps, STUDENT, 4e-3, rng, "student"
    )
    save(student, tokenizer, folder / "student", torch.float32)
    teacher = train(tokenizer, CURRICULUM, args.teacher_steps, TEACHER, 1.5e-3, rng, "teacher_ref")
    save(teacher, tokenizer, folder / "teacher_ref")
    policy, reference = (
        LM(folder / "teacher_ref", torch.device("cpu"), trains=trains) for trains in (True, False)
    )
    dpo(policy, reference, preferences(TRAIN_REQUESTS, 4000, rng), args.dpo_steps, rng)
    save(policy.model, tokenizer, folder / "teacher")
    measured = measure(folder, args.seed) | {"seconds": time.time() - started, "seed": args.seed}
    (folder / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    rows = []
    for name in ("student", "teacher_ref", "teacher"):
        sampled, greedy = measured[name]["sampled"], measured[name]["greedy"]
        rows.append(
            f"| `{name}` | {measured[name]['parameters']:,} | {sampled['reward']:.2f} | {greedy['reward']:.2f} "
            f"| {sampled['repeats']:.1%} | {greedy['repeats']:.1%} |"
        )
    facts = {
        "minutes": measured["seconds"] / 60,
        "train": args.train_pairs,
        "test": args.test_pairs,
        "noise": NOISE,
    }
    (folder / "README.md").write_text(README.format(answers="\n".join(rows), **facts, **measured))
    print((folder / "README.md").read_text())


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
