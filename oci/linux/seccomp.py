"""Seccomp filters for the runtime-spec: Crito's own default profile, and profiles in files of either common format.

The default allows what Docker's and containerd's default profiles allow, with one difference (as in CRI-O): a system
call that the profile does not know returns ENOSYS instead of EPERM, so that a newer C library falls back.
"""

import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oci.errors import InvalidArgument

_EPERM = 1
_ENOSYS = 38
_AF_VSOCK = 40  # the host and its VMs listen there, outside of any network namespace
_CLONE_NEW = 0x7E020000  # all CLONE_NEW* flags

_WORDS = str.split

_ALLOWED = _WORDS(
    """
    accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod chown chown32 clock_adjtime
    clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep
    clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1
    epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit
    exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2
    fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr file_getattr file_setattr flistxattr flock fork
    fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue
    futex_time64 futex_wait futex_waitv futex_wake futimesat get_mempolicy get_robust_list get_thread_area getcpu
    getcwd getdents getdents64 getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer
    getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresgid32 getresuid getresuid32
    getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday getuid getuid32 getxattr getxattrat
    inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents
    io_pgetevents_time64 io_setup io_submit ioctl ioprio_get ioprio_set ipc kill landlock_add_rule
    landlock_create_ruleset landlock_restrict_self lchown lchown32 lgetxattr link linkat listen listxattr listxattrat
    llistxattr _llseek lremovexattr lseek lsetxattr lstat lstat64 madvise map_shadow_stack mbind membarrier
    memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mmap2 mprotect
    mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink
    mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat
    _newselect open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect
    poll ppoll ppoll_time64 prctl pread64 preadv preadv2 prlimit64 process_mrelease process_vm_readv process_vm_writev
    pselect6 pselect6_time64 ptrace pwrite64 pwritev pwritev2 read readahead readdir readlink readlinkat readv recv
    recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr removexattrat rename renameat renameat2
    restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend
    rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_getaffinity sched_getattr sched_getparam
    sched_get_priority_max sched_get_priority_min sched_getscheduler sched_rr_get_interval
    sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp
    select semctl semget semop semtimedop semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg sendto
    set_mempolicy set_robust_list set_thread_area set_tid_address setfsgid setfsgid32 setfsuid setfsuid32 setgid
    setgid32 setgroups setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid
    setresuid32 setreuid setreuid32 setrlimit setsid setsockopt setuid setuid32 setxattr setxattrat shmat shmctl shmdt
    shmget shutdown sigaction sigaltstack signal signalfd signalfd4 sigpending sigprocmask sigreturn sigsuspend
    socketcall socketpair splice stat stat64 statfs statfs64 statx symlink symlinkat sync sync_file_range syncfs
    sysinfo tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime
    timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill
    truncate truncate64 ugetrlimit umask uname unlink unlinkat uretprobe utime utimensat utimensat_time64 utimes vfork
    vmsplice wait4 waitid waitpid write writev
    """
)

# Known calls that nobody gets: EPERM, so that a program does not take them for missing.
_FORBIDDEN = _WORDS(
    """
    add_key bdflush io_uring_enter io_uring_register io_uring_setup kexec_file_load kexec_load keyctl nfsservctl
    oldfstat oldlstat oldolduname oldstat olduname pciconfig_iobase pciconfig_read pciconfig_write request_key
    sgetmask ssetmask swapoff swapon sysfs _sysctl uselib userfaultfd ustat vm86 vm86old
    """
)

# Allowed to whoever has the capability that the kernel asks for anyway, EPERM to all others.
_BY_CAPABILITY = {
    "CAP_DAC_READ_SEARCH": _WORDS("open_by_handle_at"),
    "CAP_SYS_ADMIN": _WORDS(
        """
        bpf fanotify_init fsconfig fsmount fsopen fspick listmount listns lookup_dcookie lsm_get_self_attr
        lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount open_tree open_tree_attr perf_event_open
        pivot_root quotactl quotactl_fd setdomainname sethostname setns statmount syslog umount umount2 unshare
        """
    ),
    "CAP_BPF": _WORDS("bpf"),
    "CAP_PERFMON": _WORDS("perf_event_open"),
    "CAP_SYS_BOOT": _WORDS("reboot"),
    "CAP_SYS_CHROOT": _WORDS("chroot"),
    "CAP_SYS_MODULE": _WORDS("delete_module finit_module init_module query_module"),
    "CAP_SYS_NICE": _WORDS("migrate_pages move_pages set_mempolicy_home_node"),
    "CAP_SYS_PACCT": _WORDS("acct"),
    "CAP_SYS_PTRACE": _WORDS("kcmp pidfd_getfd process_madvise"),
    "CAP_SYS_RAWIO": _WORDS("ioperm iopl"),
    "CAP_SYS_TIME": _WORDS("clock_settime clock_settime64 settimeofday stime"),
    "CAP_SYS_TTY_CONFIG": _WORDS("vhangup"),
    "CAP_SYSLOG": _WORDS("syslog"),
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One machine type: the names of its ABIs in filters (the native one first), and the calls that only it has."""

    name: str  # as in Docker's profiles: Go's GOARCH
    filters: tuple[str, ...]
    only: tuple[str, ...] = ()


_ARCHITECTURES = {
    "x86_64": Architecture(
        "amd64", ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"), ("arch_prctl", "modify_ldt")
    ),
    "aarch64": Architecture(
        "arm64",
        ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
        ("arm_fadvise64_64", "arm_sync_file_range", "breakpoint", "cacheflush", "set_tls", "sync_file_range2"),
    ),
    "armv7l": Architecture(
        "arm",
        ("SCMP_ARCH_ARM",),
        ("arm_fadvise64_64", "arm_sync_file_range", "breakpoint", "cacheflush", "set_tls", "sync_file_range2"),
    ),
    "ppc64le": Architecture("ppc64le", ("SCMP_ARCH_PPC64LE",), ("sync_file_range2", "swapcontext")),
    "riscv64": Architecture("riscv64", ("SCMP_ARCH_RISCV64",), ("riscv_flush_icache", "riscv_hwprobe")),
    "s390x": Architecture(
        "s390x",
        ("SCMP_ARCH_S390X", "SCMP_ARCH_S390"),
        ("s390_pci_mmio_read", "s390_pci_mmio_write", "s390_runtime_instr"),
    ),
    "loongarch64": Architecture("loong64", ("SCMP_ARCH_LOONGARCH64",)),
}


def architecture(machine: str = "") -> Architecture:
    """That of a machine type as uname names it, this host's by default; one that is not known filters natively."""
    machine = machine or platform.machine()
    return _ARCHITECTURES.get(machine, Architecture(machine, ()))


def default_profile(capabilities: Collection[str], host: Architecture) -> dict[str, Any]:
    """linux.seccomp of the profile RuntimeDefault for a process with these capabilities ("CAP_…")."""
    allowed = [*_ALLOWED, *host.only]
    for capability, names in _BY_CAPABILITY.items():
        if capability in capabilities:
            allowed.extend(names)
    if "CAP_SYS_ADMIN" in capabilities:
        allowed.extend(("clone", "clone3"))
    conditional = {name for names in _BY_CAPABILITY.values() for name in names}
    rules = [
        _rule(sorted(set(allowed)), "SCMP_ACT_ALLOW"),
        _rule(sorted({*_FORBIDDEN, *conditional} - set(allowed)), "SCMP_ACT_ERRNO", _EPERM),
        _rule(["socket"], "SCMP_ACT_ALLOW", args=[_argument(0, _AF_VSOCK, "SCMP_CMP_NE")]),
        _rule(["socket"], "SCMP_ACT_ERRNO", _EPERM, args=[_argument(0, _AF_VSOCK, "SCMP_CMP_EQ")]),
        # 0 is Linux, 8 Linux32, 0x20000 UNAME26, 0xffffffff asks.
        *(
            _rule(["personality"], "SCMP_ACT_ALLOW", args=[_argument(0, value, "SCMP_CMP_EQ")])
            for value in (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
        ),
    ]
    if "CAP_SYS_ADMIN" not in capabilities:
        flags = 1 if host.name == "s390x" else 0  # the order of clone's arguments
        rules.append(_rule(["clone"], "SCMP_ACT_ALLOW", args=[_argument(flags, _CLONE_NEW, "SCMP_CMP_MASKED_EQ", 0)]))
        # clone3's flags lie in memory, where a filter cannot look. ENOSYS makes C libraries use clone.
        rules.append(_rule(["clone3"], "SCMP_ACT_ERRNO", _ENOSYS))
    profile: dict[str, Any] = {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": _ENOSYS}
    if host.filters:
        profile["architectures"] = list(host.filters)
    return profile | {"syscalls": rules}


def from_profile(
    profile: Mapping[str, Any], capabilities: Collection[str], host: Architecture, *, name: str, kernel: str = ""
) -> dict[str, Any]:
    """linux.seccomp from a profile file: the runtime-spec's own format, or Docker's with its conditions.

    `name` is for the error's text, `kernel` a release such as "6.1.0-13" (this host's by default).
    """
    if not isinstance(profile, Mapping) or not isinstance(profile.get("defaultAction"), str):
        raise InvalidArgument(f"seccomp profile {name}: defaultAction is missing")
    result = {key: value for key, value in profile.items() if key in _OCI_KEYS and value is not None}
    if "archMap" in profile and not result.get("architectures"):
        result["architectures"] = _mapped_architectures(profile["archMap"], host)
    facts = _Facts(frozenset(capabilities), host.name, _version(kernel or platform.release()))
    try:
        chosen = [rule for rule in profile.get("syscalls") or () if facts.meet(rule)]
        result["syscalls"] = [_oci_rule(rule) for rule in chosen]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise InvalidArgument(f"seccomp profile {name}: malformed rule: {error}") from error
    return result


_OCI_KEYS = ("defaultAction", "defaultErrnoRet", "architectures", "flags", "listenerPath", "listenerMetadata")
_OCI_RULE_KEYS = ("names", "action", "errnoRet", "args")


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the conditions of a rule in Docker's format are about."""

    capabilities: frozenset[str]
    arch: str
    kernel: tuple[int, int]

    def meet(self, rule: Mapping[str, Any]) -> bool:
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        if includes.get("arches") and self.arch not in includes["arches"]:
            return False
        if excludes.get("arches") and self.arch in excludes["arches"]:
            return False
        if any(capability not in self.capabilities for capability in includes.get("caps") or ()):
            return False
        if any(capability in self.capabilities for capability in excludes.get("caps") or ()):
            return False
        if includes.get("minKernel") and self.kernel < _version(includes["minKernel"]):
            return False
        return not (excludes.get("minKernel") and self.kernel >= _version(excludes["minKernel"]))


def _oci_rule(rule: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in rule.items() if key in _OCI_RULE_KEYS and value not in (None, [])}
    if rule.get("name"):
        kept["names"] = [*kept.get("names", ()), rule["name"]]
    if not kept.get("names") or not kept.get("action"):
        raise ValueError(f"names and action are needed, got {dict(rule)!r}")
    return kept


def _mapped_architectures(mapping: Sequence[Mapping[str, Any]], host: Architecture) -> list[str]:
    for entry in mapping:
        if host.filters and entry.get("architecture") == host.filters[0]:
            return [entry["architecture"], *(entry.get("subArchitectures") or ())]
    return list(host.filters[:1])


def _version(release: str) -> tuple[int, int]:
    numbers = release.split("-", maxsplit=1)[0].split(".")
    return int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0


def _rule(
    names: Iterable[str], action: str, errno_ret: int | None = None, args: Sequence[object] = ()
) -> dict[str, Any]:
    rule: dict[str, Any] = {"names": list(names), "action": action}
    if errno_ret is not None:
        rule["errnoRet"] = errno_ret
    if args:
        rule["args"] = list(args)
    return rule


def _argument(index: int, value: int, operator: str, value_two: int | None = None) -> dict[str, Any]:
    argument: dict[str, Any] = {"index": index, "value": value, "op": operator}
    return argument if value_two is None else argument | {"valueTwo": value_two}
