"""Tests of the manifests in deploy/kuberay: KubeRay accepts them, everything that they refer to exists, and the job can parse their command.

The schemas are the KubeRay 1.7 CRDs, applied strictly: an unknown field is an error here, but an API server drops it without a
warning. The CEL rules of the CRDs are not run. They are about fields that are not used here, which a test checks.
"""

import copy
import functools
import json
import re
import runpy
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from capsfusion_ray import __version__
from capsfusion_ray.config import FuseConfig, parse_config
from capsfusion_ray.dataset.lease import TTL_S

ROOT = Path(__file__).resolve().parents[1]
KUBERAY = ROOT / "deploy/kuberay"
CRDS = ROOT.parent / "shared/kuberay-crds"
OVERLAYS = sorted(path.parent.name for path in KUBERAY.glob("overlays/*/kustomization.yaml"))
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
RENDERER = runpy.run_path(str(KUBERAY / "render.py"))
SPOT_TAINTS = {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"}

Manifest = dict[str, Any]


@functools.cache
def _rendered(overlay: str) -> list[Manifest]:
    return RENDERER["render"](KUBERAY / "overlays" / overlay)


def rendered(overlay: str) -> list[Manifest]:
    return copy.deepcopy(_rendered(overlay))


def one(objects: list[Manifest], *kinds: str) -> Manifest:
    (found,) = [each for each in objects if each["kind"] in kinds]
    return found


def ray_object(overlay: str) -> Manifest:
    return one(rendered(overlay), "RayJob", "RayCluster")


def cluster_of(ray: Manifest) -> Manifest:
    return ray["spec"].get("rayClusterSpec", ray["spec"])


def pods_of(ray: Manifest) -> list[Manifest]:
    cluster = cluster_of(ray)
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


# ------------------------------------------------------------------------------------------------------------- the schemas


@functools.cache
def crd(kind: str) -> Manifest:
    path = CRDS / f"ray.io_{kind}s.yaml"
    if not path.is_file():
        pytest.skip(f"no KubeRay CRDs at {CRDS}")
    with path.open(encoding="utf-8") as file:
        definition = yaml.load(file, yaml.CSafeLoader)
    (version,) = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
    return version["schema"]["openAPIV3Schema"]


def strict(schema: Manifest) -> Manifest:
    """Convert an openAPIV3Schema to a JSON Schema that refuses unknown fields. A field with a default is not required."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]} | {key: schema[key] for key in ("pattern",) if key in schema}
    made = {
        key: schema[key]
        for key in ("type", "enum", "pattern", "minimum", "minItems", "minLength", "maxLength")
        if key in schema
    }
    if schema.get("nullable"):
        made["type"] = [made["type"], "null"]
    fields = schema.get("properties", {})
    if made.get("type") == "object":
        made["properties"] = {name: strict(field) for name, field in fields.items()}
        made["required"] = [name for name in schema.get("required", []) if "default" not in fields.get(name, {})]
        more = schema.get("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
        made["additionalProperties"] = strict(more) if isinstance(more, dict) else more
    if "items" in schema:
        made["items"] = strict(schema["items"])
    return made


def shape(required: dict[str, Any], **optional: Any) -> Manifest:
    fields = {**required, **optional}
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


TEXT, TEXTS = {"type": "string"}, {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = shape({"name": TEXT}, namespace=TEXT, labels=TEXTS, annotations=TEXTS)


@functools.cache
def schema_of(kind: str) -> Draft202012Validator:
    """The schema of a whole object. Those of Kubernetes' own kinds are built from the parts that the RayCluster schema contains."""
    head = crd("raycluster")["properties"]["spec"]["properties"]["headGroupSpec"]["properties"]
    pod = head["template"]
    volume = pod["properties"]["spec"]["properties"]["volumes"]["items"]["properties"]
    claim = volume["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]["spec"]
    if kind in ("RayJob", "RayCluster"):
        root = strict(crd(kind.lower()))
        root["properties"]["metadata"] = METADATA
        root["required"] = ["apiVersion", "kind", "metadata", "spec"]
        return Draft202012Validator(root)
    bodies = {
        "ServiceAccount": {},
        "PersistentVolumeClaim": {"spec": strict(claim)},
        "PriorityClass": {"value": {"type": "integer"}, "preemptionPolicy": {"enum": ["Never"]}, "description": TEXT},
        "Service": {"spec": strict(head["headService"]["properties"]["spec"])},
        "StatefulSet": {
            "spec": shape(
                {
                    "serviceName": TEXT,
                    "replicas": {"type": "integer"},
                    "selector": shape({"matchLabels": TEXTS}),
                    "template": strict(pod),
                    "volumeClaimTemplates": {
                        "type": "array",
                        "items": shape({"metadata": METADATA, "spec": strict(claim)}),
                    },
                }
            )
        },
    }
    return Draft202012Validator(
        shape({"apiVersion": TEXT, "kind": {"const": kind}, "metadata": METADATA, **bodies[kind]})
    )


def complaints(each: Manifest) -> list[str]:
    errors = schema_of(each["kind"]).iter_errors(each)
    return [f"{each['kind']} {'/'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_fits_its_schema_and_has_no_unknown_field(overlay):
    assert [line for each in rendered(overlay) for line in complaints(each)] == []


def _typed_wrong(ray):
    cluster_of(ray)["workerGroupSpecs"][0]["maxReplicas"] = "16"


def _misspelt(ray):
    pods_of(ray)[1]["terminationGracePeriodSecond"] = 5


def _unknown_mode(ray):
    cluster_of(ray)["authOptions"]["mode"] = "tokens"


def _nameless_container(ray):
    del pods_of(ray)[0]["containers"][0]["name"]


@pytest.mark.parametrize("wrong", [_typed_wrong, _misspelt, _unknown_mode, _nameless_container])
def test_the_schema_is_strict(wrong):
    ray = ray_object("spot")
    wrong(ray)
    assert len(complaints(ray)) == 1


# ------------------------------------------------------------------------------ rules that are not in the schemas


def refusals(ray: Manifest) -> list[str]:
    """The rules of KubeRay's operator (validation.go) and of Kueue's webhooks that `ray` breaks although it fits the schema."""
    cluster, queued = cluster_of(ray), "kueue.x-k8s.io/queue-name" in ray["metadata"].get("labels", {})
    longest = 47 if ray["kind"] == "RayJob" else 50
    found = {
        f"a name is a DNS label of at most {longest}": not re.fullmatch(
            rf"[a-z]([a-z0-9-]{{0,{longest - 2}}}[a-z0-9])?", ray["metadata"]["name"]
        ),
        **(_job_refusals(ray["spec"], queued) if ray["kind"] == "RayJob" else {}),
        **_cluster_refusals(cluster),
    }
    if queued:
        elastic = ray["metadata"].get("annotations", {}).get("kueue.x-k8s.io/elastic-job") == "true"
        found["Kueue autoscales elastic jobs only"] = bool(cluster.get("enableInTreeAutoscaling")) and not elastic
        found["Kueue takes seven groups"] = len(cluster["workerGroupSpecs"]) > 7
        found["head is Kueue's own name"] = any(group["groupName"] == "head" for group in cluster["workerGroupSpecs"])
    return [rule for rule, broken in found.items() if broken]


def _job_refusals(spec: Manifest, queued: bool) -> dict[str, bool]:
    mode, ends = spec.get("submissionMode", "K8sJobMode"), spec.get("shutdownAfterJobFinishes", False)
    return {
        "submissionMode is one of four": mode not in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        "ttlSecondsAfterFinished needs shutdownAfterJobFinishes": spec.get("ttlSecondsAfterFinished", 0) > 0
        and not ends,
        "suspend needs shutdownAfterJobFinishes": spec.get("suspend", False) and not ends,
        "Kueue needs shutdownAfterJobFinishes": queued and not ends,
        "no negative seconds": spec.get("ttlSecondsAfterFinished", 0) < 0,
        "a deadline is positive": spec.get("activeDeadlineSeconds", 1) <= 0,
        "a retry is a new cluster": bool(spec.get("clusterSelector")) and bool(spec.get("backoffLimit")),
        "one cluster": ("clusterSelector" in spec) == ("rayClusterSpec" in spec),
        "no retry of a person": mode == "InteractiveMode" and spec.get("backoffLimit", 0) > 0,
        "no negative backoff": spec.get("backoffLimit", 0) < 0,
        "a sidecar has no submitter": mode == "SidecarMode"
        and bool({"submitterConfig", "submitterPodTemplate"} & spec.keys()),
        "deletionStrategy needs a feature gate, and its CEL rules are not run here": "deletionStrategy" in spec,
    }


def _cluster_refusals(cluster: Manifest) -> dict[str, bool]:
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    groups = [head, *workers]
    env = {each["name"] for each in head["template"]["spec"]["containers"][0].get("env", [])}
    restarts = {group["template"]["spec"].get("restartPolicy", "Never") for group in groups}
    scales, options = cluster.get("enableInTreeAutoscaling", False), cluster.get("autoscalerOptions", {})
    redis = {"redis-password", "redis-username"} & head["rayStartParams"].keys()
    names = [group["groupName"] for group in workers]
    version = tuple(int(part) for part in cluster.get("rayVersion", "0.0").split("."))
    return {
        "a pod has a container": any(not group["template"]["spec"]["containers"] for group in groups),
        "groups have names of their own": len(set(names)) < len(names),
        "min <= replicas <= max": any(not w["minReplicas"] <= w["replicas"] <= w["maxReplicas"] for w in workers),
        "resources are set in one place": any(
            group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & group["rayStartParams"].keys()
            for group in groups
        ),
        "labels are no start parameter": any("labels" in group["rayStartParams"] for group in groups),
        "Redis is set in gcsFaultToleranceOptions only": bool(
            redis | {"REDIS_PASSWORD", "REDIS_USERNAME", "RAY_REDIS_ADDRESS"} & env
        ),
        "the autoscaler's version is set in its options": "RAY_enable_autoscaler_v2" in env,
        "autoscaler v2 restarts no pod": scales and options.get("version") == "v2" and restarts != {"Never"},
        "autoscalerOptions need enableInTreeAutoscaling": bool(options) and not scales,
        "a token needs Ray 2.52": cluster.get("authOptions", {}).get("mode") == "token" and version < (2, 52),
        "managedBy has CEL rules, which are not run here": "managedBy" in cluster,
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_operator_accepts_it(overlay):
    assert refusals(ray_object(overlay)) == []


BREAKS = {
    "a name is a DNS label of at most 47": lambda job: job["metadata"].update(name="c" * 48),
    "submissionMode is one of four": lambda job: job["spec"].update(submissionMode="K8sJob"),
    "ttlSecondsAfterFinished needs shutdownAfterJobFinishes": lambda job: job["spec"].pop("shutdownAfterJobFinishes"),
    "a deadline is positive": lambda job: job["spec"].update(activeDeadlineSeconds=0),
    "a retry is a new cluster": lambda job: job["spec"].update(clusterSelector={"ray.io/cluster": "mine"}),
    "no retry of a person": lambda job: job["spec"].update(submissionMode="InteractiveMode"),
    "a sidecar has no submitter": lambda job: job["spec"].update(submissionMode="SidecarMode"),
    "min <= replicas <= max": lambda job: cluster_of(job)["workerGroupSpecs"][0].update(minReplicas=17),
    "resources are set in one place": lambda job: cluster_of(job)["headGroupSpec"].update(resources={"CPU": "0"}),
    "Redis is set in gcsFaultToleranceOptions only": lambda job: pods_of(job)[0]["containers"][0]["env"].append(
        {"name": "REDIS_PASSWORD"}
    ),
    "autoscaler v2 restarts no pod": lambda job: pods_of(job)[1].update(restartPolicy="Always"),
    "autoscalerOptions need enableInTreeAutoscaling": lambda job: cluster_of(job).pop("enableInTreeAutoscaling"),
    "a token needs Ray 2.52": lambda job: cluster_of(job).update(rayVersion="2.51.1"),
    "Kueue autoscales elastic jobs only": lambda job: job["metadata"].pop("annotations"),
    "head is Kueue's own name": lambda job: cluster_of(job)["workerGroupSpecs"][0].update(groupName="head"),
}


@pytest.mark.parametrize("rule", BREAKS)
def test_a_manifest_that_breaks_a_rule_of_the_operator_is_found(rule):
    job = ray_object("spot")
    BREAKS[rule](job)
    assert rule in refusals(job)


# ------------------------------------------------------------------------------------- objects that manifests refer to


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_accounts_claims_priorities_and_secrets_of_pods_exist(overlay):
    objects = rendered(overlay)
    have = {(each["kind"], each["metadata"]["name"]) for each in objects}
    page = (ROOT / "docs/kubernetes.md").read_text("utf-8")
    secrets = set(re.findall(r"create secret generic (\S+)", page))
    redis = cluster_of(ray := one(objects, "RayJob", "RayCluster"))["gcsFaultToleranceOptions"]
    assert ("Service", redis["redisAddress"].removesuffix(":6379")) in have
    named = {redis["redisPassword"]["valueFrom"]["secretKeyRef"]["name"]}
    for pod in pods_of(ray):
        assert ("ServiceAccount", pod["serviceAccountName"]) in have
        assert ("PriorityClass", pod["priorityClassName"]) in have
        for volume in pod["volumes"]:
            assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in have
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        named |= {source["secretRef"]["name"] for source in container["envFrom"]}
    assert named == secrets, "docs/kubernetes.md must create exactly the secrets that pods use"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_runs_the_image_of_the_dockerfile_and_the_ray_of_the_constraints(overlay):
    ray = ray_object(overlay)
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    user, group = map(int, re.search(r"^USER (\d+):(\d+)$", dockerfile, re.MULTILINE).groups())
    workdir = re.search(r"^WORKDIR (\S+)$", dockerfile, re.MULTILINE)[1]
    assert cluster_of(ray)["rayVersion"] == PINNED["ray"]
    for pod in pods_of(ray):
        (container,) = pod["containers"]
        assert container["image"] == f"registry.example.com/capsfusion-ray:{__version__}"
        assert f"-t {container['image']} " in dockerfile
        assert container["workingDir"] == workdir
        security = pod["securityContext"]
        assert (security["runAsUser"], security["runAsGroup"], security["fsGroup"]) == (user, group, group)
        assert security["runAsNonRoot"]
        assert user != 0
        (home,) = [each["value"] for each in container["env"] if each["name"] == "HF_HOME"]
        assert any(home.startswith(mount["mountPath"] + "/") for mount in container["volumeMounts"]), (
            "the model cache must be on the volume, so that models are fetched once"
        )


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name != "interactive"])
def test_the_entrypoint_is_a_command_of_this_repository_for_the_cluster_it_runs_on(overlay, monkeypatch):
    monkeypatch.chdir(ROOT)
    job = ray_object(overlay)
    entrypoint = job["spec"]["entrypoint"]
    assert not set(entrypoint) & set("\n;&|<>$`\"'(){}*?"), "KubeRay puts it into a shell script without quoting"
    python, script, *arguments = shlex.split(entrypoint)
    assert (python, script) == ("python", "jobs/fuse.py")
    assert (ROOT / script).is_file()
    cfg = parse_config(FuseConfig, arguments)  # raises for a config file, a key or a value that is not there
    assert cfg.input.path
    assert cfg.output.path
    assert cfg.lease_wait_s >= 300, "an attempt may overlap with the one before it, so it must wait for the lease"
    assert not cfg.takeover
    (group,) = cluster_of(job)["workerGroupSpecs"]
    gpus = int(pods_of(job)[1]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0))
    if gpus:
        assert cfg.cluster.gpus_per_actor == 1, "an autoscaled cluster may have no GPU when the job starts"
        assert cfg.cluster.max_actors == gpus * group["maxReplicas"]
        assert cfg.cluster.min_actors <= gpus * max(group["minReplicas"], 1)
        assert cfg.source.preset == "laion_coco"
    else:
        assert cfg.engine.kind == "beam"
        assert not cfg.engine.model, "the smoke test uses the embedded model and fetches nothing"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_head_runs_no_tasks_avoids_spot_nodes_and_ends_before_the_next_attempt(overlay):
    objects = rendered(overlay)
    ray = one(objects, "RayJob", "RayCluster")
    head, *workers = pods_of(ray)
    assert cluster_of(ray)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert not any(each["key"] in SPOT_TAINTS for each in head.get("tolerations", []))
    (term,) = head["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert {each["operator"] for each in term["matchExpressions"]} == {"NotIn"}
    assert head["terminationGracePeriodSeconds"] < TTL_S, (
        "otherwise the next attempt finds a lease that is still renewed"
    )
    value = {each["metadata"]["name"]: each["value"] for each in objects if each["kind"] == "PriorityClass"}
    for worker in workers:
        assert value[worker["priorityClassName"]] < value[head["priorityClassName"]]
        script = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        works_on_s = int(re.search(r"\{1\.\.(\d+)\}", script)[1])
        assert works_on_s < worker["terminationGracePeriodSeconds"]


def test_spot_workers_go_where_the_head_does_not():
    head, worker = pods_of(ray_object("spot"))
    assert {each["key"] for each in worker["tolerations"]} >= SPOT_TAINTS
    wanted, barred = (
        {
            (each["key"], *each["values"])
            for term in pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
                "nodeSelectorTerms"
            ]
            for each in term["matchExpressions"]
        }
        for pod in (worker, head)
    )
    assert wanted == barred


def test_the_batch_run_and_interactive_work_use_one_and_the_same_cluster():
    job, cluster = (
        RENDERER["load"](KUBERAY / "base" / name)[0] for name in ("job/rayjob.yaml", "cluster/raycluster.yaml")
    )
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert job["metadata"]["name"] != cluster["metadata"]["name"], "KubeRay creates a service <name>-head-svc for each"


def test_the_page_on_kubernetes_describes_every_overlay():
    page = (ROOT / "docs/kubernetes.md").read_text("utf-8")
    assert set(re.findall(r"overlays/([a-z-]+)", page)) == set(OVERLAYS)


def test_the_monitoring_objects_scrape_ports_that_pods_have_and_hold_the_rules_and_the_dashboard():
    made = runpy.run_path(str(ROOT / "deploy/monitoring/kubernetes.py"))["objects"]("mine")
    by_kind = {each["kind"]: each for each in made}
    ports = {endpoint["port"] for endpoint in by_kind["PodMonitor"]["spec"]["podMetricsEndpoints"]}
    for overlay in OVERLAYS:
        for pod in pods_of(ray_object(overlay)):
            assert ports <= {port["name"] for port in pod["containers"][0]["ports"]}
    assert {each["metadata"]["labels"]["release"] for each in made if each["kind"] != "ConfigMap"} == {"mine"}
    assert by_kind["PrometheusRule"]["spec"] == yaml.safe_load(
        (ROOT / "deploy/monitoring/alerts.yaml").read_text("utf-8")
    )
    (dashboard,) = by_kind["ConfigMap"]["data"].values()
    assert json.loads(dashboard) == json.loads((ROOT / "deploy/monitoring/grafana-dashboard.json").read_text("utf-8"))
    assert len(dashboard) < 256 * 1024, "kubectl apply stores a copy in an annotation, which may hold 256 KiB"


# ------------------------------------------------------------------------------------------------ the image and the renderer


def test_the_image_holds_the_versions_of_the_constraints():
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", dockerfile, re.MULTILINE))
    assert arguments["RAY_VERSION"] == PINNED["ray"]
    assert arguments["TORCH_VERSION"] == PINNED["torch"]
    assert re.search(r"/uv:(\S+) AS uv", dockerfile)[1] == PINNED["uv"]
    floor = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert floor == f">={arguments['PYTHON_VERSION']}", "the image must use the Python version of the tests"
    assert "pip install --no-cache --compile-bytecode -c constraints.txt -e ." in dockerfile


def test_what_the_image_copies_exists_and_is_not_ignored():
    copied = re.findall(r"^COPY (?!--from)(.+)$", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    sources = [Path(source) for line in copied for source in line.split()[:-1]]
    assert sources
    assert [str(source) for source in sources if not (ROOT / source).exists()] == []
    ignored = (ROOT / ".dockerignore").read_text().split()
    needed = {source.parts[0] for source in sources if source.parts} | {"jobs", "conf", "models", "examples"}
    assert not needed & set(ignored)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubectl_renders_the_same(overlay):
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        [kubectl, "kustomize", str(KUBERAY / "overlays" / overlay)], capture_output=True, text=True, check=True
    )
    theirs, ours = list(yaml.load_all(done.stdout, yaml.CSafeLoader)), rendered(overlay)
    assert sorted(theirs, key=json.dumps) == sorted(sorted_keys(ours), key=json.dumps)


def sorted_keys(objects: list[Manifest]) -> list[Manifest]:
    return json.loads(json.dumps(objects, sort_keys=True))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("resources: [a.yaml]\nnamePrefix: x-\n", "namePrefix"),
        ("resources: [a.yaml, a.yaml]\n", "two files"),
        ("resources: [a.yaml]\nresources: [a.yaml]\n", "occurs twice"),
        ("resources: [a.yaml]\npatches: [{target: {kind: RayJob, name: a}, patch: '[]'}]\n", "RFC 6902"),
    ],
)
def test_the_renderer_refuses_what_it_does_not_know(tmp_path, text, reason):
    (tmp_path / "a.yaml").write_text("kind: ServiceAccount\nmetadata: {name: a}\n")
    (tmp_path / "kustomization.yaml").write_text(text)
    with pytest.raises(ValueError, match=reason):
        RENDERER["render"](tmp_path)
