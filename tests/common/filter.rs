//! Refusals of system calls as a sandbox makes them: seccomp(2) filters.

/// From now on this thread, and those that it starts, get the error instead of the system call.
pub fn refuse_here(call: libc::c_long, errno: i32) {
    refuse(call, errno, 0);
}

/// From now on the whole process does.
pub fn refuse_everywhere(call: libc::c_long, errno: i32) {
    refuse(call, errno, libc::SECCOMP_FILTER_FLAG_TSYNC);
}

fn refuse(call: libc::c_long, errno: i32, flags: libc::c_ulong) {
    let code = |code: u32, k: u32, otherwise: u8| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: otherwise,
        k,
    };
    let mut filter = [
        // The call's number stands first in `struct seccomp_data`.
        code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, call as u32, 1),
        code(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno as u32, 0),
        code(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let program =
        libc::sock_fprog { len: filter.len() as libc::c_ushort, filter: filter.as_mut_ptr() };
    // SAFETY: takes integers.
    let privileges = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(privileges, 0, "prctl: {}", std::io::Error::last_os_error());
    let mode = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: the kernel copies the program, which outlives the call.
    let set = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) };
    assert_eq!(set, 0, "seccomp: {}", std::io::Error::last_os_error());
}
