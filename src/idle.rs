//! How a core waits: it submits what is queued, looks out for news for as long as that pays, and
//! blocks.

use std::io;

use crate::core::Core;
use crate::driver::Wait;
use crate::spin::SpinState;

impl Core {
    /// Enters the kernel and waits as told; what is queued is submitted first of all.
    ///
    /// # Errors
    /// As [`Driver::enter`](crate::driver::Driver::enter).
    pub(crate) fn wait_for_news(&mut self, wait: Wait) -> io::Result<()> {
        if wait == Wait::No || !self.spin.is_on() {
            return self.block(wait);
        }
        // No answer waits for a spin to end.
        self.driver.enter(Wait::No)?;
        if self.driver.is_ready() || self.post.mailbox.has_mail() {
            return Ok(());
        }
        // The kernel says that it has work after it has queued that, so who was quick has done it
        // already, and is told so until there is more: whether there is, only the kernel knows.
        if self.driver.has_news() {
            return self.block(wait);
        }
        let since_ns = self.driver.now_ns();
        if self.spin.is_rested(since_ns) {
            self.counters.spin.set(SpinState::On as u64);
        }
        let limit_ns = wait.at_most(self.spin.limit_ns(since_ns), since_ns);
        if limit_ns > 0 {
            let (found, spun_ns) = self.spin_for(limit_ns, since_ns);
            if found {
                self.spin.found(spun_ns);
                return self.driver.enter(Wait::No);
            }
            self.spin.found_nothing(limit_ns);
        }
        let entered = self.block(wait);
        self.spin.blocked(self.driver.now_ns().saturating_sub(since_ns));
        entered
    }

    /// Sleeps in the kernel, unless a message has come.
    fn block(&mut self, wait: Wait) -> io::Result<()> {
        if wait == Wait::No || !self.post.mailbox.fall_asleep() {
            return self.driver.enter(Wait::No);
        }
        let entered = self.driver.enter(wait);
        self.post.mailbox.wake_up();
        entered
    }

    /// Looks out until something comes or the time is over. Other threads need not ring for it.
    fn spin_for(&mut self, limit_ns: u64, since_ns: u64) -> (bool, u64) {
        let (mut found, mut spun_ns) = (false, 0);
        while !found && spun_ns < limit_ns {
            for _ in 0..LOOKS {
                std::hint::spin_loop();
                found = self.has_news();
                if found {
                    break;
                }
            }
            spun_ns = self.driver.now_ns().saturating_sub(since_ns);
        }
        let counters = &self.counters;
        if found { &counters.spins_found } else { &counters.spins_in_vain }.add(1);
        self.spun_ns += spun_ns;
        self.counters.spin_us.set(self.spun_ns / 1_000);
        self.look_for_others(since_ns + spun_ns);
        (found, spun_ns)
    }

    fn has_news(&mut self) -> bool {
        self.driver.has_news() || self.post.mailbox.has_mail()
    }

    /// Sees now and then whether others want the CPU.
    fn look_for_others(&mut self, now_ns: u64) {
        if self.settings.spin_shared || !self.spin.is_to_look(now_ns) {
            return;
        }
        let rests = self.spin.look(now_ns, self.driver.waited_ns().unwrap_or(0));
        let state = if rests { SpinState::Preempted } else { SpinState::On };
        self.counters.spin.set(state as u64);
    }
}

/// How often it looks for each time that it looks at the clock, which takes some 30 ns.
const LOOKS: u32 = 8;
