"""The process of a sandbox: locks itself in, then runs the program on its standard input.

Run as a script by sandbox.py with a word, the seconds and the bytes that it may use; it prints the word when the
program has run to its end. Imports nothing of the package.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # refuse: the call fails with EPERM
X86_64, X32_CALLS = 0xC000003E, 0x40000000
# Places in the kernel's struct seccomp_data.
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_TMPFILE.
WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o20000000

# Linux x86-64 system calls. Those that open files, with the argument that holds the flags.
OPENING = {2: 1, 257: 2}
REFUSED = (
    41, 53, 425,  # socket, socketpair, io_uring_setup
    56, 57, 58, 59, 322, 435,  # clone, fork, vfork, execve, execveat, clone3
    62, 101, 200, 234, 310, 311,  # kill, ptrace, tkill, tgkill, process_vm_*
    129, 297, 424, 434, 438,  # rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal, pidfd_open, pidfd_getfd
    302, 141, 144, 142, 203, 314, 251,  # prlimit64, setpriority, sched_set*, ioprio_set: of any process of the user
    437, 85, 76, 82, 264, 316, 86, 265, 88, 266, 87, 263,  # openat2, creat, truncate, rename*, link*, symlink*, unlink*
    83, 258, 84, 133, 259, 90, 91, 268, 452, 92, 93, 94, 260,  # mkdir*, rmdir, mknod*, chmod*, chown*
    132, 235, 280, 261, 188, 189, 190, 197, 198, 199, 463, 466,  # utime*, setxattr*, removexattr*
    165, 166, 155, 428, 429, 430, 431, 432, 433, 442, 304,  # mounting, old and new, pivot_root, open_by_handle_at
    248, 249, 250,  # add_key, request_key, keyctl
    161, 272, 308, 29, 240, 319, 321, 298, 323,  # chroot, unshare, setns, shmget, ...
)  # fmt: skip


def lock_in(seconds: float, memory: int) -> None:
    """Raises OSError if the kernel does not take the filter."""
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 32),
    ):
        resource.setrlimit(limit, (value, value))
    program = _filter()

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    libc = ctypes.CDLL(None, use_errno=True)
    described = Program(len(program) // 8, program)
    calls = ((PR_SET_NO_NEW_PRIVS, 1, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(described)))
    for option, first, second in calls:
        if libc.prctl(option, first, second, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")


def _filter() -> bytes:
    """A program of the kernel's packet filter: each pair tests the loaded word and returns if the test holds."""
    steps = [
        (LOAD | 0x00, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, X86_64),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, X32_CALLS),
        (RETURN, 0, 0, KILL),
    ]
    for number in REFUSED:
        steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE)]
    for number, argument in OPENING.items():
        steps += [
            (EQUAL, 0, 4, number),
            (LOAD, 0, 0, ARGUMENTS + 8 * argument),
            (ANY_BIT, 0, 1, WRITING),
            (RETURN, 0, 0, REFUSE),
            (RETURN, 0, 0, ALLOW),
        ]
    steps.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def main() -> None:
    word, seconds, memory = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    sys.argv = ["program"]
    source = sys.stdin.buffer.read()
    answer = os.dup(1)
    try:
        lock_in(seconds, memory)
    except OSError as error:
        print(error, file=sys.stderr)
        os._exit(77)
    # What the program prints is nobody's business.
    os.close(1)
    sys.stdout = None
    exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
    os.write(answer, word.encode())
    os._exit(0)


if __name__ == "__main__":
    main()
