"""Compile as users do, for devices that are not there."""

from tests.targets import devices

devices.prepare()
