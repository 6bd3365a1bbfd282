"""The engine under other programs' networks: whole published networks and single Glow layers, in place."""

from ncsr_fast.compat.accelerate import AccelerationReport, accelerate, restore

__all__ = ["AccelerationReport", "accelerate", "restore"]
