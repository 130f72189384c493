"""What a teacher is asked besides answering. The playground's teacher is trained on these very strings, and a real
instruction model is asked with them unchanged, so both take one code path."""

JUDGE = """Request: {prompt}
Answer A: {a}
Answer B: {b}
Which answer is better? Reply with A, B or None."""

SCORE = """Request: {prompt}
Answer A: {a}
Answer B: {b}
Score each answer from 1 to 10. Reply as A: score, B: score"""

REFINE = """Request: {prompt}
Better answer: {better}
Worse answer: {worse}
Explain why the second answer is worse, then edit it as little as possible to make it good.
Reply as Why: reason Edited: answer"""

RESCORE = """The worse answer was scored {score} out of 10. Score the edited answer on the same scale.
Reply with the score."""
