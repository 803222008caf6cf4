"""Policies, schedulers, students, sampler and trainer of pi-Flow (arXiv 2510.14974): few-step generation.

Import what you need from the sub-packages. None of them touches a device when imported, and each names the extra that
it needs: `piflow.policies`, `piflow.distillation` and `piflow.sampler` need torch alone.
"""

__version__ = "0.1.0"
