"""Mid-training that makes base language models ready for reinforcement learning."""

__version__ = "0.1.0"
