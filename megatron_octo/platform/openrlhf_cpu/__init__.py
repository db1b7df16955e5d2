"""What lets OpenRLHF run unmodified without a GPU: this folder goes on PYTHONPATH of its processes.

Python imports `sitecustomize` from it in each of them (driver, Ray workers, vLLM); that installs the
import hooks of `openrlhf_cpu_patches`. Without the folder on PYTHONPATH nothing here is active.
"""
