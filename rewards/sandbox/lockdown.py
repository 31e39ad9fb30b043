"""What a process does to itself before it runs code that it does not trust. Linux only.

Runs in the sandbox's own interpreter; imports nothing but the standard library.
"""

import ctypes
import os
import resource
import signal
from collections.abc import Mapping, Sequence

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_PIDS = 0x00020000, 0x08000000, 0x10000000, 0x20000000
_READ_ONLY, _NO_SUID, _NO_DEVICES, _NO_EXEC, _RECURSIVE, _PRIVATE = 1, 2, 4, 8, 0x4000, 1 << 18
_CAPABILITY_VERSION = 0x20080522
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC_HOLDING_THE_LOCK = ctypes.PyDLL(None, use_errno=True)


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when `parent` dies."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def become(uid: int) -> None:
    """Gives up root for good; the process may still write its own files in /proc."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    _check(_LIBC.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "PR_SET_DUMPABLE")


def fork(*, namespaces: bool) -> int:
    """Forks; with namespaces, the child has its own users, process ids, mounts and IPC.

    The child is process 1 of its namespace: when it ends, the kernel kills all that it started.
    A clone of our own rather than fork and unshare, which take a process more; it leaves out what
    Python does for threads and locks at a fork, so it is for single-threaded processes only.
    """
    if not namespaces:
        return os.fork()
    number = {"x86_64": 56, "aarch64": 220}.get(os.uname().machine)
    if number is None:
        raise OSError(f"clone is not known on {os.uname().machine}")
    flags = _NEW_USER | _NEW_PIDS | _NEW_MOUNTS | _NEW_IPC | signal.SIGCHLD
    pid: int = _LIBC_HOLDING_THE_LOCK.syscall(number, ctypes.c_ulong(flags), None, None, None, None)
    _check(min(pid, 0), "clone into namespaces")
    return pid


def set_up_namespaces(uid: int, gid: int, scratch_mib: int) -> None:
    """Keeps the user's ids, and puts empty file systems where it can write, and over /proc."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        fd = os.open(f"/proc/self/{name}", os.O_WRONLY)
        os.write(fd, text.encode())
        os.close(fd)
    _check(_LIBC.mount(None, b"/", None, _RECURSIVE | _PRIVATE, None), "private mounts")
    careful = _NO_SUID | _NO_DEVICES
    _mount_tmpfs(b"/tmp", careful, f"size={scratch_mib}m,nr_inodes=4096,mode=0700")
    _mount_tmpfs(b"/dev/shm", careful, "size=16m,nr_inodes=256,mode=0700")
    _mount_tmpfs(b"/proc", careful | _NO_EXEC | _READ_ONLY, "size=4k,nr_inodes=2")


def _mount_tmpfs(where: bytes, flags: int, options: str) -> None:
    failed = _LIBC.mount(b"tmpfs", where, b"tmpfs", ctypes.c_ulong(flags), options.encode())
    _check(failed, f"tmpfs on {where.decode()}")


def drop_capabilities() -> None:
    """Empties the sets that a new user namespace fills."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    _check(_LIBC.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def limit(limits: Mapping[str, int]) -> None:
    """Sets resource limits by name ("AS"), soft and hard; never raises one."""
    for name, value in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        _, hard = resource.getrlimit(which)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def forbid_new_privileges() -> None:
    """Makes setuid programs powerless; the kernel wants it before the next two."""
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")


def landlock_abi() -> int:
    """Which version of Landlock the kernel has; 0 is none."""
    return max(0, _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def landlock(readable: Sequence[str]) -> None:
    """Denies all files but those under `readable`, all TCP, and signals to other domains."""
    abi = landlock_abi()
    if abi < 1:
        raise OSError("the kernel has no Landlock")
    rights = 13 + (abi >= 2) + (abi >= 3) + (abi >= 5)
    attributes = (ctypes.c_uint64 * 3)((1 << rights) - 1, 0b11, 0b11)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = _LIBC.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    _check(min(ruleset, 0), "landlock_create_ruleset")
    for path in readable:
        if os.path.isdir(path):
            _allow_path(ruleset, path, _EXECUTE | _READ_FILE | _READ_DIR)
    for path in ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"):
        _allow_path(ruleset, path, _READ_FILE | (_WRITE_FILE if path == "/dev/null" else 0))
    _check(_LIBC.syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)), "landlock_restrict_self")
    os.close(ruleset)


def _allow_path(ruleset: int, path: str, access: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = access.to_bytes(8, "little") + fd.to_bytes(4, "little")
    failed = _LIBC.syscall(_ADD_RULE, ruleset, 1, rule, ctypes.c_uint32(0))
    os.close(fd)
    _check(failed, f"landlock_add_rule for {path}")


def seccomp(program: bytes) -> None:
    """Installs a filter made by rewards/sandbox/filters.py, for good."""

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    told = ctypes.byref(Filter(len(program) // 8, program))
    _check(_LIBC.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, told, 0, 0), "seccomp")


def _check(failed: int, what: str) -> None:
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
