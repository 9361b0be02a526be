"""The two forms of the store, as the contract tests of `broker/` have them."""

from tests.broker.conftest import form, keys, store

__all__ = ["form", "keys", "store"]
