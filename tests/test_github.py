"""Workflows and issue templates, which cannot run here: they parse, and name what exists."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_name_what_exists(path):
    workflow = read(path)
    assert True in workflow, "YAML reads the key `on` as true"
    assert workflow["permissions"] == {"contents": "read"}
    extras = set(
        re.findall(r"^(\w+) = \[", PROJECT.split("[project.optional-dependencies]")[1], re.M)
    )
    for job in workflow["jobs"].values():
        assert {"runs-on", "steps"} <= job.keys()
        needed = job.get("needs", [])
        assert set([needed] if isinstance(needed, str) else needed) <= workflow["jobs"].keys()
    for step in steps(path):
        assert ("run" in step) != ("uses" in step)
        command = step.get("run", "")
        for extra in re.findall(r"-e \"\.\[(\w+)\]\"", command):
            assert extra in extras
        for name in re.findall(r"(?:^|\s)(\.ci/\w+|\w+/\S+\.yml)", command):
            assert (ROOT / name).is_file()


def test_systems_and_pythons():
    workflow = read(ROOT / ".github" / "workflows" / "tests.yml")
    matrix = workflow["jobs"]["tests"]["strategy"]["matrix"]
    assert {name.partition("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}
    (oldest,) = re.findall(r'^requires-python = ">=(.*)"', PROJECT, re.MULTILINE)
    # As strings: YAML reads 3.10 as 3.1.
    assert matrix["python"][0] == oldest
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in matrix["python"]
    lowest = workflow["jobs"]["lowest-versions"]["steps"]
    assert {"python-version": oldest} in [step.get("with") for step in lowest]


def test_only_the_upload_may_identify_itself():
    jobs = read(ROOT / ".github" / "workflows" / "release.yml")["jobs"]
    allowed = [name for name, job in jobs.items() if job.get("permissions", {}).get("id-token")]
    assert allowed == ["publish"]
    text = "".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    assert "secrets." not in text


def test_bug_reports_hold_the_output_of_the_check():
    reports = [read(path) for path in TEMPLATES if path.name != "config.yml"]
    assert reports
    for report in reports:
        assert {"name", "description", "body"} <= report.keys()
        ids = [part["id"] for part in report["body"]]
        assert len(ids) == len(set(ids))
        (check,) = (part for part in report["body"] if part["id"] == "check")
        assert "samrefine task=check" in check["attributes"]["label"]
        assert check["validations"]["required"]
