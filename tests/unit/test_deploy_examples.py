"""The examples of deployment say what the server knows: options, endpoints, ports and versions."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from tvm_sparse.cli import build_parser

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCKERFILE = (DEPLOY / "docker" / "Dockerfile").read_text(encoding="utf-8")

ENDPOINTS = {"/v2/health/ready", "/v2/health/live", "/metrics"}


def documents(name: str) -> list[dict[str, Any]]:
    text = (DEPLOY / "kubernetes" / name).read_text(encoding="utf-8")
    return list(yaml.safe_load_all(text))


def containers() -> list[dict[str, Any]]:
    deployment, _ = documents("deployment.yaml")
    (service,) = documents("inference-service.yaml")
    pods = (deployment["spec"]["template"]["spec"], service["spec"]["predictor"])
    return [container for pod in pods for container in pod["containers"]]


def served(arguments: list[str]) -> Any:
    return build_parser().parse_args(["serve", *arguments])


def entry_point() -> list[str]:
    found = re.search(r"^ENTRYPOINT \[(.*)\]$", DOCKERFILE, re.MULTILINE)
    assert found is not None
    command = shlex.split(found[1].replace(",", " "))
    assert command[:2] == ["tvm-sparse", "serve"]
    return command[2:]


@pytest.mark.parametrize("container", containers(), ids=["Deployment", "InferenceService"])
def test_containers_are_started_with_options_that_there_are(container: dict[str, Any]) -> None:
    options = served([*entry_point(), *container["args"]])
    assert options.host == "0.0.0.0" and options.library == "/model"
    (port,) = container["ports"]
    assert port["containerPort"] == options.port
    limit = container["resources"]["limits"]
    assert options.threads * options.instances == int(limit["cpu"])
    assert limit["cpu"] == container["resources"]["requests"]["cpu"]


@pytest.mark.parametrize("container", containers(), ids=["Deployment", "InferenceService"])
def test_probes_ask_at_endpoints_that_there_are(container: dict[str, Any]) -> None:
    names = {container["ports"][0]["name"], container["ports"][0]["containerPort"]}
    probes = [value["httpGet"] for name, value in container.items() if name.endswith("Probe")]
    assert {probe["path"] for probe in probes} == {"/v2/health/ready", "/v2/health/live"}
    assert {probe["port"] for probe in probes} <= names


def test_a_pod_lives_as_long_as_its_requests_may_take_to_end() -> None:
    deployment, service = documents("deployment.yaml")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    grace = served([*entry_point(), *container["args"]]).grace
    assert pod["terminationGracePeriodSeconds"] > pause + grace
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    scraped = deployment["spec"]["template"]["metadata"]["annotations"]["prometheus.io/path"]
    assert scraped in ENDPOINTS


def test_the_image_has_what_the_extra_and_the_runtime_need() -> None:
    installed = set(re.findall(r'"([a-z0-9-]+[>=]=[^"]+)"', DOCKERFILE))
    needed = set(PROJECT["optional-dependencies"]["serve"])
    needed |= {
        each for each in PROJECT["dependencies"] if each.startswith(("numpy", "apache-tvm-ffi"))
    }
    assert installed == needed


class FakeServe(types.ModuleType):
    """As much of `ray.serve` as building an application needs."""

    def __init__(self) -> None:
        super().__init__("ray.serve")
        self.options: dict[str, Any] = {}
        self.asgi: Any = None

    def deployment(self, **options: Any) -> Any:
        self.options = options
        return lambda deployed: types.SimpleNamespace(bind=lambda: deployed)

    def ingress(self, asgi: Any) -> Any:
        self.asgi = asgi
        return lambda deployed: deployed


def test_an_application_of_ray_is_built_of_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeServe()
    package = types.ModuleType("ray")
    package.serve = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", package)
    monkeypatch.setitem(sys.modules, "ray.serve", fake)
    monkeypatch.delitem(sys.modules, "tvm_sparse.serving.ray_app", raising=False)
    config = yaml.safe_load((DEPLOY / "ray" / "serve.yaml").read_text(encoding="utf-8"))
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    assert getattr(__import__(module, fromlist=[name]), name)(application["args"]) is not None
    assert fake.options["name"] == application["args"]["name"]
    assert fake.options["ray_actor_options"] == {"num_cpus": application["args"]["threads"]}
    paths = {route.path for route in fake.asgi.routes}
    assert paths > ENDPOINTS | {"/v2/models/{name}/infer"}
    monkeypatch.delitem(sys.modules, "tvm_sparse.serving.ray_app")
