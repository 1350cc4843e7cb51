"""What is compared with the references is compiled as users compile it, where other tests save themselves the time."""

import os

os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "false"
_FLAGS = os.environ["XLA_FLAGS"].split()
os.environ["XLA_FLAGS"] = " ".join(flag for flag in _FLAGS if not flag.startswith("--xla_cpu_use_fusion_emitters"))
