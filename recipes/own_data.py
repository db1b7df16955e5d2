"""Your own files as sources: real corpora, of each kind one or two, as docs/data.md runs them.

    octo data prepare recipes/own_data.py:gsm8k --input FOLDER/gsm8k_train.jsonl --tokenizer llama-3

`--input` says where the files are, `--tokenizer` which tokenizer; copy a function and change it for files of yours.
A source goes to `$OCTO_RUNS/data/NAME`. Tokens, with Llama-3's tokenizer: 17.6M, 1.2M, 0.9M, 1.2M; seconds each.
"""

from pathlib import Path

from megatron_octo.config.data import CorpusFacts, PrepareConfig
from megatron_octo.rundir import run_folder

TOKENIZER = run_folder("tokenizers") / "llama-3"


def stable_text() -> PrepareConfig:
    """Mathematical texts for a stable stage, a hundredth of them held out: {"text": ...} a line, several files."""
    return PrepareConfig(
        name="stable-text",
        input=Path("stable_text/*.jsonl.gz"),
        facts=CorpusFacts(
            licence="CC-BY-4.0 (OpenStax, Open Logic Project), CC-BY-SA-3.0 (PlanetMath), GFDL-1.2 (Stacks project)",
            source="the LaTeX and CNXML sources in the four projects' public repositories",
        ),
        template="text",
        tokenizer=TOKENIZER,
        output=run_folder("data") / "stable-text",
        validation_share=0.01,
    )


def gsm8k() -> PrepareConfig:
    """Short chains of thought: {"question": ..., "answer": ...} a line."""
    return PrepareConfig(
        name="gsm8k",
        input=Path("gsm8k_train.jsonl"),
        facts=CorpusFacts(licence="MIT", source="openai/grade-school-math"),
        template="question_answer",
        tokenizer=TOKENIZER,
        output=run_folder("data") / "gsm8k",
        mark_answers=True,
    )


def math_hard() -> PrepareConfig:
    """Short chains of thought for a decay branch: lists of {"problem": ..., "solution": ...}, a file a subject."""
    return PrepareConfig(
        name="math-hard",
        input=Path("math_hard_train/*.json"),
        facts=CorpusFacts(licence="MIT", source="the training problems of MATH, of its highest level"),
        template="question_answer",
        columns=(("question", "problem"), ("answer", "solution")),
        tokenizer=TOKENIZER,
        output=run_folder("data") / "math-hard",
        mark_answers=True,
    )


def openstax_exercises() -> PrepareConfig:
    """Questions and answers under names of their own: {"problem": ..., "solution": ...} a line."""
    return PrepareConfig(
        name="openstax-exercises",
        input=Path("openstax_exercises_qa.jsonl.gz"),
        facts=CorpusFacts(licence="CC-BY-4.0", source="the exercises of OpenStax's books of algebra"),
        template="question_answer",
        columns=(("question", "problem"), ("answer", "solution")),
        tokenizer=TOKENIZER,
        output=run_folder("data") / "openstax-exercises",
        mark_answers=True,
    )


def long_cot() -> PrepareConfig:
    """Long chains of thought that bring marks of their own: {"problem": ..., "response": ...} a line.

    These answer AIME24 and Minerva, which are evaluation problems: a trial of the format, not for training.
    """
    return PrepareConfig(
        name="long-cot",
        input=Path("skyt1_longcot.jsonl.gz"),
        facts=CorpusFacts(licence="Apache-2.0", source="Sky-T1's answers, as NovaSky published them"),
        template="question_answer",  # question, line break, the response as it stands
        columns=(("question", "problem"), ("answer", "response")),
        tokenizer=TOKENIZER,
        output=run_folder("data") / "long-cot",
        mark_answers=True,
    )
