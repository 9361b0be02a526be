"""What a replica may ask for, and what a node may say it has."""

from typing import Any

import pytest

from mqserve.broker.errors import BadValue
from mqserve.controller.machine_resources import measure_node
from mqserve.controller.state.resources import parse_actor_options, parse_node_resources


@pytest.mark.parametrize("options", [{"python": "/bin/py\0thon"}, {"pip": ["one", "two\0"]}])
def test_what_no_process_could_be_told_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadValue, match="cannot hold a NUL"):
        parse_actor_options(options)


@pytest.mark.parametrize("amount", [float("nan"), float("inf"), -1.0])
def test_what_no_machine_has_is_refused(amount: float) -> None:
    with pytest.raises(BadValue, match="--num-cpus is"):
        measure_node(amount, None, {})
    with pytest.raises(BadValue, match="--num-gpus is -1"):
        measure_node(None, -1, {})
    with pytest.raises(BadValue, match="'tpu' is -1"):
        parse_node_resources('{"tpu": -1}')
