"""Compile with XLA's optimisations, as users do: other tests leave them out to save time."""

import os

os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "false"
_FLAGS = os.environ["XLA_FLAGS"].split()
os.environ["XLA_FLAGS"] = " ".join(flag for flag in _FLAGS if not flag.startswith("--xla_cpu_use_fusion_emitters"))
