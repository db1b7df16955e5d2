"""Run by Python itself at the start of every process that has this folder on PYTHONPATH."""

import openrlhf_cpu_patches  # type: ignore[import-not-found]

openrlhf_cpu_patches.install()
