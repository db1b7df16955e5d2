"""`python -m megatron_octo` is `octo`. The guard matters: spawned checkpoint writers import this file again."""

from megatron_octo.cli.app import main

if __name__ == "__main__":
    raise SystemExit(main())
