"""Files beside the code agree with each other: versions, licence, workflows, packages."""

from __future__ import annotations

import re
import runpy
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def read_yaml(name: str) -> dict:
    return yaml.safe_load(read(name))


PROJECT = tomllib.loads(read("pyproject.toml"))["project"]
TESTS = read_yaml(".github/workflows/test.yml")["jobs"]


def test_citation_registry_and_tested_pythons_are_those_of_the_project():
    citation, entry = read_yaml("CITATION.cff"), read_yaml(".github/ecosystem/meta.yaml")
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    required = {"name", "description", "project_home", "documentation_home", "install", "license", "tags", "contact"}
    assert required <= set(entry)
    assert (entry["name"], entry["license"]) == (PROJECT["name"], PROJECT["license"])
    assert entry["install"] == {"pypi": PROJECT["name"].replace("_", "-")}
    tested = {lane["python"] for lane in TESTS["versions"]["strategy"]["matrix"]["include"]}
    named = {name.rsplit(" ", 1)[1] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)}
    assert tested == named


def test_workflows_run_pinned_actions_without_secrets_and_what_is_there():
    text = "".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    actions, scripts = re.findall(r"uses: *(\S+)(.*)", text), re.findall(r"scripts/\S+", text)
    assert len(actions) > len(WORKFLOWS)
    unpinned = [name for name, note in actions if not re.search(r"@[0-9a-f]{40}$", name) or " # v" not in note]
    assert unpinned == []
    assert [word for word in ("secrets.", "pull_request_target") if word in text] == []
    permissions = [read_yaml(f".github/workflows/{path.name}")["permissions"] for path in WORKFLOWS]
    assert permissions == [{"contents": "read"}] * len(WORKFLOWS)
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    assert set(TESTS["pinned"]["strategy"]["matrix"]["target"]) <= targets
    assert scripts
    assert all((ROOT / script).exists() for script in scripts)


@pytest.mark.parametrize(
    ("lacks", "junk", "says"),
    [
        ("", "", "hold what they should"),
        ("tests/conftest.py", "", "pixnet_sd-1.0.tar.gz lacks tests/conftest.py"),
        ("", "pixnet_sd/slide.zarr/zarr.json", "pixnet_sd-1.0.tar.gz: pixnet_sd/slide.zarr/zarr.json does not"),
        ("", "tests/x.py", "any.whl: tests/x.py is outside the package"),
    ],
)
def test_check_of_packages(tmp_path, lacks, junk, says, capsys):
    """Of a wheel and an sdist with empty files."""
    script = runpy.run_path(str(ROOT / "scripts/check_package.py"))
    with tarfile.open(tmp_path / "pixnet_sd-1.0.tar.gz", "w:gz") as archive:
        for name in {*script["NEEDED"], junk} - {lacks, ""}:
            archive.addfile(tarfile.TarInfo(f"pixnet_sd-1.0/{name}"))
    with zipfile.ZipFile(tmp_path / "pixnet_sd-1.0-py3-none-any.whl", "w") as wheel:
        for name in {"pixnet_sd/py.typed", "pixnet_sd-1.0.dist-info/METADATA", junk} - {""}:
            wheel.writestr(name, "")
    assert script["main"]([str(tmp_path), "--only-contents"]) == bool(lacks or junk)
    assert says in capsys.readouterr().out
