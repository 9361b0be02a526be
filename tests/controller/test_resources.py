"""What a replica may ask for."""

from typing import Any

import pytest

from mqserve.broker.errors import BadValue
from mqserve.controller.resources import parse_actor_options


@pytest.mark.parametrize("options", [{"python": "/bin/py\0thon"}, {"pip": ["one", "two\0"]}])
def test_what_no_process_could_be_told_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadValue, match="cannot hold a NUL"):
        parse_actor_options(options)
