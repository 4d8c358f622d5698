//! Huge pages are not for a sidecar: it holds a megabyte or two, and there is one for each workload.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::prctl::{get_thp_disable, set_thp_disable};

/// Becomes the same program again, without transparent huge pages. Where that cannot be, everything goes on as it is.
///
/// The allocator gets its first memory before `main` begins, in pages of 2 MB where the system gives them: no later word
/// makes those smaller. That no such pages are wanted is inherited by the program that follows.
pub fn be_small() {
    if get_thp_disable() != Ok(false) || set_thp_disable(true).is_err() {
        return;
    }
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_else(|| OsString::from("postern"));
    // It comes back only if it failed.
    let _ = Command::new("/proc/self/exe").arg0(name).args(arguments).exec();
}

/// Starts a program that may have huge pages, as it would have without a sidecar.
///
/// # Errors
/// It cannot be started.
pub fn start<C>(spawn: impl FnOnce() -> io::Result<C>) -> io::Result<C> {
    let small = get_thp_disable() == Ok(true) && set_thp_disable(false).is_ok();
    let started = spawn();
    if small {
        let _ = set_thp_disable(true);
    }
    started
}
