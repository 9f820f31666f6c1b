"""Numbers of forms: what other programs may send instead."""
from __future__ import annotations

import pytest

from ldm.common.errors import UserError
from ldm.web.numbers import number_in, whole_number_in


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.1, "1", None, True, [0.5], 10 ** 400])
def test_what_is_no_number_in_range_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="^bias: give a number from 0 to 1$"):
        number_in("bias", value, 0, 1)


def test_numbers_in_range_pass() -> None:
    assert number_in("bias", 1, 0, 1) == 1.0
    assert whole_number_in("steps", 5.0, 1, 10) == 5
    assert whole_number_in("steps", None, 1, 10) == 1
    with pytest.raises(UserError, match="steps: give a whole number"):
        whole_number_in("steps", 5.5, 1, 10)
    with pytest.raises(UserError, match="from 0 to 4294967295"):
        whole_number_in("seed", -1, 0, 2 ** 32 - 1)
