//! The data path over real sockets, with nothing but the library: what is sent arrives, whatever
//! the peers and the handlers do.
//!
//! Its tests run beside each other. `.ci/run` runs `streams` under AddressSanitizer, too, and
//! `scripts/kernel-matrix.sh --short` runs `calls` on other kernels, which is why nothing here may
//! need a feature or another crate.

#[path = "../common/mod.rs"]
mod common;

mod bulk;
mod calls;
mod cases;
mod reuse;
mod streams;
