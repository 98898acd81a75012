import pytest

from benchmarks.cost import ROW_SPECS, _rows

WAYS = ["levels", "levels in two", "codes", "codes in two"]


@pytest.mark.parametrize("spec", ROW_SPECS)
def test_rows_are_measured_in_one_pass_and_in_two(spec):
    row = _rows(spec, rounds=1)
    assert list(row) == ["spec", *WAYS]
    assert all(row[way] > 0 for way in WAYS)
