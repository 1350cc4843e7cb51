"""The list of tests that take long: it names tests that are there, and is read from a run's report."""

from types import SimpleNamespace

from tests import conftest
from tests.helpers import durations


def test_the_list_names_tests_that_are_there():
    known = durations.read_list()
    assert durations.missing(known) == []
    assert min(known.values()) >= round(durations.LONG_S)


def test_a_test_or_a_file_that_is_gone_is_found(tmp_path):
    (tmp_path / "test_here.py").write_text("def test_one():\n    pass\n\n\nasync def test_two(size):\n    pass\n")
    names = ["test_here.py::test_one", "test_here.py::test_two[3]", "test_here.py::test_on", "test_gone.py::test_one"]
    assert durations.missing(dict.fromkeys(names, 2.0), tmp_path) == names[2:]


def test_a_report_becomes_lines_with_the_longest_first(tmp_path):
    report = tmp_path / "run.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a" name="test_one[a b]" time="2.4"/>'
        '<testcase classname="tests.test_a" name="test_two" time="1.0"/>'
        '<testcase classname="recipes.digits.tests.test_b" name="test_three" time="40.6"/></testsuite></testsuites>'
    )
    later = tmp_path / "later.xml"
    later.write_text(
        '<testsuite><testcase classname="tests.test_a" name="test_four" time="1.6"/>'
        '<testcase classname="tests.test_a" name="test_one[a b]" time="0.1"/></testsuite>'
    )
    assert durations.lines_of(report, later)[1:] == ["2 tests/test_a.py::test_one[a b]", "2 tests/test_a.py::test_four"]
    lines = durations.lines_of(report)
    assert lines == ["41 recipes/digits/tests/test_b.py::test_three", "2 tests/test_a.py::test_one[a b]"]
    listed = tmp_path / "durations.txt"
    listed.write_text("\n".join(["# Seconds", *lines]) + "\n")
    known = durations.read_list(listed)
    assert known == {"recipes/digits/tests/test_b.py::test_three": 41, "tests/test_a.py::test_one[a b]": 2}
    assert durations.of_files(known | {"tests/test_a.py::test_two": 3}) == {
        "recipes/digits/tests/test_b.py": 41,
        "tests/test_a.py": 5,
    }


def test_listed_tests_are_marked_and_slow_tests_of_long_files_come_first(monkeypatch):
    class Item(SimpleNamespace):
        def add_marker(self, name):
            self.markers.add(name)

        def get_closest_marker(self, name):
            return name if name in self.markers else None

    def item(file, name, *markers):
        return Item(path=durations.ROOT / file, name=name, markers=set(markers))

    monkeypatch.setattr(durations, "read_list", lambda: {"tests/b.py::long": 9.0, "tests/c.py::long[1]": 20.0})
    items = [
        item("tests/a.py", "fast"),
        item("tests/a.py", "slow", "slow"),
        item("tests/b.py", "long", "slow"),
        item("tests/b.py", "slow", "slow"),
        item("tests/c.py", "long[0]"),
        item("tests/c.py", "long[1]", "slow"),
    ]
    conftest.pytest_collection_modifyitems(items)
    assert [(one.path.name, one.name) for one in items] == [
        *[("c.py", "long[1]"), ("b.py", "long"), ("b.py", "slow"), ("a.py", "slow")],
        *[("c.py", "long[0]"), ("a.py", "fast")],
    ]
    assert [one.name for one in items if "long" in one.markers] == ["long[1]", "long"]
