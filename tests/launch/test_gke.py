"""GKE: the manifest against the schemas, and what it says."""

import re
import shlex

import jsonschema
import kubernetes_validate
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.launch.conftest import SECRET, check_dry_run

TRAINING = ["--config=configs/pretrain/inf30_base.py", "--workdir=/mnt/infmae/run1"]
GPU = ["--target=gpu", "--accelerator=nvidia-h100-80gb", "--hosts=2", "--chips_per_host=8", "--claim=runs",
       "--capacity=spot", "--image=registry.example/infmae:1"]  # fmt: skip
TPU = ["--target=tpu", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4", "--hosts=4", "--chips_per_host=4",
       "--slices=2", "--claim=runs", "--capacity=on_demand", "--image=registry.example/infmae:1"]  # fmt: skip

KUBERNETES = "1.33.0"


def _object(required, **properties):
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


# The fields in use of the JobSet custom resource, jobset.x-k8s.io/v1alpha2, after api/jobset/v1alpha2/jobset_types.go
# of kubernetes-sigs/jobset (as of commit 0336a8f, 2026). The Job inside is checked with Kubernetes' own schema.
_TEXTS = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
_ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob",
            "RestartJobAndIgnoreMaxRestarts"]  # fmt: skip
_RULE = _object(
    ["name", "action"],
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": _ACTIONS}, onJobFailureReasons=_TEXTS, targetReplicatedJobs=_TEXTS,
)  # fmt: skip
_REPLICATED_JOB = _object(
    ["name", "template"], name={"type": "string"}, replicas={"type": "integer", "minimum": 0},
    template=_object(["spec"], metadata={"type": "object"}, spec={"type": "object"}),
)  # fmt: skip
JOB_SET = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_object(
        ["name"], name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}, namespace={"type": "string"},
        annotations={"type": "object", "additionalProperties": {"type": "string"}},
    ),
    spec=_object(
        ["replicatedJobs"],
        replicatedJobs={"type": "array", "items": _REPLICATED_JOB},
        failurePolicy=_object(
            [], maxRestarts={"type": "integer", "minimum": 0}, rules={"type": "array", "items": _RULE}
        ),
        ttlSecondsAfterFinished={"type": "integer", "minimum": 0},
    ),
)  # fmt: skip


def expand(text: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of a container's argument: $$ is $, $(NAME) a variable of the container if there is one."""
    return re.sub(
        r"\$(?:(\$)|\(([^)]*)\))",
        lambda m: "$" if m[1] else variables.get(m[2], m[0]),
        text,
    )


def manifest_of(checkout, options, training=TRAINING):
    dry = checkout.run("launch/gke.sh", "--dry-run", *options, "--", *training)
    assert dry.returncode == 0, dry.stderr
    command, _, rest = dry.stdout.partition(" <<'END'\n")
    assert shlex.split(command)[0] == "kubectl" and rest.endswith("\nEND\n")
    return yaml.safe_load(rest.removesuffix("END\n"))


def validate(manifest):
    """Raises unless the JobSet, and the Jobs in it, are valid; unknown fields are errors."""
    jsonschema.validate(manifest, JOB_SET)
    for replicated in manifest["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}}
        job |= replicated["template"]
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


def parts(manifest):
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    return job, pod, pod["containers"][0]


def test_submission(checkout):
    checkout.stub("kubectl")
    options = [*GPU, "--namespace=research", "--context=cluster"]
    (call,) = check_dry_run(checkout, "launch/gke.sh", *options, "--", *TRAINING)
    assert call[:-1] == ["kubectl", "--namespace=research", "--context=cluster", "create", "--filename=-"]
    validate(yaml.safe_load(call[-1].removeprefix("<")))


@pytest.mark.parametrize("options", [GPU, [*GPU, "--hosts=1"], TPU, [*TPU, "--capacity=spot", "--slices=1"]])
def test_valid(options, checkout):
    validate(manifest_of(checkout, options))


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m["spec"].update(maxRestarts=3),
        lambda m: m["spec"]["failurePolicy"]["rules"][0].update(action="Fail"),
        lambda m: parts(m)[0].update(backofLimit=0),
        lambda m: parts(m)[0].update(backoffLimit="none"),
        lambda m: parts(m)[1].update(tolerations={}),
        lambda m: parts(m)[2].update(arg=[]),
        lambda m: parts(m)[0]["podFailurePolicy"]["rules"][0]["onExitCodes"].pop("values"),
    ],
)
def test_the_schemas_notice_mistakes(damage, checkout):
    manifest = manifest_of(checkout, GPU)
    damage(manifest)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(manifest)


@pytest.mark.parametrize("options", [GPU, TPU])
def test_restarts(options, checkout):
    """A Pod that ends with a code that a restart mends ends its Job, which restarts the set; any other ends the set."""
    manifest = manifest_of(checkout, [*options, "--restarts=7"])
    job, pod, container = parts(manifest)
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 7 and job["backoffLimit"] == 0
    (rule,) = manifest["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (pod_rule,) = job["podFailurePolicy"]["rules"]
    assert pod_rule["action"] == "FailJob" and pod_rule["onExitCodes"] == {
        "containerName": container["name"], "operator": "NotIn", "values": [75, 76, 134, 137, 139, 143],
    }  # fmt: skip
    assert pod["restartPolicy"] == "Never"


def test_gpu_hosts(checkout):
    job, pod, container = parts(manifest_of(checkout, GPU))
    assert job["parallelism"] == job["completions"] == 2 and job["completionMode"] == "Indexed"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb",
                                   "cloud.google.com/gke-spot": "true"}  # fmt: skip
    assert {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"} in pod[
        "tolerations"
    ]
    assert pod["securityContext"]["runAsNonRoot"] and container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    arguments = [expand(a, {"JOB_COMPLETION_INDEX": "1"}) for a in container["args"]]
    assert set(arguments) == {
        "--config.distributed.method=addresses", "--config.distributed.coordinator=infmae-workers-0-0.infmae:8476",
        "--config.distributed.num_processes=2", "--config.distributed.process_id=1", *TRAINING,
    }  # fmt: skip


def test_all_pods_share_a_secret(checkout):
    _, _, container = parts(manifest_of(checkout, GPU))
    assert container["env"] == [{"name": "INFMAE_JOB_SECRET", "value": SECRET}]
    del checkout.environment["INFMAE_JOB_SECRET"]
    made = {parts(manifest_of(checkout, GPU))[2]["env"][0]["value"] for _ in range(2)}
    assert len(made) == 2 and all(re.fullmatch("[0-9a-f]{64}", secret) for secret in made)


@pytest.mark.parametrize("image", ['i:1"', "i:1\n", 'i:1", x: "y', "i:1\\", "i: 1", "${IMAGE}:1", "i:1}"])
def test_an_image_that_would_change_the_manifest_is_refused(image, checkout):
    result = checkout.run("launch/gke.sh", "--dry-run", *GPU, f"--image={image}", "--", *TRAINING)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "--image must be letters, digits" in result.stderr


def test_control_characters_are_refused(checkout):
    result = checkout.run("launch/gke.sh", "--dry-run", *GPU, "--", *TRAINING, "--config.x=\x01\r")
    assert result.returncode == 2 and result.stdout == "" and "control character" in result.stderr


def test_one_gpu_host_needs_no_coordinator(checkout):
    _, _, container = parts(manifest_of(checkout, [*GPU, "--hosts=1"]))
    assert container["args"] == ["--config.distributed.method=none", *TRAINING]


def test_tpu_slices(checkout):
    manifest = manifest_of(checkout, TPU)
    job, pod, container = parts(manifest)
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == 2 and job["parallelism"] == 4
    assert manifest["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
                                   "cloud.google.com/gke-tpu-topology": "4x4"}  # fmt: skip
    assert container["args"] == ["--config.distributed.method=tpu", *TRAINING]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts.values()) == set(volumes) and mounts["/mnt/infmae"] == "runs"
    assert volumes["runs"]["persistentVolumeClaim"] == {"claimName": "runs"}


_characters = st.characters(codec="ascii", categories=("L", "N", "P", "S", "Zs"), include_characters="\n\t")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.text(_characters, max_size=12), max_size=4))
def test_arguments_survive_shell_yaml_and_kubernetes(words, checkout):
    words = [*TRAINING, *words, 'a "b" \\c', "$(HOSTNAME) $$ ${NAME} $", "&", "- x: {y}"]
    _, _, container = parts(manifest_of(checkout, TPU, words))
    assert [expand(a, {"HOSTNAME": "wrong"}) for a in container["args"][1:]] == words


def test_a_placeholder_without_a_value_is_an_error(checkout):
    path = checkout.root / "launch" / "jobset.yaml"
    path.write_text(path.read_text() + "  suspend: ${SUSPEND}\n")
    result = checkout.run("launch/gke.sh", "--dry-run", *GPU, "--", *TRAINING)
    assert result.returncode == 2 and "${SUSPEND} has no value" in result.stderr and result.stdout == ""
