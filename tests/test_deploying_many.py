"""A file with a thousand endpoints on 64 backends: how long it takes until all are ready. The deadlines are generous."""

import httpx
import pytest

from tests.instances import CommandLine, wait_until

MANY = """
import mqserve as serve

def hello(request):
    return f"hello, {request.path_params['word']}"

for number in range(64):
    serve.create_backend(f"b{number}", hello)
for number in range(1000):
    serve.create_endpoint(f"e{number}", backend=f"b{number % 64}", route=f"/e{number}/{{word}}")
"""


def serves_all(shell: CommandLine, deadline_s: float) -> None:
    program = shell.start("run", shell.file("many.py", MANY), "--port", "0")
    url = program.wait_for("Serving on", deadline_s).split()[2]
    with httpx.Client() as http:
        wait_until(lambda: http.get(f"{url}/-/readyz").is_success)  # by what the controller has seen: a moment later
        for number in (0, 63, 500, 999):
            assert http.get(f"{url}/e{number}/you").text == "hello, you"
    wait_until(lambda: program.output.count(" is ready (") == 64)


def test_a_thousand_endpoints_on_64_backends_are_ready_within_seconds(shell: CommandLine) -> None:
    serves_all(shell, 30)


@pytest.mark.long
def test_64_replica_processes_and_a_thousand_endpoints_are_ready_within_two_minutes(distributed_shell: CommandLine) -> None:
    serves_all(distributed_shell, 120)
