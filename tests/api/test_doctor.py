"""`compress doctor`: findings and remedies."""

import json
import urllib.error
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from questpress.pipeline.api import doctor

from tests.support.little import compress


@pytest.fixture
def diagnosis():
    return doctor.doctor(offline=True)


def get_finding(diagnosis: doctor.Diagnosis, name: str) -> doctor.Finding:
    (finding,) = [finding for finding in diagnosis.findings if finding.name == name]
    return finding


def test_machine_that_runs_the_tests_is_fit(diagnosis):
    assert diagnosis.can_run, [finding for finding in diagnosis.findings if finding.verdict == "missing"]
    assert get_finding(diagnosis, "torch").value == metadata.version("torch")
    assert get_finding(diagnosis, "--target here").value in ("x86", "x86-vnni", "arm64")


def test_diagnosis_is_a_list_in_a_notebook(diagnosis):
    lines = repr(diagnosis).splitlines()
    assert len(lines) == len(diagnosis.findings) and lines[0].startswith("Machine, system (ok): ")


def test_incomplete_variables_of_torchrun_are_a_note(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    finding = next(finding for finding in doctor._machine() if finding.name == "environment")
    assert (finding.verdict, finding.value) == ("note", "WORLD_SIZE=2 is ignored")
    assert finding.remedy is not None and "Unset them" in finding.remedy


def test_doctor_checks_every_declared_package(diagnosis):
    checked = {finding.name for finding in diagnosis.findings if finding.group == "Packages"}
    declared = {
        Requirement(line).name for line in metadata.requires("questpress") or [] if "extra" not in line
    }
    assert checked == declared and len(declared) > 15


@pytest.mark.parametrize(
    ("line", "trouble"),
    [
        ("torch>=999", f"{metadata.version('torch')} is not >=999"),
        ("no-such-package-at-all>=1", "is not installed"),
        ("torch>=1.0", None),
    ],
)
def test_old_and_missing_packages_are_reported(line, trouble):
    assert doctor._trouble(Requirement(line)) == trouble


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("operator torchvision::nms does not exist\nand more"),
         "operator torchvision::nms does not exist"),
        (ImportError(), "ImportError"),
    ],
)  # fmt: skip
def test_incompatible_package_is_reported_with_the_reason(monkeypatch, error, reason):
    def broken(_module):
        raise error

    monkeypatch.setattr(doctor, "import_module", broken)
    trouble = doctor._trouble(Requirement("torchvision>=0.1"))
    assert trouble == f"{metadata.version('torchvision')} cannot be loaded ({reason})"


def test_missing_package_has_an_install_command_and_exit_code_1(monkeypatch):
    monkeypatch.setattr(doctor, "_requirements", lambda: [(Requirement("no-such-package>=2"), None)])
    result = compress("doctor", "--offline")
    assert result.exit_code == 1
    assert "✗ no-such-package: is not installed" in result.stdout
    assert "→ pip install 'no-such-package>=2'" in result.stdout
    assert result.stdout.rstrip().endswith("compress cannot run on this machine. Missing requirements: 1.")


def test_extra_that_is_not_there_is_only_a_note(monkeypatch):
    monkeypatch.setattr(doctor, "_requirements", lambda: [(Requirement("wandb>=999999"), "wandb")])

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", absent)
    (finding,) = doctor._extras()
    assert (finding.verdict, finding.remedy) == ("note", "pip install 'wandb>=999999'")
    assert "required by --track wandb" in finding.value


def test_unwritable_cache_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, _mode: Path(path) != tmp_path)
    finding = doctor._folder("cache", tmp_path / "cache", "--cache")
    assert finding.verdict == "missing"
    assert finding.value == f"{tmp_path / 'cache'} cannot be written"
    assert finding.remedy == "set another folder with --cache"


def test_unreachable_hub_is_a_note():
    def unreachable(*_, **__):
        raise urllib.error.URLError("no route to host")

    def refuses(request, **_):
        raise urllib.error.HTTPError(request.full_url, 403, "forbidden", {}, None)

    away = doctor._hub(unreachable)
    assert (
        away.verdict == "note" and "(no route to host)" in away.value and "--teacher-weights" in away.remedy
    )
    assert doctor._hub(refuses).verdict == "ok"


def test_json_holds_the_same(diagnosis):
    content = json.loads(compress("doctor", "--offline", "--json").stdout)
    assert [entry["name"] for entry in content["findings"]] == [entry.name for entry in diagnosis.findings]
