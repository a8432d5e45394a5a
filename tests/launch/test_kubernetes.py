"""launch/kubernetes.yaml against the schema of its kind, and against what the launcher that it starts takes."""

import copy
import json
import re
from pathlib import Path

import pytest
import yaml
from hosts import LAUNCH, REPO

jsonschema = pytest.importorskip("jsonschema")

SCHEMA = json.loads((Path(__file__).parent / "pytorchjob_schema.json").read_text())


@pytest.fixture
def manifest() -> dict:
    return yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())


def errors(manifest) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(manifest)]


def container(manifest) -> dict:
    return manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]


def test_the_manifest_fits_its_schema(manifest):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert errors(manifest) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["spec"]["elasticPolicy"].update(minReplicas="two"), "'two' is not of type 'integer'"),
        (lambda m: m["spec"].update(nprocPerNode=8), "8 is not of type 'string'"),
        (lambda m: m["spec"].pop("pytorchReplicaSpecs"), "'pytorchReplicaSpecs' is a required property"),
        (lambda m: container(m).update(comand=["sh"]), "'comand' was unexpected"),
        (lambda m: container(m)["ports"][0].pop("containerPort"), "'containerPort' is a required property"),
        (lambda m: container(m)["env"][0].update(value=1), "1 is not of type 'string'"),
    ],
)
def test_the_schema_sees_what_is_wrong(manifest, change, message):
    changed = copy.deepcopy(manifest)
    change(changed)
    found = errors(changed)
    assert len(found) == 1
    assert message in found[0]


def test_what_the_pods_run(manifest):
    spec, run = manifest["spec"], container(manifest)
    assert run["name"] == "pytorch"  # the operator finds ports and exit codes by this name
    assert run["ports"][0]["name"] == "pytorchjob-port"
    assert run["command"] == ["bash", "launch/torchrun.sh"]
    configs = [word for word in run["args"] if word.endswith(".yaml")]
    assert len(configs) == 1
    assert (REPO / configs[0]).is_file()
    policy, worker = spec["elasticPolicy"], spec["pytorchReplicaSpecs"]["Worker"]
    assert policy["minReplicas"] <= worker["replicas"] <= policy["maxReplicas"]
    assert worker["restartPolicy"] == "OnFailure"
    assert run["resources"]["limits"]["nvidia.com/gpu"] == int(spec["nprocPerNode"])
    grace = int(re.search(r"GRACE:-(\d+)", (LAUNCH / "env.sh").read_text())[1])
    assert worker["template"]["spec"]["terminationGracePeriodSeconds"] > grace
    volumes = {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in run["volumeMounts"]} == volumes
