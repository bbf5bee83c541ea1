//! The house rules and what the documents say, held against the tree. No test here starts a server.

#[path = "../common/mod.rs"]
mod common;

mod catalogue;
mod docs;
mod rules;
