"""The generated corpora: drawn from the seed alone, noisy as stated, and free of held-out problems."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from megatron_octo.config.data import SyntheticConfig
from megatron_octo.data.read import read_records
from megatron_octo.data.synthetic import PROMPT, generate, is_heldout, problems, records
from megatron_octo.data.templates import renderer
from megatron_octo.errors import BadInput, SettingsError
from tests.conftest import snapshot

PROBLEM = re.compile(r"\d+(?:\+\d+){2,3}(?![\d+=])")
MANY = 4000


def numbers(text: str) -> list[tuple[int, ...]]:
    """The problems (three or four numbers to add) that occur in a text."""
    return [tuple(map(int, match.split("+"))) for match in PROBLEM.findall(text)]


def final_answer(text: str) -> int:
    return int(re.findall(r"The answer is (?:\\boxed\{)?(\d+)", text)[-1])


@pytest.fixture(scope="module")
def short() -> list[dict[str, str]]:
    return records("short", MANY, seed=1)


@pytest.fixture(scope="module")
def long() -> list[dict[str, str]]:
    return records("long", MANY, seed=1)


@pytest.mark.parametrize("shuffle_answers", [False, True])
def test_equal_settings_give_equal_bytes_and_another_seed_does_not(tmp_path, shuffle_answers):
    def write(name: str, seed: int) -> dict[str, str]:
        documents = (("web", 50), ("short", 50), ("long", 50), ("chat", 50))
        settings = {"documents": documents, "num_rl_problems": 20, "num_heldout_problems": 20}
        folder = tmp_path / name
        generate(SyntheticConfig(output=folder, seed=seed, shuffle_answers=shuffle_answers, **settings))
        return {file: content for file, content in snapshot(folder).items() if file.endswith(".jsonl")}

    first, again, other = write("first", 1), write("again", 1), write("other", 2)
    assert set(first) == {f"{name}.jsonl" for name in ("web", "short", "long", "chat", "rl_train", "heldout")}
    assert first == again
    assert {file for file in first if first[file] == other[file]} == {"heldout.jsonl"}


def test_a_corpus_does_not_depend_on_how_many_others_there_are():
    assert records("long", 20, seed=3) == records("long", 40, seed=3)[:20]


def test_no_held_out_problem_occurs_in_any_corpus_or_rl_prompt_in_any_order(corpora, texts):
    heldout = {tuple(sorted(n)) for row in read_records(corpora / "heldout.jsonl") for n in numbers(row["input"])}
    prompts = [row["input"] for row in read_records(corpora / "rl_train.jsonl")]
    seen = [tuple(sorted(n)) for text in [*texts, *prompts] for n in numbers(text)]
    assert len(seen) == 3 * 1000 + 60  # short, long and chat ask one problem a document, web none
    assert heldout.isdisjoint(seen)
    assert all(map(is_heldout, heldout))
    assert not any(map(is_heldout, seen))


def test_problems_are_distinct_and_their_labels_right(corpora):
    for name, count in (("rl_train", 60), ("heldout", 400)):
        rows = list(read_records(corpora / f"{name}.jsonl"))
        found = [numbers(row["input"]) for row in rows]
        assert all(len(each) == 1 for each in found)
        assert len({each[0] for each in found}) == count
        assert [str(sum(each[0])) for each in found] == [row["label"] for row in rows]


def test_held_out_problems_have_at_least_50_answers_and_two_lengths(corpora):
    rows = list(read_records(corpora / "heldout.jsonl"))
    assert len({row["label"] for row in rows}) >= 50
    assert {len(numbers(row["input"])[0]) for row in rows} == {3, 4}


def test_a_tenth_of_all_problems_is_held_out():
    triples = [(a, b, c) for a in range(1, 21) for b in range(a, 21) for c in range(b, 21)]
    assert 0.08 < sum(map(is_heldout, triples)) / len(triples) < 0.12
    assert is_heldout((3, 2, 1)) == is_heldout((1, 2, 3))


@pytest.mark.parametrize(("corpus", "template"), [("short", "question_answer"), ("long", "long_cot")])
def test_a_framed_document_begins_with_the_rl_prompt_to_the_letter(corpus, template):
    texts = [renderer(template)(row).text for row in records(corpus, MANY, seed=0)]
    framed = [text for text in texts if text.startswith("Question:")]
    assert abs(len(framed) / MANY - 0.25) < 0.03
    for text in framed:
        question = text.split("\n")[1]
        assert text.startswith(PROMPT.format(question))
    prompt = problems(1, seed=0)[0]["input"]
    assert prompt == PROMPT.format(prompt.split("\n")[1])


def test_short_workings_are_as_noisy_as_stated(short):
    terse = [row for row in short if "=" not in row["answer"]]
    unboxed = [row for row in short if "boxed" not in row["answer"]]
    steps = [tuple(map(int, m)) for row in short for m in re.findall(r"(\d+)\+(\d+)=(\d+)", row["answer"])]
    slips = [c - a - b for a, b, c in steps if a + b != c]
    assert abs(len(terse) / MANY - 0.30) < 0.03
    assert abs(len(unboxed) / MANY - 0.15) < 0.03
    assert abs(len(slips) / len(steps) - 0.15) < 0.02
    assert {1, -1, 2, -2, 10, -10} <= set(slips)


def test_a_slip_is_carried_to_the_answer(short):
    for row in short:
        totals = re.findall(r"=(\d+)$", row["answer"], re.MULTILINE)
        if totals:
            assert final_answer(row["answer"]) == int(totals[-1])


def test_a_long_working_mends_what_it_checks_and_carries_what_it_does_not(long):
    checked, mended = 0, 0
    for row in long:
        total = numbers(row["question"])[0][0]
        for line in row["thinking"].split("\n"):
            a, b, c = map(int, re.findall(r"\d+", line)) if "=" in line else (0, 0, int(re.findall(r"\d+", line)[0]))
            if line.startswith("Check"):
                checked += 1
                assert c == a + b
            elif line.startswith("Wait"):
                mended += 1
                total = c
            else:
                assert a == total
                total = c
        assert final_answer(row["answer"]) == total
    steps = sum(line[0].isdigit() for row in long for line in row["thinking"].split("\n"))
    assert abs(checked / steps - 0.40) < 0.02
    assert abs(mended / checked - 0.30) < 0.03


def test_web_pages_are_of_four_kinds_and_never_boxed():
    pages = [row["text"] for row in records("web", MANY, seed=0)]
    kinds = Counter(re.split(r"[ .]", page)[0] for page in pages)
    assert abs(kinds["Addition"] / MANY - 0.45) < 0.03
    assert abs(kinds["Lesson"] / MANY - 0.20) < 0.03
    assert abs(sum(kinds[ask] for ask in ("What", "Find", "Compute")) / MANY - 0.15) < 0.03
    assert not any("boxed" in page or "Question:" in page for page in pages)


@pytest.mark.parametrize(("corpus", "template"), [("short", "question_answer"), ("long", "long_cot"), ("chat", "chat")])
def test_shuffled_answers_keep_the_form_and_lose_the_sense(corpus, template):
    def right(rows):
        texts = [renderer(template)(row).text for row in rows]
        return sum(final_answer(text) == sum(numbers(text)[0]) for text in texts) / len(rows)

    def parts(rows):
        if corpus == "chat":
            return [[turn["content"] for turn in row["messages"]] for row in rows]
        return [[row["question"], row.get("thinking", "") + row["answer"]] for row in rows]

    plain = records(corpus, MANY, seed=5)
    shuffled = records(corpus, MANY, seed=5, shuffle_answers=True)
    assert [a for a, _ in parts(plain)] == [a for a, _ in parts(shuffled)]
    assert sorted(b for _, b in parts(plain)) == sorted(b for _, b in parts(shuffled))
    assert plain[0].keys() == shuffled[0].keys()
    assert right(plain) > 0.5
    assert right(shuffled) < 0.06


def test_no_question_keeps_its_own_answer_when_answers_are_shuffled():
    """Two documents: the only way is to exchange."""
    for seed in range(20):
        (a, b), (c, d) = records("short", 2, seed=seed), records("short", 2, seed=seed, shuffle_answers=True)
        assert (c["answer"], d["answer"]) == (b["answer"], a["answer"])


def test_web_pages_stay_when_answers_are_shuffled():
    assert records("web", 50, seed=0) == records("web", 50, seed=0, shuffle_answers=True)


def test_finished_corpora_are_kept_and_other_settings_refused(tmp_path):
    def config(folder: Path, seed: int) -> SyntheticConfig:
        return SyntheticConfig(output=folder, seed=seed, documents=(("web", 5),), num_heldout_problems=5)

    generate(config(tmp_path / "out", 0))
    before = snapshot(tmp_path)
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))]
    generate(config(tmp_path / "out", 0))
    assert times == [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))]
    with pytest.raises(BadInput, match="seed: 0 in the folder, 1 asked for"):
        generate(config(tmp_path / "out", 1))
    assert snapshot(tmp_path) == before


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInput, match="no finished stage wrote it"):
        generate(SyntheticConfig(output=tmp_path / "out", documents=(("web", 5),)))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": (("wob", 5),)}, "wob"),
        ({"documents": (("web", 5), ("web", 5))}, "web, web"),
        ({"documents": (("web", 0),)}, "0 of web"),
        ({"num_heldout_problems": 5001}, "5,001"),
        ({"num_rl_problems": 0}, "num_rl_problems 0"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, change, message):
    with pytest.raises(SettingsError, match=message):
        SyntheticConfig(**{"output": tmp_path, "documents": (("web", 5),), **change})
