"""How often our grading and math-verify alone are right on hard cases, and how often they agree; prints JSON.

    python benchmarks/grading.py

The cases and what is right are `tests/unit/grading_cases.py`'s. math-verify gets each pair as it is written.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # before the `tests` that some packages install

from megatron_octo import symbolic
from megatron_octo.grading import answers_equal
from tests.unit.grading_cases import CASES


def main() -> None:
    """Grade and print."""
    json.dump({"math-verify": metadata.version("math-verify"), **compare()}, sys.stdout, indent=2)


def compare() -> dict[str, Any]:
    """Counts over all cases, and the cases on which the two differ."""
    cases = [case for kind in CASES.values() for case in kind]
    ours = [answers_equal(answer, reference) for answer, reference, _ in cases]
    theirs = [math_verify(answer, reference) for answer, reference, _ in cases]
    wanted = [case[2] for case in cases]
    return {
        "cases": len(cases),
        "ours_right": sum(map(bool.__eq__, ours, wanted)),
        "math_verify_right": sum(map(bool.__eq__, theirs, wanted)),
        "agree": sum(map(bool.__eq__, ours, theirs)),
        "math_verify_takes_wrong_for_right": sum(
            verdict and not right for verdict, right in zip(theirs, wanted, strict=True)
        ),
        "differ": [case[:2] for case, one, other in zip(cases, ours, theirs, strict=True) if one != other],
    }


def math_verify(answer: str, reference: str) -> bool:
    """Its verdict on the pair as it is; none counts as no."""
    try:
        return symbolic.equal((answer, reference))
    except symbolic.Undecided:
        return False


if __name__ == "__main__":
    main()
