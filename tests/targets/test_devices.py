"""The compilers are those of the installed jax, and a device's facts are known to them."""

from importlib.metadata import distributions, version

import pytest
from packaging.requirements import Requirement

from tests.targets import devices
from tests.targets.plugins import requirements


def test_the_compilers_are_those_that_the_installed_jax_names():
    wanted = {one.name: one.specifier for one in map(Requirement, requirements())}
    found = {
        one.metadata["Name"].lower().replace("_", "-"): one.version for one in distributions(path=[devices.PLUGINS])
    }
    assert found.keys() == wanted.keys()
    assert all(specifier.contains(found[name]) for name, specifier in wanted.items())
    assert {found[name] for name in found if name.startswith("jax-cuda")} == {version("jax")}


def test_compilers_of_another_jax_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "PLUGINS", tmp_path / "targets")
    for made in (False, True):
        if made:
            (tmp_path / "targets/nvidia/cu13").mkdir(parents=True)
            (tmp_path / "targets.txt").write_text("libtpu==0.0.1")
        with pytest.raises(
            FileNotFoundError, match=r"does not hold the compilers that the installed jax names; remove"
        ):
            devices.prepare()


@pytest.mark.parametrize(("name", "kind", "count"), [("v5e", "TPU v5 lite", 4), ("h200", "NVIDIA H200 141GB HBM3e", 1)])
def test_a_device_is_there_without_being_there(name, kind, count):
    assert [device.device_kind for device in devices.devices(name)] == [kind] * count
