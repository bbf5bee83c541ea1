//! Who accepts where: the sockets of all addresses, dealt out to the cores.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crate::adopt::Kept;
use crate::bind::{Bound, ListenAddr};
use crate::error::{Error, ErrorKind, Result};
use crate::group::Group;
use crate::stop::Membership;

/// One core's listener of an address.
#[derive(Debug)]
pub(crate) struct Share {
    /// Which `listen` call it belongs to.
    pub(crate) endpoint: usize,
    pub(crate) socket: OwnedFd,
    /// Its place among the listeners of its port, if we have opened it.
    pub(crate) membership: Option<Membership>,
    /// What is left open at the end, if it was passed in.
    pub(crate) kept: Option<Arc<Kept>>,
}

/// All cores' listeners.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    /// Those of each core, in the same order.
    pub(crate) cores: Vec<Vec<Share>>,
    /// Where they listen, in that order.
    pub(crate) addrs: Vec<ListenAddr>,
    /// The cores that accept from each socket that was passed in.
    pub(crate) kept: Vec<(ListenAddr, Vec<usize>)>,
}

impl Shares {
    /// Deals out what the endpoints listen on; with the cores' CPUs, if those are to choose.
    ///
    /// # Errors
    /// When the kernel can't be told to have the CPUs choose.
    pub(crate) fn deal(
        bound: Vec<(usize, Bound)>,
        cores: usize,
        cpus: Option<&[u16]>,
    ) -> Result<Shares> {
        let mut shares = Shares::default();
        shares.cores.resize_with(cores, Vec::new);
        for (endpoint, bound) in bound {
            if bound.kept.is_empty() {
                shares.deal_own(endpoint, bound, cpus)?;
            } else if cpus.is_none() {
                shares.deal_kept(endpoint, bound);
            } else {
                return Err(Error::new(ErrorKind::Config, format!("steer {} by CPU", bound.addr))
                    .because(KEPT_BY_CPU));
            }
        }
        Ok(shares)
    }

    fn deal_own(&mut self, endpoint: usize, bound: Bound, cpus: Option<&[u16]>) -> Result<()> {
        let is_tcp = matches!(bound.addr, ListenAddr::Tcp(_));
        let by_cpu = cpus.map(<[u16]>::to_vec);
        let group = is_tcp.then(|| Arc::new(Group::new(self.cores.len(), by_cpu)));
        if let (Some(group), Some(socket)) = (&group, bound.sockets.first()) {
            group
                .begin(socket.as_fd())
                .map_err(|error| Error::os(format!("steer {} by CPU", bound.addr), error))?;
        }
        for (core, socket) in bound.sockets.into_iter().enumerate() {
            let membership = group.clone().map(|group| Membership { group, core });
            self.cores[core].push(Share { endpoint, socket, membership, kept: None });
        }
        self.addrs.push(bound.addr);
        Ok(())
    }

    fn deal_kept(&mut self, endpoint: usize, bound: Bound) {
        let cores = self.cores.len();
        let mut users: Vec<(Arc<Kept>, Vec<usize>)> = Vec::new();
        for (at, (socket, kept)) in bound.sockets.into_iter().zip(bound.kept).enumerate() {
            let core = at % cores;
            if core == 0 {
                self.addrs.push(bound.addr.clone());
            }
            match users.iter_mut().find(|(known, _)| Arc::ptr_eq(known, &kept)) {
                Some((_, users)) => users.push(core),
                None => users.push((Arc::clone(&kept), vec![core])),
            }
            let kept = Some(kept);
            self.cores[core].push(Share { endpoint, socket, membership: None, kept });
        }
        self.kept.extend(users.into_iter().map(|(_, users)| (bound.addr.clone(), users)));
    }
}

const KEPT_BY_CPU: &str = "its sockets were passed in, and their order is not known; take \
                           SLIPRING_BALANCE=hash or least, or have slipring listen there itself";
