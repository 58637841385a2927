"""The first line of an error's message."""

import pytest

from fedloom.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError(), "ValueError"), (EOFError(" \n"), "EOFError"), (OSError("\nno route\nto x"), "no route")],
)
def test_an_error_has_a_first_line_even_without_a_message(error, line):
    assert first_line(error) == line
