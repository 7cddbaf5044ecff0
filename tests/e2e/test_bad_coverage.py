"""Every number of faults.md, section 2, groups A to E, has a case, or a reason why it has none yet."""

from types import ModuleType

import pytest

from tests.e2e import (
    test_bad_destinations,
    test_bad_framing,
    test_bad_headers,
    test_bad_json,
    test_bad_names,
)

#: The numbers as the list gives them; those it leaves out do not exist.
NUMBERS: dict[str, set[int]] = {
    "A": set(range(1, 48)) - {8, 15, 41},
    "B": set(range(48, 69)) - {55},
    "C": set(range(69, 85)) - {75, 79, 80},
    "D": set(range(85, 109)) - {106},
    "E": set(range(109, 115)) - {110},
}
NOT_YET = {
    "C82": "Idempotency-Key comes with the idempotency issue",
    "C84": "there is no admin port yet",
}
MODULES = {
    "A": test_bad_json,
    "B": test_bad_framing,
    "C": test_bad_headers,
    "D": test_bad_names,
    "E": test_bad_destinations,
}


def covered(module: ModuleType) -> set[str]:
    """The ids in the module's table and on its tests."""
    found = {case.covers for case in module.CASES}
    for value in vars(module).values():
        found.update(getattr(value, "covered_ids", ()))
    return found


@pytest.mark.parametrize("group", MODULES)
def test_every_number_has_a_case(group: str) -> None:
    wanted = {f"{group}{number}" for number in NUMBERS[group]}
    assert covered(MODULES[group]) == wanted - set(NOT_YET)


def test_ids_are_their_own() -> None:
    """A failing case is named by its id alone."""
    ids = [case.id for module in MODULES.values() for case in module.CASES]
    assert len(ids) == len(set(ids))
    assert len(ids) >= 150
