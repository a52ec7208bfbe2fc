"""Packages, as far as tests can make them without the package index: parts, control data, repository, image.

`scripts/build_deb` makes them, and `scripts/test_install` installs them on a fresh Debian.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import lock
from scripts.packaging import __main__ as command
from scripts.packaging import apt_repository, deb, image, wheels
from scripts.packaging.targets import ARCHITECTURES, SUITES, PackagingError, Suite

ROOT = Path(__file__).parents[2]
DEBIAN = ROOT / "deploy" / "debian"
EPOCH = 1_795_000_000
Program = Callable[[str], str]


def make_deb(folder: Path, name: str, version: str, architecture: str = "amd64") -> Path:
    """Build a small package with dpkg-deb."""
    root = folder / f"{name}-{version}"
    (root / "DEBIAN").mkdir(parents=True)
    fields = f"Package: {name}\nVersion: {version}\nArchitecture: {architecture}\nMaintainer: X <x@localhost>\n"
    (root / "DEBIAN" / "control").write_text(f"{fields}Description: test\n")
    file = folder / f"{name}_{version}_{architecture}.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", root, file], check=True, capture_output=True)
    return file


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
@pytest.mark.parametrize("package", deb.PACKAGES, ids=[package.name for package in deb.PACKAGES])
def test_every_library_of_a_package_is_pinned_once_for_the_python_of_the_suite(
    package: deb.Package, suite: Suite
) -> None:
    text = package.select_libraries(suite.python, ARCHITECTURES["arm64"])
    names = [line.partition("==")[0] for line in text.splitlines() if not line.startswith(" ")]
    assert len(names) == len(set(names)) > 1
    assert "python_version" not in text
    assert text.count("--hash=sha256:") >= len(names)
    if package.has_program:
        numpy = {"3.11": "2.4", "3.13": "2.5"}[suite.python]
        assert f"numpy=={numpy}" in text


def test_an_unknown_section_and_another_kind_of_marker_end_the_build() -> None:
    text = "# section device\nx==1 ; sys_platform == 'win32' \\\n    --hash=sha256:00\n"
    with pytest.raises(PackagingError, match="no section fleet"):
        wheels.select_locked(text, ["fleet"], "3.13")
    with pytest.raises(PackagingError, match="not about Python's version"):
        wheels.select_locked(text, ["device"], "3.13")


def test_packages_that_are_installed_together_share_no_library() -> None:
    names = [
        set(re.findall("^[a-z]\\S+(?===)", package.select_libraries("3.13", ARCHITECTURES["amd64"]), re.MULTILINE))
        for package in deb.PACKAGES
    ]
    assert sum(map(len, names)) == len(set.union(*names))
    assert {"idna", "duckdb"} <= set.union(*names)


def test_the_locks_name_every_section_that_the_packages_take() -> None:
    assert {section for package in deb.PACKAGES for section in package.sections} <= {"device", *lock.EXTRAS}


@pytest.mark.parametrize("file", sorted(DEBIAN.glob("*.p[or]*")), ids=lambda file: file.name)
def test_a_maintainer_script_is_sound_shell_that_stops_at_the_first_error(program: Program, file: Path) -> None:
    assert re.match(r"#!/bin/sh\n(# .*\n)+set -e\n", file.read_text())
    done = subprocess.run([program("shellcheck"), file], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("unit", [unit for package in deb.PACKAGES for unit in package.units])
def test_the_units_are_valid_and_hardened_alike(program: Program, unit: str, tmp_path: Path) -> None:
    text = (ROOT / "deploy" / unit).read_text()
    runnable = re.sub(r"^(Exec\w+)=\S+", r"\1=/bin/true", text, flags=re.MULTILINE)
    (tmp_path / unit).write_text(runnable)
    analyze = program("systemd-analyze")
    done = subprocess.run([analyze, "verify", "--man=no", tmp_path / unit], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    options = ["security", "--offline=true", "--threshold=17", str(tmp_path / unit)]
    assert subprocess.run([analyze, *options], capture_output=True).returncode == 0
    package = next(package for package in deb.PACKAGES if unit in package.units)
    assert f"User={package.name}\n" in text
    assert f"u {package.name} - " in (DEBIAN / f"{package.name}.sysusers").read_text()
    for script in ("postinst", "prerm", "postrm"):
        assert unit in (DEBIAN / f"{package.name}.{script}").read_text()


def test_purging_erases_what_the_units_write_and_removing_nothing() -> None:
    for package in filter(lambda package: package.units, deb.PACKAGES):
        text = (DEBIAN / f"{package.name}.postrm").read_text()
        removing, _, purging = text.partition("    purge)\n")
        folders = {
            f"/var/lib/{name}"
            for unit in package.units
            for line in re.findall(r"^StateDirectory=(.+)$", (ROOT / "deploy" / unit).read_text(), re.MULTILINE)
            for name in line.split()
        }
        assert all(re.search(rf"{folder}(?![\w.-])", purging) for folder in folders)
        assert not re.search(r"\brm\b|-delete|rmdir", removing)


def test_a_repository_of_equal_packages_is_equal_and_names_them_with_their_digests(tmp_path: Path) -> None:
    packages = [
        make_deb(tmp_path, "outstation", "0.1.0-1+deb13"),
        make_deb(tmp_path, "outstation", "0.1.0-2+deb13"),
        make_deb(tmp_path, "outstation", "0.1.0-1+deb12", "arm64"),
    ]
    made = []
    for name in ("a", "b"):
        apt_repository.make(tmp_path / name, packages, EPOCH)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        made.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files})
    assert made[0] == made[1]
    index = made[0]["dists/trixie/main/binary-amd64/Packages"].decode()
    assert re.findall(r"^Version: (.+)$", index, re.MULTILINE) == ["0.1.0-1+deb13", "0.1.0-2+deb13"]
    assert hashlib.sha256(packages[0].read_bytes()).hexdigest() in index
    assert b"Version: 0.1.0-1+deb12" in made[0]["dists/bookworm/main/binary-arm64/Packages"]
    release = made[0]["dists/trixie/Release"].decode()
    packed = made[0]["dists/trixie/main/binary-amd64/Packages.gz"]
    assert f"{hashlib.sha256(packed).hexdigest()} {len(packed)} main/binary-amd64/Packages.gz" in release


def test_a_published_version_never_gets_other_bytes(tmp_path: Path) -> None:
    package = make_deb(tmp_path, "outstation", "0.1.0-1+deb13")
    apt_repository.make(tmp_path / "repository", [package], EPOCH)
    package.write_bytes(package.read_bytes() + b"\n")
    with pytest.raises(PackagingError, match="differs in its bytes"):
        apt_repository.make(tmp_path / "repository", [package], EPOCH)


def test_an_image_names_its_blobs_by_their_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passwd = tmp_path / "passwd"
    passwd.write_text("root:x:0:0::/root:/bin/sh\noutstation:x:998:997::/var/lib/outstation:/usr/sbin/nologin\n")

    def make_root(package: Path, suite: object, architecture: object, epoch: int, root: Path) -> None:
        with tarfile.open(root, "w") as archive:
            archive.add(passwd, "./etc/passwd")

    monkeypatch.setattr(image, "_make_root", make_root)
    files = []
    for name in ("a.tar", "b.tar"):
        arguments = (SUITES["trixie"], ARCHITECTURES["arm64"], "0.1.0-1+deb13", EPOCH, tmp_path / name)
        files.append(image.build(tmp_path / "outstation.deb", *arguments).read_bytes())
    assert files[0] == files[1]
    with tarfile.open(tmp_path / "a.tar") as archive:
        contents = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    for name, content in contents.items():
        if name.startswith("blobs/"):
            assert name == f"blobs/sha256/{hashlib.sha256(content).hexdigest()}"
    [described] = json.loads(contents["index.json"])["manifests"]
    manifest = json.loads(contents[f"blobs/sha256/{described['digest'].removeprefix('sha256:')}"])
    config = json.loads(contents[f"blobs/sha256/{manifest['config']['digest'].removeprefix('sha256:')}"])
    assert (config["config"]["User"], config["architecture"]) == ("998:997", "arm64")
    [older] = json.loads(contents["manifest.json"])
    assert older["RepoTags"] == ["outstation:0.1.0-1-deb13"]
    assert {older["Config"], *older["Layers"]} <= contents.keys()


@pytest.mark.parametrize(
    ("more", "says"), [([], "test_arm armv7l --wheels"), (["--suite", "trixie"], "only for bookworm")]
)
def test_a_package_for_32_bit_arm_is_refused_in_one_line_that_says_what_it_needs(
    more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["deb", "--arch", "armhf", *more]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert says in line


def test_libraries_without_wheels_are_those_that_were_compiled_in_the_locked_version(tmp_path: Path) -> None:
    armhf, folder, site = ARCHITECTURES["armhf"], tmp_path / "wheels", tmp_path / "site"
    folder.mkdir()
    locked = deb.PACKAGES[0].select_libraries("3.11", armhf)
    with pytest.raises(PackagingError, match="has not one wheel of cffi"):
        wheels.install_compiled(site, locked, folder, armhf)
    for name, version in re.findall(r"^(\S+)==(\S+)", locked, re.MULTILINE):
        if name in armhf.compiled:
            with zipfile.ZipFile(folder / f"{name}-{version}-cp311-cp311-linux_armv7l.whl", "w") as wheel:
                wheel.writestr(f"{name}/__init__.py", version)
    left = wheels.install_compiled(site, locked, folder, armhf)
    assert sorted(path.name for path in site.iterdir()) == sorted(armhf.compiled)
    before, after = (set(re.findall(r"^(\S+)==", text, re.MULTILINE)) for text in (locked, left))
    assert before - after == {*armhf.compiled, "numpy"}
    assert "tflite-runtime" in after
    assert left.count("--hash") > len(after)
