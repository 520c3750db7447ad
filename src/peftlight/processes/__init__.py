"""Trainings on many processes."""

from peftlight.processes.sharded import FSDP2Strategy

__all__ = ["FSDP2Strategy"]
