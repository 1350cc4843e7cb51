"""Compile as users do, for devices that are not there."""

import pytest

from tests.targets import devices

try:
    devices.prepare()
except FileNotFoundError as error:
    raise pytest.UsageError(str(error)) from None
