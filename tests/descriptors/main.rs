//! Tests that count what the whole process has open, its descriptors and threads, or that need most
//! of the descriptors that it may have.
//!
//! They take turns (`common::turn`), and are a program of their own, so that no other test opens or
//! leaves anything meanwhile.

#[path = "../common/mod.rs"]
mod common;

mod connect_leaks;
mod direct;
mod inspect_many;
mod resets;
mod restart;
