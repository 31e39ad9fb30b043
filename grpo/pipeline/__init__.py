"""A chain of stages as one command: `python -m grpo.pipeline` (see `__main__`)."""

from grpo.pipeline.chain import Pipeline, Stage

__all__ = ["Pipeline", "Stage"]
