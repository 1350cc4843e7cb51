"""Compiled functions: one per function, networks and settings, counted, with donated states updated in place.

Shape letters: B batch rows, D width.
"""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsm_jax.errors import ForkError
from dsm_jax.runtime.compile import compilations, compiled, plain


class Scale(nnx.Module):
    def __init__(self, width: int):
        self.scale_D = nnx.Param(jnp.full((width,), 2.0))


def scaled(network: Scale, total_BD: jax.Array, x_BD: jax.Array) -> jax.Array:
    return total_BD + x_BD * network.scale_D[...]


def shifted(network: Scale, x_BD: jax.Array, settings: float) -> jax.Array:
    return x_BD * network.scale_D[...] + settings


def network(width: int = 3):
    return nnx.split(Scale(width))


def test_a_function_of_networks_becomes_one_of_parameters():
    graph, params = network()
    run = compiled(scaled, (graph,))
    assert run((params,), jnp.ones((2, 3)), jnp.ones((2, 3))).tolist() == [[3, 3, 3]] * 2
    other = jax.tree.map(lambda a: a + 1, params)
    assert run((other,), jnp.ones((2, 3)), jnp.ones((2, 3))).tolist() == [[4, 4, 4]] * 2


def test_states_and_their_plain_arrays_are_the_same_parameters():
    graph, params = network(6)
    run, before = compiled(scaled, (graph,)), compilations()
    networks = plain(params)
    assert [type(part) for part in networks] == [dict]
    assert plain(*networks)[0] is networks[0]
    for given in ((params,), networks):
        assert run(given, jnp.ones((1, 6)), jnp.ones((1, 6))).tolist() == [[3] * 6]
    assert compilations() == before + 1


def test_the_same_function_networks_and_settings_are_compiled_once():
    graph, params = network()
    assert compiled(shifted, (graph,), 1.0) is compiled(shifted, (network()[0],), 1.0)
    assert compiled(shifted, (graph,), 1.0) is not compiled(shifted, (graph,), 2.0)
    before = compilations()
    for settings in (1.0, 2.0, 1.0):
        assert compiled(shifted, (graph,), settings)((params,), jnp.zeros((4, 3)))[0, 0] == settings
    assert compilations() == before + 2


def test_compilations_are_counted_by_shape_and_not_by_call():
    graph, params = network(5)
    run, before = compiled(scaled, (graph,)), compilations()
    for rows in (1, 2, 2, 1):
        run((params,), jnp.ones((rows, 5)), jnp.ones((rows, 5)))
    assert compilations() == before + 2


def test_a_program_compiled_ahead_is_not_compiled_again(caplog):
    graph, params = network(7)
    run, before = compiled(scaled, (graph,), donate=(0,)), compilations()
    shape = jax.ShapeDtypeStruct((3, 7), np.float32)
    with caplog.at_level(logging.INFO, "dsm_jax"):
        run.compile((params,), shape, shape)
        run.compile((params,), shape, shape)
    assert compilations() == before + 1
    (message,) = caplog.messages
    assert re.fullmatch(r"compiled \S*\bscaled in \d+\.\d s", message)
    run((params,), jnp.ones((3, 7)), jnp.ones((3, 7)))
    assert compilations() == before + 1


def test_a_donated_argument_is_deleted_and_no_other():
    graph, params = network(9)
    total_BD, x_BD = jnp.ones((2, 9)), jnp.ones((2, 9))
    compiled(scaled, (graph,))((params,), total_BD, x_BD)
    result_BD = compiled(scaled, (graph,), donate=(0,))((params,), total_BD, x_BD)
    assert (total_BD.is_deleted(), x_BD.is_deleted()) == (True, False)
    assert not result_BD.is_deleted()


def test_freed_memory_is_returned_after_a_compilation_and_before_a_large_state(monkeypatch):
    returned = []
    monkeypatch.setattr("dsm_jax.runtime.compile.return_freed", lambda: returned.append(True))
    graph, params = network(8)
    run = compiled(scaled, (graph,))
    for rows, wanted in ((1, 1), (1, 1), (2**22, 2), (2**22, 3)):
        shape = jax.ShapeDtypeStruct((rows, 8), np.float32)
        run.compile((params,), shape, shape)
        assert len(returned) == wanted


def test_every_way_into_a_program_is_closed_to_a_forked_process(monkeypatch):
    graph, params = network()
    run, x_BD = compiled(scaled, (graph,)), jnp.ones((2, 3))
    monkeypatch.setattr("dsm_jax.process._first", -1)
    for way in (
        lambda: run((params,), x_BD, x_BD),
        lambda: run.compile((params,), x_BD, x_BD),
        lambda: compiled(shifted, (graph,), 7.0),
    ):
        with pytest.raises(ForkError):
            way()


def test_shapes_returns_the_shapes_of_the_results():
    graph, params = network(4)
    found = compiled(shifted, (graph,), 0.5).shapes((params,), jnp.zeros((2, 4)))
    assert (found.shape, found.dtype) == ((2, 4), np.float32)
