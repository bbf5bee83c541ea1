//! The listeners of one port, one for each core: who gets new connections, by CPU where that is
//! wanted, and when a core leaves.
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
    /// The cores' CPUs, if those are to choose.
    cpus: Option<Vec<u16>>,
    /// The program does not fit the order any more, or is not needed any more.
    stale: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Member {
    core: usize,
    leaving: bool,
}

/// What the program says: the numbers of the listeners.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Program {
    /// There is none: the kernel chooses.
    Nothing,
    /// That of a CPU where it has one, and else one of those; the kernel chooses if there are none.
    Steer { by_cpu: Vec<(u16, u32)>, among: Vec<u32> },
}

impl Order {
    fn new(cores: usize, cpus: Option<Vec<u16>>) -> Order {
        let members = (0..cores).map(|core| Member { core, leaving: false }).collect();
        Order { members, cpus, stale: false }
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

    /// Those that stay, as their cores and numbers.
    fn staying(&self) -> impl Iterator<Item = (usize, u32)> {
        let members = self.members.iter().enumerate().filter(|(_, member)| !member.leaving);
        members.map(|(index, member)| (member.core, index as u32))
    }

    fn program(&self) -> Program {
        let all_stay = self.staying().count() == self.members.len();
        let cpus = self.cpus.as_ref();
        if all_stay && cpus.is_none() {
            return Program::Nothing;
        }
        let by_cpu = |(core, index)| Some((*cpus?.get(core)?, index));
        // The kernel's choice would be among all.
        let among = self.staying().filter(|_| !all_stay).map(|(_, index)| index);
        Program::Steer {
            by_cpu: self.staying().filter_map(by_cpu).collect(),
            among: among.collect(),
        }
    }
}

impl Program {
    fn attach(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        match self {
            Program::Nothing => filter::stop_steering(socket),
            Program::Steer { by_cpu, among } => filter::steer(socket, by_cpu, among),
        }
    }
}

impl Group {
    /// With the cores' CPUs, if those are to choose.
    pub(crate) fn new(cores: usize, cpus: Option<Vec<u16>>) -> Group {
        Group { order: Mutex::new(Order::new(cores, cpus)) }
    }

    /// Has the CPUs choose, if they are to.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn begin(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        match self.lock().program() {
            Program::Nothing => Ok(()),
            program => program.attach(socket),
        }
    }

    /// Steers new connections away from a core that leaves.
    ///
    /// # Errors
    /// What the kernel answers, and `ENOENT` when nobody would be left to steer to.
    pub(crate) fn leave(&self, core: usize, socket: BorrowedFd<'_>) -> io::Result<()> {
        let mut order = self.lock();
        order.leave(core);
        if order.staying().next().is_none() {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        }
        order.program().attach(socket)
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
        // With a program that could not be replaced, all that stay are still reached.
        let _ = order.program().attach(socket);
    }

    fn lock(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(order: &Order) -> Vec<u32> {
        order.staying().map(|(_, index)| index).collect()
    }

    #[test]
    fn a_cpu_keeps_its_core_whatever_number_that_has_and_who_leaves_has_none() {
        let mut order = Order::new(4, Some(vec![0, 2, 4, 6]));
        let steer = |by_cpu: &[(u16, u32)], among: &[u32]| Program::Steer {
            by_cpu: by_cpu.to_vec(),
            among: among.to_vec(),
        };
        assert_eq!(order.program(), steer(&[(0, 0), (2, 1), (4, 2), (6, 3)], &[]));
        // Its own CPU's connections go to the others meanwhile, and not by the kernel's hash.
        order.leave(1);
        assert_eq!(order.program(), steer(&[(0, 0), (4, 2), (6, 3)], &[0, 2, 3]));
        order.remove(1);
        assert_eq!(order.program(), steer(&[(0, 0), (6, 1), (4, 2)], &[]));
    }

    #[test]
    fn the_last_takes_the_number_of_the_one_that_goes() {
        let mut order = Order::new(4, None);
        order.leave(1);
        assert_eq!(numbers(&order), [0, 2, 3]);
        order.remove(1);
        assert!(order.stale);
        let cores: Vec<usize> = order.members.iter().map(|member| member.core).collect();
        assert_eq!(cores, [0, 3, 2]);
        assert_eq!(numbers(&order), [0, 1, 2]);
        assert_eq!(order.program(), Program::Nothing);
    }

    #[test]
    fn several_may_leave_at_once_in_any_order() {
        let mut order = Order::new(5, None);
        order.leave(0);
        order.leave(4);
        assert_eq!(numbers(&order), [1, 2, 3]);
        order.remove(0);
        assert_eq!(numbers(&order), [1, 2, 3], "4 has the number 0 now");
        order.remove(4);
        assert_eq!(numbers(&order), [0, 1, 2]);
        order.remove(4);
        assert_eq!(order.members.len(), 3);
    }

    #[test]
    fn who_goes_in_a_full_stop_needs_no_program() {
        let mut order = Order::new(2, None);
        order.remove(0);
        assert!(!order.stale);
    }
}
