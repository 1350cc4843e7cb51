"""Run the command line as `python -m dsm_jax`."""

from dsm_jax.cli import command

command()
