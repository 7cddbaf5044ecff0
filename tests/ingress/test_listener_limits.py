"""How many clients there may be: never more than there are descriptors for (faults 87)."""

import resource

import pytest

from ingress.listener import OTHER_FILES, allow_connections

ENDLESS = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "allowed"),
    [
        (1024, ENDLESS, 12_000 + OTHER_FILES, 12_000),
        (1024, 524_288, 12_000 + OTHER_FILES, 12_000),
        (1024, 4096, 4096, 4096 - OTHER_FILES),
        (20_000, 20_000, None, 12_000),
        (ENDLESS, ENDLESS, None, 12_000),
        (64, 64, 64, 32),
    ],
)
def test_the_limit_is_raised(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised: int | None, allowed: int
) -> None:
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    assert allow_connections(12_000) == allowed
    assert set_to == ([] if raised is None else [(raised, hard)])
