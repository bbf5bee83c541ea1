//! What the three programs of this package share: the machine, the rings, and the load.

#[path = "../../support/epoll.rs"]
pub mod epoll;
#[path = "../../support/rig.rs"]
pub mod rig;
#[path = "../../support/ring.rs"]
pub mod ring;

pub mod json;
pub mod load;
pub mod machine;
