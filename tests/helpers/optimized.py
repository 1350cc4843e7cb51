"""Compile programs with XLA's optimisations, as users do; tests compile without most of them (docs/decisions/0016)."""

import os

import jax

# The values that XLA has without the settings of tests/conftest.py.
OPTIONS: jax.stages.CompilerOptions = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if "--xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"].split():
    OPTIONS["xla_cpu_use_fusion_emitters"] = True


def compile_optimized(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile a lowered function as users do, to look at its memory or its text."""
    return lowered.compile(compiler_options=OPTIONS)
