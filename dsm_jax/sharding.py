"""Where arrays lie on a mesh of devices: one table from axis letters to mesh axes, for parameters, states and inputs.

Names of parameters and of state fields end in the letters of their axes (docs/axes.md), so a name says how an array is
split. On the mesh axis "data" the rows of a batch are apart; on "model" heads, inner widths and vocabularies are.
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
    """Reads the axis letters off a name; "" where it has none."""
    found = _LETTERS.match(name)
    return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh, and which of its axes split which axes of arrays.

    An axis whose size does not divide stays whole, and so does one whose mesh axis the mesh does not have.

    Args:
      mesh: the devices, with an axis "data" for rows, an axis "model" for parts of layers, or both.
      rules: pairs of an axis letter and the mesh axis that splits it.

    Raises:
      ConfigError: rules of one's own name an axis that the mesh does not have.
    """

    mesh: Mesh
    rules: tuple[tuple[str, str], ...] = RULES

    def __post_init__(self) -> None:
        # A jitted function is to find out by itself how its arrays are split, whatever kind of mesh is given.
        object.__setattr__(self, "mesh", Mesh(self.mesh.devices, self.mesh.axis_names))
        names = list(self.mesh.axis_names)
        if self.rules != RULES and (wrong := sorted({axis for _, axis in self.rules} - set(names))):
            raise ConfigError(f"the rules name the mesh axes {wrong}; the mesh has {names}")

    def spec(self, letters: str, shape: Sequence[int]) -> PartitionSpec:
        """Says which mesh axis splits each axis of an array.

        Args:
          letters: of the array's axes.
          shape: of the array, all of it.
        """
        table, spec = dict(self.rules), []
        for letter, size in zip(letters, shape, strict=bool(letters)):
            over = table.get(letter)
            divides = over in self.mesh.axis_names and over not in spec and size % self.mesh.shape[over] == 0
            spec.append(over if divides else None)
        return PartitionSpec(*spec)

    def splits(self, letters: str) -> bool:
        """Says whether an array of these axes may be apart."""
        return any(letter in letters and self.mesh.shape.get(axis, 1) > 1 for letter, axis in self.rules)

    def named(self, name: str, shape: Sequence[int]) -> NamedSharding:
        """Returns the place of the array of that name."""
        return NamedSharding(self.mesh, self.spec(letters_of(name), shape))

    def zeros(self, name: str, shape: Sequence[int], dtype: Any) -> jax.Array:
        """Makes an array of zeros in its place: it is never whole on one device."""
        place = self.named(name, shape)
        # The device is for a call, the constraint for a trace.
        return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype, device=place), place)

    def places(self, tree: Any) -> Any:
        """Returns the place of every array of a tree, by the names of its fields."""

        return _by_name(tree, lambda name, leaf: NamedSharding(self.mesh, self.spec(*_axes(name, leaf))))

    def constrain(self, tree: Tree) -> Tree:
        """Keeps the arrays of a tree in their places, inside a jitted function; those without letters may be anywhere.

        Results that stay in their places are arguments for which the function has been compiled already.
        """

        def keep(name: str, leaf: Any) -> Any:
            letters, shape = _axes(name, leaf)
            return jax.lax.with_sharding_constraint(leaf, self.named(letters, shape)) if letters else leaf

        return _by_name(tree, keep)

    @property
    def rows(self) -> "Sharding":
        """The same mesh where nothing but rows is apart."""
        names = self.mesh.axis_names
        return Sharding(
            self.mesh, tuple((letter, axis) for letter, axis in self.rules if letter == "B" and axis in names)
        )

    def over_rows(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Makes a function run on every device's own rows, without any exchange.

        Args:
          function: maps arrays and trees of them to a tree in which every array has rows. The names of its parameters,
            and of the fields of trees, spell axes; what has no axis B is on every device.

        Returns:
          A function of whole arrays; `function` itself where the mesh has no axis for rows, or they do not divide.

        Raises:
          ConfigError: when called, a result without rows.
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
            # Nothing is summed over devices, so there is nothing to check; a loop's first carry would not pass.
            apart = jax.shard_map(
                function, mesh=self.mesh, in_specs=specs, out_specs=outputs, axis_names=axes, check_vma=False
            )
            return apart(*arrays)

        return run

    def each_part(self, function: Callable[..., Any], inputs: Sequence[str], outputs: Any) -> Callable[..., Any]:
        """Makes a function run on every device's own part of its arrays, without any exchange.

        Args:
          function: maps arrays to arrays; no part of the result may depend on another part of the inputs.
          inputs: the letters of each argument's axes.
          outputs: a tree like the result, with the letters of each array.

        Returns:
          A function of whole arrays.
        """

        def run(*arrays: jax.Array) -> Any:
            # Inside another such function some mesh axes are apart already, and the mesh is that function's.
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
    """Maps every array of a tree with the last of its fields' names that spells axes, "" where there is none.

    An int8 weight's fields are named after the weight, by their own order: its values have outputs first.
    """

    def one(path: tuple, leaf: Any) -> Any:
        names = [str(getattr(key, "name", getattr(key, "key", ""))) for key in path]
        name = next((name for name in reversed(names) if letters_of(name)), "")
        if not isinstance(leaf, QuantizedArray):
            return make(name, leaf)
        letters, outputs = letters_of(name), leaf.scale.ndim
        inputs = len(letters) - outputs
        values, scale = letters[inputs:] + letters[:inputs], letters[inputs:]
        return QuantizedArray(make(values, leaf.values), make(scale, leaf.scale))

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=lambda node: isinstance(node, QuantizedArray))


def _axes(name: str, leaf: Any) -> tuple[str, tuple[int, ...]]:
    letters = letters_of(name)
    return letters if len(letters) == len(leaf.shape) else "", tuple(leaf.shape)


def set_sharding(module: nnx.Module, sharding: Sharding | None) -> None:
    """Tells a module, parts included, how its parameters are split; None if they are not.

    Args:
      module: its structure changes, its parameters stay where they are.
      sharding: of the parameters and the states.
    """
    for _, part in nnx.iter_modules(module):
        if hasattr(part, "sharding"):
            setattr(part, "sharding", sharding)  # noqa: B010  not every module has one
