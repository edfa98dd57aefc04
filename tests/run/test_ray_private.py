"""What run/ray_private.py uses of Ray is still there, in the form in which it is used. A failure names what Ray has changed."""

import inspect

import pytest
import ray
from ray._private import accelerators, node, services, utils, worker
from ray._raylet import (
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    AuthenticationTokenLoader,
    Config,
    InnerGcsClient,
    persist_port,
)

from capsfusion_ray.run import ray_private


def test_ray_is_of_a_version_that_pyproject_allows():
    assert (2, 55) <= tuple(int(part) for part in ray.__version__.split(".")[:2]) < (3, 0)


def test_a_raylet_is_looked_up_by_two_arguments_and_a_missing_one_is_a_runtime_error():
    assert list(inspect.signature(services.get_node).parameters) == ["gcs_address", "node_id"]
    assert "except RuntimeError" in inspect.getsource(node), "so Ray's own node waits for it"


def test_a_raylet_is_started_with_the_ports_of_its_agents():
    parameters = inspect.signature(services.start_raylet).parameters
    assert {*ray_private.AGENT_PORTS, "session_dir", "node_id"} <= set(parameters)


@pytest.mark.parametrize("name", ["get_node", "start_raylet"])
def test_a_node_calls_them_through_their_module(name):
    """Else a replacement would not be called. Ray's node calls `ray._private.services.<name>(…)`."""
    assert f"ray._private.services.{name}(" in inspect.getsource(node)


def test_ray_init_resolves_the_address_of_this_machine_through_its_module():
    assert list(inspect.signature(services.resolve_ip_for_localhost).parameters) == ["host"]
    callers = [inspect.getsource(module) for module in (node, services, worker)]
    assert any("resolve_ip_for_localhost(" in source.replace("def resolve_ip_for_localhost(", "") for source in callers)


def test_a_driver_asks_for_its_command_line_through_its_module():
    assert not inspect.signature(utils.get_entrypoint_name).parameters
    assert "get_entrypoint_name()" in inspect.getsource(worker)
    with ray_private.command_line(lambda: "shown"):
        assert utils.get_entrypoint_name() == "shown"
    assert utils.get_entrypoint_name() != "shown"


def test_compiled_parts_are_there():
    assert isinstance(DASHBOARD_AGENT_LISTEN_PORT_NAME, str)
    assert callable(persist_port)
    assert callable(Config.initialize)
    assert callable(AuthenticationTokenLoader.instance().reset_cache)
    assert callable(InnerGcsClient.get_draining_nodes)  # global_worker.gcs_client passes every call on to one


def test_the_port_of_an_agent_can_be_persisted_where_the_raylet_reads_it(tmp_path):
    persist_port(str(tmp_path), "0" * 56, DASHBOARD_AGENT_LISTEN_PORT_NAME, 23456)
    assert any("23456" in file.read_text() for file in tmp_path.iterdir())


def test_gpus_are_counted():
    assert ray_private.gpus_of_this_machine() >= 0
    assert accelerators.get_accelerator_manager_for_resource("GPU").get_resource_name() == "GPU"


def test_replacements_are_taken_back():
    before = services.get_node, services.start_raylet, services.resolve_ip_for_localhost
    with ray_private.servers_on_loopback(), ray_private.patient_raylet(1.0, lambda: iter(())):
        assert services.resolve_ip_for_localhost("any") == "any"
        assert services.get_node is not before[0]
        assert services.start_raylet is not before[1]
    assert (services.get_node, services.start_raylet, services.resolve_ip_for_localhost) == before
