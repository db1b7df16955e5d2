"""Typed, frozen settings. Nothing here imports torch or megatron."""
