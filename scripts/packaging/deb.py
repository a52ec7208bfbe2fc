"""Debian packages, made by dpkg-deb: `outstation` (a device), `outstation-fleet` (collector and dashboard), and
`outstation-extras` (Parquet and SQL).

All share one environment in /opt/outstation, whose interpreter is Debian's. The files of a package are those of its
wheels, the units in `deploy/`, and what `deploy/debian/` holds under its name.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from email.utils import formatdate
from pathlib import Path

import msgspec

from scripts.packaging import sbom, wheels
from scripts.packaging.targets import ROOT, Architecture, PackagingError, Suite, program_version, run

PARTS = ROOT / "deploy" / "debian"
MAINTAINER = "{} <{}>".format(
    os.environ.get("DEBFULLNAME", "Outstation maintainers"), os.environ.get("DEBEMAIL", "outstation@localhost")
)
HOMEPAGE = "https://pypi.org/project/outstation/"
_PREFIX = Path("opt/outstation")
_SCRIPTS = ("preinst", "postinst", "prerm", "postrm")
_PROGRAM = """\
#!/opt/outstation/bin/python -P
import sys

from outstation.__main__ import main

sys.exit(main())
"""
# Shared libraries that are not in a wheel → the package that has them in Debian.
_LIBRARIES = {
    **dict.fromkeys(
        ("libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libutil.so.1", "libresolv.so.2"),
        "libc6",
    ),
    **dict.fromkeys(("ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "ld-linux-armhf.so.3"), "libc6"),
    "libffi.so.8": "libffi8",
    "libstdc++.so.6": "libstdc++6",
    "libgcc_s.so.1": "libgcc-s1",
    "libz.so.1": "zlib1g",
    "libatomic.so.1": "libatomic1",
}
_COMPLETIONS = {
    "outstation.bash": "bash-completion/completions/outstation",
    "_outstation": "zsh/vendor-completions/_outstation",
    "outstation.fish": "fish/vendor_completions.d/outstation.fish",
}


class Package(msgspec.Struct, frozen=True):
    """A Debian package: its sections of the lock, its units, its other files, and whether it has the program."""

    name: str
    sections: tuple[str, ...]
    units: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    has_program: bool = False

    def select_libraries(self, python: str, architecture: Architecture) -> str:
        """Return the locked libraries of this package, without those of the package that it depends on."""
        base = () if self.has_program else PACKAGES[0].sections
        # Most extras have a library without wheels for 32-bit ARM.
        sections = ("device",) if architecture.compiled else self.sections
        locked = (ROOT / "deploy" / architecture.lock).read_text(encoding="utf-8")
        return wheels.select_locked(locked, sections, python, base)


PACKAGES = (
    Package(
        *("outstation", ("device", "images", "notify"), ("outstation.service",)),
        (
            ("deploy/devices.conf", "usr/share/doc/outstation/examples/devices.conf"),
            ("deploy/credentials.conf", "usr/share/doc/outstation/examples/credentials.conf"),
            # For sensor programs of the system's Python.
            ("agent/outstation/protocol/client.py", "usr/lib/python3/dist-packages/outstation_client.py"),
        ),
        has_program=True,
    ),
    Package(
        *("outstation-fleet", ("fleet", "plot", "postgres")),
        ("outstation-collect.service", "outstation-dashboard.service"),
        (("deploy/debian/outstation-dashboard.default", "etc/default/outstation-dashboard"),),
    ),
    Package("outstation-extras", ("parquet", "sql")),
)


class DebBuilder:
    """Builder of the packages of one suite and architecture, in `out`."""

    def __init__(
        self,
        suite: Suite,
        architecture: Architecture,
        revision: int,
        epoch: int,
        out: Path,
        compiled: Path | None = None,
    ) -> None:
        """`compiled` is the folder of wheels for libraries that have none in the package index."""
        self._suite, self._architecture, self._epoch, self._out = suite, architecture, epoch, out
        self._compiled = compiled
        self.version = f"{program_version()}-{revision}+deb{suite.release}"

    def build(self, wheel: Path, names: Iterable[str] = ()) -> list[Path]:
        """Build the packages called `names`, or all; return their files, each with its bill of materials."""
        # Libraries of the other packages have no wheels for 32-bit ARM either.
        wanted = set(names) or {p.name for p in PACKAGES if p.has_program or not self._architecture.compiled}
        with tempfile.TemporaryDirectory(prefix="outstation-deb-") as folder:
            return [self._build(package, wheel, Path(folder)) for package in PACKAGES if package.name in wanted]

    def _build(self, package: Package, wheel: Path, folder: Path) -> Path:
        root = folder / package.name
        site = root / _PREFIX / "lib" / f"python{self._suite.python}" / "site-packages"
        site.mkdir(parents=True)
        locked = package.select_libraries(self._suite.python, self._architecture)
        if self._compiled is not None:
            locked = wheels.install_compiled(site, locked, self._compiled, self._architecture)
        wheels.install_locked(site, locked, self._suite, self._architecture, folder)
        libraries = find_libraries(site, bundled_in=[folder])
        if package.has_program:
            wheels.unpack(wheel, site)
            self._make_environment(root)
            _write_shell_files(root)
        for unit in package.units:
            _copy(ROOT / "deploy" / unit, root / "usr/lib/systemd/system" / unit)
        for source, target in package.files:
            _copy(ROOT / source, root / target)
        if package.units:
            _copy(PARTS / f"{package.name}.sysusers", root / "usr/lib/sysusers.d" / f"{package.name}.conf")
            _copy(PARTS / f"{package.name}.tmpfiles", root / "usr/lib/tmpfiles.d" / f"{package.name}.conf")
        documents = root / "usr/share/doc" / package.name
        documents.mkdir(parents=True, exist_ok=True)
        (documents / "copyright").write_text(describe_licences(site, self._suite.python), encoding="utf-8")
        (documents / "changelog.Debian.gz").write_bytes(gzip.compress(self._changelog(package.name), 9, mtime=0))
        _copy(PARTS / f"{package.name}.lintian-overrides", root / "usr/share/lintian/overrides" / package.name)
        self._write_control(package, root, libraries)
        file = self._out / f"{package.name}_{self.version}_{self._architecture.name}.deb"
        self._out.mkdir(parents=True, exist_ok=True)
        settle(root, self._epoch)
        # zstd: xz makes it a quarter smaller, and takes three minutes.
        environment = os.environ | {"SOURCE_DATE_EPOCH": str(self._epoch)}
        run(["dpkg-deb", "--root-owner-group", "-Zzstd", "-b", str(root), str(file)], env=environment)
        file.with_suffix(".cdx.json").write_bytes(sbom.describe_site(site, package.name, self.version, self._epoch))
        return file

    def _make_environment(self, root: Path) -> None:
        """Give the tree the shape of a virtual environment: model processes start `sys.executable`."""
        prefix, python = root / _PREFIX, self._suite.python
        (prefix / "bin").mkdir()
        (prefix / "pyvenv.cfg").write_text(
            f"home = /usr/bin\ninclude-system-site-packages = {str(bool(self._architecture.debian)).lower()}\n"
            f"version = {python}\n",
            encoding="utf-8",
        )
        (prefix / "bin" / "python").symlink_to(f"/usr/bin/python{python}")
        program = prefix / "bin" / "outstation"
        program.write_text(_PROGRAM, encoding="utf-8")
        program.chmod(0o755)
        (root / "usr/bin").mkdir(parents=True)
        (root / "usr/bin/outstation").symlink_to("/opt/outstation/bin/outstation")

    def _changelog(self, name: str) -> bytes:
        date = formatdate(self._epoch)
        entry = f"{name} ({self.version}) {self._suite.name}; urgency=medium\n\n"
        entry += f"  * Version {program_version()}; its changes are in CHANGELOG.md.\n\n -- {MAINTAINER}  {date}\n"
        return entry.encode()

    def _write_control(self, package: Package, root: Path, libraries: set[str]) -> None:
        libraries = libraries | {name for _, name in self._architecture.debian}
        size = sum(path.lstat().st_size + 1023 >> 10 for path in root.rglob("*") if not path.is_dir())
        values = {
            "VERSION": self.version,
            "ARCHITECTURE": self._architecture.name,
            "MAINTAINER": MAINTAINER,
            "HOMEPAGE": HOMEPAGE,
            "INSTALLED_SIZE": str(size),
            "PYTHON": self._suite.python,
            "NEXT_PYTHON": self._suite.next_python,
            # The wheels are built for glibc 2.34 at most; both suites have a later one.
            "LIBRARIES": ", ".join(f"{name} (>= 2.34)" if name == "libc6" else name for name in sorted(libraries)),
        }
        control = root / "DEBIAN"
        control.mkdir()
        text = (PARTS / f"{package.name}.control").read_text(encoding="utf-8")
        (control / "control").write_text(re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], text), encoding="utf-8")
        for name in _SCRIPTS:
            if (source := PARTS / f"{package.name}.{name}").exists():
                _copy(source, control / name)
                (control / name).chmod(0o755)
        if conffiles := sorted(f"/{path.relative_to(root)}\n" for path in (root / "etc").rglob("*") if path.is_file()):
            (control / "conffiles").write_text("".join(conffiles), encoding="utf-8")
        sums = []
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.is_symlink() and control not in path.parents:
                sums.append(f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(root)}\n")
        (control / "md5sums").write_text("".join(sums), encoding="utf-8")


def find_libraries(site: Path, bundled_in: Iterable[Path]) -> set[str]:
    """Return the packages that have the shared libraries which those in `site` need. Raises PackagingError."""
    bundled = {path.name for folder in bundled_in for path in folder.rglob("*.so*")}
    packages: dict[str, str] = {}
    for path in sorted(site.rglob("*.so*")):
        for name in re.findall(r"\(NEEDED\).*\[(.+)\]", run(["readelf", "-d", str(path)]).stdout):
            if name not in bundled and name not in _LIBRARIES:
                place = path.relative_to(site)
                raise PackagingError(f"{place} needs {name}; name its package in scripts/packaging/deb.py")
            if name not in bundled:
                packages[name] = _LIBRARIES[name]
    return set(packages.values()) | {"libc6"}


def describe_licences(site: Path, python: str) -> str:
    """Return the file `copyright`: licences of the program and its recordings, and where those of the libraries are."""
    recordings = (ROOT / "models" / "recordings" / "README.md").read_text(encoding="utf-8")
    texts = [block[1] for block in re.finditer(r"^```\n(.*?)^```$", recordings, re.DOTALL | re.MULTILINE)]
    names = ("recordings/exercise.npz", "recordings/solar.npz", "uplot.js and uplot.css of the dashboard")
    texts.append((ROOT / "agent/outstation/fleet/dashboard/static/uplot.LICENSE").read_text(encoding="utf-8"))
    parts = [
        "Outstation. Copyright: the Outstation authors. Licence: Apache-2.0, whose text is in\n"
        "/usr/share/common-licenses/Apache-2.0.\n",
        *(f"{name}:\n\n{text}" for name, text in zip(names, texts, strict=True)),
        f"Libraries. Their texts are in /{_PREFIX}/lib/python{python}/site-packages/*.dist-info:\n\n"
        + sbom.describe_licences(site),
    ]
    return f"\n{'-' * 78}\n\n".join(parts)


def settle(root: Path, epoch: int) -> None:
    """Give all files of a tree the same time, and modes that do not depend on the machine."""
    for path in [root, *root.rglob("*")]:
        if not path.is_symlink():
            is_program = path.parent.name in {"bin", "DEBIAN"} and os.access(path, os.X_OK)
            path.chmod(0o755 if path.is_dir() or is_program else 0o644)
        os.utime(path, (epoch, epoch), follow_symlinks=False)


def _write_shell_files(root: Path) -> None:
    """Write the man pages of all commands, and what shells complete them with."""
    share = root / "usr" / "share"
    pages, completions = share / "man" / "man1", root / "completions"
    for option, folder in (("--man", pages), ("--completion", completions)):
        folder.mkdir(parents=True)
        run([sys.executable, "-m", "scripts.cli_documents", option, str(folder)], cwd=ROOT)
    for page in pages.iterdir():
        page.with_name(f"{page.name}.gz").write_bytes(gzip.compress(page.read_bytes(), 9, mtime=0))
        page.unlink()
    for name, target in _COMPLETIONS.items():
        _copy(completions / name, share / target)
    shutil.rmtree(completions)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
