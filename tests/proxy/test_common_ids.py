"""Ids that the proxies of one port recognize."""

from mqserve.broker.envelope import is_minted, mint_id
from mqserve.proxy.common_ids import CommonIds

KEY = b"k" * 32


def test_an_id_is_recognized_by_every_proxy_of_the_port_and_by_no_other() -> None:
    ids = {CommonIds(KEY).mint() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(is_minted(id) and CommonIds(KEY).are_ours(id) for id in ids)
    assert not any(CommonIds(b"o" * 32).are_ours(id) for id in ids)


def test_an_id_that_somebody_made_up_is_nobodys() -> None:
    assert not any(CommonIds(KEY).are_ours(mint_id()) for _ in range(1000))
