"""One replica's parts, on an embedded queue and store: what goes wrong with either is a subclass in the test."""

import pytest

from mqserve.broker.store_keys import StoreKeys


@pytest.fixture
def keys() -> StoreKeys:
    return StoreKeys("tests")
