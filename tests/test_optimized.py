"""The helper that compiles as users do gives the program of a process without the settings of the tests."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from tests.helpers.optimized import OPTIONS, compile_optimized


def lowered() -> jax.stages.Lowered:
    """Lower a loop that XLA fuses, and unrolls in part."""

    def step(carry, x_D):
        carry = jnp.tanh(carry @ carry) + x_D
        return carry, jnp.exp(carry).sum() / (1 + jnp.abs(x_D).max())

    return jax.jit(lambda carry, x_TD: jax.lax.scan(step, carry, x_TD)).lower(jnp.ones((8, 8)), jnp.ones((3, 8)))


def text(compiled: jax.stages.Compiled) -> str:
    """Return the computations of a compiled program, without the places in the source that they come from."""
    parts = (compiled.as_text() or "").split("\n\n")
    computations = "\n\n".join(part for part in parts if "{\n" in part)
    return re.sub(r"(, (metadata=\{[^}]*\}|stack_frame_id=\d+))+", "", computations).strip()


@pytest.mark.slow
def test_an_optimized_program_is_that_of_a_process_without_the_settings_of_the_tests():
    environment = {name: value for name, value in os.environ.items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    code = "from tests.test_optimized import lowered, text; print(text(lowered().compile()))"
    users = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert users.stdout.count("fusion") > 1
    assert text(compile_optimized(lowered())) == users.stdout.strip()
    if "xla_cpu_use_fusion_emitters" in OPTIONS:  # else the settings of the tests change nothing that the text shows
        assert text(lowered().compile()) != users.stdout.strip()
