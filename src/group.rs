//! The listeners of one port, one for each core: who gets new connections when a core leaves.
//!
//! The kernel numbers them in the order in which they began to listen, and when one is closed the
//! last takes its number. A program that is attached to the group names numbers, so the order is
//! kept here, and a listener is closed and the program put right by one core at a time.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard};

use crate::sys::filter;

/// Shared by the cores that listen on one TCP address.
#[derive(Debug)]
pub(crate) struct Group {
    order: Mutex<Order>,
}

/// Which core's listener has which number. Pure.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Order {
    members: Vec<Member>,
    /// The program does not fit the order any more, or is not needed any more.
    stale: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Member {
    core: usize,
    leaving: bool,
}

impl Order {
    fn new(cores: usize) -> Order {
        let members = (0..cores).map(|core| Member { core, leaving: false }).collect();
        Order { members, stale: false }
    }

    fn leave(&mut self, core: usize) {
        for member in self.members.iter_mut().filter(|member| member.core == core) {
            member.leaving = true;
        }
    }

    fn remove(&mut self, core: usize) {
        if let Some(index) = self.members.iter().position(|member| member.core == core) {
            let gone = self.members.swap_remove(index);
            self.stale |= gone.leaving;
        }
    }

    /// The numbers of those that stay.
    fn staying(&self) -> Vec<u32> {
        let members = self.members.iter().enumerate();
        members.filter(|(_, member)| !member.leaving).map(|(index, _)| index as u32).collect()
    }
}

impl Group {
    pub(crate) fn new(cores: usize) -> Group {
        Group { order: Mutex::new(Order::new(cores)) }
    }

    /// Steers new connections away from a core that leaves.
    ///
    /// # Errors
    /// What the kernel answers, and `ENOENT` when nobody would be left to steer to.
    pub(crate) fn leave(&self, core: usize, socket: BorrowedFd<'_>) -> io::Result<()> {
        let mut order = self.lock();
        order.leave(core);
        match order.staying() {
            staying if staying.is_empty() => Err(io::Error::from_raw_os_error(libc::ENOENT)),
            staying => filter::steer(socket, &staying),
        }
    }

    /// Closes a core's listener. Until [`Group::put_right`] the program names numbers of before:
    /// the one of the socket that was closed is none of them, and the one that nobody has now
    /// leaves the choice to the kernel.
    pub(crate) fn close(&self, core: usize, socket: OwnedFd) {
        let mut order = self.lock();
        drop(socket);
        order.remove(core);
    }

    /// Makes the program fit the order again, by a member that has not left.
    pub(crate) fn put_right(&self, socket: BorrowedFd<'_>) {
        let mut order = self.lock();
        if !std::mem::take(&mut order.stale) {
            return;
        }
        let staying = order.staying();
        // With a program that could not be replaced, all that stay are still reached.
        let _ = if staying.len() == order.members.len() {
            filter::stop_steering(socket)
        } else {
            filter::steer(socket, &staying)
        };
    }

    fn lock(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_takes_the_number_of_the_one_that_goes() {
        let mut order = Order::new(4);
        order.leave(1);
        assert_eq!(order.staying(), [0, 2, 3]);
        order.remove(1);
        assert!(order.stale);
        let cores: Vec<usize> = order.members.iter().map(|member| member.core).collect();
        assert_eq!(cores, [0, 3, 2]);
        assert_eq!(order.staying(), [0, 1, 2]);
    }

    #[test]
    fn several_may_leave_at_once_in_any_order() {
        let mut order = Order::new(5);
        order.leave(0);
        order.leave(4);
        assert_eq!(order.staying(), [1, 2, 3]);
        order.remove(0);
        assert_eq!(order.staying(), [1, 2, 3], "4 has the number 0 now");
        order.remove(4);
        assert_eq!(order.staying(), [0, 1, 2]);
        order.remove(4);
        assert_eq!(order.members.len(), 3);
    }

    #[test]
    fn who_goes_in_a_full_stop_needs_no_program() {
        let mut order = Order::new(2);
        order.remove(0);
        assert!(!order.stale);
    }
}
