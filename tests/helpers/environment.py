"""The settings of tests that compile as users do; set them before JAX is imported."""

import os

# XLA's older emitters: docs/decisions/0016.
OLDER_EMITTERS = "--xla_cpu_use_fusion_emitters=false"


def has_older_emitters() -> bool:
    """Tell whether XLA is told to use its older emitters."""
    return OLDER_EMITTERS in os.environ.get("XLA_FLAGS", "").split()


def compile_as_users_do() -> None:
    """Take back the settings of tests/conftest.py that leave out optimisations to save time."""
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "false"
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(flag for flag in flags if flag != OLDER_EMITTERS)
