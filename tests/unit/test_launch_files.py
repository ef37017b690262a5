"""The topology files of launch/, read by the tools' own parsers where these are installed, else by keys."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.commands import launch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType
from ruamel.yaml import YAML

from tuner import device
from tuner.errors import UserError
from tuner.recipe import Recipe, load

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
KINDS = {
    "cpu": DistributedType.NO,
    "one_gpu": DistributedType.NO,
    "several_gpus": DistributedType.MULTI_GPU,
    "several_nodes": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "fsdp2_kept": DistributedType.FSDP,
}
# What launch/train.sh is told by the environment.
TOLD = {"PROCESSES", "NODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RESTARTS", "RUN_ID", "UNFINISHED"}
TOLD |= {"WAIT", "SETUP"}

# kubeflow.org/v1, by the type it has there: github.com/kubeflow/training-operator (release 1.9),
# pkg/apis/kubeflow.org/v1/{pytorch,common}_types.go; what is below `template` is core/v1 of Kubernetes.
PYTORCHJOB = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "metadata": {"name", "namespace", "labels", "annotations"},
    "spec": {"runPolicy", "elasticPolicy", "pytorchReplicaSpecs", "nprocPerNode"},
    "spec.elasticPolicy": {"minReplicas", "maxReplicas", "rdzvBackend", "rdzvPort", "rdzvHost", "rdzvId"}
    | {"rdzvConf", "standalone", "maxRestarts", "metrics"},
    "spec.elasticPolicy.rdzvConf": {"key", "value"},
    "spec.runPolicy": {"cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit"}
    | {"schedulingPolicy", "suspend", "managedBy"},
    "spec.pytorchReplicaSpecs": {"Master", "Worker"},
    "spec.pytorchReplicaSpecs.Worker": {"replicas", "restartPolicy", "template"},
    "template": {"metadata", "spec"},
    "template.spec": {
        "terminationGracePeriodSeconds",
        "containers",
        "volumes",
        "nodeSelector",
        "tolerations",
    },
    "template.spec.containers": {"name", "image", "imagePullPolicy", "command", "args", "env", "resources"}
    | {"volumeMounts", "ports", "workingDir"},
    "template.spec.containers.env": {"name", "value", "valueFrom"},
    "template.spec.containers.resources": {"requests", "limits"},
    "template.spec.containers.resources.requests": {"cpu", "memory", "ephemeral-storage"},
    "template.spec.containers.resources.limits": {"cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"},
    "template.spec.containers.volumeMounts": {"name", "mountPath", "readOnly", "subPath"},
    "template.spec.volumes": {"name", "persistentVolumeClaim", "emptyDir", "hostPath"},
    "template.spec.volumes.persistentVolumeClaim": {"claimName", "readOnly"},
    "template.spec.volumes.emptyDir": {"medium", "sizeLimit"},
}
# docs.skypilot.co, "SkyPilot YAML" (release 0.14; sky/utils/schemas.py).
SKYPILOT = {
    "": {
        "name",
        "workdir",
        "num_nodes",
        "resources",
        "envs",
        "secrets",
        "volumes",
        "file_mounts",
        "setup",
        "run",
    }
    | {"service", "config"},
    "resources": {
        "infra",
        "accelerators",
        "cpus",
        "memory",
        "instance_type",
        "use_spot",
        "job_recovery",
        "disk_size",
    }
    | {"disk_tier", "ports", "image_id", "any_of", "ordered", "labels", "autostop", "network_tier"},
    "resources.job_recovery": {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"},
    "file_mounts": {"/data", "/outputs"},
    "file_mounts./data": {"name", "source", "store", "mode", "persistent"},
    "file_mounts./outputs": {"name", "source", "store", "mode", "persistent"},
}
SKY_GIVES = {"SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS", "SKYPILOT_NUM_GPUS_PER_NODE"}
SKY_GIVES |= {"SKYPILOT_TASK_ID"}
# man sbatch (22.05): the long options that the script may have.
SBATCH = {
    "job-name",
    "nodes",
    "ntasks-per-node",
    "gpus-per-node",
    "cpus-per-task",
    "time",
    "signal",
    "requeue",
}
SBATCH |= {"open-mode", "output"}


def read(name: str) -> dict[str, Any]:
    """A YAML file of launch/, strictly."""
    found = YAML(typ="safe").load(LAUNCH / name)
    assert isinstance(found, dict) and found
    return found


def written(name: str) -> int:
    """How many keys a YAML file of launch/ has, by its lines."""
    return len(re.findall(r"^ *(?:- )?[\w./-]+:(?: |$)", (LAUNCH / name).read_text(), re.MULTILINE))


def accelerated(name: str, *more: str) -> tuple[dict[str, str], Any]:
    """What `accelerate launch` with a file would start: the environment it sets, and torchrun's arguments.

    The arguments are None where one process is started without torchrun.
    """
    given = [
        "--config_file",
        str(LAUNCH / "accelerate" / f"{name}.yaml"),
        *more,
        "tuner/train.py",
        "r.yaml",
        "a=1",
    ]
    args = launch.launch_command_parser().parse_args(given)
    found: dict[str, Any] = {}

    def start(command: Any) -> None:
        import os

        found["env"], found["args"] = dict(os.environ), command

    def simple(command: list[str], env: dict[str, str]) -> Any:
        found["env"], found["args"] = env, None
        assert command[1:] == ["tuner/train.py", "r.yaml", "a=1"]
        return SimpleNamespace(wait=lambda: None, returncode=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.run.run", start)
        patch.setattr(launch.subprocess, "Popen", simple)
        launch.launch_command(args)
    if found["args"] is not None:
        assert found["args"].training_script == "tuner/train.py"
        assert found["args"].training_script_args == ["r.yaml", "a=1"]
    return found["env"], found["args"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What tuner makes of an environment that a launcher sets."""

    def ask(env: dict[str, str]) -> device.Sharding | None:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                if name.startswith(("FSDP_", "ACCELERATE_")):
                    patch.setenv(name, value)
            return device.sharding.__wrapped__()

    yield ask


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_file(name: str) -> None:
    assert {path.stem for path in (LAUNCH / "accelerate").iterdir()} == set(KINDS)
    place = LAUNCH / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(place))  # refuses keys that it does not know
    assert isinstance(config, ClusterConfig) and config.distributed_type == KINDS[name]
    assert config.mixed_precision == "no"  # the recipe's wins, and nothing is said of a difference
    # Of these the launcher takes its own default, whatever a file says.
    assert not {"rdzv_backend", "same_network", "max_restarts"} & set(read(f"accelerate/{name}.yaml"))
    known = vars(launch.launch_command_parser().parse_args(["x"]))
    assert not set(config.fsdp_config) - set(known), (
        "accelerate ignores keys in fsdp_config that it does not know"
    )
    # The command that the file tells is one that the launcher's parser takes, with this file and --quiet.
    told = re.sub(r" \\\n# +", " ", place.read_text())
    lines = re.findall(r"^#   accelerate launch (.*)$", told, re.MULTILINE)
    assert len(lines) == 1
    args = launch.launch_command_parser().parse_args(shlex.split(lines[0]))
    assert args.config_file == f"launch/accelerate/{name}.yaml" and args.quiet
    assert (args.training_script, args.training_script_args) == ("tuner/train.py", ["RECIPE"])


@pytest.mark.parametrize("name, on_cpu", [("cpu", "True"), ("one_gpu", "False")])
def test_one_process(name: str, on_cpu: str) -> None:
    env, args = accelerated(name)
    assert args is None
    assert env["ACCELERATE_USE_CPU"] == on_cpu and env["ACCELERATE_MIXED_PRECISION"] == "no"
    assert env.get("CUDA_VISIBLE_DEVICES") == ("0" if name == "one_gpu" else None)


def test_several_gpus() -> None:
    env, args = accelerated("several_gpus", "--num_processes", "4")
    assert args.nproc_per_node == "4" and args.nnodes in (None, "1", "1:1")
    assert env["ACCELERATE_MIXED_PRECISION"] == "no" and "ACCELERATE_USE_FSDP" not in env


def test_several_nodes() -> None:
    where = [
        "--num_machines",
        "4",
        "--num_processes",
        "32",
        "--machine_rank",
        "1",
        "--main_process_ip",
        "first",
    ]
    _, args = accelerated("several_nodes", *where, "--rdzv_backend", "c10d", "--max_restarts", "3")
    assert (args.nproc_per_node, args.nnodes, args.max_restarts) == ("8", "4", 3)
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("c10d", "first:29500")


@pytest.mark.parametrize("name, reshard", [("fsdp2", True), ("fsdp2_kept", False)])
def test_fsdp2_is_what_the_trainer_reads(
    name: str, reshard: bool, asked: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    env, args = accelerated(name, "--num_processes", "2")
    assert args.nproc_per_node == "2" and env["ACCELERATE_MIXED_PRECISION"] == "no"
    assert asked(env) == device.Sharding(reshard=reshard)
    assert capsys.readouterr().err == ""  # no key of the file is without effect
    for other in ("several_gpus", "several_nodes"):
        assert asked(accelerated(other)[0]) is None


def test_deepspeed_is_refused(asked: Any) -> None:
    with pytest.raises(UserError, match=r"DeepSpeed is not supported; expected FSDP2.*fsdp2\.yaml"):
        asked({"ACCELERATE_USE_DEEPSPEED": "true"})
    assert asked({"ACCELERATE_USE_DEEPSPEED": "false"}) is None


def keys(found: Any, table: dict[str, set[str]], place: str = "") -> int:
    """Hold every key of a document against a table; how many there were."""
    if isinstance(found, list):
        return sum(keys(one, table, place) for one in found)
    if not isinstance(found, dict):
        return 0
    short = place.removeprefix("spec.pytorchReplicaSpecs.Worker.") if ".Worker.t" in place else place
    assert short in table, f"{place} may have no keys"
    assert set(found) <= table[short], (place, set(found) - table[short])
    return len(found) + sum(keys(value, table, f"{place}.{key}".strip(".")) for key, value in found.items())


def exports(script: str) -> set[str]:
    """The variables that a shell script exports."""
    return {
        name
        for line in script.splitlines()
        if line.strip().startswith("export ")
        for name in re.findall(r"(?:^| )([A-Z_]+)=", line)
    }


def recipe_of(script: str, values: dict[str, str]) -> Recipe:
    """The recipe that a script starts, with its overrides, and `values` for its variables."""
    lines = [line for line in script.splitlines() if line.startswith("exec bash launch/train.sh ")]
    assert len(lines) == 1
    for name, value in values.items():
        lines[0] = lines[0].replace(f"${name}", value)
    _, _, _, recipe, *overrides = shlex.split(lines[0])
    assert len(overrides) >= 2
    return load(ROOT / recipe, overrides)


def test_kubernetes_keys_and_command() -> None:
    job = read("kubernetes.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert keys(job, PYTORCHJOB) == written("kubernetes.yaml") > 60
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod, elastic = worker["template"]["spec"], job["spec"]["elasticPolicy"]
    [container] = pod["containers"]
    assert container["name"] == "pytorch"  # pytorch_validation.go asks for it
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    assert elastic["rdzvBackend"] == "c10d" and elastic["maxRestarts"] > 0
    assert all(isinstance(conf["value"], str) for conf in elastic["rdzvConf"])
    assert container["command"] == ["bash", "-c"]
    [script] = container["args"]
    assert exports(script) <= TOLD and len(exports(script)) == 8
    given = {f"PET_{name}" for name in ("NNODES", "MAX_RESTARTS", "RDZV_ENDPOINT", "RDZV_ID")}  # elastic.go
    assert set(re.findall(r"PET_[A-Z_]+", script)) == given
    # Of 128 and more the operator makes a pod anew (restartPolicy ExitCode), of less the job has failed.
    code = re.findall(r"UNFINISHED=(\d+)", script)
    assert worker["restartPolicy"] == "ExitCode" and len(code) == 1 and 128 <= int(code[0]) <= 255
    [wait] = re.findall(r"WAIT=(\d+)", script)
    assert pod["terminationGracePeriodSeconds"] > int(wait)
    values = {one["name"]: one["value"] for one in container["env"]}
    started = recipe_of(script, values)
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {
        f"/{Path(place).parts[1]}" for place in (started.output, str(started.data.cache), "/data")
    } <= mounted


def test_kubernetes_by_the_operators_models() -> None:
    """As the package kubeflow-training reads it, whose models are made of the operator's definition."""
    training = pytest.importorskip("kubeflow.training.api_client")
    job = read("kubernetes.yaml")
    client = training.ApiClient()
    made = client.deserialize(SimpleNamespace(data=json.dumps(job)), "KubeflowOrgV1PyTorchJob")
    back = client.sanitize_for_serialization(made)
    limits = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["resources"][
        "limits"
    ]
    limits["nvidia.com/gpu"] = str(limits["nvidia.com/gpu"])  # a quantity is text there
    assert back == job  # no key was left out


def test_skypilot_keys_and_command() -> None:
    task = read("skypilot.yaml")
    envs = task.pop("envs")
    assert keys(task, SKYPILOT) + 1 + len(envs) == written("skypilot.yaml") > 20
    assert all(isinstance(value, str) for value in envs.values())
    recovery, run = task["resources"]["job_recovery"], task["run"]
    assert task["resources"]["use_spot"] is True
    assert exports(run) == {
        "SETUP",
        "NODES",
        "NODE_RANK",
        "PROCESSES",
        "MASTER_ADDR",
        "RUN_ID",
        "RESTARTS",
    } | {"UNFINISHED"}
    assert set(re.findall(r"SKYPILOT_[A-Z_]+", run)) == SKY_GIVES
    # A run that was stopped ends with the code at which the job is started again.
    assert re.findall(r"UNFINISHED=(\d+)", run) == [str(code) for code in recovery["recover_on_exit_codes"]]
    started = recipe_of(run, envs)
    assert (
        started.output.startswith("/outputs/") and task["file_mounts"]["/outputs"]["mode"] == "MOUNT_CACHED"
    )


def test_skypilot_by_its_own_parser() -> None:
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml"))
    assert task.num_nodes == 1 and set(task.storage_mounts) == {"/data", "/outputs"}
    [resources] = task.resources
    assert resources.use_spot and resources.accelerators == {"A100-80GB": 8}


def test_slurm_options() -> None:
    lines = re.findall(r"^#SBATCH (.*)$", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
    found = dict(re.fullmatch(r"--([a-z-]+)(?:=(\S+))?", line).groups() for line in lines)  # type: ignore[union-attr]
    assert set(found) == SBATCH and len(lines) == len(SBATCH)
    assert found["requeue"] is None and re.fullmatch(r"B:USR1@\d+", found["signal"])  # B: the script alone
    assert re.fullmatch(r"\d+:\d\d:\d\d", found["time"]) and found["open-mode"] == "append"


def test_image_has_what_the_job_starts() -> None:
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    assert sum("-c constraints.txt" in line for line in lines) == 1  # the pinned packages
    assert any(re.match(r"FROM python:3\.1[12]-slim$", line) for line in lines)


def test_readme_names_every_file() -> None:
    told = (LAUNCH / "README.md").read_text()
    files = [path.relative_to(LAUNCH).as_posix() for path in LAUNCH.rglob("*") if path.is_file()]
    assert len(files) == 15
    assert [name for name in files if name != "README.md" and name.rsplit("/", 1)[-1] not in told] == []
