"""Transforms are exact inverses, and tables with gaps or overlaps are caught."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsm_jax.convert import pieces, transforms


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["conv", "transpose", "depthwise", "stacked", "axes", "heads", "halves", "pointwise"]), st.data()
)
def test_every_transform_is_undone_exactly(kind, data):
    n = st.integers(1, 4)
    a, b, stride = data.draw(n), data.draw(n), data.draw(n)
    transform, shape = {
        "conv": (transforms.CONV, (a, b, stride)),
        "transpose": (transforms.conv_transpose(stride), (a, b, 2 * stride)),
        "depthwise": (transforms.depthwise(stride), (a, 1, 2 * stride)),
        "axes": (transforms.linear((stride, 2), (a, b)), (stride * 2, a * b)),
        "heads": (transforms.heads(a, stride, half_split=False), (a * stride * 2, b)),
        "halves": (transforms.heads(a, stride, half_split=True), (a * stride * 4, b)),
        "stacked": (transforms.STACKED, (stride, a, b)),
        "pointwise": (transforms.POINTWISE, (a, b, 1)),
    }[kind]
    tensor = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    (back,) = transform.save(transform.load(tensor))
    np.testing.assert_array_equal(back, tensor)


def test_a_transposed_convolution_has_the_tap_of_the_older_step_first():
    w_CDM = np.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    w_MCE = transforms.conv_transpose(2).load(w_CDM)
    for c in range(2):
        for s in range(2):
            np.testing.assert_array_equal(w_MCE[0, c, s * 3 : s * 3 + 3], w_CDM[c, :, 2 + s])
            np.testing.assert_array_equal(w_MCE[1, c, s * 3 : s * 3 + 3], w_CDM[c, :, s])


def test_rotation_by_halves_becomes_rotation_of_adjacent_pairs():
    w_D1 = np.arange(8.0)[:, None]  # two heads, [0, 1 | 2, 3] and [4, 5 | 6, 7]
    assert transforms.heads(2, 1, half_split=True).load(w_D1)[..., 0].tolist() == [[[0, 2, 1, 3], [4, 6, 5, 7]]]


def test_queries_that_share_a_key_become_parts_of_its_head():
    w_E1 = np.arange(8.0)[:, None]  # queries 0 and 1 of the first key/value head, 2 and 3 of the second; H is 2
    w_PKH1 = transforms.heads(2, 2, half_split=False).load(w_E1)
    assert w_PKH1[..., 0].tolist() == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_a_codebook_is_sums_over_counts_and_an_unused_entry_is_not_divided_by_zero():
    sums = np.array([[2.0, 4.0], [3.0, 3.0]], np.float32)
    loaded = transforms.CODEBOOK.load(sums, np.array([2.0, 0.0], np.float32))
    np.testing.assert_array_equal(loaded, np.array([[1.0, 2.0], sums[1] / np.float32(1e-5)], np.float32))


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ([pieces.piece("a", "w", at=(slice(0, 1),))], "unfilled: the table fills 3 of the 6 values of w"),
        ([pieces.piece("a", "w"), pieces.piece("b", "w")], "unfilled: the table fills 12 of the 6 values of w"),
        (
            [pieces.piece("a", "w", at=(slice(0, 1),)), pieces.piece("b", "w", at=(slice(0, 1),))],
            "unfilled: the table fills 6 of the 6 values of w",
        ),
        ([pieces.piece("a", "w"), pieces.piece("b", "gone")], "the table fills gone, which the model does not have"),
        (
            [pieces.piece("a", "w", at=(0,), rows=(0, 3)), pieces.piece("a", "w", at=(1,), rows=(4, 7))],
            "twice: the rows of a that the table claims overlap, or leave a gap: [(0, 3), (4, 7)]",
        ),
        ([pieces.piece("a", "w"), pieces.piece("a", "v")], "twice: a is claimed by 2 pieces of the table"),
    ],
)
def test_a_fault_in_a_table_is_caught(table, fault):
    tensors = {name: pieces.Tensor((2, 3), "F32", lambda rows: np.zeros((2, 3))) for name in "ab"}
    parameters = {name: jax.ShapeDtypeStruct((2, 3), np.float32) for name in "wv"}
    assert fault in pieces.plan(table, tensors, parameters)[1]


def test_copies_of_a_tied_tensor_are_compared_block_by_block():
    values = {"a": np.arange(6.0).reshape(2, 3), "b": np.arange(6.0).reshape(2, 3)}
    tensors = {
        name: pieces.Tensor((2, 3), "F32", lambda rows, v=v: v if rows is None else v[slice(*rows)])
        for name, v in values.items()
    }
    parameters = {"w": jax.ShapeDtypeStruct((2, 3), np.float32)}
    for table in (
        [pieces.piece(("a", "b"), "w", tied=True)],
        [pieces.piece(("a", "b"), "w", at=(slice(i, i + 1),), rows=(i, i + 1), tied=True) for i in (0, 1)],
    ):
        values["b"][1, 2] = 5
        claims, faults = pieces.plan(table, tensors, parameters)
        assert (faults, pieces.copy_faults(claims, tensors)) == ([], [])
        values["b"][1, 2] = 7
        assert pieces.copy_faults(claims, tensors) == [
            "unequal: b and a are one table of the model, but their values differ"
        ]
        for name in "ab":  # one of the two is enough
            alone, faults = pieces.plan(table, {name: tensors[name]}, parameters)
            assert (faults, pieces.copy_faults(alone, tensors)) == ([], [])
            assert {claim.names for claim in alone} == {(name,)}
    assert pieces.plan([pieces.piece(("a", "b"), "w")], tensors, parameters)[1][0].startswith("twice: a and b are")


def test_a_quantised_tensor_is_refused():
    tensors = {"a": pieces.Tensor((2, 3), "I8", lambda rows: np.zeros((2, 3)))}
    _, faults = pieces.plan([pieces.piece("a", "w")], tensors, {"w": jax.ShapeDtypeStruct((2, 3), np.float32)})
    assert faults == ["dtype: a is I8, expected one of BF16, F16, F32, F64"]
