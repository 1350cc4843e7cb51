"""Sharding on a mesh of devices: one table maps axis letters to mesh axes, for parameters, states and inputs.

Names of parameters and of state fields end in the letters of their axes (docs/axes.md), so an array's name determines
its sharding. The mesh axis "data" splits the rows of a batch; "model" splits heads, inner widths and vocabularies.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsm_jax.errors import ConfigError
from dsm_jax.nn.quant import QuantizedArray

RULES = (("B", "data"), ("K", "model"), ("F", "model"), ("V", "model"))
_LETTERS = re.compile(r"(?:.*_)?([A-Z0-9]+)$")
Tree = TypeVar("Tree")


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)


def letters_of(name: str) -> str:
    """Return the axis letters at the end of a name; "" if it has none."""
    found = _LETTERS.match(name)
    return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh, and the rules that map axes of arrays to its axes.

    An axis is not split if the mesh lacks its mesh axis, or if that axis's size does not divide the array's.

    Args:
      mesh: the devices, with an axis "data" for rows, an axis "model" for parts of layers, or both.
      rules: pairs of an axis letter and the mesh axis that splits it.

    Raises:
      ConfigError: rules other than the default name an axis that the mesh does not have, or the default ones name none
        of the mesh's.
    """

    mesh: Mesh
    rules: tuple[tuple[str, str], ...] = RULES

    def __post_init__(self) -> None:
        # Axes of type "auto", whatever type the given mesh has: jitted functions infer the sharding of their arrays.
        object.__setattr__(self, "mesh", Mesh(self.mesh.devices, self.mesh.axis_names))
        names = list(self.mesh.axis_names)
        if self.rules == RULES and names and not {axis for _, axis in RULES} & set(names):
            raise ConfigError(
                f'the mesh has the axes {names}, which split nothing; name one "data", over which rows are spread, or '
                '"model", over which the parameters are, or give rules'
            )
        if self.rules != RULES and (wrong := sorted({axis for _, axis in self.rules} - set(names))):
            raise ConfigError(f"the rules name the mesh axes {wrong}; the mesh has {names}")

    def spec(self, letters: str, shape: Sequence[int]) -> PartitionSpec:
        """Return the mesh axis that splits each axis of an array.

        Args:
          letters: letters of the array's axes.
          shape: global shape of the array.
        """
        table, spec = dict(self.rules), []
        for letter, size in zip(letters, shape, strict=bool(letters)):
            over = table.get(letter)
            divides = over in self.mesh.axis_names and over not in spec and size % self.mesh.shape[over] == 0
            spec.append(over if divides else None)
        return PartitionSpec(*spec)

    def splits(self, letters: str) -> bool:
        """Return whether an array with these axes may be split."""
        return any(letter in letters and self.mesh.shape.get(axis, 1) > 1 for letter, axis in self.rules)

    def named(self, name: str, shape: Sequence[int]) -> NamedSharding:
        """Return the sharding of the array of that name."""
        return NamedSharding(self.mesh, self.spec(letters_of(name), shape))

    def zeros(self, name: str, shape: Sequence[int], dtype: Any) -> jax.Array:
        """Make a sharded array of zeros, which is never whole on one device."""
        place = self.named(name, shape)
        # `device` takes effect outside jit, the constraint inside.
        return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype, device=place), place)

    def places(self, tree: Any) -> Any:
        """Return the sharding of every array of a tree, by the names of its fields."""

        return _by_name(tree, lambda name, leaf: NamedSharding(self.mesh, self.spec(*_axes(name, leaf))))

    def constrain(self, tree: Tree) -> Tree:
        """Constrain the arrays of a tree to their shardings, inside a jitted function; skip arrays without letters.

        A function whose results keep the shardings of its arguments is not compiled again when they are passed back.
        """

        def keep(name: str, leaf: Any) -> Any:
            letters, shape = _axes(name, leaf)
            return jax.lax.with_sharding_constraint(leaf, self.named(letters, shape)) if letters else leaf

        return _by_name(tree, keep)

    @property
    def rows(self) -> "Sharding":
        """The same mesh with the rule for rows only."""
        names = self.mesh.axis_names
        return Sharding(
            self.mesh, tuple((letter, axis) for letter, axis in self.rules if letter == "B" and axis in names)
        )

    def over_rows(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make a function run on every device's own rows, without communication.

        Args:
          function: maps trees of arrays to a tree in which every array has rows. The names of its parameters, and of
            the fields of trees, end in axis letters; arrays without an axis B are replicated.

        Returns:
          A function of global arrays. It calls `function` directly if the mesh does not split the rows.

        Raises:
          ConfigError: when called, if a result has no axis B.
        """
        rows, names = self.rows, list(inspect.signature(function).parameters)

        def spec(name: str, leaf: Any) -> PartitionSpec:
            return rows.spec(*_axes(name, leaf))

        def result(name: str, leaf: Any) -> PartitionSpec:
            if "B" not in _axes(name, leaf)[0]:
                raise ConfigError(f"the result {name or leaf.shape} has no axis B; name its axes, or leave it out")
            return spec(name, leaf)

        def run(*arrays: Any) -> Any:
            inputs = _by_name(dict(zip(names, arrays, strict=True)), spec)
            outputs = _by_name(jax.eval_shape(function, *arrays), result)
            axes = {axis for one in jax.tree.leaves((inputs, outputs), is_leaf=_is_spec) for axis in one if axis}
            if not axes:
                return function(*arrays)
            specs = tuple(inputs[name] for name in names)
            # Without sums over devices, `check_vma` has nothing to check, and it would refuse a loop's first carry.
            apart = jax.shard_map(
                function, mesh=self.mesh, in_specs=specs, out_specs=outputs, axis_names=axes, check_vma=False
            )
            return apart(*arrays)

        return run

    def each_part(self, function: Callable[..., Any], inputs: Sequence[str], outputs: Any) -> Callable[..., Any]:
        """Make a function run on every device's own part of its arrays, without communication.

        Args:
          function: maps arrays to arrays; a device's part of the result must depend on its parts of the inputs only.
          inputs: axis letters of each argument.
          outputs: a tree like the result, with the axis letters of each array.

        Returns:
          A function of global arrays.
        """

        def run(*arrays: jax.Array) -> Any:
            # Inside another `shard_map`, its mesh is the current one, and some of the mesh's axes are already manual.
            outer = jax.sharding.get_abstract_mesh()
            done = set() if outer.empty else set(outer.manual_axes)
            sizes = {
                letter: n
                for names, a in zip(inputs, arrays, strict=True)
                for letter, n in zip(names, a.shape, strict=True)
            }

            def spec(letters: str) -> PartitionSpec:
                whole = self.spec(letters, [sizes[letter] for letter in letters])
                return PartitionSpec(*(None if axis in done else axis for axis in whole))

            specs = tuple(map(spec, inputs))
            axes = {axis for one in specs for axis in one if axis is not None}
            if not axes:
                return function(*arrays)
            mesh = self.mesh if outer.empty else None
            apart = jax.shard_map(
                function, mesh=mesh, in_specs=specs, out_specs=jax.tree.map(spec, outputs), axis_names=axes
            )
            return apart(*arrays)

        return run


def _by_name(tree: Any, make: Callable[[str, Any], Any]) -> Any:
    """Map (name, array) for every array of a tree: the last name on its path that ends in axis letters, or "".

    The scale of an int8 weight has the letters of the weight's outputs, which come first.
    """

    def one(path: tuple, leaf: Any) -> Any:
        names = [str(getattr(key, "name", getattr(key, "key", ""))) for key in path]
        name = next((name for name in reversed(names) if letters_of(name)), "")
        if not isinstance(leaf, QuantizedArray):
            return make(name, leaf)
        return QuantizedArray(make(name, leaf.values), make(letters_of(name)[: leaf.scale.ndim], leaf.scale))

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=lambda node: isinstance(node, QuantizedArray))


def _axes(name: str, leaf: Any) -> tuple[str, tuple[int, ...]]:
    letters = letters_of(name)
    return letters if len(letters) == len(leaf.shape) else "", tuple(leaf.shape)


def set_sharding(module: nnx.Module, sharding: Sharding | None) -> None:
    """Set the attribute `sharding` of a module and its parts.

    Args:
      module: changed in place; its parameters are not moved.
      sharding: sharding of the parameters and the states; None for no split.
    """
    for _, part in nnx.iter_modules(module):
        if hasattr(part, "sharding"):
            setattr(part, "sharding", sharding)  # noqa: B010  not every module has one
