"""The paper's controlled experiments, on Llama-3.2-3B: which corpus, how much of what kind, how long.

OctoThinker, arXiv 2506.20512, sections 3 and 4.2.1. Two frames:

  controlled  from the base model: cosine from 3e-5 to a tenth, no warm-up, 512 x 8,192 tokens a step, 20B tokens or
              100B (stated; whole steps: 20.0B, 100.0B). Weight decay 0.1 is inferred, as is that 100B is one cosine:
              its save at 20B tokens is another model than a run of 20B.
  pilot       a decay of 10B tokens: 5 % general web, 10 % instructions, 10 to 40 % questions and answers, the rest
              refined math web (stated). That it leaves the stable stage at 130B tokens is read off the names of the
              authors' runs.

Each is followed by RL, for its effect shows there. Hardware and layouts: as recipes/llama32_3b.py.
Time: not yet measured; at the 19,146 tokens/s a GPU that file quotes, 290 GPU-hours a 20B run, 145 a pilot.
Loss: not yet measured.
"""

from collections.abc import Mapping
from dataclasses import replace

import llama32_3b
from octothinker import DECAY_SHARED, INSTRUCTIONS, budget, decay, sources

from megatron_octo.config.schedule import CosineRate
from megatron_octo.config.train import FromRun, MarksConfig, MidTrainConfig
from megatron_octo.rundir import run_folder

LAYOUTS = llama32_3b.LAYOUTS
STEPS_20B = 4_768  # x 512 x 8,192 = 19,998,441,472 tokens
STEPS_70B = 16_689  # = 69,998,739,456 tokens
STEPS_100B = 23_842  # = 100,000,595,968 tokens
STEPS_10B = 2_384  # = 9,999,220,736 tokens
STEP_130B = 31_000  # = 130,023,424,000 tokens: the stable stage's first save beyond 130B
ONE_PERCENT = {name: weight / 10 for name, weight in INSTRUCTIONS.items()}


def web_finemath() -> MidTrainConfig:
    """Corpus quality: FineMath-4plus alone."""
    return _controlled("web-finemath", {"finemath-4plus": 1.0})


def web_pro() -> MidTrainConfig:
    """Corpus quality: MegaMath-Web-Pro alone."""
    return _controlled("web-pro", {"megamath-web-pro": 1.0})


def web_pro_max() -> MidTrainConfig:
    """Corpus quality: MegaMath-Web-Pro-Max alone."""
    return _controlled("web-pro-max", {"megamath-web-pro-max": 1.0})


def web_pro_max_100b() -> MidTrainConfig:
    """Token budget: the same for 100B tokens; the paper looks at 20B, 70B and 100B of it: these stay, exported too."""
    run = _controlled("web-pro-max-100b", {"megamath-web-pro-max": 1.0}, steps=STEPS_100B)
    looks = tuple(budget(steps).train_tokens for steps in (STEPS_20B, STEPS_70B, STEPS_100B))
    keeps = replace(run.save, keep_every_tokens=budget(STEPS_10B).train_tokens)  # 7 x 2,384 steps is one below 70B
    return replace(run, save=keeps, marks=MarksConfig(at_tokens=looks))


def short_cot() -> MidTrainConfig:
    """Questions and answers: web 9 to short chains of thought 1."""
    return _controlled("short-cot", {"megamath-web-pro": 0.9, "megamath-qa": 0.1})


def long_cot() -> MidTrainConfig:
    """Long chains of thought: web 9 to OpenR1 1."""
    return _controlled("long-cot", {"megamath-web-pro": 0.9, "open-r1-math": 0.1})


def short_cot_instructions() -> MidTrainConfig:
    """Instruction share: web 89, short chains of thought 10, instructions 1."""
    return _controlled("short-cot-instructions", {"megamath-web-pro": 0.89, "megamath-qa": 0.1, **ONE_PERCENT})


def long_cot_instructions() -> MidTrainConfig:
    """Instruction share: web 89, long chains of thought 10, instructions 1."""
    return _controlled("long-cot-instructions", {"megamath-web-pro": 0.89, "open-r1-math": 0.1, **ONE_PERCENT})


def qa_10() -> MidTrainConfig:
    """Ratio of questions and answers: 10 % MegaMath-QA."""
    return _pilot("qa-10", {"megamath-qa": 0.1})


def qa_20() -> MidTrainConfig:
    """Ratio of questions and answers: 20 % MegaMath-QA."""
    return _pilot("qa-20", {"megamath-qa": 0.2})


def qa_30() -> MidTrainConfig:
    """Ratio of questions and answers: 30 % MegaMath-QA."""
    return _pilot("qa-30", {"megamath-qa": 0.3})


def qa_40() -> MidTrainConfig:
    """Ratio of questions and answers: 40 % MegaMath-QA."""
    return _pilot("qa-40", {"megamath-qa": 0.4})


def omi2_10() -> MidTrainConfig:
    """Ratio of questions and answers: 10 % OpenMathInstruct-2."""
    return _pilot("omi2-10", {"open-math-instruct-2": 0.1})


def omi2_20() -> MidTrainConfig:
    """Ratio of questions and answers: 20 % OpenMathInstruct-2."""
    return _pilot("omi2-20", {"open-math-instruct-2": 0.2})


def omi2_30() -> MidTrainConfig:
    """Ratio of questions and answers: 30 % OpenMathInstruct-2."""
    return _pilot("omi2-30", {"open-math-instruct-2": 0.3})


def omi2_40() -> MidTrainConfig:
    """Ratio of questions and answers: 40 % OpenMathInstruct-2."""
    return _pilot("omi2-40", {"open-math-instruct-2": 0.4})


def openr1_10() -> MidTrainConfig:
    """Ratio of questions and answers: 10 % OpenR1."""
    return _pilot("openr1-10", {"open-r1-math": 0.1})


def openr1_20() -> MidTrainConfig:
    """Ratio of questions and answers: 20 % OpenR1."""
    return _pilot("openr1-20", {"open-r1-math": 0.2})


def openr1_30() -> MidTrainConfig:
    """Ratio of questions and answers: 30 % OpenR1."""
    return _pilot("openr1-30", {"open-r1-math": 0.3})


def openr1_40() -> MidTrainConfig:
    """Ratio of questions and answers: 40 % OpenR1."""
    return _pilot("openr1-40", {"open-r1-math": 0.4})


def openr1_10_omi2_20() -> MidTrainConfig:
    """Long and short together: 10 % OpenR1, 20 % OpenMathInstruct-2."""
    return _pilot("openr1-10-omi2-20", {"open-r1-math": 0.1, "open-math-instruct-2": 0.2})


def openr1_15_omi2_15() -> MidTrainConfig:
    """Long and short together: 15 % OpenR1, 15 % OpenMathInstruct-2."""
    return _pilot("openr1-15-omi2-15", {"open-r1-math": 0.15, "open-math-instruct-2": 0.15})


def openr1_20_omi2_10() -> MidTrainConfig:
    """Long and short together: 20 % OpenR1, 10 % OpenMathInstruct-2."""
    return _pilot("openr1-20-omi2-10", {"open-r1-math": 0.2, "open-math-instruct-2": 0.1})


def _controlled(name: str, mix: Mapping[str, float], steps: int = STEPS_20B) -> MidTrainConfig:
    base = llama32_3b.stable_200b()
    return replace(
        base,
        name=f"llama32-3b-{name}",
        data=replace(base.data, sources=sources(mix, run_folder("data"))),
        budget=replace(base.budget, train_tokens=budget(steps).train_tokens),
        learning_rate=CosineRate(peak=3e-5, floor=3e-6),
    )


def _pilot(name: str, answers: Mapping[str, float]) -> MidTrainConfig:
    """A decay that reads `answers` in the place of as much web."""
    stable = llama32_3b.stable_200b()
    branch = decay(stable, "short")
    web = round(0.85 - sum(answers.values()), 4)
    return replace(
        branch,
        name=f"llama32-3b-pilot-{name}",
        start=FromRun(run=stable.name, step=STEP_130B),
        data=replace(
            branch.data, sources=sources({**DECAY_SHARED, "megamath-web-pro": web, **answers}, run_folder("data"))
        ),
        budget=replace(branch.budget, train_tokens=budget(STEPS_10B).train_tokens),
    )
