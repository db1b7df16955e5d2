"""vLLM's CPU engine through `evaluate`, against transformers. One process: starting vLLM is what costs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
NEW_TOKENS = 24
POSITIONS = 64
PROBLEMS = ("w3 w1 w4", "w1", "w5 w9 w2 w6 w5 w3 w5", "w8 w9 w7", "w9 w3")
MANY = [" ".join(f"w{(start + n) % 94}" for n in range(50)) for start in range(50)]  # no two begin alike
GIB = 2**30
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # so few that the scaling shows in these answers
}

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (pip install 'megatron_octo[evaluate]')"
    ),
]

WORKER = """
import json, sys
from dataclasses import replace
from pathlib import Path

from megatron_octo.config.evaluate import EvaluateConfig, ScoredModel
from megatron_octo.errors import BadInput
from megatron_octo.evaluate.run import evaluate

folder, new_tokens = Path(sys.argv[1]), int(sys.argv[2])


def config(name, models, problems="problems.jsonl", **settings):
    scored = tuple(ScoredModel(model=folder / model, output=folder / name / model) for model in models)
    return EvaluateConfig(
        task="t", problems=folder / problems, models=scored, **{"max_new_tokens": new_tokens, **settings}
    )


evaluate(config("greedy", ("a",)))
import psutil
one = psutil.Process().memory_info().rss
evaluate(config("greedy", ("a", "b")))
sampled = {"samples_per_problem": 3, "temperature": 1.0}
for name, seed in (("first", 0), ("again", 0), ("other", 1)):
    evaluate(config(name, ("a",), seed=seed, **sampled))
evaluate(config("many", ("a",), "many.jsonl", **sampled, max_new_tokens=2))
after = psutil.Process().memory_info().rss
try:
    evaluate(replace(config("long", ("a",)), max_new_tokens=60))
except BadInput as error:
    refused = error.what

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

expected = {}
for name in ("a", "b"):
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
    for line in (folder / "problems.jsonl").read_text().splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["input"], add_special_tokens=False)["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens)
        expected.setdefault(name, []).append(out[0, ids.shape[1]:].tolist())
result = {"grown": after - one, "refused": refused, "expected": expected, "threads": torch.get_num_threads()}
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models a and b after every evaluation of WORKER; its findings in result.json."""
    path = tmp_path_factory.mktemp("evaluate")
    lines = (json.dumps({"input": text, "label": "1"}) for text in PROBLEMS)
    (path / "problems.jsonl").write_text("\n".join(lines) + "\n")
    (path / "many.jsonl").write_text("\n".join(json.dumps({"input": text, "label": "1"}) for text in MANY) + "\n")
    _models(path)
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(path), str(NEW_TOKENS)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "", "vLLM's logs belong on stderr: stdout is for answers"
    return path


def _models(folder: Path) -> None:
    """Tiny float32 Llamas over words w0, w1, ...: one word, one id, so that equal text means equal tokens.

    Model a is tied; b is not, and has the rotary scaling of Llama 3, said as our exports say it.

    The tokenizer begins a text with a special token of its own accord, which no prompt may carry.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "</s>", *(f"w{n}" for n in range(94))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    shape = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        vocab_size=len(words),
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    for seed, (name, heads) in enumerate({"a": 2, "b": 8}.items()):  # b's are 8 wide: narrower than vLLM knows
        torch.manual_seed(seed)
        shape.update({"num_attention_heads": heads, "num_key_value_heads": heads // 2, "head_dim": 64 // heads})
        LlamaForCausalLM(shape).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
        shape.tie_word_embeddings = False
    config = json.loads((folder / "b/config.json").read_text())
    del config["rope_parameters"]
    (folder / "b/config.json").write_text(json.dumps({**config, "rope_theta": 10_000.0, "rope_scaling": LLAMA_3_ROPE}))


def _result(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return value


def _samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("model", ["a", "b"])
def test_greedy_tokens_equal_those_of_transformers(folder: Path, model: str) -> None:
    """Model b follows a in the same process: that its tokens are its own shows that no weights stay behind."""
    for sample, ids in zip(_samples(folder / "greedy" / model), _result(folder)["expected"][model], strict=True):
        ended = ids[-1] == 1
        assert sample["response"].split() == [f"w{n - 2}" for n in ids if n > 1]
        assert sample["tokens"] == len(ids)
        assert sample["truncated"] == (not ended)


def test_models_answer_differently_and_more_than_one_word(folder: Path) -> None:
    a, b = (_samples(folder / "greedy" / name) for name in ("a", "b"))
    assert all(one["response"] != other["response"] for one, other in zip(a, b, strict=True))
    assert len({word for sample in a for word in sample["response"].split()}) > 10


def test_samples_repeat_with_their_seed_and_change_with_another(folder: Path) -> None:
    first, again, other = (_samples(folder / name / "a") for name in ("first", "again", "other"))
    assert first == again
    assert len({sample["response"] for sample in first}) == len(PROBLEMS) * 3
    assert not {sample["response"] for sample in first} & {sample["response"] for sample in other}


def test_seeded_prompts_beyond_one_batch_are_all_answered(folder: Path) -> None:
    """150 prompts of 50 tokens are more than vLLM takes at once: cut in two, a seeded one fails on a CPU."""
    assert len(_samples(folder / "many" / "a")) == 150


def test_old_engine_is_freed_before_the_next_model(folder: Path) -> None:
    """An engine holds 1 GiB of KV cache; five more models may not keep any of it."""
    assert _result(folder)["grown"] < 0.3 * GIB


def test_small_model_runs_on_one_thread(folder: Path) -> None:
    assert _result(folder)["threads"] == 1


def test_prompt_beyond_the_positions_is_refused(folder: Path) -> None:
    assert "7 tokens; with max_new_tokens 60 that is beyond the 64 positions" in _result(folder)["refused"]
    assert not (folder / "long").exists()
