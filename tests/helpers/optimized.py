"""Compile programs with XLA's optimisations, as users do; tests compile without most of them (docs/decisions/0016)."""

import jax

from tests.helpers.environment import has_older_emitters

# The values that XLA has without the settings of tests/conftest.py.
OPTIONS: jax.stages.CompilerOptions = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if has_older_emitters():
    OPTIONS["xla_cpu_use_fusion_emitters"] = True


def compile_optimized(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile a lowered function as users do, to look at its memory or its text."""
    return lowered.compile(compiler_options=OPTIONS)
