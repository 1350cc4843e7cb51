"""Collections of garbage are put off while objects are made that stay, and only then."""

import gc

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dsm_jax import checkpoints
from dsm_jax.garbage import no_collections
from dsm_jax.runtime.compile import compiled
from tests.helpers import stt_model


class Empty(nnx.Module):
    pass


def test_collections_are_off_within_a_block_and_on_after_it_whatever_happens():
    with no_collections():
        assert not gc.isenabled()
        with no_collections():
            assert not gc.isenabled()
        assert not gc.isenabled(), "the outer block has not ended"
    assert gc.isenabled()
    with pytest.raises(ValueError, match="wrong"), no_collections():
        raise ValueError("wrong")
    assert gc.isenabled()


def test_a_program_that_has_switched_collections_off_finds_them_off():
    gc.disable()
    try:
        with no_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_tracing_and_loading_run_without_collections():
    seen = []

    def traced(_: Empty, x: jax.Array) -> jax.Array:
        seen.append(gc.isenabled())
        return x

    graph, params = nnx.split(Empty())
    compiled(traced, (graph,)).compile((params,), jnp.zeros(3))
    checkpoints.load(stt_model.CHECKPOINT, progress=lambda _: seen.append(gc.isenabled()))
    assert len(seen) > 1
    assert not any(seen)
    assert gc.isenabled()
