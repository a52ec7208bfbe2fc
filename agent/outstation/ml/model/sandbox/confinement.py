"""Confinement of a process that runs a model or decodes files: a seccomp filter.

The filter leaves a process computation, memory and its open pipes. The process opens no file, socket or process,
signals and traces no other, and maps no executable memory. A system call outside the list fails with EPERM, so that
libraries can fall back. libseccomp translates the names of system calls for the processor; see seccomp(2) and
seccomp_rule_add(3). The filter cannot be removed again.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec.structs import replace

from outstation.foundation.errors import BadBundle

if TYPE_CHECKING:
    from outstation.ml.model.bundle.manifest import ResourceLimits


class ModelPolicy(msgspec.Struct, frozen=True):
    """The site's rules for models.

    `confinement`: "auto" confines where the machine can, "required" runs no model elsewhere, and "off" runs models in
    the daemon's own process. `memory_mib` caps the limit that a bundle names for itself.
    """

    confinement: Literal["auto", "required", "off"] = "auto"
    memory_mib: int = 2048

    def check(self) -> None:
        """Raise BadBundle if no model may run on this machine."""
        if self.confinement == "required" and (obstacle := find_obstacle()):
            raise BadBundle(
                f"this machine cannot confine a model ({obstacle}), and [models] confinement is "
                '"required"; mend that, or set it to "auto"'
            )

    def cap(self, limits: ResourceLimits) -> ResourceLimits:
        """Return `limits` of a bundle, with at most the site's memory."""
        return replace(limits, memory_mib=max(64, min(limits.memory_mib, self.memory_mib)))


_ALLOW, _FAIL = 0x7FFF0000, 0x00050000  # SCMP_ACT_ALLOW, SCMP_ACT_ERRNO(0)
_EQUAL, _MASKED_EQUAL = 4, 7  # of enum scmp_compare
_TSYNC = 4  # SCMP_FLTATR_CTL_TSYNC
_PROT_EXEC, _CLONE_THREAD = 0x4, 0x10000
# Calls of Python, NumPy and the runtime once they are loaded. Names that a processor does not have are skipped.
_ALLOWED = """
    read write readv writev pread64 lseek _llseek close fstat fstat64 brk munmap mremap madvise membarrier
    futex futex_time64 sched_yield sched_getaffinity set_robust_list rseq gettid getpid
    rt_sigaction rt_sigprocmask rt_sigreturn sigreturn sigaltstack restart_syscall
    clock_gettime clock_gettime64 clock_getres clock_nanosleep clock_nanosleep_time64 nanosleep gettimeofday
    poll ppoll ppoll_time64 getrandom getrusage exit exit_group
"""


class ConfinementError(Exception):
    """The kernel or libseccomp cannot confine a process; the text says why."""


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp: argument `arg` compared by `op` with `a`, or under mask `a` with `b`."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def confine_by(policy: ModelPolicy) -> bool:
    """Confine this process as `policy` says; return True if it is confined. Raises ConfinementError."""
    if policy.confinement == "off":
        return False
    try:
        confine()
    except ConfinementError:
        if policy.confinement == "required":
            raise
        return False
    return True


def find_obstacle() -> str:
    """Return why this machine cannot confine a process, or "" if it can."""
    try:
        library = _load_library()
    except ConfinementError as error:
        return str(error)
    # From level 2 on the kernel filters all threads of a process: seccomp_api_get(3). Emulated kernels do not.
    return "" if library.seccomp_api_get() >= 2 else "the kernel has no seccomp filters"


def confine(extra_calls: Sequence[str] = ()) -> None:
    """Confine this process and its threads for good, and allow it `extra_calls`. It can extend no file either.

    Raises ConfinementError; the process is then not confined.
    """
    library = _load_library()
    context = library.seccomp_init(_FAIL | errno.EPERM)
    if not context:
        raise ConfinementError("libseccomp cannot make a filter")

    def add(action: int, name: str, *comparisons: _Comparison) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        array = (_Comparison * len(comparisons))(*comparisons)
        # EDOM: this processor has another system call in its place, which has its own rule.
        if number != -1 and library.seccomp_rule_add_array(context, action, number, len(array), array) not in (
            0,
            -errno.EDOM,
        ):
            raise ConfinementError(f"libseccomp rejects the rule for {name}")

    try:
        # Threads that libraries have started already get the filter, too.
        if library.seccomp_attr_set(context, _TSYNC, 1) != 0:
            raise ConfinementError("the kernel cannot confine all threads of a process")
        for name in (*_ALLOWED.split(), *extra_calls):
            add(_ALLOW, name)
        for name in ("mmap", "mmap2", "mprotect"):
            add(_ALLOW, name, _Comparison(2, _MASKED_EQUAL, _PROT_EXEC, 0))
        for name in ("fcntl", "fcntl64"):
            add(_ALLOW, name, _Comparison(1, _EQUAL, fcntl.F_DUPFD_CLOEXEC, 0))
        # Threads of the runtime. Without clone3, whose flags a filter cannot read, the C library calls clone.
        add(_ALLOW, "clone", _Comparison(0, _MASKED_EQUAL, _CLONE_THREAD, _CLONE_THREAD))
        add(_FAIL | errno.ENOSYS, "clone3")
        # abort() signals the process itself; the probe raises its CPU limit below the hard one.
        add(_ALLOW, "tgkill", _Comparison(0, _EQUAL, os.getpid(), 0))
        add(_ALLOW, "prlimit64", _Comparison(0, _EQUAL, 0, 0), _Comparison(1, _EQUAL, resource.RLIMIT_CPU, 0))
        # Memory files are not part of the address space: without this limit, one could grow without bound.
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        if (code := library.seccomp_load(context)) != 0:
            raise ConfinementError(f"the kernel rejects the seccomp filter: {os.strerror(-code)}")
    finally:
        library.seccomp_release(context)


def _load_library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        raise ConfinementError("libseccomp.so.2 is missing; install the package libseccomp2") from None
    pointer, number = ctypes.c_void_p, ctypes.c_uint32
    library.seccomp_init.restype, library.seccomp_init.argtypes = pointer, (number,)
    library.seccomp_load.argtypes = library.seccomp_release.argtypes = (pointer,)
    library.seccomp_attr_set.argtypes = (pointer, ctypes.c_int, number)
    library.seccomp_rule_add_array.argtypes = (pointer, number, ctypes.c_int, number, pointer)
    return library
