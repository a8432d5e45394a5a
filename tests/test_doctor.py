"""`ssm-lm doctor`: the report is complete, flags what is out of range, and fails for wrong layers alone."""

import json
import sys

import pytest
import torch

from ssm_lm import doctor
from ssm_lm.cli import main
from ssm_lm.modeling.ssm import S4D


def test_json_report(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"]["version"] == torch.__version__
    assert report["packages"]["torch"]["fits"] is True
    assert report["packages"]["transformers"]["wanted"]
    assert "pytest" not in report["packages"]  # of an extra
    assert report["machine"]["memory_gib"] > 0
    assert report["deepspeed"]["version"] == doctor._version("deepspeed")
    assert "reachable" not in report["hub"]
    check = report["self-check"]
    assert check["passed"] is True
    assert 0 < check["s4 on cpu"] < 1e-4
    assert 0 < check["s4d on cpu"] < 1e-4


def test_tables_for_people(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for expected in ("self-check", "deepspeed", torch.__version__, "passed"):
        assert expected in out
    assert "outside" not in out


def test_out_of_range_is_flagged_and_no_failure(capsys, monkeypatch):
    monkeypatch.setattr(
        doctor.importlib.metadata, "requires", lambda name: ["torch>=99", "no_such_package>=1", 'x>=1; extra == "dev"']
    )
    report = doctor.packages()
    assert set(report) == {"torch", "no_such_package"}
    assert not report["torch"]["fits"]
    assert report["no_such_package"] == {"version": None, "wanted": ">=1", "fits": False, "extra": ""}
    assert main(["doctor"]) == 0
    assert "outside >=99" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["wrong", "nan", "raises"])
def test_a_layer_that_computes_wrong_fails(monkeypatch, capsys, fault):
    right = S4D.kernel

    def kernel(self, length):
        if fault == "raises":
            raise RuntimeError("no kernel\nfor this device")
        return right(self, length) * (1.001 if fault == "wrong" else float("nan"))

    monkeypatch.setattr(S4D, "kernel", kernel)
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--json"])
    assert caught.value.code == 1
    report = json.loads(capsys.readouterr().out)
    assert report["self-check"]["passed"] is False
    assert report["self-check"]["s4 on cpu"] < 1e-4


def test_network_is_asked_only_when_told(monkeypatch):
    asked = []

    def urlopen(request, timeout):
        asked.append((request.get_method(), timeout))
        raise OSError("no route")

    monkeypatch.setattr(doctor.urllib.request, "urlopen", urlopen)
    doctor.hub(network=False)
    assert asked == []
    assert doctor.hub(network=True)["reachable"] == "no: no route"
    assert asked == [("HEAD", 2)]


def test_deepspeed_is_not_imported():
    before = "deepspeed" in sys.modules
    doctor.deepspeed_readiness()
    assert ("deepspeed" in sys.modules) == before
