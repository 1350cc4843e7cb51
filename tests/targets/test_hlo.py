"""The checks find planted faults, on both devices.

Shape letters: B batch rows, K heads, S slots of a cache, H head width, D width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.targets import hlo
from tests.targets.devices import DEVICES, devices

CACHE = jax.ShapeDtypeStruct((4, 8, 500, 128), jnp.bfloat16)
NEW = jax.ShapeDtypeStruct((4, 8, 128), jnp.bfloat16)
SLOT = jax.ShapeDtypeStruct((4,), jnp.int32)
MATRIX = jax.ShapeDtypeStruct((256, 256), jnp.float32)


def compile_for(device: str, function: Any, *shapes: jax.ShapeDtypeStruct, **options: Any) -> jax.stages.Compiled:
    place = jax.sharding.SingleDeviceSharding(devices(device)[0])
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in shapes]
    return jax.jit(function, **options).lower(*args).compile()


def write(cache_BKSH: jax.Array, new_BKH: jax.Array, slot_B: jax.Array) -> jax.Array:
    rows_B1, heads_K = jnp.arange(4)[:, None], jnp.arange(8)
    return cache_BKSH.at[rows_B1, heads_K, slot_B[:, None]].set(new_BKH, mode="drop")


def write_and_read_what_was_there(cache_BKSH: jax.Array, new_BKH: jax.Array, slot_B: jax.Array):
    after_BKSH = write(cache_BKSH, new_BKH, slot_B)
    return after_BKSH, jax.lax.optimization_barrier((cache_BKSH, after_BKSH))[0].sum()


def write_to_some_rows(cache_BKSH: jax.Array, new_BKH: jax.Array, slot_B: jax.Array) -> jax.Array:
    return jnp.where((slot_B > 0)[:, None, None, None], write(cache_BKSH, new_BKH, slot_B), cache_BKSH)


def write_in_a_branch(cache_BKSH: jax.Array, new_BKH: jax.Array, slot_B: jax.Array) -> jax.Array:
    return jax.lax.cond(slot_B.any(), lambda: write(cache_BKSH, new_BKH, slot_B), lambda: cache_BKSH)


def text_of(compiled: jax.stages.Compiled) -> str:
    return compiled.as_text() or ""


def test_a_write_in_place_is_no_copy():
    compiled = compile_for("h200", write, CACHE, NEW, SLOT, donate_argnums=0)
    assert hlo.copies(text_of(compiled), [CACHE]) == {}
    assert compiled.memory_analysis().alias_size_in_bytes == CACHE.size * 2


@pytest.mark.parametrize("device", DEVICES)
def test_a_state_that_is_not_donated_is_seen(device):
    compiled = compile_for(device, write, CACHE, NEW, SLOT)
    assert compiled.memory_analysis().alias_size_in_bytes == 0


@pytest.mark.parametrize("function", [write_and_read_what_was_there, write_to_some_rows, write_in_a_branch])
def test_a_copy_of_a_cache_is_found(function):
    compiled = compile_for("h200", function, CACHE, NEW, SLOT, donate_argnums=0)
    assert hlo.copies(text_of(compiled), [CACHE]).keys() == {"bf16[4,8,500,128]"}


def test_a_copy_of_a_cache_that_is_not_donated_is_found():
    assert hlo.copies(text_of(compile_for("h200", write, CACHE, NEW, SLOT)), [CACHE]) == {"bf16[4,8,500,128]": 1}


@pytest.mark.parametrize("device", DEVICES)
def test_products_of_rounded_operands_are_found(device):
    rounded, whole = (
        hlo.faults(text_of(compile_for(device, functools.partial(jnp.dot, precision=precision), MATRIX, MATRIX)))
        for precision in ("default", "highest")
    )
    (fault,) = rounded
    assert "rounds the operands of a float32 product" in fault
    assert whole == []


def doubled(x: jax.Array) -> jax.Array:
    jax.debug.callback(lambda seen: None, x)
    return 2 * x


def test_a_question_to_the_host_is_found():
    found = hlo.faults(text_of(compile_for("v5e", doubled, MATRIX)))
    assert found
    assert all("asks the host" in fault for fault in found)
    with pytest.raises(RuntimeError, match="Unknown backend: 'gpu'"):
        compile_for("h200", doubled, MATRIX)


@pytest.mark.parametrize("device", DEVICES)
def test_an_operation_that_a_device_lacks_is_an_error(device):
    with pytest.raises(NotImplementedError, match="schur"):
        compile_for(device, jax.scipy.linalg.schur, MATRIX)


@pytest.mark.parametrize("device", DEVICES)
def test_arrays_of_64_bits_are_found(device):
    with jax.enable_x64(True):
        compiled = compile_for(device, lambda x: x.astype(jnp.float64).sum(), MATRIX)
    assert any("computes in 64 bits" in fault for fault in hlo.faults(text_of(compiled)))


def test_a_gather_of_a_cache_is_found():
    mesh = jax.sharding.Mesh(devices("v5e"), ("model",))
    split, whole = (jax.NamedSharding(mesh, jax.P(*spec)) for spec in ((None, "model"), ()))
    cache = jax.ShapeDtypeStruct(CACHE.shape, CACHE.dtype, sharding=split)
    compiled = jax.jit(lambda cache_BKSH: cache_BKSH + 1, out_shardings=whole).lower(cache).compile()
    assert hlo.collectives(text_of(compiled)) == {"all-gather": ["bf16[4,8,500,128]"]}
