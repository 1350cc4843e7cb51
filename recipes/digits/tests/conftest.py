"""Run the tests of the recipe under the settings of the library's tests."""

import tests.conftest  # noqa: F401
