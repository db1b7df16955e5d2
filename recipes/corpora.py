"""The paper's corpora, one recipe a source: `octo data prepare recipes/corpora.py:megamath_web_pro`.

OctoThinker, arXiv 2506.20512: Table 2 (stable stage), Table 5 (decay branches), section 3 (FineMath-4plus, ablation;
MATH8K, the problems of reinforcement learning).

Nobody has run these manifests yet: the Hub was out of reach when they were written. What each rests on is in
`facts.source`, and what is only recalled, inferred or chosen by us is in `facts.unconfirmed`, a sentence each
(`octo recipes show recipes/corpora.py:wildchat`). Revisions that are a hash were seen in public code or on a stored
page of the Hub. A licence is that of the data set's page, not legal advice.

A source goes to `$OCTO_RUNS/data/NAME`; its downloads lie beside it, a file or two at a time, so that the disk needs
room for less than `facts.download_bytes`, and for 4 bytes a token. Token counts are with Llama-3's tokenizer where the
owner used that. Time: not yet measured.
"""

from dataclasses import replace

from megatron_octo.config.data import CorpusFacts, HubSource, PrepareConfig, Template
from megatron_octo.rundir import run_folder

# Llama-3's, as the base models'. The page is gated by Meta's licence; with HF_TOKEN set:
#   hf download meta-llama/Llama-3.2-1B tokenizer.json tokenizer_config.json --local-dir runs/tokenizers/llama-3
# That the paper's corpora were made into tokens with it is inferred.
TOKENIZER = run_folder("tokenizers") / "llama-3"

MEGAMATH = "LLM360/MegaMath"
MEGAMATH_REVISION = "3cbc64616594d6bc8759abaa0b2a71858f880f0d"
MEGAMATH_SOURCE = (
    "licence, folders and revision: the data set's page as stored in 2025, and public code (marin-community/marin) "
    "that pins this revision; tokens: the card's table"
)
MEGAMATH_PARQUET_BYTES = 3.25
"""Stored bytes a token: the page gives 1.12 TB for all at this revision; what is not code is that for 336.3B tokens."""
MEGAMATH_OWNER = "The page has since been seen under IFM/MegaMath too; the Hub should forward the old name."

NOT_RUN = "Nobody has prepared this corpus with this manifest yet."
NO_TEMPLATE = (
    "How the paper writes question and answer is not found; one line break between them is recalled of its follow-up."
)
CHAT_FILTER = "The paper keeps 'high-quality conversations, e.g. those from GPT-4'; its rules are not found."
CHAT_LAYOUT = (
    "The paper states User:{} and Assistant:{} on lines of their own; what stands between the turns of a long "
    "conversation, and where documents end, is not found."
)


def megamath_web_pro_max() -> PrepareConfig:
    """Refined math web, 73.8B tokens: 72.5 % of the stable stage. Gated."""
    return _corpus(
        "megamath-web-pro-max",
        HubSource(
            repository="OctoThinker/MegaMath-Web-Pro-Max",
            revision="b5129b6",  # abbreviated, as public code (marin-community/marin) pins it
            files=("**/*.parquet",),
            gated=True,
        ),
        CorpusFacts(
            licence="ODC-By on its page; the text is written by Llama-3.1-70B-Instruct, so Meta's terms hold as well",
            expected_tokens=73_800_000_000,
            download_bytes=round(73_800_000_000 * MEGAMATH_PARQUET_BYTES),
            source="licence, and files at the top of the repository, 2.8 to 3.8 GB each: the data set's pages as "
            "stored in 2025; tokens: a digest of the paper (abstract: over 70B)",
            unconfirmed=(
                "The revision is abbreviated; that it is the newest is unknown.",
                "download_bytes is an estimate: 3.25 bytes a token, as MegaMath's files have.",
                "The column `text` is recalled; second-hand notes name it too.",
                "The card asks readers to agree to cite; one later listing calls the set open.",
            ),
        ),
        template="text",
    )


def megamath_web_pro() -> PrepareConfig:
    """Refined math web, 15.1B tokens: 55 % of every decay branch."""
    return _megamath(
        "web-pro",
        files="megamath-web-pro/*.parquet",
        expected_tokens=15_100_000_000,
        unconfirmed=("A digest of the paper says 13B tokens, the card 15.1B.",),
    )


def megamath_web() -> PrepareConfig:
    """Math web as it is, 263.9B tokens: what the two Pro corpora were chosen from; in none of the mixtures."""
    return _megamath("web", files="megamath-web/*/*.parquet", expected_tokens=263_900_000_000)


def megamath_qa() -> PrepareConfig:
    """Synthetic questions and answers, short chains of thought, 7.0B tokens: stable 5 %, decay short 2.5 %."""
    return _megamath(
        "qa",
        files="megamath-qa/*/*.parquet",  # llama-3.3 and qwen-2.5
        expected_tokens=7_000_000_000,
        unconfirmed=(
            "The card says 7.0B tokens; 5.94B is recalled for what the paper used.",
            "That the paper used both folders (llama-3.3, qwen-2.5) is assumed.",
            "The records are texts already, question and answer in one: their layout is the owner's.",
        ),
    )


def megamath_text_code_block() -> PrepareConfig:
    """Synthetic text with code between, 50.3B tokens: 10 % of the stable stage."""
    return _megamath("text-code-block", files="megamath-text-code-block/*.parquet", expected_tokens=50_300_000_000)


def megamath_code() -> PrepareConfig:
    """Code: 1.25 % of the stable stage. The Hub seems to hold pointers only, no text: see `unconfirmed`."""
    return _megamath(
        "code",
        files="megamath-code/*.parquet",
        expected_tokens=28_100_000_000,
        download_bytes=1_846_000_000,
        unconfirmed=(
            "Public code that reads MegaMath leaves this folder out: 'metadata, not actual code files' (1.85 GB are "
            "too few for 28.1B tokens). Preparing it then stops at the missing column `text`. The code itself has to "
            "be fetched from Stack-V2 (Software Heritage) and prepared with `input`.",
            "28.1B tokens are recalled.",
        ),
    )


def megamath_translated_code() -> PrepareConfig:
    """Code translated to Python, 7.2B tokens: 1.25 % of the stable stage."""
    return _megamath(
        "translated-code",
        files="megamath-translated-code/*.parquet",
        expected_tokens=7_200_000_000,
        download_bytes=24_200_000_000,
    )


def dclm_baseline() -> PrepareConfig:
    """General web: 10 % of the stable stage, 5 % of every decay branch. One hundredth of the data set."""
    return _corpus(
        "dclm-baseline",
        HubSource(
            repository="mlfoundations/dclm-baseline-1.0",
            revision="a3b142c183aebe5af344955ae20836eb34dcf69b",
            files=("global-shard_01_of_10/local-shard_0_of_10/*.jsonl.zst*",),
        ),
        CorpusFacts(
            licence="CC-BY-4.0",
            download_bytes=72_000_000_000,
            source="licence, folders and files, most of 0.2 GB: the data set's pages as stored; revision and file "
            "names: public code",
            unconfirmed=(
                "Which part the paper used is not found. The stages read 22.0B tokens of it; the choice of one of "
                "the hundred local shards is ours, about 40B tokens if the whole has 4T (recalled).",
                "download_bytes is an estimate: 40B tokens of 1.8 bytes, packed.",
                "File names end in .jsonl.zst in public code and in .jsonl.zstd on older pages; the pattern fits both.",
                "The column `text` is recalled.",
            ),
        ),
        template="text",
    )


def finemath_4plus() -> PrepareConfig:
    """Filtered math web, 9.6B tokens: the paper's ablation of web corpora."""
    return _corpus(
        "finemath-4plus",
        HubSource(
            repository="HuggingFaceTB/finemath",
            revision="e92b25a616738fe95dc186b64dfb19f9c8525594",
            files=("finemath-4plus/*.parquet",),
        ),
        CorpusFacts(
            licence="ODC-By 1.0",
            expected_tokens=9_600_000_000,
            download_bytes=18_365_184_633,
            source="licence, column and size: the card (6,699,493 rows); revision: public code that pins it",
            unconfirmed=("9.6B tokens are a third party's figure; 9.57B is recalled.",),
        ),
        template="text",
    )


def open_math_instruct_2() -> PrepareConfig:
    """Questions and answers, short chains of thought: decay short 17.5 %, hybrid 10 %."""
    return _corpus(
        "open-math-instruct-2",
        HubSource(
            repository="nvidia/OpenMathInstruct-2",
            revision="469216e3f46f4dacf476b382e192485ea51a143e",
            files=("data/train-*.parquet",),  # all 14M; others: data/train_1M-*.parquet, train_2M, train_5M
        ),
        CorpusFacts(
            licence="CC-BY-4.0",
            download_bytes=7_580_906_397,
            source="licence, files and size (13,972,791 rows): the data set's pages as stored; revision and columns: "
            "public code that pins it",
            unconfirmed=(
                "Which subset the paper used (1M, 2M, 5M or all 14M) is not found; all of it is our choice.",
                "The number of its tokens is not found.",
                NO_TEMPLATE,
            ),
        ),
        template="question_answer",
        columns=(("question", "problem"), ("answer", "generated_solution")),
    )


def numina_math_1_5() -> PrepareConfig:
    """Competition questions with solutions, short chains of thought: decay short and hybrid 10 %."""
    return _corpus(
        "numina-math-1-5",
        HubSource(
            repository="AI-MO/NuminaMath-1.5",
            revision="1b05109f9e5c1ad06c0663519502416c30b300f8",
            files=("data/train-*.parquet",),
        ),
        CorpusFacts(
            licence="Apache-2.0",
            download_bytes=531_000_000,
            source="licence and size: the data set's page as stored; revision and columns: public code that pins it",
            unconfirmed=(
                "Which filter the paper used is not found; all records are kept, those whose problem or solution is "
                "marked as not valid too.",
                "How many records lack a solution is unknown; should it be above 1 %, raise most_bad_share.",
                "The number of its tokens is not found.",
                "The page has since been seen under project-numina too; the Hub should forward the old name.",
                NO_TEMPLATE,
            ),
        ),
        template="question_answer",
        columns=(("question", "problem"), ("answer", "solution")),
    )


def open_r1_math() -> PrepareConfig:
    """Questions with DeepSeek-R1's answers, long chains of thought: decay long 15 %, hybrid 10 %."""
    return _corpus(
        "open-r1-math",
        HubSource(
            repository="open-r1/OpenR1-Math-220k",
            revision="e4e141ec9dea9f8326f4d347be56105859b2bd68",
            files=("data/*.parquet",),  # the subset `default`; others: extended, all
        ),
        CorpusFacts(
            licence="Apache-2.0",
            expected_tokens=1_050_000_000,
            download_bytes=2_151_000_000,
            source="licence, folders, revision and files (10, their lengths in whole MB): the data set's pages as "
            "stored; columns: public code",
            unconfirmed=(
                "Which subset and which generations the paper used are not found. The first generation of `default` "
                "that correctness_math_verify calls right is our choice; a problem without one is left out.",
                "It is recalled that about an eighth of the problems were judged by a model instead, in "
                "correctness_llama: those are left out too where correctness_math_verify has no true.",
                "That a generation begins with its own <think> block is recalled; were it not so, the template would "
                "have to be long_cot.",
                "Whether the paper keeps what follows </think> is not found; it is kept here.",
                "1.05B tokens are recalled.",
            ),
        ),
        template="question_answer",  # question, line break, <think> block and answer as they stand
        columns=(("question", "problem"), ("answer", "generations[correctness_math_verify]")),
    )


def am_deepseek_distilled() -> PrepareConfig:
    """Math questions with DeepSeek-R1's answers, long chains of thought: decay long 15 %."""
    return _corpus(
        "am-deepseek-distilled",
        HubSource(repository="a-m-team/AM-DeepSeek-Distilled-40M", files=("math_r1_*.jsonl",)),
        CorpusFacts(
            licence="not stated where we could look; read the card before use",
            download_bytes=40_000_000_000,
            source="file names, columns and size: public code that reads them",
            unconfirmed=(
                "The licence is unknown.",
                "No revision was found to pin: `main` is read, and the manifest says at which commit.",
                "Which part the paper used is not found; R1's answers to math, of all pass rates, are our choice.",
                "That answers hold their own <think> block is inferred from public code that removes it.",
                "download_bytes is what a comment in public code says: about 40 GB. Their tokens are not found.",
            ),
        ),
        template="question_answer",  # question, line break, <think> block and answer as they stand
    )


def am_deepseek_r1_distilled_1_4m() -> PrepareConfig:
    """Its smaller twin: questions of all kinds with DeepSeek-R1's answers, long chains of thought; in no mixture."""
    return _corpus(
        "am-deepseek-r1-distilled-1-4m",
        HubSource(
            repository="a-m-team/AM-DeepSeek-R1-Distilled-1.4M",
            revision="53531c06634904118a2dcd83961918c4d69d1cdf",
            files=("am_0.5M.jsonl.zst", "am_0.9M.jsonl.zst"),
        ),
        CorpusFacts(
            licence="not stated where we could look; read the card before use",
            download_bytes=9_500_000_000,
            source="revision, file names and columns: the card as stored, and public code that reads them",
            unconfirmed=(
                "The licence is unknown.",
                "download_bytes is an estimate: 1.4M answers of 4,500 tokens (our guess), packed to 1.5 bytes each.",
                "Public code unpacks the files with a window of 2 GiB; what is read here has at most 128 MiB. Should "
                "it stop there: `zstd -d --long=31`, and name the files with `input`.",
                "That each record is one question and one answer, in this order, is inferred.",
                "Mathematics is a part of it; which the paper would use, had it used this one, is not found.",
            ),
        ),
        template="question_answer",  # question, line break, <think> and <answer> blocks as they stand
        columns=(("question", "messages.0.content"), ("answer", "messages.1.content")),
    )


def tulu_3_instruction_following() -> PrepareConfig:
    """Instructions with constraints: part of the instruction pool, 10 % of every decay branch."""
    return _corpus(
        "tulu-3-instruction-following",
        HubSource(
            repository="allenai/tulu-3-sft-personas-instruction-following",
            revision="fe0c7d350c9b4542b8d829a6f1daa1c259f0ba0e",
            files=("data/train-*.parquet",),
        ),
        CorpusFacts(
            licence="ODC-By",
            expected_tokens=10_000_000,
            download_bytes=39_171_921,
            source="licence, columns and size: the card (29,980 rows); revision: public code that pins it",
            unconfirmed=("0.01B tokens are recalled.", CHAT_FILTER, CHAT_LAYOUT),
        ),
        template="chat",
    )


def wildchat() -> PrepareConfig:
    """Conversations of people with GPT-4: part of the instruction pool, 10 % of every decay branch."""
    return _corpus(
        "wildchat",
        HubSource(
            repository="allenai/WildChat-1M",
            revision="7d6490e462285cf85d91eabea0f9a954fbddcd1f",
            files=("data/train-*.parquet",),
        ),
        CorpusFacts(
            licence="ODC-By",
            expected_tokens=290_000_000,
            download_bytes=3_361_000_000,
            source="licence, files and revision: the data set's page as stored (14 files, their lengths in whole MB)",
            unconfirmed=(
                "0.29B tokens are recalled, for what the paper kept.",
                "That the paper kept GPT-4's conversations by the column `model` is inferred.",
                CHAT_FILTER,
                CHAT_LAYOUT,
            ),
        ),
        template="chat",
        columns=(("messages", "conversation"),),
        chat_models=("gpt-4",),
    )


def ultrachat() -> PrepareConfig:
    """Synthetic conversations, filtered: part of the instruction pool, 10 % of every decay branch."""
    return _corpus(
        "ultrachat",
        HubSource(
            repository="HuggingFaceH4/ultrachat_200k",
            revision="8049631c405ae6576f93f445c6b8166f76f5505a",
            files=("data/train_sft-*.parquet",),
        ),
        CorpusFacts(
            licence="MIT",
            expected_tokens=510_000_000,
            download_bytes=732_000_000,
            source="licence: the data set's page as stored; revision and files (3 of 244 MB): public code that pins it",
            unconfirmed=(
                "0.51B tokens are recalled.",
                "That the paper used the split train_sft is assumed.",
                CHAT_FILTER,
                CHAT_LAYOUT,
            ),
        ),
        template="chat",
    )


def math8k() -> PrepareConfig:
    """8,523 problems with short answers, for reinforcement learning; in no mixture."""
    return _corpus(
        "math8k",
        HubSource(
            repository="alterego238/simplerl-math8k",
            revision="10522bf",  # abbreviated; of the Hub's own conversion to Parquet
            files=("default/train/0000.parquet",),
        ),
        CorpusFacts(
            licence="not stated on its page; SimpleRL, whose set it is, is MIT",
            expected_tokens=1_000_000,
            download_bytes=3_660_000,
            source="revision, file and size: the data set's page as stored; rows and columns: public code",
            unconfirmed=(
                "The licence is that of SimpleRL's repository, not of this page.",
                "That the paper's MATH8K is this set is inferred: it thanks SimpleRL, and the number of problems fits.",
                "The revision is abbreviated, and the Hub may convert anew and forget it.",
                "expected_tokens is an estimate: 120 tokens a problem.",
                "As a corpus it would teach the answers of what reinforcement learning asks.",
            ),
        ),
        template="question_answer",
        columns=(("question", "problem"),),
    )


def _megamath(
    name: str,
    *,
    files: str,
    expected_tokens: int,
    download_bytes: int | None = None,
    unconfirmed: tuple[str, ...] = (),
) -> PrepareConfig:
    estimate = "download_bytes is an estimate: the 1.12 TB of all folders, shared out by tokens (3.25 bytes each)."
    return _corpus(
        f"megamath-{name}",
        HubSource(repository=MEGAMATH, revision=MEGAMATH_REVISION, files=(files,)),
        CorpusFacts(
            licence="ODC-By",
            expected_tokens=expected_tokens,
            download_bytes=download_bytes or round(expected_tokens * MEGAMATH_PARQUET_BYTES),
            source=MEGAMATH_SOURCE,
            unconfirmed=(*unconfirmed, *(() if download_bytes else (estimate,)), MEGAMATH_OWNER),
        ),
        template="text",
    )


def _corpus(
    name: str,
    hub: HubSource,
    facts: CorpusFacts,
    *,
    template: Template,
    columns: tuple[tuple[str, str], ...] = (),
    chat_models: tuple[str, ...] = (),
) -> PrepareConfig:
    return PrepareConfig(
        name=name,
        hub=hub,
        facts=replace(facts, unconfirmed=(NOT_RUN, *facts.unconfirmed)),
        template=template,
        columns=columns,
        chat_models=chat_models,
        tokenizer=TOKENIZER,
        output=run_folder("data") / name,
        on_bad_record="skip",  # one bad line in a hundred million is no reason to stop; 1 % is (most_bad_share)
    )
