"""What a replica asks for and what a node has: refused where it cannot be had, set where it can."""

import os
from typing import Any

import pytest

import mqserve as serve
from tests.instances import new_name
from tests.shares import show_environment, shown

# Refusals, in both forms.


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ([], TypeError, "dict"),
        ("num_cpus", TypeError, "dict"),
        ({"lifetime": "detached"}, ValueError, "lifetime"),
        ({"name": "mine"}, ValueError, "name"),
        ({"max_restarts": 3}, ValueError, "max_restarts"),
        ({"placement_group": None}, ValueError, "placement_group"),
        ({"num_cpu": 1}, ValueError, "num_cpu"),
        ({"num_cpus": "1"}, TypeError, "num_cpus"),
        ({"num_cpus": True}, TypeError, "num_cpus"),
        ({"num_cpus": -1}, ValueError, "num_cpus"),
        ({"num_gpus": "1"}, TypeError, "num_gpus"),
        ({"num_gpus": -0.5}, ValueError, "num_gpus"),
        ({"num_gpus": 1.5}, ValueError, "whole"),
        ({"memory": "1G"}, TypeError, "memory"),
        ({"memory": -1}, ValueError, "memory"),
        ({"resources": ["tpu"]}, TypeError, "resources"),
        ({"resources": {"tpu": "1"}}, TypeError, "tpu"),
        ({"resources": {"tpu": -1}}, ValueError, "tpu"),
        ({"pip": "six"}, TypeError, "pip"),
        ({"python": 3}, TypeError, "python"),
    ],
    ids=str,
)
def test_actor_options_that_make_no_sense_are_refused(client: serve.Client, options: Any, error: type[Exception], words: str) -> None:
    name = new_name("b")
    for keyword in ("actor_options", "ray_actor_options"):
        with pytest.raises(error, match=words):
            client.create_backend(name, show_environment, **{keyword: options})
    assert name not in client.list_backends()


@pytest.mark.parametrize("options", [{"num_cpus": 10_000}, {"resources": {"unobtainium": 1}}, {"memory": 10**15}], ids=str)
def test_what_no_node_has_is_said_at_create_and_nothing_stays_registered(client: serve.Client, options: dict[str, Any]) -> None:
    name = new_name("b")
    with pytest.raises(serve.MQServeError, match=f"Cannot scale backend '{name}'"):
        client.create_backend(name, show_environment, actor_options=options)
    assert name not in client.list_backends()
    client.create_backend(name, show_environment)
    client.delete_backend(name)


def test_too_many_replicas_for_the_cpus_are_said_at_create_and_at_scaling(client: serve.Client) -> None:
    name = new_name("b")
    share = {"num_cpus": (os.cpu_count() or 1) / 2}
    with pytest.raises(serve.MQServeError, match="Cannot scale backend"):
        client.create_backend(name, show_environment, actor_options=share, config={"num_replicas": 3})
    assert name not in client.list_backends()
    client.create_backend(name, show_environment, actor_options=share, config={"num_replicas": 2})
    with pytest.raises(serve.MQServeError, match="Cannot scale backend"):
        client.update_backend_config(name, {"num_replicas": 3})
    assert len(shown(client, name, 2)) == 2
    client.delete_endpoint(name)
    client.delete_backend(name)


def test_a_deleted_backend_gives_its_share_back(client: serve.Client) -> None:
    whole = {"num_cpus": os.cpu_count() or 1}
    for _ in range(2):
        client.create_backend(name := new_name("b"), show_environment, actor_options=whole)
        client.delete_backend(name)


@pytest.mark.parametrize(
    "options", [{"num_gpus": 0.5}, {"python": "/usr/bin/python3"}, {"pip": ["six"]}], ids=["num_gpus", "python", "pip"]
)
@pytest.mark.parametrize("form", ["embedded"], indirect=True)
def test_the_embedded_form_refuses_by_name_what_one_process_cannot_give(client: serve.Client, options: dict[str, Any]) -> None:
    name = new_name("b")
    with pytest.raises(ValueError, match=f"{next(iter(options))} cannot be had in the embedded form"):
        client.create_backend(name, show_environment, actor_options=options)
    assert name not in client.list_backends()
