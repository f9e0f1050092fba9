"""Tests of the app under Ray Serve: two replicas on this machine over HTTP, also drained and killed."""

from __future__ import annotations

import io
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import dave_fast
from dave_fast.client import Client, ServerError, picture_bytes
from dave_fast.models.demo import demo_scene
from dave_fast.serve.models import load_models
from tests.serve.tiny_server import serving, until

pytest.importorskip("ray.serve", reason="an extra: dave-fast[ray]")
pytestmark = pytest.mark.filterwarnings("ignore")


def test_settings_from_a_command_line_and_what_they_become():
    from pydantic import ValidationError

    from dave_fast.serve.cluster import ClusterSettings, application

    settings = ClusterSettings.model_validate(
        {"models": "demo, vit_tiny_patch16_224", "max_replicas": "4", "gpus": "0.5"}
    )
    assert settings.models == ["demo", "vit_tiny_patch16_224"] and settings.max_replicas == 4
    deployment = application(settings)._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 8)
    assert deployment.ray_actor_options["num_gpus"] == 0.5
    # a replica refuses by its own limits, with Retry-After, before Ray stops sending it requests
    assert deployment.max_ongoing_requests > settings.limits.requests
    assert deployment._deployment_config.graceful_shutdown_timeout_s > settings.limits.answer_seconds
    fixed = application(ClusterSettings(min_replicas=2, max_replicas=2))._bound_deployment
    assert fixed._deployment_config.autoscaling_config is None and fixed.num_replicas == 2
    with pytest.raises(ValidationError):
        ClusterSettings.model_validate({"replicas": 3})


def test_manifests_of_the_documentation_are_what_ray_and_the_server_take():
    import yaml
    from ray.serve.schema import ServeDeploySchema
    from typer.testing import CliRunner

    from dave_fast.cli.app import app
    from dave_fast.serve.cluster import ClusterSettings, application

    text = (Path(__file__).parents[2] / "docs" / "cluster-serving.md").read_text()
    manifests = [one for block in re.findall(r"```yaml\n(.*?)```", text, re.S) for one in yaml.safe_load_all(block)]
    by_kind = {manifest["kind"]: manifest["spec"] for manifest in manifests}
    assert set(by_kind) == {"RayService", "Deployment", "Service"}
    config = ServeDeploySchema.model_validate(yaml.safe_load(by_kind["RayService"]["serveConfigV2"]))
    (deployed,) = config.applications
    settings = ClusterSettings.model_validate(deployed.args)
    assert deployed.import_path == f"{application.__module__}:{application.__name__}"
    (workers,) = by_kind["RayService"]["rayClusterConfig"]["workerGroupSpecs"]
    grace = workers["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > application(settings)._bound_deployment._deployment_config.graceful_shutdown_timeout_s
    assert workers["maxReplicas"] >= settings.max_replicas
    pod = by_kind["Deployment"]["template"]["spec"]
    _, _, *arguments = pod["containers"][0]["args"]
    said = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    assert all(word in said for word in arguments if word.startswith("--"))
    drain = float(arguments[arguments.index("--drain-seconds") + 1])
    assert pod["terminationGracePeriodSeconds"] > drain + 5


def test_the_client_asks_again_where_a_proxy_lost_its_replica_and_not_where_the_server_failed():
    """Ray's proxy answers for a dead replica in plain text, which is retried; the server's own errors are JSON."""
    asked: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            status, body, kind = answers[min(len(asked), len(answers)) - 1]
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy, ThreadPoolExecutor(1) as pool:
        pool.submit(proxy.serve_forever)
        try:
            with Client(f"http://127.0.0.1:{proxy.server_port}", timeout=60) as client:
                answers = [(500, b"Internal Server Error", "text/plain"), (200, b"[]", "application/json")]
                assert client.models() == [] and len(asked) == 2
                asked.clear()
                answers = [(500, b'{"detail": "NaN in the map."}', "application/json")]
                with pytest.raises(ServerError, match="NaN in the map"):
                    client.models()
                assert len(asked) == 1
        finally:
            proxy.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Start Ray on this machine; yield the address of its HTTP proxy."""
    import ray
    from ray import serve

    # workers import the package from the driver's path; num_cpus counts slots, not cores
    paths = os.path.dirname(os.path.dirname(dave_fast.__file__))
    port = free_port()
    ray.init(
        num_cpus=8,
        object_store_memory=2**28,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def deploy(**settings: Any) -> None:
    from ray import serve

    from dave_fast.serve.cluster import ClusterSettings, application

    asked = ClusterSettings(models=["demo"], answer_seconds=60.0, precision="fp32", **settings)
    serve.run(application(asked), name="dave", route_prefix="/")


@pytest.fixture(scope="module")
def address(cluster: str) -> str:
    """Deploy two replicas of the demo model. The order of the tests counts: the last ones remove replicas."""
    deploy(min_replicas=2, max_replicas=2)
    return cluster


@pytest.fixture(scope="module")
def scene() -> bytes:
    return picture_bytes(demo_scene().image)


def explain(address: str, scene: bytes, samples: int = 24) -> tuple[str, np.ndarray]:
    """Return the name of the replica that answered, and the map."""
    answer = httpx.post(
        f"{address}/v1/explain",
        params={"n_samples": samples, "seed": 7, "target": 4},
        content=scene,
        headers={"accept": "application/x-npy"},
        timeout=120,
    )
    assert answer.status_code == 200, answer.text
    return answer.headers["x-dave-replica"], np.load(io.BytesIO(answer.content))


@pytest.mark.slow
def test_requests_spread_and_every_replica_answers_as_a_single_server_does(address: str, scene: bytes) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: explain(address, scene), range(24)))
    replicas = [name for name, _ in made]
    assert len(set(replicas)) == 2 and min(replicas.count(name) for name in set(replicas)) >= 6
    alone = load_models(["demo"], [None], precision="fp32")["demo"]
    with serving(models=[alone]) as (single, _), Client(single) as client:
        expected = client.explain(scene, 4, n_samples=24, seed=7).maps
    for _, maps in made:
        # bit-equal, since both compute float32 on one kind of CPU
        assert np.array_equal(maps, expected)


@pytest.mark.slow
def test_images_streams_and_the_page_come_from_any_replica(address: str, scene: bytes) -> None:
    with httpx.Client(base_url=address, timeout=60) as http:
        name = http.post("/v1/images", content=scene).json()["image"]
        crops = [http.get(f"/v1/images/{name}/crop") for _ in range(20)]
        assert {crop.headers["content-type"] for crop in crops} == {"image/png"}
        assert len({crop.headers["x-dave-replica"] for crop in crops}) == 2
        assert http.get("/v1/images/nothing/crop").status_code == 404
        assert "Why did the model" in http.get("/").text
    with Client(address) as client:
        updates = list(client.stream(scene, 4, n_samples=64))
    assert len(updates) >= 3 and updates[-1].final and updates[-1].samples == 64
    assert [update.samples for update in updates] == sorted({update.samples for update in updates})


@pytest.mark.slow
def test_a_killed_replica_costs_no_answer_and_is_replaced(address: str, scene: bytes) -> None:
    import ray

    victim, _ = explain(address, scene)
    statuses: list[int] = []

    def ask() -> np.ndarray:
        # plain requests first, whose answers come from the proxy; then the client
        answer = httpx.post(f"{address}/v1/explain?n_samples=200&target=4", content=scene, timeout=150)
        statuses.append(answer.status_code)
        with Client(address, timeout=150, retries=20) as client:
            return client.explain(scene, 4, n_samples=200).maps

    def again() -> np.ndarray:
        with Client(address, timeout=150, retries=20) as client:
            return client.explain(scene, 4, n_samples=200).maps

    pool = ThreadPoolExecutor(8)
    asked = [pool.submit(ask if number < 4 else again) for number in range(8)]
    time.sleep(1.0)
    assert not any(one.done() for one in asked) and not statuses
    killed = ray.get_actor(f"SERVE_REPLICA::dave#Explanations#{victim}", namespace="serve")
    ray.kill(killed, no_restart=True)
    # every request is answered or refused with a status, and one that is tried again is answered
    maps = [one.result() for one in asked]
    pool.shutdown()
    assert all(np.array_equal(maps[0], other) for other in maps)
    assert len(statuses) == 4 and set(statuses) <= {200, 500, 503}
    end = time.monotonic() + 90
    seen: set[str] = set()
    while len(seen) < 2 and time.monotonic() < end:
        seen.add(explain(address, scene, 8)[0])
    assert len(seen) == 2 and victim not in seen


@pytest.mark.slow
def test_what_was_accepted_is_answered_when_the_application_is_removed(address: str, scene: bytes) -> None:
    from ray import serve

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(explain, address, scene, 600) for _ in range(4)]
        time.sleep(2.0)
        assert not any(one.done() for one in asked)
        serve.delete("dave")
        assert all(one.result()[1].max() > 0 for one in asked)
    assert httpx.get(f"{address}/v1/models", timeout=60).status_code in (404, 503)


@pytest.mark.slow
def test_too_much_is_refused_with_a_time_to_come_again(cluster: str, scene: bytes) -> None:
    deploy(max_requests=2)

    def ask(_: int) -> httpx.Response:
        return httpx.post(f"{cluster}/v1/explain?n_samples=300", content=scene, timeout=120)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 2
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)


@pytest.mark.slow
def test_a_client_that_leaves_frees_its_rows(cluster: str, scene: bytes) -> None:
    """Uses the one replica that the test before leaves."""
    with Client(cluster, timeout=60) as client:
        for _ in client.stream(scene, n_samples=1024):
            break

    def left() -> bool:
        metrics = httpx.get(f"{cluster}/metrics").text
        return (
            "dave_fast_cancelled_total 1.0" in metrics
            and len(re.findall("^dave_fast_queued_rows 0.0$", metrics, re.M)) == 1
        )

    until(left)


@pytest.mark.slow
def test_a_queue_brings_a_second_replica(cluster: str, scene: bytes) -> None:
    deploy(min_replicas=1, max_replicas=2, target_requests=2, upscale_delay_s=1)
    seen: set[str] = set()
    end = time.monotonic() + 120

    def press() -> None:
        while len(seen) < 2 and time.monotonic() < end:
            seen.add(explain(cluster, scene, 64)[0])

    with ThreadPoolExecutor(8) as pool:
        pressing = [pool.submit(press) for _ in range(8)]
    for one in pressing:
        one.result()
    assert len(seen) == 2
