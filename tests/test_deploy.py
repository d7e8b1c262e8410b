"""The files of the compose stack fit together: names that one file uses exist in the others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
COMPOSE = ROOT / "docker-compose.yml"
DEPLOY = ROOT / "deploy"
COLLECTOR = DEPLOY / "otel-collector" / "config.yaml"
DATASOURCES = DEPLOY / "grafana" / "provisioning" / "datasources"

if not COMPOSE.exists():
    pytest.skip("docker-compose.yml and deploy/ are in the checkout only", allow_module_level=True)


def load(path: Path) -> dict[str, Any]:
    """Return the one YAML document of a file, which must be a mapping."""
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(document, dict), f"{path}: not a mapping"
    return document


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = load(COMPOSE)["services"]
    return found


def with_defaults(text: str) -> str:
    """Replace `${NAME:-default}` by its default, as compose does when no variable is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def is_pinned(image: str) -> bool:
    """Tell whether an image is named by a full version (two dots or more) or a digest, not by a tag that moves."""
    return bool(re.fullmatch(r"[\w./-]+(:v?\d+(\.\d+){2,}[\w.-]*|@sha256:[0-9a-f]{64})", image))


def mounts(service: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Yield (source, target, made by a run) per bind mount; both compose forms, defaults filled in."""
    for volume in service.get("volumes", []):
        if isinstance(volume, str):
            source, target = with_defaults(volume).split(":")[:2]
            yield source, target, False
        else:
            yield with_defaults(volume["source"]), volume["target"], volume["bind"]["create_host_path"] is False


def all_mounts() -> list[tuple[str, str, bool]]:
    return [mount for service in services().values() for mount in mounts(service)]


def named_by_pipelines(config: dict[str, Any], kind: str) -> set[str]:
    """Return what all pipelines list under `receivers`, `processors` or `exporters`."""
    return {name for pipeline in config["service"]["pipelines"].values() for name in pipeline.get(kind, [])}


def datasources() -> list[dict[str, Any]]:
    return [source for path in sorted(DATASOURCES.glob("*.yaml")) for source in load(path)["datasources"]]


def test_the_stack_has_collector_jaeger_and_grafana() -> None:
    assert {"otel-collector", "jaeger", "grafana"} <= set(services())


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.y*ml")), ids=lambda path: path.relative_to(DEPLOY).as_posix())
def test_every_file_parses_and_is_mounted_by_a_service(path: Path) -> None:
    load(path)
    assert any(path.is_relative_to((ROOT / source).resolve()) for source, _, _ in all_mounts())


def test_every_image_is_pinned() -> None:
    images = {name: with_defaults(service["image"]) for name, service in services().items()}
    assert {name: image for name, image in images.items() if not is_pinned(image)} == {}


def test_every_image_can_be_replaced_by_a_variable_of_its_own() -> None:
    images = [service["image"] for service in services().values()]
    variables = {match[1] for image in images if (match := re.fullmatch(r"\$\{(\w+_IMAGE):-[^}]+\}", image))}
    assert len(variables) == len(images)


@pytest.mark.parametrize("image", ["jaeger", "jaeger:latest", "a/jaeger:2", "a/jaeger:2.20", "a/jaeger@sha256:12"])
def test_a_tag_that_moves_is_not_pinned(image: str) -> None:
    assert not is_pinned(image)


@pytest.mark.parametrize("image", ["jaeger:2.20.0", "a.io/b/jaeger:v2.20.0-rc1", "a/jaeger@sha256:" + "0" * 64])
def test_a_full_version_or_a_digest_is_pinned(image: str) -> None:
    assert is_pinned(image)


def test_versions_of_images_are_written_in_the_compose_file_only() -> None:
    versions = {with_defaults(service["image"]).rpartition(":")[2] for service in services().values()}
    others = [path for path in DEPLOY.rglob("*") if path.is_file()]
    repeated = [(p.name, v) for p in others for v in versions if v in p.read_text(encoding="utf-8")]
    assert repeated == []


def test_everything_mounted_exists_but_for_what_a_run_makes() -> None:
    missing = [source for source, _, made_by_a_run in all_mounts() if not (made_by_a_run or (ROOT / source).exists())]
    assert missing == []


def test_published_ports_are_bound_to_this_machine() -> None:
    ports = [port for service in services().values() for port in service.get("ports", [])]
    assert ports
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_services_depend_on_services() -> None:
    known = services()
    assert {name for service in known.values() for name in service.get("depends_on", [])} <= set(known)


@pytest.mark.parametrize("kind", ["receivers", "processors", "exporters"])
def test_collector_pipelines_use_exactly_what_is_defined(kind: str) -> None:
    config = load(COLLECTOR)
    assert named_by_pipelines(config, kind) == set(config.get(kind, {}))


def test_collector_extensions_are_exactly_those_defined() -> None:
    config = load(COLLECTOR)
    assert set(config["service"].get("extensions", [])) == set(config.get("extensions", {}))


def test_every_pipeline_has_a_source_and_a_destination() -> None:
    pipelines = load(COLLECTOR)["service"]["pipelines"]
    assert "traces" in pipelines
    assert [name for name, p in pipelines.items() if not (p["receivers"] and p["exporters"])] == []


def test_collector_reads_the_trace_files_that_are_mounted() -> None:
    receiver = load(COLLECTOR)["receivers"]["otlp_json_file"]
    folder = next(target for _, target, made_by_a_run in mounts(services()["otel-collector"]) if made_by_a_run)
    assert any(fnmatch(f"{folder}/2026-01-01-ab12/trace.jsonl", pattern) for pattern in receiver["include"])
    assert not any(fnmatch(f"{folder}/2026-01-01-ab12/manifest.jsonl", pattern) for pattern in receiver["include"])


def test_collector_reads_whole_files_and_long_lines() -> None:
    receiver = load(COLLECTOR)["receivers"]["otlp_json_file"]
    assert receiver["start_at"] == "beginning"
    size = re.fullmatch(r"(\d+)MiB", receiver["max_log_size"])
    assert size, f"max_log_size: not in MiB: {receiver['max_log_size']!r}"
    assert 1 < int(size[1]) < 20  # the receiver's default, and what Jaeger's OTLP endpoint takes per request


def test_collector_sends_to_a_service_of_the_stack() -> None:
    hosts = {name: urlsplit(e["endpoint"]).hostname for name, e in load(COLLECTOR)["exporters"].items()}
    assert {name: host for name, host in hosts.items() if host not in services()} == {}


def test_data_sources_point_at_services_of_the_stack() -> None:
    urls = {source["name"]: urlsplit(source["url"]) for source in datasources()}
    assert urls
    assert {name: url.hostname for name, url in urls.items() if url.hostname not in services()} == {}


def test_grafana_asks_jaeger_on_the_port_of_its_ui() -> None:
    (jaeger,) = [source for source in datasources() if source["type"] == "jaeger"]
    container_ports = {port.rpartition(":")[2] for port in services()["jaeger"]["ports"]}
    assert str(urlsplit(jaeger["url"]).port) in container_ports


def test_data_sources_have_fixed_and_different_uids_and_one_is_the_default() -> None:
    uids = [source["uid"] for source in datasources()]
    assert len(set(uids)) == len(uids)
    assert sum(source.get("isDefault", False) for source in datasources()) == 1
