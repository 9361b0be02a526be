"""`mqserve setup --print`: users and rights for the two servers, and no password that nobody chose."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import pytest

from mqserve.broker import queue_names
from mqserve.commands.setup import ROLES, acl_rules, broker_rights
from tests.instances import CommandLine

PASSWORDS = {f"MQSERVE_{role.upper()}_PASSWORD": f"the secret of {role}" for role in ROLES}


def test_the_lines_for_a_shell_hold_no_password_and_every_role(shell: CommandLine) -> None:
    printed = shell.with_variables(**PASSWORDS).run("setup", "--print", "--namespace", "shop").stdout
    assert "the secret" not in printed
    assert {role for role in ROLES if f"redis-cli -x ACL SETUSER shop-{role} reset on" in printed} == set(ROLES)
    assert set(re.findall(r"rabbitmqctl add_user shop-(\w+)", printed)) == set(ROLES) - {"node"}
    assert all(f'"${{{name}:?}}"' in printed for name in PASSWORDS)


def test_a_virtual_host_of_its_own_is_made_before_rights_in_it_are_given(shell: CommandLine) -> None:
    lines = shell.run("setup", "--print", "--vhost", "my shop").stdout.splitlines()
    made = lines.index("rabbitmqctl add_vhost 'my shop'")
    given = [place for place, line in enumerate(lines) if "set_permissions --vhost 'my shop'" in line]
    assert given and made < min(given)
    assert "add_vhost" not in shell.run("setup", "--print").stdout


def test_the_definitions_hold_hashes_of_the_passwords_from_the_environment(shell: CommandLine) -> None:
    printed = shell.with_variables(**PASSWORDS).run("setup", "--print", "--format", "definitions", "--vhost", "serving").stdout
    definitions = json.loads(printed)
    assert definitions["vhosts"] == [{"name": "serving"}]
    assert {entry["vhost"] for entry in definitions["permissions"]} == {"serving"}
    for user in definitions["users"]:
        salted = base64.b64decode(user["password_hash"])
        password = PASSWORDS[f"MQSERVE_{user['name'].removeprefix('mqserve-').upper()}_PASSWORD"]
        assert salted[4:] == hashlib.sha256(salted[:4] + password.encode()).digest()


def test_the_acl_file_holds_hashes_of_the_passwords_from_the_environment(shell: CommandLine) -> None:
    first, *lines = shell.with_variables(**PASSWORDS).run("setup", "--print", "--format", "acl").stdout.splitlines()
    assert first == "user default off"
    for role, line in zip(ROLES, lines, strict=True):
        digest = hashlib.sha256(f"the secret of {role}".encode()).hexdigest()
        assert line.startswith(f"user mqserve-{role} on #{digest} ")


@pytest.mark.parametrize("kind", ["definitions", "acl"])
def test_a_missing_password_is_named_and_not_made_up(shell: CommandLine, kind: str) -> None:
    some = {name: value for name, value in PASSWORDS.items() if "PROXY" not in name}
    failed = shell.with_variables(**some).run("setup", "--print", "--format", kind)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "MQSERVE_PROXY_PASSWORD not set" in failed.stderr


def test_setup_changes_nothing_and_says_so(shell: CommandLine) -> None:
    failed = shell.run("setup")
    assert failed.returncode == 1
    assert "mqserve setup --print" in failed.stderr


def test_the_rights_include_the_queues_of_a_backend_with_shards() -> None:
    rights, queue = broker_rights("shop"), queue_names.backend_queue("shop", "x", 1, shard=12)
    assert re.search(rights["replica"].read, queue) and re.search(rights["controller"].configure, queue)


def test_the_rights_include_the_queues_of_jobs() -> None:
    rights, queue = broker_rights("shop"), queue_names.jobs_queue("shop", "x", 1)
    assert re.search(rights["replica"].read, queue) and re.search(rights["controller"].configure, queue)
    webhooks = (queue_names.webhooks_queue("shop"), queue_names.webhooks_wait_queue("shop", 8192), queue_names.dead_webhooks_queue("shop"))
    for name in (queue_names.due_queue("shop"), queue_names.later_queue("shop", 2**20), *webhooks):
        assert re.search(rights["controller"].read, name)
        assert not any(re.search(right, name) for role in ("proxy", "replica", "client") for right in rights[role])


def test_no_role_but_the_controller_has_rights_on_the_exchange_for_endpoints_since_only_direct_publishers_use_it() -> None:
    rights, name = broker_rights("shop"), queue_names.endpoints_exchange("shop")
    assert all(re.search(right, name) for right in rights["controller"])
    assert not any(re.search(right, name) for role in ("proxy", "replica", "client") for right in rights[role])


def test_the_default_exchange_is_only_written_by_those_who_answer_direct_publishers() -> None:
    every = [(role, right, pattern) for role, rights in broker_rights("shop").items() for right, pattern in rights._asdict().items()]
    able = {(role, right) for role, right, pattern in every if re.search(pattern, "amq.default")}
    assert able == {("controller", "write"), ("replica", "write")}


def test_rights_end_at_the_namespace() -> None:
    for rights in broker_rights("a-b").values():
        for pattern in rights:
            assert not re.search(pattern, queue_names.backend_queue("a-bc", "x", 1))
            assert not re.search(pattern, "a-bxrequests")
    for role in ROLES:
        assert all(rule.partition("~")[2].startswith("mqserve:a-b:") for rule in each_rule("a-b", role) if "~" in rule)


def test_no_role_has_a_command_that_shows_or_changes_the_server() -> None:
    granted = {rule for role in ROLES for rule in each_rule("n", role) if rule.startswith("+")}
    assert not granted & {"+keys", "+scan", "+config", "+flushall", "+flushdb", "+debug", "+acl", "+client", "+shutdown", "+monitor"}
    assert not [rule for rule in granted if rule.startswith("+@")]


def each_rule(namespace: str, role: str) -> list[str]:
    """With those of selectors one by one."""
    return " ".join(acl_rules(namespace, role)).replace("(", "").replace(")", "").split()
