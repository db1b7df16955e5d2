"""Convert a checkpoint between Hugging Face and Megatron: `octo convert` under the name that a Megatron fork gives it.

python tools/convert_checkpoint.py from-hf HF OUT
python tools/convert_checkpoint.py to-hf SAVE OUT --tokenizer FOLDER [--dtype bf16|fp32|fp16]
"""

import sys

from megatron_octo.cli.app import main

if __name__ == "__main__":
    raise SystemExit(main(["convert", *sys.argv[1:]]))
