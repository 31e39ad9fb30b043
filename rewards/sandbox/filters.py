"""The system calls that sandboxed code may not make, as a seccomp program.

libseccomp knows every architecture's numbers; it is called through ctypes, so nothing has to be
compiled or installed beside the shared library, which most distributions already have.
"""

import ctypes
import ctypes.util
import errno
import os
import tempfile
from collections.abc import Sequence

_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_NOT_EQUAL, _EQUAL, _MASKED_EQUAL = 1, 4, 7
_CLONE_THREAD = 0x00010000
# time, mnt, cgroup, uts, ipc, user, pid, net
_CLONE_NAMESPACES = (0x80, 0x20000, 1 << 25, 1 << 26, 1 << 27, 1 << 28, 1 << 29, 1 << 30)
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_PR_SET_PDEATHSIG = 1

# What no honest program of a test needs: sockets, other processes, mounts, namespaces, kernel
# interfaces with a history of holes, and whatever outlives the program.
_DENIED = """
socket connect bind listen accept accept4 sendmsg sendmmsg
ptrace process_vm_readv process_vm_writev process_madvise kcmp
pidfd_open pidfd_getfd pidfd_send_signal
mount umount umount2 pivot_root chroot move_mount open_tree fsopen fsconfig fsmount fspick
mount_setattr unshare setns
setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups capset personality
bpf io_uring_setup io_uring_enter io_uring_register perf_event_open userfaultfd
keyctl add_key request_key memfd_create memfd_secret
inotify_init inotify_init1 fanotify_init fanotify_mark name_to_handle_at open_by_handle_at
shmget shmat shmctl msgget msgsnd msgrcv msgctl semget semop semtimedop semctl mq_open mq_unlink
mbind set_mempolicy migrate_pages move_pages
sched_setscheduler sched_setparam sched_setattr sched_setaffinity setpriority ioprio_set
init_module finit_module delete_module kexec_load kexec_file_load reboot swapon swapoff syslog acct
quotactl quotactl_fd sethostname setdomainname settimeofday clock_settime adjtimex clock_adjtime
iopl ioperm modify_ldt uselib vhangup nfsservctl lookup_dcookie mknod mknodat
""".split()

# Where no namespaces hide the rest of the machine: no second process (so none can be left behind),
# no signals, and no change to the attributes of files, which Landlock does not guard.
_DENIED_WITHOUT_NAMESPACES = """
fork vfork kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo
chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes utimensat futimesat
setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr setxattrat removexattrat
file_setattr flock
""".split()


class _Compare(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def seccomp_program(*, one_process: bool) -> bytes:
    """The filter as instructions for the kernel.

    Args:
      one_process: also deny what only namespaces make harmless.

    Raises:
      RuntimeError: there is no libseccomp.
    """
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        raise RuntimeError("libseccomp.so.2 is missing (apt-get install libseccomp2)") from None
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(_ALLOW)))
    try:
        for name in _DENIED + (_DENIED_WITHOUT_NAMESPACES if one_process else []):
            _deny(library, context, name)
        _deny_arguments(library, context, one_process=one_process)
        with tempfile.TemporaryFile() as file:
            if library.seccomp_export_bpf(context, file.fileno()):
                raise RuntimeError("libseccomp cannot export a filter")
            return os.pread(file.fileno(), 1 << 20, 0)
    finally:
        library.seccomp_release(context)


def _deny_arguments(library: ctypes.CDLL, context: ctypes.c_void_p, *, one_process: bool) -> None:
    """Denies calls that are harmless with other arguments."""
    # A filter cannot look into clone3's struct; "not implemented" makes libraries use clone.
    _deny(library, context, "clone3", error=errno.ENOSYS)
    for flag in _CLONE_NAMESPACES:
        _deny(library, context, "clone", [_Compare(0, _MASKED_EQUAL, flag, flag)])
    if one_process:
        _deny(library, context, "clone", [_Compare(0, _MASKED_EQUAL, _CLONE_THREAD, 0)])
    for request in (_TIOCSTI, _TIOCLINUX):
        _deny(library, context, "ioctl", [_Compare(1, _MASKED_EQUAL, 0xFFFFFFFF, request)])
    _deny(library, context, "prctl", [_Compare(0, _EQUAL, _PR_SET_PDEATHSIG, 0)])
    _deny(library, context, "sendto", [_Compare(4, _NOT_EQUAL, 0, 0)])  # an address
    _deny(library, context, "prlimit64", [_Compare(0, _NOT_EQUAL, 0, 0)])  # another process


def _deny(
    library: ctypes.CDLL,
    context: ctypes.c_void_p,
    name: str,
    compares: Sequence[_Compare] = (),
    error: int = errno.EPERM,
) -> None:
    number = library.seccomp_syscall_resolve_name(name.encode())
    if number == -1:  # newer than this libseccomp
        return
    failed = library.seccomp_rule_add_array(
        context,
        ctypes.c_uint32(_ERRNO | error),
        number,
        len(compares),
        (_Compare * len(compares))(*compares),
    )
    if failed:
        raise RuntimeError(f"libseccomp cannot deny {name} ({os.strerror(-failed)})")
