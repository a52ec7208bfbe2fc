"""Command of `scripts/build_deb`, `build_apt`, `build_dist` and `build_image`, which it takes as its first argument."""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path

from scripts.packaging import apt_repository, deb, image, kernel, wheels
from scripts.packaging.targets import (
    ARCHITECTURES,
    DEFAULT_ARCHITECTURES,
    ROOT,
    SUITES,
    PackagingError,
    program_version,
    source_date,
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts.packaging")
    commands = parser.add_subparsers(dest="command", required=True)
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the results; default dist/")
    build = commands.add_parser("deb", parents=[parent], help="Debian packages, each with its bill of materials")
    build.add_argument("--suite", choices=SUITES, action="append", help="default: all")
    build.add_argument("--arch", choices=ARCHITECTURES, action="append", help="default: amd64 and arm64")
    build.add_argument("--wheels", type=Path, help="folder of the compiled wheels for armhf, from scripts/test_arm")
    build.add_argument("--package", action="append", choices=[package.name for package in deb.PACKAGES])
    build.add_argument("--revision", type=int, default=1, help="of the packages of one version of the program")
    commands.add_parser("dist", parents=[parent], help="wheels and sdist for a package index")
    repository = commands.add_parser("apt", parents=[parent], help="repository for apt, of all packages in --out")
    repository.add_argument("folder", type=Path)
    repository.add_argument("--key", default="", help="key of gpg that signs the indices")
    container = commands.add_parser("image", parents=[parent], help="container image, of a package in --out")
    container.add_argument("--suite", choices=SUITES, default="trixie")
    container.add_argument("--arch", choices=DEFAULT_ARCHITECTURES, default="amd64")
    options = parser.parse_args(arguments)
    actions = {"deb": build_debs, "dist": build_distributions, "apt": make_repository, "image": build_image}
    try:
        made = actions[options.command](options)
    except PackagingError as problem:
        print(f"{options.command}: {problem}", file=sys.stderr)
        return 1
    for file in made:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        print(f"{digest}  {file}  {file.stat().st_size / 1e6:.1f} MB")
    return 0


def build_debs(options: argparse.Namespace) -> list[Path]:
    epoch = source_date()
    made = []
    for architecture in map(ARCHITECTURES.__getitem__, options.arch or DEFAULT_ARCHITECTURES):
        suites = options.suite or architecture.suites
        if unfit := set(suites) - set(architecture.suites):
            raise PackagingError(
                f"{architecture.name}: no package for {', '.join(unfit)}, only for {architecture.suites[0]}"
            )
        if architecture.compiled and not options.wheels:
            raise PackagingError(
                f"{architecture.name}: {', '.join(architecture.compiled)} have no wheels; compile them with `sudo "
                f"scripts/test_arm {architecture.machine} --wheels DIR`, and give the folder with --wheels DIR"
            )
        with tempfile.TemporaryDirectory(prefix="outstation-wheel-") as folder:
            machine = wheels.choose_machine(architecture.machine)
            wheel = wheels.build_wheel(Path(folder), epoch, machine=machine)
            for suite in suites:
                builder = deb.DebBuilder(
                    SUITES[suite], architecture, options.revision, epoch, options.out, options.wheels
                )
                made += builder.build(wheel, options.package or ())
    return made


def build_distributions(options: argparse.Namespace) -> list[Path]:
    options.out.mkdir(parents=True, exist_ok=True)
    made = []
    with tempfile.TemporaryDirectory(prefix="outstation-dist-") as folder:
        machines = dict.fromkeys([wheels.ANY_MACHINE, *map(wheels.choose_machine, kernel.TRIPLES)])
        for kind, machine in (*(("wheel", machine) for machine in machines), ("sdist", wheels.ANY_MACHINE)):
            archive = wheels.build_wheel(Path(folder), source_date(), kind, machine)
            made.append(Path(archive.rename(options.out / archive.name)))
    return made


def make_repository(options: argparse.Namespace) -> list[Path]:
    packages = sorted(options.out.glob("*.deb"))
    if not packages:
        raise PackagingError(f"{options.out}: no packages there; run: scripts/build_deb --out {options.out}")
    return apt_repository.make(options.folder, packages, source_date(), options.key)


def build_image(options: argparse.Namespace) -> list[Path]:
    suite, architecture = SUITES[options.suite], ARCHITECTURES[options.arch]
    pattern = f"outstation_{program_version()}-*+deb{suite.release}_{architecture.name}.deb"
    packages = sorted(options.out.glob(pattern))
    if not packages:
        raise PackagingError(f"{options.out}: no {pattern} there; run: scripts/build_deb --out {options.out}")
    package = packages[-1]
    version = package.name.split("_")[1]
    file = package.with_suffix(".oci.tar")
    return [image.build(package, suite, architecture, version, source_date(), file)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
