"""Compile with XLA's optimisations, as users do: other tests leave them out to save time."""

from tests.helpers.environment import compile_as_users_do

compile_as_users_do()
