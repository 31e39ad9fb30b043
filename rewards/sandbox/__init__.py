"""Runs programs that nobody trusts.

`tiers.open_sandbox` gives the strongest isolation that withstands a self-test on this machine:

* "namespaces": bubblewrap around one long-lived process (zygote.py), and around each program users,
  process ids, mounts and IPC of its own, no network, no capabilities, a seccomp filter, empty
  folders in memory, and limits on memory, CPU time, processes, files and output;
* "landlock": no file may be written and none but the standard library's read, no second process,
  no signals, no sockets, a seccomp filter, and the same limits;
* otherwise an error, unless the caller asks for "none".

Each program is a fork of the zygote, which has the standard library imported. Started by root, the
zygote runs under a user id that nothing else has. From the outside in: tiers.py decides,
box.py hands out jobs, filters.py lists forbidden system calls, zygote.py and lockdown.py run inside
and are all that is shipped there, with values.py for what may cross.

Not covered: bugs of the kernel, and telling how long things take. With Landlock alone a program can
also find out which files exist, though not what is in them, and there is no folder to write to.
"""
